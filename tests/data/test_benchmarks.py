"""Cards and configurations of Meta-Dataset, BSCD-FSL and the fine-grained sets: numbers, layouts, what is said when absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.tfrecords import write_class

from vismt.base.errors import UserError
from vismt.cli import main
from vismt.data.cards import list_cards, load_card
from vismt.data.check import check, listing, prepare
from vismt.data.formats.json_lists import FilelistSource
from vismt.data.formats.meta_dataset import MetaDatasetSource
from vismt.data.images import open_images
from vismt.jobs import load_config
from vismt.storage.paths import shipped

META = {  # classes of train, valid, test: table of the paper's appendix and the published dataset_spec files
    "ilsvrc_2012": (712, 158, 130), "omniglot": (883, 81, 659), "aircraft": (70, 15, 15), "cub": (140, 30, 30), "dtd": (33, 7, 7),
    "quickdraw": (241, 52, 52), "fungi": (994, 200, 200), "vgg_flower": (71, 15, 16), "traffic_sign": (0, 0, 43),
    "mscoco": (0, 40, 40),
}  # fmt: skip
BSCD = {"crop_disease": 38, "eurosat": 10, "isic": 7, "chestx": 7}
FINE = {"cub": (100, 50, 50), "cars": (98, 49, 49), "plantae": (100, 50, 50), "places": (183, 91, 91)}
CARDS = [*(f"md_{n}" for n in META), *(f"bscd_{n}" for n in BSCD), *(f"fg_{n}" for n in FINE)]
CONFIGS = ("meta_dataset", "bscd_fsl", "fine_grained", "substitutes")


@pytest.mark.parametrize("name", META)
def test_meta_dataset_class_splits(name):
    card = load_card(f"md_{name}")
    source = card.sources[0]
    assert isinstance(source, MetaDatasetSource)
    assert tuple(source.classes_per_split.get(split, 0) for split in ("train", "valid", "test")) == META[name]
    assert card.classes == sum(META[name]) and set(source.splits) == set(source.classes_per_split)
    counts = list(source.splits.values())
    assert None in counts or sum(counts) == card.images
    assert source.hierarchy == {"ilsvrc_2012": "nodes", "omniglot": "superclass"}.get(name)


@pytest.mark.parametrize("name", FINE)
def test_fine_grained_class_splits_are_the_alternation_of_the_lists(name):
    card = load_card(f"fg_{name}")
    source = card.sources[0]
    assert isinstance(source, FilelistSource) and source.after == source.root + "/"
    assert tuple(source.classes_per_split.values()) == FINE[name]
    # Class i is in base for even i, in val for i = 1 and in novel for i = 3 (mod 4).
    where = ["base" if i % 2 == 0 else "val" if i % 4 == 1 else "novel" for i in range(card.classes)]
    assert {split: where.count(split) for split in ("base", "val", "novel")} == source.classes_per_split


@pytest.mark.parametrize("name", CARDS)
def test_absent_set_says_how_to_get_it(home, name, capsys):
    report = check(name)
    text = str(report)
    assert not report.ok and report.where is None and "\n" not in text
    assert text.startswith(f"datasets/{name}: nothing found under $VISMT_DATA/")
    steps = " ".join(load_card(name).how_to_get.split())
    if name == "bscd_eurosat":
        assert "`vismt data prepare bscd_eurosat` downloads it" in text
    else:
        assert text.endswith(f"How to get it: {steps}") and "$VISMT_DATA" in steps
        with pytest.raises(UserError, match="cannot be downloaded by vismt"):
            prepare(name)
    assert main(["data", "check", name]) == 1 and name in capsys.readouterr().out


def test_listed_with_their_classes(home, capsys):
    rows = {row.name: row for row in listing()}
    assert set(CARDS) <= set(list_cards()) and all(rows[name].where == "-" for name in CARDS)
    assert {n: rows[f"bscd_{n}"].classes for n in BSCD} == BSCD
    assert main(["data", "list"]) == 0 and any(
        line.split()[:2] == ["md_ilsvrc_2012", "meta_dataset"] for line in capsys.readouterr().out.splitlines()
    )


def test_chestx_in_its_own_layout(home, paint):
    base = home / "data" / "ChestX"
    kinds = ["Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumothorax"]
    rows = [*kinds, "No Finding", "Pneumonia", "Mass|Nodule", "Hernia"]
    for i, _ in enumerate(rows):
        paint(base / "images" / f"{i:08d}_000.png")
    lines = ["Image Index,Finding Labels,Follow-up #", *(f"{i:08d}_000.png,{row},0" for i, row in enumerate(rows))]
    (base / "Data_Entry_2017.csv").write_text("\n".join(lines))
    images = open_images("bscd_chestx")
    assert images.classes == kinds and images.labels.tolist() == list(range(7)) and check("bscd_chestx").ok


def test_isic_with_too_few_images_is_short(home, paint):
    base = home / "data" / "ISIC"
    table = base / "ISIC2018_Task3_Training_GroundTruth" / "ISIC2018_Task3_Training_GroundTruth.csv"
    table.parent.mkdir(parents=True)
    table.write_text("image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\nISIC_0024306,0.0,1.0,0.0,0.0,0.0,0.0,0.0\n")
    paint(base / "ISIC2018_Task3_Training_Input" / "ISIC_0024306.jpg")
    with pytest.raises(UserError, match="1 of 10,015 images found"):
        open_images("bscd_isic")


def test_crop_disease_folders(home, paint):
    for k in range(38):
        paint(home / "data" / "CropDiseases" / "dataset" / "train" / f"leaf_{k:02d}" / "1.jpg")
        paint(home / "data" / "CropDiseases" / "dataset" / "test" / f"leaf_{k:02d}" / "1.jpg")
    assert len(open_images("bscd_crop_disease")) == 38


def test_plantae_lists(home, paint):
    base = home / "data" / "filelists" / "plantae"
    names = [f"plant {k}" for k in range(200)]
    for name in names:
        paint(base / "images" / name / "1.jpg", size=(2, 2))
    for split, chosen in (("base", range(0, 200, 2)), ("val", range(1, 200, 4)), ("novel", range(3, 200, 4))):
        images = [f"/scratch/x/filelists/plantae/images/{names[k]}/1.jpg" for k in chosen]
        content = {"label_names": names, "image_names": images, "image_labels": list(chosen)}
        (base / f"{split}.json").write_text(json.dumps(content))
    assert open_images("fg_plantae", "novel").labels.tolist() == list(range(3, 200, 4)) and check("fg_plantae").ok


def test_imagenet_with_the_spec(home):
    """1,000 leaves in three graphs as the published file has them; only the test classes are here."""
    counts = {"TRAIN": 712, "VALID": 158, "TEST": 130}
    ids, graphs, images, start = {}, {}, {}, 0
    for split, count in counts.items():
        leaves = [f"n{k:08d}" for k in range(start, start + count)]
        ids |= {str(start + i): name for i, name in enumerate(leaves)}
        graphs[split] = [
            {"wn_id": f"{split}-root", "words": "", "children_ids": [f"{split}-part", *leaves[7:]], "parents_ids": []},
            {"wn_id": f"{split}-part", "words": "", "children_ids": leaves[:7], "parents_ids": [f"{split}-root"]},
            *({"wn_id": name, "words": "", "children_ids": [], "parents_ids": []} for name in leaves),
        ]
        images[split] = {name: 1 for name in leaves}
        start += count
    base = home / "data" / "meta_dataset_tfrecords" / "ilsvrc_2012"
    for k in range(870, 1000):
        write_class(base / f"{k}.tfrecords", k, [1])
    spec = {"name": "ilsvrc_2012", "split_subgraphs": graphs, "images_per_class": images, "class_names": ids}
    (base / "dataset_spec.json").write_text(json.dumps(spec))
    test = open_images("md_ilsvrc_2012", "test")
    assert test.labels.tolist() == list(range(870, 1000)) and len(test.classes) == 1000
    assert test.nodes == [list(range(870, 1000)), list(range(870, 877))]
    assert torch.equal(test.labels.unique(), torch.tensor(test.nodes[0]))


@pytest.mark.parametrize("name", CONFIGS)
def test_config_loads_and_names_known_splits(name):
    path = shipped("configs") / "fewshot" / f"{name}.yaml"
    config = load_config(path, [])
    assert config.task == "fewshot" and config.evaluate.episodes == 600
    for text in [*config.source.data, *config.evaluate.data]:
        card, _, split = text.partition(":")
        assert (split or "all") in [*load_card(card).splits, "all"]
    names = {text.partition(":")[0] for text in config.evaluate.data}
    suites = {"meta_dataset": "md_", "bscd_fsl": "bscd_", "fine_grained": "fg_"}
    if name in suites:
        assert names == {card for card in CARDS if card.startswith(suites[name])}
        assert config.train is None and config.pool.folder == "pools/amt" and config.model.img_size == 128
        assert config.evaluate.queries == (10 if name == "meta_dataset" else 15)
    else:
        # Substitutes are never cards of the benchmarks, and their configurations state that.
        assert not names & set(CARDS) and "NOT Meta-Dataset, NOT BSCD-FSL" in path.read_text()
    assert "Not run" in path.read_text()


@pytest.mark.parametrize("name", CONFIGS)
def test_running_without_the_data_is_one_line_and_code_2(home, tmp_path: Path, name, capsys):
    path = shipped("configs") / "fewshot" / f"{name}.yaml"
    first = load_config(path, []).evaluate.data[0].partition(":")[0]
    assert main(["run", str(path), "--out", str(tmp_path / "runs")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: datasets/{first}: nothing found under $VISMT_DATA")
