"""Test experiments/emoji.py on small stand-ins for its two npm packages."""

import io
import json
import runpy
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import data
from tests.conftest import ROOT

SCRIPT = ROOT / "experiments" / "emoji.py"
# Name, hexcode, group and file names of each emoji.
EMOJI = [
  ("face", "1F600", 0, ["1f600"]),
  ("keycap: #", "0023-FE0F-20E3", 8, ["0023-fe0f-20e3"]),
  ("eye", "1F441-FE0F", 1, ["1f441", "1f441-fe0f"]),
  ("skin tone", "1F3FB", 2, ["1f3fb"]),
  ("flag", "1F3C1", 9, ["1f3c1"]),
  ("letter", "1F1E6", None, ["1f1e6"]),
  ("without a picture", "1F601", 0, []),
  *((f"cat {index}", f"1F40{index}", 3, [f"1f40{index}"]) for index in range(10)),
]
GROUPS = {
  "0": "smileys-emotion",
  "1": "people-body",
  "2": "component",
  "3": "animals-nature",
  "8": "symbols",
  "9": "flags",
}
# The emoji that belong in the folder, by file name.
KEPT = {"1f600": "face", "0023-20e3": "keycap: #", "1f441": "eye"} | {
  f"1f40{index}": f"cat {index}" for index in range(10)
}
# File names of pictures in the package, where they differ from the file names in KEPT.
ASSETS = {"0023-20e3": "0023-fe0f-20e3", "1f441": "1f441-fe0f"}


def color_of(name):
  return np.random.default_rng(list(name.encode())).integers(0, 256, 3)


def picture(name):
  """Return the bytes of a WebP picture with a transparent upper half.

  The color of the lower half depends on the name.
  """
  pixels = np.zeros((256, 256, 4), np.uint8)
  pixels[128:] = (*color_of(name), 255)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "WEBP", lossless=True)
  return file.getvalue()


def write_package(path, contents):
  with tarfile.open(path, "w:gz") as archive:
    for name, content in contents.items():
      member = tarfile.TarInfo(f"package/{name}")
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def packages(tmp_path):
  """Return a folder with the stand-ins for the two npm packages."""
  folder = tmp_path / "packages"
  folder.mkdir()
  names = [name for *_, files in EMOJI for name in files]
  write_package(folder / "lobehub-fluent-emoji-3d-1.1.0.tgz", {f"assets/{name}.webp": picture(name) for name in names})
  emoji = [
    {"label": text, "hexcode": hexcode, "tags": [text, "ü"]} | ({} if group is None else {"group": group})
    for text, hexcode, group, _ in EMOJI
  ]
  contents = {"en/data.json": json.dumps(emoji), "meta/groups.json": json.dumps({"groups": GROUPS}), "LICENSE": "MIT"}
  write_package(
    folder / "emojibase-data-17.0.0.tgz",
    {name: content.encode() for name, content in contents.items()} | {"fr/data.json": b""},
  )
  return folder


def make(packages, output):
  runpy.run_path(str(SCRIPT))["main"](packages, output)


def test_the_folder_has_all_emoji_with_their_captions(packages, tmp_path):
  make(packages, tmp_path / "emoji")
  lines = {
    split: [
      json.loads(line) for line in (tmp_path / "emoji" / split / "metadata.jsonl").read_text("utf-8").splitlines()
    ]
    for split in ("train", "test")
  }
  assert (len(lines["train"]), len(lines["test"])) == (12, 1)
  assert {line["file_name"][:-5]: line["text"] for split in lines.values() for line in split} == KEPT
  for split, items in lines.items():
    files = {path.name for path in (tmp_path / "emoji" / split).iterdir()}
    assert files == {"metadata.jsonl"} | {line["file_name"] for line in items}
    for line in items:
      assert line["tags"] == [line["text"], "ü"]
      image = np.asarray(Image.open(tmp_path / "emoji" / split / line["file_name"]))
      assert image.shape == (64, 64, 3)
      assert np.min(image[:28]) > 245
      # The middle of an area of one color.
      source = ASSETS.get(line["file_name"][:-5], line["file_name"][:-5])
      assert np.max(np.abs(image[44:60].mean((0, 1)) - color_of(source))) < 12


def test_two_calls_make_the_same_folder_and_a_third_overwrites_nothing(packages, tmp_path):
  for name in ("a", "b"):
    make(packages, tmp_path / name)
  contents = [
    {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for root in (tmp_path / "a", tmp_path / "b")
  ]
  assert contents[0] == contents[1]
  with pytest.raises(ValueError, match="is not an empty folder"):
    make(packages, tmp_path / "a")


def test_a_source_reads_the_folder(packages, tmp_path):
  make(packages, tmp_path / "emoji")
  splits = data.folder(data.Fit((8, 8)), str(tmp_path / "emoji"), fields=data.Fields(classes="group"))
  assert set(splits.train.class_names) <= {"smileys-emotion", "people-body", "animals-nature", "symbols"}
  assert splits.held_out.class_names == splits.train.class_names
  data.load(splits)


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (
      "missing",
      r"without emojibase-data-17\.0\.0\.tgz; expected the npm package emojibase-data@17\.0\.0\. Download it: npm pack",
    ),
    ("cut", r"Cannot read .*emojibase-data-17\.0\.0\.tgz: .*Delete it, and download it again"),
    ("other", r"emojibase-data-17\.0\.0\.tgz without en/data\.json, meta/groups\.json; expected the package"),
  ],
)
def test_a_bad_package_is_one_clear_error(packages, tmp_path, damage, message):
  path = packages / "emojibase-data-17.0.0.tgz"
  if damage == "missing":
    path.unlink()
  elif damage == "cut":
    path.write_bytes(path.read_bytes()[:60])
  else:
    write_package(path, {"LICENSE": b"MIT"})
  with pytest.raises(ValueError, match=message):
    make(packages, tmp_path / "emoji")
  assert not (tmp_path / "emoji").exists()


def test_a_broken_image_leaves_no_folder_behind(packages, tmp_path):
  write_package(packages / "lobehub-fluent-emoji-3d-1.1.0.tgz", {"assets/1f600.webp": b"no image"})
  command = [sys.executable, str(SCRIPT), f"--packages={packages}", f"--output={tmp_path / 'emoji'}"]
  result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
  assert result.returncode == 1
  assert "cannot identify image file" in result.stderr
  assert "Traceback" not in result.stderr
  assert [path.name for path in tmp_path.iterdir()] == ["packages"]
