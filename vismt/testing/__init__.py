"""Checks of a method that you write: what `vismt.adapt` promises of every method."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vismt.testing.method_contract import check_method as check_method

from vismt.base.exports import exports

__getattr__, __dir__ = exports(__name__)
