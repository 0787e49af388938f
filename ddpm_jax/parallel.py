"""Running one pure step on many devices: `jit` over a mesh (the default), or `pmap`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PyTree = Any
DATA_AXIS = "data"


def data_mesh(devices=None) -> Mesh:
  """A mesh of all local devices (or of those given) along one axis, over which batches are split."""
  devices = jax.local_devices() if devices is None else devices
  # Explicit axes, JAX's default for new meshes, make reshapes inside networks fail.
  return jax.make_mesh((len(devices),), (DATA_AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def check_batch(batch_size: int, num_devices: int, what: str = "batch size") -> None:
  """Raises a ValueError unless a batch can be split evenly over the devices."""
  if batch_size < 1 or batch_size % num_devices:
    lower = max(1, batch_size // num_devices) * num_devices
    raise ValueError(
      f"Got a {what} of {batch_size} on {num_devices} devices; wanted a positive multiple of {num_devices}, such as"
      f" {lower} or {lower + num_devices}."
    )


def split(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch [B, ...]: its first axis over the devices."""
  return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def jit_step(step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]], mesh: Mesh) -> Any:
  """Compiles `step(state, batch) -> (state, metrics)` over a mesh: batch split, state replicated and donated."""
  return jax.jit(
    step,
    in_shardings=(replicated(mesh), split(mesh)),
    out_shardings=replicated(mesh),
    donate_argnums=0,
  )


def pmap_step(step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]], devices=None) -> Callable:
  """The same under `pmap`: takes and returns a state from `replicate`, and a batch as `jit_step` takes it.

  `step` must reduce its gradients over the axis `parallel.DATA_AXIS`, as `train.train_step` does when told its name.

  Raises:
    ValueError: when called with a batch that the devices do not divide.
  """
  devices = jax.local_devices() if devices is None else devices
  mapped = jax.pmap(step, axis_name=DATA_AXIS, devices=devices, donate_argnums=0)

  def run(state, batch):
    for leaf in jax.tree.leaves(batch):
      check_batch(leaf.shape[0], len(devices))
    state, metrics = mapped(state, jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), batch))
    return state, unreplicate(metrics)

  return run


def replicate(tree: PyTree, num_devices: int | None = None) -> PyTree:
  """A copy for each device along a new first axis, as `pmap_step` takes a state."""
  count = jax.local_device_count() if num_devices is None else num_devices
  return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *np.shape(x))), tree)


def unreplicate(tree: PyTree) -> PyTree:
  """The first device's copy."""
  return jax.tree.map(lambda x: x[0], tree)
