"""A linear classifier of features, fitted to a task's support: what the ridge probe and the logistic probe share.

    z = f(x) / |f(x)|,    u = (z - m) / r,    logits = u W^T + b
    m = sum_i w_i z_i / n,    r^2 = sum_i w_i |z_i - m|^2 / n,    w_i = n / (N n_{y_i})

With these weights every class counts the same, whatever its n_k of the n support images. Centring and the one scale r give
inputs of mean square 1, so one strength of regularisation suits backbones whose features point in nearly one direction and
backbones whose features do not. Fitting is in float64 on the CPU, without gradients; gradients of the logits reach the
query images.
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


class LinearClassifier(nn.Module):
    """Images (b, 3, h, w) in [0, 1] -> logits (b, N): fixed weight (N, d) and bias (N,) on L2-normalised features."""

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

    proto: a model with `classifier(support_images, support_labels)` that returns a `PrototypeClassifier` (ProtoNet, a pool
    with merging); the probe takes its backbone, merged weights included.
    """

    def __init__(self, proto: FewShotModel) -> None:
        super().__init__()
        self.proto = proto

    @abstractmethod
    def fit(self, inputs: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return W (N, d) and b (N,) for inputs u (n, d), float64, labels (n,) and image weights w (n,)."""

    @abstractmethod
    def describe(self) -> str:
        """Return the settings as a text, for fingerprints."""

    @torch.no_grad()
    def classifier(self, support_images: Tensor, support_labels: Tensor, *, batch: int = 256) -> nn.Module:
        """Return the fitted query classifier of a support (s, 3, h, w) in [0, 1], (s,); batch: images in a forward."""
        task = self.proto.classifier(support_images, support_labels)
        if not isinstance(task, PrototypeClassifier):
            raise UserError(
                f"linear probe: the task's classifier is {type(task).__name__}: it needs one with prototypes."
            )
        result = self.fitted(task.backbone, features(task.backbone, support_images, batch), support_labels)
        result.training = task.training
        return result

    def fitted(self, backbone: nn.Module, support: Tensor, labels: Tensor) -> nn.Module:
        """Return the classifier on a backbone, fitted to the features (s, d) of a support with labels (s,)."""
        weight, bias = self.fit_features(support, labels)
        kind = torch.promote_types(support.dtype, torch.float32)
        return LinearClassifier(backbone, weight.to(support.device, kind), bias.to(support.device, kind))

    def fit_features(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight (N, d) and bias (N,) on L2-normalised features, float64 on the CPU, of features (s, d), (s,)."""
        inputs, labels, weights, mean, spread = self.inputs(features, labels)
        W, b = self.fit(inputs, labels, weights)
        weight = W / spread
        return weight, b - weight @ mean

    def inputs(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return u (s, d), labels and w (s,), m (d,) and r of features (s, d), all but the labels float64, on the CPU."""
        wide, labels = features.detach().cpu().double(), labels.cpu().long()
        ways = len(prototypes(wide, labels))  # refuses labels that do not fit
        z = F.normalize(wide, dim=1, eps=1e-12)
        weights = class_weights(labels, ways)
        mean = weights @ z / len(z)
        spread = ((weights @ (z - mean).square().sum(1)) / len(z)).sqrt().clamp_min(1e-12)
        return (z - mean) / spread, labels, weights, mean, spread


def class_weights(labels: Tensor, ways: int) -> Tensor:
    """Return w (n,), float64, of labels (n,) in 0..ways-1: the same sum for every class, and n in all."""
    return len(labels) / (ways * labels.bincount(minlength=ways)[labels].double())
