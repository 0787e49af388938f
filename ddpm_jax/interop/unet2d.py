"""Convert between the config of diffusers' `UNet2DModel` and our U-Net, and map names of parameters."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.interop import folders, tensors
from ddpm_jax.networks import UNet
from ddpm_jax.networks.options import multipliers_of, per_level
from ddpm_jax.storage import jsonfiles

Config = dict[str, Any]
PyTree = Any
# The names of the class in configs, today's and the first. Written is the first of these.
NAMES = ("UNet2DModel", "UNetUnconditionalModel")
# A tensor that every such network has.
ANCHOR = "conv_in.weight"

# The defaults of `UNet2DModel`, used for keys that a file omits.
DEFAULTS: Config = {
  "sample_size": None,
  "in_channels": 3,
  "out_channels": 3,
  "center_input_sample": False,
  "time_embedding_type": "positional",
  "time_embedding_dim": None,
  "freq_shift": 0,
  "flip_sin_to_cos": True,
  "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
  "mid_block_type": "UNetMidBlock2D",
  "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
  "block_out_channels": [224, 448, 672, 896],
  "layers_per_block": 2,
  "mid_block_scale_factor": 1,
  "downsample_padding": 1,
  "downsample_type": "conv",
  "upsample_type": "conv",
  "dropout": 0.0,
  "act_fn": "silu",
  "attention_head_dim": 8,
  "norm_num_groups": 32,
  "attn_norm_num_groups": None,
  "norm_eps": 1e-5,
  "resnet_time_scale_shift": "default",
  "add_attention": True,
  "class_embed_type": None,
  "num_class_embeds": None,
  "num_train_timesteps": None,
}
_NONE = type(None)
_TYPES: dict[str, jsonfiles.Kinds] = {
  "_class_name": (str,),
  "sample_size": (int, [int], _NONE),
  "in_channels": (int,),
  "out_channels": (int,),
  "center_input_sample": (bool,),
  "time_embedding_type": (str,),
  "time_embedding_dim": (int, _NONE),
  "freq_shift": (float,),
  "flip_sin_to_cos": (bool,),
  "down_block_types": ([str],),
  "mid_block_type": (str, _NONE),
  "up_block_types": ([str],),
  "block_out_channels": ([int],),
  "layers_per_block": (int,),
  "mid_block_scale_factor": (float,),
  "downsample_padding": (int,),
  "downsample_type": (str,),
  "upsample_type": (str,),
  "dropout": (float,),
  "act_fn": (str,),
  "attention_head_dim": (int, _NONE),
  "norm_num_groups": (int,),
  "attn_norm_num_groups": (int, _NONE),
  "norm_eps": (float,),
  "resnet_time_scale_shift": (str,),
  "add_attention": (bool,),
  "class_embed_type": (str, _NONE),
  "num_class_embeds": (int, _NONE),
  "num_train_timesteps": (int, _NONE),
}
# Options that must be at least 1 if they are set.
_COUNTS = (
  "sample_size",
  "in_channels",
  "out_channels",
  "time_embedding_dim",
  "block_out_channels",
  "layers_per_block",
  "attention_head_dim",
  "norm_num_groups",
  "attn_norm_num_groups",
  "num_class_embeds",
  "num_train_timesteps",
)
# Names of attention projections in old files, and their names today.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def from_config(config: Mapping[str, Any]) -> UNet:
  """Create our U-Net from the config of a `UNet2DModel`.

  Omitted keys have the defaults of `UNet2DModel`. With time_embedding_type "fourier", diffusers takes the logarithm of
  the time inside the network. Our network does not, so its time input must be log(t).

  Raises:
    ValueError: if an option is not supported here. The message names the option.
  """
  c = with_defaults(config)
  channels, levels = c["block_out_channels"], len(c["block_out_channels"])
  downs, ups = ([_kind(name) for name in c[key]] for key in ("down_block_types", "up_block_types"))
  if not len(downs) == len(ups) == levels:
    raise ValueError(
      f"Got {len(downs)} down_block_types, {len(ups)} up_block_types and {levels} block_out_channels; expected the same"
      " number of each."
    )
  down = [_parse_block(kind, "Down", "down_block_types", c["downsample_type"]) for kind in downs]
  up = [_parse_block(kind, "Up", "up_block_types", c["upsample_type"]) for kind in ups][::-1]
  attention_levels = tuple(level for level, (attention, _) in enumerate(down) if attention)
  if attention_levels != tuple(level for level, (attention, _) in enumerate(up) if attention):
    raise _unsupported("up_block_types", c["up_block_types"], "attention at the same levels as down_block_types")
  _check_supported(c, "mid_block_type", "UNetMidBlock2D")
  _check_supported(c, "mid_block_scale_factor", 1)
  _check_supported(c, "act_fn", "silu", "swish")
  _check_supported(c, "time_embedding_type", "positional", "fourier")
  _check_supported(c, "resnet_time_scale_shift", "default", "scale_shift")
  _check_supported(c, "downsample_padding", 0, 1)
  _check_supported(c, "class_embed_type", None, "timestep", "identity")
  _check_supported(c, "attn_norm_num_groups", None, c["norm_num_groups"])
  fourier, scale_shift = c["time_embedding_type"] == "fourier", c["resnet_time_scale_shift"] == "scale_shift"
  network = UNet(
    out_channels=c["out_channels"],
    channels=channels[0],
    multipliers=multipliers_of(channels),
    blocks=c["layers_per_block"],
    attention_levels=attention_levels,
    middle_attention=c["add_attention"],
    middle_attention_norm=not scale_shift or c["attn_norm_num_groups"] is not None,
    head_channels=c["attention_head_dim"] or 0,
    dropout=c["dropout"],
    groups=c["norm_num_groups"],
    epsilon=c["norm_eps"],
    time_embedding="fourier" if fourier else "cos_sin" if c["flip_sin_to_cos"] else "sin_cos",
    time_features=2 * channels[0] if fourier else 0,
    embedding_features=c["time_embedding_dim"] or 0,
    frequency_shift=float(c["freq_shift"]),
    scale_shift=scale_shift,
    downsample=_merge_levels([resampling for _, resampling in down[:-1]]),
    upsample=_merge_levels([resampling for _, resampling in up[1:]]),
    symmetric_padding=c["downsample_padding"] == 1,
    num_classes=(c["num_class_embeds"] or 0) if c["class_embed_type"] is None else 0,
    vector_embedding={None: "", "timestep": "time", "identity": "identity"}[c["class_embed_type"]],
    center_input=c["center_input_sample"],
    divide_by_sigma=fourier,
  )
  network.check_input((*image_size(c), c["in_channels"]))
  return network


def to_config(network: UNet, params: PyTree, size: tuple[int, int] | None = None) -> Config:
  """Return the config of the `UNet2DModel` that computes the same function as our network.

  This is the inverse of `from_config`.

  Args:
    network: our U-Net.
    params: its parameters, or their shapes.
    size: the height and width of its input.

  Raises:
    ValueError: if there is no size, or `UNet2DModel` does not support an option of the network. The message names the
      option.
  """
  n, defaults = network, UNet()
  if size is None:
    raise ValueError("Got no size for a networks.UNet; expected the height and width of its input. Pass size=.")
  for name in ("score_sde", "progressive_input", "augmentation_features", "dimensions"):
    if getattr(n, name) != getattr(defaults, name):
      raise ValueError(
        f"Got a network with {name}={getattr(n, name)!r}, which diffusers' UNet2DModel cannot compute; expected"
        f" {name}={getattr(defaults, name)!r}."
      )
  if not n.groups:
    raise ValueError(
      "Got a network with groups=0, so that the number of groups depends on the layer; expected one number for all"
      " layers, as in diffusers' UNet2DModel."
    )
  last = len(n.multipliers) - 1
  downs, ups = per_level(n.downsample, last), per_level(n.upsample, last)
  fourier = n.time_embedding == "fourier"
  if "residual" in (*downs, *ups) and tuple(n.filter) != (1, 1):
    raise ValueError(
      f"Got a network with filter={tuple(n.filter)}, which diffusers' UNet2DModel cannot compute; expected"
      " filter=(1, 1)."
    )
  if n.divide_by_sigma != fourier or (fourier and n.time_features != 2 * n.channels):
    raise ValueError(
      f"Got a network with time_embedding={n.time_embedding!r}, time_features={n.time_features},"
      f" divide_by_sigma={n.divide_by_sigma}; expected time_embedding='fourier' with time_features={2 * n.channels} and"
      " divide_by_sigma=True, or another time_embedding with divide_by_sigma=False, as in diffusers' UNet2DModel."
    )
  if n.time_features not in (0, n.channels) and not fourier:
    raise ValueError(
      f"Got a network with time_features={n.time_features}; expected {n.channels}, the number of channels, as in"
      " diffusers' UNet2DModel."
    )
  if n.vector_embedding == "dense":
    raise ValueError(
      "Got a network with vector_embedding='dense', which diffusers' UNet2DModel cannot compute; expected '', 'time' or"
      " 'identity'."
    )
  if not n.middle_attention_norm and not n.scale_shift:
    raise ValueError(
      "Got a network with middle_attention_norm=False and scale_shift=False, which diffusers' UNet2DModel cannot"
      " compute; expected at least one of them to be True."
    )
  types = {
    direction: [_block_type(n, direction, level, resamplings) for level in range(last + 1)]
    for direction, resamplings in (("Down", downs), ("Up", ups))
  }
  heads = n.head_channels
  if not heads and n.heads > 1:
    widths = {n.num_features(level) for level in (*n.attention_levels, *([last] if n.middle_attention else []))}
    if len(widths) > 1:
      raise ValueError(
        f"Got heads={n.heads} at levels with {sorted(widths)} features; diffusers' UNet2DModel fixes the features of a"
        " head, not the number of heads. Set head_channels instead."
      )
    heads = widths.pop() // n.heads if widths else 0
  height, width = size
  return DEFAULTS | {
    "sample_size": height if height == width else [height, width],
    "in_channels": params["conv_in"]["kernel"].shape[-2],
    "out_channels": n.out_channels,
    "center_input_sample": n.center_input,
    "time_embedding_type": "fourier" if fourier else "positional",
    "time_embedding_dim": n.embedding_features or None,
    "freq_shift": int(n.frequency_shift) if n.frequency_shift == int(n.frequency_shift) else n.frequency_shift,
    "flip_sin_to_cos": n.time_embedding == "cos_sin",
    "down_block_types": types["Down"],
    "up_block_types": types["Up"][::-1],
    "block_out_channels": [n.num_features(level) for level in range(last + 1)],
    "layers_per_block": n.blocks,
    "downsample_padding": int(n.symmetric_padding),
    "downsample_type": _resample_type(n, downs, [level for level in n.attention_levels if level < last]),
    "upsample_type": _resample_type(n, ups, [level - 1 for level in n.attention_levels if level > 0]),
    "dropout": n.dropout,
    "attention_head_dim": heads or None,
    "norm_num_groups": n.groups,
    "attn_norm_num_groups": n.groups if n.scale_shift and n.middle_attention_norm else None,
    "norm_eps": n.epsilon,
    "resnet_time_scale_shift": "scale_shift" if n.scale_shift else "default",
    "add_attention": n.middle_attention,
    "class_embed_type": {"": None, "time": "timestep", "identity": "identity"}[n.vector_embedding],
    "num_class_embeds": n.num_classes or None,
  }


def with_defaults(config: Mapping[str, Any]) -> Config:
  """Complete a config with the defaults of `UNet2DModel` for omitted keys.

  Raises:
    ValueError: if the config is for another class, a value is invalid, or an unknown option is set.
  """
  jsonfiles.check_types(config, _TYPES, "UNet2DModel")
  name = config.get("_class_name", "UNet2DModel")
  if name not in NAMES:
    hint = " The network of a text pipeline needs the folder of the pipeline, with model_index.json." * (
      name == "UNet2DConditionModel"
    )
    raise ValueError(
      f"Got a network of class {name}; expected UNet2DModel, the class that diffusers uses for pixel models.{hint}"
    )
  for key in _COUNTS:
    value = config.get(key)
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if any(item < 1 for item in values) or (values is value and not values):
      raise ValueError(f"Got a UNet2DModel with {key}={jsonfiles.shorten(value)}; expected at least 1.")
  size = config.get("sample_size")
  if isinstance(size, list | tuple) and len(size) != 2:
    raise ValueError(f"Got a UNet2DModel with sample_size={size!r}; expected one number, or height and width.")
  folders.check_known(config, DEFAULTS, "UNet2DModel")
  return DEFAULTS | {key: value for key, value in config.items() if key in DEFAULTS}


def image_size(config: Config) -> tuple[int, int]:
  """Return the image size (H, W) of a config.

  If sample_size is null, the result is the smallest size that the network accepts.
  """
  size = config["sample_size"]
  if size is None:
    size = 2 ** (len(config["block_out_channels"]) - 1)
  return (size, size) if isinstance(size, int) else (size[0], size[1])


def template(network: UNet, channels: int) -> PyTree:
  """Return the shapes of a network's parameters without allocating arrays.

  `channels` is the number of input channels: the channels of x and, if an image condition is concatenated with x, the
  channels of this condition.
  """
  side = 2 ** (len(network.multipliers) - 1)
  width = network.embedding_features or 4 * network.channels
  conditions: dict[str, Any] = {}
  if network.num_classes:
    conditions["classes"] = jax.ShapeDtypeStruct((1,), jnp.int32)
  if network.vector_embedding:
    shape = (1,) if network.vector_embedding == "time" else (1, width)
    conditions["vector"] = jax.ShapeDtypeStruct(shape, jnp.float32)
  return tensors.abstract_params(network, (side, side, channels), **conditions)


def layout(network: UNet) -> tensors.Layout:
  """Return the layout of diffusers' weight files for a network."""
  return block_layout(len(network.multipliers))._replace(modern_name=modern_name)


def block_layout(levels: int, names: Mapping[str, str] | None = None) -> tensors.Layout:
  """Return the layout of diffusers' weight files for a U-Net with this number of levels.

  `names` maps parts of our paths to diffusers' names. Its entries extend and override the names of `UNet2DModel`.
  """

  def block_name(match: re.Match) -> str:
    direction, level, part = match["direction"], int(match["level"]), match["part"]
    block = f"down_blocks.{level}" if direction == "down" else f"up_blocks.{levels - 1 - level}"
    if part == f"{direction}sample":
      return f"{block}.{direction}samplers.0"
    index, _, attention = part.partition("_")
    return f"{block}.{'attentions' if attention else 'resnets'}.{index}"

  fixed = {
    "norm_out": "conv_norm_out",
    "time_frequencies": "time_proj",
    "time_1": "time_embedding.linear_1",
    "time_2": "time_embedding.linear_2",
    "classes": "class_embedding",
    "vector_1": "class_embedding.linear_1",
    "vector_2": "class_embedding.linear_2",
    "middle_0": "mid_block.resnets.0",
    "middle_1": "mid_block.resnets.1",
    "middle_attention": "mid_block.attentions.0",
    "to_out": "to_out.0",
    **(names or {}),
  }

  def name_of(path: str) -> str:
    head, *inner = path.split("/")[:-1] or [path]
    start = fixed.get(head) or re.sub(r"(?P<direction>down|up)_(?P<level>\d+)_(?P<part>.+)", block_name, head)
    return ".".join([start, *(fixed.get(part, part) for part in inner), tensors.leaf_name(path)])

  return tensors.Layout(name_of)


def modern_name(name: str) -> str:
  """Return today's name of a tensor whose name in an old file may be another.

  Only projections of attention had other names.
  """
  pattern = rf"(\.attentions\.\d+)\.({'|'.join(_OLD_NAMES)})\."
  return re.sub(pattern, lambda match: f"{match[1]}.{_OLD_NAMES[match[2]]}.", name)


def _kind(name: str) -> str:
  return name.removeprefix("UNetRes")


def _parse_block(kind: str, direction: str, key: str, resample_type: str) -> tuple[bool, str]:
  """Return whether a block has attention, and how it resamples ("conv" or "residual")."""
  plain = {f"{direction}Block2D": "conv", f"Resnet{direction}sampleBlock2D": "residual"}
  if kind in plain:
    return False, plain[kind]
  if kind != f"Attn{direction}Block2D":
    raise _unsupported(key, kind, f"{direction}Block2D, Resnet{direction}sampleBlock2D or Attn{direction}Block2D")
  resamplings = {"conv": "conv", "resnet": "residual"}
  if resample_type not in resamplings:
    raise _unsupported(f"{direction.lower()}sample_type", resample_type, "conv or resnet")
  return True, resamplings[resample_type]


def _merge_levels(resamplings: list[str]) -> str | tuple[str, ...]:
  """Return one resampling if it is the same at all levels, else one resampling per level."""
  return resamplings[0] if len(set(resamplings)) == 1 else tuple(resamplings) if resamplings else "conv"


def _block_type(network: UNet, direction: str, level: int, resamplings: tuple[str, ...]) -> str:
  if level in network.attention_levels:
    return f"Attn{direction}Block2D"
  # The coarsest level on the way down and the finest on the way up do not resample, so any type is correct there.
  index = level if direction == "Down" else level - 1
  is_residual = 0 <= index < len(resamplings) and resamplings[index] == "residual"
  return f"Resnet{direction}sampleBlock2D" if is_residual else f"{direction}Block2D"


def _resample_type(network: UNet, resamplings: tuple[str, ...], attention_levels: list[int]) -> str:
  """Return how the levels with attention resample.

  diffusers has one option for all of them. At other levels, the block type determines the resampling.
  """
  kinds = {resamplings[index] for index in attention_levels}
  if len(kinds) > 1:
    raise ValueError(
      f"Got attention at levels {tuple(network.attention_levels)} that resample in {len(kinds)} ways, {resamplings};"
      " expected the same way at all levels with attention, as in diffusers' UNet2DModel."
    )
  return "resnet" if "residual" in kinds else "conv"


def _check_supported(config: Config, key: str, *supported: Any) -> None:
  if config[key] not in supported:
    raise _unsupported(key, config[key], " or ".join(map(repr, supported)))


def _unsupported(key: str, value: Any, supported: str) -> ValueError:
  return ValueError(
    f"Got a UNet2DModel with {key}={jsonfiles.shorten(value)}, which is not supported; expected {supported}."
  )
