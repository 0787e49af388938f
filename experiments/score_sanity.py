"""Compare scores of real images with scores of noise, blurred images, and sets that lack classes or repeat images.

pip install '.[mnist]'
python experiments/score_sanity.py [--data=digits,mnist] [--steps=600]

One half of the held-out images is the reference. The script scores the other half and degraded versions of it. It uses
two feature spaces: the pixels, and the features of a small classifier that it trains on the images that are not held
out. For each data set and feature space, it prints a table for docs/evaluation.md.
"""

import argparse

import numpy as np
from scipy.ndimage import gaussian_filter

from ddpm_jax import data, metrics
from ddpm_jax.metrics import evaluate

SCORES = ("frechet", "kernel", "class_score", "precision_recall", "density_coverage")


def degraded(images, classes, rng):
  """Return a dict that maps names to image sets: the real images and degraded versions of them."""
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
  """Return the scores as `{feature space: {image set: {score: value}}}`."""
  train, test = (data.read(part, np.arange(len(part))) for part in data.hold_out(source, held_out))
  half = held_out // 2
  image_sets = degraded(test["image"][half:], test["classes"][half:], np.random.default_rng(0))
  scores = {}
  for name in spaces:
    space = metrics.pixel_space()
    if name == "classifier":
      params = metrics.train_classifier(train["image"], train["classes"], 10, steps=steps)
      space = metrics.classifier_space(params, 10)
    enabled = tuple(score for score in SCORES if name == "classifier" or score != "class_score")
    settings = evaluate.Settings(enabled, kernel_subsets=20, allow_singular=True)
    extract = metrics.extractor(space, 64)
    reference = evaluate.summarize(extract, [test["image"][:half]], half, settings)
    names = evaluate.score_names(space)
    scores[name] = {
      title: evaluate.score(evaluate.summarize(extract, [images], half, settings), reference, settings, names)
      for title, images in image_sets.items()
    }
  return scores


def table(rows):
  columns = [name for name in next(iter(rows.values())) if not name.endswith("_std")]
  lines = ["| | " + " | ".join(name.replace("_", " ") for name in columns) + " |", "| --- " * (len(columns) + 1) + "|"]
  lines += [f"| {title} | " + " | ".join(f"{row[name]:.3g}" for name in columns) + " |" for title, row in rows.items()]
  return "\n".join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data", default="digits,mnist", help="digits, mnist, or both, separated by a comma")
  parser.add_argument("--steps", type=int, default=600, help="training steps of the classifier")
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
