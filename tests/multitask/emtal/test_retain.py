"""Quality retaining: numbers by hand, order of loss and update, two processes compared with a single one."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from helpers.ranks import run_two
from torch import Tensor
from torch.nn import functional as F

from vismt.base.errors import UserError
from vismt.multitask.emtal.retain import QualityRetaining

TASKS = torch.tensor([0, 0, 0, 1, 1, 1])


def batch(count: int = 6, classes: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=generator, dtype=dtype)
    return logits, torch.randint(classes, (count,), generator=generator)


def kl(first: list[float], second: list[float], T: float) -> float:
    """Return T^2 KL(softmax(first / T) || softmax(second / T)) in plain arithmetic."""
    p, q = ([math.exp(v / T) for v in values] for values in (first, second))
    p, q = ([v / sum(values) for v in values] for values in (p, q))
    return T * T * sum(a * math.log(a / b) for a, b in zip(p, q))


def test_golden_loss_of_two_samples() -> None:
    retain = QualityRetaining(6, TASKS, ema_decay=1.0, ema_init=4.0)
    older, newer = [0.0, 1, 2, 0, 0, 1], [1.0, 0, 0, 3, 0, 1]
    retain.update(torch.tensor([older, older]), torch.tensor([0, 3]))
    retain.update(torch.tensor([newer]), torch.tensor([0]))
    now = [[2.0, 0, 0, 0, 1, 0], [0.0, 0, 1, 1, 0, 0]]
    # Class 0 has had two samples; class 3 has had one, and its other slot is still zero.
    first = kl(older, now[0], 2) + kl(newer, now[0], 2)
    second = kl([0.0] * 6, now[1], 2) + kl(older, now[1], 2)
    loss = retain.loss(torch.tensor(now), torch.tensor([0, 3]))
    assert loss.item() == pytest.approx((first + second) / 2 / 4, rel=1e-5)
    retain.reduction = "sum"
    assert retain.loss(torch.tensor(now), torch.tensor([0, 3])).item() == pytest.approx((first + second) / 4, rel=1e-5)
    reverse = QualityRetaining(6, TASKS, ema_decay=1.0, ema_init=1.0, mode="ema", reverse=True, temperature=1.0)
    reverse.bank[0, 0] = torch.tensor(older)
    assert reverse.loss(torch.tensor(now[:1]), torch.tensor([0])).item() == pytest.approx(
        2 * kl(now[0], older, 1), rel=1e-5
    )


@pytest.mark.parametrize("mode", ["fifo2", "ema"])
def test_a_class_never_seen_is_pulled_to_uniform(mode: str) -> None:
    retain = QualityRetaining(6, TASKS, mode=mode, ema_decay=1.0)
    logits, labels = batch(1)
    # 2 T^2 KL(U || p_T) in both modes, damped by the start value 10.
    assert retain.loss(logits, labels).item() == pytest.approx(2 * kl([0.0] * 6, logits[0].tolist(), 2) / 10, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_gradient_identity(temperature: float) -> None:
    retain = QualityRetaining(6, TASKS, temperature=temperature, ema_decay=1.0, ema_init=1.0, reduction="sum")
    for seed in (1, 2, 3):
        retain.update(*batch(seed=seed))
    logits, labels = batch(dtype=torch.float64)
    logits.requires_grad_()
    retain.loss(logits, labels).backward()
    bank = retain.bank[labels].double()
    wanted = temperature * ((logits[:, None] / temperature).softmax(-1) - (bank / temperature).softmax(-1)).sum(1)
    assert torch.allclose(logits.grad, wanted, atol=1e-6)
    assert not retain.bank.requires_grad and not any(True for _ in retain.parameters())


def test_order_in_time() -> None:
    retain = QualityRetaining(6, TASKS)
    x, y, z = (torch.arange(6.0) * k for k in (1, 2, 3))
    label = torch.tensor([2])
    for logits in (x, y, z):
        before = copy.deepcopy(retain.state_dict())
        retain.loss(logits[None], label)
        # The loss does not change the state: updating the bank before it would distil a sample from itself.
        assert all(torch.equal(value, before[name]) for name, value in retain.state_dict().items())
        retain.update(logits[None].requires_grad_(), label)
    assert torch.equal(retain.bank[2], torch.stack([y, z]))
    others = [0, 1, 3, 4, 5]
    assert not retain.bank[others].any()


def test_running_mean_mode() -> None:
    retain = QualityRetaining(6, TASKS, mode="ema")
    first, second = batch(2)[0]
    retain.update(first[None], torch.tensor([4]))
    retain.update(second[None], torch.tensor([4]))
    assert torch.allclose(retain.bank[4, 0], 0.25 * first + 0.5 * second)
    assert retain.bank.shape == (6, 1, 6)


@pytest.mark.parametrize("mode", ["fifo2", "ema"])
def test_duplicates_in_a_batch(mode: str) -> None:
    retain, single = (QualityRetaining(6, TASKS, mode=mode) for _ in range(2))
    start, labels = torch.randn(6, 6, generator=torch.Generator().manual_seed(3)), torch.arange(6)
    logits, many = batch(9, seed=4)[0], torch.tensor([1, 5, 1, 1, 0, 5, 1, 5, 0])
    for module in (retain, single):
        module.update(start, labels)
    retain.update(logits, many)
    # The last samples of classes 1, 5 and 0 are 6, 7 and 8: the same as these three alone.
    single.update(logits[[6, 7, 8]], torch.tensor([1, 5, 0]))
    assert torch.equal(retain.bank, single.bank)
    if mode == "fifo2":
        assert torch.equal(retain.bank[1], torch.stack([start[1], logits[6]]))


def logits_of_loss(wanted: float, label: int, classes: int) -> Tensor:
    """Return logits with cross-entropy `wanted` at `label`: -log(1 / (1 + (C - 1) e^v)), v the other logits."""
    row = torch.full((classes,), math.log((math.exp(wanted) - 1) / (classes - 1)))
    row[label] = 0
    return row


def test_running_cross_entropy_by_hand() -> None:
    retain = QualityRetaining(8, [0, 0, 1, 1, 2, 2, 3, 3])
    losses, labels = [1.0, 3.0, 4.0], torch.tensor([0, 1, 2])
    logits = torch.stack([logits_of_loss(loss, int(label), 8) for loss, label in zip(losses, labels)])
    assert torch.allclose(F.cross_entropy(logits, labels, reduction="none"), torch.tensor(losses), atol=1e-5)
    retain.update(logits, labels)
    # .95 * 10 + .05 * {mean(1, 3) = 2, 4}; tasks 2 and 3 are absent.
    assert torch.allclose(retain.ema, torch.tensor([9.6, 9.7, 10, 10]), atol=1e-5)
    # The weight of the next loss includes its batch.
    value = retain.loss(logits[2:], labels[2:]).item()
    bank = retain.bank[2].tolist()
    wanted = sum(kl(row, logits[2].tolist(), 2) for row in bank) / (0.95 * 9.7 + 0.05 * 4)
    assert value == pytest.approx(wanted, rel=1e-5)


def test_halving_a_task_doubles_its_gradient_and_nothing_else() -> None:
    retain = QualityRetaining(6, TASKS, ema_decay=1.0)
    retain.update(*batch(seed=7))
    logits, _ = batch(4)
    labels = torch.tensor([0, 4, 2, 5])
    gradients = []
    for _ in range(2):
        leaf = logits.clone().requires_grad_()
        retain.loss(leaf, labels).backward()
        gradients.append(leaf.grad)
        retain.ema[1] /= 2
    assert torch.equal(gradients[1][[0, 2]], gradients[0][[0, 2]])
    assert torch.allclose(gradients[1][[1, 3]], 2 * gradients[0][[1, 3]])


def test_broken_samples_leave_no_trace() -> None:
    retain, clean = (QualityRetaining(6, TASKS) for _ in range(2))
    start = batch(6, seed=5)[0]
    for module in (retain, clean):
        module.update(start, torch.arange(6))
    logits = batch(4, seed=6)[0]
    labels = torch.tensor([0, 1, 0, 4])
    logits[2, 3], logits[3, 0] = torch.inf, torch.nan
    retain.update(logits, labels)
    clean.update(logits[:2], labels[:2])
    assert torch.equal(retain.bank, clean.bank) and torch.equal(retain.ema, clean.ema)


def test_state_is_fp32_saved_and_restored() -> None:
    retain = QualityRetaining(6, TASKS)
    retain.update(*batch())
    exact = retain.bank.clone()
    retain.half()
    assert retain.bank.dtype == retain.ema.dtype == torch.float32 and torch.equal(retain.bank, exact)
    assert set(retain.state_dict()) == {"bank", "ema"}
    again = QualityRetaining(6, TASKS)
    again.load_state_dict(retain.state_dict())
    logits, labels = batch(seed=9)
    assert torch.equal(again.loss(logits, labels), retain.loss(logits, labels))
    half = retain.loss(logits.bfloat16(), labels)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(retain.loss(logits, labels).item(), rel=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(retain.loss(logits, labels), again.loss(logits, labels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "fifo"}, "mode 'fifo'.*Near: 'fifo2'"),
        ({"reduction": "avg"}, "reduction 'avg'.*'mean', 'sum'"),
        ({"temperature": 0.0}, "temperature 0.0, needed > 0"),
        ({"ema_decay": 1.1}, "ema_decay 1.1"),
        ({"ema_init": 0.0}, "ema_init 0.0"),
        ({"momentum": 1.0}, "momentum 1.0"),
        ({"task_of_class": TASKS[:5]}, r"task_of_class is \(5,\).*needed \(6,\) int64"),
        ({"task_of_class": TASKS.float()}, "float32"),
        ({"task_of_class": torch.tensor([0, 0, 0, 2, 2, 2])}, "task 1 has no class"),
        ({"task_of_class": torch.tensor([0, 0, 0, 1, 1, -1])}, "task -1"),
    ],
)
def test_bad_settings(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        QualityRetaining(**{"num_classes": 6, "task_of_class": TASKS, **change})


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), r"logits \(2, 5\).*needed \(b, 6\)"),
        (torch.zeros(2, 6), torch.zeros(3, dtype=torch.int64), r"labels \(3,\)"),
        (torch.zeros(2, 6), torch.zeros(2), "float32"),
        (torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), "floating point"),
        (torch.zeros(2, 6), torch.tensor([0, 6]), "from 0 to 6, the union has 6 classes"),
        (torch.zeros(1, 6), torch.tensor(0), r"labels \(\)"),
    ],
)
def test_bad_batches(logits: Tensor, labels: Tensor, message: str) -> None:
    retain = QualityRetaining(6, TASKS)
    for call in (retain.loss, retain.update):
        with pytest.raises(UserError, match=message):
            call(logits, labels)


WORKER = """
import sys
import torch
import torch.distributed as dist
from vismt.multitask.emtal.retain import QualityRetaining
file, mode = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
retain = QualityRetaining(6, [0, 0, 0, 1, 1, 1], mode=mode)
losses = []
for logits, labels in torch.load(file, weights_only=True):
    cut = slice(0, 4) if rank == 0 else slice(4, None)
    losses.append(retain.loss(logits[cut], labels[cut]))
    retain.update(logits[cut], labels[cut])
torch.save({"losses": torch.stack(losses), **retain.state_dict()}, f"{file}.{rank}")
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fifo2", "ema"])
def test_two_processes_hold_the_state_of_one(tmp_path: Path, mode: str) -> None:
    """With unequal shares of a batch, both ranks have the banks and weights of a single process with the whole batch."""
    steps = [batch(7, seed=seed) for seed in range(4)]
    file = tmp_path / "steps.pt"
    torch.save(steps, file)
    run_two("-c", WORKER, file, mode)
    single, losses = QualityRetaining(6, TASKS, mode=mode), []
    for logits, labels in steps:
        losses.append(single.loss(logits, labels))
        single.update(logits, labels)
    first, second = (torch.load(f"{file}.{rank}", weights_only=True) for rank in range(2))
    assert torch.equal(first["bank"], second["bank"]) and torch.equal(first["ema"], second["ema"])
    assert torch.equal(first["bank"], single.bank) and torch.allclose(first["ema"], single.ema, rtol=1e-6)
    assert torch.allclose((4 * first["losses"] + 3 * second["losses"]) / 7, torch.stack(losses), rtol=1e-5)
