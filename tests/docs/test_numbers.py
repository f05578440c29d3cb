"""Numbers in README.md, docs/results and headers of configurations are those of committed rows, or are marked as typed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.pages import FENCE, README, ROOT, name, read

from scripts import committed, figures, tables, user_gradients
from scripts.study_rows import studies

RESULTS = [
    page for page in sorted((ROOT / "docs/results").glob("*.md")) if page.stem != "paper_scale"
]  # published ones
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PAGES = [README, *(ROOT / "docs").rglob("*.md")]
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")
NUMBER = r"[+−-]?\d[\d,]*(?:\.\d+)?"
INTERVAL = re.compile(rf"{NUMBER} ± \d+(?:\.\d+)?|{NUMBER} \[{NUMBER}, {NUMBER}\]")
NUMERIC = re.compile(r"[^a-zA-Z]*\d[^a-zA-Z]*")
# A table, or a block of printed lines, with what follows it.
TABLE = re.compile(r"^((?:\|.*\n)+|```\n(?:.*\n)*?```\n)(?:\n(.*))?", re.M)
# Tables and printed blocks whose rows were not kept, and intervals in the text that are in no table. Both may only become fewer.
TYPED = {
    "docs/results/ilora_lastfm.md": 1,
}
LOOSE = {"docs/guides/compare.md": 1}


def plain(text: str) -> str:
    """Return an interval without signs; a text that has one has to be that of the row."""
    return re.sub("[+−-]", "", text)


def unmarked(page: Path) -> str:
    """Return a page without the tables that are made from rows, and without commands."""
    text = user_gradients.MARKED.sub("", tables.MARKED.sub("", read(page)))
    return FENCE.sub(lambda block: "" if block["language"] else block[0], text)


def numeric_tables(text: str) -> list[tuple[str, str]]:
    """Return tables and printed blocks with numbers, each with the line below it."""
    found = []
    for table, below in TABLE.findall(text):
        cells = [cell for line in table.splitlines() for cell in line.split("|")]
        if any(map(NUMERIC.fullmatch, cells)) or ("```" in table and INTERVAL.search(table)):
            found.append((table, below))
    return found


def test_tables_are_those_of_the_committed_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().out
    assert tables.specs().keys() <= {
        found[2] for page in tables.pages() for found in tables.MARKED.finditer(read(page))
    }


def test_pictures_are_those_of_the_committed_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert figures.main(["--check"]) == 0, capsys.readouterr().out
    drawn = {path.stem for path in (ROOT / "docs").glob("*.svg")}
    links = (Path(link) for page in PAGES for link in PICTURE.findall(read(page)))
    shown = {link.stem for link in links if link.parent.name != "gallery"}  # those are of the quick starts
    assert not shown - drawn


def test_pages_and_rows_of_weights_from_a_file_of_four_bits_say_so() -> None:
    for study in studies():
        settings = committed.study(study).about.settings
        if (settings.get("model") or {}).get("name") == "smollm2-135m-instruct":
            assert "Q4_1" in committed.study(study).about.title, study
    for path in [*RESULTS, *(ROOT / "docs/methods").glob("*.md")]:
        measured = read(path).replace("HuggingFaceTB/SmolLM2-135M", "")
        assert "SmolLM2" not in measured or "Q4_1" in measured, path


def test_a_part_of_a_public_set_has_not_the_name_of_the_whole() -> None:
    """In rows, and among the sets of the configurations whose numbers they are."""
    whole = {"cifar10", "cifar100", "flowers102", "gtsrb", "omniglot", "mnist", "fashion_mnist"}
    for study in studies():
        of = committed.study(study)
        named = set(re.findall(r"[\w-]+", f"{of.about.settings}"))
        named |= {row.data.partition(":")[0].removesuffix("-test") for row in of.rows}
        assert not named & whole, study


def test_a_table_without_rows_is_marked() -> None:
    typed = {}
    for page in RESULTS:
        found = numeric_tables(unmarked(page))
        assert all("Typed, not checked" in below for _, below in found), found
        typed |= {name(page): len(found)} if found else {}
    assert typed == TYPED


def test_an_interval_in_a_text_is_that_of_a_table_or_of_a_row() -> None:
    known = {text for study in studies() for row in committed.study(study).rows for text in committed.texts(row)}
    for page in RESULTS:
        known |= {found for table in TABLE.findall(read(page)) for found in INTERVAL.findall(table[0])}
    known |= set(map(plain, known))
    loose = {}
    for page in [*(page for page in PAGES if page.stem != "paper_scale"), *CONFIGS]:
        text = unmarked(page)
        if page in CONFIGS:
            text = "\n".join(line[1:] for line in text.splitlines() if line.startswith("#"))
        elif page in RESULTS:
            text = TABLE.sub("", text)
        missing = [found for found in INTERVAL.findall(" ".join(text.split())) if found not in known]
        loose |= {name(page): len(missing)} if missing else {}
    assert loose == LOOSE
