"""A merged model that is saved as a whole is loaded by transformers and timm without vismt."""

from __future__ import annotations

import copy
import gc
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.language_models import LMS, relative, tiny_lm, tokens
from helpers.tiny import holds, images, shake, snapshot, tiny_vit
from safetensors.torch import load_file, save_file

import vismt
from vismt.base.errors import UserError
from vismt.lowrank import erased_by_rounding
from vismt.lowrank.layers.base import adapter_layers
from vismt.lowrank.model.merge import Watch

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "pissa", "s2ft"])
@pytest.mark.parametrize("kind", LMS)
def test_transformers_loads_a_merged_folder(kind: str, method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_lm(kind).to(dtype)
    vismt.adapt(model, method, **({"ratio": 0.25} if method == "s2ft" else {"rank": 2, "alpha": 4}))
    adapted = shake(model)(tokens()).logits
    vismt.merge(model).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert type(again) is type(tiny_lm(kind)) and again.dtype == dtype
    assert holds(model, again.state_dict()) and not holds(again, tiny_lm(kind).to(dtype).state_dict())
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == (kind == "gpt2")
    if dtype == torch.float32:  # a cast also rounds the rotary angles of the model
        assert torch.allclose(again(tokens()).logits, adapted, atol=2e-5)


def test_trained_embeddings_stay_tied(tmp_path: Path) -> None:
    model = tiny_lm("gpt2")
    vismt.adapt(model, "lora", ["c_attn"], rank=2, also_train=["wte"])
    vismt.merge(shake(model)).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.lm_head.weight is again.transformer.wte.weight
    assert torch.equal(again.lm_head.weight, model.transformer.wte.weight)
    assert not torch.equal(again.lm_head.weight, tiny_lm("gpt2").lm_head.weight)


@pytest.mark.parametrize("method", ["lora", "pissa", "polar"])
def test_timm_loads_a_merged_file(method: str, tmp_path: Path) -> None:
    model = tiny_vit()
    vismt.adapt(model, method, rank=2, also_train=["head"])
    vismt.merge(shake(model))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = tiny_vit(checkpoint_path=str(tmp_path / "model.safetensors"))
    assert torch.equal(again(images()), model(images())) and not torch.equal(again(images()), tiny_vit()(images()))


@pytest.mark.parametrize("options", [{"rank_pattern": {"down_proj": 5}}, {"clamp_rank": True, "rank": 40}])
def test_a_uniform_export_has_one_rank_and_the_scale_of_every_reader(options: dict, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_lm("llama")
    vismt.adapt(model, "lora", **{"rank": 2, "alpha": 3, **options})
    with torch.no_grad():
        expected = shake(model)(tokens()).logits
    for uniform in (True, False):
        folder = vismt.export_peft(model, tmp_path / str(uniform), uniform=uniform)
        settings = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        pairs = {key.removesuffix(".lora_A.weight"): len(value) for key, value in tensors.items() if "lora_A" in key}
        assert (set(pairs.values()) == {settings["r"]}) == uniform and (settings["rank_pattern"] == {}) == uniform
        # What llama.cpp computes: alpha / the rank of the tensor, whatever the patterns are.
        right = []
        for path, rank in pairs.items():
            A, B = tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]
            update = model.get_submodule(path.removeprefix("base_model.model.")).low_rank().delta()
            right.append(torch.allclose(settings["lora_alpha"] / rank * B @ A, update, atol=1e-6))
        assert all(right) == uniform
        theirs = peft.PeftModel.from_pretrained(tiny_lm("llama"), str(folder)).eval()
        with torch.no_grad():
            assert torch.allclose(theirs(tokens()).logits, expected, atol=1e-5)
    with pytest.raises(vismt.UserError, match="'peft:miss' has a format of peft's own, without compact, uniform"):
        hosted = tiny_lm("llama")
        vismt.adapt(hosted, "peft:miss", rank=2)
        vismt.export_peft(hosted, tmp_path / "other", uniform=True)


@pytest.mark.parametrize("method", ["lora", "pissa", "s2ft"])
def test_what_rounding_erases_is_what_the_merged_weights_lack(method: str) -> None:
    model = tiny_lm("llama").to(torch.bfloat16)
    vismt.adapt(model, method, **({"ratio": 0.25} if method == "s2ft" else {"rank": 2}))
    shake(model, 0.01)
    layers = adapter_layers(model)
    stock = {path: layer.weight.detach().float().clone() for path, layer in layers.items()}
    updates = {path: layer.low_rank().delta() for path, layer in layers.items()}
    erased = erased_by_rounding(model)
    vismt.merge(model)
    gained = {path: model.get_submodule(path).weight.detach().float() - stock[path] for path in stock}
    lost = sum(float((gained[path] - updates[path]).square().sum()) for path in stock)
    assert erased == pytest.approx((lost / sum(float(u.square().sum()) for u in updates.values())) ** 0.5, rel=0.02)
    assert 0.01 < erased < 1


def test_a_small_update_of_large_weights_is_erased_whole() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4)).to(torch.bfloat16)
    torch.nn.init.constant_(model[0].weight, 1.0)
    vismt.adapt(model, "lora", rank=1)
    torch.nn.init.constant_(model[0].lora_A, 1.0)
    torch.nn.init.constant_(model[0].lora_B, 2.0**-10)  # the spacing above 1 is 2^-7
    assert erased_by_rounding(model) == 1.0
    assert erased_by_rounding(model.float()) is None


@pytest.mark.parametrize("method", ["lora", "polar", "s2ft", "lisa", "peft:ia3"])
def test_saving_an_adapted_model_writes_what_it_computes(method: str, tmp_path: Path) -> None:
    """from_pretrained reads the stock keys alone: of the base beside factors, it would be the base."""
    model = tiny_lm("llama")
    options: dict = {"s2ft": {"ratio": 0.4}, "lisa": {"active": 1}}.get(method, {"rank": 2})
    if method == "peft:ia3":
        options = {"targets": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    vismt.adapt(model, method, **options)
    expected, before = shake(model)(tokens()).logits, snapshot(model)
    for folder, more in (
        ("plain", {}),
        ("trainer", {"state_dict": None}),
        ("given", {"state_dict": model.state_dict()}),
    ):
        model.save_pretrained(tmp_path / folder, **more)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        assert torch.allclose(again(tokens()).logits, expected, atol=2e-5), folder
        assert set(load_file(tmp_path / folder / "model.safetensors")) <= set(tiny_lm("llama").state_dict())
    assert torch.equal(model(tokens()).logits, expected) and "save_pretrained" in vars(copy.deepcopy(model))
    assert holds(model, before)
    model.save_pretrained(tmp_path / "checkpoint-3", state_dict=None)  # a Trainer continues from it
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(load_file(tmp_path / "checkpoint-3" / "model.safetensors")) >= trained
    assert "save_pretrained" not in vars(vismt.unadapt(model))


def test_what_no_weights_hold_is_not_saved_as_weights(tmp_path: Path) -> None:
    """A router, gates of several users, and a part of an adapted model. Parked adapters are left out."""
    model = tiny_lm("llama")
    vismt.adapt(model, "ilora", rank=2, n_experts=2, user_width=4)
    with pytest.raises(UserError, match=r"save_pretrained: merge: .*vismt\.save_adapter\(model, folder\)\."):
        model.save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match=r"save_pretrained: this LlamaModel is a part of an adapted model"):
        model.model.save_pretrained(tmp_path / "b")
    model = tiny_lm("llama")
    vismt.adapt(model, "lora", rank=2, name="one")
    shake(model)
    wanted = model(tokens()).logits
    vismt.adapt(model, "lora", rank=2, name="two")
    shake(model, seed=5)
    vismt.activate(model, "one")
    model.save_pretrained(tmp_path / "d")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "d").eval()
    assert torch.allclose(again(tokens()).logits, wanted, atol=2e-5)
    assert set(load_file(tmp_path / "d" / "model.safetensors")) <= set(tiny_lm("llama").state_dict())
    assert vismt.lowrank.model.record.adapter_names(model) == ["one", "two"] and not any(
        (tmp_path / name).exists() for name in "ab"
    )
    with pytest.raises(UserError, match=r"save_pretrained: .*Missing key"):
        model.save_pretrained(tmp_path / "e", state_dict=tiny_lm("llama").state_dict())


def test_a_model_around_adapted_parts_saves_what_it_computes(tmp_path: Path) -> None:
    """The stock function of the whole would write the base of the part, in silence; the part may be any module."""
    for part in ("model", "model.layers.1"):
        model = tiny_lm("llama")
        vismt.adapt(model.get_submodule(part), "lora", rank=2)
        shake(model.get_submodule(part), 0.2)
        expected = model(tokens()).logits
        model.save_pretrained(tmp_path / part)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / part).eval()
        assert torch.allclose(again(tokens()).logits, expected, atol=2e-5), part
        assert not torch.allclose(tiny_lm("llama")(tokens()).logits, expected, atol=2e-2)
        assert torch.equal(model(tokens()).logits, expected) and len(vismt.status(model).adapters) == 1
        vismt.unadapt(model.get_submodule(part))
        model.save_pretrained(tmp_path / f"stock of {part}")
        stock = load_file(tmp_path / f"stock of {part}" / "model.safetensors")
        assert all(torch.equal(value, tiny_lm("llama").state_dict()[name]) for name, value in stock.items())


def test_a_model_without_an_active_adapter_saves_the_base_alone(tmp_path: Path) -> None:
    model = tiny_lm("llama")
    vismt.adapt(model, "lora", rank=2)
    shake(model)
    vismt.activate(model, None)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert set(written) <= set(tiny_lm("llama").state_dict())


def test_push_to_hub_uploads_merged_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_lm("llama")
    vismt.adapt(model, "lora", rank=2)
    expected = shake(model)(tokens()).logits
    uploaded: list[Path] = []

    def upload(self, working_dir, *args, **options):  # what would go to the hub
        uploaded.append(shutil.copytree(working_dir, tmp_path / "uploaded"))

    hub = SimpleNamespace(create_repo=lambda *_, **__: SimpleNamespace(repo_id="me/model"))
    monkeypatch.setattr("transformers.utils.hub.create_repo", hub.create_repo, raising=False)  # of transformers 4
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub, raising=False)
    card = SimpleNamespace(save=lambda path: None)  # the real one asks the hub for the card that is there
    for module in ("transformers.modeling_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.create_and_tag_model_card", lambda *_, **__: card, raising=False)
    monkeypatch.setattr(transformers.PreTrainedModel, "_upload_modified_files", upload)
    model.push_to_hub("me/model")
    again = transformers.AutoModelForCausalLM.from_pretrained(uploaded[0]).eval()
    assert torch.allclose(again(tokens()).logits, expected, atol=2e-5)


def test_a_state_dict_of_an_adapted_model_is_refused_by_a_stock_one() -> None:
    for method, options in (("lora", {"rank": 2}), ("s2ft", {"ratio": 0.4})):
        model = tiny_lm("llama")
        vismt.adapt(model, method, **options)
        with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict"):
            tiny_lm("llama").load_state_dict(model.state_dict())


@pytest.mark.parametrize("end", ["unadapt", "merge", "dropped"])
def test_transformers_has_its_own_save_pretrained_again_when_no_model_is_adapted(end: str, tmp_path: Path) -> None:
    gc.collect()
    others, watched = Watch.alive, transformers.PreTrainedModel.save_pretrained  # of models that other tests keep
    stock = watched.__wrapped__ if others else watched
    models = [tiny_lm("llama"), tiny_lm("llama")]
    for model in models:
        vismt.adapt(model.model, "lora", rank=2)  # the model around it is not adapted itself
        shake(model)
    models.append(copy.deepcopy(models[0]))
    while models:
        assert transformers.PreTrainedModel.save_pretrained is not stock
        model = models.pop()
        expected = model(tokens()).logits
        model.save_pretrained(tmp_path / str(len(models)))
        saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(len(models)))
        assert relative(saved(tokens()).logits, expected) < 1e-5
        if end != "dropped":
            getattr(vismt, end)(model.model)
        assert "save_pretrained" not in vars(model)
        del model, expected
        gc.collect()
    assert Watch.alive == others
    assert transformers.PreTrainedModel.save_pretrained is (watched if others else stock)
