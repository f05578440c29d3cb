"""`vismt bench core`: forward and backward of a LoRA r=16 on every linear, against peft, full fine-tuning and the floor.

Two random models: timm vit_small_patch16_224, batch 8 x 3 x 224 x 224, and a Llama of hidden 512, 8 layers, ffn 1376,
vocabulary 2048, batch 4 x 128 tokens. Saved activations are the tensors that autograd keeps for backward, each storage
counted once, without parameters. The floor trains the head alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from vismt.bench.timing import Timing, interleave
from vismt.errors import UserError
from vismt.lowrank.memory import saved_activation_bytes
from vismt.methods import adapt

RANK = 16


@dataclass(frozen=True)
class CoreResult:
    """Timing and saved activations of one model; `str` gives the table."""

    model: str
    timing: Timing
    saved_bytes: dict[str, int]

    def __str__(self) -> str:
        lines = [f"{self.model}", f"{'':<22}{'vs peft':>9}{'min..max':>15}{'vs full':>9}{'saved MB':>10}"]
        for name in self.timing.seconds:
            median, low, high = self.timing.ratio(name, "peft lora")
            full = self.timing.ratio(name, "full fine-tuning")[0]
            saved = self.saved_bytes[name] / 1e6
            lines.append(f"{name:<22}{median:>9.3f}{f'{low:.2f}..{high:.2f}':>15}{full:>9.3f}{saved:>10.1f}")
        return "\n".join(lines)


def run(rounds: int = 9, device: str = "cpu") -> list[CoreResult]:
    """Measure both models; the target is a `vismt lora` row at or below 0.90 (ViT) and 0.93 (Llama) of peft."""
    where = torch.device(device)
    return [
        _compare("timm ViT-S/16, 8 x 224 px", *_vit(where), rounds, where),
        _compare("Llama 512 x 8, 4 x 128 tokens", *_llama(where), rounds, where),
    ]


def _compare(
    title: str,
    model: nn.Module,
    step: Callable[[nn.Module], torch.Tensor],
    head: str,
    rounds: int,
    device: torch.device,
) -> CoreResult:
    variants = _variants(model, head)

    def backward(variant: nn.Module) -> Callable[[], None]:
        def call() -> None:
            variant.zero_grad(set_to_none=True)
            step(variant).backward()

        return call

    saved = {name: saved_activation_bytes(variant, partial(step, variant)) for name, variant in variants.items()}
    calls = {name: backward(variant) for name, variant in variants.items()}
    timing = interleave(calls, rounds, label=title, device=device)
    return CoreResult(title, timing, saved)


def _variants(model: nn.Module, head: str) -> dict[str, nn.Module]:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError('bench core compares with peft, which is not installed: pip install "vismt[llm]".') from error
    floor = copy.deepcopy(model).requires_grad_(False)
    floor.get_submodule(head).requires_grad_(True)
    lora, principal = copy.deepcopy(model), copy.deepcopy(model)
    report = adapt(lora, "lora", rank=RANK, also_train=[head])
    adapt(principal, "pissa", rank=RANK, also_train=[head])
    paths = [site.path for site in report.sites]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=paths, modules_to_save=[head])
    return {
        "vismt lora": lora,
        "peft lora": get_peft_model(copy.deepcopy(model), config),
        "vismt pissa": principal,
        "full fine-tuning": model,
        "head only (floor)": floor,
    }


def _vit(device: torch.device) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor], str]:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224").to(device).train()
    images, labels = torch.randn(8, 3, 224, 224, device=device), torch.randint(0, 1000, (8,), device=device)
    return model, lambda variant: nn.functional.cross_entropy(variant(images), labels), "head"


def _llama(device: torch.device) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor], str]:
    model = llama(device).train()
    tokens = torch.randint(0, 2048, (4, 128), device=device)
    return model, lambda variant: variant(input_ids=tokens, labels=tokens).loss, "lm_head"


def llama(device: torch.device) -> nn.Module:
    """Return a random Llama of hidden 512, 8 layers, ffn 1376, vocabulary 2048."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError('this benchmark needs transformers: pip install "vismt[llm]".') from error
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=512,
        num_hidden_layers=8,
        intermediate_size=1376,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=2048,
    )
    return LlamaForCausalLM(shape).to(device)
