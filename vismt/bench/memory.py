"""`vismt bench memory`: what one training step holds in memory, measured and by formula, for each way to train one model.

A random Llama of hidden 512, 8 layers, ffn 1376, vocabulary 2048, batch 4 x 256 tokens, fp32, AdamW, no checkpointing: full
fine-tuning, LoRA r=16 on all seven linears (ours and peft's), LISA with 2 of 8 layers, with and without what lies outside
them, and S2FT on O and D with LoRA's number of parameters where that method is there. A ratio is of these sizes alone: with
longer batches activations dominate, with checkpointing they vanish.

Peak is the most that is alive at once in the second step, weights included. Its formula is weights + Adam state + the larger
of gradients (the end of the backward pass) and activations with two more tensors of the logits' size (its start: the
cross-entropy's gradient); what the backward pass of a block makes in passing is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vismt.bench.timing import Timing, interleave
from vismt.errors import UserError
from vismt.llm import LISA
from vismt.lowrank.account import (
    count_parameters,
    gradient_bytes,
    optimizer_bytes,
    optimizer_bytes_formula,
    peak_bytes,
    saved_activation_bytes,
    weight_bytes,
)
from vismt.lowrank.activations import Block, Decoder, decoder_activation_bytes
from vismt.registry import adapt, list_methods

RANK, ACTIVE, DEPTH, BATCH, LENGTH = 16, 2, 8, 4, 256
SIZES = Decoder(hidden=512, ffn=1376, heads=8, kv_heads=8, head_dim=64, vocabulary=2048)
# One head of eight and 241 of 1376 channels a layer: as many parameters as LoRA of rank 16 has.
SLICED = 0.175
FULL = "full fine-tuning"


@dataclass(frozen=True)
class Costs:
    """Bytes of one way to train: measured, or by formula."""

    weights: int
    activations: int
    gradients: int
    optimizer: int
    peak: int

    @property
    def together(self) -> int:
        """All but the peak, as if all were there at once."""
        return self.weights + self.activations + self.gradients + self.optimizer


@dataclass(frozen=True)
class MemoryResult:
    """Measured costs, their prediction, and CPU time of a step, by variant; printing it gives the table."""

    trainable: dict[str, int]
    measured: dict[str, Costs]
    predicted: dict[str, Costs]
    timing: Timing

    def __str__(self) -> str:
        told = f"Llama {SIZES.hidden} x {DEPTH}, {BATCH} x {LENGTH} tokens, fp32, AdamW; MiB, below each the formula"
        names = ("trainable", "weights", "saved", "grads", "Adam", "peak")
        ratios = ("saved", "sum", "peak", "step", "min..max")
        lines = [told, f"{'':<22}" + "".join(f"{name:>{11 if name == 'trainable' else 9}}" for name in names)]
        lines[1] += "   vs full:" + "".join(f"{name:>{11 if name == 'min..max' else 7}}" for name in ratios)
        full = self.measured[FULL]
        for name, costs in self.measured.items():
            median, low, high = self.timing.ratio(name, FULL)
            shares = (costs.activations / full.activations, costs.together / full.together, costs.peak / full.peak, median)
            lines.append(
                f"{name:<22}{self.trainable[name]:>11,}{_row(costs)}{'':>11}"
                + "".join(f"{share:>7.3f}" for share in shares) + f"{f'{low:.2f}..{high:.2f}':>11}"
            )
            lines.append(f"{'':<33}{_row(self.predicted[name])}")
        return "\n".join(lines)


@dataclass
class Variant:
    """One way to train: the model, its optimiser, and how its blocks and the rest train, for the formula."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    blocks: list[Block]
    outside: tuple[bool, bool, bool] = (False, False, False)  # embeddings, final norm, head


def run(rounds: int = 9, device: str = "cpu") -> list[MemoryResult]:
    """Measure every variant on the same model and batch."""
    where = torch.device(device)
    model, tokens = _llama(where)
    trainable, measured, predicted = {}, {}, {}
    steps: dict[str, Callable[[], None]] = {}
    for name, variant in _variants(model).items():
        trainable[name] = count_parameters(variant.model)[0]
        predicted[name] = _predict(variant)
        measured[name] = _measure(variant, tokens)
        steps[name] = _step(variant, tokens)
    return [MemoryResult(trainable, measured, predicted, interleave(steps, rounds, label="memory", device=where))]


def _measure(variant: Variant, tokens: Tensor) -> Costs:
    step = _step(variant, tokens)
    activations = saved_activation_bytes(variant.model, lambda: _loss(variant.model, tokens))
    peak = peak_bytes(step)  # the optimiser's state comes to be in the first of its two steps
    _loss(variant.model, tokens).backward()
    gradients = gradient_bytes(variant.model)
    variant.optimizer.zero_grad()
    weights = weight_bytes(variant.model)
    return Costs(weights, activations, gradients, optimizer_bytes(variant.optimizer), weights + peak)


def _predict(variant: Variant) -> Costs:
    trained = [parameter for parameter in variant.model.parameters() if parameter.requires_grad]
    weights, gradients = weight_bytes(variant.model), sum(parameter.numel() * parameter.element_size() for parameter in trained)
    embeddings, norm, head = variant.outside
    activations = decoder_activation_bytes(SIZES, BATCH, LENGTH, variant.blocks, embeddings=embeddings, norm=norm, head=head)
    state = optimizer_bytes_formula(trained, "adamw")
    start = activations + 2 * BATCH * LENGTH * SIZES.vocabulary * trained[0].element_size()
    return Costs(weights, activations, gradients, state, weights + state + max(gradients, start))


def _variants(model: nn.Module) -> dict[str, Variant]:
    """Every variant on a copy of the model, the full one on the model itself."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError('bench memory compares with peft, which is not installed: pip install "vismt[llm]".') from error
    ours = copy.deepcopy(model)
    paths = [site.path for site in adapt(ours, "lora", rank=RANK).sites]
    theirs = get_peft_model(copy.deepcopy(model), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=paths))
    lora = [Block("lora", RANK)] * DEPTH
    found = {
        "vismt lora r=16": Variant(ours, _adamw(ours), lora),
        "peft lora r=16": Variant(theirs, _adamw(theirs), lora),
        "LISA 2 of 8": _lisa(copy.deepcopy(model), True),
        "LISA 2 of 8 alone": _lisa(copy.deepcopy(model), False),
    }
    if "s2ft" in list_methods():
        sliced = copy.deepcopy(model)
        adapt(sliced, "s2ft", ratio=SLICED, parts=("o", "d"))
        inputs = round(SLICED * SIZES.heads) * SIZES.head_dim, round(SLICED * SIZES.ffn)
        found["S2FT O and D"] = Variant(sliced, _adamw(sliced), [Block("sliced", sliced=inputs)] * DEPTH)
    return {FULL: Variant(model, _adamw(model), [Block("trained")] * DEPTH, (True, True, True)), **found}


def _lisa(model: nn.Module, outside: bool) -> Variant:
    optimizer = _adamw(model)
    lisa = LISA(model, optimizer, active=ACTIVE, train_embeddings=outside, exclude=() if outside else ("lm_head", "model.norm"))
    blocks = [Block("trained" if layer in lisa.active_layers else "frozen") for layer in range(DEPTH)]
    return Variant(model, optimizer, blocks, (outside, outside, outside))


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)


def _step(variant: Variant, tokens: Tensor) -> Callable[[], None]:
    def call() -> None:
        _loss(variant.model, tokens).backward()
        variant.optimizer.step()
        variant.optimizer.zero_grad(set_to_none=True)

    return call


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def _llama(device: torch.device) -> tuple[nn.Module, Tensor]:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError('bench memory needs transformers: pip install "vismt[llm]".') from error
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=SIZES.hidden, num_hidden_layers=DEPTH, intermediate_size=SIZES.ffn, num_attention_heads=SIZES.heads,
        num_key_value_heads=SIZES.kv_heads, vocab_size=SIZES.vocabulary,
    )
    tokens = torch.randint(SIZES.vocabulary, (BATCH, LENGTH), device=device)
    return LlamaForCausalLM(shape).to(device).train(), tokens


def _row(costs: Costs) -> str:
    parts: Sequence[int] = (costs.weights, costs.activations, costs.gradients, costs.optimizer, costs.peak)
    return "".join(f"{size / 2**20:>9.1f}" for size in parts)
