"""The uint8 store: geometry, memory and disk, and what happens when the disk is full."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from vismt.data import pixels as module
from vismt.data.images import open_images
from vismt.data.pixels import Pixels, square
from vismt.errors import UserError


def test_square_keeps_the_centre():
    # 4 high, 12 wide, columns numbered 10, 20, ... 120: at size 4 nothing is resized, columns 5 to 8 remain.
    wide = (torch.arange(1, 13, dtype=torch.uint8) * 10).expand(3, 4, 12)
    assert square(wide, 4)[0, 0].tolist() == [50, 60, 70, 80]
    assert square(wide.transpose(1, 2), 4)[0, :, 0].tolist() == [50, 60, 70, 80]


def test_square_averages_when_it_shrinks():
    # Columns 0 255 255 0 repeated, 16 -> 4: plain bilinear reads only columns 1 and 2 of each four (255); averaged over
    # the area it is about half.
    stripes = torch.tensor([0, 255, 255, 0] * 4, dtype=torch.uint8).expand(3, 16, 16)
    middle = square(stripes, 4)[0, 1:3, 1:3]
    assert (middle.float() - 127.5).abs().max() < 40


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 200), (97, 31)])
def test_square_of_any_shape(size):
    assert square(torch.zeros(3, *size, dtype=torch.uint8), 16).shape == (3, 16, 16)


def test_index(pets):
    store = Pixels(open_images(pets), 8)
    batch = store[torch.tensor([4, 0])]
    assert batch.shape == (2, 3, 8, 8) and batch.dtype == torch.float32
    # Flat grey 50 and 10: 50 / 255 and 10 / 255.
    assert torch.allclose(batch[:, 0, 0, 0], torch.tensor([50 / 255, 10 / 255]))
    assert store.raw(torch.tensor([2]))[0, 0, 0, 0] == 30 and len(store) == 5
    assert store.labels.tolist() == [0, 0, 1, 0, 1] and store.classes == ["cat", "dog"] and store.split == "all"
    with pytest.raises(TypeError, match="whole numbers"):
        store[torch.tensor([True, False, True, False, False])]


def test_small_stores_leave_no_file(home, pets):
    Pixels(open_images(pets), 8)
    assert not (home / "cache").exists()


@pytest.fixture
def on_disk(monkeypatch):
    monkeypatch.setattr(module, "MEMORY_BYTES", 0)


def test_large_store_is_a_file_found_again(home, pets, paint, on_disk, monkeypatch):
    first = Pixels(open_images(pets), 8)
    assert isinstance(first.store, np.memmap)
    (file,) = (home / "cache" / "pixels").iterdir()
    in_memory = Pixels(open_images(pets), 8, cache=False)
    assert file.name.startswith("pets-all-8-") and torch.equal(first[torch.arange(5)], in_memory[torch.arange(5)])

    images = open_images(pets)
    images.reader = lambda i: pytest.fail("decoded again")
    assert torch.equal(Pixels(images, 8)[torch.arange(5)], first[torch.arange(5)])
    Pixels(open_images(pets), 9)
    paint(home / "data" / "pets" / "train" / "cat" / "a.png", 200)
    assert Pixels(open_images(pets), 8).raw(torch.tensor([0]))[0, 0, 0, 0] == 200
    assert len(list((home / "cache" / "pixels").iterdir())) == 3


def test_cache_false_stays_in_memory(home, pets, on_disk):
    assert not isinstance(Pixels(open_images(pets), 8, cache=False).store, np.memmap)
    assert not (home / "cache").exists()


def test_a_store_too_large_to_keep_is_decoded_on_demand(home, pets, monkeypatch):
    whole = Pixels(open_images(pets), 8)
    monkeypatch.setattr(module, "STORE_BYTES", 100)
    images, decoded = open_images(pets), []
    read = images.reader
    images.reader = lambda i: decoded.append(i) or read(i)
    lazy = Pixels(images, 8)
    assert decoded == [] and not (home / "cache").exists()
    index = torch.tensor([4, 0, 4])
    assert torch.equal(lazy[index], whole[index]) and decoded == [4, 0, 4]
    assert isinstance(Pixels(open_images(pets), 8, cache=False).store, np.ndarray)


def test_damaged_image_leaves_no_half_store(home, pets, on_disk):
    (home / "data" / "pets" / "train" / "dog" / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a.png: cannot be decoded"):
        Pixels(open_images(pets), 8)
    assert list((home / "cache" / "pixels").iterdir()) == []


def test_full_disk_is_one_clear_error(home, pets, on_disk, monkeypatch):
    real = os.fdopen

    def full(handle, mode):
        file = real(handle, mode)
        file.close()

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                return None

            def write(self, data):
                raise OSError(28, "No space left on device")

        return Full()

    monkeypatch.setattr(module.os, "fdopen", full)
    with pytest.raises(UserError, match=r"No space left on device. Free space, set VISMT_CACHE"):
        Pixels(open_images(pets), 8)
    assert list((home / "cache" / "pixels").iterdir()) == []


def test_unusable_cache_folder(home, pets, on_disk):
    (home / "cache").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"pixel store .*set VISMT_CACHE"):
        Pixels(open_images(pets), 8)


def test_size_must_be_positive(pets):
    with pytest.raises(UserError, match="image size 0"):
        Pixels(open_images(pets), 0)


def test_order_is_kept_over_several_chunks(home, write_card):
    folder = home / "data" / "many"
    for label in "ab":
        (folder / label).mkdir(parents=True)
        for k in range(70):
            Image.new("L", (4, 4), k + (100 if label == "b" else 0)).save(folder / label / f"{k:03d}.png")
    path = write_card('  - {kind: folder, root: many, layout: "{class}", splits: {all: 140}}')
    store = Pixels(open_images(path), 4)
    assert store.raw(torch.arange(140))[:, 0, 0, 0].tolist() == [*range(70), *range(100, 170)]
