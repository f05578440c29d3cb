"""`vismt clean` in folders that others use, too: whatever vismt did not write is there afterwards, byte for byte."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest
from helpers.faults import cases, no_hang

from vismt.cli import main

DIGEST = "0123456789abcdef01234567"
OURS = (
    f"cache/pixels/digits-test-32-{DIGEST}.npy",
    "cache/pixels/tmp1234abcd.part",
    f"cache/features/{DIGEST}.safetensors",
    f"cache/features/.{DIGEST}.safetensors.ab12.vismt-partial",
    f"cache/experts/{DIGEST}.safetensors",
    "cache/assets/vit/model.safetensors",
    "cache/torchvision/mnist/raw/train",
    "cache/wheels/ml-100k/u.data",
    "cache/robustbench/cifar10/Linf/Standard.pt",
    "runs/a-1234/config.resolved.yaml",
    "runs/b-1234/config.resolved.yaml",
)
FETCHED = ("assets/vit", "torchvision/mnist", "wheels/ml-100k")
NAMES = (
    "pixels",
    "features",
    "assets",
    "torchvision",
    "wheels",
    "robustbench",
    "cifar10",
    "runs",
    "arms",
    "thesis",
    "vit",
)
FILES = (
    "run.json",
    "config.resolved.yaml",
    ".lock",
    "a.npy",
    "a.safetensors",
    "record.json",
    "notes.txt",
    "b\udcff.txt",
)


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def theirs(root: Path, random: Random) -> None:
    """Write a file, link or pipe of the user's at a random place that vismt uses as well."""
    folder = root / random.choice(("cache", "cache", "runs", "outside"))
    folder = folder.joinpath(*random.choices(NAMES, k=random.randrange(4)))
    path = folder / random.choice(FILES)
    # Not inside what vismt fetched, nor a run's own files: those are vismt's by place.
    if any(path.is_relative_to(root / "cache" / name) for name in FETCHED) or os.path.lexists(path):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        return
    kind = random.choice(("text", "text", "link", "pipe", "folder link"))
    if kind == "text":
        path.write_text(random.choice(("{}", "mine", '{"a": 1}', "db: mysql\n", "")))
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(root / "outside", target_is_directory=kind == "folder link")


def seen(root: Path) -> dict[str, object]:
    """Return the content of every file and the target of every link below a folder, by name."""
    found: dict[str, object] = {}
    for path in root.rglob("*"):
        if path.is_symlink():
            found[str(path.relative_to(root))] = os.readlink(path)
        elif not path.is_dir():
            found[str(path.relative_to(root))] = path.read_bytes() if path.is_file() else "pipe"
    return found


@cases(8, 2000)
def test_clean_deletes_what_vismt_wrote_and_nothing_else(
    cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(cases):
        random = Random(seed)
        root = tmp_path / str(seed)
        (root / "outside").mkdir(parents=True)
        monkeypatch.setenv("VISMT_CACHE", str(root / "cache"))
        for _ in range(random.randrange(12)):
            theirs(root, random)
        kept = seen(root)
        ours = [name for name in OURS if not any(path.is_symlink() for path in (root / name).parents)]
        for name in ours:
            write(root / name, "task: fewshot\n")
            fetched = next((root / "cache" / known for known in FETCHED if name.startswith(f"cache/{known}")), None)
            if fetched:
                write(fetched.with_name(f".{fetched.name}.lock"), "")
        with no_hang(seed):
            assert main(["clean", "--runs", str(root / "runs"), "--yes"]) == 0
        left = seen(root)
        assert {name: left.get(name) for name in kept} == kept, seed
        assert not set(ours) & set(left), seed
        capsys.readouterr()
