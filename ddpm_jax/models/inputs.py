"""Make the items that conditions need, from text, real data or defaults, and convert items to arrays."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ddpm_jax import data
from ddpm_jax.models.conditions import Condition
from ddpm_jax.models.guided import NEGATIVE_PREFIX
from ddpm_jax.storage import images

# The condition that gives the images to edit to models that were trained for a task of --mode=edit, by task.
IMAGES_OF_TASKS = {"inpaint": "masked", "instruct": "source"}

# The number of images in memory at once when the items of conditions are read from data.
_CHUNK = 64


def parse_inputs(
  conditions: Mapping[str, Condition],
  texts: Mapping[str, Sequence[str]],
  count: int,
  *,
  only: bool = False,
) -> dict[str, np.ndarray]:
  """Parse the texts of conditions, and return their items [count, ...] by name.

  Args:
    conditions: the model's conditions by name.
    texts: a list of texts for each condition, by name. If a list has fewer texts than there are samples, it is
      repeated.
    count: the number of samples.
    only: whether to omit conditions without text. If False, these conditions get their defaults.

  Raises:
    ValueError: if `texts` names a condition that the model lacks, a text is invalid, or a list is empty or has more
      texts than there are samples. If `only` is False, also if a condition has neither text nor a default and is not
      computed from data.
  """
  inputs: dict[str, np.ndarray] = {}
  for name, words in texts.items():
    condition = conditions.get(name)
    if condition is None:
      names, near = ", ".join(conditions) or "none", difflib.get_close_matches(name, list(conditions), 1)
      advice = "Leave it out, or set --classifier=<run folder>." if name == "classes" else "Leave it out."
      hint = f"Did you mean {near[0]!r}?" if near else advice
      raise ValueError(
        f"Got {name} {','.join(words)} for a model that was trained without {name}; expected a condition of the"
        f" model ({names}). {hint}"
      )
    if condition.parse is None:
      raise ValueError(
        f"Got --given {name}=..., a condition without a text form; expected one that text can express. {_advice(name, condition)}"
      )
    if len(words) > count:
      raise ValueError(f"Got {len(words)} values of {name} for {count} samples; expected at most {count}.")
    items = [_parse_text(condition.parse, name, word) for word in words]
    if not items:
      raise ValueError(f"Got no value of {name}; expected one or more.")
    values = np.stack([np.asarray(items[index % len(items)]) for index in range(count)])
    inputs[name] = values.astype(np.int32) if values.dtype.kind in "iu" else values
  for name, condition in conditions.items():
    if name in inputs or only:
      continue
    if condition.default is not None:
      inputs[name] = condition.default(count)
    elif not condition.is_source_image:
      raise ValueError(
        f"Got no {name} for a model with the condition {name}; expected a value. {_advice(name, condition)}"
      )
  return inputs


def _parse_text(parse: Callable[[str], Any], name: str, text: str) -> Any:
  """Parse the text of an item.

  An error in `parse` becomes a ValueError that names the flag. Only a ValueError whose message starts with "Got " stays
  unchanged.
  """
  try:
    return parse(text)
  except Exception as error:
    if isinstance(error, ValueError) and str(error).startswith("Got "):
      raise
    raise ValueError(
      f"Got --given {name}={text}, which the condition cannot parse ({type(error).__name__}: {error}); expected text that its"
      " `parse` accepts."
    ) from error


def hosts_of(conditions: Mapping[str, Condition]) -> dict[str, data.Host]:
  """Return a dict from names of batch entries to the host functions of conditions.

  Each function has two names, such as "text" and "negative_text", because items to guide away from are converted too.
  """
  hosts = {name: condition.host for name, condition in conditions.items() if condition.host is not None}
  return hosts | {f"{NEGATIVE_PREFIX}{name}": host for name, host in hosts.items()}


def host_items(conditions: Mapping[str, Condition], batch: Mapping[str, Any]) -> dict[str, Any]:
  """Convert the items of a batch to the arrays that `Model.encode_conditions` takes (see `data.run_hosts`).

  Args:
    conditions: the model's conditions by name.
    batch: items [B, ...] by name, such as {"text": ["a red fox", "a bear"]}.

  Raises:
    ValueError: if a host function rejects its items, or returns anything but arrays of numbers.
  """
  hosts = hosts_of(conditions)
  items = {name: np.asarray(value) if name in hosts else value for name, value in batch.items()}
  return data.run_hosts(hosts, items)


def condition_flag(name: str) -> str:
  """Return the command-line flag that sets a condition."""
  return {"classes": "--classes", "text": "--prompt"}.get(name, f"--given {name}")


def condition_example(name: str) -> str:
  """Return an example of the command-line flag that sets a condition."""
  return f'{condition_flag(name)}="a red fox"' if name == "text" else f"{condition_flag(name)}=3"


def edit_task(name: str, condition: Condition) -> str | None:
  """Return the task of --mode=edit that computes a condition from the images to edit, or None."""
  if "image" not in jax.tree.leaves(condition.kind):
    return None
  tasks = {own: task for task, own in IMAGES_OF_TASKS.items()}
  return tasks.get(name, "superres" if condition.is_source_image else None)


def _advice(name: str, condition: Condition) -> str:
  """Return a sentence of an error message that says how the user can set a condition."""
  task = edit_task(name, condition)
  if task is not None:
    return f"Use --mode=edit --task={task}, which computes it from images."
  if condition.parse is None:
    return "Sample in Python, with its items in the batch of Model.encode_conditions."
  return f"Set {condition_flag(name)}=<value>."


def inputs_from_data(conditions: Mapping[str, Condition], batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Return the items of conditions by name, from a batch of real data with images in [-1, 1]."""
  return {
    name: np.asarray(batch[name] if condition.from_data is None or name in batch else condition.from_data(batch))
    for name, condition in conditions.items()
  }


def default_inputs(
  conditions: Mapping[str, Condition], count: int, source: data.Source, counts: np.ndarray | None = None
) -> dict[str, np.ndarray]:
  """Return items [count, ...] of all conditions by name, for use where the user gives no items.

  If every condition has a `default` and none is computed from data, the items are these defaults, such as each class in
  turn. Otherwise the items come from real data, except that conditions whose `is_known` is True get their defaults.
  An example is the sizes of Stable Diffusion XL.

  Args:
    conditions: the conditions by name.
    count: the number of samples.
    source: the real data.
    counts: the number of real samples of each class. If set, the default classes have the same proportions.
  """
  if any(condition.from_data is not None or condition.default is None for condition in conditions.values()):
    chosen = np.resize(np.random.default_rng(0).permutation(len(source)), count)
    known = {name: one.default for name, one in conditions.items() if one.is_known and one.default is not None}
    real = _read_inputs({name: one for name, one in conditions.items() if name not in known}, source, chosen)
    return real | {name: default(count) for name, default in known.items()}
  inputs = parse_inputs(conditions, {}, count)
  if counts is not None and "classes" in inputs:
    inputs["classes"] = data.proportional_classes(counts, count)
  return inputs


def _read_inputs(
  conditions: Mapping[str, Condition], source: data.Source, indices: np.ndarray
) -> dict[str, np.ndarray]:
  """Return the items of conditions [B, ...] by name, from the data at some indices [B].

  If the source knows all items without reading images, no image is decoded. For example, folders know their captions
  and classes. Otherwise the images are read in chunks, because thousands of images may not fit into memory.
  """
  has_pixels = any(condition.from_data is not None for condition in conditions.values())
  if not has_pixels:
    found = {name: _known_items(source, name, indices) for name in conditions}
    known = {name: items for name, items in found.items() if items is not None}
    if known.keys() == conditions.keys():
      return known
  chunks = []
  for first in range(0, len(indices), _CHUNK):
    batch = data.read(source, indices[first : first + _CHUNK])
    chunks.append(
      inputs_from_data(conditions, batch | ({"image": images.as_floats(batch["image"])} if has_pixels else {}))
    )
  return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in conditions}


def _known_items(source: data.Source, name: str, indices: np.ndarray) -> np.ndarray | None:
  """Return the classes or texts of a source at some indices, without reading images.

  Return None if the source must read images to find the items, or if the items are neither classes nor texts.
  """
  if name == "classes":
    classes = getattr(source, "classes", None)
    return None if classes is None else np.asarray(classes, np.int32)[indices]
  if not data.is_text(data.read(source, indices[:1]).get(name, np.zeros(()))):
    return None
  texts = data.known_texts(source, name, indices)
  if texts is None:
    return None
  # An empty text may stand for a broken caption, which the source replaces or refuses when the item is read.
  items = zip(texts, indices, strict=True)
  return np.array([text or str(data.read(source, [index])[name][0]) for text, index in items])
