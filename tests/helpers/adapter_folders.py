"""Changes of saved adapters that keep their digests, so that the check of the values is tested, and what a load leaves."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from torch import Tensor, nn

import vismt
from vismt.base.errors import UserError
from vismt.lowrank.files.description import DESCRIPTION
from vismt.storage.files import sealed

Change = Callable[[Any], Any]


def described(folder: Path) -> dict[str, Any]:
    """Return the content of adapter.json."""
    return json.loads((folder / DESCRIPTION).read_text())


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Write adapter.json with the digest of its content."""
    (folder / DESCRIPTION).write_text(sealed(description))


def edit_text(folder: Path, old: str, new: str) -> None:
    """Replace a text of adapter.json."""
    text = (folder / DESCRIPTION).read_text()
    assert old in text
    write_description(folder, json.loads(text.replace(old, new)))


def edit_tensors(folder: Path, change: Change) -> None:
    """Change the tensors in place; adapter.json stays that of the same save."""
    description = described(folder)
    path = folder / description["tensors"]
    tensors: dict[str, Tensor] = safetensors.torch.load(path.read_bytes())
    change(tensors)
    payload = safetensors.torch.save(tensors)
    path.write_bytes(payload)
    write_description(folder, {**description, "tensors_sha256": hashlib.sha256(payload).hexdigest()})


def state_hash(model: nn.Module) -> str:
    """Return a digest of every tensor of a model, its module types, gradient flags and modes, and what it is adapted with."""
    digest = hashlib.sha256()
    model.state_dict()  # writes the values of S²FT's slices into their weights, as a forward pass does
    for path, module in model.named_modules():
        digest.update(f"{path} {type(module).__qualname__} {module.training}".encode())
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} {value.requires_grad}".encode())
        digest.update(flat.view(-1).numpy().tobytes() if value.dtype.itemsize != 2 else flat.float().numpy().tobytes())
    digest.update(repr(getattr(model, "vismt_record", None)).encode())
    return digest.hexdigest()


Load = Callable[[nn.Module, Path], object]


def refusal(load: Load, model: nn.Module, folder: Path) -> str:
    """Return the message with which a load is refused; fail where it is not, or where the model changes."""
    before = state_hash(model)
    with pytest.raises(UserError) as error:
        load(model, folder)
    assert state_hash(model) == before and "\n" not in str(error.value)
    return str(error.value)


def unharmed(load: Load, model: nn.Module, folder: Path) -> bool:
    """Return whether the model is as it was after a load that is refused, or that succeeds and is undone."""
    before = state_hash(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load(model, folder)
        except UserError as error:
            assert "\n" not in str(error)[:50]
        else:
            vismt.unadapt(model)
    return state_hash(model) == before
