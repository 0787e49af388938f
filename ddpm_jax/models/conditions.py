"""Conditions: what a model can be given beside noisy data, each a value with all that training and sampling do with it.

Conditions travel by name: the item of a data source, the batch, `given`, and what the network takes all use the same one.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import data, editing, randomness
from ddpm_jax.processes import expand

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
      arrays [B, ...] by name: what the data source gives in training, what the user asks for in sampling.
    null: `null(frozen) -> value of one sample` that stands for none; None for what both branches of guidance are given.
    dropout: the share of samples whose condition is hidden in training, which classifier-free guidance needs.
    number: of a condition of kind "classes": how many values it has, the one for none included.
    parse: `parse(text) -> item`, for what a user may ask for on the command line; None if that cannot be typed.
    default: `default(count) -> items [count, ...]` for samples of which nobody says what they are to show; None if somebody must.
    of_data: `of_data(batch) -> items` that stand in for it, made of data [B, ...] of the batch; None if `encode` needs its name in the batch.
    check: `check(source, items)` raises a ValueError if items [N, ...] of a data source are not allowed; None if all are.
    show: `show(item) -> str`, for reports.
    load: reads the frozen parameters from where they came from; None for a condition without any.
  """

  kind: PyTree
  shape: PyTree
  encode: Callable[[PyTree, Array, Mapping[str, Array], bool], PyTree]
  null: Callable[[PyTree], PyTree] | None = None
  dropout: float = 0.0
  number: int = 0
  parse: Callable[[str], Any] | None = None
  default: Callable[[int], np.ndarray] | None = None
  of_data: Callable[[Mapping[str, Array]], Array] | None = None
  check: data.Check | None = None
  show: Callable[[Any], str] = str
  load: Callable[[], PyTree] | None = None


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

  def parse(text: str) -> int:
    if not text.strip().isdigit() or int(text) >= number:
      raise ValueError(f"Got {name} {text!r}; expected integers from 0 to {number - 1}, such as --{name}=0.")
    return int(text)

  return Condition(
    kind="classes",
    shape=jax.ShapeDtypeStruct((), jnp.int32),
    encode=lambda frozen, keys, batch, train: batch[name],
    null=(lambda frozen: jnp.asarray(number, jnp.int32)) if dropout else None,
    dropout=dropout,
    number=number + (dropout > 0),
    parse=parse,
    default=lambda count: np.resize(np.arange(number, dtype=np.int32), count),
    check=data.labels_below(number, f"model.conditions.{name}.number"),
  )


def low_resolution(
  name: str, data_shape: tuple[int, ...], factor: int, noise: float = 0.0, sample_noise: float = 0.0
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

  Raises:
    ValueError: if the factor does not divide the sides of the data, or the noise is out of range.
  """
  if factor < 2 or any(side % factor for side in data_shape[:-1]):
    raise ValueError(
      f"Got factor={factor} of {name} for data of {'x'.join(map(str, data_shape[:-1]))}; expected a divisor of both sides above 1, such as 2."
    )
  if not 0 <= sample_noise <= noise <= 1:
    raise ValueError(
      f"Got noise={noise} and sample_noise={sample_noise} of {name}; expected 0 <= sample_noise <= noise <= 1."
    )
  shrink = editing.downsample(factor)

  def of_data(batch):
    return shrink(batch["image"])

  def encode(frozen, keys, batch, train):
    low = batch[name] if name in batch else of_data(batch)
    size = (low.shape[0], *(factor * side for side in low.shape[1:-1]), low.shape[-1])
    image = jax.image.resize(low, size, "bicubic")
    if not noise:
      return {"image": image}
    std = noise * jax.vmap(jax.random.uniform)(randomness.fold_in(keys, 1)) if train else sample_noise
    std = jnp.broadcast_to(jnp.asarray(std, image.dtype), image.shape[:1])
    eps = randomness.normal(randomness.fold_in(keys, 2), image.shape, image.dtype)
    return {"image": image + expand(std, image) * eps, "level": _LEVEL_SCALE * std}

  image = {"image": jax.ShapeDtypeStruct(data_shape, jnp.float32)}
  level = {"level": jax.ShapeDtypeStruct((), jnp.float32)} if noise else {}
  return Condition({key: key for key in image | level}, image | level, encode, of_data=of_data)


def vector(name: str, size: int, dropout: float = 0.0) -> Condition:
  """Return the condition of a vector of `size` numbers, for which zeros stand for none.

  Raises:
    ValueError: if the size is below 1, or the share of samples trained without it is outside [0, 1).
  """
  if size < 1:
    raise ValueError(f"Got size={size} of {name}; expected 1 or more numbers.")
  check_dropout(dropout, name)

  def parse(text: str) -> np.ndarray:
    try:
      values = np.array([float(word) for word in text.split(",")], np.float32)
    except ValueError as error:
      raise ValueError(f"Got {name} {text!r}; expected {size} numbers with commas between them.") from error
    if values.size != size:
      raise ValueError(f"Got {values.size} numbers of {name}; expected {size}.")
    return values

  return Condition(
    kind="vector",
    shape=jax.ShapeDtypeStruct((size,), jnp.float32),
    encode=lambda frozen, keys, batch, train: batch[name],
    null=(lambda frozen: jnp.zeros((size,))) if dropout else None,
    dropout=dropout,
    parse=parse,
  )


def check_dropout(dropout: float, name: str) -> None:
  """Raise a ValueError unless a share of hidden conditions is in [0, 1)."""
  if not 0 <= dropout < 1:
    raise ValueError(f"Got dropout={dropout} of {name}; expected a share in [0, 1), such as 0.1.")


def encode(
  conditions: Mapping[str, Condition], frozen: Mapping[str, PyTree], keys: Array, batch: Mapping[str, Array], *, train: bool
) -> dict[str, PyTree]:
  """Return what a network is given for a batch: each condition encoded and, in training, hidden from a share of the samples.

  Args:
    conditions: by name.
    frozen: their frozen parameters by name, of those that have any.
    keys: a key for each sample [B].
    batch: arrays [B, ...] by name.
    train: whether conditions are hidden and noised as in training.
  """
  given = {}
  for name, condition in conditions.items():
    # By the name, so that one more condition changes nothing in the others.
    own = randomness.fold_in(randomness.fold_in(keys, _FOLD), zlib.crc32(name.encode()) & 0x7FFFFFFF)
    value = condition.encode(frozen.get(name), own, batch, train)
    if train and condition.dropout:
      assert condition.null is not None
      hidden = jax.vmap(jax.random.bernoulli, (0, None))(randomness.fold_in(own, 0), condition.dropout)
      value = jax.tree.map(
        lambda leaf, none, hidden=hidden: jnp.where(expand(hidden, leaf), none.astype(leaf.dtype), leaf),
        value,
        condition.null(frozen.get(name)),
      )
    given[name] = value
  return given


def without(
  conditions: Mapping[str, Condition], frozen: Mapping[str, PyTree], given: Mapping[str, PyTree]
) -> dict[str, PyTree]:
  """Return `given` with each condition that can stand for none doing so: what classifier-free guidance guides away from.

  Raises:
    ValueError: if none of them can.
  """
  if all(condition.null is None for condition in conditions.values()):
    raise ValueError(
      "Got a model that was trained without dropout of a condition, so it has no unconditional half to guide away from; expected one trained"
      " with --config.model.conditions.classes.dropout=0.1 or so, as configs/digits_cond.py is. Or leave the guidance scale at 1."
    )
  result = dict(given)
  for name, condition in conditions.items():
    if condition.null is not None:
      result[name] = jax.tree.map(
        lambda leaf, none: jnp.broadcast_to(none, leaf.shape).astype(leaf.dtype),
        given[name],
        condition.null(frozen.get(name)),
      )
  return result


def example(conditions: Mapping[str, Condition]) -> dict[str, PyTree]:
  """Return a condition of one sample [1, ...] of zeros, for the shapes of a network's parameters."""
  return {
    name: jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape), leaf.dtype), condition.shape)
    for name, condition in conditions.items()
  }
