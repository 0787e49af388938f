"""Networks of any library as two functions, `init` and `apply`, that take the conditions of a model by name."""

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax import networks
from ddpm_jax.models.conditions import Condition

Array = jax.Array
PyTree = Any

KINDS = ("classes", "vector", "level", "image", "tokens")
# Under which name a network takes a kind, where that differs.
_ARGUMENTS = {"level": "vector"}


class Network(NamedTuple):
  """A network as pure functions.

  Attributes:
    init: `init(key, x, time, given) -> params` for x [B, ...], time [B] and the conditions by name.
    apply: `apply(params, x, time, given, *, train=False, keys=None) -> output` [B, ...]; `keys` are one a sample [B], for dropout.
    module: what the functions were made of, such as a `networks.UNet`; None if it does not matter to anybody.
  """

  init: Callable[[Array, Array, Array, Mapping[str, PyTree]], PyTree]
  apply: Callable[..., Array]
  module: Any = None

  def check(self, shape: tuple[int, ...]) -> None:
    """Raise a ValueError if the network cannot take x of this shape, as far as it can say so before it is traced."""
    check = getattr(self.module, "check_input", None)
    if check is not None:
      check(shape)


def of_linen(module: Any, conditions: Mapping[str, Condition]) -> Network:
  """Return the network of a Flax Linen module.

  Its `__call__` takes x, the time and, by keyword, its conditions: under the condition's own name if it has a parameter of that name, else by
  kind: `classes` [B], `vector` [B, D] or, of a level, [B], `image` [B, *space, C], several of which are joined. If it has parameters `train` and
  `keys`, it is told of training and gets a key for each sample; else dropout draws from the rng "dropout".
  """
  takes = _parameters(type(module).__call__)

  def init(key, x, time, given):
    return module.init(key, x, time, **arguments(conditions, given, takes))["params"]

  def apply(params, x, time, given, *, train=False, keys=None):
    options: dict[str, Any] = arguments(conditions, given, takes)
    if takes is None or "train" in takes:
      options["train"] = train
    if takes is None or "keys" in takes:
      options["keys"] = keys
    elif train and keys is not None:
      options["rngs"] = {"dropout": keys[0]}
    # Samplers are loops, in which gradients in x are slow on a CPU otherwise.
    looped = not train and jax.default_backend() == "cpu"
    with networks.gradients_in_loops() if looped else contextlib.nullcontext():
      return module.apply({"params": params}, x, time, **options)

  return Network(init, apply, module)


def arguments(
  conditions: Mapping[str, Condition], given: Mapping[str, PyTree], takes: frozenset[str] | None
) -> dict[str, Any]:
  """Return the arguments by which a network takes its conditions.

  Args:
    conditions: of the model, by name.
    given: their values, by name.
    takes: the names of the network's parameters; None if it takes any.

  Raises:
    ValueError: if the network takes no such condition.
  """
  values: dict[str, list[Any]] = {}
  for name, condition in conditions.items():
    if takes is not None and name in takes and name not in KINDS:
      values[name] = [given[name]]
      continue
    for kind, leaf in zip(jax.tree.leaves(condition.kind), jax.tree.leaves(given[name]), strict=True):
      argument = _ARGUMENTS.get(kind, kind)
      if takes is not None and argument not in takes:
        raise ValueError(
          f"Got the condition {name!r} of kind {kind!r} for a network that has no parameter {name!r} or {argument!r}; expected one of these in"
          " its __call__, or a model without the condition."
        )
      values.setdefault(argument, []).append(leaf)
  return {argument: _joined(argument, leaves) for argument, leaves in values.items()}


def _joined(argument: str, leaves: list[Any]) -> Any:
  if len(leaves) == 1:
    return leaves[0]
  if argument not in ("image", "vector", "tokens") or any(leaf.ndim < 2 for leaf in leaves):
    raise ValueError(
      f"Got {len(leaves)} conditions that a network takes as {argument!r}; expected one, or a network with parameters of the conditions'"
      " names."
    )
  return jnp.concatenate(leaves, axis=1 if argument == "tokens" else -1)


def _parameters(function: Any) -> frozenset[str] | None:
  """Return the names of a function's parameters, or None if it takes any keyword."""
  parameters = inspect.signature(function).parameters
  if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
    return None
  return frozenset(parameters) - {"self"}


def facts(
  conditions: Mapping[str, Condition], x_shape: tuple[int, ...], out_channels: int
) -> dict[str, Any]:
  """Return what a network of a model must be like, by the names of the parameters that networks have for it.

  These are `out_channels`, `dimensions` (spatial axes), `num_classes` (values of the classes, the one for none included; 0: none),
  `vector_embedding` ("time" for a level, "dense" for a vector, else ""), `shape` (of x) and `conditions`.
  """
  kinds = [kind for condition in conditions.values() for kind in jax.tree.leaves(condition.kind)]
  if "level" in kinds and "vector" in kinds:
    raise ValueError("Got conditions of the kinds 'level' and 'vector'; expected one of them: networks take one vector.")
  return {
    "out_channels": out_channels,
    "dimensions": len(x_shape) - 1,
    "num_classes": sum(condition.number for condition in conditions.values()),
    "vector_embedding": "time" if "level" in kinds else "dense" if "vector" in kinds else "",
    "shape": x_shape,
    "conditions": conditions,
  }


def of(component: Any, arguments: Mapping[str, Any], conditions: Mapping[str, Condition]) -> Network:
  return of_linen(component(**arguments), conditions)
