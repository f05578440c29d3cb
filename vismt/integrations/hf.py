"""Adapted models in the Trainer of transformers and TRL, and on the Hugging Face hub."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.integrations.method_driver import DriverCallback
from vismt.lowrank.files.peft_folder import export_peft
from vismt.lowrank.files.save_load import save_adapter, weight_fingerprint
from vismt.lowrank.layers.base import factor_rank
from vismt.lowrank.model.record import count_parameters, need_record
from vismt.methods import METHODS
from vismt.report.renderers import fill_page
from vismt.report.tables import row_text, scale_text
from vismt.storage.files import atomic_write, write_tensors
from vismt.uncertainty.intervals import interval_kind_text
from vismt.verification.verify import verify_written

try:
    from transformers import TrainerCallback, trainer
except ImportError as error:
    raise UserError(
        'vismt.integrations.hf: needs transformers, which is not installed: pip install "vismt[llm]".'
    ) from error

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

    from vismt.report.results import Result

_ADAPTER = "adapter"  # a folder of a checkpoint
_BELONGS = "vismt"  # the key of what a checkpoint belongs to among the callbacks' states in trainer_state.json
_WEIGHTS = "model.safetensors"  # of a checkpoint
_IGNORED = "_keys_to_ignore_on_save"  # of transformers' models; read by save_pretrained, and by Trainer when it resumes


class VismtCallback(DriverCallback, TrainerCallback):
    """What an adapted model needs in a Trainer: `Trainer(..., callbacks=[VismtCallback()])`.

    A checkpoint holds the trained tensors alone. They are in model.safetensors and in the folder adapter/, which
    `vismt.load_adapter` reads. `trainer.train(resume_from_checkpoint=...)` continues from them on a base that is adapted in the
    same way. The callback runs the schedules of methods (LISA's layers, fading routers) and their optimisers (PoLAR's landing).

    Args:
        sections: Settings of schedules by the schedules' names in a configuration, such as fade=FadeConfig(0.0, 0.5) for emtal.

    Raises:
        UserError: The model is not adapted when the Trainer is made, or a checkpoint belongs to another base, method or
            settings.
    """

    _ignored: Any = None
    _resuming: Any = None  # the handle of the check of a checkpoint's tensors

    def on_init_end(self, args: object, state: object, control: object, **given: nn.Module) -> None:
        """Make the Trainer save and load the trained tensors alone."""
        found = importlib.util.find_spec("datasets")
        if trainer.is_datasets_available() and found is not None and found.origin is None:
            raise UserError(
                "Trainer: a folder called datasets is taken for Hugging Face's package of that name, which is not installed; pip "
                "install datasets, or start in another folder."
            )
        self.drive(given["model"])
        _check_tied(given["model"])
        self._ignored = getattr(given["model"], _IGNORED, None)
        self._ignore_frozen()
        self._resuming = given["model"].register_load_state_dict_pre_hook(self._check_tensors)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **given: Any) -> None:
        driver, optimizer = self.driver, given["optimizer"]
        self._resuming.remove()
        states = getattr(state, "stateful_callbacks", {})
        driver.check_resumed(states.get(_BELONGS, self.belongs), self.belongs)
        states[_BELONGS] = self.belongs  # written into every checkpoint
        self._ignore_frozen()
        if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
            driver.warn_of_optimizers("DeepSpeed and FSDP hold the parameters in pieces")
        elif getattr(optimizer, "scaler", None) is not None:
            driver.warn_of_optimizers("fp16 scales the gradients; train with bf16")
        elif hasattr(optimizer, "accelerator_state"):  # accelerate's, around the optimiser of training
            optimizer.optimizer = driver.wrap(optimizer.optimizer)
        else:
            driver.warn_of_optimizers(f"{type(optimizer).__name__} is not an optimiser of accelerate")
        driver.start(optimizer, state.max_steps, state.global_step)
        finds = getattr(args, "ddp_find_unused_parameters", None)
        if args.world_size > 1 and not finds and any(method.freezes for _, method in driver.adapted):
            warnings.warn("layers are frozen in turn: set ddp_find_unused_parameters=True.", stacklevel=2)

    def on_step_end(self, args: object, state: TrainerState, control: object, **given: object) -> None:
        self.driver.on_step(state.global_step)

    def on_save(self, args: Any, state: TrainerState, control: object, **given: nn.Module) -> None:
        if not state.is_world_process_zero:
            return
        driver = self.driver
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not hasattr(given["model"], "save_pretrained"):  # the Trainer has written all weights
            write_tensors(folder / _WEIGHTS, driver.moving(), {"format": "pt"})
        for number, (part, _) in enumerate(driver.adapted):
            save_adapter(part, folder / (f"{_ADAPTER}-{number}" if number else _ADAPTER))

    def on_train_end(self, args: object, state: object, control: object, **given: object) -> None:
        """Give the model's `save_pretrained` its usual keys back."""
        setattr(given["model"], _IGNORED, self._ignored)

    def _check_tensors(self, model: nn.Module, state: dict[str, Tensor], *_: object) -> None:
        """Refuse the tensors of another adapter.

        The Trainer loads the tensors and the state of the optimiser before training begins.
        """
        held = model.state_dict()
        seen = {name: "is in it alone" for name in state if name not in held}
        for name, value in model.named_parameters():
            if value.requires_grad and name not in state:
                seen[name] = "is not in it"
            elif value.requires_grad and state[name].shape != value.shape:
                seen[name] = f"is {tuple(state[name].shape)}, here {tuple(value.shape)}"
        if seen:
            name = next((name for name in seen if name in held), next(iter(seen)))
            raise UserError(
                f"resume: the checkpoint is of an adapter with another method or other settings ('{name}' {seen[name]}); adapt "
                "the model as for that training, or start without a checkpoint."
            )

    def _ignore_frozen(self) -> None:
        driver = self.driver
        names = self._ignored
        if hasattr(driver.model, "save_pretrained"):
            names = {*(names or ()), *(driver.model.state_dict().keys() - driver.moving().keys())}
        setattr(driver.model, _IGNORED, names)


def _check_tied(model: Any) -> None:
    """Raise UserError if the head was untied and the configuration ties it, as the Trainer does when it resumes."""
    ties = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if ties and getattr(model, "_tied_weights_keys", None):
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        if head is not None and head.weight is not table.weight:
            raise UserError(
                "Trainer: the head has a weight of its own, and a resumed training would tie it to the embeddings; set "
                "model.config.tie_word_embeddings = False."
            )


def write_repository(
    model: nn.Module, folder: str | Path, *, base: str, results: Iterable[Result] = (), title: str | None = None
) -> Path:
    """Write the folder of a model repository: the adapter, a plain LoRA for peft if the method has one, and a model card.

    Args:
        model: Adapted model.
        folder: Folder to write. It is made if it is missing.
        base: Name of the base model on the hub or in timm.
        results: Numbers for the card, such as a `vismt.StudyResults`.
        title: Title of the card. The default is the method and the base.

    Returns:
        The folder.

    Raises:
        UserError: The model is not adapted, trained parameters are missing from the adapter, or `vismt verify` calls the folder
            broken.
    """
    record = need_record(model, "write_repository")
    folder = save_adapter(model, folder, strict=True)
    in_peft = bool(record.layers) and METHODS[record.method].exports
    if in_peft:
        export_peft(model, folder)
    paths = [site.path for site in record.layers]
    trainable, total = count_parameters(model)
    facts = [
        ("method", record.method),
        ("base model", base),
        ("rank", f"{factor_rank(record.layers)}" if record.layers else ""),
        ("trainable parameters", f"{trainable:,} of {total:,}"),
        ("weight fingerprint of the base", weight_fingerprint(model, paths) if paths else ""),
    ]
    facts.append(("vismt verify", verify_written(folder).status))
    rows = [row for row in results if row.seed is None]
    card = fill_page(
        Path(__file__).with_name("model_card.md"),
        title=title or f"{record.method} on {base}",
        base=base,
        facts=facts,
        in_peft=in_peft,
        kinds=dict.fromkeys(interval_kind_text(row.interval, row.units) for row in rows),
        rows=rows,
        scale_text=scale_text,
        row_text=row_text,
    )
    atomic_write(folder / "README.md", card)
    return folder


def push_to_hub(
    model: nn.Module,
    repository: str,
    folder: str | Path,
    *,
    base: str,
    results: Iterable[Result] = (),
    title: str | None = None,
    token: str | None = None,
    private: bool = False,
) -> str:
    """Write a model repository to a folder and upload it to the Hugging Face hub.

    Args:
        model: Adapted model.
        repository: Name "user/name" of the repository. It is made if it is missing.
        folder: Folder to write, as in `write_repository`.
        base: Name of the base model on the hub or in timm.
        results: Numbers for the card, such as a `vismt.StudyResults`.
        title: Title of the card. The default is the method and the base.
        token: Token of the hub. None takes the token of `hf auth login`.
        private: Whether a new repository is private.

    Returns:
        The address of the repository.

    Raises:
        UserError: `write_repository` refuses the model, or the hub cannot be reached or does not grant access. In the second
            case the folder is written.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    written = write_repository(model, folder, base=base, results=results, title=title)
    hub = HfApi(token=token)
    try:
        address = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=written, commit_message="Adapter of vismt")
    except (OSError, HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"push_to_hub: '{repository}' cannot be written ({reason}); the folder '{written}' is complete, upload it with "
            f"`hf upload {repository} {written}`."
        ) from error
    return str(address)
