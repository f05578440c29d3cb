"""A run folder: the stages of its job, run.json with the facts of the run, merged weights and exports.

The folder is named by the configuration and its hash. The same command on the same configuration therefore continues where it
stopped: a training at its checkpoint, and an evaluation at the first batch that is not on record.
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vismt.backbones.assets import list_assets
from vismt.base import console, ranks
from vismt.base.errors import UserError, require_known
from vismt.config.sections import RESOLVED, RunConfig, config_hash, from_working_folder
from vismt.engine import runtime
from vismt.jobs import make_job, typed_config
from vismt.jobs.graphs import NAMES, PREPROCESSING, SQUARE, write_graph
from vismt.jobs.predictions import PREDICTIONS, Options, Predictions
from vismt.lowrank.files.peft_folder import export_peft
from vismt.report.renderers import fill_page
from vismt.report.results import FACTS
from vismt.report.writer import read_run_facts
from vismt.storage.files import JsonObject, atomic_write, new_files, read_json, remove_partial, sealed, write_tensors
from vismt.storage.locks import locked
from vismt.storage.outputs import check_folder

README = "README.md"
EXPORTED = "vismt.json"  # in the folder of an export: run, configuration, arm and seed
_FORMATS = ("timm", "transformers", "peft", "onnx", "torch")


class Run:
    """One run folder with its configuration and job."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder = folder
        self.hash = config_hash(config)
        self.config = self._located(config)
        self.job = make_job(self.config, folder, self.hash)
        self.started, self.cpu = time.monotonic(), _cpu_seconds()

    def _located(self, config: RunConfig) -> RunConfig:
        """Return a configuration with paths from the working folder, if the run was started in another one."""
        started_in = read_run_facts(self.folder).get("working_folder")
        if started_in is None or (self.folder / started_in).resolve() == Path.cwd():
            return config
        return typed_config(from_working_folder(asdict(config), self.folder / started_in), f"run '{self.folder}'")

    @contextmanager
    def owned(self) -> Iterator[Run]:
        """Hold the folder's lock, on the first process of a launch, and remove what a killed run has not finished.

        Raises UserError if another run has the lock.
        """
        runtime.processes().wait_for_everyone()  # what the others write at the start is not finished, nor to be removed
        with ExitStack() as held, ranks.shared():
            ranks.on_first(lambda: held.enter_context(locked(self.folder)))
            ranks.on_first(lambda: remove_partial(self.folder))
            self.job.part_done = self._note  # a run that is killed keeps the time of its finished parts
            yield self

    @property
    def facts(self) -> JsonObject:
        """The content of run.json, empty before the first stage."""
        facts = read_run_facts(self.folder)
        if facts.get("config_hash", self.hash) != self.hash:
            raise UserError(f"run '{self.folder}': {RESOLVED} was changed after the run; start a new run instead.")
        return facts

    def train(self) -> None:
        """Train unless this folder has the finished trainings. All processes of a launch call it."""
        self._note(started=self.facts.get("started") or _now())
        if not self.job.trains:
            console.stage("train", "nothing to train: the configuration has no train or no adapt section")
        elif "adapt" in self.facts:
            console.stage("train", f"done before: {self.folder}")
            self.job.check_sets()
        else:
            with ranks.shared():
                self._note(adapt=self.job.train())

    def evaluate_references(self) -> None:
        """Evaluate models that no arm trains, if trainings are still to come."""
        if self.job.trains and "adapt" not in self.facts:
            self._note(started=self.facts.get("started") or _now())
            with ranks.shared():
                self.job.evaluate_references()

    def on_main(self, stage: Callable[[], object]) -> None:
        """Run a stage only on the first process, while the others wait."""
        with ranks.shared():
            ranks.on_first(stage)

    def evaluate(self, attacks: Sequence[Any] | None = None) -> None:
        """Evaluate and write results.jsonl. Rows of other conditions (an earlier attack) stay.

        All processes of a launch call it and share the evaluation.
        """
        with ranks.shared():
            if not self.facts:  # also refuses a folder whose configuration was changed after the run
                self._note(started=_now())
            self.job.evaluate(attacks)
            self._note(finished=_now())

    def report(self, formats: Sequence[str] | None = None) -> list[Path]:
        """Write the report, print where its files are, and return them, by default report.html of report.md and report.html."""
        paths = self.job.report()[-1:] if formats is None else self.job.report(formats)
        for path in paths:
            console.stage("report", str(path))
        return paths

    def _need_adapter(self) -> None:
        """Raise UserError for a run without a trained adapter, and if its data is needed and gone."""
        if not any((self.folder / place).is_dir() for place in ("pool", "arms")):
            raise UserError(
                f"run '{self.folder}': it holds no trained adapter; `vismt train` or `vismt run` makes one."
            )
        self.job.check_kept()

    def merge(self, arm: str | None = None) -> Path:
        """Write the stock state dict with merged weights to merged-ARM-seed-SEED/model.safetensors. Return the folder."""
        self._need_adapter()
        arm = self.job.chosen_arm(arm)
        model = self.job.merged(arm)
        form = "transformers" if hasattr(model, "save_pretrained") else "timm"
        return self._write(self._target("merged", None, arm), arm, form, model)

    def export(self, form: str, target: Path | None, arm: str | None = None, *, uniform: bool = False) -> Path:
        """Write one arm as timm (model.safetensors, config.json), transformers (save_pretrained), peft (adapter folder) or graph.

        target: Folder, by default export-FORMAT-ARM-seed-SEED in the run folder. uniform: Argument of export_peft. Raises
        UserError for an unknown format, a format that does not fit the model, a run without an adapter, and a folder with
        another model's export.
        """
        require_known("export: format", [form], _FORMATS)
        if uniform and form != "peft":
            raise UserError(f"export: --uniform is of --format peft; leave it out with {form}.")
        self._need_adapter()
        arm = self.job.chosen_arm(arm)
        if form == "peft":
            model: Any = self.job.adapted(arm)
        elif form in NAMES:
            model = self.job.graph(arm, form)
        else:
            model = self.job.merged(arm)
            is_transformers = hasattr(model, "save_pretrained")
            if is_transformers != (form == "transformers"):
                fitting = "transformers" if is_transformers else "timm"
                raise UserError(
                    f"export: {type(model).__name__} is not a {form} model; use --format {fitting} or peft."
                )
        return self._write(self._target(f"export-{form}", target, arm), arm, form, model, uniform)

    def _target(self, kind: str, target: Path | None, arm: str | None) -> Path:
        folder = target or self.folder / f"{kind}-{self.job.name_of(arm)}"
        note = folder / EXPORTED
        held = read_json(note, f"export '{folder}'") if note.exists() else None
        if held != self._exported(arm):
            if isinstance(held, dict) and "model" in held:
                what = f"of {held['model']} of the run {held.get('run')}"
                raise UserError(
                    f"export: '{folder}' holds a model {what}; name another folder with --to, or remove it."
                )
            check_folder("export", folder)
        return folder

    def _exported(self, arm: str | None) -> dict[str, str]:
        return {"run": self.folder.name, "config_hash": self.hash, "model": self.job.name_of(arm)}

    def predict(self, inputs: Sequence[Path], target: Path | None, options: Options) -> Predictions:
        """Write predictions on images or rows of text, by default under RUN/predictions, and return them."""
        options.check(self.job.predict_options, f"this run of {self.config.task}")
        self.job.check_kept()
        options = replace(options, arm=self.job.chosen_arm(options.arm))
        return self.job.predict(inputs, target or self.folder / PREDICTIONS, options)

    def _write(self, target: Path, arm: str | None, form: str, model: Any, uniform: bool = False) -> Path:
        """Fill the folder of an export, with the files that go beside it. A killed export leaves nothing there."""
        with new_files(target, first=EXPORTED) as folder:
            base = "" if form in NAMES else self._base(model)
            if form in NAMES:
                write_graph(model, form, folder)
            elif form == "peft":
                export_peft(model, folder, uniform=uniform)
            elif form == "transformers":
                model.save_pretrained(folder)
            else:
                write_tensors(folder / "model.safetensors", model.state_dict(), {"format": "pt"})
                atomic_write(folder / "config.json", json.dumps(self._model_config(model, arm), indent=1))
            atomic_write(folder / EXPORTED, json.dumps(self._exported(arm), indent=1))
            for name, content in self.job.files_beside(arm).items():
                atomic_write(folder / name, content)
            title = f"{self.job.name_of(arm)} of {self.folder.name}"
            atomic_write(folder / README, readme(folder, form, title, base, self.config.model.name))
        if form not in NAMES:
            from vismt.verification.verify import verify_written

            verify_written(target)
        return target

    def _base(self, model: Any) -> str:
        """Return the expression that builds the model that was adapted, without its weights if timm does not have them."""
        section: Any = self.config.model
        if hasattr(model, "save_pretrained"):
            name = str(Path(section.name).resolve()) if Path(section.name).is_dir() else section.name
            if section.gguf_file or name in list_assets():  # which transformers alone does not find or expand
                file = json.dumps(section.gguf_file) if section.gguf_file else None
                return f"lm.create_lm({json.dumps(name)}, gguf_file={file})[0]"
            return f"transformers.AutoModelForCausalLM.from_pretrained({json.dumps(name)})"
        from vismt.backbones.pyramid import image_size, takes_size

        name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", section.name)
        pretrained, classes = getattr(section, "pretrained", None) is True, getattr(model, "num_classes", 0)
        size = f", img_size={image_size(model)}" if takes_size(model) else ""
        return f"timm.create_model({json.dumps(name)}, pretrained={pretrained}, num_classes={classes}{size})"

    def _model_config(self, model: Any, arm: str | None) -> JsonObject:
        about: JsonObject = {
            "architecture": self.config.model.name,
            "img_size": getattr(self.config.model, "img_size", None),
            "merged_from": self.folder.name,
            "num_classes": getattr(model, "num_classes", None),
            **self.job.about(arm),
        }
        pretrained = getattr(model, "pretrained_cfg", None)
        if pretrained:  # what timm needs to build the model from the folder alone ("local-dir:...")
            from vismt.backbones.pyramid import image_size, takes_size
            from vismt.data.pixels import FOR_TIMM

            size = list(image_size(model))
            about["architecture"] = pretrained.get("architecture", about["architecture"])
            about["model_args"] = {"img_size": size} if takes_size(model) else {}
            if isinstance(getattr(model, "global_pool", None), str):
                about["model_args"]["global_pool"] = model.global_pool
            normalisation = {name: pretrained[name] for name in ("mean", "std") if name in pretrained}
            resizing = {**FOR_TIMM, **about.get("pretrained_cfg", {})}
            about["pretrained_cfg"] = {**normalisation, "input_size": [3, *size], **resizing}
        return about

    def _note(self, **changes: Any) -> None:
        """Update run.json. Wall and CPU time add up over the sessions of a run."""
        now, cpu = time.monotonic(), _cpu_seconds()
        before = self.facts
        place = {} if before else {"working_folder": os.path.relpath(Path.cwd(), self.folder)}
        facts = {
            **place,
            "title": self.config.title or self.folder.name,
            "command": before.get("command") or _command(),
            "git_revision": runtime.git_revision(),
            "config_hash": self.hash,
            "seed": self.config.seed,
            **self.job.facts(),
            "hardware": runtime.hardware(),
            "versions": runtime.versions(),
            "wall_time_s": before.get("wall_time_s", 0.0) + now - self.started,
            "cpu_time_s": before.get("cpu_time_s", 0.0) + cpu - self.cpu,
        }
        if (was := before.get("hardware")) != facts["hardware"]:
            console.stage("device", f"{facts['hardware']}   (before: {was})" if was else facts["hardware"])
        self.started, self.cpu = now, cpu
        if runtime.processes().is_main_process:
            atomic_write(self.folder / FACTS, sealed({**before, **facts, **changes}, indent=1))


def readme(folder: Path, form: str, title: str, base: str, adapted: str) -> str:
    """Return the README.md of an export.

    Args:
        folder: The written export.
        form: One of the formats of `vismt export`.
        title: What was exported, for the heading.
        base: Expression that builds the model below a peft adapter.
        adapted: Name of the model that was adapted.
    """
    about: JsonObject = {}
    if form != "peft":
        about = read_json(folder / (PREPROCESSING if form in NAMES else "config.json"), f"export '{folder}'")
    output, known = next(iter(about["outputs"].items())) if form in NAMES else ("", about)
    return fill_page(
        Path(__file__).with_name("export_readme.md"),
        form=form,
        title=title,
        base=base,
        adapted=adapted,
        about=about,
        output=output,
        known=known,
        square=SQUARE,
        files=[path.name for path in folder.iterdir()],
    )


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended, all threads together."""
    return sum(os.times()[:4])


def _command() -> str:
    program = Path(sys.argv[0]).name
    start = ["python", "-m", "vismt"] if program == "__main__.py" else [program]
    return shlex.join([*start, *sys.argv[1:]])
