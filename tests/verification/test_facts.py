"""Any folder is described; what is malformed is a reason, never a traceback, and stays bounded."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from random import Random

import pytest
import safetensors.torch
import torch
from helpers.damage import damage_json
from helpers.every_method import adapted_vit, small_vit
from helpers.tiny import shake, tiny_vit
from helpers.verified_folders import CONFIG, TENSORS, Folders, edit_config, edit_tensors, made, write_model

import vismt
from vismt.base.errors import UserError
from vismt.lowrank.files.facts import LARGEST_HEADER
from vismt.verification.facts import read_facts


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return made("llama", "lora", tmp_path_factory.mktemp("clean"))


def test_a_peft_folder(clean: Folders) -> None:
    facts = read_facts(clean.adapter)
    assert (facts.kind, facts.tuner, facts.reasons) == ("peft", "LORA", [])
    module = facts.modules["model.layers.0.self_attn.q_proj"]
    assert (module.rank, module.declared, module.scale) == (4, 4, 2)
    assert {role: tensor.shape for role, tensor in module.tensors.items()} == {"A": (4, 32), "B": (32, 4)}
    assert [tensor.path for tensor in facts.with_role("saved")] == ["lm_head.weight"]
    assert facts.tokenizer == ("tokenizer.json",)


def test_a_vismt_folder_and_a_checkpoint(clean: Folders, tmp_path: Path) -> None:
    model = tiny_vit()
    vismt.adapt(model, "lora", rank=2, alpha=6)
    vismt.save_adapter(shake(model), tmp_path / "adapter")
    facts = read_facts(tmp_path / "adapter")
    assert (facts.kind, facts.tuner, facts.reasons) == ("vismt", "lora", [])
    assert facts.modules["blocks.0.attn.qkv"].scale == 3 and facts.modules["blocks.0.attn.qkv"].rank == 2
    found = read_facts(clean.base)
    assert found.kind == "checkpoint" and found.config["model_type"] == "llama"
    assert found.stored.read("model.norm.weight").shape == (32,)  # type: ignore[union-attr]


def test_tensors_of_another_save_are_a_reason(tmp_path: Path) -> None:
    folder = vismt.save_adapter(adapted_vit("lora"), tmp_path)
    assert vismt.verify(folder).status == "ok"
    (file,) = folder.glob("*.safetensors")
    edit_tensors(file, lambda tensors: [tensors[name].mul_(3) for name in tensors if "lora_B" in name])
    verdict = vismt.verify(folder)
    assert verdict.codes == {"malformed"} and "is not the file that adapter.json describes" in verdict.findings[0].text


@pytest.mark.parametrize(
    ("method", "options", "code"),
    [
        ("s2ft", {"ratio": 0.25}, "merged-twice"),
        ("emtal", {"pairs": "expert", "n_experts": 4, "cluster": False}, "merged-twice"),
        ("lora", {"quantize": "nf4"}, "not-compared"),
        ("peft:loha", {}, "not-compared"),
    ],
)
def test_twice_the_update_is_never_ok(method: str, options: dict[str, object], code: str, tmp_path: Path) -> None:
    """Updates with whole numbers in them are compared; those that their files do not determine are named."""
    base = write_model(small_vit(), tmp_path / "base")
    vismt.adapt(model := small_vit(), method, rank=8, **options)
    vismt.save_adapter(shake(model), tmp_path / "adapter")
    for module in model.modules():
        if hasattr(module, "fade"):
            module.fade = 1.0
    merged = write_model(vismt.merge(model), tmp_path / "merged")

    fits = {module.fit for module in vismt.verify(tmp_path / "adapter", base=base, merged=merged).modules}
    assert fits == ({None} if code == "not-compared" else {"right"})
    stock = small_vit().state_dict()
    edit_tensors(merged / "model.safetensors", lambda t: [t[name].mul_(2).sub_(stock[name]) for name in t])
    assert code in vismt.verify(tmp_path / "adapter", base=base, merged=merged).codes


def test_no_adapter_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    assert read_facts(tmp_path).kind == "none"
    assert vismt.verify(tmp_path).codes == {"no-adapter"}
    with pytest.raises(UserError, match="does not exist"):
        read_facts(tmp_path / "absent")


def _huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")


def _long_header(path: Path) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<Q", LARGEST_HEADER + 8) + b"{")
        file.truncate(2 * LARGEST_HEADER)


def _wrong_offsets(path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**30, 2**30], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


@pytest.mark.parametrize(
    "damage",
    [
        _huge_header,
        _long_header,
        _wrong_offsets,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\x93" * 99),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_damaged_tensors_are_a_reason(damage: object, clean: Folders, tmp_path: Path) -> None:
    adapter = clean.copied(tmp_path).adapter
    damage(adapter / TENSORS)  # type: ignore[operator]
    assert read_facts(adapter).stored.reasons
    assert vismt.verify(adapter, base=clean.base).status == "broken"


def test_a_bomb_of_an_older_file_is_not_unpacked(clean: Folders, tmp_path: Path) -> None:
    adapter = clean.copied(tmp_path).adapter
    tensors = safetensors.torch.load_file(adapter / TENSORS)
    (adapter / TENSORS).unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    assert vismt.verify(adapter, base=clean.base, merged=clean.merged).status == "ok"
    with zipfile.ZipFile(adapter / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as parts:
        parts.writestr("archive/data/0", bytes(10**7))
    assert vismt.verify(adapter).codes == {"malformed", "empty"} or vismt.verify(adapter).codes == {"malformed"}


@pytest.mark.parametrize("name", ["missing", "list", "deep", "twice", "long"])
def test_malformed_settings_are_a_reason(name: str, clean: Folders, tmp_path: Path) -> None:
    adapter = clean.copied(tmp_path).adapter
    texts = {"list": "[]", "deep": "[" * 10**5, "twice": '{"r": 1, "r": 2}', "long": " " * (LARGEST_HEADER + 1)}
    (adapter / CONFIG).unlink()
    if name != "missing":
        (adapter / CONFIG).write_text(texts[name])
    verdict = vismt.verify(adapter, base=clean.base, merged=clean.merged)
    assert verdict.status == "broken" and "malformed" in verdict.codes


def test_an_index_that_points_outside_is_a_reason(clean: Folders, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(b"")
    assert "weight_map" in read_facts(tmp_path).stored.reasons[0]


@pytest.mark.slow
def test_random_damage_gets_a_verdict(clean: Folders, tmp_path: Path) -> None:
    """Values of both JSON files and bytes of the tensors, 120 times; more in the campaign."""
    adapter = clean.copied(tmp_path).adapter
    config, tensors = (adapter / CONFIG).read_text(), (adapter / TENSORS).read_bytes()
    for seed in range(120):
        random = Random(seed)
        (adapter / CONFIG).write_text(json.dumps(damage_json(json.loads(config), random)))
        changed = bytearray(tensors)
        if seed % 3 == 0:
            changed[random.randrange(len(changed) if seed % 2 else 200)] ^= 1 << random.randrange(8)
            changed = changed[: random.randrange(1, len(changed))] if seed % 5 == 0 else changed
        (adapter / TENSORS).write_bytes(changed)
        verdict = vismt.verify(adapter, base=clean.base, merged=clean.merged)
        assert verdict.status in ("ok", "suspicious", "broken")
        json.dumps(verdict.as_json())


def test_settings_and_tensors_that_disagree(clean: Folders, tmp_path: Path) -> None:
    def codes(name: str, config: object = None, tensors: object = None) -> set[str]:
        adapter = clean.copied(tmp_path / name).adapter
        if config:
            edit_config(adapter, config)  # type: ignore[arg-type]
        if tensors:
            edit_tensors(adapter / TENSORS, tensors)  # type: ignore[arg-type]
        return vismt.verify(adapter).codes

    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}"
    assert codes("rank", lambda c: c.update(r=8)) == {"rank"}
    assert codes("alpha", lambda c: c.update(lora_alpha=0)) == {"alpha-zero"}
    assert codes("dora", lambda c: c.update(use_dora=True)) == {"dora"}
    assert codes("magnitude", None, lambda t: t.update({first.format("magnitude_vector"): torch.ones(32)})) == {"dora"}
    assert codes("bias", None, lambda t: t.update({first.format("B.bias"): torch.ones(32)})) == {"lora-bias"}
    assert codes("unpaired", None, lambda t: t.pop(first.format("B.weight"))) == {"unpaired"}
    assert codes(
        "unnamed",
        lambda c: c.update(modules_to_save=None),
        lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(32)}),
    ) == {"unnamed-parameter"}
    assert codes(
        "prefix", None, lambda t: [t.update({n.removeprefix("base_model.model."): t.pop(n)}) for n in list(t)]
    ) == {"prefix"}
    assert codes(
        "infix",
        None,
        lambda t: [t.update({n.replace(".weight", ".mine.weight"): t.pop(n)}) for n in list(t) if "lora" in n],
    ) == {"adapter-name"}
    assert codes("infinite", None, lambda t: t[first.format("A.weight")].fill_(float("inf"))) == {"not-finite"}

    def twins(tensors: dict[str, torch.Tensor]) -> None:
        for side in "AB":
            tensors[first.replace("0", "1").format(f"{side}.weight")] = tensors[first.format(f"{side}.weight")].clone()

    assert codes("twins", None, twins) == {"duplicate"}


def test_zeros_of_a_few_modules_are_a_note_and_of_all_suspicious(clean: Folders, tmp_path: Path) -> None:
    adapter = clean.copied(tmp_path).adapter
    edit_tensors(adapter / TENSORS, lambda t: [t[n].zero_() for n in t if "lora_B" in n and "layers.0" in n])
    some = vismt.verify(adapter)
    assert some.status == "ok" and [finding.code for finding in some.findings] == ["zero-modules"]
    edit_tensors(adapter / TENSORS, lambda t: [t[n].zero_() for n in t if "lora_B" in n])
    every = vismt.verify(adapter)
    assert every.status == "suspicious" and [finding.code for finding in every.findings] == ["no-update"]
