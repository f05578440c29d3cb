"""S2FT in whole models: unchanged function, gradients of full fine-tuning, frozen weights, copies, precision, export."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers.language_models import MODELS, moved_lm, outputs, tokens
from helpers.tiny import holds, images, shake, snapshot, tiny_vit
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import vismt
from scripts.bench.accounting import optimizer_bytes, saved_activation_bytes
from vismt.base.errors import UserError
from vismt.llm import UnitSelection, check_slices, read_slices, select_units, switch
from vismt.llm.s2ft.structures import structures
from vismt.lowrank.layers.base import adapter_layers
from vismt.lowrank.model.modules import to_stock

EVERY = ("v", "o", "u", "d")


def move(model: nn.Module, scale: float) -> None:
    """Add the noise to every slice that the stock weight would get, for any mode and order of units."""
    generator = torch.Generator().manual_seed(7)
    for host in adapter_layers(model).values():
        noise = torch.randn(host.out_features, host.in_features, generator=generator)
        with torch.no_grad():
            host.slice_values.add_(scale * noise.index_select(host.dim, host.slice_index))


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients (o, i) of every stock linear layer in the unit order of the adapted model."""
    model = copy.deepcopy(model)
    to_stock(model)
    values = {path: host.slice_values.detach().clone() for path, host in adapter_layers(model).items()}
    for path, host in adapter_layers(model).items():
        host.matrix(host.weight.data).index_copy_(host.dim, host.slice_index, values[path].to(host.weight.dtype))
    stock = vismt.unadapt(model)  # the updates are removed already: the weights stay unchanged
    stock.requires_grad_(True)
    loss(stock).backward()
    kinds = {path: type(stock.get_submodule(path)).__name__ for path in values}
    return {
        path: stock.get_submodule(path).weight.grad.t() if kind == "Conv1D" else stock.get_submodule(path).weight.grad
        for path, kind in kinds.items()
    }


def loss(model: nn.Module, seed: int = 0) -> Tensor:
    return outputs(model, seed).log_softmax(-1)[..., 0].mean()


def test_reordered_models_compute_the_same_and_every_weight_comes_back() -> None:
    """Logits agree within 1e-5 of the largest, and weights return bit for bit."""
    for name, make in MODELS.items():
        model, stock = make(), make()
        for parts in (EVERY, ("o", "d")):
            vismt.adapt(model, "s2ft", parts=parts, ratio=0.4, seed=3)
            moved = [
                path
                for path, host in adapter_layers(model).items()
                if not torch.equal(host.slice_order, torch.arange(len(host.slice_order), dtype=torch.int32))
            ]
            assert moved or name == "llama-mqa", name
            expected = outputs(stock)
            assert (outputs(model) - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max())), (
                name,
                parts,
            )
            shake(model)
            vismt.unadapt(model)
            before, after = stock.state_dict(), model.state_dict()
            assert all(torch.equal(after[key], before[key]) for key in before), (name, parts)


def test_illegal_orders_are_other_functions() -> None:
    """Negative control: heads moved across groups, or biases that are not moved, change the logits."""
    expected = outputs(MODELS["qwen2-biases"]())
    for wrong in ("groups", "bias"):
        model = MODELS["qwen2-biases"]()
        for layer in model.model.layers:
            attention, order = layer.self_attn, torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
            heads = torch.tensor([0, 5, 2, 7, 4, 1, 6, 3]) if wrong == "groups" else order
            rows = (heads[:, None] * 4 + torch.arange(4)).flatten()
            pairs = (
                (torch.tensor([1, 0])[:, None] * 4 + torch.arange(4)).flatten() if wrong == "bias" else torch.arange(8)
            )
            with torch.no_grad():
                attention.q_proj.weight.copy_(attention.q_proj.weight[rows])
                attention.o_proj.weight.copy_(attention.o_proj.weight[:, rows])
                for name in ("k_proj", "v_proj"):
                    getattr(attention, name).weight.copy_(getattr(attention, name).weight[pairs])
                if wrong == "groups":
                    attention.q_proj.bias.copy_(attention.q_proj.bias[rows])
        assert (outputs(model) - expected).abs().max() > 0.1, wrong


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2-biases", "phi3-fused", "gpt2-conv1d", "vit"])
def test_gradients_are_slices_of_the_full_ones_in_every_mode(name: str) -> None:
    """dp for o, d, v, u, and dx through a trained embedding or patch projection."""
    lower = {"gpt2-conv1d": "transformer.wte", "vit": "patch_embed.proj"}.get(name, "model.embed_tokens")
    by_mode: dict[str, list[Tensor]] = {}
    selection = select_units(MODELS[name](), parts=EVERY, ratio=0.3, seed=1)
    for mode in ("permute", "index", "delta"):
        model = MODELS[name]()
        if name == "gpt2-conv1d":  # a tied head would be trained too
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        vismt.adapt(model, "s2ft", selection=selection, mode=mode, also_train=[lower])
        move(model, 0.02)
        loss(model).backward()
        if mode != "delta":
            full = full_gradients(model)
            for path, host in adapter_layers(model).items():
                wanted = full[path].index_select(host.dim, host.slice_index)
                assert torch.allclose(
                    host.slice_values.grad, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max())
                ), path
                assert wanted.abs().max() > 0
        grads = [
            host.slice_values.grad.index_select(host.dim, host.slice_index.argsort())
            for host in adapter_layers(model).values()
        ]
        grads += [model.get_parameter(also).grad for also in model.vismt_record.also_train]
        for actual, expected in zip(grads, by_mode.setdefault("first", grads)):
            assert torch.allclose(actual, expected, rtol=1e-4, atol=2e-6 * float(expected.abs().max())), mode
            assert expected.abs().max() > 0


def test_index_mode_leaves_the_forward_bits_alone() -> None:
    for name in ("llama-gqa", "vit"):
        model = MODELS[name]()
        expected = outputs(model)
        vismt.adapt(model, "s2ft", mode="index", parts=EVERY, ratio=0.3)
        assert torch.equal(outputs(model), expected)


def train(model: nn.Module, steps: int, weight_decay: float = 0.0, **settings: object) -> list[float]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=weight_decay, **settings)
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


@pytest.mark.parametrize("mode", ["permute", "index", "delta"])
def test_steps_are_masked_full_steps_and_frozen_bits_stay(mode: str) -> None:
    """Steps equal masked full fine-tuning; weight decay acts inside the slice only, where that of the mask moves all weights."""
    model, full = MODELS["llama-gqa"](), MODELS["llama-gqa"]()
    stock = snapshot(full)
    selection = select_units(model, parts=EVERY, ratio=0.3)
    vismt.adapt(model, "s2ft", selection=selection, mode=mode)
    masks = {}
    for path, host in adapter_layers(model).items():
        mask = torch.zeros(host.out_features, host.in_features)
        masks[path] = mask.index_fill_(host.dim, host.slice_index, 1.0)
    full.requires_grad_(False)
    for path in masks:
        full.get_submodule(path).weight.requires_grad_(True)

    def masked(weight_decay: float) -> list[float]:
        trained = [full.get_submodule(path).weight for path in masks]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=weight_decay)
        losses = []
        for step in range(5):
            value = loss(full, step)
            value.backward()
            for path, mask in masks.items():
                full.get_submodule(path).weight.grad.mul_(mask)
            losses.append(float(value))
            optimizer.step()
            optimizer.zero_grad()
        return losses

    assert train(model, 5) == pytest.approx(masked(0.0), abs=1e-5)
    if mode != "delta":
        train(model, 2, weight_decay=0.1)
    vismt.merge(model)
    state = model.state_dict()
    for name, value in stock.items():
        mask = masks.get(name.removesuffix(".weight"), torch.zeros_like(value)).bool()
        assert torch.equal(state[name][~mask], value[~mask]), name
        assert (state[name][mask] != value[mask]).float().mean() >= 0.999 if mask.any() else True, name
    before = {path: full.get_submodule(path).weight.detach().clone() for path in masks}
    masked(0.1)
    frozen = masks["model.layers.0.mlp.down_proj"] == 0
    assert (full.model.layers[0].mlp.down_proj.weight != before["model.layers.0.mlp.down_proj"])[
        frozen
    ].float().mean() > 0.99


def test_only_a_copy_of_the_slice_is_kept() -> None:
    """A layer saves 2 x 32 rows of 8 inputs, 2,048 bytes; a view would keep all of x, 65,536."""
    for mode in ("permute", "index", "delta"):
        holder = nn.Module()
        holder.mlp = nn.Module()
        holder.mlp.fc1, holder.mlp.fc2 = nn.Linear(4, 256, bias=False), nn.Linear(256, 64)
        vismt.adapt(holder, "s2ft", mode=mode, selection=UnitSelection({"mlp": {"d": tuple(range(3, 11))}}))
        x = torch.randn(2, 32, 256)
        assert saved_activation_bytes(holder, partial(holder.mlp.fc2, x)) == 2048, mode
        vismt.unadapt(holder)
        # The rows of fc1 need its whole input: 2 x 32 x 4 floats.
        vismt.adapt(holder, "s2ft", mode=mode, selection=UnitSelection({"mlp": {"u": (1, 2)}}))
        assert saved_activation_bytes(holder, partial(holder.mlp.fc1, torch.randn(2, 32, 4))) == 1024


@pytest.mark.slow
def test_published_budget_on_the_meta_device() -> None:
    """Llama-2-7B with o 0.052 and d 0.02 of all layers: 53 heads and 7,045 channels, 56.6 million."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=320, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
            )
        )
    report = vismt.adapt(model, "s2ft", ratio={"o": 0.052, "d": 0.02}, budget="global")
    assert report.trainable == 53 * 128 * 4096 + 7045 * 4096 == 56_643_584
    assert "o: 53 of 1,024 heads" in str(report) and "d: 7,045 of 352,256 channels" in str(report)


@pytest.mark.parametrize("mode", ["permute", "index", "delta"])
def test_accumulation_checkpointing_and_clipping_see_the_slice(mode: str) -> None:
    """Accumulated, checkpointed, clipped and scaled gradients of the slices equal those of the whole batch."""
    model = MODELS["llama-gqa"]()
    vismt.adapt(model, "s2ft", mode=mode, ratio=0.3, parts=EVERY)
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


def test_the_slice_and_the_weight_stay_one(tmp_path: Path) -> None:
    """After deepcopy, moves and loads, rows share the storage of W, columns are written, and a step on p changes the model."""

    def shared(model: nn.Module) -> bool:
        return all(
            (host.slice_values.untyped_storage().data_ptr() == host.weight.untyped_storage().data_ptr())
            == host.shares
            == (host.dim == 0)
            for host in adapter_layers(model).values()
        )

    def moves(model: nn.Module) -> bool:
        before, expected = outputs(model), outputs(copy.deepcopy(model))
        shake(model, 0.1)
        check_slices(model)
        assert shared(model)
        return torch.equal(before, expected) and not torch.equal(outputs(model), before)

    def fresh(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        model = tiny_vit().to(dtype)
        vismt.adapt(model, "s2ft", ratio=0.25, parts=EVERY, seed=seed)
        return model

    model = shake(fresh())
    assert shared(model) and moves(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for moved in (copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16), copy.deepcopy(model).double()):
        assert shared(moved) and moves(moved)
        with pytest.raises(UserError, match="optimiser does not hold the slice"):
            check_slices(moved, optimizer)
    model.to(torch.float64)
    assert shared(model)
    check_slices(model, optimizer)  # the same Parameter objects, so the optimiser still moves them
    other = fresh(5, torch.float64)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "state.safetensors")
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "state.safetensors"))
    assert shared(other) and torch.equal(outputs(other), outputs(model)) and moves(other)
    # Without the weights, the slices fit only a model with the same order of units.
    slices = {name: value for name, value in fresh(1).state_dict().items() if "slice_" in name}
    with pytest.raises(RuntimeError, match="another order of units"):
        fresh(0).load_state_dict(slices, strict=False)
    host = next(iter(adapter_layers(model).values()))
    host.slice_values.data = host.slice_values.detach().clone()
    before = outputs(model)
    with pytest.raises(UserError, match="no longer follows its weight"):
        check_slices(model)
    with torch.no_grad():
        host.slice_values.mul_(5.0)
    assert not torch.allclose(outputs(model), before)  # the values of p are used even so


@pytest.mark.parametrize("mode", ["permute", "index"])
def test_half_precision_weights_are_trained_through_an_fp32_master(mode: str) -> None:
    """Steps of 2e-5 on weights of 0.02 vanish in bf16; a hundred of them do not."""
    model = tiny_vit().to(torch.bfloat16)
    stock = snapshot(model)
    vismt.adapt(model, "s2ft", ratio=0.25, mode=mode)
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
    half = tiny_vit().to(torch.bfloat16)
    vismt.adapt(half, "s2ft", ratio={"u": 0.25}, dtype="bfloat16")
    assert half.blocks[0].mlp.fc1.shares


@pytest.mark.parametrize(
    "mode,dtype", [("index", torch.float32), ("permute", torch.bfloat16), ("index", torch.bfloat16)]
)
def test_a_state_dict_right_after_a_step_holds_it_in_the_weight_too(mode: str, dtype: torch.dtype) -> None:
    model = tiny_vit().to(dtype)
    vismt.adapt(model, "s2ft", ratio=0.25, mode=mode, parts=EVERY)
    before = snapshot(model)
    outputs(model).float().square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    after = snapshot(model)
    outputs(model)  # writes the pending step into the weight
    assert holds(model, after)
    changed = {
        path: not torch.equal(after[f"{path}.weight"], before[f"{path}.weight"]) for path in adapter_layers(model)
    }
    host = model.blocks[0].mlp.fc2
    assert len(changed) == 8 and all(changed.values()) and not host.shares
    weight = host.weight.detach().clone()
    host.slice_values.data = host.slice_values.detach() + 1.0  # replaced by hand: the weight no longer follows it
    assert torch.equal(model.state_dict()["blocks.0.mlp.fc2.weight"], weight)


@pytest.mark.parametrize("mode", ["permute", "index", "delta"])
def test_a_cast_of_a_half_precision_model_leaves_its_master(mode: str) -> None:
    """to(bfloat16), which changes no weight, must not round the trained values; after float() there is no separate master."""
    model = tiny_vit().to(torch.bfloat16)
    vismt.adapt(model, "s2ft", ratio=0.25, mode=mode)
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
    vismt.adapt(half, "s2ft", ratio=0.25, dtype="bfloat16", mode=mode)
    half.to(torch.float16)
    assert half.blocks[0].mlp.fc2.slice_values.dtype == torch.float16


def test_parameters_from_outside_are_used_and_leave_the_weight_alone() -> None:
    """functional_call, as in the inner loops of meta-learning, with a second derivative."""
    for mode in ("permute", "index"):
        model = tiny_vit()
        vismt.adapt(model, "s2ft", ratio=0.25, mode=mode, parts=EVERY)
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


def test_delta_mode_trains_under_fsdp() -> None:
    """Sharded parameters are gathered and freed around each block; in one process the steps equal those without FSDP."""
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def trained(sharded: bool) -> tuple[list[float], Tensor]:
        model = tiny_vit()
        vismt.adapt(model, "s2ft", ratio=0.25, parts=EVERY, mode="delta")
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


@pytest.mark.parametrize("mode", ["permute", "index"])
def test_compiled_training_moves_the_model(mode: str) -> None:
    torch.compiler.reset()
    holder = nn.Module()
    holder.fc1, holder.fc2 = nn.Linear(4, 12), nn.Linear(12, 4)
    vismt.adapt(holder, "s2ft", ratio=0.25, mode=mode, parts=["d"])
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


def test_trained_biases_move_with_their_units_and_come_back(tmp_path: Path) -> None:
    model = tiny_vit()
    vismt.adapt(model, "s2ft", ratio=0.25, also_train=["blocks.0.mlp.fc1.bias", "blocks.0.mlp.fc2.bias"])
    shake(model)
    vismt.save_adapter(model, tmp_path)
    loaded = vismt.load_adapter(tiny_vit(), tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    vismt.unadapt(model)
    assert holds(model, tiny_vit().state_dict())


def test_units_that_cannot_be_reordered_are_refused_and_index_mode_takes_them() -> None:
    model = tiny_vit()
    model.blocks[1].attn.sinks = nn.Parameter(torch.zeros(4))
    before = snapshot(model)
    with pytest.raises(UserError, match=r"'blocks\.1\.attn' cannot be reordered: it has 'sinks' .*mode='index'"):
        vismt.adapt(model, "s2ft")
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert isinstance(model.blocks[0].attn.proj, nn.Linear)
    vismt.adapt(model, "s2ft", mode="index")


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


def test_parameters_of_an_activation_move_with_the_units_or_keep_them_in_order() -> None:
    class Scaled(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.linspace(1, 2, count))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x.relu()

    class FFN(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(4, 6), Scaled(count), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.act(self.fc1(x)))

    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    shared = FFN(1)  # one value for all units
    before = shared(x)
    vismt.adapt(shared, "s2ft", ratio=0.5, parts=["d"])
    assert torch.allclose(shared(x), before, atol=1e-6)
    with pytest.raises(UserError, match=r"it has 'act\.scale' beside its projections; use mode='index'"):
        vismt.adapt(FFN(6), "s2ft", ratio=0.5, parts=["d"])


def test_heads_of_several_broken_groups_are_trained_like_any_other() -> None:
    """They cannot be contiguous, so their values are stored separately; gradients and steps equal those of index mode."""
    model, other = broken_groups(), broken_groups()
    expected = outputs(model)
    vismt.adapt(model, "s2ft", selection=BROKEN)
    vismt.adapt(other, "s2ft", selection=BROKEN, mode="index")
    for layer in model.model.layers:
        host = layer.self_attn.o_proj
        assert host.span is None and not host.shares and layer.self_attn.v_proj.shares and layer.mlp.down_proj.span
        assert not torch.equal(host.slice_order, torch.arange(16, dtype=torch.int32))
    assert torch.allclose(outputs(model), expected, atol=1e-5 * float(expected.detach().abs().max()))
    move(model, 0.02)
    loss(model).backward()
    full, hosts = full_gradients(model), adapter_layers(model)
    assert len(hosts) == 7
    for path, host in hosts.items():
        wanted = full[path].index_select(host.dim, host.slice_index)
        assert torch.allclose(host.slice_values.grad, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max())), path
        assert wanted.abs().amax(1 - host.dim).min() > 0, path
    model.zero_grad(set_to_none=True)
    move(other, 0.02)
    assert train(model, 4) == pytest.approx(train(other, 4), abs=1e-4)


def test_files_of_several_broken_groups_are_exact(tmp_path: Path) -> None:
    model, stock = broken_groups(), snapshot(broken_groups())
    vismt.adapt(model, "s2ft", selection=BROKEN)
    train(model, 4)
    expected = outputs(model)
    near = 1e-5 * float(expected.detach().abs().max())
    folder = vismt.save_adapter(model, tmp_path)
    assert torch.equal(outputs(model), expected)  # saving restores the order
    assert torch.equal(outputs(vismt.load_adapter(broken_groups(), folder)), expected)
    switched = switch(broken_groups(), read_slices(folder))
    merged = vismt.merge(vismt.load_adapter(broken_groups(), folder))
    assert torch.allclose(outputs(switched), expected, atol=near) and torch.allclose(
        outputs(merged), expected, atol=near
    )
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
        ({"mode": "indx"}, "adapt.mode: no 'indx'.*'index'"),
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
