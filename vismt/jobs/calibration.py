"""Options that a method computes from data before the training, such as covariances of inputs or the choice of units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.config.sections import AdaptConfig, Count

if TYPE_CHECKING:  # configurations import this file for its section
    from vismt.backbones.vit import PixelBackbone
    from vismt.data.batching import Gathered

CALIBRATION = "calibration"  # the folder of covariances within a run folder


@dataclass
class ImageCalibrationConfig:
    """Images from which a method computes options before the training, such as covariances of inputs.

    Finished covariances are kept in calibration/ of the run folder.

    Args:
        data: sets of images. [] takes the training images.
        examples: number of images.
        batch: number of images in one forward pass.
    """

    data: list[str] = field(default_factory=list)
    examples: Count = 256
    batch: Count = 32


def check_calibration(section: ImageCalibrationConfig | None, adapt: AdaptConfig | None) -> None:
    """Raise UserError for a method that needs images and has none."""
    from vismt.methods import needs

    if section is not None:
        return
    reason = None if adapt is None else needs(adapt.method, adapt.options).get("calibration")
    if reason is not None:
        raise UserError(f"calibration: {reason.replace('name texts here', 'give this section')}.")


class Calibrations:
    """Options that methods compute from data for adapt sections. Files are in the run folder, and arms of a run share values."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._results: dict[str, Any] = {}

    def calibrated(self, model: nn.Module, adapt: AdaptConfig, batches: Callable[..., list[Any]]) -> AdaptConfig:
        """Return an adapt section with the options that its method computes from data, or unchanged if it computes none.

        batches: Function that returns batches of inputs of the stock model.
        """
        from vismt.engine import runtime
        from vismt.methods import METHODS, Calibration

        method = METHODS[adapt.method]
        if method.calibrate is None:
            return adapt
        calibration = Calibration(batches, self.folder / CALIBRATION, self._results)
        with runtime.processes().main_process_first():  # it computes and writes, and the other processes read its files
            computed = method.calibrate(model, calibration, targets=adapt.targets, options=adapt.options)
        return replace(adapt, options={**adapt.options, **computed})

    def on_images(
        self, backbone: PixelBackbone, adapt: AdaptConfig, section: ImageCalibrationConfig, images: Gathered
    ) -> AdaptConfig:
        """Return an adapt section with the options that its method computes from some of `images`."""
        batches = partial(image_batches, backbone, images, section)
        return self.calibrated(backbone.vit, adapt, batches)


def image_batches(backbone: PixelBackbone, images: Gathered, section: ImageCalibrationConfig) -> list[Tensor]:
    """Return the chosen images as the stock model takes them."""
    from vismt.data.division import limited

    index = limited(torch.zeros(len(images.ids)), images.ids, section.examples)
    mean, std = backbone.mean.cpu(), backbone.std.cpu()
    return [(images[part] - mean) / std for part in index.split(section.batch)]
