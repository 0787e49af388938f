"""Measure the overhead of `sample` over bare network calls for every kind of step rule.

python experiments/benchmarks/sampling_overhead.py [--samplers ddim heun] [--limit=1.02] [--json=<file>]

The script compares the compiled loop of each sampler with as many jitted U-Net calls as the loop makes. They run
alternately, so a drift of the machine's speed affects both. The script prints the median over rounds of the ratio of
the loop's time to the calls' time. Absolute times are not comparable between machines. The script fails if a ratio
exceeds the limit.
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
  parser = timing.make_parser(__doc__, rounds=9)
  parser.add_argument(
    "--samplers", nargs="+", choices=RULES, metavar="NAME", default=list(RULES), help="samplers; default: all"
  )
  parser.add_argument("--limit", type=float, default=1.02, help="fail above this ratio")
  parser.add_argument("--channels", type=timing.positive_int, default=64, help="channels of the U-Net")
  parser.add_argument("--size", type=timing.positive_int, default=16, help="image size")
  parser.add_argument("--batch", type=timing.positive_int, default=8, help="images per batch")
  parser.add_argument("--steps", type=timing.positive_int, default=6, help="steps of each sampler")
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

  def call_network():
    return evaluate(params, x, 0.5)

  print("compiling", len(runs), "samplers ...", flush=True)
  for function in (call_network, *runs.values()):
    jax.block_until_ready(function())
  ratios = {}
  for name, function in runs.items():
    print(name, "...", flush=True)

    def bare(name=name):
      for _ in range(calls[name]):
        jax.block_until_ready(call_network())

    pair = {"sample": lambda function=function: jax.block_until_ready(function()), "bare": bare}
    ratios[name] = timing.ratio(timing.time_alternately(pair, args.rounds, warm_up=False, quiet=True), "sample", "bare")

  count, info = sum(leaf.size for leaf in jax.tree.leaves(params)), timing.machine_info()
  cells = [[name, calls[name], timing.format_quartiles(values, 3)] for name, values in ratios.items()]
  columns = ["sampler", "network calls", "time over that of the calls"]
  timing.report(f"U-Net of {count:,} parameters, x {shape}", columns, cells, info)
  timing.write(
    args.json, {"machine": info, "parameters": count, "shape": shape, "ratios": ratios, "evaluations": calls}
  )
  slow = [name for name, (_, median, _) in ratios.items() if median > args.limit]
  if slow:
    raise SystemExit(f"Got ratios above --limit={args.limit}: {', '.join(slow)}.")


if __name__ == "__main__":
  main()
