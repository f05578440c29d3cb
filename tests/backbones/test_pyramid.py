"""Hierarchical models as backbones: taps and features are timm's, sizes, BatchNorm, weights with other heads."""

from __future__ import annotations

from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from helpers import pyramids  # noqa: F401  registers tiny_swin
from helpers.tiny import holds, shake
from timm.models import metaformer
from torch import Tensor, nn

import vismt
from vismt.backbones.any_module import backbone_of
from vismt.backbones.pyramid import Pyramid
from vismt.backbones.timm_models import create
from vismt.backbones.vit import classifiers
from vismt.base.errors import UserError

NARROW = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2), "img_size": 64}
SHALLOW = {"depths": (1, 1, 1, 1)}
FAMILIES: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": {**NARROW, "window_size": 2},
    "swinv2_tiny_window8_256": {**NARROW, "window_size": 2},
    "convnext_atto": {**SHALLOW, "dims": (8, 16, 16, 24), "ls_init_value": 1.0},
    "hiera_tiny_224": {"img_size": 64, "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)},
    "efficientvit_b0": {},
    "efficientvit_m0": {"img_size": 64, "embed_dim": (16, 32, 48), "num_heads": (2, 2, 2), "depth": (1, 1, 1)},
    "test_resnet": {},
    "pvt_v2_b0": {**SHALLOW, "embed_dims": (8, 16, 40, 64)},
    "maxvit_pico_rw_256": {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 64)},
    "fastvit_t8": {"layers": (1, 1, 1, 1)},
    "caformer_s18": {
        **SHALLOW,
        "dims": (16, 16, 32, 64),
        "token_mixers": [metaformer.SepConv, metaformer.SepConv, metaformer.Attention, metaformer.Attention],
        "norm_layers": [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
    },
}
TAPS = {"efficientvit_m0": 3, "test_resnet": 5, "maxvit_pico_rw_256": 5}


def stock(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    # The named CAFormers fix their depths.
    create_model = metaformer._create_metaformer if name.startswith("caformer") else timm.create_model
    return create_model(name, **FAMILIES[name], **options).eval()


def pixels(*size: int) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_taps_and_features_are_timms(name: str) -> None:
    model = stock(name)
    backbone = Pyramid(model, (64, 64))
    images = pixels(64, 64)
    x = (images - torch.tensor(model.pretrained_cfg["mean"]).view(3, 1, 1)) / backbone.std
    count = TAPS.get(name, 4)
    getter = {"feature_cls": "getter"} if name.startswith("hiera") else {}
    listed = stock(name, features_only=True, out_indices=tuple(range(count)), **getter)
    taps = [tap.permute(0, 3, 1, 2) if name.startswith("swin") else tap for tap in listed(x)]
    assert backbone.widths == tuple(tap.shape[1] for tap in taps) and backbone.depth == count
    for number, tap in enumerate(taps):  # features_only draws its weights in the same order
        torch.testing.assert_close(backbone.maps(images, [number])[0], tap, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(backbone.maps(images, [-1, 0])[1], taps[0], atol=1e-5, rtol=1e-5)
    features, logits = backbone(images), backbone.logits(images)
    assert features.shape == (2, backbone.width)
    torch.testing.assert_close(logits, model(x))
    torch.testing.assert_close(classifiers(model)[0](features), logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="no classifier"):
        Pyramid(stock(name, num_classes=0), (64, 64)).logits(images)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("swin_tiny_patch4_window7_224", None),
        ("convnext_atto", r".*mlp.*"),
        ("test_resnet", r"conv1\.0|layer.*downsample.*"),
    ],
)
def test_an_adapter_merges_into_a_pyramid(name: str, targets: str | None) -> None:
    backbone, images = Pyramid(stock(name), (64, 64)), pixels(64, 64)
    frozen, before = backbone(images), backbone.maps(images, [0, 1, 2, 3])
    vismt.adapt(backbone.vit, "lora", targets, rank=2)
    torch.testing.assert_close(backbone(images), frozen)
    shake(backbone.vit)
    moved, taps = backbone(images), backbone.maps(images, [0, 1, 2, 3])
    assert (moved - frozen).abs().max() > 1e-3 and not torch.allclose(before[-1], taps[-1], atol=1e-3)
    vismt.merge(backbone.vit)
    for merged, tap in zip([backbone(images), *backbone.maps(images, [0, 1, 2, 3])], [moved, *taps]):
        torch.testing.assert_close(merged, tap, atol=1e-5 * float(tap.abs().max()), rtol=1e-4)


def test_batch_norm_keeps_its_statistics_in_training() -> None:
    backbone = Pyramid(stock("test_resnet"), (64, 64)).train()
    assert backbone.training and backbone.vit.training
    before = {name: value.clone() for name, value in backbone.vit.named_buffers()}
    trained = backbone(pixels(64, 64))
    assert len(before) > 20 and all(torch.equal(before[name], value) for name, value in backbone.vit.named_buffers())
    torch.testing.assert_close(trained, backbone.eval()(pixels(64, 64)))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (80, "img_size 80 x 80 does not fit the stages of tiny_hiera: use 64 x 64 or 96 x 96"),
        ((64, 48), r"64 x 48 does not fit the stages of tiny_hiera: use 64 x 32 or 64 x 64\.$"),
        (20, r"20 x 20 does not fit the stages of tiny_hiera: use 32 x 32\.$"),
    ],
)
def test_a_size_that_no_stage_divides(size: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        create("tiny_hiera", size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "size", "fits"), [("test_maxvit", 80, "64 x 64 or 96 x 96"), ("test_convnext", 16, "32 x 32")]
)
def test_a_size_that_no_stage_of_an_object_divides(name: str, size: int, fits: str) -> None:
    model = timm.create_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=rf"img_size {size} x {size} does not fit the stages of \w+: use {fits}\.$"):
        backbone_of(model, size)
    assert holds(model, before)
    assert backbone_of(model, 96)(pixels(96, 96)).isfinite().all()


def test_a_model_without_classes_has_no_classifier() -> None:
    model = stock("efficientvit_m0", num_classes=0)
    assert not classifiers(model)
    assert vismt.adapt(model, "lora", "all-conv", rank=1).specs


def test_sizes_of_any_shape() -> None:
    for name, size in (("test_resnet", (40, 72)), ("tiny_swin", (32, 72))):
        backbone = create(name, size)
        assert backbone.img_size == size and backbone(pixels(*size)).shape == (2, backbone.width)
        with pytest.raises(UserError, match=rf"needed \(b, 3, {size[0]}, {size[1]}\)"):
            backbone(pixels(64, 64))


@torch.no_grad()
def test_windows_keep_their_size_when_the_images_change() -> None:
    small, large = create("tiny_swin", 64, seed=3).eval(), create("tiny_swin", (96, 128), seed=3).eval()
    small.set_input_size((96, 128))
    images = pixels(96, 128)
    torch.testing.assert_close(small(images), large(images), atol=1e-6, rtol=0)
    assert small.vit.pretrained_cfg["input_size"] == (3, 96, 128)
    with pytest.raises(
        UserError, match="Hiera takes only images of the size that it was created for; create it with img_size"
    ):
        Pyramid(stock("hiera_tiny_224"), (64, 64)).set_input_size((96, 96))


def test_a_model_whose_tensors_do_not_depend_on_the_size_takes_another_one() -> None:
    """Its constructor has img_size, which only some blocks of the family read: tables of BoTNet's attention depend on it."""
    vit = timm.create_model("mobilevitv2_050", num_classes=0, img_size=128).eval()
    backbone, images = Pyramid(vit, (128, 128)), torch.rand(1, 3, 64, 96)
    backbone.set_input_size((64, 96))
    again = timm.create_model("mobilevitv2_050", num_classes=0, img_size=(64, 96)).eval()
    again.load_state_dict(vit.state_dict())
    assert torch.equal(backbone(images), Pyramid(again, (64, 96))(images))
    with pytest.raises(UserError, match="ByobNet takes only images of the size that it was created for"):
        Pyramid(timm.create_model("botnet26t_256", num_classes=0)).set_input_size((128, 128))


def test_weights_of_another_head_keep_the_norm_before_it(tmp_path) -> None:
    """Only the classifier is drawn anew: in a ConvNeXt the norm under `head.` is of the features."""
    state = create("test_convnext", num_classes=7, seed=1).vit.state_dict()
    state["head.norm.weight"] = state["head.norm.weight"] + 1
    safetensors.torch.save_file(state, tmp_path / "seven.safetensors")
    images = pixels(64, 64)
    plain = create("test_convnext", 64, tmp_path / "seven.safetensors")
    assert torch.equal(plain.vit.head.norm.weight, state["head.norm.weight"])
    fresh = create("test_convnext", 64, tmp_path / "seven.safetensors", num_classes=5, new_head=True)
    assert torch.equal(fresh(images), plain(images)) and fresh.logits(images).shape == (2, 5)
    with pytest.raises(UserError, match=r"'head.fc.weight' is \(7, 64\) \(num_classes 7\)"):
        create("test_convnext", 64, tmp_path / "seven.safetensors", num_classes=5)


def test_a_model_that_is_given_gets_timms_features() -> None:
    model = stock("convnext_atto")
    backbone = backbone_of(model, 96)
    assert isinstance(backbone, Pyramid) and backbone.img_size == (96, 96)
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)  # the user's model is not touched
    with pytest.raises(UserError, match="block and pool are for plain ViTs; 'ConvNeXt' pools its last stage itself"):
        backbone_of(model, 96, block=1)


def test_half_precision_gives_wide_features() -> None:
    backbone = create("test_convnext", 64, num_classes=3, dtype="bfloat16").eval()
    exact = create("test_convnext", 64, num_classes=3).eval()
    images = pixels(64, 64)
    assert (
        backbone(images).dtype == backbone.logits(images).dtype == backbone.maps(images, [0])[0].dtype == torch.float32
    )
    assert (backbone(images) - exact(images)).abs().max() < 0.1
