"""Corruptions: published numbers, determinism, any size, and the effect of the severity."""

import ast
import inspect
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.pages import ROOT

from vismt.base.errors import UserError
from vismt.robustness.corruptions import CORRUPTIONS, CorruptionSpec, corrupt


def picture(height=56, width=56):
    """Smooth colours with edges, so that blur, noise and shifts all show."""
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    channels = [0.5 + 0.4 * np.sin(9 * rows + 4 * columns), 0.2 + 0.6 * ((6 * rows).astype(int) % 2), columns]
    return torch.from_numpy(np.stack(channels)).float().clamp(0, 1)[None]


def change(images, name, severity, seed=0):
    return float((corrupt(images, name, severity, seed=seed) - images).pow(2).mean().sqrt())


def test_there_are_fifteen():
    assert len(CORRUPTIONS) == 15


@pytest.mark.parametrize("name", sorted(CORRUPTIONS))
def test_contract(name):
    for size in ((56, 56), (28, 40), (9, 8)):
        images = picture(*size).expand(2, -1, -1, -1)
        kept = images.clone()
        for severity in (1, 3, 5):
            corrupted = corrupt(images, name, severity, seed=4)
            assert corrupted.shape == images.shape and corrupted.dtype == images.dtype
            assert bool(corrupted.isfinite().all()) and corrupted.min() >= 0 and corrupted.max() <= 1
        assert torch.equal(images, kept)


@pytest.mark.parametrize("name", sorted(CORRUPTIONS))
def test_deterministic_in_seed_and_position_only(name):
    images = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    corrupted = corrupt(images, name, 4, seed=7)
    np.testing.assert_array_equal(numpy_state, np.random.get_state()[1])
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(corrupted, corrupt(images, name, 4, seed=7))
    assert torch.equal(corrupted[:2], corrupt(images[:2], name, 4, seed=7))
    fixed = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    twins = corrupt(images[:1].expand(2, -1, -1, -1), name, 4, seed=7)
    assert torch.equal(twins[0], twins[1]) == (name in fixed)
    assert torch.equal(corrupted, corrupt(images, name, 4, seed=8)) == (name in fixed)


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"elastic_transform", "glass_blur", "frost"}))
def test_severity_grows(name):
    images = picture(112, 112)
    sizes = [np.mean([change(images, name, severity, seed) for seed in range(4)]) for severity in range(1, 6)]
    assert sizes[0] > 0.005 and all(later > 0.97 * earlier for earlier, later in pairwise(sizes))
    assert sizes[4] > 1.15 * sizes[0]


def test_gaussian_noise_has_the_published_deviation():
    grey = torch.full((1, 3, 200, 200), 0.5)
    assert change(grey, "gaussian_noise", 1) == pytest.approx(0.08, rel=0.02)
    assert change(grey, "gaussian_noise", 2) == pytest.approx(0.12, rel=0.02)


def test_shot_noise_is_poisson():
    # Poisson(0.2 * 60) / 60 has standard deviation sqrt(0.2 / 60) = 0.0577.
    assert change(torch.full((1, 3, 200, 200), 0.2), "shot_noise", 1) == pytest.approx(0.0577, rel=0.03)


def test_impulse_noise_hits_the_published_share():
    corrupted = corrupt(torch.full((1, 3, 200, 200), 0.5), "impulse_noise", 5)
    assert float((corrupted != 0.5).double().mean()) == pytest.approx(0.27, abs=0.01)
    assert float((corrupted == 1).double().mean()) == pytest.approx(0.135, abs=0.01)
    # Each channel separately, not whole pixels.
    assert not torch.equal(corrupted[:, 0] == 0.5, corrupted[:, 1] == 0.5)


def test_contrast_and_brightness_by_hand():
    images = torch.tensor([0.2, 0.6]).view(1, 1, 1, 2).expand(1, 3, 4, 2).contiguous()
    # mean 0.4: 0.4 -+ 0.2 * 0.1 at severity 4
    assert corrupt(images, "contrast", 4)[0, 0, 0].tolist() == pytest.approx([0.38, 0.42])
    # V = 0.5 -> 0.8 at severity 3, so (0.5, 0.25, 0.1) -> times 1.6; black turns grey 0.3
    colour = torch.tensor([[0.5, 0.25, 0.1], [0, 0, 0]]).T.reshape(1, 3, 1, 2).repeat(1, 1, 4, 1)
    corrupted = corrupt(colour, "brightness", 3)[0, :, 0]
    assert corrupted[:, 0].tolist() == pytest.approx([0.8, 0.4, 0.16]) and corrupted[:, 1].tolist() == pytest.approx(
        [0.3] * 3
    )


@pytest.mark.parametrize(
    "name", ["defocus_blur", "motion_blur", "zoom_blur", "glass_blur", "pixelate", "elastic_transform"]
)
def test_geometry_and_blur_keep_a_flat_image(name):
    flat = torch.full((1, 3, 40, 40), 0.4)
    assert (corrupt(flat, name, 5) - 0.4).abs().max() < 3e-3  # pixelate goes through 8 bit


def test_blur_spreads_a_point_over_the_scaled_disk():
    image = torch.zeros(1, 3, 225, 225)
    image[..., 112, 112] = 1.0
    for side, radius in ((225, 10), (113, 5)):
        start = (225 - side) // 2
        corrupted = corrupt(image[..., start : start + side, start : start + side], "defocus_blur", 5)[0, 0]
        reach = (corrupted > 1e-4).nonzero() - side // 2
        # disk of radius 10 at 224 pixels, half of that at 112; two pixels for the soft edge
        assert radius <= float(reach.double().norm(dim=1).max()) <= radius + 2.5
        assert float(corrupted.sum()) == pytest.approx(1, abs=0.01)


def test_motion_blur_is_a_line():
    image = torch.zeros(1, 3, 225, 225)
    image[..., 112, 112] = 1.0
    corrupted = corrupt(image, "motion_blur", 3)[0, 0]
    rows, columns = (corrupted > 1e-3).nonzero().T - 112
    # 30 pixels to one side at an angle within 45 degrees: wider than high, never to the left.
    assert columns.min() >= -1 and 10 < columns.max() <= 31 and rows.abs().max() <= columns.max()


class Given:
    """A generator whose draws are given; `bounds` of each."""

    def __init__(self, *draws):
        self.draws, self.bounds = list(draws), []

    def uniform(self, low, high, size):
        self.bounds.append((low, high))
        return np.broadcast_to(self.draws.pop(0), size)


@pytest.mark.parametrize("side", [224, 112])
@pytest.mark.parametrize(
    ("severity", "strength", "sigma", "jitter"),
    [(1, 488, 170.8, 24.4), (3, 12.2, 2.44, 4.88), (4, 17.08, 2.44, 4.88), (5, 29.28, 2.44, 4.88)],
)
def test_elastic_lengths_are_the_published_ones(severity, strength, sigma, jitter, side):
    """Pixels of ImageNet-C at 224 pixels, in proportion at other sizes."""
    unit = side / 224
    rows = np.mgrid[:side, :side][0] / 1000
    image = np.stack([rows] * 3, -1)
    rng = Given(0.0, np.array([0.001, 0.0])[:, None, None])  # no affine map; every pixel moved alike
    shifted = CORRUPTIONS["elastic_transform"](image, severity - 1, rng, unit)
    assert rng.bounds[0] == pytest.approx((-jitter * unit, jitter * unit)) and rng.bounds[1] == (-1, 1)
    assert (shifted - image)[side // 4, side // 2] == pytest.approx(strength * unit * 1e-6, rel=1e-6)
    if sigma < 10:
        point = np.zeros((2, side, side))
        point[0, side // 2, side // 2] = 1
        moved = CORRUPTIONS["elastic_transform"](image, severity - 1, Given(0.0, point), unit) - image
        spread = 1000 * moved.sum() / 3 / (strength * unit), 1000 * moved.max() / (strength * unit)
        assert spread == pytest.approx((1, 1 / (2 * np.pi * (sigma * unit) ** 2)), rel=0.03)


def test_severity_is_alike_at_other_resolutions():
    for name in ("gaussian_noise", "fog", "snow", "zoom_blur", "motion_blur", "contrast"):
        large, small = (change(picture(side, side), name, 4) for side in (224, 56))
        assert small == pytest.approx(large, rel=0.35), name


def test_spec_is_a_condition():
    spec = CorruptionSpec("fog", 2)
    images = picture()
    assert spec.describe() == "fog 2" and spec.settings() == {"name": "fog", "severity": 2, "seed": 0}
    corrupted = spec.perturb(None, images, torch.tensor([0]), num_classes=2, keys=[(5, 0)])
    assert torch.equal(corrupted, corrupt(images, "fog", 2, seed=5))


def test_errors():
    with pytest.raises(UserError, match=r"'fogg' is not known. Near: 'fog'"):
        CorruptionSpec("fogg")
    with pytest.raises(UserError, match=r"corruption.severity is 6; it lies from 1 to 5"):
        corrupt(picture(), "fog", 6)
    with pytest.raises(UserError, match=r"need \[0, 1\]"):
        corrupt(picture() * 255, "fog", 1)
    with pytest.raises(UserError, match=r"images \(1, 1, 4, 4\): need \(b, 3, h, w\)"):
        corrupt(torch.zeros(1, 1, 4, 4), "fog", 1)


def constants(name):
    """The five constants of a corruption as its function has them, the tuple that the severity chooses from."""
    tree = ast.parse(inspect.getsource(CORRUPTIONS[name]))
    tuples = [node for node in ast.walk(tree) if isinstance(node, ast.Tuple) and len(node.elts) == 5]
    return next(ast.literal_eval(node) for node in tuples if not any(isinstance(n, ast.Name) for n in ast.walk(node)))


def test_the_page_has_the_constants():
    page = (ROOT / "docs" / "reference" / "corruptions.md").read_text(encoding="utf8")
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \| [^|]* \|$", page.partition("| Corruption |")[2], re.M))
    assert rows.keys() == CORRUPTIONS.keys()
    for name, text in rows.items():
        for shown, given in zip(map(float, text.split(", ")), constants(name), strict=True):
            assert shown in (given if isinstance(given, tuple) else (given,)), name
