"""Load a model from a run's folder, a diffusers folder or the Hugging Face hub."""

from pathlib import Path
from typing import Any, NamedTuple

import jax

from ddpm_jax import interop
from ddpm_jax.devices import parallel
from ddpm_jax.models import Model, SamplingDefaults
from ddpm_jax.runs import model
from ddpm_jax.storage import workdir
from ddpm_jax.storage.places import user_path

PyTree = Any


class Loaded(NamedTuple):
  """Hold a model with its parameters.

  Attributes:
    model: the model. If it was loaded from a run, `model.defaults` has the run's sampler, number of steps and clipping.
    params: the parameters.
    frozen: a dict with the frozen parameters of the codec ("codec") and of the conditions ("conditions"). The dict is
      empty if the model has no frozen parameters.
  """

  model: Model
  params: PyTree
  frozen: dict[str, PyTree]


def load(path: str | Path, *, ema: bool = True, step: int | str | None = None) -> Loaded:
  """Load a model and its parameters.

  To generate samples, call `sampling.sample(key, sampler, model.denoise(params, given), x, times)`.

  Args:
    path: a run's folder, a diffusers folder, or a name on the Hugging Face hub such as "google/ddpm-cifar10-32".
    ema: True for the averaged parameters of a run (EMA), False for the raw parameters.
    step: the step of a run's checkpoint; "best" for the best checkpoint; None for the newest.

  Returns:
    `(model, params, frozen)`.

  Raises:
    ValueError: if there is no model at the path, or if it cannot be read.
  """
  folder = user_path(path)
  if not workdir.is_run(folder):
    if not ema or step is not None:
      raise ValueError(
        f"Got ema={ema} and step={step} for {path}; expected the folder of a run, because only runs have these options."
        " Leave them out."
      )
    pretrained, params = interop.diffusers.load(path)
    return Loaded(pretrained, params, pretrained.load_frozen())
  if not workdir.checkpoint_steps(folder):
    raise ValueError(
      f"Got {path}, the folder of a run without a checkpoint; expected a trained run. Train it with --mode=train --workdir={path}."
    )
  experiment = model.load_experiment(None, folder)
  choice = model.WeightsChoice(ema, step="" if step is None else str(step))
  weights = model.load_weights(experiment, folder, parallel.make_mesh(devices=jax.devices()[:1]), choice, quiet=True)
  defaults = SamplingDefaults(
    name=experiment.sampler_name,
    sampler=experiment.sampler,
    times=lambda num_steps: experiment.replace(sampling__num_steps=num_steps).times,
    steps=experiment.sampling.num_steps,
    clip=experiment.sampling.clip,
  )
  params, frozen, _ = weights.parameters
  return Loaded(experiment.model._replace(defaults=defaults), params, dict(frozen))
