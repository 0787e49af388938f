"""What samples are to show, and other runs that lead them there."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax import config
from ddpm_jax.config import Experiment
from ddpm_jax.models import guided
from ddpm_jax.models.guided import NEGATIVE, Guides
from ddpm_jax.runs.model import Choice, load_weights, trained
from ddpm_jax.storage import workdir

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
  folders = {name: getattr(steering, name) for name in ("classifier", "weak") if getattr(steering, name) is not None}
  others = {name: other(name, folder) for name, folder in folders.items()}
  guides = Guides(**{name: one.model for name, one in others.items()})
  _check_tasks(experiment, others)
  experiment = _with_rule(experiment, guides, scale)
  guided.check(
    experiment.model, experiment.guidance, experiment.sampler.two_estimates, guides, negative=bool(steering.negative)
  )
  inputs = asked(experiment.model, steering.given, count, others.get("classifier"), only=only)
  if steering.negative:
    unwanted = asked(experiment.model, steering.negative, count, only=True)
    inputs |= {f"{NEGATIVE}{name}": value for name, value in unwanted.items()}

  def load() -> dict[str, tuple[PyTree, PyTree]]:
    choices = {"classifier": Choice(), "weak": Choice(step=steering.weak_step)}
    found = {name: load_weights(others[name], folder, mesh, choices[name]) for name, folder in folders.items()}
    return {name: (weights.params, weights.frozen) for name, weights in found.items()}

  return Guided(experiment, guides, load, inputs)


def _check_tasks(experiment: Experiment, others: Mapping[str, Experiment]) -> None:
  experiment.task.check_draws("the model")
  if "classifier" in others:
    others["classifier"].task.check_classifies("--classifier")
  if "weak" in others:
    others["weak"].task.check_draws("--weak")


def _with_rule(experiment: Experiment, guides: Guides, scale: float | None) -> Experiment:
  """Return the experiment with the rule that its guides want, unless its own is of that kind."""
  wanted = "classifier" if guides.classifier else "autoguidance" if guides.weak else ""
  kinds = {"classifier": "log_prob", "autoguidance": "weak"}
  if wanted and kinds[wanted] not in guided.takes(experiment.guidance):
    node, usual = (tree.values["guidance"] for tree in (experiment.tree, config.expand({})))
    lost = [name for name, value in node.items() if name != "scale" and value != usual.get(name)]
    if lost:
      what = (
        f" with {', '.join(name for name in lost if name in usual)}" if node["component"] == usual["component"] else ""
      )
      raise ValueError(
        f"Got config.guidance={experiment.tree.short_name('guidance')}{what} and another guide, whose rule takes its place with its scale"
        f" alone; expected a rule for that guide. Set --config.guidance={wanted}."
      )
    own = node.get("scale", 1.0)
    node = {"component": f"guidance.{wanted}"}
    experiment = experiment.changed(guidance=node | {"scale": own})
  return experiment if scale is None else experiment.changed(**{scale_key(experiment.tree): float(scale)})


def scale_key(tree: config.Tree) -> str:
  """Return the key of the scale of guidance, with __ for each dot: that of its rule, or that of an interval in which it holds."""
  scale = tree.values["guidance"].get("scale")
  return "guidance__scale__scale" if isinstance(scale, Mapping) and "scale" in scale else "guidance__scale"


def asked(
  model: Any,
  texts: Mapping[str, Sequence[str]],
  count: int,
  classifier: Experiment | None = None,
  *,
  only: bool = False,
) -> dict[str, np.ndarray]:
  """Return what samples are asked to show, arrays [count, ...] by the names of conditions.

  Args:
    model: whose conditions they are.
    texts: by name, over and over.
    count: how many samples there are.
    classifier: of a guide that knows the classes where the model does not.
    only: whether names that are missing stay so, instead of having the condition's default.

  Raises:
    ValueError: if a name or a text is none that the model knows, there are more texts than samples, or something must be given and is not.
  """
  conditions = dict(model.conditions)
  if classifier is not None and "classes" not in conditions:
    conditions["classes"] = classifier.task.classes(classifier)
  found: dict[str, np.ndarray] = {}
  for name, words in texts.items():
    condition = conditions.get(name)
    if condition is None:
      known, near = ", ".join(conditions) or "none", difflib.get_close_matches(name, list(conditions), 1)
      guide = "Leave it out, or guide it by --classifier=<run folder>." if name == "classes" else "Leave it out."
      hint = f"Did you mean {near[0]!r}?" if near else guide
      raise ValueError(
        f"Got {name} {','.join(words)} for a model that was trained without {name}; expected a condition that it knows ({known}). {hint}"
      )
    if condition.parse is None:
      raise ValueError(
        f"Got --given {name}=..., a condition that cannot be typed; give images by --mode=edit --task=superres."
      )
    if len(words) > count:
      raise ValueError(f"Got {len(words)} {name} for {count} samples; expected no more than samples.")
    items = [condition.parse(word) for word in words]
    if not items:
      raise ValueError(f"Got no value of {name}; expected one or more.")
    found[name] = np.stack([np.asarray(items[index % len(items)]) for index in range(count)])
    found[name] = found[name].astype(np.int32) if found[name].dtype.kind in "iu" else found[name]
  for name, condition in conditions.items():
    if name in found or only:
      continue
    if condition.default is not None:
      found[name] = condition.default(count)
    elif not condition.is_source:
      raise ValueError(f"Got no {name} for a model that is given some; expected {flag_of(name)}=<value>.")
  return found


def flag_of(name: str) -> str:
  """Return the flag that gives a condition."""
  return "--classes" if name == "classes" else f"--given {name}"


def in_proportion(counts: np.ndarray, count: int) -> np.ndarray:
  """Return classes [count] as common as `counts` [number] says, by largest remainder, each spread evenly."""
  quotas = count * counts / np.sum(counts)
  shares = np.floor(quotas).astype(int)
  # Stable sorts: of equals the lower class comes first.
  most_left = np.argsort(shares - quotas, kind="stable")
  shares[most_left[: count - np.sum(shares)]] += 1
  labels = np.repeat(np.arange(len(counts), dtype=np.int32), shares)
  places = np.concatenate([(np.arange(share) + 0.5) / share for share in shares])
  return labels[np.argsort(places, kind="stable")]


def other(flag: str, folder: Path) -> Experiment:
  """Return what the run in a folder stands for that a flag names; raise a ValueError if the folder holds none."""
  if not workdir.checkpoint_steps(folder):
    raise ValueError(f"Got --{flag}={folder}, which holds no checkpoint; expected the folder of a run.")
  return trained(config.of_run(folder), folder)
