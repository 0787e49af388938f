"""Score a run's weights: samples against real images, likelihoods, and report.html.

Several samplers and numbers of steps are scored one after the other, the last one as the
headline. A command that was killed goes on when it is given again.
"""

from ddpm_jax.commands import flags, starting
from ddpm_jax.commands.parser import Flag, Group, count, seed

EXAMPLES = (
  "--mode=eval --workdir=/tmp/digits_vp --sampler=ddim,dpmpp_2m --num_steps=10,20,50",
  "--mode=eval --workdir=/tmp/run --inception_weights=/data/inception.safetensors --num_samples=50000",
)


FLAGS = (
  flags.RUN,
  Group(
    "samples",
    (
      Flag("num_samples", count, "Samples to draw, instead of the config's number (evaluation.num_samples)."),
      Flag("seed", seed, "The seed of sampling, instead of the config's."),
      flags.GUIDANCE_SCALE,
      flags.INCEPTION,
    ),
  ),
  flags.SAMPLERS,
  flags.WEIGHTS,
  flags.PROCESSES,
)


def run(given: flags.Flags) -> None:
  """Score weights."""
  from ddpm_jax import config, runs

  folder, variants = flags.folder_of(given), flags.variants(given)
  # The last variant is the headline.
  last = {"sampler": variants[-1].get("sampler"), "num_steps": variants[-1].get("sampling__num_steps")}
  keys = flags.keys(given, num_samples=given.num_samples, **last)
  starting.join_processes(given)
  starting.start_devices(given)
  tree = flags.tree_of(given, keys)
  if given.guidance_scale is not None:
    tree = config.replace(tree, runs.steering.scale_key(tree), given.guidance_scale)
  experiment = runs.load_experiment(tree, folder)
  runs.run_eval(
    experiment,
    folder,
    seed=experiment.seed if given.seed is None else given.seed,
    choice=flags.choice(given),
    variants=[experiment.replace(**variant) for variant in variants],
  )
