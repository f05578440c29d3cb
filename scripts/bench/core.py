"""`scripts.bench core`: Forward and backward pass of a LoRA of rank 16 on every linear layer, against peft and other steps.

Random models: timm vit_small_patch16_224, batch 8 x 3 x 224 x 224 and 32 x 3 x 48 x 48, and a Llama of hidden 512, 8 layers,
ffn 1376, vocabulary 2048, batch 4 x 128 tokens. Saved activations are the storages that a forward pass creates and keeps for the
backward pass. The floor trains the head alone. recompute: under `vismt.recompute`. compile: blocks under torch.compile.
bf16: frozen weights in bfloat16, factors (peft's by its default, autocast_adapter_dtype) and the head in float32. in a run:
with attention by products, as runs train (vismt.engine.blocks).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scripts.bench.accounting import kept_bytes, saved_activation_bytes
from scripts.bench.activations import Decoder
from scripts.bench.timing import SAVED, Ratios, interleave
from vismt.base.errors import UserError
from vismt.config.sections import TrainConfig
from vismt.engine.blocks import check_compile, compile_blocks, find_blocks, running_blocks
from vismt.lowrank.recompute import recompute
from vismt.methods import adapt

RANK = 16
SIZES = Decoder(hidden=512, ffn=1376, heads=8, kv_heads=8, head_dim=64, vocabulary=2048)
LORA, PEFT, FULL = "vismt lora", "peft lora", "full fine-tuning"
RECOMPUTE, COMPILE, HALF, PEFT_HALF = f"{LORA}, recompute", f"{LORA}, compile", f"{LORA}, bf16", f"{PEFT}, bf16"
HALF_RECOMPUTE, IN_RUN = f"{HALF}, recompute", f"{HALF}, in a run"
# (row, base, largest ratio of times to reach), the same for both models.
TIMES = ((RECOMPUTE, LORA, 1.03), (HALF, PEFT_HALF, 0.90), (HALF, PEFT, 0.60), (IN_RUN, HALF, 1.00))

Loss = Callable[[nn.Module], Tensor]
Step = Callable[[], Tensor]


def run(rounds: int = 9, device: str = "cpu") -> list[Ratios]:
    """Measure all models."""
    where = torch.device(device)
    return [
        compare("timm ViT-S/16, 8 x 224 px", *_vit(where, 8, 224), rounds, where, (0.95, 0.65)),
        compare("timm ViT-S/16, 32 x 48 px", *_vit(where, 32, 48), rounds, where, (0.95, 0.65)),
        compare("Llama 512 x 8, 4 x 128 tokens", *_llama(where), rounds, where, (0.97, 0.70)),
    ]


def compare(
    title: str,
    model: nn.Module,
    loss: Loss,
    head: str,
    rounds: int,
    device: torch.device,
    targets: tuple[float, float],
) -> Ratios:
    """Time every variant of a model and count what it saves.

    head: path of the trained head. targets: largest ratio of a LoRA step to peft's, and of what LoRA with recompute saves.
    """
    check_compile(model)
    variants = _variants(model, head)
    losses = {name: _within(recompute, loss) if name.endswith("recompute") else loss for name in variants}
    losses[IN_RUN] = _within(lambda model: running_blocks(model, TrainConfig(precision="bf16")), loss)
    saved = {name: kept_bytes(partial(losses[name], variants[name])) for name in variants}
    compiled = copy.deepcopy(variants[LORA])
    compile_blocks(find_blocks(compiled))
    variants[COMPILE], losses[COMPILE] = compiled, loss
    saved[COMPILE] = saved_activation_bytes(compiled, lambda: loss(compiled))

    def step(name: str) -> Callable[[], None]:
        def call() -> None:
            variants[name].zero_grad(set_to_none=True)
            losses[name](variants[name]).backward()

        return call

    timing = interleave({name: step(name) for name in variants}, rounds, label=title, device=device)
    time_target, saved_target = targets
    times = [(LORA, PEFT, time_target), *TIMES]
    return Ratios(title, timing, times, sizes={SAVED: saved}, size_targets=[(SAVED, RECOMPUTE, PEFT, saved_target)])


def _within(context: Callable[[nn.Module], AbstractContextManager[object]], loss: Loss) -> Loss:
    def within(model: nn.Module) -> Tensor:
        with context(model):
            return loss(model)

    return within


def _variants(model: nn.Module, head: str) -> dict[str, nn.Module]:
    peft = imported_peft("core")
    floor = copy.deepcopy(model).requires_grad_(False)
    floor.get_submodule(head).requires_grad_(True)
    half = copy.deepcopy(model).bfloat16()
    half.get_submodule(head).float().register_forward_pre_hook(_in_float)
    lora, half_lora, principal = (copy.deepcopy(stock) for stock in (model, half, model))
    report = adapt(lora, "lora", rank=RANK, also_train=[head])
    adapt(half_lora, "lora", rank=RANK, also_train=[head])
    adapt(principal, "pissa", rank=RANK, also_train=[head])
    paths = [site.path for site in report.specs]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=paths, modules_to_save=[head])
    return {
        LORA: lora,
        RECOMPUTE: lora,
        PEFT: peft.get_peft_model(copy.deepcopy(model), config),
        HALF: half_lora,
        HALF_RECOMPUTE: half_lora,
        IN_RUN: half_lora,
        PEFT_HALF: peft.get_peft_model(half, config),
        "vismt pissa": principal,
        FULL: model,
        "head only (floor)": floor,
    }


def imported_peft(bench: str) -> Any:
    """Return the package peft. Raises UserError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f'bench {bench} compares with peft, which is not installed: pip install "vismt[llm]".'
        ) from error
    return peft


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """Return a step of AdamW on the trainable parameters of a model; the step returns the loss, ()."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)

    def step() -> Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


def _in_float(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.float() for value in inputs)


def _vit(device: torch.device, batch: int, size: int) -> tuple[nn.Module, Loss, str]:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", img_size=size).to(device).train()
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)

    def loss(variant: Any) -> Tensor:
        return nn.functional.cross_entropy(variant(images.to(variant.patch_embed.proj.weight.dtype)), labels)

    return model, loss, "head"


def _llama(device: torch.device) -> tuple[nn.Module, Loss, str]:
    model = llama(device).train()
    tokens = torch.randint(0, 2048, (4, 128), device=device)
    return model, lambda variant: variant(input_ids=tokens, labels=tokens).loss, "lm_head"


def llama(device: torch.device, sizes: Decoder = SIZES, depth: int = 8) -> nn.Module:
    """Return a random Llama."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError('this benchmark needs transformers: pip install "vismt[llm]".') from error
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=sizes.hidden,
        num_hidden_layers=depth,
        intermediate_size=sizes.ffn,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocabulary,
    )
    return LlamaForCausalLM(shape).to(device)
