"""LoRA: W x + (alpha / r) B A x with A kaiming-uniform and B zero (Hu et al., arXiv 2106.09685).

The paper draws A from a Gaussian. Its released code, and every library since, use kaiming_uniform(a=sqrt(5)), which is followed
here. rslora divides alpha by sqrt(r) instead of r (Kalajdzievski, arXiv 2312.03732). Left out: trained biases (name them in
also_train) and DoRA.

quantize="nf4" is QLoRA's model (Dettmers et al., arXiv 2305.14314): Q x + (alpha / r) B A x with Q = nf4(W), kept beside W in
W's dtype (vismt.llm.pissa.quantized). Left out: 4-bit storage, quantised block maxima, paged optimisers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from vismt.llm.pissa.quantized import QuantizedLayer, quantized_layer
from vismt.lowrank.layers.low_rank import LowRankLayer
from vismt.lowrank.model.inject import InjectOptions, inject
from vismt.lowrank.model.record import AdaptReport
from vismt.lowrank.model.targets import Targets
from vismt.lowrank.svd import kaiming
from vismt.methods import Method, register_method

if TYPE_CHECKING:
    from typing_extensions import Unpack


def lora(
    model: nn.Module, *, targets: Targets, seed: int, quantize: str | None = None, **options: Unpack[InjectOptions]
) -> AdaptReport:
    """Add factors with kaiming A and zero B. The function is unchanged until the first step, except by a quantisation.

    quantize: "nf4" or "bitsandbytes" as for "pissa", None for the original weights. Further options are the options of
    `inject`.
    """
    layer = quantized_layer(model, quantize)
    return inject(model, "lora", kaiming, offset=False, targets=targets, seed=seed, **layer, **options)


register_method(Method("lora", lora, layers=(LowRankLayer, QuantizedLayer)))
