"""What samples are to show, and other runs that lead them there."""

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
  """What samples are to show, and what leads them there.

  Attributes:
    given: what is asked for, as texts by the names of conditions, over and over; of a name that is missing, the condition's default.
    negative: the same, to guide away from.
    classifier: the folder of a classifier's run that guides.
    weak: the folder of a weaker model's run to guide away from; it may be the model's own.
    weak_step: the step of its checkpoint, empty for the newest.
  """

  given: Mapping[str, Sequence[str]] = {}
  negative: Mapping[str, Sequence[str]] = {}
  classifier: Path | None = None
  weak: Path | None = None
  weak_step: str = ""


class Guided(NamedTuple):
  """What `Steering` comes to.

  Attributes:
    experiment: with the rule of guidance that the guides want.
    guides: the other models.
    load: reads their parameters, by their names in `Guides`.
    inputs: what each sample is to show, arrays [count, ...] by name.
  """

  experiment: Experiment
  guides: Guides
  load: Callable[[], dict[str, tuple[PyTree, PyTree]]]
  inputs: dict[str, np.ndarray]

  @property
  def is_negative(self) -> bool:
    """Whether there is something to guide away from."""
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
  """Check a wish against the model, and say how to follow it; parameters are read when `load` is called.

  Args:
    experiment: of the model.
    mesh: the devices.
    steering: the wish.
    count: how many samples there are.
    scale: of guidance; None for the experiment's.
    only: whether conditions that nobody names stay out of `Guided.inputs`, instead of having their defaults.

  Raises:
    ValueError: if the model, or what is to guide it, does not allow it.
  """
  asked_folders = {"classifier": steering.classifier, "weak": steering.weak}
  folders = {name: folder for name, folder in asked_folders.items() if folder is not None}
  others = {name: load_experiment(None, folder, name) for name, folder in folders.items()}
  guides = Guides(**{name: one.model for name, one in others.items()})
  experiment.task.check_can_sample("the model")
  if "classifier" in others:
    others["classifier"].task.check_can_classify("--classifier")
  if "weak" in others:
    others["weak"].task.check_can_sample("--weak")
  experiment = _with_rule(experiment, guides, scale)
  two, is_negative = experiment.sampler.two_estimates, bool(steering.negative)
  guided.check(experiment.model, experiment.guidance, two, guides, negative=is_negative)
  known = own = experiment.model.conditions
  if "classifier" in others and "classes" not in own:
    # The guide knows the classes where the model does not.
    known = {**own, "classes": others["classifier"].task.classes(others["classifier"])}
  inputs = parse_inputs(known, steering.given, count, only=only)
  unwanted = parse_inputs(own, steering.negative, count, only=True)
  inputs |= {f"{NEGATIVE_PREFIX}{name}": value for name, value in unwanted.items()}

  def load() -> dict[str, tuple[PyTree, PyTree]]:
    choices = {"classifier": WeightsChoice(), "weak": WeightsChoice(step=steering.weak_step)}
    found = {name: load_weights(one, folders[name], mesh, choices[name]) for name, one in others.items()}
    return {name: weights.parameters[:2] for name, weights in found.items()}

  return Guided(experiment, guides, load, inputs)


def _with_rule(experiment: Experiment, guides: Guides, scale: float | None) -> Experiment:
  """Return the experiment with the rule that its guides want, unless its own is of that kind."""
  wanted, takes = ("classifier", "log_prob") if guides.classifier else ("autoguidance", "weak")
  if guides != NO_GUIDES and takes not in guided.argument_names(experiment.guidance):
    node, usual = (tree.values["guidance"] for tree in (experiment.tree, config.expand({})))
    lost = [name for name, value in node.items() if name != "scale" and value != usual.get(name)]
    if lost:
      of_usual = ", ".join(name for name in lost if name in usual) if node["component"] == usual["component"] else ""
      raise ValueError(
        f"Got config.guidance={experiment.tree.short_name('guidance')}{of_usual and f' with {of_usual}'} and another guide, whose rule takes"
        f" its place with its scale alone; expected a rule for that guide. Set --config.guidance={wanted}."
      )
    experiment = experiment.replace(guidance={"component": f"guidance.{wanted}", "scale": node.get("scale", 1.0)})
  return experiment if scale is None else experiment.replace(**{scale_key(experiment.tree): float(scale)})


def scale_key(tree: config.Tree) -> str:
  """Return the key of the scale of guidance, with __ for each dot: that of its rule, or that of an interval in which it holds."""
  scale = tree.values["guidance"].get("scale")
  return "guidance__scale__scale" if isinstance(scale, Mapping) and "scale" in scale else "guidance__scale"
