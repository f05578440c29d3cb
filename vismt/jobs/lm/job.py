"""The language-model job: one adapted causal LM, trained on one task and evaluated on several, with arms, seeds and rates."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from vismt.base import console, ranks
from vismt.base.errors import UserError, need_names
from vismt.base.seeds import mix_seed
from vismt.config.sections import AdaptConfig
from vismt.data.texts.text_set import open_texts
from vismt.engine import runtime, training_files
from vismt.engine.study import FROZEN, Training, validates
from vismt.evaluation.sections import check_held_out, fitted_keys
from vismt.jobs.calibration import Calibrations
from vismt.jobs.graphs import Graph, text_graph
from vismt.jobs.lm import models as lm_models
from vismt.jobs.lm.config import (
    ENSEMBLE,
    RECOMMENDER,
    LmCalibrationConfig,
    LmConfig,
    recommends,
    task_of,
    trained_task,
)
from vismt.jobs.lm.config_checks import check
from vismt.jobs.lm.data import ItemBatches, LmData
from vismt.jobs.lm.evaluation import Evaluation
from vismt.jobs.lm.figures import sections
from vismt.jobs.lm.models import LmModels
from vismt.jobs.lm.recommender import Recommender
from vismt.jobs.predictions import Options, Predictions, check_target, choice_row, note_target
from vismt.jobs.training_job import TrainingJob
from vismt.llm.ilora.hybrid import Hybrid
from vismt.llm.net import LmNet, blocks
from vismt.llm.tasks.answers import right_answer
from vismt.llm.tasks.base import Item, LmObjective, Writing, item_names
from vismt.llm.tasks.causal import Causal
from vismt.llm.tasks.classes import AlternatingObjective, Classes
from vismt.llm.tasks.recommendation import Recommendation
from vismt.lowrank.model.merge import merge
from vismt.lowrank.model.modules import is_mergeable
from vismt.methods import METHODS
from vismt.report.comparison import CONSTANT
from vismt.report.results import Result
from vismt.report.tables import Section
from vismt.robustness.conditions import AttackConfig
from vismt.storage.files import JsonObject, atomic_write, parse_json
from vismt.storage.records import Row
from vismt.uncertainty.features import View
from vismt.uncertainty.intervals import Score

PREDICTED = "predictions.jsonl"
ANSWER = "predicted_"  # begins the name of each field that a prediction adds to a row


@dataclass(frozen=True, eq=False)
class Fold:
    """The rows of a fold, with the recommender and the evaluation of the trainings that are tested on this fold."""

    data: LmData
    recommender: Recommender | None
    evaluation: Evaluation


class LmJob(TrainingJob[LmConfig, LmNet]):
    """A causal LM, with a head on the last token if the trained task has one."""

    names_tasks = True
    next_steps = (
        "predict {run} my_texts.jsonl --arm {arm}",
        "export {run} --arm {arm} --format transformers",
        "merge {run} --arm {arm}",
    )
    logged: Mapping[str, str] = {
        "loss": "Training loss",
        "hits": "HitRatio@1 of training batches",
        "kl": "KL of the last layer's posterior",
        "infeasibility": "Infeasibility of the factors",
        "stable_rank": "Stable rank of the updates",
    }

    def __init__(self, config: LmConfig, folder: Path, config_hash: str) -> None:
        check(config)
        super().__init__(config, folder, config_hash)
        references = [FROZEN] if config.evaluate.frozen else []
        if isinstance(task_of(trained_task(config)), Classes) and CONSTANT not in config.arms:
            references.append(CONSTANT)
        if recommends(config):
            baselines = [] if config.recommender is None else config.recommender.baselines
            references += [RECOMMENDER, *dict.fromkeys(baselines)]
        self.composed = [f"{arm}{ENSEMBLE}" for arm in config.evaluate.ensembles]
        self.references = [*references, *self.composed]
        self.calibrations = Calibrations(folder)
        self._folds: dict[int, Fold] = {}

    def trained_on(self, config: LmConfig) -> str:
        return ", ".join(trained_task(config).train)

    @cached_property
    def models(self) -> LmModels:
        """The LM that all nets of this run share."""
        return LmModels(self.config, self.recommender_of)

    def fold(self, seed: int) -> Fold:
        """Return the fold on which trainings of a seed are tested. There is only one if the shares do not rotate."""
        folds = trained_task(self.config).folds
        number = seed % folds
        if number not in self._folds:
            data = LmData(self.config, self.models.tokenizer, number, (self.kept or {}).get(str(number)))
            folder = self.folder if folds == 1 else self.folder / f"fold-{number}"
            recommender = Recommender(folder, self.hash, data) if recommends(self.config) else None
            evaluation = Evaluation(self.study, data, self.models, recommender)
            self._folds[number] = Fold(data, recommender, evaluation)
        return self._folds[number]

    @property
    def data(self) -> LmData:
        """The rows of all tasks, of the first seed's fold."""
        return self.fold(self.study.seeds[0]).data

    def recommender_of(self, seed: int) -> Recommender:
        """Return the recommender that all arms share."""
        found = self.fold(seed).recommender
        assert found is not None, "the trained task is not a recommendation"
        return found

    def trainings(self, arm: str) -> list[Training]:
        found = super().trainings(arm)
        if arm not in self.references or trained_task(self.config).folds == 1:
            return found
        return [replace(found[0], seed=seed, folder=found[0].folder / f"seed-{seed}") for seed in self.study.seeds]

    def described(self, arm: str) -> str:
        if arm in self.references and arm == CONSTANT:
            return "the same answer for every row: the class that is most frequent in training"
        if arm.endswith(ENSEMBLE):
            count, of = len(self.study.seeds), arm.removesuffix(ENSEMBLE)
            return f"the mean probability of {count} trainings of {of}; {count} passes for an answer"
        return super().described(arm)

    @property
    def predict_options(self) -> set[str]:  # type: ignore[override]  # the other jobs have a constant
        """The options of `vismt predict`: how text is written, or the number of choices."""
        writes = isinstance(task_of(trained_task(self.config)), Causal)
        return {"arm", "temperature", "new_tokens", "seed"} if writes else {"arm", "top"}

    def check_data(self) -> None:
        for task in self.data.tasks:
            validated = task == self.data.trained and validates(self.config)
            for split in {self.split, "validation"} if validated else {self.split}:
                for name in self.data.names(task, split):
                    self.data.rows(task, split, name)
        if fitted_keys(self.config.evaluate):
            rows = self.data.all_rows("validation")
            users = [str(item_names(row).get("user", row.id)) for row in rows]
            labels = torch.tensor([row.label for row in rows])
            check_held_out(self.config.evaluate, self.config.tune, labels, users)
        for config in self.study.arms.values():
            self.batches(config)

    def skeleton(self, config: LmConfig) -> nn.Module:
        return self.models.stock()

    def fresh(self, config: LmConfig) -> LmNet:
        return self.models.fresh(config, self.fold(config.seed).data)

    def heads(self, net: LmNet) -> nn.Module:
        return net.head.projector if isinstance(net.head, Hybrid) else net.head

    def prepare(self, net: LmNet, config: LmConfig) -> str:
        """Adapt the LM from model.first_block on and return the name of the method."""
        net.to(runtime.net_device())  # calibrations and decompositions take a large part of the time
        if config.adapt is not None:
            options = self._options(net, config.adapt, config.calibration)
            config = replace(config, adapt=replace(config.adapt, options=options))
        method = super().prepare(net, config)
        for path in _computed_once(net):
            for name, parameter in net.lm.get_submodule(path).named_parameters():
                if parameter.requires_grad:
                    raise UserError(
                        f"adapt: '{method}' trains '{path}.{name}' below model.first_block {net.first}, whose input is computed "
                        "once; leave it out by options.exclude, or set first_block to 0."
                    )
        return method

    def _options(self, net: LmNet, settings: AdaptConfig, texts: LmCalibrationConfig | None) -> dict[str, Any]:
        """Return the method's options with the options that the job provides, without the blocks below model.first_block."""
        method = METHODS[settings.method]
        options = settings.options
        if isinstance(net.head, Hybrid) and "users" in method.needs(options):
            options = {"user_width": net.head.user_width, **options}
        if net.first:
            excluded = need_names("adapt.options.exclude:", options.get("exclude", []))
            below = "|".join(map(re.escape, _computed_once(net, embeddings=not method.layers)))
            options = {**options, "exclude": [*excluded, rf"(?:{below})(?:\..*)?"]}
        if texts is None:
            return options
        batches = partial(self.data.calibration, texts)
        adapt = replace(settings, options=options)
        return self.calibrations.calibrated(net.stock, adapt, batches).options

    def objective(self, config: LmConfig, net: LmNet, balanced: Sequence[Tensor]) -> LmObjective:
        net.to(runtime.net_device())
        data = self.fold(config.seed).data
        data.cache(data.forms(), net, "training rows")
        if config.head.alternate is None:
            return LmObjective(net, data.tasks[data.trained])
        return AlternatingObjective(net, data.classes, **asdict(config.head.alternate))

    def training_sets(self) -> dict[str, str]:
        data = self.data
        return {name: data.content(data.trained, "train", name) for name in data.names(data.trained, "train")}

    def needed_of_data(self) -> JsonObject:
        folds = {self.fold(seed).data.fold: self.fold(seed).data for seed in self.study.seeds}
        return {str(number): data.needed for number, data in folds.items()}

    def batches(self, config: LmConfig) -> ItemBatches:
        data = self.fold(config.seed).data
        task = data.tasks[data.trained]
        processes = runtime.processes().num_processes
        if processes > 1 and isinstance(task, Recommendation) and task.items and task.curriculum:
            raise UserError(
                f"tasks: curriculum {task.curriculum:g} with {processes} processes: in a batch of only titles the projector has "
                "no gradient to share; set curriculum to 0, or run one process."
            )
        if processes > 1 and config.head.alternate is not None:
            raise UserError(
                f"head.alternate: with {processes} processes the posterior's own steps are not shared; leave alternate out for "
                "the joint update, or run one process."
            )
        total = config.training.steps * config.training.accumulate * processes
        items = data.training()
        if config.loss != "choice":
            items = [right_answer(item, prompt=config.loss == "text") for item in items]
        return ItemBatches(items, config.batch, task, total, seed=config.seed)

    def save(self, net: LmNet, config: LmConfig, folder: Path) -> None:
        if any(True for _ in net.head.parameters()):
            training_files.write_state(net.head, folder / lm_models.LM_HEAD_FILE)

    def loaded(self, training: Training) -> LmNet:
        return lm_models.load_trained(self.fresh(self.study.config_of(training)), training)

    def score(self, training: Training, split: str, attacks: Sequence[AttackConfig] | None) -> list[Score]:
        if attacks:
            raise UserError("attack: attacks are on images; a language-model run has none. Leave it out.")
        evaluation = self.fold(training.seed).evaluation
        if training.arm in self.references and training.arm == CONSTANT:
            return evaluation.constant_scores(training, split)
        return evaluation.scores(training, split)

    def validate(self, training: Training) -> float:
        return self.fold(training.seed).evaluation.quality(training)

    def fitted_views(self, training: Training) -> Mapping[str, View]:
        return {self.data.trained: self.fold(training.seed).evaluation.view(training)}

    def exports_fitted(self, training: Training) -> bool:
        return self.data.tasks[self.data.trained].head

    def check_merge(self, training: Training) -> None:
        """Compare the unmerged LM with a merged copy, because all nets share it. Write the files of `write_merge_check` once."""
        training_files.check_weights(training)  # records alone would not show a change of the weights
        if not ranks.on_first(lambda: training_files.needs_merge_check(training)):
            return
        evaluation = self.fold(training.seed).evaluation
        net = evaluation.net(training)
        if is_mergeable(net.stock):
            merged = merge(copy.deepcopy(net.stock))
            self.write_merge_check(training, evaluation.outputs(net, merged), net.stock, merged)
            self.models.generation += 1  # the net lost its adapter

    def sections(self, results: Sequence[Result]) -> list[Section]:
        return sections(self.folder, self.config, self.study, results)

    def merged(self, arm: str | None = None) -> nn.Module:
        model = super().merged(arm)
        self.models.forget()
        return model

    def predict(self, inputs: Sequence[Path], target: Path, options: Options) -> Predictions:
        """Write the answers of an arm to rows of text to <target>/predictions.jsonl, after the fields of each row.

        Text is written after the prompt of the trained task (predicted_text). Tasks with choices add the likeliest choices
        (predicted_label, predicted_label_2), their probabilities and, with `evaluate.risk`, the conformal set. A row that cannot
        be asked has predicted_error.

        Raises UserError for a row that has such a field already.
        """
        task, training = self.data.tasks[self.data.trained], self.study.find(options.arm)
        read = [row for path in inputs for row in _read_rows(path)]
        for name, row, _ in read:
            taken = next((field for field in row if field.startswith(ANSWER)), None)
            if taken is not None:
                raise UserError(
                    f"predict: row '{name}' has the field '{taken}', and the names of answers begin with {ANSWER}; rename the "
                    "field."
                )
        check_target(target, [(PREDICTED, "")], inputs)
        items: dict[int, Item] = {}
        found = [row if not error else {f"{ANSWER}error": error} for _, row, error in read]
        for number, (name, row, error) in enumerate(read):
            try:
                items |= {} if error else {number: task.ask(name, row, self.models.tokenizer)}
            except UserError as refusal:
                found[number] = {**row, f"{ANSWER}error": str(refusal)}
        failed = [str(row[f"{ANSWER}error"]) for row in found if f"{ANSWER}error" in row]
        if failed and not items:
            raise UserError(failed[0])
        evaluation = self.fold(training.seed).evaluation
        quantile = self.fitted(training)["quantiles"].get(self.data.trained)
        net, step = evaluation.net(training), self.config.evaluate.batch
        for start in console.track(range(0, len(items), step), "predict", str(training), -(-len(items) // step)):
            numbers = [*items][start : start + step]
            how = Writing(options.new_tokens, options.temperature, mix_seed(options.seed, "batch", start))
            batch = evaluation.batch([items[number] for number in numbers], net)
            with torch.no_grad():
                replies = task.reply(net, batch, [found[number] for number in numbers], self.models.tokenizer, how)
            for number, reply in zip(numbers, replies):
                answer: Row = {"text": reply.text}
                if reply.log_p is not None:
                    answer = choice_row(reply.log_p, reply.choices, quantile, options.top)
                found[number] = {**found[number], **{f"{ANSWER}{name}": value for name, value in answer.items()}}
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        note_target(target, [PREDICTED])
        atomic_write(target / PREDICTED, lines)
        return Predictions(found, [target / PREDICTED], len(items), failed)

    def graph(self, arm: str | None, form: str) -> Graph:
        if form != "torch":
            raise UserError(
                "export: a language model is exported by --format torch; for ONNX write --format transformers and give the "
                "folder to `optimum-cli export onnx`."
            )
        return text_graph(self.merged(arm))

    def beside(self, training: Training) -> dict[str, bytes]:
        """Return the files of the tokenizer, and head.safetensors if the training has a head."""
        with TemporaryDirectory() as folder:
            self.models.tokenizer.save_pretrained(folder)
            files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
        head = training.folder / lm_models.LM_HEAD_FILE
        if head.exists():
            files[head.name] = head.read_bytes()
        return files


def _read_rows(path: Path) -> Iterator[tuple[str, Row, str]]:
    """Yield the name and the fields of each row of a file, or the name and the error of a bad line of a .jsonl file."""
    try:
        texts = open_texts(path)
        yield from ((f"{texts.name}:{name}", row, "") for name, row in zip(texts.ids, texts.rows))
    except UserError:
        if path.suffix != ".jsonl" or not path.is_file():
            raise
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if line.strip():
                row, name = {}, f"{path}: line {number}"
                with suppress(ValueError):
                    row = parse_json(line.decode("utf-8-sig"))
                good = bool(row) and isinstance(row, dict)
                yield name, row if good else {}, "" if good else f"{name}: is not a JSON object with a field."


def _computed_once(net: LmNet, embeddings: bool = True) -> list[str]:
    """Return the paths of the blocks below the first one, whose outputs are computed once, and of the embeddings before them."""
    lower = set(blocks(net.lm)[: net.first])
    embeddings = embeddings and net.first > 0
    return [
        path
        for path, module in net.lm.named_modules()
        if module in lower or (embeddings and (isinstance(module, nn.Embedding) or path.endswith("project_in")))
    ]  # OPT projects narrow embeddings


JOB = LmJob
