"""The generative VBLL head against torch's normal densities, drawn class means, and the authors' package."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.vbll_parts import LABELS, features, moved_generative, moved_head, wave
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from vismt.base.errors import UserError
from vismt.llm import GenerativeVBLL


def density(mean: Tensor, variance: Tensor) -> Independent:
    return Independent(Normal(mean, variance.sqrt()), 1)


def test_density_and_bound_against_torch() -> None:
    head, x = moved_generative(), features()
    noise, spread = torch.exp(2 * head.log_noise), torch.exp(2 * head.spread.log_std)
    joint = torch.stack([density(head.mean[c], noise + spread[c]).log_prob(x) for c in range(3)], 1)
    assert torch.allclose(head(x), joint, atol=1e-12)
    expected_log = torch.stack(
        [
            density(head.mean[y], noise).log_prob(x[b]) - 0.5 * (spread[y] / noise).sum()
            for b, y in enumerate(LABELS.tolist())
        ]
    )
    assert torch.allclose(head.bound(x, LABELS), expected_log - torch.logsumexp(joint, 1), atol=1e-12)
    assert torch.allclose(head.predict(x), joint.softmax(1), atol=1e-12)
    assert torch.allclose(head.uncertainty(x)["surprise"], -torch.logsumexp(joint - math.log(3), 1), atol=1e-12)


def test_the_numbers_of_the_package() -> None:
    # vbll 0.4.9, GenClassification in fp64; its loss lacks the KL's constant k d / (2 N) = 9 / 40.
    head = moved_generative()
    assert head.loss(features(), LABELS).item() + 9 / 40 == pytest.approx(8.89556892441, rel=1e-11)
    assert head.bound(features(), LABELS).tolist() == pytest.approx(
        [-10.043348305741013, -9.360598318813528, -7.0089655873001675, -8.031094365490794, -6.468794693396099],
        rel=1e-12,
    )
    assert head.predict(features())[0].tolist() == pytest.approx(
        [0.0007949360330305737, 0.0021332226789955847, 0.9970718412879739], rel=1e-10
    )


def test_bound_below_the_expected_log_likelihood() -> None:
    head, x = moved_generative(), features() / 2
    torch.manual_seed(0)
    means = head.mean + head.spread.log_std.exp() * torch.randn(100_000, 3, 6, dtype=x.dtype)
    precision = torch.exp(-2 * head.log_noise)
    logits = torch.stack(
        [-0.5 * ((row - means).square() * precision).sum(-1) for row in x], 1
    )  # (s, b, k), up to a constant
    logs = logits.log_softmax(-1)[:, torch.arange(5), LABELS]
    error = logs.std(0) / math.sqrt(len(logs))
    bound = head.bound(x, LABELS)
    assert (bound <= logs.mean(0) + 3 * error).all() and (logs.mean(0) - bound < 1.5).all()
    # The predictive averages densities, not class probabilities.
    expected = torch.softmax(torch.logsumexp(logits, 0), 1)
    assert torch.allclose(head.predict(x), expected, atol=0.02)


def test_kl_is_that_of_torch() -> None:
    head = moved_generative()
    head.centre.copy_(wave(3, 6, speed=0.2))
    prior = density(head.centre, torch.full((3, 6), 1.5, dtype=torch.float64))
    posterior = density(head.mean, torch.exp(2 * head.spread.log_std))
    assert head.kl().item() == pytest.approx(kl_divergence(posterior, prior).sum().item(), rel=1e-10)


def test_gradients_through_the_centring() -> None:
    head, x = moved_generative(), features()
    head.loss(x, LABELS).backward()
    slope = head.mean.grad[1, 2].item()
    with torch.no_grad():
        head.mean[1, 2] += 1e-5
        up = head.loss(x, LABELS)
        head.mean[1, 2] -= 2e-5
        down = head.loss(x, LABELS)
    assert slope == pytest.approx(((up - down) / 2e-5).item(), rel=1e-6)


def test_fp32_keeps_its_digits_far_from_zero_and_in_half_precision() -> None:
    head, x = moved_generative(), features()
    expected = head(x)
    with torch.no_grad():
        head.mean += 300
    single = head.float().to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(single((x + 300).float()).double(), expected, atol=2e-3)
        assert single.loss(x.to(torch.bfloat16), LABELS).dtype == torch.float32


def test_far_features_surprise() -> None:
    head = GenerativeVBLL(6, 3, 40, rows=3 * torch.eye(3, 6))
    inside, outside = head.uncertainty(3 * torch.eye(3, 6)), head.uncertainty(torch.full((2, 6), -5.0))
    assert inside["surprise"].max() < outside["surprise"].min()
    assert torch.equal(head.predict(3 * torch.eye(3, 6)).argmax(1), torch.arange(3))
    assert head.noise_dof == (1 + 6 + 1) / 2 and moved_head("diagonal").noise_dof == (2 + 3 + 1) / 2


def test_what_it_cannot_be() -> None:
    with pytest.raises(UserError, match="GenerativeVBLL: 1 classes"):
        GenerativeVBLL(6, 1, 40)
    with pytest.raises(UserError, match="GenerativeVBLL: features are"):
        GenerativeVBLL(6, 3, 40).predict(torch.zeros(2, 5))
