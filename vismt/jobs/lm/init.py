"""The configuration that `vismt init lm` writes, for a table of its own or for rows of the user."""

from __future__ import annotations

import json
from pathlib import Path

from vismt.base import console
from vismt.jobs.init_files import Init, InitFiles, config, path_below
from vismt.storage.wheels import one_line

MANY = 40  # rows of text of which a tenth is enough to test on
_TEXTS = "text,label\n" + "".join(
    f'"{subject} {verb} {word}.",{label}\n'
    for subject in ("The film", "The plot", "The food", "This book", "The service", "The phone")
    for verb in ("was", "is")
    for label, words in ((1, ("good", "great", "lovely")), (0, ("bad", "dull", "poor")))
    for word in words
)


def _files(job: str, folder: Path, texts: Path | None) -> InitFiles:
    if texts is None:
        about, title = "a table of texts", "Classification of texts"
        return {"texts.csv": _TEXTS} | config(job, about=about, title=title, data="./texts.csv")
    from vismt.data.texts.text_set import open_texts
    from vismt.jobs.lm.row_layouts import layout_of

    rows = open_texts(texts).rows
    layout = layout_of(f"init: --texts {texts}", rows)
    console.stage("init", f"{len(rows):,} rows, of which the model learns {layout.learned}")
    for note in layout.notes:
        console.stage("init", note)
    task = "\n    ".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in layout.task.items())
    unused = f"#   Not used: {one_line(', '.join(layout.unused))}\n" if layout.unused else ""
    values = {"learned": layout.learned, "task": task, "data": path_below(texts, folder), "unused": unused}
    share = 0.1 if len(rows) >= MANY else 0.3
    title = f"Fine-tuning on {texts.name}"
    return config(job, file="start_texts.yaml", about=texts.name, title=title, share=share, **values)


INIT = Init(_files, takes="texts")
