"""What the routers of an arm weigh where: the file, written from a net that still has them, and its picture."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from vismt.engine.arms import Unit, arm_config, final_units
from vismt.errors import UserError
from vismt.jobs.fewshot.report import Picture
from vismt.lowrank.wrappers import parts_of
from vismt.multitask.moefied import MoEfiedMlp
from vismt.multitask.routing import expert_weights
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

ROUTERS, IMAGES = "routers", "Images"  # the folder of the files; the section of the report
ROUTED_IMAGES, ROUTED_BLOCKS = 4, 3
CAPTION = (
    "What the router would weigh (fade 0) on the tokens of the trained model at its own fade. Weights average 1 over the "
    "experts; an expert's number means something within its block only."
)


def routed(config: Any, folder: Path, arm: str) -> Unit | None:
    """The first seed of an arm with routers, None for another arm."""
    method = arm_config(config, arm).adapt
    return None if method is None or method.method != "moe_lora" else final_units(config, folder, arm)[0]


def write_routers(path: Path, net: nn.Module, images: Tensor) -> Path:
    """Write what the routers of an unmerged net weigh the patches of images with, whatever the fade is now.

    images: float (n, 3, h, w) in [0, 1]. omega: float16 (block, n, e, rows, columns), at fade 0, on the tokens as they are at
    the net's own fade, in the first, the middle and the last FFN with a router; class and register tokens are left out.
    blocks: int64, the index of each in the model of `depth` blocks. Raises UserError for a net without a router.
    """
    routed = [(name, part) for name, part in parts_of(net).items() if isinstance(part, MoEfiedMlp)]
    if not routed:
        raise UserError("routers: this net has no router; take one that was adapted with moe_lora and is not merged.")
    chosen = [
        routed[i] for i in sorted({round(i * (len(routed) - 1) / (ROUTED_BLOCKS - 1)) for i in range(ROUTED_BLOCKS)})
    ]
    seen: dict[str, Tensor] = {}
    hooks = [part.register_forward_pre_hook(partial(_weigh, seen, name)) for name, part in chosen]
    training = net.training
    try:
        with torch.no_grad():
            net.eval()(images.to(next(net.parameters()).device))
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    rows, columns = net.backbone.grid
    patches = [seen[name][:, net.stock.num_prefix_tokens :] for name, _ in chosen]
    maps = [rearrange(omega, "b (r c) e -> b e r c", r=rows, c=columns) for omega in patches]
    return write_panel(
        path,
        "routers",
        {
            "images": to_bytes(images),
            "omega": torch.stack(maps).to("cpu", torch.float16).numpy(),
            "blocks": np.array([int(re.search(r"blocks\.(\d+)", name)[1]) for name, _ in chosen], dtype=np.int64),
            "depth": np.array(net.backbone.depth, dtype=np.int64),
        },
    )


def _weigh(seen: dict[str, Tensor], name: str, part: MoEfiedMlp, inputs: tuple[Tensor]) -> None:
    router = part.lora_router
    seen[name] = expert_weights(router(inputs[0].to(router.weight.dtype)) / part.temperature, 0.0)


def routers_figure(panel: Path, path: Path) -> Path:
    """A row for each image; for each block the expert with the largest weight at every patch, and that weight.

    Args:
        panel: the file of `write_routers`. Raises UserError for another file.
        path: the PNG to write. All weights share one scale, which begins at 1, what a router weighs that has no preference.
    """
    from matplotlib.colors import ListedColormap

    found = read_panel(panel, "routers")
    omega, blocks, depth = found["omega"].astype(np.float32), found["blocks"].tolist(), int(found["depth"])
    best, most = omega.argmax(2), omega.max(2)
    names = [str(number + 1) for number in range(omega.shape[2])]
    colors = [color_of(name, names) for name in names]
    cell, pitch, gap, left, label = 1.15, 1.22, 0.18, 0.1, 1.0
    rows, columns = found["images"].shape[-2:]
    across, down = cell * min(1.0, columns / rows), cell * min(1.0, rows / columns)
    width = left + pitch + len(blocks) * (2 * pitch + gap) + 0.7
    top = 0.2 + 0.22 * legend_rows(names, width - label) + 0.5
    figure = new_figure(max(width, 5.0), top + (down + 0.07) * len(found["images"]) + 0.05)
    legend(figure, names, colors, label)
    write(figure, left, 0.27, "Expert", va="center", weight="bold")
    discrete = {"cmap": ListedColormap(colors), "vmin": -0.5, "vmax": len(names) - 0.5, "interpolation": "nearest"}
    scale = {"cmap": "viridis", "vmin": 1.0, "vmax": max(1.01, float(most.max())), "interpolation": "nearest"}
    for row, image in enumerate(found["images"]):
        y = top + (down + 0.07) * row
        show_image(axes_at(figure, left, y, across, down), image)
        for number, block in enumerate(blocks):
            x = left + pitch + gap + number * (2 * pitch + gap)
            if row == 0:
                write(figure, x, y - 0.25, f"Block {block + 1} of {depth}", va="bottom", weight="bold")
                for place, text in enumerate(("strongest expert", "its weight ω")):
                    write(figure, x + pitch * place, y - 0.06, text, va="bottom", color=MUTED, fontsize=8.5)
            first, second = (axes_at(figure, x + pitch * place, y, across, down) for place in (0, 1))
            first.imshow(best[number, row], **discrete)
            drawn = second.imshow(most[number, row], **scale)
            for axes in (first, second):
                axes.axis("off")
    bar = figure.colorbar(drawn, cax=axes_at(figure, width - 0.6, top, 0.12, down), format="%.2f")
    bar.set_ticks(np.linspace(scale["vmin"], scale["vmax"], 3))
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=8, length=0)
    return save(figure, path)


def router_pictures(folder: Path) -> list[Picture]:
    """A picture for every file that the run left."""
    pictures = []
    for panel in sorted((folder / ROUTERS).glob("*.npz")):
        path = routers_figure(panel, folder / "figures" / f"routers-{panel.stem}.png")
        pictures.append(Picture(path, f"Routers of {panel.stem}", CAPTION, IMAGES))
    return pictures
