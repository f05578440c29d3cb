"""What the `init.py` of the jobs share: `vismt init` writes a commented configuration of a job that runs as written.

The `init.py` of a job has its templates and INIT.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from vismt.base.errors import UserError
from vismt.storage.wheels import one_line

if TYPE_CHECKING:
    from vismt.data.images import ImageSet

Files = dict[str, str]  # content by name
CARD = "card.yaml"
OWN_CARD = f"./{CARD}"  # seen from the configuration
IMAGES_CARD = Template("""\
# A set of labelled images: what it is, and where it lies. Only name and sources are needed.
name: $name
# title, licence and citation are for readers; classes: N makes another number of classes an error.
sources:
  - kind: folder
    root: $root              # absolute, or below the folder of this file: then both can be moved and shared
    layout: "$layout"        # where the class folders are
    splits: {$splits}        # number of images of each split, null when unknown
# groups: groups.json          # images that belong in one part of a division; `vismt data check CARD --duplicates` writes it
""")


@dataclass(frozen=True)
class Init:
    """How `vismt init` begins a job.

    Args:
        files: Function of the job's name, the folder to write to and the user's data (None for none). It returns the content
            of each file by name and writes nothing.
        takes: Option that names the user's data: "images", a folder, or "texts", a file.
    """

    files: Callable[[str, Path, Path | None], Files]
    takes: str = "images"


def images_card(folder: Path, images: Path) -> tuple[ImageSet, str, Files]:
    """Return a folder's images, their name, and their card in `folder`."""
    from vismt.data.formats.folder import FolderSource
    from vismt.data.formats.plain_sets import plain_card
    from vismt.data.images import open_images

    card = plain_card(images)
    if card is None:
        raise UserError(f"init: --images {images}: no folder of images in it; need one for each class.")
    source = card.sources[0]
    assert isinstance(source, FolderSource)
    splits = ", ".join(f"{split}: null" for split in source.splits)
    name = set_name(images)
    text = IMAGES_CARD.substitute(name=quoted(name), root=place(images, folder), layout=source.layout, splits=splits)
    return open_images(card), name, {CARD: text}


def set_name(path: Path) -> str:
    """Return the name of a folder as a card and a task may be called, which begin with a letter or digit."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", path.name).lstrip("_.-") or "images"


def place(path: Path, folder: Path) -> str:
    """Return a path as the files of `folder` name it: relative if it lies inside, so that both can be moved."""
    return quoted(f"./{path.relative_to(folder).as_posix()}" if path.is_relative_to(folder) else path)


def quoted(value: object) -> str:
    """Return a text as YAML takes it, whatever is in it."""
    # YAML takes U+0085 as a line end, and no other control character.
    return re.sub(r"[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(str(value), ensure_ascii=False))


def config(job: str, template: Template, *, about: str, title: str, **values: object) -> Files:
    """Return the configuration of a job. about: What it is about, for the comment in its first line."""
    name = f"{job}.yaml"
    return {name: template.substitute(job=job, config=name, about=one_line(about), title=quoted(title), **values)}
