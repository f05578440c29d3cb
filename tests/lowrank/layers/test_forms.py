"""Updates of convolutions of one to three dimensions, in groups, and of embeddings: merged, saved, and read by peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.language_models import random_lm, tokens
from helpers.tiny import shake
from torch import Tensor, nn

import vismt
from vismt.base.errors import UserError
from vismt.lowrank.layers.forms import LowRankEmbedding


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


FORMS: dict[str, Any] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, stride=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 8, 8)),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2), (2, 4, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (1, 2, 3)), (2, 4, 3, 5, 6)),
    "grouped1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9)),
    "grouped2d": (lambda: nn.Conv2d(4, 8, 3, groups=2, padding=1, padding_mode="circular"), (2, 4, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 8, 8)),
    "embedding": (lambda: nn.Embedding(11, 6, padding_idx=2), None),
}
CASES = [(form, method) for form in FORMS for method in ("lora", "pissa")]


def net(form: str) -> Net:
    torch.manual_seed(0)
    return Net(FORMS[form][0]())


def inputs(form: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = FORMS[form][1]
    return torch.randn(shape, generator=generator) if shape else torch.randint(11, (3, 5), generator=generator)


@pytest.mark.parametrize("form,method", CASES)
def test_the_update_is_a_matrix_of_low_rank_in_the_weight(form: str, method: str, tmp_path: Path) -> None:
    model, x, before = net(form), inputs(form), net(form)(inputs(form))
    vismt.adapt(model, method, ["layer"], rank=2, alpha=3)
    assert torch.allclose(model(x), before, atol=1e-5)
    shake(model)(x).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    expected, update = model(x), model.layer.low_rank()
    vismt.save_adapter(model, tmp_path)
    assert torch.equal(vismt.load_adapter(net(form), tmp_path)(x), expected)
    double = net(form)
    with torch.no_grad():  # the definition: the stock module on W + s B A
        double.layer.weight.add_(update.delta().view(double.layer.weight.shape))
    assert torch.allclose(double(x), expected, atol=1e-5) and not torch.allclose(expected, before, atol=1e-3)
    assert update.rank == (2 if method == "lora" else 4)
    merged = vismt.merge(model)
    assert type(merged.layer) is type(net(form).layer) and torch.allclose(merged(x), expected, atol=1e-5)


@pytest.mark.parametrize("form", ["conv1d", "conv2d", "conv3d", "embedding"])
def test_peft_reads_them_and_is_read(form: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, x = net(form), inputs(form)
    vismt.adapt(model, "lora", ["layer"], rank=2, alpha=3)
    expected = shake(model)(x)
    vismt.export_peft(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(net(form), str(tmp_path / "ours")).eval()
    assert torch.allclose(theirs(x), expected, atol=1e-5)
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["layer"], init_lora_weights=False)
    direct = peft.get_peft_model(net(form), config).eval()
    direct.save_pretrained(tmp_path / "theirs")
    assert torch.allclose(vismt.import_peft(net(form), tmp_path / "theirs")(x), direct(x), atol=1e-5)


def test_groups_are_not_exported_and_quantised_embeddings_refused(tmp_path: Path) -> None:
    for form in ("grouped2d", "dilated"):
        model = net(form)
        vismt.adapt(model, "lora", ["layer"], rank=2)
        with pytest.raises(UserError, match="peft's LoRA of a convolution has no dilation"):
            vismt.export_peft(model, tmp_path)
        assert not any(tmp_path.iterdir())
    model, before = net("embedding"), net("embedding")(inputs("embedding"))
    for method, options, words in (
        ("pissa", {"quantize": "nf4"}, "adapt.quantize: 'layer' is an embedding"),
        ("ilora", {"n_experts": 2}, "'layer' is an embedding, which gates of samples do not weigh"),
    ):
        with pytest.raises(UserError, match=words):
            vismt.adapt(model, method, ["layer"], rank=2, **options)
        assert torch.equal(model(inputs("embedding")), before)


@pytest.mark.parametrize("method", ["lora", "pissa", "polar"])
def test_the_vector_of_padding_does_not_train(method: str) -> None:
    model = net("embedding")
    with torch.no_grad():
        model.layer.weight[2] = torch.randn(6)
    before = model.layer.weight[2].clone()
    vismt.adapt(model, method, ["layer"], rank=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.layer(torch.arange(11)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(model.layer(torch.tensor([3])), model.layer.weight[3][None])
    assert torch.equal(model.layer(torch.tensor([2]))[0], before)
    vismt.merge(model)
    assert torch.equal(model.layer.weight[2], before)


def test_the_embedding_of_a_language_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = random_lm("llama", initializer_range=0.2, tie_word_embeddings=False)
    vismt.adapt(model, "lora", ["embed_tokens", "q_proj"], rank=2)
    assert isinstance(model.model.embed_tokens, LowRankEmbedding)
    shake(model)
    expected = model(tokens()).logits
    vismt.export_peft(model, tmp_path)
    stock = random_lm("llama", initializer_range=0.2, tie_word_embeddings=False)
    assert torch.allclose(
        peft.PeftModel.from_pretrained(stock, str(tmp_path)).eval()(tokens()).logits, expected, atol=1e-5
    )
    tied = random_lm("llama", tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"shares its weight with '.*lm_head\.weight'"):
        vismt.adapt(tied, "lora", ["embed_tokens"])
    everything = random_lm("llama", tie_word_embeddings=False)
    assert "embed" not in str(vismt.adapt(everything, "lora", ".*(proj|embed_tokens)"))
