"""Compute likelihoods of held-out images in bits per dimension, with standard errors.

Results are saved as they are computed, so an interrupted evaluation resumes.
"""

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
  "bound": "variational bound",
  "ode": "probability-flow ODE",
  "continuous": "bound in continuous time",
}
# An exact trace takes one derivative per dimension.
_MAX_EXACT_DIMENSIONS = 256


def check(experiment: Experiment, held_out: data.Source | None) -> None:
  """Raise a ValueError if a likelihood in the config cannot be computed for the model and the held-out images."""
  c, model = experiment.evaluation, experiment.model
  for name in c.likelihood:
    choose(name, _TITLES, "a likelihood (config.evaluation.likelihood)")
  choose(c.probe_noise, ("rademacher", "gaussian"), "config.evaluation.probe_noise")
  if not c.likelihood:
    return
  if held_out is None:
    raise ValueError(
      "Got config.evaluation.likelihood but no held-out images; expected held-out images. Set --config.data.source.eval_split or"
      " --config.data.hold_out."
    )
  if _count(experiment, held_out) < 2:
    raise ValueError(
      f"Got config.evaluation.likelihood for {_count(experiment, held_out)} held-out image(s); expected 2 or more, to compute a standard"
      " error. Raise --config.evaluation.likelihood_images or hold out more images."
    )
  if generation.low_res_name(experiment) is not None:
    raise ValueError(
      "Got config.evaluation.likelihood for a super-resolution model; expected no likelihood, because none is implemented for"
      " super-resolution. Leave it out."
    )
  if not model.codec.is_pixels:
    raise ValueError(
      f"Got config.evaluation.likelihood for a model with a codec, which encodes data of shape {model.data_shape} as {model.shape}; expected a"
      " model of pixels. Leave the likelihood out."
    )
  if "bound" in c.likelihood:
    if model.process.num_steps is None:
      raise ValueError(
        "Got config.evaluation.likelihood='bound' for a continuous process; expected a discrete process, or the likelihood 'ode' or 'continuous'."
      )
    if c.bound_variance == "learned" and not model.prediction.learned_variance:
      raise ValueError(
        "Got config.evaluation.bound_variance='learned' for a model without a learned variance; expected 'small' or 'large'."
      )
  dimensions = int(np.prod(model.shape))
  if "ode" in c.likelihood and not c.probes and dimensions > _MAX_EXACT_DIMENSIONS:
    raise ValueError(
      f"Got config.evaluation.probes=0 for images with {dimensions:,} dimensions; expected at most {_MAX_EXACT_DIMENSIONS} dimensions for the"
      " exact trace. Set --config.evaluation.probes to 1 or more."
    )


def _count(experiment: Experiment, held_out: data.Source) -> int:
  return min(experiment.evaluation.likelihood_images or len(held_out), len(held_out))


def evaluate(run: Run, weights: Weights, seed: int) -> dict[str, dict[str, Any]]:
  """Compute the likelihoods that the config lists.

  The likelihood of image i depends only on the weights, the seed, the image and i. If the model has conditions, their
  values for each image come from the data.

  Returns:
    A dict from each kind of likelihood, such as "ode", to its results (see `_summary`). The dict is empty in all
    processes except the main process.

  Raises:
    FloatingPointError: if a likelihood is not finite.
  """
  c, held_out = run.experiment.evaluation, run.held_out
  if not c.likelihood or held_out is None:
    return {}
  count = _count(run.experiment, held_out)
  size = min(c.batch_size, count) * run.mesh.size
  # Guidance has no likelihood: evaluate the model itself.
  experiment = run.experiment.replace(guidance="classifier_free", sampling__batch_size=size)
  chosen = data.read(held_out, np.random.default_rng(0).permutation(len(held_out))[:count])
  inputs: dict[str, np.ndarray] = {"x_0": images.as_floats(chosen["image"])}
  inputs |= inputs_from_data(experiment.model.conditions, chosen | {"image": inputs["x_0"]})
  settings = [c.bound_steps, c.probes, c.probe_noise, c.likelihood_tolerance, c.bound_variance]
  shared_identity = {
    "seed": seed,
    "settings": [*settings, experiment.tree.values["sampling"]["clip"]],
    "model": json.loads(json.dumps(experiment.tree.with_roles("model"))),
    # The digest covers the classes too. Class numbers depend on folder names, and these may change.
    "images": metrics.digest(*inputs.values()),
    "version": ddpm_jax.__version__,
  }

  def summarize(kind: str) -> dict[str, Any] | None:
    function, width = _function(experiment, run.mesh, kind)

    def compute(done: int, notes: dict[str, Any]) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
      print_line(
        f"computing the likelihood ({_TITLES[kind]}) of {count:,} held-out images with the {weights.name} weights ..."
      )
      activity = f"likelihood ({kind})"
      for values in generation.run_in_batches(
        experiment, function, weights.parameters, seed, count, inputs, start=done, activity=activity
      ):
        yield np.asarray(values), {}

    identity, path = {"weights": weights.sha256, "kind": kind, **shared_identity}, run.folder / "likelihood" / kind
    rows = generation.cached_rows(run.folder, path, identity, "rows", ((count, width), np.float32), compute)
    return None if rows is None else _summary(experiment, kind, rows.finish())

  summaries = {kind: summarize(kind) for kind in c.likelihood}
  return {kind: summary for kind, summary in summaries.items() if summary is not None}


def _function(experiment: Experiment, mesh: jax.sharding.Mesh, kind: str) -> tuple[Callable, int]:
  """Compile `compute(parameters, seed, first, inputs) -> values [B, width]`, and return it with the width.

  The first value of each image is its likelihood in bits per dimension. The other values depend on `kind`.
  """
  c, process = experiment.evaluation, experiment.model.process

  def bound(keys, denoise, inputs, coder):
    clipped = programs.clip_estimates(experiment, denoise)
    result = likelihood.variational_bound(
      keys, process, clipped, inputs["x_0"], variance=c.bound_variance, num_evaluations=c.bound_steps or None
    )
    sums = jnp.stack([result.bits, result.prior, result.decoder], 1)
    return sums if c.bound_steps else jnp.concatenate([sums, result.terms], 1)

  def ode(keys, denoise, inputs, coder):
    # On a CPU, networks support reverse-mode derivatives only (`models.networks.from_linen`).
    options: dict[str, Any] = {"exact_trace": not c.probes, "probes": max(c.probes, 1), "probe_noise": c.probe_noise}
    options["reverse_mode"] = jax.default_backend() == "cpu"
    tolerance = c.likelihood_tolerance
    result = likelihood.ode_bits(keys, process, denoise, inputs["x_0"], rtol=tolerance, atol=tolerance, **options)
    return jnp.stack([result.bits, result.nfe.astype(jnp.float32)], 1)

  def continuous(keys, denoise, inputs, coder):
    result = likelihood.continuous_bound(keys, process, denoise, inputs["x_0"])
    return jnp.stack([result.bits, result.prior, result.decoder], 1)

  num_terms = 0 if c.bound_steps else process.num_steps or 0
  functions = {"bound": (bound, 3 + num_terms), "ode": (ode, 2), "continuous": (continuous, 3)}
  function, width = functions[kind]
  return programs.compile_sampler(experiment, mesh, NO_GUIDES, function, is_adaptive=kind == "ode"), width


def _summary(experiment: Experiment, kind: str, values: np.ndarray) -> dict[str, Any]:
  """Return a dict with the mean likelihood in bits, its standard error, and values that depend on `kind`.

  For a bound over all N steps, the dict also has `terms` [N], the mean of each step's term over images.
  """
  c, values = experiment.evaluation, values.astype(np.float64)
  bad = int(np.count_nonzero(~np.isfinite(values[:, 0])))
  if bad:
    raise FloatingPointError(
      f"Got a likelihood {kind!r} that is not finite for {bad:,} of {len(values):,} images; expected finite values. Either the model's output is"
      " broken, or the ODE solver did not reach the end: raise --config.evaluation.likelihood_tolerance."
    )
  summary: dict[str, Any] = {
    "bits": float(values[:, 0].mean()),
    "standard_error": float(values[:, 0].std(ddof=1) / np.sqrt(len(values))),
    "num_images": len(values),
  }
  if kind == "ode":
    summary |= {
      "nfe": float(values[:, 1].mean()),
      "max_nfe": int(values[:, 1].max()),
      "tolerance": c.likelihood_tolerance,
    }
    summary["trace"] = f"{c.probes} {c.probe_noise} probe(s)" if c.probes else "exact"
    summary["dequantization"] = "uniform"
  else:
    summary |= {"prior": float(values[:, 1].mean()), "decoder": float(values[:, 2].mean())}
  if kind == "bound":
    summary |= {"variance": c.bound_variance, "steps": c.bound_steps or "all"}
    if not c.bound_steps:
      summary["terms"] = values[:, 3:].mean(0)
  return summary


def table(likelihoods: dict[str, dict[str, Any]]) -> str:
  """Return a table of the likelihoods, or an empty string if there are none."""
  lines = []
  for kind, summary in likelihoods.items():
    nfe = f", {summary['nfe']:.0f} evaluations each" if "nfe" in summary else ""
    lines.append(
      f"{_TITLES[kind]:<30}{summary['bits']:.4f} ± {summary['standard_error']:.4f} bits per dimension, {summary['num_images']:,} images{nfe}"
    )
  return "\n" + "\n".join(lines) + "\n" if lines else ""
