"""A run folder from start to report: what `vismt run`, `train`, `evaluate`, `attack`, `merge`, `predict` and `export` do.

The folder is named by the configuration and its hash, so the same command on the same configuration goes on where it
stopped: training at its checkpoint, evaluation at its episode.
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import yaml

from vismt import console, jobs
from vismt.config import RunConfig, config_hash, read_yaml, resolved, typed
from vismt.engine import log, runtime
from vismt.errors import UserError, near
from vismt.files import atomic_write, read_json
from vismt.lowrank.peft_folder import export_peft
from vismt.report import report

RESOLVED, FACTS, RESULTS = "config.resolved.yaml", "run.json", "results.jsonl"
FORMATS = ("timm", "transformers", "peft")


class Run:
    """One run folder with its configuration and job."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.config, self.hash = folder, config, config_hash(config)
        self.job = jobs.make_job(config, folder)
        self.started = time.monotonic()

    @property
    def facts(self) -> dict[str, Any]:
        """run.json, empty before the first stage."""
        path = self.folder / FACTS
        facts = read_json(path, f"run '{self.folder}'") if path.exists() else {}
        if not isinstance(facts, dict) or not isinstance(facts.get("wall_time_s", 0.0), int | float):
            raise UserError(f"run '{self.folder}': {FACTS} is not what a run writes; the file was changed by hand.")
        if facts.get("config_hash", self.hash) != self.hash:
            raise UserError(
                f"run '{self.folder}': {RESOLVED} was changed after the run; start a run of its own instead."
            )
        return facts

    def train(self) -> None:
        """Train unless this folder holds the finished adapter."""
        self._note(started=self.facts.get("started") or _now())
        if not self.job.trains:
            console.stage("train", "nothing to train: the configuration has no train or no adapt section")
        elif "adapt" in self.facts:
            console.stage("train", f"done before: {self.folder}")
        else:
            self._note(adapt=self.job.train())

    def on_main(self, stage: Callable[[], None]) -> None:
        """Run a stage on the first process only; the others wait for it."""
        state = runtime.processes()
        if state.is_main_process:
            stage()
        state.wait_for_everyone()

    def evaluate(self, attacks: list[Any] | None = None) -> None:
        """Evaluate and write results.jsonl; rows of other conditions (an earlier attack) stay."""
        if not self.facts:  # also refuses a folder whose configuration was changed after the run
            self._note(started=_now())
        rows = self.job.evaluate(attacks)
        names = ("data", "protocol", "condition", "model")
        fresh = {tuple(row[name] for name in names) for row in rows}
        known = log.read_lines(self.folder / RESULTS, names)
        kept = [row for row in known if tuple(row[name] for name in names) not in fresh]
        log.write_lines(self.folder / RESULTS, kept + rows)
        self._note(finished=_now())

    def report(self) -> None:
        """Write report.md and report.html and say where."""
        console.stage("report", str(report.write_report(self.folder)))

    def _need_adapter(self) -> None:
        if not any((self.folder / place).is_dir() for place in ("adapter", "pool", "arms")):
            raise UserError(
                f"run '{self.folder}': it holds no trained adapter; `vismt train` or `vismt run` makes one."
            )

    def merge(self, expert: str | None = None) -> Path:
        """Write merged/model.safetensors: the stock state dict with the update folded in; of a pool, one expert's."""
        self._need_adapter()
        return self._write_merged(self.folder / "merged", expert)

    def export(self, form: str, target: Path | None, expert: str | None = None) -> Path:
        """timm: model.safetensors and config.json; transformers: save_pretrained; peft: an adapter folder."""
        if form not in FORMATS:
            raise UserError(f"export: format '{form}'.{near(form, FORMATS)}")
        self._need_adapter()
        target = target or self.folder / f"export-{form}"
        if form == "timm" and self.config.task == "lm":
            raise UserError("export: a language model is no timm model; use --format transformers or peft.")
        if form == "timm":
            return self._write_merged(target, expert)
        if form == "peft":
            export_peft(self.job.adapted(expert), target)
        else:
            model = self.job.merged(expert)
            if not hasattr(model, "save_pretrained"):
                raise UserError(f"export: {type(model).__name__} is no transformers model; use --format timm or peft.")
            model.save_pretrained(target)
        return self._write_beside(target, expert)

    def predict(
        self, images: list[Path], target: Path | None = None, expert: str | None = None, **how: bool
    ) -> list[Path]:
        """Pictures of a dense run's predictions, under RUN/predictions unless told otherwise; how: see `predict_images`."""
        predict = getattr(self.job, "predict", None)
        if predict is None:
            raise UserError(
                f"predict: run '{self.folder}' is of the job '{self.config.task}'; only dense runs draw predictions."
            )
        return predict(images, target or self.folder / "predictions", expert, **how)

    def _write_merged(self, target: Path, expert: str | None) -> Path:
        model = self.job.merged(expert)
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(target)
            return self._write_beside(target, expert)
        state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        atomic_write(target / "model.safetensors", safetensors.torch.save(state, metadata={"format": "pt"}))
        about = {
            "architecture": self.config.model.name,
            "img_size": self.config.model.img_size,
            "merged_from": self.folder.name,
        }
        about |= {"num_classes": model.num_classes, **self.job.about()}
        known = getattr(model, "pretrained_cfg", None)
        if known:  # what timm needs to build the model of the folder alone ("local-dir:...")
            size = list(model.patch_embed.img_size)
            about["architecture"] = known.get("architecture", about["architecture"])
            about["model_args"] = {"img_size": size, "global_pool": model.global_pool}
            about["pretrained_cfg"] = {name: known[name] for name in ("mean", "std", "interpolation") if name in known}
            about["pretrained_cfg"]["input_size"] = [3, *size]
        atomic_write(target / "config.json", json.dumps(about, indent=1))
        return self._write_beside(target, expert)

    def _write_beside(self, target: Path, expert: str | None) -> Path:
        for name, content in self.job.beside(expert).items():
            atomic_write(target / name, content)
        return target

    def _note(self, **changes: Any) -> None:
        """Update run.json; the wall time adds up over the sessions of a run."""
        now = time.monotonic()
        before = self.facts
        facts = {
            "title": self.config.title or self.folder.name,
            "command": before.get("command") or _command(),
            "git_revision": runtime.git_revision(),
            "config_hash": self.hash,
            "seed": self.config.seed,
            "hardware": runtime.hardware(),
            "versions": runtime.versions(),
            "wall_time_s": before.get("wall_time_s", 0.0) + now - self.started,
        }
        self.started = now
        if runtime.processes().is_main_process:
            atomic_write(self.folder / FACTS, json.dumps({**before, **facts, **changes}, indent=1))


def start(path: Path, overrides: list[str], out: Path) -> Run:
    """The run folder of a configuration: <out>/<file stem>-<hash>, made or found again."""
    config = jobs.load_config(path, overrides)
    run = Run(out / f"{path.stem}-{config_hash(config)}", config)
    if not (run.folder / RESOLVED).exists():
        atomic_write(run.folder / RESOLVED, yaml.safe_dump(resolved(config), sort_keys=False))
    return run


def open_run(folder: Path) -> Run:
    """A run folder made before."""
    if not (folder / RESOLVED).exists():
        raise UserError(f"run '{folder}': no {RESOLVED}; give a folder that `vismt run` or `vismt train` made.")
    raw = read_yaml(folder / RESOLVED)
    return Run(folder, typed(raw, jobs.config_type(raw, str(folder)), str(folder / RESOLVED)))


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _command() -> str:
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
