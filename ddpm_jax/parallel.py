"""Running one pure step on many devices and in several processes: `jit` over a mesh (the default), or `pmap`.

A batch is split over both axes of the mesh, "data" and "fsdp"; the state is split over "fsdp" and whole along "data".
"""

import contextlib
import functools
import glob
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddpm_jax import rendezvous

PyTree = Any
DATA_AXIS, FSDP_AXIS = "data", "fsdp"
_BOTH = (DATA_AXIS, FSDP_AXIS)
# Gradients of a share of a batch: (params, keys [B], batch) -> (loss, details [B], gradients).
GradientFn = Callable[[PyTree, jax.Array, PyTree], tuple[jax.Array, PyTree, PyTree]]


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
      f"Got a mesh of data={data} by fsdp={fsdp} on {count} device(s); wanted data x fsdp to be {count}, such as"
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
      f"Got a {what} of {batch_size} on {num_devices} devices; wanted a positive multiple of {num_devices}, such as"
      f" {lower} or {lower + num_devices}."
    )


def split(mesh: Mesh) -> NamedSharding:
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


def over(mesh: Mesh) -> Callable[[GradientFn], GradientFn]:
  """Makes a function of a share's gradients one of the whole batch's, for `train.train_step` under `jit`.

  Each device computes the gradients of its share of the batch, which are then averaged once, however many parts the
  share has. Parameters that lie split over "fsdp" are gathered before, and the gradients left split after.
  """

  def distribute(gradient: GradientFn) -> GradientFn:
    def of_batch(params, keys, batch):
      specs = jax.tree.map(lambda leaf: _spec(mesh, leaf.shape), params)
      axes = jax.tree.map(lambda leaf: -1 if (axis := _split_axis(mesh, leaf.shape)) is None else axis, params)

      def of_share(params, keys, batch):
        whole = jax.tree.map(
          lambda leaf, axis: leaf if axis < 0 else jax.lax.all_gather(leaf, FSDP_AXIS, axis=axis, tiled=True),
          params,
          axes,
        )
        loss, details, gradients = gradient(whole, keys, batch)
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
        in_specs=(specs, batched, batched),
        out_specs=(PartitionSpec(), batched, specs),
        check_vma=False,
      )(params, keys, batch)

    return of_batch

  return distribute


def shares(mesh: Mesh, function: Callable[[PyTree, PyTree], PyTree]) -> Callable[[PyTree, PyTree], PyTree]:
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


def jit_step(step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]], mesh: Mesh, state: PyTree) -> Any:
  """Compiles `step(state, batch) -> (state, metrics)` over a mesh: batch split, state laid out as `state_shardings`, donated.

  Args:
    step: the step, such as `train.train_step` with `distribute=over(mesh)`.
    mesh: the mesh.
    state: a state, or its shapes.
  """
  shardings = state_shardings(mesh, state)
  return jax.jit(
    step,
    in_shardings=(shardings, split(mesh)),
    out_shardings=(shardings, replicated(mesh)),
    donate_argnums=0,
    compiler_options=compiler_options(mesh),
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


# Several processes.


def environment_processes(environment: Mapping[str, str] = os.environ) -> int:
  """Return how many processes take part by the cluster's environment: Slurm, Open MPI, or a TPU slice's hosts."""
  for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
    if environment.get(name, "").isdigit():
      return int(environment[name])
  return max(1, len(environment.get("TPU_WORKER_HOSTNAMES", "").split(",")))


def connect(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  heartbeat_seconds: int = 60,
  wait_seconds: int = 300,
) -> None:
  """Join this process to the others of the run, before JAX is first used; the environment says what is not given.

  A process that no longer answers ends the others within `heartbeat_seconds`, with a message.

  Args:
    coordinator: host:port of process 0.
    num_processes: how many there are.
    process_id: which this is, from 0.
    heartbeat_seconds: how long a process may be silent.
    wait_seconds: how long to wait for the other processes.

  Raises:
    ValueError: if only some of the three are given, one is out of range, or the processes do not find each other.
  """
  given = [value is not None for value in (coordinator, num_processes, process_id)]
  if any(given) and not all(given):
    raise ValueError(
      f"Got --coordinator={coordinator}, --num_processes={num_processes}, --process_id={process_id}; expected all three,"
      " such as --coordinator=host0:1234 --num_processes=2 --process_id=0, or none where the cluster's environment says"
      " them."
    )
  if heartbeat_seconds < 1 or wait_seconds < 1:
    raise ValueError(
      f"Got --heartbeat_seconds={heartbeat_seconds}, --wait_seconds={wait_seconds}; expected at least 1 of each."
    )
  if coordinator is not None:
    assert num_processes is not None
    assert process_id is not None
    port = re.fullmatch(r".+:(\d{1,5})", coordinator)
    if not port or not 0 < int(port[1]) < 2**16 or num_processes < 1 or not 0 <= process_id < num_processes:
      raise ValueError(
        f"Got --coordinator={coordinator}, --num_processes={num_processes}, --process_id={process_id}; expected host:port"
        " with a port from 1 to 65535, one process or more, and an id from 0 to one less than their number."
      )
    rendezvous.meet(coordinator, num_processes, process_id, seconds=wait_seconds, say=_say)
  if jax.config.values.get("jax_platforms") == "cpu" or os.environ.get("JAX_PLATFORMS") == "cpu":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    with rendezvous.watched(num_processes or environment_processes(), seconds=wait_seconds, say=_say):
      # Longer than we watch: where JAX waits in vain, it aborts.
      jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=wait_seconds + 60,
        heartbeat_timeout_seconds=heartbeat_seconds,
        shutdown_timeout_seconds=heartbeat_seconds,
      )
  except Exception as error:
    raise ValueError(
      f"The processes of this run did not find each other: {error}. Check that all were started, with one --coordinator and"
      " --num_processes, and ids from 0 on; --distributed=false runs this one alone."
    ) from error


def _say(text: str) -> None:
  print(text, flush=True)


def start_devices(*, quiet: bool = True) -> None:
  """Start JAX's devices, which the first use of JAX would do.

  Args:
    quiet: whether to keep back what libtpu prints where it is installed and there is no TPU, and Gloo when it connects.

  Raises:
    ValueError: if this machine does not have the platform that JAX_PLATFORMS names.
  """
  with _without_output() if quiet and not _has_tpu() else contextlib.nullcontext():
    try:
      jax.devices()
    except (RuntimeError, AssertionError) as error:
      wanted = jax.config.values.get("jax_platforms")
      named = f"Got JAX_PLATFORMS={wanted}, with which" if wanted else "On this machine"
      raise ValueError(
        f"{named} JAX finds no device ({_first_line(error) or 'the platform is not installed'}). Unset JAX_PLATFORMS, or set"
        " it to one that is here, such as cpu; GPUs and TPUs need ddpm_jax[cuda] or ddpm_jax[tpu]."
      ) from error


def _first_line(error: BaseException) -> str:
  return next(iter(str(error).splitlines()), "")


def _has_tpu() -> bool:
  return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


@contextlib.contextmanager
def _without_output() -> Iterator[None]:
  """Keep back what native code prints, which no setting of Python reaches."""
  streams = {1: sys.stdout, 2: sys.stderr}
  before = {}
  with open(os.devnull, "w") as nowhere:
    for number, stream in streams.items():
      stream.flush()
      before[number] = os.dup(number)
      os.dup2(nowhere.fileno(), number)
  try:
    yield
  finally:
    for number, stream in streams.items():
      stream.flush()
      os.dup2(before[number], number)
      os.close(before[number])


def end_on_sigterm() -> None:
  """Let SIGTERM end this process at once, which JAX's service for several processes keeps it from doing."""
  if jax.distributed.is_initialized():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def is_main() -> bool:
  """Whether this process is the one that writes and speaks."""
  return jax.process_index() == 0


def of_main(value: int) -> int:
  """The number, or truth, that the first process has, in every process."""
  if jax.process_count() == 1:
    return value
  from jax.experimental import multihost_utils

  return type(value)(multihost_utils.broadcast_one_to_all(np.array(value)))


def leave(code: int) -> None:
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


def memory_in_use() -> int:
  """The most bytes that one of this process's devices has held so far; on a CPU, that the process has."""
  held = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
  # Linux counts in units of 1024 bytes.
  return max(held) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def whole(mesh: Mesh, tree: PyTree) -> PyTree:
  """Arrays laid out whole on every device, however they lay before."""
  return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """The rows of a batch, in rising order, that lie on this process's devices: those that it must read."""
  indices = split(mesh).addressable_devices_indices_map((batch_size,))
  return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices.values()]))


def put_batch(mesh: Mesh, batch: PyTree, batch_size: int) -> PyTree:
  """Sends this process's rows (`local_rows`) of a batch to its devices: arrays [batch_size, ...], split over all devices."""
  sharding = split(mesh)
  if jax.process_count() == 1:
    return jax.device_put(batch, sharding)
  rows = local_rows(mesh, batch_size)

  def put(leaf):
    def part(index):
      return leaf[np.searchsorted(rows, np.arange(batch_size)[index[0]])]

    return jax.make_array_from_callback((batch_size, *leaf.shape[1:]), sharding, part)

  return jax.tree.map(put, batch)
