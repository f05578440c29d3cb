"""Data sets given as objects: columns of Hugging Face's, stored labels, digests."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from helpers.own_images import Pictures, write_folder
from torchvision.datasets import VisionDataset

from vismt.base.errors import UserError
from vismt.base.objects import name_of, named, registered
from vismt.data.formats.python_sets import features_of, images_of
from vismt.data.images import open_images
from vismt.data.pixels import Pixels
from vismt.data.set_entries import card_and_split
from vismt.data.texts.text_set import open_texts


class ClassLabel:
    names = Pictures.classes


class Table:
    """A Hugging Face data set, as far as it is used."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.column_names = list(rows[0])
        self.features = {"label": ClassLabel()}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | str) -> Any:
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]


def opened(given: Any, split: str = "all", door=open_images):
    objects: dict[str, Any] = {}
    name = name_of(given, objects)
    with registered(objects):
        return door(name, split)


def table() -> Table:
    return Table([{"image": image, "label": label} for image, label in Pictures().examples])


def test_columns_of_a_table_are_found() -> None:
    images = opened(table())
    assert tuple(images.classes) == Pictures.classes and images.labels.tolist() == [
        label for _, label in Pictures().examples
    ]
    assert torch.equal(images.read(5), opened(Pictures()).read(5))
    with pytest.raises(UserError, match="columns picture, label; one must be called image"):
        opened(Table([{"picture": 1, "label": 0}]))


def test_splits_of_a_table() -> None:
    splits = {"train": table(), "test": Table(table().rows[:4])}
    assert len(opened(splits, "test")) == 4
    with pytest.raises(UserError, match=r"no split 'tests'\. Near: 'test'"):
        opened(splits, "tests")


def test_rows_of_text() -> None:
    texts = opened(Table([{"text": "a", "label": 0}, {"text": "b", "label": 1}]), door=open_texts)
    assert texts.rows[1] == {"text": "b", "label": 1} and texts.ids == ["all:0", "all:1"]
    other = opened(Table([{"text": "a", "label": 0}, {"text": "c", "label": 1}]), door=open_texts)
    assert texts.content() != other.content()


@pytest.mark.parametrize(("given", "message"), [
    (Pictures(), r"row 0 has no fields named by text \(\[<class 'tuple'>\]\); give texts as columns"),
    ([{"text": "a"}, "b"], r"row 1 has no fields named by text \(\[<class 'str'>\]\)"),
    ([{"text": "a", 1: 2}], r"row 0 has no fields named by text \(\['text', 1\]\)"),
    ([], "the data set is empty"),
    (iter([{"text": "a"}]), "list_iterator has no length or no index; give a map-style data set of rows"),
])  # fmt: skip
def test_what_has_no_rows_of_text(given, message) -> None:
    with registered({"<mine 00000000>": given}), pytest.raises(UserError, match=f"data 'mine': {message}"):
        open_texts("<mine 00000000>")


def test_stored_labels_are_used_where_they_agree() -> None:
    class Stored(Pictures):
        reads = 0

        def __init__(self, targets: list[int]) -> None:
            super().__init__()
            self.targets = targets

        def __getitem__(self, i):
            Stored.reads += 1
            return super().__getitem__(i)

    right = [label for _, label in Pictures().examples]
    dataset = Stored(right)
    name_of(dataset, {})
    Stored.reads = 0
    assert opened(dataset).labels.tolist() == right and Stored.reads < 24 + 16
    assert opened(Stored([0] * 24)).labels.tolist() == right  # the examples count
    texts = Stored(right)
    texts.examples = [(image, f"c{label}") for image, label in texts.examples]
    with pytest.raises(UserError, match="label 'c0'; a label must be a whole number from 0"):
        opened(texts)


@pytest.mark.parametrize(("arguments", "labels", "most"), [
    ({"transform": torch.nn.Identity()}, [0, 1, 2, 0], 17),
    ({"target_transform": [0, 1, 1].__getitem__}, [0, 1, 1, 0], 40),
    ({"transforms": lambda image, label: (image, [0, 1, 1][label])}, [0, 1, 1, 0], 40),
])  # fmt: skip
def test_labels_that_a_transform_changes_are_not_the_stored_ones(arguments, labels, most) -> None:
    reads = []

    class Own(VisionDataset):
        targets: ClassVar = [0, 1, 2, 0] * 10  # the ends stay as they are

        def __len__(self):
            return 40

        def __getitem__(self, i):
            reads.append(i)
            return self.transforms(torch.zeros(3, 2, 2), self.targets[i])

    assert images_of(Own("", **arguments), "mine", "all").labels.tolist() == labels * 10 and len(reads) <= most


def test_labels_of_the_middle_are_compared_too() -> None:
    class Relabelled(Pictures):
        targets: ClassVar = [0] * 24

        def __getitem__(self, i):
            return super().__getitem__(i)[0], int(i in (8, 9))

    assert opened(Relabelled()).labels.tolist() == [0] * 8 + [1, 1] + [0] * 14


def test_a_file_of_the_name_does_not_make_a_saved_data_set(tmp_path) -> None:
    folder = write_folder(tmp_path / "pictures", 1)
    (folder / "state.json").write_text("{}")
    (folder / "dataset_dict.json").write_text("no JSON")
    assert len(open_images(folder)) == 3


@pytest.mark.parametrize(
    ("name", "content"), [("state.json", {"_data_files": []}), ("dataset_dict.json", {"splits": []})]
)
def test_a_damaged_saved_data_set(tmp_path, monkeypatch, name, content) -> None:
    def load_from_disk(path):
        raise FileNotFoundError(f"no {path}/x.arrow")

    (tmp_path / name).write_text(json.dumps(content))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_from_disk=load_from_disk))
    with pytest.raises(UserError, match=r"the saved data set cannot be loaded: no .*x\.arrow"):
        open_images(tmp_path)


def test_decoded_objects_are_not_kept_for_other_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path))
    pixels = Pixels(opened(Pictures()), 8)
    assert pixels.key is None and not list(tmp_path.rglob("*.npy"))
    assert pixels[torch.arange(2)].shape == (2, 3, 8, 8)


def test_a_name_has_the_content_of_its_object() -> None:
    objects: dict[str, Any] = {}
    config = {"data": [Pictures(), "digits"], "model": torch.nn.Linear(2, 2, bias=False), "n": 3}
    plain = named(config, objects)
    assert plain["data"][1] == "digits" and plain["n"] == 3 and set(objects) == {plain["data"][0], plain["model"]}
    assert plain["model"].startswith("<Linear ")
    again = named({"data": [Pictures(), Pictures(count=7)]}, {})["data"]
    assert again[0] == plain["data"][0] != again[1]


def test_feature_vectors_are_a_set_without_images() -> None:
    images, vectors = features_of(torch.utils.data.TensorDataset(torch.eye(3), torch.tensor([0, 2, 1])), "own", "all")
    assert torch.equal(vectors, torch.eye(3))
    assert images.classes == ["0", "1", "2"] and images.labels.tolist() == [0, 2, 1]


def test_hugging_face_data_sets_and_their_folders(tmp_path) -> None:
    pytest.importorskip("datasets.arrow_dataset")
    import datasets

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(Pictures.classes))})
    columns = {"img": [image for image, _ in Pictures().examples], "label": [label for _, label in Pictures().examples]}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    images = opened(dataset)
    assert tuple(images.classes) == Pictures.classes and torch.equal(images.read(5), opened(Pictures()).read(5))
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "saved")
    again = open_images(tmp_path / "saved", "train")
    assert torch.equal(again.read(5), images.read(5)) and again.name == "saved"
    texts = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    texts.save_to_disk(tmp_path / "texts")
    assert open_texts(tmp_path / "texts").rows == opened(texts, door=open_texts).rows == [*texts]
    assert open_texts(tmp_path / "texts").rows == opened(texts.to_pandas(), door=open_texts).rows


def test_a_data_set_of_the_hub_is_opened_by_name(tmp_path, monkeypatch) -> None:
    pytest.importorskip("datasets.arrow_dataset")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "owner" / "films"  # a folder of the name stands for the hub's repository
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (folder / "test.jsonl").write_text('{"text": "c"}\n')
    monkeypatch.chdir(tmp_path)
    assert [row["text"] for row in open_texts("hf/owner/films", "train").rows] == ["a", "b"]
    assert [row["text"] for row in open_texts(*card_and_split("hf/owner/films:test")).rows] == ["c"]
    with pytest.raises(UserError, match=r"'hf/owner/films': no split 'trian'\. Near: 'train'"):
        open_texts("hf/owner/films", "trian")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"data 'hf/owner/missing': the hub's data set cannot be loaded: "):
        open_texts("hf/owner/missing", "train")
