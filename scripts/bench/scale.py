"""`scripts.bench scale`: How the costs of vismt grow with deeper models and larger data sets.

Layers: adapt, save, load, merge, export and verify for every method, on a random Llama of width 32 with 8 to 64 layers. A method
that needs a ViT gets one of the same width. `verify` gets the base weights, too.
Examples: a robustness run of two linear classifiers on 100 to 100,000 random images of 8 x 8 pixels: evaluating it, evaluating it
again with every answer on record, its report, and its comparison with a second run.

"calls" are calls of functions of Python and of C, as cProfile counts them: they do not depend on the machine. "growth" is the
number of calls that the last step of the sizes adds, over what the step before adds, each per layer or example: 1 where calls
grow linearly, above 1 where they grow faster. Seconds are CPU seconds on one thread, the smallest of the rounds.
"""

from __future__ import annotations

import copy
import cProfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import vismt
from scripts.bench.timing import Comparison
from vismt.base import console
from vismt.cli import main
from vismt.llm import collect_covariance, instance_gates
from vismt.lowrank.contexts import one_thread
from vismt.methods import METHODS, list_methods
from vismt.testing.method_contract import faded, shake

LAYERS = (8, 16, 32, 64)
EXAMPLES = (100, 1_000, 10_000, 100_000)
# What a method needs beside a rank, and the methods that route or adapt the blocks of a ViT.
OPTIONS: dict[str, dict[str, Any]] = {
    "emtal": {"n_experts": 4},
    "ilora": {"n_experts": 2, "gate": None},
    "corda": {"mode": "kpm"},
    "mtlora": {"tasks": ["depth", "edge"]},
}
VITS = ("emtal", "mtlora")
FASTEST = 1.1  # growth of calls
SLOWEST_S2FT = 2.0  # times LoRA's time to adapt

Run = Callable[[str, Callable[[], Any]], Any]  # (operation, work) -> what the work returns


@dataclass(frozen=True)
class Cost:
    """CPU seconds and calls of functions at one size."""

    seconds: float
    calls: int


@dataclass(frozen=True)
class Scale:
    """The costs of operations at several sizes; `str` gives the table.

    unit: what a size counts. costs: by row of the table, then by operation, one for each size. table: its rows, the heads first.
    """

    title: str
    unit: str
    sizes: tuple[int, ...]
    costs: dict[str, dict[str, list[Cost]]]
    targets: list[Comparison] = field(default_factory=list)
    note: str = "Seconds and thousands of calls at the largest size, and the growth of calls per unit (1: linear)."
    table: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        operations = list(dict.fromkeys(name for row in self.costs.values() for name in row))
        rows = [["", *operations]]
        for name, row in self.costs.items():
            cells = [_cell(self.sizes, row[operation]) if operation in row else "" for operation in operations]
            rows.append([name, *cells])
        object.__setattr__(self, "table", rows)

    def __str__(self) -> str:
        return "\n".join([self.title, console.aligned(self.table[0], self.table[1:]), *map(str, self.comparisons())])

    def comparisons(self) -> list[Comparison]:
        """Return the largest growth of each operation, and other ratios that have a target."""
        grown: dict[str, dict[str, float]] = {}
        for name, row in self.costs.items():
            for operation, costs in row.items():
                grown.setdefault(operation, {})[name] = growth(self.sizes, [cost.calls for cost in costs])
        found = []
        for operation, rates in grown.items():
            worst = max(rates, key=lambda name: rates[name])
            low, high = min(rates.values()), rates[worst]
            found.append(Comparison(f"growth of calls per {self.unit}", operation, worst, high, low, high, FASTEST))
        return [*found, *self.targets]


def growth(sizes: Sequence[int], counts: Sequence[int]) -> float:
    """Return what the last step adds per unit of size over what the step before adds: 1 for a linear function."""
    before, last = ((counts[i] - counts[i - 1]) / (sizes[i] - sizes[i - 1]) for i in (-2, -1))
    return last / before


def run(rounds: int = 9, device: str = "cpu") -> list[Scale]:
    """Measure against layers and examples. device: only the CPU is measured."""
    with one_thread():
        return [layers(rounds, LAYERS, list_methods()), examples(rounds, EXAMPLES)]


def layers(rounds: int, sizes: Sequence[int], methods: Sequence[str]) -> Scale:
    """Measure the operations on a model for every method."""
    costs: dict[str, dict[str, list[Cost]]] = {}
    for method in console.track(list(methods), "bench", "layers"):
        rows = costs[method] = {}
        for size in sizes:
            for operation, cost in measure(lambda run, m=method, n=size: operate(m, n, run), rounds).items():
                rows.setdefault(operation, []).append(cost)
    targets = []
    if {"s2ft", "lora"} <= costs.keys():
        s2ft, lora = (costs[method]["adapt"][-1].seconds for method in ("s2ft", "lora"))
        ratio = s2ft / lora
        targets = [Comparison(f"time to adapt {sizes[-1]} layers", "s2ft", "lora", ratio, ratio, ratio, SLOWEST_S2FT)]
    return Scale(f"Cost against the number of layers, {sizes[0]} to {sizes[-1]}", "layer", tuple(sizes), costs, targets)


def examples(rounds: int, sizes: Sequence[int]) -> Scale:
    """Measure a run and its reports on images."""
    costs: dict[str, list[Cost]] = {}
    count_calls(lambda run: evaluate(sizes[0], run))  # imports what is imported when it is first used
    for size in sizes:
        for operation, cost in measure(lambda run, n=size: evaluate(n, run), rounds).items():
            costs.setdefault(operation, []).append(cost)
    title = f"Cost against the number of examples, {sizes[0]:,} to {sizes[-1]:,}"
    return Scale(title, "example", tuple(sizes), {"two classifiers": costs})


def evaluate(count: int, run: Run) -> None:
    """Evaluate, report and compare runs on `count` images."""
    classifiers = {name: nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10)) for name in ("a", "b")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def audit(place: str, seed: int) -> object:
            settings = {"attacks": (), "img_size": 8, "batch": 500, "seed": seed, "folder": folder / place}
            return vismt.audit(classifiers, {"noise": Noise(count)}, **settings)

        run("evaluate", lambda: audit("first", 0))
        run("evaluate again", lambda: audit("first", 0))
        audit("second", 1)
        run("report", lambda: main(["report", str(folder / "first")]))
        run(
            "compare",
            lambda: main(["compare", str(folder / "first"), str(folder / "second"), "--out", str(folder / "c")]),
        )


class Noise(Dataset):
    """Random images of ten classes."""

    classes = tuple("0123456789")

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index] / 255, index % len(self.classes)


def measure(work: Callable[[Run], None], rounds: int) -> dict[str, Cost]:
    """Return the cost of every operation that `work` runs; calls are counted in a pass of their own, after the others."""
    seconds: dict[str, list[float]] = {}

    def clock(operation: str, call: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = call()
        seconds.setdefault(operation, []).append(time.process_time() - start)
        return result

    for _ in range(rounds):
        work(clock)
    return {operation: Cost(min(seconds[operation]), calls) for operation, calls in count_calls(work).items()}


def count_calls(work: Callable[[Run], None]) -> dict[str, int]:
    """Return the calls of functions of every operation that `work` runs."""
    counts: dict[str, int] = {}

    def count(operation: str, call: Callable[[], Any]) -> Any:
        profile = cProfile.Profile()
        result = profile.runcall(call)
        counts[operation] = sum(entry.callcount for entry in profile.getstats())
        return result

    work(count)
    return counts


def operate(method: str, depth: int, run: Run) -> None:
    """Run every operation on a model of `depth` layers."""
    stock, options = model_of(method, depth), dict(OPTIONS.get(method, {}))
    if method == "corda":
        options["covariances"] = collect_covariance(stock, [{"input_ids": torch.arange(16)[None]}])
    model, fresh = copy.deepcopy(stock), copy.deepcopy(stock)
    with tempfile.TemporaryDirectory() as name, instance_gates(torch.ones(2)):
        folder = Path(name)
        safetensors.torch.save_file(stock.state_dict(), folder / "base.safetensors")
        run("adapt", lambda: vismt.adapt(model, method, **options))
        faded(shake(model))
        run("save", lambda: vismt.save_adapter(model, folder / "adapter"))
        run("load", lambda: vismt.load_adapter(fresh, folder / "adapter"))
        run("verify", lambda: vismt.verify(folder / "adapter", base=folder / "base.safetensors"))
        if METHODS[method].exports:
            run("export", lambda: vismt.export_peft(model, folder / "peft"))
        if METHODS[method].merges:
            run("merge", lambda: vismt.merge(model))


def model_of(method: str, depth: int) -> nn.Module:
    """Return a stock model of `depth` layers that the method takes."""
    torch.manual_seed(0)
    if method in VITS:
        import timm

        shape = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "num_heads": 4, "num_classes": 10}
        return timm.create_model("vit_tiny_patch16_224", depth=depth, **shape).eval()
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=depth, num_attention_heads=4
    )
    return transformers.LlamaForCausalLM(config).eval()


def _cell(sizes: Sequence[int], costs: Sequence[Cost]) -> str:
    """Return "0.12 s, 432 k, 1.00": seconds and calls at the largest size, and the growth."""
    rate = growth(sizes, [cost.calls for cost in costs])
    return f"{costs[-1].seconds:.3g} s, {costs[-1].calls / 1000:,.0f} k, {rate:.2f}"
