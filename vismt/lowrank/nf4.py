"""4-bit NormalFloat: a matrix as 16 levels and the largest absolute value of each run of 64 (QLoRA, arXiv 2305.14314).

    q = |block|_max * level[nearest(w / |block|_max)]

The levels are quantiles of a standard normal, eight below zero, zero, and seven above, scaled to [-1, 1]; blocks run over
the matrix row by row, the last one may be shorter. A value that is a level stays, so quantising twice changes
nothing. This is what bitsandbytes stores without its quantised block maxima ("double quantisation"), with which the second
rounding would move the weights again. Its own kernels are the grid "bitsandbytes": they find a level to fp32, so that a tie
may fall the other way, and get whole blocks as rows here (0.50.2 on a CPU gives other values for rows of other lengths).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from vismt.base.errors import UserError

GRIDS = ("nf4", "bitsandbytes")
BLOCK = 64
# Of the released code: the outermost quantile, the mean of 1 - 1/30 and 1 - 1/32.
OUTERMOST = 0.9677083


def levels() -> Tensor:
    """Return the 16 levels, fp64, ascending from -1 to 1."""
    above = torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 8, dtype=torch.float64)[:-1])
    return torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)]) / above.max()


def nf4(matrix: Tensor) -> Tensor:
    """Return the nearest values that NF4 can store, in the shape, dtype and on the device of `matrix` (fp32 or fp64)."""
    blocks = _blocks(matrix)
    grid = levels().to(matrix.device, matrix.dtype)
    peak = blocks.abs().amax(1, keepdim=True)
    codes = torch.bucketize(blocks / torch.where(peak > 0, peak, 1), (grid[1:] + grid[:-1]) / 2)
    return _matrix(grid[codes] * peak, matrix)


def on_grid(matrix: Tensor, grid: str) -> Tensor:
    """Return the nearest values of a grid of GRIDS, as `nf4` does; UserError where bitsandbytes is not installed."""
    if grid == "nf4":
        return nf4(matrix)
    functional = need_bitsandbytes()
    packed, state = functional.quantize_4bit(_blocks(matrix).float(), blocksize=BLOCK, quant_type="nf4")
    return _matrix(functional.dequantize_4bit(packed, state), matrix)


def need_bitsandbytes() -> Any:
    """Return the functions of bitsandbytes; UserError where it is not installed."""
    try:
        return importlib.import_module("bitsandbytes").functional
    except ImportError as error:
        raise UserError(
            f"adapt.quantize: 'bitsandbytes' is not installed ({error}): pip install bitsandbytes, or take quantize='nf4', "
            "which has the same levels."
        ) from error


def _blocks(matrix: Tensor) -> Tensor:
    flat = matrix.flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _matrix(blocks: Tensor, like: Tensor) -> Tensor:
    return blocks.flatten()[: like.numel()].view(like.shape).to(like.dtype)
