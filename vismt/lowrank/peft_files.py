"""What peft wrote, as data: the settings with the modules they name, factor pairs by path, and whole parameters.

peft builds its layers from the settings and copies the file over them; a layer that the file does not fill keeps B = 0, a
tensor without a layer is dropped, and both are warnings at most. Here either is an error. Its rules, as of peft 0.21:

    target_modules       a text: full match; 'all-linear'; a list: the path, or a suffix of it after a dot
    layers_to_transform  with a list, the first number after a dot (or after layers_pattern) is one of these
    exclude_modules      as target_modules; wins, and so does modules_to_save, which takes every path that ends so
    rank_pattern, ...    the first key whose regular expression matches the end of the path after a dot
    fan_in_fan_out       says nothing about A and B; the module itself tells
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

    low_rank: by path, L = B (o, r), R = A (r, i or c*kh*kw). extras: whole parameters by name. what: its name in messages.
    """

    what: str
    config: Mapping[str, Any]
    low_rank: dict[str, LowRank]
    extras: dict[str, Tensor]

    @property
    def replay(self) -> bool:
        """Whether it was trained on what an exact SVD leaves of the base."""
        return str(self.config.get("init_lora_weights")).lower() == "pissa"

    def targets(self, model: nn.Module) -> set[str]:
        """Paths of the linears and convolutions that the settings name."""
        found = {path for path, module in model.named_modules() if path and kind_of(module) and self._names(path)}
        if str(self.config.get("target_modules")).lower() == "all-linear":
            getter = getattr(
                model, "get_output_embeddings", None
            )  # transformers' alone are left out, a timm head is not
            head = getter() if callable(getter) else None
            found = {
                p for p in found if kind_of(model.get_submodule(p)) != "conv2d" and model.get_submodule(p) is not head
            }
        return found

    def need_the_same_modules(self, model: nn.Module) -> None:
        """UserError where the modules that the settings name are not those of the file."""
        named, held = self.targets(model), set(self.low_rank)
        modules = dict(model.named_modules())
        for path in sorted(held - named):
            if path not in modules or kind_of(modules[path]) is None:
                raise UserError(f"{self.what}: {type(model).__name__} has no linear or convolution '{path}'.")
            raise UserError(f"{self.what}: the file holds factors of '{path}', which the settings do not name.")
        for path in sorted(named - held):
            more = f" ({len(named - held)} such modules)" if len(named - held) > 1 else ""
            raise UserError(f"{self.what}: the settings name '{path}', of which the file holds no factors{more}.")

    def kept(self, model: nn.Module) -> dict[str, Tensor]:
        """Whole parameters of the file by the names that the model has for them."""
        parameters, wanted = dict(model.named_parameters(remove_duplicate=False)), self._promised(model)
        held = {**parameters, **dict(model.named_buffers())}
        sharing: dict[int, list[str]] = {}
        for name, parameter in parameters.items():
            sharing.setdefault(id(parameter), []).append(name)
        for name in sorted(wanted - set(self.extras)):
            why = f"bias '{self.config.get('bias')}', modules_to_save {self.config.get('modules_to_save')}"
            raise UserError(f"{self.what}: '{name}' is missing, which the settings say the file holds ({why}).")
        found: dict[str, Tensor] = {}
        for name, value in self.extras.items():
            if name not in held:
                raise UserError(f"{self.what}: '{PREFIX}{name}' belongs to no parameter of {type(model).__name__}.")
            if value.shape != held[name].shape:
                raise UserError(f"{self.what}: {name}: saved {tuple(value.shape)}, needed {tuple(held[name].shape)}.")
            names = sharing.get(id(held[name]), [])
            if wanted.isdisjoint(names):  # peft saves the embeddings along when one of them is adapted
                if not _equal(value, held[name]):
                    raise UserError(
                        f"{self.what}: the file holds other values of '{name}', which the settings do not name; load the base it "
                        "was trained on."
                    )
                continue
            # Of tied weights peft trains a copy of one, which unties them.
            if any(other not in self.extras or not torch.equal(self.extras[other], value) for other in names):
                other = next(other for other in names if other != name)
                raise UserError(
                    f"{self.what}: '{name}' was trained apart from '{other}', whose weight it shares here; untie them first."
                )
            found[names[0]] = value
        return found

    def _promised(self, model: nn.Module) -> set[str]:
        """Names of the parameters that the settings say are in the file: of modules_to_save, and biases."""
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        wanted = _texts(self.config.get("modules_to_save"))
        paths = [
            path for path, _ in model.named_modules(remove_duplicate=False) if path and path.endswith(tuple(wanted))
        ]
        found = {name for path in paths for name in names if name.startswith(f"{path}.")} if wanted else set()
        biases = {name for name in names if name == "bias" or name.endswith(".bias")}
        if self.config.get("bias") == "lora_only":
            biases &= {f"{path}.bias" for path in self.low_rank}
        return found | biases if self.config.get("bias", "none") != "none" else found

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
        found = next(filter(None, (re.match(rule, path) for rule in rules)), None)
        return int(found[1]) if found else None


def read_peft(folder: Path) -> PeftAdapter:
    """UserError for damaged files, for a variant that is no plain LoRA, and for a start that cannot be replayed."""
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
        whole = bool(_texts(targets)) and (layers is None or bool(_numbers(layers)) or layers == [])
        excluded = config.get("exclude_modules")
        _texts(excluded)
        texts = [text for key in ("modules_to_save", "layers_pattern") for text in _texts(config.get(key))]
        for pattern in [*texts, *(text for text in (targets, excluded) if isinstance(text, str))]:
            re.compile(pattern)
    except (TypeError, re.error) as error:
        raise UserError(f"{what}: {CONFIG}: what names the modules cannot be read ({error}).") from error
    if not whole:
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
    """Factor pairs by module path, and whole parameters by name."""
    pairs: dict[str, dict[str, Tensor]] = {}
    extras: dict[str, Tensor] = {}
    for key, value in sorted(tensors.items()):
        if not key.startswith(PREFIX):
            raise UserError(f"{what}: key '{key}' lacks the prefix '{PREFIX}'; the file was not written by peft.")
        name = key[len(PREFIX) :]
        found = re.fullmatch(r"(.*)\.lora_([AB])(?:\.default)?\.weight", name)
        if found:
            pairs.setdefault(found[1], {})[found[2]] = value
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
    for side, factor, wanted in (("A", A, (rank, A.shape[1])), ("B", B, (B.shape[0], rank))):
        if tuple(factor.shape) != wanted:
            raise UserError(f"{what}: {path}.lora_{side}: saved {tuple(factor.shape)}, needed {wanted}.")
    return LowRank(B, A, scale=scale)


def _pattern(table: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """Peft's rule: the first key whose regex matches the end of the path after a dot."""
    return next((value for key, value in (table or {}).items() if re.match(rf"(.*\.)?({key})$", path)), default)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Of the same values, or one a cast of the other."""
    one, other = one.detach().cpu(), other.detach().cpu()
    return torch.equal(one, other.to(one.dtype)) or torch.equal(one.to(other.dtype), other)


def _ends(path: str, suffixes: Iterable[str]) -> bool:
    return any(path == suffix or path.endswith(f".{suffix}") for suffix in suffixes)


def _texts(value: Any) -> list[str]:
    """One text or several; TypeError for anything else."""
    found = [] if value is None else [value] if isinstance(value, str) else list(value)
    if not all(isinstance(text, str) for text in found):
        raise TypeError(f"{value!r} holds what is no text")
    return found


def _numbers(value: Any) -> list[int]:
    found = [value] if isinstance(value, int) else list(value)
    if not all(isinstance(number, int) for number in found):
        raise TypeError(f"{value!r} holds what is no whole number")
    return found
