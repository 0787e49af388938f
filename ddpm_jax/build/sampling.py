"""Samplers and denoisers of a config."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import parallel, predictions, randomness, sampling
from ddpm_jax.build.guidance import Guides, bound, build_denoise, check_guidance
from ddpm_jax.build.memory import check_batch
from ddpm_jax.build.model import build_process, check_denoises, image_shape
from ddpm_jax.predictions import Denoise
from ddpm_jax.processes import Process, expand
from ddpm_jax.schema import choose

Array = jax.Array
PyTree = Any

_STEP_RULES = {
  "ancestral": lambda c, process: sampling.ancestral(process, c.variance),
  "ddim": lambda c, process: sampling.ddim(process, c.eta),
  "deis": lambda c, process: sampling.deis(process, c.order),
  "dpm_solver": lambda c, process: sampling.dpm_solver(process, c.order),
  "dpmpp_2m": lambda c, process: sampling.dpmpp_2m(process),
  "dpmpp_2m_sde": lambda c, process: sampling.dpmpp_2m_sde(process),
  "dpmpp_2s": lambda c, process: sampling.dpmpp_2s(process),
  "dpmpp_3m": lambda c, process: sampling.dpmpp_3m(process),
  "dpmpp_sde": lambda c, process: sampling.dpmpp_sde(process),
  "euler": lambda c, process: sampling.euler(process, **_churn(c)),
  "euler_ancestral": lambda c, process: sampling.euler_ancestral(process),
  "euler_maruyama": lambda c, process: sampling.euler_maruyama(process),
  "heun": lambda c, process: sampling.heun(process, **_churn(c)),
  "reverse_diffusion": lambda c, process: sampling.reverse_diffusion(process),
  "unipc": lambda c, process: sampling.unipc(process, c.order),
}
SAMPLERS = (*_STEP_RULES, "ode")
# Rules that take even steps in t, as the model was trained; the others solve in the log-SNR.
_EVEN_IN_TIME = ("ancestral", "euler_ancestral", "euler_maruyama", "reverse_diffusion")


def _churn(c: ConfigDict) -> dict[str, float]:
  return {name: c[name] for name in ("s_churn", "s_min", "s_max", "s_noise")}


def build_labels(
  config: ConfigDict,
  wanted: list[int] | None,
  count: int,
  *,
  classes: int | None = None,
  counts: np.ndarray | None = None,
) -> np.ndarray | None:
  """Class labels [count] for sampling: those wanted, over and over; None if unconditional.

  By default all classes in turn or, given how many images of each there are (`counts` [num_classes]), in these proportions, by largest
  remainder, each class spread evenly.

  Args:
    config: of the model.
    wanted: the labels, or None.
    count: how many are needed.
    classes: how many classes there are, if it is a classifier that knows them and not the model.
    counts: how many images of each class there are [num_classes].

  Raises:
    ValueError: if labels are wanted of a model that knows none, are out of range, or are more than are needed.
  """
  classes = classes or config.network.num_classes
  if not classes:
    if wanted is not None:
      raise ValueError(
        f"Got labels {','.join(map(str, wanted))} for a model that was trained without classes; leave them out, or guide it by"
        " --classifier=<run folder>."
      )
    return None
  if wanted is None and counts is not None:
    return _in_proportion(counts, count)
  if wanted is not None and len(wanted) > count:
    raise ValueError(f"Got {len(wanted)} labels for {count} samples; wanted no more labels than samples.")
  wanted = list(range(classes)) if wanted is None else wanted
  if not wanted or min(wanted) < 0 or max(wanted) >= classes:
    raise ValueError(f"Got labels {','.join(map(str, wanted))}; wanted labels from 0 to {classes - 1}.")
  return np.resize(np.array(wanted, np.int32), count)


def _in_proportion(counts: np.ndarray, count: int) -> np.ndarray:
  quotas = count * counts / np.sum(counts)
  shares = np.floor(quotas).astype(int)
  # Stable sorts: of equals the lower class comes first.
  most_left = np.argsort(shares - quotas, kind="stable")
  shares[most_left[: count - np.sum(shares)]] += 1
  labels = np.repeat(np.arange(len(counts), dtype=np.int32), shares)
  places = np.concatenate([(np.arange(share) + 0.5) / share for share in shares])
  return labels[np.argsort(places, kind="stable")]


def build_grid(config: ConfigDict, process: Process) -> np.ndarray:
  """The grid of times of the config's sampler."""
  grids, sampler = sampling.grids, config.sampling.sampler
  # A last short step to t_min serves the rules that add noise; from far above it, rules of high order overshoot.
  t_min = process.t_min if sampler in _EVEN_IN_TIME and not process.num_steps else 0.0
  makers = {
    "trailing": grids.trailing,
    "leading": grids.leading,
    "linspace": grids.linspace,
    "leading_open": partial(grids.leading, open_end=True),
    "linspace_open": partial(grids.linspace, open_end=True),
    "log_snr": grids.log_snr,
    "karras": grids.karras,
    "uniform": partial(grids.uniform, t_min=t_min),
    "quadratic": partial(grids.quadratic, t_min=t_min),
  }
  name = config.sampling.grid or _suitable_grid(sampler, process)
  return choose(name, makers, "config.sampling.grid")(process, config.sampling.num_steps)


def _suitable_grid(sampler: str, process: Process) -> str:
  """Even steps in t for the rules of the first order that want them, else in the log-SNR where it is finite."""
  if process.t_max > 1:  # t is sigma, of which even steps spend all on noise
    return "karras"
  even = (
    sampler in _EVEN_IN_TIME
    or (sampler == "ddim" and process.num_steps)
    or float(process.alpha(jnp.asarray(process.t_max))) == 0
  )
  if not even:
    return "log_snr"
  return "trailing" if process.num_steps else "uniform"


def build_rule(config: ConfigDict) -> tuple[sampling.Sampler, np.ndarray]:
  """The step rule and its grid; a ValueError for the adaptive `ode`, which has neither."""
  c, process = config.sampling, build_process(config)
  if c.sampler == "ode":
    raise ValueError(
      "Got the sampler 'ode', whose steps cannot be edited one by one; wanted a step rule, such as --sampler=heun."
    )
  sampler = choose(c.sampler, _STEP_RULES, "a sampler")(c, process)
  if c.corrector_steps:
    sampler = sampling.with_langevin(sampler, process, snr=c.corrector_snr, num_steps=c.corrector_steps)
  return sampler, build_grid(config, process)


def build_sampler(config: ConfigDict) -> Callable[[Array, Denoise], tuple[Array, Array]]:
  """`run(keys, denoise) -> (images [B, H, W, C] in [-1, 1], NFE)` for one key a sample, from noise to data; NFE [B]."""
  c, process, shape = config.sampling, build_process(config), image_shape(config)
  name = choose(c.sampler, SAMPLERS, "a sampler")
  if c.variance == "learned" and not config.learned_variance:
    raise ValueError(
      "Got config.sampling.variance='learned' for a model without config.learned_variance; wanted 'small' or 'large'."
    )

  def start(keys):
    return process.prior(randomness.fold_in(keys, 0), (keys.shape[0], *shape))

  if name == "ode":

    def integrate(keys, denoise):
      t_end = max(process.t_min, 1e-3)
      tolerances = {"rtol": c.tolerance, "atol": c.tolerance}
      x, nfe = sampling.ode(process, denoise, start(keys), process.t_max, t_end, per_sample=True, **tolerances)
      return predictions.x_0_of(denoise(x, t_end)), nfe + 1

    return integrate

  sampler, times = build_rule(config)
  nfe = sampling.nfe(sampler, process, times)

  def run(keys, denoise):
    x = sampling.sample(randomness.fold_in(keys, 1), sampler, denoise, start(keys), times)
    return x, jnp.full(keys.shape, nfe)

  return run


def build_generate(
  config: ConfigDict, mesh: jax.sharding.Mesh, guides: Guides | None = None, *, negative: bool = False
) -> Callable[..., tuple[Array, Array]]:
  """`generate(params, seed, first, inputs, guiding) -> (images, NFE)`, compiled, the batch split over the mesh.

  Image i of the batch is number `first + i` of that seed, whatever the batch size; NFE [B]. Parameters may lie split over the mesh; the
  images are whole on every device. `inputs` are arrays [B, ...] by name: `classes`, `negative` and `low`, of those that the model
  takes, `negative` if so said. `guiding` are the parameters of the guides, by name.

  Raises:
    ValueError: if the sampling batch cannot be split over the devices, or the config's sampler or its guidance is wrong.
  """
  check_denoises(config)
  run = build_sampler(config)
  check_guidance(config, guides or Guides(), negative=negative)

  def draw(keys, denoise, inputs):
    return run(keys, bound(config, denoise))

  return compile_draw(config, mesh, guides or Guides(), draw)


def of_previews(config: ConfigDict) -> ConfigDict:
  """The config with the sampler of previews: a few steps of DDIM."""
  quick = ConfigDict(config.to_dict())
  quick.sampling.update({"sampler": "ddim", "eta": 0.0, "num_steps": config.sampling.preview_steps, "grid": ""})
  return quick


def build_denoising(
  config: ConfigDict, mesh: jax.sharding.Mesh, frames: int
) -> tuple[Callable[..., Array], np.ndarray]:
  """`denoising(params, seed, first, inputs, guiding) -> x [B, K, H, W, C]`, samples on their way to data by the sampler of previews.

  Returns:
    The function, as `build_generate`'s but for its results, which are scaled to be shown: where there is much noise its standard
    deviation is 1. And their times [K], K at most `frames`, from t_max to 0.
  """
  config = of_previews(config)
  process, shape = build_process(config), image_shape(config)
  sampler, times = build_rule(config)
  kept = np.unique(np.linspace(0, len(times) - 1, frames).round().astype(int))
  shown = np.asarray(times)[kept]

  def draw(keys, denoise, inputs):
    x = process.prior(randomness.fold_in(keys, 0), (keys.shape[0], *shape))
    keys = randomness.fold_in(keys, 1)
    states = sampling.sample(keys, sampler, bound(config, denoise), x, times, return_trajectory=True)
    shown_states = states[kept] / expand(jnp.maximum(process.sigma(shown), 1), states)
    return jnp.moveaxis(shown_states, 0, 1)

  return compile_draw(config, mesh, Guides(), draw), shown


def compile_draw(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  guides: Guides,
  draw: Callable[[Array, Denoise, dict[str, Array]], PyTree],
) -> Callable[..., PyTree]:
  """`draw(keys, denoise, inputs)`, of a denoiser that is not `bound` yet, called and compiled as `build_generate` says; it gives arrays [B, ...]."""
  check_denoises(config)
  size = config.sampling.batch_size
  parallel.check_batch(size, mesh.size, "sampling batch size")
  check_batch(config, size, list(mesh.devices.flat), "sampling.batch_size")

  def of_share(whole, batch):
    (params, guiding), (keys, inputs) = whole, batch
    return draw(keys, build_denoise(config, params, keys, inputs, guides, guiding), inputs)

  def generate(params, seed, first, inputs, guiding):
    # Folded with 2: a training run of the same seed uses what 0 and 1 would give.
    key = jax.random.fold_in(jax.random.key(seed), 2)
    if config.superres.factor:
      # Other noise than the model's that drew what is enlarged.
      key = jax.random.fold_in(key, image_shape(config)[0])
    keys = randomness.sample_keys(key, first + jnp.arange(size))
    return parallel.shares(mesh, of_share)((params, guiding), (keys, inputs))

  return jax.jit(generate, out_shardings=parallel.replicated(mesh), compiler_options=parallel.compiler_options(mesh))
