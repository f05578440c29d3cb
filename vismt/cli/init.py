"""`vismt init`: a commented configuration, with a card for own images, that runs as written."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from vismt.base import console
from vismt.base.errors import UserError
from vismt.cli import templates
from vismt.cli.commands import Commands

if TYPE_CHECKING:
    from vismt.data.images import ImageSet

Files = dict[str, str]  # content by name
CARD = "card.yaml"
OWN_CARD = f"./{CARD}"  # seen from the configuration
VOID = 255  # the usual label of pixels without a class
MANY = 40  # rows of text of which a tenth is enough to test on
PROMPTS, ANSWERS = ("prompt", "question", "instruction", "input"), ("answer", "response", "completion", "output")
TEXTS, LABELS = ("text", "sentence", "content", "document"), ("label", "class", "category")


def add_commands(commands: Commands) -> None:
    """Add the command of this file."""
    parser = commands.add("init", _init, "write a commented configuration, and a card for your own images")
    parser.add_argument("job", choices=sorted(WRITERS))
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="a folder with a folder of images for each class; for dense, one with the folders images and label, depth_m, ...",
    )
    parser.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help="for lm: a .jsonl or .csv file of prompts and answers, chats, texts, or texts with labels",
    )
    parser.add_argument("--to", type=Path, default=Path(), metavar="FOLDER", help="where to write (the current folder)")


def _init(options: argparse.Namespace) -> None:
    from vismt.storage.files import atomic_write
    from vismt.storage.outputs import check_outputs

    if options.images is not None and not options.images.is_dir():
        raise UserError(f"init: --images {options.images}: no such folder.")
    folder, given = options.to.resolve(), options.images
    if options.texts is not None:
        if options.job != "lm":
            raise UserError(f"init: --texts is for lm; {options.job} takes --images.")
        if not options.texts.is_file():
            raise UserError(f"init: --texts {options.texts}: no such file.")
        given = options.texts
    files = WRITERS[options.job](folder, given and given.resolve())
    check_outputs("init", [(options.to / name, "") for name in files])
    for name, content in files.items():
        atomic_write(folder / name, content)
        console.stage("init", str(options.to / name))
    there = "" if folder == Path.cwd() else f"cd {shlex.quote(str(options.to))} && "
    console.stage("next", f"{there}vismt run {options.job}.yaml")


def _card(folder: Path, images: Path) -> tuple[ImageSet, Files]:
    """Return a folder's images and its card in `folder`."""
    from vismt.data.formats.folder import FolderSource
    from vismt.data.formats.plain_sets import plain_card
    from vismt.data.images import open_images

    card = plain_card(images)
    if card is None:
        raise UserError(f"init: --images {images}: no folder of images in it; need one for each class.")
    source = card.sources[0]
    assert isinstance(source, FolderSource)
    splits = ", ".join(f"{name}: null" for name in source.splits)
    text = templates.CARD.substitute(
        name=_quoted(card.name), root=_place(images, folder), layout=source.layout, splits=splits
    )
    return open_images(card), {CARD: text}


def _fewshot(folder: Path, images: Path | None) -> Files:
    if images is None:
        sizes = {"ways": 5, "shots": "1, 5", "queries": 5}
        return _config(
            "fewshot", templates.FEWSHOT, about="handwritten digits", data="digits", source="photo_crops", **sizes
        )
    opened, files = _card(folder, images)
    counts = [int(count) for count in opened.labels.bincount() if count]
    if len(counts) < 2 or min(counts) < 2:
        raise UserError(
            f"init: --images {images}: {len(counts)} classes, the smallest of {min(counts, default=0)} images; few-shot episodes "
            "need two classes of two images."
        )
    sizes = {
        "ways": min(5, len(counts)),
        "shots": "1, 5" if min(counts) > 5 else "1",
        "queries": min(10, min(counts) - (5 if min(counts) > 5 else 1)),
    }
    data = OWN_CARD
    return files | _config("fewshot", templates.FEWSHOT, about=opened.name, data=data, source="photo_crops", **sizes)


def _multitask(folder: Path, images: Path | None) -> Files:
    if images is None:
        return _config("multitask", templates.MULTITASK, about="handwritten digits", name="digits", data="digits")
    opened, files = _card(folder, images)
    name = re.sub(r"[^\w.+-]+", "-", opened.name)
    return files | _config("multitask", templates.MULTITASK, about=opened.name, name=_quoted(name), data=OWN_CARD)


def _robustness(folder: Path, images: Path | None) -> Files:
    files: Files = {}
    about, data, classes = "handwritten digits", "digits", 10
    if images is not None:
        opened, files = _card(folder, images)
        about, data, classes = opened.name, OWN_CARD, len(opened.classes)
    files["classifier.py"] = templates.CLASSIFIER.substitute(config="robustness.yaml", classes=classes)
    return files | _config("robustness", templates.ROBUSTNESS, about=about, data=data)


def _dense(folder: Path, images: Path | None) -> Files:
    if images is None:
        data = "{train: [motorcycle:train], test: [motorcycle:test]}"
        tasks = "[depth, normals]"
        return _config(
            "dense", templates.DENSE, about="tiles of one photograph", data=data, tasks=tasks, size="[140, 112]"
        )
    maps, tasks, more = _maps(images)
    name = re.sub(r"[^\w.-]", "-", images.name)
    files = {
        CARD: templates.DENSE_CARD.substitute(
            name=_quoted(name), root=_place(images, folder), image="images", maps=maps, **more
        )
    }
    data = f"{{train: [{OWN_CARD}], test_share: 0.2}}"
    return files | _config("dense", templates.DENSE, about=name, data=data, tasks=tasks, size="[112, 112]")


def _maps(images: Path) -> tuple[str, str, dict[str, str]]:
    """Return the maps of a folder and the tasks that learn from them, as YAML, and further lines of the card."""
    import numpy as np

    from vismt.data.maps.dense_maps import MAP_FORMS, read_array

    found = {name: form.target for name, form in MAP_FORMS.items() if (images / name).is_dir()}
    if not (images / "images").is_dir() or not found:
        raise UserError(
            f"init: --images {images}: for dense it needs a folder 'images' and folders of maps beside it, called by their form: "
            f"{', '.join(MAP_FORMS)}."
        )
    more, tasks = {"classes": "", "void": ""}, []
    for name, target in found.items():
        if target != "semseg":
            tasks.append(target)
            continue
        labels = {int(label) for path in sorted((images / name).iterdir()) for label in np.unique(read_array(path))}
        count = 1 + max(labels - {VOID}, default=-1)
        if not count:
            raise UserError(f"init: --images {images}: no map in '{name}' has a label but {VOID}, which marks none.")
        more = {"classes": f"classes: {count}\n", "void": f"    void: {VOID}\n" if VOID in labels else ""}
        tasks.append(f"{{name: semseg, classes: {count}}}")
    return ", ".join(f"{name}: {name}" for name in found), f"[{', '.join(tasks)}]", more


def _lm(folder: Path, texts: Path | None) -> Files:
    if texts is None:
        return {"texts.csv": templates.TEXTS} | _config("lm", templates.LM, data="./texts.csv")
    if texts.is_dir():
        raise UserError("init lm: a language model learns from texts; name a .jsonl or .csv file with --texts.")
    from vismt.data.texts.text_set import open_texts

    rows = open_texts(texts).rows
    learned, task = _text_task(texts, rows)
    keys = "\n    ".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in task.items())
    title = _quoted(f"Fine-tuning on {texts.name}")
    values = {"about": texts.name, "title": title, "learned": learned, "task": keys, "data": _place(texts, folder)}
    return _config("lm", templates.OWN_TEXTS, share=0.1 if len(rows) >= MANY else 0.3, **values)


def _text_task(path: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Return what is learned from rows of one form, and the keys of their task."""
    columns = list(rows[0]) if rows else []

    def field(names: Iterable[str]) -> str:
        return next(("{" + name + "}" for name in columns if name.lower() in names), "")

    prompt, answer, label, text = map(field, (PROMPTS, ANSWERS, LABELS, TEXTS))
    if "messages" in columns:
        return "the assistant's turns", {"kind": "chat"}
    if prompt and answer:
        # The prompt is the user's turn in the chat template of the model, where it has one.
        return "the answer", {"kind": "causal", "prompt": prompt, "chat": True, "options": {"answer": answer}}
    if text and label:
        labels = sorted({str(row[label[1:-1]]) for row in rows if label[1:-1] in row})
        if not 2 <= len(labels) <= len(ascii_uppercase):
            raise UserError(
                f"init: --texts {path}: {len(labels)} labels in the column '{label[1:-1]}'; needed are 2 to 26."
            )
        answers = {name: f" {letter}" for name, letter in zip(labels, ascii_uppercase)}
        listed = "".join(f"\n({letter.strip()}) {name}" for name, letter in answers.items())
        prompt = f"{text}{listed.replace('{', '{{').replace('}', '}}')}\nAnswer:"
        return "the label", {"kind": "classes", "prompt": prompt, "options": {"answers": answers, "label": label}}
    if text:
        return "every token", {"kind": "causal", "options": {"answer": text}}
    raise UserError(
        f"init: --texts {path}: the columns are {', '.join(columns) or 'none'}; needed are prompt and answer, messages, text, "
        "or text and label."
    )


def _place(path: Path, folder: Path) -> str:
    """Return a path as the files of `folder` name it: relative where it lies inside, so that both can be moved."""
    return _quoted(f"./{path.relative_to(folder).as_posix()}" if path.is_relative_to(folder) else path)


def _quoted(value: object) -> str:
    """Return a text as YAML takes it, whatever is in it."""
    return json.dumps(str(value), ensure_ascii=False)


def _config(job: str, template: templates.Template, **values: object) -> Files:
    name = f"{job}.yaml"
    return {name: template.substitute(config=name, **values)}


WRITERS: Mapping[str, Callable[[Path, Path | None], Files]] = {
    "dense": _dense,
    "fewshot": _fewshot,
    "lm": _lm,
    "multitask": _multitask,
    "robustness": _robustness,
}
