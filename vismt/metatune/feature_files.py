"""Features on disk: one safetensors file in the cache folder for each (weights, images, machine).

The name is a digest of everything that a feature depends on: the values of all weights, the structure of the model, the
images, and what decides the order of sums (threads, instruction set, versions). Files hold rows and features and a digest
of both; a damaged file is deleted and its features are computed again. The files used longest ago are deleted when all
together take more than LIMIT bytes. Where the folder cannot be written, one notice is given and features stay in memory.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vismt import console
from vismt.cache import make_room, note_no_room, note_use
from vismt.errors import UserError
from vismt.files import atomic_write
from vismt.paths import cache_root
from vismt.seeds import digest

LIMIT = 4 * 2**30  # bytes of all files
# Libraries whose modules compute a function of their tensors, their settings and the library's version.
STOCK = ("torch", "timm", "torchvision")


def path_of(module: nn.Module, tensors: Mapping[str, Tensor], data: str) -> Path | None:
    """Return the file for features of `data` by a module on `tensors`; None where its code is not a library's own."""
    structure = _structure(module)
    if structure is None:
        return None
    content = hashlib.blake2b(f"{data}\n{structure}\n{_machine(tensors)}".encode(), digest_size=12)
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        content.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        content.update(value.flatten().view(torch.uint8).numpy())
    return cache_root() / "features" / f"{content.hexdigest()}.safetensors"


def _structure(module: nn.Module) -> str | None:
    """Return a text of all that a module computes besides the values of its tensors; None where that is unknown."""
    lines = [repr(module)]
    for name, part in module.named_modules():
        library = type(part).__module__.partition(".")[0]
        own = type(part).__module__.startswith("vismt.backbones.")
        changed = part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part)
        if changed or not (own or library in STOCK):
            return None
        settings = {
            key: value
            for key, value in vars(part).items()
            if not key.startswith("_") and isinstance(value, bool | int | float | str | tuple | None)
        }
        lines.append(f"{name} {type(part).__qualname__} {sorted(settings.items())}")
        if own:
            lines.append(inspect.getsource(type(part)))
    return "\n".join(lines)


def _machine(tensors: Mapping[str, Tensor]) -> str:
    """Return a text of what decides the bits of a sum."""
    device = next(iter(tensors.values())).device
    versions = [metadata.version(name) for name in STOCK]
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)} {torch.backends.cuda.matmul.allow_tf32}"
    else:
        where = f"{torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()}"
    return f"{versions} {device.type} {where} {torch.get_float32_matmul_precision()}"


def load_features(path: Path, device: torch.device) -> dict[int, Tensor]:
    """Return the features of a file by row, memory-mapped on a CPU; an empty dict without a whole file."""
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            rows, values = file.get_tensor("rows"), file.get_tensor("features")
            stated = (file.metadata() or {}).get("digest")
        if stated != _digest(rows, values):
            raise ValueError("digest")
    except (OSError, SafetensorError, ValueError, RuntimeError):
        console.stage("cache", f"{path.name} is damaged; its features are computed again")
        path.unlink(missing_ok=True)
        return {}
    note_use(path)
    return dict(zip(rows.tolist(), values.to(device).unbind()))


def save_features(path: Path, features: Mapping[int, Tensor]) -> None:
    """Write features by row and delete the files used longest ago; give one notice where that fails."""
    features = {**load_features(path, torch.device("cpu")), **features}  # those that another process has written
    rows = torch.tensor(sorted(features))
    values = torch.stack([features[int(row)].cpu() for row in rows])
    payload = safetensors.torch.save({"rows": rows, "features": values}, {"digest": _digest(rows, values)})
    if len(payload) > LIMIT:
        return
    try:
        make_room(path, len(payload), LIMIT)
        atomic_write(path, payload)
    except (UserError, OSError) as error:
        note_no_room(path.parent, "features are computed again by the next run", error)


def _digest(rows: Tensor, values: Tensor) -> str:
    parts = (value.contiguous().view(torch.uint8).flatten().numpy() for value in (rows, values))
    return digest(np.concatenate(list(parts)).tobytes() + str((values.dtype, tuple(values.shape))).encode())
