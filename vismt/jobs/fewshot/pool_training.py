"""Training the experts of a pool one after the other, and finding trained ones in folders.

Each expert has a folder of its own under experts/ of the run, with its checkpoints, log and adapter, so an interrupted
run goes on inside the expert it was at. expert.json is written last and says that the expert is done.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import safetensors.torch
from accelerate import Accelerator
from torch import nn

from vismt import console
from vismt.config import TrainConfig
from vismt.engine import loop
from vismt.errors import UserError
from vismt.files import atomic_write, read_tensors
from vismt.jobs.fewshot.config import FewShotConfig
from vismt.lowrank.store import DESCRIPTION, check_tensors, save_adapter
from vismt.metatune.amt import AdversarialObjective
from vismt.metatune.maml import MamlNet
from vismt.metatune.objective import EpisodeBatches, EpisodeObjective
from vismt.metatune.pool import INDEX, Expert, read_pool
from vismt.metatune.protonet import ProtoNet

OWN_FILE, DONE, CLEAN = "classifier.safetensors", "expert.json", "clean"


def train_one(
    objective: EpisodeObjective,
    batches: EpisodeBatches,
    config: TrainConfig,
    folder: Path,
    config_hash: str,
    accelerator: Accelerator,
    model: nn.Module,
    *,
    seed: int,
) -> None:
    """Meta-tune the adapted `model` inside `objective`; writes adapter/ and what the classifier trained besides into `folder`."""

    def watch(step: int) -> None:
        if step % 10 == 0 and isinstance(objective, AdversarialObjective):
            objective.collapsed(step)

    loop.train(objective, batches, config, folder, config_hash, accelerator, seed=seed, after_step=watch)
    if accelerator.is_main_process:
        save_adapter(model, folder / "adapter")
        own = {name: value.detach().cpu().contiguous() for name, value in objective.proto.own_tensors().items()}
        atomic_write(folder / OWN_FILE, safetensors.torch.save(own))
    accelerator.wait_for_everyone()


def load_own(net: ProtoNet | MamlNet, folder: Path) -> None:
    """Give a classifier what `train_one` saved of it."""
    what = f"run '{folder}': {OWN_FILE}"
    net.load_own_tensors(read_tensors(folder / OWN_FILE, what)[1], what)


def trained(folder: Path, label: str) -> Path:
    """Where a run keeps the adapter of "clean" or of an expert; anything else is the run's single adapter."""
    own = folder / "experts" / label
    return own if own.is_dir() else folder


def train_pool(
    config: FewShotConfig,
    folder: Path,
    config_hash: str,
    accelerator: Accelerator,
    *,
    adapted: Callable[[], ProtoNet],
    batches: Callable[[int], EpisodeBatches],
) -> list[Expert]:
    """Train what is not done yet; the experts in the order of the levels.

    adapted() makes an untrained expert; batches(seed) its episodes. Experts of different levels see the same episodes,
    copies of a level others.
    """
    pool, planned = config.pool, config.pool.experts()
    for label in [CLEAN] * pool.clean + list(planned):
        own = folder / "experts" / label
        if (own / DONE).exists():
            console.stage("train", f"expert {label}: done before")
            continue
        copy, adversary = planned.get(label, (0, None))
        seed = config.seed + 1_000_003 * copy
        proto = adapted()
        objective = (
            EpisodeObjective(proto) if adversary is None else AdversarialObjective(proto, replace(adversary, seed=seed))
        )
        console.stage("train", f"expert {label}" + ("" if adversary is None else f"   input attack {label}/255"))
        settings = TrainConfig(**{**vars(config.train), "lr": pool.rates.get(label, config.train.lr)})
        train_one(objective, batches(seed), settings, own, config_hash, accelerator, proto.backbone.vit, seed=seed)
        if accelerator.is_main_process:
            atomic_write(own / DONE, json.dumps({"label": label, "seed": seed}))
        accelerator.wait_for_everyone()
    return [
        Expert(label, folder / "experts" / label / "adapter", read_scale(folder / "experts" / label))
        for label in planned
    ]


def read_scale(folder: Path) -> float:
    """The cosine's scale that was trained along with an adapter."""
    tensors = read_tensors(folder / OWN_FILE, f"run '{folder}'")[1]
    check_tensors(f"run '{folder}': {OWN_FILE}", {"scale": ()}, tensors)
    return float(tensors["scale"])


def find_experts(folder: Path) -> list[Expert]:
    """Trained experts in a run folder (of a pool, or of a single adapter), a pool folder or an adapter folder."""
    if (folder / INDEX).exists():
        return read_pool(folder)
    if (folder / "experts").is_dir():
        done = sorted(path.parent for path in (folder / "experts").glob(f"*/{DONE}"))
        found = [Expert(own.name, own / "adapter", read_scale(own)) for own in done if own.name != CLEAN]
        if found:
            return found
    if (folder / "adapter" / DESCRIPTION).exists():
        return [Expert(folder.name, folder / "adapter", read_scale(folder))]
    if (folder / DESCRIPTION).exists():
        scale = read_scale(folder.parent) if (folder.parent / OWN_FILE).exists() else 10.0
        return [Expert(folder.parent.name if folder.name == "adapter" else folder.name, folder, scale)]
    raise UserError(f"pool: '{folder}' holds no trained expert; give run folders, adapter folders or pools.")
