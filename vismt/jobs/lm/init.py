"""The configuration that `vismt init lm` writes, for a table of its own or for rows of the user."""

from __future__ import annotations

import json
from pathlib import Path
from string import Template

from vismt.base import console
from vismt.jobs.init_files import Files, Init, config, place
from vismt.storage.wheels import one_line

MANY = 40  # rows of text of which a tenth is enough to test on
TEMPLATE = Template("""\
# A language model that learns to classify the rows of $about.
#
#   vismt run $config
task: $job
title: $title
seed: 0
model: {name: smollm2-135m-instruct, dtype: float32, first_block: 22}    # or a folder, or a name on the hub
tasks:
  - name: sentiment
    kind: classes
    prompt: "Review: {text}\\nSentiment:"          # {column} of the table
    options: {answers: {"0": " negative", "1": " positive"}}   # {label: answer of one token}
    train: [$data]                              # a .csv, .tsv or .jsonl file, or a card
    validation_share: 0.2
    test_share: 0.2
adapt: {method: lora, rank: 8, targets: [q_proj, v_proj]}   # `vismt list methods` has the names
# arms:                                           # compared with each other on the same rows
#   lora: {adapt.method: lora}
#   full: {adapt.method: full, train.rates: {head: 1, ".": 0.1}}   # all weights, at a tenth of each rate
# tune: {rates: [1.0e-4, 3.0e-4, 1.0e-3]}         # every arm keeps the rate that is best on validation rows
head: {name: linear}                              # vbll: a Bayesian last layer
batch: 4
train: {steps: 20, lr: 3.0e-4}
""")
OWN_TEXTS = Template("""\
# A language model that learns from the rows of $about.
#
#   vismt run $config          and then: vismt predict RUN prompts.jsonl
${unused}task: $job
title: $title
seed: 0
model: {name: smollm2-135m-instruct, dtype: float32}    # or a folder, or a name on the hub
tasks:
  - name: own                                     # learns $learned
    $task
    train: [$data]
    test_share: $share
adapt: {method: lora, rank: 16, alpha: 32}       # every linear layer; `vismt list methods` has the names
# arms:                                           # compared with each other on the same rows
#   lora: {adapt.method: lora}
#   full: {adapt.method: full, train.rates: {".": 0.1}}   # all weights, at a tenth of each rate
# tune: {rates: [1.0e-4, 3.0e-4, 1.0e-3]}         # every arm keeps its best rate; needs validation_share: 0.1 in the task
# calibration: {data: [OTHER.jsonl], text: "{COLUMN}"}   # texts that corda reads first
batch: 4
train: {steps: 100, lr: 2.0e-4, warmup: 10}      # at least one pass: rows / batch
""")
_TEXTS = "text,label\n" + "".join(
    f'"{subject} {verb} {word}.",{label}\n'
    for subject in ("The film", "The plot", "The food", "This book", "The service", "The phone")
    for verb in ("was", "is")
    for label, words in ((1, ("good", "great", "lovely")), (0, ("bad", "dull", "poor")))
    for word in words
)


def _files(job: str, folder: Path, texts: Path | None) -> Files:
    if texts is None:
        about, title = "a table of texts", "Classification of texts"
        return {"texts.csv": _TEXTS} | config(job, TEMPLATE, about=about, title=title, data="./texts.csv")
    from vismt.data.texts.text_set import open_texts
    from vismt.jobs.lm.row_layouts import layout_of

    rows = open_texts(texts).rows
    layout = layout_of(f"init: --texts {texts}", rows)
    console.stage("init", f"{len(rows):,} rows, of which the model learns {layout.learned}")
    for note in layout.notes:
        console.stage("init", note)
    task = "\n    ".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in layout.task.items())
    unused = f"#   Not used: {one_line(', '.join(layout.unused))}\n" if layout.unused else ""
    values = {"learned": layout.learned, "task": task, "data": place(texts, folder), "unused": unused}
    share = 0.1 if len(rows) >= MANY else 0.3
    title = f"Fine-tuning on {texts.name}"
    return config(job, OWN_TEXTS, about=texts.name, title=title, share=share, **values)


INIT = Init(_files, takes="texts")
