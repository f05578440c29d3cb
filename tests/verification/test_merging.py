"""`vismt merge ADAPTER --base MODEL --to OUT` against merges by peft and vismt, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from helpers.language_models import moved_lm
from helpers.tiny_runs import refused
from helpers.verified_folders import FAULTS, Folders, edit_tensors, made, stock, trained

import vismt
from vismt.cli import main
from vismt.verification.facts import MERGE_COMMAND


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return made("llama", "lora", tmp_path_factory.mktemp("llama"), head=False, size=0.01)


def merged(adapter: Path, base: Path | str, out: Path) -> int:
    return main(["merge", str(adapter), "--base", str(base), "--to", str(out)])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("kind", "adapter"), [("llama", "lora"), ("llama", "dora"), ("gpt2", "pissa-export")])
def test_a_merge_is_that_of_peft_with_the_tokenizer_beside(kind: str, adapter: str, tmp_path: Path, capsys) -> None:
    folders = made(kind, adapter, tmp_path, head=False, size=0.01)
    assert merged(folders.adapter, folders.base, tmp_path / "out") == 0
    found, wanted = weights(tmp_path / "out"), weights(folders.merged)
    base = weights(folders.base)
    assert found.keys() == wanted.keys()
    moved = max(float((found[name] - base[name]).abs().max()) for name in found)
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, atol=1e-6 + 1e-5 * moved), name
    assert moved > 1e-3
    out = capsys.readouterr().out
    assert "scale and merge: " in out and " modules are merged as the settings say\n" in out
    assert out.splitlines()[-1] == f"merged  {tmp_path / 'out'}"
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert vismt.verify(folders.adapter, base=folders.base, merged=tmp_path / "out").status == "ok"
    # The command may write its folder again.
    assert merged(folders.adapter, folders.base, tmp_path / "out") == 0


def test_a_dora_on_a_tied_table_is_not_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The head has the table of the embedding, so that a merge of the table would change the head too."""
    peft = pytest.importorskip("peft")
    model = moved_lm("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["embed_tokens"], use_dora=True, init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    error = refused(capsys, "merge", tmp_path / "adapter", "--base", tmp_path / "base", "--to", tmp_path / "out")
    assert "embed_tokens' is tied to another module" in error and not (tmp_path / "out").exists()


def test_an_adapter_folder_of_vismt_is_merged(tmp_path: Path, llama: Folders) -> None:
    model = stock("llama")
    vismt.adapt(model, "polar", targets=["q_proj", "v_proj"], rank=2)
    trained(model, 0.05, 1)
    vismt.save_adapter(model, tmp_path / "adapter")
    assert merged(tmp_path / "adapter", llama.base, tmp_path / "out") == 0
    wanted = vismt.merge(model).state_dict()
    found = weights(tmp_path / "out")
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in found)


@pytest.mark.parametrize("form", ["vismt", "peft"])
def test_a_classifier_of_timm_gets_the_head_that_was_trained(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=5)
    (tmp_path / "base").mkdir()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    about = {"architecture": "test_vit", "num_classes": 5, "img_size": 32, "label_names": list("abcde")}
    (tmp_path / "base" / "config.json").write_text(json.dumps(about))
    model.reset_classifier(3)
    vismt.adapt(model, "lora", targets=["qkv", "fc1"], rank=2, also_train=["head"])
    trained(model, 0.05, 1)
    save = vismt.save_adapter if form == "vismt" else vismt.export_peft
    save(model, tmp_path / "adapter")
    assert merged(tmp_path / "adapter", tmp_path / "base" / "model.safetensors", tmp_path / "out") == 0
    read = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(read(images), vismt.merge(model).eval()(images), atol=1e-5)
    assert "label_names" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_broken_adapter_writes_nothing(llama: Folders, tmp_path: Path, capsys) -> None:
    for fault in ("NaN", "transposed factor", "missing module"):
        folders = llama.copied(tmp_path / fault)
        FAULTS[fault][0](folders)
        error = refused(capsys, "merge", folders.adapter, "--base", folders.base, "--to", tmp_path / "out")
        assert "is broken: " in error and "Nothing is written" in error and not (tmp_path / "out").exists()
    words = ["merge", llama.adapter, "--base", llama.base, "--to"]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text("{}")
    assert "config.json' exists and would be overwritten" in refused(capsys, *words, tmp_path / "own")
    assert "is an adapter folder; give the model" in refused(capsys, "merge", llama.adapter)
    assert "needs" not in refused(capsys, *words, tmp_path / "out", "--arm", "lora")
    error = refused(capsys, "merge", llama.merged, "--base", llama.base, "--to", tmp_path / "out")
    assert "--base and --to are for adapter folders" in error
    error = refused(capsys, "merge", llama.adapter, "--base", tmp_path / "absent", "--to", tmp_path / "out")
    assert "absent' is not a folder, a file or an asset" in error and not (tmp_path / "out").exists()


def test_the_advice_of_verify_is_the_command(llama: Folders, tmp_path: Path, capsys) -> None:
    folders = llama.copied(tmp_path)
    FAULTS["merged with half scale"][0](folders)
    assert main(["verify", str(folders.adapter), "--base", str(folders.base), "--merged", str(folders.merged)]) == 4
    assert f"fix: merge the adapter into the base once: {MERGE_COMMAND}" in capsys.readouterr().out
    arguments = MERGE_COMMAND.replace("ADAPTER", str(folders.adapter)).replace("MODEL", str(folders.base))
    assert main(arguments.replace("OUT", str(tmp_path / "out")).split()[1:]) == 0
    shutil.rmtree(folders.merged)
    assert vismt.verify(folders.adapter, base=folders.base, merged=tmp_path / "out").status == "ok"


def test_a_suspicious_merge_says_why(tmp_path: Path, llama: Folders, capsys) -> None:
    """An adapter whose B is zero everywhere is merged, and the console names the reason of the verdict."""
    adapter = Path(shutil.copytree(llama.adapter, tmp_path / "adapter"))
    tensors = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    zeros = {name: value * ("lora_B" not in name) for name, value in tensors.items()}
    safetensors.torch.save_file(zeros, adapter / "adapter_model.safetensors", {"format": "pt"})
    assert merged(adapter, llama.base, tmp_path / "out") == 0
    verdict = vismt.verify(adapter, base=llama.base, merged=tmp_path / "out")
    assert verdict.status == "suspicious"
    lines = capsys.readouterr().out.splitlines()
    assert "verify  suspicious" in lines
    assert all(f"verify  {finding.level}: {finding.text}" in lines for finding in verdict.findings)


def test_a_weight_that_changed_beside_the_adapter_is_named(tmp_path: Path, llama: Folders) -> None:
    folders = llama.copied(tmp_path)
    (path,) = folders.merged.glob("*.safetensors")
    edit_tensors(path, lambda tensors: tensors["model.norm.weight"].add_(0.1))
    verdict = vismt.verify(folders.adapter, base=folders.base, merged=folders.merged)
    (finding,) = (finding for finding in verdict.findings if finding.code == "foreign-change")
    assert finding.modules == ("model.norm.weight",) and verdict.status == "suspicious"
