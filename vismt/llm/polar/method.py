"""PoLAR: W x + s X Theta Y^T x with Theta free and X, Y held near orthonormal columns (Lion et al., arXiv 2506.03133).

    X (o, r), Y (i, r): X^T X = Y^T Y = I;   Theta (r, r) = 0 at the start;   s = alpha / r

A layer holds lora_B = X, lora_C = Theta and lora_A = Y^T. With split_qkv each block has its own. The forward pass does not keep
X and Y near the manifold. The optimiser `Landing` (landing.py), which wraps any other optimiser, does. The training loop adds
it for an adapted model.

Code and paper differ in constants, see vismt/llm/polar/stiefel.py. The code is followed, so its attractions can be used (5e-3,
and 1 on GLUE). With Adam and 5e-3 the factors do leave the manifold. The infeasibility is logged, and the stable rank of the
update differs from the stable rank of Theta. A diagonal Theta starts at zero here. In the released code it does not, so that
training begins at another function. Published rates are about ten times LoRA's (4e-3 against 4e-4). Left out: Theta = I, whose
start is not W.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vismt.base.errors import require_known
from vismt.llm.polar import stiefel
from vismt.llm.polar.landing import Landing, check_constraint
from vismt.lowrank.layers.low_rank import LowRankLayer
from vismt.lowrank.model.inject import InjectOptions, inject
from vismt.lowrank.model.record import AdaptReport, need_record
from vismt.lowrank.model.targets import Targets
from vismt.lowrank.svd import working_dtype
from vismt.methods import Method, register_method

if TYPE_CHECKING:
    from typing_extensions import Unpack

THETAS = ("full", "diagonal")


def polar(
    model: nn.Module,
    *,
    targets: Targets,
    seed: int,
    theta: str = "full",
    attraction: float = 5e-3,
    constraint: str = "landing",
    **options: Unpack[InjectOptions],
) -> AdaptReport:
    """Add orthonormal X and Y with zero Theta. The function is unchanged until the first step.

    theta: "full" or "diagonal". Further options are the options of `inject`, and attraction and constraint of the optimiser
    `Landing`.
    """
    require_known("adapt.theta:", [theta], THETAS)
    check_constraint("adapt", attraction, constraint)

    def start(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        B, A = (orthonormal(size, rank, generator).to(working_dtype(weight)) for size in weight.shape)
        return A.mT, B

    report = inject(
        model, "polar", start, offset=False, targets=targets, seed=seed, settings={"core": theta}, **options
    )
    need_record(model, "polar").options.update(attraction=float(attraction), constraint=constraint)
    return report


def orthonormal(size: int, rank: int, generator: torch.Generator) -> Tensor:
    """Return a (size, rank) matrix in fp64 on the CPU with orthonormal columns, uniform over all such matrices."""
    drawn = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    return stiefel.qr_retraction(drawn, torch.zeros_like(drawn))


def landing(optimizer: torch.optim.Optimizer, model: nn.Module) -> Landing:
    """Return the optimiser inside a `Landing` with the settings that the model was adapted with."""
    options: Any = need_record(model, "Landing").options
    return Landing(optimizer, model, options.get("attraction"), constraint=options.get("constraint"))


register_method(Method("polar", polar, layers=(LowRankLayer,), optimizer=landing))
