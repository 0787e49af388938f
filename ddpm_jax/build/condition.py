"""What a conditional network is given beside the noisy data: classes, and the low-resolution image of SR3."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ddpm_jax import editing, randomness
from ddpm_jax.data import check_space

Array = jax.Array
# Standard deviations in [0, 1] are embedded as times are, whose labels go up to about this.
_LEVEL_SCALE = 1000.0


class Condition(NamedTuple):
  """A condition for each sample; None for what the network does not take.

  Attributes:
    classes: class labels [B].
    image: the low-resolution image, enlarged and noised, [B, H, W, C].
    level: how much it was noised, as the network is told, [B].
  """

  classes: Array | None = None
  image: Array | None = None
  level: Array | None = None

  @property
  def arguments(self) -> dict[str, Array | None]:
    """As `networks.UNet` names them."""
    return {"classes": self.classes, "image": self.image, "vector": self.level}


def space_of(config: ConfigDict) -> tuple[int, int]:
  """Return height and width of the images: `data.image_size` is one number for squares, or two."""
  size = config.data.image_size
  return check_space((size, size) if isinstance(size, int) else size)


def check_superres(config: ConfigDict) -> None:
  """Raise a ValueError unless the keys of config.superres fit each other and the images."""
  c, space = config.superres, space_of(config)
  if c.factor < 0 or c.factor == 1 or (c.factor and any(side % c.factor for side in space)):
    raise ValueError(
      f"Got config.superres.factor={c.factor} for images of {space[0]}x{space[1]}; wanted a divisor of height and width above 1, such as 4,"
      " or 0 for a model that enlarges nothing."
    )
  if not 0 <= c.sample_noise <= c.noise <= 1 or (c.noise and not c.factor):
    raise ValueError(
      f"Got config.superres with factor={c.factor}, noise={c.noise} and sample_noise={c.sample_noise}; wanted 0 <= sample_noise <="
      " noise <= 1, and above 0 only with a factor."
    )


def low_space(config: ConfigDict) -> tuple[int, int]:
  """Return height and width of the images that a super-resolution model enlarges; raise a ValueError if it is none."""
  if not config.superres.factor:
    raise ValueError(
      "Got a model that enlarges nothing; wanted one for super-resolution, trained with --config.superres.factor above 1 as"
      " configs/mnist_superres.py is."
    )
  height, width = space_of(config)
  return height // config.superres.factor, width // config.superres.factor


def training_image(config: ConfigDict, keys: Array, image: Array) -> Condition:
  """The condition of training images [B, H, W, C], each noised as much as chance has it (Ho et al. 2022, section 4.2).

  The noise is added to the enlarged image, so it hides fine detail more than what the small image says.
  """
  std = config.superres.noise * jax.vmap(jax.random.uniform)(randomness.fold_in(keys, 4))
  return enlarged(config, keys, editing.downsample(config.superres.factor)(image), std)


def enlarged(config: ConfigDict, keys: Array, low: Array, std) -> Condition:
  """The condition of low-resolution images [B, h, w, C] noised by `std`, a number or [B]."""
  image = jax.image.resize(low, (low.shape[0], *space_of(config), low.shape[-1]), "bicubic")
  std = jnp.broadcast_to(jnp.asarray(std, image.dtype), image.shape[:1])
  if not config.superres.noise:
    return Condition(image=image)
  noise = randomness.normal(randomness.fold_in(keys, 5), image.shape, image.dtype)
  return Condition(image=image + std[:, None, None, None] * noise, level=_LEVEL_SCALE * std)


def example(config: ConfigDict) -> Condition:
  """A condition of one sample, for the shapes of a network's parameters."""
  c = config.superres
  shape = (1, *space_of(config), config.data.channels)
  return Condition(
    jnp.zeros((1,), jnp.int32) if config.network.num_classes else None,
    jnp.zeros(shape) if c.factor else None,
    jnp.zeros((1,)) if c.noise else None,
  )
