"""Cards of models that are written for diffusers."""

import json
from collections.abc import Mapping
from typing import Any

import jax

from ddpm_jax.networks import UNet

PyTree = Any


def model_card(
  network: UNet,
  params: PyTree,
  shape: tuple[int, ...],
  scheduler_config: Mapping[str, Any],
  config: Mapping[str, Any] | None,
  scores: Mapping[str, Any] | None,
) -> str:
  """Write what a model is, how to run it, how good it is and how it was trained, as Markdown.

  Args:
    network: its U-Net.
    params: its parameters.
    shape: [H, W, C] of its images.
    scheduler_config: as diffusers has it.
    config: how it was trained; None to leave that out.
    scores: how good it is; None to leave that out.
  """
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  clipped = ", use_clipped_model_output=True" if scheduler_config["clip_sample"] else ""
  lines = [
    "---",
    "library_name: diffusers",
    "pipeline_tag: unconditional-image-generation",
    "tags: [diffusion, ddpm, jax, ddpm_jax]",
    "---",
    "",
    f"# A diffusion model of images of {shape[0]}x{shape[1]}, {shape[2]} channel{'s' if shape[2] > 1 else ''}",
    "",
    f"A U-Net of {count:,} parameters, trained with ddpm_jax. It gives {scheduler_config['prediction_type']} at"
    f" {scheduler_config['num_train_timesteps']} steps.",
    "",
  ]
  learned = scheduler_config["variance_type"] == "learned_range"
  conditioned = network.num_classes or network.vector_embedding
  if conditioned:
    lines += [
      "It is conditioned, which diffusers' pipelines do not pass on: call `pipeline.unet(x, t, class_labels)`.",
      "",
    ]
  else:
    ddim = [
      "from diffusers import DDIMPipeline",
      "",
      f'images = DDIMPipeline.from_pretrained("<this folder>")(batch_size=16, num_inference_steps=50{clipped}).images',
    ]
    lines += [
      "```python",
      "from diffusers import DDPMPipeline",
      "",
      'images = DDPMPipeline.from_pretrained("<this folder>")(batch_size=16).images',
      *([] if learned else ["", *ddim]),
      "```",
      "",
    ]
  if clipped and not conditioned and not learned:
    lines += [
      "`use_clipped_model_output=True` derives the noise anew from the clipped estimate of the image, as ddpm_jax does.",
      "",
    ]
  lines += [
    "```python",
    "from ddpm_jax import interop",
    "",
    'model, params = interop.diffusers.load("<this folder>")  # in JAX',
    "```",
    "",
  ]
  for title, content in (("Scores", scores), ("Training config", config)):
    if content:
      lines += [f"## {title}", "", "```json", json.dumps(content, indent=2), "```", ""]
  return "\n".join(lines)
