"""The plain loop of `bench fewshot` finds the accuracies of the protocol, so that the ratios compare equal work."""

from __future__ import annotations

import os

import pytest
import torch
from helpers.tiny import tiny_vit

from scripts.bench import fewshot
from vismt.backbones.vit import Backbone
from vismt.base.errors import UserError
from vismt.metatune.protocol.protocol import run_protocol


@pytest.fixture
def bench() -> fewshot.FewShotBench:
    return fewshot.FewShotBench(Backbone(tiny_vit(num_classes=0)), torch.device("cpu"), size=16)


def test_clean_accuracies_are_equal(bench):
    before = os.environ["VISMT_CACHE"]
    result = bench.clean(3, 1, 1.0)
    assert "accuracies equal" in str(result) and set(result.timing.seconds) == {
        "vismt",
        "vismt, next run",
        "plain loop",
    }
    assert os.environ["VISMT_CACHE"] == before
    plain = bench.plain
    bench.plain = lambda episodes, attack: ((~clean, clean) for clean, _ in plain(episodes, attack=attack))
    with pytest.raises(UserError, match="have other accuracies"):
        bench.clean(3, 1, 1.0)


def test_the_attack_is_that_of_the_protocol(bench):
    found = run_protocol(bench.net, bench.pixels, bench.sampler, episodes=2, attacks=[fewshot.SPEC])
    plain = [float((clean & attacked).double().mean()) for clean, attacked in bench.plain(2, attack=True)]
    # The protocol counts an image as wrong once a step has broken it; the loop looks at the last step.
    assert found[str(fewshot.SPEC)].tolist() == pytest.approx(plain, abs=3 / 75)
    assert float(found[str(fewshot.SPEC)].mean()) < float(found["clean"].mean())
