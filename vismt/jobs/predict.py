"""Predictions of a run folder, of a merged or exported folder, or of a checkpoint of a timm model, on files of the user.

A backbone without classes predicts the classes of a folder of examples (`support`), by the classifier of its few-shot run, or
else by cosine prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vismt.backbones import timm_models
from vismt.base import console
from vismt.base.errors import UserError
from vismt.data.images import open_images
from vismt.data.pixels import Pixels
from vismt.data.set_entries import card_and_split
from vismt.engine import runtime
from vismt.jobs import RESOLVED, open_run
from vismt.jobs.predictions import CLASSES, PREDICTIONS, Options, Predictions, Softmax, images_for, predict_classes
from vismt.metatune.protocol.episode_runner import FewShotModel
from vismt.metatune.protonet import ProtoNet
from vismt.robustness.classifier import SUFFIXES, checkpoint_config, load_classifier

SUPPORT_BYTES = 2**30  # of the support's pixels, which few-shot classifiers take at once


def predict_inputs(source: Path, inputs: Sequence[Path], target: Path | None, options: Options) -> Predictions:
    """Write predictions, print how many there are, and return them.

    target: Folder, by default `predictions` of a run, or beside a checkpoint. Raises UserError for an option of another kind of
    model, and for a folder without an image.
    """
    checkpoint = source / "model.safetensors" if source.is_dir() else source
    if (source / RESOLVED).exists() or not (checkpoint.is_file() and checkpoint.suffix in SUFFIXES):
        with open_run(source).owned() as run:
            found = run.predict(inputs, target, options)
    else:
        found = predict_checkpoint(checkpoint, inputs, target or checkpoint.parent / PREDICTIONS, options)
    console.stage("predict", found.counts)
    return found


def predict_checkpoint(path: Path, inputs: Sequence[Path], target: Path, options: Options) -> Predictions:
    """Write the predictions of a checkpoint of a timm model."""
    about, taken = checkpoint_config(path), CLASSES - {"arm"}
    if about.get("num_classes") == 0:
        if "merged_from" in about and "features" not in about:
            run = path.resolve().parent.parent
            what = f"'{run}'" if (run / RESOLVED).exists() else f"the folder of the run '{about['merged_from']}'"
            raise UserError(
                f"predict: '{path.parent}' has the merged backbone of a run, and the heads of its tasks predict in the run; name "
                f"{what}."
            )
        options.check(taken | {"support"}, "a backbone")
        images = images_for(inputs, target, options)
        settings = about.get("features") or {}
        size = (about.get("model_args") or {}).get("img_size") or about.get("img_size")
        backbone = timm_models.create(
            str(about.get("architecture")),
            tuple(size) if isinstance(size, list) else size,
            path,
            block=settings.get("block"),
            pool=settings.get("pool"),
        )
        proto = ProtoNet(backbone, settings.get("scale", 10.0)).eval().to(runtime.processes().device)
        net, classes = fit_few_shot(proto, options.support, backbone.img_size[0], f"'{path.parent}'")
        return predict_classes(net, backbone.img_size[0], [classes], images, target, options, label=str(path))
    if not about.get("architecture"):
        raise UserError(
            f"predict: '{path}' has no config.json beside it that names its model; write one, such as "
            '{"architecture": "resnet18", "label_names": ["cat", "dog"]}.'
        )
    options.check(taken, "a classifier")
    images = images_for(inputs, target, options)
    classifier = load_classifier(path)
    names = classifier.labels or [f"class {label}" for label in range(classifier.num_classes)]
    net = classifier.to(runtime.processes().device)
    groups = _softmaxes(names, path.parent.name, separate=about.get("label_space") == "separate")
    return predict_classes(net, max(net.size), groups, images, target, options, label=str(path))


def _softmaxes(names: Sequence[str], otherwise: str, *, separate: bool) -> list[Softmax]:
    """Return one softmax over all classes, or one for each task. Classes without a task have the name `otherwise`."""
    tasks = [name.partition("/")[0] if "/" in name else otherwise for name in names]
    if not separate:
        return [Softmax(slice(len(names)), names, tasks)]
    starts = [place for place, task in enumerate(tasks) if place == 0 or tasks[place - 1] != task]
    spans = [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(names)])]
    return [Softmax(span, names[span], tasks[span]) for span in spans]


def fit_few_shot(model: FewShotModel, support: Path | None, size: int, what: str) -> tuple[nn.Module, Softmax]:
    """Return the classifier that a few-shot model makes of a folder of examples, and its classes.

    model: Model in eval mode, on the device of this process. support: Folder with a folder of images for each class, or a card.
    what: Name of the model in errors. Raises UserError for no folder, fewer than two classes, and more images than
    SUPPORT_BYTES.
    """
    if support is None:
        raise UserError(
            f"predict: {what} has no classes of its own; give support, a folder with a folder of example images for each class."
        )
    images = open_images(*card_and_split(str(support)))
    most = SUPPORT_BYTES // (12 * size * size)
    if len(images.classes) < 2 or len(images) > most:
        raise UserError(
            f"predict: support {support}: {len(images.classes)} classes, {len(images):,} images; it needs two classes at least "
            f"and takes up to {most:,} images of {size} px."
        )
    pixels, device = Pixels(images, size, cache=False), runtime.processes().device
    labels: Tensor = pixels.labels
    net = model.classifier(pixels[torch.arange(len(labels))].to(device), labels.to(device))
    return net, Softmax(slice(len(images.classes)), images.classes, [images.name] * len(images.classes))
