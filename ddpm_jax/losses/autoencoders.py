"""Define the training objective of autoencoders."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ddpm_jax import gaussian, randomness
from ddpm_jax.arguments import check_types
from ddpm_jax.losses import adversarial, codebook
from ddpm_jax.losses.objective import Context, Objective
from ddpm_jax.losses.reconstruction import (
  Autoencoder,
  Features,
  Network,
  perceptual_distance,
  reconstruction_error,
  straight_through,
  with_gradient,
)

Array = jax.Array
PyTree = Any

# The parameters of the decoder's last layer, for the adaptive weight.
LAST_KERNEL = ("decoder", "conv_out", "kernel")
# The details whose means over the batch are metrics.
_METRICS = ("reconstruction", "perceptual", "kl", "commitment", "generator", "discriminator", "adaptive_weight")


@check_types
def autoencoding(
  autoencoder: Autoencoder,
  *,
  error: Literal["l1", "l2"] = "l1",
  kl_weight: float = 1e-6,
  commitment_weight: float = 0.25,
  codebook_decay: float = 0.99,
  codebook_restart: float = 0.03,
  perceptual: Features | None = None,
  perceptual_weight: float = 1.0,
  discriminator: Network | None = None,
  adversarial_weight: float = 0.5,
  adversarial_start: int = 50_000,
) -> Objective:
  """Train an autoencoder to reconstruct data.

  The losses follow Esser et al. (2021) and Rombach et al. (2022, appendix G). The loss of a sample is its
  `reconstruction_error`, plus `perceptual_weight` times its `perceptual_distance`, plus the loss of the bottleneck:

  - Without a codebook: `kl_weight` times the KL divergence between the posterior and a standard normal distribution,
    summed over the latents and divided by the number of data values. Rombach et al. sum both the reconstruction
    error and the KL divergence over all values, so the ratio of the two terms is the same as here.
  - With a codebook: `commitment_weight` times the mean squared distance between the encoder's vectors and their codes
    (van den Oord et al. 2017, equation 3). Each vector of the codebook is an average of the encoder's vectors
    (`update_codebook`). The objective's memory contains the codebook, and `project` copies the codebook into the
    parameters. The EMA of the parameters also averages the codebook, but one step late.

  With a discriminator, the loss has two more terms: `adversarial_weight` times the adaptive weight times the
  generator's loss, and the discriminator's hinge loss. The adaptive weight is computed from two gradients at the kernel
  of the decoder's last layer: it is the norm of the gradient of the reconstruction and perceptual terms, divided by the
  norm of the gradient of the generator's loss (Esser et al. 2021, equation 7). The adaptive weight itself receives no
  gradient. Each step uses the adaptive weight that the previous step computed from the gradients of its entire batch,
  so the weight does not depend on how a batch is split.

  Before `adversarial_start` all adversarial terms, and all gradients of the discriminator, are exactly 0. The
  discriminator is computed nevertheless, so these steps take as long as later steps. Any weight decay acts on the
  discriminator from the first step. In step `adversarial_start` the adaptive weight is still 0, so the generator's loss
  starts one step after the discriminator's loss.

  A single step trains both the autoencoder and the discriminator. Neither network receives gradients of the other
  network's loss.

  Args:
    autoencoder: the autoencoder.
    error: the error of reconstructions: "l1" or "l2".
    kl_weight: the weight of the KL divergence.
    commitment_weight: the weight of the commitment loss.
    codebook_decay: the rate of the averages that form the codebook, in [0, 1).
    codebook_restart: a code is replaced if its count is below this share of the mean count; 0 replaces no codes.
    perceptual: the frozen network whose features the perceptual loss compares; None for no perceptual loss.
    perceptual_weight: the weight of the perceptual loss.
    discriminator: the discriminator, such as `networks.PatchDiscriminator`; None for no adversarial loss.
    adversarial_weight: the factor on the adaptive weight.
    adversarial_start: the step at which the adversarial loss starts.

  Raises:
    ValueError: if a weight or `adversarial_start` is negative, `error` is unknown, or `codebook_decay` or
      `codebook_restart` is out of range.
  """
  _check_numbers(
    kl_weight=kl_weight,
    commitment_weight=commitment_weight,
    codebook_restart=codebook_restart,
    perceptual_weight=perceptual_weight,
    adversarial_weight=adversarial_weight,
    adversarial_start=adversarial_start,
  )
  if error not in ("l1", "l2") or not 0 <= codebook_decay < 1 or codebook_restart >= 1:
    raise ValueError(
      f"Got error={error!r}, codebook_decay={codebook_decay} and codebook_restart={codebook_restart}; expected"
      " error='l1' or 'l2', and codebook_decay and codebook_restart in [0, 1)."
    )

  def init(key: Array, params: PyTree, frozen: PyTree) -> tuple[PyTree, PyTree]:
    extra: Any = ()
    memory: dict[str, Any] = {}
    if autoencoder.quantize is not None:
      memory["codebook"] = codebook.init_codebook(params["codebook"]["vectors"])
    if discriminator is not None:
      x = jnp.zeros((1, *autoencoder.data_shape))
      extra = {"discriminator": discriminator.init(key, x, jnp.zeros((1,)), {})}
      memory["adaptive_weight"] = jnp.zeros((), jnp.float32)
    return extra, memory or ()

  def bottleneck(params: PyTree, x: Array, keys: Array) -> tuple[Array, Array, dict[str, Array]]:
    """Return the decoder's input, the loss of the bottleneck for each sample, and details."""
    latents = autoencoder.encode(params, x)
    if autoencoder.quantize is None:
      posterior = gaussian.from_moments(latents)
      kl = posterior.kl()
      # Other objectives fold in 0 and 1 for times and noise (`sample_noisy`), and 2 for dropout.
      return posterior.sample(randomness.fold_in(keys, 3)), kl_weight * kl / (x[0].size), {"kl": kl}
    codes, vectors = jax.lax.stop_gradient(autoencoder.quantize(params, latents))
    commitment = reconstruction_error(latents, vectors, "l2")
    details = {"commitment": commitment, "latents": jax.lax.stop_gradient(latents), "codes": codes}
    return straight_through(latents, vectors), commitment_weight * commitment, details

  def errors(frozen: PyTree, x: Array, y: Array) -> tuple[Array, dict[str, Array]]:
    """Return the loss of the reconstructions y for each sample, and the terms of this loss."""
    total = reconstruction_error(x, y, error)
    details = {"reconstruction": total}
    if perceptual is not None:
      original = jax.lax.stop_gradient(perceptual.apply(frozen, x))
      details["perceptual"] = perceptual_distance(original, perceptual.apply(frozen, y))
      total = total + perceptual_weight * details["perceptual"]
    return total, details

  def loss(trained: dict[str, PyTree], context: Context, keys: Array, batch: dict[str, PyTree]) -> tuple[Array, PyTree]:
    params, x = trained["model"], batch["x"].astype(jnp.float32)
    z, losses, details = bottleneck(params, x, keys)
    h = autoencoder.decode_features(params, z)
    y = autoencoder.decode_output(params, h)
    if discriminator is None:
      terms, more = errors(context.frozen, x, y)
      return jnp.mean(terms + losses), details | more
    value, gradients, more = _adversarial_loss(
      autoencoder,
      discriminator,
      lambda y: errors(context.frozen, x, y),
      jax.lax.stop_gradient((params, trained["extra"]["discriminator"])),
      jax.lax.stop_gradient((x, h, y)),
      adversarial_weight * context.memory["adaptive_weight"],
      context.step >= adversarial_start,
    )
    value = with_gradient(value, (y, trained["extra"]["discriminator"]), gradients)
    return value + jnp.mean(losses), details | more

  def update(key: Array, memory: PyTree, params: PyTree, details: PyTree) -> PyTree:
    new: dict[str, Any] = {}
    if "codebook" in memory:
      rates = {"decay": codebook_decay, "restart": codebook_restart}
      new["codebook"] = codebook.update_codebook(key, memory["codebook"], details["latents"], details["codes"], **rates)
    if "adaptive_weight" in memory:
      gradients = [jnp.mean(details["last_layer"][name], axis=0) for name in ("reconstruction", "generator")]
      new["adaptive_weight"] = adversarial.adaptive_weight(*gradients)
    return new or memory

  def summarize(details: PyTree) -> dict[str, Any]:
    metrics = {name: jnp.mean(value) for name, value in details.items() if name in _METRICS}
    if "codes" in details:
      counts = codebook.count_codes(details["codes"])
      metrics |= {"perplexity": codebook.perplexity(counts), "used_codes": jnp.sum(counts > 0).astype(jnp.float32)}
    return metrics

  return Objective(
    loss,
    init,
    update=update,
    summarize=summarize,
    load=None if perceptual is None else perceptual.load,
    project=_copy_codebook if autoencoder.quantize is not None else None,
  )


def _check_numbers(**numbers: float) -> None:
  for name, number in numbers.items():
    if not 0 <= number < float("inf"):
      raise ValueError(f"Got {name}={number}; expected a finite number of 0 or more. Set --config.objective.{name}.")


def _adversarial_loss(
  autoencoder: Autoencoder,
  discriminator: Network,
  errors: Callable[[Array], tuple[Array, dict[str, Array]]],
  params: tuple[PyTree, PyTree],
  arrays: tuple[Array, Array, Array],
  weight: Array,
  started: Array,
) -> tuple[Array, tuple[Array, PyTree], dict[str, PyTree]]:
  """Compute the summed loss of reconstructions, generator and discriminator, and its gradients.

  Each gradient is computed only once, for both the loss and the adaptive weight.

  Args:
    autoencoder: the autoencoder.
    discriminator: the discriminator.
    errors: `errors(y)` returns the loss of the reconstructions for each sample, and its terms.
    params: the parameters of the autoencoder and of the discriminator.
    arrays: the data, the features before the last layer, and the reconstructions.
    weight: the weight of the generator's loss.
    started: whether the adversarial loss has started.

  Returns:
    The loss, a scalar; a pair of its gradients with respect to the reconstructions and with respect to the
    discriminator's parameters; and a dict of details.
  """
  (model, judge), (x, h, y) = params, arrays

  def mean_error(y):
    losses, details = errors(y)
    return jnp.mean(losses), (losses, details)

  error_gradient, (losses, details) = jax.grad(mean_error, has_aux=True)(y)

  parts = adversarial.adversarial(discriminator, judge, x, y)
  # Before the start, select zeros. On a CPU, convolutions in branches of `lax.cond` would take very long.
  parts = jax.tree.map(lambda leaf: jnp.where(started, leaf, jnp.zeros_like(leaf)), parts)
  _, pull_back = jax.vjp(lambda kernel: autoencoder.decode_output(_with_last(model, kernel), h), _last(model))
  both = {"reconstruction": error_gradient, "generator": parts.reconstruction_gradient}
  last_layer = {name: pull_back(gradient)[0] for name, gradient in both.items()}
  count = x.shape[0]
  details |= {
    "generator": parts.generator,
    "discriminator": parts.discriminator,
    "adaptive_weight": jnp.broadcast_to(weight, (count,)),
    # Each sample gets a copy. If the batch is split, the mean of all copies is then the gradient of the entire batch.
    "last_layer": jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (count, *leaf.shape)), last_layer),
  }
  gradients = (error_gradient + weight * parts.reconstruction_gradient, parts.params_gradient)
  return jnp.mean(losses + weight * parts.generator + parts.discriminator), gradients, details


def _last(params: PyTree) -> Array:
  for name in LAST_KERNEL:
    params = params[name]
  return params


def _with_last(params: PyTree, kernel: Array, path: tuple[str, ...] = LAST_KERNEL) -> PyTree:
  name, *others = path
  return {**params, name: _with_last(params[name], kernel, tuple(others)) if others else kernel}


def _copy_codebook(params: PyTree, memory: PyTree) -> PyTree:
  return {**params, "codebook": {**params["codebook"], "vectors": memory["codebook"].vectors}}
