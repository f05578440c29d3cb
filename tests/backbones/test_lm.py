"""Language models: a tiny Llama saved here, and the ways it can fail."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.lm_parts import save_lm, tiny_lm, tokenizer
from helpers.tiny import holds, shake

import vismt
from vismt.backbones.lm import create_lm
from vismt.base.errors import UserError

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = save_lm(tmp_path_factory.mktemp("lm"))
    tiny_lm().to(torch.bfloat16).save_pretrained(path)
    return path


def tiny_gguf(path: Path) -> Path:
    """A random Llama of one layer in a .gguf: matrices as Q8_0, a tokenizer of four tokens."""
    gguf = pytest.importorskip("gguf")
    writer, generator = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    for name, value in (
        ("context_length", 32),
        ("embedding_length", 64),
        ("feed_forward_length", 96),
        ("block_count", 1),
        ("head_count", 2),
        ("head_count_kv", 1),
        ("layer_norm_rms_eps", 1e-5),
        ("rope_dimension_count", 32),
    ):
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "a", "b", "ab"])
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 1, 1, 1])
    for name in ("bos", "eos"):
        getattr(writer, f"add_{name}_token_id")(0)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(64, dtype=np.float32))
    shapes = {
        "token_embd": (4, 64),
        "output": (4, 64),
        "blk.0.attn_q": (64, 64),
        "blk.0.attn_k": (32, 64),
        "blk.0.attn_v": (32, 64),
        "blk.0.attn_output": (64, 64),
        "blk.0.ffn_gate": (96, 64),
        "blk.0.ffn_up": (96, 64),
        "blk.0.ffn_down": (64, 96),
    }
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.Q8_0
        values = gguf.quantize(generator.standard_normal(shape, dtype=np.float32) / 8, kind)
        writer.add_tensor(f"{name}.weight", values, raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_folder(folder) -> None:
    model, words = create_lm(folder)
    assert model.dtype == torch.bfloat16 and not model.training  # what it was saved in
    assert words("a good film")["input_ids"] == tokenizer()("a good film")["input_ids"]
    assert create_lm(str(folder), dtype=torch.float32)[0].dtype == torch.float32


def test_an_expanded_gguf_is_a_plain_model_that_saves_what_it_holds(tmp_path) -> None:
    tiny_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = create_lm(tmp_path, gguf_file="tiny.gguf")
    assert model.dtype == torch.float32 and all(parameter.is_floating_point() for parameter in model.parameters())
    assert {type(module) for module in model.modules() if type(module).__name__.endswith("Linear")} == {torch.nn.Linear}
    vismt.adapt(model, "lora", rank=2)
    shake(model)
    vismt.merge(model).save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    again, same = create_lm(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert holds(model, again.state_dict())
    assert same("ab a")["input_ids"] == tokenizer("ab a")["input_ids"]
    assert create_lm(tmp_path, gguf_file="tiny.gguf", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_progress_bars_of_transformers_come_back(folder, capsys) -> None:
    create_lm(folder)
    assert transformers.utils.logging.is_progress_bar_enabled()
    assert capsys.readouterr().err == ""


def test_mistakes(folder, tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match="'vit_small_patch14_imgfocus' is a vision transformer"):
        create_lm("vit_small_patch14_imgfocus")
    with pytest.raises(UserError, match=r"the folder has no config.json"):
        create_lm(tmp_path)
    with pytest.raises(UserError, match=r"the file 'a.gguf' is missing"):
        create_lm(folder, gguf_file="a.gguf")
    with pytest.raises(
        UserError, match=r"'smollm2-135m-instrukt' cannot be loaded.*Near: 'smollm2-135m-instruct'"
    ) as caught:
        create_lm("smollm2-135m-instrukt")
    assert "\n" not in str(caught.value)


def test_a_model_that_is_no_causal_lm(folder, tmp_path) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "vit")
    transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="cannot be loaded"):
        create_lm(tmp_path / "vit")


@pytest.mark.parametrize(("package", "options"), [("transformers", {}), ("gguf", {"gguf_file": "x.gguf"})])
def test_missing_package_names_the_extra(folder, monkeypatch, package, options) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf'need the package {package}: pip install "vismt\[llm\]"'):
        create_lm(folder, **options)
