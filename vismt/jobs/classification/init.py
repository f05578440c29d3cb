"""The configuration that `vismt init classification` writes; with more sets under `tasks` it is one of several tasks."""

from __future__ import annotations

from pathlib import Path
from string import Template

from vismt.jobs.init_files import OWN_CARD, Files, Init, config, images_card, quoted

# Rates as the races chose them: about 1e-3 for factors, 1e-2 for a new head, 1e-5 to 1e-4 for all weights.
TEMPLATE = Template("""\
# Classification of $about: ways to train one model, compared on the same test images.
#
#   vismt run $config
task: $job
title: $title
seed: 0
model: {name: vit_small_patch14_imgfocus, img_size: 42, position: onnx}   # of another timm model give the name alone
adapt: {method: lora, rank: 8}                    # what arms begin with; `vismt list methods` has the names
tasks:
  - name: $name                                   # add an item for each further set
    train: [$data]                              # or "card:split" of train, validation and test
    validation_share: 0.1                         # of each class
    test_share: 0.2
batch: 16
arms:                                             # compared with each other; leave out what you do not need
  head: {adapt.method: head}                      # the classifier alone
  lora: {adapt.method: lora}
  full: {adapt.method: full, train.rates: {head: 10, ".": 0.03}}   # all weights, at 0.03 of each rate
tune: {rates: [3.0e-4, 1.0e-3, 3.0e-3]}           # every arm keeps the rate that is best on validation images; null: train.lr
train: {steps: 40, lr: 1.0e-3, warmup: 4, rates: {head: 10}}   # the head of every arm learns at ten times the rate
calibration: {examples: 256}                      # images from which corda starts; other methods do not read it
""")


def _files(job: str, folder: Path, images: Path | None) -> Files:
    if images is None:
        return _config(job, "handwritten digits", "digits", "digits")
    _, name, files = images_card(folder, images)
    return files | _config(job, name, name, OWN_CARD)


def _config(job: str, about: str, name: str, data: str) -> Files:
    return config(job, TEMPLATE, about=about, title=f"Classification, {about}", name=quoted(name), data=data)


INIT = Init(_files)
