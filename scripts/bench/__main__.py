"""Time and memory against peers, measured in one process: `python -m scripts.bench core` in a clone."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vismt.base import console
from vismt.base.errors import UserError
from vismt.storage.files import atomic_write

# A file of the name for each.
BENCHES = ("core", "floor", "lowrank", "attacks", "memory", "fewshot", "multitask", "scale", "tasks")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line, that of the process where `words` is None."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench", description=__doc__)
    parser.add_argument("what", choices=BENCHES)
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds of each timing (9)")
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument(
        "--model", help="for memory: 88M, 158M, all sizes, or the name of a language model (a random Llama of 27M)"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="for memory: predict a training step of a dense configuration"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run one benchmark and return the exit code: 0, or 2 after a user error."""
    try:
        _bench(arguments(words))
    except UserError as error:
        console.error(str(error))
        return 2
    return 0


def _bench(options: argparse.Namespace) -> None:
    if options.rounds < 1:
        raise UserError(f"bench: --rounds {options.rounds}; it must be at least 1.")
    if options.model is not None and options.what != "memory":
        raise UserError(
            f"bench: --model applies to 'memory' only, and '{options.what}' has fixed models; leave it out."
        )
    if options.config is not None and (options.what != "memory" or options.model is not None):
        raise UserError(
            f"bench: --config {options.config} is for `python -m scripts.bench memory` without --model; leave one of them out."
        )
    if options.json is not None and not options.json.parent.is_dir():
        raise UserError(
            f"bench: --json {options.json}: the folder {options.json.parent} does not exist; make it first."
        )
    if options.config is not None:
        from scripts.bench import config_memory
        from vismt.config.sections import find_config

        results: list[Any] = config_memory.run(find_config(str(options.config)), options.device)
    else:
        more = [options.model] if options.what == "memory" else []
        bench = importlib.import_module(f"scripts.bench.{options.what}")
        results = bench.run(options.rounds, options.device, *more)
    for result in results:
        console.block(str(result))
    if options.json is not None:
        atomic_write(options.json, json.dumps(report(options, results), indent=1) + "\n")
        console.stage("bench", f"written to {options.json}")


def report(options: argparse.Namespace, results: list[Any]) -> dict[str, Any]:
    """Return the content of a JSON file of results: the fields of each, its comparisons, and its table as "text".

    A timing has the seconds of each round and "ratios": {candidate: {base: [median, smallest, largest]}}.
    """
    from scripts.bench.timing import Timing
    from vismt.engine import runtime

    def fields(value: Any) -> Any:
        if isinstance(value, Timing):
            names = list(value.seconds)
            ratios = {name: {base: value.ratio(name, base) for base in names if base != name} for name in names}
            return {"seconds": value.seconds, "ratios": ratios}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: fields(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, list):
            return [fields(entry) for entry in value]
        if isinstance(value, dict):
            return {key: fields(entry) for key, entry in value.items()}
        return value

    entries = [
        {
            "kind": type(result).__name__,
            **fields(result),
            "comparisons": fields(result.comparisons()),
            "text": str(result),
        }
        for result in results
    ]
    named = {"rounds": options.rounds, "device": options.device, "model": options.model, "config": options.config}
    flags = "".join(f" --{name} {value}" for name, value in named.items() if value is not None)
    return {
        "bench": options.what,
        "rounds": options.rounds,
        "device": options.device,
        "command": f"python -m scripts.bench {options.what}{flags}",
        "date": datetime.date.today().isoformat(),
        "hardware": runtime.hardware(),
        "versions": runtime.versions(),
        "results": entries,
    }


if __name__ == "__main__":
    sys.exit(main())
