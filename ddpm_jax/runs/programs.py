"""Compile functions that sample from an experiment's model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import randomness, sampling
from ddpm_jax.config import Experiment
from ddpm_jax.devices import parallel
from ddpm_jax.models import guided
from ddpm_jax.models.gathering import gather_model
from ddpm_jax.models.guided import NO_GUIDES, Guides, Parameters
from ddpm_jax.predictions import Denoise
from ddpm_jax.processes import expand
from ddpm_jax.runs import limits

Array = jax.Array
PyTree = Any
Arrays = Mapping[str, Array]


class Coder(NamedTuple):
  """Hold functions that encode and decode data with a model's codec.

  Attributes:
    encode: `encode(keys, data) -> x` encodes data [B, ...]. `keys` [B] has a key for each sample.
    decode: `decode(x) -> data` decodes x [B, ...].
  """

  encode: Callable[[Array, Array], Array]
  decode: Callable[[Array], Array]


def sampling_mesh(experiment: Experiment, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
  """Return the mesh to sample on, by default over all devices.

  Raises:
    ValueError: if the devices do not fit the mesh's shape.
  """
  return parallel.make_mesh(experiment.parallel.data, experiment.parallel.fsdp, devices)


def clip_estimates(experiment: Experiment, denoise: Denoise) -> Denoise:
  """Return a denoiser that clips its estimates of x_0 as `config.sampling.clip` specifies.

  Call this function on a denoiser that already includes all guidance. Guidance may need the gradient of an estimate,
  and the gradient is zero where the estimate is clipped.
  """
  clip = experiment.sampling.clip
  return denoise if clip is None else clip(denoise=denoise)


def initial_noise(experiment: Experiment, keys: Array) -> Array:
  """Return the noise [B, ...] that sampling starts from.

  `keys` [B] has a key for each sample.
  """
  return experiment.model.process.prior(randomness.fold_in(keys, 0), (keys.shape[0], *experiment.model.shape))


def generate(
  experiment: Experiment, mesh: jax.sharding.Mesh, guides: Guides = NO_GUIDES, *, negative: bool = False
) -> Callable[[Parameters, Any, Any, Arrays], tuple[Array, Array]]:
  """Compile `generate(parameters, seed, first, batch) -> (data, nfe)` with the batch sharded over the mesh.

  The function's arguments and results:
    parameters: the parameters, sharded as in `parallel.state_shardings`.
    seed: the seed. Row i of the batch is sample `first + i` of the seed, whatever the batch size.
    first: the index of the first sample.
    batch: arrays [B, ...] by name, as `guided.denoise` reads them.
    data: the samples [B, ...], replicated on every device.
    nfe: the number of network evaluations for each sample [B].

  Args:
    experiment: the experiment with the model and the sampler.
    mesh: the devices.
    guides: other models, which guide the sampled model.
    negative: whether the batch has conditions to guide away from.

  Raises:
    ValueError: if the sampling batch cannot be sharded over the devices, or if the model does not allow the guidance.
  """
  guided.check(experiment.model, experiment.guidance, experiment.sampler.two_estimates, guides, negative=negative)
  guided.check_sampler(experiment.model, experiment.sampler, experiment.times)

  def sample(keys, denoise, batch, coder):
    x, nfe = sampling.solve(
      randomness.fold_in(keys, 1),
      experiment.sampler,
      clip_estimates(experiment, denoise),
      initial_noise(experiment, keys),
      experiment.times,
    )
    return coder.decode(x), jnp.broadcast_to(nfe, keys.shape)

  return compile_sampler(experiment, mesh, guides, sample)


def for_previews(experiment: Experiment, mesh: jax.sharding.Mesh, count: int) -> Experiment:
  """Return the experiment with the sampling of previews: a few steps of DDIM, and a batch for `count` samples."""
  steps, size = experiment.sampling.preview_steps, -(-count // mesh.size) * mesh.size
  return experiment.replace(sampler="ddim", sampling__grid=None, sampling__num_steps=steps, sampling__batch_size=size)


def denoising_frames(
  experiment: Experiment, mesh: jax.sharding.Mesh, frames: int
) -> tuple[Callable[[Parameters, Any, Any, Arrays], Array], np.ndarray]:
  """Compile a function that returns the intermediate states of samples, and return it with the states' times.

  Args:
    experiment: the experiment with the model and the sampler.
    mesh: the devices.
    frames: the maximum number of frames K.

  Returns:
    The function `denoising(parameters, seed, first, batch) -> data [B, K, ...]`, and the times [K] from t_max to 0. The
    function takes the same arguments as the function that `generate` compiles. The states are scaled for display, so
    that the standard deviation of the noise is at most 1.
  """
  process, times = experiment.model.process, experiment.times
  indices = np.unique(np.linspace(0, len(times) - 1, frames).round().astype(int))
  frame_times = np.asarray(times)[indices]

  def sample(keys, denoise, batch, coder):
    x, keys = initial_noise(experiment, keys), randomness.fold_in(keys, 1)
    states = sampling.sample(
      keys, experiment.sampler, clip_estimates(experiment, denoise), x, times, return_trajectory=True
    )
    scaled = states[indices] / expand(jnp.maximum(process.sigma(frame_times), 1), states)
    return jnp.moveaxis(jax.vmap(coder.decode)(scaled), 0, 1)

  return compile_sampler(experiment, mesh, NO_GUIDES, sample), frame_times


def compile_sampler(
  experiment: Experiment,
  mesh: jax.sharding.Mesh,
  guides: Guides,
  sample: Callable[[Array, Denoise, dict[str, Array], Coder], PyTree],
  *,
  is_adaptive: bool | None = None,
) -> Callable[[Parameters, Any, Any, Arrays], PyTree]:
  """Compile `sample(keys, denoise, batch, coder)` as a function of `(parameters, seed, first, batch)`.

  The compiled function takes the same arguments as the function that `generate` compiles. The denoiser that `sample`
  receives is guided but not clipped. On a mesh with several devices along "fsdp", each device stores only its shards of
  the parameters. Each call of a network gathers the parameters of this network, and releases them afterward.

  Args:
    experiment: the experiment with the model and the sampler.
    mesh: the devices.
    guides: other models, which guide the sampled model.
    sample: the function to compile. On each device, it gets this device's rows of the batch.
    is_adaptive: whether the number of network calls depends on the data; None to ask the sampler. If the number depends
      on the data, it differs between devices. A call then cannot gather parameters from other devices, so all
      parameters are gathered at the start.

  Raises:
    ValueError: if the sampling batch cannot be sharded over the devices or does not fit into their memory.
  """
  size, model = experiment.sampling.batch_size, experiment.model
  is_adaptive = experiment.sampler.count_calls is not None if is_adaptive is None else is_adaptive
  parallel.check_batch(size, mesh.size, "sampling batch size")
  limits.check_batch(experiment, size, list(mesh.devices.flat), "sampling.batch_size")

  def function(parameters, seed, first, batch):
    # Fold in 2, because a training run with the same seed uses the keys of 0 and 1.
    key = jax.random.fold_in(jax.random.key(seed), 2)
    if any(condition.is_source_image for condition in model.conditions.values()):
      # A super-resolution model must not reuse the noise of the model that generated the small images.
      key = jax.random.fold_in(key, model.data_shape[0])
    keys = randomness.sample_keys(key, first + jnp.arange(size))
    axes = parallel.split_axes(mesh, parameters)

    def sample_shard(parameters, shard):
      (keys, batch), local, local_guides = shard, model, guides
      if is_adaptive:
        parameters = parallel.gather_leaves(parameters, axes)
      else:
        local = gather_model(model, axes.params, axes.frozen)
        others = {name: gather_model(getattr(guides, name), *axes.guides[name]) for name in axes.guides}
        local_guides = guides._replace(**others)
      denoise = guided.denoise(local, experiment.guidance, keys, batch, parameters, local_guides)
      coder = Coder(
        lambda keys, data: local.encode(keys, data, parameters.frozen),
        lambda x: local.decode(x, parameters.frozen),
      )
      return sample(keys, denoise, batch, coder)

    return parallel.map_shards(mesh, sample_shard, is_split=True)(parameters, (keys, batch))

  # Parameters that the program does not use, such as those of an encoder, still take memory. Keep them among the
  # arguments, so that plans count them.
  return jax.jit(
    function,
    out_shardings=parallel.replicated(mesh),
    compiler_options=parallel.compiler_options(mesh),
    keep_unused=True,
  )
