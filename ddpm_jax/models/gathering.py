"""Let a model gather its sharded parameters just before it uses them.

A device then holds its shards of all parameters, but the full parameters of only one network at a time.
"""

from collections.abc import Mapping
from typing import Any

import jax

from ddpm_jax.devices import parallel
from ddpm_jax.models.codecs import Codec
from ddpm_jax.models.conditions import Condition
from ddpm_jax.models.model import Model
from ddpm_jax.models.networks import Network
from ddpm_jax.networks import loops

PyTree = Any


def gather_model(model: Model, params_axes: PyTree, frozen_axes: Mapping[str, PyTree]) -> Model:
  """Return the model with functions that take shards of parameters, for use inside `parallel.map_shards`.

  Args:
    model: the model.
    params_axes: for each parameter of the network, the axis that is split over devices (see `parallel.split_axes`).
    frozen_axes: for each frozen parameter of the codec and the conditions, the axis that is split over devices.
  """
  if all(axis < 0 for axis in jax.tree.leaves((params_axes, frozen_axes))):
    return model
  by_name = frozen_axes.get("conditions", {})
  conditions = {
    name: _gather_condition(condition, by_name[name]) if name in by_name else condition
    for name, condition in model.conditions.items()
  }
  codec = _gather_codec(model.codec, frozen_axes["codec"]) if "codec" in frozen_axes else model.codec
  return model._replace(network=_gather_network(model.network, params_axes), conditions=conditions, codec=codec)


def _gather(shards: PyTree, axes: PyTree, after: PyTree) -> PyTree:
  """Gather the full parameters, but only after the arrays in `after` are computed.

  Without this order, a compiler may gather the parameters of all networks at the start, or move the gathering out of
  the loop over sampling steps. The full parameters of all networks would then stay in memory.
  """
  # Samplers may differentiate with respect to `after`. The order has no derivative.
  shards, _ = jax.lax.optimization_barrier((shards, jax.lax.stop_gradient(after)))
  return parallel.gather_leaves(shards, axes)


def _gather_network(network: Network, axes: PyTree) -> Network:
  # A loop over blocks gathers the parameters of one block at a time. Then the first axis of a stacked parameter counts
  # blocks. If it is the axis that is split, the parameter is gathered before the loop.
  looped = {
    name: jax.tree.map(lambda axis: axis - 1 if axis > 0 else -1, axes[name]) for name in loops.names(network.module)
  }
  before = {
    name: jax.tree.map(lambda axis: -1 if axis > 0 else axis, part) if name in looped else part
    for name, part in axes.items()
  }

  def gather_block(name, shards):
    return parallel.gather_leaves(shards, looped[name])

  def apply(params, x, time, given, **options):
    with loops.changing(gather_block):
      return network.apply(_gather(params, before, x), x, time, given, **options)

  return network._replace(apply=apply)


def _gather_condition(condition: Condition, axes: PyTree) -> Condition:
  null = condition.null

  def encode(frozen, keys, batch, train):
    return condition.encode(_gather(frozen, axes, dict(batch)), keys, batch, train)

  def gather_null(frozen):
    assert null is not None
    return null(parallel.gather_leaves(frozen, axes))

  return condition._replace(encode=encode, null=None if null is None else gather_null)


def _gather_codec(codec: Codec, axes: PyTree) -> Codec:
  def encode(frozen, keys, data):
    return codec.encode(_gather(frozen, axes, data), keys, data)

  def decode(frozen, x):
    return codec.decode(_gather(frozen, axes, x), x)

  return codec._replace(encode=encode, decode=decode)
