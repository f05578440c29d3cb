"""The trained experts in folders, to assemble a pool from several runs."""

from __future__ import annotations

from pathlib import Path

from vismt.base.errors import UserError
from vismt.engine.study import ALONE, ARMS, CHOSEN, read_choice
from vismt.engine.training_files import ADAPTER, DONE, check_files
from vismt.jobs.fewshot.models import OWN_FILE
from vismt.jobs.fewshot.pool_experts import CLEAN
from vismt.lowrank.files.save_load import DESCRIPTION, check_tensors
from vismt.metatune.amt.pool import INDEX, Expert, read_pool
from vismt.storage.files import read_tensors


def read_scale(folder: Path) -> float:
    """Return the scale of the cosine classifier that was trained with an adapter."""
    check_files(folder)
    tensors = read_tensors(folder / OWN_FILE, f"run '{folder}'")[1]
    check_tensors(f"run '{folder}': {OWN_FILE}", {"scale": ()}, tensors)
    return float(tensors["scale"])


def _label(folder: Path) -> str:
    """Return the name of an expert in a folder: that of the arm where the folder is a training's."""
    arm = folder.parent
    return arm.name if arm.parent.name == ARMS else folder.name


def find_experts(folder: Path) -> list[Expert]:
    """Return the trained experts in a run folder (its first seed), a pool folder, a training's folder or an adapter folder."""
    if (folder / INDEX).exists():
        return read_pool(folder)
    arms = sorted(path.parent for path in (folder / ARMS).glob(f"*/{CHOSEN}"))
    pooled = {expert.label for index in folder.glob(f"pool/*/{INDEX}") for expert in read_pool(index.parent)}
    experts = []
    for arm in (arm for arm in arms if arm.name != CLEAN or CLEAN in pooled):  # else the reference beside the pool
        trainings = sorted(arm.glob(f"lr-{read_choice(folder, arm.name).lr:g}-seed-*/{DONE}"))
        if trainings:
            training = trainings[0].parent
            label = folder.name if arm.name == ALONE else arm.name
            experts.append(Expert(label, training / ADAPTER, read_scale(training)))
    if experts:
        return experts
    if (folder / ADAPTER / DESCRIPTION).exists():
        return [Expert(_label(folder), folder / ADAPTER, read_scale(folder))]
    if (folder / DESCRIPTION).exists():
        scale = read_scale(folder.parent) if (folder.parent / OWN_FILE).exists() else 10.0
        return [Expert(_label(folder.parent) if folder.name == ADAPTER else folder.name, folder, scale)]
    if (folder / "experts").is_dir():
        raise UserError(
            f"pool: '{folder}' is a run folder of version 0.1; `vismt evaluate {folder}` moves its experts to arms/."
        )
    raise UserError(f"pool: '{folder}' holds no trained expert; give run folders, adapter folders or pools.")
