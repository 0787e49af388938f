"""From a config to objects: the one place where strings become functions, and where a config's mistakes are found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from ddpm_jax import (
  data,
  guidance,
  losses,
  optim,
  parallel,
  predictions,
  processes,
  randomness,
  sampling,
  schedules,
)
from ddpm_jax.networks import UNet
from ddpm_jax.predictions import Denoise, Prediction
from ddpm_jax.processes import Process
from ddpm_jax.schema import choose

Array = jax.Array
PyTree = Any

_PREDICTIONS = {"eps": predictions.EPS, "x0": predictions.X0, "v": predictions.V}
_WEIGHTINGS = {"simple": losses.simple, "snr_plus_one": losses.snr_plus_one}
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
SAMPLERS = ("ancestral", "ddim", "euler_maruyama", "heun", "ode")


def build_process(config: ConfigDict) -> Process:
  """The forward process."""
  c = config.process
  n = c.num_steps
  schedule = {
    "linear": lambda: schedules.linear(n, c.beta_min / n, c.beta_max / n),
    "cosine": lambda: schedules.cosine(n),
  }
  makers = {
    "vp": lambda: processes.vp(c.beta_min, c.beta_max),
    "discrete": lambda: processes.discrete(choose(c.schedule, schedule, "config.process.schedule")()),
  }
  return choose(c.name, makers, "config.process.name")()


def build_prediction(config: ConfigDict) -> Prediction:
  """The meaning of the network's output."""
  return choose(config.prediction, _PREDICTIONS, "config.prediction")


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
  """[H, W, C] of the images."""
  return config.data.image_size, config.data.image_size, config.data.channels


def build_network(config: ConfigDict) -> UNet:
  """The network, checked against the images it is to take."""
  c = dict(config.network)
  dtype = choose(c.pop("dtype"), _DTYPES, "config.network.dtype")
  network = UNet(out_channels=config.data.channels, dtype=dtype, **c)
  network.check_input(image_shape(config))
  return network


def build_params_init(config: ConfigDict) -> Callable[[Array], PyTree]:
  """`init(key) -> params`."""
  network = build_network(config)
  classes = jnp.zeros((1,), jnp.int32) if network.num_classes else None
  return lambda key: network.init(key, jnp.zeros((1, *image_shape(config))), jnp.zeros((1,)), classes)["params"]


def build_optimizer(config: ConfigDict) -> optax.GradientTransformation:
  """The optimizer chain."""
  return optim.adam(**config.optimizer)


def build_loss(config: ConfigDict) -> Callable[[PyTree, Array, PyTree], tuple[Array, dict[str, Array]]]:
  """`loss_fn(params, keys, batch)` for `train.train_step`."""
  network, process, prediction = build_network(config), build_process(config), build_prediction(config)
  times = losses.uniform(process, None if process.num_steps else config.loss.t_min)
  weighting = choose(config.loss.weighting, _WEIGHTINGS, "config.loss.weighting")

  def loss_fn(params, keys, batch):
    classes = batch["label"] if network.num_classes else None
    rngs = {"dropout": jax.random.fold_in(keys[0], 2)}

    def apply(x_t, label):
      return network.apply({"params": params}, x_t, label, classes, train=True, rngs=rngs)

    return losses.denoising_loss(keys, apply, process, prediction, batch["image"], times=times, weighting=weighting)

  return loss_fn


def build_data(config: ConfigDict) -> tuple[data.Source, data.Source | None]:
  """The training images and the held-out ones (None if the config keeps none), their shape and labels checked."""
  c = config.data
  makers = {
    "digits": lambda: (data.digits(), None),
    "mnist": lambda: (data.mnist(), None),
    "arrays": lambda: (data.arrays(c.path), None),
    "folder": lambda: _folders(c),
    "tfds": lambda: tuple(
      data.TfdsSource(c.name, split, c.image_size, c.channels, c.path) if split else None
      for split in (c.train_split, c.eval_split)
    ),
  }
  train, held_out = choose(c.source, makers, "config.data.source")()
  # Decoded and checked before anything else happens to them, so that no broken file or label shows later.
  train, held_out = (source and data.in_memory(source) for source in (train, held_out))
  for source in (train, held_out):
    if source is not None:
      _check_images(config, source)
  if held_out is None and c.hold_out:
    train, held_out = data.hold_out(train, c.hold_out)
  return train, held_out


def _folders(c: ConfigDict) -> tuple[data.Source, data.Source | None]:
  if not c.path:
    raise ValueError("Got no folder of images; set --config.data.path=<folder>.")
  root = Path(c.path)
  train, evaluation = ((split and (root / split).is_dir()) for split in (c.train_split, c.eval_split))
  if not train and not evaluation:
    return data.FolderSource(root, c.image_size, c.channels), None
  if not train or (c.eval_split and not evaluation):
    missing = c.eval_split if train else c.train_split
    raise ValueError(
      f"Got the folder {root} with data.train_split={c.train_split!r}, data.eval_split={c.eval_split!r}, of which only one"
      f" is in it; wanted {root / missing} too, or neither. Correct the name, or clear --config.data.eval_split=''."
    )
  held_out = data.FolderSource(root / c.eval_split, c.image_size, c.channels) if evaluation else None
  return data.FolderSource(root / c.train_split, c.image_size, c.channels), held_out


def _check_images(config: ConfigDict, source: data.Source) -> None:
  shape = source[0]["image"].shape
  if shape != image_shape(config):
    square = "" if shape[0] == shape[1] else " Only square images are supported."
    raise ValueError(
      f"Got images of shape {shape} from data.source={config.data.source!r}; the config wants {image_shape(config)}. Set"
      f" --config.data.image_size and --config.data.channels.{square}"
    )
  classes, labels = config.network.num_classes, getattr(source, "labels", None)
  if classes and labels is not None and (np.min(labels) < 0 or np.max(labels) >= classes):
    raise ValueError(
      f"Got data with labels {np.min(labels)} to {np.max(labels)} for network.num_classes={classes}; wanted labels from"
      f" 0 to {classes - 1}."
    )


def build_labels(config: ConfigDict, wanted: list[int] | None, count: int) -> np.ndarray | None:
  """Class labels [count] for sampling: those wanted, over and over; all classes in turn by default; None if unconditional.

  Raises:
    ValueError: if labels are wanted of a model that knows none, or are out of range.
  """
  classes = config.network.num_classes
  if not classes:
    if wanted is not None:
      raise ValueError(
        f"Got --labels={','.join(map(str, wanted))} for a model that was trained without classes; leave it out."
      )
    return None
  wanted = list(range(classes)) if wanted is None else wanted
  if not wanted or min(wanted) < 0 or max(wanted) >= classes:
    raise ValueError(f"Got --labels={','.join(map(str, wanted))}; wanted labels from 0 to {classes - 1}.")
  return np.resize(np.array(wanted, np.int32), count)


def build_denoise(config: ConfigDict, params: PyTree, classes: Array | None) -> Denoise:
  """The denoiser of trained parameters, clipped if the config says so."""
  network, process = build_network(config), build_process(config)

  def apply(x_t, label):
    return network.apply({"params": params}, x_t, label, classes)

  denoise = predictions.denoiser(apply, process, build_prediction(config))
  return guidance.clip(denoise) if config.sampling.clip else denoise


def build_grid(config: ConfigDict, process: Process) -> np.ndarray:
  """The grid of times of the config's sampler."""
  c = config.sampling
  if c.grid:
    name = c.grid
  elif c.sampler == "heun" or (c.sampler == "ddim" and not process.num_steps):
    name = "log_snr"
  else:
    name = "trailing" if process.num_steps else "uniform"
  grids = sampling.grids
  makers = {
    "trailing": grids.trailing,
    "leading": grids.leading,
    "linspace": grids.linspace,
    "log_snr": grids.log_snr,
    "karras": grids.karras,
    "uniform": lambda p, n: grids.uniform(p, n, t_min=0.0 if p.num_steps else p.t_min),
  }
  return choose(name, makers, "config.sampling.grid")(process, c.num_steps)


def build_sampler(config: ConfigDict) -> Callable[[Array, Denoise], tuple[Array, Array]]:
  """`run(keys, denoise) -> (images [B, H, W, C] in [-1, 1], NFE)` for one key a sample, from noise to data."""
  c, process, shape = config.sampling, build_process(config), image_shape(config)
  name = choose(c.sampler, SAMPLERS, "a sampler")

  def start(keys):
    return process.prior(randomness.fold_in(keys, 0), (keys.shape[0], *shape))

  if name == "ode":

    def integrate(keys, denoise):
      t_end = max(process.t_min, 1e-3)
      x, nfe = sampling.ode(process, denoise, start(keys), process.t_max, t_end, rtol=c.tolerance, atol=c.tolerance)
      return denoise(x, t_end), nfe + 1

    return integrate

  makers = {
    "ancestral": lambda: sampling.ancestral(process, c.variance),
    "ddim": lambda: sampling.ddim(process, c.eta),
    "euler_maruyama": lambda: sampling.euler_maruyama(process),
    "heun": lambda: sampling.heun(process),
  }
  sampler, times = makers[name](), build_grid(config, process)
  steps = len(times) - 1

  def run(keys, denoise):
    x = sampling.sample(randomness.fold_in(keys, 1), sampler, denoise, start(keys), times)
    return x, jnp.asarray(2 * steps - 1 if name == "heun" else steps)

  return run


def build_generate(
  config: ConfigDict, mesh: jax.sharding.Mesh
) -> Callable[[PyTree, Array, Array | None], tuple[Array, Array]]:
  """`generate(params, keys [B], classes [B] or None) -> (images, NFE)`, compiled, the batch split over the mesh.

  Raises:
    ValueError: if the sampling batch cannot be split over the devices, or the config's sampler is wrong.
  """
  parallel.check_batch(config.sampling.batch_size, mesh.size, "sampling batch size")
  run, split, whole = build_sampler(config), parallel.split(mesh), parallel.replicated(mesh)

  def generate(params, keys, classes):
    return run(keys, build_denoise(config, params, classes))

  return jax.jit(generate, in_shardings=(whole, split, split), out_shardings=(split, whole))
