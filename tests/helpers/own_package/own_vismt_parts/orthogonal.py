"""A method of a user: LoRA that starts at orthonormal rows of A."""

import torch

from vismt.lowrank.layers.low_rank import LowRankLayer
from vismt.lowrank.model.inject import inject
from vismt.methods import Method, register_method


def start(weight, rank, scale, generator):
    rows = torch.linalg.qr(torch.randn(weight.shape[1], rank, generator=generator)).Q.T
    return rows, torch.zeros(len(weight), rank)


def orthogonal(model, *, targets, rank, alpha, seed, **options):
    """Orthonormal rows in A, zero B."""
    return inject(
        model, "orthogonal", start, offset=False, targets=targets, rank=rank, alpha=alpha, seed=seed, **options
    )


register_method(Method("orthogonal", orthogonal, layers=(LowRankLayer,)))
