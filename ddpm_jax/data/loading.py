"""From the splits of a data set to what a run reads: images held out, small sets decoded, shapes and classes checked."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ddpm_jax.data import sources
from ddpm_jax.data.choices import Splits
from ddpm_jax.data.folders import FolderSource
from ddpm_jax.data.sources import NO_CLASS, ArraySource, SkipBroken, Source

# `check(source, classes)` raises a ValueError if classes [N], those of a source's images, are wrong; the source tells which images these are.
Check = Callable[[Source, np.ndarray], None]


def load(
  splits: Splits,
  *,
  broken: str = "stop",
  hold_out: int = 0,
  check: Check | None = None,
  shape: tuple[int, ...] | None = None,
) -> Splits:
  """Return the splits as a run reads them, small ones in memory.

  Args:
    splits: of a data set.
    broken: what to do about images that cannot be decoded: "stop", or "skip" to put the next one that can in their place.
    hold_out: how many images are kept from training where there is no split to evaluate on; `A_TENTH` for a tenth, 0 for none.
    check: of classes, such as `classes_below(10)`. It is called at once with all classes, or where they lie with the images, whenever an
      image is read; None for no check.
    shape: [H, W, C] that the images must have; None if the data set has checked it.

  Raises:
    ValueError: if images cannot be decoded and `broken` is "stop", too many are to be held out, classes are wrong, or the first image of a
      split has another shape.
  """
  if broken not in ("stop", "skip"):
    raise ValueError(f"Got broken={broken!r}; expected 'stop' or 'skip'. Set --config.data.broken.")
  train, held_out = splits
  check_split_classes(splits, check)
  if held_out is None and hold_out:
    # First, so that no image stands in for a broken one on the other side.
    train, held_out = sources.hold_out(train, hold_out)

  def finish(source: Source) -> Source:
    kept = sources.cache_in_memory(source, broken)
    first = sources.read(SkipBroken(kept) if broken == "skip" else kept, [0])
    _check_item(first)
    _check_shape(first["image"].shape[1:], shape)
    if check is not None:
      known = _labels(kept)
      if known is None and "classes" not in first:
        raise ValueError(
          f"Got data with the items {', '.join(sorted(first))} for a model of classes; expected 'classes' among them, an integer. Take another"
          " config.data.source, or leave the classes out of the model."
        )
      check(source, first["classes"] if known is None else known)
      kept = kept if known is not None else _Checked(check, kept)
    return SkipBroken(kept) if broken == "skip" else kept

  return Splits(finish(train), None if held_out is None else finish(held_out))


def classes_below(number: int, key: str = "model.conditions.classes.number") -> Check:
  """Return a check that every image has a class from 0 to number - 1.

  Args:
    number: of classes.
    key: the config's key for it, which the errors name.
  """

  def check(source: Source, classes: np.ndarray) -> None:
    without = np.flatnonzero(classes == NO_CLASS)
    if len(without):
      where, wanted = "", "a class for each. Prepare the data anew"
      if isinstance(source, FolderSource):
        names = f": {', '.join(source.class_names[:10])}" if source.class_names else ""
        where = f", such as {source.file(without[0])},"
        wanted = f"each in the folder of its class{names}. Move or remove them"
      elif isinstance(source, ArraySource):
        wanted = "an array 'labels' in the file. Add it"
      raise ValueError(
        f"Got {len(without):,} image(s) without a class{where} for config.{key}={number}; expected {wanted}, or take a model without classes"
        f"{_leave_out(key)}."
      )
    if np.min(classes) < 0 or np.max(classes) >= number:
      raise ValueError(
        f"Got data with classes {np.min(classes)} to {np.max(classes)} for {key}={number}; expected classes from 0 to {number - 1}."
      )

  return check


def _leave_out(key: str) -> str:
  """Return how a model does without what a key is of, for messages."""
  condition = key.rpartition(".")[0]
  return f": --config.{condition}=None" if condition.startswith("model.conditions.") else ""


def check_split_classes(splits: Splits, check: Check | None) -> None:
  """Check the classes of all splits that know theirs without reading images."""
  for source in splits:
    if check is not None and source is not None and (known := _labels(source)) is not None:
      check(source, known)


class _Checked:
  """A source whose classes lie with its images, each checked when it is read."""

  def __init__(self, check: Check, source: Source):
    self._check, self._source = check, source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    item = self._source[index]
    try:
      self._check(self, np.array([item["classes"]]))
    except ValueError as error:
      raise ValueError(f"image {index}: {error}") from error
    return item


def _labels(source: Source) -> np.ndarray | None:
  return getattr(source, "classes", None)


def _check_item(first: sources.Batch) -> None:
  """Raise a ValueError unless a first item holds an image as training takes it."""
  image = first.get("image")
  if image is None:
    raise ValueError(f"Got data with the items {', '.join(sorted(first)) or 'none'}; expected 'image' among them.")
  if image.dtype != np.uint8 and image.dtype != np.float32:
    raise ValueError(
      f"Got images of type {image.dtype} from the data; expected uint8 (0 to 255), or floats in [-1, 1]."
    )
  sources.check_range(image)


def _check_shape(found: tuple[int, ...], wanted: tuple[int, ...] | None) -> None:
  if wanted is not None and found != tuple(wanted):
    raise ValueError(
      f"Got images of shape {found} from the data; the config wants {tuple(wanted)}. Set --config.data.image_size and"
      " --config.data.channels."
    )
