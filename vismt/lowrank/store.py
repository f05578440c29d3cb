"""Adapters on disk: adapter.json says how to build the hosts again and names the safetensors file that holds the tensors.

The tensors are written first, under a name of their own, and the JSON that names them last: a save that is cut short
leaves the one before. Loading is strict: a missing or unexpected tensor, another shape or another base model are errors
that leave the model as it was. The base is told by samples of the adapted weights, compared within half-precision
rounding, so that a cast of the same checkpoint is still the same base; what is not adapted is not compared.
Where weights themselves are trained (no factors), only those that changed are written, and the rest tells the base.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from vismt.errors import UserError
from vismt.files import atomic_write, read_json, read_tensors
from vismt.lowrank.adapter_layer import Host
from vismt.lowrank.backups import same_bits
from vismt.lowrank.inject import adapted_modules, attach, install, need_record, record_of, refuse_switched
from vismt.lowrank.layer_spec import Site
from vismt.lowrank.nf4 import GRIDS
from vismt.lowrank.targets import kind_of, matrix_shape
from vismt.lowrank.wrappers import Guest, Part, part_type, parts_of, stock_order

FORMAT = 1
DESCRIPTION = "adapter.json"
SAMPLES = 16


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Write the factors (and also_train parameters) of an adapted model; each file appears whole or not at all."""
    record = need_record(model, "save_adapter")
    tensors = adapter_tensors(model)
    if any(value.is_meta for value in tensors.values()):
        raise UserError("save_adapter: the model lies on the meta device; there are no values to save.")
    # Beside factors or parts all counts as changed: a head may be fresh.
    unchanged = [] if record.sites or record.parts else same_bits(record.also_train, tensors)
    tensors = {name: value for name, value in tensors.items() if name not in unchanged}
    paths = _compared(record.sites, unchanged)
    with stock_order(model):
        payload = safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
        base, samples = fingerprint(model, paths), base_samples(model, paths)
    digest = hashlib.sha256(payload).hexdigest()
    description = {
        "format": FORMAT,
        "method": record.method,
        "model": type(model).__name__,
        "options": record.options,
        "sites": [
            {name: value for name, value in asdict(site).items() if value not in ("", None)} for site in record.sites
        ],
        "also_train": sorted(record.also_train),
        "unchanged": unchanged,
        "parts": record.parts,
        "base": base,
        "base_samples": samples,
        "tensors": f"adapter-{digest[:12]}.safetensors",
        "tensors_sha256": digest,
    }
    folder = Path(folder)
    atomic_write(folder / description["tensors"], payload)
    atomic_write(folder / DESCRIPTION, json.dumps(description))
    for stale in set(folder.glob("adapter-*.safetensors")) - {folder / description["tensors"]}:
        stale.unlink()
    return folder


def load_adapter(model: nn.Module, folder: str | Path, *, on_other_base: str = "error") -> nn.Module:
    """Put a saved adapter on a stock model, or its values into a model adapted alike. Returns the model.

    on_other_base: "error" refuses a base whose fingerprint differs, "warn" goes on with a warning.
    """
    folder = Path(folder)
    refuse_switched(model, "load_adapter")
    description, sites, tensors = read_adapter(folder)
    record = record_of(model)
    saved = (description["method"], sites, sorted(description["also_train"]), description["parts"])
    if record is not None and (record.method, record.sites, sorted(record.also_train), record.parts) != saved:
        raise UserError(f"adapter '{folder}': the model already carries another '{record.method}'; unadapt it first.")
    _check_sites(model, folder, description, sites, tensors)
    unchanged = description["unchanged"]
    paths = _compared(sites, [name for name in unchanged if name in dict(model.named_parameters())])
    with stock_order(model):
        samples, own = base_samples(model, paths), fingerprint(model, paths)
    if not same_base(samples, description["base_samples"]):
        made_for = f"{description['model']} (weights {description['base']})"
        other_base(
            f"adapter '{folder}' was made for {made_for}, this is {type(model).__name__} (weights {own})", on_other_base
        )
    _check_tensors(model, folder, description, sites, tensors)
    if record is None:
        install(model, description["method"], sites, description["options"], description["also_train"])
        for path, part in description["parts"].items():
            base = dict(model.named_modules()).get(path)
            attach(model, path, part_type(part["type"], path).around(base, part["settings"]))
    with stock_order(model):
        fill(model, tensors)
    if record is not None:
        fill(model, {name: record.also_train[name] for name in unchanged})
    return model


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Everything an adapter file holds, by state_dict key: factors, kept starts, tensors of parts, also_train parameters."""
    record = need_record(model, "adapter")
    tensors: dict[str, Tensor] = {}
    for path, host in adapted_modules(model).items():
        tensors.update({f"{path}.{name}": value for name, value in host.factors().items()})
    for path, part in parts_of(model).items():
        tensors.update({f"{path}.{name}": value for name, value in part.tensors().items()})
    tensors.update({name: model.get_parameter(name) for name in record.also_train})
    return tensors


@torch.no_grad()
def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy adapter tensors into an adapted model; starts that the hosts lack are created."""
    of_hosts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, Host) and leaf != "bias":
            of_hosts.setdefault(path, {})[leaf] = value
        elif isinstance(module, Part):
            module.restore(leaf, value)
        else:
            getattr(module, leaf).copy_(value)
    for path, own in of_hosts.items():
        model.get_submodule(path).fill(own)


def _compared(sites: Iterable[Site], unchanged: Iterable[str]) -> list[str]:
    """Paths of the modules whose weights tell the base."""
    return [
        *(site.path for site in sites),
        *(name[: -len(".weight")] for name in unchanged if name.endswith(".weight")),
    ]


def base_samples(model: nn.Module, paths: Iterable[str]) -> dict[str, list[float]]:
    """Up to 16 values of each of these base weights at places that depend on its path; none on the meta device."""
    samples, record = {}, record_of(model)
    for path in sorted(paths):
        weight = record.also_train.get(f"{path}.weight") if record is not None else None
        flat = (model.get_submodule(path).weight if weight is None else weight).detach().flatten()
        if flat.is_meta:
            samples[path] = []
            continue
        seed = int.from_bytes(hashlib.sha256(path.encode()).digest()[:7], "big")
        places = torch.randint(flat.numel(), (SAMPLES,), generator=torch.Generator().manual_seed(seed))
        samples[path] = flat[places.to(flat.device)].double().tolist()
    return samples


def other_base(told: str, on_other_base: str) -> None:
    """What follows from another base: an error, or with "warn" a warning."""
    if on_other_base != "warn":
        raise UserError(f"{told}. Load the base it was trained on, or pass on_other_base='warn'.")
    warnings.warn(told, stacklevel=3)


def same_base(own: Mapping[str, list[float]], saved: Mapping[str, list[float]]) -> bool:
    """Equal within 1 % of each weight's largest sample: bf16 rounds by at most 0.4 % of a value."""
    for path, values in own.items():
        others = saved.get(path, [])
        largest = max((abs(value) for value in others), default=0.0)
        if values and others and any(abs(a - b) > 0.01 * largest for a, b in zip(values, others, strict=True)):
            return False
    return True


def fingerprint(model: nn.Module, paths: Iterable[str]) -> str:
    """Twelve hex digits that name the base weights at `paths` in messages and records (exact values, sampled)."""
    return hashlib.sha256(json.dumps(base_samples(model, paths)).encode()).hexdigest()[:12]


def read_adapter(folder: Path) -> tuple[dict[str, Any], list[Site], dict[str, Tensor]]:
    """What adapter.json says, its sites, and the tensors, not compared with any model; UserError for damaged files."""
    what = f"adapter '{folder}'"
    description = read_json(folder / DESCRIPTION, what)
    try:
        if description["format"] != FORMAT:
            raise UserError(
                f"{what}: format {description['format']}, this version reads {FORMAT}; use a matching vismt."
            )
        sites = [
            Site(**{**site, "shape": tuple(site["shape"]), "blocks": tuple(site["blocks"])})
            for site in description["sites"]
        ]
        name, parts = str(description["tensors"]), description.setdefault("parts", {})
        unchanged = description.setdefault("unchanged", [])
        shaped = all(
            isinstance(site.core_shape, tuple) and site.grid in ("", *GRIDS) for site in sites
        )  # KeyError: no core
        shaped = shaped and all(s.experts is None or (s.experts > 0 and s.rank % s.experts == 0) for s in sites)
        shaped = shaped and all(
            isinstance(part["type"], str) and isinstance(part["settings"], dict) for part in parts.values()
        )
        texts = [description[key] for key in ("method", "model", "base", "tensors_sha256")]
        shaped = shaped and isinstance(description["options"], dict) and isinstance(description["also_train"], list)
        shaped = shaped and isinstance(unchanged, list) and set(unchanged) <= set(description["also_train"])
        shaped = (
            shaped and isinstance(description["base_samples"], dict) and all(isinstance(text, str) for text in texts)
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{what}: {DESCRIPTION} is not what vismt.save_adapter writes ({error!r}).") from error
    if not shaped or not re.fullmatch(r"adapter-[0-9a-f]{12}\.safetensors", name):
        raise UserError(f"{what}: {DESCRIPTION} is not what vismt.save_adapter writes.")
    payload, tensors = read_tensors(folder / name, what)
    if hashlib.sha256(payload).hexdigest() != description["tensors_sha256"]:
        raise UserError(f"{what}: '{name}' is not the file that {DESCRIPTION} describes; save the adapter again.")
    return description, sites, tensors


def _check_sites(
    model: nn.Module, folder: Path, description: Mapping[str, Any], sites: Iterable[Site], tensors: Mapping[str, Tensor]
) -> None:
    """Every site exists on this model with its kind and shape."""
    modules = dict(model.named_modules())
    made_for = f"adapter '{folder}' was made for {description['model']}, this model is {type(model).__name__}"
    for site in sites:
        module = modules.get(site.path)
        if module is None or (kind_of(module) is None and not isinstance(module, Host)):
            raise UserError(f"{made_for} (it has no linear or convolution '{site.path}').")
        shape = tuple(module.matrix(module.weight).shape) if isinstance(module, Host) else matrix_shape(module)
        if shape != site.shape and site.dim is not None:
            raise UserError(f"{made_for} ({site.path}: its weight was {site.shape}, here it is {shape}).")
        if shape != site.shape:
            key, axis = (("lora_A", 1), ("lora_B", 0))[shape[1] == site.shape[1]]
            saved = tuple(tensors[f"{site.path}.{key}"].shape)
            wanted = (saved[0], shape[1]) if axis == 1 else (shape[0], saved[1])
            raise UserError(f"{made_for} ({site.path}.{key}: saved {saved}, needed {wanted}).")


def _check_tensors(
    model: nn.Module, folder: Path, description: Mapping[str, Any], sites: Iterable[Site], tensors: Mapping[str, Tensor]
) -> None:
    """No tensor missing, none unexpected, every shape as its site says."""
    wanted = factor_shapes(sites, tensors)
    own, modules = dict(model.named_parameters()), dict(model.named_modules())
    for path, part in description["parts"].items():
        kind = part_type(part["type"], f"adapter '{folder}'")
        if path not in modules and not issubclass(kind, Guest):
            raise UserError(
                f"adapter '{folder}': this model has no '{path}' to put a {part['type'].split(':')[-1]} on."
            )
        shapes = kind.check(path, modules.get(path), part["settings"])
        wanted.update({f"{path}.{name}": shape for name, shape in shapes.items()})
    for name in description["also_train"]:
        if name not in own:
            raise UserError(f"adapter '{folder}': this model has no parameter '{name}' to load.")
        if name not in description["unchanged"]:
            wanted[name] = tuple(own[name].shape)
    check_tensors(f"adapter '{folder}'", wanted, tensors)


def factor_shapes(sites: Iterable[Site], tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a file must hold for these sites, kept starts among them where it has any."""
    wanted: dict[str, tuple[int, ...]] = {}
    for site in sites:
        wanted.update({f"{site.path}.{name}": shape for name, shape in site.tensors().items()})
        if f"{site.path}.lora_A0" in tensors or f"{site.path}.lora_B0" in tensors:
            wanted[f"{site.path}.lora_A0"] = wanted[f"{site.path}.lora_A"]
            wanted[f"{site.path}.lora_B0"] = wanted[f"{site.path}.lora_B"]
    return wanted


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
