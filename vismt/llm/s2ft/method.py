"""S2FT: a few coupled units (heads, FFN channels) of each block are trained in place, everything else is frozen.

    W = [W_J  W_rest],   only W_J is trained:  DeltaW is zero outside J; J = columns of o and down (o, d), rows of v and up (v, u)

Yang et al., NeurIPS 2024, arXiv 2412.06289. No parameter is added and no rank is limited. Choice of units: selection.py;
their definition and legal orders: structures.py; the layer and its gradient: layer.py.

Where paper and release differ the paper is followed: units of each block (the code draws over all layers at once:
budget='global'), the slice itself is trained (the package adds a difference to it), the trained axis is the unit's (the code
that was timed slices the other one), and files are in the base's order (the release exports the permuted weights, which
differ from the base everywhere). Published: o and d alone; Llama-2-7B global ratios o 0.052, d 0.02, Llama-3-8B d 0.03; AdamW
betas (0.9, 0.95), no decay, clip 1, lr 2e-4 to 1e-3. v and u take more memory: their whole input has to be kept.
Left out: the residual axis as a unit (the paper's figure has it, its code has not).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from vismt.base.errors import UserError, require_known, shown_value
from vismt.llm.s2ft.layer import MODES, SliceLinear, SliceSettings
from vismt.llm.s2ft.scores import SCORES
from vismt.llm.s2ft.selection import UnitSelection, select_units
from vismt.llm.s2ft.structures import Structure, structures
from vismt.lowrank.layers.base import spec_of
from vismt.lowrank.layers.stock_modules import matrix_shape
from vismt.lowrank.model.inject import also_trained, check_options, install
from vismt.lowrank.model.modules import from_stock
from vismt.lowrank.model.record import AdaptReport, count_parameters, refuse_adapted
from vismt.lowrank.model.targets import Targets, find_targets
from vismt.methods import Calibration, Method, register_method


def s2ft(
    model: nn.Module,
    *,
    targets: Targets,
    rank: int,
    alpha: float | None,
    seed: int,
    selection: UnitSelection | None = None,
    mode: str = "permute",
    strategy: str = "random",
    ratio: float | Mapping[str, float] = 0.02,
    budget: str = "per_layer",
    parts: Sequence[str] | None = None,
    largest: bool = False,
    calibration: Iterable[Any] | None = None,
    exclude: str | UnitSelection | Sequence[str | UnitSelection] = (),
    also_train: Sequence[str] = (),
    dtype: torch.dtype | str | None = None,
) -> AdaptReport:
    """Train the units of `selection`, or of `select_units` with the other settings and adapt's seed.

    selection: the units, as `select_units` returns them; None for a choice by the settings.
    mode: 'permute' puts the units together and trains a part of the weight's storage; 'index' keeps the order and writes the
    trained values into the weight at each forward; 'delta' trains the difference in a separate tensor, for FSDP.
    also_train: as for 'lora'. dtype: of the trained values; None means fp32 for half-precision weights, else the weight's.
    targets, rank and alpha are not read.
    """
    require_known("adapt.mode: no", [mode], MODES)
    options = check_options({"targets": None, "rank": 1, "alpha": None, "also_train": also_train, "dtype": dtype})
    refuse_adapted(model)
    settings: dict[str, Any] = {"strategy": strategy, "ratio": ratio, "budget": budget, "parts": parts}
    settings |= {"largest": largest, "exclude": exclude, "calibration": calibration}
    if selection is None:
        selection = select_units(model, seed=seed, **settings)
    elif not isinstance(selection, UnitSelection):
        raise UserError(f"adapt.selection: {shown_value(selection)}; give what vismt.llm.select_units returns.")
    else:
        defaults = inspect.signature(s2ft).parameters
        extra = [name for name, value in settings.items() if value is not None and value != defaults[name].default]
        if extra:
            raise UserError(f"adapt: both selection and {extra[0]}; the selection already fixes these settings.")
    containers = structures(model)
    features = _features(model, containers, selection)
    specs = []
    for path, (dim, index) in features.items():
        module = model.get_submodule(path)
        slice_settings = SliceSettings(len(index), 1.0, (matrix_shape(module)[0],), dim, mode)
        specs.append(spec_of(path, module, SliceLinear, slice_settings))
    names = also_trained(model, options["also_train"], list(features))
    total = count_parameters(model)[1]
    layers = install(model, "s2ft", specs, {}, names, dtype=options["dtype"])
    for layer, (_, index) in zip(layers, features.values()):
        layer.choose(index)
    from_stock(model)
    trainable, with_slices = count_parameters(model)
    chosen = []
    for part, name in (("v", "heads"), ("o", "heads"), ("u", "channels"), ("d", "channels")):
        units = sum(structure.parts[part].units for structure in containers.values() if part in structure.parts)
        if selection.count(part):
            chosen.append(f"{part}: {selection.count(part):,} of {units:,} {name}")
    # Slices that share the weight's storage, or are written into it, are not additional parameters.
    return AdaptReport("s2ft", specs, trainable, with_slices if mode == "delta" else total, extras=chosen)


def check_slices(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Raise UserError unless every weight follows its trained slice and, given an optimiser, the slice is in it.

    The training loop checks this when it builds its optimiser; other loops should after moving tensors by hand. The methods
    of the model that move tensors (deepcopy, to, load_state_dict, pickle) keep weight and slice together, and a forward that
    finds them apart adds the difference.
    """
    optimized = None if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
    for path, layer in model.named_modules():
        if not isinstance(layer, SliceLinear):
            continue
        if not layer.applied:
            raise UserError(
                f"s2ft: the slice of '{path}' is not in its weight: a save or merge was cut short; adapt anew."
            )
        if layer.mode != "delta" and not layer.holds():
            raise UserError(
                f"s2ft: the slice of '{path}' no longer follows its weight; model.to(its device) puts it back."
            )
        if optimized is not None and layer.slice_values.requires_grad and id(layer.slice_values) not in optimized:
            raise UserError(
                f"s2ft: the optimiser does not hold the slice of '{path}'; build it from this model's parameters."
            )


def checked_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimiser itself, after `check_slices`."""
    check_slices(model, optimizer)
    return optimizer


def _features(
    model: nn.Module, containers: Mapping[str, Structure], selection: UnitSelection
) -> dict[str, tuple[int, torch.Tensor]]:
    """Return {module: (dim, features (k,) in stock order)} in model order."""
    require_known("s2ft.selection: the model has no heads or channels", selection.units, containers)
    chosen: dict[str, tuple[int, torch.Tensor]] = {}
    for path, parts in selection.units.items():
        if "v" in parts and containers[path].without_v:
            raise UserError(f"s2ft.selection: '{path}' has no part 'v': {containers[path].without_v}.")
        require_known(f"s2ft.selection: '{path}' has no part", parts, containers[path].parts)
        for part, units in parts.items():
            block = containers[path].parts[part]
            if not units or len(set(units)) < len(units) or not all(0 <= unit < block.units for unit in units):
                raise UserError(
                    f"s2ft.selection: {len(units)} units of '{part}' in '{path}'; give each once, from 0 to {block.units - 1}."
                )
            chosen[block.path] = (block.dim, block.features(sorted(units)))
    find_targets(model, list(chosen))
    if dist.is_available() and dist.is_initialized():
        digests: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(digests, selection.digest())
        if len(set(digests)) > 1:
            raise UserError("s2ft: the processes chose different units; give all the same seed, model and calibration.")
    return {path: chosen[path] for path, _ in model.named_modules() if path in chosen}


def calibrate(
    model: nn.Module, calibration: Calibration, *, targets: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the batches that score the units, on the model's device; with labels where gradients score them."""
    device = next(model.parameters()).device
    batches = calibration.batches(labels=options.get("strategy") == "gradient")
    moved = [
        batch.to(device)
        if isinstance(batch, torch.Tensor)  # images
        else {name: value.to(device) for name, value in batch.items()}
        for batch in batches
    ]
    return {"calibration": moved}


def needs(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the need for data where it scores the units."""
    strategy = options.get("strategy")
    if strategy not in SCORES or strategy == "weight":
        return {}
    return {
        "calibration": f"'s2ft' chooses by data with strategy '{strategy}'; name texts here, or take 'weight' or 'random'"
    }


register_method(
    Method(
        "s2ft",
        s2ft,
        layers=(SliceLinear,),
        optimizer=checked_optimizer,
        calibrate=calibrate,
        needs=needs,
        unread=dict.fromkeys(("targets", "rank", "alpha"), "takes units: set parts and ratio"),
    )
)
