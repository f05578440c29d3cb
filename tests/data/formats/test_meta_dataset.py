"""Meta-Dataset's converted domains: class ranges of the spec, alphabets, WordNet nodes, HDF5 files and folders."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from vismt.base.errors import UserError
from vismt.data.check import check
from vismt.data.formats.meta_dataset import leaves_of_nodes, ranges
from vismt.data.images import open_images
from vismt.metatune.protocol.episodes import EpisodeSampler, VariableSampler

SPLIT = "{train: 2, valid: 1, test: 2}"


def write_h5(path, values, size=(5, 6)):
    """One class as the conversion writes it: groups 0, 1, ... each with image, label and id."""
    h5py = pytest.importorskip("h5py")
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for i, value in enumerate(values):
            group = file.create_group(str(i))
            group.create_dataset("image", data=np.full((*size, 3), value, dtype=np.uint8))
            group.create_dataset("label", data=np.array(0))
            group.create_dataset("id", data=np.array(b"name"))


def flat_spec(**changes):
    spec = {
        "name": "toy", "classes_per_split": {"TRAIN": 2, "VALID": 1, "TEST": 2},
        "images_per_class": {str(k): 2 for k in range(5)},
        "class_names": {str(k): name for k, name in enumerate(["oak", "ash", "elm", "F/A-18", "yew"])},
        "path": "/elsewhere", "file_pattern": "{}.tfrecords", "__class__": "DatasetSpecification",
    }  # fmt: skip
    return spec | changes


def synset(wn_id, *children):
    return {"wn_id": wn_id, "words": wn_id, "children_ids": list(children), "parents_ids": []}


# Train: root over a (n0, n1) and b (n1, n2), so n1 has two parents; valid: one leaf; test: n4 below a root.
GRAPHS = {
    "TRAIN": [
        synset("root", "a", "b"),
        synset("a", "n0", "n1"),
        synset("b", "n1", "n2"),
        *map(synset, ("n0", "n1", "n2")),
    ],
    "VALID": [synset("n3")],
    "TEST": [synset("top", "n4", "n5"), synset("n4"), synset("n5")],
}
TREE = {
    "name": "tree", "split_subgraphs": GRAPHS,
    "images_per_class": {
        "TRAIN": {"root": 6, "a": 4, "b": 4, "n0": 2, "n1": 2, "n2": 2}, "VALID": {"n3": 2}, "TEST": {"top": 4, "n4": 2, "n5": 2},
    },
    "class_names": {str(k): f"n{k}" for k in range(6)},
}  # fmt: skip
ALPHABETS = {
    "name": "letters", "superclasses_per_split": {"TRAIN": 1, "VALID": 1, "TEST": 2},
    "classes_per_superclass": {"0": 2, "1": 1, "2": 2, "3": 3}, "images_per_class": {str(k): 2 for k in range(8)},
    "superclass_names": {"0": "Greek", "1": "Latin", "2": "Futurama", "3": "Braille"},
    "class_names": {str(k): f"letter-{k}" for k in range(8)},
}  # fmt: skip


@pytest.fixture
def domain(home, write_card):
    """domain(spec, split, hierarchy): a card over data/md; with h5 files of two images for every class; its folder."""

    def make(spec, split=SPLIT, hierarchy=None, files=True):
        base = home / "data" / "md"
        base.mkdir()
        count = sum(int(part.split(":")[1]) for part in split.strip("{}").split(","))
        if spec is not None:
            (base / "dataset_spec.json").write_text(json.dumps(spec))
        for k in range(count if files else 0):
            write_h5(base / f"{k}.h5", [10 * k, 10 * k + 1])
        kind = f"kind: meta_dataset, root: md, classes_per_split: {split}, splits: {{train: null, valid: null, test: null}}"
        more = f", hierarchy: {hierarchy}" if hierarchy else ""
        return write_card(f"  - {{{kind}{more}}}", classes=count, name="toy"), base

    return make


def test_ranges_are_consecutive_in_the_order_train_valid_test():
    assert ranges({"test": 5, "train": 2}) == {"train": range(2), "valid": range(2, 2), "test": range(2, 7)}


def test_split_is_a_range_of_class_ids_and_labels_are_those_ids(domain):
    card, _ = domain(flat_spec())
    test = open_images(card, "test")
    # A reader that numbers the classes of each split on its own would say 0, 1.
    assert test.labels.tolist() == [3, 3, 4, 4] and test.classes == ["oak", "ash", "elm", "F/A-18", "yew"]
    assert test.ids == ["3.h5/0", "3.h5/1", "4.h5/0", "4.h5/1"]
    assert [int(test.read(i)[0, 0, 0]) for i in range(4)] == [30, 31, 40, 41]
    assert test.read(0).dtype == torch.uint8 and test.read(0).shape == (3, 5, 6)
    assert open_images(card, "train").labels.unique().tolist() == [0, 1] and len(open_images(card)) == 10
    assert test.superclass is None and test.nodes is None


def test_without_a_spec_the_card_s_numbers_count(domain):
    card, _ = domain(None)
    valid = open_images(card, "valid")
    assert valid.labels.tolist() == [2, 2] and valid.classes == ["0", "1", "2", "3", "4"]


def test_alphabets_become_superclasses(domain):
    card, _ = domain(ALPHABETS, "{train: 2, valid: 1, test: 5}", "superclass")
    test = open_images(card, "test")
    assert test.labels.tolist() == [3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    names = [test.superclass_names[k] for k in test.superclass.tolist()]
    assert names == ["Greek", "Greek", "Latin", "Futurama", "Futurama", "Braille", "Braille", "Braille"]
    sampler = EpisodeSampler(test.labels, ways=2, shots=1, queries=1, superclass=test.superclass)
    drawn = {tuple(sorted(sampler[i].classes.tolist())) for i in range(40)}
    assert drawn == {(3, 4), (5, 6), (5, 7), (6, 7)}  # never across alphabets


def test_wordnet_nodes_reach_the_sampler(domain):
    card, _ = domain(TREE, "{train: 3, valid: 1, test: 2}", "nodes")
    train = open_images(card, "train")
    assert train.nodes == [[0, 1, 2], [0, 1], [1, 2]] and train.superclass is None
    assert open_images(card, "test").nodes == [[4, 5]] and open_images(card, "valid").nodes is None
    sampler = VariableSampler(train.labels, nodes=train.nodes, min_ways=2, max_ways=2, max_contribution=1)
    pairs = {tuple(sorted(sampler[i].classes.tolist())) for i in range(60)}
    assert pairs == {(0, 1), (1, 2), (0, 2)}
    assert len(sampler._groups) == 3


def test_a_leaf_below_two_nodes_counts_once_in_their_common_parent():
    assert leaves_of_nodes(GRAPHS["TRAIN"], {"n0": 5, "n1": 6, "n2": 7}) == [[5, 6, 7], [5, 6], [6, 7]]


def test_folders_by_class_name_in_place_of_files(domain, paint):
    card, base = domain(TREE, "{train: 3, valid: 1, test: 2}", "nodes", files=False)
    for value, name in enumerate(["n4/x.png", "n4/y.png", "n5/x.png", "valid/n3/x.png"]):
        paint(base / name, 10 + value)
    test = open_images(card, "test")
    assert test.labels.tolist() == [4, 4, 5] and test.ids == ["n4/x.png", "n4/y.png", "n5/x.png"]
    assert int(test.read(2)[0, 0, 0]) == 12 and len(open_images(card, "valid")) == 1
    with pytest.raises(
        UserError, match=r"class 0 \('n0', split 'train'\) has neither '0.h5' nor '0.tfrecords' nor a folder"
    ):
        open_images(card, "train")


def test_a_slash_in_a_class_name_is_no_path(domain, paint):
    card, base = domain(flat_spec(), files=False)
    for name in ["F_A-18/1.png", "yew/1.png", "test/yew/2.png"]:
        paint(base / name)
    assert open_images(card, "test").ids == ["F_A-18/1.png", "test/yew/2.png"]


def test_hierarchy_needs_the_spec(domain):
    card, _ = domain(None, hierarchy="superclass")
    with pytest.raises(
        UserError, match=r"no 'dataset_spec.json' under \$VISMT_DATA/md, which holds its hierarchy \(super"
    ):
        open_images(card, "test")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (flat_spec(classes_per_split={"TRAIN": 3, "VALID": 0, "TEST": 2}), "classes per split .* the card says"),
        (flat_spec(class_names={"0": "oak"}), "names 1 classes, its splits hold 5"),
        ({"name": "toy"}, r"not a dataset_spec of Meta-Dataset \(KeyError"),
        ([1], "not a dataset_spec"),
    ],
)
def test_a_strange_spec_is_named(domain, spec, message):
    card, _ = domain(spec)
    with pytest.raises(UserError, match=message) as caught:
        open_images(card, "test")
    assert "\n" not in str(caught.value)


def test_a_loop_in_the_graph_is_no_endless_walk(domain):
    loop = TREE | {
        "split_subgraphs": GRAPHS | {"TRAIN": [synset("a", "b"), synset("b", "a"), *map(synset, ("n0", "n1", "n2"))]}
    }
    card, _ = domain(loop, "{train: 3, valid: 1, test: 2}", "nodes")
    with pytest.raises(UserError, match="not a dataset_spec of Meta-Dataset"):
        open_images(card, "train")


def test_short_damaged_and_missing_files(domain):
    card, base = domain(flat_spec())
    write_h5(base / "3.h5", [1])
    with pytest.raises(UserError, match=r"\$VISMT_DATA/md/3.h5: holds 1 of 2 images"):
        open_images(card, "test")
    (base / "3.h5").write_bytes(b"no HDF5")
    with pytest.raises(UserError, match=r"3.h5: cannot be read as HDF5"):
        open_images(card, "test")
    (base / "3.h5").unlink()
    with pytest.raises(UserError, match=r"class 3 \('F/A-18', split 'test'\) has neither '3.h5'"):
        open_images(card, "test")
    assert len(open_images(card, "train")) == 4


def test_image_of_another_shape_and_missing_key(domain):
    card, base = domain(flat_spec())
    h5py = pytest.importorskip("h5py")
    with h5py.File(base / "4.h5", "a") as file:
        del file["1"]["image"]
        file["1"]["image"] = np.zeros((4, 4), np.uint8)
        del file["0"]["image"]
    images = open_images(card, "test")
    with pytest.raises(UserError, match=r"4.h5: image '1' is torch.uint8 \(4, 4\), must be uint8 \(h, w, 3\)"):
        images.read(3)
    with pytest.raises(UserError, match=r"4.h5: image '0' cannot be read"):
        images.read(2)


def test_skipping_damaged_images_keeps_the_nodes(domain):
    card, base = domain(TREE, "{train: 3, valid: 1, test: 2}", "nodes")
    h5py = pytest.importorskip("h5py")
    with h5py.File(base / "0.h5", "a") as file:
        del file["1"]["image"]
    kept = open_images(card, "train", on_bad_sample="skip")
    assert (
        kept.skipped == ["0.h5/1"]
        and kept.labels.tolist() == [0, 1, 1, 2, 2]
        and kept.nodes == [[0, 1, 2], [0, 1], [1, 2]]
    )


def test_without_h5py_the_extra_is_named(domain, monkeypatch):
    import sys

    card, _ = domain(flat_spec())
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r'needs h5py, which is not installed: pip install "vismt\[metadataset\]"'):
        open_images(card, "test")


def test_check_counts_and_content_follows_the_files(domain):
    card, base = domain(flat_spec())
    report = check(card)
    assert report.ok and report.images == 10, str(report)
    before = open_images(card, "test").content()
    assert open_images(card, "test").content() == before
    write_h5(base / "4.h5", [7, 8], size=(9, 9))
    assert open_images(card, "test").content() != before
    (base / "0.h5").unlink()
    assert not check(card).ok and "class 0 ('oak'" in check(card).problem
