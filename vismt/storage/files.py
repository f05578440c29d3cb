"""Files that are written whole or not at all. A damaged file raises a one-line UserError when it is read.

A file is written beside its place under a name that ends in PARTIAL, synced, and renamed. Then its folder is synced. A killed
process leaves files of that ending, which `remove_partial` deletes at the next start.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, BinaryIO, get_args, get_origin

from safetensors import SafetensorError

from vismt.base.errors import UserError, shown_value
from vismt.storage.paths import read_bytes, regular_file

if TYPE_CHECKING:  # reading JSON, as `vismt list` does, does not need torch
    from torch import Tensor

MOST_JSON = 2**26  # bytes of a JSON file
PARTIAL = ".vismt-partial"
JsonObject = dict[str, Any]  # decoded JSON or YAML: texts, numbers, booleans, null, lists and objects
Types = Mapping[str, Any]  # type of the value of each key of a JSON object
NO_TYPES: Types = {}
_DIGEST = "sha256"  # key of a JSON file with the digest of all other keys
# Name in safetensors of each dtype of torch.
DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


def parse_json(text: str | bytes, strict: bool = False) -> Any:
    """Return the content of JSON text. Raise ValueError, also for deep nesting and for half a surrogate pair.

    strict: Whether to refuse a key given twice, a number that is not finite, and whole numbers of more than 64 bits too.
    """
    hooks: dict[str, Any] = {}
    if strict:
        hooks = {"object_pairs_hook": _unique, "parse_int": _whole, "parse_float": _finite, "parse_constant": _finite}
    try:
        content = json.loads(text, **hooks)
        # an escape as json.dumps writes a pair, or half a pair, which no file can hold
        if "\\ud" in str(text).lower():
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _unique(pairs: list[tuple[str, object]]) -> JsonObject:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {shown_value(next(name for name in names if names.count(name) > 1))} is given twice")
    return result


def _whole(text: str) -> int:
    value = int(text)
    if value.bit_length() > 64:
        raise ValueError(f"a whole number of {value.bit_length()} bits; at most 64 are read")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown_value(text)} is not a finite number")
    return value


def read_json(path: Path, what: str, strict: bool = False) -> Any:
    """Return the content of a JSON file. If it cannot be read, a UserError names the file.

    strict: See `parse_json`.
    """
    try:
        return parse_json(read_bytes(path, MOST_JSON).decode(), strict)
    except FileNotFoundError as error:
        raise UserError(f"{what}: no file '{path}'.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: '{path}' cannot be read as JSON ({error}).") from error


def sealed(content: Mapping[str, object], indent: int | None = None) -> str:
    """Return JSON text of an object and its digest, from which `read_sealed` and `is_sealed` see whether a file was changed."""
    return json.dumps({**content, _DIGEST: _digest_of(content)}, indent=indent)


def is_sealed(content: Mapping[str, object]) -> bool:
    """Return whether a JSON file still has the content that was written."""
    return content.get(_DIGEST) == _digest_of(content)


def read_sealed(path: Path, what: str, needed: Types = NO_TYPES, may: Types = NO_TYPES) -> JsonObject:
    """Return the content of a JSON file that was written as `sealed`, without its digest.

    needed, may: See `misfit`.

    Raise UserError for a file that cannot be read, was changed after it was written, or has other content than a run writes.
    """
    content = read_json(path, what)
    if not isinstance(content, dict) or not is_sealed(content):
        raise UserError(f"{what}: '{path}' was changed or damaged after it was written; delete it to make it again.")
    fault = misfit(content, needed, may)
    if fault is not None:
        raise UserError(
            f"{what}: '{path}' does not have the content that a run writes: {fault}; delete it to make it again."
        )
    return {name: value for name, value in content.items() if name != _DIGEST}


def misfit(content: Mapping[str, object], needed: Types, may: Types = NO_TYPES) -> str | None:
    """Return what is wrong with an object of JSON. Return None if nothing is wrong.

    needed: Type of each key that it must have: float (also a whole number), int, str, bool, None, dict[str, T], list[T] or a
    union of these. may: Type of each key that may be missing.
    """
    for name, hint in {**needed, **may}.items():
        if name not in content:
            if name in needed:
                return f"it lacks '{name}'"
        elif not _fits(content[name], hint):
            return f"'{name}' is {shown_value(content[name])}"
    return None


def _fits(value: object, hint: object) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(_fits(value, member) for member in arguments)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, arguments[1]) for item in value.values())
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if type(value) is int:
        return hint in (int, float) and value.bit_length() < 64
    return type(value) is hint


def _digest_of(content: Mapping[str, object]) -> str:
    plain = {name: value for name, value in json.loads(json.dumps(content)).items() if name != _DIGEST}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_tensors(path: Path, what: str) -> tuple[bytes, dict[str, Tensor]]:
    """Return a safetensors file as bytes and tensors. If it cannot be read, a UserError names the file."""
    import safetensors.torch

    try:
        payload = regular_file(path).read_bytes()
        return payload, safetensors.torch.load(payload)
    except FileNotFoundError as error:
        raise UserError(f"{what}: no file '{path}'.") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{what}: '{path}' is damaged or not a safetensors file ({error}).") from error


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new file, and never a part.

    Raise UserError if the folder cannot be written or the disk is full. The old file is then kept.
    """
    payload = data.encode("utf8") if isinstance(data, str) else data
    _write(Path(path), lambda file: file.write(payload))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file atomically, tensor by tensor, without a second copy of all tensors. Return its SHA-256 as text.

    "{digest}" in the file's name is replaced by the first 12 digits of the SHA-256. Tied tensors are written under each of
    their names. Raise UserError for a dtype that safetensors does not have, and for a file that cannot be written. The old file
    is then kept.
    """
    import torch

    header: JsonObject = {"__metadata__": dict(metadata)} if metadata else {}
    # The format needs wide numbers first, so that every tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    offset = 0
    for name, value in ordered:
        dtype = DTYPES.get(str(value.dtype))
        if dtype is None:
            raise UserError(
                f"cannot write '{path}': '{name}' has dtype {value.dtype}, which safetensors does not have."
            )
        end = offset + value.numel() * value.element_size()
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    hasher = hashlib.sha256()

    def write(file: BinaryIO) -> None:
        def put(part: Any) -> None:
            hasher.update(part)
            file.write(part)

        put(len(text).to_bytes(8, "little") + text)
        for _, value in ordered:
            put(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())

    _write(Path(path), write, lambda name: name.replace("{digest}", hasher.hexdigest()[:12]))
    return hasher.hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits. The file is read in pieces."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            hasher.update(piece)
    return hasher.hexdigest()


def _write(path: Path, write: Callable[[BinaryIO], object], name_of: Callable[[str], str] = str) -> None:
    """Let `write` fill a new file, and put it at `path`, under the name that `name_of` makes of the name of `path`."""
    try:
        with new_file(path, name_of) as file:
            write(file)
    except OSError as error:
        raise cannot_write(path, error) from error


@contextmanager
def new_file(path: Path, name_of: Callable[[str], str] = str) -> Iterator[BinaryIO]:
    """Yield a file to fill. At the end of the block it replaces `path`, whole and synced. After an error it does not.

    name_of: Function that makes the final name from the name of `path`.
    """
    check_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(PARTIAL, f".{path.name}.", path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)  # the mask can only be read by setting it
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path.with_name(name_of(path.name)))
        sync_folder(path.parent)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


@contextmanager
def new_files(folder: Path, first: str) -> Iterator[Path]:
    """Yield an empty folder to fill. At the end of the block its files move to `folder`. After an error they do not.

    They move when all are complete, the file `first` before the others. Raise UserError if they cannot be written.
    """
    check_name(folder)
    scratch = folder / f".new{PARTIAL}"
    added = not folder.exists()
    try:
        shutil.rmtree(scratch, ignore_errors=True)  # left by a killed process
        scratch.mkdir(parents=True)
        yield scratch
        names = sorted(path.relative_to(scratch) for path in scratch.rglob("*") if path.is_file())
        for name in sorted(names, key=lambda name: name != Path(first)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(scratch / name, folder / name)
        sync_folder(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if added:
            with suppress(OSError):  # it has files
                folder.rmdir()


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to the disk, if the system can."""
    with suppress(OSError):  # Windows opens no folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_name(path: Path) -> None:
    """Raise UserError for a path with a null character. No file can have such a path."""
    if "\0" in str(path):
        shown = str(path).replace("\0", "\\0")
        raise UserError(f"'{shown}' has a null character, and no name of a file can have it; give another name.")


def cannot_write(path: Path, error: OSError) -> UserError:
    """Return the error for a file that cannot be written."""
    reason = error.strerror or str(error)
    return UserError(f"cannot write '{path}': {reason}. Free space or choose a folder that can be written.")


def remove_partial(folder: Path) -> None:
    """Delete the files and folders that killed processes have not finished, in a folder and below it. Hold its lock meanwhile."""
    for path in list(folder.rglob(f".*{PARTIAL}")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
