"""Damaged checkpoints and logs of a training: refused and nothing changed, or the training ends as it would have."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from random import Random
from tempfile import mkdtemp

import pytest
import safetensors
import safetensors.torch
import torch
from helpers.adapter_folders import state_hash
from helpers.damage import copied, damage_bytes, damage_json, damage_tensors
from helpers.faults import SOUND, cases, many, tried
from helpers.toy_training import Toy, rewritten, run, stopped
from hypothesis import given
from hypothesis import strategies as st

from vismt.base.errors import UserError
from vismt.config.sections import TrainConfig
from vismt.engine import checkpoint
from vismt.engine.optimizer import make_optimizer
from vismt.storage.lines import read_lines


@cache
def whole() -> tuple[Path, str]:
    """Return a folder with the checkpoints of steps 6 and 3, and the hash of the net that an undisturbed training gives."""
    root = Path(mkdtemp(prefix="vismt-checkpoints-"))
    stopped(root / "cut")
    return root / "cut", state_hash(run(root / "whole"))


def forged(path: Path, random: Random) -> None:
    """Give a checkpoint other tensors or numbers and the digest of the new content."""
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        numbers = json.loads(file.metadata()["state"])
    if random.random() < 0.5:
        damage_tensors(tensors, random)
    else:
        numbers = damage_json(numbers, random)
    rewritten(path, tensors, numbers)


def trial(folder: Path, random: Random, flip_only: bool = False) -> str:
    """Damage a copy of an interrupted training in `folder`, continue it, and return what became of it."""
    source, expected = whole()
    copied(source, folder)
    newest, older = checkpoint.checkpoints(folder)
    is_forged = not flip_only and random.random() < 0.5
    if flip_only:
        content = bytearray(newest.read_bytes())
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        newest.write_bytes(content)
        older.unlink()
    elif is_forged:
        forged(newest, random)
    else:
        damage_bytes(random.choice([newest, older, folder / "metrics.jsonl"]), random)
    module = Toy()
    before, generator = state_hash(module), torch.get_rng_state()
    optimizer = make_optimizer({n: p for n, p in module.named_parameters() if p.requires_grad}, TrainConfig())
    try:
        checkpoint.load(copied(folder, folder.with_name("loaded")), module, optimizer, None, "hash")
    except UserError:
        if state_hash(module) != before or not torch.equal(torch.get_rng_state(), generator):
            return "changed"
    except Exception:
        pass  # the same one below

    def body() -> bool:
        hash_of_net = state_hash(run(folder))
        # What has the digest of its content is what a training wrote: a forged value is only asked to be one.
        return is_forged or hash_of_net == expected

    return tried(body)


@cases(quick=30, campaign=150)
def test_damaged_checkpoints(tmp_path: Path, cases: int) -> None:
    @many(cases)
    @given(st.randoms(use_true_random=False))
    def check(random: Random) -> None:
        assert trial(tmp_path / "run", random) in SOUND

    check()


def test_a_log_that_lost_rows_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, expected = whole()
    folder = copied(source, tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    assert state_hash(run(folder)) == expected
    assert "metrics.jsonl' lacks rows before step 7" in capsys.readouterr().out
    assert [row["step"] for row in read_lines(folder / "metrics.jsonl")] == [7, 8]


def test_a_folder_in_the_place_of_a_checkpoint_is_refused_before_anything_changes(tmp_path: Path) -> None:
    folder = copied(whole()[0], tmp_path / "run")
    newest, older = checkpoint.checkpoints(folder)
    newest.unlink()
    newest.mkdir()
    with pytest.raises(UserError, match=f"'{newest}' is not a file"):
        run(folder)
    assert older.is_file()
