"""Train a model, or go on where the folder's run stopped, then score it.

The folder gets the config, checkpoints, metrics, samples, scores and report.html. A command that
was killed goes on when it is given again, and ends with the same parameters bit for bit.
"""

from ddpm_jax.commands import flags, starting
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
      Flag(
        "resume", text, "Go on if there is a run (auto, the default), demand it (must) or forbid it (never).", "auto"
      ),
      Flag("profile", integer, "Trace this many steps into the run's folder.", 0),
    ),
  ),
  flags.SAMPLER,
  Group("features", (flags.INCEPTION,)),
  flags.PROCESSES,
)


def run(given: flags.Flags) -> None:
  """Train."""
  from ddpm_jax import runs
  from ddpm_jax.names import choose

  folder, keys = flags.folder_of(given), flags.keys(given)
  choose(given.resume, _RESUME, "--resume")
  starting.join_processes(given)
  starting.start_devices(given)
  runs.run_train(flags.tree_of(given, keys), folder, resume=given.resume, profile=given.profile)
