"""The language-model job: one adapted causal LM, trained on one task, evaluated on several; arms, seeds, rates, exact merge."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from vismt.config import AdaptConfig
from vismt.engine import runtime
from vismt.engine.arms import Unit, arm_config, arm_names, named_unit
from vismt.engine.study import StudyJob
from vismt.errors import UserError
from vismt.jobs.lm import models as lm_models
from vismt.jobs.lm.config import LmConfig, check, recommends
from vismt.jobs.lm.data import ItemBatches, LmData
from vismt.jobs.lm.evaluation import Evaluation
from vismt.jobs.lm.models import LmModels
from vismt.jobs.lm.recommender import Recommender
from vismt.llm.covariance import collect_covariance
from vismt.llm.covariance_files import batch_digest
from vismt.llm.heads import check_laplace
from vismt.llm.hybrid import Hybrid
from vismt.llm.net import LmNet, blocks
from vismt.llm.tasks.alternating import AlternatingObjective
from vismt.llm.tasks.base import LmObjective
from vismt.llm.tasks.recommendation import Recommendation
from vismt.registry import method_options, methods
from vismt.seeds import digest

CALIBRATION = "calibration"  # the folder of covariances in a run folder


class LmJob(StudyJob):
    """A causal LM, with a head on the last token where the trained task has one."""

    def __init__(self, config: LmConfig, folder: Path, config_hash: str) -> None:
        super().__init__(config, folder, config_hash)
        check(config)
        self._seen: dict[str, dict[str, Tensor]] = {}

    @cached_property
    def models(self) -> LmModels:
        """The LM that all nets of this run are made of."""
        return LmModels(self.config, lambda: self.recommender)

    @cached_property
    def data(self) -> LmData:
        """The rows of all tasks."""
        return LmData(self.config, self.models.tokenizer)

    @cached_property
    def recommender(self) -> Recommender:
        """What all arms of a recommendation share."""
        return Recommender(self.config, self.folder, self.hash, self.data)

    @cached_property
    def evaluation(self) -> Evaluation:
        """The evaluation of this folder's trainings."""
        recommender = self.recommender if recommends(self.config) else None
        return Evaluation(self.config, self.folder, self.hash, self.data, self.models, recommender)

    def check_data(self) -> None:
        parts = {self.config.evaluate.split}
        for task in self.data.tasks:
            own = {*parts, "validation"} if task == self.data.trained and self.config.tune is not None else parts
            for part in own:
                for name in self.data.names(task, part):
                    self.data.rows(task, part, name)
        for arm in arm_names(self.config):
            self.batches(arm_config(self.config, arm))

    def fresh(self, config: LmConfig) -> LmNet:
        net = self.models.fresh(config, self.data)
        if config.evaluate.laplace:
            check_laplace(net.head)
        return net

    def heads(self, net: LmNet) -> nn.Module:
        return net.head.projector if isinstance(net.head, Hybrid) else net.head

    def prepare(self, net: LmNet, config: LmConfig) -> str:
        """Adapt the LM from model.first_block on; the name of the method."""
        net.to(runtime.processes().device)  # calibrations and decompositions are a good part of the work
        if config.adapt is not None:
            known = method_options(methods()[config.adapt.method]) if config.adapt.method in methods() else []
            options = self._options(net, config.adapt, known)
            options = {**options, **self._calibrated(net, config, options, known)}
            config = replace(config, adapt=replace(config.adapt, options=options))
        method = super().prepare(net, config)
        below = [
            name for block in blocks(net.lm)[: net.first] for name, p in block.named_parameters() if p.requires_grad
        ]
        if below:
            raise UserError(
                f"adapt: '{method}' trains '{below[0]}' below model.first_block {net.first}; name other targets."
            )
        if net.first and any(p.requires_grad for p in net.lm.get_input_embeddings().parameters()):
            raise UserError(
                f"adapt: '{method}' trains the input embeddings, and blocks below model.first_block {net.first} are computed "
                "once; set first_block to 0, or leave the embeddings out (of lisa: train_embeddings: false)."
            )
        return method

    def _options(self, net: LmNet, adapt: AdaptConfig, known: Sequence[str]) -> dict[str, Any]:
        """The method's options, with the width of users, and the blocks below the first left out, where it takes them."""
        options = adapt.options
        if isinstance(net.head, Hybrid) and "user_width" in known:
            options = {"user_width": net.head.recommender.width, **options}
        if not net.first or "exclude" not in known:
            return options
        row = blocks(net.lm)
        path = next(name for name, module in net.lm.named_modules() if module is row)
        below = rf"{re.escape(path)}\.(?:{'|'.join(str(number) for number in range(net.first))})\..*"
        given = options.get("exclude", [])
        return {**options, "exclude": [*([given] if isinstance(given, str) else given), below]}

    def _calibrated(
        self, net: LmNet, config: LmConfig, options: dict[str, Any], known: Sequence[str]
    ) -> dict[str, Any]:
        """What the method takes of the texts of `calibration`: their covariances or, on the LM's device, themselves."""
        if config.calibration is None:
            return {}
        if "covariances" in known:
            return {"covariances": self._covariances(net, config, options)}
        if "calibration" not in known:
            return {}
        device = next(net.lm.parameters()).device
        batches = self.data.calibration(config.calibration, labels=options.get("strategy") == "gradient")
        return {"calibration": [{name: value.to(device) for name, value in batch.items()} for batch in batches]}

    def _covariances(self, net: LmNet, config: LmConfig, options: dict[str, Any]) -> dict[str, Tensor]:
        """Of the inputs of the layers to adapt, over the texts of `calibration`; computed once for equal layers and texts."""
        asked, excluded = config.calibration, options.get("exclude", ())
        batches = self.data.calibration(asked)
        key = digest(repr((config.adapt.targets, excluded, asked.memory_mb, batch_digest(batches))).encode())
        if key not in self._seen:
            with runtime.processes().main_process_first():  # which computes them; the others read what it wrote
                self._seen[key] = collect_covariance(
                    net.stock,
                    batches,
                    config.adapt.targets,
                    exclude=excluded,
                    folder=self.folder / CALIBRATION / key,
                    memory_budget=None if asked.memory_mb is None else asked.memory_mb * 2**20,
                    save_every=min(64, max(1, len(batches) // 4)),
                )
        return self._seen[key]

    def objective(self, config: LmConfig, net: LmNet, balanced: Sequence[Tensor]) -> LmObjective:
        net.to(runtime.processes().device)
        self.data.cache(self.data.forms(), net, "training rows")
        task, alternate = self.data.tasks[self.data.trained], config.head.alternate
        return LmObjective(net, task) if alternate is None else AlternatingObjective(net, task, **asdict(alternate))

    def batches(self, config: LmConfig) -> ItemBatches:
        task, processes = self.data.tasks[self.data.trained], runtime.processes().num_processes
        if processes > 1 and isinstance(task, Recommendation) and task.items and task.curriculum:
            raise UserError(
                f"tasks: curriculum {task.curriculum:g} with {processes} processes: in a batch of titles alone the projector has "
                "no gradient to share; set curriculum to 0, or run one process."
            )
        if processes > 1 and config.head.alternate is not None:
            raise UserError(
                f"head.alternate: with {processes} processes the posterior's own steps are not shared; leave alternate out for "
                "the joint update, or run one process."
            )
        of = config.train.steps * config.train.accumulate * processes
        return ItemBatches(self.data.training(), config.batch, task, of, seed=config.seed)

    def validate(self, unit: Unit) -> float:
        return self.evaluation.validate(unit)

    def loaded(self, unit: Unit) -> LmNet:
        return self.models.loaded(unit, self.data)

    def save(self, net: LmNet, config: LmConfig, folder: Path) -> None:
        lm_models.save_head(net, folder)

    def evaluate(self, attacks: list[Any] | None = None) -> list[dict[str, Any]]:
        """Rows of every arm, set and measure; trainings that were scored before are not evaluated again."""
        if attacks is not None:
            raise UserError("attack: attacks are on images; a language-model run has none. Leave it out.")
        return self.evaluation.rows()

    def merged(self, expert: str | None = None) -> nn.Module:
        """The stock LM of one arm, its update folded in."""
        model = super().merged(expert)
        self.models.forget()
        return model

    def beside(self, expert: str | None = None) -> dict[str, bytes]:
        """The tokenizer's files, and the head's where there is one."""
        with TemporaryDirectory() as folder:
            self.models.tokenizer.save_pretrained(folder)
            found = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
        head = named_unit(self.config, self.folder, expert).folder / lm_models.HEAD
        return {**found, **({head.name: head.read_bytes()} if head.exists() else {})}

    def about(self) -> dict[str, Any]:
        """What config.json beside merged weights says besides: transformers writes its own."""
        return {}


CONFIG, JOB = LmConfig, LmJob
