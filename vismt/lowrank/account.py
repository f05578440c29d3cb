"""What an adapted model costs: parameters, activations kept for the backward pass, optimiser state.

Activations are measured: every tensor that autograd saves passes a hook, and each storage counts once however many
operations keep it, in full even when only a view of it is kept (that is what stays in memory). Parameters and buffers
are no activations. Tensors that a custom function keeps on its context without `save_for_backward` are not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from vismt.errors import UserError, near

STATE_COPIES = {"adamw": 2, "adam": 2, "sgd_momentum": 1, "sgd": 0}


@dataclass(frozen=True)
class Account:
    """Counts of parameters and bytes; a field that was not asked for is None.

    trainable, total: numbers of parameters, shared ones once.
    activation_bytes: saved for backward by one forward pass.
    optimizer_bytes: state the given optimiser holds now.
    optimizer_bytes_formula: copies of the trainable parameters that kind of optimiser keeps, in bytes.
    """

    trainable: int
    total: int
    activation_bytes: int | None = None
    optimizer_bytes: int | None = None
    optimizer_bytes_formula: int | None = None

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total if self.total else 0.0
        lines = [f"parameters        {self.trainable:,} trainable of {self.total:,} ({share:.2f} %)"]
        for label, size in (
            ("activations", self.activation_bytes),
            ("optimiser", self.optimizer_bytes),
            ("optimiser formula", self.optimizer_bytes_formula),
        ):
            if size is not None:
                lines.append(f"{label:<18}{size / 2**20:,.2f} MiB")
        return "\n".join(lines)


def account(
    model: nn.Module,
    forward: Callable[[], object] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    kind: str | None = None,
) -> Account:
    """All counts of one model.

    Args:
        model: any module.
        forward: runs one forward pass, loss included, and returns what must stay alive for the backward pass.
        optimizer: after at least one step, for the measured state.
        kind: "adamw", "adam", "sgd_momentum" or "sgd", for the formula.
    """
    trainable, total = count_parameters(model)
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Account(
        trainable,
        total,
        None if forward is None else saved_activation_bytes(model, forward),
        None if optimizer is None else optimizer_bytes(optimizer),
        None if kind is None else optimizer_bytes_formula(chosen, kind),
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) numbers of parameters; a parameter that is shared counts once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def saved_activation_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of all storages that autograd keeps during `forward()`, parameters and buffers of `model` left out.

    An input that a layer saves counts. What `forward` returns is held until the count is done, and nothing is run
    backward, so gradients and module state stay as they are (but for what the forward pass itself changes).
    """
    ours = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[tuple[str, int], int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if key not in ours and key not in kept:
            kept[key] = tensor.untyped_storage().nbytes()
            alive.append(tensor.detach())
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(kept.values())


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in the optimiser's state, each storage once: moments and step counters, no parameters."""
    sizes: dict[tuple[str, int], int] = {}
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                sizes[_storage(value)] = value.untyped_storage().nbytes()
    return sum(sizes.values())


def optimizer_bytes_formula(parameters: Iterable[Tensor], kind: str) -> int:
    """Bytes of the moments for `parameters`: Adam and AdamW keep two copies, SGD with momentum one, plain SGD none.

    Step counters (4 bytes for each tensor with AdamW) are left out.
    """
    if kind not in STATE_COPIES:
        raise UserError(f"optimiser account: no kind '{kind}'.{near(kind, STATE_COPIES)}")
    return STATE_COPIES[kind] * sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _storage(tensor: Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.untyped_storage().data_ptr()
