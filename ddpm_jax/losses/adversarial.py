"""Compute the adversarial loss of autoencoders, with a discriminator of patches and an adaptive weight."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax.losses.reconstruction import Network

Array = jax.Array
PyTree = Any

# Equation 7 of Esser et al. (2021) contains delta. Their code also limits the weight.
_DELTA, _MAX_WEIGHT = 1e-6, 1e4


class Adversarial(NamedTuple):
  """Hold the adversarial losses of a batch, and their gradients.

  Attributes:
    generator: the generator's loss for each sample [B]. It is the negative mean of the discriminator's outputs for the
      reconstruction.
    discriminator: the hinge loss of the discriminator for each sample [B].
    reconstruction_gradient: the gradient of the mean of `generator` with respect to the reconstructions [B, ...].
    params_gradient: the gradient of the mean of `discriminator` with respect to the discriminator's parameters.
  """

  generator: Array
  discriminator: Array
  reconstruction_gradient: Array
  params_gradient: PyTree


def hinge_loss(real: Array, fake: Array) -> Array:
  """Compute the hinge loss of a discriminator for each sample [B] (Lim and Ye 2017, equation 3).

  Args:
    real: the discriminator's outputs for data [B, ...], one for each patch.
    fake: the discriminator's outputs for reconstructions [B, ...], one for each patch.
  """
  return 0.5 * (_mean(jax.nn.relu(1 - real)) + _mean(jax.nn.relu(1 + fake)))


def adversarial(discriminator: Network, params: PyTree, x: Array, y: Array) -> Adversarial:
  """Compute the losses of a generator and its discriminator, and the gradients of both losses.

  Args:
    discriminator: the discriminator. It maps data [B, ...] to one output per patch [B, ...].
    params: its parameters.
    x: the data [B, ...].
    y: the reconstructions [B, ...].
  """

  def judge(params: PyTree, x: Array) -> Array:
    outputs = discriminator.apply(params, x, jnp.zeros(x.shape[:1]), {}, train=True)
    return outputs.astype(jnp.float32)

  def generator_loss(y):
    losses = -_mean(judge(params, y))
    return jnp.mean(losses), losses

  def discriminator_loss(params):
    losses = hinge_loss(judge(params, x), judge(params, y))
    return jnp.mean(losses), losses

  reconstruction_gradient, generator = jax.grad(generator_loss, has_aux=True)(y)
  params_gradient, losses = jax.grad(discriminator_loss, has_aux=True)(params)
  return Adversarial(generator, losses, reconstruction_gradient, params_gradient)


def adaptive_weight(reconstruction: Array, generator: Array) -> Array:
  """Compute the adaptive weight of the adversarial loss (Esser et al. 2021, equation 7).

  The weight is the norm of `reconstruction` divided by the norm of `generator`. Multiplied by the weight, the gradient
  `generator` has the same norm as `reconstruction`. The weight is at most 10,000, and it is 0 if `generator` is 0.

  Args:
    reconstruction: the gradient of the reconstruction loss at the last layer of the decoder.
    generator: the gradient of the adversarial loss at the same layer.
  """
  norms = [jnp.sqrt(jnp.sum(jnp.square(gradient.astype(jnp.float32)))) for gradient in (reconstruction, generator)]
  weight = jnp.minimum(norms[0] / (norms[1] + _DELTA), _MAX_WEIGHT)
  return jnp.where(norms[1] > 0, weight, 0.0)


def _mean(outputs: Array) -> Array:
  return jnp.mean(outputs.reshape(outputs.shape[0], -1), axis=-1)
