"""A parameter that its module reads itself, with a low-rank update for each of its matrices (held.py).

    W_e + s * (B_e C_e A_e - B0_e A0_e)        A (e, r, i), B (e, o, r), kept as (e*r, i) and (e*o, r): an expert is a block

The whole sum is formed once a forward of the module, in W's dtype: a tensor of the size of W for each adapted parameter, which
stays until the module's backward, and there a gradient of that size. Without gradients it is freed when the module returns.
In bf16 the sum has the spacing of W's numbers, as a merged weight has. There is no input that dropout or gates could act on.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from vismt.lowrank.linear import LowRankLayer


class LowRankHeld(LowRankLayer):
    """A HeldParameter with an update. It stands for the tensor W + DeltaW in functions of torch."""

    held = True

    def matrix(self, weight: Tensor) -> Tensor:
        return self.shell.matrix(weight)

    def stored(self, matrix: Tensor) -> Tensor:
        return self.shell.stored(matrix, self.weight)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(cls, lambda layer: layer.formed(), (args, kwargs or {}))
        return func(*args, **kwargs)
