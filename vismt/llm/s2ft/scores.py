"""Scores of heads and channels for the selection of S2FT's units (arXiv 2412.06289, where they have names and no code).

    weight      W_j = norm of the rows or columns of unit j in the matrix that will be trained
    activation  A_j = mean over calibration tokens of |z_j|, z the input of o or down
    product     S_j = W_j A_j
    gradient    G_j = sum over calibration batches of the norm of dL/dW at the rows or columns of unit j

The tokens of a unit are counted at the input of o or down, whichever of its matrices is trained. The loss of (inputs, labels)
is the cross-entropy of the logits (b, c); for logits (b, n, c) it is that of the next token, where labels (b, n) are the tokens
themselves. Labels of -100 are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.llm.s2ft.structures import UnitBlock, structures, weight_matrix
from vismt.lowrank.contexts import evaluating
from vismt.lowrank.layers.stock_modules import is_conv1d

SCORES = ("weight", "activation", "product", "gradient")
NOT_FINITE = "every label is -100, or the model does not compute finite numbers"
Slot = tuple[str, str]  # (container, part)
Blocks = Mapping[Slot, UnitBlock]  # the rows or columns of the units of each slot
Scores = dict[Slot, Tensor]


def unit_scores(model: nn.Module, strategy: str, blocks: Blocks, calibration: Iterable[Any] | None) -> Scores:
    """Return the scores of the units of each slot, (units,) fp32 on the CPU. calibration: as in `select_units`."""
    batches = _batches(strategy, calibration)
    if strategy == "gradient":
        return _gradients(model, blocks, batches)
    scores = {}
    if strategy in ("weight", "product"):
        for slot, block in blocks.items():
            scores[slot] = _norms(weight_matrix(model.get_submodule(block.path)), block)
    if strategy in ("activation", "product"):
        means = _activations(model, blocks, batches)
        scores = {slot: means[slot] * scores.get(slot, 1.0) for slot in blocks}
    return scores


def _batches(strategy: str, calibration: Iterable[Any] | None) -> list[Any]:
    if isinstance(calibration, (Mapping, Tensor)):
        calibration = [calibration]
    batches = [] if calibration is None else list(calibration)
    if strategy != "weight" and not batches:
        raise UserError(
            f"select_units: strategy '{strategy}' needs calibration, a list of batches; 'random' needs none."
        )
    for number, batch in enumerate(batches):
        is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        if not is_pair and not isinstance(batch, (Mapping, Tensor)):
            raise UserError(
                f"select_units: calibration batch {number} is of type {type(batch).__name__}; give a mapping of the "
                "model's arguments, a tensor, or (inputs, labels)."
            )
    return batches


def _norms(matrix: Tensor, block: UnitBlock) -> Tensor:
    """Return the Frobenius norm of the rows or columns of each unit, (units,) fp32."""
    unit_rows = matrix.detach().narrow(block.dim, block.start, block.units * block.size).float()
    return unit_rows.square().sum(1 - block.dim).view(block.units, block.size).sum(1).sqrt().cpu()


def _activations(model: nn.Module, blocks: Blocks, batches: Sequence[Any]) -> Scores:
    containers = structures(model)
    sums = {slot: torch.zeros(block.units, dtype=torch.float64) for slot, block in blocks.items()}
    tokens = dict.fromkeys(blocks, 0)
    mask: Tensor | None = None  # of the current batch

    def observer(slot: Slot) -> Callable[[nn.Module, tuple], None]:
        def observe(_module: nn.Module, inputs: tuple) -> None:
            z = inputs[0].detach().float()
            units = blocks[slot].units
            norms = z.reshape(*z.shape[:-1], units, -1).norm(dim=-1)
            norms = norms[mask] if mask is not None and mask.shape == z.shape[:-1] else norms.reshape(-1, units)
            sums[slot] += norms.sum(0).cpu().double()
            tokens[slot] += len(norms)

        return observe

    with ExitStack() as stack, evaluating(model), torch.no_grad():
        for slot in blocks:
            parts = containers[slot[0]].parts
            last = model.get_submodule(parts["o" if "o" in parts else "d"].path)
            stack.callback(last.register_forward_pre_hook(observer(slot)).remove)
        for batch in batches:
            attention_mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            mask = None if attention_mask is None else attention_mask.bool()
            _call(model, batch)
    if not any(tokens.values()):  # a single expert of a mixture may receive no token
        raise UserError(
            "select_units: no token of calibration is left to score by; its attention_mask must not be all zero."
        )
    return {slot: (sums[slot] / max(1, tokens[slot])).float() for slot in blocks}


def _gradients(model: nn.Module, blocks: Blocks, batches: Sequence[Any]) -> Scores:
    """Return the summed gradient norms of each unit.

    The norm is taken as soon as a weight's gradient is complete and the gradient is freed, so that memory holds the gradient
    of one weight at a time.
    """
    sums = {slot: torch.zeros(block.units) for slot, block in blocks.items()}
    state_before = {name: (parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()}

    def observer(slot: Slot) -> Callable[[Tensor], None]:
        conv1d = is_conv1d(model.get_submodule(blocks[slot].path))

        def observe(weight: Tensor) -> None:
            sums[slot] += _norms(weight.grad.t() if conv1d else weight.grad, blocks[slot])
            weight.grad = None

        return observe

    try:
        model.requires_grad_(False)
        with ExitStack() as stack, evaluating(model), torch.enable_grad():
            for slot, block in blocks.items():
                weight = model.get_submodule(block.path).weight.requires_grad_(True)
                weight.grad = None
                stack.callback(weight.register_post_accumulate_grad_hook(observer(slot)).remove)
            for number, batch in enumerate(batches):
                loss = _loss(model, batch)
                if not bool(loss.isfinite()):
                    raise UserError(
                        f"select_units: the loss of calibration batch {number} is {float(loss.detach())}: {NOT_FINITE}."
                    )
                loss.backward()
    finally:
        for name, parameter in model.named_parameters():
            requires_grad, grad = state_before[name]
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
    return sums


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss of a batch, a scalar; it is not finite where every label is ignored. See the header."""
    out = _call(model, batch)
    if not isinstance(batch, (tuple, list)):
        loss = getattr(out, "loss", None)
        if loss is None:
            raise UserError("select_units: 'gradient' needs a loss: give labels in each batch, or (inputs, labels).")
        return loss
    logits, labels = getattr(out, "logits", out), batch[1]
    shape = tuple(logits.shape)
    per_token = logits.ndim == 3
    if tuple(labels.shape) not in ([shape[:2]] if per_token else [shape[:1] + shape[2:], shape]):
        needed = "the tokens (b, n)" if per_token else "the classes (b,) or shares of them (b, c)"
        raise UserError(f"select_units: labels {tuple(labels.shape)} for logits {shape}; 'gradient' needs {needed}.")
    if per_token:  # the state at position n predicts the token at position n + 1
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    return F.cross_entropy(logits.float(), labels)
