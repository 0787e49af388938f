"""Score a trained model, and write report.html.

Samples are compared with real images. config.evaluation.likelihood adds likelihoods. With several
samplers or numbers of steps, each sampler is scored with each number of steps, and the last
combination gives the main scores of the report. After a crash, run the same command again to
resume.
"""

from ddpm_jax.commands import flags, jax_setup
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
      Flag("num_samples", count, "The number of samples to score (default: config.evaluation.num_samples)."),
      Flag("seed", seed, "The random seed of sampling (default: config.seed)."),
      flags.GUIDANCE_SCALE,
      flags.INCEPTION,
    ),
  ),
  flags.SAMPLERS,
  flags.WEIGHTS,
  flags.DEVICES,
  flags.PROCESSES,
)


def run(args: flags.Args) -> None:
  """Score a model."""
  from ddpm_jax import config, runs

  folder, variants = flags.run_folder(args), flags.variants(args)
  # The last variant gives the main scores.
  last = {"sampler": variants[-1].get("sampler"), "num_steps": variants[-1].get("sampling__num_steps")}
  keys = flags.sampling_keys(args, num_samples=args.num_samples, **last)
  jax_setup.join_processes(args)
  jax_setup.start_devices(args)
  tree = flags.read_config(args, keys)
  if args.guidance_scale is not None:
    tree = config.replace(tree, runs.steering.scale_key(tree), args.guidance_scale)
  experiment = runs.load_experiment(tree, folder)
  runs.run_eval(
    experiment,
    folder,
    seed=experiment.seed if args.seed is None else args.seed,
    choice=flags.weights_choice(args),
    variants=[experiment.replace(**variant) for variant in variants],
  )
