"""Windows and mirrored views: every pixel is the mean of the views that contain it; a single view is unchanged."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import images, tiny_vit
from hypothesis import given
from hypothesis import strategies as st

from vismt.backbones.vit import Backbone
from vismt.base.errors import UserError
from vismt.data.maps.dense_sample import blank
from vismt.data.maps.dense_transforms import FILL
from vismt.multitask.heads import make_map_head, make_pooled_head, resize_logits
from vismt.multitask.inference import predict, starts
from vismt.multitask.nets import DenseNet
from vismt.multitask.tasks import make_task

CLASSIFY = make_task({"name": "classify", "classes": 5})
TASKS = {
    task.name: task for task in (make_task({"name": "semseg", "classes": 4}), make_task("depth"), make_task("normals"))
}


@pytest.fixture(scope="module")
def net() -> DenseNet:
    """Return a net for images of 16 x 24."""
    backbone = Backbone(tiny_vit(0, num_classes=0, img_size=(16, 24)), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    heads = {name: make_map_head("linear", [32], task.channels, seed=len(name)) for name, task in TASKS.items()}
    return DenseNet(backbone, heads, [1]).requires_grad_(False).eval()


def test_an_image_of_the_nets_size_is_predicted_as_it_is(net: DenseNet) -> None:
    x = images(2, 24)[:, :, :16]
    predictions = predict(net, TASKS, x)
    for name, value in net(x).items():
        assert torch.equal(predictions[name], resize_logits(value, (16, 24)))


@given(st.integers(4, 60), st.integers(0, 200), st.floats(0, 0.9))
def test_windows_cover_a_side_and_share_enough(window: int, more: int, overlap: float) -> None:
    side = window + more
    first_pixels = starts(side, window, overlap)
    assert first_pixels[0] == 0 and first_pixels[-1] == side - window and first_pixels == sorted(set(first_pixels))
    # Windows start at whole pixels, so a neighbour may be a pixel farther than the share.
    assert all(b - a <= max(1, window * (1 - overlap)) + 1 for a, b in pairwise(first_pixels))
    fewer = len(first_pixels) - 2
    assert fewer < 1 or more / fewer > window * (1 - overlap)  # with a window less they would be too far apart


def test_every_pixel_is_the_mean_of_the_windows_that_hold_it(net: DenseNet) -> None:
    x = images(1, 40)[:, :, :30]
    predictions = predict(net, TASKS, x, overlap=0.25)
    tops, lefts = starts(30, 16, 0.25), starts(40, 24, 0.25)
    assert (len(tops), len(lefts)) == (3, 2)
    single = {(t, l): predict(net, TASKS, x[..., t : t + 16, l : l + 24]) for t in tops for l in lefts}
    for row, column in ((0, 0), (9, 20), (15, 17), (29, 39), (14, 16), (7, 39)):
        holding = [(t, l) for t, l in single if t <= row < t + 16 and l <= column < l + 24]
        for name in TASKS:
            values = [single[t, l][name][0, :, row - t, column - l] for t, l in holding]
            if name == "normals":
                values = [value / value.norm() for value in values]
            assert torch.allclose(predictions[name][0, :, row, column], torch.stack(values).mean(0), atol=1e-5), (
                name,
                row,
                column,
            )
    assert max(len([1 for t, l in single if t <= row < t + 16]) for row in range(30)) > 1


def test_normals_are_averaged_as_directions(net: DenseNet) -> None:
    """The lengths of a head's vectors have no meaning: a vector a hundred times as long must not dominate."""
    long, short = torch.tensor([100.0, 0, 0]), torch.tensor([0, 0, 1.0])
    task = TASKS["normals"]
    mean = sum(task.view(value[None, :, None, None], False) for value in (long, short)) / 2
    assert torch.allclose(mean.flatten(), torch.tensor([0.5, 0, 0.5]))
    mirrored = task.view(long[None, :, None, None], True)
    assert torch.allclose(mirrored.flatten(), torch.tensor([-1.0, 0, 0]))


@pytest.mark.parametrize("shape", [(16, 24), (24, 32)])
def test_with_the_mirrored_view_a_mirrored_image_is_predicted_mirrored(net: DenseNet, shape: tuple[int, int]) -> None:
    x = images(1, 40)[..., : shape[0], : shape[1]]
    plain, mirrored = predict(net, TASKS, x, flip=True), predict(net, TASKS, x.flip(-1), flip=True)
    sign = torch.tensor([-1.0, 1, 1])[:, None, None]
    for name, value in plain.items():
        turned = mirrored[name].flip(-1) * sign if name == "normals" else mirrored[name].flip(-1)
        assert torch.allclose(value, turned, atol=1e-5), name
    single_view = predict(net, TASKS, x)
    assert not torch.allclose(single_view["depth"], plain["depth"], atol=1e-4)
    assert not torch.allclose(plain["normals"], mirrored["normals"].flip(-1), atol=1e-3)  # the sign of x differs


def test_a_class_of_the_image_is_the_mean_of_the_views() -> None:
    backbone = Backbone(tiny_vit(0, num_classes=0, img_size=(16, 24)), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    net = DenseNet(backbone, {"classify": make_pooled_head([32], 5, seed=0)}, [1]).requires_grad_(False).eval()
    x, tasks = images(2, 40)[:, :, :16], {"classify": CLASSIFY}
    windows = [x[..., left : left + 24] for left in starts(40, 24, 0.5)]
    views = [net(view)["classify"] for window in windows for view in (window, window.flip(-1))]
    logits = predict(net, tasks, x, flip=True)["classify"]
    assert len(views) == 6 and logits.shape == (2, 5)
    assert torch.allclose(logits, torch.stack(views).mean(0), atol=1e-6)
    assert torch.equal(
        predict(net, tasks, x[..., :20])["classify"].argmax(1)[0],
        CLASSIFY.answer(predict(net, tasks, x[:1, ..., :20])["classify"][0]),
    )


def test_a_smaller_image_is_padded_with_the_grey_of_training_and_cut_again(net: DenseNet) -> None:
    x = images(1, 24)[:, :, :10, :24]
    padded = torch.full((1, 3, 16, 24), FILL)
    padded[:, :, :10] = x
    for name, value in predict(net, TASKS, x).items():
        assert value.shape[-2:] == (10, 24)
        assert torch.equal(value, resize_logits(net(padded)[name], (16, 24))[:, :, :10])


def test_scales_are_averaged_in_the_unit_of_the_image(net: DenseNet) -> None:
    x = images(1, 24)[:, :, :16]
    enlarged = F.interpolate(x, size=(24, 36), mode="bilinear", antialias=True)
    own = predict(net, TASKS, x, flip=True)
    large = predict(net, TASKS, enlarged, flip=True)  # by windows
    both = predict(net, TASKS, x, flip=True, scales=[1.0, 1.5])
    for name, value in both.items():
        back = F.interpolate(large[name], size=(16, 24), mode="bilinear", antialias=True)
        if name == "normals":  # directions, of whatever length the head gives them
            first, second = (F.normalize(view, dim=1) for view in (own[name], large[name]))
            second = F.interpolate(second, size=(16, 24), mode="bilinear", antialias=True)
        else:
            first, second = own[name], 1.5 * back if name == "depth" else back
        assert torch.allclose(value, (first + second) / 2, atol=1e-5), name
    assert torch.equal(predict(net, TASKS, x, scales=[1.0])["depth"], predict(net, TASKS, x)["depth"])
    smaller = predict(net, TASKS, x, scales=[0.5])["semseg"]  # padded to the net's size and cut again
    assert smaller.shape == (1, 4, 16, 24) and smaller.isfinite().all()
    logits = predict(
        DenseNet(net.backbone, {"classify": make_pooled_head([32], 5, seed=0)}, [1]),
        {"classify": CLASSIFY},
        x,
        scales=[2, 1],
    )
    assert logits["classify"].shape == (1, 5)


@pytest.mark.parametrize("scales", [[], [0.0], [1.0, 1.0], [9.0], [True], [-1.0, 1.0]])
def test_scales_that_are_not_different_factors_are_refused(net: DenseNet, scales: list) -> None:
    with pytest.raises(UserError, match=r"scales: \[.*each once; \[1.0\] takes"):
        predict(net, TASKS, images(1, 24)[:, :, :16], scales=scales)


def test_answers_are_what_the_metrics_compare() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 5, generator=generator)
    assert torch.equal(TASKS["semseg"].answer(logits), logits.argmax(0))
    assert torch.equal(TASKS["depth"].answer(logits[:1]), logits[0].clamp_min(1e-9))
    assert torch.allclose(TASKS["normals"].answer(logits[:3]).norm(dim=0), torch.ones(3, 5))
    edge, saliency = make_task("edge"), make_task("saliency")
    assert torch.allclose(edge.answer(logits[:1]), logits[0].sigmoid())
    assert torch.allclose(saliency.answer(logits[:2]), logits[:2].softmax(0)[1], atol=1e-6)
    assert blank("semseg", 3, 5).shape == TASKS["semseg"].answer(logits).shape
