"""The benchmark of the core on tiny models: every row, its ratios, and the JSON file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import images, tiny_vit
from torch import Tensor, nn

from scripts.bench import core
from scripts.bench.__main__ import main
from scripts.bench.core import COMPILE, HALF, IN_RUN, LORA, PEFT, RECOMPUTE
from scripts.bench.timing import SAVED, Ratios
from vismt.engine import blocks


@pytest.fixture(scope="module")
def result() -> Ratios:
    torch.compiler.reset()

    def loss(model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(images().to(model.patch_embed.proj.weight.dtype)), torch.arange(3))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BACKEND", "aot_eager")
        patch.setattr(core, "RANK", 2)
        return core.compare("tiny", tiny_vit().train(), loss, "head", 2, torch.device("cpu"), (0.95, 0.65))


def test_rows_and_saved_bytes(result: Ratios) -> None:
    saved = result.sizes[SAVED]
    assert set(saved) == set(result.timing.seconds)
    assert saved[RECOMPUTE] < 0.8 * saved[LORA] and saved[LORA] <= saved[PEFT]
    assert saved[HALF] < 0.7 * saved[LORA]
    assert 0 < saved[COMPILE] <= 1.1 * saved[LORA]
    text = str(result)
    for line in (
        "time of vismt lora, bf16 / peft lora, bf16: ",
        "saved activations of vismt lora, recompute / peft lora: ",
    ):
        assert line in text
    assert "(" in text and ".." in text


def test_results_as_json(result: Ratios, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "run", lambda rounds, device: [result])
    file = tmp_path / "core.json"
    assert main(["core", "--rounds", "2", "--json", str(file)]) in (0, None)
    content = json.loads(file.read_text())
    assert content["bench"] == "core" and content["rounds"] == 2 and "torch" in content["versions"]
    (entry,) = content["results"]
    assert entry["sizes"][SAVED] == result.sizes[SAVED] and entry["text"] == str(result)
    assert content["command"] == "python -m scripts.bench core --rounds 2 --device cpu" and len(content["date"]) == 10
    names = [comparison["name"] for comparison in entry["comparisons"]]
    assert names == [LORA, RECOMPUTE, HALF, HALF, IN_RUN, RECOMPUTE]
    assert entry["comparisons"][0] | {"ratio": 0, "low": 0, "high": 0} == {
        "what": "time",
        "name": LORA,
        "base": PEFT,
        "ratio": 0,
        "low": 0,
        "high": 0,
        "target": 0.95,
    }
    median, low, high = entry["timing"]["ratios"][HALF][PEFT]
    assert low <= median <= high and median == result.timing.ratio(HALF, PEFT)[0]


def test_a_folder_that_does_not_exist_is_named_before_the_measurement(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["core", "--json", str(tmp_path / "none" / "x.json")]) == 2
    assert "none does not exist; make it first" in capsys.readouterr().err


def test_a_bench_without_rounds_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["core", "--rounds", "0"]) == 2
    assert capsys.readouterr().err == "error: bench: --rounds 0; it must be at least 1.\n"
