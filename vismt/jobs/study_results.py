"""The results of a study from Python: its rows, a table, a pandas frame, a report, and the trained models."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vismt.base import console
from vismt.base.errors import UserError
from vismt.base.objects import registered
from vismt.storage.files import cannot_write, check_name
from vismt.storage.locks import HOLDER, LOCK

if TYPE_CHECKING:
    import pandas
    from torch import nn

    from vismt.report.results import Result


@dataclass(frozen=True, repr=False)
class StudyResults:
    """The numbers of a run. Printing them gives a table.

    Attributes:
        folder: Run folder with records, adapters and report, as `vismt run` writes it.
        rows: Numbers with their intervals, n, and what was measured. A row with a seed is the number of a single training.
        objects: Python objects of the configuration, by name.
    """

    folder: Path
    rows: list[Result]
    objects: Mapping[str, Any] = field(default_factory=dict)
    # removed together with the last reference to the results
    _temporary: tempfile.TemporaryDirectory[str] | None = None

    def __iter__(self) -> Iterator[Result]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        """Return a table of the rows without a seed."""
        from vismt.report.tables import row_text, scale_text

        rows = [
            (
                row.data,
                row.task if row.task != row.data else "",
                row.protocol,
                row.condition,
                row.arm,
                scale_text(row.metric, row.scale),
                row_text(row),
                row.interval or "-",
                f"{row.n:,} {row.unit}",
            )
            for row in self.rows
            if row.seed is None
        ]
        heads = ("data", "task", "protocol", "condition", "model", "measure", "value", "95 % over", "n")
        return console.aligned(heads, rows)

    def to_pandas(self) -> pandas.DataFrame:
        """Return the rows as a table with a column for each field of `vismt.report.results.Result`.

        Raises:
            UserError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UserError("to_pandas: needs pandas, which is not installed: pip install pandas.") from error
        return pandas.DataFrame([asdict(row) for row in self.rows])

    def report(self, folder: str | Path | None = None) -> Path:
        """Write report.html, report.md and figures. Return the path of report.html.

        Args:
            folder: Folder that also gets the files of the run. None writes to the run folder, and for a temporary run to a copy
                in ./runs.

        Raises:
            UserError: If the folder holds another run, or matplotlib is not installed.
        """
        from vismt.jobs import open_run
        from vismt.report.plotting import need_matplotlib

        need_matplotlib()
        return open_run(self.kept_folder() if folder is None else self._copied(Path(folder))).job.report()[-1]

    def kept_folder(self) -> Path:
        """Return the run folder. A temporary run is copied to ./runs, where it stays."""
        from vismt.jobs import read_resolved, run_folder

        if self._temporary is None:
            return self.folder
        config = read_resolved(self.folder)
        return self._copied(run_folder(config, config.task, Path("runs")))

    def _copied(self, target: Path) -> Path:
        """Return another folder with the files of the run. Raise UserError if the folder holds another run."""
        from vismt.jobs import RESOLVED, read_resolved, refuse_other_run

        check_name(target)
        if target.resolve() != self.folder.resolve():
            if (target / RESOLVED).exists():
                refuse_other_run(target, read_resolved(self.folder))
            try:
                shutil.copytree(self.folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(LOCK, HOLDER))
            except OSError as error:
                raise cannot_write(target, error) from error
        return target

    def model(self, arm: str | None = None) -> nn.Module:
        """Return a trained stock model with merged weights.

        Args:
            arm: Name of the arm in the printed table, also "arm:seed". None and "best" choose the arm that is best on
                validation examples.

        Raises:
            UserError: If the run trains nothing, the arm is unknown, or the model is merged anew for every task.
        """
        from vismt.jobs import open_run

        with registered(self.objects):
            job = open_run(self.folder).job
            return job.merged(job.chosen_arm(arm))
