"""The k-NN accuracy of sets of other classes in the features of a net: `evaluate.neighbours`.

    argmax_c sum of exp(cosine / 0.07) over the images of class c among the 20 nearest other images

This is the k-NN evaluation of DINO (arXiv 2104.14294), of each image against the others of its set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vismt.data.set_entries import row_name
from vismt.evaluation.sections import FEATURES
from vismt.storage.records import SHARE
from vismt.uncertainty.features import EMBEDDING, Feature, View
from vismt.uncertainty.intervals import CLEAN, Measure, Score

_NEAREST, _WIDTH = 20, 0.07


@FEATURES.register("neighbours")
class Neighbours(Feature):
    """Whether the nearest neighbours of each image have its class."""

    key, needs = "neighbours", frozenset({EMBEDDING})
    kind, default = list[str], list
    meaning = (
        "sets of images of other classes, which show how much of the frozen model is kept: their k-NN accuracy in the net's "
        "features."
    )
    about = "features"

    @property
    def sets(self) -> Sequence[str]:
        return self.section

    def net_scores(self, views: Sequence[View]) -> list[Score]:
        def columns(features: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"right": (neighbour_classes(features, labels) == labels).double()}

        scores, view = [], views[0]
        for entry in self.section:
            rows = view.embedded(entry, self.key, {"right": SHARE}, columns)
            right = dict(zip(rows.ids, rows.column("right").tolist(), strict=True))
            measure = rows.grouped(Measure("k-NN accuracy", right, counts=True))
            scores.append(view.score(measure, CLEAN, rows.content, self.about, row_name(entry)))
        return scores


def neighbour_classes(features: Tensor, labels: Tensor) -> Tensor:
    """Return the class (n,) of each image by its nearest others, from features (n, d) and labels (n,)."""
    unit, one_hot = F.normalize(features.float(), dim=1), F.one_hot(labels).float()
    found = []
    for rows in torch.arange(len(unit)).split(1024):
        cosines = unit[rows] @ unit.T
        cosines[torch.arange(len(rows)), rows] = -math.inf
        near, places = cosines.topk(min(_NEAREST, len(unit) - 1), dim=1)
        found.append(torch.einsum("bs,bsk->bk", (near / _WIDTH).exp(), one_hot[places]).argmax(1))
    return torch.cat(found)
