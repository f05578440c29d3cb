"""Covariances in a folder: covariances.json names the safetensors files of finished and unfinished passes.

Tensors are written first, each file under a new name, and the JSON that names them last, with the digest of each: an
interrupted calibration leaves the state of the previous JSON intact, and a damaged file is refused. A covariance is stored once,
under the path of the leader of its group.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vismt.base.errors import UserError
from vismt.config.json_text import read_json
from vismt.config.typed import JsonFile, build
from vismt.lowrank.files.save_load import check_tensors
from vismt.storage.files import atomic_write, file_digest, is_sealed, sealed, write_tensors
from vismt.storage.paths import regular_file

FORMAT = 1
DESCRIPTION = "covariances.json"


@dataclass
class CovarianceSums:
    """Running sums (i, i) and token counts of one pass by leader, and the samples and batches they include."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    batches: int = 0


def save_covariances(covariances: Mapping[str, Tensor], folder: str | Path) -> Path:
    """Write covariances to a folder; a tensor shared by several paths is written once.

    Args:
        covariances: {path: (i, i)}, from `collect_covariance` or computed elsewhere.
        folder: is created where it does not exist.

    Returns:
        The folder.

    Raises:
        UserError: a value is not a square matrix.
    """
    leaders: dict[int, str] = {}
    groups: dict[str, list[str]] = {}
    for path, value in covariances.items():
        if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[0] != value.shape[1]:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"covariances: '{path}' is {shape}, needed a square matrix.")
        groups.setdefault(leaders.setdefault(id(value), path), []).append(path)
    widths = {path: len(value) for path, value in covariances.items()}
    store = CovarianceStore(None, "", "", groups, [list(groups)], widths)
    store.folder = Path(folder)
    store.unfinished = CovarianceSums({leader: covariances[leader] for leader in groups}, samples=1)
    store.finish()
    return store.folder


def load_covariances(folder: str | Path) -> dict[str, Tensor]:
    """Return the finished covariances {path: (i, i)} of a folder, memory-mapped from its files.

    Raises UserError where a file is missing or has the wrong shapes, and for an unfinished calibration.
    """
    folder = Path(folder)
    description = _read(folder)
    if len(description["finished"]) < len(description["passes"]):
        raise UserError(f"covariances '{folder}': the calibration is not finished; run it again, it resumes.")
    by_leader: dict[str, Tensor] = {}
    for name, leaders in zip(description["finished"], description["passes"]):
        by_leader.update(_mapped(folder, name, leaders, description))
    return _by_path(description["groups"], description["widths"], by_leader)


class CovarianceStore:
    """The sums and finished covariances of one calibration, kept in a folder or in memory.

    passes_done: number of finished passes. unfinished: sums of the current pass, filled by the caller. tokens: counted for
    each leader. Raises UserError when the folder holds another calibration (model, targets, data or budget).
    """

    def __init__(
        self,
        folder: str | Path | None,
        model: str,
        data: str,
        groups: Mapping[str, Sequence[str]],
        passes: Sequence[Sequence[str]],
        widths: Mapping[str, int],
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.groups = {leader: list(paths) for leader, paths in groups.items()}
        self.passes = [list(leaders) for leaders in passes]
        self.widths = dict(widths)
        self.about = {
            "format": FORMAT,
            "model": model,
            "data": data,
            "groups": self.groups,
            "passes": self.passes,
            "widths": self.widths,
        }
        self.files: list[str] = []
        self.digests: dict[str, str] = {}
        self.memory: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.unfinished = CovarianceSums()
        if self.folder is not None and (self.folder / DESCRIPTION).exists():
            self._resume(self.folder, _read(self.folder))

    @property
    def passes_done(self) -> int:
        return len(self.files)

    def save(self) -> None:
        """Write the sums of the current pass; without a folder do nothing."""
        if self.folder is not None:
            name = f"sums-{len(self.files)}-{self.unfinished.batches}.safetensors"
            self._write(self.folder, name, self.unfinished.sums, finished=False)

    def finish(self) -> None:
        """End the current pass: its sums divided by the number of samples are covariances."""
        covariances = {path: (value / self.unfinished.samples).cpu() for path, value in self.unfinished.sums.items()}
        self.tokens.update(self.unfinished.tokens)
        self.unfinished = CovarianceSums()
        self.files.append(f"covariances-{len(self.files)}.safetensors")
        if self.folder is None:
            self.memory.update(covariances)
        else:
            self._write(self.folder, self.files[-1], covariances, finished=True)

    def covariances(self) -> dict[str, Tensor]:
        """Return the covariances by path; layers of a group share a tensor."""
        if self.folder is not None:
            return load_covariances(self.folder)
        return _by_path(self.groups, self.widths, self.memory)

    def _write(self, folder: Path, name: str, tensors: Mapping[str, Tensor], *, finished: bool) -> None:
        self.digests[name] = write_tensors(folder / name, tensors)
        unfinished = {
            "file": name,
            "tokens": self.unfinished.tokens,
            "samples": self.unfinished.samples,
            "batches": self.unfinished.batches,
        }
        self.digests = {file: self.digests[file] for file in (*self.files, name)}
        state = {"finished": self.files, "tokens": self.tokens, "begun": None if finished else unfinished}
        atomic_write(folder / DESCRIPTION, sealed({**self.about, **state, "digests": self.digests}))
        for stale in set(folder.glob("sums-*.safetensors")) - {folder / name}:
            stale.unlink()

    def _resume(self, folder: Path, description: Mapping[str, Any]) -> None:
        for key, what in (
            ("model", "another model"),
            ("widths", "other targets"),
            ("groups", "other shared inputs"),
            ("passes", "another memory_budget"),
            ("data", "other data"),
        ):
            if description[key] != self.about[key]:
                raise UserError(f"covariances '{folder}': it holds a calibration with {what}; use another folder.")
        self.files, self.tokens = list(description["finished"]), dict(description["tokens"])
        self.digests = dict(description["digests"])
        unfinished = description["begun"]
        if unfinished:
            sums = _mapped(folder, unfinished["file"], self.passes[len(self.files)], description)
            self.unfinished = CovarianceSums(
                sums={path: value.clone() for path, value in sums.items()},
                tokens=dict(unfinished["tokens"]),
                samples=int(unfinished["samples"]),
                batches=int(unfinished["batches"]),
            )


def _by_path(
    groups: Mapping[str, Sequence[str]], widths: Mapping[str, int], by_leader: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensor of each path, which is that of the leader of its group."""
    leader_of = {path: leader for leader, paths in groups.items() for path in paths}
    return {path: by_leader[leader_of[path]] for path in widths}


@dataclass(frozen=True)
class _UnfinishedPass:
    """The unfinished pass of a folder."""

    file: str
    tokens: dict[str, int]
    samples: int
    batches: int


@dataclass(frozen=True)
class _Description:
    """The content of covariances.json."""

    format: int
    model: str
    data: str
    groups: dict[str, list[str]]
    passes: list[list[str]]
    widths: dict[str, int]
    finished: list[str]
    tokens: dict[str, int]
    begun: _UnfinishedPass | None
    digests: dict[str, str]  # of the files
    sha256: str

    def __post_init__(self) -> None:
        led = {path for paths in self.groups.values() for path in paths}
        leaders = [leader for leaders in self.passes for leader in leaders]
        if self.format != FORMAT or set(leaders) != set(self.groups) or led != set(self.widths):
            raise ValueError(f"format {self.format}, or groups that are not those of passes and widths")
        if not set(leaders) <= led or len(self.finished) > len(self.passes) or min(self.widths.values(), default=1) < 1:
            raise ValueError("passes, finished or widths out of range")
        names = [*self.finished, *([self.begun.file] if self.begun else [])]
        if not all(re.fullmatch(r"[\w-]+\.safetensors", name) for name in names):
            raise ValueError("a file that does not lie in the folder")


def _read(folder: Path) -> dict[str, Any]:
    what = f"covariances '{folder}'"
    description = read_json(folder / DESCRIPTION, what)
    try:
        build(_Description, description, JsonFile(f"{what}: {DESCRIPTION} is not what this version of vismt writes"))
    except UserError as error:
        raise UserError(f"{error} Collect the covariances again.") from error
    if not is_sealed(description):
        raise UserError(f"{what}: {DESCRIPTION} was changed after it was written; collect the covariances again.")
    return description


def _mapped(folder: Path, name: str, leaders: Sequence[str], description: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors (i, i) of the leaders from a safetensors file, memory-mapped where the platform allows it.

    Raises UserError for a file that is missing or damaged, has other tensors, or was changed after it was written.
    """
    try:
        with safe_open(regular_file(folder / name), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is not a mapping
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"covariances '{folder}': '{name}' is missing or damaged ({error}); collect them again."
        ) from error
    widths = description["widths"]
    check_tensors(f"covariances '{folder}'", {leader: (widths[leader],) * 2 for leader in leaders}, tensors)
    if file_digest(folder / name) != description["digests"].get(name):
        raise UserError(
            f"covariances '{folder}': '{name}' was changed or damaged; delete the folder to collect them again."
        )
    return tensors
