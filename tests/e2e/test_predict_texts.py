"""`vismt predict` of language models: what is written, greedily or drawn, and the choices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lm_parts import save_lm, save_texts, sentiment_task
from helpers.tiny_runs import TRAIN, run_config, written

import vismt
from vismt.base.errors import UserError
from vismt.cli import main
from vismt.jobs import open_run

transformers = pytest.importorskip("transformers")
SUMS = {"name": "sums", "kind": "causal", "prompt": "{question} =", "options": {"answer": " {answer}", "length": 32}}


def make_run(folder: Path, task: dict[str, Any], **more: Any) -> Path:
    config = {
        "task": "lm",
        "model": {"name": str(save_lm(folder / "lm"))},
        "tasks": [task],
        "adapt": {"method": "lora", "rank": 2, "targets": ["q_proj", "v_proj"]},
        "train": TRAIN,
        "batch": 2,
        "evaluate": {"batch": 2, **more},
    }
    return run_config(written(folder / "texts.yaml", config))


def rows_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_text_is_that_of_the_merged_model_greedy_or_drawn(tmp_path: Path) -> None:
    sums = save_texts(tmp_path)["sums"]
    run = make_run(tmp_path, {**SUMS, "train": [str(sums)], "test_share": 0.3})
    asked = rows_of(
        tmp_path / "asked.jsonl", [{"question": f"what is {a} plus one"} for a in ("one", "two", "three four")]
    )
    command = ["predict", str(run), str(asked), "--new-tokens", "6", "--quiet"]
    assert main(command) == 0
    found = [json.loads(line) for line in (run / "predictions/predictions.jsonl").read_text().splitlines()]

    folder = run.parent / "merged"
    assert main(["export", str(run), "--format", "transformers", "--to", str(folder), "--quiet"]) == 0
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for row in found:
        ids = tokenizer(row["question"] + " =", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            for _ in range(6):
                ids = torch.cat([ids, lm(ids).logits[:, -1:].argmax(-1)], 1)
        new = ids[0, -6:].tolist()
        new = new[: new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new
        assert row["predicted_text"] == tokenizer.decode(new, skip_special_tokens=True) and row["question"].endswith(
            "plus one"
        )

    drawn = [
        vismt.predict(run, asked, to=tmp_path / "p", new_tokens=6, temperature=9.0, seed=s).rows for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0] != found
    with pytest.raises(UserError, match="top is for models that choose among classes"):
        vismt.predict(run, asked, top=2)
    other = rows_of(tmp_path / "other.jsonl", [{"text": "two"}])
    with pytest.raises(UserError, match="no field 'question'"):
        vismt.predict(run, other)

    # A bad line, and a row without the field, are rows with their errors.
    asked.write_text(asked.read_text().replace("\n", '\n{"question": \n\n[1]\n', 1))
    command = ["predict", str(run), str(asked), str(other), "--new-tokens", "6"]
    assert main([*command, "--quiet"]) == 2
    again = [json.loads(line) for line in (run / "predictions/predictions.jsonl").read_text().splitlines()]
    errors = [row.get("predicted_error", "") for row in again]
    assert [again[0], again[3], again[4]] == found
    assert "line 2: is not a JSON object" in errors[1] and "line 4: is not a JSON object" in errors[2]
    assert "no field 'question'" in errors[5] and again[5]["text"] == "two"


def test_classes_have_probabilities_and_sets_beside_the_fields_of_a_row(tmp_path: Path) -> None:
    films = save_texts(tmp_path)["films"]
    run = make_run(tmp_path, sentiment_task(films, train=[f"{films}:dev"], validation=[f"{films}:train"]), risk=True)
    given = [{"text": "the film was dull", "label": "gold"}, {"text": "the sky was very bright", "set": 1}]
    asked = rows_of(tmp_path / "asked.jsonl", given)
    rows = vismt.predict(run, asked).rows
    assert [{name: row[name] for name in own} for own, row in zip(given, rows)] == given
    with pytest.raises(UserError, match=r"row 'predictions:all:0' has the field 'predicted_label'.*rename the field"):
        vismt.predict(run, run / "predictions/predictions.jsonl", to=tmp_path / "again")
    before = asked.rename(tmp_path / "predictions.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"predictions.jsonl' is an input and would be replaced by an output"):
        vismt.predict(run, tmp_path / "predictions.jsonl", to=tmp_path)
    assert (tmp_path / "predictions.jsonl").read_bytes() == before
    job = open_run(run).job
    (training,) = job.study.trainings("adapted")
    net, task = job.fold(0).evaluation.net(training), job.data.tasks["sentiment"]
    for row in rows:
        with torch.no_grad():
            item = task.encode("a", {**row, "label": "0"}, job.models.tokenizer)
            p = net.head(net.features(job.fold(0).evaluation.batch([item], net)))[0].double().softmax(0)
        assert row["predicted_label"] == str(int(p.argmax())) and row["predicted_probability"] == pytest.approx(
            float(p.max()), abs=1e-5
        )
        quantile = job.fitted(training)["quantiles"]["sentiment"]
        assert len(json.loads(row["predicted_set"])) == int((-p.log() <= quantile).sum())


def test_choices_of_a_row_are_named_as_the_row_has_them(tmp_path: Path) -> None:
    colours = save_texts(tmp_path)["colours"]
    answers = {name: f" {{{name}}}" for name in ("one", "two", "three")}
    task = {"name": "colours", "kind": "answers", "prompt": "{question}?", "options": {"answers": answers}}
    run = make_run(tmp_path, {**task, "train": [str(colours)], "test_share": 0.3})
    asked = rows_of(
        tmp_path / "asked.jsonl",
        [
            {"question": "what colour", "one": "blue", "three": "green"},
            {"question": "what colour", "one": "blue", "two": "green", "three": "very bright"},
        ],
    )
    rows = vismt.predict(run, asked, top=3).rows
    labels = {rows[0]["predicted_label"], rows[0]["predicted_label_2"]}
    assert labels == {"one", "three"} and "predicted_label_3" not in rows[0]
    assert sum(rows[1][f"predicted_probability{ending}"] for ending in ("", "_2", "_3")) == pytest.approx(1)
