"""EMTAL on four small tasks of increasing noise: the effect of fading, the router and quality retaining on training.

20 classes in a union, patterns with noise; a ViT of width 64 and 2 blocks, 8 experts, rank 2, 24 epochs of 5 steps. The bounds
hold for seeds 0 and 1, of which the second is slow.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import safetensors.torch
import torch
from helpers.tiny import snapshot, tiny_vit
from torch import Tensor, nn
from torch.nn import functional as F

import vismt
from vismt.multitask import FadeState, QualityRetaining, RouterFade, cluster_neurons, set_fade

TASK = torch.arange(20) // 5
NOISE = torch.tensor([0.5, 1.5, 2.5, 4.0])
EPOCHS, BATCH = 24, 24


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return `count` noisy images of each class, (20 count, 3, 16, 16), and their union labels; the patterns are constant."""
    patterns = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(100))
    labels = torch.arange(20).repeat(count)
    noise = torch.randn(len(labels), 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return patterns[labels] + NOISE[TASK[labels], None, None, None] * noise, labels


def stock(seed: int = 0) -> nn.Module:
    return tiny_vit(seed, num_classes=20, embed_dim=64)


def routed(
    seed: int = 0, experts: int = 8, dtype: torch.dtype = torch.float32, cluster: bool = True, **options: object
) -> nn.Module:
    """Return a ViT adapted with emtal, with random weights, because no test here depends on pre-training."""
    vit = stock(seed).to(dtype)
    # Labels are passed and not read from the cache, so that tests do not depend on each other.
    labels = [cluster_neurons(block.mlp.fc1.weight, experts) for block in vit.blocks] if cluster else False
    vismt.adapt(vit, "emtal", rank=2, n_experts=experts, cluster=labels, seed=seed, also_train=["head"], **options)
    return vit


def train(
    model: nn.Module,
    fade: FadeState,
    retain: QualityRetaining,
    weight: float = 1.0,
    seed: int = 0,
    steps: int | None = None,
) -> Tensor:
    """Train in place for EPOCHS or `steps`; return (steps, 2), cross-entropy and L_QR of each step."""
    x, labels = pictures(6, seed)
    x, parts = x.to(model.head.weight.dtype), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    batches = [rows for _ in range(EPOCHS) for rows in torch.randperm(len(labels), generator=generator).split(BATCH)]
    for rows in batches[:steps]:
        logits, y = model(x[rows]), labels[rows]
        pair = torch.stack([F.cross_entropy(logits, y, label_smoothing=0.1), retain.loss(logits, y)])
        optimizer.zero_grad()
        (pair[0] + weight * pair[1]).backward()
        optimizer.step()
        retain.update(logits, y)
        if isinstance(fade, RouterFade):
            fade.step()
        parts.append(pair.detach())
    return torch.stack(parts)


@dataclass
class Run:
    """A trained, adapted model; its state before training; the running losses of its tasks."""

    model: nn.Module
    start: dict[str, Tensor]
    ema: Tensor


@pytest.fixture(scope="module", params=[0, pytest.param(1, marks=pytest.mark.slow)])
def runs(request: pytest.FixtureRequest) -> dict[str, Run]:
    """Train with all parts, without fading, and without retaining; tests must not change the models."""
    trained = {}
    for name, weight in (("emtal", 1.0), ("unfaded", 1.0), ("free", 0.0)):
        model, retain = routed(request.param), QualityRetaining(20, TASK)
        fade = FadeState(0.0) if name == "unfaded" else RouterFade(EPOCHS * 120 // BATCH)
        set_fade(model, fade)
        start = snapshot(model)
        train(model, fade, retain, weight, request.param)
        trained[name] = Run(model, start, retain.ema)
    return trained


def without_router(model: nn.Module) -> nn.Module:
    """Return a merged copy, for any fade."""
    model = copy.deepcopy(model)
    set_fade(model, 1.0)
    return vismt.merge(model)


@torch.no_grad()
def spread(model: nn.Module, x: Tensor) -> list[float]:
    """Return the largest minus the smallest omega over tokens and experts, for each block, at fade 0."""
    model, omegas = copy.deepcopy(model), []
    set_fade(model, 0.0)
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda mlp, inputs: omegas.append(mlp.omega(inputs[0])))
    model(x)
    return [float(omega.max() - omega.min()) for omega in omegas]


# ---- whole trainings


@torch.no_grad()
def test_merging_after_the_fade_changes_no_prediction_and_dropping_a_router_changes_many(runs: dict[str, Run]) -> None:
    x, labels = pictures(40, seed=1000)
    model = runs["emtal"].model
    before, after = model(x), vismt.merge(copy.deepcopy(model))(x)  # merges because the fade is at 1
    assert torch.equal(before.argmax(1), after.argmax(1))
    assert (before - after).abs().max() < 1e-5 * before.abs().max()
    assert (after.argmax(1) == labels)[TASK[labels] == 0].float().mean() > 0.9  # the model has learned: chance is 5 %
    with pytest.raises(vismt.UserError, match="still routes"):
        vismt.merge(copy.deepcopy(runs["unfaded"].model))
    before, after = runs["unfaded"].model(x), without_router(runs["unfaded"].model)(x)
    assert (before.argmax(1) != after.argmax(1)).float().mean() > 0.05
    assert (before - after).abs().max() > 0.1 * before.abs().max()


def test_the_router_learns(runs: dict[str, Run]) -> None:
    x, _ = pictures(8, seed=1000)
    for run in (runs["emtal"], runs["unfaded"]):
        fresh = copy.deepcopy(run.model)
        fresh.load_state_dict(run.start)
        # Weight decay alone changes the weights of a dead router, too, but makes it flatter.
        for trained, begun in zip(spread(run.model, x), spread(fresh, x)):
            assert trained > 0.7 > 0.4 > begun
        for number in range(2):
            name = f"blocks.{number}.mlp.lora_router.weight"
            assert (run.model.state_dict()[name] - run.start[name]).norm() > run.start[name].norm()


def test_running_losses_are_ordered_like_the_noise(runs: dict[str, Run]) -> None:
    ema = runs["emtal"].ema
    assert (ema[1:] > 1.08 * ema[:-1]).all(), ema  # so the easy, converged task has the largest weight


def test_retaining_holds_training_back(runs: dict[str, Run]) -> None:
    with_, without = runs["emtal"].ema, runs["free"].ema
    assert (with_ > 1.3 * without).all(), (with_, without)


def test_the_merged_file_is_a_stock_file(runs: dict[str, Run]) -> None:
    merged, plain = vismt.merge(copy.deepcopy(runs["emtal"].model)).state_dict(), stock().state_dict()
    ours, theirs = ([(name, value.shape, value.dtype) for name, value in state.items()] for state in (merged, plain))
    assert ours == theirs
    assert len(safetensors.torch.save(merged)) == len(safetensors.torch.save(plain))


# ---- first steps


def first_losses(model: nn.Module, weight: float = 1.0, steps: int = 4) -> Tensor:
    return train(model, FadeState(0.0), QualityRetaining(20, TASK), weight, steps=steps)


@pytest.fixture(scope="module")
def plain_losses() -> Tensor:
    """Losses of plain LoRA that starts with the factors of `routed(cluster=False)`."""
    source, model = routed(dtype=torch.float64, cluster=False), stock().double()
    factors = {name: value for name, value in source.state_dict().items() if name.endswith(("lora_A", "lora_B"))}
    sites = sorted({name.rpartition(".")[0] for name in factors})
    vismt.adapt(model, "lora", targets=sites, rank=2, alpha=2, also_train=["head"])
    assert len(sites) == 8 and not model.load_state_dict(factors, strict=False).unexpected_keys
    return first_losses(model)


@pytest.mark.parametrize(("options", "cluster"), [({"experts": 1}, False), ({"temperature": 1e9}, True)])
def test_one_expert_or_a_flat_router_is_plain_lora(plain_losses: Tensor, options: dict, cluster: bool) -> None:
    losses = first_losses(routed(dtype=torch.float64, cluster=cluster, **options))
    assert (losses - plain_losses).abs().max() < 1e-9


def test_experts_temperature_and_clusters_change_the_losses_from_the_first_step(plain_losses: Tensor) -> None:
    settings = ({}, {"experts": 16}, {"temperature": 1.0}, {"cluster": False})
    losses = [plain_losses, *(first_losses(routed(dtype=torch.float64, **options)) for options in settings)]
    for number, later in enumerate(losses):
        for earlier in losses[:number]:
            assert (later - earlier)[:, 0].abs().min() > 1e-5


def test_the_pull_starts_at_uniform_teachers_and_reaches_the_model_with_the_second_step() -> None:
    pulled, free = (first_losses(routed(dtype=torch.float64), weight) for weight in (1.0, 0.0))
    assert torch.equal(pulled[0], free[0]) and (pulled - free)[1:, 0].abs().min() > 1e-4
    x, labels = pictures(6, 0)
    rows = torch.randperm(120, generator=torch.Generator().manual_seed(0))[:BATCH]
    with torch.no_grad():
        logits, y = routed(dtype=torch.float64)(x[rows].double()), labels[rows]
    share = (logits / 2).softmax(-1)
    # The bank is empty: two slots, T^2 KL(U || p) = T^2 mean log(1 / (20 p)) each.
    distance = 2 * 4 * -(20 * share).log().mean(1)
    ce = F.cross_entropy(logits, y, reduction="none")
    weights = torch.stack([9.5 + 0.05 * ce[TASK[y] == task].mean() for task in range(4)])
    assert pulled[0, 1].item() == pytest.approx((distance / weights[TASK[y]]).mean().item(), rel=1e-5)
