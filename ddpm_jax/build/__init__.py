"""From a config to objects: the one place where strings become functions, and where a config's mistakes are found."""

from ddpm_jax.build.condition import low_size
from ddpm_jax.build.data import build_data, build_sources
from ddpm_jax.build.editing import TASKS, build_edit, check_edit
from ddpm_jax.build.evaluation import (
  FEATURES,
  Reference,
  Space,
  build_reference,
  build_settings,
  build_space,
  describe_space,
)
from ddpm_jax.build.guidance import Guides, bound, build_conditional, build_denoise, check_guidance
from ddpm_jax.build.memory import check_evaluation, check_features, check_images, check_training
from ddpm_jax.build.model import (
  build_classifier,
  build_network,
  build_params_init,
  build_prediction,
  build_process,
  check_denoises,
  classifies,
  image_shape,
)
from ddpm_jax.build.rules import SAMPLERS, build_step_rule
from ddpm_jax.build.sampling import (
  build_denoising,
  build_generate,
  build_grid,
  build_labels,
  build_rule,
  build_sampler,
  compile_draw,
  of_previews,
)
from ddpm_jax.build.training import (
  WEIGHTINGS,
  batch_shapes,
  build_loss,
  build_optimizer,
  build_schedule,
  build_step,
  flops_per_image,
)

__all__ = [
  "FEATURES",
  "SAMPLERS",
  "TASKS",
  "WEIGHTINGS",
  "Guides",
  "Reference",
  "Space",
  "batch_shapes",
  "bound",
  "build_classifier",
  "build_conditional",
  "build_data",
  "build_denoise",
  "build_denoising",
  "build_edit",
  "build_generate",
  "build_grid",
  "build_labels",
  "build_loss",
  "build_network",
  "build_optimizer",
  "build_params_init",
  "build_prediction",
  "build_process",
  "build_reference",
  "build_rule",
  "build_sampler",
  "build_schedule",
  "build_settings",
  "build_sources",
  "build_space",
  "build_step",
  "build_step_rule",
  "check_denoises",
  "check_edit",
  "check_evaluation",
  "check_features",
  "check_guidance",
  "check_images",
  "check_training",
  "classifies",
  "compile_draw",
  "describe_space",
  "flops_per_image",
  "image_shape",
  "low_size",
  "of_previews",
]
