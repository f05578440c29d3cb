"""The nets of a language-model run. One LM is loaded for all of them: adapting it and giving it back is exact and quick.

Of a training: adapter/, and head.safetensors where the task has a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from vismt.backbones.lm import create_lm
from vismt.engine import study_files
from vismt.engine.arms import Unit, unit_config
from vismt.files import atomic_write
from vismt.jobs.lm.config import LmConfig, LmHeadConfig, task_of, trained_task
from vismt.jobs.lm.data import LmData
from vismt.llm.heads import make_head
from vismt.llm.hybrid import Hybrid
from vismt.llm.net import LmNet, check_logits
from vismt.llm.tasks.classes import Classes
from vismt.llm.tasks.recommendation import Recommendation
from vismt.lowrank.inject import record_of, unadapt
from vismt.lowrank.store import DESCRIPTION
from vismt.seeds import digest

HEAD = "head.safetensors"


class LmModels:
    """The LM of a run and its tokenizer. A net that it gave is no longer what it was when the next one is asked for.

    recommender: gives the run's own, which is asked for where the trained task is a recommendation.
    """

    def __init__(self, config: LmConfig, recommender: Callable[[], Any]) -> None:
        self.config, self._recommender = config, recommender
        self.given = 0  # nets so far
        self._lm: nn.Module | None = None
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The LM's tokenizer."""
        if self._tokenizer is None:
            self.stock()
        return self._tokenizer

    @property
    def width(self) -> int:
        """Of the LM's hidden states."""
        if self._lm is None:
            self.stock()
        return self._lm.config.hidden_size

    def stock(self) -> nn.Module:
        """The LM as it was before adaptation, in evaluation mode."""
        if self._lm is None:
            model = self.config.model
            kind = None if model.dtype is None else getattr(torch, model.dtype)
            self._lm, self._tokenizer = create_lm(
                model.name, gguf_file=model.gguf_file, dtype=kind, revision=model.revision
            )
            check_logits(self._lm)
        if record_of(self._lm) is not None:
            unadapt(self._lm)
        return self._lm.eval()

    def forget(self) -> None:
        """Drop the LM, whose weights were changed; the next net loads it again."""
        self._lm, self.given = None, self.given + 1

    def fresh(self, config: LmConfig, data: LmData) -> LmNet:
        """The net before training, its head (where the trained task has one) at the rows of the answer tokens."""
        self.given += 1
        lm, task = self.stock(), task_of(trained_task(config))
        net = LmNet(lm, first=config.model.first_block, samples=config.evaluate.samples)
        if isinstance(task, Classes):
            rows, bias = net.answer_rows(task.tokens(self.tokenizer))
            net.head = make_head(config.head.name, rows, bias, data.num_train, config.seed, config.head.options)
        if isinstance(task, Recommendation):
            net.head = self._recommender().head(lm.config.hidden_size, config)
        return net

    def untrained(self, data: LmData) -> LmNet:
        """The net that stands for the LM before training: a head at its start, no item vectors and no gates."""
        net = self.fresh(replace(self.config, head=LmHeadConfig(), gates="user"), data)
        if isinstance(net.head, Hybrid):
            net.head = nn.Identity()
        return net.requires_grad_(False).eval()

    def loaded(self, unit: Unit, data: LmData) -> LmNet:
        """A trained net as it was trained, not merged; UserError when it is not finished or its files do not fit."""
        net = self.fresh(unit_config(self.config, unit), data)
        what = study_files.restore(net, unit)
        if any(True for _ in net.head.parameters()):
            study_files.load_state(net.head, unit.folder / HEAD, what)
        return net.requires_grad_(False).eval()


def save_head(net: LmNet, folder: Path) -> None:
    """Write head.safetensors, where there is a head."""
    if any(True for _ in net.head.parameters()):
        atomic_write(folder / HEAD, safetensors.torch.save(study_files.state(net.head)))


def fingerprint(unit: Unit) -> str:
    """What tells this training from another: what the adapter says of its tensors, and the head."""
    files = (unit.folder / study_files.ADAPTER / DESCRIPTION, unit.folder / HEAD)
    return digest(b"".join(path.read_bytes() for path in files if path.exists()))
