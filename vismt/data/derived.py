"""Targets that follow from others: normals from depth, edges from class labels or from jumps of the depth.

Depth is z along the optical axis. A plane is linear in 1/z over the image, whatever its tilt, so a pixel whose 1/z bends
lies on a crease or a jump and gets no normal.

Edges are thinned like the predictions that they are compared with: of a line of two pixels' width, or of a staircase that is
connected over its sides, a prediction can match but the thin part, however right it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vismt.data.dense_sample import IGNORE
from vismt.data.thinning import thin


def normals_from_depth(
    depth: Tensor, *, fx: float, fy: float, cx: float, cy: float, step: int = 2, bend: float = 0.02
) -> Tensor:
    """float32 (3, h, w) unit normals (x right, y up, z towards the camera) of float32 (h, w) depth, 0 = none in both.

    The cross product of the differences between the back-projected points `step` pixels left and right, above and below.
    fx, fy, cx, cy in pixels. No normal where one of the five depths is missing, within `step` pixels of the border, and
    where 1/z at the middle differs from the mean of two opposite ones by more than `bend` of itself.
    """
    height, width = depth.shape
    out = torch.zeros(3, height, width)
    if min(height, width) <= 2 * step:
        return out
    depth = depth.to(torch.float64)
    right = (torch.arange(width, dtype=torch.float64) - cx) / fx
    down = (torch.arange(height, dtype=torch.float64) - cy) / fy
    points = torch.stack([right * depth, down[:, None] * depth, depth])
    rows, columns = slice(step, height - step), slice(step, width - step)

    def around(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        left, above = values[..., rows, : width - 2 * step], values[..., : height - 2 * step, columns]
        return left, values[..., rows, 2 * step :], above, values[..., 2 * step :, columns]

    left, right_of, above, below = around(points)
    # In camera axes y points down and z away: this order of the cross product faces the camera.
    normal = torch.linalg.cross(below - above, right_of - left, dim=0) * torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    inverse = torch.where(depth > 0, 1 / depth, torch.nan)
    middle = inverse[rows, columns]
    pair = around(inverse)
    bent = torch.maximum(((pair[0] + pair[1]) / 2 - middle).abs(), ((pair[2] + pair[3]) / 2 - middle).abs())
    good = bent <= bend * middle  # False where a depth is missing: nan compares so
    out[:, rows, columns] = torch.where(good, torch.nn.functional.normalize(normal, dim=0), 0.0).to(torch.float32)
    return out


def edges_from_labels(labels: Tensor) -> Tensor:
    """int64 (h, w): 1 where the pixel to the right or below is of another class, one pixel wide; 255 where there is no label.

    labels: int64 (h, w), 255 = none. A border on unlabelled pixels is no edge: what lies there is not known.
    """
    known = labels != IGNORE
    edge = torch.zeros_like(known)
    for a, b in (((..., slice(None, -1)), (..., slice(1, None))), ((slice(None, -1), ...), (slice(1, None), ...))):
        edge[a] |= (labels[a] != labels[b]) & known[a] & known[b]
    return _thinned(edge, known)


def edges_from_depth(depth: Tensor, *, jump: float = 0.05) -> Tensor:
    """int64 (h, w): 1 at the nearer pixel of two neighbours whose depths differ by more than `jump` of the smaller, thinned.

    255 where float (h, w) `depth` is 0. A gap without depth counts as the farther of its two ends in the row or column: what
    only one camera of a pair sees lies behind.
    """
    return _thinned(_jumps(depth, jump) | _jumps(depth.mT, jump).mT, depth > 0)


def _thinned(edge: Tensor, known: Tensor) -> Tensor:
    """int64 (h, w) of the lines of bool `edge`, 255 where not bool `known`."""
    return torch.from_numpy(thin(edge.numpy())).to(torch.int64).masked_fill(~known, IGNORE)


def _last(depth: Tensor) -> Tensor:
    """The nearest depth at or left of each pixel, 0 where there is none."""
    columns = torch.arange(depth.shape[-1]).expand_as(depth)
    at = torch.where(depth > 0, columns, -1).cummax(-1).values
    return torch.where(at >= 0, depth.gather(-1, at.clamp_min(0)), 0.0)


def _jumps(depth: Tensor, jump: float) -> Tensor:
    """Bool (h, w): pixels with a depth, nearer than a neighbour in their row by more than `jump`, gaps bridged."""
    known = depth > 0
    filled = torch.where(known, depth, torch.maximum(_last(depth), _last(depth.flip(-1)).flip(-1)))
    out = torch.zeros_like(known)
    a, b = filled[..., :-1], filled[..., 1:]
    out[..., :-1] |= b - a > jump * a
    out[..., 1:] |= a - b > jump * b
    return out & known
