"""Write small image files for tests."""

import os
import struct
import textwrap
import zlib

import numpy as np
from PIL import Image


def write_folder(root, count=3, classes=("cat", "dog"), size=(6, 4)):
  """Write random images of each class into a folder that has the name of the class."""
  rng = np.random.default_rng(0)
  for name in classes:
    (root / name).mkdir(parents=True)
    for index in range(count):
      pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
      suffix = ("png", "jpg", "bmp")[index % 3]
      Image.fromarray(pixels).save(root / name / f"{index}.{suffix}")


def backdate(root):
  """Subtract an hour from the modification times of all folders.

  Otherwise each new data source lists the folders again, because their modification times are recent.
  """
  for path in [root, *(path for path in root.rglob("*") if path.is_dir())]:
    old = path.stat().st_mtime_ns - 3600 * 10**9
    os.utime(path, ns=(old, old))


def truncate(path):
  """Remove everything after the first 50 bytes of an image file."""
  path.write_bytes(path.read_bytes()[:50])


def random_pixels(index, size=6):
  return np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)


def write_builder(path, name="Squares", count=7):
  """Write a Python file with a TFDS builder.

  Image i of each split is `random_pixels(i)`, with label i, the caption "größe i" and two tags.
  """
  path.write_text(
    textwrap.dedent(f"""\
      import numpy as np
      import tensorflow_datasets as tfds
      from PIL import Image


      class {name}(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
          image, label = tfds.features.Image(shape=(6, 6, 3)), tfds.features.ClassLabel(num_classes={count})
          text = tfds.features.Text()
          features = {{"image": image, "label": label, "caption": text, "tags": tfds.features.Sequence(text)}}
          features = tfds.features.FeaturesDict(features)
          return self.dataset_info_from_configs(features=features)

        def _split_generators(self, dl_manager):
          return {{"train": self._generate_examples({count}), "test": self._generate_examples(2)}}

        def _generate_examples(self, count):
          for index in range(count):
            pixels = np.random.default_rng(index).integers(0, 256, (6, 6, 3), dtype=np.uint8)
            texts = {{"caption": f"größe {{index}}", "tags": ["a", "b"]}}
            yield index, {{"image": Image.fromarray(pixels), "label": index, **texts}}
      """)
  )


def write_png(path, pixels, color_type):
  """Write a PNG with 16 bits per channel and any color type.

  Pillow writes 16 bits per channel only for gray images.
  """

  def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

  height, width = pixels.shape[:2]
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
  header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
  parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
  path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def write_bomb(path, side):
  """Write a PNG of less than 100 bytes whose header says that the image has `side` x `side` pixels."""
  write_png(path, np.zeros((1, 1), np.uint16), 0)
  content = bytearray(path.read_bytes())
  content[16:24] = struct.pack(">II", side, side)
  content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
  path.write_bytes(bytes(content))
