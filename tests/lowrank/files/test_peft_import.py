"""Folders written by peft give its logits here; its warnings, and starts that cannot be replayed, are errors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers.faults import many
from helpers.language_models import run, stock, tiny_lm
from helpers.tiny import images, shake, snapshot, tiny_vit
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import vismt
from vismt.base.errors import UserError
from vismt.lowrank.files.peft_settings import PatternTable, PeftSettings
from vismt.lowrank.layers.base import adapter_layers

peft = pytest.importorskip("peft")
get_pattern_key = peft.utils.other.get_pattern_key


def written(folder: Path, kind: str, **options: Any) -> tuple[nn.Module, Path]:
    """Return a briefly trained model of peft and the folder that it saved."""
    model = peft.get_peft_model(stock(kind), peft.LoraConfig(**{"r": 2, "lora_alpha": 6, **options})).eval()
    shake(model, 0.1).save_pretrained(str(folder))
    return model, folder


LLAMA = {"target_modules": ["q_proj", "up_proj"]}
CASES = {
    "list": ("llama", LLAMA),
    "regex": ("llama", {"target_modules": r".*layers\.1.*(up|down)_proj"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "layers": ("llama", {**LLAMA, "layers_to_transform": [1]}),
    "layers by pattern": ("llama", {**LLAMA, "layers_to_transform": 0, "layers_pattern": "layers"}),
    "excluded": ("llama", {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    "excluded by regex": ("llama", {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"}),
    "rslora": ("llama", {**LLAMA, "use_rslora": True}),
    "patterns": (
        "llama",
        {**LLAMA, "rank_pattern": {r"1\.mlp\.up_proj": 3}, "alpha_pattern": {"q_proj": 5, "up_proj": 1}},
    ),
    "gaussian": ("llama", {**LLAMA, "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {**LLAMA, "init_lora_weights": "orthogonal"}),
    "head": ("llama", {**LLAMA, "modules_to_save": ["lm_head"]}),
    "embedding and norms": ("llama", {**LLAMA, "modules_to_save": ["embed_tokens", "norm"]}),
    "adapted head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),  # peft saves the embeddings too
    "pissa": ("llama", {**LLAMA, "init_lora_weights": "pissa"}),
    "all biases": ("qwen2", {"target_modules": "all-linear", "bias": "all"}),
    "adapted biases": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "transposed pissa": (
        "gpt2",
        {"target_modules": "all-linear", "init_lora_weights": "pissa", "fan_in_fan_out": True},
    ),
    "tied": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    "convolution": ("vit", {"target_modules": ["qkv", "proj"], "r": 5}),
    "timm head": ("vit", {"target_modules": "all-linear"}),
    "everything": (
        "vit",
        {"target_modules": ["qkv"], "modules_to_save": ["norm", "head"], "bias": "all", "use_rslora": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_peft_wrote_gives_its_logits(case: str, tmp_path: Path) -> None:
    kind, options = CASES[case]
    theirs, folder = written(tmp_path, kind, **options)
    ours = vismt.import_peft(stock(kind), folder)
    difference = (run(ours, kind) - run(theirs, kind)).abs().max()
    assert difference < 3e-5 * max(1.0, float(run(theirs, kind).abs().max()))  # the SVD of a start is computed again
    assert not torch.allclose(run(ours, kind), run(stock(kind), kind), atol=1e-2)
    layers = sum(name.endswith("lora_A.default") for name, _ in theirs.named_modules())
    assert len(adapter_layers(ours)) == layers
    vismt.unadapt(ours)
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in snapshot(stock(kind)).items())


def test_a_replayed_start_is_kept_apart_and_goes_on(tmp_path: Path) -> None:
    theirs, folder = written(tmp_path / "theirs", "llama", **CASES["pissa"][1], lora_dropout=0.0)
    ours = vismt.import_peft(tiny_lm("llama"), folder)
    host = ours.model.layers[0].self_attn.q_proj
    assert torch.equal(host.lora_A, theirs.base_model.model.model.layers[0].self_attn.q_proj.lora_A.default.weight)
    assert host.rank == 2 and host.lora_A0 is not None
    again = vismt.load_adapter(tiny_lm("llama"), vismt.save_adapter(ours, tmp_path / "ours"))
    assert torch.equal(run(again, "llama"), run(ours, "llama"))


def test_a_start_that_is_not_determined_is_refused(tmp_path: Path) -> None:
    """With equal singular values 2 and 3, the part of W that is removed depends on the LAPACK."""
    model = nn.ModuleDict({"layer": nn.Linear(6, 6, bias=False)})
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["layer"], init_lora_weights="pissa")
    with torch.no_grad():
        model["layer"].weight.copy_(torch.diag(torch.tensor([3.0, 2.0, 2.0, 1.0, 1.0, 1.0])))
    base = nn.ModuleDict({"layer": nn.Linear(6, 6, bias=False)})
    base.load_state_dict(model.state_dict())
    peft.get_peft_model(model, config).save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="the singular values 2 and 3 of 'layer' are equal"):
        vismt.import_peft(base, tmp_path)


KEYS = st.sampled_from(["a", r"a\.b", "^a", r"^a\.b", "^b", "[ab]", r".*\.b", "a|b", r"b\.[^.]", "(a)", r"(a)\.\3"])


@many(200)
@given(st.lists(KEYS, unique=True, max_size=4), st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map(".".join))
def test_the_value_of_a_module_is_that_of_peft(keys: list[str], path: str) -> None:
    table = {key: float(place) for place, key in enumerate(keys)}
    assert PatternTable("x", table).value(path, -1.0) == table.get(get_pattern_key(keys, path), -1.0)


NAMES = st.sampled_from(["q", "k", "mlp.q", "layers.1.q", "a.layers.0.x.1.q", "x.1.q"])
TEXTS = st.sampled_from([r".*\.q", r"(a\.)?layers\.\d\.[qk]", "q|k", r".*(?<!mlp\.)q", r"(\w)\.\1.*", r"(?i).*Q"])
SETTINGS = {
    "target_modules": st.one_of(TEXTS, st.lists(NAMES, min_size=1, max_size=3)),
    "exclude_modules": st.one_of(st.none(), TEXTS, st.lists(NAMES, max_size=2)),
    "layers_to_transform": st.one_of(st.none(), st.integers(0, 1), st.lists(st.integers(0, 1), max_size=2)),
    "layers_pattern": st.sampled_from([None, "layers", ["x", "layers"], "(layers|x)", "[a-z]+"]),
    "modules_to_save": st.sampled_from([None, ["k"], ["mlp"], [r"layers\.0", "q"]]),
}
PATHS = [
    "q",
    "k",
    "a.q",
    "a.k",
    "layers.0.q",
    "a.layers.0.q",
    "a.layers.1.mlp.q",
    "a.layers.0.x.1.q",
    "b.x.1.layers.0.k",
]


@many(300)
@given(st.fixed_dictionaries(SETTINGS))
def test_the_settings_name_the_modules_that_peft_adapts(settings: dict[str, Any]) -> None:
    config = SimpleNamespace(**settings, target_parameters=None)
    ours = PeftSettings(2, 2.0, **settings)
    for path in PATHS:
        assert ours.names(path) == bool(peft.tuners.tuners_utils.check_target_module_exists(config, path)), path


def test_a_table_of_every_module_is_looked_up() -> None:
    paths = [f"model.layers.{number}.q-proj" for number in range(5000)]
    table = PatternTable("x", {f"^{re.escape(path)}": number for number, path in enumerate(paths)})
    assert table.expressions == [] and table.value(paths[-1], 0) == 4999 and table.value(f"x.{paths[-1]}", 0) == 0


Change = Callable[[dict[str, Any], dict[str, Tensor]], None]
KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def _drop(tensors: dict[str, Tensor], *keys: str) -> None:
    for key in keys:
        del tensors[key]


def _rename(tensors: dict[str, Tensor]) -> None:
    for key in list(tensors):
        tensors[key.replace(".weight", ".default.weight")] = tensors.pop(key)


REFUSED: dict[str, tuple[Change, str]] = {
    "a module is missing": (
        lambda c, t: _drop(t, KEY.format("A"), KEY.format("B")),
        r"the settings name 'model\.layers\.1\.mlp\.up_proj', but the file holds no factors",
    ),
    "a module is not named": (
        lambda c, t: c.update(target_modules=["q_proj"]),
        r"the file holds factors of 'model\.layers\.0\.mlp\.up_proj', which the settings do not name",
    ),
    "the regex names more": (
        lambda c, t: c.update(target_modules=r".*(q|up|down)_proj"),
        r"the settings name '.*down_proj'.* \(2 such modules\)",
    ),
    "all-linear": (
        lambda c, t: c.update(target_modules="all-linear"),
        r"the settings name 'model\.layers\.0\.mlp\.down_proj'",
    ),
    "layers": (
        lambda c, t: c.update(layers_to_transform=[0]),
        r"layers\.1\.mlp\.up_proj', which the settings do not name",
    ),
    "excluded": (lambda c, t: c.update(exclude_modules=["up_proj"]), r"up_proj', which the settings do not name"),
    "saved whole": (
        lambda c, t: c.update(modules_to_save=["lm_head"]),
        r"'lm_head\.weight' is missing, .*_save \['lm_head'\]",
    ),
    "not saved whole": (
        lambda c, t: t.update({"base_model.model.lm_head.weight": torch.zeros(40, 32)}),
        r"the file holds other values of 'lm_head\.weight', which the settings do not name",
    ),
    "half a pair": (lambda c, t: _drop(t, KEY.format("A")), "has lora_B but not its partner"),
    "no prefix": (lambda c, t: t.update({"model.x.lora_A.weight": torch.zeros(2, 2)}), "lacks the prefix"),
    "wrong r": (lambda c, t: c.update(r=4), r"lora_A: saved \(2, 32\), needed \(4, 32\)"),
    "wrong pattern": (
        lambda c, t: c.update(rank_pattern={"q_proj": 3}),
        r"q_proj\.lora_A: saved \(2, 32\), needed \(3, 32\)",
    ),
    "wrong shape": (
        lambda c, t: t.update({Q.format("A"): torch.zeros(2, 30)}),
        r"q_proj'.*\(32, 30\) weight, here it is",
    ),
    "an unknown module": (
        lambda c, t: t.update({f"base_model.model.nobody.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}),
        "no linear or convolution 'nobody'",
    ),
    "r zero": (lambda c, t: c.update(r=0), "cannot be read"),
    "no r": (lambda c, t: c.update(r=None), "cannot be read"),
    "a list of patterns": (lambda c, t: c.update(rank_pattern=[3]), "cannot be read"),
    "another tuner": (lambda c, t: c.update(peft_type="LOHA"), "peft_type 'LOHA'"),
    "no targets": (lambda c, t: c.update(target_modules=None), "name no module"),
    "bad regex": (
        lambda c, t: c.update(target_modules="(q_proj"),
        r"target_modules: '\(q_proj' is not a regular expression",
    ),
    "bad layers": (lambda c, t: c.update(layers_to_transform=["0"]), r"layers_to_transform\[0\]: expected int"),
    "pissa by iteration": (lambda c, t: c.update(init_lora_weights="pissa_niter_4"), "pissa_niter_4' changed the base"),
    "pissa of more than the full rank": (
        lambda c, t: [
            c.update(init_lora_weights="pissa", r=40, target_modules=["up_proj"]),
            *(t.pop(key) for key in list(t) if "q_proj" in key),
            t.update({key: torch.ones((40, len(of.T)) if "lora_A" in key else (len(of), 40)) for key, of in t.items()}),
        ],
        "is not a linear that a start of rank 40 can be replayed on",
    ),
    "corda": (lambda c, t: c.update(init_lora_weights="corda"), "cannot be replayed; convert it"),
    "olora": (lambda c, t: c.update(init_lora_weights="olora"), "cannot be replayed"),
    "loftq": (lambda c, t: c.update(init_lora_weights="loftq"), "cannot be replayed"),
    "a start to come": (lambda c, t: c.update(init_lora_weights="nova"), "'nova' changed the base"),
    "dora": (lambda c, t: c.update(use_dora=True), "'use_dora' is set"),
    "alora": (lambda c, t: c.update(alora_invocation_tokens=[1]), "'alora_invocation_tokens' is set"),
    "a variant to come": (lambda c, t: c.update(use_nova=True), "'use_nova' is set"),
    "bias": (lambda c, t: c.update(bias="some"), "bias 'some'; it must be one of none, all, lora_only"),
    "an embedding": (
        lambda c, t: t.update({"base_model.model.wte.lora_embedding_A": torch.zeros(2, 40)}),
        "not its partner",
    ),
    "another adapter's name": (
        lambda c, t: t.update({Q.format(side).replace(".weight", ".other.weight"): torch.zeros(2, 2) for side in "AB"}),
        "variant",
    ),
    "a magnitude": (lambda c, t: t.update({Q.format("magnitude_vector"): torch.zeros(32)}), "variant"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(case: str, tmp_path: Path) -> None:
    change, match = REFUSED[case]
    _, folder = written(tmp_path, "llama", **LLAMA)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.torch.load((folder / "adapter_model.safetensors").read_bytes())
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    model = tiny_lm("llama")
    with pytest.raises(UserError, match=match):
        vismt.import_peft(model, folder)
    after = model.state_dict()
    assert all(
        torch.equal(value, after[key]) for key, value in snapshot(tiny_lm("llama")).items()
    ) and not adapter_layers(model)


def test_names_of_peft_inside_the_file_are_read(tmp_path: Path) -> None:
    """`.default.` in keys, the older file format, and targets given by suffixes."""
    theirs, folder = written(tmp_path, "vit", target_modules=["fc1", "qkv"], modules_to_save=["head"])
    tensors = safetensors.torch.load((folder / "adapter_model.safetensors").read_bytes())
    _rename(tensors)
    tensors = {key.replace("head.default", "head.modules_to_save.default"): value for key, value in tensors.items()}
    assert "base_model.model.head.modules_to_save.default.weight" in tensors
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    ours = vismt.import_peft(tiny_vit(), folder)
    assert torch.allclose(ours(images()), theirs(images()), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"ensure_weight_tying": True}])
@pytest.mark.parametrize("name", ["wte", "lm_head"])
def test_a_tied_weight_that_was_trained_apart_is_refused(name: str, options: dict, tmp_path: Path) -> None:
    """peft trains a copy and unties the weights, which are tied here. Where peft keeps them tied, both are in the file."""
    theirs, folder = written(tmp_path, "gpt2", target_modules=["c_attn"], modules_to_save=[name], **options)
    tensors = safetensors.torch.load((folder / "adapter_model.safetensors").read_bytes())
    both = all(f"base_model.model.{path}.weight" in tensors for path in ("transformer.wte", "lm_head"))
    assert not both or options
    if both:
        assert torch.allclose(run(vismt.import_peft(tiny_lm("gpt2"), folder), "gpt2"), run(theirs, "gpt2"), atol=1e-5)
    else:
        with pytest.raises(UserError, match="whose weight it shares here; untie them first"):
            vismt.import_peft(tiny_lm("gpt2"), folder)


def test_tied_biases_are_trained_under_one_name(tmp_path: Path) -> None:
    """peft writes both names of a tied bias, and export_peft one."""
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}

    def bert() -> nn.Module:
        torch.manual_seed(0)
        return transformers.BertForMaskedLM(transformers.BertConfig(**shape, intermediate_size=24)).eval()

    ids = torch.arange(5)[None]
    model = bert()
    vismt.adapt(
        model, "lora", ["query"], rank=2, also_train=[n for n, _ in model.named_parameters() if n.endswith("bias")]
    )
    expected = shake(model, 0.1)(input_ids=ids).logits
    vismt.export_peft(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(bert(), str(tmp_path / "ours")).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    for folder in ("ours", "theirs"):
        assert torch.allclose(vismt.import_peft(bert(), tmp_path / folder)(input_ids=ids).logits, expected, atol=1e-5)
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = safetensors.torch.load(file.read_bytes())
    tied = [name for name in tensors if name.startswith("base_model.model.cls.predictions") and "transform" not in name]
    assert len(tied) == 2
    tensors[tied[0]] = tensors[tied[0]] + 1
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(UserError, match="untie them first"):
        vismt.import_peft(bert(), tmp_path / "theirs")
    safetensors.torch.save_file({name: value for name, value in tensors.items() if name not in tied}, file)
    with pytest.raises(UserError, match="bias' is missing, which the settings promise"):
        vismt.import_peft(bert(), tmp_path / "theirs")


def test_what_cannot_carry_an_update_is_refused(tmp_path: Path) -> None:
    _, folder = written(tmp_path, "gpt2", target_modules=["c_attn", "lm_head"])
    with pytest.raises(UserError, match=r"'lm_head' shares its weight with 'transformer\.wte\.weight'"):
        vismt.import_peft(tiny_lm("gpt2"), folder)


def test_another_base_of_embeddings_is_reported(tmp_path: Path) -> None:
    _, folder = written(tmp_path, "llama", target_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match=r"other values of '.*', which the settings do not name; load the base"):
        vismt.import_peft(tiny_lm("llama", seed=4), folder)
