"""The configuration and the classifier that `vismt init robustness` writes."""

from __future__ import annotations

from pathlib import Path
from string import Template

from vismt.data.images import open_images
from vismt.jobs.init_files import Init, InitFiles, config, own_images

CLASSIFIER = Template('''\
"""The classifier that $config evaluates; put your own in the place of this untrained one."""

import timm
from torch import nn


def load() -> tuple[nn.Module, int]:
    """Return a module from images float (b, 3, h, w) in [0, 1] to logits, normalisation included, and its number of classes."""
    classes = $classes
    return timm.create_model("test_resnet", pretrained=False, num_classes=classes).eval(), classes
''')


def _files(job: str, folder: Path, images: Path | None) -> InitFiles:
    files: InitFiles = {}
    about, data, classes = "handwritten digits", "digits", 10
    if images is not None:
        own, card, files = own_images(folder, images)
        about, data, classes = own.name, own.evaluated, len(open_images(card).classes)
    files["classifier.py"] = CLASSIFIER.substitute(config="robustness.yaml", classes=classes)
    return files | config(job, about=about, title=f"Robustness on {about}", data=data)


INIT = Init(_files)
