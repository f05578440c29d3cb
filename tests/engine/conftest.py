"""What the tests of figures share."""

import pytest

from vismt.engine import (
    canvas,
    dense_figures,
    episode_figure,
    figures,
    multitask_figures,
    pool_figures,
    router_maps,
    study_figures,
)

DRAWING = (dense_figures, episode_figure, figures, multitask_figures, pool_figures, router_maps, study_figures)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, with everything laid out."""
    found = []

    def keep(figure, path):
        found.append(figure)
        figure.canvas.draw()
        return canvas.save(figure, path)

    for module in DRAWING:
        monkeypatch.setattr(module, "save", keep)
    return found
