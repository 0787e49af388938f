"""Load the splits of a data set for a run.

Loading holds out images, decodes small sets into memory, and checks shapes and classes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ddpm_jax.data import sources
from ddpm_jax.data.broken import SkipBroken, cache_in_memory
from ddpm_jax.data.choices import Splits
from ddpm_jax.data.folders import FolderSource
from ddpm_jax.data.sources import NO_CLASS, ArraySource, Source

# `check(source, classes)` raises a ValueError if the classes [N] of images in `source` are wrong. It uses `source` only
# to name images in the message.
Check = Callable[[Source, np.ndarray], None]


def load(
  splits: Splits,
  *,
  broken: str = "stop",
  hold_out: int = 0,
  check: Check | None = None,
  shape: tuple[int, ...] | None = None,
) -> Splits:
  """Return the splits for a run, with small sets decoded into memory.

  Args:
    splits: the splits of a data set.
    broken: how to treat images that cannot be decoded: "stop" to raise an error, or "skip" to replace each with the
      next image that can be decoded.
    hold_out: number of images to hold out from training if the data set has no evaluation split; `A_TENTH` for a tenth
      of the images, at least 1 and at most 500; 0 for none.
    check: a check of the classes, such as `classes_below(10)`; None for no check. If a source knows all classes,
      `load` checks them. Otherwise the class of each image is checked when the image is read.
    shape: the shape [H, W, C] that images must have; None for no check.

  Raises:
    ValueError: if images cannot be decoded and `broken` is "stop", `hold_out` is too large, classes are wrong, or the
      first image of a split has a wrong shape, type or range.
  """
  if broken not in ("stop", "skip"):
    raise ValueError(f"Got broken={broken!r}; expected 'stop' or 'skip'. Set --config.data.broken.")
  check_split_classes(splits, check)
  # Split before broken images are replaced, so that no held-out image replaces a training image or vice versa.
  train, held_out = split(splits, hold_out)

  def finish(source: Source) -> Source:
    cached = cache_in_memory(source, broken)
    first = sources.read(SkipBroken(cached) if broken == "skip" else cached, [0])
    _check_item(first)
    _check_shape(first["image"].shape[1:], shape)
    if check is not None:
      classes = _all_classes(cached)
      if classes is None and "classes" not in first:
        raise ValueError(
          f"Got data with the items {', '.join(sorted(first))} for a class-conditional model; expected an integer"
          " 'classes' among them. Choose another config.data.source, or remove the classes from the model."
        )
      check(source, first["classes"] if classes is None else classes)
      cached = cached if classes is not None else _CheckedSource(check, cached)
    return SkipBroken(cached) if broken == "skip" else cached

  return Splits(finish(train), None if held_out is None else finish(held_out))


def split(splits: Splits, count: int) -> Splits:
  """Hold out training images for evaluation if there is no evaluation split.

  Args:
    splits: the splits of a data set.
    count: the number of images to hold out (see `hold_out` in `load`).

  Raises:
    ValueError: if `count` is too large.
  """
  return Splits(*sources.hold_out(splits.train, count)) if splits.held_out is None and count else splits


def classes_below(number: int, key: str = "model.conditions.classes.number") -> Check:
  """Return a check that every image has a class from 0 to number - 1.

  Args:
    number: the number of classes.
    key: the config key of `number`, for error messages.
  """

  def check(source: Source, classes: np.ndarray) -> None:
    missing = np.flatnonzero(classes == NO_CLASS)
    if len(missing):
      example, expected = "", "a class for each image. Prepare the data again"
      if isinstance(source, FolderSource):
        example, expected = f", such as {source.file(missing[0])},", _class_rule(source)
      elif isinstance(source, ArraySource):
        expected = "an array 'labels' in the file. Add it"
      raise ValueError(
        f"Got {len(missing):,} image(s) without a class{example} for config.{key}={number}; expected {expected}, or use"
        f" a model without classes{_removal_flag(key)}."
      )
    if np.min(classes) < 0 or np.max(classes) >= number:
      raise ValueError(
        f"Got data with classes {np.min(classes)} to {np.max(classes)} for config.{key}={number}; expected classes"
        f" from 0 to {number - 1}. Set --config.{key}, or number the classes from 0."
      )

  return check


def _class_rule(source: FolderSource) -> str:
  """Describe how an image in a folder gets its class, for error messages."""
  names = f": {', '.join(source.class_names[:10])}" if source.class_names else ""
  field = source.fields.classes
  if field:
    return (
      f"for each image, a line in metadata.jsonl whose field {field!r} is a class of the training split{names}. Correct"
      " the lines, or remove the images"
    )
  other = ". To take the classes from metadata.jsonl, set --config.data.fields.classes" if source.has_metadata else ""
  return f"each image in the folder of its class{names}. Move or remove them{other}"


def _removal_flag(key: str) -> str:
  """Return the end of an error message: the flag that removes a condition from the model.

  The result is "" if `key` is not a config key of a condition.
  """
  condition = key.rpartition(".")[0]
  return f": --config.{condition}=None" if condition.startswith("model.conditions.") else ""


def check_split_classes(splits: Splits, check: Check | None) -> None:
  """Check the classes of each split, if they are known without reading images."""
  for source in splits:
    if check is not None and source is not None and (classes := _all_classes(source)) is not None:
      check(source, classes)


class _CheckedSource:
  """Check the class of each image when it is read."""

  def __init__(self, check: Check, source: Source):
    self._check, self._source = check, source

  def __len__(self) -> int:
    return len(self._source)

  def texts(self, name: str, indices: np.ndarray) -> list[str] | None:
    return sources.known_texts(self._source, name, indices)

  def __getitem__(self, index: int) -> dict[str, Any]:
    item = self._source[index]
    try:
      self._check(self, np.array([item["classes"]]))
    except ValueError as error:
      raise ValueError(f"image {index}: {error}") from error
    return item


def _all_classes(source: Source) -> np.ndarray | None:
  return getattr(source, "classes", None)


def _check_item(first: sources.Batch) -> None:
  """Raise a ValueError if the first item has no image, or an image of the wrong type or range."""
  image = first.get("image")
  if image is None:
    raise ValueError(f"Got data with the items {', '.join(sorted(first)) or 'none'}; expected 'image' among them.")
  if image.dtype != np.uint8 and image.dtype != np.float32:
    raise ValueError(
      f"Got images of type {image.dtype} from the data; expected uint8 (0 to 255), or floats in [-1, 1]."
    )
  sources.check_range(image)


def _check_shape(shape: tuple[int, ...], expected: tuple[int, ...] | None) -> None:
  if expected is not None and shape != tuple(expected):
    raise ValueError(
      f"Got images of shape {shape} from the data; expected {tuple(expected)}. Set --config.data.image_size and"
      " --config.data.channels."
    )
