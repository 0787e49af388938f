"""Checkpoints of improved-diffusion and guided-diffusion (Nichol and Dhariwal 2021, Dhariwal and Nichol 2021).

They are state dicts without a config: all that shapes tell is read from them, and what they do not tell is asked for.

For example::

  model, params = interop.guided_diffusion.load(
    "64x64_diffusion.pt", shape=(64, 64, 3), head_channels=64, new_attention_order=True
  )

The models of 128 and more pixels have the first order of attention.
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
from ddpm_jax.interop import tensors
from ddpm_jax.models import Condition, Model, SamplingDefaults, codecs, conditions, networks
from ddpm_jax.networks import Classifier, UNet
from ddpm_jax.predictions import Prediction
from ddpm_jax.processes import Process

Array = jax.Array
PyTree = Any
_EPSILON = 1e-5
# The published models of so many pixels or fewer were trained with the cosine schedule, the others with the linear one.
_LARGEST_COSINE = 64
# As the papers sample, of 1000 or 4000.
_STEPS = 250
# A name that each of these models has.
_ANCHOR, _WHAT = "input_blocks.0.0.weight", "model of improved-diffusion or guided-diffusion"


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
  """Read the model and the parameters of a checkpoint.

  Its conditions are "classes", if it is class-conditional, and "low_resolution", if it is a super-resolution model: the small image, which
  is enlarged as that code does. By default it is sampled by 250 steps of DDPM with clipping, as in the papers.

  Args:
    path: the file, .pt or .safetensors; pickles are read without running code from them.
    shape: of one sample, such as [H, W, C], which no file tells.
    heads: attention heads (improved-diffusion: 4).
    head_channels: features of a head instead (guided-diffusion: 64).
    new_attention_order: how the file orders queries, keys and values: its model's use_new_attention_order.
    process: the forward process; None for that of the published models of this size: `schedules.cosine(1000)` up to 64 pixels, else
      `schedules.linear(1000)`.
    prediction: what the output means; None for EPS, with a learned variance if there are twice the channels.
    rescale_timesteps: whether step n of N has the time input 1000 (n - 1) / N, as in improved-diffusion, instead of n - 1.
    factor: of a super-resolution model, how many times smaller the sides of the image are that it enlarges.

  Returns:
    The model, and the parameters of its network in float32.

  Raises:
    ValueError: if the file cannot be read, is of no such model, or an argument is missing or does not fit it.
  """
  file = tensors.TensorFile(path, _ANCHOR, _WHAT)
  network, template = network_of(file, heads=heads, head_channels=head_channels)
  taken = _shape(file, "input_blocks.0.0.weight")[1]
  if shape is None:
    raise ValueError(
      f"Got {file.path}, which does not tell the size of its images; pass shape=, such as"
      f" shape={(*(64,) * network.dimensions, min(taken, network.out_channels))}."
    )
  shape = tuple(shape)
  network.check_input(shape)
  learned = _learned(file, network, shape)
  prediction = _prediction(learned, prediction)
  process, time_input = _process(process, shape, rescale_timesteps)
  given = _conditions(file, network, shape, taken - shape[-1], factor)
  model = Model(
    network=networks.from_linen(network, given),
    process=process,
    prediction=prediction,
    conditions=given,
    codec=codecs.pixels(),
    data_shape=shape,
    shape=shape,
    time_input=time_input,
    defaults=_defaults(process, "learned" if learned else "large"),
  )
  return model, tensors.load(file, template, _layout(network, new_attention_order))


def _learned(file: tensors.TensorFile, network: UNet, shape: tuple[int, ...]) -> bool:
  """Return whether a network learned the variance, by its channels."""
  if len(shape) != network.dimensions + 1 or network.out_channels not in (shape[-1], 2 * shape[-1]):
    raise ValueError(
      f"Got {file.path} of {network.dimensions} spatial axes and out_channels={network.out_channels}, with shape={shape}; expected a shape with"
      " as many axes and one for channels, as many as those of the output or half of them."
    )
  return network.out_channels == 2 * shape[-1]


def _prediction(learned: bool, prediction: Prediction | None) -> Prediction:
  if prediction is None:
    return predictions.learned_range(predictions.EPS) if learned else predictions.EPS
  if prediction.learned_variance != learned:
    raise ValueError(
      f"Got a prediction {'without' if learned else 'with'} a learned variance for a network {'with' if learned else 'without'} the channels of"
      " one; wrap it by predictions.learned_range, or do not."
    )
  return prediction


def _process(
  process: Process | None, shape: tuple[int, ...], rescale_timesteps: bool
) -> tuple[Process, Callable[[Array], Array] | None]:
  """Return the process, and the time input where that is not its own."""
  if process is None:
    small = max(shape[:-1]) <= _LARGEST_COSINE
    process = processes.discrete(schedules.cosine(1000) if small else schedules.linear(1000))
  if not rescale_timesteps:
    return process, None
  if not process.num_steps:
    raise ValueError(
      "Got rescale_timesteps=True with a continuous process; expected a discrete one, whose steps are counted."
    )
  own, scale = process.time_input, 1000 / process.num_steps
  return process, lambda t: own(t) * scale


def _conditions(
  file: tensors.TensorFile, network: UNet, shape: tuple[int, ...], extra: int, factor: int
) -> dict[str, Condition]:
  found: dict[str, Condition] = {}
  if network.num_classes:
    found["classes"] = conditions.classes("classes", network.num_classes)
  if extra:
    if extra != shape[-1] or network.dimensions != 2:
      raise ValueError(
        f"Got {file.path}, which takes {extra} channels beside the {shape[-1]} of shape={shape}; expected none, or as many again of an image to"
        " enlarge."
      )
    found["low_resolution"] = conditions.low_resolution("low_resolution", shape, factor, method="bilinear")
  return found


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


def network_of(
  file: tensors.TensorFile, *, heads: int | None = None, head_channels: int | None = None
) -> tuple[UNet, PyTree]:
  """Return the U-Net of a checkpoint, from the shapes of its tensors, and the shapes of our parameters."""
  levels, blocks = _levels_of_unet(file)
  options = _options(file, levels, blocks, heads, head_channels)
  ups = [_up(file, level, levels, blocks) for level in range(1, levels)]
  network = UNet(
    out_channels=_shape(file, "out.2.weight")[0],
    num_classes=_shape(file, "label_emb.weight")[0] if "label_emb.weight" in file.shapes else 0,
    upsample=ups[0] if len(set(ups)) == 1 else tuple(ups) or "conv",
    **options,
  )
  conditions = {"classes": jax.ShapeDtypeStruct((1,), jnp.int32)} if network.num_classes else {}
  shape = (*(2 ** (levels - 1),) * network.dimensions, _shape(file, "input_blocks.0.0.weight")[1])
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
  """Read the noisy classifier and the parameters of a checkpoint (attention pooling, as the published ones have).

  `model.classify(params)` is what `guidance.classifier` takes. It denoises nothing: `model.prediction` says of it only that its input is
  not scaled.

  Args:
    path: the file, .pt or .safetensors.
    blocks: residual blocks a level, where the file leaves it open (guided-diffusion's classifier_depth).
    head_channels: features of a head.
    new_attention_order: as in `load`.
    process: as in `load`.
    rescale_timesteps: as in `load`.

  Raises:
    ValueError: as `load`.
  """
  file = tensors.TensorFile(path, _ANCHOR, _WHAT)
  if "out.2.positional_embedding" not in file.shapes:
    raise ValueError(
      f"Got {file.path}, which has no out.2.positional_embedding; expected a classifier with --classifier_pool attention."
    )
  levels, blocks = _levels_of_encoder(file, blocks)
  cells = _shape(file, "out.2.positional_embedding")[1] - 1
  side = round(cells**0.5) * 2 ** (levels - 1)
  network = Classifier(
    out_channels=_shape(file, "out.2.c_proj.weight")[0], **_options(file, levels, blocks, None, head_channels)
  )
  shape = (side, side, _shape(file, "input_blocks.0.0.weight")[1])
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


def _shape(file: tensors.TensorFile, name: str) -> tuple[int, ...]:
  if name not in file.shapes:
    raise ValueError(f"Got {file.path}, which has no {name}; expected a {_WHAT}.")
  return file.shapes[name]


def _count(file: tensors.TensorFile, part: str) -> int:
  indices = [int(match[1]) for name in file.shapes if (match := re.match(rf"{part}\.(\d+)\.", name))]
  if not indices:
    raise ValueError(f"Got {file.path}, which has no {part}; expected a {_WHAT}.")
  return max(indices) + 1


def _has(file: tensors.TensorFile, prefix: str) -> bool:
  return any(name.startswith(prefix) for name in file.shapes)


def _levels_of_unet(file: tensors.TensorFile) -> tuple[int, int]:
  """The levels and the residual blocks of each: every level but one ends with a step up, by which levels are counted."""
  total = _count(file, "output_blocks")
  ups = sum(
    _has(file, f"output_blocks.{k}.{j}.conv.") or _has(file, f"output_blocks.{k}.{j}.in_layers.")
    for k in range(total)
    for j in (1, 2)
  )
  if total % (ups + 1) or _count(file, "input_blocks") != total:
    raise ValueError(
      f"Got {file.path}, whose {total} output_blocks do not divide into {ups + 1} levels; expected a model that resamples by"
      " convolutions or residual blocks."
    )
  return ups + 1, total // (ups + 1) - 1


def _levels_of_encoder(file: tensors.TensorFile, blocks: int | None) -> tuple[int, int]:
  """The same from the way down alone, on which a residual block that halves looks like any other."""
  total = _count(file, "input_blocks")
  wide = [_has(file, f"input_blocks.{i}.0.skip_connection.") for i in range(total)]
  attends = [_has(file, f"input_blocks.{i}.1.qkv.") for i in range(total)]
  convs = [_has(file, f"input_blocks.{i}.0.op.") for i in range(total)]

  def fits(length):
    """Whether levels of that many blocks, the halving one or the first convolution included, explain the file."""
    first = {index for index in range(1, total) if index % length == 1 % length}
    halving = set(range(length, total, length))
    same = all(len({attends[i] for i in range(k + 1, min(k + length, total))}) == 1 for k in range(0, total, length))
    op = all(convs[i] for i in halving) if any(convs) else True
    return op and same and not any(attends[i] for i in halving) and all(i in first for i in range(total) if wide[i])

  lengths = [n for n in range(2, total + 1) if total % n == 0 and fits(n)]
  if blocks is not None:
    lengths = [n for n in lengths if n == blocks + 1]
  if len(lengths) != 1:
    found = ", ".join(str(n - 1) for n in lengths) or "none"
    raise ValueError(
      f"Got {file.path}, a way down of {total} blocks, with blocks={blocks}; the numbers of residual blocks a level that explain it:"
      f" {found}. Pass one as blocks= (guided-diffusion's classifier_depth)."
    )
  return total // lengths[0], lengths[0] - 1


def _up(file: tensors.TensorFile, level: int, levels: int, blocks: int) -> str:
  """How the way up goes from `level` to the next finer one."""
  last = (levels - 1 - level) * (blocks + 1) + blocks
  return "residual" if any(_has(file, f"output_blocks.{last}.{j}.in_layers.") for j in (1, 2)) else "conv"


def _options(
  file: tensors.TensorFile, levels: int, blocks: int, heads: int | None, head_channels: int | None
) -> dict[str, Any]:
  """What U-Net and classifier have in common."""
  channels, _, *kernel = _shape(file, "input_blocks.0.0.weight")
  if len(kernel) == 3 and levels > 1:
    raise ValueError(
      f"Got {file.path}, of volumes, whose first axis that code does not resample; ours resamples all three."
    )
  firsts = [1 + level * (blocks + 1) for level in range(levels)]
  widths = [_shape(file, f"input_blocks.{first}.0.out_layers.3.weight")[0] for first in firsts]
  attended = tuple(level for level, first in enumerate(firsts) if _has(file, f"input_blocks.{first}.1.qkv."))
  if (heads is None) == (head_channels is None):
    raise ValueError(
      f"Got heads={heads}, head_channels={head_channels} for {file.path}, whose shapes do not tell; expected one of them:"
      " head_channels=64 for guided-diffusion's published models, heads=4 for improved-diffusion's."
    )
  downs = [
    "conv" if _has(file, f"input_blocks.{(level + 1) * (blocks + 1)}.0.op.") else "residual"
    for level in range(levels - 1)
  ]
  multipliers = [width / channels for width in widths]
  embedding, features = _shape(file, "time_embed.0.weight")
  emb = _shape(file, "input_blocks.1.0.emb_layers.1.weight")[0]
  return {
    "channels": channels,
    "multipliers": tuple(int(value) if value == int(value) else value for value in multipliers),
    "blocks": blocks,
    "attention_levels": attended,
    "heads": heads or 1,
    "head_channels": head_channels or 0,
    "dropout": 0.0,
    "epsilon": _EPSILON,
    "time_embedding": "cos_sin",
    "time_features": 0 if features == channels else features,
    "embedding_features": 0 if embedding == 4 * channels else embedding,
    "frequency_shift": 0.0,
    "scale_shift": emb == 2 * widths[0],
    "downsample": downs[0] if len(set(downs)) == 1 else tuple(downs) or "conv",
    "symmetric_padding": True,
    "dimensions": len(kernel),
  }


def _layout(network: UNet | Classifier, new_order: bool) -> tensors.Layout:
  """Return how parameters of ours are named and laid out there."""

  def shape_of(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    shape = tensors.torch_shape(path, shape)
    if path.endswith("positions"):
      return shape[::-1]
    if _fused(path) is not None:
      shape = (3 * shape[0], *shape[1:])
    # Projections of attention are convolutions of size 1 there.
    return (*shape, 1) if _attends(path) and len(shape) == 2 else shape

  def from_file(path: str, value: np.ndarray) -> np.ndarray:
    if path.endswith("positions"):
      return value.T
    if _attends(path) and value.ndim == 3:
      value = value[..., 0]
    index = _fused(path)
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
  """Return `name_of(path)`, the name that a parameter of ours has there."""
  levels, blocks = len(network.multipliers), network.blocks
  residual = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
  }
  attention = {"group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out": "proj_out"}
  pool = {"to_q": "qkv_proj", "to_k": "qkv_proj", "to_v": "qkv_proj", "to_out": "c_proj"}
  fixed = {
    "conv_in": "input_blocks.0.0",
    "time_1": "time_embed.0",
    "time_2": "time_embed.2",
    "classes": "label_emb",
    "middle_0": "middle_block.0",
    "middle_attention": "middle_block.1",
    "middle_1": "middle_block.2",
    "norm_out": "out.0",
    "conv_out": "out.2",
    "pool": "out.2",
  }

  def place(head: str) -> str:
    way, level, rest = re.fullmatch(r"(down|up)_(\d+)_(.+)", head).groups()  # type: ignore[union-attr]
    first = int(level) * (blocks + 1) + 1 if way == "down" else (levels - 1 - int(level)) * (blocks + 1)
    part = "input_blocks" if way == "down" else "output_blocks"
    if rest == "downsample":
      return f"{part}.{first + blocks}.0"
    if rest == "upsample":
      return f"{part}.{first + blocks}.{2 if int(level) in network.attention_levels else 1}"
    index, _, attends = rest.partition("_")
    return f"{part}.{first + int(index)}.{1 if attends else 0}"

  def name_of(path: str) -> str:
    head, *parts = path.split("/")
    start, inner = fixed.get(head) or place(head), parts[:-1]
    if head == "pool":
      if path.endswith("positions"):
        return "out.2.positional_embedding"
      table = pool
    elif head.endswith("_attention"):
      table = attention
    else:
      table = residual | {"conv": "op" if head.endswith("downsample") else "conv"}
    return ".".join([start, *(table[part] for part in inner), tensors.leaf_name(path)])

  return name_of


def _fused(path: str) -> int | None:
  """Return which of queries, keys and values a parameter is, of the tensor that holds all three; None if it is neither."""
  match = re.search(r"/to_([qkv])/", path)
  return None if match is None else "qkv".index(match[1])


def _attends(path: str) -> bool:
  """Return whether a parameter is of a projection of attention."""
  return path.startswith("pool/to") or "_attention/to" in path
