"""`python -m scripts.bench amt`: AMT's training step and its task scoring and merging, against the released implementation.

ViT-S/16 at 80 px (26 tokens, the same number as a /14 at 70 px; the grids of 4 and 8 cells divide it), random weights, rank
8 on every linear. Training: one 5-way 5-shot episode with 10 queries a class, two and five pyramid steps, joint weight attack,
support="clean", SGD; on a CPU with units for bf16 the pyramid steps of "vismt" run in it. Tasks: 5-way, 5 and 1 shot, four
experts, top 2, up to the prototypes: no query is classified. In "vismt" the experts' merged weights are computed in the
warm-up round and cached, as over the tasks of an evaluation.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from scripts.bench import amt_released
from scripts.bench.timing import Ratios, interleave
from vismt.backbones.timm_models import create
from vismt.backbones.vit import Backbone
from vismt.lowrank.files.save_load import save_adapter
from vismt.lowrank.model.named import unadapt
from vismt.metatune.amt.merging import PoolNet
from vismt.metatune.amt.objective import AdversarialObjective, Adversary
from vismt.metatune.amt.pool import Expert, ExpertPool
from vismt.metatune.amt.selection_rules import MergeSettings
from vismt.metatune.protonet import ProtoNet
from vismt.methods import adapt

MODEL, SIZE, RANK, EXPERTS, WAYS, QUERIES = "vit_small_patch16_224", 80, 8, 4, 5, 10
VISMT, RELEASED, DEFAULT = "vismt", "as released", "vismt, default form"
ADVERSARY = Adversary(support="clean", gamma=5e-3)


def run(rounds: int = 9, device: str = "cpu") -> list[Ratios]:
    """Time the training step, then tasks of 5 and of 1 shot, each without and with augmented support, in at most 3 rounds.

    "vismt, default form" recomputes the prototypes at the perturbed weights: another loss, shown for its cost.
    """
    where, rounds = torch.device(device), min(rounds, 3)
    backbone = create(MODEL, img_size=SIZE).to(where)
    training = [_training(backbone, steps, target, rounds, where) for steps, target in ((2, 0.75), (5, 0.45))]
    pool = random_pool(backbone, EXPERTS, RANK).to(where)
    twin = amt_released.released_pool(pool, RANK)
    tasks = [
        _task(pool, twin, shots, MergeSettings(augment=augment), target, rounds, where)
        for shots in (5, 1)
        for augment, target in ((False, 0.55), (True, 0.90))
    ]
    return [*training, *tasks]


def episode(shots: int, queries: int, size: int, device: torch.device, number: int = 0) -> dict[str, Tensor]:
    """Return random images of `WAYS` classes as a batch of `EpisodeBatches`."""
    generator = torch.Generator().manual_seed(number)
    classes = torch.arange(WAYS, device=device)
    return {
        "support": torch.rand(WAYS * shots, 3, size, size, generator=generator).to(device),
        "support_labels": classes.repeat_interleave(shots),
        "query": torch.rand(WAYS * queries, 3, size, size, generator=generator).to(device),
        "query_labels": classes.repeat_interleave(queries),
        "number": torch.tensor(number),
    }


def random_pool(backbone: Backbone, experts: int, rank: int) -> ExpertPool:
    """Return a pool of experts: the common start plus noise of a tenth of each factor's standard deviation."""
    trained = copy.deepcopy(backbone)
    adapt(trained.vit, "amt", rank=rank)
    start = {name: p.detach().clone() for name, p in trained.named_parameters() if p.requires_grad}
    pool = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(experts):
            generator = torch.Generator().manual_seed(number)
            for name, parameter in trained.named_parameters():
                if name in start:
                    noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                    parameter.data = start[name] + 0.1 * start[name].std() * noise
            expert_folder = Path(folder) / str(number)
            save_adapter(trained.vit, expert_folder)
            pool.append(Expert(str(number), expert_folder))
        unadapt(trained.vit)
        return ExpertPool(trained, pool)


def _training(backbone: Backbone, steps: int, target: float, rounds: int, device: torch.device) -> Ratios:
    net = ProtoNet(copy.deepcopy(backbone))
    adapt(net.backbone.vit, "amt", rank=RANK)
    batch, twin = episode(5, QUERIES, SIZE, device), amt_released.released_net(net)
    optimiser, adversary = _sgd(twin), replace(ADVERSARY, steps=steps)
    candidates = {
        VISMT: _training_step(copy.deepcopy(net), batch, adversary),
        RELEASED: lambda: amt_released.train_step(twin, optimiser, batch, adversary),
        DEFAULT: _training_step(net, batch, replace(adversary, support="perturbed")),
    }
    title = f"training step, 5-way 5-shot, {QUERIES} queries a class, T={steps}"
    timing = interleave(candidates, rounds, label="training step", device=device)
    return Ratios(title, timing, [(VISMT, RELEASED, target)])


def _training_step(net: ProtoNet, batch: dict[str, Tensor], adversary: Adversary) -> Callable[[], None]:
    objective, optimiser = AdversarialObjective(net, adversary), _sgd(net)

    def call() -> None:
        optimiser.zero_grad()
        objective(batch)["loss"].backward()
        optimiser.step()

    return call


def _sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-5, momentum=0.9)


def _task(
    pool: ExpertPool,
    twin: nn.Module,
    shots: int,
    settings: MergeSettings,
    target: float,
    rounds: int,
    device: torch.device,
) -> Ratios:
    net, batch = PoolNet(pool, settings), episode(shots, 0, SIZE, device)
    support, labels = batch["support"], batch["support_labels"]
    candidates = {
        VISMT: lambda: net.classifier(support, labels),
        RELEASED: lambda: amt_released.task(twin, support, labels, settings),
    }
    title = f"scoring and merging, {WAYS}-way {shots}-shot, {len(pool)} experts, augmented: {'yes' if settings.augment else 'no'}"
    return Ratios(title, interleave(candidates, rounds, label=title, device=device), [(VISMT, RELEASED, target)])
