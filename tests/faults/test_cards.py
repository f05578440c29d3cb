"""Damaged data cards, asset cards and the lists and tables of sets: one line, or a card that can be used."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.faults import cases, many, refused_or_harmless
from helpers.tfrecords import write_class
from helpers.yaml_mutations import damaged_texts, damaged_trees
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vismt.backbones.asset_cards import SHIPPED, load_asset_card
from vismt.base.errors import UserError
from vismt.config.yaml_text import parse_yaml
from vismt.data.cards import load_card
from vismt.data.check import check

SOURCES = {
    "folder": '{root: ., layout: "{class}", splits: {all: 4}}',
    "table": "{root: ., table: t.csv, folders: [cat, dog], column: name, keep: [c, d], label: label, splits: {all: 2}}",
    "arrays": "{root: ., file: a.npz, splits: {train: 2, test: 2}}",
    "filelist": "{root: ., splits: {base: 2}, classes_per_split: {base: 2}}",
    "lists": "{root: ., folder: ., paths: paths.txt, labels: labels.txt, training: train.txt, names: names.txt, "
    "splits: {train: 2}}",
    "dense": "{root: ., image: cat, maps: {label: dog}, splits: {all: 2}}",
    "meta_dataset": "{root: ., splits: {train: 4}, classes_per_split: {train: 2}}",
    "text": "{root: ., files: {train: x.jsonl}, fields: [text, label], splits: {train: 2}}",
    "interactions": "{root: ., items: items.txt, item_separator: '|', events: e.csv, splits: {test: 1}}",
}
FILES = {
    "table": "t.csv",
    "arrays": "a.npz",
    "filelist": "base.json",
    "lists": "paths.txt",
    "dense": "dog/a.png",
    "meta_dataset": "dataset_spec.json",
    "text": "x.jsonl",
    "interactions": "e.csv",
}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A card beside two classes of images, and the lists and tables of every kind of source over them."""
    monkeypatch.delenv("VISMT_DATA", raising=False)
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path / "cache"))
    for name in ("cat/a.png", "cat/b.png", "dog/a.png", "dog/b.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((4, 3), np.uint8)).save(path)
    arrays = {f"x_{split}": np.zeros((2, 3, 3), np.uint8) for split in ("train", "test")}
    file = io.BytesIO()
    np.savez(file, **arrays, y_train=np.array([0, 1]), y_test=np.array([0, 1]), classes=np.array(["c", "d"]))
    spec = {
        "class_names": {"0": "cat", "1": "dog"},
        "images_per_class": {"0": 2, "1": 2},
        "classes_per_split": {"TRAIN": 2, "VALID": 0, "TEST": 0},
    }
    listing = {"label_names": ["c", "d"], "image_names": ["cat/a.png", "dog/a.png"], "image_labels": [0, 1]}
    texts = {
        "t.csv": "name,label\na.png,c\nb.png,d\n",
        "base.json": json.dumps(listing),
        "paths.txt": "1 cat/a.png\n2 dog/a.png\n",
        "labels.txt": "1 1\n2 2\n",
        "train.txt": "1 1\n2 1\n",
        "names.txt": "1 c\n2 d\n",
        "dataset_spec.json": json.dumps(spec),
        "x.jsonl": '{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n',
        "items.txt": "1|One\n2|Two\n3|Three\n",
        "e.csv": "user,item,timestamp\n1,1,1\n1,2,2\n1,3,3\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "a.npz").write_bytes(file.getvalue())
    for label in (0, 1):
        write_class(tmp_path / f"{label}.tfrecords", label, [1, 2])
    return tmp_path / "card.yaml"


def test_a_name_that_no_file_can_have(world: Path) -> None:
    world.write_text(card_text("table").replace("t.csv", "x" * 300))
    with pytest.raises(UserError, match=r"table: 'x+…' holds a name of more than 255 bytes"):
        load_card(world)


def card_text(kind: str) -> str:
    head = "name: mine\ntitle: t\nsource: s\nlicence: l\nclasses: 2\n"
    return f"{head}sources:\n  - {SOURCES[kind].replace('{', '{kind: ' + kind + ', ', 1)}\n"


@cases(quick=8, campaign=100)
@pytest.mark.parametrize("kind", SOURCES)
def test_damaged_cards_of_every_kind_of_source(world: Path, kind: str, cases: int) -> None:
    text = card_text(kind)
    world.write_text(text)
    report = check(world)
    assert report.ok or kind in ("text", "interactions"), str(report)  # texts have no classes

    @many(cases)
    @given(st.one_of(damaged_trees(parse_yaml(text)).map(str.encode), damaged_texts(text)))
    def run(data: bytes) -> None:
        world.write_bytes(data)
        with refused_or_harmless(data):
            assert str(check(world))

    run()


@cases(quick=8, campaign=100)
@pytest.mark.parametrize("kind", FILES)
def test_damaged_lists_and_tables(world: Path, kind: str, cases: int) -> None:
    world.write_text(card_text(kind))
    path = world.parent / FILES[kind]
    whole = path.read_bytes().decode("latin1")

    @many(cases)
    @given(damaged_texts(whole))
    def run(data: bytes) -> None:
        path.write_bytes(data.decode("utf8", errors="replace").encode("latin1", errors="replace"))
        with refused_or_harmless(data):
            assert str(check(world))

    run()


@cases(quick=15, campaign=200)
def test_damaged_asset_cards(world: Path, cases: int) -> None:
    texts = [path.read_text(encoding="utf8") for path in sorted(SHIPPED.glob("*.yaml"))]

    @many(cases)
    @given(
        st.sampled_from(texts).flatmap(
            lambda text: st.one_of(damaged_trees(parse_yaml(text)).map(str.encode), damaged_texts(text))
        )
    )
    def run(data: bytes) -> None:
        world.write_bytes(data)
        with refused_or_harmless(data):
            card = load_asset_card(world)
            assert card.name and "/" not in card.name and card.name != ".."

    run()
