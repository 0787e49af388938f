"""Wrap networks of any library as two functions, `init` and `apply`, that accept the conditions of a model by name.

`from_component` wraps a user's function, or a user's class of one of three libraries: Flax Linen, Flax NNX and Equinox.
This module imports Flax NNX and Equinox only when they are needed.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import meta

from ddpm_jax.losses import Autoencoder
from ddpm_jax.models.conditions import Condition, check_given
from ddpm_jax.models.network_arguments import check_token_widths, keywords
from ddpm_jax.names import hint

Array = jax.Array
PyTree = Any
# Parameters by path, such as ("layers", "0", "kernel").
_Leaves = dict[tuple[str, ...], Any]


class Network(NamedTuple):
  """Hold a network as pure functions.

  Attributes:
    init: `init(key, x, time, given) -> params` for x [B, ...], time [B] and the conditions by name. Parameters are a
      pytree of float arrays.
    apply: `apply(params, x, time, given, *, train=False, keys=None) -> output` [B, ...]. `keys` has a dropout key for
      each sample [B].
    module: the module that the functions call, such as a `networks.UNet`, for callers that read its options. None for
      networks without such a module.
  """

  init: Callable[[Array, Array, Array, Mapping[str, PyTree]], PyTree]
  apply: Callable[..., Array]
  module: Any = None

  def check(self, shape: tuple[int, ...]) -> None:
    """Raise a ValueError if the module has a method `check_input` and this method rejects x of this shape."""
    check = getattr(self.module, "check_input", None)
    if check is not None:
      check(shape)


def from_component(component: Any, arguments: Mapping[str, Any], conditions: Mapping[str, Condition]) -> Network:
  """Return the network that a component defines.

  The component comes from a config or from a user's code.

  Args:
    component: A subclass of `flax.linen.Module` (see `from_linen`), `flax.nnx.Module` (see `from_nnx`) or
      `equinox.Module` (see `from_equinox`). A function that returns a `Network` is also accepted. If `arguments` is
      empty, a `Network` and an instance of a Linen module are accepted too.
    arguments: the arguments of the class or the function, by name.
    conditions: the conditions of the model, by name.

  Raises:
    ValueError: if the component has another type, or an argument is missing or not accepted.
  """
  linen = _is_class(type(component), "flax.linen")
  if isinstance(component, Network) or linen:
    if arguments:
      kind = type(component).__name__
      raise ValueError(
        f"Got a {kind} with the arguments {', '.join(arguments)}; expected no arguments, because it is an instance"
        " already, not a class. Leave them out."
      )
    return from_linen(component, conditions) if linen else component
  # Modules of the other libraries contain parameters, so `init` could not create new ones.
  if not callable(component) or _is_class(type(component), "flax.nnx") or _is_class(type(component), "equinox"):
    raise _unsupported(component)
  _check_arguments(component, arguments)
  if _is_class(component, "flax.linen"):
    return from_linen(component(**arguments), conditions)
  if _is_class(component, "flax.nnx"):
    return from_nnx(component, arguments, conditions)
  if _is_class(component, "equinox"):
    return from_equinox(component, arguments, conditions)
  network = component(**arguments)
  if not isinstance(network, Network):
    raise _unsupported(network, f"{_name(component)}(...), which returned ")
  return network


def from_linen(module: Any, conditions: Mapping[str, Condition]) -> Network:
  """Return the network of a Flax Linen module.

  Its `__call__` receives x [B, ...], the time [B] and, by keyword, the conditions. If `__call__` has an argument with
  the name of a condition, this argument receives the condition. Otherwise the argument named after the condition's kind
  receives it: `classes` [B], `vector` [B, D], `level` [B] (`vector` if there is no argument `level`),
  `image` [B, *space, C] or `tokens`, an array [B, L, C] or a dict of arrays. Several images, vectors or token arrays
  for one argument are concatenated.

  `__call__` may have two more arguments: `train`, which is True in training, and `keys`, a key for each sample. Without
  the argument `keys`, dropout uses the rng "dropout".

  Raises:
    ValueError: when `init` is called, if the module has variables other than parameters, such as the statistics of
      BatchNorm.
  """
  accepted = _accepted_arguments(type(module).__call__)
  check_token_widths(conditions, accepted)

  def init(key, x, time, given):
    options = keywords(conditions, given, accepted)
    if accepted is not None:
      options |= {name: value for name, value in (("train", False), ("keys", None)) if name in accepted}
    variables = module.init(key, x, time, **options)
    stateful = sorted(variables.keys() - {"params"})
    if stateful:
      raise _stateful(_name(type(module)), f"variables of {', '.join(stateful)}")
    # Remove the boxes that hold axis names: EMA and checkpoints need arrays.
    return meta.unbox(variables.get("params", {}))

  def apply(params, x, time, given, *, train=False, keys=None):
    options = keywords(conditions, given, accepted)
    if accepted is None or "train" in accepted:
      options["train"] = train
    if accepted is None or "keys" in accepted:
      options["keys"] = keys
    elif train and keys is not None:
      options["rngs"] = {"dropout": _first(keys)}
    return _with_kernels(module, train).apply({"params": params}, x, time, **options)

  return Network(init, apply, module)


def _with_kernels(module: Any, train: bool) -> Any:
  """Return the module with the fastest kernels for training or sampling on a CPU.

  Only networks of this package with `kernels="tuned"` change, and only if the platform is a CPU.
  """
  if getattr(module, "kernels", "") != "tuned" or jax.default_backend() != "cpu":
    return module
  # Samplers are loops. The other kernels compute gradients with respect to x slowly inside loops.
  kernels = "loop" if not train else "single_device" if jax.device_count() == 1 else "tuned"
  return module.clone(kernels=kernels)


def with_kernels(network: Network, conditions: Mapping[str, Condition], kernels: str) -> Network:
  """Return the network of a Linen module with other kernels.

  A network whose module has no option `kernels` is returned unchanged.

  Args:
    network: a network that `from_linen` returned.
    conditions: the conditions of the model, by name.
    kernels: see `networks.UNet`.
  """
  has_kernels = hasattr(network.module, "kernels") and hasattr(network.module, "clone")
  return from_linen(network.module.clone(kernels=kernels), conditions) if has_kernels else network


def autoencoder(network: Network, data_shape: tuple[int, ...] = ()) -> Autoencoder:
  """Return the parts of an autoencoder as pure functions.

  Args:
    network: a network that wraps a Linen module such as `networks.Autoencoder`. The module needs the methods `encode`,
      `decode_features` and `decode_output`. If its attribute `bottleneck` is "vq", it also needs `quantize`.
    data_shape: the shape of one sample of data, for an objective with a discriminator.

  Raises:
    ValueError: if the network has no such module.
  """
  module = network.module
  methods = ["encode", "decode_features", "decode_output"]
  if getattr(module, "bottleneck", "") == "vq":
    methods.append("quantize")
  missing = [name for name in methods if not hasattr(module, name)]
  if missing or not _is_class(type(module), "flax.linen"):
    raise ValueError(
      f"Got {'a network' if module is None else _name(type(module))} without {', '.join(missing or methods)} for an objective of"
      " autoencoders; expected a module with these methods. Set --config.model.network=networks.Autoencoder."
    )

  def method(name: str) -> Callable[[PyTree, Array], Any]:
    # These functions run in training and outside of loops, so gradients in loops do not matter.
    return lambda params, x: _with_kernels(module, train=True).apply({"params": params}, x, method=name)

  encode, decode_features, decode_output = map(method, methods[:3])
  quantize = method("quantize") if "quantize" in methods else None
  return Autoencoder(encode, decode_features, decode_output, quantize, tuple(data_shape), module)


def from_nnx(component: Any, arguments: Mapping[str, Any], conditions: Mapping[str, Condition]) -> Network:
  """Return the network of a Flax NNX class.

  The module is `component(**arguments, rngs=nnx.Rngs(key))`, without `rngs` if the class does not accept it. Its
  `__call__` receives the same arguments as a Linen module's (see `from_linen`). Parameters are the module's
  `nnx.Param` variables, as nested dicts by name. The module is set to `train()` in training and to `eval()` otherwise.
  In training, the module's streams of random numbers start from the first sample's key.

  Each trace creates the module with a fixed key and then sets its parameters. Compilers remove the unused initial
  values. Arrays of the module that are not variables become constants.

  Raises:
    ValueError: if the module has variables that are neither parameters nor random states, such as the statistics of
      BatchNorm.
  """
  from flax import nnx

  accepted = _accepted_arguments(component.__call__)

  def make(key):
    rngs = {"rngs": nnx.Rngs(key)} if _accepts(component, "rngs") else {}
    return component(**arguments, **rngs)

  def variables(module) -> list[tuple[tuple[str, ...], Any]]:
    nodes = [(tuple(map(str, path)), node) for path, node in nnx.iter_graph(module) if isinstance(node, nnx.Variable)]
    stateful = {type(node).__name__ for _, node in nodes if not isinstance(node, (nnx.Param, nnx.RngState))}
    if stateful:
      raise _stateful(_name(component), f"variables of {', '.join(sorted(stateful))}")
    return nodes

  def init(key, x, time, given):
    del x, time
    check_given(conditions, given, any_length=True)
    leaves = {path: node.get_value() for path, node in variables(make(key)) if isinstance(node, nnx.Param)}
    return _nested(_name(component), leaves)

  def call(params, x, time, options, keys, train):
    module, leaves, streams = make(jax.random.key(0)), traverse_util.flatten_dict(params), 0
    for path, node in variables(module):
      if isinstance(node, nnx.Param):
        node.set_value(_leaf(_name(component), leaves, path))
      elif isinstance(node, nnx.RngKey) and train:
        if keys is None:
          raise ValueError(
            f"Got train=True without keys for {_name(component)}, a module with random numbers; expected a key for each sample. Pass keys=..."
          )
        # Each stream needs its own key. Otherwise layers of the same shape would have the same masks.
        key, shape = jax.random.fold_in(_first(keys), streams), node.get_value().shape
        node.set_value(jax.random.split(key, shape) if shape else key)
        streams += 1
    (module.train if train else module.eval)()
    if accepted is None or "train" in accepted:
      options = {**options, "train": train}
    if accepted is None or "keys" in accepted:
      options = {**options, "keys": keys}
    return module(x, time, **options)

  jax.eval_shape(lambda key: {path: node.get_value() for path, node in variables(make(key))}, jax.random.key(0))
  return Network(init, _make_apply(call, conditions, accepted))


def from_equinox(component: Any, arguments: Mapping[str, Any], conditions: Mapping[str, Condition]) -> Network:
  """Return the network of an Equinox class.

  The module is `component(**arguments, key=key)`, without `key` if the class does not accept it. Its `__call__`
  receives one sample, as most Equinox modules do: x [*space, C], the time [], and the conditions of one sample by
  keyword (see `from_linen` for the names). This function vectorizes the call. If `__call__` has an argument `key`, this
  argument receives the sample's key in training and None otherwise. If `__call__` has an argument `train`, this
  argument is True in training and False otherwise. Parameters are the module's float arrays, as nested dicts by name.
  Other arrays are constants. For layers such as Dropout, this function calls `equinox.nn.inference_mode`, so these
  layers are active in training only.

  Each trace creates the module again, as in `from_nnx`.

  Raises:
    ValueError: if the module has state, such as BatchNorm.
  """
  import equinox

  accepted = _accepted_arguments(component.__call__)

  def make(key):
    return component(**arguments, **({"key": key} if _accepts(component, "key") else {}))

  def params_of(module) -> _Leaves:
    params = equinox.filter(module, equinox.is_inexact_array)
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {tuple(map(_part, path)): leaf for path, leaf in leaves}

  def init(key, x, time, given):
    del x, time
    check_given(conditions, given, any_length=True)
    return _nested(_name(component), params_of(make(key)))

  def call(params, x, time, options, keys, train):
    module, leaves = make(jax.random.key(0)), traverse_util.flatten_dict(params)
    old_params, static = equinox.partition(module, equinox.is_inexact_array)
    new_leaves = [_leaf(_name(component), leaves, path) for path in params_of(module)]
    module = equinox.combine(jax.tree.unflatten(jax.tree.structure(old_params), new_leaves), static)
    module = equinox.nn.inference_mode(module, value=not train)

    def call_one(x, time, options, key):
      options = dict(options)
      if accepted is None or "key" in accepted:
        options["key"] = key
      if accepted is None or "train" in accepted:
        options["train"] = train
      return module(x, time, **options)

    return jax.vmap(call_one)(x, time, options, keys if train else None)

  # Create the module with shapes in place of arrays. This finds invalid arguments, and a module's state.
  module = equinox.filter_eval_shape(make, jax.random.key(0))
  index = equinox.nn.StateIndex
  if any(isinstance(node, index) for node in jax.tree.leaves(module, is_leaf=lambda node: isinstance(node, index))):
    raise _stateful(_name(component), "an equinox.nn.State")
  return Network(init, _make_apply(call, conditions, accepted))


def _make_apply(
  call: Callable[..., Array], conditions: Mapping[str, Condition], accepted: frozenset[str] | None
) -> Callable[..., Array]:
  """Return the `apply` of a network from `call(params, x, time, options, keys, train)`.

  `call` creates a module and calls it.
  """
  check_token_widths(conditions, accepted)
  # Compile, so that a call outside jit does not compute unused initial values. Inline, so that programs contain no
  # call.
  compiled = jax.jit(call, static_argnames="train", inline=True)

  def apply(params, x, time, given, *, train=False, keys=None):
    return compiled(params, x, time, keywords(conditions, given, accepted), keys, train=train)

  return apply


def _accepted_arguments(function: Any) -> frozenset[str] | None:
  """Return the argument names of a network's call except x and the time, or None if it accepts any keyword."""
  parameters = list(inspect.signature(function).parameters.values())
  if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
    return None
  # Skip self, x and the time.
  return frozenset(parameter.name for parameter in parameters[3:])


def _first(keys: Array) -> Array:
  return keys[0] if keys.ndim else keys


def _part(key: Any) -> str:
  """Return the name of one step of a path in a pytree."""
  for name in ("name", "idx", "key"):
    if hasattr(key, name):
      return str(getattr(key, name))
  raise TypeError(f"Got {key!r} in the path of a pytree leaf; expected a field name, an index or a key.")


def _nested(name: str, leaves: _Leaves) -> PyTree:
  non_floats = sorted("/".join(path) for path, leaf in leaves.items() if not jnp.issubdtype(leaf.dtype, jnp.floating))
  if non_floats:
    raise ValueError(f"Got {name} with the non-float parameters {', '.join(non_floats)}; expected float arrays.")
  return traverse_util.unflatten_dict(leaves)


def _leaf(name: str, leaves: _Leaves, path: tuple[str, ...]) -> Array:
  if path not in leaves:
    raise ValueError(
      f"Got parameters without {'/'.join(path)} for {name}; expected all parameters that its init returns."
    )
  return leaves[path]


def _stateful(name: str, state: str) -> ValueError:
  return ValueError(
    f"Got {name} with {state}; expected only parameters, because a network is a pure function. Use normalization without"
    " running statistics, such as GroupNorm or LayerNorm."
  )


def _is_class(component: Any, library: str) -> bool:
  # If the class belongs to a library, that library has been imported.
  module = sys.modules.get(library)
  return inspect.isclass(component) and module is not None and issubclass(component, module.Module)


def _name(component: Any) -> str:
  return getattr(component, "__qualname__", type(component).__qualname__)


def _parameters(component: Any) -> Mapping[str, inspect.Parameter] | None:
  """Return the parameters of a function or a class's `__init__`, or None if it may accept any keyword."""
  # Inspect `__init__` rather than the class: the signature of an NNX class accepts any argument.
  has_init = inspect.isclass(component) and component.__init__ is not object.__init__
  try:
    parameters = list(inspect.signature(component.__init__ if has_init else component).parameters.values())[has_init:]
  except ValueError:  # a class that is not written in Python
    return None
  if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
    return None
  return {parameter.name: parameter for parameter in parameters}


def _accepts(component: Any, parameter: str) -> bool:
  parameters = _parameters(component)
  return parameters is None or parameter in parameters


def _check_arguments(component: Any, arguments: Mapping[str, Any]) -> None:
  parameters = _parameters(component)
  if parameters is None:
    return
  names = [name for name in parameters if name not in ("rngs", "key", "parent", "name")]
  for name in arguments:
    if name not in names:
      expected = ", ".join(names) or "no argument"
      raise ValueError(f"Got {name} for {_name(component)}; expected {expected}.{hint(name, names, str)}")
  required = [name for name in names if parameters[name].default is inspect.Parameter.empty and name not in arguments]
  if required:
    raise ValueError(f"Got no {', '.join(required)} for {_name(component)}; expected a value for each.")


def _unsupported(component: Any, origin: str = "") -> ValueError:
  return ValueError(
    f"Got {origin}{_describe(component)} as a network; expected a class of flax.linen.Module, flax.nnx.Module or equinox.Module, a function that"
    " returns a models.Network, or a models.Network."
  )


def _describe(value: Any) -> str:
  return repr(value) if isinstance(value, (str, int, float)) or value is None else f"a {type(value).__name__}"
