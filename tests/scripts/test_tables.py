"""Tables between markers are made from committed rows, and a stale one is found."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import stdev

import pytest
import yaml
from helpers.run_folder import make_folder

from scripts import committed, tables
from scripts.study_rows import ROWS, StudyRow, StudyRows, read_study, study_of, write_study

SPEC = {
    "digits": {
        "heads": ["Condition", "Arm"],
        "where": {"study": "study", "data": "digits"},
        "columns": {"accuracy": {}, "n": {"show": "count"}},
        "rows": {
            "clean | frozen": {"arm": "frozen", "condition": "clean", "accuracy": {"label": "about"}},
            "clean | adapted − frozen": {
                "arm": "adapted",
                "minus": "frozen",
                "condition": "clean",
                "n": {"show": "value"},
            },
        },
    }
}
PAGE = "# Page\n\n<!-- rows: digits -->\nold\n<!-- end -->\n\nMore.\n"
MADE = """# Page

<!-- rows: digits -->

| Condition | Arm | accuracy | n |
|---|---|---|---|
| clean | frozen | about {frozen} | 4 episodes, 1 |
| clean | adapted − frozen | {difference} | +10.0 |

*Intervals: 95 % over new examples. n = 4 episodes, seeds: 1. Config 4f2a9c1e, a processor, 2 cores, 7.2 wall minutes, \
2026-01-05.*
<!-- end -->

More.
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a checkout with a page, a configuration and the rows of one study."""
    for folder in ("docs", "configs", ROWS):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(tables, "CHECKOUT", tmp_path)
    monkeypatch.setattr(committed, "CHECKOUT", tmp_path)
    monkeypatch.setattr(tables, "SPECS", tmp_path / ROWS / "tables.yaml")
    monkeypatch.setattr(committed, "studies", lambda: {path.stem: path for path in (tmp_path / ROWS).glob("*.jsonl")})
    (tmp_path / ROWS / "tables.yaml").write_text(yaml.safe_dump(SPEC, sort_keys=False))
    (tmp_path / "README.md").write_text("No table.\n")
    (tmp_path / "docs" / "page.md").write_text(PAGE)
    forget()
    assert tables.main(["add", str(make_folder(tmp_path, seeds=[0, 1])), "study"]) == 0
    yield tmp_path
    forget()


def forget() -> None:
    tables.specs.cache_clear()
    committed.study.cache_clear()


def respecified(checkout: Path, change: Callable[[dict], object]) -> int:
    """Change the specification of the table; return the exit code of writing it."""
    spec = yaml.safe_load(yaml.safe_dump(SPEC))
    change(spec["digits"])
    (checkout / ROWS / "tables.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    forget()
    return tables.main([])


def test_a_stale_table_is_found_and_written(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert tables.main(["--check"]) == 1
    assert (
        capsys.readouterr().out.startswith("stale   docs/page.md:3;")
        and (checkout / "docs/page.md").read_text() == PAGE
    )
    assert tables.main([]) == 0
    rows = {
        (row.arm, row.minus): row
        for row in study_of(checkout / "run-4f2a").rows
        if row.data == "digits" and row.kind == "clean"
    }
    texts = {
        "frozen": committed.texts(rows["frozen", ""])[0],
        "difference": committed.texts(rows["adapted", "frozen"])[0],
    }
    assert (checkout / "docs/page.md").read_text() == MADE.format(**texts) and texts["frozen"].startswith("50.0 ± ")
    assert tables.main(["--check"]) == 0
    path = checkout / ROWS / "study.jsonl"
    study = read_study(path)
    write_study(path, type(study)(study.about, [StudyRow(**{**vars(row), "n": row.n + 1}) for row in study.rows]))
    forget()
    assert tables.main(["--check"]) == 1


def test_differences_on_single_sets_are_kept_if_a_table_shows_them(checkout: Path) -> None:
    study = read_study(checkout / ROWS / "study.jsonl")
    assert {(row.data, row.arm) for row in study.rows if row.minus} == {("average", "adapted"), ("digits", "adapted")}
    run = study_of(checkout / "run-4f2a")
    kept = tables.without_sets(run, [{"arm": "adapted", "minus": "clean", "data": "digits"}])
    assert {row.data for row in run.rows if row.minus} == {"average", "digits", "crops"}
    assert {row.data for row in kept.rows if row.minus} == {"average"}
    assert [row for row in kept.rows if not row.minus] == [row for row in run.rows if not row.minus]
    alone = StudyRows(run.about, [row for row in run.rows if row.data == "digits"])
    assert tables.without_sets(alone, []) == alone


def test_a_header_has_aligned_lines(checkout: Path) -> None:
    config = checkout / "configs" / "a.yaml"
    config.write_text("# About\n# <!-- rows: digits -->\n# <!-- end -->\ntitle: a\n")
    assert tables.main([]) == 0
    lines = config.read_text().splitlines()
    assert all(line.startswith("#") for line in lines[:-1]) and lines[-1] == "title: a"
    assert lines[2].split() == ["#", "Condition", "Arm", "accuracy", "n"] and lines[3].startswith("#   clean ")
    assert tables.main(["--check"]) == 0


def test_the_ends_of_an_interval_that_is_not_symmetric_are_shown(checkout: Path) -> None:
    path = checkout / ROWS / "study.jsonl"
    study = read_study(path)
    write_study(path, type(study)(study.about, [StudyRow(**{**vars(row), "low": row.value}) for row in study.rows]))
    forget()
    assert tables.main([]) == 0 and "50.0 [50.0, " in (checkout / "docs/page.md").read_text().replace("+", "")


def test_seeds_are_shown_one_by_one(checkout: Path) -> None:
    path = checkout / ROWS / "study.jsonl"
    study = read_study(path)
    row = next(row for row in study.rows if row.arm == "frozen" and row.data == "digits" and row.kind == "clean")
    rows = [replace(one, by_seed=(0.48, 0.52)) if one is row else one for one in study.rows]
    write_study(path, type(study)(study.about, rows))
    assert respecified(checkout, lambda spec: spec["rows"]["clean | frozen"].update(n={"show": "seeds"})) == 0
    assert "| 48.0, 52.0 |" in (checkout / "docs/page.md").read_text()


def test_an_interval_that_covers_less_than_others_is_marked(checkout: Path) -> None:
    path = checkout / ROWS / "study.jsonl"
    study = read_study(path)

    def written(*weak: str) -> str:
        kinds = ["sampler" if f"{row.arm} {row.minus}" in weak else "images" for row in study.rows]
        rows = [replace(row, interval=kind) for row, kind in zip(study.rows, kinds, strict=True)]
        write_study(path, type(study)(study.about, rows))
        forget()
        assert tables.main([]) == 0
        return (checkout / "docs/page.md").read_text()

    one = written("frozen ")
    assert one.count("‡ |") == 1 and re.search(r"\| clean \| frozen \| about 50.0 ± \S+ ‡ \| 4 episodes, 1 \|", one)
    assert "‡ 95 % over new episodes of the same images; over new images of these classes." in one
    grouped = [replace(row, parts=3, grouped_by="signs") if row.minus else row for row in study.rows]
    write_study(path, type(study)(study.about, grouped))
    forget()
    assert tables.main([]) == 0 and "(units: examples, 3 signs)." in (checkout / "docs/page.md").read_text()
    both = written("frozen ", "adapted frozen")
    assert "‡" not in both and "*Intervals: 95 % over new episodes of the same images." in both


@pytest.mark.parametrize("change", [{"interval": ""}, {"interval": "images"}])
def test_add_refuses_rows_whose_intervals_lack_their_kind_or_the_seeds(
    checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    run, path = checkout / "run-4f2a", checkout / ROWS / "study.jsonl"
    study, before = read_study(path), path.read_bytes()
    rows = [replace(row, **change) for row in study.rows]
    trained = [replace(row, by_seed=() if row.minus else (row.value, row.value)) for row in rows]
    made = type(study)(study.about, trained if change["interval"] else rows)
    monkeypatch.setattr(tables, "study_of", lambda *_: made)
    assert tables.main(["add", str(run), "study"]) == 2 and path.read_bytes() == before
    error = capsys.readouterr().err
    assert f"`vismt evaluate {run}` writes rows" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda spec: spec["where"].update(study="stuby"),
            "no rows of a study 'stuby' in docs/results/rows. Near: 'study'",
        ),
        (lambda spec: spec["where"].update(arn="a"), "arn is not what a cell can have"),
        (lambda spec: spec["columns"]["n"].update(show="all"), "show or study is not what a cell can have"),
        (
            lambda spec: spec["columns"]["n"].update(show="domains"),
            "domains need data average and 5 sets or more, not 2",
        ),
        (lambda spec: spec["where"].pop("data"), "study 'study': 2 rows have"),
        (lambda spec: spec["heads"].pop(), "has other parts than `heads`"),
        (
            lambda spec: spec["rows"]["clean | frozen"].update(arm="frosen"),
            "'clean | frozen', 'accuracy': study 'study': 0 rows have",
        ),
    ],
)
def test_a_cell_that_is_not_one_number_is_one_line(checkout: Path, capsys, change: Callable, words: str) -> None:
    assert respecified(checkout, change) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("page", "words"),
    [
        (PAGE.replace("digits", "digit"), "has no table 'digit'. Near: 'digits'"),
        (PAGE.replace("<!-- end -->", ""), "has no <!-- end -->"),
    ],
)
def test_a_wrong_marker_is_one_line(checkout: Path, capsys, page: str, words: str) -> None:
    (checkout / "docs/page.md").write_text(page)
    assert tables.main(["--check"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_add_takes_a_finished_run(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["add", str(checkout / "none"), "study"]) == 2
    assert tables.main(["add", str(checkout)]) == 2
    error = capsys.readouterr().err
    assert "its evaluation has not ended" in error and "give add RUN STUDY" in error
    assert ("adapted", "frozen") in read_study(checkout / ROWS / "study.jsonl").about.differences


def test_the_interval_over_domains_is_that_of_the_sets_as_a_sample() -> None:
    clean = {"study": "amt_small", "metric": "accuracy", "condition": "clean", "data": "average", "arm": "clean"}
    of, images = tables.found(clean, "here")
    _, domains = tables.found({**clean, "show": "domains"}, "here")
    values = [r.value for r in of.rows if r.key == replace(images, data=r.data).key and r.data != "average"]
    half = 2.776445 * stdev(values) / 5**0.5
    assert len(values) == 5 and (domains.value, domains.interval) == (images.value, "domains")
    assert (domains.low, domains.high) == pytest.approx((images.value - half, images.value + half))
