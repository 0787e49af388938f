"""Averages of the parameters: as the last optax transform, taken out for a checkpoint, and of any length after training."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddpm_jax.floats import widest, with_promotion

Array = jax.Array
PyTree = Any
Decay = Callable[[Array], Array]

# Of a flat profile (gamma = 0), the widest that a power function has.
_WIDEST = 12**-0.5


class ParamsEmaState(NamedTuple):
  """What `params_ema` remembers.

  Attributes:
    steps: steps averaged, an int32 scalar.
    averages: one tree as the parameters, in float32 at least, for each decay.
  """

  steps: Array
  averages: tuple[PyTree, ...]


def params_ema(*decays: Decay) -> optax.GradientTransformation:
  """Averages the parameters; updates pass through. Put it last, where updates are what is added to the parameters.

  Args:
    *decays: one function for each average, from `fixed`, `half_life`, `power` or your own: `decay(s)` is the share of the old
      average kept at step s = 0, 1, ... (an int32 scalar), in [0, 1].

  Raises:
    ValueError: if there is no decay, or it is no function.
  """
  if not decays or not all(callable(decay) for decay in decays):
    raise ValueError(f"Got {decays} as decays; expected one function or more, such as params_ema(fixed(0.999)).")

  def init(params):
    # A 16-bit average would stand still: its steps are smaller than its digits.
    def average(p):
      return jnp.copy(p).astype(widest(p))

    # Copies: a buffer that served twice could not be donated.
    return ParamsEmaState(jnp.zeros((), jnp.int32), tuple(jax.tree.map(average, params) for _ in decays))

  def update(updates, state, params=None):
    if params is None:
      raise ValueError("Got no parameters; call update(updates, state, params), since the EMA averages them.")
    new = with_promotion(optax.apply_updates)(params, updates)
    averages = tuple(
      _towards(average, new, 1 - decay(state.steps)) for decay, average in zip(decays, state.averages, strict=True)
    )
    return updates, ParamsEmaState(optax.safe_increment(state.steps), averages)

  return optax.GradientTransformation(init, update)


def _towards(average: PyTree, params: PyTree, share: Array) -> PyTree:
  return jax.tree.map(
    lambda old, new: old + jnp.asarray(share, old.dtype) * (new.astype(old.dtype) - old), average, params
  )


def fixed(decay: float, warmup: bool = True) -> Decay:
  """The same decay at every step.

  Args:
    decay: the share of the old average that is kept, in [0, 1).
    warmup: whether it is min(decay, (1 + s) / (10 + s)) at step s = 0, 1, ..., so that the start is forgotten.

  Raises:
    ValueError: if the decay is outside [0, 1).
  """
  if not 0 <= decay < 1:
    raise ValueError(f"Got an EMA decay of {decay}; expected 0 <= decay < 1, such as 0.999.")

  def at(s):
    s = jnp.asarray(s, jnp.float32)
    return jnp.minimum(decay, (1 + s) / (10 + s)) if warmup else jnp.full_like(s, decay)

  return at


def half_life(images: float, batch_size: int, ramp_up: float | None = 0.05) -> Decay:
  """What is in the average halves every so many images (Karras et al. 2022, appendix F.2, and their code).

  Args:
    images: the half-life in training images, above 0; 500,000 on CIFAR-10 in the paper.
    batch_size: images a step.
    ramp_up: the half-life is never more than this share of the images seen before the step, so that the start is
      forgotten; None: always `images`.

  Raises:
    ValueError: if a value is not above 0.
  """
  if not (images > 0 and batch_size > 0 and (ramp_up is None or ramp_up > 0)):
    raise ValueError(
      f"Got an EMA half-life of {images} images, batch_size={batch_size}, ramp_up={ramp_up}; expected all above 0, or"
      " ramp_up=None for none."
    )

  def at(s):
    s = jnp.asarray(s, jnp.float32)
    steps = jnp.full_like(s, images / batch_size)
    if ramp_up is not None:
      # No images seen: no half-life, and the average becomes the parameters.
      steps = jnp.maximum(jnp.minimum(steps, ramp_up * s), 1e-8)
    return jnp.exp2(-1 / steps)

  return at


def power(std: float) -> Decay:
  """An average whose length grows with training: parameters of step t weigh as t^gamma (Karras et al. 2023, EDM2).

  The decay is (1 - 1/t)^(gamma + 1), equation 127, at the t-th step: s = t - 1. The first step makes the parameters the average.

  Args:
    std: the profile's standard deviation over the length of training, in (0, 0.288); 0.05 to 0.10 in the paper.

  Raises:
    ValueError: if the width is out of range.
  """
  exponent = gamma_of(std) + 1

  def at(s):
    # From the logarithm of 1 - 1/t, which keeps the digits of a decay near 1.
    return jnp.exp(exponent * jnp.log1p(-1 / (jnp.asarray(s, jnp.float32) + 1)))

  return at


def gamma_of(std: float) -> float:
  """The exponent of a power function from its relative width (Karras et al. 2023, equation 126): the inverse of `std_of`.

  Args:
    std: in (0, 1/sqrt(12)): at the upper end the profile is flat.

  Raises:
    ValueError: if the width is out of range.
  """
  if not 0 < std < _WIDEST:
    raise ValueError(f"Got a power-function EMA of width std={std}; expected 0 < std < {_WIDEST:.4f}, such as 0.05.")
  # std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) is a cubic in gamma + 2, and only one of its roots is above 2.
  return float(np.roots([1, 1, -(std**-2), std**-2]).real.max()) - 2


def std_of(gamma: float) -> float:
  """The relative width of the profile t^gamma on [0, 1], its standard deviation (Karras et al. 2023, equation 123).

  Raises:
    ValueError: if gamma is not above 0.
  """
  if not gamma > 0:
    raise ValueError(f"Got gamma={gamma}; expected above 0, such as 6.94, whose width is 0.10.")
  return float((gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5))


def ema_params(opt_state: PyTree, index: int = 0) -> PyTree | None:
  """The averaged parameters in an optimizer's state that holds one `params_ema`; None if it holds none.

  Args:
    opt_state: of a chain, wrapped or not.
    index: which average, by the order of the decays.

  Raises:
    ValueError: if there are not so many averages, or more than one `params_ema`.
  """
  state = _find(opt_state)
  if state is None:
    return None
  if not 0 <= index < len(state.averages):
    raise ValueError(f"Got index={index} of {len(state.averages)} averages; expected one of them, counted from 0.")
  return state.averages[index]


def split(opt_state: PyTree) -> tuple[PyTree, tuple[PyTree, ...]]:
  """An optimizer's state without its averages (an empty tuple in their place), and the averages; `join` undoes it.

  So a checkpoint can keep the averages apart. Leaves may be arrays or their shapes (`jax.ShapeDtypeStruct`).

  Raises:
    ValueError: if the state holds more than one `params_ema`.
  """
  state = _find(opt_state)
  return _replace(opt_state, ()), () if state is None else state.averages


def join(rest: PyTree, averages: tuple[PyTree, ...]) -> PyTree:
  """The optimizer's state from what `split` gave.

  Raises:
    ValueError: if the state has no place for averages, or more than one.
  """
  if _find(rest) is None and averages:
    raise ValueError(f"Got {len(averages)} averages for a state without params_ema; expected what split() gave.")
  return _replace(rest, tuple(averages))


def _is_state(node: Any) -> bool:
  return isinstance(node, ParamsEmaState)


def _find(opt_state: PyTree) -> ParamsEmaState | None:
  found = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(node)]
  if len(found) > 1:
    raise ValueError(f"Got a state with {len(found)} params_ema; expected one, with all its decays: params_ema(a, b).")
  return found[0] if found else None


def _replace(opt_state: PyTree, averages: tuple[PyTree, ...]) -> PyTree:
  return jax.tree.map(
    lambda node: node._replace(averages=averages) if _is_state(node) else node, opt_state, is_leaf=_is_state
  )


def reconstruction_weights(
  snapshot_steps: Sequence[int], snapshot_stds: Sequence[float], step: int, std: float
) -> np.ndarray:
  """How to add stored power-function averages to get that of another width (Karras et al. 2023, algorithm 3).

  The profile of width `std` at step T, p(t) = (gamma + 1) t^gamma / T^(gamma + 1) on [0, T], is matched in least squares by the sum
  of the snapshots' profiles. Of profiles with gamma_a at T_a and gamma_b at T_b the inner product is (equation 151)

    (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) (m / T_a)^gamma_a (m / T_b)^gamma_b / M

  with m and M the lesser and the greater of T_a and T_b: the integral of t^(gamma_a + gamma_b) up to m.

  Args:
    snapshot_steps: steps averaged (`ParamsEmaState.steps`) when each snapshot was taken, above 0. Several widths of one step are
      several snapshots.
    snapshot_stds: the width of each, as given to `power`.
    step: the steps after which the average is wanted, above 0 and not after the last snapshot.
    std: its width, in (0, 1/sqrt(12)). Widths within those stored, or a little beyond, are matched well.

  Returns:
    Weights [len(snapshot_steps)], float64, whose sum is 1: parameters that stood still come out as they were. Some are negative, and
    their sizes may add up to 50: add in float32 or better.

  Raises:
    ValueError: if there are no snapshots, the lengths differ, or a step or a width is out of range.
  """
  ends = np.asarray(snapshot_steps, np.float64)
  if ends.ndim != 1 or len(ends) == 0 or len(ends) != len(snapshot_stds):
    raise ValueError(
      f"Got {ends.size} snapshot steps and {len(snapshot_stds)} widths; expected as many of both, at least one snapshot:"
      " train with the power-function EMA and store some."
    )
  if not ends.min() > 0 or not 0 < step <= ends.max():
    raise ValueError(
      f"Got step={step} with snapshots of steps {ends.min():g} to {ends.max():g}; expected all above 0 and the step not after"
      " the last snapshot."
    )
  gammas = np.array([gamma_of(width) for width in snapshot_stds])
  # Times as shares of the wanted one; profiles of unit norm, so that early, narrow ones do not spoil the condition.
  ends, end, gamma = ends / step, np.ones(1), np.array([gamma_of(std)])
  norms = np.sqrt(_inner(ends, gammas, ends, gammas))
  among = _inner(ends[:, None], gammas[:, None], ends, gammas) / (norms[:, None] * norms)
  weights = np.linalg.lstsq(among, _inner(ends, gammas, end, gamma) / norms, rcond=None)[0] / norms
  return weights / weights.sum()


def _inner(ends_a: np.ndarray, gammas_a: np.ndarray, ends_b: np.ndarray, gammas_b: np.ndarray) -> np.ndarray:
  lesser, greater = np.minimum(ends_a, ends_b), np.maximum(ends_a, ends_b)
  scale = (gammas_a + 1) * (gammas_b + 1) / (gammas_a + gammas_b + 1)
  # Ratios, since powers of the steps themselves overflow.
  return scale * (lesser / ends_a) ** gammas_a * (lesser / ends_b) ** gammas_b / greater
