"""Write model cards for models exported to diffusers."""

import json
from collections.abc import Mapping
from typing import Any

import jax

from ddpm_jax.networks import DiT, UNet

PyTree = Any


def model_card(
  network: "UNet | DiT",
  params: PyTree,
  shape: tuple[int, ...],
  scheduler: Mapping[str, Any],
  config: Mapping[str, Any] | None,
  scores: Mapping[str, Any] | None,
  *,
  latent: bool = False,
) -> str:
  """Return a model card as Markdown.

  It describes the model, shows how to sample from it, and lists its scores and its training config.

  Args:
    network: the network.
    params: its parameters.
    shape: the shape [H, W, C] of one image.
    scheduler: all options of the scheduler, with their defaults.
    config: the training config. None leaves the section out.
    scores: the evaluation scores. None leaves the section out.
    latent: whether the model generates latents, which an autoencoder decodes.
  """
  num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
  is_dit = isinstance(network, DiT)
  clip_option = ", use_clipped_model_output=True" if scheduler.get("clip_sample") else ""
  lines = [
    "---",
    "library_name: diffusers",
    "pipeline_tag: unconditional-image-generation",
    "tags: [diffusion, ddpm, jax, ddpm_jax]",
    "---",
    "",
    f"# Diffusion model for {shape[0]}x{shape[1]} images with {shape[2]} channel{'s' if shape[2] > 1 else ''}",
    "",
    f"A {'DiT' if is_dit else 'U-Net'} with {num_params:,} parameters, trained with ddpm_jax. It predicts"
    f" `{scheduler['prediction_type']}` for a noise schedule of {scheduler['num_train_timesteps']}"
    " steps."
    + (
      f" It generates latents, and the autoencoder in `{'vae' if is_dit else 'vqvae'}/` decodes them." if latent else ""
    ),
    "",
  ]
  learns_variance = scheduler["variance_type"] == "learned_range"
  is_conditional = network.num_classes or network.vector_embedding
  if is_dit:
    # DiTPipeline always uses class 1000 as "no class". So guidance works only for models with 1000 classes.
    labels = [0, 1] if network.num_classes > 2 else [0]
    unguided = "" if network.num_classes == 1001 else ", guidance_scale=1"
    lines += _code(
      "from diffusers import DiTPipeline",
      "",
      f'images = DiTPipeline.from_pretrained("<this folder>")(class_labels={labels}{unguided}).images',
    )
  elif is_conditional:
    lines += [
      "The model takes a condition. diffusers' pipelines do not pass it to the network.",
      "Call `pipeline.unet(x, t, class_labels)`.",
      "",
    ]
  else:
    ddim = [
      "from diffusers import DDIMPipeline",
      "",
      f'images = DDIMPipeline.from_pretrained("<this folder>")(batch_size=16, num_inference_steps=50{clip_option}).images',
    ]
    pipeline = "LDMPipeline" if latent else "DDPMPipeline"
    lines += _code(
      f"from diffusers import {pipeline}",
      "",
      f'images = {pipeline}.from_pretrained("<this folder>")(batch_size=16).images',
      *([] if learns_variance or latent else ["", *ddim]),
    )
  if clip_option and not is_conditional and not learns_variance:
    lines += [
      "`use_clipped_model_output=True` recomputes the noise from the clipped image estimate. ddpm_jax always does so.",
      "",
    ]
  lines += _code(
    "from ddpm_jax import interop",
    "",
    'model, params = interop.diffusers.load("<this folder>")  # in JAX',
  )
  for title, content in (("Scores", scores), ("Training config", config)):
    if content:
      lines += [f"## {title}", "", "```json", json.dumps(content, indent=2), "```", ""]
  return "\n".join(lines)


def _code(*lines: str) -> list[str]:
  """Return the lines of a block of Python in Markdown."""
  return ["```python", *lines, "```", ""]
