"""Adapters that earlier versions wrote (make.py), and trained run folders, load, evaluate and merge as they did then."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from golden.inputs import golden_model, logits_of, write_world
from golden.merged import ARMS, merged_logits
from helpers.blank import empty_figures
from helpers.golden_reports import check_report
from torch import Tensor

import vismt
from vismt.base.errors import UserError
from vismt.base.registry import PLACES
from vismt.cli import main
from vismt.llm import gate_of, instance_gates
from vismt.multitask import set_fade
from vismt.report.results import Result, read_results
from vismt.uncertainty.intervals import SHARE

GOLDEN = Path(__file__).resolve().parent
ADAPTERS = sorted(path.name for path in (GOLDEN / "adapters").iterdir())
RUNS = sorted(path.name for path in (GOLDEN / "runs").iterdir())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with all weights and sets that the runs read."""
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def copied(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that copies a golden run by name; its relative paths are resolved in `world`, now the current folder."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path / "cache"))
    empty_figures(monkeypatch)
    return lambda name: Path(shutil.copytree(GOLDEN / "runs" / name, tmp_path / name))


def expected_of(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata beside a golden adapter."""
    path = GOLDEN / "adapters" / name / "expected.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        return safetensors.torch.load_file(path), file.metadata()


def same(actual: Tensor, expected: Tensor) -> bool:
    """Return whether logits agree within 1e-5."""
    return torch.allclose(actual, expected, atol=1e-5, rtol=1e-5)


def test_every_method_has_a_golden_adapter() -> None:
    names = [expected_of(name)[1]["method"] for name in ADAPTERS]
    assert set(vismt.list_methods()) <= {PLACES["earlier names in files"].get(name, name) for name in names}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_gives_its_logits_loaded_and_merged(name: str) -> None:
    expected, about = expected_of(name)
    model = golden_model(about["model"])
    assert not same(logits_of(model, expected["input"]), expected["logits"])
    vismt.load_adapter(model, GOLDEN / "adapters" / name)
    gates = nullcontext()
    if "gates" in expected:
        assert same(gate_of(model)(expected["users"])[0], expected["gates"])
        gates = instance_gates(expected["gates"])
    with gates:
        assert same(logits_of(model, expected["input"]), expected["logits"])
        if "merged" not in expected:
            with pytest.raises(UserError, match="merge"):
                vismt.merge(model)
            return
        if about["method"] in ("moe_lora", "emtal"):
            set_fade(model, 1.0)
        vismt.merge(model)
    assert same(logits_of(model, expected["input"]), expected["merged"])
    fresh = golden_model(about["model"])
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert [type(module) for module in fresh.modules()] == [type(module) for module in model.modules()]


@pytest.mark.parametrize("name", RUNS)
def test_evaluating_a_run_without_its_records_gives_its_numbers_and_report(
    copied: Callable[[str], Path], name: str
) -> None:
    """Delete the records and logs and compute all numbers from the trained weights; other processors may round differently."""
    run = copied(name)
    for path in [
        *run.rglob("records"),
        *run.rglob("episodes"),
        *run.glob("*seeds.jsonl"),
        *run.rglob("merge.json"),
        *run.rglob("metrics.jsonl"),
    ]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["evaluate", str(run), "--quiet"]) == 0
    before, after = rows(GOLDEN / "runs" / name), rows(run)
    assert before.keys() <= after.keys()  # some of the runs are older than the answer that is always the same class
    for key, row in before.items():
        new = after[key]
        # A confidence at the edge of a bin can round into the other one, and a pixel at a threshold to its other side.
        tolerance = 1 / row.n if row.metric == "ECE-15" else 1e-3 if row.scale == SHARE else 1e-4
        assert (new.value, new.n) == (pytest.approx(row.value, rel=1e-4, abs=tolerance), row.n), row
        assert (new.interval, new.low <= new.value <= new.high) == (row.interval, True), row
    check_report(run, name)


def rows(run: Path) -> dict[tuple[object, ...], Result]:
    return {result.key: result for result in read_results(run / "results.jsonl")}


@pytest.mark.parametrize("name", [name for name in RUNS if name in ARMS])
def test_merged_models_answer_as_before(copied: Callable[[str], Path], name: str) -> None:
    expected = safetensors.torch.load_file(GOLDEN / "merged.safetensors")
    run = copied(name)
    for arm in ARMS[name]:
        assert same(merged_logits(run, arm), expected[f"{name}/{arm or ''}"]), arm


@pytest.mark.parametrize("name", ["fewshot_pool", "dense"])
def test_merging_one_of_several_without_a_validation_score_asks_which(
    copied: Callable[[str], Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(copied(name))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
