"""Laplace on a linear head against autograd's Hessian and drawn weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.vbll_parts import moved_head, wave
from torch import Tensor
from torch.distributions import MultivariateNormal

from vismt.base.errors import UserError
from vismt.llm import Laplace, fit_laplace
from vismt.uncertainty import laplace as laplace_file
from vismt.uncertainty import last_layers
from vismt.uncertainty.laplace import FullCurvature
from vismt.uncertainty.last_layers import LinearAnswerHead, laplace_head, laplace_structure

STRUCTURES = ("full", "rows", "kronecker")
WEIGHT = wave(3, 4, speed=1.3)
TRAIN, TEST = torch.randn(26, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(2).split([20, 6])


def hessian(weight: Tensor, x: Tensor) -> Tensor:
    """Return the Hessian (k d, k d) of the summed NLL by autograd; it does not depend on the labels."""

    def nll(flat: Tensor) -> Tensor:
        return F.cross_entropy(x @ flat.reshape(weight.shape).mT, torch.zeros(len(x)).long(), reduction="sum")

    return torch.autograd.functional.hessian(nll, weight.flatten())


def covariance(laplace: Laplace, x: Tensor) -> Tensor:
    """Return the covariance (b, k, k) of the logits."""
    root = laplace.logit_distribution(x)[1]
    return torch.diag_embed(root.square()) if root.ndim == 2 else root @ root.mT


def expected(structure: str, precision: float) -> Tensor:
    """Return the covariance (k d, k d) of all weights by an explicit inverse."""
    whole = hessian(WEIGHT, TRAIN)
    if structure == "rows":
        whole = whole * torch.block_diag(*[torch.ones(4, 4, dtype=whole.dtype)] * 3)
    if structure == "kronecker":
        p = torch.softmax(TRAIN @ WEIGHT.mT, 1)
        outputs = torch.diag(p.sum(0)) - p.mT @ p
        whole = torch.kron(outputs, TRAIN.mT @ TRAIN / len(TRAIN))
    return torch.linalg.inv(whole + precision * torch.eye(12, dtype=whole.dtype))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_covariance_is_the_inverse_hessian(structure: str) -> None:
    laplace = fit_laplace(WEIGHT, TRAIN.split(7), 0.3, structure)  # batches of 7, 7, 6
    jacobian = torch.stack([torch.kron(torch.eye(3, dtype=TEST.dtype), x[None]) for x in TEST])
    actual = covariance(laplace, TEST)
    assert torch.allclose(actual, jacobian @ expected(structure, 0.3) @ jacobian.mT, atol=1e-10)
    assert (torch.linalg.eigvalsh(actual) > 0).all()
    assert torch.equal(laplace(TEST), TEST @ WEIGHT.mT)
    laplace.prior_precision = 5.0
    assert torch.allclose(covariance(laplace, TEST), jacobian @ expected(structure, 5.0) @ jacobian.mT, atol=1e-10)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_without_data_it_is_the_prior(structure: str) -> None:
    laplace = fit_laplace(WEIGHT, [], 4.0, structure)
    prior = TEST.square().sum(1)[:, None, None] / 4 * torch.eye(3, dtype=TEST.dtype)
    assert torch.allclose(covariance(laplace, TEST), prior, atol=1e-12)


def test_kronecker_is_exact_where_features_do_not_vary() -> None:
    x = TRAIN[:1].expand(9, 4)
    full, kronecker = (covariance(fit_laplace(WEIGHT, [x], 0.5, name), TEST) for name in ("full", "kronecker"))
    assert torch.allclose(full, kronecker, atol=1e-10)


def test_rows_alone_double_the_variance_between_two_classes() -> None:
    weight, flat = WEIGHT[:2], 1e-9  # an uninformative prior
    gap = torch.tensor([1.0, -1.0], dtype=TEST.dtype)
    full, rows = (gap @ covariance(fit_laplace(weight, [TRAIN], flat, name), TEST) @ gap for name in ("full", "rows"))
    assert torch.allclose(rows, 2 * full, rtol=1e-4)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_predictive_is_the_mean_over_drawn_weights(structure: str) -> None:
    laplace = fit_laplace(WEIGHT, [TRAIN], 0.3, structure)
    torch.manual_seed(0)
    weights = MultivariateNormal(WEIGHT.flatten(), expected(structure, 0.3)).sample((50_000,)).reshape(-1, 3, 4)
    mean = torch.einsum("skd,bd->sbk", weights, TEST).softmax(-1).mean(0)
    actual = laplace.predict(TEST, 50_000, torch.Generator().manual_seed(1))
    assert torch.allclose(actual, mean, atol=0.01)
    assert (laplace.predict(TEST) - mean).abs().max() < 0.06
    scores = laplace.uncertainty(TEST, 50, torch.Generator().manual_seed(1))
    assert all(score.shape == (6,) for score in scores.values())
    single = covariance(laplace, TEST[:1])
    assert not torch.allclose(single, torch.diag_embed(single.diagonal(dim1=1, dim2=2))) or structure == "rows"


def test_probit_of_two_classes_is_mackays() -> None:
    laplace = fit_laplace(WEIGHT[:2], [TRAIN], 0.3)
    gap = torch.tensor([1.0, -1.0], dtype=TEST.dtype)
    mean, variance = laplace(TEST) @ gap, gap @ covariance(laplace, TEST) @ gap
    expected = torch.sigmoid(mean / torch.sqrt(1 + torch.pi * variance / 8))
    assert torch.allclose(laplace.predict(TEST)[:, 0], expected, atol=1e-12)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_fp32_on_large_correlated_features(structure: str) -> None:
    base = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    x = 100 * base @ torch.randn(2, 40, generator=torch.Generator().manual_seed(1))  # rank 2 of 40
    laplace = fit_laplace(torch.randn(3, 40) / 1e3, x.split(500), 1e-3, structure)
    exact = fit_laplace(laplace.mean.double(), x.double().split(500), 1e-3, structure)
    y = torch.randn(7, 40, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(covariance(laplace, y).double(), covariance(exact, y.double()), rtol=1e-3, atol=0.1)
    holder = torch.nn.ModuleList([laplace]).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = holder[0].predict(y.to(torch.bfloat16))
    assert half.dtype == torch.float32
    assert torch.equal(half, laplace.predict(y.to(torch.bfloat16).float()))


def test_prior_chosen_by_validation_nll() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(60, 4), torch.arange(60) % 3
    laplace = fit_laplace(5 * torch.randn(3, 4), [x])  # overconfident and wrong: a wide prior is best
    nll_by_precision = laplace.tune(x, y, (0.01, 1.0, 1e4))
    assert list(nll_by_precision) == [0.01, 1.0, 1e4] and nll_by_precision[0.01] < nll_by_precision[1e4]
    assert laplace.prior_precision == min(nll_by_precision, key=nll_by_precision.get) == 0.01
    p = laplace.predict(x)  # by the same probit as the evaluation
    assert nll_by_precision[0.01] == pytest.approx(F.nll_loss(p.log(), y).item(), rel=1e-5)


def test_after_vbll_it_keeps_the_means() -> None:
    head = moved_head("diagonal")
    x = 2 * wave(30, 6, speed=0.7)
    laplace = fit_laplace(head.mean, [x], 1 / head.prior_variance, "rows")
    assert torch.equal(laplace(x), head(x)) and laplace.prior_precision == 2.0
    assert not any(value.requires_grad for value in laplace.state_dict().values()) and not list(laplace.parameters())
    with torch.no_grad():
        head.mean.zero_()
    assert laplace.mean.any()  # a copy


@pytest.mark.parametrize(
    "weight,batches,options,message",
    [
        (WEIGHT, [TRAIN], {"structure": "ful"}, "no structure 'ful'. Near: 'full'"),
        (WEIGHT, [TRAIN], {"prior_precision": 0.0}, "prior precision 0.0; it must be positive"),
        (WEIGHT, [TRAIN[:, :3]], {}, "Laplace: features are torch.float64 \\(20, 3\\)"),
        (WEIGHT[0], [TRAIN], {}, "the weight is \\(4,\\)"),
        (WEIGHT, [TRAIN], {"noise": torch.ones(4)}, "the noise is \\(4,\\), needed 3 variances"),
        (
            WEIGHT,
            [TRAIN],
            {"noise": torch.tensor([1.0, -0.1, 1.0])},
            "noise variances from -0.1 to 1; they must be finite",
        ),
        (WEIGHT, [TRAIN], {"noise": torch.tensor([1.0, 0.0, torch.inf])}, "noise variances from 0 to inf"),
        (torch.zeros(2, 3000), [], {}, "'full' for 6000 weights \\(at most 4096\\); use 'kronecker'"),
    ],
)
def test_what_cannot_be_fitted(weight: Tensor, batches: list, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit_laplace(weight, batches, **options)


def test_choices_that_are_none() -> None:
    laplace = fit_laplace(WEIGHT, [TRAIN])
    with pytest.raises(UserError, match="grid of prior precisions is empty"):
        laplace.tune(TEST, torch.zeros(6).long(), ())


def test_labels_and_batches_that_do_not_fit() -> None:
    laplace = fit_laplace(WEIGHT, [TRAIN])
    for labels, message in (
        (torch.tensor([0, 1, 2, 3, 0, 1]), "labels range over \\[0, 3\\], needed \\[0, 2\\]"),
        (torch.zeros(6, 1).long(), "labels are torch.int64 \\(6, 1\\)"),
        (torch.zeros(6), "labels are torch.float32 \\(6,\\)"),
    ):
        with pytest.raises(UserError, match=f"Laplace: {message}"):
            laplace.tune(TEST, labels)
    with pytest.raises(UserError, match="tune: validation examples are missing"):
        laplace.tune(TEST[:0], torch.zeros(0).long())
    assert laplace.prior_precision == 1.0
    for batch, kind in (((TRAIN, torch.zeros(20)), "tuple"), ([TRAIN], "list"), ({"x": TRAIN}, "dict")):
        with pytest.raises(UserError, match=f"a batch is a {kind}, needed features \\(b, d\\) without their labels"):
            fit_laplace(WEIGHT, [batch])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_noise_widens_the_logits_at_prediction_and_is_not_in_the_hessian(structure: str) -> None:
    noise = torch.tensor([0.5, 2.0, 0.0], dtype=TEST.dtype)
    plain, noisy = (fit_laplace(WEIGHT, [TRAIN], 0.3, structure, noise=value) for value in (None, noise))
    assert torch.allclose(covariance(noisy, TEST), covariance(plain, TEST) + torch.diag(noise), atol=1e-12)
    assert torch.equal(noisy(TEST), plain(TEST))
    torch.manual_seed(0)
    weights = MultivariateNormal(WEIGHT.flatten(), expected(structure, 0.3)).sample((50_000,)).reshape(-1, 3, 4)
    logits = torch.einsum("skd,bd->sbk", weights, TEST)
    logits += noise.sqrt() * torch.randn(logits.shape, dtype=logits.dtype)
    drawn = logits.softmax(-1).mean(0)
    assert torch.allclose(noisy.predict(TEST, 50_000, torch.Generator().manual_seed(1)), drawn, atol=0.01)
    assert (noisy.predict(TEST) - drawn).abs().max() < 0.06
    assert (plain.predict(TEST, 50_000, torch.Generator().manual_seed(1)) - drawn).abs().max() > 0.02
    entropy = [
        laplace.uncertainty(TEST, 2000, torch.Generator().manual_seed(1))["entropy"].mean()
        for laplace in (plain, noisy)
    ]
    assert entropy[1] > entropy[0]


def test_around_vbll_the_covariances_alone_are_replaced() -> None:
    head = moved_head("dense")
    x, y = 2 * wave(30, 6, speed=0.7), 2 * wave(4, 6, speed=0.3)
    laplace = laplace_head(head, list(x.split(7)), (x, torch.zeros(30).long()))
    p = head(x).softmax(1)
    for c in range(3):
        precision = (
            torch.einsum("n,ni,nj->ij", p[:, c] * (1 - p[:, c]), x, x)
            + torch.eye(6, dtype=x.dtype) / head.prior_variance
        )
        replaced = torch.einsum("bi,ij,bj->b", y, torch.linalg.inv(precision), y)
        assert torch.allclose(covariance(laplace, y)[:, c, c], replaced + torch.exp(2 * head.log_noise[c]), atol=1e-10)
    assert torch.equal(laplace(y), head(y)) and not list(laplace.parameters())


def test_around_a_head_that_is_too_large_for_all_of_the_hessian_it_is_factored() -> None:
    x = torch.randn(30, 120, generator=torch.Generator().manual_seed(0))
    for classes, structure in ((34, "full"), (35, "kronecker")):  # 34 * 120 = 4080, 35 * 120 = 4200
        assert (
            laplace_structure("linear", classes, 120) == structure and laplace_structure("vbll", classes, 120) == "rows"
        )
    head = LinearAnswerHead(torch.randn(35, 120, generator=torch.Generator().manual_seed(1)) / 10)
    labels = torch.arange(30)
    laplace = laplace_head(head, list(x.split(8)), (x, labels))
    wanted = fit_laplace(head.weight, [x], structure="kronecker")
    wanted.tune(x, labels)
    assert laplace.prior_precision == wanted.prior_precision
    assert torch.allclose(covariance(laplace, x), covariance(wanted, x), rtol=1e-4, atol=1e-6)


def test_a_bias_leaves_the_structure_what_its_name_in_a_report_says(monkeypatch) -> None:
    for module in (laplace_file, last_layers):
        monkeypatch.setattr(module, "LARGEST", 10)
    x, head = torch.randn(6, 5), LinearAnswerHead(torch.randn(2, 5), torch.randn(2))
    assert laplace_structure("linear", 2, 5) == "full"
    assert isinstance(laplace_head(head, [x], (x, torch.zeros(6).long())).curvature, FullCurvature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_a_linear_head_are_not_rounded_under_autocast(dtype: torch.dtype) -> None:
    x, head = torch.randn(6, 5), LinearAnswerHead(20 * torch.randn(2, 5))
    exact = head.loss(x, torch.zeros(6).long())
    with torch.autocast("cpu", dtype):
        assert torch.equal(head.loss(x, torch.zeros(6).long()), exact)


@pytest.mark.parametrize("structure", ["full", "kronecker", "rows"])
def test_a_bias_is_the_weight_of_a_feature_that_is_one(structure: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((30, 5), (3, 5), (3,)))
    ones = torch.cat([x, torch.ones(30, 1)], 1)
    by_hand = fit_laplace(torch.cat([weight, bias[:, None]], 1), [ones], 2.0, structure)
    affine = fit_laplace(weight, list(x.split(8)), 2.0, structure, bias=bias)
    assert torch.allclose(affine(x), x @ weight.T + bias, atol=1e-5)
    for ours, theirs in zip(affine.logit_distribution(x), by_hand.logit_distribution(ones)):
        assert torch.allclose(ours.abs(), theirs.abs(), atol=1e-4)
    head = LinearAnswerHead(weight, bias)
    assert laplace_head(head, [x], (x, torch.zeros(30).long())).predict(x).shape == (30, 3)
