"""Test the decoding of image files of all formats, bit depths, orientations and sizes."""

import struct

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import data
from ddpm_jax.data.decoding import decode
from tests.pictures import random_pixels, write_bomb, write_png

LEVELS = np.arange(256).reshape(16, 16)


def read_everywhere(path, size, channels=1):
  """Read a file with the functions for training and for editing, and check that both return the same pixels."""
  (path.parent / "folder").mkdir(exist_ok=True)
  copy = path.rename(path.parent / "folder" / path.name)
  trained = data.FolderSource(copy.parent, (size, size), channels)[0]["image"]
  np.testing.assert_array_equal(data.read_inputs(copy, (size, size), channels).images[0], trained)
  return trained


def write_tiff(path, pixels, bits, white=1):
  """Write a gray TIFF with a bit depth or a white level that Pillow cannot write."""
  content = pixels.astype(np.uint16).tobytes() if bits == 16 else pack_12_bits(pixels)
  tags = [(256, 16), (257, 16), (258, bits), (259, 1), (262, white), (273, 8 + 2 + 12 * 8 + 4), (278, 16)]
  tags.append((279, len(content)))
  entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
  path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + content)


def pack_12_bits(pixels):
  first, second = pixels.reshape(-1, 2).T
  return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8).tobytes()


WRITERS = {
  "png": lambda path: Image.fromarray((LEVELS * 257).astype(np.uint16)).save(path),
  "tif": lambda path: Image.fromarray((LEVELS * 257).astype(np.uint16)).save(path),
  "12.tif": lambda path: write_tiff(path, LEVELS * 16 + 3, 12),
  "jp2": lambda path: Image.fromarray((LEVELS * 257).astype(np.uint16)).save(path),
  "pgm": lambda path: path.write_bytes(b"P5\n16 16\n65535\n" + (LEVELS * 257).astype(">u2").tobytes()),
  "10.pgm": lambda path: path.write_bytes(b"P5\n16 16\n1023\n" + np.rint(LEVELS * 1023 / 255).astype(">u2").tobytes()),
  "rgb.png": lambda path: write_png(path, (LEVELS * 257)[..., None].repeat(3, 2), 2),
  "la.png": lambda path: write_png(path, np.stack([LEVELS * 257, np.full((16, 16), 65535)], -1), 4),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_16_bits_are_scaled_to_8(tmp_path, kind):
  path = tmp_path / f"a.{kind}"
  WRITERS[kind](path)
  with Image.open(path) as opened:
    fitted = data.fit(opened, (16, 16), 1)
  error = np.abs(read_everywhere(path, 16)[..., 0].astype(int) - LEVELS)
  assert error.max() <= (1 if kind == "10.pgm" else 0), "10-bit levels differ slightly from 8-bit levels"
  assert np.max(np.abs(fitted[..., 0] - LEVELS)) == error.max()


@pytest.mark.parametrize(
  ("name", "pixels", "message"),
  [
    ("a.tif", np.float32(LEVELS / 255), "floats"),
    ("a.tif", np.int32(LEVELS), "signed or 32-bit integers"),
    ("a.pfm", np.float32(LEVELS / 255), "floats"),
  ],
)
def test_pixels_of_unknown_range_are_errors(tmp_path, name, pixels, message):
  (tmp_path / "folder").mkdir()
  path = tmp_path / "folder" / name
  Image.fromarray(pixels).save(path)
  message = rf"a\.\w+: its pixels are {message} of unknown range; expected 8 or 16 unsigned bits"
  with pytest.raises(data.BrokenImage, match=message):
    data.FolderSource(path.parent, (16, 16), 1)[0]
  with pytest.raises(ValueError, match=message):
    data.read_inputs(path, (16, 16), 1)
  with pytest.raises(ValueError, match=message):
    data.read_mask(path, (16, 16))
  with pytest.raises(ValueError, match="of unknown range"):
    data.fit(Image.fromarray(pixels), (16, 16), 1)


def test_signed_8_bit_tiffs_are_errors(tmp_path):
  Image.fromarray(LEVELS.astype(np.uint8)).save(tmp_path / "a.tif", tiffinfo={339: 2})
  with pytest.raises(ValueError, match=r"a\.tif: its pixels are signed or 32-bit integers of unknown range"):
    data.read_inputs(tmp_path / "a.tif", (16, 16), 1)


def test_16_bit_fits_files_are_errors(tmp_path):
  cards = ["SIMPLE  = T", "BITPIX  = 16", "NAXIS   = 2", "NAXIS1  = 16", "NAXIS2  = 16", "END"]
  header = "".join(card.ljust(80) for card in cards).ljust(2880)
  (tmp_path / "a.fits").write_bytes(header.encode() + (LEVELS - 128).astype(">i2").tobytes())
  with pytest.raises(ValueError, match=r"a\.fits: its pixels are 16-bit integers of FITS of unknown range"):
    data.read_inputs(tmp_path / "a.fits", (16, 16), 1)


@pytest.mark.parametrize(
  "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n", b"", b"text"]
)
def test_the_content_decides_the_format(tmp_path, content):
  """PostScript is refused under every file name, because Pillow would run an external program to decode it."""
  (tmp_path / "a.png").write_bytes(content)
  with pytest.raises(ValueError, match=r"Cannot decode the image .*a\.png: unknown format or pixel type\. Replace"):
    data.read_inputs(tmp_path / "a.png", (16, 16), 1)


def test_transparency_of_a_palette_is_dropped_without_warning(tmp_path):
  image = Image.fromarray(LEVELS.astype(np.uint8)).convert("P")
  image.putpalette([255 - level for level in range(256) for _ in range(3)])
  image.save(tmp_path / "a.png", transparency=bytes(range(256)))
  np.testing.assert_array_equal(read_everywhere(tmp_path / "a.png", 16)[..., 0], 255 - LEVELS)


def test_a_16_bit_tiff_with_white_as_0_is_an_error(tmp_path):
  write_tiff(tmp_path / "a.tif", LEVELS * 257, 16, white=0)
  with pytest.raises(ValueError, match=r"a\.tif: it stores white as 0"):
    data.read_inputs(tmp_path / "a.tif", (16, 16), 1)


def save_oriented(path, pixels, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  Image.fromarray(pixels).save(path, exif=exif, **({"quality": 100, "subsampling": 0} if path.suffix == ".jpg" else {}))


# How a viewer transforms the stored pixels, by EXIF orientation.
TRANSFORMS = {
  1: lambda x: x,
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.swapaxes(0, 1),
  6: lambda x: np.rot90(x, -1),
  7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
  8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("orientation", TRANSFORMS)
def test_photographs_are_upright_everywhere(tmp_path, suffix, orientation):
  pixels = np.zeros((8, 8, 3), np.uint8)
  pixels[:4, :6] = 255
  pixels[:2, :2] = 128
  save_oriented(tmp_path / f"a.{suffix}", pixels, orientation)
  got = read_everywhere(tmp_path / f"a.{suffix}", 8, 3)
  np.testing.assert_allclose(got.astype(int), TRANSFORMS[orientation](pixels), atol=2)


def test_masks_and_16_bit_images_are_rotated_too(tmp_path):
  pixels = np.zeros((8, 8), np.uint8)
  pixels[:4, :6] = 255
  save_oriented(tmp_path / "mask.png", pixels, 6)
  np.testing.assert_array_equal(data.read_mask(tmp_path / "mask.png", (8, 8))[..., 0], np.rot90(pixels, -1) > 0)
  save_oriented(tmp_path / "deep.tif", pixels.astype(np.uint16) * 257, 8)
  np.testing.assert_array_equal(read_everywhere(tmp_path / "deep.tif", 8)[..., 0], np.rot90(pixels))


@pytest.mark.parametrize("orientation", [1, 5, 6, 8])
@pytest.mark.parametrize("mode", ["L", "I;16", "P", "RGBA"])
def test_raw_tiffs_that_are_not_square_are_upright(tmp_path, mode, orientation):
  pixels = np.arange(12 * 8, dtype=np.uint8).reshape(8, 12)
  image = Image.fromarray(pixels.astype(np.uint16) * 257 if mode == "I;16" else pixels)
  if mode == "P":
    image.putpalette([level for level in range(256) for _ in range(3)])
  elif mode == "RGBA":
    image = image.convert(mode)
  exif = Image.Exif()
  exif[0x0112] = orientation
  image.save(tmp_path / "a.tif", exif=exif)
  np.testing.assert_array_equal(decode(tmp_path / "a.tif").convert("L"), TRANSFORMS[orientation](pixels))


def test_the_orientation_is_used_despite_other_malformed_tags(tmp_path):
  # Pillow can read a negative width, but cannot write it.
  entries = struct.pack("<HHIi", 0x0100, 9, 1, -5) + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
  exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
  Image.fromarray(random_pixels(0, 8)).save(tmp_path / "a.png", exif=exif)
  np.testing.assert_array_equal(read_everywhere(tmp_path / "a.png", 8, 3), np.rot90(random_pixels(0, 8), -1))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_unknown_orientation_is_ignored(tmp_path, orientation):
  save_oriented(tmp_path / "a.png", random_pixels(0, 8), orientation)
  np.testing.assert_array_equal(read_everywhere(tmp_path / "a.png", 8, 3), random_pixels(0, 8))


def test_damaged_exif_is_ignored(tmp_path):
  Image.fromarray(random_pixels(0, 8)).save(tmp_path / "a.png", exif=b"Exif\0\0no such header")
  np.testing.assert_array_equal(read_everywhere(tmp_path / "a.png", 8, 3), random_pixels(0, 8))


def test_an_image_above_pillows_size_limit_counts_as_broken(tmp_path, capsys):
  (tmp_path / "folder").mkdir()
  path = tmp_path / "folder" / "bomb.png"
  write_bomb(path, 40_000)
  for index in range(2):
    Image.fromarray(random_pixels(index, 8)).save(path.parent / f"{index}.png")
  message = r"bomb\.png: Image size \(1600000000 pixels\) exceeds limit"
  source = data.FolderSource(path.parent, (8, 8))
  with pytest.raises(ValueError, match=f"{message}.*broken=skip"):
    data.cache_in_memory(source)
  np.testing.assert_array_equal(data.cache_in_memory(source, "skip").images[2], random_pixels(0, 8))
  assert "bomb.png" in capsys.readouterr().out
  with pytest.raises(ValueError, match=f"Cannot decode the image .*{message}"):
    data.read_inputs(path, (8, 8), 3)
  with pytest.raises(ValueError, match=f"Cannot decode --mask=.*{message}"):
    data.read_mask(path, (8, 8))


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_a_mask_with_transparent_pixels_is_an_error(tmp_path, mode, level):
  alpha = np.zeros((8, 8), np.uint8)
  alpha[:4] = 255
  image = Image.fromarray(np.stack([np.full((8, 8), level, np.uint8)] * 3 + [alpha], -1))
  if mode == "P":
    image = Image.fromarray(alpha // 255).convert("P")
    image.putpalette([level] * 6)
    image.info["transparency"] = 0
  else:
    image = image.convert(mode)
  image.save(tmp_path / "mask.png")
  with pytest.raises(
    ValueError, match=r"--mask=.*mask\.png with transparent pixels.*expected white.*without transparency"
  ):
    data.read_mask(tmp_path / "mask.png", (8, 8))


def test_a_mask_may_have_an_opaque_alpha_channel(tmp_path):
  expected = np.random.default_rng(0).random((8, 8)) < 0.5
  gray = np.where(expected, 255, 0).astype(np.uint8)
  Image.fromarray(np.stack([gray] * 3 + [np.full_like(gray, 255)], -1)).save(tmp_path / "mask.png")
  np.testing.assert_array_equal(data.read_mask(tmp_path / "mask.png", (8, 8)), expected[..., None])
