"""Run the notebooks of examples/notebooks in an empty folder and keep their outputs.

python -m scripts.notebooks                 all of them
python -m scripts.notebooks own_images      one of them
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from vismt.base import console
from vismt.base.errors import require_known
from vismt.storage.files import atomic_write
from vismt.storage.paths import CHECKOUT

FOLDER = CHECKOUT / "examples/notebooks"
SECONDS = 3600  # for one cell, on a busy machine


def executed(path: Path, folder: Path) -> Any:
    """Return a notebook after its cells were run in `folder`. Raises CellExecutionError if a cell fails."""
    import nbformat
    from nbclient import NotebookClient

    os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=SECONDS, resources={"metadata": {"path": str(folder)}}, record_timing=False
    )
    client.execute()
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def main() -> None:
    """Run the named notebooks and write them with their outputs."""
    import nbformat

    names = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks (all)")
    chosen = parser.parse_args().names or names
    require_known("notebook", chosen, names)
    for name in chosen:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(FOLDER / f"{name}.ipynb", Path(folder))
        atomic_write(FOLDER / f"{name}.ipynb", nbformat.writes(notebook) + "\n")
        console.stage("notebook", f"{name}: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
