"""Every mode to uint8 RGB; damaged files name themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vismt.base.errors import UserError
from vismt.data.decode import decode_file, is_image_name, to_rgb


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> list[int]:
    return to_rgb(image)[:, y, x].tolist()


def test_modes():
    assert pixel(Image.new("L", (3, 2), 7)) == [7, 7, 7]
    assert pixel(Image.new("1", (3, 2), 1)) == [255, 255, 255]
    assert pixel(Image.new("CMYK", (3, 2), (255, 0, 0, 0))) == [0, 255, 255]
    # Red at alpha 128 over white: green = 255 * (1 - 128 / 255) = 127; an opaque pixel keeps its colour.
    assert pixel(Image.new("RGBA", (3, 2), (255, 0, 0, 128))) == [255, 127, 127]
    assert pixel(Image.new("RGBA", (3, 2), (9, 8, 7, 255))) == [9, 8, 7]
    assert pixel(Image.new("LA", (3, 2), (0, 0))) == [255, 255, 255]
    out = to_rgb(Image.new("L", (3, 2)))
    assert out.shape == (3, 2, 3) and out.dtype == torch.uint8 and out.is_contiguous()


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert pixel(image, 1) == [40, 50, 60]
    image.save(tmp_path / "p.png", transparency=1)
    out = decode_file(tmp_path / "p.png")
    assert out[:, 0, 0].tolist() == [10, 20, 30] and out[:, 0, 1].tolist() == [255, 255, 255]


def test_sixteen_bit_is_scaled_not_clipped(tmp_path):
    # (v + 128) // 257: 128 -> 0, 129 -> 1, 257 -> 1, 32896 = 128 * 257 -> 128, 65535 -> 255. Clipping would give 128.. -> 255.
    values = np.array([[0, 128, 129, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert decode_file(tmp_path / "deep.png")[1, 0].tolist() == [0, 0, 1, 1, 128, 255]


def test_float_image_is_refused(tmp_path):
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(UserError, match=r"f.tif: cannot be decoded .*float image"):
        decode_file(tmp_path / "f.tif")


def test_exif_orientation_is_applied(tmp_path):
    # Orientation 6 = the camera was turned: the top row of the file is the right column of the picture.
    image = Image.new("RGB", (3, 2))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    out = decode_file(tmp_path / "turned.png")
    assert out.shape == (3, 3, 2) and out[0].tolist() == [[0, 255], [0, 0], [0, 0]]


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_file_names_itself(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(UserError, match=rf"cut.{suffix}: cannot be decoded \(600 bytes"):
        decode_file(path)


@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 30, b"\xff\xd8\xff\xe0" + b"\0" * 30]
)
def test_no_image_names_itself(tmp_path, content):
    path = tmp_path / "odd.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"odd.jpg: cannot be decoded .*on_bad_sample=skip"):
        decode_file(path)


def test_absent_file(tmp_path):
    with pytest.raises(UserError, match=r"gone.png: cannot be read: No such file"):
        decode_file(tmp_path / "gone.png")


def test_image_names(tmp_path):
    assert is_image_name("A.JPEG")
    assert not is_image_name("._a.jpg") and not is_image_name("Thumbs.db")
