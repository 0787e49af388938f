"""Export a trained model to a folder that diffusers and --pretrained can load.

The folder includes a model card with the config and the scores. Weights are the EMA weights, or
the raw weights with --ema=false.
"""

from ddpm_jax.commands import flags, jax_setup

EXAMPLES = (
  "--mode=export --workdir=/tmp/digits_vp --output=/tmp/digits_model",
  "--mode=export --workdir=/tmp/digits_vp --output=/tmp/digits_raw --ema=false --step=1500",
)


FLAGS = (flags.RUN, flags.output("The folder to create."), flags.WEIGHTS, flags.PROCESSES)


def run(args: flags.Args) -> None:
  """Export a model."""
  from ddpm_jax import runs

  folder, output = flags.run_folder(args), flags.output_path(args, "the model", "/tmp/model")
  keys = flags.config_keys(args)
  jax_setup.join_processes(args)
  jax_setup.start_devices(args)
  experiment = runs.load_experiment(flags.read_config(args, keys), folder)
  runs.run_export(experiment, folder, output, flags.weights_choice(args))
