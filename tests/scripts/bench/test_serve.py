"""The benchmark of mixed batches on a tiny model: its rows, and the check that both libraries compute the same."""

from __future__ import annotations

import pytest
import torch
from helpers.language_models import random_lm

from scripts.bench import serve
from vismt.base.errors import UserError

CPU = torch.device("cpu")


def test_rows_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "RANK", 2)
    monkeypatch.setattr(serve, "WRITTEN", 2)
    model = random_lm("llama")
    classes = [type(module) for module in model.modules()]
    results = serve.serve(model, 2, CPU, (3, 5))
    assert [type(module) for module in model.modules()] == classes  # peft's layers are in a copy
    assert [result.title.split(", ")[2] for result in results] == ["16 tokens", "40 tokens"]
    for result in results:
        assert list(result.timing.seconds) == [serve.ONE, serve.MIXED, serve.PEFT_ONE, serve.PEFT]
        lines = str(result).splitlines()
        assert "time of vismt, 8 adapters / vismt, 1 adapter: " in lines[-2] and "target at most 1.15" in lines[-2]
        assert "time of vismt, 8 adapters / peft, 8 adapters: " in lines[-1]


def test_other_logits_end_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "RANK", 2)
    chosen = serve.adapters_per_sample
    monkeypatch.setattr(serve, "adapters_per_sample", lambda names: chosen(names[::-1]))
    with pytest.raises(UserError, match="have other logits; the ratio means nothing"):
        serve.serve(random_lm("llama", initializer_range=0.2), 1, CPU, (3, 5))


def test_switching_changes_the_answers_and_is_timed_beside_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "SHARE", 0.5)
    result = serve.switching(random_lm("llama", initializer_range=0.2), 2, CPU, 5)
    assert list(result.timing.seconds) == [serve.SAME, serve.SWITCHED]
    monkeypatch.setattr(serve, "switch", lambda model, adapter: model)
    with pytest.raises(UserError, match="same logits; the ratio means nothing"):
        serve.switching(random_lm("llama", initializer_range=0.2), 1, CPU, 5)
