"""Convert configs, parameter names and scales of latents between diffusers' `AutoencoderKL` and our `Autoencoder`."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.interop import folders, tensors, unet2d
from ddpm_jax.networks import Autoencoder
from ddpm_jax.networks.options import multipliers_of
from ddpm_jax.storage import jsonfiles

Config = dict[str, Any]
PyTree = Any
_NAME = "AutoencoderKL"

# The options of AutoencoderKL and their defaults. Saved configs may omit options that have their defaults.
DEFAULTS: Config = {
  "in_channels": 3,
  "out_channels": 3,
  "down_block_types": ["DownEncoderBlock2D"],
  "up_block_types": ["UpDecoderBlock2D"],
  "block_out_channels": [64],
  "layers_per_block": 1,
  "act_fn": "silu",
  "latent_channels": 4,
  "norm_num_groups": 32,
  "sample_size": 32,
  "scaling_factor": 0.18215,
  "shift_factor": None,
  "latents_mean": None,
  "latents_std": None,
  "force_upcast": True,
  "use_quant_conv": True,
  "use_post_quant_conv": True,
  "mid_block_add_attention": True,
}
_NONE = type(None)
_TYPES: dict[str, jsonfiles.Kinds] = {
  "_class_name": (str,),
  "in_channels": (int,),
  "out_channels": (int,),
  "down_block_types": ([str],),
  "up_block_types": ([str],),
  "block_out_channels": ([int],),
  "layers_per_block": (int,),
  "act_fn": (str,),
  "latent_channels": (int,),
  "norm_num_groups": (int,),
  "sample_size": (int, [int], _NONE),
  "scaling_factor": (float,),
  "shift_factor": (float, _NONE),
  "latents_mean": ([float], _NONE),
  "latents_std": ([float], _NONE),
  "force_upcast": (bool, _NONE),
  "use_quant_conv": (bool,),
  "use_post_quant_conv": (bool,),
  "mid_block_add_attention": (bool,),
}
_COUNTS = (
  "in_channels",
  "out_channels",
  "block_out_channels",
  "layers_per_block",
  "latent_channels",
  "norm_num_groups",
)
_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


class Scale(NamedTuple):
  """Hold the arrays that convert the latents z to x = (z - shift) * scale.

  Each array has the shape () or [C], where C is the number of channels of z.
  """

  scale: np.ndarray
  shift: np.ndarray


def from_config(config: Mapping[str, Any]) -> Autoencoder:
  """Create our autoencoder from the config of an `AutoencoderKL`.

  Raises:
    ValueError: if an option is not supported here. The message names the option.
  """
  c = with_defaults(config)
  widths = c["block_out_channels"]
  for key, block in _BLOCKS.items():
    if len(c[key]) != len(widths):
      raise ValueError(
        f"Got an {_NAME} with {len(c[key])} {key} and {len(widths)} block_out_channels; expected the same number of each."
      )
    other = [name for name in c[key] if name != block]
    if other:
      raise _unsupported(key, other[0], block)
  if c["act_fn"] not in ("silu", "swish"):
    raise _unsupported("act_fn", c["act_fn"], "silu or swish")
  if c["in_channels"] != c["out_channels"]:
    raise _unsupported("in_channels", c["in_channels"], f"{c['out_channels']}, the value of out_channels")
  network = Autoencoder(
    out_channels=c["out_channels"],
    latent_channels=c["latent_channels"],
    channels=widths[0],
    multipliers=multipliers_of(widths),
    blocks=c["layers_per_block"],
    middle_attention=c["mid_block_add_attention"],
    quant_conv=c["use_quant_conv"],
    post_quant_conv=c["use_post_quant_conv"],
    groups=c["norm_num_groups"],
  )
  network.check_input((*(network.downsampling,) * 2, c["in_channels"]))
  scale_of(config)
  return network


def template(network: Autoencoder) -> PyTree:
  """Return the shapes of the parameters of an autoencoder, without allocating them."""
  side = network.downsampling
  return tensors.abstract_params(network, (side, side, network.out_channels))


def to_config(network: Autoencoder, scale: Scale, size: tuple[int, int] | None = None) -> Config:
  """Return the config of the `AutoencoderKL` that computes the same function as our network.

  This is the inverse of `from_config` and `scale_of`.

  Args:
    network: our autoencoder.
    scale: the scale and shift of the latents. Numbers become scaling_factor and shift_factor. Arrays become
      latents_mean and latents_std.
    size: the height and width of the data. None for the default of `AutoencoderKL`.

  Raises:
    ValueError: if `AutoencoderKL` does not support an option of the network. The message names the option.
  """
  n, defaults = network, Autoencoder()
  for name in ("bottleneck", "epsilon", "dimensions"):
    if getattr(n, name) != getattr(defaults, name):
      raise ValueError(
        f"Got an autoencoder with {name}={getattr(n, name)!r}, which diffusers' {_NAME} cannot compute; expected"
        f" {name}={getattr(defaults, name)!r}."
      )
  if not n.groups:
    raise ValueError(
      "Got an autoencoder with groups=0, so that the number of groups depends on the layer; expected one number for all"
      f" layers, as in diffusers' {_NAME}."
    )
  levels = len(n.multipliers)
  height, width = size or (DEFAULTS["sample_size"],) * 2
  return DEFAULTS | {
    "in_channels": n.out_channels,
    "out_channels": n.out_channels,
    **{key: [block] * levels for key, block in _BLOCKS.items()},
    "block_out_channels": [round(n.channels * multiplier) for multiplier in n.multipliers],
    "layers_per_block": n.blocks,
    "latent_channels": n.latent_channels,
    "norm_num_groups": n.groups,
    "sample_size": height if height == width else [height, width],
    "use_quant_conv": n.quant_conv,
    "use_post_quant_conv": n.post_quant_conv,
    "mid_block_add_attention": n.middle_attention,
    **_scale_config(scale, n.latent_channels),
  }


def scale_of(config: Mapping[str, Any]) -> Scale:
  """Read the scale and shift of the latents from a config.

  Raises:
    ValueError: if the config contains invalid or contradicting values.
  """
  c = with_defaults(config)
  mean, std, factor, channels = c["latents_mean"], c["latents_std"], c["scaling_factor"], c["latent_channels"]
  for key in ("latents_mean", "latents_std"):
    if c[key] is not None and len(c[key]) != channels:
      raise ValueError(f"Got an {_NAME} with {len(c[key])} {key}; expected {channels}, the value of latent_channels.")
  if mean is not None and c["shift_factor"] is not None:
    raise ValueError(f"Got an {_NAME} with shift_factor and latents_mean; expected at most one of them to be set.")
  if factor == 0 or any(value <= 0 for value in std or ()):
    raise ValueError(
      f"Got an {_NAME} with scaling_factor={factor} and latents_std={jsonfiles.shorten(std)}; expected a factor other than"
      " 0, and standard deviations above 0."
    )
  shift = (c["shift_factor"] or 0.0) if mean is None else mean
  scale = factor if std is None else factor / np.asarray(std, np.float64)
  return Scale(np.asarray(scale, np.float32), np.asarray(shift, np.float32))


def fold_scale(network: Autoencoder, params: PyTree, scale: Scale) -> tuple[Autoencoder, PyTree]:
  """Fold the scale and shift of the latents into an autoencoder with the bottleneck "kl".

  The new autoencoder encodes data to the moments of x = (z - shift) * scale, and decodes x. The scale and the shift
  become part of the 1x1 convolutions between encoder and decoder. A network without these convolutions gets them.
  """
  channels = network.latent_channels
  scales, shifts = (np.broadcast_to(np.asarray(value, np.float64), (channels,)) for value in scale)

  def pointwise(name: str, features: int) -> tuple[np.ndarray, np.ndarray]:
    if name in params:
      return np.asarray(params[name]["kernel"], np.float64), np.asarray(params[name]["bias"], np.float64)
    return np.eye(features).reshape(*(1,) * network.dimensions, features, features), np.zeros(features)

  kernel, bias = pointwise("quant_conv", 2 * channels)
  kernel = kernel * np.concatenate([scales, np.ones(channels)])
  mean, log_variance = np.split(bias, 2)
  bias = np.concatenate([(mean - shifts) * scales, log_variance + 2 * np.log(np.abs(scales))])
  before = {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
  kernel, bias = pointwise("post_quant_conv", channels)
  bias = bias + shifts @ kernel.reshape(channels, channels)
  after = {"kernel": (kernel / scales[:, None]).astype(np.float32), "bias": bias.astype(np.float32)}
  return (
    network.clone(quant_conv=True, post_quant_conv=True),
    {**params, "quant_conv": before, "post_quant_conv": after},
  )


def _scale_config(scale: Scale, channels: int) -> Config:
  """Return the part of a config from which `scale_of` reads `scale`."""
  scales, shifts = (np.asarray(value, np.float32) for value in scale)
  for name, value in (("scale", scales), ("shift", shifts)):
    if value.shape not in ((), (channels,)) or not np.isfinite(value).all() or (name == "scale" and not value.all()):
      raise ValueError(
        f"Got {name}={jsonfiles.shorten(value.tolist())} for an autoencoder with latent_channels={channels}; expected one"
        f" finite number, or {channels}. A scale must not be 0."
      )
  if scales.ndim == shifts.ndim == 0:
    shift = _shortest(shifts) if shifts else None
    return {"scaling_factor": _shortest(scales), "shift_factor": shift}
  std = 1 / np.broadcast_to(scales.astype(np.float64), (channels,))
  if std.min() <= 0:
    raise ValueError(f"Got scale={scales.tolist()}, one number for each channel; expected numbers above 0.")
  mean = [_shortest(value) for value in np.broadcast_to(shifts, (channels,))]
  return {"scaling_factor": 1.0, "latents_mean": mean, "latents_std": std.tolist()}


def _shortest(value: np.ndarray) -> float:
  """Return the decimal number with the fewest digits that rounds to the float32 `value`."""
  return float(str(np.float32(value)))


def with_defaults(config: Mapping[str, Any]) -> Config:
  """Return a config with the defaults of `AutoencoderKL` for omitted keys.

  Raises:
    ValueError: if the config is for another class, a value is invalid, or an unknown option is set.
  """
  jsonfiles.check_types(config, _TYPES, _NAME)
  name = config.get("_class_name", _NAME)
  if name != _NAME:
    raise ValueError(f"Got an autoencoder of class {name}; expected {_NAME}, the only class that is supported.")
  for key in _COUNTS:
    value = config.get(key, 1)
    if any(item < 1 for item in (value if isinstance(value, list | tuple) else [value])) or value == []:
      raise ValueError(f"Got an {_NAME} with {key}={jsonfiles.shorten(value)}; expected at least 1.")
  folders.check_known(config, DEFAULTS, _NAME)
  return DEFAULTS | {key: value for key, value in config.items() if key in DEFAULTS}


def layout(levels: int) -> tensors.Layout:
  """Return the layout of diffusers' weight files for an autoencoder with this number of levels."""

  def block_name(match: re.Match) -> str:
    direction, level, part = match["direction"], int(match["level"]), match["part"]
    block = f"down_blocks.{level}" if direction == "down" else f"up_blocks.{levels - 1 - level}"
    return f"{block}.{direction}samplers.0" if part == f"{direction}sample" else f"{block}.resnets.{part}"

  fixed = {
    "norm_out": "conv_norm_out",
    "middle_0": "mid_block.resnets.0",
    "middle_1": "mid_block.resnets.1",
    "middle_attention": "mid_block.attentions.0",
    "to_out": "to_out.0",
  }

  def name_of(path: str) -> str:
    parts = path.split("/")[:-1]
    names = [
      fixed.get(part, re.sub(r"(?P<direction>down|up)_(?P<level>\d+)_(?P<part>.+)", block_name, part)) for part in parts
    ]
    return ".".join([*names, tensors.leaf_name(path)])

  return tensors.Layout(name_of, modern_name=unet2d.modern_name)


def _unsupported(key: str, value: Any, supported: str) -> ValueError:
  return ValueError(
    f"Got an {_NAME} with {key}={jsonfiles.shorten(value)}, which is not supported; expected {supported}."
  )
