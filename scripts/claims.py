"""The tables of docs/claims.md, from docs/results/rows/claims.yaml and the rows of the studies: `python -m scripts.tables`."""

from __future__ import annotations

from scripts.committed import interval_text, study
from vismt.base.errors import UserError
from vismt.report.claims import CLAIMS, NOT_HERE, Claim, Evidence, Paper, read_claims
from vismt.report.study_rows import ROWS, StudyRow, studies
from vismt.report.tables import scale_text, typographic
from vismt.storage.paths import CHECKOUT
from vismt.uncertainty.intervals import interval_kind_text

HEADS = ("Claim", "Tested here by", "Effect", "Verdict")


def sections() -> str:
    """Return a part of the page for every paper."""
    return "\n".join(_section(paper) for paper in read_claims())


def _section(paper: Paper) -> str:
    lines = [f"\n## {paper.title}\n", f"[Method]({paper.page}), [paper]({paper.source}).\n"]
    lines += [_line(HEADS), "|" + "---|" * len(HEADS)]
    kinds: dict[str, None] = {}
    for claim in paper.claims:
        for number, evidence in enumerate(claim.shown):
            row = _row(claim, evidence)
            kinds |= {interval_kind_text(row.interval): None} if row else {}
            lines.append(_line((claim.claim if number == 0 else "", *_cells(evidence, row))))
    return "\n".join([*lines, *([f"\n*Intervals: {'; '.join(kinds)}.*"] if kinds else []), ""])


def _line(texts: tuple[str, ...]) -> str:
    return f"| {' | '.join(texts)} |"


def _row(claim: Claim, evidence: Evidence) -> StudyRow | None:
    """Return the row of a claim, None where it has none; raise UserError where the stated verdict does not follow from it."""
    if evidence.study not in studies():
        return None
    row = study(evidence.study).find(evidence.row, f"claims: study '{evidence.study}'")
    follows = evidence.follows(row)
    if follows != evidence.verdict:
        raise UserError(
            f"claims: '{claim.claim}' has the verdict '{evidence.verdict}', but '{follows}' follows from "
            f"{interval_text(row)} of study '{evidence.study}'; state it in {ROWS}/{CLAIMS}."
        )
    return row


def _cells(evidence: Evidence, row: StudyRow | None) -> tuple[str, str, str]:
    """Return what tests a claim, the effect, and the verdict."""
    if evidence.why:
        return "", "", f"{NOT_HERE}: {evidence.why}"
    if evidence.test:
        note = f"; {evidence.note}" if evidence.note else ""
        return f"`{evidence.test}`{note}", "exact", f"**{evidence.verdict}**"
    metric = evidence.metric if row is None else scale_text(row.metric, row.scale)
    condition = "" if evidence.condition == "clean" else f" under {evidence.condition}"
    arms = " − ".join(filter(None, (evidence.arm, evidence.minus)))
    parts = (f"{_link(evidence)}: {metric}{condition}, {evidence.data}, {arms}", evidence.note, needed(evidence))
    tested = "; ".join(filter(None, parts))
    if row is None:
        return tested, "", f"**{evidence.verdict}** (not run: `vismt run {evidence.config}`)"
    seeds = len(study(evidence.study).trainings(row)) or 1
    return tested, f"{interval_text(row)}, n = {row.n:,} {row.unit}, seeds: {seeds}", f"**{evidence.verdict}**"


def needed(evidence: Evidence) -> str:
    """Return the line of a claim and the size in the paper."""
    sign, line = (">", evidence.above) if evidence.above is not None else ("<", evidence.below)
    text = f"{sign} {typographic(f'{line:g}')}"
    return text if evidence.claimed is None else f"{text}, paper {typographic(f'{evidence.claimed:+g}')}"


def _link(evidence: Evidence) -> str:
    page = f"{evidence.page or f'results/{evidence.study}'}.md"
    return f"[{evidence.study}]({page})" if (CHECKOUT / "docs" / page).exists() else evidence.study
