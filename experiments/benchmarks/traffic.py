"""What layers, blocks and whole train steps read and write on a TPU, as compiled, beside the least possible. No TPU is needed.

python experiments/benchmarks/traffic.py [--parts=residual,attention] [--types=bfloat16] [--operations=20]
python experiments/benchmarks/traffic.py --topology=v5e:2x4 --types=bfloat16 --batch=1024 configs/cifar10_vp.py

The first compiles single layers and small blocks, forward and backward, for one chip and 128 images (seconds to a minute each); the second the train steps of
recipes (minutes each). Both need libtpu (pip install '.[plan]'). Columns, in gigabytes (1e9 bytes) of one chip:

- least: what backward passes need of activations, written once and read once, and weights once, all in the type of the computation; of a part also its
  inputs, outputs and their gradients once, of a train step also its state, read and written once. What is computed from these by element is not counted.
- memory: what all operations of the compiled program read from the chip's memory and write to it (costs.operations).
- XLA: XLA's own count ("bytes accessed"), to which copies into on-chip memory (128 MB on a v5e) and reads from there add.
- temporaries: the most that lives at once beside arguments and results.

ms at the compiler's estimate: the cycles that it expects of all operations, one after the other, at the clock that gives the chip's peak. --operations=N
lists the N with the most cycles. --json=<file> keeps the figures.
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

# A v5e has four matrix units of 128 x 128 products a cycle.
CLOCK = 197e12 / (4 * 128 * 128 * 2)
COLUMNS = ["least", "memory", "of least", "XLA", "of least", "temporaries", "ms, estimated", "compiling, s"]


class Part(nn.Module):
  """A function of data, with what it needs of a network's style."""

  function: object
  dtype: object

  @nn.compact
  def __call__(self, embedding, keys, *data):
    """The function's result, in one array."""
    style = networks.UNet(dtype=self.dtype)._block_options
    return self.function(style, embedding, jax.random.wrap_key_data(keys), *data)


def residual(style, embedding, keys, *data):
  return layers.ResidualBlock(data[0].shape[-1], style, name="block")(
    data if len(data) > 1 else data[0], embedding, keys
  )


FINE, COARSE = (32, 32, 128), (16, 16, 256)
# By name: a function of style, embedding, keys and data, and the shapes of the data.
PARTS = {
  "normalization": (lambda style, e, k, x: nn.swish(style.norm("norm")(x)), [COARSE]),
  "convolution": (lambda style, e, k, x: layers.conv(x, x.shape[-1], "conv", style.dtype), [COARSE]),
  "dropout": (lambda style, e, k, x: layers.conv(layers.drop(x, 0.1, k, "block"), x.shape[-1], "conv", style.dtype), [COARSE]),
  "downsample": (lambda style, e, k, x: layers.Downsample(False, style.dtype, name="conv")(x), [FINE]),
  "upsample": (lambda style, e, k, x: layers.Upsample(style.dtype, name="conv")(x), [COARSE]),
  "filtered": (lambda style, e, k, x: layers.double(layers.halve(x, (1, 3, 3, 1)), (1, 3, 3, 1)), [FINE]),
  "attention": (lambda style, e, k, x: layers.AttentionBlock(1, style, name="block")(x), [COARSE]),
  "attention_32": (lambda style, e, k, x: layers.AttentionBlock(6, style, name="block")(x), [(32, 32, 384)]),
  "residual": (residual, [COARSE]),
  "joined": (residual, [FINE, FINE]),
}  # fmt: skip


def activations(jaxpr, batch):
  """Bytes of the results of matrix products and convolutions: from them all else that a backward pass needs is computed by element.

  Attention's scores are not kept: they are products of queries and keys. Nor is the shortcut of a residual block, which only its sum needs, and of
  convolutions that are added, those of one layer, only the sum is.
  """
  return sum(dict(products(jaxpr, batch)).values())


def products(jaxpr, batch, path=""):
  """The layer and the bytes of each product's result that depends on the batch."""
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


def part(name, dtype, images, device):
  """The compiled part, its least bytes, and the seconds that compiling took."""
  function, shapes = PARTS[name]
  module = Part(function, dtype)
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
  # The result is among the products, or is computed from them.
  inside = max(activations(jaxpr, images) - nbytes(result), 0)
  least = 2 * (nbytes(data) + nbytes(result) + inside) + nbytes(params, dtype)
  sharding = SingleDeviceSharding(device)
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), (result, params, *arguments, *data)
  )
  start = time.perf_counter()
  # Laid out as the part wants it, as inside a network: no copies at its borders.
  best = Format(Layout.AUTO, sharding)
  traced = jax.jit(both, in_shardings=best, out_shardings=best).trace(*shapes)
  return compile_on([device], traced), least, time.perf_counter() - start


def compile_on(devices, traced):
  """The compiled program, or the end of this one if it does not fit."""
  compiled = plan.compile_step(traced, devices)
  if isinstance(compiled, plan.OutOfMemory):
    raise SystemExit(
      f"Got more than fits into {devices[0].device_kind} ({compiled.message}). Set fewer --images, or a smaller --batch."
    )
  return compiled


def step(path, dtype, batch, devices):
  """The same of a recipe's train step, on one of the devices."""
  changes = {"training__batch_size": batch} if batch else {}
  experiment = load(path, model__network__dtype=jnp.dtype(dtype).name, **changes)
  images = experiment.training.batch_size // len(devices)
  key = jax.eval_shape(jax.random.key, 0)
  params = jax.eval_shape(experiment.model.init, key)
  keys = jax.eval_shape(lambda key: jax.random.split(key, images), key)
  jaxpr = jax.make_jaxpr(loss_of(experiment))(params, keys, stepping.batch_shapes(experiment, images)).jaxpr
  state, traced = trace_step(experiment, devices)
  least = 2 * activations(jaxpr, images) + nbytes(params, dtype) + 2 * plan.state_bytes(state)
  start = time.perf_counter()
  return compile_on(devices, traced), least, time.perf_counter() - start


def figures_of(compiled, least, seconds):
  """The figures of a row, and the operations."""
  found = costs.operations(compiled.as_text())
  memory, xla = sum(operation.bytes for operation in found), compiled.cost_analysis()["bytes accessed"]
  cycles = sum(operation.times * operation.cycles for operation in found)
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  return {
    "least": least,
    "memory": memory,
    "xla": xla,
    "temporaries": temporaries,
    "cycles": cycles,
    "seconds": seconds,
  }, found


def cells(row):
  gigabytes = {name: f"{row[name] / 1e9:.3g}" for name in ("least", "memory", "xla", "temporaries")}
  ratios = {name: f"{row[name] / row['least']:.2f}" for name in ("memory", "xla")}
  return [
    gigabytes["least"],
    gigabytes["memory"],
    ratios["memory"],
    gigabytes["xla"],
    ratios["xla"],
    gigabytes["temporaries"],
    f"{1e3 * row['cycles'] / CLOCK:.3g}",
    f"{row['seconds']:.0f}",
  ]


def describe(operation):
  """One operation as a line: cycles, bytes, what it writes and reads (* on the chip), and where it comes from."""

  def brief(shape):
    return re.sub(r"\{[^}]*\}", lambda layout: "*" if "S(1)" in layout.group() else "", shape)

  reads = ", ".join(map(brief, operation.reads))
  return (
    f"{operation.times * operation.cycles / 1e6:8.3f} M cycles {operation.bytes / 1e6:9.1f} MB  {operation.name}: {brief(operation.writes)}"
    f" <- {reads}  ({operation.source[-80:]})"
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("configs", nargs="*", type=Path, help="recipes, for whole train steps; without any, parts")
  parser.add_argument("--parts", default=",".join(PARTS), help="which parts; all by default")
  parser.add_argument("--topology", default="v5e:1x1", help="the chips to compile for; parts take the first")
  parser.add_argument("--types", default="float32,bfloat16", help="what is computed in")
  parser.add_argument("--images", type=timing.count, default=128, help="of parts")
  parser.add_argument(
    "--batch", type=timing.count, default=None, help="of train steps, over all chips; the recipe's by default"
  )
  parser.add_argument("--operations", type=int, default=0, help="how many of the longest operations to list")
  parser.add_argument("--json", type=Path, default=None, help="a file for the figures")
  args = parser.parse_args()
  unknown = set(args.parts.split(",")) - set(PARTS)
  if unknown:
    raise SystemExit(f"Got --parts={args.parts}; expected some of {','.join(PARTS)}.")
  devices = topology.topology_devices(args.topology)
  rows = []
  for what in args.configs or args.parts.split(","):
    for dtype in map(jnp.dtype, args.types.split(",")):
      made = step(what, dtype, args.batch, devices) if args.configs else part(what, dtype, args.images, devices[0])
      row, found = figures_of(*made)
      rows.append({"what": what.name if args.configs else what, "type": dtype.name} | row)
      print(
        f"{rows[-1]['what']}, {dtype.name}: {', '.join(map(' '.join, zip(COLUMNS, cells(row), strict=True)))}",
        flush=True,
      )
      for operation in sorted(found, key=lambda operation: -operation.times * operation.cycles)[: args.operations]:
        print(describe(operation), flush=True)
  machine = timing.machine() | {"device": args.topology}
  timing.report(
    f"GB of one chip, {args.topology}",
    ["what", "type", *COLUMNS],
    [[row["what"], row["type"], *cells(row)] for row in rows],
    machine,
  )
  timing.write(args.json, {"machine": machine, "rows": rows})


if __name__ == "__main__":
  main()
