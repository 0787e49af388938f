"""What samples are asked to show: items of conditions, from texts that people type or from real data."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ddpm_jax import data
from ddpm_jax.models.conditions import Condition
from ddpm_jax.storage import images


def parse_inputs(
  conditions: Mapping[str, Condition],
  texts: Mapping[str, Sequence[str]],
  count: int,
  *,
  only: bool = False,
) -> dict[str, np.ndarray]:
  """Return what samples are asked to show, arrays [count, ...] by the names of conditions.

  Args:
    conditions: that the model knows, by name.
    texts: by name, over and over.
    count: how many samples there are.
    only: whether names that are missing stay so, instead of having the condition's default.

  Raises:
    ValueError: if a name or a text is none that the model knows, there are more texts than samples, or something must be given and is not.
  """
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
    items = [_parsed(condition.parse, name, word) for word in words]
    if not items:
      raise ValueError(f"Got no value of {name}; expected one or more.")
    values = np.stack([np.asarray(items[index % len(items)]) for index in range(count)])
    found[name] = values.astype(np.int32) if values.dtype.kind in "iu" else values
  for name, condition in conditions.items():
    if name in found or only:
      continue
    if condition.default is not None:
      found[name] = condition.default(count)
    elif not condition.is_source_image:
      raise ValueError(f"Got no {name} for a model that is given some; expected {condition_flag(name)}=<value>.")
  return found


def _parsed(parse: Callable[[str], Any], name: str, text: str) -> Any:
  """Return the item that a text stands for. Any error of a user's own function becomes a ValueError that names the flag."""
  try:
    return parse(text)
  except Exception as error:
    if isinstance(error, ValueError) and str(error).startswith("Got "):
      raise
    raise ValueError(
      f"Got --given {name}={text}, which the condition cannot read ({type(error).__name__}: {error}); expected a text that its `parse` takes."
    ) from error


def condition_flag(name: str) -> str:
  """Return the flag that gives a condition."""
  return "--classes" if name == "classes" else f"--given {name}"


def inputs_from_data(conditions: Mapping[str, Condition], batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Return the items of real data that stand for conditions, of a batch whose images are in [-1, 1]."""
  return {
    name: np.asarray(batch[name] if one.from_data is None or name in batch else one.from_data(batch))
    for name, one in conditions.items()
  }


def default_inputs(
  conditions: Mapping[str, Condition], count: int, source: data.Source, counts: np.ndarray | None = None
) -> dict[str, np.ndarray]:
  """Return what samples are asked to show where no one asks, arrays [count, ...] by the names of conditions.

  That is the default of each condition, such as classes in turn or, if `counts` are given, as common as these say. If a condition has none, or is
  made of data, as a small image is, it is what the data of a source have.
  """
  if any(one.from_data is not None or one.default is None for one in conditions.values()):
    real = data.read(source, np.resize(np.random.default_rng(0).permutation(len(source)), count))
    return inputs_from_data(conditions, real | {"image": images.as_floats(real["image"])})
  inputs = parse_inputs(conditions, {}, count)
  if counts is not None and "classes" in inputs:
    inputs["classes"] = data.proportional_classes(counts, count)
  return inputs
