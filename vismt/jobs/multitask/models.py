"""The net of a multi-task run, and its head's file head.safetensors beside the adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vismt.backbones import timm_models
from vismt.backbones.vit import PixelBackbone, classifier_paths, classifiers
from vismt.base.errors import UserError
from vismt.base.identity import weights_digest
from vismt.data.batching import Gathered
from vismt.engine import training_files
from vismt.engine.study import Training
from vismt.evaluation.sections import asked_features
from vismt.jobs.multitask.config import MultitaskConfig
from vismt.metatune.features import FeatureStore, features, number
from vismt.uncertainty.features import HEAD
from vismt.uncertainty.last_layers import is_variational, make_head
from vismt.uncertainty.predictive import GaussianHead

HEAD_FILE = "head.safetensors"


class PixelNet(nn.Module):
    """A backbone with a head: images (b, 3, h, w) in [0, 1] -> logits (b, k), or log-probabilities of a Bayesian head.

    Log-probabilities are the logarithm of the probit without draws (vismt/uncertainty/predictive.py). An answer therefore does
    not depend on the other images of the batch, and an attack follows the gradient of the evaluated function.

    Attributes:
        frozen: Whether no training changes the backbone. It then stays in evaluation mode, and computes the features of `stored`
            images once.
    """

    frozen = False

    def __init__(self, backbone: PixelBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        head: Any = self.head
        if isinstance(head, GaussianHead):
            return head.log_probabilities(self.features(images))
        return head(self.features(images)) if self.frozen else self.backbone.logits(images)

    def features(self, images: Tensor) -> Tensor:
        """Return the input (b, d) of the head."""
        if not self.frozen or images.requires_grad or torch.compiler.is_compiling():
            return self.backbone(images)
        with torch.no_grad():
            return features(self.backbone, images)

    def train(self, mode: bool = True) -> PixelNet:
        """Set the mode of the net. With a frozen backbone, only the mode of the head is set."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
            self.head.train(mode)
        return self

    @property
    def head(self) -> nn.Module:
        """The classifier of the stock model."""
        return classifiers(self.stock)[0]

    @property
    def heads(self) -> nn.Module:
        """The classifier that is trained, or both of a distilled ViT, whose logits are their mean."""
        found = classifiers(self.stock)
        return found[0] if len(found) == 1 else nn.ModuleList(found)

    @property
    def stock(self) -> nn.Module:
        """The timm model with its classifier."""
        return self.backbone.vit

    def fingerprint(self) -> str:
        return weights_digest(self.stock)


def fresh(config: MultitaskConfig, num_classes: int, num_train: int) -> PixelNet:
    """Return the backbone before adaptation, with a head drawn from the configuration's seed. num_train: Training images."""
    model = config.model
    net = PixelNet(
        timm_models.create(
            model.name,
            model.img_size,
            model.pretrained,
            position=model.position,
            num_classes=num_classes,
            new_head=True,
            seed=config.seed,
            dtype=model.dtype,
        )
    )
    head, alone = config.head_name, len(classifiers(net.stock)) == 1
    around = [f"evaluate.{feature.key}" for feature in asked_features(config.evaluate) if HEAD in feature.needs]
    around += [head] if is_variational(head) else []
    if not alone and around:
        raise UserError(
            f"model: {model.name} averages two classifiers, and {around[0]} is around one; take another model."
        )
    if is_variational(head):
        if not isinstance(net.head, nn.Linear):
            raise UserError(
                f"head: '{head}' takes the place of a linear classifier, and {model.name} has a "
                f"{type(net.head).__name__}; set head.name to linear."
            )
        rows = net.head.weight.detach()
        replace_head(net.stock, make_head(head, rows, None, num_train, config.seed, config.head_section.options))
    net.frozen = config.adapt is None and alone
    return net


@contextmanager
def stored(images: Gathered) -> Iterator[Gathered]:
    """Yield images marked as rows of a store of features (vismt/metatune/features.py), which is written at the end."""
    with FeatureStore(images.key) as store:
        yield images.marked(lambda batch, index: number(batch, store, index))


def replace_head(model: nn.Module, head: nn.Module) -> None:
    """Put another classifier in the place of a stock model's."""
    model.set_submodule(classifier_paths(model)[0], head)


def with_linear_head(model: nn.Module) -> nn.Module:
    """Replace a Bayesian head of a stock model by the linear head of its means, which timm can load."""
    head = classifiers(model)[0]
    if isinstance(head, GaussianHead):
        linear = nn.Linear(head.mean.shape[1], head.mean.shape[0])
        linear.load_state_dict({"weight": head.mean.detach(), "bias": torch.zeros(len(head.mean))})
        linear.register_forward_pre_hook(timm_models.widen_inputs)
        replace_head(model, linear)
    return model


def load_head(net: PixelNet, training: Training) -> PixelNet:
    """Load the adapter and head of a training into a fresh net.

    Raises UserError for an unfinished training and for files that do not fit.
    """
    what = training_files.restore(net.stock, training)
    training_files.load_state(net.heads, training.folder / HEAD_FILE, what)
    return net.requires_grad_(False).eval()
