"""A peft folder as data: its settings, factor pairs by path, and whole parameters.

peft builds its layers from the settings and copies the file over them; a layer that the file does not fill keeps B = 0, a
tensor without a layer is dropped, and both are warnings at most. Here either is an error. What the
settings name is in peft_settings.py.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.lowrank.factors import LowRank
from vismt.lowrank.files.peft_layouts import (
    added,
    attention_paths,
    names_stack,
    refuse_passed_by,
    stack_keys,
    stock_path,
)
from vismt.lowrank.files.peft_settings import CONFIG, PeftSettings, read_settings, selects, texts
from vismt.lowrank.layers.low_rank import LowRankSettings
from vismt.lowrank.layers.parameter_modules import ParameterModule, module_at
from vismt.lowrank.layers.stock_modules import LINEAR, kind_of
from vismt.lowrank.model.targets import candidates
from vismt.lowrank.tensors import check_factor, check_finite, check_parameter
from vismt.storage.files import read_json, read_tensors
from vismt.storage.paths import regular_file

TENSORS, PREFIX = "adapter_model.safetensors", "base_model.model."
AGAIN, BASE = "save the adapter again", "load the base it was trained on"


@dataclass(frozen=True)
class PeftAdapter:
    """A folder that peft wrote, read but not compared with a model.

    low_rank: by path, with B (o, r) and A (r, i or c*kh*kw). extras: whole parameters by name. stacks: the factors of
    target_parameters as they are saved, by key. what: its name in messages.
    """

    what: str
    settings: PeftSettings
    low_rank: dict[str, LowRank]
    extras: dict[str, Tensor]
    stacks: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def replay(self) -> bool:
        """Whether it was trained on the rest of the base after an exact SVD start."""
        return str(self.settings.init_lora_weights).lower() == "pissa"

    def targets(self, model: nn.Module) -> set[str]:
        """Return the paths of the linears and convolutions that the settings name."""
        named = {path: module for path, module in model.named_modules() if path and self.settings.names(path)}
        if self.settings.everywhere:
            # Only the head of a transformers model is left out, not that of a timm model.
            getter = getattr(model, "get_output_embeddings", None)
            head = getter() if callable(getter) else None
            return {path for path, module in named.items() if kind_of(module) in LINEAR and module is not head}
        paths = {path for path, module in named.items() if kind_of(module)}
        return paths.union(*(attention_paths(model, path) for path in named))

    def need_the_same_modules(self, model: nn.Module) -> None:
        """Raise UserError where the modules that the settings name are not those of the file."""
        what, named, saved = self.what, self.targets(model), set(self.low_rank)
        known = candidates(model)
        refuse_passed_by(what, dict(model.named_modules()), saved)
        for path in sorted(saved - named):
            if path not in known:
                raise UserError(f"{what}: no linear or convolution '{path}' in this {type(model).__name__}; {BASE}.")
            raise UserError(
                f"{what}: the file holds factors of '{path}', which the settings do not name; name it in target_modules."
            )
        for path in sorted(named - saved):
            more = f" ({len(named - saved)} such modules)" if len(named - saved) > 1 else ""
            raise UserError(f"{what}: the settings name '{path}', but the file holds no factors of it{more}; {AGAIN}.")

    def kept(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the whole parameters of the file under the names that the model has for them."""
        parameters, promised = dict(model.named_parameters(remove_duplicate=False)), self._promised(model)
        what, tensors = self.what, {**parameters, **dict(model.named_buffers())}
        sharing: dict[int, list[str]] = {}
        for name, parameter in parameters.items():
            sharing.setdefault(id(parameter), []).append(name)
        for name in sorted(promised - set(self.extras)):
            why = f"bias '{self.settings.bias}', modules_to_save {self.settings.modules_to_save}"
            raise UserError(f"{what}: '{name}' is missing, which the settings promise ({why}); {AGAIN}.")
        kept: dict[str, Tensor] = {}
        for name, value in self.extras.items():
            if name not in tensors:
                raise UserError(f"{what}: '{PREFIX}{name}' belongs to no parameter of {type(model).__name__}; {BASE}.")
            needed = tuple(tensors[name].shape)
            if value.shape != needed:
                raise UserError(f"{what}: {name}: saved {tuple(value.shape)}, needed {needed}; {BASE}.")
            check_parameter(f"{what}: {name}", value, tensors[name])
            names = sharing.get(id(tensors[name]), [])
            if promised.isdisjoint(names):  # peft saves the embeddings along when one of them is adapted
                saved, present = value.detach().cpu(), tensors[name].detach().cpu()
                same = torch.equal(saved, present.to(saved.dtype)) or torch.equal(saved.to(present.dtype), present)
                if not same:  # nor one a cast of the other
                    raise UserError(
                        f"{what}: the file holds other values of '{name}', which the settings do not name; {BASE}."
                    )
                continue
            # peft trains a copy of one of two tied weights, which unties them.
            if any(alias not in self.extras or not torch.equal(self.extras[alias], value) for alias in names):
                alias = next(alias for alias in names if alias != name)
                raise UserError(
                    f"{what}: '{name}' was trained apart from '{alias}', whose weight it shares here; untie them first."
                )
            kept[names[0]] = value
        return kept

    def _promised(self, model: nn.Module) -> set[str]:
        """Return the names of the parameters that the file holds by its settings: of modules_to_save, and biases."""
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        endings = tuple(texts(self.settings.modules_to_save))
        paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path and path.endswith(endings)]
        saved = {name for path in paths for name in names if name.startswith(f"{path}.")}
        biases = {name for name in names if name == "bias" or name.endswith(".bias")}
        if self.settings.bias == "lora_only":
            biases &= {f"{path}.bias" for path in self.low_rank}
        return saved | biases if self.settings.bias != "none" else saved


def read_peft(folder: Path) -> PeftAdapter:
    """Return the folder as data.

    Raises UserError for damaged files, a variant that is not a plain LoRA, and a start that cannot be replayed.
    """
    what = f"peft adapter '{folder}'"
    config = read_json(folder / CONFIG, what, strict=True)
    if not isinstance(config, dict):
        raise UserError(f"{what}: {CONFIG} does not hold an object with settings; {AGAIN}.")
    settings = read_settings(what, config)
    legacy = folder / "adapter_model.bin"
    if legacy.exists() and not (folder / TENSORS).exists():
        tensors = read_legacy(legacy, what)
    else:
        tensors = read_tensors(folder / TENSORS, what)[1]
    pairs, extras = _sort(what, tensors)
    for name, value in extras.items():
        check_finite(f"{what}: {name}", value)
    unselected = [key for key in pairs if settings.everywhere or not selects(settings.targets, key)]
    stacks = {key for key in unselected if names_stack(settings.stack_owners, key)}
    low_rank = {}
    for key in pairs.keys() - stacks:
        path, named = stock_path(key, pairs.keys())
        update = _low_rank(what, settings, path, named, pairs[key])
        times = 1 if named == path else added(path, settings.peft_version)
        low_rank[path] = replace(update, scale=update.scale * times)
    return PeftAdapter(what, settings, dict(sorted(low_rank.items())), extras, {key: pairs[key] for key in stacks})


def read_legacy(path: Path, what: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter_model.bin by name; UserError for anything else in it."""
    try:
        with zipfile.ZipFile(regular_file(path)) as parts:
            if sum(part.file_size for part in parts.infolist()) > path.stat().st_size:
                raise ValueError("its parts are compressed, which torch never does")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn file makes the reader raise whatever its bytes spell
        raise UserError(f"{what}: '{path}' is damaged ({type(error).__name__}); {AGAIN}.") from error
    if not isinstance(content, dict) or not all(_plain(key, value) for key, value in content.items()):
        raise UserError(f"{what}: '{path}' is not a mapping of plain tensors by name, as peft writes it; {AGAIN}.")
    return content


def _plain(name: Any, value: Any) -> bool:
    """Return whether an entry of an older file is a name and a dense tensor that holds as many values as its shape says."""
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return False
    dense = value.layout is torch.strided and not value.is_quantized and value.device.type == "cpu"
    return dense and value.untyped_storage().nbytes() >= value.numel() * value.itemsize


def part_of(name: str) -> tuple[str, str, str]:
    """Return module path, role and adapter name of a tensor of a LoRA file, by its name after PREFIX.

    role: A, B, embedding_A, embedding_B, magnitude (of DoRA), bias (of B), stock (a copy of what modules_to_save replaced), other
    (of another variant), and saved: a parameter that is held whole, with its name in the model in the place of the path.
    """
    match = re.fullmatch(r"(.*)\.lora_(embedding_|)([AB])(?:\.([^.]+))??(?:\.(weight|bias))?", name)
    if match and (bool(match[2]) is not bool(match[5])) and (match[5] != "bias" or match[3] == "B"):
        role = "bias" if match[5] == "bias" else match[2] + match[3]
        return match[1], role, match[4] or ""
    match = re.fullmatch(r"(.*)\.lora_magnitude_vector(?:\.([^.]+))??(?:\.weight)?", name)
    if match:
        return match[1], "magnitude", match[2] or ""
    if "lora_" in name:
        return name.partition(".lora_")[0], "other", ""
    if ".original_module." in name:
        return name, "stock", ""
    match = re.fullmatch(r"(.*)\.(?:modules_to_save(?:\.([^.]+))??|base_layer)\.([^.]+)", name)
    return (f"{match[1]}.{match[3]}", "saved", match[2] or "") if match else (name, "saved", "")


def _sort(what: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return the factor pairs by module path, and whole parameters by name."""
    pairs: dict[str, dict[str, Tensor]] = {}
    extras: dict[str, Tensor] = {}
    for key, value in sorted(tensors.items()):
        if not key.startswith(PREFIX):
            raise UserError(f"{what}: key '{key}' lacks the prefix '{PREFIX}'; the file was not written by peft.")
        path, role, adapter = part_of(key[len(PREFIX) :])
        own = adapter in ("", "default")
        if role in ("A", "B") and own:
            pairs.setdefault(path, {})[role] = value
        elif role.startswith("embedding_") and own and value.ndim == 2:  # peft transposes the table
            pairs.setdefault(path, {})["BA"[role[-1] == "B"]] = value.t()
        elif role == "saved" and own:
            extras[path] = value
        elif role != "stock":
            raise UserError(f"{what}: '{key}' belongs to a variant that is not a plain LoRA; merge it with peft.")
    for path, pair in pairs.items():
        if len(pair) != 2:
            raise UserError(f"{what}: '{path}' has lora_{next(iter(pair))} but not its partner; {AGAIN}.")
    if not pairs:
        raise UserError(f"{what}: it holds no lora_A and lora_B; {AGAIN}.")
    return pairs, extras


def _low_rank(what: str, settings: PeftSettings, path: str, named: str, pair: Mapping[str, Tensor]) -> LowRank:
    rank, scale = settings.scale(named)
    matrices = {}
    for side, factor in pair.items():
        name = f"{path}.lora_{side}"
        shape = tuple(factor.shape)
        if not 2 <= len(shape) <= 5:
            raise UserError(f"{what}: {name}: saved {shape}; it must be a matrix, or the kernel of a convolution.")
        needed = (rank, *shape[1:]) if side == "A" else (shape[0], rank, *[1] * (len(shape) - 2))
        if shape != needed:
            raise UserError(f"{what}: {name}: saved {shape}, needed {needed}.")
        check_factor(f"{what}: {name}", factor)
        matrices[side] = factor.flatten(1)
    return LowRank(matrices["B"], matrices["A"], scale=scale)


def stacks_on(adapter: PeftAdapter, model: nn.Module) -> dict[str, tuple[LowRankSettings, Tensor, Tensor]]:
    """Return the settings, A (e*r, i) and B (e*o, r) of each adapted parameter of the model, by path; UserError for others."""
    what, wanted = adapter.what, dict.fromkeys(adapter.settings.target_parameters or ())
    keys = stack_keys(model, dict.fromkeys(name for name, _ in model.named_parameters() if selects(wanted, name)))
    if set(keys.values()) != set(adapter.stacks):
        differing = min(set(keys.values()) ^ set(adapter.stacks))
        raise UserError(
            f"{what}: the factors at '{differing}' are not those of the parameters that {list(wanted)} name in this "
            f"{type(model).__name__}; {BASE}."
        )
    return {path: _stack(adapter, path, module_at(model, path), adapter.stacks[key]) for path, key in keys.items()}


def _stack(
    adapter: PeftAdapter, path: str, module: nn.Module, pair: Mapping[str, Tensor]
) -> tuple[LowRankSettings, Tensor, Tensor]:
    if not isinstance(module, ParameterModule) or module.weight.ndim != 3:
        raise UserError(
            f"{adapter.what}: '{path}' does not hold experts in three dimensions, so it cannot be a target; merge it with peft."
        )
    rank, scale = adapter.settings.scale(path)
    count, (rows, columns) = module.weight.shape[0], module.matrix(module.weight).shape
    needed = {"A": (count * rank, columns), "B": (rows // count, rank * count)}
    for side, factor in pair.items():
        check_factor(f"{adapter.what}: {path}.lora_{side}", factor)
        if tuple(factor.shape) != needed[side]:
            raise UserError(
                f"{adapter.what}: {path}.lora_{side}: saved {tuple(factor.shape)}, needed {needed[side]} for {count} experts."
            )
    B = rearrange(pair["B"], "o (r e) -> (e o) r", e=count)
    return LowRankSettings(rank, scale, (rows // count,) * count), pair["A"], B
