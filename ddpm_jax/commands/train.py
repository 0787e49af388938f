"""Train a new model or resume the run in --workdir, and score the result.

The config, checkpoints, metrics, samples, scores and report.html are written to --workdir. After a
crash, run the same command again to resume. On the same devices, the final parameters equal those
of an uninterrupted run, bit for bit.
"""

from ddpm_jax.commands import flags, jax_setup
from ddpm_jax.commands.parser import Flag, Group, integer, text

EXAMPLES = (
  "--config=digits_vp --workdir=/tmp/digits_vp",
  "--config=digits_vp --workdir=/tmp/digits_vp --config.training.steps=5000",
)
_RESUME = ("auto", "must", "never")


FLAGS = (
  flags.RUN,
  Group(
    "training",
    (
      Flag("resume", text, "Whether to resume the run in the folder: auto (if there is one), must or never.", "auto"),
      Flag("profile", integer, "The number of steps to profile; the trace is written to the run folder.", 0),
    ),
  ),
  flags.SAMPLER,
  Group("features", (flags.INCEPTION,)),
  Group("devices", (flags.FSDP,)),
  flags.PROCESSES,
)


def run(args: flags.Args) -> None:
  """Train and score a model."""
  from ddpm_jax import runs
  from ddpm_jax.names import choose

  folder, keys = flags.run_folder(args), flags.config_keys(args)
  choose(args.resume, _RESUME, "--resume")
  jax_setup.join_processes(args)
  jax_setup.start_devices(args)
  runs.run_train(flags.read_config(args, keys), folder, resume=args.resume, profile=args.profile)
