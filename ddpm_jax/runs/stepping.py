"""The optimizer and the train step of an experiment."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ddpm_jax import config, data, losses, networks, training
from ddpm_jax.config import Experiment
from ddpm_jax.devices import costs, parallel
from ddpm_jax.models import Model
from ddpm_jax.names import choose
from ddpm_jax.runs import frozen as frozen_module
from ddpm_jax.training import ema, optim

Array = jax.Array
PyTree = Any
Batch = dict[str, Any]


def mesh_of(experiment: Experiment, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
  """Return the mesh that an experiment is trained over, of all devices by default.

  Raises:
    ValueError: if they cannot be laid out so, or its batch cannot be split over them.
  """
  c = experiment.training
  mesh = parallel.make_mesh(experiment.parallel.data, experiment.parallel.fsdp, devices)
  parallel.check_batch(c.batch_size, mesh.size)
  training.check_accumulate(c.batch_size, mesh.size, c.accumulate)
  return mesh


def schedule(experiment: Experiment) -> Callable[[Array | int], Array]:
  """Return the learning rate at each step."""
  c = experiment.optimizer
  # A schedule that ends does so with the training, unless the config says otherwise.
  name = choose(c.schedule, optim.SCHEDULES, "config.optimizer.schedule")
  return optim.schedule(
    c.learning_rate,
    name=c.schedule,
    warmup_steps=c.warmup_steps,
    decay_steps=c.decay_steps or (0 if name == "inverse_sqrt" else experiment.training.steps),
    final_factor=c.final_factor,
  )


def optimizer(experiment: Experiment) -> optax.GradientTransformation:
  """Return the optimizer chain, with the averages of the parameters.

  What an objective trains beside the model has the same optimizer, without averages.
  """
  c = experiment.optimizer
  rate: Any = schedule(experiment)
  choose(c.name, optim.OPTIMIZERS, "config.optimizer.name")
  # A plain number, where it is one: some optimizers take no other.
  rate = c.learning_rate if c.schedule == "constant" and not c.warmup_steps else rate
  arguments = optim.parse_arguments(c.arguments)
  return optim.chain(
    rate,
    name=c.name,
    arguments=arguments,
    clip_norm=c.clip_norm or None,
    averages=averages(experiment),
    trainable=networks.trainable_mask,
    extra=optim.optimizer(c.name, rate, arguments) if _trains_extra(experiment) else None,
  )


def _trains_extra(experiment: Experiment) -> bool:
  """Return whether the objective trains something beside the model."""
  init = experiment.objective.init
  if init is losses.Objective._field_defaults["init"]:
    return False

  def extra(key, frozen):
    return init(key, experiment.model.init(key), frozen.get("objective", ()))[0]

  found = jax.eval_shape(extra, jax.random.key(0), frozen_module.unsharded_shapes(experiment))
  return bool(jax.tree.leaves(found))


def averages(experiment: Experiment) -> optax.GradientTransformation:
  """Return the averages of the parameters, as a part of the optimizer chain."""
  c = experiment.ema
  if c.snapshot_every and c.kind != "power":
    raise ValueError(
      f"Got config.ema.snapshot_every={c.snapshot_every} with kind={c.kind!r}; expected 0, or more with the kind 'power', whose"
      " snapshots can be added to averages of other widths."
    )
  if c.kind == "power" and not c.stds:
    raise ValueError("Got no config.ema.stds for the kind 'power'; expected at least one width, such as (0.05, 0.1).")
  makers = {
    "fixed": lambda: [ema.fixed(c.decay)],
    "half_life": lambda: [ema.half_life(c.half_life, experiment.training.batch_size, c.ramp_up or None)],
    "power": lambda: [ema.power(std) for std in c.stds],
  }
  return ema.params_ema(*choose(c.kind, makers, "config.ema.kind")())


def encode(model: Model, frozen: Mapping[str, PyTree] | None, keys: Array, batch: Batch) -> Batch:
  """Return a batch of training with `x` and `given` in it, as objectives take it."""
  found = {
    "x": model.encode(keys, batch["image"], frozen),
    "given": model.encode_conditions(keys, batch, frozen, train=True),
  }
  return {name: leaf for name, leaf in batch.items() if name != "image"} | found


def step(
  experiment: Experiment, mesh: jax.sharding.Mesh
) -> Callable[..., tuple[training.TrainState, training.Metrics]]:
  """Return the train step over a mesh, for `parallel.jit_step`."""
  return partial(
    training.train_step,
    objective=experiment.objective,
    optimizer=optimizer(experiment),
    encode=partial(encode, experiment.model),
    accumulate=experiment.training.accumulate,
    unroll=mesh.devices.flat[0].platform == "cpu",
    distribute=parallel.shard_gradient(mesh),
  )


def flops_per_image(experiment: Experiment, batch: Batch) -> float:
  """Return the FLOPs of matrix products and convolutions of the loss and its gradient for one sample.

  What rematerialization computes again counts too, except of a network that can be made without (`remat`).

  Args:
    experiment: what is trained.
    batch: the shapes of one sample's batch [1, ...].
  """
  module = experiment.model.network.module
  if getattr(module, "remat", "none") != "none" and "model.network.remat" in experiment.tree.parameters:
    experiment = config.build(config.replace(experiment.tree, "model.network.remat", "none"))
  model, objective = experiment.model, experiment.objective
  key = jax.eval_shape(jax.random.key, 0)
  frozen = frozen_module.unsharded_shapes(experiment)

  def gradient(params, key, batch, frozen):
    keys = key[None]
    extra, memory = objective.init(key, params, frozen.get("objective", ()))
    batch = encode(model, frozen, keys, batch)
    batch |= objective.prepare(keys, memory)
    context = losses.Context(jnp.zeros((), jnp.int32), frozen.get("objective", ()), params, memory)

    def loss(params):
      return objective.loss({"model": params, "extra": extra}, context, keys, batch)

    return jax.value_and_grad(loss, has_aux=True)(params)

  return costs.matmul_flops(jax.make_jaxpr(gradient)(jax.eval_shape(model.init, key), key, batch, frozen))


def batch_shapes(experiment: Experiment, size: int, source: Any = None) -> Batch:
  """Return the shapes of a training batch of `size` samples: as a data source gives them or, without one, of images and what conditions read."""
  shapes = {"image": jax.ShapeDtypeStruct((size, *experiment.data.shape), jnp.float32)}
  if source is not None:
    return {
      name: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), jnp.float32 if name == "image" else leaf.dtype)
      for name, leaf in data.read(source, [0]).items()
    }
  shapes["classes"] = jax.ShapeDtypeStruct((size,), jnp.int32)
  for name, condition in experiment.model.conditions.items():
    if condition.from_data is None:
      # What the data have by its name is one array, whatever the network is then given.
      leaf = jax.tree.leaves(condition.shape)[0]
      shapes[name] = jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype)
  return shapes
