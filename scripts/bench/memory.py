"""`scripts.bench memory`: The memory of a training step, measured and by formula, for several methods on the same model.

A random Llama of hidden 512, 8 layers, ffn 1376, vocabulary 2048 (27 M parameters), a larger one (`--model 88M`,
`--model 158M`; `--model all` for the three, ratios by size), or a language model by its name; batch 4 x 256 tokens,
fp32, AdamW, no checkpointing: full fine-tuning, LoRA r=16 on all seven linears (vismt's and peft's), iLoRA with the same
factors under fixed gates, LISA with 2 layers, with and without the parameters outside the layers, and S2FT on O and D with
LoRA's number of parameters. A ratio holds for these sizes only: with longer batches activations dominate, with
checkpointing they vanish.

Peak is the largest allocation in the second step, weights included. Its formula is weights + Adam state + the larger of
gradients (the end of the backward pass) and activations with two more tensors of the logits' size (its start: the
cross-entropy's gradient); temporaries of a block's backward pass are left out.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scripts.bench.accounting import (
    gradient_bytes,
    optimizer_bytes,
    optimizer_bytes_formula,
    peak_bytes,
    saved_activation_bytes,
    weight_bytes,
)
from scripts.bench.activations import BlockTraining, Decoder, decoder_activation_bytes
from scripts.bench.core import SIZES, imported_peft, llama
from scripts.bench.timing import Comparison, Timing, compare_bytes, interleave
from vismt.backbones.lm import create_lm
from vismt.base.errors import UserError
from vismt.llm import LISA, instance_gates
from vismt.lowrank.model.record import count_parameters
from vismt.methods import adapt

RANK, ACTIVE, DEPTH, BATCH, LENGTH = 16, 2, 8, 4, 256
LARGER = {
    "88M": (Decoder(hidden=768, ffn=2048, heads=12, kv_heads=12, head_dim=64, vocabulary=2048), 12),
    "158M": (Decoder(hidden=1024, ffn=2816, heads=16, kv_heads=16, head_dim=64, vocabulary=2048), 12),
}  # random Llamas by their number of parameters
LIKE = ("llama", "qwen2")  # the formula describes blocks of these types
FULL, PLAIN, GATED, SLICED = "full fine-tuning", "vismt lora", "vismt ilora", "S2FT O and D"
EXPERTS = 4


@dataclass(frozen=True)
class Costs:
    """Bytes of a training step, measured or by formula."""

    weights: int
    activations: int
    gradients: int
    optimizer: int
    peak: int

    @property
    def together(self) -> int:
        """The sum of all but the peak, as if they were allocated at once."""
        return self.weights + self.activations + self.gradients + self.optimizer


@dataclass(frozen=True)
class MemoryResult:
    """Measured costs, predicted costs and CPU time of a step, by variant; `str` gives the table."""

    title: str
    trainable: dict[str, int]
    measured: dict[str, Costs]
    predicted: dict[str, Costs]
    timing: Timing

    def __str__(self) -> str:
        title = f"{self.title}, {BATCH} x {LENGTH} tokens, fp32, AdamW; MiB, below each the formula"
        sizes = f"{'trainable':>11}" + "".join(f"{name:>9}" for name in ("weights", "saved", "grads", "Adam", "peak"))
        ratios = "".join(f"{name:>7}" for name in ("saved", "sum", "peak", "step")) + f"{'min..max':>11}"
        lines = [title, f"{'':<22}{sizes}   vs full:{ratios}"]
        full = self.measured[FULL]
        for name, costs in self.measured.items():
            median, low, high = self.timing.ratio(name, FULL)
            shares = (
                costs.activations / full.activations,
                costs.together / full.together,
                costs.peak / full.peak,
                median,
            )
            lines.append(
                f"{name:<22}{self.trainable[name]:>11,}{_row(costs)}{'':>11}"
                + "".join(f"{share:>7.3f}" for share in shares)
                + f"{f'{low:.2f}..{high:.2f}':>11}"
            )
            lines.append(f"{'':<33}{_row(self.predicted[name])}")
        return "\n".join([*lines, str(self.comparisons()[0])])

    def comparisons(self) -> list[Comparison]:
        """Return the ratios of iLoRA's and S2FT's times, and the peak of every variant against full fine-tuning."""
        gated = next(name for name in self.measured if name.startswith(GATED))
        plain = next(name for name in self.measured if name.startswith(PLAIN))
        peaks = {name: costs.peak for name, costs in self.measured.items()}
        others = [compare_bytes("peak memory", peaks, name, FULL) for name in peaks if name != FULL]
        sliced = [self.timing.compare(SLICED, base) for base in (FULL, plain)]
        return [self.timing.compare(gated, plain, 1.05), *sliced, *others]


@dataclass
class Variant:
    """A model, its optimiser, and how its blocks and the rest train, for the formula."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    blocks: list[BlockTraining]
    outside: tuple[bool, bool, bool] = (False, False, False)  # embeddings, final norm, head
    gates: Tensor | None = None  # (BATCH, EXPERTS)


def run(rounds: int = 9, device: str = "cpu", name: str | None = None) -> list[MemoryResult]:
    """Measure every variant on the same model and batch.

    name: of LARGER, or of a language model (see create_lm); None for the smallest random Llama, "all" for every random one.
    """
    results = []
    for each in (None, *LARGER) if name == "all" else (name,):
        results.append(_measured(rounds, torch.device(device), each))
        gc.collect()  # the copies of a model are in cycles, and those of two sizes do not fit
    return results


def _measured(rounds: int, where: torch.device, name: str | None) -> MemoryResult:
    shape = (SIZES, DEPTH) if name is None else LARGER.get(name)
    model = (llama(where, *shape) if shape else _named(str(name)).to(where)).train()
    sizes, depth = _sizes(model.config), model.config.num_hidden_layers
    tokens = torch.randint(sizes.vocabulary, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0)).to(where)
    trainable, measured, predicted = {}, {}, {}
    steps: dict[str, Callable[[], None]] = {}
    for label, variant in _variants(model, sizes, depth).items():
        trainable[label] = count_parameters(variant.model)[0]
        predicted[label] = _predict(variant, sizes)
        measured[label] = _measure(variant, tokens)
        steps[label] = _step(variant, tokens)
    title = f"{name or 'Llama'} {sizes.hidden} x {depth}"
    timing = interleave(steps, rounds, label="memory", device=where)
    return MemoryResult(title, trainable, measured, predicted, timing)


def _measure(variant: Variant, tokens: Tensor) -> Costs:
    step = _step(variant, tokens)
    activations = saved_activation_bytes(variant.model, lambda: _loss(variant, tokens))
    peak = peak_bytes(step)  # the first of its two steps creates the optimiser's state
    _loss(variant, tokens).backward()
    gradients = gradient_bytes(variant.model)
    variant.optimizer.zero_grad()
    weights = weight_bytes(variant.model)
    return Costs(weights, activations, gradients, optimizer_bytes(variant.optimizer), weights + peak)


def _predict(variant: Variant, sizes: Decoder) -> Costs:
    trained = [parameter for parameter in variant.model.parameters() if parameter.requires_grad]
    weights = weight_bytes(variant.model)
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    embeddings, norm, head = variant.outside
    activations = decoder_activation_bytes(
        sizes, BATCH, LENGTH, variant.blocks, embeddings=embeddings, norm=norm, head=head
    )
    state = optimizer_bytes_formula(trained, "adamw")
    start = activations + 2 * BATCH * LENGTH * sizes.vocabulary * trained[0].element_size()
    return Costs(weights, activations, gradients, state, weights + state + max(gradients, start))


def _variants(model: nn.Module, sizes: Decoder, depth: int) -> dict[str, Variant]:
    """Return every variant on a copy of the model, full fine-tuning on the model itself."""
    peft = imported_peft("memory")
    plain, gated, sliced = (copy.deepcopy(model) for _ in range(3))
    adapt(gated, "ilora", rank=RANK, n_experts=EXPERTS, gate=None)
    gates = torch.rand(BATCH, EXPERTS, generator=torch.Generator().manual_seed(0)).softmax(1)
    gates = gates.to(next(model.parameters()).device)
    paths = [site.path for site in adapt(plain, "lora", rank=RANK).specs]
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=paths))
    budget, head = count_parameters(plain)[0] // depth, sizes.head_dim * sizes.hidden
    heads = max(1, round(0.2 * budget / head))  # of O in a block, a fifth of the budget; D has the channels
    channels = max(1, round((budget - heads * head) / sizes.hidden))
    adapt(sliced, "s2ft", ratio={"o": heads / sizes.heads, "d": channels / sizes.ffn}, parts=("o", "d"))
    lora = [BlockTraining("lora", RANK)] * depth
    slices = [BlockTraining("sliced", sliced=(heads * sizes.head_dim, channels))] * depth
    return {
        FULL: Variant(model, _adamw(model), [BlockTraining("trained")] * depth, (True, True, True)),
        f"{PLAIN} r={RANK}": Variant(plain, _adamw(plain), lora),
        f"peft lora r={RANK}": Variant(theirs, _adamw(theirs), lora),
        f"{GATED} r={RANK}": Variant(gated, _adamw(gated), lora, gates=gates),
        f"LISA {ACTIVE} of {depth}": _lisa(copy.deepcopy(model), True),
        f"LISA {ACTIVE} of {depth} alone": _lisa(copy.deepcopy(model), False),
        SLICED: Variant(sliced, _adamw(sliced), slices),
    }


def _lisa(model: nn.Module, outside: bool) -> Variant:
    optimizer = _adamw(model)
    kept = () if outside else ("lm_head", "model.norm")
    lisa = LISA(model, optimizer, active=ACTIVE, train_embeddings=outside, exclude=kept)
    layers = range(model.config.num_hidden_layers)
    blocks = [BlockTraining("trained" if layer in lisa.active_layers else "frozen") for layer in layers]
    return Variant(model, optimizer, blocks, (outside, outside, outside))


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)


def _step(variant: Variant, tokens: Tensor) -> Callable[[], None]:
    def call() -> None:
        _loss(variant, tokens).backward()
        variant.optimizer.step()
        variant.optimizer.zero_grad(set_to_none=True)

    return call


def _loss(variant: Variant, tokens: Tensor) -> Tensor:
    with nullcontext() if variant.gates is None else instance_gates(variant.gates):
        return variant.model(input_ids=tokens, labels=tokens).loss


def _named(name: str) -> nn.Module:
    model = create_lm(name, dtype=torch.float32)[0]
    if model.config.model_type not in LIKE:
        raise UserError(
            f"bench memory: '{name}' is of type {model.config.model_type}; the formula is for {' and '.join(LIKE)}."
        )
    return model


def _sizes(config: Any) -> Decoder:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Decoder(config.hidden_size, config.intermediate_size, heads, kv_heads, width, config.vocab_size)


def _row(costs: Costs) -> str:
    parts: Sequence[int] = (costs.weights, costs.activations, costs.gradients, costs.optimizer, costs.peak)
    return "".join(f"{size / 2**20:>9.1f}" for size in parts)
