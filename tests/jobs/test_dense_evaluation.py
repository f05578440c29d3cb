"""Scores of a dense run do not depend on the canvas that an image is padded to."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from vismt.data.maps.dense_set import DenseSet
from vismt.engine.study import ALONE, Study, Training
from vismt.evaluation.adjust_logits import ADJUSTED, AdjustLogits
from vismt.evaluation.corruptions import Corruptions
from vismt.evaluation.risk import Risk
from vismt.jobs.evaluation_job import mean_scores
from vismt.jobs.multitask import maps_evaluation as dense_evaluation
from vismt.jobs.multitask.config import MultitaskConfig, MultitaskEvaluateConfig, all_tasks
from vismt.jobs.multitask.figures import sections
from vismt.jobs.multitask.maps_data import FittedImages, Rows
from vismt.jobs.multitask.maps_evaluation import Evaluation
from vismt.multitask.tasks import Task
from vismt.robustness.conditions import CorruptionConfig
from vismt.storage.files import read_sealed
from vismt.storage.lines import read_lines
from vismt.uncertainty.features import Inputs
from vismt.uncertainty.intervals import CLEAN, Score

INPUTS = Inputs(tasks=())


class Samples:
    """Samples as DenseData holds them, on the canvas of the configuration."""

    def __init__(self, samples: list[dict[str, torch.Tensor]], config: MultitaskConfig, files: str = "") -> None:
        targets = [name for name in samples[0] if name != "image"]
        ids, self.decoded = [str(i) for i in range(len(samples))], []

        def stored(i: int) -> dict[str, torch.Tensor]:
            self.decoded.append(i)
            return samples[i]

        images = DenseSet("made", "all", [], targets, ids, stored, lambda i: files and f"{files}{i}")
        self.size, self.tasks = tuple(config.size), {task.name: task for task in all_tasks(config)}
        self.rows = Rows([(images, i) for i in range(len(samples))])

    def part(self, name: str) -> Rows:
        return self.rows

    def class_counts(self, task: Task) -> list[int]:
        return [9, 1]

    def classes(self, part: str, task: Task) -> torch.Tensor:
        return torch.tensor([int(self.rows.fitted(i, self.size)["class"]) for i in range(len(self.rows))])

    def class_groups(self, part: str, task: Task) -> list[str]:
        return []

    def whole_images(self, part: str, task: Task) -> FittedImages:
        return FittedImages(self.rows, self.size)


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """evaluated(tasks, samples, canvas): the validation score when a task's prediction is the image's first channels."""

    def shown(net, tasks, images, **options):
        whole = {"classify": images[:, :2, 0, 0]}
        return {name: whole.get(name, images[:, : task.channels]) for name, task in tasks.items()}

    monkeypatch.setattr(dense_evaluation, "predict", shown)
    monkeypatch.setattr(dense_evaluation, "fingerprint", lambda training: "of none")

    def score(tasks, samples, canvas):
        folder = tmp_path / "x".join(map(str, canvas))
        (folder / "records").mkdir(parents=True)
        config = MultitaskConfig(tasks=tasks, size=list(canvas))
        evaluation = Evaluation(Study(config, tmp_path), Samples(samples, config))
        training = Training(ALONE, 1e-3, 0, folder)
        result, *_ = evaluation.scores(lambda: None, training, "validation", folder, INPUTS)
        assert evaluation.scores(pytest.fail, training, "validation", folder, INPUTS)[0] == result
        # one task: the quality is its score, 1 / score where lower is better
        expected = 1 / result.measure.score if result.measure.better == "lower" else result.measure.score
        assert evaluation.quality([result]) == pytest.approx(expected)
        return evaluation.quality([result])

    return score


def lines(edge_columns: list[int], predicted_columns: list[int]) -> dict[str, torch.Tensor]:
    """512 x 384 pixels with true lines, and a picture whose first channel is a sure prediction of others."""
    edge, image = torch.zeros(512, 384, dtype=torch.int64), torch.full((3, 512, 384), -20.0)
    edge[:, edge_columns] = 1
    image[:, :, predicted_columns] = 20.0
    return {"image": image, "edge": edge}


def test_the_tolerance_of_edges_is_that_of_the_image_and_not_of_the_canvas(evaluated) -> None:
    # The diagonal of the image is 640 px, times 0.0075 is 4.8; of the canvas 724 px, 5.4. The line at 100 is met at 104 and
    # the one at 300 missed at 305: P = R = 1/2.
    samples = [lines([100, 300], [104, 305]), lines([100, 300], [104, 305])]
    tasks = [{"name": "edge", "max_dist": 0.0075, "thresholds": 1}]
    assert evaluated(tasks, samples, (512, 384)) == pytest.approx(0.5)
    assert evaluated(tasks, samples, (512, 512)) == pytest.approx(0.5)
    assert evaluated([{**tasks[0], "max_dist": 0.0085}], samples, (512, 520)) == pytest.approx(1)  # 5.4 px


@pytest.mark.parametrize("task", [
    {"name": "semseg", "classes": 2}, "depth", "normals", "saliency", {"name": "parts", "classes": 2},
    {"name": "classify", "classes": 2},
])  # fmt: skip
def test_other_scores_are_the_same_on_any_canvas(evaluated, task) -> None:
    generator = torch.Generator().manual_seed(0)
    key = {"classify": "class"}.get(name := task if isinstance(task, str) else task["name"], name)
    samples = []
    for label in range(3):
        image, labels = torch.rand(3, 24, 16, generator=generator), torch.randint(0, 2, (24, 16), generator=generator)
        labels[:, 9:12] = 255
        normals = torch.nn.functional.normalize(torch.randn(3, 24, 16, generator=generator), dim=0)
        target = {"depth": image[1] + 1, "normals": normals, "class": torch.tensor(label % 2)}.get(key, labels)
        samples.append({"image": image, key: target})
    tight, wide = (evaluated([task], samples, canvas) for canvas in ((24, 16), (24, 40)))
    assert tight == wide and math.isfinite(tight)


def test_corruptions_do_not_reach_the_padding(evaluated, tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = [
        {"image": (image := torch.rand(3, 24, 16, generator=generator)), "depth": image[0] + 0.1} for _ in range(3)
    ]
    for name, severity in (("gaussian_noise", 3), ("contrast", 5)):
        values, features = [], [Corruptions([CorruptionConfig(name, [severity])])]
        for canvas in ((24, 16), (24, 40)):
            config = MultitaskConfig(tasks=["depth"], size=list(canvas))
            evaluation = Evaluation(Study(config, tmp_path), Samples(samples, config))
            folder = tmp_path / f"{canvas}-{name}"
            args = (lambda: None, Training(ALONE, 1e-3, 0, tmp_path), "validation", folder, INPUTS, features)
            clean, corrupted = (of["depth"].result() for of in evaluation.pooled(*args).values())
            assert corrupted.value > clean.value + 0.05
            values.append(corrupted)
        assert values[0] == values[1]


def test_the_prior_is_taken_out_by_the_tau_of_validation(evaluated, tmp_path) -> None:
    # Class 1 is rare and its pixels, a quarter, have z_0 - z_1 = 1; those of class 0 have 3. With log 9 = 2.2, tau = 1/2 makes
    # all right, none calls everything class 0 (mIoU (3/4 + 0) / 2), and from 3/2 on everything is class 1.
    labels = torch.zeros(8, 8, dtype=torch.int64)
    labels[:2] = 1
    image = torch.stack([torch.where(labels == 1, 1.0, 3.0), torch.zeros(8, 8), torch.zeros(8, 8)])
    samples = [{"image": image, "semseg": labels, "depth": image[0]} for _ in range(3)]
    config = MultitaskConfig(tasks=[{"name": "semseg", "classes": 2}, "depth"], size=[8, 8])
    evaluation, training = (
        Evaluation(Study(config, tmp_path), Samples(samples, config)),
        Training(ALONE, 1e-3, 0, tmp_path),
    )
    arguments = (training, "test", tmp_path, INPUTS, [AdjustLogits(True)])
    plain, *_, score = evaluation.scores(lambda: None, *arguments)
    assert (plain.task, plain.condition, plain.measure.score) == ("semseg", CLEAN, pytest.approx(3 / 8))
    assert (score.task, score.condition, score.measure.score) == ("semseg", ADJUSTED, pytest.approx(1))
    assert read_sealed(tmp_path / "adjust_logits-semseg.json", "tau")["tau"] == 0.5
    *_, never = evaluation.scores(pytest.fail, *arguments)  # it is on record
    assert never == score and len(read_lines(tmp_path / "test.jsonl")) == 1 + 3


def test_an_undefined_score_is_a_row_that_gives_the_reason(evaluated, tmp_path) -> None:
    labels = torch.zeros(8, 8, dtype=torch.int64)
    image = torch.stack([torch.ones(8, 8), torch.zeros(8, 8), torch.zeros(8, 8)])
    samples = [{"image": image, "semseg": labels, "depth": image[0]} for _ in range(3)]
    tasks = [{"name": "semseg", "classes": 3, "absent": "nan"}, "depth"]  # classes 1 and 2 are nowhere
    config, folder = MultitaskConfig(tasks=tasks, size=[8, 8]), tmp_path / "arms" / ALONE / "lr-0.001-seed-0"
    (folder / "records").mkdir(parents=True)
    evaluation, training = (
        Evaluation(Study(config, tmp_path), Samples(samples, config)),
        Training(ALONE, 1e-3, 0, folder),
    )
    scores = evaluation.scores(lambda: None, training, "test", folder / "records", INPUTS)
    assert {score.task for score in scores} == {"depth"}
    assert evaluation.scores(pytest.fail, training, "test", folder / "records", INPUTS) == scores  # it is on record
    # sqrt(q * 1e-6) for the two scores; a defined one is better.
    defined = evaluation.quality(scores)
    assert evaluation.quality(scores, 1) == pytest.approx(math.sqrt(defined * 1e-6))
    skipping = MultitaskConfig(tasks=[{**tasks[0], "absent": "skip"}, "depth"], size=[8, 8])
    ((table, _),) = sections(tmp_path)[0].tables
    assert table.rows[0][:3] == [f"{ALONE}/lr-0.001-seed-0", "test", "semseg"] and "semseg is nan" in table.rows[0][3]
    changed = Evaluation(Study(skipping, tmp_path), Samples(samples, skipping))  # of the same record
    again = changed.scores(pytest.fail, training, "test", folder / "records", INPUTS)
    assert {score.task for score in again} == {"semseg", "depth"}
    other = Score("depth", "made", "", scores[0].measure, scores[0].condition)
    semseg = Score("semseg", "made", "", scores[0].measure, scores[0].condition)
    assert mean_scores([[other, semseg], [other]]) == mean_scores([[other], [other]])  # no mean over some of the seeds


def test_a_record_of_fewer_images_has_their_scores(evaluated, tmp_path) -> None:
    samples = [{"image": torch.full((3, 8, 8), value), "depth": torch.ones(8, 8)} for value in (1.0, 2.0, 4.0)]
    evaluation = Evaluation(
        Study(config := MultitaskConfig(tasks=["depth"], size=[8, 8]), tmp_path), Samples(samples, config)
    )
    training = Training(ALONE, 1e-3, 0, tmp_path)
    score, *_ = evaluation.scores(lambda: None, training, "test", tmp_path, INPUTS)
    evaluation.data = Samples(samples[:2], config)
    fewer, *_ = evaluation.scores(pytest.fail, training, "test", tmp_path, INPUTS)
    assert (len(score.measure.values), len(fewer.measure.values)) == (3, 2) and fewer.examples not in (
        "",
        score.examples,
    )
    evaluation.data = Samples(samples[1:], config)  # others of the same names
    others = evaluation.scores(lambda: None, training, "test", tmp_path / "others", INPUTS)
    assert others[0].examples not in (fewer.examples, "")
    assert evaluation.data.decoded == [0, 1]  # once, also for the digest


def test_records_and_thresholds_of_changed_files_are_named(evaluated, tmp_path, capsys) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(80, 3, 8, 8, generator=generator)
    tasks = [{"name": "classify", "classes": 2}]
    config = MultitaskConfig(tasks=tasks, size=[8, 8], evaluate=MultitaskEvaluateConfig(risk=True, batch=80))
    training = Training(ALONE, 1e-3, 0, tmp_path)

    def scores(images: torch.Tensor, files: str, folder: Path = tmp_path) -> list[Score]:
        samples = [{"image": image, "class": torch.tensor(i % 2)} for i, image in enumerate(images)]
        evaluation = Evaluation(Study(config, tmp_path), Samples(samples, config, files))
        return evaluation.scores(lambda: None, training, "test", folder, INPUTS, [Risk(True)])

    first = scores(images, "first")
    assert scores(images, "first") == first and "other" not in capsys.readouterr().out
    assert scores(3 * images, "second") == first  # which are on record
    out = capsys.readouterr().out
    assert "is of other examples than are there now" in out and "is of other validation images" in out
    assert scores(3 * images, "second", tmp_path / "second") != first  # surer, and as often right
