"""AMT's pool: P experts that were trained separately, and the weights of their mixtures.

    W(zeta) = W + sum_i zeta_i DeltaW_i            sum zeta = 1, with the same zeta for every adapted module

DeltaW_i is the update of expert i against the stock weight W, s (B_i A_i - B_0 A_0) with a principal start B_0 A_0. Experts
with one start have the paper's form (Yang, Liu, Wei, NeurIPS 2024), W_res + s sum_i zeta_i B_i A_i with W_res = W - s B_0 A_0,
and an untuned pool is W. Experts of other ranks, scales or starts mix in the same way. `combine` computes the sum. A part that
all experts share, such as the start, enters the sum once. Nothing is changed in place: a mixture is a dict of weights for
`WithWeights`.

A pool on disk is a folder with pool.json and an adapter folder for each expert. The experts are not trained jointly, as in the
paper and the code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError, shown_value
from vismt.base.identity import Identity
from vismt.lowrank.factors import LowRank
from vismt.lowrank.files.combining import combine
from vismt.lowrank.files.description import DESCRIPTION, read_description
from vismt.lowrank.files.save_load import load_adapter
from vismt.lowrank.files.updates import Updates, check_combinable, read_updates
from vismt.lowrank.model.named import unadapt
from vismt.storage.files import atomic_write, read_sealed, sealed
from vismt.storage.locks import locked

POOL_FILE, _FORMAT = "pool.json", 1


@dataclass(frozen=True)
class Expert:
    """A trained expert.

    label: Name of the expert. It is the level if the configuration of a pool trained the expert. folder: Folder of the adapter.
    scale: Scale of the cosines.
    """

    label: str
    folder: Path
    scale: float = 10.0


class ExpertPool(nn.Module):
    """A backbone with P experts. `backbone` is the stock backbone and is not changed.

    labels: Labels of the experts, in order. scale: Mean of the experts' cosine scales. Accuracy does not depend on it. paths:
    Paths of the adapted modules. updates: Update of each expert on its own, and after them the update that all experts share, if
    they share one.
    """

    backbone: Any  # a Backbone, or a stand-in with `vit`

    def __init__(self, backbone: nn.Module, experts: Sequence[Expert]) -> None:
        super().__init__()
        check_experts(experts)
        self.backbone = backbone
        self.labels = [expert.label for expert in experts]
        self.scale = sum(expert.scale for expert in experts) / len(experts)
        loaded = [_load_updates(self.backbone.vit, expert) for expert in experts]
        self.paths = list(dict.fromkeys(path for expert in loaded for path in expert.low_rank))
        self.updates = _without_shared(loaded)
        self._move(lambda factor: factor.to(self._device()))
        self._merged: dict[int, dict[str, Tensor]] = {}
        self._latest: tuple[Tensor, dict[str, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def weights(self, zeta: Tensor) -> dict[str, Tensor]:
        """Return the backbone's adapted weights under the mixture `zeta` (P,), by parameter name.

        They are summed in fp32 or wider and rounded once. The weights of the latest mixture are kept, because an average is the
        same for every task. Raises UserError if `zeta` has another length or does not sum to one.
        """
        self._check(zeta)
        if self._latest is not None and torch.equal(self._latest[0], zeta):
            return dict(self._latest[1])
        merged = self._added(self._combined(zeta))
        self._latest = zeta.clone(), merged
        return dict(merged)

    def combined(self, rule: str) -> dict[str, Tensor]:
        """Return the adapted weights plus the experts' updates DeltaW_i merged by a rule of `combine`, by parameter name."""
        return self._added(combine([self._combined(zeta) for zeta in torch.eye(len(self))], method=rule))

    def mixture(self, zeta: Tensor) -> Updates:
        """Return the mixture `zeta` (P,) as updates of low rank on the CPU, for the stock model or for export.

        The rank is the sum of the ranks of the experts and of their start. Trimmed weights have no such form. Raises UserError
        as `weights` does.
        """
        self._check(zeta)
        combined = self._combined(zeta)
        factors = {path: update.to(device="cpu") for path, update in combined.low_rank.items()}
        return replace(combined, low_rank=factors, name="pool")

    def expert_weights(self, index: int) -> dict[str, Tensor]:
        """Return the weights of expert `index`. They are cached (one backbone each), because every task scores every expert."""
        if index not in self._merged:
            self._merged[index] = self.weights(torch.eye(len(self), device=self._device())[index])
        return self._merged[index]

    def _check(self, zeta: Tensor) -> None:
        if tuple(zeta.shape) != (len(self),) or not abs(float(zeta.sum()) - 1) < 1e-4:
            raise UserError(f"pool: mixture {zeta.tolist()} for {len(self)} experts: give one weight each, with sum 1.")

    def _combined(self, zeta: Tensor) -> Updates:
        shares = torch.cat([zeta, zeta.sum()[None]]).tolist()  # the shared update, if any, counts once
        used = [index for index, _ in enumerate(self.updates) if shares[index]]
        return combine([self.updates[index] for index in used], [shares[index] for index in used])

    def _added(self, updates: Updates) -> dict[str, Tensor]:
        """Return the stock weights plus updates of them, in the dtypes of the weights, by parameter name."""
        merged = {}
        for path, update in updates.low_rank.items():
            weight = self.backbone.vit.get_submodule(path).weight.detach()
            dtype = torch.promote_types(weight.dtype, torch.float32)
            update = update.to(dtype=dtype)
            total = torch.addmm(weight.flatten(1).to(dtype), update.B, update.A, alpha=update.scale)
            merged[f"vit.{path}.weight"] = total.view(weight.shape).to(weight.dtype)
        return merged

    def uniform(self) -> Tensor:
        """Return 1/P for every expert."""
        return torch.full((len(self),), 1 / len(self), device=self._device())

    def index(self, label: str) -> int:
        """Return the index of the expert with this label."""
        if label not in self.labels:
            raise UserError(f"pool: no expert '{label}'; the pool has {', '.join(self.labels)}.")
        return self.labels.index(label)

    def identity(self) -> Identity:
        """Return the identity of the experts' updates."""
        return Identity([(path, part.B, part.A) for update in self.updates for path, part in update.low_rank.items()])

    def _device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def _move(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the factors of all updates, as a move or a conversion of the backbone does."""
        for number, update in enumerate(self.updates):
            moved = {path: replace(f, B=change(f.B), A=change(f.A)) for path, f in update.low_rank.items()}
            self.updates[number] = replace(update, low_rank=moved)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertPool:
        self._move(fn)
        self._merged.clear()  # these are on the old device, in the old dtype
        self._latest = None
        return super()._apply(fn, recurse)


def check_experts(experts: Sequence[Expert]) -> None:
    """Raise UserError unless there are experts with different labels that adapt weights only by low-rank updates."""
    if not experts:
        raise UserError("pool: no expert given, need at least one.")
    labels = [expert.label for expert in experts]
    if len(set(labels)) < len(labels):
        raise UserError(f"pool: two experts have the same label in {', '.join(labels)}: rename a folder or a level.")
    for expert in experts:
        what = f"expert '{expert.label}'"
        description, specs = read_description(expert.folder, what)
        if description.also_train:
            raise UserError(f"{what}: it trains '{description.also_train[0]}' too; a pool mixes low-rank factors only.")
        check_combinable(what, description.method, specs)


def read_pool(folder: Path) -> list[Expert]:
    """Return the experts of a pool folder."""
    what = f"pool '{folder}'"
    index = read_sealed(folder / POOL_FILE, what)
    try:
        form = index["format"]
        listed = index["experts"] if form == _FORMAT else ()
        entries = [(str(entry["label"]), str(entry["folder"]), float(entry["scale"])) for entry in listed]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{what}: {POOL_FILE} is not what `vismt pool assemble` writes ({shown_value(error)})."
        ) from error
    if form != _FORMAT:
        raise UserError(f"{what}: format {form}, this version reads {_FORMAT}; use a matching vismt.")
    for _, name, _ in entries:
        if not re.fullmatch(r"expert-\d+", name):
            raise UserError(f"{what}: {POOL_FILE} names '{name}', which is not a folder of a pool; assemble it again.")
    return [Expert(label, folder / name, scale) for label, name, scale in entries]


def assemble(experts: Sequence[Expert], folder: Path) -> Path:
    """Copy trained experts into a pool folder. The index is written last, so that an interrupted copy is not read as a pool."""
    check_experts(experts)
    files, entries = {}, []
    for number, expert in enumerate(experts):
        description, _ = read_description(expert.folder, f"expert '{expert.label}'")
        name = f"expert-{number}"
        for part in (description.tensors, DESCRIPTION):
            try:
                files[folder / name / part] = (expert.folder / part).read_bytes()
            except OSError as error:
                raise UserError(
                    f"expert '{expert.label}': '{expert.folder / part}' cannot be read ({error})."
                ) from error
        entries.append({"label": expert.label, "folder": name, "scale": expert.scale})
    # Everything is read before anything is written, because the experts may be in this folder. The old index goes first, because
    # it must not describe new files.
    with locked(folder):
        if (folder / POOL_FILE).exists():
            (folder / POOL_FILE).unlink()
        for path, payload in files.items():
            atomic_write(path, payload)
        atomic_write(folder / POOL_FILE, sealed({"format": _FORMAT, "experts": entries}, indent=1))
    return folder


def _load_updates(vit: nn.Module, expert: Expert) -> Updates:
    load_adapter(vit, expert.folder)
    try:
        return read_updates(vit, what=f"expert '{expert.label}'")
    finally:
        unadapt(vit)


def _without_shared(experts: Sequence[Updates]) -> list[Updates]:
    """Return the update of each expert without the columns that all experts share, and after them these columns, if any.

    A common start is subtracted once for the whole pool, whatever the number of experts in a mixture.
    """
    own: list[dict[str, LowRank]] = [{} for _ in experts]
    shared: dict[str, LowRank] = {}
    for path in experts[0].low_rank if len(experts) > 1 else ():
        updates = [expert.low_rank[path] for expert in experts if path in expert.low_rank]
        same = _same_columns(updates) if len(updates) == len(experts) else None
        if same is None or not bool(same.any()):
            continue
        shared[path] = _columns(updates[0], same)
        if not bool(same.all()):
            for factors, update in zip(own, updates):
                factors[path] = _columns(update, ~same)
    if not shared:
        return list(experts)
    parts = []
    for expert, factors in zip(experts, own):
        untouched = {path: update for path, update in expert.low_rank.items() if path not in shared}
        parts.append(replace(expert, low_rank={**untouched, **factors}))
    return [*parts, replace(experts[0], low_rank=shared)]


def _same_columns(updates: Sequence[LowRank]) -> Tensor | None:
    """Return which terms of rank one, (r,), are the same in all updates. None if ranks or scales differ."""
    first, *others = updates
    same = torch.ones(first.rank, dtype=torch.bool)
    for update in others:
        if (update.shape, update.rank, update.scale) != (first.shape, first.rank, first.scale):
            return None
        same &= (update.B == first.B).all(0) & (update.A == first.A).all(1)
    return same


def _columns(update: LowRank, kept: Tensor) -> LowRank:
    return LowRank(update.B[:, kept], update.A[kept], scale=update.scale)
