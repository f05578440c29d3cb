"""Two small classifiers for configs/robustness/quickstart.yaml, trained when they are used (about ten seconds each).

Both are the same convolutional net on the 720 training crops of photo_crops at 32 px. `hardened` trains on images under a
two-step attack (Madry et al., arXiv 1706.06083). A function for `classifier.function` returns the number of classes, and an
nn.Module from images float (b, 3, h, w) in [0, 1] to logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.data.images import open_images
from vismt.data.pixels import Pixels

_SIZE, _STEPS, _BATCH = 32, 240, 64
_EPSILON = 4.5 / 255


def plain() -> tuple[nn.Module, int]:
    """Return the net trained on the images without changes."""
    return _trained(epsilon=0.0)


def hardened() -> tuple[nn.Module, int]:
    """Return the net trained on attacked images."""
    return _trained(epsilon=_EPSILON)


def _trained(epsilon: float) -> tuple[nn.Module, int]:
    images = open_images("photo_crops", "train")
    pixels, classes = Pixels(images, _SIZE), len(images.classes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(1024, classes),
        )
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
        for _ in range(_STEPS):
            index = torch.randint(len(images), (_BATCH,))
            batch, labels = pixels[index], images.labels[index]
            if epsilon:
                batch = _attacked(net, batch, labels, epsilon)
            optimizer.zero_grad()
            F.cross_entropy(net(batch), labels).backward()
            optimizer.step()
    return net, classes


def _attacked(net: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """Return images after two signed gradient steps from a random start within `epsilon`."""
    change = torch.empty_like(images).uniform_(-epsilon, epsilon)
    for _ in range(2):
        change.requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(net((images + change).clamp(0, 1)), labels), change)
        change = (change.detach() + 0.75 * epsilon * gradient.sign()).clamp(-epsilon, epsilon)
    return (images + change).clamp(0, 1).detach()
