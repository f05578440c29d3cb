"""The files of a finished training: those that it wrote, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny import tiny_vit

import vismt
from vismt.base.errors import UserError
from vismt.engine.study import Training
from vismt.engine.training_files import check_files, finish, read_done, restore
from vismt.storage.files import write_tensors


def finished(folder: Path, value: float) -> Path:
    model = tiny_vit()
    vismt.adapt(model, "lora", rank=2)
    write_tensors(folder / "head.safetensors", {"weight": torch.full((2,), value)})
    write_tensors(folder / "checkpoint-1-0123456789ab.safetensors", {"weight": torch.zeros(1)})
    finish(model, folder, True, {"method": "lora"})
    return folder


def test_files_of_another_training_are_refused(tmp_path: Path) -> None:
    folder, other = finished(tmp_path / "a", 1.0), finished(tmp_path / "b", 2.0)
    training = Training("adapted", 0.01, 0, folder)
    (folder / "checkpoint-1-0123456789ab.safetensors").unlink()  # no part of the result
    assert read_done(training) == {"method": "lora"}
    restore(tiny_vit(), training)
    (folder / "head.safetensors").write_bytes((other / "head.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"head\.safetensors is missing or was changed after the training"):
        restore(tiny_vit(), training)
    (other / "adapter" / "adapter.json").unlink()
    with pytest.raises(UserError, match=r"adapter/adapter\.json is missing or was changed"):
        check_files(other)
