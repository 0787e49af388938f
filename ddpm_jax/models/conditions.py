"""Conditions: what a model can be given beside noisy data, each a value with all that training and sampling do with it.

Conditions travel by name: the item of a data source, the batch, `given`, and what the network takes all use the same one.
"""

import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import data, editing, randomness
from ddpm_jax.names import hint
from ddpm_jax.processes import expand
from ddpm_jax.storage import images
from ddpm_jax.storage.places import user_path

Array = jax.Array
PyTree = Any

# Standard deviations in [0, 1] are embedded as times are, whose labels go up to about this.
_LEVEL_SCALE = 1000.0
# What a sample's key is folded with for its conditions; 0 to 2 are its time, its noise and its dropout masks.
_FOLD = 3


class Condition(NamedTuple):
  """One thing that a model can be given.

  Attributes:
    kind: how the network takes it, a pytree like `shape`: "classes" (an integer, embedded), "vector" (joins the embedding of time), "level"
      (a number, embedded as time is), "image" (joins x) or "tokens" (attended to).
    shape: the shapes and types of one sample, a pytree of `jax.ShapeDtypeStruct`.
    encode: `encode(frozen, keys, batch, train) -> values [B, ...]`, like `shape`, with a key for each sample [B]. The batch is a dict of
      arrays [B, ...] by name: what the data source gives in training, what the user asks for in sampling. It holds the condition's name.
    null: `null(frozen) -> value of one sample` that stands for none; None for what both branches of guidance are given.
    dropout: the share of samples whose condition is hidden in training, which classifier-free guidance needs.
    num_values: of a condition of kind "classes": how many values it has, the one for none included.
    parse: `parse(text) -> item`, for what a user may ask for on the command line; None if that cannot be typed.
    default: `default(count) -> items [count, ...]` for samples of which nobody says what they are to show; None if somebody must.
    from_data: `from_data(batch) -> items` that stand in for it, made of data [B, ...] of the batch; None if `encode` needs its name in the batch.
    check: `check(source, items)` raises a ValueError if items [N, ...] of a data source are not allowed; None if all are.
    show: `show(item) -> str`, for reports.
    load: reads the frozen parameters from where they came from; None for a condition without any.
  """

  kind: PyTree
  shape: PyTree
  encode: Callable[[PyTree, Array, Mapping[str, Array], bool], PyTree]
  null: Callable[[PyTree], PyTree] | None = None
  dropout: float = 0.0
  num_values: int = 0
  parse: Callable[[str], Any] | None = None
  default: Callable[[int], np.ndarray] | None = None
  from_data: Callable[[Mapping[str, Array]], Array] | None = None
  check: data.Check | None = None
  show: Callable[[Any], str] = str
  load: Callable[[], PyTree] | None = None

  @property
  def num_choices(self) -> int:
    """How many values of a condition of kind "classes" somebody may ask for: all but the one for none; 0 of other kinds."""
    return self.num_values - (self.num_values > 0 and self.null is not None)

  @property
  def is_source_image(self) -> bool:
    """Whether it is an image that samples are made of, such as a small one to enlarge: made of the data, and never typed."""
    return self.from_data is not None and self.parse is None


def classes(name: str, number: int, dropout: float = 0.0) -> Condition:
  """Return the condition of integer classes from 0 to `number - 1`.

  With dropout a network has one more class, `number`, which stands for none.

  Args:
    name: of the condition.
    number: how many classes there are.
    dropout: the share of samples that are trained without their class, in [0, 1) (Ho and Salimans 2022, algorithm 1).

  Raises:
    ValueError: if there is no class, or the share is outside [0, 1).
  """
  if number < 1:
    raise ValueError(f"Got number={number} of {name}; expected 1 or more classes.")
  check_dropout(dropout, name)
  example = "--classes=0" if name == "classes" else f"--given {name}=0"

  def parse(text: str) -> int:
    # The length first: Python turns no text of thousands of digits into a number.
    digits = text.strip()
    if not digits.isdecimal() or len(digits) > 18 or int(digits) >= number:
      raise ValueError(f"Got {name} {text!r}; expected integers from 0 to {number - 1}, such as {example}.")
    return int(digits)

  return Condition(
    kind="classes",
    shape=jax.ShapeDtypeStruct((), jnp.int32),
    encode=lambda frozen, keys, batch, train: batch[name],
    null=(lambda frozen: jnp.asarray(number, jnp.int32)) if dropout else None,
    dropout=dropout,
    num_values=number + 1 if dropout else number,
    parse=parse,
    default=lambda count: np.resize(np.arange(number, dtype=np.int32), count),
    check=data.classes_below(number, f"model.conditions.{name}.number"),
  )


def low_resolution(
  name: str,
  data_shape: tuple[int, ...],
  factor: int,
  noise: float = 0.0,
  sample_noise: Annotated[float, "sampling"] = 0.0,
  method: str = "bicubic",
) -> Condition:
  """Return the condition of a smaller image, which the model enlarges (SR3, Saharia et al. 2021).

  The image is enlarged and noised (Ho et al. 2022, section 4.2): noise hides fine detail more than what the small image says. In training
  it is made of the data.

  Args:
    name: of the condition.
    data_shape: [H, W, C] of the data.
    factor: how many times smaller its sides are.
    noise: the largest standard deviation of the noise in training, in [0, 1]; the network is told how much there is.
    sample_noise: the standard deviation of the noise in sampling, in [0, noise].
    method: how it is enlarged: "bicubic" or "bilinear".

  Raises:
    ValueError: if the factor does not divide the sides of the data, the noise is out of range or there is no such method.
  """
  if method not in ("bicubic", "bilinear"):
    raise ValueError(f"Got method={method!r} of {name}; expected 'bicubic' or 'bilinear'.")
  if factor < 2 or any(side % factor for side in data_shape[:-1]):
    raise ValueError(
      f"Got factor={factor} of {name} for data of {'x'.join(map(str, data_shape[:-1]))}; expected a divisor of both sides above 1, such as 2."
    )
  if not 0 <= sample_noise <= noise <= 1:
    raise ValueError(
      f"Got noise={noise} and sample_noise={sample_noise} of {name}; expected 0 <= sample_noise <= noise <= 1."
    )
  shrink = editing.downsample(factor)

  def from_data(batch):
    return shrink(batch["image"])

  small = (*(side // factor for side in data_shape[:-1]), data_shape[-1])

  def encode(frozen, keys, batch, train):
    low = jnp.asarray(batch[name])
    if low.shape[1:] != small:
      raise ValueError(
        f"Got {name} of shape {low.shape}; expected {('B', *small)}, which becomes {factor} times as large."
      )
    image = jax.image.resize(low, (low.shape[0], *data_shape), method)
    if not noise:
      return {"image": image}
    std = noise * randomness.uniform(randomness.fold_in(keys, 1), image.shape[:1]) if train else sample_noise
    std = jnp.broadcast_to(jnp.asarray(std, image.dtype), image.shape[:1])
    eps = randomness.normal(randomness.fold_in(keys, 2), image.shape, image.dtype)
    return {"image": image + expand(std, image) * eps, "level": _LEVEL_SCALE * std}

  image = {"image": jax.ShapeDtypeStruct(data_shape, jnp.float32)}
  level = {"level": jax.ShapeDtypeStruct((), jnp.float32)} if noise else {}
  return Condition({key: key for key in image | level}, image | level, encode, from_data=from_data)


def image(name: str, shape: tuple[int, ...], dropout: float = 0.0) -> Condition:
  """Return the condition of an image that joins x, such as a sketch or a mask, for which zeros stand for none.

  On the command line it is the path of an image, which is scaled to [-1, 1].

  Args:
    name: of the condition.
    shape: [*space, C'], the space that of x.
    dropout: the share of samples that are trained without it, in [0, 1).

  Raises:
    ValueError: if a side is below 1, or the share is outside [0, 1).
  """
  shape = tuple(shape)
  if len(shape) < 2 or min(shape) < 1:
    raise ValueError(f"Got shape={shape} of {name}; expected [*space, channels] of an image, such as (32, 32, 1).")
  check_dropout(dropout, name)

  def parse(text: str) -> np.ndarray:
    flag = f"--given {name}"
    found = data.read_inputs(user_path(text, f"{flag}="), (shape[0], shape[1]), shape[2], flag=flag).images
    if len(found) != 1:
      raise ValueError(f"Got {flag}={text}, {len(found)} images; expected one. Repeat the flag for others.")
    return images.as_floats(found[0])

  return Condition(
    kind="image",
    shape=jax.ShapeDtypeStruct(shape, jnp.float32),
    encode=lambda frozen, keys, batch, train: batch[name],
    null=(lambda frozen: jnp.zeros(shape)) if dropout else None,
    dropout=dropout,
    parse=parse if len(shape) == 3 else None,
  )


def level(name: str) -> Condition:
  """Return the condition of one number, which the network embeds as it does the time, so in the range of its time input."""

  def parse(text: str) -> float:
    return float(_numbers(name, text, 1)[0])

  return Condition(
    kind="level",
    shape=jax.ShapeDtypeStruct((), jnp.float32),
    encode=lambda frozen, keys, batch, train: batch[name],
    parse=parse,
  )


def vector(name: str, size: int, dropout: float = 0.0) -> Condition:
  """Return the condition of a vector of `size` numbers, for which zeros stand for none.

  Raises:
    ValueError: if the size is below 1, or the share of samples trained without it is outside [0, 1).
  """
  if size < 1:
    raise ValueError(f"Got size={size} of {name}; expected 1 or more numbers.")
  check_dropout(dropout, name)

  return Condition(
    kind="vector",
    shape=jax.ShapeDtypeStruct((size,), jnp.float32),
    encode=lambda frozen, keys, batch, train: batch[name],
    null=(lambda frozen: jnp.zeros((size,))) if dropout else None,
    dropout=dropout,
    parse=lambda text: _numbers(name, text, size),
  )


def _numbers(name: str, text: str, count: int) -> np.ndarray:
  expected = "a number" if count == 1 else f"{count} numbers with commas between them"
  try:
    values = np.array([float(word) for word in text.split(",")], np.float32)
  except ValueError as error:
    raise ValueError(f"Got {name} {text!r}; expected {expected}.") from error
  if values.size != count or not np.isfinite(values).all():
    raise ValueError(f"Got {name} {text!r}, {values.size} numbers; expected {expected}, all finite.")
  return values


def check_dropout(dropout: float, name: str) -> None:
  """Raise a ValueError unless a share of hidden conditions is in [0, 1)."""
  if not 0 <= dropout < 1:
    raise ValueError(f"Got dropout={dropout} of {name}; expected a share in [0, 1), such as 0.1.")


def encode(
  conditions: Mapping[str, Condition],
  frozen: Mapping[str, PyTree],
  keys: Array,
  batch: Mapping[str, Array],
  *,
  train: bool,
) -> dict[str, PyTree]:
  """Return what a network is given for a batch: each condition encoded and, in training, hidden from a share of the samples.

  What one condition draws depends on its name and the keys alone, not on the other conditions.

  Args:
    conditions: by name.
    frozen: their frozen parameters by name, of those that have any.
    keys: a key for each sample [B], or one key.
    batch: arrays [B, ...] by name.
    train: whether conditions are hidden and noised as in training.

  Raises:
    ValueError: if the batch lacks a condition that is not made of data, or has one of another shape.
  """
  given = {}
  for name, condition in conditions.items():
    # By the name, so that one more condition changes nothing in the others.
    own = randomness.fold_in(randomness.fold_in(keys, _FOLD), zlib.crc32(name.encode()) & 0x7FFFFFFF)
    if name not in batch and condition.from_data is None:
      raise ValueError(
        f"Got a batch of {', '.join(sorted(batch)) or 'nothing'} for a model with the condition {name!r}; expected it in the batch."
      )
    items = batch if name in batch else {**batch, name: _from_data(condition, batch)}
    value = _checked(name, condition, condition.encode(frozen.get(name), own, items, train))
    if train and condition.dropout:
      assert condition.null is not None
      value = _hidden(value, condition.null(frozen.get(name)), randomness.fold_in(own, 0), condition.dropout)
    given[name] = value
  check_given(conditions, given)
  return given


def _from_data(condition: Condition, batch: Mapping[str, Array]) -> Array:
  assert condition.from_data is not None
  return condition.from_data(batch)


def _checked(name: str, condition: Condition, value: PyTree) -> PyTree:
  """Return a condition's values as arrays, integers in the type that the condition says, in which what stands for none fits."""
  check_given({name: condition}, {name: value})

  def convert(leaf, like):
    leaf = jnp.asarray(leaf)
    return leaf.astype(like.dtype) if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf

  return jax.tree.map(convert, value, condition.shape)


def _hidden(value: PyTree, null: PyTree, keys: Array, share: float) -> PyTree:
  """Return values [B, ...] with what stands for none in the place of a share of them."""
  count = jax.tree.leaves(value)[0].shape[0]
  hidden = randomness.uniform(keys, (count,)) < share

  def hide(leaf, none):
    return jnp.where(expand(hidden, leaf), jnp.asarray(none).astype(leaf.dtype)[None], leaf)

  return jax.tree.map(hide, value, null)


def drop(
  conditions: Mapping[str, Condition],
  frozen: Mapping[str, PyTree],
  given: Mapping[str, PyTree],
  names: Collection[str] | None = None,
) -> dict[str, PyTree]:
  """Return `given` with each condition that can stand for none doing so: what classifier-free guidance guides away from.

  Args:
    conditions: by name.
    frozen: their frozen parameters by name, of those that have any.
    given: their values by name.
    names: the conditions to take away, for a scale of its own for each; None for all that can stand for none.

  Raises:
    ValueError: if none of them can, or one of `names` cannot.
  """
  check_given(conditions, given)
  for name in names or ():
    _check_name(conditions, name)
  taken = [
    name for name, condition in conditions.items() if (condition.null is not None if names is None else name in names)
  ]
  if not taken or any(conditions[name].null is None for name in taken):
    raise ValueError(
      "Got a model that was trained without dropout of a condition, so it has no unconditional half to guide away from; expected one trained"
      " with --config.model.conditions.classes.dropout=0.1 or so, as the recipe digits_cond has it. Or leave the guidance scale at 1."
    )
  result = dict(given)
  for name in taken:
    null = conditions[name].null
    assert null is not None
    result[name] = jax.tree.map(
      lambda leaf, none: jnp.broadcast_to(jnp.asarray(none), jnp.shape(leaf)).astype(jnp.asarray(leaf).dtype),
      given[name],
      null(frozen.get(name)),
    )
  return result


def null_values(conditions: Mapping[str, Condition], frozen: Mapping[str, PyTree], count: int) -> dict[str, PyTree]:
  """Return what stands for none [count, ...] by the names of conditions that have it."""

  def repeated(like, value):
    return jnp.broadcast_to(jnp.asarray(value, like.dtype), (count, *like.shape))

  found = {}
  for name, condition in conditions.items():
    assert condition.null is not None
    found[name] = jax.tree.map(repeated, condition.shape, condition.null(frozen.get(name)))
  return found


def check_given(conditions: Mapping[str, Condition], given: Mapping[str, PyTree]) -> None:
  """Raise a ValueError unless `given` holds a value of the right structure and shape for each condition, and nothing else."""
  for name in given:
    _check_name(conditions, name)
  missing = [name for name in conditions if name not in given]
  if missing:
    raise ValueError(
      f"Got no {', '.join(missing)} for a model with the conditions {', '.join(conditions)}; expected each: given={{{missing[0]!r}: ...}}."
    )
  sizes = {}
  for name, condition in conditions.items():
    wanted, found = (str(jax.tree.structure(tree)) for tree in (condition.shape, given[name]))
    if wanted != found:
      raise ValueError(f"Got {name} of the structure {found}; expected {wanted}, as model.encode_conditions makes it.")
    for like, leaf in zip(jax.tree.leaves(condition.shape), jax.tree.leaves(given[name]), strict=True):
      if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[1:] != tuple(like.shape):
        shape = ", ".join(map(str, ("B", *like.shape)))
        raise ValueError(f"Got {name} of shape {jnp.shape(leaf)}; expected [{shape}], one for each sample.")
      sizes[name] = jnp.shape(leaf)[0]
  if len(set(sizes.values())) > 1:
    raise ValueError(f"Got conditions of {sizes} samples; expected the same number of each.")


def _check_name(conditions: Mapping[str, Condition], name: str) -> None:
  if name in conditions:
    return
  if not conditions:
    raise ValueError(f"Got the condition {name!r} for a model without conditions; leave it out.")
  known = " or ".join(map(repr, conditions))
  raise ValueError(f"Got the condition {name!r}; expected {known}.{hint(name, conditions)}")


def example(conditions: Mapping[str, Condition]) -> dict[str, PyTree]:
  """Return a condition of one sample [1, ...] of zeros, for the shapes of a network's parameters."""
  return {
    name: jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape), leaf.dtype), condition.shape)
    for name, condition in conditions.items()
  }
