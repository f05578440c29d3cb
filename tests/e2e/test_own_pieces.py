"""The head, attack, merging rule, balancer and backbone of docs/extending.md, named by configurations of runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from helpers.blank import empty_figures
from helpers.pages import ROOT, blocks
from helpers.tiny_runs import CONFIGS, run_config, written

import vismt
from vismt.backbones.any_module import backbone_of
from vismt.base.errors import UserError
from vismt.engine import training_files
from vismt.jobs import open_run
from vismt.metatune.amt.selection_rules import RULES, MergeSettings
from vismt.metatune.probes.linear import LogisticProbe
from vismt.metatune.protonet import ProtoNet
from vismt.metatune.settings import HEADS
from vismt.multitask.balancing.base import BALANCERS, make_balancer
from vismt.report.results import read_results
from vismt.robustness.attacks import ATTACKS, AttackSpec, attack

PAGE = ROOT / "docs" / "extending.md"
SECTIONS = ("A balancer", "A few-shot head", "An attack", "A merging rule", "A backbone")
TABLES = (RULES, HEADS, BALANCERS, ATTACKS)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder, with a module `mine` that has the code of the page."""
    empty_figures(monkeypatch)
    code = "\n".join(blocks(PAGE, "python", heading)[0].code for heading in SECTIONS)
    code = re.sub(r"^own = .*\nresults = .*\nprint\(results\)$", "", code, flags=re.M)
    (tmp_path / "mine.py").write_text(f"import timm, torch\n{code}")
    monkeypatch.chdir(tmp_path)
    for table in TABLES:  # what is registered here is not known to other tests
        monkeypatch.setattr(table, "_items", dict(table._items))
    yield tmp_path
    sys.modules.pop("mine", None)


def test_a_few_shot_run_knows_them_by_its_module(mine: Path) -> None:
    config = CONFIGS["pool"]
    path = written(
        mine / "pool.yaml",
        {
            **config,
            "module": "mine",
            "model": {"name": "narrow_vit", "img_size": 32, "pretrained": False, "block": 0},
            "pool": {**config["pool"], "select": "nearest_prototypes"},
            "select": None,
            "evaluate": {
                **config["evaluate"],
                "models": ["frozen+nearest", "merged", "merged:average"],
                "attacks": [{"name": "corners", "epsilon": "8/255", "steps": 3}],
            },
        },
    )
    run = run_config(path)
    rows = read_results(run / "results.jsonl")
    assert {row.arm for row in rows} == {"frozen+nearest", "merged", "merged:average"}
    assert {row.condition for row in rows} == {"clean", "corners-3 linf 8/255"}
    sys.modules.pop("mine")  # as in another process
    for table, name in zip(TABLES, ("nearest_prototypes", "nearest", "geometric", "corners"), strict=True):
        del table._items[name]
    assert open_run(run).config.pool.select == "nearest_prototypes"


def test_a_multi_task_run_trains_with_its_balancer(mine: Path) -> None:
    config = {**CONFIGS["multitask"], "module": "mine", "balancing": {"method": "geometric"}}
    run = run_config(written(mine / "tasks.yaml", config))
    assert len(list(run.rglob(training_files.DONE))) == 1


def test_each_does_what_the_page_says(mine: Path) -> None:
    sys.path.insert(0, str(mine))
    try:
        import mine as pieces  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(mine))
    balancer = make_balancer("geometric", ["a", "b", "c"])
    values = torch.tensor([2.0, 0.5], requires_grad=True)
    balancer.combine({"a": values[0], "c": values[1]}, [values]).backward()
    assert values.grad.tolist() == pytest.approx([0.5, 2.0])  # the gradient of log a + log c

    torch.manual_seed(0)
    images, labels = torch.rand(12, 3, 32, 32), torch.arange(12) % 3
    net = ProtoNet(backbone_of(timm.create_model("narrow_vit", num_classes=0), 32))
    probe = pieces.NearestMean(net)
    inputs, labels, _, _, _ = LogisticProbe(net).inputs(torch.randn(12, 5), labels)
    weight, bias = probe.fit(inputs, labels, torch.ones(12))
    means = torch.stack([inputs[labels == k].mean(0) for k in range(3)])
    assert torch.equal((inputs @ weight.T + bias).argmax(1), torch.cdist(inputs, means).argmin(1))

    cosines = torch.rand(2, 12, 3)
    zeta = RULES["nearest_prototypes"](cosines, labels, 10.0, MergeSettings(beta=5.0))
    assert (
        float(zeta.sum()) == pytest.approx(1)
        and zeta.argmax() == cosines.gather(2, labels.expand(2, -1)[..., None]).mean((1, 2)).argmax()
    )

    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 3))
    answers = linear(images).argmax(1)
    found = attack(linear, images, answers, AttackSpec("corners", 0.1, steps=20), num_classes=3)
    assert float((found - images).abs().max()) <= 0.1 + 1e-6
    assert not torch.equal(linear(found).argmax(1), answers)


def test_a_class_in_place_of_a_name_is_one_line(mine: Path) -> None:
    with pytest.raises(UserError, match=r"head: LogisticProbe is a class; register it, HEADS.add\('mine'"):
        vismt.evaluate_fewshot("test_vit", "digits", head=LogisticProbe)
