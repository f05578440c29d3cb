"""S2FT in whole models: stock weights, gradients of full fine-tuning, steps, copies, precision, export."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.language_models import MODELS, moved_lm, outputs, tokens
from helpers.tiny import holds, images, shake, snapshot, tiny_vit
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import vismt
from scripts.bench.accounting import optimizer_bytes, saved_activation_bytes
from vismt.base.errors import UserError
from vismt.llm import UnitSelection, check_slices
from vismt.llm.s2ft.structures import structures
from vismt.lowrank.layers.base import adapter_layers

EVERY = ("v", "o", "u", "d")


@torch.no_grad()
def in_the_weights(model: nn.Module) -> nn.Module:
    """Return a stock copy with the changes added to the weights by hand."""
    changes = {path: (host.dim, host.slice_index, host.slice_values) for path, host in adapter_layers(model).items()}
    stock = vismt.unadapt(copy.deepcopy(model))
    for path, (dim, index, values) in changes.items():
        module = stock.get_submodule(path)
        matrix = module.weight.data.t() if type(module).__name__ == "Conv1D" else module.weight.data
        matrix.index_add_(dim, index, values)
    return stock


def loss(model: nn.Module, seed: int = 0) -> Tensor:
    return outputs(model, seed).log_softmax(-1)[..., 0].mean()


@pytest.mark.parametrize("name", MODELS)
def test_stock_weights_keep_bits_and_place_and_the_start_is_the_function(name: str) -> None:
    """Adapting, training and merging a copy write nothing into the weights of the model, which stay the same objects."""
    model, stock = MODELS[name](), MODELS[name]()
    kept, before = dict(model.named_parameters()), snapshot(stock)
    expected = outputs(stock)
    vismt.adapt(model, "s2ft", parts=EVERY, ratio=0.4, seed=3)
    assert torch.equal(outputs(model), expected)
    shake(model)
    trained = outputs(model)
    merged = vismt.merge(copy.deepcopy(model))
    now = dict(model.named_parameters())
    assert all(now[key] is value and torch.equal(value, before[key]) for key, value in kept.items())
    assert not torch.allclose(trained, expected, atol=1e-3)
    assert torch.allclose(outputs(merged), trained, atol=1e-5 * max(1.0, float(trained.detach().abs().max())))
    assert all(value is kept[key] for key, value in vismt.unadapt(model).named_parameters())


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2-biases", "phi3-fused", "gpt2-conv1d", "vit"])
def test_gradients_are_slices_of_the_full_ones(name: str) -> None:
    """dP for o, d, v, u, and dx through a trained embedding or patch projection, in fp64 against the weights with the changes."""
    lower = {"gpt2-conv1d": "transformer.wte", "vit": "patch_embed.proj"}.get(name, "model.embed_tokens")
    model = MODELS[name]().double()
    if name == "gpt2-conv1d":  # a tied head would be trained too
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    vismt.adapt(model, "s2ft", parts=EVERY, ratio=0.3, seed=1, also_train=[lower])
    with torch.no_grad():
        for number, host in enumerate(adapter_layers(model).values()):
            noise = torch.randn(host.slice_values.shape, generator=torch.Generator().manual_seed(number))
            host.slice_values.add_(0.02 * noise)
    full = in_the_weights(model).requires_grad_(True)
    # unadapt gives the trained parameters their stock values, which they still have here.
    assert torch.allclose(outputs(model), outputs(full), rtol=1e-10, atol=1e-10)
    loss(model).backward()
    loss(full).backward()
    for path, host in adapter_layers(model).items():
        grad = full.get_submodule(path).weight.grad
        grad = grad.t() if name == "gpt2-conv1d" else grad
        wanted = grad.index_select(host.dim, host.slice_index)
        assert torch.allclose(host.slice_values.grad, wanted, rtol=1e-9, atol=1e-12), path
        assert wanted.abs().max() > 0
    for also in model.vismt_record.also_train:
        wanted = full.get_parameter(also).grad
        assert torch.allclose(model.get_parameter(also).grad, wanted, rtol=1e-9, atol=1e-12)
        assert wanted.abs().max() > 0


@pytest.mark.parametrize("dim", [0, 1])
def test_the_layer_and_its_derivatives_are_the_equation(dim: int) -> None:
    """y = W x + b with P added to rows or columns J that are no range, and first and second derivatives, in fp64."""
    torch.manual_seed(0)
    holder = nn.Module()
    holder.mlp = nn.Module()
    holder.mlp.fc1, holder.mlp.fc2 = nn.Linear(3, 5).double(), nn.Linear(5, 3).double()
    vismt.adapt(holder, "s2ft", selection=UnitSelection({"mlp": {"u": (0, 2, 4)} if dim == 0 else {"d": (0, 2, 4)}}))
    layer = holder.mlp.fc1 if dim == 0 else holder.mlp.fc2
    shake(layer)
    x = torch.randn(2, 4, layer.in_features, dtype=torch.float64)
    W = layer.weight.detach().clone()
    W.index_add_(dim, torch.tensor([0, 2, 4]), layer.slice_values.detach())
    assert torch.allclose(layer(x), nn.functional.linear(x, W, layer.bias), rtol=1e-12, atol=1e-12)

    def of(x: Tensor, change: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"slice_values": change}, (x,))

    inputs = (x.requires_grad_(True), layer.slice_values.detach().clone().requires_grad_(True))
    assert torch.autograd.gradcheck(of, inputs) and torch.autograd.gradgradcheck(of, inputs)
    assert torch.autograd.gradcheck(partial(of, x.detach()), inputs[1:])


def train(model: nn.Module, steps: int, **settings: object) -> list[float]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, **{"weight_decay": 0.0, **settings})
    check_slices(model, optimizer)
    losses = []
    for step in range(steps):
        value = loss(model, step)
        value.backward()
        losses.append(float(value))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    numel = sum(parameter.numel() for parameter in trained)
    counters = 4 * len(trained)
    assert optimizer_bytes(optimizer) == 2 * 4 * numel + counters  # two moments of the slice, nothing else
    return losses


@pytest.mark.parametrize("name", ["vit", "llama-gqa", "gpt2-conv1d"])
def test_weights_that_train_beside_the_change_get_the_gradient_of_the_stock_model(name: str) -> None:
    net, stock = ((tiny_vit() if name == "vit" else MODELS[name]()) for _ in range(2))
    stock.load_state_dict(net.state_dict())
    vismt.adapt(net, "s2ft")
    for each in (net.requires_grad_(True), stock.requires_grad_(True)):
        outputs(each).square().mean().backward()
    layers = adapter_layers(net)
    assert layers
    for path in layers:
        found, expected = net.get_submodule(path).weight.grad, stock.get_submodule(path).weight.grad
        assert found is not None and torch.allclose(found, expected, rtol=1e-4, atol=1e-7)
        assert net.get_submodule(path).slice_values.grad is not None


def test_steps_are_masked_full_steps_and_the_other_bits_stay() -> None:
    """Steps equal masked full fine-tuning; weight decay acts on the change, where that of the mask moves all weights."""
    model, full = MODELS["llama-gqa"](), MODELS["llama-gqa"]()
    stock = snapshot(full)
    vismt.adapt(model, "s2ft", parts=EVERY, ratio=0.3)
    masks = {}
    for path, host in adapter_layers(model).items():
        mask = torch.zeros(host.out_features, host.in_features)
        masks[path] = mask.index_fill_(host.dim, host.slice_index, 1.0)
    full.requires_grad_(False)
    for path in masks:
        full.get_submodule(path).weight.requires_grad_(True)
    trained = [full.get_submodule(path).weight for path in masks]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(5):
        value = loss(full, step)
        value.backward()
        for path, mask in masks.items():
            full.get_submodule(path).weight.grad.mul_(mask)
        losses.append(float(value))
        optimizer.step()
        optimizer.zero_grad()
    assert train(model, 5) == pytest.approx(losses, abs=1e-5)
    values = [host.slice_values for host in adapter_layers(model).values()]
    before = [value.detach().clone() for value in values]
    decay = torch.optim.AdamW(values, lr=1e-2, weight_decay=0.5)
    for value in values:
        value.grad = torch.zeros_like(value)
    decay.step()
    assert all(torch.allclose(now, then * (1 - 5e-3), rtol=1e-5) for now, then in zip(values, before))
    vismt.merge(model)
    state = model.state_dict()
    for name, value in stock.items():
        mask = masks.get(name.removesuffix(".weight"), torch.zeros_like(value)).bool()
        assert torch.equal(state[name][~mask], value[~mask]), name
        assert (state[name][mask] != value[mask]).float().mean() >= 0.999 if mask.any() else True, name


def test_only_a_copy_of_the_slice_is_kept() -> None:
    """A layer saves 2 x 32 rows of 8 inputs, 2,048 bytes; a view would keep all of x, 65,536."""
    holder = nn.Module()
    holder.mlp = nn.Module()
    holder.mlp.fc1, holder.mlp.fc2 = nn.Linear(4, 256, bias=False), nn.Linear(256, 64)
    vismt.adapt(holder, "s2ft", selection=UnitSelection({"mlp": {"d": tuple(range(3, 11))}}))
    x = torch.randn(2, 32, 256)
    assert saved_activation_bytes(holder, partial(holder.mlp.fc2, x)) == 2048
    vismt.unadapt(holder)
    # The rows of fc1 need its whole input: 2 x 32 x 4 floats.
    vismt.adapt(holder, "s2ft", selection=UnitSelection({"mlp": {"u": (1, 2)}}))
    x = torch.randn(2, 32, 4)
    assert saved_activation_bytes(holder, partial(holder.mlp.fc1, x)) == 1024
    holder.mlp.fc1.slice_values.requires_grad_(False)
    assert saved_activation_bytes(holder, partial(holder.mlp.fc1, x.requires_grad_(True))) == 0


@pytest.mark.slow
def test_published_budget_on_the_meta_device() -> None:
    """Llama-2-7B with o 0.052 and d 0.02: 2 of 32 heads and 220 of 11,008 channels of each layer."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=320, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
            )
        )
    report = vismt.adapt(model, "s2ft", ratio={"o": 0.052, "d": 0.02})
    assert report.trainable == 32 * (2 * 128 + 220) * 4096
    assert "o: 64 of 1,024 heads" in str(report) and "d: 7,040 of 352,256 channels" in str(report)
    with pytest.raises(UserError, match="to_empty: 's2ft' on the meta device has chosen no units"):
        model.model.layers[0].to_empty(device="cpu")


def test_accumulation_checkpointing_and_clipping_see_the_slice() -> None:
    """Accumulated, checkpointed, clipped and scaled gradients of the slices equal those of the whole batch."""
    model = MODELS["llama-gqa"]()
    vismt.adapt(model, "s2ft", ratio=0.3, parts=EVERY)
    shake(model)
    slices = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = tokens(4, 7, seed=3)

    def run(batch: Tensor, scale: float = 1.0, inputs: Callable | None = None) -> None:
        (scale * (inputs or (lambda x: model(x).logits))(batch).square().mean()).backward()

    def take() -> list[Tensor]:
        grads = [parameter.grad.clone() for parameter in slices]
        model.zero_grad(set_to_none=True)
        return grads

    run(ids)
    whole = take()
    first = model(ids[:2]).logits.square().mean() / 2  # two graphs at once, then both backward
    second = model(ids[2:]).logits.square().mean() / 2
    first.backward()
    second.backward()
    assert all(torch.allclose(expected, actual, rtol=1e-4, atol=1e-6) for expected, actual in zip(whole, take()))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    run(ids)
    assert all(torch.allclose(expected, actual, rtol=1e-5, atol=1e-7) for expected, actual in zip(whole, take()))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):  # as with offloading
        run(ids)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert float(norm) == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in whole)), rel=1e-4)
    assert sum(float(g.square().sum()) for g in take()) <= 1.01e-6
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = torch.optim.SGD(slices, lr=1.0)
    before = [parameter.detach().clone() for parameter in slices]
    scaler.scale(model(ids).logits.square().mean()).backward()
    scaler.step(optimizer)
    for old, new, gradient in zip(before, slices, whole):
        assert torch.allclose(old - new, gradient, rtol=1e-3, atol=1e-5)


def test_copies_casts_and_loaded_states_are_the_model() -> None:
    def fresh(seed: int = 0) -> nn.Module:
        model = tiny_vit()
        vismt.adapt(model, "s2ft", ratio=0.25, parts=EVERY, seed=seed)
        return shake(model, 0.1, seed)

    model = fresh()
    expected = outputs(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    copied = copy.deepcopy(model)
    assert torch.equal(outputs(copied), expected)
    shake(copied, 0.1)
    assert torch.equal(outputs(model), expected) and not torch.equal(outputs(copied), expected)
    with pytest.raises(UserError, match="optimiser does not hold the slice"):
        check_slices(copied, optimizer)
    other = fresh(5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(outputs(other), expected)
    model.to(torch.float64)
    check_slices(model, optimizer)  # the same Parameter objects, so the optimiser still moves them
    assert torch.allclose(outputs(model).float(), expected, atol=1e-5)


def test_half_precision_weights_are_trained_through_an_fp32_master() -> None:
    """Steps of 2e-5 on weights of 0.02 vanish in bf16; a hundred of them do not."""
    model = tiny_vit().to(torch.bfloat16)
    stock = snapshot(model)
    vismt.adapt(model, "s2ft", ratio=0.25)
    host = model.blocks[0].mlp.fc2
    assert host.slice_values.dtype == torch.float32 and host.weight.dtype == torch.bfloat16
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5, weight_decay=0.0)
    start = host.slice_values.detach().clone()
    for _ in range(5):
        outputs(model).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (host.slice_values - start).abs().mean() > 5e-5
    outputs(model)
    vismt.merge(model)
    assert not torch.equal(model.blocks[0].mlp.fc2.weight, stock["blocks.0.mlp.fc2.weight"])


def test_a_cast_of_a_half_precision_model_leaves_its_master() -> None:
    """to(bfloat16), which changes no weight, must not round the trained values; after float() there is no separate master."""
    model = tiny_vit().to(torch.bfloat16)
    vismt.adapt(model, "s2ft", ratio=0.25)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5, weight_decay=0.0)
    outputs(model).float().square().mean().backward()
    optimizer.step()
    host = model.blocks[0].mlp.fc2
    values, grad, expected = host.slice_values.detach().clone(), host.slice_values.grad.clone(), outputs(model)
    assert not torch.equal(values, values.bfloat16().float())
    for cast in (torch.bfloat16, torch.float16, torch.bfloat16):
        model.to(cast)
        assert host.slice_values.dtype == torch.float32 and torch.equal(host.slice_values, values), cast
        assert host.weight.dtype == cast and torch.equal(host.slice_values.grad, grad)
    assert torch.allclose(outputs(model), expected, atol=1e-2)
    optimizer.step()
    assert not torch.equal(host.slice_values, values)
    model.float()
    assert host.slice_values.dtype == host.weight.dtype == torch.float32
    half = tiny_vit().to(torch.bfloat16)
    vismt.adapt(half, "s2ft", ratio=0.25, dtype="bfloat16")
    half.to(torch.float16)
    assert half.blocks[0].mlp.fc2.slice_values.dtype == torch.float16


def test_parameters_from_outside_are_used() -> None:
    """functional_call, as in the inner loops of meta-learning, with a second derivative."""
    model = tiny_vit()
    vismt.adapt(model, "s2ft", ratio=0.25, parts=EVERY)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    other = shake(copy.deepcopy(model))
    values = {name: other.get_parameter(name).detach().clone().requires_grad_() for name in named}
    before = outputs(model)
    with sdpa_kernel(SDPBackend.MATH):
        out = torch.func.functional_call(model, values, (images(2, seed=0),))
    assert torch.allclose(out, outputs(other), atol=1e-5) and not torch.allclose(out, before, atol=1e-3)
    first = torch.autograd.grad(out.square().sum(), list(values.values()), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), list(values.values()))
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in second)
    assert torch.equal(outputs(model), before)


def test_training_under_fsdp() -> None:
    """Sharded parameters are gathered and freed around each block; in one process the steps equal those without FSDP."""
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def trained(sharded: bool) -> tuple[list[float], Tensor]:
        model = tiny_vit()
        vismt.adapt(model, "s2ft", ratio=0.25, parts=EVERY)
        if sharded:
            mesh = init_device_mesh("cpu", (1,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for step in range(3):
            value = loss(model, step)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(value.detach()))
        delta = model.blocks[1].mlp.fc2.slice_values
        return losses, (delta.full_tensor() if sharded else delta).detach().clone()

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain, sharded = trained(False), trained(True)
    finally:
        dist.destroy_process_group()
    assert plain[0] == pytest.approx(sharded[0], abs=1e-6) and plain[0][2] < plain[0][0]
    assert torch.allclose(plain[1], sharded[1], atol=1e-6) and plain[1].abs().max() > 0


def test_compiled_training_moves_the_model() -> None:
    torch.compiler.reset()
    holder = nn.Module()
    holder.fc1, holder.fc2 = nn.Linear(4, 12), nn.Linear(12, 4)
    vismt.adapt(holder, "s2ft", ratio=0.25, parts=["d"])
    layer = holder.fc2
    compiled, x = torch.compile(layer, backend="aot_eager", fullgraph=True), torch.randn(3, 12)
    before = compiled(x)
    before.square().sum().backward()
    torch.optim.SGD([layer.slice_values], lr=0.1).step()
    after = compiled(x)
    assert not torch.allclose(after, before, atol=1e-4) and torch.allclose(after, layer(x), atol=1e-6)


def test_five_steps_equal_a_sparse_adapter_beside_the_weight() -> None:
    """The layer of the package, y = x W^T + x[:, J] D^T with D from zero, has the same losses."""

    class Beside(nn.Module):
        def __init__(self, base: nn.Linear, index: Tensor) -> None:
            super().__init__()
            self.base, self.index = base, index
            self.delta = nn.Parameter(torch.zeros(base.weight.shape[0], len(index)))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + x[..., self.index] @ self.delta.t()

    model, peer = MODELS["llama-gqa"](), MODELS["llama-gqa"]()
    vismt.adapt(model, "s2ft", ratio=0.3)
    peer.requires_grad_(False)
    for path, host in adapter_layers(model).items():
        parent, _, name = path.rpartition(".")
        setattr(peer.get_submodule(parent), name, Beside(peer.get_submodule(path), host.slice_index))
    losses = train(model, 5, betas=(0.9, 0.95))
    assert losses == pytest.approx(train(peer, 5, betas=(0.9, 0.95)), abs=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["gpt2-conv1d", "llama-gqa"])
def test_export_is_an_exact_lora_and_merging_a_full_checkpoint(name: str, tmp_path: Path) -> None:
    """The export has rank k and is read by peft; the merged model has stock classes."""
    peft = pytest.importorskip("peft")
    model = MODELS[name]()
    vismt.adapt(model, "s2ft", parts=EVERY, ratio=0.25)
    shake(model)
    expected = outputs(model)
    vismt.export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(MODELS[name](), str(tmp_path)).eval()
    assert torch.allclose(outputs(theirs.base_model.model), expected, atol=1e-5 * float(expected.detach().abs().max()))
    vismt.merge(model)
    stock = MODELS[name]()
    stock.load_state_dict(model.state_dict(), strict=True)
    assert torch.allclose(outputs(stock), expected, atol=1e-5 * float(expected.detach().abs().max()))


def test_biases_that_train_along_are_saved_and_come_back(tmp_path: Path) -> None:
    model = tiny_vit()
    vismt.adapt(model, "s2ft", ratio=0.25, also_train=["blocks.0.mlp.fc1.bias", "blocks.0.mlp.fc2.bias"])
    shake(model)
    vismt.save_adapter(model, tmp_path)
    loaded = vismt.load_adapter(tiny_vit(), tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    vismt.unadapt(model)
    assert holds(model, tiny_vit().state_dict())


def broken_groups() -> nn.Module:
    """Return a model and a selection with heads of several groups: four groups of four heads in two layers."""
    return moved_lm("llama", num_attention_heads=16, num_key_value_heads=4, head_dim=4)


BROKEN = UnitSelection(
    {
        "model.layers.0.self_attn": {"v": (1, 3), "o": (0, 4, 8)},
        "model.layers.0.mlp": {"u": (3, 9, 40), "d": (0, 9, 21)},
        "model.layers.1.self_attn": {"v": (2,), "o": (1, 2, 6, 9, 15)},
        "model.layers.1.mlp": {"d": (5,)},
    }
)


def test_values_of_each_head_or_channel_beside_the_projections_are_no_obstacle() -> None:
    """Sinks of heads and scales of channels stay where their units are, because no unit moves."""

    class Scaled(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.linspace(1, 2, count))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x.relu()

    model = tiny_vit()
    model.blocks[0].mlp.act = Scaled(128)
    model.blocks[1].attn.sinks = nn.Parameter(torch.zeros(4))
    expected = outputs(model)
    vismt.adapt(model, "s2ft", ratio=0.5)
    assert torch.equal(outputs(model), expected)


def test_files_of_several_broken_groups_are_exact(tmp_path: Path) -> None:
    model, stock = broken_groups(), snapshot(broken_groups())
    vismt.adapt(model, "s2ft", selection=BROKEN)
    train(model, 4)
    expected = outputs(model)
    near = 1e-5 * float(expected.detach().abs().max())
    folder = vismt.save_adapter(model, tmp_path)
    assert torch.equal(outputs(model), expected)
    assert torch.equal(outputs(vismt.load_adapter(broken_groups(), folder)), expected)
    merged = vismt.merge(vismt.load_adapter(broken_groups(), folder))
    assert torch.allclose(outputs(merged), expected, atol=near)
    for name, value in merged.state_dict().items():
        changed = (value != stock[name]).any(0).nonzero()[:, 0].tolist() if value.ndim == 2 else []
        if name.endswith("o_proj.weight"):
            heads = BROKEN.units[name.removesuffix(".o_proj.weight")]["o"]
            assert changed == [4 * head + place for head in heads for place in range(4)], name
        elif name.endswith(("q_proj.weight", "k_proj.weight", "gate_proj.weight")):
            assert not changed, name
    vismt.unadapt(model)
    assert holds(model, stock)


@pytest.mark.parametrize(
    "options,match",
    [
        ({"targets": ["proj"]}, "adapt.targets.*set parts and ratio"),
        ({"alpha": 2.0}, "adapt.alpha"),
        ({"mode": "permute"}, "no option 'mode'"),
        ({"dtype": "float31"}, "adapt.dtype"),
        ({"selection": UnitSelection({"blocks.7.mlp": {"d": (0,)}})}, "no heads or channels 'blocks.7.mlp'"),
        ({"selection": UnitSelection({"blocks.0.mlp": {"o": (0,)}})}, "'blocks.0.mlp' has no part 'o'"),
        (
            {"selection": UnitSelection({"blocks.0.attn": {"o": (4,)}})},
            r"1 units of 'o' in 'blocks.0.attn'; .* from 0 to 3",
        ),
        ({"selection": UnitSelection({"blocks.0.attn": {"o": (1,)}}), "ratio": 0.5}, "both selection and ratio"),
    ],
)
def test_wrong_settings_are_named(options: dict, match: str) -> None:
    model = tiny_vit()
    with pytest.raises(UserError, match=match):
        vismt.adapt(model, "s2ft", **options)
    assert structures(model) and not adapter_layers(model)
