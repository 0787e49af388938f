"""What a training step will need, before anything is rented or run: memory, FLOPs, communication, and how fast it can be at best."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from ddpm_jax.devices import costs, hardware

PyTree = Any
# CUDA keeps about half a GB for itself, and freed blocks do not always join. (libtpu's compiler knows its own part.)
_USABLE = 0.97
# JAX's own share of a GPU's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says another.
_GPU_SHARE = 0.75
_SIZES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_TIMES = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"))


class OutOfMemory(NamedTuple):
  """A compiler's answer that a program does not fit into a device.

  Attributes:
    needed: bytes that it says the program needs; None if it says nothing.
    available: bytes that it says there are; None if it says nothing.
    message: its first line.
  """

  needed: float | None
  available: float | None
  message: str


class Plan(NamedTuple):
  """What one step needs and how fast it can be. Bytes and FLOPs are a device's, seconds a step's; None is "not known".

  Attributes:
    chip: the device, by its chip's name where that is known.
    num_devices: how many there are.
    batch_size: images a step, over all devices.
    dtype: what the network computes in.
    parameters: numbers in the network.
    flops_per_image: of matrix products and convolutions: forward, backward and recomputation (`costs.matmul_flops`).
    flops_per_device: the same of one step.
    state_bytes: parameters, optimizer, EMA and frozen parameters, by their shardings.
    argument_bytes: what the step takes: the state and a share of the batch, padded as the device lays it out.
    output_bytes: what it gives that does not take the place of an argument.
    temporary_bytes: the most that lives during the step beside them: activations, gradients, scratch.
    code_bytes: the program.
    total_bytes: all of these.
    memory: what a device has.
    fits: whether the total is within what programs can have of it.
    bytes_accessed: what the compiled program reads and writes, as XLA counts; loops once, and a TPU's on-chip memory too.
    loops: the number of loops in it.
    collectives: by kind; see `costs.collectives`. None where the program did not fit, or cannot be read.
    peak_flops: FLOP/s of a device for the dtype.
    compute_seconds: at the peak.
    memory_seconds: to read the arguments and write the outputs once. Temporaries may stay on the chip.
    communication_seconds: of the collectives, over all links at once.
    step_seconds: the largest of these three: no step takes less.
    images_per_second: the batch over that: no run makes more.
    traffic_bytes: what its operations read from the device's memory and write to it (`costs.operations`), loops as often as they run.
    traffic_seconds: of these at the memory's bandwidth: no bound, for another program may move less.
    problem: the compiler's message if it found that the program does not fit, else empty.
  """

  chip: str
  num_devices: int
  batch_size: int
  dtype: str
  parameters: int
  flops_per_image: float
  flops_per_device: float
  state_bytes: float
  argument_bytes: float | None
  output_bytes: float | None
  temporary_bytes: float | None
  code_bytes: float | None
  total_bytes: float | None
  memory: float | None
  fits: bool | None
  bytes_accessed: float | None
  loops: int | None
  collectives: Mapping[str, costs.Collective] | None
  peak_flops: float | None
  compute_seconds: float | None
  memory_seconds: float | None
  communication_seconds: float | None
  step_seconds: float | None
  images_per_second: float | None
  traffic_bytes: float | None
  traffic_seconds: float | None
  problem: str


def compile_step(traced: jax.stages.Traced, devices: Sequence[Any]) -> jax.stages.Compiled | OutOfMemory:
  """Compiles, and takes "does not fit" for an answer: TPU compilers refuse a program that is too large.

  Args:
    traced: `jax.jit(step, in_shardings=...).trace(state, batch)`, its arguments abstract, on the devices planned for.
    devices: these devices.
  """
  option = "jax_persistent_cache_min_compile_time_secs"
  least = jax.config.values[option]
  if any(device.platform == "tpu" for device in devices):
    # What is compiled for devices that are not there cannot be read back, so it must not be kept.
    jax.config.update(option, math.inf)
  try:
    return traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return _out_of_memory(str(error))
  finally:
    jax.config.update(option, least)


def make_plan(
  traced: jax.stages.Traced,
  compiled: jax.stages.Compiled | OutOfMemory,
  *,
  params: PyTree,
  state: PyTree,
  batch_size: int,
  devices: Sequence[Any],
  dtype: Any,
  chip: hardware.Chip | None = None,
) -> Plan:
  """Reads off a traced and compiled step what it needs, and bounds its time by the chip's roofline.

  Args:
    traced: the step, before lowering; its FLOPs are counted here, since compilers rewrite them.
    compiled: what `compile_step` made of it.
    params: the network's parameters, abstract or not.
    state: all that is kept between steps, leaves with shardings; a leaf without one is on each device whole.
    batch_size: images a step, over all devices.
    devices: what it is compiled for.
    dtype: what the network computes in, as the peak FLOP/s depends on it.
    chip: the chip, where it is not the devices' own.

  Raises:
    ValueError: if there are no devices, or the batch is empty.
  """
  count = len(devices)
  if count < 1 or batch_size < 1:
    raise ValueError(f"Got a batch of {batch_size} on {count} devices; expected at least one of both.")
  chip = hardware.chip_of(devices[0].device_kind) if chip is None else chip
  flops = costs.matmul_flops(traced.jaxpr)
  memory = _memory(compiled)
  text = None if isinstance(compiled, OutOfMemory) else _text(compiled)
  found = None if text is None else costs.collectives(text)
  traffic = None if text is None else sum(operation.bytes for operation in costs.operations(text))
  peak, available = hardware.peak(chip, dtype), None if chip is None else chip.memory
  bandwidth, interconnect = (None, None) if chip is None else (chip.bandwidth, chip.interconnect)
  compute = _over(flops / count, peak)
  moved = _over(memory.pop("moved"), bandwidth)
  sent = None if found is None else sum(kind.sent for kind in found.values())
  communication = _over(sent, interconnect)
  bounds = [seconds for seconds in (compute, moved, communication) if seconds is not None]
  step = max(bounds) if bounds else None
  return Plan(
    chip=devices[0].device_kind if chip is None else chip.name,
    num_devices=count,
    batch_size=batch_size,
    dtype=str(getattr(dtype, "__name__", dtype)),
    parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
    flops_per_image=flops / batch_size,
    flops_per_device=flops / count,
    state_bytes=state_bytes(state),
    **memory,
    memory=available,
    fits=_fits(compiled, devices[0].platform, memory["total_bytes"], available),
    loops=None if text is None else costs.loops(text),
    collectives=found,
    peak_flops=peak,
    compute_seconds=compute,
    memory_seconds=moved,
    communication_seconds=communication,
    step_seconds=step,
    images_per_second=batch_size / step if step else None,
    traffic_bytes=traffic,
    traffic_seconds=_over(traffic, bandwidth),
    problem=compiled.message if isinstance(compiled, OutOfMemory) else "",
  )


def state_bytes(state: PyTree) -> float:
  """Bytes of a state, arrays or their shapes, on one device: by the leaves' shardings; a leaf without one lies there whole."""

  def of(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize

  return sum(of(leaf) for leaf in jax.tree.leaves(state))


def to_json(plan: Plan) -> dict[str, Any]:
  """The plan as plain numbers, strings and dictionaries, under the names of `Plan`."""
  found = plan.collectives
  return plan._asdict() | {
    "collectives": None if found is None else {kind: item._asdict() for kind, item in found.items()}
  }


def table(plan: Plan) -> str:
  """The plan as lines to read: what, how much, and what the figure includes. GB are 1e9 bytes."""
  p = plan
  rows: list[tuple[str, str, str]] = [
    ("devices", f"{p.num_devices} x {p.chip}", f"{p.dtype}, {p.batch_size:,} images a step"),
    ("parameters", _number(p.parameters), "the network's"),
    ("FLOPs an image", _number(p.flops_per_image, "FLOP"), "matrix products and convolutions: forward, backward, recomputation"),
    ("", "", ""),
    ("memory a device", "", ""),
    ("  state", _number(p.state_bytes, "B"), "parameters, optimizer, EMA, frozen"),
    ("  arguments", _number(p.argument_bytes, "B"), "the state and a share of the batch, as laid out in memory"),
    ("  temporaries", _number(p.temporary_bytes, "B"), "the most at one time: activations, gradients, scratch"),
    ("  outputs, code", _number(_sum(p.output_bytes, p.code_bytes), "B"), "beside what reuses the arguments' memory"),
    ("  total", _number(p.total_bytes, "B"), _of_memory(p)),
    ("  fits", {True: "yes", False: "no", None: "not known"}[p.fits], "so says the compiler" if p.problem else ""),
    ("", "", ""),
    ("collectives a step", "", ""),
    *_collective_rows(p),
    ("", "", ""),
    *_bounds(p),
  ]  # fmt: skip
  widths = [max(len(row[i]) for row in rows) for i in range(2)]
  lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows]
  return "\n".join(lines + (["", *_advice(p)] if p.fits is False or _over_gpu_share(p) else []))


def _collective_rows(p: Plan) -> list[tuple[str, str, str]]:
  if p.collectives is None:
    unread = (
      "" if p.problem else "this jaxlib cannot read what this libtpu writes: pip install 'ddpm_jax[plan]' has its own"
    )
    return [("  all", "not known", unread)]
  if not p.collectives:
    return [("  all", "none", "")]
  return [
    (f"  {kind}", f"{c.number} of {_number(c.bytes, 'B')}", f"a device sends {_number(c.sent, 'B')} at least")
    for kind, c in p.collectives.items()
  ]


def _bounds(p: Plan) -> list[tuple[str, str, str]]:
  extent = ["on-chip memory included"] if p.chip.startswith("TPU") else []
  extent += [f"{p.loops} loops as if run once"] if p.loops else []
  accessed = ", ".join([f"{_number(p.bytes_accessed, 'B')} by XLA's count", *extent])
  if p.step_seconds is None:
    return [("a step takes at least", "not known", f"no peaks of {p.chip!r}, {p.dtype}; XLA counts {accessed}")]
  compute = f"{_number(p.flops_per_device, 'FLOP')} at {_number(p.peak_flops, 'FLOP/s')}"
  return [
    ("a step takes at least", _number(p.step_seconds, "s"), "the largest of the three below; real steps take longer"),
    ("  computing", _number(p.compute_seconds, "s"), compute),
    ("  memory", _number(p.memory_seconds, "s"), "arguments read and outputs written once"),
    ("  communication", _number(p.communication_seconds, "s"), "over all links at once"),
    ("images a second", _number(p.images_per_second), "at most, on all devices"),
    ("memory, as compiled", _number(p.traffic_seconds, "s"), f"no bound: {_number(p.traffic_bytes, 'B')}; {accessed}"),
  ]


def _advice(plan: Plan) -> list[str]:
  if plan.fits:
    return [
      f"More than {_GPU_SHARE:.0%} of the GPU's memory: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, as JAX takes {_GPU_SHARE:.0%} by default."
    ]
  state = "split the state over more devices (fsdp)"
  rest = ["recompute activations (remat)", "accumulate gradients over smaller parts of the batch", "a smaller batch"]
  if plan.dtype == "float32":
    rest.insert(0, "compute in bfloat16")
  large = plan.memory is not None and plan.state_bytes > plan.memory / 2
  first, *more = [state, *rest] if large else [*rest, state]
  advice = f"Does not fit: {first}; {'; '.join(more)}; or more devices, or ones with more memory."
  return [advice, f"The compiler: {plan.problem}"] if plan.problem else [advice]


def _of_memory(plan: Plan) -> str:
  if plan.memory is None:
    return "the device's memory is not known"
  have = _number(plan.memory, "B")
  return f"of {have}" if plan.total_bytes is None else f"{plan.total_bytes / plan.memory:.1%} of {have}"


def _over_gpu_share(plan: Plan) -> bool:
  if plan.total_bytes is None or plan.memory is None or plan.chip.startswith("TPU"):
    return False
  return plan.total_bytes > _GPU_SHARE * plan.memory


def _fits(compiled: Any, platform: str, total: float | None, memory: float | None) -> bool | None:
  if isinstance(compiled, OutOfMemory):
    return False
  if platform == "tpu":
    # Its compiler refuses what does not.
    return True
  return None if total is None or memory is None else total <= _USABLE * memory


def _memory(compiled: jax.stages.Compiled | OutOfMemory) -> dict[str, Any]:
  """What the compiler says of memory, under the names of `Plan`, and `moved`, the least that any program moves."""
  names = ("argument_bytes", "output_bytes", "temporary_bytes", "code_bytes", "total_bytes", "bytes_accessed", "moved")
  values: dict[str, Any] = dict.fromkeys(names)
  if isinstance(compiled, OutOfMemory):
    return values | {"total_bytes": compiled.needed}
  analysis, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
  if analysis is not None:
    arguments, outputs = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    temporaries, code = analysis.temp_size_in_bytes, analysis.generated_code_size_in_bytes
    new = outputs - analysis.alias_size_in_bytes
    values |= {
      "argument_bytes": arguments,
      "output_bytes": new,
      "temporary_bytes": temporaries,
      "code_bytes": code,
      "total_bytes": arguments + new + temporaries + code,
      "moved": arguments + outputs,
    }
  return values | {"bytes_accessed": cost.get("bytes accessed")}


def _text(compiled: jax.stages.Compiled) -> str | None:
  try:
    return compiled.as_text()
  except jax.errors.JaxRuntimeError:
    # A libtpu newer than this jaxlib may write programs that it cannot read.
    return None


def _out_of_memory(error: str) -> OutOfMemory:
  units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  # "(66.05G) exceeds available HBM (15.75G)"; "Used 31.25G of 15.75G hbm".
  said = re.search(r"([\d.]+)([KMGT]?)\)? (?:exceeds available \w+ \(|of )([\d.]+)([KMGT]?)", error)
  needed, available = (None, None)
  if said is not None:
    needed, available = (float(said.group(i)) * units[said.group(i + 1)] for i in (1, 3))
  lines = [line.strip() for line in error.splitlines() if line.strip()]
  return OutOfMemory(needed, available, lines[0].removeprefix("RESOURCE_EXHAUSTED: "))


def _over(amount: float | None, rate: float | None) -> float | None:
  return None if amount is None or not rate else amount / rate


def _sum(*amounts: float | None) -> float | None:
  known = [amount for amount in amounts if amount is not None]
  return sum(known) if known else None


def _number(amount: float | None, unit: str = "") -> str:
  """Three digits and a unit with a prefix: 35.7 M, 1.57 GB, 12.3 ms."""
  if amount is None:
    return "not known"
  scales = _TIMES if unit == "s" else _SIZES
  scale, prefix = next((step for step in scales if amount >= 0.9995 * step[0]), scales[-1])
  value = amount / scale
  digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
  if scales is _SIZES and not prefix and float(value).is_integer():
    digits = 0
  return f"{value:,.{digits}f} {prefix}{unit}".rstrip()
