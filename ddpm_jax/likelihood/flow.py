"""Compute the log-likelihood of the probability-flow ODE with the instantaneous change of variables."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax import randomness
from ddpm_jax.arguments import check_types
from ddpm_jax.floats import widest
from ddpm_jax.likelihood.core import LEVELS, check_data, check_t_min, min_training_time
from ddpm_jax.predictions import Denoise
from ddpm_jax.processes import Process, as_time
from ddpm_jax.sampling import rk45
from ddpm_jax.sampling.adaptive import flow
from ddpm_jax.sampling.core import with_shape_check

Array = jax.Array

_NOISES = {"rademacher": randomness.rademacher, "gaussian": randomness.normal}
# With more dimensions, an exact trace takes thousands of derivatives per image at each of several hundred times.
_MAX_DIMENSIONS = 1024
# The number of derivatives of an exact trace that are computed in parallel.
_TRACE_BATCH = 64


class OdeBits(NamedTuple):
  """Hold the results of `ode_bits`.

  Attributes:
    bits: -log2 p(x_0) per dimension, averaged over the probes [B]. NaN where the solver needs more than `max_nfe`
      evaluations.
    by_probe: -log2 p(x_0) per dimension from each probe [B, probes], or [B, 1] for an exact trace. With at least 2
      probes, `summary(by_probe, axis=1)` gives the standard error of `bits` due to the probes.
    nfe: the number of evaluations of the ODE's right-hand side for each image [B].
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
  """Compute -log2 p(x_0) per dimension under the probability flow (Song et al. 2021, equation 39 and appendix D.2).

    log p(x_tmin) = log N(x_tmax; 0, sigma_tmax^2) + int div f(x_t, t) dt,   div f = E v^T (df/dx) v

  The flow is dx/dt = f(x, t). The solver integrates x together with the estimates of the divergence from all probes v.
  It chooses separate steps for each image (`sampling.rk45` with `per_sample`). Each image keeps its probes for the
  entire flow (Grathwohl et al. 2019), so only the solver's error biases the estimate of the integral.

  The result uses the model's density of x_tmin, evaluated at x_0, in place of p(x_0). It neglects the noise between 0
  and t_min, and the difference between the true distribution of x_tmax and the normal distribution in the formula.

  Dequantization replaces each pixel value k from 0 to 255 by y = 2 (k + u) / 256 - 1 with u uniform in [0, 1). The
  probability P(k) is the integral of the density p over an interval of width 2/256. By Jensen's inequality,
  -log2 P(k) <= E[-log2 p(y)] + 7 per dimension. The result includes the constant 7 = log2(256 / 2), so its mean over u
  is an upper bound. Without dequantization, the result is -log2 of a density and may be negative.

  Each evaluation of the right-hand side costs one network call and `probes` derivatives, or D derivatives for an exact
  trace in D dimensions. For a U-Net on 8x8 images on a CPU, a forward-mode derivative together with the value takes
  2.7 times as long as the value alone.

  Args:
    key: one key, or one key per sample [B]. With one key per sample, `bits[i]` depends only on `x_0[i]` and `key[i]`.
    process: the forward process. A discrete process is evaluated between its steps.
    denoise: `denoise(x_t, t) -> x_0 estimate`, differentiable in x_t, called with t of shape [B]. Clipping the
      estimates changes the flow.
    x_0: data [B, ...] in [-1, 1]. D is the total number of dimensions of a sample. For dequantization the data must be
      on 256 levels, as from `storage.images.from_uint8`.
    probes: the number of probes v per image.
    probe_noise: the distribution of v, "rademacher" for random signs, or "gaussian". The estimate has a larger variance
      with "gaussian" (Hutchinson 1990).
    exact_trace: whether to compute the exact trace, for at most 1024 dimensions. `probes` and `probe_noise` then have
      no effect.
    reverse_mode: whether to use reverse-mode derivatives (`jax.vjp`). Some networks, such as a `UNet` with
      kernels="loop", support only reverse mode. Forward mode needs less memory.
    dequantize: whether to dequantize x_0. The data must then be on 256 levels. Set it to False for continuous data.
    t_min: the start of the flow, in (0, t_max). Default: 1e-5 t_max, as in Song et al., or `process.t_min` for discrete
      processes and for processes with t_max above 1, such as `processes.edm`.
    rtol: the relative tolerance for an image's error, the root mean square over x and the integrals of div f.
    atol: the absolute tolerance for the same error.
    max_nfe: the maximum number of evaluations of the right-hand side.

  Raises:
    ValueError: if the data are not floats, data for dequantization are not on 256 levels (traced data are not checked),
      the number of keys is wrong, `probes` is below 1, `probe_noise` is unknown, there are too many dimensions for an
      exact trace, or `t_min` or a tolerance is out of range.
  """
  check_data(key, x_0, on_levels=dequantize)
  shape, dimensions = x_0.shape, math.prod(x_0.shape[1:])
  _check(probes, probe_noise, exact_trace, dimensions)
  t_min = min_training_time(process) if t_min is None else t_min
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
  z, log_det = end[:, :dimensions], end[:, dimensions:]
  sigma = process.sigma(as_time(process.t_max)).astype(precision)
  log_prior = -0.5 * jnp.sum((z / sigma) ** 2 + jnp.log(2 * jnp.pi * sigma**2), axis=1, keepdims=True)
  by_probe = -(log_prior + log_det) / (dimensions * math.log(2)) + (math.log2(LEVELS / 2) if dequantize else 0)
  return OdeBits(jnp.mean(by_probe, axis=1), by_probe, nfe)


def _check(probes: int, probe_noise: str, exact_trace: bool, dimensions: int) -> None:
  if probes != int(probes) or probes < 1:
    raise ValueError(f"Got probes={probes}; expected an integer of at least 1.")
  if probe_noise not in _NOISES:
    raise ValueError(f"Got probe_noise={probe_noise!r}; expected 'rademacher' or 'gaussian'.")
  if exact_trace and dimensions > _MAX_DIMENSIONS:
    raise ValueError(
      f"Got exact_trace=True for data of {dimensions} dimensions; expected at most {_MAX_DIMENSIONS}, because the exact trace"
      " takes one network derivative per dimension. Use unbiased probes instead, such as probes=4."
    )


def _probes(key: Array, count: int, probe_noise: str, shape: tuple[int, ...], dtype) -> Array:
  """Sample probes [count, B, ...].

  The p-th probe of an image does not depend on the number of probes.
  """
  return jax.vmap(lambda p: _NOISES[probe_noise](randomness.fold_in(key, p), shape, dtype))(jnp.arange(count))


def _with_divergence(
  velocity: Callable[[Array], Array], x: Array, vectors: Array | None, *, reverse_mode: bool
) -> tuple[Array, Array]:
  """Compute velocity(x) and its divergence, the trace of the Jacobian J of the velocity.

  Returns:
    The velocity [B, ...] and the divergence. With vectors v [P, B, ...], the divergence has the shape [B, P] and
    contains the estimate v^T J v from each vector. Without vectors, it is exact and has the shape [B, 1].
  """
  axes = tuple(range(1, x.ndim))

  def product(v):  # returns velocity(x), the same for all v, and v^T J v
    if reverse_mode:
      value, pull_back = jax.vjp(velocity, x)
      slope = pull_back(v)[0]
    else:
      value, slope = jax.jvp(velocity, (x,), (v,))
    return value, jnp.sum(v * slope, axis=axes)

  count = math.prod(x.shape[1:])

  def unit(i):
    return jnp.broadcast_to(jax.nn.one_hot(i, count, dtype=x.dtype).reshape(x.shape[1:]), x.shape)

  if vectors is None and count > _TRACE_BATCH:
    entries = jax.lax.map(lambda i: product(unit(i))[1], jnp.arange(count), batch_size=_TRACE_BATCH)
    return velocity(x), jnp.sum(entries, axis=0)[:, None]
  basis = jax.vmap(unit)(jnp.arange(count)) if vectors is None else vectors
  value, products = jax.vmap(product, out_axes=(None, 0))(basis)
  return value, jnp.sum(products, axis=0)[:, None] if vectors is None else products.T
