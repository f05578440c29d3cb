"""The nets of a language-model run. All share one loaded LM: adapting it and removing the adapter again is exact and fast.

The folder of a training has adapter/, and head.safetensors if the task has a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vismt.backbones.lm import create_lm
from vismt.base.errors import UserError
from vismt.base.seeds import digest
from vismt.engine import training_files
from vismt.engine.study import Training
from vismt.jobs.lm.config import LmConfig, LmHeadConfig, task_of, trained_task
from vismt.jobs.lm.data import LmData
from vismt.jobs.lm.recommender import Recommender
from vismt.llm.ilora.hybrid import Hybrid, title_vectors
from vismt.llm.net import LmNet, check_first_block, check_logits
from vismt.llm.tasks.classes import Classes
from vismt.llm.tasks.documents import reach
from vismt.llm.tasks.recommendation import Recommendation
from vismt.lowrank.files.save_load import DESCRIPTION
from vismt.lowrank.model.named import unadapt
from vismt.lowrank.model.record import record_of
from vismt.uncertainty.last_layers import make_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LM_HEAD_FILE = "head.safetensors"


class LmModels:
    """The LM of a run and its tokenizer. A net is valid until the next net is made, because all share the LM.

    recommender: Function that returns the recommender of a fold, called if the trained task is a recommendation.
    """

    def __init__(self, config: LmConfig, recommender: Callable[[int], Recommender]) -> None:
        self.config = config
        self._recommender = recommender
        self.generation = 0  # number of nets made so far
        self._lm: PreTrainedModel | None = None
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._load()
        return self._tokenizer

    @property
    def width(self) -> int:
        return int(self._load().get_input_embeddings().get_parameter("weight").shape[1])  # OPT's blocks may be wider

    def stock(self) -> PreTrainedModel:
        """Return the LM without adapter, in evaluation mode."""
        lm = self._load()
        if record_of(lm) is not None:
            unadapt(lm)
        return lm.eval()

    def _load(self) -> PreTrainedModel:
        """Return the LM with its present adapter. Load LM and tokenizer if the LM is not loaded."""
        if self._lm is None:
            model = self.config.model
            dtype = None if model.dtype is None else getattr(torch, model.dtype)
            self._lm, self._tokenizer = create_lm(
                model.name, gguf_file=model.gguf_file, dtype=dtype, revision=model.revision
            )
            check_logits(self._lm)
            if model.first_block:
                check_first_block(self._lm, model.first_block)
            if any(task_of(task).documents for task in self.config.tasks):
                reach(self._lm, LmNet(self._lm).states)  # before it has adapters, and parts on several devices
        return self._lm

    def forget(self) -> None:
        """Drop the LM after a change of its weights. The next net loads it again."""
        self._lm = None
        self.generation += 1

    def fresh(self, config: LmConfig, data: LmData) -> LmNet:
        """Return the net before training. A head of the trained task starts at the rows of the answer tokens."""
        self.generation += 1
        lm = self.stock()
        task = task_of(trained_task(config))
        net = LmNet(lm, first=config.model.first_block)
        if isinstance(task, Classes):
            rows, bias = net.answer_rows(task.tokens(self.tokenizer))
            net.head = make_head(config.head.name, rows, bias, data.needed["rows"], config.seed, config.head.options)
        if isinstance(task, Recommendation):
            inner = lm.config.hidden_size
            if task.items and net.first and self.width != inner:
                raise UserError(
                    f"model.first_block: {net.first}; the embeddings of {type(lm).__name__} are {self.width} wide and its blocks "
                    f"{inner}, so that item vectors do not fit between blocks; set it to 0, or options.items to false."
                )
            texts = title_vectors(lm, self.tokenizer, data.needed["titles"]) if config.gates == "text" else None
            net.head = self._recommender(data.fold).head(self.width, config, texts)
        return net

    def untrained(self, data: LmData) -> LmNet:
        """Return the net that represents the LM before training: an untrained head, no item vectors and no gates."""
        net = self.fresh(replace(self.config, head=LmHeadConfig(), gates="user"), data)
        if isinstance(net.head, Hybrid):
            net.head = nn.Identity()
        return net.requires_grad_(False).eval()


def load_trained(net: LmNet, training: Training) -> LmNet:
    """Load the adapter and head of a training into a fresh net, not merged, and return it.

    Raises UserError if the training is not finished or its files do not fit.
    """
    what = training_files.restore(net.stock, training)
    if any(True for _ in net.head.parameters()):
        training_files.load_state(net.head, training.folder / LM_HEAD_FILE, what)
    return net.requires_grad_(False).eval()


def fingerprint(training: Training) -> str:
    """Return the weight fingerprint of a training: the digest of the adapter's description and of the head."""
    training_files.check_files(training.folder)
    files = (training.folder / training_files.ADAPTER / DESCRIPTION, training.folder / LM_HEAD_FILE)
    return digest(b"".join(path.read_bytes() for path in files if path.is_file()))
