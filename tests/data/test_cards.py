"""Cards: strict reading, near names, and what every shipped card must say."""

from __future__ import annotations

import pytest

from vismt.base.errors import UserError
from vismt.data.cards import list_cards, load_card
from vismt.data.formats.folder import FolderSource
from vismt.data.formats.torchvision_sets import TorchvisionSource
from vismt.data.source_types import blocks_of_frames
from vismt.storage.paths import shipped

META = "  - {kind: meta_dataset, root: x, splits: {test: null}, classes_per_split: {tset: 9}}"
TABLE = "  - {kind: table, root: x, table: t.csv, folders: [in], column: image, keep: [a, b], splits: {all: 3}}"
LISTS = "  - {kind: filelist, root: x, splits: {novel: 3}, classes_per_split: {novel: 1}}"
BY_ID = (
    "  - {kind: lists, root: x, folder: images, paths: p.txt, labels: l.txt, training: t.txt, names: n.txt,"
    " splits: {train: 3, test: 2}}"
)
FOLDER = '  - {kind: folder, root: pets, layout: "{class}", splits: {all: 3}}'


def test_no_init_py_under_datasets():
    # It would make the folder importable as `datasets` and hide the Hugging Face package of that name.
    assert not list(shipped("datasets").rglob("__init__.py"))


@pytest.mark.parametrize("name", list_cards())
def test_shipped_card_is_complete(name):
    card = load_card(name)
    assert card.name == name
    assert card.citation and card.how_to_get and card.notes and card.tasks
    if card.same_images_as is not None:  # all name one card
        assert load_card(card.same_images_as).same_images_as is None
    # How many images a set has may be unknown only where its copies differ, and then no split states a number.
    assert card.images or all(count is None for source in card.sources for count in source.splits.values())
    for source in card.sources:
        if source.manifest:
            assert (card.folder / source.manifest).is_file()
    last = card.sources[-1]
    if isinstance(last, TorchvisionSource):
        assert sum(last.splits.values()) == card.images


def test_a_reduced_copy_has_not_the_name_of_the_whole_set():
    """Every copy of a card has as many images, so that no command fetches other images under the name of a study."""
    for name in list_cards():
        totals = {
            sum(source.splits.values()) for source in load_card(name).sources if None not in source.splits.values()
        }
        assert len(totals) <= 1, name


def test_every_required_set_has_a_card():
    wanted = {"cifar10", "cifar100", "grocery", "flowers102", "dtd10", "gtsrb", "blood_cells", "fashion_mnist", "mnist"}
    wanted |= {"cifar10-6000", "cifar100-8000", "flowers102-2843", "gtsrb-2140", "omniglot-4840", "mnist-4000"}
    wanted |= {"fashion_mnist-6000"}
    wanted |= {"omniglot", "camvid", "rgbd_7scenes", "digits", "photo_crops", "eurosat", "fgvc_aircraft", "svhn"}
    wanted |= {"food101", "stanford_cars", "pcam", "dtd"}
    assert wanted <= set(list_cards())


def test_card_by_file_and_by_folder(write_card):
    path = write_card(FOLDER)
    assert load_card(path) == load_card(str(path.parent))
    source = load_card(path).sources[0]
    assert isinstance(source, FolderSource) and source.splits == {"all": 3} and load_card(path).splits == ["all"]


@pytest.mark.parametrize(
    ("sources", "extra", "message"),
    [
        (FOLDER, "license: mine", "unknown key 'license'. Near: 'licence'"),
        (FOLDER, "notes: 3", "notes: expected str, got 3 (int)"),
        (FOLDER, "images: true", "images: expected int or null, got True (bool)"),
        (FOLDER, "tasks: [1]", "tasks[0]: expected str, got 1 (int)"),
        (FOLDER, "title: again", "key 'title' is given twice"),
        (FOLDER, "path: elsewhere", "unknown key 'path'"),
        (FOLDER, "names: ../x.json", "without '..'"),
        (FOLDER.replace("folder", "foldr"), "", "kind 'foldr' is not known. Near: 'folder'"),
        (FOLDER.replace("pets", "../pets"), "", "'../pets' must be a relative path"),
        (FOLDER.replace("root: pets", "root: 3"), "", "sources[0].root: expected str, got 3"),
        (FOLDER.replace("layout", "lay_out"), "", "unknown key 'sources[0].lay_out'. Near: 'layout'"),
        (FOLDER.replace("{class}", "{klass}"), "", "layout: '{klass}' is not known. Near: '{class}'"),
        (FOLDER.replace("all: 3", "train: 3"), "", "has no {split}: name one split 'all'"),
        (FOLDER.replace("all: 3", "all: 3, train: 3"), "", "'all' cannot name a split beside others"),
        (FOLDER.replace("all: 3", "all: 0"), "", "a count is at least 1"),
        (FOLDER.replace("{all: 3}", "{}"), "", "'splits' is empty"),
        (
            "  - {kind: arrays, root: x, file: ../../x.npz, splits: {all: 1}}",
            "",
            "'../../x.npz' must be a relative path",
        ),
        (META, "", "no split 'tset'. Near: 'test'"),
        (META.replace("tset", "test").replace("9", "-1"), "", "classes_per_split.test is -1; it lies from 0"),
        (
            META.replace("tset", "test").replace("9}", "9}, hierarchy: node"),
            "",
            "hierarchy: 'node' is not known. Near: 'nodes'",
        ),
        (TABLE.replace("t.csv", "../t.csv"), "", "'../t.csv' must be a relative path"),
        (TABLE.replace("[in]", "[../in]"), "", "'../in' must be a relative path"),
        (TABLE.replace("[a, b]", "[a, a]"), "", "'keep' names each class once"),
        (TABLE.replace("all: 3", "train: 3"), "", "a table has the one split 'all'"),
        (TABLE.replace("t.csv", "{all: ../t.csv}"), "", "'../t.csv' must be a relative path"),
        (
            TABLE.replace("t.csv", "{train: t.csv}"),
            "",
            "'table' is for ['train'], 'splits' names ['all']; a table has the one",
        ),
        (TABLE.replace("root", "only: {tset: {Usage: x}}, root"), "", "'only' names no split 'tset'"),
        (BY_ID.replace("test: 2", "tset: 2"), "", "'training' tells train from test; no split 'tset'. Near: 'test'"),
        (BY_ID.replace("l.txt", "../l.txt"), "", "'../l.txt' must be a relative path"),
        (BY_ID.replace("folder: images", "folder: /images"), "", "'/images' must be a relative path"),
        (BY_ID.replace("names: n.txt, ", ""), "", "key 'sources[0].names' is missing"),
        (LISTS.replace("novel: 1", "nove: 1"), "", "no split 'nove'. Near: 'novel'"),
        ("  []", "", "'sources' must be a list with at least one entry"),
        ("  - [", "", "not readable as YAML"),
    ],
)
def test_bad_card_names_its_path_and_the_key(write_card, sources, extra, message):
    path = write_card(sources, extra=extra)
    with pytest.raises(UserError) as caught:
        load_card(path)
    assert message in str(caught.value) and "card.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_key_and_not_a_mapping(write_card):
    path = write_card(FOLDER)
    path.write_text(path.read_text().replace("name: mine\n", ""))
    with pytest.raises(UserError, match=r"card.yaml: key 'name' is missing"):
        load_card(path)
    path.write_text("- a list")
    with pytest.raises(UserError, match="holds list"):
        load_card(path)


def test_unknown_name_gives_the_near_one(home):
    with pytest.raises(UserError, match=r"data 'cifar1000': no card.*Near: 'cifar100'"):
        load_card("cifar1000")


def test_manifest_that_is_no_json_names_the_file(write_card):
    path = write_card(FOLDER)
    (path.parent / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json: cannot be read"):
        load_card(path).read_json("manifest.json")


def test_frames_of_a_video_are_in_blocks_of_neighbours():
    names = [f"test/image/drive{video}_{30 * i}.jpg" for video, frames in (("A", 13), ("B7", 3)) for i in range(frames)]
    blocks = blocks_of_frames([*names, "test/image/cover.jpg"], 5)
    sizes = [list(blocks.values()).count(block) for block in dict.fromkeys(blocks.values())]
    assert sizes == [5, 5, 3, 3, 1]  # three of five are a block; the video is told by its name, not by its digits
    assert (
        blocks["test/image/driveA_90.jpg"] == blocks["test/image/driveA_120.jpg"] != blocks["test/image/driveA_150.jpg"]
    )
    # two left over belong to the block before
    assert [*blocks_of_frames([f"{i}.png" for i in range(12)], 5).values()].count(" 1") == 7


def test_blocks_of_frames_of_a_card(write_card):
    with pytest.raises(UserError, match="'groups' and 'frames' both say which images belong together"):
        load_card(write_card(FOLDER, extra="groups: none\nframes: 5"))
    with pytest.raises(UserError, match="frames is 1; it must be at least 2"):
        load_card(write_card(FOLDER, extra="frames: 1"))
    card = load_card(write_card(FOLDER, extra="frames: 5"))
    assert card.group_unit == "blocks of frames" and card.read_groups("none", ["1.png", "2.png"]) == {
        "1.png": " 0",
        "2.png": " 0",
    }
