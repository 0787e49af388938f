"""Running one pure step on many devices and in several processes: `jit` over a mesh (the default), or `pmap`.

A batch is split over both axes of the mesh, "data" and "fsdp"; the state is split over "fsdp" and whole along "data".
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
# Gradients of a share of a batch: (trained, context, keys [B], batch) -> (loss, details [B], gradients of what is trained).
GradientFn = Callable[[PyTree, PyTree, jax.Array, PyTree], tuple[jax.Array, PyTree, PyTree]]


def make_mesh(data: int = 0, fsdp: int = 1, devices=None) -> Mesh:
  """A mesh of all devices of all processes (or of those given) with the axes "data" and "fsdp".

  Args:
    data: devices along "data"; 0: as many as there are, divided by `fsdp`.
    fsdp: devices that share one copy of the state.
    devices: the devices; all by default.

  Raises:
    ValueError: if data times fsdp is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  if data < 0 or fsdp < 1 or (data or max(count // fsdp, 1)) * fsdp != count:
    good = [f"{count // size} x {size}" for size in range(1, count + 1) if count % size == 0]
    raise ValueError(
      f"Got a mesh of data={data} by fsdp={fsdp} on {count} device(s); expected data x fsdp to be {count}, such as"
      f" {', '.join(good)}, or data=0 for what fsdp leaves."
    )
  # Explicit axes, JAX's default for new meshes, make reshapes inside networks fail.
  axis_types = (jax.sharding.AxisType.Auto,) * 2
  return jax.make_mesh((count // fsdp, fsdp), _BOTH, axis_types=axis_types, devices=devices)


def check_batch(batch_size: int, num_devices: int, what: str = "batch size") -> None:
  """Raises a ValueError unless a batch can be split evenly over the devices."""
  if batch_size < 1 or batch_size % num_devices:
    lower = max(1, batch_size // num_devices) * num_devices
    raise ValueError(
      f"Got a {what} of {batch_size} on {num_devices} devices; expected a positive multiple of {num_devices}, such as"
      f" {lower} or {lower + num_devices}."
    )


def describe(mesh: Mesh) -> str:
  """Say how many devices a mesh has, of how many processes, and how it is laid out."""
  processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
  axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
  return f"{mesh.size} {mesh.devices.flat[0].platform} device(s){processes}{f' ({axes})' if mesh.size > 1 else ''}"


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch [B, ...]: its first axis over all devices."""
  return NamedSharding(mesh, PartitionSpec(_BOTH))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, state: PyTree) -> PyTree:
  """The sharding of each leaf of a state, by its shape alone: its largest axis that "fsdp" divides is split, if any.

  Moments and averages have their parameters' shapes, and so lie where these lie.
  """
  return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(mesh, leaf.shape)), state)


def _spec(mesh: Mesh, shape: tuple[int, ...]) -> PartitionSpec:
  axis = _split_axis(mesh, shape)
  return PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, FSDP_AXIS)


def _split_axis(mesh: Mesh, shape: tuple[int, ...]) -> int | None:
  size = mesh.shape[FSDP_AXIS]
  # Of axes of one length the last: the features that a layer gives.
  axes = [axis for axis, length in enumerate(shape) if length and length % size == 0]
  return max(axes, key=lambda axis: (shape[axis], axis)) if axes and size > 1 else None


def abstract(state: PyTree, shardings: PyTree) -> PyTree:
  """Shapes and types of a state, laid out by `shardings` (one a leaf, or one for all)."""
  if isinstance(shardings, jax.sharding.Sharding):
    shardings = jax.tree.map(lambda _: shardings, state)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, shardings
  )


def shard_gradient(mesh: Mesh) -> Callable[[GradientFn], GradientFn]:
  """Makes a function of a share's gradients one of the whole batch's, for `training.train_step` under `jit`.

  Each device computes the gradients of its share of the batch, which are then averaged once, however many parts the
  share has. What is trained and what is looked at lie as `state_shardings` says: what is split over "fsdp" is gathered before, and the
  gradients are left split after.
  """

  def distribute(gradient: GradientFn) -> GradientFn:
    def of_batch(trained, context, keys, batch):
      specs, looked_at = jax.tree.map(lambda leaf: _spec(mesh, leaf.shape), (trained, context))
      axes, context_axes = jax.tree.map(
        lambda leaf: -1 if (axis := _split_axis(mesh, leaf.shape)) is None else axis, (trained, context)
      )

      def of_share(trained, context, keys, batch):
        whole, context = jax.tree.map(
          lambda leaf, axis: leaf if axis < 0 else jax.lax.all_gather(leaf, FSDP_AXIS, axis=axis, tiled=True),
          (trained, context),
          (axes, context_axes),
        )
        loss, details, gradients = gradient(whole, context, keys, batch)
        gradients = jax.tree.map(
          lambda leaf, axis: (
            leaf if axis < 0 else jax.lax.psum_scatter(leaf, FSDP_AXIS, scatter_dimension=axis, tiled=True)
          ),
          gradients,
          axes,
        )
        # In two reductions at most: what is split is already summed over "fsdp".
        leaves, tree = jax.tree_util.tree_flatten(gradients)
        is_split = [axis >= 0 for axis in jax.tree.leaves(axes)]
        parts = [leaf for leaf, scattered in zip(leaves, is_split, strict=True) if scattered]
        whole_leaves = [leaf for leaf, scattered in zip(leaves, is_split, strict=True) if not scattered]
        if mesh.shape[DATA_AXIS] > 1:
          parts = jax.lax.psum(parts, DATA_AXIS)
        if mesh.size > 1:
          loss, whole_leaves = jax.lax.psum((loss, whole_leaves), _BOTH)
        sums, rest = iter(parts), iter(whole_leaves)
        leaves = [next(sums) if scattered else next(rest) for scattered in is_split]
        leaves = [leaf / mesh.size for leaf in leaves]
        return loss / mesh.size, details, jax.tree_util.tree_unflatten(tree, leaves)

      batched = PartitionSpec(_BOTH)
      return jax.shard_map(
        of_share,
        mesh=mesh,
        in_specs=(specs, looked_at, batched, batched),
        out_specs=(PartitionSpec(), batched, specs),
        check_vma=False,
      )(trained, context, keys, batch)

    return of_batch

  return distribute


def map_shards(mesh: Mesh, function: Callable[[PyTree, PyTree], PyTree]) -> Callable[[PyTree, PyTree], PyTree]:
  """`function(whole, batch)` of arrays [B, ...], each device doing its share of the batch as a program of its own.

  What it gives, arrays [B, ...] too, is the same to the last bit on any number of devices of a kind whose shares are as large: a
  program that the compiler splits over devices rounds otherwise than one that was never split.
  """
  whole, batched = PartitionSpec(), PartitionSpec(_BOTH)
  return jax.shard_map(function, mesh=mesh, in_specs=(whole, batched), out_specs=batched, check_vma=False)


def compiler_options(mesh: Mesh | None = None, *, once: bool = False) -> dict[str, Any]:
  """What to tell the compiler besides its defaults, for `jax.jit(f, compiler_options=...)`: nothing on GPUs and TPUs.

  XLA's CPU back end hands convolutions to YNNPACK, whose gradients in a kernel run at a third of the speed of XLA's own and inside loops
  at a tenth: here all are XLA's own. Values change by rounding.

  Args:
    mesh: what is compiled for; the default backend's devices if None.
    once: whether the program is run once, so that on a CPU it is over soonest if its code is not optimized.

  Returns:
    Names and values of XLA's options; empty where there is nothing to say, or this jaxlib does not know the option.
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
    # A jaxlib that knows the option no longer, or not yet.
    return {}
  return options


def jit_step(step: Callable[..., tuple[PyTree, PyTree]], mesh: Mesh, state: PyTree, frozen: PyTree = None) -> Any:
  """Compiles `step(state, batch) -> (state, metrics)` over a mesh: batch split, state laid out as `state_shardings`, donated.

  Args:
    step: the step, such as `training.train_step` with `distribute=shard_gradient(mesh)`.
    mesh: the mesh.
    state: a state, or its shapes.
    frozen: parameters that never change, or their shapes; then the step is `step(state, batch, frozen)`, and they lie as
      `state_shardings` says. None for a step that takes none.
  """
  shardings = state_shardings(mesh, state)
  given = () if frozen is None else (state_shardings(mesh, frozen),)
  return jax.jit(
    step,
    in_shardings=(shardings, batch_sharding(mesh), *given),
    out_shardings=(shardings, replicated(mesh)),
    donate_argnums=0,
    compiler_options=compiler_options(mesh),
  )


def pmap_step(step: Callable[..., tuple[PyTree, PyTree]], devices=None) -> Callable:
  """The same under `pmap`: takes and returns a state from `replicate`, a batch as `jit_step` takes it, and frozen parameters from `replicate`.

  `step` must reduce its gradients over the axis `parallel.DATA_AXIS`, as `training.train_step` does when told its name.

  Raises:
    ValueError: when called with a batch that the devices do not divide.
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
  """A copy for each device along a new first axis, as `pmap_step` takes a state."""
  count = jax.local_device_count() if num_devices is None else num_devices
  return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *np.shape(x))), tree)


def unreplicate(tree: PyTree) -> PyTree:
  """The first device's copy."""
  return jax.tree.map(lambda x: x[0], tree)


# Several processes.


def is_main() -> bool:
  """Whether this process is the one that writes and speaks."""
  return jax.process_index() == 0


def broadcast(value: int) -> int:
  """The number, or truth, that the first process has, in every process."""
  if jax.process_count() == 1:
    return value
  from jax.experimental import multihost_utils

  return type(value)(multihost_utils.broadcast_one_to_all(np.array(value)))


def exit_distributed(code: int) -> None:
  """Ends this process, if it is one of several, at once: the others, who may be waiting for it, notice within the heartbeat."""
  if not jax.distributed.is_initialized():
    return
  print(
    f"process {jax.process_index()} of {jax.process_count()} ends, here or because another did, and with it the run. Start all of"
    " them again: it goes on from its last checkpoint.",
    file=sys.stderr,
    flush=True,
  )
  os._exit(code)


def wait_for_all(what: str) -> None:
  """Returns once every process has come here."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(what)


def peak_memory() -> int:
  """The most bytes that one of this process's devices has held so far; on a CPU, that the process has."""
  held = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
  # Linux counts in units of 1024 bytes.
  return max(held) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gather(mesh: Mesh, tree: PyTree) -> PyTree:
  """Arrays laid out whole on every device, however they lay before."""
  return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """The rows of a batch, in rising order, that lie on this process's devices: those that it must read."""
  indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices.values()]))


def put_batch(mesh: Mesh, batch: PyTree, batch_size: int) -> PyTree:
  """Sends this process's rows (`local_rows`) of a batch to its devices: arrays [batch_size, ...], split over all devices."""
  sharding = batch_sharding(mesh)
  if jax.process_count() == 1:
    return jax.device_put(batch, sharding)
  rows = local_rows(mesh, batch_size)

  def put(leaf):
    def part(index):
      return leaf[np.searchsorted(rows, np.arange(batch_size)[index[0]])]

    return jax.make_array_from_callback((batch_size, *leaf.shape[1:]), sharding, part)

  return jax.tree.map(put, batch)
