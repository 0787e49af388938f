"""Build the optimizer chain from a schedule, clipping, an optax optimizer and averages, and skip non-finite steps."""

import ast
import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ddpm_jax.floats import widen, widest, with_promotion
from ddpm_jax.names import hint
from ddpm_jax.training import ema

Array = jax.Array
PyTree = Any
Rate = float | Callable[[Array], Array]

SCHEDULES = ("constant", "cosine", "linear", "inverse_sqrt")
# All functions of optax that take a learning rate and are complete optimizers.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  name: function
  for name, function in inspect.getmembers(optax, lambda member: isinstance(member, (FunctionType, partial)))
  if "learning_rate" in inspect.signature(function).parameters and not name.startswith(("_", "scale_by_"))
}


def schedule(
  peak: float, *, name: str = "constant", warmup_steps: int = 0, decay_steps: int = 0, final_factor: float = 0.0
) -> Callable[[Array | int], Array]:
  """Return a learning-rate schedule with a linear warm-up.

  The schedules after the warm-up are:

  - `constant`: the peak.
  - `cosine` (Loshchilov and Hutter 2017, equation 5, without restarts) and `linear`: a decay from the peak to
    `final_factor` times the peak, from the end of the warm-up to step `decay_steps`. Then the rate is constant.
  - `inverse_sqrt`: the peak until step t_ref = max(decay_steps, warmup_steps, 1), then the peak times sqrt(t_ref / t)
    at step t = 1, 2, ... (Karras et al. 2024, equation 67).

  Args:
    peak: the rate after the warm-up, above 0.
    name: the name of the schedule.
    warmup_steps: the number of warm-up steps. At step s = 0, 1, ... of the warm-up, the rate is multiplied by
      (s + 1) / warmup_steps. So the first step has a rate above 0 and is not wasted.
    decay_steps: the step at which the decay ends (`cosine`, `linear`) or starts (`inverse_sqrt`), counted from the
      start of training.
    final_factor: the final rate of `cosine` and `linear` divided by the peak, in [0, 1].

  Returns:
    A function `rate(step)` that returns a float32 scalar.

  Raises:
    ValueError: if the name is unknown or a value is out of its range.
  """
  if name not in SCHEDULES:
    raise ValueError(f"Got {name!r} as a schedule; expected one of {', '.join(SCHEDULES)}.{hint(name, SCHEDULES)}")
  if not (peak > 0 and warmup_steps >= 0 and decay_steps >= 0 and 0 <= final_factor <= 1):
    raise ValueError(
      f"Got learning_rate={peak}, warmup_steps={warmup_steps}, decay_steps={decay_steps}, final_factor={final_factor};"
      " expected the rate above 0, the steps at least 0 and the factor from 0 to 1."
    )
  if name in ("cosine", "linear") and decay_steps <= warmup_steps:
    raise ValueError(
      f"Got decay_steps={decay_steps} for a {name} schedule with warmup_steps={warmup_steps}; expected more than"
      " warmup_steps. Set decay_steps to the step, counted from the start of training, at which the decay ends."
    )
  # Use at least 1, because optax warns about 0 even if the result is not used.
  span, start = max(decay_steps - warmup_steps, 1), max(decay_steps, warmup_steps, 1)
  decays = {
    "constant": optax.constant_schedule(peak),
    "cosine": optax.cosine_decay_schedule(peak, span, final_factor),
    "linear": optax.linear_schedule(peak, final_factor * peak, span),
  }

  def rate(step):
    step = jnp.asarray(step, jnp.float32)
    warmup = jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))
    if name == "inverse_sqrt":
      return warmup * peak * jnp.sqrt(start / jnp.maximum(step + 1, start))
    return warmup * decays[name](jnp.maximum(step - warmup_steps, 0))

  return rate


def optimizer(name: str, rate: Rate, arguments: dict[str, Any]) -> optax.GradientTransformation:
  """Make an optax optimizer from its name, a learning rate and other arguments.

  Args:
    name: the name of an optax optimizer that takes a learning rate, such as adam, adamw, lion or sgd. `OPTIMIZERS` has
      all of these optimizers.
    rate: the learning rate, either a number above 0 or a function of the step.
    arguments: a dict from the names of the optimizer's other arguments to their values.

  Raises:
    ValueError: if the name or an argument is unknown, a value is out of range, or `rate` is a function but the
      optimizer needs a number. An optimizer with a line search raises a ValueError too, because it needs more inputs
      than gradients and parameters.
  """
  if name not in OPTIMIZERS:
    raise ValueError(f"Got {name!r} as an optimizer; expected one of {', '.join(OPTIMIZERS)}.{hint(name, OPTIMIZERS)}")
  if not callable(rate) and not rate > 0:
    raise ValueError(f"Got learning_rate={rate}; expected above 0, such as 1e-3.")
  parameters = [
    parameter for parameter in inspect.signature(OPTIMIZERS[name]).parameters if parameter != "learning_rate"
  ]
  for argument, value in arguments.items():
    if argument not in parameters:
      allowed = f"one of {', '.join(parameters)}" if parameters else "no arguments"
      raise ValueError(f"Got {argument!r} as an argument of {name}; expected {allowed}.{hint(argument, parameters)}")
    is_number = isinstance(value, (int, float))
    if is_number and not math.isfinite(value):
      raise ValueError(f"Got {argument}={value!r} for {name}; expected a finite number.")
    if argument in ("b1", "b2", "b3") and not (is_number and 0 <= value < 1):
      raise ValueError(f"Got {argument}={value!r} for {name}; expected 0 <= {argument} < 1.")
    if argument == "eps" and not (is_number and value > 0):
      raise ValueError(f"Got eps={value!r} for {name}; expected above 0, such as 1e-8.")
  try:
    return _make_checked(name, rate, arguments)
  # Optax may raise any exception for a wrong value. Raise it here and not later during compilation.
  except Exception as error:
    if callable(rate) and _works(name, 1e-3, arguments):
      raise ValueError(
        f"Got a learning rate that depends on the step, but {name} needs a constant; expected a constant schedule"
        " without warm-up. Set optimizer.schedule=constant and optimizer.warmup_steps=0, or choose another optimizer."
      ) from error
    raise ValueError(
      f"Got {name} with {arguments or 'no arguments'} ({error}); expected valid arguments, and an optimizer that makes"
      " a step from gradients and parameters alone. Set other arguments, or choose another optimizer, such as adam."
    ) from error


def _make_checked(name: str, rate: Rate, arguments: dict[str, Any]) -> optax.GradientTransformation:
  """Make the optimizer, and check it by tracing one step with abstract arrays."""
  transformation = _with_promotion(OPTIMIZERS[name](rate, **arguments))
  params = {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32), "bias": jax.ShapeDtypeStruct((3,), jnp.float32)}
  jax.eval_shape(lambda params: transformation.update(params, transformation.init(params), params), params)
  return transformation


def _with_promotion(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
  return optax.GradientTransformation(with_promotion(transformation.init), with_promotion(transformation.update))


def _works(name: str, rate: Rate, arguments: dict[str, Any]) -> bool:
  try:
    _make_checked(name, rate, arguments)
  except Exception:
    return False
  return True


def parse_arguments(text: str) -> dict[str, Any]:
  """Parse text such as `b2=0.95, weight_decay=0.01` into a dict from names to values.

  Values are Python literals.

  Raises:
    ValueError: if the text does not consist of names and literals, or a name occurs twice.
  """
  try:
    call = ast.parse(f"f({text})", mode="eval").body
    # The result must be a single call. Otherwise the text contains a closing bracket.
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
      raise ValueError
    arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    # An argument with ** has the name None.
    if "None" in arguments or len(arguments) < len(call.keywords):
      raise ValueError
    return arguments
  except (SyntaxError, ValueError) as error:
    raise ValueError(
      f"Got {text!r} as the optimizer's arguments; expected names, each once, with Python literals as values, such as"
      " 'b2=0.95, weight_decay=0.01'."
    ) from error


class SkipState(NamedTuple):
  """Hold the state of `skip_nonfinite`.

  Attributes:
    inner: the state of the wrapped optimizer.
    skipped: the total number of skipped steps, an int32 scalar.
    in_a_row: the number of skipped steps since the last step that was not skipped, an int32 scalar.
  """

  inner: Any
  skipped: Array
  in_a_row: Array


def global_norm(tree: PyTree) -> Array:
  """Compute the Euclidean norm of all leaves together, a scalar in float32 or wider.

  The sum of the squares of a leaf is computed as the inner product of the leaf with itself. In an ordinary sum, XLA's
  CPU backend would compute the values of the leaf again. On CPUs, leaves of equal shape are also stacked, so that XLA
  compiles one sum for each shape instead of one sum for each leaf.
  """
  leaves = widen(*jax.tree.leaves(tree))

  def stack_by_shape(leaves: Sequence[Array]) -> Array:
    shapes: dict[Any, list[Array]] = {}
    for leaf in leaves:
      shapes.setdefault(leaf.shape, []).append(leaf)
    return _sum_of_squares([jnp.stack(group) for group in shapes.values()])

  return jnp.sqrt(jax.lax.platform_dependent(leaves, cpu=stack_by_shape, default=_sum_of_squares))


def _sum_of_squares(leaves: Sequence[Array]) -> Array:
  squares = (jnp.tensordot(leaf, leaf, leaf.ndim, precision="highest") for leaf in leaves)
  return sum(squares, jnp.zeros((), widest(*leaves)))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """Scale updates down to a global norm of at most `max_norm` (Pascanu et al. 2013).

  This transformation gives the results of `optax.clip_by_global_norm`, but compiles faster (see `global_norm`).

  Args:
    max_norm: the maximum norm, above 0.

  Raises:
    ValueError: if `max_norm` is not above 0.
  """
  if not max_norm > 0:
    raise ValueError(f"Got clip_norm={max_norm}; expected above 0, such as 1.0, or None for no clipping.")

  def update(updates, state, params=None):
    norm = global_norm(updates)
    factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
    return jax.tree.map(lambda leaf: (leaf * factor).astype(leaf.dtype), updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def freeze_untrained(trainable: Callable[[PyTree], PyTree]) -> optax.GradientTransformation:
  """Keep untrained parameters bit-identical by setting their updates to zero.

  Put this transformation after the optimizer. Otherwise weight decay would change untrained parameters.

  Args:
    trainable: a function such as `networks.trainable_mask`. `trainable(updates)` returns a tree with the structure of
      the updates: True for each trained parameter, and False for each untrained parameter.
  """

  def update(updates, state, params=None):
    # Add -0.0, because adding 0.0 would turn a parameter of -0.0 into 0.0.
    return jax.tree.map(
      lambda leaf, trained: leaf if trained else jnp.full_like(leaf, -0.0), updates, trainable(updates)
    ), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def apply_to_part(name: str, transformation: optax.GradientTransformation) -> optax.GradientTransformation:
  """Apply a transformation to one part of a dict of parameters, and leave the updates of all other parts unchanged.

  The state of the transformation covers this part only.

  Args:
    name: the name of the part. If an objective has extra parameters, the parts are "model" and "extra".
    transformation: the transformation, such as `optax.adam(1e-4)`.
  """

  def init(params):
    return transformation.init(_part_of(params, name))

  def update(updates, state, params=None):
    new, state = transformation.update(
      _part_of(updates, name), state, None if params is None else _part_of(params, name)
    )
    return updates | {name: new}, state

  return optax.GradientTransformation(init, update)


def _part_of(tree: PyTree, name: str) -> PyTree:
  if isinstance(tree, dict) and name in tree:
    return tree[name]
  raise ValueError(
    f"Got parameters without a part {name!r}, but an optimizer for this part; expected a dict with this part. Only"
    " objectives with extra parameters have parts. For other objectives, omit `extra` in optim.chain."
  )


def skip_nonfinite(
  *steps: optax.GradientTransformation, averages: optax.GradientTransformation | None = None, check_updates: bool = True
) -> optax.GradientTransformation:
  """Chain transformations, and skip steps if the norm of the gradients or of the updates is not finite.

  A skipped step leaves the parameters and the state of the transformations bit-identical, and increases the counts of
  skipped steps. Make this the outermost transformation.

  Args:
    *steps: one or more transformations that form the optimizer.
    averages: the transformation that averages the parameters, such as `ema.params_ema(ema.fixed(0.9999))`; None for no
      averages.
    check_updates: whether to check the norm of the updates too; the norm of the gradients is always checked. Use
      False if finite gradients always give finite updates. With True, CPUs compute the updates twice. With False, a
      step reads and writes each array only once.

  Raises:
    ValueError: if there is no optimizer.
  """
  if not steps:
    raise ValueError("Got no optimizer; expected one or more, such as skip_nonfinite(optax.adam(1e-3)).")
  optimizer = _with_promotion(optax.chain(*steps))
  compute_updates = jax.jit(optimizer.update, inline=True)  # traced once, but called twice
  full_chain = optimizer if averages is None else optax.chain(*steps, averages)
  init_chain = with_promotion(full_chain.init)

  def init(params):
    return SkipState(init_chain(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

  def update(updates, state, params=None):
    inputs = (updates, state.inner[: len(steps)], params)
    new, after = compute_updates(*inputs)
    is_finite = jnp.isfinite(global_norm(updates))
    if check_updates:
      is_finite &= jnp.isfinite(global_norm(new))
      # On CPUs, compute the new state again instead of storing it until the check is done. A kernel of XLA's CPU
      # backend has only one result, so storing the state would write and read each array once more. On other platforms
      # XLA merges both calls.
      separate_inputs = jax.lax.platform_dependent(
        inputs, cpu=jax.lax.optimization_barrier, default=lambda inputs: inputs
      )
      _, after = compute_updates(*separate_inputs)
    # Add -0.0, because adding 0.0 would turn a parameter of -0.0 into 0.0.
    new = jax.tree.map(lambda leaf: jnp.where(is_finite, leaf, jnp.asarray(-0.0, leaf.dtype)), new)
    # Average the parameters after the check, so that XLA can fuse the averages with the update of the parameters.
    if averages is not None:
      new, averaged = averages.update(new, state.inner[-1], params)
      after = (*after, averaged)
    return new, SkipState(
      jax.tree.map(lambda after, before: jnp.where(is_finite, after, before), after, state.inner),
      jnp.where(is_finite, state.skipped, optax.safe_increment(state.skipped)),
      jnp.where(is_finite, 0, optax.safe_increment(state.in_a_row)),
    )

  return optax.GradientTransformation(init, update)


def skip_counts(opt_state: PyTree) -> tuple[Array, Array] | None:
  """Return the numbers of skipped steps, in total and in a row, from the state of an optimizer.

  Both numbers are int32 scalars. The result is None if the optimizer does not use `skip_nonfinite`.
  """
  nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, SkipState))
  return next(((node.skipped, node.in_a_row) for node in nodes if isinstance(node, SkipState)), None)


def chain(
  rate: Rate,
  *,
  name: str = "adam",
  arguments: dict[str, Any] | None = None,
  clip_norm: float | None = 1.0,
  averages: optax.GradientTransformation | None,
  trainable: Callable[[PyTree], PyTree] | None = None,
  extra: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
  """Chain gradient clipping, an optimizer and parameter averages, and skip non-finite steps.

  The gradients are always checked. For Lion, and for Adam and AdamW with an `eps` of 1e-16 or more, finite gradients
  always give finite updates, so the updates need no check. For other optimizers, and if there is an optimizer `extra`,
  the updates are checked too (see `check_updates` of `skip_nonfinite`).

  Args:
    rate: the learning rate, either a number or a function of the step, such as a `schedule`. All its values must be
      finite.
    name: the name of the optimizer (see `optimizer`).
    arguments: the arguments of the optimizer.
    clip_norm: the maximum global norm of the gradients; None for no clipping.
    averages: the transformation that averages the parameters, such as `ema.params_ema(ema.fixed(0.9999))`; None for no
      averages.
    trainable: a function that returns which parameters are trained (see `freeze_untrained`), such as
      `networks.trainable_mask`; None if all are trained.
    extra: the optimizer of the objective's extra parameters, such as `optax.adam(1e-4)`; None if the objective has no
      extra parameters. With `extra`, the parameters are a dict `{"model": ..., "extra": ...}`, and all other arguments
      apply to the part "model" only. If the gradients or updates of one part are not finite, the step is skipped for
      both parts.

  Raises:
    ValueError: if a value is out of range, or a name is unknown.
  """
  clip = [] if clip_norm is None else [clip_by_global_norm(clip_norm)]
  freeze = [] if trainable is None else [freeze_untrained(trainable)]
  update = optimizer(name, rate, arguments or {})
  steps, keeps_finite = [*clip, update, *freeze], _keeps_finite(name, arguments or {})
  if extra is not None:
    steps, keeps_finite = [*(apply_to_part("model", step) for step in steps), apply_to_part("extra", extra)], False
    averages = None if averages is None else apply_to_part("model", averages)
  return skip_nonfinite(*steps, averages=averages, check_updates=not keeps_finite)


def _keeps_finite(name: str, arguments: dict[str, Any]) -> bool:
  """Return whether finite gradients always give finite updates at finite rates, for any state of the optimizer.

  For Adam, if the norm of the gradients is finite, the squares of the gradients are finite, and so are the averages of
  these squares. Adam never divides an average of gradients by less than `eps`.
  """
  return name == "lion" or (name in ("adam", "adamw") and arguments.get("eps", 1e-8) >= 1e-16)


def adam(
  learning_rate: float,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  warmup_steps: int = 0,
  clip_norm: float | None = 1.0,
  ema_decay: float = 0.9999,
) -> optax.GradientTransformation:
  """Return a `chain` with Adam, a warm-up, clipping, and one average with a fixed decay.

  This optimizer is a good default for small models.

  Raises:
    ValueError: if a value is out of range.
  """
  rate, averages = schedule(learning_rate, warmup_steps=warmup_steps), ema.params_ema(ema.fixed(ema_decay))
  return chain(rate, arguments={"b1": b1, "b2": b2, "eps": eps}, clip_norm=clip_norm, averages=averages)
