"""Arguments checked by the annotations of public functions, so that a wrong kind is one message and not an error from inside."""

import collections.abc
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

F = TypeVar("F", bound=Callable[..., Any])

# Of the library's nouns, what to give.
_EXAMPLES = {
  "AdaptiveTimes": "losses.importance(process)",
  "Fit": "data.Fit((32, 32), channels=3)",
  "Objective": "losses.denoising(apply, process, prediction)",
  "Prediction": "predictions.EPS",
  "Process": "processes.vp()",
  "Sampler": "sampling.ddim(process)",
}


def check_types(function: F) -> F:
  """Let a function raise a ValueError where an argument is not of the kind that its annotation names.

  Nouns (named tuples such as `Process`), functions, arrays, numbers and strings are told apart; other annotations allow everything. An
  array may be NumPy's, and a number may be an array without axes, traced or not.
  """
  signature = inspect.signature(function)
  kinds = {name: parameter.annotation for name, parameter in signature.parameters.items()}

  @functools.wraps(function)
  def call(*arguments, **options):
    try:
      given = signature.bind(*arguments, **options).arguments
    except TypeError:
      return function(*arguments, **options)  # Python's own error, which names the function
    for name, value in given.items():
      if not _is(value, kinds[name]):
        raise ValueError(
          f"Got {_described(value)} as {name} of {_name(function)}; expected {_wanted(kinds[name], name)}.{_hint(value, kinds[name], function)}"
        )
    return function(*arguments, **options)

  return typing.cast(F, call)


def _is(value: Any, kind: Any) -> bool:
  if isinstance(kind, types.UnionType):
    return any(_is(value, one) for one in typing.get_args(kind))
  if kind is None or kind is types.NoneType:
    return value is None
  if _is_function(kind):
    # A noun is no function, though it holds some.
    return callable(value)
  if kind is jax.Array:
    # A number passes: functions that need axes say so.
    return hasattr(value, "dtype") or isinstance(value, (int, float))
  if kind in (int, float):
    return not isinstance(value, str) and not callable(value) and value is not None and np.ndim(value) == 0
  if kind is str or _is_noun(kind):
    return isinstance(value, kind)
  return True


def _is_function(kind: Any) -> bool:
  protocol = getattr(kind, "_is_protocol", False) and "__call__" in vars(kind)
  return protocol or typing.get_origin(kind) is collections.abc.Callable


def _is_noun(kind: Any) -> bool:
  return inspect.isclass(kind) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _described(value: Any) -> str:
  if inspect.isroutine(value):
    return f"the function {_name(value)}"
  if isinstance(value, str) or (isinstance(value, (int, float)) and np.ndim(value) == 0) or value is None:
    return repr(value)
  if hasattr(value, "shape"):
    return f"an array of shape {tuple(value.shape)}"
  return f"a {type(value).__name__}"


def _wanted(kind: Any, name: str) -> str:
  if isinstance(kind, types.UnionType):
    return " or ".join(_wanted(one, name) for one in typing.get_args(kind))
  if _is_function(kind):
    return "a function"
  if kind is jax.Array:
    return f"an array, such as jnp.asarray({name})"
  if _is_noun(kind):
    example = _EXAMPLES.get(kind.__name__)
    article = "an" if kind.__name__[0] in "AEIO" else "a"
    return f"{article} {kind.__name__}" + (f", such as {example}" if example else "")
  return {int: "a number", float: "a number", str: "a string"}.get(kind, "None")


def _hint(value: Any, kind: Any, function: Any) -> str:
  if inspect.isfunction(value) and value.__module__.startswith("ddpm_jax."):
    return f" Call {_name(value)}(...) and pass its result."
  if hasattr(value, "shape") and (kind in (int, float) or _is_noun(kind)):
    return f" If you passed {_name(function)} itself to a function, pass its result: {_name(function)}(...)."
  return ""


def _name(function: Any) -> str:
  """The name under which a user finds a function: that of its package, if it exports it."""
  module, name = getattr(function, "__module__", None) or "", function.__qualname__
  if not module.startswith("ddpm_jax."):
    return function.__name__
  package = module.split(".")[1]
  exported = hasattr(sys.modules[f"ddpm_jax.{package}"], name)
  return f"{package if exported else module.removeprefix('ddpm_jax.')}.{name}"
