"""Prototypes and the cosine classifier: invariants I4 and I11, and numbers by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vismt.base.errors import UserError
from vismt.metatune import ProtoNet, cosine_logits, prototypes
from vismt.metatune.protocol.episodes import EpisodeSampler
from vismt.metatune.protonet import EpisodeBatches, EpisodeObjective


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Backbone(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        with torch.no_grad():
            self.conv.weight.copy_(rand(6, 3, 3, 3, seed=seed))
            self.conv.bias.copy_(rand(6, seed=seed + 1))

    def forward(self, images):
        return self.conv(images).tanh().mean((2, 3))


def test_prototype_is_the_mean_before_normalising():
    # mean of (3, 0) and (0, 1) is (1.5, 0.5); cos with (1, 0) is 1.5 / sqrt(2.5) = 0.948683.
    # Normalising first would give (0.5, 0.5) and 0.707107.
    centres = prototypes(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 0, 1]))
    assert centres.tolist() == [[1.5, 0.5], [0.0, 2.0]]
    logits = cosine_logits(torch.tensor([[1.0, 0.0]]), centres)
    assert logits[0].tolist() == pytest.approx([10 * 1.5 / math.sqrt(2.5), 0.0], abs=1e-6)


def test_prototypes_equal_a_loop():
    features, labels = rand(23, 7).double(), torch.arange(23) % 5
    looped = torch.stack([features[labels == c].mean(0) for c in range(5)])
    assert torch.allclose(prototypes(features, labels), looped, atol=1e-14)


def test_relabelling_the_support_permutes_the_columns():
    features, labels, query = rand(20, 8), torch.arange(20) % 4, rand(6, 8, seed=1)
    order = torch.tensor([2, 0, 3, 1])
    plain = cosine_logits(query, prototypes(features, labels))
    moved = cosine_logits(query, prototypes(features, order[labels]))
    assert torch.allclose(moved[:, order], plain, atol=1e-6)


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
def test_logits_are_bounded_and_blind_to_the_features_size(factor):
    features, labels, query = rand(20, 8), torch.arange(20) % 4, rand(50, 8, seed=1)
    plain = cosine_logits(query, prototypes(features, labels), scale=4.0)
    scaled = cosine_logits(query * factor, prototypes(features * factor, labels), scale=4.0)
    assert plain.abs().max() <= 4 + 1e-5 and torch.allclose(plain, scaled, atol=1e-5)
    # A prototype points at itself: logit = scale.
    assert cosine_logits(prototypes(features, labels), prototypes(features, labels), 4.0).diagonal().min() > 4 - 1e-5


def test_zero_feature_has_zero_logits_and_finite_gradient():
    query = torch.zeros(1, 8, requires_grad=True)
    logits = cosine_logits(query, rand(3, 8))
    logits.sum().backward()
    assert logits.tolist() == [[0, 0, 0]] and bool(query.grad.isfinite().all())


def test_half_precision_averages_in_float32():
    # The sum 70 x 1000 is above float16's largest number, 65504; the mean is not.
    centres = prototypes(torch.full((70, 1), 1000.0, dtype=torch.float16), torch.zeros(70).long())
    assert centres.dtype == torch.float16 and float(centres) == 1000
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cosine_logits(rand(4, 8), prototypes(rand(6, 8), torch.arange(6) % 2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.ones(3, 2), torch.tensor([0, 2, 2]), "no support image of class 1 of 3"),
        (torch.ones(3, 2), torch.tensor([0, 1]), r"features \(3, 2\), labels \(2,\)"),
        (torch.ones(2, 2), torch.tensor([0, -1]), "label -1"),
        (torch.ones(0, 2), torch.tensor([]).long(), "s > 0"),
    ],
)
def test_errors(features, labels, message):
    with pytest.raises(UserError, match=message):
        prototypes(features, labels)


def test_two_stages_equal_one_stage_exactly_and_queries_do_not_mix():
    net = ProtoNet(Backbone())
    support, labels, query = torch.rand(10, 3, 8, 8), torch.arange(10) % 5, torch.rand(12, 3, 8, 8)
    whole = net(support, labels, query)
    classifier = net.classifier(support, labels)
    assert whole.shape == (12, 5) and torch.equal(whole, classifier(query))
    pieces = torch.cat([classifier(part) for part in query.split(5)])
    assert torch.allclose(whole, pieces, atol=1e-6)
    changed = query.clone()
    changed[1:] = 0.5
    assert torch.allclose(net(support, labels, changed)[0], whole[0], atol=1e-6)


def test_gradients_reach_the_scale_and_both_image_sets():
    net = ProtoNet(Backbone())
    assert net.scale.item() == 10 and isinstance(net.scale, nn.Parameter)
    support, query = torch.rand(4, 3, 8, 8, requires_grad=True), torch.rand(4, 3, 8, 8, requires_grad=True)
    F.cross_entropy(net(support, torch.tensor([0, 0, 1, 1]), query), torch.tensor([0, 0, 1, 1])).backward()
    assert all(t.grad.abs().sum() > 0 for t in (net.scale, support, query, net.backbone.conv.weight))


def test_the_task_classifier_is_frozen():
    net = ProtoNet(Backbone())
    classifier = net.classifier(torch.rand(4, 3, 8, 8), torch.tensor([0, 0, 1, 1]))
    assert not classifier.prototypes.requires_grad and not classifier.scale.requires_grad
    assert set(dict(classifier.named_parameters())) == {"backbone.conv.weight", "backbone.conv.bias"}
    assert classifier.training and not net.eval().classifier(torch.rand(1, 3, 8, 8), torch.tensor([0])).training
    query = torch.rand(2, 3, 8, 8)
    before = classifier(query)
    with torch.no_grad():
        net.scale.mul_(3)
    assert torch.equal(classifier(query), before)


def test_labels_of_the_set_are_learned_by_a_vector_for_each_class():
    images, labels = torch.rand(30, 3, 8, 8), torch.arange(30) % 6
    sampler = EpisodeSampler(labels, ways=3, shots=1, queries=2)
    sources = [(images.__getitem__, sampler.__getitem__)]
    batch, episode = EpisodeBatches(sources, seed=0, augment=None, classes=True)(4), sampler[4]
    drawn = torch.cat([episode.support, episode.query])
    assert torch.equal(batch["query"], images[drawn]) and torch.equal(batch["query_labels"], labels[drawn])
    assert len(batch["support"]) == len(batch["support_labels"]) == 0
    # The plain form has the ways 0 to 2 of the support and the queries.
    assert EpisodeBatches(sources, seed=0, augment=None)(4)["query_labels"].tolist() == [0, 0, 1, 1, 2, 2]
    net, backbone = ProtoNet(Backbone(), 5.0), Backbone()
    net.vectors = nn.Parameter(rand(6, 6, seed=1))
    loss = EpisodeObjective(net)(batch)["loss"]
    loss.backward()
    vectors = net.vectors.detach().clone().requires_grad_()
    logits = 5 * F.normalize(backbone(images[drawn])) @ F.normalize(vectors).T
    F.cross_entropy(logits, labels[drawn]).backward()
    assert torch.allclose(net.vectors.grad, vectors.grad, atol=1e-6) and vectors.grad.abs().max() > 1e-3
    assert torch.allclose(net.backbone.conv.weight.grad, backbone.conv.weight.grad, atol=1e-6)
    assert set(net.own_tensors()) == {"scale"}
