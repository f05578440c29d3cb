"""Damaged configurations of every job: one line, or a configuration that can be saved and read again."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from helpers.faults import cases, many, no_hang, refused_or_harmless
from helpers.yaml_mutations import damaged_texts, damaged_trees
from hypothesis import given
from hypothesis import strategies as st

from vismt.base.errors import UserError
from vismt.config.sections import config_hash, override
from vismt.config.yaml_text import parse_yaml
from vismt.jobs import load_config, make_job, started_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = [
    "quickstart.yaml",
    "metatune/amt_small.yaml",
    "multitask/emtal_small.yaml",
    "dense/quickstart.yaml",
    "lm/sentiment.yaml",
    "robustness/quickstart.yaml",
]


@cases(quick=14, campaign=170)
@pytest.mark.parametrize("name", SMALL)
def test_damaged_configurations(tmp_path: Path, name: str, cases: int) -> None:
    path, again = tmp_path / "damaged.yaml", tmp_path / "again.yaml"
    text = (CONFIGS / name).read_text(encoding="utf8")
    path.write_text(text, encoding="utf8")
    make_job(load_config(path, []), tmp_path)  # undamaged, and the job's module is loaded

    @many(cases)
    @given(st.one_of(damaged_trees(parse_yaml(text)).map(str.encode), damaged_texts(text)))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        with refused_or_harmless(data):
            config = load_config(path, [])
            again.write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf8")
            assert config_hash(load_config(again, [])) == config_hash(config), data
            make_job(config, tmp_path)

    check()
    assert [file.name for file in tmp_path.iterdir() if file not in (path, again)] == []  # no stub of a run folder


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("quickstart.yaml", "seed=18446744073709551616", "seed is 18446744073709551616; a whole number must fit 64 bits"),
        ("quickstart.yaml", "seed=-1", "seed is -1; it lies from 0 to 9223372036854775807"),
        ("quickstart.yaml", "seeds=[1, -2]", r"seeds\[1\] is -2"),
        ("quickstart.yaml", "evaluate.seed=1e30", "evaluate.seed: expected int"),
        ("quickstart.yaml", "source.scale=.inf", "source.scale is inf; a number must be finite"),
        ("quickstart.yaml", "source.scale=1e999", "source.scale is inf; a number must be finite"),
        ("quickstart.yaml", "source.scale=.nan", "source.scale is nan"),
        ("quickstart.yaml", "evaluate.episodes=1000000000000", "evaluate.episodes is .* it lies from 2 to 1000000"),
        ("quickstart.yaml", "evaluate.episodes=1", "evaluate.episodes is 1; it lies from 2"),
        ("quickstart.yaml", "adapt.options={null: 1}", "the key None is not text"),
        ("quickstart.yaml", "adapt.options={a: {1: 1, b: 2}}", "the key 1 is not text"),
        ("quickstart.yaml", "adapt.options.x=[[.nan]]", r"adapt.options.x\[0\]\[0\] is nan"),
        ("quickstart.yaml", "title=\"\\0\"", "null character"),
        ("fewshot/cross_domain.yaml", "arms={..: {}}", "'..' cannot be a name"),
        ("fewshot/cross_domain.yaml", "arms={a/b: {}}", "'a/b' cannot be a name"),
        ("multitask/emtal_small.yaml", "augment.jitter=.inf", "augment.jitter is inf"),
        ("multitask/emtal_small.yaml", "tasks=[{name: .., train: [digits], test_share: 0.5}]", "'..' cannot be a name"),
        ("multitask/emtal_small.yaml", "tasks=[{name: a/b, train: [digits], test_share: 0.5}]", "'a/b' cannot be a name"),
        ("multitask/emtal_small.yaml", "balancing={method: dwa, options: {window: x}}", "options.window: expected int"),
        ("lm/sentiment.yaml", "tasks=[{name: .., train: [sst2], kind: causal, test_share: 0.5}]", "'..' cannot be a name"),
        (
            "lm/sentiment.yaml",
            'tasks=[{name: a, train: [sst2], test_share: 0.5, kind: classes, prompt: x, options: {answers: {"1": [], "2": b}}}]',
            "tasks: a: options.answers.1: expected str",
        ),
        (
            "lm/sentiment.yaml",
            'tasks=[{name: a, train: [sst2], test_share: 0.5, kind: answers, prompt: x, options: {answers: {"1": []}}}]',
            "tasks: a: options.answers.1: expected str",
        ),
        ("lm/sentiment.yaml", "head.options={prior_scale: []}", "head: options.prior_scale: expected float"),
        ("dense/quickstart.yaml", "augment.strength=1e300", "augment.strength is 1e\\+300; it lies from 0 to 10"),
    ],
)  # fmt: skip
def test_edges_are_one_line(tmp_path: Path, name: str, change: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make_job(load_config(CONFIGS / name, [change]), tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("arms", ["{a+b: {}, a-b: {}}", "{adapted-ridge: {}, adapted: {}}"])
def test_models_whose_files_would_have_one_name_are_refused(tmp_path: Path, arms: str) -> None:
    path, changes = CONFIGS / "fewshot" / "cross_domain.yaml", [f"arms={arms}", "head.name=prototypes"]
    changes.append("evaluate.models=[frozen, adapted, adapted+ridge]")
    message = r"arms: '.*' and '.*' are both '.*' in names of files; rename one"
    with pytest.raises(UserError, match=message), started_config(load_config(path, changes), tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [1, 0, -14, 15])
def test_a_size_that_fits_no_patch(size: int) -> None:
    from vismt.backbones.timm_models import create

    with pytest.raises(UserError, match=f"img_size {size}"):
        create("vit_tiny_patch16_224", img_size=size)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "9" * 5000, "not readable as YAML: Exceeds the limit"),
        ("a: " + "[" * 3000, "not readable as YAML: maximum recursion depth"),
        ("a: &a [*a]", "unconstructable recursive node"),
        ("a: &a {b: *a}", "unconstructable recursive node"),
        ("a: !!python/object/apply:os.getcwd []", "the tag .* is not read"),
        ("a: !!set {b}", "the tag .* is not read"),
        ("seed: 1\ntitle: x\nseed: 1", "key 'seed' is given twice"),
        ("a: {b: 1, b: 2}", "key 'b' is given twice"),
        ("a: 0x_", "not readable as YAML"),
        ("? [a]\n: 1", "not readable as YAML"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_what_is_not_plain_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message), no_hang(text):
        load_config(path, [])


def test_what_aliases_and_dates_are_for_stays(tmp_path: Path) -> None:
    text = "base: &base {x: 1, y: 2024-01-01}\nmore: {<<: *base, x: 2}\nlist: [*base, *base]\n"
    assert parse_yaml(text) == {
        "base": {"x": 1, "y": "2024-01-01"},
        "more": {"x": 2, "y": "2024-01-01"},
        "list": [{"x": 1, "y": "2024-01-01"}] * 2,
    }
    # A mapping that is merged before it is read itself: its own key replaces that of the merged one.
    nested = parse_yaml("top: &top {one: 1}\nin: {deep: &deep {<<: *top, one: 2}}\nlast: {<<: *deep}\n")
    assert nested["in"]["deep"] == {"one": 2} == nested["last"]


def test_a_named_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.yaml")
    with pytest.raises(UserError, match="it is a named pipe, not a file"), no_hang("a pipe"):
        load_config(tmp_path / "x.yaml", [])


def test_overrides_are_read_as_strictly() -> None:
    with pytest.raises(UserError, match="key 'a' is given twice"):
        override({}, ["x={a: 1, a: 2}"])
    with pytest.raises(UserError, match="digits"):
        override({}, ["x=" + "1" * 5000])
