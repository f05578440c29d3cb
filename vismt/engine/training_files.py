"""The files of one training under arms/: adapter/, the job's files, and done.json, written last to mark it as finished.

done.json has the digests of the other files. A trained net is therefore the one that was saved, or it is refused.
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.engine.checkpoint import is_checkpoint
from vismt.engine.study import Training
from vismt.lowrank.files.description import read_adapter
from vismt.lowrank.files.save_load import DESCRIPTION, check_tensors, load_adapter, save_adapter
from vismt.lowrank.model.merge import merge
from vismt.lowrank.model.modules import is_mergeable
from vismt.storage.files import JsonObject, atomic_write, file_digest, read_sealed, read_tensors, sealed

ADAPTER = "adapter"
DONE = "done.json"
MERGE = "merge.json"
CHANGES = "changes.jsonl"  # changes of the weights, matrix by matrix
STEPS = "steps"  # folder of the weights at checkpoints, each in a folder like that of a finished training
VALIDATION_FILE = "validation.jsonl"  # the validation score at these steps
DONE_TYPES = {"method": str, "rank": int, "trainable": int, "total": int}
_FILES = "files"  # key of done.json with the digest of each file by its path in the folder


def finish(model: nn.Module, folder: Path, with_adapter: bool, about: dict[str, object]) -> None:
    """Write the adapter of a model, if it has one, and then done.json with the facts `about` the adaptation."""
    if with_adapter:
        save_adapter(model, folder / ADAPTER, strict=None)  # what is trained beside it is in the job's files
    weights = sorted(path for path in folder.glob("*.safetensors") if not is_checkpoint(path))
    kept = [folder / ADAPTER / DESCRIPTION, *weights] if with_adapter else weights
    files = {path.relative_to(folder).as_posix(): file_digest(path) for path in kept}
    atomic_write(folder / DONE, sealed({**about, _FILES: files}))


def read_done(training: Training) -> JsonObject | None:
    """Return the content of a finished training's done.json. Return None for an unfinished training."""
    path = training.folder / DONE
    if not path.exists():
        return None
    about = read_sealed(path, f"run '{training.folder}'", may=DONE_TYPES)
    return {name: value for name, value in about.items() if name != _FILES}


def check_files(folder: Path) -> None:
    """Raise UserError if files of a finished training differ from the ones that its done.json names."""
    if not (folder / DONE).exists():
        return
    about = read_sealed(folder / DONE, f"run '{folder}'", {_FILES: dict[str, str]})
    for name, digest in about[_FILES].items():
        path = folder / name
        if not path.is_file() or file_digest(path) != digest:
            raise UserError(
                f"run '{folder}': {name} is missing or was changed after the training; delete {DONE} to train again."
            )


def has_adapter(training: Training) -> bool:
    """Return whether a finished training has an adapter."""
    return (training.folder / ADAPTER).is_dir()


def check_finished(training: Training) -> str:
    """Return a training's name in messages. Raise UserError for an unfinished training and for one with changed files."""
    what = f"run '{training.folder}'"
    if read_done(training) is None:
        raise UserError(f"{what}: the training is not finished; `vismt train` goes on with it.")
    check_files(training.folder)
    return what


def check_weights(training: Training) -> None:
    """Raise UserError like `check_finished`, and for an adapter with other tensors than were saved."""
    check_finished(training)
    if has_adapter(training):
        read_adapter(training.folder / ADAPTER)


def restore(model: nn.Module, training: Training) -> str:
    """Load the adapter into an untrained model. Return the training's name in messages. Raise the errors of `check_finished`."""
    what = check_finished(training)
    if has_adapter(training):
        load_adapter(model, training.folder / ADAPTER)
    return what


def fold(model: nn.Module, training: Training) -> None:
    """Merge a trained model's update into its weights if that is possible."""
    if has_adapter(training) and is_mergeable(model):
        merge(model)


def needs_merge_check(training: Training) -> bool:
    """Return whether there is an adapter that may be mergeable, and no merge.json yet."""
    return has_adapter(training) and not (training.folder / MERGE).exists()


def state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a module as contiguous tensors on the CPU."""
    return {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}


def write_state(module: nn.Module, path: Path) -> None:
    """Write the `state` of a module, for `load_state`."""
    atomic_write(path, safetensors.torch.save(state(module)))


def load_state(module: nn.Module, path: Path, what: str) -> None:
    """Load a file of `write_state` into a module.

    Raise UserError for a missing or damaged file and for tensors that do not fit. `what` names the training.
    """
    tensors = read_tensors(path, f"{what}: {path.name}")[1]
    needed = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    check_tensors(f"{what}: {path.name}", needed, tensors)
    module.load_state_dict(tensors)
