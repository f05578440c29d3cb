"""Checkpoints: every changed bit is noticed, the older one is used, and what does not fit the training is refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from helpers.toy_training import Toy, rewritten, run, stopped
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.config.sections import TrainConfig
from vismt.engine import checkpoint
from vismt.engine.optimizer import make_optimizer
from vismt.storage.lines import read_lines


def load(folder: Path, module: nn.Module | None = None, config_hash: str = "hash") -> tuple[int, int]:
    module = Toy() if module is None else module
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    optimizer = make_optimizer(trained, TrainConfig())
    return checkpoint.load(folder, module, optimizer, None, config_hash)


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path)
    steps = [path.name.split("-")[1] for path in checkpoint.checkpoints(tmp_path)]
    assert steps == ["8", "6"] and len(list(tmp_path.iterdir())) == 3  # and metrics.jsonl


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    newest, older = stopped(tmp_path)
    older.unlink()
    content = newest.read_bytes()
    module, draw = Toy(), random.Random(0)
    header = 8 + int.from_bytes(content[:8], "little")
    for number in range(400):
        flipped = bytearray(content)
        # Half of the flips in the header, which is small.
        place = draw.randrange(8 * (header if number % 2 else len(content)))
        flipped[place // 8] ^= 1 << place % 8
        newest.write_bytes(flipped)
        with pytest.raises(UserError, match="damaged; delete to train from the start"):
            load(tmp_path, module)
    newest.write_bytes(content)
    assert load(tmp_path) == (6, 6)


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: content + b"\0"])
def test_a_damaged_checkpoint_gives_way_to_the_older(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes]
) -> None:
    whole = run(tmp_path / "whole")
    newest, _ = stopped(tmp_path / "cut")
    newest.write_bytes(damage(newest.read_bytes()))
    cut = run(tmp_path / "cut")
    printed = capsys.readouterr().out
    assert f"'{newest}' is damaged; an older one is used" in printed and "at step 3 of 8" in printed
    assert all(torch.equal(one, two) for one, two in zip(whole.parameters(), cut.parameters()))
    assert [row["step"] for row in read_lines(tmp_path / "cut" / "metrics.jsonl")] == list(range(1, 9))
    names = [[path.name for path in checkpoint.checkpoints(tmp_path / name)] for name in ("whole", "cut")]
    assert names[0] == names[1]  # the digest in the name: the same bytes


def test_checkpoints_of_others_are_refused(tmp_path: Path) -> None:
    stopped(tmp_path)
    with pytest.raises(UserError, match="is of configuration hash, this is other"):
        load(tmp_path, config_hash="other")
    module = Toy()
    module.frozen.requires_grad_(True)
    with pytest.raises(UserError, match=r"'model\.frozen\.\w+' is missing"):
        load(tmp_path, module)


STEP, MOMENT = "optimizer.layer.weight.step", "optimizer.layer.weight.exp_avg_sq"
TENSORS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "without a moment": lambda tensors: tensors.pop(MOMENT),
    "a moment of another shape": lambda tensors: tensors.update({MOMENT: torch.tensor(0.5)}),
    "a moment of another dtype": lambda tensors: tensors.update({MOMENT: tensors[MOMENT].double()}),
    "a moment that is not finite": lambda tensors: tensors[MOMENT].fill_(float("nan")),
    "a step that is a bool": lambda tensors: tensors.update({STEP: torch.tensor(True)}),
    "a negative step": lambda tensors: tensors[STEP].fill_(-1),
    "a step of a later update": lambda tensors: tensors[STEP].fill_(7),
    "an unknown key": lambda tensors: tensors.update({"optimizer.layer.weight.max": torch.zeros(1, 4)}),
    "an unknown parameter": lambda tensors: tensors.update({"optimizer.frozen.weight.step": torch.tensor(1.0)}),
    "without a parameter": lambda tensors: tensors.pop("model.layer.bias"),
    "a parameter that is not finite": lambda tensors: tensors["model.layer.bias"].fill_(float("inf")),
    "without random state": lambda tensors: tensors.pop("random.cpu"),
    "a random state of another length": lambda tensors: tensors.update(
        {"random.cpu": torch.zeros(3, dtype=torch.uint8)}
    ),
    "a random state of ones": lambda tensors: tensors["random.cpu"].fill_(255),
}
NUMBERS: list[object] = [
    [],
    None,
    {"step": 6},
    {"step": 6, "updates": 6, "config_hash": "hash", "scaler": None, "base_lrs": -1},
    {"step": True, "updates": 6, "config_hash": "hash", "scaler": None},
    {"step": 5, "updates": 5, "config_hash": "hash", "scaler": None},
    {"step": 6, "updates": 5, "config_hash": "hash", "scaler": None},
    {"step": 6, "updates": 6.0, "config_hash": "hash", "scaler": None},
    {"step": 6, "updates": 6, "config_hash": "hash", "scaler": {"scale": 1.0, "_growth_tracker": 0}},
]


@pytest.mark.parametrize("case", [*TENSORS, *range(len(NUMBERS))])
def test_content_that_no_training_writes_is_refused_and_changes_nothing(tmp_path: Path, case: str | int) -> None:
    newest, _ = stopped(tmp_path)
    tensors = safetensors.torch.load_file(newest)
    with safetensors.safe_open(newest, "pt") as file:
        numbers = json.loads(file.metadata()["state"])
    if isinstance(case, str):
        TENSORS[case](tensors)
    else:
        numbers = NUMBERS[case]
    rewritten(newest, tensors, numbers)
    module, state = Toy(), torch.get_rng_state()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(UserError) as error:
        load(tmp_path, module)
    assert str(checkpoint.checkpoints(tmp_path)[0]) in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_scale_of_fp16_and_its_skipped_updates_are_resumed(tmp_path: Path) -> None:
    def scaler() -> torch.amp.GradScaler:
        made = torch.amp.GradScaler("cpu", init_scale=8.0)
        made.scale(torch.ones(()))  # which makes its tensors
        return made

    module = Toy()
    optimizer = make_optimizer({"layer.weight": module.layer.weight}, TrainConfig())
    used = scaler()
    used.load_state_dict({**used.state_dict(), "scale": 4.0, "_growth_tracker": 3})
    checkpoint.save(tmp_path, 6, module, optimizer, 4, used, "hash")
    fresh = scaler()
    assert checkpoint.load(tmp_path, module, optimizer, fresh, "hash") == (6, 4)
    assert fresh.state_dict() == used.state_dict()
    with pytest.raises(UserError, match="has numbers that no training writes"):
        checkpoint.load(tmp_path, module, optimizer, None, "hash")


@pytest.mark.slow
def test_a_checkpoint_is_written_without_a_copy_of_all_tensors(tmp_path: Path) -> None:
    """Eight tensors of 16 MB: the peak of the memory may grow by a tensor or two, not by all."""
    code = f"""
import resource, torch
from pathlib import Path
from torch import nn
from vismt.engine import checkpoint
module = nn.ParameterList([torch.ones(2**22) for _ in range(8)])
optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
folder = Path({str(tmp_path)!r})
checkpoint.save(folder / "warm", 1, nn.Linear(2, 2), optimizer, 1, None, "hash")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
checkpoint.save(folder, 1, module, optimizer, 1, None, "hash")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert checkpoint.checkpoints(tmp_path)[0].stat().st_size > 8 * 2**24 and float(printed) < 40
