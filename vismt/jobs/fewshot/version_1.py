"""Run folders of version 0.1, with one adapter at the top or experts in experts/: move their files to arms/."""

from __future__ import annotations

from pathlib import Path

from vismt.base import console
from vismt.engine import runtime
from vismt.engine.study import ARMS, CHOSEN, Study
from vismt.engine.training_files import ADAPTER, DONE
from vismt.jobs.fewshot.config import FewShotConfig
from vismt.storage.files import atomic_write, read_json, sealed

FILES = (ADAPTER, "classifier.safetensors", "metrics.jsonl", "checkpoint.pt")


def move_to_arms(folder: Path, study: Study[FewShotConfig]) -> None:
    """Move the files of a run folder of version 0.1 to their present places; do nothing for other folders."""
    old = any((folder / name).exists() for name in (*FILES, "experts")) and not (folder / ARMS).exists()
    state = runtime.processes()
    if old and state.is_main_process:
        _move(folder, study)
        console.stage("layout", f"{folder}: files of version 0.1 moved to {ARMS}/")
    if old:
        state.wait_for_everyone()


def _move(folder: Path, study: Study[FewShotConfig]) -> None:
    facts = read_json(folder / "run.json", f"run '{folder}'") if (folder / "run.json").exists() else {}
    seed = study.seeds[0]
    for arm, config in study.arms.items():
        source = folder / "experts" / arm if (folder / "experts").exists() else folder
        training = study.training(arm, config.training.lr, seed)
        for name in FILES:
            if (source / name).exists():
                training.folder.mkdir(parents=True, exist_ok=True)
                (source / name).rename(training.folder / name)
        if (training.folder / ADAPTER).exists():
            atomic_write(training.folder / DONE, sealed(facts.get("adapt", {})))
            atomic_write(folder / ARMS / arm / CHOSEN, sealed({"lr": config.training.lr, "validation": {}}))
    pool = folder / "pool" / f"seed-{seed}"
    if (folder / "pool" / "pool.json").exists():
        (folder / "pool").rename(folder / "pool-0.1")
        pool.parent.mkdir()
        (folder / "pool-0.1").rename(pool)
    if (folder / "selection.json").exists():
        pool.mkdir(parents=True, exist_ok=True)
        selection = read_json(folder / "selection.json", f"run '{folder}'")
        atomic_write(pool / "selection.json", sealed(selection, indent=1))
        (folder / "selection.json").unlink()
    if (folder / "records").is_dir():
        episodes = folder / "episodes" / f"seed-{seed}"
        episodes.parent.mkdir(exist_ok=True)
        (folder / "records").rename(episodes)
