"""Sets of other classes: how well the confidence of a net tells them from the test images of each task.

    AUROC = P(max_c p_c(x) > max_c p_c(x')) + 1/2 P(equal)        x a test image of the task, x' an image of the other set

Maximum softmax probability: Hendrycks and Gimpel, ICLR 2017, arXiv 1610.02136. The confidences of the task's images are those of
its records; those of the other set have a record file of their own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from vismt.base import console, ranks
from vismt.data.batching import Gathered, InOrder
from vismt.data.names import row_name
from vismt.engine import runtime
from vismt.engine.log import record_stem
from vismt.engine.study import Training
from vismt.jobs.classification.evaluation import Evaluation
from vismt.jobs.classification.models import PixelNet, stored
from vismt.jobs.variants import against
from vismt.multitask.nets import TaskClassifier
from vismt.report.results import Score
from vismt.storage.lines import read_lines
from vismt.storage.records import SHARE, Records
from vismt.uncertainty.intervals import NUMBER, Measure


def detection_scores(
    evaluation: Evaluation, net: PixelNet, training: Training, separate: bool, records: Path
) -> list[Score]:
    """Return the AUROC of every set of evaluate.ood against the evaluated images of every task.

    Arguments as in `Evaluation.scores`, whose records are read.
    """
    from vismt.uncertainty.probability_metrics import detection_values  # loads torchmetrics

    settings, union = evaluation.config.evaluate, evaluation.data.union
    scores = []
    for number, task in enumerate(union.tasks):
        classifier = TaskClassifier(net, union, number, separate).eval()
        inside = {
            row["id"]: row["clean confidence"]
            for row in read_lines(records / f"{settings.split}-{task}.jsonl")
            if "id" in row
        }
        for name in settings.ood:
            outside = confidences(
                classifier,
                evaluation.data.outside(name),
                settings.batch,
                records / f"{record_stem('ood', task, row_name(name))}.jsonl",
                {"data": name, "task": task, "fingerprint": net.fingerprint()},
                f"{row_name(name)} against {task}, {training.arm} seed {training.seed}",
            )
            values = detection_values(*(-torch.tensor(list(part.values())) for part in (inside, outside)))
            ids = [*inside, *(f"ood {name}" for name in outside)]
            measure = Measure("AUROC", dict(zip(ids, values.tolist(), strict=True)), NUMBER, chance=0.5)
            text = f"{settings.split} images, detection"
            scores.append(Score("classification", task, text, measure, against(row_name(name))))
    return scores


@torch.no_grad()
def confidences(
    classifier: nn.Module, images: Gathered, batch: int, path: Path, settings: dict[str, object], label: str
) -> dict[str, float]:
    """Return the largest probability of each image by its id; images on record are not evaluated again."""
    log = Records(path, settings, {"confidence": SHARE}, key="id")

    def run(number: int) -> list[dict]:
        ids = images.ids[number * batch : (number + 1) * batch]
        if all(name in log for name in ids):
            return []
        logits: Tensor = classifier(batches[number][0].to(runtime.processes().device))
        largest = logits.double().softmax(1).amax(1).clamp_max(1).tolist()
        return [{"id": name, "confidence": value} for name, value in zip(ids, largest, strict=True)]

    with log, stored(images) as marked:
        batches = InOrder(marked, batch)
        for rows in console.track(ranks.share(range(len(batches)), run), "eval", label, len(batches)):
            for row in rows:
                log.add(row)
    return {name: log[name]["confidence"] for name in images.ids}
