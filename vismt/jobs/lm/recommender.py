"""The recommender of a language-model run: SASRec, trained once on all training histories, frozen for every arm and seed.

It is kept in recommender/ of the run folder and trained by the common training loop, so that it resumes like every training.
It is trained on the training rows only; its choice among the candidates is reported beside the arms.
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

from vismt import console, ranks
from vismt.config import TrainConfig
from vismt.data.batching import Passes
from vismt.engine import loop, runtime, training_files
from vismt.files import atomic_write
from vismt.jobs.lm.config import LmConfig, LmRecommenderConfig, recommendation_of, trained_task
from vismt.jobs.lm.data import LmData
from vismt.llm.hybrid import Hybrid
from vismt.llm.sasrec import NextItem, SASRec, padded
from vismt.llm.tasks.base import Item, Listed, Record
from vismt.seeds import digest, mix_seed

FOLDER = "recommender"
FILE = "sasrec.safetensors"
OTHERS = 1024  # number of users that "shuffled-user" draws from


class Recommender:
    """The recommender of a run folder, trained on first use."""

    def __init__(self, config: LmConfig, folder: Path, config_hash: str, data: LmData) -> None:
        self.config = config
        self.folder = folder / FOLDER
        self.hash = config_hash
        self.data = data
        self.settings = config.recommender or LmRecommenderConfig()

    @cached_property
    def net(self) -> SASRec:
        """SASRec, frozen and in evaluation mode, on the CPU."""
        settings = self.settings
        path = self.folder / FILE
        sasrec = SASRec(
            len(self.data.catalogue),
            recommendation_of(trained_task(self.config)).history,
            settings.width,
            settings.blocks,
            settings.heads,
            settings.dropout,
            self.config.seed,
        )
        if path.exists():
            training_files.check_files(self.folder)
            training_files.load_state(sasrec, path, f"run '{self.folder}'")
        else:
            self._train(sasrec)
        return sasrec.cpu().requires_grad_(False).eval()

    def head(self, width: int, config: LmConfig) -> Hybrid:
        """Return the item vectors and gates for the net of an arm. width: of the LM's hidden states."""
        vectors = recommendation_of(trained_task(self.config)).items
        others = self._others() if config.gates == "shuffled-user" else None
        return Hybrid(copy.deepcopy(self.net), width if vectors else None, config.gates, others, config.seed)

    def fingerprint(self) -> str:
        """Return the weight fingerprint."""
        return digest(safetensors.torch.save(training_files.state(self.net)))

    @torch.no_grad()
    def records(self, items: Sequence[Item]) -> list[Record]:
        """Return a record for each row with the log-probabilities of its candidates, in the format of the tasks."""
        net = self.net
        listed = [_listed(item) for item in items]
        users = net(padded([row.history for row in listed]))
        scores = net.scores(users, torch.tensor([row.candidates for row in listed]))
        log_p = scores.double().log_softmax(1).tolist()
        return [{"id": item.id, "label": item.label, "log_p": values} for item, values in zip(items, log_p)]

    @torch.no_grad()
    def _others(self) -> Tensor:
        """Return representations (n, d) of users of training rows, drawn with the run's seed."""
        rows = self.data.interactions()
        order = sorted(range(len(rows)), key=lambda i: mix_seed(self.config.seed, "other user", i))[:OTHERS]
        net = self.net
        return net(padded([rows[i][0][-len(net.position.weight) :] for i in order]))

    def _train(self, net: SASRec) -> None:
        settings = self.settings
        rows = self.data.interactions()
        console.stage("train", f"recommender   {len(rows):,} rows   {len(self.data.catalogue):,} items")
        config = TrainConfig(
            steps=settings.steps, lr=settings.lr, weight_decay=settings.weight_decay, log_every=50, checkpoint_every=500
        )
        loop.train(
            NextItem(net),
            _Histories(rows, settings.batch, len(net.position.weight), self.config.seed),
            config,
            self.folder,
            self.hash,
            runtime.accelerator(),
            seed=self.config.seed,
        )
        ranks.from_first(lambda: self._finish(net))

    def _finish(self, net: SASRec) -> None:
        """Write the files of the finished training."""
        atomic_write(self.folder / FILE, safetensors.torch.save(training_files.state(net)))
        training_files.finish(net, self.folder, False, {})


def _listed(item: Item) -> Listed:
    """Return history and candidates of a row."""
    assert item.listed is not None, "a row of a recommendation has a history and candidates"
    return item.listed


class _Histories:
    """Return batch k as {"history" int64 (b, n), "next" int64 (b,)}; each pass over the rows has a new order."""

    def __init__(self, rows: Sequence[tuple[list[int], int]], batch: int, length: int, seed: int) -> None:
        self.rows = rows
        self.length = length
        self._passes = Passes(len(rows), batch, seed=seed, unit="rows")

    def __call__(self, number: int) -> dict[str, Any]:
        chosen = [self.rows[i] for i in self._passes(number).tolist()]
        histories = padded([history[-self.length :] for history, _ in chosen])
        return {"history": histories, "next": torch.tensor([target for _, target in chosen])}
