"""The configuration that `vismt init fewshot` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vismt.base.errors import UserError
from vismt.data.images import open_images
from vismt.data.set_entries import card_and_split
from vismt.jobs.init_files import Init, InitFiles, config, own_images


def _files(job: str, folder: Path, images: Path | None) -> InitFiles:
    if images is None:
        return _config(job, "handwritten digits", "digits", ways=5, shots="1, 5", queries=5)
    own, card, files = own_images(folder, images)
    data = own.evaluated
    opened = open_images(card, card_and_split(data)[1])
    counts = [int(count) for count in opened.labels.bincount() if count]
    if len(counts) < 2 or min(counts) < 2:
        raise UserError(
            f"init: --images {images}: {len(counts)} classes, the smallest of {min(counts, default=0)} images; few-shot episodes "
            "need two classes of two images: add images, or remove the class."
        )
    shots = "1, 5" if min(counts) > 5 else "1"
    queries = min(10, min(counts) - (5 if min(counts) > 5 else 1))
    return files | _config(job, own.name, data, ways=min(5, len(counts)), shots=shots, queries=queries)


def _config(job: str, about: str, data: str, **sizes: Any) -> InitFiles:
    return config(job, about=about, title=f"Few-shot, {about}", data=data, source="photo_crops", **sizes)


INIT = Init(_files)
