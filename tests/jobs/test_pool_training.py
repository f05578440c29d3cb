"""Experts of a pool trained one after the other, taken up inside of one, and found again in folders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers.amt_parts import adapted, episode, saved
from helpers.toy_training import logged
from torch import Tensor

from vismt.base.errors import UserError
from vismt.config.sections import AdaptConfig, TrainConfig
from vismt.jobs import training_job
from vismt.jobs.fewshot.config import EvaluateConfig, FewShotConfig, PoolConfig, SourceConfig
from vismt.jobs.fewshot.job import FewShotJob
from vismt.jobs.fewshot.models import OWN_FILE, find_experts, read_scale
from vismt.metatune.amt.method import AdversarialObjective
from vismt.metatune.amt.pool import Expert, assemble, read_pool
from vismt.metatune.protonet import EpisodeObjective, ProtoNet
from vismt.storage.files import sealed


def config(levels: list, *, seed: int = 0, clean: bool = True, **train: object) -> FewShotConfig:
    settings = TrainConfig(**{"steps": 5, "optimizer": "sgd", "lr": 0.02, "checkpoint_every": 2, **train})
    pool = PoolConfig(levels=levels, clean=clean, gamma=0.02)
    return FewShotConfig(
        adapt=AdaptConfig(method="amt", rank=2),
        train=settings,
        pool=pool,
        seed=seed,
        source=SourceConfig(data=["drawn"]),
        evaluate=EvaluateConfig(data=["other"], models=["frozen"]),
    )


class PoolJob(FewShotJob):
    """A pool of small experts on drawn episodes; every episode that is read is noted as (seed, number)."""

    def __init__(
        self,
        settings: FewShotConfig,
        folder: Path,
        calls: list | None = None,
        stop: Callable[[int, int], bool] = lambda count, number: False,
    ) -> None:
        super().__init__(settings, folder, "hash")
        self.calls = [] if calls is None else calls
        self.objectives: list[EpisodeObjective] = []
        self.stop = stop

    def check_data(self) -> None:
        pass

    def check_arm(self, config: FewShotConfig) -> None:
        pass

    def fresh(self, config: FewShotConfig) -> ProtoNet:
        return adapted()

    def objective(self, config: FewShotConfig, net: ProtoNet, balanced: list) -> EpisodeObjective:
        self.objectives.append(super().objective(config, net, balanced))
        return self.objectives[-1]

    def training_sets(self) -> dict[str, str]:
        return {}

    def batches(self, config: FewShotConfig) -> Callable[[int], dict[str, Tensor]]:
        seed = config.training_seed

        def batch(number: int) -> dict[str, Tensor]:
            if self.stop(len(self.calls), number):
                raise KeyboardInterrupt
            self.calls.append((seed, number))
            return episode(number, seed % 97)

        return batch


def pooled(folder: Path, settings: FewShotConfig, calls: list | None = None, **options: object) -> list[Expert]:
    """The experts of the pool that a run assembles."""
    PoolJob(settings, folder, calls, **options).train()
    return read_pool(folder / "pool" / f"seed-{settings.seed}")


def training(folder: Path, label: str, lr: float = 0.02, seed: int = 0) -> Path:
    """The folder of an expert's training."""
    return folder / "arms" / label / f"lr-{lr:g}-seed-{seed}"


def files(folder: Path) -> dict[str, bytes]:
    """What an expert's training leaves, but for times."""
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def test_an_interrupted_pool_goes_on_inside_the_expert_it_was_at(tmp_path: Path) -> None:
    settings = config([0.1, 1])
    calls: list = []
    again: list = []
    whole = pooled(tmp_path / "whole", settings, calls)
    assert calls == [(0, number) for number in range(5)] * 3
    # Cut in the fourth episode of the second of three experts; its checkpoint is of step 2.
    first: list = []
    with pytest.raises(KeyboardInterrupt):
        pooled(tmp_path / "cut", settings, first, stop=lambda count, number: count == 8)
    torch.manual_seed(99)
    cut = pooled(tmp_path / "cut", settings, again)
    assert first == calls[:8] and again == [(0, 2), (0, 3), (0, 4), *calls[10:]]
    assert len(whole) == len(cut) == 2
    for expert, other in zip(whole, cut):
        assert expert.label == other.label and expert.scale == other.scale != 10
        folders = [training(tmp_path / name, expert.label) for name in ("whole", "cut")]
        assert files(folders[0]) == files(folders[1]) and len(files(folders[0])) == 4  # two checkpoints
    for label in ("clean", "0.1", "1"):
        rows = [logged(training(tmp_path / name, label)) for name in ("whole", "cut")]
        assert rows[0] == rows[1] and len(rows[0]) == 5
    # What is done stays done, its checkpoint deleted or not.
    again.clear()
    for path in (tmp_path / "cut").rglob("checkpoint-*"):
        path.unlink()
    pooled(tmp_path / "cut", settings, again)
    assert not again


def test_levels_share_their_episodes_and_copies_have_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop_seeds, train = [], training_job.loop.train

    def watched(*args: object, seed: int, **options: object) -> None:
        loop_seeds.append(seed)
        train(*args, seed=seed, **options)

    monkeypatch.setattr(training_job.loop, "train", watched)
    job = PoolJob(config([2, 8, 2, [2, 8], 2], seed=3, steps=1), tmp_path)
    job.train()
    experts = read_pool(tmp_path / "pool" / "seed-3")
    assert [expert.label for expert in experts] == ["2", "8", "2-copy2", "2-8", "2-copy3"]
    seeds = [seed for seed, _ in job.calls]  # clean and the five experts, in that order
    assert seeds[:3] == [3, 3, 3] and seeds[4] == 3 and len({3, seeds[3], seeds[5]}) == 3
    assert [type(objective) for objective in job.objectives] == [EpisodeObjective] + [AdversarialObjective] * 5
    # Everything of a copy that is drawn follows its seed: dropout's, and the random start of the attack.
    attacks = [objective.adversary for objective in job.objectives[1:]]
    assert loop_seeds == seeds and [attack.seed for attack in attacks] == seeds[1:]
    budgets = [(2 / 255,), (8 / 255,), (2 / 255,), (2 / 255, 8 / 255), (2 / 255,)]
    assert [attack.epsilons for attack in attacks] == budgets
    # The first episode of "2-8" is one of 2 or of 8, so one step of it is theirs.
    tensors = {expert.label: tuple(files(training(tmp_path, expert.label, seed=3)).values()) for expert in experts}
    assert tensors.pop("2-8") in (tensors["2"], tensors["8"]) and len(set(tensors.values())) == 4


def test_a_collapse_stops_the_pool(tmp_path: Path) -> None:
    class Flat(PoolJob):
        def fresh(self, config: FewShotConfig) -> ProtoNet:
            proto = adapted()
            with torch.no_grad():
                proto.scale.fill_(0.0)
            return proto

    job = Flat(config([1], clean=False, steps=20, lr=1e-12), tmp_path)
    with pytest.raises(UserError, match=r"collapsed to one answer for every image .seen at step 10"):
        job.train()
    assert not list(tmp_path.rglob("done.json")) and not (tmp_path / "pool").exists()


# ---- finding experts


def scale_file(folder: Path, value: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OWN_FILE).write_bytes(safetensors.torch.save({"scale": torch.tensor(value)}))


@pytest.fixture
def trained(tmp_path: Path) -> list[Path]:
    """Two adapter folders."""
    return [expert.folder for expert in saved(tmp_path / "made", (3, 4))]


def pool_run(folder: Path, trained: list[Path], labels: tuple[str, ...], done: tuple[str, ...]) -> Path:
    """A run folder with the trainings of several experts, some of them finished."""
    for number, label in enumerate(labels):
        place = training(folder, label)
        shutil.copytree(trained[number % 2], place / "adapter")
        scale_file(place, 4.0 + number)
        (folder / "arms" / label / "chosen.json").write_text(sealed({"lr": 0.02, "validation": {}}))
        if label in done:
            (place / "done.json").write_text(sealed({"files": {}}))
    return folder


def test_experts_of_a_pools_run_that_are_done(tmp_path: Path, trained: list[Path]) -> None:
    run = pool_run(tmp_path / "run", trained, ("clean", "6", "8", "9"), ("clean", "6", "8"))
    assert [(e.label, e.folder, e.scale) for e in find_experts(run)] == [
        ("6", training(run, "6") / "adapter", 5.0),
        ("8", training(run, "8") / "adapter", 6.0),
    ]


def test_experts_of_arms_are_all_found_each_by_its_lowest_seed(tmp_path: Path, trained: list[Path]) -> None:
    run = pool_run(tmp_path / "run", trained, ("clean", "6"), ("clean", "6"))
    for seed in (10, 2):
        shutil.copytree(training(run, "6"), training(run, "6", seed=seed))
    shutil.rmtree(training(run, "6"))
    (run / "config.resolved.yaml").write_text("pool: null\narms: {clean: {}, '6': {}}\n")
    assert [expert.folder for expert in find_experts(run)] == [
        training(run, "6", seed=2) / "adapter",
        training(run, "clean") / "adapter",
    ]
    (run / "config.resolved.yaml").write_text("pool: {levels: [6]}\n")  # whose clean arm is the reference
    assert [expert.label for expert in find_experts(run)] == ["6"]
    (run / "config.resolved.yaml").write_text("pool: {levels: [6]}\narms: {'6': {}, clean: {}}\n")  # arms beside a pool
    with pytest.raises(UserError, match="holds no trained expert"):
        find_experts(run)


def test_renaming_a_folder_renames_its_expert(tmp_path: Path, trained: list[Path]) -> None:
    """What the message about two experts of one name advises."""
    runs = [pool_run(tmp_path / name, trained, ("clean", "8"), ("clean", "8")) for name in ("a", "b")]
    with pytest.raises(UserError, match=r"two experts have the same label in 8, 8: rename a folder"):
        assemble([expert for run in runs for expert in find_experts(run)], tmp_path / "pool")
    (runs[1] / "arms" / "8").rename(runs[1] / "arms" / "8-second")
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
    place = training(pool_run(tmp_path / "run", trained, ("6", "8"), ("6", "8")), "8")
    assert find_experts(place) == [Expert("8", place / "adapter", 5.0)]
    pool = assemble(find_experts(run) + find_experts(place), tmp_path / "pool")
    assert find_experts(pool) == [Expert("single", pool / "expert-0", 7.0), Expert("8", pool / "expert-1", 5.0)]
    # a run of one arm is called by its folder
    alone = pool_run(tmp_path / "alone", trained, ("adapted",), ("adapted",))
    assert find_experts(alone) == [Expert("alone", training(alone, "adapted") / "adapter", 4.0)]


def test_folders_without_an_expert(tmp_path: Path, trained: list[Path]) -> None:
    unfinished = pool_run(tmp_path / "run", trained, ("clean", "8"), ("clean",))
    for folder in (unfinished, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=rf"pool: '{folder}' holds no trained expert; give run folders"):
            find_experts(folder)
    (tmp_path / "pool.json").write_text(sealed({"format": 1, "experts": [{"label": "a", "folder": "..", "scale": 1}]}))
    with pytest.raises(UserError, match=r"names '\.\.', which is not a folder of a pool"):
        find_experts(tmp_path)


def test_a_scale_that_is_none(tmp_path: Path, trained: list[Path]) -> None:
    run = pool_run(tmp_path / "run", trained, ("8",), ("8",))
    (training(run, "8") / OWN_FILE).write_bytes(safetensors.torch.save({"scale": torch.ones(2)}))
    with pytest.raises(UserError, match=r"scale: saved \(2,\), needed \(\)"):
        find_experts(run)
    (training(run, "8") / OWN_FILE).write_bytes(b"torn")
    with pytest.raises(UserError, match="is damaged or not a safetensors file"):
        read_scale(training(run, "8"))
    (training(run, "8") / OWN_FILE).unlink()
    with pytest.raises(UserError, match="no file"):
        find_experts(run)


def test_experts_of_several_pools_and_ranks_make_one_pool(tmp_path: Path) -> None:
    two, three = (saved(tmp_path / str(rank), (3, 4), rank=rank) for rank in (2, 3))
    pools = [assemble([expert], tmp_path / f"pool{rank}") for rank, expert in ((2, two[0]), (3, three[1]))]
    both = assemble([expert for pool in pools for expert in find_experts(pool)], tmp_path / "both")
    assert [expert.label for expert in read_pool(both)] == ["0", "1"]
