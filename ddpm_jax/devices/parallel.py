"""Run a pure step on many devices and in several processes, with `jit` over a mesh (the default) or with `pmap`.

A batch is sharded over both axes of the mesh, "data" and "fsdp". The state is sharded over "fsdp" and replicated over
"data".
"""

import functools
import os
import resource
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PyTree = Any
DATA_AXIS, FSDP_AXIS = "data", "fsdp"
_BOTH = (DATA_AXIS, FSDP_AXIS)
# A function (trained, context, keys [B], batch) -> (loss, details [B], gradients with respect to `trained`).
GradientFn = Callable[[PyTree, PyTree, jax.Array, PyTree], tuple[jax.Array, PyTree, PyTree]]


def make_mesh(data: int = 0, fsdp: int = 1, devices=None) -> Mesh:
  """Make a mesh of devices with the axes "data" and "fsdp".

  Args:
    data: the number of devices along "data"; 0 for the total number of devices divided by `fsdp`.
    fsdp: the number of devices that share one copy of the state.
    devices: the devices; None for all devices of all processes.

  Raises:
    ValueError: if data times fsdp is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  if data < 0 or fsdp < 1 or (data or max(count // fsdp, 1)) * fsdp != count:
    valid = [f"{count // size} x {size}" for size in range(1, count + 1) if count % size == 0]
    raise ValueError(
      f"Got a mesh of data={data} by fsdp={fsdp} on {count} device(s); expected data x fsdp to be {count}, such as"
      f" {', '.join(valid)}, or data=0 to compute it from fsdp."
    )
  # Explicit axes are JAX's default, but reshapes inside networks would fail with them.
  axis_types = (jax.sharding.AxisType.Auto,) * 2
  return jax.make_mesh((count // fsdp, fsdp), _BOTH, axis_types=axis_types, devices=devices)


def check_batch(batch_size: int, num_devices: int, name: str = "batch size") -> None:
  """Check that a batch can be split evenly over the devices.

  Args:
    batch_size: the number of samples.
    num_devices: the number of devices.
    name: the name of the batch size in the error message.

  Raises:
    ValueError: if the batch size is not a positive multiple of the number of devices.
  """
  if batch_size < 1 or batch_size % num_devices:
    lower = max(1, batch_size // num_devices) * num_devices
    raise ValueError(
      f"Got a {name} of {batch_size} on {num_devices} devices; expected a positive multiple of {num_devices}, such as"
      f" {lower} or {lower + num_devices}."
    )


def describe(mesh: Mesh) -> str:
  """Describe the devices, processes and axes of a mesh in one line for the user."""
  processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
  axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
  return f"{mesh.size} {mesh.devices.flat[0].platform} device(s){processes}{f' ({axes})' if mesh.size > 1 else ''}"


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Return the sharding that splits the first axis of a batch [B, ...] over all devices."""
  return NamedSharding(mesh, PartitionSpec(_BOTH))


def replicated(mesh: Mesh) -> NamedSharding:
  """Return the sharding that replicates an array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, state: PyTree) -> PyTree:
  """Return the sharding of each leaf of a state.

  On a given mesh, the sharding depends on the shape alone. The largest axis that is divisible by the size of "fsdp" is
  split over "fsdp". If no axis is divisible, the leaf is replicated. The optimizer's moments and the EMA of a parameter
  have the same shape as the parameter, and therefore the same sharding.
  """
  return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(mesh, leaf.shape)), state)


def state_specs(mesh: Mesh, state: PyTree) -> PyTree:
  """Return the partition spec of each leaf of a state, for `shard_map` (see `state_shardings`)."""
  return jax.tree.map(lambda leaf: _spec(mesh, leaf.shape), state)


def split_axes(mesh: Mesh, state: PyTree) -> PyTree:
  """Find the axis that is split over "fsdp" in each leaf of a state, with -1 for a replicated leaf."""

  def split_axis(leaf):
    axis = _split_axis(mesh, leaf.shape)
    return -1 if axis is None else axis

  return jax.tree.map(split_axis, state)


def gather_leaves(shards: PyTree, axes: PyTree) -> PyTree:
  """Gather the full leaves of a state from its shards, inside `shard_map`.

  Args:
    shards: this device's shard of each leaf, split as in `state_specs`.
    axes: the result of `split_axes` for the full state.
  """
  return jax.tree.map(
    lambda leaf, axis: leaf if axis < 0 else jax.lax.all_gather(leaf, FSDP_AXIS, axis=axis, tiled=True), shards, axes
  )


def _spec(mesh: Mesh, shape: tuple[int, ...]) -> PartitionSpec:
  axis = _split_axis(mesh, shape)
  return PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, FSDP_AXIS)


def _split_axis(mesh: Mesh, shape: tuple[int, ...]) -> int | None:
  size = mesh.shape[FSDP_AXIS]
  # Among axes of equal length choose the last one, the output features of a layer.
  axes = [axis for axis, length in enumerate(shape) if length and length % size == 0]
  return max(axes, key=lambda axis: (shape[axis], axis)) if axes and size > 1 else None


def abstract(state: PyTree, shardings: PyTree) -> PyTree:
  """Return the shapes, types and shardings of a state as `jax.ShapeDtypeStruct`.

  `shardings` is one sharding for all leaves, or a tree with one sharding for each leaf.
  """
  if isinstance(shardings, jax.sharding.Sharding):
    shardings = jax.tree.map(lambda _: shardings, state)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, shardings
  )


def shard_gradient(mesh: Mesh) -> Callable[[GradientFn], GradientFn]:
  """Return a decorator that computes gradients in parallel on all devices, for `training.train_step` under `jit`.

  Each device computes the gradients of its shard of the batch. The gradients are averaged over devices once, even if
  each device accumulates gradients over several parts of its shard. The first two arguments of a `GradientFn`
  (`trained` and `context`) have the shardings of `state_shardings`. Leaves that are sharded over "fsdp" are gathered
  before the computation, and the gradient of a leaf has the sharding of the leaf.
  """

  def distribute(gradient: GradientFn) -> GradientFn:
    def batch_gradient(trained, context, keys, batch):
      specs, context_specs = state_specs(mesh, (trained, context))
      axes, context_axes = split_axes(mesh, (trained, context))

      def local_gradient(trained, context, keys, batch):
        trained, context = gather_leaves((trained, context), (axes, context_axes))
        loss, details, gradients = gradient(trained, context, keys, batch)
        gradients = jax.tree.map(
          lambda leaf, axis: (
            leaf if axis < 0 else jax.lax.psum_scatter(leaf, FSDP_AXIS, scatter_dimension=axis, tiled=True)
          ),
          gradients,
          axes,
        )
        # Use at most two more reductions. Sharded gradients are already summed over "fsdp".
        leaves, tree = jax.tree_util.tree_flatten(gradients)
        is_sharded = [axis >= 0 for axis in jax.tree.leaves(axes)]
        sharded_leaves = [leaf for leaf, sharded in zip(leaves, is_sharded, strict=True) if sharded]
        full_leaves = [leaf for leaf, sharded in zip(leaves, is_sharded, strict=True) if not sharded]
        if mesh.shape[DATA_AXIS] > 1:
          sharded_leaves = jax.lax.psum(sharded_leaves, DATA_AXIS)
        if mesh.size > 1:
          loss, full_leaves = jax.lax.psum((loss, full_leaves), _BOTH)
        sharded_sums, full_sums = iter(sharded_leaves), iter(full_leaves)
        leaves = [next(sharded_sums) if sharded else next(full_sums) for sharded in is_sharded]
        leaves = [leaf / mesh.size for leaf in leaves]
        return loss / mesh.size, details, jax.tree_util.tree_unflatten(tree, leaves)

      batched = PartitionSpec(_BOTH)
      return jax.shard_map(
        local_gradient,
        mesh=mesh,
        in_specs=(specs, context_specs, batched, batched),
        out_specs=(PartitionSpec(), batched, specs),
        check_vma=False,
      )(trained, context, keys, batch)

    return batch_gradient

  return distribute


def map_shards(
  mesh: Mesh, function: Callable[[PyTree, PyTree], PyTree], *, is_split: bool = False
) -> Callable[[PyTree, PyTree], PyTree]:
  """Return a function that runs `function(state, batch)` on each device with its shard of the batch.

  The batch and the result consist of arrays [B, ...]. On devices of one kind, the result for a row has the same bits on
  any number of devices, as long as the number of rows on each device does not change. If the compiler split the
  program over the devices instead, the rounding would depend on the number of devices.

  Args:
    mesh: the mesh.
    function: the function of one shard of the batch. By default, it receives the full state.
    is_split: whether `function` receives only the device's shards of the state, split as in `state_specs`. Then
      `function` must gather the full leaves with `gather_leaves`.
  """
  batched = PartitionSpec(_BOTH)

  def run(state, batch):
    specs = (state_specs(mesh, state) if is_split else PartitionSpec(), batched)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=batched, check_vma=False)(state, batch)

  return run


def compiler_options(mesh: Mesh | None = None, *, once: bool = False) -> dict[str, Any]:
  """Return compiler options for `jax.jit(f, compiler_options=...)`.

  On CPUs, XLA uses YNNPACK for convolutions by default. YNNPACK computes gradients with respect to the weights of a
  convolution at a third of the speed of XLA's own code, and inside loops at a tenth. The options disable YNNPACK.
  Results change by rounding only.

  Args:
    mesh: the mesh that the program is compiled for; None for the devices of the default backend.
    once: whether the program runs only once. If so, optimization is disabled on CPUs, because optimizing would take
      longer than the time that it saves.

  Returns:
    XLA's options by name. They are empty on GPUs and TPUs.
  """
  platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
  if platform != "cpu":
    return {}
  return dict(_cpu_options()) | ({"xla_backend_optimization_level": 0} if once else {})


@functools.cache
def _cpu_options() -> Mapping[str, Any]:
  options = {"xla_cpu_experimental_ynn_fusion_type": ""}
  try:
    with jax.default_device(jax.devices("cpu")[0]):
      jax.jit(lambda: 0, compiler_options=options).lower().compile()
  except jax.errors.JaxRuntimeError:
    # This version of jaxlib does not have the option.
    return {}
  return options


def jit_step(step: Callable[..., tuple[PyTree, PyTree]], mesh: Mesh, state: PyTree, frozen: PyTree = None) -> Any:
  """Compile `step(state, batch) -> (state, metrics)` for a mesh.

  The batch is split over all devices. The state has the shardings of `state_shardings`, and is donated.

  Args:
    step: the step, such as `training.train_step` with `distribute=shard_gradient(mesh)`.
    mesh: the mesh.
    state: a state, or its shapes.
    frozen: parameters that never change, or their shapes. They have the shardings of `state_shardings`, and the step is
      `step(state, batch, frozen)`. None for a step without frozen parameters.
  """
  shardings = state_shardings(mesh, state)
  frozen_shardings = () if frozen is None else (state_shardings(mesh, frozen),)
  return jax.jit(
    step,
    in_shardings=(shardings, batch_sharding(mesh), *frozen_shardings),
    out_shardings=(shardings, replicated(mesh)),
    donate_argnums=0,
    compiler_options=compiler_options(mesh),
  )


def pmap_step(step: Callable[..., tuple[PyTree, PyTree]], devices=None) -> Callable:
  """Compile `step(state, batch, *frozen) -> (state, metrics)` with `pmap`.

  The compiled step takes the state and the frozen parameters from `replicate`, and the same batch as a step from
  `jit_step`. The compiled step raises a ValueError if the batch size is not a multiple of the number of devices.

  Args:
    step: the step, such as `training.train_step` with `axis_name=parallel.DATA_AXIS`. It must average its gradients
      over this axis.
    devices: the devices; None for all local devices.
  """
  devices = jax.local_devices() if devices is None else devices
  mapped = jax.pmap(step, axis_name=DATA_AXIS, devices=devices, donate_argnums=0)

  def run(state, batch, *frozen):
    for leaf in jax.tree.leaves(batch):
      check_batch(leaf.shape[0], len(devices))
    state, metrics = mapped(state, jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), batch), *frozen)
    return state, unreplicate(metrics)

  return run


def replicate(tree: PyTree, num_devices: int | None = None) -> PyTree:
  """Stack copies of each leaf along a new first axis, one per device, for `pmap_step`."""
  count = jax.local_device_count() if num_devices is None else num_devices
  return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *np.shape(x))), tree)


def unreplicate(tree: PyTree) -> PyTree:
  """Return the first device's copy of each leaf."""
  return jax.tree.map(lambda x: x[0], tree)


# Functions for several processes.


def is_main() -> bool:
  """Return whether this is the main process.

  Only the main process prints messages and writes files, but all processes write checkpoints.
  """
  return jax.process_index() == 0


def broadcast(value: int) -> int:
  """Return the value of the main process on every process. The value is a number or a boolean."""
  if jax.process_count() == 1:
    return value
  from jax.experimental import multihost_utils

  return type(value)(multihost_utils.broadcast_one_to_all(np.array(value)))


def exit_distributed(code: int) -> None:
  """Exit immediately if this process is one of several.

  Without an immediate exit, this process would wait for the other processes. Those processes notice the exit within the
  heartbeat timeout.
  """
  if not jax.distributed.is_initialized():
    return
  print(
    f"process {jax.process_index()} of {jax.process_count()} exits because it or another process failed. The run ends."
    " Start all processes again to resume from the last checkpoint.",
    file=sys.stderr,
    flush=True,
  )
  os._exit(code)


def wait_for_all(name: str) -> None:
  """Wait until every process has called this function.

  Args:
    name: the name of this synchronization point, the same on all processes.
  """
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)


def peak_memory() -> int:
  """Return the highest peak memory, in bytes, among this process's devices.

  On a CPU, return the peak memory of the process.
  """
  peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
  # Linux reports this value in units of 1024 bytes.
  return max(peaks) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def to_host(leaf: jax.Array) -> np.ndarray:
  """Return a full copy of an array in the memory of the host. With several processes, call this on all of them."""
  if leaf.is_fully_addressable or leaf.is_fully_replicated:
    return np.asarray(leaf)
  from jax.experimental import multihost_utils

  return multihost_utils.process_allgather(leaf, tiled=True)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Return the indices of the batch rows that belong to this process's devices, in rising order."""
  indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices.values()]))


def put_batch(mesh: Mesh, batch: PyTree, batch_size: int) -> PyTree:
  """Transfer this process's rows of a batch (`local_rows`) to its devices.

  Returns:
    Global arrays [batch_size, ...], sharded over all devices.
  """
  sharding = batch_sharding(mesh)
  if jax.process_count() == 1:
    return jax.device_put(batch, sharding)
  rows = local_rows(mesh, batch_size)

  def put(leaf):
    def part(index):
      return leaf[np.searchsorted(rows, np.arange(batch_size)[index[0]])]

    return jax.make_array_from_callback((batch_size, *leaf.shape[1:]), sharding, part)

  return jax.tree.map(put, batch)
