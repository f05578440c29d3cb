"""Write docs/benchmarks.md from the files of docs/benchmarks/, which `python -m scripts.bench NAME --json FILE` writes.

python -m scripts.bench core --json docs/benchmarks/core.json
python scripts/benchmarks.py
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from pathlib import Path
from typing import Any

from vismt.base import console
from vismt.base.errors import UserError
from vismt.storage.files import atomic_write

DOCS = Path(__file__).resolve().parent.parent / "docs"
BENCHES = DOCS.parent / "scripts/bench"
HEAD = """# Benchmarks

How much time and memory vismt needs, against another library or a plain loop. A ratio below 1 means that the first of two needs
less. "Aim" was set before the measurement, and "reached" says whether the ratio meets the aim.

```bash
python -m scripts.bench core --rounds 5 --device cpu     # in a clone
```

Each ratio is the median over the rounds, with the smallest and the largest ratio beside it. The candidates of a round run one
after the other in rotating order. On a CPU, times are CPU seconds on one thread. The top of each file in `scripts/bench/` says
what the bench measures. `python scripts/benchmarks.py` made this page from the files in `benchmarks/`. Benches without a
section here were [measured earlier](benchmarks/earlier.md).
"""
COLUMNS = ("Task", "Ratio", "Median", "Smallest", "Largest", "Aim", "Reached")
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
    doc = ast.get_docstring(ast.parse((BENCHES / f"{content['bench']}.py").read_text(encoding="utf8"))) or ""
    lines = [
        f"## {content['bench']}",
        "",
        f"{doc.splitlines()[0].partition('`: ')[2]}{content.get('note', '')}",
        "",
        _row(COLUMNS),
        _row("---" for _ in COLUMNS),
    ]
    for result in content["results"]:
        for number, comparison in enumerate(result["comparisons"]):
            lines.append(_row(cells("" if number else result["title"].replace("; ", ", "), comparison)))
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
    made = f"`{content['command']}`, {content['rounds']} rounds, {content['date']}. {content['hardware']}. {versions}."
    return "\n".join([*lines, "", made, ""])


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
