"""The fade schedule: values at each step, exactly 1 at its end, and its state after a restart."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from vismt.base.errors import UserError
from vismt.multitask.emtal.fading import FadeState, RouterFade


def test_values_at_the_epochs_of_the_paper() -> None:
    per_epoch, epochs = 71, 110  # 100 epochs and 10 of cool-down
    fade = RouterFade(per_epoch * epochs)
    values = {}
    for step in range(per_epoch * epochs):
        if step % per_epoch == 0:
            values[step // per_epoch] = fade.value
        before = fade.value
        assert fade.step() > before or before == 1
    golden = {0: 0.0, 1: 0.0182, 10: 0.1818, 27: 0.4909, 50: 0.9091}
    assert {epoch: round(values[epoch], 4) for epoch in golden} == golden
    # Exactly one from half of training on, in floating point: omega is then the constant 1 and merging is exact.
    assert all(values[epoch] == 1 for epoch in range(55, 110)) and values[54] < 1
    assert fade.value == 1 and fade.alpha.item() == 1 and RouterFade(400).at(100) == 0.5


@pytest.mark.parametrize("total", [1, 3, 7, 10, 30, 1000])
@pytest.mark.parametrize(
    ("start", "end"), [(0.0, 0.5), (0.1, 0.7), (0.2, 0.3), (0.5, 1.0), (0.3, 0.3), (0.0, 0.0), (1.0, 1.0)]
)
def test_zero_until_the_start_linear_then_exactly_one(total: int, start: float, end: float) -> None:
    fade = RouterFade(total, start, end)
    for step in range(total + 3):
        # 0.7 * 10 is 7.000000000000001: a comparison without tolerance would end the fade a step too late.
        past, span = 10 * step - round(10 * start) * total, round(10 * (end - start)) * total
        wanted = 1.0 if past >= span else 0.0 if past <= 0 else past / span
        assert fade.value == pytest.approx(wanted, abs=1e-9) and (fade.value == 1) == (wanted == 1)
        assert fade.alpha.item() == pytest.approx(wanted, abs=1e-7)
        fade.step()


def test_the_state_goes_on_after_a_restart_and_through_copies() -> None:
    fade = RouterFade(20)
    for _ in range(3):
        fade.step()
    again = RouterFade(20)
    again.load_state_dict(fade.state_dict())
    assert again.taken == 3 and again.value == fade.value == 0.3
    assert again.step() == fade.step() == 0.4
    for twin in (copy.deepcopy(fade), pickle.loads(pickle.dumps(fade))):
        assert twin.step() == 0.5 and fade.value == 0.4


def test_the_buffer_is_shared_and_changed_in_place() -> None:
    fade = RouterFade(4)
    buffer = fade.alpha
    fade.step()
    # Routers and captured graphs that refer to the tensor see the new value.
    assert buffer is fade.alpha and buffer.item() == 0.5 and buffer.dtype == torch.float32 and buffer.ndim == 0
    assert not list(fade.parameters())


def test_a_state_of_another_schedule_is_refused() -> None:
    fade = RouterFade(20)
    for _ in range(3):
        fade.step()
    with pytest.raises(UserError, match=r"0\.3 after 3 steps.*of 40 steps.*0\.15"):
        RouterFade(40).load_state_dict(fade.state_dict())


def test_plain_state() -> None:
    state = FadeState(0.25)
    assert state.value == 0.25 and state.alpha.item() == 0.25
    other = FadeState()
    other.load_state_dict(state.state_dict())
    assert other.value == 0.25
    state.value = 1
    assert state.alpha.item() == 1 and "value=1" in repr(state)
    assert "step 0 of 4" in repr(RouterFade(4))


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_coefficients_outside_are_refused(value: float) -> None:
    with pytest.raises(UserError, match="coefficient"):
        FadeState(value)


@pytest.mark.parametrize("total", [0, -3, 2.5, True])
def test_bad_totals(total: object) -> None:
    with pytest.raises(UserError, match="total_steps"):
        RouterFade(total)


@pytest.mark.parametrize(("start", "end"), [(0.6, 0.5), (-0.1, 0.5), (0.0, 1.2), (float("nan"), 0.5)])
def test_bad_windows(start: float, end: float) -> None:
    with pytest.raises(UserError, match="0 <= start <= end <= 1"):
        RouterFade(10, start, end)
