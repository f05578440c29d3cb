"""Pages in Chromium: the report of every job, of an unfinished run and of a comparison."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_runs import CONFIGS, interrupted, run_config, save_classifier, write_config, written
from matplotlib.figure import Figure
from matplotlib.text import Text

from vismt.cli import main

pytestmark = [pytest.mark.browser, pytest.mark.slow]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCREENS = ((1280, "light"), (390, "dark"))
LEAST_PX, LEAST_CONTRAST = 11, 4.5  # of letters; contrast as of WCAG's level AA
ROBUSTNESS = {
    "task": "robustness",
    "data": ["digits"],
    "evaluate": {
        "images": 12,
        "batch": 6,
        "attacks": [{"name": "pgd", "epsilon": epsilon, "steps": 2} for epsilon in ("2/255", "8/255")],
        "corruptions": [{"name": name, "severities": [1, 3]} for name in ("fog", "contrast")],
    },
}
PAGES = (*CONFIGS, "robustness", "unfinished", "compared")

# Measured in the page: what is too wide, too small or hard to read, and figures that are not there.
FAULTS = """
() => {
  const faults = [], root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) faults.push(`page is ${root.scrollWidth} px wide`);
  for (const image of document.images) {
    const box = image.getBoundingClientRect();
    if (!image.complete || !image.naturalWidth || !box.width || !box.height) faults.push(`no figure: ${image.alt}`);
    if (box.width + 1 < image.getAttribute("width")) faults.push(`figure shrinks: ${image.alt}`);
  }
  for (const wide of document.querySelectorAll(".wide")) {
    wide.scrollLeft = 1e6;
    for (const row of wide.querySelectorAll("tr")) {
      const cells = [...row.children].map(cell => cell.getBoundingClientRect()), box = wide.getBoundingClientRect();
      const last = cells[cells.length - 1];
      if (last.right > box.right + 1) faults.push(`column out of reach: ${row.textContent}`);
      if (cells.length > 1 && cells[0].right > last.left + 1) faults.push(`column covered: ${row.textContent}`);
    }
    wide.scrollLeft = 0;
  }
  const light = color => {
    const parts = color.match(/[0-9.]+/g).slice(0, 3).map(part => part / 255)
      .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const ground = element => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (!/, 0\\)$/.test(color)) return color;
    }
    return "rgb(255, 255, 255)";
  };
  for (const element of document.querySelectorAll("main *")) {
    if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
    const style = getComputedStyle(element), [a, b] = [light(style.color), light(ground(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < CONTRAST) faults.push(`contrast ${contrast.toFixed(1)}: ${element.textContent.slice(0, 40)}`);
    if (parseFloat(style.fontSize) < PIXELS) faults.push(`${style.fontSize}: ${element.textContent.slice(0, 40)}`);
  }
  return faults;
}
""".replace("CONTRAST", str(LEAST_CONTRAST)).replace("PIXELS", str(LEAST_PX))


@pytest.fixture(scope="module")
def letters() -> list[tuple[float, str]]:
    """The size in points of every text of a figure that was painted, and the text."""
    return []


@pytest.fixture(scope="module")
def pages(
    tmp_path_factory: pytest.TempPathFactory, painting: Any, letters: list[tuple[float, str]]
) -> Iterator[dict[str, Path]]:
    """The pages by name, with their figures painted."""

    def paint(figure: Figure, file: object, **options: Any) -> None:
        found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
        letters.extend((text.get_fontsize(), text.get_text()) for text in found)
        painting(figure, file, **options)

    folder, found = tmp_path_factory.mktemp("pages"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", paint)
        for job in CONFIGS:
            (folder / job).mkdir()
            found[job] = run_config(write_config(job, folder / job)) / "report.html"
        save_classifier(folder)
        arms = {name: {"classifier.name": str(folder / "model.safetensors")} for name in ("first", "second")}
        found["robustness"] = run_config(written(folder / "attacks.yaml", {**ROBUSTNESS, "arms": arms})) / "report.html"

        several = {
            "arms": {"heads": {"adapt": None, "fade": None}, "a_long_name_of_an_arm": {}},
            "seeds": [0, 1],
            "tune": {"rates": [1e-3, 1e-2]},
            "tasks": CONFIGS["multitask"]["tasks"][:1],
        }
        study = written(folder / "study.yaml", {**CONFIGS["multitask"], **several})
        interrupted(patch, 2, "train", study, "--out", folder / "interrupted")
        (begun,) = (folder / "interrupted").iterdir()
        assert main(["report", str(begun), "--quiet"]) == 0
        found["unfinished"] = begun / "report.html"

        again = run_config(folder / "multitask" / "multitask.yaml", "train.lr=0.02")
        runs = [str(found["multitask"].parent), str(again)]
        assert main(["compare", *runs, "--out", str(folder / "compared"), "--quiet"]) == 0
        found["compared"] = folder / "compared" / "report.html"
        yield found


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_readable(pages: dict[str, Path], chromium: Any, name: str, width: int, scheme: str) -> None:
    page = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
    page.goto(pages[name].as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert page.evaluate(FAULTS) == [] and said == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    links = page.locator("nav a")
    assert links.count() > 0
    for link in links.all():
        link.click()
        top = page.evaluate("document.querySelector(location.hash).getBoundingClientRect().top")
        assert -1 <= top < 800, link.inner_text()
    page.close()


def test_letters_of_figures_are_large_enough(pages: dict[str, Path], letters: list[tuple[float, str]]) -> None:
    """A page shows 72 points of a figure as 96 pixels and does not shrink it."""
    assert len(letters) > 100
    assert sorted((96 / 72 * size, text) for size, text in letters if 96 / 72 * size < LEAST_PX) == []


def test_a_report_answers_first(pages: dict[str, Path], chromium: Any) -> None:
    """The first sentences name a model, which the commands have, too, unless the models are no better than a constant answer."""
    page = chromium.new_page(viewport={"width": 1280, "height": 800})
    page.goto(pages["compared"].as_uri())
    assert page.locator("main > :nth-child(2)").inner_text().startswith("Take no model: none is told from")
    page.goto(pages["lm"].as_uri())
    assert page.locator("main > :nth-child(2)").inner_text().startswith("Take adapted.")
    assert (
        page.locator("pre")
        .first.inner_text()
        .startswith(f"vismt predict {pages['lm'].parent} my_texts.jsonl --arm adapted")
    )
    page.goto(pages["multitask"].as_uri())
    assert (
        page.locator("main > pre").count() == 0
        and "No model is told" in page.locator("main > :nth-child(2)").inner_text()
    )
    assert page.locator("h2", has_text="Classes").count() == 1
    page.goto(pages["unfinished"].as_uri())
    assert "2 of 3" in page.locator("table").first.inner_text() and page.locator("img").count() == 1
    page.close()
