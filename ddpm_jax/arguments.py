"""Check the arguments of public functions against their annotations.

An argument of a wrong type gives one clear message instead of an error inside the function.
"""

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

# An example of each of the library's named tuples, for error messages.
_EXAMPLES = {
  "AdaptiveTimes": "losses.importance(process)",
  "Fields": "data.Fields(classes='group')",
  "Fit": "data.Fit((32, 32), channels=3)",
  "Objective": "losses.denoising(apply, process, prediction)",
  "Prediction": "predictions.EPS",
  "Process": "processes.vp()",
  "Sampler": "sampling.ddim(process)",
}


def check_types(function: F) -> F:
  """Make a function raise a ValueError if an argument does not match its annotation.

  The check distinguishes named tuples (such as `Process`), functions, arrays, numbers and strings. Other annotations
  accept every value. A NumPy array or a number also matches the annotation of an array. A scalar array, traced or not,
  also matches the annotation of a number.
  """
  signature = inspect.signature(function)
  annotations = {name: parameter.annotation for name, parameter in signature.parameters.items()}

  @functools.wraps(function)
  def call(*arguments, **options):
    try:
      arguments_by_name = signature.bind(*arguments, **options).arguments
    except TypeError:
      return function(*arguments, **options)  # raises Python's own error with the function's name
    for name, value in arguments_by_name.items():
      kind = annotations[name]
      if not _matches(value, kind):
        raise ValueError(
          f"Got {_describe_value(value)} as {name} of {_name(function)}; expected {_describe_type(kind, name)}."
          f"{_hint(value, kind, function)}"
        )
    return function(*arguments, **options)

  return typing.cast(F, call)


def _matches(value: Any, kind: Any) -> bool:
  if isinstance(kind, types.UnionType):
    return any(_matches(value, one) for one in typing.get_args(kind))
  if kind is None or kind is types.NoneType:
    return value is None
  if _is_function(kind):
    # A named tuple such as `Sampler` contains functions but is not callable.
    return callable(value)
  if kind is jax.Array:
    # Accept numbers too. A function that needs an array with axes checks its shape.
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


def _describe_value(value: Any) -> str:
  if inspect.isroutine(value):
    return f"the function {_name(value)}"
  if isinstance(value, str) or (isinstance(value, (int, float)) and np.ndim(value) == 0) or value is None:
    return repr(value)
  if hasattr(value, "shape"):
    return f"an array of shape {tuple(value.shape)}"
  return f"a {type(value).__name__}"


def _describe_type(kind: Any, name: str) -> str:
  if isinstance(kind, types.UnionType):
    return " or ".join(_describe_type(one, name) for one in typing.get_args(kind))
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
    return f" If you passed {_name(function)} itself as an argument, call it first: {_name(function)}(...)."
  return ""


def _name(function: Any) -> str:
  """Return a function's public name.

  The name of a function of ddpm_jax starts with its package, as in `sampling.heun`, if the package exports the
  function. Otherwise it starts with its module.
  """
  module, name = getattr(function, "__module__", None) or "", function.__qualname__
  if not module.startswith("ddpm_jax."):
    return function.__name__
  package = module.split(".")[1]
  exported = hasattr(sys.modules[f"ddpm_jax.{package}"], name)
  return f"{package if exported else module.removeprefix('ddpm_jax.')}.{name}"
