"""What a training changed, by weight: from factors where there are any, from the weights themselves where not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import vismt
from vismt.engine.study import ARMS, write_choice
from vismt.engine.training_files import CHANGES
from vismt.jobs.training_job import weight_changes
from vismt.report.weight_changes import CHANGE, SKEW, STABLE, by_depth, changes_section, measures
from vismt.storage.lines import write_lines


def stack(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(12, 12) for _ in range(3))}).to(dtype)


def changed(model: nn.Module) -> list[dict]:
    return weight_changes(model, vismt.merge(copy.deepcopy(model)))


def test_norm_and_stable_rank_are_those_of_the_whole_matrix() -> None:
    model, stock = stack(), stack()
    vismt.adapt(model, "lora", rank=2)
    for number, block in enumerate(model["blocks"]):
        nn.init.normal_(block.lora_B, std=0.1 * (number + 1))
    merged = vismt.merge(copy.deepcopy(model))
    lines = weight_changes(model, merged)
    assert [line["weight"] for line in lines] == [f"blocks.{number}.weight" for number in range(3)]
    for line in lines:
        before = stock.get_parameter(line["weight"])
        change = (merged.get_parameter(line["weight"]) - before).detach()
        values = torch.linalg.svdvals(change)
        expected = [before.norm(), change.norm(), (change.norm() / values[0]) ** 2]
        assert [line["norm"], line["change"], line["stable_rank"]] == pytest.approx(
            [float(x) for x in expected], rel=1e-4
        )
        assert 1 <= line["stable_rank"] <= 2
    assert torch.equal(model["blocks"][0].weight, stock["blocks"][0].weight)


def test_the_rounding_of_half_precision_is_no_change_of_rank() -> None:
    model = stack(torch.bfloat16)
    vismt.adapt(model, "lora", rank=1)
    for block in model["blocks"]:
        nn.init.normal_(block.lora_B, std=1e-3)  # far below the spacing of the weights
    assert all(line["stable_rank"] == pytest.approx(1, abs=1e-2) for line in changed(model))


def test_weights_trained_in_place_count_as_they_are_and_frozen_ones_do_not() -> None:
    model = stack()
    vismt.adapt(model, "lisa", active=1, layers="blocks")
    with torch.no_grad():
        model["blocks"][1].weight[0, 0] += 2.0
    (line,) = changed(model)
    assert line["weight"] == "blocks.1.weight"
    assert (line["change"], line["stable_rank"]) == pytest.approx((2.0, 1.0))


LINES = [
    {"weight": "model.layers.0.q.weight", "norm": 2.0, "change": 0.2, "stable_rank": 1.0},
    {"weight": "model.layers.0.v.weight", "norm": 1.0, "change": 0.3, "stable_rank": 3.0},
    {"weight": "model.layers.1.q.weight", "norm": 1.0, "change": 0.1, "stable_rank": 2.0},
    {"weight": "model.layers.10.q.weight", "norm": 1.0, "change": 0.8, "stable_rank": 2.0},
    {"weight": "head.weight", "norm": 1.0, "change": 0.1, "stable_rank": 2.0},
]
ZERO = {"weight": "model.layers.1.bias_table", "norm": 0.0, "change": 0.1, "stable_rank": 1.0}  # before the training


def test_numbers_of_a_training() -> None:
    assert by_depth(LINES) == pytest.approx({0: 0.2, 1: 0.1, 10: 0.8})
    assert measures(LINES) == pytest.approx({CHANGE: 0.28, STABLE: 2.0, SKEW: 4.0})
    assert SKEW not in measures(LINES[-1:])


def test_the_section_has_the_chosen_rate_alone(tmp_path: Path) -> None:
    for lr, factor in ((0.1, 1.0), (0.2, 3.0)):
        for seed in (0, 1):
            lines = [{**line, "change": factor * line["change"]} for line in (*LINES, ZERO)]
            write_lines(tmp_path / ARMS / "lora" / f"lr-{lr:g}-seed-{seed}" / CHANGES, lines)
    write_choice(tmp_path / ARMS / "lora" / "chosen.json", "lora", [0.1, 0.2], {0.1: 0.5, 0.2: 0.4})
    section = changes_section(tmp_path, ["lora", "untrained"])
    assert section.tables[0][0].rows == [["lora", "2", "5", "0.28", "2", "4"]]
    assert section.pictures[0].path.read_text().count("<svg")
    assert not changes_section(tmp_path, ["untrained"]).tables


def test_trainings_without_a_skew_are_left_out_of_its_mean(tmp_path: Path) -> None:
    for seed, lines in enumerate((LINES, LINES[:2], LINES)):  # as where LISA drew one block alone
        write_lines(tmp_path / ARMS / "lisa" / f"lr-0.1-seed-{seed}" / CHANGES, lines)
    write_choice(tmp_path / ARMS / "lisa" / "chosen.json", "lisa", [0.1], {})
    assert changes_section(tmp_path, ["lisa"]).tables[0][0].rows[0][-1] == "4"
