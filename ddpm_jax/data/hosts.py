"""Run host functions, such as tokenizers, on the arrays of a batch before the batch is transferred to devices."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ddpm_jax.data.sources import is_text, to_array

# `host(items) -> arrays` turns items [B], such as texts, into an array [B, ...] or into a dict of such arrays. Several
# threads or worker processes call it at once, so it must have no state, and cloudpickle must be able to pickle it.
Host = Callable[[np.ndarray], Any]


def run_hosts(hosts: Mapping[str, Host], batch: Mapping[str, Any]) -> dict[str, Any]:
  """Run host functions on arrays of a batch, and return the batch with the results in place of these arrays.

  A host function runs on the CPU. It takes one array [B, ...] of the batch, such as texts, and returns an array of
  numbers [B, ...] or a dict of such arrays. Texts without a host function are left out, because devices hold only
  numbers.

  Args:
    hosts: a dict from the name of an array to its host function. Names that are not in the batch have no effect.
    batch: arrays [B, ...] by name, as `read` returns them.

  Raises:
    ValueError: if a host function returns anything but arrays of numbers [B, ...].
  """
  result = {}
  for name, items in batch.items():
    if name in hosts:
      result[name] = _as_arrays(name, hosts[name](items), len(items))
    elif not (isinstance(items, np.ndarray) and is_text(items)):
      result[name] = items
  return result


def _as_arrays(name: str, value: Any, count: int) -> Any:
  if isinstance(value, Mapping):
    return {key: _as_arrays(f"{name}.{key}", one, count) for key, one in value.items()}
  array = to_array(name, value)
  if is_text(array) or array.ndim == 0 or len(array) != count:
    kind = "text" if is_text(array) else array.dtype
    raise ValueError(
      f"Got {kind} of shape {array.shape} from the host function of {name!r} for {count} items; expected numbers"
      f" [{count}, ...], one entry for each item. Correct the function."
    )
  return array
