"""What `sample` adds to the network's own cost: time per step over time per network evaluation, for every family of rules.

python experiments/benchmarks/sampling_overhead.py [--samplers ddim heun] [--limit=1.02] [--json=<file>]

A U-Net denoises a batch; its jitted evaluation and each sampler's compiled loop are timed in turn, over and over, so that a
change of the machine's pace meets both, and the median of the ratios of neighbors is printed, each divided by the sampler's
number of evaluations. Absolute times mean nothing. Ends with an error if a ratio is above the limit.
"""

import jax
import jax.numpy as jnp
import timing

from ddpm_jax import predictions, processes, sampling
from ddpm_jax.devices import parallel
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


def main():
  parser = timing.parser(__doc__, rounds=9)
  parser.add_argument("--samplers", nargs="+", choices=RULES, metavar="NAME", default=list(RULES), help="some of them")
  parser.add_argument("--limit", type=float, default=1.02, help="the largest ratio that passes")
  parser.add_argument("--channels", type=timing.count, default=64, help="of the U-Net")
  parser.add_argument("--size", type=timing.count, default=16, help="of the images")
  parser.add_argument("--batch", type=timing.count, default=8, help="images")
  parser.add_argument("--steps", type=timing.count, default=6, help="of each sampler")
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
  for name in args.samplers:
    sampler = RULES[name](process)
    run = jax.jit(
      lambda params, x, s=sampler: sampling.sample(key, s, denoise_with(params), x, times), compiler_options=options
    )
    runs[name], calls[name] = (lambda run=run: run(params, x)), sampling.nfe(sampler, process, times)

  def one():
    return evaluate(params, x, 0.5)

  print("compiling", len(runs), "samplers ...", flush=True)
  for function in (one, *runs.values()):
    jax.block_until_ready(function())
  ratios = {}
  for name, function in runs.items():
    print(name, "...", flush=True)

    def bare(name=name):
      for _ in range(calls[name]):
        jax.block_until_ready(one())

    pair = {"sample": lambda function=function: jax.block_until_ready(function()), "bare": bare}
    ratios[name] = timing.ratio(timing.in_turn(pair, args.rounds, settle=False, quiet=True), "sample", "bare")

  count, here = sum(leaf.size for leaf in jax.tree.leaves(params)), timing.machine()
  cells = [[name, calls[name], timing.with_quartiles(found, 3)] for name, found in ratios.items()]
  columns = ["sampler", "evaluations", "time per step / (evaluations x time of one)"]
  timing.report(f"U-Net of {count:,} parameters, x {shape}", columns, cells, here)
  timing.write(
    args.json, {"machine": here, "parameters": count, "shape": shape, "ratios": ratios, "evaluations": calls}
  )
  over = [name for name, (_, median, _) in ratios.items() if median > args.limit]
  if over:
    raise SystemExit(f"above {args.limit}: {', '.join(over)}")


if __name__ == "__main__":
  main()
