"""The mean cosines between users of clusters are those of loops over pairs, and a user is no pair with himself."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from scripts import user_gradients
from scripts.user_gradients import cosines, measured, table


def drawn(means: torch.Tensor, users: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the products of the normalised gradients of `users` users around the mean of each cluster, and the clusters."""
    generator = torch.Generator().manual_seed(seed)
    clusters = torch.arange(len(means)).repeat_interleave(users)
    noises = torch.randn(len(clusters), means.shape[1], generator=generator, dtype=means.dtype)
    gradients = F.normalize(means[clusters] + noise * noises)
    return gradients @ gradients.T, clusters


def test_mean_cosines_are_those_of_loops() -> None:
    gram, clusters = drawn(torch.eye(3, 5, dtype=torch.float64), 4, 1.0)
    found = cosines(gram, F.one_hot(clusters).T.double())
    for a in range(3):
        for b in range(3):
            pairs = [
                gram[u, v] for u in range(12) for v in range(12) if (clusters[u], clusters[v]) == (a, b) and u != v
            ]
            assert found[a, b] == pytest.approx(float(torch.stack(pairs).mean()))


def test_a_user_who_is_drawn_twice_counts_twice_but_not_with_himself() -> None:
    gram, _ = drawn(torch.zeros(1, 5, dtype=torch.float64), 3, 1.0)
    found = cosines(gram, torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64))
    assert found[0, 0] == pytest.approx(float(gram[0, 1]))
    assert found[0, 1] == pytest.approx(float(2 * gram[0, 1] + 2 * gram[0, 2] + 1 + gram[1, 2]) / 6)


def test_clusters_that_pull_apart_are_told_from_clusters_that_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_gradients, "DRAWS", 200)
    shared = torch.ones(1, 50, dtype=torch.float64)
    apart, same = torch.cat([shared, shared, -shared, -shared]), shared.repeat(4, 1)
    found = {}
    for name, means in {"apart": apart, "same": same}.items():
        grams, clusters = zip(*(drawn(means, 40, 3.0, seed) for seed in range(2)))
        found[name] = measured(grams, clusters[0])
    assert found["apart"]["negative"] == 4 and found["same"]["negative"] == 0
    assert found["apart"]["other clusters"][2] < 0 < found["apart"]["same − other"][1]
    value, low, high = found["same"]["same − other"]
    assert low < 0 < high and low < value < high and found["same"]["other clusters"][1] > 0
    assert "| start | 160 | " in table({"start": found["apart"]}) and "| 4 of 28 |" in table({"start": found["apart"]})


def test_a_run_without_the_arm_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(user_gradients, "open_run", lambda folder: SimpleNamespace(job=None))
    monkeypatch.setattr(user_gradients, "NUMBERS", tmp_path / "numbers.json")
    assert user_gradients.main(["my_run"]) == 2 and not list(tmp_path.iterdir())
    error = capsys.readouterr().err
    assert error.startswith("error: run 'my_run': it has no arm 'lora' of a language model") and error.count("\n") == 1


def test_the_page_has_the_table_of_the_numbers() -> None:
    numbers = json.loads(user_gradients.NUMBERS.read_text())
    assert user_gradients.MARKED.search(user_gradients.PAGE.read_text(encoding="utf8"))[0] == table(numbers)
