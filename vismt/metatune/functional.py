"""Run a module with the weights of a task, without changing the module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vismt.base import console
from vismt.base.errors import UserError, near


class WithWeights(nn.Module):
    """Run `module` with `weights` in place of its tensors of the same names.

    The weights are detached (memory is shared, not copied). They are neither parameters nor buffers: `.to`, `parameters()` and
    `state_dict()` act only on the tensors of the module, and two objects of this class may share a module. Gradients reach the
    images. To tune the weights, build a new WithWeights from tuned copies of `weights`.

    weights: Tensors by the name of a parameter or buffer of the module, of the same shape, on the device on which they run.
    lasting: Whether other tasks have the same weights, so that features may be kept.

    Raises UserError for an unknown name or a shape that does not fit.
    """

    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor], *, lasting: bool = False) -> None:
        super().__init__()
        self.lasting = lasting
        check_named_weights(module, weights)
        self.module = module
        self.weights = {name: weight.detach() for name, weight in weights.items()}
        self.training = module.training  # not .train(): the module is shared

    def forward(self, images: Tensor) -> Tensor:
        """Return `module(images)` under the task's weights."""
        return functional_call(self.module, self.weights, (images,))


def check_named_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raise UserError unless every tensor has the name and the shape of a parameter or buffer of the module."""
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    for name, weight in weights.items():
        if name not in tensors:
            raise UserError(f"weights: '{name}' is not a tensor of {type(module).__name__}.{near(name, tensors)}")
        if weight.shape != tensors[name].shape:
            shape, needed = tuple(weight.shape), tuple(tensors[name].shape)
            raise UserError(
                f"weights: '{name}' is {shape}, {type(module).__name__} has {needed}: take them from this model."
            )


def answers(model: nn.Module, images: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return the output of a model for images (b, 3, h, w), in the same way for attacks and evaluations.

    Pixels are float32 for weights of any type, because half precision would round small changes away. A model that takes only
    its own type gets this type. Autocast is off. rows: Rows that are passed to the method `rows_of`, if the model has one
    (`PackedClassifier`).
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    wide = images.to(torch.promote_types(dtype, torch.float32))
    run: Any = model
    if rows is not None and hasattr(model, "rows_of"):
        run = partial(run.rows_of, rows=rows)
    with torch.autocast(images.device.type, enabled=False):
        try:
            return run(wide)
        except RuntimeError as error:
            if wide.dtype == dtype or isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            return run(images.to(dtype))


def report_lost(rows: Sequence[Mapping], fields: Mapping[str, str]) -> None:
    """Print how many images an attack counted as broken that are right in the evaluation.

    rows: Records. fields: Name of the field with the count, by attack.
    """
    for attack, field in fields.items():
        count = sum(row.get(field, 0) for row in rows)
        if count:
            console.stage(
                "attack", f"{attack}: {count} images that it broke are right in another batch, and count as right"
            )
