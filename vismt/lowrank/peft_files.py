"""A peft folder as data: the settings with the modules they name, factor pairs by path, and whole parameters.

peft builds its layers from the settings and copies the file over them; a layer that the file does not fill keeps B = 0, a
tensor without a layer is dropped, and both are warnings at most. Here either is an error. Its rules, as of peft 0.21:

    target_modules       a text: full match; 'all-linear'; a list: the path, or a suffix of it after a dot
    layers_to_transform  with a list, the first number after a dot (or after layers_pattern) is one of these
    exclude_modules      as target_modules; wins, and so does modules_to_save, which takes every path that ends so
    rank_pattern, ...    the first key whose regular expression matches the end of the path after a dot
    fan_in_fan_out       does not concern A and B; the class of the module decides
    target_parameters    experts in one parameter; their factors, and those of attentions, lie elsewhere (peft_readers.py)
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vismt.errors import UserError
from vismt.files import read_tensors
from vismt.lowrank import strict_json
from vismt.lowrank.factors import LowRank
from vismt.lowrank.patterns import Pattern, PatternError
from vismt.lowrank.peft_readers import added, attention_paths, names_stack, refuse_passed_by, stock_path
from vismt.lowrank.targets import LINEAR, candidates, kind_of
from vismt.lowrank.values import check_factor, check_finite, check_parameter

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Starts that leave the base as it is; every other one moved a part of it into the factors.
STARTS = ("gaussian", "eva", "orthogonal", "mica")
VARIANTS = (
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "kasa_config",
    "megatron_config",
)
OF_A_START = ("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config")
BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class PeftSettings:
    """The settings in adapter_config.json that decide what the file means; ValueError for values out of range."""

    r: int
    lora_alpha: float
    target_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: str | list[str] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = False
    bias: str = "none"
    lora_dropout: float | None = 0.0
    init_lora_weights: bool | str | None = True
    peft_version: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= (self.lora_dropout or 0.0) < 1:
            raise ValueError(f"lora_dropout: {self.lora_dropout}; it must be a number in [0, 1)")
        for name, rank in {
            "r": self.r,
            **{f"rank_pattern['{key}']": n for key, n in (self.rank_pattern or {}).items()},
        }.items():
            if rank < 1:
                raise ValueError(f"{name}: {rank}; it must be a whole number, at least 1")
        for patterns in (self.targets, self.excluded, self.saved, self.layer_names, self.ranks, self.alphas):
            del patterns  # compiled here, so that a malformed one is found while the folder is read

    # A text is an expression of the whole path, a list holds paths and suffixes.
    @cached_property
    def targets(self) -> Pattern | list[str]:
        return _paths("target_modules", self.target_modules)

    @cached_property
    def excluded(self) -> Pattern | list[str]:
        return _paths("exclude_modules", self.exclude_modules)

    @cached_property
    def saved(self) -> list[Pattern]:
        return [_pattern("modules_to_save", text) for text in texts(self.modules_to_save)]

    @cached_property
    def layer_names(self) -> list[Pattern]:
        return [_pattern("layers_pattern", text) for text in texts(self.layers_pattern)]

    @cached_property
    def ranks(self) -> list[tuple[Pattern, int]]:
        return [(_pattern("rank_pattern", key), rank) for key, rank in (self.rank_pattern or {}).items()]

    @cached_property
    def alphas(self) -> list[tuple[Pattern, float]]:
        return [(_pattern("alpha_pattern", key), alpha) for key, alpha in (self.alpha_pattern or {}).items()]

    @property
    def everywhere(self) -> bool:
        """Whether all linears are named."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    def selects(self, path: str) -> bool:
        """Return whether target_modules name a path."""
        return _selects(self.targets, path)

    def scale(self, path: str) -> tuple[int, float]:
        """Return the rank and the factor of the update at `path`."""
        rank: int = _value(self.ranks, path, self.r)
        alpha: float = _value(self.alphas, path, self.lora_alpha)
        return rank, alpha / (rank**0.5 if self.use_rslora else rank)


@dataclass(frozen=True)
class PeftAdapter:
    """A folder that peft wrote, read but not compared with a model.

    low_rank: by path, L = B (o, r), R = A (r, i or c*kh*kw). extras: whole parameters by name. stacks: factors of
    target_parameters as they are saved, by key. what: name in messages.
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
        paths = {path for path, module in model.named_modules() if path and kind_of(module) and self._names(path)}
        if self.settings.everywhere:
            # Only the head of a transformers model is left out, not that of a timm model.
            getter = getattr(model, "get_output_embeddings", None)
            head = getter() if callable(getter) else None
            modules = {path: model.get_submodule(path) for path in paths}
            paths = {path for path in paths if kind_of(modules[path]) in LINEAR and modules[path] is not head}
            return paths
        named = {path for path, _ in model.named_modules() if path and self._names(path)}
        return paths.union(*(attention_paths(model, path) for path in named))

    def need_the_same_modules(self, model: nn.Module) -> None:
        """Raise UserError where the modules that the settings name are not those of the file."""
        named, saved = self.targets(model), set(self.low_rank)
        known = candidates(model)
        refuse_passed_by(self.what, dict(model.named_modules()), saved)
        for path in sorted(saved - named):
            if path not in known:
                raise UserError(f"{self.what}: {type(model).__name__} has no linear or convolution '{path}'.")
            raise UserError(f"{self.what}: the file holds factors of '{path}', which the settings do not name.")
        for path in sorted(named - saved):
            more = f" ({len(named - saved)} such modules)" if len(named - saved) > 1 else ""
            raise UserError(f"{self.what}: the settings name '{path}', but the file holds no factors of it{more}.")

    def kept(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the whole parameters of the file under the names that the model has for them."""
        parameters, promised = dict(model.named_parameters(remove_duplicate=False)), self._promised(model)
        tensors = {**parameters, **dict(model.named_buffers())}
        sharing: dict[int, list[str]] = {}
        for name, parameter in parameters.items():
            sharing.setdefault(id(parameter), []).append(name)
        for name in sorted(promised - set(self.extras)):
            why = f"bias '{self.settings.bias}', modules_to_save {self.settings.modules_to_save}"
            raise UserError(f"{self.what}: '{name}' is missing, which the settings say the file holds ({why}).")
        kept: dict[str, Tensor] = {}
        for name, value in self.extras.items():
            if name not in tensors:
                raise UserError(f"{self.what}: '{PREFIX}{name}' belongs to no parameter of {type(model).__name__}.")
            if value.shape != tensors[name].shape:
                raise UserError(
                    f"{self.what}: {name}: saved {tuple(value.shape)}, needed {tuple(tensors[name].shape)}."
                )
            check_parameter(f"{self.what}: {name}", value, tensors[name])
            names = sharing.get(id(tensors[name]), [])
            if promised.isdisjoint(names):  # peft saves the embeddings along when one of them is adapted
                if not _equal(value, tensors[name]):
                    raise UserError(
                        f"{self.what}: the file holds other values of '{name}', which the settings do not name; load the base it "
                        "was trained on."
                    )
                continue
            # peft trains a copy of one of two tied weights, which unties them.
            if any(alias not in self.extras or not torch.equal(self.extras[alias], value) for alias in names):
                alias = next(alias for alias in names if alias != name)
                raise UserError(
                    f"{self.what}: '{name}' was trained apart from '{alias}', whose weight it shares here; untie them first."
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

    def _names(self, path: str) -> bool:
        settings = self.settings
        if _selects(settings.excluded, path) or any(holds(name, path) for name in settings.saved):
            return False
        if settings.everywhere:
            return True
        layers = settings.layers_to_transform
        wanted = [layers] if isinstance(layers, int) else layers
        if not wanted or isinstance(settings.targets, Pattern):
            return _selects(settings.targets, path)
        # A full path counts whatever the layers are.
        return path in settings.targets or (_selects(settings.targets, path) and self._layer(path) in wanted)

    def _layer(self, path: str) -> int | None:
        if not self.settings.layer_names:
            match = re.match(r".*?\.[^.]*\.(\d+)\.", path)
            return int(match[1]) if match else None
        for name in self.settings.layer_names:
            for end in (end for start in _starts(path) for end in name.ends(path, start)):
                match = re.match(r"\.(\d+)\.", path[end:])
                if match:
                    return int(match[1])
        return None


def read_peft(folder: Path) -> PeftAdapter:
    """Return the folder as data.

    Raises UserError for damaged files, a variant that is not a plain LoRA, and a start that cannot be replayed.
    """
    what = f"peft adapter '{folder}'"
    config = strict_json.read(folder / CONFIG, what)
    if not isinstance(config, dict):
        raise UserError(f"{what}: {CONFIG} holds no settings.")
    settings = _settings(what, config)
    pairs, extras = _sort(what, _load(folder, what))
    for name, value in extras.items():
        check_finite(f"{what}: {name}", value)
    parameters = settings.target_parameters or []
    stacks = {
        key for key in pairs if names_stack(parameters, key) and (settings.everywhere or not settings.selects(key))
    }
    low_rank = {}
    for key in pairs.keys() - stacks:
        path, named = stock_path(key, pairs.keys())
        update = _low_rank(what, settings, path, named, pairs[key])
        times = 1 if named == path else added(path, settings.peft_version)
        low_rank[path] = replace(update, scale=update.scale * times)
    return PeftAdapter(what, settings, dict(sorted(low_rank.items())), extras, {key: pairs[key] for key in stacks})


def _settings(what: str, config: Mapping[str, Any]) -> PeftSettings:
    """Return the settings; UserError for another tuner, a variant, and values that cannot be read."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"{what}: peft_type {config.get('peft_type')!r}; only LORA can be read.")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in (*STARTS, "pissa"):
        raise UserError(
            f"{what}: init_lora_weights '{start}' changed the base it was trained on and cannot be replayed; convert it to a "
            "plain LoRA with peft first: save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    for key, value in config.items():
        unknown = key not in OF_A_START and (key.startswith("use_") or key.endswith("_config")) and key != "use_rslora"
        if value and (key in VARIANTS or unknown):
            raise UserError(f"{what}: '{key}' is set; that variant is not a plain LoRA and cannot be read.")
    names = {field.name for field in fields(PeftSettings)}
    try:
        settings = strict_json.build(PeftSettings, {key: value for key, value in config.items() if key in names})
    except ValueError as error:
        raise UserError(f"{what}: {CONFIG} cannot be read ({error}).") from error
    if settings.bias not in BIASES:
        raise UserError(f"{what}: bias {settings.bias!r}; it must be one of {', '.join(BIASES)}.")
    if not texts(settings.target_modules) and not settings.target_parameters:
        raise UserError(f"{what}: {CONFIG}: target_modules {settings.target_modules!r} name no module.")
    return settings


def _load(folder: Path, what: str) -> dict[str, Tensor]:
    legacy = folder / "adapter_model.bin"
    if not (folder / TENSORS).exists() and legacy.exists():
        try:
            content = torch.load(legacy, map_location="cpu", weights_only=True)
        except Exception as error:  # a torn file makes the reader raise whatever its bytes spell
            raise UserError(f"{what}: '{legacy}' is damaged ({type(error).__name__}).") from error
        if not isinstance(content, dict) or not all(_plain(key, value) for key, value in content.items()):
            raise UserError(f"{what}: '{legacy}' is not a mapping of plain tensors by name, as peft writes it.")
        return content
    return read_tensors(folder / TENSORS, what)[1]


def _plain(name: Any, value: Any) -> bool:
    """Return whether an entry of an older file is a name and a dense tensor that holds as many values as its shape says."""
    dense = (
        isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized
    )
    return dense and value.device.type == "cpu" and value.untyped_storage().nbytes() >= value.numel() * value.itemsize


def _sort(what: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return the factor pairs by module path, and whole parameters by name."""
    pairs: dict[str, dict[str, Tensor]] = {}
    extras: dict[str, Tensor] = {}
    for key, value in sorted(tensors.items()):
        if not key.startswith(PREFIX):
            raise UserError(f"{what}: key '{key}' lacks the prefix '{PREFIX}'; the file was not written by peft.")
        name = key[len(PREFIX) :]
        match = re.fullmatch(r"(.*)\.lora_([AB])(?:\.default)?\.weight", name)
        table = re.fullmatch(r"(.*)\.lora_embedding_([AB])(?:\.default)?", name)
        if match:
            pairs.setdefault(match[1], {})[match[2]] = value
        elif table and value.ndim == 2:  # of an embedding, whose table peft transposes
            pairs.setdefault(table[1], {})["BA"[table[2] == "B"]] = value.t()
        elif "lora_" in name:
            raise UserError(f"{what}: '{key}' belongs to a variant that is not a plain LoRA.")
        elif ".original_module." not in name:
            extras[re.sub(r"\.(modules_to_save(\.default)?|base_layer)\.(?=[^.]+$)", ".", name)] = value
    for path, pair in pairs.items():
        if len(pair) != 2:
            raise UserError(f"{what}: '{path}' has lora_{next(iter(pair))} but not its partner.")
    if not pairs:
        raise UserError(f"{what}: it holds no lora_A and lora_B.")
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


def _value(table: Iterable[tuple[Pattern, Any]], path: str, default: Any) -> Any:
    """Return the value of the first expression that matches the end of the path after a dot, as in peft."""
    for pattern, value in table:
        if any(len(path) in pattern.ends(path, start) for start in _starts(path)):
            return value
    return default


def _paths(key: str, value: str | list[str] | None) -> Pattern | list[str]:
    return _pattern(key, value) if isinstance(value, str) else value or []


def _pattern(key: str, text: str) -> Pattern:
    try:
        return Pattern(text)
    except PatternError as error:
        raise ValueError(
            f"{key}: {reprlib.repr(text)} is not a regular expression that can be matched: {error}"
        ) from error


def _starts(path: str) -> list[int]:
    """Return where the names in a path begin: at its start and after each dot."""
    return [0, *(dot.end() for dot in re.finditer(r"\.", path))]


def _selects(modules: Pattern | list[str], path: str) -> bool:
    """Return whether an expression matches the path, or a list holds it or a suffix of it after a dot."""
    if isinstance(modules, Pattern):
        return modules.matches(path)
    return any(path == suffix or path.endswith(f".{suffix}") for suffix in modules)


def holds(name: Pattern, path: str) -> bool:
    """Return whether some names in a row in the path match."""
    return any(path[end:][:1] in ("", ".") for start in _starts(path) for end in name.ends(path, start))


def _equal(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors have the same values, or one is a cast of the other."""
    first, second = first.detach().cpu(), second.detach().cpu()
    return torch.equal(first, second.to(first.dtype)) or torch.equal(first.to(second.dtype), second)


def texts(value: str | list[str] | None) -> list[str]:
    """Return one text or several as a list."""
    return [value] if isinstance(value, str) else value or []
