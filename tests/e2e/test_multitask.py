"""The multi-task job from configuration to report: arms, rates, seeds, exact merge, resume, and every user error."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from helpers.checkpoints import saved_tensors
from helpers.tiny_runs import SHORT, VIT, interrupted, refused, run_config, run_on_two, written

from vismt.base.errors import Diverged, UserError
from vismt.cli import main
from vismt.engine.optimizer import make_optimizer
from vismt.engine.study import Study
from vismt.evaluation.adjust_logits import ADJUSTED, TAUS
from vismt.evaluation.temperature import TEMPERED
from vismt.jobs import load_config, make_job, open_run
from vismt.multitask.class_loss import adjusted
from vismt.report.comparison import CONSTANT
from vismt.report.results import EXAMPLE, GROUP, RECORDS, Result, read_results
from vismt.storage.files import read_sealed, sealed
from vismt.storage.lines import read_lines
from vismt.uncertainty.temperature import fit_block_temperatures

TASKS = [
    {"name": "digits", "train": ["digits"], "test_share": 0.05, "validation_share": 0.03, "limit": 40},
    {
        "name": "photos",
        "train": ["photo_crops:train"],
        "validation_share": 0.1,
        "test": ["photo_crops:test"],
        "limit": 36,
    },
]
SMALL = {
    "task": "multitask",
    "model": SHORT,
    "adapt": {"method": "emtal", "rank": 2, "options": {"n_experts": 4, "cluster": False}},
    "fade": {"start": 0.0, "end": 0.5},
    "retain": {},
    "tasks": TASKS,
    "batch": 16,
    "arms": {
        "head": {"adapt": None, "fade": None, "retain": None},
        "lora": {"adapt.method": "lora", "adapt.options": {}, "fade": None},
        "emtal": {},
    },
    "seeds": [0, 1],
    "tune": {"rates": [3.0e-3, 1.0e-2]},
    "train": {"steps": 4, "weight_decay": 0.05, "checkpoint_every": 2},
    "evaluate": {"batch": 64, "temperature": True, "adjust_logits": True},
}


def write(folder: Path, **changes: object) -> Path:
    return written(folder / "tasks.yaml", {**SMALL, **changes})


def accuracies(path: Path, config_hash: str | None = None) -> list[Result]:
    """Return the rows of accuracy but for those of an adjusted prior and of the constant answer."""
    rows = [row for row in read_results(path, config_hash) if row.metric == "accuracy"]
    return [row for row in rows if row.condition != ADJUSTED.label and row.arm != CONSTANT]


def over_seeds(results: list[Result]) -> list[Result]:
    """Return the rows of arms, each the mean over the arm's trainings."""
    return [row for row in results if row.seed is None]


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("multitask")
    return run_config(write(folder))


def test_every_arm_has_its_rate_its_seeds_and_its_rows(study: Path) -> None:
    for arm in ("head", "lora", "emtal"):
        chosen = json.loads((study / "arms" / arm / "chosen.json").read_text())
        assert set(chosen["validation"]) == {"0.003", "0.01"} and chosen["lr"] in (3e-3, 1e-2)
        assert chosen["validation"][f"{chosen['lr']:g}"] == max(chosen["validation"].values())
        trained = {path.name for path in (study / "arms" / arm).iterdir() if path.is_dir()}
        assert trained == {"lr-0.003-seed-0", "lr-0.01-seed-0", f"lr-{chosen['lr']:g}-seed-1"}
    results = accuracies(study / "results.jsonl", open_run(study).hash)
    rows = over_seeds(results)
    assert [(row.arm, row.data) for row in rows] == [
        (arm, task) for arm in ("head", "lora", "emtal") for task in ("digits", "photos")
    ]
    assert {(row.task, row.protocol, row.split) for row in results} == {
        ("classification", "test images, one of 28 classes", "test")
    }
    for row in rows:
        by_seed = {other.seed: other.value for other in results if (other.arm, other.data) == (row.arm, row.data)}
        assert set(by_seed) == {None, 0, 1}
        assert row.value == pytest.approx((by_seed[0] + by_seed[1]) / 2)
    report = (study / "report.md").read_text()
    for title in ("average", "By seed", "Differences", "Merging", "Choice of the rate"):
        assert title in report
    # Two arms may have the same peak memory, and then have no figure of it.
    assert {path.stem for path in (study / "figures").glob("*.svg")} - {"cost-2"} == {
        *(f"scores-classification-{metric}" for metric in ("accuracy", "ECE-15", "NLL-in-nats", "Brier")),
        "seeds",
        "training",
        "depth",
        "examples",
        "routers-emtal",
        "rates",
        "cost-0",
        "cost-1",
        *(f"confusion-digits-{number}" for number in range(3)),
    }
    assert all(f"\n| {arm} | " in report for arm in ("head", "lora", "emtal"))  # the legend of the models


def test_the_constant_answer_is_the_class_that_training_has_most(study: Path) -> None:
    data, rows = open_run(study).job.data, read_results(study / "results.jsonl")
    found = {(row.data, row.protocol): (row.value, row.n) for row in rows if row.arm == CONSTANT}
    for number, task in enumerate(("digits", "photos")):
        labels, tested = data.training([task]).labels.tolist(), data.part(number, "test").labels.tolist()
        most = max(sorted({*labels}), key=labels.count)
        right = found.pop((task, "test images, one of 28 classes"))
        assert right == (pytest.approx(tested.count(most) / len(tested)), len(tested))
    assert not found and "\n| constant | " in (study / "report.md").read_text()


def test_the_paired_table_is_what_the_records_say(study: Path) -> None:
    results = accuracies(study / "results.jsonl")
    value = {(row.arm, row.data, row.seed): row.value for row in results}
    for arm in ("head", "emtal"):
        lr = json.loads((study / "arms" / arm / "chosen.json").read_text())["lr"]
        for task in ("digits", "photos"):
            by_seed = []
            for seed in (0, 1):
                path = study / "arms" / arm / f"lr-{lr:g}-seed-{seed}" / "records" / f"test-{task}.jsonl"
                lines = [line for line in read_lines(path) if "id" in line]
                by_seed.append({line["id"]: line["clean"] == line["label"] for line in lines})
                assert value[arm, task, seed] == pytest.approx(sum(by_seed[seed].values()) / len(lines))
            row = next(row for row in over_seeds(results) if (row.arm, row.data) == (arm, task))
            records = read_lines(study / RECORDS / f"{row.stem}.jsonl")
            assert {line[EXAMPLE]: line["clean"] for line in records} == {
                name: (by_seed[0][name] + by_seed[1][name]) / 2 for name in by_seed[0]
            }
    means = {
        (arm, seed): (value[arm, "digits", seed] + value[arm, "photos", seed]) / 2
        for arm in ("head", "emtal")
        for seed in (0, 1)
    }
    difference = 50 * sum(means["emtal", seed] - means["head", seed] for seed in (0, 1))
    shown = f"{difference:+.1f}".replace("-", "−")
    report = (study / "report.md").read_text()
    assert "### Difference to head: " in report and f"\n| average | clean | emtal | {shown} " in report


def test_every_arm_and_task_has_the_quality_of_its_probabilities(study: Path) -> None:
    rows = read_results(study / "results.jsonl")
    job = open_run(study).job
    for training in job.study.trainings("lora"):
        fitted = read_sealed(training.folder / "records" / "temperature.json", "temperature")
        net, temperatures = job.loaded(training), fitted["temperature"]
        with torch.no_grad():
            parts = [job.data.part(task, "validation") for task in (0, 1)]
            outputs = [(net(part[torch.arange(len(part))]), part.labels) for part in parts]
        logits, labels = (torch.cat(values) for values in zip(*outputs))
        # A temperature for the answers of each task, from the validation images; the tau is the best of its grid.
        blocks = job.data.union.task_of_class()
        assert temperatures == pytest.approx(fit_block_temperatures(logits, labels, blocks), rel=1e-4)
        assert len(set(temperatures)) == 2
        assert fitted["n"] == len(labels)
        tau = read_sealed(training.folder / "records" / "adjust_logits.json", "tau")["tau"]
        rights = {
            other: sum(
                float((adjusted(z, job.data.class_counts(), other).argmax(1) == y).double().mean()) for z, y in outputs
            )
            for other in TAUS
        }
        assert rights[tau] == max(rights.values())
        part = job.data.part(1, "test")
        with torch.no_grad():
            test = net(part[torch.arange(len(part))])
        known = {
            (row.condition, row.metric): row.value
            for row in rows
            if (row.arm, row.data, row.seed) == ("lora", "photos", training.seed)
        }
        wanted = float(F.cross_entropy(test, part.labels))
        divisors = torch.tensor(temperatures)[blocks[test.argmax(1)]]
        assert known["clean", "NLL in nats"] == pytest.approx(wanted, rel=1e-4)
        assert known[TEMPERED.label, "NLL in nats"] == pytest.approx(
            float(F.cross_entropy(test / divisors[:, None], part.labels)), rel=1e-4
        )
        shifted = adjusted(test, job.data.class_counts(), tau).argmax(1) == part.labels
        assert known[ADJUSTED.label, "accuracy"] == pytest.approx(float(shifted.double().mean()))
        assert (TEMPERED.label, "accuracy") not in known and 0 <= known["clean", "ECE-15"] <= 1
    assert {row.metric for row in rows} == {"accuracy", "ECE-15", "NLL in nats", "Brier"}
    assert TEMPERED.label in (study / "report.md").read_text()


def test_arms_of_a_seed_start_alike_and_see_the_same_batches(study: Path) -> None:
    job = open_run(study).job
    weights = [job.fresh(job.config).stock.head.weight]
    for arm in ("head", "emtal"):
        config = job.study.config_of(job.study.training(arm, 1e-3, 0))
        weights.append(job.fresh(config).stock.head.weight)
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])
    head, emtal, other_seed = (
        job.batches(job.study.config_of(job.study.training(arm, lr, seed)))(1)
        for arm, lr, seed in (("head", 1e-3, 0), ("emtal", 1e-2, 0), ("head", 1e-3, 1))
    )
    assert torch.equal(head["images"], emtal["images"]) and torch.equal(head["labels"], emtal["labels"])
    assert not torch.equal(head["labels"], other_seed["labels"])
    # Both tasks, digits and photographs, are in one batch.
    assert int(head["labels"].min()) < 10 <= int(head["labels"].max())


def test_parts_do_not_share_an_image(study: Path) -> None:
    data = open_run(study).job.data
    train = set(data.training().ids)
    for task in (0, 1):
        test, validation = (set(data.part(task, part).ids) for part in ("test", "validation"))
        # Ids of the two photo splits may be numbered alike; the split distinguishes their images.
        if task == 0:
            assert not train & test and not test & validation
        assert not train & validation and test and validation
    assert len(train) == 40 + 36


def test_merged_answers_are_the_faded_models(study: Path) -> None:
    for arm in ("lora", "emtal"):
        for folder in (study / "arms" / arm).glob("lr-*-seed-1"):
            check = json.loads((folder / "merge.json").read_text())
            assert check["different_predictions"] == 0 and check["n"] > 100
            assert check["largest_difference"] < 1e-5 * check["largest_logit"]
    assert not list((study / "arms" / "head").rglob("merge.json"))


def test_an_export_does_not_overwrite_another(study: Path, tmp_path: Path, capsys) -> None:
    for arm in ("lora:0", "lora:1"):
        assert main(["export", str(study), "--format", "peft", "--arm", arm, "--quiet"]) == 0
        assert (study / f"export-peft-lora-seed-{arm[-1]}" / "adapter_model.safetensors").exists()
    command = ["export", str(study), "--to", str(tmp_path / "one"), "--quiet", "--arm"]
    assert main([*command, "lora:0"]) == 0
    first = (tmp_path / "one" / "model.safetensors").read_bytes()
    assert main([*command, "lora:0"]) == 0  # the same again
    error = refused(capsys, *command, "emtal:0")
    assert f"holds a model of lora-seed-0 of the run {study.name}; name another folder" in error
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == first
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "model.safetensors").write_bytes(b"mine")
    error = refused(capsys, "export", study, "--to", tmp_path / "own", "--arm", "lora")
    assert "model.safetensors' exists and would be overwritten; give another --to" in error


def test_merge_and_export_are_timm_classifiers(study: Path, tmp_path: Path, capsys) -> None:
    assert main(["merge", str(study), "--arm", "emtal:1"]) == 0
    state = safetensors.torch.load_file(study / "merged-emtal-seed-1" / "model.safetensors")
    model = timm.create_model("short_vit", img_size=32, num_classes=28)
    model.load_state_dict(state)
    about = json.loads((study / "merged-emtal-seed-1" / "config.json").read_text())
    assert about["num_classes"] == 28 and about["label_names"][0].startswith("digits/")
    job = open_run(study).job
    images = job.data.part(0, "test")[torch.arange(8)]
    net = job.loaded(job.study.find("emtal:1"))
    with torch.no_grad():
        assert torch.allclose(model.eval()(net.backbone.normalise(images)), net(images), atol=1e-5)
    assert main(["export", str(study), "--format", "peft", "--arm", "lora", "--to", str(tmp_path / "peft")]) == 0
    assert (tmp_path / "peft" / "adapter_config.json").exists()
    for folder, arm in ((study / "merged-emtal-seed-1", "emtal:1"), (tmp_path / "peft", "lora")):
        fitted = read_sealed(job.study.find(arm).folder / "records" / "temperature.json", "temperature")
        exported = json.loads((folder / "temperature.json").read_text())
        assert exported["probabilities"] == "softmax(logits / temperature[argmax(logits)])"
        counts = job.data.union.counts
        assert exported["temperature"] == [
            T for T, k in zip(fitted["temperature"], counts, strict=True) for _ in range(k)
        ]
    capsys.readouterr()
    for command, words in (
        (["merge", str(study), "--arm", "emtl"], "no arm 'emtl'"),
        (["merge", str(study), "--arm", "emtal:7"], "no seed '7'"),
        (["export", str(study), "--format", "peft", "--arm", "head"], "has no adapter"),
    ):
        assert words in refused(capsys, *command)


def test_the_same_command_again_trains_and_evaluates_nothing(study: Path, capsys, monkeypatch) -> None:
    from vismt.engine import loop

    monkeypatch.setattr(loop, "train", None)
    before = (study / "results.jsonl").read_text()
    assert main(["run", str(study.parent.parent / "tasks.yaml"), "--out", str(study.parent)]) == 0
    assert (study / "results.jsonl").read_text() == before


@pytest.mark.slow
def test_an_attack_on_the_run_adds_rows(study: Path, tmp_path: Path) -> None:
    copied = tmp_path / study.name
    shutil.copytree(study, copied)
    assert main(["attack", str(copied), "--attack", "fgsm", "--epsilon", "8/255", "--quiet"]) == 0
    before, after = (accuracies(folder / "results.jsonl") for folder in (study, copied))
    assert [row for row in after if row.condition == "clean"] == before  # they stay
    attacked = {(row.arm, row.data, row.seed): row for row in after if row.kind == "attack"}
    assert len(over_seeds(before)) == 6 and len(before) + len(attacked) == len(after) == 2 * (6 + 12)
    for row in before:
        assert attacked[row.arm, row.data, row.seed].value <= row.value
    for row in over_seeds(before):
        lines = read_lines(copied / RECORDS / f"{row.stem}.jsonl")
        label = attacked[row.arm, row.data, None].condition
        assert all(set(line) - {GROUP} == {EXAMPLE, "clean", ADJUSTED.label, label} for line in lines)
        assert attacked[row.arm, row.data, None].value == pytest.approx(sum(line[label] for line in lines) / row.n)


def test_an_interrupted_study_goes_on_bit_for_bit(tmp_path: Path, monkeypatch, capsys) -> None:
    """The bank, the running cross-entropies and the fade are part of the checkpoint."""
    path = write(tmp_path, arms={}, seeds=[], tune=None, train={**SMALL["train"], "steps": 6, "lr": 1e-2})
    assert main(["train", str(path), "--out", str(tmp_path / "whole"), "--quiet"]) == 0
    interrupted(monkeypatch, 4, "train", path, "--out", tmp_path / "cut")
    assert main(["train", str(path), "--out", str(tmp_path / "cut")]) == 0
    assert "at step 4 of 6" in capsys.readouterr().out
    paths = [next((tmp_path / name).rglob("metrics.jsonl")).parent for name in ("whole", "cut")]
    tensors = [saved_tensors(path) for path in paths]
    assert {"retain.images.bank", "retain.images.ema"} <= set(tensors[0]) and bool(
        (tensors[0]["retain.images.ema"] < 10).all()
    )
    fades = [value for name, value in tensors[0].items() if name.endswith("mlp._extra_state")]
    assert len(fades) == 2 and all(float(fade) == 1 for fade in fades)  # of two blocks
    logs = [read_lines(path / "metrics.jsonl") for path in paths]
    assert [row["fade"] for row in logs[0]] == [row["fade"] for row in logs[1]]
    for name, value in tensors[0].items():
        assert torch.equal(value, tensors[1][name]), name


@pytest.mark.slow
def test_a_router_that_does_not_fade_is_evaluated_unmerged_and_not_merged(tmp_path: Path, capsys) -> None:
    path = write(tmp_path, arms={}, seeds=[], tune=None, fade=None)
    folder = run_config(path)
    assert [(row.arm, row.seed) for row in accuracies(folder / "results.jsonl")] == [("adapted", None)] * 2
    assert not list(folder.rglob("merge.json"))
    assert "still routes" in refused(capsys, "merge", folder)


@pytest.mark.slow
def test_a_rate_that_diverges_is_reported_and_not_chosen(tmp_path: Path, monkeypatch, capsys) -> None:
    from vismt.engine import loop

    whole = loop.train

    def explodes(objective, batches, config, *rest, **named):
        if config.lr > bound:
            raise Diverged("train: the loss is not finite")
        return whole(objective, batches, config, *rest, **named)

    monkeypatch.setattr(loop, "train", explodes)
    path = write(tmp_path, arms={"head": SMALL["arms"]["head"]}, seeds=[])
    bound = 5e-3
    assert main(["run", str(path), "--out", str(tmp_path / "runs")]) == 0
    folder = next((tmp_path / "runs").iterdir())
    chosen = json.loads((folder / "arms" / "head" / "chosen.json").read_text())
    assert chosen["lr"] == 3e-3 and chosen["validation"]["0.01"] is None and chosen["validation"]["0.003"] >= 0
    assert "diverged" in (folder / "report.md").read_text() and "lr 0.01   train: the loss" in capsys.readouterr().out
    bound = 0.0
    error = refused(capsys, "train", path, "--out", tmp_path / "none")
    assert "diverged at every rate of tune.rates (0.003 to 0.01)" in error


def test_separate_heads_balanced_tasks_and_validation(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        head="separate",
        retain=None,
        fade=None,
        balancing={"method": "fairgrad"},
        adapt={"method": "lora", "rank": 2},
        arms={"separate": {}, "union": {"head": "union"}},
        seeds=[],
        tune=None,
        evaluate={"split": "validation", "batch": 64},
    )
    folder = run_config(path)
    rows = accuracies(folder / "results.jsonl")
    assert {(row.arm, row.split, row.protocol) for row in rows} == {
        ("separate", "validation", "validation images, task known"),
        ("union", "validation", "validation images, one of 28 classes"),
    }
    metrics = read_lines(next(folder.rglob("metrics.jsonl")))
    assert {"weight/digits", "weight/photos"} <= set(metrics[0])
    assert main(["attack", str(folder), "--attack", "apgd_ce", "--epsilon", "2/255", "--steps", "2", "--quiet"]) == 0
    attacked = [row for row in accuracies(folder / "results.jsonl") if row.condition != "clean"]
    assert len(attacked) == 4 and {row.protocol for row in attacked} == {row.protocol for row in rows}


def test_overrides_of_an_arm_are_typed_and_its_trainings_are_found_by_name(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), [])
    study = Study(config, tmp_path)
    assert study.arms["head"].adapt is None and study.arms["lora"].adapt.method == "lora"
    assert study.arms["lora"].adapt.rank == 2 and not study.arms["lora"].arms
    (tmp_path / "arms" / "lora").mkdir(parents=True)
    (tmp_path / "arms" / "lora" / "chosen.json").write_text(sealed({"lr": 0.003, "validation": {}}))
    training = study.find("lora:1")
    assert training.folder == tmp_path / "arms" / "lora" / "lr-0.003-seed-1"
    config = study.config_of(training)
    assert config.seed == 1 and config.train.lr == 3e-3 and config.adapt.method == "lora"


def test_fixed_parameters_keep_their_rate_while_those_of_an_adapter_are_tried(tmp_path: Path) -> None:
    train = {"steps": 2, "lr": 0.01, "rates": {"lora_A": 0.5, "head": 2.0}}
    path = write(tmp_path, train=train, tune={"rates": [1e-3, 1e-1], "fixed": ["head"]})
    job = make_job(load_config(path, []), tmp_path / "run")
    for rate in (1e-3, 1e-1):
        config = job.study.config_of(job.study.training("lora", rate, 0))
        net = job.prepared(config)[0]
        groups = make_optimizer(dict(net.named_parameters()), config.training).param_groups
        rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        found = {name: rates[id(p)] for name, p in net.named_parameters() if "head" in name or "lora_" in name}
        expected = {name: 0.02 if "head" in name else rate / (1 + ("lora_A" in name)) for name in found}
        assert len(set(expected.values())) == 3 and found == pytest.approx(expected)
        alone = job.study.config_of(job.study.training("head", rate, 0))
        assert alone.training.rates == train["rates"]  # of the only trained parameters the rates are tried
    path = write(tmp_path, train=train, tune={"rates": [1e-3, 1e-1], "fixed": ["hed"]})
    study = make_job(load_config(path, []), tmp_path / "other").study
    with pytest.raises(UserError, match=r"tune\.fixed: 'hed' is found in no trained parameter"):
        make_optimizer({"head.weight": torch.ones(2, 2)}, study.config_of(study.training("lora", 1e-3, 0)).training)


def test_a_fixed_pattern_that_finds_a_part_of_the_adapter_is_refused(tmp_path: Path) -> None:
    """timm calls the classifier of an EfficientNet `classifier`, and its last convolution `conv_head`."""
    changes = {
        "model": {"name": "efficientnet_lite0", "img_size": 32, "pretrained": False},
        "adapt": {"method": "lora", "targets": "all-conv"},
        "arms": {"lora": {}},
        "fade": None,
    }

    def check(pattern: str) -> None:
        path = write(tmp_path, **changes, tune={"rates": [1e-3, 1e-1], "fixed": [pattern]})
        make_job(load_config(path, []), tmp_path / pattern).check_training()

    check("classifier")
    with pytest.raises(
        UserError, match=r"'head' also finds '\S*conv_head\S*' of the adapter.*\S*classifier\.weight\.$"
    ):
        check("head")


@pytest.mark.slow
@pytest.mark.parametrize("balancing", [None, {"method": "fairgrad"}, {"method": "uncertainty"}])
def test_two_processes_train_one_model(tmp_path: Path, balancing: dict | None) -> None:
    """torchrun on two CPU processes: one bank, one fade, one set of factors, with and without gradients of single tasks."""
    path = write(tmp_path, model=VIT, balancing=balancing, arms={}, seeds=[], tune=None if balancing else SMALL["tune"])
    folder, printed = run_on_two(path)
    assert len(accuracies(folder / "results.jsonl")) == 2 and printed.count("report  ") == 1
    merged = next(folder.rglob("merge.json"))
    assert json.loads(merged.read_text())["different_predictions"] == 0
    tensors = saved_tensors(merged.parent)
    # 4 steps of 2 batches of 16: more classes have been seen than 4 batches could show.
    assert int((tensors["retain.images.bank"][:, 1] != 0).any(1).sum()) > 20
    fades = [float(value) for name, value in tensors.items() if name.endswith("mlp._extra_state")]
    assert fades and set(fades) == {1.0}


@pytest.mark.slow
@pytest.mark.realdata
def test_the_small_study_runs_on_the_real_sets(tmp_path: Path) -> None:
    """Its tasks, parts and arm emtal, by a random tiny ViT for two steps."""
    root = os.environ.get("VISMT_DATA")
    if root is None or not all((Path(root) / name).is_dir() for name in ("grocery", "flowers102", "dtd10", "gtsrb")):
        pytest.skip("the four sets are not under VISMT_DATA")
    config = Path(__file__).resolve().parents[2] / "configs" / "multitask" / "emtal_small.yaml"
    changes = [
        "arms={}",
        "seeds=[]",
        "tune=null",
        "train.steps=2",
        "train.warmup=0",
        "train.precision=no",
        "evaluate.split=validation",
        "model={name: test_vit, img_size: 32, pretrained: false}",
        "adapt.options={n_experts: 4, cluster: false}",
    ]
    assert main(["run", str(config), *changes, "--out", str(tmp_path), "--quiet"]) == 0
    rows = accuracies(next(tmp_path.iterdir()) / "results.jsonl")
    assert {row.data: row.n for row in rows} == {
        "grocery": 393,
        "flowers102-2843": 444,
        "dtd10": 150,
        "gtsrb-2140": 338,
    }
    assert {row.protocol for row in rows} == {"validation images, one of 223 classes"}


def test_validation_images_that_chose_a_rate_can_be_attacked(tmp_path: Path) -> None:
    evaluate = {"split": "validation", "batch": 64, "attacks": [{"name": "pgd", "epsilon": "4/255", "steps": 1}]}
    folder = run_config(write(tmp_path, tasks=TASKS[:1], arms={}, seeds=[], evaluate=evaluate))
    assert {row.condition for row in accuracies(folder / "results.jsonl")} == {"clean", "PGD-1 linf 4/255"}
