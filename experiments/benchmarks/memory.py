"""What a recipe's train step keeps in memory, by type and rematerialization.

python experiments/benchmarks/memory.py [configs/cifar10_vp.py ...]
python experiments/benchmarks/memory.py --topology=v5e:1x1 --images=16 [--types=float32] [configs/cifar10_vp.py ...]

The first prints what the forward pass keeps for the backward pass, in megabytes (1e6 bytes) an image, beside the state of the whole model: the
part of a step's memory that grows with the batch. Nothing is compiled. The second compiles the whole step for one chip (minutes
each, for large networks) and prints its temporaries, gradients and scratch included, in megabytes for so many images.
"""

import argparse
import contextlib
import importlib.util
import sys
from pathlib import Path

import jax

from ddpm_jax import build, runs, train

CONFIGS = Path(__file__).parent.parent.parent / "configs"
POLICIES = ("none", "blocks", "everything")


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def kept(config, images=2):
  """Bytes an image that the gradient of the loss has to hold between the two passes, without the parameters themselves."""
  key = jax.eval_shape(jax.random.key, 0)
  params = jax.eval_shape(build.build_params_init(config), key)
  keys = jax.eval_shape(lambda key: jax.random.split(key, images), key)
  loss = build.build_loss(config)

  def forward(params, keys, batch):
    return jax.vjp(lambda params: loss(params, keys, batch)[0], params)[1]

  residuals = jax.tree.leaves(jax.eval_shape(forward, params, keys, build.batch_shapes(config, images)))
  per_image = [leaf for leaf in residuals if leaf.ndim and leaf.shape[0] == images]
  return sum(leaf.size * leaf.dtype.itemsize for leaf in per_image) / images


def compiled(config, topology, images):
  """Bytes of temporaries of the compiled step."""
  config.training.batch_size = images
  with contextlib.redirect_stdout(sys.stderr):  # the table that is asked for stays apart
    plan = runs.run_plan(config, topology_name=topology, num_devices=None)
  return plan.temporary_bytes if plan.temporary_bytes is not None else float("nan")


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
    "configs", nargs="*", type=Path, default=sorted(CONFIGS.glob("*.py")), help="recipes; all by default"
  )
  parser.add_argument("--topology", help="compile for one chip of this kind, such as v5e:1x1")
  parser.add_argument("--images", type=int, default=16, help="the batch to compile for")
  parser.add_argument("--types", default="float32,bfloat16", help="what the network computes in")
  args = parser.parse_args()
  types = args.types.split(",")
  names = [f"{policy}, {dtype}" for dtype in types for policy in POLICIES]
  print(f"| recipe | state, MB | {' | '.join(names)} |\n| --- | --- |{' --- |' * len(names)}", flush=True)
  for path in args.configs:
    config = load(path)
    optimizer, init = build.build_optimizer(config), build.build_params_init(config)
    state = jax.eval_shape(lambda: train.init_state(jax.random.key(0), init, optimizer))  # noqa: B023
    cells = []
    for dtype in types:
      for policy in POLICIES:
        config.network.dtype, config.network.remat = dtype, policy
        found = compiled(config, args.topology, args.images) if args.topology else kept(config)
        cells.append(f"{found / 1e6:.4g}")
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state._replace(key=None)))
    print(f"| `{path.name}` | {size / 1e6:,.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
  main()
