"""Measure the overhead of classifier-free guidance over one network call on a batch of twice the size.

python experiments/benchmarks/guidance.py [--limit=1.1] [--json=<file>]

A class-conditional U-Net denoises a batch with guidance, and a batch of twice the size without guidance. The two
compiled programs run alternately, so a drift of the machine's speed affects both. The script prints the median over
rounds of the ratio of the first time to the second. It prints one ratio for guidance, one for guidance with rescaling
of the guided estimate, and one for scale 1. At scale 1, guidance is off, so the second program denoises a batch of the
same size as the first. Absolute times are not comparable between machines. The script fails if a ratio exceeds the
limit.
"""

import jax
import jax.numpy as jnp
import timing

from ddpm_jax import guidance, predictions, processes
from ddpm_jax.devices import parallel
from ddpm_jax.networks import UNet


def main():
  parser = timing.make_parser(__doc__, rounds=15)
  parser.add_argument("--limit", type=float, default=1.1, help="fail above this ratio")
  parser.add_argument("--channels", type=timing.positive_int, default=64, help="channels of the U-Net")
  parser.add_argument("--size", type=timing.positive_int, default=32, help="image size")
  parser.add_argument("--batch", type=timing.positive_int, default=8, help="images per batch")
  args = parser.parse_args()

  process = processes.vp()
  network = UNet(out_channels=3, channels=args.channels, multipliers=(1, 2, 2), dropout=0.0, num_classes=11)
  x = process.prior(jax.random.key(0), (2 * args.batch, args.size, args.size, 3))
  classes, none = jnp.arange(2 * args.batch) % 10, jnp.full((2 * args.batch,), 10)
  params = jax.jit(network.init)(jax.random.key(1), x[:1], jnp.zeros((1,)), classes[:1])

  compiler = parallel.compiler_options()

  def conditional(params):
    def denoise(x_t, t, classes):
      apply = lambda x, time: network.apply(params, x, time, classes)  # noqa: E731
      return predictions.denoiser(apply, process, predictions.V)(x_t, t)

    return denoise

  def guided(scale, **options):
    def run(params, x, t, classes, none):
      return guidance.classifier_free(conditional(params), classes, none, scale, **options)(x, t)

    return jax.jit(run, compiler_options=compiler)

  plain = jax.jit(lambda params, x, t, classes: conditional(params)(x, t, classes), compiler_options=compiler)
  half, t = args.batch, jnp.float32(0.5)
  arguments = (params, x[:half], t, classes[:half], none[:half])
  off, on, rescaled = guided(1.0), guided(3.0), guided(3.0, rescale=0.7)
  doubled, single = (lambda: plain(params, x, t, classes)), (lambda: plain(params, x[:half], t, classes[:half]))
  pairs = {
    "guided / doubled batch": (lambda: on(*arguments), doubled),
    "rescaled / doubled batch": (lambda: rescaled(*arguments), doubled),
    "scale 1 / batch": (lambda: off(*arguments), single),
  }
  ratios = {}
  for name, (first, second) in pairs.items():
    runs = {kind: lambda run=run: jax.block_until_ready(run()) for kind, run in (("guided", first), ("plain", second))}
    ratios[name] = timing.ratio(
      timing.time_alternately(runs, args.rounds, warm_up=False, quiet=True), "guided", "plain"
    )
  info = timing.machine_info()
  cells = [[name, timing.format_quartiles(values, 3)] for name, values in ratios.items()]
  timing.report(f"batch {args.batch} of {args.size}x{args.size}", ["", "ratio"], cells, info)
  timing.write(args.json, {"machine": info, "ratios": ratios})
  worst = max(median for _, median, _ in ratios.values())
  if worst > args.limit:
    raise SystemExit(f"Got a ratio of {worst:.3f}; expected at most --limit={args.limit}.")


if __name__ == "__main__":
  main()
