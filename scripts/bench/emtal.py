"""`scripts.bench emtal`: the merged model against stock timm, and a routed training step against plain LoRA and the release.

ViT-S/16, 8 x 224 px, random weights, 598 classes; rank 4 on qkv, proj, fc1 and fc2 of every block, 16 experts in the order
of the units. Forward: eval, no gradients. Training step: routers at 0.25, cross-entropy, forward, backward and AdamW on the
trainable parameters with the head. Saved activations as in `bench core`.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from scripts.bench.accounting import saved_activation_bytes
from scripts.bench.core import Step, training_step
from scripts.bench.emtal_released import released
from scripts.bench.timing import SAVED, Ratios, interleave
from vismt.lowrank.model.merge import merge
from vismt.methods import adapt
from vismt.multitask.emtal.method import set_fade

MODEL, SIZE, BATCH, CLASSES, RANK, EXPERTS, FADE = "vit_small_patch16_224", 224, 8, 598, 4, 16, 0.25
STOCK, MERGED, FADED, HALF = "stock timm", "vismt, merged", "vismt, faded (a = 1)", "vismt, routed (a = 0.5)"
ROUTED, PLAIN, RELEASED = f"vismt, routed (a = {FADE})", "vismt lora", "as released"


def run(rounds: int = 9, device: str = "cpu") -> list[Ratios]:
    """Time the forward pass, then the training step."""
    import timm

    where = torch.device(device)
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=CLASSES).to(where)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator).to(where)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator).to(where)
    shape = f"{MODEL}, {BATCH} x {SIZE} px"
    return [
        _forward(f"forward, {shape}", model, images, rounds, where),
        _training(f"training step, {shape}, rank {RANK}", model, images, labels, rounds, where),
    ]


def forms(model: nn.Module) -> dict[str, nn.Module]:
    """Return `model` in eval mode: stock, faded and merged, faded, and half routed."""
    faded, half = _routed(model, 1.0), _routed(model, 0.5)
    variants = {STOCK: copy.deepcopy(model), MERGED: merge(copy.deepcopy(faded)), FADED: faded, HALF: half}
    return {name: variant.eval() for name, variant in variants.items()}


def trainees(model: nn.Module) -> dict[str, nn.Module]:
    """Return `model` in training mode: with routers, with plain LoRA on the same linears, and in the release's layout."""
    routed, plain = _routed(model, FADE), copy.deepcopy(model)
    paths = [
        f"blocks.{n}.{name}"
        for n in range(len(model.blocks))
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    adapt(plain, "lora", targets=paths, rank=RANK, also_train=["head"])
    variants = {ROUTED: routed, PLAIN: plain, RELEASED: released(routed)}
    return {name: variant.train() for name, variant in variants.items()}


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of a batch, ()."""
    return nn.functional.cross_entropy(model(images), labels)


def step_of(model: nn.Module, images: Tensor, labels: Tensor) -> Step:
    """Return a training step with its AdamW; the step returns the loss, ()."""
    return training_step(model, partial(loss_of, model, images, labels), 1e-3, weight_decay=0.05)


def _routed(model: nn.Module, fade: float) -> nn.Module:
    routed = copy.deepcopy(model)
    adapt(routed, "emtal", rank=RANK, n_experts=EXPERTS, cluster=False, also_train=["head"])
    set_fade(routed, fade)
    return routed


def _forward(title: str, model: nn.Module, images: Tensor, rounds: int, device: torch.device) -> Ratios:
    with torch.no_grad():
        calls = {name: partial(form, images) for name, form in forms(model).items()}
        timing = interleave(calls, rounds, label=title, device=device)
    return Ratios(title, timing, [(MERGED, STOCK, 1.02, 0.98)])


def _training(
    title: str, model: nn.Module, images: Tensor, labels: Tensor, rounds: int, device: torch.device
) -> Ratios:
    compared = trainees(model)
    saved = {name: saved_activation_bytes(net, partial(loss_of, net, images, labels)) for name, net in compared.items()}
    steps = {name: step_of(net, images, labels) for name, net in compared.items()}
    timing = interleave(steps, rounds, label=title, device=device)
    return Ratios(title, timing, [(ROUTED, PLAIN, 1.10), (ROUTED, RELEASED, 0.75)], sizes={SAVED: saved})
