"""What every registered method promises, on a tiny ViT. A new method is covered by being registered."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator

import pytest
import torch
from helpers.tiny import images, shake, snapshot, tiny_vit
from torch import nn

import vismt
from vismt.llm import collect_covariance, instance_gates
from vismt.llm.s2ft.layer import SliceLinear
from vismt.lowrank.layers.base import AdapterLayer, adapter_layers
from vismt.methods import METHODS as DECLARED

# Methods without an update of their own (lisa) train the weights; what they promise is tested in tests/llm.
METHODS = [name for name, method in DECLARED.items() if method.exports]
LAYERS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "patch_embed.proj"]
# What a method needs on the tiny ViT to start at the original function, and its trainable parameters beside pairs of
# factors on the ViT-S of the meta test (a router: 12 x 16 x 384; a core for each of q, k, v, proj, fc1, fc2; a gate).
OWN = {
    "emtal": {"n_experts": 4, "init": "zero"},
    "s2ft": {"ratio": 0.25},
    "ilora": {"n_experts": 2, "gate": None},
    "corda": {"mode": "kpm", "covariances": collect_covariance(tiny_vit(), [images()], LAYERS)},
}
BESIDE = {"emtal": 12 * 16 * 384, "ilora": 64 * 4 + 4, "polar": 12 * 6 * 8 * 8}
FACTORS = (".lora_", ".slice_")  # how what a method trains is named
# Variants that change the layout of the factors; every method has to keep the contract in each.
VARIANTS = {
    "plain": {},
    "alpha": {"alpha": 12.0},
    "rslora": {"alpha": 3.0, "rslora": True},
    "split_qkv": {"split_qkv": True},
    "with_head": {"also_train": ["head"]},
    "conv": {"targets": ["attn.qkv", "patch_embed.proj"]},
}
# A method that trains no factors has layouts of its own.
SLICES = {
    "permute": {},
    "index": {"mode": "index"},
    "delta": {"mode": "delta"},
    "every_part": {"parts": ["v", "o", "u", "d"]},
    "rows_by_index": {"parts": ["v", "u"], "mode": "index"},
    "rows_by_delta": {"parts": ["v", "u"], "mode": "delta"},
    "slices_with_head": {"also_train": ["head"]},
}
VARIANTS_OF = {name: list(SLICES) for name in METHODS if SliceLinear in DECLARED[name].layers}
CASES = [(method, variant) for method in METHODS for variant in VARIANTS_OF.get(method, list(VARIANTS))]
# What tracing can tell apart, which is slow: every layer as it is, and everything at once.
VARIANTS |= SLICES | {
    "together": {**VARIANTS["rslora"], **VARIANTS["split_qkv"], **VARIANTS["with_head"], **VARIANTS["conv"]}
}
GRAPHS = [(method, variant) for method in METHODS for variant in VARIANTS_OF.get(method, ["plain", "together"])]
FACTOR_METHODS = [method for method in METHODS if method not in VARIANTS_OF]


@pytest.fixture(autouse=True)
def gates() -> Iterator[None]:
    """One user's gates, which a method with gates needs in every call; the others do not look at them."""
    with instance_gates(torch.tensor([0.3, 0.7])):
        yield


def adapted(method: str, variant: str, seed: int = 0, depth: int = 2, **more: object) -> nn.Module:
    model = tiny_vit(depth=depth)
    vismt.adapt(model, method, rank=2, seed=seed, **{**OWN.get(method, {}), **VARIANTS[variant], **more})
    return model


def faded(model: nn.Module) -> nn.Module:
    """The model at the end of a method's schedule, where there is one: what merges and exports."""
    for module in model.modules():
        if hasattr(module, "fade"):
            module.fade = 1.0
    return model


@pytest.mark.parametrize("method,variant", CASES)
def test_start_is_the_original_function(method: str, variant: str) -> None:
    x = images()
    assert torch.allclose(faded(adapted(method, variant))(x), tiny_vit()(x), atol=5e-6)


@pytest.mark.parametrize("method,variant", CASES)
def test_gradient_reaches_exactly_the_declared_parameters(method: str, variant: str) -> None:
    model = shake(adapted(method, variant))
    model(images()).square().sum().backward()
    also = set(model.vismt_record.also_train)
    for name, parameter in model.named_parameters():
        expected = any(kind in name for kind in FACTORS) or name in also
        assert parameter.requires_grad == expected, name
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == expected, name


@pytest.mark.parametrize("method,variant", CASES)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_merge_is_the_same_function_in_stock_classes(
    method: str, variant: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = tiny_vit().to(dtype)
    vismt.adapt(model, method, rank=2, **OWN.get(method, {}), **VARIANTS[variant])
    faded(shake(model))
    x = images().to(dtype)
    before = model(x)
    vismt.merge(model)
    assert (model(x) - before).abs().max() <= tolerance * before.abs().max()
    fresh = tiny_vit().to(dtype)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert [type(m) for m in fresh.modules()] == [type(m) for m in model.modules()]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method,variant", CASES)
def test_unadapt_gives_back_every_bit(method: str, variant: str) -> None:
    original = snapshot(tiny_vit())
    model = shake(adapted(method, variant))
    assert not torch.equal(model(images()), tiny_vit()(images()))
    vismt.unadapt(model)
    state = model.state_dict()
    assert list(state) == list(original)
    assert all(torch.equal(state[name], original[name]) for name in original)
    assert not any(isinstance(module, AdapterLayer) for module in model.modules())


@pytest.mark.parametrize("method,variant", CASES)
def test_save_and_load_give_the_same_outputs(method: str, variant: str, tmp_path) -> None:
    model = shake(adapted(method, variant))
    vismt.save_adapter(model, tmp_path / "adapter")
    stock = tiny_vit()
    vismt.load_adapter(stock, tmp_path / "adapter")
    assert torch.equal(stock(images()), model(images()))
    again = adapted(method, variant, seed=5)
    vismt.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(images()), model(images()))


@pytest.mark.parametrize("method,variant", CASES)
def test_peft_reads_the_export(method: str, variant: str, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    model = faded(shake(adapted(method, variant)))
    for compact in (False, True):
        vismt.export_peft(model, tmp_path / "peft", compact=compact)
        theirs = peft.PeftModel.from_pretrained(tiny_vit(), str(tmp_path / "peft")).eval()
        assert torch.allclose(theirs(images()), model(images()), atol=1e-5)
        ours = vismt.import_peft(tiny_vit(), tmp_path / "peft")
        assert torch.allclose(ours(images()), model(images()), atol=1e-5)


@pytest.mark.parametrize("method,variant", CASES)
def test_copies_pickles_and_conversions(method: str, variant: str) -> None:
    model = shake(adapted(method, variant))
    expected = model(images())
    assert torch.equal(copy.deepcopy(model)(images()), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images()), expected)
    clone = copy.deepcopy(model)
    shake(clone)
    assert torch.equal(model(images()), expected)
    double = copy.deepcopy(model).to(torch.float64)
    assert torch.allclose(double(images().double()).float(), expected, atol=1e-5)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert torch.isfinite(half(images().to(torch.bfloat16))).all()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = adapted(method, variant, seed=7)
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert torch.equal(fresh(images()), expected)


@pytest.mark.slow
@pytest.mark.parametrize("method,variant", GRAPHS)
def test_one_graph_without_branches(method: str, variant: str) -> None:
    torch.compiler.reset()
    model = shake(adapted(method, variant, depth=1))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(images()), model(images()), atol=1e-5)
    compiled(images()).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method,variant", CASES)
def test_autocast_computes_in_bf16_and_trains_in_fp32(method: str, variant: str) -> None:
    model = shake(adapted(method, variant))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images())
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), model(images()), atol=0.1 * float(model(images()).detach().abs().max()))
    out.float().square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("method,variant", [case for case in CASES if case[1] in ("split_qkv", *SLICES)])
def test_gradient_checkpointing_gives_the_same_gradients(method: str, variant: str) -> None:
    plain, saving = (shake(adapted(method, variant)) for _ in range(2))
    saving.set_grad_checkpointing(True)
    for model in (plain, saving):
        model.train()
        model(images()).square().sum().backward()
    for (name, parameter), twin in zip(plain.named_parameters(), saving.parameters()):
        assert parameter.grad is None or torch.allclose(parameter.grad, twin.grad, atol=1e-6), name


@pytest.mark.parametrize("method", FACTOR_METHODS)
def test_start_depends_on_the_seed_alone(method: str) -> None:
    torch.manual_seed(11)
    first = adapted(method, "plain", seed=3)
    state = torch.get_rng_state()
    torch.manual_seed(12)
    second = adapted(method, "plain", seed=3)
    fewer = tiny_vit()
    vismt.adapt(fewer, method, targets=["mlp.fc2"], rank=2, seed=3, **OWN.get(method, {}))
    assert torch.equal(first.blocks[1].mlp.fc2.lora_A, second.blocks[1].mlp.fc2.lora_A)
    assert torch.equal(first.blocks[1].mlp.fc2.lora_A, fewer.blocks[1].mlp.fc2.lora_A)
    torch.manual_seed(11)
    tiny_vit()
    before = torch.get_rng_state()
    model = tiny_vit()
    state_before = torch.get_rng_state()
    vismt.adapt(model, method, rank=2, **OWN.get(method, {}))
    assert torch.equal(torch.get_rng_state(), state_before) and before is not None and state is not None


@pytest.mark.parametrize("method", FACTOR_METHODS)
def test_meta_device_counts_parameters_without_memory(method: str) -> None:
    with torch.device("meta"):
        import timm

        model = timm.create_model("vit_small_patch16_224", num_classes=0)
    report = vismt.adapt(model, method, rank=8, split_qkv=True)
    # Per block and d = 384: q, k, v 3 (r d + r d) = 6 r d; proj 2 r d; fc1 r d + 4 r d = 5 r d; fc2 5 r d: 18 r d; 12 blocks.
    assert report.trainable - BESIDE.get(method, 0) == 216 * 8 * 384 == 663_552
    assert all(layer.lora_A.is_meta for layer in adapter_layers(model).values())
