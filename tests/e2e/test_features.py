"""Every feature of evaluation in every job that has it: scores against the records of a tiny run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.lm_parts import save_lm, save_texts, sentiment_task
from helpers.room import dense
from helpers.tiny_runs import FEWSHOT, SHORT, TRAIN, run_config, save_classifier, written

from vismt.evaluation.adjust_logits import ADJUSTED
from vismt.evaluation.risk import ACCEPTED, AURC, COVERED, RISK, SIZE
from vismt.evaluation.sections import refusals
from vismt.evaluation.temperature import TEMPERED
from vismt.jobs import job_config
from vismt.report.results import Result, read_results
from vismt.storage.files import read_sealed
from vismt.storage.lines import read_lines

PGD = {"name": "pgd", "epsilon": "2/255", "steps": 2}
CONDITIONS: dict[str, Any] = {"attacks": [PGD], "corruptions": [{"name": "contrast", "severities": [1, 5]}]}
CERTIFY = {"sigma": 0.5, "samples": 20, "alpha": 0.05}  # reaches 0.5 Phi^-1(0.05^(1/20)) = 0.54
FITTED = {"risk": True, "temperature": True}


def fewshot(folder: Path, room: Path) -> dict[str, Any]:
    evaluate = {**FEWSHOT["evaluate"], "models": ["frozen"], "episodes": 5}
    evaluate |= {**CONDITIONS, "certify": CERTIFY, "ood": [f"{room}/reds:test"]}
    return {"model": FEWSHOT["model"], "adapt": None, "train": None, "evaluate": evaluate}


def multitask(folder: Path, room: Path) -> dict[str, Any]:
    reds = [f"{room}/reds:test"]
    evaluate = {**CONDITIONS, **FITTED, "certify": CERTIFY, "ood": reds, "laplace": True}
    task = {"name": "digits", "train": ["digits"], "test_share": 0.02, "validation_share": 0.02, "limit": 20}
    return {
        "task": "multitask",
        "model": SHORT,
        "adapt": {"method": "lora", "rank": 2},
        "tasks": [task],
        "batch": 8,
        "train": TRAIN,
        "evaluate": {**evaluate, "adjust_logits": True},
    }


def maps(folder: Path, room: Path) -> dict[str, Any]:
    evaluate = {**CONDITIONS, **FITTED, "certify": CERTIFY, "ood": [f"{room}/reds:test"], "adjust_logits": True}
    return dense(room, evaluate=evaluate)


def lm(folder: Path, room: Path) -> dict[str, Any]:
    films = save_texts(folder)["films"]
    return {
        "task": "lm",
        "model": {"name": str(save_lm(folder / "lm")), "first_block": 1},
        "adapt": {"method": "lora", "rank": 2, "targets": ["q_proj"]},
        "tasks": [sentiment_task(films, validation=[f"{films}:dev"], validation_share=0.0)],
        "train": TRAIN,
        "batch": 4,
        "evaluate": {"batch": 4, "temperature": True, "laplace": True},
    }


def robustness(folder: Path, room: Path) -> dict[str, Any]:
    save_classifier(folder)
    evaluate = {"images": 12, "threshold_images": 40, "ood": [f"{room}/reds:test"]}
    return {
        "task": "robustness",
        "arms": {"adapted": {"classifier.name": str(folder / "model.safetensors")}},
        "data": ["digits"],
        "evaluate": {**evaluate, **CONDITIONS, **FITTED, "certify": CERTIFY},
    }


class Run:
    """A finished run. rows: Rows by task, condition and metric. answers: Record of the images of the task of classes."""

    def __init__(self, job: Callable[[Path, Path], dict[str, Any]], folder: Path, room: Path) -> None:
        self.job, config = job, job(folder, room)
        self.features = [
            key
            for key in refusals(type(job_config(config.get("task", "fewshot"))().evaluate))
            if config["evaluate"].get(key)
        ]
        self.folder = run_config(written(folder / f"{job.__name__}.yaml", config))
        rows = read_results(self.folder / "results.jsonl")
        self.rows = {(row.condition, row.metric): row for row in rows if row.arm != "constant" and row.task != "semseg"}
        self.adjusted = [row for row in rows if row.condition == ADJUSTED.label]

    def row(self, condition: str, metric: str) -> Result:
        return self.rows[condition, metric]

    def record(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of the one record of a name, without the name of the task."""
        (path,) = (path for path in self.folder.glob(f"**/{name}") if "constant" not in path.parts)
        rows = [{key.removeprefix("classify "): value for key, value in row.items()} for row in read_lines(path)]
        return [row for row in rows if "label" in row]

    @property
    def answers(self) -> list[dict[str, Any]]:
        return self.record(
            {"multitask": "test-digits.jsonl", "maps": "test.jsonl"}.get(
                self.job.__name__, "answers-digits-images.jsonl"
            )
        )

    @property
    def attack(self) -> str:
        return "PGD-2 linf 2/255" + (" on all tasks" if self.job is maps else "")


def attacks(run: Run) -> None:
    clean, attacked = run.row("clean", "accuracy"), run.row(run.attack, "accuracy")
    assert attacked.kind == "attack" and attacked.n == clean.n
    if run.job is not fewshot and run.job is not maps:
        right = [row["clean"] == row[run.attack] == row["label"] for row in run.answers]
        assert attacked.value == pytest.approx(sum(right) / len(right))
    assert run.job is maps or attacked.value <= clean.value


def corruptions(run: Run) -> None:
    found = {row.level for (_, metric), row in run.rows.items() if row.kind == "corruption" and metric == "accuracy"}
    assert found == {1.0, 5.0}


def certify(run: Run) -> None:
    radii = {row.level: row.value for row in run.rows.values() if row.kind == "certified" and row.metric == "accuracy"}
    assert [*radii] == [0.0, 0.25, 0.5]
    abstained = run.row("smoothed 0.5", "abstentions").value
    assert [*radii.values()] == sorted(radii.values(), reverse=True) and radii[0.0] + abstained <= 1 + 1e-9
    assert "certified by l2 radius" in (run.folder / "report.md").read_text()


def ood(run: Run) -> None:
    row = run.row("against reds:test", "AUROC")
    assert 0 <= row.low <= row.value <= row.high <= 1
    if run.job is fewshot:
        assert row.n == 5
        return
    (path,) = run.folder.glob("**/*-outside.jsonl")
    inside, outside = ([of["clean confidence"] for of in rows] for rows in (run.answers, run.record(path.name)))
    pairs = [(a > b) + (a == b) / 2 for a in inside for b in outside]
    assert row.value == pytest.approx(sum(pairs) / len(pairs), abs=1e-6) and row.n == len(inside) + len(outside)


def risk(run: Run) -> None:
    (path,) = run.folder.glob("**/risk-*.json")
    thresholds, answers = read_sealed(path, "risk"), run.answers
    for name in ("clean", run.attack, "contrast 5"):
        strict = ["clean"] if name == run.attack else []
        covered = [all(row[f"{at} nll"] <= thresholds["quantile"] for at in (name, *strict)) for row in answers]
        wrong = [any(row[at] != row["label"] for at in (name, *strict)) for row in answers]
        accepted = [row[f"{name} confidence"] >= thresholds["confidence"] for row in answers]
        sizes = [row[f"{name} set"] for row in answers]
        means = {COVERED: covered, ACCEPTED: accepted, SIZE: sizes}
        for metric, values in means.items():
            assert run.row(name, metric).value == pytest.approx(sum(values) / len(answers))
        if any(accepted):
            errors = sum(w for w, a in zip(wrong, accepted, strict=True) if a) / sum(accepted)
            assert run.row(name, RISK).value == pytest.approx(errors)
        assert 0 <= run.row(name, AURC).low <= run.row(name, AURC).high <= 1
        assert all(
            size >= 1 for size, row in zip(sizes, answers, strict=True) if row[f"{name} nll"] <= thresholds["quantile"]
        )
    assert "# Risk" in (run.folder / "report.md").read_text()


def temperature(run: Run) -> None:
    before, after = run.row("clean", "NLL in nats"), run.row(TEMPERED.label, "NLL in nats")
    assert after.n == before.n and after.value != before.value
    assert run.job is lm or (TEMPERED.label, "accuracy") not in run.rows  # which no temperature changes


def laplace(run: Run) -> None:
    assert run.row("Laplace", "NLL in nats").n == run.row("clean", "NLL in nats").n


def adjust_logits(run: Run) -> None:
    tasks = {"classification"} if run.job is multitask else {"semseg", "classify"}
    assert {row.task for row in run.adjusted} == tasks and len(
        {*map(str, run.folder.glob("**/adjust_logits*.json"))}
    ) == len(tasks)


CHECKS = (attacks, corruptions, certify, ood, risk, temperature, laplace, adjust_logits)
JOBS = {
    fewshot: (attacks, corruptions, certify, ood),
    multitask: (attacks, corruptions, certify, ood, risk, temperature, laplace, adjust_logits),
    maps: (attacks, corruptions, certify, ood, risk, temperature, adjust_logits),
    lm: (temperature, laplace),
    robustness: (attacks, corruptions, certify, ood, risk, temperature),
}


@pytest.fixture(scope="module")
def runs(room: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    found: dict[Any, Run] = {}

    def finished(job: Any) -> Run:
        if job not in found:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("VISMT_DATA", str(room / "data"))
                found[job] = Run(job, tmp_path_factory.mktemp(job.__name__), room)
        return found[job]

    return finished


@pytest.mark.parametrize(("job", "check"), [(job, check) for job, checks in JOBS.items() for check in checks])
def test_a_feature_has_the_scores_that_the_records_say(job: Any, check: Callable[[Run], None], runs) -> None:
    check(runs(job))


@pytest.mark.parametrize("job", JOBS)
def test_the_table_has_every_feature_that_is_asked(job: Any, runs) -> None:
    assert {*runs(job).features} == {check.__name__ for check in JOBS[job]}
    assert {check.__name__ for check in CHECKS} == {check.__name__ for checks in JOBS.values() for check in checks}
