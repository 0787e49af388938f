"""Convert between the config of diffusers' `UNet2DConditionModel` and our network, and map names of parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.interop import folders, tensors, unet2d
from ddpm_jax.networks import ConditionalUNet
from ddpm_jax.networks.options import multipliers_of, per_level
from ddpm_jax.storage import jsonfiles

Config = dict[str, Any]
PyTree = Any
NAME = "UNet2DConditionModel"
NAMES = (NAME,)
# A tensor that every such network has.
ANCHOR = "conv_in.weight"

# The defaults of `UNet2DConditionModel`, used for keys that a file omits.
DEFAULTS: Config = {
  "sample_size": None,
  "in_channels": 4,
  "out_channels": 4,
  "center_input_sample": False,
  "flip_sin_to_cos": True,
  "freq_shift": 0,
  "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
  "mid_block_type": "UNetMidBlock2DCrossAttn",
  "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
  "only_cross_attention": False,
  "block_out_channels": [320, 640, 1280, 1280],
  "layers_per_block": 2,
  "downsample_padding": 1,
  "mid_block_scale_factor": 1,
  "dropout": 0.0,
  "act_fn": "silu",
  "norm_num_groups": 32,
  "norm_eps": 1e-5,
  "cross_attention_dim": 1280,
  "transformer_layers_per_block": 1,
  "reverse_transformer_layers_per_block": None,
  "encoder_hid_dim": None,
  "encoder_hid_dim_type": None,
  "attention_head_dim": 8,
  "num_attention_heads": None,
  "dual_cross_attention": False,
  "use_linear_projection": False,
  "class_embed_type": None,
  "addition_embed_type": None,
  "addition_time_embed_dim": None,
  "num_class_embeds": None,
  "upcast_attention": False,
  "resnet_time_scale_shift": "default",
  "resnet_skip_time_act": False,
  "resnet_out_scale_factor": 1.0,
  "time_embedding_type": "positional",
  "time_embedding_dim": None,
  "time_embedding_act_fn": None,
  "timestep_post_act": None,
  "time_cond_proj_dim": None,
  "conv_in_kernel": 3,
  "conv_out_kernel": 3,
  "projection_class_embeddings_input_dim": None,
  "attention_type": "default",
  "class_embeddings_concat": False,
  "mid_block_only_cross_attention": None,
  "cross_attention_norm": None,
  "addition_embed_type_num_heads": 64,
}
# The supported values of keys that support only a few values.
_FIXED: dict[str, tuple[Any, ...]] = {
  "mid_block_type": (DEFAULTS["mid_block_type"],),
  "only_cross_attention": (False,),
  "downsample_padding": (1,),
  "mid_block_scale_factor": (1,),
  "act_fn": ("silu", "swish"),
  "encoder_hid_dim": (None,),
  "encoder_hid_dim_type": (None,),
  "num_attention_heads": (None,),
  "dual_cross_attention": (False,),
  "class_embed_type": (None, "timestep", "identity", "projection"),
  "addition_embed_type": (None, "text_time"),
  "resnet_time_scale_shift": ("default",),
  "resnet_skip_time_act": (False,),
  "resnet_out_scale_factor": (1,),
  "time_embedding_type": ("positional",),
  "time_embedding_act_fn": (None,),
  "timestep_post_act": (None,),
  "conv_in_kernel": (3,),
  "conv_out_kernel": (3,),
  "attention_type": ("default",),
  "class_embeddings_concat": (False,),
  "mid_block_only_cross_attention": (None, False),
  "cross_attention_norm": (None,),
}
_NONE = type(None)
_TYPES: dict[str, jsonfiles.Kinds] = {
  "_class_name": (str,),
  "sample_size": (int, [int], _NONE),
  "in_channels": (int,),
  "out_channels": (int,),
  "center_input_sample": (bool,),
  "flip_sin_to_cos": (bool,),
  "freq_shift": (float,),
  "down_block_types": ([str],),
  "up_block_types": ([str],),
  "block_out_channels": ([int],),
  "layers_per_block": (int, [int]),
  "dropout": (float,),
  "norm_num_groups": (int,),
  "norm_eps": (float,),
  "cross_attention_dim": (int, [int]),
  "transformer_layers_per_block": (int, [int]),
  "reverse_transformer_layers_per_block": ([int], _NONE),
  "attention_head_dim": (int, [int]),
  "use_linear_projection": (bool,),
  "addition_time_embed_dim": (int, _NONE),
  "num_class_embeds": (int, _NONE),
  "upcast_attention": (bool, _NONE),
  "time_embedding_dim": (int, _NONE),
  "time_cond_proj_dim": (int, _NONE),
  "projection_class_embeddings_input_dim": (int, _NONE),
}
# Options that must be at least 1 if they are set.
_COUNTS = (
  "sample_size",
  "in_channels",
  "out_channels",
  "block_out_channels",
  "layers_per_block",
  "norm_num_groups",
  "cross_attention_dim",
  "transformer_layers_per_block",
  "attention_head_dim",
  "addition_time_embed_dim",
  "num_class_embeds",
  "time_embedding_dim",
  "time_cond_proj_dim",
  "projection_class_embeddings_input_dim",
)
# Options with one number for each level, or one number for all.
_PER_LEVEL = ("layers_per_block", "cross_attention_dim", "transformer_layers_per_block", "attention_head_dim")


def from_config(config: Mapping[str, Any]) -> ConditionalUNet:
  """Create our network from the config of a `UNet2DConditionModel`.

  Omitted keys have the defaults of `UNet2DConditionModel`. In this class, `attention_head_dim` is the number of
  heads. The option `upcast_attention` has no effect, because our softmax is always computed in float32 or wider.

  Raises:
    ValueError: if an option is not supported here. The message names the option.
  """
  c = with_defaults(config)
  widths, levels = c["block_out_channels"], len(c["block_out_channels"])
  text_time, embed_type = c["addition_embed_type"] == "text_time", c["class_embed_type"]
  dense = text_time or embed_type == "projection"
  network = ConditionalUNet(
    out_channels=c["out_channels"],
    channels=widths[0],
    multipliers=multipliers_of(widths),
    blocks=_one_value(c, "layers_per_block"),
    attention_levels=_attention_levels(c, levels),
    transformer_layers=_as_tuple(c["transformer_layers_per_block"]),
    heads=_as_tuple(c["attention_head_dim"]),
    linear_projections=c["use_linear_projection"],
    context_features=_one_value(c, "cross_attention_dim"),
    dropout=c["dropout"],
    groups=c["norm_num_groups"],
    epsilon=c["norm_eps"],
    time_embedding="cos_sin" if c["flip_sin_to_cos"] else "sin_cos",
    embedding_features=c["time_embedding_dim"] or 0,
    frequency_shift=float(c["freq_shift"]),
    num_classes=0 if embed_type else c["num_class_embeds"] or 0,
    vector_embedding="dense" if dense else {None: "", "timestep": "time", "identity": "identity"}[embed_type],
    vector_features=c["projection_class_embeddings_input_dim"] if dense else 0,
    size_features=c["addition_time_embed_dim"] if text_time else 0,
    guidance_features=c["time_cond_proj_dim"] or 0,
    center_input=c["center_input_sample"],
  )
  network.check_input((1, 1, c["in_channels"]))
  return network


def to_config(network: ConditionalUNet, params: PyTree, size: tuple[int, int] | None = None) -> Config:
  """Return the config of the `UNet2DConditionModel` that computes the same function as our network.

  This is the inverse of `from_config`.

  Args:
    network: our network.
    params: its parameters, or their shapes.
    size: the height and width of its input. None sets the config's sample_size to null.

  Raises:
    ValueError: if `UNet2DConditionModel` does not support an option of the network. The message names the option.
  """
  n, levels = network, len(network.multipliers)
  if not n.groups:
    raise ValueError(
      "Got a network with groups=0, so that the number of groups depends on the layer; expected one number for all"
      f" layers, as in diffusers' {NAME}."
    )
  for option in ("positions", "vocabulary"):
    if getattr(n, option):
      raise ValueError(
        f"Got a network with {option}={getattr(n, option)!r}; expected {option}={type(getattr(n, option))()!r}, because {NAME} has no"
        " such option."
      )
  dense, text_time = n.vector_embedding == "dense", n.size_features > 0
  types = {
    direction: [f"{'CrossAttn' if level in n.attention_levels else ''}{direction}Block2D" for level in range(levels)]
    for direction in ("Down", "Up")
  }
  keys = params["middle_attention"]["layer_0"]["cross_attention"]["to_k"]["kernel"]
  return DEFAULTS | {
    "sample_size": None if size is None else size[0] if size[0] == size[1] else list(size),
    "in_channels": params["conv_in"]["kernel"].shape[-2],
    "out_channels": n.out_channels,
    "center_input_sample": n.center_input,
    "flip_sin_to_cos": n.time_embedding == "cos_sin",
    "freq_shift": int(n.frequency_shift) if n.frequency_shift == int(n.frequency_shift) else n.frequency_shift,
    "down_block_types": types["Down"],
    "up_block_types": types["Up"][::-1],
    "block_out_channels": [n.num_features(level) for level in range(levels)],
    "layers_per_block": n.blocks,
    "dropout": n.dropout,
    "norm_num_groups": n.groups,
    "norm_eps": n.epsilon,
    "cross_attention_dim": keys.shape[0],
    "transformer_layers_per_block": _as_list(n.transformer_layers),
    "attention_head_dim": _as_list(n.heads),
    "use_linear_projection": n.linear_projections,
    "class_embed_type": {"": None, "time": "timestep", "identity": "identity", "dense": "projection"}[
      n.vector_embedding
    ]
    if not text_time
    else None,
    "addition_embed_type": "text_time" if text_time else None,
    "addition_time_embed_dim": n.size_features or None,
    "num_class_embeds": n.num_classes or None,
    "time_embedding_dim": n.embedding_features or None,
    "time_cond_proj_dim": n.guidance_features or None,
    "projection_class_embeddings_input_dim": params["vector_1"]["kernel"].shape[0] if dense else None,
  }


def template(network: ConditionalUNet, channels: int) -> PyTree:
  """Return the shapes of a network's parameters without allocating arrays.

  The network must be the result of `from_config`.

  `channels` is the number of input channels: the channels of x and, if an image condition is concatenated with x,
  the channels of this condition.
  """
  n = network

  def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *shape), dtype)

  conditions: dict[str, Any] = {"tokens": array(1, n.context_features)}
  if n.num_classes:
    conditions["classes"] = array(dtype=jnp.int32)
  if n.vector_embedding:
    # The parameters depend on the total of the features only, so one size suffices.
    width = {"time": (), "identity": (n.embedding_width,), "dense": (n.vector_features - n.size_features,)}
    conditions["vector"] = array(*width[n.vector_embedding])
  if n.size_features:
    conditions["sizes"] = array(1)
  return tensors.abstract_params(network, (1, 1, channels), **conditions)


def layout(network: ConditionalUNet) -> tensors.Layout:
  """Return the layout of diffusers' weight files for a network."""
  names = {"guidance": "time_embedding.cond_proj", **transformer_names(network)}
  if network.size_features:
    names |= {f"vector_{k}": f"add_embedding.linear_{k}" for k in (1, 2)}
  return unet2d.block_layout(len(network.multipliers), names)


def transformer_names(network: ConditionalUNet) -> dict[str, str]:
  """Map our names for the parts of transformer blocks to the names in weight files.

  The names are the same in the files of diffusers and of latent diffusion.
  """
  depth = max(per_level(network.transformer_layers, len(network.multipliers)))
  return {
    "self_attention": "attn1",
    "cross_attention": "attn2",
    "feed_forward": "ff.net",
    "dense_1": "0.proj",
    "dense_2": "2",
    **{f"layer_{k}": f"transformer_blocks.{k}" for k in range(depth)},
  }


def with_defaults(config: Mapping[str, Any]) -> Config:
  """Complete a config with the defaults of `UNet2DConditionModel` for omitted keys.

  Raises:
    ValueError: if the config is for another class, a value is invalid, or an option is not supported.
  """
  name = config.get("_class_name", NAME)
  if name != NAME:
    raise ValueError(
      f"Got a network of class {name}; expected {NAME}, the class of the U-Nets in diffusers' text-to-image models."
    )
  # Check supported values first. An unsupported value may also have a wrong type, and this error says more.
  for key, supported in _FIXED.items():
    if key in config and not any(_equal(config[key], value) for value in supported):
      raise _unsupported(key, config[key], " or ".join(map(repr, supported)))
  jsonfiles.check_types(config, _TYPES, NAME)
  folders.check_known(config, DEFAULTS, NAME)
  c = DEFAULTS | {key: value for key, value in config.items() if key in DEFAULTS}
  _check_counts(c)
  _check_embeddings(c)
  return c


def _check_counts(config: Config) -> None:
  """Check the numbers of a complete config, and the lengths of its lists."""
  for key in _COUNTS:
    value = config[key]
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if any(item < 1 for item in values) or (values is value and not values):
      raise ValueError(f"Got a {NAME} with {key}={jsonfiles.shorten(value)}; expected at least 1.")
  size, levels = config["sample_size"], len(config["block_out_channels"])
  if isinstance(size, list | tuple) and len(size) != 2:
    raise ValueError(f"Got a {NAME} with sample_size={size!r}; expected one number, or height and width.")
  for key in ("down_block_types", "up_block_types", *_PER_LEVEL):
    value = config[key]
    if isinstance(value, list | tuple) and len(value) != levels:
      raise ValueError(
        f"Got a {NAME} with {len(value)} values of {key} and {levels} block_out_channels; expected the same number of each."
      )


def _check_embeddings(config: Config) -> None:
  """Check the options for the embeddings of classes, vectors and sizes in a complete config."""
  c = config
  text_time, embed_type = c["addition_embed_type"] is not None, c["class_embed_type"]
  if text_time and (embed_type or c["num_class_embeds"]):
    key = "class_embed_type" if embed_type else "num_class_embeds"
    raise _unsupported(key, c[key], "null beside addition_embed_type='text_time'")
  required = {
    "projection_class_embeddings_input_dim": text_time or embed_type == "projection",
    "addition_time_embed_dim": text_time,
  }
  for key, is_required in required.items():
    if is_required and c[key] is None:
      raise ValueError(
        f"Got a {NAME} without {key}; expected an integer for addition_embed_type={c['addition_embed_type']!r} and"
        f" class_embed_type={embed_type!r}."
      )
  total, each = c["projection_class_embeddings_input_dim"], c["addition_time_embed_dim"]
  if text_time and total <= each:
    raise ValueError(
      f"Got a {NAME} with projection_class_embeddings_input_dim={total} and addition_time_embed_dim={each}; expected"
      " the first to be larger, because it counts the features of the text and of all embedded sizes."
    )


def _attention_levels(config: Config, levels: int) -> tuple[int, ...]:
  """Return the levels that have attention.

  They must be the same in down_block_types and in up_block_types.
  """
  found = {}
  for key, direction in (("down_block_types", "Down"), ("up_block_types", "Up")):
    kinds = {f"{direction}Block2D": False, f"CrossAttn{direction}Block2D": True}
    for name in config[key]:
      if name not in kinds:
        raise _unsupported(key, name, " or ".join(kinds))
    types = config[key] if direction == "Down" else config[key][::-1]
    found[key] = tuple(level for level in range(levels) if kinds[types[level]])
  if found["down_block_types"] != found["up_block_types"]:
    raise _unsupported("up_block_types", config["up_block_types"], "attention at the same levels as down_block_types")
  layers = per_level(config["transformer_layers_per_block"], levels)
  up = config["reverse_transformer_layers_per_block"]
  if up is not None and tuple(up) != layers[::-1]:
    raise _unsupported("reverse_transformer_layers_per_block", up, f"null or {list(layers[::-1])}")
  return found["down_block_types"]


def _one_value(config: Config, key: str) -> int:
  """Return the value of an option that must be the same for all levels."""
  values = set(per_level(config[key], len(config["block_out_channels"])))
  if len(values) > 1:
    raise _unsupported(key, config[key], "the same number for all levels")
  return values.pop()


def _equal(a: Any, b: Any) -> bool:
  """Return whether two JSON values are equal.

  Unlike in Python, 1 does not equal True.
  """
  return isinstance(a, bool) == isinstance(b, bool) and a == b


def _as_tuple(value: Any) -> Any:
  return tuple(value) if isinstance(value, list | tuple) else value


def _as_list(value: Any) -> Any:
  return list(value) if isinstance(value, list | tuple) else value


def _unsupported(key: str, value: Any, supported: str) -> ValueError:
  return ValueError(
    f"Got a {NAME} with {key}={jsonfiles.shorten(value)}, which is not supported; expected {supported}."
  )
