"""Inpainting by replacement, wrappers `Sampler -> Sampler`: what is known of x_t is drawn anew at every step.

Neither is exact: the network sees the known pixels as noisy as the others, and a step knows nothing of what later ones will
be told. `editing.posterior` with `mask_operator(keep)` looks ahead, at the cost of derivatives of the network.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import randomness
from ddpm_jax.arguments import check_types
from ddpm_jax.editing.operators import broadcasts, check_boolean
from ddpm_jax.processes import Process, check_floats
from ddpm_jax.sampling import Sampler
from ddpm_jax.sampling.core import safe_sqrt, with_many_steps


@check_types
def replace(sampler: Sampler, process: Process, known, keep) -> Sampler:
  """Inpainting by replacement (Song et al. 2021, appendix I.2; Lugmayr et al. 2022, equation 8).

  Before each step the known pixels of x_t are overwritten by a fresh draw of q(x_t | known); after a step to clean data
  they are the input's, bit for bit.

  Args:
    sampler: the step rule.
    process: its process.
    known: the image, of floats that broadcast against x [B, ...]; what it holds elsewhere is not read.
    keep: booleans that broadcast against x, such as [H, W, 1]; True where `known` counts.

  Raises:
    ValueError: if `known` is not of floats, `keep` not of booleans, or their shapes do not broadcast; in a step, if they do
      not broadcast to the shape of x.
  """
  _check_known(known, keep)

  def step(key, denoise, x_t, memory, t, s):
    if not all(broadcasts(np.shape(array), x_t.shape) for array in (known, keep)):
      raise ValueError(
        f"Got x of shape {x_t.shape}, known pixels {np.shape(known)} and a mask {np.shape(keep)}; expected them to broadcast to x."
      )
    image = jnp.broadcast_to(jnp.where(keep, known, 0), x_t.shape).astype(x_t.dtype)
    noisy = process.sample_marginal(randomness.fold_in(key, 1), image, t)
    x_t = jnp.where(keep, noisy, x_t)
    x_s, memory = sampler.step(randomness.fold_in(key, 0), denoise, x_t, memory, t, s)
    return jnp.where(keep & (process.sigma(s) == 0), image, x_s.astype(x_t.dtype)), memory

  def prepare(num_steps: int) -> Sampler:
    return replace(sampler.prepare(num_steps), process, known, keep)  # type: ignore[misc]

  prepared = None if sampler.prepare is None else prepare
  return with_many_steps(sampler)._replace(step=step, reversible=False, prepare=prepared)


@check_types
def repaint(sampler: Sampler, process: Process, known, keep, resamples: int = 10, jump: int = 1) -> Sampler:
  """RePaint (Lugmayr et al. 2022, algorithm 1): each step is made again and again, so that the unknown part fits the known.

  A step from t to s is made `resamples` times, each but the first from where q(x_t | x_s) leads back up to; known pixels are
  replaced as by `replace`. As in the paper, the step to clean data is made once.

  Args:
    sampler: a rule without memory; the paper's is `sampling.ancestral`.
    process: its process.
    known: as for `replace`.
    keep: as for `replace`.
    resamples: how often a step is made, the paper's U; 1 is `replace`.
    jump: a step goes from t to s in so many parts, equal in t, and back up over all of them at once: the paper's jump
      length. With a discrete network, t and s should be a multiple of `jump` steps apart, so that it knows the times between.

  `sampling.nfe` is exact, but for a grid of one step from where no data is left, which `jump` divides.

  Raises:
    ValueError: if the rule remembers something, `resamples` or `jump` is no whole number of at least 1, or `known` and
      `keep` are not as for `replace`.
  """
  for name, value in (("resamples", resamples), ("jump", jump)):
    if value != int(value) or value < 1:
      raise ValueError(f"Got {name}={value}; expected a whole number of at least 1, such as 10.")
  resamples, jump = int(resamples), int(jump)
  inner = replace(sampler, process, known, keep)
  shape = np.broadcast_shapes(np.shape(known), np.shape(keep))
  memory = jax.tree.leaves(jax.eval_shape(sampler.init, jax.ShapeDtypeStruct(shape, jnp.result_type(known))))
  # Counts of network calls are right wherever x comes from.
  if memory and not (
    sampler.count_calls is not None and all(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in memory)
  ):
    raise ValueError(
      "Got a rule that remembers its last steps, which going back up would make wrong; expected one without memory, such as"
      " sampling.ancestral, ddim, heun, dpm_solver, dpmpp_2s, dpmpp_sde or ode."
    )

  def step(key, denoise, x_t, memory, t, s):
    def descend(carry, key):
      def part(carry, index):
        x, memory = carry
        start, end = (t + (s - t) * i.astype(t.dtype) / jump for i in (index, index + 1))
        end = jnp.where(index + 1 < jump, end, s)  # exactly
        x, memory = inner.step(randomness.fold_in(key, index), denoise, x, memory, start, end)
        return (x.astype(x_t.dtype), memory), None

      return jax.lax.scan(part, carry, jnp.arange(jump))[0]

    def again(carry, index):
      x, memory = carry
      up, down = (randomness.fold_in(randomness.fold_in(key, index), i) for i in range(2))
      noise = randomness.normal(up, x.shape, x.dtype)
      higher = process.alpha(t) / process.alpha(s) * x + safe_sqrt(process.step_variance(t, s)) * noise
      x_again = jnp.where(index > 0, higher, x).astype(x.dtype)
      once = (process.sigma(s) == 0) & (index > 0)
      return jax.lax.cond(once, lambda: carry, lambda: descend((x_again, memory), down)), None

    # One trace of the network serves the first time and all others.
    return jax.lax.scan(again, (x_t, memory), jnp.arange(resamples))[0]

  def prepare(num_steps: int) -> Sampler:
    # What a rule spreads over its steps, it spreads over the way down: going back up does not count.
    return repaint(sampler.prepare(num_steps * jump), process, known, keep, resamples, jump)  # type: ignore[misc]

  between, to_data, at_zero_snr = sampler.calls
  calls = (
    resamples * jump * between,
    (jump - 1) * between + to_data,
    resamples * (at_zero_snr + (jump - 1) * between),
  )
  prepared = None if sampler.prepare is None else prepare
  return inner._replace(step=step, calls=calls, prepare=prepared)


def _check_known(known, keep) -> None:
  check_floats(jnp.asarray(known))
  check_boolean(keep)
  try:
    np.broadcast_shapes(np.shape(known), np.shape(keep))
  except ValueError as error:
    raise ValueError(
      f"Got known pixels of shape {np.shape(known)} and a mask of shape {np.shape(keep)}; expected shapes that broadcast, such as"
      " images [B, H, W, C] and a mask [H, W, 1]."
    ) from error
