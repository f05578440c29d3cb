"""What training and evaluation see of sets whose edges follow from another map."""

from __future__ import annotations

import pytest
import torch
from helpers.blobs import blobs

from vismt.data.maps.dense_set import DenseSet
from vismt.data.maps.dense_transforms import scale
from vismt.data.maps.derived_maps import edges_from_depth, edges_from_labels
from vismt.jobs.multitask.config import MultitaskConfig
from vismt.jobs.multitask.maps_data import DenseBatches, Rows

SIZE = (84, 112)


@pytest.fixture(scope="module")
def scenes() -> dict[str, Rows]:
    """Regions seen at 180 x 240 and 360 x 480 pixels, with edges that follow from them; and a depth of 90 x 90 pixels."""
    labels = torch.from_numpy((7 * blobs(360, 480, 20, 0)).astype("int64"))
    labels[100:140, 200:260] = 255
    large = {"image": torch.rand(3, 360, 480, generator=torch.Generator().manual_seed(0)), "semseg": labels}
    small = scale(large, 0.5)
    depth = torch.from_numpy(2 + 3 * (blobs(90, 90, 6, 1) > 0.55)).to(torch.float32)
    depth[:8] = 0
    near = {"image": torch.rand(3, 90, 90, generator=torch.Generator().manual_seed(1)), "depth": depth}
    samples = {"small": (small, "semseg"), "large": (large, "semseg"), "depth": (near, "depth")}
    return {
        name: Rows([(DenseSet(name, "all", [], ["edge", origin], ["x"], [sample].__getitem__, edges=origin), 0)])
        for name, (sample, origin) in samples.items()
    }


@pytest.mark.parametrize("name", ["small", "large"])
def test_edges_are_those_of_the_fitted_labels_from_any_size(scenes, name) -> None:
    fitted = scenes[name].fitted(0, SIZE)
    assert torch.equal(fitted["edge"], edges_from_labels(fitted["semseg"])) and int((fitted["edge"] == 1).sum()) > 300
    assert torch.equal(scenes[name].unpadded(0, SIZE)["edge"], fitted["edge"])


def test_edges_of_a_fitted_and_padded_depth(scenes) -> None:
    fitted = scenes["depth"].fitted(0, SIZE)  # 84 x 84, padded at the right
    assert torch.equal(fitted["edge"], edges_from_depth(fitted["depth"])) and int((fitted["edge"] == 1).sum()) > 50
    assert (fitted["edge"][:, 84:] == 255).all() and (fitted["edge"][20:, :84] != 255).all()


@pytest.mark.parametrize("name", ["small", "depth"])
def test_edges_are_those_of_the_scaled_and_cropped_maps_in_training(scenes, name) -> None:
    tasks = ["edge", {"name": "semseg", "classes": 7}, "depth"]
    make = DenseBatches(scenes[name], SIZE, MultitaskConfig(tasks=tasks, size=[64, 64], batch=1))
    edges = 0
    for number in range(6):
        batch = make(number)
        derive, origin = (edges_from_labels, "semseg") if name == "small" else (edges_from_depth, "depth")
        assert torch.equal(batch["edge"][0], derive(batch[origin][0]))
        edges += int((batch["edge"] == 1).sum())
        assert all(torch.equal(value, make(number)[key]) for key, value in batch.items())
    assert edges > 200
    alone = DenseBatches(scenes[name], SIZE, MultitaskConfig(tasks=["edge"], size=[64, 64], batch=1))(5)
    assert set(alone) == {"image", "edge"} and torch.equal(alone["edge"], batch["edge"])
