"""Certified accuracy by randomised smoothing (Cohen, Rosenfeld, Kolter, ICML 2019, arXiv 1902.02918).

    g(x) = argmax_c P(f(x + e) = c),    e ~ N(0, sigma^2 I) on the pixels in [0, 1], not clipped, before anything that f does

FIRST draws choose the class c. For k of n further draws, the answer is c. With p the lower Clopper-Pearson bound at 1 - alpha,

    p = Beta^-1(alpha; k, n - k + 1),    p > 1/2:  g is c within the l2 distance sigma Phi^-1(p) of x,    else g abstains.

The certificate of an image fails with a probability of at most alpha. It is about g, in l2, at the size in pixels at which f gets
its images, and says nothing about f itself. If no class has more than 40 % of the first draws, g abstains without further draws.

In few-shot runs the support is not perturbed, and the prototypes and weights that follow from it are constants of f. The votes
are over noisy predictions. Pautov et al. ("Smoothed Embeddings for Certified Few-Shot Learning", 2022, arXiv 2202.01186) smooth
the embedding instead, h(x) = E phi(x + e) with |phi| = 1. They take the radius from the margin of h to the prototypes and from
its Lipschitz constant sqrt(2 / pi) / sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.base.seeds import mix_seed
from vismt.config.typed import Checked, within

FIRST, HOPELESS = 100, 0.4
_CHUNK = 100  # draws in one forward pass, a fixed number, so that the draws do not depend on a batch size
ABSTAINED = -1  # the answer of an abstention


@dataclass(frozen=True)
class Smoothing(Checked):
    """A certified radius in l2, by randomised smoothing.

    Args:
        sigma: standard deviation of the noise, in pixel units of [0, 1].
        samples: number of draws for the bound of one image. 100 more draws choose its class.
        alpha: probability with which the certificate of one image may fail.
        seed: seed of the draws.
    """

    sigma: Annotated[float, within(above=0)] = 0.25
    samples: Annotated[int, within(1)] = 1000
    alpha: Annotated[float, within(above=0, below=0.5)] = 0.001
    seed: int = 0
    KEY: ClassVar = "evaluate.certify"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.largest == 0:
            least = math.floor(math.log(self.alpha) / math.log(0.5)) + 1
            raise UserError(
                f"evaluate.certify: samples {self.samples} cannot certify anything at alpha {self.alpha:g}; give {least} or more."
            )

    @property
    def largest(self) -> float:
        """The radius if all draws agree."""
        return self.radius(self.samples)

    def radius(self, votes: int) -> float:
        """Return the certified radius if `votes` of the samples have the class. 0 for an abstention."""
        from scipy.stats import beta, norm

        bound = float(beta.ppf(self.alpha, votes, self.samples - votes + 1)) if votes else 0.0
        return self.sigma * float(norm.ppf(bound)) if bound > 0.5 else 0.0

    @torch.no_grad()
    def certify(
        self, logits: Callable[[Tensor], Tensor], images: Tensor, keys: Sequence[tuple[int | str, ...]]
    ) -> tuple[Tensor, Tensor]:
        """Return the answers of g, int64 (b,), with ABSTAINED for an abstention, and the radii, float64 (b,).

        logits: Function f from images (m, 3, h, w) to logits (m, k). images: Images (b, 3, h, w) in [0, 1]. keys: Keys of the
        images. The draws are functions of the keys.
        """
        answers, radii = [], []
        for image, key in zip(images, keys, strict=True):
            generator = torch.Generator().manual_seed(mix_seed(self.seed, "smoothing", *key))
            first = self._votes(logits, image, FIRST, generator)
            answer, radius = int(first.argmax()), 0.0
            if first[answer] > HOPELESS * FIRST:
                radius = self.radius(int(self._votes(logits, image, self.samples, generator)[answer]))
            answers.append(answer if radius > 0 else ABSTAINED)
            radii.append(radius)
        return torch.tensor(answers), torch.tensor(radii, dtype=torch.float64)

    def _votes(
        self, logits: Callable[[Tensor], Tensor], image: Tensor, count: int, generator: torch.Generator
    ) -> Tensor:
        """Return the number of noisy copies of an image (3, h, w) with each class as the answer, int64 (k,)."""
        votes = torch.zeros(0, dtype=torch.long)
        for start in range(0, count, _CHUNK):
            noise = torch.randn(min(_CHUNK, count - start), *image.shape, generator=generator)
            found = logits(image + self.sigma * noise.to(image.device))
            counts = found.argmax(1).cpu().bincount(minlength=found.shape[1])
            votes = counts if not len(votes) else votes + counts
        return votes
