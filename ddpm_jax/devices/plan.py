"""Estimate the memory, FLOPs, communication and minimum time of a training step without running it."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from ddpm_jax.devices import costs, hardware

PyTree = Any
# The usable fraction of a GPU's memory. CUDA reserves about half a GB, and fragmentation makes some memory unusable.
# TPU compilers know their own limit.
_USABLE_FRACTION = 0.97
# The fraction of a GPU's memory that JAX allocates unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.
_JAX_FRACTION = 0.75
_SIZES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_TIMES = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"))


class OutOfMemory(NamedTuple):
  """Hold a compiler's error that a program does not fit into the memory of a device.

  Attributes:
    needed: the bytes that the program needs; None if the error does not state them.
    available: the bytes that the device has; None if the error does not state them.
    message: the first line of the error.
  """

  needed: float | None
  available: float | None
  message: str


class Plan(NamedTuple):
  """Hold the resources that one step needs, and lower bounds on its time.

  Bytes and FLOPs are for one step on one device unless stated otherwise. Times are for one step. None means unknown.

  Attributes:
    chip: the name of the chip, or the kind of the device if the chip is unknown.
    num_devices: the number of devices.
    batch_size: images in a step, over all devices.
    dtype: the dtype that the network computes in.
    parameters: the number of parameters of the network.
    flops_per_image: FLOPs of matrix products and convolutions for one image, over all devices: forward, backward and
      recomputation (`costs.matmul_flops`).
    flops_per_device: these FLOPs for one step on one device.
    state_bytes: parameters, optimizer state, EMA and frozen parameters, according to their shardings.
    argument_bytes: the arguments of the step: the state and a shard of the batch, including the padding that the
      device's memory layout adds.
    output_bytes: the outputs that do not reuse the memory of an argument.
    temporary_bytes: the peak of activations, gradients and scratch memory.
    code_bytes: the code of the compiled program.
    total_bytes: the sum of arguments, outputs, temporaries and code. If the compiler rejects the program, the bytes
      that its message states.
    memory: the memory of a device.
    fits: whether the program fits into the memory of a device. On a TPU, the program fits if the compiler accepts it.
      On other devices, `total_bytes` must also be at most 97% of `memory`.
    bytes_accessed: bytes that the compiled program reads and writes according to XLA. XLA counts one iteration of each
      loop, and includes a TPU's on-chip memory.
    loops: the number of loops in the program.
    collectives: the collectives by kind, from `costs.collectives`. None if the compiler rejects the program, or the
      program cannot be read.
    peak_flops: the peak FLOP/s of a device for the dtype.
    compute_seconds: the time of the FLOPs at the peak.
    memory_seconds: the time to read the arguments and write the outputs once. Temporaries are not included, because
      they may stay on the chip.
    communication_seconds: the time of the collectives if they use all links at once.
    step_seconds: the largest known value of the three times above. It is a lower bound for the time of a step.
    images_per_second: the batch size divided by `step_seconds`. It is an upper bound for the speed.
    traffic_bytes: bytes that the operations read from and write to the device's memory (`costs.operations`), with all
      iterations of loops.
    traffic_seconds: the time of this traffic at the memory's bandwidth. It is not a lower bound for the time of a step,
      because the step may be possible with less traffic.
    problem: the compiler's message if the compiler rejects the program, otherwise empty.
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
  """Compile a traced step, or return an `OutOfMemory` if the compiler reports that the step does not fit.

  Args:
    traced: the step with abstract arguments, from `jax.jit(step, in_shardings=...).trace(state, batch)`.
    devices: the devices of the step's shardings.
  """
  option = "jax_persistent_cache_min_compile_time_secs"
  old_value = jax.config.values[option]
  if any(device.platform == "tpu" for device in devices):
    # A program for absent TPUs cannot be loaded from the cache, so do not store it there.
    jax.config.update(option, math.inf)
  try:
    return traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return _out_of_memory(str(error))
  finally:
    jax.config.update(option, old_value)


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
  """Compute the resources that a step needs, and bound its time by the chip's roofline.

  Args:
    traced: the step before lowering. The FLOPs are counted in this form, because compilers rewrite the operations.
    compiled: the result of `compile_step`.
    params: the network's parameters or their shapes.
    state: everything that is stored between steps, as arrays or shapes. A leaf without a sharding counts in full.
    batch_size: images in a step, over all devices.
    devices: the devices that the step is compiled for.
    dtype: the dtype that the network computes in. It determines the peak FLOP/s.
    chip: the chip that determines the peaks; None to look up the chip of the devices.

  Raises:
    ValueError: if there are no devices, or the batch is empty.
  """
  count = len(devices)
  if count < 1 or batch_size < 1:
    raise ValueError(f"Got a batch of {batch_size} on {count} devices; expected at least one image and one device.")
  chip = hardware.chip_of(devices[0].device_kind) if chip is None else chip
  flops = costs.matmul_flops(traced.jaxpr)
  memory = _memory(compiled)
  text = None if isinstance(compiled, OutOfMemory) else _text(compiled)
  collectives = None if text is None else costs.collectives(text)
  traffic = None if text is None else sum(operation.bytes for operation in costs.operations(text))
  peak, available = hardware.peak(chip, dtype), None if chip is None else chip.memory
  bandwidth, interconnect = (None, None) if chip is None else (chip.bandwidth, chip.interconnect)
  compute = divide(flops / count, peak)
  moved = divide(memory.pop("moved"), bandwidth)
  sent = None if collectives is None else sum(kind.sent for kind in collectives.values())
  communication = divide(sent, interconnect)
  lower_bounds = [seconds for seconds in (compute, moved, communication) if seconds is not None]
  step = max(lower_bounds) if lower_bounds else None
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
    collectives=collectives,
    peak_flops=peak,
    compute_seconds=compute,
    memory_seconds=moved,
    communication_seconds=communication,
    step_seconds=step,
    images_per_second=batch_size / step if step else None,
    traffic_bytes=traffic,
    traffic_seconds=divide(traffic, bandwidth),
    problem=compiled.message if isinstance(compiled, OutOfMemory) else "",
  )


def state_bytes(state: PyTree) -> float:
  """Return the bytes of a state on one device.

  Args:
    state: arrays or their shapes. A leaf without a sharding counts in full.
  """

  def leaf_bytes(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize

  return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(state))


def to_json(plan: Plan) -> dict[str, Any]:
  """Convert a plan to a dict of JSON values, with the fields of `Plan` as keys."""
  collectives = plan.collectives
  return plan._asdict() | {
    "collectives": None if collectives is None else {kind: item._asdict() for kind, item in collectives.items()}
  }


def table(plan: Plan) -> str:
  """Format a plan as a table with a name, a figure and a comment in each line. 1 GB is 1e9 bytes."""
  p = plan
  rows: list[tuple[str, str, str]] = [
    ("devices", f"{p.num_devices} x {p.chip}", f"{p.dtype}, {p.batch_size:,} images a step"),
    ("parameters", format_number(p.parameters), "of the network"),
    ("FLOPs an image", format_number(p.flops_per_image, "FLOP"), "matrix products and convolutions: forward, backward, recomputation"),
    ("", "", ""),
    ("memory a device", "", ""),
    ("  state", format_number(p.state_bytes, "B"), "parameters, optimizer, EMA, frozen"),
    ("  arguments", format_number(p.argument_bytes, "B"), "the state and a shard of the batch, with padding"),
    ("  temporaries", format_number(p.temporary_bytes, "B"), "at the peak: activations, gradients, scratch memory"),
    ("  outputs, code", format_number(add(p.output_bytes, p.code_bytes), "B"), "without outputs that reuse the arguments' memory"),
    ("  total", format_number(p.total_bytes, "B"), share_of_memory(p.total_bytes, p.memory)),
    ("  fits", {True: "yes", False: "no", None: "unknown"}[p.fits], "by the compiler" if p.problem else ""),
    ("", "", ""),
    ("collectives a step", "", ""),
    *collective_rows(p.collectives, p.problem),
    ("", "", ""),
    *_time_rows(p),
  ]  # fmt: skip
  advice = ["", *_advice(p)] if p.fits is False or _exceeds_jax_fraction(p) else []
  return "\n".join([format_rows(rows), *advice])


def format_rows(rows: Sequence[tuple[str, str, str]]) -> str:
  """Format rows of a name, a figure and a comment as aligned lines."""
  widths = [max(len(row[i]) for row in rows) for i in range(2)]
  return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows)


def collective_rows(collectives: Mapping[str, costs.Collective] | None, problem: str) -> list[tuple[str, str, str]]:
  """Return a row of a table for each kind of collective.

  Args:
    collectives: the collectives by kind; None if they are unknown.
    problem: the compiler's message if the compiler rejects the program, otherwise empty.
  """
  if collectives is None:
    reason = (
      "" if problem else "this jaxlib cannot read programs of this libtpu; install a matching libtpu: 'ddpm_jax[plan]'"
    )
    return [("  all", "unknown", reason)]
  if not collectives:
    return [("  all", "none", "")]
  return [
    (
      f"  {kind}",
      f"{c.number:,}",
      f"{format_number(c.bytes, 'B')} in total; a device sends at least {format_number(c.sent, 'B')}",
    )
    for kind, c in collectives.items()
  ]


def _time_rows(p: Plan) -> list[tuple[str, str, str]]:
  remarks = ["includes on-chip memory"] if p.chip.startswith("TPU") else []
  remarks += ["counts each loop once"] if p.loops else []
  accessed = f"{format_number(p.bytes_accessed, 'B')} by XLA's count" + (f" ({', '.join(remarks)})" if remarks else "")
  if p.step_seconds is None:
    return [("a step takes at least", "unknown", f"no known peaks of {p.chip!r}, {p.dtype}; traffic is {accessed}")]
  compute = f"{format_number(p.flops_per_device, 'FLOP')} at {format_number(p.peak_flops, 'FLOP/s')}"
  return [
    (
      "a step takes at least",
      format_number(p.step_seconds, "s"),
      "the largest of the three times below; real steps take longer",
    ),
    ("  computing", format_number(p.compute_seconds, "s"), compute),
    ("  memory", format_number(p.memory_seconds, "s"), "to read arguments and write outputs once"),
    ("  communication", format_number(p.communication_seconds, "s"), "over all links at once"),
    ("images a second", format_number(p.images_per_second), "at most, on all devices"),
    (
      "memory, as compiled",
      format_number(p.traffic_seconds, "s"),
      f"not a bound: {format_number(p.traffic_bytes, 'B')}; {accessed}",
    ),
  ]


def _advice(plan: Plan) -> list[str]:
  if plan.fits:
    return [
      f"Needs more than {_JAX_FRACTION:.0%} of the GPU's memory, JAX's default limit. Set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95."
    ]
  shard_state = "split the state over more devices (fsdp)"
  options = [
    "recompute activations (remat)",
    "accumulate gradients over smaller parts of the batch",
    "use a smaller batch",
  ]
  if plan.dtype == "float32":
    options.insert(0, "compute in bfloat16")
  is_large_state = plan.memory is not None and plan.state_bytes > plan.memory / 2
  options = [shard_state, *options] if is_large_state else [*options, shard_state]
  advice = f"Does not fit: {'; '.join(options)}; or use more devices, or devices with more memory."
  return [advice, f"Compiler: {plan.problem}"] if plan.problem else [advice]


def share_of_memory(total: float | None, memory: float | None) -> str:
  """Describe the share of a device's memory that a number of bytes takes."""
  if memory is None:
    return "the device's memory is unknown"
  have = format_number(memory, "B")
  return f"of {have}" if total is None else f"{total / memory:.1%} of {have}"


def _exceeds_jax_fraction(plan: Plan) -> bool:
  if plan.total_bytes is None or plan.memory is None or plan.chip.startswith("TPU"):
    return False
  return plan.total_bytes > _JAX_FRACTION * plan.memory


def _fits(compiled: Any, platform: str, total: float | None, memory: float | None) -> bool | None:
  if isinstance(compiled, OutOfMemory):
    return False
  if platform == "tpu":
    # TPU compilers reject a program that does not fit.
    return True
  return None if total is None or memory is None else total <= _USABLE_FRACTION * memory


def _memory(compiled: jax.stages.Compiled | OutOfMemory) -> dict[str, Any]:
  """Return the compiler's memory figures as a dict with fields of `Plan` as keys.

  The additional key "moved" is for the minimum number of bytes that a step reads and writes.
  """
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
    # This jaxlib may be unable to read programs of a newer libtpu.
    return None


def _out_of_memory(error: str) -> OutOfMemory:
  units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  # Match "(66.05G) exceeds available HBM (15.75G)" and "Used 31.25G of 15.75G hbm".
  match = re.search(r"([\d.]+)([KMGT]?)\)? (?:exceeds available \w+ \(|of )([\d.]+)([KMGT]?)", error)
  needed, available = (None, None)
  if match is not None:
    needed, available = (float(match.group(i)) * units[match.group(i + 1)] for i in (1, 3))
  lines = [line.strip() for line in error.splitlines() if line.strip()]
  return OutOfMemory(needed, available, lines[0].removeprefix("RESOURCE_EXHAUSTED: "))


def divide(amount: float | None, rate: float | None) -> float | None:
  """Return the time that an amount takes at a rate, or None if the amount or the rate is unknown."""
  return None if amount is None or not rate else amount / rate


def add(*amounts: float | None) -> float | None:
  """Return the sum of the known amounts, or None if all are unknown."""
  addends = [amount for amount in amounts if amount is not None]
  return sum(addends) if addends else None


def format_number(amount: float | None, unit: str = "") -> str:
  """Format a number with three digits, an SI prefix and a unit, such as 35.7 M, 1.57 GB or 12.3 ms."""
  if amount is None:
    return "unknown"
  scales = _TIMES if unit == "s" else _SIZES
  scale, prefix = next((step for step in scales if amount >= 0.9995 * step[0]), scales[-1])
  value = amount / scale
  digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
  if scales is _SIZES and not prefix and float(value).is_integer():
    digits = 0
  return f"{value:,.{digits}f} {prefix}{unit}".rstrip()
