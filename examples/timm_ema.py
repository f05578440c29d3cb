"""Train in timm's style, with timm's optimiser, schedule and loss, and merge an EMA of the adapted model.

python examples/timm_ema.py
"""

import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

import vismt
from vismt.data.images import open_images
from vismt.data.pixels import Pixels


def main(
    out: str | Path = "runs/timm_ema",
    name: str = "vit_tiny_patch16_224.augreg_in21k",
    size: int = 64,
    steps: int = 100,
    pretrained: bool = True,
) -> torch.nn.Module:
    """Return the merged average."""
    images = open_images("digits")
    pixels = Pixels(images, size)
    model = timm.create_model(name, pretrained=pretrained, img_size=size, num_classes=len(images.classes))
    vismt.adapt(model, "lora", rank=8, also_train=["head"])

    ema = ModelEmaV3(model, decay=0.95)  # a copy of the adapted model
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.01)
    schedule = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=steps // 10, t_in_epochs=False)
    criterion = LabelSmoothingCrossEntropy(0.1)
    for step in range(steps):
        index = torch.randint(len(images), (32,))
        criterion(model(pixels[index] * 2 - 1), images.labels[index]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step_update(step + 1)
        ema.update(model, step=step)

    vismt.save_adapter(ema.module, Path(out) / "adapter", strict=True)
    merged = vismt.merge(ema.module)
    save_file(merged.state_dict(), Path(out) / "model.safetensors")
    return merged


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # the hub did not answer, and the cache lacks the weights
        sys.exit(f"error: {str(error).splitlines()[0]}")
