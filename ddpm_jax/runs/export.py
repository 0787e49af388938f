"""A run's model for other people's tools."""

from pathlib import Path

from ddpm_jax import guidance, interop
from ddpm_jax.config import Experiment
from ddpm_jax.devices import parallel
from ddpm_jax.devices.progress import print_line
from ddpm_jax.runs import model
from ddpm_jax.storage import scores

# What a model card says of scores.
_SCORES = ("scores", "features", "num_samples", "reference", "step", "weights", "sampling")


def run_export(experiment: Experiment, folder: Path, output: Path, choice: model.WeightsChoice) -> None:
  """Write the model of a run as a folder that diffusers opens, with its config and its scores on the model card.

  Raises:
    ValueError: if diffusers cannot express the model, or the output folder is not empty.
  """
  experiment.task.check_can_sample("the model")
  interop.diffusers.check_exportable(experiment.model)
  interop.diffusers.check_output(output)
  clip = _clip(experiment)
  weights = model.load_weights(experiment, folder, parallel.make_mesh(), choice)
  if parallel.is_main():
    found = scores.read(folder)
    interop.diffusers.save(
      output,
      experiment.model,
      weights.parameters.params,
      clip=clip,
      variance=(experiment.tree.values["sampler"] or {}).get("variance", "large"),
      config={"step": weights.step, "weights": weights.name} | experiment.tree.values,
      scores={key: found[key] for key in _SCORES} if found and "scores" in found else None,
    )
  print_line(
    f"model        {output} ({weights.name} weights), for diffusers and for --pretrained\nmodel card   {output / 'README.md'}"
  )
  parallel.wait_for_all("done")


def _clip(experiment: Experiment) -> float | None:
  """Return the largest magnitude of an estimate, by which diffusers clips; None for none.

  Raises:
    ValueError: if estimates are clipped in another way.
  """
  rule = experiment.sampling.clip
  if rule is None:
    return None
  options = getattr(rule, "keywords", {})
  if getattr(rule, "func", rule) is not guidance.clip or options["low"] != -options["high"]:
    node = experiment.tree.values["sampling"]["clip"]
    raise ValueError(
      f"Got config.sampling.clip={node} to export; expected clip(low=-1, high=1), or another range around 0, or None: diffusers clips in no other"
      " way. Set --config.sampling.clip=clip."
    )
  return options["high"]
