"""Draw samples of a run's weights, or of a pretrained model.

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
  flags.SAMPLER,
  flags.STEERING,
  flags.WEIGHTS,
  flags.PROCESSES,
)


def run(given: flags.Flags) -> None:
  """Draw samples."""
  from ddpm_jax import runs

  starting.join_processes(given)
  starting.start_devices(given)
  steering = flags.steering(given)
  experiment, model = flags.experiment_of(given, flags.keys(given))
  runs.run_sample(
    experiment,
    flags.folder_of(given),
    num_samples=given.num_samples,
    seed=given.seed,
    choice=flags.choice(given),
    steering=steering,
    scale=given.guidance_scale,
    upsamplers=given.upsampler,
    model=model,
  )
