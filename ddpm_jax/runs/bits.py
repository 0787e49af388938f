"""Likelihoods of held-out images in bits per dimension: which, how certain, and kept as they are computed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import ddpm_jax
from ddpm_jax import build, data, images, likelihood, metrics, parallel, rows, workdir
from ddpm_jax.runs import drawing
from ddpm_jax.runs.model import Weights, say
from ddpm_jax.schema import choose

KINDS = ("bound", "ode", "continuous")
_TITLES = {
  "bound": "variational bound, all steps",
  "ode": "probability-flow ODE",
  "continuous": "bound in continuous time",
}
# Exact traces cost a derivative a dimension.
_MOST_EXACT = 256


def check(config: ConfigDict, held_out: data.Source | None) -> None:
  """Raises a ValueError unless the likelihoods that the config asks for can be computed of its model and its images."""
  c = config.evaluation
  for name in c.likelihood:
    choose(name, KINDS, "a likelihood (config.evaluation.likelihood)")
  choose(c.probe_noise, ("rademacher", "gaussian"), "config.evaluation.probe_noise")
  if not c.likelihood:
    return
  if held_out is None:
    raise ValueError(
      "Got config.evaluation.likelihood and no held-out images to take it of; set --config.data.eval_split or --config.data.hold_out."
    )
  if _count(config, held_out) < 2:
    raise ValueError(
      f"Got config.evaluation.likelihood of {_count(config, held_out)} held-out image(s); wanted two or more, for an error bar."
    )
  if config.superres.factor:
    raise ValueError(
      "Got config.evaluation.likelihood for a model that enlarges images, which has none here; leave it out."
    )
  if "bound" in c.likelihood and build.build_process(config).num_steps is None:
    raise ValueError(
      f"Got the likelihood 'bound' for the continuous process {config.process.name!r}; wanted ode or continuous, or a discrete process."
    )
  dimensions = int(np.prod(build.image_shape(config)))
  if "ode" in c.likelihood and not c.probes and dimensions > _MOST_EXACT:
    raise ValueError(
      f"Got config.evaluation.probes=0, an exact trace, for images of {dimensions:,} dimensions; wanted {_MOST_EXACT} at most, or 1 probe"
      " or more."
    )


def _count(config: ConfigDict, held_out: data.Source) -> int:
  return min(config.evaluation.likelihood_images or len(held_out), len(held_out))


def evaluate(
  config: ConfigDict,
  folder: Path,
  mesh: jax.sharding.Mesh,
  weights: Weights,
  sha256: str,
  held_out: data.Source | None,
  seed: int,
) -> dict[str, dict[str, Any]]:
  """Every likelihood that the config asks for, by kind; empty where there is none.

  Image i's follows from the seed, its place and the weights alone. Those of a model with classes are given the class.
  """
  c = config.evaluation
  if not c.likelihood or held_out is None:
    return {}
  # Of the model itself, not of what steers it.
  config = ConfigDict(config.to_dict())
  config.guidance.update({"scale": 1.0, "plus_plus": False, "threshold": 0.0})
  count = _count(config, held_out)
  chosen = data.read(held_out, np.random.default_rng(0).permutation(len(held_out))[:count])
  inputs: dict[str, np.ndarray] = {"x_0": images.from_uint8(chosen["image"])}
  if config.network.num_classes:
    inputs["classes"] = chosen["label"]
  config.sampling.batch_size = min(c.batch_size, count) * mesh.size
  found = {}
  for kind in c.likelihood:
    identity = {
      "weights": sha256,
      "kind": kind,
      "seed": seed,
      "settings": [
        c.bound_draws,
        c.probes,
        c.probe_noise,
        c.likelihood_tolerance,
        config.sampling.variance,
        config.sampling.clip,
      ],
      "model": json.loads(json.dumps({name: config[name].to_dict() for name in ("process", "network")})),
      # With their classes: these follow from the names of folders, which may change.
      "images": metrics.digest(*inputs.values()),
      "version": ddpm_jax.__version__,
    }
    values = _rows(config, folder, mesh, weights, kind, identity, inputs, count, seed)
    if values is not None:
      found[kind] = _summary(config, kind, values)
  return found


def _rows(
  config: ConfigDict,
  folder: Path,
  mesh: jax.sharding.Mesh,
  weights: Weights,
  kind: str,
  identity: dict[str, Any],
  inputs: dict[str, np.ndarray],
  count: int,
  seed: int,
) -> np.ndarray | None:
  """What is known of each image [N, W], in the first process; what was computed before is not computed again."""
  function, width = _function(config, mesh, kind)
  array = None
  if parallel.is_main():
    path, damaged = folder / "likelihood" / kind, workdir.damaged_folder(folder)
    array = rows.Rows(path, identity, "rows", (count, width), np.float32, damaged=damaged)
  done = parallel.of_main(array.done if array else 0)
  if done < count:
    say(f"{_TITLES[kind]} of {count:,} held-out images by the {weights.name} weights ...")
    parts = drawing.in_batches(
      config, function, weights.params, seed, count, inputs, {}, start=done, what=f"likelihood ({kind})"
    )
    for values in parts:
      if array is not None:
        array.write(np.asarray(values), {})
  return None if array is None else array.finish()


def _function(config: ConfigDict, mesh: jax.sharding.Mesh, kind: str) -> tuple[Callable, int]:
  """`function(params, seed, first, inputs, guiding) -> [B, W]`, and W."""
  c, process = config.evaluation, build.build_process(config)

  def bound(keys, denoise, inputs):
    limited = build.bound(config, denoise)
    found = likelihood.variational_bound(
      keys, process, limited, inputs["x_0"], variance=config.sampling.variance, draws=c.bound_draws or None
    )
    sums = jnp.stack([found.bits, found.prior, found.decoder], 1)
    return sums if c.bound_draws else jnp.concatenate([sums, found.terms], 1)

  def ode(keys, denoise, inputs):
    # Networks of a config know backward derivatives alone on a CPU (`build.model.build_apply`).
    options = {"exact": not c.probes, "probes": max(c.probes, 1), "noise": c.probe_noise}
    options["reverse"] = jax.default_backend() == "cpu"
    tolerance = c.likelihood_tolerance
    found = likelihood.ode_bits(keys, process, denoise, inputs["x_0"], rtol=tolerance, atol=tolerance, **options)
    return jnp.stack([found.bits, found.nfe.astype(jnp.float32)], 1)

  def continuous(keys, denoise, inputs):
    found = likelihood.continuous_bound(keys, process, denoise, inputs["x_0"])
    return jnp.stack([found.bits, found.prior, found.decoder], 1)

  steps = 0 if c.bound_draws else process.num_steps or 0
  functions = {"bound": (bound, 3 + steps), "ode": (ode, 2), "continuous": (continuous, 3)}
  draw, width = functions[kind]
  return build.compile_draw(config, mesh, build.Guides(), draw), width


def _summary(config: ConfigDict, kind: str, values: np.ndarray) -> dict[str, Any]:
  """Means over images, and the standard error of that of the bits; a bound also has `terms` [N]."""
  c, values = config.evaluation, values.astype(np.float64)
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
    found |= {"variance": config.sampling.variance, "draws": c.bound_draws or "all"}
    if not c.bound_draws:
      found["terms"] = values[:, 3:].mean(0)
  return found


def without_terms(likelihoods: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """What eval.json holds of them."""
  return {kind: {key: value for key, value in found.items() if key != "terms"} for kind, found in likelihoods.items()}


def terms(likelihoods: dict[str, dict[str, Any]]) -> np.ndarray | None:
  """The terms of the bound's steps n = 1..N in bits per dimension [N]."""
  return likelihoods.get("bound", {}).get("terms")


def table(likelihoods: dict[str, dict[str, Any]]) -> str:
  """The likelihoods for people to read; empty if there are none."""
  lines = []
  for kind, found in likelihoods.items():
    calls = f", {found['nfe']:.0f} evaluations" if "nfe" in found else ""
    lines.append(
      f"{_TITLES[kind]:<30}{found['bits']:.4f} ± {found['standard_error']:.4f} bits per dimension of {found['num_images']:,} images{calls}"
    )
  return "\n" + "\n".join(lines) + "\n" if lines else ""
