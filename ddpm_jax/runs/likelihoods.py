"""Likelihoods of held-out images in bits per dimension: which, how certain, and kept as they are computed."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ddpm_jax
from ddpm_jax import data, likelihood, metrics
from ddpm_jax.config import Experiment
from ddpm_jax.devices.progress import print_line
from ddpm_jax.models.guided import NO_GUIDES
from ddpm_jax.models.inputs import inputs_from_data
from ddpm_jax.names import choose
from ddpm_jax.runs import generation, programs
from ddpm_jax.runs.model import Weights
from ddpm_jax.runs.reading import Run
from ddpm_jax.storage import images

_TITLES = {
  "bound": "variational bound, all steps",
  "ode": "probability-flow ODE",
  "continuous": "bound in continuous time",
}
# Exact traces cost a derivative a dimension.
_MOST_EXACT = 256


def check(experiment: Experiment, held_out: data.Source | None) -> None:
  """Raise a ValueError unless the likelihoods that the experiment asks for can be computed of its model and its images."""
  c, model = experiment.evaluation, experiment.model
  for name in c.likelihood:
    choose(name, _TITLES, "a likelihood (config.evaluation.likelihood)")
  choose(c.probe_noise, ("rademacher", "gaussian"), "config.evaluation.probe_noise")
  if not c.likelihood:
    return
  if held_out is None:
    raise ValueError(
      "Got config.evaluation.likelihood and no held-out images to take it of; set --config.data.source.eval_split or --config.data.hold_out."
    )
  if _count(experiment, held_out) < 2:
    raise ValueError(
      f"Got config.evaluation.likelihood of {_count(experiment, held_out)} held-out image(s); expected two or more, for an error bar."
    )
  if generation.low_res_name(experiment) is not None:
    raise ValueError(
      "Got config.evaluation.likelihood for a model that enlarges images, which has none here; leave it out."
    )
  if not model.codec.is_pixels:
    raise ValueError(
      f"Got config.evaluation.likelihood for a model of {model.shape} that encodes data of {model.data_shape} by a codec; expected a model of"
      " pixels, of whose values it is the likelihood."
    )
  if "bound" in c.likelihood:
    if model.process.num_steps is None:
      raise ValueError(
        "Got the likelihood 'bound' for a continuous process; expected ode or continuous, or a discrete process."
      )
    if c.bound_variance == "learned" and not model.prediction.learned_variance:
      raise ValueError(
        "Got config.evaluation.bound_variance='learned' for a model that learned no variance; expected 'small' or 'large'."
      )
  dimensions = int(np.prod(model.shape))
  if "ode" in c.likelihood and not c.probes and dimensions > _MOST_EXACT:
    raise ValueError(
      f"Got config.evaluation.probes=0, an exact trace, for images of {dimensions:,} dimensions; expected {_MOST_EXACT} at most, or 1 probe"
      " or more."
    )


def _count(experiment: Experiment, held_out: data.Source) -> int:
  return min(experiment.evaluation.likelihood_images or len(held_out), len(held_out))


def evaluate(run: Run, weights: Weights, seed: int) -> dict[str, dict[str, Any]]:
  """Return the likelihoods that the config asks for, by kind; none but in the first process.

  Image i's follows from the seed, its place and the weights alone. Those of a model with classes are given the class.
  """
  c, held_out = run.experiment.evaluation, run.held_out
  if not c.likelihood or held_out is None:
    return {}
  count = _count(run.experiment, held_out)
  size = min(c.batch_size, count) * run.mesh.size
  # Of the model itself, not of what steers it.
  experiment = run.experiment.replace(guidance="classifier_free", sampling__batch_size=size)
  chosen = data.read(held_out, np.random.default_rng(0).permutation(len(held_out))[:count])
  inputs: dict[str, np.ndarray] = {"x_0": images.as_floats(chosen["image"])}
  inputs |= inputs_from_data(experiment.model.conditions, chosen | {"image": inputs["x_0"]})
  settings = [c.bound_steps, c.probes, c.probe_noise, c.likelihood_tolerance, c.bound_variance]
  same = {
    "seed": seed,
    "settings": [*settings, experiment.tree.values["sampling"]["clip"]],
    "model": json.loads(json.dumps(experiment.tree.with_roles("model"))),
    # With their classes: these follow from the names of folders, which may change.
    "images": metrics.digest(*inputs.values()),
    "version": ddpm_jax.__version__,
  }

  def summary(kind: str) -> dict[str, Any] | None:
    function, width = _function(experiment, run.mesh, kind)

    def parts(done: int, notes: dict[str, Any]) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
      print_line(f"{_TITLES[kind]} of {count:,} held-out images by the {weights.name} weights ...")
      what = f"likelihood ({kind})"
      for values in generation.run_in_batches(
        experiment, function, weights.parameters, seed, count, inputs, start=done, what=what
      ):
        yield np.asarray(values), {}

    identity, path = {"weights": weights.sha256, "kind": kind, **same}, run.folder / "likelihood" / kind
    rows = generation.cached_rows(run.folder, path, identity, "rows", ((count, width), np.float32), parts)
    return None if rows is None else _summary(experiment, kind, rows.finish())

  found = {kind: summary(kind) for kind in c.likelihood}
  return {kind: one for kind, one in found.items() if one is not None}


def _function(experiment: Experiment, mesh: jax.sharding.Mesh, kind: str) -> tuple[Callable, int]:
  """Return `function(parameters, seed, first, inputs) -> [B, W]`, and W."""
  c, process = experiment.evaluation, experiment.model.process

  def bound(keys, denoise, inputs, parameters):
    limited = programs.clip_estimates(experiment, denoise)
    found = likelihood.variational_bound(
      keys, process, limited, inputs["x_0"], variance=c.bound_variance, num_evaluations=c.bound_steps or None
    )
    sums = jnp.stack([found.bits, found.prior, found.decoder], 1)
    return sums if c.bound_steps else jnp.concatenate([sums, found.terms], 1)

  def ode(keys, denoise, inputs, parameters):
    # Networks know backward derivatives alone on a CPU (`models.networks.from_linen`).
    options: dict[str, Any] = {"exact_trace": not c.probes, "probes": max(c.probes, 1), "probe_noise": c.probe_noise}
    options["reverse_mode"] = jax.default_backend() == "cpu"
    tolerance = c.likelihood_tolerance
    found = likelihood.ode_bits(keys, process, denoise, inputs["x_0"], rtol=tolerance, atol=tolerance, **options)
    return jnp.stack([found.bits, found.nfe.astype(jnp.float32)], 1)

  def continuous(keys, denoise, inputs, parameters):
    found = likelihood.continuous_bound(keys, process, denoise, inputs["x_0"])
    return jnp.stack([found.bits, found.prior, found.decoder], 1)

  steps = 0 if c.bound_steps else process.num_steps or 0
  functions = {"bound": (bound, 3 + steps), "ode": (ode, 2), "continuous": (continuous, 3)}
  draw, width = functions[kind]
  return programs.compile_sampler(experiment, mesh, NO_GUIDES, draw), width


def _summary(experiment: Experiment, kind: str, values: np.ndarray) -> dict[str, Any]:
  """Return the means over images and the standard error of the bits; of a bound also its `terms` [N]."""
  c, values = experiment.evaluation, values.astype(np.float64)
  lost = int(np.count_nonzero(~np.isfinite(values[:, 0])))
  if lost:
    raise FloatingPointError(
      f"The likelihood {kind!r} of {lost:,} of {len(values):,} images is not finite: the model is broken there, or the solver did not arrive"
      " (config.evaluation.likelihood_tolerance)."
    )
  found: dict[str, Any] = {
    "bits": float(values[:, 0].mean()),
    "standard_error": float(values[:, 0].std(ddof=1) / np.sqrt(len(values))),
    "num_images": len(values),
  }
  if kind == "ode":
    found |= {
      "nfe": float(values[:, 1].mean()),
      "most_nfe": int(values[:, 1].max()),
      "tolerance": c.likelihood_tolerance,
    }
    found["trace"] = f"{c.probes} {c.probe_noise} probe(s)" if c.probes else "exact"
    found["dequantization"] = "uniform"
  else:
    found |= {"prior": float(values[:, 1].mean()), "decoder": float(values[:, 2].mean())}
  if kind == "bound":
    found |= {"variance": c.bound_variance, "draws": c.bound_steps or "all"}
    if not c.bound_steps:
      found["terms"] = values[:, 3:].mean(0)
  return found


def table(likelihoods: dict[str, dict[str, Any]]) -> str:
  """Return a table of the likelihoods; an empty text if there are none."""
  lines = []
  for kind, found in likelihoods.items():
    calls = f", {found['nfe']:.0f} evaluations" if "nfe" in found else ""
    lines.append(
      f"{_TITLES[kind]:<30}{found['bits']:.4f} ± {found['standard_error']:.4f} bits per dimension of {found['num_images']:,} images{calls}"
    )
  return "\n" + "\n".join(lines) + "\n" if lines else ""
