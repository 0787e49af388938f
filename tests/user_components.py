"""Define components of many kinds, like a user's file outside the package.

Tests copy this file and delete the copy.
"""

import string

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ddpm_jax import data, losses, models, sampling
from ddpm_jax.networks import Autoencoder
from ddpm_jax.predictions import Prediction
from ddpm_jax.processes import Process


def _waves(time):
  return jnp.stack([jnp.sin(time / 100), jnp.cos(time / 100)], -1)


class Linen(nn.Module):
  """Define a network in Flax Linen with an optional vector condition."""

  out_channels: int
  width: int = 16

  @nn.compact
  def __call__(self, x, time, vector=None):
    h = nn.Dense(self.width)(x.reshape(len(x), -1)) + nn.Dense(self.width)(_waves(time))
    if vector is not None:
      h += nn.Dense(self.width)(vector)
    return nn.Dense(x[0].size)(nn.silu(h)).reshape(*x.shape[:-1], self.out_channels)


class Reader(nn.Module):
  """Define a small network in Flax Linen that depends on the mean output of a text encoder."""

  out_channels: int
  context_features: int = 0
  width: int = 16

  @nn.compact
  def __call__(self, x, time, tokens):
    mask = tokens["mask"][..., None]
    mean = jnp.sum(tokens["states"] * mask, 1) / jnp.sum(mask, 1)
    h = nn.Dense(self.width)(x.reshape(len(x), -1)) + nn.Dense(self.width)(_waves(time)) + nn.Dense(self.width)(mean)
    return nn.Dense(x[0].size)(nn.silu(h)).reshape(*x.shape[:-1], self.out_channels)


class Nnx(nnx.Module):
  """Define a network in Flax NNX."""

  def __init__(self, shape, width: int = 16, *, rngs):
    size = int(np.prod(shape))
    self.inner = nnx.Linear(size, width, rngs=rngs)
    self.time = nnx.Linear(2, width, rngs=rngs)
    self.outer = nnx.Linear(width, size, rngs=rngs)

  def __call__(self, x, time):
    return self.outer(nnx.silu(self.inner(x.reshape(len(x), -1)) + self.time(_waves(time)))).reshape(x.shape)


class Equinox(eqx.Module):
  """Define a network in Equinox that processes one sample."""

  inner: eqx.nn.Linear
  outer: eqx.nn.Linear

  def __init__(self, shape, width: int = 16, *, key):
    size = int(np.prod(shape))
    self.inner, self.outer = eqx.nn.Linear(size + 2, width, key=key), eqx.nn.Linear(width, size, key=key)

  def __call__(self, x, time):
    return self.outer(jax.nn.silu(self.inner(jnp.concatenate([x.ravel(), _waves(time)])))).reshape(x.shape)


def sampler(process: Process, eta: float = 0.5) -> sampling.Sampler:
  """Return DDIM under another name."""
  return sampling.ddim(process, eta)


def weighting(gamma: float = 2.0) -> losses.Weighting:
  """Return the Min-SNR weighting under another name."""
  return lambda log_snr: jnp.minimum(1.0, gamma * jnp.exp(-log_snr))


def plain_weighting(log_snr):
  """Return equal weights for all times.

  This function has no annotations.
  """
  return jnp.ones_like(log_snr)


def loss(apply: losses.Apply, process: Process, prediction: Prediction, factor: float = 1.0) -> losses.Objective:
  """Return an objective that multiplies the denoising loss by a growing factor.

  The objective has memory and frozen parameters.
  """
  times = losses.uniform(process)

  def value(trained, context, keys, batch):
    def network(x, time):
      return apply(trained["model"], x, time, batch["given"], train=True, keys=keys)

    result, details = losses.denoising_loss(keys, network, process, prediction, batch["x"], times=times)
    return result * factor * context.frozen["scale"] * (1 + 0.01 * context.step + 0 * context.memory), details

  def update(key, memory, params, details):
    return 0.9 * memory + 0.1 * jnp.mean(details["loss"])

  return losses.Objective(
    value, init=lambda key, params, frozen: ((), jnp.zeros(())), update=update, load=lambda: {"scale": np.float32(2)}
  )


def brightness(name: str, size: int = 1) -> models.Condition:
  """Return a condition on the mean brightness of each image."""
  condition = models.conditions.vector(name, size, dropout=0.2)
  return condition._replace(from_data=lambda batch: jnp.mean(jnp.asarray(batch["image"]), axis=(1, 2)))


def letters(name: str, size: int = 4, dropout: float = 0.2) -> models.Condition:
  """Return a condition on the frequencies of the letters in a text, multiplied by a frozen matrix."""

  def count(texts):
    counts = [[text.count(letter) for letter in string.ascii_lowercase] for text in texts]
    return {"counts": np.array(counts, np.int64), "length": [max(len(text), 1) for text in texts]}

  def encode(frozen, keys, batch, train):
    counts, length = (batch[name][key].astype(jnp.float32) for key in ("counts", "length"))
    return counts @ frozen / length[:, None]

  return models.Condition(
    kind="vector",
    shape=jax.ShapeDtypeStruct((size,), jnp.float32),
    encode=encode,
    null=lambda frozen: jnp.zeros(size),
    dropout=dropout,
    parse=str,
    host=count,
    load=lambda: np.random.default_rng(0).normal(size=(26, size)).astype(np.float32),
  )


def patches(factor: int = 2) -> models.Codec:
  """Return a codec that moves patches of pixels into channels and multiplies by a frozen gain."""

  def encode(frozen, keys, x):
    b, h, w, c = x.shape
    x = x.reshape(b, h // factor, factor, w // factor, factor, c).transpose(0, 1, 3, 2, 4, 5)
    return frozen["gain"] * x.reshape(b, h // factor, w // factor, factor * factor * c)

  def decode(frozen, x):
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, factor, factor, c // factor**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * factor, w * factor, c // factor**2) / frozen["gain"]

  return models.Codec(encode, decode, load=lambda: {"gain": np.float32(0.9)})


def tiny_autoencoder(
  data_shape: tuple[int, ...],
  seed: int = 0,
  posterior: str = "sample",
  bottleneck: str = "kl",
  tile: int = 0,
  latent_channels: int = 2,
  levels: int = 2,
) -> models.Codec:
  """Return the codec of a small autoencoder with random weights.

  With the default number of levels, the codec halves the height and the width.
  """
  codes = {"num_codes": 8} if bottleneck == "vq" else {}
  options = {"channels": 4, "multipliers": (1,) * levels, "blocks": 1, "groups": 2, "middle_attention": False}
  module = Autoencoder(data_shape[-1], latent_channels, bottleneck=bottleneck, **codes, **options)
  functions = models.networks.autoencoder(models.networks.from_linen(module, {}), data_shape)

  def init(key):
    return module.init(key, jnp.zeros((1, *data_shape)))["params"]

  def load():
    scale, shift = np.float32([0.5, 2] * latent_channels), np.float32([0.1, -1] * latent_channels)
    return {
      "autoencoder": init(jax.random.key(seed)),
      "scale": scale[:latent_channels],
      "shift": shift[:latent_channels],
    }

  return models.codecs.latent(functions, load, posterior=posterior, tile=tile)


def source(fit: data.Fit, count: int = 150) -> data.Splits:
  """Return random images as training data."""
  images = np.random.default_rng(0).integers(0, 256, (count, *fit.shape), np.uint8)
  return data.Splits(data.ArraySource(images))
