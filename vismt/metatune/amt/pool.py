"""AMT's pool: P experts trained separately from the same start, and the weights of their mixtures.

    W(zeta) = W + s * sum_i zeta_i (B_i A_i - B_0 A_0)            sum zeta = 1; every site and layer has the same zeta

W is the stock weight, B_0 A_0 the common principal start: with W_res = W - s B_0 A_0 this is the paper's W_res + s sum_i
zeta_i B_i A_i (Yang, Liu, Wei, NeurIPS 2024), and an untuned pool is W. Experts share W_res only when rank, scale and
start agree; others are refused. Nothing is changed in place: a mixture is a dict of weights for `Functional`.

A pool on disk is a folder with pool.json and an adapter folder for each expert. Left out: training the experts jointly,
which neither paper nor code does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.lowrank.bank import FactorBank
from vismt.lowrank.factors import LowRank
from vismt.lowrank.files.description import DESCRIPTION, read_description
from vismt.lowrank.files.store import base_samples, load_adapter
from vismt.lowrank.files.updates import Updates
from vismt.lowrank.layers.base import LayerSpec, adapter_layers
from vismt.lowrank.model.named import unadapt
from vismt.lowrank.model.record import record_of
from vismt.storage.files import atomic_write, locked, read_sealed, sealed

INDEX, FORMAT = "pool.json", 1


@dataclass(frozen=True)
class Expert:
    """A trained expert: label (the level, where a pool's configuration trained it), adapter folder and cosine scale."""

    label: str
    folder: Path
    scale: float = 10.0


class ExpertPool(nn.Module):
    """A backbone with P experts; `backbone` is the stock backbone and is not changed.

    labels: of the experts, in order. scale: mean of the experts' cosine scales (accuracy does not depend on it).
    """

    def __init__(self, backbone: nn.Module, experts: Sequence[Expert]) -> None:
        super().__init__()
        if not experts:
            raise UserError("pool: no expert given, need at least one.")
        check_alike(experts)
        self.backbone = backbone
        self.labels = [expert.label for expert in experts]
        self.scale = sum(expert.scale for expert in experts) / len(experts)
        loaded = [_load_factors(backbone.vit, expert) for expert in experts]
        self.sites: list[LayerSpec] = loaded[0][0]
        start = loaded[0][2]
        self.has_start = bool(start)
        _check_starts(experts, [pairs for _, _, pairs in loaded], self.sites)
        # A bank for each output block of each site; the start, where there is one, is its last entry.
        self.banks = nn.ModuleList()
        for number, site in enumerate(self.sites):
            rows = [factors[number] for _, factors, _ in loaded] + ([start[number]] if start else [])
            for block in range(len(site.settings.blocks)):
                self.banks.append(FactorBank.stack([_block(row, site, block) for row in rows]))
        self.banks.requires_grad_(False)
        self._merged: dict[int, dict[str, Tensor]] = {}
        self._latest: tuple[Tensor, dict[str, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def weights(self, zeta: Tensor) -> dict[str, Tensor]:
        """Return the backbone's adapted weights under the mixture `zeta` (P,), by parameter name.

        The weights of the latest mixture are kept: an average is the same for every task. Raises UserError for another length
        and for weights that do not sum to one.
        """
        gates, banks = self._gates(zeta), iter(self.banks)
        if self._latest is not None and torch.equal(self._latest[0], zeta):
            return dict(self._latest[1])
        merged = {}
        for site in self.sites:
            weight = self.backbone.vit.get_submodule(site.path).weight.detach()
            rows = [next(banks).merged(block, gates) for block in weight.flatten(1).split(site.settings.blocks, 0)]
            matrix = torch.cat(rows) if len(rows) > 1 else rows[0]
            merged[f"vit.{site.path}.weight"] = matrix.view(weight.shape)
        self._latest = zeta.clone(), merged
        return dict(merged)

    def mixture(self, zeta: Tensor) -> Updates:
        """Return the mixture `zeta` (P,) as updates of low rank, (P + 1) r with a start, for the stock model or for export.

        Experts of weight zero are left out. Trimmed weights have no such form. Raises UserError as `weights` does.
        """
        gates, banks = self._gates(zeta), iter(self.banks)
        updates = {}
        for site in self.sites:
            blocks = [next(banks).delta(gates) for _ in site.settings.blocks]
            kept = blocks[0].core != 0  # the same in every block
            left = torch.block_diag(*(block.L[:, kept] * block.core[kept] for block in blocks))
            right = torch.cat([block.R[kept] for block in blocks])
            updates[site.path] = LowRank(left.cpu(), right.cpu(), scale=blocks[0].scale)
        return Updates(updates, base=base_samples(self.backbone.vit, updates), name="pool")

    def expert_weights(self, index: int) -> dict[str, Tensor]:
        """Return the weights of expert `index` alone. They are cached (a backbone each), as every task scores every expert."""
        if index not in self._merged:
            self._merged[index] = self.weights(torch.eye(len(self), device=self._device())[index])
        return self._merged[index]

    def _gates(self, zeta: Tensor) -> Tensor:
        """Return the weights of the banks' entries: the mixture, and -1 for the start where there is one."""
        if tuple(zeta.shape) != (len(self),) or not abs(float(zeta.sum()) - 1) < 1e-4:
            raise UserError(f"pool: mixture {zeta.tolist()} for {len(self)} experts: give one weight each, with sum 1.")
        return torch.cat([zeta, -zeta.sum()[None]]) if self.has_start else zeta

    def uniform(self) -> Tensor:
        """Return 1/P for every expert."""
        return torch.full((len(self),), 1 / len(self), device=self._device())

    def index(self, label: str) -> int:
        """Return the index of the expert with this label."""
        if label not in self.labels:
            raise UserError(f"pool: no expert '{label}'; the pool has {', '.join(self.labels)}.")
        return self.labels.index(label)

    def _device(self) -> torch.device:
        return next(self.banks.parameters()).device

    def _apply(self, fn: object, recurse: bool = True) -> ExpertPool:
        self._merged.clear()  # these are on the old device, in the old dtype
        self._latest = None
        return super()._apply(fn, recurse)


def check_alike(experts: Sequence[Expert]) -> None:
    """Raise UserError unless all experts have different labels and adapt the same modules with the same rank and scale."""
    labels = [expert.label for expert in experts]
    if len(set(labels)) < len(labels):
        raise UserError(f"pool: two experts have the same label in {', '.join(labels)}: rename a folder or a level.")
    sites = [_sites(expert) for expert in experts]
    for expert, expert_sites in zip(experts[1:], sites[1:]):
        for path in sorted(expert_sites.keys() | sites[0].keys()):
            first, other = sites[0].get(path), expert_sites.get(path)
            if first is None or other is None:
                lacking = experts[0].label if first is None else expert.label
                raise UserError(
                    f"pool: experts '{experts[0].label}' and '{expert.label}' differ: '{lacking}' lacks {path}."
                )
            if first != other:
                keys = ("rank", "scale", "blocks", "shape", "core")
                differences = ", ".join(
                    f"{key} {first.get(key)} and {other.get(key)}" for key in keys if first.get(key) != other.get(key)
                )
                raise UserError(
                    f"pool: experts '{experts[0].label}' and '{expert.label}' differ at {path}: {differences}. Their residual "
                    "weights W_res then differ too, so no mixture of them exists; train them with the same settings."
                )


def read_pool(folder: Path) -> list[Expert]:
    """Return the experts of a pool folder."""
    what = f"pool '{folder}'"
    index = read_sealed(folder / INDEX, what)
    try:
        form = index["format"]
        listed = index["experts"] if form == FORMAT else ()
        entries = [(str(entry["label"]), str(entry["folder"]), float(entry["scale"])) for entry in listed]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{what}: {INDEX} is not what `vismt pool assemble` writes ({error!r}).") from error
    if form != FORMAT:
        raise UserError(f"{what}: format {form}, this version reads {FORMAT}; use a matching vismt.")
    for _, name, _ in entries:
        if not re.fullmatch(r"expert-\d+", name):
            raise UserError(f"{what}: {INDEX} names '{name}', which is not a folder of a pool; assemble it again.")
    return [Expert(label, folder / name, scale) for label, name, scale in entries]


def assemble(experts: Sequence[Expert], folder: Path) -> Path:
    """Copy trained experts into a pool folder; the index is written last, so an interrupted copy is not read as a pool."""
    if not experts:
        raise UserError("pool: no expert given, need at least one.")
    check_alike(experts)
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
    # Everything is read before anything is written: the experts may be in this folder. The old index goes first, as it must
    # not describe new files.
    with locked(folder):
        if (folder / INDEX).exists():
            (folder / INDEX).unlink()
        for path, payload in files.items():
            atomic_write(path, payload)
        atomic_write(folder / INDEX, sealed({"format": FORMAT, "experts": entries}, indent=1))
    return folder


def _sites(expert: Expert) -> dict[str, dict]:
    what = f"expert '{expert.label}'"
    description, _ = read_description(expert.folder, what)
    if description.also_train:
        raise UserError(f"{what}: it trains '{description.also_train[0]}' too; a pool mixes low-rank factors only.")
    if any(site.get("grid") for site in description.sites):
        raise UserError(f"{what}: it adapts quantised weights; a pool mixes updates of the original weights.")
    return {site["path"]: site for site in description.sites}


Pairs = list[tuple[Tensor, Tensor]]


def _load_factors(vit: nn.Module, expert: Expert) -> tuple[list[LayerSpec], Pairs, Pairs]:
    """Return the sites, (A, B) and (A0, B0) of an expert on this model, which is restored."""
    load_adapter(vit, expert.folder)
    try:
        adapted = adapter_layers(vit)
        sites = list(record_of(vit).layers)
        layers = [adapted[site.path] for site in sites]
        # A core is multiplied into B, so that all pairs are plain.
        pairs = [(layer.lora_A.detach().clone(), layer.left().detach().clone()) for layer in layers]
        factors = [layer.tensors() for layer in layers]
        start = [
            (tensors["lora_A0"].clone(), tensors["lora_B0"].clone()) for tensors in factors if "lora_A0" in tensors
        ]
    finally:
        unadapt(vit)
    return sites, pairs, start


def _check_starts(experts: Sequence[Expert], starts: Sequence[Pairs], sites: Sequence[LayerSpec]) -> None:
    """Raise UserError unless the products B0 A0 agree; the factors may differ by the sign of a singular vector."""
    for expert, start in zip(experts[1:], starts[1:]):
        same = len(start) == len(starts[0])
        for site, pair, first in zip(sites, start, starts[0]) if same else ():
            if all(torch.equal(a, b) for a, b in zip(pair, first)):
                continue
            for block in range(len(site.settings.blocks)):
                product, reference = _block(pair, site, block).delta(), _block(first, site, block).delta()
                same &= bool((product - reference).norm() <= 1e-4 * reference.norm())
        if not same:
            raise UserError(
                f"pool: experts '{experts[0].label}' and '{expert.label}' did not start from the same factors (another base, "
                "solver or seed), so their residual weights W_res differ; train them from the same start."
            )


def _block(pair: tuple[Tensor, Tensor], site: LayerSpec, block: int) -> LowRank:
    """Return the factors of an output block of a site."""
    A, B = pair
    return LowRank(
        B.split(list(site.settings.blocks), 0)[block],
        A.chunk(len(site.settings.blocks))[block],
        scale=site.settings.scale,
    )
