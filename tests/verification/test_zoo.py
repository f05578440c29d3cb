"""Healthy folders of many models and settings are never called broken, and faults in them are found."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from helpers.damage import damage_json
from helpers.verified_folders import TENSORS, Folders
from helpers.verify_zoo import ALONE, BASE, FAULTS, HEALTHY, JUNK, UNMERGED, healthy, setting, unmerged
from safetensors.torch import load_file

import vismt
from vismt.cli import main
from vismt.verification import checkpoints

# The finding that has to be there, where another would mislead.
EXPLAINED = {
    **dict.fromkeys(
        [fault for fault in FAULTS if ("bits" in fault and "factors" not in fault) or "NF4" in fault], "quantized"
    ),
    "DoRA merged as LoRA": "dora",
    "rank 0": "rank",
    "whole numbers": "dtype",
    "a base of another name": "base-name",
    "a stale file beside the shards": "two-sets",
    "another rope": "config",
    "a layer more in config.json": "config",
    "merged without norms": "lacking",
    "merged under DDP": "wrapped",
    "mixtral: experts not merged": "unmerged",
    "token rows not merged": "head-not-merged",
    "a zero factor beside a whole merge": "not-this-adapter",
    "a square lora_B transposed": "peft",
}
GUIDE = Path(__file__).resolve().parents[2] / "docs" / "verify_tests.md"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    yield tmp_path_factory.mktemp("zoo")
    transformers.utils.logging.enable_progress_bar()


@pytest.mark.parametrize("case", HEALTHY)
def test_a_healthy_folder_is_ok(case: str, root: Path) -> None:
    folders = healthy(case, root)
    verdicts = [
        vismt.verify(folders.adapter),
        vismt.verify(folders.adapter, base=folders.base),
        vismt.verify(folders.adapter, base=folders.base, merged=folders.merged),
        vismt.verify(folders.base),
        vismt.verify(folders.merged),
    ]
    assert [verdict.status for verdict in verdicts] == ["ok"] * 5, [verdict.findings for verdict in verdicts]


@pytest.mark.parametrize("case", UNMERGED)
def test_a_tuner_that_is_not_merged_is_ok(case: str, root: Path) -> None:
    folders = unmerged(case, root)
    verdicts = [vismt.verify(folders.adapter), vismt.verify(folders.adapter, base=folders.base)]
    assert [verdict.status for verdict in verdicts] == ["ok", "ok"], [verdict.findings for verdict in verdicts]


def as_bin(folders: Folders) -> None:
    torch.save(load_file(folders.adapter / TENSORS), folders.adapter / "adapter_model.bin")
    (folders.adapter / TENSORS).unlink()


@pytest.mark.parametrize(
    ("change", "needs"),
    [
        *((setting(**{key: {"a": "b"}}), "module to import") for key in ("adapters", "megatron_config")),
        (setting(lora_alpha=2**30), "of a usual size"),
        (as_bin, "tensors (adapter_model.safetensors)"),
        (lambda _: None, "pip install peft"),
    ],
)
def test_what_peft_is_not_asked_is_said(change, needs: str, root: Path, tmp_path: Path, monkeypatch) -> None:
    folders = healthy("llama", root).copied(tmp_path)
    change(folders)
    if "install" in needs:
        monkeypatch.setitem(sys.modules, "peft", None)
    (check,) = (one for one in vismt.verify(folders.adapter, base=folders.base).checks if one.name == "peft")
    assert not check.done and needs in check.text


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str, root: Path, tmp_path: Path) -> None:
    case, evidence, change = FAULTS[fault]
    folders = healthy(case, root).copied(tmp_path)
    change(folders)
    options = {} if evidence == ALONE else {"base": folders.base}
    if evidence not in (ALONE, BASE):
        options["merged"] = folders.merged
    verdict = vismt.verify(folders.adapter, **options)
    assert verdict.status != "ok", verdict.findings
    assert fault not in EXPLAINED or EXPLAINED[fault] in verdict.codes, verdict.findings
    json.dumps(verdict.as_json())


def test_a_tied_table_is_adapted_with_its_head_and_merged_twice_by_peft(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft 0.21 applies what it saves for both names, and merge_and_unload adds the update to the one weight twice."""
    options = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    monkeypatch.setitem(HEALTHY, "tied table, adapted", ("tied", options))
    folders = healthy("tied table, adapted", root)
    assert vismt.verify(folders.adapter).status == vismt.verify(folders.adapter, base=folders.base).status == "ok"
    verdict = vismt.verify(folders.adapter, base=folders.base, merged=folders.merged)
    assert verdict.codes == {"merged-twice"}


@pytest.mark.parametrize("damage", JUNK)
@pytest.mark.parametrize("which", ["adapter", "base", "merged"])
def test_a_damaged_file_is_broken_with_an_exit_code_and_json(
    which: str, damage: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = {"adapter": "tensors"}.get(which, which)
    case, _, change = FAULTS[f"{prefix}: {damage}"]
    folders = healthy(case, root).copied(tmp_path)
    change(folders)
    words = ["--base", str(folders.base), "--merged", str(folders.merged), "--json", str(tmp_path / "verdict.json")]
    assert main(["verify", str(folders.adapter), *words]) == 4
    assert json.loads((tmp_path / "verdict.json").read_text())["status"] == "broken"
    assert main(["verify", str(getattr(folders, which))]) == 4
    assert "Traceback" not in capsys.readouterr().err


def test_the_zoo_is_as_large_as_the_guide_says() -> None:
    text = GUIDE.read_text(encoding="utf8")
    assert f"{len(HEALTHY)} folders without a fault" in text and f"{len(FAULTS)} faults" in text
    assert len(HEALTHY) >= 123 and len(FAULTS) >= 112


def test_a_config_json_of_any_size_and_kind_is_read_in_a_short_time(root: Path, tmp_path: Path) -> None:
    """Counts of layers and labels that would take all memory, values of other types, and keys that fetch files."""
    folders = healthy("vit", root).copied(tmp_path)
    path = folders.base / "config.json"
    config = json.loads(path.read_text())
    odd = [{"num_hidden_layers": 2**40}, {"num_labels": 2**40}, {"hidden_size": 2**40}, {"num_attention_heads": 2**40}]
    odd += [
        {"num_hidden_layers": "x"},
        {"model_type": []},
        {"architectures": [3, "os", "AutoModel"]},
        {"backbone": "a/b"},
    ]
    odd += [{"id2label": {str(number): "x" for number in range(9)}, "layer_types": ["x"] * 10**5}]
    for values in odd:
        path.write_text(json.dumps({**config, **values}))
        assert vismt.verify(folders.adapter, base=folders.base).status in ("ok", "suspicious", "broken"), values
    for seed in range(60):
        path.write_text(json.dumps(damage_json(config, Random(seed))))
        vismt.verify(folders.adapter, base=folders.base)


def test_names_that_no_library_knows_are_not_compared(root: Path, tmp_path: Path) -> None:
    """A type of model that the installed transformers does not know, and an earlier transformers without conversions."""
    folders = healthy("vit", root).copied(tmp_path)
    path = folders.base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "of_another_year"}))
    verdict = vismt.verify(folders.adapter, base=folders.base, merged=folders.merged)
    assert (verdict.status, verdict.codes) == ("suspicious", {"not-compared"})


def test_an_update_far_larger_than_the_weight_is_suspicious(root: Path, tmp_path: Path) -> None:
    folders = healthy("llama", root).copied(tmp_path)
    setting(lora_alpha=8000)(folders)
    verdict = vismt.verify(folders.adapter, base=folders.base)
    assert (verdict.status, verdict.codes) == ("suspicious", {"size"})


@pytest.mark.parametrize("which", ["base", "merged"])
def test_the_config_json_of_base_or_merged_checkpoint_serves_both(which: str, root: Path, tmp_path: Path) -> None:
    folders = healthy("llava", root).copied(tmp_path)
    (getattr(folders, which) / "config.json").unlink()
    assert vismt.verify(folders.adapter, base=folders.base, merged=folders.merged).status == "ok"


def test_a_checkpoint_without_architectures_is_of_the_adapters_class(root: Path, tmp_path: Path) -> None:
    folders = healthy("llama", root).copied(tmp_path)
    for folder in (folders.base, folders.merged):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": None}))
    assert vismt.verify(folders.adapter, base=folders.base, merged=folders.merged).status == "ok"
    FAULTS["merged without norms"][2](folders)
    assert vismt.verify(folders.adapter, base=folders.base, merged=folders.merged).codes == {"lacking"}


def test_an_earlier_transformers_leaves_names_as_they_are(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vit, llama = healthy("vit", root), healthy("llama", root)
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    checkpoints._built.cache_clear()
    verdict = vismt.verify(vit.adapter, base=vit.base, merged=vit.merged)
    assert (verdict.status, verdict.codes) == ("suspicious", {"not-compared"})
    assert vismt.verify(llama.adapter, base=llama.base, merged=llama.merged).status == "ok"
    checkpoints._built.cache_clear()
