import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax import optim


def run(optimizer, params, gradients):
  state = optimizer.init(params)
  history = []
  for gradient in gradients:
    updates, state = jax.jit(optimizer.update)(gradient, state, params)
    params = optax.apply_updates(params, updates)
    history.append(params)
  return history, state


@pytest.mark.parametrize("warmup", [True, False])
def test_ema_is_the_plain_loop(warmup):
  rng = np.random.default_rng(0)
  start = {"a": rng.normal(size=(3, 2)).astype(np.float32), "b": rng.normal(size=4).astype(np.float32)}
  gradients = [jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), start) for _ in range(30)]
  history, state = run(optax.chain(optax.sgd(0.1), optim.params_ema(0.7, warmup)), start, gradients)
  average = jax.tree.map(np.float64, start)
  for s, params in enumerate(history):
    decay = min(0.7, (1 + s) / (10 + s)) if warmup else 0.7
    average = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * np.float64(new), average, params)
  jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5), optim.ema_params(state), average)


def test_ema_changes_no_update():
  start = jnp.arange(3.0)
  gradients = [jnp.sin(jnp.arange(3.0) + i) for i in range(5)]
  plain, _ = run(optax.adam(0.1), start, gradients)
  with_ema, _ = run(optax.chain(optax.adam(0.1), optim.params_ema(0.9)), start, gradients)
  np.testing.assert_array_equal(plain[-1], with_ema[-1])


def test_adam_is_optax_adam_with_warmup_and_clipping():
  start, gradients = jnp.ones(4), [10 * jnp.cos(jnp.arange(4.0) + i) for i in range(8)]
  got, _ = run(optim.adam(0.01, warmup_steps=4, clip_norm=1.0, ema_decay=0.9), start, gradients)
  params, state = start, optax.adam(1.0).init(start)
  for i, gradient in enumerate(gradients):
    clipped = gradient / jnp.linalg.norm(gradient)
    updates, state = optax.adam(1.0).update(clipped, state)
    params = params + 0.01 * min(1, (i + 1) / 4) * updates
  np.testing.assert_allclose(got[-1], params, rtol=1e-5)


def test_wrong_values_are_errors():
  with pytest.raises(ValueError, match=r"decay of 1\.0"):
    optim.params_ema(1.0)
  with pytest.raises(ValueError, match="learning_rate=0"):
    optim.adam(0.0)
  with pytest.raises(ValueError, match="clip_norm=-1"):
    optim.adam(0.1, clip_norm=-1.0)
  with pytest.raises(ValueError, match="b1=1"):
    optim.adam(0.1, b1=1.0)
  transform = optim.params_ema(0.9)
  with pytest.raises(ValueError, match="Got no parameters"):
    transform.update(jnp.zeros(2), transform.init(jnp.zeros(2)))
