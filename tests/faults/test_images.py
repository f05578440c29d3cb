"""Damaged image files, maps and folders of images: an image, or one line that names the file; no file is waited for."""

from __future__ import annotations

import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.faults import cases, many, no_hang, refused_or_harmless
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vismt.base.errors import UserError
from vismt.data.check import check
from vismt.data.decode import IMAGE_FORMATS, MAX_PIXELS, decode_bytes, decode_file
from vismt.data.images import open_images
from vismt.data.maps.dense_maps import read_array


def encoded(form: str, mode: str = "RGB") -> bytes:
    """Return a small image of noise in a format of Pillow, or an array as npy."""
    pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    file = io.BytesIO()
    if form == "npy":
        np.save(file, pixels)
    else:
        exif = Image.Exif()
        exif[0x0112] = 6
        options = {"exif": exif} if form in ("JPEG", "PNG", "TIFF", "WEBP") else {}
        Image.fromarray(pixels).convert(mode).save(file, form, **options)
    return file.getvalue()


BASES = [
    encoded(form, mode)
    for form in IMAGE_FORMATS
    for mode in (("RGB", "P") if form in ("PNG", "GIF", "TIFF") else ("RGB",))
]


@st.composite
def damaged(draw: st.DrawFn, base: bytes) -> bytes:
    """`base` cut, with other or further bytes, or with a number of its header made huge."""
    kind = draw(st.sampled_from(["cut", "flip", "flip", "number", "insert", "drop"]))
    at = draw(st.integers(0, len(base) - 1))
    early = draw(st.integers(0, min(80, len(base) - 1)))
    if kind == "cut":
        return base[:at]
    if kind == "insert":
        return base[:at] + draw(st.binary(min_size=1, max_size=9)) + base[at:]
    if kind == "drop":
        return base[:at] + base[at + draw(st.integers(1, 20)) :]
    data = bytearray(base)
    if kind == "number":
        data[early : early + 4] = draw(
            st.sampled_from([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\1\0\0"])
        )
    else:
        for _ in range(draw(st.integers(1, 3))):
            data[draw(st.sampled_from([early, draw(st.integers(0, len(base) - 1))]))] = draw(st.integers(0, 255))
    return bytes(data)


@cases(quick=40, campaign=600)
def test_damaged_files(cases: int) -> None:
    @many(cases)
    @given(st.sampled_from(BASES).flatmap(damaged))
    def run(data: bytes) -> None:
        with refused_or_harmless(data):
            image = decode_bytes(data, "x.png")
            assert image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3 and image.numel() > 0

    run()


@cases(quick=30, campaign=200)
@pytest.mark.parametrize("suffix", ["npy", "png"])
def test_damaged_maps(tmp_path: Path, suffix: str, cases: int) -> None:
    base = encoded("npy" if suffix == "npy" else "PNG", "L")

    @many(cases)
    @given(damaged(base))
    def run(data: bytes) -> None:
        path = tmp_path / f"map.{suffix}"
        path.write_bytes(data)
        with refused_or_harmless(data):
            assert isinstance(read_array(path), np.ndarray)

    run()


def png_bomb(side: int) -> bytes:
    """Return a PNG of (side, side) grey pixels whose data is all zeros."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [9_000, 12_000, 40_000])
def test_a_decompression_bomb_is_not_decoded(side: int) -> None:
    assert side**2 > MAX_PIXELS
    with pytest.raises(UserError, match=r"x.png: cannot be decoded \(\d+ bytes: .*pixels"):
        decode_bytes(png_bomb(side), "x.png")


def test_as_many_pixels_as_the_limit_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded("PNG")
    monkeypatch.setattr("vismt.data.decode.MAX_PIXELS", 63)
    assert decode_bytes(data, "x.png").shape == (3, 7, 9)  # turned by its EXIF
    monkeypatch.setattr("vismt.data.decode.MAX_PIXELS", 62)
    with pytest.raises(UserError, match="7 x 9 pixels; at most 62 are decoded"):
        decode_bytes(data, "x.png")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link(to: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink()
        path.symlink_to(to)

    return make


ODD = {
    "pipe": (_pipe, "it is a named pipe, not a file"),
    "device": (_link("/dev/zero"), "it is a device, not a file"),
    "link to itself": (_link("b.png"), "cannot be read: Too many levels of symbolic links"),
    "link to nothing": (_link("gone.png"), "cannot be read: No such file"),
    "link to a pipe": (lambda path: (_pipe(path.with_name("p")), _link("p")(path)), "named pipe"),
    "empty": (lambda path: path.write_bytes(b""), r"cannot be decoded \(0 bytes"),
    "text": (lambda path: path.write_text("no image"), "it is none of BMP, GIF"),
    "truncated": (lambda path: path.write_bytes(encoded("PNG")[:60]), r"cannot be decoded \(60 bytes"),
    "array": (lambda path: path.write_bytes(encoded("npy")), "it is none of"),
    "bomb": (lambda path: path.write_bytes(png_bomb(9_000)), "9000 x 9000 pixels"),
}


@pytest.fixture
def pets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A card over cat/{a,b}.png and dog/{a,b}.png in VISMT_DATA/pets; returns the card's file."""
    monkeypatch.setenv("VISMT_DATA", str(tmp_path))
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path / "cache"))
    for name in ("cat/a.png", "cat/b.png", "dog/a.png", "dog/b.png"):
        path = tmp_path / "pets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded("PNG"))
    card = tmp_path / "card.yaml"
    source = '{kind: folder, root: pets, layout: "{class}", splits: {all: 4}}'
    card.write_text(f"name: pets\ntitle: t\nsource: s\nlicence: l\nclasses: 2\nsources: [{source}]\n")
    return card


@pytest.mark.parametrize("kind", ODD)
def test_odd_entries_of_an_image_folder(pets: Path, kind: str) -> None:
    make, message = ODD[kind]
    path = pets.parent / "pets" / "cat" / "b.png"
    path.write_bytes(b"")
    if kind == "link to a pipe":
        (path.parent / "p").touch()
    make(path)
    with no_hang(kind):
        with pytest.raises(UserError, match=f"cat/b.png: .*{message}"):
            decode_file(path)
        images = open_images(pets)
        assert images.ids == ["cat/a.png", "cat/b.png", "dog/a.png", "dog/b.png"]
        with pytest.raises(UserError, match=message):
            images.read(1)
        kept = open_images(pets, on_bad_sample="skip")
        assert kept.skipped == ["cat/b.png"] and len(kept) == 3
        report = check(pets)
        assert not report.ok and [row.group for row in report.damaged] == ["cat/b.png"]
        assert "damaged 'cat/b.png'" in str(report)
        assert check(pets, decode=False).ok  # four names; only decoding tells


def test_a_folder_called_like_an_image_is_left_out(pets: Path) -> None:
    path = pets.parent / "pets" / "cat" / "b.png"
    _folder(path)
    report = check(pets)
    assert not report.ok and "3 of 4 images" in str(report)


@cases(quick=12, campaign=200)
def test_damaged_folders(tmp_path: Path, pets: Path, cases: int) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "pets"
    shutil.copytree(folder, whole)
    names = [path.relative_to(whole) for path in sorted(whole.rglob("*.png"))]
    changes = [make for kind, (make, _) in ODD.items() if kind != "link to a pipe"]

    @many(cases)
    @given(
        st.lists(
            st.tuples(st.sampled_from(names), st.sampled_from([*changes, _folder, Path.unlink])), min_size=1, max_size=3
        ),
        damaged(encoded("PNG")),
    )
    def run(entries: list[tuple[Path, Callable[[Path], object]]], data: bytes) -> None:
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        (folder / names[0]).write_bytes(data)
        for name, change in dict(entries).items():
            change(folder / name)
        for skip in ("error", "skip"):
            with refused_or_harmless(entries):
                images = open_images(pets, on_bad_sample=skip)
                for i in range(len(images)):
                    images.read(i)
        with refused_or_harmless(entries):
            assert str(check(pets))

    run()
