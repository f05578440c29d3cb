"""Arms that merge the adapters of other arms: their weights, heads, choice and files, and every user error."""

from pathlib import Path

import pytest
import torch
from helpers.tiny_runs import SHORT, run_config, written

from vismt.base.errors import UserError
from vismt.engine.training_files import ADAPTER
from vismt.jobs import load_config, make_job, open_run
from vismt.jobs.multitask import classifier_job as classification_job
from vismt.jobs.multitask.config import check
from vismt.jobs.multitask.merging import FILE, TYPES
from vismt.lowrank import combine, read_updates
from vismt.report.comparison import CONSTANT
from vismt.report.results import read_results
from vismt.storage.files import read_sealed

OF = ["digits", "photos"]
EMTAL = {"method": "emtal", "rank": 2, "options": {"n_experts": 4, "cluster": False}}
SMALL = {
    "task": "multitask",
    "model": SHORT,
    "adapt": {"method": "lora", "rank": 2},
    "head": "separate",
    "tasks": [
        {"name": "digits", "train": ["digits"], "test_share": 0.05, "validation_share": 0.03, "limit": 40},
        {"name": "photos", "train": ["photo_crops:train"], "validation_share": 0.1, "test_share": 0.1, "limit": 36},
    ],
    "batch": 16,
    "seeds": [0, 1],
    "arms": {
        "digits": {"trained_tasks": ["digits"]},
        "photos": {"trained_tasks": ["photos"], "adapt.rank": 3},
        "mean": {"merge": {"arms": OF}},
        "sum": {"merge": {"arms": OF, "weights": [0.5, 1.0]}},
        "regmean": {"merge": {"arms": OF, "method": "regmean"}},
    },
    "train": {"steps": 3, "lr": 1.0e-2},
    "evaluate": {"batch": 64},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    return run_config(written(folder / "tasks.yaml", SMALL))


def test_a_merged_arm_is_its_adapters_and_their_heads(run: Path) -> None:
    job = open_run(run).job
    trainings = {arm: job.study.trainings(arm)[0] for arm in job.study.arms}
    digits, photos, mean = (job.loaded(trainings[arm]) for arm in ("digits", "photos", "mean"))
    found = read_updates(trainings["mean"].folder / ADAPTER).low_rank
    expected = combine([trainings[arm].folder / ADAPTER for arm in OF], [0.5, 0.5]).low_rank
    assert found.keys() == expected.keys() and len(found) == 8
    for path, update in found.items():
        assert torch.allclose(update.delta(), expected[path].delta(), atol=1e-7)
    assert torch.equal(mean.head.weight[:10], digits.head.weight[:10])
    assert torch.equal(mean.head.weight[10:], photos.head.weight[10:])
    assert torch.equal(mean.head.bias[10:], photos.head.bias[10:])
    assert not torch.equal(mean.head.weight[10:], digits.head.weight[10:])  # trained on no image of them


def test_the_weight_is_chosen_on_validation_images(run: Path) -> None:
    job = open_run(run).job
    about = read_sealed(job.study.trainings("sum")[0].folder / FILE, "sum", TYPES)
    values = about["validation"]
    assert set(values) == {"0.5", "1"} and values[f"{about['weight']:g}"] == max(values.values())
    assert read_sealed(job.study.trainings("mean")[0].folder / FILE, "mean", TYPES)["weight"] is None


def test_rows_and_interference_are_reported(run: Path) -> None:
    rows = [row for row in read_results(run / "results.jsonl") if row.metric == "accuracy" and row.arm != CONSTANT]
    assert {(row.arm, row.data) for row in rows} == {(arm, task) for arm in SMALL["arms"] for task in OF}
    report = (run / "report.md").read_text()
    assert "## Merged arms" in report and (run / "figures" / "interference.svg").exists()
    assert "merged by regmean of rank 5; 0 of " in report
    job = open_run(run).job
    errors = {}
    for arm in ("mean", "regmean"):
        about = read_sealed(job.study.trainings(arm)[0].folder / FILE, arm, TYPES)
        assert len(about["error"]) == len(about["layers"]) == 8
        errors[arm] = torch.tensor(about["error"]).mean()
    assert errors["regmean"] < errors["mean"]  # it minimises the errors on these inputs
    # By the other seeds, which the report does not show, only RegMean needs the inputs.
    later = {arm: read_sealed(job.study.trainings(arm)[1].folder / FILE, arm, TYPES) for arm in ("mean", "regmean")}
    assert later["mean"]["layers"] == later["mean"]["error"] == [] and len(later["regmean"]["error"]) == 8


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"merge": {"arms": OF}}, "it makes an arm from other arms"),
        (
            {"arms": {"mean": {"merge": {"arms": ["digit"]}}, **SMALL["arms"]}},
            "arms.mean: merge.arms: no trained arm before it is 'digits'",
        ),
        (
            {"arms": {**SMALL["arms"], "late": {"merge": {"arms": ["mean"]}}}},
            "arms.late: merge.arms: no trained arm before it is 'mean'",
        ),
        (
            {"arms": {**SMALL["arms"], "half": {"merge": {"arms": ["digits"]}}}},
            "digits are trained on digits; name arms",
        ),
        ({"arms": {**SMALL["arms"], "odd": {"merge": {"arms": OF, "method": "ties"}}}}, "core_ties"),
        (
            {"arms": {"both": {"trained_tasks": OF}, "one": {"merge": {"arms": ["both"]}}}},
            "only both; name two or more",
        ),
        ({"arms": {"a": {"trained_tasks": ["digit"]}}}, "trained_tasks: no task 'digit'"),
        ({"evaluate": {"risk": True}}, "arms.sum: merge.weights: are chosen on the validation images, of which none"),
        (
            {"tasks": [{"name": "digits", "train": ["a/b", "c/b"], "test_share": 0.1}], "arms": {}},
            "tasks: digits: train: 'a/b' and 'c/b' are both called 'b' in results",
        ),
        ({"arms": {**SMALL["arms"], "photos": {"trained_tasks": ["photos"], "adapt": None}}}, "has no adapter"),
    ],
)
def test_one_line_errors(tmp_path: Path, changes: dict, text: str) -> None:
    with pytest.raises(UserError, match=text) as error:
        check(load_config(written(tmp_path / "tasks.yaml", {**SMALL, **changes})))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"adapt": {"method": "lisa"}}, "arms.mean: merge.arms: 'digits': .*no low-rank factors"),
        ({"adapt": EMTAL}, "arms.mean: merge.arms: 'digits': .*still routes"),
        (
            {"adapt": EMTAL, "fade": {}, "train": {"steps": 0, "lr": 1.0e-2}},
            "arms.mean: merge.arms: 'digits': .*still routes",
        ),
        (
            {"adapt": {"method": "lora", "rank": 2, "options": {"also_train": [".*norm.*"]}}},
            "arms.mean: merge.arms: 'digits' trains 'blocks.0.norm1.weight' whole, which no rule merges",
        ),
        (
            {
                "model": {"name": "test_convnext", "img_size": 32, "pretrained": False},
                "adapt": {"method": "lora", "rank": 2, "targets": ["fc1", "conv_dw"]},
            },
            "arms.mean: covariance: 'stages.0.blocks.0.conv_dw' is a Conv2d in groups",
        ),
        (
            {"model": {"name": "levit_128s", "pretrained": False}},
            "rows of the NormLinear of levit_128s cannot be merged",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused_before_the_training(tmp_path: Path, changes: dict, text: str) -> None:
    arms = {**{name: {"trained_tasks": [name]} for name in OF}, "mean": {"merge": {"arms": OF}}}
    config = load_config(written(tmp_path / "tasks.yaml", {**SMALL, "arms": arms, **changes}))
    job = make_job(config, tmp_path / "run")
    with pytest.raises(UserError, match=text):
        job.check_training()


def test_arms_whose_routers_fade_can_be_merged(tmp_path: Path) -> None:
    arms = {**{name: {"trained_tasks": [name]} for name in OF}, "mean": {"merge": {"arms": OF}}}
    values = {**SMALL, "arms": arms, "adapt": EMTAL, "fade": {"start": 0.5, "end": 1.0}}
    make_job(load_config(written(tmp_path / "tasks.yaml", values)), tmp_path / "run").check_training()


def test_arms_of_several_rules_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    monkeypatch.setattr(
        classification_job, "check_merging_arms", lambda job, data, config: checked.extend(config.merge.arms)
    )
    make_job(load_config(written(tmp_path / "tasks.yaml", SMALL)), tmp_path / "run").check_training()
    assert checked == OF
