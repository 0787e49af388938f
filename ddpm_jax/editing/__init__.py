"""Edit images with a trained diffusion model and no further training.

The package covers inpainting, restoration from measurements, image-to-image sampling and inversion. `replace`,
`repaint` and `dps` wrap a `Sampler`. `posterior` and `replace_decoded` wrap `denoise`. `img2img`, `invert` and
`interpolate` run `sampling.sample` on images. Images have values in [-1, 1].
"""

from ddpm_jax.editing.inpainting import repaint, replace, replace_decoded, shrink_mask
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
  "replace_decoded",
  "shrink_mask",
  "slerp",
]
