"""Experts in one tensor and the weights that nn.MultiheadAttention reads: the same contract as that of linears."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.readers import EXPERTS, LMS, TARGETS, reader, run
from helpers.tiny import holds, shake, snapshot
from torch import Tensor, nn

import vismt
from vismt.base.errors import UserError
from vismt.lowrank import fill_starts
from vismt.lowrank.layers.base import adapter_layers
from vismt.lowrank.layers.parameter_modules import ParameterModule

KINDS = list(TARGETS)
METHODS = ("lora", "pissa", "polar", "amt")
FUSED = pytest.mark.parametrize("need_grad", [False, True], ids=["no_grad", "grad"])


def adapted(kind: str, method: str = "lora", **options: object) -> nn.Module:
    model = reader(kind)
    vismt.adapt(model, method, TARGETS[kind], rank=2, **options)
    return model


def hooks(model: nn.Module) -> int:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_load_state_dict_pre_hooks")
    return sum(len(getattr(module, table)) for module in model.modules() for table in tables)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind: str, method: str, tmp_path) -> None:
    stock, expected = snapshot(reader(kind)), run(reader(kind), kind)
    parameters = [name for name, _ in reader(kind).named_parameters()]
    model = adapted(kind, method)
    assert torch.allclose(run(model, kind), expected, atol=1e-5)
    shake(model, 0.1)
    moved = run(model, kind)
    assert (moved - expected).abs().max() > 1e-2
    moved.square().sum().backward()
    for name, parameter in model.named_parameters():
        trained = ".lora_" in name
        assert parameter.requires_grad == trained, name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trained, name
    assert torch.equal(run(copy.deepcopy(model), kind), moved)
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), kind), moved)

    vismt.save_adapter(model, tmp_path / "a")
    loaded = vismt.load_adapter(reader(kind), tmp_path / "a")
    assert torch.equal(run(loaded, kind), moved)
    again = adapted(kind, method, seed=5)
    assert torch.equal(run(vismt.load_adapter(again, tmp_path / "a"), kind), moved)

    vismt.unadapt(loaded)
    assert holds(loaded, stock) and hooks(loaded) == hooks(reader(kind))
    assert [name for name, parameter in loaded.named_parameters() if parameter.requires_grad] == parameters

    vismt.merge(model)
    assert (run(model, kind) - moved).abs().max() <= 1e-5 * moved.abs().max()
    assert list(model.state_dict()) == list(stock) and hooks(model) == hooks(reader(kind))
    assert [type(m) for m in model.modules()] == [type(m) for m in reader(kind).modules()]
    assert not any(isinstance(module, ParameterModule) for module in model.modules())


@pytest.mark.parametrize("kind", LMS)
def test_the_sum_is_that_of_each_expert(kind: str) -> None:
    model = shake(adapted(kind, alpha=6), 0.1)  # s = 6 / 2
    merged = vismt.merge(copy.deepcopy(model))
    for name in ("gate_up_proj", "down_proj"):
        layer = model.model.layers[1].mlp.experts.get_submodule(name)
        W = getattr(reader(kind).model.layers[1].mlp.experts, name)
        A, B = layer.lora_A.unflatten(0, (EXPERTS, 2)), layer.lora_B.unflatten(0, (EXPERTS, -1))
        pair = "eri,eor->eio" if kind == "gpt_oss" else "eri,eor->eoi"  # GPT-OSS stores (e, i, o)
        expected = W + 3 * torch.einsum(pair, A, B)
        assert layer.lora_A.shape[1] == model.config.hidden_size or name == "down_proj"
        assert torch.allclose(layer.adapted_weight(), expected, atol=1e-6)
        assert torch.allclose(getattr(merged.model.layers[1].mlp.experts, name), expected, atol=1e-6)


def test_a_principal_start_is_that_of_each_expert() -> None:
    layer = adapted("mixtral", "pissa").model.layers[0].mlp.experts.down_proj
    weight = reader("mixtral").model.layers[0].mlp.experts.down_proj
    start = torch.einsum(
        "eor,eri->eoi", layer.lora_B.unflatten(0, (EXPERTS, -1)), layer.lora_A.unflatten(0, (EXPERTS, 2))
    )
    for expert in range(EXPERTS):
        U, S, Vh = torch.linalg.svd(weight[expert])
        assert torch.allclose(start[expert], U[:, :2] * S[:2] @ Vh[:2], atol=1e-5)


@pytest.mark.parametrize("kind", LMS)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_the_experts_reads_the_update(kind: str, implementation: str) -> None:
    if implementation == "grouped_mm" and not hasattr(torch, "_grouped_mm"):
        pytest.skip("grouped_mm of transformers needs torch 2.9")
    model = shake(adapted(kind), 0.1)
    model.set_experts_implementation(implementation)
    merged = vismt.merge(copy.deepcopy(model))
    outputs, gradients = [], []
    for one in (model, merged):
        x = one.get_input_embeddings().weight[None, 3:9].detach().requires_grad_()
        outputs.append(one(inputs_embeds=x).logits)
        outputs[-1].square().sum().backward()
        gradients.append(x.grad)
    assert torch.allclose(*outputs, atol=1e-5) and torch.allclose(*gradients, atol=1e-4)
    assert not torch.allclose(outputs[0], reader(kind)(inputs_embeds=x).logits, atol=1e-2)


@FUSED
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("targets", [["in_proj_weight"], ["out_proj"], ["linear1"], ["linear2"], None])
def test_fused_kernels_do_not_bypass_the_update(targets: list[str] | None, padded: bool, need_grad: bool) -> None:
    model = reader("encoder")
    vismt.adapt(model, "lora", targets, rank=2)
    shake(model, 0.3)
    x, mask = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = padded
    with torch.set_grad_enabled(need_grad):
        out = model[0](x, src_key_padding_mask=mask if padded else None)
        again = vismt.merge(copy.deepcopy(model))[0](x, src_key_padding_mask=mask if padded else None)
    assert torch.allclose(out[~mask], again[~mask], atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_module_of_experts_by_itself(tmp_path) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.ones(2, 3))
            self.stack = nn.Parameter(torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0)))
            self.last = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ni,eoi->eno", x + self.first[0], self.stack) + self.last

    model, x = Experts(), torch.randn(5, 3)
    with pytest.raises(
        UserError, match=r"nothing to adapt for 'all-linear'.* Left out: 'stack': experts in one parameter"
    ):
        vismt.adapt(model, "lora", rank=2)
    with pytest.raises(UserError, match=r"adapt\.rank: 4 for 'stack' \(24 x 3\) is larger than 3"):
        vismt.adapt(model, "lora", ["stack"], rank=4)
    vismt.adapt(model, "lora", ["stack"], rank=2, also_train=["last"])
    moved = shake(model)(x)
    vismt.save_adapter(model, tmp_path / "a")
    assert torch.equal(vismt.load_adapter(Experts(), tmp_path / "a")(x), moved)
    alone = Experts()
    vismt.adapt(alone, "lora", ["stack"], rank=2)
    with pytest.raises(UserError, match="peft cannot adapt 'stack', a parameter of the model itself"):
        vismt.export_peft(alone, tmp_path / "peft")
    merged = vismt.merge(model)
    assert torch.allclose(merged(x), moved, atol=1e-5)
    assert [name for name, _ in merged.named_parameters()] == ["first", "stack", "last"]


@pytest.mark.parametrize("kind", KINDS)
def test_threads_read_sums_of_their_own(kind: str) -> None:
    model = shake(adapted(kind), 0.1)

    def ask(number: int) -> Tensor:
        # Forwards with gradients run beside forwards without.
        with torch.set_grad_enabled(number % 3 == 0):
            output = run(model, kind)
        if number % 3:
            return output
        return torch.autograd.grad(output.square().sum(), [p for p in model.parameters() if p.requires_grad])[0]

    expected = [ask(number) for number in range(3)]
    with ThreadPoolExecutor(4) as pool:
        for number, answer in enumerate(pool.map(ask, range(300))):
            assert torch.equal(answer, expected[number % 3]), number
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_error_in_the_forward_leaves_nothing_behind() -> None:
    model = shake(adapted("encoder"))
    expected = run(model, "encoder")
    with pytest.raises(AssertionError, match="embedding dimension"):
        model(torch.zeros(2, 5, 3))
    assert torch.backends.mha.get_fastpath_enabled()
    assert isinstance(model.get_submodule("0.layers.0.self_attn.in_proj_weight"), nn.Module)
    assert torch.equal(run(model, "encoder"), expected)


def test_a_reader_outside_of_the_forward_gets_the_sum() -> None:
    model = shake(adapted("encoder"), 0.3)
    attention, x = model[0].layers[0].self_attn, torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    layer = attention.in_proj_weight
    expected = x @ (layer.weight + layer.scale * layer.lora_B @ layer.lora_A).T
    assert torch.allclose(nn.functional.linear(x, attention.in_proj_weight), expected, atol=1e-6)


def test_split_qkv_gives_each_projection_its_own_pair() -> None:
    model = reader("vit")
    report = vismt.adapt(model, "lora", ["in_proj_weight"], rank=2, split_qkv=True)
    assert report.specs[0].settings.blocks == (32, 32, 32) and model.vismt_record.layers[0].kind == "parameter"
    layer = shake(model).get_submodule(report.specs[0].path)
    rows = [B @ A for A, B in zip(layer.lora_A.chunk(3), layer.lora_B.chunk(3))]
    assert torch.allclose(layer.adapted_weight(), layer.weight + torch.cat(rows), atol=1e-6)


@pytest.mark.parametrize("kind", ["mixtral", "vit"])
def test_named_adapters(kind: str) -> None:
    expected, stock = run(reader(kind), kind), snapshot(reader(kind))
    model, outputs = reader(kind), {}
    for name, targets in (("a", TARGETS[kind][:1]), ("b", TARGETS[kind][1:2])):
        vismt.adapt(model, "lora", targets, rank=2, name=name)
        outputs[name] = run(shake(model, 0.2), kind)
    for name in ("a", "b", "a"):
        assert torch.equal(run(vismt.activate(model, name), kind), outputs[name])
    with vismt.disabled(model):
        # Without gradients torch takes its fused attention.
        assert torch.allclose(run(model, kind), expected, atol=1e-5)
    assert torch.equal(run(model, kind), outputs["a"])
    vismt.unadapt(model)
    assert list(model.state_dict()) == list(stock) and hooks(model) == hooks(reader(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_meta_device_takes_stock_keys(kind: str) -> None:
    expected = shake(adapted(kind))
    with torch.device("meta"):
        model = reader(kind)
    vismt.adapt(model, "lora", TARGETS[kind], rank=2)
    model.to_empty(device="cpu")
    stock = reader(kind)
    missing, unexpected = model.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected and all(".lora_" in name for name in missing)
    model.load_state_dict({**dict(stock.named_buffers())}, strict=False)
    for name, buffer in stock.named_buffers():  # not all are in a state dict
        model.get_buffer(name).copy_(buffer)
    assert torch.equal(run(shake(fill_starts(model)), kind), run(expected, kind))


@pytest.mark.parametrize("kind", ["mixtral", "encoder"])
@pytest.mark.parametrize(
    "method,options",
    [
        ("lora", {"dropout": 0.1}),
        ("ilora", {"n_experts": 2}),
        ("pissa", {"quantize": "nf4"}),
        ("peft:dora", {}),
        ("corda", {"covariances": {}}),
    ],
)
def test_other_methods_refuse_by_name_and_leave_out_of_all_linear(method: str, options: dict, kind: str) -> None:
    model, stock = reader(kind), snapshot(reader(kind))
    named = TARGETS[kind][0]
    with pytest.raises(UserError, match=rf"{named}'.* reads.*only plain factors can be added to it, without dropout"):
        vismt.adapt(model, method, [named], rank=2, **options)
    if method != "corda":
        report = vismt.adapt(model, method, rank=2, **options)
        assert not any(
            "in_proj" in spec.path or "out_proj" in spec.path or "experts" in spec.path for spec in report.specs
        )
        assert any("reads its weight" in text or "experts in one parameter" in text for text in report.skipped)
        vismt.unadapt(model)
    assert list(model.state_dict()) == list(stock) and hooks(model) == hooks(reader(kind))


def test_an_expert_parameter_is_trained_whole_or_adapted() -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(UserError, match=f"'{name}' is adapted"):
        vismt.adapt(reader("mixtral"), "lora", [name], rank=2, also_train=[name])
    model = reader("mixtral")
    vismt.adapt(model, "lora", ["experts.down_proj"], rank=2, also_train=[name])
    shake(model)
    assert not torch.equal(model.get_parameter(name), reader("mixtral").get_parameter(name))
    vismt.unadapt(model)
    assert torch.equal(model.get_parameter(name), reader("mixtral").get_parameter(name))


def test_frozen_parameters_stay_frozen_after_undoing() -> None:
    model = reader("mixtral").requires_grad_(False)
    vismt.adapt(model, "lora", TARGETS["mixtral"], rank=2)
    vismt.unadapt(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt_oss", "vit"])
def test_one_graph_without_branches(kind: str) -> None:
    torch.compiler.reset()
    model = shake(adapted(kind))
    if kind in LMS:
        model.set_experts_implementation("batched_mm")

    def function(x: Tensor) -> Tensor:
        return model(inputs_embeds=x).logits if kind in LMS else model(x)

    x = torch.randn(2, 5, 32) if kind in LMS else torch.rand(2, 3, 16, 16)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), function(x), atol=1e-5)
    compiled(x).sum().backward()
    assert all(layer.lora_B.grad is not None for layer in adapter_layers(model).values())


def test_autocast_and_checkpointing() -> None:
    model = shake(adapted("mixtral"))
    expected = run(model, "mixtral")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = run(model, "mixtral")
    assert torch.allclose(half.float(), expected, atol=0.05 * float(expected.detach().abs().max()))
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable()
    run(model, "mixtral").square().sum().backward()
    for name, gradient in gradients.items():
        assert torch.allclose(model.get_parameter(name).grad, gradient, atol=1e-4), name
