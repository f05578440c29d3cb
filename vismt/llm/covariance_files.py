"""Covariances in a folder: covariances.json names the safetensors files that hold them, finished or under way.

Tensors are written first, each file under a name of its own, and the JSON that names them last: a calibration that is cut
short leaves what the JSON before said. A layer's covariance is stored under the path of its group's leader, once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vismt.errors import UserError
from vismt.files import atomic_write, read_json
from vismt.lowrank.store import check_tensors

FORMAT = 1
DESCRIPTION = "covariances.json"


@dataclass
class Sums:
    """Running sums of one pass by leader, the tokens they saw, and the samples and batches behind them."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    batches: int = 0


def save_covariances(covariances: Mapping[str, Tensor], folder: str | Path) -> Path:
    """Write covariances (i, i) by path, of `collect_covariance` or your own; a tensor that several paths share goes once."""
    leaders: dict[int, str] = {}
    groups: dict[str, list[str]] = {}
    for path, value in covariances.items():
        if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[0] != value.shape[1]:
            seen = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"covariances: '{path}' is {seen}, needed a square matrix.")
        groups.setdefault(leaders.setdefault(id(value), path), []).append(path)
    widths = {path: len(value) for path, value in covariances.items()}
    store = Calibration(None, "", "", groups, [list(groups)], widths)
    store.folder = Path(folder)
    store.begun = Sums({leader: covariances[leader] for leader in groups}, samples=1)
    store.finish()
    return store.folder


def load_covariances(folder: str | Path) -> dict[str, Tensor]:
    """The finished covariances of a folder, mapped from its files; UserError where one is missing, misshapen or unfinished."""
    folder = Path(folder)
    description = _read(folder)
    if len(description["finished"]) < len(description["passes"]):
        raise UserError(
            f"covariances '{folder}': the calibration is not finished; run it again, it goes on where it was."
        )
    found: dict[str, Tensor] = {}
    for name, leaders in zip(description["finished"], description["passes"]):
        tensors = _mapped(folder, name)
        wanted = {leader: (description["widths"][leader],) * 2 for leader in leaders}
        check_tensors(f"covariances '{folder}'", wanted, tensors)
        found.update(tensors)
    shared = {path: leader for leader, paths in description["groups"].items() for path in paths}
    return {path: found[shared[path]] for path in description["widths"]}


class Calibration:
    """Where the passes of one calibration go: a folder, or memory alone.

    passes_done: finished passes. begun: sums of the pass under way, filled by the caller. tokens: seen by each leader.
    Raises UserError when the folder holds another calibration (model, targets, data or budget).
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
        self.about = {
            "format": FORMAT,
            "model": model,
            "data": data,
            "groups": {k: list(v) for k, v in groups.items()},
            "passes": [list(leaders) for leaders in passes],
            "widths": dict(widths),
        }
        self.files: list[str] = []
        self.memory: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.begun = Sums()
        if self.folder is not None and (self.folder / DESCRIPTION).exists():
            self._resume(_read(self.folder))

    @property
    def passes_done(self) -> int:
        return len(self.files)

    def save(self) -> None:
        """Keep the sums of the pass under way; nothing to do without a folder."""
        if self.folder is not None:
            self._write(f"sums-{len(self.files)}-{self.begun.batches}.safetensors", self.begun.sums, under_way=True)

    def finish(self) -> None:
        """The pass is done: its sums over the number of samples are covariances."""
        done = {path: (value / self.begun.samples).cpu() for path, value in self.begun.sums.items()}
        self.tokens.update(self.begun.tokens)
        self.begun = Sums()
        self.files.append(f"covariances-{len(self.files)}.safetensors")
        if self.folder is None:
            self.memory.update(done)
        else:
            self._write(self.files[-1], done, under_way=False)

    def covariances(self) -> dict[str, Tensor]:
        """By path; layers of a group share a tensor."""
        if self.folder is not None:
            return load_covariances(self.folder)
        shared = {path: leader for leader, paths in self.about["groups"].items() for path in paths}
        return {path: self.memory[shared[path]] for path in self.about["widths"]}

    def _write(self, name: str, tensors: Mapping[str, Tensor], *, under_way: bool) -> None:
        payload = safetensors.torch.save({path: value.detach().cpu().contiguous() for path, value in tensors.items()})
        atomic_write(self.folder / name, payload)
        begun = {
            "file": name,
            "tokens": self.begun.tokens,
            "samples": self.begun.samples,
            "batches": self.begun.batches,
        }
        state = {"finished": self.files, "tokens": self.tokens, "begun": begun if under_way else None}
        atomic_write(self.folder / DESCRIPTION, json.dumps({**self.about, **state}))
        for stale in set(self.folder.glob("sums-*.safetensors")) - {self.folder / name}:
            stale.unlink()

    def _resume(self, description: Mapping[str, Any]) -> None:
        for key, what in (
            ("model", "another model"),
            ("widths", "other targets"),
            ("groups", "other shared inputs"),
            ("passes", "another memory_budget"),
            ("data", "other data"),
        ):
            if description[key] != self.about[key]:
                raise UserError(f"covariances '{self.folder}': it holds a calibration with {what}; use another folder.")
        self.files, self.tokens = list(description["finished"]), dict(description["tokens"])
        begun = description["begun"]
        if begun:
            sums = _mapped(self.folder, begun["file"])
            leaders = self.about["passes"][len(self.files)]
            wanted = {leader: (self.about["widths"][leader],) * 2 for leader in leaders}
            check_tensors(f"covariances '{self.folder}'", wanted, sums)
            copies = {path: value.clone() for path, value in sums.items()}
            self.begun = Sums(copies, dict(begun["tokens"]), int(begun["samples"]), int(begun["batches"]))


def batch_digest(batch: Any) -> str:
    """Sixteen hex digits of the tensors of a batch, to tell data from other data."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for name in sorted(value):
                digest.update(str(name).encode())
                add(value[name])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)

    add(batch)
    return digest.hexdigest()[:16]


def _read(folder: Path) -> dict[str, Any]:
    what = f"covariances '{folder}'"
    description = read_json(folder / DESCRIPTION, what)
    kinds = {
        "model": str,
        "data": str,
        "groups": dict,
        "passes": list,
        "widths": dict,
        "finished": list,
        "tokens": dict,
    }
    shaped = isinstance(description, dict) and all(
        isinstance(description.get(key), kind) for key, kind in kinds.items()
    )
    if not shaped or "begun" not in description or description.get("format") != FORMAT:
        raise UserError(
            f"{what}: {DESCRIPTION} is not what this version of vismt writes; collect the covariances again."
        )
    return description


def _mapped(folder: Path, name: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file, mapped rather than read where the platform can."""
    try:
        with safe_open(folder / name, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"covariances '{folder}': '{name}' is missing or damaged ({error}); collect them again."
        ) from error
