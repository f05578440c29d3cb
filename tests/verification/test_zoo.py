"""Healthy folders of many models and settings are never called broken, and faults in them are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.verify_zoo import ALONE, BASE, FAULTS, HEALTHY, JUNK, healthy

import vismt
from vismt.cli import main

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "verify.md"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return tmp_path_factory.mktemp("zoo")


@pytest.mark.parametrize("case", HEALTHY)
def test_a_healthy_folder_is_ok(case: str, root: Path) -> None:
    folders = healthy(case, root)
    verdicts = [
        vismt.verify(folders.adapter),
        vismt.verify(folders.adapter, base=folders.base),
        vismt.verify(folders.adapter, base=folders.base, merged=folders.merged),
        vismt.verify(folders.base),
        vismt.verify(folders.merged),
    ]
    assert [verdict.status for verdict in verdicts] == ["ok"] * 5, [verdict.findings for verdict in verdicts]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str, root: Path, tmp_path: Path) -> None:
    case, evidence, change = FAULTS[fault]
    folders = healthy(case, root).copied(tmp_path)
    change(folders)
    options = {} if evidence == ALONE else {"base": folders.base}
    if evidence not in (ALONE, BASE):
        options["merged"] = folders.merged
    verdict = vismt.verify(folders.adapter, **options)
    assert verdict.status != "ok", verdict.findings
    json.dumps(verdict.as_json())


@pytest.mark.parametrize("damage", JUNK)
@pytest.mark.parametrize("which", ["adapter", "base", "merged"])
def test_a_damaged_file_is_broken_with_an_exit_code_and_json(
    which: str, damage: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = {"adapter": "tensors"}.get(which, which)
    case, _, change = FAULTS[f"{prefix}: {damage}"]
    folders = healthy(case, root).copied(tmp_path)
    change(folders)
    words = ["--base", str(folders.base), "--merged", str(folders.merged), "--json", str(tmp_path / "verdict.json")]
    assert main(["verify", str(folders.adapter), *words]) == 4
    assert json.loads((tmp_path / "verdict.json").read_text())["status"] == "broken"
    assert main(["verify", str(getattr(folders, which))]) == 4
    assert "Traceback" not in capsys.readouterr().err


def test_the_zoo_is_as_large_as_the_guide_says() -> None:
    text = GUIDE.read_text(encoding="utf8")
    assert f"{len(HEALTHY)} folders without a fault" in text and f"{len(FAULTS)} faults" in text
    assert len(HEALTHY) >= 123 and len(FAULTS) >= 112
