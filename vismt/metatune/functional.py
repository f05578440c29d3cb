"""A module with other weights than its own: one task's weights, which leave no trace in the model they came from."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.func import functional_call

from vismt.errors import UserError, near


class Functional(nn.Module):
    """`module` run with `weights` in place of its own tensors of those names; those not named stay the module's.

    weights: {name of a parameter or buffer of the module: tensor of its shape}. They are detached (memory is shared, not
    copied), on the device they shall run on, and neither parameters nor buffers: `.to`, `parameters()` and `state_dict()`
    see the module's tensors alone, and two Functionals may share one module. Gradients reach the images. Whoever tunes
    weights goes from `weights` to a new Functional. Raises UserError for an unknown name or a shape that does not fit.
    """

    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        check_weights(module, weights)
        self.module = module
        self.weights = {name: weight.detach() for name, weight in weights.items()}
        self.training = module.training  # its own flag alone: the module is shared

    def forward(self, images: Tensor) -> Tensor:
        """What `module(images)` returns, under the task's weights."""
        return functional_call(self.module, self.weights, (images,))


def check_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """UserError unless every name is one of the module's parameters or buffers, and of its shape."""
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    for name, weight in weights.items():
        if name not in own:
            raise UserError(f"weights: '{name}' is no tensor of {type(module).__name__}.{near(name, own)}")
        if weight.shape != own[name].shape:
            seen, needed = tuple(weight.shape), tuple(own[name].shape)
            raise UserError(
                f"weights: '{name}' is {seen}, {type(module).__name__} has {needed}: take them from this model."
            )
