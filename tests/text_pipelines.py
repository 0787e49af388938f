"""Write small text pipelines of diffusers with random parameters."""

import functools

import diffusers
import numpy as np
import torch
import transformers

from tests.test_interop_unet2d_condition import SIZES, blocks, random_peer
from tests.tokenizer_folders import sd1_settings, sd2_settings, sdxl_settings, write_clip, write_settings

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PNDM = diffusers.PNDMScheduler(**SD, steps_offset=1, skip_prk_steps=True, set_alpha_to_one=False)
EULER = diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1)
V_DDIM = diffusers.DDIMScheduler(
  **SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
)
XL_TEXT = {"cross_attention_dim": 24 + 32, "projection_class_embeddings_input_dim": 20 + 6 * 8, **SIZES}
REFINER_TEXT = {"cross_attention_dim": 32, "projection_class_embeddings_input_dim": 20 + 5 * 8, **SIZES}
SIZE, FACTOR = 8, 4
# The class, the scheduler, the options of the U-Net, and the settings of each part's tokenizer.
PIPELINES = {
  "sd1": ("StableDiffusionPipeline", PNDM, blocks(True, False), {"text_encoder": sd1_settings}),
  "sd2": (
    "StableDiffusionPipeline",
    V_DDIM,
    blocks(False, True, use_linear_projection=True),
    {"text_encoder": sd2_settings},
  ),
  "xl": (
    "StableDiffusionXLPipeline",
    EULER,
    blocks(False, True, use_linear_projection=True, transformer_layers_per_block=[1, 2], **XL_TEXT),
    {"text_encoder": sd1_settings, "text_encoder_2": sdxl_settings},
  ),
  "refiner": (
    "StableDiffusionXLImg2ImgPipeline",
    EULER,
    blocks(False, True, use_linear_projection=True, **REFINER_TEXT),
    {"text_encoder_2": sdxl_settings},
  ),
  "inpaint": (
    "StableDiffusionInpaintPipeline",
    PNDM,
    blocks(True, False, in_channels=9),
    {"text_encoder": sd1_settings},
  ),
  "xl_inpaint": (
    "StableDiffusionXLInpaintPipeline",
    EULER,
    blocks(False, True, in_channels=9, use_linear_projection=True, upcast_attention=True, **XL_TEXT),
    {"text_encoder": sd1_settings, "text_encoder_2": sdxl_settings},
  ),
  "instruct": (
    "StableDiffusionInstructPix2PixPipeline",
    EULER,
    blocks(True, False, in_channels=8),
    {"text_encoder": sd1_settings},
  ),
}


def text_encoder(part, activation):
  """Return a text encoder of CLIP with random parameters."""
  torch.manual_seed(len(part))
  is_second = part == "text_encoder_2"
  width = 32 if is_second else 24
  config = transformers.CLIPTextConfig(
    hidden_size=width,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    projection_dim=20,
    hidden_act=activation,
    bos_token_id=49406,
    eos_token_id=2 if is_second else 49407,
    pad_token_id=1,
  )
  peer = (transformers.CLIPTextModelWithProjection if is_second else transformers.CLIPTextModel)(config).eval()
  with torch.no_grad():
    for parameter in peer.parameters():
      parameter.add_(0.05 * torch.randn_like(parameter))
  return peer


@functools.cache
def autoencoder():
  torch.manual_seed(0)
  widths = (32, 32, 32)
  return diffusers.AutoencoderKL(
    down_block_types=["DownEncoderBlock2D"] * 3,
    up_block_types=["UpDecoderBlock2D"] * 3,
    block_out_channels=widths,
    sample_size=SIZE * FACTOR,
    scaling_factor=0.5,
  ).eval()


def make(name, tokenizers):
  """Return a small pipeline of diffusers with random parameters.

  Args:
    name: a name in `PIPELINES`.
    tokenizers: the folder for the tokenizers. Each gets its own subfolder.
  """
  class_name, scheduler, options, settings = PIPELINES[name]
  parts = {"unet": random_peer(options | {"sample_size": SIZE}), "vae": autoencoder(), "scheduler": scheduler}
  for part, write in settings.items():
    folder = write_settings(write_clip(tokenizers / write.__name__), write())
    # Encoders of OpenCLIP have the exact GELU.
    parts[part] = text_encoder(part, "gelu" if name == "sd2" or part == "text_encoder_2" else "quick_gelu")
    parts[part.replace("text_encoder", "tokenizer")] = transformers.CLIPTokenizer.from_pretrained(folder)
  kind = getattr(diffusers, class_name)
  if name == "refiner":
    parts |= {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
    parts["force_zeros_for_empty_prompt"] = False
  if class_name.startswith("StableDiffusionXL"):
    parts["add_watermarker"] = False
  else:
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
  pipeline = kind(**parts)
  pipeline.set_progress_bar_config(disable=True)
  return pipeline


def noise(count=2, seed=3):
  """Return noise [count, SIZE, SIZE, 4]."""
  return np.random.default_rng(seed).standard_normal((count, SIZE, SIZE, 4)).astype(np.float32)


def as_torch(x):
  return torch.tensor(np.moveaxis(np.asarray(x), -1, 1))
