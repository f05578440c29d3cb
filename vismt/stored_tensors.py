"""Functions of frozen weights and data, kept for later runs: a safetensors file for each in the cache folder.

The name of a file is a digest of everything that its tensors depend on: the data, the values of all weights, the structure of
the modules, and what decides the order of sums (threads, instruction set, versions). Files hold a digest of their tensors; a
damaged file is deleted and its tensors are computed again. The files used longest ago are deleted when all together take more
than LIMIT bytes. Where the folder cannot be written, one notice is given and the tensors stay in memory.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection, Iterable, Mapping
from importlib import metadata
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vismt import console
from vismt.cache import make_room, note_no_room, note_use
from vismt.errors import UserError
from vismt.files import atomic_write
from vismt.paths import cache_root

LIMIT = 4 * 2**30  # bytes of all files
# Libraries whose modules compute a function of their tensors, their settings and the library's version.
STOCK = ("torch", "timm", "torchvision", "transformers")


def path_of(
    modules: Iterable[nn.Module], tensors: Mapping[str, Tensor], data: str, unused: Collection[nn.Module] = ()
) -> Path | None:
    """Return the file of what modules compute of `data`; None where the code of a module is not a library's own.

    Args:
        modules: all that compute, settings included; taken as in eval mode.
        tensors: the parameters and buffers that they compute with, by name.
        data: a text that differs for any other data.
        unused: those among the modules and their parts that do not compute.
    """
    structures = [_structure(module, unused) for module in modules]
    if None in structures:
        return None
    content = hashlib.blake2b(f"{data}\n{structures}\n{_machine(tensors)}".encode(), digest_size=12)
    _update(content, tensors)
    return cache_root() / "features" / f"{content.hexdigest()}.safetensors"


def _structure(module: nn.Module, unused: Collection[nn.Module]) -> str | None:
    """Return a text of all that a module computes besides the values of its tensors; None where that is unknown."""
    lines = []
    for name, part in module.named_modules():
        if part in unused:
            continue
        library = type(part).__module__.partition(".")[0]
        own = type(part).__module__.startswith("vismt.backbones.")
        changed = part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part)
        if changed or not (own or library in STOCK):
            return None
        settings = {
            key: value
            for key, value in vars(part).items()
            if not key.startswith("_")
            and key != "training"
            and isinstance(value, bool | int | float | str | tuple | None)
        }
        lines.append(f"{name} {type(part).__qualname__} {part.extra_repr()} {sorted(settings.items())}")
        if own:
            lines.append(inspect.getsource(type(part)))
    return "\n".join(lines)


def _machine(tensors: Mapping[str, Tensor]) -> str:
    """Return a text of what decides the bits of a sum."""
    device = next(iter(tensors.values())).device
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)} {torch.backends.cuda.matmul.allow_tf32}"
    else:
        where = f"{torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()}"
    return f"{[_version(name) for name in STOCK]} {device.type} {where} {torch.get_float32_matmul_precision()}"


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


def read_stored(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a file by name, on the CPU; None without a whole file."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
            stated = (file.metadata() or {}).get("digest")
        if stated != _digest(tensors):
            raise ValueError("digest")
    except (OSError, SafetensorError, ValueError, RuntimeError):
        console.stage("cache", f"{path.name} is damaged; its features are computed again")
        path.unlink(missing_ok=True)
        return None
    note_use(path)
    return tensors


def write_stored(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors on the CPU and delete the files used longest ago; give one notice where that fails."""
    payload = safetensors.torch.save(dict(tensors), {"digest": _digest(tensors)})
    if len(payload) > LIMIT:
        return
    try:
        make_room(path, len(payload), LIMIT)
        atomic_write(path, payload)
    except (UserError, OSError) as error:
        note_no_room(path.parent, "features are computed again by the next run", error)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    content = hashlib.blake2b(digest_size=8)
    _update(content, tensors)
    return content.hexdigest()


def _update(content: hashlib.blake2b, tensors: Mapping[str, Tensor]) -> None:
    """Add names, types, shapes and values of tensors."""
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        content.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        content.update(value.flatten().view(torch.uint8).numpy().data)
