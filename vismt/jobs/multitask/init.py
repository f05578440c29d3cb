"""What `vismt init` writes: classes of whole images, to which more sets can be added, or as `dense` maps and their card."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from vismt.base import console
from vismt.base.errors import UserError
from vismt.jobs.init_files import (
    CARD,
    OWN_CARD,
    Init,
    InitFiles,
    config,
    images_card,
    path_below,
    quoted,
    set_name,
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
        return _config(job, "handwritten digits", "digits", "digits")
    _, name, files = images_card(folder, images)
    return files | _config(job, name, name, OWN_CARD)


def _config(job: str, about: str, name: str, data: str) -> InitFiles:
    return config(job, about=about, title=f"Classification, {about}", name=quoted(name), data=data)


def _map_files(job: str, folder: Path, images: Path | None) -> InitFiles:
    """Return the configuration, and the card of a folder of images with maps. Arguments as of `Init.files`."""
    if images is None:
        data = "{train: [motorcycle:train], validation_share: 0.1, test: [motorcycle:test]}"
        sizes = "# Height and width of the tiles."
        return _map_config(job, "tiles of one photograph", data, "[depth, normals]", sizes, [140, 112])
    maps, tasks, more = _maps(images)
    found, size = _size(images / "images")
    sizes = _SIZES.format(found, PATCH)
    name = set_name(images)
    values = {"name": quoted(name), "root": path_below(images, folder), "image": "images", "maps": maps, **more}
    card = template(job, "start_map_card.yaml").substitute(values).rstrip() + "\n"
    return {CARD: card} | _map_config(
        job, name, f"{{train: [{OWN_CARD}], validation_share: 0.1, test_share: 0.2}}", tasks, sizes, size
    )


def _map_config(job: str, about: str, data: str, tasks: str, sizes: str, size: list[int]) -> InitFiles:
    title = f"Dense prediction, {about}"
    return config(job, file="start_maps.yaml", about=about, title=title, data=data, tasks=tasks, sizes=sizes, size=size)


def _size(folder: Path) -> tuple[str, list[int]]:
    """Return the commonest size of the images as text, and the size of training: multiples of PATCH, no side above _LONGEST."""
    from vismt.data.decode import is_image_name, open_image, orientation_of, read_image_bytes
    from vismt.data.maps.dense_maps import read_image

    sizes: Counter[tuple[int, int]] = Counter()
    for path in sorted(folder.iterdir()):
        if is_image_name(path.name):
            with open_image(read_image_bytes(path), str(path)) as image:
                turned = orientation_of(image) > 4
                sizes[image.size if turned else image.size[::-1]] += 1
        elif path.suffix.lower() == ".npy":
            height, width = read_image(path)[0]["image"].shape[-2:]
            sizes[height, width] += 1
    if not sizes:
        raise UserError(f"init: --images {folder.parent}: no image in '{folder.name}'.")
    (height, width), count = sizes.most_common(1)[0]
    text = f"{height} x {width}" + (f", as {count} of {sizes.total()} images have" if len(sizes) > 1 else "")
    scale = min(1.0, _LONGEST / max(height, width))
    return text, [max(2, round(scale * side / PATCH)) * PATCH for side in (height, width)]


def _maps(images: Path) -> tuple[str, str, dict[str, str]]:
    """Return the maps of a folder and the tasks that learn from them, as YAML, and further lines of the card."""
    import numpy as np

    from vismt.data.maps.dense_maps import MAP_FORMS, read_array

    found = {name: form.target for name, form in MAP_FORMS.items() if (images / name).is_dir()}
    if not (images / "images").is_dir() or not found:
        raise UserError(
            f"init: --images {images}: for dense it needs a folder 'images' and folders of maps beside it, called by their form: "
            f"{', '.join(MAP_FORMS)}."
        )
    unused = sorted(path.name for path in images.iterdir() if path.is_dir() and path.name not in {"images", *found})
    if unused:
        names = ", ".join(map(repr, unused[:_SHOWN])) + (", ..." if len(unused) > _SHOWN else "")
        console.stage("init", f"not used: {names}; a folder of maps is called by its form: {', '.join(MAP_FORMS)}")
    more, tasks = {"classes": "", "more": ""}, []
    for name, target in found.items():
        if target != "semseg":
            tasks.append(target)
            continue
        pixels: Counter[int] = Counter()
        for path in sorted((images / name).iterdir()):
            pixels.update(dict(zip(*(values.tolist() for values in np.unique(read_array(path), return_counts=True)))))
        void = pixels.pop(VOID, 0)
        count = 1 + int(max(pixels, default=-1))
        if not count:
            raise UserError(f"init: --images {images}: no map in '{name}' has a label but {VOID}, which marks none.")
        _tell_rare(name, [pixels[label] for label in range(count)])
        more["classes"] = f"classes: {count}\n{_NAMES}"
        more["more"] += f"    void: {VOID}\n" if void else ""
        tasks.append(f"{{name: semseg, classes: {count}}}")
    more["more"] += _partial(images, list(found))
    return ", ".join(f"{name}: {name}" for name in found), f"[{', '.join(tasks)}]", more


def _partial(images: Path, forms: list[str]) -> str:
    """Return the line of the card for images without some map, "" if every image has every map."""
    of_folder = {name: {path.stem for path in (images / name).iterdir()} for name in ("images", *forms)}
    without = {form: len(of_folder["images"] - of_folder[form]) for form in forms}
    texts = [f"{count:,} without {form}" for form, count in without.items() if count]
    if not texts:
        return ""
    about = f"{', '.join(texts)} of {len(of_folder['images']):,} images"
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
