"""Apply equal blocks in one loop over their stacked parameters, which compiles much faster than separate blocks.

A network with such loops has an option `scan`, and a property `runs` that maps the name of each loop to the numbers of
its blocks. Without the option, block n has parameters of its own, named "block_n". With the option, the parameters of a
loop have the loop's name, and each array has an additional first axis for the blocks.
"""

import contextlib
import contextvars
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any

_change: contextvars.ContextVar[Callable[[str, PyTree], PyTree] | None] = contextvars.ContextVar("change", default=None)


def repeat(block: Any, name: str, count: int, in_axes: Any = nn.broadcast) -> Any:
  """Return a class of modules that apply a block `count` times, each time with its own parameters.

  Args:
    block: a class of modules. `block(...)(carry, *inputs)` returns the next carry and None.
    name: the name of the loop.
    count: the number of blocks.
    in_axes: the axis of each input that counts blocks, or `nn.broadcast` for an input that all blocks receive.
  """
  change = _change.get()
  if change is not None:
    block = nn.map_variables(block, "params", trans_in_fn=lambda values: {"params": change(name, values["params"])})
  return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=in_axes, length=count)


@contextlib.contextmanager
def changing(change: Callable[[str, PyTree], PyTree]) -> Iterator[None]:
  """Apply `change(name, params)` to the parameters of each block just before the block uses them.

  This affects the loops of networks that are traced in this context. `name` is the name of the loop. Samplers use it
  to gather the parameters from several devices, so that a device holds only one full block at a time. In training, this
  would not save memory: the loop would store the full parameters for the backward pass.
  """
  token = _change.set(change)
  try:
    yield
  finally:
    _change.reset(token)


def names(network: Any) -> Collection[str]:
  """Return the names of the loops of a network: none if it has no option `scan`, or `scan` is off."""
  return tuple(network.runs) if getattr(network, "scan", False) and hasattr(network, "runs") else ()


def stack(network: Any, params: Mapping[str, PyTree], mesh_put: Callable[[Array], Array] = lambda leaf: leaf) -> PyTree:
  """Convert the parameters of a network with `scan=False` for the same network with `scan=True`.

  Args:
    network: the network, with any value of `scan`.
    params: the parameters.
    mesh_put: a function that places a stacked array on devices.
  """
  numbers = {number: name for name, blocks in network.runs.items() for number in blocks}
  stacked = {name: value for name, value in params.items() if _number(name) not in numbers}
  for name, blocks in network.runs.items():
    parts = [params[f"block_{number}"] for number in blocks]
    stacked[name] = jax.tree.map(lambda *leaves: mesh_put(jnp.stack(leaves)), *parts)
  return stacked


def unstack(network: Any, params: Mapping[str, PyTree]) -> PyTree:
  """Convert the parameters of a network with `scan=True` for `scan=False`. This is the inverse of `stack`."""
  separate = {name: value for name, value in params.items() if name not in network.runs}
  for name, blocks in network.runs.items():
    for index, number in enumerate(blocks):
      separate[f"block_{number}"] = jax.tree.map(lambda leaf, i=index: leaf[i], params[name])
  return separate


def _number(name: str) -> int:
  start, _, number = name.partition("_")
  return int(number) if start == "block" and number.isdigit() else -1
