"""Convert between the config of diffusers' `SD3Transformer2DModel` and our network, and map names of parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.interop import folders, tensors
from ddpm_jax.networks import MMDiT
from ddpm_jax.storage import jsonfiles

Config = dict[str, Any]
PyTree = Any
NAMES = ("SD3Transformer2DModel",)
ANCHOR = "pos_embed.proj.weight"

# The defaults of `SD3Transformer2DModel`, used for keys that a file omits.
DEFAULTS: Config = {
  "sample_size": 128,
  "patch_size": 2,
  "in_channels": 16,
  "num_layers": 18,
  "attention_head_dim": 64,
  "num_attention_heads": 18,
  "joint_attention_dim": 4096,
  "caption_projection_dim": 1152,
  "pooled_projection_dim": 2048,
  "out_channels": 16,
  "pos_embed_max_size": 96,
  "dual_attention_layers": (),
  "qk_norm": None,
}
_NONE = type(None)
_TYPES: dict[str, jsonfiles.Kinds] = {
  **{key: (int,) for key, value in DEFAULTS.items() if isinstance(value, int)},
  "out_channels": (int, _NONE),
  "dual_attention_layers": ([int],),
  "qk_norm": (str, _NONE),
}
_QK_NORMS = (None, "rms_norm")


def from_config(config: Mapping[str, Any]) -> MMDiT:
  """Create our network from the config of an `SD3Transformer2DModel`.

  Omitted keys have the defaults of `SD3Transformer2DModel`. As in this class, numbers in dual_attention_layers that
  belong to no block have no effect.

  Raises:
    ValueError: if an option is not supported here. The message names the option.
  """
  c = with_defaults(config)
  network = MMDiT(
    out_channels=c["in_channels"] if c["out_channels"] is None else c["out_channels"],
    channels=c["num_attention_heads"] * c["attention_head_dim"],
    layers=c["num_layers"],
    heads=c["num_attention_heads"],
    patch=c["patch_size"],
    context_features=c["joint_attention_dim"],
    vector_features=c["pooled_projection_dim"],
    qk_norm=c["qk_norm"] is not None,
    dual_layers=tuple(sorted({index for index in c["dual_attention_layers"] if 0 <= index < c["num_layers"]})),
    positions_size=c["pos_embed_max_size"],
    positions_base=c["sample_size"] // c["patch_size"],
  )
  network.check_input((c["patch_size"], c["patch_size"], c["in_channels"]))
  return network


def to_config(network: MMDiT, params: PyTree, size: tuple[int, int] | None = None) -> Config:
  """Return the config of the `SD3Transformer2DModel` that computes the same function as our network.

  This is the inverse of `from_config`.

  Args:
    network: our network.
    params: its parameters, or their shapes.
    size: the height and width of its input. The larger one becomes sample_size, the size of images that diffusers
      generates by default. None sets sample_size to the size whose positions are 0, 1, 2, ... in a new table. The
      function is the same, because the table of positions is stored with the parameters.

  Raises:
    ValueError: if `SD3Transformer2DModel` does not support an option of the network. The message names the option.
  """
  n = network
  for option, supported in (("time_features", 256), ("epsilon", 1e-6)):
    if getattr(n, option) != supported:
      raise ValueError(
        f"Got a network with {option}={getattr(n, option)!r}; expected {supported!r}, because {NAMES[0]} has no such"
        " option."
      )
  if "vector" not in params:
    raise ValueError(f"Got a network without a vector; expected one, because every {NAMES[0]} has a pooled vector.")
  return DEFAULTS | {
    "sample_size": n.positions_base * n.patch if size is None else max(size),
    "patch_size": n.patch,
    "in_channels": params["patches"]["kernel"].shape[-2],
    "num_layers": n.layers,
    "attention_head_dim": n.channels // n.heads,
    "num_attention_heads": n.heads,
    "joint_attention_dim": params["tokens"]["kernel"].shape[0],
    "caption_projection_dim": n.channels,
    "pooled_projection_dim": params["vector"]["linear_1"]["kernel"].shape[0],
    "out_channels": n.out_channels,
    "pos_embed_max_size": n.positions_size,
    "dual_attention_layers": sorted(n.dual_layers),
    "qk_norm": "rms_norm" if n.qk_norm else None,
  }


def template(network: MMDiT, channels: int) -> PyTree:
  """Return the shapes of a network's parameters for x with `channels` channels, without allocating arrays.

  The network must be the result of `from_config`.
  """
  conditions = {
    "tokens": jax.ShapeDtypeStruct((1, 1, network.context_features), jnp.float32),
    "vector": jax.ShapeDtypeStruct((1, network.vector_features), jnp.float32),
  }
  return tensors.abstract_params(network, (network.patch, network.patch, channels), **conditions)


def layout(network: MMDiT) -> tensors.Layout:
  """Return the layout of diffusers' weight files for a network."""
  names = {
    "patches": "pos_embed.proj",
    "time": "time_text_embed.timestep_embedder",
    "vector": "time_text_embed.text_embedder",
    "tokens": "context_embedder",
    "modulation_out": "norm_out.linear",
    **{f"block_{index}": f"transformer_blocks.{index}" for index in range(network.layers)},
    "modulation": "norm1.linear",
    "context_modulation": "norm1_context.linear",
    "attention": "attn",
    "image_attention": "attn2",
    "to_out": "to_out.0",
    "context_out": "to_add_out",
    **{f"context_{name}": f"add_{name}_proj" for name in "qkv"},
    **{f"context_norm_{name}": f"norm_added_{name}" for name in "qk"},
    "feed_forward": "ff.net",
    "context_feed_forward": "ff_context.net",
  }
  # The layers of two embeddings have the names of the layers of feed-forward networks.
  feed_forward = names | {"linear_1": "0.proj", "linear_2": "2"}

  def name_of(path: str) -> str:
    if path == "position_table":
      return "pos_embed.pos_embed"
    parts = [part for part in path.split("/")[:-1] if part != "layers"]
    inner = feed_forward if "feed_forward" in path else names
    return ".".join([*(inner.get(part, part) for part in parts), tensors.leaf_name(path)])

  return tensors.Layout(name_of)


def with_defaults(config: Mapping[str, Any]) -> Config:
  """Complete a config with the defaults of `SD3Transformer2DModel` for omitted keys.

  Raises:
    ValueError: if the config is for another class, a value is invalid, or an option is not supported.
  """
  name = config.get("_class_name", NAMES[0])
  if name not in NAMES:
    raise ValueError(f"Got a network of class {name}; expected {NAMES[0]}, the class of Stable Diffusion 3.")
  jsonfiles.check_types(config, _TYPES, name)
  folders.check_known(config, DEFAULTS, name)
  c = DEFAULTS | {key: value for key, value in config.items() if key in DEFAULTS}
  for key, value in c.items():
    if isinstance(value, int) and value < 1:
      raise ValueError(f"Got a {name} with {key}={value}; expected 1 or more.")
  if c["qk_norm"] not in _QK_NORMS:
    raise _unsupported("qk_norm", c["qk_norm"], "null or 'rms_norm'")
  channels = c["num_attention_heads"] * c["attention_head_dim"]
  if c["caption_projection_dim"] != channels:
    raise _unsupported("caption_projection_dim", c["caption_projection_dim"], f"{channels}, the features of all heads")
  if c["sample_size"] % c["patch_size"]:
    raise _unsupported("sample_size", c["sample_size"], f"a multiple of patch_size={c['patch_size']}")
  return c


def _unsupported(key: str, value: Any, supported: str) -> ValueError:
  return ValueError(
    f"Got a {NAMES[0]} with {key}={jsonfiles.shorten(value)}, which is not supported; expected {supported}."
  )
