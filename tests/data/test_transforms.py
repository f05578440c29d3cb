"""Augmentation: a pure function of the seed, in range, and each of its parts does what it says."""

from __future__ import annotations

import threading

import pytest
import torch
from torchvision.transforms import v2

from vismt.data.transforms import augment


@pytest.fixture
def batch():
    return torch.rand(6, 3, 20, 24, generator=torch.Generator().manual_seed(1))


def test_deterministic_and_global_state_untouched(batch):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = augment(batch, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(augment(batch, 3), first) and not torch.equal(augment(batch, 4), first)


def test_shape_range_and_input_kept(batch):
    before = batch.clone()
    out = augment(batch, 0)
    assert out.shape == batch.shape and out.dtype == batch.dtype and out.min() >= 0 and out.max() <= 1
    assert torch.equal(batch, before)


def test_each_image_gets_its_own_draw(batch):
    same = batch[:1].expand(6, -1, -1, -1)
    out = augment(same, 0)
    assert len({tuple(image.flatten().tolist()) for image in out}) == 6


def test_flip_alone_mirrors_left_and_right(batch):
    out = augment(batch, 2, crop=None, jitter=0)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(out, batch)]
    kept = [torch.equal(a, b) for a, b in zip(out, batch)]
    assert all(m != k for m, k in zip(mirrored, kept)) and any(mirrored) and any(kept)


def test_nothing_asked_is_the_identity(batch):
    out = augment(batch, 2, crop=None, jitter=0, flip=False)
    assert torch.equal(out, batch) and out.data_ptr() != batch.data_ptr()
    assert augment(batch[:0], 0).shape == (0, 3, 20, 24)


def test_crop_keeps_constant_images_constant():
    grey = torch.full((4, 3, 16, 16), 0.5)
    assert torch.allclose(augment(grey, 1, jitter=0), grey, atol=1e-6)


def test_jitter_strength_bounds_the_brightness():
    # Grey stays grey under contrast and saturation; brightness 0.4 multiplies by 0.6 to 1.4: 0.5 -> 0.3 to 0.7.
    out = augment(torch.full((64, 3, 4, 4), 0.5), 1, crop=None, jitter=0.4, flip=False)
    assert 0.3 - 1e-5 <= out.min() < 0.35 and 0.65 < out.max() <= 0.7 + 1e-5


def test_the_draws_are_those_of_v2_from_the_global_generator_and_a_thread_may_make_them(batch):
    parts = [
        v2.RandomResizedCrop((20, 24), scale=(0.35, 1.0), antialias=True),
        v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4),
        v2.RandomHorizontalFlip(),
    ]
    torch.manual_seed(9)
    expected = torch.stack([v2.Compose(parts)(image) for image in batch]).clamp(0, 1)
    made = []
    thread = threading.Thread(target=lambda: made.append(augment(batch, 9)))
    generator = torch.Generator().manual_seed(2)
    alone = [torch.rand(1, generator=generator) for _ in range(500)]
    torch.manual_seed(2)
    thread.start()
    beside = [torch.rand(1) for _ in range(500)]
    thread.join()
    assert torch.equal(made[0], expected) and torch.equal(torch.cat(beside), torch.cat(alone))
