"""Damaged folders in peft's layout: each is refused by one UserError that leaves the model as it was, or can be undone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers.adapter_folders import refusal, unharmed
from helpers.damage import copied, damage_bytes, damage_json, damage_tensors
from helpers.every_method import adapted_vit, small_vit
from helpers.faults import cases, many, no_hang
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import vismt
from vismt.lowrank.model import targets
from vismt.methods import METHODS

EXPORTED = [name for name, method in METHODS.items() if method.exports and name not in ("emtal", "ilora")]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
QKV = "base_model.model.blocks.0.attn.qkv.lora_{}.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One export of each method; the last one with a head."""
    root = tmp_path_factory.mktemp("peft")
    exports = {method: vismt.export_peft(adapted_vit(method), root / method) for method in EXPORTED}
    return {**exports, "head": vismt.export_peft(adapted_vit("lora", also_train=["head"]), root / "head")}


@pytest.fixture(scope="module")
def stock() -> nn.Module:
    return small_vit()


def edit_config(folder: Path, change: Callable[[Any], Any]) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / TENSORS
    tensors = safetensors.torch.load(path.read_bytes())
    change(tensors)
    path.write_bytes(safetensors.torch.save(tensors))


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "dropout as text": ({"lora_dropout": "x"}, "lora_dropout: expected float or null, got 'x'"),
    "dropout of 5": ({"lora_dropout": 5}, r"lora_dropout: 5.*\[0, 1\)"),
    "dropout below 0": ({"lora_dropout": -1}, "lora_dropout: -1"),
    "rank as text": ({"r": "2"}, "r: expected int, got '2'"),
    "rank true": ({"r": True}, "r: expected int, got True"),
    "rank of 2.5": ({"r": 2.5}, "r: expected int"),
    "alpha": ({"lora_alpha": [2]}, "lora_alpha: expected float"),
    "NaN": ({"lora_alpha": float("nan")}, "not a finite number"),
    "rslora as text": ({"use_rslora": "false"}, "use_rslora: expected bool or null"),
    "start as number": ({"init_lora_weights": 5}, "init_lora_weights: expected bool or str"),
    "ranks": ({"rank_pattern": {"qkv": "x"}}, "rank_pattern.qkv: expected int, got 'x'"),
    "rank 0": ({"rank_pattern": {"qkv": 0}}, r"rank_pattern\['qkv'\]: 0; it must be"),
    "patterns as list": ({"alpha_pattern": [3]}, "alpha_pattern: expected mapping of str to float or null"),
    "targets": ({"target_modules": {"a": 1}}, "target_modules: expected str or list of str"),
    "number in targets": ({"target_modules": ["qkv", 5]}, r"target_modules\[1\]: expected str, got 5"),
    "saved": ({"modules_to_save": [["head"]]}, r"modules_to_save\[0\]: expected"),
    "layers": ({"layers_to_transform": [True]}, r"layers_to_transform\[0\]: expected"),
    "a group": ({"target_modules": "(qkv"}, r"target_modules: '\(qkv' is not a regular expression"),
    "repeats": (
        {"rank_pattern": {"(a{999}){999}": 2}},
        r"rank_pattern: .* with its repeats written out it has about 2\^24 parts",
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_wrong_settings_are_one_clear_line(
    case: str, folders: dict[str, Path], stock: nn.Module, tmp_path: Path
) -> None:
    changes, match = SETTINGS[case]
    folder = copied(folders["lora"], tmp_path / "p")
    edit_config(folder, lambda config: {**config, **changes})
    assert re.search(match, refusal(vismt.import_peft, stock, folder))


FACTORS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "NaN": (lambda t: t[QKV.format("A")].fill_(float("nan")), "lora_A: it holds NaN or infinite values"),
    "infinite": (lambda t: t[QKV.format("B")].view(-1)[3:4].fill_(float("inf")), "lora_B: it holds NaN or infinite"),
    "one axis": (lambda t: t.update({QKV.format("A"): torch.zeros(32)}), r"lora_A: saved \(32,\); it must be a matrix"),
    "no axis": (lambda t: t.update({QKV.format("B"): torch.tensor(1.0)}), r"lora_B: saved \(\); it must be a matrix"),
    "kernel": (lambda t: t.update({QKV.format("B"): torch.zeros(48, 2, 3, 3)}), r"saved \(48, 2, 3, 3\), needed"),
    **{
        str(dtype): (lambda t, dtype=dtype: t.update({QKV.format("A"): t[QKV.format("A")].to(dtype)}), "saved as")
        for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    },
}


@pytest.mark.parametrize("case", FACTORS)
def test_factors_that_are_no_numbers_are_refused(
    case: str, folders: dict[str, Path], stock: nn.Module, tmp_path: Path
) -> None:
    change, match = FACTORS[case]
    folder = copied(folders["lora"], tmp_path / "p")
    edit_tensors(folder, change)
    assert re.search(match, refusal(vismt.import_peft, stock, folder))


def test_whole_parameters_have_the_kind_of_the_model(
    folders: dict[str, Path], stock: nn.Module, tmp_path: Path
) -> None:
    name = "base_model.model.head.weight"
    for change, match in (
        (
            lambda t: t.update({name: t[name].long()}),
            r"head\.weight: saved as torch.int64, the model's is torch.float32",
        ),
        (lambda t: t[name].fill_(float("nan")), r"head\.weight: it holds NaN"),
    ):
        folder = copied(folders["head"], tmp_path / "p")
        edit_tensors(folder, change)
        assert re.search(match, refusal(vismt.import_peft, stock, folder))
    folder = copied(folders["head"], tmp_path / "p")
    edit_tensors(folder, lambda t: t[name].fill_(1e6))
    assert re.search("beyond the range of torch.float16", refusal(vismt.import_peft, small_vit().half(), folder))


def test_older_files_hold_plain_tensors(folders: dict[str, Path], stock: nn.Module, tmp_path: Path) -> None:
    tensors = safetensors.torch.load((folders["lora"] / TENSORS).read_bytes())
    name = QKV.format("A")
    for content in (
        5,
        [1],
        {name: 3},
        {5: torch.zeros(2)},
        {**tensors, name: torch.zeros(1).expand(2, 10**9)},
        {**tensors, name: tensors[name].to_sparse()},
    ):
        folder = copied(folders["lora"], tmp_path / "p")
        (folder / TENSORS).unlink()
        torch.save(content, folder / "adapter_model.bin")
        assert re.search("is not a mapping of plain tensors", refusal(vismt.import_peft, stock, folder))


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*x", "(.|b)*x", "((((.*)*)*)*)*x", "(.?){60}x", ".*" * 90 + "x"])
@pytest.mark.parametrize(
    "key", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "modules_to_save"]
)
def test_catastrophic_patterns_do_not_hang(
    key: str, pattern: str, folders: dict[str, Path], stock: nn.Module, tmp_path: Path
) -> None:
    folder = copied(folders["lora"], tmp_path / "p")
    value = {pattern: 2} if key.endswith("_pattern") else [pattern] if key == "modules_to_save" else pattern
    edit_config(folder, lambda config: {**config, key: value})
    with no_hang(pattern, seconds=60):
        assert unharmed(vismt.import_peft, stock, folder)


@pytest.mark.parametrize(
    "key", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "modules_to_save"]
)
def test_a_hostile_pattern_stops_at_its_limit(
    key: str, folders: dict[str, Path], stock: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "LIMIT_S", 0.1)
    folder, pattern = copied(folders["lora"], tmp_path / "p"), r"(?:.|.|.|..)*\d"
    value = {pattern: 2} if key.endswith("_pattern") else [pattern] if key == "modules_to_save" else pattern
    edit_config(folder, lambda config: {**config, key: value})
    assert re.search(rf"{key}: matching '.*' takes more than 0.1 s", refusal(vismt.import_peft, stock, folder))
    verdict = vismt.verify(folder)
    assert verdict.status == "broken" and "takes more than" in verdict.findings[0].text


def damage(folder: Path, kind: str, random: Random) -> None:
    if kind == "tensors":
        edit_tensors(folder, lambda tensors: damage_tensors(tensors, random))
    elif kind == "bytes":
        damage_bytes(random.choice([folder / CONFIG, folder / TENSORS]), random)
    else:
        edit_config(folder, lambda config: damage_json(config, random))


CASES = {
    "name": st.sampled_from([*EXPORTED, "head"]),
    "kind": st.sampled_from(["config", "config", "tensors", "bytes"]),
    "random": st.randoms(use_true_random=False),
}


@cases(quick=40, campaign=700)
def test_damaged_folders_do_no_harm(cases: int, folders: dict[str, Path], stock: nn.Module, tmp_path: Path) -> None:
    @many(cases)
    @given(**CASES)
    def check(name: str, kind: str, random: Random) -> None:
        folder = copied(folders[name], tmp_path / "p")
        damage(folder, kind, random)
        assert unharmed(vismt.import_peft, stock, folder)

    check()
