"""A peft folder as data: the settings with the modules they name, factor pairs by path, and whole parameters.

peft builds its layers from the settings and copies the file over them; a layer that the file does not fill keeps B = 0, a
tensor without a layer is dropped, and both are warnings at most. Here either is an error. Its rules, as of peft 0.21:

    target_modules       a text: full match; 'all-linear'; a list: the path, or a suffix of it after a dot
    layers_to_transform  with a list, the first number after a dot (or after layers_pattern) is one of these
    exclude_modules      as target_modules; wins, and so does modules_to_save, which takes every path that ends so
    rank_pattern, ...    the first key whose regular expression matches the end of the path after a dot
    fan_in_fan_out       does not concern A and B; the class of the module decides
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vismt.errors import UserError
from vismt.files import read_json, read_tensors
from vismt.lowrank.factors import LowRank
from vismt.lowrank.targets import kind_of

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Starts that leave the base as it is; every other one moved a part of it into the factors.
STARTS = ("gaussian", "eva", "orthogonal", "mica")
VARIANTS = (
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
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
class PeftAdapter:
    """A folder that peft wrote, read but not compared with a model.

    low_rank: by path, L = B (o, r), R = A (r, i or c*kh*kw). extras: whole parameters by name. what: name in messages.
    """

    what: str
    config: Mapping[str, Any]
    low_rank: dict[str, LowRank]
    extras: dict[str, Tensor]

    @property
    def replay(self) -> bool:
        """Whether it was trained on the rest of the base after an exact SVD start."""
        return str(self.config.get("init_lora_weights")).lower() == "pissa"

    def targets(self, model: nn.Module) -> set[str]:
        """Return the paths of the linears and convolutions that the settings name."""
        paths = {path for path, module in model.named_modules() if path and kind_of(module) and self._names(path)}
        if str(self.config.get("target_modules")).lower() == "all-linear":
            # Only the head of a transformers model is left out, not that of a timm model.
            getter = getattr(model, "get_output_embeddings", None)
            head = getter() if callable(getter) else None
            modules = {path: model.get_submodule(path) for path in paths}
            paths = {path for path in paths if kind_of(modules[path]) != "conv2d" and modules[path] is not head}
        return paths

    def need_the_same_modules(self, model: nn.Module) -> None:
        """Raise UserError where the modules that the settings name are not those of the file."""
        named, saved = self.targets(model), set(self.low_rank)
        modules = dict(model.named_modules())
        for path in sorted(saved - named):
            if path not in modules or kind_of(modules[path]) is None:
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
            why = f"bias '{self.config.get('bias')}', modules_to_save {self.config.get('modules_to_save')}"
            raise UserError(f"{self.what}: '{name}' is missing, which the settings say the file holds ({why}).")
        kept: dict[str, Tensor] = {}
        for name, value in self.extras.items():
            if name not in tensors:
                raise UserError(f"{self.what}: '{PREFIX}{name}' belongs to no parameter of {type(model).__name__}.")
            if value.shape != tensors[name].shape:
                raise UserError(
                    f"{self.what}: {name}: saved {tuple(value.shape)}, needed {tuple(tensors[name].shape)}."
                )
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
        endings = tuple(_texts(self.config.get("modules_to_save")))
        paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path and path.endswith(endings)]
        saved = {name for path in paths for name in names if name.startswith(f"{path}.")}
        biases = {name for name in names if name == "bias" or name.endswith(".bias")}
        if self.config.get("bias") == "lora_only":
            biases &= {f"{path}.bias" for path in self.low_rank}
        return saved | biases if self.config.get("bias", "none") != "none" else saved

    def _names(self, path: str) -> bool:
        targets, excluded = self.config.get("target_modules"), self.config.get("exclude_modules")
        if excluded and (re.fullmatch(excluded, path) if isinstance(excluded, str) else _ends(path, excluded)):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in _texts(self.config.get("modules_to_save"))):
            return False
        if isinstance(targets, str):
            return targets.lower() == "all-linear" or re.fullmatch(targets, path) is not None
        layers = self.config.get("layers_to_transform")
        # A full path counts whatever the layers are.
        return path in targets or (
            _ends(path, targets) and (layers in (None, []) or self._layer(path) in _numbers(layers))
        )

    def _layer(self, path: str) -> int | None:
        patterns = _texts(self.config.get("layers_pattern"))
        rules = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
        match = next(filter(None, (re.match(rule, path) for rule in rules)), None)
        return int(match[1]) if match else None


def read_peft(folder: Path) -> PeftAdapter:
    """Return the folder as data.

    Raises UserError for damaged files, a variant that is not a plain LoRA, and a start that cannot be replayed.
    """
    what = f"peft adapter '{folder}'"
    config = read_json(folder / CONFIG, what)
    if not isinstance(config, dict):
        raise UserError(f"{what}: {CONFIG} holds no settings.")
    _refuse(what, config)
    pairs, extras = _sort(what, _load(folder, what))
    return PeftAdapter(
        what, config, {path: _low_rank(what, config, path, pair) for path, pair in pairs.items()}, extras
    )


def _refuse(what: str, config: Mapping[str, Any]) -> None:
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
    if config.get("bias", "none") not in BIASES:
        raise UserError(f"{what}: bias {config['bias']!r}; it must be one of {', '.join(BIASES)}.")
    try:
        targets, layers = config.get("target_modules"), config.get("layers_to_transform")
        complete = bool(_texts(targets)) and (layers is None or bool(_numbers(layers)) or layers == [])
        excluded = config.get("exclude_modules")
        _texts(excluded)
        texts = [text for key in ("modules_to_save", "layers_pattern") for text in _texts(config.get(key))]
        for pattern in [*texts, *(text for text in (targets, excluded) if isinstance(text, str))]:
            re.compile(pattern)
    except (TypeError, re.error) as error:
        raise UserError(f"{what}: {CONFIG}: the settings that name the modules cannot be read ({error}).") from error
    if not complete:
        raise UserError(
            f"{what}: {CONFIG}: target_modules {targets!r} and layers_to_transform {layers!r} name no module."
        )


def _load(folder: Path, what: str) -> dict[str, Tensor]:
    legacy = folder / "adapter_model.bin"
    if not (folder / TENSORS).exists() and legacy.exists():
        try:
            return torch.load(legacy, map_location="cpu", weights_only=True)
        except Exception as error:  # a torn file makes the reader raise whatever its bytes spell
            raise UserError(f"{what}: '{legacy}' is damaged ({type(error).__name__}).") from error
    return read_tensors(folder / TENSORS, what)[1]


def _sort(what: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return the factor pairs by module path, and whole parameters by name."""
    pairs: dict[str, dict[str, Tensor]] = {}
    extras: dict[str, Tensor] = {}
    for key, value in sorted(tensors.items()):
        if not key.startswith(PREFIX):
            raise UserError(f"{what}: key '{key}' lacks the prefix '{PREFIX}'; the file was not written by peft.")
        name = key[len(PREFIX) :]
        match = re.fullmatch(r"(.*)\.lora_([AB])(?:\.default)?\.weight", name)
        if match:
            pairs.setdefault(match[1], {})[match[2]] = value
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


def _low_rank(what: str, config: Mapping[str, Any], path: str, pair: Mapping[str, Tensor]) -> LowRank:
    try:
        rank = int(_pattern(config.get("rank_pattern"), path, config["r"]))
        alpha = float(_pattern(config.get("alpha_pattern"), path, config["lora_alpha"]))
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, re.error) as error:
        raise UserError(f"{what}: {CONFIG}: r, lora_alpha or their patterns cannot be read ({error}).") from error
    A, B = pair["A"].flatten(1), pair["B"].flatten(1)
    for side, factor, needed in (("A", A, (rank, A.shape[1])), ("B", B, (B.shape[0], rank))):
        if tuple(factor.shape) != needed:
            raise UserError(f"{what}: {path}.lora_{side}: saved {tuple(factor.shape)}, needed {needed}.")
    return LowRank(B, A, scale=scale)


def _pattern(table: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """Return the value of the first key whose regex matches the end of the path after a dot, as peft does."""
    return next((value for key, value in (table or {}).items() if re.match(rf"(.*\.)?({key})$", path)), default)


def _equal(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors have the same values, or one is a cast of the other."""
    first, second = first.detach().cpu(), second.detach().cpu()
    return torch.equal(first, second.to(first.dtype)) or torch.equal(first.to(second.dtype), second)


def _ends(path: str, suffixes: Iterable[str]) -> bool:
    return any(path == suffix or path.endswith(f".{suffix}") for suffix in suffixes)


def _texts(value: Any) -> list[str]:
    """Return a list of texts, from one text or several; TypeError for anything else."""
    if value is None:
        return []
    texts = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{value!r} holds something else than texts")
    return texts


def _numbers(value: Any) -> list[int]:
    numbers = [value] if isinstance(value, int) else list(value)
    if not all(isinstance(number, int) for number in numbers):
        raise TypeError(f"{value!r} holds something else than whole numbers")
    return numbers
