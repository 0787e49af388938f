"""Read the text pipelines of diffusers as models.

They are the pipelines of Stable Diffusion 1, 2 and XL, of XL's refiner, of inpainting and of InstructPix2Pix, and the
pipelines of Stable Diffusion 3 and PixArt, whose conditions are in `transformer_conditions`. The conditions of the
other models are

- "text": prompts. The network receives the states (the outputs of one layer) of each text encoder. In the unconditional
  branch of guidance, the network receives the states of the empty prompt, or zeros if the pipeline sets
  `force_zeros_for_empty_prompt`;
- "sizes", for XL: the height and width of the original image, the top and left of its crop, and the height and width
  of the target. For the refiner, an aesthetic score replaces the height and width of the target. By default, the sizes
  describe an image that was not cropped;
- "masked", for inpainting: images with a mask, see `masked_image`;
- "source", for InstructPix2Pix: the images to edit, see `source_image`.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import gaussian, predictions
from ddpm_jax.data import FRAMING, tokenizers
from ddpm_jax.interop import (
  folders,
  network_folders,
  pipeline_index,
  schedulers,
  tensors,
  transformer_conditions,
  transformers,
)
from ddpm_jax.interop.codec_folders import read_codec, shapes_of
from ddpm_jax.interop.pipeline_index import Index
from ddpm_jax.interop.pipeline_parts import Encoder, Parts, encoders_loader
from ddpm_jax.models import Codec, Condition, Model, conditions, networks, texts
from ddpm_jax.storage import jsonfiles

Array = jax.Array
PyTree = Any
# The aesthetic scores of the refiner's two branches of guidance (Podell et al. 2023, and diffusers' defaults).
_SCORE, _NULL_SCORE = 6.0, 2.5
# The approximate share of samples that got the null text when the published models were trained.
TEXT_DROPOUT = 0.1
# Options of configs that change nothing here. For example, the softmax of attention is always computed in float32.
_UNUSED = ("upcast_attention",)


def read(
  path: str | Path,
  *,
  shape: tuple[int, int, int] | None = None,
  text_dropout: float = TEXT_DROPOUT,
  dropout: float = 0.0,
  dtype: str = "float32",
  remat: str = "none",
  attention: str = "",
  scan: bool = True,
  variant: str = "",
  posterior: str = "sample",
) -> Model:
  """Read the model of a text pipeline from its config files and tokenizers, without parameters.

  Args:
    path: the folder of the pipeline, or a name on the Hugging Face hub.
    shape: the shape [H, W, 3] of the images, with sides divisible by the autoencoder's factor (8). None takes it from
      the config.
    text_dropout: the share of samples that get the null text in training, in [0, 1). Guidance needs a share above 0.
      The published models were trained with about 0.1.
    dropout: the dropout rate of the network in training.
    dtype: the dtype of the computation, and of the parameters of the autoencoder and the text encoders: "float32" or
      "bfloat16".
    remat: what the backward pass recomputes, see `networks.UNet`.
    attention: see `networks.UNet`.
    scan: see `diffusers.load`.
    variant: the variant of the weights, such as "fp16". The network must have this variant. Any other part without
      this variant is read from its plain weights. Empty selects the plain weights or, if there are none, the only
      variant.
    posterior: how images are encoded, see `codecs.latent`.

  Raises:
    ValueError: if the folder does not exist, a part is missing or not supported, the parts belong to different models,
      or an argument is invalid. The message names the cause.
  """
  folder = folders.find_folder(path, weights=False, files=folders.TOKENIZER)
  index = pipeline_index.read(folder)
  network, network_config = _read_network(folder, index, dtype)
  encoders = {}
  for part, tokenizer in zip(index.encoders, index.tokenizers, strict=True):
    module, load = transformers.read_text_encoder(path, part=part, dtype=dtype, variant=variant)
    length = index.pipeline.lengths.get(tokenizer)
    with jsonfiles.named_errors(folder / tokenizer):
      words = tokenizers.load(folder / tokenizer, length, module.vocabulary)
    encoders[part] = Encoder(module, load, words, folder / tokenizer)
  scheduler = folder / "scheduler" / "scheduler_config.json"
  config = jsonfiles.read(scheduler)
  with jsonfiles.named_errors(scheduler):
    schedule = schedulers.from_config(config)
  parts = Parts(
    contents=index,
    network=network_folders.with_options(network, dropout=dropout, remat=remat, attention=attention, scan=scan),
    in_channels=network_config["in_channels"],
    size=network_folders.image_size(network_config),
    codec=read_codec(path, posterior=posterior, dtype=dtype, variant=variant),
    schedule=schedule,
    encoders=encoders,
    unused={key: network_config[key] for key in _UNUSED if key in network_config},
  )
  with jsonfiles.named_errors(folder):
    return assemble(parts, shape=shape, text_dropout=text_dropout)


def _read_network(folder: Path, index: Index, dtype: str) -> tuple[Any, dict[str, Any]]:
  """Return the network of a pipeline and its complete config."""
  family = index.pipeline.family
  path, expected = folder / family.network, family.classes[family.network]
  network, config = network_folders.read_network(path, dtype=dtype)
  name = network_folders.format_of(network).NAMES[0]
  if name not in expected:
    raise ValueError(f"Got {path}, a {name}; expected a {expected[0]} in a {index.name}.")
  return network, config


def load(
  path: str | Path,
  *,
  params_dtype: str = "float32",
  mesh: jax.sharding.Mesh | None = None,
  variant: str = "",
  **options: Any,
) -> tuple[Model, PyTree]:
  """Load the model of a text pipeline and the parameters of its network.

  Args:
    path: see `read`.
    params_dtype: the dtype of the network's parameters, "float32" or "bfloat16".
    mesh: the devices to shard the parameters over; None for the default device.
    variant: see `read`.
    **options: other arguments of `read`.

  Returns:
    The model, and the parameters of its network. `model.load_frozen()` reads the parameters of its other parts.

  Raises:
    ValueError: see `read`; or if the weights cannot be read or do not match the config.
  """
  jax_type = tensors.choose_dtype(params_dtype, "params_dtype")
  model = read(path, variant=variant, **options)
  part = model.origin.contents.pipeline.family.network
  folder = folders.find_folder(path, parts=(part,), variant=variant) / part
  network, channels = model.network.module, model.origin.in_channels
  return model, network_folders.load_params(folder, network, channels, jax_type, variant, mesh)


def assemble(parts: Parts, *, shape: tuple[int, int, int] | None = None, text_dropout: float = TEXT_DROPOUT) -> Model:
  """Assemble a model from the parts of a pipeline.

  Args:
    parts: the parts.
    shape: see `read`.
    text_dropout: see `read`.

  Raises:
    ValueError: if the parts belong to different models, or the shape is invalid.
  """
  pipeline, network, process = parts.contents.pipeline, parts.network, parts.schedule.make_process()
  is_transformer = pipeline.family.network == "transformer"
  channels = parts.in_channels if is_transformer else network.out_channels
  prediction = _prediction(parts, channels)
  predictions.check_prediction(process, prediction)
  x_shape, data_shape = shapes_of(parts.codec, channels, parts.size, shape)
  if is_transformer:
    by_name = transformer_conditions.conditions_of(parts, data_shape, text_dropout)
  else:
    by_name = _unet_conditions(parts, x_shape, data_shape, text_dropout)
  network.check_input(x_shape)
  tokens = x_shape[0] * x_shape[1] // network.patch**2 if is_transformer else 0
  defaults = parts.schedule.defaults(process, tokens)
  defaults = defaults._replace(guidance_scale=pipeline.guidance_scale, steps=pipeline.steps or defaults.steps)
  return Model(
    network=networks.from_linen(network, by_name),
    process=process,
    prediction=prediction,
    conditions=by_name,
    codec=parts.codec,
    data_shape=data_shape,
    shape=x_shape,
    defaults=defaults,
    origin=parts,
  )


def _prediction(parts: Parts, channels: int) -> predictions.Prediction:
  """Return the prediction of a pipeline's network for x with this number of channels.

  PixArt's networks also learn the variance. PixArt's schedulers use only the first half of the output.
  """
  prediction, outputs = parts.schedule.make_prediction(), parts.network.out_channels
  if outputs == 2 * channels:
    return predictions.learned_range(prediction)
  if outputs != channels:
    raise ValueError(
      f"Got a {parts.contents.name} whose network has {outputs} output channels for latents of {channels}; expected"
      f" {channels}, or {2 * channels} with a learned variance. Correct the config of the network."
    )
  if prediction.learned_variance:
    raise ValueError(
      f"Got a {parts.contents.name} whose scheduler has a learned variance, but whose network has only the {outputs}"
      " output channels of the latents; expected a fixed variance. Set variance_type in scheduler_config.json."
    )
  return prediction


def _unet_conditions(
  parts: Parts, x_shape: tuple[int, ...], data_shape: tuple[int, ...], dropout: float
) -> dict[str, Condition]:
  """Return the conditions of a pipeline with a U-Net."""
  by_name = {"text": text(parts.encoders, parts.contents, dropout)}
  _check_text(parts, by_name["text"])
  if parts.network.size_features:
    by_name["sizes"] = sizes(_number_of_sizes(parts), data_shape)
  return by_name | _image_condition(parts, x_shape, data_shape)


def text(encoders: Mapping[str, Encoder], index: Index, dropout: float) -> Condition:
  """Return the text condition of a pipeline.

  The network of Stable Diffusion 1 and 2 receives the normalized output of the text encoder's last layer. The network
  of XL receives the output of the second to last layer of every encoder, without normalization, and also the pooled
  vector of the last encoder. No pipeline masks the padding of the prompts.

  Args:
    encoders: see `Parts`.
    index: the class and the options of the pipeline.
    dropout: see `texts.text`.
  """
  is_xl = index.pipeline.is_xl
  options: dict[str, Any] = {"layer": -2, "normed": False} if is_xl else {}

  def encode(params: PyTree, tokens: Mapping[str, Any]) -> PyTree:
    found = []
    for part, one in encoders.items():
      apply = functools.partial(one.module.apply, {"params": params[part]}, **options)
      found.append(texts.read_tokens(apply, tokens[part]))
    states = jnp.concatenate([one for one, _ in found], axis=-1)
    return {"tokens": states, "vector": found[-1][1]} if is_xl else states

  words = {part: one.tokenizer for part, one in encoders.items()}
  kind = {"tokens": "tokens", "vector": "vector"} if is_xl else "tokens"
  null_text = None if index.options.get("force_zeros_for_empty_prompt") else ""
  settings: dict[str, Any] = {"kind": kind, "dropout": dropout, "null_text": null_text}
  return texts.text("text", words, encode, encoders_loader(encoders), takes_weights=True, **settings)


def sizes(number: int, data_shape: tuple[int, ...]) -> Condition:
  """Return the condition "sizes" of Stable Diffusion XL (Podell et al. 2023, section 2.2).

  In training, the sizes of each image come from the item `data.FRAMING`, if the data have it. Otherwise, and by default
  in sampling, the sizes describe an image of `data_shape` that was not cropped.

  Args:
    number: the number of values per image. It is 6 for the height and width of the original image, the top and left of
      its crop, and the height and width of the target. It is 5 for the refiner, where an aesthetic score replaces the
      height and width of the target. The score is 2.5 in the unconditional branch of guidance, and 6 in the conditional
      branch.
    data_shape: the shape [H, W, C] of the images.
  """
  height, width, _ = data_shape
  base = (height, width, 0, 0)
  values = (*base, height, width) if number == 6 else (*base, _SCORE)

  def repeat(count: int, row: Sequence[float] = values) -> np.ndarray:
    return np.tile(np.array(row, np.float32), (count, 1))

  def from_data(batch: Mapping[str, Any]) -> Array:
    rows = jnp.asarray(repeat(jax.tree.leaves(batch)[0].shape[0]))
    if FRAMING not in batch:
      return rows
    framing = jnp.asarray(batch[FRAMING])
    # The data have no aesthetic scores.
    return framing if number == 6 else jnp.concatenate([framing[:, :4], rows[:, 4:]], axis=-1)

  vector = conditions.vector("sizes", number)
  null = None if number == 6 else lambda frozen: jnp.asarray(repeat(1, (*base, _NULL_SCORE))[0])
  return vector._replace(default=repeat, from_data=from_data, framing=True, null=null)


def masked_image(name: str, codec: Codec, data_shape: tuple[int, ...], x_shape: tuple[int, ...]) -> Condition:
  """Return the condition of an inpainting model: the mask and the latents of the masked image.

  An item is an array [H, W, C + 1]: an image in [-1, 1] and, as the last channel, the mask. The mask is 1 where new
  content is painted, and 0 elsewhere. The network receives every f-th pixel of the mask, where f is the downsampling
  factor of the codec. It also receives the codec's latents of the masked image, whose pixels under the mask are 0
  (gray).
  """
  factor = data_shape[0] // x_shape[0]

  def encode(frozen, keys, batch, train):
    items = jnp.asarray(batch[name])
    _check_items(name, items, (*data_shape[:-1], data_shape[-1] + 1))
    mask = items[..., -1:] >= 0.5
    x = codec.encode(frozen, keys, jnp.where(mask, 0, items[..., :-1]))
    return jnp.concatenate([mask[:, ::factor, ::factor].astype(x.dtype), x], axis=-1)

  shape = jax.ShapeDtypeStruct((*x_shape[:-1], x_shape[-1] + 1), jnp.float32)
  return Condition(kind="image", shape=shape, encode=encode, load=codec.load)


def source_image(name: str, codec: Codec, data_shape: tuple[int, ...], x_shape: tuple[int, ...]) -> Condition:
  """Return the condition of InstructPix2Pix: the image to edit (Brooks et al. 2023, section 3.2).

  An item is an image [H, W, C] in [-1, 1]. The network receives the mean of the autoencoder's posterior of this
  image, without the codec's scale. The null value consists of zeros.
  """
  assert codec.compress is not None
  compress = codec.compress

  def encode(frozen, keys, batch, train):
    items = jnp.asarray(batch[name])
    _check_items(name, items, data_shape)
    return gaussian.from_moments(compress(frozen, items).astype(jnp.float32)).mode()

  condition = conditions.image(name, data_shape)
  shape = jax.ShapeDtypeStruct(x_shape, jnp.float32)
  return condition._replace(shape=shape, encode=encode, null=lambda frozen: jnp.zeros(x_shape), load=codec.load)


def _check_items(name: str, items: Array, shape: tuple[int, ...]) -> None:
  if items.shape[1:] != shape:
    raise ValueError(
      f"Got {name} of shape {items.shape}; expected [B, {', '.join(map(str, shape))}]. Resize the images."
    )


def _check_text(parts: Parts, condition: Condition) -> None:
  """Check that the network takes what the text encoders return."""
  shapes = condition.shape
  tokens = shapes["tokens"] if parts.contents.pipeline.is_xl else shapes
  expected = parts.network.context_features
  if tokens.shape[-1] != expected:
    raise ValueError(
      f"Got text encoders with {tokens.shape[-1]} features and a U-Net with cross_attention_dim={expected}; expected the same"
      " number. The parts belong to different models."
    )
  if parts.contents.pipeline.is_xl != bool(parts.network.size_features):
    raise ValueError(
      f"Got a {parts.contents.name} whose U-Net has {'no ' if parts.contents.pipeline.is_xl else 'an '}addition_embed_type; expected"
      f" {'text_time' if parts.contents.pipeline.is_xl else 'null'}. The parts belong to different models."
    )


def _number_of_sizes(parts: Parts) -> int:
  network = parts.network
  pooled = list(parts.encoders.values())[-1].module.projection
  number = 5 if parts.contents.options.get("requires_aesthetics_score") else 6
  if pooled + number * network.size_features != network.vector_features:
    raise ValueError(
      f"Got a U-Net with projection_class_embeddings_input_dim={network.vector_features} for a pooled text of {pooled}"
      f" features and {number} sizes of {network.size_features} features each; expected"
      f" {pooled + number * network.size_features}. The parts belong to different models."
    )
  return number


def _image_condition(parts: Parts, x_shape: tuple[int, ...], data_shape: tuple[int, ...]) -> dict[str, Condition]:
  """Return a dict from the name of the image condition to the condition.

  The dict is empty if the network takes no input channels in addition to the channels of x.
  """
  extra, edits = parts.in_channels - x_shape[-1], parts.contents.pipeline.edits
  if edits and extra == x_shape[-1]:
    return {"source": source_image("source", parts.codec, data_shape, x_shape)}
  if not edits and extra == x_shape[-1] + 1:
    return {"masked": masked_image("masked", parts.codec, data_shape, x_shape)}
  if extra or edits:
    latent = x_shape[-1]
    expected = str(2 * latent) if edits else f"{latent}, or {2 * latent + 1} for inpainting"
    raise ValueError(
      f"Got a {parts.contents.name} whose U-Net has in_channels={parts.in_channels}; expected {expected}."
    )
  return {}
