"""Attacks in the form of torchattacks (Kim, arXiv 2010.01950): its classes, as `torchattacks:NAME`, and what others register.

Such an attack is a class: kind(model, eps=..., steps=...)(images, labels) -> adversarial images.

Such a class draws random numbers for a whole batch. Every restart therefore takes all images that are right when clean, and
these images get the same draws if they are for another model. Budget, step and length are passed if the class takes them. An
image outside the budget, as minimal-norm attacks may return, is replaced by the clean image.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError, require_known
from vismt.base.norm_balls import column, rounding, size
from vismt.base.registry import Registry
from vismt.robustness.attacks.active_set import Wave, restart_seed
from vismt.robustness.attacks.victim import Victim

PREFIX = "torchattacks:"
L2_ENDING = "L2"  # parts of names of classes with a radius in l2. Other classes have linf, or their argument `norm`


class _Model(nn.Module):
    """The victim in the form that torchattacks needs: a Module with a parameter on its device."""

    def __init__(self, victim: Victim, rows: Tensor) -> None:
        super().__init__()
        self.marker = nn.Parameter(torch.zeros((), device=rows.device), requires_grad=False)
        self.victim, self.rows = victim, rows

    def forward(self, images: Tensor) -> Tensor:
        repeats = len(images) // len(self.rows)
        return self.victim.logits(images, self.rows.repeat(max(1, repeats))[: len(images)])


def foreign(
    victim: Victim,
    wave: Wave,
    *,
    name: str,
    epsilon: float,
    norm: str,
    step: float,
    steps: int | None,
    seed: int,
    restarts: int,
) -> None:
    """Run the attack `name` of ATTACKS on a wave. Raises UserError for an unknown class or values that it refuses."""
    kind = ATTACKS[name]
    takes = inspect.signature(kind).parameters
    if norm != "linf" and "eps" in takes and "norm" not in takes and not name.endswith(L2_ENDING):
        raise UserError(f"attack {name}: no {norm} form, its radius is of linf; give norm: linf, or take pgd.")
    offered = {"eps": epsilon, "alpha": step, "steps": steps, "norm": norm.capitalize()}
    offered |= {"n_classes": victim.num_classes, "n_queries": steps}
    for restart in range(restarts):
        drawn = restart_seed(seed, restart)
        given = {**offered, "seed": drawn % 2**31}
        options = {key: value for key, value in given.items() if key in takes and value is not None}
        images = _attacked(victim, wave, kind, options, name, drawn)
        allowed = epsilon + rounding(wave.clean, epsilon, norm)
        inside = (size(images - wave.clean, norm) <= allowed) & images.flatten(1).isfinite().all(1)
        images = torch.where(column(inside), images, wave.clean).clamp(0, 1)
        with torch.no_grad():
            wave.finish(images, victim.logits(images, wave.rows))


def _attacked(victim: Victim, wave: Wave, kind: Any, options: dict[str, Any], name: str, seed: int) -> Tensor:
    model = _Model(victim, wave.rows).eval()
    # Some attacks reset the global seed, and the seed of every CUDA device.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            return kind(model, **options)(wave.clean, wave.labels).detach().float()
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"attack {name}: it cannot run here ({reason}).") from error


def attack_class(name: str) -> Any:
    """Return a class of torchattacks by name."""
    try:
        import torchattacks
    except ImportError as error:
        raise UserError(
            f"attacks named {PREFIX}NAME need torchattacks: pip install --no-deps torchattacks (without its pin of an old "
            "requests, which it never imports); the other attacks need nothing."
        ) from error
    names = [key for key, value in vars(torchattacks).items() if inspect.isclass(value)]
    require_known(f"attack {PREFIX}{name}: torchattacks has no", [name], names)
    return getattr(torchattacks, name)


ATTACKS: Registry[Any] = Registry("attack: no attack")
ATTACKS.family(PREFIX.removesuffix(":"), attack_class)
