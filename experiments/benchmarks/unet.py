"""The U-Net of DDPM, 35.7 million parameters: forward pass and train step, ours against diffusers' UNet2DModel in PyTorch.

pip install '.[peers]'
python experiments/benchmarks/unet.py [--batch=16] [--rounds=5]

Both have the same weights, read from one folder, and their outputs are compared first. A train step is the loss, its
gradient and Adam. The two are run in turn, so that a change of the machine's pace meets both, and the median of the
ratios of neighbours is printed, ours over theirs: below 1 ours is faster. Absolute times mean nothing.

On a CPU both compute in float32. On a GPU (JAX and PyTorch must both see it) both compute in bfloat16, PyTorch with
torch.compile and channels last, and batches are timed until the device is done.
"""

import argparse
import os
import platform
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from diffusers import UNet2DModel

import ddpm_jax
from ddpm_jax import interop, predictions, processes, schedules
from ddpm_jax.networks import UNet

SHAPE = (32, 32, 3)


def seconds(function) -> float:
  start = time.perf_counter()
  function()
  return time.perf_counter() - start


def make_ours(params, network, batch, dtype):
  """Functions of no argument, which run until the device is done, and the output of the first."""
  network = network.clone(dtype=dtype, dropout=0.0)
  x, label = jnp.asarray(batch["x"]), jnp.asarray(batch["t"], jnp.float32)
  optimizer = optax.adam(2e-4)

  @jax.jit
  def forward(params, x):
    return network.apply({"params": params}, x, label)

  def loss(params, x):
    return jnp.mean((network.apply({"params": params}, x, label, train=True) - batch["target"]) ** 2)

  def step(carry, x):
    params, state = carry
    updates, state = optimizer.update(jax.grad(loss)(params, x), state)
    return optax.apply_updates(params, updates), state

  compiled = jax.jit(step, donate_argnums=0)
  # A copy, which is given away from step to step; the forward pass keeps the original.
  carry = [jax.tree.map(jnp.copy, (params, optimizer.init(params)))]

  def train():
    carry[0] = jax.block_until_ready(compiled(carry[0], x))

  return {"forward": lambda: jax.block_until_ready(forward(params, x)), "train step": train}, np.asarray(
    forward(params, x)
  )


def make_theirs(model, batch, gpu):
  device = "cuda" if gpu else "cpu"
  model = model.to(device)
  x, target = (torch.tensor(batch[key].transpose(0, 3, 1, 2), device=device) for key in ("x", "target"))
  t = torch.tensor(batch["t"], device=device)
  if gpu:
    model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
  run = torch.compile(model) if gpu else model
  optimizer = torch.optim.Adam(model.parameters(), 2e-4)

  def apply():
    with torch.autocast("cuda", torch.bfloat16, enabled=gpu):
      return run(x, t, return_dict=False)[0]

  def wait():
    if gpu:
      torch.cuda.synchronize()

  def forward():
    with torch.no_grad():
      output = apply()
    wait()
    return output

  def train():
    optimizer.zero_grad(set_to_none=True)
    ((apply().float() - target) ** 2).mean().backward()
    optimizer.step()
    wait()

  return {"forward": forward, "train step": train}, forward().float().cpu().numpy().transpose(0, 2, 3, 1)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--batch", type=int, default=16, help="images")
  parser.add_argument("--rounds", type=int, default=5, help="of both, in turn")
  args = parser.parse_args()
  gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()

  network, process = UNet(), processes.discrete(schedules.linear())
  # Small random numbers in the place of zeros, so that the comparison of outputs means something.
  with tempfile.TemporaryDirectory() as folder:
    start = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, *SHAPE)), jnp.zeros(1))["params"]
    leaves, tree = jax.tree.flatten(start)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    start = tree.unflatten([p + 0.02 * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)])
    interop.diffusers.save(f"{folder}/model", network, start, process, predictions.EPS, shape=SHAPE)
    model = UNet2DModel.from_pretrained(f"{folder}/model", subfolder="unet")
    network, params = interop.diffusers.load_unet(f"{folder}/model")
  model.eval()
  rng = np.random.default_rng(0)
  batch = {key: rng.standard_normal((args.batch, *SHAPE), np.float32) for key in ("x", "target")}
  batch["t"] = rng.integers(0, 1000, args.batch)

  print("compiling ...", flush=True)
  ours, output = make_ours(params, network, batch, jnp.bfloat16 if gpu else jnp.float32)
  theirs, wanted = make_theirs(model, batch, gpu)
  error = np.sqrt(np.mean((output - wanted) ** 2)) / np.std(wanted)
  print(f"outputs differ by {error:.1e} of their size (RMS)", flush=True)
  if error > (0.05 if gpu else 1e-4):
    raise SystemExit("the two networks are not the same")

  ratios = {name: [] for name in ours}
  for index in range(args.rounds + 1):
    for name in ours:
      before, mine, after = seconds(theirs[name]), seconds(ours[name]), seconds(theirs[name])
      if index:  # the first round warms up
        ratios[name].append(2 * mine / (before + after))
    print(f"round {index} of {args.rounds}" if index else "warm", flush=True)

  device = jax.devices()[0]
  cores = f", {len(os.sched_getaffinity(0))} cores" if hasattr(os, "sched_getaffinity") else ""
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  print(
    f"\n{device.device_kind} ({platform.machine()}{cores}), {'bfloat16' if gpu else 'float32'}, batch {args.batch}; U-Net of"
    f" {count:,} parameters\nddpm_jax {ddpm_jax.__version__}, JAX {jax.__version__}; PyTorch {torch.__version__}"
    f"{', torch.compile, channels last' if gpu else ', eager'}\n"
  )
  print("| | ours over PyTorch's | quartiles |\n| --- | --- | --- |")
  for name, values in ratios.items():
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    print(f"| {name} | {median:.2f} | {low:.2f} to {high:.2f} |")


if __name__ == "__main__":
  main()
