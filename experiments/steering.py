"""How well samples follow what they are asked for: guidance by classes and by a classifier, and inpainting, judged by real digits.

python experiments/steering.py classes --data=digits --workdir=/tmp/digits_cond --output=/tmp/classes.png
python experiments/steering.py classifier --data=digits --workdir=/tmp/digits_vp --classifier=/tmp/digits_classifier --output=/tmp/classifier.png
python experiments/steering.py inpainting --data=digits --workdir=/tmp/digits_vp --output=/tmp/inpainting.png

Takes finished runs of `configs/` and draws from them by the command line, for several scales or methods. A k-nearest-neighbor
classifier (k = 3) of the real training digits, each set upright, tells what a sample shows; set upright, because of MNIST's digits as they
are it takes one held-out real one in eighteen for another. Precision and recall (k = 5, pixels) compare the samples with held-out real
ones. Prints a table, with what the same judge says of real digits, and draws it as a curve. Further flags go to
`python -m ddpm_jax.main`, such as --sampler=dpmpp_2m --num_steps=20.
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


def flat(x):
  return images.from_uint8(x).reshape(len(x), -1)


def upright(x):
  """The images without their slant, told from their second moments, at length 1 [N, D]."""
  rows, columns = np.mgrid[: x.shape[1], : x.shape[2]]

  def straighten(image):
    mass = image / max(image.sum(), 1e-9)
    center = np.array([(mass * rows).sum(), (mass * columns).sum()])
    spread, slant = (mass * (rows - center[0]) ** 2).sum(), (mass * (rows - center[0]) * (columns - center[1])).sum()
    matrix = np.array([[1, 0], [slant / max(spread, 1e-9), 1]])
    return affine_transform(image, matrix, center - matrix @ (np.array(image.shape) / 2), order=1)

  flat = np.stack([straighten(image.mean(-1)) for image in x.astype(float)]).reshape(len(x), -1)
  return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-9)


def command(folder, *flags):
  """A run's folder is only read: what is drawn goes beside it and is taken from there."""
  before = set(folder.rglob("*.npz"))
  call = [sys.executable, "-m", "ddpm_jax.main", f"--workdir={folder}", *flags]
  subprocess.run(call, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
  (path,) = set(folder.rglob("*.npz")) - before
  with np.load(path) as file:
    found = dict(file)
  for made in (path, path.with_suffix(".png")):
    made.unlink()
  return found


def follow(args, judge, held_out, flags):
  """Samples at each scale: the share that shows what was asked for, precision and recall."""
  rows = []
  for scale in args.scales or SCALES[args.what]:
    extra = [f"--classifier={args.classifier}"] if args.what == "classifier" else []
    drawn = command(
      args.workdir, "--mode=sample", f"--num_samples={args.count}", f"--guidance_scale={scale}", *extra, *flags
    )
    agreement = np.mean(judge.predict(upright(drawn["samples"])) == drawn["classes"])
    precision, recall = metrics.precision_recall(flat(drawn["samples"]), flat(held_out["image"][: args.count]))
    rows.append((f"scale {scale:g}", agreement, precision, recall))
    print(f"{rows[-1][0]:<14}{agreement:>10.3f}{precision:>11.3f}{recall:>9.3f}", flush=True)
  return rows


def inpaint(args, judge, held_out, flags):
  """The lower half of real held-out digits, painted anew: the share that still shows the same digit."""
  count, rows = min(args.count, len(held_out["image"])), []
  # Only those whose digit the judge can tell when it sees all of them.
  known = judge.predict(upright(held_out["image"])) == held_out["classes"]
  real, classes = held_out["image"][known][:count], held_out["classes"][known][:count]
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "real.npz"
    np.savez(path, images=real)
    for method in args.methods:
      flagged = ["--mode=edit", "--task=inpaint", "--mask=lower", f"--input={path}", f"--method={method}"]
      if args.classes:
        flagged.append(f"--classes={','.join(map(str, classes))}")
      drawn = command(args.workdir, *flagged, *flags)["output"][:, 0]
      agreement = np.mean(judge.predict(upright(drawn)) == classes)
      precision, recall = metrics.precision_recall(flat(drawn), flat(held_out["image"]))
      rows.append((method, agreement, precision, recall))
      print(f"{method:<14}{agreement:>10.3f}{precision:>11.3f}{recall:>9.3f}", flush=True)
  return rows


def draw(rows, floor, path, scales):
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
  columns = ("agrees with the class", "precision", "recall")
  for index, (name, color) in enumerate(zip(columns, ("tab:blue", "tab:green", "tab:orange"), strict=True), 1):
    values = [row[index] for row in rows]
    axis.plot(scales, values, marker="o", color=color, label=name)
    axis.axhline(floor[index], color=color, linestyle=":", linewidth=1)
  axis.set_xlabel("guidance scale")
  axis.set_ylim(0, 1.02)
  axis.set_title("500 samples (dotted: real digits)", fontsize=10)
  axis.legend(loc=(0.16, 0.08), fontsize=8)
  figure.savefig(path, dpi=110)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("what", choices=("classes", "classifier", "inpainting"))
  parser.add_argument("--data", choices=("digits", "mnist"), default="digits", help="the run's data")
  parser.add_argument("--workdir", type=Path, required=True, help="the run")
  parser.add_argument("--classifier", type=Path, help="the run of a classifier")
  parser.add_argument("--count", type=int, default=500, help="samples, or images")
  parser.add_argument("--scales", type=float, nargs="*", help="guidance scales")
  parser.add_argument("--methods", nargs="*", default=METHODS, help="of inpainting")
  parser.add_argument("--classes", action="store_true", help="tell the model what digit it inpaints")
  parser.add_argument("--neighbors", type=int, default=3, help="of the judge")
  parser.add_argument("--output", type=Path, help="where to draw the curve")
  args, flags = parser.parse_known_args()

  read = {"digits": data.read_digits, "mnist": data.read_mnist}[args.data]
  train, held = data.hold_out(read(), 500)
  real, held_out = (data.read(source, np.arange(len(source))) for source in (train, held))
  judge = KNeighborsClassifier(args.neighbors).fit(upright(real["image"]), real["classes"])
  print(f"{'':<14}{'agreement':>10}{'precision':>11}{'recall':>9}")
  own = np.mean(judge.predict(upright(held_out["image"])) == held_out["classes"])
  floor = ("real digits", own, *metrics.precision_recall(flat(real["image"][:500]), flat(held_out["image"])))
  print(f"{floor[0]:<14}{floor[1]:>10.3f}{floor[2]:>11.3f}{floor[3]:>9.3f}", flush=True)
  rows = (inpaint if args.what == "inpainting" else follow)(args, judge, held_out, flags)
  if args.output and args.what != "inpainting":
    draw(rows, floor, args.output, args.scales or SCALES[args.what])


if __name__ == "__main__":
  main()
