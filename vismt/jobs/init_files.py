"""`vismt init`: a commented configuration of a job that runs as written, from templates beside the modules of the job.

`start.yaml` of a job is the template. `$job` and `$config` are the job and the name of the file. `$lr` is LoRA's learning rate
as studies chose it (docs/rates.md), `$rates` has three rates around it, and `$rate_METHOD` is the rate of a method in units of
LoRA's rate. A job that fills in more has INIT in `init.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from vismt.base.errors import UserError
from vismt.config.yaml_text import read_yaml
from vismt.jobs import JOBS
from vismt.storage.wheels import one_line

if TYPE_CHECKING:
    from vismt.data.images import ImageSet

InitFiles = dict[str, str]  # content by name
CARD = "card.yaml"
OWN_CARD = f"./{CARD}"  # seen from the configuration


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


def images_card(folder: Path, images: Path) -> tuple[ImageSet, str, InitFiles]:
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
    values = {"name": quoted(name), "root": path_below(images, folder), "layout": source.layout, "splits": splits}
    text = Template(Path(__file__).with_name("start_card.yaml").read_text(encoding="utf8")).substitute(values)
    return open_images(card), name, {CARD: text}


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
