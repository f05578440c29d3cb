"""The weight attack: numbers by hand, its size and direction on a ViT's factors (I7), small gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.amt_parts import adapted, episode
from helpers.tiny import shake, snapshot
from torch import Tensor, nn
from torch.func import functional_call

from vismt.base.errors import UserError
from vismt.metatune.amt.weight_attack import weight_perturbation


def leaf(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def test_by_hand() -> None:
    # w = (3, 4), |w| = 5, gradient (2, 0): nu = 0.1 * 5 * (1, 0). u = 2, gradient -10: nu = 0.1 * 2 * -1.
    # One norm over both tensors would give |(w, u)| = sqrt(29), |g| = sqrt(104) and nu_w = (0.1056, 0), nu_u = -0.528.
    w, u = leaf(3.0, 4.0), leaf(2.0)
    nu = weight_perturbation(2 * w[0] - 10 * u[0], {"w": w, "u": u}, 0.1)
    assert nu["w"].tolist() == pytest.approx([0.5, 0.0]) and nu["u"].tolist() == pytest.approx([-0.2])
    plain = weight_perturbation(2 * w[0] - 10 * u[0], {"w": w, "u": u}, 0.1, form="plain")
    assert plain["w"].tolist() == pytest.approx([0.2, 0.0]) and plain["u"].tolist() == pytest.approx([-1.0])
    # Frobenius: a matrix of four ones has |w| = 2; its gradient diag(1, -1) has length sqrt(2).
    m = torch.ones(2, 2, requires_grad=True)
    nu = weight_perturbation(m[0, 0] - m[1, 1], {"m": m}, 1.0)["m"]
    assert nu.flatten().tolist() == pytest.approx([2**0.5, 0, 0, -(2**0.5)])


def loss_of(proto: nn.Module, batch: dict, weights: dict[str, Tensor]) -> Tensor:
    features = functional_call(proto.backbone, weights, (torch.cat([batch["support"], batch["query"]]),))
    ways = batch["support_labels"].max() + 1
    centres = torch.stack(
        [features[: len(batch["support"])][batch["support_labels"] == k].mean(0) for k in range(ways)]
    )
    query = features[len(batch["support"]) :]
    return F.cross_entropy(10 * F.normalize(query, dim=1) @ F.normalize(centres, dim=1).T, batch["query_labels"])


def test_every_tensor_moves_by_gamma_of_its_norm_along_its_gradient() -> None:
    proto, batch = adapted(), episode(0)
    shake(proto.backbone.vit)
    parameters = dict(proto.backbone.named_parameters())
    factors = {name: p for name, p in parameters.items() if ".lora_" in name}
    before = snapshot(proto)
    nu = weight_perturbation(loss_of(proto, batch, {}), factors, 0.01)
    gradients = torch.autograd.grad(loss_of(proto, batch, {}), list(factors.values()))
    assert set(nu) == set(factors) and len(nu) == 16
    for (name, p), gradient in zip(factors.items(), gradients):
        assert float(nu[name].norm() / p.detach().norm()) == pytest.approx(0.01, rel=1e-4)
        assert float(F.cosine_similarity(nu[name].flatten(), gradient.flatten(), 0)) > 0.9999
        assert not nu[name].requires_grad and nu[name].shape == p.shape and nu[name].dtype == p.dtype
    assert all(torch.equal(before[name], value) for name, value in proto.state_dict().items())
    assert all(p.grad is None for p in parameters.values())
    with torch.no_grad():
        start = loss_of(proto, batch, {})
        for gamma in (1e-3, 1e-2):
            nu = weight_perturbation_at(proto, batch, factors, gamma)
            up = loss_of(proto, batch, {name: p + nu[name] for name, p in factors.items()})
            down = loss_of(proto, batch, {name: p - nu[name] for name, p in factors.items()})
            assert down < start < up
    assert all(value.abs().max() == 0 for value in weight_perturbation_at(proto, batch, factors, 0.0).values())


def weight_perturbation_at(
    proto: nn.Module, batch: dict, factors: dict[str, Tensor], gamma: float
) -> dict[str, Tensor]:
    with torch.enable_grad():
        return weight_perturbation(loss_of(proto, batch, {}), factors, gamma)


def test_no_gradient_no_move() -> None:
    w, unreached, flat, zero = leaf(1.0, 2.0), leaf(1.0), leaf(1.0), leaf(0.0)
    loss = w.sum() + 0 * flat[0] + 3 * zero[0]
    for form in ("normalised", "plain"):
        nu = weight_perturbation(
            loss, {"w": w, "unreached": unreached, "flat": flat, "zero": zero}, 0.5, form=form, retain_graph=True
        )
        assert nu["unreached"].tolist() == nu["flat"].tolist() == [0.0] and nu["w"].min() > 0
        assert nu["zero"].item() == (0.0 if form == "normalised" else 1.5)
    assert weight_perturbation(loss, {}, 0.5) == {}


@pytest.mark.parametrize("slope", [1e-30, 1e-12, 1.0, 1e20])
def test_the_direction_does_not_depend_on_the_gradients_size(slope: float) -> None:
    """Squares of 1e-30 are zero in fp32 and squares of 1e20 infinite."""
    w = leaf(3.0, 4.0)
    nu = weight_perturbation(slope * (3 * w[0] + 4 * w[1]), {"w": w}, 0.1)["w"]
    assert nu.tolist() == pytest.approx([0.3, 0.4], rel=1e-5)


def test_small_gradients_survive_half_precision() -> None:
    """A gradient of 1e-8 passes through fp16, with a least number of 6e-8."""
    w = leaf(1.0, 2.0)
    nu = weight_perturbation((w.half().float() * torch.tensor([1e-8, 3e-8])).sum(), {"w": w}, 0.1)["w"]
    assert nu.tolist() == pytest.approx([0.1 * 5**0.5 / 10**0.5, 0.3 * 5**0.5 / 10**0.5], rel=0.02)
    plain = weight_perturbation((w.half().float() * torch.tensor([1e-8, 3e-8])).sum(), {"w": w}, 1.0, form="plain")["w"]
    assert plain.tolist() == pytest.approx([1e-8, 3e-8], rel=0.02)


def test_dtypes() -> None:
    # 400 entries of 6000: |w| = 120,000 is above fp16's largest number, the move of 60 is not.
    w = torch.full((20, 20), 6000.0, dtype=torch.float16, requires_grad=True)
    nu = weight_perturbation(w.float().sum(), {"w": w}, 0.01)["w"]
    assert nu.dtype == torch.float16 and torch.allclose(nu.float(), torch.tensor(60.0), atol=0.05)
    exact = leaf(1.0, 1e-9, dtype=torch.float64)
    nu = weight_perturbation((exact * torch.tensor([1.0, 1e-9]).double()).sum(), {"w": exact}, 1.0)["w"]
    assert nu.dtype == torch.float64 and nu.tolist() == pytest.approx([1.0, 1e-9], rel=1e-12)


def test_the_graph_is_kept_on_request() -> None:
    w = leaf(1.0, 2.0)
    loss = w.square().sum()
    weight_perturbation(loss, {"w": w}, 0.1, retain_graph=True)
    weight_perturbation(loss, {"w": w}, 0.1)
    with pytest.raises(RuntimeError, match="second time"):
        weight_perturbation(loss, {"w": w}, 0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"gamma": -1.0}, "gamma -1.0"),
        ({"gamma": float("nan")}, "gamma nan"),
        ({"gamma": float("inf")}, "gamma inf"),
        ({"form": "normalized"}, "'normalized'. Near: 'normalised'"),
        ({"loss": torch.ones(2)}, r"loss of shape \(2,\)"),
    ],
)
def test_errors(call: dict, message: str) -> None:
    w = leaf(1.0)
    arguments = {"loss": w.sum(), "named_params": {"w": w}, "gamma": 0.1, **call}
    loss, parameters, gamma = (arguments.pop(name) for name in ("loss", "named_params", "gamma"))
    with pytest.raises(UserError, match=message):
        weight_perturbation(loss, parameters, gamma, **arguments)
