"""Provide the codecs that a config can select: pixels, and frozen autoencoders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import interop, models
from ddpm_jax.devices import parallel
from ddpm_jax.models import Codec
from ddpm_jax.models.codecs import Loader, latent, pixels
from ddpm_jax.runs import model
from ddpm_jax.storage import scores, workdir
from ddpm_jax.storage.places import user_path

PyTree = Any

__all__ = ["autoencoder", "pixels"]

# The key of the latents' mean and standard deviation in the scores of a run.
LATENTS = "latents"


def autoencoder(
  path: Annotated[str, "place"],
  data_shape: tuple[int, ...],
  posterior: str = "sample",
  mean: Sequence[float] = (),
  std: Sequence[float] = (),
  dtype: str = "float32",
  tile: Annotated[int, "speed"] = 0,
) -> Codec:
  """Return the codec of a frozen autoencoder, from a run or from a folder of diffusers.

  x is (z - mean) / std for latents z. By default, the mean and the standard deviation are those of each channel over
  the run's held-out images (`latents` in its eval.json), or those that the folder of diffusers publishes as
  `scaling_factor`, `shift_factor`, `latents_mean` and `latents_std`.

  Args:
    path: the folder of a run with the task "autoencode", a folder with the weights of an AutoencoderKL, or the folder
      of a pipeline with vae/.
    data_shape: the shape [H, W, C] of the data.
    posterior: "sample" to draw latents from the posterior, or "mode" for its mean.
    mean: the mean of each channel of z, or one for all channels. Empty for the default.
    std: the standard deviation of each channel of z, or one for all channels. Empty for the default.
    dtype: the type of parameters and computation, "float32" or "bfloat16".
    tile: see `models.codecs.latent`.

  Raises:
    ValueError: if there is no autoencoder at the path, it does not fit the data, or an argument is invalid.
  """
  if not path:
    raise ValueError(
      "Got an empty path of the codec; expected the folder of an autoencoder. Set --config.model.codec.path=<folder>."
    )
  if bool(mean) != bool(std) or any(value <= 0 for value in std):
    raise ValueError(f"Got mean={tuple(mean)} and std={tuple(std)}; expected both or none, with std above 0.")
  folder = user_path(path, "config.model.codec.path=")
  if workdir.is_run(folder):
    codec = _from_run(folder, data_shape, posterior, dtype, tile)
  else:
    codec = interop.diffusers.read_codec(
      folder if folder.is_dir() else path, posterior=posterior, dtype=dtype, tile=tile
    )
  return _with_statistics(codec, mean, std) if mean else codec


def _from_run(folder: Path, data_shape: tuple[int, ...], posterior: str, dtype: str, tile: int) -> Codec:
  experiment = model.load_experiment(None, folder, "config.model.codec.path")
  if experiment.tree.short_name("task") != "autoencode":
    raise ValueError(
      f"Got config.model.codec.path={folder}, a run with config.task={experiment.tree.short_name('task')!r}; expected a run that trained an"
      " autoencoder, such as one of configs/emoji_autoencoder.py."
    )
  if experiment.model.data_shape[-1] != data_shape[-1]:
    raise ValueError(
      f"Got config.model.codec.path={folder}, an autoencoder of data with {experiment.model.data_shape[-1]} channels, for data with"
      f" {data_shape[-1]}; expected the same number. Set --config.data.channels={experiment.model.data_shape[-1]}."
    )
  report = scores.read(folder)
  statistics = (report or {}).get(LATENTS)
  if statistics is None:
    raise ValueError(
      f"Got config.model.codec.path={folder}, a run without the mean and standard deviation of its latents in eval.json; expected a scored"
      f" run. Run --mode=eval --workdir={folder}, or set mean and std of the codec."
    )
  network = experiment.model.network
  if dtype != "float32":
    network = models.networks.from_linen(network.module.clone(dtype=jnp.dtype(dtype)), {})
  mean, std = (np.asarray(statistics[name], np.float32) for name in ("mean", "std"))
  arrays: dict[str, np.ndarray] = {"scale": 1 / std, "shift": mean}

  def cast(params: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

  def load() -> PyTree:
    mesh = parallel.make_mesh(devices=jax.local_devices()[:1])
    weights = model.load_weights(experiment, folder, mesh, model.WeightsChoice(), quiet=True)
    return {"autoencoder": jax.device_get(cast(weights.parameters.params)), **arrays}

  def shapes() -> PyTree:
    params = jax.eval_shape(lambda key: cast(experiment.model.init(key)), jax.random.key(0))
    return {"autoencoder": params} | {
      name: jax.ShapeDtypeStruct(array.shape, jnp.float32) for name, array in arrays.items()
    }

  functions = models.networks.autoencoder(network, data_shape)
  return latent(functions, Loader(load, shapes), posterior=posterior, tile=tile)


def _with_statistics(codec: Codec, mean: Sequence[float], std: Sequence[float]) -> Codec:
  """Return the codec with another mean and standard deviation of z."""
  arrays: dict[str, np.ndarray] = {"scale": 1 / np.asarray(std, np.float32), "shift": np.asarray(mean, np.float32)}
  load = codec.load
  assert isinstance(load, Loader)

  def with_arrays(frozen: PyTree, values: PyTree) -> PyTree:
    return {**frozen, **values}

  shapes = {name: jax.ShapeDtypeStruct(array.shape, jnp.float32) for name, array in arrays.items()}
  loader = Loader(lambda: with_arrays(load(), arrays), lambda: with_arrays(load.shapes(), shapes))
  return codec._replace(load=loader)
