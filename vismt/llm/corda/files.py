"""Covariances in a folder: covariances.json names the safetensors files of finished and unfinished passes.

Tensors are written first, each file under a new name, and the JSON that names them last, with the digest of each: an
interrupted calibration leaves the state of the previous JSON intact, and a damaged file is refused. A covariance is stored once,
under the path of the leader of its group.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vismt.base.errors import UserError
from vismt.config.typed import JsonFile, build
from vismt.lowrank.files.save_load import check_tensors
from vismt.storage.files import DIGEST, atomic_write, file_digest, is_sealed, read_json, sealed, write_tensors
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


@dataclass
class UnfinishedPass:
    """The unfinished pass of a folder."""

    file: str
    tokens: dict[str, int]
    samples: int
    batches: int


@dataclass
class CovarianceFile:
    """The content of covariances.json."""

    format: int
    model: str
    data: str
    groups: dict[str, list[str]]
    passes: list[list[str]]
    widths: dict[str, int]
    finished: list[str]
    tokens: dict[str, int]
    begun: UnfinishedPass | None
    digests: dict[str, str]  # of the files
    sha256: str = ""

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
    saved = _read(folder)
    if len(saved.finished) < len(saved.passes):
        raise UserError(f"covariances '{folder}': the calibration is not finished; run it again, it resumes.")
    by_leader: dict[str, Tensor] = {}
    for name, leaders in zip(saved.finished, saved.passes):
        by_leader.update(_mapped(folder, name, leaders, saved))
    return _by_path(saved, by_leader)


class CovarianceStore:
    """The sums and finished covariances of one calibration, kept in a folder or in memory.

    state: what covariances.json says of it. unfinished: sums of the current pass, filled by the caller. Raises UserError when
    the folder holds another calibration (model, targets, data or budget).
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
        grouped = {leader: list(paths) for leader, paths in groups.items()}
        parts = [list(leaders) for leaders in passes]
        self.state = CovarianceFile(FORMAT, model, data, grouped, parts, dict(widths), [], {}, None, {})
        self.memory: dict[str, Tensor] = {}
        self.unfinished = CovarianceSums()
        if self.folder is not None and (self.folder / DESCRIPTION).exists():
            self._resume(self.folder, _read(self.folder))

    def save(self) -> None:
        """Write the sums of the current pass; without a folder do nothing."""
        if self.folder is not None:
            sums = self.unfinished
            name = f"sums-{len(self.state.finished)}-{sums.batches}.safetensors"
            self.state.begun = UnfinishedPass(name, sums.tokens, sums.samples, sums.batches)
            self._write(self.folder, name, sums.sums)

    def finish(self) -> None:
        """End the current pass: its sums divided by the number of samples are covariances."""
        covariances = {path: (value / self.unfinished.samples).cpu() for path, value in self.unfinished.sums.items()}
        self.state.tokens.update(self.unfinished.tokens)
        self.state.begun, self.unfinished = None, CovarianceSums()
        self.state.finished.append(f"covariances-{len(self.state.finished)}.safetensors")
        if self.folder is None:
            self.memory.update(covariances)
        else:
            self._write(self.folder, self.state.finished[-1], covariances)

    def covariances(self) -> dict[str, Tensor]:
        """Return the covariances by path; layers of a group share a tensor."""
        return _by_path(self.state, self.memory) if self.folder is None else load_covariances(self.folder)

    def _write(self, folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, then covariances.json, and remove the sums of an earlier time."""
        written = {**self.state.digests, name: write_tensors(folder / name, tensors)}
        self.state.digests = {file: written[file] for file in (*self.state.finished, name)}
        content = asdict(self.state)
        del content[DIGEST]
        atomic_write(folder / DESCRIPTION, sealed(content))
        for stale in set(folder.glob("sums-*.safetensors")) - {folder / name}:
            stale.unlink()

    def _resume(self, folder: Path, saved: CovarianceFile) -> None:
        for key, what in (
            ("model", "another model"),
            ("widths", "other targets"),
            ("groups", "other shared inputs"),
            ("passes", "another memory_budget"),
            ("data", "other data"),
        ):
            if getattr(saved, key) != getattr(self.state, key):
                raise UserError(f"covariances '{folder}': it holds a calibration with {what}; use another folder.")
        self.state = saved
        if saved.begun is not None:
            sums = _mapped(folder, saved.begun.file, saved.passes[len(saved.finished)], saved)
            self.unfinished = CovarianceSums(
                {path: value.clone() for path, value in sums.items()},
                saved.begun.tokens,
                saved.begun.samples,
                saved.begun.batches,
            )


def _by_path(saved: CovarianceFile, by_leader: Mapping[str, Tensor]) -> dict[str, Tensor]:
    leader_of = {path: leader for leader, paths in saved.groups.items() for path in paths}
    return {path: by_leader[leader_of[path]] for path in saved.widths}


def _read(folder: Path) -> CovarianceFile:
    what = f"covariances '{folder}'"
    description = read_json(folder / DESCRIPTION, what, strict=True)
    try:
        saved = build(
            CovarianceFile, description, JsonFile(f"{what}: {DESCRIPTION} is not what this version of vismt writes")
        )
    except UserError as error:
        raise UserError(f"{error} Collect the covariances again.") from error
    if not is_sealed(description):
        raise UserError(f"{what}: {DESCRIPTION} was changed after it was written; collect the covariances again.")
    return saved


def _mapped(folder: Path, name: str, leaders: Sequence[str], saved: CovarianceFile) -> dict[str, Tensor]:
    """Return the tensors (i, i) of the leaders from a safetensors file, memory-mapped where the platform allows it."""
    try:
        with safe_open(regular_file(folder / name), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is not a mapping
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"covariances '{folder}': '{name}' is missing or damaged ({error}); collect them again."
        ) from error
    check_tensors(f"covariances '{folder}'", {leader: (saved.widths[leader],) * 2 for leader in leaders}, tensors)
    if file_digest(folder / name) != saved.digests.get(name):
        raise UserError(
            f"covariances '{folder}': '{name}' was changed or damaged; delete the folder to collect them again."
        )
    return tensors
