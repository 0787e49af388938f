"""Test that we read single-file checkpoints of Stable Diffusion as diffusers' converters do."""

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.loaders import single_file_utils

from ddpm_jax import interop
from ddpm_jax.interop import autoencoder_kl, ldm, unet2d_condition
from ddpm_jax.networks import Autoencoder
from tests.parameters import random_like
from tests.test_interop_unet2d_condition import CONFIGS, PUBLISHED, published

NAMES = ("Stable Diffusion 1", "Stable Diffusion 2", "Stable Diffusion XL", "refiner", "vectors")
UNET, AUTOENCODER = "model.diffusion_model.", "first_stage_model."


def stored(params, layout, prefix=""):
  """Return parameters as PyTorch tensors with the names and shapes that `layout` sets."""
  tensors = {}
  for path, leaf in interop.tensors.flatten(params).items():
    value = interop.tensors.to_torch(path, np.asarray(leaf))
    shape = layout.shape_of(path, leaf.shape)
    tensors[prefix + layout.name_of(path)] = torch.tensor(np.ascontiguousarray(value.reshape(shape)))
  return tensors


def assert_same(tensors, others):
  assert tensors.keys() == others.keys()
  for name, value in tensors.items():
    assert torch.equal(value, others[name]), name


def random_unet(name):
  """Return a small network, random parameters, and its complete config."""
  config = unet2d_condition.with_defaults(CONFIGS[name][1])
  network = unet2d_condition.from_config(config)
  return network, random_like(unet2d_condition.template(network, config["in_channels"])), config


@pytest.mark.parametrize("name", NAMES)
def test_names_of_the_network_match_the_converter(name):
  network, params, config = random_unet(name)
  checkpoint = stored(params, ldm.unet_layout(network), UNET)
  converted = single_file_utils.convert_ldm_unet_checkpoint(checkpoint, config)
  assert_same(converted, stored(params, unet2d_condition.layout(network)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_of_published_networks_match_the_converter(name):
  network, template, expected = published(name)
  config = unet2d_condition.to_config(network, template)
  layout = ldm.unet_layout(network)
  checkpoint = {
    UNET + layout.name_of(path): torch.empty(layout.shape_of(path, leaf.shape), device="meta")
    for path, leaf in interop.tensors.flatten(template).items()
  }
  converted = single_file_utils.convert_ldm_unet_checkpoint(checkpoint, config)
  assert {key: tuple(value.shape) for key, value in converted.items()} == expected


def random_autoencoder(**options):
  network = Autoencoder(**{"channels": 32, "multipliers": (1, 2, 2), "blocks": 1} | options)
  side = network.downsampling
  return network, random_like(interop.tensors.abstract_params(network, (side, side, network.out_channels)))


def four_axes(params, network):
  """Return the tensors of an autoencoder as latent diffusion stores them, with attention as 1x1 convolutions."""
  tensors = stored(params, ldm.autoencoder_layout({}), AUTOENCODER)
  return {
    name: value[:, :, None, None] if ".attn_1." in name and value.ndim == 2 else value
    for name, value in tensors.items()
  }


def test_names_of_the_autoencoder_match_the_converter():
  network, params = random_autoencoder()
  levels = len(network.multipliers)
  checkpoint = four_axes(params, network)
  config = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
  converted = single_file_utils.convert_ldm_vae_checkpoint(checkpoint, config)
  assert_same(converted, stored(params, autoencoder_kl.layout(levels)))


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_read_without_a_config(name, tmp_path):
  """The file lacks four settings: the heads, the groups, the epsilons, and the features of each size condition.

  The test passes the heads and the features. The groups and the epsilons get the published values.
  """
  network, params, _ = random_unet(name)
  autoencoder, others = random_autoencoder()
  text = {"cond_stage_model.transformer.text_model.final_layer_norm.weight": torch.ones(3)}
  average = {"model_ema.diffusion_modelinput_blocks00weight": torch.ones(3), "model_ema.decay": torch.tensor(0.9)}
  checkpoint = stored(params, ldm.unet_layout(network), UNET) | four_axes(others, autoencoder) | text | average
  safetensors.torch.save_file(checkpoint, tmp_path / "model.safetensors")
  files = ["model.safetensors"]
  if name == "vectors":
    torch.save({"state_dict": checkpoint, "global_step": 3}, tmp_path / "model.ckpt")
    files.append("model.ckpt")
  for file in files:
    loaded, same = ldm.load_unet(
      tmp_path / file, heads=network.heads, size_features=network.size_features, dtype="float32"
    )
    assert loaded == network.clone(groups=32, epsilon=1e-5)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    codec, again = ldm.load_autoencoder(tmp_path / file)
    assert codec == autoencoder
    jax.tree.map(np.testing.assert_array_equal, again, others)


@pytest.mark.parametrize("name", PUBLISHED)
def test_options_of_published_networks_are_inferred(name):
  network, template, _ = published(name)
  layout = ldm.unet_layout(network)

  class File:
    path = "model.safetensors"
    shapes = {
      layout.name_of(path): layout.shape_of(path, leaf.shape)
      for path, leaf in interop.tensors.flatten(template).items()
    }

  inferred, channels = ldm.infer_unet(File)
  assert inferred == network
  assert channels == template["conv_in"]["kernel"].shape[-2]


@pytest.mark.parametrize(
  "options",
  [
    {"middle_attention": False},
    {"quant_conv": False, "post_quant_conv": False, "latent_channels": 16},
    {"out_channels": 1},
  ],
)
def test_a_file_with_an_autoencoder_alone_is_read(options, tmp_path):
  network, params = random_autoencoder(**options)
  tensors = stored(params, ldm.autoencoder_layout({})) | {"loss.logvar": torch.ones(1)}
  safetensors.torch.save_file(tensors, tmp_path / "vae.safetensors")
  loaded, same = ldm.load_autoencoder(tmp_path / "vae.safetensors")
  assert loaded == network
  jax.tree.map(np.testing.assert_array_equal, same, params)


def test_other_files_are_refused_by_name(tmp_path):
  network, params, _ = random_unet("vectors")
  safetensors.torch.save_file(stored(params, unet2d_condition.layout(network)), tmp_path / "diffusers.safetensors")
  with pytest.raises(
    ValueError, match=r"no time_embed\.0\.weight.*expected a state dict of a U-Net of latent diffusion"
  ):
    ldm.load_unet(tmp_path / "diffusers.safetensors")
  with pytest.raises(ValueError, match=r"no encoder\.conv_in\.weight.*autoencoder of latent diffusion"):
    ldm.load_autoencoder(tmp_path / "diffusers.safetensors")
  tensors = stored(params, ldm.unet_layout(network))
  safetensors.torch.save_file(tensors | {"extra.weight": torch.ones(1)}, tmp_path / "extra.safetensors")
  with pytest.raises(ValueError, match=r"1 extra: extra\.weight"):
    ldm.load_unet(tmp_path / "extra.safetensors", size_features=0)
  with pytest.raises(ValueError, match="dtype='float16'; expected 'float32' or 'bfloat16'"):
    ldm.load_unet(tmp_path / "extra.safetensors", size_features=0, dtype="float16")
  gap = {name.replace("output_blocks.0.", "output_blocks.999999999999."): value for name, value in tensors.items()}
  safetensors.torch.save_file(gap, tmp_path / "gap.safetensors")
  with pytest.raises(ValueError, match=r"has no output_blocks\.0; expected a model of"):
    ldm.load_unet(tmp_path / "gap.safetensors")
  partial = {name: value for name, value in tensors.items() if "proj_in" not in name}
  safetensors.torch.save_file(partial, tmp_path / "partial.safetensors")
  with pytest.raises(ValueError, match=r"has no middle_block\.1\.proj_in\.weight; expected a model of"):
    ldm.load_unet(tmp_path / "partial.safetensors")
