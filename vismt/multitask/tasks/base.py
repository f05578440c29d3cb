"""Base classes of the tasks of a dense run: a loss over valid pixels, a metric with one score, and pictures of maps.

A batch has these targets, by `key`. Labels are int64 (b, h, w), 255 for pixels without a label. Depth is float (b, h, w) in
metres, 0 for pixels without a value. Normals are float (b, 3, h, w) of unit length, zeros for pixels without a value. The class
of an image is int64 (b,), -1 for images without a class. A sample that lacks a task's labels has a map without a valid pixel
(partial labels). It enters neither the loss nor the metric. The loss takes the valid pixels of the batch (for classification
its labelled images) as one list, so that nothing at other pixels, NaN included, reaches the loss or its gradient. A mean is
over the valid pixels of the batch, not over images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vismt.base.errors import UserError, require_known, shown_value
from vismt.base.registry import Registry
from vismt.data.maps.dense_sample import IGNORE
from vismt.multitask.heads import resize_logits
from vismt.storage.files import JsonObject

if TYPE_CHECKING:
    from torchmetrics import Metric

DARK = 64  # grey level of pixels without a value in pictures
# Loss weights of InvPT and TaskPrompter for NYUD-v2 and PASCAL-Context; a task's default is its entry here.
NYUD_WEIGHTS = {"semseg": 1.0, "depth": 1.0, "normals": 10.0, "edge": 50.0}
PASCAL_WEIGHTS = {"semseg": 1.0, "parts": 2.0, "saliency": 5.0, "normals": 10.0, "edge": 50.0}
TASKS: Registry[type[Task]] = Registry(
    "task: no dense task",
    dict.fromkeys(("depth", "edge", "normals", "saliency"), "vismt.multitask.tasks.maps")
    | dict.fromkeys(("classify", "parts", "semseg"), "vismt.multitask.tasks.classes"),
)
# Options of tasks that change the loss and not the score.
LOSS_OPTIONS = (
    "class_weights",
    "class_counts",
    "dice",
    "label_smoothing",
    "positive_weight",
    "loss_weight",
)


@dataclass(frozen=True)
class Number:
    """How reports show a number of a metric.

    Args:
        label: Display name, such as "mIoU".
        unit: Unit, such as "m", or "" for a number without a unit.
        share: Whether the number is a fraction in [0, 1], which reports show in per cent.
        lower_is_better: Direction of the number.
    """

    label: str
    unit: str = ""
    share: bool = False
    lower_is_better: bool = False

    @property
    def name(self) -> str:
        """Label with its unit."""
        return f"{self.label} in {self.unit}" if self.unit else self.label


@dataclass(frozen=True, kw_only=True, eq=False)
class Task(ABC):
    """Base class of all tasks, including tasks that predict one value for the whole image.

    Args:
        loss_weight: Factor of the loss, > 0.

    Attributes:
        vector: Whether the target has a dimension of 3 channels.
        predicts_classes: Whether the answer is the class with the largest logit, of each pixel or of the image.
    """

    vector: ClassVar[bool] = False
    predicts_classes: ClassVar[bool] = False
    loss_weight: float = 1.0

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the task."""

    @property
    @abstractmethod
    def key(self) -> str:
        """Name of the task's target in a batch."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Number of channels of the head's output."""

    @property
    @abstractmethod
    def measure(self) -> str:
        """Entry of the metric's `compute()` that is the score of the task."""

    @property
    @abstractmethod
    def numbers(self) -> Mapping[str, Number]:
        """Entries of the metric's `compute()` that reports show: the score and further numbers.

        Each is a smooth function of sums over pixels, so that the jackknife's interval holds.
        """

    @property
    def headline(self) -> Number:
        """How reports show the score."""
        return self.numbers[self.measure]

    @property
    def default_class_names(self) -> Sequence[str]:
        """Names of the classes if no data set names them. Empty if the task has no such names."""
        return ()

    def __post_init__(self) -> None:
        check_number(self.name, "loss_weight", self.loss_weight, 0, float("inf"))

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor | None:
        """Return the loss without its weight. With several processes it is the mean over this process's pixels.

        Args:
            prediction: Prediction float (b, channels, h, w), at the target's size, or (b, channels) for tasks of whole images.
            target: Target of the task, see the module's docstring.

        Returns:
            A scalar in at least fp32, or None if the batch has no valid pixel.

        Raises:
            UserError: If a shape, size or dtype is wrong, or a label is out of range.
        """
        self.check(prediction, target)
        valid = self.valid(target)
        rows = prediction.movedim(1, -1)[valid]
        truth = (target.movedim(1, -1) if self.vector else target)[valid]
        if not len(rows):
            return None
        return self.pixel_loss(rows.to(torch.promote_types(rows.dtype, torch.float32)), truth)

    def update(self, metric: Metric, prediction: Tensor, target: Tensor) -> None:
        """Add a batch to the metric, without the samples that have no valid pixel.

        It takes the arguments of `loss`, and raises its errors and the errors of the metric.
        """
        self.check(prediction, target)
        labelled = self.valid(target)[:, None].flatten(1).any(1)
        if labelled.any():
            self.count(metric, prediction.detach()[labelled], target[labelled])

    def view(self, prediction: Tensor, mirrored: bool) -> Tensor:
        """Convert a prediction (b, channels, ...) to the form in which it is averaged with other views of the image.

        mirrored: Whether the image was mirrored. The returned prediction always belongs to the unmirrored image.
        """
        return prediction

    def values(self, computed: JsonObject) -> dict[str, float]:
        """Return the values of `numbers` from the metric's `compute()`. An undefined value is NaN."""
        return {key: float(computed[key]) for key in self.numbers}

    def score(self, computed: JsonObject) -> float:
        """Return the score, the number that enters Delta_m, from the metric's `compute()`."""
        return self.values(computed)[self.measure]

    def constant(self, values: Tensor) -> Tensor:
        """Return the best prediction (channels,) that is the same everywhere. The default is the mean.

        values: Targets (p,) or (p, 3) of the p > 0 valid pixels or images of the training part.
        """
        return values.double().mean(0).reshape(self.channels).float()

    def resized(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """Resize the logits of a head to the size (h, w) of the targets. Logits of whole images stay unchanged."""
        return logits

    def rescaled(self, prediction: Tensor, s: float) -> Tensor:
        """Convert the prediction for an image that was enlarged s times to the unit of the original image."""
        return prediction

    @abstractmethod
    def answer(self, prediction: Tensor) -> Tensor:
        """Decode a prediction (channels, h, w): class ids int64 (h, w), probabilities or depths (h, w), or unit vectors.

        For a prediction (channels,) of the whole image, return its class id int64 ().
        """

    @abstractmethod
    def metric(self) -> Metric:
        """Return a new metric of vismt.multitask.metrics."""

    @abstractmethod
    def valid(self, target: Tensor) -> Tensor:
        """Return where the target has a value: bool (b, h, w), or (b,) for tasks of whole images."""

    @abstractmethod
    def pixel_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the loss of p > 0 valid pixels.

        prediction: Logits or values (p, channels), at least fp32. target: Targets (p,) or (p, 3).
        """

    def count(self, metric: Metric, prediction: Tensor, target: Tensor) -> None:
        """Update the metric with samples that all have a valid pixel."""
        metric.update(prediction, target)

    @abstractmethod
    def check(self, prediction: Tensor, target: Tensor) -> None:
        """Raise UserError unless prediction and target have this task's shapes and dtypes and the same size."""

    def caption(self, prediction: Tensor, class_names: Sequence[str] = ()) -> str:
        """Return a short text that describes a prediction (channels, h, w) or (channels,), or "" if there is none."""
        return ""

    def legend(self, map: Tensor, class_names: Sequence[str] = ()) -> list[tuple[str, str]]:
        """Return (class name, colour "#rrggbb") of the classes in a picture, most frequent first.

        map: Prediction (channels, h, w), or labels of any shape.
        """
        return []


@dataclass(frozen=True, kw_only=True, eq=False)
class MapTask(Task):
    """Base class of tasks that predict a value for every pixel, which can be drawn as a picture."""

    def resized(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        return resize_logits(logits, size)

    def view(self, prediction: Tensor, mirrored: bool) -> Tensor:
        return prediction.flip(-1) if mirrored else prediction

    def picture(self, map: Tensor, like: Tensor | None = None) -> Tensor:
        """Draw the map of one sample. Pixels without a value are dark grey.

        Args:
            map: Prediction (channels, h, w), or a target as in a batch but without the batch dimension.
            like: Map that sets the range of colours (depth), so that a prediction is drawn like its target.

        Returns:
            The picture, uint8 (3, h, w) on the CPU.

        Raises:
            UserError: If the shape is wrong.
        """
        predicted = map.ndim == 3 and len(map) == self.channels and map.is_floating_point()
        if not predicted and map.ndim != 2 + self.vector:
            raise UserError(
                f"{self.name}: cannot draw a map {tuple(map.shape)} {map.dtype}; pass the map of a single sample."
            )
        colors, visible = self.paint(map.detach().cpu(), predicted, None if like is None else like.detach().cpu())
        return torch.where(visible, (255 * colors).round(), DARK).to(torch.uint8)

    @abstractmethod
    def paint(self, map: Tensor, predicted: bool, like: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return colours, float (3, h, w) in [0, 1], and where the map has a value, bool (h, w)."""

    def check(self, prediction: Tensor, target: Tensor) -> None:
        if prediction.ndim != 4 or prediction.shape[1] != self.channels or not prediction.is_floating_point():
            raise UserError(
                f"{self.name}: the prediction is {tuple(prediction.shape)} {prediction.dtype}, needed floating point "
                f"(b, {self.channels}, h, w)."
            )
        shape = "(b, 3, h, w)" if self.vector else "(b, h, w)"
        if target.ndim != 3 + self.vector or (self.vector and target.shape[1] != 3):
            raise UserError(f"{self.name}: the target is {tuple(target.shape)}, needed {shape}.")
        if len(prediction) != len(target) or prediction.shape[-2:] != target.shape[-2:]:
            raise UserError(
                f"{self.name}: prediction {tuple(prediction.shape)}, target {tuple(target.shape)}: resize the prediction to the "
                "target's size (resize_logits), never the target."
            )


class LabelTask(MapTask):
    """Base class of tasks with a map of labels as target, 0 to classes - 1 or 255."""

    classes: int

    def valid(self, target: Tensor) -> Tensor:
        return target != IGNORE

    def check(self, prediction: Tensor, target: Tensor) -> None:
        super().check(prediction, target)
        self.check_labels(target)

    def check_labels(self, target: Tensor) -> None:
        """Raise UserError unless all labels are in 0 to classes - 1 or 255."""
        check_labels(self.name, target, self.classes, IGNORE)

    def constant(self, values: Tensor) -> Tensor:
        return log_frequencies(values, self.channels)


def log_frequencies(labels: Tensor, classes: int) -> Tensor:
    """Return log((n_c + 1) / (n + classes)), float (classes,), so that no class has probability 0."""
    counts = labels.bincount(minlength=classes) + 1
    return (counts.double() / counts.sum()).log().float()


def check_labels(task: str, target: Tensor, classes: int, ignore: int) -> None:
    """Raise UserError unless `target` is int64 and its labels are in 0 to classes - 1 or equal to `ignore`."""
    if target.dtype != torch.int64:
        raise UserError(f"{task}: the target is {target.dtype}, needed int64 labels.")
    strange = target[(target != ignore) & ((target < 0) | (target >= classes))]
    if strange.numel():
        raise UserError(f"{task}: label {int(strange[0])}; classes are 0 to {classes - 1}, {ignore} means no label.")


def check_number(task: str, option: str, value: object, low: float, high: float) -> None:
    """Raise UserError unless low < value < high."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
        raise UserError(f"{task}: {option} {shown_value(value)}; it must be a number above {low:g} and below {high:g}.")


def make_task(spec: str | Mapping[str, object]) -> Task:
    """Return the task of a specification.

    Args:
        spec: Name of the task, or {"name": ..., option: value, ...} with the options of its class. A task of whole images may
            have another name, with kind: classify.

    Raises:
        UserError: If a name or option is unknown, an option is missing, or a value is out of range.
    """
    if not isinstance(spec, str | Mapping):
        raise UserError(f"task: {shown_value(spec)}; give its name, or its options with the name as 'name'.")
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    if "module" in options:
        raise UserError("task: module: name the module at the top of the file, module: mine.")
    kind = str(options.pop("kind", options.get("name")))
    task, name = TASKS[kind], options.pop("name", kind)
    if name != kind:
        options = {"name": name, **options}
    required = task_options(task)
    require_known(f"task: '{kind}' has no option", options, required)
    for option, is_required in required.items():
        if is_required and option not in options:
            raise UserError(f"task: '{kind}' needs '{option}'.")
    return task(**options)


def loss_options(task: Task) -> list[str]:
    """Return the options of a task that change its loss and not its score."""
    return [name for name in task_options(type(task)) if name in LOSS_OPTIONS]


def task_options(task: type[Task]) -> dict[str, bool]:
    """Return the options of a task by name, and whether they must be given."""
    return {field.name: field.default is MISSING for field in fields(task)}
