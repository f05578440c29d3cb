"""The 15 corruption types of ImageNet-C (Hendrycks & Dietterich, arXiv 1903.12261) at 5 severities, for any resolution.

Written from the published parameters, which are for 224 pixels. Every length (radius, sigma, displacement) is scaled by
min(h, w) / 224, so a blur of less than half a pixel does nothing. Differences from ImageNet-C:

- Frost is a procedural ridge texture. The original blends six photographs.
- Glass blur draws each pixel from its neighbourhood. The original swaps one pixel after the other.
- The fractal of fog sums random grids by octaves.
- Blurs are computed in floating point, and the result is not rounded to 8 bits.

As in the original (hendrycks/robustness, make_imagenet_c.py), elastic severities 1-2 and 3-5 differ in kind, and their lengths
are multiples of 244 pixels, not of 224.

The error under corruptions sums over severities s, of the model's errors E and, for the relative error, a baseline's errors B:

    CE_c = sum_s E_{s,c} / sum_s B_{s,c},    error = mean_c CE_c

This is the formula of section 4.2 of the paper. Its name there, mean corruption error (mCE), is not used here: that number is for
ImageNet-C's own images, all 15 corruptions at 5 severities, and AlexNet as the baseline.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import scipy
import torch
from PIL import Image
from torch import Tensor, nn

from vismt.base.errors import UserError, require_known
from vismt.config.typed import Checked, Names, within

# {corruption: {severity: error in [0, 1]}}
CorruptionErrors = Mapping[str, Mapping[int, float]]
Rng = np.random.Generator
Severity = Annotated[int, within(1, 5)]
# image (h, w, 3) in [0, 1], level = severity - 1, rng, min(h, w) / 224 -> the corrupted image, not yet clipped
Corruption = Callable[[np.ndarray, int, Rng, float], np.ndarray]


@dataclass(frozen=True)
class CorruptionSpec(Checked):
    """A corruption as a condition of a protocol. name: Name among CORRUPTIONS. severity: Severity from 1 to 5."""

    name: Annotated[str, Names("vismt.robustness.corruptions:CORRUPTIONS", only=True)]
    severity: Severity = 3
    seed: int = 0
    KEY: ClassVar = "corruption"
    kind: ClassVar[Literal["corruption"]] = "corruption"
    # The corrupted image takes the place of the clean image, so there is no worst case over both.
    worst_case: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """The condition's text, "fog 3"."""
        return f"{self.name} {self.severity}" + (f" seed {self.seed}" if self.seed else "")

    def describe(self, num_classes: int | None = None) -> str:
        """Return `label`, for any number of classes."""
        return self.label

    def settings(self) -> dict[str, object]:
        """Return every field, for a protocol's hash."""
        return asdict(self)

    def perturb(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, num_classes: int, keys: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Return the corrupted images, each with the random draws of its key. The model and the labels are not used."""
        return _corrupt(images, self, keys)


def corrupt(images: Tensor, name: str, severity: int, *, seed: int = 0) -> Tensor:
    """Corrupt images. The result for image i of the batch depends only on the image and on (seed, i).

    Args:
        images: Images, float (b, 3, h, w) in [0, 1].
        name: Name among CORRUPTIONS.
        severity: Severity from 1 to 5.
        seed: Seed of the random draws.

    Returns:
        The corrupted images in [0, 1], of the same shape, dtype and device.

    Raises:
        UserError: For an unknown name, a severity outside 1 to 5, and images of another shape or with pixels outside [0, 1].
    """
    return _corrupt(images, CorruptionSpec(name, severity), [(seed, index) for index in range(len(images))])


def _corrupt(images: Tensor, spec: CorruptionSpec, keys: Sequence[tuple[int, int]]) -> Tensor:
    name = spec.name
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise UserError(f"corruption {name}: images {tuple(images.shape)}: need (b, 3, h, w).")
    least, most = float(images.min()), float(images.max())
    if not (least >= 0 and most <= 1):
        raise UserError(f"corruption {name}: pixels {least:.4g} to {most:.4g}, need [0, 1].")
    scale = min(images.shape[-2:]) / 224
    arrays = images.detach().cpu().double().permute(0, 2, 3, 1).numpy()
    changed = [
        CORRUPTIONS[name](array, spec.severity - 1, np.random.default_rng(key), scale)
        for key, array in zip(keys, arrays, strict=True)
    ]
    stacked = torch.from_numpy(np.clip(np.stack(changed), 0, 1)).permute(0, 3, 1, 2)
    return stacked.to(images.device, images.dtype).contiguous()


def gaussian_noise(x: np.ndarray, level: int, rng: Rng, scale: float) -> np.ndarray:
    """Add Gaussian noise, independent for each pixel and channel."""
    return x + rng.normal(scale=(0.08, 0.12, 0.18, 0.26, 0.38)[level], size=x.shape)


def shot_noise(x: np.ndarray, level: int, rng: Rng, scale: float) -> np.ndarray:
    """Replace each value by a Poisson count of photons."""
    photons = (60, 25, 12, 5, 3)[level]
    return rng.poisson(x * photons) / photons


def impulse_noise(x: np.ndarray, level: int, rng: Rng, scale: float) -> np.ndarray:
    """Replace some values by 0 or 1 (salt and pepper), independently for each channel."""
    hit = rng.random(x.shape) < (0.03, 0.06, 0.09, 0.17, 0.27)[level]
    return np.where(hit, rng.integers(0, 2, x.shape), x)


def _filter(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve (h, w, c) with an odd kernel (k, k) whose sum is 1, mirrored at the border."""
    edge = len(kernel) // 2
    padded = np.pad(x, ((edge, edge), (edge, edge), (0, 0)), mode="symmetric")
    return scipy.signal.fftconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1))


def defocus_blur(x: np.ndarray, level: int, rng: Rng, scale: float) -> np.ndarray:
    """Blur with a disk that is smoothed at its edge."""
    radius, soft = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[level]
    edge = int(np.ceil(radius * scale)) + 1
    rows, columns = np.mgrid[-edge : edge + 1, -edge : edge + 1]
    disk = np.clip(radius * scale + 0.5 - np.hypot(rows, columns), 0, 1)
    disk = scipy.ndimage.gaussian_filter(disk, soft * scale)
    return _filter(x, disk / disk.sum())


def glass_blur(x: np.ndarray, level: int, rng: Rng, scale: float) -> np.ndarray:
    """Draw every pixel from its neighbourhood, between two Gaussian blurs."""
    deviation, distance, rounds = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[level]
    sigma = deviation * scale
    reach = distance * scale + 0.5  # rounded below: whole distances are uniform over -distance..distance
    height, width = x.shape[:2]
    x = scipy.ndimage.gaussian_filter(x, (sigma, sigma, 0))
    for _ in range(rounds):
        down, right = np.round(rng.uniform(-reach, reach, (2, height, width))).astype(int)
        rows, columns = np.mgrid[:height, :width]
        x = x[np.clip(rows + down, 0, height - 1), np.clip(columns + right, 0, width - 1)]
    return scipy.ndimage.gaussian_filter(x, (sigma, sigma, 0))


def _motion(x: np.ndarray, radius: float, sigma: float, degrees: float) -> np.ndarray:
    """Blur with a trail of Gaussian weights on one side, up to 2 * radius pixels long, drawn into a kernel bilinearly."""
    edge = max(1, int(np.ceil(2 * radius)))
    kernel = np.zeros((2 * edge + 3, 2 * edge + 3))
    step = np.arange(0, 2 * radius + 1e-9, 0.25)
    weight = np.exp(-(step**2) / (2 * sigma**2))
    rows = edge + 1 + step * np.sin(np.radians(degrees))
    columns = edge + 1 + step * np.cos(np.radians(degrees))
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    for down in (0, 1):
        for right in (0, 1):
            share = weight * (1 - np.abs(rows - top - down)) * (1 - np.abs(columns - left - right))
            np.add.at(kernel, (top + down, left + right), share)
    return _filter(x, kernel / kernel.sum())


def motion_blur(x: np.ndarray, level: int, rng: Rng, scale: float) -> np.ndarray:
    """Blur along one side of a line in a random direction of -45 to 45 degrees."""
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[level]
    return _motion(x, radius * scale, sigma * scale, rng.uniform(-45, 45))


def _zoom(x: np.ndarray, factor: float) -> np.ndarray:
    """Magnify an image (h, w, c) about its centre. The shape stays."""
    centre = (np.array(x.shape[:2]) - 1) / 2
    offset = (*(centre * (1 - 1 / factor)), 0.0)
    return scipy.ndimage.affine_transform(x, (1 / factor, 1 / factor, 1.0), offset, order=1, mode="nearest")


def zoom_blur(x: np.ndarray, level: int, rng: Rng, scale: float) -> np.ndarray:
    """Average the image with magnified copies of itself."""
    most, step = ((1.10, 0.01), (1.15, 0.01), (1.20, 0.02), (1.24, 0.02), (1.30, 0.03))[level]
    factors = np.arange(1, most + step / 2, step)
    return (x + sum(_zoom(x, factor) for factor in factors)) / (len(factors) + 1)


def _plasma(like: np.ndarray, decay: float, rng: Rng) -> np.ndarray:
    """Return a fractal height map (h, w) in [0, 1] for the image `like` (h, w, c).

    It is a sum of random grids of 2, 3, 5, 9, ... nodes, each octave 1 / decay as strong as the one before.
    """
    height, width = like.shape[:2]
    total = np.zeros((height, width))
    for octave in range(int(np.ceil(np.log2(max(height, width)))) + 1):
        nodes = 2**octave + 1
        axes = (np.linspace(0, nodes - 1, side) for side in (height, width))
        grid = rng.uniform(-1, 1, (nodes, nodes))
        total += scipy.ndimage.map_coordinates(grid, np.meshgrid(*axes, indexing="ij"), order=1) / decay**octave
    return (total - total.min()) / max(np.ptp(total), 1e-12)


def snow(x: np.ndarray, level: int, rng: Rng, scale: float) -> np.ndarray:
    """Whiten the image and add motion-blurred flakes."""
    mean, spread, size, least, radius, sigma, keep = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[level]
    # Flakes are drawn as if the shorter side had 224 pixels. Flakes thinner than a pixel become shades of grey.
    flakes = _zoom(rng.normal(mean, spread, (*(round(side / scale) for side in x.shape[:2]), 1)), size)
    flakes = _motion(np.clip(np.where(flakes < least, 0, flakes), 0, 1), radius, sigma, rng.uniform(-135, -45))
    drawn = Image.fromarray(flakes[..., 0].astype(np.float32))
    method = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
    flakes = np.asarray(drawn.resize(x.shape[1::-1], method))[..., None]
    grey = (x @ np.array([0.299, 0.587, 0.114]))[..., None]
    x = keep * x + (1 - keep) * np.maximum(x, grey * 1.5 + 0.5)
    return x + flakes + np.rot90(flakes, k=2)


def frost(x: np.ndarray, level: int, rng: Rng, scale: float) -> np.ndarray:
    """Darken the image and add a bluish ridge texture."""
    keep, ice = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[level]
    ridges = 1 - np.abs(2 * _plasma(x, 1.6, rng) - 1)
    texture = 0.4 * _plasma(x, 2.0, rng) + 0.6 * ridges**4
    return keep * x + ice * texture[..., None] * np.array([0.85, 0.95, 1.0])


def fog(x: np.ndarray, level: int, rng: Rng, scale: float) -> np.ndarray:
    """Add a fractal of plasma noise and restore the brightest value."""
    strength, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[level]
    brightest = x.max()
    return (x + strength * _plasma(x, decay, rng)[..., None]) * brightest / (brightest + strength)


def brightness(x: np.ndarray, level: int, rng: Rng, scale: float) -> np.ndarray:
    """Raise V of HSV."""
    # Adding to V of HSV at fixed H and S scales all three channels. Black has S = 0 and turns grey.
    value = x.max(axis=2, keepdims=True)
    raised = np.clip(value + (0.1, 0.2, 0.3, 0.4, 0.5)[level], 0, 1)
    return np.where(value > 0, x * raised / np.maximum(value, 1e-12), raised)


def contrast(x: np.ndarray, level: int, rng: Rng, scale: float) -> np.ndarray:
    """Shrink each channel towards its mean."""
    mean = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[level] + mean


def elastic_transform(x: np.ndarray, level: int, rng: Rng, scale: float) -> np.ndarray:
    """Warp the image by a random affine map and a smoothed random displacement."""
    # In units of 244 pixels. The published numbers are these values times 244, for images of 224 pixels.
    levels = ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
    strength, sigma, jitter = levels[level]
    height, width = x.shape[:2]
    side, unit = min(height, width), 244 * scale
    centre, arm = np.array([height, width]) // 2, side // 3
    corners = centre + arm * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = corners + rng.uniform(-jitter * unit, jitter * unit, (3, 2))
    lifted = np.hstack([moved, np.ones((3, 1))])
    # Rows of `back` take a point of the moved image to the original: moved @ back = corners.
    back = np.linalg.solve(lifted, corners) if abs(np.linalg.det(lifted)) > 1e-6 else np.eye(3)[:, :2]
    drift = rng.uniform(-1, 1, (2, height, width))
    drift = scipy.ndimage.gaussian_filter(drift, (0, sigma * unit, sigma * unit), mode="reflect", truncate=3)
    points = np.stack(np.mgrid[:height, :width] + drift * strength * unit, axis=-1)
    source = np.moveaxis(points @ back[:2] + back[2], -1, 0)
    channels = [scipy.ndimage.map_coordinates(x[..., c], source, order=1, mode="mirror") for c in range(3)]
    return np.stack(channels, axis=-1)


def _picture(x: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(np.clip(x, 0, 1) * 255).astype(np.uint8))


def pixelate(x: np.ndarray, level: int, rng: Rng, scale: float) -> np.ndarray:
    """Shrink the image by box averages and enlarge it again."""
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[level]
    height, width = x.shape[:2]
    small = _picture(x).resize((max(1, int(width * share)), max(1, int(height * share))), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX)) / 255


def jpeg_compression(x: np.ndarray, level: int, rng: Rng, scale: float) -> np.ndarray:
    """Compress the image as JPEG."""
    file = io.BytesIO()
    _picture(x).save(file, "JPEG", quality=(25, 18, 15, 10, 7)[level])
    return np.asarray(Image.open(file, formats=["JPEG"])) / 255


# The paper's four groups.
NOISE: tuple[Corruption, ...] = (gaussian_noise, shot_noise, impulse_noise)
BLUR: tuple[Corruption, ...] = (defocus_blur, glass_blur, motion_blur, zoom_blur)
WEATHER: tuple[Corruption, ...] = (snow, frost, fog, brightness)
DIGITAL: tuple[Corruption, ...] = (contrast, elastic_transform, pixelate, jpeg_compression)
CORRUPTIONS = {function.__name__: function for function in (*NOISE, *BLUR, *WEATHER, *DIGITAL)}

# Corruptions that move the content of a pixel. At 224 px, severities 1 to 5, elastic_transform moves it by 19.2, 40.5, 4.0, 4.2
# and 4.6 px (mean of 100 draws). Blurs keep the sharp image as a part, with its labels. The mean place of the mixed pixels also
# moves, by up to 11.6 px (motion_blur) and 14.1 px (zoom_blur, at the edge of the image).
MOVING = ("elastic_transform",)


def error_under_corruptions(errors: CorruptionErrors, baseline: CorruptionErrors | None = None) -> float:
    """Return the error of a model under corruptions. Every corruption has the same weight.

    Args:
        errors: Error in [0, 1] by corruption and severity.
        baseline: Errors of the baseline for at least the same corruptions and severities. Others are ignored.

    Returns:
        Without a baseline, the mean over corruptions of the mean error over severities, in [0, 1]. With a baseline, the relative
        error, which is 1 for a model like the baseline.

    Raises:
        UserError: If no corruption is given, a corruption has no severities, or the baseline lacks one of them or has no error.
    """
    if not errors or not all(errors.values()):
        empty = next((corruption for corruption, by_severity in errors.items() if not by_severity), None)
        reason = f"'{empty}' has no severities" if errors else "no corruptions"
        raise UserError(f"error under corruptions: {reason}: evaluate one corruption and severity or more.")
    per_corruption = []
    for corruption, by_severity in errors.items():
        total = math.fsum(by_severity.values())
        if baseline is None:
            per_corruption.append(total / len(by_severity))
        else:
            per_corruption.append(total / _baseline_total(baseline, corruption, by_severity))
    return math.fsum(per_corruption) / len(per_corruption)


def _baseline_total(baseline: CorruptionErrors, corruption: str, severities: Mapping[int, float]) -> float:
    require_known("error under corruptions: the baseline has no", [corruption], baseline)
    missing = sorted(set(severities) - set(baseline[corruption]))
    if missing:
        raise UserError(f"error under corruptions: the baseline has no '{corruption}' at severity {missing[0]}.")
    total = math.fsum(baseline[corruption][severity] for severity in severities)
    if not total > 0:
        raise UserError(
            f"error under corruptions: the baseline makes no error under '{corruption}': take another baseline."
        )
    return total
