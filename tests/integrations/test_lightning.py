"""Adapted models in Lightning's Trainer: checkpoints of the adapter alone, resumed exactly; driven schedules and optimisers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import tiny_vit
from torch import Tensor

import vismt
from vismt.base.errors import UserError
from vismt.multitask.emtal.fading import FadeConfig

pl = pytest.importorskip("lightning.pytorch")
from vismt.integrations.lightning import VismtCallback  # noqa: E402


class Module(pl.LightningModule):
    """A tiny ViT that learns to tell random images apart."""

    def __init__(self, method: str = "lora", change=None, **options) -> None:
        super().__init__()
        self.vit = tiny_vit()
        if change is not None:
            change(self.vit)
        if method:
            vismt.adapt(self.vit, method, **options)
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        loss = F.cross_entropy(self.vit(batch[0]), batch[1])
        self.losses.append(float(loss))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.losses.append(float(F.cross_entropy(self.vit(batch[0]), batch[1])))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def batches() -> torch.utils.data.DataLoader:
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(8) % 5), 4)


def fit(
    module: Module,
    folder: Path,
    callback: VismtCallback | None,
    steps: int = 4,
    checkpoint: Path | None = None,
    **limits,
):
    saves = pl.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = pl.Trainer(
        max_steps=steps,
        **limits,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[saves, *([callback] if callback else [])],
    )
    trainer.fit(module, batches(), ckpt_path=checkpoint)
    return module


@pytest.mark.parametrize(("method", "options"), [("lora", {"rank": 2}), ("polar", {"rank": 2})])
def test_a_checkpoint_has_the_adapter_alone_and_is_resumed(method: str, options, tmp_path: Path) -> None:
    whole = fit(Module(method, **options), tmp_path, VismtCallback())
    path = tmp_path / "step=2.ckpt"
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert saved and all("lora_" in name for name in saved)
    resumed = fit(Module(method, **options), tmp_path / "b", VismtCallback(), checkpoint=path)
    assert resumed.losses == whole.losses[2:]
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", {"change": lambda vit: vit.norm.weight.data[3].add_(1e-3)}, "of another base model"),
        ("lora", {"alpha": 32}, r"another layers scale \(\d+.\d+, this model has 16.0\)"),
    ],
)
def test_a_checkpoint_of_another_base_method_or_setting_is_refused(method: str, options, message, tmp_path) -> None:
    fit(Module("lora", rank=2), tmp_path, VismtCallback(), 2)
    with pytest.raises(UserError, match=f"resume: the checkpoint is .*{message}"):
        fit(Module(method, rank=2, **options), tmp_path / "b", VismtCallback(), checkpoint=tmp_path / "step=2.ckpt")


def test_landing_is_driven(tmp_path: Path) -> None:
    def distance(callback: VismtCallback | None) -> float:
        layer = fit(Module("polar", rank=4), tmp_path, callback, 12).vit.blocks[0].attn.qkv
        gram = (layer.lora_A @ layer.lora_A.T).detach()
        return float((gram / gram.diagonal().mean() - torch.eye(len(gram))).norm())

    assert distance(VismtCallback()) < distance(None)


def test_routers_fade(tmp_path: Path) -> None:
    options = {"rank": 2, "n_experts": 4, "cluster": False}
    vismt.merge(fit(Module("emtal", **options), tmp_path, VismtCallback(fade=FadeConfig(0.0, 1.0))).vit)
    with pytest.warns(UserWarning, match="'emtal' has a schedule that nothing drives"):
        routed = fit(Module("emtal", **options), tmp_path, VismtCallback())
    with pytest.raises(UserError):
        vismt.merge(routed.vit)


def test_a_module_without_an_adapted_part(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Module is not adapted; call vismt\.adapt"):
        fit(Module(""), tmp_path, VismtCallback())


def test_a_checkpoint_is_tested_without_a_training_before_it(tmp_path: Path) -> None:
    fit(Module(rank=2), tmp_path, VismtCallback(), 2)

    def test(module: Module) -> list[float]:
        options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
        trainer = pl.Trainer(callbacks=[VismtCallback()], default_root_dir=tmp_path, **options)
        trainer.validate(module, batches(), ckpt_path=tmp_path / "step=2.ckpt", verbose=False)
        return module.losses

    fresh = Module(rank=2)
    untrained = [float(F.cross_entropy(fresh.vit(images), labels)) for images, labels in batches()]
    assert test(fresh) != pytest.approx(untrained)
    with pytest.raises(UserError, match="resume: the checkpoint is of an adapter with another"):
        test(Module(rank=2, alpha=32))


def test_a_training_that_time_limits(tmp_path: Path) -> None:
    limits = {"max_epochs": -1, "max_time": {"seconds": 1}}
    fit(Module(rank=2), tmp_path, VismtCallback(), -1, **limits)
    callback = VismtCallback(fade=FadeConfig(0.0, 1.0))
    with pytest.raises(UserError, match="VismtCallback: fade is a schedule over all steps"):
        fit(Module("emtal", rank=2, n_experts=4, cluster=False), tmp_path, callback, -1, **limits)
