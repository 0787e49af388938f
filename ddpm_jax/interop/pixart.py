"""Convert between the config of diffusers' `PixArtTransformer2DModel` and our network, and map names of parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.interop import folders, tensors
from ddpm_jax.networks import PixArt
from ddpm_jax.storage import jsonfiles

Config = dict[str, Any]
PyTree = Any
NAMES = ("PixArtTransformer2DModel",)
ANCHOR = "pos_embed.proj.weight"

# The defaults of `PixArtTransformer2DModel`, used for keys that a file omits.
DEFAULTS: Config = {
  "num_attention_heads": 16,
  "attention_head_dim": 72,
  "in_channels": 4,
  "out_channels": 8,
  "num_layers": 28,
  "dropout": 0.0,
  "norm_num_groups": 32,
  "cross_attention_dim": 1152,
  "attention_bias": True,
  "sample_size": 128,
  "patch_size": 2,
  "activation_fn": "gelu-approximate",
  "num_embeds_ada_norm": 1000,
  "upcast_attention": False,
  "norm_type": "ada_norm_single",
  "norm_elementwise_affine": False,
  "norm_eps": 1e-6,
  "interpolation_scale": None,
  "use_additional_conditions": None,
  "caption_channels": None,
  "attention_type": "default",
}
# The supported values of keys that support only a few values.
_FIXED: dict[str, tuple[Any, ...]] = {
  "dropout": (0,),
  "attention_bias": (True,),
  "activation_fn": ("gelu-approximate",),
  "norm_type": ("ada_norm_single",),
  "norm_elementwise_affine": (False,),
  "attention_type": ("default",),
}
_NONE = type(None)
_TYPES: dict[str, jsonfiles.Kinds] = {
  "num_attention_heads": (int,),
  "attention_head_dim": (int,),
  "in_channels": (int,),
  "out_channels": (int, _NONE),
  "num_layers": (int,),
  "norm_num_groups": (int,),
  "cross_attention_dim": (int,),
  "sample_size": (int,),
  "patch_size": (int,),
  "num_embeds_ada_norm": (int,),
  "upcast_attention": (bool, _NONE),
  "norm_eps": (float,),
  "interpolation_scale": (float, _NONE),
  "use_additional_conditions": (bool, _NONE),
  "caption_channels": (int, _NONE),
}
# Options that must be above 0 if they are set.
_POSITIVE = (
  *("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "num_layers", "norm_num_groups"),
  *("cross_attention_dim", "sample_size", "patch_size", "num_embeds_ada_norm", "norm_eps", "interpolation_scale"),
  "caption_channels",
)
# The states that replaced hidden texts in training. Published files contain them, but today's class does not.
_UNUSED = "caption_projection.y_embedding"
# The class has no option for the number of sines and cosines of each size.
_SIZE_FEATURES = 256


def from_config(config: Mapping[str, Any]) -> PixArt:
  """Create our network from the config of a `PixArtTransformer2DModel`.

  Omitted keys have the defaults of `PixArtTransformer2DModel`. If use_additional_conditions is null, the network takes
  sizes if and only if sample_size is 128. If interpolation_scale is null, it is sample_size / 64, rounded down, but at
  least 1. These are the rules of the class. The options `norm_num_groups`, `num_embeds_ada_norm` and `upcast_attention`
  have no effect.

  Raises:
    ValueError: if an option is not supported here. The message names the option.
  """
  c = with_defaults(config)
  size, scale, takes_sizes = c["sample_size"], c["interpolation_scale"], c["use_additional_conditions"]
  network = PixArt(
    out_channels=c["in_channels"] if c["out_channels"] is None else c["out_channels"],
    channels=c["num_attention_heads"] * c["attention_head_dim"],
    layers=c["num_layers"],
    heads=c["num_attention_heads"],
    patch=c["patch_size"],
    base_size=size // c["patch_size"],
    interpolation_scale=float(max(size // 64, 1) if scale is None else scale),
    context_features=c["caption_channels"],
    size_features=_SIZE_FEATURES if (size == 128 if takes_sizes is None else takes_sizes) else 0,
    epsilon=c["norm_eps"],
  )
  network.check_input((size, size, c["in_channels"]))
  return network


def to_config(network: PixArt, params: PyTree, size: tuple[int, int] | None = None) -> Config:
  """Return the config of the `PixArtTransformer2DModel` that computes the same function as our network.

  This is the inverse of `from_config`.

  Args:
    network: our network.
    params: its parameters, or their shapes.
    size: the height and width of its input. They have no effect: positions depend on the config's sample_size, so it
      is always the size that the network has by `base_size`.

  Raises:
    ValueError: if `PixArtTransformer2DModel` does not support an option of the network. The message names the option.
  """
  n = network
  for option, supported in (
    ("frequency_shift", (0,)),
    ("size_features", (0, _SIZE_FEATURES)),
  ):
    if getattr(n, option) not in supported:
      raise ValueError(
        f"Got a network with {option}={getattr(n, option)!r}; expected {' or '.join(map(repr, supported))}, because"
        f" {NAMES[0]} has no such option."
      )
  scale = n.interpolation_scale
  return DEFAULTS | {
    "num_attention_heads": n.heads,
    "attention_head_dim": n.channels // n.heads,
    "in_channels": params["patches"]["kernel"].shape[-2],
    "out_channels": n.out_channels,
    "num_layers": n.layers,
    "cross_attention_dim": n.channels,
    "sample_size": n.base_size * n.patch,
    "patch_size": n.patch,
    "norm_eps": n.epsilon,
    "interpolation_scale": int(scale) if scale == int(scale) else scale,
    "use_additional_conditions": n.size_features > 0,
    "caption_channels": params["tokens_1"]["kernel"].shape[0],
  }


def template(network: PixArt, channels: int) -> PyTree:
  """Return the shapes of a network's parameters for x with `channels` channels, without allocating arrays.

  The network must be the result of `from_config`.
  """
  conditions = {"tokens": jax.ShapeDtypeStruct((1, 1, network.context_features), jnp.float32)}
  if network.size_features:
    conditions["sizes"] = jax.ShapeDtypeStruct((1, 3), jnp.float32)
  return tensors.abstract_params(network, (network.patch, network.patch, channels), **conditions)


def layout(network: PixArt) -> tensors.Layout:
  """Return the layout of diffusers' weight files for a network.

  Some published files also contain the states that replaced hidden texts in training. They are ignored.
  """
  embedders = {
    "time": "timestep_embedder",
    "resolution": "resolution_embedder",
    "aspect_ratio": "aspect_ratio_embedder",
  }
  names = {
    "patches": "pos_embed.proj",
    **{name: f"adaln_single.emb.{embedder}" for name, embedder in embedders.items()},
    "modulation": "adaln_single.linear",
    **{f"tokens_{k}": f"caption_projection.linear_{k}" for k in (1, 2)},
    **{f"block_{index}": f"transformer_blocks.{index}" for index in range(network.layers)},
    "self_attention": "attn1",
    "cross_attention": "attn2",
    "to_out": "to_out.0",
    "feed_forward": "ff.net",
  }
  # The layers of two embeddings have the names of the layers of feed-forward networks.
  feed_forward = {"linear_1": "0.proj", "linear_2": "2"}

  def name_of(path: str) -> str:
    *parts, last = path.split("/")
    if last == "vectors":
      return ".".join([*(names[part] for part in parts[:-1]), "scale_shift_table"])
    inner = names | feed_forward if "feed_forward" in parts else names
    return ".".join([*(inner.get(part, part) for part in parts if part != "layers"), tensors.leaf_name(path)])

  return tensors.Layout(name_of, is_ignored=lambda name: name == _UNUSED)


def with_defaults(config: Mapping[str, Any]) -> Config:
  """Complete a config with the defaults of `PixArtTransformer2DModel` for omitted keys.

  Raises:
    ValueError: if the config is for another class, a value is invalid, or an option is not supported.
  """
  name = config.get("_class_name", NAMES[0])
  if name not in NAMES:
    raise ValueError(f"Got a network of class {name}; expected {NAMES[0]}, the class of PixArt's networks.")
  # Check supported values first. An unsupported value may also have a wrong type, and this error says more.
  for key, supported in _FIXED.items():
    if key in config and not any(_equal(config[key], value) for value in supported):
      raise _unsupported(key, config[key], " or ".join(map(repr, supported)))
  jsonfiles.check_types(config, _TYPES, NAMES[0])
  folders.check_known(config, DEFAULTS, NAMES[0])
  c = DEFAULTS | {key: value for key, value in config.items() if key in DEFAULTS}
  for key in _POSITIVE:
    if c[key] is not None and c[key] <= 0:
      raise ValueError(f"Got a {NAMES[0]} with {key}={c[key]}; expected a number above 0.")
  if c["caption_channels"] is None:
    raise _unsupported("caption_channels", None, "the number of features of the text encoder, such as 4096")
  channels = c["num_attention_heads"] * c["attention_head_dim"]
  if c["cross_attention_dim"] != channels:
    raise _unsupported("cross_attention_dim", c["cross_attention_dim"], f"{channels}, the features of all heads")
  if c["sample_size"] % c["patch_size"]:
    raise _unsupported("sample_size", c["sample_size"], f"a multiple of patch_size={c['patch_size']}")
  return c


def _equal(a: Any, b: Any) -> bool:
  """Return whether two JSON values are equal.

  Unlike in Python, 1 does not equal True.
  """
  return isinstance(a, bool) == isinstance(b, bool) and a == b


def _unsupported(key: str, value: Any, supported: str) -> ValueError:
  return ValueError(
    f"Got a {NAMES[0]} with {key}={jsonfiles.shorten(value)}, which is not supported; expected {supported}."
  )
