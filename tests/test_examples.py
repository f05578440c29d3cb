"""Every script of examples/ runs on a tiny model."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from helpers.lm_parts import save_lm
from helpers.own_images import write_folder
from helpers.tiny import tiny_vit
from PIL import Image

import vismt

FOLDER = Path(__file__).resolve().parent.parent / "examples"
TINY = {"name": "test_vit", "size": 32, "steps": 2, "pretrained": False}


def example(name: str, *needs: str) -> ModuleType:
    """Return the module of an example, of which the packages are installed."""
    for package in needs:
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lm(tmp_path_factory) -> str:
    return str(save_lm(tmp_path_factory.mktemp("lm") / "lm"))


def stock(folder: Path) -> torch.nn.Module:
    """Return timm's model with the weights that an example wrote."""
    return timm.create_model("test_vit", img_size=32, num_classes=10, checkpoint_path=str(folder / "model.safetensors"))


def test_plain_loop(tmp_path: Path) -> None:
    assert example("plain_loop").main(tmp_path, **TINY) > 0
    model = timm.create_model("test_vit", img_size=32, num_classes=10)
    assert vismt.load_adapter(model, tmp_path / "adapter", on_other_base="warn") is model
    assert stock(tmp_path).num_classes == 10


def test_timm_ema(tmp_path: Path) -> None:
    merged = example("timm_ema").main(tmp_path, **TINY).state_dict()
    assert all(torch.equal(value, merged[name]) for name, value in stock(tmp_path).state_dict().items())


def test_lightning_vit(tmp_path: Path) -> None:
    model = example("lightning_vit", "lightning").main(tmp_path, **TINY)
    assert set(model.state_dict()) == set(timm.create_model("test_vit", img_size=32, num_classes=10).state_dict())


def test_hf_trainer_goes_on_from_its_checkpoint(tmp_path: Path, lm: str) -> None:
    module = example("hf_trainer", "datasets.arrow_dataset")
    assert module.main(tmp_path, lm, steps=2).state.global_step == 2
    trainer = module.main(tmp_path, lm, steps=4)
    assert trainer.state.global_step == 4 and len([line for line in trainer.state.log_history if "step" in line])


def test_trl_sft(tmp_path: Path, lm: str) -> None:
    folder = example("trl_sft", "datasets.arrow_dataset", "trl").main(tmp_path, lm, steps=2)
    assert (folder / "adapter.json").exists()


def test_serve_with_peft(tmp_path: Path, lm: str) -> None:
    assert example("serve_with_peft", "peft").main(tmp_path, lm, steps=2).startswith("the sky")


@pytest.mark.slow
def test_fewshot_own_module(tmp_path: Path) -> None:
    results = example("fewshot_own_module").main(tmp_path, "", episodes=2)
    assert len(results) == 10 and (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_audit_timm(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "pictures", 3)
    results = example("audit_timm").main(images, tiny_vit(num_classes=3), tmp_path / "run", count=6)
    assert {row.kind for row in results} == {"clean", "attack", "corruption", "variant"}


def test_dense_own_maps(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("images", "label"):
        (tmp_path / "maps" / name).mkdir(parents=True)
    for number in range(10):
        Image.fromarray(random.integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(
            tmp_path / "maps" / "images" / f"{number}.png"
        )
        Image.fromarray(random.choice([0, 1, 255], (32, 32)).astype(np.uint8)).save(
            tmp_path / "maps" / "label" / f"{number}.png"
        )
    results = example("dense_own_maps").main(tmp_path / "maps", 2, tmp_path / "out", **TINY)
    assert {row.task for row in results} == {"semseg"}
    assert set(results.model().state_dict()) == set(timm.create_model("test_vit", num_classes=0).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "fewshot_own_module"))
def test_an_example_without_a_network_ends_in_one_line(name: str, tmp_path: Path) -> None:
    found = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(FOLDER.parent)}
    run = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py"], cwd=tmp_path, env=found, capture_output=True, text=True
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith(("error: ", "usage: "))
