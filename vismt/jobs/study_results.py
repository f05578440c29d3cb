"""What a study from Python returns: the rows of its results, as a table, for pandas, as a report, and the trained models."""

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
from vismt.storage.locks import HOLDER, LOCK

if TYPE_CHECKING:
    import pandas
    from torch import nn

    from vismt.report.results import Result


@dataclass(frozen=True, repr=False)
class StudyResults:
    """The numbers of a run.

    Attributes:
        folder: the run folder, as of `vismt run`: records, adapters, report.
        rows: the numbers with intervals, n and what they were measured on; rows with a seed are those of single trainings.
        objects: the Python objects of the configuration, by name.
    """

    folder: Path
    rows: list[Result]
    objects: Mapping[str, Any] = field(default_factory=dict)
    _temporary: tempfile.TemporaryDirectory[str] | None = None  # removed with the last reference to the results

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
            UserError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UserError("to_pandas: needs pandas, which is not installed: pip install pandas.") from error
        return pandas.DataFrame([asdict(row) for row in self.rows])

    def report(self, folder: str | Path | None = None) -> Path:
        """Write report.html, report.md and figures; return the path of report.html.

        Args:
            folder: also gets the run's files; None for the run folder.

        Raises:
            UserError: a folder that holds another run, and where matplotlib is not installed.
        """
        from vismt.jobs import RESOLVED, open_run, read_resolved, refuse_other_run
        from vismt.report.plotting import need_matplotlib

        need_matplotlib()
        target = self.folder
        if folder is not None and Path(folder).resolve() != target.resolve():
            target = Path(folder)
            if (target / RESOLVED).exists():
                refuse_other_run(target, read_resolved(self.folder))
            shutil.copytree(self.folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(LOCK, HOLDER))
        return open_run(target).job.report()[-1]

    def model(self, arm: str | None = None) -> nn.Module:
        """Return a trained stock model with merged weights.

        Args:
            arm: a name of the printed table or of an arm, also "arm:seed". None and "best" stand for the arm that is best on
                validation.

        Raises:
            UserError: a run that trains nothing, an unknown arm, and a model that is merged anew for every task.
        """
        from vismt.jobs import open_run

        with registered(self.objects):
            job = open_run(self.folder).job
            return job.merged(job.chosen_arm(arm))
