"""What samples are to show, and other runs that lead them there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import build, schema, workdir
from ddpm_jax.runs.model import Choice, load_weights, trained

PyTree = Any


class Steering(NamedTuple):
  """What samples are to show, and what leads them there.

  Attributes:
    labels: the classes wanted, over and over; None for all in turn.
    negative: classes to guide away from, over and over.
    classifier: the folder of a classifier's run that guides.
    weak: the folder of a weaker model's run to guide away from; it may be the model's own.
    weak_step: the step of its checkpoint, empty for the newest.
  """

  labels: list[int] | None = None
  negative: list[int] | None = None
  classifier: Path | None = None
  weak: Path | None = None
  weak_step: str = ""


class Guided(NamedTuple):
  """What `Steering` comes to: the guides' configs, their parameters by name, and the labels of each sample."""

  guides: build.Guides
  load: Callable[[], dict[str, PyTree]]
  inputs: dict[str, np.ndarray]


def steer(config: ConfigDict, mesh: jax.sharding.Mesh, steering: Steering, count: int) -> Guided:
  """Checks a wish against the model, and says how to follow it; parameters are read when `load` is called.

  Raises:
    ValueError: if the model, or what is to guide it, does not allow it.
  """
  folders = {name: getattr(steering, name) for name in ("classifier", "weak") if getattr(steering, name) is not None}
  configs = {name: config_of_other(name, folder) for name, folder in folders.items()}
  guides = build.Guides(**configs)
  build.check_guidance(config, guides, negative=steering.negative is not None)
  known = guides.classifier and guides.classifier.network.num_classes
  inputs = {"classes": build.build_labels(config, steering.labels, count, classes=known)}
  if steering.negative is not None:
    inputs["negative"] = build.build_labels(config, steering.negative, count)

  def load() -> dict[str, PyTree]:
    choices = {"classifier": Choice(), "weak": Choice(step=steering.weak_step)}
    return {name: load_weights(configs[name], folder, mesh, choices[name]).params for name, folder in folders.items()}

  return Guided(guides, load, {name: value for name, value in inputs.items() if value is not None})


def config_of_other(flag: str, folder: Path) -> ConfigDict:
  """The config of another run, which a flag names; a ValueError if the folder holds none."""
  if not workdir.checkpoint_steps(folder):
    raise ValueError(f"Got --{flag}={folder}, which holds no checkpoint; wanted the folder of a run.")
  return trained(schema.config_of_run(None, folder), folder)
