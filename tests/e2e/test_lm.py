"""The language-model job from configuration to report and export: arms, rates, seeds, resume, exact merge, user errors."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from helpers.lm_parts import changed, save_lm, save_opt, save_texts, sentiment_task
from helpers.tiny_runs import interrupted, refused, run_config, written
from helpers.toy_training import logged

from vismt.base.errors import UserError
from vismt.cli import main
from vismt.engine import runtime
from vismt.engine.study import read_choice
from vismt.jobs import open_run
from vismt.jobs.lm import data as lm_data
from vismt.jobs.lm.evaluation import MEANS, Evaluation
from vismt.jobs.units import _evaluations
from vismt.llm.corda import covariance
from vismt.llm.net import LmNet
from vismt.llm.tasks.base import gather_items
from vismt.lowrank.layers.base import adapter_layers
from vismt.report.results import RECORDS, Result, read_results
from vismt.report.weight_changes import CHANGE_TYPES
from vismt.storage.lines import read_lines
from vismt.uncertainty.intervals import CLEAN


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> dict[str, object]:
    """Return the folder of a tiny LM, and those of cards."""
    folder = tmp_path_factory.mktemp("lm")
    texts = save_texts(folder)
    texts["tales"] = shutil.copytree(texts["stories"], folder / "tales")  # a set that no task tests
    card = texts["tales"] / "card.yaml"
    card.write_text(card.read_text().replace("name: stories", "name: tales"))
    return {"lm": str(save_lm(folder / "tiny")), **{name: str(path) for name, path in texts.items()}}


def settings(home: dict[str, object], **changes: object) -> dict[str, object]:
    films = home["films"]
    return {
        "task": "lm",
        "model": {"name": home["lm"], "first_block": 1},
        "tasks": [
            sentiment_task(films, limit=16, validation=[f"{films}:dev"], test=[f"{films}:test", home["other"]]),
            {
                "name": "stories",
                "kind": "causal",
                "options": {"answer": "{text}", "length": 16, "end": False},
                "test": [home["stories"]],
            },
        ],
        "adapt": {"method": "lora", "rank": 2, "targets": ["q_proj", "v_proj"]},
        "train": {"steps": 4, "lr": 1e-2, "checkpoint_every": 2},
        "batch": 4,
        "evaluate": {"batch": 4},
        **changes,
    }


def write(folder: Path, config: dict[str, object]) -> Path:
    return written(folder / "words.yaml", config)


@pytest.fixture(scope="module")
def study(home, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    config = settings(
        home,
        train={"steps": 4, "lr": 1e-2, "checkpoint_every": 2, "validate": True},
        seeds=[0, 1],
        tune={"rates": [1e-3, 3e-2]},
        evaluate={"batch": 4, "temperature": True, "laplace": True},
        arms={
            "lora": {},
            "head": {"adapt": None},
            "polar-vbll": {"adapt.method": "polar", "head": {"name": "vbll", "alternate": {"steps": 1}}},
        },
    )
    return run_config(write(folder, config))


def test_what_a_training_changed_is_on_record_and_the_answers_are_those_of_the_trained_net(study: Path) -> None:
    for arm in ("lora", "polar-vbll"):
        lines = read_lines(next((study / "arms" / arm).glob("*/changes.jsonl")), CHANGE_TYPES)
        assert lines and all(0 < line["change"] < line["norm"] and 1 <= line["stable_rank"] < 4.001 for line in lines)
    assert not list((study / "arms" / "head").glob("*/changes.jsonl"))
    results = read_results(study / "results.jsonl", open_run(study).hash)
    nll = {
        row.arm: row.value
        for row in results
        if row.seed is None and row.data == "stories" and row.metric.startswith("NLL")
    }
    assert len({nll["frozen"], nll["lora"], nll["polar-vbll"]}) == 3


def test_the_validation_curve_ends_at_the_score_that_chose_the_rate(study: Path) -> None:
    """All nets share the LM, so a score of a step must not be that of the last net."""
    for arm in ("lora", "head", "polar-vbll"):
        choice = read_choice(study, arm)
        path = study / "arms" / arm / f"lr-{choice.lr:g}-seed-0" / "validation.jsonl"
        rows = read_lines(path, {"step": int, "validation": float}, whole=True)
        assert [row["step"] for row in rows] == [2, 4] and rows[0]["validation"] != rows[1]["validation"]
        assert rows[1]["validation"] == choice.validation[f"{choice.lr:g}"]


def test_every_arm_has_its_rate_its_seeds_and_its_rows(study: Path, home) -> None:
    results = read_results(study / "results.jsonl", open_run(study).hash)
    rows = [row for row in results if row.seed is None]
    assert list(dict.fromkeys(row.arm for row in rows)) == ["frozen", "constant", "lora", "head", "polar-vbll"]
    sets = ["films:test", "other"]
    plain, bayes = {"clean", "temperature of validation"}, {"Laplace", "means of the head"}
    for arm, extra in (("frozen", set()), ("lora", {"Laplace"}), ("head", {"Laplace"}), ("polar-vbll", bayes)):
        assert {(row.data, row.metric, row.condition) for row in rows if row.arm == arm} == {
            *(
                (data, metric, condition)
                for data in sets
                for metric in ("accuracy", "ECE-15", "NLL in nats", "Brier", "AUROC")
                for condition in plain | extra
            ),
            *(("stories", metric, "clean") for metric in ("NLL in nats a token", "perplexity")),
        }
    data = open_run(study).job.data
    labels = [item.label for item in data.all_rows("train")]
    for name in sets:
        tested = [item.label for item in data.rows(data.trained, "test", name)]
        (row,) = [row for row in rows if (row.arm, row.data) == ("constant", name)]
        assert row.metric == "accuracy"
        assert row.value == pytest.approx(tested.count(max((0, 1), key=labels.count)) / len(tested))
    value = {row.key: row.value for row in results}
    for row in rows:
        assert {other.seed for other in results if other.key[:-1] == row.key[:-1]} == (
            {None} if row.arm in ("frozen", "constant") else {None, 0, 1}
        )
        if row.arm not in ("frozen", "constant"):
            assert row.value == pytest.approx(sum(value[(*row.key[:-1], seed)] for seed in (0, 1)) / 2)
        path = study / RECORDS / f"{row.stem}.jsonl"
        assert path.exists() == (row.metric != "ECE-15")  # which is compared by its own interval, not row by row
        if row.metric == "ECE-15":
            assert 0 < row.half <= 1
            continue
        values = [line[row.condition] for line in read_lines(path)]
        assert len(values) == row.n and sum(values) / row.n == pytest.approx(row.value)
    for arm in ("lora", "head", "polar-vbll"):
        chosen = json.loads((study / "arms" / arm / "chosen.json").read_text())
        assert chosen["validation"][f"{chosen['lr']:g}"] == max(chosen["validation"].values())
        records = read_lines(
            next((study / "arms" / arm).glob(f"lr-{chosen['lr']:g}-seed-0/records/validation-*.jsonl"))
        )[1:]
        nll = -sum(record["log_p"][record["label"]] for record in records) / len(records)
        assert chosen["validation"][f"{chosen['lr']:g}"] == pytest.approx(math.exp(-nll))
    by = {(row.arm, row.metric, row.condition): row.value for row in rows if row.data == sets[0]}
    # A temperature changes no answer; a Laplace posterior changes the probabilities.
    for metric in ("accuracy", "NLL in nats"):
        same = by["lora", metric, "clean"] == pytest.approx(by["lora", metric, "temperature of validation"], abs=1e-12)
        assert same == (metric == "accuracy")
    assert by["lora", "NLL in nats", "clean"] != by["lora", "NLL in nats", "Laplace"]
    assert by["polar-vbll", "NLL in nats", "clean"] != by["polar-vbll", "NLL in nats", "means of the head"]


def test_what_is_fitted_to_validation_rows_is_not_scored_on_them(study: Path) -> None:
    job = open_run(study).job
    scores = job.score(job.trainings("polar-vbll")[0], "validation", None)
    assert {score.condition for score in scores} == {CLEAN, MEANS}


@pytest.mark.slow
def test_laplace_of_a_large_head_is_factored_and_named_kronecker(home, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("vismt.uncertainty.last_layers.LARGEST", 2 * 32 - 1)  # two answers, an LM of width 32
    arms = {"linear": {}, "vbll": {"head": {"name": "vbll"}}}
    path = write(tmp_path, settings(home, arms=arms, evaluate={"batch": 4, "laplace": True}))
    run = run_config(path)
    rows = [row for row in read_results(run / "results.jsonl") if row.metric == "NLL in nats"]
    conditions = {arm: {row.condition for row in rows if row.arm == arm} for arm in arms}
    assert conditions == {"linear": {"clean", "Laplace (Kronecker)"}, "vbll": {"clean", "means of the head", "Laplace"}}
    assert "Laplace (Kronecker)" in (run / "report.md").read_text()


def test_laplace_takes_the_bias_of_an_output_embedding(home, tmp_path: Path, monkeypatch) -> None:
    rows = LmNet.answer_rows
    monkeypatch.setattr(LmNet, "answer_rows", lambda net, tokens: (rows(net, tokens)[0], torch.ones(len(tokens))))
    config = settings(home, evaluate={"batch": 4, "laplace": True, "frozen": False})
    results = read_results(run_config(write(tmp_path, config)) / "results.jsonl")
    assert any(row.condition == "Laplace" for row in results)


def test_the_report_pairs_rows_and_counts_tokens(study: Path) -> None:
    report = (study / "report.md").read_text()
    # All measures but ECE are paired.
    heads = [
        line for line in report.splitlines() if line.startswith("| Data | Condition | Model | accuracy in % ↑ | ECE")
    ]
    assert heads and all(line.count("(unpaired)") == 1 for line in heads)
    assert "Choice of the rate" in report and "Merging" in report and "perplexity" in report
    titles = [line for line in report.splitlines() if line.startswith("### stories: ") and "test rows" in line]
    assert len(titles) == 1 and ", 116 tokens, " in titles[0]
    metrics = [line for path in (study / "arms" / "polar-vbll").glob("*/metrics.jsonl") for line in read_lines(path)]
    assert metrics and all("infeasibility" in line and "kl" in line for line in metrics)


def test_several_processes_take_no_alternating_head(study: Path, monkeypatch) -> None:
    job = open_run(study).job
    monkeypatch.setattr("vismt.jobs.lm.job.runtime.processes", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(UserError, match=r"head.alternate: with 2 processes.*joint update, or run one process"):
        job.check_data()  # before any arm is trained
    joint = job.study.arms["polar-vbll"]
    assert job.batches(replace(joint, head=replace(joint.head, alternate=None)))
    monkeypatch.undo()
    assert job.batches(joint)


@pytest.mark.slow
def test_an_arm_on_quantised_weights_leaves_the_others_alone(home, tmp_path: Path, capsys) -> None:
    quantised = {"adapt.method": "pissa", "adapt.options": {"quantize": "nf4", "iterations": 1}}
    arms = {"both": {"qpissa": quantised, "lora": {}}, "alone": {"lora": {}}}
    for out, command in (("both", "run"), ("alone", "train")):
        path = write(tmp_path, settings(home, arms=arms[out]))
        assert main([command, str(path), "--out", str(tmp_path / out), "--quiet"]) == 0
    run, other = (next((tmp_path / out).iterdir()) for out in ("both", "alone"))
    trained = [next((folder / "arms" / "lora").glob("*/adapter/*.safetensors")) for folder in (run, other)]
    assert trained[0].read_bytes() == trained[1].read_bytes()
    assert {row.arm for row in read_results(run / "results.jsonl")} == {"frozen", "constant", "qpissa", "lora"}
    where = ["--arm", "qpissa", "--quiet"]
    assert "'pissa' lies on quantised weights" in refused(capsys, "export", run, "--format", "peft", *where)
    # Another process has the stock LM and the files alone.
    subprocess.run([sys.executable, "-m", "vismt.cli", "merge", str(run), *where], check=True)
    job = open_run(run).job
    merged = transformers.AutoModelForCausalLM.from_pretrained(next(run.glob("merged-qpissa-*")))
    net = job.loaded(job.study.find("qpissa"))
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        wanted = net.lm(ids).logits
        assert (merged.eval()(ids).logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert (job.models.stock()(ids).logits - wanted).abs().max() > 1e-2 * wanted.abs().max()


def test_a_hosted_arm_is_compared_merged_and_exported(home, tmp_path: Path) -> None:
    oft = {"adapt.method": "peft:oft", "adapt.options": {"oft_block_size": 4}}
    path = write(tmp_path, settings(home, arms={"lora": {}, "oft": oft}))
    run = run_config(path)
    assert {row.arm for row in read_results(run / "results.jsonl")} == {"frozen", "constant", "lora", "oft"}
    net = (job := open_run(run).job).loaded(job.study.find("oft"))
    assert "0" not in {path.split(".")[2] for path in adapter_layers(net.lm)}  # first_block is 1
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        expected = net.lm(ids).logits
    for command in (["merge"], ["export", "--format", "peft"]):
        assert main([command[0], str(run), *command[1:], "--arm", "oft", "--quiet"]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(next(run.glob("merged-oft-*")))
    peft = pytest.importorskip("peft")
    stock = transformers.AutoModelForCausalLM.from_pretrained(home["lm"])
    theirs = peft.PeftModel.from_pretrained(stock, str(next(run.glob("export-peft-oft-*"))))
    with torch.no_grad():
        assert torch.equal(theirs.eval()(ids).logits, expected)
        assert (merged.eval()(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_blocks_below_the_first_are_not_adapted(study: Path) -> None:
    job = open_run(study).job
    net = job.loaded(job.study.find("lora:1"))
    assert set(adapter_layers(net.lm)) == {f"model.layers.{i}.self_attn.{x}_proj" for i in (1, 2) for x in "qv"}
    assert "lower" not in gather_items(job.data.training())
    job.data.cache(job.data.training(), net, "rows")
    assert "lower" in gather_items(job.data.training())


def test_a_run_that_is_killed_keeps_the_time_of_every_evaluated_training(study: Path) -> None:
    run, noted = open_run(study), []
    run.job.part_done = lambda: noted.append(1)
    run.job.evaluate_references()
    assert len(noted) == 2  # the LM before training, and the constant answer
    run.job.evaluate()
    assert len(noted) == 2 * 2 + 3 * 2  # arms, seeds


def test_evaluating_again_computes_nothing(study: Path, monkeypatch) -> None:
    before = (study / "results.jsonl").read_bytes()
    monkeypatch.setattr("vismt.llm.net.LmNet.hidden", lambda *_: pytest.fail("a row was evaluated again"))
    open_run(study).evaluate()
    assert (study / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize("arm", ["lora", "polar-vbll"])
def test_exports_load_elsewhere_and_answer_alike(study: Path, tmp_path: Path, arm: str, monkeypatch) -> None:
    for form in ("transformers", "peft"):
        command = ["export", str(study), "--format", form, "--to", str(tmp_path / form), "--arm", f"{arm}:1"]
        assert main([*command, "--quiet"]) == 0 and (tmp_path / form / "head.safetensors").exists()
        assert "`head.safetensors` has the classifier" in (tmp_path / form / "README.md").read_text()
    job, names = open_run(study).job, dict[str, Any]()
    net, ids = job.loaded(job.study.find(f"{arm}:1")), torch.tensor([[5, 6, 7, 8, 9]])
    base = transformers.AutoModelForCausalLM.from_pretrained(job.config.model.name)
    with torch.no_grad():
        wanted, stock = net.lm(input_ids=ids).logits, base(input_ids=ids).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "transformers")(input_ids=ids).logits
        monkeypatch.chdir(tmp_path / "peft")  # where the README says to run its lines
        exec(re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)[0], names)
        adapted = names["model"](input_ids=ids).logits
    assert (wanted - stock).abs().max() > 1e-4
    assert torch.allclose(merged, wanted, atol=1e-4) and torch.allclose(adapted, wanted, atol=1e-4)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "transformers")
    assert read("a bad film")["input_ids"] == job.models.tokenizer("a bad film")["input_ids"]


def test_merge_writes_a_folder_of_transformers(study: Path) -> None:
    assert main(["merge", str(study), "--arm", "lora", "--quiet"]) == 0
    transformers.AutoModelForCausalLM.from_pretrained(next(study.glob("merged-lora-*")))
    assert main(["export", str(study), "--arm", "lora", "--quiet"]) == 2  # timm
    check = json.loads(next((study / "arms" / "lora").glob("lr-*-seed-1/merge.json")).read_text())
    assert check["n"] > 8 and check["different_predictions"] == 0
    assert check["largest_difference"] < 1e-3 * check["largest_logit"]
    assert not (study / "arms" / "head" / "lr-0.03-seed-1" / "merge.json").exists()


@pytest.mark.parametrize("head", [{}, {"name": "vbll", "alternate": {}}])
def test_an_interrupted_training_goes_on_bit_for_bit(home, tmp_path: Path, monkeypatch, head) -> None:
    path = write(tmp_path, settings(home, head=head))
    assert main(["train", str(path), "--out", str(tmp_path / "straight"), "--quiet"]) == 0
    interrupted(monkeypatch, 2, "train", path, "--out", tmp_path / "stopped", "--quiet")
    assert main(["train", str(path), "--out", str(tmp_path / "stopped"), "--quiet"]) == 0
    folders = [next((tmp_path / name).glob("*/arms/adapted/lr-0.01-seed-0")) for name in ("straight", "stopped")]
    for name in ("head.safetensors", "adapter/adapter.json"):  # which holds the sha256 of the adapter's tensors
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    steps = [logged(folder) for folder in folders]
    assert steps[0] == steps[1] and len(steps[0]) == 4


def test_caching_the_lower_blocks_trains_the_same(home, tmp_path: Path, monkeypatch) -> None:
    factors = []
    for megabytes in (0, 100):
        monkeypatch.setattr(lm_data, "CACHE_MB", megabytes)
        config = settings(home, model={"name": home["lm"], "first_block": 1})
        assert main(["train", str(write(tmp_path, config)), "--out", str(tmp_path / str(megabytes)), "--quiet"]) == 0
        run = open_run(next((tmp_path / str(megabytes)).iterdir()))
        layers = adapter_layers(run.job.loaded(run.job.study.find(None)).lm).values()
        factors.append(torch.cat([p.detach().flatten() for layer in layers for p in (layer.lora_A, layer.lora_B)]))
    assert torch.allclose(factors[0], factors[1], atol=1e-4)


CAUSAL = {
    "name": "sums",
    "kind": "generation",
    "prompt": "Question: {question}\nAnswer:",
    "options": {"answer": " {answer}", "gold": "answer", "new_tokens": 3, "pack": True, "length": 32},
}


COLOURS = {
    "name": "colours",
    "kind": "answers",
    "prompt": "Question: {question}\nAnswer:",
    "options": {"answers": {"one": " {one}", "two": " {two}"}},
}


def test_each_loss_of_questions_trains_another_adapter_and_is_validated_alike(home, tmp_path: Path) -> None:
    colours = {**COLOURS, "train": [home["colours"]], "validation_share": 0.25, "test_share": 0.25}
    arms = {name: {"loss": name} for name in ("choice", "answer", "text")}
    config = settings(
        home, model={"name": home["lm"]}, tasks=[colours], batch=2, arms=arms, tune={"rates": [1e-3, 1e-2]}
    )
    run = run_config(write(tmp_path, config))
    job = open_run(run).job
    first = {}
    for name in arms:
        training = job.study.find(name)
        first[name] = read_lines(training.folder / "metrics.jsonl")[0]["loss"]
        # The probability of the right one of two choices, whatever is trained.
        assert all(0.3 < score < 0.7 for score in read_choice(run, name).validation.values())
    assert len({tensors(run, name) for name in arms}) == 3
    # Choices of two begin at ln 2. A random LM begins at the log of its vocabulary.
    vocabulary = math.log(job.loaded(job.study.find("text")).lm.config.vocab_size)
    assert first["choice"] == pytest.approx(math.log(2), abs=0.3)
    assert [first["answer"], first["text"]] == pytest.approx([vocabulary] * 2, rel=0.2)


def test_causal_training_with_calibration_and_forgetting(home, tmp_path: Path) -> None:
    choices = {**COLOURS, "test": [home["colours"]]}
    config = settings(
        home,
        tasks=[{**CAUSAL, "train": [home["sums"]], "test_share": 0.2}, settings(home)["tasks"][1], choices],
        adapt={"method": "corda", "rank": 2, "options": {"mode": "kpm"}},
        calibration={"data": [home["tales"]], "rows": 3, "batch": 2},
        batch=1,
        arms={"kpm": {}, "pissa": {"adapt": {"method": "pissa", "rank": 2}}, "fast": {"train.lr": 0.03}},
    )
    run = run_config(write(tmp_path, config))
    rows = read_results(run / "results.jsonl")
    assert {(row.metric, row.n) for row in rows if row.task == "sums"} == {("exact-match accuracy", 2)}
    metrics = {row.metric for row in rows if row.task == "colours"}
    assert metrics == {"accuracy", "ECE-15", "NLL in nats", "Brier"}
    stories = {row.arm: row.value for row in rows if row.metric == "perplexity"}
    assert set(stories) == {"frozen", "kpm", "pissa", "fast"} and len(set(stories.values())) == 4
    job = open_run(run).job
    training = job.study.find("kpm")
    assert not (training.folder / "head.safetensors").exists()
    logged = read_lines(training.folder / "metrics.jsonl")
    lm = job.loaded(training).lm
    assert logged[-1]["loss"] < logged[0]["loss"] * 1.5 and lm.vismt_record.method == "corda"
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        wanted = lm(input_ids=ids).logits
        # B A - B0 A0 as one adapter of twice the rank, and folded into the weights.
        for form in ("peft", "transformers"):
            where = tmp_path / form
            assert main(["export", str(run), "--format", form, "--to", str(where), "--arm", "kpm", "--quiet"]) == 0
            if form == "peft":
                assert json.loads((where / "adapter_config.json").read_text())["r"] == 4
                stock = transformers.AutoModelForCausalLM.from_pretrained(home["lm"])
                model = pytest.importorskip("peft").PeftModel.from_pretrained(stock, str(where))
            else:
                model = transformers.AutoModelForCausalLM.from_pretrained(where)
            assert torch.allclose(model.eval()(input_ids=ids).logits, wanted, atol=1e-4), form


CORDA = {"method": "corda", "rank": 2, "targets": ["q_proj", "down_proj"]}


def tensors(run: Path, arm: str = "adapted") -> str:
    """Return the sha256 of what an arm trained."""
    return json.loads(next((run / "arms" / arm).glob("*/adapter/adapter.json")).read_text())["tensors_sha256"]


def trained(home, folder: Path, code: int = 0, **changes: object) -> Path:
    """Return the run folder of two steps of CorDA on sums, after `vismt train` that ends with `code`."""
    folder.mkdir(exist_ok=True)
    config = settings(
        home,
        tasks=[{**CAUSAL, "train": [home["sums"]], "test_share": 0.2}],
        adapt=CORDA,
        batch=1,
        train={"steps": 2, "lr": 1e-3},
        **changes,
    )
    assert main(["train", str(write(folder, config)), "--out", str(folder / "runs"), "--quiet"]) == code
    return next((folder / "runs").iterdir())


def test_an_arm_is_calibrated_on_the_texts_it_names(home, tmp_path: Path) -> None:
    stories, films = ({"data": [name], "rows": 4, "batch": 2} for name in (home["stories"], f"{home['films']}:train"))
    sections = {"stories": stories, "films": films, "fewer": {**stories, "rows": 2}}
    arms = {arm: {"calibration": section} for arm, section in sections.items()}
    run = trained(home, tmp_path / "arms", arms=arms)
    hashes = {arm: tensors(run, arm) for arm in arms}
    assert len(set(hashes.values())) == 3
    base = trained(home, tmp_path / "base", calibration=films, arms={"films": {}, "stories": {"calibration": stories}})
    assert {arm: tensors(base, arm) for arm in ("films", "stories")} == {
        arm: hashes[arm] for arm in ("films", "stories")
    }


def test_covariances_are_collected_once_and_kept(home, tmp_path: Path, monkeypatch) -> None:
    calls: list[int] = []
    real = covariance.collect_covariance
    monkeypatch.setattr("vismt.llm.corda.method.collect_covariance", lambda *a, **o: calls.append(1) or real(*a, **o))
    settings = {
        "calibration": {"data": [f"{home['films']}:train"], "rows": 8, "batch": 3},
        "arms": {"slow": {}, "fast": {"train.lr": 0.03}},
    }
    run = trained(home, tmp_path, **settings)
    (folder,) = (path for path in (run / "calibration").iterdir() if path.is_dir())
    paths = {f"model.layers.{i}.{x}" for i in (1, 2) for x in ("self_attn.q_proj", "mlp.down_proj")}
    assert len(calls) == 1 and set(covariance.load_covariances(folder)) == paths


def test_the_lm_is_on_its_device_before_it_is_calibrated(home, tmp_path: Path, monkeypatch) -> None:
    moved: list[object] = []
    to = LmNet.to
    monkeypatch.setattr(LmNet, "to", lambda net, device: moved.append((id(net.lm), device)) or to(net, device))

    def checked(lm: torch.nn.Module, *arguments: object, **options: object) -> dict[str, torch.Tensor]:
        assert moved[-1] == (id(lm), runtime.processes().device)
        return covariance.collect_covariance(lm, *arguments, **options)

    monkeypatch.setattr("vismt.llm.corda.method.collect_covariance", checked)
    trained(home, tmp_path, calibration={"data": [home["stories"]], "rows": 2})
    assert moved


@pytest.mark.parametrize(("changes", "words"), [
    ({"adapt": CORDA}, "calibration: 'corda' needs covariances; name texts here"),
    ({"arms": {"a": {}, "b": {"adapt": CORDA}}}, "arms.b: calibration: 'corda'"),
    ({"adapt": CORDA, "calibration": {"data": ["x"], "rows": 0}}, "calibration.rows is 0; it must be at least 1"),
])  # fmt: skip
def test_errors_of_a_calibration(home, tmp_path: Path, capsys, changes, words) -> None:
    path = write(tmp_path, settings(home, **changes))
    assert words in refused(capsys, "train", path, "--out", tmp_path / "runs", "--quiet")


@pytest.mark.slow
def test_several_passes_are_averaged_and_other_texts_detected(home, tmp_path: Path, monkeypatch, capsys) -> None:
    other, arms = home["other"], {"lora": {}, "dropped": {"adapt.options.dropout": 0.5}}
    evaluate = {"batch": 4, "temperature": True, "passes": 3, "ensembles": ["lora"], "ood": [other]}
    config = settings(home, seeds=[0, 1], arms=arms, evaluate=evaluate)
    config["tasks"] = config["tasks"][:1]
    run = run_config(write(tmp_path, config))
    rows = read_results(run / "results.jsonl")
    inside = next(row.data for row in rows if row.data.endswith("films:test"))

    def row(arm: str, metric: str, condition: str = "clean", seed: int | None = None) -> Result:
        (found,) = [
            row
            for row in rows
            if (row.arm, row.metric, row.condition, row.seed, row.data) == (arm, metric, condition, seed, inside)
        ]
        return found

    folders = [path / "records" for path in sorted((run / "arms" / "lora").glob("lr-*"))]
    by_seed = [read_lines(next(folder.glob("test-*films-test.jsonl")))[1:] for folder in folders]
    p = torch.tensor([[line["log_p"] for line in lines] for lines in by_seed], dtype=torch.float64).exp()
    labels = torch.tensor([line["label"] for line in by_seed[0]])
    together = row("lora:ensemble", "NLL in nats")
    assert together.value == pytest.approx(float(-p.mean(0).log()[torch.arange(len(labels)), labels].mean()))
    assert together.value < (row("lora", "NLL in nats", seed=0).value + row("lora", "NLL in nats", seed=1).value) / 2
    assert {found.seed for found in rows if found.arm == "lora:ensemble"} == {None}
    assert row("lora:ensemble", "NLL in nats", "temperature of validation").value > 0

    passes = {found.arm for found in rows if found.condition == "3 passes with dropout"}
    assert passes == {"dropped"}
    assert row("dropped", "NLL in nats", "3 passes with dropout").value != row("dropped", "NLL in nats").value

    outside = read_lines(next(folders[0].glob(f"test-*{Path(other).stem}*.jsonl")))[1:]
    sure = [torch.tensor([max(line["log_p"]) for line in lines]) for lines in (by_seed[0], outside)]
    larger = (sure[0][:, None] > sure[1]).double() + 0.5 * (sure[0][:, None] == sure[1]).double()
    (found,) = [row for row in rows if (row.arm, row.seed) == ("lora", 0) and row.condition.startswith("against ")]
    assert found.data == inside and found.value == pytest.approx(float(larger.mean())) and found.unit == "rows"
    units = {training.arm for training in _evaluations(open_run(run).job)}
    assert units == {"frozen", "constant", "lora", "dropped"}, "an ensemble is read from the records of its members"
    report = (run / "report.html").read_text()
    assert "the mean probability of 2 trainings of lora; 2 passes for an answer" in report
    dropout = next(path for path in (run / "arms" / "dropped").rglob("*films-test-dropout.jsonl"))
    before = dropout.read_bytes()
    rows_before = sorted(read_lines(dropout)[1:], key=lambda line: line["id"])
    assert main(["evaluate", str(run), "--quiet"]) == 0 and dropout.read_bytes() == before
    dropout.unlink()
    chunks = Evaluation._chunks
    monkeypatch.setattr(Evaluation, "_chunks", lambda self, items: chunks(self, items)[::-1])
    assert main(["evaluate", str(run), "--quiet"]) == 0
    again = sorted(read_lines(dropout)[1:], key=lambda line: line["id"])
    assert again == rows_before, "a batch has the same masks whatever came before it, in any process"
    adapter = next(dropout.parents[1].glob("adapter/*.safetensors"))
    content = bytearray(adapter.read_bytes())
    content[-1] ^= 1
    adapter.unlink()
    adapter.write_bytes(content)
    assert main(["evaluate", str(run), "--quiet"]) == 2, "all is on record, and the weights were changed"
    assert "adapter" in capsys.readouterr().err


def test_evaluations_of_probabilities_need_them(home, tmp_path: Path, capsys) -> None:
    config = settings(home)
    everything = {**config, "evaluate": {"ood": config["tasks"][0]["test"]}}
    causal = {**config["tasks"][1], "train": [home["stories"]], "test": [], "test_share": 0.5}
    for case, words in (
        (everything, "evaluate.ood: names every test set of"),
        (
            {**everything, "tasks": config["tasks"][:1], "evaluate": {**everything["evaluate"], "split": "validation"}},
            "evaluate.ood: its sets are test sets",
        ),
        (
            {**config, "tasks": [causal], "evaluate": {"passes": 4}},
            "evaluate.passes: needs the class probabilities of a head",
        ),
        (
            {**config, "tasks": [{**causal, "validation_share": 0.2}], "evaluate": {"laplace": True}},
            "evaluate.laplace: needs the class probabilities of a head, and 'causal' has none",
        ),
        (
            {**config, "tasks": [{**causal, "validation_share": 0.2}], "evaluate": {"temperature": True}},
            "evaluate.temperature: 'causal' has no probabilities of choices",
        ),
    ):
        assert words in refused(capsys, "train", write(tmp_path, case), "--out", tmp_path / "runs", "--quiet")


def test_weights_that_are_trained_in_place_begin_at_the_first_block(home, tmp_path: Path) -> None:
    arms = {
        "s2ft": {"adapt": {"method": "s2ft", "options": {"ratio": 0.25}}},
        "lisa": {"adapt": {"method": "lisa", "options": {"active": 1, "interval": 1, "train_embeddings": False}}},
    }
    config = settings(home, arms=arms)
    config["model"] = {"name": home["lm"], "first_block": 2}
    run = run_config(write(tmp_path, config))
    stock = open_run(run).job.models.stock().state_dict()
    stock = {name: value.clone() for name, value in stock.items()}
    for arm in arms:
        merged = open_run(run).job.merged(arm).state_dict()
        moved = {name for name, value in stock.items() if not torch.equal(value, merged[name])}
        assert any(".layers.2." in name for name in moved), arm
        assert not any(f".layers.{low}." in name or "embed" in name for name in moved for low in (0, 1)), arm
    rows = [row for row in read_results(run / "results.jsonl") if row.metric == "perplexity"]
    assert [row.arm for row in rows] == ["frozen", "s2ft", "lisa"] and len({row.value for row in rows}) == 3
    # the list of models tells arms of one method apart
    assert "adapt.options.active 1, adapt.options.interval 1" in (run / "report.html").read_text()


@pytest.mark.parametrize(("changes", "words"), [
    ({"tasks": []}, "name at least one"),
    ({"head": {"name": "vbl"}}, "head.name: 'vbl' is not known. Near: 'vbll'"),
    ({"head": {"alternate": {}}}, "set head.name to vbll"),
    ({"head": {"name": "vbll", "alternate": {"spread_lr": -1.0}}}, "head.alternate.spread_lr is -1.0; it must be"),
    ({"recommender": {"lr": -1.0}}, "recommender.lr is -1.0; it must be"),
    ({"model.dtype": "fp8"}, "got 'fp8'"),
    ({"model.first_block": 3}, "model.first_block: 3; LlamaForCausalLM has blocks 0 to 2"),
    ({"evaluate.limit": 1}, "evaluate.limit is 1; it must be at least 2"),
    ({"evaluate.ensembles": ["lorra"], "arms": {"lora": {}}}, "evaluate.ensembles: 'lorra'. Near: 'lora'"),
    ({"evaluate.ensembles": ["lora"], "arms": {"lora": {}}}, "name two seeds or more"),
    ({"evaluate.ood": ["elsewhere"]}, "evaluate.ood: 'elsewhere'."),
    ({"evaluate.passes": 4}, "evaluate.passes: no arm has dropout"),
    ({"arms": {"frozen": {}}}, "'frozen' is the model before training"),
    ({"batch": 17}, "batch: 17, with 16 training rows"),
    ({"calibration": {"rows": 3}}, "calibration.data: names no set of texts"),
    ({"adapt.method": "lorra"}, "adapt.method: 'lorra' is not known. Near: 'lora'"),
    ({"adapt.options": {"also_train": ["layers.0.mlp.up_proj"]}}, "below model.first_block 1"),
    ({"model.dtype": "bfloat16", "adapt.options": {"also_train": ["norm"]}}, "model.dtype: bfloat16 is for frozen weights"),
    ({"model": {"name": "", "dtype": "bfloat16"}, "adapt": {"method": "lisa"}}, "'lm.model.embed_tokens.weight' is trained"),
    ({"arms": {"a": {"model.dtype": "float32"}}}, "model.dtype must be the same for all arms"),
    ({"evaluate.split": "validation"}, "stories: nothing to validate on"),
    ({"loss": "txt"}, "loss: 'txt' is not known. Near: 'text'"),
    ({"loss": "text"}, "loss: 'text' is for 'answers' and all blocks, here 'classes' and model.first_block 1"),
])  # fmt: skip
def test_user_errors(home, tmp_path: Path, capsys, changes, words) -> None:
    config = changed(settings(home), changes)
    config["model"]["name"] = home["lm"]
    path = write(tmp_path, config)
    assert words in refused(capsys, "train", path, "--out", tmp_path / "runs", "--quiet")


def test_positions_below_the_first_block_are_not_trained(home, tmp_path: Path, capsys) -> None:
    adapt = {"method": "lora", "targets": ["c_attn"], "options": {"also_train": ["wpe"]}}
    config = changed(settings(home, adapt=adapt), {"model.name": str(save_lm(tmp_path / "gpt2", "gpt2"))})
    error = refused(capsys, "train", write(tmp_path, config), "--out", tmp_path / "runs", "--quiet")
    assert "trains 'transformer.wpe.weight' below model.first_block 1" in error


def test_the_projection_of_narrow_embeddings_is_not_trained_below_the_first_block(home, tmp_path: Path, capsys) -> None:
    config = changed(
        settings(home, adapt={"method": "lora", "rank": 2}), {"model.name": str(save_opt(tmp_path / "opt"))}
    )
    seen = refused(capsys, "train", write(tmp_path, config), "--out", tmp_path / "runs", "--quiet")
    assert "trains 'model.decoder.project_in.lora_A' below model.first_block 1" in seen
    config["adapt"]["options"] = {"exclude": ["project_in"]}
    assert main(["train", str(write(tmp_path, config)), "--out", str(tmp_path / "runs"), "--quiet"]) == 0
    assert open_run(next((tmp_path / "runs").iterdir())).job.models.width == 8
    config["adapt"] = {"method": "s2ft"}  # its units are those of the whole block
    assert main(["train", str(write(tmp_path, config)), "--out", str(tmp_path / "s2ft"), "--quiet"]) == 0


def test_an_lm_without_a_first_block_is_one_error(home, tmp_path: Path, capsys) -> None:
    path = write(tmp_path, changed(settings(home), {"model.name": str(save_lm(tmp_path / "falcon", "falcon"))}))
    capsys.readouterr()
    error = refused(capsys, "train", path, "--out", tmp_path / "runs", "--quiet")
    assert error.startswith("error: model.first_block: 1; the blocks of FalconForCausalLM")


@pytest.mark.parametrize(
    ("later", "words"),
    [
        ({"train.rates": {"^head": 3.0}}, "'^head' is found in no trained parameter"),
        ({"adapt.method": "lorra"}, "adapt.method: 'lorra' is not known"),
    ],
)
def test_a_later_arm_is_built_before_the_first_one_is_trained(home, tmp_path: Path, capsys, later, words) -> None:
    path = write(tmp_path, settings(home, arms={"lora": {}, "later": later}))
    message = refused(capsys, "train", path, "--out", tmp_path / "runs", "--quiet")
    assert message.startswith("error: arms.later: ") and words in message
    assert not list((tmp_path / "runs").rglob("metrics.jsonl"))


@pytest.mark.parametrize(("change", "words"), [
    ({"train": []}, "one task must"),
    ({"validation": []}, "nothing to validate on"),
    ({"kind": "causal", "options": {"answer": "{text}"}, "validation": [], "limit": 0}, "limit is 0; it must be at least 1"),
    ({"options": {"answers": {"0": " negative", "2": " positive"}}}, "has label '1'"),
    ({"train": ["cifar10"], "limit": None}, "datasets/cifar10: is a set of labelled images"),
])  # fmt: skip
def test_tasks_that_cannot_be_trained(home, tmp_path: Path, capsys, change, words) -> None:
    config = settings(home, tune={"rates": [1e-3, 1e-2]} if "validation" in change and "limit" not in change else None)
    config["tasks"][0] = {**config["tasks"][0], **change}
    assert words in refused(capsys, "train", write(tmp_path, config), "--out", tmp_path / "runs", "--quiet")
