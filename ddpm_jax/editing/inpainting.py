"""Replace the known pixels of x_t at every step with newly noised pixels of the image, for inpainting.

Neither `replace` nor `repaint` samples the exact posterior. The network sees the known pixels only with noise, and each
step chooses this noise independently of the unknown pixels. `editing.posterior` with `mask_operator(keep)` is more
accurate, but it needs derivatives of the network.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import randomness
from ddpm_jax.arguments import check_types
from ddpm_jax.editing.operators import can_broadcast, check_boolean
from ddpm_jax.predictions import Denoise
from ddpm_jax.processes import Process, check_floats
from ddpm_jax.sampling import Sampler
from ddpm_jax.sampling.core import safe_sqrt, with_many_steps

# Maps images to x, or x to images.
Transform = Callable[[jax.Array], jax.Array]


@check_types
def replace(sampler: Sampler, process: Process, image, keep) -> Sampler:
  """Replace the known pixels of x_t before each step.

  Each step first replaces the known pixels of x_t with a new sample of q(x_t | x_0), where x_0 is the image. After a
  step to clean data, the known pixels of x and of the image are equal, bit for bit. Source: Song et al. 2021, appendix
  I.2; Lugmayr et al. 2022, equation 8.

  Args:
    sampler: the step rule.
    process: the forward process of the sampler.
    image: an image with known pixels, floats that broadcast to x [B, ...]. Unknown pixels may have any value, even NaN.
    keep: booleans that broadcast to x, such as [H, W, 1]. True marks a known pixel.

  Raises:
    ValueError: if `image` does not hold floats, `keep` does not hold booleans, or the two shapes do not broadcast to a
      common shape. A step raises a ValueError if `image` or `keep` does not broadcast to the shape of x.
  """
  _check_image(image, keep)

  def step(key, denoise, x_t, memory, t, s):
    if not all(can_broadcast(np.shape(array), x_t.shape) for array in (image, keep)):
      raise ValueError(
        f"Got x of shape {x_t.shape}, an image of shape {np.shape(image)} and a mask of shape {np.shape(keep)}; expected"
        " the image and the mask to broadcast to x."
      )
    known = jnp.broadcast_to(jnp.where(keep, image, 0), x_t.shape).astype(x_t.dtype)
    noisy = process.sample_marginal(randomness.fold_in(key, 1), known, t)
    x_t = jnp.where(keep, noisy, x_t)
    x_s, memory = sampler.step(randomness.fold_in(key, 0), denoise, x_t, memory, t, s)
    return jnp.where(keep & (process.sigma(s) == 0), known, x_s.astype(x_t.dtype)), memory

  def prepare(num_steps: int) -> Sampler:
    return replace(sampler.prepare(num_steps), process, image, keep)  # type: ignore[misc]

  prepared = None if sampler.prepare is None else prepare
  return with_many_steps(sampler)._replace(step=step, reversible=False, prepare=prepared)


@check_types
def repaint(sampler: Sampler, process: Process, image, keep, resamples: int = 10, jump: int = 1) -> Sampler:
  """Take each step of inpainting several times (RePaint, Lugmayr et al. 2022, algorithm 1).

  Repeating a step lets the unknown pixels adapt to the known pixels. The wrapper takes each step from t to s
  `resamples` times and replaces known pixels like `replace`. Between repetitions, the wrapper returns from s to t with
  a sample of q(x_t | x_s). As in the paper, the step to clean data is taken only once.

  `sampling.nfe` counts the network calls exactly, unless `jump` is above 1 and the grid is a single step from zero SNR.

  Args:
    sampler: a rule without memory. The paper uses `sampling.ancestral`.
    process: the forward process of the sampler.
    image: an image with known pixels, as for `replace`.
    keep: the mask of known pixels, as for `replace`.
    resamples: how often each step is taken (U in the paper). If `resamples` and `jump` are 1, the rule differs from
      `replace` only in its random numbers.
    jump: the jump length in the paper. Each step from t to s is divided into this many parts of equal length in t. A
      single sample of q(x_t | x_s) returns from s to t. If the network was trained on discrete time steps, use a grid
      in which the number of these time steps between t and s is a multiple of `jump`. Then the parts start and end at
      times that the network was trained on.

  Raises:
    ValueError: if the rule has memory (a counter of network calls is allowed), if `resamples` or `jump` is not an
      integer of at least 1, or if `replace` rejects `image` or `keep`.
  """
  for name, value in (("resamples", resamples), ("jump", jump)):
    if value != int(value) or value < 1:
      raise ValueError(f"Got {name}={value}; expected an integer of at least 1, such as 10.")
  resamples, jump = int(resamples), int(jump)
  inner = replace(sampler, process, image, keep)
  shape = np.broadcast_shapes(np.shape(image), np.shape(keep))
  memory = jax.tree.leaves(jax.eval_shape(sampler.init, jax.ShapeDtypeStruct(shape, jnp.result_type(image))))
  # A memory of call counts alone is allowed: it stays correct when x returns to t.
  if memory and not (
    sampler.count_calls is not None and all(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in memory)
  ):
    raise ValueError(
      "Got a rule that remembers previous steps; expected a rule without memory, because RePaint repeats steps. Use"
      " sampling.ancestral, ddim, heun, dpm_solver, dpmpp_2s, dpmpp_sde or ode."
    )

  def step(key, denoise, x_t, memory, t, s):
    def descend(carry, key):
      def part(carry, index):
        x, memory = carry
        start, end = (t + (s - t) * i.astype(t.dtype) / jump for i in (index, index + 1))
        end = jnp.where(index + 1 < jump, end, s)  # the last part ends exactly at s
        x, memory = inner.step(randomness.fold_in(key, index), denoise, x, memory, start, end)
        return (x.astype(x_t.dtype), memory), None

      return jax.lax.scan(part, carry, jnp.arange(jump))[0]

    def repeat(carry, index):
      x, memory = carry
      up, down = (randomness.fold_in(randomness.fold_in(key, index), i) for i in range(2))
      noise = randomness.normal(up, x.shape, x.dtype)
      returned = process.alpha(t) / process.alpha(s) * x + safe_sqrt(process.step_variance(t, s)) * noise
      start = jnp.where(index > 0, returned, x).astype(x.dtype)
      is_done = (process.sigma(s) == 0) & (index > 0)
      return jax.lax.cond(is_done, lambda: carry, lambda: descend((start, memory), down)), None

    # The scan includes the first pass, so the network is traced only once.
    return jax.lax.scan(repeat, (x_t, memory), jnp.arange(resamples))[0]

  def prepare(num_steps: int) -> Sampler:
    # Some rules spread a quantity, such as churn, over their steps. Here each part of a step counts as one step, and
    # repetitions do not count.
    return repaint(sampler.prepare(num_steps * jump), process, image, keep, resamples, jump)  # type: ignore[misc]

  between, to_data, at_zero_snr = sampler.calls
  calls = (
    resamples * jump * between,
    (jump - 1) * between + to_data,
    resamples * (at_zero_snr + (jump - 1) * between),
  )
  prepared = None if sampler.prepare is None else prepare
  return inner._replace(step=step, calls=calls, prepare=prepared)


def _check_image(image, keep) -> None:
  check_floats(jnp.asarray(image))
  check_boolean(keep)
  try:
    np.broadcast_shapes(np.shape(image), np.shape(keep))
  except ValueError as error:
    raise ValueError(
      f"Got an image of shape {np.shape(image)} and a mask of shape {np.shape(keep)}; expected shapes that broadcast,"
      " such as images [B, H, W, C] and a mask [H, W, 1]."
    ) from error


@check_types
def replace_decoded(denoise: Denoise, image, keep, encode: Transform, decode: Transform) -> Denoise:
  """Replace the known pixels of each decoded estimate, for inpainting with a model of latents.

  The estimate of x_0 is decoded, its known pixels are replaced, and the result is encoded again. Known pixels then
  guide the unknown pixels in every step, and the mask has the resolution of the image. Each estimate costs one call of
  the decoder and one of the encoder. In contrast, `replace` and `repaint` need a mask at the resolution of the latents.

  Args:
    denoise: `denoise(x_t, t) -> x_0 estimate` of a model of latents.
    image: images [B, H, W, C] with known pixels. Unknown pixels may have any value, even NaN.
    keep: booleans that broadcast to the image. True marks a known pixel.
    encode: a function from images to latents. It must return the same latents whenever it gets the same images.
    decode: a function from latents to images.

  Raises:
    ValueError: if `image` does not hold floats, `keep` does not hold booleans, or the two shapes do not broadcast to a
      common shape.
  """
  _check_image(image, keep)

  def replaced(x_t, t):
    decoded = decode(denoise(x_t, t))
    return encode(jnp.where(keep, image, decoded)).astype(x_t.dtype)

  return replaced


def shrink_mask(keep, shape: tuple[int, ...]):
  """Reduce a mask of images to the resolution of their latents.

  A position of the latents is known if all pixels of the image at this position are known.

  Args:
    keep: booleans [B, H, W, 1] at the resolution of the image.
    shape: the shape [h, w, C] of the latents of one image. H must be a multiple of h, and W a multiple of w.

  Returns:
    Booleans [B, h, w, 1].
  """
  for axis, size in enumerate(shape[:-1], start=1):
    keep = keep.reshape(*keep.shape[:axis], size, -1, *keep.shape[axis + 1 :]).all(axis + 1)
  return keep
