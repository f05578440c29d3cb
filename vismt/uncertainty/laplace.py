"""Laplace approximation of a trained linear head: w ~ N(mean, (H + lambda I)^-1), with H the Gauss-Newton matrix of the NLL.

    H = sum_n Lambda_n (x) phi_n phi_n^T,   Lambda_n = diag(p_n) - p_n p_n^T,   over the WHOLE training set, p_n at the mean

"full"       H itself, (k d)^2 numbers. It is the exact Hessian, and the default, because a head on a few answer tokens is small
"rows"       the k blocks sum_n p_c (1 - p_c) phi phi^T of H, which replace VBLL's S_c in PoLAR-VBLL (arXiv 2604.03388). Without
             the coupling -p_c p_c' the classes share no information. For two classes, z_1 - z_2 gets twice the variance
"kronecker"  (sum_n Lambda_n) (x) (sum_n phi phi^T) / N, k^2 + d^2 numbers, for many classes (Laplace-LoRA, arXiv 2308.13111)

A head with noise, such as VBLL's eps_c ~ N(0, sigma_c^2), keeps the noise: z = w^T phi + eps at prediction. H is computed
without it.

H is stored as eigenvectors and eigenvalues, so that another prior precision lambda costs nothing and no jitter is needed. A
bias is the weight of one more feature, which is 1. Left out:

- a diagonal approximation. Features of a transformer are strongly correlated, and it would treat every direction as known.
- the marginal likelihood, because lambda is chosen on validation NLL.
- other layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from vismt.base.errors import UserError, require_known
from vismt.uncertainty.predictive import GaussianHead, full_precision

LARGEST = 4096  # largest k d of a full matrix, without biases: 128 MB in fp64, and half a minute of eigh


class Curvature(nn.Module, ABC):
    """Sum H over batches with `add`, decompose it with `finish`, then evaluate with `root`."""

    values0: Tensor
    vectors0: Tensor
    values1: Tensor
    vectors1: Tensor

    def __init__(self, *shapes: tuple[int, ...], **factory: Any) -> None:
        super().__init__()
        for number, shape in enumerate(shapes):
            self.register_buffer(f"sum{number}", torch.zeros(shape, **factory))
        self.examples = 0

    def add(self, x: Tensor, p: Tensor, weights: Tensor | None = None) -> None:
        """Add a batch. x: Features (b, d). p: Probabilities (b, k). weights: Weights (b,) of mean 1 in the NLL, None for 1."""
        self.examples += len(x)
        ones = torch.ones_like(p[:, 0])
        for number, value in enumerate(self.products(x, p, ones if weights is None else weights)):
            getattr(self, f"sum{number}").add_(value)

    def finish(self, dtype: torch.dtype) -> None:
        """Replace the sums by eigenvectors and eigenvalues in `dtype`, clipped at 0, because H is positive semidefinite."""
        for name, value in list(self._buffers.items()):
            values, vectors = torch.linalg.eigh(value)
            self.register_buffer(name.replace("sum", "values"), values.clamp_min(0).to(dtype))
            self.register_buffer(name.replace("sum", "vectors"), vectors.to(dtype))
            delattr(self, name)

    @abstractmethod
    def products(self, x: Tensor, p: Tensor, w: Tensor) -> list[Tensor]:
        """Return the terms that a batch with weights w adds to the sums."""

    @abstractmethod
    def root(self, x: Tensor, precision: float) -> Tensor:
        """Return R, with R R^T the covariance of the k logits of each x. (b, k, k), or (b, k) for independent logits."""


class FullCurvature(Curvature):
    """The whole matrix H, rows in the order (c, i)."""

    def __init__(self, classes: int, width: int, **factory: object) -> None:
        super().__init__((classes * width, classes * width), **factory)
        self.classes = classes

    def products(self, x: Tensor, p: Tensor, w: Tensor) -> list[Tensor]:
        weighted = einsum(_output_hessian(p, w), x, "b c e, b i -> b c e i")
        return [rearrange(einsum(weighted, x, "b c e i, b j -> c i e j"), "c i e j -> (c i) (e j)")]

    def root(self, x: Tensor, precision: float) -> Tensor:
        return _square_root(self.wide_root(x, precision))

    def wide_root(self, x: Tensor, precision: float) -> Tensor:
        """Return R (b, k, k d), with R R^T the covariance of the logits. R is linear in x, while `root` has no gradient."""
        vectors = rearrange(self.vectors0, "(k d) m -> k d m", k=self.classes)
        return einsum(x, vectors, "b d, k d m -> b k m") * (self.values0 + precision).rsqrt()


class RowCurvature(Curvature):
    """The diagonal blocks of H, one for each row of the head."""

    def __init__(self, classes: int, width: int, **factory: object) -> None:
        super().__init__((classes, width, width), **factory)

    def products(self, x: Tensor, p: Tensor, w: Tensor) -> list[Tensor]:
        return [einsum(einsum(w[:, None] * p * (1 - p), x, "b k, b i -> k b i"), x, "k b i, b j -> k i j")]

    def root(self, x: Tensor, precision: float) -> Tensor:
        wide = einsum(x, self.vectors0, "b d, k d m -> b k m").square()
        return einsum(wide, 1 / (self.values0 + precision), "b k m, k m -> b k").sqrt()


class KroneckerCurvature(Curvature):
    """Sums of phi phi^T (d, d) and of Lambda (k, k)."""

    def __init__(self, classes: int, width: int, **factory: object) -> None:
        super().__init__((width, width), (classes, classes), **factory)

    def products(self, x: Tensor, p: Tensor, w: Tensor) -> list[Tensor]:
        return [x.mT @ (w[:, None] * x), _output_hessian(p, w).sum(0)]

    def root(self, x: Tensor, precision: float) -> Tensor:
        values = self.values1[:, None] * self.values0 / max(1, self.examples) + precision
        std = ((x @ self.vectors0).square() @ (1 / values).mT).sqrt()
        return self.vectors1 * std.unsqueeze(1)


STRUCTURES: dict[str, type[Curvature]] = {"full": FullCurvature, "rows": RowCurvature, "kronecker": KroneckerCurvature}


class Laplace(GaussianHead):
    """The Gaussian head that `fit_laplace` returns. It has no trainable parameters.

    Args:
        mean: Trained weight (k, d).
        curvature: Decomposed Hessian.
        prior_precision: Precision lambda of the prior.
        noise: Variances (k,) of the logits in addition to the variance of the weights.
        affine: Whether the last column of mean is a bias.
    """

    noise: Tensor | None

    def __init__(
        self,
        mean: Tensor,
        curvature: Curvature,
        prior_precision: float,
        noise: Tensor | None = None,
        affine: bool = False,
    ) -> None:
        super().__init__()
        self.affine = affine
        self.register_buffer("mean", mean)
        self.register_buffer("noise", noise)
        self.curvature = curvature
        self.prior_precision = prior_precision

    def _features(self, features: Tensor) -> Tensor:
        if self.affine and features.ndim == 2:
            features = torch.cat([features, features.new_ones(len(features), 1)], 1)
        return super()._features(features)

    @full_precision
    def logit_distribution(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means (b, k) of the logits and R: (b, k, k) with covariance R R^T, or (b, k) independent std."""
        x = self._features(features)
        root = self.curvature.root(x, self.prior_precision)
        if self.noise is None:
            return x @ self.mean.mT, root
        if root.ndim == 2:
            return x @ self.mean.mT, (root.square() + self.noise).sqrt()
        noise_root = torch.diag(self.noise.sqrt()).expand(len(x), -1, -1)
        return x @ self.mean.mT, _square_root(torch.cat([root, noise_root], 2))

    def mean_and_root(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.logit_distribution(features)

    def tune(
        self, features: Tensor, labels: Tensor, grid: Sequence[float] = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
    ) -> dict[float, float]:
        """Set prior_precision to the value of `grid` with the smallest validation NLL.

        Args:
            features: Features (n, d), float.
            labels: Integers (n,) in [0, k).
            grid: Prior precisions > 0.

        Returns:
            NLL in nats by precision.

        Raises:
            UserError: If no example is given, labels do not fit, or the grid is empty.
        """
        if not len(features):
            raise UserError("laplace.tune: validation examples are missing; give features (n, d) and labels (n,).")
        # Checked on the CPU, where a label out of range raises an error instead of a device fault.
        classes = self._labels(labels.cpu(), len(features)).to(features.device)
        nll_by_precision = {}
        for precision in grid:
            self.prior_precision = _positive(precision)
            nll_by_precision[precision] = -float(self.log_probabilities(features).gather(1, classes).mean())
        if not nll_by_precision:
            raise UserError("laplace: the grid of prior precisions is empty.")
        self.prior_precision = min(nll_by_precision, key=nll_by_precision.__getitem__)
        return nll_by_precision


@torch.no_grad()
def fit_laplace(
    weight: Tensor,
    batches: Iterable[Tensor],
    prior_precision: float = 1.0,
    structure: str = "full",
    *,
    noise: Tensor | None = None,
    bias: Tensor | None = None,
) -> Laplace:
    """Fit a Laplace approximation around the weight of a trained head.

    Args:
        weight: Weight (k, d), float.
        batches: Features (b, d) of the whole training set. The Gauss-Newton matrix needs no labels.
        prior_precision: lambda > 0, 1 / variance of the prior of a weight: 1 / head.prior_variance after VBLL, or N w after
            weight decay w under a mean NLL.
        structure: "full", "rows" or "kronecker".
        noise: Variances (k,) that are added to the variances of the logits at prediction (torch.exp(2 * head.log_noise) after
            VBLL).
        bias: Bias (k,) of the head. None without a bias.

    Returns:
        A head with `predict`, `uncertainty` and `tune`.

    Raises:
        UserError: For an unknown structure, a head too large for "full", and features or noise that do not fit.
    """
    require_known("laplace: no structure", [structure], STRUCTURES)
    if weight.ndim != 2:
        raise UserError(f"laplace: the weight is {tuple(weight.shape)}, needed (k, d).")
    if structure == "full" and weight.numel() > LARGEST:
        raise UserError(f"laplace: 'full' for {weight.numel()} weights (at most {LARGEST}); use 'kronecker' or 'rows'.")
    if bias is not None:
        weight = torch.cat([weight, bias[:, None]], 1)
    mean = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).clone()
    # In fp32 p sums to 1 only up to 1e-7 of what grows with N, and small eigenvalues drown; an MPS device has no fp64.
    exact = torch.float32 if mean.device.type == "mps" else torch.float64
    curvature = STRUCTURES[structure](*mean.shape, dtype=exact, device=mean.device)
    if noise is not None:
        if noise.shape != (len(mean),):
            raise UserError(f"laplace: the noise is {tuple(noise.shape)}, needed {len(mean)} variances, one per class.")
        if not bool(((noise >= 0) & noise.isfinite()).all()):
            raise UserError(
                f"laplace: noise variances from {float(noise.min()):g} to {float(noise.max()):g}; "
                "they must be finite and not negative."
            )
        noise = noise.detach().to(mean, copy=True)
    laplace = Laplace(mean, curvature, _positive(prior_precision), noise, bias is not None)
    for features in batches:
        if not isinstance(features, Tensor):
            raise UserError(
                f"laplace: a batch is a {type(features).__name__}, needed features (b, d) without their labels; "
                "for a loader of (features, labels) give (x for x, _ in loader)."
            )
        x = laplace._features(features)
        laplace.curvature.add(x.to(exact), laplace(features).to(exact).softmax(1))
    laplace.curvature.finish(mean.dtype)
    return laplace


def _output_hessian(p: Tensor, w: Tensor) -> Tensor:
    """Return w (diag(p) - p p^T), (b, k, k)."""
    return w[:, None, None] * (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1))


def _square_root(wide: Tensor) -> Tensor:
    """Return R (b, k, k) with R R^T = wide wide^T for wide (b, k, m), m >= k, by QR. The product would lose half the digits."""
    return torch.linalg.qr(wide.mT, mode="r").R.mT


def _positive(precision: float) -> float:
    if not precision > 0:
        raise UserError(f"laplace: prior precision {precision}; it must be positive.")
    return precision
