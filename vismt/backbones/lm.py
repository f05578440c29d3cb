"""Causal language models of Hugging Face: a name, a folder or an asset becomes a model and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from vismt.backbones.assets import get_asset, list_assets, load_asset_card
from vismt.backbones.weight_sources import quiet_logger
from vismt.base.errors import UserError, near
from vismt.storage.wheels import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INSTALL = 'pip install "vismt[llm]"'


def create_lm(
    name_or_path: str | Path,
    *,
    gguf_file: str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal LM in evaluation mode on the CPU, and its tokenizer.

    Code in the folder or repository is never run.

    Args:
        name_or_path: Asset of kind lm ("smollm2-135m-instruct"), folder, or name on the hub.
        gguf_file: Name of a .gguf file inside the folder or repository. Its quantised weights are expanded to `dtype`.
        dtype: Dtype of the weights. None for the dtype of the checkpoint, or float32 for GGUF.
        revision: Branch, tag or commit on the hub.

    Raises:
        UserError: transformers is not installed, the model cannot be found or read, or it is not a causal LM.
    """
    transformers = _transformers(gguf_file)
    place = str(name_or_path)
    if place in list_assets():
        card = load_asset_card(place)
        if card.kind != "lm":
            raise UserError(
                f"asset '{place}' is a vision transformer, not a language model: use vismt.backbones.vit.create."
            )
        gguf_file = gguf_file or (card.file if card.file.endswith(".gguf") else None)
        _transformers(gguf_file)
        place = str(get_asset(place))
    elif gguf_file is not None and Path(place).is_dir() and not (Path(place) / gguf_file).is_file():
        names = [path.name for path in Path(place).glob("*.gguf")]
        raise UserError(f"language model '{place}': the file '{gguf_file}' is missing.{near(gguf_file, names)}")
    weights_dtype: torch.dtype | str | None = dtype
    if dtype is None:
        weights_dtype = torch.float32 if gguf_file else "auto"
    options = {"gguf_file": gguf_file, "revision": revision}
    options = {key: value for key, value in options.items() if value is not None}
    # On a GPU transformers would else fetch kernels from the hub, which are code of others, at load or at `train()`.
    expanded: dict[str, Any] = {"use_kernels": False}
    if gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # Without this line transformers 5 may keep the blocks packed, and marks even expanded weights as quantised,
        # which cannot be saved.
        expanded["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if Path(place).is_dir() and gguf_file is None and not (Path(place) / "config.json").is_file():
        raise UserError(f"language model '{place}': the folder has no config.json; for a .gguf in it pass gguf_file.")
    try:
        with quiet_logger("huggingface_hub"), quiet_transformers(transformers):
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                place, trust_remote_code=False, dtype=weights_dtype, **options, **expanded
            )
    except Exception as error:  # transformers' readers raise any kind of error for a damaged file
        reason = one_line(str(error).rstrip(". \n"), 200)
        if isinstance(error, ImportError):
            raise UserError(f"language model '{place}' needs another package: {reason}. {INSTALL}") from error
        lms = [name for name in list_assets() if load_asset_card(name).kind == "lm"]
        raise UserError(
            f"language model '{name_or_path}' cannot be loaded: {reason}.{near(str(name_or_path), lms)} "
            "Give a folder with config.json, a causal LM on the hub, or an asset."
        ) from error
    return model.eval(), tokenizer


def _transformers(gguf_file: str | None) -> ModuleType:
    try:
        import transformers

        if gguf_file is not None:
            import accelerate  # noqa: F401 - transformers reads GGUF with both
            import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(f"language models need the package {error.name}: {INSTALL}") from error
    return transformers


@contextmanager
def quiet_transformers(transformers: ModuleType) -> Iterator[None]:
    """Silence transformers' warnings and bars while a model is read or written, then restore the settings."""
    logs = transformers.utils.logging
    bars = logs.is_progress_bar_enabled()
    logs.disable_progress_bar()
    try:
        with quiet_logger("transformers"):
            yield
    finally:
        if bars:
            logs.enable_progress_bar()
