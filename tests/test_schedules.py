import numpy as np
import pytest

from ddpm_jax import schedules


def test_linear_has_the_papers_ends():
  betas = schedules.linear(1000)
  assert betas.dtype == np.float64
  assert (betas[0], betas[-1]) == (1e-4, 0.02)
  assert np.allclose(np.diff(betas), (0.02 - 1e-4) / 999)


def test_cosine_gives_the_papers_alpha_bar():
  betas = schedules.cosine(1000)
  t = np.arange(1001) / 1000
  f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
  unlimited = betas < 0.999
  np.testing.assert_allclose(np.cumprod(1 - betas)[unlimited], (f / f[0])[1:][unlimited], rtol=1e-9)
  assert betas.max() == 0.999


def test_scaled_linear_is_linear_in_the_root():
  betas = schedules.scaled_linear(1000)
  np.testing.assert_allclose((betas[0], betas[-1]), (0.00085, 0.012))
  steps = np.diff(np.sqrt(betas))
  np.testing.assert_allclose(steps, steps[0])


def test_wrong_parameters_are_errors():
  with pytest.raises(ValueError, match="beta_start=-0.1"):
    schedules.scaled_linear(3, -0.1, 0.2)
  with pytest.raises(ValueError, match="offset=-1"):
    schedules.cosine(3, offset=-1)


def test_sigmoid_gives_the_papers_alpha_bar():
  betas = schedules.sigmoid(1000, -3, 3, 0.9)
  t, logistic = np.arange(1001) / 1000, lambda x: 1 / (1 + np.exp(-x))
  start, end = logistic(-3 / 0.9), logistic(3 / 0.9)
  alpha_bar = (end - logistic((t * 6 - 3) / 0.9)) / (end - start)
  np.testing.assert_allclose(np.cumprod(1 - betas)[:-5], alpha_bar[1:-5], rtol=1e-9)
  assert betas.max() == 0.999
  for kwargs in ({"start": 3.0}, {"tau": 0.0}):
    with pytest.raises(ValueError, match="expected start < end"):
      schedules.sigmoid(10, **kwargs)


@pytest.mark.parametrize("schedule", [schedules.linear, schedules.scaled_linear, schedules.cosine])
def test_zero_terminal_snr_keeps_the_first_step_and_empties_the_last(schedule):
  before = schedule(1000)
  betas = schedules.zero_terminal_snr(before)
  root, rescaled = np.sqrt(np.cumprod(1 - before)), np.sqrt(np.cumprod(1 - betas))
  np.testing.assert_allclose(betas[0], before[0], rtol=1e-9)
  assert betas[-1] == 1
  # The new curve is an affine function of the old one.
  np.testing.assert_allclose(rescaled, (root - root[-1]) * rescaled[0] / (root[0] - root[-1]), atol=1e-12)
  for wrong in ([0.1], betas, [[0.1, 0.2]]):
    with pytest.raises(ValueError, match="at least 2"):
      schedules.zero_terminal_snr(wrong)


@pytest.mark.parametrize("schedule", [schedules.linear, schedules.scaled_linear, schedules.cosine, schedules.sigmoid])
def test_zero_steps_are_an_error(schedule):
  with pytest.raises(ValueError, match="0 steps"):
    schedule(0)
