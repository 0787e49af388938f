"""Plot samples of a text model below the real images of the same captions.

python experiments/captions.py --workdir=/tmp/emoji_text --output=/tmp/captions.png

Half of the captions come from the training data, and half from the held-out data, which training has not seen. The
captions are chosen at random with --seed, not by hand. Unknown flags, such as --guidance_scale=3, are passed on to
`python -m ddpm_jax.main --mode=sample`.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from ddpm_jax import data
from ddpm_jax.runs.model import load_experiment
from ddpm_jax.runs.reading import read_data

TITLES = ("captions of the training data", "held-out captions")


def choose(source, count, rng):
  """Return random images and their captions from a source, with no caption twice."""
  items = data.read(source, rng.permutation(len(source))[: 4 * count])
  _, first = np.unique(items["text"], return_index=True)
  chosen = np.sort(first)[:count]
  return items["image"][chosen], items["text"][chosen]


def sample(folder, texts, flags):
  """Run `--mode=sample`, and return one sample for each text."""
  with tempfile.TemporaryDirectory() as name:
    prompts = Path(name) / "prompts.txt"
    prompts.write_text("\n".join(texts) + "\n", encoding="utf-8")
    before = set(folder.rglob("*.npz"))
    call = [sys.executable, "-m", "ddpm_jax.main", "--mode=sample", f"--workdir={folder}", f"--prompts={prompts}"]
    subprocess.run([*call, *flags], check=True)
  (path,) = set(folder.rglob("*.npz")) - before
  with np.load(path) as arrays:
    return arrays["samples"]


def draw(groups, samples, path, columns=8):
  """Plot each real image above the sample of its caption, with a title above each group."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  rows = -(-len(groups[0][0]) // columns)
  figure = plt.figure(figsize=(1.35 * columns, 3.6 * rows * len(groups)), layout="constrained")
  for panel, title, (images, texts), drawn in zip(
    figure.subfigures(len(groups)), TITLES, groups, np.split(samples, len(groups)), strict=True
  ):
    panel.suptitle(f"{title}: the real image above, the sample below")
    axes = panel.subplots(2 * rows, columns, squeeze=False)
    for axis in axes.flat:
      axis.axis("off")
    for i in range(len(images)):
      row, column = 2 * (i // columns), i % columns
      for axis, image in ((axes[row, column], images[i]), (axes[row + 1, column], drawn[i])):
        axis.imshow(image.squeeze(), cmap="gray")
      words = str(texts[i])
      axes[row, column].set_title(words if len(words) < 20 else f"{words[:18]}...", fontsize=7)
  figure.savefig(path, dpi=100)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", type=Path, required=True, help="the folder of a run with the condition text")
  parser.add_argument("--output", type=Path, required=True, help="the picture")
  parser.add_argument("--count", type=int, default=16, help="the number of captions of each kind")
  parser.add_argument("--seed", type=int, default=0, help="chooses the captions")
  args, flags = parser.parse_known_args()
  splits = read_data(load_experiment(None, args.workdir))
  if splits.held_out is None:
    parser.error(f"Got --workdir={args.workdir}, a run without held-out data; expected a run with held-out data.")
  rng = np.random.default_rng(args.seed)
  count = min(args.count, len(splits.held_out))
  groups = [choose(source, count, rng) for source in (splits.train, splits.held_out)]
  samples = sample(args.workdir, [*groups[0][1], *groups[1][1]], flags)
  draw(groups, samples, args.output)


if __name__ == "__main__":
  main()
