"""Recomputed activations: the same gradients from fewer kept bytes, and errors in place of stale values."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.language_models import random_lm, tokens
from helpers.tiny import images, shake, tiny_vit
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import vismt
from scripts.bench.accounting import kept_bytes, saved_activation_bytes
from vismt.base.errors import UserError

Loss = Callable[[nn.Module], Tensor]
METHODS = {
    "lora": {},
    "pissa": {},
    "emtal": {"n_experts": 4},
    "s2ft": {"ratio": 0.25},
    "ilora": {"n_experts": 2, "gate": None},
}


def vit(method: str | None = "lora", **options: object) -> nn.Module:
    model = tiny_vit(**options).train()
    if method is not None:
        vismt.adapt(model, method, **({} if method == "s2ft" else {"rank": 2}), **METHODS[method])
    return shake(model)


def llama(method: str | None = "lora", **changes: object) -> nn.Module:
    model = random_lm("llama", **changes).train()
    if method is not None:
        vismt.adapt(model, method, **({} if method == "s2ft" else {"rank": 2}), **METHODS[method])
    return shake(model)


def vit_loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(images()).float(), torch.arange(3))


def llama_loss(model: nn.Module) -> Tensor:
    return model(input_ids=tokens(), labels=tokens()).loss


def gradients(model: nn.Module, loss: Loss, recompute: bool, inside: bool = True) -> dict[str, Tensor]:
    model.zero_grad()
    if recompute:
        with vismt.recompute(model):
            value = loss(model)
            if inside:
                value.backward()
        if not inside:
            value.backward()
    else:
        loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model: nn.Module, loss: Loss, **options: bool) -> None:
    expected, actual = gradients(model, loss, False), gradients(model, loss, True, **options)
    assert expected and expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name


def kept(model: nn.Module, loss: Loss) -> tuple[int, int]:
    """Return the bytes that are kept for backward without and with recomputation."""

    def recomputed() -> Tensor:
        with vismt.recompute(model):
            return loss(model)

    return kept_bytes(lambda: loss(model)), kept_bytes(recomputed)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("method", [None, "lora", "pissa", "emtal", "s2ft"])
def test_gradients_are_equal(method: str | None, inside: bool) -> None:
    assert_equal(vit(method), vit_loss, inside=inside)
    if method != "emtal":
        assert_equal(llama(method), llama_loss, inside=inside)


def test_gradients_are_equal_with_gates_and_scaled_layers() -> None:
    with vismt.llm.instance_gates(torch.rand(3, 2)):
        assert_equal(vit("ilora", init_values=0.1), vit_loss)


@pytest.mark.parametrize("method", [None, "lora"])
def test_gradients_are_equal_in_bf16_and_under_autocast(method: str | None) -> None:
    def autocast(loss: Loss) -> Loss:
        def cast(model: nn.Module) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return loss(model)

        return cast

    # Backward runs outside of autocast: the calls have to be repeated under it.
    assert_equal(vit(method), autocast(vit_loss))
    assert_equal(llama(method), autocast(llama_loss))
    assert_equal(llama(method).bfloat16(), llama_loss)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_other_families(kind: str) -> None:
    model = random_lm(kind).eval()
    vismt.adapt(model, "lora", rank=2)
    assert_equal(shake(model), llama_loss)
    before, after = kept(model, llama_loss)
    assert after < 0.9 * before


def test_bytes_by_hand() -> None:
    """A block of width d, MLP 4 d: without x, n1, q, k, v, out, the out of proj, x2, n2, h (4 d) and g (4 d) are kept."""
    model = vit("lora", qkv_bias=True)
    before, after = kept(model, vit_loss)
    count = len(images()) * (model.patch_embed.num_patches + model.num_prefix_tokens)
    # n2 and g of both blocks, and n1 of the second: that of the first has an input without gradient that nothing else keeps.
    assert before - after >= 4 * count * model.embed_dim * (2 * (1 + 4) + 1)


def test_a_gated_mlp_keeps_two_of_four() -> None:
    model = llama("lora")
    before, after = kept(model, llama_loss)
    config, count = model.config, tokens().numel()
    gated = 2 * config.intermediate_size  # silu(g) and silu(g) u
    normed = 2 * config.hidden_size
    saved = 4 * count * ((gated + normed) * config.num_hidden_layers - config.hidden_size)
    assert before - after >= saved
    # In bf16 each RMSNorm also keeps its input in fp32, which is recomputed from the bf16 one.
    half_before, half_after = kept(llama("lora").bfloat16(), llama_loss)
    assert half_before - half_after > saved // 2


def test_kept_bytes_counts_what_autograd_saves() -> None:
    for model, loss in ((vit("lora"), vit_loss), (llama("lora"), llama_loss)):
        saved = saved_activation_bytes(model, partial(loss, model))
        assert abs(kept_bytes(partial(loss, model)) - saved) <= 64  # the loss itself, and labels


def test_never_keeps_more() -> None:
    """A cast to half precision, and products of tensors that nothing keeps: the outputs are the smaller side."""
    weight = torch.randn(64, 64, requires_grad=True)
    x = torch.randn(256, 64)

    def cast(model: nn.Module) -> Tensor:
        return F.linear((x + weight.sum()).bfloat16(), weight.bfloat16()).float().sum()

    def product(model: nn.Module) -> Tensor:
        return F.linear((x + weight.sum()) * 2, weight).sum()

    for loss in (cast, product):
        before, after = kept(nn.Linear(1, 1), loss)
        assert after <= before


def test_nothing_stays_when_the_graph_is_gone() -> None:
    model = vit("lora")
    with vismt.recompute(model):
        vit_loss(model).backward()
        gc.collect()
        once = kept_bytes(lambda: [vit_loss(model).backward() for _ in range(3)])
    gradients_alone = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert once <= gradients_alone


def test_accumulation_and_a_graph_that_is_used_twice() -> None:
    model = vit("lora")

    def twice(model: nn.Module) -> Tensor:
        return (vit_loss(model) + 0.3 * vit_loss(model)) / 2

    assert_equal(model, twice)
    model.zero_grad()
    with vismt.recompute(model):
        loss = vit_loss(model)
    loss.backward(retain_graph=True)
    first = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    assert all(torch.equal(p.grad, 2 * first[name]) for name, p in model.named_parameters() if name in first)


@pytest.mark.parametrize("inside", [True, False])
def test_gradient_checkpointing(inside: bool) -> None:
    model = vit("lora")
    model.set_grad_checkpointing(True)
    assert_equal(model, vit_loss, inside=inside)
    plain = vit("lora")
    assert_equal(plain, lambda net: checkpoint(net, images(), use_reentrant=False).square().sum(), inside=inside)


def test_input_gradients_of_an_attack_and_second_derivatives() -> None:
    model = vit("lora", depth=1)

    def attacked(model: nn.Module) -> Tensor:
        x = images().requires_grad_()
        loss = model(x).square().sum()
        (step,) = torch.autograd.grad(loss, x, retain_graph=True)
        return model(x.detach() + 0.1 * step.sign()).square().sum() + loss

    assert_equal(model, attacked)

    def curved(model: nn.Module) -> Tensor:
        x = images().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return slope.square().sum()

    assert_equal(model, curved)


@pytest.mark.parametrize("changed", ["weight", "input"])
def test_a_change_in_place_before_backward_is_an_error(changed: str) -> None:
    """As in autograd: stale values would give wrong gradients without a word."""
    norm, linear = nn.LayerNorm(8), nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True) * 1
    with vismt.recompute(nn.Sequential(norm, linear)):
        loss = linear(norm(x)).sum()
    with torch.no_grad():
        (norm.weight if changed == "weight" else x).add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place after the forward pass"):
        loss.backward()


def test_outputs_changed_in_place_and_dropout_are_stored() -> None:
    norm, linear = nn.LayerNorm(8), nn.Linear(8, 8)
    x = torch.randn(4, 8)

    def moved(model: nn.Module) -> Tensor:
        return linear(norm(x.requires_grad_()).add_(1.0)).square().sum()

    def dropped(model: nn.Module) -> Tensor:
        torch.manual_seed(0)
        return linear(F.dropout(F.gelu(norm(x)), 0.5)).square().sum()

    def in_place(model: nn.Module) -> Tensor:
        return linear(F.silu(norm(x), inplace=True)).square().sum()

    net = nn.Sequential(norm, linear)
    for loss in (moved, dropped, in_place):
        assert_equal(net, loss)


def test_a_storage_that_is_used_again_is_another_tensor() -> None:
    """The allocator gives a freed activation's memory to the next tensor; its call must be forgotten with it."""
    linear = nn.Linear(64, 64)

    def loss(model: nn.Module) -> Tensor:
        x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for _ in range(20):
            F.gelu(x)  # dropped
            x = linear(torch.relu(x) + 0.1)
        return x.square().sum()

    assert_equal(linear, loss)


def test_a_compiled_model_is_refused() -> None:
    model = tiny_vit()
    model.blocks[0].compile(backend="eager")
    with pytest.raises(UserError, match=r"torch\.compile recomputes"), vismt.recompute(model):
        pass


def test_a_forward_pass_without_a_backward_pass_frees_its_graph() -> None:
    """Softmax and sigmoid save their outputs; kept with their graph these would be in a cycle that nothing collects."""
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Softmax(1), nn.Linear(4, 2), nn.Sigmoid())
    weight = weakref.ref(model[0].weight)
    with vismt.recompute(model):
        loss = model(torch.rand(3, 4)).sum()
    del model, loss
    gc.collect()
    assert weight() is None
