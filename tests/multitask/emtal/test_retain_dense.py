"""Quality retaining of label maps: numbers by hand on a 2 x 3 map of 3 classes, the bank, ignored pixels."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.ranks import run_two
from torch import Tensor

from vismt.base.errors import UserError
from vismt.multitask.emtal.retain import QualityRetaining
from vismt.multitask.tasks import IGNORE

# Six pixels (2 x 3), logits of 3 classes each; class 2 does not occur, one pixel is ignored.
TARGET = torch.tensor([[[0, 0, 1], [1, IGNORE, 0]]])
PIXELS = [[3.0, 0, 0], [1, 2, 0], [0, 1, 0], [2, 0, 1], [9, 9, -9], [2, 1, 3]]


def map_of(pixels: list[list[float]]) -> Tensor:
    """Return the map (1, 3, 2, 3) of six pixels in rows."""
    return torch.tensor(pixels).T.reshape(1, 3, 2, 3)


def softmax(row: list[float], T: float) -> list[float]:
    powers = [math.exp(value / T) for value in row]
    return [power / sum(powers) for power in powers]


def kl(first: list[float], second: list[float], T: float = 2.0) -> float:
    """Return T^2 KL(softmax(first / T) || softmax(second / T)) in plain arithmetic."""
    return T * T * sum(p * math.log(p / q) for p, q in zip(softmax(first, T), softmax(second, T)))


def random_batch(count: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(4, (count, 4, 6), generator=generator)
    return 2 * torch.randn(count, 3, 4, 6, generator=generator), target.where(target < 3, IGNORE)


def test_golden_loss_of_six_pixels() -> None:
    retain = QualityRetaining(3, ema_decay=1.0, ema_init=4.0)
    older, newer, other = [1.0, 2, 0], [0.0, 1, 3], [2.0, 0, 1]
    retain.bank[0], retain.bank[1, 1] = torch.tensor([older, newer]), torch.tensor(other)
    loss = retain.loss(map_of(PIXELS), TARGET)
    # Pixels 0, 1, 5 have class 0, whose two slots are filled; pixels 2, 3 class 1, whose older slot is zero; pixel 4 is ignored.
    of_zero = sum(kl(older, PIXELS[p]) + kl(newer, PIXELS[p]) for p in (0, 1, 5))
    of_one = sum(kl([0.0] * 3, PIXELS[p]) + kl(other, PIXELS[p]) for p in (2, 3))
    assert loss.item() == pytest.approx((of_zero + of_one) / 5 / 4, rel=1e-5)


@pytest.mark.parametrize("mode", ["fifo2", "ema"])
def test_an_empty_bank_pulls_to_uniform(mode: str) -> None:
    retain = QualityRetaining(3, mode=mode, ema_decay=1.0)
    # 2 T^2 KL(U || p_T), the mean of five pixels, over the start value 10.
    wanted = sum(2 * kl([0.0] * 3, PIXELS[p]) for p in (0, 1, 2, 3, 5)) / 5 / 10
    assert retain.loss(map_of(PIXELS), TARGET).item() == pytest.approx(wanted, rel=1e-5)


def test_the_bank_takes_means_over_image_and_class() -> None:
    retain = QualityRetaining(3)
    retain.update(map_of(PIXELS).requires_grad_(), TARGET)
    # Class 0: (3 + 1 + 2, 0 + 2 + 1, 0 + 0 + 3) / 3; class 1: (0 + 2, 1 + 0, 0 + 1) / 2; class 2 has no pixel.
    wanted = torch.tensor([[2.0, 1, 1], [1, 0.5, 0.5], [0, 0, 0]])
    assert torch.allclose(retain.bank[:, 1], wanted) and not retain.bank[:, 0].any() and not retain.bank.requires_grad
    retain.update(map_of(PIXELS) + 1, TARGET.where(TARGET != 1, IGNORE))
    # Class 0 shifts, class 1 is absent and does not change.
    assert torch.allclose(retain.bank[0], torch.stack([wanted[0], wanted[0] + 1]))
    assert torch.allclose(retain.bank[1, 1], wanted[1]) and not retain.bank[1, 0].any()
    mean = QualityRetaining(3, mode="ema", momentum=0.25)
    mean.update(map_of(PIXELS), TARGET)
    assert torch.allclose(mean.bank[:, 0], 0.75 * wanted)


def test_the_running_cross_entropy_is_that_of_pixels() -> None:
    retain = QualityRetaining(3)
    logits = map_of(PIXELS)
    retain.update(logits, TARGET)
    entropies = [-math.log(softmax(PIXELS[p], 1)[y]) for p, y in ((0, 0), (1, 0), (2, 1), (3, 1), (5, 0))]
    # Five pixels with equal weight; the two class means would give another number.
    assert retain.ema.tolist() == pytest.approx([0.95 * 10 + 0.05 * sum(entropies) / 5], rel=1e-6)
    assert F.cross_entropy(logits, TARGET, ignore_index=IGNORE).item() == pytest.approx(sum(entropies) / 5, rel=1e-5)
    means = torch.tensor([[2.0, 1, 1], [1, 0.5, 0.5]])
    assert F.cross_entropy(means, torch.tensor([0, 1])).item() != pytest.approx(sum(entropies) / 5, rel=0.05)
    # The weight of the loss includes its batch: with decay 0 it is that of the batch alone.
    now, later = QualityRetaining(3, ema_decay=0.0), QualityRetaining(3, ema_decay=1.0)
    assert now.loss(logits, TARGET).item() == pytest.approx(
        later.loss(logits, TARGET).item() * 10 / (sum(entropies) / 5), rel=1e-5
    )


def test_ignored_pixels_have_no_influence() -> None:
    logits, target = random_batch()
    clean, broken = (QualityRetaining(3) for _ in range(2))
    clean.update(logits, target)
    broken.update(logits.where((target != IGNORE)[:, None], math.nan), target)
    assert torch.equal(clean.bank, broken.bank) and torch.equal(clean.ema, broken.ema)
    wild = logits.where((target != IGNORE)[:, None], 1e4).requires_grad_()
    loss = broken.loss(wild, target)
    loss.backward()
    assert torch.equal(loss, clean.loss(logits, target))
    assert not wild.grad.movedim(1, -1)[target == IGNORE].any() and wild.grad.isfinite().all() and wild.grad.any()


def test_without_a_valid_pixel_the_loss_is_zero_and_the_state_does_not_change() -> None:
    retain = QualityRetaining(3)
    retain.update(*random_batch())
    before = copy.deepcopy(retain.state_dict())
    nothing = torch.full((3, 4, 6), IGNORE)
    logits = random_batch(seed=1)[0].requires_grad_()
    loss = retain.loss(logits, nothing)
    loss.backward()
    assert loss == 0 and not logits.grad.any()
    assert retain.loss(logits.bfloat16() * math.nan, nothing).dtype == torch.float32
    retain.update(random_batch(seed=1)[0], nothing)
    assert all(torch.equal(value, before[name]) for name, value in retain.state_dict().items())


def test_the_bank_moves_after_the_loss() -> None:
    retain = QualityRetaining(3)
    logits, target = random_batch()
    before = copy.deepcopy(retain.state_dict())
    first = retain.loss(logits, target)
    assert all(torch.equal(value, before[name]) for name, value in retain.state_dict().items())
    assert torch.equal(first, retain.loss(logits, target))
    retain.update(logits, target)
    assert not torch.equal(first, retain.loss(logits, target))


@pytest.mark.parametrize("mode", ["fifo2", "ema"])
def test_the_last_image_of_a_class_is_stored(mode: str) -> None:
    logits, target = random_batch(3, seed=5)
    target[2] = target[2].where(target[2] != 1, IGNORE)  # class 1 comes last in image 1, the others in image 2
    retain, single = (QualityRetaining(3, mode=mode) for _ in range(2))
    for module in (retain, single):
        module.update(*random_batch(seed=6))
    retain.update(logits, target)
    last_only = target.clone()
    last_only[0], last_only[1] = IGNORE, target[1].where(target[1] == 1, IGNORE)
    single.update(logits, last_only)
    assert torch.equal(retain.bank, single.bank)
    again = QualityRetaining(3, mode=mode)
    again.update(*random_batch(seed=6))
    again.update(logits, target)
    assert torch.equal(again.bank, retain.bank)


def test_gradient_is_the_mean_of_pixels() -> None:
    retain = QualityRetaining(3, ema_decay=1.0, ema_init=1.0)
    for seed in (1, 2):
        retain.update(*random_batch(seed=seed))
    logits, target = random_batch()
    logits = logits.double().requires_grad_()
    retain.loss(logits, target).backward()
    valid = target != IGNORE
    rows, bank = logits.detach().movedim(1, -1)[valid], retain.bank[target[valid]].double()
    # T sum_j (softmax(z / T) - softmax(bank_j / T)) over the number of valid pixels.
    wanted = 2 * ((rows[:, None] / 2).softmax(-1) - (bank / 2).softmax(-1)).sum(1) / int(valid.sum())
    assert torch.allclose(logits.grad.movedim(1, -1)[valid], wanted, atol=1e-7)


def test_labels_come_to_the_grid_of_the_logits() -> None:
    logits, target = random_batch()
    # Every label becomes a block of 4 x 2 pixels, so the label nearest to each centre is the original one.
    large = target.repeat_interleave(4, 1).repeat_interleave(2, 2)
    same, coarse = (QualityRetaining(3) for _ in range(2))
    assert torch.equal(same.loss(logits, target), coarse.loss(logits, large))
    same.update(logits, target)
    coarse.update(logits, large)
    assert torch.equal(same.bank, coarse.bank) and torch.equal(same.ema, coarse.ema)


def test_state_is_saved_in_fp32_and_half_maps_are_welcome() -> None:
    retain = QualityRetaining(3).bfloat16()
    logits, target = random_batch()
    retain.update(logits.bfloat16(), target)
    assert set(retain.state_dict()) == {"bank", "ema"} and retain.bank.dtype == retain.ema.dtype == torch.float32
    exact = QualityRetaining(3)
    exact.update(logits, target)
    assert torch.allclose(retain.bank, exact.bank, atol=0.02)
    assert retain.loss(logits.bfloat16(), target).dtype == torch.float32


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (torch.zeros(1, 4, 2, 3), torch.zeros(1, 2, 3).long(), r"logits \(1, 4, 2, 3\).*of maps \(b, 3, r, c\)"),
        (torch.zeros(3, 2, 3), torch.zeros(1, 2, 3).long(), r"logits \(3, 2, 3\)"),
        (torch.zeros(2, 3, 2, 3), torch.zeros(1, 2, 3).long(), r"labels \(1, 2, 3\)"),
        (torch.zeros(1, 3, 2, 3), torch.zeros(1, 2, 3), "float32"),
        (torch.zeros(1, 3, 2, 3), torch.full((1, 2, 3), 3), "labels from 3 to 3"),
        (torch.zeros(1, 3, 2, 3).long(), torch.zeros(1, 2, 3).long(), "floating point"),
    ],
)
def test_bad_batches(logits: Tensor, target: Tensor, message: str) -> None:
    retain = QualityRetaining(3)
    for call in (retain.loss, retain.update):
        with pytest.raises(UserError, match=message):
            call(logits, target)


WORKER = """
import sys
import torch
import torch.distributed as dist
from vismt.multitask.emtal.retain import QualityRetaining
file = sys.argv[1]
dist.init_process_group("gloo")
rank = dist.get_rank()
retain = QualityRetaining(3)
for logits, target in torch.load(file, weights_only=True):
    cut = slice(0, 2) if rank == 0 else slice(2, None)
    assert bool(retain.loss(logits[cut], target[cut]) == 0) == bool((target[cut] == 255).all())
    retain.update(logits[cut], target[cut])
torch.save(retain.state_dict(), f"{file}.{rank}")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_process_without_labels_keeps_up_with_the_others(tmp_path: Path) -> None:
    """A process without a valid pixel in the second step: both ranks have the state of a single process."""
    steps = [random_batch(3, seed=seed) for seed in range(3)]
    steps[1][1][2] = IGNORE
    file = tmp_path / "steps.pt"
    torch.save(steps, file)
    run_two("-c", WORKER, file)
    single = QualityRetaining(3)
    for logits, target in steps:
        single.update(logits, target)
    for rank in range(2):
        state = torch.load(f"{file}.{rank}", weights_only=True)
        assert torch.equal(state["bank"], single.bank) and torch.allclose(state["ema"], single.ema, rtol=1e-6)
