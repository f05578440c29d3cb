"""Where things lie: the user's data, the cache and the cards that travel with the package."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from vismt.errors import UserError

CHECKOUT = Path(__file__).resolve().parent.parent


def data_root() -> Path | None:
    """`VISMT_DATA`, else a folder `shared/data` beside the checkout, else None."""
    named = os.environ.get("VISMT_DATA")
    if named:
        root = Path(named).expanduser()
        if not root.is_dir():
            raise UserError(f"VISMT_DATA is '{named}', which is not a folder: set it to where your image sets lie.")
        return root
    beside = CHECKOUT.parent / "shared" / "data"
    return beside if beside.is_dir() else None


def cache_root() -> Path:
    """`VISMT_CACHE`, else ~/.cache/vismt. It is not created here."""
    return Path(os.environ.get("VISMT_CACHE", "~/.cache/vismt")).expanduser()


def shipped(folder: str) -> Path:
    """`datasets` or `configs`: beside the package in a checkout, under <prefix>/share/vismt in an installed wheel."""
    beside = CHECKOUT / folder
    return beside if beside.is_dir() else Path(sys.prefix) / "share" / "vismt" / folder
