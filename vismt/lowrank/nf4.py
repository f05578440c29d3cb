"""4-bit NormalFloat: a matrix as 16 levels and the largest absolute value of each run of 64 (QLoRA, arXiv 2305.14314).

    q = |block|_max * level[nearest(w / |block|_max)]

The levels are quantiles of a standard normal, eight below zero, zero, and seven above, scaled to [-1, 1]; blocks run over
the matrix row by row, the last one may be shorter. A value that is a level already stays, so quantising twice changes
nothing. That is what bitsandbytes stores without its quantised block maxima ("double quantisation"), with which the second
rounding would move the weights again.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64
# Of the released code: the outermost quantile, the mean of 1 - 1/30 and 1 - 1/32.
OUTERMOST = 0.9677083


def levels() -> Tensor:
    """The 16 levels, fp64, ascending from -1 to 1."""
    above = torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 8, dtype=torch.float64)[:-1])
    return torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)]) / above.max()


def nf4(matrix: Tensor) -> Tensor:
    """The nearest values that NF4 can store, in the shape, dtype and on the device of `matrix` (fp32 or fp64)."""
    flat = matrix.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    grid = levels().to(matrix.device, matrix.dtype)
    peak = blocks.abs().amax(1, keepdim=True)
    codes = torch.bucketize(blocks / torch.where(peak > 0, peak, 1), (grid[1:] + grid[:-1]) / 2)
    return (grid[codes] * peak).flatten()[: flat.numel()].view(matrix.shape)
