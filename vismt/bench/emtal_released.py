"""A MoEfied LoRA model the way EMTAL's released code computes it: the yardstick of `vismt bench emtal`, in our own words.

Same function, same gradients as vismt.multitask.moe_lora. What differs is how it is computed:

    linears     factors stored as A (i, r) and B (r, o); base product, (x A) B, its scaling and the sum are four results
    router      softmax, ((1 - a) g + a / K) K, spread to (b, n, H), then multiplied onto the pre-activations: backward
                keeps pre-activations, spread weights and the product
    attention   q k^T, its scaling, softmax, dropout and the product with v, each written out as (b, heads, n, n); the class
                token's row comes back as a map, which the loss does not use

Kept on our side's terms, so that only this is compared: timm's patch embedding, norms, activation, head and dropout of
p = 0; fp32; the coefficient is state (the release takes it as an argument with a default of a half). Left out: fp16
autocast and its scaler, the dropout of p = 0 on the updates of the later blocks, the difference of two blocks' maps, the
stored logits of quality retaining, and the sizes that the release writes as numbers (768, 16, 192, 14 x 14).
Source: github.com/Yewen1486/EMTAL, one commit.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from vismt.lowrank.linear import Adapted
from vismt.multitask.moefied import MoEfiedMlp


class Linear(nn.Module):
    """x (..., i) -> W x + b + s (x A) B, A (i, r), B (r, o)."""

    def __init__(self, host: Adapted) -> None:
        super().__init__()
        self.lora_a, self.lora_b = (
            nn.Parameter(factor.detach().t().contiguous()) for factor in (host.lora_A, host.lora_B)
        )
        self.base, self.scale = host.restored(), host.scale

    def forward(self, x: Tensor) -> Tensor:
        update = self.scale * (x @ self.lora_a @ self.lora_b)
        return self.base(x) + update


class Ffn(nn.Module):
    """x (b, n, d) and the coefficient a -> (b, n, d)."""

    def __init__(self, mlp: MoEfiedMlp) -> None:
        super().__init__()
        self.fc1, self.fc2, self.router = Linear(mlp.fc1), Linear(mlp.fc2), mlp.lora_router
        self.act, self.drop1, self.drop2 = mlp.act, mlp.drop1, mlp.drop2
        self.temperature, self.hidden = mlp.temperature, mlp.fc1.out_features

    def forward(self, x: Tensor, fade: float) -> Tensor:
        shares = (self.router(x) / self.temperature).softmax(-1)
        experts = shares.shape[-1]
        omega = spread(((1 - fade) * shares + fade / experts) * experts, self.hidden)
        units = self.fc1(x) * omega
        return self.drop2(self.fc2(self.drop1(self.act(units))))


class Attention(nn.Module):
    """x (b, n, d) -> (b, n, d) and the class token's attention to the patches, (b, heads, side, side)."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj = Linear(attention.qkv), Linear(attention.proj)
        self.attn_drop, self.proj_drop = attention.attn_drop, attention.proj_drop
        self.heads, self.scale = attention.num_heads, attention.scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        images, tokens, width = x.shape
        parts = self.qkv(x).view(images, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        shares = self.attn_drop(((query @ key.mT) * self.scale).softmax(-1))
        out = (shares @ value).transpose(1, 2).reshape(images, tokens, width)
        side = math.isqrt(tokens - 1)
        return self.proj_drop(self.proj(out)), shares[:, :, 0, 1:].reshape(images, self.heads, side, side)


class Blocks(nn.Sequential):
    """timm's pre-norm blocks with the layers above in them, one after another."""

    def __init__(self, blocks: nn.Sequential, fade: float) -> None:
        super().__init__(*blocks)
        self.fade = fade

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            out, _ = block.attn(block.norm1(x))
            x = x + block.drop_path1(block.ls1(out))
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x), self.fade)))
        return x


def spread(weights: Tensor, hidden: int) -> Tensor:
    """(b, n, e) -> (b, n, H): unit h gets the weight of expert h // (H / e)."""
    units = hidden // weights.shape[-1]
    return weights.unsqueeze(-1).expand(*weights.shape, units).reshape(*weights.shape[:-1], hidden)


@torch.no_grad()
def released(model: nn.Module) -> nn.Module:
    """A copy of a timm ViT adapted with 'moe_lora' (one fused qkv, no qk norm), at its fade; the same is trainable in it."""
    twin = copy.deepcopy(model)
    fade = twin.blocks[0].mlp.fade_value
    for block in twin.blocks:
        block.attn, block.mlp = Attention(block.attn), Ffn(block.mlp)
    twin.blocks = Blocks(twin.blocks, fade)
    return twin
