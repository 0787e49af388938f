"""Count the FLOPs of a jaxpr, and the collectives and memory traffic of a compiled program."""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

# Consider a collective on a full array of B bytes in a group of g devices. Each device must send at least the factor
# below times B(g-1)/g bytes.
_FACTORS = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0, "all-to-all": 1.0}
COLLECTIVES = (*_FACTORS, "collective-permute")


def matmul_flops(jaxpr: Any) -> float:
  """Count the FLOPs of a program's matrix products and convolutions, with two FLOPs for each multiply-add.

  The count is for all devices together, and for the program before optimization. These rules apply:

  - Recomputed (rematerialized) operations count again.
  - In a convolution, products with zeros from padding or dilation do not count. XLA's own count omits them too.
  - The body of `lax.scan` counts once for each iteration. The body of `lax.while_loop` counts once.
  - `lax.cond` counts as its most expensive branch, and `lax.platform_dependent` as its default branch.
  - Custom kernels (Pallas, cuDNN) do not count.

  Args:
    jaxpr: the program, from `jax.jit(f).trace(...).jaxpr` or `jax.make_jaxpr`.
  """
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  return float(sum(_flops(equation) for equation in jaxpr.eqns))


class Collective(NamedTuple):
  """Hold the totals over all collectives of one kind, for one device and one step.

  Attributes:
    number: the number of collectives.
    bytes: the bytes of the full arrays, before they are scattered or after they are gathered.
    sent: the minimum number of bytes that a device sends. In a group of g devices this is `bytes` times 2(g-1)/g for an
      all-reduce, times 1 for a collective-permute, and times (g-1)/g for other kinds.
  """

  number: int
  bytes: float
  sent: float


def collectives(hlo_text: str) -> dict[str, Collective]:
  """Return a dict from each kind of collective in a compiled program to the totals of this kind.

  The kinds are in `COLLECTIVES`. An asynchronous collective counts once. A combined collective counts once, with the
  bytes of all its arrays. A collective in a loop counts once for each iteration if the HLO states the number of
  iterations, and once otherwise. The HLO states this number as XLA's `known_trip_count`, or as a condition
  `i < constant`, as in `lax.scan`.

  Args:
    hlo_text: the program, from `compiled.as_text()`.
  """
  computations, entry = _computations(hlo_text)
  header = hlo_text.partition("\n")[0]
  num_devices = math.prod(int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", header))
  total: dict[str, list[float]] = {}
  seen = set()
  for computation, line, times in _walk(computations, entry, 1):
    match = re.search(rf"= (.+?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
    if match is None:
      continue
    shape, kind, start = match.groups()
    # A TPU splits a collective that overlaps with other work into several fusions. Count only the first of them.
    if chain := re.search(r'chain_id="?\d+', line):
      channel = re.search(r"channel_id=\d+", line)
      piece = (kind, chain.group(), channel and channel.group(), _sizes(shape)[-1])
      if piece in seen:
        continue
      seen.add(piece)
    full, group = _full_bytes(shape, kind, start is not None), _group_size(line, num_devices)
    if kind == "reduce-scatter":
      full *= group
    # In a TPU program, a reduce-scatter is an all-reduce inside a computation named "all-reduce-scatter...".
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
      kind = "reduce-scatter"
    sent = full if kind == "collective-permute" else _FACTORS[kind] * full * (group - 1) / group
    totals = total.setdefault(kind, [0, 0.0, 0.0])
    for i, value in enumerate((1, full, sent)):
      totals[i] += times * value
  return {kind: Collective(int(total[kind][0]), *total[kind][1:]) for kind in COLLECTIVES if kind in total}


class Operation(NamedTuple):
  """Describe one operation of a compiled program and its memory traffic.

  Attributes:
    name: the name in the HLO.
    kind: the HLO opcode, such as fusion.
    source: the JAX operation that this HLO operation comes from, with the names of the enclosing modules; empty if XLA
      does not record the JAX operation.
    times: the number of times that this operation runs.
    reads: the HLO shapes of the operands.
    writes: the HLO shape of the result.
    read_bytes: the bytes that one run reads from the device's main memory.
    written_bytes: the bytes that one run writes to the device's main memory.
    cycles: the compiler's estimate of the clock cycles; 0 without an estimate.
  """

  name: str
  kind: str
  source: str
  times: int
  reads: tuple[str, ...]
  writes: str
  read_bytes: float
  written_bytes: float
  cycles: int

  @property
  def bytes(self) -> float:
    """Return the bytes read from and written to the device's main memory in all runs."""
    return self.times * (self.read_bytes + self.written_bytes)


# An array in an HLO shape, with its layout.
_ARRAY = r"\w+\[[\d,<=]*\](?:\{[^}]*\})?"
# Instructions that move no data. They name or group values, or wait for other instructions.
_FREE = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "after-all",
  "opt-barrier",
  "while",
  "call",
  "conditional",
}
_FREE_CALLS = ("ConcatBitcast", "AllocateBuffer")


def operations(hlo_text: str) -> list[Operation]:
  """List the operations of a compiled program with their traffic to the device's main memory.

  Operations that move no data are omitted. Traffic to a TPU's on-chip memory does not count, so a copy between main
  memory and on-chip memory counts only once. XLA's own count (`cost_analysis`) includes on-chip memory. If a fusion
  only slices an operand, or only updates a slice of an operand in place, only the slice counts. An operation in a loop
  counts once for each iteration, under the conditions that `collectives` describes.

  Args:
    hlo_text: the program, from `compiled.as_text()`.
  """
  computations, entry = _computations(hlo_text)
  shapes = {name: shape for lines in computations.values() for name, shape, *_ in filter(None, map(_parse, lines))}
  result = []
  for _, line, times in _walk(computations, entry, 1, fusions=False):
    parsed = _parse(line)
    if parsed is None:
      continue
    name, writes, kind, operands, attributes = parsed
    if kind in _FREE or kind.endswith("-done") or any(f'"{target}"' in attributes for target in _FREE_CALLS):
      continue
    reads = tuple(shapes[operand] for operand in re.findall(r"%?([\w.\-]+)", operands) if operand in shapes)
    read, written = sum(map(_in_memory, reads)), _in_memory(writes)
    if kind == "fusion" and (called := re.search(r"\bcalls=%?([\w.\-]+)", attributes)):
      read_fractions, written_fractions = _traffic_fractions(computations, called.group(1))
      read = sum(_in_memory(shape) * read_fractions.get(i, 1.0) for i, shape in enumerate(reads))
      results = re.findall(_ARRAY, writes)
      written = sum(_in_memory(shape) * written_fractions.get(i, 1.0) for i, shape in enumerate(results))
    elif kind == "copy-start":
      # (copy, original, context)
      copy, original = re.findall(_ARRAY, writes)[:2]
      read, written = _in_memory(original), _in_memory(copy)
    elif kind == "slice-start":
      # ((original), slice, context)
      original, part = re.findall(_ARRAY, writes)[:2]
      read, written = _sizes(part)[0] if _in_memory(original) else 0.0, _in_memory(part)
    elif kind.endswith("-start") and writes.startswith("("):
      # (operands, results, contexts)
      written = max(written - read, 0.0)
    source = re.search(r'op_name="([^"]*)"', attributes)
    cycles = re.search(r'"estimated_cycles":"(\d+)"', attributes)
    result.append(
      Operation(
        name,
        kind,
        source.group(1) if source else "",
        times,
        reads,
        writes,
        read,
        written,
        int(cycles.group(1)) if cycles else 0,
      )
    )
  return result


def _parse(line: str) -> tuple[str, str, str, str, str] | None:
  """Split an instruction into name, shape, opcode, operands and attributes."""
  match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*?)\)(,.*)?$", line)
  if match is None:
    return None
  name, shape, kind, operands, attributes = match.groups()
  return name, shape, kind, re.sub(r"/\*.*?\*/", "", operands), attributes or ""


def _traffic_fractions(computations: dict[str, list[str]], fusion: str) -> tuple[dict[int, float], dict[int, float]]:
  """Return two dicts of fractions, for the operands and for the results of a fusion.

  The first dict maps the index of an operand to the fraction of the operand that the fusion reads. The second dict maps
  the index of a result to the fraction of the result that the fusion writes. A fraction is below 1 if the fusion only
  slices the operand, or only updates a slice of the result. If an index is missing, the fraction is 1.
  """
  lines = computations[fusion]
  parsed = {parts[0]: parts for parts in filter(None, map(_parse, lines))}
  uses: dict[str, list[tuple[str, int]]] = {}
  for name, _, _, operands, _ in parsed.values():
    for position, operand in enumerate(re.findall(r"%?([\w.\-]+)", operands)):
      uses.setdefault(operand, []).append((name, position))

  def size(name: str) -> float:
    return sum(_sizes(parsed[name][1]))

  def bytes_read(name: str) -> float:
    total = 0.0
    for user, position in uses.get(name, ()):
      kind = parsed[user][2]
      if kind == "bitcast":
        total += bytes_read(user)
      elif kind in ("dynamic-slice", "slice"):
        total += size(user)
      elif kind == "fusion" and (called := re.search(r"\bcalls=%?([\w.\-]+)", parsed[user][4])):
        total += _traffic_fractions(computations, called.group(1))[0].get(position, 1.0) * size(name)
      elif kind != "dynamic-update-slice" or position > 0:
        return math.inf
    return total

  read_fractions = {}
  for name, _, kind, operands, _ in parsed.values():
    if kind == "parameter" and (full := size(name)):
      read_fractions[int(operands)] = min(bytes_read(name) / full, 1.0)
  (root,) = (parts[0] for line in lines if "ROOT " in line and (parts := _parse(line)))
  names = re.findall(r"%?([\w.\-]+)", parsed[root][3]) if parsed[root][2] == "tuple" else [root]
  written_fractions = {}
  for index, name in enumerate(names):
    while parsed[name][2] == "bitcast":
      name = re.findall(r"%?([\w.\-]+)", parsed[name][3])[0]
    if parsed[name][2] == "dynamic-update-slice":
      written_fractions[index] = size(re.findall(r"%?([\w.\-]+)", parsed[name][3])[1]) / size(name)
  return read_fractions, written_fractions


def _in_memory(shape: str) -> float:
  """Return how many bytes of an HLO shape are in the device's main memory."""
  # If an array is in another memory, its layout contains S(...). For example, S(1) is a TPU's VMEM.
  return sum(
    sum(_sizes(array)) for array, layout in re.findall(r"(\w+\[[\d,<=]*\])(\{[^}]*\})?", shape) if "S(" not in layout
  )


def loops(hlo_text: str) -> int:
  """Count the loops in a compiled program.

  If there are loops, XLA's own counts (`cost_analysis`) are too low: they include only one iteration of each loop.
  """
  return len(re.findall(r"^\s.* while\(", hlo_text, re.MULTILINE))


def _flops(equation: Any) -> float:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    return (
      2.0
      * math.prod(equation.outvars[0].aval.shape)
      * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    )
  if name == "conv_general_dilated":
    return _convolution_flops(equation)
  if name == "cond":
    if params.get("branches_platforms") is not None:
      # `lax.platform_dependent` has one branch for each platform. The default comes last.
      return matmul_flops(params["branches"][-1])
    return max(matmul_flops(branch) for branch in params["branches"])
  times = 1
  if name == "scan":
    times = params["length"]
  elif name == "shard_map":
    # The body is the work of one device.
    times = params["mesh"].size
  return times * sum(matmul_flops(inner) for inner in _inner(params.values()))


def _inner(values: Iterable[Any]) -> Iterator[Any]:
  for value in values:
    if isinstance(value, core.ClosedJaxpr | core.Jaxpr):
      yield value


def _convolution_flops(equation: Any) -> float:
  params = equation.params
  dims = params["dimension_numbers"]
  lhs, rhs = (variable.aval.shape for variable in equation.invars)
  out = equation.outvars[0].aval.shape
  products = 2.0 * out[dims.out_spec[0]] * out[dims.out_spec[1]] * rhs[dims.rhs_spec[1]]
  for i, (stride, (low, _), spread, dilation) in enumerate(
    zip(params["window_strides"], params["padding"], params["lhs_dilation"], params["rhs_dilation"], strict=True)
  ):
    size, kernel = lhs[dims.lhs_spec[2 + i]], rhs[dims.rhs_spec[2 + i]]
    starts = stride * np.arange(out[dims.out_spec[2 + i]])[:, None] - low
    position = starts + dilation * np.arange(kernel)[None]
    products *= np.count_nonzero((position >= 0) & (position <= (size - 1) * spread) & (position % spread == 0))
  return products


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Return a dict from the name of a computation to its lines, and the name of the entry computation."""
  computations: dict[str, list[str]] = {}
  entry = current = ""
  for line in text.splitlines():
    if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
      current = head.group(2)
      computations[current] = []
      entry = current if head.group(1) else entry
    elif current and " = " in line:
      computations[current].append(line)
  return computations, entry


def _walk(
  computations: dict[str, list[str]], name: str, times: int, fusions: bool = True
) -> Iterator[tuple[str, str, int]]:
  """Yield each executed instruction as (computation, line, number of runs).

  `fusions` is whether to include the instructions inside fusions.
  """
  for line in computations.get(name, ()):
    yield name, line, times
    if re.search(r" async-(update|done)\(", line) or (" fusion(" in line and not fusions):
      continue
    if body := re.search(r"\bbody=%?([\w.\-]+)", line):
      yield from _walk(computations, body.group(1), times * _trip_count(computations, line), fusions)
    called = re.findall(r"\b(?:calls|true_computation|false_computation)=%?([\w.\-]+)", line)
    # `call-start` runs on a SparseCore in parallel with the TPU core.
    if re.search(r" call(-start)?\(", line):
      called += re.findall(r"\bto_apply=%?([\w.\-]+)", line)
    if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
      called += re.findall(r"[\w.\-]+", branches.group(1))
    for callee in called:
      yield from _walk(computations, callee, times, fusions)


def _trip_count(computations: dict[str, list[str]], line: str) -> int:
  if match := re.search(r'"?known_trip_count"?:\{"n":"(\d+)"', line):
    return int(match.group(1))
  condition = re.search(r"\bcondition=%?([\w.\-]+)", line)
  lines = "\n".join(computations.get(condition.group(1), ()) if condition else ())
  limits = re.findall(r"= s32\[\]\S* constant\((\d+)\)", lines)
  return int(limits[0]) if len(limits) == 1 and "direction=LT" in lines else 1


def _sizes(shape: str) -> list[float]:
  """Return the size in bytes of each array in an HLO shape or in a tuple of shapes."""
  sizes = []
  for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", shape):
    bits = re.match(r"[a-z]+(\d+)", dtype)
    count = math.prod(int(dim.lstrip("<=")) for dim in dims.split(",") if dim)
    sizes.append(count * (int(bits.group(1)) / 8 if bits else 1))
  return sizes


def _full_bytes(shape: str, kind: str, start: bool) -> float:
  if not start or kind == "all-reduce":
    return sum(_sizes(shape))
  # The start of an asynchronous collective returns its operands, its results, and sometimes scalars.
  sizes = _sizes(re.sub(r"\b[us]32\[\]", "", shape))
  return sum(sizes[len(sizes) // 2 :])


def _group_size(line: str, num_devices: int) -> int:
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
    return len(listed.group(1).split(","))
  if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
    return int(tiled.group(1))
  if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh.group(1)))
    # Each item is an axis, or a part of an axis, written as 'axis':(devices before)size.
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh.group(2))
    return math.prod(int(part or sizes.get(axis, 1)) for axis, part in axes)
  return max(num_devices, 1)
