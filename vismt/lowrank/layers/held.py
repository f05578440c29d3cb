"""A parameter that its module reads itself, with a low-rank update for each of its matrices (held.py).

    W_e + s * (B_e C_e A_e - B0_e A0_e)        A (e, r, i), B (e, o, r), kept as (e*r, i) and (e*o, r): an expert is a block

The whole sum is formed once a forward of the module, in W's dtype: a tensor of the size of W for each adapted parameter, which
stays until the module's backward, and there a gradient of that size. Without gradients it is freed when the module returns.
In bf16 the sum has the spacing of W's numbers, as a merged weight has. Dropout and gates, which act on an input, do not apply.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.utils._pytree import tree_map_only

from vismt.lowrank.layers.low_rank import FORMS, LowRankLayer


@FORMS.register("parameter")
class LowRankHeld(LowRankLayer):
    """A HeldParameter with an update. It stands for the tensor W + DeltaW in functions of torch."""

    held = True

    def matrix(self, weight: Tensor) -> Tensor:
        return self.shell.matrix(weight)

    def stored(self, matrix: Tensor) -> Tensor:
        return self.shell.stored(matrix, self.weight)

    def forward(self) -> Tensor:
        """Return W + DeltaW; called, so that hooks on this module (offloading, sharding) bring its tensors first."""
        return self.formed()

    def formed(self) -> Tensor:
        if self.weight.ndim == 2 or len(self.blocks) != len(self.weight):
            return super().formed()
        # A stack is not copied to be put together as one matrix.
        return self.summed(self.weight.mT).mT if self.shell.transposed else self.summed(self.weight)

    def stack(self) -> tuple[Tensor, Tensor]:
        """Return A (e, k, i) and B (e, o, k) of the whole update in fp32, the scale in B: k = r, 2r with a start."""
        count, blocks = self.weight.shape[0], len(self.blocks)
        pairs = [(self.right(), self.fixed_left(), self.scale)]
        if self.lora_A0 is not None:
            pairs.append((self.lora_A0, self.lora_B0, -self.scale))
        # One block, as a sum of adapters has, is one A for all experts.
        A = [rearrange(a, "(g r) i -> g r i", g=blocks).expand(count, -1, -1) for a, _, _ in pairs]
        B = [scale * rearrange(b, "(e o) r -> e o r", e=count) for _, b, scale in pairs]
        return torch.cat(A, 1).detach().float(), torch.cat(B, 2).detach().float()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(cls, lambda layer: layer.formed(), (args, kwargs or {}))
        return func(*args, **kwargs)
