"""A stranger's first hour: install from a clone, run, own images, audit, compare, export, and load elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.installed import clone_in, environment_in, pip, served
from helpers.own_images import write_folder

TINY = ["model.name=test_vit", "model.img_size=32", "model.pretrained=false", "model.block=null", "model.position=timm"]
QUICK = [*TINY, "adapt.rank=2", "train.steps=2", "train.warmup=0", "evaluate.episodes=2", "pool.warmup=0"]

AUDIT = """
import timm, torch, vismt
from examples.audit_timm import main

torch.manual_seed(0)
model = timm.create_model("test_vit", img_size=32, num_classes=3)
results = main("my photos", model, "audit", 9)
assert {"clean"} < {row.condition for row in results}, results
"""

# As a user of the exports does it, without vismt.
LOAD = """
import json, sys, timm, torch
from pathlib import Path
from peft import PeftModel
from safetensors.torch import load_file

folder, adapter = map(Path, sys.argv[1:])
about = json.loads((folder / "config.json").read_text())
model = timm.create_model(about["architecture"], img_size=32, num_classes=about["num_classes"])
model.load_state_dict(load_file(next(folder.glob("*.safetensors"))))
assert model.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 3)
PeftModel.from_pretrained(timm.create_model(about["architecture"], img_size=32, num_classes=0), adapter)
assert "vismt" not in sys.modules
print("loaded")
"""


def command(interpreter: Path, *arguments: str | Path, folder: Path) -> str:
    return served(interpreter.parent / "vismt", *arguments, folder=folder)


@pytest.mark.slow
def test_the_first_hour(tmp_path: Path) -> None:
    clone, interpreter = clone_in(tmp_path), environment_in(tmp_path / "env")
    pip("--python", interpreter, "install", "-e", clone)

    # the README's command, on a tiny model
    printed = command(interpreter, "run", "quickstart", *QUICK, "--out", "runs", folder=clone)
    assert printed.splitlines()[-1].startswith("report") and list(clone.glob("runs/quickstart-*/report.html"))

    # own images, in two runs that are compared, from the folder that holds the clone
    write_folder(tmp_path / "my photos", 12)
    command(interpreter, "init", "classification", "--images", "my photos", "--to", "study", folder=tmp_path)
    for rate in ("0.001", "0.003"):
        overrides = [*TINY[:3], "train.steps=2", "train.warmup=0", "tune=null", f"train.lr={rate}"]
        command(interpreter, "run", "study/classification.yaml", *overrides, "--out", "runs", folder=tmp_path)
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == 2
    command(interpreter, "compare", *runs, "--out", "compared", "--format", "html,md,csv,latex", folder=tmp_path)
    assert {path.suffix for path in (tmp_path / "compared").glob("*.*")} >= {".html", ".md", ".csv", ".tex"}
    listed = command(interpreter, "list", "runs", folder=tmp_path)
    assert all(path.name in listed for path in runs)

    # an audit from a script, which finds vismt from there
    (tmp_path / "script.py").write_text(f"import sys\nsys.path.insert(0, {str(clone)!r})\n{AUDIT}")
    assert "clean" in served(interpreter, "script.py", folder=tmp_path)
    assert (tmp_path / "audit" / "report.html").exists()

    # exports, which timm and peft load
    command(interpreter, "export", runs[0], "--arm", "lora", "--to", "timm", folder=tmp_path)
    command(interpreter, "export", runs[0], "--arm", "lora", "--format", "peft", "--to", "peft", folder=tmp_path)
    (adapter,) = (path.parent for path in (tmp_path / "peft").rglob("adapter_config.json"))
    (tmp_path / "load.py").write_text(LOAD)
    assert "loaded" in served(interpreter, "load.py", "timm", adapter, folder=tmp_path)
