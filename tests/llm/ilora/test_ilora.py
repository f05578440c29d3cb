"""iLoRA against loops over samples and experts, plain LoRA and peft, on language models and a ViT."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from helpers.adapter_folders import write_description
from helpers.language_models import LMS, padded, relative, stock, tiny_lm, tokens
from helpers.tiny import holds, images, shake, snapshot, tiny_vit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vismt
from vismt.base.errors import UserError
from vismt.llm import gate_of, instance_gates, recompute_gates
from vismt.lowrank.layers.base import adapter_layers
from vismt.lowrank.layers.forms import LowRankConv, LowRankLinear

KINDS = (*LMS, "vit")
WIDTH = 6


def adapted(kind: str, **options: object) -> nn.Module:
    """Return an adapted fp64 model, by default rank 4 in 2 experts, with random factors.

    The gate keeps its start values: a random ResNet would saturate.
    """
    model = stock(kind).double()
    vismt.adapt(model, "ilora", **{"rank": 4, "n_experts": 2, "alpha": 8.0, "user_width": WIDTH, **options})
    gate = snapshot(model.instance_gate)
    shake(model, 0.2).instance_gate.load_state_dict(gate)
    return model


def samples(kind: str, count: int = 3) -> Tensor:
    return images(count).double() if kind == "vit" else tokens(count)


def run(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


def users(count: int = 3, seed: int = 5) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_gates(count: int = 3, experts: int = 2, seed: int = 3) -> Tensor:
    drawn = torch.randn(count, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * drawn).softmax(-1)


def host(
    experts: int | None = 2, rank: int = 4, blocks: tuple[int, ...] | None = None, **options: object
) -> LowRankLinear:
    """Return an adapted 5 -> 6 linear layer in fp64 with random tensors."""
    torch.manual_seed(0)
    layer = LowRankLinear(nn.Linear(5, 6).double(), rank, 1.5, blocks=blocks, experts=experts, **options)
    layer.weight.requires_grad_(False)
    with torch.no_grad():
        layer.lora_A.normal_(), layer.lora_B.normal_()
    return layer


def by_loops(layer: LowRankLinear, x: Tensor, gates: Tensor) -> Tensor:
    """Return the output for x (b, n, i), one sample, one block and one expert at a time."""
    rows, r = [], layer.rank // layer.experts
    for sample, gate in zip(x, gates):
        parts = []
        for A, B in zip(layer.lora_A.chunk(len(layer.blocks)), layer.lora_B.split(layer.blocks)):
            pairs = [(B[:, e * r : (e + 1) * r], A[e * r : (e + 1) * r]) for e in range(layer.experts)]
            parts.append(sum(g * (sample @ a.T @ b.T) for g, (b, a) in zip(gate, pairs)))
        rows.append(sample @ layer.weight.T + layer.bias + layer.scale * torch.cat(parts, 1))
    return torch.stack(rows)


# ---- I1: the gate


@pytest.mark.parametrize("gate", ["linear", "cnn"])
def test_i1_gates_are_a_simplex_and_the_gate_network_trains(gate: str) -> None:
    model = adapted("llama", gate=gate)
    gates = gate_of(model)(users())
    assert gates.shape == (3, 2) and bool((gates >= 0).all()) and torch.allclose(gates.sum(1), torch.ones(3).double())
    assert not torch.allclose(gates[0], gates[1])
    with instance_gates(gates):
        run(model, samples("llama"))[..., 0].sum().backward()
    for name, parameter in gate_of(model).named_parameters():
        assert parameter.requires_grad and parameter.grad.abs().sum() > 0, name


def test_i1_linear_gate_by_hand() -> None:
    model = adapted("vit")
    linear, x = gate_of(model).network, users()
    logits = x @ linear.weight.T + linear.bias
    assert torch.allclose(gate_of(model)(x), logits.exp() / logits.exp().sum(1, keepdim=True), atol=1e-14)


def test_i1_sizes_are_the_published_ones() -> None:
    model = tiny_vit()
    report = vismt.adapt(model, "ilora", rank=8, gate="cnn", alpha=32)
    gate = gate_of(model)
    assert sum(p.numel() for p in gate.parameters()) == 90_772 and len(list(gate.buffers())) == 57
    plain = vismt.adapt(tiny_vit(), "lora", rank=8)
    assert report.trainable - plain.trainable == 90_772 and "cnn gate, 64 to 4 rank groups   90,772" in str(report)
    linear = vismt.adapt(tiny_vit(), "ilora", rank=8, alpha=32)
    assert linear.trainable - plain.trainable == 64 * 4 + 4
    # rank 8 in 4 experts of rank 2: 32 / 2
    assert {site.settings.scale for site in linear.specs} == {16.0}


def test_start_is_the_original_function_under_any_gates_and_leaves_the_global_generator() -> None:
    torch.manual_seed(4)
    model = tiny_lm("gpt2")
    before = torch.get_rng_state()
    vismt.adapt(model, "ilora", rank=4, user_width=WIDTH)
    assert torch.equal(before, torch.get_rng_state())
    with instance_gates(5 * some_gates(3, 4)):
        assert torch.allclose(run(model, tokens(3)), run(tiny_lm("gpt2"), tokens(3)), atol=1e-5)
    again, other = tiny_lm("gpt2"), tiny_lm("gpt2")
    vismt.adapt(again, "ilora", rank=4, user_width=WIDTH)
    vismt.adapt(other, "ilora", rank=4, user_width=WIDTH, seed=1)
    weights = [gate_of(net).network.weight for net in (model, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# ---- I2: the gated product


@pytest.mark.parametrize("options", [{}, {"blocks": (2, 2, 2), "rank": 2}, {"experts": 4}, {"experts": 1}])
def test_i2_host_equals_loops_with_all_gradients(options: dict) -> None:
    ours, theirs = host(**options), host(**options)
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gates = some_gates(3, ours.experts) * 1.7
    leaves = [[tensor.clone().requires_grad_() for tensor in (x, gates)] for _ in range(2)]
    with instance_gates(leaves[0][1]):
        actual = ours(leaves[0][0])
    expected = by_loops(theirs, *leaves[1])
    assert torch.allclose(actual, expected, rtol=0, atol=1e-12)
    for out in (actual, expected):
        out.square().sum().backward()
    pairs = [*zip(*leaves), (ours.lora_A, theirs.lora_A), (ours.lora_B, theirs.lora_B)]
    for tensor_ours, tensor_loops in pairs:
        assert (
            torch.allclose(tensor_ours.grad, tensor_loops.grad, rtol=1e-11, atol=1e-11)
            and tensor_loops.grad.abs().max() > 0
        )


def test_i2_gradients_of_gradients() -> None:
    layer, x = host(blocks=(2, 4), rank=2), torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    gates = some_gates(2).requires_grad_()

    def function(x: Tensor, gates: Tensor, A: Tensor, B: Tensor) -> Tensor:
        with instance_gates(gates):
            return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, (x,))

    inputs = (x, gates, layer.lora_A.detach().requires_grad_(), layer.lora_B.detach().requires_grad_())
    assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_i2_a_batch_is_its_samples_one_by_one(kind: str) -> None:
    model, x, gates = adapted(kind), samples(kind), some_gates()
    with instance_gates(gates):
        together = run(model, x)
    for i in range(3):
        for sample_gates in (gates[i], gates[i : i + 1]):
            with instance_gates(sample_gates):
                assert torch.allclose(run(model, x[i : i + 1])[0], together[i], rtol=0, atol=1e-11)
        with instance_gates(gates[i - 1]):
            assert not torch.allclose(run(model, x[i : i + 1])[0], together[i], rtol=0, atol=1e-4)


def test_i2_convolution_and_dropout() -> None:
    torch.manual_seed(0)
    base = nn.Conv2d(2, 4, 3, padding=1).double()
    conv = LowRankConv(base, 2, 1.5, experts=2)
    with torch.no_grad():
        conv.lora_A.normal_(), conv.lora_B.normal_()
    x, gates = torch.randn(2, 2, 4, 4, dtype=torch.float64), some_gates(2)
    for i in range(2):
        delta = 1.5 * (conv.lora_B * gates[i]) @ conv.lora_A
        with instance_gates(gates):
            output = conv(x)[i : i + 1]
        expected = torch.conv2d(x[i : i + 1], base.weight + delta.view_as(base.weight), base.bias, padding=1)
        assert torch.allclose(output, expected, atol=1e-12)
    dropped = host(dropout=1e-9).train()  # the dropout path with a rate close to 0
    tokens_of = torch.randn(2, 3, 5, dtype=torch.float64)
    with instance_gates(gates):
        assert torch.allclose(dropped(tokens_of), by_loops(dropped, tokens_of, gates), atol=1e-7)


def test_an_empty_batch() -> None:
    with instance_gates(torch.zeros(0, 2).double().requires_grad_()):
        out = host()(torch.zeros(0, 3, 5).double())
    out.sum().backward()
    assert out.shape == (0, 3, 6)


# ---- I3, I4: special gates


@pytest.mark.parametrize("kind", KINDS)
def test_i3_a_uniform_gate_is_lora(kind: str) -> None:
    model, plain, x = adapted(kind, rank=8, n_experts=4, alpha=32.0), stock(kind).double(), samples(kind)
    vismt.adapt(plain, "lora", rank=8, alpha=32.0)
    for path, twin in adapter_layers(plain).items():
        twin.fill(model.get_submodule(path).tensors())
    assert {site.settings.scale for site in plain.vismt_record.layers} == {4.0}
    with instance_gates(torch.full((3, 4), 0.25).double()):
        out = run(model, x)
    assert torch.allclose(out, run(plain, x), rtol=0, atol=1e-11)
    out.square().sum().backward(), run(plain, x).square().sum().backward()
    for path, twin in adapter_layers(plain).items():
        assert relative(model.get_submodule(path).lora_A.grad, twin.lora_A.grad) < 1e-9
        assert relative(model.get_submodule(path).lora_B.grad, twin.lora_B.grad) < 1e-9


def test_i4_a_one_hot_gate_is_one_expert() -> None:
    model, plain, x = adapted("llama", rank=8, n_experts=4, alpha=32.0), tiny_lm("llama").double(), tokens(3)
    vismt.adapt(plain, "lora", rank=2, alpha=32.0)  # alpha / r_e = 16
    for path, twin in adapter_layers(plain).items():
        gated = model.get_submodule(path)
        twin.fill({"lora_A": gated.lora_A[4:6], "lora_B": gated.lora_B[:, 4:6]})
    with instance_gates(torch.eye(4).double()[2]):
        assert torch.allclose(run(model, x), run(plain, x), rtol=0, atol=1e-11)


# ---- I5: samples do not influence each other


@pytest.mark.parametrize("gate,train,alone", [("linear", True, True), ("cnn", False, True), ("cnn", True, False)])
def test_i5_permuting_the_batch_permutes_the_outputs(gate: str, train: bool, alone: bool) -> None:
    model, x, who = adapted("llama", gate=gate).train(train), tokens(3), users()
    order = torch.tensor([2, 0, 1])

    def through(x: Tensor, who: Tensor) -> Tensor:
        with torch.no_grad(), instance_gates(gate_of(model)(who)):
            return run(model, x)

    assert torch.allclose(through(x[order], who[order]), through(x, who)[order], atol=1e-10)
    # Other samples of the batch change nothing, except through the batch norms of the shipped gate while it trains.
    mates = torch.cat([who[:1], users(2, seed=9)])
    assert torch.allclose(through(x, mates)[0], through(x, who)[0], atol=1e-10) == alone


# ---- I6: cost


def test_i6_nothing_is_built_or_kept_for_each_expert() -> None:
    def cost(experts: int | None) -> tuple[int, int, int]:
        layer = LowRankLinear(nn.Linear(64, 96), 8, 1.0, experts=experts)
        layer.weight.requires_grad_(False), layer.bias.requires_grad_(False)
        layer.lora_B.data.normal_()
        sizes, saved, calls = [0], {}, [0]

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                calls[0] += 1
                sizes.extend(
                    value.numel() for value in (out if isinstance(out, tuple) else (out,)) if isinstance(value, Tensor)
                )
                return out

        def keep(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x, gates = torch.ones(4, 50, 64, requires_grad=True), torch.rand(4, experts or 1, requires_grad=True)
        with instance_gates(gates), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), Watch():
            layer(x).square().sum().backward()
        return max(sizes), sum(saved.values()), calls[0]

    plain, two, four = cost(None), cost(2), cost(4)
    assert two[0] == four[0] == plain[0] == 4 * 50 * 96 and two[2] == four[2]
    assert 0 <= two[1] - plain[1] <= 4 * 8 * 4 * 2 >= four[1] - plain[1]  # the rows of gates, fp32


# ---- I7: files


@pytest.mark.parametrize("gate", ["linear", "cnn"])
def test_i7_files_bring_back_every_bit_of_the_gates(gate: str, tmp_path) -> None:
    model = adapted("gpt2", gate=gate).train()
    for seed in range(3):  # moves the running statistics
        gate_of(model)(users(8, seed) * 3 + 1)
    model.eval()
    vismt.save_adapter(model, tmp_path)
    fresh = vismt.load_adapter(tiny_lm("gpt2").double(), tmp_path).eval()
    again = vismt.load_adapter(adapted("gpt2", gate=gate, seed=3), tmp_path).eval()
    for other in (fresh, again):
        assert torch.equal(gate_of(other)(users()), gate_of(model)(users()))
        with instance_gates(gate_of(model)(users())):
            assert torch.equal(run(other, tokens(3)), run(model, tokens(3)))
        assert list(other.state_dict()) == list(model.state_dict())
    assert gate == "linear" or not torch.equal(gate_of(adapted("gpt2", gate=gate))(users()), gate_of(model)(users()))
    assert all(p.requires_grad for p in gate_of(fresh).parameters())
    with pytest.raises(UserError, match="already carries another 'ilora'"):
        vismt.load_adapter(adapted("gpt2", gate=gate, n_experts=4), tmp_path)


def test_i7_damaged_files_are_refused(tmp_path) -> None:
    vismt.save_adapter(adapted("gpt2"), tmp_path)
    text = (tmp_path / "adapter.json").read_text()
    for change in ('"experts": 3', '"experts": 0', '"experts": "two"'):
        (tmp_path / "adapter.json").write_text(text.replace('"experts": 2', change))
        with pytest.raises(UserError, match=r"not what vismt\.save_adapter writes"):
            vismt.load_adapter(tiny_lm("gpt2").double(), tmp_path)
    description = json.loads(text)
    description["parts"]["instance_gate"]["settings"]["kind"] = "cnm"
    write_description(tmp_path, description)
    with pytest.raises(UserError, match=r"gate: 'cnm'\. Near: 'cnn'"):
        vismt.load_adapter(tiny_lm("gpt2").double(), tmp_path)


# ---- I8: gates that do not fit


@pytest.mark.parametrize("gates,message", [
    (some_gates(2), "gates of 2 samples for a batch of 4; give one row for each sample"),
    (some_gates(1), "gates of 1 samples for a batch of 4"), (some_gates(8), "gates of 8 samples for a batch of 4"),
    (some_gates(4, 3), r"gates are \(4, 3\), this model has 2 experts"),
    (some_gates(4, 1)[:, 0], r"gates are \(4,\), this model has 2 experts"),
])  # fmt: skip
def test_i8_gates_that_do_not_match_the_batch_are_an_error(gates: Tensor, message: str) -> None:
    model = adapted("llama")
    with instance_gates(gates), pytest.raises(UserError, match=message):
        run(model, tokens(4))
    with instance_gates(gates), pytest.raises(UserError, match=message), torch.no_grad():
        run(model, tokens(4))


def test_i8_a_model_without_gates_is_refused() -> None:
    with pytest.raises(UserError, match=r"no gates are given; run it under 'with vismt.llm.instance_gates\(gates\):'"):
        run(adapted("vit"), samples("vit"))


@pytest.mark.parametrize("gates,message", [
    (torch.ones(2, 2, dtype=torch.long), r"torch.int64 \(2, 2\)"), (torch.ones(2, 3, 2), r"torch.float32 \(2, 3, 2\)"),
    (torch.tensor(1.0), r"torch.float32 \(\)"), ([[0.5, 0.5]], "list"),
])  # fmt: skip
def test_i8_malformed_gates_are_refused(gates: object, message: str) -> None:
    with pytest.raises(UserError, match=f"instance_gates: gates are {message}, needed a floating tensor"):
        instance_gates(gates)


# ---- I9: merging


@pytest.mark.parametrize("what", ["merge", "export_peft"])
def test_i9_merging_without_one_users_gates_is_refused_and_changes_nothing(what: str, tmp_path) -> None:
    model = adapted("llama")
    before = snapshot(model)

    def merging() -> None:
        vismt.merge(model) if what == "merge" else vismt.export_peft(model, tmp_path)

    with pytest.raises(UserError, match=f"{what}: the rank groups .* one user's gates"):
        merging()
    with instance_gates(some_gates(3)), pytest.raises(UserError, match=f"{what}: gates of 3 samples; .* one user"):
        merging()
    with instance_gates(some_gates(1, 4)), pytest.raises(UserError, match="this model has 2 experts"):
        merging()
    assert holds(model, before)
    assert adapter_layers(model) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_i9_merged_for_a_user_is_the_model_under_the_users_gates(kind: str) -> None:
    model, x, gates = adapted(kind), samples(kind), some_gates()
    with instance_gates(gates):
        together = run(model, x)
    for i in range(3):
        mine = copy.deepcopy(model)
        with instance_gates(gates[i] if i else gates[:1]):
            vismt.merge(mine)
        assert torch.allclose(run(mine, x)[i], together[i], rtol=0, atol=1e-10)  # and the merged model needs no gates
        fresh = stock(kind).double()
        fresh.load_state_dict(mine.state_dict(), strict=True)
        assert [type(module) for module in fresh.modules()] == [type(module) for module in mine.modules()]


def test_i9_merging_rounds_once() -> None:
    torch.manual_seed(0)
    layer = LowRankLinear(nn.Linear(5, 6, dtype=torch.bfloat16), 4, 2.0, experts=2)
    for factor in (layer.lora_A, layer.lora_B):
        factor.data.normal_()
    gates = torch.tensor([0.3, 0.7])
    delta = 2.0 * (layer.lora_B * gates.repeat_interleave(2)) @ layer.lora_A
    with instance_gates(gates):
        merged, exact = layer.merged().weight, layer.weight.double() + delta.double()
    # Half a unit in the last place of bf16; fp32 sums differ in their last place at most.
    half = 2.0 ** (exact.abs().log2().floor() - 8)
    assert ((merged.double() - exact).abs() <= half * (1 + 1e-4)).all()
    twice = layer.weight + delta.to(torch.bfloat16)
    assert ((twice.double() - exact).abs() > half * (1 + 1e-4)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_unadapt_gives_back_every_bit_and_every_attribute(kind: str) -> None:
    original, model = stock(kind).double(), adapted(kind, gate="cnn")
    assert holds(vismt.unadapt(model), original.state_dict())
    assert set(model.__dict__) == set(original.__dict__) and set(model._modules) == set(original._modules)
    vismt.adapt(model, "ilora", rank=4, user_width=WIDTH)  # and again


# ---- I14: generation


@pytest.mark.parametrize("kind", LMS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_i14_generation_repeats_the_gates(kind: str, options: dict) -> None:
    model, gates, ids = adapted(kind), some_gates(2, seed=11), tokens(2, 5)
    assert (gates[0] - gates[1]).abs().max() > 0.3
    plan = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    each = options.get("num_return_sequences", 1)

    def write(ids: Tensor, row_gates: Tensor) -> Tensor:
        with instance_gates(row_gates):
            return model.generate(ids, attention_mask=torch.ones_like(ids), **plan)

    together = write(ids, gates)
    alone = torch.cat([write(ids[i : i + 1], gates[i : i + 1]) for i in range(2)])
    assert torch.equal(together, alone) and len(together) == 2 * each
    assert not torch.equal(together, write(ids, gates.flip(0)))  # the gates change the output
    with instance_gates(gates):
        model.generate(ids, attention_mask=torch.ones_like(ids), **plan)
        run(model, ids)  # the original batch, afterwards
        with pytest.raises(UserError, match="gates of 2 samples for a batch of 10"):
            run(model, tokens(10))


def test_i14_sampled_sequences_and_padding_on_the_left() -> None:
    model, gates = adapted("llama"), some_gates(2, seed=11)
    rows = padded((6, 4))
    ids, mask = (rows[key].flip(1) for key in ("input_ids", "attention_mask"))
    with instance_gates(gates):
        torch.manual_seed(0)
        options = {
            "max_new_tokens": 4,
            "do_sample": True,
            "num_return_sequences": 3,
            "pad_token_id": 0,
            "eos_token_id": None,
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        generated = model.generate(ids, attention_mask=mask, **options)
    repeated = gates.repeat_interleave(3, 0)
    with instance_gates(repeated):
        wide = mask.repeat_interleave(3, 0)
        place = (wide.cumsum(1) - 1).clamp(min=0)
        first = model(ids.repeat_interleave(3, 0), attention_mask=wide, position_ids=place).logits[:, -1]
    assert torch.allclose(generated.logits[0].double(), first, atol=1e-4)


def test_i14_copies_expand_their_own_model() -> None:
    model, gates, ids = adapted("llama"), some_gates(2), tokens(2, 5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin._expand_inputs_for_generation.model is twin
        with instance_gates(gates):
            assert twin.generate(ids, num_beams=2, max_new_tokens=2, pad_token_id=0).shape[0] == 2


# ---- the context


def test_nothing_is_left_behind_and_blocks_nest() -> None:
    outer, inner = instance_gates(some_gates(3)), instance_gates(some_gates(2))
    with outer:
        with pytest.raises(ZeroDivisionError), inner:
            assert instance_gates._current.get() is inner is instance_gates._traced.scope
            raise ZeroDivisionError
        assert instance_gates._current.get() is outer is instance_gates._traced.scope
    assert instance_gates._current.get() is None and instance_gates._traced.scope is None


def test_threads_and_tasks_see_their_own_gates() -> None:
    layer, x = host(), torch.ones(1, 1, 5).double()
    gates = [torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()]
    expected = []
    for one_hot in gates:
        with instance_gates(one_hot):
            expected.append(layer(x).detach())
    barrier, thread_results = threading.Barrier(2, timeout=20), [None, None]

    def work(i: int) -> None:
        with instance_gates(gates[i]):
            barrier.wait()
            thread_results[i] = layer(x).detach()
            barrier.wait()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert torch.equal(thread_results[0], expected[0]) and torch.equal(thread_results[1], expected[1])

    async def task(i: int) -> Tensor:
        with instance_gates(gates[i]):
            await asyncio.sleep(0)
            out = layer(x).detach()
            await asyncio.sleep(0)
            return out

    async def both() -> list[Tensor]:
        return await asyncio.gather(task(0), task(1))

    results = asyncio.run(both())
    assert torch.equal(results[0], expected[0]) and torch.equal(results[1], expected[1])


def test_checkpointed_blocks_see_the_gates_of_their_forward_pass() -> None:
    plain, saving = adapted("llama").train(), adapted("llama").train()
    saving.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": recompute_gates}
    )
    gates = [some_gates().requires_grad_() for _ in range(2)]
    losses = []
    for model, model_gates in zip((plain, saving), gates):
        with instance_gates(model_gates):
            losses.append(run(model, tokens(3)).square().mean())
    losses[0].backward()
    thread = threading.Thread(target=losses[1].backward)  # another thread, as on an accelerator, after the block
    thread.start(), thread.join()
    assert torch.allclose(gates[0].grad, gates[1].grad, atol=1e-10) and gates[0].grad.abs().max() > 0
    for (name, expected), actual in zip(plain.named_parameters(), saving.parameters()):
        assert expected.grad is None or torch.allclose(expected.grad, actual.grad, atol=1e-10), name


def test_compiled_code_follows_the_gates() -> None:
    torch.compiler.reset()
    layer, x, compilations = host(), torch.randn(3, 2, 5).double(), []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for seed in range(3):
        fast_gates, slow_gates = some_gates(seed=seed).requires_grad_(), some_gates(seed=seed).requires_grad_()
        with instance_gates(fast_gates):
            fast = compiled(x)
        with instance_gates(slow_gates):
            slow = layer(x)
        assert torch.allclose(fast, slow, atol=1e-12)
        fast.square().sum().backward(), slow.square().sum().backward()
        assert torch.allclose(fast_gates.grad, slow_gates.grad, atol=1e-12)
    assert len(compilations) == 1


# ---- options


@pytest.mark.parametrize("options,message", [
    ({"n_experts": 3}, "3 experts cannot share the rank 8 of"), ({"n_experts": 0}, "adapt.n_experts: 0"),
    ({"n_experts": 2.0}, "adapt.n_experts: 2.0"), ({"gate": "lineer"}, "adapt.gate: 'lineer'. Near: 'linear'"),
    ({"user_width": 0}, "adapt.user_width: 0"), ({"experts": 2}, "'ilora' has no option 'experts'"),
])  # fmt: skip
def test_options_that_cannot_be(options: dict, message: str) -> None:
    model = tiny_vit()
    with pytest.raises(UserError, match=message):
        vismt.adapt(model, "ilora", rank=8, **options)
    assert list(model.state_dict()) == list(tiny_vit().state_dict()) and not hasattr(model, "vismt_record")


def test_gate_networks_say_what_they_need() -> None:
    model = adapted("vit", gate=None)
    with pytest.raises(UserError, match="no gate network; adapt it with 'ilora' and gate='linear'"):
        gate_of(model)
    with pytest.raises(UserError, match="adapted without a gate network"):
        model.instance_gate(users())
    with pytest.raises(UserError, match=r"user representations are \(3, 7\), needed \(samples, 6\)"):
        gate_of(adapted("vit"))(torch.ones(3, 7))
    taken = tiny_vit()
    taken.instance_gate = nn.Linear(2, 2)
    with pytest.raises(UserError, match="already has a 'instance_gate', a Linear"):
        vismt.adapt(taken, "ilora")
