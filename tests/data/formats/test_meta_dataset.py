"""Meta-Dataset's converted domains: class ranges of the spec, alphabets, WordNet nodes, files of records and their damage."""

from __future__ import annotations

import json
import os

import pytest
import torch
from helpers.tfrecords import encoded, example, record, write_class

from vismt.base.errors import UserError
from vismt.data.cards import load_card
from vismt.data.check import check
from vismt.data.formats.meta_dataset import leaves_of_nodes, ranges
from vismt.data.images import open_images
from vismt.metatune.protocol.episodes import EpisodeSampler, VariableSampler
from vismt.storage.paths import shipped

pytest.importorskip("tfrecord")

SPLIT = "{train: 2, valid: 1, test: 2}"
NAMES = ["oak", "ash", "elm", "F/A-18", "yew"]


def flat_spec(**changes):
    spec = {
        "name": "toy", "classes_per_split": {"TRAIN": 2, "VALID": 1, "TEST": 2},
        "images_per_class": {str(k): 2 for k in range(5)},
        "class_names": {str(k): name for k, name in enumerate(NAMES)},
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
    """domain(spec, split, hierarchy): a card over data/md with two images of every class, and the folder."""

    def make(spec, split=SPLIT, hierarchy=None):
        base = home / "data" / "md"
        base.mkdir()
        count = sum(int(part.split(":")[1]) for part in split.strip("{}").split(","))
        if spec is not None:
            (base / "dataset_spec.json").write_text(json.dumps(spec))
        for k in range(count):
            write_class(base / f"{k}.tfrecords", k, [10 * k, 10 * k + 1])
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
    assert test.labels.tolist() == [3, 3, 4, 4] and test.classes == NAMES
    assert test.ids == ["3.tfrecords/0", "3.tfrecords/1", "4.tfrecords/0", "4.tfrecords/1"]
    assert [int(test.read(i)[0, 0, 0]) for i in (3, 0, 2, 1)] == [41, 30, 40, 31]
    assert test.read(0).dtype == torch.uint8 and test.read(0).shape == (3, 5, 6)
    assert open_images(card, "train").labels.unique().tolist() == [0, 1] and len(open_images(card)) == 10
    assert test.superclass is None and test.nodes is None


def test_without_a_spec_the_card_s_numbers_count(domain):
    card, base = domain(None)
    write_class(base / "4.tfrecords", 4, [1, 2, 3])
    test = open_images(card, "test")
    assert test.labels.tolist() == [3, 3, 4, 4, 4] and test.classes == ["0", "1", "2", "3", "4"]


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


def test_jpeg_is_decoded(domain):
    card, base = domain(flat_spec())
    write_class(base / "2.tfrecords", 2, [200, 100], form="JPEG")
    valid = open_images(card, "valid")
    assert [abs(int(valid.read(i)[1, 2, 3]) - value) <= 2 for i, value in enumerate((200, 100))] == [True, True]


def test_check_counts_and_content_follows_the_files(domain):
    card, base = domain(flat_spec())
    report = check(card)
    assert report.ok and report.images == 10, str(report)
    before = open_images(card, "test").content()
    assert open_images(card, "test").timed  # another copy has other times: these do not tell the images from others
    write_class(base / "4.tfrecords", 4, [7, 8], form="JPEG")
    changed = open_images(card, "test").content()
    assert changed != before
    path = base / "4.tfrecords"
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as unpacking an archive does
    assert open_images(card, "test").content() != changed
    path.write_bytes(content)
    source = load_card(card).sources[0]
    assert list(source.list_files(base)) == [*(f"{k}.tfrecords" for k in range(5)), "dataset_spec.json"]
    (base / "0.tfrecords").unlink()
    assert "class 0 ('oak', split 'train') has no file '0.tfrecords' under $VISMT_DATA/md" in check(card).problem
    assert not check(card).ok and len(open_images(card, "test")) == 4


def test_skipping_damaged_images_keeps_the_nodes(domain):
    card, base = domain(TREE, "{train: 3, valid: 1, test: 2}", "nodes")
    (base / "0.tfrecords").write_bytes(record(example({"image": [encoded(1)], "label": [0]})) + record(b""))
    kept = open_images(card, "train", on_bad_sample="skip")
    assert kept.skipped == ["0.tfrecords/1"] and kept.labels.tolist() == [0, 1, 1, 2, 2]
    assert kept.nodes == [[0, 1, 2], [0, 1], [1, 2]]


def flip(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


GOOD = record(example({"image": [encoded(1)], "label": [3]}))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (flip(GOOD, 0), "record 1: its length does not fit its checksum"),
        (flip(GOOD, 9), "record 1: its length does not fit its checksum"),
        (GOOD[:-1], r"record 1: [\d,]+ bytes, [\d,]+ are there"),
        (GOOD[:30], r"record 1: [\d,]+ bytes, 30 are there"),
        (GOOD[:7], "record 1: the file ends within its length"),
    ],
)
def test_damaged_framing_is_seen_when_the_set_is_opened(domain, second, message):
    card, base = domain(flat_spec())
    (base / "3.tfrecords").write_bytes(GOOD + second)
    with pytest.raises(UserError, match=rf"^\$VISMT_DATA/md/3.tfrecords: {message}") as caught:
        open_images(card, "test")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (flip(GOOD, 40), "the data does not fit its checksum"),
        (flip(GOOD, len(GOOD) - 1), "the data does not fit its checksum"),
        (record(b"\x0a\x05abc"), r"not a tf.train.Example"),
        (record(b"\x0b\x01"), r"not a tf.train.Example"),
        (record(b"\x0a\x02\x0a\x80"), "not a tf.train.Example"),
        (record(b"\x80" * 12), r"not a tf.train.Example"),
        (record(b"\x08\x01"), r"needs one 'image' of type bytes; its features are nothing"),
        (
            record(example({"img": [b"x"], "label": [3]})),
            "needs one 'image' of type bytes; its features are 'img', 'label'",
        ),
        (record(example({"image": [encoded(1)]})), "needs one 'label' of type int; its features are 'image'"),
        (record(example({"image": [encoded(1)] * 2, "label": [3]})), "needs one 'image'"),
        (record(example({"image": [5], "label": [3]})), "needs one 'image' of type bytes"),
        (record(b""), "needs one 'image' of type bytes; its features are nothing"),
        (record(example({"image": [encoded(1)], "label": [4]})), "has label 4, its file is for class 3"),
        (record(example({"image": [b"no image"], "label": [3]})), "cannot be decoded"),
    ],
)
def test_a_damaged_record_is_named_when_it_is_read(domain, second, message):
    card, base = domain(flat_spec())
    (base / "3.tfrecords").write_bytes(GOOD + second)
    test = open_images(card, "test")
    assert int(test.read(0)[0, 0, 0]) == 1
    with pytest.raises(UserError, match=rf"^\$VISMT_DATA/md/3.tfrecords: record 1: .*{message}") as caught:
        test.read(1)
    assert "\n" not in str(caught.value)
    kept = open_images(card, "test", on_bad_sample="skip")
    assert kept.skipped == ["3.tfrecords/1"] and kept.labels.tolist() == [3, 4, 4]


def test_another_number_of_records_than_the_spec_says(domain):
    card, base = domain(flat_spec())
    (base / "3.tfrecords").write_bytes(GOOD)
    with pytest.raises(UserError, match=r"3.tfrecords: holds 1 of 2 images"):
        open_images(card, "test")
    (base / "3.tfrecords").write_bytes(b"")
    with pytest.raises(UserError, match=r"3.tfrecords: holds 0 of 2 images"):
        open_images(card, "test")


@pytest.mark.parametrize("path", sorted(shipped("datasets").glob("md_*")), ids=lambda path: path.name)
def test_every_card_says_where_its_records_lie(path):
    card = load_card(path.name)
    (source,) = card.sources
    steps = " ".join(card.how_to_get.split())
    assert f"0.tfrecords to {card.classes - 1}.tfrecords" in steps and f"$VISMT_DATA/{source.root}." in steps
