"""Plain LoRA in the folder layout that the peft package reads: adapter_config.json and adapter_model.safetensors.

Export folds every scale into B (alpha = r, no rslora), names full module paths, and writes init_lora_weights true, so
that no reader can get the scale wrong or touch the base again. A principal start is exported as rank 2r, [A; A0] and
[B, -B0], per-block factors as one block-diagonal pair: both exact. Import is strict where peft only warns.

Layout: key base_model.model.<path>.lora_{A,B}.weight; A (r, i), B (o, r); for Conv2d A (r, c, kh, kw), B (o, r, 1, 1).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from vismt.errors import UserError
from vismt.lowrank.files import atomic_write, read_json, read_tensors
from vismt.lowrank.inject import AdaptRecord, adapted_modules, install, need_record, record_of
from vismt.lowrank.linear import AdaptedConv2d
from vismt.lowrank.parts import need_idle, stock_order
from vismt.lowrank.sites import Site
from vismt.lowrank.store import fill
from vismt.lowrank.targets import kind_of, matrix_shape

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
REPLAYED = ("pissa", "corda", "olora", "lora_ga", "loftq")
UNREADABLE = (
    "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "trainable_token_indices",
    "target_parameters", "use_qalora", "use_bdlora",
)


def export_peft(model: nn.Module, folder: str | Path, *, compact: bool = False) -> Path:
    """Write an adapted model as a plain LoRA. compact drops vanishing directions by QR and a small SVD.

    Raises UserError where the model does more than plain LoRA (a router that has not faded).
    """
    record = need_record(model, "export_peft")
    need_idle(model, "export_peft")
    if not record.sites:
        raise UserError(f"export_peft: '{record.method}' has no low-rank factors; merge the model and save it whole.")
    saved = _whole_modules(model, record)
    with stock_order(model):
        payload, ranks = _plain_lora(model, saved, compact)
    common = max(ranks.values())
    pattern = {re.escape(path): rank for path, rank in ranks.items() if rank != common}
    causal = type(model).__name__.endswith("ForCausalLM")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM" if causal else None, "inference_mode": True,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "r": common, "lora_alpha": common, "rank_pattern": pattern, "alpha_pattern": dict(pattern),
        "target_modules": sorted(ranks), "modules_to_save": saved or None, "bias": "none", "lora_dropout": 0.0,
        "fan_in_fan_out": any(site.kind == "conv1d" for site in record.sites), "init_lora_weights": True,
        "use_rslora": False, "use_dora": False,
    }
    if not causal:
        config["auto_mapping"] = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    folder = Path(folder)
    atomic_write(folder / TENSORS, safetensors.torch.save(payload, metadata={"format": "pt"}))
    atomic_write(folder / CONFIG, json.dumps(config, indent=2))
    return folder


def _plain_lora(model: nn.Module, whole: list[str], compact: bool) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Copies of all tensors under peft's keys, whole modules among them, and the rank at each path."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for path, host in adapted_modules(model).items():
        update = host.low_rank().to(dtype=torch.float32)
        if compact:
            update = update.compact().balanced()
        A, B = update.R, update.L * update.scale
        if isinstance(host, AdaptedConv2d):
            A, B = A.view(-1, *host.weight.shape[1:]), B[:, :, None, None]
        tensors[f"{PREFIX}{path}.lora_A.weight"], tensors[f"{PREFIX}{path}.lora_B.weight"] = A, B
        ranks[path] = update.rank
    for path in whole:
        tensors.update({f"{PREFIX}{path}.{name}": value for name, value in model.get_submodule(path).named_parameters()})
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, ranks


def import_peft(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put a LoRA that peft wrote on a stock model, as method 'lora'. Returns the model.

    Refused: other tuner types, DoRA and the like, and starts that change the base (pissa, corda, ...): convert those to a
    plain LoRA first (peft: save_pretrained(path_initial_model_for_weight_conversion=...)).
    """
    folder = Path(folder)
    what = f"peft adapter '{folder}'"
    if record_of(model) is not None:
        raise UserError(f"{what}: the model already carries '{record_of(model).method}'; merge or unadapt it first.")
    config = read_json(folder / CONFIG, what)
    if not isinstance(config, dict):
        raise UserError(f"{what}: {CONFIG} holds no settings.")
    _refuse(what, config)
    tensors = _load(folder, what)
    pairs, extras = _sort(what, tensors)
    parameters = dict(model.named_parameters())
    for name, value in extras.items():
        if name not in parameters:
            raise UserError(f"{what}: '{PREFIX}{name}' belongs to no parameter of {type(model).__name__}.")
        if value.shape != parameters[name].shape:
            raise UserError(f"{what}: {name}: saved {tuple(value.shape)}, needed {tuple(parameters[name].shape)}.")
    sites = [_site(what, model, config, path, pair) for path, pair in pairs.items()]
    install(model, "lora", sites, {"dropout": float(config.get("lora_dropout") or 0.0)}, list(extras))
    flat = {f"{path}.lora_{side}": value.flatten(1) for path, pair in pairs.items() for side, value in pair.items()}
    fill(model, {**flat, **extras})
    return model


def _whole_modules(model: nn.Module, record: AdaptRecord) -> list[str]:
    """Paths of the modules whose every parameter is trained along; peft cannot save less than a module."""
    paths = sorted({name.rpartition(".")[0] for name in record.also_train})
    for path in paths:
        own = {f"{path}.{name}" if path else name for name, _ in model.get_submodule(path).named_parameters()}
        if not path or not own <= set(record.also_train):
            odd = next(name for name in record.also_train if name.rpartition(".")[0] == path)
            raise UserError(f"export_peft: '{odd}' is trained without the rest of its module; peft saves whole modules.")
    return paths


def _refuse(what: str, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"{what}: peft_type {config.get('peft_type')!r}; only LORA can be read.")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(REPLAYED):
        raise UserError(
            f"{what}: init_lora_weights '{start}' changed the base it was trained on; convert it to a plain LoRA with peft first."
        )
    for key in UNREADABLE:
        if config.get(key):
            raise UserError(f"{what}: '{key}' is set; that variant is not a plain LoRA and cannot be read.")
    if config.get("bias", "none") != "none":
        raise UserError(f"{what}: bias '{config['bias']}'; only adapters with frozen biases can be read.")


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
    for key, value in tensors.items():
        if not key.startswith(PREFIX):
            raise UserError(f"{what}: key '{key}' lacks the prefix '{PREFIX}'; the file was not written by peft.")
        name = key[len(PREFIX):]
        found = re.fullmatch(r"(.*)\.lora_([AB])(?:\.default)?\.weight", name)
        if found:
            pairs.setdefault(found[1], {})[found[2]] = value
        elif "lora_" in name:
            raise UserError(f"{what}: '{key}' belongs to a variant that is not a plain LoRA.")
        else:
            extras[name.replace(".modules_to_save.default.", ".")] = value
    for path, pair in pairs.items():
        if len(pair) != 2:
            raise UserError(f"{what}: '{path}' has lora_{next(iter(pair))} but not its partner.")
    if not pairs:
        raise UserError(f"{what}: it holds no lora_A and lora_B.")
    return pairs, extras


def _site(what: str, model: nn.Module, config: Mapping[str, Any], path: str, pair: Mapping[str, Tensor]) -> Site:
    modules = dict(model.named_modules())
    if path not in modules or kind_of(modules[path]) is None:
        raise UserError(f"{what}: {type(model).__name__} has no linear or convolution '{path}'.")
    try:
        rank = int(_pattern(config.get("rank_pattern"), path, config["r"]))
        alpha = float(_pattern(config.get("alpha_pattern"), path, config["lora_alpha"]))
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(f"{what}: {CONFIG}: r, lora_alpha or their patterns cannot be read ({error}).") from error
    shape = matrix_shape(modules[path])
    for side, wanted in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
        saved = tuple(pair[side].flatten(1).shape)
        if saved != wanted:
            raise UserError(f"{what}: {path}.lora_{side}: saved {saved}, needed {wanted}.")
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return Site(path, str(kind_of(modules[path])), shape, rank, scale, (shape[0],))


def _pattern(table: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """peft's rule: the first key whose regex matches the end of the path after a dot."""
    return next((value for key, value in (table or {}).items() if re.match(rf"(.*\.)?({key})$", path)), default)
