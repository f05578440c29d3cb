"""Any attack of torchattacks by its class name (Kim, arXiv 2010.01950), as `torchattacks:NAME`.

It runs on the images that are still right. Budget, step and length are passed where the class takes them; what leaves the
budget, as the results of minimal-norm attacks may, is put back to the image.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vismt.errors import UserError, near
from vismt.robustness.active_set import Wave
from vismt.robustness.norms import column, size
from vismt.robustness.victim import Victim

PREFIX = "torchattacks:"
SLACK = 1e-6


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
    victim: Victim, wave: Wave, *, name: str, epsilon: float, norm: str, step: float, steps: int | None, seed: int
) -> None:
    """Run the class `name` of torchattacks on a wave. Raises UserError for an unknown class or values that it refuses."""
    kind = attack_class(name)
    takes = inspect.signature(kind.__init__).parameters
    offered = {"eps": epsilon, "alpha": step, "steps": steps, "norm": norm.capitalize(), "seed": seed % 2**31}
    offered |= {"n_classes": victim.num_classes, "n_queries": steps}
    options = {key: value for key, value in offered.items() if key in takes and value is not None}
    model = _Model(victim, wave.rows).eval()
    with _seeded(seed):
        try:
            images = kind(model, **options)(wave.clean, wave.labels).detach().float()
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"attack {PREFIX}{name}: torchattacks cannot run it here ({reason}).") from error
    inside = (size(images - wave.clean, norm) <= epsilon + SLACK) & images.flatten(1).isfinite().all(1)
    images = torch.where(column(inside), images, wave.clean).clamp(0, 1)
    with torch.no_grad():
        keep = wave.settle(images, victim.logits(images, wave.rows))
    wave.finish(images if keep is None else images[keep])


def attack_class(name: str) -> Any:
    """Return a class of torchattacks by name."""
    library = _torchattacks()
    names = [key for key, value in vars(library).items() if inspect.isclass(value)]
    if name not in names:
        raise UserError(f"attack {PREFIX}{name}: torchattacks has no '{name}'.{near(name, names)}")
    return getattr(library, name)


def _torchattacks() -> ModuleType:
    try:
        import torchattacks
    except ImportError as error:
        raise UserError(
            f'attacks named {PREFIX}NAME need torchattacks: pip install "vismt[attacks]"; the others need nothing.'
        ) from error
    return torchattacks


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Fork and seed the torch generators: some attacks reset the global seed, and that of every CUDA device."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
