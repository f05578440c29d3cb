"""Write docs/rates.md: the learning rate that validation examples chose for each method, relative to LoRA's rate.

    python -m scripts.rates                 write the page, its picture, the sentences of the methods' pages, and the rates with
                                            which `vismt init` begins
    python -m scripts.rates --check         exit code 1 if one of them is stale

The rates come from the committed rows of studies in which every arm tried the same rates. Rows since 2026-12 keep the validation
score at every rate. From these scores come the good range (rates whose score is within 2 % of the best score), and the loss at
three times the best rate and at a third of it.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

from scripts import committed
from scripts.study_rows import studies
from vismt.report.plotting import INK, MUTED, PALETTE, axes_at, dress, new_figure, save_figure
from vismt.storage.paths import CHECKOUT

PAGE = CHECKOUT / "docs" / "rates.md"
METHODS = CHECKOUT / "docs" / "methods"
STARTS = CHECKOUT / "vismt" / "jobs" / "start_rates.yaml"
GOOD = 0.98  # share of the best validation score that a rate of the good range reaches
# Studies by the kind of task, and in each the arms whose name is not the name of the method.
FAMILIES: dict[str, tuple[str, dict[str, str]]] = {
    "few-shot": ("race_fewshot", {}),
    "few-shot on convolutions": ("race_fewshot_lite0", {}),
    "few-shot under attack": ("race_robust", {"clean": "", "trades": ""}),
    "classification": ("race_transfer", {"head": ""}),
    "classification on convolutions": ("race_transfer_lite0", {"head": ""}),
    "depth and normals": ("seven_scenes", {"depth": "", "normals": "", "heads": ""}),
    "questions": ("commonsense", {"lora-dropout": "", "lora-vbll": "", "polar-vbll": ""}),
    "language modelling": ("starts", {"ipm": "corda", "kpm": "corda, kpm"}),
}
JOBS = {"classification": "classification", "dense": "depth and normals", "fewshot": "few-shot", "lm": "questions"}
RESULTS = {
    "race_fewshot": "race.md#few-shot",
    "race_fewshot_lite0": "race.md#few-shot-a-convolutional-network",
    "race_robust": "race.md#robust-few-shot",
    "race_transfer": "race.md#transfer",
    "race_transfer_lite0": "race.md#transfer-a-convolutional-network",
    "seven_scenes": "results/seven_scenes.md",
    "commonsense": "results/sentiment.md",
    "starts": "results/decompositions.md",
}
PAGES = {  # of the methods with a sentence, by file
    "amt": "amt",
    "corda": "corda",
    "emtal": "emtal",
    "full_and_head": "full",
    "lisa": "lisa",
    "mtlora": "mtlora",
    "pissa": "pissa",
    "polar": "polar",
    "s2ft": "s2ft",
}
SENTENCE = re.compile(r"<!-- rate -->\n.*?\n<!-- end -->", re.S)
HEADER = """# Learning rates

Which learning rate does a method need, if LoRA's rate is known? Multiply LoRA's rate by the number in the table.

![The chosen rate of each method over LoRA's rate, by kind of task](rates.svg)

In each study every arm tried the same rates, or the same rates times a factor of its own, with its first seed. It kept the rate
with the best validation score. Neighbouring rates differ by a factor of about three, so that a number is known to within one step
of its grid.
An asterisk marks a rate at the end of the grid, beyond which a better rate may lie.

"""
RANGES = """
## The good range

The good range has the rates whose validation score is at least {good} % of the best score. The last two columns show what is left
of the best score at about three times the best rate and at about a third of it. "–": the rate is outside the grid or diverged.

| Kind of task | Method | Best rate | Good range | At three times the rate | At a third |
|---|---|---|---|---|---|
"""
FOOTER = """
## What this does not show

- The validation score is of one seed. Rows do not keep its standard error, so that the good range is a share of the score.
- The rank is 8, for depth and normals 4, and for `vera` 64. How a rate changes with the rank is not measured. LoRA's scale is
  constant (alpha = rank).
- The models are small, the trainings are short (80 to 400 steps), and the optimiser is AdamW.
"""


@dataclass(frozen=True)
class Choice:
    """The rates of an arm in one study.

    Args:
        rate: Chosen learning rate.
        base: LoRA's chosen learning rate in the study.
        grid: Rates that the arm tried, ascending.
        scores: Validation score by tried rate. It is empty if the rows do not keep the scores.
    """

    rate: float
    base: float
    grid: tuple[float, ...]
    scores: Mapping[float, float | None]

    @property
    def text(self) -> str:
        """The chosen rate over LoRA's rate, with an asterisk at the end of the grid."""
        return f"{_round(self.rate / self.base)}{'*' if self.rate in (self.grid[0], self.grid[-1]) else ''}"

    def good(self) -> list[float]:
        """Return the rates of the good range, ascending, without a gap around the chosen rate."""
        enough = [self._share(rate) >= GOOD for rate in self.grid]
        first = last = self.grid.index(self.rate)
        while first > 0 and enough[first - 1]:
            first -= 1
        while last + 1 < len(self.grid) and enough[last + 1]:
            last += 1
        return list(self.grid[first : last + 1])

    def beside(self, steps: int) -> str:
        """Return the score some steps of the grid away from the chosen rate, in per cent of the best score."""
        place = self.grid.index(self.rate) + steps
        share = self._share(self.grid[place]) if 0 <= place < len(self.grid) else float("nan")
        return f"{100 * share:.0f} %" if share == share else "–"

    def _share(self, rate: float) -> float:
        best, score = self.scores[self.rate], self.scores.get(rate)
        return score / best if best and score is not None else float("nan")


def choices() -> dict[str, dict[str, Choice]]:
    """Return the choices by kind of task and method."""
    found: dict[str, dict[str, Choice]] = {}
    for family, (name, names) in FAMILIES.items():
        if name not in studies():
            continue
        about = committed.study(name).about
        grid = sorted(about.settings["tune"]["rates"])
        kept = {names.get(arm, arm): arm for arm, cost in about.costs.items() if "lr" in cost and names.get(arm, arm)}
        base = about.costs[committed.BASE]["lr"]
        found[family] = {}
        for method, arm in kept.items():
            factor = committed.rate_factor(about, arm)
            scores = {factor * rate: score for rate, score in _scores(about.validation.get(arm, {})).items()}
            tried = tuple(factor * rate for rate in grid)
            found[family][method] = Choice(factor * about.costs[arm]["lr"], base, tried, scores)
    return found


def page(found: dict[str, dict[str, Choice]]) -> str:
    """Return the text of the page."""
    rows = [["Method", *(f"{family}, LoRA at {_rate(of[committed.BASE].rate)}" for family, of in found.items())]]
    for method in _methods(found):
        rows.append([f"`{method}`", *(of[method].text if method in of else "–" for of in found.values())])
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    ranges = []
    for family, of in found.items():
        for method, choice in of.items():
            if choice.scores:
                good = choice.good()
                texts = (family, f"`{method}`", _rate(choice.rate), f"{_rate(good[0])} to {_rate(good[-1])}")
                ranges.append(f"| {' | '.join((*texts, choice.beside(1), choice.beside(-1)))} |")
    sources = [f"- {family}: [`{name}`]({RESULTS[name]})" for family, (name, _) in FAMILIES.items() if family in found]
    return (
        HEADER
        + "\n".join(lines)
        + "\n"
        + RANGES.format(good=round(100 * GOOD))
        + "\n".join(ranges)
        + "\n\n## The studies\n\n"
        + "\n".join(sources)
        + "\n"
        + FOOTER
    )


def sentence(method: str, found: dict[str, dict[str, Choice]]) -> str:
    """Return the sentence about the rate of a method for its page."""
    families: dict[str, list[str]] = {}
    for family, of in found.items():
        if method in of:
            families.setdefault(of[method].text.rstrip("*"), []).append(family)
    each = ", ".join(f"{share} ({', '.join(names)})" for share, names in families.items())
    text = f"The best learning rate on validation examples, as a multiple of LoRA's rate, was {each}. [All rates](../rates.md)."
    return "\n".join(("<!-- rate -->", *wrap(text, 130), "<!-- end -->"))


def starts(found: dict[str, dict[str, Choice]]) -> str:
    """Return LoRA's rate by job, and full fine-tuning's rate in units of LoRA's, rounded to 1 or 3 times a power of ten."""
    of_full = [math.log10(of["full"].rate / of[committed.BASE].rate) for of in found.values() if "full" in of]
    steps = round(2 * sum(of_full) / len(of_full))
    full = (3 if steps % 2 else 1) * 10.0 ** (steps // 2)
    head = "# Written by `python -m scripts.rates`: docs/rates.md has the studies.\nmethods:\n  full: "
    jobs = (f"\n  {job}: {_rate(found[family][committed.BASE].rate)}" for job, family in JOBS.items())
    return f"{head}{full:g}\njobs:{''.join(jobs)}\n"


def draw(found: dict[str, dict[str, Choice]], path: Path) -> None:
    """Draw a row for each method with a point for each kind of task, and the good range as a line where it is known."""
    methods = [method for method in _methods(found) if method != committed.BASE]
    top, height = 0.3 + 0.2 * ((len(found) + 1) // 2), 0.27 * len(methods)
    figure = new_figure(4.4, top + height + 0.5)
    axes = axes_at(figure, 0.9, top, 3.4, height)
    dress(axes, "", grid="x")
    for place, (family, of) in enumerate(found.items()):
        color, shift = PALETTE[1 + place], 0.09 * (place - (len(found) - 1) / 2)
        rows = [(at + shift, of[method]) for at, method in enumerate(methods) if method in of]
        axes.plot(
            [c.rate / c.base for _, c in rows], [y for y, _ in rows], "o", color=color, markersize=4.5, label=family
        )
        for y, choice in rows:
            if choice.scores:
                good = choice.good()
                axes.plot([good[0] / choice.base, good[-1] / choice.base], [y, y], color=color, linewidth=1.4)
    axes.axvline(1, color=MUTED, linewidth=1.0)
    axes.set(xscale="log", yticks=range(len(methods)), yticklabels=methods, ylim=(len(methods) - 0.5, -0.5))
    axes.set_xlabel("chosen rate / LoRA's rate; a line is the good range", color=INK, fontsize=8.5)
    figure.legend(loc="upper left", ncols=2, frameon=False, fontsize=8.5, labelcolor=INK, bbox_to_anchor=(0, 1))
    save_figure(figure, path)


def main(arguments: list[str] | None = None) -> int:
    """Write the page, its picture and the sentences, or check them."""
    parser = argparse.ArgumentParser(prog="python -m scripts.rates", description=__doc__)
    parser.add_argument("--check", action="store_true", help="name what is stale, and write nothing")
    check = parser.parse_args(arguments).check
    found = choices()
    if not check:
        draw(found, PAGE.with_suffix(".svg"))
    return committed.renew("rates", _files(found), check)


def _files(found: dict[str, dict[str, Choice]]) -> Iterator[tuple[Path, str, str, int]]:
    for path, made in ((PAGE, page(found)), (STARTS, starts(found))):
        yield path, path.read_text(encoding="utf8") if path.exists() else "", made, 1
    for file, method in PAGES.items():
        path, made = METHODS / f"{file}.md", sentence(method, found)
        text = path.read_text(encoding="utf8")
        yield path, text, SENTENCE.sub(lambda _, made=made: made, text), 1


def _methods(found: dict[str, dict[str, Choice]]) -> list[str]:
    """Return the methods by their mean rate, on a logarithmic scale, in units of LoRA's rate."""
    ratios: dict[str, list[float]] = {}
    for of in found.values():
        for method, choice in of.items():
            ratios.setdefault(method, []).append(math.log(choice.rate / choice.base))
    return sorted(ratios, key=lambda method: sum(ratios[method]) / len(ratios[method]))


def _scores(validation: Mapping[str, float | None]) -> dict[float, float | None]:
    return {float(rate): score for rate, score in validation.items()}


def _rate(rate: float) -> str:
    return f"{rate:.1e}".replace("e-0", "e-")


def _round(ratio: float) -> str:
    return f"{ratio:.1g}" if ratio < 1 else f"{ratio:.2g}"


if __name__ == "__main__":
    sys.exit(main())
