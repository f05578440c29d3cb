"""Every function that `import vismt` offers has an example in its docstring, which runs on a tiny model."""

from __future__ import annotations

import inspect
import types
from pathlib import Path

import pytest
import torch
from helpers.own_images import write_folder
from helpers.tiny import tiny_vit

import vismt

FUNCTIONS = [name for name in vismt.__all__ if isinstance(getattr(vismt, name), types.FunctionType)]
STUDIES = {"audit", "evaluate_fewshot", "meta_tune", "predict", "train"}


def example(function: object) -> str:
    """Return the code below `Example:` in a docstring."""
    return inspect.cleandoc("\n" + (inspect.getdoc(function) or "").partition("\nExample:\n")[2])


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, object]:
    """Work in an empty folder with images; every published model of timm is a tiny one. Return what an example may name."""
    import timm

    create = timm.create_model

    def create_model(name: str, pretrained: bool = False, **options: object) -> torch.nn.Module:
        return tiny_vit(**options) if pretrained else create(name, **options)

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "my_images")
    write_folder(tmp_path / "new_images", count=1)
    config = {
        "task": "classification",
        "model": {"name": "test_vit", "pretrained": False, "img_size": 32},
        "adapt": {"method": "lora", "rank": 2},
        "tasks": [{"name": "mine", "train": ["my_images"], "test_share": 0.3}],
        "batch": 4,
        "train": {"steps": 1, "warmup": 0},
    }
    return {"timm": timm, "torch": torch, "vismt": vismt, "config": config}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in STUDIES)) for name in FUNCTIONS]
)
def test_the_example_of_a_function_runs(name: str, names: dict[str, object]) -> None:
    code = example(getattr(vismt, name))
    assert f"vismt.{name}(" in code
    exec(compile(code, name, "exec"), names)
