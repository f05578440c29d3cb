"""Replays of five threads in which an adapter or a merge was silently not what it said: each is found, with the reason."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import torch
from helpers.language_models import tiny_lm
from helpers.verified_folders import edit_config, edit_tensors, made, trained, write_model
from torch import nn

import vismt

CONFIG, TENSORS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "model.safetensors"


def texts(verdict: vismt.Verdict, code: str) -> str:
    return " ".join(f"{finding.text}; {finding.fix}" for finding in verdict.findings if finding.code == code)


def test_vllm_34186_prefix(tmp_path: Path) -> None:
    """An adapter of the text-only class is served on the multimodal one: no path exists, and the base answers."""
    folders = made("llama", "lora", tmp_path, head=False)
    edit_tensors(
        folders.base / WEIGHTS,
        lambda held: held.update(
            {name.replace("model.", "model.language_model.", 1): held.pop(name) for name in list(held)}
        ),
    )
    verdict = vismt.verify(folders.adapter, base=folders.base, readers=["vllm"])
    assert verdict.status == "broken" and "prefix" in verdict.codes
    assert "language_model." in texts(verdict, "prefix") and "6 of 6" in texts(verdict, "prefix")
    assert verdict.answer == "vllm: 0 of 6, serves the base (expected)"
    assert vismt.verify(made("llama", "lora", tmp_path / "right", head=False).adapter, readers=["vllm"]).status == "ok"


def test_verl_7285_merged_is_the_base(tmp_path: Path) -> None:
    """The "merged" folder is the base under other file names, with the adapter in a folder inside."""
    folders = made("llama", "lora", tmp_path, dtype=torch.bfloat16, head=False)
    shutil.rmtree(folders.merged)
    shutil.copytree(folders.base, folders.merged)
    shutil.copytree(folders.adapter, folders.merged / "lora_adapter")
    verdict = vismt.verify(folders.adapter, base=folders.base, merged=folders.merged)
    assert verdict.status == "broken" and verdict.codes == {"unmerged"}
    assert "0 times the update in all modules" in texts(verdict, "unmerged")


def test_verl_1821_alpha_0(tmp_path: Path) -> None:
    """Earlier versions wrote lora_alpha 0 beside a B that is not 0."""
    folders = made("llama", "lora", tmp_path, head=False)
    edit_config(folders.adapter, lambda config: config.update(lora_alpha=0, alpha_pattern={}))
    verdict = vismt.verify(folders.adapter)
    assert verdict.status == "broken" and "alpha-zero" in verdict.codes
    assert verdict.answer.startswith("peft: 0 of 6, serves the base")


def summed(folder: Path, **options: object) -> tuple[nn.Module, Path]:
    """Return a trained model, and the folder of the sum of its one adapter with weight 1."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **options)
    model = peft.get_peft_model(tiny_lm("llama"), config)
    trained(model, 0.1, 0)
    model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    model.save_pretrained(folder, selected_adapters=["sum"])
    model.set_adapter("default")
    return model, folder / "sum"


def test_peft_3761_weighted_sum_of_rslora(tmp_path: Path) -> None:
    """One adapter with weight 1 is not its own sum: peft writes alpha = r and keeps use_rslora, √r = 2 times the update."""
    base = write_model(tiny_lm("llama"), tmp_path / "base")
    model, folder = summed(tmp_path / "rslora", use_rslora=True)
    alone = vismt.verify(folder)
    assert "sqrt(r)" in texts(alone, "rslora-alpha") and "peft#3761" in texts(alone, "rslora-alpha")
    merged = write_model(model.merge_and_unload(), tmp_path / "merged")
    verdict = vismt.verify(folder, base=base, merged=merged)
    assert verdict.status == "broken" and verdict.codes == {"scale"}
    assert "0.5 times the update in all modules" in texts(verdict, "scale") and "rsLoRA" in texts(verdict, "scale")


def test_peft_3761_leaves_a_plain_sum_alone(tmp_path: Path) -> None:
    base = write_model(tiny_lm("llama"), tmp_path / "base")
    model, folder = summed(tmp_path / "plain")
    merged = write_model(model.merge_and_unload(), tmp_path / "merged")
    assert vismt.verify(folder, base=base, merged=merged).status == "ok"
