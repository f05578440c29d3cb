"""Clusters of hidden units: recovery of planted clusters, permutations that preserve the function, the cache."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers.tiny import images, snapshot, tiny_vit
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

import vismt.multitask.emtal.clusters as experts
from vismt.base.errors import UserError
from vismt.multitask.emtal.clusters import (
    cluster_model,
    cluster_neurons,
    explained_variance,
    permute_experts,
    plain_mlp,
    random_neurons,
)
from vismt.multitask.emtal.kmeans import balanced_kmeans


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path))
    return tmp_path / "experts"


def planted(seed: int = 0, units: int = 256, width: int = 32, clusters: int = 8) -> tuple[Tensor, Tensor]:
    """Return rows around `clusters` directions, with log-normal norms, in random order, and their true clusters."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.arange(units) % clusters
    truth = truth[torch.randperm(units, generator=generator)]
    directions = nn.functional.normalize(torch.randn(clusters, width, generator=generator), dim=1)
    rows = directions[truth] + 0.05 * torch.randn(units, width, generator=generator)
    return rows * torch.exp(torch.randn(units, 1, generator=generator)), truth


def agreement(labels: Tensor, truth: Tensor) -> float:
    return pytest.importorskip("sklearn.metrics").adjusted_rand_score(truth.numpy(), labels.numpy())


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_planted_clusters_are_found_whatever_the_norms(seed: int) -> None:
    weight, truth = planted(seed)
    labels = cluster_neurons(weight, 8)
    assert labels.bincount().tolist() == [32] * 8
    assert agreement(labels, truth) == 1.0
    # Without normalisation long rows form separate clusters; a contiguous split does not recover the clusters.
    assert agreement(balanced_kmeans(weight, 8), truth) < 0.9
    assert abs(agreement(torch.arange(256) // 32, truth)) < 0.1

    def concentration(split: Tensor) -> float:
        blocks = [torch.linalg.svdvals(weight[split == expert]) for expert in range(8)]
        return sum(float(values[:3].sum() / values.sum()) for values in blocks) / 8

    assert concentration(labels) > concentration(torch.arange(256) // 32) + 0.1


def test_scaling_a_unit_or_the_dtype_changes_nothing() -> None:
    weight, _ = planted()
    labels = cluster_neurons(weight, 8, seed=1)
    assert torch.equal(
        labels, cluster_neurons(weight * 2.0 ** torch.arange(-128, 128).div(16).floor()[:, None], 8, seed=1)
    )
    assert torch.equal(cluster_neurons(weight.bfloat16(), 8), cluster_neurons(weight.bfloat16().float(), 8))
    weight[3:5] = 0  # pruned units
    assert cluster_neurons(weight, 8).bincount().tolist() == [32] * 8


@pytest.mark.parametrize("options", [{}, {"embed_dim": 48, "num_heads": 3, "mlp_ratio": 2.0}, {"img_size": (16, 24)}])
def test_the_function_is_preserved(options: dict) -> None:
    vit = tiny_vit(**options)
    for block in vit.blocks:
        nn.init.normal_(block.mlp.fc1.bias, std=0.3)  # shows whether the biases are permuted
    x = torch.rand(3, 3, *vit.patch_embed.img_size, generator=torch.Generator().manual_seed(1))
    before, state = vit(x), snapshot(vit)
    orders = []
    for block, labels in zip(vit.blocks, cluster_model(vit, 8)):
        parameter = block.mlp.fc1.weight
        orders.append(permute_experts(block, labels, 8))
        assert block.mlp.fc1.weight is parameter
        size = len(labels) // 8
        # Unit h of the new order belongs to expert h // n, not h % K.
        assert torch.equal(labels[orders[-1]], torch.arange(len(labels)) // size)
    assert (vit(x) - before).abs().max() < 1e-5 * before.abs().max()
    assert not torch.equal(*orders)
    for name, value in vit.state_dict().items():
        moved = name.endswith(("fc1.weight", "fc1.bias", "fc2.weight"))
        assert torch.equal(value, state[name]) != moved, name
    for block, order in zip(vit.blocks, orders):
        assert torch.equal(order.sort().values, torch.arange(len(order)))
        permute_experts(block.mlp, order, len(order))  # sorting a permutation gives its inverse
    assert all(torch.equal(value, state[name]) for name, value in vit.state_dict().items())


def test_units_of_an_expert_keep_their_order() -> None:
    mlp = Mlp(4, 6)
    order = permute_experts(mlp, torch.tensor([1, 0, 1, 0, 0, 1]), 2)
    assert order.tolist() == [1, 3, 4, 0, 2, 5]


def test_an_ffn_without_biases() -> None:
    mlp = Mlp(8, 16, bias=False)
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    before = mlp(x)
    permute_experts(mlp, cluster_neurons(mlp.fc1.weight, 4), 4)
    assert torch.allclose(mlp(x), before, atol=1e-6)


def test_every_block_has_its_own_labels() -> None:
    vit = tiny_vit()
    first, second = cluster_model(vit, 4)
    assert not torch.equal(first, second)
    assert torch.equal(first, cluster_neurons(vit.blocks[0].mlp.fc1.weight, 4))


def test_the_cache_is_used_and_mended(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vit, calls = tiny_vit(), []

    def counted(*arguments: object) -> Tensor:
        calls.append(arguments)
        return cluster_neurons(*arguments)

    monkeypatch.setattr(experts, "cluster_neurons", counted)
    labels = cluster_model(vit, 4)
    files = sorted(cache.iterdir())
    assert len(calls) == len(files) == 2
    assert all(torch.equal(first, second) for first, second in zip(labels, cluster_model(vit, 4))) and len(calls) == 2
    # A truncated file is written again; another seed, number of experts or weight has another file.
    files[0].write_bytes(files[0].read_bytes()[:50])
    assert all(torch.equal(first, second) for first, second in zip(labels, cluster_model(vit, 4))) and len(calls) == 3
    for change in ((4, 1), (8, 0)):
        cluster_model(vit, *change)
    assert len(calls) == 7 and len(list(cache.iterdir())) == 6
    other = copy.deepcopy(vit)
    other.blocks[1].mlp.fc1.weight.data[0, 0] += 1e-3
    cluster_model(other, 4)
    assert len(calls) == 8


def test_labels_of_a_foreign_file_are_not_believed(cache: Path) -> None:
    import safetensors.torch

    vit = tiny_vit()
    labels = cluster_model(vit, 4)
    for file in cache.iterdir():
        file.write_bytes(safetensors.torch.save({"labels": torch.zeros(128, dtype=torch.int64)}))
    assert all(torch.equal(first, second) for first, second in zip(labels, cluster_model(vit, 4)))


def test_coactivation_parts_units_that_never_fire_together() -> None:
    """Units with opposite input weights: each is active where its partner is not."""
    vit = tiny_vit(depth=1)
    fc1 = vit.blocks[0].mlp.fc1
    with torch.no_grad():
        fc1.bias.zero_()
        fc1.weight[1::2] = -fc1.weight[::2]
    vit.train()
    state, pictures = snapshot(vit), images(8)
    (labels,) = cluster_model(vit, 2, by="activations", images=pictures, tokens=64)
    assert labels.bincount().tolist() == [64, 64]
    assert (labels[::2] != labels[1::2]).float().mean() > 0.9
    assert vit.training and all(torch.equal(value, state[name]) for name, value in vit.state_dict().items())
    assert not fc1._forward_hooks and not vit.blocks[0].mlp.fc2._forward_pre_hooks
    (again,) = cluster_model(vit, 2, by="activations", images=pictures, tokens=64)
    assert torch.equal(again, labels)


def test_the_activations_are_those_of_the_drawn_tokens() -> None:
    vit = tiny_vit()
    pictures = images(20)
    rows = experts._activations(vit, [block.mlp for block in vit.blocks], pictures, 100, seed=0)
    assert [row.shape for row in rows] == [(128, 100)] * 2 and all((row >= 0).all() for row in rows)
    captured: list[Tensor] = []
    hook = vit.blocks[1].mlp.fc2.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        vit(pictures)
    hook.remove()
    every = captured[0].clamp_min(0)
    assert torch.cdist(rows[1].T, every, compute_mode="donot_use_mm_for_euclid_dist").min(1).values.max() < 1e-4


@pytest.mark.parametrize(
    ("mlp", "message"),
    [
        (SwiGLU(8, 16), "SwiGLU is a gated FFN"),
        (GluMlp(8, 16), "GluMlp is a gated FFN"),
        (Mlp(8, 16, norm_layer=nn.LayerNorm), "normalises its hidden units"),
        (Mlp(8, 16, use_conv=True), "fc1 is Conv2d"),
        (nn.Identity(), "no fc1 and fc2"),
    ],
)
def test_other_ffns_are_refused_with_the_reason(mlp: nn.Module, message: str) -> None:
    for call in (lambda: plain_mlp(mlp), lambda: permute_experts(mlp, torch.zeros(16, dtype=torch.int64), 1)):
        with pytest.raises(UserError, match=message):
            call()


def test_a_gated_block_is_named() -> None:
    vit = tiny_vit()
    vit.blocks[1].mlp = SwiGLU(32, 64)
    with pytest.raises(UserError, match="SwiGLU of block 1 is a gated FFN"):
        cluster_model(vit, 4)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(16, dtype=torch.int64), "each of 4 experts 4 units"),
        (torch.arange(16) // 4 + 1, "each of 4 experts"),
        (torch.arange(16) // 4 - 1, "each of 4 experts"),
        (torch.arange(12) // 3, r"\(12,\).*needed \(16,\)"),
        ((torch.arange(16) // 4).int(), "int32"),
    ],
)
def test_labels_that_do_not_fit(labels: Tensor, message: str) -> None:
    mlp = Mlp(8, 16)
    before = snapshot(mlp)
    with pytest.raises(UserError, match=message):
        permute_experts(mlp, labels, 4)
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())


def test_other_errors() -> None:
    vit = tiny_vit()
    with pytest.raises(UserError, match="5 experts cannot share 128 hidden units equally; use 4 or 8"):
        cluster_model(vit, 5)
    with pytest.raises(UserError, match="5 experts cannot share"):
        cluster_neurons(torch.randn(128, 4), 5)
    with pytest.raises(UserError, match=r"clustering by 'weight'.*Near: 'weights'"):
        cluster_model(vit, 4, by="weight")
    with pytest.raises(UserError, match="needs images"):
        cluster_model(vit, 4, by="activations")
    with pytest.raises(UserError, match="takes no images"):
        cluster_model(vit, 4, images=images())
    with pytest.raises(UserError, match=r"images are \(3, 16, 16\)"):
        cluster_model(vit, 4, by="activations", images=images()[0])
    with pytest.raises(UserError, match="no blocks"):
        cluster_model(nn.Linear(2, 2), 4)
    for weight in (torch.randn(8), torch.zeros(8, 2, dtype=torch.int64), torch.zeros(8, 2, device="meta")):
        with pytest.raises(UserError, match="needed a floating point matrix"):
            cluster_neurons(weight, 4)
    with pytest.raises(UserError, match="infinite or NaN"):
        cluster_neurons(torch.full((8, 2), torch.inf), 4)


def test_explained_variance_by_hand() -> None:
    # Directions e1, e1, e2, e2 in two groups. Together W = 0. Apart each group has two rows at distance 1/sqrt(2) of its mean:
    # W = 4 / 2 = 2; T = 4 * 1/2 = 2, E = 2 (4 - 2) / 3 = 4/3, the mean over the three pairings: (0 + 2 + 2) / 3.
    weight = torch.tensor([[2.0, 0], [5, 0], [0, 1], [0, 3]])
    assert explained_variance(weight, torch.tensor([0, 0, 1, 1]), 2) == pytest.approx(1)
    assert explained_variance(weight, torch.tensor([0, 1, 0, 1]), 2) == pytest.approx(1 - 2 / (4 / 3))
    weight = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    random = [explained_variance(weight, random_neurons(64, 4, seed), 4) for seed in range(40)]
    assert abs(sum(random) / 40) < 0.01 < explained_variance(weight, cluster_neurons(weight, 4), 4)


def test_random_experts_are_balanced_and_a_function_of_the_seed() -> None:
    labels = random_neurons(32, 4, 1)
    assert labels.bincount().tolist() == [8] * 4 and torch.equal(labels, random_neurons(32, 4, 1))
    assert not torch.equal(labels, random_neurons(32, 4, 2)) and not torch.equal(labels, labels.sort().values)
    with pytest.raises(UserError):
        random_neurons(30, 4)
