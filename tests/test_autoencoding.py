"""Test the losses, the codebook and the discriminator of autoencoders on small networks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax import gaussian, losses, models, networks, randomness, training
from ddpm_jax.devices import parallel
from ddpm_jax.losses import adversarial, codebook, reconstruction
from ddpm_jax.training import ema, optim

SHAPE, BATCH, CHANNELS, HIDDEN, CODES = (4, 4, 2), 8, 3, 5, 6
KEYS = jax.random.split(jax.random.key(1), BATCH)
PARTS = ("reconstruction", "generator")


def toy(kind="kl"):
  """Return a small autoencoder that multiplies the features at each position by matrices."""

  def quantize(params, z):
    distances = jnp.sum((z[..., None, :] - params["codebook"]["vectors"]) ** 2, -1)
    codes = jnp.argmin(distances, -1)
    return codes, params["codebook"]["vectors"][codes]

  return losses.Autoencoder(
    lambda params, x: x @ params["encoder"],
    lambda params, z: jnp.tanh(z @ params["decoder"]["first"]),
    lambda params, h: h @ params["decoder"]["conv_out"]["kernel"] + params["decoder"]["conv_out"]["bias"],
    quantize if kind == "vq" else None,
    SHAPE,
  )


def make_params(kind="kl"):
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.normal(0, 0.7, shape), jnp.float32)

  params = {"encoder": draw(SHAPE[-1], CHANNELS * (2 if kind == "kl" else 1))}
  params["decoder"] = {
    "first": draw(CHANNELS, HIDDEN),
    "conv_out": {"kernel": draw(HIDDEN, SHAPE[-1]), "bias": draw(SHAPE[-1])},
  }
  return params | ({"codebook": {"vectors": draw(CODES, CHANNELS)}} if kind == "vq" else {})


class Critic:
  """Score each position by a network of two layers."""

  def init(self, key, x, time, given):
    first, last = jax.random.split(key)
    return {"first": jax.random.normal(first, (x.shape[-1], 4)), "last": jax.random.normal(last, (4, 1))}

  def apply(self, params, x, time, given, *, train=False, keys=None):
    return jnp.tanh(x @ params["first"]) @ params["last"]


FEATURES = losses.Features(
  lambda frozen, images: [jnp.tanh(images @ frozen), images[:, ::2] @ frozen],
  lambda: jnp.asarray(np.random.default_rng(5).normal(size=(SHAPE[-1], 4)), jnp.float32),
)


def data(seed=2):
  return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (BATCH, *SHAPE)), jnp.float32)


def context(objective, params, step=0, **memory):
  frozen = () if objective.load is None else objective.load()
  extra, first = objective.init(jax.random.key(0), params, frozen)
  changed = first | memory if memory else first
  return extra, losses.Context(jnp.asarray(step, jnp.int32), frozen, None, changed)


def evaluate(objective, params, extra, context, x=None, keys=KEYS):
  trained = {"model": params, "extra": extra}
  function = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
  return function(trained, context, keys, {"x": data() if x is None else x, "given": {}})


def assert_trees_close(a, b, **options):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **({"rtol": 2e-5, "atol": 1e-7} | options)), a, b)


def test_errors_and_features_in_closed_form():
  x, y = data(), data(3)
  np.testing.assert_allclose(losses.reconstruction_error(x, y), np.mean(np.abs(x - y), (1, 2, 3)), rtol=1e-6)
  np.testing.assert_allclose(losses.reconstruction_error(x, y, "l2"), np.mean((x - y) ** 2, (1, 2, 3)), rtol=1e-6)
  # Orthogonal features of norm 1 differ by 2, whatever their lengths were.
  one, two = np.zeros((2, 3, 3, 4), np.float32), np.zeros((2, 3, 3, 4), np.float32)
  one[..., 0], two[..., 1] = 3, 7
  np.testing.assert_allclose(losses.perceptual_distance([one, one], [two, 2 * one]), [1, 1], rtol=1e-6)
  gradient = jax.grad(lambda y: losses.perceptual_distance([jnp.asarray(one)], [y]).sum())(jnp.zeros(one.shape))
  assert np.isfinite(gradient).all()
  with pytest.raises(ValueError, match="expected one or more maps of equal shapes"):
    losses.perceptual_distance([one], [two[:, 1:]])
  with pytest.raises(ValueError, match="expected equal shapes"):
    losses.reconstruction_error(x, y[:1])


def test_the_loss_is_the_sum_of_its_terms():
  params, x = make_params(), data()
  for error in ("l1", "l2"):
    objective = losses.autoencoding(toy(), error=error, kl_weight=0.1, perceptual=FEATURES, perceptual_weight=0.3)
    extra, state = context(objective, params)
    (loss, details), _ = evaluate(objective, params, extra, state)
    moments = x @ params["encoder"]
    mean, log_variance = moments[..., :CHANNELS], jnp.clip(moments[..., CHANNELS:], -30, 20)
    eps = randomness.normal(randomness.fold_in(KEYS, 3), mean.shape)
    z = mean + jnp.exp(log_variance / 2) * eps
    y = toy().decode_output(params, toy().decode_features(params, z))
    kl = 0.5 * jnp.sum(mean**2 + jnp.exp(log_variance) - 1 - log_variance, (1, 2, 3))
    distance = losses.perceptual_distance(*(FEATURES.apply(FEATURES.load(), images) for images in (x, y)))
    terms = losses.reconstruction_error(x, y, error) + 0.3 * distance + 0.1 * kl / x[0].size
    np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-5)
    np.testing.assert_allclose(details["kl"], kl, rtol=1e-5)
    assert objective.summarize(details).keys() == {"reconstruction", "perceptual", "kl"}


def test_a_standard_normal_posterior_costs_nothing():
  moments = jnp.zeros((2, 3, 3, 4))
  np.testing.assert_array_equal(gaussian.from_moments(moments).kl(), [0, 0])


def test_the_straight_through_gradient_is_that_of_the_input():
  z, vectors, weights = data(), data(3), data(4)
  through = jax.grad(lambda z: jnp.sum(weights * losses.straight_through(z, vectors)))(z)
  np.testing.assert_array_equal(through, weights)
  np.testing.assert_allclose(losses.straight_through(z, vectors), vectors, atol=1e-6)
  assert not np.any(jax.grad(lambda vectors: jnp.sum(losses.straight_through(z, vectors)))(vectors))


def test_a_codebook_receives_no_gradient_and_its_encoder_the_commitment():
  params = make_params("vq")
  objective = losses.autoencoding(toy("vq"), commitment_weight=0.5, error="l2")
  extra, state = context(objective, params)
  (loss, details), gradient = evaluate(objective, params, extra, state)
  assert not np.any(gradient["model"]["codebook"]["vectors"])

  def direct(params):
    z = data() @ params["encoder"]
    codes, vectors = toy("vq").quantize(make_params("vq"), z)
    y = toy().decode_output(params, toy().decode_features(params, z + jax.lax.stop_gradient(vectors - z)))
    return jnp.mean((data() - y) ** 2) + 0.5 * jnp.mean((z - vectors) ** 2), codes

  (expected, codes), expected_gradient = jax.value_and_grad(direct, has_aux=True)(params)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert_trees_close(gradient["model"], expected_gradient, atol=1e-6)
  metrics = objective.summarize(details)
  shares = np.bincount(np.asarray(codes).ravel(), minlength=CODES) / codes.size
  assert metrics["used_codes"] == np.count_nonzero(shares)
  entropy = -sum(share * np.log(share) for share in shares if share)
  np.testing.assert_allclose(metrics["perplexity"], np.exp(entropy), rtol=1e-5)


def test_a_codebook_without_memory_is_a_step_of_k_means():
  rng = np.random.default_rng(0)
  z, vectors = rng.normal(size=(40, 2)).astype(np.float32), rng.normal(size=(4, 2)).astype(np.float32)
  codes = np.argmin(((z[:, None] - vectors) ** 2).sum(-1), -1)
  state = losses.update_codebook(jax.random.key(0), losses.init_codebook(jnp.asarray(vectors)), z, codes, decay=0.0)
  for code in range(4):
    np.testing.assert_allclose(state.vectors[code], z[codes == code].mean(0), rtol=1e-3)


def test_a_codebook_is_the_weighted_mean_of_all_batches():
  rng = np.random.default_rng(1)
  state, decay = losses.init_codebook(jnp.zeros((3, 2))), 0.9
  counts, sums = np.zeros(3), np.zeros((3, 2))
  for step in range(5):
    z, codes = rng.normal(size=(12, 2)).astype(np.float32), np.arange(12) % 3
    state = losses.update_codebook(jax.random.key(step), state, z, codes, decay=decay)
    members = np.eye(3)[codes]
    counts, sums = decay * counts + (1 - decay) * members.sum(0), decay * sums + (1 - decay) * members.T @ z
  np.testing.assert_allclose(state.vectors, sums / counts[:, None], rtol=1e-3)
  np.testing.assert_allclose(state.counts, counts, rtol=1e-5)


def test_vectors_of_the_batch_replace_dead_codes():
  z = jnp.asarray(np.random.default_rng(2).normal(size=(20, 2)), jnp.float32)
  initial = losses.init_codebook(100 + jnp.zeros((5, 2)))
  codes = jnp.asarray([0, 1] * 10)
  state = losses.update_codebook(jax.random.key(0), initial, z, codes)
  for code in (2, 3, 4):
    assert np.min(np.abs(z - state.vectors[code]).max(-1)) < 1e-3
    np.testing.assert_allclose(state.counts[code], 20 * 0.01 / 5, rtol=1e-4)
  np.testing.assert_allclose(state.vectors[0], z[::2].mean(0), rtol=1e-3)
  # Without replacements, unused codes keep their vectors.
  kept = losses.update_codebook(jax.random.key(0), initial, z, codes, restart=0.0)
  np.testing.assert_array_equal(kept.vectors[2:], initial.vectors[2:])
  other = losses.update_codebook(jax.random.key(1), initial, z, codes)
  assert np.any(other.vectors[2:] != state.vectors[2:])


def test_perplexity_counts_equally_frequent_codes():
  counts = codebook.count_codes(jnp.asarray([[3, 3, 7], [7, 9, 9]]))
  np.testing.assert_array_equal(np.sort(counts)[::-1], [2, 2, 2, 0, 0, 0])
  np.testing.assert_allclose(losses.perplexity(counts), 3, rtol=1e-6)
  np.testing.assert_allclose(losses.perplexity(jnp.asarray([4.0, 0.0])), 1)


def last_layer_gradients(params, critic, x):
  """Return the gradients of the reconstruction and generator losses with respect to the kernel of the last layer.

  The function computes the gradients directly, for the entire batch.
  """
  moments = x @ params["encoder"]
  posterior = gaussian.from_moments(moments)
  h = toy().decode_features(params, posterior.sample(randomness.fold_in(KEYS, 3)))

  def output(kernel):
    return h @ kernel + params["decoder"]["conv_out"]["bias"]

  kernel = params["decoder"]["conv_out"]["kernel"]
  error = jax.grad(lambda kernel: jnp.mean(jnp.abs(x - output(kernel))))(kernel)
  generator = jax.grad(lambda kernel: -jnp.mean(Critic().apply(critic, output(kernel), None, {})))(kernel)
  return error, generator


def test_the_adaptive_weight_is_the_ratio_of_norms_for_any_split_of_the_batch():
  params, x = make_params(), data()
  objective = losses.autoencoding(toy(), discriminator=Critic(), adversarial_start=0)
  extra, state = context(objective, params)
  error, generator = last_layer_gradients(params, extra["discriminator"], x)
  expected = jnp.linalg.norm(error) / (jnp.linalg.norm(generator) + 1e-6)
  weights = []
  for parts in (1, 2, 4):
    size = BATCH // parts
    slices = [slice(i * size, (i + 1) * size) for i in range(parts)]
    details = [evaluate(objective, params, extra, state, x[part], KEYS[part])[0][1] for part in slices]
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *details)
    np.testing.assert_allclose(joined["last_layer"]["generator"].mean(0), generator, rtol=1e-4, atol=1e-6)
    weights.append(objective.update(jax.random.key(0), state.memory, params, joined)["adaptive_weight"])
  np.testing.assert_allclose(weights, [expected] * 3, rtol=1e-4)
  assert losses.adaptive_weight(error, 0 * generator) == 0
  assert losses.adaptive_weight(error, 1e-9 * generator) <= 1e4


def test_generator_and_discriminator_learn_from_their_own_losses_only():
  params, x, weight = make_params(), data(), 3.0
  objective = losses.autoencoding(toy(), discriminator=Critic(), adversarial_start=0, adversarial_weight=0.5)
  extra, state = context(objective, params, adaptive_weight=jnp.float32(weight))
  (loss, details), gradient = evaluate(objective, params, extra, state)
  critic = extra["discriminator"]

  def reconstruct(params):
    posterior = gaussian.from_moments(x @ params["encoder"])
    z = posterior.sample(randomness.fold_in(KEYS, 3))
    return toy().decode_output(params, toy().decode_features(params, z)), posterior.kl()

  def generator(params):
    y, kl = reconstruct(params)
    adversary = -jnp.mean(Critic().apply(critic, y, None, {}))
    return jnp.mean(jnp.abs(x - y)) + 1e-6 * jnp.mean(kl) / x[0].size + 0.5 * weight * adversary

  def discriminator(critic):
    y = reconstruct(params)[0]
    real, fake = (Critic().apply(critic, images, None, {}) for images in (x, y))
    return jnp.mean(0.5 * (jax.nn.relu(1 - real) + jax.nn.relu(1 + fake)))

  assert_trees_close(gradient["model"], jax.grad(generator)(params), atol=1e-6)
  assert_trees_close(gradient["extra"]["discriminator"], jax.grad(discriminator)(critic), atol=1e-6)
  np.testing.assert_allclose(loss, generator(params) + discriminator(critic), rtol=1e-5)
  np.testing.assert_allclose(np.mean(details["discriminator"]), discriminator(critic), rtol=1e-5)
  # The weight is a number: doubling it does not change the discriminator's gradient.
  _, again = context(objective, params, adaptive_weight=jnp.float32(2 * weight))
  _, doubled = evaluate(objective, params, extra, again)
  assert_trees_close(doubled["extra"], gradient["extra"], rtol=0)


def train(objective, params, steps, *, accumulate=1, chain=None, x=None, mesh=None):
  """Train for `steps` steps, and return a list of states and a list of metrics.

  The states start with the initial state. With a mesh, None replaces the initial state.
  """
  has_critic = bool(jax.tree.leaves(objective.init(jax.random.key(0), params, ())[0]))
  extra = optax.sgd(0.1) if has_critic else None
  chain = chain or optim.chain(0.01, averages=ema.params_ema(ema.fixed(0.5)), extra=extra)
  state = training.init_state(jax.random.key(0), lambda key: params, chain, objective)
  step = functools.partial(training.train_step, objective=objective, optimizer=chain, accumulate=accumulate)
  if mesh is None:
    step = jax.jit(step)
  else:
    step = parallel.jit_step(functools.partial(step, distribute=parallel.shard_gradient(mesh)), mesh, state)
    state = jax.device_put(state, parallel.state_shardings(mesh, state))
  states, metrics = [None if mesh else state], []
  for number in range(steps):
    state, values = step(state, {"x": data(number) if x is None else x, "given": {}})
    # A sharded step donates its state.
    states.append(jax.tree.map(np.asarray, state._replace(key=())) if mesh else state)
    metrics.append(values)
  return states, metrics


def test_the_adversarial_loss_starts_late_and_exactly():
  params = make_params()
  late = losses.autoencoding(toy(), discriminator=Critic(), adversarial_start=3)
  without, _ = train(losses.autoencoding(toy()), params, 4)
  states, metrics = train(late, params, 5)
  for number in range(4):
    assert_trees_close(states[number].params, without[number].params, rtol=1e-6)
  for number in range(3):
    assert float(metrics[number]["generator"]) == float(metrics[number]["discriminator"]) == 0
    assert float(metrics[number]["adaptive_weight"]) == 0
    assert_trees_close(states[number + 1].extra, states[0].extra, rtol=0, atol=0)
  # In the first step, the discriminator learns and the weight is still 0.
  assert float(metrics[3]["adaptive_weight"]) == 0
  assert float(metrics[3]["discriminator"]) > 0
  assert np.any(states[4].extra["discriminator"]["last"] != states[0].extra["discriminator"]["last"])
  assert_trees_close(states[4].params, without[4].params, rtol=1e-6)
  assert float(metrics[4]["adaptive_weight"]) > 0
  np.testing.assert_allclose(metrics[4]["adaptive_weight"], 0.5 * states[4].memory["adaptive_weight"], rtol=1e-6)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_training_does_not_depend_on_the_number_of_parts(kind):
  params, objective = make_params(kind), losses.autoencoding(toy(kind), discriminator=Critic(), adversarial_start=0)
  (*_, one), _ = train(objective, params, 3)
  (*_, two), _ = train(objective, params, 3, accumulate=2)
  assert_trees_close(one.params, two.params, rtol=2e-3, atol=1e-4)
  assert_trees_close(one.memory, two.memory, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_training_does_not_depend_on_the_number_of_devices(kind):
  params, objective = make_params(kind), losses.autoencoding(toy(kind), discriminator=Critic(), adversarial_start=0)
  (*_, one), _ = train(objective, params, 3)
  mesh = parallel.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
  (*_, four), _ = train(objective, params, 3, mesh=mesh)
  assert_trees_close(jax.device_get(four.params), one.params, rtol=2e-3, atol=1e-4)
  assert_trees_close(jax.device_get(four.memory), one.memory, rtol=2e-3, atol=1e-4)


def test_the_codebook_is_projected_after_each_step_and_never_decays():
  params, objective = make_params("vq"), losses.autoencoding(toy("vq"))
  decaying = optim.chain(
    0.1,
    name="adamw",
    arguments={"weight_decay": 1.0},
    averages=ema.params_ema(ema.fixed(0.5)),
    trainable=networks.trainable_mask,
  )
  states, _ = train(objective, params, 3, chain=decaying)
  average = params["codebook"]["vectors"]
  for before, after in itertools.pairwise(states):
    vectors = after.memory["codebook"].vectors
    np.testing.assert_array_equal(after.params["codebook"]["vectors"], vectors)
    assert np.any(vectors != before.params["codebook"]["vectors"])
    # The average follows one step behind the codebook.
    moved = ema.ema_params(after.opt_state)["codebook"]["vectors"]
    low = np.minimum(average, before.params["codebook"]["vectors"]) - 1e-6
    high = np.maximum(average, before.params["codebook"]["vectors"]) + 1e-6
    assert np.all((low <= moved) & (moved <= high))
    average = moved


def test_a_skipped_step_keeps_the_codebook():
  params, objective = make_params("vq"), losses.autoencoding(toy("vq"))
  states, metrics = train(objective, params, 2, x=jnp.full((BATCH, *SHAPE), jnp.nan))
  assert float(metrics[-1]["skipped"]) == 2
  np.testing.assert_array_equal(states[-1].params["codebook"]["vectors"], params["codebook"]["vectors"])
  assert_trees_close(states[-1].memory, states[0].memory, rtol=0, atol=0)


def test_project_applies_to_the_parameters_of_any_objective():
  def norm_one(params, memory):
    return {"kernel": params["kernel"] / jnp.linalg.norm(params["kernel"])}

  def loss(trained, context, keys, batch):
    values = jnp.sum(batch["x"].reshape(BATCH, -1)[:, :4] * trained["model"]["kernel"], -1)
    return jnp.mean(values), {"loss": values}

  objective = losses.Objective(loss, project=norm_one)
  states, _ = train(objective, {"kernel": jnp.ones(4)}, 2)
  np.testing.assert_allclose(jnp.linalg.norm(states[-1].params["kernel"]), 1, rtol=1e-6)


def test_the_networks_of_this_package_fit(tmp_path):
  module = networks.Autoencoder(channels=8, multipliers=(1, 2), blocks=1, middle_attention=False, groups=4)
  network = models.networks.from_linen(module, {})
  critic = models.networks.from_linen(networks.PatchDiscriminator(channels=4, levels=1), {})
  parts = models.networks.autoencoder(network, (8, 8, 3))
  assert parts.kind == "kl"
  x = data_of((4, 8, 8, 3))
  params = network.init(jax.random.key(0), x, jnp.zeros(4), {})
  objective = losses.autoencoding(parts, discriminator=critic, adversarial_start=0)
  extra, state = context(objective, params)
  (loss, details), gradient = evaluate(objective, params, extra, state, x, KEYS[:4])
  assert np.isfinite(loss)
  assert details["last_layer"]["generator"].shape == (4, *params["decoder"]["conv_out"]["kernel"].shape)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def data_of(shape):
  return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, shape), jnp.float32)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"kl_weight": -1}, "Got kl_weight=-1; expected a finite number of 0 or more"),
    ({"adversarial_start": -1}, "Got adversarial_start=-1"),
    ({"error": "l3"}, "error='l3'"),
    ({"codebook_decay": 1.0}, "codebook_decay=1.0"),
    ({"perceptual": "vgg"}, "Got 'vgg' as perceptual of losses.autoencoding; expected a Features"),
  ],
)
def test_wrong_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    losses.autoencoding(toy(), **options)


def test_networks_that_are_no_autoencoders_are_refused():
  unet = models.networks.from_linen(networks.UNet(channels=8), {})
  with pytest.raises(ValueError, match="Got UNet without encode, decode_features, decode_output"):
    models.networks.autoencoder(unet, (8, 8, 3))
  with pytest.raises(ValueError, match="Got a network without encode"):
    models.networks.autoencoder(models.Network(None, None), (8, 8, 3))


def test_discriminators_check_their_data():
  critic = networks.PatchDiscriminator(channels=8, levels=3)
  with pytest.raises(ValueError, match=r"Got data of shape .* with levels=3; expected 2 spatial axes of at least 8"):
    critic.init(jax.random.key(0), jnp.zeros((1, 4, 8, 3)))
  outputs = jax.eval_shape(critic.init_with_output, jax.random.key(0), jnp.zeros((2, 32, 16, 3)))[0]
  assert outputs.shape == (2, 4, 2, 1)


def test_the_hinge_loss_and_known_gradients():
  real, fake = jnp.asarray([[2.0, 0.0]]), jnp.asarray([[-3.0, 1.0]])
  np.testing.assert_allclose(losses.hinge_loss(real, fake), [0.5 * (0.5 + 1.0)])
  x, g = data(), data(3)
  value, gradient = jax.value_and_grad(lambda x: reconstruction.with_gradient(jnp.sum(x**3), x, g))(x)
  np.testing.assert_array_equal(gradient, g)
  assert value == jnp.sum(x**3)
  assert adversarial.adversarial(Critic(), Critic().init(KEYS[0], x, None, {}), x, g).generator.shape == (BATCH,)
