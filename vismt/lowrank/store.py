"""Adapters on disk: adapter.safetensors holds the tensors, adapter.json what is needed to build the hosts again.

Loading is strict: a missing or unexpected tensor, another shape, another base model or files of two different saves are
errors that leave the model as it was. The base is told by a fingerprint of sampled weights, rounded to bf16 so that a
cast of the same checkpoint is still the same base.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vismt.errors import UserError
from vismt.lowrank.inject import Site, adapted_modules, install, need_record, record_of
from vismt.lowrank.linear import Adapted
from vismt.lowrank.targets import kind_of, matrix_shape

FORMAT = 1
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Write the factors (and also_train parameters) of an adapted model; each file appears whole or not at all."""
    record = need_record(model, "save_adapter")
    tensors = adapter_tensors(model)
    if any(value.is_meta for value in tensors.values()):
        raise UserError("save_adapter: the model lies on the meta device; there are no values to save.")
    payload = safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    description = {
        "format": FORMAT,
        "method": record.method,
        "model": type(model).__name__,
        "options": record.options,
        "sites": [asdict(site) for site in record.sites],
        "also_train": sorted(record.also_train),
        "base": fingerprint(model, [site.path for site in record.sites]),
        "tensors_sha256": hashlib.sha256(payload).hexdigest(),
    }
    folder = Path(folder)
    atomic_write(folder / TENSORS, payload)
    atomic_write(folder / DESCRIPTION, json.dumps(description, indent=1))
    return folder


def load_adapter(model: nn.Module, folder: str | Path, *, on_other_base: str = "error") -> nn.Module:
    """Put a saved adapter on a stock model, or its values into a model adapted alike. Returns the model.

    on_other_base: "error" refuses a base whose fingerprint differs, "warn" goes on with a warning.
    """
    folder = Path(folder)
    description, tensors = _read(folder)
    sites = [Site(**{**site, "shape": tuple(site["shape"]), "blocks": tuple(site["blocks"])}) for site in description["sites"]]
    record = record_of(model)
    if record is not None and (record.method, record.sites) != (description["method"], sites):
        raise UserError(f"adapter '{folder}': the model already carries another '{record.method}'; unadapt it first.")
    _check_sites(model, folder, description, sites, tensors)
    own = fingerprint(model, [site.path for site in sites])
    if own != description["base"]:
        made_for = f"{description['model']} (weights {description['base']})"
        told = f"adapter '{folder}' was made for {made_for}, this is {type(model).__name__} (weights {own})"
        if on_other_base != "warn":
            raise UserError(f"{told}. Load the base it was trained on, or pass on_other_base='warn'.")
        warnings.warn(told, stacklevel=2)
    _check_tensors(model, folder, description, sites, tensors)
    if record is None:
        install(model, description["method"], sites, description["options"], description["also_train"])
    fill(model, tensors)
    return model


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Everything an adapter file holds, by state_dict key: factors, kept starts, also_train parameters."""
    record = need_record(model, "adapter")
    tensors: dict[str, Tensor] = {}
    for path, host in adapted_modules(model).items():
        tensors.update({f"{path}.{name}": value for name, value in host.factors().items()})
    tensors.update({name: model.get_parameter(name) for name in record.also_train})
    return tensors


@torch.no_grad()
def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy adapter tensors into an adapted model; starts that the hosts lack are created."""
    for name, value in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, Adapted) and leaf in ("lora_A0", "lora_B0"):
            like = module.lora_A if leaf == "lora_A0" else module.lora_B
            setattr(module, leaf, value.to(device=like.device, dtype=like.dtype))
        else:
            getattr(module, leaf).copy_(value)


def fingerprint(model: nn.Module, paths: Iterable[str], samples: int = 1024) -> str:
    """Twelve hex digits over shapes and up to `samples` evenly spaced values, rounded to bf16, of each base weight."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        weight = model.get_submodule(path).weight.detach()
        digest.update(f"{path}{tuple(weight.shape)}".encode())
        if not weight.is_meta:
            flat = weight.flatten()
            picked = flat[:: max(1, flat.numel() // samples)].to(torch.bfloat16).view(torch.int16).cpu()
            digest.update(picked.numpy().tobytes())
    return digest.hexdigest()[:12]


def read_json(path: Path, what: str) -> Any:
    """A JSON file, or a UserError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError as error:
        raise UserError(f"{what}: no file '{path}'.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: '{path}' cannot be read as JSON ({error}).") from error


def read_tensors(path: Path, what: str) -> tuple[bytes, dict[str, Tensor]]:
    """A safetensors file as bytes and tensors, or a UserError that names it."""
    try:
        payload = path.read_bytes()
        return payload, safetensors.torch.load(payload)
    except FileNotFoundError as error:
        raise UserError(f"{what}: no file '{path}'.") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{what}: '{path}' is damaged or no safetensors file ({error}).") from error


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    what = f"adapter '{folder}'"
    description = read_json(folder / DESCRIPTION, what)
    needed = {"format", "method", "model", "options", "sites", "also_train", "base", "tensors_sha256"}
    if not isinstance(description, dict) or not needed <= set(description):
        raise UserError(f"{what}: {DESCRIPTION} is not a description that vismt.save_adapter wrote.")
    if description["format"] != FORMAT:
        raise UserError(f"{what}: format {description['format']}, this version reads {FORMAT}; use a matching vismt.")
    payload, tensors = read_tensors(folder / TENSORS, what)
    if hashlib.sha256(payload).hexdigest() != description["tensors_sha256"]:
        raise UserError(f"{what}: {TENSORS} and {DESCRIPTION} are of different saves; save the adapter again.")
    return description, tensors


def _check_sites(
    model: nn.Module, folder: Path, description: Mapping[str, Any], sites: Iterable[Site], tensors: Mapping[str, Tensor]
) -> None:
    """Every site exists on this model with its kind and shape."""
    modules = dict(model.named_modules())
    made_for = f"adapter '{folder}' was made for {description['model']}, this model is {type(model).__name__}"
    for site in sites:
        module = modules.get(site.path)
        if module is None or (kind_of(module) is None and not isinstance(module, Adapted)):
            raise UserError(f"{made_for} (it has no linear or convolution '{site.path}').")
        shape = tuple(module.matrix(module.weight).shape) if isinstance(module, Adapted) else matrix_shape(module)
        if shape != site.shape:
            key, axis = (("lora_A", 1), ("lora_B", 0))[shape[1] == site.shape[1]]
            saved = tuple(tensors[f"{site.path}.{key}"].shape)
            wanted = (saved[0], shape[1]) if axis == 1 else (shape[0], saved[1])
            raise UserError(f"{made_for} ({site.path}.{key}: saved {saved}, needed {wanted}).")


def _check_tensors(
    model: nn.Module, folder: Path, description: Mapping[str, Any], sites: Iterable[Site], tensors: Mapping[str, Tensor]
) -> None:
    """No tensor missing, none unexpected, every shape as its site says."""
    wanted: dict[str, tuple[int, ...]] = {}
    for site in sites:
        wanted[f"{site.path}.lora_A"] = (len(site.blocks) * site.rank, site.shape[1])
        wanted[f"{site.path}.lora_B"] = (site.shape[0], site.rank)
        if f"{site.path}.lora_A0" in tensors or f"{site.path}.lora_B0" in tensors:
            wanted[f"{site.path}.lora_A0"] = wanted[f"{site.path}.lora_A"]
            wanted[f"{site.path}.lora_B0"] = wanted[f"{site.path}.lora_B"]
    own = dict(model.named_parameters())
    for name in description["also_train"]:
        if name not in own:
            raise UserError(f"adapter '{folder}': this model has no parameter '{name}' to load.")
        wanted[name] = tuple(own[name].shape)
    check_tensors(f"adapter '{folder}'", wanted, tensors)


def check_tensors(what: str, wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """UserError for the first missing, unexpected or misshapen tensor, with both shapes."""
    for name, shape in wanted.items():
        if name not in tensors:
            raise UserError(f"{what}: '{name}' is missing (needed {tuple(shape)}).")
        if tuple(tensors[name].shape) != tuple(shape):
            raise UserError(f"{what}: {name}: saved {tuple(tensors[name].shape)}, needed {tuple(shape)}.")
    extra = sorted(set(tensors) - set(wanted))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(f"{what}: unexpected '{extra[0]}' {tuple(tensors[extra[0]].shape)}{more}.")


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one, never a part.

    Raises UserError when the folder cannot be written or the disk is full; the old file then stands.
    """
    path = Path(path)
    payload = data.encode("utf8") if isinstance(data, str) else data
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        reason = error.strerror or str(error)
        raise UserError(f"cannot write '{path}': {reason}. Free space or choose a folder that can be written.") from error


def _umask() -> int:
    """The process's umask; reading it needs setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
