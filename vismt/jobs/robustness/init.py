"""The configuration and the classifier that `vismt init robustness` writes."""

from __future__ import annotations

from pathlib import Path
from string import Template

from vismt.jobs.init_files import OWN_CARD, Files, Init, config, images_card

TEMPLATE = Template("""\
# The classifier of classifier.py on $about: clean, under attacks, under corruptions.
#
#   vismt run $config          (in this folder, where classifier.py is found)
task: $job
title: $title
seed: 0
arms:                                             # compared on the same images
  mine: {classifier.function: "classifier:load", classifier.size: 64}
# other: {classifier.name: resnet18.a1_in1k}      # a timm name or a checkpoint, where its classes are those of the data
data: [$data]
evaluate:
  images: 50
  batch: 25
  attacks: [{name: pgd, epsilon: 4.5/255}, {name: strong, epsilon: 4.5/255}]
  corruptions: [{name: gaussian_noise, severities: [1, 3, 5]}]
  masking: true                                   # whether the attack can be trusted
""")
CLASSIFIER = Template('''\
"""The classifier that $config evaluates; put your own in the place of this untrained one."""

import timm
from torch import nn


def load() -> tuple[nn.Module, int]:
    """Return a module from images float (b, 3, h, w) in [0, 1] to logits, normalisation included, and its number of classes."""
    classes = $classes
    return timm.create_model("test_resnet", pretrained=False, num_classes=classes).eval(), classes
''')


def _files(job: str, folder: Path, images: Path | None) -> Files:
    files: Files = {}
    about, data, classes = "handwritten digits", "digits", 10
    if images is not None:
        opened, about, files = images_card(folder, images)
        data, classes = OWN_CARD, len(opened.classes)
    files["classifier.py"] = CLASSIFIER.substitute(config="robustness.yaml", classes=classes)
    return files | config(job, TEMPLATE, about=about, title=f"Robustness on {about}", data=data)


INIT = Init(_files)
