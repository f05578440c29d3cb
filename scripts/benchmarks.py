"""Write docs/benchmarks.md from the files of docs/benchmarks/, which `python -m scripts.bench NAME --json FILE` writes.

python -m scripts.bench core --json docs/benchmarks/core.json
python scripts/benchmarks.py
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vismt.base import console
from vismt.base.errors import UserError
from vismt.storage.files import atomic_write

DOCS = Path(__file__).resolve().parent.parent / "docs"
HEAD = """# Benchmarks

Each table compares vismt with another library or with a plain loop. A ratio below 1 means that the first takes less time or
memory; "reached" says whether an aim that was set before the measurement is met.

A ratio is the median over the rounds, with the smallest and the largest beside it. The candidates of a round run one after the
other in rotating order. On a CPU, times are CPU seconds on one thread. What each bench measures stands at the top of its
file in `scripts/bench/`. `python scripts/benchmarks.py` made this page from the files in `benchmarks/`;
benches without a section here were [measured earlier](benchmarks/earlier.md).
"""
COLUMNS = ("", "ratio of", "", "min", "max", "aim", "reached")
NEEDED = ("bench", "rounds", "command", "date", "hardware", "versions", "results")


def page(paths: list[Path]) -> str:
    """Return the page made from the files of several benches."""
    return "\n".join([HEAD, *(section(read(path)) for path in sorted(paths))])


def read(path: Path) -> dict[str, Any]:
    """Return the content of a bench's file; raise UserError for another file."""
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or not all(name in content for name in NEEDED):
        raise UserError(f"'{path}' is not what `python -m scripts.bench NAME --json FILE` writes; run the bench again.")
    return content


def section(content: dict[str, Any]) -> str:
    """Return the section of one bench; "note" may be added to its file by hand, to say what was special."""
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    lines = [
        f"## {content['bench']}",
        "",
        f"`{content['command']}`, {content['rounds']} rounds, {content['date']}. {content['hardware']}; {versions}."
        f"{content.get('note', '')}",
        "",
        _row(COLUMNS),
        _row("---" for _ in COLUMNS),
    ]
    for result in content["results"]:
        lines += [_row(cells(result["title"], comparison)) for comparison in result["comparisons"]]
    for result in content["results"]:
        if "table" in result:
            heads, *rows = result["table"]
            lines += [
                "",
                f"{result['title']}. {result['note']}",
                "",
                _row(heads),
                _row("---" for _ in heads),
                *map(_row, rows),
            ]
    return "\n".join([*lines, ""])


def cells(title: str, comparison: dict[str, Any]) -> list[str]:
    """Return the cells of one ratio."""
    ratio, low, high = (f"{comparison[key]:.3f}" for key in ("ratio", "low", "high"))
    what = f"{comparison['what']}: {comparison['name']} / {comparison['base']}"
    if comparison["target"] is None:
        return [title, what, ratio, low, high, "", ""]
    reached = comparison["ratio"] <= comparison["target"]
    return [title, what, ratio, low, high, f"at most {comparison['target']:.2f}", "yes" if reached else "no"]


def _row(values: Any) -> str:
    return f"| {' | '.join(values)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of benchmarks/ and benchmarks.md (docs)")
    docs = parser.parse_args().docs
    try:
        paths = list((docs / "benchmarks").glob("*.json"))
        if not paths:
            raise UserError(
                f"'{docs / 'benchmarks'}' has no file; write one with `python -m scripts.bench core --json FILE`."
            )
        atomic_write(docs / "benchmarks.md", page(paths))
    except UserError as error:
        console.error(str(error))
        return 2
    console.stage("bench", f"written to {docs / 'benchmarks.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
