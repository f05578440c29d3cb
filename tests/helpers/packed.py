"""Models with weights in packed formats, on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn


def four_bits(model: nn.Module) -> nn.Module:
    """Replace every linear but the head by one of bitsandbytes in NF4 with quantised scales."""
    bnb = pytest.importorskip("bitsandbytes")

    def pack(linear: nn.Linear) -> nn.Module:
        packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, quant_type="nf4")
        packed.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4")
        return packed

    return _replaced(model, pack)


def eight_bits(model: nn.Module) -> nn.Module:
    """Replace every linear but the head by one of bitsandbytes in LLM.int8."""
    bnb = pytest.importorskip("bitsandbytes")

    def pack(linear: nn.Linear) -> nn.Module:
        packed = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
        packed.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        return packed

    return _replaced(model, pack)


def torchao_int8(model: nn.Module) -> nn.Module:
    """Pack the weights of every linear but the head as int8 of torchao."""
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=_is_packed)
    return model


def torchao_int4(model: nn.Module) -> nn.Module:
    """Pack the weights of every linear but the head as int4 of torchao, in groups of 32."""
    quantization = pytest.importorskip("torchao.quantization")
    import torch

    config = quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=quantization.granularity.PerGroup(32)
    )
    quantization.quantize_(model, config, filter_fn=_is_packed)
    return model


FORMATS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bitsandbytes-4": four_bits,
    "bitsandbytes-8": eight_bits,
    "torchao-int8": torchao_int8,
    "torchao-int4": torchao_int4,
}


def _is_packed(module: nn.Module, path: str) -> bool:
    return isinstance(module, nn.Linear) and path.split(".")[0] not in ("lm_head", "head")


def _replaced(model: nn.Module, pack: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for path, module in list(model.named_modules()):
        if not _is_packed(module, path):
            continue
        packed = pack(module)
        packed.bias = module.bias
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, packed.to("cpu"))
    return model
