"""Derived targets: normals of known planes, edges by hand, gaps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.blobs import blobs
from helpers.dense_copies import valid
from hypothesis import given, settings
from hypothesis import strategies as st

from vismt.data.maps.dense_transforms import flip
from vismt.data.maps.derived_maps import edges_from_depth, edges_from_labels, normals_from_depth

CAMERA = {"fx": 50.0, "fy": 60.0, "cx": 9.5, "cy": 6.0}
H, W = 14, 20


def plane(x: float, y: float, z: float, distance: float = 3.0) -> torch.Tensor:
    """(h, w) depth of the plane with that normal (x right, y up, z towards the camera) through (0, 0, distance)."""
    right = (torch.arange(W, dtype=torch.float64) - CAMERA["cx"]) / CAMERA["fx"]
    up = -(torch.arange(H, dtype=torch.float64)[:, None] - CAMERA["cy"]) / CAMERA["fy"]
    # A point is depth * (right, up, -1) in these axes; n . point = -z distance.
    return (z * distance / (z - x * right - y * up)).to(torch.float32)


@settings(max_examples=25, deadline=None)
@given(st.floats(-0.7, 0.7), st.floats(-0.7, 0.7), st.integers(1, 3))
def test_a_plane_has_its_normal_everywhere_and_in_the_mirror(x, y, step):
    wanted = torch.nn.functional.normalize(torch.tensor([x, y, 1.0]), dim=0)
    depth = plane(*wanted.tolist())
    normals = normals_from_depth(depth, CAMERA, step=step)
    valid_pixels = valid("normals", normals)
    assert valid_pixels[step:-step, step:-step].all() and int(valid_pixels.sum()) == (H - 2 * step) * (W - 2 * step)
    assert torch.allclose(normals[:, valid_pixels], wanted[:, None].expand(-1, int(valid_pixels.sum())), atol=2e-3)
    # The mirrored picture, seen by the mirrored camera, has the mirrored normals: flip must agree with geometry.
    mirrored = flip({"image": torch.zeros(3, H, W), "depth": depth, "normals": normals})
    again = normals_from_depth(mirrored["depth"], {**CAMERA, "cx": W - 1 - CAMERA["cx"]}, step=step)
    assert torch.allclose(mirrored["normals"], again, atol=1e-5)


def test_no_normal_at_holes_and_jumps():
    depth = torch.full((9, 12), 2.0)
    depth[4, 3] = 0
    depth[:, 8:] = 3.0
    valid_pixels = valid("normals", normals_from_depth(depth, CAMERA, step=1))
    assert not valid_pixels[4, 2:5].any() and not valid_pixels[3:6, 3].any() and not valid_pixels[:, 7:9].any()
    assert valid_pixels[1:3, 1:7].all() and valid_pixels[1:8, 9:11].all()
    assert not normals_from_depth(depth[:2], CAMERA, step=1).any()  # too small for any


def test_edges_from_labels_by_hand():
    labels = torch.tensor([[0, 0, 1, 1], [0, 2, 1, 255], [0, 2, 255, 1]])
    # right: (0,1)|(0,2), (1,0)|(1,1), (1,1)|(1,2), (2,0)|(2,1); below: (0,1) 0 over 2. 255 has no label and makes no edge.
    # (1,1) is the corner of a step between (0,1) and (1,0), which touch without it.
    assert edges_from_labels(labels).tolist() == [[0, 1, 0, 0], [1, 0, 0, 255], [1, 0, 255, 0]]


def test_edges_run_along_every_change_one_pixel_wide():
    labels = torch.from_numpy((6 * blobs(60, 80, 5, 2)).astype(np.int64))
    labels[20:30, 30:50] = 255
    edge = edges_from_labels(labels)
    valid_pixels = labels != 255
    assert edge.dtype == torch.int64 and torch.equal(edge == 255, ~valid_pixels)
    beside = torch.nn.functional.pad(labels, (0, 1, 0, 1), value=255)
    others = torch.stack([beside[:-1, 1:], beside[1:, :-1]])
    change = valid_pixels & ((others != 255) & (others != labels)).any(0)
    assert not ((edge == 1) & ~change).any()
    near = torch.nn.functional.max_pool2d((edge == 1).float()[None], 3, stride=1, padding=1)[0] > 0
    assert (near | ~change).all()  # a thinner line, but nowhere a gap
    assert 0.6 < int((edge == 1).sum()) / int(change.sum()) < 0.95
    square = (edge == 1)[:-1, :-1] & (edge == 1)[1:, :-1] & (edge == 1)[:-1, 1:] & (edge == 1)[1:, 1:]
    assert not square.any()


def test_edges_from_depth_mark_the_nearer_side():
    depth = torch.tensor([[2.0, 2.0, 3.0, 3.05], [2.0, 2.0, 3.0, 3.0]])
    assert edges_from_depth(depth).tolist() == [[0, 1, 0, 0], [0, 1, 0, 0]]
    assert edges_from_depth(depth.flip(-1)).tolist() == [[0, 0, 1, 0], [0, 0, 1, 0]]
    assert edges_from_depth(depth.mT).tolist() == [[0, 0], [1, 1], [0, 0], [0, 0]]


@pytest.mark.parametrize(("row", "edge"), [
    ([3.0, 0.0, 0.0, 2.0, 2.0], [0, 255, 255, 1, 0]),  # the gap belongs to what lies behind
    ([2.0, 0.0, 0.0, 3.0, 3.0], [1, 255, 255, 0, 0]),
    ([2.0, 0.0, 0.0, 2.0, 2.0], [0, 255, 255, 0, 0]),
    ([0.0, 0.0, 2.0, 2.0, 0.0], [255, 255, 0, 0, 255]),  # no other end, no edge
    ([0.0] * 5, [255] * 5),
    ([2.0, 2.08, 2.2, 2.2, 2.2], [0, 1, 0, 0, 0]),  # 4 % are no edge, and 6 % are one
])  # fmt: skip
def test_edges_along_a_row_and_across_gaps(row, edge):
    assert edges_from_depth(torch.tensor([row])).tolist() == [edge]
    assert edges_from_depth(torch.tensor([row]).mT).mT.tolist() == [edge]
