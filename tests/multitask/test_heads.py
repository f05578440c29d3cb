"""Heads: shapes on rectangular grids, numbers of parameters, the taps of each head, and a few steps that fit a map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import images, tiny_vit
from torch import Tensor, nn

from vismt.backbones.vit import Backbone
from vismt.base.errors import UserError
from vismt.multitask.heads import MAP_HEADS, make_map_head, resize_logits

WIDTHS, CHANNELS = [12, 12, 12, 12], 5
SCALE = {"linear": 1, "conv": 4, "dpt": 4, "segformer": 4}
OPTIONS = {"linear": {}, "conv": {}, "dpt": {"hidden": 8}, "segformer": {"hidden": 8}}

every_head = pytest.mark.parametrize("name", sorted(MAP_HEADS))


def taps(rows: int, columns: int, count: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, width, rows, columns, generator=generator) for width in WIDTHS]


def head(name: str, **options: object) -> nn.Module:
    return make_map_head(name, WIDTHS, CHANNELS, **{**OPTIONS[name], **options})


@every_head
@pytest.mark.parametrize("grid", [(3, 5), (4, 2), (1, 1)])
def test_shapes_and_gradients(name: str, grid: tuple[int, int]) -> None:
    logits = head(name)(taps(*grid))
    assert logits.shape == (2, CHANNELS, SCALE[name] * grid[0], SCALE[name] * grid[1])
    model = head(name)
    model(taps(3, 5)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(parameter.grad.any() for parameter in model.parameters())


@every_head
def test_stages_are_read_on_their_own_grids(name: str) -> None:
    """Widths and grids of a hierarchical model, where halving 3 x 5 has rounded up; every weight counts."""
    widths, grids = [4, 8, 12, 16], [(12, 20), (6, 10), (3, 5), (2, 3)]
    maps = [torch.randn(2, width, *grid) for width, grid in zip(widths, grids)]
    model = make_map_head(name, widths, CHANNELS, **OPTIONS[name])
    logits = model(maps)
    assert logits.shape[-2:] == {"linear": (2, 3), "conv": (8, 12)}.get(name, (12, 20))
    logits.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    if name == "segformer":
        large = [resize_logits(project(tap), (12, 20)) for project, tap in zip(model.project, maps)]
        wanted = model.predict(F.gelu(model.norm(model.fuse(torch.cat(large, 1)))))
        assert torch.allclose(logits, wanted, atol=1e-6)
        assert make_map_head(name, widths, CHANNELS, hidden=8, scale=2)(maps).shape[-2:] == (24, 40)


def test_dpt_reads_the_taps_of_a_vit_at_strides_4_8_16_and_32_of_16() -> None:
    model = make_map_head("dpt", [6] * 4, CHANNELS, hidden=8)
    assert [resample(torch.zeros(1, 8, 6, 6)).shape[-1] for resample in model.resample] == [24, 12, 6, 3]


@pytest.mark.parametrize("d,h,k", [(12, 8, 5), (10, 6, 1)])
def test_parameters_by_formula(d: int, h: int, k: int) -> None:
    def count(name: str, **options: object) -> int:
        return sum(parameter.numel() for parameter in make_map_head(name, [d] * 4, k, **options).parameters())

    assert count("linear") == d * k + k
    norm, last = 2 * h, h * k + k
    assert count("conv", hidden=h) == 9 * d * h + norm + last
    assert count("conv") == 9 * d * d + 2 * d + d * k + k
    assert count("segformer", hidden=h) == 4 * (d * h + h) + 4 * h * h + norm + last
    square = 9 * h * h + h  # a 3x3 convolution of equal widths
    resample = (16 * h * h + h) + (4 * h * h + h) + square
    predict = (9 * h * (h // 2) + h // 2) + (h // 2) * k + k
    assert count("dpt", hidden=h) == 4 * (d * h + h) + resample + 7 * 2 * square + predict


@every_head
def test_which_taps_count(name: str) -> None:
    model, maps = head(name), taps(3, 5)
    before = model(maps)
    for place in range(4):
        changed = [tap + (place == number) for number, tap in enumerate(maps)]
        used = name in ("dpt", "segformer") or place == 3
        assert torch.allclose(model(changed), before) != used


def test_the_linear_head_is_a_product_at_every_place() -> None:
    model, maps = head("linear"), taps(2, 3)
    wanted = (
        torch.einsum("bdrc,kd->bkrc", maps[3], model.predict.weight[:, :, 0, 0]) + model.predict.bias[:, None, None]
    )
    assert torch.allclose(model(maps), wanted, atol=1e-6)


def test_segformer_fuses_on_the_small_grid_what_it_would_on_the_large() -> None:
    model, maps = head("segformer"), taps(3, 5)
    large = [
        F.interpolate(p(tap), scale_factor=4, mode="bilinear", align_corners=False)
        for p, tap in zip(model.project, maps)
    ]
    wanted = model.predict(F.gelu(model.norm(model.fuse(torch.cat(large, 1)))))
    assert torch.allclose(model(maps), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["conv", "segformer"])
def test_group_norm_does_not_mix_images_and_batch_norm_does(name: str) -> None:
    maps = taps(3, 5)
    first = [tap[:1] for tap in maps]
    group, batch = head(name).train(), head(name, norm="batch").train()
    assert torch.allclose(group(maps)[:1], group(first), atol=1e-5)
    assert not torch.allclose(batch(maps)[:1], batch(first), atol=1e-2)
    assert torch.equal(group.eval()(maps), group.train()(maps))


@every_head
def test_start_values_depend_on_the_seed_alone(name: str) -> None:
    state = torch.random.get_rng_state()
    first, same, other = head(name, seed=3), head(name, seed=3), head(name, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    pairs = list(zip(first.parameters(), same.parameters(), other.parameters()))
    assert all(torch.equal(a, b) for a, b, _ in pairs) and any(not torch.equal(a, c) for a, _, c in pairs)


def test_resizing_is_between_centres_and_leaves_the_right_size_alone() -> None:
    logits = torch.tensor([[[[0.0, 4.0]]]])
    assert resize_logits(logits, (1, 2)) is logits
    # Centres of four pixels lie at -1/4, 1/4, 3/4, 5/4 of the two; with corners aligned it would be 0, 4/3, 8/3, 4.
    assert resize_logits(logits, (1, 4)).flatten().tolist() == [0.0, 1.0, 3.0, 4.0]
    assert resize_logits(torch.zeros(1, 2, 3, 5), (48, 80)).shape == (1, 2, 48, 80)


@every_head
def test_a_vit_learns_a_map(name: str) -> None:
    backbone = Backbone(tiny_vit(img_size=(8, 12), depth=4))
    pixels = torch.cat([images(2, 8, seed=1), images(2, 4, seed=2).repeat(1, 1, 2, 1)], dim=3)
    with torch.no_grad():
        maps = backbone.maps(pixels, [0, 1, 2, 3])
    target = torch.zeros(2, 8, 12, dtype=torch.int64)
    target[0, :, 6:] = target[1, 4:] = 1
    model = make_map_head(name, [32] * 4, 2, **OPTIONS[name])
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for _ in range(40):
        loss = F.cross_entropy(resize_logits(model(maps), target.shape[-2:]), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3  # ln 2 = 0.69 at chance


@pytest.mark.parametrize(
    ("name", "widths", "options", "message"),
    [
        ("dtp", WIDTHS, {}, "no head 'dtp'.*Near: 'dpt'"),
        ("conv", WIDTHS, {"hiden": 8}, "'conv' has no option 'hiden'.*Near: 'hidden'"),
        ("linear", WIDTHS, {"hidden": 8}, "'linear' has no option 'hidden'. It has none"),
        ("conv", WIDTHS, {"hidden": 0}, "conv: hidden 0; it must be a whole number"),
        ("conv", WIDTHS, {"scale": 2.5}, "options.scale: expected int, got 2.5"),
        ("conv", WIDTHS, {"norm": "bach"}, "conv: norm 'bach'.*Near: 'batch'"),
        ("segformer", WIDTHS, {"hidden": "8"}, "segformer: hidden '8'"),
        ("dpt", WIDTHS[:3], {}, "dpt: 3 taps; it fuses four"),
        ("dpt", WIDTHS, {"hidden": 7}, "dpt: hidden 7; it must be even"),
        ("linear", [], {}, "no tap"),
        ("linear", [0], {}, "head: width 0"),
    ],
)
def test_bad_settings(name: str, widths: list[int], options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_map_head(name, widths, CHANNELS, **options)


def test_bad_taps() -> None:
    model = head("segformer")
    for maps, message in (
        (taps(3, 5)[:3], r"needed maps \(b, d, rows, columns\) of widths \[12, 12, 12, 12\]"),
        ([tap.flatten(2) for tap in taps(3, 5)], "needed maps"),
        ([*taps(3, 5)[:3], taps(3, 4)[3]], "of different grids"),
    ):
        with pytest.raises(UserError, match=message):
            model(maps)
    with pytest.raises(UserError, match="head: channels 0"):
        make_map_head("linear", WIDTHS, 0)
