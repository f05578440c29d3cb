"""Adapters in folders and models as updates: read, summed, put on a stock model, saved, exported, merged; refusals."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers.adapter_folders import write_description
from helpers.tiny import images, shake, snapshot, tiny_vit
from torch import Tensor, nn

import vismt
from vismt.base.errors import UserError
from vismt.llm import collect_covariance, instance_gates
from vismt.lowrank import combine, read_updates
from vismt.lowrank.files import save_load
from vismt.lowrank.layers.base import adapter_layers
from vismt.multitask.emtal.method import set_fade

LAYERS = ["attn.qkv", "mlp.fc1"]
ADAPTERS = {
    "lora": ("lora", {"alpha": 6}),
    "rslora": ("lora", {"alpha": 5, "rslora": True, "rank": 3, "targets": ["mlp.fc1", "mlp.fc2"]}),
    "ranks": ("lora", {"rank_pattern": {"mlp.fc1": 4}, "alpha_pattern": {"qkv": 1}}),
    "pissa": ("pissa", {"alpha": 4}),
    "corda": ("corda", {"mode": "kpm", "covariances": collect_covariance(tiny_vit(), [images()], LAYERS)}),
    "polar": ("polar", {"alpha": 3}),
    "amt blocks": ("amt", {"split_qkv": True}),
    "conv": ("pissa", {"targets": ["attn.qkv", "patch_embed.proj"]}),
    "bf16": ("lora", {"dtype": "bfloat16"}),
    "emtal": ("emtal", {"n_experts": 4}),
}


def adapter(name: str, seed: int = 2, **more: object) -> nn.Module:
    """A trained adapter on the tiny ViT, a router at the end of its schedule."""
    method, options = ADAPTERS[name]
    model = tiny_vit()
    targets = {} if method == "emtal" else {"targets": LAYERS}
    vismt.adapt(model, method, **{"rank": 2, **targets, **options, **more})
    for module in model.modules():
        if hasattr(module, "fade"):
            module.fade = 1.0
    return shake(model, seed=seed)


def merged(model: nn.Module) -> dict[str, Tensor]:
    return snapshot(vismt.merge(model))


@cache
def merged_alone(name: str, seed: int) -> dict[str, Tensor]:
    return merged(adapter(name, seed))


def added(names: list[str], weights: list[float]) -> dict[str, Tensor]:
    """W + sum_j w_j (W_j - W) with W_j the weights of each adapter merged alone."""
    stock = snapshot(tiny_vit())
    states = [merged_alone(name, seed) for seed, name in enumerate(names)]
    return {
        key: value + sum(w * (state[key] - value) for w, state in zip(weights, states)) for key, value in stock.items()
    }


def check_weights(weights: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert list(weights) == list(expected)
    for key, value in expected.items():
        assert (weights[key] - value).abs().max() <= tolerance * max(1.0, float(value.abs().max())), key


# ---- sums


@pytest.mark.parametrize("form", ["model", "folder", "peft"])
@pytest.mark.parametrize("method", ["cat", "svd"])
def test_any_adapters_are_their_weighted_sum(form: str, method: str, tmp_path: Path) -> None:
    """Scales, ranks, starts, cores, blocks and paths differ; where one has no update, it adds nothing."""
    names, weights = list(ADAPTERS), [0.7, -0.3, 0.5, 1.0, 0.4, 2.0, -1.0, 0.25, 0.6, 0.1]
    sources: list = [adapter(name, seed) for seed, name in enumerate(names)]
    if form != "model":
        write = vismt.save_adapter if form == "folder" else vismt.export_peft
        sources = [write(source, tmp_path / str(number)) for number, source in enumerate(sources)]
    both = combine(sources, weights, method)
    ranks = {path: update.rank for path, update in both.low_rank.items()}
    if method == "cat":  # lora 2, ranks 2, pissa 4, corda 4, polar 2, amt 3 x 2 x 2, conv 4, bf16 2, emtal 2
        assert ranks["blocks.1.attn.qkv"] == 2 + 2 + 4 + 4 + 2 + 12 + 4 + 2 + 2 and ranks["patch_embed.proj"] == 4
    else:
        assert all(rank <= 32 for rank in ranks.values())
    check_weights(merged(both.put_on(tiny_vit())), added(names, weights), 2e-6 if method == "cat" else 5e-6)


def test_folders_of_both_kinds_and_models_mix(tmp_path: Path) -> None:
    names = ["pissa", "rslora", "lora"]
    first, second, third = (adapter(name, seed) for seed, name in enumerate(names))
    sources = [vismt.save_adapter(first, tmp_path / "a"), vismt.export_peft(second, tmp_path / "b"), third]
    both = combine([str(sources[0]), *sources[1:]], [0.5, 2, -1])
    check_weights(merged(both.put_on(tiny_vit())), added(names, [0.5, 2, -1]))
    again = combine([both, both], [0.5, 0.5], "svd")  # what was combined is an adapter
    check_weights(merged(again.put_on(tiny_vit())), added(names, [0.5, 2, -1]), 5e-6)


def test_a_rank_is_kept_of_each_weight_alone() -> None:
    first, second = adapter("lora", 3), adapter("ranks", 4)
    both = combine([first, second], [1.0, -2.0], "svd", rank=3)
    for path, update in both.low_rank.items():
        dense = first.get_submodule(path).low_rank().delta() - 2 * second.get_submodule(path).low_rank().delta()
        U, S, V = torch.linalg.svd(dense)
        assert update.rank == 3 and torch.allclose(update.delta(), U[:, :3] * S[:3] @ V[:3], atol=1e-6)
    least = combine([first, adapter("conv", 5)], [1.0, 1.0], "svd", rank=5)  # of rank 4 alone, or 2, or both
    assert {path: update.rank for path, update in least.low_rank.items() if ".1." not in path} == {
        "blocks.0.attn.qkv": 5,
        "blocks.0.mlp.fc1": 2,
        "patch_embed.proj": 4,
    }
    with pytest.raises(UserError, match=r"rank 7 is outside 1\.\.6"):
        combine([first, second], [1.0, 1.0], "svd", rank=7)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("form", ["model", "folder"])
def test_one_adapter_of_weight_one_is_itself(name: str, form: str, tmp_path: Path) -> None:
    model = adapter(name)
    with torch.no_grad():
        expected = model(images())
    updates = {path: layer.low_rank() for path, layer in adapter_layers(model).items()} if name != "emtal" else None
    itself = combine([vismt.save_adapter(model, tmp_path) if form == "folder" else model], [1.0])
    for path, update in (updates or {}).items():
        read = itself.low_rank[path]
        assert (
            torch.equal(read.B, update.B)
            and torch.equal(read.A, update.A)
            and read.scale == update.scale
            and read.core is None
        )
    put = itself.put_on(tiny_vit())
    exact = name in ("lora", "rslora", "ranks")  # the others sum in another order
    assert torch.equal(put(images()), expected) if exact else torch.allclose(put(images()), expected, atol=1e-6)


def test_what_is_combined_is_saved_exported_and_undone(tmp_path: Path) -> None:
    model = combine([adapter("pissa", 3, also_train=["head"])] * 2, [0.75, 0.5]).put_on(tiny_vit())
    expected = model(images())
    assert model.vismt_record.method == "lora" and {"head.weight", "head.bias"} == set(model.vismt_record.also_train)
    again = vismt.load_adapter(tiny_vit(), vismt.save_adapter(model, tmp_path / "own"))
    assert torch.equal(again(images()), expected)
    there = vismt.import_peft(tiny_vit(), vismt.export_peft(model, tmp_path / "peft"))
    assert torch.allclose(there(images()), expected, atol=1e-6)
    model(images()).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    vismt.unadapt(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in snapshot(tiny_vit()).items())


def test_parameters_that_train_along_are_read(tmp_path: Path) -> None:
    model = tiny_vit()
    vismt.adapt(model, "emtal", n_experts=4, also_train=[r"blocks\.0\.mlp\.fc1\.bias"])
    shake(model)
    set_fade(model, 1.0)
    vismt.save_adapter(model, tmp_path)
    of_model, of_folder = read_updates(model).also_train, read_updates(tmp_path).also_train
    assert of_model.keys() == of_folder.keys() == {"blocks.0.mlp.fc1.bias"}
    assert all(torch.equal(value, of_folder[name]) for name, value in of_model.items())


def test_what_was_read_does_not_follow_the_model() -> None:
    model = adapter("lora", also_train=["head"])
    read = read_updates(model)
    before = read.low_rank["blocks.0.mlp.fc1"].delta(), read.also_train["head.weight"].clone()
    shake(model)
    assert torch.equal(read.low_rank["blocks.0.mlp.fc1"].delta(), before[0])
    assert torch.equal(read.also_train["head.weight"], before[1])


def test_factors_keep_fp32_on_a_half_precision_model() -> None:
    single = adapter("lora")
    model = combine([single], [1.0]).put_on(tiny_vit().to(torch.bfloat16))
    assert (
        torch.equal(model.blocks[0].mlp.fc1.lora_A, single.blocks[0].mlp.fc1.lora_A)
        and model.head.weight.dtype == torch.bfloat16
    )


def test_transposed_weights_of_a_language_model(tmp_path: Path) -> None:
    from helpers.language_models import tiny_lm, tokens

    models = []
    for method, seed in (("pissa", 3), ("lora", 4)):
        models.append(tiny_lm("gpt2"))
        vismt.adapt(models[-1], method, rank=2, alpha=3)
        shake(models[-1], seed=seed)
    put = combine([vismt.save_adapter(models[0], tmp_path), models[1]], [2.0, -1.0]).put_on(tiny_lm("gpt2"))
    weights = [vismt.merge(model).state_dict() for model in models]
    stock = tiny_lm("gpt2").state_dict()
    by_hand = tiny_lm("gpt2")
    # W + 2 (W_0 - W) - (W_1 - W)
    by_hand.load_state_dict({key: 2 * weights[0][key] - weights[1][key] for key in stock})
    assert torch.allclose(put(tokens()).logits, by_hand(tokens()).logits, atol=2e-5)
    assert not torch.allclose(put(tokens()).logits, tiny_lm("gpt2")(tokens()).logits, atol=1e-2)


# ---- heads, bases, shapes


def test_heads_are_kept_where_they_are_the_same(tmp_path: Path) -> None:
    first, second = (adapter("lora", seed, also_train=["head"]) for seed in (3, 4))
    with pytest.raises(UserError, match=r"adapters 0 and 1 do not hold the same 'head\.bias', .*also_train=False"):
        combine([first, second], [0.5, 0.5])
    with pytest.raises(UserError, match=r"adapters 0 and 1 do not hold the same 'head\.bias'"):
        combine([adapter("lora"), vismt.export_peft(first, tmp_path)], [0.5, 0.5])
    factors = [
        read_updates(source, also_train=False) for source in (first, vismt.save_adapter(second, tmp_path / "two"))
    ]
    put = combine(factors, [0.5, 0.5]).put_on(tiny_vit())
    assert not put.vismt_record.also_train and torch.equal(put.head.weight, tiny_vit().head.weight)
    with torch.no_grad():
        for parameter, value in zip(second.head.parameters(), first.head.parameters()):
            parameter.copy_(value)
    assert torch.equal(combine([first, second], [0.5, 0.5]).put_on(tiny_vit()).head.weight, first.head.weight)


def test_another_base_is_refused_or_warned_of(tmp_path: Path) -> None:
    foreign = tiny_vit(seed=9)
    vismt.adapt(foreign, "lora", LAYERS, rank=2)
    with pytest.raises(UserError, match="adapter 1 was made for other base weights"):
        combine([adapter("lora"), vismt.save_adapter(foreign, tmp_path)], [1.0, 1.0])
    both = combine([adapter("lora"), adapter("pissa")], [1.0, 1.0])
    stranger = tiny_vit(seed=9)
    before = snapshot(stranger)
    with pytest.raises(UserError, match=r"combined adapters: made for other weights than .* on_other_base='warn'"):
        both.put_on(stranger)
    assert all(torch.equal(value, stranger.state_dict()[key]) for key, value in before.items())
    with pytest.warns(UserWarning, match="made for other weights"):
        assert both.put_on(stranger, on_other_base="warn").vismt_record.method == "lora"


def test_shapes_and_paths_have_to_be_the_models(tmp_path: Path) -> None:
    wide = tiny_vit(embed_dim=64)
    vismt.adapt(wide, "lora", LAYERS, rank=2)
    folders = [vismt.export_peft(source, tmp_path / str(n)) for n, source in enumerate((adapter("lora"), wide))]
    path = r"'blocks\.0\.attn\.qkv'"
    with pytest.raises(UserError, match=rf"{path}: adapter 1 is for a \(192, 64\) weight, adapter 0 for \(96, 32\)"):
        combine(folders, [1.0, 1.0])
    with pytest.raises(UserError, match=rf"{path}: the update is for a \(192, 64\) weight, here it is \(96, 32\)"):
        combine(folders[1:], [1.0]).put_on(tiny_vit())
    both = combine([adapter("lora")], [1.0])
    with pytest.raises(UserError, match=r"VisionTransformer has no linear or convolution 'blocks\.1\.attn\.qkv'"):
        both.put_on(tiny_vit(depth=1))
    with pytest.raises(UserError, match="already carries 'lora'"):
        both.put_on(adapter("lora"))


def test_settings_of_peft_are_compared_with_the_model(tmp_path: Path) -> None:
    """A file that lacks a module is not taken for a zero update of it."""
    folder = vismt.export_peft(adapter("lora"), tmp_path)
    path = folder / "adapter_model.safetensors"
    tensors = {key: value for key, value in safetensors.torch.load_file(path).items() if "blocks.1.mlp.fc1" not in key}
    safetensors.torch.save_file(tensors, path)
    both = combine([folder, adapter("pissa")], [1.0, 1.0])
    with pytest.raises(UserError, match=r"the settings name 'blocks\.1\.mlp\.fc1', but the file holds no factors"):
        both.put_on(tiny_vit())


# ---- what has no such form


def test_a_router_has_to_have_faded(tmp_path: Path) -> None:
    live = tiny_vit()
    vismt.adapt(live, "emtal", rank=2, n_experts=4)
    shake(live)
    for source in (live, vismt.save_adapter(live, tmp_path)):
        with pytest.raises(UserError, match=r"combine.*: the router of 'blocks\.0\.mlp' still routes \(fade 0 of 1"):
            combine([source], [1.0])


def test_gates_of_one_user_are_fixed_while_reading(tmp_path: Path) -> None:
    model = tiny_vit()
    vismt.adapt(model, "ilora", LAYERS, rank=4, n_experts=2, alpha=6)
    shake(model)
    folder = vismt.save_adapter(model, tmp_path)
    gates = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    for source in (model, folder):
        with pytest.raises(UserError, match="combine: the rank groups of this model are gated and no gates are given"):
            combine([source], [1.0])
        with instance_gates(gates), pytest.raises(UserError, match="combine: gates of 2 samples"):
            combine([source], [1.0])
        with instance_gates(gates[1]):
            put = combine([source, source], [0.5, 0.5]).put_on(tiny_vit())
            assert torch.allclose(put(images()), model(images()), atol=1e-6)
        assert torch.isfinite(put(images())).all()  # without gates


@pytest.mark.parametrize("method,reason", [("s2ft", "trains rows or columns"), ("lisa", "has no low-rank factors")])
def test_slices_and_layers_are_no_factors(method: str, reason: str, tmp_path: Path) -> None:
    model = tiny_vit()
    vismt.adapt(model, method, **({"ratio": 0.25} if method == "s2ft" else {}))
    for source in (model, vismt.save_adapter(model, tmp_path / "a")):
        with pytest.raises(UserError, match=rf"combine: .*'{method}' {reason}"):
            combine([source], [1.0])


def test_slices_that_were_exported_are_factors(tmp_path: Path) -> None:
    model = tiny_vit()
    vismt.adapt(model, "s2ft", ratio=0.25)
    shake(model)
    put = combine([vismt.export_peft(model, tmp_path)], [1.0]).put_on(tiny_vit())
    assert torch.allclose(put(images()), model(images()), atol=1e-5)


def test_an_unconverted_start_goes_by_its_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["fc1"], init_lora_weights="pissa")
    theirs = shake(peft.get_peft_model(tiny_vit(), config)).eval()
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=r"init_lora_weights 'pissa' changed the base .* import_peft it"):
        combine([tmp_path], [1.0])
    put = combine([vismt.import_peft(tiny_vit(), tmp_path)], [1.0]).put_on(tiny_vit())
    assert torch.allclose(put(images()), theirs(images()), atol=1e-5)


def test_other_sources_than_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="combine: this model is not adapted"):
        combine([tiny_vit()], [1.0])
    with pytest.raises(
        UserError, match=r"is not an adapter folder; it has neither adapter\.json nor adapter_config\.json"
    ):
        combine([tmp_path], [1.0])
    with pytest.raises(UserError, match="combine: int is not an adapter"):
        combine([3], [1.0])
    with pytest.raises(UserError, match="adapters is one PosixPath; give a list"):
        combine(tmp_path, [1.0])
    model = adapter("lora")
    with pytest.raises(UserError, match="adapter 1 is a VisionTransformer among updates of one weight"):
        combine([model.blocks[0].mlp.fc1.low_rank(), model], [1.0, 1.0])
    with pytest.raises(UserError, match="2 adapters but 1 weights"):
        combine([model, model], [1.0])
    with torch.device("meta"):
        empty = tiny_vit()
    vismt.adapt(empty, "lora", LAYERS, rank=2)
    with pytest.raises(UserError, match="meta device"):
        combine([empty], [1.0])


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    folder = vismt.save_adapter(adapter("emtal"), tmp_path)
    description = json.loads((folder / save_load.DESCRIPTION).read_text())
    tensors = safetensors.torch.load((folder / description["tensors"]).read_bytes())
    lacking = {key: value for key, value in tensors.items() if key != "blocks.0.mlp.fc1.lora_A"}
    for changed, reason in (
        ({**tensors, "nobody": torch.zeros(1)}, "unexpected 'nobody'"),
        (lacking, r"lora_A' is missing"),
    ):
        payload = safetensors.torch.save(changed)
        (folder / description["tensors"]).write_bytes(payload)
        write_description(folder, {**description, "tensors_sha256": hashlib.sha256(payload).hexdigest()})
        with pytest.raises(UserError, match=reason):
            combine([folder], [1.0])
