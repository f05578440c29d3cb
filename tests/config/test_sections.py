"""Configuration files: types, near names, overrides and the hash."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from vismt.base.errors import UserError
from vismt.config.sections import config_hash, fraction, override, read_config_file
from vismt.config.typed import build
from vismt.jobs import load_config, make_job
from vismt.jobs.fewshot.job import FewShotConfig
from vismt.jobs.multitask.config import MultitaskConfig


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text,words",
    [
        ("train: {stepz: 3}", ["unknown key 'train.stepz'", "'steps'"]),
        ("evaluate: {attacks: [{epsilom: 1}]}", ["'evaluate.attacks[0].epsilom'", "'epsilon'"]),
        ("train: {steps: many}", ["train.steps", "expected int", "many"]),
        ("train: {lr: [1]}", ["train.lr", "expected float"]),
        ("train: 3", ["train is 3, not a section"]),
        ("model: {img_size: 3.5}", ["model.img_size", "expected int", "3.5"]),
        ("model: {name: null}", ["model.name is null"]),
        ("evaluate: null", ["evaluate is null"]),
        ("task: fewshots", ["'fewshots'", "'fewshot'"]),
        ("- a", ["holds list"]),
        ("a: [", ["not readable as YAML"]),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_key(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, text), [])
    message = str(error.value)
    assert all(word in message for word in [*words, "mine.yaml"]) and "\n" not in message, message


def test_missing_file_names_the_near_one(tmp_path: Path) -> None:
    write(tmp_path, "seed: 1")
    with pytest.raises(UserError, match=r"no file .*mime\.yaml'.*Near: .*mine\.yaml"):
        load_config(tmp_path / "mime.yaml", [])


def test_overrides_reach_any_depth_and_are_typed(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {steps: 3}\nevaluate: {data: [a]}")
    config = load_config(
        path, ["train.lr=1e-3", "train.steps=5", "evaluate.data=[b, 'c:test']", "adapt.options.split_qkv=true"]
    )
    assert (config.train.lr, config.train.steps) == (1e-3, 5)
    assert config.evaluate.data == ["b", "c:test"] and config.adapt.options == {"split_qkv": True}
    assert load_config(path, ["adapt=null"]).adapt is None
    for wrong, match in (
        ("train.steps", "write key=value"),
        ("train.steps.x=1", "'train.steps' is a value"),
        ("seed=[", "not YAML"),
    ):
        with pytest.raises(UserError, match=match):
            override(read_config_file(path), [wrong])


def test_overrides_reach_items_of_a_list_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, "tasks: [{name: a, options: &shared {x: 1}}, {name: b, options: *shared}]")
    raw = read_config_file(path)
    assert override(raw, ["tasks.b.options.x=2", "tasks.a.limit=5"])["tasks"] == [
        {"name": "a", "options": {"x": 1}, "limit": 5},
        {"name": "b", "options": {"x": 2}},
    ]
    assert raw == read_config_file(path)
    with pytest.raises(UserError, match=r"'tasks\.bb': name one of a, b, and its option. Near: 'b'"):
        override(raw, ["tasks.bb.limit=2"])


def test_resolved_round_trips_and_the_hash_moves_with_values_only(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "seed: 4\nevaluate: {attacks: [{epsilon: 8/255}]}"), [])
    again = build(FewShotConfig, asdict(config), "x")
    assert again == config and config_hash(again) == config_hash(config)
    assert config_hash(load_config(write(tmp_path, "seed: 5"), [])) != config_hash(
        load_config(write(tmp_path, "seed: 4"), [])
    )
    assert config_hash(load_config(write(tmp_path, "title: a"), [])) == config_hash(
        load_config(write(tmp_path, "title: b"), [])
    )
    changes = ([], ["train.checkpointing=true"], ["train.steps=3"])
    plain, memory, steps = (config_hash(load_config(write(tmp_path, "seed: 4"), change)) for change in changes)
    assert plain == memory != steps  # activations that are computed again change no result
    tasks = [[{"name": "semseg", "classes": 3, **change}] for change in ({}, {"absent": "skip"}, {"dice": 1.0})]
    plain, absent, dice = (config_hash(build(MultitaskConfig, {"tasks": task}, "x")) for task in tasks)
    assert plain == absent != dice  # how a score is read changes no training


def test_no_is_a_word(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {precision: no}\nsource: {augment: false}")
    config = load_config(path, [])
    assert config.train.precision == "no" and config.source.augment is False
    assert load_config(path, ["train.precision=no", "source.augment=True"]).source.augment is True


def test_fractions() -> None:
    assert fraction("4.5/255", "e") == 4.5 / 255 and fraction("0.25", "e") == 0.25 and fraction(2, "e") == 2.0
    for wrong in ("a/b", "1/0", "1/2/3", "", "1e400/255", "nan"):
        with pytest.raises(UserError, match="e: "):
            fraction(wrong, "e")


CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path: Path, tmp_path: Path) -> None:
    config = load_config(path, [])
    assert make_job(config, tmp_path).config is config  # the job checks what types cannot express


def test_what_is_read_twice_is_not_shared() -> None:
    raw = {"adapt": {"options": {"temperature": 2.0}}}
    first, second = (build(FewShotConfig, raw, "x") for _ in range(2))
    first.adapt.options["temperature"] = first.train.lr = 9.0
    assert second.adapt.options == {"temperature": 2.0} and build(FewShotConfig, raw, "x") == second
