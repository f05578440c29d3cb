"""The recommender of a language-model run (SASRec, trained once and frozen for every arm and seed), and its baselines.

It is kept in recommender/ of the run folder (GRU4Rec in gru4rec/) and trained by the common training loop, so that it resumes
like every training. It is trained only on training rows. The choices of SASRec and of the baselines among the candidates are
reported beside the arms.

Item vectors describe the rows that the recommender was fitted to far better than the rows of new users. On Last.fm, SASRec
finds 89 % of the next items of its own rows, and 20 to 50 % of others. With `cross_fit` it is fitted to half of the training
users, drawn by a hash of their names, and the LM learns from the other half. Vectors then mean the same in training as for new
users.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from vismt.base import console, ranks
from vismt.base.seeds import digest
from vismt.config.sections import TrainConfig
from vismt.data.batching import Passes
from vismt.engine import loop, runtime, training_files
from vismt.jobs.lm.config import GRU, RECOMMENDER, LmConfig, LmRecommenderConfig, recommendation_of, trained_task
from vismt.jobs.lm.data import LmData
from vismt.llm.ilora.hybrid import WITH_OTHERS, Hybrid
from vismt.llm.ilora.recommenders import (
    GRU4Rec,
    ItemRecommender,
    NextItem,
    SASRec,
    cosine_scores,
    pad_histories,
    popularity_scores,
)
from vismt.llm.tasks.answers import choice_records
from vismt.llm.tasks.base import Item, Record
from vismt.llm.tasks.recommendation import listed_of
from vismt.storage.locks import is_locked, locked

# Folder and file of each trained recommender.
_FILES = {RECOMMENDER: ("recommender", "sasrec.safetensors"), GRU: ("gru4rec", "gru4rec.safetensors")}
Net = TypeVar("Net", bound=ItemRecommender)


class Recommender:
    """The recommender of a run folder and its baselines, trained on first use."""

    def __init__(self, folder: Path, config_hash: str, data: LmData) -> None:
        self.config = data.config
        self.folder = folder
        self.hash = config_hash
        self.data = data
        self.settings = data.config.recommender or LmRecommenderConfig()
        self.history = recommendation_of(trained_task(data.config)).history

    @cached_property
    def net(self) -> SASRec:
        """SASRec, frozen and in evaluation mode, on the CPU."""
        net = SASRec(len(self.data.needed["titles"]), self.history, self.settings.width, seed=self.config.seed)
        return self._trained(RECOMMENDER, net)

    @cached_property
    def gru(self) -> GRU4Rec:
        """GRU4Rec, frozen and in evaluation mode, on the CPU."""
        return self._trained(GRU, GRU4Rec(len(self.data.needed["titles"]), self.settings.width, seed=self.config.seed))

    def _trained(self, name: str, net: Net) -> Net:
        folder, file = (self.folder / _FILES[name][0], _FILES[name][1])
        trained = ranks.on_first((folder / file).exists)  # another process in the folder may write it at any time
        if not trained:  # of several processes in one run folder, the first one trains it
            with ExitStack() as held:
                if is_locked(folder):
                    console.stage("wait", f"{type(net).__name__}   another process trains it")
                ranks.on_first(lambda: held.enter_context(locked(folder, wait_s=-1)))
                trained = ranks.on_first((folder / file).exists)
                if not trained:
                    self._train(net, folder, file)
        if trained:
            training_files.check_files(folder)
            training_files.load_state(net, folder / file, f"run '{folder}'")
        return net.cpu().requires_grad_(False).eval()

    def head(self, width: int, config: LmConfig, texts: Tensor | None = None) -> Hybrid:
        """Return the item vectors and gates for the net of an arm.

        width: Width of the LM's hidden states. texts: Vectors of the titles, for gates from titles.
        """
        vectors = recommendation_of(trained_task(self.config)).items
        others = self._others() if config.gates in WITH_OTHERS else None
        width_shown = width if vectors else None
        return Hybrid(copy.deepcopy(self.net), width_shown, config.gates, others, texts, config.projector, config.seed)

    def fingerprint(self, arm: str) -> str:
        """Return a digest of the weights that give the scores of SASRec or of a baseline."""
        return digest(safetensors.torch.save(training_files.state(self.gru if arm == GRU else self.net)))

    @torch.no_grad()
    def records(self, arm: str, items: Sequence[Item]) -> list[Record]:
        """Return a record for each row with the log-probabilities of its candidates under SASRec or a baseline."""
        listed = [listed_of(item) for item in items]
        histories = pad_histories([row.history for row in listed])
        return choice_records(items, self._scores(arm, histories, torch.tensor([row.candidates for row in listed])))

    def _scores(self, arm: str, histories: Tensor, candidates: Tensor) -> Tensor:
        """Return the scores (b, c) of candidates int64 (b, c) after histories int64 (b, n)."""
        if arm == "popularity":
            targets = [target for _, target in self.data.interactions(self.data.fitted)]
            return popularity_scores(targets, candidates, len(self.data.needed["titles"]))
        if arm in ("recency", "mean-item"):
            return cosine_scores(self.net.item.weight, histories, candidates, last=arm == "recency")
        net = self.gru if arm == GRU else self.net
        return net.scores(net(histories), candidates)

    @torch.no_grad()
    def _others(self) -> Tensor:
        """Return representations (n, d) of users of training rows, drawn with the run's seed."""
        return self.net(pad_histories(self.data.needed["others"]))

    def _train(self, net: ItemRecommender, folder: Path, file: str) -> None:
        settings = self.settings
        rows = self.data.interactions(self.data.fitted)
        console.stage("train", f"{type(net).__name__}   {len(rows):,} rows   {len(self.data.needed['titles']):,} items")
        config = TrainConfig(steps=settings.steps, lr=settings.lr, log_every=50, checkpoint_every=500)
        loop.train(
            NextItem(net),
            _Histories(rows, settings.batch, self.history, self.config.seed),
            config,
            folder,
            self.hash,
            runtime.accelerator(),
            seed=self.config.seed,
        )

        def finish() -> None:
            training_files.write_state(net, folder / file)
            training_files.finish(net, folder, False, {})

        ranks.on_first(finish)


class _Histories:
    """Return batch k as {"history" int64 (b, n), "next" int64 (b,)}. Each pass over the rows has a new order."""

    def __init__(self, rows: Sequence[tuple[list[int], int]], batch: int, length: int, seed: int) -> None:
        self.rows = rows
        self.length = length
        self._passes = Passes(len(rows), batch, seed=seed, unit="rows", key="recommender.batch")

    def __call__(self, number: int) -> dict[str, Any]:
        chosen = [self.rows[i] for i in self._passes(number).tolist()]
        histories = pad_histories([history[-self.length :] for history, _ in chosen])
        return {"history": histories, "next": torch.tensor([target for _, target in chosen])}
