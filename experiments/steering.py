r"""Measure how well samples follow their conditions under guidance and inpainting.

python experiments/steering.py classes --data=digits --workdir=/tmp/digits_cond --output=/tmp/classes.png
python experiments/steering.py classifier --data=digits --workdir=/tmp/digits_vp \
  --classifier=/tmp/digits_classifier --output=/tmp/classifier.png
python experiments/steering.py inpainting --data=digits --workdir=/tmp/digits_vp

The script calls the command line to sample from the finished run of a recipe, with several guidance scales or
inpainting methods. A k-nearest-neighbor classifier (k = 3) on real training digits determines the digit in each sample.
The script removes the slant of all digits before it classifies them. Otherwise the classifier would be wrong on one in
eighteen held-out MNIST digits. Precision and recall (k = 5, pixels) compare the samples with held-out digits.

The script prints a table, with real digits as a reference. With --output, the script also plots the scores at each
guidance scale. The script passes flags that it does not know, such as --sampler=dpmpp_2m --num_steps=20, on to
`python -m ddpm_jax.main`.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy.ndimage import affine_transform
from sklearn.neighbors import KNeighborsClassifier

from ddpm_jax import data, metrics
from ddpm_jax.storage import images

ROOT = Path(__file__).parent.parent
SCALES = {"classes": (0.0, 1.0, 2.0, 3.0, 5.0, 8.0), "classifier": (0.0, 1.0, 2.0, 3.0, 5.0, 8.0)}
METHODS = ("replace", "repaint", "posterior", "dps")


def flatten(x):
  return images.from_uint8(x).reshape(len(x), -1)


def deslant(x):
  """Remove the slant of N images, and return them as vectors [N, D] of norm 1.

  D is the number of pixels. The second moments of an image determine its slant.
  """
  rows, columns = np.mgrid[: x.shape[1], : x.shape[2]]

  def shear(image):
    mass = image / max(image.sum(), 1e-9)
    center = np.array([(mass * rows).sum(), (mass * columns).sum()])
    spread, slant = (mass * (rows - center[0]) ** 2).sum(), (mass * (rows - center[0]) * (columns - center[1])).sum()
    matrix = np.array([[1, 0], [slant / max(spread, 1e-9), 1]])
    return affine_transform(image, matrix, center - matrix @ (np.array(image.shape) / 2), order=1)

  vectors = np.stack([shear(image.mean(-1)) for image in x.astype(float)]).reshape(len(x), -1)
  return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def run_command(folder, *flags):
  """Run a command on a run folder, and return the arrays that the command saves.

  The function deletes the files that the command writes.
  """
  before = set(folder.rglob("*.npz"))
  call = [sys.executable, "-m", "ddpm_jax.main", f"--workdir={folder}", *flags]
  subprocess.run(call, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
  (path,) = set(folder.rglob("*.npz")) - before
  with np.load(path) as file:
    arrays = dict(file)
  for output in (path, path.with_suffix(".png")):
    output.unlink()
  return arrays


def score_guidance(args, classifier, held_out, flags):
  """Return a row (name, class agreement, precision, recall) for each guidance scale.

  Class agreement is the share of samples in which the classifier recognizes the requested class.
  """
  rows = []
  for scale in args.scales or SCALES[args.experiment]:
    extra = [f"--classifier={args.classifier}"] if args.experiment == "classifier" else []
    generated = run_command(
      args.workdir, "--mode=sample", f"--num_samples={args.count}", f"--guidance_scale={scale}", *extra, *flags
    )
    agreement = np.mean(classifier.predict(deslant(generated["samples"])) == generated["classes"])
    precision, recall = metrics.precision_recall(
      flatten(generated["samples"]), flatten(held_out["image"][: args.count])
    )
    rows.append((f"scale {scale:g}", agreement, precision, recall))
    print(f"{rows[-1][0]:<14}{agreement:>10.3f}{precision:>11.3f}{recall:>9.3f}", flush=True)
  return rows


def score_inpainting(args, classifier, held_out, flags):
  """Return a row (method, class agreement, precision, recall) for each inpainting method.

  Each method inpaints the lower half of held-out digits. Class agreement is the share of inpainted digits in which the
  classifier recognizes the class of the real digit.
  """
  count, rows = min(args.count, len(held_out["image"])), []
  # Use only digits that the classifier recognizes before inpainting.
  is_correct = classifier.predict(deslant(held_out["image"])) == held_out["classes"]
  real, classes = held_out["image"][is_correct][:count], held_out["classes"][is_correct][:count]
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "real.npz"
    np.savez(path, images=real)
    for method in args.methods:
      options = ["--mode=edit", "--task=inpaint", "--mask=lower", f"--input={path}", f"--method={method}"]
      if args.classes:
        options.append(f"--classes={','.join(map(str, classes))}")
      edited = run_command(args.workdir, *options, *flags)["output"][:, 0]
      agreement = np.mean(classifier.predict(deslant(edited)) == classes)
      precision, recall = metrics.precision_recall(flatten(edited), flatten(held_out["image"]))
      rows.append((method, agreement, precision, recall))
      print(f"{method:<14}{agreement:>10.3f}{precision:>11.3f}{recall:>9.3f}", flush=True)
  return rows


def plot_scores(rows, reference, path, scales):
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
  columns = ("class agreement", "precision", "recall")
  for index, (name, color) in enumerate(zip(columns, ("tab:blue", "tab:green", "tab:orange"), strict=True), 1):
    values = [row[index] for row in rows]
    axis.plot(scales, values, marker="o", color=color, label=name)
    axis.axhline(reference[index], color=color, linestyle=":", linewidth=1)
  axis.set_xlabel("guidance scale")
  axis.set_ylim(0, 1.02)
  axis.set_title("500 samples (dotted: real digits)", fontsize=10)
  axis.legend(loc=(0.16, 0.08), fontsize=8)
  figure.savefig(path, dpi=110)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("experiment", choices=("classes", "classifier", "inpainting"))
  parser.add_argument("--data", choices=("digits", "mnist"), default="digits", help="the data set of the run")
  parser.add_argument("--workdir", type=Path, required=True, help="the folder of the run")
  parser.add_argument("--classifier", type=Path, help="the folder of the classifier's run")
  parser.add_argument("--count", type=int, default=500, help="number of samples or edited images")
  parser.add_argument("--scales", type=float, nargs="*", help="guidance scales; default: 0 1 2 3 5 8")
  parser.add_argument("--methods", nargs="*", default=METHODS, help="inpainting methods")
  parser.add_argument("--classes", action="store_true", help="condition the model on the digit to inpaint")
  parser.add_argument("--neighbors", type=int, default=3, help="neighbors of the classifier")
  parser.add_argument("--output", type=Path, help="file for the plot of guidance scores")
  args, flags = parser.parse_known_args()

  read = {"digits": data.read_digits, "mnist": data.read_mnist}[args.data]
  real, held_out = (data.read(source, np.arange(len(source))) for source in data.hold_out(read(), 500))
  classifier = KNeighborsClassifier(args.neighbors).fit(deslant(real["image"]), real["classes"])
  print(f"{'':<14}{'agreement':>10}{'precision':>11}{'recall':>9}")
  accuracy = np.mean(classifier.predict(deslant(held_out["image"])) == held_out["classes"])
  scores = metrics.precision_recall(flatten(real["image"][:500]), flatten(held_out["image"]))
  reference = ("real digits", accuracy, *scores)
  print(f"{reference[0]:<14}{reference[1]:>10.3f}{reference[2]:>11.3f}{reference[3]:>9.3f}", flush=True)
  score = score_inpainting if args.experiment == "inpainting" else score_guidance
  rows = score(args, classifier, held_out, flags)
  if args.output and args.experiment != "inpainting":
    plot_scores(rows, reference, args.output, args.scales or SCALES[args.experiment])


if __name__ == "__main__":
  main()
