"""AMT's pool: P experts trained apart from one start, and the weights that a mixture of them stands for.

    W(zeta) = W + s * sum_i zeta_i (B_i A_i - B_0 A_0)            sum zeta = 1; every site and layer has the same zeta

W is the stock weight, B_0 A_0 the common principal start: with W_res = W - s B_0 A_0 this is the paper's W_res + s sum_i
zeta_i B_i A_i (Yang, Liu, Wei, NeurIPS 2024), and an untuned pool is W. Experts share W_res only when rank, scale and
start agree, so others are refused. Nothing is changed in place: a mixture is a dict of weights for `Functional`.

A pool on disk is a folder with pool.json and one plain adapter folder for each expert. Left out: training the experts
jointly, which neither paper nor code does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vismt.errors import UserError
from vismt.files import atomic_write, read_json
from vismt.lowrank.bank import FactorBank
from vismt.lowrank.detached_updates import Updates
from vismt.lowrank.factors import LowRank
from vismt.lowrank.inject import adapted_modules, record_of, unadapt
from vismt.lowrank.layer_spec import Site
from vismt.lowrank.store import DESCRIPTION, base_samples, load_adapter

INDEX, FORMAT = "pool.json", 1


@dataclass(frozen=True)
class Expert:
    """A trained expert: its label (the level, for one trained by a pool's configuration), adapter folder, cosine scale."""

    label: str
    folder: Path
    scale: float = 10.0


class ExpertPool(nn.Module):
    """A backbone with P experts; `backbone` is the stock one and stays as it is.

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
        found = [_factors(backbone.vit, expert) for expert in experts]
        self.sites: list[Site] = found[0][0]
        self.has_start = bool(found[0][2])
        _check_starts(experts, [start for _, _, start in found], self.sites)
        # One bank for each output block of each site; the start, where there is one, is its last entry.
        self.banks = nn.ModuleList()
        for number, site in enumerate(self.sites):
            rows = [factors[number] for _, factors, _ in found] + [start[number] for _, _, start in found[:1] if start]
            for block in range(len(site.blocks)):
                self.banks.append(FactorBank.stack([_block(row, site, block) for row in rows]))
        self.banks.requires_grad_(False)
        self._merged: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def weights(self, zeta: Tensor) -> dict[str, Tensor]:
        """The backbone's adapted weights under the mixture `zeta` (P,), by parameter name, as new tensors.

        Raises UserError for another length and for weights that do not sum to one.
        """
        gates, banks, made = self._gates(zeta), iter(self.banks), {}
        for site in self.sites:
            weight = self.backbone.vit.get_submodule(site.path).weight.detach()
            rows = [next(banks).merged(part, gates) for part in weight.flatten(1).split(site.blocks, 0)]
            made[f"vit.{site.path}.weight"] = (
                torch.cat(rows).view(weight.shape) if len(rows) > 1 else rows[0].view(weight.shape)
            )
        return made

    def mixture(self, zeta: Tensor) -> Updates:
        """The mixture `zeta` (P,) as updates of low rank, (P + 1) r with a start: to be put on the stock model and exported.

        Experts of weight zero are left out. Raises UserError as `weights` does; a trimmed weight is no such mixture.
        """
        gates, banks, found = self._gates(zeta), iter(self.banks), {}
        for site in self.sites:
            parts = [next(banks).delta(gates) for _ in site.blocks]
            kept = parts[0].core != 0  # the same in every block
            left = torch.block_diag(*(part.L[:, kept] * part.core[kept] for part in parts))
            found[site.path] = LowRank(
                left.cpu(), torch.cat([part.R[kept] for part in parts]).cpu(), scale=parts[0].scale
            )
        return Updates(found, base=base_samples(self.backbone.vit, found), name="pool")

    def expert_weights(self, index: int) -> dict[str, Tensor]:
        """Expert `index` alone. Kept once made: every task scores every expert, and a copy costs one backbone."""
        if index not in self._merged:
            self._merged[index] = self.weights(torch.eye(len(self), device=self._device())[index])
        return self._merged[index]

    def _gates(self, zeta: Tensor) -> Tensor:
        """One for each entry of the banks: the mixture, and what takes the start out."""
        if tuple(zeta.shape) != (len(self),) or not abs(float(zeta.sum()) - 1) < 1e-4:
            raise UserError(f"pool: mixture {zeta.tolist()} for {len(self)} experts: give one weight each, with sum 1.")
        return torch.cat([zeta, -zeta.sum()[None]]) if self.has_start else zeta

    def uniform(self) -> Tensor:
        """1/P for every expert."""
        return torch.full((len(self),), 1 / len(self), device=self._device())

    def index(self, label: str) -> int:
        """The place of the expert called `label`."""
        if label not in self.labels:
            raise UserError(f"pool: no expert '{label}'; it has {', '.join(self.labels)}.")
        return self.labels.index(label)

    def _device(self) -> torch.device:
        return self.banks[0].A.device

    def _apply(self, fn: object, recurse: bool = True) -> ExpertPool:
        self._merged.clear()  # made on the old device, in the old dtype
        return super()._apply(fn, recurse)


def check_alike(experts: Sequence[Expert]) -> None:
    """UserError unless all experts adapt the same modules with the same rank and scale, with different labels."""
    labels = [expert.label for expert in experts]
    if len(set(labels)) < len(labels):
        raise UserError(f"pool: two experts are called alike in {', '.join(labels)}: rename a folder or a level.")
    sites = [_sites(expert) for expert in experts]
    for expert, own in zip(experts[1:], sites[1:]):
        for path in sorted(own.keys() | sites[0].keys()):
            first, other = sites[0].get(path), own.get(path)
            if first is None or other is None:
                lacking = experts[0].label if first is None else expert.label
                raise UserError(
                    f"pool: experts '{experts[0].label}' and '{expert.label}' differ: '{lacking}' lacks {path}."
                )
            if first != other:
                names = ("rank", "scale", "blocks", "shape", "core")
                said = ", ".join(
                    f"{n} {first.get(n)} and {other.get(n)}" for n in names if first.get(n) != other.get(n)
                )
                raise UserError(
                    f"pool: experts '{experts[0].label}' and '{expert.label}' differ at {path}: {said}. What the principal "
                    "start leaves of W then differs too, so no mixture of them exists; train them with the same settings."
                )


def read_pool(folder: Path) -> list[Expert]:
    """The experts of a pool folder."""
    what = f"pool '{folder}'"
    index = read_json(folder / INDEX, what)
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
            raise UserError(f"{what}: {INDEX} names '{name}', which is no folder of a pool; assemble it again.")
    return [Expert(label, folder / name, scale) for label, name, scale in entries]


def assemble(experts: Sequence[Expert], folder: Path) -> Path:
    """Copy trained experts into one pool folder; the index is written last, so a torn copy is no pool."""
    if not experts:
        raise UserError("pool: no expert given, need at least one.")
    check_alike(experts)
    files, entries = {}, []
    for number, expert in enumerate(experts):
        description = read_json(expert.folder / DESCRIPTION, f"expert '{expert.label}'")
        name = f"expert-{number}"
        for part in (Path(str(description.get("tensors"))).name, DESCRIPTION):
            try:
                files[folder / name / part] = (expert.folder / part).read_bytes()
            except OSError as error:
                raise UserError(
                    f"expert '{expert.label}': '{expert.folder / part}' cannot be read ({error})."
                ) from error
        entries.append({"label": expert.label, "folder": name, "scale": expert.scale})
    # All is read before anything is written, for the experts may be this folder's; an old index must not outlive its files.
    if (folder / INDEX).exists():
        (folder / INDEX).unlink()
    for path, payload in files.items():
        atomic_write(path, payload)
    atomic_write(folder / INDEX, json.dumps({"format": FORMAT, "experts": entries}, indent=1))
    return folder


def _sites(expert: Expert) -> dict[str, dict]:
    what = f"expert '{expert.label}'"
    description = read_json(expert.folder / DESCRIPTION, what)
    try:
        if description["also_train"]:
            raise UserError(
                f"{what}: it trains '{description['also_train'][0]}' too; a pool mixes low-rank factors alone."
            )
        if any(site.get("grid") for site in description["sites"]):
            raise UserError(f"{what}: it lies on quantised weights; a pool mixes updates of the original ones.")
        return {site["path"]: site for site in description["sites"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{what}: '{expert.folder}' holds no adapter that vismt wrote ({error!r}).") from error


Pairs = list[tuple[Tensor, Tensor]]


def _factors(vit: nn.Module, expert: Expert) -> tuple[list[Site], Pairs, Pairs]:
    """Sites, (A, B) and (A0, B0) of an expert on this model, which is left as it was."""
    load_adapter(vit, expert.folder)
    try:
        hosts = adapted_modules(vit)
        sites = list(record_of(vit).sites)
        named = [hosts[site.path].factors() for site in sites]
        # A core goes into B, so that what is mixed are plain pairs.
        pairs = [(hosts[site.path].lora_A.detach().clone(), hosts[site.path].left().detach().clone()) for site in sites]
        start = [(one["lora_A0"].clone(), one["lora_B0"].clone()) for one in named if "lora_A0" in one]
    finally:
        unadapt(vit)
    return sites, pairs, start


def _check_starts(experts: Sequence[Expert], starts: Sequence[Pairs], sites: Sequence[Site]) -> None:
    """The products B0 A0 agree; factors may differ by the sign of a singular vector."""
    for expert, start in zip(experts[1:], starts[1:]):
        same = len(start) == len(starts[0])
        for site, mine, first in zip(sites, start, starts[0]) if same else ():
            if all(torch.equal(a, b) for a, b in zip(mine, first)):
                continue
            for block in range(len(site.blocks)):
                one, other = (_block(pair, site, block).delta() for pair in (mine, first))
                same &= bool((one - other).norm() <= 1e-4 * other.norm())
        if not same:
            raise UserError(
                f"pool: experts '{experts[0].label}' and '{expert.label}' did not start from the same factors (another base, "
                "solver or seed), so what is left of W differs; train them from one start."
            )


def _block(pair: tuple[Tensor, Tensor], site: Site, block: int) -> LowRank:
    """The factors of one output block of a site."""
    A, B = pair
    return LowRank(B.split(list(site.blocks), 0)[block], A.chunk(len(site.blocks))[block], scale=site.scale)
