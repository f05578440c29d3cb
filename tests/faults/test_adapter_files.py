"""Damaged adapter folders: each is refused by one UserError that leaves the model as it was, or loads and can be undone."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from helpers.adapter_folders import described, edit_tensors, refusal, state_hash, unharmed, write_description
from helpers.damage import copied, damage_bytes, damage_json, damage_tensors
from helpers.every_method import adapted_vit, small_vit
from helpers.faults import cases, many
from helpers.tiny import tiny_vit
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import vismt
from vismt.base.errors import UserError
from vismt.lowrank.files.description import DESCRIPTION
from vismt.storage.files import sealed
from vismt.storage.locks import LOCK

METHODS = vismt.list_methods()
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """One saved adapter of each method."""
    root = tmp_path_factory.mktemp("adapters")
    return {method: vismt.save_adapter(adapted_vit(method), root / method) for method in METHODS}


@pytest.fixture(scope="module")
def stock() -> nn.Module:
    """The model that every test finds as it was."""
    return small_vit()


# ---- one damage each, for every method


def first_tensor(tensors: dict[str, Tensor]) -> str:
    return next(name for name, value in sorted(tensors.items()) if value.is_floating_point() and value.ndim)


def put(value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[first_tensor(tensors)].view(-1)[-1] = value

    return change


def cast(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        name = first_tensor(tensors)
        tensors[name] = tensors[name].to(dtype)

    return change


TENSORS = {
    "NaN": (put(float("nan")), "holds NaN or infinite values"),
    "infinite": (put(float("-inf")), "holds NaN or infinite values"),
    "whole numbers": (cast(torch.int64), "saved as"),
    "truth values": (cast(torch.bool), "saved as"),
    "complex": (cast(torch.complex64), "saved as"),
    "missing": (lambda tensors: tensors.pop(first_tensor(tensors)), "is missing"),
    "one axis": (lambda tensors: tensors.update({first_tensor(tensors): torch.zeros(7)}), "needed"),
    "unexpected": (lambda tensors: tensors.update(nobody=torch.zeros(1)), "unexpected 'nobody'"),
}


@pytest.mark.parametrize("method", METHODS)
def test_damaged_tensors_are_refused_by_every_method(
    method: str, folders: Folders, stock: nn.Module, tmp_path: Path
) -> None:
    for change, match in TENSORS.values():
        folder = copied(folders[method], tmp_path / "a")
        edit_tensors(folder, change)
        assert re.search(match, refusal(vismt.load_adapter, stock, folder))
    adapted = adapted_vit(method)
    assert re.search("unexpected 'nobody'", refusal(vismt.load_adapter, adapted, folder))
    vismt.load_adapter(adapted, folders[method])
    vismt.unadapt(vismt.load_adapter(stock, folders[method]))


def site(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(description: dict[str, Any]) -> None:
        description["sites"][0].update(changes)

    return change


def top(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda description: description.update(changes)


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


ANY = {
    "method": (top(method=5), "method: expected str, got 5"),
    "format": (top(format="1"), "format '1'"),
    "options": (top(options=[]), "options: expected mapping"),
    "dropout as text": (top(options={"dropout": "x"}), r"dropout.*'x'; it must be a number in \[0, 1\)"),
    "dropout of 5": (top(options={"dropout": 5}), "dropout.*5; it must be"),
    "dropout below 0": (top(options={"dropout": -1}), "dropout.*-1; it must be"),
    "parts": (top(parts={"blocks": {"type": 3, "settings": {}}}), "type: expected str, got 3"),
    "program": (top(parts={"blocks": {"type": "vismt.cli.__main__:main", "settings": {}}}), "this version of vismt"),
    "abstract": (
        top(parts={"blocks": {"type": "vismt.lowrank.layers.wrappers:ModuleWrapper", "settings": {}}}),
        "this version of vismt",
    ),
    "a layer": (
        top(parts={"blocks": {"type": "low_rank", "settings": {}}}),
        "'low_rank' carries the update of a weight; its entry belongs into sites",
    ),
    "also_train": (top(also_train=[["head"]]), r"also_train\[0\]: expected str"),
    "unknown": (top(nobody=1), "unknown key 'nobody'"),
    "samples left out": (top(base_samples={}), "base_samples: they are not of the weights"),
    "samples cut": (
        lambda d: d.update(base_samples={name: values[:3] for name, values in d["base_samples"].items()}),
        "3 values, needed 16",
    ),
    "samples as texts": (
        lambda d: d.update(base_samples={name: ["x"] * 16 for name in d["base_samples"]}),
        "expected float, got 'x'",
    ),
    "NaN samples": (
        lambda d: d.update(base_samples={name: [float("nan")] * 16 for name in d["base_samples"]}),
        "not a finite number",
    ),
    "infinite": (top(base=1e999), "not a finite number"),
    "large": (top(base=10**40), "at most 64 are read"),
}
SITES = {
    "no shape": (site(shape=[]), r"sites\[0\].shape: expected list of 2 values .*, got \[\]"),
    "shape of texts": (site(shape=["x", 3]), r"shape\[0\]: expected int"),
    "path": (site(path=3), r"sites\[0\].path: expected str"),
    "root": (site(path=""), "path ''"),
    "kind": (site(kind="linears"), "kind: expected 'linear' or"),
    "convolution": (site(kind="conv2d"), "conv2d"),
    "rank as text": (site(rank="x"), "rank: expected int, got 'x'"),
    "rank true": (site(rank=True), "rank: expected int, got True"),
    "rank 0": (site(rank=0), "rank 0"),
    "rank": (site(rank=10**6), "rank|needed"),
    "blocks": (site(blocks=[[1]]), r"blocks\[0\]: expected int"),
    "scale": (site(scale=[1]), r"scale: expected float"),
    "layer": (site(layer="low_ranks"), "no adapter module 'low_ranks'"),
    "no module of a weight": (
        site(layer="moefied_ffn"),
        "'moefied_ffn' carries no update of a weight; its entry belongs into parts",
    ),
    "layer as list": (site(layer=["low_rank"]), "layer: expected str or null"),
    "no layer": (lambda d: d["sites"].append(5), "expected mapping of str to Any, got 5"),
    "twice": (lambda d: d["sites"].append(d["sites"][0]), "a path is given twice"),
    "both": (lambda d: d.update(also_train=[f"{d['sites'][0]['path']}.weight"]), "is adapted"),
}


@pytest.mark.parametrize("method", METHODS)
def test_wrong_descriptions_are_refused_by_every_method(
    method: str, folders: Folders, stock: nn.Module, tmp_path: Path
) -> None:
    folder = copied(folders[method], tmp_path / "a")
    original = described(folder)
    for change, match in {**ANY, **(SITES if original["sites"] else {})}.values():
        description = copy.deepcopy(original)
        change(description)
        write_description(folder, description)
        assert re.search(match, refusal(vismt.load_adapter, stock, folder))
    for text, match in (
        ("[" * 100_000 + "]" * 100_000, "nested too deep"),
        (json.dumps({**original, "options": {"x": deep(50)}})[:-1], "JSON"),
        ('{"format": 1, "format": 1}', "given twice"),
        ("[]", "not a section"),
        (json.dumps({**original, "model": "another"}), "was changed after it was written"),
        (json.dumps({key: value for key, value in original.items() if key != "sha256"}), "sha256"),
    ):
        (folder / DESCRIPTION).write_text(text)
        assert re.search(match, refusal(vismt.load_adapter, stock, folder))


# ---- rows and columns of slices


def test_rows_that_a_weight_has_not_are_refused(tmp_path: Path) -> None:
    folder = vismt.save_adapter(adapted_vit("s2ft"), tmp_path / "a")
    indices = [name for name in described_tensors(folder) if name.endswith("slice_index")]
    assert any("qkv" in name for name in indices)
    for name in indices:
        for number in (10**6, -1):
            wrong = copied(folder, tmp_path / "b")
            edit_tensors(wrong, lambda t, name=name, number=number: t[name].__setitem__(0, number))
            assert re.search(
                f"{name}: it names {number}; the weight has 0 to", refusal(vismt.load_adapter, small_vit(), wrong)
            )
        wrong = copied(folder, tmp_path / "b")
        edit_tensors(wrong, lambda t, name=name: t[name].__setitem__(0, t[name][1].clone()))
        assert re.search("each row or column once", refusal(vismt.load_adapter, small_vit(), wrong))


def described_tensors(folder: Path) -> list[str]:
    names: list[str] = []
    edit_tensors(folder, lambda tensors: names.extend(tensors))
    return names


# ---- what is not finite is not written, not merged and not combined


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_written_or_merged(method: str, value: float, tmp_path: Path) -> None:
    model = adapted_vit(method)
    where = "head" if method == "head" else "blocks"
    trained = [p for name, p in model.named_parameters() if p.requires_grad and where in name]
    with torch.no_grad():
        trained[0].view(-1)[0] = value
    before = state_hash(model)
    doors: list[Callable[[], object]] = [lambda: vismt.save_adapter(model, tmp_path / "a")]
    for module in model.modules():
        if hasattr(module, "fade"):
            module.fade = 1.0
            before = state_hash(model)
    with vismt.llm.instance_gates(torch.tensor([0.5, 0.5])):
        if model.vismt_record.layers and method != "mtlora":  # its pairs of tasks do not merge
            doors += [lambda: vismt.merge(model), lambda: vismt.export_peft(model, tmp_path / "p")]
        for door in doors:
            with pytest.raises(UserError, match=r"holds NaN or infinite values.*force=True"):
                door()
            assert state_hash(model) == before and not list(tmp_path.iterdir())
        folder = vismt.save_adapter(model, tmp_path / "a", force=True)
        assert re.search("NaN or infinite values", refusal(vismt.load_adapter, small_vit(), folder))
        if model.vismt_record.layers and method != "mtlora":  # its pairs of tasks do not merge
            peft = vismt.export_peft(model, tmp_path / "p", force=True)
            with pytest.raises(UserError, match="NaN or infinite values"):
                vismt.import_peft(small_vit(), peft)
            vismt.merge(model, force=True)
            assert type(model.blocks[0].attn.qkv) is nn.Linear


def test_a_merge_beyond_the_range_of_the_weights_changes_nothing() -> None:
    """Finite factors in fp32, and a sum that fp16 cannot hold: in the last layer, after the others were computed."""
    for method in ("lora", "s2ft"):
        model = small_vit().half()
        vismt.adapt(model, method, **({"ratio": 0.25} if method == "s2ft" else {"rank": 2}))
        last = [p for p in model.parameters() if p.requires_grad][-1]
        with torch.no_grad():
            last.fill_(1e5)
            for parameter in model.parameters():
                if parameter.requires_grad and parameter is not last:
                    parameter.fill_(1.0)
        before = state_hash(model)
        with pytest.raises(UserError, match=r"merge: '.*\.weight' holds NaN or infinite"):
            vismt.merge(model)
        assert state_hash(model) == before
        stock = state_hash(small_vit().half())
        assert state_hash(vismt.unadapt(model)) == stock


def test_another_base_with_nan_is_noticed(folders: Folders) -> None:
    model = small_vit()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.fill_(float("nan"))
    assert re.search("was made for", refusal(vismt.load_adapter, model, folders["lora"]))
    with pytest.warns(UserWarning, match="was made for"):
        vismt.load_adapter(model, folders["lora"], on_other_base="warn")
    with pytest.raises(UserError, match="holds NaN"):
        vismt.merge(model)


def test_a_model_of_a_smaller_range_refuses_values_beyond_it(folders: Folders, tmp_path: Path) -> None:
    folder = copied(folders["lisa"], tmp_path / "a")
    edit_tensors(folder, put(1e6))
    vismt.load_adapter(small_vit(), folder)
    assert re.search("beyond the range of torch.float16", refusal(vismt.load_adapter, small_vit().half(), folder))


def test_weights_without_values_are_refused(folders: Folders) -> None:
    model = small_vit()
    model.blocks[1].mlp.to("meta")
    for call in (
        lambda: vismt.adapt(model, "lora", ["qkv"], rank=2),
        lambda: vismt.load_adapter(model, folders["lora"]),
        lambda: vismt.load_adapter(small_vit().to("meta"), folders["lora"]),
    ):
        with pytest.raises(UserError, match="has no values in memory"):
            call()
    assert not hasattr(model, "vismt_record")
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(small_vit())
    with pytest.raises(UserError, match="has no values in memory"):
        vismt.adapt(model, "lora", rank=2)


def test_combine_refuses_sums_that_are_not_finite(folders: Folders) -> None:
    for weights, match in (
        ([1e308, 1e308], "the sum of the weights"),
        ([10**400, 1], "weight 0"),
        ([1e40, 1e40], "are NaN or infinite"),
    ):
        with pytest.raises(UserError, match=match):
            vismt.lowrank.combine([folders["lora"], folders["lora"]], weights)


# ---- anything else


def written(folder: Path) -> list[Path]:
    """Return the files of an adapter."""
    return sorted(path for path in folder.iterdir() if path.name != LOCK)


def damage(folder: Path, kind: str, random: Random) -> None:
    if kind == "tensors":
        edit_tensors(folder, lambda tensors: damage_tensors(tensors, random))
    elif kind == "bytes":
        damage_bytes(random.choice(written(folder)), random)
    else:
        content = damage_json(described(folder), random)
        text = sealed(content) if kind == "resealed" and isinstance(content, dict) else json.dumps(content)
        (folder / DESCRIPTION).write_text(text)


CASES = {
    "method": st.sampled_from(METHODS),
    "kind": st.sampled_from(["json", "resealed", "resealed", "tensors", "bytes"]),
    "random": st.randoms(use_true_random=False),
}


@cases(quick=40, campaign=700)
def test_damaged_adapters_do_no_harm(cases: int, folders: Folders, stock: nn.Module, tmp_path: Path) -> None:
    @many(cases)
    @given(**CASES)
    def check(method: str, kind: str, random: Random) -> None:
        folder = copied(folders[method], tmp_path / "a")
        damage(folder, kind, random)
        assert unharmed(vismt.load_adapter, stock, folder)
        with contextlib.suppress(UserError), vismt.llm.instance_gates(torch.tensor([0.5, 0.5])):
            vismt.lowrank.combine([folder], [0.5])

    check()


@cases(quick=10, campaign=100)
def test_a_bit_that_changed_is_noticed(cases: int, folders: Folders, stock: nn.Module, tmp_path: Path) -> None:
    """In either file: no digit of a scale and no value of a factor changes unseen."""

    @many(cases)
    @given(method=st.sampled_from(METHODS), random=st.randoms(use_true_random=False), bit=st.integers(0, 7))
    def check(method: str, random: Random, bit: int) -> None:
        folder = copied(folders[method], tmp_path / "a")
        path = random.choice(written(folder))
        data = bytearray(path.read_bytes())
        data[random.randrange(len(data))] ^= 1 << bit
        path.write_bytes(data)
        assert refusal(vismt.load_adapter, stock, folder)

    check()


def test_the_hash_sees_what_a_load_may_change() -> None:
    """The check itself: one value, one flag, one module."""
    model = tiny_vit()
    hashes = {state_hash(model)}
    with torch.no_grad():
        model.head.bias[0] += 1
    hashes.add(state_hash(model))
    model.head.bias.requires_grad_(False)
    hashes.add(state_hash(model))
    model.head = nn.Sequential(model.head)
    hashes.add(state_hash(model))
    assert len(hashes) == 4
