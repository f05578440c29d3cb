"""A peft folder as data: its settings, factor pairs by path, and whole parameters.

peft builds its layers from the settings and copies the file over them. A layer that the file does not fill keeps B = 0, and a
tensor without a layer is dropped. peft warns at most. Here both are errors. peft_settings.py says what the settings name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.lowrank.factors import LowRank
from vismt.lowrank.files.facts import PEFT_PREFIX, AdapterFacts, ModuleFacts, Stored
from vismt.lowrank.files.peft_layouts import attention_paths, refuse_passed_by, stack_keys
from vismt.lowrank.files.peft_settings import PeftSettings, check_plain, check_targets, selects, texts
from vismt.lowrank.layers.low_rank import LowRankSettings
from vismt.lowrank.layers.parameter_modules import ParameterModule, module_at
from vismt.lowrank.layers.stock_modules import LINEAR, kind_of
from vismt.lowrank.model.targets import candidates
from vismt.lowrank.tensors import check_factor, check_finite, check_parameter

_FACTORS, _TABLE = ("A", "B"), ("embedding_A", "embedding_B")
_AGAIN, _BASE = "save the adapter again", "load the base it was trained on"


@dataclass(frozen=True)
class PeftAdapter:
    """A folder that peft wrote, read but not yet compared with a model.

    low_rank: Factor pairs by path, with B (o, r) and A (r, i or c*kh*kw). extras: Whole parameters by name. stacks: Factors of
    target_parameters as they are saved, by key. what: Name of the folder in messages.
    """

    what: str
    settings: PeftSettings
    low_rank: dict[str, LowRank]
    extras: dict[str, Tensor]
    stacks: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def replay(self) -> bool:
        """Whether the adapter was trained on the rest of the base after an exact SVD start."""
        return str(self.settings.init_lora_weights).lower() == "pissa"

    def targets(self, model: nn.Module) -> set[str]:
        """Return the paths of the linears and convolutions that the settings name."""
        named = {path: module for path, module in model.named_modules() if path and self.settings.names(path)}
        if self.settings.everywhere:
            # Only the head of a transformers model is left out. A head of a timm model is not.
            getter = getattr(model, "get_output_embeddings", None)
            head = getter() if callable(getter) else None
            return {path for path, module in named.items() if kind_of(module) in LINEAR and module is not head}
        paths = {path for path, module in named.items() if kind_of(module)}
        return paths.union(*(attention_paths(model, path) for path in named))

    def need_the_same_modules(self, model: nn.Module) -> None:
        """Raise UserError if the settings and the file name different modules."""
        what, named, saved = self.what, self.targets(model), set(self.low_rank)
        known = candidates(model)
        refuse_passed_by(what, dict(model.named_modules()), saved)
        for path in sorted(saved - named):
            if path not in known:
                raise UserError(f"{what}: no linear or convolution '{path}' in this {type(model).__name__}; {_BASE}.")
            raise UserError(
                f"{what}: the file holds factors of '{path}', which the settings do not name; name it in target_modules."
            )
        for path in sorted(named - saved):
            more = f" ({len(named - saved)} such modules)" if len(named - saved) > 1 else ""
            raise UserError(f"{what}: the settings name '{path}', but the file holds no factors of it{more}; {_AGAIN}.")

    def kept(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the whole parameters of the file under their names in the model."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        whole, biases = self._promised(model)
        promised = whole | biases
        what, tensors = self.what, {**parameters, **dict(model.named_buffers())}
        sharing: dict[int, list[str]] = {}
        for name, parameter in parameters.items():
            sharing.setdefault(id(parameter), []).append(name)
        in_file = {alias for name in self.extras for alias in sharing.get(id(parameters.get(name)), ())}
        for name in sorted((whole - set(self.extras)) | (biases - in_file)):
            why = f"bias '{self.settings.bias}', modules_to_save {self.settings.modules_to_save}"
            raise UserError(f"{what}: '{name}' is missing, which the settings promise ({why}); {_AGAIN}.")
        kept: dict[str, Tensor] = {}
        for name, value in self.extras.items():
            if name not in tensors:
                raise UserError(
                    f"{what}: '{PEFT_PREFIX}{name}' belongs to no parameter of {type(model).__name__}; {_BASE}."
                )
            needed = tuple(tensors[name].shape)
            if value.shape != needed:
                raise UserError(f"{what}: {name}: saved {tuple(value.shape)}, needed {needed}; {_BASE}.")
            check_parameter(f"{what}: {name}", value, tensors[name])
            names = sharing.get(id(tensors[name]), [])
            if promised.isdisjoint(names):  # peft also saves the embeddings if one of them is adapted
                saved, present = value.detach().cpu(), tensors[name].detach().cpu()
                same = torch.equal(saved, present.to(saved.dtype)) or torch.equal(saved.to(present.dtype), present)
                if not same:  # not even after a cast of one of them
                    raise UserError(
                        f"{what}: the file holds other values of '{name}', which the settings do not name; {_BASE}."
                    )
                continue
            # peft trains a copy of one of two tied weights of modules_to_save, which unties them. It trains biases in place.
            copied, held = not whole.isdisjoint(names), self.extras
            if any(not torch.equal(held[alias], value) if alias in held else copied for alias in names):
                alias = next(alias for alias in names if alias != name)
                raise UserError(
                    f"{what}: '{name}' was trained apart from '{alias}', whose weight it shares here; untie them first."
                )
            kept[names[0]] = value
        return kept

    def _promised(self, model: nn.Module) -> tuple[set[str], set[str]]:
        """Return the names of the parameters that the file holds by its settings: those of modules_to_save, and biases."""
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        endings = tuple(texts(self.settings.modules_to_save))
        paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path and path.endswith(endings)]
        saved = {name for path in paths for name in names if name.startswith(f"{path}.")}
        biases = {name for name in names if name == "bias" or name.endswith(".bias")}
        if self.settings.bias == "lora_only":
            biases &= {f"{path}.bias" for path in self.low_rank}
        return saved, biases if self.settings.bias != "none" else set()


def read_peft(folder: Path) -> PeftAdapter:
    """Return the folder as data.

    Raise UserError with the first reason if the folder is malformed, is not a plain LoRA, or has a start that cannot be replayed.
    """
    what = f"peft adapter '{folder}'"
    facts, settings = _plain_facts(what, folder)
    extras = {tensor.path: _value(what, facts, tensor) for tensor in facts.with_role("saved")}
    for name, value in extras.items():
        check_finite(f"{what}: {name}", value)
    low_rank, stacks = {}, {}
    for path, module in facts.modules.items():
        if module.unpaired:
            raise UserError(f"{what}: '{path}' has lora_{next(iter(module.tensors))} but not its partner; {_AGAIN}.")
        values = {role: _value(what, facts, tensor) for role, tensor in module.tensors.items()}
        if module.stacked and "A" in values:
            stacks[module.key] = values
        else:
            low_rank[path] = _low_rank(what, module, values)
    if not facts.modules:
        raise UserError(f"{what}: it holds no lora_A and lora_B; {_AGAIN}.")
    return PeftAdapter(what, settings, dict(sorted(low_rank.items())), extras, stacks)


def _plain_facts(what: str, folder: Path) -> tuple[AdapterFacts, PeftSettings]:
    """Return the facts of a folder with a plain LoRA, and its settings. Raise UserError for any other folder."""
    facts = AdapterFacts(folder)
    facts.read_peft()
    if facts.config:
        check_plain(what, facts.config)
    for reason in [*facts.reasons, *facts.stored.reasons]:
        raise UserError(f"{what}: {reason.removesuffix('.')}.")
    settings = facts.settings
    assert settings is not None  # without settings there is a reason
    check_targets(what, settings)
    for name, tensor in sorted(facts.tensors.items()):
        if not name.startswith(PEFT_PREFIX):
            raise UserError(f"{what}: key '{name}' lacks the prefix '{PEFT_PREFIX}'; the file was not written by peft.")
        plain = tensor.role == "saved" or tensor.role in _FACTORS or (tensor.role in _TABLE and len(tensor.shape) == 2)
        if tensor.role != "stock" and not (plain and tensor.adapter in ("", "default")):
            raise UserError(f"{what}: '{name}' belongs to a variant that is not a plain LoRA; merge it with peft.")
    return facts, settings


def _value(what: str, facts: AdapterFacts, tensor: Stored) -> Tensor:
    value = facts.stored.read(tensor.name)
    if value is None:
        reason = facts.stored.reasons[-1] if facts.stored.reasons else f"'{tensor.name}' is saved as {tensor.dtype}"
        raise UserError(f"{what}: {reason}; {_AGAIN}.")
    return value.clone()  # the values are mapped from the file


def _low_rank(what: str, module: ModuleFacts, values: Mapping[str, Tensor]) -> LowRank:
    for role, factor in values.items():
        name, shape, rank = f"{module.path}.lora_{role}", tuple(factor.shape), module.declared
        if not 2 <= len(shape) <= 5:
            raise UserError(f"{what}: {name}: saved {shape}; it must be a matrix, or the kernel of a convolution.")
        first = role[-1] == "A"  # (r, ...), and the other (..., r)
        needed = (rank, *shape[1:]) if first else (shape[0], rank, *[1] * (len(shape) - 2))
        if shape != needed:
            raise UserError(f"{what}: {name}: saved {shape}, needed {needed}.")
        check_factor(f"{what}: {name}", factor)
    update = module.update(values)
    assert update is not None  # the pair is floating
    return update.blocks[0]


def stacks_on(adapter: PeftAdapter, model: nn.Module) -> dict[str, tuple[LowRankSettings, Tensor, Tensor]]:
    """Return the settings, A (e*r, i) and B (e*o, r) of each adapted parameter of the model, by path.

    Raise UserError if the adapter holds factors of other parameters.
    """
    what, wanted = adapter.what, dict.fromkeys(adapter.settings.target_parameters or ())
    keys = stack_keys(model, dict.fromkeys(name for name, _ in model.named_parameters() if selects(wanted, name)))
    if set(keys.values()) != set(adapter.stacks):
        differing = min(set(keys.values()) ^ set(adapter.stacks))
        raise UserError(
            f"{what}: the factors at '{differing}' do not fit the parameters that {list(wanted)} name in this "
            f"{type(model).__name__}; {_BASE}."
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
