"""The VBLL probe: its optimum, its posterior on small supports, and answers that do not depend on the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.amt_parts import backbone
from torch import Tensor

from vismt.metatune import ProtoNet
from vismt.metatune.probes.linear import class_weights
from vismt.metatune.probes.vbll import VBLLProbe

LABELS = torch.tensor([0, 1, 2, 0, 1, 0, 0, 2, 1, 0])


def inputs(labels: Tensor, d: int = 6) -> Tensor:
    """Return clear classes of mean square 1, centred."""
    noise = torch.randn(len(labels), d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = F.one_hot(labels, d).double() + 0.2 * noise
    u = u - class_weights(labels, 3) @ u / len(u)
    return u / u.square().sum(1).mean().sqrt()


def test_the_means_separate_the_support_and_more_images_leave_less_posterior() -> None:
    u = inputs(LABELS)
    W, b = VBLLProbe(None).fit(u, LABELS, class_weights(LABELS, 3))
    assert torch.equal((u @ W.T + b).argmax(1), LABELS)
    head = VBLLProbe(None).fit_head(u, LABELS, class_weights(LABELS, 3))
    many = LABELS.repeat(20)
    larger = VBLLProbe(None).fit_head(inputs(many), many, class_weights(many, 3))
    assert larger.spread.variances().mean() < 0.5 * head.spread.variances().mean()
    # The prior of the head: 2 / d each. What the support does not fix keeps a good part of it.
    assert float(head.spread.variances().max()) <= 1.1 * head.prior_variance


def test_the_loss_is_at_a_minimum() -> None:
    u, weights = inputs(LABELS), class_weights(LABELS, 3)
    probe = VBLLProbe(None)
    head = probe.fit_head(u, LABELS, weights)
    x = torch.cat([u * 6**0.5, torch.ones(10, 1)], 1).float()

    def loss() -> float:
        bound = weights.float() @ head.bound(x, LABELS)
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
    assert wide.fit_head(inputs(LABELS), LABELS, class_weights(LABELS, 3)).prior_variance == pytest.approx(8 * 2 / 7)
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
