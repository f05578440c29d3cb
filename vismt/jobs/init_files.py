"""`vismt init`: a commented configuration of a job that runs as written, from templates beside the modules of the job.

`start.yaml` of a job is the template. `$job` and `$config` are the job and the name of the file. `$lr` is LoRA's learning rate
as studies chose it (docs/rates.md), `$rates` has three rates around it, and `$rate_METHOD` is the rate of a method in units of
LoRA's rate. A job that fills in more has INIT in `init.py`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from string import Template

from vismt.base import console
from vismt.base.errors import UserError
from vismt.config.yaml_text import read_yaml
from vismt.data.decode import is_image_name, open_image, read_image_bytes
from vismt.data.formats.folder import FolderSource
from vismt.data.formats.plain_sets import SPLITS, plain_card
from vismt.data.images import open_images
from vismt.data.source_types import Card
from vismt.jobs import JOBS
from vismt.storage.wheels import one_line

InitFiles = dict[str, str]  # content by name
SHARES = {"validation": 0.1, "test": 0.2}  # of each class, for parts without a folder


@dataclass(frozen=True)
class Init:
    """How `vismt init` begins a job.

    Args:
        files: Function of the job's name, the folder to write to and the user's data (None for none). It returns the content
            of each file by name and writes nothing.
        takes: Option that names the user's data: "images", a folder, "texts", a file, or "" for none.
    """

    files: Callable[[str, Path, Path | None], InitFiles]
    takes: str = "images"


@dataclass(frozen=True)
class OwnSet:
    """A user's set, as a configuration names it.

    Args:
        name: Name of the set.
        card: Its card, "./NAME.card.yaml" for a user's set.
        splits: Folders of its splits, ["all"] for a set without such folders.
    """

    name: str
    card: str
    splits: list[str]

    def entries(self, part: str) -> list[str]:
        """Return the sets of "train", "validation" or "test". A set without folders of splits is "train"."""
        if self.splits == ["all"]:
            return [self.card] if part == "train" else []
        return [f"{self.card}:{split}" for split in self.splits if SPLITS[split.lower()] == part]

    @property
    def evaluated(self) -> str:
        """The set that a job without training evaluates: the test images, if the set has a folder of them."""
        entry = next(found for part in ("test", "validation", "train") for found in self.entries(part))
        if self.splits != ["all"]:
            console.stage("init", f"{self.name} has the folders {', '.join(self.splits)}: {entry} is evaluated")
        return entry

    def parts(self) -> dict[str, str]:
        """Return keys and values of `PartsConfig`: the folders of splits, and shares of "train" for parts without a folder."""
        named = {part: self.entries(part) for part in ("train", *SHARES)}
        if not named["train"]:
            raise UserError(f"init: {self.name} has the folders {', '.join(self.splits)}; name one 'train'.")
        keys = {
            part if sets else f"{part}_share": f"[{', '.join(sets)}]" if sets else str(SHARES[part])
            for part, sets in named.items()
        }
        if self.splits != ["all"]:
            shown = ", ".join(f"{key}: {value}" for key, value in keys.items())
            console.stage("init", f"{self.name} is divided by its folders: {shown}")
        return keys


def own_images(folder: Path, images: Path) -> tuple[OwnSet, Card, InitFiles]:
    """Return a folder of images as the files of `folder` name it, its card, and the text of the card.

    Print how many files are images of a class, and which files are left out or cannot be read.
    """
    card = plain_card(images)
    if card is None:
        raise UserError(f"init: --images {images}: no folder of images in it; need one for each class.")
    source = card.sources[0]
    assert isinstance(source, FolderSource)
    opened = open_images(card)
    tell_files(images, opened.ids, f"images of {len(opened.classes)} classes")
    bad = [error for name in opened.ids if (error := _unreadable(images / name))]
    if bad:
        remedy = f"`vismt data check {shlex.quote(str(images))}` lists them. Remove them, or write on_bad_sample: skip."
        console.stage("init", f"{len(bad):,} images cannot be read, the first is {bad[0]} {remedy}")
    name = set_name(images)
    file = f"{name}.card.yaml"  # as a folder may hold the cards of several sets
    splits = ", ".join(f"{split}: null" for split in source.splits)
    values = {"name": quoted(name), "root": path_below(images, folder), "layout": source.layout, "splits": splits}
    text = Template(Path(__file__).with_name("start_card.yaml").read_text(encoding="utf8")).substitute(values)
    return OwnSet(name, f"./{file}", list(source.splits)), card, {file: text}


def _unreadable(path: Path) -> str:
    """Return why the header of an image cannot be read, "" if it can."""
    try:
        with open_image(read_image_bytes(path), str(path)):
            return ""
    except UserError as error:
        return str(error)


def tell_files(root: Path, taken: Iterable[str], what: str) -> None:
    """Print how many files of a folder a run reads, and why it leaves out the others.

    taken: Paths below `root`. what: What they are.
    """
    names, left = set(taken), dict[str, list[str]]()
    for folder, _, files in os.walk(root):
        for path in (Path(folder, file) for file in sorted(files)):
            name = path.relative_to(root).as_posix()
            if name not in names:
                left.setdefault(_why_left(path, name), []).append(name)
    texts = [f"{len(found):,} {why} ({found[0]}{', ...' * (len(found) > 1)})" for why, found in sorted(left.items())]
    console.stage("init", f"{len(names):,} {what}; left out: {', '.join(texts) or 'no file'}")


def _why_left(path: Path, name: str) -> str:
    if any(part.startswith((".", "__")) for part in Path(name).parts):
        return "hidden"
    if not path.exists():
        return "broken links"
    return "in no folder that is read" if is_image_name(name) else "of other types"


def set_name(path: Path) -> str:
    """Return the name of a folder as a card and a task may be called, which begin with a letter or digit."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", path.name).lstrip("_.-") or "images"


def path_below(path: Path, folder: Path) -> str:
    """Return a path as the files of `folder` name it: relative if it lies inside, so that both can be moved."""
    return quoted(f"./{path.relative_to(folder).as_posix()}" if path.is_relative_to(folder) else path)


def quoted(value: object) -> str:
    """Return a text as YAML takes it, whatever is in it."""
    # YAML takes U+0085 as a line end, and no other control character.
    return re.sub(r"[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(str(value), ensure_ascii=False))


def template(job: str, name: str = "start.yaml") -> Template:
    """Return a template of a job. Raises UserError where the job has no such file."""
    package = find_spec(JOBS[job])
    places = [] if package is None else list(package.submodule_search_locations or ())
    path = next((path for path in (Path(place, name) for place in places) if path.exists()), None)
    if path is None:
        raise UserError(
            f"init: the job '{job}' has no template; write a configuration with the keys of `vismt config {job}`."
        )
    return Template(path.read_text(encoding="utf8"))


def config(job: str, *, file: str = "start.yaml", about: str = "", title: str = "", **values: object) -> InitFiles:
    """Return the configuration of a job. about: What it is about, for the comment in its first line."""
    name, path = f"{job}.yaml", Path(__file__).with_name("start_rates.yaml")
    rates = read_yaml(path, str(path))
    below, lr, above = (f"{factor * rates['jobs'].get(job, 1e-3):.1e}".replace("e-0", "e-") for factor in (0.3, 1, 3))
    values |= {"lr": lr, "rates": f"[{below}, {lr}, {above}]"}
    values |= {f"rate_{method}": f"{rate:g}" for method, rate in rates["methods"].items()}
    text = template(job, file).substitute(job=job, config=name, about=one_line(about), title=quoted(title), **values)
    return {name: text}
