"""Compare outputs and input gradients of our U-Net and diffusers' `UNet2DModel` with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from ddpm_jax import interop
from ddpm_jax.interop import unet2d
from ddpm_jax.networks import UNet

DOWN, ATTN = ({"Down": f"{kind}DownBlock2D", "Up": f"{kind}UpBlock2D"} for kind in ("", "Attn"))
RESNET = {"Down": "ResnetDownsampleBlock2D", "Up": "ResnetUpsampleBlock2D"}


def levels(*kinds):
  """Return the options that set diffusers' block types.

  `kinds` has the kind of each level, finest level first.
  """
  return {
    "down_block_types": tuple(kind["Down"] for kind in kinds),
    "up_block_types": tuple(kind["Up"] for kind in kinds[::-1]),
  }


SMALL = {
  "block_out_channels": (16, 32),
  "layers_per_block": 1,
  "norm_num_groups": 8,
  **levels(DOWN, ATTN),
}
# Image size, batch size, and changes to SMALL. Independent options share a network, to compile few networks.
CONFIGS = {
  "defaults of the class": ((16, 16), 3, {}),
  "ddpm": (
    (32, 32),
    2,
    {
      "block_out_channels": (16, 32, 32, 32),
      "layers_per_block": 2,
      **levels(DOWN, ATTN, DOWN, DOWN),
      "downsample_padding": 0,
      "flip_sin_to_cos": False,
      "freq_shift": 1,
      "norm_eps": 1e-6,
      "attention_head_dim": None,
    },
  ),
  "adm": (
    (16, 16),
    1,
    {
      "block_out_channels": (16, 32, 48),
      **levels(RESNET, ATTN, ATTN),
      "resnet_time_scale_shift": "scale_shift",
      "downsample_type": "resnet",
      "upsample_type": "resnet",
      "attn_norm_num_groups": 8,
      "num_class_embeds": 5,
      "out_channels": 6,
      "attention_head_dim": 16,
    },
  ),
  "scale_shift, no norm in the middle": ((8, 8), 5, {"resnet_time_scale_shift": "scale_shift"}),
  "three levels, mixed resampling": (
    (8, 16),
    3,
    {
      "block_out_channels": (16, 24, 40),
      **levels(DOWN, ATTN, RESNET),
      "downsample_type": "resnet",
      "upsample_type": "resnet",
    },
  ),
  "down by resnet, up by convolution": (
    (12, 8),
    3,
    {
      "block_out_channels": (8, 16, 16),
      "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
      "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
      "downsample_type": "resnet",
    },
  ),
  "no attention at all": ((14, 10), 1, {**levels(DOWN, DOWN), "add_attention": False}),
  "attention everywhere": ((8, 8), 7, {**levels(ATTN, ATTN), "layers_per_block": 2, "num_class_embeds": 4}),
  "one level": ((7, 5), 3, {"block_out_channels": (16,), **levels(ATTN)}),
  "classes embedded as time, centered input": (
    (8, 8),
    3,
    {"class_embed_type": "timestep", "center_input_sample": True},
  ),
  "classes as vectors, more channels in than out": ((8, 8), 3, {"class_embed_type": "identity", "in_channels": 6}),
  "fourier, gray": (
    (10, 6),
    3,
    {"time_embedding_type": "fourier", "in_channels": 1, "out_channels": 1, "dropout": 0.3},
  ),
  "groups, width and order of the embedding": (
    (8, 8),
    3,
    {
      "norm_num_groups": 4,
      "attention_head_dim": 4,
      "block_out_channels": (12, 20),
      "time_embedding_dim": 40,
      "flip_sin_to_cos": True,
      "freq_shift": 1,
      "norm_eps": 1e-3,
    },
  ),
  "large": ((64, 64), 1, {"block_out_channels": (8, 8, 16), **levels(DOWN, DOWN, ATTN)}),
}


def random_unet(changes, seed=0):
  """Return a `UNet2DModel` with all parameters random, even biases and norms, so that each affects the output."""
  torch.manual_seed(seed)
  model = UNet2DModel(**(SMALL | changes)).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  return model


def classes_of(model, batch):
  """Return random class labels in the form that diffusers' model expects, or None if the model takes no classes."""
  embed_type, rng = model.config.class_embed_type, np.random.default_rng(5)
  if embed_type == "timestep":
    return rng.uniform(0, 100, batch).astype(np.float32)
  if embed_type == "identity":
    return rng.standard_normal((batch, 4 * model.config.block_out_channels[0])).astype(np.float32)
  return None if model.config.num_class_embeds is None else rng.integers(0, model.config.num_class_embeds, batch)


# Configs that together contain each kind of block. Gradients of the other configs are only compared in slow tests.
WITH_GRADIENTS = (
  "defaults of the class",
  "ddpm",
  "adm",
  "down by resnet, up by convolution",
  "groups, width and order of the embedding",
)


def run_peer(model, x, t, classes, weight):
  """Return a list of diffusers' output and the gradient of sum(output * weight) with respect to x.

  If `weight` is None, the list has only the output.
  """
  x = torch.tensor(x.transpose(0, 3, 1, 2)).requires_grad_(weight is not None)
  labels = None if classes is None else torch.tensor(classes)
  values = [model(x, torch.tensor(t), class_labels=labels).sample]
  if weight is not None:
    (values[0] * torch.tensor(weight.transpose(0, 3, 1, 2))).sum().backward()
    values.append(x.grad)
  return [value.detach().numpy().transpose(0, 2, 3, 1) for value in values]


def run_ours(network, params, x, t, classes, weight):
  """Return a list of our output and the gradient of sum(output * weight) with respect to x.

  If `weight` is None, the list has only the output.
  """
  time = jnp.log(t) if network.time_embedding == "fourier" else t
  conditions = {"vector" if network.vector_embedding else "classes": classes}

  @jax.jit
  def run(params, x):
    def loss(x):
      output = network.apply({"params": params}, x, time, **conditions)
      return jnp.sum(output * weight), output

    if weight is None:
      return [network.apply({"params": params}, x, time, **conditions)]
    gradient, output = jax.grad(loss, has_aux=True)(x)
    return [output, gradient]

  return run(params, x)


@pytest.mark.parametrize(
  ("name", "gradients"),
  [pytest.param(name, name in WITH_GRADIENTS, id=name) for name in CONFIGS]
  + [
    pytest.param(name, True, id=f"{name}, gradients", marks=pytest.mark.slow)
    for name in CONFIGS
    if name not in WITH_GRADIENTS
  ],
)
def test_outputs_and_input_gradients_match_the_peer(name, gradients, tmp_path):
  size, batch, changes = CONFIGS[name]
  model = random_unet(changes)
  model.save_pretrained(tmp_path)
  network, params = interop.diffusers.load_network(tmp_path)
  rng = np.random.default_rng(1)
  x = rng.standard_normal((batch, *size, model.config.in_channels)).astype(np.float32)
  weight = rng.standard_normal((batch, *size, model.config.out_channels)).astype(np.float32)
  weight = weight if gradients else None
  t = np.linspace(3, 977, batch).astype(np.float32)
  classes = classes_of(model, batch)
  for actual, expected in zip(
    run_ours(network, params, x, t, classes, weight), run_peer(model, x, t, classes, weight), strict=True
  ):
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.std(expected), rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_configs_are_read_back_unchanged(name):
  """diffusers also builds a model from our config, and its tensors have the shapes of the original model."""
  size, _, changes = CONFIGS[name]
  model = random_unet(changes)
  network = unet2d.from_config(model.config)
  again = unet2d.to_config(network, unet2d.template(network, model.config.in_channels), size)
  assert unet2d.from_config(again) == network
  shapes = {key: value.shape for key, value in UNet2DModel(**again).state_dict().items()}
  assert shapes == {key: value.shape for key, value in model.state_dict().items()}


def test_the_default_network_is_google_ddpm_cifar10_32():
  """All tensors of our network have the names and shapes of diffusers' tensors."""
  template = unet2d.template(UNet(), 3)
  config = unet2d.to_config(UNet(), template, (32, 32))
  assert config["attention_head_dim"] is None
  assert config["down_block_types"] == ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]
  with torch.device("meta"):
    expected = {key: tuple(value.shape) for key, value in UNet2DModel(**config).state_dict().items()}
  name_of = unet2d.layout(UNet()).name_of
  shapes = {
    name_of(path): interop.tensors.torch_shape(path, leaf.shape)
    for path, leaf in interop.tensors.flatten(template).items()
  }
  assert shapes == expected
  assert len(shapes) == 328
  assert sum(np.prod(shape) for shape in shapes.values()) == 35_746_307


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"act_fn": "relu"}, "act_fn='relu'"),
    ({"mid_block_type": None}, "mid_block_type=None"),
    ({"mid_block_scale_factor": 2**0.5}, "mid_block_scale_factor"),
    ({"attn_norm_num_groups": 4}, "attn_norm_num_groups=4"),
    ({"time_embedding_type": "learned", "num_train_timesteps": 10}, "time_embedding_type='learned'"),
    ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift='spatial'"),
    ({"down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D")}, "down_block_types='SkipDownBlock2D'"),
    ({"up_block_types": ("UpBlock2D", "UpBlock2D")}, "up_block_types"),
    ({"up_block_types": ("UpBlock2D",)}, "1 up_block_types"),
    ({"downsample_type": "fir"}, "downsample_type='fir'"),
    ({"downsample_padding": 2}, "downsample_padding=2"),
    ({"class_embed_type": "projection"}, "class_embed_type='projection'"),
    ({"cross_attention_dim": 768}, "cross_attention_dim=768"),
    ({"_class_name": "UNet2DConditionModel"}, "class UNet2DConditionModel"),
    ({"attention_head_dim": 5}, "head_channels=5"),
    ({"attention_head_dim": [8, 8]}, r"attention_head_dim=\[8, 8\]; expected an integer of at most 64 bits or null"),
    ({"norm_num_groups": None}, "norm_num_groups=None; expected an integer"),
    ({"dropout": None}, "dropout=None; expected a finite number in the range of float32"),
    ({"layers_per_block": True}, "layers_per_block=True"),
    ({"sample_size": [8]}, r"sample_size=\[8\]; expected one number"),
    ({"sample_size": 8.0}, "sample_size=8.0"),
    ({"block_out_channels": [16, "a"]}, "block_out_channels"),
    ({"down_block_types": None}, "down_block_types=None"),
    ({"in_channels": -1}, "in_channels=-1"),
    ({"sample_size": 7}, "divisible by 2"),
  ],
)
def test_unsupported_options_are_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=message):
    unet2d.from_config(SMALL | changes)


@pytest.mark.parametrize(
  ("network", "message"),
  [
    (UNet(score_sde=True), "score_sde=True"),
    (UNet(progressive_input=True), "progressive_input=True"),
    (UNet(dimensions=1), "dimensions=1"),
    (UNet(augmentation_features=9), "augmentation_features=9"),
    (UNet(vector_embedding="dense"), "vector_embedding='dense'"),
    (UNet(groups=0), "groups=0"),
    (UNet(downsample="residual", filter=(1, 3, 3, 1)), r"filter=\(1, 3, 3, 1\)"),
    (UNet(time_embedding="fourier"), "divide_by_sigma"),
    (UNet(time_features=64), "time_features=64"),
    (UNet(heads=4, attention_levels=(0, 1)), "heads=4"),
    (UNet(attention_levels=(0, 1), downsample=("conv", "residual", "conv")), "in 2 ways"),
  ],
)
def test_networks_that_the_peer_cannot_represent_are_errors(network, message):
  params = {"conv_in": {"kernel": np.zeros((3, 3, 3, 8))}}
  with pytest.raises(ValueError, match=message):
    unet2d.to_config(network, params, (32, 32))
