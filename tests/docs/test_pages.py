"""Links, paths and names of the pages, the size of README.md, the headers of configurations, and the built site."""

from __future__ import annotations

import ast
import inspect
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import pages
from helpers.pages import PAGES, README, ROOT

import scripts.drawings
import scripts.pages
from vismt.config.sections import config_hash
from vismt.jobs import load_config
from vismt.lowrank.model.inject import COMMON
from vismt.methods import METHODS

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OURS = re.compile(r"""(?:`|<!-- file: )((?:configs|docs|examples|scripts|tests|vismt)/[\w./-]+\.\w+)[`"]""")
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
HEADER_LINES = 18
EXTERNAL = re.compile(r"""<(?:script|img|iframe)[^>]*\ssrc=["']?https?:|<link[^>]*\shref=["']?https?:""")


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_relative_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    for link in LINK.findall(pages.prose(page)):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        file = page if not target else page.parent / target
        assert file.exists(), f"{pages.name(page)}: {link}"
        assert not anchor or anchor in pages.anchors(file), f"{pages.name(page)}: no heading for {link}"


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    missing = [path for path in OURS.findall(pages.read(page)) if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", [page for page in PAGES if ROOT / "docs" in page.parents], ids=pages.name)
def test_a_page_of_the_site_links_to_no_file_outside(page: Path) -> None:
    links = [link.partition("#")[0] for link in LINK.findall(pages.prose(page)) if not re.match(r"[a-z]+:|#", link)]
    assert all(ROOT / "docs" in (page.parent / link).resolve().parents for link in links)


def test_the_readme_is_short() -> None:
    text = pages.read(README)
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1200


INDEX = ROOT / "docs/methods/index.md"


def row_of(method: str) -> re.Match[str]:
    """Return the row of a method in the table of all; its first group is the page."""
    row = re.search(rf"^\| \[`{method}`\]\((\w+\.md)\) .*$", pages.read(INDEX), re.M)
    assert row, f"docs/methods/index.md has no row for {method}"
    return row


def test_every_method_has_a_row_and_its_page_has_all_options() -> None:
    for method in METHODS.values():
        row = row_of(method.name)
        published = "](http" in row[0]
        assert not published or f"[`{method.name}`](docs/methods/{row[1]})" in pages.read(README), method.name
        page = pages.read(INDEX.parent / row[1])
        absent = [option for option in method.options if option not in COMMON and f"`{option}`" not in page]
        assert not absent, f"{row[1]} does not describe {absent}"
        assert row[0].split("|")[-2].strip().startswith("no") == (not method.exports)


OPTION = re.compile(r"^\| `(\w+)` \| ([^|]+) \|", re.M)


def value_of(cell: str) -> Any:
    """Return the default that a table shows."""
    text = cell.strip(" `")
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def test_the_defaults_of_options_are_those_of_the_code() -> None:
    checked = 0
    for method in METHODS.values():
        page = INDEX.parent / row_of(method.name)[1]
        parameters = inspect.signature(method.adapt).parameters
        for option, cell in OPTION.findall(pages.prose(page)):
            if option in parameters:
                assert value_of(cell) == parameters[option].default, f"{pages.name(page)}: {option}"
                checked += 1
    assert checked > 25


def test_common_options_are_described() -> None:
    page = pages.read(ROOT / "docs/methods/index.md")
    assert not [option for option in COMMON if f"`{option}`" not in page]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_header_has_the_command_and_the_page_of_its_results(path: Path) -> None:
    header = [line for line in path.read_text(encoding="utf8").splitlines() if line.startswith("#")]
    text = "\n".join(header)
    name = path.relative_to(ROOT / "configs").with_suffix("").as_posix()
    assert re.search(rf"vismt run (configs/{name}\.yaml|{name})(\s|$)", text, re.M) and len(header) <= HEADER_LINES
    assert all((ROOT / page).exists() for page in re.findall(r"docs/[\w/]+\.md", text))
    for digest in re.findall(r"Config ([0-9a-f]{10})", text):
        assert digest == config_hash(load_config(path, [])), "the numbers are of another configuration"


@pytest.mark.parametrize(
    "page",
    sorted({*(ROOT / "docs/results").glob("*.md")} - {ROOT / "docs/results/index.md"}),
    ids=lambda path: path.stem,
)
def test_a_page_of_results_and_its_configuration_name_each_other(page: Path) -> None:
    named = [path for path in CONFIGS if path.relative_to(ROOT).as_posix() in pages.read(page)]
    assert any(pages.name(page) in path.read_text(encoding="utf8") for path in named)


FITTING = [page for page in PAGES[3:] if "results" not in page.parts]


@pytest.mark.parametrize("page", FITTING, ids=pages.name)
def test_lines_of_code_fit_a_screen_of_1280_pixels(page: Path) -> None:
    long = [
        line
        for block in pages.FENCE.finditer(pages.read(page))
        for line in block["code"].split("\n")
        if len(line) > 118
    ]
    assert not long


def test_the_first_level_of_the_navigation_is_short() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf8").partition("\nnav:\n")[2]
    assert 1 < len(re.findall(r"^  - ", nav, re.M)) <= 8


def test_generated_parts_are_up_to_date() -> None:
    """`python -m scripts.pages` writes them."""
    assert [path.name for path, _ in scripts.pages.stale()] == []


def test_drawings_are_up_to_date() -> None:
    """`python -m scripts.drawings` draws them, and a place that they name exists."""
    assert scripts.drawings.main(["--check"]) == 0
    places = [place for steps in scripts.drawings.WALKS.values() for _, where in steps for place in where.split(", ")]
    assert [place for place in places if place != "yours" and not (ROOT / "vismt" / place).exists()] == []


def test_the_page_of_the_index_has_links_that_work_elsewhere() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **_: None)
        index_page = runpy.run_path(str(ROOT / "setup.py"))["index_page"]
    readme = pages.read(README)
    assert not re.search(r"\]\((?!https?:|#)", index_page(readme, "")) and "![" not in index_page(readme, "")
    linked = index_page(readme, "https://host/owner/vismt")
    assert "](https://host/owner/vismt/blob/main/docs/install.md)" in linked
    assert "](https://host/owner/vismt/raw/main/docs/gallery/own_images.png)" in linked
    assert not re.search(r"\]\((?!https?:|#)", linked) and "](https://arxiv.org" in linked


@pytest.mark.slow
def test_the_site_builds_without_a_network(tmp_path) -> None:
    pytest.importorskip("material")
    nowhere = "http://127.0.0.1:9"
    environment = {**os.environ, **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), nowhere)}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    for page in PAGES[3:]:
        html = (tmp_path / page.relative_to(ROOT / "docs")).with_suffix(".html").read_text(encoding="utf8")
        assert not EXTERNAL.search(html) and 'iframe-worker.js"' in html, page
    assert "Language models" in (tmp_path / "search/search_index.js").read_text(encoding="utf8")  # read from disk
    assert "vismt.adapt" in (tmp_path / "reference/api.html").read_text(encoding="utf8")
    assert "--workers" in (tmp_path / "reference/cli.html").read_text(encoding="utf8")
