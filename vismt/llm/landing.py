"""Landing: an optimiser around another that holds the X and Y of PoLAR near orthonormal columns (arXiv 2506.03133).

Once a step, after unscaling and clipping, it puts the landing field of vismt/lowrank/stiefel.py in the place of the
gradients of X and Y; Theta keeps its plain one. As in the released code the pull is therefore not clipped. It is no hook of
a tensor: those run once a micro-batch, before unscaling and clipping, and would add up the pull.

constraint  landing    the field, as released: no retraction, Adam's scaling acts on tangent and pull together
            euclidean  plain gradient and pull (the released ablation)
            qr, polar, cayley   the field without its pull, and after the step back to the manifold from where it began
            decoupled  ours: the field without its pull, then Z -= attraction * Z (Z^T Z - I), apart from Adam's scaling
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from vismt.errors import UserError, near
from vismt.lowrank import stiefel
from vismt.lowrank.inject import adapted_modules
from vismt.lowrank.linear import Adapted

FIELDS = {"landing": stiefel.landing_field, "euclidean": stiefel.penalty_field}
RETRACTIONS = {"qr": stiefel.qr_retraction, "polar": stiefel.polar_retraction, "cayley": stiefel.cayley_retraction}
CONSTRAINTS = (*FIELDS, "decoupled", *RETRACTIONS)
STACK = 2**22  # numbers in one stack of factors: few launches, and a bound on what a step allocates

Views = list[tuple[Tensor, ...]]


def _forwarded(name: str) -> property:
    return property(
        lambda self: getattr(self.optimizer, name), lambda self, value: setattr(self.optimizer, name, value)
    )


class Landing(torch.optim.Optimizer):
    """An optimiser around `optimizer` that holds the factors of PoLAR near the manifold, see the header.

    Args:
        optimizer: any torch optimiser over (some of) the parameters of `model`; its groups and state are this one's, so
            schedules, checkpoints and gradient scalers see no difference. Wrap before `accelerator.prepare`.
        model: holds updates of method 'polar'. Factors without a gradient are left alone.
        attraction: >= 0, in the convention of the released code; for "decoupled" the share of the pull, at most 1.
        constraint: one of CONSTRAINTS.

    Raises UserError for a model without such updates and an optimiser that holds none of their factors.
    """

    _step_supports_amp_scaling = False  # also a fused optimiser has to get unscaled gradients: the pull has no scale

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        attraction: float = 5e-3,
        *,
        constraint: str = "landing",
    ) -> None:
        check_constraint("landing", attraction, constraint)
        if getattr(optimizer, "scaler", None) is not None:
            raise UserError(
                "landing: the optimiser is prepared and scales gradients; wrap it before accelerator.prepare."
            )
        self.optimizer, self.attraction, self.constraint = optimizer, float(attraction), constraint
        self.hosts = polar_hosts(model)
        if self._held().isdisjoint(id(p) for host in self.hosts for p in (host.lora_A, host.lora_B)):
            raise UserError("landing: the optimiser holds no factor of this model; make it after vismt.adapt.")

    state, param_groups, defaults = (_forwarded(name) for name in ("state", "param_groups", "defaults"))

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not set yet, while unpickling
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        # Without what a schedule has put around step.
        return {name: self.__dict__[name] for name in ("optimizer", "attraction", "constraint", "hosts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimiser's: landing keeps no state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the wrapped optimiser on the field; `.grad` of the factors then holds the field."""
        moved: list[tuple[Views, Tensor]] = []

        def turned() -> Any:
            loss = closure()
            points = self._turn()
            moved.extend(points if not moved else [])  # where the step began, however often the loss is asked for
            return loss

        if closure is None:
            moved = self._turn()
            loss = self.optimizer.step()
        else:
            loss = self.optimizer.step(turned)
        self._return(moved)
        return loss

    @torch.no_grad()
    def _turn(self) -> list[tuple[Views, Tensor]]:
        """Replace the gradients of X and Y. Returns views and where they start, for what follows the step."""
        ends = self.constraint in FIELDS  # nothing follows the step
        field, attraction = FIELDS.get(self.constraint, stiefel.landing_field), self.attraction if ends else 0.0
        points = []
        for views in stacks(self._live()):
            z, grad = (torch.stack(tensors) for tensors in zip(*views))
            for (_, own), new in zip(views, field(z, grad, attraction)):
                own.copy_(new)
            if not ends:
                points.append((views, z))
        return points

    @torch.no_grad()
    def _return(self, moved: Iterable[tuple[Views, Tensor]]) -> None:
        """What follows the step: a retraction, or the decoupled pull."""
        for views, before in moved:
            z = torch.stack([own for own, _ in views])
            if self.constraint == "decoupled":
                back = z - self.attraction * stiefel.pull(z)
            else:
                back = RETRACTIONS[self.constraint](before, z - before)
            for (own, _), new in zip(views, back):
                own.copy_(new)

    def _live(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Tall views (n, r) of each factor that this optimiser moves, and of its gradient."""
        held = self._held()
        for host in self.hosts:
            for tall, factor in ((right, host.lora_A), (left, host.lora_B)):
                if factor.grad is not None and id(factor) in held:
                    yield from zip(tall(host, factor.detach()), tall(host, factor.grad))

    def _held(self) -> set[int]:
        return {id(parameter) for group in self.param_groups for parameter in group["params"]}

    @torch.no_grad()
    def metrics(self) -> dict[str, Tensor]:
        """Two scalars: the average `infeasibility` ||Z^T Z - I||_F^2 of the factors, and `stable_rank` of the updates."""
        off, ranks = [], []
        for views in stacks(update for host in self.hosts for update in updates(host)):
            x, theta, y = (torch.stack(tensors) for tensors in zip(*views))
            off += [stiefel.infeasibility(x), stiefel.infeasibility(y)]
            ranks.append(stiefel.stable_rank(x, torch.diag_embed(theta) if theta.ndim == 2 else theta, y))
        return {"infeasibility": torch.cat(off).mean(), "stable_rank": torch.cat(ranks).mean()}

    def orthonormalize_(self) -> None:
        """`orthonormalize_` of the model. The optimiser's moments stay as they are: meant for the end of a training."""
        _orthonormalize(self.hosts)


def orthonormalize_(model: nn.Module) -> nn.Module:
    """Put X and Y of every update exactly on the manifold, and the rest into Theta: the model computes the same."""
    _orthonormalize(polar_hosts(model))
    return model


@torch.no_grad()
def _orthonormalize(hosts: Iterable[Adapted]) -> None:
    for host in hosts:
        for own in updates(host):
            for tensor, new in zip(own, stiefel.orthonormalize(*own)):
                tensor.copy_(new)


def polar_hosts(model: nn.Module) -> list[Adapted]:
    """The hosts of a model that carry X, Theta and Y; UserError where there are none."""
    hosts = [host for host in adapted_modules(model).values() if isinstance(host, Adapted) and host.lora_C is not None]
    if not hosts:
        raise UserError(f"landing: {type(model).__name__} has no update of PoLAR; adapt it with method 'polar' first.")
    return hosts


def left(host: Adapted, tensor: Tensor) -> list[Tensor]:
    """Views (o_j, r) of lora_B or its gradient, one a block."""
    return list(tensor.split(host.blocks, 0))


def right(host: Adapted, tensor: Tensor) -> list[Tensor]:
    """Views (i, r) of lora_A or its gradient, one a block."""
    return [rows.mT for rows in tensor.chunk(len(host.blocks))]


def updates(host: Adapted) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Views X (o_j, r), Theta (r, r) or (r,), Y (i, r), one triple a block."""
    cores = host.lora_C.detach().chunk(len(host.blocks))
    return zip(left(host, host.lora_B.detach()), cores, right(host, host.lora_A.detach()))


def stacks(rows: Iterable[tuple[Tensor, ...]]) -> Iterator[Views]:
    """Rows whose tensors have like shapes, dtypes and devices together, at most about STACK numbers at a time."""
    alike: dict[tuple, Views] = {}
    for row in rows:
        alike.setdefault(tuple((one.shape, one.dtype, one.device) for one in row), []).append(row)
    for same in alike.values():
        count = max(1, STACK // sum(one.numel() for one in same[0]))
        yield from (same[begin : begin + count] for begin in range(0, len(same), count))


def check_constraint(where: str, attraction: Any, constraint: Any) -> None:
    """UserError for an attraction or a constraint that does not exist."""
    if constraint not in CONSTRAINTS:
        raise UserError(f"{where}.constraint: '{constraint}'.{near(str(constraint), CONSTRAINTS)}")
    number = isinstance(attraction, Real) and not isinstance(attraction, bool) and math.isfinite(attraction)
    if not number or attraction < 0 or (constraint == "decoupled" and attraction > 1):
        raise UserError(f"{where}.attraction: {attraction!r}; it must be a number >= 0, for 'decoupled' at most 1.")
