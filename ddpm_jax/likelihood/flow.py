"""The log-likelihood of the probability-flow ODE, by the instantaneous change of variables."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax import randomness
from ddpm_jax.arguments import check_types
from ddpm_jax.floats import widest
from ddpm_jax.likelihood.core import LEVELS, check_data, check_t_min, first_time
from ddpm_jax.predictions import Denoise
from ddpm_jax.processes import Process, as_time
from ddpm_jax.sampling import rk45
from ddpm_jax.sampling.adaptive import flow
from ddpm_jax.sampling.core import with_shape_check

Array = jax.Array

_NOISES = {"rademacher": randomness.rademacher, "gaussian": randomness.normal}
# Beyond this a single image costs thousands of derivatives at every one of some hundred times.
_MOST_DIMENSIONS = 1024
# Of an exact trace, how many derivatives are taken side by side.
_AT_ONCE = 64


class OdeBits(NamedTuple):
  """What `ode_bits` gives.

  Attributes:
    bits: -log2 p(x_0) per dimension, the mean over the probes [B]; NaN where the solver did not arrive.
    by_probe: by each probe alone [B, probes], for an error bar: `summary(by_probe, axis=1)`; [B, 1] of an exact trace.
    nfe: the calls of the flow's right side that each image's solution took [B].
  """

  bits: Array
  by_probe: Array
  nfe: Array


@check_types
def ode_bits(
  key: Array,
  process: Process,
  denoise: Denoise,
  x_0: Array,
  *,
  probes: int = 1,
  probe_noise: str = "rademacher",
  exact_trace: bool = False,
  reverse_mode: bool = False,
  dequantize: bool = True,
  t_min: float | None = None,
  rtol: float = 1e-5,
  atol: float = 1e-5,
  max_nfe: int = 100_000,
) -> OdeBits:
  """-log2 p(x_0) per dimension of the probability flow dx/dt = f(x, t) (Song et al. 2021, equation 39 and appendix D.2).

    log p(x_tmin) = log N(x_tmax; 0, sigma_tmax^2) + int div f(x_t, t) dt,   div f = E v^T (df/dx) v

  The solver carries x and the integrals of the probes together, for each image apart (`sampling.rk45`, `per_sample`). A probe v
  is drawn once an image and kept along the way (Grathwohl et al. 2019), so that its estimate has no bias but that of the solver.

  What this is the density of: the model's x at t_min, taken at the data as they are. Neglected is the noise between 0 and t_min, and
  that the true x at t_max is not quite the prior's.

  Dequantized, a value k of 0..255 becomes y = 2 (k + u) / 256 - 1 with u uniform in [0, 1), and as the level's probability is the integral
  of the density over a width 2/256, by Jensen's inequality -log2 P(k) <= E[-log2 p(y)] + 7 per dimension: an upper bound, whose
  7 = log2(256 / 2) is counted. Not dequantized, the result is -log2 of a density, which may be below 0.

  A call of the right side costs a network call and `probes` derivatives, or D of them for the exact trace of D dimensions. On a CPU a
  forward derivative with its value takes 2.7 times as long as the value (measured, a U-Net on 8x8), in a loop as well as outside it.

  Args:
    key: one key, or one a sample [B]: then image i's value follows from x_0[i] and key i alone.
    process: the forward process; a discrete one is read between its steps.
    denoise: `denoise(x_t, t) -> x_0 estimate`, differentiable in x_t, called with t of shape [B]. Clipping makes it another flow.
    x_0: data [B, ...] in [-1, 1], of dimensions [D] taken together; on 256 levels to be dequantized, as `images.from_uint8` gives.
    probes: how many v an image.
    probe_noise: of v: "rademacher", signs, or "gaussian", which has the larger variance (Hutchinson 1990).
    exact_trace: whether the trace is computed, for at most 1024 dimensions; `probes` and `probe_noise` then do not matter.
    reverse_mode: whether derivatives go backwards (`jax.vjp`): for networks that know no others, such as a `UNet` with the kernels "loop".
      Forward ones need less memory.
    dequantize: whether x_0 are levels, and not continuous data.
    t_min: where the flow starts, in (0, t_max); by default 1e-5 of t_max, as Song et al. have, or `process.t_min` of discrete processes
      and of those whose t is sigma.
    rtol: relative tolerance of the root mean square error of an image's x and integrals.
    atol: absolute tolerance.
    max_nfe: the number of calls of the right side at which to give up.

  Raises:
    ValueError: if the data are no floats or, to be dequantized, known not to lie on 256 levels; the keys do not fit; `probes` is below 1;
      the noise is of another name; there are too many dimensions for an exact trace; or `t_min` or a tolerance is out of range.
  """
  check_data(key, x_0, on_levels=dequantize)
  shape, dimensions = x_0.shape, math.prod(x_0.shape[1:])
  _check(probes, probe_noise, exact_trace, dimensions)
  t_min = first_time(process) if t_min is None else t_min
  check_t_min(process, t_min)
  precision = widest(x_0)
  x = x_0.astype(precision)
  if dequantize:
    level = jnp.round((x + 1) * (0.5 * (LEVELS - 1)))
    x = (level + randomness.uniform(randomness.fold_in(key, 0), shape, precision)) * (2 / LEVELS) - 1
  network = with_shape_check(denoise)
  vectors = None if exact_trace else _probes(randomness.fold_in(key, 1), probes, probe_noise, shape, precision)

  def slope(t, state):
    def velocity(x):
      return flow(process, lambda x, t: network(x.astype(x_0.dtype), t), x, t).astype(x.dtype)

    x = state[:, :dimensions].reshape(shape)
    value, divergences = _with_divergence(velocity, x, vectors, reverse_mode=reverse_mode)
    return jnp.concatenate([value.reshape(shape[0], -1), divergences], axis=1)

  count = 1 if exact_trace else probes
  start = jnp.concatenate([x.reshape(shape[0], -1), jnp.zeros((shape[0], count), precision)], axis=1)
  end, nfe = rk45(slope, start, t_min, process.t_max, rtol=rtol, atol=atol, max_nfe=max_nfe, per_sample=True)
  z, gained = end[:, :dimensions], end[:, dimensions:]
  sigma = process.sigma(as_time(process.t_max)).astype(precision)
  log_prior = -0.5 * jnp.sum((z / sigma) ** 2 + jnp.log(2 * jnp.pi * sigma**2), axis=1, keepdims=True)
  by_probe = -(log_prior + gained) / (dimensions * math.log(2)) + (math.log2(LEVELS / 2) if dequantize else 0)
  return OdeBits(jnp.mean(by_probe, axis=1), by_probe, nfe)


def _check(probes: int, probe_noise: str, exact_trace: bool, dimensions: int) -> None:
  if probes != int(probes) or probes < 1:
    raise ValueError(f"Got probes={probes}; expected a whole number of at least 1.")
  if probe_noise not in _NOISES:
    raise ValueError(f"Got probe_noise={probe_noise!r}; expected 'rademacher' or 'gaussian'.")
  if exact_trace and dimensions > _MOST_DIMENSIONS:
    raise ValueError(
      f"Got exact_trace=True for data of {dimensions} dimensions, which takes as many derivatives of the network at every time; expected at most"
      f" {_MOST_DIMENSIONS}. Take probes instead, such as probes=4: their mean has no bias."
    )


def _probes(key: Array, count: int, probe_noise: str, shape: tuple[int, ...], dtype) -> Array:
  """Vectors [count, B, ...], number p of an image the same however many there are."""
  return jax.vmap(lambda p: _NOISES[probe_noise](randomness.fold_in(key, p), shape, dtype))(jnp.arange(count))


def _with_divergence(
  velocity: Callable[[Array], Array], x: Array, vectors: Array | None, *, reverse_mode: bool
) -> tuple[Array, Array]:
  """velocity(x) [B, ...], and v^T J v [B, P] of the vectors [P, B, ...], or the trace of J [B, 1] if there are none."""
  axes = tuple(range(1, x.ndim))

  def product(v):  # v^T J v, and the value, which is the same for all v
    if reverse_mode:
      value, pull_back = jax.vjp(velocity, x)
      slope = pull_back(v)[0]
    else:
      value, slope = jax.jvp(velocity, (x,), (v,))
    return value, jnp.sum(v * slope, axis=axes)

  count = math.prod(x.shape[1:])

  def unit(i):
    return jnp.broadcast_to(jax.nn.one_hot(i, count, dtype=x.dtype).reshape(x.shape[1:]), x.shape)

  if vectors is None and count > _AT_ONCE:
    entries = jax.lax.map(lambda i: product(unit(i))[1], jnp.arange(count), batch_size=_AT_ONCE)
    return velocity(x), jnp.sum(entries, axis=0)[:, None]
  basis = jax.vmap(unit)(jnp.arange(count)) if vectors is None else vectors
  value, products = jax.vmap(product, out_axes=(None, 0))(basis)
  return value, jnp.sum(products, axis=0)[:, None] if vectors is None else products.T
