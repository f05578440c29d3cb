"""The features of any module: its output as it is, pooled maps and tokens, and the outputs of Hugging Face models."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from vismt.backbones.any_module import _say, backbone_of, pooled
from vismt.base.errors import UserError

MAPS, TOKENS = torch.randn(3, 6, 4, 4), torch.randn(3, 17, 6)


@pytest.mark.parametrize(
    ("output", "expected", "line"),
    [
        (MAPS[:, :, 0, 0], MAPS[:, :, 0, 0], ""),
        (MAPS[:, :, :1, :1], MAPS[:, :, 0, 0], ""),
        (MAPS, MAPS.flatten(2).mean(2), "the mean of its maps (b, 6, 4, 4) over the pixels"),
        (TOKENS, TOKENS[:, 0], "the first of its tokens (b, 17, 6)"),
        (TOKENS[:, 1:], TOKENS[:, 1:].mean(1), "the mean of its tokens (b, 16, 6)"),
        ((MAPS, TOKENS), MAPS.flatten(2).mean(2), "the first of its 2 outputs"),
        ({"last_hidden_state": TOKENS, "pooler_output": None}, TOKENS[:, 0], "'last_hidden_state' of its outputs"),
        ({"last_hidden_state": TOKENS, "pooler_output": MAPS[:, :, 0, 0]}, MAPS[:, :, 0, 0], "'pooler_output' of its"),
    ],
)
def test_an_output_is_pooled_and_a_line_says_how(
    output: object, expected: Tensor, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _say.cache_clear()
    for _ in range(2):
        assert torch.allclose(pooled(output, "Net"), expected)
    printed = capsys.readouterr().out
    assert printed.count(line) == 1 if line else printed == ""


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"logits": TOKENS}, "Net gives a mapping with logits; features need pooler_output or last_hidden_state"),
        (torch.ones(3), r"Net gives \(3,\); features need \(b, d\)"),
        ("text", "Net gives str; features need"),
        ((), "Net gives tuple; features need"),
    ],
)
def test_another_output_is_one_line(output: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pooled(output, "Net")


def test_a_vit_of_transformers_is_a_backbone_by_its_class_token() -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vit = transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=4, **size), add_pooling_layer=False)
    images = torch.rand(2, 3, 16, 16)
    backbone = backbone_of(vit.eval(), 16)
    with torch.no_grad():
        assert torch.equal(backbone(images), vit(images).last_hidden_state[:, 0])


def test_features_that_are_not_finite_are_told() -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1).mean(1, keepdim=True) / torch.tensor([0.0, 1.0, 1.0])[:, None]

    backbone = backbone_of(Broken(), 4)
    with torch.no_grad(), pytest.raises(UserError, match="Broken gives features that are not finite for 1 of 3 images"):
        backbone(torch.rand(3, 3, 4, 4))
