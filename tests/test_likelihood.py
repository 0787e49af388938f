"""Test that the likelihood of an image does not depend on its batch, and that invalid arguments are errors."""

import jax
import numpy as np
import pytest
from scipy import stats

from ddpm_jax import likelihood, processes, schedules
from tests.oracles import MIXTURE, PROCESSES

MEAN, STD = 0.1, 0.3
KEY = jax.random.key(0)


def keys(count):
  return jax.random.split(KEY, count)


def on_levels(shape, seed=0):
  return np.float32(np.random.default_rng(seed).integers(0, 256, shape) / 127.5 - 1)


VP, STEPS = PROCESSES["vp"], processes.discrete(schedules.linear(10, 1e-2, 0.4))
BOUNDS = {
  "variational": lambda *args, **options: likelihood.variational_bound(args[0], STEPS, *args[1:], **options),
  "sampled steps": lambda *args, **options: likelihood.variational_bound(
    args[0], STEPS, *args[1:], num_evaluations=6, **options
  ),
  "continuous": lambda *args, **options: likelihood.continuous_bound(
    args[0], VP, *args[1:], num_evaluations=4, **options
  ),
  "ode": lambda *args, **options: likelihood.ode_bits(args[0], VP, *args[1:], rtol=1e-3, atol=1e-3, **options),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bits_of_an_image_depend_on_its_key_and_not_on_the_batch(name):
  x_0 = on_levels((5, 2))
  process = STEPS if name in ("variational", "sampled steps") else VP
  run = jax.jit(lambda key, x: BOUNDS[name](key, MIXTURE.denoise(process), x))
  full, part = run(keys(5), x_0), run(keys(5)[3:], x_0[3:])
  for full_values, part_values in zip(full, part, strict=True):
    if full_values is not None:
      np.testing.assert_allclose(full_values[3:], part_values, rtol=1e-4, atol=1e-5)
  assert len(set(np.asarray(run(keys(5), np.tile(x_0[:1], (5, 1))).bits))) == 5


def test_invalid_data_keys_and_estimates_are_errors():
  for run in BOUNDS.values():
    for x_0, message in (
      (np.float32([[0.1, 0.2]]), "256 levels"),
      (np.float32([[1 / 255, 257 / 255]]), "256 levels"),
      (np.array([[3, 4]]), "expected floats"),
      (np.float32([1 / 255]), "expected a batch"),
    ):
      with pytest.raises(ValueError, match=message):
        run(KEY, lambda x, t: x, x_0)
    with pytest.raises(ValueError, match="3 keys for a batch of 2"):
      run(keys(3), lambda x, t: x, on_levels((2, 2)))
    with pytest.raises(ValueError, match="typed key"):
      run(jax.random.PRNGKey(0), lambda x, t: x, on_levels((2, 2)))
    with pytest.raises(ValueError, match="expected the same shape"):
      run(KEY, lambda x, t: x[:, :1], on_levels((2, 2)))


INVALID = [
  (likelihood.ode_bits, VP, {"probes": 0}, "probes=0"),
  (likelihood.ode_bits, VP, {"probes": 1.5}, "probes=1.5"),
  (likelihood.ode_bits, VP, {"probe_noise": "uniform"}, "'rademacher' or 'gaussian'"),
  (likelihood.ode_bits, VP, {"t_min": 0.0}, "t_min=0"),
  (likelihood.ode_bits, VP, {"t_min": 1.0}, "t_min=1"),
  (likelihood.ode_bits, VP, {"rtol": 0.0}, "above 0"),
  (likelihood.continuous_bound, VP, {"num_evaluations": 3}, "even number"),
  (likelihood.continuous_bound, VP, {"num_evaluations": 0}, "even number"),
  (likelihood.continuous_bound, VP, {"t_min": 2.0}, "t_min=2"),
  (likelihood.variational_bound, VP, {}, "continuous process"),
  (likelihood.variational_bound, STEPS, {"num_evaluations": 5}, "from 4 to 20"),
  (likelihood.variational_bound, STEPS, {"num_evaluations": 22}, "from 4 to 20"),
  (likelihood.variational_bound, STEPS, {"num_evaluations": 2}, "from 4 to 20"),
  (likelihood.variational_bound, STEPS, {"variance": "medium"}, "medium"),
  (likelihood.variational_bound, STEPS, {"variance": "learned"}, "learned_range"),
]


@pytest.mark.parametrize(("function", "process", "options", "message"), INVALID)
def test_wrong_options_are_errors(function, process, options, message):
  with pytest.raises(ValueError, match=message):
    function(KEY, process, lambda x, t: x, on_levels((2, 2)), **options)


def test_too_many_dimensions_or_too_few_values_are_errors():
  with pytest.raises(ValueError, match="1025 dimensions"):
    likelihood.ode_bits(KEY, VP, lambda x, t: x, on_levels((1, 1025)), exact_trace=True)
  for values in (1.0, np.ones(1)):
    with pytest.raises(ValueError, match="2 or more"):
      likelihood.summary(values)
  mean, error = likelihood.summary(np.array([1.0, 2.0, 3.0, 6.0]))
  assert mean == 3
  np.testing.assert_allclose(error, stats.sem([1, 2, 3, 6]), rtol=1e-6)


def test_a_flow_beyond_max_nfe_is_nan():
  run = jax.jit(lambda x: likelihood.ode_bits(KEY, VP, MIXTURE.denoise(VP), x, max_nfe=20))
  result = run(np.ones((1, 2), np.float32))
  assert np.isnan(result.bits[0])
  assert result.nfe[0] <= 20
