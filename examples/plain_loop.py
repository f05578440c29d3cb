"""Adapt a timm ViT in your own loop: adapt, train, save the adapter, merge, save a stock checkpoint.

python examples/plain_loop.py      (handwritten digits of scikit-learn, about a minute on two cores)
"""

import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import vismt
from vismt.data.images import open_images
from vismt.data.pixels import Pixels


def main(
    out: str | Path = "runs/plain_loop",
    name: str = "vit_tiny_patch16_224.augreg_in21k",
    size: int = 64,
    steps: int = 100,
    pretrained: bool = True,
) -> float:
    """Return the loss of the last step."""
    images = open_images("digits")
    pixels = Pixels(images, size)
    model = timm.create_model(name, pretrained=pretrained, img_size=size, num_classes=len(images.classes))
    print(vismt.adapt(model, "pissa", targets=r"blocks\..*(qkv|fc1)", rank=8, also_train=["head"]))

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        index = torch.randint(len(images), (32,))
        loss = F.cross_entropy(model(pixels[index] * 2 - 1), images.labels[index])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    vismt.save_adapter(model, Path(out) / "adapter", strict=True)  # with the head: also_train names it
    vismt.merge(model)  # timm's classes and keys again
    save_file(model.state_dict(), Path(out) / "model.safetensors")
    return float(loss)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # the hub did not answer, and the cache lacks the weights
        sys.exit(f"error: {str(error).splitlines()[0]}")
