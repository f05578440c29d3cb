"""The rate of fine-tuning, chosen for every task on its own support (P>M>F: Hu et al., arXiv 2204.07305).

    lr* = argmax_{lr in RATES} accuracy of held-out support images under the weights tuned at lr on the other ones

The smallest rate wins a tie, and 0 skips the tuning: a task that gains nothing by it is left alone. Every class is cut in two
halves, in the order of the support; each half is judged by the prototypes of the other half, under weights tuned on it. A
class with one image cannot be cut: its image stays in the tuning, and VIEWS random crops of it are judged in its place,
which the tuning, that shifts and recolours images but does not scale them, has not seen. At 1 shot these crops are all
there is. A rate at which a loss is not finite is not chosen.

The paper chooses one rate a domain on labelled validation tasks; its release takes these from the test loader, with their
query labels. For single tasks the release keeps the first image of each class for tuning, judges the others once (so with
one-shot tasks it never tunes), and has the same grid; here each image is judged once, and no query takes part.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.base.seeds import mix_seed
from vismt.data.transforms import augment
from vismt.metatune.protonet import cosine_logits, prototypes

AUTO = "auto"
RATES = (0.0, 1e-4, 1e-3, 1e-2)
VIEWS = 4
Features = Callable[[Tensor], Tensor]


class LossNotFinite(UserError):
    """A fine-tuning whose loss became infinite or not a number."""


def choose_rate(
    tune: Callable[[Tensor, Tensor, float], Features], support: Tensor, labels: Tensor, *, seed: int
) -> float:
    """Return the rate of RATES that generalises best within a support set.

    Args:
        tune: (images, labels, rate) -> features of images under the weights tuned on these images.
        support: (s, 3, h, w) in [0, 1].
        labels: (s,) in 0..N-1, every class present.
        seed: of the crops.
    """
    folds = held_out(labels)
    best, chosen = -1.0, 0.0
    for rate in RATES:
        try:
            right = [_judge(tune, support, labels, mask, rate, seed) for mask in folds]
        except LossNotFinite:
            continue
        share = float(torch.cat(right).double().mean())
        if share > best:
            best, chosen = share, rate
    return chosen


def held_out(labels: Tensor) -> list[Tensor]:
    """Return the folds, each a mask (s,) of the images that are held out; one empty mask where every class has one image."""
    same = labels[:, None] == labels
    place, count = same.tril(-1).sum(1), same.sum(1)
    masks = [(count > 1) & (place % 2 == half) for half in (0, 1)]
    return masks if bool(masks[0].any()) else masks[:1]


def _judge(
    tune: Callable[[Tensor, Tensor, float], Features],
    support: Tensor,
    labels: Tensor,
    mask: Tensor,
    rate: float,
    seed: int,
) -> Tensor:
    """Return whether each held-out image, and each crop of a single image, is classified right."""
    alone = (labels[:, None] == labels).sum(1) == 1
    crops = [augment(support[alone], mix_seed(seed, "crops", view)) for view in range(VIEWS)]
    judged = torch.cat([support[mask], *crops])
    truth = torch.cat([labels[mask], labels[alone].repeat(VIEWS)])
    features = tune(support[~mask], labels[~mask], rate)
    with torch.no_grad():
        centres = prototypes(features(support[~mask]), labels[~mask])
        return cosine_logits(features(judged), centres).argmax(1) == truth
