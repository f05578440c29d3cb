"""Landing: an optimiser around another optimiser that holds the X and Y of PoLAR near orthonormal columns (arXiv 2506.03133).

Once a step, after unscaling and clipping, it replaces the gradients of X and Y by the landing field of
vismt/llm/polar/stiefel.py. Theta keeps its plain gradient. As in the released code, the pull is therefore not clipped. Tensor
hooks are not used. They run once a micro-batch, before unscaling and clipping, and would add up the pull.

constraint  landing    the field, as released: no retraction, Adam's scaling acts on tangent and pull together
            euclidean  plain gradient and pull (the released ablation)
            qr, polar, cayley   the field without its pull, and after the step back to the manifold from where it began
            decoupled  not released: the field without its pull, then Z -= attraction * Z (Z^T Z - I), apart from Adam's scaling
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import StateDict

from vismt.base.errors import UserError, require_known, shown_value
from vismt.llm.polar import stiefel
from vismt.lowrank.layers.base import adapter_layers
from vismt.lowrank.layers.low_rank import LowRankLayer
from vismt.lowrank.tensors import whole, write_whole

LANDING_FIELDS = {"landing": stiefel.landing_field, "euclidean": stiefel.penalty_field}
RETRACTIONS = {"qr": stiefel.qr_retraction, "polar": stiefel.polar_retraction, "cayley": stiefel.cayley_retraction}
CONSTRAINTS = (*LANDING_FIELDS, "decoupled", *RETRACTIONS)
STACK = 2**22  # numbers in one stack of factors (few launches, and a bound on what a step allocates)

Views = list[tuple[Tensor, ...]]


def _forwarded(name: str) -> property:
    return property(
        lambda self: getattr(self.optimizer, name), lambda self, value: setattr(self.optimizer, name, value)
    )


class Landing(torch.optim.Optimizer):
    """An optimiser around `optimizer` that holds the factors of PoLAR near the manifold, see the header.

    Args:
        optimizer: Any torch optimiser over (some of) the parameters of `model`. `Landing` shows its groups and state, so
            schedules, checkpoints and gradient scalers work as with it. Wrap before `accelerator.prepare`.
        model: Model with updates of method "polar". Factors without a gradient are not touched.
        attraction: Strength of the pull, >= 0, in the convention of the released code. For "decoupled" it is the share of the
            pull, at most 1.
        constraint: Name of the constraint, one of CONSTRAINTS.

    Raises:
        UserError: If the model has no such updates, or the optimiser holds none of their factors.
    """

    # a fused optimiser also needs unscaled gradients, because the pull has no scale
    _step_supports_amp_scaling = False

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
        self.layers = polar_layers(model)
        if self._optimized().isdisjoint(id(p) for layer in self.layers for p in (layer.lora_A, layer.lora_B)):
            raise UserError("landing: the optimiser holds no factor of this model; make it after vismt.adapt.")

    state, param_groups, defaults = (_forwarded(name) for name in ("state", "param_groups", "defaults"))

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # it is not set yet while unpickling
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, object]:
        # This leaves out the wrapper that a schedule puts around `step`.
        return {name: self.__dict__[name] for name in ("optimizer", "attraction", "constraint", "layers")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)

    def state_dict(self) -> StateDict:
        """Return the state of the wrapped optimiser. Landing has no state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, object]) -> None:
        self.optimizer.add_param_group(param_group)

    def step(self, closure: Callable[[], object] | None = None) -> Any:
        """Take one step of the wrapped optimiser on the field. The `.grad` of the factors then holds the field."""
        if closure is None:
            moved = self._turn()
            loss = self.optimizer.step()
            self._return(moved)
            return loss
        evaluate = closure
        began: list[Tensor] = []

        def turned() -> Any:
            loss = evaluate()
            points = self._turn()
            began.extend(points if not began else [])  # where the step began, however often the closure is called
            return loss

        loss = self.optimizer.step(turned)
        self._return(began)
        return loss

    @torch.no_grad()
    def _turn(self) -> list[Tensor]:
        """Replace the gradients of X and Y. Return where X and Y start, for what follows the step."""
        ends = self.constraint in LANDING_FIELDS  # nothing follows the step
        field, attraction = LANDING_FIELDS.get(self.constraint, stiefel.landing_field), self.attraction if ends else 0.0
        points = []
        with self._live(written=1) as rows:
            for views in _stacks(rows):
                z, grad = (torch.stack(tensors) for tensors in zip(*views))
                for (_, gradient), new in zip(views, field(z, grad, attraction)):
                    gradient.copy_(new)
                if not ends:
                    points.append(z)
        return points

    @torch.no_grad()
    def _return(self, began: Sequence[Tensor]) -> None:
        if not began:
            return
        with self._live(written=0) as rows:
            for views, before in zip(_stacks(rows), began):
                z = torch.stack([factor for factor, _ in views])
                if self.constraint == "decoupled":
                    back = z - self.attraction * stiefel.pull(z)
                else:
                    back = RETRACTIONS[self.constraint](before, z - before)
                for (factor, _), new in zip(views, back):
                    factor.copy_(new)

    @contextmanager
    def _live(self, written: int) -> Iterator[Views]:
        """Yield tall views (n, r) of each factor that this optimiser moves and of its gradient. One of the two is to be changed.

        For sharded tensors, the views are of gathered copies. The copy of number `written` is spread again when the block ends.
        """
        optimized = self._optimized()
        rows: Views = []
        changed = []
        for layer in self.layers:
            for tall, factor in ((right, layer.lora_A), (left, layer.lora_B)):
                if factor.grad is not None and id(factor) in optimized:
                    tensors = (factor.detach(), factor.grad)
                    gathered = [whole(tensor) for tensor in tensors]
                    rows += zip(*(tall(layer, tensor) for tensor in gathered))
                    changed.append((tensors[written], gathered[written]))
        yield rows
        for target, value in changed:
            write_whole(target, value)

    def _optimized(self) -> set[int]:
        return {id(parameter) for group in self.param_groups for parameter in group["params"]}

    @torch.no_grad()
    def metrics(self) -> dict[str, Tensor]:
        """Return two scalars: the average `infeasibility` ||Z^T Z - I||_F^2 of the factors, and `stable_rank` of the updates."""
        off, ranks = [], []
        for views in _stacks(update for layer in self.layers for update in updates(layer)):
            x, theta, y = (torch.stack(tensors) for tensors in zip(*views))
            off += [stiefel.infeasibility(x), stiefel.infeasibility(y)]
            ranks.append(stiefel.stable_rank(x, torch.diag_embed(theta) if theta.ndim == 2 else theta, y))
        return {"infeasibility": torch.cat(off).mean(), "stable_rank": torch.cat(ranks).mean()}


@torch.no_grad()
def orthonormalize_(model: nn.Module) -> nn.Module:
    """Put X and Y of every update exactly on the manifold. The rest goes into Theta, so the model computes the same.

    Call it at the end of a training. The moments of an optimiser are not changed.
    """
    for layer in polar_layers(model):
        factors = _factors(layer)
        gathered = [whole(factor) for factor in factors]
        for update in _blocks(layer, *gathered):
            for tensor, new in zip(update, stiefel.orthonormalize(*update)):
                tensor.copy_(new)
        for factor, value in zip(factors, gathered):
            write_whole(factor, value)
    return model


def polar_layers(model: nn.Module) -> list[LowRankLayer]:
    """Return the layers of a model with X, Theta and Y. Raise UserError if there are none."""
    layers = [
        layer
        for layer in adapter_layers(model).values()
        if isinstance(layer, LowRankLayer) and layer.lora_C is not None
    ]
    if not layers:
        raise UserError(f"landing: {type(model).__name__} has no update of PoLAR; adapt it with method 'polar' first.")
    return layers


def left(layer: LowRankLayer, tensor: Tensor) -> list[Tensor]:
    """Return the views (o_j, r) of lora_B or its gradient, one for each block."""
    return list(tensor.split(layer.blocks, 0))


def right(layer: LowRankLayer, tensor: Tensor) -> list[Tensor]:
    """Return the views (i, r) of lora_A or its gradient, one for each block."""
    return [rows.mT for rows in tensor.chunk(len(layer.blocks))]


def updates(layer: LowRankLayer) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Return the views X (o_j, r), Theta (r, r) or (r,), and Y (i, r), one triple for each block.

    Sharded tensors give gathered copies.
    """
    return _blocks(layer, *map(whole, _factors(layer)))


def _factors(layer: LowRankLayer) -> list[Tensor]:
    """Return lora_B, lora_C and lora_A without their graph."""
    return [factor.detach() for factor in (layer.lora_B, layer.lora_C, layer.lora_A) if factor is not None]


def _blocks(layer: LowRankLayer, x: Tensor, theta: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Return the views of `updates` of given lora_B, lora_C and lora_A."""
    return zip(left(layer, x), theta.chunk(len(layer.blocks)), right(layer, y))


def _stacks(rows: Iterable[tuple[Tensor, ...]]) -> Iterator[Views]:
    """Yield rows whose tensors have the same shapes, dtypes and devices together, at most about STACK numbers at a time."""
    alike: dict[tuple, Views] = {}
    for row in rows:
        alike.setdefault(tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in row), []).append(row)
    for same in alike.values():
        count = max(1, STACK // sum(tensor.numel() for tensor in same[0]))
        yield from (same[begin : begin + count] for begin in range(0, len(same), count))


def check_constraint(where: str, attraction: Any, constraint: Any) -> None:
    """Raise UserError for an attraction out of range and for an unknown constraint."""
    require_known(f"{where}.constraint:", [constraint], CONSTRAINTS)
    number = isinstance(attraction, Real) and not isinstance(attraction, bool) and math.isfinite(attraction)
    if not number or attraction < 0 or (constraint == "decoupled" and attraction > 1):
        raise UserError(
            f"{where}.attraction: {shown_value(attraction)}; it must be a number >= 0, for 'decoupled' at most 1."
        )
