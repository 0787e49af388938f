"""A run's model for other people's tools."""

from pathlib import Path

from ml_collections import ConfigDict

from ddpm_jax import parallel, pretrained
from ddpm_jax.runs import model


def run_export(config: ConfigDict, folder: Path, output: Path, choice: model.Choice) -> None:
  """Writes the model of a run as a folder that diffusers opens.

  Raises:
    ValueError: if there is no checkpoint, diffusers cannot express the model, or the output folder is not empty.
  """
  config = model.trained(config, folder)
  pretrained.check_exportable(config)
  pretrained.check_output(output)
  weights = model.load_weights(config, folder, parallel.make_mesh(), choice)
  if parallel.is_main():
    scores = model.read_scores(folder)
    pretrained.export(config, output, weights.params, step=weights.step, weights=weights.name, evaluated=scores)
  model.say(
    f"model        {output} ({weights.name} weights), for diffusers and for --pretrained\nmodel card   {output / 'README.md'}"
  )
  parallel.wait_for_all("done")
