"""The tables of docs/claims.md, from docs/results/rows/claims.yaml and the rows of the studies: `python -m scripts.tables`."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.claim_rules import (
    CLAIMS,
    FAILS,
    HOLDS,
    NO_EVIDENCE,
    NOT_HERE,
    WEAKER,
    Claim,
    ClaimEvidence,
    Paper,
    read_claims,
)
from scripts.committed import both_intervals, interval_text, study
from scripts.study_rows import ROWS, StudyRow, studies
from vismt.base.errors import UserError
from vismt.report.tables import scale_text, typographic
from vismt.storage.paths import CHECKOUT
from vismt.uncertainty.intervals import interval_kind_text

TWICE, ONCE, MIXED, REFUTED, NOT_TESTED = (
    "Holds exactly, or on two models",
    "Holds on one model",
    "Undecided, or tests differ",
    "Does not hold",
    "Not testable here",
)
OUTCOMES = (TWICE, ONCE, MIXED, REFUTED, NOT_TESTED)
HEADS = ("Claim", "Tested here by", "Model", "Holds if", "Effect", "Verdict")


def sections() -> str:
    """Return the table of what was found of every paper, and a part of the page for each."""
    papers = read_claims()
    lines = ["", _line(("Paper", *OUTCOMES)), "|" + "---|" * (1 + len(OUTCOMES))]
    for paper in papers:
        cells = {
            outcome: "<br>".join(f"• {c.claim}" for c in paper.claims if _outcome(c) == outcome) for outcome in OUTCOMES
        }
        lines.append(_line((f"[{paper.title}]({paper.page})", *cells.values())))
    return "\n".join([*lines, "", *map(_section, papers)])


def _outcome(claim: Claim) -> str:
    """Return the column of a claim in the table of what was found."""
    verdicts = {evidence.verdict for evidence in claim.shown if not evidence.why} - {NO_EVIDENCE}
    if not verdicts:
        return NOT_TESTED
    if verdicts <= {HOLDS, WEAKER}:
        tests = [evidence for evidence in claim.shown if evidence.verdict in (HOLDS, WEAKER)]
        models = {*map(_model, tests)} - {""}
        return TWICE if len(models) > 1 or any(evidence.test for evidence in tests) else ONCE
    return REFUTED if FAILS in verdicts and not verdicts & {HOLDS, WEAKER} else MIXED


def _model(evidence: ClaimEvidence) -> str:
    """Return the name of the model of a study, "" if there is no study."""
    return str(study(evidence.study).about.settings["model"]["name"]) if evidence.study in studies() else ""


def _section(paper: Paper) -> str:
    lines = [f"\n## {paper.title}\n", f"[Method]({paper.page}), [paper]({paper.source}).\n"]
    lines += [_line(HEADS), "|" + "---|" * len(HEADS)]
    kinds: dict[str, None] = {}
    for claim in paper.claims:
        for number, evidence in enumerate(claim.shown):
            rows = _rows(claim, evidence)
            kinds |= {interval_kind_text(row.interval): None for row in rows}
            lines.append(_line((claim.claim if number == 0 else "", *_cells(evidence, rows))))
    return "\n".join([*lines, *([f"\n*Intervals: {'; '.join(kinds)}.*"] if kinds else []), ""])


def _line(texts: tuple[str, ...]) -> str:
    return f"| {' | '.join(texts)} |"


def _rows(claim: Claim, evidence: ClaimEvidence) -> list[StudyRow]:
    """Return the row of a claim, for one about domains also with the interval over domains; [] where it has none.

    Raises UserError where the stated verdict does not follow from them.
    """
    if evidence.study not in studies():
        return []
    of, where = study(evidence.study), f"claims: study '{evidence.study}'"
    row = evidence.find(of, where)
    follows = evidence.follows(row)
    if follows != evidence.verdict:
        raise UserError(
            f"claims: '{claim.claim}' has the verdict '{evidence.verdict}', but '{follows}' follows from "
            f"{interval_text(row)} of study '{evidence.study}'; state it in {ROWS}/{CLAIMS}."
        )
    found = of.find(evidence.row, where)
    return [found, of.over_domains(found, where)] if evidence.domains else [found]


def _cells(evidence: ClaimEvidence, rows: Sequence[StudyRow]) -> tuple[str, ...]:
    """Return what tests a claim, on which model, when it holds, the effect, and the verdict."""
    if evidence.why:
        return "", "", "", "", f"{NOT_HERE}: {evidence.why}"
    note = f" ({evidence.note})" if evidence.note else ""
    if evidence.test:
        return f"`{evidence.test}`{note}", "tiny models", "the test passes", "exact", f"**{evidence.verdict}**"
    metric = scale_text(rows[0].metric, rows[0].scale) if rows else evidence.metric
    condition = "" if evidence.condition == "clean" else f" under {evidence.condition}"
    arms = " − ".join(filter(None, (evidence.arm, evidence.minus)))
    tested = f"{_link(evidence)}: {arms}, {metric}{condition}, {evidence.data}{note}"
    if not rows:
        return tested, "", needed(evidence), "", f"**{evidence.verdict}** (not run: `vismt run {evidence.config}`)"
    row, seeds = rows[0], len(study(evidence.study).trainings(rows[0])) or 1
    effect = both_intervals(*rows) if evidence.domains else interval_text(row)
    size = f"n = {row.n:,} {row.unit}, seeds: {seeds}"
    return tested, f"`{_model(evidence)}`", needed(evidence), f"{effect}, {size}", f"**{evidence.verdict}**"


def needed(evidence: ClaimEvidence) -> str:
    """Return the line of a claim and the size in the paper."""
    sign, line = (">", evidence.above) if evidence.above is not None else ("<", evidence.below)
    text = f"{sign} {typographic(f'{line:g}')}"
    text += " over domains" if evidence.domains else ""
    return text if evidence.claimed is None else f"{text}, paper {typographic(f'{evidence.claimed:+g}')}"


def _link(evidence: ClaimEvidence) -> str:
    page = f"{evidence.page or f'results/{evidence.study}'}.md"
    return f"[{evidence.study}]({page})" if (CHECKOUT / "docs" / page).exists() else evidence.study
