"""Refused configurations: one line and exit code 2 before any training. The files of messages/ have a base and its changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import pyramids  # noqa: F401  registers short_vit
from helpers.tiny_runs import refused, written

FILES = sorted((Path(__file__).parent / "messages").glob("*.yaml"))
TABLES = {path.stem: yaml.safe_load(path.read_text(encoding="utf8")) for path in FILES}
ROWS = [(name, *row) for name, table in TABLES.items() for row in table["refused"]]


@pytest.mark.parametrize(("name", "changes", "words"), ROWS, ids=[f"{row[0]}-{'-'.join(row[1])}" for row in ROWS])
def test_a_refused_configuration_is_one_line(
    name: str, changes: dict[str, Any], words: str | list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / f"{name}.yaml", TABLES[name]["base"])
    overrides = [
        f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()}"
        for key, value in changes.items()
    ]
    error = refused(capsys, "run", path, *overrides, "--out", tmp_path / "runs", "--quiet")
    assert all(word in error for word in ([words] if isinstance(words, str) else words))
    assert not list(tmp_path.rglob("metrics.jsonl"))
