"""Add noise to images and denoise them, encode images as noise, and interpolate between images."""

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import randomness
from ddpm_jax.arguments import check_types
from ddpm_jax.floats import widen, widest
from ddpm_jax.predictions import Denoise
from ddpm_jax.processes import Process, as_time, check_floats
from ddpm_jax.sampling import Sampler, sample
from ddpm_jax.sampling.core import check_times, estimate

Array = jax.Array


@check_types
def img2img(
  key: Array, sampler: Sampler, denoise: Denoise, process: Process, x_0: Array, times, strength: float
) -> Array:
  """Add noise to images and denoise them, also known as SDEdit (Meng et al. 2022, algorithm 1).

  Args:
    key: one key, or one key per sample [B].
    sampler: the step rule.
    denoise: `denoise(x_t, t) -> x_0 estimate`.
    process: the forward process.
    x_0: images or sketches [B, ...].
    times: a decreasing grid of K steps that starts at t_max of the process. A rule that chooses its own steps, such as
      `sampling.ode`, uses only the start time and the last two times.
    strength: the share of steps to take, in [0, 1]. Sampling takes the last floor(strength K) steps, as in diffusers.
      With 0 steps the result is the input. With a strength of 1 the result is a new sample, bit for bit equal to
      `sample(fold_in(key, 1), sampler, denoise, process.prior(fold_in(key, 0), x_0.shape, x_0.dtype), times)`. For
      `sampling.ode` with K > 2, `times` in this expression is only the start time and the last two times.

  Returns:
    Images of the shape and dtype of x_0.

  Raises:
    ValueError: if `strength` is outside [0, 1], the grid does not decrease, or `sampling.sample` rejects the arguments.
  """
  if not 0 <= strength <= 1:
    raise ValueError(f"Got strength={strength}; expected a number from 0 (the input) to 1 (a new sample).")
  randomness.check_key(key)
  check_floats(x_0)
  _check_decreasing(times, sampler, x_0)
  num_steps = int(strength * (len(times) - 1))
  if num_steps == 0:
    return x_0
  noise_key, sample_key = (randomness.fold_in(key, i) for i in range(2))
  times = times[len(times) - 1 - num_steps :]
  x = (
    process.prior(noise_key, x_0.shape, x_0.dtype)
    if strength == 1
    else process.sample_marginal(noise_key, x_0, times[0])
  )
  if sampler.spacing == "ends" and num_steps > 2:
    times = as_time(times)[jnp.array([0, -2, -1])]
  return sample(sample_key, sampler, denoise, x, times)


@check_types
def invert(sampler: Sampler, denoise: Denoise, process: Process, x_0: Array, times) -> Array:
  """Encode images as noise from which a deterministic rule can sample them again.

  With `sampling.ddim` this is DDIM inversion (Song et al. 2021a, section 5.4; Mokady et al. 2023, section 3). With
  `sampling.ode` the encoding follows the probability flow with the error tolerance of the rule. Decode with
  `sample(key, sampler, denoise, noise, times)`. Decoding is deterministic, so the value of the key does not matter.
  With `sampling.ode`, pass one key per sample, so that each sample chooses its own steps, as in the encoding.

  Encoding goes through the grid from small to large times. It starts at the smallest positive time t of the grid. The
  start is x_t = alpha_t x_0 + sigma_t eps, where eps is the network's noise estimate for the input alpha_t x_0. This
  start costs one additional network call. It inverts the last step of sampling with a higher order of accuracy than
  the simpler starts x_t = x_0 and x_t = alpha_t x_0. For a two-dimensional mixture on VP with 80 equal steps, the
  error of encoding and decoding is 0.002 with Heun and 0.020 with DDIM. With the simpler starts, the error is 0.015
  with Heun and 0.028 with DDIM. With fewer than 50 steps, however, DDIM is up to 1.5 times more accurate with
  x_t = x_0.

  If the grid ends at a time above 0, `sample` returns x_t at this time instead of clean images. Pass this x_t as
  `x_0`. Encoding starts from it without an additional network call.

  Args:
    sampler: a reversible rule, such as `sampling.ddim(process)` or `sampling.ode(process)`.
    denoise: `denoise(x_t, t) -> x_0 estimate`.
    process: the forward process.
    x_0: images [B, ...].
    times: the decreasing grid for decoding. If it ends at 0, it has at least two steps. Traced times must end at 0.

  Returns:
    The encoding [B, ...] at times[0], in the dtype of x_0.

  Raises:
    ValueError: if the rule is not reversible, the grid does not decrease, a grid that ends at 0 has a single step, or
      `sampling.sample` rejects the arguments.
  """
  if not sampler.reversible:
    raise ValueError(
      "Got a sampler that is not reversible; expected a deterministic rule without wrappers and churn, such"
      " as sampling.ddim(process) or sampling.heun(process)."
    )
  check_floats(x_0)
  _check_decreasing(times, sampler, x_0)
  is_traced = isinstance(times, jax.core.Tracer)
  rising = as_time(times)[::-1] if is_traced else np.asarray(times)[::-1]
  if not is_traced and rising[0] > 0:
    return sample(_keys(x_0), sampler, denoise, x_0, rising)
  rising = rising[1:]
  if len(rising) < 2:
    raise ValueError(
      f"Got times {times}; expected at least two steps in a grid that ends at 0. Use a grid from sampling.grids."
    )
  t = as_time(rising[0])
  alpha, sigma, data = widen(process.alpha(t), process.sigma(t), x_0)
  _, eps = estimate(process, denoise, (alpha * data).astype(x_0.dtype), t)
  x_t = (alpha * data + sigma * eps.astype(data.dtype)).astype(x_0.dtype)
  return sample(_keys(x_0), sampler, denoise, x_t, rising)


@check_types
def slerp(a: Array, b: Array, fraction) -> Array:
  """Interpolate spherically between samples.

  The result is `(sin((1 - f) * angle) * a + sin(f * angle) * b) / sin(angle)`, where f is `fraction` and `angle` is the
  angle between a and b over all axes except the first. If a and b are noise, the result has nearly the same norm at all
  fractions. With linear interpolation, the norm would be smaller at a fraction of 0.5 than at 0 or 1. Interpolation is
  linear for samples where a or b is 0, or where the angle is close to 0 or 180 degrees. Source: Shoemake 1985; Song et
  al. 2021a, appendix D.3.

  Args:
    a: array [B, ...], the exact result at fraction 0.
    b: array of the same shape, the exact result at fraction 1.
    fraction: a scalar or an array [B].

  Returns:
    Array [B, ...].

  Raises:
    ValueError: if the shapes of a and b differ, or `fraction` is neither a scalar nor [B].
  """
  if a.shape != b.shape or a.ndim < 1 or np.shape(fraction) not in ((), a.shape[:1]):
    raise ValueError(
      f"Got a of shape {a.shape}, b of shape {b.shape} and fraction of shape {np.shape(fraction)}; expected a and b of the"
      " same shape [B, ...], and a fraction that is a scalar or has the shape [B]."
    )
  precision = widest(a, b)
  fraction = jnp.asarray(fraction, precision).reshape((-1,) + (1,) * (a.ndim - 1))

  def norm(x):
    return jnp.sqrt(jnp.sum(x**2, axis=tuple(range(1, x.ndim)), keepdims=True))

  def unit(x):
    length = norm(x)
    return x / jnp.where(length > 0, length, 1)

  dtype = a.dtype if a.dtype == b.dtype else precision
  a, b = a.astype(precision), b.astype(precision)
  # Kahan's formula: in float32 the arc cosine of an inner product has an error of 3e-4 near 0.
  angle = 2 * jnp.arctan2(norm(unit(a) - unit(b)), norm(unit(a) + unit(b)))
  straight = (jnp.sin(angle) < 1e-4) | (norm(a) == 0) | (norm(b) == 0)
  angle = jnp.where(straight, 1, angle)

  def weight(f):
    curved = jnp.where(f == 1, 1, jnp.sin(f * angle) / jnp.sin(angle))
    return jnp.where(straight, f, curved)

  return (weight(1 - fraction) * a + weight(fraction) * b).astype(dtype)


@check_types
def interpolate(sampler: Sampler, denoise: Denoise, process: Process, a: Array, b: Array, times, fractions) -> Array:
  """Interpolate between images with `slerp` between their encodings (Song et al. 2021a, section 5.3).

  `invert` encodes the images, and `sample` decodes the interpolated encodings. The fractions are decoded one after
  another, each as a batch [B, ...], so `denoise` may contain conditions for B samples.

  Args:
    sampler: a reversible rule.
    denoise: `denoise(x_t, t) -> x_0 estimate`.
    process: the forward process.
    a: images [B, ...] at fraction 0.
    b: images at fraction 1, of the same shape.
    times: a decreasing grid, as for `invert`.
    fractions: array [F], usually from 0 to 1.

  Returns:
    Images [F, B, ...]. At fraction 0 they are the reconstructions of a, and at fraction 1 the reconstructions of b.

  Raises:
    ValueError: if the shapes of a and b differ, `fractions` is not [F], or `invert` rejects the arguments.
  """
  if a.shape != b.shape or np.ndim(fractions) != 1:
    raise ValueError(
      f"Got a of shape {a.shape}, b of shape {b.shape} and fractions of shape {np.shape(fractions)}; expected a and b of the"
      " same shape, and fractions [F]."
    )
  ends = jnp.stack([a, b])
  noise_a, noise_b = jax.lax.map(lambda x: invert(sampler, denoise, process, x, times), ends)

  def decode(fraction):
    return sample(_keys(a), sampler, denoise, slerp(noise_a, noise_b, fraction), times)

  return jax.lax.map(decode, jnp.asarray(fractions))


def _keys(x: Array) -> Array:
  """Return one key per sample.

  Deterministic rules ignore the values of keys, but the number of keys matters: with a single key for the batch, the
  steps that `ode` takes for a sample would depend on the other samples.
  """
  return jax.random.split(jax.random.key(0), x.shape[0])


def _check_decreasing(times, sampler: Sampler, x: Array) -> None:
  """Raise a ValueError unless `times` is a decreasing grid."""
  check_times(times, sampler, x)
  if not isinstance(times, jax.core.Tracer) and times[0] < times[-1]:
    raise ValueError(f"Got increasing times {np.asarray(times)}; expected the decreasing grid for decoding images.")
