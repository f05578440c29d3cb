"""PiSSA on language models and ViTs: identity, precision, the 4-bit start, and peft reading the result."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from helpers.adapter_folders import write_description
from helpers.language_models import LMS, relative, tiny_lm, tokens
from helpers.tiny import holds, images, shake, snapshot, tiny_vit
from torch import Tensor, nn

import vismt
from vismt.base.errors import UserError
from vismt.llm.pissa.method import quantized_principal
from vismt.llm.pissa.quantized import nf4
from vismt.lowrank.files.combining import combine
from vismt.lowrank.files.updates import read_updates
from vismt.lowrank.layers.base import adapter_layers
from vismt.lowrank.svd import principal, residual
from vismt.metatune.amt.pool import Expert, check_experts
from vismt.metatune.finetuning.finetune import attention_heads


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", LMS)
@pytest.mark.parametrize("options", [{}, {"solver": "randomized", "alpha": 2}, {"rank": 64, "clamp_rank": True}])
def test_language_models_start_unchanged_and_reach_peft(kind: str, options: dict, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    ids, model, stock = tokens(), tiny_lm(kind), tiny_lm(kind)
    before, wanted = snapshot(model), stock(ids).logits.detach()
    vismt.adapt(model, "pissa", **{"rank": 4, **options})
    assert (model(ids).logits - wanted).abs().max() <= 3e-6 * float(wanted.abs().max())
    weights = {name: value for name, value in model.state_dict().items() if name in before}
    assert all(torch.equal(value, before[name]) for name, value in weights.items())  # the base is unchanged
    shake(model)
    trained = model(ids).logits
    vismt.export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(stock, str(tmp_path)).eval()
    assert (theirs(ids).logits - trained).abs().max() <= 2e-6 * trained.abs().max()
    with theirs.disable_adapter():
        assert torch.equal(theirs(ids).logits, wanted)
    vismt.unadapt(model)
    assert holds(model, before)


@pytest.mark.parametrize("alpha,rslora", [(4.0, False), (8.0, False), (16.0, False), (6.0, True)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_start_is_the_top_part_for_any_scale(kind: str, alpha: float, rslora: bool) -> None:
    model = tiny_lm(kind)
    vismt.adapt(model, "pissa", rank=4, alpha=alpha, rslora=rslora)
    for path, host in adapter_layers(model).items():
        weight = host.matrix(host.weight).detach()
        assert host.scale == alpha / (2 if rslora else 4)
        U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
        top = (U[:, :4] * S[:4]) @ Vh[:4]
        update = host.scale * host.lora_B @ host.lora_A
        assert relative(update, top) < 1e-5, path
        assert abs(float(torch.linalg.matrix_norm(weight - update, 2)) / float(S[4]) - 1) < 1e-5
        assert relative(residual(weight, host.lora_A, host.lora_B, host.scale) + update, weight) < 1e-6


def test_export_is_the_pair_and_its_start_side_by_side(tmp_path) -> None:
    from safetensors.torch import load_file

    model = tiny_lm("llama")
    vismt.adapt(model, "pissa", ["q_proj"], rank=4, alpha=8)
    shake(model)
    vismt.export_peft(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    host = model.model.layers[1].self_attn.q_proj
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    assert torch.equal(tensors[f"{key}A.weight"], torch.cat([host.lora_A, host.lora_A0]))
    assert torch.equal(tensors[f"{key}B.weight"], 2 * torch.cat([host.lora_B, -host.lora_B0], 1))


@pytest.mark.parametrize("dtype,floor", [(torch.bfloat16, 1.1e-3), (torch.float16, 1.4e-4)])
def test_half_precision_loses_one_rounding_of_the_residual_and_ours_none(dtype: torch.dtype, floor: float) -> None:
    left, right = (torch.linalg.qr(torch.randn(64, 64, generator=generator(s))).Q for s in (3, 4))
    weight = ((left * (2 * 0.9 ** torch.arange(64.0))) @ right).to(dtype)
    A, B = (factor.to(dtype) for factor in principal(weight, 8, 2.0, generator=generator()))
    stored = residual(weight, A, B, 2.0).to(dtype)
    assert relative(stored.float() + 2 * B.float() @ A.float(), weight) <= floor
    exact = principal(weight, 8, 2.0, generator=generator())
    other = residual(weight, *exact, 2.0).to(dtype)  # from the factors before rounding
    assert relative(other.float() + 2 * B.float() @ A.float(), weight) > 1.3 * floor  # twice the error, as in peft
    for factors in (None, dtype):
        model = tiny_lm("llama").to(dtype)
        before = snapshot(model)
        vismt.adapt(model, "pissa", rank=4, alpha=8, dtype=factors)
        assert model.model.layers[0].mlp.up_proj.lora_A.dtype == (factors or torch.float32)
        vismt.merge(model)
        assert holds(model, before)


def test_randomised_start_is_seeded_and_survives_a_file(tmp_path) -> None:
    torch.manual_seed(1)
    first, same, other = tiny_vit(), tiny_vit(), tiny_vit()
    for model, seed in ((first, 0), (same, 0), (other, 1)):
        torch.rand(3)
        vismt.adapt(model, "pissa", rank=2, solver="randomized", seed=seed)
    assert torch.equal(first.blocks[0].attn.qkv.lora_A, same.blocks[0].attn.qkv.lora_A)
    assert not torch.equal(first.blocks[0].attn.qkv.lora_A, other.blocks[0].attn.qkv.lora_A)
    shake(first)
    vismt.save_adapter(first, tmp_path)
    torch.manual_seed(99)
    assert torch.equal(vismt.load_adapter(tiny_vit(), tmp_path)(images()), first(images()))


def noisy(seed: int = 0) -> Tensor:
    """Noise and decaying spikes, 128 x 128."""
    left, right = (torch.linalg.qr(torch.randn(128, 128, generator=generator(seed + s))).Q for s in (1, 2))
    spikes = (left * (8 * 0.93 ** torch.arange(128.0))) @ right
    return 0.05 * torch.randn(128, 128, generator=generator(seed)) + spikes / 16


def quantisation_error(weight: Tensor, A: Tensor, B: Tensor) -> float:
    rest = residual(weight, A, B, 1.0)
    return float((rest - nf4(rest)).norm())


def loftq(weight: Tensor, rank: int, iterations: int) -> float:
    """Return LoftQ's result: quantise, decompose the error, and repeat; the decomposition is last."""
    product = torch.zeros_like(weight)
    for _ in range(iterations):
        quantised = nf4(weight - product)
        A, B = principal(weight - quantised, rank, 1.0, generator=generator())
        product = B @ A
    return float((weight - quantised - product).norm())


@pytest.mark.parametrize("rank", [4, 8, 16])
def test_quantised_start_loses_less_than_loftq_and_never_more_with_more_rounds(rank: int) -> None:
    weight = noisy()
    errors = [
        quantisation_error(weight, *quantized_principal(weight, rank, 1.0, generator(), rounds))
        for rounds in range(1, 7)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.95 * float((weight - nf4(weight)).norm()) and errors[4] < 0.97 * errors[0]
    assert errors[0] <= loftq(weight, rank, 1) and errors[4] <= loftq(weight, rank, 5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora_on_a_quantised_base_starts_at_nf4_of_the_weights_and_loses_more_than_pissa(kind: str, tmp_path) -> None:
    model, stock, principal_start = tiny_lm(kind), tiny_lm(kind), tiny_lm(kind)
    vismt.adapt(model, "lora", rank=8, quantize="nf4")
    vismt.adapt(principal_start, "pissa", rank=8, quantize="nf4")
    start, better = (vismt.merge(copy.deepcopy(adapted)) for adapted in (model, principal_start))
    for path, host in adapter_layers(model).items():
        weight = stock.get_submodule(path).weight
        wanted = nf4(host.matrix(weight).detach().contiguous())
        assert torch.equal(host.matrix(start.get_submodule(path).weight), wanted)
        assert relative(better.get_submodule(path).weight, weight) < 0.9 * relative(
            start.get_submodule(path).weight, weight
        )
    shake(model)
    answers = model(tokens()).logits
    vismt.save_adapter(model, tmp_path)
    assert torch.equal(vismt.load_adapter(tiny_lm(kind), tmp_path)(tokens()).logits, answers)
    with pytest.raises(UserError, match="quantised weights"):
        vismt.export_peft(model, tmp_path / "peft")
    assert holds(vismt.unadapt(model), stock.state_dict())


def test_the_best_round_is_kept(monkeypatch) -> None:
    import vismt.llm.pissa.method as module

    weight, rounds = noisy(), []

    def worse_each_time(matrix: Tensor, grid: str) -> Tensor:
        rounds.append(matrix)
        return nf4(matrix) + 0.01 * len(rounds)

    monkeypatch.setattr(module, "on_grid", worse_each_time)
    A, B = quantized_principal(weight, 4, 1.0, generator(), 4)
    first = principal(weight, 4, 1.0, generator=generator())
    assert len(rounds) == 4 and torch.equal(A, first[0]) and torch.equal(B, first[1])


@pytest.mark.parametrize("kind,options", [("llama", {}), ("gpt2", {"alpha": 12}), ("vit", {"split_qkv": True})])
def test_quantised_base_under_its_update_is_nearer_to_the_weights(kind: str, options: dict, tmp_path) -> None:
    make = tiny_vit if kind == "vit" else lambda: tiny_lm(kind)
    model, plain, stock = make(), make(), make()
    vismt.adapt(model, "pissa", rank=8, quantize="nf4", **options)
    start = vismt.merge(copy.deepcopy(model))
    for path, host in adapter_layers(model).items():
        weight = stock.get_submodule(path).weight.detach()
        matrix = host.matrix(weight)
        assert host.lora_A0 is None
        # Representable in 4 bits.
        assert torch.equal(nf4(host.matrix(host.quantized).contiguous()), host.matrix(host.quantized))
        assert torch.equal(host.weight, weight) and not torch.equal(host.quantized, weight)
        merged_matrix = host.matrix(start.get_submodule(path).weight)
        assert relative(merged_matrix, matrix) < 0.9 * relative(nf4(matrix.contiguous()), matrix)
    x = images() if kind == "vit" else tokens()
    shake(model)
    wanted = answer(model, x)
    vismt.save_adapter(model, tmp_path)
    assert torch.equal(answer(model, x), wanted)  # saving reads the original weights
    # On the original weights, which are quantised to the same values again.
    again = vismt.load_adapter(make(), tmp_path)
    assert torch.equal(answer(again, x), wanted)
    assert torch.equal(answer(vismt.load_adapter(plain, tmp_path), x), wanted)
    vismt.adapt(other := make(), "pissa", rank=8, quantize="nf4", seed=5, solver="randomized", **options)
    # Into a model that was adapted in the same way.
    assert torch.equal(answer(vismt.load_adapter(other, tmp_path), x), wanted)
    for restored in (vismt.unadapt(model), vismt.unadapt(again)):
        assert holds(restored, stock.state_dict())
        assert all(parameter.requires_grad for parameter in restored.parameters())
    merged = vismt.merge(plain)
    assert (answer(merged, x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert [type(module) for module in merged.modules()] == [type(module) for module in stock.modules()]


def answer(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, Tensor) else out.logits


def quantized_vit(**options: object) -> nn.Module:
    model = tiny_vit()
    vismt.adapt(model, "pissa", ["attn.qkv", "patch_embed.proj"], rank=4, quantize="nf4", **options)
    return shake(model)


def test_models_on_quantised_weights_are_copied_cast_and_trained_like_others() -> None:
    model, x = quantized_vit(split_qkv=True, also_train=["head"]), images()
    wanted, before = answer(model, x), snapshot(tiny_vit())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(answer(copied, x), wanted)
        shake(copied)
        assert holds(vismt.unadapt(copied), before)
    fresh = quantized_vit(split_qkv=True, also_train=["head"], seed=3)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()), strict=True)
    assert torch.equal(answer(fresh, x), wanted)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"lora_A", "lora_B", "weight", "bias"}
    assert {name for name in trained if "lora_" not in name} == {"head.weight", "head.bias"}
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_is_the_function_that_its_file_gives_on_the_cast_weights(dtype: torch.dtype, tmp_path) -> None:
    model, x = quantized_vit().to(dtype), images().to(dtype)
    wanted = answer(model, x)
    vismt.save_adapter(model, tmp_path)
    assert torch.equal(answer(model, x), wanted)
    assert torch.equal(answer(vismt.load_adapter(tiny_vit().to(dtype), tmp_path).to(dtype), x), wanted)
    assert holds(vismt.unadapt(model), tiny_vit().to(dtype).state_dict())


def test_the_stock_weight_stays_and_a_cast_on_the_shelf_quantises_it_again() -> None:
    model, x = quantized_vit(), images()
    weight = model.blocks[0].attn.qkv.weight
    assert torch.equal(weight, tiny_vit().blocks[0].attn.qkv.weight)
    active = copy.deepcopy(model).bfloat16()
    vismt.activate(vismt.activate(model, None).bfloat16(), "default")
    assert model.blocks[0].attn.qkv.weight is weight
    assert torch.equal(answer(model, x.bfloat16()), answer(active, x.bfloat16()))


def test_updates_of_quantised_weights_are_merged_and_not_exported(tmp_path) -> None:
    model = quantized_vit()
    folder = vismt.save_adapter(model, tmp_path / "own")
    reads = (
        lambda: vismt.export_peft(model, tmp_path / "peft"),
        lambda: read_updates(model),
        lambda: read_updates(folder),
        lambda: combine([folder, folder], [0.5, 0.5]),
        lambda: adapter_layers(model)["blocks.0.attn.qkv"].low_rank(),
    )
    for read in reads:
        with pytest.raises(UserError, match=r"on quantised weights.*; merge the model and save it whole"):
            read()
    assert not (tmp_path / "peft").exists()
    assert len(attention_heads(model)) == 2  # an attack on the logits of attention scales Q as it would scale W
    with pytest.raises(UserError, match="expert 'a': 'pissa' lies on quantised weights"):
        check_experts([Expert("a", folder)])
    with pytest.raises(UserError, match="was made for"):  # the base is recognised by W itself
        vismt.load_adapter(shake(tiny_vit(), 0.5), folder)


def test_a_model_without_values_is_not_quantised() -> None:
    model = tiny_vit().to("meta")
    with pytest.raises(UserError, match=r"adapt\.quantize: the model lies on the meta device"):
        vismt.adapt(model, "pissa", rank=2, quantize="nf4")
    assert not adapter_layers(model)


def test_files_of_quantised_weights_are_read_strictly(tmp_path) -> None:
    vismt.save_adapter(quantized_vit(), tmp_path)
    said = json.loads((tmp_path / "adapter.json").read_text())
    assert all(site["grid"] == "nf4" for site in said["sites"])
    for site in said["sites"]:
        site["grid"] = "nf3"
    (tmp_path / "adapter.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"not what vismt\.save_adapter writes"):
        vismt.load_adapter(tiny_vit(), tmp_path)
    for site in said["sites"]:
        del site["grid"]
    write_description(tmp_path, said)
    with pytest.raises(UserError, match=r"unexpected .*start_A"):
        vismt.load_adapter(tiny_vit(), tmp_path)


@pytest.mark.parametrize(
    "options,words",
    [
        ({"quantize": "nf5"}, "no grid 'nf5'.*'nf4'"),
        ({"quantize": "nf4", "iterations": 0}, "iterations: 0"),
        ({"grid": "nf4"}, "has no option 'grid'"),
        ({"dropout": 0.1}, "dropout: 0.1 with 'pissa'"),
        ({"solver": "svd"}, "no solver 'svd'"),
        ({"rank": 33}, "33 for .* is larger than 32"),
    ],
)
def test_mistakes_change_nothing(options: dict, words: str) -> None:
    model = tiny_vit()
    before = snapshot(model)
    with pytest.raises(UserError, match=words):
        vismt.adapt(model, "pissa", **options)
    assert list(model.state_dict()) == list(before)


def test_a_broken_weight_is_named_and_the_model_left_as_it_was() -> None:
    for solver in ("exact", "randomized"):
        model = tiny_vit()
        model.blocks[1].mlp.fc1.weight.data[0, 0] = float("nan")
        with pytest.raises(UserError, match=r"'blocks.1.mlp.fc1' gets no finite start values"):
            vismt.adapt(model, "pissa", rank=2, solver=solver)
        assert list(model.state_dict()) == list(tiny_vit().state_dict()) and not hasattr(model, "vismt_record")
