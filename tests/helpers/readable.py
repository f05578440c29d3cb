"""What a figure says, and whether it can be read."""

import itertools


def visible_texts(figure):
    """(text, box in pixels) of all that is drawn, axis ticks included."""
    from matplotlib.text import Text

    figure.draw_without_rendering()  # a figure that was saved as SVG has its texts where that format had them
    renderer = figure.canvas.get_renderer()
    hidden = set()
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, sorted(axes.get_ylim()))):
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low <= tick.get_loc() <= high:
                    hidden |= {tick.label1, tick.label2}
    texts = [
        text for text in figure.findobj(Text) if text not in hidden and text.get_visible() and text.get_text().strip()
    ]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in texts]


def assert_readable(figure):
    """No text leaves the figure and none lies on another."""
    width, height = figure.get_size_inches() * figure.dpi
    texts = visible_texts(figure)
    assert len(texts) > 3
    for text, box in texts:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, f"'{text}' leaves the figure"
    for (a, one), (b, two) in itertools.combinations(texts, 2):
        across = min(one.x1, two.x1) - max(one.x0, two.x0)
        down = min(one.y1, two.y1) - max(one.y0, two.y0)
        assert across <= 1 or down <= 1, f"'{a}' lies on '{b}'"
