"""Load the original checkpoints of DiT and SiT (Peebles and Xie 2023, Ma et al. 2024).

The checkpoints are state dicts without a config. The shapes of the tensors determine most options. The remaining
options are arguments.

For example::

  model, params = interop.dit_checkpoints.load_dit("DiT-XL-2-256x256.pt", codec="stabilityai/sd-vae-ft-ema")
  model, params = interop.dit_checkpoints.load_sit(
    "SiT-XL-2-256x256.pt", time_direction="data_at_1", time_scale=1.0, codec="stabilityai/sd-vae-ft-ema"
  )
"""

import functools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax import predictions, processes, sampling, schedules
from ddpm_jax.interop import tensors
from ddpm_jax.interop.codec_folders import read_codec
from ddpm_jax.interop.dit import split_block, template
from ddpm_jax.models import Condition, Model, SamplingDefaults, codecs, conditions, networks
from ddpm_jax.names import choose
from ddpm_jax.networks import DiT, loops
from ddpm_jax.networks.patches import position_table
from ddpm_jax.processes import Process

PyTree = Any
# The name of a tensor in all of these models.
_ANCHOR = "x_embedder.proj.weight"
# The number of heads by the number of features, for the published sizes S, B, L and XL.
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
# The settings of sampling in the code of the papers.
_STEPS, _GUIDANCE_SCALE = 250, 4.0
# Layers that REPA uses only in training.
_PROJECTORS = "projectors."
# What is at time 1 of a checkpoint.
_DIRECTIONS = ("data_at_1", "noise_at_1")


def load_dit(
  path: str | Path,
  *,
  codec: str | Path = "",
  shape: tuple[int, ...] | None = None,
  heads: int | None = None,
  class_dropout: float = 0.1,
  process: Process | None = None,
  scan: bool = True,
) -> tuple[Model, PyTree]:
  """Load a model and its parameters from a checkpoint of the original DiT code.

  The model has the condition "classes". The default sampler is DDPM with at most 250 steps and a guidance scale of 4,
  as in the code of the paper. That code guides only the first three channels. Our guidance guides all channels by
  default.

  Args:
    path: the file (.pt or .safetensors). If it contains the parameters and their moving average ("ema"), the moving
      average is read. Code in a pickle never runs.
    codec: the autoencoder: a folder in diffusers' format or a name on the Hugging Face hub, such as
      "stabilityai/sd-vae-ft-ema". Empty for a model whose data are x itself.
    shape: the shape [H, W, C] of x. None infers a square from the file's table of positions.
    heads: the number of attention heads. None infers it, which is possible for 384, 768, 1024 and 1152 features.
    class_dropout: the share of samples that get the null class in training, 0.1 for the published models. 0 for a
      model that was trained without a null class.
    process: the forward process. None selects `schedules.linear(1000)`, as in the paper.
    scan: whether all blocks are one loop over stacked parameters (see `networks.DiT`).

  Returns:
    The model, and the parameters of its network in float32.

  Raises:
    ValueError: if the file cannot be read or contains another kind of model, or if an argument is missing or does not
      fit the checkpoint.
  """
  file = tensors.TensorFile(path, _ANCHOR, "DiT", "ema")
  network, channels = _infer_network(file, heads)
  x_shape = _x_shape(file, network, shape, channels)
  if network.out_channels not in (channels, 2 * channels):
    raise _wrong_channels(file, network, channels)
  process = processes.discrete(schedules.linear(1000)) if process is None else process
  learned = network.out_channels == 2 * channels
  prediction = predictions.learned_range(predictions.EPS) if learned else predictions.EPS
  defaults = None
  if process.num_steps:
    defaults = SamplingDefaults(
      name="ancestral",
      sampler=sampling.ancestral(process, "learned" if learned else "large"),
      times=functools.partial(sampling.grids.linspace, process),
      steps=min(_STEPS, process.num_steps),
      guidance_scale=_GUIDANCE_SCALE if class_dropout else 1.0,
    )
  by_name, options = _conditions(network, class_dropout), {"process": process, "prediction": prediction}
  model = _model(network.clone(scan=scan), by_name, codec, x_shape, defaults=defaults, **options)
  params = tensors.load(file, template(network, channels), _layout(network))
  return model, loops.stack(network, params) if scan else params


def load_sit(
  path: str | Path,
  *,
  time_direction: str,
  time_scale: float,
  codec: str | Path = "",
  shape: tuple[int, ...] | None = None,
  heads: int | None = None,
  class_dropout: float = 0.1,
  process: Process | None = None,
  scan: bool = True,
) -> tuple[Model, PyTree]:
  """Load the model and the parameters of a SiT checkpoint, or of another model of this format with a velocity.

  The model predicts the velocity dx/dt for our times, which go from data at 0 to noise at 1. If the checkpoint's times
  go the other way, the function changes the sign of the last layer. If the network has twice as many output channels as
  x, the function drops the second half, as SiT's code does. The model has the condition "classes". The default sampler
  is Euler's method with 250 steps.

  Args:
    path: see `load_dit`.
    time_direction: the direction of the checkpoint's times: "data_at_1" if they go from noise at 0 to data at 1 (SiT),
      or "noise_at_1" if they go from data at 0 to noise at 1 (REPA, whose projectors are ignored). The file does not
      contain it.
    time_scale: the factor of the checkpoint's times in [0, 1] before they are embedded: 1 for SiT and REPA, 1000 for
      models that embed the numbers 0 to 1000. The file does not contain it.
    codec: see `load_dit`.
    shape: see `load_dit`.
    heads: see `load_dit`.
    class_dropout: see `load_dit`.
    process: the interpolant. None selects `processes.rectified_flow()`, SiT's linear interpolant.
    scan: see `load_dit`.

  Returns:
    The model, and the parameters of its network in float32.

  Raises:
    ValueError: see `load_dit`.
  """
  choose(time_direction, _DIRECTIONS, "time_direction")
  if not 0 < time_scale < math.inf:
    raise ValueError(f"Got time_scale={time_scale}; expected a finite number above 0, such as 1.0 for SiT.")
  file = tensors.TensorFile(path, _ANCHOR, "SiT", "ema")
  stored, channels = _infer_network(file, heads)
  x_shape = _x_shape(file, stored, shape, channels)
  if stored.out_channels not in (channels, 2 * channels):
    raise _wrong_channels(file, stored, channels)
  process = processes.rectified_flow() if process is None else process
  if process.num_steps is not None or process.t_max != 1:
    raise ValueError(
      f"Got a process with num_steps={process.num_steps} and t_max={process.t_max}; expected a continuous process with"
      " times in [0, 1], such as processes.rectified_flow() or processes.gvp()."
    )
  reverses = time_direction == "data_at_1"

  def time_input(t):
    t = processes.as_time(t)
    return time_scale * (1 - t if reverses else t)

  network = stored.clone(out_channels=channels)
  defaults = SamplingDefaults(
    name="euler",
    sampler=sampling.euler(process),
    times=functools.partial(sampling.grids.linspace, process),
    steps=_STEPS,
    guidance_scale=_GUIDANCE_SCALE if class_dropout else 1.0,
  )
  model = _model(
    network.clone(scan=scan),
    _conditions(network, class_dropout),
    codec,
    x_shape,
    process=process,
    prediction=predictions.VELOCITY,
    time_input=time_input,
    defaults=defaults,
  )
  layout = _layout(network, stored.out_channels, -1 if reverses else 1)
  params = tensors.load(file, template(network, channels), layout)
  return model, loops.stack(network, params) if scan else params


def _model(
  network: DiT, by_name: dict[str, Condition], codec: str | Path, x_shape: tuple[int, ...], **options: Any
) -> Model:
  """Return a model of x of this shape, with the codec at a path, or with pixels for an empty path."""
  decoder, data_shape = codecs.pixels(), x_shape
  if codec:
    decoder = read_codec(codec)
    autoencoder = decoder.module
    data_shape = (*(side * autoencoder.downsampling for side in x_shape[:-1]), autoencoder.out_channels)
    if autoencoder.latent_channels != x_shape[-1]:
      raise ValueError(
        f"Got codec={str(codec)!r}, an autoencoder of latent_channels={autoencoder.latent_channels}, for a network of"
        f" {x_shape[-1]} input channels; expected the same number. Use the autoencoder that the network was trained with."
      )
  return Model(
    network=networks.from_linen(network, by_name),
    conditions=by_name,
    codec=decoder,
    data_shape=data_shape,
    shape=x_shape,
    **options,
  )


def _conditions(network: DiT, class_dropout: float) -> dict[str, Condition]:
  count = network.num_classes - (class_dropout > 0)
  if count < 1:
    raise ValueError(
      f"Got class_dropout={class_dropout} for a checkpoint with {network.num_classes} rows of classes; expected at least"
      " one class beside the null class. Set class_dropout=0 for a model without a null class."
    )
  return {"classes": conditions.classes("classes", count, class_dropout)}


def _infer_network(file: tensors.TensorFile, heads: int | None) -> tuple[DiT, int]:
  """Infer the network of a checkpoint from the shapes of its tensors, and return it with its input channels."""
  features, channels, patch = _shape(file, _ANCHOR, 4)[:3]
  blocks = {int(match[1]) for name in file.shapes if (match := re.match(r"blocks\.(\d+)\.", name))}
  heads = _HEADS.get(features) if heads is None else heads
  if heads is None:
    raise ValueError(
      f"Got {file.path}, a network of {features} features, which does not contain the number of attention heads; expected"
      f" heads=, because it is known only for {', '.join(map(str, _HEADS))} features."
    )
  network = DiT(
    out_channels=_shape(file, "final_layer.linear.weight", 2)[0] // patch**2,
    channels=features,
    layers=max(blocks, default=-1) + 1,
    heads=heads,
    patch=patch,
    mlp_ratio=_shape(file, "blocks.0.mlp.fc1.weight", 2)[0] / features,
    num_classes=_shape(file, "y_embedder.embedding_table.weight", 2)[0],
    time_features=_shape(file, "t_embedder.mlp.0.weight", 2)[1],
  )
  network.check_input((patch, patch, channels))
  return network, channels


def _shape(file: tensors.TensorFile, name: str, axes: int) -> tuple[int, ...]:
  shape = file.shapes.get(name, ())
  if len(shape) != axes:
    raise ValueError(
      f"Got {file.path} with {name} of shape {shape or None}; expected a tensor of {axes} axes, as in DiT and SiT."
    )
  return shape


def _x_shape(file: tensors.TensorFile, network: DiT, shape: tuple[int, ...] | None, channels: int) -> tuple[int, ...]:
  """Return the shape of x, and check that our table of positions is that of the file."""
  stored = next((value for _, value in file.items(["pos_embed"])), None) if "pos_embed" in file.shapes else None
  if shape is None:
    if stored is None:
      raise ValueError(
        f"Got {file.path} without pos_embed, so it does not contain the size of x; pass shape=(H, W, C)."
      )
    side = math.isqrt(stored.shape[-2]) * network.patch
    shape = (side, side, channels)
  shape = tuple(shape)
  if len(shape) != 3 or shape[-1] != channels:
    raise ValueError(f"Got shape={shape} for {file.path}; expected (H, W, {channels}), the shape of x.")
  network.check_input(shape)
  if stored is not None:
    table = position_table([range(side // network.patch) for side in shape[:-1]], network.channels)
    if stored.shape != (1, *table.shape) or not np.allclose(stored[0], table, atol=1e-4):
      raise ValueError(
        f"Got {file.path}, whose pos_embed {stored.shape} is not the sine-cosine table of x of shape={shape}; expected"
        f" {(1, *table.shape)}. Pass the shape of x that the network was trained with. Trained positions are not"
        " supported."
      )
  return shape


def _wrong_channels(file: tensors.TensorFile, network: DiT, channels: int) -> ValueError:
  return ValueError(
    f"Got {file.path}, a network of {channels} input and {network.out_channels} output channels; expected {channels} or"
    f" {2 * channels} output channels."
  )


def _layout(network: DiT, out_channels: int = 0, sign: int = 1) -> tensors.Layout:
  """Return how the checkpoints name and store our parameters.

  Args:
    network: our network.
    out_channels: the number of output channels in the file, of which our network has the first. 0 for the same number.
    sign: the factor of the network's output, 1 or -1.
  """
  outside = {
    "patches": "x_embedder.proj",
    "time/layers/linear_1": "t_embedder.mlp.0",
    "time/layers/linear_2": "t_embedder.mlp.2",
    "classes": "y_embedder.embedding_table",
    "modulation_out": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
  }
  inside = {
    "modulation": "adaLN_modulation.1",
    **{f"attention/to_{name}": "attn.qkv" for name in "qkv"},
    "attention/to_out": "attn.proj",
    "feed_forward/linear_1": "mlp.fc1",
    "feed_forward/linear_2": "mlp.fc2",
  }
  ours, pixels = network.out_channels, network.patch**2
  stored = out_channels or ours

  def name_of(path: str) -> str:
    block, part = split_block(path)
    name = f"blocks.{block}.{inside[part]}" if block else outside[part]
    return f"{name}.{tensors.leaf_name(path)}"

  def shape_of(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    shape = tensors.torch_shape(path, shape)
    if path.startswith("proj_out/"):
      return (pixels * stored, *shape[1:])
    return (3 * shape[0], *shape[1:]) if _qkv_index(path) is not None else shape

  def from_file(path: str, value: np.ndarray) -> np.ndarray:
    index = _qkv_index(path)
    if index is not None:
      value = np.split(value, 3)[index]
    elif path.startswith("proj_out/"):
      value = sign * value.reshape(pixels, stored, *value.shape[1:])[:, :ours].reshape(-1, *value.shape[1:])
    return tensors.from_torch(path, value)

  return tensors.Layout(name_of, shape_of, from_file, lambda name: name == "pos_embed" or name.startswith(_PROJECTORS))


def _qkv_index(path: str) -> int | None:
  """Return the index of queries, keys or values in the file's joint tensor, or None for other parameters."""
  match = re.search(r"/attention/to_([qkv])/", path)
  return None if match is None else "qkv".index(match[1])
