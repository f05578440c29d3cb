"""The configuration that `vismt init dense` writes, and the card of images with maps."""

from __future__ import annotations

from pathlib import Path
from string import Template

from vismt.base.errors import UserError
from vismt.jobs.init_files import CARD, OWN_CARD, Files, Init, config, place, quoted, set_name

VOID = 255  # the usual label of pixels without a class
MAPS_CARD = Template("""\
# Images with maps of the same name in folders beside them. Only name and sources are needed.
name: $name
sources:
  - kind: dense
    root: $root
    image: $image            # the folder of the images
    maps: {$maps}            # {form: folder}; forms: label (PNG, class numbers), depth_mm, depth_m, normal, edge, saliency
    splits: {all: null}
$void$classes""")
TEMPLATE = Template("""\
# Dense prediction on $about.
#
#   vismt run $config
task: $job
title: $title
seed: 0
model: {name: vit_small_patch14_imgfocus, position: onnx}
adapt: {method: lora, rank: 4}                    # `vismt list methods` has the names
# arms:                                           # compared with each other on the same images
#   lora: {adapt.method: lora}
#   head: {adapt.method: head}                    # the heads alone
#   full: {adapt.method: full, train.rates: {heads: 1, ".": 0.03}}   # all weights, at 0.03 of each rate
# tune: {rates: [3.0e-4, 1.0e-3, 3.0e-3]}         # every arm keeps its best rate; needs data.validation_share: 0.1
data: $data
size: $size                                       # height and width, multiples of the patches
tasks: $tasks
head: {name: linear}                              # or segformer
batch: 2
train: {steps: 40, lr: 1.0e-3, warmup: 4}
evaluate: {split: test, batch: 2}
""")


def _files(job: str, folder: Path, images: Path | None) -> Files:
    if images is None:
        data = "{train: [motorcycle:train], test: [motorcycle:test]}"
        return _config(job, "tiles of one photograph", data, "[depth, normals]", "[140, 112]")
    maps, tasks, more = _maps(images)
    name = set_name(images)
    card = MAPS_CARD.substitute(name=quoted(name), root=place(images, folder), image="images", maps=maps, **more)
    return {CARD: card} | _config(job, name, f"{{train: [{OWN_CARD}], test_share: 0.2}}", tasks, "[112, 112]")


def _config(job: str, about: str, data: str, tasks: str, size: str) -> Files:
    title = f"Dense prediction, {about}"
    return config(job, TEMPLATE, about=about, title=title, data=data, tasks=tasks, size=size)


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
    more, tasks = {"classes": "", "void": ""}, []
    for name, target in found.items():
        if target != "semseg":
            tasks.append(target)
            continue
        labels = {int(label) for path in sorted((images / name).iterdir()) for label in np.unique(read_array(path))}
        count = 1 + max(labels - {VOID}, default=-1)
        if not count:
            raise UserError(f"init: --images {images}: no map in '{name}' has a label but {VOID}, which marks none.")
        more = {"classes": f"classes: {count}\n", "void": f"    void: {VOID}\n" if VOID in labels else ""}
        tasks.append(f"{{name: semseg, classes: {count}}}")
    return ", ".join(f"{name}: {name}" for name in found), f"[{', '.join(tasks)}]", more


INIT = Init(_files)
