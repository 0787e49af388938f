"""What `sample` adds to the network's own cost: time per step over time per network evaluation, for every family of rules.

python experiments/benchmarks/sampling_overhead.py [--limit=1.02] [--json=<file>]

A U-Net denoises a batch; its jitted evaluation and each sampler's compiled loop are timed in turn, over and over, so that a
change of the machine's pace meets both, and the median of the ratios of neighbours is printed, each divided by the sampler's
number of evaluations. Absolute times mean nothing. Ends with an error if a ratio is above the limit.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import timing

from ddpm_jax import parallel, predictions, processes, sampling
from ddpm_jax.networks import UNet

RULES = {
  "ancestral": sampling.ancestral,
  "ddim": sampling.ddim,
  "heun": sampling.heun,
  "heun, churned": lambda process: sampling.heun(process, s_churn=10.0),
  "euler_maruyama": sampling.euler_maruyama,
  "reverse_diffusion": sampling.reverse_diffusion,
  "dpm_solver(3)": sampling.dpm_solver,
  "dpmpp_2s": sampling.dpmpp_2s,
  "dpmpp_2m": sampling.dpmpp_2m,
  "dpmpp_3m": sampling.dpmpp_3m,
  "dpmpp_sde": sampling.dpmpp_sde,
  "dpmpp_2m_sde": sampling.dpmpp_2m_sde,
  "deis(3)": sampling.deis,
  "unipc(3)": sampling.unipc,
  "ddim, corrected": lambda process: sampling.with_langevin(sampling.ddim(process), process),
}


def seconds(function, repeats: int = 1) -> float:
  start = time.perf_counter()
  for _ in range(repeats):
    jax.block_until_ready(function())
  return (time.perf_counter() - start) / repeats


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--limit", type=float, default=1.02, help="the largest ratio that passes")
  parser.add_argument("--channels", type=int, default=64, help="of the U-Net")
  parser.add_argument("--size", type=int, default=16, help="of the images")
  parser.add_argument("--batch", type=int, default=8, help="images")
  parser.add_argument("--steps", type=int, default=6, help="of each sampler")
  parser.add_argument("--rounds", type=int, default=9, help="of all samplers")
  parser.add_argument("--json", type=Path, default=None, help="a file for the figures")
  args = parser.parse_args()

  process, shape = processes.vp(), (args.batch, args.size, args.size, 3)
  network = UNet(out_channels=3, channels=args.channels, multipliers=(1, 2, 2), attention_levels=(1,), dropout=0.0)
  x, key = process.prior(jax.random.key(0), shape), jax.random.key(1)
  params = jax.jit(network.init)(jax.random.key(2), x, jnp.zeros(args.batch))

  def denoise_with(params):
    return predictions.denoiser(lambda x, t: network.apply(params, x, t), process, predictions.EPS)

  options = parallel.compiler_options()
  evaluate = jax.jit(lambda params, x, t: denoise_with(params)(x, t), compiler_options=options)
  times = sampling.grids.log_snr(process, args.steps)
  runs, calls = {}, {}
  for name, make in RULES.items():
    sampler = make(process)
    run = jax.jit(
      lambda params, x, s=sampler: sampling.sample(key, s, denoise_with(params), x, times), compiler_options=options
    )
    runs[name], calls[name] = (lambda run=run: run(params, x)), sampling.nfe(sampler, process, times)

  def one():
    return evaluate(params, x, 0.5)

  print("compiling", len(runs), "samplers ...", flush=True)
  for function in (one, *runs.values()):
    jax.block_until_ready(function())
  ratios = {name: [] for name in runs}
  for index in range(args.rounds):
    print(f"round {index + 1} of {args.rounds}", flush=True)
    for name, function in runs.items():
      before, loop, after = seconds(one, calls[name]), seconds(function), seconds(one, calls[name])
      ratios[name].append(2 * loop / calls[name] / (before + after))

  count, here = sum(leaf.size for leaf in jax.tree.leaves(params)), timing.machine()
  medians = {name: float(np.median(values)) for name, values in ratios.items()}
  quartiles = {name: tuple(map(float, np.quantile(values, [0.25, 0.5, 0.75]))) for name, values in ratios.items()}
  cells = [[name, calls[name], timing.with_quartiles(found, 3)] for name, found in quartiles.items()]
  columns = ["sampler", "evaluations", "time per step / (evaluations x time of one)"]
  timing.report(f"U-Net of {count:,} parameters, x {shape}", columns, cells, here)
  timing.write(
    args.json, {"machine": here, "parameters": count, "shape": shape, "ratios": quartiles, "evaluations": calls}
  )
  over = [name for name, median in medians.items() if median > args.limit]
  if over:
    raise SystemExit(f"above {args.limit}: {', '.join(over)}")


if __name__ == "__main__":
  main()
