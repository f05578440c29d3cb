"""A job that trains: it declares data, nets, an objective and the scores of a trained net.

Training, rates, seeds and checks of merging are written once for all jobs, here and in engine/study.py. Rows of results and the
report are in evaluation_job.py.
"""

from __future__ import annotations

import re
import shutil
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from vismt.base import console, ranks
from vismt.base.errors import UserError
from vismt.config.sections import AdaptConfig
from vismt.engine import loop, runtime, training_files
from vismt.engine.optimizer import make_optimizer
from vismt.engine.stream import Batches
from vismt.engine.study import ARMS, BEST, FROZEN, StudyConfig, Training, read_choice
from vismt.evaluation.sections import asked_features, shown_quantile
from vismt.jobs.evaluation_job import EvaluationJob, settings_text
from vismt.lowrank.layers.base import adapter_layers, factor_rank
from vismt.lowrank.model.merge import erased_by_rounding, merge, undo
from vismt.lowrank.model.modules import is_mergeable
from vismt.lowrank.model.record import count_parameters, record_of
from vismt.methods import adapt, check_adaptation, needs
from vismt.storage.files import JsonObject, atomic_write, read_sealed, sealed
from vismt.storage.lines import write_lines
from vismt.uncertainty.features import View

PROCESSES = "processes.json"  # of the run's trainings; beside the folders of the arms
SETS = "sets.json"  # digests of what they are trained on, and what nets need of it
FITTED = "fitted.json"  # of an evaluated training: what features that are fitted once give to predictions and exports

Config = TypeVar("Config", bound=StudyConfig)
Net = TypeVar("Net", bound=nn.Module)


class TrainingJob(EvaluationJob[Config], Generic[Config, Net]):
    """Train, evaluate, report and merge for one run folder."""

    # ---- what a job declares ------------------------------------------------------------------------------------------

    @abstractmethod
    def check_data(self) -> None:
        """Raise UserError, before any training, for data that cannot be trained or evaluated on."""

    @abstractmethod
    def skeleton(self, config: Config) -> nn.Module:
        """Return a model with the modules of an arm's stock model. Its values are not read."""

    @abstractmethod
    def fresh(self, config: Config) -> Net:
        """Return the net of an arm's configuration before training."""

    @abstractmethod
    def objective(self, config: Config, net: Net, balanced: Sequence[Tensor]) -> nn.Module:
        """Return the objective. balanced: Parameters whose gradients a balancer uses."""

    @abstractmethod
    def batches(self, config: Config) -> Batches:
        """Return the function from batch number to batch."""

    @abstractmethod
    def save(self, net: Net, config: Config, folder: Path) -> None:
        """Write the trained tensors besides the adapter."""

    @abstractmethod
    def loaded(self, training: Training) -> Net:
        """Return a trained net, not merged."""

    def training_sets(self) -> dict[str, str]:
        """Return a digest of the training examples of each set by its name, "" if the content is not known."""
        return {}

    def needed_of_data(self) -> JsonObject:
        """Return the names and numbers that nets, predictions and exports need of the data. They are kept in the run folder."""
        return {}

    def stock(self, net: Net) -> nn.Module:
        """Return the model of a net that is adapted, merged and exported."""
        return net.get_submodule("stock")

    def heads(self, net: Net) -> nn.Module:
        """Return the part of a net that is always trained."""
        return net.get_submodule("heads")

    def step(self, objective: nn.Module, number: int) -> None:
        """Run after optimiser step `number`. By default do nothing."""

    def outputs(self, merged: Net, plain: Net) -> Iterable[tuple[str, Tensor, Tensor, bool]]:
        """Yield (name, outputs merged, outputs unmerged, whether their argmax along dim 1 is an answer) of some evaluated rows.

        If processes share the evaluation, each process yields its own batches (`ranks.my_share`).
        """
        return ()

    def beside(self, training: Training) -> dict[str, bytes]:
        """Return the files to write beside the merged or exported weights of a training, by name."""
        return {}

    def fitted_views(self, training: Training) -> Mapping[str, View]:
        """Return what the features are fitted to whose values predictions show or exports carry, by task."""
        return {}

    def exports_fitted(self, training: Training) -> bool:
        """Return whether exports of a training carry the values of fitted features."""
        return False

    def facts(self) -> JsonObject:
        processes = recorded_processes(self.folder)
        return {"seeds": self.study.seeds if self.trains else [], **({"processes": processes} if processes else {})}

    # ---- training -----------------------------------------------------------------------------------------------------

    @property
    def trains(self) -> bool:
        return bool(self.study.arms)

    def train(self) -> JsonObject:
        """Train every arm at its rate and seeds. Return {"arms": {arm: content of done.json}} for run.json."""
        self.check_training()
        self.study.train(self)
        for arm in self.study.arms:
            self._write_curve(self.study.trainings(arm)[0])
        done = {arm: training_files.read_done(self.study.trainings(arm)[0]) for arm in self.study.arms}
        return {"arms": done}

    def evaluate_references(self) -> None:
        self.check_training()
        super().evaluate_references()

    def check_training(self) -> None:
        """Raise UserError, before any training, for data and arms that cannot be trained or evaluated."""
        self.check_data()
        self._each_arm(self.check_arm)
        ranks.on_first(self.check_processes)
        ranks.on_first(self.check_sets)

    @property
    def kept(self) -> JsonObject | None:
        """What the run folder keeps of `needed_of_data`. None before trainings begin, and in runs of earlier versions."""
        return recorded_sets(self.folder).get("needed")

    def check_kept(self) -> None:
        if self.kept is None and self.trains:
            try:
                self.needed_of_data()
            except UserError as error:
                raise UserError(
                    f"run '{self.folder}': it keeps no names and sizes of its data, as it was trained by an earlier version, and "
                    f"its data cannot be opened; put the data back. ({error})"
                ) from error

    def check_sets(self) -> None:
        """Raise UserError if training examples changed after the trainings of this run began."""
        recorded = recorded_sets(self.folder).get("digests", {})
        changed = [name for name, digest in self.training_sets().items() if recorded.get(name, digest) != digest]
        if changed:
            raise UserError(
                f"run '{self.folder}': the training examples of {', '.join(changed)} are not those with which its trainings "
                "began. Put them back, or give another --out for a new run."
            )

    def check_processes(self, begins: bool = False) -> None:
        """Raise UserError if another number of processes began the trainings of this run, because a step takes a batch of each.

        begins: Whether a training begins now. The number is then recorded.
        """
        path, count = self.folder / ARMS / PROCESSES, runtime.processes().num_processes
        recorded = recorded_processes(self.folder)
        if recorded not in (None, count):
            raise UserError(
                f"run '{self.folder}': {recorded} process(es) began its trainings, and this launch has {count}. A step takes the "
                f"batches of all processes. Continue the run with {recorded}, or give another --out."
            )
        if begins and recorded is None:
            sets = {"digests": self.training_sets(), "needed": self.needed_of_data()}
            atomic_write(self.folder / ARMS / SETS, sealed(sets))
            atomic_write(path, sealed({"processes": count}))

    def train_one(self, training: Training) -> None:
        """Train one arm at one rate and seed, unless its folder has done.json."""
        if training_files.read_done(training) is not None:
            console.stage("train", f"{training}: done before")
            return
        ranks.on_first(lambda: self.check_processes(begins=True))
        config = self.study.config_of(training)
        net, method, balanced = self.prepared(config)
        trainable, total = count_parameters(net)
        record = record_of(self.stock(net))
        rank = factor_rank(record.specs) if record is not None else 0
        name = f"{method} rank {rank}" if rank else method
        share = f"{trainable:,} trainable of {total:,} ({100 * trainable / total:.2f} %)"
        console.stage("adapt", f"{training.arm}   {name}   {share}")
        console.stage("train", f"{training}")
        objective = self.objective(config, net, balanced)
        settings = config.training
        about = {"method": method, "rank": rank, "trainable": trainable, "total": total}

        def after_save(step: int) -> None:
            whole = step % settings.checkpoint_every == 0 or step == settings.steps  # Ctrl-C saves at other steps too
            if settings.validate and whole and training.seed == self.study.seeds[0]:
                at_step = replace(training, folder=training.folder / training_files.STEPS / str(step))
                ranks.on_first(lambda: self.finish(net, config, at_step, about))
            self.part_done()

        loop.train(
            objective,
            self.batches(config),
            settings,
            training.folder,
            self.hash,
            runtime.accelerator(settings.precision, settings.trackers, training.folder),
            seed=config.training_seed,
            after_step=self.step,
            after_save=after_save,
            sections=config,
            name=" ".join(f"{self.folder.name} {training}".split()),
        )
        ranks.on_first(lambda: self.finish(net, config, training, about))

    def finish(self, net: Net, config: Config, training: Training, about: JsonObject) -> None:
        """Write the files of a finished training."""
        self.save(net, config, training.folder)
        training_files.finish(self.stock(net), training.folder, config.adapt is not None, about)

    def _write_curve(self, training: Training) -> None:
        """Write the validation score of a training at the steps that were kept, and remove what was kept of its arm."""
        steps = training.folder / training_files.STEPS
        kept = ranks.on_first(lambda: sorted(int(done.parent.name) for done in steps.glob(f"*/{training_files.DONE}")))
        if not kept:
            return
        rows = []
        for step in console.track(kept, "validate", str(training), len(kept)):
            score = self.validate(replace(training, folder=steps / str(step)))
            rows.append({"step": step, "validation": score})

        def finish() -> None:
            write_lines(training.folder / training_files.VALIDATION_FILE, rows)
            for folder in training.folder.parent.glob(f"*/{training_files.STEPS}"):
                shutil.rmtree(folder, ignore_errors=True)

        ranks.on_first(finish)

    def prepared(self, config: Config) -> tuple[Net, str, list[Tensor]]:
        """Return the net of an arm ready to train, the name of the method, and the parameters whose gradients are balanced."""
        net = self.fresh(config).requires_grad_(False)
        method = self.prepare(net, config)
        balanced: list[Tensor] = [parameter for parameter in net.parameters() if parameter.requires_grad]
        heads = self.heads(net).requires_grad_(True)
        if not balanced:
            balanced = list(heads.parameters())
        check_trained_dtype(net)
        return net, method, balanced

    def prepare(self, net: Net, config: Config) -> str:
        """Adapt the stock model of a net as the configuration says. Return the name of the method, "heads" for no method."""
        if config.adapt is None:
            return "heads"
        return self.adapt(self.stock(net), config.adapt, config.seed)

    def adapt(
        self, model: nn.Module, settings: AdaptConfig, seed: int, of_tasks: Mapping[str, Any] | None = None
    ) -> str:
        """Adapt a model in place and return the method's name.

        of_tasks: Options of a method that needs "tasks", from the heads of the model's net. None if tasks have no heads.
        """
        options = settings.options
        reason = needs(settings.method, options).get("tasks")
        if reason is not None:
            if of_tasks is None or "tasks" in options:
                fix = (
                    "only tasks of a multitask run with `size` have them"
                    if of_tasks is None
                    else "the run names them, leave out options.tasks"
                )
                raise UserError(f"adapt: {reason}: {fix}.")
            options = {**of_tasks, **options}
        report = adapt(model, settings.method, settings.targets, settings.rank, settings.alpha, seed, **options)
        remarks = [*report.extras, *(f"left out: {skipped}" for skipped in report.skipped)]
        for remark in [remark for remark in remarks if remark not in self._printed]:
            console.stage("adapt", remark)
            self._printed.add(remark)
        return settings.method

    def trained_on(self, config: Config) -> str:
        """Return the sets that an arm is trained on, as a report names them."""
        return ""

    def described(self, arm: str) -> str:
        if arm not in self.study.arms:
            return "the pretrained model, nothing trained" if arm == FROZEN else ""
        about = training_files.read_done(self.study.trainings(arm)[0]) or {}
        method = f"{about.get('method')} of rank {about['rank']}" if about.get("rank") else str(about.get("method"))
        trained, total = about.get("trainable", 0), about.get("total", 0)
        share = f"{trained:,} of {total:,} parameters trained" if total else "trained"
        data = self.trained_on(self.study.arms[arm])
        settings = settings_text(self.config.arms.get(arm, {}), without=("adapt", "adapt.method", "adapt.rank"))
        return "; ".join(filter(None, [method, share + (f" on {data}" if data else ""), settings]))

    def check(self) -> None:
        self._each_arm(self._check_names)

    def _check_names(self, config: Config) -> None:
        """Check the train section of an arm, its method and options, and its targets and rank on the bare modules."""
        absent = ", ".join(name for name in config.training.trackers if find_spec(name) is None)
        if absent:
            raise UserError(f'train.trackers: not installed: {absent}; pip install "vismt[log]".')
        if config.adapt is not None:
            settings = config.adapt
            arguments = (settings.method, settings.targets, settings.rank, settings.alpha, settings.options)
            check_adaptation(self.skeleton(config), *arguments)

    def _each_arm(self, check: Callable[[Config], None]) -> None:
        """Call `check` with the configuration of every arm. Errors name the arm."""
        for arm, config in self.study.arms.items():
            if self.study.is_chosen(arm):  # built before
                continue
            first = self.study.training(arm, config.training.lr, self.study.seeds[0])
            try:
                check(self.study.config_of(first))
            except UserError as error:
                raise UserError(f"arms.{arm}: {error}" if self.config.arms else str(error)) from error

    def check_arm(self, config: Config) -> None:
        """Build the net of an arm, and its optimiser if the optimiser depends on the names of parameters."""
        net, _, balanced = self.prepared(config)
        if config.training.rates:
            objective = self.objective(config, net, balanced)
            trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
            make_optimizer(trained, config.training)
            if self.config.tune is not None:
                check_fixed(self.config.tune.fixed, trained, adapter_layers(objective))

    def validate(self, training: Training) -> float:
        """Return one number for a training on the validation split, by default the mean of its scores. Higher is better."""
        scores = self.score(training, "validation", [])
        return sum(score.measure.score for score in scores) / len(scores)

    def validated_tasks(self, config: Config) -> Collection[str]:
        """Return the tasks over which `validate` scores an arm, empty if they are the same for every arm."""
        return ()

    def chosen_arm(self, name: str | None) -> str | None:
        """Return the arm that `--arm` names. None and "best" stand for the arm that is best on validation.

        "best:SEED" takes another seed of the arm. The console says which arm was taken, and the score of each. Raises UserError,
        with the names of the arms, if no validation score tells them apart.
        """
        stem, colon, seed = (name or BEST).partition(":")
        arms = self.study.arms
        if stem != BEST or BEST in arms or len(arms) < (2 if name is None else 1):
            return name
        tasks = {arm: {*self.validated_tasks(config)} for arm, config in arms.items()}
        every = set[str]().union(*tasks.values())
        compared = [arm for arm in arms if tasks[arm] == every]
        names = f"name one with --arm, as NAME or NAME:SEED: {', '.join(arms)}"
        if not compared:
            raise UserError(f"run '{self.folder}': its arms are trained on different tasks, so none is best; {names}.")
        scores = {}
        if len(compared) > 1:
            try:
                scores = {arm: self._validation_score(arm) for arm in compared}
            except UserError as error:
                raise UserError(
                    f"run '{self.folder}': no validation score tells its arms apart; {names}. ({error})"
                ) from error
        best = max(compared, key=lambda arm: scores.get(arm, 0.0))
        shown = "   ".join(f"{arm} {score:.4g}" for arm, score in scores.items())
        tied = [arm for arm in compared if scores and scores[arm] == scores[best]]
        why = f"the first of {len(tied)} that are equally good" if len(tied) > 1 else "the best"
        reason = f"{why} on validation   {shown}" if scores else "the only one that is trained on every task"
        console.stage("arm", f"{best}   {reason}")
        return f"{best}{colon}{seed}"

    def _validation_score(self, arm: str) -> float:
        """Return the score that chose the rate of an arm, or the score of its first training if it tried one rate."""
        choice = read_choice(self.folder, arm)
        score = choice.validation.get(f"{choice.lr:g}")
        return self.validate(self.study.trainings(arm)[0]) if score is None else score

    def trainings(self, arm: str) -> list[Training]:
        """Return an arm's trainings at its chosen rate. For a reference, return one placeholder."""
        if arm in self.references:
            return [Training(arm, 0.0, self.config.seed, self.folder / arm)]
        return self.study.trainings(arm)

    def finished(self, training: Training) -> None:
        self.check_merge(training)
        if not ranks.on_first((training.folder / FITTED).exists):
            found = sealed(self.fitted(training))
            ranks.on_first(lambda: atomic_write(training.folder / FITTED, found))

    def fitted(self, training: Training) -> JsonObject:
        """Return what features fitted on validation examples give to predictions and exports, on record after an evaluation.

        "quantiles" has the largest -log p of a class in a conformal set by task, and "files" texts beside weights by file name.
        """
        path = training.folder / FITTED
        if path.exists():
            return read_sealed(path, f"run '{self.folder}'", {"quantiles": dict[str, float], "files": dict[str, str]})
        features = asked_features(getattr(self.config, "evaluate", None))
        shown = [of for of in features if of.holds_out]
        written = [of for of in features if of.exported and self.exports_fitted(training)]
        views = self.fitted_views(training) if shown or written else {}
        found = {task: shown_quantile([of.fitted(view) for of in shown]) for task, view in views.items()}
        files = [of.fitted(next(iter(views.values()))).files() for of in written] if views else []
        return {
            "quantiles": {task: quantile for task, quantile in found.items() if quantile is not None},
            "files": {name: content.decode() for texts in files for name, content in texts.items()},
        }

    def check_merge(self, training: Training) -> None:
        """Write merge.json, unless it exists: the distance of the merged from the unmerged net, and what training changed."""
        training_files.check_weights(training)  # records alone would not show a change of the weights
        if not ranks.on_first(lambda: training_files.needs_merge_check(training)):
            return
        merged = self.loaded(training)
        if not is_mergeable(self.stock(merged)):
            return
        device = runtime.processes().device
        merge(self.stock(merged))
        merged = merged.to(device)
        plain = self.loaded(training).to(device)
        self.write_merge_check(training, self.outputs(merged, plain), self.stock(plain), self.stock(merged))

    def write_merge_check(
        self,
        training: Training,
        outputs: Iterable[tuple[str, Tensor, Tensor, bool]],
        adapted: nn.Module,
        merged: nn.Module,
    ) -> None:
        """Write changes.jsonl and merge.json of a trained model, with its adapter and merged. `adapted` is stock afterwards.

        outputs: Tuples (name, outputs merged, outputs unmerged, whether their argmax along dim 1 is an answer) of this process.
        Processes that share the evaluation write one file.
        """
        names: dict[str, dict[str, float]] = {}
        for part in ranks.gather(_compared(outputs)):
            for name, sums in part.items():
                _add(names.setdefault(name, {}), sums)
        changes = weight_changes(adapted, merged)
        ranks.on_first(lambda: write_lines(training.folder / training_files.CHANGES, changes))
        if not names:
            return
        worst = max(names.values(), key=lambda sums: sums["difference"] / max(sums["largest"], 1e-12))
        about = {
            "n": max(sums["n"] for sums in names.values()),
            "different_predictions": sum(sums.get("different", 0) for sums in names.values()),
            "largest_difference": worst["difference"],
            "largest_logit": worst["largest"],
            "outputs": names,
        }
        ranks.on_first(lambda: atomic_write(training.folder / training_files.MERGE, sealed(about)))

    def final(self, training: Training) -> Net:
        """Return a trained net for evaluation on the device of this process, merged if the merge is exact."""
        net = self.loaded(training)
        training_files.fold(self.stock(net), training)
        return net.to(runtime.processes().device)

    # ---- export of one arm ---------------------------------------------------------------------------------------------

    def merged(self, arm: str | None = None) -> nn.Module:
        """Return the stock model of one arm ("arm" or "arm:seed") with merged weights."""
        return self.stock(self.merged_net(self.study.find(arm)))

    def merged_net(self, training: Training) -> Net:
        """Return a trained net whose stock model has merged weights. Raises UserError if it cannot be merged."""
        net = self.loaded(training)
        if training_files.has_adapter(training):
            erased = erased_by_rounding(self.stock(net))
            if erased is not None:
                console.stage("merge", f"rounding to half precision erases {100 * erased:.1f} % of the update's norm")
            merge(self.stock(net))
        return net

    def adapted(self, arm: str | None = None) -> nn.Module:
        """Return the stock model of one arm with its adapter. Raises UserError for an arm without an adapter."""
        training = self.study.find(arm)
        if not training_files.has_adapter(training):
            raise UserError(
                f"run '{self.folder}': arm '{training.arm}' has no adapter: it trains only the heads. Name another arm with "
                "--arm, or take another format."
            )
        return self.stock(self.loaded(training))

    def files_beside(self, arm: str | None = None) -> dict[str, bytes]:
        training = self.study.find(arm)
        texts = self.fitted(training)["files"]
        return {**self.beside(training), **{name: text.encode() for name, text in texts.items()}}


def _compared(outputs: Iterable[tuple[str, Tensor, Tensor, bool]]) -> dict[str, dict[str, float]]:
    names: dict[str, dict[str, float]] = {}
    for name, folded, other, answers in outputs:
        sums = {
            "n": len(folded),
            "difference": float((folded - other).abs().max()),
            "largest": float(other.abs().max()),
        }
        if answers:
            sums["different"] = int((folded.argmax(1) != other.argmax(1)).sum())
        _add(names.setdefault(name, {}), sums)
    return names


def _add(total: dict[str, float], sums: Mapping[str, float]) -> None:
    for key, value in sums.items():
        before = total.get(key, 0)
        total[key] = before + value if key in ("n", "different") else max(value, before)  # first a float


def weight_changes(adapted: nn.Module, merged: nn.Module) -> list[JsonObject]:
    """Return a line for every matrix in which the trained model `merged` differs from the stock model.

        change = |DeltaW|_F      norm = |W|_F      stable rank = |DeltaW|_F^2 / |DeltaW|_2^2

    `adapted` is the stock model afterwards. DeltaW of a layer with factors comes from its factors, so that no rounding of a
    half-precision weight is counted. DeltaW of a weight that is trained itself, and of a tuner without factors, is the merged
    weight minus the stock one.
    """
    lines = []
    with torch.no_grad():
        for path, layer in adapter_layers(adapted).items():
            if layer.has_factors:
                values = cast(Tensor, layer.low_rank().svd().core)  # singular values
                lines.append(_line(f"{path}.weight", layer.matrix(layer.weight), values))
    undo(adapted)
    measured = {line["weight"] for line in lines}
    after = dict(merged.named_parameters())
    for name, parameter in adapted.named_parameters():
        stock, now = parameter.detach(), after[name].detach()
        if name not in measured and stock.ndim > 1 and not torch.equal(stock, now):
            change = (now.double() - stock.double()).flatten(1)
            wide = change if change.shape[0] <= change.shape[1] else change.T
            squares = torch.linalg.eigvalsh(wide @ wide.T)  # of the singular values, for less than an SVD
            lines.append(_line(name, stock, squares.clamp_min(0).sqrt()))
    return lines


def _line(name: str, weight: Tensor, values: Tensor) -> JsonObject:
    norm = float(values.square().sum().sqrt())
    stable = float((values / values.max()).square().sum()) if norm else 0.0
    return {"weight": name, "norm": float(weight.float().norm()), "change": norm, "stable_rank": stable}


def recorded_processes(folder: Path) -> int | None:
    """Return how many processes began the trainings of a run folder. None if it has no record."""
    path = folder / ARMS / PROCESSES
    return int(read_sealed(path, f"run '{folder}'", {"processes": int})["processes"]) if path.exists() else None


def recorded_sets(folder: Path) -> JsonObject:
    """Return what a run folder has about its training sets: "digests", and "needed" by nets and exports. {} before trainings."""
    path = folder / ARMS / SETS
    return read_sealed(path, f"run '{folder}'") if path.exists() else {}


def check_trained_dtype(net: nn.Module) -> None:
    """Raise UserError if weights in half precision are trained, because steps would be lost in rounding."""
    for name, parameter in net.named_parameters():
        if parameter.requires_grad and parameter.dtype.itemsize < 4:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UserError(
                f"model.dtype: {dtype} is for frozen weights, and '{name}' is trained; set it (or "
                "adapt.options.dtype for factors) to float32, and train.precision to bf16 for a faster pass."
            )


def check_fixed(patterns: Sequence[str], trained: Collection[str], layers: Iterable[str]) -> None:
    """Raise UserError if a pattern of tune.fixed finds a trained parameter in an adapter layer, as `head` finds `conv_head`."""
    inside = tuple(f"{path}." for path in layers)
    for pattern in patterns:
        found = [name for name in trained if name.startswith(inside) and re.search(pattern, name)]
        if found:
            others = sorted(name for name in trained if not name.startswith(inside))
            raise UserError(
                f"tune.fixed: '{pattern}' also finds '{found[0]}' of the adapter, whose rate is to be tried; write a pattern "
                f"that finds only parameters outside it, like {', '.join(others[:4])}."
            )
