"""The forms of a low-rank layer, one form for each kind of stock module: linear, convolution, embedding, parameter, prequantized.

linear        y = W x + b + s (B C A x - B0 A0 x)             one fused forward and backward (fused.py) convolution   y = W * x
+ b + s (B C (A * x) - B0 (A0 * x))   A (r, c / groups * kernel), B (o, r) as a 1 x 1 convolution embedding     y = W[ids] + s
(B[ids] C A - B0[ids] A0)        A (r, d), B (v, r) with a row for each of v entries parameter     W_e + s (B_e C_e A_e - B0_e
A0_e)               read by its own module (parameter_modules.py) prequantized  y = linear(x) + s (B C A x - B0 A0 x)
the stock module with its weight of bitsandbytes or torchao
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from vismt.base.errors import UserError
from vismt.lowrank.factors import LowRank
from vismt.lowrank.layers.base import in_autocast, inner_module
from vismt.lowrank.layers.fused import FusedLowRank
from vismt.lowrank.layers.low_rank import FORMS, LayerOptions, LowRankLayer
from vismt.lowrank.layers.stock_modules import dense_weight, weight_format

if TYPE_CHECKING:
    from typing_extensions import Unpack

GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


@FORMS.register("linear")
@FORMS.register("conv1d")
class LowRankLinear(LowRankLayer):
    """nn.Linear, or transformers' Conv1D (its weight is stored as (i, o)), with a low-rank update.

    forward: x (..., i) -> (..., o), in the dtype of x, or of autocast if it is on.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = in_autocast(x)
        weight, gate = self.matrix(self.frozen), self.gate(x)
        if self.dropout and self.training:
            out = F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
            return out + (self.scale * self.change_of(x.reshape(-1, x.shape[-1]), gate)).view(out.shape)
        # For one generated token, the bookkeeping of autograd takes longer than the products.
        fused = FusedLowRank.apply if torch.is_grad_enabled() else FusedLowRank.forward
        factors = self.right(), self.left(), self.lora_A0, self.lora_B0
        return fused(x, weight, self.bias, *factors, gate, self.scale, self.blocks)[0]


@FORMS.register("conv2d")
@FORMS.register("nn.Conv1d")
@FORMS.register("nn.Conv3d")
class LowRankConv(LowRankLayer):
    """nn.Conv1d, Conv2d or Conv3d with a low-rank update.

    A is a convolution of the same geometry with r output channels, and B is a 1x1 convolution. forward: x (b, c, ...) -> (b, o,
    ...). The matrix form is the weight reshaped to (o, c / groups * kernel). With groups, every group has the same A on its own
    channels, and its own rows of B.
    """

    groups: int
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: str

    def __init__(self, base: nn.Module, rank: int, scale: float, **options: Unpack[LayerOptions]) -> None:
        super().__init__(base, rank, scale, **options)
        for name in GEOMETRY:
            setattr(self, name, getattr(base, name))

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        out = self.shell._conv_forward(x, self.frozen, self.bias)
        inner = F.dropout(x, self.dropout, self.training)
        out = self._add_product(out, inner, self.lora_A, self.left(), self.scale, self.gate(inner))
        if self.lora_A0 is not None:
            out = self._add_product(out, x, self.lora_A0, self.lora_B0, -self.scale)
        return out

    def peft_factors(self, update: LowRank) -> tuple[Tensor, Tensor]:
        """Return A (r, c, ...) and B (o, r, 1, ...)."""
        if self.groups > 1 or set(self.dilation) != {1} or self.padding_mode != "zeros":
            raise UserError(
                "export_peft: peft's LoRA of a convolution has no dilation, no padding mode and another form for groups; merge "
                "the model and save it whole."
            )
        A, B = super().peft_factors(update)
        return A.view(-1, *self.weight.shape[1:]), self._pointwise(B)

    def _add_product(
        self, out: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, gate: Tensor | None = None
    ) -> Tensor:
        """Return `out` (b, o, ...) plus scale * B (A * x). Without groups the sum is made in place by one batched product."""
        kernel = A.to(self.weight.dtype).view(-1, *self.weight.shape[1:])
        hidden = self.shell._conv_forward(x, repeat(kernel, "r ... -> (g r) ...", g=self.groups), None)
        if gate is not None:
            hidden = (hidden * self._pointwise(gate.repeat(1, self.groups))).to(out.dtype)
        B = B.to(hidden.dtype) * scale
        axes = len(self.kernel_size)
        if self.groups > 1:
            convolve = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
            return out.add_(convolve(hidden, self._pointwise(B), groups=self.groups))
        # A single sample (o, ...) or a batch. In any memory format, the rows of `out` are a view.
        rows, columns = ((t if t.ndim > axes + 1 else t[None]).flatten(2) for t in (out, hidden))
        rows.baddbmm_(B.expand(len(rows), -1, -1), columns)
        return out

    def _pointwise(self, matrix: Tensor) -> Tensor:
        """Return a matrix with an axis of length one for each axis of the kernel."""
        return matrix.reshape(*matrix.shape, *(1 for _ in self.kernel_size))


@FORMS.register("embedding")
class LowRankEmbedding(LowRankLayer):
    """nn.Embedding with a low-rank update. forward: ids (...) int64 -> (..., d).

    With LoRA, B starts at zero, so an entry that never occurs keeps its vector. peft transposes the table in its files:
    lora_embedding_A is B^T (r, v), lora_embedding_B is A^T (d, r).
    """

    peft_names = ("lora_embedding_A", "lora_embedding_B")

    def forward(self, ids: Tensor) -> Tensor:
        out = F.embedding(ids, self.weight, self.shell.padding_idx)
        out = out + self._product(ids, self.lora_A, self.left()).to(out.dtype)
        return out if self.lora_A0 is None else out - self._product(ids, self.lora_A0, self.lora_B0).to(out.dtype)

    def _product(self, ids: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return self.scale * F.embedding(ids, B, self.shell.padding_idx) @ A

    def peft_factors(self, update: LowRank) -> tuple[Tensor, Tensor]:
        return (update.B * update.scale).t(), update.A.t()


@FORMS.register("parameter")
class LowRankParameter(LowRankLayer):
    """A parameter that its module reads itself, with an update for each of its matrices (one block for each expert).

    It stands for the tensor W + DeltaW in functions of torch. A (e, r, i) and B (e, o, r) are kept as (e*r, i) and (e*o, r).
    The sum is made once in each forward of the module, in W's dtype. It takes a tensor of the size of W for each adapted
    parameter until the module's backward, and a gradient of that size there. Without gradients the sum is freed when the module
    returns. In bf16 the sum has the spacing of W's numbers, as a merged weight has. Dropout and gates act on an input, so they
    do not apply here.
    """

    of_parameter = True

    def matrix(self, weight: Tensor) -> Tensor:
        return self.shell.matrix(weight)

    def stored(self, matrix: Tensor) -> Tensor:
        return self.shell.stored(matrix, self.weight)

    def forward(self) -> Tensor:
        """Return W + DeltaW.

        This is a call, so that hooks on this module (offloading, sharding) bring its tensors first.
        """
        return self.adapted_weight()

    def adapted_weight(self) -> Tensor:
        if self.weight.ndim == 2 or len(self.blocks) != len(self.weight):
            return super().adapted_weight()
        # A stack is not copied to make one matrix.
        return self.add_update(self.weight.mT).mT if self.shell.transposed else self.add_update(self.weight)

    def stack(self) -> tuple[Tensor, Tensor]:
        """Return A (e, k, i) and B (e, o, k) of the whole update in fp32, with the scale in B. k is r, or 2r with a start."""
        count, blocks = self.weight.shape[0], len(self.blocks)
        pairs = [(self.right(), self.left_with_gates(), self.scale)]
        if self.lora_A0 is not None:
            pairs.append((self.lora_A0, self.lora_B0, -self.scale))
        # One block, as a sum of adapters has, means one A for all experts.
        A = [rearrange(a, "(g r) i -> g r i", g=blocks).expand(count, -1, -1) for a, _, _ in pairs]
        B = [scale * rearrange(b, "(e o) r -> e o r", e=count) for _, b, scale in pairs]
        return torch.cat(A, 1).detach().float(), torch.cat(B, 2).detach().float()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: Collection[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        args, kwargs = tree_map_only(cls, lambda layer: layer.adapted_weight(), (args, kwargs or {}))
        return func(*args, **kwargs)


@FORMS.register("prequantized")
class LowRankPrequantized(LowRankLayer):
    """A linear with a prequantized weight. forward: x (..., i) -> (..., o), in the dtype that the stock module returns.

    The fused function reads the weight itself, so it is not used. A start from the weight uses the numbers that the weight
    stands for. The start is subtracted here, so that the weight stays as it is. The update can be exported as a plain LoRA. It
    is not merged, because packing the sum again would round most of the update away.
    """

    inner: nn.Module

    def __init__(self, base: nn.Module, rank: int, scale: float, **options: Unpack[LayerOptions]) -> None:
        super().__init__(base, rank, scale, **options)
        self.__dict__["inner"] = inner_module(base)

    def linked(self) -> nn.Module:
        """Return the stock module with the present weight and bias. A conversion may have replaced them."""
        self.inner._parameters.update(weight=self.weight, bias=self.bias)
        return self.inner

    def stock_weight(self) -> Tensor:
        return dense_weight(self.linked())

    @property
    def in_features(self) -> int:
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        return self.lora_B.shape[0]

    def check_mergeable(self, what: str, path: str) -> None:
        super().check_mergeable(what, path)
        if what != "merge":  # the pair of factors does not depend on the base
            return
        raise UserError(
            f"{what}: '{path}' has a packed weight ({weight_format(self)}), which would round the update away; load the model in "
            "a floating dtype and the adapter on it with on_other_base='warn', and merge there."
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.linked()(x)
        change = self.change_of(x.reshape(-1, x.shape[-1]), self.gate(x))
        return out + (self.scale * change).view(out.shape).to(out.dtype)
