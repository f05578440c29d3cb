"""Results of frozen weights and data, kept for later runs: one safetensors file for each in the cache folder.

The name of a file is a digest of everything that its tensors depend on (vismt/base/identity.py). For features these are the
data, the model, our version, and what decides the bits of a sum (precision, threads, instruction set). Files hold a digest of
their tensors. A damaged file is deleted, and its tensors are computed again. If all files together take more than LIMIT bytes,
the least recently used files are deleted. If the folder cannot be written, one notice is given and the tensors stay in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vismt.base import console
from vismt.base.errors import UserError
from vismt.base.identity import Identity, version
from vismt.storage.cache import make_room, note_no_room, note_use
from vismt.storage.files import atomic_write
from vismt.storage.paths import cache_root, regular_file

LIMIT = 4 * 2**30  # bytes of all files together


def path_of(data: str, model: Identity, machine: str) -> Path | None:
    """Return the file for what a model in eval mode computes from `data` on `machine`.

    data: Text that differs for any other data. Return None for code that belongs to no library, and for unknown content.
    """
    if model.unknown or model.foreign:
        return None
    identity = Identity(data, str(model), machine, version("vismt"))
    return cache_root() / "features" / f"{identity}.safetensors"


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Return whether a forward pass calls hooks. Hooks may do more than change its result."""
    every = nn.modules.module
    if every._global_forward_hooks or every._global_forward_pre_hooks:
        return True
    return any(part._forward_hooks or part._forward_pre_hooks for part in modules)


def machine(device: torch.device) -> str:
    """Return a text of what decides the bits of a sum on a device."""
    kind = device.type
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if kind == "cuda":
        cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
        kernels = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled())
        where = f"{torch.cuda.get_device_name(device)} {cuda.matmul.allow_tf32} {cudnn.allow_tf32} {cudnn.enabled} {kernels}"
    else:
        where = f"{torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} {torch.backends.mkldnn.enabled}"
    return f"{kind} {where} {precision} {torch.get_float32_matmul_precision()} {torch.get_default_dtype()}"


def read_stored(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a file by name, on the CPU. Return None unless the file is whole."""
    try:
        with safe_open(regular_file(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
            stated = (file.metadata() or {}).get("digest")
        if stated != _digest(tensors):
            raise ValueError("digest")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, SafetensorError, ValueError, RuntimeError):
        console.stage("cache", f"{path.name} is damaged; its {path.parent.name} are computed again")
        with suppress(OSError):
            path.unlink()
        return None
    note_use(path)
    return tensors


def write_stored(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors on the CPU, and delete the least recently used files. If that fails, give one notice."""
    payload = safetensors.torch.save(dict(tensors), {"digest": _digest(tensors)})
    if len(payload) > LIMIT:
        return
    try:
        make_room(path, len(payload), LIMIT)
        atomic_write(path, payload)
    except (UserError, OSError) as error:
        note_no_room(path.parent, f"{path.parent.name} are computed again by the next run", error)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return str(Identity(*(part for name in sorted(tensors) for part in (name, tensors[name]))))
