"""Adapted models in transformers' Trainer, and repositories for the hub."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.lm_parts import save_lm
from helpers.results import result
from helpers.tiny import shake, tiny_vit
from torch import nn

import vismt
from vismt.base.errors import UserError
from vismt.multitask.emtal.fading import FadeConfig

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file  # noqa: E402

from vismt.integrations.hf import VismtCallback, push_to_hub, write_repository  # noqa: E402

STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def no_namespace_package() -> Iterator[None]:
    """In the checkout its folder datasets/ is found as a package where the one of that name is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            from datasets import Dataset  # noqa: F401
        except ImportError:
            patch.setattr("transformers.trainer.is_datasets_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_lm(tmp_path_factory.mktemp("lm") / "lm")


def rows() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 40, (8,), generator=generator) for _ in range(24)]
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


def trainer(folder: Path, out: Path, method: str, callback=None, *, steps: int = STEPS, **options):
    """Return a Trainer of an adapted model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    vismt.adapt(model, method, **options)
    arguments = transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=3,
    )
    callbacks = [VismtCallback()] if callback is None else callback
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=callbacks)


def losses(run) -> list[float]:
    return [line["loss"] for line in run.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    ("method", "options"), [("lora", {"rank": 2}), ("lisa", {"active": 1, "interval": 2}), ("polar", {"rank": 2})]
)
def test_a_checkpoint_has_the_adapter_alone_and_is_resumed(folder: Path, tmp_path: Path, method: str, options) -> None:
    whole = trainer(folder, tmp_path / "a", method, **options)
    whole.train()
    saved = load_file(tmp_path / "a" / "checkpoint-3" / "model.safetensors")
    frozen = {name for name, value in whole.model.named_parameters() if not value.requires_grad} - saved.keys()
    assert saved and (frozen or method == "lisa")
    if method != "lisa":
        assert all("lora_" in name for name in saved)
    again = trainer(folder, tmp_path / "a", method, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(again)[-3:] == losses(whole)[-3:]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder)
    loaded = vismt.load_adapter(stock, tmp_path / "a" / "checkpoint-6" / "adapter")
    ids = rows()[0]["input_ids"][None]
    assert torch.allclose(loaded(ids).logits, whole.model.eval()(ids).logits, atol=1e-5)
    assert not whole.model._keys_to_ignore_on_save  # as before
    whole.save_model(tmp_path / "final")
    final = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert torch.allclose(final(ids).logits, whole.model(ids).logits, atol=1e-5)


def test_a_trainer_without_the_callback_continues_from_its_checkpoint(folder: Path, tmp_path: Path) -> None:
    whole = trainer(folder, tmp_path, "lora", [], rank=2)
    whole.train()
    again = trainer(folder, tmp_path, "lora", [], rank=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(again)[-3:] == losses(whole)[-3:]


def test_s2ft_under_the_default_optimiser_leaves_frozen_weights_alone(folder: Path, tmp_path: Path) -> None:
    """Against a plain AdamW in the same Trainer; the checkpoint's adapter fits the true base."""
    optim, runs = "adamw_torch_fused", {}
    for name in ("adamw_torch", optim):
        run = runs[name] = trainer(folder, tmp_path / name, "s2ft", ratio=0.3, parts=("v", "o", "u", "d"))
        run.args.optim = transformers.training_args.OptimizerNames(name)
        run.train()
    assert losses(runs[optim]) == pytest.approx(losses(runs["adamw_torch"]), rel=1e-4)
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = rows()[0]["input_ids"][None]
    wanted = runs[optim].model.eval()(ids).logits
    loaded = vismt.load_adapter(copy.deepcopy(stock), tmp_path / optim / f"checkpoint-{STEPS}" / "adapter")
    assert torch.allclose(loaded(ids).logits, wanted, atol=1e-5)
    restored = vismt.unadapt(runs[optim].model).state_dict()
    assert all(torch.equal(value, restored[name]) for name, value in stock.state_dict().items())


def doubled(model: nn.Module) -> None:
    model.model.layers[0].self_attn.q_proj.weight.data *= 2


def nudged(model: nn.Module) -> None:
    """Change one value of a weight that is not adapted."""
    model.model.norm.weight.data[3] += 1e-3


@pytest.mark.parametrize(
    ("change", "method", "options", "message"),
    [
        (doubled, "lora", {}, "of another base model"),
        (nudged, "lora", {}, "of another base model"),
        (None, "pissa", {}, r"another method \(lora, this model has pissa\)"),
        (None, "lora", {"alpha": 32}, r"another layers scale \(\d+.\d+, this model has 16.0\)"),
        (None, "lora", {"dropout": 0.5}, "another options dropout"),
        (None, "polar", {}, r"another method or other settings \('.*lora_C' is not in it\)"),
        (None, "s2ft", {}, r"another method or other settings \('.*slice_values' is not in it\)"),
        (None, "lisa", {"active": 1}, r"another method or other settings \('.*' is not in it\)"),
        (None, "lora", {"targets": ["q_proj"]}, r"another method or other settings \('.*lora_A' is in it alone\)"),
        (None, "lora", {"rank": 4}, r"another method or other settings \('.*lora_A' is \(2, 32\), here \(4, 32\)\)"),
    ],
)
def test_a_checkpoint_of_another_base_method_or_setting_is_refused(
    folder: Path, checkpoint: Path, tmp_path: Path, change, method: str, options, message: str
) -> None:
    other = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if change is not None:
        with torch.no_grad():
            change(other)
    other.save_pretrained(tmp_path / "other")
    rank = {} if method in ("s2ft", "lisa") else {"rank": 2}
    again = trainer(tmp_path / "other", tmp_path / "out", method, **{**rank, **options})
    with pytest.raises(UserError, match=f"resume: the checkpoint is .*{message}"):
        again.train(resume_from_checkpoint=str(checkpoint))


@pytest.fixture(scope="module")
def checkpoint(folder: Path, tmp_path_factory) -> Path:
    """The checkpoint of a LoRA of rank 2 after three steps."""
    out = tmp_path_factory.mktemp("trained")
    trainer(folder, out, "lora", steps=3, rank=2).train()
    return out / "checkpoint-3"


def test_lisa_trains_its_layers_in_turn(folder: Path, tmp_path: Path) -> None:
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, *, model, **_):
            seen.append(
                tuple(i for i, layer in enumerate(model.model.layers) if layer.mlp.up_proj.weight.requires_grad)
            )

    trainer(folder, tmp_path, "lisa", [VismtCallback(), Watch()], active=1, interval=1, seed=0).train()
    assert len(seen) == STEPS and all(len(layers) == 1 for layers in seen) and len(set(seen)) > 1


def test_polar_stays_near_the_manifold(folder: Path, tmp_path: Path) -> None:
    def distance(run) -> float:
        run.train()
        layer = run.model.model.layers[0].self_attn.q_proj
        gram = (layer.lora_A @ layer.lora_A.T).detach()
        return float((gram / gram.diagonal().mean() - torch.eye(len(gram))).norm())

    driven = distance(trainer(folder, tmp_path / "a", "polar", rank=4))
    assert driven < distance(trainer(folder, tmp_path / "b", "polar", [], rank=4))


def test_the_callback_reports_what_it_cannot_drive(folder: Path, tmp_path: Path) -> None:
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(UserError, match=r"LlamaForCausalLM is not adapted; call vismt\.adapt before"):
        transformers.Trainer(
            model=stock, args=transformers.TrainingArguments(str(tmp_path), use_cpu=True), callbacks=[VismtCallback()]
        )


@pytest.mark.parametrize(
    ("method", "changes", "optimizer", "message"),
    [
        ("polar", {"deepspeed": "zero"}, {}, "DeepSpeed and FSDP hold the parameters in pieces"),
        ("polar", {}, {"scaler": 1}, "fp16 scales the gradients; train with bf16"),
        ("polar", {}, {}, "AdamW is not an optimiser of accelerate"),
        ("lisa", {"world_size": 2}, {"accelerator_state": 1}, "set ddp_find_unused_parameters=True"),
    ],
)
def test_what_is_not_driven_is_reported(method: str, changes, optimizer, message: str) -> None:
    model = tiny_vit()
    vismt.adapt(model, method, **({"rank": 4} if method == "polar" else {"active": 1}))
    callback = VismtCallback()
    callback.on_init_end(None, None, None, model=model)
    made = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for name, value in optimizer.items():
        setattr(made, name, value)
    made.optimizer = made
    arguments = SimpleNamespace(**{"deepspeed": None, "fsdp": None, "world_size": 1, **changes})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback.on_train_begin(arguments, SimpleNamespace(max_steps=2, global_step=0), None, optimizer=made)
    assert [message in str(warning.message) for warning in caught if warning.category is UserWarning] == [True]


class Classifier(nn.Module):
    """A ViT of timm with the signature that a Trainer calls."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny_vit()
        vismt.adapt(self.vit, "emtal", rank=2, n_experts=4, cluster=False)

    def forward(self, images, labels=None):
        logits = self.vit(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_routers_of_a_timm_model_fade(tmp_path: Path) -> None:
    def train(out: Path, callback: VismtCallback, resume: str | None = None):
        torch.manual_seed(0)
        model = Classifier()
        arguments = transformers.TrainingArguments(
            str(out),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            remove_unused_columns=False,
        )
        images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        data = [{"images": image, "labels": number % 5} for number, image in enumerate(images)]
        run = transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback])
        run.train(resume_from_checkpoint=resume)
        return model

    model = train(tmp_path / "a", VismtCallback(fade=FadeConfig(0.0, 1.0)))
    saved = load_file(tmp_path / "a" / "checkpoint-2" / "model.safetensors")
    assert not any(name.endswith("qkv.weight") for name in saved) and any("lora" in name for name in saved)
    resumed = train(tmp_path / "a", VismtCallback(fade=FadeConfig(0.0, 1.0)), str(tmp_path / "a" / "checkpoint-2"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    vismt.merge(model.vit)  # faded: a router that routes cannot be merged
    with pytest.warns(UserWarning, match="'emtal' has a schedule that nothing drives; give its settings as fade="):
        routed = train(tmp_path / "b", VismtCallback())
    with pytest.raises(UserError):
        vismt.merge(routed.vit)


def test_a_head_that_a_resumed_training_would_tie_is_refused(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(save_lm(tmp_path / "lm"))
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    vismt.adapt(model, "lora", rank=2, targets=["q_proj"], also_train=["lm_head"])
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(UserError, match=r"set model\.config\.tie_word_embeddings = False"):
        transformers.Trainer(model=model, args=arguments, callbacks=[VismtCallback()])
    model.config.tie_word_embeddings = False
    transformers.Trainer(model=model, args=arguments, callbacks=[VismtCallback()])


def test_a_folder_in_the_place_of_a_package(folder: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "datasets").mkdir()
    monkeypatch.setattr("transformers.trainer.is_datasets_available", lambda: True)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    with pytest.raises(UserError, match="a folder called datasets is taken for Hugging Face's package"):
        VismtCallback().on_init_end(None, None, None, model=tiny_vit())


def test_a_repository_of_an_adapter(folder: Path, tmp_path: Path, monkeypatch) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    vismt.adapt(model, "pissa", rank=2)
    shake(model)
    written = write_repository(model, tmp_path / "repo", base="me/tiny", results=[result(), result(seed=1)])
    card = (written / "README.md").read_text()
    record = json.loads((written / "adapter.json").read_text())
    assert card.startswith("---\nbase_model: me/tiny\n") and "| method | pissa |" in card and record["base"] in card
    assert card.count("| digits |") == 1 and "episodes |" in card and "±" in card
    ids = rows()[0]["input_ids"][None]
    wanted = model(ids).logits
    for load in (vismt.load_adapter, vismt.import_peft):
        loaded = load(transformers.AutoModelForCausalLM.from_pretrained(folder), written)
        assert torch.allclose(loaded(ids).logits, wanted, atol=1e-5)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'me/repo' cannot be written .*; the folder '.*' is complete, upload it with"):
        push_to_hub(model, "me/repo", tmp_path / "pushed", base="me/tiny")
    assert (tmp_path / "pushed" / "README.md").exists()
    with pytest.raises(UserError, match=r"'me/a repo' cannot be written \(.*; the folder '.*' is complete"):
        push_to_hub(model, "me/a repo", tmp_path / "again", base="me/tiny")


def test_pushing_uploads_the_folder(tmp_path: Path, monkeypatch) -> None:
    calls = []

    class Hub:
        def __init__(self, token=None):
            calls.append(token)

        def create_repo(self, name, **options):
            calls.append((name, options))
            return f"https://hub/{name}"

        def upload_folder(self, **options):
            calls.append(sorted(path.name for path in options["folder_path"].iterdir()))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    model = tiny_vit()
    vismt.adapt(model, "lora", rank=2)
    address = push_to_hub(model, "me/vit", tmp_path, base="tiny", token="t", private=True)
    assert address == "https://hub/me/vit" and calls[0] == "t"
    assert calls[1] == ("me/vit", {"private": True, "exist_ok": True})
    assert {"README.md", "adapter.json", "adapter_config.json", "adapter_model.safetensors"} <= set(calls[2])
    model.head.requires_grad_(True)
    model.head.weight.data += 1
    with pytest.raises(UserError, match=r"'head\.weight' were trained|are not in the file"):
        push_to_hub(model, "me/vit", tmp_path / "b", base="tiny")


def test_a_repository_of_a_hosted_tuner_has_the_folder_of_vismt_alone(folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    vismt.adapt(model, "peft:vera", rank=2)
    shake(model)
    written = write_repository(model, tmp_path / "repo", base="me/tiny")
    assert (written / "adapter.json").exists() and not (written / "adapter_config.json").exists()
