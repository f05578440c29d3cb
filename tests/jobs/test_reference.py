"""The reference of configurations: every key has a meaning, and what pages, terminal and schema say is what is read."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import jsonschema
import pytest
import yaml
from helpers.tiny_runs import refused

from scripts.pages import configuration_page
from vismt.base.errors import UserError
from vismt.cli import main
from vismt.config.sections import Count, RunConfig, with_values
from vismt.config.typed import Names, within
from vismt.jobs import JOBS, job_config, load_config, reference
from vismt.jobs.fewshot.config import FewShotConfig

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def paths(values: object, prefix: str = "") -> set[str]:
    """The dotted keys of plain values, [] for the items of a list."""
    if isinstance(values, list):
        return {path for value in values for path in paths(value, f"{prefix}[]")}
    if not isinstance(values, dict):
        return set()
    found = {f"{prefix}.{name}".lstrip(".") for name in values}
    return found.union(*(paths(value, f"{prefix}.{name}".lstrip(".")) for name, value in values.items()))


@pytest.mark.parametrize("job", JOBS)
def test_every_key_has_a_meaning(job: str) -> None:
    keys = reference.keys(job)
    assert [key.path for key in keys if not key.meaning.endswith((".", ")"))] == []
    assert len({key.path for key in keys}) == len(keys)


@pytest.mark.parametrize("job", JOBS)
def test_every_entry_of_a_docstring_is_a_key(job: str) -> None:
    """An entry that is left when its key goes would be lost in silence."""
    classes, seen = [job_config(job)], set()
    while classes:
        cls = classes.pop()
        seen.add(cls)
        hints = reference.typing.get_type_hints(cls, include_extras=True)
        sections = [section for hint in hints.values() if (section := reference._section(hint))]
        classes += [section for section in sections if section not in seen]
        text = inspect.cleandoc(cls.__doc__ or "").partition("Args:")[2]
        entries = {line.split(":")[0].strip() for line in text.splitlines() if reference.ENTRY.match(line)}
        assert entries <= reference.meanings(cls).keys(), cls


@pytest.mark.parametrize("job", JOBS)
def test_the_keys_are_those_that_a_run_resolves(job: str) -> None:
    known = {key.path for key in reference.keys(job)}
    assert {path for path in paths(asdict(job_config(job)())) if "options" not in path} <= known


def test_pages_and_schema_are_made_for_every_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert all(f"# Configuration of `task: {job}`" in configuration_page(job) for job in JOBS)
    assert main(["config", "--schema"]) == 0
    assert capsys.readouterr().out.strip() == reference.schema_text().strip()


@dataclass
class Inner:
    """A section.

    Args:
        rate: the rate,
            in two lines.
    """

    rate: float


@dataclass
class Outer(RunConfig):
    """A configuration.

    Args:
        items: sections.
        kind: one of two.
        near: a name.
        only: a known name.
        share: a share.
        counts: counts.
        title: another meaning than that of the base.
    """

    items: list[Inner] = field(default_factory=list)
    inner: Inner | None = None
    kind: Literal["a", "b"] = "a"
    near: Annotated[str, Names(("x", "y"))] = "x"
    only: Annotated[str, Names(("x", "y"), only=True)] = "x"
    share: Annotated[float, within(0, below=1)] = 0.0
    counts: list[Count] = field(default_factory=list)


def test_meanings_types_names_and_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "job_config", lambda job: Outer)
    keys = {key.path: key for key in reference.keys("any")}
    assert keys["items"].type == "list of section" and keys["inner"].type == "section or null"
    assert keys["items[].rate"] == reference.Key(
        "items[].rate", "float", "required", "the rate, in two lines.", [], False
    )
    assert keys["inner.rate"].meaning == keys["items[].rate"].meaning and keys["inner"].meaning == ""
    assert keys["kind"].names == ["a", "b"] and keys["near"].names == ["x", "y"] and keys["near"].default == '"x"'
    assert keys["share"].type == "float, at least 0 and below 1" and keys["counts"].type == "list of int, at least 1"
    schema = reference._reference(Outer, definitions := {}) and definitions["Outer"]["properties"]
    assert schema["near"]["examples"] == ["x", "y"] == schema["only"]["enum"]
    assert (schema["share"]["minimum"], schema["share"]["exclusiveMaximum"]) == (0, 1)
    assert schema["counts"]["items"]["minimum"] == 1
    assert keys["title"].meaning == "another meaning than that of the base." and keys["seed"].meaning


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_fit_the_schema(path: Path) -> None:
    checker = jsonschema.validators.validator_for(reference.schema())(reference.schema())
    assert not list(checker.iter_errors(yaml.safe_load(path.read_text(encoding="utf8"))))


@pytest.mark.parametrize(
    "values",
    [
        {"seeed": 1},
        {"task": "lm", "source": {}},
        {"train": {"steps": "many"}},
        {"evaluate": {"attacks": [{"nam": "pgd"}]}},
        {"task": "no job"},
        {"on_bad_sample": "ignore"},
        {"model": {"img_size": 3.5}},
        {"train": {"lr": 0}},
        {"train": {"optimizer": "adam"}},
        {"task": "dense", "augment": {"hue": 1}},
    ],
)
def test_what_the_reader_refuses_the_schema_refuses(values: dict, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError):
        load_config(tmp_path / "a.yaml", [])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, reference.schema())


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    assert set(JOBS) <= set(capsys.readouterr().out.split())
    assert main(["config", "lm", "train.lr"]) == 0
    out = capsys.readouterr().out
    assert (
        out.startswith("train.lr   float, above 0   default: 0.001\n    Peak learning rate")
        and "train.steps" not in out
    )
    assert main(["config", "fewshot", "evaluate"]) == 0
    out = capsys.readouterr().out
    assert "evaluate.attacks[].norm" in out and "known: linf, l2, l1" in out and "train.lr" not in out
    assert main(["config", "multitask"]) == 0
    out = capsys.readouterr().out
    assert "emtal" in out and "no key 'device'" in out and "OMP_NUM_THREADS" in out
    assert "no key 'train.lrr'. Near: 'train.lr'" in refused(capsys, "config", "lm", "train.lrr")
    assert "no key 'device'. A run takes the GPU" in refused(capsys, "config", "lm", "device")
    assert "'llm'" in refused(capsys, "config", "llm")


def test_an_unknown_key_without_a_near_one_lists_those_of_the_section(tmp_path: Path, capsys) -> None:
    path = tmp_path / "a.yaml"
    for text, words in (
        ("train: {qqqqqq: 1}", ["'train.qqqqqq'", "'accumulate'", "'weight_decay'"]),
        ("device: cuda", ["'device'", "CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU"]),
        ("threads: 4", ["'threads'", "OMP_NUM_THREADS"]),
    ):
        path.write_text(f"task: lm\n{text}")
        error = refused(capsys, "run", path, "--out", tmp_path / "runs")
        assert all(word in error for word in words)
    with pytest.raises(
        UserError, match=r"arms\.a: unknown key 'train\.qqqqqq'\. Known: 'accumulate', .*'weight_decay'"
    ):
        with_values(FewShotConfig(), {"train.qqqqqq": 1}, "arms.a")


def test_meanings_stand_without_docstrings() -> None:
    """`python -OO` drops docstrings: the meanings of keys and of jobs are read from the source."""
    code = "import sys, vismt.jobs.reference as r; print(sys.flags.optimize, *r.keys('multitask'), sep='\\n')"
    plain, stripped = (
        subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, check=True).stdout
        for flags in ([], ["-OO"])
    )
    assert stripped.splitlines() == ["2", *plain.splitlines()[1:]] and "Seed of start values" in stripped
