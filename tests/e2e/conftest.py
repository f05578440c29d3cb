"""Fixtures of whole runs."""

from pathlib import Path

import pytest
from helpers.blank import empty_figures
from helpers.room import made_room


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """The folder of three tiny sets of images."""
    return made_room(tmp_path_factory.mktemp("sets"))


@pytest.fixture
def in_room(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read data sets from the room."""
    monkeypatch.setenv("VISMT_DATA", str(room / "data"))


@pytest.fixture(autouse=True)
def blank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures of a run within a test empty: axes take half of a report's time. Runs of modules have theirs."""
    if not {"painted", "drawn"} & {*request.fixturenames}:
        empty_figures(monkeypatch)
