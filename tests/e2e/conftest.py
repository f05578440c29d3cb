"""Fixtures of whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.room import made_room


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """The folder of three tiny sets of images."""
    return made_room(tmp_path_factory.mktemp("sets"))


@pytest.fixture
def in_room(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read data sets from the room."""
    monkeypatch.setenv("VISMT_DATA", str(room / "data"))


class Blank:
    """Axes, or what is drawn into them, that take every call and draw nothing."""

    def __getattr__(self, name: str) -> Blank:
        return self

    def __getitem__(self, key: object) -> Blank:
        return self

    def __call__(self, *arguments: object, **options: object) -> Blank:
        return self

    def values(self) -> tuple[()]:
        return ()

    def get_xlim(self) -> tuple[float, float]:
        return 0.0, 1.0

    get_ylim = get_xlim


@pytest.fixture(autouse=True)
def blank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures of a run within a test empty: axes take half of a report's time. Runs of modules have theirs."""
    if not {"painted", "drawn"} & {*request.fixturenames}:
        for name in ("add_axes", "legend", "text", "colorbar"):
            monkeypatch.setattr(f"matplotlib.figure.Figure.{name}", lambda *_, **__: Blank())
