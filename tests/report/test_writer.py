"""The report of a hand-made run folder: its texts, refusals, and a page that stands alone."""

import json
from html.parser import HTMLParser

import pytest
from helpers.golden_reports import check_report
from helpers.results import HASH, PGD, add, corruption, measure, write_lines
from helpers.run_folder import FROZEN, add_arm, make_folder

from vismt.base.errors import UserError
from vismt.report.comparison import compare_results
from vismt.report.conclusion import conclude
from vismt.report.plotting import figure_formats
from vismt.report.results import ValuesByExample, read_results
from vismt.report.score_sections import score_sections
from vismt.report.tables import Picture, Section, Table
from vismt.report.trainings import training_sections
from vismt.report.writer import result_sections, run_heading, write_report
from vismt.storage.files import sealed
from vismt.uncertainty.intervals import CLEAN, Condition, Score

LOGGED = {"loss": "Training loss", "accuracy": "Training accuracy (%)"}
PICTURES = {"figures/training.svg", "figures/scores-few-shot-accuracy.svg"}


def make_trained(parent):
    """The run folder with the log of the arm's training."""
    folder = make_folder(parent)
    arm = folder / "arms" / "adapted"
    steps = [
        {"step": s, "loss": 2 / s, "accuracy": None if s == 3 else 1 - 1 / s, "lr": 1e-3, "grad_norm": 1.0}
        for s in range(1, 30)
    ]
    write_lines(arm / "lr-0.1-seed-0" / "metrics.jsonl", steps)
    (arm / "chosen.json").write_text(sealed({"lr": 0.1, "validation": {}}))
    return folder


def written(folder, *more, formats=("html", "md")):
    """The report with the shared sections, as a job writes it; more: sections of the job."""
    results, values = read_results(folder / "results.jsonl", HASH), ValuesByExample(folder)
    comparisons = compare_results(results, values)
    with figure_formats(formats):
        sections = [
            *result_sections(comparisons),
            *score_sections(folder, results, comparisons, values, ["adapted"]),
            *training_sections(folder, ["adapted"], 0, LOGGED),
            *more,
        ]
    conclusion = conclude(comparisons, {"frozen": 0, "adapted": 250})
    return write_report(folder, run_heading(folder), results, comparisons, conclusion, sections, formats)[-1]


@pytest.fixture
def folder(tmp_path):
    return make_trained(tmp_path)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """With its report, for tests that only read."""
    folder = make_trained(tmp_path_factory.mktemp("report"))
    assert written(folder) == folder / "report.html"
    return folder


class Page(HTMLParser):
    """Tags, attributes that load something, the text of each cell; fails on tags that do not close."""

    VOID = ("meta", "img", "!doctype", "wbr")

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


def test_the_report_of_two_sets_and_two_arms_is_the_kept_one(reported):
    """The score of `adapted` is better by exactly 10 points on digits: its difference has no width, and shows nothing."""
    check_report(reported, "two_arms")


def test_the_report_of_many_kinds_of_rows_is_the_kept_one(folder):
    """Rows by seed, a task of another scale, corruptions, and a set of equal values."""
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(sealed({**about, "seeds": [0, 1]}))
    for seed in (0, 1):
        for data, step in (("digits", 5), ("crops", 10)):
            score = Score("few-shot", data, "5-way 1-shot", measure([0.5 + seed / step] * 4), CLEAN, "episodes")
            add(folder, score, "adapted", seed=seed)
    depth = Score("depth", "rooms", "test", measure([1.0, 2.0], "RMSE in m", scale="number", better="lower"), CLEAN)
    add(folder, depth, "adapted")
    for severity in (1, 2, 3, 5):
        fog = Score("few-shot", "digits", "5-way 1-shot", measure(FROZEN), corruption("fog", severity), "episodes")
        add(folder, fog, "frozen")
    add_arm(folder, "third", "frozen", [0.5, 0.5], [0.5, 0.5], protocol="3-way 1-shot")
    written(folder)
    check_report(folder, "many_kinds")


def test_page_stands_alone(reported):
    html = (reported / "report.html").read_text(encoding="utf8")
    page = Page(html)
    assert page.tags.count("img") == 2
    assert all(load.startswith(("data:image/svg+xml;base64,", "#")) for load in page.loads)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "http" not in html.split("base64", 1)[0] and "url(" not in html and "@import" not in html
    assert "prefers-color-scheme: dark" in html
    for text in (
        "vismt run configs/quickstart.yaml seed=0",
        "0123456789ab",
        "4f2a9c1e",
        "a processor, 2 cores",
        "0 (training), 1 (evaluation)",
        "7 min 12 s",
        "torch 2.13.0",
        "How to cite these numbers",
    ):
        assert text in page.text
    # from the files it comes as text, not as tags
    assert "Digits <script>alert(1)</script> & crops" in page.text and "onerror=alert(2)" in page.text
    assert page.cells[:5] == ["digits", "clean", "50.0 ± 41.1 ≈", "60.0 [18.9, 100.0] ★", "4"]


def test_names_are_escaped_everywhere(folder):
    add_arm(folder, "<b>|x", "frozen", FROZEN, FROZEN, protocol="`5-way` <i>")
    page = Page(written(folder).read_text(encoding="utf8"))
    assert not {"b", "i"} & set(page.tags) and "accuracy in %, <b>|x, n = 4 episodes" in page.text
    assert ", &lt;b&gt;\\|x, n =" in (folder / "report.md").read_text()


def test_only_what_is_there(folder):
    for name in ("arms/adapted/lr-0.1-seed-0/metrics.jsonl", "config.resolved.yaml"):
        (folder / name).unlink()
    (folder / "run.json").write_text(sealed({"config_hash": HASH}))
    page = Page(written(folder, Section("Episodes")).read_text())
    assert "Training" not in page.text and "Episodes" not in page.text and "Configuration" not in page.text
    assert page.tags.count("img") == 1 and "run-4f2a" in page.text


def test_sections_of_a_job_follow_the_shared_ones(folder):
    table = Table("Chosen <settings>", ["Arm", "value"], [["a|b", "1"]], {(0, 1)}, texts=1)
    picture = folder / "figures" / "scores-few-shot-accuracy.svg"
    pictures = [Picture(picture, title, "Of two seeds.") for title in ("First", "Second")]
    page = Page(written(folder, Section("Images", [(table, "A note.")], pictures, folded=True)).read_text())
    assert page.text.index("Training") < page.text.index("Images") < page.text.index("How to cite")
    assert page.tags.count("img") == 4 and "A note." in page.text and "Chosen <settings>" in page.text
    text = (folder / "report.md").read_text()
    assert "\n## Images\n" in text and "| a\\|b | **1** |" in text
    assert "![Second](figures/scores-few-shot-accuracy.svg)\n\nOf two seeds." in text
    html = (folder / "report.html").read_text()
    # of folded pictures the first is open
    assert html.count("<details open><summary>First</summary>") == 1 and "<details><summary>Second</summary>" in html


def test_it_writes_nothing_but_its_own_files_and_the_same_twice(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    first = written(folder).read_bytes()
    new = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path not in before}
    assert new == {"report.md", "report.html", *PICTURES}
    assert all(path.read_bytes() == data for path, data in before.items())
    assert written(folder).read_bytes() == first


def test_models_have_a_line_and_no_name_of_a_condition(tmp_path):
    folder = tmp_path / "run"
    for arm, shift in (("clean", 0.0), ("robust", 0.1)):
        values = [0.4 + shift + 0.01 * value * (1 + shift) for value in FROZEN]
        add_arm(folder, "digits", arm, values, values)
    (folder / "run.json").write_text(sealed({"config_hash": HASH}))
    results, values = read_results(folder / "results.jsonl"), ValuesByExample(folder)
    comparisons = compare_results(results, values)
    assert list(comparisons[0].cells) == ["clean model", "robust"] and comparisons[0].base == "clean model"
    conclusion = conclude(comparisons, {"clean model": 10, "robust": 10})
    assert (
        conclusion.model == "robust" and "robust is shown to be better than clean model in accuracy" in conclusion.text
    )
    sections = [
        Section("Models", pairs=[("clean model", "amt of rank 8")]),
        *result_sections(comparisons),
        *score_sections(folder, results, comparisons, values, ["clean", "robust"]),
    ]
    write_report(folder, run_heading(folder), results, comparisons, conclusion, sections)
    text = (folder / "report.md").read_text()
    assert "| clean model | amt of rank 8 |" in text and conclusion.text.replace("[", "\\[").replace("]", "\\]") in text
    assert "Difference to clean model" in text and "| Condition | clean model | robust |" in text
    page = Page((folder / "report.html").read_text())
    headings = [title for title in ("Models", "Results", "Differences", "Provenance") if title in page.text]
    assert sorted(headings, key=page.text.rindex) == ["Models", "Results", "Differences", "Provenance"]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "run.json").unlink(), "vismt run CONFIG"),
        (lambda f: (f / "run.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "run.json").write_text(sealed({})), "no config_hash"),
        (lambda f: (f / "run.json").write_text("{}"), "changed or damaged"),
        (lambda f: (f / "run.json").write_text("[]"), "changed or damaged"),
    ],
)
def test_broken_files(folder, break_it, message):
    break_it(folder)
    with pytest.raises(UserError, match=message) as caught:
        written(folder)
    assert "\n" not in str(caught.value) and not (folder / "report.html").exists()


def test_a_broken_row_stops_the_report(folder):
    write_lines(folder / "results.jsonl", [{"data": "third"}], "a")
    with pytest.raises(UserError, match="row 9 third: key 'task' is missing"):
        written(folder)
    assert not (folder / "report.html").exists()


def test_key_figures_come_first(folder):
    """The average of the first task clean and under its strongest attack, then the other task."""
    for arm in ("frozen", "adapted"):
        for data in ("digits", "crops"):
            weak = Score("few-shot", data, "5-way 1-shot", measure([0.9] * 4), Condition("weak", "attack", "weak", 0.1))
            add(folder, weak, arm)
        depth = Score("depth", "rooms", "test", measure([1.0, 2.0], "RMSE in m", scale="number", better="lower"), CLEAN)
        add(folder, depth, arm)
    page = written(folder).read_text()
    keys = page[: page.index("<h2")].split('<div class="headline">')[1:]
    assert len(keys) == 3
    assert PGD.label in keys[1] and "weak" not in keys[1] and "RMSE in m, depth, rooms" in keys[2]
    assert "<strong>50.0 ± 22.3 %</strong>frozen" in keys[0] and "<strong>56.2 ± 21.3 %</strong>adapted" in keys[0]
    assert "average, 5-way 1-shot, clean; n = 8 episodes; 95 % over new examples" in keys[0]
    text = (folder / "report.md").read_text()
    assert text.index("adapted **56.2 ± 21.3 %**") < text.index("## Results") < text.index("| Command |")


def test_of_many_arms_the_key_figure_has_the_first_and_the_best(tmp_path):
    folder = make_trained(tmp_path)
    for number in range(5):
        add_arm(folder, "digits", f"arm{number}", [0.5 + 0.1 * number] * 4, FROZEN)
    page = written(folder).read_text()
    key = page[: page.index("<dl>")]  # digits and crops, which have other models, clean and attacked
    assert key.count("<strong>") == 8 and "frozen</div>" in key and "arm4</div>" in key and "arm3</div>" not in key


def test_the_answer_as_data(folder):
    written(folder, formats=["json"])
    answer = json.loads((folder / "report.json").read_text())
    assert [finding["condition"] for finding in answer["answers"][0]["findings"]] == ["clean", PGD.label]
    assert answer["answers"][0]["take"] == "adapted" and answer["differences"] == 2
