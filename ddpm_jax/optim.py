"""The optimizer chain, and the parameter EMA as its last transform."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any


class ParamsEmaState(NamedTuple):
  """Steps taken, and the average."""

  steps: jax.Array
  params_ema: PyTree


def params_ema(decay: float, warmup: bool = True) -> optax.GradientTransformation:
  """Averages the parameters exponentially; updates pass through. Put it last, where updates are what is added to them.

  Args:
    decay: the share of the old average that is kept a step, in [0, 1).
    warmup: whether the decay at step s = 0, 1, ... is min(decay, (1 + s) / (10 + s)), so that the start is forgotten.

  Raises:
    ValueError: if the decay is outside [0, 1).
  """
  if not 0 <= decay < 1:
    raise ValueError(f"Got an EMA decay of {decay}; wanted 0 <= decay < 1, such as 0.999.")

  def init(params):
    return ParamsEmaState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

  def update(updates, state, params=None):
    if params is None:
      raise ValueError("Got no parameters; call update(updates, state, params), since the EMA averages them.")
    step = state.steps.astype(jnp.float32)
    rate = jnp.minimum(decay, (1 + step) / (10 + step)) if warmup else decay
    new = optax.apply_updates(params, updates)
    average = jax.tree.map(lambda old, now: old + (1 - rate) * (now - old), state.params_ema, new)
    return updates, ParamsEmaState(optax.safe_increment(state.steps), average)

  return optax.GradientTransformation(init, update)


def ema_params(opt_state: PyTree) -> PyTree:
  """The averaged parameters in the state of a chain that holds one `params_ema`; None if it holds none."""
  return optax.tree.get(opt_state, "params_ema")


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
  """Clipping by the global norm, Adam with a linear warm-up of its rate, and the parameter EMA.

  Args:
    learning_rate: the rate after the warm-up.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    warmup_steps: steps over which the rate rises from 0.
    clip_norm: the largest global norm of a gradient; None for no clipping.
    ema_decay: decay of the EMA, itself with a warm-up (see `params_ema`).

  Raises:
    ValueError: if a value is out of its range.
  """
  if learning_rate <= 0 or warmup_steps < 0 or (clip_norm is not None and clip_norm <= 0):
    raise ValueError(
      f"Got learning_rate={learning_rate}, warmup_steps={warmup_steps}, clip_norm={clip_norm}; wanted the rate and"
      " the norm above 0 and the steps at least 0."
    )
  if not (0 <= b1 < 1 and 0 <= b2 < 1 and eps > 0):
    raise ValueError(f"Got b1={b1}, b2={b2}, eps={eps} for Adam; wanted 0 <= b1, b2 < 1 and eps > 0.")
  # The first step already learns: a rate of exactly 0 would waste it.
  rate = (lambda count: learning_rate * jnp.minimum(1.0, (count + 1) / warmup_steps)) if warmup_steps else learning_rate
  clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
  return optax.chain(clip, optax.adam(rate, b1, b2, eps), params_ema(ema_decay))
