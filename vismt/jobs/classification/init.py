"""The configuration that `vismt init multitask` writes."""

from __future__ import annotations

from pathlib import Path
from string import Template

from vismt.jobs.init_files import OWN_CARD, Files, Init, config, images_card, quoted

TEMPLATE = Template("""\
# Classification of $about on one adapted backbone; add a task for each further set.
#
#   vismt run $config
task: multitask
title: $title
seed: 0
model: {name: vit_small_patch14_imgfocus, img_size: 42, position: onnx}   # or any model of timm
adapt: {method: lora, rank: 8}
tasks:
  - name: $name
    train: [$data]                              # or "card:split" of train, validation and test
    validation_share: 0.1                         # of each class
    test_share: 0.2
batch: 16
arms:
  heads: {adapt: null}                            # the heads alone, for comparison
  lora: {}
train: {steps: 40, lr: 1.0e-3, warmup: 4}
""")


def _files(folder: Path, images: Path | None) -> Files:
    if images is None:
        return _config("handwritten digits", "digits", "digits")
    _, name, files = images_card(folder, images)
    return files | _config(name, name, OWN_CARD)


def _config(about: str, name: str, data: str) -> Files:
    return config("multitask", TEMPLATE, about=about, title=f"Classification, {about}", name=quoted(name), data=data)


INIT = Init(_files)
