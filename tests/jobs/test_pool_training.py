"""Experts of a pool trained one after the other, taken up inside of one, and found again in folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers.amt_parts import adapted, episode, saved
from torch import Tensor

from vismt.config import TrainConfig
from vismt.engine import runtime
from vismt.engine.log import read_lines
from vismt.errors import UserError
from vismt.jobs.fewshot import pool_training as experts_file
from vismt.jobs.fewshot.config import FewShotConfig, PoolConfig
from vismt.jobs.fewshot.pool_training import OWN_FILE, find_experts, read_scale, train_pool
from vismt.metatune.amt import AdversarialObjective
from vismt.metatune.objective import EpisodeObjective
from vismt.metatune.pool import Expert, assemble


def config(levels: list, *, seed: int = 0, rates: dict | None = None, **train: object) -> FewShotConfig:
    settings = TrainConfig(**{"steps": 5, "optimizer": "sgd", "lr": 0.02, "checkpoint_every": 2, **train})
    pool = PoolConfig(levels=levels, clean=True, gamma=0.02, rates=rates or {})
    return FewShotConfig(train=settings, pool=pool, seed=seed)


def pooled(
    folder: Path,
    settings: FewShotConfig,
    seen: list | None = None,
    stop: Callable[[int, int], bool] = lambda seed, number: False,
) -> list[Expert]:
    """The experts; every episode that is asked for is noted as (seed, number)."""
    seen = [] if seen is None else seen

    def batches(seed: int) -> Callable[[int], dict[str, Tensor]]:
        def batch(number: int) -> dict[str, Tensor]:
            if stop(len(seen), number):
                raise KeyboardInterrupt
            seen.append((seed, number))
            return episode(number, seed % 97)

        return batch

    return train_pool(settings, folder, "hash", runtime.accelerator(), adapted=adapted, batches=batches)


def files(folder: Path) -> dict[str, bytes]:
    """What an expert's training leaves, but for times."""
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def test_an_interrupted_pool_goes_on_inside_the_expert_it_was_at(tmp_path: Path) -> None:
    settings, seen, again = config([0.1, 1]), [], []
    whole = pooled(tmp_path / "whole", settings, seen)
    assert seen == [(0, number) for number in range(5)] * 3
    # Cut in the fourth episode of the second of three experts; its checkpoint is of step 2.
    first: list = []
    with pytest.raises(KeyboardInterrupt):
        pooled(tmp_path / "cut", settings, first, stop=lambda count, number: count == 8)
    torch.manual_seed(99)
    cut = pooled(tmp_path / "cut", settings, again)
    assert first == seen[:8] and again == [(0, 2), (0, 3), (0, 4), *seen[10:]]
    for one, other in zip(whole, cut):
        assert one.label == other.label and one.scale == other.scale != 10
        assert files(one.folder.parent) == files(other.folder.parent) and len(files(one.folder.parent)) == 2
    for label in ("clean", "0.1", "1"):
        rows = [read_lines(tmp_path / name / "experts" / label / "metrics.jsonl") for name in ("whole", "cut")]
        for row in rows[0] + rows[1]:
            del row["elapsed_s"]
        assert rows[0] == rows[1] and len(rows[0]) == 5
    # What is done stays done, its checkpoint deleted or not.
    again.clear()
    for path in (tmp_path / "cut").rglob("checkpoint.pt"):
        path.unlink()
    pooled(tmp_path / "cut", settings, again)
    assert not again


def test_levels_share_their_episodes_and_copies_have_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, attacks = [], []
    one = experts_file.train_one

    def watched(objective: EpisodeObjective, *rest: object, seed: int, **more: object) -> None:
        made.append((type(objective), seed))
        attacks.append(objective.adversary if isinstance(objective, AdversarialObjective) else None)
        one(objective, *rest, seed=seed, **more)

    monkeypatch.setattr(experts_file, "train_one", watched)
    seen: list = []
    found = pooled(tmp_path, config([2, 8, 2, [2, 8], 2], seed=3, steps=1), seen)
    assert [expert.label for expert in found] == ["2", "8", "2-copy2", "2-8", "2-copy3"]
    seeds = [seed for seed, _ in seen]  # clean and the five experts, in that order
    assert seeds[:3] == [3, 3, 3] and seeds[4] == 3 and len({3, seeds[3], seeds[5]}) == 3
    assert [kind for kind, _ in made] == [EpisodeObjective] + [AdversarialObjective] * 5
    # Everything of a copy that is drawn follows its seed: dropout's, and the random start of the attack.
    assert [seed for _, seed in made] == seeds and [a.seed for a in attacks[1:]] == seeds[1:]
    assert [a.epsilons for a in attacks[1:]] == [(2 / 255,), (8 / 255,), (2 / 255,), (2 / 255, 8 / 255), (2 / 255,)]
    # The first episode of "2-8" is one of 2 or of 8, so one step of it is theirs.
    tensors = {expert.label: tuple(files(expert.folder).values()) for expert in found}
    assert tensors.pop("2-8") in (tensors["2"], tensors["8"]) and len(set(tensors.values())) == 4


def test_rates_are_an_experts_own(tmp_path: Path) -> None:
    settings = config([1, 2], rates={"2": 0.5, "clean": 0.25}, steps=1)
    pooled(tmp_path, settings)
    rates = {
        label: read_lines(tmp_path / "experts" / label / "metrics.jsonl")[0]["lr"] for label in ("clean", "1", "2")
    }
    assert rates == {"clean": 0.25, "1": 0.02, "2": 0.5} and settings.train.lr == 0.02


def test_a_collapse_stops_the_pool_and_is_said(tmp_path: Path) -> None:
    def flat() -> object:
        proto = adapted()
        with torch.no_grad():
            proto.scale.fill_(0.0)
        return proto

    settings = config([1], steps=20, lr=1e-12)
    settings.pool = replace(settings.pool, clean=False)
    with pytest.raises(UserError, match=r"collapsed to the uniform prediction .seen at step 10"):
        train_pool(
            settings,
            tmp_path,
            "hash",
            runtime.accelerator(),
            adapted=flat,
            batches=lambda seed: lambda number: episode(number),
        )
    assert not list(tmp_path.rglob("expert.json"))


# ---- finding experts


def scale_file(folder: Path, value: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OWN_FILE).write_bytes(safetensors.torch.save({"scale": torch.tensor(value)}))


@pytest.fixture
def trained(tmp_path: Path) -> list[Path]:
    """Two adapter folders."""
    return [expert.folder for expert in saved(tmp_path / "made", (3, 4))]


def pool_run(folder: Path, trained: list[Path], labels: tuple[str, ...], done: tuple[str, ...]) -> Path:
    for number, label in enumerate(labels):
        own = folder / "experts" / label
        shutil.copytree(trained[number % 2], own / "adapter")
        scale_file(own, 4.0 + number)
        if label in done:
            (own / "expert.json").write_text(json.dumps({"label": label, "seed": 0}))
    return folder


def test_experts_of_a_pools_run_that_are_done(tmp_path: Path, trained: list[Path]) -> None:
    run = pool_run(tmp_path / "run", trained, ("clean", "6", "8", "9"), ("clean", "6", "8"))
    assert [(e.label, e.folder, e.scale) for e in find_experts(run)] == [
        ("6", run / "experts" / "6" / "adapter", 5.0),
        ("8", run / "experts" / "8" / "adapter", 6.0),
    ]


def test_renaming_a_folder_renames_its_expert(tmp_path: Path, trained: list[Path]) -> None:
    """What the message about two experts of one name advises."""
    runs = [pool_run(tmp_path / name, trained, ("8",), ("8",)) for name in ("a", "b")]
    with pytest.raises(UserError, match=r"two experts are called alike in 8, 8: rename a folder"):
        assemble([expert for run in runs for expert in find_experts(run)], tmp_path / "pool")
    (runs[1] / "experts" / "8").rename(runs[1] / "experts" / "8-second")
    experts = [expert for run in runs for expert in find_experts(run)]
    assert [expert.label for expert in experts] == ["8", "8-second"]
    assemble(experts, tmp_path / "pool")


def test_every_other_kind_of_folder(tmp_path: Path, trained: list[Path]) -> None:
    # a run of a single adapter, the adapter inside of it, an adapter alone (whose scale is the classifier's start value)
    run = tmp_path / "single"
    shutil.copytree(trained[0], run / "adapter")
    scale_file(run, 7.0)
    assert find_experts(run) == [Expert("single", run / "adapter", 7.0)]
    assert find_experts(run / "adapter") == [Expert("single", run / "adapter", 7.0)]
    assert find_experts(trained[1]) == [Expert("1", trained[1], 10.0)]
    # one expert of a pool's run, and a pool
    own = pool_run(tmp_path / "run", trained, ("6", "8"), ("6", "8")) / "experts" / "8"
    assert find_experts(own) == [Expert("8", own / "adapter", 5.0)]
    pool = assemble(find_experts(run) + find_experts(own), tmp_path / "pool")
    assert find_experts(pool) == [Expert("single", pool / "expert-0", 7.0), Expert("8", pool / "expert-1", 5.0)]


def test_folders_without_an_expert(tmp_path: Path, trained: list[Path]) -> None:
    unfinished = pool_run(tmp_path / "run", trained, ("clean", "8"), ("clean",))
    for folder in (unfinished, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=rf"pool: '{folder}' holds no trained expert; give run folders"):
            find_experts(folder)
    (tmp_path / "pool.json").write_text(
        json.dumps({"format": 1, "experts": [{"label": "a", "folder": "..", "scale": 1}]})
    )
    with pytest.raises(UserError, match=r"names '\.\.', which is no folder of a pool"):
        find_experts(tmp_path)


def test_a_scale_that_is_none(tmp_path: Path, trained: list[Path]) -> None:
    run = pool_run(tmp_path / "run", trained, ("8",), ("8",))
    (run / "experts" / "8" / OWN_FILE).write_bytes(safetensors.torch.save({"scale": torch.ones(2)}))
    with pytest.raises(UserError, match=r"scale: saved \(2,\), needed \(\)"):
        find_experts(run)
    (run / "experts" / "8" / OWN_FILE).write_bytes(b"torn")
    with pytest.raises(UserError, match="is damaged or no safetensors file"):
        read_scale(run / "experts" / "8")
    (run / "experts" / "8" / OWN_FILE).unlink()
    with pytest.raises(UserError, match="no file"):
        find_experts(run)


def test_pools_of_another_rank_are_refused_with_the_reason(tmp_path: Path) -> None:
    two, three = (saved(tmp_path / str(rank), (3, 4), rank=rank) for rank in (2, 3))
    pools = [assemble([one], tmp_path / f"pool{rank}") for rank, one in ((2, two[0]), (3, three[1]))]
    with pytest.raises(
        UserError, match=r"experts '0' and '1' differ at .*: rank 2 and 3. .* no mixture of them exists"
    ):
        assemble([expert for pool in pools for expert in find_experts(pool)], tmp_path / "both")
    assert not (tmp_path / "both").exists()
