"""Check whether a run reproduces the committed numbers of its configuration: `python -m scripts.check RUN`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from itertools import compress
from pathlib import Path
from typing import Any, get_args, get_type_hints

from scripts.claim_rules import contradict, of_study, read_claims
from scripts.reproduction import FAMILY, verdicts
from scripts.study_rows import StudyRows, read_study, studies, study_of
from vismt.base import console
from vismt.base.errors import UserError, shown_value
from vismt.config.sections import RunConfig, differences, flat
from vismt.jobs import read_resolved, typed_config
from vismt.report.tables import number_text, scale_text

_SHOWN = 5  # number of keys in an error in which the nearest study differs
SEEDS = ("seed", "seeds")  # keys that a run which reproduces a study may set otherwise, wherever they stand


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts.check", description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="a finished run folder")
    parser.add_argument("rows", nargs="?", help="a study or file of rows (the committed ones of this configuration)")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Compare a run with committed numbers. Return 1 where one is outside, and 2 for an error of the user."""
    try:
        return _check(arguments(words))
    except UserError as error:
        console.error(str(error))
        return 2


def _check(options: argparse.Namespace) -> int:
    name, committed = _committed(options.run, read_resolved(options.run), options.rows)
    run = study_of(options.run, committed.about.differences)
    found = verdicts(committed, run)
    lines = []
    for verdict in found:
        row = verdict.row
        half = (verdict.high - verdict.low) / 2
        texts = [
            "–" if value is None else number_text(value, row.scale, bool(row.minus), half)
            for value in (row.value, verdict.low, verdict.high, verdict.value)
        ]
        arm = f"{row.arm} − {row.minus}" if row.minus else row.arm
        what = (row.data, row.task, row.protocol, row.condition, scale_text(row.metric, row.scale), arm)
        lines.append((*what, texts[0], f"[{texts[1]}, {texts[2]}]", texts[3], verdict.word))
    heads = ("data", "task", "protocol", "condition", "measure", "model", name, "predicted", "this run", "verdict")
    differing = [len(set(column)) > 1 or place > heads.index("measure") for place, column in enumerate(zip(*lines))]
    shared = [f"{head} {text}" for head, text, differs in zip(heads, lines[0], differing) if not differs]
    if shared:
        console.stage("check", f"all numbers: {', '.join(shared)}")
    kept = [tuple(compress(line, differing)) for line in sorted(lines, key=lambda line: line[-1] == "inside")]
    console.table(tuple(compress(heads, differing)), kept)
    inside = sum(verdict.word == "inside" for verdict in found)
    probability = f"a faithful run has all of them inside with a probability of {100 * FAMILY:.0f} %"
    console.stage("check", f"{inside} of {len(found)} numbers inside; {probability}")
    return int(inside < len(found) or _claims_fail(name, run))


def _claims_fail(name: str, run: StudyRows) -> bool:
    """Print the verdicts on the claims that a study tests, as committed and by the run. Return whether any two contradict."""
    lines = []
    for claim, evidence in of_study(read_claims(), name):
        arms = " − ".join(filter(None, (evidence.arm, evidence.minus)))
        follows = evidence.follows(evidence.find(run, f"claims: '{claim}'"))
        lines.append((claim, arms, evidence.verdict, follows))
    if not lines:
        return False
    console.table(("claim", "model", name, "this run"), lines)
    failed = [claim for claim, _, committed, found in lines if contradict(committed, found)]
    console.stage("claims", f"{len(lines) - len(failed)} of {len(lines)} verdicts are not contradicted")
    return bool(failed)


def _committed(folder: Path, config: RunConfig, given: str | None) -> tuple[str, StudyRows]:
    """Return name and numbers of the study of a run's configuration. Raise UserError if there is none."""
    known = studies()
    paths = [known.get(given, Path(given))] if given else list(known.values())
    nearest: tuple[int, str, str] | None = None
    for path in paths:
        study = read_study(path)
        differing = _differing(config, study, path)
        if not differing:
            return path.stem, study
        texts = list(dict.fromkeys(differing))
        more = [f"{len(texts) - _SHOWN} more"] * (len(texts) > _SHOWN)
        nearest = min(filter(None, (nearest, (len(differing), path.stem, "; ".join([*texts[:_SHOWN], *more])))))
    if nearest is None:
        raise UserError("check: there are no committed rows; name a file of rows.")
    what = f"'{given}' has the rows" if given else "this configuration has no committed rows; the nearest are those"
    raise UserError(f"check: run '{folder}': {what} of another one, '{nearest[1]}': {nearest[2]}.")


def _differing(config: RunConfig, study: StudyRows, path: Path) -> list[str]:
    """Return the keys, with both values, in which a run's configuration differs from a study. Seeds do not count."""
    settings = study.about.settings
    task = settings.get("task", RunConfig.task)
    if task != config.task:
        return [f"task is {config.task}, there {task}"] * len(vars(config))  # this is farther than any other key
    other = typed_config(_known_keys(settings, type(config)), f"rows '{path}'")
    values = [flat(asdict(one)) for one in (config, other)]
    hashed = flat(differences(config, other)) | flat(differences(other, config))
    # `differences` counts a field with a default of its own for hashes as changed if both have the default.
    keys = [key for key in hashed if values[0].get(key) != values[1].get(key)]
    # a mapping that is empty in one of the two
    keys = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    texts = {key: [shown_value(of[key]) if key in of else "not set" for of in values] for key in keys}
    return [
        f"{key} is {here}, there {there}" for key, (here, there) in texts.items() if key.split(".")[-1] not in SEEDS
    ]


def _known_keys(settings: object, hint: object) -> Any:
    """Return settings of committed rows without keys that their sections no longer have.

    hint: Type of the section.
    """
    section = next((part for part in (hint, *get_args(hint)) if is_dataclass(part)), None)
    if isinstance(settings, list):
        return [_known_keys(item, section) for item in settings]
    if not isinstance(settings, dict) or section is None:
        return settings
    hints = get_type_hints(section)
    return {name: _known_keys(value, hints[name]) for name, value in settings.items() if name in hints}


if __name__ == "__main__":
    sys.exit(main())
