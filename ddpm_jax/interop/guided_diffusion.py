"""Load checkpoints of improved-diffusion and guided-diffusion (Nichol and Dhariwal 2021, Dhariwal and Nichol 2021).

The checkpoints are state dicts without a config. The shapes of the tensors determine most options. The remaining
options are arguments.

For example::

  model, params = interop.guided_diffusion.load(
    "64x64_diffusion.pt", shape=(64, 64, 3), head_channels=64, new_attention_order=True
  )

Published models for 128 pixels and more need `new_attention_order=False`.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import guidance, predictions, processes, sampling, schedules
from ddpm_jax.interop import numbered_blocks, tensors
from ddpm_jax.models import Condition, Model, SamplingDefaults, codecs, conditions, networks
from ddpm_jax.networks import Classifier, UNet
from ddpm_jax.networks.options import multipliers_of
from ddpm_jax.predictions import Prediction
from ddpm_jax.processes import Process

Array = jax.Array
PyTree = Any
_EPSILON = 1e-5
# guided-diffusion's published models up to this image size were trained with the cosine schedule, larger models with
# the linear schedule.
_MAX_COSINE_SIZE = 64
# The number of sampling steps in the papers, out of 1000 or 4000 training steps.
_STEPS = 250
# The name of a tensor in all of these models, and a description of the models for error messages.
_ANCHOR, _DESCRIPTION = "input_blocks.0.0.weight", "model of improved-diffusion or guided-diffusion"


def load(
  path: str | Path,
  *,
  shape: tuple[int, ...] | None = None,
  heads: int | None = None,
  head_channels: int | None = None,
  new_attention_order: bool = False,
  process: Process | None = None,
  prediction: Prediction | None = None,
  rescale_timesteps: bool = False,
  factor: int = 4,
) -> tuple[Model, PyTree]:
  """Load the model and the parameters of a checkpoint.

  A class-conditional model has the condition "classes". A super-resolution model has the condition "low_resolution",
  the small image. The model enlarges the small image as guided-diffusion does. If the process is discrete, the default
  sampler is DDPM with clipping and at most 250 steps, as in the papers.

  Args:
    path: the file (.pt or .safetensors). Code in a pickle never runs.
    shape: the shape of one sample, such as [H, W, C]. Required, because the file does not contain it.
    heads: the number of attention heads (4 for improved-diffusion). Set either `heads` or `head_channels`.
    head_channels: the number of features per attention head (64 for guided-diffusion).
    new_attention_order: whether the model was trained with guided-diffusion's option use_new_attention_order. The
      option changes the order of queries, keys and values in the file.
    process: the forward process. None selects the process of the models that guided-diffusion published for images of
      this size: `schedules.cosine(1000)` for sides of up to 64 pixels, and `schedules.linear(1000)` for longer sides.
    prediction: what the network predicts. None selects EPS, with learned variance if the network has twice as many
      output channels as the sample has channels.
    rescale_timesteps: True if the time input of step n of N is 1000 (n - 1) / N, as in improved-diffusion; False if it
      is n - 1.
    factor: for a super-resolution model, the side of the large image divided by the side of the small image.

  Returns:
    The model, and the parameters of its network in float32.

  Raises:
    ValueError: if the file cannot be read or contains another kind of model, or if an argument is missing or does not
      fit the checkpoint.
  """
  file = tensors.TensorFile(path, _ANCHOR, _DESCRIPTION)
  network, template = infer_network(file, heads=heads, head_channels=head_channels)
  in_channels = numbered_blocks.shape(file, "input_blocks.0.0.weight")[1]
  if shape is None:
    raise ValueError(
      f"Got {file.path}, which does not contain the image size; pass shape=, such as"
      f" shape={(*(64,) * network.dimensions, min(in_channels, network.out_channels))}."
    )
  shape = tuple(shape)
  network.check_input(shape)
  learns_variance = _learns_variance(file, network, shape)
  prediction = _prediction(learns_variance, prediction)
  process, time_input = _process(process, shape, rescale_timesteps)
  model_conditions = _conditions(file, network, shape, in_channels - shape[-1], factor)
  model = Model(
    network=networks.from_linen(network, model_conditions),
    process=process,
    prediction=prediction,
    conditions=model_conditions,
    codec=codecs.pixels(),
    data_shape=shape,
    shape=shape,
    time_input=time_input,
    defaults=_defaults(process, "learned" if learns_variance else "large"),
  )
  return model, tensors.load(file, template, _layout(network, new_attention_order))


def _learns_variance(file: tensors.TensorFile, network: UNet, shape: tuple[int, ...]) -> bool:
  """Return whether a network has output channels for the variance."""
  if len(shape) != network.dimensions + 1 or network.out_channels not in (shape[-1], 2 * shape[-1]):
    raise ValueError(
      f"Got shape={shape} for {file.path}, a network with {network.dimensions} spatial axes and"
      f" out_channels={network.out_channels}; expected {network.dimensions} spatial axes and a last axis of"
      f" {network.out_channels} channels, or half as many if the variance is learned."
    )
  return network.out_channels == 2 * shape[-1]


def _prediction(learns_variance: bool, prediction: Prediction | None) -> Prediction:
  if prediction is None:
    return predictions.learned_range(predictions.EPS) if learns_variance else predictions.EPS
  if prediction.learned_variance != learns_variance:
    problem, fix = ("without", "wrap the prediction in") if learns_variance else ("with", "remove the wrapper")
    raise ValueError(
      f"Got a prediction {problem} a learned variance for a network {'with' if learns_variance else 'without'} the"
      f" output channels for it; {fix} predictions.learned_range."
    )
  return prediction


def _process(
  process: Process | None, shape: tuple[int, ...], rescale_timesteps: bool
) -> tuple[Process, Callable[[Array], Array] | None]:
  """Return the process, and a function that replaces the time input of the process.

  The function is None if no replacement is necessary.
  """
  if process is None:
    is_small = max(shape[:-1]) <= _MAX_COSINE_SIZE
    process = processes.discrete(schedules.cosine(1000) if is_small else schedules.linear(1000))
  if not rescale_timesteps:
    return process, None
  if not process.num_steps:
    raise ValueError(
      "Got rescale_timesteps=True with a continuous process; expected a discrete process, or rescale_timesteps=False."
    )
  time_input, scale = process.time_input, 1000 / process.num_steps
  return process, lambda t: time_input(t) * scale


def _conditions(
  file: tensors.TensorFile, network: UNet, shape: tuple[int, ...], extra: int, factor: int
) -> dict[str, Condition]:
  by_name: dict[str, Condition] = {}
  if network.num_classes:
    by_name["classes"] = conditions.classes("classes", network.num_classes)
  if extra:
    if extra != shape[-1] or network.dimensions != 2:
      raise ValueError(
        f"Got {file.path}, which takes {extra} input channels in addition to the {shape[-1]} of shape={shape}; expected"
        f" none, or {shape[-1]} for the small image of a 2D super-resolution model."
      )
    by_name["low_resolution"] = conditions.low_resolution("low_resolution", shape, factor, method="bilinear")
  return by_name


def _defaults(process: Process, variance: str) -> SamplingDefaults | None:
  if not process.num_steps:
    return None
  return SamplingDefaults(
    name="ancestral",
    sampler=sampling.ancestral(process, variance),
    times=functools.partial(sampling.grids.linspace, process),
    steps=min(_STEPS, process.num_steps),
    clip=guidance.clip,
  )


def infer_network(
  file: tensors.TensorFile, *, heads: int | None = None, head_channels: int | None = None
) -> tuple[UNet, PyTree]:
  """Infer the U-Net of a checkpoint from the shapes of its tensors.

  Returns:
    The U-Net, and the shapes of its parameters.
  """
  levels, blocks = numbered_blocks.levels_of(file)
  options = _options(file, levels, blocks, heads, head_channels)
  ups = [_up(file, level, levels, blocks) for level in range(1, levels)]
  network = UNet(
    out_channels=numbered_blocks.shape(file, "out.2.weight")[0],
    num_classes=numbered_blocks.shape(file, "label_emb.weight")[0] if "label_emb.weight" in file.shapes else 0,
    upsample=ups[0] if len(set(ups)) == 1 else tuple(ups) or "conv",
    **options,
  )
  conditions = {"classes": jax.ShapeDtypeStruct((1,), jnp.int32)} if network.num_classes else {}
  shape = (*(2 ** (levels - 1),) * network.dimensions, numbered_blocks.shape(file, "input_blocks.0.0.weight")[1])
  network.check_input(shape)
  return network, tensors.abstract_params(network, shape, **conditions)


def load_classifier(
  path: str | Path,
  *,
  blocks: int | None = None,
  head_channels: int = 64,
  new_attention_order: bool = False,
  process: Process | None = None,
  rescale_timesteps: bool = False,
) -> tuple[Model, PyTree]:
  """Load a classifier of noisy images, with its parameters.

  The classifier must have attention pooling, as the published classifiers do.

  Pass `model.classify(params)` to `guidance.classifier`. The model cannot denoise. Its `prediction` is EPS because a
  model that predicts EPS does not scale the input of its network.

  Args:
    path: the file (.pt or .safetensors).
    blocks: the number of residual blocks per level (guided-diffusion's classifier_depth). Required only if the
      tensors in the file allow several numbers.
    head_channels: the number of features per attention head.
    new_attention_order: see `load`.
    process: see `load`.
    rescale_timesteps: see `load`.

  Returns:
    The model, and the parameters of its network in float32.

  Raises:
    ValueError: see `load`.
  """
  file = tensors.TensorFile(path, _ANCHOR, _DESCRIPTION)
  if "out.2.positional_embedding" not in file.shapes:
    raise ValueError(
      f"Got {file.path}, which has no out.2.positional_embedding; expected a classifier with --classifier_pool"
      " attention."
    )
  levels, blocks = _levels_of_encoder(file, blocks)
  num_positions = numbered_blocks.shape(file, "out.2.positional_embedding")[1] - 1
  side = round(num_positions**0.5) * 2 ** (levels - 1)
  network = Classifier(
    out_channels=numbered_blocks.shape(file, "out.2.c_proj.weight")[0],
    **_options(file, levels, blocks, None, head_channels),
  )
  shape = (side, side, numbered_blocks.shape(file, "input_blocks.0.0.weight")[1])
  network.check_input(shape)
  template = tensors.abstract_params(network, shape)
  process, time_input = _process(process, shape, rescale_timesteps)
  model = Model(
    network=networks.from_linen(network, {}),
    process=process,
    prediction=predictions.EPS,
    conditions={},
    codec=codecs.pixels(),
    data_shape=shape,
    shape=shape,
    time_input=time_input,
  )
  return model, tensors.load(file, template, _layout(network, new_attention_order))


def _levels_of_encoder(file: tensors.TensorFile, blocks: int | None) -> tuple[int, int]:
  """Return the number of levels and the number of residual blocks per level of a classifier.

  A classifier has only the downsampling half of a U-Net. Its tensors do not show which residual blocks downsample.
  So the function checks which numbers of blocks fit the file. If several numbers fit, `blocks` selects one.
  """
  total = numbered_blocks.count(file, "input_blocks")
  widens = [numbered_blocks.has(file, f"input_blocks.{i}.0.skip_connection.") for i in range(total)]
  attends = [numbered_blocks.has(file, f"input_blocks.{i}.1.qkv.") for i in range(total)]
  has_conv = [numbered_blocks.has(file, f"input_blocks.{i}.0.op.") for i in range(total)]

  def is_consistent(length):
    """Return whether the file can consist of levels of `length` blocks.

    The length includes the block before the residual blocks of the level. In the first level, this is the first
    convolution. In the other levels, it is a downsampling block.
    """
    first = {index for index in range(1, total) if index % length == 1 % length}
    downsampling = set(range(length, total, length))
    is_uniform = all(
      len({attends[i] for i in range(k + 1, min(k + length, total))}) == 1 for k in range(0, total, length)
    )
    convs_match = all(has_conv[i] for i in downsampling) if any(has_conv) else True
    return (
      convs_match
      and is_uniform
      and not any(attends[i] for i in downsampling)
      and all(i in first for i in range(total) if widens[i])
    )

  lengths = [n for n in range(2, total + 1) if total % n == 0 and is_consistent(n)]
  if blocks is not None:
    lengths = [n for n in lengths if n == blocks + 1]
  if len(lengths) != 1:
    candidates = ", ".join(str(n - 1) for n in lengths) or "none"
    raise ValueError(
      f"Got {file.path} with {total} input_blocks, and blocks={blocks}. Possible numbers of residual blocks per level:"
      f" {candidates}. Pass one of them as blocks= (guided-diffusion's classifier_depth)."
    )
  return total // lengths[0], lengths[0] - 1


def _up(file: tensors.TensorFile, level: int, levels: int, blocks: int) -> str:
  """Return how the network upsamples from `level` to the next finer level."""
  last = (levels - 1 - level) * (blocks + 1) + blocks
  return (
    "residual" if any(numbered_blocks.has(file, f"output_blocks.{last}.{j}.in_layers.") for j in (1, 2)) else "conv"
  )


def _options(
  file: tensors.TensorFile, levels: int, blocks: int, heads: int | None, head_channels: int | None
) -> dict[str, Any]:
  """Return the network arguments that the U-Net and the classifier share, inferred from the file."""
  channels, _, *kernel = numbered_blocks.shape(file, "input_blocks.0.0.weight")
  if len(kernel) == 3 and levels > 1:
    raise ValueError(
      f"Got {file.path}, a network with {levels} levels for volumes; expected one level, because guided-diffusion does"
      " not resample the first axis, but our network resamples all three axes."
    )
  firsts = [1 + level * (blocks + 1) for level in range(levels)]
  widths = [numbered_blocks.shape(file, f"input_blocks.{first}.0.out_layers.3.weight")[0] for first in firsts]
  attention_levels = tuple(
    level for level, first in enumerate(firsts) if numbered_blocks.has(file, f"input_blocks.{first}.1.qkv.")
  )
  if (heads is None) == (head_channels is None):
    raise ValueError(
      f"Got heads={heads}, head_channels={head_channels} for {file.path}, which does not contain them; expected one of"
      " them: head_channels=64 for guided-diffusion's published models, heads=4 for improved-diffusion's."
    )
  downs = [
    "conv" if numbered_blocks.has(file, f"input_blocks.{(level + 1) * (blocks + 1)}.0.op.") else "residual"
    for level in range(levels - 1)
  ]
  embedding, features = numbered_blocks.shape(file, "time_embed.0.weight")
  projection = numbered_blocks.shape(file, "input_blocks.1.0.emb_layers.1.weight")[0]
  return {
    "channels": channels,
    "multipliers": multipliers_of(widths),
    "blocks": blocks,
    "attention_levels": attention_levels,
    "heads": heads or 1,
    "head_channels": head_channels or 0,
    "dropout": 0.0,
    "epsilon": _EPSILON,
    "time_embedding": "cos_sin",
    "time_features": 0 if features == channels else features,
    "embedding_features": 0 if embedding == 4 * channels else embedding,
    "frequency_shift": 0.0,
    "scale_shift": projection == 2 * widths[0],
    "downsample": downs[0] if len(set(downs)) == 1 else tuple(downs) or "conv",
    "symmetric_padding": True,
    "dimensions": len(kernel),
  }


def _layout(network: UNet | Classifier, new_order: bool) -> tensors.Layout:
  """Return how guided-diffusion names and stores our parameters."""

  def shape_of(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    shape = tensors.torch_shape(path, shape)
    if path.endswith("positions"):
      return shape[::-1]
    if _qkv_index(path) is not None:
      shape = (3 * shape[0], *shape[1:])
    # guided-diffusion computes attention projections with convolutions of kernel size 1.
    return (*shape, 1) if _is_projection(path) and len(shape) == 2 else shape

  def from_file(path: str, value: np.ndarray) -> np.ndarray:
    if path.endswith("positions"):
      return value.T
    if _is_projection(path) and value.ndim == 3:
      value = value[..., 0]
    index = _qkv_index(path)
    if index is not None:
      width = value.shape[0] // 3
      if new_order or path.startswith("pool/"):
        value = value[index * width : (index + 1) * width]
      else:
        heads = network.num_heads(width)
        value = value.reshape(heads, 3, width // heads, *value.shape[1:])[:, index].reshape(width, *value.shape[1:])
    return tensors.from_torch(path, value)

  return tensors.Layout(_names(network), shape_of, from_file)


def _names(network: UNet | Classifier) -> Callable[[str], str]:
  """Return a function `name_of(path)` that maps our paths to guided-diffusion's names."""
  attention = {"group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out": "proj_out"}
  pool = {"to_q": "qkv_proj", "to_k": "qkv_proj", "to_v": "qkv_proj", "to_out": "c_proj"}
  levels, starts = len(network.multipliers), {"classes": "label_emb"}
  name_of = numbered_blocks.names(levels, network.blocks, network.attention_levels, starts, attention)

  def name_of_any(path: str) -> str:
    if path == "pool/positions":
      return "out.2.positional_embedding"
    if path.startswith("pool/"):
      return f"out.2.{pool[path.split('/')[1]]}.{tensors.leaf_name(path)}"
    return name_of(path)

  return name_of_any


def _qkv_index(path: str) -> int | None:
  """Return the index of a query, key or value projection in guided-diffusion's combined tensor.

  Return None for other parameters.
  """
  match = re.search(r"/to_([qkv])/", path)
  return None if match is None else "qkv".index(match[1])


def _is_projection(path: str) -> bool:
  """Return whether a parameter belongs to an attention projection."""
  return path.startswith("pool/to") or "_attention/to" in path
