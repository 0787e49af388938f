"""From a config to objects: the one place where strings become functions, and where a config's mistakes are found."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from ddpm_jax import (
  costs,
  data,
  ema,
  guidance,
  losses,
  optim,
  parallel,
  predictions,
  processes,
  randomness,
  sampling,
  schedules,
  train,
)
from ddpm_jax.networks import UNet
from ddpm_jax.predictions import Denoise, Prediction
from ddpm_jax.processes import Process
from ddpm_jax.schema import choose

Array = jax.Array
PyTree = Any

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
WEIGHTINGS = {
  "simple": lambda c, process: losses.simple,
  "snr": lambda c, process: losses.snr,
  "snr_plus_one": lambda c, process: losses.snr_plus_one,
  "truncated_snr": lambda c, process: losses.truncated_snr,
  "min_snr": lambda c, process: losses.min_snr(),
  "p2": lambda c, process: losses.p2(),
  "likelihood": lambda c, process: losses.likelihood(process),
  "edm": lambda c, process: losses.edm(c.sigma_data),
  "sigmoid": lambda c, process: losses.sigmoid(),
}
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
# Bounds of log-SNR between the noise levels whose losses are logged apart.
_LEVELS = (-5.0, 0.0, 5.0)
_LEVEL_NAMES = tuple(f"loss_by_log_snr/{name}" for name in ("below_-5", "-5_to_0", "0_to_5", "above_5"))
SAMPLERS = (*_STEP_RULES, "ode")
# Rules that take even steps in t, as the model was trained; the others solve in the log-SNR.
_EVEN_IN_TIME = ("ancestral", "euler_ancestral", "euler_maruyama", "reverse_diffusion")


def _churn(c: ConfigDict) -> dict[str, float]:
  return {name: c[name] for name in ("s_churn", "s_min", "s_max", "s_noise")}


def build_process(config: ConfigDict) -> Process:
  """The forward process."""
  c = config.process
  n = c.num_steps
  schedule = {
    "linear": lambda: schedules.linear(n, c.beta_min / n, c.beta_max / n),
    "scaled_linear": lambda: schedules.scaled_linear(n, c.beta_min / n, c.beta_max / n),
    "cosine": lambda: schedules.cosine(n),
    "sigmoid": lambda: schedules.sigmoid(n),
    "table": lambda: np.asarray(c.betas, np.float64),
  }
  if (c.schedule == "table" and len(c.betas) != n) or (c.betas and c.schedule != "table"):
    raise ValueError(
      f"Got config.process.schedule={c.schedule!r} with {len(c.betas)} betas and num_steps={n}; wanted as many betas as steps"
      " with the schedule 'table', and none with another."
    )
  sigmas = {name: c[name] for name in ("sigma_min", "sigma_max") if c[name]}

  def discrete():
    betas = choose(c.schedule, schedule, "config.process.schedule")()
    return processes.discrete(schedules.zero_terminal_snr(betas) if c.zero_terminal_snr else betas)

  makers = {
    "vp": lambda: processes.vp(c.beta_min, c.beta_max),
    "sub_vp": lambda: processes.sub_vp(c.beta_min, c.beta_max),
    "ve": lambda: processes.ve(**sigmas),
    "edm": lambda: processes.edm(**sigmas),
    "rectified_flow": processes.rectified_flow,
    "cosine": processes.cosine,
    "discrete": discrete,
  }
  return choose(c.name, makers, "config.process.name")()


def build_prediction(config: ConfigDict) -> Prediction:
  """The meaning of the network's output."""
  known = {
    "eps": predictions.EPS,
    "x0": predictions.X0,
    "v": predictions.V,
    "score": predictions.SCORE,
    "velocity": predictions.VELOCITY,
    "edm": predictions.edm(config.sigma_data),
  }
  prediction = choose(config.prediction, known, "config.prediction")
  return predictions.learned_range(prediction) if config.learned_variance else prediction


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
  """[H, W, C] of the images."""
  return config.data.image_size, config.data.image_size, config.data.channels


def build_network(config: ConfigDict) -> UNet:
  """The network, checked against the images it is to take."""
  c = dict(config.network)
  dtype = choose(c.pop("dtype"), _DTYPES, "config.network.dtype")
  out_channels = config.data.channels * (2 if config.learned_variance else 1)
  heights = [config.data.image_size / 2**level for level in range(len(c["multipliers"]))]
  resolutions = c.pop("attention_resolutions")
  for wanted in resolutions:
    if wanted not in heights:
      raise ValueError(
        f"Got config.network.attention_resolutions={tuple(resolutions)} for images of {config.data.image_size}, whose levels"
        f" have heights of {', '.join(f'{height:g}' for height in heights)}; wanted some of these, or none: ()."
      )
  for way in ("downsample", "upsample"):
    c[way] = tuple(c[way].split(",")) if "," in c[way] else c[way]
  levels = tuple(heights.index(wanted) for wanted in resolutions)
  network = UNet(out_channels=out_channels, attention_levels=levels, dtype=dtype, **c)
  network.check_input(image_shape(config))
  return network


def build_params_init(config: ConfigDict) -> Callable[[Array], PyTree]:
  """`init(key) -> params`."""
  network = build_network(config)
  classes = jnp.zeros((1,), jnp.int32) if network.num_classes else None
  return lambda key: network.init(key, jnp.zeros((1, *image_shape(config))), jnp.zeros((1,)), classes)["params"]


def build_schedule(config: ConfigDict) -> Callable[[Array | int], Array]:
  """The learning rate at each step."""
  c = config.optimizer
  # A schedule that ends does so with the training, unless the config says otherwise.
  end = (
    0 if choose(c.schedule, optim.SCHEDULES, "config.optimizer.schedule") == "inverse_sqrt" else config.training.steps
  )
  return optim.schedule(
    c.learning_rate,
    name=c.schedule,
    warmup_steps=c.warmup_steps,
    decay_steps=c.decay_steps or end,
    final_factor=c.final_factor,
  )


def build_optimizer(config: ConfigDict) -> optax.GradientTransformation:
  """The optimizer chain, with the averages of the parameters."""
  c, rate = config.optimizer, build_schedule(config)
  choose(c.name, optim.OPTIMIZERS, "config.optimizer.name")
  return optim.chain(
    # A plain number, where it is one: some optimizers take no other.
    c.learning_rate if c.schedule == "constant" and not c.warmup_steps else rate,
    name=c.name,
    arguments=optim.parse_arguments(c.arguments),
    clip_norm=c.clip_norm or None,
    averages=_build_averages(config),
  )


def _build_averages(config: ConfigDict) -> optax.GradientTransformation:
  c = config.ema
  if c.snapshot_every < 0 or (c.snapshot_every and c.kind != "power"):
    raise ValueError(
      f"Got config.ema.snapshot_every={c.snapshot_every} with kind={c.kind!r}; wanted 0, or more with the kind 'power', whose"
      " snapshots can be added to averages of other widths."
    )
  if c.kind == "power" and not c.stds:
    raise ValueError("Got no config.ema.stds for the kind 'power'; wanted at least one width, such as (0.05, 0.1).")
  makers = {
    "fixed": lambda: [ema.fixed(c.decay)],
    "half_life": lambda: [ema.half_life(c.half_life, config.training.batch_size, c.ramp_up or None)],
    "power": lambda: [ema.power(std) for std in c.stds],
  }
  return ema.params_ema(*choose(c.kind, makers, "config.ema.kind")())


def build_loss(config: ConfigDict) -> Callable[[PyTree, Array, PyTree], tuple[Array, dict[str, Array]]]:
  """`loss_fn(params, keys, batch)` for `train.train_step`; a batch may bring the `times` drawn for it (`build_times`)."""
  network, process, prediction = build_network(config), build_process(config), build_prediction(config)
  predictions.check_readable(process, prediction)
  c, times = config.loss, _times(config, process)
  weighting = choose(c.weighting, WEIGHTINGS, "config.loss.weighting")(config, process)
  if config.learned_variance and process.num_steps is None:
    raise ValueError(
      f"Got config.learned_variance with process.name={config.process.name!r}; wanted a discrete process, whose steps have a"
      " variance to learn. Set --config.process.name=discrete, or leave learned_variance out."
    )
  loss = partial(losses.hybrid_loss, vlb_weight=c.vlb_weight) if config.learned_variance else losses.denoising_loss

  def loss_fn(params, keys, batch):
    classes = batch["label"] if network.num_classes else None

    def apply(x_t, label):
      if not network.dropout:
        return network.apply({"params": params}, x_t, label, classes, train=True)

      # A sample's masks follow from its own key, however the batch is split.
      def one(x_t, label, classes, key):
        x_t, label, classes = jax.tree.map(lambda leaf: leaf[None], (x_t, label, classes))
        return network.apply({"params": params}, x_t, label, classes, train=True, rngs={"dropout": key})[0]

      return jax.vmap(one)(x_t, label, classes, randomness.fold_in(keys, 2))

    drawn = (lambda _: batch["times"]) if "times" in batch else times
    return loss(keys, apply, process, prediction, batch["image"], times=drawn, weighting=weighting)

  return loss_fn


def _times(config: ConfigDict, process: Process) -> losses.TimeDistribution:
  c, t_min = config.loss, None if process.num_steps else config.loss.t_min
  distributions = {
    "uniform": lambda: losses.uniform(process, t_min),
    "low_discrepancy": lambda: losses.low_discrepancy(process, t_min),
    "log_normal": lambda: losses.log_normal(process, c.times_mean, c.times_std),
    "logit_normal": lambda: losses.logit_normal(process, c.times_mean, c.times_std),
  }
  return choose(c.times, distributions, "config.loss.times")()


def build_step(
  config: ConfigDict, mesh: jax.sharding.Mesh
) -> Callable[[train.TrainState, PyTree], tuple[train.TrainState, train.Metrics]]:
  """The train step over a mesh, for `parallel.jit_step`."""
  process = build_process(config)
  times = _times(config, process)

  def prepare(keys):
    # For the batch as a whole: some times are spread evenly over it.
    return {"times": times(randomness.fold_in(keys, 0))}

  def summarize(details):
    level = jnp.searchsorted(jnp.asarray(_LEVELS, jnp.float32), process.log_snr(details["t"]).astype(jnp.float32))
    member = level[:, None] == jnp.arange(len(_LEVELS) + 1)
    totals, counts = jnp.sum(jnp.where(member, details["loss"][:, None], 0), axis=0), jnp.sum(member, axis=0)
    return {name: train.Mean(totals[index], counts[index]) for index, name in enumerate(_LEVEL_NAMES)}

  return partial(
    train.train_step,
    loss_fn=build_loss(config),
    optimizer=build_optimizer(config),
    prepare=prepare,
    summarize=summarize,
    accumulate=config.training.accumulate,
    unroll=mesh.devices.flat[0].platform == "cpu",
    distribute=parallel.over(mesh),
  )


def flops_per_image(config: ConfigDict) -> float:
  """FLOPs of matrix products and convolutions of the loss and its gradient for one image, without any that rematerialization repeats."""
  config = ConfigDict(config.to_dict())
  config.network.remat = "none"
  loss_fn, init = build_loss(config), build_params_init(config)

  key = jax.eval_shape(jax.random.key, 0)

  def gradient(params, key, batch):
    return jax.value_and_grad(loss_fn, has_aux=True)(params, key[None], batch)

  return costs.matmul_flops(jax.make_jaxpr(gradient)(jax.eval_shape(init, key), key, batch_shapes(config, 1)))


def batch_shapes(config: ConfigDict, size: int) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes of a training batch."""
  return {
    "image": jax.ShapeDtypeStruct((size, *image_shape(config)), jnp.float32),
    "label": jax.ShapeDtypeStruct((size,), jnp.int32),
  }


def build_sources(config: ConfigDict) -> tuple[data.Source, data.Source | None]:
  """The training images and those of the split for evaluation (None if there is none), as they lie on disk."""
  c = config.data
  makers = {
    "digits": lambda: (data.digits(), None),
    "mnist": lambda: (data.mnist(), None),
    "arrays": lambda: (data.arrays(c.path), None),
    "folder": lambda: _folders(
      c,
      lambda path: data.FolderSource(
        path, c.image_size, c.channels, c.crop, choose(c.resize, data.RESIZES, "config.data.resize")
      ),
    ),
    "packed": lambda: _folders(c, data.PackedSource),
    "tfds": lambda: tuple(
      data.TfdsSource(
        c.name, split, c.image_size, c.channels, c.path, c.crop, choose(c.resize, data.RESIZES, "config.data.resize")
      )
      if split
      else None
      for split in (c.train_split, c.eval_split)
    ),
  }
  return choose(c.source, makers, "config.data.source")()


def build_data(config: ConfigDict) -> tuple[data.Source, data.Source | None]:
  """The training images and the held-out ones (None if the config keeps none), their shape and labels checked."""
  c = config.data
  skip = choose(c.broken, ("stop", "skip"), "config.data.broken") == "skip"
  # Decoded and checked before anything else happens to them, so that no broken file or label shows later.
  train, held_out = build_sources(config)
  train, held_out = data.in_memory(train, c.broken), held_out and data.in_memory(held_out, c.broken)
  for source in (train, held_out):
    if source is not None:
      _check_images(config, data.SkipBroken(source) if skip else source)
  if held_out is None and c.hold_out:
    train, held_out = data.hold_out(train, c.hold_out)
  if skip:
    # Last, so that no held-out image stands in for a broken one in training.
    train, held_out = data.SkipBroken(train), held_out and data.SkipBroken(held_out)
  return train, held_out


def _folders(c: ConfigDict, make: Callable[[Path], data.Source]) -> tuple[data.Source, data.Source | None]:
  if not c.path:
    raise ValueError("Got no folder of images; set --config.data.path=<folder>.")
  root = Path(c.path)
  train, evaluation = ((split and (root / split).is_dir()) for split in (c.train_split, c.eval_split))
  if not train and not evaluation:
    return make(root), None
  if not train or (c.eval_split and not evaluation):
    missing = c.eval_split if train else c.train_split
    raise ValueError(
      f"Got the folder {root} with data.train_split={c.train_split!r}, data.eval_split={c.eval_split!r}, of which only one"
      f" is in it; wanted {root / missing} too, or neither. Correct the name, or clear --config.data.eval_split=''."
    )
  held_out = make(root / c.eval_split) if evaluation else None
  return make(root / c.train_split), held_out


def _check_images(config: ConfigDict, source: data.Source) -> None:
  shape = source[0]["image"].shape
  if shape != image_shape(config):
    square = "" if shape[0] == shape[1] else " Only square images are supported."
    raise ValueError(
      f"Got images of shape {shape} from data.source={config.data.source!r}; the config wants {image_shape(config)}. Set"
      f" --config.data.image_size and --config.data.channels.{square}"
    )
  settings, wanted = getattr(source, "settings", None), {"crop": config.data.crop, "resize": config.data.resize}
  if settings is not None and settings != wanted:
    raise ValueError(
      f"Got packed images that were made with {settings}; the config wants {wanted}. Set --config.data.crop={settings['crop']}"
      f" --config.data.resize={settings['resize']}, or pack them again by --mode=prepare."
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


def build_sampler(config: ConfigDict) -> Callable[[Array, Denoise], tuple[Array, Array]]:
  """`run(keys, denoise) -> (images [B, H, W, C] in [-1, 1], NFE)` for one key a sample, from noise to data."""
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
      x, nfe = sampling.ode(process, denoise, start(keys), process.t_max, t_end, rtol=c.tolerance, atol=c.tolerance)
      return predictions.x_0_of(denoise(x, t_end)), nfe + 1

    return integrate

  sampler, times = _STEP_RULES[name](c, process), build_grid(config, process)
  if c.corrector_steps:
    sampler = sampling.with_langevin(sampler, process, snr=c.corrector_snr, num_steps=c.corrector_steps)
  nfe = sampling.nfe(sampler, process, times)

  def run(keys, denoise):
    x = sampling.sample(randomness.fold_in(keys, 1), sampler, denoise, start(keys), times)
    return x, jnp.asarray(nfe)

  return run


def build_generate(config: ConfigDict, mesh: jax.sharding.Mesh) -> Callable[..., tuple[Array, Array]]:
  """`generate(params, seed, first, classes [B] or None) -> (images, NFE)`, compiled, the batch split over the mesh.

  Image i of the batch is number `first + i` of that seed, whatever the batch size. Parameters may lie split over the mesh; the images
  are whole on every device.

  Raises:
    ValueError: if the sampling batch cannot be split over the devices, or the config's sampler is wrong.
  """
  size = config.sampling.batch_size
  parallel.check_batch(size, mesh.size, "sampling batch size")
  run, split, whole = build_sampler(config), parallel.split(mesh), parallel.replicated(mesh)

  def generate(params, seed, first, classes):
    # Folded with 2: a training run of the same seed uses what 0 and 1 would give.
    key = jax.random.fold_in(jax.random.key(seed), 2)
    keys = jax.lax.with_sharding_constraint(randomness.sample_keys(key, first + jnp.arange(size)), split)
    params = jax.lax.with_sharding_constraint(params, whole)
    if classes is not None:
      classes = jax.lax.with_sharding_constraint(classes, split)
    return run(keys, build_denoise(config, params, classes))

  return jax.jit(generate, out_shardings=whole)
