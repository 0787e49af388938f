"""Draw samples of a trained model.

They are written into the folder's samples/, as an array (.npz, uint8) and a picture. Sample i
follows from the seed and i alone.
"""

from ddpm_jax.commands import flags, starting
from ddpm_jax.commands.parser import Flag, Group, count, paths, seed

EXAMPLES = (
  "--mode=sample --workdir=/tmp/digits_vp --num_samples=64 --sampler=ddim --num_steps=50 --seed=1",
  "--mode=sample --workdir=/tmp/samples --pretrained=google/ddpm-cifar10-32 --sampler=dpmpp_2m --num_steps=20",
)


FLAGS = (
  flags.MODEL,
  Group(
    "samples",
    (
      Flag("num_samples", count, "Samples to draw (64).", 64),
      Flag("seed", seed, "The seed of sampling (0).", 0),
      Flag("upsampler", paths, "Folders of super-resolution runs that enlarge the samples, one after the other.", []),
    ),
  ),
  *flags.DRAWING,
)


def run(given: flags.Flags) -> None:
  """Draw samples."""
  from ddpm_jax import runs

  # Flags first: no device is taken for a mistake in them.
  folder, steering, keys = flags.folder_of(given), flags.steering(given), flags.keys(given)
  starting.join_processes(given)
  starting.start_devices(given)
  experiment, model = flags.experiment_of(given, keys)
  runs.run_sample(
    experiment,
    folder,
    num_samples=given.num_samples,
    seed=given.seed,
    choice=flags.choice(given),
    steering=steering,
    scale=given.guidance_scale,
    upsamplers=given.upsampler,
    model=model,
  )
