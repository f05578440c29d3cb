"""Image classifiers as functions of pixels in [0, 1]: a timm name, a checkpoint of a timm model, RobustBench, or a function.

Models of RobustBench (Croce et al., arXiv 2010.09670) are named `robustbench:MODEL[:DATASET[:THREAT]]`. The package is not a
dependency. Its models take pixels in [0, 1] and normalise them themselves. Their outputs are the classes of their data set, in
its order. Weights are kept under the cache folder.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.backbones.any_module import UNKNOWN
from vismt.backbones.pyramid import image_size
from vismt.backbones.timm_models import check_stages, forward_runs, runs_at, timm_model
from vismt.backbones.weights import read_checkpoint, with_counts
from vismt.base import console
from vismt.base.errors import UserError, near, require_known, shown_value
from vismt.base.registry import first_line, import_own, working_folder_on_path
from vismt.storage.files import JsonObject, parse_json
from vismt.storage.paths import cache_root

ROBUSTBENCH = "robustbench:"  # how the names of its models begin
ZOO_SETS = {"cifar10": (10, 32), "cifar100": (100, 32), "imagenet": (1000, 224)}  # classes, pixels

FUNCTION = re.compile(r"(?!robustbench:)[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # a module and a function in it
SUFFIXES = {".safetensors", ".pt", ".pth", ".bin", ".tar"}


class PixelClassifier(nn.Module):
    """A classifier with its resizing and normalisation: images float (b, 3, h, w) in [0, 1] -> logits (b, c).

    size: Height and width to which images are resized. mean, std: Mean and standard deviation of each channel for the
    normalisation. labels: Names of the c classes. None if they are not known. num_classes: Number c of classes, by default the
    number of the net.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: nn.Module,
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        labels: list[str] | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        stock: Any = net
        self.net, self.size, self.labels = net, tuple(size), labels
        self.num_classes: int = stock.num_classes if num_classes is None else num_classes
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, size=self.size, mode="bilinear", antialias=True, align_corners=False)
        normalised = (images - self.mean.to(images.dtype)) / self.std.to(images.dtype)
        # For half-precision weights, pixels stay in float32 until they are normalised.
        weights = (p.dtype for p in self.net.parameters() if p.is_floating_point())
        return self.net(normalised.to(next(weights, images.dtype)))


def load_classifier(
    name_or_checkpoint: str | Path,
    num_classes: int | None = None,
    *,
    architecture: str | None = None,
    pretrained: bool = True,
    img_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> PixelClassifier:
    """Load a timm classifier on the CPU, in eval mode.

    Args:
        name_or_checkpoint: A timm name, a .safetensors / .pt / .pth file of timm's keys (at the top, or under state_dict or
            model), or a folder with model.safetensors. config.json beside a file, as `vismt merge` and timm write it, has size,
            normalisation and names of the classes.
        num_classes: Number of classes, by default the number in the weights. Another number is refused, because a fresh head
            classifies nothing.
        architecture: The timm model of a file, or the "module:function" that builds the module whose state_dict the file has.
            By default, config.json beside the file names the model and img_size.
        pretrained: Whether timm fetches the weights of a name.
        img_size: Size of the model's images in pixels. By default, the size in config.json beside a file, or of the timm model.
            Your own module needs a size.
        mean: Mean of each channel of images in [0, 1], for the normalisation. By default, the mean in `pretrained_cfg` of
            config.json beside a file, or of the timm model. A line says which one a file gets. Your own
            module gets images in [0, 1].
        std: Standard deviation of each channel, as mean.

    Returns:
        The classifier, for images float (b, 3, h, w) in [0, 1] of any size.

    Raises:
        UserError: For an unknown name, a missing or unreadable file, or weights that do not fit.
    """
    about: JsonObject = {}
    asked = {"img_size": img_size} if img_size else {}
    path = checkpoint_file(name_or_checkpoint)
    if path is not None:
        about = checkpoint_config(path)
        architecture = architecture or about.get("architecture")
        if FUNCTION.fullmatch(architecture or ""):
            own, _ = classifier_from_function(str(architecture), img_size)
            found = classifier_of(_filled(own, path, architecture), img_size)
            if mean is None and std is None:
                return found
            size = (found.size[0], found.size[1])
            given = (mean or UNKNOWN[0], std or UNKNOWN[1])
            return PixelClassifier(found.net, size, *given, num_classes=found.num_classes).eval()
        about = {**about, "model_args": {**about.get("model_args", {}), **asked}}
        net = _from_file(path, about, architecture, num_classes)
    else:
        architecture = str(name_or_checkpoint)
        net = _create(architecture, num_classes, pretrained, **asked)
    if img_size:
        check_stages((img_size, img_size), str(name_or_checkpoint), partial(runs_at, architecture or ""))
    stock: Any = net.pretrained_cfg
    named = {**about.get("pretrained_cfg", {}), **({"mean": mean} if mean else {}), **({"std": std} if std else {})}
    config = {**stock, **named}
    for key in ("mean", "std"):
        if len(config[key]) != len(stock["mean"]) or not all(map(math.isfinite, config[key])):
            raise UserError(
                f"model '{name_or_checkpoint}': {key} {list(config[key])}; it needs {len(stock['mean'])} numbers."
            )
    if path is not None:
        values = ", ".join(f"{key} {' '.join(f'{value:.4g}' for value in config[key])}" for key in ("mean", "std"))
        guessed = not {"mean", "std"} <= named.keys()
        why = f", which timm's {architecture} has. The checkpoint names none: set mean and std if it was trained with others"
        console.stage("model", f"{path.name}   normalises by {values}{why if guessed else ''}")
    pixels = (img_size, img_size) if img_size else config["input_size"][-2:]
    size = getattr(getattr(net, "patch_embed", None), "img_size", None) or pixels
    labels = about.get("label_names")
    known = isinstance(labels, list) and len(labels) == net.num_classes
    return PixelClassifier(net, size, config["mean"], config["std"], labels if known else None).eval()


def checkpoint_file(name: str | Path) -> Path | None:
    """Return the file of a classifier's weights. None for a name of timm. Raises UserError for a file that does not exist."""
    path = Path(name)
    if path.is_dir():
        path = path / "model.safetensors"
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise UserError(f"checkpoint '{path}': no such file.")
        return path
    if len(path.parts) > 2:  # names have at most one slash, after hf-hub:
        raise UserError(f"model '{path}': no such file.")
    return None


def classifier_of(model: nn.Module, img_size: int | None = None) -> PixelClassifier:
    """Return a copy of any module as a classifier of images in [0, 1], in eval mode.

    Args:
        model: A timm model, a PixelClassifier, or any module that maps images float (b, 3, h, w) in [0, 1] to logits (b, c). A
            timm model gets images that are normalised by its pretrained_cfg.
        img_size: Size of the images in pixels, by default the size of a timm model.

    Raises:
        UserError: For a module without class scores, or of unknown size.
    """
    model = copy.deepcopy(model).eval()
    if isinstance(model, PixelClassifier):
        return model
    size = img_size or image_size(model)[-1]
    settings = getattr(model, "pretrained_cfg", None) or {}
    if "input_size" in settings and image_size(model) != (size, size):
        zeros = next(model.parameters()).new_zeros
        check_stages(
            (size, size),
            type(model).__name__,
            lambda at: forward_runs(lambda: model(zeros(1, 3, *at))),
            image_size(model),
        )
    mean, std = (settings.get(name, values) for name, values in zip(("mean", "std"), UNKNOWN))
    classes = getattr(model, "num_classes", None)
    if not isinstance(classes, int):
        parameter = next(model.parameters(), torch.empty(0))
        with torch.no_grad():
            logits = model(torch.full((1, 3, size, size), 0.5, device=parameter.device))
        classes = logits.shape[1] if isinstance(logits, Tensor) and logits.ndim == 2 else 0
    if classes < 2:
        raise UserError(
            f"model: {type(model).__name__} gives no class scores; need a module from images in [0, 1] to logits (b, classes)."
        )
    return PixelClassifier(model, (size, size), mean, std, num_classes=classes)


def _create(name: str, num_classes: int | None, pretrained: bool, **options: object) -> nn.Module:
    import timm

    base = name.split(".")[0].removeprefix("hf_hub:").removeprefix("hf-hub:")
    if ":" not in name and base not in timm.list_models():
        raise UserError(f"model '{name}' is neither a timm name nor a checkpoint file.{near(base, timm.list_models())}")
    fresh = {"num_classes": num_classes} if num_classes and not pretrained else {}
    try:
        net = timm_model(name, pretrained=pretrained, **fresh, **options)
    except (OSError, RuntimeError, ValueError, TypeError) as error:  # the last: an img_size that it does not take
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model '{name}': timm cannot build it or get its weights ({reason}).") from error
    if num_classes is not None and net.num_classes != num_classes:
        raise UserError(f"model '{name}': its weights have {net.num_classes} classes, not {num_classes}.")
    return net


def checkpoint_config(path: Path) -> JsonObject:
    """Return config.json beside a checkpoint, as `vismt merge` writes it. Empty if there is none."""
    config = path.parent / "config.json"
    try:
        return parse_json(config.read_text(encoding="utf8")) if config.is_file() else {}
    except ValueError as error:
        raise UserError(f"checkpoint '{path}': the config.json beside it is not JSON ({error}).") from error


def _from_file(path: Path, config: JsonObject, architecture: str | None, num_classes: int | None) -> nn.Module:
    if not architecture:
        raise UserError(
            f"checkpoint '{path}': which model is it? Give architecture (a timm name, or module:function of yours, which builds "
            "it), or a config.json beside it."
        )
    if config.get("num_classes") == 0:
        raise UserError(
            f"checkpoint '{path}': a backbone without a classifier; name the run folder that it is from as classifier.run."
        )
    arguments = {"img_size": config.get("img_size"), **config.get("model_args", {})}
    options = {name: arguments[name] for name in ("img_size", "global_pool") if arguments.get(name)}
    state = read_checkpoint(path)
    net = _create(architecture, None, pretrained=False)
    stock: Any = net.pretrained_cfg
    names = stock.get("classifier") or ()
    keys = [f"{name}.weight" for name in ([names] if isinstance(names, str) else names)]
    head = next((state[key] for key in keys if key in state), None)
    if head is not None and num_classes not in (None, len(head)):
        raise UserError(f"checkpoint '{path}': its head has {len(head)} classes, not {num_classes}.")
    classes = len(head) if head is not None else num_classes
    return _filled(_create(architecture, classes, pretrained=False, **options), path, architecture)


def _filled(net: nn.Module, path: Path, architecture: str | None) -> nn.Module:
    """Return a module with the weights of a checkpoint."""
    state = read_checkpoint(path)
    try:
        net.load_state_dict(with_counts(state, net.state_dict(), f"checkpoint '{path}'"), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"checkpoint '{path}' does not fit {architecture}: {reason}") from error
    return net


def classifier_from_function(name: str, size: int | None = None) -> tuple[nn.Module, int]:
    """Import a user's function, call it without arguments and return its classifier.

    Args:
        name: Name "module:function". The module is imported with the current folder on the path. The function returns
            (classifier, number of classes), or only the classifier. The classifier is an nn.Module that maps images float (b,
            3, h, w) in [0, 1] to logits (b, number of classes), normalisation included.
        size: Size of an image in pixels. If the function returns only the classifier, it is run on an image of this size to
            find its number of classes.

    Returns:
        The classifier in eval mode, and its number of classes.

    Raises:
        UserError: If the name has another form, the module cannot be imported, the attribute is missing or not callable, or the
            function fails or returns something else.
    """
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise UserError(f"model '{name}': give 'module:function', as in 'my_models:load'.")
    with working_folder_on_path():
        module = import_own(module_name, f"model '{name}'")
        function = getattr(module, function_name, None)
        if not hasattr(module, function_name):
            hint = near(function_name, [key for key in vars(module) if not key.startswith("_")])
            raise UserError(f"model '{name}': module '{module_name}' has no '{function_name}'.{hint}")
        if not callable(function):
            raise UserError(f"model '{name}': '{function_name}' is {type(function).__name__}, not a function.")
        try:
            result = function()
        except (Exception, SystemExit) as error:
            raise UserError(f"model '{name}': the function failed ({first_line(error)}).") from error
    return _checked_classifier(name, result, size)


def _checked_classifier(name: str, result: object, size: int | None) -> tuple[nn.Module, int]:
    """Return what a user's function returned as (classifier, number of classes)."""
    pair = result if isinstance(result, tuple) else (result, getattr(result, "num_classes", None))
    if isinstance(result, nn.Module) and pair[1] is None and size:
        pair = (result, classifier_of(result, size).num_classes)
    if len(pair) != 2 or not isinstance(pair[0], nn.Module):
        kinds = ", ".join(type(item).__name__ for item in pair) if isinstance(result, tuple) else type(result).__name__
        raise UserError(
            f"model '{name}': the function returned {kinds}; need (nn.Module, number of classes), or an nn.Module with "
            "num_classes."
        )
    classifier, classes = pair
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
        raise UserError(
            f"model '{name}': {type(classifier).__name__} came with {shown_value(classes)} as its number of classes; "
            "need an integer of 2 or more, returned beside it or as its num_classes, or the size of its images (img_size)."
        )
    return classifier.eval(), classes


def load_robustbench(name: str) -> tuple[nn.Module, int, int]:
    """Load a model, by default of cifar10 and the threat Linf.

    Returns:
        The classifier in eval mode, its number of classes, and the size of its images in pixels.

    Raises:
        UserError: If robustbench is not installed, the model, data set or threat is unknown, or weights cannot be fetched.
    """
    parts = name.removeprefix(ROBUSTBENCH).split(":")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise UserError(
            f"model '{name}': need robustbench:MODEL[:DATASET[:THREAT]], as in robustbench:Standard:cifar10:L2."
        )
    model, dataset, threat = (*parts, *("", "cifar10", "Linf")[len(parts) :])
    try:
        from robustbench.model_zoo import model_dicts
        from robustbench.utils import load_model
    except ImportError as error:
        raise UserError(
            f"model '{name}': the package robustbench is not installed: pip install "
            "git+https://github.com/RobustBench/robustbench.git"
        ) from error
    zoo = {_text(key): {_text(kind): list(nets) for kind, nets in kinds.items()} for key, kinds in model_dicts.items()}
    for what, value, known in (
        ("data set", dataset, zoo),
        ("threat", threat, zoo.get(dataset, {})),
        ("model", model, zoo.get(dataset, {}).get(threat, ())),
    ):
        require_known(f"model '{name}': RobustBench has no {what}", [value], known)
    if dataset not in ZOO_SETS:
        raise UserError(f"model '{name}': data set '{dataset}' is not supported.{near(dataset, ZOO_SETS)}")
    try:
        net = load_model(model, model_dir=str(cache_root() / "robustbench"), dataset=dataset, threat_model=threat)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model '{name}': RobustBench cannot get its weights ({reason}).") from error
    return net.eval(), *ZOO_SETS[dataset]


def _text(key: object) -> str:
    """Return the text of a key of the model zoo, which is an enumeration."""
    return str(getattr(key, "value", key))
