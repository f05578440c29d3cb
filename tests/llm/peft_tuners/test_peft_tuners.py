"""Hosted tuners against peft itself: equal logits after a training step, after saving and loading, and after merging."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.language_models import run, stock, tokens
from helpers.tiny import DIGITS, holds, images, shake, snapshot, tiny_vit
from helpers.tiny_runs import run_config, written
from torch import nn

import vismt
from vismt.base.errors import UserError
from vismt.cli import main
from vismt.llm.peft_tuners.layer import HostedLayer
from vismt.methods import METHODS

peft = pytest.importorskip("peft")

RANK, SEED = 4, 3
# The arguments of peft's configuration, and of `adapt` where they are other ones.
TUNERS: dict[str, dict[str, Any]] = {
    "dora": {"r": RANK, "lora_alpha": 6, "use_dora": True},
    "miss": {"r": RANK},
    "oft": {"oft_block_size": 8},
    "boft": {"boft_block_size": 4},
    "hra": {"r": RANK},
    "ia3": {"feedforward_modules": ".*(fc2|down_proj)"},
    "vera": {"r": RANK},
    "randlora": {"r": RANK, "randlora_alpha": 8},
    "shira": {"r": RANK},
    "loha": {"r": RANK, "alpha": RANK},
    "lokr": {"r": RANK, "alpha": RANK},
    "fourierft": {"n_frequency": 50},
    "vblora": {"r": RANK, "vector_length": 8},
    "lily": {"r": RANK},
}
OURS: dict[str, dict[str, Any]] = {
    "dora": {"alpha": 6},
    "ia3": {},  # the feed-forward modules are those among the targets
    "randlora": {"alpha": 8},
}
TARGETS = {"vit": ["attn.qkv", "mlp.fc2"], "llama": ["q_proj", "down_proj"]}
KIND = {"dora": "LORA"}
CASES = [(tuner, kind) for tuner in TUNERS for kind in TARGETS]


def options(tuner: str, kind: str) -> dict[str, Any]:
    fields = {"r", "alpha", "lora_alpha", "use_dora", "randlora_alpha"}
    given = {name: value for name, value in TUNERS[tuner].items() if name not in fields}
    own = OURS.get(tuner, {})
    if tuner == "ia3":
        own = {"feedforward_modules": [TARGETS[kind][1]]}
    rank = {} if "rank" in METHODS[f"peft:{tuner}"].unread else {"rank": RANK}
    return {"targets": TARGETS[kind], **rank, "seed": SEED, **given, **own}


def hosted(tuner: str, kind: str = "vit", **more: Any) -> nn.Module:
    model = stock(kind)
    vismt.adapt(model, f"peft:{tuner}", **{**options(tuner, kind), **more})
    return model


def directly(tuner: str, kind: str) -> nn.Module:
    torch_seed = torch.random.get_rng_state()
    pattern = r".*\.({})".format("|".join(TARGETS[kind]))
    mapping = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    config = mapping[KIND.get(tuner, tuner.upper())](target_modules=pattern, **TUNERS[tuner])
    model = stock(kind)
    torch.manual_seed(SEED)
    model = peft.get_peft_model(model, config)
    torch.random.set_rng_state(torch_seed)
    return model


def step(model: nn.Module, kind: str) -> nn.Module:
    """Take a large step of AdamW, so that every part of the update matters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    model.eval()
    out = model(images()) if kind == "vit" else model(tokens()).logits
    out.square().mean().backward()
    optimizer.step()
    return model


@pytest.mark.parametrize("tuner,kind", CASES)
def test_a_step_a_file_and_a_merge_are_those_of_peft(tuner: str, kind: str, tmp_path: Path) -> None:
    ours, theirs = step(hosted(tuner, kind), kind), step(directly(tuner, kind), kind)
    expected = run(theirs, kind)
    assert not torch.allclose(expected, run(stock(kind), kind), atol=1e-3)
    assert torch.equal(run(ours, kind), expected)

    vismt.save_adapter(ours, tmp_path / "adapter")
    assert torch.equal(run(vismt.load_adapter(stock(kind), tmp_path / "adapter"), kind), expected)
    again = hosted(tuner, kind)
    assert torch.equal(run(vismt.load_adapter(again, tmp_path / "adapter"), kind), expected)
    vismt.export_peft(ours, tmp_path / "peft")
    read = peft.PeftModel.from_pretrained(stock(kind), str(tmp_path / "peft")).eval()
    assert torch.equal(run(read, kind), expected)
    assert torch.equal(run(ours, kind), expected)

    if tuner == "lily":  # routes by its input
        with pytest.raises(UserError, match="merge: peft cannot merge its tuner 'lily'"):
            vismt.merge(ours)
        return
    merged, reference = vismt.merge(ours), theirs.merge_and_unload()
    assert [type(m) for m in merged.modules()] == [type(m) for m in stock(kind).modules()]
    assert holds(merged, reference.state_dict())


@pytest.mark.parametrize("tuner", TUNERS)
def test_the_contract_of_every_method(tuner: str) -> None:
    original = snapshot(tiny_vit())
    state = torch.get_rng_state()
    model = hosted(tuner, also_train=["head"])
    torch.manual_seed(5)
    other = hosted(tuner, also_train=["head"])
    torch.set_rng_state(state)
    assert torch.equal(model(images()), other(images()))
    shake(model)(images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        expected = ".tuner." in name or name.startswith("head.")
        assert parameter.requires_grad == expected and (parameter.grad is not None) == expected, name
    expected = model(images())
    clone = copy.deepcopy(model)
    assert torch.equal(clone(images()), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images()), expected)
    shake(clone)
    assert torch.equal(model(images()), expected)
    double = copy.deepcopy(model).to(torch.float64)
    assert torch.allclose(double(images().double()).float(), expected, atol=1e-3)
    fresh = hosted(tuner, also_train=["head"], seed=SEED if tuner in ("shira", "fourierft") else 8)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(images()), expected)
    assert holds(vismt.unadapt(model), original)
    assert all(parameter.requires_grad for parameter in model.parameters()) and not hasattr(model, "peft_config")


def test_a_replaced_weight_reaches_the_tuner() -> None:
    model = shake(hosted("dora"))
    layer = model.blocks[0].mlp.fc2
    values = {"blocks.0.mlp.fc2.weight": 2 * layer.weight.detach()}
    changed = torch.func.functional_call(model, values, (images(),))
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(changed, model(images())) and isinstance(layer, HostedLayer)


def test_hooks_fire_once() -> None:
    model, seen = tiny_vit(), []
    model.blocks[0].mlp.fc2.register_forward_hook(lambda *_: seen.append(1))
    vismt.adapt(model, "peft:miss", targets=["mlp.fc2"], rank=2)
    model(images())
    assert seen == [1]


def test_alpha_keeps_the_ratio_of_peft_unless_it_is_given() -> None:
    def option(tuner: str, name: str, **more: Any) -> object:
        return hosted(tuner, **more).vismt_record.layers[0].settings.options[name]

    assert option("loha", "alpha", rank=2) == 2 and option("loha", "alpha", rank=2, alpha=7) == 7
    assert option("randlora", "randlora_alpha", rank=2, alpha=None) == 40
    assert "r" not in hosted("oft").vismt_record.layers[0].settings.options  # r would exclude oft_block_size


def test_ia3_without_feed_forward_modules_among_the_targets() -> None:
    model = tiny_vit()
    vismt.adapt(model, "peft:ia3", ["qkv"])
    assert all(
        layer.tuner.ia3_l["default"].shape == (96, 1) for layer in model.modules() if isinstance(layer, HostedLayer)
    )


def test_one_clear_line_and_the_model_unchanged() -> None:
    model, original = tiny_vit(), snapshot(tiny_vit())
    for name, given, words in (
        ("peft:dorra", {}, r"adapt: peft has no tuner 'dorra'\. Near: 'dora'"),
        ("peft:dora", {"lora_dropuot": 0.1}, r"'peft:dora' has no option 'lora_dropuot'\. Near: 'lora_dropout'"),
        ("peft:lora", {"init_lora_weights": "olora"}, "init_lora_weights: 'olora' moves the base weights"),
        ("peft:oft", {"oft_block_size": 0}, "peft does not take these options of OFT: "),
        ("peft:c3a", {"block_size": 5}, "peft cannot build C3A here: The block size should be a factor"),
        ("peft:miss", {"targets": ["attn.qvk"]}, "no module matches 'attn.qvk'"),
        ("peft:adalora", {}, "has no tuner 'adalora'"),
    ):
        with pytest.raises(UserError, match=words):
            vismt.adapt(model, name, **given)
        assert holds(model, original)
        assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UserError, match="'peft:miss' is a tuner of peft, not a pair of factors"):
        vismt.lowrank.combine([hosted("miss")], [1.0])


def test_without_peft(monkeypatch) -> None:
    from vismt.llm.peft_tuners import method as file

    file.host_tuner.cache_clear()
    monkeypatch.setitem(sys.modules, "peft.mapping", None)
    with pytest.raises(UserError, match=r"the tuners of peft need peft .*: pip install peft"):
        vismt.adapt(tiny_vit(), "peft:dora")


@pytest.mark.slow
def test_a_run_tunes_a_hosted_arm_beside_ours(tmp_path: Path) -> None:
    config = {
        **DIGITS,
        "adapt": {"method": "lora", "targets": ["attn.qkv"], "rank": 2},
        "arms": {"lora": {}, "dora": {"adapt.method": "peft:dora", "adapt.options": {"lora_dropout": 0.1}}},
        "tune": {"rates": [1.0e-3, 1.0e-2]},
    }
    folder = run_config(written(tmp_path / "toy.yaml", config))
    merges = [json.loads(file.read_text())["different_predictions"] for file in folder.rglob("merge.json")]
    assert merges == [0, 0] and (folder / "report.html").exists()
    assert main(["export", str(folder), "--format", "peft", "--arm", "dora", "--quiet"]) == 0
    assert json.loads(next(folder.rglob("adapter_config.json")).read_text())["use_dora"] is True
    assert main(["merge", str(folder), "--arm", "dora", "--quiet"]) == 0
