"""DiffAugment: the range of each change, one by one and against plain loops."""

import pytest
import torch
from helpers.tiny import images

from vismt.base.errors import UserError
from vismt.metatune.finetuning.diffaugment import diff_augment

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def always(batch, seed=0, **options):
    return diff_augment(batch, seeded(seed), probability=1.0, **options)


def probe(count):
    """Normalised images of three pixels, grey 1, grey -1 and (1, -1, 0): what is added and the two factors can be read off."""
    pixels = torch.tensor([[1.0, 1, 1], [-1, -1, -1], [1, -1, 0]])
    return pixels.T[None, :, None].expand(count, 3, 1, 3).contiguous()


def test_colour_keeps_its_ranges_and_reaches_their_ends():
    augmented = always(probe(4000), types=("color",))
    # A flip moves pixels about: sort by grey level. The mean is 0, so each pixel is (level + b) * contrast + the mean's share.
    grey = augmented.mean(1)[:, 0]
    contrast = (grey.amax(1) - grey.amin(1)) / 2
    brightness = grey.mean(1)  # contrast leaves the mean where it is
    colourful = (augmented - augmented.mean(1, keepdim=True)).abs().amax((1, 2, 3))
    saturation = colourful / contrast
    for drawn, low, high in ((brightness, -0.5, 0.5), (contrast, 0.5, 1.5), (saturation, 0.0, 2.0)):
        assert (
            low - 1e-5 <= drawn.min() < low + 0.01 * (high - low)
            and high - 0.01 * (high - low) < drawn.max() <= high + 1e-5
        )
        assert drawn.mean() == pytest.approx((low + high) / 2, abs=0.03)
    assert torch.corrcoef(torch.stack([brightness, contrast, saturation])).triu(1).abs().max() < 0.06  # a draw for each


def test_the_maths_in_normalised_space_by_hand():
    # The same draws, applied by a loop over images and channels, in double.
    batch = images(5, size=16).double()
    augmented = always(batch, seed=3, types=("color",), mean=MEAN, std=STD)
    generator = seeded(3)
    flip = [float(torch.rand(1, generator=generator)) for _ in range(2)][1] < 0.5
    draws = [torch.rand(5, generator=generator).double() for _ in range(3)]
    for n, image in enumerate(batch):
        b, s, c = (float(draw[n]) for draw in draws)
        x = torch.stack([(image[k] - MEAN[k]) / STD[k] for k in range(3)]) + b - 0.5
        x = x.flip(2) if flip else x
        grey = (x[0] + x[1] + x[2]) / 3
        x = torch.stack([grey + 2 * s * (x[k] - grey) for k in range(3)])
        x = x.mean() + (c + 0.5) * (x - x.mean())
        byhand = torch.stack([x[k] * STD[k] + MEAN[k] for k in range(3)])
        assert torch.allclose(augmented[n], byhand, atol=1e-12)


def test_brightness_is_in_units_of_the_normalised_image():
    # Normalised: zero, blind to saturation and contrast.
    grey = torch.tensor(MEAN).view(1, 3, 1, 1).expand(3000, 3, 2, 2)
    moved = always(grey, types=("color",), mean=MEAN, std=STD) - grey
    reach = moved.abs().amax((0, 2, 3))
    assert torch.allclose(reach, 0.5 * torch.tensor(STD), atol=2e-3)
    bright = always(torch.ones(3000, 3, 2, 2), types=("color",), mean=MEAN, std=STD)
    assert bright.max() > 1.1  # not clamped: [0, 1] may be left


def test_translation_reaches_an_eighth_each_way_and_draws_for_each_image():
    batch = torch.zeros(600, 1, 16, 24)
    batch[:, :, 8, 12] = 1
    for seed in range(2):
        augmented = always(batch, seed, types=("translation",))
        where = augmented[:, 0].nonzero()
        assert len(where) == 600
        columns = {int(c) for c in where[:, 2]}
        middle = (min(columns) + max(columns)) // 2  # 12, or 11 where the batch is flipped
        assert {int(r) - 8 for r in where[:, 1]} == set(range(-2, 3))
        assert middle in (11, 12) and columns == set(range(middle - 3, middle + 4))
        assert len({(int(r), int(c)) for _, r, c in where}) == 35  # every pair: rows and columns are drawn apart


def test_translation_pads_with_zero_which_is_the_mean_colour():
    batch = torch.ones(200, 3, 16, 16)
    augmented = always(batch, types=("translation",))
    assert set(augmented.unique().tolist()) == {0.0, 1.0} and augmented[:, :, 2:-2, 2:-2].min() == 1
    lost = (augmented[:, 0] == 0).float().mean((1, 2))
    assert lost.max() == pytest.approx(1 - 14 * 14 / 256) and lost.min() == 0
    coloured = always(batch, types=("translation",), mean=MEAN, std=STD)
    assert torch.allclose(coloured.amin((0, 2, 3)), torch.tensor(MEAN)) and coloured.max() == pytest.approx(1)
    between = (coloured - torch.tensor(MEAN).view(1, 3, 1, 1)).abs().minimum((coloured - 1).abs())
    assert between.max() < 1e-6


def test_translation_equals_a_loop():
    batch = images(6, size=16)
    augmented = always(batch, seed=5, types=("translation",))
    generator = seeded(5)
    torch.rand(1, generator=generator)
    flip = float(torch.rand(1, generator=generator)) < 0.5
    down, right = (torch.randint(-2, 3, (6, 1), generator=generator).flatten().tolist() for _ in range(2))
    for n, image in enumerate(batch.flip(-1) if flip else batch):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        byhand = padded[:, 2 - down[n] : 18 - down[n], 2 - right[n] : 18 - right[n]]
        assert torch.equal(augmented[n], byhand)


def test_the_flip_is_of_the_whole_batch_and_of_every_other():
    batch = images(5)
    results = [always(batch, seed, types=()) for seed in range(200)]
    flipped = [torch.equal(result, batch.flip(-1)) for result in results]
    assert all(flip or torch.equal(result, batch) for flip, result in zip(flipped, results))
    assert 70 < sum(flipped) < 130


def test_probability_is_of_the_whole_batch():
    batch = images(4)
    assert diff_augment(batch, seeded(), probability=0.0) is batch
    untouched = sum(diff_augment(batch, seeded(seed), probability=0.9) is batch for seed in range(400))
    assert 20 < untouched < 65


def test_a_seed_fixes_everything_and_the_global_generator_is_left_alone():
    batch, state = images(4), torch.get_rng_state()
    first, again, other = always(batch, 1), always(batch, 1), always(batch, 2)
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.equal(torch.get_rng_state(), state)
    generator = seeded(1)
    diff_augment(batch, generator)
    assert not torch.equal(diff_augment(batch, generator, probability=1.0), first)  # the generator moves on
    assert torch.allclose(always(batch.double(), 1).float(), first, atol=1e-6)  # the same draws for every dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_and_dtype_stay_and_nothing_is_changed_in_place(dtype):
    batch = images(3).to(dtype)
    before = batch.clone()
    augmented = always(batch, mean=MEAN, std=torch.tensor(STD))
    assert augmented.shape == batch.shape and augmented.dtype == dtype and torch.equal(batch, before)
    assert diff_augment(batch[:0], seeded(), probability=1.0).shape == (0, 3, 16, 16)


def test_the_gradient_is_that_of_the_function():
    # The change is linear in the images, so gradcheck in double is exact.
    batch = torch.rand(2, 3, 8, 8, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: always(x, 7, mean=MEAN, std=STD), (batch,))


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        (torch.zeros(2, 3, 8, 8).byte(), {}, r"torch.uint8 \(2, 3, 8, 8\)"),
        (torch.zeros(3, 8, 8), {}, r"\(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8), {"types": ("colour",)}, "type 'colour'. Near: 'color'"),
        (torch.zeros(2, 3, 8, 8), {"types": "color"}, "types is the text 'color'"),
        (torch.zeros(2, 3, 8, 8), {"probability": 1.5}, "probability 1.5"),
        (torch.zeros(2, 3, 8, 8), {"mean": MEAN}, "mean and std together"),
    ],
)
def test_errors(batch, options, message):
    with pytest.raises(UserError, match=message):
        diff_augment(batch, seeded(), **options)
