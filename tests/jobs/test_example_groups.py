"""Scores of examples that depend on each other: their groups reach every measure, the records, the intervals and the report."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.card_scores import score_set
from helpers.own_images import COLOURS, SIZE, ByColour, write_folder
from helpers.tiny_runs import written
from torch import nn

from vismt.base.errors import UserError
from vismt.cli import main
from vismt.data.batching import InOrder
from vismt.data.images import open_images
from vismt.data.maps.dense_set import DenseSet
from vismt.data.pixels import Pixels
from vismt.engine.study import Training
from vismt.evaluation.ood import Ood
from vismt.evaluation.quality import Quality
from vismt.evaluation.risk import Risk, Thresholds
from vismt.jobs.multitask.config import MultitaskConfig
from vismt.jobs.multitask.maps_data import Rows as Samples
from vismt.jobs.multitask.maps_evaluation import Evaluation
from vismt.jobs.multitask.pooled_score import Scored
from vismt.jobs.robustness.config import RobustnessConfig, RobustnessEvaluateConfig
from vismt.jobs.robustness.data import Cards
from vismt.jobs.robustness.evaluation import corruption_errors
from vismt.jobs.robustness.models import Classifier
from vismt.multitask.tasks.maps import Depth
from vismt.report.results import read_results
from vismt.robustness.corruptions import CorruptionSpec
from vismt.storage.lines import read_lines
from vismt.uncertainty.features import Rows
from vismt.uncertainty.intervals import Measure, wilson

FUNCTION = """
import torch
from torch import nn

def load():
    torch.manual_seed(1)
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)), 3
"""


def cluster_variance(measure: Measure) -> float:
    """Return g / (g - 1) sum over the groups of (sum of the residuals / n)^2."""
    sums: dict[str, float] = {}
    for name, value in measure.values.items():
        sums[measure.groups[name]] = sums.get(measure.groups[name], 0.0) + (value - measure.score) / len(measure.values)
    return len(sums) / (len(sums) - 1) * math.fsum(total**2 for total in sums.values())


def grouped_pixels(folder: Path, count: int = 8) -> Pixels:
    """Return images of three classes, each pair of one object."""
    images = open_images(write_folder(folder, count))
    groups = {name: f"{name[:3]} {int(Path(name).stem) // 2}" for name in images.ids}
    return Pixels(replace(images, groups=groups, group_unit="objects"), SIZE)


def test_every_measure_of_images_has_their_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path / "cache"))
    pixels = grouped_pixels(tmp_path / "data")
    about = {"folder": tmp_path, "fitting": InOrder(pixels, 30)}
    torch.manual_seed(0)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))
    scores = score_set(Classifier(net, 3, SIZE), InOrder(pixels, 30), [CorruptionSpec("fog", 1)], **about)
    scores += corruption_errors({"a": scores})["a"]
    assert {"accuracy", "ECE-15", "AURC", "coverage of sets", "mean error under corruptions"} <= {
        s.measure.metric for s in scores
    }
    for score in scores:
        measure = score.measure
        assert (measure.units, measure.grouped_by) == (12, "objects"), measure.metric
        if measure.metric not in ("ECE-15", "AURC"):
            found = measure.estimate()
            assert 1 <= found.sources[0][1] <= 11 or found.mean in (0, 1)
            assert found.variance == pytest.approx(cluster_variance(measure)) or found.mean in (0, 1)
    accuracy = scores[0].measure
    assert 0 < accuracy.score < 1 and accuracy.interval() != wilson(round(24 * accuracy.score), 24)
    # images that are all of different groups are independent
    others = InOrder(pixels, 30, torch.arange(0, 24, 2))
    alone = score_set(Classifier(ByColour(), 3, SIZE), others, [], folder=tmp_path / "b")
    assert all(not score.measure.groups for score in alone)


def test_images_for_thresholds_are_in_other_groups_than_the_evaluated_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path / "cache"))
    pixels = grouped_pixels(tmp_path / "data")
    cards = Cards(RobustnessConfig(evaluate=RobustnessEvaluateConfig(images=8, threshold_images=8)))
    cards._sets["toys"] = pixels.images
    classifier = Classifier(ByColour(), 3, SIZE)
    parts = [cards.batches("toys", classifier), cards.for_fitting("toys", classifier)]
    ids = [[pixels.ids[i] for i in torch.cat(list(part.parts)).tolist()] for part in parts]
    groups = [{pixels.images.groups[name] for name in names} for names in ids]
    assert [len(names) for names in ids] == [8, 8] and not groups[0] & groups[1]
    cards.config = replace(cards.config, evaluate=replace(cards.config.evaluate, threshold_images=16))
    with pytest.raises(UserError, match=r"images besides the 8 evaluated ones in other groups, not 16"):
        cards.for_fitting("toys", classifier)


def test_detection_has_the_groups_of_both_sets() -> None:
    def rows(values: list[float], **groups: Any) -> Rows:
        return Rows([{"id": str(i), "label": 0, "clean confidence": value} for i, value in enumerate(values)], **groups)

    inside, outside = [i / 10 for i in range(6)], [max(0.0, i / 9 - 0.3) for i in range(4)]
    grouped = rows(inside, groups={str(i): f"g{i // 2}" for i in range(6)}, unit="signs")
    view = SimpleNamespace(score=lambda measure, condition, examples, about: measure)
    (measure,) = Ood(["other"]).scores(view, grouped, {"other": rows(outside)})
    assert (measure.units, measure.grouped_by) == (3 + 4, "signs")
    assert measure.estimate().variance == pytest.approx(cluster_variance(measure))
    assert not Ood(["other"]).scores(view, rows(inside), {"other": rows(outside)})[0].groups


def test_a_score_of_maps_is_by_blocks_of_frames(tmp_path: Path) -> None:
    ids = [f"{number:03d}.png" for number in range(12)]
    blocks = {name: f"block {number // 4}" for number, name in enumerate(ids)}
    images = DenseSet("video", "all", [], ["depth"], ids, dict, groups=blocks, group_unit="blocks of frames")
    evaluation = Evaluation.__new__(Evaluation)
    rows = Samples([(images, i) for i in range(12)])
    evaluation.data = type("Data", (), {"part": lambda self, split: rows, "size": (8, 8)})()
    evaluation.config, evaluation.tasks = MultitaskConfig(size=[8, 8]), {"depth": Depth()}
    values = {f"video:{name}": 1.0 + number // 4 + number / 100 for number, name in enumerate(ids)}
    scored = Scored(math.fsum(values.values()) / 12, {}, values)
    pool = type("Pool", (), {"result": lambda self: scored, "answers": {}, "path": tmp_path / "test.jsonl"})()
    (score,) = evaluation.as_scores({"depth": pool}, Training("arm", None, 0, Path()), "test")
    assert (score.measure.units, score.measure.grouped_by) == (3, "blocks of frames")
    found = score.measure.estimate()
    assert found.sources == ((pytest.approx(cluster_variance(score.measure)), 2.0),)
    assert found.variance > 2 * replace(score.measure, groups={}).estimate().variance


def test_the_records_and_the_report_of_a_run_have_the_groups_of_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "grouped_models.py").write_text(FUNCTION)
    write_folder(tmp_path / "set" / "images")
    groups = {f"{label}/{number:02d}.png": f"{label}{number // 4}" for label in COLOURS for number in range(8)}
    (tmp_path / "set" / "groups.json").write_text(json.dumps(groups))
    (tmp_path / "set" / "card.yaml").write_text(
        "name: toys\nclasses: 3\ngroups: groups.json\nunit: toys\nsources:\n"
        '  - {kind: folder, root: images, layout: "{class}", splits: {all: 24}}\n'
    )
    arms = {
        arm: {"classifier.function": "grouped_models:load", "classifier.size": size}
        for arm, size in (("a", 16), ("b", 8))
    }
    config = {"task": "robustness", "arms": arms, "data": ["set/card.yaml"], "evaluate": {"baseline": "a"}}
    assert main(["run", str(written(tmp_path / "toys.yaml", config)), "--out", "run"]) == 0
    assert "95 % over new examples, 6 toys" in capsys.readouterr().out
    (folder,) = (tmp_path / "run").glob("toys-*")
    rows = [row for row in read_results(folder / "results.jsonl") if row.metric == "accuracy"]
    assert all((row.n, row.parts, row.grouped_by, row.freedom) == (24, 6, "toys", 5.0) for row in rows)
    lines = [line for path in (folder / "records").glob("*.jsonl") for line in read_lines(path)]
    assert lines and {line["group"] for line in lines} == {f"toys {group}" for group in groups.values()}
    assert "95 % over new examples, 6 toys" in (folder / "report.md").read_text()


@pytest.mark.slow
def test_intervals_of_grouped_examples_contain_the_truth() -> None:
    """Five images of each of 60 objects share most of what a net answers; 300 draws, and the mean over them as the truth."""
    generator = torch.Generator().manual_seed(0)
    thresholds = Thresholds(1.0, 0.5, 100)
    view = SimpleNamespace(score=lambda measure, condition, examples: measure)
    ids = [str(number) for number in range(300)]
    groups = {name: f"object {int(name) // 5}" for name in ids}

    def rows() -> list[dict[str, float]]:
        shared = torch.randn(60, 4, generator=generator, dtype=torch.float64).repeat_interleave(5, 0)
        logits = 2 * (0.9**0.5 * shared + 0.1**0.5 * torch.randn(300, 4, generator=generator, dtype=torch.float64))
        truth = torch.multinomial(shared.mul(2).softmax(1)[::5], 1, generator=generator)[:, 0].repeat_interleave(5)
        log_p = logits.log_softmax(1)
        nlls = -log_p.gather(1, truth[:, None])[:, 0]
        columns = {
            "label": truth,
            "clean": log_p.argmax(1),
            "clean nll": nlls,
            "clean confidence": log_p.exp().amax(1),
            "clean brier": log_p.exp().square().sum(1) - 2 * (-nlls).exp() + 1,
            "clean set": (-log_p <= 1.0).sum(1),
        }
        return [{"id": ids[i], **{name: float(values[i]) for name, values in columns.items()}} for i in range(300)]

    found: dict[str, list[tuple[float, tuple[float, float], tuple[float, float]]]] = {}
    for _ in range(300):
        drawn = rows()
        by_kind = []
        for given in (groups, {}):
            of_set = Rows(drawn, given)
            measures = [*Risk(True, thresholds).scores(view, of_set, {}), *Quality(None).scores(view, of_set, {})]
            by_kind.append({measure.metric: replace(measure, groups=given) for measure in measures})
        for name, measure in by_kind[0].items():
            found.setdefault(name, []).append((measure.score, measure.interval(), by_kind[1][name].interval()))
    assert len(found) == 8
    for name, draws in found.items():
        if name == "ECE-15":  # whose mean is not the truth
            continue
        mean = math.fsum(score for score, _, _ in draws) / 300
        wide, narrow = (sum(ends[0] <= mean <= ends[1] for ends in column) / 300 for column in list(zip(*draws))[1:])
        assert wide >= 0.915 and narrow < min(0.9, wide - 0.03), (name, wide, narrow)
