"""The recommender of a language-model run: SASRec, trained once on all training histories, frozen for every arm and seed.

It lies in recommender/ of the run folder and is trained by the one loop, so that it resumes like everything else. It sees
the training rows alone; what it would choose of the candidates itself stands beside the arms.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from vismt import console
from vismt.config import TrainConfig
from vismt.data.batching import Passes
from vismt.engine import loop, runtime, study_files
from vismt.files import atomic_write
from vismt.jobs.lm.config import LmConfig, LmRecommenderConfig, task_of, trained_task
from vismt.jobs.lm.data import LmData
from vismt.llm.hybrid import Hybrid
from vismt.llm.sasrec import NextItem, SASRec, padded
from vismt.llm.tasks.base import Item, Record
from vismt.seeds import digest, mix_seed

FOLDER, FILE = "recommender", "sasrec.safetensors"
OTHERS = 1024  # users that "shuffled-user" draws from


class Recommender:
    """The recommender of a run folder, trained when it is first asked for."""

    def __init__(self, config: LmConfig, folder: Path, config_hash: str, data: LmData) -> None:
        self.config, self.folder, self.hash, self.data = config, folder / FOLDER, config_hash, data
        self.settings = config.recommender or LmRecommenderConfig()

    @cached_property
    def net(self) -> SASRec:
        """SASRec, frozen and in evaluation mode, on the CPU."""
        settings, path = self.settings, self.folder / FILE
        made = SASRec(
            len(self.data.catalogue),
            task_of(trained_task(self.config)).history,
            settings.width,
            settings.blocks,
            settings.heads,
            settings.dropout,
            self.config.seed,
        )
        if path.exists():
            study_files.load_state(made, path, f"run '{self.folder}'")
        else:
            self._train(made)
        return made.cpu().requires_grad_(False).eval()

    def head(self, width: int, config: LmConfig) -> Hybrid:
        """What an arm's net has of it. width: of the LM's states."""
        vectors = task_of(trained_task(self.config)).items
        others = self._others() if config.gates == "shuffled-user" else None
        return Hybrid(copy.deepcopy(self.net), width if vectors else None, config.gates, others, config.seed)

    def fingerprint(self) -> str:
        """What tells it from another."""
        return digest(safetensors.torch.save(study_files.state(self.net)))

    @torch.no_grad()
    def records(self, items: Sequence[Item]) -> list[Record]:
        """What it says itself of the candidates of rows, as the tasks do."""
        net = self.net
        users = net(padded([item.listed.history for item in items]))
        scores = net.scores(users, torch.tensor([item.listed.candidates for item in items]))
        found = scores.double().log_softmax(1).tolist()
        return [{"id": item.id, "label": item.label, "log_p": own} for item, own in zip(items, found)]

    @torch.no_grad()
    def _others(self) -> Tensor:
        """(n, d) of users of the training rows, chosen by chance."""
        rows = self.data.interactions()
        order = sorted(range(len(rows)), key=lambda i: mix_seed(self.config.seed, "other user", i))[:OTHERS]
        net = self.net
        return net(padded([rows[i][0][-len(net.position.weight) :] for i in order]))

    def _train(self, net: SASRec) -> None:
        settings, rows = self.settings, self.data.interactions()
        console.stage("train", f"recommender   {len(rows):,} rows   {len(self.data.catalogue):,} items")
        config = TrainConfig(
            steps=settings.steps, lr=settings.lr, weight_decay=settings.weight_decay, log_every=50, checkpoint_every=500
        )
        accelerator = runtime.accelerator()
        loop.train(
            NextItem(net),
            _Histories(rows, settings.batch, len(net.position.weight), self.config.seed),
            config,
            self.folder,
            self.hash,
            accelerator,
            seed=self.config.seed,
        )
        if accelerator.is_main_process:
            atomic_write(self.folder / FILE, safetensors.torch.save(study_files.state(net)))
        accelerator.wait_for_everyone()


class _Histories:
    """batches(k) -> {"history" (b, n), "next" (b,)}: passes over all rows, each in an order of its own."""

    def __init__(self, rows: Sequence[tuple[list[int], int]], batch: int, length: int, seed: int) -> None:
        self.rows, self.length, self._passes = rows, length, Passes(len(rows), batch, seed=seed, unit="rows")

    def __call__(self, number: int) -> dict[str, Any]:
        chosen = [self.rows[i] for i in self._passes(number).tolist()]
        histories = padded([history[-self.length :] for history, _ in chosen])
        return {"history": histories, "next": torch.tensor([target for _, target in chosen])}
