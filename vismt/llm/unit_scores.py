"""Scores of heads and channels by which S2FT may choose (arXiv 2412.06289, where they have names and no code).

    weight      W_j = norm of the rows or columns of unit j in the matrix that will be trained
    activation  A_j = mean over calibration tokens of |z_j|, z the input of o or down
    product     S_j = W_j A_j
    gradient    G_j = sum over calibration batches of the norm of dL/dW at the rows or columns of unit j

The tokens of a unit are counted at the input of o or down, whichever of its matrices is trained. The loss of (inputs, labels)
is the cross-entropy of the logits (b, c); of logits (b, n, c) that of the next token, labels (b, n) being the tokens themselves.
Labels of -100 count for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.errors import UserError
from vismt.lowrank.structures import Block, Structure, structures
from vismt.lowrank.targets import is_conv1d

SCORES = ("weight", "activation", "product", "gradient")
FINITE = "every label is -100, or the model does not compute finite numbers"
Slots = dict[tuple[str, str], Block]  # (structure, part) -> where its units lie
Scores = dict[tuple[str, str], Tensor]


def unit_scores(model: nn.Module, strategy: str, slots: Slots, calibration: Iterable[Any] | None) -> Scores:
    """Scores of the units of each slot, (units,) fp32 on the CPU. calibration: see selection.select_units."""
    one = isinstance(calibration, (Mapping, Tensor))
    batches = [calibration] if one else list(calibration) if calibration is not None else []
    if strategy != "weight" and not batches:
        raise UserError(
            f"select_units: strategy '{strategy}' needs calibration, a list of batches; 'random' needs none."
        )
    for number, batch in enumerate(batches):
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        if not pair and not isinstance(batch, (Mapping, Tensor)):
            told = f"calibration batch {number} is of type {type(batch).__name__}"
            raise UserError(
                f"select_units: {told}; give a mapping of the model's arguments, a tensor, or (inputs, labels)."
            )
    if strategy == "gradient":
        return _gradients(model, slots, batches)
    scores = {}
    if strategy in ("weight", "product"):
        scores = {slot: _norms(_matrix(model, block), block) for slot, block in slots.items()}
    if strategy in ("activation", "product"):
        means = _activations(model, slots, batches)
        scores = {slot: means[slot] * scores.get(slot, 1.0) for slot in slots}
    return scores


def _matrix(model: nn.Module, block: Block) -> Tensor:
    module = model.get_submodule(block.path)
    return module.weight.t() if is_conv1d(module) else module.weight


def _norms(matrix: Tensor, block: Block) -> Tensor:
    """Frobenius norm of each unit's rows or columns, (units,) fp32."""
    own = matrix.detach().narrow(block.dim, block.start, block.units * block.size).float()
    return own.square().sum(1 - block.dim).view(block.units, block.size).sum(1).sqrt().cpu()


def _activations(model: nn.Module, slots: Slots, batches: Sequence[Any]) -> Scores:
    found = structures(model)
    sums = {slot: torch.zeros(block.units, dtype=torch.float64) for slot, block in slots.items()}
    tokens = dict.fromkeys(slots, 0)
    kept: dict[str, Tensor | None] = {"mask": None}

    def watch(slot: tuple[str, str]) -> Callable:
        def look(_module: nn.Module, inputs: tuple) -> None:
            z, mask = inputs[0].detach().float(), kept["mask"]
            units = slots[slot].units
            sizes = z.reshape(*z.shape[:-1], units, -1).norm(dim=-1)
            sizes = sizes[mask] if mask is not None and mask.shape == z.shape[:-1] else sizes.reshape(-1, units)
            sums[slot] += sizes.sum(0).double().cpu()
            tokens[slot] += len(sizes)

        return look

    with ExitStack() as stack, _quiet(model), torch.no_grad():
        for slot in slots:
            outside = _outside(found[slot[0]])
            stack.enter_context(_removed(model.get_submodule(outside.path).register_forward_pre_hook(watch(slot))))
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            kept["mask"] = None if mask is None else mask.bool()
            _call(model, batch)
    if not any(tokens.values()):  # one expert of many may see none
        raise UserError(
            "select_units: no token of calibration is left to score by; its attention_mask must not be all zero."
        )
    return {slot: (sums[slot] / max(1, tokens[slot])).float() for slot in slots}


def _outside(structure: Structure) -> Block:
    return structure.parts["o" if "o" in structure.parts else "d"]


def _gradients(model: nn.Module, slots: Slots, batches: Sequence[Any]) -> Scores:
    """Norms are taken as soon as a weight's gradient is whole, and it is dropped: one weight's at a time is held."""
    sums = {slot: torch.zeros(block.units) for slot, block in slots.items()}
    before = {name: (parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()}

    def watch(slot: tuple[str, str]) -> Callable:
        conv1d = is_conv1d(model.get_submodule(slots[slot].path))

        def look(weight: Tensor) -> None:
            sums[slot] += _norms(weight.grad.t() if conv1d else weight.grad, slots[slot])
            weight.grad = None

        return look

    try:
        model.requires_grad_(False)
        with ExitStack() as stack, _quiet(model), torch.enable_grad():
            for slot, block in slots.items():
                weight = model.get_submodule(block.path).weight.requires_grad_(True)
                weight.grad = None
                stack.enter_context(_removed(weight.register_post_accumulate_grad_hook(watch(slot))))
            for number, batch in enumerate(batches):
                loss = _loss(model, batch)
                if not bool(loss.isfinite()):
                    raise UserError(
                        f"select_units: the loss of calibration batch {number} is {float(loss.detach())}: {FINITE}."
                    )
                loss.backward()
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name][0])
            parameter.grad = before[name][1]
    return sums


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of the block."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _loss(model: nn.Module, batch: Any) -> Tensor:
    """Scalar; not finite where no label is left."""
    out = _call(model, batch)
    if isinstance(batch, (tuple, list)):
        return _cross_entropy(getattr(out, "logits", out), batch[1])
    loss = getattr(out, "loss", None)
    if loss is None:
        raise UserError("select_units: 'gradient' needs a loss: give labels in each batch, or (inputs, labels).")
    return loss


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    shape, tokens = tuple(logits.shape), logits.ndim == 3
    if tuple(labels.shape) not in ((shape[:2],) if tokens else (shape[:1] + shape[2:], shape)):
        wanted = "the tokens (b, n)" if tokens else "the classes (b,) or shares of them (b, c)"
        raise UserError(f"select_units: labels {tuple(labels.shape)} for logits {shape}; 'gradient' needs {wanted}.")
    if tokens:  # what stands at place n is told at place n - 1
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits.float(), labels)
