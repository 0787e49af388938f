"""What report.html shows of a run, gathered from its folder and its model."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import data, metrics
from ddpm_jax import report as page
from ddpm_jax.config import Experiment
from ddpm_jax.metrics import evaluate
from ddpm_jax.models.guided import Parameters
from ddpm_jax.runs import generation, programs
from ddpm_jax.runs.reading import Run
from ddpm_jax.storage import images, records

# Samples whose way from noise to data is shown, and frames of it.
SHOWN = 8
_FRAMES = 40
# Samples whose nearest training images are looked for, and how many of these; the page shows the closest.
_COMPARED, _NEAREST = 200, 3
# Training images to look among, and held-out ones to say what distance is usual.
_SEARCHED, _USUAL = 50_000, 500
_CURVE = 400


def denoising(
  experiment: Experiment, mesh: jax.sharding.Mesh, parameters: Parameters, inputs: generation.Inputs, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Return how the first samples of a seed come about by the sampler of previews: uint8 [frames, K, H, W, C], and the times of the frames."""
  experiment = programs.for_previews(experiment, mesh, SHOWN)
  function, times = programs.denoising_frames(experiment, mesh, _FRAMES)
  parts = [np.asarray(x) for x in generation.run_in_batches(experiment, function, parameters, seed, SHOWN, inputs)]
  return images.to_uint8(np.moveaxis(np.concatenate(parts), 1, 0)), times


def neighbors(
  extract: evaluate.Extract, samples: np.ndarray, source: data.Source, held_out: data.Source | None
) -> page.Neighbors | None:
  """Return some samples beside their nearest training images in a feature space; None without held-out images to compare."""
  if held_out is None or len(source) < _NEAREST:
    return None
  searched = np.sort(np.random.default_rng(0).permutation(len(source))[:_SEARCHED])
  usual = np.random.default_rng(0).permutation(len(held_out))[:_USUAL]
  chosen = samples[:_COMPARED]
  count = len(chosen)
  queries = extract(np.concatenate([chosen, data.read_images(held_out, usual)]))["features"]
  features = (extract(part)["features"] for part in data.image_chunks(source, searched))
  numbers, distances = metrics.nearest(queries, features, _NEAREST)
  found = data.read_images(source, searched[numbers[:count].ravel()])
  nearest = found.reshape(*numbers[:count].shape, *found.shape[1:])
  return page.Neighbors(chosen, nearest, distances[:count], distances[count:, 0])


def content(
  run: Run,
  report: dict[str, Any],
  samples: np.ndarray,
  classes: np.ndarray | None,
  way: tuple[np.ndarray, np.ndarray],
  bound_terms: np.ndarray | None,
  nearest: page.Neighbors | None,
) -> page.Content:
  """Return all that the page shows."""
  process, tree, shape = run.experiment.model.process, run.experiment.tree, run.experiment.model.data_shape
  t = np.linspace(process.t_min, process.t_max, _CURVE)
  curves = {name: getattr(process, name)(jnp.asarray(t, jnp.float32)) for name in ("alpha", "sigma", "log_snr")}
  source = tree.short_name("data.source")
  source = tree.values["data"]["source"]["name"] if source == "tfds" else source
  # Of a model that is made of parts.
  parts = [name for name in ("process", "prediction") if name in tree.values["model"]]
  facts = [
    ("run", str(run.folder)),
    ("data", f"{source}, {'x'.join(map(str, shape))}"),
    *((name, tree.short_name(f"model.{name}")) for name in parts),
    ("weights", f"{report['weights']}, step {report['step']:,}"),
    ("sampler", f"{report['sampling']['sampler']}, {report['sampling']['nfe']:,} network evaluations"),
    ("samples", f"{report['num_samples']:,}"),
  ]
  return page.Content(
    title=run.folder.name,
    facts=facts,
    evaluation=report,
    config=json.loads(json.dumps(tree.values)),
    samples=samples,
    classes=classes,
    denoising=way[0],
    denoising_times=way[1],
    metrics=records.read(run.folder / "metrics.jsonl"),
    schedule={"t": t} | {name: np.asarray(curve) for name, curve in curves.items()},
    neighbors=nearest,
    bound_terms=bound_terms,
  )
