"""Measure the memory traffic of layers, blocks and train steps compiled for a TPU, without a TPU.

python experiments/benchmarks/traffic.py [--parts=residual,attention] [--types=bfloat16] [--operations=20]
python experiments/benchmarks/traffic.py --topology=v5e:2x4 --types=bfloat16 --batch=1024 configs/cifar10_vp.py

The first command compiles single layers and small blocks, forward and backward, for one chip and 128 images. Each
compilation takes between a few seconds and a minute. The second command compiles train steps of recipes. Each
compilation takes minutes. Both commands need libtpu (pip install '.[plan]').

The tables have the following columns. All except the ratios are in gigabytes (1e9 bytes) per chip.

- minimum: the bytes that every program must move. Every program writes each activation for the backward pass once and
  reads it once. Every program also reads the weights once, in the data type of the computation. A block also reads its
  inputs and the gradients of its outputs once, and writes its outputs and the gradients of its inputs once. A train
  step also reads and writes its state once. An activation does not count if elementwise operations can compute it from
  other activations.
- memory: the bytes that all operations of the compiled program read from and write to the chip's memory
  (costs.operations).
- XLA: "bytes accessed" as counted by XLA. This number also includes copies to on-chip memory (128 MB on a v5e) and
  reads from on-chip memory.
- temporaries: the peak of live memory besides arguments and results.
- ratio: the number in the column to the left, divided by the minimum.

The column "ms, estimated" is the sum of the compiler's cycle estimates over all operations, at the clock rate that
corresponds to the chip's peak. --operations=N lists the N operations with the most cycles. --json=<file> saves the
results.
"""

import argparse
import math
import re
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import timing
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding
from recipe import load, loss_of, trace_step

from ddpm_jax import networks
from ddpm_jax.devices import costs, plan, topology
from ddpm_jax.networks import layers
from ddpm_jax.runs import stepping

# A v5e has four matrix units, each with 128 x 128 products per cycle.
CLOCK = 197e12 / (4 * 128 * 128 * 2)
COLUMNS = ["minimum", "memory", "ratio", "XLA", "ratio", "temporaries", "ms, estimated", "compiling, s"]


class Block(nn.Module):
  """Make a module from a function in `BLOCKS`."""

  function: object
  dtype: object

  @nn.compact
  def __call__(self, embedding, keys, *data):
    """Apply the function and return one array."""
    options = networks.UNet(dtype=self.dtype)._block_options
    return self.function(options, embedding, jax.random.wrap_key_data(keys), *data)


def residual(options, embedding, keys, *data):
  return layers.ResidualBlock(data[0].shape[-1], options, name="block")(
    data if len(data) > 1 else data[0], embedding, keys
  )


FINE, COARSE = (32, 32, 128), (16, 16, 256)
# For each name: a block as a function of options, embedding, keys and data, and the shapes of the data.
BLOCKS = {
  "normalization": (lambda options, e, k, x: nn.swish(options.norm("norm")(x)), [COARSE]),
  "convolution": (lambda options, e, k, x: layers.conv(x, x.shape[-1], "conv", options.dtype), [COARSE]),
  "dropout": (lambda options, e, k, x: layers.conv(layers.drop(x, 0.1, k, "block"), x.shape[-1], "conv", options.dtype), [COARSE]),
  "downsample": (lambda options, e, k, x: layers.Downsample(False, options.dtype, name="conv")(x), [FINE]),
  "upsample": (lambda options, e, k, x: layers.Upsample(options.dtype, name="conv")(x), [COARSE]),
  "filtered": (lambda options, e, k, x: layers.double(layers.halve(x, (1, 3, 3, 1)), (1, 3, 3, 1)), [FINE]),
  "attention": (lambda options, e, k, x: layers.AttentionBlock(1, options, name="block")(x), [COARSE]),
  "attention_32": (lambda options, e, k, x: layers.AttentionBlock(6, options, name="block")(x), [(32, 32, 384)]),
  "residual": (residual, [COARSE]),
  "joined": (residual, [FINE, FINE]),
}  # fmt: skip


def activations(jaxpr, batch):
  """Return the total bytes of the results of matrix products and convolutions.

  The backward pass needs these results. All other values that it needs are cheap to recompute from them, so they do not
  count. The shortcut of a residual block does not count. Attention scores do not count, because queries and keys
  determine them. If a layer adds the results of several convolutions, only one of these results counts.
  """
  return sum(dict(products(jaxpr, batch)).values())


def products(jaxpr, batch, path=""):
  """Yield `(key, bytes of the result)` for each matrix product or convolution that `activations` counts."""
  for number, equation in enumerate(jaxpr.eqns):
    name, params, aval = equation.primitive.name, equation.params, equation.outvars[0].aval
    layer = f"{path}/{equation.source_info.name_stack}"
    if name in ("dot_general", "conv_general_dilated"):
      if name == "dot_general":
        contracted, batched = params["dimension_numbers"]
        ends = [axes == (operand.aval.ndim - 1,) for axes, operand in zip(contracted, equation.invars, strict=True)]
        if batched[0] and all(ends):
          continue
      of_batch = aval.shape[:1] == (batch,) or (aval.ndim == 2 and aval.shape[0] % batch == 0)
      if of_batch and "conv_shortcut" not in layer:
        yield (
          (layer if name == "conv_general_dilated" else f"{layer} {number}", aval.shape),
          aval.size * aval.dtype.itemsize,
        )
    elif name == "cond" and params.get("branches_platforms") is not None:
      yield from products(params["branches"][-1].jaxpr, batch, layer)
    else:
      inner = jax.tree.leaves(
        list(params.values()), is_leaf=lambda value: hasattr(value, "eqns") or hasattr(value, "jaxpr")
      )
      for value in inner:
        if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
          yield from products(getattr(value, "jaxpr", value), batch, layer)


def nbytes(tree, dtype=None):
  return sum(math.prod(leaf.shape) * jnp.dtype(dtype or leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def compile_block(name, dtype, images, device):
  """Return the compiled block, the minimum bytes that it must move, and the seconds of compilation."""
  function, shapes = BLOCKS[name]
  module = Block(function, dtype)
  arguments = [jax.ShapeDtypeStruct((images, 512), dtype), jax.ShapeDtypeStruct((images, 2), jnp.uint32)]
  data = [jax.ShapeDtypeStruct((images, *shape), dtype) for shape in shapes]
  params = jax.eval_shape(lambda *args: module.init(jax.random.key(0), *args), *arguments, *data)

  def forward(params, embedding, keys, *data):
    return module.apply(params, embedding, keys, *data)

  def both(gradient, params, embedding, keys, *data):
    value, pull = jax.vjp(lambda params, data: forward(params, embedding, keys, *data), params, data)
    return value, pull(gradient)

  result = jax.eval_shape(forward, params, *arguments, *data)
  jaxpr = jax.make_jaxpr(forward)(params, *arguments, *data).jaxpr
  # The result is one of the products or is computed from them, so do not count it twice.
  inside = max(activations(jaxpr, images) - nbytes(result), 0)
  minimum = 2 * (nbytes(data) + nbytes(result) + inside) + nbytes(params, dtype)
  sharding = SingleDeviceSharding(device)
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), (result, params, *arguments, *data)
  )
  start = time.perf_counter()
  # The compiler chooses the layouts of arguments and results, as inside a network, so it adds no copies.
  layout = Format(Layout.AUTO, sharding)
  traced = jax.jit(both, in_shardings=layout, out_shardings=layout).trace(*shapes)
  return compile_on([device], traced), minimum, time.perf_counter() - start


def compile_on(devices, traced):
  """Compile a program, and exit if it does not fit in memory."""
  compiled = plan.compile_step(traced, devices)
  if isinstance(compiled, plan.OutOfMemory):
    raise SystemExit(
      f"Got a program that does not fit in the memory of {devices[0].device_kind} ({compiled.message}); set smaller --images"
      " or --batch."
    )
  return compiled


def compile_train_step(path, dtype, batch, devices):
  """Return the compiled train step, the minimum bytes that one device must move, and the seconds of compilation."""
  changes = {"training__batch_size": batch} if batch else {}
  experiment = load(path, model__network__dtype=jnp.dtype(dtype).name, **changes)
  images = experiment.training.batch_size // len(devices)
  key = jax.eval_shape(jax.random.key, 0)
  params = jax.eval_shape(experiment.model.init, key)
  keys = jax.eval_shape(lambda key: jax.random.split(key, images), key)
  jaxpr = jax.make_jaxpr(loss_of(experiment))(params, keys, stepping.batch_shapes(experiment, images)).jaxpr
  state, traced = trace_step(experiment, devices)
  minimum = 2 * activations(jaxpr, images) + nbytes(params, dtype) + 2 * plan.state_bytes(state)
  start = time.perf_counter()
  return compile_on(devices, traced), minimum, time.perf_counter() - start


def measure(compiled, minimum, seconds):
  """Return the numbers of the program's table row, and the program's operations."""
  operations = costs.operations(compiled.as_text())
  memory, xla = sum(operation.bytes for operation in operations), compiled.cost_analysis()["bytes accessed"]
  cycles = sum(operation.times * operation.cycles for operation in operations)
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  return {
    "minimum": minimum,
    "memory": memory,
    "xla": xla,
    "temporaries": temporaries,
    "cycles": cycles,
    "seconds": seconds,
  }, operations


def cells(row):
  gigabytes = {name: f"{row[name] / 1e9:.3g}" for name in ("minimum", "memory", "xla", "temporaries")}
  ratios = {name: f"{row[name] / row['minimum']:.2f}" for name in ("memory", "xla")}
  return [
    gigabytes["minimum"],
    gigabytes["memory"],
    ratios["memory"],
    gigabytes["xla"],
    ratios["xla"],
    gigabytes["temporaries"],
    f"{1e3 * row['cycles'] / CLOCK:.3g}",
    f"{row['seconds']:.0f}",
  ]


def describe(operation):
  """Format an operation as a line with its cycles, bytes, result, operands (* marks on-chip memory) and source."""

  def shorten(shape):
    return re.sub(r"\{[^}]*\}", lambda layout: "*" if "S(1)" in layout.group() else "", shape)

  reads = ", ".join(map(shorten, operation.reads))
  return (
    f"{operation.times * operation.cycles / 1e6:8.3f} M cycles {operation.bytes / 1e6:9.1f} MB  {operation.name}: {shorten(operation.writes)}"
    f" <- {reads}  ({operation.source[-80:]})"
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("configs", nargs="*", type=Path, help="recipes to compile; default: compile blocks")
  parser.add_argument("--parts", default=",".join(BLOCKS), help="blocks to compile; default: all")
  parser.add_argument("--topology", default="v5e:1x1", help="topology to compile for; blocks use its first chip")
  parser.add_argument("--types", default="float32,bfloat16", help="data types of the computation")
  parser.add_argument("--images", type=timing.positive_int, default=128, help="batch size of blocks")
  parser.add_argument(
    "--batch",
    type=timing.positive_int,
    default=None,
    help="batch size of train steps over all chips; default: the recipe's",
  )
  parser.add_argument("--operations", type=int, default=0, help="number of the longest operations to list")
  parser.add_argument("--json", type=Path, default=None, help="file for the results")
  args = parser.parse_args()
  unknown = set(args.parts.split(",")) - set(BLOCKS)
  if unknown:
    raise SystemExit(f"Got --parts={args.parts}; expected some of {','.join(BLOCKS)}.")
  devices = topology.topology_devices(args.topology)
  rows = []
  for target in args.configs or args.parts.split(","):
    for dtype in map(jnp.dtype, args.types.split(",")):
      row, operations = measure(
        *(
          compile_train_step(target, dtype, args.batch, devices)
          if args.configs
          else compile_block(target, dtype, args.images, devices[0])
        )
      )
      rows.append({"program": target.name if args.configs else target, "type": dtype.name} | row)
      print(
        f"{rows[-1]['program']}, {dtype.name}: {', '.join(map(' '.join, zip(COLUMNS, cells(row), strict=True)))}",
        flush=True,
      )
      for operation in sorted(operations, key=lambda operation: -operation.times * operation.cycles)[: args.operations]:
        print(describe(operation), flush=True)
  machine = timing.machine_info() | {"device": args.topology}
  timing.report(
    f"GB per chip, {args.topology}",
    ["program", "type", *COLUMNS],
    [[row["program"], row["type"], *cells(row)] for row in rows],
    machine,
  )
  timing.write(args.json, {"machine": machine, "rows": rows})


if __name__ == "__main__":
  main()
