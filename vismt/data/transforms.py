"""Training augmentation of a batch in [0, 1]: random resized crop, colour jitter and flip, as a pure function of the seed."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DRAWS = (torch.rand, torch.randint, torch.randperm, Tensor.uniform_)  # functions that v2 calls


def augment(
    images: Tensor,
    seed: int,
    *,
    crop: tuple[float, float] | None = (0.35, 1.0),
    jitter: float = 0.4,
    flip: bool = True,
) -> Tensor:
    """Return augmented images of the same shape, dtype, device and range, each with another draw.

    Two calls with the same seed agree bit for bit. No random state outside is read or changed.

    Args:
        images: Images float (b, 3, h, w) in [0, 1].
        crop: Range of the cropped area (aspect 3/4 to 4/3, resized back, bilinear, antialiased). None for no crop.
        jitter: Strength of brightness, contrast and saturation.
        flip: Whether to mirror left and right with probability 1/2.
    """
    from torchvision.transforms import v2

    steps: list[torch.nn.Module] = []
    if crop is not None:
        steps.append(v2.RandomResizedCrop(tuple(images.shape[-2:]), scale=crop, antialias=True))
    if jitter > 0:
        steps.append(v2.ColorJitter(brightness=jitter, contrast=jitter, saturation=jitter))
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if not steps or len(images) == 0:
        return images.clone()
    pipeline = v2.Compose(steps)
    with _DrawsFrom(torch.Generator().manual_seed(seed)):
        return torch.stack([pipeline(image) for image in images]).clamp_(0, 1)


class _DrawsFrom(TorchFunctionMode):
    """Make v2, which draws from the global CPU generator, draw from another generator.

    The thread that prepares batches shares it.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Collection[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        drawn = {"generator": self.generator} if func in DRAWS else {}
        return func(*args, **{**(kwargs or {}), **drawn})
