"""Covariances of layer inputs: values by hand, batches and masks, shared inputs, files, and refused arguments."""

from __future__ import annotations

import pytest
import torch
from helpers.language_models import padded, tiny_lm, tokens
from helpers.tiny import images, tiny_vit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vismt
from vismt.base.errors import UserError
from vismt.llm import collect_covariance, load_covariances, save_covariances

QKV = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]


def same(actual, expected, tolerance: float = 1e-6) -> bool:
    return set(actual) == set(expected) and all(
        (actual[path] - expected[path]).abs().max() <= tolerance * expected[path].abs().max() for path in expected
    )


def single(batch: dict) -> list[dict]:
    """Return each sample as a batch of one without padding."""
    return [{"input_ids": ids[mask.bool()][None]} for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]


def test_golden_numbers() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    first, second = torch.tensor([[[1.0, -2.0], [0.5, 1.0]]]), torch.tensor([[[4.0, 0.0], [0.0, 0.0]]])
    # sample 1 over its largest absolute value 2: rows (.5, -1), (.25, .5); sums .25 + .0625, -.5 + .125, 1 + .25
    # sample 2 over 4: row (1, 0); mean over two samples
    expected = torch.tensor([[1.3125, -0.375], [-0.375, 1.25]]) / 2
    for batches in ([first, second], [torch.cat([first, second])]):
        assert torch.equal(collect_covariance(model, batches)["0"], expected)
    # The released code divides by the signed maximum, 1 for sample 1. A sample of zeros counts in N and adds nothing.
    assert torch.equal(collect_covariance(model, [first, second, torch.zeros(1, 2, 2)])["0"], expected * 2 / 3)
    assert torch.equal(
        collect_covariance(model, [torch.tensor([[-3.0, -1.5]])])["0"], torch.tensor([[1.0, 0.5], [0.5, 0.25]])
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_a_padded_batch_is_its_samples_one_by_one(kind: str) -> None:
    batch = padded()
    together = collect_covariance(tiny_lm(kind), [batch])
    assert same(together, collect_covariance(tiny_lm(kind), single(batch)), 1e-5)
    blind = collect_covariance(tiny_lm(kind), [{"input_ids": batch["input_ids"]}])
    assert not same(together, blind, 1e-2)


def test_images_and_pooled_inputs() -> None:
    targets = ["qkv", "fc2", "head"]
    together = collect_covariance(tiny_vit(), [images(4)], targets)
    one_by_one = collect_covariance(tiny_vit(), [(x[None], torch.tensor([0])) for x in images(4)], targets)
    assert same(together, one_by_one, 1e-5) and together["head"].shape == (32, 32)


def test_a_convolution_counts_its_patches() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding=1, dilation=1, bias=False)
    x = torch.randn(1, 2, 5, 4)
    C = collect_covariance(nn.Sequential(conv), [x], ["0"])["0"]
    weight = conv.weight.flatten(1)
    # |conv(x)|^2 = tr(W X^T X W^T), and C = X^T X / max|x|^2
    assert torch.allclose(torch.trace(weight @ C @ weight.T) * x.abs().max() ** 2, conv(x).square().sum(), rtol=1e-5)


def test_peft_computes_the_same_at_batch_size_one_where_the_maximum_is_positive() -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("attr")
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    samples = [torch.rand(1, 5, 6) for _ in range(3)]
    ours = collect_covariance(model, samples)
    config = peft.LoraConfig(
        target_modules=["0", "2"],
        init_lora_weights="corda",
        r=2,
        corda_config=CordaConfig(prune_temporary_fields=False),
    )
    preprocess_corda(model, config, run_model=lambda: [model(x) for x in samples])
    assert same(ours, {name: model.get_submodule(name).covariance_matrix for name in ("0", "2")})


def test_layers_with_one_input_share_a_sum_and_no_logits_are_computed() -> None:
    model, calls = tiny_lm("llama"), []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    covariances = collect_covariance(model, [{"input_ids": tokens()}, {"input_ids": tokens(seed=2)}])
    assert covariances[QKV[0]] is covariances[QKV[1]] is covariances[QKV[2]]
    assert covariances["model.layers.0.mlp.gate_proj"] is covariances["model.layers.0.mlp.up_proj"]
    assert len(covariances) == 14 and len({id(value) for value in covariances.values()}) == 8
    assert len(calls) == 1  # the pass over one sample that finds shared inputs
    alone = collect_covariance(tiny_lm("llama"), [{"input_ids": tokens(seed=s)} for s in (1, 2)], [QKV[1]])
    assert same(alone, {QKV[1]: covariances[QKV[1]]})


def test_an_input_that_is_shared_in_some_calls_only_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.first(x) + self.second(x) + self.first(2 * x)

    with pytest.raises(UserError, match="'second' and 'first' share their input in some samples only"):
        collect_covariance(Twice(), [torch.ones(1, 2, 4)])


def test_convolutions_of_one_input_share_a_sum_where_their_patches_are_the_same() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.same, self.wide = (nn.Conv2d(2, 3, size, padding=size // 2) for size in (3, 3, 5))

        def forward(self, x):
            return self.first(x) + self.same(x) + self.wide(x)

    found = collect_covariance(Branches(), [torch.randn(2, 2, 6, 6)], ["first", "same", "wide"])
    assert found["first"] is found["same"] and found["wide"].shape == (50, 50)


def test_mode_hooks_and_weights_are_left_as_they_were() -> None:
    model = tiny_lm("llama").train()
    model.model.layers[1].eval()
    for ids in (tokens(), tokens() + 1000):  # the second batch is outside the vocabulary
        try:
            collect_covariance(model, [{"input_ids": ids}])
        except IndexError:
            assert ids.max() > 40
        assert model.training and model.model.layers[0].training and not model.model.layers[1].training
        assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


class Halving(nn.Module):
    """A layer whose tokens are not those of the mask: it sees every second one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.linear(x[:, ::2])


class Odd(nn.Module):
    """A layer that is not called, two that share an input for positive samples only, and one without a sample axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.idle, self.lost = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        if x.shape[0] > 1:
            self.lost(x.reshape(-1, 4)[:3])
        return self.first(x) + self.second(x if x.sum() > 0 else x.clone())


def test_mistakes(tmp_path) -> None:
    llama = tiny_lm("llama")
    ones = torch.ones(1, 2, 4)
    for call, words in (
        (lambda: collect_covariance(Odd(), [ones]), "'idle' gets no input"),
        (
            lambda: collect_covariance(Odd(), [ones, -ones], ["first", "second"]),
            "'second' and 'first' share their input in some samples",
        ),
        (lambda: collect_covariance(Odd(), [ones], ["lost"]), "'lost' gets no input"),
        (lambda: collect_covariance(tiny_vit(), []), "no batches"),
        (lambda: collect_covariance(tiny_vit(), ["text"]), "a batch is str"),
        (lambda: collect_covariance(tiny_vit(), images()), "batches is one Tensor; give a list"),
        (lambda: collect_covariance(llama, padded()), "batches is one dict; give a list"),
        (lambda: collect_covariance(tiny_vit(), None), "batches is one NoneType; give a list"),
        (
            lambda: collect_covariance(tiny_vit(), [images() * float("nan")]),
            "'blocks.0.attn.qkv' gets infinite values or NaN",
        ),
        (lambda: collect_covariance(tiny_vit(), [images()], ["qvk"]), "'qvk'"),
        (
            lambda: collect_covariance(llama, [{**padded(), "attention_mask": torch.ones(3, 1, 8, 8)}]),
            r"mask is \(3, 1, 8, 8\)",
        ),
        (
            lambda: collect_covariance(
                Halving(), [{"x": torch.ones(1, 4, 4), "attention_mask": torch.tensor([[1, 1, 1, 0]])}]
            ),
            "'linear' gets 2 tokens, the attention mask has 4",
        ),
        (lambda: load_covariances(tmp_path / "nowhere"), "no file"),
        (lambda: save_covariances({"a": torch.ones(2, 3)}, tmp_path), r"'a' is \(2, 3\)"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    vismt.adapt(llama, "lora", rank=2)
    with pytest.raises(UserError, match="already carries 'lora'"):
        collect_covariance(llama, [{"input_ids": tokens()}])


def test_files_are_strict_and_keep_what_is_shared(tmp_path) -> None:
    shared = torch.eye(3)
    save_covariances({"a": shared, "b": shared, "c": 2 * torch.eye(2)}, tmp_path)
    covariances = load_covariances(tmp_path)
    assert (
        covariances["a"] is covariances["b"]
        and torch.equal(covariances["c"], 2 * torch.eye(2))
        and list(covariances) == ["a", "b", "c"]
    )
    file = tmp_path / "covariances.safetensors"
    tensors = load_file(file)
    assert set(tensors) == {"a", "c"}
    for changed in ({"a": shared}, {**tensors, "d": torch.eye(1)}, {**tensors, "a": 2 * tensors["a"]}):
        save_file(changed, file)
        with pytest.raises(UserError, match="was changed or damaged; delete the folder"):
            load_covariances(tmp_path)
    file.write_bytes(b"torn")
    with pytest.raises(UserError, match="missing or damaged"):
        load_covariances(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        load_covariances(tmp_path)
    (tmp_path / "covariances.json").write_text("{}")
    with pytest.raises(UserError, match="was changed or damaged after it was written"):
        load_covariances(tmp_path)


def test_rank_report(capsys) -> None:
    collect_covariance(tiny_lm("llama"), [{"input_ids": tokens(1, 6)}], QKV)
    message = "1 of 1 covariances have no full rank: 'model.layers.0.self_attn.q_proj' saw 6 tokens of width 32"
    assert message in capsys.readouterr().out
    collect_covariance(tiny_lm("llama"), [{"input_ids": tokens(8, 8)}], QKV)
    assert "full rank" not in capsys.readouterr().out
