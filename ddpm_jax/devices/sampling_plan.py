"""Estimate the memory, FLOPs, communication and minimum time of sampling without running it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from ddpm_jax.devices import costs, hardware, plan
from ddpm_jax.devices.plan import OutOfMemory

PyTree = Any


class Work(NamedTuple):
  """Describe the parts of a sampling program, for one batch over all devices.

  Attributes:
    batch_size: the number of samples.
    steps: the number of sampling steps.
    calls: the number of network calls for a sample; None if the number depends on the data.
    encode_flops: FLOPs to encode the conditions.
    call_flops: FLOPs of a network call, including guidance.
    decode_flops: FLOPs to decode the samples.
  """

  batch_size: int
  steps: int
  calls: int | None
  encode_flops: float
  call_flops: float
  decode_flops: float


class SamplingPlan(NamedTuple):
  """Hold the resources that sampling needs, and lower bounds on its time.

  Bytes are for one device. FLOPs are for one image, and include only matrix products and convolutions
  (`costs.matmul_flops`). None means unknown.

  Attributes:
    chip: the name of the chip, or the kind of the device if the chip is unknown.
    num_devices: the number of devices.
    batch_size: images in a batch, over all devices.
    dtype: the dtype that the network computes in.
    steps: the number of sampling steps.
    calls: the number of network calls for an image; None if the number depends on the data. Guidance may double the
      batch of a call, but does not change this number.
    parameters: the number of parameters of the network.
    frozen_parameters: the number of parameters of the codec, the encoders of conditions and the models that guide.
    encode_flops: FLOPs to encode the conditions.
    step_flops: FLOPs of an average step, including guidance. The body of a loop of adaptive steps counts once.
    decode_flops: FLOPs to decode an image.
    parameter_bytes: the network's parameters, according to their shardings.
    frozen_bytes: the frozen parameters, according to their shardings.
    argument_bytes: the arguments of the program: all parameters and a batch of conditions, including the padding that
      the device's memory layout adds.
    output_bytes: the samples.
    temporary_bytes: the peak of features, gathered parameters and scratch memory.
    code_bytes: the code of the compiled program.
    total_bytes: the sum of arguments, outputs, temporaries and code. If the compiler rejects the program, the bytes
      that its message states.
    memory: the memory of a device.
    fits: whether the program fits into the memory of a device (see `plan.Plan`).
    collectives: the collectives of a batch by kind, from `costs.collectives`. None if the compiler rejects the program,
      or the program cannot be read.
    compute_seconds: for a batch, the time of the FLOPs at the peak.
    memory_seconds: for a batch, the time to read the network's parameters once for each network call, and the frozen
      parameters once.
    communication_seconds: for a batch, the time of the collectives if they use all links at once.
    step_seconds: a lower bound for the time of an average step. It is the largest known value of the step's computing
      time, memory time and communication time.
    decode_seconds: a lower bound for the time to decode a batch. It is the largest known value of the decoder's
      computing time and memory time.
    batch_seconds: a lower bound for the time of a batch. It is the largest known value of `compute_seconds`,
      `memory_seconds` and `communication_seconds`.
    image_seconds: `batch_seconds` divided by the batch size. None if the number of network calls is unknown.
    problem: the compiler's message if the compiler rejects the program, otherwise empty.
  """

  chip: str
  num_devices: int
  batch_size: int
  dtype: str
  steps: int
  calls: int | None
  parameters: int
  frozen_parameters: int
  encode_flops: float
  step_flops: float
  decode_flops: float
  parameter_bytes: float
  frozen_bytes: float
  argument_bytes: float | None
  output_bytes: float | None
  temporary_bytes: float | None
  code_bytes: float | None
  total_bytes: float | None
  memory: float | None
  fits: bool | None
  collectives: Mapping[str, costs.Collective] | None
  compute_seconds: float | None
  memory_seconds: float | None
  communication_seconds: float | None
  step_seconds: float | None
  decode_seconds: float | None
  batch_seconds: float | None
  image_seconds: float | None
  problem: str


def make_plan(
  traced: jax.stages.Traced,
  compiled: jax.stages.Compiled | OutOfMemory,
  work: Work,
  *,
  params: PyTree,
  frozen: PyTree,
  codec: PyTree = None,
  devices: Sequence[Any],
  dtype: Any,
  chip: hardware.Chip | None = None,
) -> SamplingPlan:
  """Compute the resources that a sampling program needs, and bound its time by the chip's roofline.

  Args:
    traced: the program before lowering, for one batch.
    compiled: the result of `plan.compile_step`.
    work: the parts of the program.
    params: the parameters of the network as shapes, with shardings if they are sharded.
    frozen: all other parameters, in the same form.
    codec: the parameters in `frozen` that decode the samples; None without a codec.
    devices: the devices that the program is compiled for.
    dtype: the dtype that the network computes in. It determines the peak FLOP/s.
    chip: the chip that determines the peaks; None to look up the chip of the devices.

  Raises:
    ValueError: if there are no devices, or the batch is empty.
  """
  state, size, count = (params, frozen), work.batch_size, len(devices)
  program = plan.make_plan(
    traced, compiled, params=params, state=state, batch_size=size, devices=devices, dtype=dtype, chip=chip
  )
  chip = hardware.chip_of(devices[0].device_kind) if chip is None else chip
  bandwidth = None if chip is None else chip.bandwidth
  counted = program.flops_per_image * size - work.encode_flops - work.decode_flops
  # A call that only some steps make, such as the second call of Heun's rule, is counted in all steps of the program. So
  # the number of calls is used instead, if it is known.
  loop_flops = counted if work.calls is None else work.calls * work.call_flops
  share = loop_flops / counted if counted else 1.0
  total_flops, step_flops = work.encode_flops + loop_flops + work.decode_flops, loop_flops / work.steps
  calls = work.steps if work.calls is None else work.calls
  network_bytes, frozen_bytes, codec_bytes = map(_full_bytes, (params, frozen, codec))

  def computing(flops: float) -> float | None:
    return plan.divide(flops / count, program.peak_flops)

  def reading(amount: float) -> float | None:
    return plan.divide(amount, bandwidth)

  read, computed = reading(calls * network_bytes + frozen_bytes), computing(total_flops)
  sent = None if program.communication_seconds is None else share * program.communication_seconds
  step = _largest(
    computing(step_flops), reading(calls / work.steps * network_bytes), None if sent is None else sent / work.steps
  )
  batch = _largest(computed, read, sent)
  fields: dict[str, Any] = {name: getattr(program, name) for name in SamplingPlan._fields if name in plan.Plan._fields}
  fields |= {"steps": work.steps, "calls": work.calls, "step_flops": step_flops / size}
  fields |= {"encode_flops": work.encode_flops / size, "decode_flops": work.decode_flops / size}
  fields |= {
    "frozen_parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(frozen)),
    "parameter_bytes": plan.state_bytes(params),
    "frozen_bytes": plan.state_bytes(frozen),
    "collectives": _scaled(program.collectives, share),
    "compute_seconds": computed,
    "communication_seconds": sent,
    "memory_seconds": read,
    "step_seconds": step,
    "decode_seconds": _largest(computing(work.decode_flops), reading(codec_bytes)),
    "batch_seconds": batch,
    "image_seconds": None if batch is None or work.calls is None else batch / size,
  }
  return SamplingPlan(**fields)


def table(p: SamplingPlan) -> str:
  """Format a plan as a table with a name, a figure and a comment in each line. 1 GB is 1e9 bytes."""
  number = plan.format_number
  calls = "as many network calls as the data need" if p.calls is None else f"{p.calls:,} network calls"
  rows: list[tuple[str, str, str]] = [
    ("devices", f"{p.num_devices} x {p.chip}", f"{p.dtype}, batches of {p.batch_size:,}"),
    ("parameters", number(p.parameters), "of the network"),
    ("frozen parameters", number(p.frozen_parameters), "of the codec, the conditions and the models that guide"),
    ("steps", f"{p.steps:,}", calls),
    ("FLOPs a step", number(p.step_flops, "FLOP"), "for one image, with guidance: matrix products and convolutions"),
    ("FLOPs to encode", number(p.encode_flops, "FLOP"), "the conditions of one image"),
    ("FLOPs to decode", number(p.decode_flops, "FLOP"), "one image"),
    ("", "", ""),
    ("memory a device", "", ""),
    ("  parameters", number(p.parameter_bytes, "B"), "the device's shards"),
    ("  frozen", number(p.frozen_bytes, "B"), "the device's shards"),
    ("  arguments", number(p.argument_bytes, "B"), "all of these and the conditions, with padding"),
    ("  temporaries", number(p.temporary_bytes, "B"), "at the peak: features, gathered parameters, scratch memory"),
    ("  outputs, code", number(plan.add(p.output_bytes, p.code_bytes), "B"), ""),
    ("  total", number(p.total_bytes, "B"), plan.share_of_memory(p.total_bytes, p.memory)),
    ("  fits", {True: "yes", False: "no", None: "unknown"}[p.fits], "by the compiler" if p.problem else ""),
    ("", "", ""),
    ("collectives a batch", "", ""),
    *plan.collective_rows(p.collectives, p.problem),
    ("", "", ""),
    *_time_rows(p),
  ]
  return plan.format_rows(rows) + ("" if p.fits is not False else f"\n\n{_advice(p)}")


def _time_rows(p: SamplingPlan) -> list[tuple[str, str, str]]:
  number = plan.format_number
  if p.batch_seconds is None:
    return [("a step takes at least", "unknown", f"no known peaks of {p.chip!r}, {p.dtype}")]
  covered = "one loop over the steps" if p.calls is None else "all steps and the decoding"
  return [
    ("a step takes at least", number(p.step_seconds, "s"), "for a batch; real steps take longer"),
    ("decoding at least", number(p.decode_seconds, "s"), "for a batch"),
    ("a batch at least", number(p.batch_seconds, "s"), f"{covered}; the largest of the three times below"),
    ("  computing", number(p.compute_seconds, "s"), "at the peak"),
    ("  memory", number(p.memory_seconds, "s"), "to read the parameters for each network call"),
    ("  communication", number(p.communication_seconds, "s"), "over all links at once"),
    ("an image at least", number(p.image_seconds, "s"), "on all devices together"),
  ]


def _advice(p: SamplingPlan) -> str:
  options = ["use a smaller batch (--num_samples)"]
  if p.frozen_parameters:
    options.append("decode in tiles (config.model.codec.tile)")
  if p.dtype == "float32":
    options.insert(0, "compute in bfloat16")
  if p.memory is not None and p.parameter_bytes + p.frozen_bytes > p.memory / 2:
    options.insert(0, "split the parameters over more devices (--fsdp)")
  advice = f"Does not fit: {'; '.join(options)}; or use devices with more memory."
  return f"{advice}\nCompiler: {p.problem}" if p.problem else advice


def _full_bytes(tree: PyTree) -> int:
  """Return the bytes of full arrays, whatever their shardings are.

  Each device reads the full parameters.
  """
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _scaled(collectives: Mapping[str, costs.Collective] | None, share: float) -> dict[str, costs.Collective] | None:
  if collectives is None:
    return None
  return {
    kind: costs.Collective(round(share * one.number), share * one.bytes, share * one.sent)
    for kind, one in collectives.items()
  }


def _largest(*seconds: float | None) -> float | None:
  known = [one for one in seconds if one is not None]
  return max(known) if known else None
