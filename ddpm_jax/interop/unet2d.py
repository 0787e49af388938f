"""diffusers' `UNet2DModel`: its config to our U-Net and back, and its names for the parameters."""

import re
from collections.abc import Mapping
from typing import Any

from ddpm_jax.interop import tensors
from ddpm_jax.networks import UNet
from ddpm_jax.networks.options import per_level
from ddpm_jax.storage import jsonfiles

Config = dict[str, Any]

# The class's own defaults, which hold for keys that a file leaves out.
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
# Options that count something, which are at least 1 where they are given.
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
# Names that old files have for the projections of attention.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def from_config(given: Mapping[str, Any]) -> UNet:
  """Our U-Net for the config of a `UNet2DModel`; keys that are left out have the class's defaults.

  The time input of a network with time_embedding_type "fourier" is log(t), since diffusers takes the logarithm inside.

  Raises:
    ValueError: if an option has no counterpart; it names it.
  """
  c = with_defaults(given)
  channels, levels = c["block_out_channels"], len(c["block_out_channels"])
  downs, ups = ([_kind(name) for name in c[key]] for key in ("down_block_types", "up_block_types"))
  if not len(downs) == len(ups) == levels:
    raise ValueError(
      f"Got {len(downs)} down_block_types, {len(ups)} up_block_types and {levels} block_out_channels; expected as many of each."
    )
  down = [_way(kind, "Down", "down_block_types", c["downsample_type"]) for kind in downs]
  up = [_way(kind, "Up", "up_block_types", c["upsample_type"]) for kind in ups][::-1]
  attended = tuple(level for level, (attention, _) in enumerate(down) if attention)
  if attended != tuple(level for level, (attention, _) in enumerate(up) if attention):
    raise _unsupported("up_block_types", c["up_block_types"], "attention at the levels that have it on the way down")
  _supported(c, "mid_block_type", "UNetMidBlock2D")
  _supported(c, "mid_block_scale_factor", 1)
  _supported(c, "act_fn", "silu", "swish")
  _supported(c, "time_embedding_type", "positional", "fourier")
  _supported(c, "resnet_time_scale_shift", "default", "scale_shift")
  _supported(c, "downsample_padding", 0, 1)
  _supported(c, "class_embed_type", None, "timestep", "identity")
  _supported(c, "attn_norm_num_groups", None, c["norm_num_groups"])
  fourier, scale_shift = c["time_embedding_type"] == "fourier", c["resnet_time_scale_shift"] == "scale_shift"
  multipliers = tuple(width / channels[0] for width in channels)
  network = UNet(
    out_channels=c["out_channels"],
    channels=channels[0],
    multipliers=tuple(int(value) if value == int(value) else value for value in multipliers),
    blocks=c["layers_per_block"],
    attention_levels=attended,
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
    downsample=_ways([way for _, way in down[:-1]]),
    upsample=_ways([way for _, way in up[1:]]),
    symmetric_padding=c["downsample_padding"] == 1,
    num_classes=(c["num_class_embeds"] or 0) if c["class_embed_type"] is None else 0,
    vector_embedding={None: "", "timestep": "time", "identity": "identity"}[c["class_embed_type"]],
    center_input=c["center_input_sample"],
    divide_by_sigma=fourier,
  )
  network.check_input((*image_size(c), c["in_channels"]))
  return network


def to_config(network: UNet, shape: tuple[int, int, int]) -> Config:
  """The config of the `UNet2DModel` that computes what our network does on an input [H, W, C]; the inverse of `from_config`.

  Raises:
    ValueError: if `UNet2DModel` cannot; it names the option.
  """
  n, defaults = network, UNet()
  for name in ("score_sde", "progressive_input", "augmentation_features", "dimensions"):
    if getattr(n, name) != getattr(defaults, name):
      raise ValueError(f"Got a network with {name}={getattr(n, name)!r}, which diffusers' UNet2DModel cannot compute.")
  if not n.groups:
    raise ValueError(
      "Got a network with groups=0, whose number differs from layer to layer; diffusers' UNet2DModel has one."
    )
  last = len(n.multipliers) - 1
  downs, ups = per_level(n.downsample, last), per_level(n.upsample, last)
  fourier = n.time_embedding == "fourier"
  if "residual" in (*downs, *ups) and tuple(n.filter) != (1, 1):
    raise ValueError(f"Got a network with filter={tuple(n.filter)}, which diffusers' UNet2DModel cannot compute.")
  if n.divide_by_sigma != fourier or (fourier and n.time_features != 2 * n.channels):
    raise ValueError(
      f"Got a network with time_embedding={n.time_embedding!r}, time_features={n.time_features}, divide_by_sigma={n.divide_by_sigma};"
      " diffusers' UNet2DModel has twice as many Fourier features as channels and divides by sigma, or neither."
    )
  if n.time_features not in (0, n.channels) and not fourier:
    raise ValueError(
      f"Got a network with time_features={n.time_features}; diffusers' UNet2DModel has {n.channels}, its channels."
    )
  if n.vector_embedding == "dense":
    raise ValueError("Got a network with vector_embedding='dense', which diffusers' UNet2DModel cannot compute.")
  if not n.middle_attention_norm and not n.scale_shift:
    raise ValueError(
      "Got middle_attention_norm=False without scale_shift, which diffusers' UNet2DModel cannot compute."
    )
  types = {
    way: [_types(n, way, level, ways) for level in range(last + 1)] for way, ways in (("Down", downs), ("Up", ups))
  }
  heads = n.head_channels
  if not heads and n.heads > 1:
    widths = {n.num_features(level) for level in (*n.attention_levels, *([last] if n.middle_attention else []))}
    if len(widths) > 1:
      raise ValueError(
        f"Got heads={n.heads} at levels of {sorted(widths)} features; diffusers' UNet2DModel counts heads by their features."
        " Use head_channels."
      )
    heads = widths.pop() // n.heads if widths else 0
  height, width, channels = shape
  return DEFAULTS | {
    "sample_size": height if height == width else [height, width],
    "in_channels": channels,
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
    "downsample_type": _type(n, downs, [level for level in n.attention_levels if level < last]),
    "upsample_type": _type(n, ups, [level - 1 for level in n.attention_levels if level > 0]),
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


def with_defaults(given: Mapping[str, Any]) -> Config:
  """The config with the class's defaults for keys that are left out.

  Raises:
    ValueError: if it is of another class, or has an unknown option that is set.
  """
  jsonfiles.check_types(given, _TYPES, "UNet2DModel")
  name = given.get("_class_name", "UNet2DModel")
  if name not in ("UNet2DModel", "UNetUnconditionalModel"):
    raise ValueError(f"Got a network of class {name}; expected a UNet2DModel, the U-Net of diffusers' pixel models.")
  for key in _COUNTS:
    value = given.get(key)
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if any(item < 1 for item in values) or (values is value and not values):
      raise ValueError(f"Got a UNet2DModel with {key}={jsonfiles.shorten(value)}; expected at least 1.")
  size = given.get("sample_size")
  if isinstance(size, list | tuple) and len(size) != 2:
    raise ValueError(f"Got a UNet2DModel with sample_size={size!r}; expected one number, or height and width.")
  unknown = {key: value for key, value in given.items() if key not in DEFAULTS and not key.startswith("_")}
  for key, value in unknown.items():
    if value not in (None, False):
      raise _unsupported(key, value, "a config without this key")
  return DEFAULTS | {key: value for key, value in given.items() if key in DEFAULTS}


def image_size(config: Config) -> tuple[int, int]:
  """[H, W] of the images that a model was made for; the smallest that it takes if its config does not say."""
  size = config["sample_size"]
  if size is None:
    size = 2 ** (len(config["block_out_channels"]) - 1)
  return (size, size) if isinstance(size, int) else (size[0], size[1])


def layout(levels: int) -> tensors.Layout:
  """The names in a file for our parameters, of a network of that many levels."""

  def block(match: re.Match) -> str:
    way, level, rest = match["way"], int(match["level"]), match["rest"]
    place = f"down_blocks.{level}" if way == "down" else f"up_blocks.{levels - 1 - level}"
    if rest == f"{way}sample":
      return f"{place}.{way}samplers.0"
    index, _, attention = rest.partition("_")
    return f"{place}.{'attentions' if attention else 'resnets'}.{index}"

  def name(path: str) -> str:
    head, *parts = path.split("/")
    fixed = {
      "conv_in": "conv_in",
      "norm_out": "conv_norm_out",
      "conv_out": "conv_out",
      "time_frequencies": "time_proj",
      "time_1": "time_embedding.linear_1",
      "time_2": "time_embedding.linear_2",
      "classes": "class_embedding",
      "vector_1": "class_embedding.linear_1",
      "vector_2": "class_embedding.linear_2",
      "middle_0": "mid_block.resnets.0",
      "middle_1": "mid_block.resnets.1",
      "middle_attention": "mid_block.attentions.0",
    }
    start = fixed.get(head) or re.sub(r"(?P<way>down|up)_(?P<level>\d+)_(?P<rest>.+)", block, head)
    inner = ["to_out.0" if part == "to_out" else part for part in parts[:-1]]
    return ".".join([start, *inner, tensors.leaf_name(path)])

  return tensors.Layout(name)


def modern_names(names) -> dict[str, str]:
  """Old names of attention's projections to today's, for those among `names` that have them."""
  pattern = re.compile(rf"(\.attentions\.\d+)\.({'|'.join(_OLD_NAMES)})\.")
  return {name: new for name in names if (new := pattern.sub(lambda m: f"{m[1]}.{_OLD_NAMES[m[2]]}.", name)) != name}


def _kind(name: str) -> str:
  return name.removeprefix("UNetRes")


def _way(kind: str, direction: str, key: str, resample_type: str) -> tuple[bool, str]:
  """Whether a block attends, and how it resamples."""
  plain = {f"{direction}Block2D": "conv", f"Resnet{direction}sampleBlock2D": "residual"}
  if kind in plain:
    return False, plain[kind]
  if kind != f"Attn{direction}Block2D":
    raise _unsupported(key, kind, f"{direction}Block2D, Resnet{direction}sampleBlock2D and Attn{direction}Block2D")
  known = {"conv": "conv", "resnet": "residual"}
  if resample_type not in known:
    raise _unsupported(f"{direction.lower()}sample_type", resample_type, "conv and resnet")
  return True, known[resample_type]


def _ways(ways: list[str]) -> str | tuple[str, ...]:
  return ways[0] if len(set(ways)) == 1 else tuple(ways) if ways else "conv"


def _types(network: UNet, direction: str, level: int, ways: tuple[str, ...]) -> str:
  if level in network.attention_levels:
    return f"Attn{direction}Block2D"
  # The last level on the way down and the first on the way up are not resampled from, so either would do.
  index = level if direction == "Down" else level - 1
  residual = 0 <= index < len(ways) and ways[index] == "residual"
  return f"Resnet{direction}sampleBlock2D" if residual else f"{direction}Block2D"


def _type(network: UNet, ways: tuple[str, ...], attended: list[int]) -> str:
  """How the levels with attention resample, which is one for all of them; the others' types say it themselves."""
  kinds = {ways[index] for index in attended}
  if len(kinds) > 1:
    raise ValueError(
      f"Got levels {tuple(network.attention_levels)} with attention that resample in {len(kinds)} ways, {ways}; diffusers'"
      " UNet2DModel has one for all of them."
    )
  return "resnet" if "residual" in kinds else "conv"


def _supported(config: Config, key: str, *known: Any) -> None:
  if config[key] not in known:
    raise _unsupported(key, config[key], " or ".join(map(repr, known)))


def _unsupported(key: str, value: Any, known: str) -> ValueError:
  return ValueError(
    f"Got a UNet2DModel with {key}={jsonfiles.shorten(value)}, which is not supported; supported: {known}."
  )
