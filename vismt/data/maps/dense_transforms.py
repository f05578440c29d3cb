"""Joint transforms of dense samples: image and targets stay aligned, and the geometry in the values stays correct.

- The x of a mirrored normal is negated.
- An image enlarged by s looks as if taken s times nearer, so depth is divided by s (as in the training pipelines of MTI-Net,
  InvPT and LibMTL). Inverse depth is multiplied by s. Normals keep their direction, as in these pipelines, though a plane
  compressed in depth would strictly tilt.
- Labels, depth and normals are never averaged. Each target pixel has the value of the source pixel at its centre.
- Edges alone are drawn again, because lines would vanish or double. An edge is also where the centre of an edge pixel falls,
  and the lines are thinned. Edges that are derived from another map are derived afterwards (DenseSet.read).
- Pixels that padding adds are 255, depth 0, normals (0, 0, 0).
- The class of an image never changes. A crop may lose the object. A mirrored digit or word may be another digit or word, so
  `mirror` should be off for them.

Every function leaves its input unchanged and returns a sample on the same device. The random ones draw from the generator or
seed that they get, and from nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from vismt.base.errors import UserError
from vismt.config.sections import MapAugmentation
from vismt.data.maps.dense_sample import IGNORE, MAPS, Sample, blank, is_class, size_of
from vismt.data.maps.edge_thinning import thin

# EXIF orientation -> whether rows and columns change places, and then whether the rows and the columns are reversed.
TURNS = {
    2: (False, False, True), 3: (False, True, True), 4: (False, True, False),
    5: (True, False, False), 6: (True, False, True), 7: (True, True, True), 8: (True, True, False),
}  # fmt: skip
TRIES = 10  # number of crops that are drawn until no class dominates
FILL = 0.5  # value of the image in padding


def _maps(sample: Sample, change: Callable[[Tensor], Tensor]) -> Sample:
    return {name: values if is_class(name) else change(values) for name, values in sample.items()}


def flip(sample: Sample) -> Sample:
    """Return the mirrored sample, with left and right exchanged and the normals' x negated."""
    size_of(sample)
    out = _maps(sample, lambda values: values.flip(-1))
    if "normals" in out:
        x = -out["normals"][:1]
        # There is no -0, which would make two flips differ from none in its bits.
        out["normals"] = torch.cat([torch.where(x == 0, 0.0, x), out["normals"][1:]])
    return out


def turn(sample: Sample, orientation: int) -> Sample:
    """Return the maps of a sample as an EXIF orientation of TURNS shows them. Normals point where the turned scene does."""
    swapped, upside_down, mirrored = TURNS[orientation]
    reversed_sides = [side for side, is_reversed in ((-2, upside_down), (-1, mirrored)) if is_reversed]
    out = _maps(sample, lambda values: (values.mT if swapped else values).flip(reversed_sides))
    if "normals" in out:
        out["normals"] = turned_vectors(out["normals"], orientation)
    return out


def turned_vectors(normals: Tensor, orientation: int) -> Tensor:
    """Return normals (3, h, w) in the axes of the turned image, x right and y up. They stay at their pixels."""
    swapped, upside_down, mirrored = TURNS[orientation]
    x, y, z = normals
    if swapped:  # what went right goes down
        x, y = -y, -x
    # There is no -0, as in `flip`.
    return torch.stack([-x if mirrored else x, -y if upside_down else y, z]) + 0.0


def _centres(old: int, new: int, device: torch.device) -> Tensor:
    """Return int64 (new,): for each of `new` pixels along a side, the one of `old` pixels at its centre."""
    return (torch.arange(new, device=device) * 2 + 1) * old // (2 * new)


def _nearest(values: Tensor, height: int, width: int) -> Tensor:
    rows, columns = (_centres(old, new, values.device) for old, new in zip(values.shape[-2:], (height, width)))
    return values.index_select(-2, rows).index_select(-1, columns)


def _drawn(edge: Tensor, height: int, width: int) -> Tensor:
    """Return the lines of int64 (h, w) `edge` at another size, one pixel wide. A pixel is 255 if the nearest pixel is 255."""
    if edge.shape == (height, width):
        return edge
    nearest = _nearest(edge, height, width)
    lines = nearest == 1  # complete for an enlarged map (a shrunk map needs the lines below)
    rows, columns = (edge == 1).nonzero(as_tuple=True)
    down, right = (_centres(new, old, edge.device) for old, new in zip(edge.shape, (height, width)))
    lines[down[rows], right[columns]] = True
    lines = torch.from_numpy(thin(lines.cpu().numpy())).to(edge.device)
    return torch.where(lines, 1, torch.where(nearest == IGNORE, IGNORE, 0))


def _resample(sample: Sample, height: int, width: int) -> Sample:
    image = F.interpolate(
        sample["image"][None], (height, width), mode="bilinear", align_corners=False, antialias=True
    )[0].clamp(0, 1)  # fmt: skip
    targets = {name: values for name, values in sample.items() if name not in ("image", "edge")}
    out = {"image": image, **_maps(targets, lambda values: _nearest(values, height, width))}
    if "edge" in sample:
        out["edge"] = _drawn(sample["edge"], height, width)
    return out


def scale(sample: Sample, s: float, *, inverse_depth: bool = False) -> Sample:
    """Return the sample s times as large, with sides rounded and at least 1.

    Depth is divided by s, and inverse depth is multiplied by s.
    """
    if not s > 0:
        raise UserError(f"dense transform: scale {s} must be above 0.")
    height, width = (max(1, round(side * s)) for side in size_of(sample))
    out = _resample(sample, height, width)
    if "depth" in out:
        out["depth"] = out["depth"] * s if inverse_depth else out["depth"] / s
    return out


def pad(sample: Sample, size: tuple[int, int], *, fill: float = FILL) -> Sample:
    """Return the sample padded below and to the right up to `size` (h, w): `fill` in the image, missing in the targets."""
    height, width = size_of(sample)
    below, right = max(0, size[0] - height), max(0, size[1] - width)
    if not (below or right):
        return dict(sample)
    out = {**sample, "image": F.pad(sample["image"], (0, right, 0, below), value=fill)}
    for name in (name for name in MAPS if name in sample):
        empty = int(blank(name, 1, 1).flatten()[0])
        out[name] = F.pad(sample[name], (0, right, 0, below), value=empty)
    return out


def crop(sample: Sample, top: int, left: int, size: tuple[int, int]) -> Sample:
    """Return the window of `size` (h, w) at (top, left), which must be inside the sample."""
    height, width = size_of(sample)
    if not (0 <= top <= height - size[0] and 0 <= left <= width - size[1]):
        raise UserError(f"dense transform: a crop of {size} at ({top}, {left}) leaves the sample of {(height, width)}.")
    return _maps(sample, lambda values: values[..., top : top + size[0], left : left + size[1]].contiguous())


def _draw(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def random_crop(
    sample: Sample,
    size: tuple[int, int],
    generator: torch.Generator,
    *,
    cat_max_ratio: float,
) -> Sample:
    """Return a random window of `size` (h, w) of the sample. A smaller sample is padded first.

    With semseg a window is drawn again, up to 10 times in all, while one class has `cat_max_ratio` or more of its labelled
    pixels or no pixel is labelled. The last window is returned in any case.
    """
    padded = pad(sample, size)
    height, width = size_of(padded)
    for _ in range(TRIES):
        top = int(_draw(generator, 0, height - size[0] + 1))
        left = int(_draw(generator, 0, width - size[1] + 1))
        if "semseg" not in padded:
            break
        labels = padded["semseg"][top : top + size[0], left : left + size[1]]
        counts = labels[labels != IGNORE].unique(return_counts=True)[1]
        if counts.numel() and int(counts.max()) < cat_max_ratio * int(counts.sum()):
            break
    return crop(padded, top, left, size)


def photometric(sample: Sample, generator: torch.Generator, *, strength: float = 0.4, hue: float = 0.05) -> Sample:
    """Return the sample with random colours. The image stays in [0, 1], and the targets do not change.

    strength: Brightness, contrast and saturation are each multiplied by 1 - strength to 1 + strength. hue: Largest shift, as a
    share of the circle.
    """
    from torchvision.transforms.v2 import functional as V

    image = sample["image"]
    for adjust in (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation):
        image = adjust(image, max(0.0, _draw(generator, 1 - strength, 1 + strength)))
    image = V.adjust_hue(image, _draw(generator, -hue, hue)) if hue else image
    return {**sample, "image": image.clamp(0, 1)}


def fit_sample(sample: Sample, size: tuple[int, int]) -> Sample:
    """Return the sample resized to the largest size inside `size` (h, w) with the same aspect ratio, for evaluation.

    Depth stays in metres. If all images of a set are fitted alike, the network sees one camera, and errors keep their unit.
    """
    native = size_of(sample)
    fitted = fitting(native, size)
    return dict(sample) if fitted == native else _resample(sample, *fitted)


def resize(sample: Sample, size: tuple[int, int]) -> Sample:
    """Return the sample fitted into `size` (h, w) and padded below and to the right."""
    return pad(fit_sample(sample, size), size)


def fitting(native: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return the (h, w) to which `fit` resizes an image of `native` (h, w)."""
    factor = min(size[0] / native[0], size[1] / native[1])
    height, width = (max(1, min(limit, round(side * factor))) for side, limit in zip(native, size, strict=True))
    return height, width


def augment_sample(
    sample: Sample, seed: int, size: tuple[int, int], settings: MapAugmentation, *, inverse_depth: bool = False
) -> Sample:
    """Return an augmented training sample, a function of sample and seed alone: scaled, cropped, mirrored, recoloured.

    The draws do not depend on the content of the sample, except for the repeated crops of random_crop. size: Size (h, w) of the
    crop.
    """
    generator = torch.Generator().manual_seed(seed)
    factor, mirrored = _draw(generator, *settings.scales), _draw(generator, 0, 1) < 0.5
    if factor != 1:
        sample = scale(sample, factor, inverse_depth=inverse_depth)
    sample = random_crop(sample, size, generator, cat_max_ratio=settings.cat_max_ratio)
    sample = flip(sample) if settings.flip and mirrored else sample
    if settings.strength == 0:
        return sample
    return photometric(sample, generator, strength=settings.strength, hue=settings.hue)
