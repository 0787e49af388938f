import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import randomness


@pytest.mark.parametrize("generate", [randomness.normal, randomness.uniform, randomness.rademacher])
def test_sample_i_depends_on_key_i_alone(generate):
  keys = jax.random.split(jax.random.key(0), 6)
  batch = generate(keys, (6, 3, 2))
  part = generate(keys[2:4], (2, 3, 2))
  np.testing.assert_array_equal(batch[2:4], part)
  assert abs(float(batch.mean())) < 1


def test_sample_keys_do_not_depend_on_the_batch():
  key = jax.random.key(3)
  keys = jax.random.key_data(randomness.sample_keys(key, jnp.arange(8)))
  part = jax.random.key_data(randomness.sample_keys(key, jnp.arange(4, 8)))
  np.testing.assert_array_equal(keys[4:], part)


def test_one_key_serves_a_batch():
  assert randomness.normal(jax.random.key(0), (5, 2)).shape == (5, 2)


@pytest.mark.parametrize(
  ("key", "message"),
  [
    (jax.random.PRNGKey(0), "typed key"),
    (7, "typed key"),
    (jax.random.split(jax.random.key(0), (2, 2)), "shape \\(2, 2\\)"),
    (jax.random.split(jax.random.key(0), 3), "3 keys for a batch of 4"),
  ],
)
def test_wrong_keys_are_errors(key, message):
  with pytest.raises(ValueError, match=message):
    randomness.normal(key, (4, 2))
