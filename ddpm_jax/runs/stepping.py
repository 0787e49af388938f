"""Build the optimizer and the train step of an experiment."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddpm_jax import config, data, losses, networks, training
from ddpm_jax.config import Experiment
from ddpm_jax.devices import costs, parallel
from ddpm_jax.models import Model
from ddpm_jax.models.inputs import host_items
from ddpm_jax.names import choose
from ddpm_jax.runs import frozen as frozen_module
from ddpm_jax.training import ema, optim

Array = jax.Array
PyTree = Any
Batch = dict[str, Any]


def training_mesh(experiment: Experiment, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
  """Return the mesh to train an experiment on, by default over all devices.

  Raises:
    ValueError: if the devices do not fit the mesh's shape, or if the batch cannot be sharded over them.
  """
  c = experiment.training
  mesh = parallel.make_mesh(experiment.parallel.data, experiment.parallel.fsdp, devices)
  parallel.check_batch(c.batch_size, mesh.size)
  training.check_accumulate(c.batch_size, mesh.size, c.accumulate)
  return mesh


def schedule(experiment: Experiment) -> Callable[[Array | int], Array]:
  """Return the learning rate as a function of the step."""
  c = experiment.optimizer
  # By default, cosine and linear decay end at the last step of training.
  name = choose(c.schedule, optim.SCHEDULES, "config.optimizer.schedule")
  return optim.schedule(
    c.learning_rate,
    name=c.schedule,
    warmup_steps=c.warmup_steps,
    decay_steps=c.decay_steps or (0 if name == "inverse_sqrt" else experiment.training.steps),
    final_factor=c.final_factor,
  )


def optimizer(experiment: Experiment) -> optax.GradientTransformation:
  """Return the optimizer chain, including the averages of the parameters (EMA).

  Parameters that the objective trains in addition to the model (`extra`) have the same optimizer without averages.
  """
  c = experiment.optimizer
  rate: Any = schedule(experiment)
  choose(c.name, optim.OPTIMIZERS, "config.optimizer.name")
  # Pass a constant rate as a plain number, because some optimizers take no schedule.
  rate = c.learning_rate if c.schedule == "constant" and not c.warmup_steps else rate
  arguments = optim.parse_arguments(c.arguments)
  return optim.chain(
    rate,
    name=c.name,
    arguments=arguments,
    clip_norm=c.clip_norm or None,
    averages=params_ema(experiment),
    trainable=networks.trainable_mask,
    extra=optim.optimizer(c.name, rate, arguments) if _trains_extra(experiment) else None,
  )


def _trains_extra(experiment: Experiment) -> bool:
  """Return whether the objective trains parameters in addition to the model."""
  init = experiment.objective.init
  if init is losses.Objective._field_defaults["init"]:
    return False

  def extra(key, frozen):
    return init(key, experiment.model.init(key), frozen.get("objective", ()))[0]

  shapes = jax.eval_shape(extra, jax.random.key(0), frozen_module.unsharded_shapes(experiment))
  return bool(jax.tree.leaves(shapes))


def params_ema(experiment: Experiment) -> optax.GradientTransformation:
  """Return the part of the optimizer chain that averages the parameters (EMA)."""
  c = experiment.ema
  if c.snapshot_every and c.kind != "power":
    raise ValueError(
      f"Got config.ema.snapshot_every={c.snapshot_every} with config.ema.kind={c.kind!r}; expected 0, because only snapshots of the kind 'power'"
      " can be combined into averages of other widths. Set --config.ema.snapshot_every=0 or --config.ema.kind=power."
    )
  if c.kind == "power" and not c.stds:
    raise ValueError(
      "Got no config.ema.stds with config.ema.kind='power'; expected at least one relative width, such as (0.05, 0.1)."
    )
  makers = {
    "fixed": lambda: [ema.fixed(c.decay)],
    "half_life": lambda: [ema.half_life(c.half_life, experiment.training.batch_size, c.ramp_up or None)],
    "power": lambda: [ema.power(std) for std in c.stds],
  }
  return ema.params_ema(*choose(c.kind, makers, "config.ema.kind")())


def encode(model: Model, frozen: Mapping[str, PyTree] | None, keys: Array, batch: Batch) -> Batch:
  """Return the training batch for the objective, with the encoded data `x` and the encoded conditions `given`.

  The image, or its encoding in a latent data set, is removed from the batch. All other items of the data stay.
  """
  is_latent = data.LATENT in batch
  x = model.expand(keys, batch[data.LATENT], frozen) if is_latent else model.encode(keys, batch["image"], frozen)
  encoded = {"x": x, "given": model.encode_conditions(keys, batch, frozen, train=True)}
  return {name: leaf for name, leaf in batch.items() if name not in ("image", data.LATENT)} | encoded


def step(
  experiment: Experiment, mesh: jax.sharding.Mesh
) -> Callable[..., tuple[training.TrainState, training.Metrics]]:
  """Return the train step for a mesh, as a function that `parallel.jit_step` can compile."""
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
  """Return the FLOPs of matrix products and convolutions in the loss and its gradient for one sample.

  Recomputation is not counted if the config can turn it off by `model.network.remat`. Other recomputation is counted.

  Args:
    experiment: the experiment to train.
    batch: the shapes of a batch with one sample [1, ...].
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


def batch_shapes(experiment: Experiment, size: int, source: Any = None, index: int = 0) -> Batch:
  """Return the shapes of a training batch.

  Args:
    experiment: the experiment to train.
    size: the number of samples in the batch.
    source: a data source to read the shapes of one sample from. If None, the batch has images, classes and the items
      that the conditions read. The images have the largest size in training.
    index: the index of the sample in the source.
  """
  conditions = experiment.model.conditions
  if source is not None:
    first = host_items(conditions, data.finish_batch(data.read(source, [index])))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), first)
  shapes = {"image": jax.ShapeDtypeStruct((size, *experiment.data.train_shape), jnp.float32)}
  shapes["classes"] = jax.ShapeDtypeStruct((size,), jnp.int32)
  for name, condition in conditions.items():
    if condition.host is not None:
      example = np.array([""]) if condition.default is None else condition.default(1)
      arrays = host_items({name: condition}, {name: example})[name]
      shapes[name] = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), arrays)
    elif condition.from_data is None:
      # The data hold one array for the condition, even if the network takes several.
      leaf = jax.tree.leaves(condition.shape)[0]
      shapes[name] = jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype)
  return shapes
