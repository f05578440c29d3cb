"""The report of a hand-made run folder: numbers by hand, ties, refusals, and a page that stands alone."""

import json
import math
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from vismt.errors import UserError
from vismt.report.comparison import compare, read_results
from vismt.report.report import write_report

PGD = "PGD-10 linf 4.5/255"
FROZEN = [0.2, 0.4, 0.6, 0.8]
# mean 0.5; squares of the deviations .09 + .01 + .01 + .09 = .2; std = sqrt(.2 / 3) = .2582; 1.96 * .2582 / 2 = .2530
HALF = 1.96 * math.sqrt(0.2 / 3) / 2


def write_rows(path, rows, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode, encoding="utf8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def add(folder, data, model, clean, attacked, protocol="5-way 1-shot", records=True):
    rows = []
    for condition, values in (("clean", clean), (PGD, attacked)):
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        rows.append(
            {
                "data": data,
                "protocol": protocol,
                "condition": condition,
                "metric": "accuracy",
                "model": model,
                "value": mean,
                "ci95": 1.96 * spread / math.sqrt(len(values)),
                "n": len(values),
                "unit": "episodes",
                "seed": 1,
                "config_hash": "4f2a9c1e",
            }
        )
    write_rows(folder / "results.jsonl", rows, "a")
    if records:
        lines = [{"protocol": "0011", "settings": {"data": data}}]
        lines += [{"episode": i, "clean": a, PGD: b} for i, (a, b) in enumerate(zip(clean, attacked))]
        write_rows(folder / "records" / f"{data}-{protocol.replace(' ', '-')}-{model}.jsonl", lines)


def make_folder(parent):
    """Two sets. digits: adapted is better by exactly 0.1 in each episode. crops: the models take turns."""
    folder = parent / "run-4f2a"
    add(folder, "digits", "frozen", FROZEN, [0.1, 0.1, 0.2, 0.2])
    add(folder, "digits", "adapted", [v + 0.1 for v in FROZEN], [0.2, 0.2, 0.3, 0.3])
    add(folder, "crops", "frozen", FROZEN, [0.0, 0.2, 0.0, 0.2])
    add(folder, "crops", "adapted", [0.3, 0.35, 0.7, 0.75], [0.4, 0.5, 0.4, 0.5])
    (folder / "run.json").write_text(
        json.dumps(
            {
                "title": "Digits <script>alert(1)</script> & crops",
                "command": "vismt run configs/quickstart.yaml seed=0",
                "git_revision": "0123456789ab",
                "config_hash": "4f2a9c1e",
                "hardware": "a processor, 2 cores",
                "seed": 0,
                "started": "2026-01-05T10:00:00+00:00",
                "finished": "2026-01-05T10:07:12+00:00",
                "wall_time_s": 432.4,
                "versions": {"python": "3.11.7", "torch": "2.13.0"},
                "adapt": {"method": "lora", "rank": 8, "trainable": 250, "total": 1000},
            }
        )
    )
    (folder / "config.resolved.yaml").write_text("title: <img src=x onerror=alert(2)>\nseed: 0\n")
    write_rows(
        folder / "metrics.jsonl",
        [
            {
                "step": s,
                "loss": 2 / s,
                "accuracy": None if s == 3 else 1 - 1 / s,
                "lr": 1e-3,
                "grad_norm": 1.0,
                "elapsed_s": s,
            }
            for s in range(1, 30)
        ],
    )
    labels = np.repeat(np.arange(5), 2)
    images = np.random.default_rng(0).integers(0, 250, (10, 3, 8, 8), dtype=np.uint8)
    (folder / "panels").mkdir()
    np.savez(
        folder / "panels" / "digits-5-way-1-shot.npz",
        support=images[::2],
        support_labels=labels[::2],
        query=images,
        query_labels=labels,
        predictions=np.where(labels == 4, 0, labels),
        adversarial=images + 5,
        adversarial_predictions=np.where(labels == 0, 0, (labels + 1) % 5),
        classes=np.array(list("abcde")),
        condition=PGD,
    )
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """With its report, for tests that only read."""
    folder = make_folder(tmp_path_factory.mktemp("report"))
    assert write_report(folder) == folder / "report.html"
    return folder


class Page(HTMLParser):
    """Tags, attributes that load something, the text of each cell; fails on tags that do not close."""

    VOID = ("meta", "img", "!doctype")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.loads, self.cells, self.text = [], [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "td" in self.open:
            self.cells[-1] += data


def comparisons(folder):
    found = compare(read_results(folder, "4f2a9c1e"), folder)
    return {(c.data, c.condition): c for c in found}


def test_paired_differences_decide_where_intervals_overlap(folder):
    found = comparisons(folder)
    clean = found["digits", "clean"]
    # 0.5 +- 0.253 and 0.6 +- 0.253 overlap, but every episode gains exactly 0.1: no tie
    assert clean.cells["frozen"].ci95 == pytest.approx(HALF) and clean.cells["frozen"].value == 0.5
    assert (clean.cells["adapted"].mark, clean.cells["frozen"].mark) == ("best", "") and clean.paired
    assert clean.difference == pytest.approx((0.1, 0.1, 0.1))
    # crops: differences .1, -.05, .1, -.05, mean .025, an interval around zero
    crops = found["crops", "clean"]
    assert crops.difference[0] == pytest.approx(0.025) and crops.difference[1] < 0 < crops.difference[2]
    assert (crops.cells["adapted"].mark, crops.cells["frozen"].mark) == ("best", "tie")


def test_without_records_the_intervals_decide(folder):
    for path in (folder / "records").iterdir():
        path.unlink()
    clean, attacked = comparisons(folder)["digits", "clean"], comparisons(folder)["crops", PGD]
    assert clean.cells["frozen"].mark == "tie" and clean.difference is None and not clean.paired
    # .1 +- 1.96 * .1155 / 2 = .1 +- .113 ends at .213; .45 +- .057 starts at .393: apart
    assert attacked.cells["frozen"].mark == ""
    assert "(unpaired)" in write_report(folder).read_text()


def test_a_row_that_says_so_is_not_paired_whatever_lies_there(folder):
    path = folder / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_rows(path, [{**row, "records": None} if row["data"] == "digits" else row for row in rows])
    seen = comparisons(folder)
    assert not seen["digits", "clean"].paired and seen["digits", "clean"].cells["frozen"].mark == "tie"
    assert seen["crops", PGD].paired


def test_records_that_do_not_give_the_number_are_not_used(folder):
    add(folder, "other", "frozen", FROZEN, FROZEN)
    add(folder, "other", "adapted", [v + 0.1 for v in FROZEN], FROZEN)
    path = folder / "records" / "other-5-way-1-shot-adapted.jsonl"
    path.write_text(path.read_text().replace("0.9", "0.95"))
    assert not comparisons(folder)["other", "clean"].paired and comparisons(folder)["other", PGD].paired


def test_records_pair_by_episode_not_by_line(folder):
    path = folder / "records" / "digits-5-way-1-shot-adapted.jsonl"
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, *reversed(lines)]) + "\n")
    assert comparisons(folder)["digits", "clean"].difference == pytest.approx((0.1, 0.1, 0.1))


def test_records_of_an_added_attack_and_of_examples(folder):
    stem = "digits-5-way-1-shot-adapted"
    (folder / "records" / f"{stem}.jsonl").rename(folder / "records" / f"{stem}-pgd0.jsonl")
    assert comparisons(folder)["digits", PGD].paired
    rows = []
    for model, right in (("frozen", [1, 0, 0, 0]), ("adapted", [1, 1, 1, 0])):
        rows.append(
            {
                "data": "set",
                "protocol": "all images",
                "condition": "clean",
                "metric": "accuracy",
                "model": model,
                "value": sum(right) / 4,
                "ci95": 0.4,
                "n": 4,
                "unit": "images",
                "seed": 1,
                "config_hash": "4f2a9c1e",
            }
        )
        lines = [{"id": f"{i}.png", "label": 3, "clean": 3 if ok else 5} for i, ok in enumerate(right)]
        write_rows(folder / "records" / f"set-all-images-{model}.jsonl", lines)
    write_rows(folder / "results.jsonl", rows, "a")
    # right in 1 and 3 of 4: + 0.5 on the same images
    assert comparisons(folder)["set", "clean"].difference[0] == pytest.approx(0.5)


def test_average_over_sets(folder):
    average = comparisons(folder)["average", "clean"]
    # (0.5 + 0.5) / 2 and (0.6 + 0.525) / 2; halves combine as sqrt(h^2 + h^2) / 2; n adds up
    assert average.cells["frozen"].value == pytest.approx(0.5)
    assert average.cells["adapted"].value == pytest.approx(0.5625)
    assert average.cells["frozen"].ci95 == pytest.approx(HALF / math.sqrt(2)) and average.cells["frozen"].n == 8
    # differences: .1 without spread, and .025 with std sqrt(4 * .075^2 / 3) = .0866: half 1.96 * .0866 / 2 / 2 = .04244
    assert average.difference == pytest.approx((0.0625, 0.0625 - 0.04244, 0.0625 + 0.04244), abs=1e-4)
    assert average.cells["frozen"].mark == ""


@pytest.mark.parametrize("records", [True, False])
def test_where_lower_is_better_the_lowest_is_best(folder, records):
    """By the same numbers, with and without pairs, on the sets and on their average."""
    rows = [
        {**json.loads(line), "metric": "depth RMSE in m"}
        for line in (folder / "results.jsonl").read_text().splitlines()
    ]
    if not records:
        shutil.rmtree(folder / "records")
    marks = {}
    for lower in (False, True):
        write_rows(folder / "results.jsonl", [{**row, "lower_is_better": lower, "ci95": 0.04} for row in rows])
        found = comparisons(folder)
        assert all(c.lower_is_better == lower for c in found.values())
        marks[lower] = {
            data: [found[data, "clean"].cells[model].mark for model in ("frozen", "adapted")]
            for data in ("digits", "average")
        }
    # 0.5 and 0.6 on digits, 0.5 and 0.5625 on average: beyond the widths; the average's unpaired reach is 2 * 0.04 / sqrt 2
    assert marks[False] == {"digits": ["", "best"], "average": ["", "best"]}
    assert marks[True] == {"digits": ["best", ""], "average": ["best", ""]}
    assert "depth RMSE in m, lower is better" in write_report(folder).read_text()


def test_lower_is_better_is_yes_or_no(folder):
    rows = [
        {**json.loads(line), "lower_is_better": "no"} for line in (folder / "results.jsonl").read_text().splitlines()
    ]
    write_rows(folder / "results.jsonl", rows)
    with pytest.raises(UserError, match="'lower_is_better' is no"):
        write_report(folder)


def test_no_average_of_one_set_or_of_unequal_models(tmp_path):
    add(tmp_path, "a", "frozen", FROZEN, FROZEN)
    assert list(comparisons(tmp_path)) == [("a", "clean"), ("a", PGD)]
    assert comparisons(tmp_path)["a", "clean"].cells["frozen"].mark == ""
    add(tmp_path, "b", "adapted", FROZEN, FROZEN)
    assert "average" not in {data for data, _ in comparisons(tmp_path)}


def test_markdown(reported):
    text = (reported / "report.md").read_text(encoding="utf8")
    assert "| digits | clean | 50.0 ± 25.3 | **60.0 ± 25.3 ★** | +10.0 \\[+10.0, +10.0\\] | 4 |" in text
    assert "| crops | clean | 50.0 ± 25.3 ≈ |" in text and "| Wall time | 7 min 12 s |" in text
    assert "(figures/training.png)" in text and "(figures/episode-digits-5-way-1-shot.png)" in text
    assert "lora, rank 8, 250 trainable of 1,000 parameters, 25.00 %" in text
    assert "<script" not in text and text.count("\n## Episodes\n") == 1
    # 4 classes of 2 are right when clean, class 0 alone when attacked
    assert "Of 10 query images in the panel file, 8 are right, 2 under PGD-10" in text
    assert "on average over 2 data sets (crops, digits): frozen 50.0 ± 17.9 % (n = 8 episodes)" in text
    assert "vismt config 4f2a9c1e, git revision 0123456789ab, evaluation seed 1" in text


def test_page_stands_alone(reported):
    html = (reported / "report.html").read_text(encoding="utf8")
    page = Page(html)
    assert page.tags.count("img") == 3 and all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "http" not in html.split("base64", 1)[0] and "url(" not in html and "@import" not in html
    assert "prefers-color-scheme: dark" in html
    for text in (
        "vismt run configs/quickstart.yaml seed=0",
        "0123456789ab",
        "4f2a9c1e",
        "a processor, 2 cores",
        "0 (run), 1 (evaluation)",
        "7 min 12 s",
        "torch 2.13.0",
        "How to cite these numbers",
    ):
        assert text in page.text
    # from the files it comes as text, not as tags
    assert "Digits <script>alert(1)</script> & crops" in page.text and "onerror=alert(2)" in page.text
    assert page.cells[:6] == ["digits", "clean", "50.0 ± 25.3", "60.0 ± 25.3 ★", "+10.0 [+10.0, +10.0]", "4"]


def test_names_are_escaped_everywhere(folder):
    add(folder, "<b>|x", "frozen", FROZEN, FROZEN, protocol="`5-way` <i>")
    page = Page(write_report(folder).read_text(encoding="utf8"))
    assert not {"b", "i"} & set(page.tags) and "<b>|x" in page.cells
    assert "| &lt;b&gt;\\|x | clean |" in (folder / "report.md").read_text()


def test_only_what_is_there(folder):
    for name in ("metrics.jsonl", "config.resolved.yaml", "panels/digits-5-way-1-shot.npz"):
        (folder / name).unlink()
    about = {"config_hash": "4f2a9c1e"}
    (folder / "run.json").write_text(json.dumps(about))
    page = Page(write_report(folder).read_text())
    assert "Training" not in page.text and "Episodes" not in page.text and "Configuration" not in page.text
    assert page.tags.count("img") == 1 and "run-4f2a" in page.text


def test_it_writes_nothing_but_its_own_files_and_the_same_twice(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    first = write_report(folder).read_bytes()
    new = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path not in before}
    assert new == {
        "report.md",
        "report.html",
        "figures/training.png",
        "figures/domains.png",
        "figures/episode-digits-5-way-1-shot.png",
    }
    assert all(path.read_bytes() == data for path, data in before.items())
    assert write_report(folder).read_bytes() == first


def test_a_width_of_zero_is_explained(folder, reported):
    assert "width of 0.0" not in (reported / "report.md").read_text()
    add(folder, "third", "frozen", [0.0, 0.0], [0.0, 0.0])
    write_report(folder)
    assert "A width of 0.0 says" in (folder / "report.md").read_text()


def test_two_seeds_are_two_tables(folder):
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    write_rows(folder / "results.jsonl", [{**row, "seed": 2} for row in rows], "a")
    text = write_report(folder) and (folder / "report.md").read_text()
    assert "### 5-way 1-shot, seed 1" in text and "### 5-way 1-shot, seed 2" in text and "evaluation seed 1, 2" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": None}, "no 'n'"),
        ({"ci95": None}, "no 'ci95'"),
        ({"config_hash": ""}, "no 'config_hash'"),
        ({"config_hash": None}, "no 'config_hash'"),
        ({"value": math.nan}, "'value' is nan"),
        ({"n": 0}, "n = 0"),
        ({"n": 2.5}, "n = 2.5"),
        ({"ci95": -0.1}, "ci95 = -0.1"),
        ({"n": True}, "'n' is True"),
        ({"unit": 3}, "no 'unit'"),
        ({"config_hash": "beef"}, "config hash beef is not this run's 4f2a9c1e"),
        ({}, "same thing as an earlier row"),
    ],
)
def test_incomplete_numbers_are_refused(folder, change, message):
    row = json.loads((folder / "results.jsonl").read_text().splitlines()[0])
    bad = {**row, **change, **({"data": "third"} if change else {})}
    write_rows(folder / "results.jsonl", [{k: v for k, v in bad.items() if v is not None}], "a")
    with pytest.raises(UserError) as caught:
        write_report(folder)
    text = str(caught.value)
    assert message in text and "row 9" in text and bad["data"] in text and "\n" not in text
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "results.jsonl").unlink(), "vismt evaluate"),
        (lambda f: (f / "run.json").unlink(), "vismt run CONFIG"),
        (lambda f: (f / "run.json").write_text("{"), "is no JSON"),
        (lambda f: (f / "run.json").write_text("{}"), "no config_hash"),
        (lambda f: (f / "panels" / "x.npz").write_bytes(b"PK\x03\x04 cut"), "x.npz"),
        (lambda f: np.savez(f / "panels" / "x.npz", support=np.array([{}], dtype=object)), "x.npz"),
        (lambda f: np.savez(f / "panels" / "x.npz", support=np.zeros(3)), "is no panel"),
    ],
)
def test_broken_files(folder, break_it, message):
    break_it(folder)
    with pytest.raises(UserError, match=message) as caught:
        write_report(folder)
    assert "\n" not in str(caught.value)
