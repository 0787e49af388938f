"""What the forward pass of a recipe keeps for the backward pass, by type and rematerialization, and its state; nothing is compiled.

python experiments/benchmarks/memory.py [configs/cifar10_vp.py ...]

Prints megabytes (1e6 bytes) an image, beside the state of the whole model. It is the part of a step's memory that grows with the
batch; what a compiler then needs in all is what `--mode=plan` says.
"""

import argparse
import importlib.util
from pathlib import Path

import jax

from ddpm_jax import build, train

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


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
    "configs", nargs="*", type=Path, default=sorted(CONFIGS.glob("*.py")), help="recipes; all by default"
  )
  args = parser.parse_args()
  names = [f"{policy}, {dtype}" for dtype in ("float32", "bfloat16") for policy in POLICIES]
  print(f"| recipe | state, MB | {' | '.join(names)} |\n| --- | --- |{' --- |' * len(names)}", flush=True)
  for path in args.configs:
    config = load(path)
    optimizer, init = build.build_optimizer(config), build.build_params_init(config)
    state = jax.eval_shape(lambda: train.init_state(jax.random.key(0), init, optimizer))  # noqa: B023
    cells = []
    for dtype in ("float32", "bfloat16"):
      for policy in POLICIES:
        config.network.dtype, config.network.remat = dtype, policy
        cells.append(f"{kept(config) / 1e6:.2f}")
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state._replace(key=None)))
    print(f"| `{path.name}` | {size / 1e6:,.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
  main()
