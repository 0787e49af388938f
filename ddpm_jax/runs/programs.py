"""Compiled functions that draw samples of an experiment's model."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import randomness, sampling
from ddpm_jax.config import Experiment
from ddpm_jax.devices import parallel
from ddpm_jax.models import guided
from ddpm_jax.models.guided import NO_GUIDES, Guides, Parameters
from ddpm_jax.predictions import Denoise
from ddpm_jax.processes import expand
from ddpm_jax.runs import limits

Array = jax.Array
PyTree = Any
Arrays = Mapping[str, Array]


def clip_estimates(experiment: Experiment, denoise: Denoise) -> Denoise:
  """Return a denoiser whose estimates are clipped as the experiment says: last of all, so that no gradient is lost in it."""
  clip = experiment.sampling.clip
  return denoise if clip is None else clip(denoise=denoise)


def initial_noise(experiment: Experiment, keys: Array) -> Array:
  """Return noise to start from [B, ...], with a key for each sample [B]."""
  return experiment.model.process.prior(randomness.fold_in(keys, 0), (keys.shape[0], *experiment.model.shape))


def generate(
  experiment: Experiment, mesh: jax.sharding.Mesh, guides: Guides = NO_GUIDES, *, negative: bool = False
) -> Callable[[Parameters, Any, Any, Arrays], tuple[Array, Array]]:
  """Return `generate(parameters, seed, first, batch) -> (data, NFE)`, compiled, the batch split over the mesh.

  Sample i of the batch is number `first + i` of that seed, whatever the batch size; NFE [B]. Parameters may lie split over the mesh; the
  data are whole on every device. The batch holds arrays [B, ...] by name, as `guided.denoise` takes it.

  Raises:
    ValueError: if the sampling batch cannot be split over the devices, or the model cannot be guided so.
  """
  guided.check(experiment.model, experiment.guidance, experiment.sampler.two_estimates, guides, negative=negative)
  guided.check_sampler(experiment.model, experiment.sampler, experiment.times)

  def draw(keys, denoise, batch, parameters):
    x, nfe = sampling.solve(
      randomness.fold_in(keys, 1),
      experiment.sampler,
      clip_estimates(experiment, denoise),
      initial_noise(experiment, keys),
      experiment.times,
    )
    return experiment.model.decode(x, parameters.frozen), jnp.broadcast_to(nfe, keys.shape)

  return compile_sampler(experiment, mesh, guides, draw)


def for_previews(experiment: Experiment, mesh: jax.sharding.Mesh, count: int) -> Experiment:
  """Return the experiment with the sampler of previews, a few steps of DDIM, and a batch of `count` samples."""
  steps, size = experiment.sampling.preview_steps, -(-count // mesh.size) * mesh.size
  return experiment.replace(sampler="ddim", sampling__grid=None, sampling__num_steps=steps, sampling__batch_size=size)


def denoising_frames(
  experiment: Experiment, mesh: jax.sharding.Mesh, frames: int
) -> tuple[Callable[[Parameters, Any, Any, Arrays], Array], np.ndarray]:
  """Return a function that draws samples on their way to data, and the times of what it shows.

  Returns:
    `denoising(parameters, seed, first, batch) -> data [B, K, ...]`, as `generate` but for its results, which are scaled to be shown: where there is
    much noise its standard deviation is 1. And their times [K], K at most `frames`, from t_max to 0.
  """
  process, times = experiment.model.process, experiment.times
  kept = np.unique(np.linspace(0, len(times) - 1, frames).round().astype(int))
  shown = np.asarray(times)[kept]

  def draw(keys, denoise, batch, parameters):
    x, keys = initial_noise(experiment, keys), randomness.fold_in(keys, 1)
    states = sampling.sample(
      keys, experiment.sampler, clip_estimates(experiment, denoise), x, times, return_trajectory=True
    )
    scaled = states[kept] / expand(jnp.maximum(process.sigma(shown), 1), states)
    data = jax.vmap(lambda x: experiment.model.decode(x, parameters.frozen))(scaled)
    return jnp.moveaxis(data, 0, 1)

  return compile_sampler(experiment, mesh, NO_GUIDES, draw), shown


def compile_sampler(
  experiment: Experiment,
  mesh: jax.sharding.Mesh,
  guides: Guides,
  draw: Callable[[Array, Denoise, dict[str, Array], Parameters], PyTree],
) -> Callable[[Parameters, Any, Any, Arrays], PyTree]:
  """Return `draw(keys, denoise, batch, parameters)`, of a denoiser that is not clipped yet, called and compiled as `generate` says."""
  size, model = experiment.sampling.batch_size, experiment.model
  parallel.check_batch(size, mesh.size, "sampling batch size")
  limits.check_batch(experiment, size, list(mesh.devices.flat), "sampling.batch_size")

  def of_share(parameters, share):
    keys, batch = share
    return draw(keys, guided.denoise(model, experiment.guidance, keys, batch, parameters, guides), batch, parameters)

  def function(parameters, seed, first, batch):
    # Folded with 2: a training run of the same seed uses what 0 and 1 would give.
    key = jax.random.fold_in(jax.random.key(seed), 2)
    if any(condition.is_source_image for condition in model.conditions.values()):
      # Other noise than the model's that drew what is enlarged.
      key = jax.random.fold_in(key, model.data_shape[0])
    keys = randomness.sample_keys(key, first + jnp.arange(size))
    return parallel.map_shards(mesh, of_share)(parameters, (keys, batch))

  return jax.jit(function, out_shardings=parallel.replicated(mesh), compiler_options=parallel.compiler_options(mesh))
