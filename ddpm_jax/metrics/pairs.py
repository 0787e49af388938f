"""Compare images with their reconstructions, one pair at a time."""

import numpy as np
from scipy import ndimage

from ddpm_jax.metrics.features import check_images

# Wang et al. (2004), section III-C: the window's standard deviation and side, and the constants of equations 7-9.
_STD, _SIDE = 1.5, 11
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
# Equal images have an infinite ratio, which JSON cannot hold.
_MAX_PSNR = 100.0


def psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Return the peak signal-to-noise ratios of pairs of images as a float64 array [N] in decibels.

  The ratio is 10 log10(255^2 / MSE), where MSE is the mean squared error. Ratios above 100 are returned as 100.

  Args:
    images: uint8 [N, H, W, C].
    others: uint8 [N, H, W, C].

  Raises:
    ValueError: if the images are not uint8, or the shapes differ.
  """
  _check_pairs(images, others)
  errors = np.array([np.mean((one - two.astype(np.float64)) ** 2) for one, two in zip(images, others, strict=True)])
  return np.minimum(10 * np.log10(255**2 / np.maximum(errors, 1e-12)), _MAX_PSNR)


def ssim(images: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Return the structural similarity (SSIM) of each pair of images, a float64 array [N] in [-1, 1].

  Each channel is compared in windows with Gaussian weights (Wang et al. 2004, equation 13). The result is the mean over
  channels and over all windows that lie inside the image. The window has 11x11 pixels, or fewer for smaller images.

  Args:
    images: uint8 [N, H, W, C].
    others: uint8 [N, H, W, C].

  Raises:
    ValueError: if the images are not uint8, or the shapes differ.
  """
  _check_pairs(images, others)
  side = min(_SIDE, min(images.shape[1:3]) - 1 + min(images.shape[1:3]) % 2)
  positions = np.arange(side) - side // 2
  weights = np.exp(-0.5 * (positions / _STD) ** 2)
  weights /= weights.sum()
  return np.array([_similarity(one, two, weights) for one, two in zip(images, others, strict=True)])


def _similarity(one: np.ndarray, two: np.ndarray, weights: np.ndarray) -> float:
  x, y = one.astype(np.float64), two.astype(np.float64)
  border = len(weights) // 2
  inside = (slice(border, x.shape[0] - border), slice(border, x.shape[1] - border))

  def average(values: np.ndarray) -> np.ndarray:
    for axis in (0, 1):
      values = ndimage.correlate1d(values, weights, axis, mode="constant")
    return values[inside]

  mean_x, mean_y = average(x), average(y)
  variance_x, variance_y = average(x * x) - mean_x**2, average(y * y) - mean_y**2
  covariance = average(x * y) - mean_x * mean_y
  luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
  structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
  return float(np.mean(luminance * structure))


def _check_pairs(images: np.ndarray, others: np.ndarray) -> None:
  for one in (images, others):
    check_images(one)
  if images.shape != others.shape:
    raise ValueError(f"Got images of shapes {images.shape} and {others.shape} to compare; expected equal shapes.")
