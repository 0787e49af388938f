"""Test scores of pairs of images in closed form and against a direct computation of each window."""

import numpy as np
import pytest

from ddpm_jax import metrics


def images(shape=(3, 20, 16, 3), seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_psnr_in_closed_form():
  one = np.full((4, 8, 8, 3), 100, np.uint8)
  two = one + np.array([0, 1, 5, 100], np.uint8)[:, None, None, None]
  expected = [100, *(20 * np.log10(255 / np.array([1, 5, 100])))]
  np.testing.assert_allclose(metrics.psnr(one, two), expected)
  # Half of the pixels differ by 10.
  two = one.copy()
  two[:, :4] += 10
  np.testing.assert_allclose(metrics.psnr(one, two), [10 * np.log10(255**2 / 50)] * 4)


def test_ssim_of_constant_images_in_closed_form():
  a, b, c1 = 50.0, 80.0, (0.01 * 255) ** 2
  one, two = (np.full((2, 16, 16, 1), value, np.uint8) for value in (a, b))
  np.testing.assert_allclose(metrics.ssim(one, two), [(2 * a * b + c1) / (a**2 + b**2 + c1)] * 2, rtol=1e-6)
  np.testing.assert_allclose(metrics.ssim(images(), images()), 1)
  assert np.all(metrics.ssim(images(), images(seed=1)) < 0.1)


def similarity_of_windows(x, y):
  """Compute the mean similarity of two channels [H, W] from the definition, one window after the other."""
  side = min(11, min(x.shape) - 1 + min(x.shape) % 2)
  position = np.arange(side) - side // 2
  weights = np.exp(-(position[:, None] ** 2 + position**2) / (2 * 1.5**2))
  weights /= weights.sum()
  values = []
  for top in range(x.shape[0] - side + 1):
    for left in range(x.shape[1] - side + 1):
      p, q = (part[top : top + side, left : left + side].astype(np.float64) for part in (x, y))
      mean_p, mean_q = (np.sum(weights * part) for part in (p, q))
      var_p, var_q = np.sum(weights * (p - mean_p) ** 2), np.sum(weights * (q - mean_q) ** 2)
      covariance = np.sum(weights * (p - mean_p) * (q - mean_q))
      c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
      luminance = (2 * mean_p * mean_q + c1) / (mean_p**2 + mean_q**2 + c1)
      values.append(luminance * (2 * covariance + c2) / (var_p + var_q + c2))
  return np.mean(values)


@pytest.mark.parametrize("shape", [(2, 14, 17, 3), (1, 8, 8, 1), (1, 5, 12, 2)])
def test_ssim_agrees_with_its_definition(shape):
  one = images(shape)
  noise = np.random.default_rng(2).normal(0, 20, shape)
  two = np.clip(one + noise, 0, 255).astype(np.uint8)
  expected = [
    np.mean([similarity_of_windows(p[..., c], q[..., c]) for c in range(shape[-1])])
    for p, q in zip(one, two, strict=True)
  ]
  np.testing.assert_allclose(metrics.ssim(one, two), expected, rtol=1e-8)


@pytest.mark.parametrize("score", [metrics.psnr, metrics.ssim])
def test_wrong_images_are_refused(score):
  with pytest.raises(ValueError, match="expected equal shapes"):
    score(images(), images((3, 16, 20, 3)))
  with pytest.raises(ValueError, match="expected uint8"):
    score(images(), images().astype(np.float32))
