"""DiffAugment (Zhao et al., arXiv 2006.10738) as P>M>F and AMT apply it to the support set, differentiable and seeded.

    x <- (images - mean) / std
    flip          the whole batch, with probability 1/2
    brightness    x + U(-.5, .5)                                                       a draw for each image
    saturation    m + (x - m) U(0, 2), with the mean m of a pixel over its channels    a draw for each image
    contrast      m + (x - m) U(.5, 1.5), with the mean m of the image                 a draw for each image
    translation   up to +-1/8 of either side, rounded to whole pixels, for each image. The uncovered border is 0, the mean colour

The type "color" is brightness, saturation and contrast.

The strengths are meant for normalised values, for which a brightness of .5 is about 30 of 255. Images in [0, 1] are therefore
normalised and converted back. Without that, the brightness would be four times as strong and the borders black.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vismt.base.errors import UserError, require_known

_TYPES = ("color", "translation")


def diff_augment(
    images: Tensor,
    generator: torch.Generator,
    *,
    types: Sequence[str] = _TYPES,
    probability: float = 0.9,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Augment a batch of images with a probability. The gradient reaches the images.

    Args:
        images: Images, floating (b, c, h, w).
        generator: Source of every draw, in fp32 on the generator's device, so that a seed gives the same draws on every device.
        types: Changes besides the flip, names among _TYPES.
        probability: Probability with which the batch is changed.
        mean: Mean of each channel. None for images that are normalised already.
        std: Standard deviation of each channel, together with mean.

    Returns:
        Images of the same shape, dtype and device. They are not clamped and may leave [0, 1], as in the released code. `Backbone`
        takes any value.

    Raises:
        UserError: For an unknown type, a probability outside [0, 1], mean without std, or images of another shape or dtype.
    """
    _check(images, types, probability, mean, std)
    if _uniform(1, generator) >= probability or not len(images):
        return images
    if mean is not None:
        kind: dict[str, Any] = {"dtype": images.dtype, "device": images.device}
        centre, spread = (torch.as_tensor(values, **kind).view(1, -1, 1, 1) for values in (mean, std))
        images = (images - centre) / spread
    if _uniform(1, generator) < 0.5:
        images = images.flip(-1)
    if "color" in types:
        images = _colour(images, generator)
    if "translation" in types:
        images = _translate(_translate(images, -2, generator), -1, generator)
    return images if mean is None else images * spread + centre


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    """Return (count,) draws in [0, 1), on the generator's device."""
    return torch.rand(count, generator=generator, device=generator.device)


def _colour(images: Tensor, generator: torch.Generator) -> Tensor:
    brightness, saturation, contrast = (_uniform(len(images), generator).to(images).view(-1, 1, 1, 1) for _ in range(3))
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (2 * saturation)
    level = images.mean((1, 2, 3), keepdim=True)
    return level + (images - level) * (contrast + 0.5)


def _translate(images: Tensor, axis: int, generator: torch.Generator) -> Tensor:
    """Move each image along `axis` (-2 or -1) by a drawn number of pixels: out[i] = in[i - shift], 0 outside the image."""
    side = images.shape[axis]
    reach = int(side / 8 + 0.5)
    shift = torch.randint(-reach, reach + 1, (len(images), 1), generator=generator, device=generator.device)
    source = torch.arange(side, device=images.device) - shift.to(images.device)
    source = source[:, None, :, None] if axis == -2 else source[:, None, None, :]
    moved = images.gather(axis, source.clamp(0, side - 1).expand_as(images))
    return moved.masked_fill((source < 0) | (source >= side), 0)


def _check(images: Tensor, types: Sequence[str], probability: float, mean: object, std: object) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise UserError(f"augmentation: images are {images.dtype} {tuple(images.shape)}, needed floating (b, c, h, w).")
    if isinstance(types, str):
        raise UserError(f"augmentation: types is the text '{types}': give a sequence of {', '.join(_TYPES)}.")
    for name in types:
        require_known("augmentation: type", [name], _TYPES)
    if not 0 <= probability <= 1:
        raise UserError(f"augmentation: probability {probability}: need 0 to 1.")
    if (mean is None) != (std is None):
        raise UserError("augmentation: give mean and std together, or neither for images that are normalised already.")
