"""What a program costs: the FLOPs of its jaxpr, and the collectives and the memory traffic of its compiled HLO."""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

# What is done with a full array of B bytes over a group of g devices: the bytes that each must send at least, over B(g-1)/g.
_FACTORS = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0, "all-to-all": 1.0}
COLLECTIVES = (*_FACTORS, "collective-permute")


def matmul_flops(jaxpr: Any) -> float:
  """FLOPs of the matrix products and convolutions of a program: two for each product of numbers.

  Counted before any optimization, over all devices; what rematerialization computes again is counted again. Products with
  the zeros of padding and dilation do not count, as in XLA's own count. Loops of known length (`lax.scan`) count as
  often as they run, `lax.while_loop` once, `lax.cond` by its dearest branch, `lax.platform_dependent` by its default; custom
  kernels (Pallas, cuDNN) not at all.

  Args:
    jaxpr: `jax.jit(f).trace(...).jaxpr`, or of `jax.make_jaxpr`.
  """
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  return float(sum(_flops(equation) for equation in jaxpr.eqns))


class Collective(NamedTuple):
  """All collectives of one kind in a step, of one device.

  Attributes:
    number: how many are run.
    bytes: of the full arrays: what is reduced, and what is gathered, scattered or exchanged by a whole group.
    sent: the bytes that a device must send for them at least, as a ring of g devices does: 2(g-1)/g of the full arrays for
      an all-reduce, (g-1)/g for the others, all for a collective-permute.
  """

  number: int
  bytes: float
  sent: float


def collectives(hlo_text: str) -> dict[str, Collective]:
  """The collectives of a compiled program, by kind (`COLLECTIVES`), those that do not occur left out.

  An asynchronous one counts once, a combined one with all its arrays. What is inside loops counts as often as the loop runs, if the
  HLO says how often (XLA's `known_trip_count`, or a condition `i < constant` as of `lax.scan`), else once.

  Args:
    hlo_text: `compiled.as_text()`.
  """
  computations, entry = _computations(hlo_text)
  header = hlo_text.partition("\n")[0]
  everyone = math.prod(int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", header))
  total: dict[str, list[float]] = {}
  seen = set()
  for computation, line, times in _walk(computations, entry, 1):
    found = re.search(rf"= (.+?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
    if found is None:
      continue
    shape, kind, start = found.groups()
    # The pieces of one collective that a TPU runs beside other work are in several fusions.
    if chain := re.search(r'chain_id="?\d+', line):
      channel = re.search(r"channel_id=\d+", line)
      piece = (kind, chain.group(), channel and channel.group(), _sizes(shape)[-1])
      if piece in seen:
        continue
      seen.add(piece)
    full, group = _full_bytes(shape, kind, start is not None), _group_size(line, everyone)
    if kind == "reduce-scatter":
      full *= group
    # How a TPU program writes a reduce-scatter: a computation of this name, around an all-reduce.
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
      kind = "reduce-scatter"
    sent = full if kind == "collective-permute" else _FACTORS[kind] * full * (group - 1) / group
    entry_of = total.setdefault(kind, [0, 0.0, 0.0])
    for i, value in enumerate((1, full, sent)):
      entry_of[i] += times * value
  return {kind: Collective(int(total[kind][0]), *total[kind][1:]) for kind in COLLECTIVES if kind in total}


class Operation(NamedTuple):
  """What one operation of a compiled program reads and writes, each time it runs.

  Attributes:
    name: in the HLO.
    kind: its HLO opcode, such as fusion.
    source: the JAX operation that it came from, with the modules around it; empty where XLA does not say.
    times: how often it runs.
    reads: HLO shapes of its operands.
    writes: HLO shape of its result.
    read_bytes: of its operands, as far as they lie in the device's memory.
    written_bytes: of its results, as far as they lie there.
    cycles: of the chip's clock, by the compiler's own estimate; 0 where it makes none.
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
    """Bytes between the device and its memory, all times together."""
    return self.times * (self.read_bytes + self.written_bytes)


# An array in an HLO shape, with its layout.
_ARRAY = r"\w+\[[\d,<=]*\](?:\{[^}]*\})?"
# Instructions that move no data: they name values, group them, or wait for other instructions.
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
  """List the operations of a compiled program that read or write, each with its traffic to the device's memory.

  A TPU's on-chip memory, which XLA's own count (`cost_analysis`) includes, is left out: of a copy between both only one end counts. Of what a fusion
  only slices, or updates in place, the slices count. Loops count as in `collectives`.

  Args:
    hlo_text: `compiled.as_text()`.
  """
  computations, entry = _computations(hlo_text)
  shapes = {name: shape for lines in computations.values() for name, shape, *_ in filter(None, map(_parse, lines))}
  found = []
  for _, line, times in _walk(computations, entry, 1, fusions=False):
    parsed = _parse(line)
    if parsed is None:
      continue
    name, writes, kind, operands, rest = parsed
    if kind in _FREE or kind.endswith("-done") or any(f'"{target}"' in rest for target in _FREE_CALLS):
      continue
    reads = tuple(shapes[operand] for operand in re.findall(r"%?([\w.\-]+)", operands) if operand in shapes)
    read, written = sum(map(_in_memory, reads)), _in_memory(writes)
    if kind == "fusion" and (called := re.search(r"\bcalls=%?([\w.\-]+)", rest)):
      of_operands, of_results = _shares(computations, called.group(1))
      read = sum(_in_memory(shape) * of_operands.get(i, 1.0) for i, shape in enumerate(reads))
      written = sum(_in_memory(shape) * of_results.get(i, 1.0) for i, shape in enumerate(re.findall(_ARRAY, writes)))
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
    source = re.search(r'op_name="([^"]*)"', rest)
    cycles = re.search(r'"estimated_cycles":"(\d+)"', rest)
    found.append(
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
  return found


def _parse(line: str) -> tuple[str, str, str, str, str] | None:
  """Split an instruction into name, shape, opcode, operands and attributes."""
  found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*?)\)(,.*)?$", line)
  if found is None:
    return None
  name, shape, kind, operands, rest = found.groups()
  return name, shape, kind, re.sub(r"/\*.*?\*/", "", operands), rest or ""


def _shares(computations: dict[str, list[str]], fusion: str) -> tuple[dict[int, float], dict[int, float]]:
  """Say what part of an operand a fusion reads, and of a result it writes, where it only slices or updates it: by their indices."""
  lines = computations[fusion]
  parsed = {parts[0]: parts for parts in filter(None, map(_parse, lines))}
  uses: dict[str, list[tuple[str, int]]] = {}
  for name, _, _, operands, _ in parsed.values():
    for place, operand in enumerate(re.findall(r"%?([\w.\-]+)", operands)):
      uses.setdefault(operand, []).append((name, place))

  def size(name: str) -> float:
    return sum(_sizes(parsed[name][1]))

  def touched(name: str) -> float:
    total = 0.0
    for user, place in uses.get(name, ()):
      kind = parsed[user][2]
      if kind == "bitcast":
        total += touched(user)
      elif kind in ("dynamic-slice", "slice"):
        total += size(user)
      elif kind == "fusion" and (called := re.search(r"\bcalls=%?([\w.\-]+)", parsed[user][4])):
        total += _shares(computations, called.group(1))[0].get(place, 1.0) * size(name)
      elif kind != "dynamic-update-slice" or place > 0:
        return math.inf
    return total

  of_operands = {}
  for name, _, kind, operands, _ in parsed.values():
    if kind == "parameter" and (whole := size(name)):
      of_operands[int(operands)] = min(touched(name) / whole, 1.0)
  (root,) = (parts[0] for line in lines if "ROOT " in line and (parts := _parse(line)))
  names = re.findall(r"%?([\w.\-]+)", parsed[root][3]) if parsed[root][2] == "tuple" else [root]
  of_results = {}
  for index, name in enumerate(names):
    while parsed[name][2] == "bitcast":
      name = re.findall(r"%?([\w.\-]+)", parsed[name][3])[0]
    if parsed[name][2] == "dynamic-update-slice":
      of_results[index] = size(re.findall(r"%?([\w.\-]+)", parsed[name][3])[1]) / size(name)
  return of_operands, of_results


def _in_memory(shape: str) -> float:
  """Bytes of a shape's arrays that lie in the device's memory; a layout names any other memory, S(1) being a TPU's VMEM."""
  return sum(
    sum(_sizes(array)) for array, layout in re.findall(r"(\w+\[[\d,<=]*\])(\{[^}]*\})?", shape) if "S(" not in layout
  )


def loops(hlo_text: str) -> int:
  """How many loops are in a compiled program; what XLA counts of a program (`cost_analysis`) counts their bodies once."""
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
      # One way for each platform to compute the same thing: the plain one comes last.
      return matmul_flops(params["branches"][-1])
    return max(matmul_flops(branch) for branch in params["branches"])
  times = 1
  if name == "scan":
    times = params["length"]
  elif name == "shard_map":
    # Its body is what one device does.
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
  """The lines of each computation by its name, and the name of the first to run."""
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
  """Yield each instruction that runs, its computation, and how often it runs, with or without the insides of fusions."""
  for line in computations.get(name, ()):
    yield name, line, times
    if re.search(r" async-(update|done)\(", line) or (" fusion(" in line and not fusions):
      continue
    if body := re.search(r"\bbody=%?([\w.\-]+)", line):
      yield from _walk(computations, body.group(1), times * _trip_count(computations, line), fusions)
    called = re.findall(r"\b(?:calls|true_computation|false_computation)=%?([\w.\-]+)", line)
    # `call-start`: on a SparseCore, beside the TPU's own work.
    if re.search(r" call(-start)?\(", line):
      called += re.findall(r"\bto_apply=%?([\w.\-]+)", line)
    if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
      called += re.findall(r"[\w.\-]+", branches.group(1))
    for callee in called:
      yield from _walk(computations, callee, times, fusions)


def _trip_count(computations: dict[str, list[str]], line: str) -> int:
  if known := re.search(r'"?known_trip_count"?:\{"n":"(\d+)"', line):
    return int(known.group(1))
  condition = re.search(r"\bcondition=%?([\w.\-]+)", line)
  lines = "\n".join(computations.get(condition.group(1), ()) if condition else ())
  limits = re.findall(r"= s32\[\]\S* constant\((\d+)\)", lines)
  return int(limits[0]) if len(limits) == 1 and "direction=LT" in lines else 1


def _sizes(shape: str) -> list[float]:
  """Bytes of each array in an HLO shape, which may be a tuple."""
  sizes = []
  for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", shape):
    bits = re.match(r"[a-z]+(\d+)", dtype)
    count = math.prod(int(dim.lstrip("<=")) for dim in dims.split(",") if dim)
    sizes.append(count * (int(bits.group(1)) / 8 if bits else 1))
  return sizes


def _full_bytes(shape: str, kind: str, start: bool) -> float:
  if not start or kind == "all-reduce":
    return sum(_sizes(shape))
  # What starts an asynchronous one returns its operands, its results, and maybe scalars that it works with.
  sizes = _sizes(re.sub(r"\b[us]32\[\]", "", shape))
  return sum(sizes[len(sizes) // 2 :])


def _group_size(line: str, everyone: int) -> int:
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
    return len(listed.group(1).split(","))
  if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
    return int(tiled.group(1))
  if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh.group(1)))
    # An axis, or a part of one: 'axis':(devices before)size.
    named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh.group(2))
    return math.prod(int(part or sizes.get(axis, 1)) for axis, part in named)
  return max(everyone, 1)
