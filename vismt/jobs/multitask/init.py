"""What `vismt init` writes: classes of whole images, to which more sets can be added, or as `dense` maps and their card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vismt.base import console
from vismt.base.errors import UserError
from vismt.data.division import divide
from vismt.data.formats.dense_files import DenseFilesSource
from vismt.data.formats.plain_sets import SPLITS
from vismt.data.images import open_images
from vismt.data.maps.dense_maps import MAP_FORMS
from vismt.data.maps.dense_set import DenseSet, open_dense
from vismt.data.set_entries import card_and_split
from vismt.data.source_types import Card
from vismt.jobs.init_files import (
    Init,
    InitFiles,
    OwnSet,
    config,
    own_images,
    path_below,
    quoted,
    set_name,
    tell_files,
    template,
)

VOID = 255  # the usual label of pixels without a class
PATCH = 14  # of the model in the configuration
_LONGEST = 448  # pixels of a side: a step on larger images takes minutes on a CPU
RARE = 1e-4  # share of the pixels below which a label counts as rare
_SHOWN = 5  # rare labels, or folders, that a message names
_NAMES = (
    "# names: [background, door, ...]   # what reports and legends call the classes, in the order of their labels\n"
)
_SIZES = (
    "# Height and width of training and evaluation, multiples of the patch of {1}. Your images are {0}.\n"
    "# Images and maps are fitted into this size without changing their shape, then padded. Scores are of maps in this size."
)


def _files(job: str, folder: Path, images: Path | None) -> InitFiles:
    if job == "dense":
        return _map_files(job, folder, images)
    if images is None:
        return _config(job, "handwritten digits", OwnSet("digits", "digits", ["all"]).parts(), "digits")
    own, card, files = own_images(folder, images)
    parts = own.parts()
    for entry in own.entries("train"):
        opened = open_images(card, card_and_split(entry)[1])
        _check_shares(parts, own.name, opened.labels, opened.classes)
    return files | _config(job, own.name, parts, own.name)


def _config(job: str, about: str, parts: Mapping[str, str], name: str) -> InitFiles:
    lines = "\n    ".join(f"{key}: {value}" for key, value in parts.items())
    return config(job, about=about, title=f"Classification, {about}", name=quoted(name), parts=lines)


def _check_shares(parts: Mapping[str, str], name: str, labels: Tensor, classes: Sequence[str] = ()) -> None:
    """Raise UserError if a class has too few examples for the shares that the configuration takes of it."""
    shares = {key.removesuffix("_share"): float(value) for key, value in parts.items() if key.endswith("_share")}
    divide(labels, shares, name, classes=classes)


def _map_files(job: str, folder: Path, images: Path | None) -> InitFiles:
    """Return the configuration, and the card of a folder of images with maps. Arguments as of `Init.files`."""
    if images is None:
        data = "{train: [motorcycle:train], validation_share: 0.1, test: [motorcycle:test]}"
        about = "# Height and width of the tiles."
        return _map_config(job, "tiles of one photograph", data, "[depth, normals]", about, [140, 112])
    source = _map_source(images)
    name = set_name(images)
    card = Card(name, [source], classes=VOID, path=images, shown=str(images))
    sizes, pixels = _read_maps(open_dense(card))
    pairs = [pair for split in source.splits for pair in source.pairs(card, images, split)]
    tell_files(
        images, (path.relative_to(images).as_posix() for pair in pairs for path in pair.values()), "images and maps"
    )
    own = OwnSet(name, f"./{name}.card.yaml", list(source.splits))
    parts = own.parts()
    _check_shares(parts, name, torch.zeros(len(pairs), dtype=torch.int64))
    places = {form: quoted(place) for form, place in source.maps.items()}
    tasks = [MAP_FORMS[form].target for form in places]
    more = {"classes": "", "more": ""}
    if "label" in places and not any(pixels[1:VOID]) and pixels[0] and pixels[VOID] and "saliency" not in tasks:
        console.stage(
            "init", f"'label' has {VOID} and 0 alone: a mask of two classes, which is read in the form saliency"
        )
        places = {"saliency" if form == "label" else form: place for form, place in places.items()}
        tasks[tasks.index("semseg")] = "{name: saliency, measure: miou}"
    elif "label" in places:
        count = 1 + max((label for label in range(VOID) if pixels[label]), default=-1)
        if count < 2:
            raise UserError(
                f"init: --images {images}: no map in 'label' has a label but 0 and {VOID}, which marks none; write 0, 1, ..."
            )
        _tell_rare("label", pixels[:count])
        more = {"classes": f"classes: {count}\n{_NAMES}", "more": f"    void: {VOID}\n" if pixels[VOID] else ""}
        tasks[tasks.index("semseg")] = f"{{name: semseg, classes: {count}}}"
    more["more"] += _partial(pairs, list(source.maps))
    found, size = _size(sizes)
    text = template(job, "start_map_card.yaml").substitute(
        name=quoted(name),
        root=path_below(images, folder),
        image=quoted(source.image),
        maps=", ".join(f"{form}: {place}" for form, place in places.items()),
        splits=", ".join(f"{split}: null" for split in source.splits),
        **more,
    )
    data = ", ".join(f"{key}: {value}" for key, value in parts.items())
    return {f"{name}.card.yaml": text.rstrip() + "\n"} | _map_config(
        job, name, f"{{{data}}}", f"[{', '.join(tasks)}]", _SIZES.format(found, PATCH), size
    )


def _map_config(job: str, about: str, data: str, tasks: str, sizes: str, size: list[int]) -> InitFiles:
    title = f"Dense prediction, {about}"
    return config(job, file="start_maps.yaml", about=about, title=title, data=data, tasks=tasks, sizes=sizes, size=size)


def _size(sizes: Counter[tuple[int, int]]) -> tuple[str, list[int]]:
    """Return the commonest size of the images as text, and the size of training: multiples of PATCH, no side above _LONGEST."""
    (height, width), count = sizes.most_common(1)[0]
    text = f"{height} x {width}" + (f", as {count} of {sizes.total()} images have" if len(sizes) > 1 else "")
    scale = min(1.0, _LONGEST / max(height, width))
    return text, [max(2, round(scale * side / PATCH)) * PATCH for side in (height, width)]


def _map_source(images: Path) -> DenseFilesSource:
    """Return the source of a folder with a folder of images, and folders of maps that are called by their form.

    Folders of splits are around these folders, or in each of them.
    """
    inside = (images / "images").is_dir()
    splits = [name for name in _folders(images / "images" if inside else images) if name.lower() in SPLITS]
    place = ("{name}/{split}" if inside else "{split}/{name}") if splits else "{name}"
    folders = {name for parent in ([""] if inside else splits) for name in _folders(images / parent)}
    forms = [form for form in MAP_FORMS if form in folders]
    if "images" not in folders or not forms:
        raise UserError(
            f"init: --images {images}: for dense it needs a folder 'images' and folders of maps beside it, called by their form: "
            f"{', '.join(MAP_FORMS)}."
        )
    if unused := sorted(folders - {"images", *forms}):
        names = ", ".join(map(repr, unused[:_SHOWN])) + (", ..." if len(unused) > _SHOWN else "")
        console.stage("init", f"not used: {names}; a folder of maps is called by its form: {', '.join(MAP_FORMS)}")
    source = DenseFilesSource(
        root=str(images),
        image=place.replace("{name}", "images"),
        maps={form: place.replace("{name}", form) for form in forms},
        void=VOID,
        partial=True,
        splits=dict.fromkeys(splits or ["all"]),
    )
    source.check(f"init: --images {images}")
    return source


def _folders(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir() if path.is_dir())


def _read_maps(samples: DenseSet) -> tuple[Counter[tuple[int, int]], list[int]]:
    """Read every image with its maps, as a run does. Return the sizes of images, and the pixels of each label up to VOID."""
    sizes: Counter[tuple[int, int]] = Counter()
    pixels = torch.zeros(VOID + 1, dtype=torch.int64)
    for i in console.track(range(len(samples)), "init", "reading images and maps"):
        sample = samples.read(i)
        height, width = sample["image"].shape[-2:]
        sizes[height, width] += 1
        if "semseg" in sample:
            pixels += sample["semseg"].flatten().bincount(minlength=VOID + 1)
    return sizes, pixels.tolist()


def _partial(pairs: Sequence[Mapping[str, Path]], forms: Sequence[str]) -> str:
    """Return the line of the card for images without some map, "" if every image has every map."""
    without = {form: sum(form not in pair for pair in pairs) for form in forms}
    texts = [f"{count:,} without {form}" for form, count in without.items() if count]
    if not texts:
        return ""
    about = f"{', '.join(texts)} of {len(pairs):,} images"
    console.stage("init", f"{about}: they teach and test the other tasks only")
    return f"    partial: true            # {about}\n"


def _tell_rare(name: str, pixels: list[int]) -> None:
    """Print the labels that nearly no pixel has: they may be mistakes, and count as much as the others in mIoU."""
    total = sum(pixels)
    rare = {label: count for label, count in enumerate(pixels) if count < RARE * total}
    if rare:
        shown = ", ".join(f"{label} ({count:,})" for label, count in list(rare.items())[:_SHOWN])
        more = f" and {len(rare) - _SHOWN} more" if len(rare) > _SHOWN else ""
        console.stage(
            "init",
            f"'{name}' has labels 0 to {len(pixels) - 1}, so {len(pixels)} classes. Of {total:,} pixels, few have label "
            f"{shown}{more}. Each class counts alike in mIoU: correct the maps if one of them is a mistake.",
        )


INIT = Init(_files)
