"""The configuration that `vismt init toy` writes."""

from pathlib import Path
from string import Template

from vismt.jobs.init_files import Files, Init, config

TEMPLATE = Template("# Pairs of numbers: $about.\ntask: toy\ntitle: $title\nbatch: $batch\n")


def _files(job: str, folder: Path, texts: Path | None) -> Files:
    return config(job, TEMPLATE, about="which is larger", title="Toy", batch=16 if texts is None else 8)


INIT = Init(_files, takes="texts")
