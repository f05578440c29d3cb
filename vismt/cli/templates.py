"""The files that `vismt init` writes: a commented configuration for each job, and what it needs."""

from __future__ import annotations

from string import Template

CARD = Template("""\
# A set of labelled images: what it is, and where it lies. Only name and sources are needed.
name: $name
# title, licence and citation are for readers; classes: N makes another number of classes an error.
sources:
  - kind: folder
    root: $root              # absolute, or below the folder of this file: then both can be moved and shared
    layout: "$layout"        # where the class folders are
    splits: {$splits}        # number of images of each split, null when unknown
# groups: groups.json          # images that belong in one part of a division; `vismt data check CARD --duplicates` writes it
""")
DENSE_CARD = Template("""\
# Images with maps of the same name in folders beside them. Only name and sources are needed.
name: $name
sources:
  - kind: dense
    root: $root
    image: $image            # the folder of the images
    maps: {$maps}            # {form: folder}; forms: label (PNG, class numbers), depth_mm, depth_m, normal, edge, saliency
    splits: {all: null}
$void$classes""")
FEWSHOT = Template("""\
# Few-shot episodes on $about: a frozen backbone beside one that is meta-tuned on other images.
#
#   vismt run $config
task: fewshot
title: Few-shot, $about
seed: 0
model: {name: vit_small_patch14_imgfocus, img_size: 42, position: onnx}   # or any model of timm
adapt: {method: lora, rank: 8}                    # null: evaluate the frozen backbone only
source: {data: [$source], ways: $ways, shots: 1, queries: 5}   # the images of the training episodes
train: {steps: 40, lr: 3.0e-4, warmup: 4}
evaluate:
  data: [$data]
  models: [frozen, adapted]                       # each also with +finetune, +ridge or +logistic
  ways: $ways
  shots: [$shots]
  queries: $queries
  episodes: 20                                    # 600 for a table
  attacks: [{name: pgd, epsilon: 4.5/255}]        # strong is stronger, and slower
""")
MULTITASK = Template("""\
# Classification of $about on one adapted backbone; add a task for each further set.
#
#   vismt run $config
task: multitask
title: Classification, $about
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
DENSE = Template("""\
# Dense prediction on $about.
#
#   vismt run $config
task: dense
title: Dense prediction, $about
seed: 0
model: {name: vit_small_patch14_imgfocus, position: onnx}
adapt: {method: lora, rank: 4}
data: $data
size: $size                                       # height and width, multiples of the patches
tasks: $tasks
head: {name: linear}                              # or segformer
batch: 2
train: {steps: 40, lr: 1.0e-3, warmup: 4}
evaluate: {split: test, batch: 2}
""")
LM = Template("""\
# A language model that learns to classify the rows of a table of texts.
#
#   vismt run $config
task: lm
title: Classification of texts
seed: 0
model: {name: smollm2-135m-instruct, dtype: bfloat16, first_block: 22}    # or a folder, or a name on the hub
tasks:
  - name: sentiment
    kind: classes
    prompt: "Review: {text}\\nSentiment:"          # {column} of the table
    options: {answers: {"0": " negative", "1": " positive"}}   # {label: answer of one token}
    train: [$data]                              # a .csv, .tsv or .jsonl file, or a card
    validation_share: 0.2
    test_share: 0.2
adapt: {method: lora, rank: 8, targets: [q_proj, v_proj]}
head: {name: linear}                              # vbll: a Bayesian last layer
batch: 4
train: {steps: 20, lr: 3.0e-4}
""")
OWN_TEXTS = Template("""\
# A language model that learns from the rows of $about.
#
#   vismt run $config          and then: vismt predict RUN prompts.jsonl
task: lm
title: $title
seed: 0
model: {name: smollm2-135m-instruct, dtype: bfloat16}    # or a folder, or a name on the hub
tasks:
  - name: own                                     # learns $learned
    $task
    train: [$data]
    test_share: $share
adapt: {method: lora, rank: 16, alpha: 32}       # every linear layer
batch: 4
train: {steps: 100, lr: 2.0e-4, warmup: 10}      # at least one pass: rows / batch
""")
TEXTS = "text,label\n" + "".join(
    f'"{subject} {verb} {word}.",{label}\n'
    for subject in ("The film", "The plot", "The food", "This book", "The service", "The phone")
    for verb in ("was", "is")
    for label, words in ((1, ("good", "great", "lovely")), (0, ("bad", "dull", "poor")))
    for word in words
)
ROBUSTNESS = Template("""\
# The classifier of classifier.py on $about: clean, under attacks, under corruptions.
#
#   vismt run $config          (in this folder, where classifier.py is found)
task: robustness
title: Robustness on $about
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
