"""Define an objective that uses the step number, frozen parameters, the EMA, a memory and extra parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddpm_jax import losses, randomness, training
from ddpm_jax.training import ema, optim

SIZE, HIDDEN, BATCH = 8, 16, 16


def two_layers(params, x):
  return jnp.tanh(x @ params["first"]) @ params["last"]


def full_objective() -> losses.Objective:
  def init(key, params, frozen):
    critic = 0.3 * jax.random.normal(key, (SIZE, SIZE))
    memory = {"target": params, "losses": jnp.zeros(BATCH), "offset": jnp.zeros(()), "key": key}
    return {"critic": critic}, memory

  def prepare(keys, memory):
    return {"level": (jax.random.uniform(keys[0]) + memory["offset"] + jnp.arange(len(keys)) / len(keys)) % 1}

  def loss(trained, context, keys, batch):
    x, level = batch["x"], batch["level"][:, None]
    output = two_layers(trained["model"], x + level * randomness.normal(randomness.fold_in(keys, 1), x.shape))
    target = sum(two_layers(params, x) for params in (context.frozen, context.ema, context.memory["target"]))
    critic, fixed_output = x @ trained["extra"]["critic"], jax.lax.stop_gradient(output)
    scale = 1 / (1 + context.step.astype(x.dtype))
    error = scale * jnp.square(output - target) + jnp.square(critic - fixed_output)
    losses_by_sample = jnp.mean(error + 0.1 * jnp.square(output - jax.lax.stop_gradient(critic)), 1)
    return jnp.mean(losses_by_sample), {"loss": losses_by_sample}

  def update(key, memory, params, details):
    target = jax.tree.map(lambda old, new: 0.7 * old + 0.3 * new, memory["target"], params)
    return {"target": target, "losses": details["loss"], "offset": jax.random.uniform(key), "key": key}

  return losses.Objective(
    loss,
    init,
    prepare,
    update,
    lambda details: {"max_loss": jnp.max(details["loss"])},
    load=lambda: frozen()["objective"],
  )


def encode(frozen, keys, batch):
  noise = 0.01 * randomness.normal(randomness.fold_in(keys, 6), batch["data"].shape)
  return {"x": batch["data"] @ frozen["codec"] + noise}


def random_params(seed):
  rng = np.random.default_rng(seed)
  shapes = {"first": (SIZE, HIDDEN), "last": (HIDDEN, SIZE)}
  return {name: jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32) for name, shape in shapes.items()}


def frozen():
  rng = np.random.default_rng(1)
  return {"codec": jnp.asarray(rng.normal(0, 0.5, (SIZE, SIZE)), jnp.float32), "objective": random_params(2)}


def optimizer():
  return optim.chain(0.01, averages=ema.params_ema(ema.fixed(0.9)), extra=optax.sgd(0.1))


def init_state():
  return training.init_state(jax.random.key(0), lambda key: random_params(3), optimizer(), full_objective(), frozen())


def train_step(**options):
  parts = {"objective": full_objective(), "optimizer": optimizer(), "encode": encode}
  return functools.partial(training.train_step, **(parts | options))


def batches(count):
  rng = np.random.default_rng(4)
  return [{"data": rng.normal(size=(BATCH, SIZE)).astype(np.float32)} for _ in range(count)]


def leaf_values(tree):
  """Return the leaves of a tree as NumPy arrays, with random keys as integers."""

  def data(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

  return [np.asarray(data(leaf)) for leaf in jax.tree.leaves(tree)]
