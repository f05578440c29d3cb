"""`vismt verify`: exit codes, JSON, and the probe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.tiny import shake
from helpers.tiny_runs import refused
from helpers.verified_folders import FAULTS, TENSORS, Folders, edit_config, edit_tensors, made, stock, write_model
from PIL import Image

import vismt
from vismt.base.errors import UserError
from vismt.cli import main
from vismt.verification.probe import _changes

KEYS = {"format", "vismt", "status", "exit_code", "folder", "kind", "about", "checks", "findings", "modules", "readers"}
KEYS |= {"answer", "probe"}


PEFT = "--base with the config.json of a model that the installed transformers knows"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return made("llama", "lora", tmp_path_factory.mktemp("llama"), head=False, size=0.01)


def test_exit_codes_and_json(llama: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = llama.copied(tmp_path)
    words = ["verify", str(folders.adapter), "--base", str(folders.base), "--merged", str(folders.merged)]
    assert main([*words, "--json", str(tmp_path / "v.json")]) == 0
    content = json.loads((tmp_path / "v.json").read_text())
    assert content.keys() == KEYS and content["status"] == "ok" and content["modules"][0]["fit"] == "right"
    # An earlier verdict may be replaced, also in the folder itself, and no file that is verified.
    for _ in range(2):
        assert main([*words, "--json", str(folders.adapter / "v.json")]) == 0
    before = (folders.adapter / "adapter_config.json").read_bytes()
    error = refused(capsys, *words, "--json", folders.adapter / "adapter_config.json")
    assert "adapter_config.json' is an input and would be replaced by an output" in error
    assert (folders.adapter / "adapter_config.json").read_bytes() == before
    (folders.adapter / "v.json").unlink()
    FAULTS["merged with half scale"][0](folders)
    capsys.readouterr()
    assert main(words) == 4
    assert "0.5 times the update in all modules" in capsys.readouterr().out
    edit_tensors(folders.adapter / TENSORS, lambda t: t.update({n: t[n].half().fill_(65504) for n in list(t)[:1]}))
    assert main(["verify", str(folders.adapter)]) == 3


def test_what_was_not_checked_is_said_everywhere(llama: Folders, tmp_path: Path, capsys) -> None:
    folders = llama.copied(tmp_path)
    needs = {
        "": {"names and shapes": "--base", "peft": PEFT, "size of the update": "--base", "scale and merge": "--merged"},
        "base": {"scale and merge": "--merged"},
        "merged": {},
    }
    given: dict[str, Path] = {}
    for name, missing in needs.items():
        given |= {name: getattr(folders, name)} if name else {}
        verdict = vismt.verify(folders.adapter, **given)  # type: ignore[arg-type]
        lacking = {check.name: check.text for check in verdict.checks if not check.done}
        assert lacking == {check: f"needs {option}" for check, option in {**missing, "answers": "--probe"}.items()}
        words = [word for option, path in given.items() for word in (f"--{option}", str(path))]
        assert main(["verify", str(folders.adapter), *words, "--json", str(tmp_path / "v.json")]) == 0
        assert capsys.readouterr().out == f"{verdict}\n"
        for check, option in missing.items():
            assert f"\nnot checked  {check}: needs {option}" in str(verdict)
        checks = json.loads((tmp_path / "v.json").read_text())["checks"]
        assert [one["name"] for one in checks if not one["done"]] == [*missing, "answers"]
    assert "\nchecked      scale and merge: 6 of 6 modules are merged as the settings say\n" in str(verdict)
    FAULTS["merged with half scale"][0](folders)
    verdict = vismt.verify(folders.adapter, base=folders.base, merged=folders.merged)
    assert "scale and merge: 0 of 6 modules are merged as the settings say; 6 factor 0.5" in str(verdict)
    assert "names and shapes: against LlamaForCausalLM" in str(vismt.verify(folders.base))


@pytest.mark.parametrize(("tuner", "answer"), [("XLORA", "peft: refused"), ("LOHA", "peft: 0 of 6, serves the base")])
def test_a_lora_under_the_name_of_another_tuner_is_broken(
    tuner: str, answer: str, llama: Folders, tmp_path: Path
) -> None:
    peft, folders = pytest.importorskip("peft"), llama.copied(tmp_path)
    edit_config(folders.adapter, lambda config: config.update(peft_type=tuner))
    for base in (None, folders.base):
        verdict = vismt.verify(folders.adapter, base=base)
        assert verdict.status == "broken" and "tuner" in verdict.codes and verdict.answer.startswith(answer)
    if tuner == "XLORA":
        with pytest.raises(ValueError, match="use_cache"):
            peft.PeftModel.from_pretrained(stock("llama"), str(folders.adapter))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent"], "'absent' does not exist"),
        (["{adapter}", "--merged", "{merged}"], "needs the base model"),
        (["{adapter}", "--probe", "texts.txt"], "needs the base model"),
        (["{adapter}", "--base", "{adapter}"], "is not a checkpoint"),
        (["{adapter}", "--base", "{base}", "--probe", "absent.txt"], "cannot be read as text"),
        (["{adapter}", "--reader", "pef"], "Near: 'peft'"),
    ],
)
def test_usage_errors_are_one_line(
    words: list[str], message: str, llama: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"adapter": llama.adapter, "base": llama.base, "merged": llama.merged}
    assert main(["verify", *(word.format(**paths) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def texts(folder: Path) -> Path:
    lines = [" ".join(f"t{(3 * line + 7 * place) % 40}" for place in range(12)) for line in range(8)]
    (folder / "texts.txt").write_text("\n".join(lines))
    return folder / "texts.txt"


def tokenized(folders: Folders) -> Folders:
    """Write a tokenizer that transformers opens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, **{f"t{n}": n for n in range(1, 40)}}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for folder in (folders.base, folders.adapter, folders.merged):
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folders


def test_a_probe_on_texts(llama: Folders, tmp_path: Path) -> None:
    folders, data = tokenized(llama.copied(tmp_path)), texts(tmp_path)
    verdict = vismt.verify(folders.adapter, base=folders.base, merged=folders.merged, probe=data)
    assert verdict.status == "ok"
    rows = {(row["model"], row["measure"]): row for row in verdict.probe}
    change = rows["adapter", "NLL"]["value"] - rows["base", "NLL"]["value"]
    assert rows["adapter - base", "NLL"]["value"] == pytest.approx(change, abs=1e-6) and rows["base", "NLL"]["n"] == 8
    assert rows["adapter || base", "KL"]["value"] > 0
    assert abs(rows["merged - adapter", "NLL"]["value"]) < 1e-4 * max(1, abs(change))
    (tmp_path / "one.txt").write_text("t1 t2 t3\n\nt4\n")
    with pytest.raises(UserError, match=r"has 1 examples .*an interval needs two"):
        vismt.verify(folders.adapter, base=folders.base, probe=tmp_path / "one.txt")
    edit_tensors(folders.merged / "model.safetensors", lambda t: t["lm_head.weight"].mul_(0.5))
    assert "merged-differs" in vismt.verify(folders.adapter, base=folders.base, merged=folders.merged, probe=data).codes
    edit_tensors(folders.adapter / TENSORS, lambda t: [t[n].zero_() for n in t if "lora_B" in n])
    assert "no-effect" in vismt.verify(folders.adapter, base=folders.base, probe=data).codes


def test_a_worse_model_collapses() -> None:
    assert [finding.code for finding in _changes([2.0, 2.2, 1.9], [1.0, 1.0, 1.0], True)] == ["collapses"]
    assert not _changes([0.5, 0.7, 0.4], [1.0, 1.0, 1.0], True)
    assert [finding.code for finding in _changes([-1.0, -1.0, 0.0, -1.0, -1.0], [1.0] * 5, False)] == ["collapses"]
    assert [finding.level for finding in _changes([float("nan"), 0.0], [0.0, 0.0], True)] == ["broken"]


def test_a_probe_on_images(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=5, img_size=32).eval()
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    write_model(model, base)
    vismt.adapt(model, "lora", rank=2)
    vismt.save_adapter(shake(model, 0.01), adapter)
    write_model(vismt.merge(model), merged)
    about = {"architecture": "test_vit", "num_classes": 5, "model_args": {"img_size": 32}}
    for folder in (base, merged):
        (folder / "config.json").write_text(json.dumps(about))
    pixels = np.random.default_rng(0).integers(0, 255, (10, 16, 16, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        place = tmp_path / "images" / f"class{number % 5}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number}.png")
    verdict = vismt.verify(adapter, base=base, merged=merged, probe=tmp_path / "images")
    rows = {(row["model"], row["measure"]): row for row in verdict.probe}
    assert verdict.status == "ok" and rows["base", "accuracy"]["n"] == 10
    assert rows["merged - adapter", "accuracy"]["value"] == 0
    shutil.rmtree(tmp_path / "images" / "class4")
    with pytest.raises(UserError, match=r"has 5 outputs, .* 4 classes"):
        vismt.verify(adapter, base=base, probe=tmp_path / "images")


@pytest.mark.slow
def test_memory_stays_that_of_one_module(tmp_path: Path) -> None:
    """A checkpoint of 0.5 GB is compared with less than 0.4 GB beyond what the imports take."""
    import subprocess
    import sys

    code = """
import resource, sys, vismt, vismt.verification.verify
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
status = vismt.verify(f"{sys.argv[1]}/adapter", base=f"{sys.argv[1]}/base", merged=f"{sys.argv[1]}/merged").status
assert status == "ok", status
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 2**10
"""
    from safetensors.torch import save_file

    for name in ("base", "merged", "adapter"):
        (tmp_path / name).mkdir()
    W, M, factors = {}, {}, {}
    for layer in range(16):
        name = f"model.layers.{layer}.mlp.up_proj"
        W[f"{name}.weight"] = torch.randn(4096, 4096).bfloat16()
        A, B = torch.randn(4, 4096), 0.01 * torch.randn(4096, 4)
        M[f"{name}.weight"] = torch.addmm(W[f"{name}.weight"].float(), B, A, alpha=2.0).bfloat16()
        factors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
    save_file(W, tmp_path / "base" / "model.safetensors")
    save_file(M, tmp_path / "merged" / "model.safetensors")
    save_file(factors, tmp_path / "adapter" / TENSORS)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
