"""The rules that weight a pool's experts: what all of them have in common on a pool."""

from __future__ import annotations

import pytest
import torch
from helpers.amt_parts import backbone, episode, saved
from torch import Tensor

from vismt.base.errors import UserError
from vismt.metatune import features
from vismt.metatune.amt.merging import PoolNet
from vismt.metatune.amt.pool import Expert, ExpertPool
from vismt.metatune.amt.selection_rules import RULES, MergeSettings


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[Expert]:
    return saved(tmp_path_factory.mktemp("experts"), (3, 4, 5))


def mixture(experts: list[Expert], rule: str, shots: int = 3) -> Tensor:
    batch = episode(1, 5, shots=shots)
    net = PoolNet(ExpertPool(backbone(), experts), MergeSettings(strategy=rule, beta=5.0))
    return net.classifier(batch["support"], batch["support_labels"]).mixture


@pytest.mark.parametrize("shots", [1, 3])
@pytest.mark.parametrize("rule", [*RULES, "average"])
def test_a_rule_weights_experts_and_not_places(
    experts: list[Expert], rule: str, shots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeta = mixture(experts, rule, shots)
    assert float(zeta.sum()) == pytest.approx(1, abs=1e-6) and bool((zeta >= 0).all()) and not zeta.requires_grad
    order = [2, 0, 1]
    assert torch.allclose(mixture([experts[index] for index in order], rule, shots), zeta[order], atol=1e-4)
    assert torch.equal(mixture(experts, rule, shots), zeta)
    monkeypatch.setattr(features, "_IMAGES", 2)  # in a forward pass
    assert torch.allclose(mixture(experts, rule, shots), zeta, atol=1e-4)


def test_rules_differ(experts: list[Expert]) -> None:
    assert mixture(experts, "average").tolist() == pytest.approx([1 / 3] * 3)
    assert len({tuple(mixture(experts, rule).tolist()) for rule in RULES}) == len(RULES)
    with pytest.raises(UserError, match=r"merging\.strategy: 'centred'"):
        MergeSettings("centred")
