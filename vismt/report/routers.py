"""The weights of an arm's routers by patch: the file, written from an unmerged net, and its picture."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.lowrank.layers.wrappers import wrappers_of
from vismt.multitask.emtal.ffn import MoEfiedMlp
from vismt.multitask.emtal.routing import expert_weights
from vismt.report.panels import read_panel, to_bytes, write_panel
from vismt.report.plotting import (
    MUTED,
    axes_at,
    color_of,
    legend,
    legend_rows,
    new_figure,
    save,
    show_image,
    write,
)
from vismt.report.tables import Picture

ROUTERS = "routers"  # the folder of the files
ROUTED_IMAGES = 4
ROUTED_BLOCKS = 3
CAPTION = (
    "The router's weights at fade 0 on the tokens of the trained model at its trained fade. Weights average 1 over the "
    "experts; an expert's number is comparable within its block only."
)


def has_routers(net: nn.Module) -> bool:
    """Return whether a net has a router."""
    return any(isinstance(part, MoEfiedMlp) for part in wrappers_of(net).values())


def write_routers(path: Path, net: Any, images: Tensor) -> Path:
    """Write the experts' weights on the patches of images at fade 0, whatever the fade of the net is.

    The file holds omega, float16 (block, n, e, rows, columns), computed on the tokens at the net's fade, in the first, the
    middle and the last FFN with a router, without class and register tokens; and blocks, int64, the index of each in the
    model of `depth` blocks.

    Args:
        path: the file to write.
        net: an unmerged net with a timm model as `stock` and a `backbone`.
        images: float (n, 3, h, w) in [0, 1].

    Raises:
        UserError: for a net without a router.
    """
    routed = [(name, part) for name, part in wrappers_of(net).items() if isinstance(part, MoEfiedMlp)]
    if not routed:
        raise UserError("routers: this net has no router; take one that was adapted with emtal and is not merged.")
    chosen = [
        routed[i] for i in sorted({round(i * (len(routed) - 1) / (ROUTED_BLOCKS - 1)) for i in range(ROUTED_BLOCKS)})
    ]
    weights: dict[str, Tensor] = {}
    hooks = [part.register_forward_pre_hook(partial(_weigh, weights, name)) for name, part in chosen]
    training = net.training
    try:
        with torch.no_grad():
            net.eval()(images.to(next(net.parameters()).device))
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    rows, columns = net.backbone.grid
    patches = [weights[name][:, net.stock.num_prefix_tokens :] for name, _ in chosen]
    maps = [rearrange(omega, "b (r c) e -> b e r c", r=rows, c=columns) for omega in patches]
    return write_panel(
        path,
        "routers",
        {
            "images": to_bytes(images),
            "omega": torch.stack(maps).to("cpu", torch.float16).numpy(),
            "blocks": np.array([_block(name) for name, _ in chosen], dtype=np.int64),
            "depth": np.array(net.backbone.depth, dtype=np.int64),
        },
    )


def _block(path: str) -> int:
    """Return the index of the block in a module's path."""
    match = re.search(r"blocks\.(\d+)", path)
    if match is None:
        raise UserError(f"routers: '{path}' is not in a block of the model.")
    return int(match[1])


def _weigh(weights: dict[str, Tensor], name: str, part: MoEfiedMlp, inputs: tuple[Tensor]) -> None:
    router = part.lora_router
    weights[name] = expert_weights(router(inputs[0].to(router.weight.dtype)) / part.temperature, 0.0)


def routers_figure(panel: Path, path: Path) -> Path:
    """Draw a row for each image: for each block the expert with the largest weight at every patch, and that weight.

    All weights share one scale, which begins at 1, the weight of every expert where a router has no preference.

    Args:
        panel: the file of `write_routers`.
        path: the PNG to write.

    Raises:
        UserError: a file of another kind.
    """
    from matplotlib.colors import ListedColormap

    arrays = read_panel(panel, "routers")
    images = arrays["images"]
    omega = arrays["omega"].astype(np.float32)
    blocks = arrays["blocks"].tolist()
    depth = int(arrays["depth"])
    best = omega.argmax(2)
    most = omega.max(2)
    names = [str(number + 1) for number in range(omega.shape[2])]
    colors = [color_of(name, names) for name in names]
    cell, pitch, gap, left, label = 1.15, 1.22, 0.18, 0.1, 1.0
    rows, columns = images.shape[-2:]
    across = cell * min(1.0, columns / rows)
    down = cell * min(1.0, rows / columns)
    width = left + pitch + len(blocks) * (2 * pitch + gap) + 0.7
    top = 0.2 + 0.22 * legend_rows(names, width - label) + 0.5
    figure = new_figure(max(width, 5.0), top + (down + 0.07) * len(images) + 0.05)
    legend(figure, names, colors, label)
    write(figure, left, 0.27, "Expert", va="center", weight="bold")
    colormap = ListedColormap(colors)
    highest = max(1.01, float(most.max()))
    for row, image in enumerate(images):
        y = top + (down + 0.07) * row
        show_image(axes_at(figure, left, y, across, down), image)
        for number, block in enumerate(blocks):
            x = left + pitch + gap + number * (2 * pitch + gap)
            if row == 0:
                write(figure, x, y - 0.25, f"Block {block + 1} of {depth}", va="bottom", weight="bold")
                for place, text in enumerate(("strongest expert", "its weight ω")):
                    write(figure, x + pitch * place, y - 0.06, text, va="bottom", color=MUTED, fontsize=8.5)
            first, second = (axes_at(figure, x + pitch * place, y, across, down) for place in (0, 1))
            first.imshow(best[number, row], cmap=colormap, vmin=-0.5, vmax=len(names) - 0.5, interpolation="nearest")
            drawn = second.imshow(most[number, row], cmap="viridis", vmin=1.0, vmax=highest, interpolation="nearest")
            for axes in (first, second):
                axes.axis("off")
    bar = figure.colorbar(drawn, cax=axes_at(figure, width - 0.6, top, 0.12, down), format="%.2f")
    bar.set_ticks(np.linspace(1.0, highest, 3).tolist())
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=8, length=0)
    return save(figure, path)


def router_pictures(folder: Path) -> list[Picture]:
    """Draw the picture of every file in the run folder."""
    pictures = []
    for panel in sorted((folder / ROUTERS).glob("*.npz")):
        path = routers_figure(panel, folder / "figures" / f"routers-{panel.stem}.png")
        pictures.append(Picture(path, f"Routers of {panel.stem}", CAPTION))
    return pictures
