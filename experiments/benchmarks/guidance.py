"""What classifier-free guidance costs: its time over that of one network evaluation of the doubled batch.

python experiments/benchmarks/guidance.py [--limit=1.1] [--json=<file>]

A class-conditional U-Net denoises a batch, guided, and a batch of twice the size, unguided; both are compiled and timed in turn, over and
over, so that a change of the machine's pace meets both, and the median of the ratios of neighbors is printed; beside it that of
guidance off (scale 1), over one evaluation of the batch itself, and that of rescaled guidance. Absolute times mean nothing.
Ends with an error if a ratio is above the limit.
"""

import jax
import jax.numpy as jnp
import timing

from ddpm_jax import guidance, predictions, processes
from ddpm_jax.devices import parallel
from ddpm_jax.networks import UNet


def main():
  parser = timing.parser(__doc__, rounds=15)
  parser.add_argument("--limit", type=float, default=1.1, help="the largest ratio that passes")
  parser.add_argument("--channels", type=timing.count, default=64, help="of the U-Net")
  parser.add_argument("--size", type=timing.count, default=32, help="of the images")
  parser.add_argument("--batch", type=timing.count, default=8, help="images")
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
  own = (params, x[:half], t, classes[:half], none[:half])
  off, on, rescaled = guided(1.0), guided(3.0), guided(3.0, rescale=0.7)
  whole, single = (lambda: plain(params, x, t, classes)), (lambda: plain(params, x[:half], t, classes[:half]))
  pairs = {
    "guided / doubled batch": (lambda: on(*own), whole),
    "rescaled / doubled batch": (lambda: rescaled(*own), whole),
    "scale 1 / batch": (lambda: off(*own), single),
  }
  ratios = {}
  for name, (first, second) in pairs.items():
    runs = {
      which: lambda run=run: jax.block_until_ready(run()) for which, run in (("guided", first), ("plain", second))
    }
    ratios[name] = timing.ratio(timing.in_turn(runs, args.rounds, settle=False, quiet=True), "guided", "plain")
  here = timing.machine()
  cells = [[name, timing.with_quartiles(found, 3)] for name, found in ratios.items()]
  timing.report(f"batch {args.batch} of {args.size}x{args.size}", ["", "ratio"], cells, here)
  timing.write(args.json, {"machine": here, "ratios": ratios})
  worst = max(median for _, median, _ in ratios.values())
  if worst > args.limit:
    raise SystemExit(f"a ratio of {worst:.3f} is above {args.limit}")


if __name__ == "__main__":
  main()
