"""PoLAR: W x + s X Theta Y^T x with Theta free and X, Y held near orthonormal columns (Lion et al., arXiv 2506.03133).

    X (o, r), Y (i, r): X^T X = Y^T Y = I;   Theta (r, r) = 0 at the start;   s = alpha / r

A layer holds lora_B = X, lora_C = Theta, lora_A = Y^T; with split_qkv each block has its own. Nothing in the forward pass
keeps X and Y on the manifold: `Landing` (landing.py) does, an optimiser around another, which the training loop adds for an
adapted model.

Code and paper differ in constants, see vismt/llm/polar/stiefel.py: the code is followed, so its attractions hold (5e-3; on
GLUE 1). With Adam and 5e-3 the factors do leave the manifold: the infeasibility is logged, and the update's stable rank is
not Theta's. A diagonal Theta starts at zero here; in the released code it does not, and training begins at another
function. Published rates are about ten times those of LoRA (4e-3 against 4e-4). Left out: Theta = I, whose start is not W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vismt.base.errors import require_known
from vismt.llm.polar import stiefel
from vismt.llm.polar.landing import Landing, check_constraint
from vismt.lowrank.layers.low_rank import LowRankLayer
from vismt.lowrank.model.inject import inject
from vismt.lowrank.model.record import AdaptReport, record_of
from vismt.lowrank.svd import working_dtype
from vismt.methods import Method, register_method

THETAS = ("full", "diagonal")


def polar(
    model: nn.Module, *, theta: str = "full", attraction: float = 5e-3, constraint: str = "landing", **options: Any
) -> AdaptReport:
    """Add orthonormal X and Y with zero Theta: the function is unchanged until the first step.

    theta: "full" or "diagonal". Of the optimiser `Landing`, attraction and constraint. Further options: those of `inject`.
    """
    require_known("adapt.theta:", [theta], THETAS)
    check_constraint("adapt", attraction, constraint)

    def start(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        B, A = (orthonormal(size, rank, generator).to(working_dtype(weight)) for size in weight.shape)
        return A.mT, B

    report = inject(model, "polar", start, offset=False, settings={"core": theta}, **options)
    record_of(model).options.update(attraction=float(attraction), constraint=constraint)
    return report


def orthonormal(size: int, rank: int, generator: torch.Generator) -> Tensor:
    """Return a (size, rank) matrix in fp64 on the CPU with orthonormal columns, uniform over all such matrices."""
    drawn = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    return stiefel.qr_retraction(drawn, torch.zeros_like(drawn))


def landing(optimizer: torch.optim.Optimizer, model: nn.Module) -> Landing:
    """Return the optimiser inside `Landing`, with the settings that the model was adapted with."""
    options = record_of(model).options
    return Landing(optimizer, model, options.get("attraction"), constraint=options.get("constraint"))


register_method(Method("polar", polar, layers=(LowRankLayer,), optimizer=landing))
