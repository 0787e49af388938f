"""The optimizer, the loss and the train step of a config."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from ddpm_jax import costs, ema, losses, networks, optim, parallel, predictions, randomness, train
from ddpm_jax.build import condition
from ddpm_jax.build.model import (
  build_network,
  build_params_init,
  build_prediction,
  build_process,
  classifies,
  image_shape,
  null_class,
)
from ddpm_jax.processes import Process
from ddpm_jax.schema import choose

Array = jax.Array
PyTree = Any

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
# Bounds of log-SNR between the noise levels whose losses, and a classifier's accuracies, are logged apart.
_LEVELS = (-5.0, 0.0, 5.0)
_LEVEL_NAMES = ("below_-5", "-5_to_0", "0_to_5", "above_5")


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
    trainable=networks.trainable,
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
  c, times = config.loss, _times(config, process)
  if classifies(config):

    def classification(keys, apply, batch, times):
      options = {"times": times, "input_scale": prediction.input_scale}
      return losses.classification_loss(keys, apply, process, batch["image"], batch["label"], **options)

    return _loss_fn(network, lambda keys, batch: {}, classification, times)
  predictions.check_readable(process, prediction)
  weighting = choose(c.weighting, WEIGHTINGS, "config.loss.weighting")(config, process)
  if config.learned_variance and process.num_steps is None:
    raise ValueError(
      f"Got config.learned_variance with process.name={config.process.name!r}; wanted a discrete process, whose steps have a"
      " variance to learn. Set --config.process.name=discrete, or leave learned_variance out."
    )
  loss = partial(losses.hybrid_loss, vlb_weight=c.vlb_weight) if config.learned_variance else losses.denoising_loss

  def denoising(keys, apply, batch, times):
    return loss(keys, apply, process, prediction, batch["image"], times=times, weighting=weighting)

  def given(keys, batch):
    found = condition.training_image(config, keys, batch["image"]) if config.superres.factor else condition.Condition()
    if not network.num_classes:
      return found.arguments
    classes = batch["label"]
    if c.label_dropout:
      hidden = jax.vmap(jax.random.bernoulli, (0, None))(randomness.fold_in(keys, 3), c.label_dropout)
      classes = jnp.where(hidden, null_class(config), classes)
    return found._replace(classes=classes).arguments

  return _loss_fn(network, given, denoising, times)


def _loss_fn(network, conditions, loss, times):
  """The loss with dropout on: `loss(keys, apply, batch, times)` of a network that also takes `conditions(keys, batch)`."""

  def loss_fn(params, keys, batch):
    given = conditions(keys, batch)

    def apply(x_t, label):
      masks = randomness.fold_in(keys, 2)
      return network.apply({"params": params}, x_t, label, **given, train=True, keys=masks)

    return loss(keys, apply, batch, (lambda _: batch["times"]) if "times" in batch else times)

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
    member = level[:, None] == jnp.arange(len(_LEVELS) + 1, dtype=level.dtype)[None]
    counts = jnp.sum(member, axis=0)

    def by_level(name, values):
      totals = jnp.sum(jnp.where(member, values[:, None], 0), axis=0)
      return {
        f"{name}_by_log_snr/{level}": train.Mean(totals[index], counts[index])
        for index, level in enumerate(_LEVEL_NAMES)
      }

    metrics = by_level("loss", details["loss"])
    if "correct" in details:
      metrics |= {"accuracy": jnp.mean(details["correct"])} | by_level("accuracy", details["correct"])
    return metrics

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
