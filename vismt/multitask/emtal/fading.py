"""Router fading: the router of EMTAL (Zhong et al., NeurIPS 2024, arXiv 2501.06884) turns into the constant 1.

    omega = (1 - a) K softmax(router) + a          a(s) = clip((s - s0) / (s1 - s0), 0, 1)      s finished optimiser steps
                                                   s0 = start * total, s1 = end * total

a = 0 routes. a = 1 is plain LoRA and can be merged. The paper writes 1 - a and fades "in the last epochs". The released code
fades from the first iteration to half of training, which is the default here. It lets a model that is called without a
coefficient run half-faded. Here the coefficient is state, in the state dict, and a forward pass has no default for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError, shown_value


@dataclass
class FadeConfig:
    """The part of the training in which the routers fade, see `RouterFade`.

    Args:
        start: Fraction of the training at which the fading begins.
        end: Fraction of the training at which the fading ends.
    """

    start: float = 0.0
    end: float = 0.5

    def __post_init__(self) -> None:
        _check_range(self.start, self.end)


def _check_range(start: float, end: float) -> None:
    """Raise UserError unless 0 <= start <= end <= 1."""
    if not 0 <= start <= end <= 1:
        raise UserError(
            f"fade: start {start}, end {end}: need 0 <= start <= end <= 1, so that it ends within the training."
        )


class FadeState(nn.Module):
    """The coefficient a in [0, 1], one object that all routers of a model share.

    alpha: Buffer with the coefficient, fp32 scalar. Reading it does not wait for the device. value: The same as a float.
    Setting it outside of [0, 1] raises UserError.
    """

    alpha: Tensor

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("alpha", torch.zeros((), dtype=torch.float32))
        self.value = value

    @property
    def value(self) -> float:
        return self._value

    @value.setter
    def value(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise UserError(f"fade: coefficient {value}, needed 0 (routed) to 1 (faded).")
        self._value = float(value)
        self.alpha.fill_(self._value)

    def _load_from_state_dict(self, *arguments: object) -> None:
        super()._load_from_state_dict(*arguments)
        self._loaded()

    def _loaded(self) -> None:
        self._value = float(self.alpha)

    def extra_repr(self) -> str:
        return f"value={self.value:.4g}"


class RouterFade(FadeState):
    """A FadeState that follows the schedule. Call `step()` after each optimiser step, or `on_step(number)`.

    taken: Number of finished steps, saved as the buffer `steps` (int64).

    Args:
        total_steps: Number of optimiser steps of the training, >= 1.
        start, end: Fractions of the steps between which a rises from 0 to 1, 0 <= start <= end <= 1. If they are equal, a
            jumps. From end * total_steps on, a is exactly 1.

    Raises:
        UserError: If a value is out of range, or the loaded state belongs to another schedule.
    """

    steps: Tensor

    def __init__(self, total_steps: int, start: float = 0.0, end: float = 0.5) -> None:
        super().__init__()
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise UserError(
                f"fade: total_steps {shown_value(total_steps)}, needed the number of optimiser steps of the training."
            )
        _check_range(start, end)
        self.total_steps, self.start, self.end = total_steps, float(start), float(end)
        self.taken = 0
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.value = self.at(0)

    def at(self, step: int) -> float:
        """Return the coefficient after `step` finished optimiser steps."""
        first, last = self.start * self.total_steps, self.end * self.total_steps
        # A product of floats may be a rounding error above the whole step.
        if step >= last - 1e-9 * self.total_steps:
            return 1.0
        return (step - first) / (last - first) if step > first else 0.0

    def step(self) -> float:
        """Count one optimiser step. Return the new coefficient."""
        self.on_step(self.taken + 1)
        return self.value

    def on_step(self, step: int) -> None:
        """Take the coefficient of `step` finished optimiser steps."""
        self.taken = step
        self.steps.fill_(step)
        self.value = self.at(step)

    def metrics(self) -> dict[str, Tensor]:
        """Return what a training loop logs: "fade", the coefficient in fp32."""
        return {"fade": self.alpha.clone()}

    def _loaded(self) -> None:
        stored, taken = float(self.alpha), int(self.steps)
        planned = self.at(taken)
        if abs(planned - stored) > torch.finfo(self.alpha.dtype).eps:
            raise UserError(
                f"fade: the saved coefficient is {stored:.4g} after {taken} steps, this schedule ({self.start:g} to {self.end:g} "
                f"of {self.total_steps} steps) has {planned:.4g}; use the settings that it was trained with."
            )
        self.taken, self.value = taken, planned

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, step {self.taken} of {self.total_steps}, start={self.start:g}, end={self.end:g}"
        )
