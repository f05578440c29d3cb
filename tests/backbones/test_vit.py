"""ViT backbones: features of a block, normalisation, pooling, sizes, errors; with timm's smallest models."""

import copy

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from vismt.backbones.timm_models import create
from vismt.backbones.vit import Backbone
from vismt.base.errors import UserError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)


@pytest.fixture()
def vit() -> VisionTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=5).eval()


@pytest.fixture()
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def normalised(images: torch.Tensor) -> torch.Tensor:
    return (images - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def by_hand(vit: VisionTransformer, images: torch.Tensor, blocks: int) -> torch.Tensor:
    """Tokens after `blocks` blocks and the final norm, as a loop that owes nothing to forward_intermediates."""
    tokens = vit.patch_embed.proj(normalised(images)).flatten(2).transpose(1, 2)
    tokens = torch.cat([vit.cls_token.expand(len(images), -1, -1), tokens], dim=1) + vit.pos_embed
    for block in list(vit.blocks)[:blocks]:
        tokens = block(tokens)
    return vit.norm(tokens)


@pytest.mark.parametrize(("block", "blocks"), [(None, 4), (0, 1), (2, 3), (-1, 4), (-2, 3)])
def test_tap_equals_a_loop_over_the_blocks(vit, images, block, blocks) -> None:
    backbone = Backbone(vit, block=block, mean=MEAN, std=STD)
    tokens = by_hand(vit, images, blocks)
    torch.testing.assert_close(backbone.tokens(images), tokens)
    torch.testing.assert_close(backbone(images), tokens[:, 0])
    assert backbone(images).shape == (2, backbone.width) == (2, 48)


def test_later_blocks_are_not_run_and_are_named(vit, images) -> None:
    ran = []
    for index, block in enumerate(vit.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    backbone = Backbone(vit, block=1, mean=MEAN, std=STD)
    backbone(images)
    assert ran == [0, 1]
    assert backbone.unused_modules() == ["blocks.2", "blocks.3"]
    assert all(isinstance(vit.get_submodule(name), torch.nn.Module) for name in backbone.unused_modules())
    assert Backbone(vit, mean=MEAN, std=STD).unused_modules() == []


def test_maps_are_the_patch_tokens_in_the_order_asked_for(vit, images) -> None:
    backbone = Backbone(vit, mean=MEAN, std=STD)
    last, first, again = backbone.maps(images, [-1, 0, 3])
    assert last.shape == (2, 48, 4, 4)
    torch.testing.assert_close(last, again)
    torch.testing.assert_close(first, by_hand(vit, images, 1)[:, 1:].transpose(1, 2).reshape(2, 48, 4, 4))
    # row 1, column 2 of a 4 x 4 grid is patch 6, token 7 after the class token
    torch.testing.assert_close(last[:, :, 1, 2], by_hand(vit, images, 4)[:, 7])


def test_pooling(vit, images) -> None:
    tokens = by_hand(vit, images, 4)
    torch.testing.assert_close(Backbone(vit, pool="avg", mean=MEAN, std=STD)(images), tokens[:, 1:].mean(1))
    torch.testing.assert_close(Backbone(vit, pool="token", mean=MEAN, std=STD)(images), tokens[:, 0])


def test_logits_are_those_of_timm_and_use_the_tap_when_there_is_one(vit, images) -> None:
    torch.testing.assert_close(Backbone(vit, mean=MEAN, std=STD).logits(images), vit(normalised(images)))
    tapped = Backbone(vit, block=1, mean=MEAN, std=STD)
    torch.testing.assert_close(tapped.logits(images), vit.head(by_hand(vit, images, 2)[:, 0]))
    assert tapped.logits(images).shape == (2, 5)


def test_mean_and_std_come_from_timm_and_are_not_saved() -> None:
    backbone = create("vit_tiny_patch16_224.augreg_in21k", 32)
    assert backbone.mean.flatten().tolist() == [0.5, 0.5, 0.5]  # inception values, not ImageNet's
    assert all(key.startswith("vit.") for key in backbone.state_dict())
    deit = create("deit_tiny_patch16_224.fb_in1k", 32)
    assert deit.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert deit.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, same, other = create("test_vit", 32, seed=1), create("test_vit", 32, seed=1), create("test_vit", 32, seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.vit.blocks[0].mlp.fc1.weight, same.vit.blocks[0].mlp.fc1.weight)
    assert not torch.equal(first.vit.blocks[0].mlp.fc1.weight, other.vit.blocks[0].mlp.fc1.weight)
    assert (
        first.img_size == (32, 32)
        and first.grid == (2, 2)
        and first.vit.pos_embed.shape[1] == first.vit.num_prefix_tokens + 4
    )


@pytest.mark.parametrize(
    "name", ["test_vit2", "test_vit3", "test_vit_relpos", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224"]
)
def test_relatives_agree_with_their_own_forward(name) -> None:
    size = 28 if "patch14" in name else 32
    backbone = create(name, size).eval()
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    features = backbone.vit.forward_head(backbone.vit.forward_features(backbone.normalise(images)), pre_logits=True)
    torch.testing.assert_close(backbone(images), features)
    assert backbone(images).shape == (1, backbone.width)
    assert backbone.tokens(images).shape[1] == backbone.vit.num_prefix_tokens + 4
    assert [tuple(features_of_block.shape[2:]) for features_of_block in backbone.maps(images, [1, 0])] == [
        (2, 2),
        (2, 2),
    ]


def test_compiles_without_a_graph_break(vit, images) -> None:
    backbone = Backbone(vit, block=2, mean=MEAN, std=STD)
    compiled = torch.compile(backbone, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), backbone(images))


def test_autocast_cast_and_copy(vit, images) -> None:
    backbone = Backbone(vit, block=2, mean=MEAN, std=STD)
    reference = backbone(images)
    twin = copy.deepcopy(backbone)
    with torch.no_grad():
        twin.vit.norm.bias += 1
    torch.testing.assert_close(backbone(images), reference)
    torch.testing.assert_close(twin(images), reference + 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (backbone(images).float() - reference).abs().max() < 0.1
    double = copy.deepcopy(backbone).to(torch.float64)
    assert double(images).dtype == torch.float64
    torch.testing.assert_close(double(images.double()).float(), reference, atol=1e-5, rtol=1e-5)
    half = copy.deepcopy(backbone).to(torch.bfloat16)
    assert half(images).dtype == torch.float32 and (half(images).float() - reference).abs().max() < 0.1


def test_gradients_reach_pixels_and_used_blocks_only(vit, images) -> None:
    backbone = Backbone(vit, block=1, mean=MEAN, std=STD)
    images.requires_grad_(True)
    backbone(images).pow(2).sum().backward()
    assert images.grad.abs().sum() > 0
    assert vit.blocks[1].mlp.fc2.weight.grad is not None and vit.blocks[2].mlp.fc2.weight.grad is None


def test_images_that_do_not_fit(vit, images) -> None:
    backbone = Backbone(vit, mean=MEAN, std=STD)
    with pytest.raises(UserError, match=r"\(2, 3, 24, 24\), needed \(b, 3, 32, 32\)"):
        backbone(images[:, :, :24, :24])
    with pytest.raises(UserError, match=r"torch.uint8.*divide by 255"):
        backbone((images * 255).to(torch.uint8))
    with pytest.raises(UserError, match="block 9 is outside"):
        backbone.tokens(images, block=9)


def test_backbone_needs_a_normalisation(vit) -> None:
    vit.pretrained_cfg = {}
    with pytest.raises(UserError, match="no pretrained_cfg with mean"):
        Backbone(vit)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_smal_patch16_224", {}, "neither an asset nor a timm model. Near: 'vit_small_patch16_224'"),
        ("vit_small_patch16_224.dinno", {}, "no weights tagged 'dinno'. Near: 'vit_small_patch16_224.dino'"),
        ("vit_small_patch14_imgfocuss", {}, "Near: 'vit_small_patch14_imgfocus'"),
        ("smollm2-135m-instruct", {}, "is a language model"),
        ("test_resnet", {"block": 1}, "block and pool are for plain ViTs; 'test_resnet' pools its last stage itself"),
        ("test_resnet", {"img_size": 32, "position": "dino", "pretrained": "nowhere.safetensors"}, "does not exist"),
        ("test_vit", {"img_size": 40}, "img_size 40 does not fit the 16-pixel patches of test_vit: use 32 or 48"),
        ("test_vit", {"img_size": 8}, "does not fit the 16-pixel patches of test_vit: use 16"),
        (
            "test_vit",
            {"img_size": 32, "block": 77},
            r"block 77 is outside of VisionTransformer, which has blocks 0 to \d+ ",
        ),
        ("test_vit", {"img_size": 32, "pool": "max"}, "pool 'max' is unknown"),
        ("test_vit", {"img_size": 32, "position": "bilinear"}, "position 'bilinear' is unknown"),
        ("test_vit_relpos", {"img_size": 32, "pool": "token"}, "has no class token"),
        (
            "test_vit4",
            {"img_size": 32, "pretrained": "nowhere.safetensors"},
            "checkpoint 'nowhere.safetensors' does not exist",
        ),
        ("vit_small_patch16_18x2_224", {"pretrained": True}, "timm has no weights for 'vit_small_patch16_18x2_224'"),
    ],
)
def test_one_line_per_mistake(name, options, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        create(name, **options)
    assert "\n" not in str(caught.value)


def test_logits_need_a_head() -> None:
    with pytest.raises(UserError, match="no classifier head"):
        create("test_vit", 32).logits(torch.rand(1, 3, 32, 32))


def test_the_hub_out_of_reach_is_a_user_error(monkeypatch) -> None:
    def refuse(*_args, **_options):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(UserError, match=r"'test_vit' could not be downloaded by timm \(no route to the hub\)"):
        create("test_vit", 32, pretrained=True)


def test_hub_weights_are_resampled_from_the_pretrained_grid(monkeypatch) -> None:
    """timm's own weights under position "dino": built once at the pretrained size, then resampled, never twice."""
    source = create("test_vit", seed=5).vit
    real = timm.create_model
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, pretrained=False, **options: (
            copy.deepcopy(source) if pretrained else real(name, pretrained=False, **options)
        ),
    )
    small = create("test_vit", 80, pretrained=True, position="dino")
    from vismt.backbones.position import resample

    prefix = small.vit.pos_embed.shape[1] - 25
    assert torch.equal(small.vit.pos_embed, resample(source.pos_embed, (5, 5), "dino", prefix))
    assert torch.equal(small.vit.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch14_reg4_dinov2",
        "vit_small_patch16_dinov3",
        "vit_base_patch16_clip_quickgelu_224",
        "vit_base_patch16_siglip_224",
    ],
)
def test_features_of_the_foundation_models_are_timms(name):
    size = 28 if "patch14" in name else 32
    torch.manual_seed(0)
    vit = timm.create_model(name, img_size=size, embed_dim=48, depth=2, num_heads=3, num_classes=0).eval()
    model, images = Backbone(vit), torch.rand(2, 3, size, size)
    expected = vit.forward_head(vit.forward_features(model.normalise(images)), pre_logits=True)
    assert model(images).shape == (2, 48) and torch.allclose(model(images), expected, atol=1e-5)
