"""Fourteen seeded faults are found with their reason, and clean folders are ok; docs/verify_tests.md has the table of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.verified_folders import ADAPTERS, FAULTS, TARGETS, TUNERS, Folders, clean_folders, faults, made

import vismt

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "verify_tests.md"
EVIDENCE = ("alone", "base", "merged")


def verdicts(folders: Folders) -> dict[str, vismt.Verdict]:
    """Return the verdicts on the adapter alone, with the base, and with base and merged checkpoint."""
    options = ({}, {"base": folders.base}, {"base": folders.base, "merged": folders.merged})
    return {name: vismt.verify(folders.adapter, **given) for name, given in zip(EVIDENCE, options, strict=True)}


def least(folders: Folders, fault: str) -> str:
    """Return the least evidence with which a fault is found for the right reason; fail where another reason decides alone."""
    change, codes = FAULTS[fault]
    change(folders)
    found = verdicts(folders)
    assert found["merged"].codes & codes, (fault, found["merged"].findings)
    return next(name for name in EVIDENCE if found[name].codes & codes)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str, llama: Folders, tmp_path: Path) -> None:
    line = next(line for line in GUIDE.read_text(encoding="utf8").splitlines() if line.startswith(f"| {fault} |"))
    of_guide = line.split(" | ")[4]  # the weaker of fp32 and bf16
    assert EVIDENCE.index(least(llama.copied(tmp_path), fault)) <= EVIDENCE.index(of_guide)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folders = made("llama", "lora", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)
    assert {verdict.status for verdict in verdicts(folders).values()} == {"ok"}
    return folders


@pytest.mark.slow
def test_the_table_of_the_guide_is_that_of_a_run(tmp_path: Path) -> None:
    """Each fault x model x adapter in fp32 and bf16: all found, and the guide says with which evidence."""
    cells: dict[str, list[str]] = {fault: [] for fault in FAULTS}
    for kind in TARGETS:
        for adapter in ADAPTERS:
            of_dtypes = []
            for dtype in (torch.float32, torch.bfloat16):
                folders = made(kind, adapter, tmp_path / f"{kind}{adapter}{dtype}", dtype=dtype)
                assert {verdict.status for verdict in verdicts(folders).values()} == {"ok"}
                copies = {fault: folders.copied(tmp_path / f"{kind}{adapter}{dtype}{fault}") for fault in faults(kind)}
                of_dtypes.append({fault: least(copy, fault) for fault, copy in copies.items()})
            for fault, row in cells.items():
                found = {of_dtype.get(fault, "–") for of_dtype in of_dtypes}
                row.append(max(found, key=("–", *EVIDENCE).index))
    lines = [f"| {fault} | {' | '.join(row)} |" for fault, row in cells.items()]
    (tmp_path / "table.md").write_text("\n".join(lines))
    text = GUIDE.read_text(encoding="utf8")
    assert [line for line in lines if line not in text] == []


@pytest.mark.slow
def test_clean_folders_are_ok(tmp_path: Path) -> None:
    count = 0
    for name, folders in clean_folders(tmp_path):
        merged = None if folders.merged == folders.base else folders.merged
        verdict = vismt.verify(folders.adapter, base=folders.base, merged=merged)
        if name.removeprefix("peft ") in TUNERS:  # whose updates are no pairs of factors
            assert verdict.codes == {"not-compared"}, (name, verdict.findings)
        elif name == "peft fresh":  # B is zero before training
            assert verdict.codes == {"no-update"}
        else:
            assert verdict.status == "ok", (name, verdict.findings)
        count += 1
    assert count >= 30
