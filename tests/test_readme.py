"""The Python and YAML examples of README.md run as they are printed there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.tiny import images, shake, tiny_vit

import vismt
from vismt import methods

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf8")


def block(word: str, language: str = "python") -> str:
    """Return the first code block of a language that contains `word`."""
    return next(code for code in re.findall(rf"```{language}\n(.*?)```", README, flags=re.S) if word in code)


def test_own_method(capsys) -> None:
    model = tiny_vit()
    before = model(images())
    try:
        exec(block("register_method"), {"model": model})
        assert "orthogonal" in capsys.readouterr().out
        assert model.blocks[0].attn.qkv.blocks == (32, 32, 32)
        assert torch.allclose(model(images()), before, atol=1e-6)
        factor = model.blocks[0].mlp.fc1.lora_A
        assert torch.allclose(factor @ factor.T, torch.eye(4), atol=1e-5)
        moved = shake(model)(images())
        assert torch.allclose(vismt.merge(model)(images()), moved, atol=1e-5)
    finally:
        methods.METHODS._items.pop("orthogonal", None)


def test_timm_example(tmp_path, monkeypatch, capsys) -> None:
    import timm

    monkeypatch.chdir(tmp_path)
    stock = tiny_vit()
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: stock)
    names: dict = {}
    exec(block("timm.create_model"), names)
    assert "pissa" in capsys.readouterr().out and (tmp_path / "adapter" / "adapter.json").exists()
    assert type(names["model"].blocks[0].attn.qkv) is torch.nn.Linear


def test_combining_example(tmp_path, monkeypatch) -> None:
    import timm

    monkeypatch.chdir(tmp_path)
    stocks = [tiny_vit() for _ in range(6)]
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: stocks.pop())
    names: dict = {"shake": shake}
    exec(block("import combine").replace("    ...  ", "    shake(model)  "), names)
    model = names["model"]
    assert (tmp_path / "both" / "adapter_config.json").exists() and model.vismt_record.method == "lora"
    flowers = vismt.merge(vismt.load_adapter(stocks[0], "flowers")).state_dict()
    birds = vismt.merge(vismt.load_adapter(stocks[1], "birds")).state_dict()
    stock = stocks[2]
    for key, value in vismt.merge(model).state_dict().items():
        base = stock.state_dict()[key]
        assert torch.allclose(value, base + 0.7 * (flowers[key] - base) + 0.3 * (birds[key] - base), atol=1e-5)
    assert not torch.equal(model(images()), stock(images()))


def test_transformers_example(tmp_path, monkeypatch) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, intermediate_size=48, num_attention_heads=2, vocab_size=30
    )
    monkeypatch.chdir(tmp_path)
    stock = transformers.AutoModelForCausalLM.from_config(config)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: stock)
    names: dict = {}
    exec(block("AutoModelForCausalLM"), names)
    assert (tmp_path / "my-adapter" / "adapter_config.json").exists()
    assert not any(".lora_" in name for name in names["model"].state_dict())


def test_own_card_is_valid(tmp_path) -> None:
    from torchvision.io import write_png

    from vismt.data.images import open_images

    (tmp_path / "card.yaml").write_text(block("kind: folder", "yaml"))
    for name in "abc":
        (tmp_path / "images" / name).mkdir(parents=True)
        write_png(torch.zeros(3, 8, 8, dtype=torch.uint8), str(tmp_path / "images" / name / "0.png"))
    assert len(open_images(str(tmp_path / "card.yaml"))) == 3


def test_language_model_configuration_is_sound(tmp_path) -> None:
    from vismt.jobs import load_config, make_job

    (tmp_path / "sentiment.yaml").write_text(block("task: lm", "yaml"))
    config = make_job(load_config(tmp_path / "sentiment.yaml", []), tmp_path).config
    assert config.adapt.method == "polar" and config.head.name == "vbll" and config.tasks[0].limit == 400


def test_multitask_loop(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path))  # where the clustering is cached
    scope: dict = {}
    exec(block("RouterFade"), scope)
    assert scope["fade"].value == 1 and scope["loss"].isfinite()
    import timm

    stock = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, patch_size=8)
    assert list(scope["model"].state_dict()) == list(stock.state_dict())
    assert bool((scope["retain"].ema < 10).all())
