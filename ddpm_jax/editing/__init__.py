"""Editing with a trained model as it is: inpainting, restoration from measurements, image to image, inversion.

Wrappers `Sampler -> Sampler` (`replace`, `repaint`, `dps`) and `denoise -> denoise` (`posterior`), and functions that run
`sampling.sample` on images (`img2img`, `invert`, `interpolate`). For data in [-1, 1], as everywhere.
"""

from ddpm_jax.editing.inpainting import repaint, replace
from ddpm_jax.editing.latents import img2img, interpolate, invert, slerp
from ddpm_jax.editing.operators import Operator, blur, downsample, gray, mask_operator
from ddpm_jax.editing.posterior import dps, posterior

__all__ = [
  "Operator",
  "blur",
  "downsample",
  "dps",
  "gray",
  "img2img",
  "interpolate",
  "invert",
  "mask_operator",
  "posterior",
  "repaint",
  "replace",
  "slerp",
]
