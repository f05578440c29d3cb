"""`python -m scripts.bench floor`: The part of a LoRA step of rank 16 that every implementation has to compute.

On n tokens a frozen linear (o x i) has two products, W x and W^T g: 4 n i o FLOPs. Its factors have six thin ones, x A^T, h B^T,
g B and those of the gradients of A, B and x: 6 n r (i + o) FLOPs. Each reads or writes all of x or y, so their rate is lower.
The floor is a step of the stock model, in which the gradient runs back to the first adapted layers and only the head's weight has
one, and the thin products alone, on tensors that exist beforehand. The models are those of `core`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from scripts.bench import core
from scripts.bench.core import HALF, LORA, PEFT, PEFT_HALF, Loss
from scripts.bench.timing import Ratios, interleave
from vismt import unadapt
from vismt.lowrank.layers.base import adapter_layers

FLOOR, FROZEN, THIN = "floor", "frozen products", "thin products"
SMALL = 1e-9  # what is added in place, so that repetitions stay finite; at 0 the product would be left out


@dataclass(frozen=True)
class Products:
    """Tensors of the sizes of one adapted linear: x (n, i) and y (n, o), which also stand for their gradients, W, A and B.

    inner: whether x has a gradient.
    """

    x: Tensor
    y: Tensor
    W: Tensor
    A: Tensor
    B: Tensor
    inner: bool

    def gigaflops(self) -> tuple[float, float]:
        """Return those of the frozen and of the thin products."""
        rows = 2e-9 * len(self.x)
        return rows * (1 + self.inner) * self.W.numel(), rows * ((2 + self.inner) * self.A.numel() + 3 * self.B.numel())

    def frozen(self) -> None:
        self.x @ self.W.t()
        if self.inner:
            self.y @ self.W

    def thin(self) -> None:
        hidden = self.x @ self.A.t()
        self.y.addmm_(hidden, self.B.t(), alpha=SMALL)
        at_hidden = self.y @ self.B
        hidden.t() @ self.y
        at_hidden.t() @ self.x
        if self.inner:
            self.x.addmm_(at_hidden, self.A, alpha=SMALL)


def run(rounds: int = 9, device: str = "cpu") -> list[Ratios]:
    """Measure both models in float32 and in bfloat16."""
    where = torch.device(device)
    results = []
    vit = partial(core._vit, batch=8, size=224)
    for title, make in (("timm ViT-S/16, 8 x 224 px", vit), ("Llama 512 x 8, 4 x 128 tokens", core._llama)):
        model, loss, head = make(where)
        variants = core._variants(model, head)
        for kind, (lora, peft) in {"": (LORA, PEFT), ", bf16": (HALF, PEFT_HALF)}.items():
            results.append(compare(title + kind, variants[lora], variants[peft], loss, head, rounds, where))
    return results


def compare(
    title: str, lora: nn.Module, peft: nn.Module, loss: Loss, head: str, rounds: int, device: torch.device
) -> Ratios:
    """Time a step of a model with our LoRA, with peft's, and the floor. head: path of the trained head."""
    products = _products(lora, loss)
    stock = unadapt(copy.deepcopy(lora)).requires_grad_(False)
    stock.get_submodule(head).requires_grad_(True)
    for path, part in products.items():
        if not part.inner:
            stock.get_submodule(path).register_forward_hook(lambda module, inputs, output: output.requires_grad_())

    def step(model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        loss(model).backward()

    @torch.no_grad()
    def each(kind: Callable[[Products], None]) -> None:
        for part in products.values():
            kind(part)

    def floor() -> None:
        step(stock)
        each(Products.thin)

    calls = {LORA: partial(step, lora), PEFT: partial(step, peft), FLOOR: floor}
    calls |= {FROZEN: partial(each, Products.frozen), THIN: partial(each, Products.thin)}
    timing = interleave(calls, rounds, label=title, device=device)
    frozen, thin = (sum(counts) for counts in zip(*(part.gigaflops() for part in products.values())))
    title = f"{title}; {frozen:.1f} GFLOP of frozen and {thin:.1f} of thin products"
    return Ratios(title, timing, [(name, PEFT, None) for name in (LORA, FLOOR, FROZEN, THIN)])


def _products(lora: nn.Module, loss: Loss) -> dict[str, Products]:
    """Return the products of each adapted layer, of the sizes and dtype that it has in a forward pass."""
    found: dict[str, Products] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], *, path: str) -> None:
        x = torch.randn_like(inputs[0].detach().flatten(0, -2))
        W, A, B = (layer.get_parameter(name).detach().to(x.dtype) for name in ("weight", "lora_A", "lora_B"))
        found[path] = Products(x, x.new_zeros(len(x), len(W)).normal_(), W, A, B, inputs[0].requires_grad)

    layers = adapter_layers(lora)
    hooks = [layer.register_forward_pre_hook(partial(note, path=path)) for path, layer in layers.items()]
    loss(lora)
    for hook in hooks:
        hook.remove()
    return found
