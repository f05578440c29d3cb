"""The Laplace probe against autograd's Hessian in all weights, the VBLL probe's optimum, and the answers of both on images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.amt_parts import backbone, drawn
from torch import Tensor

from vismt.metatune import ProtoNet
from vismt.metatune.probes import bayesian
from vismt.metatune.probes.bayesian import LaplaceProbe, VBLLProbe
from vismt.metatune.probes.linear import C, class_weights
from vismt.uncertainty.laplace import KroneckerCurvature

LABELS = torch.tensor([0, 1, 2, 0, 1, 0, 0])
WEIGHTS = class_weights(LABELS, 3)
TEN = torch.tensor([0, 1, 2, 0, 1, 0, 0, 2, 1, 0])


def rows(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / d**0.5


def ones(u: Tensor) -> Tensor:
    return torch.cat([u, torch.ones(len(u), 1, dtype=u.dtype)], 1)


def posterior(u: Tensor, mode: Tensor) -> Tensor:
    """Return the covariance of all weights, N (d + 1) of them, by an explicit inverse of autograd's Hessian at the mode."""

    def negative_log_posterior(flat: Tensor) -> Tensor:
        W = flat.reshape(mode.shape)
        errors = F.cross_entropy(ones(u) @ W.T, LABELS, reduction="none")
        return WEIGHTS @ errors + W.square().sum() / (2 * C)

    flat = mode.flatten().requires_grad_()
    (slope,) = torch.autograd.grad(negative_log_posterior(flat), flat)
    assert slope.abs().max() < 1e-5
    return torch.linalg.inv(torch.autograd.functional.hessian(negative_log_posterior, flat))


@pytest.mark.parametrize("d", [3, 20])  # a support that spans all features, and one of fewer images than features
def test_the_posterior_is_the_inverse_hessian_around_the_mode(d: int) -> None:
    u, other = rows(7, d, 0), rows(5, d, 1)
    probe = LaplaceProbe(None)
    head = probe.fit_head(u, LABELS, WEIGHTS)
    mode = torch.cat([part if part.ndim == 2 else part[:, None] for part in probe.fit(u, LABELS, WEIGHTS)], 1)
    covariance = posterior(u, mode)
    for x in (ones(u), ones(other)):
        mean, root = head.logit_distribution(x)
        assert torch.allclose(mean, x @ mode.T, atol=1e-9)
        jacobian = torch.stack([torch.kron(torch.eye(3, dtype=x.dtype), row[None]) for row in x])
        assert torch.allclose(root @ root.mT, jacobian @ covariance @ jacobian.mT, atol=1e-9)
        assert head.curvature.values0.numel() == 3 * (min(7, d + 1) + 1)
    # What lies outside the span of the support keeps the prior, C for each unit of x.
    far = torch.zeros(1, d + 1, dtype=u.dtype)
    if d == 20:
        far[0] = 5 * torch.linalg.svd(ones(u)).Vh[-1]
        _, root = head.logit_distribution(far)
        assert torch.allclose(root @ root.mT, 25 * C * torch.eye(3, dtype=u.dtype), atol=1e-9)


def test_large_tasks_keep_kronecker_factors_of_weighted_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bayesian, "FULL", 3)
    u, other = rows(7, 20, 0), rows(5, 20, 1)
    head = LaplaceProbe(None).fit_head(u, LABELS, WEIGHTS)
    assert isinstance(head.curvature, KroneckerCurvature)
    x, w = ones(u), WEIGHTS[:, None]
    p = head(x).softmax(1)
    outputs = torch.diag((w * p).sum(0)) - p.T @ (w * p)
    H = torch.kron(outputs, x.T @ (w * x) / 7)
    covariance = torch.linalg.inv(H + torch.eye(len(H), dtype=H.dtype) / C)
    jacobian = torch.stack([torch.kron(torch.eye(3, dtype=x.dtype), row[None]) for row in ones(other)])
    _, root = head.logit_distribution(ones(other))
    assert torch.allclose(root @ root.mT, jacobian @ covariance @ jacobian.mT, atol=1e-8)


def test_answers_are_smooth_in_the_image_and_the_same_in_any_batch() -> None:
    support = torch.arange(3).repeat(3)
    net = backbone().requires_grad_(False)
    probe = LaplaceProbe(ProtoNet(net))
    classifier = probe.classifier(drawn(support, 1), support).eval()
    # What the head is fitted to is what it is asked about.
    fitted = ones(probe.inputs(net(drawn(support, 1)), support)[0])
    assert torch.allclose(inputs(classifier, drawn(support, 1)).double(), fitted, atol=1e-4)
    queries = drawn(torch.arange(3).repeat(4), 2).requires_grad_()
    logs = classifier(queries)
    assert logs.dtype == torch.float32 and torch.allclose(logs.exp().sum(1), torch.ones(12), atol=1e-5)
    assert torch.allclose(torch.cat([classifier(part) for part in queries.split(5)]), logs, atol=1e-4)
    # The derivative along the gradient is that of a finite difference.
    (slope,) = torch.autograd.grad(logs[:, 0].sum(), queries)
    step = 1e-3 * slope / slope.flatten(1).norm(dim=1).amax()
    ends = [float(classifier(queries.detach() + sign * step)[:, 0].sum()) for sign in (1, -1)]
    assert ends[0] - ends[1] == pytest.approx(2 * float((slope * step).sum()), rel=0.05)
    # Averages over the posterior are less certain than the mode.
    mode = classifier.head(inputs(classifier, queries)).softmax(1)
    assert bool(logs.exp().amax(1).mean() < mode.amax(1).mean())


def test_the_answer_is_near_the_mean_of_many_draws() -> None:
    u, other = rows(7, 4, 0), ones(rows(30, 4, 1))
    head = LaplaceProbe(None).fit_head(u, LABELS, WEIGHTS)
    mean, root = head.logit_distribution(other)
    noise = torch.randn(20_000, 30, root.shape[2], dtype=root.dtype, generator=torch.Generator().manual_seed(0))
    draws = mean + torch.einsum("bkm,sbm->sbk", root, noise)
    found = head.predict(other)
    expected = draws.softmax(-1).mean(0)
    assert (found - expected).abs().max() < 0.05 and (mean.softmax(1) - expected).abs().max() > 0.2


def inputs(classifier: torch.nn.Module, images: Tensor) -> Tensor:
    z = F.normalize(classifier.backbone(images), dim=1)
    return classifier.expand((z - classifier.mean) / classifier.spread)


def clear_inputs(labels: Tensor, d: int = 6) -> Tensor:
    """Return clear classes of mean square 1, centred."""
    noise = torch.randn(len(labels), d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = F.one_hot(labels, d).double() + 0.2 * noise
    u = u - class_weights(labels, 3) @ u / len(u)
    return u / u.square().sum(1).mean().sqrt()


def test_the_means_separate_the_support_and_more_images_leave_less_posterior() -> None:
    u = clear_inputs(TEN)
    W, b = VBLLProbe(None).fit(u, TEN, class_weights(TEN, 3))
    assert torch.equal((u @ W.T + b).argmax(1), TEN)
    head = VBLLProbe(None).fit_head(u, TEN, class_weights(TEN, 3))
    many = TEN.repeat(20)
    larger = VBLLProbe(None).fit_head(clear_inputs(many), many, class_weights(many, 3))
    assert larger.spread.variances().mean() < 0.5 * head.spread.variances().mean()
    # The prior of the head: 2 / d each. What the support does not fix keeps a good part of it.
    assert float(head.spread.variances().max()) <= 1.1 * head.prior_variance


def test_the_loss_is_at_a_minimum() -> None:
    u, weights = clear_inputs(TEN), class_weights(TEN, 3)
    probe = VBLLProbe(None)
    head = probe.fit_head(u, TEN, weights)
    x = ones(u * 6**0.5).float()

    def loss() -> float:
        bound = weights.float() @ head.bound(x, TEN)
        return float((head.kl() - head.noise_log_prior() - bound) / 10)

    least = loss()
    for name, parameter in head.named_parameters():
        for step in (-0.1, 0.1):
            with torch.no_grad():
                parameter.add_(step)
                assert loss() > least - 1e-3, name
                parameter.sub_(step)


def test_options_reach_the_head_and_the_fingerprint() -> None:
    wide = VBLLProbe(None, prior_scale=8.0)
    assert wide.fit_head(clear_inputs(TEN), TEN, class_weights(TEN, 3)).prior_variance == pytest.approx(8 * 2 / 7)
    assert wide.describe() != VBLLProbe(None).describe()


def test_a_query_has_the_same_answer_alone_and_in_a_batch_and_passes_a_gradient() -> None:
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    probe = VBLLProbe(ProtoNet(backbone().eval()))
    classifier = probe.classifier(images, torch.tensor([0, 1, 0, 1, 0, 1])).eval()
    queries = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    logs = classifier(queries)
    assert torch.allclose(logs.exp().sum(1), torch.ones(4), atol=1e-4)
    assert torch.allclose(classifier(queries[2:3]), logs[2:3], atol=1e-4)
    assert float(torch.autograd.grad(logs[:, 0].sum(), queries)[0].abs().sum()) > 0
