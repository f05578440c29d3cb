"""LISA: layerwise uniform sampling. gamma of L layers train at a time, for K optimiser steps. Everything outside always trains.

    at steps jK .. jK + K - 1:  AdamW on theta_outside and on theta_l, l in S_j;   S_j = gamma of {0 .. L-1}, drawn uniformly
    Adam state = 2 (|E| + |H| + |F| + gamma |layer|)     E input embeddings, H head, F final norm; tied E = H counts once

Pan et al., NeurIPS 2024, arXiv 2403.17919. The name says importance, but nothing is estimated or reweighted. Layers are drawn
uniformly. Paper and released code differ. The paper's algorithm draws each layer independently with probability gamma / L. The
code draws exactly gamma layers, as is done here. The paper ran each interval as a separate job, and so lost every Adam state at
a switch ("reset_all"). The code drops no state, so its state grows to the size of full training ("keep"). The default "drop"
frees the state of the layers that leave. The code switches only at multiples of K, and draws from NumPy's global stream. A
resumed run then trains all layers, and ranks may draw different layers. Here the layers are a function of (seed, step // K).

A state that was dropped starts again. Adam's first step moves every weight by about the rate, so a small K needs a smaller
rate. Left out: a warm-up inside each interval, and any change of the rate (the global schedule sets it).
"""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from numbers import Integral

import numpy as np
import torch
from torch import Tensor, nn

from vismt.base.errors import UserError, need_whole, require_known, shown_value
from vismt.config.typed import JsonFile, build
from vismt.llm.lisa.shares import Layers, find_shares
from vismt.lowrank.model.inject import install, warn_of_rounding
from vismt.lowrank.model.record import AdaptReport, count_parameters, need_record, record_of, refuse_adapted
from vismt.lowrank.model.targets import Targets
from vismt.methods import Method, register_method

POLICIES = ("drop", "keep", "offload", "reset_all")


class LISA:
    """The schedule of one model and its optimiser. It sets requires_grad, and frees optimiser state that is not in use.

    A layer without a parameter to train, because of `exclude`, is not drawn. With DistributedDataParallel, wrap the model
    before this, with find_unused_parameters=True and without static_graph, because its buckets cover all layers. FSDP2
    (fully_shard) needs nothing else if the optimiser is made after sharding.

    Args:
        model: Any module with a stack of similar layers.
        optimizer: Optimiser that skips parameters without a gradient. None if it is made later and set as lisa.optimizer.
            Parameters that it lacks, because it was made while layers were frozen, are added at once to the group of the same
            parameters in other layers. A saved optimiser state can then be loaded.
        layers: Path of the stack, or the layers as modules or paths. None finds the stack of similar layers (model.layers,
            transformer.h, blocks, ...).
        active: Number gamma of layers that train, 0 to L.
        interval: Number K of optimiser steps.
        seed: Seed of the draws.
        state_policy: What happens to the state of layers that stop training: "drop" it, "keep" it, "offload" it to CPU memory,
            or "reset_all" (the state of all parameters).
        train_embeddings: Whether the input embeddings train. False also freezes a tied head. For a ViT the embeddings are
            patches, tokens and positions.
        cover: Whether to draw from a shuffled deck, so that ceil(L / gamma) intervals visit all layers.
        exclude: Parameters and modules that are never trained (full-path regex or suffix), for example "lm_head" for a large
            vocabulary.

    Raises:
        UserError: If the model has no such stack, or a value is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        layers: Layers = None,
        active: int = 2,
        interval: int = 20,
        seed: int = 0,
        state_policy: str = "drop",
        train_embeddings: bool = True,
        *,
        cover: bool = False,
        exclude: str | Sequence[str] = (),
    ) -> None:
        shares = find_shares(model, layers, train_embeddings, exclude)
        check_settings(len(shares.drawn), active, interval, seed, state_policy)
        self.state_policy = state_policy
        self.active, self.interval, self.seed, self.cover = active, interval, seed, cover
        named = dict(model.named_parameters())
        self._layers = {number: [named[name] for name in names] for number, names in shares.drawn.items()}
        self._always = [named[name] for name in shares.always]
        self._trained = {name: named[name] for name in shares.all()}
        warn_of_rounding("LISA", self._trained)
        self.optimizer = optimizer
        self._open: int | None = None  # the interval that on_step last saw
        for parameter in set(named.values()) - set(self._trained.values()):
            _freeze(parameter)
        for parameter in self._always:
            parameter.requires_grad_(True)
        self._show(self.layers_at(0))

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """Optimiser with the state to manage. Setting it adds the parameters that it lacks."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        self._optimizer = optimizer
        if optimizer is not None:
            _add_parameters(optimizer, self._trained)

    @property
    def active_layers(self) -> list[int]:
        """Numbers of the layers that train now, ascending."""
        return list(self._active)

    def layers_at(self, step: int) -> list[int]:
        """Return the layers of optimiser step 0, 1, ...

        They are a function of (seed, step // interval), the same on every rank.
        """
        numbers, count, turn = list(self._layers), len(self._layers), step // self.interval
        if not self.cover or not self.active:
            drawn = np.random.default_rng([self.seed, turn]).choice(count, self.active, replace=False)
        else:
            hands = -(-count // self.active)
            deck = np.random.default_rng([self.seed, turn // hands]).permutation(count)
            # The last hand is filled from the top of the same deck, so that it holds no layer twice.
            drawn = deck[(turn % hands * self.active + np.arange(self.active)) % count]
        return sorted(numbers[layer] for layer in drawn)

    def on_step(self, step: int) -> None:
        """Prepare optimiser step number `step`, counted from 0. Call it before the first forward pass of that step.

        Between switches it does nothing, so all micro-batches of one step may call it. The first call may be at any step. A
        resumed run loads its optimiser state and calls on_step with the number of finished steps.
        """
        if not isinstance(step, Integral) or step < 0:
            raise UserError(f"LISA.on_step: {shown_value(step)}; it takes the number of finished optimiser steps.")
        if self.optimizer is None:
            raise UserError("LISA.on_step: the optimiser is missing; set lisa.optimizer first.")
        if self.state_policy == "reset_all" and step % self.interval == 0:
            self.optimizer.state.clear()
        if step // self.interval == self._open:
            return
        self._open = step // self.interval
        self._show(self.layers_at(step))
        _add_parameters(self.optimizer, self._trained)  # the optimiser may be new since the last switch
        # The state of layers that left is freed or moved. A loaded checkpoint may also have brought such a state.
        state = self.optimizer.state
        for parameter in {parameter for layer in self._layers.values() for parameter in layer} & set(state):
            frozen = parameter not in self._awake
            if frozen and self.state_policy in ("drop", "reset_all"):
                del state[parameter]
            elif self.state_policy == "offload":
                where = torch.device("cpu") if frozen else parameter.device
                for name, value in state[parameter].items():
                    # step counters are already where the optimiser wants them
                    if isinstance(value, Tensor) and value.ndim:
                        state[parameter][name] = value.to(where)

    def state_dict(self) -> dict[str, object]:
        """Return what the schedule depends on, for a checkpoint. The state dict of the optimiser holds the rest."""
        names = ("seed", "interval", "active", "cover", "state_policy")
        return {"layers": len(self._layers), **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Raise UserError if a checkpoint belongs to another schedule."""
        for name, value in self.state_dict().items():
            if state.get(name) != value:
                raise UserError(
                    f"LISA: the checkpoint's {name} is {shown_value(state.get(name))}, this schedule's {shown_value(value)}; use "
                    "the same."
                )

    def _show(self, active: list[int]) -> None:
        self._active = active
        self._awake = {parameter for layer in active for parameter in self._layers[layer]}
        for layer in self._layers.values():
            for parameter in layer:
                if parameter in self._awake:
                    parameter.requires_grad_(True)
                else:
                    _freeze(parameter)


@dataclass(frozen=True)
class LisaOptions:
    """Arguments of `LISA` that an adapted model records and an adapter file holds."""

    layers: list[str]
    active: int
    interval: int
    seed: int
    state_policy: str
    train_embeddings: bool
    cover: bool
    exclude: str | list[str]


def _schedule(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int = 0, settings: object = None) -> LISA:
    """Return the schedule that an adapted model carries, on its optimiser. Raise UserError for invalid settings in a file."""
    saved = build(
        LisaOptions, need_record(model, "LISA").options, JsonFile("LISA: the settings of the adapter cannot be read")
    )
    return LISA(model, optimizer, **vars(saved))


def lisa(
    model: nn.Module,
    *,
    targets: Targets,
    rank: int,
    alpha: float | None,
    seed: int,
    layers: Layers = None,
    active: int = 2,
    interval: int = 20,
    state_policy: str = "drop",
    train_embeddings: bool = True,
    cover: bool = False,
    exclude: str | Sequence[str] = (),
) -> AdaptReport:
    """Train layers in turn, and embeddings, head and norm always. The method adds no factors.

    The options are the arguments of `LISA`. Everything that may train is marked trainable. A training loop gives the schedule
    its optimiser (the engine's loop does). The original weights are kept, large ones in a temporary file, for unadapt and for
    saving only what changed.
    """
    refuse_adapted(model)
    shares = find_shares(model, layers, train_embeddings, exclude)
    count = len(shares.drawn)
    check_settings(count, active, interval, seed, state_policy)
    excluded = exclude if isinstance(exclude, str) else list(exclude)
    settings = LisaOptions(list(shares.layers), active, interval, seed, state_policy, train_embeddings, cover, excluded)
    install(model, "lisa", [], asdict(settings), shares.all())
    firsts = [names[0] for names in shares.drawn.values()]
    if firsts:
        model.get_parameter(firsts[0]).register_hook(partial(_warn_unscheduled, weakref.ref(model), firsts, active))
    trainable, total = count_parameters(model)
    outside = sum(model.get_parameter(name).numel() for name in shares.always)
    note = f"{active} of {count} layers at a time, {(trainable - outside) // max(count, 1):,} parameters each"
    return AdaptReport("lisa", [], trainable, total, extras=[f"{note}; outside them, always: {outside:,}"])


def _warn_unscheduled(model: weakref.ref[nn.Module], firsts: Sequence[str], active: int, grad: Tensor) -> None:
    """Warn in a backward pass of an adapted model if more layers train than a schedule leaves trainable."""
    adapted = model()
    record = None if adapted is None else record_of(adapted)
    if adapted is None or record is None or record.method != "lisa":
        return
    awake = sum(adapted.get_parameter(name).requires_grad for name in firsts)
    if awake > active:
        warnings.warn(
            f"LISA: {awake} of {len(firsts)} layers train at once, and {active} should, because no schedule has drawn them. Give "
            "your trainer vismt's VismtCallback, or call on_step of vismt.llm.LISA(model, optimizer, ...) before each step.",
            stacklevel=2,
        )


def check_settings(count: int, active: int, interval: int, seed: int, state_policy: str) -> None:
    """Raise UserError for values out of range."""
    need_whole(f"LISA.active (of {count} layers that have parameters to train):", active, 0, count)
    need_whole("LISA.interval:", interval)
    need_whole("LISA.seed:", seed, 0)
    require_known("LISA.state_policy:", [state_policy], POLICIES)


def _freeze(parameter: Tensor) -> None:
    """Freeze a parameter and drop its gradient. The optimiser would still step with that gradient, and decay the weight."""
    parameter.requires_grad_(False)
    parameter.grad = None


def _add_parameters(optimizer: torch.optim.Optimizer, trained: Mapping[str, Tensor]) -> None:
    """Add parameters that the optimiser lacks to the group of the same name in another layer.

    Without such a group, they join the group of matrices or the group of other parameters.
    """
    home = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    groups = {_kind(name): home[parameter] for name, parameter in trained.items() if parameter in home}
    ranks = {parameter.ndim > 1: group for parameter, group in home.items()}
    for name, parameter in trained.items():
        if parameter not in home:
            group = groups.get(_kind(name)) or ranks.get(parameter.ndim > 1, optimizer.param_groups[0])
            group["params"].append(parameter)


def _kind(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)


_WHOLE = dict.fromkeys(("targets", "rank", "alpha"), "trains whole layers: set layers, active and exclude")
register_method(Method("lisa", lisa, layers=(), schedule=_schedule, freezes=True, exports=False, unread=_WHOLE))
