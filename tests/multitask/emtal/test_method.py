"""MoEfied LoRA: reference loop over experts, labels of the units, merging, files and errors."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from helpers.adapter_folders import described, edit_text, write_description
from helpers.tiny import holds, images, shake, snapshot, tiny_vit
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

import vismt
from scripts.bench.accounting import saved_activation_bytes
from vismt import UserError
from vismt.multitask.emtal.fading import FadeConfig, FadeState, RouterFade
from vismt.multitask.emtal.ffn import RouterSettings
from vismt.multitask.emtal.method import MoEfiedMlp, schedule, set_fade
from vismt.multitask.emtal.routing import expert_weights, gate


def ffn(
    width: int = 6, hidden: int = 24, experts: int = 3, act: type[nn.Module] = nn.GELU, **options: object
) -> MoEfiedMlp:
    """Return a small fp64 FFN with a router that is far from uniform, and experts of units that do not follow each other."""
    torch.manual_seed(0)
    module = MoEfiedMlp(Mlp(width, hidden, act_layer=act).double(), 2, experts, **{"temperature": 2.0, **options})
    module.assign(torch.arange(hidden) % experts)
    return shake(module, 0.5)


def tokens(width: int = 6) -> Tensor:
    return torch.randn(2, 5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def adapted(seed: int = 0, **options: object) -> nn.Module:
    model = tiny_vit()
    vismt.adapt(model, "emtal", seed=seed, **{"rank": 2, "n_experts": 4, **options})
    return shake(model, 0.1)


def by_hand(module: MoEfiedMlp, x: Tensor, after: bool = False, contiguous: bool = False) -> Tensor:
    """Compute equation 9 as a sum over the experts' FFNs.

    after: gate after the activation. contiguous: unit h belongs to expert h // (H / K), whatever its label is.
    """
    fc1, fc2, experts = module.fc1, module.fc2, module.n_experts
    size = fc1.out_features // experts
    shares = torch.exp(x @ module.lora_router.weight.T / module.temperature)
    shares = shares / shares.sum(-1, keepdim=True)
    up, down = fc1.weight + fc1.lora_B @ fc1.lora_A, fc2.weight + fc2.lora_B @ fc2.lora_A
    y = fc2.bias.expand(*x.shape[:-1], -1)
    for i in range(experts):
        units = torch.arange(i * size, (i + 1) * size) if contiguous else (module.labels == i).nonzero()[:, 0]
        omega = ((1 - module.fade_value) * experts * shares[..., i] + module.fade_value)[..., None]
        u = x @ up[units].T + fc1.bias[units]
        v = module.act(u) * omega if after else module.act(u * omega)
        y = y + v @ down[:, units].T
    return y


# ---- the forward


@pytest.mark.parametrize("fade", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("act", [nn.GELU, nn.ReLU])
def test_forward_and_gradients_are_the_loop_over_experts(fade: float, act: type[nn.Module]) -> None:
    module, x = ffn(act=act), tokens().requires_grad_()
    module.fade = fade
    parameters = [x, *(p for p in module.parameters() if p.requires_grad)]
    assert len(parameters) == 6
    pull = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    ours, theirs = module(x), by_hand(module, x)
    assert (ours - theirs).abs().max() < 1e-13
    expected = torch.autograd.grad(theirs, parameters, pull, allow_unused=True)
    for gradient, reference in zip(torch.autograd.grad(ours, parameters, pull), expected):
        assert (gradient - (torch.zeros_like(gradient) if reference is None else reference)).abs().max() < 1e-12


def test_gating_after_the_activation_or_by_place_is_another_function() -> None:
    module, x = ffn(), tokens()
    assert (module(x) - by_hand(module, x, after=True)).abs().max() > 1e-2
    assert (module(x) - by_hand(module, x, contiguous=True)).abs().max() > 1e-2


@pytest.mark.parametrize("fade", [0.0, 0.3, 0.9])
def test_the_gate_has_the_derivatives_of_its_formula(fade: float) -> None:
    generator = torch.Generator().manual_seed(0)
    units, logits = (torch.randn(2, 3, n, dtype=torch.float64, generator=generator).requires_grad_() for n in (6, 3))
    labels = torch.tensor([2, 0, 1, 1, 2, 0])
    assert torch.autograd.gradcheck(lambda u, z: gate(u, z, labels, fade), (units, logits))
    assert torch.autograd.gradgradcheck(lambda u, z: gate(u, z, labels, fade), (units, logits))


def test_a_saturated_router_has_finite_gradients() -> None:
    units = torch.ones(2, 6, requires_grad=True)
    logits = torch.tensor([[0.0, 400.0, -400.0], [1e4, 0.0, 0.0]], requires_grad=True)
    gate(units, logits, torch.tensor([0, 1, 1, 2, 0, 2]), 0.0).square().sum().backward()
    assert torch.isfinite(units.grad).all() and torch.isfinite(logits.grad).all()
    assert torch.equal(units.grad[0], torch.tensor([0.0, 18, 18, 0, 0, 0]))  # d (3 u)^2 / du at u = 1


@pytest.mark.parametrize("experts", [1, 3, 8])
@pytest.mark.parametrize("fade", [0.0, 0.37, 1.0])
def test_weights_have_mean_one_and_are_exactly_one_when_faded(experts: int, fade: float) -> None:
    module, x = ffn(experts=experts), tokens()
    module.fade = fade
    omega = module.omega(x)
    assert omega.shape == (2, 5, experts) and torch.allclose(omega.mean(-1), torch.ones(2, 5).double(), atol=1e-12)
    assert (omega == 1).all() == (fade == 1 or experts == 1)
    assert (expert_weights(100 * torch.randn(9, 7), 1.0) == 1).all()


def test_each_token_is_routed_for_itself_by_the_input_of_the_ffn() -> None:
    model, captured = adapted(), {}
    mlp = model.blocks[1].mlp
    model.blocks[1].norm2.register_forward_hook(lambda _, inputs, output: captured.update(norm=output))
    mlp.register_forward_pre_hook(lambda _, inputs: captured.update(mlp=inputs[0]))
    model(images())
    assert captured["mlp"] is captured["norm"]
    omega = mlp.omega(captured["mlp"])
    assert omega.shape == (3, 17, 4) and omega.std(1).min() > 0  # 16 patches and the class token, each with its own


def test_the_routers_gradient_shrinks_with_the_fade_and_is_zero_not_none_at_one() -> None:
    module, x = (
        ffn(act=nn.Identity),
        tokens(),
    )  # without an activation the FFN is linear behind the router, so the factors are exact
    grads = {}
    for fade in (0.0, 0.5, 0.9, 1.0):
        module.zero_grad()
        module.fade = fade
        module(x).sum().backward()
        grads[fade] = module.lora_router.weight.grad.clone()
    assert grads[0.0].abs().max() > 1e-2 and torch.equal(grads[1.0], torch.zeros(3, 6).double())
    for fade in (0.5, 0.9):
        assert torch.allclose(grads[fade], (1 - fade) * grads[0.0], rtol=1e-10)


def test_backward_keeps_no_tensor_of_the_hidden_width_for_the_router() -> None:
    torch.manual_seed(0)
    module, x = MoEfiedMlp(Mlp(16, 64), 2, 4), torch.randn(8, 50, 16)
    routed = saved_activation_bytes(module, lambda: module(x))
    module.fade = 1.0
    faded = saved_activation_bytes(module, lambda: module(x))
    # Logits (b, n, e) in fp32; a plain product saves (b, n, H).
    assert routed - faded <= 4 * 8 * 50 * 4 < 4 * 8 * 50 * 64


# ---- the start


def test_zero_init_is_the_pretrained_function_once_faded_and_normal_is_not() -> None:
    x = images()
    for init, same in (("zero", True), ("normal", False)):
        model = tiny_vit()
        vismt.adapt(model, "emtal", rank=2, n_experts=4, init=init, cluster=False, fade=1.0)
        assert torch.equal(model(x), tiny_vit()(x)) == same
    std = torch.cat([p.flatten() for name, p in model.named_parameters() if name.endswith(("lora_A", "lora_B"))]).std()
    assert 0.018 < std < 0.022
    routers = [block.mlp.lora_router.weight for block in model.blocks]
    assert not torch.equal(*routers) and all(router.std() < 0.03 and router.abs().max() > 0.02 for router in routers)


def test_a_uniform_router_is_plain_lora_at_every_fade() -> None:
    module, x = ffn(), tokens()
    module.fade = 1.0
    plain = module(x)
    nn.init.zeros_(module.lora_router.weight)
    for fade in (0.0, 0.4):
        module.fade = fade
        assert torch.allclose(module(x), plain, atol=1e-12)


def test_one_ffn_alone_draws_from_its_seed_and_freezes_its_weights() -> None:
    mlp = Mlp(6, 24)
    state = torch.get_rng_state()
    first, same, other = (MoEfiedMlp(copy.deepcopy(mlp), 2, 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in first.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    assert not torch.equal(first.fc1.lora_B, other.fc1.lora_B) and not torch.equal(
        first.lora_router.weight, other.lora_router.weight
    )
    trained = {name for name, p in first.named_parameters() if p.requires_grad}
    assert trained == {"fc1.lora_A", "fc1.lora_B", "fc2.lora_A", "fc2.lora_B", "lora_router.weight"}


COUNTS = [  # L (16 D r + D K) + C (D + 1)
    ("vit_base_patch16_224", 598, 1, 754_774),
    ("vit_base_patch16_224", 598, 2, 902_230),
    ("vit_base_patch16_224", 598, 4, 1_197_142),
    ("vit_base_patch16_224", 62, 1, 342_590),
    ("vit_base_patch16_224", 62, 2, 490_046),
    ("vit_base_patch16_224", 62, 4, 784_958),
    ("vit_large_patch14_dinov2", 62, 4, 2_029_630),
]


@pytest.mark.parametrize("name,classes,rank,expected", COUNTS)
def test_published_parameter_counts(name: str, classes: int, rank: int, expected: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=classes)
    report = vismt.adapt(model, "emtal", rank=rank, also_train=["head"])
    assert report.trainable == expected == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "router" in str(report) and f"{expected:,}" in str(report)


@pytest.mark.parametrize("experts,expected", [(1, 1_058_902), (4, 1_086_550), (64, 1_639_510), (192, 2_819_158)])
def test_published_parameter_counts_by_number_of_experts(experts: int, expected: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=598)
    assert vismt.adapt(model, "emtal", rank=4, n_experts=experts, also_train=["head"]).trainable == expected


# ---- training


def test_training_moves_the_router_and_leaves_the_rest() -> None:
    model = tiny_vit()
    vismt.adapt(model, "emtal", rank=2, n_experts=4, also_train=["head"])
    before, fade = snapshot(model), RouterFade(8, end=0.75)
    set_fade(model, fade)
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=1e-2)
    for step in range(8):
        optimizer.zero_grad()
        F.cross_entropy(model(images(5, seed=step)), torch.arange(5)).backward()
        assert all(p.grad is not None for p in chosen)
        optimizer.step()
        fade.step()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trained and not name.endswith("_extra_state")), name
    logits = model(images())
    assert (vismt.merge(model)(images()) - logits).abs().max() <= 1e-5 * logits.abs().max()


def test_one_fade_state_drives_every_router_and_is_a_child_of_none() -> None:
    model, state = adapted(), FadeState(0.0)
    keys = list(model.state_dict())
    set_fade(model, state)
    assert list(model.state_dict()) == keys and not any(module is state for module in model.modules())
    routed = model(images())
    twin = copy.deepcopy(model)
    state.value = 0.6
    assert [block.mlp.fade_value for block in model.blocks] == [0.6, 0.6]
    assert not torch.equal(model(images()), routed) and torch.equal(twin(images()), routed)
    assert twin.blocks[0].mlp.fade is twin.blocks[1].mlp.fade


def test_the_schedule_of_the_method_moves_every_router_and_is_logged() -> None:
    model = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert schedule(model, optimizer, steps=4, settings=None) is None
    assert schedule(model, optimizer, steps=0, settings=FadeConfig()) is None  # evaluated as the method starts it
    fade = schedule(model, optimizer, steps=4, settings=FadeConfig(0.0, 1.0))
    for step, value in ((0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0)):
        fade.on_step(step)
        assert [block.mlp.fade_value for block in model.blocks] == [value, value]
        assert {name: float(metric) for name, metric in fade.metrics().items()} == {"fade": value}
    fade.on_step(1)  # as after a restart
    assert fade.taken == 1 and fade.step() == 0.5
    with pytest.raises(UserError, match="0 <= start <= end <= 1"):
        FadeConfig(0.5, 0.2)


def test_the_state_dict_carries_fade_and_labels() -> None:
    model = adapted()
    set_fade(model, 0.3)
    fresh = adapted(seed=5)
    assert not torch.equal(fresh.blocks[0].mlp.labels, model.blocks[0].mlp.labels)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert fresh.blocks[1].mlp.fade == 0.3 and torch.equal(fresh(images()), model(images()))
    assert holds(vismt.unadapt(fresh), tiny_vit().state_dict())


@pytest.mark.slow
def test_a_changing_fade_does_not_compile_again_and_again() -> None:
    from torch._dynamo.testing import CompileCounter

    model, fade, counter = tiny_vit(depth=1), RouterFade(16), CompileCounter()
    vismt.adapt(model, "emtal", rank=2, n_experts=4)
    set_fade(shake(model, 0.1), fade)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(10):
        assert torch.allclose(compiled(images()), model(images()), atol=1e-6)
        fade.step()
    assert fade.value == 1 and counter.frame_count <= 3  # a constant, a variable, the faded branch


@pytest.mark.parametrize("fade", [0.0, 0.5, 1.0])
def test_half_precision(fade: float) -> None:
    model, dtypes = adapted(), []
    set_fade(model, fade)
    model.blocks[0].mlp.act.register_forward_pre_hook(lambda _, inputs: dtypes.append(inputs[0].dtype))
    expected = model(images())
    near = 0.05 * expected.detach().abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images())
    assert (out.float() - expected).abs().max() < near
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.blocks[0].mlp.fade_value == fade
    assert (half(images().bfloat16()).float() - expected).abs().max() < near
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert half.blocks[0].mlp.omega(torch.randn(2, 32).bfloat16()).dtype == torch.float32  # the softmax is in fp32


# ---- the experts of the units


def test_clustering_labels_units_and_moves_none() -> None:
    stock, x = tiny_vit(), images()
    model, flat = tiny_vit(), tiny_vit()
    vismt.adapt(model, "emtal", rank=2, n_experts=4, init="zero")
    vismt.adapt(flat, "emtal", rank=2, n_experts=4, init="zero", cluster=False)
    for block, old in zip(model.blocks, stock.blocks):
        labels, mlp = block.mlp.labels, block.mlp
        assert labels.bincount().tolist() == [32] * 4
        assert not torch.equal(labels, labels.sort().values)
        assert all(torch.equal(mlp.get_parameter(name), value) for name, value in old.mlp.named_parameters())
    assert not torch.equal(*(block.mlp.labels for block in model.blocks))
    assert not torch.allclose(model(x), flat(x), atol=1e-6)
    set_fade(model, 1.0)
    assert torch.allclose(model(x), stock(x), atol=1e-6)


def test_labels_may_be_given() -> None:
    labels = [torch.arange(128) % 4, torch.arange(128).flip(0) // 32]
    model = adapted(cluster=labels)
    assert all(torch.equal(block.mlp.labels, label) for block, label in zip(model.blocks, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_weights_of_the_ffn_keep_their_bits_and_their_place(dtype: torch.dtype) -> None:
    stock = tiny_vit().to(dtype)
    parameter = stock.blocks[0].mlp.fc1.weight
    original = snapshot(stock)
    vismt.adapt(stock, "emtal", rank=2, n_experts=4, also_train=["blocks.0.mlp.fc1.bias"])
    shake(stock)
    assert stock.blocks[0].mlp.fc1.weight is parameter
    assert torch.equal(parameter, original["blocks.0.mlp.fc1.weight"])
    vismt.unadapt(stock)
    assert holds(stock, original)
    assert type(stock.blocks[0].mlp) is Mlp and stock.blocks[0].mlp.fc1.weight is parameter


def test_hooks_of_the_ffn_fire_meanwhile_and_stay() -> None:
    model, calls = tiny_vit(), []
    model.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    vismt.adapt(model, "emtal", rank=2, n_experts=4)
    model(images())
    vismt.unadapt(model)(images())
    assert len(calls) == 2


# ---- merge and files


def test_merge_says_how_far_the_router_is_and_leaves_the_model() -> None:
    model = adapted()
    fade = RouterFade(40)
    set_fade(model, fade)
    for _ in range(5):
        fade.step()
    before = model(images())
    for act in (vismt.merge, lambda m: vismt.export_peft(m, "nowhere")):
        with pytest.raises(
            UserError, match=r"'blocks\.0\.mlp' still routes \(fade 0\.25 of 1, step 5 of 40, 1 from 20\)"
        ):
            act(model)
    assert torch.equal(model(images()), before)
    set_fade(model, 1.0)
    model.blocks[1].mlp.fade = 1 - 1e-7
    with pytest.raises(UserError, match=r"'blocks\.1\.mlp' still routes \(fade 0\.9999999 of 1\)"):
        vismt.merge(model)
    model.blocks[1].mlp.fade = 1
    vismt.merge(model)
    with pytest.raises(UserError, match="not adapted"):
        vismt.merge(model)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    "options", [{}, {"init_values": 0.1, "class_token": False, "global_pool": "avg"}, {"mlp_ratio": 3, "depth": 3}]
)
def test_merged_is_the_faded_model_in_stock_classes(dtype: torch.dtype, tolerance: float, options: dict) -> None:
    model, x = tiny_vit(**options).to(dtype), images().to(dtype)
    vismt.adapt(model, "emtal", rank=3, n_experts=8)
    shake(model, 0.3)
    outputs = {}
    for fade in (0.0, 0.5, 1.0):
        set_fade(model, fade)
        outputs[fade] = model(x)
    vismt.merge(model)
    fresh = tiny_vit(**options).to(dtype)
    fresh.load_state_dict(model.state_dict(), strict=True)
    largest = outputs[1.0].abs().max()
    assert (fresh(x) - outputs[1.0]).abs().max() <= tolerance * largest
    assert [type(m) for m in fresh.modules()] == [type(m) for m in model.modules()]
    for fade in (0.0, 0.5):  # merging earlier would give a different model
        assert (fresh(x) - outputs[fade]).abs().max() > 1e-2 * largest


def test_merged_and_exported_updates_are_of_rank_r(tmp_path) -> None:
    model, stock = adapted(), tiny_vit()
    set_fade(model, 1.0)
    expected = model(images())
    vismt.export_peft(model, tmp_path / "peft")
    vismt.save_adapter(model, tmp_path / "own")
    assert torch.equal(model(images()), expected)  # neither changes the model
    plain = vismt.import_peft(tiny_vit(), tmp_path / "peft")
    assert torch.allclose(plain(images()), expected, atol=1e-5)
    saved = safetensors.torch.load_file(next((tmp_path / "own").glob("*.safetensors")))
    vismt.merge(model)
    vismt.merge(plain)
    for name in ("blocks.1.mlp.fc1", "blocks.1.mlp.fc2", "blocks.0.attn.qkv"):
        delta = model.get_submodule(name).weight - stock.get_submodule(name).weight
        assert torch.linalg.svdvals(delta)[2] < 1e-5 and torch.linalg.svdvals(delta)[1] > 1e-2
        assert torch.allclose(saved[f"{name}.lora_B"] @ saved[f"{name}.lora_A"], delta, atol=1e-5)
        assert torch.allclose(plain.get_submodule(name).weight, model.get_submodule(name).weight, atol=1e-6)


@pytest.mark.parametrize("also", [(), ("head", "blocks.0.mlp.fc1.bias")])
def test_files_carry_router_fade_and_labels(tmp_path, also: tuple[str, ...]) -> None:
    model = adapted(temperature=2.5, also_train=also)
    set_fade(model, 0.3)
    expected = model(images())
    vismt.save_adapter(model, tmp_path)
    others = ({"seed": 9}, {"cluster": False})
    for target in (tiny_vit(), *(adapted(temperature=2.5, also_train=also, **other) for other in others)):
        vismt.load_adapter(target, tmp_path)
        assert torch.equal(target(images()), expected)
        for block, saved in zip(target.blocks, model.blocks):
            assert (
                block.mlp.fade == 0.3
                and block.mlp.temperature == 2.5
                and torch.equal(block.mlp.labels, saved.mlp.labels)
            )
        assert holds(vismt.unadapt(target), tiny_vit().state_dict())


def test_random_experts_are_the_control_of_clusters() -> None:
    stock = tiny_vit()
    model, again, other = (adapted(permute="random", seed=seed) for seed in (0, 0, 1))
    labels = [block.mlp.labels for block in model.blocks]
    assert all(torch.equal(block.mlp.labels, own) for block, own in zip(again.blocks, labels))
    assert not torch.equal(other.blocks[0].mlp.labels, labels[0]) and not torch.equal(labels[0], labels[1])
    clustered = adapted(permute="clusters")
    assert not torch.equal(clustered.blocks[0].mlp.labels, labels[0])
    assert holds(vismt.unadapt(model), stock.state_dict())


def test_the_report_has_the_share_that_experts_explain() -> None:
    def shares(**options: object) -> list[str]:
        report = vismt.adapt(tiny_vit(), "emtal", rank=2, n_experts=4, **options)
        return [line for line in report.extras if line.startswith("experts explain")]

    (clusters,), (random,) = shares(), shares(permute="random")
    number = re.compile(r"experts explain (-?[\d.]+) %")
    assert float(number.match(clusters)[1]) > 5 > abs(float(number.match(random)[1]))
    assert shares(cluster=False) == []


def test_loading_is_strict_and_leaves_the_model(tmp_path) -> None:
    vismt.save_adapter(adapted(), tmp_path)
    path = tmp_path / "adapter.json"
    text = path.read_text()
    vismt.load_adapter(tiny_vit(), tmp_path)
    for model, change, message in (
        (tiny_vit(mlp_layer=GluMlp), {}, "gated FFN|made for"),
        (adapted(temperature=3.0), {}, "already carries another 'emtal'"),
        (
            tiny_vit(),
            {"settings": {"n_experts": 8, "temperature": 5.0}},
            r"router\.weight: saved \(4, 32\), needed \(8, 32\)",
        ),
        (tiny_vit(), {"settings": {}}, r"settings.n_experts\W* is missing"),
        (tiny_vit(), {"type": "os:system"}, "this version of vismt has no adapter module 'os:system'"),
        (tiny_vit(), {"type": "vismt.nothing:MoEfiedMlp"}, "no adapter module 'vismt.nothing:MoEfiedMlp'"),
    ):
        description = json.loads(text)
        description["parts"]["blocks.1.mlp"] |= change
        write_description(tmp_path, description)
        before = snapshot(model)
        with pytest.raises(UserError, match=message):
            vismt.load_adapter(model, tmp_path)
        assert holds(model, before)
    description = json.loads(text)
    del description["parts"]
    write_description(tmp_path, description)
    with pytest.raises(UserError, match=r"unexpected 'blocks\.0\.mlp"):
        vismt.load_adapter(tiny_vit(), tmp_path)


# ---- models and errors


def test_other_vits() -> None:
    for name, options, size in (
        ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2}, 28),
        ("vit_small_patch16_18x2_224", {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}, 32),
        ("vit_relpos_small_patch16_224", {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}, 32),
    ):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=3, **options).eval()
        report = vismt.adapt(model, "emtal", rank=2, n_experts=4, init="zero", cluster=False)
        ends = {site.path.split(".", 2)[2] for site in report.specs}
        assert all(
            end.endswith(("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")) and "rel_pos" not in end for end in ends
        ), ends
        shake(model)
        set_fade(model, 1.0)
        out = model(images(size=size))
        assert (vismt.merge(model)(images(size=size)) - out).abs().max() < 1e-5 * out.abs().max()


def test_any_resolution_goes_through_the_routers() -> None:
    model = tiny_vit(dynamic_img_size=True)
    vismt.adapt(model, "emtal", rank=2, n_experts=4)
    assert model(torch.rand(2, 3, 24, 16)).shape == (2, 5)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: tiny_vit(mlp_layer=SwiGLU), {}, r"'blocks\.0\.mlp' is a gated FFN"),
        (lambda: tiny_vit(mlp_layer=GluMlp), {}, r"'blocks\.0\.mlp' is a gated FFN"),
        (lambda: tiny_vit(scale_mlp_norm=True), {}, "normalises its hidden units"),
        (lambda: tiny_vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock), {}, "without an FFN"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), {}, "Sequential has no blocks; it needs a timm ViT"),
        (
            tiny_vit,
            {"n_experts": 24},
            r"n_experts 24 does not divide the 128 hidden units of 'blocks\.0\.mlp'; use one of 2, 4, 8",
        ),
        (tiny_vit, {"n_experts": 0}, "n_experts 0; it must be a whole number"),
        (tiny_vit, {"n_experts": True}, "n_experts True"),
        (tiny_vit, {"temperature": 0}, "temperature 0; it must be a positive number"),
        (tiny_vit, {"init": "zeros"}, "init 'zeros'. Near: 'zero'"),
        (tiny_vit, {"fade": 1.5}, "fade 1.5; it must be a number from 0"),
        (tiny_vit, {"fade": True}, "fade True"),
        (tiny_vit, {"cluster": [torch.arange(128) // 32]}, "cluster holds 1 entries"),
        (tiny_vit, {"cluster": [torch.zeros(128, dtype=torch.int64)] * 2}, "with 32 units for each of 0 .. 3"),
        (tiny_vit, {"permute": "randon"}, "permute 'randon'. Near: 'random'"),
        (tiny_vit, {"permute": "random", "cluster": False}, "permute 'random' draws the experts; leave cluster out"),
        (tiny_vit, {"n_expert": 4}, "no option 'n_expert'. Near: 'n_experts'"),
        (tiny_vit, {"targets": ["mlp.fc3"]}, "no module matches 'mlp.fc3'"),
        (adapted, {}, "already carries 'emtal'"),
    ],
)
def test_refusals_leave_the_model_as_it_was(make: Callable[[], nn.Module], options: dict, message: str) -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises(UserError, match=message):
        vismt.adapt(model, "emtal", **{"rank": 2, "n_experts": 4, **options})
    assert holds(model, before)


def test_refusals_of_one_ffn_and_of_set_fade() -> None:
    for build, message in (
        (lambda: MoEfiedMlp(Mlp(6, 24), 0, 3), "rank 0; it must be a whole number"),
        (lambda: MoEfiedMlp(Mlp(6, 24), 9, 3), "is larger than 6"),
        (lambda: MoEfiedMlp(Mlp(6, 24), 2, 5), "n_experts 5 does not divide the 24"),
        (lambda: MoEfiedMlp(nn.Linear(6, 6), 2, 3), "has no fc1 and fc2"),
        (lambda: ffn().assign(torch.arange(24) % 4), "use cluster_neurons"),
        (lambda: ffn().assign(torch.arange(24) % 3.0), "use cluster_neurons"),
        (lambda: setattr(ffn(), "fade", "late"), "fade 'late'"),
        (lambda: set_fade(tiny_vit(), 1.0), "no router; adapt it with 'emtal'"),
    ):
        with pytest.raises(UserError, match=message):
            build()


def test_an_mlp_with_a_forward_of_its_own_and_none_are_refused() -> None:
    class Other(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    with pytest.raises(UserError, match="'mlp' is a Other, needed timm's Mlp"):
        MoEfiedMlp(Other(6, 24), 2, 3)
    with pytest.raises(UserError, match=r"^emtal: this model has no 'blocks\.9\.mlp' to put a router in"):
        MoEfiedMlp.check("blocks.9.mlp", None, RouterSettings(4, 1.0))


def test_a_file_with_the_earlier_name_of_the_method_is_read(tmp_path) -> None:
    assert "emtal" in vismt.list_methods() and "moe_lora" not in vismt.list_methods()
    model = tiny_vit()
    vismt.adapt(model, "emtal", rank=2, n_experts=4, cluster=False)
    vismt.save_adapter(shake(model), tmp_path)
    assert described(tmp_path)["method"] == "emtal"
    edit_text(tmp_path, '"method": "emtal"', '"method": "moe_lora"')
    for again in (tiny_vit(), model):  # a stock model, and one that carries the adapter already
        vismt.load_adapter(again, tmp_path)
        assert torch.equal(again(images()), model(images())) and again.vismt_record.method == "emtal"
