"""`vismt predict` with examples of each class, with merged folders and from Python; the contact sheet."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import pyramids
from PIL import Image

import vismt
from vismt.base.errors import UserError
from vismt.cli import main
from vismt.data.images import open_images
from vismt.jobs import open_run
from vismt.jobs.predictions import SHEET, TABLE, draw_answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Examples of three digits in support/, others in images/."""
    root = tmp_path_factory.mktemp("own")
    digits = open_images("digits")
    for label, name in enumerate(("zero", "one", "two")):
        (root / "support" / name).mkdir(parents=True)
        (root / "images").mkdir(exist_ok=True)
        chosen = (digits.labels == label).nonzero().flatten()[:5].tolist()
        for place, i in enumerate(chosen):
            kept = root / "support" / name if place < 3 else root / "images"
            Image.fromarray(digits.read(i).permute(1, 2, 0).numpy()).save(kept / f"{name}-{place}.png")
    return root


@pytest.fixture(scope="module")
def fewshot(finished, tmp_path_factory) -> Path:
    return finished("fewshot", tmp_path_factory.mktemp("fewshot"))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def expected(run: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Return the probabilities of each image by cosine prototypes, with timm's model and nothing of the package's classifier."""
    job = open_run(run).job
    vit, scale = job.merged("adapted"), job.models(0).task("adapted").scale
    assert abs(float(scale) - 10) > 1e-3  # trained, so that a default would be noticed

    mean, std = (torch.tensor(pyramids.ABOUT[name]).view(3, 1, 1) for name in ("mean", "std"))

    def feature(path: Path) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None]
        pixels = F.interpolate(pixels.float(), 32, mode="bilinear", antialias=True).round() / 255
        (tokens,) = vit.forward_intermediates(
            (pixels - mean) / std, indices=[0], norm=True, stop_early=True, output_fmt="NLC", intermediates_only=True,
            return_prefix_tokens=True,
        )  # fmt: skip
        return vit.forward_head(torch.cat([tokens[1], tokens[0]], 1), pre_logits=True)[0]

    with torch.no_grad():
        classes = sorted(path for path in (folder / "support").iterdir())
        means = torch.stack([torch.stack([feature(p) for p in sorted(at.iterdir())]).mean(0) for at in classes])
        return {
            path.name: (scale * F.cosine_similarity(feature(path)[None], means)).softmax(0)
            for path in sorted((folder / "images").iterdir())
        }


def test_a_few_shot_run_predicts_the_classes_of_a_folder(fewshot: Path, folder: Path, tmp_path: Path) -> None:
    command = ["predict", str(fewshot), str(folder / "images"), "--support", str(folder / "support"), "--top", "2"]
    assert main([*command, "--sheet", "--to", str(tmp_path), "--quiet"]) == 0
    assert (tmp_path / SHEET).exists()
    rows, wanted = table(tmp_path / TABLE), expected(fewshot, folder)
    assert [Path(row["image"]).name for row in rows] == list(wanted) and "label_3" not in rows[0]
    names = ["one", "two", "zero"]
    for row in rows:
        p = wanted[Path(row["image"]).name]
        assert row["label"] == names[int(p.argmax())] and row["task"] == "support"
        assert float(row["probability"]) == pytest.approx(float(p.max()), abs=2e-3)

    # The merged folder has the features of the same block and the trained scale.
    assert main(["merge", str(fewshot), "--arm", "adapted", "--quiet"]) == 0
    merged = fewshot / "merged-adapted-seed-0"
    found = vismt.predict(merged, folder / "images", support=folder / "support", top=2, to=tmp_path / "merged")
    assert found.files == [tmp_path / "merged" / TABLE]
    for row, same in zip(rows, found.rows, strict=True):
        assert row["label_2"] == same["label_2"]
        assert float(row["probability"]) == pytest.approx(same["probability"], abs=1e-5)


def test_checkpoints_of_classifiers_predict(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = timm.create_model("test_vit", num_classes=3, img_size=32).eval()
    torch.save(net.state_dict(), tmp_path / "mine.pth")
    (tmp_path / "config.json").write_text(
        '{"architecture": "test_vit", "img_size": 32, "label_names": ["a/x", "a/y", "b/z"], "label_space": "separate"}'
    )
    rows = vismt.predict(tmp_path / "mine.pth", folder / "images", to=tmp_path).rows
    first = torch.from_numpy(np.array(Image.open(folder / "images/one-3.png").convert("RGB"))).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = net((F.interpolate(first.float(), 32, mode="bilinear", antialias=True).round() / 255 - 0.5) / 0.5)[0]
    assert len(rows) == 12 and [row["task"] for row in rows[:2]] == ["a", "b"]
    assert rows[0]["label"] == ["a/x", "a/y"][int(logits[:2].argmax())] and rows[1]["label"] == "b/z"
    assert rows[0]["probability"] == pytest.approx(float(logits[:2].softmax(0).max()), abs=2e-3)


def test_a_checkpoint_without_its_names_says_what_to_write(folder: Path, tmp_path: Path, capsys) -> None:
    net = timm.create_model("test_vit", num_classes=3, img_size=32).eval()
    torch.save(net.state_dict(), tmp_path / "mine.pth")
    with pytest.raises(UserError, match=r"has no config\.json beside it that names its model; write one, such as"):
        vismt.predict(tmp_path / "mine.pth", folder / "images", to=tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "test_vit", "img_size": 32}')
    vismt.predict(tmp_path / "mine.pth", folder / "support", to=tmp_path)
    printed = capsys.readouterr().out
    assert "are not counted: the model has no class" in printed and "Near: ''" not in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["images"], "model 'adapted' of the run 'RUN' has no classes of its own; give support, a folder"),
        (["images", "--support", "support/one"], "support ROOT/support/one"),
        (
            ["images", "--support", "support", "--flip"],
            "flip is for dense runs, and this run of fewshot does not use it; leave it out. Known: arm, ",
        ),
        (["images", "--support", "support", "--arm", "adaptd"], "no evaluated model 'adaptd'. Near: 'adapted'"),
        (["images", "--support", "support", "--arm", "adapted:7"], "no evaluated model 'adapted:7'"),
        (["images", "--support", "support", "--top", "0"], "top 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_predicted_is_one_line(
    fewshot: Path, folder: Path, words: list[str], message: str, capsys
) -> None:
    words = [str(folder / word) if word.startswith(("images", "support")) else word for word in words]
    assert main(["predict", str(fewshot), *words, "--quiet"]) == 2
    text = capsys.readouterr().err
    wanted = message.replace("RUN", str(fewshot)).replace("ROOT", str(folder))
    if "support/one" in wanted:  # a folder without class folders is no set
        assert "support/one" in text
    else:
        assert wanted in text
    assert text.count("\n") == 1


def test_a_support_that_would_not_fit_is_refused(fewshot: Path, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("vismt.jobs.predict.SUPPORT_BYTES", 8 * 12 * 32 * 32)
    with pytest.raises(vismt.UserError, match=r"3 classes, 9 images; .* takes up to 8 images of 32 px"):
        vismt.predict(fewshot, folder / "images", support=folder / "support")


def test_a_contact_sheet_has_a_bounded_number_of_images(tmp_path: Path, monkeypatch) -> None:
    texts: list[str] = []
    monkeypatch.setattr("vismt.report.tiles.write", lambda figure, x, y, text, **style: texts.append(text))
    rows = [[{"image": f"{i}.png", "label": "cat", "probability": 0.876}] for i in range(100)]
    draw_answers([np.zeros((3, 8, 8), np.uint8)] * 2, rows, tmp_path / SHEET)
    assert texts.count("88 % cat") == 2
    assert texts[-1].startswith("The first 2 of 100 images") and "98 more are in predictions.csv" in texts[-1]
