"""Networks of any library as two functions, `init` and `apply`, that take the conditions of a model by name.

`from_component` makes one of what a user names: a class of Flax Linen, Flax NNX or Equinox, or a function. Each library is imported where it is used.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import meta

from ddpm_jax.models.conditions import Condition, check_given
from ddpm_jax.names import hint

Array = jax.Array
PyTree = Any
# Parameters by their path, such as ("layers", "0", "kernel").
_Leaves = dict[tuple[str, ...], Any]

KINDS = ("classes", "vector", "level", "image", "tokens")
# Under which name a network takes a kind, where it has no parameter of the kind's own name.
_ARGUMENTS = {"level": "vector"}
# Of a network's call: no conditions.
_OPTIONS = ("train", "keys", "key")


class Network(NamedTuple):
  """A network as pure functions.

  Attributes:
    init: `init(key, x, time, given) -> params` for x [B, ...], time [B] and the conditions by name; a pytree of arrays of floats.
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


def from_component(component: Any, arguments: Mapping[str, Any], conditions: Mapping[str, Condition]) -> Network:
  """Return the network that a component of a config or of a user stands for.

  Args:
    component: a class of `flax.linen.Module` (see `from_linen`), `flax.nnx.Module` (`from_nnx`) or `equinox.Module` (`from_equinox`), a function
      that returns a `Network`; or a `Network` or a Linen module, which are made already and take no arguments.
    arguments: of the class or the function, by name.
    conditions: of the model, by name.

  Raises:
    ValueError: if the component is none of these, or has no parameter of an argument's name.
  """
  linen = _is_class(type(component), "flax.linen")
  if isinstance(component, Network) or linen:
    if arguments:
      kind = type(component).__name__
      raise ValueError(f"Got a {kind} with the arguments {', '.join(arguments)}; expected none: it is made already.")
    return from_linen(component, conditions) if linen else component
  # Modules of the other libraries hold parameters, and each init makes new ones.
  if not callable(component) or _is_class(type(component), "flax.nnx") or _is_class(type(component), "equinox"):
    raise _unknown(component)
  _check_arguments(component, arguments)
  if _is_class(component, "flax.linen"):
    return from_linen(component(**arguments), conditions)
  if _is_class(component, "flax.nnx"):
    return from_nnx(component, arguments, conditions)
  if _is_class(component, "equinox"):
    return from_equinox(component, arguments, conditions)
  made = component(**arguments)
  if not isinstance(made, Network):
    raise _unknown(made, f"{_name(component)}(...), which gave ")
  return made


def from_linen(module: Any, conditions: Mapping[str, Condition]) -> Network:
  """Return the network of a Flax Linen module.

  Its `__call__` takes x [B, ...], the time [B] and, by keyword, its conditions: under the condition's own name if it has a parameter of that
  name, else by kind: `classes` [B], `vector` [B, D], `level` [B] (or as `vector`), `image` [B, *space, C], several of which are joined. If it
  has parameters `train` and `keys`, it is told of training and gets a key for each sample; else dropout draws from the rng "dropout".

  Raises:
    ValueError: from `init`, if the module has variables other than parameters, such as the statistics of BatchNorm.
  """
  takes = _takes(type(module).__call__)

  def init(key, x, time, given):
    options = keywords(conditions, given, takes)
    if takes is not None:
      options |= {name: value for name, value in (("train", False), ("keys", None)) if name in takes}
    variables = module.init(key, x, time, **options)
    others = sorted(variables.keys() - {"params"})
    if others:
      raise _stateful(_name(type(module)), f"variables of {', '.join(others)}")
    # Without their boxes of names for axes: arrays are what is averaged and saved.
    return meta.unbox(variables.get("params", {}))

  def apply(params, x, time, given, *, train=False, keys=None):
    options = keywords(conditions, given, takes)
    if takes is None or "train" in takes:
      options["train"] = train
    if takes is None or "keys" in takes:
      options["keys"] = keys
    elif train and keys is not None:
      options["rngs"] = {"dropout": _first(keys)}
    return _for_use(module, train).apply({"params": params}, x, time, **options)

  return Network(init, apply, module)


def _for_use(module: Any, train: bool) -> Any:
  """Return one of our networks with the kernels that suit its use on a CPU, unless its own are chosen; any other as it is."""
  if getattr(module, "kernels", "") != "tuned" or jax.default_backend() != "cpu":
    return module
  # Samplers are loops, in which gradients in x are slow otherwise.
  kernels = "loop" if not train else "single_device" if jax.device_count() == 1 else "tuned"
  return module.clone(kernels=kernels)


def from_nnx(component: Any, arguments: Mapping[str, Any], conditions: Mapping[str, Condition]) -> Network:
  """Return the network of a Flax NNX class, `component(**arguments, rngs=nnx.Rngs(key))`.

  Its `__call__` takes what that of a Linen module does (see `from_linen`). Parameters are its `nnx.Param`, as dicts by name. In training it
  is set to `train()`, else to `eval()`, and its streams of random numbers start from the first of the keys.

  Each trace makes the module anew, by a fixed key, and puts the parameters in: compilers drop what is not used of that. So arrays of the
  module that are no variables are constants.

  Raises:
    ValueError: if the module has variables that are neither parameters nor random, such as the statistics of BatchNorm.
  """
  from flax import nnx

  takes = _takes(component.__call__)

  def make(key):
    rngs = {"rngs": nnx.Rngs(key)} if _has(component, "rngs") else {}
    return component(**arguments, **rngs)

  def variables(module) -> list[tuple[tuple[str, ...], Any]]:
    found = [(tuple(map(str, path)), node) for path, node in nnx.iter_graph(module) if isinstance(node, nnx.Variable)]
    others = {type(node).__name__ for _, node in found if not isinstance(node, (nnx.Param, nnx.RngState))}
    if others:
      raise _stateful(_name(component), f"variables of {', '.join(sorted(others))}")
    return found

  def init(key, x, time, given):
    del x, time
    check_given(conditions, given)
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
            f"Got train=True without keys for {_name(component)}, which draws random numbers; pass keys=."
          )
        # One of its own for each stream: layers of the same shape would have the same masks.
        own, shape = jax.random.fold_in(_first(keys), streams), node.get_value().shape
        node.set_value(jax.random.split(own, shape) if shape else own)
        streams += 1
    (module.train if train else module.eval)()
    if takes is None or "train" in takes:
      options = {**options, "train": train}
    if takes is None or "keys" in takes:
      options = {**options, "keys": keys}
    return module(x, time, **options)

  jax.eval_shape(lambda key: {path: node.get_value() for path, node in variables(make(key))}, jax.random.key(0))
  return Network(init, _applied(call, conditions, takes))


def from_equinox(component: Any, arguments: Mapping[str, Any], conditions: Mapping[str, Condition]) -> Network:
  """Return the network of an Equinox class, `component(**arguments, key=key)`.

  As everywhere in Equinox its `__call__` takes one sample, x [*space, C] and the time [], and its conditions by keyword as `from_linen` says, each
  of one sample; it is vectorized here. If it takes `key`, it gets the sample's own in training. Parameters are its arrays of floats, as dicts
  by name; other arrays are constants. Layers such as Dropout are told by `equinox.nn.inference_mode`.

  Each trace makes the module anew, as in `from_nnx`.

  Raises:
    ValueError: if the module has state, such as that of BatchNorm.
  """
  import equinox

  takes = _takes(component.__call__)

  def make(key):
    return component(**arguments, **({"key": key} if _has(component, "key") else {}))

  def params_of(module) -> _Leaves:
    params = equinox.filter(module, equinox.is_inexact_array)
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {tuple(map(_part, path)): leaf for path, leaf in leaves}

  def init(key, x, time, given):
    del x, time
    check_given(conditions, given)
    return _nested(_name(component), params_of(make(key)))

  def call(params, x, time, options, keys, train):
    module, leaves = make(jax.random.key(0)), traverse_util.flatten_dict(params)
    old, rest = equinox.partition(module, equinox.is_inexact_array)
    new = [_leaf(_name(component), leaves, path) for path in params_of(module)]
    module = equinox.combine(jax.tree.unflatten(jax.tree.structure(old), new), rest)
    module = equinox.nn.inference_mode(module, value=not train)

    def one(x, time, options, key):
      options = dict(options)
      if takes is None or "key" in takes:
        options["key"] = key
      if takes is None or "train" in takes:
        options["train"] = train
      return module(x, time, **options)

    return jax.vmap(one)(x, time, options, keys if train else None)

  # With the statics in place of arrays: where a module keeps state, and whether it can be made of these arguments.
  module = equinox.filter_eval_shape(make, jax.random.key(0))
  index = equinox.nn.StateIndex
  if any(isinstance(node, index) for node in jax.tree.leaves(module, is_leaf=lambda node: isinstance(node, index))):
    raise _stateful(_name(component), "an equinox.nn.State")
  return Network(init, _applied(call, conditions, takes))


def _applied(
  call: Callable[..., Array], conditions: Mapping[str, Condition], takes: frozenset[str] | None
) -> Callable[..., Array]:
  """Return `apply` of `call(params, x, time, options, keys, train)`, which makes a module and calls it."""
  # Compiled, so that a call outside of any program does not compute what it drops; inlined, so that it is no call inside of one.
  compiled = jax.jit(call, static_argnames="train", inline=True)

  def apply(params, x, time, given, *, train=False, keys=None):
    return compiled(params, x, time, keywords(conditions, given, takes), keys, train=train)

  return apply


def keywords(
  conditions: Mapping[str, Condition], given: Mapping[str, PyTree], takes: frozenset[str] | None
) -> dict[str, Any]:
  """Return the arguments by which a network takes its conditions.

  Args:
    conditions: of the model, by name.
    given: their values, by name.
    takes: the names of the network's parameters; None if it takes any.

  Raises:
    ValueError: if the network takes no such condition, or `given` does not fit the conditions.
  """
  check_given(conditions, given)
  values: dict[str, list[Any]] = {}
  for name, condition in conditions.items():
    if takes is not None and name in takes and name not in (*KINDS, *_OPTIONS):
      values[name] = [given[name]]
      continue
    for kind, leaf in zip(jax.tree.leaves(condition.kind), jax.tree.leaves(given[name]), strict=True):
      values.setdefault(_argument(name, kind, takes), []).append(leaf)
  return {argument: _joined(argument, leaves) for argument, leaves in values.items()}


def _argument(name: str, kind: str, takes: frozenset[str] | None) -> str:
  other = _ARGUMENTS.get(kind, kind)
  if takes is None:
    return other
  found = [argument for argument in (kind, other) if argument in takes]
  if found:
    return found[0]
  near = hint(name, sorted(takes - set(_OPTIONS)), "its parameter {!r}".format)
  raise ValueError(
    f"Got the condition {name!r} of kind {kind!r} for a network that has no parameter {' or '.join(map(repr, dict.fromkeys((name, kind, other))))};"
    f" expected one of these in its __call__, or a model without the condition.{near}"
  )


def _joined(argument: str, leaves: list[Any]) -> Any:
  if len(leaves) == 1:
    return leaves[0]
  if argument not in ("image", "vector", "tokens") or any(leaf.ndim < 2 for leaf in leaves):
    raise ValueError(
      f"Got {len(leaves)} conditions that a network takes as {argument!r}; expected one, or a network with parameters of the conditions'"
      " names."
    )
  return jnp.concatenate(leaves, axis=1 if argument == "tokens" else -1)


def _takes(function: Any) -> frozenset[str] | None:
  """Return the names of the parameters of a network's call but for x and the time, or None if it takes any keyword."""
  parameters = list(inspect.signature(function).parameters.values())
  if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
    return None
  # self, x and the time.
  return frozenset(parameter.name for parameter in parameters[3:])


def _first(keys: Array) -> Array:
  return keys[0] if keys.ndim else keys


def _part(key: Any) -> str:
  """Return what one step of a path in a pytree is called."""
  for name in ("name", "idx", "key"):
    if hasattr(key, name):
      return str(getattr(key, name))
  raise TypeError(f"Got the step {key!r} of a path; expected the name of a field, an index or a key.")


def _nested(name: str, leaves: _Leaves) -> PyTree:
  integers = sorted("/".join(path) for path, leaf in leaves.items() if not jnp.issubdtype(leaf.dtype, jnp.floating))
  if integers:
    raise ValueError(
      f"Got {name} with the parameters {', '.join(integers)} that are no floats; expected arrays of floats."
    )
  return traverse_util.unflatten_dict(leaves)


def _leaf(name: str, leaves: _Leaves, path: tuple[str, ...]) -> Array:
  if path not in leaves:
    raise ValueError(f"Got parameters without {'/'.join(path)} for {name}; expected those that its init makes.")
  return leaves[path]


def _stateful(name: str, what: str) -> ValueError:
  return ValueError(
    f"Got {name} with {what}; expected parameters alone: a network is a pure function of them. Use normalization without statistics, such as"
    " GroupNorm or LayerNorm."
  )


def _is_class(component: Any, library: str) -> bool:
  # Whoever wrote a class of a library has imported it.
  module = sys.modules.get(library)
  return inspect.isclass(component) and module is not None and issubclass(component, module.Module)


def _name(component: Any) -> str:
  return getattr(component, "__qualname__", type(component).__qualname__)


def _parameters(component: Any) -> Mapping[str, inspect.Parameter] | None:
  """Return the parameters of a function or of the making of a class, or None if it takes any keyword."""
  # Not those of the class as it is called: NNX lets it take anything.
  own = inspect.isclass(component) and component.__init__ is not object.__init__
  try:
    found = list(inspect.signature(component.__init__ if own else component).parameters.values())[own:]
  except ValueError:  # of a class that is not written in Python
    return None
  if any(parameter.kind is parameter.VAR_KEYWORD for parameter in found):
    return None
  return {parameter.name: parameter for parameter in found}


def _has(component: Any, parameter: str) -> bool:
  parameters = _parameters(component)
  return parameters is None or parameter in parameters


def _check_arguments(component: Any, arguments: Mapping[str, Any]) -> None:
  parameters = _parameters(component)
  if parameters is None:
    return
  known = [name for name in parameters if name not in ("rngs", "key", "parent", "name")]
  for name in arguments:
    if name not in known:
      expected = ", ".join(known) or "no argument"
      raise ValueError(f"Got {name} for {_name(component)}; expected {expected}.{hint(name, known, str)}")
  required = [name for name in known if parameters[name].default is inspect.Parameter.empty and name not in arguments]
  if required:
    raise ValueError(f"Got no {', '.join(required)} for {_name(component)}; expected a value of each.")


def _unknown(component: Any, origin: str = "") -> ValueError:
  return ValueError(
    f"Got {origin}{_described(component)} as a network; expected a class of flax.linen.Module, flax.nnx.Module or equinox.Module, a function that"
    " returns a models.Network, or a models.Network."
  )


def _described(value: Any) -> str:
  return repr(value) if isinstance(value, (str, int, float)) or value is None else f"a {type(value).__name__}"


def derived_arguments(
  conditions: Mapping[str, Condition], x_shape: tuple[int, ...], out_channels: int
) -> dict[str, Any]:
  """Return what a network of a model must be like, by the names of the parameters that networks have for it.

  These are `out_channels`, `dimensions` (spatial axes), `num_classes` (values of the classes, the one for none included; 0: none),
  `vector_embedding` ("time" for a level, "dense" for a vector, else ""), `shape` (of x) and `conditions`.

  Raises:
    ValueError: if there are a level and a vector, of which networks take one, or an image is not of the space of x.
  """
  for name, condition in conditions.items():
    for kind, leaf in zip(jax.tree.leaves(condition.kind), jax.tree.leaves(condition.shape), strict=True):
      if kind == "image" and tuple(leaf.shape[:-1]) != tuple(x_shape[:-1]):
        raise ValueError(
          f"Got the condition {name!r}, an image of shape {tuple(leaf.shape)}, for x of shape {tuple(x_shape)}; expected an image of the space"
          f" {tuple(x_shape[:-1])}, since it joins x. Set its shape, or leave model.codec out."
        )
  kinds = [kind for condition in conditions.values() for kind in jax.tree.leaves(condition.kind)]
  if "level" in kinds and "vector" in kinds:
    raise ValueError(
      "Got conditions of the kinds 'level' and 'vector'; expected one of them: networks take one vector."
    )
  return {
    "out_channels": out_channels,
    "dimensions": len(x_shape) - 1,
    "num_classes": sum(condition.num_values for condition in conditions.values()),
    "vector_embedding": "time" if "level" in kinds else "dense" if "vector" in kinds else "",
    "shape": x_shape,
    "conditions": conditions,
  }
