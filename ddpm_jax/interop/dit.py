"""Convert between the config of diffusers' `DiTTransformer2DModel` and our network, and map names of parameters."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.interop import folders, tensors
from ddpm_jax.networks import DiT
from ddpm_jax.storage import jsonfiles

Config = dict[str, Any]
PyTree = Any
NAMES = ("DiTTransformer2DModel",)
ANCHOR = "pos_embed.proj.weight"
_NAME = NAMES[0]
# Constants of the class, which no option changes.
_SHIFT, _EPSILON, _WAVES = 1.0, 1e-6, 256
# Advice for the error about an option that differs from the constant of diffusers' class.
_HINTS = {
  "frequency_shift": (
    " Train with the settings --config.model.network.frequency_shift=1.0 and"
    " --config.model.network.mlp_epsilon=1e-5, the constants of the published folders, to export the network."
  )
}
# The name of a block in weight files.
_BLOCK = "transformer_blocks.{}"

# The defaults of `DiTTransformer2DModel`, used for keys that a file omits.
DEFAULTS: Config = {
  "num_attention_heads": 16,
  "attention_head_dim": 72,
  "in_channels": 4,
  "out_channels": None,
  "num_layers": 28,
  "dropout": 0.0,
  "norm_num_groups": 32,
  "attention_bias": True,
  "sample_size": 32,
  "patch_size": 2,
  "activation_fn": "gelu-approximate",
  "num_embeds_ada_norm": 1000,
  "upcast_attention": False,
  "norm_type": "ada_norm_zero",
  "norm_elementwise_affine": False,
  "norm_eps": 1e-5,
}
# The supported values of keys that support only a few values. The last keys occur in old folders only.
_FIXED: dict[str, tuple[Any, ...]] = {
  "norm_type": ("ada_norm_zero",),
  "activation_fn": ("gelu-approximate",),
  "attention_bias": (True,),
  "norm_elementwise_affine": (False,),
  "attention_type": ("default",),
}
_NONE = type(None)
# Options that must be at least 1.
_COUNTS = (
  "num_attention_heads",
  "attention_head_dim",
  "in_channels",
  "num_layers",
  "sample_size",
  "patch_size",
  "num_embeds_ada_norm",
)
_TYPES: dict[str, jsonfiles.Kinds] = {
  "_class_name": (str,),
  "dropout": (float,),
  "out_channels": (int, _NONE),
  "upcast_attention": (bool, _NONE),
  "norm_eps": (float,),
  "norm_num_groups": (int, _NONE),
  **dict.fromkeys(_COUNTS, (int,)),
}


def from_config(config: Mapping[str, Any]) -> DiT:
  """Create our network from the config of a `DiTTransformer2DModel`.

  Omitted keys have the defaults of `DiTTransformer2DModel`. The options `upcast_attention` and `norm_num_groups` have
  no effect: our softmax is always computed in float32 or wider, and the class has no group normalization.

  Raises:
    ValueError: if an option is not supported here. The message names the option.
  """
  c = with_defaults(config)
  network = DiT(
    out_channels=c["out_channels"] or c["in_channels"],
    channels=c["num_attention_heads"] * c["attention_head_dim"],
    layers=c["num_layers"],
    heads=c["num_attention_heads"],
    patch=c["patch_size"],
    # The table has one row more than there are classes. This last row stands for "no class".
    num_classes=c["num_embeds_ada_norm"] + 1,
    dropout=c["dropout"],
    time_features=_WAVES,
    frequency_shift=_SHIFT,
    epsilon=_EPSILON,
    mlp_epsilon=c["norm_eps"],
  )
  network.check_input((c["sample_size"], c["sample_size"], c["in_channels"]))
  return network


def to_config(network: DiT, params: PyTree, size: tuple[int, int] | None = None) -> Config:
  """Return the config of the `DiTTransformer2DModel` that computes the same function as our network.

  This is the inverse of `from_config`.

  Args:
    network: our network.
    params: its parameters, or their shapes.
    size: the height and width of its input, which must be equal. Required, because `DiTTransformer2DModel` scales the
      positions of images of other sizes.

  Raises:
    ValueError: if `DiTTransformer2DModel` does not support an option of the network or the size. The message names the
      option.
  """
  n = network
  # What the class computes in place of our option.
  only = {
    "mlp": ("gelu", "GELU"),
    "mlp_ratio": (4.0, "four times the features"),
    "norm": ("layer", "layer normalization"),
    "qk_norm": (False, "no normalization of queries"),
    "positions": ("sincos", "sine-cosine positions"),
    "vector_embedding": ("", "no vector"),
    "context_features": (0, "no tokens"),
    "vocabulary": (0, "no tokens"),
    "time_features": (_WAVES, f"{_WAVES} sines and cosines"),
    "frequency_shift": (_SHIFT, "frequencies with a shift of 1"),
    "epsilon": (_EPSILON, "this constant"),
    "skips": (False, "no long skip connections"),
    "dimensions": (2, "images"),
  }
  for option, (value, meaning) in only.items():
    if getattr(n, option) != value:
      raise ValueError(
        f"Got a network with {option}={getattr(n, option)!r}; expected {option}={value!r}, because {_NAME} supports only"
        f" {meaning}.{_HINTS.get(option, '')}"
      )
  if n.num_classes < 2:
    raise ValueError(
      f"Got a network with num_classes={n.num_classes}; expected at least one class and the null class, as in {_NAME}."
    )
  if size is None or size[0] != size[1]:
    raise ValueError(
      f"Got {'no size' if size is None else f'a size of {size[0]} x {size[1]}'} for a {_NAME}; expected the height and"
      " width of its input, which must be equal."
    )
  return DEFAULTS | {
    "num_attention_heads": n.heads,
    "attention_head_dim": n.channels // n.heads,
    "in_channels": params["patches"]["kernel"].shape[-2],
    "out_channels": n.out_channels,
    "num_layers": n.layers,
    "dropout": n.dropout,
    "sample_size": size[0],
    "patch_size": n.patch,
    "num_embeds_ada_norm": n.num_classes - 1,
    "norm_eps": n.mlp_epsilon or n.epsilon,
  }


def template(network: DiT, channels: int) -> PyTree:
  """Return the shapes of a network's parameters without allocating arrays, for this number of input channels."""
  classes = {"classes": jax.ShapeDtypeStruct((1,), jnp.int32)} if network.num_classes else {}
  return tensors.abstract_params(network, (*(network.patch,) * network.dimensions, channels), **classes)


def layout(network: DiT) -> tensors.Layout:
  """Return the layout of diffusers' weight files for a network.

  The files have a copy of the embeddings of time and classes in every block. The copies must be equal.
  """
  names = {
    "patches": "pos_embed.proj",
    **{f"time/layers/linear_{k}": f"{_BLOCK}.norm1.emb.timestep_embedder.linear_{k}" for k in (1, 2)},
    "classes": f"{_BLOCK}.norm1.emb.class_embedder.embedding_table",
    "modulation": "norm1.linear",
    **{f"attention/to_{k}": f"attn1.to_{k}" for k in "qkv"},
    "attention/to_out": "attn1.to_out.0",
    "feed_forward/linear_1": "ff.net.0.proj",
    "feed_forward/linear_2": "ff.net.2",
    "modulation_out": "proj_out_1",
    "proj_out": "proj_out_2",
  }

  def name_of(path: str) -> str:
    block, part = split_block(path)
    prefix = f"{_BLOCK.format(block)}." if block else ""
    return f"{prefix}{names[part]}.{tensors.leaf_name(path)}"

  return tensors.Layout(
    name_of,
    # Some versions of diffusers stored the table of positions.
    is_ignored=lambda name: name == "pos_embed.pos_embed",
    copies=network.layers,
  )


def split_block(path: str) -> tuple[str, str]:
  """Split the path of a parameter of a `DiT` into the number of its block and the path of its layer.

  The number is empty for parameters outside of blocks.
  """
  match = re.fullmatch(r"(?:block_(\d+)/)?(.*)/\w+", path)
  assert match is not None, path
  return match[1] or "", match[2]


def with_defaults(config: Mapping[str, Any]) -> Config:
  """Complete a config with the defaults of `DiTTransformer2DModel` for omitted keys.

  Raises:
    ValueError: if the config is for another class, a value is invalid, or an option is not supported.
  """
  name = config.get("_class_name", _NAME)
  if name != _NAME:
    raise ValueError(f"Got a network of class {name}; expected {_NAME}, the class of DiT in diffusers.")
  # Check supported values first. An unsupported value may also have a wrong type, and this error says more.
  for key, supported in _FIXED.items():
    if key in config and (
      config[key] not in supported or isinstance(config[key], bool) != isinstance(supported[0], bool)
    ):
      raise _unsupported(key, config[key], " or ".join(map(repr, supported)))
  jsonfiles.check_types(config, _TYPES, _NAME)
  folders.check_known(config, [*DEFAULTS, *_FIXED], _NAME)
  c = DEFAULTS | {key: value for key, value in config.items() if key in DEFAULTS}
  for key in ("out_channels", *_COUNTS):
    if c[key] is not None and c[key] < 1:
      raise ValueError(f"Got a {_NAME} with {key}={c[key]}; expected at least 1.")
  return c


def _unsupported(key: str, value: Any, supported: str) -> ValueError:
  return ValueError(
    f"Got a {_NAME} with {key}={jsonfiles.shorten(value)}, which is not supported; expected {supported}."
  )
