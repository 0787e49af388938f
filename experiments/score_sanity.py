"""Which way every score moves: real images against others of them, and against noise, blurred ones, a few classes and copies.

pip install '.[mnist]'
python experiments/score_sanity.py [--data=digits,mnist] [--steps=600]

One half of the held-out images is the reference; the other half is judged as it is, and after it was spoilt. Features are those of the small
classifier, trained on the rest of the images, and pixels. Prints a table a data set and a space for docs/evaluation.md.
"""

import argparse

import numpy as np
from scipy.ndimage import gaussian_filter

from ddpm_jax import data, metrics
from ddpm_jax.metrics import evaluate

SCORES = ("frechet", "kernel", "class_score", "precision_recall", "density_coverage")


def sets(images, classes, rng):
  """The other half, as it is and spoilt, by name."""
  blurred = np.stack([gaussian_filter(image.astype(float), (0.8, 0.8, 0)) for image in images])
  few = np.resize(images[classes < 3], images.shape)
  copies = images.copy()
  copies[len(images) // 10 :] = images[rng.integers(0, len(images) // 10, len(images) - len(images) // 10)]
  return {
    "real": images,
    "noise": rng.integers(0, 256, images.shape, dtype=np.uint8),
    "blurred": np.rint(blurred).astype(np.uint8),
    "three classes of ten": few,
    "a tenth, repeated": copies,
  }


def run(source, steps, spaces=("classifier", "pixels"), held_out=600):
  """Scores of every set, by space and name."""
  train, rest = data.hold_out(source, held_out)
  seen, real = (data.read(of, np.arange(len(of))) for of in (train, rest))
  half = held_out // 2
  judged = sets(real["image"][half:], real["classes"][half:], np.random.default_rng(0))
  found = {}
  for name in spaces:
    space = metrics.pixel_space()
    if name == "classifier":
      params = metrics.train_classifier(seen["image"], seen["classes"], 10, steps=steps)
      space = metrics.classifier_space(params, 10)
    wanted = tuple(score for score in SCORES if name == "classifier" or score != "class_score")
    settings = evaluate.Settings(wanted, kernel_subsets=20, allow_singular=True)
    extract = metrics.extractor(space, 64)
    reference = evaluate.summarize(extract, [real["image"][:half]], half, settings)
    names = evaluate.score_names(space)
    found[name] = {
      title: evaluate.score(evaluate.summarize(extract, [images], half, settings), reference, settings, names)
      for title, images in judged.items()
    }
  return found


def table(rows):
  columns = [name for name in next(iter(rows.values())) if not name.endswith("_std")]
  lines = ["| | " + " | ".join(name.replace("_", " ") for name in columns) + " |", "| --- " * (len(columns) + 1) + "|"]
  lines += [f"| {title} | " + " | ".join(f"{row[name]:.3g}" for name in columns) + " |" for title, row in rows.items()]
  return "\n".join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data", default="digits,mnist", help="digits, mnist or both")
  parser.add_argument("--steps", type=int, default=600, help="of training the classifier")
  args = parser.parse_args()
  for name in args.data.split(","):
    for space, rows in run({"digits": data.read_digits, "mnist": data.read_mnist}[name](), args.steps).items():
      print(
        f"\n{name}, features of the {space}:\n\n{table(rows)}"
        if space != "pixels"
        else f"\n{name}, pixels:\n\n{table(rows)}"
      )


if __name__ == "__main__":
  main()
