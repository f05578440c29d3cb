"""Cards and configurations of multi-task classification: the published counts, the sets' own layouts, what the files name."""

from __future__ import annotations

import math

import pytest

from vismt.base.errors import UserError
from vismt.config.sections import read_config_file
from vismt.data.cards import load_card
from vismt.data.images import open_images
from vismt.storage.paths import shipped

COUNTS = {  # classes, images by split: the papers of the sets, and Table 8 of EMTAL
    "cub200": (200, {"train": 5994, "test": 5794}),
    "stanford_cars": (196, {"train": 8144, "test": 8041}),
    "fgvc_aircraft": (100, {"train": 3334, "val": 3333, "test": 3333}),
    "flowers102": (102, {"train": 1020, "val": 1020, "test": 6149}),
    "pcam": (2, {"train": 262144, "val": 32768, "test": 32768}),
    "eurosat": (10, {"all": 27000}),
    "resisc45": (45, {"all": 31500}),
    "diabetic_retinopathy": (5, {"train": 35126, "val": 10906, "test": 42670}),
}
CONFIGS = {"fgvc": (22845, 598), "vtab_specialised": (4000, 62)}  # training images, classes


@pytest.mark.parametrize("name", COUNTS)
def test_published_counts(name):
    card = load_card(name)
    assert (card.classes, card.sources[-1].splits) == COUNTS[name]
    assert card.images == sum(COUNTS[name][1].values())


def test_birds_in_their_own_layout(home, paint):
    """A third of the images trains; the card's counts are the real ones, so that a smaller copy is refused by number."""
    base = home / "data" / "CUB_200_2011"
    rows = [(i + 1, i % 200) for i in range(600)]
    for number, k in rows:
        paint(base / "images" / f"{k + 1:03d}.Bird" / f"{number}.jpg", size=(1, 1))
    (base / "images.txt").write_text("".join(f"{n} {k + 1:03d}.Bird/{n}.jpg\n" for n, k in rows))
    (base / "image_class_labels.txt").write_text("".join(f"{n} {k + 1}\n" for n, k in rows))
    (base / "train_test_split.txt").write_text("".join(f"{n} {int(n <= 200)}\n" for n, _ in rows))
    (base / "classes.txt").write_text("".join(f"{k + 1} {k + 1:03d}.Bird\n" for k in range(200)))
    with pytest.raises(
        UserError, match=r"datasets/cub200: 200 of 5,994 images found under \$VISMT_DATA/CUB_200_2011 .*'train'"
    ):
        open_images("cub200", "train")
    card = load_card("cub200")
    card.sources[0].splits.update(train=200, test=400)
    test = open_images(card, "test")
    assert test.labels.tolist() == 2 * list(range(200)) and test.classes[199] == "200.Bird"


def test_retina_photographs_in_their_own_layout(home, paint):
    base = home / "data" / "diabetic_retinopathy"
    for k in range(5):
        paint(base / "train" / f"{k}_left.jpeg")
        paint(base / "test" / f"{k}_right.jpeg")
        paint(base / "test" / f"{k + 5}_right.jpeg")
    (base / "trainLabels.csv").write_text("image,level\n" + "".join(f"{k}_left,{k}\n" for k in range(5)))
    usage = [f"{k}_right,{k % 5},{'Public' if k < 5 else 'Private'}\n" for k in range(10)]
    (base / "retinopathy_solution.csv").write_text("image,level,Usage\n" + "".join(usage))
    card = load_card("diabetic_retinopathy")
    card.sources[0].splits.update(train=5, val=5, test=5)
    test = open_images(card, "test")
    assert test.ids == [f"test/{k}_right.jpeg" for k in range(5, 10)] and test.labels.tolist() == list(range(5))
    assert test.classes == ["no retinopathy", "mild", "moderate", "severe", "proliferative"]
    assert open_images(card, "train").ids[0] == "train/0_left.jpeg" and len(open_images(card)) == 15
    with pytest.raises(UserError, match=r"5 of 42,670 images found .*split 'test'"):
        open_images("diabetic_retinopathy", "test")


def _images(names):
    parts = [name.partition(":") for name in names]
    return sum(load_card(card).sources[-1].splits[split or "all"] for card, _, split in parts)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_files_name_what_the_paper_trains_on(name):
    path = shipped("configs") / "multitask" / f"{name}.yaml"
    config = read_config_file(path)
    tasks, train = config["tasks"], config["train"]
    for task in tasks:
        assert (not task.get("test")) == bool(task.get("test_share"))
        assert not set(task["train"]) & set(task.get("test", []))
    images = sum(min(_images(task["train"]), task.get("limit", math.inf)) for task in tasks)
    cards = [task["train"][0].partition(":")[0] for task in tasks]
    assert (images, sum(load_card(card).classes for card in cards)) == CONFIGS[name]
    steps = images // config["batch"]  # of an epoch
    assert train["steps"] == 110 * steps and train["warmup"] == train["cooldown"] == 10 * steps
    assert config["fade"] == {"start": 0.0, "end": 0.5} and config["evaluate"]["split"] == "test"
    header = path.read_text().partition("task:")[0]
    assert "Not run" in header and "docs/results/paper_scale.md" in header and all(card in header for card in cards)
