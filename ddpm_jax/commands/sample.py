"""Generate samples from a trained model.

Samples are written to samples/ in the run folder, as an array (.npz, uint8) and as a picture
(.png). If samples have texts, each sample is also written to a .png file with its text and the
settings. For the same model, settings and conditions, sample i depends only on the seed and i.
"""

from ddpm_jax.commands import flags, jax_setup
from ddpm_jax.commands.parser import Flag, Group, count, paths, seed

EXAMPLES = (
  "--mode=sample --workdir=/tmp/digits_vp --num_samples=64 --sampler=ddim --num_steps=50 --seed=1",
  "--mode=sample --workdir=/tmp/samples --pretrained=google/ddpm-cifar10-32 --sampler=dpmpp_2m --num_steps=20",
  "--mode=sample --workdir=/tmp/digits_text --prompt='a seven left of a three' --guidance_scale=3 --num_samples=4",
  "--mode=sample --workdir=/tmp/samples --pretrained=/tmp/large_model --fsdp=8",
)

# The number of samples if neither --num_samples nor texts are given.
_NUM_SAMPLES = 64

FLAGS = (
  flags.MODEL,
  Group(
    "samples",
    (
      Flag("num_samples", count, "The number of samples (default: one for each text, otherwise 64)."),
      Flag("seed", seed, "The random seed of sampling (default 0).", 0),
      Flag("upsampler", paths, "Folders of super-resolution runs that enlarge the samples, in this order.", []),
    ),
  ),
  *flags.GENERATION,
)


def run(args: flags.Args) -> None:
  """Generate samples."""
  from ddpm_jax import runs

  # Check all flags before devices are initialized.
  folder, steering, keys = flags.run_folder(args), flags.steering(args), flags.sampling_keys(args)
  jax_setup.join_processes(args)
  jax_setup.start_devices(args)
  experiment, model = flags.load_experiment(args, keys)
  conditions = experiment.model.conditions
  texts = [
    values for name, values in steering.given.items() if name in conditions and conditions[name].host is not None
  ]
  runs.run_sample(
    experiment,
    folder,
    num_samples=args.num_samples or max(map(len, texts), default=_NUM_SAMPLES),
    seed=args.seed,
    choice=flags.weights_choice(args),
    steering=steering,
    scale=args.guidance_scale,
    upsamplers=args.upsampler,
    model=model,
  )
