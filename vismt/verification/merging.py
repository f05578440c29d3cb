"""`vismt merge ADAPTER`: an adapter folder of vismt or peft is merged into its base and written as a stock model.

The adapter is verified against its base before the merge. The merged checkpoint is verified against both before it is put in its
place.
A LoRA is merged by vismt. Other tuners of peft, and DoRA, are merged by the installed peft.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from vismt.backbones import timm_models
from vismt.backbones.assets import list_assets, load_asset_card
from vismt.backbones.lm import quiet_transformers
from vismt.backbones.vit import classifier_paths
from vismt.base.errors import UserError
from vismt.lowrank.files.peft_folder import import_peft
from vismt.lowrank.files.save_load import load_adapter
from vismt.lowrank.model.merge import merge
from vismt.storage.files import JsonObject, atomic_write, new_files, write_tensors
from vismt.storage.outputs import NOTE, check_folder, note_outputs
from vismt.storage.wheels import one_line
from vismt.verification.checkpoints import open_checkpoint, translated
from vismt.verification.facts import MODEL_CONFIG, WEIGHTS, Facts, read_facts
from vismt.verification.verify import Verdict, verify

COMMAND = "merge"
# Files beside the weights of a language model that belong to its tokenizer and settings.
BESIDE: tuple[str, ...] = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
BESIDE += ("preprocessor_config.json", "processor_config.json", "*.tiktoken")


def merge_adapter(folder: Path, base: str, target: Path) -> Verdict:
    """Write the base with an adapter merged into its weights to a folder.

    Args:
        folder: Folder that `save_adapter`, `export_peft` or peft wrote.
        base: The model that the adapter was trained on: a folder or file, an asset, a name of timm or of the hub.
        target: Folder for the stock model: the folder of transformers' save_pretrained, or weights and config.json for timm.

    Returns:
        The verdict on the merged checkpoint, which is not broken.

    Raises:
        UserError: If the adapter is broken or does not fit the base, the base cannot be read, the verification finds the merge
            broken, or the folder holds other files. Nothing is written then.
    """
    check_folder(COMMAND, target)
    with TemporaryDirectory(prefix="vismt-") as scratch:
        facts = read_facts(folder)
        place = _timm_base(base, facts, Path(scratch)) or base.removesuffix(f"/{WEIGHTS}")
        _need_sound(verify(folder, base=place), f"'{folder}' on '{base}'")
        held = open_checkpoint(place, "base")
        if "architecture" in held.model_config:
            model: Any = _timm_model(held, facts)
        else:
            model = _transformers_model(held, facts)
        merged = _merged(model, facts)
        with new_files(target, first=NOTE) as new:
            note_outputs(COMMAND, new)
            _write(merged, held, facts, new)
            verdict = verify(folder, base=place, merged=new)
            _need_sound(verdict, "the merged checkpoint")
    return verdict


def _need_sound(verdict: Verdict, what: str) -> None:
    if verdict.status == "broken":
        worst = verdict.findings[0]
        fix = f" Fix: {worst.fix}." if worst.fix else ""
        raise UserError(f"merge: {what} is broken: {worst.text}.{fix} Nothing is written; `vismt verify` says more.")


def _timm_base(name: str, adapter: Facts, folder: Path) -> Path | None:
    """Write the weights of a timm model to a folder, by its name or the name of an asset. None for any other base.

    A head that the adapter saves replaces the head of the weights.
    """
    import timm

    card = load_asset_card(name) if name in list_assets() else None
    architecture = name if card is None else card.architecture
    if architecture is None or "/" in architecture or not timm.is_model(architecture.partition(".")[0]):
        return None
    model: Any = timm_models.skeleton(name)
    classes = _saved_classes(model, adapter) or (model.pretrained_cfg.get("num_classes", 0) if card is None else 0)
    stock: Any = timm_models.create(name, pretrained=True, num_classes=classes).vit
    about = {"architecture": architecture, "num_classes": classes, "pretrained_cfg": _preprocessing(stock)}
    _write_timm(stock, about, folder)
    return folder


def _preprocessing(model: Any) -> JsonObject:
    names = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    return {name: model.pretrained_cfg[name] for name in names if name in model.pretrained_cfg}


def _saved_classes(model: nn.Module, adapter: Facts) -> int:
    """Return the number of classes of the head that an adapter holds whole. 0 without such a head."""
    heads = {f"{path}.weight" for path in classifier_paths(model)}
    shapes = [tensor.shape for tensor in adapter.with_role("saved") if tensor.path in heads]
    return shapes[0][0] if shapes else 0


def _timm_model(base: Facts, adapter: Facts) -> nn.Module:
    about = base.model_config
    arguments = {"img_size": about.get("img_size"), **(about.get("model_args") or {})}
    size = arguments["img_size"]
    size = tuple(size) if isinstance(size, list) else size
    name = str(about["architecture"])
    heads = [f"{path}.weight" for path in classifier_paths(timm_models.skeleton(name))]
    rows = [base.tensors[head].shape[0] for head in heads if head in base.tensors]
    saved = _saved_classes(timm_models.skeleton(name), adapter)
    classes = saved or (rows[0] if rows else 0)
    return timm_models.create(name, size, base.folder / WEIGHTS, num_classes=classes, new_head=bool(saved)).vit


def _transformers_model(base: Facts, adapter: Facts) -> Any:
    held = translated(base, adapter)
    if held.library is None:
        raise UserError(
            f"merge: the model in '{base.folder}' cannot be built: the installed transformers does not know it, and its "
            f"{MODEL_CONFIG} names no architecture of timm. Load the model in Python and use vismt.import_peft and vismt.merge."
        )
    heads = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
    rows = [tensor.shape[0] for tensor in adapter.with_role("saved") if tensor.path.endswith(heads)]
    options = {"num_labels": rows[0]} if rows else {}
    kind = type(held.library.model)
    import transformers

    try:
        with quiet_transformers(transformers):
            model = kind.from_pretrained(
                base.folder,
                dtype="auto",
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=bool(rows),
                **options,
            )
    except Exception as error:  # transformers raises whatever a file leads to
        raise UserError(
            f"merge: {kind.__name__} does not read '{base.folder}' ({one_line(str(error), 200)})."
        ) from error
    return model.eval()


def _merged(model: nn.Module, adapter: Facts) -> nn.Module:
    """Return a model with an adapter merged into its weights."""
    if adapter.kind == "vismt":
        return merge(load_adapter(model, adapter.folder))
    try:
        return merge(import_peft(model, adapter.folder))
    except UserError as error:
        if find_spec("peft") is None:
            raise UserError(f"merge: {error} The package peft may merge it: pip install peft.") from error
        refused = error
    import peft

    owners = Counter(id(value) for _, value in model.named_parameters(remove_duplicate=False))
    tied = [name for name, value in model.named_parameters() if owners[id(value)] > 1]
    for path in adapter.modules:  # peft would change the weights of both modules
        if any(f".{name}".endswith(f".{path}.weight") for name in tied):
            raise UserError(
                f"merge: '{path}' is tied to another module, whose output a merge would change; load it with peft."
            )
    try:
        return peft.PeftModel.from_pretrained(model, str(adapter.folder)).merge_and_unload(safe_merge=True)
    except Exception as error:  # peft raises whatever a folder leads to
        raise UserError(f"merge: {refused} peft refuses it, too ({one_line(str(error), 200)}).") from error


def _write(model: Any, base: Facts, adapter: Facts, folder: Path) -> None:
    if "architecture" in base.model_config:
        about = dict(base.model_config)
        if about.get("num_classes") != model.num_classes:
            about.pop("label_names", None)
        # timm reads the folder of a model only with these two.
        needed = {
            "pretrained_cfg": _preprocessing(model),
            "model_args": {"img_size": about["img_size"]} if about.get("img_size") else {},
        }
        _write_timm(model, {**needed, **about, "num_classes": model.num_classes}, folder)
        return
    import transformers

    with quiet_transformers(transformers):
        model.save_pretrained(folder)
    source = adapter.folder if adapter.tokenizer else base.folder
    for path in source.iterdir() if source.is_dir() else ():
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in BESIDE):
            shutil.copyfile(path, folder / path.name)


def _write_timm(model: nn.Module, about: dict[str, object], folder: Path) -> None:
    write_tensors(folder / WEIGHTS, model.state_dict(), {"format": "pt"})
    atomic_write(folder / MODEL_CONFIG, json.dumps(about, indent=1))
