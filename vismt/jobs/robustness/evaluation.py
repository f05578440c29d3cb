"""Evaluation of a robustness run: a record for every image, scores with Wilson's intervals, errors under corruptions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vismt.data.batching import Images, InOrder, names_digest
from vismt.data.set_entries import row_name
from vismt.engine.log import record_stem
from vismt.evaluation.quality import ACCURACY
from vismt.jobs.image_scores import ImageView
from vismt.jobs.robustness.models import Classifier
from vismt.metatune.functional import answers
from vismt.robustness.corruptions import error_under_corruptions
from vismt.storage.fitted import fitted_once
from vismt.uncertainty.features import Fitted, Validation
from vismt.uncertainty.intervals import LOWER, Condition, Measure, Score

_TASK = "robustness"
CORRUPTION_ERROR = "mean error under corruptions"
ALL_CORRUPTIONS = Condition("all corruptions", "variant", "corruptions")


def records_path(folder: Path, data: str) -> Path:
    """Return the file with a classifier's answers on a set. folder: Folder of the classifier."""
    return folder / "records" / f"{record_stem('answers', row_name(data), 'images')}.jsonl"


@dataclass(frozen=True, kw_only=True)
class CardView(ImageView):
    """The images of a card.

    folder: Folder of the classifier. fitting: Images on which features are fitted.
    """

    folder: Path
    fitting: InOrder | None

    def fitted(self, name: str, kind: type[Fitted], fit: Callable[[], Fitted], *, of_net: bool = False) -> Fitted:
        assert self.fitting is not None  # the configuration asks for them
        images = self.fitting.images
        path = self.folder / f"{record_stem(name, row_name(self.data), 'images')}.json"
        return fitted_once(path, kind, f"{self.fingerprint} {names_digest(images)}", fit, examples=images.content)

    @torch.no_grad()
    def validation(self) -> list[Validation]:
        device = next((parameter.device for parameter in self.net.parameters()), None)
        parts = [(answers(self.net, pixels.to(device)).cpu().double(), of) for pixels, of, _ in self.fitting or ()]
        logits, labels = (torch.cat(part) for part in zip(*parts))
        return [Validation(logits, labels, torch.ones_like(labels, dtype=torch.bool))]


def card_view(
    classifier: Classifier,
    batches: InOrder,
    *,
    folder: Path,
    data: str,
    arm: str,
    opened: Callable[[str], AbstractContextManager[Images]],
    fitting: InOrder | None = None,
) -> CardView:
    """Return a classifier on the images of a card."""
    name, classes = row_name(data), classifier.num_classes
    return CardView(
        net=classifier.net,
        batches=batches,
        num_classes=classes,
        task=_TASK,
        data=name,
        part="",
        choice="task known" if classifier.separate else f"one of {classes} classes",
        records=records_path(folder, data),
        source=data,
        fingerprint=classifier.fingerprint(),
        label=f"{arm} on {name}",
        opened=opened,
        chance=1 / classes,
        folder=folder,
        fitting=fitting,
    )


def corruption_errors(scores: Mapping[str, Sequence[Score]]) -> dict[str, list[Score]]:
    """Return the mean error under corruptions on each set by arm, image by image. Every corruption has the same weight."""
    errors: dict[str, list[Score]] = {}
    for arm, arm_scores in scores.items():
        groups: dict[tuple[str, str, str], list[Score]] = {}
        for score in arm_scores:
            if score.condition.kind == "corruption" and score.measure.metric == ACCURACY:
                groups.setdefault((score.task, score.data, score.protocol), []).append(score)
        for corrupted in groups.values():
            values = {}
            for name in corrupted[0].measure.values:
                wrong: dict[str, dict[int, float]] = {}
                for score in corrupted:
                    by_severity = wrong.setdefault(score.condition.family, {})
                    by_severity[int(score.condition.level or 0)] = 1 - score.measure.values[name]
                values[name] = error_under_corruptions(wrong)
            first = corrupted[0].measure
            measure = Measure(CORRUPTION_ERROR, values, better=LOWER, groups=first.groups, grouped_by=first.grouped_by)
            errors.setdefault(arm, []).append(replace(corrupted[0], measure=measure, condition=ALL_CORRUPTIONS))
    return errors
