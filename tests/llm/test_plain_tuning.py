"""Full fine-tuning and the linear probe as methods: what they train, and what is said where they cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from helpers.language_models import random_lm
from helpers.tiny import images, shake, tiny_vit
from torch import nn

import vismt
from vismt.base.errors import UserError


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_full_trains_every_weight_but_those_excluded() -> None:
    model = tiny_vit()
    names = trained(model)
    report = vismt.adapt(model, "full")
    assert trained(model) == names and report.trainable == report.total
    assert str(report).startswith("full   ") and "(100.00 %)" in str(report)
    vismt.unadapt(model)
    vismt.adapt(model, "full", exclude=["blocks.0", "norm.weight"])
    assert names - trained(model) == {
        name for name in names if name.startswith("blocks.0.") or name.endswith("norm.weight")
    }


def test_the_file_of_full_holds_what_changed(tmp_path: Path) -> None:
    model = tiny_vit()
    vismt.adapt(model, "full")
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias.add_(1.0)
    expected = model(images())
    folder = vismt.save_adapter(model, tmp_path / "adapter")
    (file,) = folder.glob("*.safetensors")
    assert file.stat().st_size < 1000  # one vector of a model of some ten thousand numbers
    assert torch.equal(vismt.load_adapter(tiny_vit(), folder)(images()), expected)
    with pytest.raises(UserError, match="merge the model and save it whole"):
        vismt.export_peft(model, tmp_path / "peft")


def test_files_know_the_base_by_what_is_frozen(tmp_path: Path) -> None:
    """All that a probe trains has changed, so the frozen weights tell the base; a head that is trained beside `full` does not."""
    model = tiny_vit()
    vismt.adapt(model, "head")
    folder = vismt.save_adapter(shake(model), tmp_path / "head")
    assert torch.equal(vismt.load_adapter(tiny_vit(), folder)(images()), model(images()))
    with pytest.raises(UserError, match="was made for VisionTransformer"):
        vismt.load_adapter(tiny_vit(seed=1), folder)
    model = tiny_vit()
    vismt.adapt(model, "full", exclude="head")
    model.head.requires_grad_(True)
    with torch.no_grad():
        model.head.weight.add_(1.0)
        model.blocks[0].mlp.fc1.weight.add_(1.0)
    with pytest.warns(UserWarning, match=r"'head.weight', 'head.bias' were trained and are not in the file"):
        folder = vismt.save_adapter(model, tmp_path / "full")
    vismt.load_adapter(tiny_vit(), folder)


def test_head_trains_the_classifier_that_the_model_names() -> None:
    for model, expected in (
        (tiny_vit(), {"head.weight", "head.bias"}),
        (timm.create_model("test_resnet"), {"fc.weight", "fc.bias"}),
        (timm.create_model("test_convnext"), {"head.fc.weight", "head.fc.bias"}),  # not the norm before it
        (nn.Sequential(), set()),
    ):
        vismt.adapt(model, "head")
        assert trained(model) == expected
    own = nn.ModuleDict({"trunk": nn.Linear(2, 2), "score": nn.Linear(2, 2)})
    vismt.adapt(own, "head")
    assert trained(own) == {"score.weight", "score.bias"}


def test_head_of_a_model_without_one() -> None:
    model = tiny_vit(num_classes=0)
    report = vismt.adapt(model, "head")
    assert not trained(model) and "no classifier found" in str(report)
    vismt.unadapt(model)
    assert "no classifier" not in str(vismt.adapt(model, "head", also_train="norm")) and trained(model)


def test_the_head_of_a_language_model() -> None:
    untied = random_lm("llama", tie_word_embeddings=False)
    vismt.adapt(untied, "head")
    assert trained(untied) == {"lm_head.weight"}
    tied = random_lm("llama", tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"'lm_head.weight' is tied to a weight of the model"):
        vismt.adapt(tied, "head")
    assert vismt.adapt(tied, "full").trainable == sum(parameter.numel() for parameter in tied.parameters())


def test_merge_and_unadapt_of_a_probe() -> None:
    model, stock = tiny_vit(), tiny_vit()
    vismt.adapt(model, "head")
    shake(model)
    expected = model(images())
    assert torch.equal(vismt.merge(model)(images()), expected) and trained(model) == trained(stock)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, stock.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize("method", ["full", "head"])
def test_what_they_do_not_read(method: str) -> None:
    for options, words in (
        ({"rank": 4}, f"adapt.rank: 4 with '{method}'"),
        ({"targets": "qkv"}, f"adapt.targets: 'qkv' with '{method}'"),
        ({"alpha": 4}, f"adapt.alpha: 4 with '{method}'"),
        ({"dropout": 0.1}, f"'{method}' has no option 'dropout'"),
        ({"exclude" if method == "full" else "also_train": "nothing"}, "no module matches 'nothing'"),
    ):
        model = tiny_vit()
        with pytest.raises(UserError, match=words):
            vismt.adapt(model, method, **options)
        assert trained(model) == trained(tiny_vit())


def test_packed_weights_are_not_trained() -> None:
    model = nn.ModuleDict({"table": nn.Linear(2, 2)})
    model["table"].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match=r"adapt: full: 'table.weight' is packed"):
        vismt.adapt(model, "full")
    vismt.adapt(model, "full", exclude="table.weight")
    assert trained(model) == {"table.bias"}
