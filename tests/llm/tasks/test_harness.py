"""Tasks of lm-evaluation-harness: from local task files, with the scores of the harness itself on a tiny model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers.lm_parts import save_lm, save_texts, sentiment_task
from helpers.pages import ROOT
from helpers.tiny_runs import refused, run_config, written

from vismt.jobs import open_run
from vismt.report.results import read_results
from vismt.storage.lines import read_lines

lm_eval = pytest.importorskip("lm_eval")

WORDS = ["film", "good", "bad", "was", "the", "a", "and", "story", "long", "short", "dull", "fine"]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA, train: DATA}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
num_fewshot: 1
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
WRITTEN = """
task: tiny_written
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{word}}"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - {name: first, filter: [{function: regex, regex_pattern: "(\\\\w+)"}, {function: take_first}]}
  - {name: all, filter: [{function: take_first}]}
"""
TASKS = {"tiny_choice": CHOICE, "tiny_rolling": ROLLING, "tiny_written": WRITTEN}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that trains on films and is evaluated on three tasks of the harness, and the files of the tasks."""
    folder = tmp_path_factory.mktemp("harness")
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HOME", str(folder / "hub"))
    patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
    rows = [
        {
            "text": f"{WORDS[i % 12]} {WORDS[i * 5 % 12]} {WORDS[i * 7 % 11]}",
            "choices": [f" {WORDS[i % 5]}", f" {WORDS[i % 7 + 3]} {WORDS[i % 3]}"],
            "label": i % 2,
            "word": WORDS[i % 12],
        }
        for i in range(14)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {name: folder / f"{name}.yaml" for name in TASKS}
    for name, path in files.items():
        path.write_text(TASKS[name].replace("DATA", str(folder / "rows.jsonl")))
    films = save_texts(folder)["films"]
    trained = sentiment_task(films, limit=16, validation=[f"{films}:dev"], test=[f"{films}:test"])
    config = {
        "task": "lm",
        "model": {"name": str(save_lm(folder / "tiny"))},
        "tasks": [trained, *({"name": name, "kind": f"lm_eval:{path}"} for name, path in files.items())],
        "adapt": {"method": "lora", "rank": 2, "targets": ["q_proj", "v_proj"]},
        "train": {"steps": 4, "lr": 5e-2},
        "batch": 4,
        "evaluate": {"batch": 4},
    }
    yield run_config(written(folder / "words.yaml", config)), files
    patch.undo()


@pytest.mark.parametrize("name", TASKS)
def test_scores_are_those_of_the_harness(run, name) -> None:
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder, files = run
    job = open_run(folder).job
    net = job.loaded(job.study.find("adapted"))
    model = HFLM(pretrained=net.lm, tokenizer=job.models.tokenizer, batch_size=4)
    loaded = TaskManager(include_defaults=False).load([str(files[name])])
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=1234)  # as simple_evaluate does, which also looks for packages for a minute
    expected = evaluator.evaluate(model, loaded, bootstrap_iters=0)
    rows = [row for row in read_results(folder / "results.jsonl") if row.task == name and row.arm == "adapted"]
    found = {row.metric: row for row in rows if row.seed is None}
    wanted = {
        key.removesuffix(",none"): value
        for key, value in expected["results"][name].items()
        if isinstance(value, float) and "stderr" not in key
    }
    assert found.keys() == wanted.keys() and all(row.n == 14 for row in rows)
    exact = 0 if name != "tiny_rolling" else 1e-6
    for metric, row in found.items():
        assert row.value == pytest.approx(wanted[metric], rel=exact, abs=1e-12)
    (records,) = folder.glob(f"arms/adapted/*/records/test-{name}*.jsonl")
    by_doc = {(sample["doc_id"], sample["filter"]): sample for sample in expected["samples"][name]}
    for record in read_lines(records)[1:]:
        for metric in [key for key in record if key != "id"]:
            plain, _, chosen = metric.partition(",")
            value = by_doc[int(record["id"].rpartition(":")[2]), chosen or "none"][plain]
            assert record[metric] == pytest.approx(list(value) if isinstance(value, tuple) else value, rel=1e-6)


def test_the_adapter_is_active(run) -> None:
    """The frozen model and the adapted one are different models to the harness, and have a paired difference."""
    rows = read_results(run[0] / "results.jsonl")
    value = {row.arm: row.value for row in rows if row.metric == "word_perplexity" and row.seed is None}
    assert value["frozen"] != pytest.approx(value["adapted"], rel=1e-4)
    assert "word_perplexity" in (run[0] / "report.md").read_text()


def test_a_finished_run_is_not_evaluated_again(run, monkeypatch) -> None:
    from vismt.cli import main
    from vismt.llm.tasks.harness import Harness

    monkeypatch.setattr(Harness, "score", None)
    before = (run[0] / "results.jsonl").read_text()
    assert main(["evaluate", str(run[0]), "--quiet"]) == 0 and (run[0] / "results.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"kind": "lm_eval:arc_eesy"}, "no task 'arc_eesy'. Near: 'arc_easy'", marks=pytest.mark.slow),
        ({"kind": "lm_eval:nowhere.yaml"}, "cannot be loaded"),
        ({"prompt": "{text}"}, "has prompts of its own"),
        ({"test": ["films"]}, "leave sets and chat out"),
        ({"options": {"shots": -1}}, "shots 0 or more"),
        ({"options": {"shot": 1}}, "has no option 'shot'"),
    ],
)
def test_user_errors(run, tmp_path: Path, capsys, changes, words) -> None:
    import yaml

    config = yaml.safe_load((run[0] / "config.resolved.yaml").read_text())
    config["tasks"][1] |= changes
    path = written(tmp_path / "words.yaml", config)
    assert words in refused(capsys, "train", path, "--out", tmp_path / "runs", "--quiet")


def test_a_missing_package_is_named(run, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    shutil.copy(run[0] / "config.resolved.yaml", tmp_path / "words.yaml")
    assert 'pip install "vismt[lm-eval]"' in refused(
        capsys, "train", tmp_path / "words.yaml", "--out", tmp_path, "--quiet"
    )


def test_the_model_of_a_run_is_an_object_of_the_harness(run, monkeypatch) -> None:
    """The lines of the guide, for this run and a local task."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/guides/lm.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "HFLM" in block]
    code = block.replace('"runs/study-0123456789"', repr(str(run[0]))).replace('"lora"', '"adapted"')
    names: dict[str, object] = {}
    # Without the index of all tasks, and without the list of packages that the harness reports for a minute.
    code = code.replace(
        '["arc_easy"]', f"[{str(run[1]['tiny_choice'])!r}], task_manager=TaskManager(include_defaults=False)"
    )
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    exec("from lm_eval.tasks import TaskManager\n" + code, names)
    (row,) = [
        row
        for row in read_results(run[0] / "results.jsonl")
        if (row.task, row.metric, row.arm, row.seed) == ("tiny_choice", "acc", "adapted", None)
    ]
    assert names["results"]["results"]["tiny_choice"]["acc,none"] == row.value
