"""From a config to objects: the one place where strings become functions, and where a config's mistakes are found."""

import difflib
from collections.abc import Callable, Mapping
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
  workdir,
)
from ddpm_jax.networks import UNet
from ddpm_jax.predictions import Denoise, Prediction
from ddpm_jax.processes import Process

Array = jax.Array
PyTree = Any

_PREDICTIONS = {"eps": predictions.EPS, "x0": predictions.X0, "v": predictions.V}
_WEIGHTINGS = {"simple": losses.simple, "snr_plus_one": losses.snr_plus_one}
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
SAMPLERS = ("ancestral", "ddim", "euler_maruyama", "heun", "ode")


def default_config() -> ConfigDict:
  """Every key that a config has, with the settings of DDPM on CIFAR-10 (Ho et al. 2020). Recipes change some."""
  config = ConfigDict()
  config.seed = 0
  config.data = ConfigDict(
    {
      "source": "tfds",  # digits, mnist, arrays, folder or tfds
      "name": "cifar10",  # of a TFDS data set
      "path": "",  # of an .npz file, an image folder, or the TFDS folder
      "image_size": 32,
      "channels": 3,
      "flip": True,
      "train_split": "train",
      "eval_split": "test",  # of TFDS, or a sub-folder of an image folder that also has one named as train_split
      "hold_out": 0,  # images kept from training for evaluation, where there is no eval_split
      "num_threads": 4,
    }
  )
  config.process = ConfigDict(
    {
      "name": "discrete",  # discrete or vp
      "schedule": "linear",  # of a discrete process: linear or cosine
      "num_steps": 1000,  # of a discrete process
      "beta_min": 0.1,  # of the continuous process; a linear schedule has betas from beta_min/N to beta_max/N
      "beta_max": 20.0,
    }
  )
  config.prediction = "eps"  # eps, x0 or v
  config.loss = ConfigDict(
    {
      "weighting": "simple",  # simple or snr_plus_one
      "t_min": 1e-5,  # the smallest time of a continuous process
    }
  )
  config.network = ConfigDict(
    {
      "channels": 128,
      "multipliers": (1, 2, 2, 2),
      "blocks": 2,
      "attention_resolutions": (16,),
      "middle_attention": True,
      "heads": 1,
      "groups": 32,
      "dropout": 0.1,
      "num_classes": 0,  # above 0: conditional on the data's labels
      "dtype": "float32",  # of the computation: float32 or bfloat16
    }
  )
  config.optimizer = ConfigDict(
    {
      "learning_rate": 2e-4,
      "b1": 0.9,
      "b2": 0.999,
      "eps": 1e-8,
      "warmup_steps": 5000,
      "clip_norm": 1.0,
      "ema_decay": 0.9999,
    }
  )
  config.training = ConfigDict(
    {
      "batch_size": 128,
      "steps": 800_000,
      "log_every": 100,
      "checkpoint_every": 5000,
      "sample_every": 5000,
      "keep_checkpoints": 2,
    }
  )
  config.sampling = ConfigDict(
    {
      "sampler": "ancestral",  # one of SAMPLERS
      "num_steps": 1000,
      "grid": "",  # empty: what suits the sampler and the process
      "variance": "large",  # of the ancestral sampler: small or large
      "eta": 0.0,  # of ddim
      "clip": True,  # the estimates of x_0 to [-1, 1]
      "tolerance": 1e-5,  # of ode
      "batch_size": 128,
      "preview_steps": 50,  # of DDIM, for the grids written during training
    }
  )
  config.evaluation = ConfigDict(
    {
      "num_samples": 1000,
      "k": 5,  # nearest neighbour of precision and recall
    }
  )
  return config


def config_of_run(given: ConfigDict | None, folder: Path) -> ConfigDict:
  """The config given on the command line, or else that of the run in the folder.

  Raises:
    ValueError: if there is neither, or the given one is no ConfigDict.
  """
  if isinstance(given, ConfigDict):
    return ConfigDict(given)
  if given is not None:
    raise ValueError(
      f"Got a config file whose get_config() gives a {type(given).__name__}; wanted a ConfigDict. Start from build.default_config()."
    )
  saved = workdir.read_config(folder)
  if saved is None:
    raise ValueError(
      f"Got no --config, and {folder} holds no run; wanted a recipe, such as --config=configs/digits_vp.py."
    )
  return ConfigDict(saved)


def check_config(config: ConfigDict) -> None:
  """Raises a ValueError if keys are missing or unknown, or a count is below 1. The parts check their own values."""
  known, given = (_keys(c.to_dict()) for c in (default_config(), config))
  for name in sorted(given - known):
    choose(name, known, "a config key")
  if known - given:
    raise ValueError(
      f"Got a config without {', '.join(sorted(known - given))}; wanted every key. Start from build.default_config() and change what differs."
    )
  counts = ["data.image_size", "data.channels", "data.num_threads", "process.num_steps", "sampling.num_steps"]
  counts += ["sampling.preview_steps", "sampling.batch_size", "evaluation.k", "evaluation.num_samples"]
  for name in [*counts, *(f"training.{key}" for key in config.training)]:
    section, key = name.split(".")
    if config[section][key] < 1:
      raise ValueError(f"Got config.{name}={config[section][key]}; wanted at least 1.")
  if not 0 <= config.seed < 2**31:
    raise ValueError(f"Got config.seed={config.seed}; wanted 0 to {2**31 - 1}.")
  if config.sampling.tolerance <= 0:
    raise ValueError(f"Got config.sampling.tolerance={config.sampling.tolerance}; wanted above 0, such as 1e-5.")


def _keys(tree: dict[str, Any], prefix: str = "") -> set[str]:
  return {
    key
    for name, value in tree.items()
    for key in (_keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name})
  }


def choose(name: str, options, what: str) -> Any:
  """The option of that name; a ValueError that names the nearest one if there is none."""
  if name in options:
    return options[name] if isinstance(options, Mapping) else name
  near = difflib.get_close_matches(str(name), list(options), 1)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  raise ValueError(f"Got {name!r} as {what}; wanted one of {', '.join(sorted(options))}.{hint}")


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
