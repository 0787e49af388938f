"""Pass the conditions of a model to the arguments of a network."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.models.conditions import Condition, check_given
from ddpm_jax.names import hint

PyTree = Any

_KINDS = ("classes", "vector", "level", "image", "tokens")
# The argument for a kind of condition if the network has no argument with the kind's name.
_FALLBACK_ARGUMENTS = {"level": "vector"}
# Arguments of a network's call that are not conditions.
_OPTIONS = ("train", "keys", "key")


def derived_arguments(
  conditions: Mapping[str, Condition], x_shape: tuple[int, ...], out_channels: int
) -> dict[str, Any]:
  """Return the arguments of a network that follow from its model, by name.

  - `out_channels`: the number of output channels.
  - `dimensions`: the number of spatial axes of x.
  - `num_classes`: the number of classes, including the null value; 0 for a model without classes.
  - `vector_embedding`: "time" if there is a level, "dense" if there is a vector, otherwise "".
  - `context_features`: the number of features of tokens; 0 for a model that has no tokens or only token ids.
  - `vocabulary`: the number of token ids that the network embeds; 0 for none.
  - `shape`: the shape of x.
  - `conditions`: the conditions by name.

  Raises:
    ValueError: if the conditions include both a level and a vector, or an image whose sides differ from the sides of x.
  """
  for name, condition in conditions.items():
    for kind, leaf in _values_by_kind(condition, condition.shape):
      if kind == "image" and tuple(leaf.shape[:-1]) != tuple(x_shape[:-1]):
        raise ValueError(
          f"Got the condition {name!r}, an image of shape {tuple(leaf.shape)}, for x of shape {tuple(x_shape)}; expected the"
          f" spatial shape {tuple(x_shape[:-1])}, because the image is concatenated with x. Set the image's shape, or leave model.codec out."
        )
  kinds = [kind for condition in conditions.values() for kind in jax.tree.leaves(condition.kind)]
  if "level" in kinds and "vector" in kinds:
    raise ValueError(
      "Got conditions of the kinds 'level' and 'vector'; expected one of them, because networks accept one vector. Leave one out."
    )
  return {
    "out_channels": out_channels,
    "dimensions": len(x_shape) - 1,
    "num_classes": sum(condition.num_values for condition in conditions.values()),
    "vector_embedding": "time" if "level" in kinds else "dense" if "vector" in kinds else "",
    "context_features": _context_features(conditions),
    "vocabulary": max((condition.vocabulary for condition in conditions.values()), default=0),
    "shape": x_shape,
    "conditions": conditions,
  }


def _context_features(conditions: Mapping[str, Condition]) -> int:
  """Return the number of features of the tokens, or 0 if there are no tokens or only token ids."""
  for condition in conditions.values():
    for kind, part in _values_by_kind(condition, condition.shape):
      leaf = part.get("states") if isinstance(part, Mapping) else part
      if kind == "tokens" and leaf is not None:
        return int(leaf.shape[-1])
  return 0


def keywords(
  conditions: Mapping[str, Condition], given: Mapping[str, PyTree], accepted: frozenset[str] | None
) -> dict[str, Any]:
  """Return the keyword arguments that pass conditions to a network.

  Args:
    conditions: the conditions of the model, by name.
    given: the values of the conditions, by name.
    accepted: the names of the network's arguments. None if it accepts any keyword.

  Raises:
    ValueError: if the network has no argument for a condition, if several conditions need the same argument and their
      values cannot be concatenated, or if `given` does not match the conditions.
  """
  # A network may get more tokens than its conditions were made with (see `Condition.weighted`).
  check_given(conditions, given, any_length=True)
  values: dict[str, list[Any]] = {}
  for name, condition in conditions.items():
    if _has_own_argument(name, accepted):
      values[name] = [given[name]]
      continue
    for kind, value in _values_by_kind(condition, given[name]):
      values.setdefault(_argument(name, kind, accepted), []).append(value)
  return {argument: _concatenate(argument, leaves) for argument, leaves in values.items()}


def _has_own_argument(name: str, accepted: frozenset[str] | None) -> bool:
  return accepted is not None and name in accepted and name not in (*_KINDS, *_OPTIONS)


def check_token_widths(conditions: Mapping[str, Condition], accepted: frozenset[str] | None) -> None:
  """Raise a ValueError if the tokens that a network joins have different numbers of features."""
  widths = [
    (name, int(part.shape[-1]))
    for name, condition in conditions.items()
    if not _has_own_argument(name, accepted)
    for kind, part in _values_by_kind(condition, condition.shape)
    if kind == "tokens" and not isinstance(part, Mapping)
  ]
  if len({width for _, width in widths}) > 1:
    described = ", ".join(f"{name} with {width} features" for name, width in widths)
    raise ValueError(
      f"Got conditions of tokens with different numbers of features ({described}); expected one number, because the network"
      " receives these tokens as one sequence. Use encoders of one width, or a network with a separate argument for each"
      " condition, named after it."
    )


def _values_by_kind(condition: Condition, values: PyTree) -> list[tuple[str, PyTree]]:
  """Return a pair (kind, value) for each kind of a condition.

  Each value is a leaf or a subtree of `values`.
  """
  pairs: list[tuple[str, PyTree]] = []
  # The tree of kinds has a leaf where the tree of values has a part.
  jax.tree.map(lambda kind, value: pairs.append((kind, value)), condition.kind, values)
  return pairs


def _argument(name: str, kind: str, accepted: frozenset[str] | None) -> str:
  fallback = _FALLBACK_ARGUMENTS.get(kind, kind)
  if accepted is None:
    return fallback
  matches = [argument for argument in (kind, fallback) if argument in accepted]
  if matches:
    return matches[0]
  near = hint(name, sorted(accepted - set(_OPTIONS)), "its argument {!r}".format)
  raise ValueError(
    f"Got the condition {name!r} of kind {kind!r} for a network that has no argument"
    f" {' or '.join(map(repr, dict.fromkeys((name, kind, fallback))))}; expected one of these in its __call__, or a model without the"
    f" condition.{near}"
  )


def _concatenate(argument: str, leaves: list[Any]) -> Any:
  if len(leaves) == 1:
    return leaves[0]
  if argument not in ("image", "vector", "tokens") or any(getattr(leaf, "ndim", 0) < 2 for leaf in leaves):
    raise ValueError(
      f"Got {len(leaves)} conditions that a network receives as {argument!r}; expected one condition, or a network with a"
      " separate argument for each condition, named after it."
    )
  return jnp.concatenate(leaves, axis=1 if argument == "tokens" else -1)
