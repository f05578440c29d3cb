"""Every claim of the papers has a verdict that follows from committed rows, or names what is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.pages import ROOT

from scripts import claim_rules as rules
from scripts import claims, committed, tables
from scripts.claim_rules import ClaimEvidence, of_study, read_claims
from scripts.study_rows import read_study, studies
from vismt.base.errors import UserError

PAPERS = read_claims()
EVIDENCE = [evidence for paper in PAPERS for claim in paper.claims for evidence in claim.shown]
STUDIED = [evidence for evidence in EVIDENCE if evidence.study]
NOT_RUN = 0  # verdicts of studies that were not run, which may only become fewer


def test_every_claim_has_evidence_and_is_stated_once() -> None:
    stated = [claim.claim for paper in PAPERS for claim in paper.claims]
    assert len(stated) >= 35 and len(set(stated)) == len(stated)
    assert all(claim.shown for paper in PAPERS for claim in paper.claims)


def test_verdicts_without_rows_only_become_fewer() -> None:
    missing = [evidence for evidence in STUDIED if evidence.study not in studies()]
    assert len(missing) == NOT_RUN and all(evidence.verdict == "undecided" for evidence in missing)


def test_a_study_that_was_not_run_has_a_configuration_with_its_arms() -> None:
    for evidence in STUDIED:
        if evidence.study in studies():
            continue
        text = (ROOT / "configs" / f"{evidence.config}.yaml").read_text(encoding="utf8")
        named = [arm.removeprefix("expert:").partition(":")[0] for arm in (evidence.arm, evidence.minus) if arm]
        assert all(re.search(rf"\b{re.escape(name)}\b", text) for name in named), evidence


@pytest.mark.parametrize("evidence", [e for e in EVIDENCE if e.test], ids=lambda e: e.test.partition("::")[2])
def test_a_test_that_shows_a_claim_exists(evidence: ClaimEvidence) -> None:
    path, _, name = evidence.test.partition("::")
    assert f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf8")


def test_a_verdict_that_no_longer_follows_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (ROOT / "docs/results/rows/claims.yaml").read_text(encoding="utf8")
    stated = 'arm: "expert:3", minus: clean, domains: true, above: 0, verdict: undecided'
    (tmp_path / "claims.yaml").write_text(text.replace(stated, stated.replace("undecided", "does not hold"), 1))
    monkeypatch.setattr(rules, "shipped", lambda _: tmp_path)
    with pytest.raises(
        UserError, match=r"'does not hold', but 'undecided' follows from −3.3 ± 5.7 of study 'amt_small'"
    ):
        claims.sections()


def test_a_comparison_that_cannot_tell_is_not_evidence_whatever_its_interval() -> None:
    """Weights of a file of four bits are on a grid before an arm rounds them."""
    quantized = [evidence for evidence in STUDIED if evidence.study == "quantized"]
    assert quantized and {evidence.verdict for evidence in quantized} == {"not evidence"}
    for evidence in quantized:
        row = committed.study("quantized").find(evidence.row, "here")
        assert evidence.follows(row) == "not evidence" and "4-bit grid" in evidence.note + quantized[0].note
    with pytest.raises(UserError, match="say in `note` why it is not evidence"):
        ClaimEvidence(study="quantized", arm="qpissa", below=0, verdict="not evidence")


def test_differences_of_claims_are_kept_with_a_study(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    rows = read_study(studies()["quickstart"])
    monkeypatch.setattr(tables, "study_of", lambda run, pairs: asked.extend(pairs) or rows)
    monkeypatch.setattr(tables, "write_study", lambda path, study: None)
    tables.add(Path("run"), "polar_rank")
    claimed = {(evidence.arm, evidence.minus) for _, evidence in of_study(PAPERS, "polar_rank")}
    assert claimed and claimed <= set(asked)
