"""Heads on few-shot models, ways of single sets, and backbones as arms of a run that trains nothing, on a tiny ViT."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.results import scores_of
from helpers.tiny_runs import SHORT, refused, written

from vismt.backbones.assets import list_assets, load_asset_card
from vismt.base.errors import UserError
from vismt.cli import main
from vismt.config.typed import build
from vismt.jobs import load_config, open_run
from vismt.jobs.fewshot.arms import evaluated_models, split_head, untrained_arms
from vismt.jobs.fewshot.config import FewShotConfig
from vismt.jobs.fewshot.config_checks import check
from vismt.jobs.fewshot.data import FewShotData
from vismt.jobs.fewshot.job import FewShotJob
from vismt.storage.lines import read_lines
from vismt.storage.paths import shipped

MODEL = {**SHORT, "block": 0}
SMALL: dict[str, Any] = {
    "model": MODEL,
    "adapt": {"method": "lora", "rank": 2},
    "source": {"data": ["photo_crops:train"], "ways": 3, "shots": 1, "queries": 2, "augment": False},
    "train": {"steps": 2, "lr": 1e-3},
    "evaluate": {
        "data": ["digits", "photo_crops:test"],
        "ways": 4,
        "ways_of": {"photo_crops:test": 2},
        "shots": [2],
        "queries": 2,
        "episodes": 3,
        "attacks": [{"name": "pgd", "steps": 1}],
    },
}
QUALITY = ("ECE-15", "NLL in nats", "Brier")
ARMS = {
    "small": {"model": SHORT},
    "wide": {"model.name": "test_vit2", "model.img_size": 64, "model.block": None},
    "gone": {"model": {"name": "vit_tiny_patch16_224.augreg_in21k", "img_size": 32}},
    "hidden": {"model": {"name": "test_vit3.r160_in1k", "img_size": 32}},
}


def run(folder: Path, **changes: Any) -> Path:
    path = written(folder / "heads.yaml", merged(changes))
    assert main(["run", str(path), "--out", str(folder / "runs")]) == 0
    return next((folder / "runs").iterdir())


def merged(changes: dict[str, Any]) -> dict[str, Any]:
    raw = copy.deepcopy(SMALL)
    for name, values in changes.items():
        raw[name] = {**raw[name], **values} if isinstance(values, dict) and name in raw else values
    return raw


def configuration(**changes: Any) -> FewShotConfig:
    return build(FewShotConfig, merged(changes), "heads.yaml")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], None]:
    """A hub that does not answer; call it to let the hub answer with random weights."""
    create = timm.create_model
    answers = []

    def asked(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        if pretrained and not answers:
            raise OSError("the hub cannot be reached")
        return create(name, pretrained=False, **options)

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(timm, "create_model", asked)
    return lambda: answers.append(True)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("frozen", ("frozen", "")),
        ("frozen+ridge", ("frozen", "ridge")),
        ("expert:0.5-4+logistic", ("expert:0.5-4", "logistic")),
        ("lora+qr", ("lora+qr", "")),
        ("lora+qr+finetune", ("lora+qr", "finetune")),
    ],
)
def test_a_head_is_the_last_part_of_a_name(name: str, parts: tuple[str, str]) -> None:
    assert split_head(name) == parts


@pytest.mark.slow
def test_heads_of_frozen_and_adapted_models_over_two_seeds(tmp_path: Path) -> None:
    models = ["frozen", "frozen+ridge", "frozen+logistic", "adapted", "adapted+ridge", "adapted+finetune"]
    folder = run(tmp_path, evaluate={"models": models}, finetune={"lr": "auto", "steps": 1}, seeds=[0, 1])
    rows = scores_of(folder)
    means = [row for row in rows if row["seed"] is None]
    assert {row["arm"] for row in means} == set(models) and len(means) == 6 * 2 * 2
    # A frozen backbone has no training seeds, whatever its head.
    assert {row["arm"] for row in rows if row["seed"] == 1} == {"adapted", "adapted+ridge", "adapted+finetune"}
    protocols = {(row["data"], row["protocol"], row["chance"]) for row in rows}
    assert protocols == {("digits", "4-way 2-shot", 0.25), ("photo_crops-test", "2-way 2-shot", 0.5)}
    # The heads differ: three fingerprints on one backbone.
    built = open_run(folder).job.models(0)
    prints = [built.fingerprint(name).split("-") for name in models[:3]]
    assert len({backbone for backbone, _ in prints}) == 1 and len({head for _, head in prints}) == 3
    report = (folder / "report.md").read_text()
    assert "4-way 2-shot" in report and "2-way 2-shot" in report and "frozen+ridge" in report.replace("\\", "")


def test_the_quality_of_probabilities_is_reported_and_the_same_when_resumed(tmp_path: Path) -> None:
    models = [f"frozen{head}" for head in ("", "+ridge", "+logistic", "+vbll", "+finetune")]
    settings = {"models": models, "data": ["digits"], "ways_of": {}, "probabilities": True, "attacks": []}
    folder = run(tmp_path, adapt=None, train=None, finetune={"steps": 1}, evaluate=settings)
    rows = read_lines(folder / "results.jsonl")
    quality = {(row["arm"], row["metric"]): row for row in rows if row["metric"] != "accuracy"}
    assert set(quality) == {(arm, metric) for arm in models for metric in QUALITY} and len(rows) == 5 * (1 + 3)
    for row in quality.values():
        assert (row["condition"], row["better"], row["unit"], row["n"]) == ("clean", "lower", "episodes", 3)
        assert (
            row["low"] <= row["value"] <= row["high"] or row["metric"] == "ECE-15"
        )  # whose bias the interval leaves out
    assert len({row["value"] for row in quality.values()}) == len(quality)  # every head has a scale of its own
    report = (folder / "report.md").read_text()
    assert all(metric in report for metric in QUALITY)
    # Stopped within the episodes of two models, and evaluated again.
    before = (folder / "results.jsonl").read_bytes()
    (folder / "results.jsonl").unlink()
    for path in sorted((folder / "episodes").rglob("*.jsonl"))[:2]:
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    assert main(["evaluate", str(folder)]) == 0 and (folder / "results.jsonl").read_bytes() == before


@pytest.mark.slow
def test_heads_of_a_pool(tmp_path: Path) -> None:
    models = ["merged", "merged:min_ce", "merged+ridge", "expert:4+logistic", "logits"]
    pool = {"levels": [0.5, 4], "warmup": 1}
    settings = {"models": models, "data": ["digits"], "ways_of": {}, "probabilities": True}
    folder = run(tmp_path, adapt={"method": "amt"}, pool=pool, evaluate=settings)
    rows = read_lines(folder / "results.jsonl")
    for metric in ("accuracy", *QUALITY):
        assert [row["arm"] for row in rows if (row["condition"], row["metric"]) == ("clean", metric)] == models
    assert "Pool mixture" in (folder / "report.md").read_text()


@pytest.mark.slow
def test_backbones_as_arms_and_those_out_of_reach_left_out(tmp_path: Path, offline, capsys) -> None:
    models = ["frozen", "frozen+ridge", "frozen+logistic"]
    settings = {"models": models, "data": ["digits"], "ways": 3, "ways_of": {}}
    folder = run(tmp_path, adapt=None, train=None, arms=ARMS, evaluate=settings)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("skip")]
    assert len(lines) == 2 and "gone   left out: asset 'vit_tiny" in lines[0]
    assert "hidden   left out: the weights of 'test_vit3.r160_in1k' could not be downloaded" in lines[1]
    rows = scores_of(folder)
    evaluated = [row["arm"] for row in rows if (row["data"], row["condition"]) == ("digits", "clean")]
    assert evaluated == [f"{arm}{head}" for arm in ("small", "wide") for head in ("", "+ridge", "+logistic")]
    assert len({row["value"] for row in rows}) > 3
    facts = json.loads((folder / "run.json").read_text())
    assert set(facts["skipped"]) == {"gone", "hidden"}
    report = (folder / "report.md").read_text().replace("\\", "")
    assert "Arms left out" in report and "| hidden | test_vit3.r160_in1k |" in report
    offline()  # from now on the hub answers
    assert main(["evaluate", str(folder)]) == 0
    arms = {row["arm"] for row in read_lines(folder / "results.jsonl")}
    assert {"hidden", "hidden+ridge", "small"} <= arms and "gone" not in arms
    assert set(json.loads((folder / "run.json").read_text())["skipped"]) == {"gone"}


def test_a_run_without_any_backbone_is_an_error(tmp_path: Path, offline, capsys) -> None:
    arms = {"hidden": ARMS["hidden"]}
    config = merged({"adapt": None, "train": None, "arms": arms, "evaluate": {"models": ["frozen"]}})
    error = refused(capsys, "run", written(tmp_path / "heads.yaml", config), "--out", tmp_path / "runs")
    assert "the weights of no arm can be had: the weights of 'test_vit3" in error


def test_an_unknown_backbone_of_an_arm_is_named_before_anything_is_evaluated(tmp_path: Path, offline, capsys) -> None:
    arms = {"small": ARMS["small"], "odd": {"model.name": "tset_vit"}}
    config = merged({"adapt": None, "train": None, "arms": arms, "evaluate": {"models": ["frozen"]}})
    assert main(["run", str(written(tmp_path / "heads.yaml", config)), "--out", str(tmp_path / "runs")]) == 2
    output = capsys.readouterr()
    assert "arms.odd: backbone 'tset_vit'" in output.err and "eval" not in output.out


def test_an_arm_that_cannot_be_merged_is_refused_before_the_first_step(tmp_path: Path, capsys) -> None:
    router = {"n_experts": 4, "cluster": False}
    arms = {"lora": {}, "moe": {"adapt.method": "emtal", "adapt.options": router}}
    path = written(tmp_path / "heads.yaml", merged({"arms": arms}))
    error = refused(capsys, "run", path, "--out", tmp_path / "runs")
    assert "arms.moe: adapt: the router of" in error and "a router takes adapt.options.fade: 1." in error
    assert not list(tmp_path.glob("runs/*/arms/*"))
    faded = {"moe": {"adapt.method": "emtal", "adapt.options": {**router, "fade": 1.0}}}
    FewShotJob(configuration(arms=faded), tmp_path, "hash").check_training()


def test_an_arm_that_cannot_be_evaluated_does_not_stop_the_others(tmp_path: Path, capsys) -> None:
    arms = {name: {"adapt.rank": rank} for name, rank in (("a", 1), ("b", 2))}
    settings = {"data": ["digits"], "ways_of": {}, "attacks": []}
    path = written(tmp_path / "heads.yaml", merged({"arms": arms, "evaluate": settings}))
    assert main(["train", str(path), "--out", str(tmp_path / "runs")]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    kept = [(path, path.read_bytes()) for path in folder.glob("arms/a/**/adapter.json")]
    (damaged,) = [path for path, _ in kept]
    damaged.write_text("{}")
    assert main(["evaluate", str(folder)]) == 2
    output = capsys.readouterr()
    assert "a   left out: " in output.out and "evaluate: 'a' left out: " in output.err and "Traceback" not in output.err
    assert {row["arm"] for row in read_lines(folder / "results.jsonl")} == {"frozen", "b"}
    assert main(["report", str(folder)]) == 0
    damaged.write_bytes(kept[0][1])
    assert main(["evaluate", str(folder)]) == 0
    assert {row["arm"] for row in read_lines(folder / "results.jsonl")} == {"frozen", "a", "b"}


def test_episodes_do_not_depend_on_the_image_size() -> None:
    config = configuration(adapt=None, train=None, arms={"wide": ARMS["wide"]}, evaluate={"models": ["frozen"]})
    data = FewShotData(config)
    other = data.variant(untrained_arms(config)["wide"])
    first, second = (sets.samplers("digits")[0] for sets in (data, other))
    assert (data.open("digits").size, other.open("digits").size) == (32, 64)
    assert first.describe() == second.describe() and torch.equal(first[2].query, second[2].query)
    assert other.open("digits") is data._pixels["digits", 64]


def test_only_models_of_the_arms_are_evaluated_where_nothing_is_trained() -> None:
    models = ["frozen", "adapted", "frozen+ridge", "wide+logistic"]
    config = configuration(train=None, arms={"small": {}, "wide": {}}, evaluate={"models": models})
    check(config)
    check(replace(config, evaluate=replace(config.evaluate, models=["wide+logistic"])))
    assert evaluated_models(config, []) == ["small", "small+ridge", "wide", "wide+ridge", "wide+logistic"]


def test_an_attack_is_evaluated_on_every_arm(tmp_path: Path) -> None:
    arms = {name: ARMS[name] for name in ("small", "wide")}
    folder = run(
        tmp_path, adapt=None, train=None, arms=arms, evaluate={"models": ["frozen"], "data": ["digits"], "ways_of": {}}
    )
    assert main(["attack", str(folder), "--attack", "fgsm", "--quiet"]) == 0
    rows = read_lines(folder / "results.jsonl")
    assert {row["arm"] for row in rows if "FGSM" in row["condition"]} == {"small", "wide"}
    with pytest.raises(UserError, match="trains nothing"):
        open_run(folder).job.merged("small")


def test_the_foundation_table_has_every_vision_asset_and_four_families_of_the_hub() -> None:
    config = load_config(shipped("configs") / "fewshot" / "foundation.yaml", [])
    assert isinstance(config, FewShotConfig)
    check(config)
    models = [arm.model for arm in untrained_arms(config).values()]
    names = {model.name for model in models}
    assert names >= {name for name in list_assets() if load_asset_card(name).kind == "vit"}
    for family in ("dinov2", "dinov3", "clip", "siglip"):
        assert any(family in name for name in names)
    assert names - set(list_assets()) <= set(timm.list_pretrained())
    # A set opens without a backbone where its image size is given.
    assert all(model.img_size is not None for model in models)
    other = load_config(shipped("configs") / "metatune" / "amt_small.yaml", [])
    assert isinstance(other, FewShotConfig) and {*other.evaluate.data} < {*config.evaluate.data}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluate": {"models": ["frozen+rigde"]}}, "evaluate.models: 'frozen+rigde'"),
        ({"evaluate": {"models": ["frozen+ridge+ridge"]}}, "'frozen+ridge+ridge'"),
        ({"pool": {}, "evaluate": {"models": ["logits+ridge"]}}, "no weights to tune"),
        (
            {"meta": {"algorithm": "maml"}, "evaluate": {"models": ["adapted+ridge"], "ways": 3, "ways_of": {}}},
            "the classifier of an inner loop has no prototypes; take 'adapted'",
        ),
        ({"evaluate": {"ways_of": {"digit": 3}}}, "evaluate.ways_of: 'digit' is not evaluated. Near: 'digits'"),
        ({"evaluate": {"ways_of": {"digits": 1}}}, "evaluate.ways_of.digits is 1; it must be at least 2"),
        ({"evaluate": {"rule": "variable"}}, "evaluate.ways_of: needs evaluate.rule uniform"),
        (
            {"evaluate": {"ways": 5, "ways_of": {"digits": 3}, "attacks": [{"name": "apgd_t"}]}},
            "needs 4 classes, here are 3",
        ),
        ({"arms": {"a": {"model.block": 1}}}, "arms.a: model.block must be the same for all arms"),
        ({"arms": {"a": {"on_bad_sample": "skip"}}}, "arms.a: on_bad_sample must be the same for all arms"),
        ({"arms": {"a+ridge": {}}}, "arms: 'a+ridge' reads as a head on 'a'"),
        (
            {"train": None, "arms": {"a": {"adapt.rank": 1}}, "evaluate": {"models": ["frozen"]}},
            "arms.a: adapt.rank: this run trains nothing, so its arms differ in `model` alone",
        ),
        (
            {"train": None, "arms": {"a": {"model.blok": 1}}, "evaluate": {"models": ["frozen"]}},
            "arms.a: unknown key 'model.blok'. Near: 'block'",
        ),
        (
            {"train": None, "arms": {"a": {}}, "evaluate": {"models": ["frozen"], "attacks": [{"source": "a"}]}},
            "'a' needs a training, and this configuration trains nothing; take 'frozen'",
        ),
    ],
)
def test_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        check(configuration(**changes))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_set_with_too_few_classes_names_the_key(tmp_path: Path, capsys) -> None:
    config = merged({"adapt": None, "train": None, "evaluate": {"ways": 11, "ways_of": {}}})
    error = refused(capsys, "run", written(tmp_path / "heads.yaml", config), "--out", tmp_path / "runs", "--quiet")
    assert (
        "evaluate.ways: 'digits' has 10 classes, too few for 11-way episodes" in error
        and "evaluate.ways_of: {digits: 10}" in error
    )


def test_the_choice_of_settings_uses_the_ways_of_its_sets(tmp_path: Path) -> None:
    select = {"data": ["photo_crops:test"], "episodes": 2, "shots": 1, "queries": 2}
    attack = {"name": "pgd", "steps": 1}
    folder = run(
        tmp_path,
        adapt={"method": "amt"},
        pool={"levels": [0.5, 4], "warmup": 1},
        select={**select, "attack": attack},
        evaluate={"models": ["merged"], "data": ["digits"]},
    )
    sampler = open_run(folder).job.data.validation_sampler("photo_crops:test")
    assert sampler.ways == 2 and str(sampler) == "2-way 1-shot"
    job = open_run(folder).job
    job.config.evaluate.ways_of = {"photo_crops:test": 30}
    with pytest.raises(
        UserError, match=r"'photo_crops:test' has 18 classes, too few for 30-way .* evaluate.ways_of: {photo"
    ):
        job.data.validation_sampler("photo_crops:test")


def test_a_head_alone_can_be_evaluated_and_the_size_of_images_is_asked_for_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = configuration(train=None, model={"img_size": None}, evaluate={"models": ["frozen+ridge"]})
    check(config)
    assert evaluated_models(config, []) == ["frozen+ridge"]
    data, made, backbone = FewShotData(config), [], FewShotData.backbone
    monkeypatch.setattr(FewShotData, "backbone", lambda self: made.append(1) or backbone(self))
    assert data.open("digits") is data.open("digits") and data.open("digits").size == 64 and made == [1]


def test_a_head_of_the_configuration_is_that_of_every_model_without_one(tmp_path: Path) -> None:
    changes = {"head": {"name": "vbll", "options": {"prior_scale": 4.0}}, "train": None, "adapt": None}
    config = build(FewShotConfig, merged({**changes, "evaluate": {"models": ["frozen", "frozen+ridge"]}}), "heads")
    assert evaluated_models(config, []) == ["frozen+vbll", "frozen+ridge"]
    evaluate = {"models": ["frozen"], "data": ["digits"], "ways_of": {}}
    folder = run(tmp_path, **changes, evaluate=evaluate)
    rows = scores_of(folder)
    assert {row["arm"] for row in rows} == {"frozen+vbll"} and len(rows) == 2
    for head, text in (
        ({"name": "vbl"}, "vbll"),
        ({"name": "ridge", "options": {"a": 1}}, "'ridge' has no options"),
        ({"name": "vbll", "options": {"prior": 1.0}}, "prior_scale"),
    ):
        with pytest.raises(UserError, match=text):
            check(build(FewShotConfig, merged({"head": head}), "heads"))


def test_an_arm_chooses_its_rate_under_its_own_attack_or_without_one(tmp_path: Path) -> None:
    folder = run(
        tmp_path,
        select={"data": ["photo_crops:test"], "episodes": 2, "shots": 1, "queries": 2, "attack": {"name": "fgsm"}},
        tune={"rates": [1e-3, 1e-2]},
        arms={"clean": {"select.attack": None}, "attacked": {}},
        evaluate={"models": ["adapted"], "data": ["digits"]},
    )
    for arm, conditions in (("clean", ["clean"]), ("attacked", ["clean", "FGSM linf 4.5/255"])):
        records = list(folder.glob(f"arms/{arm}/*/records/validation-*.jsonl"))
        assert len(records) == 2
        assert all(read_lines(record)[0]["settings"]["conditions"] == conditions for record in records), arm
    with pytest.raises(UserError, match=r"arms\.a: select\.episodes must be the same.*select\.attack"):
        check(configuration(arms={"a": {"select.episodes": 3}}))
