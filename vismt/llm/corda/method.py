"""CorDA: PiSSA in the coordinates of the layer's inputs (arXiv 2406.05223). The first or last components of W C' are trained.

    W C' = U S V^T      s B0 A0 = U_J U_J^T W      y = W x + s (B A - B0 A0) x       C' = C + d mean(diag C) I
    ipm   J the first r: adapt the components that matter for the task of the covariance C (instruction-previewed)
    kpm   J the last r: leave those components unchanged (knowledge-preserved)
    cut   J the last r, left out: B = 0, y = (W - U_J U_J^T W) x at the start, the paper's truncation experiment

Yang et al., NeurIPS 2024, write s B A = U_J S_J (V^T C'^-1)_J. Since U_J^T W C' = S_J V_J^T, this equals U_J U_J^T W, and no
inverse is needed. The released code inverts C' in fp32 and doubles the damping until |C' C'^-1 - I| < 0.05, a test that depends
on rounding and never ends for a NaN. Both begin with d = 0.01. Here d is doubled as long as C' is not positive definite.

The last components are found exactly, from the eigenvectors of the smaller Gram matrix in fp64. On a CPU only the needed
eigenvectors are computed (LAPACK's syevr by scipy, a quarter of the time of all of them at n = 1376, r = 16).

As with "pissa", W stays whole and the start is subtracted, biases stay frozen (the released code trains them), a file carries
A0 and B0, and dropout is refused. Paper and released code differ in the default mode: kpm in the release, ipm here.

The published factors are not balanced. With kpm, |A| / |B| reaches hundreds and depends on the scale of C, and an optimiser
step changes B A by that much more. `balanced` takes the same product with |A| = |B|. It is the default for kpm. Raw factors are
the default for ipm, and can be switched on for kpm.

`orientation` chooses the matrix beside W, for the comparison of the truncation. covariance is C'. activations is diag(C)^(1/4),
ASVD's scales (Yuan et al., arXiv 2312.05821, alpha 1/2) with the root mean square of an input instead of its mean absolute
value. none is the identity, which gives the plain SVD.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vismt.base import console
from vismt.base.errors import UserError, near, require_known
from vismt.base.identity import Identity, weights_digest
from vismt.llm.corda.covariance import COVARIANCES_FILE, collect_covariance, load_covariances, save_covariances
from vismt.llm.pissa.method import SOLVERS, refuse_dropout
from vismt.lowrank.factors import LowRank
from vismt.lowrank.layers.base import adapter_layers
from vismt.lowrank.layers.low_rank import LowRankLayer
from vismt.lowrank.layers.stock_modules import matrix_shape
from vismt.lowrank.model.inject import InjectOptions, check_options, inject
from vismt.lowrank.model.record import AdaptReport
from vismt.lowrank.model.targets import Targets, find_targets
from vismt.lowrank.svd import double, reciprocal, top_exact, top_randomized, working_dtype
from vismt.methods import Calibration, Method, register_method
from vismt.storage.locks import is_locked, locked

if TYPE_CHECKING:
    from typing_extensions import Unpack

_MODES = ("ipm", "kpm", "cut")
ORIENTATIONS = ("covariance", "activations", "none")
DAMPING, DOUBLINGS = 0.01, 20


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
    **options: Unpack[InjectOptions],
) -> AdaptReport:
    """Add factors from the SVD of each weight times the covariance of its inputs, as `collect_covariance` returns it.

    mode: "ipm", "kpm" or "cut". orientation: "covariance", "activations" or "none". covariances: Covariances (i, i) by module
    path, for the targets and possibly other modules, or a folder with them. balanced: Whether |A| = |B|. None means yes, except
    for ipm. solver: "exact" or "randomized" (ipm only). None means randomized for ipm and exact otherwise.

    Further options are the options of `inject`. Raise UserError for a covariance that is missing, not finite or of a wrong
    shape.
    """
    from threadpoolctl import threadpool_limits

    refuse_dropout("corda", options)
    require_known("adapt.mode: 'corda' has no mode", [mode], _MODES)
    require_known("adapt.orientation: 'corda' has no orientation", [orientation], ORIENTATIONS)
    solver = solver or ("randomized" if mode == "ipm" else "exact")
    require_known("adapt.solver: 'corda' has no solver", [solver], SOLVERS)
    if mode != "ipm" and solver == "randomized":
        raise UserError(
            f"adapt.solver: 'randomized' finds the largest components, {mode} needs the smallest; use 'exact'."
        )
    settings = check_options({**options, "targets": targets})
    modules, _ = find_targets(model, settings["targets"], settings["exclude"], prequantized=True)
    by_path: Mapping[str, Tensor | None]
    if all(module.weight.is_meta for module in modules.values()):
        by_path = dict.fromkeys(modules)  # nothing is computed on the meta device
    else:
        loaded = load_covariances(covariances) if isinstance(covariances, str | Path) else covariances
        by_path = _checked(modules, loaded)
    even = mode != "ipm" if balanced is None else balanced
    dead: list[str] = []
    start = partial(_start, orientation=orientation, smallest=mode != "ipm", balanced=even, solver=solver, dead=dead)
    starts = {path: partial(start, path, by_path[path]) for path in modules}
    with threadpool_limits(1, user_api="blas"):  # for scipy (as with torch, one thread for each module is fastest)
        report = inject(model, "corda", starts, offset=True, targets=targets, seed=seed, **options)
    if mode == "cut":
        layer: Any
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


def corda_factors(
    weight: Tensor,
    covariance: Tensor,
    rank: int,
    scale: float,
    *,
    smallest: bool,
    balanced: bool,
    solver: str = "exact",
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return factors of the part of `weight` (o, i) that the first or last `rank` components of W C' span.

    C' is the damped covariance. covariance: Matrix (i, i), finite and symmetric. smallest: Whether to take the last components
    (knowledge-preserved) instead of the first. balanced: Whether to make |A| = |B| by the SVD of the product, for any scale of
    the covariance. Raw factors are the published A = sqrt(S/s) V^T C'^-1 and B = U sqrt(S/s). With them, c C gives B sqrt(c)
    and A / sqrt(c). solver: "exact", or "randomized" for the first components.

    Raise UserError if no damping makes C' positive definite.
    """
    matrix = weight.detach().to(working_dtype(weight))
    exact = solver == "exact"
    spread = damped(covariance.to(dtype=working_dtype(covariance)))
    if exact:
        matrix, spread = double(matrix), double(spread)
    product = matrix @ spread.to(matrix.device, matrix.dtype)
    if smallest:
        U, S = last_left(product, rank)
    else:
        U, S, _ = top_exact(product, rank) if exact else top_randomized(product, rank, generator)
    rows = U.T @ matrix
    if balanced:
        even = LowRank(U, rows).balanced()
        A, B = even.A / math.sqrt(scale), even.B / math.sqrt(scale)
    else:
        root = (S / scale).sqrt()
        # S_J V_J^T C'^-1 = U_J^T W, so sqrt(S/s) V^T C'^-1 = U^T W / sqrt(S s). A vanishing component has no direction.
        A = torch.where(S > 0, 1 / (S * scale).clamp_min(1e-300 if exact else 1e-30).sqrt(), 0)[:, None] * rows
        B = U * root
    return A.to(weight.device, working_dtype(weight)), B.to(weight.device, working_dtype(weight))


def damped(covariance: Tensor) -> Tensor:
    """Return C + d mean(diag C) I, (i, i), with the first d of 0.01, 0.02, 0.04, ... that makes it positive definite.

    A zero C gives the identity, because an input that was always zero prefers no direction. Raise UserError after 20 doublings,
    and at once if C has values that are not finite.
    """
    if not bool(covariance.isfinite().all()):
        raise UserError("covariance: it has values that are infinite or NaN; collect it again.")
    mean = float(covariance.diagonal().mean())
    if mean == 0 and not bool(covariance.any()):
        return torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    for doubling in range(DOUBLINGS + 1):
        spread = covariance.clone()
        spread.diagonal().add_(DAMPING * 2**doubling * mean)
        if int(torch.linalg.cholesky_ex(spread).info) == 0:
            return spread
    raise UserError("covariance: no damping makes it positive definite; it is not a sum of x x^T, collect it again.")


def last_left(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the left singular vectors U (o, r) of the `rank` smallest singular values, and these values (r,), in fp64.

    There are min(o, i) singular values, and both results descend. If o > i, a column with a vanishing singular value is zero,
    since nothing defines it.
    """
    matrix = double(matrix)
    wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if wide else matrix.T
    if matrix.device.type == "cpu":
        from scipy.linalg import LinAlgError, eigh
        from scipy.linalg.blas import dsyrk

        gram = dsyrk(1.0, short.numpy(), lower=1)  # one triangle, for half the work of a product
        try:
            ascending = eigh(gram, lower=True, subset_by_index=(0, rank - 1), driver="evr")[1]
        except LinAlgError as error:
            raise UserError(f"covariance: LAPACK finds no components of W C ({error}); collect it again.") from error
        vectors = torch.from_numpy(ascending).flip(1)
    else:
        vectors = torch.linalg.eigh(short @ short.T).eigenvectors[:, :rank].flip(1)
    if wide:
        return vectors, (vectors.T @ matrix).norm(dim=1)
    images = matrix @ vectors
    S = images.norm(dim=0)
    return images * reciprocal(torch.where(1e-14 * matrix.norm() < S, S, 0)), S


def _checked(modules: Mapping[str, nn.Module], covariances: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    if not isinstance(covariances, Mapping):
        raise UserError(
            f"adapt.covariances: {type(covariances).__name__} for 'corda'; give what vismt.llm.collect_covariance returns, "
            "or a folder that vismt.llm.save_covariances wrote."
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
    model: nn.Module, calibration: Calibration, *, targets: Targets, options: Mapping[str, Any]
) -> dict[str, object]:
    """Return the covariances of the inputs of the layers to adapt, unless some are given.

    They are collected once for equal layers and data.
    """
    if not _needs(options):
        return {}
    excluded, batches = options.get("exclude", ()), calibration.batches()
    key = str(Identity(weights_digest(model), targets, excluded, list(batches)))[:16]
    if key not in calibration.results:
        folder = calibration.folder / key
        if is_locked(folder):
            console.stage("wait", "corda   another process collects the covariances")
        with locked(folder, wait_s=-1):  # of several processes in one run folder, the first collects
            if not (folder / COVARIANCES_FILE).exists():
                save_covariances(collect_covariance(model, batches, targets, exclude=excluded), folder)
            calibration.results[key] = load_covariances(folder)
    return {"covariances": calibration.results[key]}


def _needs(options: Mapping[str, object]) -> dict[str, str]:
    """Return the need for data if no covariances are given."""
    if options.get("covariances") is not None:
        return {}
    reason = "'corda' needs covariances; name texts here, or a folder of them in adapt.options.covariances"
    return {"calibration": reason}


register_method(Method("corda", corda, layers=(LowRankLayer,), calibrate=calibrate, needs=_needs))
