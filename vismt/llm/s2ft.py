"""S2FT: a few coupled units (heads, FFN channels) of each block are trained in place, everything else is frozen.

    W = [W_J  W_rest],   only W_J moves:  DeltaW is zero outside J; J = columns of o and down (o, d), rows of v and up (v, u)

Yang et al., NeurIPS 2024, arXiv 2412.06289. No parameter is added and no rank is limited. Units: selection.py; what they are
and their legal orders: lowrank/coupled.py and coupling.py; the layer: lowrank/sliced.py, the gradients: lowrank/partial.py.

Where paper and release differ we follow the paper: units of each block (the code draws over all layers at once:
budget='global'), the slice itself is trained (the package adds a difference to it), the trained axis is the unit's (the code
that was timed slices the other one), and files are in the base's order (the release exports the permuted weights, which
differ from the base everywhere). Published: o and d alone; Llama-2-7B global ratios o 0.052, d 0.02, Llama-3-8B d 0.03; AdamW
betas (0.9, 0.95), no decay, clip 1, lr 2e-4 to 1e-3. v and u cost more memory: their whole input has to be kept.
Left out: the residual axis as a unit (the paper's figure has it, its code has not).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from vismt.errors import UserError, require_known
from vismt.llm.selection import Selection, select_units
from vismt.lowrank.inject import also_trained, install, refuse_adapted
from vismt.lowrank.layer_spec import AdaptReport, Site
from vismt.lowrank.memory import count_parameters
from vismt.lowrank.options import checked
from vismt.lowrank.slice_linear import MODES, SlicedLinear
from vismt.lowrank.structures import Structure, structures
from vismt.lowrank.targets import Targets, find_targets, kind_of, matrix_shape
from vismt.lowrank.wrappers import to_own
from vismt.registry import register_method, register_optimizer

DEFAULTS = {"strategy": "random", "ratio": 0.02, "budget": "per_layer", "parts": None, "largest": False, "exclude": ()}


@register_method("s2ft")
def s2ft(
    model: nn.Module,
    *,
    targets: Targets,
    rank: int,
    alpha: float | None,
    seed: int,
    selection: Selection | None = None,
    mode: str = "permute",
    strategy: str = "random",
    ratio: float | Mapping[str, float] = 0.02,
    budget: str = "per_layer",
    parts: Sequence[str] | None = None,
    largest: bool = False,
    calibration: Iterable[Any] | None = None,
    exclude: str | Selection | Sequence[str | Selection] = (),
    also_train: Sequence[str] = (),
    dtype: torch.dtype | str | None = None,
) -> AdaptReport:
    """Train the units of `selection`, or of `select_units` with the other settings and adapt's seed.

    mode: 'permute' lays the units together and trains a part of the weight's own storage; 'index' leaves the order alone and
    writes the trained values into the weight at each forward; 'delta' trains the difference beside it, for FSDP.
    also_train: as for 'lora'. dtype: of the trained values; None means fp32 for half-precision weights, else the weight's.
    rank is not read, S2FT has none; targets and alpha are refused.
    """
    for name, value in (("targets", targets), ("alpha", alpha)):
        if value is not None:
            raise UserError(
                f"adapt.{name}: {value!r} with 's2ft', which takes units: set parts and ratio, leave {name} out."
            )
    require_known("adapt.mode: no", [mode], MODES)
    options = checked({"targets": None, "rank": 1, "alpha": None, "also_train": also_train, "dtype": dtype})
    refuse_adapted(model)
    settings = {
        "strategy": strategy,
        "ratio": ratio,
        "budget": budget,
        "parts": parts,
        "largest": largest,
        "exclude": exclude,
    }
    if selection is None:
        selection = select_units(model, seed=seed, calibration=calibration, **settings)
    else:
        extra = [name for name, value in settings.items() if value != DEFAULTS[name]]
        if extra or calibration is not None:
            raise UserError(f"adapt: both selection and {(extra or ['calibration'])[0]}; a selection is made already.")
    found = structures(model)
    features = _features(model, found, selection)
    _same_everywhere(selection)
    sites = [_site(path, model.get_submodule(path), dim, index, mode) for path, (dim, index) in features.items()]
    kept = also_trained(model, options["also_train"], list(features))
    total = count_parameters(model)[1]
    hosts = install(model, "s2ft", sites, {}, kept, dtype=options["dtype"])
    for host, (_, index) in zip(hosts, features.values()):
        host.choose(index)
    to_own(model)
    trainable, with_slices = count_parameters(model)
    # What shares the weight's storage, or is written into it, is no parameter more.
    return AdaptReport(
        "s2ft", sites, trainable, with_slices if mode == "delta" else total, beside=_told(found, selection)
    )


def check_slices(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """UserError unless every trained slice is what its weight follows and, given an optimiser, is among its parameters.

    The training loop asks when it builds its optimiser; your own loop should, after moving tensors by hand. What moves them
    through the model's own methods (deepcopy, to, load_state_dict, pickle) keeps the two together, and a forward that finds
    them apart adds the difference itself.
    """
    held = None if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
    for path, host in model.named_modules():
        if not isinstance(host, SlicedLinear):
            continue
        if not host.settled:
            raise UserError(
                f"s2ft: the slice of '{path}' is not in its weight: a save or merge was cut short; adapt anew."
            )
        if host.mode != "delta" and not host.holds():
            raise UserError(
                f"s2ft: the slice of '{path}' no longer follows its weight; model.to(its device) puts it back."
            )
        if held is not None and host.slice_values.requires_grad and id(host.slice_values) not in held:
            raise UserError(
                f"s2ft: the optimiser does not hold the slice of '{path}'; build it from this model's parameters."
            )


@register_optimizer("s2ft")
def checked_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser as it is, once every slice is found in its place and among its parameters."""
    check_slices(model, optimizer)
    return optimizer


def _features(
    model: nn.Module, found: Mapping[str, Structure], selection: Selection
) -> dict[str, tuple[int, torch.Tensor]]:
    """{module: (dim, features (k,) in stock order)} in model order; UserError for a selection that does not fit."""
    require_known("s2ft.selection: the model has no heads or channels", selection.units, found)
    chosen: dict[str, tuple[int, torch.Tensor]] = {}
    for path, parts in selection.units.items():
        if "v" in parts and found[path].without_v:
            raise UserError(f"s2ft.selection: '{path}' has no part 'v': {found[path].without_v}.")
        require_known(f"s2ft.selection: '{path}' has no part", parts, found[path].parts)
        for part, units in parts.items():
            block = found[path].parts[part]
            if not units or len(set(units)) < len(units) or not all(0 <= unit < block.units for unit in units):
                told = f"{len(units)} units of '{part}' in '{path}'"
                raise UserError(f"s2ft.selection: {told}; give each once, from 0 to {block.units - 1}.")
            chosen[block.path] = (block.dim, block.features(sorted(units)))
    find_targets(model, list(chosen))
    return {path: chosen[path] for path, _ in model.named_modules() if path in chosen}


def _site(path: str, module: nn.Module, dim: int, index: torch.Tensor, mode: str) -> Site:
    shape = matrix_shape(module)
    return Site(path, str(kind_of(module)), shape, len(index), 1.0, (shape[0],), dim=dim, mode=mode)


def _same_everywhere(selection: Selection) -> None:
    """Several processes must have chosen alike."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, selection.digest())
    if len(set(digests)) > 1:
        raise UserError("s2ft: the processes chose different units; give all the same seed, model and calibration.")


def _told(found: Mapping[str, Structure], selection: Selection) -> list[str]:
    """A line for each part: how many units of how many."""
    lines = []
    for part, name in (("v", "heads"), ("o", "heads"), ("u", "channels"), ("d", "channels")):
        total = sum(one.parts[part].units for one in found.values() if part in one.parts)
        if selection.count(part):
            lines.append(f"{part}: {selection.count(part):,} of {total:,} {name}")
    return lines
