"""Registry: look-up, near names, lazily imported files."""

from __future__ import annotations

import sys

import pytest

from vismt.base.errors import UserError
from vismt.base.registry import Registry


def test_register_and_look_up() -> None:
    shapes: Registry[type] = Registry("shape: no shape")

    @shapes.register("square")
    class Square: ...

    assert shapes.add("circle", int) is int
    assert shapes["square"] is Square and list(shapes) == ["circle", "square"]
    assert "square" in shapes and "cube" not in shapes and len(shapes) == 2
    assert shapes.get("cube") is None and dict(shapes) == {"circle": int, "square": Square}


def test_unknown_name_lists_near_names() -> None:
    shapes: Registry[int] = Registry("shape: no shape")
    shapes.add("circle", 1)
    with pytest.raises(UserError, match=r"shape: no shape 'circel'. Near: 'circle'."):
        shapes["circel"]


def test_a_module_is_imported_when_its_name_is_looked_up(tmp_path, monkeypatch) -> None:
    (tmp_path / "late_shapes.py").write_text("import test_registry\ntest_registry.LATE.add('late', 1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "test_registry", sys.modules[__name__])
    assert list(LATE) == ["late"] and "late" in LATE and not LATE._items
    assert LATE["late"] == 1


LATE: Registry[int] = Registry("late: no entry", {"late": "late_shapes"})
