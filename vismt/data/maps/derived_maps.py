"""Targets derived from others: normals from depth, edges from class labels or from jumps of the depth.

Depth is z along the optical axis. A plane is linear in 1/z over the image, with any tilt. A pixel where 1/z bends is therefore
on a crease or a jump, and gets no normal.

Edges are thinned like the predictions that they are compared with. A thinned prediction cannot match all of a line two pixels
wide, or of a staircase whose pixels share sides.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vismt.data.maps.dense_sample import IGNORE
from vismt.data.maps.edge_thinning import thin

BEND = 0.02  # largest relative deviation of 1/z from a plane at a pixel with a normal
JUMP = 0.05  # least relative difference of two depths with an edge between them


def normals_from_depth(depth: Tensor, camera: Mapping[str, float], *, step: int = 2) -> Tensor:
    """Return the unit normals of a depth map: the cross product of the differences between back-projected points.

    The result is float32 (3, h, w), x right, y up, z towards the camera. It is (0, 0, 0) if one of the five depths is missing,
    within `step` pixels of the border, and if 1/z at the middle differs from the mean of two opposite values by more than BEND
    of itself.

    depth: Depth float32 (h, w), 0 if missing. camera: In pixels fx along the rows, fy along the columns, and the principal
    point cx, cy.
    """
    height, width = depth.shape
    normals = torch.zeros(3, height, width)
    if min(height, width) <= 2 * step:
        return normals
    depth = depth.to(torch.float64)
    right = (torch.arange(width, dtype=torch.float64) - camera["cx"]) / camera["fx"]
    down = (torch.arange(height, dtype=torch.float64) - camera["cy"]) / camera["fy"]
    points = torch.stack([right * depth, down[:, None] * depth, depth])
    rows, columns = slice(step, height - step), slice(step, width - step)

    def around(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        left, above = values[..., rows, : width - 2 * step], values[..., : height - 2 * step, columns]
        return left, values[..., rows, 2 * step :], above, values[..., 2 * step :, columns]

    left, right_of, above, below = around(points)
    # In camera axes y points down and z away. This order of the cross product faces the camera.
    normal = torch.linalg.cross(below - above, right_of - left, dim=0) * torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    inverse = torch.where(depth > 0, 1 / depth, torch.nan)
    middle = inverse[rows, columns]
    pair = around(inverse)
    bent = torch.maximum(((pair[0] + pair[1]) / 2 - middle).abs(), ((pair[2] + pair[3]) / 2 - middle).abs())
    good = bent <= BEND * middle  # False if a depth is missing, because nan compares so
    normals[:, rows, columns] = torch.where(good, torch.nn.functional.normalize(normal, dim=0), 0.0).to(torch.float32)
    return normals


def edges_from_labels(labels: Tensor) -> Tensor:
    """Return int64 (h, w): 1 if the pixel to the right or below has another class, thinned, and 255 for unlabelled pixels.

    labels: Labels int64 (h, w), 255 for unlabelled pixels. A border with unlabelled pixels is not an edge.
    """
    labelled = labels != IGNORE
    edge = torch.zeros_like(labelled)
    edge[:, :-1] |= (labels[:, :-1] != labels[:, 1:]) & labelled[:, :-1] & labelled[:, 1:]
    edge[:-1] |= (labels[:-1] != labels[1:]) & labelled[:-1] & labelled[1:]
    return _thinned(edge, labelled)


def edges_from_depth(depth: Tensor) -> Tensor:
    """Return int64 (h, w): 1 at the nearer pixel of neighbours whose depths differ by more than JUMP of the smaller, thinned.

    depth: Depth float (h, w), 0 if missing. The edge map is 255 there. A gap without depth counts as the farther of its two
    ends in the row or column, because what only one camera of a pair sees is behind.
    """
    return _thinned(_jumps(depth) | _jumps(depth.mT).mT, depth > 0)


def _thinned(edge: Tensor, valid: Tensor) -> Tensor:
    """Return int64 (h, w): the thinned lines of bool `edge`, and 255 if `valid` is False."""
    return torch.from_numpy(thin(edge.numpy())).to(torch.int64).masked_fill(~valid, IGNORE)


def _jumps(depth: Tensor) -> Tensor:
    """Return bool (h, w): pixels with a depth that are nearer than a neighbour in their row by more than JUMP, across gaps."""
    valid = depth > 0
    columns = torch.arange(depth.shape[-1]).expand_as(depth)
    ends = []  # the nearest depth at or left of each pixel, then at or right of it, 0 if there is none
    for values in (depth, depth.flip(-1)):
        at = torch.where(values > 0, columns, -1).cummax(-1).values
        ends.append(torch.where(at >= 0, values.gather(-1, at.clamp_min(0)), 0.0))
    filled = torch.where(valid, depth, torch.maximum(ends[0], ends[1].flip(-1)))
    nearer = torch.zeros_like(valid)
    left, right = filled[..., :-1], filled[..., 1:]
    nearer[..., :-1] |= right - left > JUMP * left
    nearer[..., 1:] |= left - right > JUMP * right
    return nearer & valid
