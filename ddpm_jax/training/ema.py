"""Average parameters during training (EMA), and compute averages with other decays after training."""

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

# The relative width of a flat profile, t^0. Widths of power functions must be smaller.
_MAX_STD = 12**-0.5


class ParamsEmaState(NamedTuple):
  """Hold the state of `params_ema`.

  Attributes:
    steps: the number of averaged steps, an int32 scalar.
    averages: a tuple with one tree for each decay. Each tree has the structure of the parameters, in float32 or wider.
  """

  steps: Array
  averages: tuple[PyTree, ...]


def params_ema(*decays: Decay) -> optax.GradientTransformation:
  """Average the parameters, and leave the updates unchanged.

  Put this transformation last in a chain. It computes the new parameters (the parameters plus the updates) and averages
  these, so the updates must be final.

  Args:
    *decays: one function for each average: the result of `fixed`, `half_life` or `power`, or your own function.
      `decay(s)` is the weight, in [0, 1], of the old average at step s = 0, 1, ... (an int32 scalar).

  Raises:
    ValueError: if there is no decay, or a decay is not a function.
  """
  if not decays or not all(callable(decay) for decay in decays):
    raise ValueError(f"Got {decays} as decays; expected one function or more, such as params_ema(fixed(0.999)).")

  def init(params):
    # A 16-bit average would hardly change, because most changes are smaller than its precision.
    def average(p):
      return jnp.copy(p).astype(widest(p))

    # Copy the parameters, because a buffer that is used twice cannot be donated.
    return ParamsEmaState(jnp.zeros((), jnp.int32), tuple(jax.tree.map(average, params) for _ in decays))

  def update(updates, state, params=None):
    if params is None:
      raise ValueError(
        "Got params=None; expected the parameters, because the EMA averages them. Call update(updates, state, params)."
      )
    new = with_promotion(optax.apply_updates)(params, updates)
    averages = tuple(
      _interpolate(average, new, 1 - decay(state.steps)) for decay, average in zip(decays, state.averages, strict=True)
    )
    return updates, ParamsEmaState(optax.safe_increment(state.steps), averages)

  return optax.GradientTransformation(init, update)


def _interpolate(average: PyTree, params: PyTree, weight: Array) -> PyTree:
  return jax.tree.map(
    lambda old, new: old + jnp.asarray(weight, old.dtype) * (new.astype(old.dtype) - old), average, params
  )


def fixed(decay: float, warmup: bool = True) -> Decay:
  """Return a constant decay, with an optional warm-up.

  Args:
    decay: the weight of the old average, in [0, 1).
    warmup: whether the decay at step s = 0, 1, ... is min(decay, (1 + s) / (10 + s)). With this warm-up the average
      forgets the initial parameters quickly.

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
  """Return a decay whose half-life is a number of training images (Karras et al. 2022, appendix F.2, and their code).

  Args:
    images: the half-life in training images, above 0. The paper uses 500,000 on CIFAR-10.
    batch_size: the number of images in a step, above 0.
    ramp_up: the maximum half-life at each step, as a fraction of the number of images in all earlier steps. With this
      limit the average forgets the initial parameters quickly. None for no limit.

  Raises:
    ValueError: if a value is not above 0.
  """
  if not (images > 0 and batch_size > 0 and (ramp_up is None or ramp_up > 0)):
    raise ValueError(
      f"Got an EMA half-life of {images} images, batch_size={batch_size}, ramp_up={ramp_up}; expected all above 0, or"
      " ramp_up=None for no ramp-up."
    )

  def at(s):
    s = jnp.asarray(s, jnp.float32)
    steps = jnp.full_like(s, images / batch_size)
    if ramp_up is not None:
      # Before the first image the half-life is 0, and the average becomes the parameters.
      steps = jnp.maximum(jnp.minimum(steps, ramp_up * s), 1e-8)
    return jnp.exp2(-1 / steps)

  return at


def power(std: float) -> Decay:
  """Return the decay of a power-function average (Karras et al. 2024, EDM2).

  The weight of the parameters after step t is proportional to t^gamma, so the average covers more and more steps as
  training goes on. The decay of step t is (1 - 1/t)^(gamma + 1) (equation 127), where t is 1 for the first step. After
  the first step, the average equals the parameters.

  Args:
    std: the relative width of the average, in (0, 1/sqrt(12)): the standard deviation of t under these weights, divided
      by the number of steps so far. The width determines gamma (see `gamma_of`). The paper uses 0.05 to 0.10.

  Raises:
    ValueError: if the width is out of range.
  """
  exponent = gamma_of(std) + 1

  def at(s):
    # Use the logarithm of 1 - 1/t, which is precise for a decay near 1.
    return jnp.exp(exponent * jnp.log1p(-1 / (jnp.asarray(s, jnp.float32) + 1)))

  return at


def gamma_of(std: float) -> float:
  """Return the exponent gamma of a power function from its relative width (Karras et al. 2024, equation 126).

  This is the inverse of `std_of`.

  Args:
    std: the relative width, in (0, 1/sqrt(12)). At the upper limit, gamma would be 0.

  Raises:
    ValueError: if the width is out of range.
  """
  if not 0 < std < _MAX_STD:
    raise ValueError(f"Got a power-function EMA of width std={std}; expected 0 < std < {_MAX_STD:.4f}, such as 0.05.")
  # std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) is a cubic equation in gamma + 2. Only one of its roots is above
  # 2.
  return float(np.roots([1, 1, -(std**-2), std**-2]).real.max()) - 2


def std_of(gamma: float) -> float:
  """Return the relative width of a power function from its exponent (Karras et al. 2024, equation 123).

  The relative width is the standard deviation of the profile t^gamma on [0, 1].

  Raises:
    ValueError: if gamma is not above 0.
  """
  if not gamma > 0:
    raise ValueError(f"Got gamma={gamma}; expected above 0, such as 6.94 for a width of 0.10.")
  return float((gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5))


def ema_params(opt_state: PyTree, index: int = 0) -> PyTree | None:
  """Return averaged parameters from the state of an optimizer, or None if the optimizer computes no averages.

  Args:
    opt_state: the state of an optimizer, in which `params_ema` may be nested.
    index: the index of the average. The averages are in the order of the decays of `params_ema`.

  Raises:
    ValueError: if the index is out of range, or the state has more than one `params_ema`.
  """
  state = _find(opt_state)
  if state is None:
    return None
  if not 0 <= index < len(state.averages):
    raise ValueError(f"Got index={index}; expected the index of an average, from 0 to {len(state.averages) - 1}.")
  return state.averages[index]


def split(opt_state: PyTree) -> tuple[PyTree, tuple[PyTree, ...]]:
  """Return an optimizer's state without the averages, and the averages.

  The returned state has an empty tuple in place of the averages. A checkpoint stores the averages as a separate item.
  `join` is the inverse of this function. The leaves of the state may be arrays or `jax.ShapeDtypeStruct`.

  Raises:
    ValueError: if the state has more than one `params_ema`.
  """
  state = _find(opt_state)
  return _replace(opt_state, ()), () if state is None else state.averages


def join(opt_state: PyTree, averages: tuple[PyTree, ...]) -> PyTree:
  """Join an optimizer's state and its averages, the two results of `split`.

  Raises:
    ValueError: if there are averages but the state has no `params_ema`, or the state has more than one `params_ema`.
  """
  if _find(opt_state) is None and averages:
    raise ValueError(
      f"Got {len(averages)} averages for a state without params_ema; expected the state of an optimizer with"
      " params_ema, as split() returns it."
    )
  return _replace(opt_state, tuple(averages))


def _is_state(node: Any) -> bool:
  return isinstance(node, ParamsEmaState)


def _find(opt_state: PyTree) -> ParamsEmaState | None:
  states = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(node)]
  if len(states) > 1:
    raise ValueError(
      f"Got a state with {len(states)} params_ema; expected one with all decays, such as params_ema(a, b)."
    )
  return states[0] if states else None


def _replace(opt_state: PyTree, averages: tuple[PyTree, ...]) -> PyTree:
  return jax.tree.map(
    lambda node: node._replace(averages=averages) if _is_state(node) else node, opt_state, is_leaf=_is_state
  )


def reconstruction_weights(
  snapshot_steps: Sequence[int], snapshot_stds: Sequence[float], step: int, std: float
) -> np.ndarray:
  """Compute weights of snapshots to approximate an average of another width (Karras et al. 2024, algorithm 3).

  A snapshot is an average that was stored during training. The new average is the weighted sum of the snapshots.

  The profile of a power-function average is the weight p(t) of the parameters after step t. For an average at step T,
  p(t) = (gamma + 1) t^gamma / T^(gamma + 1) on [0, T], and gamma depends on the width (see `gamma_of`). A least-squares
  fit approximates the profile of the new average by a weighted sum of the snapshots' profiles. The weights of this fit
  are divided by their sum.

  The fit needs the inner product of two profiles, which is the integral of their product. For a profile with exponent
  gamma_a at step T_a and a profile with exponent gamma_b at step T_b, the inner product is (equation 151)

    (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) (m / T_a)^gamma_a (m / T_b)^gamma_b / M

  where m is the smaller and M the larger of T_a and T_b.

  Args:
    snapshot_steps: the number of averaged steps (`ParamsEmaState.steps`) at each snapshot, above 0. If one step has
      averages of several widths, each of these averages counts as a separate snapshot.
    snapshot_stds: the width of each snapshot, as in `power`.
    step: the step of the new average, above 0 and not after the last snapshot.
    std: the width of the new average, in (0, 1/sqrt(12)). The approximation is good for widths inside or slightly
      outside the range of `snapshot_stds`.

  Returns:
    Weights [len(snapshot_steps)] in float64 with a sum of 1, so constant parameters are preserved. Some weights may be
    negative, and the sum of their absolute values may reach 50, so add the snapshots in float32 or wider.

  Raises:
    ValueError: if there are no snapshots, the lengths differ, or a step or a width is out of range.
  """
  ends = np.asarray(snapshot_steps, np.float64)
  if ends.ndim != 1 or len(ends) == 0 or len(ends) != len(snapshot_stds):
    raise ValueError(
      f"Got {ends.size} snapshot steps and {len(snapshot_stds)} widths; expected one width for each step, and at"
      " least one snapshot. Train with a power-function EMA and store snapshots."
    )
  if not ends.min() > 0 or not 0 < step <= ends.max():
    raise ValueError(
      f"Got step={step} with snapshots of steps {ends.min():g} to {ends.max():g}; expected steps above 0, and"
      " a step not after the last snapshot."
    )
  gammas = np.array([gamma_of(width) for width in snapshot_stds])
  # Divide all steps by the new step, and normalize the profiles. Otherwise early or narrow profiles would make the
  # system ill-conditioned.
  ends, end, gamma = ends / step, np.ones(1), np.array([gamma_of(std)])
  norms = np.sqrt(_inner(ends, gammas, ends, gammas))
  gram = _inner(ends[:, None], gammas[:, None], ends, gammas) / (norms[:, None] * norms)
  weights = np.linalg.lstsq(gram, _inner(ends, gammas, end, gamma) / norms, rcond=None)[0] / norms
  return weights / weights.sum()


def _inner(ends_a: np.ndarray, gammas_a: np.ndarray, ends_b: np.ndarray, gammas_b: np.ndarray) -> np.ndarray:
  smaller, larger = np.minimum(ends_a, ends_b), np.maximum(ends_a, ends_b)
  scale = (gammas_a + 1) * (gammas_b + 1) / (gammas_a + gammas_b + 1)
  # Use ratios, because powers of the steps themselves overflow.
  return scale * (smaller / ends_a) ** gammas_a * (smaller / ends_b) ** gammas_b / larger
