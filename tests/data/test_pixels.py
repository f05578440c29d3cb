"""The uint8 store: geometry, memory and disk, and what happens when the disk is full."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from vismt.base.errors import UserError
from vismt.data import pixels as module
from vismt.data.images import open_images
from vismt.data.pixels import Pixels, crop_square


def test_square_keeps_the_centre():
    # 4 high, 12 wide, columns numbered 10, 20, ... 120: at size 4 nothing is resized, columns 5 to 8 remain.
    wide = (torch.arange(1, 13, dtype=torch.uint8) * 10).expand(3, 4, 12)
    assert crop_square(wide, 4)[0, 0].tolist() == [50, 60, 70, 80]
    assert crop_square(wide.transpose(1, 2), 4)[0, :, 0].tolist() == [50, 60, 70, 80]


def test_square_averages_when_it_shrinks():
    # Columns 0 255 255 0 repeated, 16 -> 4: plain bilinear reads only columns 1 and 2 of each four (255); averaged over
    # the area it is about half.
    stripes = torch.tensor([0, 255, 255, 0] * 4, dtype=torch.uint8).expand(3, 16, 16)
    middle = crop_square(stripes, 4)[0, 1:3, 1:3]
    assert (middle.float() - 127.5).abs().max() < 40


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 200), (97, 31)])
def test_square_of_any_shape(size):
    assert crop_square(torch.zeros(3, *size, dtype=torch.uint8), 16).shape == (3, 16, 16)


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


def test_a_store_is_a_file_found_again(home, pets, paint):
    first = Pixels(open_images(pets), 8)
    assert isinstance(first.store, np.memmap)
    (file,) = (home / "cache" / "pixels").iterdir()
    in_memory = Pixels(open_images(pets), 8, cache=False)
    assert file.name.startswith("pets-all-8-") and torch.equal(first[torch.arange(5)], in_memory[torch.arange(5)])

    images = open_images(pets)
    images.read = lambda i: pytest.fail("decoded again")
    assert torch.equal(Pixels(images, 8)[torch.arange(5)], first[torch.arange(5)])
    Pixels(open_images(pets), 9)
    paint(home / "data" / "pets" / "train" / "cat" / "a.png", 200)
    assert Pixels(open_images(pets), 8).raw(torch.tensor([0]))[0, 0, 0, 0] == 200
    assert len(list((home / "cache" / "pixels").iterdir())) == 3


def test_cache_false_stays_in_memory(home, pets):
    assert not isinstance(Pixels(open_images(pets), 8, cache=False).store, np.memmap)
    assert not (home / "cache").exists()


def test_a_store_too_large_to_keep_is_decoded_on_demand(home, pets, monkeypatch):
    whole = Pixels(open_images(pets), 8, cache=False)
    monkeypatch.setattr(module, "STORE_BYTES", 100)
    images, decoded = open_images(pets), []
    read = images.read
    images.read = lambda i: decoded.append(i) or read(i)
    lazy = Pixels(images, 8)
    assert decoded == [] and not (home / "cache").exists()
    index = torch.tensor([4, 0, 4])
    assert torch.equal(lazy[index], whole[index]) and decoded == [4, 0, 4]
    assert isinstance(Pixels(open_images(pets), 8, cache=False).store, np.ndarray)


def test_damaged_image_leaves_no_half_store(home, pets):
    (home / "data" / "pets" / "train" / "dog" / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a.png: cannot be decoded"):
        Pixels(open_images(pets), 8)
    assert list((home / "cache" / "pixels").iterdir()) == []


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that takes no byte."""

    class Full:
        def __init__(self, handle, mode):
            os.close(handle)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fdopen", Full)


def test_a_full_disk_gives_one_notice_and_the_same_images(home, pets, full_disk, capsys):
    expected = Pixels(open_images(pets), 8, cache=False)
    capsys.readouterr()
    stores = [Pixels(open_images(pets), 8) for _ in range(2)]
    assert all(torch.equal(store[torch.arange(5)], expected[torch.arange(5)]) for store in stores)
    assert capsys.readouterr().out.count("No space left on device. Free space or set VISMT_CACHE") == 1
    assert list((home / "cache" / "pixels").iterdir()) == []


def test_a_large_set_is_decoded_on_demand_where_there_is_no_room(home, pets, full_disk, monkeypatch):
    monkeypatch.setattr(module, "MEMORY_BYTES", 100)
    images = Pixels(open_images(pets), 8)
    assert isinstance(images.store, module.OnDemand) and images.key is None
    assert torch.equal(images[torch.tensor([3, 1])], Pixels(open_images(pets), 8, cache=False)[torch.tensor([3, 1])])


def test_a_cache_folder_that_is_a_file_gives_a_notice(home, pets, capsys):
    (home / "cache").write_text("a file where the folder should be")
    assert isinstance(Pixels(open_images(pets), 8).store, np.ndarray)
    assert "decoded images are kept in memory" in capsys.readouterr().out


HEADER = 128  # bytes before the pixels


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: b"",
        lambda data: b"x" * len(data),
        lambda data: bytes(len(data)),
        lambda data: data[:HEADER] + bytes(5 * 192) + data[HEADER + 5 * 192 :],  # the pixels alone
        lambda data: data[: HEADER + 192] + bytes(192) + data[HEADER + 2 * 192 :],  # of one image
        lambda data: data[: HEADER + 5 * 192] + bytes(6 * 16),  # their digests
        lambda data: (
            data[:HEADER] + data[HEADER + 192 : HEADER + 384] + data[HEADER : HEADER + 192] + data[HEADER + 384 :]
        ),
    ],
)
def test_a_damaged_store_is_written_again(home, pets, damage):
    first = Pixels(open_images(pets), 8)
    expected = first.raw(torch.arange(5))
    (file,) = (home / "cache" / "pixels").iterdir()
    whole = file.read_bytes()
    assert len(whole) == HEADER + 5 * 192 + 6 * 16
    file.write_bytes(damage(whole))
    again = Pixels(open_images(pets), 8)
    assert torch.equal(again.raw(torch.arange(5)), expected) and file.read_bytes() == whole and again.key == first.key


def test_a_store_that_is_damaged_while_it_is_in_use_is_written_again(home, pets, capsys):
    store = Pixels(open_images(pets), 8)
    expected = store.raw(torch.arange(5))
    (file,) = (home / "cache" / "pixels").iterdir()
    whole = file.read_bytes()
    with file.open("r+b") as handle:  # the memory-mapped file itself
        handle.seek(HEADER + 4 * 192)
        handle.write(bytes(192))
    assert torch.equal(store.raw(torch.tensor([0, 1])), expected[:2]) and "is damaged" not in capsys.readouterr().out
    assert torch.equal(store.raw(torch.tensor([4])), expected[4:])
    assert f"{file.name} is damaged; its images are decoded again" in capsys.readouterr().out
    assert file.read_bytes() == whole and torch.equal(store.raw(torch.arange(5)), expected)


def test_a_store_is_on_the_disk_before_it_has_its_name(home, pets, monkeypatch):
    synced, replaced = [], []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_ino), sync(handle))[1])
    monkeypatch.setattr(
        os, "replace", lambda a, b: (replaced.append((os.stat(a).st_ino in synced, b)), replace(a, b))[1]
    )
    Pixels(open_images(pets), 8)
    assert [done for done, path in replaced if path.suffix == ".npy"] == [True]


@pytest.mark.parametrize("library", ["PIL", "torchvision", "vismt.data"])
def test_another_version_of_what_decodes_has_a_store_of_its_own(home, pets, monkeypatch, library):
    Pixels(open_images(pets), 8)
    stated = module.version
    monkeypatch.setattr(module, "version", lambda name: "other" if name == library else stated(name))
    Pixels(open_images(pets), 8)
    assert len(list((home / "cache" / "pixels").iterdir())) == 2


def test_the_key_is_of_the_pixels(home, pets, paint):
    key = Pixels(open_images(pets), 8).key
    assert key == Pixels(open_images(pets), 8).key and key != Pixels(open_images(pets), 9).key
    assert Pixels(open_images(pets), 8, cache=False).key == key
    paint(home / "data" / "pets" / "train" / "cat" / "a.png", 200)
    assert Pixels(open_images(pets), 8).key != key


def test_the_store_used_longest_ago_is_deleted(home, pets, monkeypatch):
    one, two = (Pixels(open_images(pets), size) for size in (8, 9))
    files = {int(path.name.split("-")[2]): path for path in (home / "cache" / "pixels").iterdir()}
    for age, path in enumerate(files.values()):
        os.utime(path, (age, age))
    Pixels(open_images(pets), 8)  # used now
    monkeypatch.setattr(module, "STORE_BYTES", files[8].stat().st_size + 5 * 3 * 100)
    Pixels(open_images(pets), 10)
    assert files[8].exists() and not files[9].exists()
    assert torch.equal(two.raw(torch.arange(5)), Pixels(open_images(pets), 9, cache=False).raw(torch.arange(5)))
    assert torch.equal(one.raw(torch.arange(5)), Pixels(open_images(pets), 8, cache=False).raw(torch.arange(5)))


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
