"""Build the content of a report on real digits, with every section."""

import numpy as np
from sklearn.datasets import load_digits

from ddpm_jax import report


def digits():
  """Return scikit-learn's digits as uint8 [N, 8, 8, 1], and their classes [N]."""
  data = load_digits()
  return np.rint(data.images / 16 * 255).astype(np.uint8)[..., None], data.target


def scores(distance):
  constant = {"precision": 0.97, "recall": 0.9, "density": 1.01, "coverage": 0.93, "odd_score": 4.0}
  return {"frechet_distance": distance, "kid": 0.0031, "kid_std": 0.0011, **constant}


def evaluation():
  curve = [
    {"sampler": sampler, "num_steps": steps, "nfe": steps * calls, "scores": scores(0.7 + 10 / steps)}
    for sampler, calls in (("ddim", 1), ("heun", 2))
    for steps in (5, 20, 100)
  ]
  bound = {"bits": 3.104, "standard_error": 0.021, "prior": 0.0004, "decoder": 0.212, "num_images": 500}
  return {
    "scores": {"generated": scores(0.73), "floor": scores(0.454)},
    "features": "classifier",
    "features_provenance": {"path": "/data/classifier", "sha256": "9f86d0"},
    "num_samples": 500,
    "floor_num": 480,
    "reference": "held-out digits",
    "curve": curve,
    "likelihood": {"bound": bound, "ode": {"bits": 2.98, "standard_error": 0.018, "nfe": 122, "num_images": 500}},
    "step": 3000,
    "weights": "EMA",
    "sampling": {"sampler": "ancestral", "arguments": {"variance": "large"}, "num_steps": 100},
    "versions": {"jax": "0.10.2"},
    "devices": 1,
  }


def metrics(count=120):
  rng = np.random.default_rng(0)
  lines = []
  for step in range(10, 10 * count + 1, 10):
    loss = (0.25 + np.exp(-step / 150)) * (1 + 0.05 * rng.normal())
    levels = {"above_5": 1.9, "-5_to_0": 0.8, "below_-5": 0.5, "0_to_5": 1.0}
    by_level = {f"loss_by_log_snr/{name}": loss * share for name, share in levels.items()}
    lines.append(
      {"step": step, "loss": loss, "grad_norm": loss / 2, "learning_rate": 1e-3, "images_per_second": 330.0} | by_level
    )
  return [*lines, {"step": 10 * count, "eval/frechet_distance": 0.73}]


def schedule():
  t = np.linspace(0, 1, 101)
  alpha = np.cos(t * np.pi / 2)
  sigma = np.sin(t * np.pi / 2)
  with np.errstate(divide="ignore"):
    return {"t": t, "alpha": alpha, "sigma": sigma, "log_snr": 2 * (np.log(alpha) - np.log(sigma))}


def neighbors(copied=1):
  """Return a `report.Neighbors` with 8 digits as samples and 3 other digits as the neighbors of each sample.

  For the first `copied` samples, the nearest neighbor is a copy of the sample.
  """
  images, _ = digits()
  distances = np.sort(np.random.default_rng(0).uniform(1.6, 3, (8, 3)), axis=1)
  distances[:copied, 0] = 0.1
  nearest = images[100:124].reshape(8, 3, 8, 8, 1).copy()
  nearest[:copied, 0] = images[:copied]
  return report.Neighbors(images[:8], nearest, distances, np.full(50, 2.0))


def denoising(frames=9, count=6):
  images, _ = digits()
  rng = np.random.default_rng(0)
  clean, noise = images[:count].astype(float), rng.uniform(0, 255, (count, 8, 8, 1))
  times = np.linspace(1, 0, frames)
  return np.stack([np.rint(t * noise + (1 - t) * clean).astype(np.uint8) for t in times]), times


def content(**changes):
  """Return content for every section of a report, with `changes` in some fields."""
  images, classes = digits()
  frames, times = denoising()
  source = {"component": "data.folder", "path": "/data/digits"}
  network = {"component": "networks.UNet", "multipliers": [1, 2, 2]}
  full = report.Content(
    title="digits_vp, step 3,000",
    facts=[("model", "discrete DDPM"), ("step", "3,000"), ("Fréchet distance", "0.730")],
    evaluation=evaluation(),
    config={"seed": 0, "data": {"source": source}, "model": {"network": network}, "sampler": None},
    samples=images[:500],
    classes=classes[:500],
    denoising=frames,
    denoising_times=times,
    metrics=metrics(),
    schedule=schedule(),
    neighbors=neighbors(),
    bound_terms=0.8 * np.arange(1, 101) ** -1.4,
  )
  return full._replace(**changes)


def bare():
  """Return the minimal content of a report."""
  return report.Content("bare", [], {}, {}, np.zeros((0, 8, 8, 1), np.uint8))
