"""Few-shot accuracy of your own module, clean and attacked, beside a timm ViT on the same episodes.

python examples/fewshot_own_module.py
"""

from pathlib import Path

import torch
from torch import Tensor, nn

import vismt


class Patches(nn.Module):
    """Features (b, d) of images (b, 3, h, w) in [0, 1]: random convolutions, averaged in a grid."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the features."""
        return self.layers(images)


def main(
    out: str | Path = "runs/fewshot_own_module", name: str = "vit_small_patch14_imgfocus", episodes: int = 50
) -> vismt.StudyResults:
    """Return the numbers. The report is in the folder."""
    models = {"mine": Patches()} | ({"vit": name} if name else {})
    results = vismt.evaluate_fewshot(
        models, "digits", ways=5, shots=[1, 5], episodes=episodes, queries=5, attacks=["pgd"], img_size=42, folder=out
    )
    print(results)
    print(results.report())
    return results


if __name__ == "__main__":
    main()
