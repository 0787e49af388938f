"""Read the data of an experiment, and check that the data fit the model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from ddpm_jax import data
from ddpm_jax.config import Experiment
from ddpm_jax.devices.progress import warn
from ddpm_jax.models.texts import shorten
from ddpm_jax.names import choose
from ddpm_jax.runs import limits

# Names that training adds to the batch of an objective (see `losses.Objective`). Data must not use them.
_RESERVED = ("x", "given", "times", data.LATENT)
# The number of training texts whose lengths are checked. A thousand take about 0.1 s.
_CHECKED_TEXTS = 10_000
# How broken images may be treated.
_TREATMENTS = ("stop", "skip")


class Run(NamedTuple):
  """Hold a run with its data.

  Attributes:
    experiment: the experiment to train or score.
    folder: the run's folder.
    mesh: the mesh of all devices.
    source: the training data.
    held_out: the held-out data, or None.
    buckets: the training data at several sizes, or None (see `read_buckets`).
    latents: the encoded training data; None to encode images in every train step.
  """

  experiment: Experiment
  folder: Path
  mesh: jax.sharding.Mesh
  source: data.Source
  held_out: data.Source | None
  buckets: data.Source | None = None
  latents: data.Source | None = None

  @property
  def training_source(self) -> data.Source:
    """Return the source of training batches: encoded images, images at several sizes, or images of one size."""
    return next(source for source in (self.latents, self.buckets, self.source) if source is not None)


def fit_of(experiment: Experiment) -> data.Fit:
  """Return how images are resized and cropped to the experiment's shape."""
  c = experiment.data
  resize = choose(c.resize, data.RESIZES, "config.data.resize")
  framing = any(condition.framing for condition in experiment.model.conditions.values())
  return data.Fit(data.check_image_size(c.space), c.channels, c.crop, resize, framing)


def check_of(experiment: Experiment) -> data.Check | None:
  """Return the function that checks the classes in the data, or None if the task uses no classes."""
  classes = experiment.task.classes(experiment)
  return None if classes is None else classes.check


def read_sources(experiment: Experiment) -> data.Splits:
  """Read the training split and the evaluation split of the source.

  The training split still contains the images that `read_data` holds out later (see `config.data.hold_out`). The
  evaluation split is None if it does not exist.

  Raises:
    ValueError: if the data are missing or unreadable, or if they lack classes that the task needs.
  """
  limits.check_images(experiment.data.shape, 1, "config.data.image_size and channels")
  splits = experiment.data.source(fit_of(experiment))
  data.check_split_classes(splits, check_of(experiment))
  return splits


def read_buckets(experiment: Experiment, splits: data.Splits) -> data.Source | None:
  """Return the training images at the sizes of `config.data.buckets`, or None if the config has no buckets.

  Args:
    experiment: the experiment with the data.
    splits: the splits that `read_sources` returned.

  Raises:
    ValueError: if the source cannot read images at several sizes, or an image is smaller than the crop.
  """
  c = experiment.data
  if not c.buckets:
    return None
  broken = choose(c.broken, _TREATMENTS, "config.data.broken")
  buckets = data.Buckets(data.split(splits, c.hold_out).train, c.buckets, broken, c.crop)
  return data.SkipBroken(buckets) if broken == "skip" else buckets


def read_data(experiment: Experiment, splits: data.Splits | None = None) -> data.Splits:
  """Read the training data and the held-out data, and check their shapes, classes and other items.

  The held-out data are None if there are none.

  Args:
    experiment: the experiment with the data.
    splits: the splits that `read_sources` returned; None to read them.

  Raises:
    ValueError: if the data are missing or unreadable, or if they lack a condition of the model.
  """
  c, conditions = experiment.data, experiment.model.conditions
  broken = choose(c.broken, _TREATMENTS, "config.data.broken")
  splits, check = splits or read_sources(experiment), check_of(experiment)
  splits = data.load(splits, broken=broken, hold_out=c.hold_out, check=check, shape=c.shape)
  item = data.read(splits.train, [0])
  if reserved := [name for name in _RESERVED if name in item]:
    raise ValueError(
      f"Got data with the item(s) {', '.join(reserved)}; expected other names, because training passes its own values to the objective under"
      " these names. Rename them in the data source."
    )
  if "image" in conditions:
    raise ValueError(
      "Got a model with the condition 'image'; expected another name, such as 'hint', because 'image' is the name of the data to generate."
      " Rename the condition in config.model.conditions."
    )
  spatial = [
    name
    for name, condition in conditions.items()
    if condition.from_data is None and "image" in jax.tree.leaves(condition.kind)
  ]
  if experiment.model.codec.is_latent and c.flip and spatial:
    raise ValueError(
      f"Got config.data.flip=True for a model of latents with the image condition {spatial[0]}; expected False, because only arrays with the"
      " height and width of the image can be mirrored with the image. Set --config.data.flip=False."
    )
  for name, condition in conditions.items():
    if condition.from_data is None and name not in item:
      field = f"Set --config.data.fields.{name} to its field, use" if name in data.Fields._fields else "Use"
      raise ValueError(
        f"Got data with the items {', '.join(sorted(item))} for a model with the condition {name}; expected an item {name!r}. {field} another"
        f" --config.data.source, or leave config.model.conditions.{name} out."
      )
    if condition.host is None and name in item and data.is_text(item[name]):
      raise ValueError(
        f"Got data with text as the item {name!r} for a model with the condition {name}, which takes numbers; expected a condition of"
        f" text. Set another --config.model.conditions.{name}, or read numbers from the data."
      )
    if condition.unread is not None and name in item:
      _report_unread(name, condition.unread, splits.train)
  return splits


def _report_unread(name: str, unread: Callable[[Sequence[str]], list[str]], source: data.Source) -> None:
  """Warn once about training texts with more tokens than the model reads."""
  texts = data.read_texts(source, name, _CHECKED_TEXTS)
  cut = [(text, end) for text, end in zip(texts, unread(texts), strict=True) if end]
  if cut:
    longest = max(cut, key=lambda pair: len(pair[1]))
    text, end = shorten(longest[0]), shorten(longest[1])
    checked = "" if len(texts) == len(source) else " checked"
    warn(
      f"{len(cut):,} of {len(texts):,}{checked} training texts have more tokens than fit, so the model does not read their ends, such as"
      f" {end!r} of the {name} {text!r}"
    )
