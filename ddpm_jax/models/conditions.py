"""Define conditions, the inputs of a model other than noisy data and time.

A `Condition` holds all functions that training and sampling need for one input. The items of a condition are its raw
values, which come from a data source or the user. `host` converts items that are not arrays, such as texts, to arrays.
`encode` converts arrays to the values that a network receives. A condition has the same name in data sources, in
batches and in the dict `given` of encoded values. If a network has an argument with this name, this argument receives
the condition. Otherwise the argument named after the condition's kind receives it.
"""

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
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

# Networks embed standard deviations in [0, 1] like times, so scale them to the range of time inputs.
_LEVEL_SCALE = 1000.0
# The number folded into a sample's key for its conditions. 0 to 2 are for its time, its noise and its dropout masks.
_FOLD = 3


class Condition(NamedTuple):
  """Describe one input of a model other than noisy data and time.

  Attributes:
    kind: how the network receives the condition: "classes" (an integer, embedded), "vector" (added to the time
      embedding), "level" (a number, embedded like the time), "image" (concatenated with x) or "tokens" (for attention).
      Tokens are either one array of states (the outputs of an encoder), or a dict with two keys: "mask", and "states"
      or "ids" (token ids). For a condition of several parts, `kind` is a pytree of these strings, a tree prefix of
      `shape`.
    shape: the shapes and types of one sample, a pytree of `jax.ShapeDtypeStruct`.
    encode: `encode(frozen, keys, batch, train) -> values [B, ...]`. The values are a pytree with the structure of
      `shape`. `keys` has a key for each sample [B]. `batch` is a dict of arrays [B, ...] by name: the items of a data
      source in training, the user's items in sampling. The batch has an entry with the condition's name. If `host` is
      set, this entry is the result of `host`.
    null: `null(frozen) -> value of one sample`, the value that means "no condition". None if both branches of guidance
      receive the same value.
    dropout: the share of samples in which the condition gets its null value in training. Classifier-free guidance needs
      a share above 0.
    num_values: for the kind "classes", the number of values, including the null value.
    vocabulary: for the kind "tokens" with token ids, the number of ids. 0 for tokens without ids.
    parse: `parse(text) -> item`, for text from the command line. None if text cannot express an item.
    default: `default(count) -> items [count, ...]`, used if the user gives no items of this condition. None if the
      items must come from the user or the data.
    from_data: `from_data(batch) -> items`, which computes the items from the other entries [B, ...] of the batch, such
      as the images. None if the batch must contain the items.
    framing: whether `from_data` reads the entry `data.FRAMING` of the batch. If True, data sources add this entry. It
      describes how each image was cropped and resized.
    check: `check(source, items)` raises a ValueError if items [N, ...] of a data source are invalid. None accepts all
      items.
    show: `show(item) -> str` returns the text of an item in reports.
    load: `load() -> frozen` reads the frozen parameters from their source. None if the condition has none.
    host: `host(items) -> arrays` converts items [B], such as texts (a NumPy array of strings), to an array [B, ...] or
      a dict of arrays, without JAX. A tokenizer is an example. Several threads or worker processes call `host` at the
      same time, so it must have no state, and cloudpickle must be able to pickle it. None if items are arrays of
      numbers.
    weighted: `weighted(texts) -> condition` returns a condition that reads long texts to their end and accepts weights
      in texts, such as (word:1.3) (see `data.prompts`). `texts` must hold all texts of a command, because the values of
      all texts get the same shape. None if the condition supports no weights.
    unread: `unread(texts) -> ends` returns, for each text, the end that is not read because it does not fit, or "" if
      the text fits. None if every item fits.
  """

  kind: PyTree
  shape: PyTree
  encode: Callable[[PyTree, Array, Mapping[str, Array], bool], PyTree]
  null: Callable[[PyTree], PyTree] | None = None
  dropout: float = 0.0
  num_values: int = 0
  vocabulary: int = 0
  parse: Callable[[str], Any] | None = None
  default: Callable[[int], np.ndarray] | None = None
  from_data: Callable[[Mapping[str, Array]], Array] | None = None
  framing: bool = False
  check: data.Check | None = None
  show: Callable[[Any], str] = str
  load: Callable[[], PyTree] | None = None
  host: data.Host | None = None
  weighted: Callable[[Sequence[str]], "Condition"] | None = None
  unread: Callable[[Sequence[str]], list[str]] | None = None

  @property
  def num_choices(self) -> int:
    """Return the number of classes, without the null value.

    The number is 0 for kinds other than "classes".
    """
    return self.num_values - (self.num_values > 0 and self.null is not None)

  @property
  def is_source_image(self) -> bool:
    """Return whether the condition is an image computed from the data, such as a small image to enlarge."""
    return self.from_data is not None and self.parse is None

  @property
  def is_known(self) -> bool:
    """Return whether the condition has values even if neither the user nor the data source has items of it.

    An example is the sizes of Stable Diffusion XL.
    """
    return self.from_data is not None and self.default is not None


def classes(name: str, number: int, dropout: float = 0.0) -> Condition:
  """Return the condition of integer classes from 0 to `number - 1`.

  With dropout, the network has one more class: the integer `number` is the null value.

  Args:
    name: the condition's name.
    number: the number of classes.
    dropout: the share of samples trained without their class, in [0, 1) (Ho and Salimans 2022, algorithm 1).

  Raises:
    ValueError: if `number` is below 1, or `dropout` is outside [0, 1).
  """
  if number < 1:
    raise ValueError(f"Got number={number} of {name}; expected 1 or more classes.")
  check_dropout(dropout, name)
  example = "--classes=0" if name == "classes" else f"--given {name}=0"

  def parse(text: str) -> int:
    # Check the length first: Python refuses to convert thousands of digits.
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
  x_shape: tuple[int, ...] | None = None,
) -> Condition:
  """Return the condition of a small image for a model that enlarges it (SR3, Saharia et al. 2021).

  The small image is resized by interpolation to the sides of x, and then noise is added (Ho et al. 2022, section 4.2).
  The noise hides the fine detail of the interpolation more than the content of the small image. Training computes the
  small image from the data, unless the batch contains it already.

  Args:
    name: the condition's name.
    data_shape: the shape [H, W, C] of the data.
    factor: the ratio of the data's sides to the small image's sides.
    noise: the maximum standard deviation of the noise in training, in [0, 1]. Each sample has a random standard
      deviation, and the network receives it. 0 adds no noise.
    sample_noise: the standard deviation of the noise in sampling, in [0, noise].
    method: the interpolation, "bicubic" or "bilinear".
    x_shape: the shape of x if it differs from the data's shape, as in a model of latents. None for the data's shape.

  Raises:
    ValueError: if the factor is below 2 or does not divide the sides of the data, the noise is out of range, or the
      method is unknown.
  """
  if method not in ("bicubic", "bilinear"):
    raise ValueError(f"Got method={method!r} of {name}; expected 'bicubic' or 'bilinear'.")
  if factor < 2 or any(side % factor for side in data_shape[:-1]):
    raise ValueError(
      f"Got factor={factor} of {name} for data of {'x'.join(map(str, data_shape[:-1]))}; expected a divisor of both sides, 2 or more."
    )
  if not 0 <= sample_noise <= noise <= 1:
    raise ValueError(
      f"Got noise={noise} and sample_noise={sample_noise} of {name}; expected 0 <= sample_noise <= noise <= 1."
    )
  shrink = editing.downsample(factor)

  def from_data(batch):
    return shrink(batch["image"])

  small = (*(side // factor for side in data_shape[:-1]), data_shape[-1])
  shape = (*(x_shape or data_shape)[:-1], data_shape[-1])

  def encode(frozen, keys, batch, train):
    low = jnp.asarray(batch[name])
    if low.shape[1:] != small:
      raise ValueError(
        f"Got {name} of shape {low.shape}; expected [B, {', '.join(map(str, small))}], with sides {factor} times smaller than the"
        " data's sides. Resize the images first."
      )
    image = jax.image.resize(low, (low.shape[0], *shape), method)
    if not noise:
      return {"image": image}
    std = noise * randomness.uniform(randomness.fold_in(keys, 1), image.shape[:1]) if train else sample_noise
    std = jnp.broadcast_to(jnp.asarray(std, image.dtype), image.shape[:1])
    eps = randomness.normal(randomness.fold_in(keys, 2), image.shape, image.dtype)
    return {"image": image + expand(std, image) * eps, "level": _LEVEL_SCALE * std}

  image = {"image": jax.ShapeDtypeStruct(shape, jnp.float32)}
  level = {"level": jax.ShapeDtypeStruct((), jnp.float32)} if noise else {}
  return Condition({key: key for key in image | level}, image | level, encode, from_data=from_data)


def image(name: str, shape: tuple[int, ...], dropout: float = 0.0) -> Condition:
  """Return the condition of an image that is concatenated with x, such as a sketch or a mask.

  With dropout, the null value is zeros. If the image has two spatial axes, the command line accepts the path of an
  image file, and scales the pixels to [-1, 1].

  Args:
    name: the condition's name.
    shape: the shape [*space, C'] of the image, where `space` are the sides of x.
    dropout: the share of samples trained without the image, in [0, 1).

  Raises:
    ValueError: if `shape` has fewer than two axes or contains a number below 1, or `dropout` is outside [0, 1).
  """
  shape = tuple(shape)
  if len(shape) < 2 or min(shape) < 1:
    raise ValueError(
      f"Got shape={shape} of {name}; expected the shape [*space, channels] of an image, such as (32, 32, 1)."
    )
  check_dropout(dropout, name)

  def parse(text: str) -> np.ndarray:
    flag = f"--given {name}"
    loaded = data.read_inputs(user_path(text, f"{flag}="), (shape[0], shape[1]), shape[2], flag=flag).images
    if len(loaded) != 1:
      raise ValueError(f"Got {flag}={text} with {len(loaded)} images; expected one. Repeat the flag for more images.")
    return images.as_floats(loaded[0])

  return Condition(
    kind="image",
    shape=jax.ShapeDtypeStruct(shape, jnp.float32),
    encode=lambda frozen, keys, batch, train: batch[name],
    null=(lambda frozen: jnp.zeros(shape)) if dropout else None,
    dropout=dropout,
    parse=parse if len(shape) == 3 else None,
  )


def level(name: str) -> Condition:
  """Return the condition of one number that the network embeds like the time.

  So the number must be in the range of the time input.
  """

  def parse(text: str) -> float:
    return float(_numbers(name, text, 1)[0])

  return Condition(
    kind="level",
    shape=jax.ShapeDtypeStruct((), jnp.float32),
    encode=lambda frozen, keys, batch, train: batch[name],
    parse=parse,
  )


def vector(name: str, size: int, dropout: float = 0.0) -> Condition:
  """Return the condition of a vector of `size` numbers.

  With dropout, the null value is zeros. `dropout` is the share of samples trained without the vector.

  Raises:
    ValueError: if `size` is below 1, or `dropout` is outside [0, 1).
  """
  if size < 1:
    raise ValueError(f"Got size={size} of {name}; expected an integer of 1 or more.")
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
  expected = "one finite number" if count == 1 else f"{count} finite numbers separated by commas"
  try:
    values = np.array([float(word) for word in text.split(",")], np.float32)
  except ValueError as error:
    raise ValueError(f"Got {name} {text!r}; expected {expected}.") from error
  if values.size != count or not np.isfinite(values).all():
    raise ValueError(f"Got {name} {text!r} with {values.size} numbers; expected {expected}.")
  return values


def check_dropout(dropout: float, name: str) -> None:
  """Raise a ValueError unless the dropout rate of a condition is in [0, 1)."""
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
  """Encode the conditions of a batch, and return their values by name.

  In training, a condition that has dropout gets its null value in a random share of the samples. The random numbers of
  a condition depend only on its name and the keys, not on the other conditions.

  Args:
    conditions: the conditions by name.
    frozen: the frozen parameters by name, for each condition that has any.
    keys: A key for each sample [B], or one key.
    batch: arrays [B, ...] by name.
    train: whether the values are for training. If True, conditions are dropped at random, and the noise of small images
      has a random standard deviation.

  Raises:
    ValueError: if the batch lacks a condition that cannot be computed from the data, or a condition has the wrong
      shape.
  """
  given = {}
  for name, condition in conditions.items():
    # Fold in the name, so that adding a condition does not change the random numbers of the others.
    condition_keys = randomness.fold_in(randomness.fold_in(keys, _FOLD), zlib.crc32(name.encode()) & 0x7FFFFFFF)
    if name not in batch and condition.from_data is None:
      raise ValueError(
        f"Got a batch with {', '.join(sorted(batch)) or 'no entries'} for a model with the condition {name!r}; expected {name!r} in the batch."
      )
    items = batch if name in batch else {**batch, name: _from_data(condition, batch)}
    _check_numbers(name, items[name])
    value = _check_values(name, condition, condition.encode(frozen.get(name), condition_keys, items, train))
    if train and condition.dropout:
      assert condition.null is not None
      value = _drop_randomly(
        value, condition.null(frozen.get(name)), randomness.fold_in(condition_keys, 0), condition.dropout
      )
    given[name] = value
  check_given(conditions, given)
  return given


def _from_data(condition: Condition, batch: Mapping[str, Array]) -> Array:
  assert condition.from_data is not None
  return condition.from_data(batch)


def _check_numbers(name: str, items: Any) -> None:
  """Raise a ValueError if items are still texts because the caller did not convert them with `Condition.host`."""
  if any(
    isinstance(leaf, str | np.ndarray) and np.asarray(leaf).dtype.kind in "OSTU" for leaf in jax.tree.leaves(items)
  ):
    raise ValueError(
      f"Got text in the item {name!r}; expected arrays of numbers. Convert the text with models.inputs.host_items(model.conditions, batch)."
    )


def _check_values(name: str, condition: Condition, value: PyTree) -> PyTree:
  """Check a condition's values, and return them as arrays.

  Integers are converted to the type in `condition.shape`, because the values may have a smaller type that cannot
  represent the null value.
  """
  check_given({name: condition}, {name: value})

  def convert(leaf, like):
    leaf = jnp.asarray(leaf)
    return leaf.astype(like.dtype) if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf

  return jax.tree.map(convert, value, condition.shape)


def _drop_randomly(value: PyTree, null: PyTree, keys: Array, share: float) -> PyTree:
  """Replace a random share of values [B, ...] by the null value."""
  count = jax.tree.leaves(value)[0].shape[0]
  is_dropped = randomness.uniform(keys, (count,)) < share

  def replace(leaf, null_leaf):
    return jnp.where(expand(is_dropped, leaf), jnp.asarray(null_leaf).astype(leaf.dtype)[None], leaf)

  return jax.tree.map(replace, value, null)


def drop(
  conditions: Mapping[str, Condition],
  frozen: Mapping[str, PyTree],
  given: Mapping[str, PyTree],
  names: Collection[str] | None = None,
) -> dict[str, PyTree]:
  """Return `given` with conditions replaced by their null values, for the unconditional branch of guidance.

  Args:
    conditions: the conditions by name.
    frozen: the frozen parameters by name, for each condition that has any.
    given: the values of the conditions by name.
    names: the conditions to drop, for guidance with a separate scale for each condition. None drops every condition
      that has a null value.

  Raises:
    ValueError: if no condition has a null value, if one of `names` is unknown or has no null value, or if `given` does
      not match the conditions.
  """
  check_given(conditions, given)
  for name in names or ():
    _check_name(conditions, name)
  dropped = [
    name for name, condition in conditions.items() if (condition.null is not None if names is None else name in names)
  ]
  if not dropped or any(conditions[name].null is None for name in dropped):
    raise ValueError(
      "Got a model that was trained without dropout of a condition, so guidance has no unconditional branch; expected a model"
      " trained with dropout, such as --config.model.conditions.classes.dropout=0.1 (see the recipe digits_cond). Train such a"
      " model, or leave the guidance scale at 1."
    )
  result = dict(given)
  for name in dropped:
    null = conditions[name].null
    assert null is not None
    result[name] = jax.tree.map(
      lambda leaf, value: jnp.broadcast_to(jnp.asarray(value), jnp.shape(leaf)).astype(jnp.asarray(leaf).dtype),
      given[name],
      null(frozen.get(name)),
    )
  return result


def null_values(conditions: Mapping[str, Condition], frozen: Mapping[str, PyTree], count: int) -> dict[str, PyTree]:
  """Return the null values [count, ...] of conditions by name.

  Each condition must have a null value.
  """

  def repeat(like, value):
    return jnp.broadcast_to(jnp.asarray(value, like.dtype), (count, *like.shape))

  values = {}
  for name, condition in conditions.items():
    assert condition.null is not None
    values[name] = jax.tree.map(repeat, condition.shape, condition.null(frozen.get(name)))
  return values


def check_given(conditions: Mapping[str, Condition], given: Mapping[str, PyTree], *, any_length: bool = False) -> None:
  """Check that `given` has a value of the right structure and shape for each condition, and no other entries.

  Args:
    conditions: the conditions by name.
    given: the values of the conditions by name.
    any_length: whether conditions of the kind "tokens" may have any number of tokens.

  Raises:
    ValueError: if an entry is missing or unknown, or has the wrong structure, shape or number of samples.
  """
  for name in given:
    _check_name(conditions, name)
  missing = [name for name in conditions if name not in given]
  if missing:
    raise ValueError(
      f"Got no {', '.join(missing)} for a model with the conditions {', '.join(conditions)}; expected a value for each. Pass given={{{missing[0]!r}: ...}}."
    )
  sizes = {}
  for name, condition in conditions.items():
    expected, actual = (str(jax.tree.structure(tree)) for tree in (condition.shape, given[name]))
    if expected != actual:
      raise ValueError(
        f"Got {name} of the structure {actual}; expected {expected}. Use the values that model.encode_conditions returns."
      )
    kinds = jax.tree.map(lambda kind, part: jax.tree.map(lambda _: kind, part), condition.kind, condition.shape)
    rows = zip(*map(jax.tree.leaves, (kinds, condition.shape, given[name])), strict=True)
    for kind, like, leaf in rows:
      shape, first = jnp.shape(leaf), 2 if any_length and kind == "tokens" else 1
      if len(shape) != 1 + len(like.shape) or shape[first:] != tuple(like.shape)[first - 1 :]:
        expected_shape = ", ".join(map(str, ("B", "L", *like.shape[1:]) if first == 2 else ("B", *like.shape)))
        raise ValueError(f"Got {name} of shape {shape}; expected [{expected_shape}], one value for each sample.")
      sizes[name] = shape[0]
  if len(set(sizes.values())) > 1:
    raise ValueError(f"Got conditions of {sizes} samples; expected the same number for each condition.")


def _check_name(conditions: Mapping[str, Condition], name: str) -> None:
  if name in conditions:
    return
  if not conditions:
    raise ValueError(f"Got the condition {name!r} for a model without conditions; expected none. Leave it out.")
  names = " or ".join(map(repr, conditions))
  raise ValueError(f"Got the condition {name!r}; expected {names}.{hint(name, conditions)}")


def example(conditions: Mapping[str, Condition]) -> dict[str, PyTree]:
  """Return zeros [1, ...] for each condition by name, to initialize a network."""
  return {
    name: jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape), leaf.dtype), condition.shape)
    for name, condition in conditions.items()
  }
