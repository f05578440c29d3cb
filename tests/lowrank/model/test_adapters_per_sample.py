"""Batches with an adapter for each sample: peft's mixed batches as the oracle, generation, compilation, mixtures, and errors."""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers.language_models import LMS, relative, tiny_lm, tokens
from helpers.tiny import images, shake, tiny_vit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vismt
from vismt.base.errors import UserError
from vismt.llm import instance_gates, recompute_gates
from vismt.lowrank.model.mixed import MixedLinear

NAMES = ["a", "b", None, "c", "a"]
RANKS = {"a": 2, "b": 5, "c": 3}


def carrying(model: nn.Module) -> nn.Module:
    """Put three LoRA adapters of different ranks and scales on a model, the last one on its second block alone."""
    for seed, (name, rank) in enumerate(RANKS.items()):
        targets = r".*\.1\..*" if name == "c" else None
        vismt.adapt(model, "lora", targets, rank=rank, alpha=2.0 * rank, seed=seed, name=name)
        shake(model, 0.1, seed)
    return model


def logits(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("kind", LMS)
def test_peft_computes_the_same_mixed_batch(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ours, ids = carrying(tiny_lm(kind)), tokens(len(NAMES))
    for name in RANKS:
        vismt.export_peft(ours, tmp_path / name, name=name)
    theirs = peft.PeftModel.from_pretrained(tiny_lm(kind), tmp_path / "a", adapter_name="a").eval()
    for name in ("b", "c"):
        theirs.load_adapter(tmp_path / name, adapter_name=name)
    expected = theirs(ids, adapter_names=[name or "__base__" for name in NAMES]).logits
    vismt.activate(ours, ["c", "a", "b"])
    with vismt.adapters_per_sample(NAMES):
        assert relative(logits(ours, ids), expected) < 1e-5
    assert relative(expected[0], logits(tiny_lm(kind), ids)[0]) > 1e-2


def test_a_bias_and_a_linear_that_were_trained_whole_are_mixed_with_the_factors() -> None:
    model, x = tiny_vit(), images(3)
    for seed, also in enumerate(([r"blocks\.0\.attn\.qkv\.bias"], ["head"])):
        vismt.adapt(model, "lora", ["qkv"], rank=2, seed=seed, name="ab"[seed], also_train=also)
        shake(model, 0.1, seed)
    alone = {}
    for name in ("a", "b", None):
        vismt.activate(model, name)
        alone[name] = model(x).detach()
    vismt.activate(model, ["a", "b"])
    with vismt.adapters_per_sample(["b", "a", None]):
        mixed = model(x)
    for row, name in enumerate(("b", "a", None)):
        assert relative(mixed[row], alone[name][row]) < 1e-5
    assert all(relative(alone[name], alone[None]) > 1e-2 for name in "ab")


@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_wrong_number_of_entries_is_refused_where_only_layers_on_windows_are_adapted(count: int) -> None:
    """The layers see 4 windows of each image, so that 1, 2 and 8 entries divide their batch."""
    timm = pytest.importorskip("timm")
    small = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}
    model, x = timm.create_model("swin_tiny_patch4_window7_224", **small).eval(), torch.rand(4, 3, 32, 32)
    for seed, name in enumerate("ab"):
        vismt.adapt(model, "lora", r".*attn\.qkv", rank=2, seed=seed, name=name)
        shake(model, 0.1, seed)
    vismt.activate(model, ["a", "b"])
    for mixed in (model, copy.deepcopy(model)):
        with vismt.adapters_per_sample((["a", "b"] * 4)[:count]), pytest.raises(UserError, match="the batch has 4"):
            mixed(x)
    with vismt.adapters_per_sample(["a", "b", "a", "b"]):
        model(x=x)
    vismt.activate(copied := copy.deepcopy(model), None)
    assert not copied._forward_pre_hooks and not copied._forward_pre_hooks_with_kwargs


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generation_gives_each_prompt_what_its_adapter_gives(options: dict) -> None:
    model, ids = carrying(tiny_lm("llama")), tokens(len(NAMES))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    expected = []
    for row, name in enumerate(NAMES):
        vismt.activate(model, name)
        expected.append(model.generate(ids[row : row + 1], **settings))
    vismt.activate(model, list(RANKS))
    with vismt.adapters_per_sample(NAMES):
        out = model.generate(ids, **settings)
        again = logits(model, ids)
    assert relative(again[2], logits(tiny_lm("llama"), ids)[2]) < 1e-5
    width = max(part.shape[1] for part in expected)
    rows = [nn.functional.pad(part, (0, width - part.shape[1])) for part in expected]
    assert torch.equal(out, torch.cat(rows))
    assert len({tuple(row.tolist()) for row in out}) > 1


def test_several_active_adapters_are_the_sum_of_their_updates(tmp_path: Path) -> None:
    model, ids = carrying(tiny_lm("llama")), tokens()
    folders = [vismt.save_adapter(model, tmp_path / name, name=name) for name in ("a", "c")]
    summed = vismt.lowrank.combine(folders, [1.0, 1.0]).put_on(tiny_lm("llama"))
    vismt.activate(model, ["a", "c"])
    assert relative(logits(model, ids), logits(summed, ids)) < 1e-5
    with vismt.adapters_per_sample([{"a": 1, "c": 1}, {"a": 0.5, "c": -2.0}]):
        mixed = logits(model, ids)
    assert relative(mixed[0], logits(summed, ids)[0]) < 1e-5
    weighted = vismt.lowrank.combine(folders, [0.5, -2.0]).put_on(tiny_lm("llama"))
    assert relative(mixed[1], logits(weighted, ids)[1]) < 1e-5


def test_the_windows_of_a_sample_have_its_adapter() -> None:
    timm = pytest.importorskip("timm")
    small = {"img_size": 56, "embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2), "num_classes": 0}
    model = carrying(timm.create_model("swin_tiny_patch4_window7_224", **small).eval())
    x, expected = torch.rand(len(NAMES), 3, 56, 56), []
    for row, name in enumerate(NAMES):
        vismt.activate(model, name)
        expected.append(model(x[row : row + 1]))
    assert relative(expected[1], expected[2]) > 1e-2
    vismt.activate(model, list(RANKS))
    with vismt.adapters_per_sample(NAMES):
        assert relative(model(x), torch.cat(expected)) < 1e-5
        with pytest.raises(UserError, match="for 5 samples, the batch has 10"):  # the windows are a multiple of 5, too
            model(x.repeat(2, 1, 1, 1))


def test_neighbours_with_one_adapter_share_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = carrying(tiny_lm("llama")), tokens(6)
    seen = []
    factors = MixedLinear.factors

    def watched(layer: MixedLinear, x: Tensor) -> tuple[Tensor, ...]:
        seen.append(len(factors(layer, x)[0]))
        return factors(layer, x)

    monkeypatch.setattr(MixedLinear, "factors", watched)
    vismt.activate(model, list(RANKS))
    for names, groups in ((["a"] * 6, 1), (["a"] * 4 + ["b"] * 2, 3), (["a", "b"] * 3, 6)):
        seen.clear()
        with vismt.adapters_per_sample(names):
            out = logits(model, ids)
        assert set(seen) == {groups}
        reference = [
            logits(vismt.activate(copy.deepcopy(model), name), ids[row : row + 1]) for row, name in enumerate(names)
        ]
        assert relative(out, torch.cat(reference)) < 1e-5


def test_swaps_and_other_names_use_the_compiled_graph() -> None:
    torch.compiler.reset()
    from torch._dynamo.testing import CompileCounterWithBackend

    model = tiny_vit(depth=1)
    for seed, name in enumerate(("a", "b", "c")):
        vismt.adapt(model, "lora", rank=2, seed=seed, name=name)
        shake(model, seed=seed)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def agrees() -> bool:
        return torch.allclose(compiled(images()), model(images()), atol=1e-5)

    with torch.no_grad():
        for name in ("a", "b", "c", "a"):
            vismt.activate(model, name)
            assert agrees()
        assert counter.frame_count == 1
        vismt.activate(model, ["a", "b", "c"])
        for names in (["a", "c", "b"], ["c", None, "c"], ["b", "a", None]):
            with vismt.adapters_per_sample(names):
                assert agrees(), names
        assert counter.frame_count == 2


def test_gradients_reach_the_images_and_half_precision_is_close() -> None:
    model = carrying(tiny_vit())
    vismt.activate(model, list(RANKS))
    x = images(2).requires_grad_()
    with vismt.adapters_per_sample(["a", "c"]):
        (grad,) = torch.autograd.grad(model(x).square().sum(), x)
        half = copy.deepcopy(model).bfloat16()(x.bfloat16())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = model(x)
        exact = model(x)
    assert half.dtype == cast.dtype == torch.bfloat16
    assert relative(half.float(), exact) < 0.05 and relative(cast.float(), exact) < 0.05
    for row, name in enumerate(("a", "c")):
        alone = images(2)[row : row + 1].requires_grad_()
        (expected,) = torch.autograd.grad(vismt.activate(model, name)(alone).square().sum(), alone)
        assert relative(grad[row : row + 1], expected) < 1e-4


def test_a_broken_adapter_spoils_its_own_samples_alone() -> None:
    model = carrying(tiny_vit())
    expected = vismt.activate(model, "b")(images())
    stock = vismt.activate(model, None)(images())
    vismt.activate(model, "a")
    model.blocks[0].mlp.fc1.lora_A.data.fill_(float("nan"))
    vismt.activate(model, ["a", "b"])
    with vismt.adapters_per_sample(["a", "b", None]):
        out = model(images())
    assert out[0].isnan().all()
    assert relative(out[1], expected[1]) < 1e-5 and relative(out[2], stock[2]) < 1e-5


@pytest.mark.parametrize(
    "names,line",
    [
        ("a", "give a list with one entry for each sample"),
        ([], "give a list with one entry for each sample"),
        ([3, "a"], "adapters_per_sample: 3; give a name, None, or a mapping"),
        ([{"a": float("nan")}, "a"], "mapping from names to finite weights"),
        (["a", "x"], r"no model has 'a', 'x' active; call vismt.activate\(model, \[names\]\)"),
        (["a", "b", "a"], "names adapters for 3 samples, the batch has 2"),
    ],
)
def test_entries_that_do_not_fit(names: object, line: str) -> None:
    model = carrying(tiny_lm("llama"))
    vismt.activate(model, ["a", "b"])
    with pytest.raises(UserError, match=line), vismt.adapters_per_sample(names):
        model(tokens(2))


def test_adapters_that_are_activated_inside_the_block_are_refused() -> None:
    model = carrying(tiny_lm("llama"))
    vismt.activate(model, ["a", "b"])
    with vismt.adapters_per_sample(["a", "b"]):
        vismt.activate(model, ["b", "c"])
        with pytest.raises(UserError, match="does not name the active adapters b, c; activate before the block"):
            model(tokens(2))


@pytest.mark.parametrize(
    "method,options,line",
    [
        (
            "lora",
            {"also_train": ["model.norm"]},
            "trained 'model.norm.weight' whole, which is not the weight of one linear",
        ),
        ("pissa", {"quantize": "nf4"}, "cannot be mixed: 'pissa' lies on quantised weights"),
        ("lisa", {"targets": None, "rank": 8}, "trained 'model.embed_tokens.weight' whole"),
        ("ilora", {"rank": 4, "n_experts": 2}, "no gates are given"),
    ],
)
def test_an_adapter_that_cannot_be_mixed_leaves_the_model_as_it_was(method: str, options: dict, line: str) -> None:
    model = carrying(tiny_lm("llama"))
    vismt.adapt(model, method, **{"rank": 2, **options}, name="odd")
    shake(model, 0.1)
    vismt.activate(model, "b")
    before = model(tokens()).logits
    with pytest.raises(UserError, match=line):
        vismt.activate(model, ["a", "odd"])
    assert torch.equal(model(tokens()).logits, before)
    with instance_gates(torch.tensor([0.5, 0.5])):
        alone = vismt.activate(model, "odd")(tokens()).logits
    assert not torch.equal(alone, before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_runs_again_in_a_backward_pass_has_its_adapters_or_is_refused(reentrant: bool) -> None:
    """The sum of all adapters would give another gradient; outside of any block it is what was asked for."""
    model, x, names = carrying(tiny_vit()), images(3).requires_grad_(), ["a", None, "b"]
    vismt.activate(model, ["a", "b"])

    def run(x: Tensor, **options: object) -> Tensor:
        if not options:
            return model(x).square().sum()
        return checkpoint(model, x, use_reentrant=reentrant, **options).square().sum()

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, x)[0] if not reentrant else _backward(loss, x)

    assert relative(gradient(run(x, preserve_rng_state=False)), gradient(run(x))) < 1e-5  # the sum, of no block
    with vismt.adapters_per_sample(names):
        expected = gradient(run(x))
        assert relative(gradient(run(x, preserve_rng_state=False)), expected) < 1e-5
        lost = run(x, preserve_rng_state=False)
        kept = None if reentrant else run(x, context_fn=recompute_gates)
    with pytest.raises(UserError, match=r"a backward pass runs it again .* context_fn=vismt\.llm\.recompute_gates\.$"):
        gradient(lost)
    if kept is not None:
        assert relative(gradient(kept), expected) < 1e-5
    assert relative(gradient(run(x)), expected) > 1e-3


def test_a_forward_that_may_run_again_is_refused_where_torch_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = vismt.activate(carrying(tiny_vit()), ["a", "b"]), images(3)
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    model(x)
    with vismt.adapters_per_sample(["a", None, "b"]):
        model(x)
    with pytest.raises(UserError, match="a backward pass runs it again"):
        model(x)
    with torch.no_grad():
        model(x)


def _backward(loss: Tensor, x: Tensor) -> Tensor:
    x.grad = None
    loss.backward()
    return x.grad


def test_a_thread_inside_the_block_sees_the_adapters_or_is_refused() -> None:
    model, x, names = carrying(tiny_vit()), images(3), ["a", None, "b"]
    vismt.activate(model, ["a", "b"])
    results: list[object] = []

    def answer(block: bool) -> None:
        try:
            with vismt.adapters_per_sample(names) if block else nullcontext():
                results.append(model(x))
        except UserError as error:
            results.append(str(error))

    added = model(x)
    with vismt.adapters_per_sample(names):
        expected = model(x)
        for block in (False, True):
            thread = threading.Thread(target=answer, args=(block,))
            thread.start(), thread.join()
    assert "is in force in another thread or task, and not here; open a block here as well" in str(results[0])
    assert torch.equal(results[1], expected) and torch.equal(model(x), added)
    other = carrying(tiny_vit())
    vismt.activate(other, ["c", "a"])
    with vismt.adapters_per_sample(["c"] * 3), pytest.raises(UserError, match="does not name the active adapters a, b"):
        model(x)
