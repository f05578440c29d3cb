"""CorDA: PiSSA in the coordinates of the layer's inputs; the first or last components of W C' are trained (arXiv 2406.05223).

    W C' = U S V^T      s B0 A0 = U_J U_J^T W      y = W x + s (B A - B0 A0) x       C' = C + d mean(diag C) I
    ipm   J the first r: adapt the components that matter for the task of the covariance C (instruction-previewed)
    kpm   J the last r: leave those components unchanged (knowledge-preserved)
    cut   J the last r, left out: B = 0, y = (W - U_J U_J^T W) x at the start, the paper's truncation experiment

Yang et al., NeurIPS 2024. The product is that of the paper and of the released code (vismt.llm.corda.start shows why no
inverse is needed). As with 'pissa', W stays whole and the start is subtracted, biases stay frozen (the released code
trains them), a file carries A0 and B0, and dropout is refused. Paper and released code differ in the default mode (the
release: kpm, here: ipm).

The published factors are not balanced: with kpm |A| / |B| reaches hundreds and depends on the scale of C, and an optimiser
step changes B A that much more. `balanced` takes the same product with |A| = |B|, and is the default for kpm; raw factors
are the default for ipm and one switch away for kpm.

`orientation` chooses the matrix beside W, for the comparison of the truncation: covariance is C'; activations is diag(C)^(1/4),
ASVD's scales (Yuan et al., arXiv 2312.05821, alpha 1/2) with the root mean square of an input in place of its mean absolute
value; none is the identity, the plain SVD.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from vismt.base import console
from vismt.base.errors import UserError, near, require_known
from vismt.base.identity import Identity
from vismt.llm.corda.covariance import collect_covariance
from vismt.llm.corda.files import load_covariances
from vismt.llm.corda.start import corda_factors
from vismt.llm.pissa.method import SOLVERS, refuse_dropout
from vismt.lowrank.layers.base import adapter_layers
from vismt.lowrank.layers.low_rank import LowRankLayer
from vismt.lowrank.layers.stock_modules import matrix_shape
from vismt.lowrank.model.inject import check_options, inject
from vismt.lowrank.model.record import AdaptReport
from vismt.lowrank.model.targets import Targets, find_targets
from vismt.methods import Calibration, Method, register_method
from vismt.storage.locks import is_locked, locked

MODES = ("ipm", "kpm", "cut")
ORIENTATIONS = ("covariance", "activations", "none")


def corda(
    model: nn.Module,
    *,
    targets: Targets,
    seed: int,
    mode: str = "ipm",
    orientation: str = "covariance",
    covariances: Mapping[str, Tensor] | str | Path | None = None,
    balanced: bool | None = None,
    solver: str | None = None,
    **options: Any,
) -> AdaptReport:
    """Add factors from the SVD of each weight times the covariance of its inputs, as `collect_covariance` returns it.

    mode: ipm, kpm or cut. orientation: covariance, activations or none.
    covariances: (i, i) by module path, of the targets and possibly other modules; or a folder of them.
    balanced: None means for all but ipm. solver: exact or randomized (ipm only); None means randomized for ipm, else exact.
    Further options: those of `inject`. Raises UserError for a covariance that is missing, misshapen or not finite.
    """
    refuse_dropout("corda", options)
    require_known("adapt.mode: 'corda' has no mode", [mode], MODES)
    require_known("adapt.orientation: 'corda' has no orientation", [orientation], ORIENTATIONS)
    solver = solver or ("randomized" if mode == "ipm" else "exact")
    require_known("adapt.solver: 'corda' has no solver", [solver], SOLVERS)
    if mode != "ipm" and solver == "randomized":
        raise UserError(
            f"adapt.solver: 'randomized' finds the largest components, {mode} needs the smallest; use 'exact'."
        )
    settings = check_options({**options, "targets": targets})
    modules, _ = find_targets(model, settings["targets"], settings["exclude"], prequantized=True)
    by_path: Mapping[str, Any]
    if all(module.weight.is_meta for module in modules.values()):
        by_path = dict.fromkeys(modules)  # nothing is computed on the meta device
    else:
        loaded = load_covariances(covariances) if isinstance(covariances, str | Path) else covariances
        by_path = _checked(modules, loaded)
    even = mode != "ipm" if balanced is None else balanced
    dead: list[str] = []
    start = partial(_start, orientation=orientation, smallest=mode != "ipm", balanced=even, solver=solver, dead=dead)
    starts = {path: partial(start, path, by_path[path]) for path in modules}
    with threadpool_limits(1, user_api="blas"):  # scipy's; as with torch, one thread for each module is fastest
        report = inject(model, "corda", starts, offset=True, targets=targets, seed=seed, **options)
    if mode == "cut":
        for layer in adapter_layers(model).values():
            layer.lora_B.data.zero_()
    if dead:
        warnings.warn(
            f"corda: the {mode} components of '{min(dead)}' ({len(set(dead))} of {len(modules)} modules) vanish, so A and B "
            "start at zero and get no gradient; exclude it, or take the other mode.",
            stacklevel=3,
        )
    return report


def _start(
    path: str,
    covariance: Tensor | None,
    weight: Tensor,
    rank: int,
    scale: float,
    generator: torch.Generator,
    *,
    orientation: str,
    dead: list[str],
    **how: Any,
) -> tuple[Tensor, Tensor]:
    if covariance is None:
        raise UserError("fill_starts: 'corda' needs covariances, which are not kept; load the weights, then adapt.")
    if orientation == "none":
        covariance = torch.eye(len(covariance))
    elif orientation == "activations":
        covariance = covariance.diagonal().float().pow(0.25).diag()
    try:
        A, B = corda_factors(weight, covariance, rank, scale, generator=generator, **how)
    except UserError as error:
        raise UserError(f"adapt.covariances['{path}']: {error}") from error
    if float(A.norm() * B.norm()) * scale <= torch.finfo(A.dtype).eps * float(weight.float().norm()):
        dead.append(path)
    return A, B


def _checked(modules: Mapping[str, nn.Module], covariances: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    if not isinstance(covariances, Mapping):
        raise UserError(
            f"adapt.covariances: {type(covariances).__name__} for 'corda'; give what vismt.llm.collect_covariance returns, "
            "or the folder it wrote."
        )
    checked: set[int] = set()  # a tensor that layers share is read once
    for path, module in modules.items():
        value, width = covariances.get(path), matrix_shape(module)[1]
        if value is None:
            raise UserError(
                f"adapt.covariances: none for '{path}'.{near(path, covariances)} Collect it, or exclude the module."
            )
        if not isinstance(value, Tensor) or tuple(value.shape) != (width, width):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"adapt.covariances['{path}']: {shape}, needed ({width}, {width}), the module's input width twice."
            )
        if id(value) in checked:
            continue
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise UserError(
                f"adapt.covariances['{path}']: it is {value.dtype}, or has values that are infinite or NaN; collect it again."
            )
        if float((value - value.T).abs().max()) > 1e-3 * float(value.abs().max()):
            raise UserError(
                f"adapt.covariances['{path}']: it is not symmetric, so it is not a sum of x x^T; collect it again."
            )
        checked.add(id(value))
    return covariances


def calibrate(
    model: nn.Module, calibration: Calibration, *, targets: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the covariances of the inputs of the layers to adapt, unless some are given; once for equal layers and data."""
    if not needs(options):
        return {}
    excluded, budget, batches = options.get("exclude", ()), calibration.memory_budget, calibration.batches()
    key = str(Identity(targets, excluded, budget, list(batches)))[:16]
    if key not in calibration.results:
        folder = calibration.folder / key
        if is_locked(folder):
            console.stage("wait", "corda   another process collects the covariances")
        with locked(folder, wait_s=-1):  # of several processes in one run folder, the first one collects
            calibration.results[key] = collect_covariance(
                model,
                batches,
                targets,
                exclude=excluded,
                folder=folder,
                memory_budget=budget,
                save_every=min(64, max(1, len(batches) // 4)),
            )
    return {"covariances": calibration.results[key]}


def needs(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the need for data where no covariances are given."""
    if options.get("covariances") is not None:
        return {}
    reason = "'corda' needs covariances; name texts here, or a folder of them in adapt.options.covariances"
    return {"calibration": reason}


register_method(
    Method("corda", corda, layers=(LowRankLayer,), calibrate=calibrate, needs=needs, renamed={"method": "solver"})
)
