"""Write docs/race.md and its pictures from the committed rows of the race's studies; no page before there are rows.

    python -m scripts.tables add RUN race_transfer          take the rows of a finished run of configs/race/transfer.yaml
    python -m scripts.tables add RUN race_transfer+NAME     beside them, those of a run with other arms and the same tasks
    python -m scripts.race                                  write the page; --check: exit code 1 where it is stale
    python -m scripts.race --costs race_transfer            before it, measure memory and time of a training step of every arm

docs/results/rows/race.yaml has for each study its answer and its notes. It names the columns, each by values of its rows (data
is the average over sets where there is one). An arm is best where its number is; another one ties with it where the 95 % interval
of their difference, paired on the same examples and seeds where one run has both, contains 0.

Memory is the largest allocation in the second training step, weights and optimiser included (scripts/bench/accounting.py), the
same on every machine. The time is the median CPU time of the next steps on one thread, all arms in one process: wall times of a
study are those of a busy machine. docs/results/rows/race_costs.json keeps both by study and arm, in bytes and seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, pairwise
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from matplotlib.ticker import EngFormatter, LogLocator

from scripts import committed
from scripts.bench.accounting import peak_bytes, weight_bytes
from scripts.study_rows import ROWS, StudyRow, StudyRows, studies, study_of
from vismt.base import console
from vismt.base.errors import UserError
from vismt.config.sections import find_config
from vismt.config.yaml_text import read_yaml
from vismt.engine import loop, runtime
from vismt.engine.blocks import running_blocks
from vismt.jobs import load_config, make_job
from vismt.jobs.training_job import TrainingJob
from vismt.report.comparison import AVERAGE
from vismt.report.plotting import INK, MUTED, axes_at, dress, new_figure, save_figure, short
from vismt.storage.files import atomic_write
from vismt.storage.paths import CHECKOUT
from vismt.uncertainty.intervals import LOWER, SHARE, Estimate, interval_kind_text

SPECS = CHECKOUT / ROWS / "race.yaml"
COSTS = CHECKOUT / ROWS / "race_costs.json"
PAGE = CHECKOUT / "docs" / "race.md"
TIMED = 5  # steps whose time is taken
ENTRANT = "+"  # between a study's name and that of a file with further arms
HEADER = """# The race

No adapter is shown to beat a tuned LoRA on clean images, on small ViTs and on EfficientNet-Lite0. Nor is one under
attack on a ViT: PiSSA +3.2 ± 3.3 points, AMT's start +1.1 ± 6.3. AMT is not shown to beat TRADES either (+0.3 ± 7.2).

Every arm has the same steps, batches, seeds and number of rates. It chooses its rate on validation images with the first seed.

| Sign or column | Meaning |
|---|---|
| ★ | the best number of a column |
| ≈ | ties with the best: the 95 % interval of their difference contains 0, which means "not shown to differ", not "equal" |
| trained | numbers that are trained, with the head |
| MiB, ms | peak memory of a training step, and its CPU time on one thread |
"""
FOOTER = """
## What this does not show

- The best arm is not certain. Nothing is corrected for the number of arms, and the best of many is best by luck in part.
- The models are small ViTs and one small convolutional network, on CPUs. Compare numbers within a table only.
- Arms were left out to save time. BOFT, by far the slowest, is in no race. DoRA and RandLoRA are not under attack. EMTAL, whose
  router cannot be merged for few shots, is in transfer alone.

[Extending](extending.md#an-arm-in-the-race) describes how to add an arm.
"""


@dataclass(frozen=True)
class Entry:
    """An arm's number in one column, and its study, of which there are several where outsiders take part."""

    study: StudyRows
    row: StudyRow

    @property
    def scores(self) -> list[float]:
        """The number by training seed."""
        return list(self.study.trainings(self.row).values())


@cache
def specs() -> dict[str, Any]:
    """Return title, configuration and columns of each study of the race, by its name."""
    return read_yaml(SPECS, str(SPECS))


def files(name: str) -> list[StudyRows]:
    """Return the rows of a study, and those of entrants beside it."""
    return [committed.study(known) for known in studies() if known.partition(ENTRANT)[0] == name]


def column(of: list[StudyRows], wanted: dict[str, str]) -> dict[str, Entry]:
    """Return the number of every arm in one column, of the first file that has the arm."""
    wanted = {"condition": "clean", **wanted}
    found: dict[str, Entry] = {}
    for study in of:
        rows = [row for row in study.rows if not row.minus]
        rows = [row for row in rows if all(getattr(row, key) == value for key, value in wanted.items())]
        averages = [row for row in rows if row.data == AVERAGE]
        for row in averages or rows:
            found.setdefault(row.arm, Entry(study, row))
    return found


def best_of(entries: dict[str, Entry]) -> str:
    """Return the arm with the best number."""
    sign = -1 if next(iter(entries.values())).row.better == LOWER else 1
    return max(entries, key=lambda arm: sign * entries[arm].row.value)


def ties(best: Entry, other: Entry) -> bool:
    """Return whether the interval of the difference of two arms contains 0.

    It is the committed paired one where a run has both. Otherwise their errors count as independent, which is the wider.
    """
    for first, second in ((best, other), (other, best)):
        wanted = {key: getattr(best.row, key) for key in ("task", "data", "protocol", "condition", "metric")}
        wanted |= {"arm": first.row.arm, "minus": second.row.arm}
        for row in first.study.rows if first.study is second.study else ():
            if all(getattr(row, key) == value for key, value in wanted.items()):
                return row.low <= 0 <= row.high
    sources = tuple((entry.row.variance, entry.row.freedom) for entry in (best, other))
    low, high = Estimate(best.row.value - other.row.value, sources).with_seeds(best.scores, other.scores).bounds
    return low <= 0 <= high


def step_costs(config: str) -> dict[str, dict[str, float]]:
    """Return the bytes at the peak of a training step of every arm of a configuration, and its seconds of CPU time."""
    settings = load_config(find_config(config), [])
    found = {}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(settings, Path(folder))
        assert isinstance(job, TrainingJob)
        for arm, of_arm in job.study.arms.items():
            net, _, balanced = job.prepared(of_arm)
            objective = job.objective(of_arm, net, balanced)
            accelerator = runtime.accelerator(of_arm.training.precision)
            training = loop._Training(
                objective, job.batches(of_arm), of_arm.training, Path(folder) / arm, "", accelerator, of_arm
            )
            steps = map(training._step, count(1))
            with running_blocks(objective, of_arm.training):
                peak = weight_bytes(objective) + peak_bytes(steps.__next__)
                times = [process_time()]
                for _ in range(TIMED):
                    next(steps)
                    times.append(process_time())
            seconds = median(after - before for before, after in pairwise(times))
            found[arm] = {"bytes": peak, "seconds": round(seconds, 4)}
            console.stage("costs", f"{arm}   {peak / 2**20:,.0f} MiB   {1000 * seconds:.0f} ms")
    return found


def section(name: str, draw: bool) -> str:
    """Return the part of the page about one study; draw: also write its picture."""
    spec, of = specs()[name], files(name)
    columns = {head: column(of, wanted) for head, wanted in spec["columns"].items()}
    absent = [head for head, entries in columns.items() if not entries]
    if absent:
        raise UserError(f"race: study '{name}' has no row for the columns {absent}; see {ROWS}/race.yaml.")
    costs = {arm: cost for study in reversed(of) for arm, cost in study.about.costs.items()}
    factors = {arm: committed.rate_factor(study.about, arm) for study in reversed(of) for arm in study.about.costs}
    steps = json.loads(COSTS.read_text()).get(name, {}) if COSTS.exists() else {}
    heads = ("Arm", *columns, "rate", "trained", "MiB", "ms")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for arm in dict.fromkeys(arm for entries in columns.values() for arm in entries):
        cells = [_cell(arm, entries) for entries in columns.values()]
        cost = costs.get(arm, {})
        rate = f"{factors[arm] * cost['lr']:.3g}" if "lr" in cost else "–"
        trained = f"{cost['trained']:,.0f}" if "trained" in cost else "–"
        peak = f"{steps[arm]['bytes'] / 2**20:,.0f}" if arm in steps else "–"
        time = f"{1000 * steps[arm]['seconds']:.0f}" if arm in steps else "–"
        lines.append(f"| {' | '.join((arm, *cells, rate, trained, peak, time))} |")
    entry = next(iter(next(iter(columns.values())).values()))
    kinds = dict.fromkeys(
        interval_kind_text(entry.row.interval) for arms in columns.values() for entry in arms.values()
    )
    about = entry.study.about
    sizes = {head: next(iter(arms.values())).row.n for head, arms in columns.items()}
    others = [f"{head} {n:,}" for head, n in sizes.items() if n != entry.row.n]
    more = f" ({'; '.join(others)})" if others else ""
    seeds = max(len(entry.scores) for arms in columns.values() for entry in arms.values())  # references have none
    note = (
        f"*Intervals: {'; '.join(kinds)}. n = {entry.row.n:,} {entry.row.unit}{more}, seeds: {seeds or 1}. Config "
        f"{about.config_hash}, {about.hardware}.*"
    )
    return "\n".join(
        [
            f"\n## {spec['title']}\n",
            *([f"{spec['answer']}\n"] if "answer" in spec else []),
            *_picture(name, columns, costs, draw),
            f"```bash\nvismt run {spec['config']}\n```\n",
            *lines,
            "",
            note,
            *([f"\n{spec['notes']}".rstrip()] if "notes" in spec else []),
        ]
    )


def _cell(arm: str, entries: dict[str, Entry]) -> str:
    if arm not in entries:
        return "–"
    best = best_of(entries)
    text = committed.interval_text(entries[arm].row)
    if arm == best:
        return f"**{text}** ★"
    return f"{text} ≈" if ties(entries[best], entries[arm]) else text


def _picture(
    name: str, columns: dict[str, dict[str, Entry]], costs: dict[str, dict[str, float]], draw: bool
) -> list[str]:
    """Draw the first column against the trained parameters; return the lines that show it."""
    head, entries = next(iter(columns.items()))
    factor = 100 if next(iter(entries.values())).row.scale == SHARE else 1
    points = [
        Point(arm, costs[arm]["trained"], factor * entry.row.value, factor * entry.row.low, factor * entry.row.high)
        for arm, entry in entries.items()
        if arm in costs
    ]
    if not points:
        return []
    lower = next(iter(entries.values())).row.better == LOWER
    if draw:
        pareto_figure(points, "trained parameters", head, PAGE.with_name(f"{name}.svg"), lower=lower)
    return [
        f"![{head} against trained parameters. The line joins the arms that no other arm beats in both]({name}.svg)\n"
    ]


@dataclass(frozen=True)
class Point:
    """An arm with a cost and a score with its interval, as drawn."""

    arm: str
    cost: float
    score: float
    low: float
    high: float


def frontier(points: Sequence[Point], lower: bool = False) -> list[Point]:
    """Return the points that no other one beats in cost and score, by cost; lower: whether a lower score is better."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.score if lower else -p.score)):
        if not kept or (point.score < kept[-1].score if lower else point.score > kept[-1].score):
            kept.append(point)
    return kept


def neighbours(points: Sequence[Point]) -> list[list[Point]]:
    """Return the points by cost, in groups within which a point costs less than 1.6 times the one before it."""
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda point: point.cost):
        if groups and point.cost < 1.6 * groups[-1][-1].cost:
            groups[-1].append(point)
        else:
            groups.append([point])
    return groups


def apart(values: Sequence[float], gap: float) -> list[float]:
    """Return ascending places with the gap between them at least, around the mean of the ascending values."""
    places: list[float] = []
    for value in values:
        places.append(max(value, places[-1] + gap) if places else value)
    shift = (sum(values) - sum(places)) / len(values)
    return [place + shift for place in places]


def pareto_figure(points: Sequence[Point], cost: str, score: str, path: Path, *, lower: bool = False) -> Path:
    """Draw scores with their intervals against costs on a logarithmic axis, and the frontier as a line; return `path`.

    cost, score: titles of the axes. lower: whether a lower score is better.
    """
    figure = new_figure(6.4, 4.0)
    axes = axes_at(figure, 0.7, 0.45, 5.4, 2.95)
    dress(axes, score, grid="y")
    best = frontier(points, lower)
    axes.plot(
        [p.cost for p in best], [p.score for p in best], color=MUTED, linewidth=1.0, drawstyle="steps-post", zorder=1
    )
    for point in points:
        color = INK if point in best else MUTED
        axes.plot([point.cost] * 2, [point.low, point.high], color=color, alpha=0.4, linewidth=1.2, zorder=2)
        axes.plot(point.cost, point.score, "o", color=color, markersize=4.5, zorder=3)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.12)
    axes.set_xlim(right=axes.get_xlim()[1] * 1.5)
    height = (axes.get_ylim()[1] - axes.get_ylim()[0]) / 18  # of a label
    for group in neighbours(points):
        right = 1.12 * group[-1].cost
        ascending = sorted(group, key=lambda point: point.score)
        for point, place in zip(ascending, apart([point.score for point in ascending], height), strict=True):
            line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 0}
            axes.annotate(
                short(point.arm, 18),
                (point.cost, point.score),
                (right, place),
                va="center",
                fontsize=8,
                color=INK if point in best else MUTED,
                arrowprops=line,
            )
    axes.set_xlabel(cost, color=MUTED, fontsize=9)
    return save_figure(figure, path)


def pairs(run: Path, name: str) -> list[tuple[str, str]]:
    """Return the differences to keep with a study of the race: of all arms to LoRA, and of the best of a column to all."""
    spec = specs().get(name.partition(ENTRANT)[0])
    if spec is None:
        return []
    study, found = study_of(run), dict[tuple[str, str], None]()
    for wanted in spec["columns"].values():
        entries = column([study], wanted)
        if entries:
            best = best_of(entries)
            found |= dict.fromkeys((best, arm) for arm in entries if arm != best)
            if committed.BASE in entries:
                found |= dict.fromkeys((arm, committed.BASE) for arm in entries if arm != committed.BASE)
    return list(found)


def page(draw: bool) -> str:
    """Return the page, "" where no study has rows; draw: also write its pictures."""
    sections = [section(name, draw) for name in specs() if files(name)]
    return "\n".join([HEADER, *sections, FOOTER]) if sections else ""


def main(arguments: list[str] | None = None) -> int:
    """Write the page; return 1 where --check finds another one."""
    parser = argparse.ArgumentParser(prog="python -m scripts.race", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where it is stale")
    parser.add_argument("--costs", metavar="STUDY", choices=specs(), help="first measure the steps of its arms")
    options = parser.parse_args(arguments)
    try:
        if options.costs:
            measured = json.loads(COSTS.read_text()) if COSTS.exists() else {}
            measured |= {options.costs: step_costs(specs()[options.costs]["config"])}
            atomic_write(COSTS, json.dumps(measured, indent=1) + "\n")
        text = page(draw=not options.check)
    except UserError as error:
        console.error(str(error))
        return 2
    stands = PAGE.read_text(encoding="utf8") if PAGE.exists() else ""
    if not text:
        console.stage("race", "no rows of a race, so no page")
        return int(options.check and bool(stands))
    return committed.renew("race", [(PAGE, stands, text, 1)], options.check)


if __name__ == "__main__":
    sys.exit(main())
