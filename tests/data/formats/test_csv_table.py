"""Labels in a csv table: the single-finding filter of ChestX, the one-hot ground truth of ISIC, and what is refused."""

from __future__ import annotations

import pytest

from vismt.base.errors import UserError
from vismt.data.check import check
from vismt.data.images import open_images

CHEST_HEAD = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)
CHEST = "column: Image Index, label: Finding Labels, keep: [Effusion, Mass], folders: [images, 'images_*/images']"
SKIN = "column: image, suffix: .png, keep: [MEL, NV], folders: [in]"


def card_of(write_card, text, table="t.csv", classes=2):
    return write_card(f"  - {{kind: table, root: x, table: {table}, {text}, splits: {{all: null}}}}", classes=classes)


@pytest.fixture
def chest(home, paint, write_card):
    base = home / "data" / "x"
    rows = ["1.png,Mass", "2.png,Effusion|Mass", "3.png,No Finding", "4.png,Effusion", "5.png,Pneumonia", "6.png,Mass"]
    base.mkdir()
    (base / "t.csv").write_text(
        "\n".join([CHEST_HEAD, *(f"{row},0,1,58,M,PA,2682,2749,0.143,0.143," for row in rows)]) + "\n"
    )
    for value, name in enumerate(["images_001/images/1.png", "images_001/images/4.png", "images_002/images/6.png"]):
        paint(base / name, 10 * (value + 1))
    return card_of(write_card, CHEST)


def test_only_single_findings_of_the_kept_classes(chest):
    images = open_images(chest)
    assert images.classes == ["Effusion", "Mass"] and images.labels.tolist() == [1, 0, 1]
    assert images.ids == ["images_001/images/1.png", "images_001/images/4.png", "images_002/images/6.png"]
    assert [int(images.read(i)[0, 0, 0]) for i in range(3)] == [10, 20, 30]
    report = check(chest)
    assert report.ok and report.images == 3


def test_a_missing_image_is_named(home, chest):
    (home / "data" / "x" / "images_002" / "images" / "6.png").unlink()
    with pytest.raises(
        UserError, match=r"2 of 3 images found in images, images_\*/images under \$VISMT_DATA/x; missing '6.png'"
    ):
        open_images(chest)
    assert not check(chest).ok


@pytest.fixture
def skin(home, paint, write_card):
    def make(rows, head="image,MEL,NV"):
        base = home / "data" / "x"
        base.mkdir(exist_ok=True)
        (base / "t.csv").write_text("\ufeff" + "\n".join([head, *rows]))
        for value, name in enumerate("abc"):
            paint(base / "in" / f"{name}.png", value + 1)
        return card_of(write_card, SKIN)

    return make


def test_one_hot_columns(skin):
    images = open_images(skin(["a,0.0,1.0", "b,1.0,0.0", "c,0.0,1.0"]))
    assert images.classes == ["MEL", "NV"] and images.labels.tolist() == [1, 0, 1] and images.ids[0] == "in/a.png"


@pytest.mark.parametrize(
    ("rows", "head", "message"),
    [
        (["a,1,1", "b,0,1"], "image,MEL,NV", r"t.csv: line 2: 2 of the columns \['MEL', 'NV'\] are not 0, must be one"),
        (["a,0,0"], "image,MEL,NV", "line 2: 0 of the columns"),
        (["a,yes,0"], "image,MEL,NV", "line 2: the columns .* must hold 0 or 1"),
        (
            ["a,1,0", "b,0,1", "b,0,1", "./a,0,1"],
            "image,MEL,NV",
            "line 5: './a.png' is 'NV', above 'MEL'; give each image one",
        ),
        (["a,1,0", "b,1"], "image,MEL,NV", "line 3: has no 'NV', as it has fewer columns than the first line"),
        (["a,1,0"], "image,MEL,NY", "no column 'NV'. Near: 'NY'"),
        (["../../secret,1,0"], "image,MEL,NV", r"line 2: '../../secret.png' must be a relative path"),
        (["/etc/secret,1,0"], "image,MEL,NV", "must be a relative path"),
        (["a,1,0"], "image,MEL,NV", "1 of 2 classes found"),
    ],
)
def test_a_bad_table_is_one_line(skin, rows, head, message):
    with pytest.raises(UserError, match=message) as caught:
        open_images(skin(rows, head))
    assert "\n" not in str(caught.value)


def test_no_table(home, paint, write_card):
    paint(home / "data" / "x" / "in" / "a.png")
    with pytest.raises(UserError, match=r"table '\$VISMT_DATA/x/t.csv' cannot be read"):
        open_images(card_of(write_card, SKIN))


@pytest.fixture
def graded(home, paint, write_card):
    """A table for training, and one with validation and test rows that the column Usage distinguishes."""
    base = home / "data" / "x"
    base.mkdir()
    (base / "train.csv").write_text("image,level\na,0\nb,1\nc,1\n")
    (base / "rest.csv").write_text("image,level,Usage\nd,1,Private\ne,0,Public\nf,0,Private\ng,1,Public\n")
    for value, name in enumerate(("in/a", "in/b", "in/c", "out/d", "out/e", "out/f", "out/g")):
        paint(base / f"{name}.png", value)
    return write_card(
        "  - {kind: table, root: x, table: {train: train.csv, val: rest.csv, test: rest.csv}, folders: [in, out], column: image,"
        " suffix: .png, label: level, keep: ['0', '1'], only: {val: {Usage: Public}, test: {Usage: Private}},"
        " splits: {train: 3, val: 2, test: 2}}"
    )


def test_a_table_for_each_split(graded):
    parts = {split: open_images(graded, split) for split in ("train", "val", "test", "all")}
    assert parts["train"].ids == ["in/a.png", "in/b.png", "in/c.png"] and parts["train"].labels.tolist() == [0, 1, 1]
    assert parts["val"].ids == ["out/e.png", "out/g.png"] and parts["val"].labels.tolist() == [0, 1]
    assert parts["test"].ids == ["out/d.png", "out/f.png"] and parts["test"].labels.tolist() == [1, 0]
    assert parts["all"].ids == [name for split in ("train", "val", "test") for name in parts[split].ids]
    report = check(graded)
    assert report.ok and [row.actual for row in report.splits] == [3, 2, 2]


def test_a_check_names_a_missing_image(home, graded):
    (home / "data" / "x" / "out" / "f.png").unlink()
    report = check(graded)
    assert [row.actual for row in report.splits] == [3, 2, 1] and not report.ok
    assert "1 of 2 images found in in, out under $VISMT_DATA/x; missing 'f.png'" in str(report)


def test_rows_that_the_split_lacks_are_missed(home, graded):
    path = home / "data" / "x" / "rest.csv"
    path.write_text(path.read_text().replace("f,0,Private", "f,0,Public"))
    with pytest.raises(UserError, match=r"1 of 2 images found under \$VISMT_DATA/x \(split 'test'\)"):
        open_images(graded, "test")
    path.write_text("image,level\nd,1\n")
    with pytest.raises(UserError, match="no column 'Usage'"):
        open_images(graded, "test")
    assert len(open_images(graded, "train")) == 3
