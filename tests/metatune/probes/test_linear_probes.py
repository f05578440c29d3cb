"""Ridge and logistic probes: the closed forms against brute force and scikit-learn, invariances, attackable classifiers."""

import pytest
import torch
import torch.nn.functional as F
from helpers.amt_parts import backbone, drawn
from torch import nn

from vismt.base.errors import UserError
from vismt.metatune import EpisodeSampler, LogisticProbe, ProtoNet, RidgeProbe, run_protocol
from vismt.metatune.finetuning.finetune import FineTuned, FineTuneSettings
from vismt.metatune.functional import WithWeights
from vismt.metatune.probes.linear import (
    DEFAULT_STRENGTH,
    RIDGE_SCALE,
    STRENGTHS,
    C,
    choose_strength,
    class_weights,
    fit_logistic,
    left_out_residuals,
)
from vismt.metatune.protonet import PrototypeClassifier, prototypes

LABELS = torch.tensor([0, 1, 2, 0, 1, 0, 0, 2, 1, 0])  # 5, 3 and 2 images
PROBES = (RidgeProbe, LogisticProbe)


def rows(n=10, d=6, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def centred(u, weights):
    return u - weights @ u / weights.sum()


def primal(u, labels, weights, strength):
    """Weighted ridge regression with a free intercept, by its normal equations in d + 1 unknowns."""
    ones = torch.cat([u, torch.ones(len(u), 1, dtype=u.dtype)], 1)
    penalty = strength * torch.eye(ones.shape[1], dtype=u.dtype)
    penalty[-1, -1] = 0
    left = ones.T @ (weights[:, None] * ones) + penalty
    solved = torch.linalg.solve(left, ones.T @ (weights[:, None] * F.one_hot(labels, 3).double()))
    return lambda x: torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) @ solved


@pytest.mark.parametrize("d", [3, 40])
@pytest.mark.parametrize("strength", [0.05, 2.0])
def test_left_out_residuals_equal_refitting_without_each_image(d, strength):
    weights = class_weights(LABELS, 3)
    u = centred(rows(d=d), weights)
    roots = weights.sqrt()[:, None]
    T = roots * (F.one_hot(LABELS).double() - 1 / 3)
    residuals = left_out_residuals(roots * u, T, weights, strength)
    for i in range(len(u)):
        rest = torch.arange(len(u)) != i
        predict = primal(u[rest], LABELS[rest], weights[rest], strength)
        expected = F.one_hot(LABELS, 3)[i] - predict(u[i : i + 1])[0]
        assert torch.allclose(residuals[i], expected, atol=1e-9), i
    assert not torch.allclose(residuals, F.one_hot(LABELS, 3) - primal(u, LABELS, weights, strength)(u), atol=1e-2)


@pytest.mark.parametrize("d", [3, 40])
def test_the_dual_solution_is_the_primal_one(d, monkeypatch):
    monkeypatch.setattr("vismt.metatune.probes.linear.choose_strength", lambda *_: 0.7)
    weights = class_weights(LABELS, 3)
    u = centred(rows(d=d), weights)
    W, b = RidgeProbe(None).fit(u, LABELS, weights)
    other = rows(7, d, seed=1)
    assert torch.allclose(other @ W.T + b, RIDGE_SCALE * primal(u, LABELS, weights, 0.7)(other), atol=1e-9)


def test_the_strength_follows_the_noise_and_one_shot_takes_the_default():
    labels = torch.arange(4).repeat(8)
    weights = class_weights(labels, 4)
    targets = F.one_hot(labels).double() - 0.25
    clear = centred(torch.eye(4, dtype=torch.float64)[labels].repeat(1, 5) + 0.01 * rows(32, 20), weights)
    noise = centred(0.05 * torch.eye(4, dtype=torch.float64)[labels].repeat(1, 5) + rows(32, 20), weights)
    chosen = [choose_strength(u * (32 / u.square().sum()).sqrt(), targets, labels, weights) for u in (clear, noise)]
    assert chosen == [STRENGTHS[0], STRENGTHS[-1]]
    single = torch.arange(4)
    assert choose_strength(clear[:4], targets[:4], single, torch.ones(4).double()) == DEFAULT_STRENGTH
    # An image that is alone in its class is left out of the sum: its residual grows without bound, and nothing changes.
    mixed = torch.cat([labels, torch.tensor([4])])
    far = torch.cat([clear, 1e3 * torch.ones(1, 20, dtype=torch.float64)])
    goal = F.one_hot(mixed).double() - 0.2
    assert choose_strength(far, goal, mixed, torch.ones(33).double()) < STRENGTHS[-1]


def test_logistic_regression_agrees_with_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    u, weights = rows(d=5), class_weights(LABELS, 3)
    W, b = fit_logistic(u, LABELS, weights, 3.0)
    oracle = linear_model.LogisticRegression(C=3.0, tol=1e-10, max_iter=5000)
    oracle.fit(u.numpy(), LABELS.numpy(), sample_weight=weights.numpy())
    expected = torch.as_tensor(oracle.predict_proba(rows(6, 5, seed=1).numpy()))
    assert torch.allclose((rows(6, 5, seed=1) @ W.T + b).softmax(1), expected, atol=1e-6)
    assert abs(float(b.sum())) < 1e-9 and W.sum(0).abs().max() < 1e-7
    assert torch.equal(W, fit_logistic(u, LABELS, weights, 3.0)[0])


def test_logistic_gradient_vanishes_at_the_answer():
    u, weights = rows(d=40), class_weights(LABELS, 3)
    W, b = fit_logistic(u, LABELS, weights, C)
    errors = (u @ W.T + b).softmax(1) - F.one_hot(LABELS, 3)
    slope = errors.T @ (weights[:, None] * u) / len(u) + W / (C * len(u))
    assert slope.abs().max() < 1e-6 and (weights @ errors / len(u)).abs().max() < 1e-6


@pytest.mark.parametrize("probe", PROBES)
def test_classes_weigh_the_same_and_features_size_and_offset_of_direction_do_not_matter(probe):
    features = rows(d=12)
    weight, bias = probe(None).fit_features(features, LABELS)
    sizes = torch.rand(10, 1, generator=torch.Generator().manual_seed(3)).double() + 0.1
    other = probe(None).fit_features(features * sizes, LABELS)
    assert torch.allclose(weight, other[0], atol=1e-6) and torch.allclose(bias, other[1], atol=1e-6)
    order = torch.tensor([2, 0, 1])
    moved = probe(None).fit_features(features, order[LABELS])
    assert torch.allclose(moved[0][order], weight, atol=1e-5)
    # Half of the images are of class 0, and still the answers hold a third of it.
    logits = F.linear(F.normalize(features, dim=1), weight, bias)
    shares = logits.softmax(1) if probe is LogisticProbe else logits / RIDGE_SCALE
    assert torch.allclose(class_weights(LABELS, 3) @ shares / 10, torch.full((3,), 1 / 3).double(), atol=1e-6)


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("shots", [1, 4])
def test_it_learns_and_its_logits_are_worth_attacking(probe, shots):
    net, truth = backbone(), torch.arange(3).repeat(20)
    labels = torch.arange(3).repeat(shots)
    classifier = probe(ProtoNet(net)).classifier(drawn(labels, 1), labels)
    query = drawn(truth, 2).requires_grad_(True)
    logits = classifier(query)
    assert logits.shape == (60, 3) and logits.dtype == torch.float32
    assert (logits.argmax(1) == truth).float().mean() > (0.45 if shots == 1 else 0.6)
    confidence = logits.softmax(1).max(1).values
    assert 0.4 < confidence.mean() < 0.999
    F.cross_entropy(logits, truth).backward()
    attacked = (query + 8 / 255 * query.grad.sign()).detach()
    assert query.grad.abs().sum() > 0
    assert F.cross_entropy(classifier(attacked), truth) > F.cross_entropy(logits, truth) + 0.05
    assert not classifier.weight.requires_grad and not list(classifier.parameters(recurse=False))
    pieces = torch.cat([classifier(part) for part in query.detach().split(7)])
    assert torch.allclose(pieces, logits.detach(), atol=1e-4)


@pytest.mark.parametrize("probe", PROBES)
def test_callers_in_inference_mode_get_the_same(probe):
    net, labels = backbone(), torch.arange(3).repeat(4)
    expected = probe(ProtoNet(net)).classifier(drawn(labels, 1), labels)(drawn(labels, 2))
    with torch.inference_mode():
        got = probe(ProtoNet(net)).classifier(drawn(labels, 1), labels)(drawn(labels, 2))
    assert torch.allclose(got, expected.detach(), atol=1e-5)


@pytest.mark.parametrize("probe", PROBES)
def test_a_merged_backbone_is_probed_with_its_own_weights(probe):
    class Merged:
        def classifier(self, images, labels):
            merged = WithWeights(net, {"vit.norm.weight": torch.full((32,), 0.5)})
            return PrototypeClassifier(merged, prototypes(merged(images), labels), torch.tensor(7.0)).eval()

    net, labels = backbone(), torch.arange(3).repeat(4)
    moved = backbone()
    with torch.no_grad():
        moved.vit.norm.weight.fill_(0.5)
    support, query = drawn(labels, 1), drawn(labels, 2)
    merged, plain = (probe(proto).classifier(support, labels)(query) for proto in (Merged(), ProtoNet(moved)))
    assert torch.allclose(merged, plain, atol=1e-5)
    assert not torch.allclose(merged, probe(ProtoNet(net)).classifier(support, labels)(query), atol=1e-2)


@pytest.mark.parametrize("probe", PROBES)
def test_it_scores_in_the_protocol(probe):
    labels = torch.arange(6).repeat_interleave(12)
    sampler = EpisodeSampler(labels, ways=3, shots=5, queries=5, seed=1)
    model = probe(ProtoNet(backbone())).train()
    first, again = (run_protocol(model, drawn(labels, 5), sampler, episodes=3)["clean"] for _ in range(2))
    assert torch.equal(first, again) and first.mean() > 0.5 and model.training


def test_equal_features_give_equal_logits_and_no_nan():
    labels = torch.arange(3)
    for probe in PROBES:
        weight, bias = probe(None).fit_features(torch.ones(3, 4), labels)
        assert bool(weight.isfinite().all()) and torch.allclose(bias, bias[:1].expand(3), atol=1e-9)


@pytest.mark.parametrize("probe", PROBES)
def test_what_cannot_be_probed_is_named(probe):
    class Other:
        def classifier(self, images, labels):
            return nn.Flatten()

    with pytest.raises(UserError, match="linear probe: the task's classifier is Flatten"):
        probe(Other()).classifier(drawn(torch.arange(3), 1), torch.arange(3))
    with pytest.raises(UserError, match="no support image of class 1 of 3"):
        probe(None).fit_features(rows(3), torch.tensor([0, 2, 2]))


def test_a_tuned_backbone_can_be_probed():
    labels = torch.arange(3).repeat(2)
    tuned = FineTuned(ProtoNet(backbone()), FineTuneSettings(steps=2))
    plain = RidgeProbe(ProtoNet(backbone())).classifier(drawn(labels, 1), labels)(drawn(labels, 2))
    other = RidgeProbe(tuned).classifier(drawn(labels, 1), labels)(drawn(labels, 2))
    assert other.shape == plain.shape and not torch.allclose(other, plain, atol=1e-4)
