"""Encode prompts in chunks, and multiply the encoder's outputs by the tokens' weights (see `data.prompts`)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ddpm_jax.arguments import check_types

Array = jax.Array


@check_types
def encode_weighted(encode: Callable[[Array], Array], ids: Array, weights: Array, *, keep_mean: bool = True) -> Array:
  """Encode prompts, and multiply the encoder's outputs by the tokens' weights.

  The encoder's outputs are called states. The encoder reads each chunk independently, and the states of a prompt's
  chunks follow one another. The states z of a chunk become w z m / m', where w are the weights, m is the mean of z, and
  m' is the mean of w z. This is the "original" emphasis of AUTOMATIC1111's stable-diffusion-webui
  (modules/sd_emphasis.py), but that program takes the means over all prompts of a batch. Here, a prompt's states do not
  depend on the other prompts. For a batch of one prompt, this function and that program return the same states.

  Args:
    encode: `encode(ids [N, L]) -> states [N, L, D]`, the text encoder.
    ids: the token ids, int32 [B, C, L], of B prompts in C chunks of L tokens.
    weights: the weights [B, C, L].
    keep_mean: whether to multiply by m / m'. False corresponds to the emphasis "No norm" of stable-diffusion-webui.

  Returns:
    The states [B, C L, D], in the type that `encode` returns.

  Raises:
    ValueError: if the shapes of `ids` and `weights` differ or do not have three axes, or `encode` returns another shape
      than [N, L, D].
  """
  ids, weights = jnp.asarray(ids), jnp.asarray(weights)
  if ids.ndim != 3 or ids.shape != weights.shape:
    raise ValueError(
      f"Got ids of shape {ids.shape} and weights of shape {weights.shape}; expected [B, C, L] for both. Use"
      " data.prompts.tokenize."
    )
  batch, chunks, length = ids.shape
  states = encode(ids.reshape(-1, length))
  if states.ndim != 3 or states.shape[:2] != (batch * chunks, length):
    raise ValueError(
      f"Got states of shape {states.shape} for {batch * chunks} chunks of {length} tokens; expected"
      f" [{batch * chunks}, {length}, D]. Pass a function that returns the states of all tokens."
    )
  return weigh(states, weights, keep_mean=keep_mean)


def weigh(states: Array, weights: Array, *, keep_mean: bool = True) -> Array:
  """Multiply the encoder's outputs by the tokens' weights, and join the chunks of each prompt.

  Args:
    states: the encoder's outputs for the chunks of all prompts [B C, L, D].
    weights: the weights [B, C, L].
    keep_mean: see `encode_weighted`.

  Returns:
    The weighted states [B, C L, D], in the type of `states`.
  """
  batch, chunks, length = weights.shape
  wide = states.astype(jnp.promote_types(states.dtype, jnp.float32))
  weighted = wide * jnp.reshape(weights, (-1, length, 1)).astype(wide.dtype)
  if keep_mean:
    mean, new_mean = (jnp.mean(z, axis=(1, 2), keepdims=True) for z in (wide, weighted))
    weighted = weighted * jnp.where(new_mean == 0, 1, mean / jnp.where(new_mean == 0, 1, new_mean))
  return weighted.reshape(batch, chunks * length, -1).astype(states.dtype)
