"""What `vismt init` writes: classes of whole images, to which more sets can be added, or as `dense` maps."""

from __future__ import annotations

from pathlib import Path

from vismt.jobs.init_files import OWN_CARD, Files, Init, config, images_card, quoted
from vismt.jobs.multitask.start_maps import map_files


def _files(job: str, folder: Path, images: Path | None) -> Files:
    if job == "dense":
        return map_files(job, folder, images)
    if images is None:
        return _config(job, "handwritten digits", "digits", "digits")
    _, name, files = images_card(folder, images)
    return files | _config(job, name, name, OWN_CARD)


def _config(job: str, about: str, name: str, data: str) -> Files:
    return config(job, about=about, title=f"Classification, {about}", name=quoted(name), data=data)


INIT = Init(_files)
