"""Exports of a run give the logits of the run: each method, as a timm folder and as a peft adapter, the head included."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest
import timm
import torch
import yaml
from helpers import pyramids  # noqa: F401  registers short_vit
from helpers.kills import stop_before
from torchvision.transforms.v2.functional import to_pil_image

import vismt
from vismt.base.errors import UserError
from vismt.cli import main
from vismt.jobs import open_run
from vismt.jobs.run import Run
from vismt.storage.files import write_tensors

peft = pytest.importorskip("peft")

FADED = {"start": 0.0, "end": 0.5}
ARMS = {
    "rslora": {"adapt.alpha": 5.0, "adapt.options": {"rslora": True}},
    "pissa": {"adapt.method": "pissa"},
    "polar": {"adapt.method": "polar", "adapt.options": {"split_qkv": True}},
    "s2ft": {"adapt.method": "s2ft", "adapt.options": {"ratio": 0.1}},
    "lisa": {"adapt.method": "lisa"},
    "emtal": {"adapt.method": "emtal", "adapt.options": {"n_experts": 4, "cluster": False}, "fade": FADED},
    "routed": {"adapt.method": "emtal", "adapt.options": {"n_experts": 4, "cluster": False}},
    "head": {"adapt": None},
}
NO_FACTORS = {"lisa": "'lisa' has no low-rank factors", "routed": "still routes", "head": "has no adapter"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("export")
    (folder / "arms.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "multitask",
                "model": {"name": "short_vit", "img_size": 32, "pretrained": False},
                "adapt": {"method": "lora", "rank": 2},
                "arms": ARMS,
                "tasks": [{"name": "digits", "train": ["digits"], "test_share": 0.05, "limit": 40}],
                "batch": 16,
                "train": {"steps": 3, "lr": 1.0e-2},
            },
            sort_keys=False,
        )
    )
    assert main(["train", str(folder / "arms.yaml"), "--out", str(folder / "runs"), "--quiet"]) == 0
    return open_run(next((folder / "runs").iterdir()))


def test_timm_prepares_images_as_the_run_does(run: Run, tmp_path: Path) -> None:
    run.export("timm", tmp_path / "timm", "rslora")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    names = json.loads((tmp_path / "timm" / "config.json").read_text())["label_names"]
    answers = []
    for seed, size in enumerate(((32, 32), (80, 80), (20, 20), (96, 64), (61, 97), (90, 63), (640, 50))):
        coarse = torch.rand(1, 3, 7, 9, generator=torch.Generator().manual_seed(seed))
        image = to_pil_image(torch.nn.functional.interpolate(coarse, size, mode="bicubic")[0].clamp(0, 1))
        image.save(tmp_path / f"{seed}.png")
        with torch.no_grad():
            answers.append(model(transform(image)[None])[0].softmax(0))
    rows = vismt.predict(run.folder, sorted(tmp_path.glob("*.png")), arm="rslora").rows
    for row, answer in zip(rows, answers, strict=True):
        assert row["label"] == names[int(answer.argmax())], row
        # Pillow and torch round up to a tenth of the values otherwise, by 1 of 255.
        assert row["probability"] == pytest.approx(float(answer.max()), abs=1e-3), row


@pytest.mark.parametrize("arm", ARMS)
def test_exports_answer_as_the_run(run: Run, arm: str, tmp_path: Path) -> None:
    net = run.job.loaded(run.job.study.find(arm))
    images = run.job.data.part(0, "test")[torch.arange(8)]
    with torch.no_grad():
        wanted, x = net(images), net.backbone.normalise(images)
        stock = run.job.fresh(run.job.config).stock.eval()
        assert not torch.allclose(stock(x), wanted, atol=1e-4)
    for form in ("timm", "peft"):
        if arm == "routed" or (form == "peft" and arm in NO_FACTORS):
            with pytest.raises(UserError, match=NO_FACTORS[arm]):
                run.export(form, tmp_path / form, arm)
            assert not (tmp_path / form).exists()
            continue
        run.export(form, tmp_path / form, arm)
        if form == "timm":
            model = timm.create_model(f"local-dir:{tmp_path / form}", pretrained=True).eval()
        else:
            assert json.loads((tmp_path / form / "adapter_config.json").read_text())["modules_to_save"] == ["head"]
            other = timm.create_model("short_vit", img_size=32, num_classes=model.num_classes)
            base = {key: value for key, value in stock.state_dict().items() if not key.startswith("head.")}
            other.load_state_dict(base, strict=False)  # the head is the adapter's
            model = peft.PeftModel.from_pretrained(other, str(tmp_path / form)).eval()
        with torch.no_grad():
            assert torch.allclose(model(x), wanted, atol=1e-5), form


def _killed(command: Callable[[], object], number: int) -> bool:
    """Run a command in another process that is killed before it puts file `number` in place; return whether it was."""

    def child() -> None:
        stop_before("replace", number, signal.SIGKILL)
        command()
        os._exit(0)

    process = get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode != 0


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", ["merged", pytest.param("peft", marks=pytest.mark.slow)])
def test_a_killed_export_or_merge_is_done_again_by_the_same_command(run: Run, form: str) -> None:
    def command() -> Path:
        return run.merge("rslora") if form == "merged" else run.export(form, None, "rslora")

    folder = command()
    whole = _files(folder)
    shutil.rmtree(folder)
    kills = 0
    while _killed(command, kills + 1):
        kills += 1
        with run.owned():
            assert command() == folder and _files(folder) == whole
        shutil.rmtree(folder)
    assert kills > len(whole)
    assert _files(command()) == whole
    assert _killed(command, kills)  # over a finished export
    with run.owned():
        assert _files(command()) == whole


def test_a_written_export_is_read_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is damaged on its way to the disk does not pass for an export."""

    def torn(path: Path, *arguments: object) -> None:
        write_tensors(path, *arguments)
        path.write_bytes(path.read_bytes()[:-40])

    monkeypatch.setattr("vismt.jobs.run.write_tensors", torn)
    with pytest.raises(UserError, match="broken"):
        run.export("timm", None, "rslora")
