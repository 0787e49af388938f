"""Write a run's model as a folder that diffusers opens, and --pretrained too.

The folder has a model card with the config and the scores. It holds the averaged weights, or with
--ema=false the raw ones.
"""

from ddpm_jax.commands import flags, starting

EXAMPLES = (
  "--mode=export --workdir=/tmp/digits_vp --output=/tmp/digits_model",
  "--mode=export --workdir=/tmp/digits_vp --output=/tmp/digits_raw --ema=false --step=1500",
)


FLAGS = (flags.RUN, flags.output("The new folder."), flags.WEIGHTS, flags.PROCESSES)


def run(given: flags.Flags) -> None:
  """Export a model."""
  from ddpm_jax import runs

  folder, output = flags.folder_of(given), flags.output_of(given, "the model", "/tmp/model")
  keys = flags.keys(given)
  starting.join_processes(given)
  starting.start_devices(given)
  experiment = runs.load_experiment(flags.tree_of(given, keys), folder)
  runs.run_export(experiment, folder, output, flags.choice(given))
