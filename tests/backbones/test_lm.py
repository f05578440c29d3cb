"""The language model door: a tiny Llama saved here, and the ways it can fail."""

import sys

import pytest
import torch

from vismt.backbones.lm import create_lm
from vismt.errors import UserError

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("lm")
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(path)
    config = transformers.LlamaConfig(vocab_size=3, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                      num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_folder(folder) -> None:
    model, tokenizer = create_lm(folder)
    assert model.dtype == torch.bfloat16 and not model.training  # what it was saved in
    assert tokenizer("a b c")["input_ids"] == [1, 2, 0]
    assert create_lm(str(folder), dtype=torch.float32)[0].dtype == torch.float32


def test_progress_bars_of_transformers_come_back(folder, capsys) -> None:
    create_lm(folder)
    assert transformers.utils.logging.is_progress_bar_enabled()
    assert capsys.readouterr().err == ""


def test_mistakes(folder, tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match="'vit_small_patch14_imgfocus' is a vision transformer"):
        create_lm("vit_small_patch14_imgfocus")
    with pytest.raises(UserError, match=r"the folder has no config.json"):
        create_lm(tmp_path)
    with pytest.raises(UserError, match=r"there is no file 'a.gguf'"):
        create_lm(folder, gguf_file="a.gguf")
    with pytest.raises(UserError, match=r"'smollm2-135m-instrukt' cannot be loaded.*Near: 'smollm2-135m-instruct'") as caught:
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
