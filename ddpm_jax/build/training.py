"""The optimizer, the loss and the train step of a config."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from ddpm_jax import costs, ema, losses, networks, optim, parallel, randomness, train
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


def build_objective(config: ConfigDict) -> losses.Objective:
  """What is minimized."""
  network, process, prediction = build_network(config), build_process(config), build_prediction(config)
  c, times = config.loss, _times(config, process)

  def apply(params, x, time, given, *, train=False, keys=None):
    return network.apply({"params": params}, x, time, **given, train=train, dropout_keys=keys)

  if classifies(config):
    return losses.classification(apply, process, prediction, times=times)
  weighting = choose(c.weighting, WEIGHTINGS, "config.loss.weighting")(config, process)
  if config.learned_variance and process.num_steps is None:
    raise ValueError(
      f"Got config.learned_variance with process.name={config.process.name!r}; wanted a discrete process, whose steps have a"
      " variance to learn. Set --config.process.name=discrete, or leave learned_variance out."
    )
  return losses.denoising(apply, process, prediction, times=times, weighting=weighting, vlb_weight=c.vlb_weight)


def build_encode(config: ConfigDict) -> Callable[[Any, Array, PyTree], PyTree]:
  """`encode(frozen, keys, batch)` for `train.train_step`: the images as `x`, and what the network is given beside them."""
  c, classed = config.loss, not classifies(config) and config.network.num_classes

  def encode(frozen, keys, batch):
    image = batch["image"]
    found = condition.training_image(config, keys, image) if config.superres.factor else condition.Condition()
    if classed:
      classes = batch["label"]
      if c.label_dropout:
        hidden = jax.vmap(jax.random.bernoulli, (0, None))(randomness.fold_in(keys, 3), c.label_dropout)
        classes = jnp.where(hidden, null_class(config), classes)
      found = found._replace(classes=classes)
    given = {} if classifies(config) else found.arguments
    return {name: leaf for name, leaf in batch.items() if name != "image"} | {"x": image, "given": given}

  return encode


def build_loss(config: ConfigDict) -> Callable[[PyTree, Array, PyTree], tuple[Array, dict[str, Array]]]:
  """`loss_fn(params, keys, batch) -> (loss, details)` of the objective, for a batch as it is read."""
  objective, encode = build_objective(config), build_encode(config)
  context = losses.Context(jnp.zeros((), jnp.int32), (), None, ())

  def loss_fn(params, keys, batch):
    return objective.loss({"model": params, "extra": ()}, context, keys, encode(None, keys, batch))

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
  return partial(
    train.train_step,
    objective=build_objective(config),
    optimizer=build_optimizer(config),
    encode=build_encode(config),
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
