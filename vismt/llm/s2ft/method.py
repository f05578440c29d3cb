"""S2FT: a change of a few coupled units (heads, FFN channels) of each block is trained. Everything else is frozen.

    W = [W_J + P  W_rest],  only P is trained:  J = columns of o and down (o, d), rows of v and up (v, u)

Yang et al., NeurIPS 2024, arXiv 2412.06289. The rank is not limited. selection.py chooses the units, structures.py defines
them, and layer.py has the layer and its gradient.

Where paper and release differ, the paper is followed. Units are chosen in each block (the code draws over all layers at once).
The trained axis is the axis of the unit (the code that was timed slices the other axis). Files are in the base's order (the
release exports permuted weights, which differ from the base everywhere). The paper trains the slice itself, in weights that it
permutes so that the slice is one range. Here a change beside the weight has the same gradient, and no weight is written.
Published settings: o and d alone; Llama-2-7B global ratios o 0.052, d 0.02; Llama-3-8B d 0.03; AdamW betas (0.9, 0.95), no
decay, clip 1, lr 2e-4 to 1e-3. v and u take more memory, because their whole input has to be kept. Left out: the residual axis
as a unit (the paper's figure has it, its code does not).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import nn

from vismt.base.errors import UserError, require_known, shown_value
from vismt.llm.s2ft.layer import SliceLinear, SliceSettings
from vismt.llm.s2ft.selection import UnitSelection, select_units
from vismt.llm.s2ft.structures import Structure, structures
from vismt.lowrank.layers.base import spec_of
from vismt.lowrank.model.inject import also_trained, check_options, install
from vismt.lowrank.model.record import AdaptReport, count_parameters, refuse_adapted
from vismt.lowrank.model.targets import Targets, find_targets
from vismt.methods import Method, register_method


def s2ft(
    model: nn.Module,
    *,
    targets: Targets,
    rank: int,
    alpha: float | None,
    seed: int,
    selection: UnitSelection | None = None,
    ratio: float | Mapping[str, float] = 0.02,
    parts: Sequence[str] | None = None,
    exclude: str | UnitSelection | Sequence[str | UnitSelection] = (),
    also_train: Sequence[str] = (),
    dtype: torch.dtype | str | None = None,
) -> AdaptReport:
    """Train the units of `selection`, or of `select_units` with the other settings and the seed of `adapt`.

    targets, rank and alpha are not read.

    selection: Units, as `select_units` returns them. None chooses units by ratio, parts and exclude. also_train: Parameters
    trained whole, as for "lora". dtype: Dtype of the trained values. None means fp32 for half-precision weights, and the
    weight's dtype otherwise.
    """
    options = check_options({"targets": None, "rank": 1, "alpha": None, "also_train": also_train, "dtype": dtype})
    refuse_adapted(model)
    if selection is None:
        selection = select_units(model, ratio, parts, seed, exclude=exclude)
    elif not isinstance(selection, UnitSelection):
        raise UserError(f"adapt.selection: {shown_value(selection)}; give what vismt.llm.select_units returns.")
    else:
        given = {"ratio": ratio != 0.02, "parts": parts is not None, "exclude": exclude != ()}
        for name in [name for name, is_given in given.items() if is_given]:
            raise UserError(f"adapt: both selection and {name}; the selection already fixes these settings.")
    containers = structures(model)
    features = _features(model, containers, selection)
    specs = []
    for path, (dim, index) in features.items():
        specs.append(spec_of(path, model.get_submodule(path), SliceLinear, SliceSettings(len(index), dim)))
    names = also_trained(model, options["also_train"], list(features))
    layers = install(model, "s2ft", specs, {}, names, dtype=options["dtype"])
    for layer, (_, index) in zip(layers, features.values()):
        cast(SliceLinear, layer).slice_index.copy_(index)
    chosen = []
    for part, name in (("v", "heads"), ("o", "heads"), ("u", "channels"), ("d", "channels")):
        units = sum(structure.parts[part].units for structure in containers.values() if part in structure.parts)
        if selection.count(part):
            chosen.append(f"{part}: {selection.count(part):,} of {units:,} {name}")
    return AdaptReport("s2ft", specs, *count_parameters(model), extras=chosen)


def check_slices(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Raise UserError unless the optimiser holds every slice that is trained. Without an optimiser nothing is checked."""
    if optimizer is None:
        return
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for path, layer in model.named_modules():
        if not isinstance(layer, SliceLinear):
            continue
        if layer.slice_values.requires_grad and id(layer.slice_values) not in optimized:
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
        digests: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(digests, selection.digest())
        if len(set(digests)) > 1:
            raise UserError("s2ft: the processes chose different units; give all the same seed, model and calibration.")
    return {path: chosen[path] for path, _ in model.named_modules() if path in chosen}


register_method(
    Method(
        "s2ft",
        s2ft,
        layers=(SliceLinear,),
        optimizer=checked_optimizer,
        unread=dict.fromkeys(("targets", "rank", "alpha"), "takes units: set parts and ratio"),
    )
)
