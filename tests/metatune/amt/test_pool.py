"""The pool: a mixture by hand, the convex family of weights (I8), experts that do not fit, and pools on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.amt_parts import adapted, backbone, same, saved
from helpers.tiny import shake, snapshot
from torch import Tensor

import vismt
from vismt.base.errors import UserError
from vismt.lowrank.files.combining import combine
from vismt.lowrank.files.save_load import load_adapter, save_adapter
from vismt.metatune.amt import pool as pool_file
from vismt.metatune.amt.pool import Expert, ExpertPool, assemble, read_pool
from vismt.storage.files import sealed

SITES = [f"vit.blocks.{k}.{site}.weight" for k in (0, 1) for site in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def merged(expert: Expert) -> dict[str, Tensor]:
    """Return an expert's weights by `merge`, which shares no code with the pool's."""
    net = backbone()
    vismt.merge(load_adapter(net.vit, expert.folder))
    return {name: dict(net.named_parameters())[name].detach() for name in SITES}


def spread(pool: ExpertPool, *zeta: float) -> dict[str, Tensor]:
    return pool.weights(torch.tensor(zeta))


def factors_of(pool: ExpertPool) -> dict[str, Tensor]:
    """Return copies of the factors of a pool."""
    updates = [(number, *item) for number, update in enumerate(pool.updates) for item in update.low_rank.items()]
    pairs = [(f"{number}.{path}", factors) for number, path, factors in updates]
    return {f"{name}.{side}": getattr(factors, side).clone() for name, factors in pairs for side in "BA"}


def test_one_expert_is_its_own_model(tmp_path: Path) -> None:
    experts = saved(tmp_path)
    pool = ExpertPool(backbone(), experts)
    assert len(pool) == 3 and pool.labels == ["0", "1", "2"] and pool.scale == 11.0
    for index, expert in enumerate(experts):
        expected = merged(expert)
        assert set(pool.expert_weights(index)) == set(expected)
        for name, weight in expected.items():
            assert torch.allclose(pool.expert_weights(index)[name], weight, rtol=0, atol=2e-6), name
            # The other experts change the weight by far more, so the principal part is neither lost nor counted twice.
            stock = dict(backbone().named_parameters())[name]
            assert index == 0 or (weight - stock).abs().max() > 0.01


@pytest.mark.parametrize("options", [{}, {"init": "lora"}, {"alpha": 6.0}, {"split_qkv": False}])
def test_mixtures_are_convex_combinations_of_whole_weights(tmp_path: Path, options: dict) -> None:
    experts = saved(tmp_path, (3, 4, 5), **options)
    pool, singles = ExpertPool(backbone(), experts), [merged(expert) for expert in experts]
    shared = pool.updates[len(pool) :]  # the start of all experts
    assert [bool(update.low_rank) for update in shared] == ([True] if options.get("init") != "lora" else [])
    for zeta in ((0.2, 0.5, 0.3), (0.0, 0.25, 0.75), (1 / 3, 1 / 3, 1 / 3), (1.5, -0.25, -0.25)):
        for name, weight in spread(pool, *zeta).items():
            expected = sum(part * weights[name] for part, weights in zip(zeta, singles))
            assert torch.allclose(weight, expected, rtol=0, atol=5e-6), name


def test_a_core_between_the_factors_is_mixed_along(tmp_path: Path) -> None:
    experts = []
    for number in range(2):
        net = backbone()
        vismt.adapt(net.vit, "polar", targets=["qkv", "attn.proj", "fc1", "mlp.fc2"], rank=2, split_qkv=True)
        experts.append(Expert(str(number), save_adapter(shake(net.vit, 0.3, number), tmp_path / str(number))))
    pool, singles = ExpertPool(backbone(), experts), [merged(expert) for expert in experts]
    for name, weight in spread(pool, 0.3, 0.7).items():
        assert torch.allclose(weight, 0.3 * singles[0][name] + 0.7 * singles[1][name], rtol=0, atol=5e-6), name
        assert (singles[0][name] - singles[1][name]).abs().max() > 0.01


# ---- rules of combine


def dense(rule: str, first: Tensor, second: Tensor) -> Tensor:
    """Return two updates (o, i), given as matrices, merged by a rule: TSV-M, or TIES with 20 % kept in a joint basis."""
    if rule == "tsv":
        parts = [torch.linalg.svd(update, full_matrices=False) for update in (first, second)]
        kept = [int((s > 1e-4 * s[0]).sum()) for _, s, _ in parts]
        U = torch.cat([u[:, :k] for (u, _, _), k in zip(parts, kept)], 1)
        V = torch.cat([v[:k] for (_, _, v), k in zip(parts, kept)])
        return polar(U) @ torch.cat([s[:k] for (_, s, _), k in zip(parts, kept)]).diag() @ polar(V)
    U, rows, _ = torch.linalg.svd(torch.cat([first, second], 1), full_matrices=False)
    _, columns, V = torch.linalg.svd(torch.cat([first, second]), full_matrices=False)
    U, V = U[:, rows > 1e-4 * rows[0]], V[columns > 1e-4 * columns[0]]
    right = V if rule == "core_ties" else torch.eye(len(V.T), dtype=V.dtype)  # knots_ties: U^T D_t itself
    entries = torch.stack([U.T @ update @ right.T for update in (first, second)])
    least = entries.abs().flatten(1).sort(1).values[:, -round(0.2 * entries[0].numel())]
    entries = entries * (entries.abs() >= least[:, None, None])
    agreeing = entries * (entries.sign() == entries.sum(0).sign())
    return U @ (agreeing.sum(0) / agreeing.count_nonzero(0).clamp_min(1)) @ right


def polar(matrix: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, s > 1e-4] @ v[s > 1e-4]


@pytest.mark.parametrize("rule", ["tsv", "core_ties", "knots_ties"])
def test_a_rule_of_combine_merges_the_differences_to_the_stock_weights(tmp_path: Path, rule: str) -> None:
    experts, stock = saved(tmp_path, (3, 4)), dict(backbone().named_parameters())
    pool, singles = ExpertPool(backbone(), experts), [merged(expert) for expert in experts]
    assert pool.updates[2].low_rank  # the start of both, which each of the updates has
    for name, weight in pool.combined(rule).items():
        found = (weight - stock[name]).detach().double()
        updates = [(single[name] - stock[name]).detach().double() for single in singles]
        expected = dense(rule, *updates)
        assert (found - expected).norm() < 1e-3 * expected.norm(), name
        # Neither the trained parts with the start as a third task, nor the trained factors alone.
        path = name.removeprefix("vit.").removesuffix(".weight")
        own, start = pool.updates[:2], pool.updates[2].low_rank[path]
        parts = [part.low_rank[path] for part in (*own, pool.updates[2])]
        for wrong in (parts, parts[:2]):
            other = combine(wrong, method=rule).to(dtype=torch.float64)
            off = other.scale * other.B @ other.A - found
            if wrong is not parts:
                off = off + (start.scale * start.B @ start.A).double()
            assert off.norm() > 0.05 * found.norm(), name


def test_an_untuned_pool_is_the_pretrained_model_whatever_the_mixture(tmp_path: Path) -> None:
    pool, stock = ExpertPool(backbone(), saved(tmp_path, (None, None, None))), dict(backbone().named_parameters())
    for zeta in ((1.0, 0.0, 0.0), (0.2, 0.5, 0.3)):
        for name, weight in spread(pool, *zeta).items():
            assert torch.allclose(weight, stock[name], rtol=0, atol=1e-6)


def test_nothing_is_changed_in_place(tmp_path: Path) -> None:
    net, experts = backbone(), saved(tmp_path)
    before, flags = snapshot(net), {name: p.requires_grad for name, p in net.named_parameters()}
    keys, names = set(before), [type(part).__name__ for part in net.modules()]
    pool = ExpertPool(net, experts)
    factors = factors_of(pool)
    mixture, first = spread(pool, 0.2, 0.5, 0.3), pool.expert_weights(1)
    first_copy = {name: weight.clone() for name, weight in first.items()}
    spread(pool, 0.0, 1.0, 0.0)
    assert same(snapshot(net), before) and set(net.state_dict()) == keys
    assert [type(part).__name__ for part in net.modules()] == names
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags
    assert same(factors_of(pool), factors) and same(mixture, spread(pool, 0.2, 0.5, 0.3))
    assert same(pool.expert_weights(1), first_copy) and pool.expert_weights(1) is first
    stock = dict(net.named_parameters())
    assert not any(weight.data_ptr() == stock[name].data_ptr() for name, weight in [*mixture.items(), *first.items()])
    assert not any(factor.requires_grad for factor in factors.values())


def test_kept_weights_follow_a_conversion(tmp_path: Path) -> None:
    pool = ExpertPool(backbone(), saved(tmp_path))
    single = pool.expert_weights(1)
    pool.double()
    double = pool.expert_weights(1)
    assert all(weight.dtype == torch.float64 for weight in double.values())
    assert all(torch.allclose(double[name].float(), single[name], atol=1e-6) for name in single)


def test_mixtures_that_are_none(tmp_path: Path) -> None:
    pool = ExpertPool(backbone(), saved(tmp_path))
    for zeta in ((0.5, 0.5), (0.5, 0.2, 0.2), (float("nan"), 0.5, 0.5), (1.0, 0.0, 0.0, 0.0)):
        with pytest.raises(UserError, match="for 3 experts: give one weight each, with sum 1"):
            spread(pool, *zeta)
    assert pool.uniform().tolist() == pytest.approx([1 / 3] * 3) and pool.index("2") == 2
    with pytest.raises(UserError, match="no expert '8'; the pool has 0, 1, 2"):
        pool.index("8")
    with pytest.raises(UserError, match="no expert given"):
        ExpertPool(backbone(), [])


# ---- experts that do not fit


def test_signs_of_singular_vectors_do_not_matter(tmp_path: Path) -> None:
    """An SVD on another machine may return -u, -v for u, v: the same start."""
    first, second = saved(tmp_path / "a", (3, 3))
    proto = adapted()
    shake(proto.backbone.vit, 0.05, 3)
    for module in proto.backbone.vit.modules():
        if hasattr(module, "lora_A0"):
            with torch.no_grad():
                for tensor in (module.lora_A, module.lora_B, module.lora_A0, module.lora_B0):
                    tensor.neg_()
    flipped = Expert("flipped", save_adapter(proto.backbone.vit, tmp_path / "flipped"))
    pool = ExpertPool(backbone(), [first, flipped, second])
    for name, weight in pool.expert_weights(1).items():
        assert torch.allclose(weight, pool.expert_weights(0)[name], atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 3},
        {"alpha": 4.0},
        {"split_qkv": False},
        {"targets": ["attn.qkv", "attn.proj", "mlp.fc1"]},
        {"init": "lora"},
        {"seed": 1},
    ],
)
def test_experts_of_other_ranks_scales_modules_and_starts_are_mixed(tmp_path: Path, change: dict) -> None:
    first, second = saved(tmp_path, (3, 5))
    other = replace(saved(tmp_path / "other", (4,), **{"rank": 2, **change})[0], label="other")
    if "seed" in change:  # a start of other values
        other = replace(other, folder=moved_start(tmp_path / "moved"))
    pool = ExpertPool(backbone(), [first, other, second])
    singles = [merged(expert) for expert in (first, other, second)]
    for zeta in ((0.2, 0.5, 0.3), (0.6, 0.0, 0.4), (0.0, 1.0, 0.0)):
        for name, weight in spread(pool, *zeta).items():
            expected = sum(part * weights[name] for part, weights in zip(zeta, singles))
            assert torch.allclose(weight, expected, rtol=0, atol=5e-6), name
    assert read_pool(assemble([first, other, second], tmp_path / "pool"))[1].label == "other"


def moved_start(folder: Path) -> Path:
    """Save an expert whose start differs from that of the others."""
    proto = adapted()
    with torch.no_grad():
        proto.backbone.vit.blocks[1].mlp.fc1.lora_B0.mul_(1.01)
    return save_adapter(proto.backbone.vit, folder)


def test_parameters_that_were_trained_whole_are_refused(tmp_path: Path) -> None:
    first = saved(tmp_path, (3,))[0]
    other = replace(saved(tmp_path / "other", (4,), also_train=["norm"])[0], label="other")
    net = backbone()
    before = snapshot(net)
    message = "it trains 'norm.bias' too; a pool mixes low-rank factors only"
    with pytest.raises(UserError, match=message):
        ExpertPool(net, [first, other])
    with pytest.raises(UserError, match=message):
        assemble([first, other], tmp_path / "pool")
    assert not (tmp_path / "pool").exists()
    assert same(snapshot(net), before) and not hasattr(net.vit, "vismt_record")


def test_another_base_and_equal_names_are_refused(tmp_path: Path) -> None:
    first, second = saved(tmp_path, (3, 4))
    with pytest.raises(UserError, match="was made for VisionTransformer"):
        ExpertPool(backbone(seed=5), [first, second])
    with pytest.raises(UserError, match="two experts have the same label in 0, 0: rename a folder or a level"):
        ExpertPool(backbone(), [first, replace(second, label="0")])


# ---- on disk


def test_a_pool_folder_holds_all_there_is(tmp_path: Path) -> None:
    experts = saved(tmp_path / "runs")
    assert assemble(experts, tmp_path / "pool") == tmp_path / "pool"
    again = read_pool(tmp_path / "pool")
    assert [(expert.label, expert.scale) for expert in again] == [("0", 10.0), ("1", 11.0), ("2", 12.0)]
    assert [expert.folder for expert in again] == [tmp_path / "pool" / f"expert-{k}" for k in range(3)]
    first, second = ExpertPool(backbone(), experts), ExpertPool(backbone(), again)
    assert same(spread(first, 0.2, 0.5, 0.3), spread(second, 0.2, 0.5, 0.3)) and first.scale == second.scale
    # Reassembled in another order, from its own folder, over itself.
    assemble(again[::-1], tmp_path / "pool")
    turned = ExpertPool(backbone(), read_pool(tmp_path / "pool"))
    assert turned.labels == ["2", "1", "0"] and same(
        spread(turned, 0.3, 0.5, 0.2), spread(ExpertPool(backbone(), experts[::-1]), 0.3, 0.5, 0.2)
    )


@pytest.mark.parametrize("before", [False, True])
def test_an_interrupted_copy_is_not_read_as_a_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """Also over an older pool: its index must not describe the new files."""
    experts = saved(tmp_path / "runs")
    if before:
        assemble(experts[:2], tmp_path / "pool")
    whole, count = pool_file.atomic_write, 0

    def torn(path: Path, data: bytes | str) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        whole(path, data)

    monkeypatch.setattr(pool_file, "atomic_write", torn)
    with pytest.raises(KeyboardInterrupt):
        assemble(experts[::-1], tmp_path / "pool")
    with pytest.raises(UserError, match=r"no file .*pool\.json"):
        read_pool(tmp_path / "pool")


def test_an_expert_that_cannot_be_read_leaves_the_old_pool(tmp_path: Path) -> None:
    experts = saved(tmp_path / "runs")
    assemble(experts[:2], tmp_path / "pool")
    next(experts[2].folder.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"expert '2': .*safetensors' cannot be read"):
        assemble(experts, tmp_path / "pool")
    assert [expert.label for expert in read_pool(tmp_path / "pool")] == ["0", "1"]
    (experts[2].folder / "adapter.json").write_text("[1]")
    with pytest.raises(UserError, match=r"expert '2': adapter\.json is not what vismt\.save_adapter writes"):
        assemble(experts, tmp_path / "other")
    description = json.loads((experts[1].folder / "adapter.json").read_text())
    for value in (None, "../../secret", ".."):
        (experts[1].folder / "adapter.json").write_text(json.dumps({**description, "tensors": value}))
        with pytest.raises(UserError, match=r"expert '1': adapter\.json is not what .*: tensors[ :]"):
            assemble(experts[:2], tmp_path / "other")
    with pytest.raises(UserError, match="no expert given"):
        assemble([], tmp_path / "other")
    assert not (tmp_path / "other").exists()


ENTRY = {"label": "a", "folder": "expert-0", "scale": 10.0}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            {"format": 1, "experts": [{**ENTRY, "folder": "../other"}]},
            r"pool.json names '../other', which is not a folder",
        ),
        ({"format": 1, "experts": [{**ENTRY, "folder": "/etc"}]}, "names '/etc'"),
        ({"format": 1, "experts": [{**ENTRY, "folder": "expert-0/../.."}]}, "names 'expert-0/../..'"),
        ({"format": 1, "experts": [{**ENTRY, "folder": ""}]}, "names ''"),
        ({"format": 2, "experts": []}, r"^pool '.*': format 2, this version reads 1; use a matching vismt\.$"),
        (
            {"format": 1, "experts": [{"label": "a"}]},
            r"is not what `vismt pool assemble` writes \(KeyError\('folder'\)\)",
        ),
        ({"format": 1, "experts": [{**ENTRY, "scale": "big"}]}, "is not what `vismt pool assemble` writes"),
        ({"format": 1, "experts": None}, "is not what"),
        ([1], "was changed or damaged"),
        ({}, "is not what"),
    ],
)
def test_an_index_that_is_none(tmp_path: Path, index: object, message: str) -> None:
    (tmp_path / "pool.json").write_text(sealed(index) if isinstance(index, dict) else json.dumps(index))
    with pytest.raises(UserError, match=message):
        read_pool(tmp_path)
    (tmp_path / "pool.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_pool(tmp_path)
