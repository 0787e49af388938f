"""Load the networks in single-file checkpoints of Stable Diffusion.

Such a file contains the U-Net under "model.diffusion_model", the autoencoder under "first_stage_model", and the text
encoders. The tensors have the names that the code of latent diffusion gives them. The file has no config. The shapes of
the tensors determine most options of the networks. The other options have the values of the published models.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.interop import autoencoder_kl, numbered_blocks, tensors, unet2d_condition
from ddpm_jax.networks import Autoencoder, ConditionalUNet
from ddpm_jax.networks.options import multipliers_of

PyTree = Any
_UNET_ANCHOR, _AUTOENCODER_ANCHOR = "time_embed.0.weight", "encoder.conv_in.weight"
# The number of features per head in models with linear projections (Stable Diffusion 2 and XL), and the number of heads
# in other models.
_HEAD_FEATURES, _HEADS = 64, 8
# The number of features per token in models that take sizes beside the pooled text (Stable Diffusion XL and its
# refiner), and the number of features of each embedded size.
_CONTEXTS_WITH_SIZES, _SIZE_FEATURES = (2048, 1280), 256


def load_unet(
  path: str | Path, *, heads: int | None = None, size_features: int | None = None, dtype: str = "float32"
) -> tuple[ConditionalUNet, PyTree]:
  """Load the U-Net of a single-file checkpoint.

  If the file also has averaged weights (EMA), under "model_ema", this function does not load them.

  Args:
    path: the file (.safetensors or .ckpt). Code in a pickle never runs.
    heads: the number of attention heads. The file does not contain this number. None selects 8 for models with
      convolutions around transformers (Stable Diffusion 1), and one head for each 64 features for other models (Stable
      Diffusion 2 and XL).
    size_features: the number of features of each embedded size, see `networks.ConditionalUNet`. The file does not
      contain this number. None selects 256 for models that take a vector and tokens of 2048 or 1280 features (Stable
      Diffusion XL and its refiner), and 0 for other models.
    dtype: the dtype of the computation and of the parameters, "float32" or "bfloat16".

  Returns:
    The network and its parameters.

  Raises:
    ValueError: if the file cannot be read or contains another network, or an argument is invalid.
  """
  jax_type = tensors.choose_dtype(dtype)
  file = tensors.TensorFile(path, _UNET_ANCHOR, "U-Net of latent diffusion")
  network, channels = infer_unet(file, heads=heads, size_features=size_features)
  network = network.clone(dtype=jax_type)
  template = unet2d_condition.template(network, channels)
  return network, tensors.load(file, template, unet_layout(network), dtype=jax_type)


def infer_unet(
  file: tensors.TensorFile, *, heads: int | None = None, size_features: int | None = None
) -> tuple[ConditionalUNet, int]:
  """Return the U-Net of a file, and the number of input channels of the U-Net (see `load_unet`)."""

  def shape(name: str) -> tuple[int, ...]:
    return numbered_blocks.shape(file, name)

  levels, blocks = numbered_blocks.levels_of(file)
  channels, in_channels = shape("input_blocks.0.0.weight")[:2]
  firsts = [1 + level * (blocks + 1) for level in range(levels)]
  widths = [shape(f"input_blocks.{first}.0.out_layers.3.weight")[0] for first in firsts]
  attention_levels = tuple(
    level for level in range(levels) if numbered_blocks.has(file, f"input_blocks.{firsts[level]}.1.transformer_blocks.")
  )
  middle = numbered_blocks.count(file, "middle_block.1.transformer_blocks")
  # For a level without transformers, the file has no number of layers. The middle has as many as the last level.
  depths = [middle if level == levels - 1 else 1 for level in range(levels)]
  for level in attention_levels:
    depths[level] = numbered_blocks.count(file, f"input_blocks.{firsts[level]}.1.transformer_blocks")
  linear = len(shape("middle_block.1.proj_in.weight")) == 2
  context = shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1]
  vector = shape("label_emb.0.0.weight")[1] if "label_emb.0.0.weight" in file.shapes else 0
  if size_features is None:
    size_features = _SIZE_FEATURES if vector and context in _CONTEXTS_WITH_SIZES else 0
  embedding = shape("time_embed.0.weight")[0]
  network = ConditionalUNet(
    out_channels=shape("out.2.weight")[0],
    channels=channels,
    multipliers=multipliers_of(widths),
    blocks=blocks,
    attention_levels=attention_levels,
    transformer_layers=middle if {depths[level] for level in attention_levels} <= {middle} else tuple(depths),
    heads=heads or (tuple(width // _HEAD_FEATURES for width in widths) if linear else _HEADS),
    linear_projections=linear,
    context_features=context,
    embedding_features=0 if embedding == 4 * channels else embedding,
    num_classes=shape("label_emb.weight")[0] if "label_emb.weight" in file.shapes else 0,
    vector_embedding="dense" if vector else "",
    vector_features=vector,
    size_features=size_features,
    guidance_features=shape(guided)[1] if (guided := "time_embed.cond_proj.weight") in file.shapes else 0,
  )
  network.check_input((1, 1, in_channels))
  return network, in_channels


def unet_layout(network: ConditionalUNet) -> tensors.Layout:
  """Return the layout of a U-Net in the files of latent diffusion.

  The layout's names lack the prefix "model.diffusion_model.".
  """
  levels = len(network.multipliers)
  attention = {
    **{name: name for name in ("norm", "norm1", "norm2", "norm3", "proj_in", "proj_out", "to_q", "to_k", "to_v")},
    "to_out": "to_out.0",
    **unet2d_condition.transformer_names(network),
  }
  starts = {"classes": "label_emb", "vector_1": "label_emb.0.0", "vector_2": "label_emb.0.2"}
  starts |= {"guidance": "time_embed.cond_proj"}
  return tensors.Layout(numbered_blocks.names(levels, network.blocks, network.attention_levels, starts, attention))


def load_autoencoder(path: str | Path, *, dtype: str = "float32") -> tuple[Autoencoder, PyTree]:
  """Load the autoencoder of a single-file checkpoint, or of a file that contains only an autoencoder.

  The file does not contain the scale of the latents. The scale is 0.18215 in Stable Diffusion 1 and 2, and 0.13025 in
  Stable Diffusion XL.

  Args:
    path: the file (.safetensors, .ckpt or .pt). Code in a pickle never runs.
    dtype: the dtype of the computation and of the parameters, "float32" or "bfloat16".

  Returns:
    The network and its parameters.

  Raises:
    ValueError: if the file cannot be read or contains another network, or an argument is invalid.
  """
  jax_type = tensors.choose_dtype(dtype)
  file = tensors.TensorFile(path, _AUTOENCODER_ANCHOR, "autoencoder of latent diffusion")
  network = infer_autoencoder(file).clone(dtype=jax_type)
  template, layout = autoencoder_kl.template(network), autoencoder_layout(file.shapes)
  return network, tensors.load(file, template, layout, dtype=jax_type)


def infer_autoencoder(file: tensors.TensorFile) -> Autoencoder:
  """Infer the autoencoder of a file from the names and shapes of the tensors."""

  def shape(name: str) -> tuple[int, ...]:
    return numbered_blocks.shape(file, name)

  channels, out_channels = shape("encoder.conv_in.weight")[:2]
  levels = numbered_blocks.count(file, "encoder.down")
  widths = [shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
  network = Autoencoder(
    out_channels=out_channels,
    latent_channels=shape("encoder.conv_out.weight")[0] // 2,
    channels=channels,
    multipliers=multipliers_of(widths),
    blocks=numbered_blocks.count(file, "encoder.down.0.block"),
    middle_attention=numbered_blocks.has(file, "encoder.mid.attn_1."),
    quant_conv="quant_conv.weight" in file.shapes,
    post_quant_conv="post_quant_conv.weight" in file.shapes,
  )
  network.check_input((network.downsampling, network.downsampling, out_channels))
  return network


def autoencoder_layout(shapes: tensors.Shapes) -> tensors.Layout:
  """Return the layout of an autoencoder in the files of latent diffusion.

  The layout's names lack the prefix "first_stage_model.".

  Args:
    shapes: the shapes of the tensors in the file. Most files store the projections of attention as 1x1 convolutions,
      but some files store them as matrices.
  """
  attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
  middle = {"middle_0": "mid.block_1", "middle_attention": "mid.attn_1", "middle_1": "mid.block_2"}
  others = {"conv_shortcut": "nin_shortcut"}

  def part_name(part: str, parent: str) -> str:
    if parent == "middle_attention":
      return attention[part]
    direction, _, rest = part.partition("_")
    level, _, inner = rest.partition("_")
    if direction in ("down", "up") and level.isdecimal():
      return f"{direction}.{level}.{inner if inner.endswith('sample') else f'block.{inner}'}"
    return middle.get(part) or others.get(part, part)

  def name_of(path: str) -> str:
    parts = path.split("/")[:-1]
    parents = ["", *parts]
    return ".".join([*(part_name(part, parents[index]) for index, part in enumerate(parts)), tensors.leaf_name(path)])

  def shape_of(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    shape, stored = tensors.torch_shape(path, shape), shapes.get(name_of(path), ())
    is_pointwise = "/middle_attention/to_" in path and path.endswith("/kernel")
    return stored if is_pointwise and len(stored) > 2 and math.prod(stored[2:]) == 1 and stored[:2] == shape else shape

  def from_file(path: str, value: np.ndarray) -> np.ndarray:
    matrix = value.reshape(value.shape[:2]) if "/middle_attention/to_" in path and value.ndim > 2 else value
    return tensors.from_torch(path, matrix)

  # A file with only an autoencoder may also contain the discriminator and the averages of its training.
  return tensors.Layout(name_of, shape_of, from_file, lambda name: name.startswith(("loss.", "model_ema.")))
