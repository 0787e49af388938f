"""Export a run's model for other tools."""

from pathlib import Path

import numpy as np

from ddpm_jax import guidance, interop, networks
from ddpm_jax.config import Experiment
from ddpm_jax.devices import parallel
from ddpm_jax.devices.progress import print_line
from ddpm_jax.interop import autoencoder_kl
from ddpm_jax.runs import codecs, frozen, model
from ddpm_jax.runs.tasks import Autoencode
from ddpm_jax.storage import scores

# The keys of eval.json that go on the model card.
_CARD_KEYS = ("scores", "features", "num_samples", "reference", "step", "weights", "sampling")


def run_export(experiment: Experiment, folder: Path, output: Path, choice: model.WeightsChoice) -> None:
  """Export a run's model as a diffusers folder, with the config and the scores on its model card.

  Args:
    experiment: the run's experiment.
    folder: the run's folder.
    output: the folder to write. It must be new or empty.
    choice: which of the run's weights to use.

  Raises:
    ValueError: if diffusers cannot express the model, or the output folder is not empty.
  """
  if isinstance(experiment.task, Autoencode):
    return _export_codec(experiment, folder, output, choice)
  experiment.task.check_can_sample("a run")
  interop.diffusers.check_exportable(experiment.model)
  interop.diffusers.check_output(output)
  clip = _clip(experiment)
  mesh = parallel.make_mesh()
  weights = model.load_weights(experiment, folder, mesh, choice)
  exported, frozen_params = experiment.model, weights.parameters.frozen
  if experiment.tree.values["model"].get("dtype", "float32") != "float32":
    # The run holds the autoencoder and the text encoders in its own dtype. Do not round what it did not train.
    exported = experiment.replace(model__dtype="float32").model
    frozen_params = frozen.load_for_model(experiment._replace(model=exported), None, mesh)
  if parallel.is_main():
    report = scores.read(folder)
    interop.diffusers.save(
      output,
      exported,
      weights.parameters.params,
      frozen=frozen_params,
      clip=clip,
      variance=(experiment.tree.values["sampler"] or {}).get("variance"),
      config={"step": weights.step, "weights": weights.name} | experiment.tree.values,
      scores={key: report[key] for key in _CARD_KEYS} if report and "scores" in report else None,
    )
  print_line(
    f"model        {output} ({weights.name} weights), to load with diffusers or --pretrained\nmodel card   {output / 'README.md'}"
  )
  parallel.wait_for_all("done")


def _export_codec(experiment: Experiment, folder: Path, output: Path, choice: model.WeightsChoice) -> None:
  """Export an autoencoder as a diffusers folder, with the mean and standard deviation of its latents.

  These statistics come from eval.json, and must belong to the exported weights.
  """
  module = experiment.model.network.module
  if not isinstance(module, networks.Autoencoder):
    raise ValueError(
      f"Got config.model.network={experiment.tree.short_name('model.network')} for an export; expected networks.Autoencoder, the only"
      " autoencoder that diffusers can compute."
    )
  # Check the network before its weights are read.
  autoencoder_kl.to_config(module, autoencoder_kl.Scale(np.ones(()), np.zeros(())))
  interop.diffusers.check_output(output)
  weights = model.load_weights(experiment, folder, parallel.make_mesh(), choice)
  mean, std = codecs.statistics(folder, weights.step, weights.name)
  if parallel.is_main():
    scale, shift = 1 / np.asarray(std, np.float32), np.asarray(mean, np.float32)
    interop.diffusers.save_codec(
      output, module, weights.parameters.params, size=experiment.data.space, scale=scale, shift=shift
    )
  print_line(f"autoencoder  {output} ({weights.name} weights), to load with diffusers' AutoencoderKL or as a codec")
  parallel.wait_for_all("done")


def _clip(experiment: Experiment) -> float | None:
  """Return the maximum magnitude to which diffusers clips estimates, or None for no clipping.

  Raises:
    ValueError: if estimates are clipped in a way that diffusers cannot express.
  """
  rule = experiment.sampling.clip
  if rule is None:
    return None
  options = getattr(rule, "keywords", {})
  if getattr(rule, "func", rule) is not guidance.clip or options["low"] != -options["high"]:
    node = experiment.tree.values["sampling"]["clip"]
    raise ValueError(
      f"Got config.sampling.clip={node} for an export; expected None or a symmetric range, such as clip(low=-1, high=1),"
      " because diffusers cannot clip in any other way. Set --config.sampling.clip=clip."
    )
  return options["high"]
