"""Draw the pictures of README.md and docs/ from the rows in docs/results/rows.

    python -m scripts.figures            draw those whose rows have changed
    python -m scripts.figures --check    exit code 1 with the name of a picture that is not the one of its rows

docs/results/rows/figures.yaml has what each of them shows; docs/NAME.svg ends with a digest of that and of its rows:

    NAME:
      study: STUDY
      kind: bars                       # by set, with intervals; seeds: a dot for each training; depth: updates by block;
                                       # certified: accuracy over l2 radii, proved and under attack; trade: two scores;
                                       # dots: one score of each arm, the best first
      where: {metric: accuracy, condition: [clean, strong linf 4.5/255], arm: [frozen, clean]}

A row is drawn where every field of `where` has the value, or one of the values, whose order is that of the picture. A trade has
the first set of rows across and the second one up; arms LORA-RATE of one name are joined.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from scripts.committed import renew, study
from scripts.study_rows import ROWS, SELECTED, StudyRow, StudyRows
from vismt.base import console
from vismt.base.errors import UserError, require_known
from vismt.base.seeds import digest
from vismt.config.yaml_text import read_yaml
from vismt.report.arm_figures import seeds_figure
from vismt.report.comparison import AVERAGE, compare_results
from vismt.report.figures import certified_figure, domain_bars
from vismt.report.plotting import MUTED, NARROW, axes_at, color_of, dress, new_figure, one_panel, save_figure
from vismt.report.results import ValuesByExample
from vismt.report.score_sections import arm_scores, seeds_panel
from vismt.report.tables import scale_text
from vismt.report.weight_changes import depth_figure
from vismt.storage.paths import CHECKOUT
from vismt.uncertainty.intervals import SHARE

KINDS = ("bars", "certified", "seeds", "depth", "trade", "dots")
RATE = re.compile(r"-\de-\d$")
DIGEST = re.compile(r"<!-- rows: (\w+) -->\n$")


def chosen(spec: Mapping[str, Any], where: str) -> list[StudyRow]:
    """Return the rows that a picture shows; raise UserError for a value that no row has."""
    rows = [row for row in study(spec["study"]).rows if not row.minus]
    require_known(f"{where}: rows have no field", spec["where"], SELECTED)
    for key, values in spec["where"].items():
        wanted = values if isinstance(values, list) else [values]
        known = dict.fromkeys(getattr(row, key) for row in rows)
        require_known(f"{where}: no row of '{spec['study']}' has {key}", wanted, known)
        rows = sorted(
            (row for row in rows if getattr(row, key) in wanted), key=lambda row: wanted.index(getattr(row, key))
        )
    return rows


def draw(spec: Mapping[str, Any], rows: list[StudyRow], path: Path) -> None:
    """Draw rows as the picture that a specification describes."""
    if spec["kind"] in ("bars", "certified"):
        figure = domain_bars if spec["kind"] == "bars" else certified_figure
        shown = sorted(rows, key=lambda row: row.data == AVERAGE)
        figure(compare_results(shown, ValuesByExample(CHECKOUT / ROWS)), path)  # which has no values by example
    elif spec["kind"] == "dots":
        dots(rows, path)
    elif spec["kind"] == "trade":
        trade(study(spec["study"]), rows, path)
    elif spec["kind"] == "depth":
        depths: dict[str, dict[int, float]] = {}
        for row in rows:
            if row.data.startswith("block "):
                depths.setdefault(row.arm, {})[int(row.data.removeprefix("block "))] = row.value
        if not depths:
            raise UserError(
                f"picture '{path.stem}': '{spec['study']}' has no updates by block; it needs several seeds."
            )
        depth_figure(depths, path)
    else:
        arms = list(dict.fromkeys(row.arm for row in rows))
        sets, seeds = [row for row in rows if row.data != AVERAGE], study(spec["study"]).about.seeds
        trainings = [
            replace(row, seed=seed, value=value)
            for row in sets
            for seed, value in zip(seeds, row.by_seed)
            if value is not None
        ]
        scores = arm_scores([*sets, *trainings], {arm: arm for arm in arms})
        panels = [seeds_panel(score) for score in scores if score.seeds]
        if not panels:
            raise UserError(f"picture '{path.stem}': '{spec['study']}' has no rows by seed; give it kind: bars.")
        seeds_figure(panels, arms, path)


def dots(rows: list[StudyRow], path: Path) -> None:
    """Draw a dot with its 95 % interval for each arm, the best arm first."""
    sign, factor = -1 if rows[0].better == "higher" else 1, 100 if rows[0].scale == SHARE else 1
    ordered = sorted(rows, key=lambda row: sign * row.value)
    left, height = 0.9, 0.2 * len(rows)
    figure = new_figure(NARROW, 0.75 + height)
    axes = axes_at(figure, left, 0.35, NARROW - left - 0.2, height)
    dress(axes, f"{scale_text(rows[0].metric, rows[0].scale, rows[0].better)}, n = {rows[0].n:,}", grid="x")
    for place, row in enumerate(ordered):
        reach = [[factor * (row.value - row.low)], [factor * (row.high - row.value)]]
        axes.errorbar(
            factor * row.value, -place, xerr=reach, color=color_of("", [""]), fmt="o", markersize=4, capsize=2
        )
    axes.set(ylim=(0.6 - len(rows), 0.6))
    axes.set_yticks([-place for place in range(len(rows))], [row.arm for row in ordered], fontsize=9)
    axes.locator_params(axis="x", nbins=5)
    save_figure(figure, path)


def trade(of: StudyRows, rows: list[StudyRow], path: Path) -> None:
    """Draw a dot for each training at its two scores, and a line through the means of arms that differ in the rate alone."""
    scores: dict[tuple[str, str], dict[str, StudyRow]] = {}
    for row in rows:
        if row.seed is None:
            scores.setdefault((row.metric, row.data), {})[row.arm] = row
    if len(scores) != 2:
        raise UserError(f"picture '{path.stem}': a trade has two scores; `where` leaves {len(scores)}.")
    across, up = scores.values()
    families: dict[str, list[str]] = {}
    for arm in across:
        families.setdefault(RATE.sub("", arm), []).append(arm)
    figure, axes = one_panel(list(families), [color_of(name, list(families)) for name in families], _score(up))
    for name, arms in families.items():
        color, factors = color_of(name, list(families)), [_factor(across), _factor(up)]
        means = [[factor * of_arm[arm].value for arm in arms] for factor, of_arm in zip(factors, (across, up))]
        axes.plot(*means, color=color, linewidth=1.2)
        for arm in arms:
            dots = [of.trainings(of_arm[arm]) or {0: of_arm[arm].value} for of_arm in (across, up)]
            places = [[factor * value for value in by_seed.values()] for factor, by_seed in zip(factors, dots)]
            axes.scatter(*places, color=color, s=16, zorder=3, edgecolor="white", linewidth=0.5)
    axes.set_xlabel(_score(across), color=MUTED, fontsize=9)
    save_figure(figure, path)


def _factor(rows: Mapping[str, StudyRow]) -> int:
    return 100 if next(iter(rows.values())).scale == SHARE else 1


def _score(rows: Mapping[str, StudyRow]) -> str:
    """Return metric and set, with an arrow to where the score is better."""
    row = next(iter(rows.values()))
    return f"{scale_text(row.metric, row.scale, row.better)}, {row.data.partition(':')[0]}"


def fresh(name: str, spec: Mapping[str, Any]) -> tuple[Path, str, str, int]:
    """Return the file of a picture, its text, that which it has to have, and the line 1."""
    where = f"picture '{name}'"
    if {*spec} != {"study", "kind", "where"} or spec["kind"] not in KINDS:
        raise UserError(f"{where}: has {', '.join(spec)}; give study, where and kind: {' or '.join(KINDS)}.")
    rows = chosen(spec, where)
    of_rows = digest(json.dumps([spec, [asdict(row) for row in rows]], sort_keys=True).encode())[:16]
    path = CHECKOUT / "docs" / f"{name}.svg"
    text = path.read_text(encoding="utf8") if path.exists() else ""
    found = DIGEST.search(text)
    if found is not None and found[1] == of_rows:
        return path, text, text, 1
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / path.name
        draw(spec, rows, drawn)
        return path, text, f"{drawn.read_text(encoding='utf8')}<!-- rows: {of_rows} -->\n", 1


def pictures() -> Iterator[tuple[Path, str, str, int]]:
    """Yield what `fresh` returns for each picture."""
    specs = CHECKOUT / ROWS / "figures.yaml"
    for name, spec in read_yaml(specs, str(specs)).items():
        yield fresh(name, spec)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 1 where --check finds a picture that is not the one of its rows."""
    parser = argparse.ArgumentParser(prog="python -m scripts.figures", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a picture is stale")
    options = parser.parse_args(arguments)
    try:
        return renew("figures", pictures(), options.check)
    except UserError as error:
        console.error(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
