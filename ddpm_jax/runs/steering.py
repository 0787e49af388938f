"""Guide samples by conditions and by the models of other runs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax import config
from ddpm_jax.config import Experiment
from ddpm_jax.models import guided
from ddpm_jax.models.guided import NEGATIVE_PREFIX, NO_GUIDES, Guides
from ddpm_jax.models.inputs import parse_inputs
from ddpm_jax.runs.model import WeightsChoice, load_experiment, load_weights

PyTree = Any


class Steering(NamedTuple):
  """Describe the conditions of samples, and the runs that guide them.

  Attributes:
    given: a dict from the names of conditions to lists of values as text. Each list is repeated to fill all samples.
      Missing conditions have their default values.
    negative: values to guide away from, in the same form as `given`.
    classifier: the run folder of a classifier that guides the samples.
    weak: the run folder of a weaker model to guide away from. To use an earlier checkpoint of the sampled model as the
      weaker model, set `weak` to the run folder of the sampled model.
    weak_step: the step of the weaker model's checkpoint; "" for the newest.
    prompt_weights: True to apply weights in texts, such as (word:1.3), and to read long texts to their end (see
      `data.prompts`).
  """

  given: Mapping[str, Sequence[str]] = {}
  negative: Mapping[str, Sequence[str]] = {}
  classifier: Path | None = None
  weak: Path | None = None
  weak_step: str = ""
  prompt_weights: bool = False


class Guided(NamedTuple):
  """Hold an experiment together with its guides and inputs.

  Attributes:
    experiment: the experiment, with a guidance rule that uses the guides.
    guides: the models that guide.
    load: a function that loads the parameters of the guides, as a dict whose keys are field names of `Guides`.
    inputs: the conditions of the samples, arrays [count, ...] by name.
  """

  experiment: Experiment
  guides: Guides
  load: Callable[[], dict[str, tuple[PyTree, PyTree]]]
  inputs: dict[str, np.ndarray]

  @property
  def is_negative(self) -> bool:
    """Return whether there are conditions to guide away from."""
    return any(name.startswith(NEGATIVE_PREFIX) for name in self.inputs)


def steer(
  experiment: Experiment,
  mesh: jax.sharding.Mesh,
  steering: Steering,
  count: int,
  scale: float | None = None,
  *,
  only: bool = False,
) -> Guided:
  """Check the steering against the model, and return the experiment with its guides and inputs.

  The guides' parameters are not loaded until `Guided.load` is called.

  Args:
    experiment: the experiment with the model.
    mesh: the devices.
    steering: the conditions and the guides.
    count: the number of samples.
    scale: the guidance scale; None for the experiment's scale.
    only: whether to leave missing conditions out of `Guided.inputs` instead of using their defaults.

  Raises:
    ValueError: if the model or the guides do not allow the steering.
  """
  guide_folders = {"classifier": steering.classifier, "weak": steering.weak}
  folders = {name: folder for name, folder in guide_folders.items() if folder is not None}
  guide_experiments = {name: load_experiment(None, folder, name) for name, folder in folders.items()}
  experiment.task.check_can_sample("a run")
  if "classifier" in guide_experiments:
    guide_experiments["classifier"].task.check_can_classify("a run in --classifier")
  if "weak" in guide_experiments:
    guide_experiments["weak"].task.check_can_sample("a run in --weak")
  if steering.prompt_weights:
    experiment = _with_prompt_weights(experiment, steering)
    if "weak" in guide_experiments:
      guide_experiments["weak"] = _with_prompt_weights(guide_experiments["weak"], steering)
  guides = Guides(**{name: guide.model for name, guide in guide_experiments.items()})
  experiment = _with_rule(experiment, guides, scale)
  two, is_negative = experiment.sampler.two_estimates, bool(steering.negative)
  guided.check(experiment.model, experiment.guidance, two, guides, negative=is_negative)
  conditions = model_conditions = experiment.model.conditions
  if "classifier" in guide_experiments and "classes" not in model_conditions:
    # The model has no classes, but its classifier does.
    classifier = guide_experiments["classifier"]
    conditions = {**model_conditions, "classes": classifier.task.classes(classifier)}
  inputs = parse_inputs(conditions, steering.given, count, only=only)
  negative = parse_inputs(model_conditions, steering.negative, count, only=True)
  inputs |= {f"{NEGATIVE_PREFIX}{name}": value for name, value in negative.items()}

  def load() -> dict[str, tuple[PyTree, PyTree]]:
    choices = {"classifier": WeightsChoice(), "weak": WeightsChoice(step=steering.weak_step)}
    guide_weights = {
      name: load_weights(guide, folders[name], mesh, choices[name]) for name, guide in guide_experiments.items()
    }
    return {name: weights.parameters[:2] for name, weights in guide_weights.items()}

  return Guided(experiment, guides, load, inputs)


def _with_prompt_weights(experiment: Experiment, steering: Steering) -> Experiment:
  """Return the experiment with text conditions that apply weights in texts, and read long texts to their end."""
  conditions = dict(experiment.model.conditions)
  names = [name for name, condition in conditions.items() if condition.weighted is not None]
  if not names:
    raise ValueError(
      f"Got --prompt_weights for a model without a text encoder of CLIP (its conditions: {', '.join(conditions) or 'none'});"
      " expected a model such as Stable Diffusion. Leave it out."
    )
  for name in names:
    weighted = conditions[name].weighted
    assert weighted is not None
    conditions[name] = weighted([*steering.given.get(name, ()), *steering.negative.get(name, ())])
  return experiment._replace(model=experiment.model._replace(conditions=conditions))


def _with_rule(experiment: Experiment, guides: Guides, scale: float | None) -> Experiment:
  """Return the experiment with a guidance rule that uses the guides, and with the guidance scale `scale`.

  The experiment's own rule stays if it already uses the guides. The experiment's own scale stays if `scale` is None.
  """
  rule, argument = ("classifier", "log_prob") if guides.classifier else ("autoguidance", "weak")
  if guides != NO_GUIDES and argument not in guided.argument_names(experiment.guidance):
    node, default = (tree.values["guidance"] for tree in (experiment.tree, config.expand({})))
    # Only the scale is kept for the new rule. All other options that the user set would be lost.
    lost = [name for name, value in node.items() if name != "scale" and value != default.get(name)]
    if lost:
      options = ", ".join(name for name in lost if name in default) if node["component"] == default["component"] else ""
      raise ValueError(
        f"Got --{'classifier' if guides.classifier else 'weak'} with config.guidance={experiment.tree.short_name('guidance')}"
        f"{options and f' (with {options})'}, a rule that cannot use this guide; expected a rule that can."
        f" Set --config.guidance={rule} and the options of this rule."
      )
    experiment = experiment.replace(guidance={"component": f"guidance.{rule}", "scale": node.get("scale", 1.0)})
  return experiment if scale is None else experiment.replace(**{scale_key(experiment.tree): float(scale)})


def scale_key(tree: config.Tree) -> str:
  """Return the key of the guidance scale, with "__" for each dot.

  If guidance is limited to an interval of noise levels, this is the key of the scale inside the interval.
  """
  scale = tree.values["guidance"].get("scale")
  return "guidance__scale__scale" if isinstance(scale, Mapping) and "scale" in scale else "guidance__scale"
