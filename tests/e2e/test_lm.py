"""The language-model job from configuration to report and export: arms, rates, seeds, resume, exact merge, user errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from lm_parts import changed, save_lm, save_texts

from vismt.cli import main
from vismt.engine import checkpoint
from vismt.engine.arms import named_unit
from vismt.engine.lm_report import lm_tables
from vismt.engine.log import read_lines
from vismt.engine.run import open_run
from vismt.llm.tasks.base import gather
from vismt.lowrank.inject import adapted_modules


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> dict[str, object]:
    """A folder with a tiny LM, and the cards."""
    folder = tmp_path_factory.mktemp("lm")
    return {"lm": str(save_lm(folder / "tiny")), **{name: str(path) for name, path in save_texts(folder).items()}}


def settings(home: dict[str, object], **changes: object) -> dict[str, object]:
    films = home["films"]
    return {
        "task": "lm",
        "model": {"name": home["lm"], "first_block": 1},
        "tasks": [
            {
                "name": "sentiment", "kind": "classes", "prompt": "Review: {text}\nSentiment:",
                "options": {"answers": {"0": " negative", "1": " positive"}}, "limit": 16,
                "train": [f"{films}:train"], "validation": [f"{films}:dev"], "test": [f"{films}:test", home["other"]],
            },
            {
                "name": "stories", "kind": "causal", "options": {"answer": "{text}", "length": 16, "end": False},
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
    path = folder / "words.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def study(home, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    config = settings(
        home, seeds=[0, 1], tune={"rates": [1e-3, 3e-2]},
        evaluate={"batch": 4, "temperature": True, "laplace": True, "samples": 5},
        arms={
            "lora": {}, "head": {"adapt": None},
            "polar-vbll": {"adapt.method": "polar", "head": {"name": "vbll", "alternate": {"steps": 1}}},
        },
    )
    assert main(["run", str(write(folder, config)), "--out", str(folder / "runs"), "--quiet"]) == 0
    return next((folder / "runs").iterdir())


def test_every_arm_has_its_rate_its_seeds_and_its_rows(study: Path, home) -> None:
    rows = read_lines(study / "results.jsonl")
    assert list(dict.fromkeys(row["model"] for row in rows)) == ["frozen", "lora", "head", "polar-vbll"]
    sets = [f"{home['films']}:test", str(home["other"])]
    plain, bayes = {"clean", "temperature of validation"}, {"Laplace", "means of the head"}
    for model, extra in (("frozen", set()), ("lora", {"Laplace"}), ("head", {"Laplace"}), ("polar-vbll", bayes)):
        own = [row for row in rows if row["model"] == model]
        assert {(row["data"], row["metric"], row["condition"]) for row in own} == {
            *((data, metric, condition) for data in sets for metric in ("accuracy", "ECE-15", "NLL in nats", "Brier")
              for condition in plain | extra),
            *((str(home["stories"]), metric, "clean") for metric in ("NLL in nats a token", "perplexity")),
        }
    seeds = read_lines(study / "lm_seeds.jsonl")
    for row in rows:
        own = [line["value"] for line in seeds if all(line[key] == row[name] for key, name in (
            ("arm", "model"), ("data", "data"), ("metric", "metric"), ("condition", "condition")))]
        assert len(own) == (1 if row["model"] == "frozen" else 2) and row["value"] == pytest.approx(sum(own) / len(own))
        records = read_lines(study / "records" / f"{row['records']}.jsonl")
        values = [line[row["condition"]] for line in records]
        assert len(values) == row["n"] and sum(values) / row["n"] == pytest.approx(row["value"])
    for arm in ("lora", "head", "polar-vbll"):
        chosen = json.loads((study / "arms" / arm / "chosen.json").read_text())
        assert chosen["validation"][f"{chosen['lr']:g}"] == max(chosen["validation"].values())
        records = read_lines(next((study / "arms" / arm).glob(f"lr-{chosen['lr']:g}-seed-0/records/validation-*.jsonl")))[1:]
        nll = -sum(record["log_p"][record["label"]] for record in records) / len(records)
        assert chosen["validation"][f"{chosen['lr']:g}"] == pytest.approx(math.exp(-nll))
    by = {(row["model"], row["metric"], row["condition"]): row["value"] for row in rows if row["data"] == sets[0]}
    for metric in ("accuracy", "NLL in nats"):  # a temperature changes no answer; a Laplace posterior changes the probabilities
        same = by["lora", metric, "clean"] == pytest.approx(by["lora", metric, "temperature of validation"], abs=1e-12)
        assert same == (metric == "accuracy")
    assert by["lora", "NLL in nats", "clean"] != by["lora", "NLL in nats", "Laplace"]
    assert by["polar-vbll", "NLL in nats", "clean"] != by["polar-vbll", "NLL in nats", "means of the head"]


def test_the_report_pairs_rows_and_tells_tokens(study: Path) -> None:
    report = (study / "report.md").read_text()
    assert "clean (unpaired)" not in report and "Choice of the rate" in report and "Merging" in report and "perplexity" in report
    titles = [table.title for table, _ in lm_tables(study)]
    assert any(title.startswith("stories on") and "116 tokens" in title for title in titles)
    metrics = [line for path in (study / "arms" / "polar-vbll").glob("*/metrics.jsonl") for line in read_lines(path)]
    assert metrics and all("infeasibility" in line and "kl" in line for line in metrics)


def test_blocks_below_the_first_are_not_adapted(study: Path) -> None:
    job = open_run(study).job
    hosts = adapted_modules(job.net("lora:1").lm)
    assert set(hosts) == {f"model.layers.{i}.self_attn.{x}_proj" for i in (1, 2) for x in "qv"}
    assert "lower" not in gather(job.data.training())
    job.data.cache(job.data.training(), job.net("lora:1"), "rows")
    assert "lower" in gather(job.data.training())


def test_evaluating_again_computes_nothing(study: Path, monkeypatch) -> None:
    before = (study / "results.jsonl").read_bytes()
    monkeypatch.setattr("vismt.llm.net.LmNet.hidden", lambda *_: pytest.fail("a row was evaluated again"))
    run = open_run(study)
    run.evaluate()
    assert (study / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize("arm", ["lora", "polar-vbll"])
def test_exports_load_elsewhere_and_answer_alike(study: Path, tmp_path: Path, arm: str) -> None:
    peft = pytest.importorskip("peft")
    for form in ("transformers", "peft"):
        where = ["--format", form, "--to", str(tmp_path / form)]
        assert main(["export", str(study), *where, "--expert", f"{arm}:1", "--quiet"]) == 0
        assert (tmp_path / form / "head.safetensors").exists()
    job = open_run(study).job
    net, ids = job.net(f"{arm}:1"), torch.tensor([[5, 6, 7, 8, 9]])
    base = transformers.AutoModelForCausalLM.from_pretrained(job.config.model.name)
    with torch.no_grad():
        wanted, stock = net.lm(input_ids=ids).logits, base(input_ids=ids).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "transformers")(input_ids=ids).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "peft")(input_ids=ids).logits
    assert (wanted - stock).abs().max() > 1e-4
    assert torch.allclose(merged, wanted, atol=1e-4) and torch.allclose(adapted, wanted, atol=1e-4)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "transformers")
    assert words("a bad film")["input_ids"] == job.models.tokenizer("a bad film")["input_ids"]


def test_merge_writes_a_folder_of_transformers(study: Path) -> None:
    assert main(["merge", str(study), "--expert", "lora", "--quiet"]) == 0
    transformers.AutoModelForCausalLM.from_pretrained(study / "merged")
    assert main(["export", str(study), "--expert", "lora", "--quiet"]) == 2  # timm
    found = json.loads(next((study / "arms" / "lora").glob("lr-*-seed-1/merge.json")).read_text())
    assert found["n"] > 8 and found["different_predictions"] == 0 and found["largest_difference"] < 1e-3 * found["largest_logit"]
    assert not (study / "arms" / "head" / "lr-0.03-seed-1" / "merge.json").exists()


@pytest.mark.parametrize("head", [{}, {"name": "vbll", "alternate": {}}])
def test_an_interrupted_training_goes_on_bit_for_bit(home, tmp_path: Path, monkeypatch, head) -> None:
    path = write(tmp_path, settings(home, head=head))
    assert main(["train", str(path), "--out", str(tmp_path / "straight"), "--quiet"]) == 0
    real = checkpoint.save

    def interrupted(folder: Path, step: int, *rest: object) -> None:
        real(folder, step, *rest)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupted)
    assert main(["train", str(path), "--out", str(tmp_path / "stopped"), "--quiet"]) == 130
    monkeypatch.setattr(checkpoint, "save", real)
    assert main(["train", str(path), "--out", str(tmp_path / "stopped"), "--quiet"]) == 0
    units = [next((tmp_path / name).glob("*/arms/adapted/lr-0.01-seed-0")) for name in ("straight", "stopped")]
    for name in ("head.safetensors", "adapter/adapter.json"):  # which holds the sha256 of the adapter's tensors
        assert (units[0] / name).read_bytes() == (units[1] / name).read_bytes()
    logs = [read_lines(unit / "metrics.jsonl") for unit in units]
    steps = [[{name: value for name, value in line.items() if name != "elapsed_s"} for line in log] for log in logs]
    assert steps[0] == steps[1] and len(steps[0]) == 4


def test_caching_the_lower_blocks_trains_the_same(home, tmp_path: Path) -> None:
    found = []
    for megabytes in (0, 100):
        config = settings(home, model={"name": home["lm"], "first_block": 1, "cache_mb": megabytes})
        assert main(["train", str(write(tmp_path, config)), "--out", str(tmp_path / str(megabytes)), "--quiet"]) == 0
        run = open_run(next((tmp_path / str(megabytes)).iterdir()))
        net = run.job.net()
        found.append(torch.cat([p.detach().flatten() for h in adapted_modules(net.lm).values() for p in (h.lora_A, h.lora_B)]))
    assert torch.allclose(found[0], found[1], atol=1e-4)


CAUSAL = {"name": "sums", "kind": "generation", "prompt": "Question: {question}\nAnswer:",
          "options": {"answer": " {answer}", "gold": "answer", "new_tokens": 3, "pack": True, "length": 32}}


def test_causal_training_with_calibration_and_forgetting(home, tmp_path: Path) -> None:
    choices = {"name": "colours", "kind": "answers", "prompt": "Question: {question}\nAnswer:",
               "options": {"answers": {"one": " {one}", "two": " {two}"}}, "test": [home["colours"]]}
    config = settings(
        home, tasks=[{**CAUSAL, "train": [home["sums"]], "test_share": 0.2}, settings(home)["tasks"][1], choices],
        adapt={"method": "corda", "rank": 2, "options": {"mode": "kpm"}},
        calibration={"data": [home["stories"]], "rows": 3, "batch": 2},
        batch=1, arms={"kpm": {}, "pissa": {"adapt": {"method": "pissa", "rank": 2}}, "fast": {"train.lr": 0.03}},
    )
    assert main(["run", str(write(tmp_path, config)), "--out", str(tmp_path / "runs"), "--quiet"]) == 0
    run = next((tmp_path / "runs").iterdir())
    rows = read_lines(run / "results.jsonl")
    assert {(row["metric"], row["n"]) for row in rows if row["protocol"].startswith("sums")} == {("exact-match accuracy", 2)}
    found = {row["metric"] for row in rows if row["protocol"].startswith("colours")}
    assert found == {"accuracy", "ECE-15", "NLL in nats", "Brier"}
    stories = {row["model"]: row["value"] for row in rows if row["metric"] == "perplexity"}
    assert set(stories) == {"frozen", "kpm", "pissa", "fast"} and len(set(stories.values())) == 4
    unit = named_unit(open_run(run).job.config, run, "kpm")
    assert not (unit.folder / "head.safetensors").exists()
    logged = read_lines(unit.folder / "metrics.jsonl")
    assert logged[-1]["loss"] < logged[0]["loss"] * 1.5 and open_run(run).job.net("kpm").lm.vismt_record.method == "corda"
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        wanted = open_run(run).job.net("kpm").lm(input_ids=ids).logits
        for form in ("peft", "transformers"):  # B A - B0 A0 as one adapter of twice the rank, and folded into the weights
            where = tmp_path / form
            assert main(["export", str(run), "--format", form, "--to", str(where), "--expert", "kpm", "--quiet"]) == 0
            if form == "peft":
                peft = pytest.importorskip("peft")
                assert json.loads((where / "adapter_config.json").read_text())["r"] == 4
                model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(home["lm"]), str(where))
            else:
                model = transformers.AutoModelForCausalLM.from_pretrained(where)
            assert torch.allclose(model.eval()(input_ids=ids).logits, wanted, atol=1e-4), form


def test_weights_that_are_trained_in_place_begin_at_the_first_block(home, tmp_path: Path) -> None:
    arms = {
        "s2ft": {"adapt": {"method": "s2ft", "options": {"ratio": 0.25}}},
        "lisa": {"adapt": {"method": "lisa", "options": {"active": 1, "interval": 1, "train_embeddings": False}}},
    }
    config = settings(home, arms=arms)
    config["model"] = {"name": home["lm"], "first_block": 2}
    assert main(["run", str(write(tmp_path, config)), "--out", str(tmp_path / "runs"), "--quiet"]) == 0
    run = next((tmp_path / "runs").iterdir())
    stock = open_run(run).job.models.stock().state_dict()
    stock = {name: value.clone() for name, value in stock.items()}
    for arm in arms:
        merged = open_run(run).job.merged(arm).state_dict()
        moved = {name for name, value in stock.items() if not torch.equal(value, merged[name])}
        assert any(".layers.2." in name for name in moved), arm
        assert not any(f".layers.{low}." in name or "embed" in name for name in moved for low in (0, 1)), arm
    scores = {(row["model"], row["value"]) for row in read_lines(run / "results.jsonl") if row["metric"] == "perplexity"}
    assert len({value for _, value in scores}) == 3


@pytest.mark.parametrize(("changes", "told"), [
    ({"tasks": []}, "name at least one"),
    ({"head": {"name": "vbl"}}, "no head 'vbl'. Near: 'vbll'"),
    ({"head": {"alternate": {}}}, "set head.name to vbll"),
    ({"model.dtype": "fp8"}, "no precision 'fp8'"),
    ({"model.first_block": 3}, "model.first_block: 3; LlamaForCausalLM has blocks 0 to 2"),
    ({"evaluate.limit": 1}, "evaluate.limit: 1; it must be at least 2"),
    ({"arms": {"frozen": {}}}, "'frozen' is the model before training"),
    ({"batch": 17}, "batch: 17, with 16 training rows"),
    ({"calibration": {"rows": 3}}, "calibration: name sets in data"),
    ({"adapt.method": "lorra"}, "no method 'lorra'. Near: 'lora'"),
    ({"adapt": {"method": "lisa", "options": {"active": 1}}}, "trains the input embeddings"),
    ({"adapt.options": {"also_train": ["layers.0.mlp.up_proj"]}}, "below model.first_block 1"),
    ({"arms": {"a": {"model.dtype": "float32"}}}, "model.dtype must be the same for all arms"),
    ({"evaluate.split": "validation"}, "stories: nothing to validate on"),
])  # fmt: skip
def test_user_errors(home, tmp_path: Path, capsys, changes, told) -> None:
    path = write(tmp_path, changed(settings(home), changes))
    assert main(["train", str(path), "--out", str(tmp_path / "runs"), "--quiet"]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("apart", "told"), [
    ({"train.rates": {"^head": 3.0}}, "'^head' is found in no trained parameter"),
    ({"adapt.method": "lorra"}, "no method 'lorra'"),
])
def test_a_later_arm_is_built_before_the_first_one_is_trained(home, tmp_path: Path, capsys, apart, told) -> None:
    path = write(tmp_path, settings(home, arms={"lora": {}, "apart": apart}))
    assert main(["train", str(path), "--out", str(tmp_path / "runs"), "--quiet"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("error: arms.apart: ") and told in said
    assert not list((tmp_path / "runs").rglob("metrics.jsonl"))


@pytest.mark.parametrize(("change", "told"), [
    ({"train": []}, "one task must"),
    ({"validation": []}, "nothing to validate on"),
    ({"kind": "causal", "options": {"answer": "{text}"}, "validation": [], "limit": 0}, "limit 0; it must be at least 1"),
    ({"options": {"answers": {"0": " negative", "2": " positive"}}}, "has label '1'"),
    ({"train": ["cifar10"], "limit": None}, "is no set of texts"),
])  # fmt: skip
def test_tasks_that_cannot_be_trained(home, tmp_path: Path, capsys, change, told) -> None:
    config = settings(home, tune={"rates": [1e-3, 1e-2]} if "validation" in change and "limit" not in change else None)
    config["tasks"][0] = {**config["tasks"][0], **change}
    assert main(["train", str(write(tmp_path, config)), "--out", str(tmp_path / "runs"), "--quiet"]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
