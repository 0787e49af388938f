"""What report.html shows of a run, gathered from its folder and its model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import data, metrics
from ddpm_jax import report as page
from ddpm_jax.config import Experiment
from ddpm_jax.metrics import evaluate
from ddpm_jax.models.guided import Parameters
from ddpm_jax.runs import drawing, programs, reading
from ddpm_jax.storage import images, records

# Samples whose way from noise to data is shown, and frames of it.
SHOWN = 8
_FRAMES = 40
# Samples whose nearest training images are looked for, and how many of these; the page shows the closest.
_COMPARED, _NEAREST = 200, 3
# Training images to look among, and held-out ones to say what distance is usual.
_SEARCHED, _USUAL = 50_000, 500
_READ = 512
_CURVE = 400


class Denoising(NamedTuple):
  """A few samples on their way: uint8 [frames, K, H, W, C], and the times of the frames."""

  states: np.ndarray
  times: np.ndarray


def denoising(
  experiment: Experiment, mesh: jax.sharding.Mesh, parameters: Parameters, inputs: drawing.Inputs, seed: int
) -> Denoising:
  """Return how the first samples of a seed come about by the sampler of previews."""
  experiment = drawing.batches_of(experiment, -(-SHOWN // mesh.size) * mesh.size)
  function, times = programs.denoising(experiment, mesh, _FRAMES)
  parts = [np.asarray(x) for x in drawing.in_batches(experiment, function, parameters, seed, SHOWN, inputs)]
  frames = np.moveaxis(np.concatenate(parts), 1, 0)
  return Denoising(images.to_uint8(frames), times)


def neighbours(
  extract: evaluate.Extract, samples: np.ndarray, source: data.Source, held_out: data.Source | None
) -> page.Neighbours | None:
  """Return some samples beside their nearest training images in a feature space; None without held-out images to compare."""
  if held_out is None or len(source) < _NEAREST:
    return None
  searched = np.sort(np.random.default_rng(0).permutation(len(source))[:_SEARCHED])
  usual = np.random.default_rng(0).permutation(len(held_out))[:_USUAL]

  def features() -> Iterator[np.ndarray]:
    for first in range(0, len(searched), _READ):
      yield extract(reading.read_images(source, searched[first : first + _READ]))["features"]

  chosen = samples[:_COMPARED]
  queries = extract(np.concatenate([chosen, reading.read_images(held_out, usual)]))["features"]
  numbers, distances = metrics.nearest(queries, features(), _NEAREST)
  found = reading.read_images(source, searched[numbers[: len(chosen)].ravel()])
  return page.Neighbours(
    chosen,
    found.reshape(*numbers[: len(chosen)].shape, *found.shape[1:]),
    distances[: len(chosen)],
    distances[len(chosen) :, 0],
  )


def content(
  experiment: Experiment,
  folder: Path,
  report: dict[str, Any],
  samples: np.ndarray,
  labels: np.ndarray | None,
  way: Denoising,
  bound_terms: np.ndarray | None,
  nearest: page.Neighbours | None,
) -> page.Content:
  """Return all that the page shows."""
  process, tree = experiment.model.process, experiment.tree
  t = np.linspace(process.t_min, process.t_max, _CURVE)
  schedule = {"t": t} | {
    name: np.asarray(getattr(process, name)(jnp.asarray(t, jnp.float32))) for name in ("alpha", "sigma", "log_snr")
  }
  facts = [
    ("run", str(folder)),
    (
      "data",
      f"{_source(experiment)}, {'x'.join(map(str, experiment.model.data_shape))}",
    ),
    *_parts(experiment),
    ("weights", f"{report['weights']}, step {report['step']:,}"),
    ("sampler", f"{report['sampling']['sampler']}, {report['sampling']['nfe']:,} network evaluations"),
    ("samples", f"{report['num_samples']:,}"),
  ]
  return page.Content(
    title=folder.name,
    facts=facts,
    evaluation=report,
    config=json.loads(json.dumps(tree.values)),
    samples=samples,
    labels=labels,
    denoising=way.states,
    denoising_times=way.times,
    metrics=records.read(folder / "metrics.jsonl"),
    schedule=schedule,
    neighbours=nearest,
    bound_terms=bound_terms,
  )


def write(folder: Path, shown: page.Content) -> Path:
  """Write report.html into the run's folder."""
  path = folder / "report.html"
  page.write(path, shown)
  return path


def _source(experiment: Experiment) -> str:
  source = experiment.tree.values["data"]["source"]
  name = experiment.tree.short_name("data.source")
  return source["name"] if name == "tfds" else name


def _parts(experiment: Experiment) -> list[tuple[str, str]]:
  """Return the names of the process and the prediction, of a model that is made of parts."""
  parts = experiment.tree.values["model"]
  return [(name, experiment.tree.short_name(f"model.{name}")) for name in ("process", "prediction") if name in parts]
