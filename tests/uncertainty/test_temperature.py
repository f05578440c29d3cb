"""Temperatures on planted ones, at their ends, and by blocks of classes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vismt.base.errors import UserError
from vismt.llm import fit_temperature
from vismt.uncertainty.probability_metrics import expected_calibration_error
from vismt.uncertainty.temperature import block_tempered, fit_block_temperatures


def test_temperature_has_the_least_nll() -> None:
    torch.manual_seed(0)
    z = 2 * torch.randn(6_000, 4)
    y = torch.distributions.Categorical(logits=z).sample()
    assert fit_temperature(3 * z, y) == pytest.approx(3, rel=0.05)
    assert fit_temperature((z / 4).log_softmax(1), y) == pytest.approx(0.25, rel=0.05)
    small, labels = z[:300].to(torch.bfloat16), y[:300]
    temperature = fit_temperature(small, labels)
    nll = [F.cross_entropy(small.double() / (temperature * factor), labels).item() for factor in (0.99, 1.0, 1.01)]
    assert nll[1] < min(nll[0], nll[2])
    assert (small / temperature).argmax(1).equal(small.argmax(1))


def test_temperature_at_its_ends() -> None:
    z = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(z, torch.tensor([0, 1])) == pytest.approx(1e-3, rel=1e-6)  # always right: no finite optimum
    assert fit_temperature(z, torch.tensor([1, 0])) == pytest.approx(1e3, rel=1e-6)


@pytest.mark.parametrize(
    "z,y,message",
    [
        (torch.zeros(3, 2), torch.zeros(2).long(), "needed \\(n, k\\) and \\(n,\\)"),
        (torch.zeros(0, 2), torch.zeros(0).long(), "needed"),
        (torch.full((2, 2), -math.inf), torch.zeros(2).long(), "not all finite"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), "labels range over \\[0, 2\\]"),
    ],
)
def test_temperature_of_what_does_not_fit(z: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit_temperature(z, y)


BLOCKS = torch.tensor([0] * 4 + [1] * 4)


def of_two_tasks(n: int, seed: int, separated: float = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (n, 8) too sharp by 3 on the examples of the first task and too flat by 1/2 on the others, labels, tasks."""
    generator = torch.Generator().manual_seed(seed)
    task = torch.arange(n) % 2
    z = torch.randn(n, 8, generator=generator, dtype=torch.float64) + separated * (task[:, None] == BLOCKS)
    y = torch.multinomial(z.softmax(1), 1, generator=generator).squeeze(1)
    return z * torch.where(task == 0, 3.0, 0.5)[:, None], y, task


def test_every_block_has_the_temperature_of_its_task() -> None:
    z, y, _ = of_two_tasks(4000, 0)
    assert fit_block_temperatures(z, y, BLOCKS) == pytest.approx([3, 0.5], rel=0.12)
    test, labels, task = of_two_tasks(4000, 1)
    temperatures = torch.tensor(fit_block_temperatures(z, y, BLOCKS), dtype=torch.float64)
    by_block, by_one = block_tempered(test, temperatures[BLOCKS]), test / fit_temperature(z, y)
    for number in (0, 1):  # one T between the two harms a task that was nearer to its own
        mine = task == number
        errors = [expected_calibration_error(form[mine].softmax(1), labels[mine]) for form in (by_block, by_one)]
        assert errors[0] < 0.04 < errors[1]
        assert F.cross_entropy(by_block[mine], labels[mine]) < F.cross_entropy(by_one[mine], labels[mine]) - 0.01


def test_no_answer_changes_within_blocks_and_across_them() -> None:
    z, _, _ = of_two_tasks(2000, 2, separated=0.5)
    scaled = block_tempered(z, torch.tensor([0.4, 5.0], dtype=torch.float64)[BLOCKS])
    assert scaled.argmax(1).equal(z.argmax(1)) and scaled.argsort(1).equal(z.argsort(1))
    # Dividing every class by the temperature of its own block would change answers from block to block.
    assert not (z / torch.tensor([0.4, 5.0])[BLOCKS]).argmax(1).equal(z.argmax(1))


def test_blocks_of_few_or_right_answers_stay_near_the_temperature_of_all() -> None:
    z, y, _ = of_two_tasks(400, 3)
    third = torch.cat([BLOCKS, torch.tensor([2])])
    unanswered = torch.cat([z, torch.full((400, 1), -50.0, dtype=torch.float64)], 1)
    assert fit_block_temperatures(unanswered, y, third)[2] == pytest.approx(fit_temperature(z, y), rel=1e-9)
    assert fit_block_temperatures(z, y, torch.zeros(8).long()) == pytest.approx([fit_temperature(z, y)], rel=1e-9)
    unanswered[:5, 8] = 50.0  # five right answers alone, of which the temperature would be 0.001
    y[:5] = 8
    assert fit_block_temperatures(unanswered, y, third)[2] > 0.2
    with pytest.raises(UserError, match="labels range over"):
        fit_block_temperatures(z, y + 8, BLOCKS)
