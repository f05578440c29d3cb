"""The configuration that `vismt init fewshot` writes."""

from __future__ import annotations

from pathlib import Path
from string import Template

from vismt.base.errors import UserError
from vismt.jobs.init_files import OWN_CARD, Files, Init, config, images_card

TEMPLATE = Template("""\
# Few-shot episodes on $about: a frozen backbone beside one that is meta-tuned on other images.
#
#   vismt run $config
task: $job
title: $title
seed: 0
model: {name: vit_small_patch14_imgfocus, img_size: 42, position: onnx}   # or any model of timm
adapt: {method: lora, rank: 8}                    # null: evaluate the frozen backbone only
source: {data: [$source], ways: $ways, shots: 1, queries: 5}   # the images of the training episodes
train: {steps: 40, lr: 3.0e-4, warmup: 4}
calibration: {examples: 256}                      # images from which corda starts; other methods do not read it
# arms:                                           # compared with each other on the same episodes
#   lora: {adapt.method: lora}
#   full: {adapt.method: full, train.rates: {".": 0.03}}   # all weights, at 0.03 of each rate
# tune: {rates: [1.0e-4, 3.0e-4, 1.0e-3]}         # every arm keeps its best rate; needs sets that choose it:
# select: {data: [OTHER_IMAGES]}                  # neither trained on nor evaluated
evaluate:
  data: [$data]
  models: [frozen, adapted]                       # each also with +finetune, +ridge or +logistic
  ways: $ways
  shots: [$shots]
  queries: $queries
  episodes: 20                                    # 600 for a table
  attacks: [{name: pgd, epsilon: 4.5/255}]        # strong is stronger, and slower
""")


def _files(job: str, folder: Path, images: Path | None) -> Files:
    if images is None:
        return _config(job, "handwritten digits", "digits", ways=5, shots="1, 5", queries=5)
    opened, name, files = images_card(folder, images)
    counts = [int(count) for count in opened.labels.bincount() if count]
    if len(counts) < 2 or min(counts) < 2:
        raise UserError(
            f"init: --images {images}: {len(counts)} classes, the smallest of {min(counts, default=0)} images; few-shot episodes "
            "need two classes of two images."
        )
    shots = "1, 5" if min(counts) > 5 else "1"
    queries = min(10, min(counts) - (5 if min(counts) > 5 else 1))
    return files | _config(job, name, OWN_CARD, ways=min(5, len(counts)), shots=shots, queries=queries)


def _config(job: str, about: str, data: str, **sizes: object) -> Files:
    return config(job, TEMPLATE, about=about, title=f"Few-shot, {about}", data=data, source="photo_crops", **sizes)


INIT = Init(_files)
