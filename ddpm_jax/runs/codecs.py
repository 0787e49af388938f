"""Provide the codecs that a config can select: pixels, and frozen autoencoders."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

from ddpm_jax import config, interop, models
from ddpm_jax.config import Experiment, Tree
from ddpm_jax.devices import parallel
from ddpm_jax.interop.tensors import DTYPES
from ddpm_jax.models import Codec
from ddpm_jax.models.codecs import Loader, latent, pixels
from ddpm_jax.names import choose
from ddpm_jax.runs import model
from ddpm_jax.storage import scores, workdir
from ddpm_jax.storage.places import user_path

PyTree = Any

__all__ = ["autoencoder", "pixels"]

_COMPONENT = "codecs.autoencoder"
_KEY = "config.model.codec"


def autoencoder(
  path: Annotated[str, "place"],
  data_shape: tuple[int, ...],
  posterior: str = "sample",
  mean: Sequence[float] = (),
  std: Sequence[float] = (),
  step: int = 0,
  dtype: str = "float32",
  tile: Annotated[int, "sampling"] = 0,
) -> Codec:
  """Return the codec of a frozen autoencoder, from a run or from a folder in diffusers' format.

  The codec encodes data as x = (z - mean) / std, where z are the latents of the autoencoder. The folder of the
  autoencoder provides the defaults of the mean and the standard deviation. For a run, they are the statistics of each
  channel over the held-out images (`latents` in eval.json). In diffusers' format, the config of the autoencoder sets
  them as `scaling_factor`, `shift_factor`, `latents_mean` and `latents_std`.

  Args:
    path: the folder of a run with the task "autoencode", a folder with the weights of an AutoencoderKL, the folder of
      a pipeline with vae/, or a name on the Hugging Face hub.
    data_shape: the shape [H, W, C] of the data.
    posterior: "sample" to sample latents from the encoder's posterior, or "mode" to use the mean of the posterior.
    mean: the mean of each channel of z, or one number for all channels. Empty for the default.
    std: the standard deviation of each channel of z, or one number for all channels. Empty for the default.
    step: the step of the run's checkpoint; 0 for the newest. The EMA weights are used.
    dtype: the type of parameters and computation, "float32" or "bfloat16".
    tile: see `models.codecs.latent`.

  Raises:
    ValueError: if there is no autoencoder at the path, the autoencoder does not fit the data, or an argument is
      invalid.
  """
  if not path:
    raise ValueError(
      f"Got an empty path of the codec; expected the folder of an autoencoder. Set --{_KEY}.path=<folder>."
    )
  choose(dtype, DTYPES, f"{_KEY}.dtype")
  if bool(mean) != bool(std):
    raise ValueError(f"Got mean={tuple(mean)} and std={tuple(std)}; expected both or none. Set --{_KEY}.mean and .std.")
  folder = user_path(path, f"{_KEY}.path=")
  if workdir.is_run(folder):
    return _from_run(folder, data_shape, posterior, mean, std, step, dtype, tile)
  if step:
    raise ValueError(f"Got step={step} for {path}, which is no run; expected 0. Leave --{_KEY}.step out.")
  found = folder if folder.is_dir() else path
  codec = interop.diffusers.read_codec(found, posterior=posterior, dtype=dtype, tile=tile)
  return _with_statistics(codec, _arrays(mean, std, codec.module.latent_channels)) if mean else codec


def _from_run(
  folder: Path,
  data_shape: tuple[int, ...],
  posterior: str,
  mean: Sequence[float],
  std: Sequence[float],
  step: int,
  dtype: str,
  tile: int,
) -> Codec:
  experiment = _experiment(folder)
  channels, expected = data_shape[-1], experiment.model.data_shape[-1]
  if channels != expected:
    raise ValueError(
      f"Got {_KEY}.path={folder}, an autoencoder of data with {expected} channels, for data with {channels}; expected the same"
      f" number. Set --config.data.channels={expected}."
    )
  step = step or workdir.checkpoint_steps(folder)[-1]
  if not mean:
    mean, std = statistics(folder, step)
  network = models.networks.from_linen(experiment.model.network.module.clone(dtype=DTYPES[dtype]), {})
  arrays = _arrays(mean, std, network.module.latent_channels)

  def cast(params: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

  def load_sharded(mesh: jax.sharding.Mesh) -> PyTree:
    weights = model.load_weights(experiment, folder, mesh, model.WeightsChoice(step=str(step)), quiet=True)
    return {"autoencoder": cast(weights.parameters.params), **arrays}

  def load() -> PyTree:
    return jax.device_get(load_sharded(parallel.make_mesh(devices=jax.local_devices()[:1])))

  def shapes() -> PyTree:
    params = jax.eval_shape(lambda key: cast(experiment.model.init(key)), jax.random.key(0))
    return {"autoencoder": params, **_shapes(arrays)}

  functions = models.networks.autoencoder(network, data_shape)
  return latent(functions, Loader(load, shapes, load_sharded), posterior=posterior, tile=tile)


@functools.lru_cache(maxsize=8)
def _experiment(folder: Path) -> Experiment:
  """Return the experiment of an autoencoder's run."""
  experiment = model.load_experiment(None, folder, f"{_KEY}.path")
  name = experiment.tree.short_name("task")
  if name != "autoencode":
    raise ValueError(
      f"Got {_KEY}.path={folder}, a run with config.task={name!r}; expected a run that trained an autoencoder, such as one of"
      " configs/emoji_autoencoder.py."
    )
  return experiment


def statistics(folder: Path, step: int, weights: str = "EMA") -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Return the mean and the standard deviation of each channel of an autoencoder's latents, from its run's eval.json.

  Args:
    folder: the run's folder.
    step: the step of the weights.
    weights: the name of the weights, "EMA" or "raw".

  Raises:
    ValueError: if these weights were not scored.
  """
  report = scores.read(folder) or {}
  found = report.get("latents")
  if found is None or (report.get("step"), report.get("weights")) != (step, weights):
    scored = (
      "not scored" if found is None else f"scored at step {report.get('step')} with the {report.get('weights')} weights"
    )
    flags = f" --step={step}{'' if weights == 'EMA' else ' --ema=false'}"
    raise ValueError(
      f"Got {folder}, the run of an autoencoder that was {scored}; expected scores of the {weights} weights of step {step:,}, which hold the"
      f" mean and the standard deviation of the latents. Run --mode=eval --workdir={folder}{flags}."
    )
  return tuple(found["mean"]), tuple(found["std"])


def _arrays(mean: Sequence[float], std: Sequence[float], channels: int) -> dict[str, np.ndarray]:
  """Return the arrays `scale` and `shift` of a codec, each of shape [C] for C channels of z, or of shape ()."""
  values = [np.asarray(one, np.float32) for one in (mean, std)]
  for name, one in zip(("mean", "std"), values, strict=True):
    if len(one) not in (1, channels) or not np.isfinite(one).all() or (name == "std" and one.min() <= 0):
      raise ValueError(
        f"Got {name}={one.tolist()} for the latents of an autoencoder; expected one or {channels} finite numbers, with std above 0. A channel"
        f" with std=0 carries no information: train an autoencoder with fewer latent channels, or set --{_KEY}.mean and .std."
      )
  shift, std_array = (one[0] if len(one) == 1 else one for one in values)
  return {"scale": np.asarray(1 / std_array), "shift": np.asarray(shift)}


def _with_statistics(codec: Codec, arrays: dict[str, np.ndarray]) -> Codec:
  """Return the codec with another mean and standard deviation of z."""
  load = codec.load
  assert isinstance(load, Loader)

  def with_arrays(read: Callable[..., PyTree]) -> Callable[..., PyTree]:
    return lambda *mesh: {**read(*mesh), **arrays}

  loader = Loader(
    with_arrays(load),
    lambda: {**load.shapes(), **_shapes(arrays)},
    None if load.load_sharded is None else with_arrays(load.load_sharded),
  )
  return codec._replace(load=loader)


def _shapes(arrays: dict[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
  return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}


def pin(tree: Tree, folder: Path) -> Tree:
  """Set the keys `step`, `mean` and `std` of the autoencoder in a run's config, and return the new config.

  If the config already sets one of these keys, its value does not change. If `folder` has a saved config, the missing
  values come from there, even if the autoencoder was trained or scored again. Otherwise they come from the newest
  checkpoint and the scores of the autoencoder. If the codec is not an autoencoder from a run of its own, the config is
  returned unchanged.

  Args:
    tree: the config of the run that uses the autoencoder.
    folder: the folder of the run that uses the autoencoder.
  """
  codec = tree.values["model"].get("codec") or {}
  if codec.get("component") != _COMPONENT or not codec["path"]:
    return tree
  source = user_path(codec["path"], f"{_KEY}.path=")
  if not workdir.is_run(source):
    return tree
  saved = config.find_run(folder)
  own = (saved.values["model"].get("codec") or {}) if saved is not None else {}
  pinned = {name: own[name] for name in ("step", "mean", "std") if own.get("component") == _COMPONENT}
  if not pinned:
    _experiment(source)  # raises an error if the run has no checkpoint, or trained no autoencoder
    step = codec["step"] or workdir.checkpoint_steps(source)[-1]
    pinned = {"step": step}
    if not codec["mean"]:
      pinned["mean"], pinned["std"] = statistics(source, step)
  for name, value in pinned.items():
    if not codec[name]:
      tree = config.replace(tree, f"model.codec.{name}", value)
  return tree
