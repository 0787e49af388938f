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
  free = betas < 0.999
  np.testing.assert_allclose(np.cumprod(1 - betas)[free], (f / f[0])[1:][free], rtol=1e-9)
  assert betas.max() == 0.999


@pytest.mark.parametrize("schedule", [schedules.linear, schedules.cosine])
def test_no_steps_is_an_error(schedule):
  with pytest.raises(ValueError, match="0 steps"):
    schedule(0)
