"""The pyramid attack against a loop over pixels, and its bounds, cells and strength (I6, E7)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.amt_parts import MEAN, STD, backbone, episode
from helpers.tiny import images, snapshot
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.metatune.amt.input_attack import PLAIN, PYRAMID, pyramid_attack
from vismt.metatune.protonet import cosine_logits, prototypes

SMALL = ((2, 4.0), (4, 2.0), (None, 1.0))


def fixed(height: int, width: int, classes: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a smooth classifier of images of this size: linear, tanh, linear."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(8, 3 * height * width, generator=generator, dtype=dtype) / math.sqrt(height * width)
    second = torch.randn(classes, 8, generator=generator, dtype=dtype)
    return lambda batch: (batch.flatten(1) @ first.T).tanh() @ second.T


def looped(
    logits_fn,
    batch: Tensor,
    epsilon: float,
    step: float,
    steps: int,
    levels,
    seed: int,
    mean=(0.0,) * 3,
    std=(1.0,) * 3,
    *,
    clamps: str = "each",
    swapped: bool = False,
) -> Tensor:
    """The attack as a plain loop in fp64: a pixel's cell is looked up, KL is a sum of p (log p - log q)."""
    _, _, height, width = batch.shape
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (mean, std))
    low, high = (0 - mean) / std, (1 - mean) / std
    generator = torch.Generator().manual_seed(seed)
    deltas = []
    for cells, _ in levels:
        shape = (height, width) if cells is None else (cells, cells)
        deltas.append((2 * torch.rand(*batch.shape[:2], *shape, generator=generator).double() - 1) * epsilon / std)

    def compose(parts: list[Tensor]) -> Tensor:
        x = batch
        for part, (cells, factor) in zip(parts, levels):
            down = torch.arange(height) if cells is None else torch.arange(height) * cells // height
            right = torch.arange(width) if cells is None else torch.arange(width) * cells // width
            x = x + factor * part[:, :, down][:, :, :, right]
            if clamps == "each":
                x = torch.minimum(torch.maximum(x, low), high)
        return torch.minimum(torch.maximum(x, low), high)

    p = logits_fn(batch).softmax(1)
    for _ in range(steps):
        for part in deltas:
            part.requires_grad_()
        q = logits_fn(compose(deltas)).softmax(1)
        gain = (q * (q / p).log()).sum() if swapped else (p * (p / q).log()).sum()
        slopes = torch.autograd.grad(gain, deltas)
        with torch.no_grad():
            moved = [part + step / std * slope.sign() for part, slope in zip(deltas, slopes)]
            deltas = [torch.minimum(torch.maximum(part, -epsilon / std), epsilon / std) for part in moved]
    return compose(deltas).detach()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (8, 12), (9, 7)])
def test_equals_the_loop_and_no_near_miss_does(size: tuple[int, int], steps: int) -> None:
    batch = torch.rand(5, 3, *size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits, seed = fixed(*size), 11
    attacked = pyramid_attack(
        logits,
        batch,
        epsilon=0.05,
        step_size=0.02,
        steps=steps,
        levels=SMALL,
        generator=torch.Generator().manual_seed(seed),
    )
    arguments = (logits, batch, 0.05, 0.02, steps, SMALL, seed)
    assert torch.allclose(attacked, looped(*arguments), rtol=0, atol=1e-12)
    for wrong in ({"clamps": "last"}, {"swapped": True}):
        # After one step either direction of the KL may have the same signs.
        assert not torch.allclose(attacked, looped(*arguments, **wrong), atol=1e-4) or (
            steps == 1 and "swapped" in wrong
        )
    assert not torch.allclose(attacked, looped(logits, batch, 0.05, 0.02, steps, SMALL[2:], seed), atol=1e-4)


def test_normalised_images_have_a_budget_in_pixels() -> None:
    pixels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (MEAN, STD))
    logits, normal = fixed(8, 8), (pixels - mean) / std
    call = {"epsilon": 0.03, "step_size": 0.01, "steps": 3, "levels": SMALL}
    attacked = pyramid_attack(logits, normal, mean=MEAN, std=STD, **call)
    assert torch.allclose(attacked, looped(logits, normal, 0.03, 0.01, 3, SMALL, 0, MEAN, STD), rtol=0, atol=1e-12)
    # The same attack on pixels, normalisation inside of the model, is the same attack.
    inside = pyramid_attack(lambda x: logits((x - mean) / std), pixels, **call)
    assert torch.allclose(attacked * std + mean, inside, rtol=0, atol=1e-12)
    in_l2 = {"epsilon": 0.3, "step_size": 0.1, "steps": 3, "levels": PLAIN, "norm": "l2"}
    attacked = pyramid_attack(logits, normal, mean=MEAN, std=STD, **in_l2)
    inside = pyramid_attack(lambda x: logits((x - mean) / std), pixels, **in_l2)
    assert torch.allclose(attacked * std + mean, inside, rtol=0, atol=1e-6)
    # Three bounds, one a channel, all of them reached: eps / .25, eps / .2 and eps / .3.
    single = pyramid_attack(
        logits,
        torch.zeros(4, 3, 8, 8).double(),
        epsilon=0.03,
        step_size=0.03,
        steps=4,
        levels=((None, 1.0),),
        mean=MEAN,
        std=STD,
    )
    assert single.abs().amax((0, 2, 3)).tolist() == pytest.approx([0.12, 0.15, 0.1], abs=1e-12)


@pytest.mark.parametrize("epsilon", [0.01 / 255, 8 / 255])
def test_bounds_on_a_vit(epsilon: float) -> None:
    net, batch = backbone(), images(6)
    attacked = pyramid_attack(net, batch, epsilon=epsilon, step_size=epsilon / 2)
    change = attacked - batch
    assert attacked.min() >= 0 and attacked.max() <= 1 and change.abs().max() <= 31 * epsilon + 1e-6
    # Twenty times the coarse bound alone is more than any other level could give: 10 + 1 < 20.
    assert change.abs().max() > 20 * epsilon
    assert attacked.dtype == batch.dtype and attacked.shape == batch.shape and not attacked.requires_grad


@pytest.mark.parametrize(("size", "cells"), [((16, 16), 4), ((16, 16), 8), ((14, 18), 4), ((9, 7), 2), ((13, 13), 13)])
def test_a_level_is_constant_on_its_cells_and_different_from_cell_to_cell(size: tuple[int, int], cells: int) -> None:
    batch = 0.5 + 0 * torch.rand(2, 3, *size).double()
    change = pyramid_attack(fixed(*size), batch, epsilon=0.001, step_size=1e-4, levels=((cells, 20.0),)) - batch
    height, width = size
    owner = (torch.arange(height) * cells // height)[:, None] * cells + (torch.arange(width) * cells // width)[None]
    values = torch.stack([change[:, :, owner == cell].mean(2) for cell in range(cells**2)], 2)
    assert torch.allclose(change, values[:, :, owner], atol=1e-12)
    assert len(values[0, 0].unique()) > 0.85 * cells**2 and change.abs().max() <= 0.02 + 1e-12
    # 14 rows in four cells: 0..3, 4..6, 7..10, 11..13 (floor(row * 4 / 14))
    if size == (14, 18):
        assert torch.bincount(torch.arange(14) * 4 // 14).tolist() == [4, 3, 4, 3]


def test_cells_follow_the_image_and_not_a_table_for_128_pixels() -> None:
    for side in (16, 32):
        batch = torch.full((1, 3, side, side), 0.5).double()
        levels = PYRAMID[:1]
        change = (pyramid_attack(fixed(side, side), batch, epsilon=0.001, step_size=1e-4, levels=levels) - batch)[0, 0]
        blocks = change.unfold(0, side // 4, side // 4).unfold(1, side // 4, side // 4).flatten(2)
        assert torch.allclose(blocks, blocks[..., :1], atol=1e-12)


@pytest.mark.parametrize(("sides", "cells"), [((12, 20), 4), ((12, 20), 8), ((20, 12), 5)])
def test_a_vit_that_is_not_square(sides: tuple[int, int], cells: int) -> None:
    """Patches of 4 pixels, cells of another size: 12 rows in eight cells are 2, 1, 2, 1, ... rows high."""
    net = backbone(img_size=sides)
    batch = 0.3 + 0.4 * torch.rand(3, 3, *sides, generator=torch.Generator().manual_seed(0))
    full = pyramid_attack(net, batch, epsilon=1 / 255, step_size=0.5 / 255)
    assert full.shape == batch.shape and 20 / 255 < (full - batch).abs().max() <= 31 / 255 + 1e-6
    change = pyramid_attack(net, batch, epsilon=1 / 255, step_size=0.5 / 255, levels=((cells, 5.0),)) - batch
    height, width = sides
    owner = (torch.arange(height) * cells // height)[:, None] * cells + (torch.arange(width) * cells // width)[None]
    assert len(torch.bincount(owner.flatten()).unique()) > (cells == 8)
    for cell in range(cells**2):
        inside = change[:, :, owner == cell]
        assert torch.allclose(inside, inside[..., :1].expand_as(inside), atol=1e-6)
    assert kl(net, batch, full) > 0


def test_one_level_of_pixels_is_pgd() -> None:
    logits, epsilon, step = fixed(8, 8), 0.03, 0.01
    batch = 0.2 + 0.6 * torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    attacked = pyramid_attack(logits, batch, epsilon=epsilon, step_size=step, steps=5, levels=((None, 1.0),))
    start = (2 * torch.rand(batch.shape, generator=torch.Generator().manual_seed(0)).double() - 1) * epsilon
    x, clean = batch + start, logits(batch).log_softmax(1)
    for _ in range(5):
        x = x.detach().requires_grad_()
        gain = F.kl_div(logits(x).log_softmax(1), clean, reduction="sum", log_target=True)
        x = x + step * torch.autograd.grad(gain, x)[0].sign()
        x = (batch + (x - batch).clamp(-epsilon, epsilon)).clamp(0, 1)
    assert torch.allclose(attacked, x, rtol=0, atol=1e-12) and (attacked - batch).abs().max() <= epsilon + 1e-12


def kl(logits_fn, batch: Tensor, changed: Tensor) -> float:
    with torch.no_grad():
        clean, other = logits_fn(batch).log_softmax(1), logits_fn(changed).log_softmax(1)
    return float(F.kl_div(other, clean, reduction="batchmean", log_target=True))


def classifier() -> tuple[nn.Module, Tensor]:
    net, batch = backbone(), episode(0, queries=10)
    with torch.no_grad():
        centres = prototypes(net(batch["support"]), batch["support_labels"])
    return lambda x: cosine_logits(net(x), centres), batch["query"]


def test_strength() -> None:
    """E7: the KL rises; the pyramid beats one scale, alpha eps/2 beats eps/10, more steps and budget beat fewer."""
    logits, batch = classifier()

    def divergence(epsilon: float = 8 / 255, ratio: float = 0.5, steps: int = 2, levels=PYRAMID) -> float:
        changed = pyramid_attack(
            logits, batch, epsilon=epsilon, step_size=max(ratio * epsilon, 1e-30), steps=steps, levels=levels
        )
        return kl(logits, batch, changed)

    start = divergence(ratio=0.0)
    full = divergence()
    assert full > 1.3 * start and start > 0
    assert full > 3 * divergence(levels=((None, 1.0),)) > 0
    assert full > 1.1 * divergence(ratio=0.1)
    small = [divergence(1 / 255, steps=steps, levels=((None, 1.0),)) for steps in (1, 2, 8)]
    assert small[0] < small[1] < small[2]
    budgets = [divergence(value / 255) for value in (0.01, 0.1, 1, 8)]
    assert budgets == sorted(budgets) and budgets[3] > 10 * budgets[1]


def test_no_budget_gives_the_images_back_and_asks_no_model() -> None:
    batch = images()
    attacked = pyramid_attack(lambda x: 1 / 0, batch, epsilon=0.0, step_size=0.0)
    assert torch.equal(attacked, batch) and attacked.data_ptr() != batch.data_ptr()


def test_nothing_is_left_behind() -> None:
    net, batch = backbone(), images().requires_grad_()
    copy, before, state = batch.detach().clone(), snapshot(net), torch.get_rng_state()
    with torch.no_grad():
        attacked = pyramid_attack(net, batch, epsilon=0.03, step_size=0.01)
    assert torch.equal(attacked, pyramid_attack(net, batch, epsilon=0.03, step_size=0.01))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters()) and batch.grad is None
    assert torch.equal(batch, copy) and torch.equal(torch.get_rng_state(), state) and not attacked.requires_grad


def test_the_start_is_the_generators() -> None:
    net, batch = fixed(16, 16, dtype=torch.float32), images()

    def attack(seed: int | None, init: str = "uniform") -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return pyramid_attack(net, batch, epsilon=0.03, step_size=0.01, init=init, generator=generator)

    assert torch.equal(attack(0), attack(0)) and torch.equal(attack(None), attack(0))
    assert not torch.equal(attack(0), attack(1)) and not torch.equal(attack(0, "normal"), attack(1, "normal"))
    assert torch.equal(attack(0, "zero"), attack(1, "zero"))


@pytest.mark.parametrize(
    ("init", "low", "high"), [("zero", 0.0, 0.0), ("uniform", 0.9 * 31 * 0.004, 31 * 0.004), ("normal", 0.05, 0.12)]
)
def test_where_each_start_begins(init: str, low: float, high: float) -> None:
    distances, batch = [], torch.full((8, 3, 16, 16), 0.5).double()
    net = fixed(16, 16)

    def watched(x: Tensor) -> Tensor:
        distances.append((x.detach() - batch).abs().max())
        return net(x)

    pyramid_attack(watched, batch, epsilon=0.004, step_size=0.001, init=init, clean_logits=net(batch))
    # normal: 0.001 N(0, 1) by up to 20 + 10 + 1; the largest of six thousand sums, of deviation 0.0224, is under 5.4 of it.
    assert low <= float(distances[0]) <= high + 1e-12 and len(distances) == 2


def test_the_default_start_has_a_gradient() -> None:
    """At zero the KL is at its minimum: its gradient is rounding noise, and the attack has no effect."""
    logits, batch = classifier()
    default = pyramid_attack(logits, batch, epsilon=8 / 255, step_size=4 / 255, steps=1)
    assert torch.equal(
        default, pyramid_attack(logits, batch, epsilon=8 / 255, step_size=4 / 255, steps=1, init="uniform")
    )
    # The quadratic in exact arithmetic: a classifier whose clean and attacked branches agree bit for bit moves nothing.
    flat = torch.full((2, 3, 4, 4), 0.5).double()
    still = pyramid_attack(
        lambda x: torch.stack([x.mean((1, 2, 3)), 0 * x[:, 0, 0, 0]], 1) - 0.25,
        flat,
        epsilon=0.03,
        step_size=0.03,
        steps=3,
        levels=((None, 1.0),),
        init="zero",
    )
    assert torch.equal(still, flat)


def test_the_clean_target_is_computed_once_or_taken() -> None:
    calls, net, batch = [], fixed(16, 16, dtype=torch.float32), images()

    def counted(x: Tensor) -> Tensor:
        calls.append(torch.equal(x, batch))
        return net(x)

    attacked = pyramid_attack(counted, batch, epsilon=0.03, step_size=0.01, steps=4)
    assert calls == [True] + [False] * 4
    calls.clear()
    clean = net(batch).requires_grad_()
    assert torch.equal(
        attacked, pyramid_attack(counted, batch, epsilon=0.03, step_size=0.01, steps=4, clean_logits=clean)
    )
    assert calls == [False] * 4 and clean.grad is None


def test_names_of_classes_do_not_matter() -> None:
    batch, net = images().double(), fixed(16, 16)
    order = torch.tensor([2, 0, 1])
    first, second = (
        pyramid_attack(f, batch, epsilon=0.03, step_size=0.01, steps=3) for f in (net, lambda x: net(x)[:, order])
    )
    assert torch.allclose(first, second, atol=1e-12)


def test_small_gradients_survive_half_precision() -> None:
    """A slope of 1e-3 times a difference in probability of about 1e-5 is 1e-8: zero in fp16, whose least number is 6e-8."""
    batch = 0.3 + 0.4 * torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    weight = 1e-3 * torch.where(torch.rand(192, generator=torch.Generator().manual_seed(1)) < 0.5, -1.0, 1.0)

    def logits(x: Tensor) -> Tensor:
        hidden = x.flatten(1).half()
        return torch.stack([(hidden * weight.half()).float().sum(1), torch.zeros(len(x))], 1)

    call = {"epsilon": 0.01, "step_size": 0.02, "steps": 1, "levels": ((None, 1.0),)}
    change = pyramid_attack(logits, batch, **call) - batch
    assert (change.abs() > 0.0099).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    batch = images().to(dtype)
    attacked = pyramid_attack(fixed(16, 16, dtype=dtype), batch, epsilon=0.03, step_size=0.01)
    assert attacked.dtype == dtype and bool(attacked.isfinite().all()) and attacked.min() >= 0 and attacked.max() <= 1
    assert (attacked - batch).abs().max() > 0.3


# ---- the l2 ball, and the cross-entropy


def lengths(change: Tensor) -> Tensor:
    return change.flatten(1).norm(dim=1)


def test_an_l2_step_by_hand() -> None:
    """Two classes, one linear logit w x: KL and its slope along w; from 0.3 everywhere the step is alpha w / ||w||."""
    weight = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch = torch.full((2, 3, 8, 8), 0.3, dtype=torch.float64)

    def logits(x: Tensor) -> Tensor:  # every image has a direction of its own
        hidden = (x * weight * torch.tensor([1.0, 1e-4]).view(2, 1, 1, 1)).flatten(1).sum(1)
        return torch.stack([hidden, torch.zeros_like(hidden)], 1)

    call = {"levels": PLAIN, "norm": "l2", "init": "zero", "steps": 1, "labels": torch.tensor([1, 0])}
    change = pyramid_attack(logits, batch, epsilon=0.5, step_size=0.2, **call) - batch
    # The image with a slope of 1e-4 of the other's moves as far: norms are per image. Label 1 asks for more, 0 for less.
    assert torch.allclose(change[0], 0.2 * weight[0] / weight[0].norm(), atol=1e-6)
    assert torch.allclose(change[1], -0.2 * weight[1] / weight[1].norm(), atol=1e-6)
    outside = pyramid_attack(logits, batch, epsilon=0.15, step_size=0.2, **call) - batch
    assert lengths(outside).tolist() == pytest.approx([0.15, 0.15], abs=1e-6)


@pytest.mark.parametrize("radius", [8 / 255, 1.5])
def test_an_l2_attack_stays_in_its_ball_and_beats_noise(radius: float) -> None:
    net, batch = classifier()
    call = {"epsilon": radius, "step_size": radius / 2, "levels": PLAIN, "norm": "l2"}
    attacked = pyramid_attack(net, batch, **call)
    reached = lengths(attacked - batch)
    assert reached.max() <= radius * (1 + 1e-5) and reached.min() > 0.4 * radius
    assert attacked.min() >= 0 and attacked.max() <= 1
    noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(3))
    noisy = (batch + noise * (reached / lengths(noise)).view(-1, 1, 1, 1)).clamp(0, 1)
    assert kl(net, batch, attacked) > 3 * kl(net, batch, noisy)
    # Not a cube of the same radius: many pixels move, none of them by all of it.
    assert (attacked - batch).abs().max() < 0.7 * radius


@pytest.mark.parametrize("init", ["uniform", "normal", "zero"])
def test_an_l2_start_is_in_the_ball(init: str) -> None:
    batch = torch.full((64, 3, 16, 16), 0.5)
    call = {"epsilon": 0.02, "step_size": 1e-9, "steps": 1, "levels": PLAIN, "norm": "l2", "init": init}
    start = lengths(pyramid_attack(fixed(16, 16, dtype=torch.float32), batch, **call) - batch)
    assert start.max() <= 0.02 * 1.001
    if init == "uniform":  # lengths from nothing to all
        assert start.min() < 0.004 and start.max() > 0.016


def test_labels_ask_for_the_cross_entropy() -> None:
    net, batch = classifier()
    with torch.no_grad():
        wrong = net(batch).argmin(1)
    call = {"epsilon": 1 / 255, "step_size": 0.25 / 255, "steps": 4, "levels": PLAIN, "init": "zero"}
    with torch.no_grad():
        before = F.cross_entropy(net(batch), wrong)
        after = F.cross_entropy(net(pyramid_attack(net, batch, labels=wrong, **call)), wrong)
        by_kl = F.cross_entropy(net(pyramid_attack(net, batch, **{**call, "init": "uniform"})), wrong)
    assert after > before + 0.05 and after > by_kl + 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "l1"}, "norm 'l1'. Near: 'l2'"),
        ({"norm": "l2"}, r"levels .* with norm l2"),
        ({"norm": "l2", "levels": PLAIN, "epsilon": float("inf")}, "epsilon inf"),
        ({"epsilon": 8.0}, r"epsilon 8.0.*8/255, not 8"),
        ({"epsilon": -0.1}, "epsilon -0.1"),
        ({"step_size": 0.0}, "step_size 0.0"),
        ({"steps": 0}, "steps 0"),
        ({"levels": ()}, r"levels \(\)"),
        ({"levels": ((17, 1.0),)}, "from 1 to the smaller side"),
        ({"levels": ((0, 1.0),)}, "from 1"),
        ({"levels": ((4, 0.0),)}, "multiplier > 0"),
        ({"init": "unifrom"}, "'unifrom'. Near: 'uniform'"),
        ({"mean": MEAN}, "mean and std together"),
        ({"std": STD}, "mean and std together"),
        ({"images": torch.ones(2, 3, 4)}, r"\(2, 3, 4\)"),
        ({"images": torch.ones(2, 3, 4, 4).byte()}, "torch.uint8"),
        ({"epsilon": float("nan")}, "epsilon nan"),
    ],
)
def test_errors(change: dict, message: str) -> None:
    call = {"images": images(), "epsilon": 0.03, "step_size": 0.01, **change}
    with pytest.raises(UserError, match=message):
        pyramid_attack(fixed(16, 16, dtype=torch.float32), **call)
