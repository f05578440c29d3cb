"""Plain LoRA in the folder layout that the peft package reads: adapter_config.json and adapter_model.safetensors.

The export folds every scale into B (alpha = r, no rslora), names full module paths, and sets init_lora_weights to true. No
reader can then get the scale wrong or change the base again. A principal start is exported as rank 2r, [A; A0] and [B, -B0].
Factors of several blocks become one block-diagonal pair. Both forms are exact. The import is strict where peft only warns.

Layout: key base_model.model.<path>.lora_{A,B}.weight; A (r, i), B (o, r); for Conv2d A (r, c, kh, kw), B (o, r, 1, 1).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.lowrank.files.facts import PEFT_PREFIX, TENSORS
from vismt.lowrank.files.peft_adapter import PeftAdapter, read_peft
from vismt.lowrank.files.peft_layouts import pad_rank, stack_keys, stack_tensors, with_partners
from vismt.lowrank.files.peft_settings import PEFT_CONFIG
from vismt.lowrank.files.save_load import adapter_tensors, warn_of_lost
from vismt.lowrank.files.updates import of_peft, put_on
from vismt.lowrank.layers.base import AdapterLayer, adapter_layers
from vismt.lowrank.layers.forms import LowRankParameter
from vismt.lowrank.layers.stock_modules import LINEAR, dense_weight, kind_of, matrix_shape
from vismt.lowrank.model.modules import check_mergeable
from vismt.lowrank.model.named import active_adapter, new_adapter
from vismt.lowrank.model.record import AdaptRecord, need_record, refuse_adapted, refuse_offloaded
from vismt.lowrank.model.targets import containers, suffixes
from vismt.lowrank.svd import principal
from vismt.lowrank.tensors import fits, need_finite
from vismt.storage.files import JsonObject, atomic_write


def export_peft(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str | None = None,
    compact: bool = False,
    uniform: bool = False,
    force: bool = False,
    strict: bool = False,
) -> Path:
    """Write an adapted model in peft's layout.

    The update is written as a plain LoRA. A tuner of peft is written in its own format. A warning names parameters that were
    trained and are not in the file, such as a head beside the adapter.

    Args:
        model: Adapted model. It is not changed.
        folder: Folder to write to. It is made if it is missing.
        name: Name of the adapter if the model carries several. None stands for the active adapter.
        compact: Whether to drop vanishing directions by QR and a small SVD, which needs finite values.
        uniform: Whether to pad every pair with zeros to the largest rank, for servers that read one rank. llama.cpp divides
            lora_alpha by the rank of each tensor and reads no rank_pattern.
        force: Whether to write NaN and infinite values too. `import_peft` refuses such a file.
        strict: Whether to raise an error instead of the warning.

    Returns:
        The folder.

    Raises:
        UserError: If the model does more than a plain LoRA can (a router that has not faded, quantised weights), values are not
            finite, or with `strict` trained parameters would not be in the file. Nothing is written then.

    Example:
        model = timm.create_model("vit_small_patch16_224.dino", pretrained=True, num_classes=10)
        vismt.adapt(model, "pissa", targets=["qkv"], rank=8)
        vismt.export_peft(model, "adapter-peft")
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    with active_adapter(model, name, "export_peft"):
        return _export(model, Path(folder), compact, uniform, force, strict)


def _export(model: nn.Module, folder: Path, compact: bool, uniform: bool, force: bool, strict: bool) -> Path:
    record = need_record(model, "export_peft")
    refuse_offloaded(model, "export_peft", whole=True)
    if any(hasattr(value, "full_tensor") for value in adapter_tensors(model).values()):
        raise UserError(
            "export_peft: the weights are sharded by FSDP2; call vismt.save_adapter, load it in one process, and export it there."
        )
    warn_of_lost(model, "export_peft", strict)
    if not record.layers:
        raise UserError(f"export_peft: '{record.method}' has no low-rank factors; merge the model and save it whole.")
    for spec in record.layers:
        if spec.layer.export_refusal:
            raise UserError(f"export_peft: '{record.method}' {spec.layer.export_refusal}.")
    saved = _whole_modules(model, record)
    _refuse_suffixes(model, saved)
    _refuse_shared(model)
    saved_names = _below(model, saved)
    bias = _bias_setting(model, set(record.also_train), saved_names)
    if compact or not force:
        need_finite("export_peft", adapter_tensors(model))
    files = record.layers[0].layer.peft_files(model, record.layers, saved)
    if files is None:
        check_mergeable(model, "export_peft")
        whole = saved_names | set(record.also_train)
        payload, ranks = _plain_lora(model, whole, compact, uniform)
        if not force:
            need_finite("export_peft", payload)
        config = {**_settings(model, record, ranks), "modules_to_save": saved or None, "bias": bias}
        tensors = safetensors.torch.save(payload, metadata={"format": "pt"})
        files = {TENSORS: tensors, PEFT_CONFIG: json.dumps(config, indent=2).encode()}
    elif compact or uniform or bias != "none":
        raise UserError(
            f"export_peft: '{record.method}' has a format of peft's own, without compact, uniform and single biases; leave them "
            "out."
        )
    for name in (TENSORS, PEFT_CONFIG):  # the settings are written last
        atomic_write(folder / name, files[name])
    return folder


def _settings(model: nn.Module, record: AdaptRecord, ranks: dict[str, int]) -> JsonObject:
    """Return the settings of a plain LoRA.

    ranks: Rank of each path that peft is given.
    """
    layers = adapter_layers(model)
    parameters = [path for path in ranks if isinstance(layers.get(path), LowRankParameter)]
    common = max(ranks.values())
    paths = [path for path, module in model.named_modules() if path and (path in ranks or kind_of(module))]
    # peft also takes a path as a suffix. If another module has this suffix, the pattern is anchored.
    inner = {suffix for path in paths for suffix in suffixes(path)[1:]}
    anchors = {path: "^" if path in inner else "" for path in ranks}
    pattern = {anchors[path] + re.escape(path): rank for path, rank in ranks.items() if rank != common}
    named = sorted(ranks.keys() - set(parameters))
    targets = "|".join(re.escape(path) for path in named) if any(anchors.values()) else named
    generates = getattr(model, "can_generate", None)
    config: Any = model.config if callable(generates) and generates() else None
    causal = config is not None and not config.is_encoder_decoder
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "inference_mode": True,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": targets,
        **({"target_parameters": parameters} if parameters else {}),
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(spec.kind == "conv1d" for spec in record.layers),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    if not causal:
        config["auto_mapping"] = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return config


def _plain_lora(
    model: nn.Module, whole: Iterable[str], compact: bool, uniform: bool
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return copies of the factors and of the parameters `whole` under peft's keys, and the rank of each path."""
    tensors: dict[str, Tensor] = {}
    layers = adapter_layers(model)
    stacks = {
        path: layer.stack()
        for path, layer in layers.items()
        if isinstance(layer, LowRankParameter) and layer.weight.dim() == 3
    }
    plain = {path: layer.low_rank() for path, layer in layers.items() if path not in stacks}
    updates = {path: update.to(dtype=torch.float32) for path, update in plain.items()}
    if compact:
        updates = {path: update.compact().balanced() for path, update in updates.items()}
    updates, attention = with_partners(model, updates)
    ranks = {path: update.rank for path, update in updates.items()}
    ranks |= {path: A.shape[1] for path, (A, _) in stacks.items()}
    if uniform:
        common = max(ranks.values())
        for path, update in updates.items():  # without a core, padded with zeros
            A, B = pad_rank(update.A, update.B, common)
            updates[path] = replace(update, B=B, A=A)
        stacks = {path: pad_rank(A, B, common) for path, (A, B) in stacks.items()}
        ranks = dict.fromkeys(ranks, common)
    keys = stack_keys(model, stacks) | attention
    factors = {}
    for path, update in updates.items():
        layer = layers.get(path)
        if layer is None:  # a partner that is not adapted
            factors[path] = {"lora_A.weight": update.A, "lora_B.weight": update.B}
        else:
            factors[path] = dict(zip(layer.peft_names, layer.peft_factors(update)))
    factors |= {path: stack_tensors(A, B) for path, (A, B) in stacks.items()}
    for path, named in factors.items():
        tensors |= {f"{PEFT_PREFIX}{keys.get(path, path)}.{name}": factor for name, factor in named.items()}
    for name in whole:
        path, _, leaf = name.rpartition(".")
        adapted = f"{path}.base_layer.{leaf}" if path in layers else name
        tensors[f"{PEFT_PREFIX}{adapted}"] = model.get_parameter(name)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    given = {attention.get(path, path): rank for path, rank in ranks.items()}
    return tensors, {path: rank for path, rank in given.items() if ".base_layer." not in path}


def import_peft(model: nn.Module, folder: str | Path, *, name: str = "default") -> nn.Module:
    """Put a LoRA that peft wrote on a model as the active adapter, of method "lora".

    The settings and the file have to name the same modules, and every shape has to fit the model. A start that changed the base
    is replayed if that is possible (init_lora_weights "pissa" is an exact SVD, so B0 A0 can be subtracted).

    Args:
        model: Stock model, changed in place.
        folder: Folder that peft or `export_peft` wrote.
        name: Name of the adapter on this model.

    Returns:
        The model.

    Raises:
        UserError: If the folder has other modules or shapes than the model, another tuner type, a variant such as DoRA, or
            another start that changed the base (pissa_niter, corda, olora, ...). Convert such an adapter to a plain LoRA first
            (peft: save_pretrained(path_initial_model_for_weight_conversion=...)).

    Example:
        model = timm.create_model("vit_small_patch16_224.dino", pretrained=True, num_classes=10)
        vismt.adapt(model, "lora", targets=["qkv"], rank=8)
        vismt.export_peft(model, "adapter-peft")
        other = timm.create_model("vit_small_patch16_224.dino", pretrained=True, num_classes=10)
        vismt.merge(vismt.import_peft(other, "adapter-peft"))
    """
    adapter = read_peft(Path(folder))
    with new_adapter(model, name, adapter.what):
        refuse_adapted(model, adapter.what)
        refuse_offloaded(model, adapter.what, whole=True)
        adapter.need_the_same_modules(model)
        starts = _replayed(model, adapter) if adapter.replay else {}
        dropout = adapter.settings.lora_dropout or 0.0
        return put_on(model, of_peft(adapter), {} if starts else {"dropout": dropout}, starts)


def _replayed(model: nn.Module, adapter: PeftAdapter) -> dict[str, Tensor]:
    """Return the principal factors that peft subtracted from each weight, by adapter key."""
    what = adapter.what
    starts: dict[str, Tensor] = {}
    for path, update in adapter.low_rank.items():
        module: Any = model.get_submodule(path)
        if update.shape != matrix_shape(module) or kind_of(module) not in LINEAR or update.rank > min(update.shape):
            raise UserError(f"{what}: '{path}' is not a linear that a start of rank {update.rank} can be replayed on.")
        weight = module.weight.detach().t() if kind_of(module) == "conv1d" else dense_weight(module)
        next_rank = min(update.rank + 1, *update.shape)  # one more, which shows whether the start is unique
        if not fits(weight) or not update.scale:
            raise UserError(f"{what}: the start cannot be replayed: '{path}' is not finite, or lora_alpha is 0.")
        A, B = principal(weight, next_rank, update.scale, generator=torch.Generator())
        values = A.square().sum(1)
        if next_rank > update.rank and not values[-2] - values[-1] > 1e-5 * values[0]:
            raise UserError(
                f"{what}: the start cannot be replayed: the singular values {update.rank} and {next_rank} of '{path}' "
                "are equal; convert it to a plain LoRA with peft first."
            )
        starts |= {f"{path}.lora_A0": A[: update.rank], f"{path}.lora_B0": B[:, : update.rank].contiguous()}
    return starts


def _whole_modules(model: nn.Module, record: AdaptRecord) -> list[str]:
    """Return the outermost modules with every parameter in also_train. A tied weight gives all modules that hold it."""
    trained = {id(model.get_parameter(name)) for name in record.also_train}
    paths: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        inside = bool(paths) and path.startswith(f"{paths[-1]}.")  # the modules inside a module follow it
        candidate = bool(path and module._parameters) and not inside
        if candidate and all(id(parameter) in trained for parameter in module.parameters()):
            paths.append(path)
    return sorted(paths)


def _refuse_suffixes(model: nn.Module, saved: list[str]) -> None:
    """Raise UserError if peft would not adapt a module, because it takes names of whole modules for endings of paths."""
    whole = set(_ending(model, saved))
    for path in adapter_layers(model):
        outer = next((outer for outer in containers(path) if outer in whole), None)
        if outer is not None:
            name = next(name for name in saved if outer.endswith(name))
            raise UserError(
                f"export_peft: peft cannot save '{name}' whole and adapt '{path}', whose path it takes for the same; merge "
                "the model and save it whole."
            )


def _refuse_shared(model: nn.Module) -> None:
    """Raise UserError for a layer at several places. peft would adapt only the first of them. A shared owner is one place."""
    places: dict[int, tuple[int, str, str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, AdapterLayer):
            parent, _, leaf = path.rpartition(".")
            owner = id(model.get_submodule(parent))
            first = places.setdefault(id(module), (owner, leaf, path))
            if first[:2] != (owner, leaf):
                raise UserError(
                    f"export_peft: '{first[2]}' and '{path}' are one module, and peft would adapt only the first; merge "
                    "the model and save it whole."
                )


def _ending(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the paths that end with one of `names`: the modules that peft saves whole."""
    endings = tuple(names)
    return [path for path, _ in model.named_modules(remove_duplicate=False) if path and path.endswith(endings)]


def _below(model: nn.Module, names: Sequence[str]) -> set[str]:
    """Return the names of the parameters that peft saves whole."""
    paths = _ending(model, names)
    return {f"{path}.{key}" for path in paths for key, _ in model.get_submodule(path).named_parameters()}


def _bias_setting(model: nn.Module, trained: set[str], saved: set[str]) -> str:
    """Return peft's setting that saves trained biases besides whole modules. Raise UserError if there is none."""
    rest = trained - saved
    if not rest:
        return "none"
    adapted = {f"{path}.bias" for path, layer in adapter_layers(model).items() if layer.bias is not None}
    everywhere = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    for name, biases in (("lora_only", adapted), ("all", everywhere)):
        if rest <= biases <= trained:
            return name
    raise UserError(
        f"export_peft: '{min(rest)}' is trained without the rest of its module; peft saves whole modules, or all biases of the "
        "model or of what is adapted."
    )
