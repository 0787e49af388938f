"""Make a folder of 1,599 captioned emoji as 64x64 RGB images on a white background, for the emoji recipes.

npm pack @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0 --pack-destination=<packages>
python experiments/emoji.py --packages=<packages> --output=<folder>

The images are the 3D emoji of Microsoft's Fluent Emoji (MIT), as npm distributes them. Their English names, groups and
tags come from emojibase (MIT). Flags, skin-tone variants, and components (such as a skin tone without an emoji) are
omitted.

The folder has the layout of Hugging Face's ImageFolder: train/ (1,400) and test/ (199) contain images and a
metadata.jsonl with `file_name`, `text`, `group` and `tags`. The split is random with a fixed seed, so it is the same in
every run. To train on the groups as classes, set --config.data.source.path=<folder> --config.data.fields.classes=group.
"""

import argparse
import io
import json
import random
import sys
import tarfile
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ddpm_jax.storage import files

IMAGES, CAPTIONS = "@lobehub/fluent-emoji-3d@1.1.0", "emojibase-data@17.0.0"
LEFT_OUT = ("component", "flags")
SIZE = 64
# In the packages, a file name is the code points of an emoji in hexadecimal. Some packages leave this code point out of
# the names, because it only asks for a colored picture.
SELECTOR = "fe0f"
# The test split is an eighth of all emoji.
SHARE = 8


def read_package(folder, package, prefixes):
  """Return a dict from name to contents, for the files in an npm package whose names start with one of `prefixes`."""
  path = folder / f"{package.removeprefix('@').replace('/', '-').replace('@', '-')}.tgz"
  if not path.is_file():
    raise ValueError(
      f"Got the folder {folder} without {path.name}; expected the npm package {package}. Download it: npm pack"
      f" {package} --pack-destination={folder}"
    )
  contents = {}
  try:
    with tarfile.open(path) as archive:
      for member in archive:
        name = member.name.removeprefix("package/")
        if member.isfile() and name.startswith(prefixes):
          contents[name] = archive.extractfile(member).read()
  except (tarfile.TarError, EOFError, OSError) as error:
    raise ValueError(
      f"Cannot read {path}: {error}. Delete it, and download it again with npm pack {package}"
    ) from error
  if missing := [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in contents)]:
    raise ValueError(f"Got {path} without {', '.join(missing)}; expected the package {package}. Download it again.")
  return contents


def key_of(code_points):
  """Return the key of an emoji: its code points in lower case, without the variation selector."""
  return "-".join(point for point in code_points.lower().split("-") if point != SELECTOR)


def captions_of(package, available):
  """Return a dict from the key of each emoji with an image to its metadata, in the order of emojibase's data file."""
  groups = json.loads(package["meta/groups.json"])["groups"]
  captions = {}
  for emoji in json.loads(package["en/data.json"]):
    key, group = key_of(emoji["hexcode"]), groups.get(str(emoji.get("group")))
    if group is not None and group not in LEFT_OUT and key in available:
      captions[key] = {
        "file_name": f"{key}.webp",
        "text": emoji["label"],
        "group": group,
        "tags": emoji.get("tags", []),
      }
  return captions


def resize(content):
  """Resize an image to SIZE x SIZE pixels on a white background, and return the bytes of a WebP file."""
  image = Image.open(io.BytesIO(content)).convert("RGBA")
  white = Image.new("RGBA", image.size, "white")
  white.alpha_composite(image)
  file = io.BytesIO()
  white.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(file, "WEBP", quality=92, method=6)
  return file.getvalue()


def main(packages, output):
  """Write the folder of images and captions."""
  files.check_new_folder(output)
  assets = read_package(packages, IMAGES, ("assets/",))
  emojibase = read_package(packages, CAPTIONS, ("en/data.json", "meta/groups.json", "LICENSE"))
  # If an emoji has two files, the first by name replaces the other.
  images = {key_of(Path(name).stem): content for name, content in sorted(assets.items(), reverse=True)}
  captions = captions_of(emojibase, images)
  keys = list(captions)
  random.Random(0).shuffle(keys)
  count = len(keys) // SHARE
  with files.atomic_folder(output) as folder, tqdm(total=len(keys), desc="resizing", unit=" images") as bar:
    for split, members in (("test", keys[:count]), ("train", keys[count:])):
      (folder / split).mkdir()
      for key in sorted(members):
        (folder / split / captions[key]["file_name"]).write_bytes(resize(images[key]))
        bar.update()
      lines = [json.dumps(captions[key], ensure_ascii=False) for key in sorted(members)]
      (folder / split / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (folder / "LICENSE-emojibase").write_bytes(emojibase["LICENSE"])
  print(f"{len(keys) - count:,} images in {output / 'train'}, {count:,} in {output / 'test'}")


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--packages", type=Path, required=True, help="the folder with the two files of npm pack")
  parser.add_argument("--output", type=Path, required=True, help="the folder to make")
  args = parser.parse_args()
  try:
    main(args.packages, args.output)
  except (ValueError, OSError) as error:
    sys.exit(str(error))
