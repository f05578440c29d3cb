"""The claims of the papers as data, and the verdict on each claim that follows from the rows of a study.

docs/results/rows/claims.yaml has the claims of every method. Each claim names the numbers that test it here. A number is one
row of a study, of an arm or of a difference of two arms, in the units in which tables show it.

    above or below   the line beyond which the claim is true at all: above 0, or above -2 for "at most two points less"
    claimed          the size that the paper reports; without it the line itself

The verdict follows from the row's 95 % interval:

                            reaches the claimed size    does not
    wholly beyond the line  holds                       holds weaker
    not wholly              undecided                   does not hold

A claim therefore fails only if its effect, or the claimed size of it, is excluded. It does not fail if it is merely not shown.
A claim that no row can show has a test that shows it, or the reason why it cannot be tested here. A row whose protocol cannot
tell is "not evidence" for any interval, and its note says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Annotated

from scripts.study_rows import ROWS, StudyRow, StudyRows
from vismt.base.errors import UserError
from vismt.config.typed import Names, build
from vismt.config.yaml_text import read_yaml
from vismt.storage.paths import shipped
from vismt.uncertainty.intervals import SHARE

HOLDS, WEAKER, FAILS, UNDECIDED = "holds", "holds weaker", "does not hold", "undecided"
NOT_HERE = "not testable here"
NO_EVIDENCE = "not evidence"
VERDICTS = (HOLDS, WEAKER, FAILS, UNDECIDED, NO_EVIDENCE)
CLAIMS = "claims.yaml"


@dataclass(frozen=True)
class ClaimEvidence:
    """The test of a claim: a row of a study, a test of the repository, or the reason why nothing here can test it.

    Args:
        study: Name of the study.
        page: Page of the study in docs/, if it is not results/STUDY.
        config: Name of the configuration of a study that has no page yet.
        task: Field of the row, like data, protocol, condition, metric, arm and minus. null if the other fields name the row.
        domains: Whether the claim is about unseen domains. Then the wider of two intervals decides: the row's interval, and the
            interval over its sets as a sample of domains.
        above: Line that the effect has to exceed.
        below: Line that the effect has to stay under.
        claimed: Size of the effect in the paper.
        verdict: Verdict that follows. "not evidence" if the protocol cannot tell, for the reason in `note`.
        test: Name (path::name) of a test that shows the claim.
        why: Reason why the claim cannot be tested here.
        note: Remark on the protocol.
    """

    study: str = ""
    page: str = ""
    config: str = ""
    task: str | None = None
    data: str = "average"
    protocol: str | None = None
    condition: str = "clean"
    metric: str = "accuracy"
    arm: str = ""
    minus: str = ""
    domains: bool = False
    above: float | None = None
    below: float | None = None
    claimed: float | None = None
    verdict: Annotated[str, Names(VERDICTS, only=True)] = UNDECIDED
    test: str = ""
    why: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if [bool(self.study), bool(self.test), bool(self.why)].count(True) != 1:
            raise UserError("claims: evidence has one of study, test and why.")
        if self.study and (not self.arm or (self.above is None) == (self.below is None)):
            raise UserError(f"claims: study '{self.study}': name the arm, and one of above and below.")
        if self.verdict == NO_EVIDENCE and not self.note:
            raise UserError(f"claims: study '{self.study}': say in `note` why it is {NO_EVIDENCE}.")

    @property
    def row(self) -> dict[str, str]:
        """Values that the row has."""
        names = ("task", "data", "protocol", "condition", "metric", "arm", "minus")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def find(self, study: StudyRows, where: str) -> StudyRow:
        """Return the row of a study with the interval that decides. Raises UserError, with `where`, if it is not one row."""
        row = study.find(self.row, where)
        return max((row, study.over_domains(row, where)), key=attrgetter("half")) if self.domains else row

    def follows(self, row: StudyRow) -> str:
        """Return the verdict that follows from a row with the interval that decides."""
        if self.verdict == NO_EVIDENCE:
            return NO_EVIDENCE
        factor = 100 if row.scale == SHARE else 1
        ends = sorted((factor * row.low, factor * row.high))
        if self.below is not None:  # the same rule on the mirrored line
            ends, line, size = [-ends[1], -ends[0]], -self.below, self.claimed and -self.claimed
        else:
            line, size = self.above or 0.0, self.claimed
        beyond = ends[0] > line
        reaches = ends[1] > line if size is None else ends[1] >= size
        if beyond:
            return HOLDS if reaches else WEAKER
        return UNDECIDED if reaches else FAILS


@dataclass(frozen=True)
class Claim:
    """A claim of a paper in one sentence, and what tests it."""

    claim: str
    shown: list[ClaimEvidence] = field(default_factory=list)


@dataclass(frozen=True)
class Paper:
    """The claims of one paper.

    title: Heading of its part of the page. page: Documentation of its method. source: Link to the paper.
    """

    title: str
    page: str
    source: str
    claims: list[Claim]


def read_claims() -> list[Paper]:
    """Return the claims. Return [] if there are none."""
    path = shipped(ROWS) / CLAIMS
    if not path.is_file():
        return []
    return [build(Paper, values, f"{path}: {name}") for name, values in read_yaml(path, str(path)).items()]


def of_study(papers: Sequence[Paper], study: str) -> list[tuple[str, ClaimEvidence]]:
    """Return the claims that a study tests, each with its evidence."""
    claims = [claim for paper in papers for claim in paper.claims]
    return [(claim.claim, evidence) for claim in claims for evidence in claim.shown if evidence.study == study]


def contradict(first: str, second: str) -> bool:
    """Return whether one verdict says that a claim is true, to any extent, and the other says that it is not."""
    return FAILS in (first, second) and bool({HOLDS, WEAKER} & {first, second})
