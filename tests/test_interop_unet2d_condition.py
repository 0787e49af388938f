"""Compare our network of text models with diffusers' `UNet2DConditionModel`, and test reading and writing folders."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel

from ddpm_jax import interop
from ddpm_jax.interop import unet2d_condition
from ddpm_jax.networks import ConditionalUNet
from tests.parameters import random_like
from tests.test_interop_files import try_wrong_values
from tests.test_interop_unet import random_unet

WEIGHTS = "diffusion_pytorch_model.safetensors"


def blocks(*attention, **options):
  """Return the options of a small model.

  Args:
    *attention: for each level, finest first, True if the level has transformer blocks.
    **options: options to add or replace.
  """
  down, up = ([f"{'CrossAttn' if has else ''}{name}Block2D" for has in attention] for name in ("Down", "Up"))
  small = {"layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 24, "attention_head_dim": 4}
  return {"down_block_types": down, "up_block_types": up[::-1], "block_out_channels": (32, 64, 64)[: len(down)]} | (
    small | options
  )


SIZES = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
# The height and width of the data, and the options. Together they have each kind of block of the published models.
CONFIGS = {
  "Stable Diffusion 1": ((8, 12), blocks(True, False, layers_per_block=2)),
  "Stable Diffusion 2": (
    (8, 8),
    blocks(
      True, False, use_linear_projection=True, attention_head_dim=[2, 4], norm_num_groups=32, upcast_attention=True
    ),
  ),
  "Stable Diffusion XL": (
    (8, 12),
    blocks(
      False,
      True,
      True,
      use_linear_projection=True,
      attention_head_dim=[2, 4, 8],
      transformer_layers_per_block=[1, 1, 2],
      projection_class_embeddings_input_dim=20 + 6 * 8,
      **SIZES,
    ),
  ),
  "refiner": (
    (4, 4),
    blocks(
      False,
      True,
      False,
      use_linear_projection=True,
      transformer_layers_per_block=2,
      projection_class_embeddings_input_dim=20 + 5 * 8,
      **SIZES,
    ),
  ),
  "inpainting, odd sides": ((13, 7), blocks(True, False, in_channels=9)),
  "editing, classes and guidance embedded": (
    (7, 8),
    blocks(
      True,
      True,
      in_channels=8,
      flip_sin_to_cos=False,
      freq_shift=1,
      time_cond_proj_dim=6,
      num_class_embeds=5,
      center_input_sample=True,
    ),
  ),
  "vectors": (
    (8, 8),
    blocks(True, class_embed_type="projection", projection_class_embeddings_input_dim=9, norm_eps=1e-3),
  ),
  "classes embedded as time": ((5, 5), blocks(True, class_embed_type="timestep", time_embedding_dim=48)),
}
# A mask of tokens for one of the networks.
MASKED = "classes embedded as time"
MASK = np.array([[True, True, False, True, False], [False, False, True, True, True]])
BATCH, TOKENS = 2, 5


def random_peer(changes, seed=0):
  """Return a `UNet2DConditionModel` with all parameters random, even biases and norms."""
  torch.manual_seed(seed)
  peer = UNet2DConditionModel(**changes).eval()
  with torch.no_grad():
    for parameter in peer.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  return peer


def inputs_of(config, size, seed=1):
  """Return a dict from the names of our network's arguments to random values.

  The key "weight" has a random weight for each value of the output.
  """
  rng = np.random.default_rng(seed)
  inputs = {"tokens": rng.standard_normal((BATCH, TOKENS, config.cross_attention_dim))}
  if config.num_class_embeds:
    inputs["classes"] = rng.integers(0, config.num_class_embeds, BATCH)
  total = config.projection_class_embeddings_input_dim
  if config.addition_embed_type:
    count = (total - 20) // config.addition_time_embed_dim
    inputs |= {"vector": rng.standard_normal((BATCH, 20)), "sizes": rng.integers(0, 1024, (BATCH, count))}
  elif config.class_embed_type == "projection":
    inputs["vector"] = rng.standard_normal((BATCH, total))
  elif config.class_embed_type == "timestep":
    inputs["vector"] = rng.uniform(0, 999, BATCH)
  if config.time_cond_proj_dim:
    inputs["guidance"] = rng.standard_normal((BATCH, config.time_cond_proj_dim))
  if config.in_channels > 4:
    inputs["image"] = rng.standard_normal((BATCH, *size, config.in_channels - 4))
  inputs["x"], inputs["time"] = rng.standard_normal((BATCH, *size, 4)), np.array([3.0, 977.0])
  inputs["weight"] = rng.standard_normal((BATCH, *size, config.out_channels))
  return {name: value.astype(np.int32 if value.dtype.kind == "i" else np.float32) for name, value in inputs.items()}


def as_torch(value):
  return torch.tensor(np.moveaxis(value, -1, 1) if value.ndim == 4 else value)


def run_peer(peer, inputs, mask=None):
  """Return a dict of the peer's output and gradients.

  The keys are "output" and the names of all float inputs except "time" and "weight". Each gradient is the gradient of
  sum(output * weight) with respect to one input.
  """
  t = {name: as_torch(value).requires_grad_(value.dtype == np.float32) for name, value in inputs.items()}
  x = t["x"] if "image" not in t else torch.cat([t["x"], t["image"]], 1)
  added = {"text_embeds": t["vector"], "time_ids": t["sizes"]} if "sizes" in t else None
  labels = t["classes"].long() if "classes" in t else None if added else t.get("vector")
  output = peer(
    x,
    t["time"].detach(),
    t["tokens"],
    class_labels=labels,
    timestep_cond=t.get("guidance"),
    added_cond_kwargs=added,
    encoder_attention_mask=None if mask is None else torch.tensor(mask),
  ).sample
  (output * t["weight"].detach()).sum().backward()
  gradients = {name: value.grad for name, value in t.items() if value.grad is not None}
  return {
    name: np.moveaxis(value.numpy(), 1, -1) if value.ndim == 4 else value.numpy()
    for name, value in {"output": output.detach(), **gradients}.items()
  }


def run_ours(network, params, inputs, names, mask=None):
  """Return a dict like `run_peer` for our network, with gradients for the inputs `names`."""

  @jax.jit
  def run(params, inputs):
    def loss(values):
      given = inputs | values
      x, time, weight, tokens = (given.pop(name) for name in ("x", "time", "weight", "tokens"))
      tokens = tokens if mask is None else {"states": tokens, "mask": mask}
      output = network.apply({"params": params}, x, time, tokens, **given)
      return jnp.sum(output * weight), output

    gradients, output = jax.grad(loss, has_aux=True)({name: inputs[name] for name in names})
    return {"output": output, **gradients}

  return run(params, dict(inputs))


def assert_same_values(network, params, peer, inputs, mask=None):
  """Assert that outputs and gradients differ by at most 1e-4 of their scale."""
  theirs = run_peer(peer, inputs, mask)
  ours = run_ours(network, params, inputs, [name for name in theirs if name != "output"], mask)
  assert {"output", "x", "tokens"} <= theirs.keys()
  for name, expected in theirs.items():
    assert ours[name].shape == expected.shape
    np.testing.assert_allclose(ours[name], expected, atol=1e-4 * np.std(expected), rtol=0, err_msg=name)


@functools.cache
def peer_of(name):
  """Return the model of CONFIGS[name] in diffusers.

  All tests share the model and must not change it.
  """
  return random_peer(CONFIGS[name][1])


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_input_gradients_match_the_peer(name, tmp_path):
  peer = peer_of(name)
  peer.save_pretrained(tmp_path)
  network, params = interop.diffusers.load_network(tmp_path)
  inputs = inputs_of(peer.config, CONFIGS[name][0])
  assert_same_values(network, params, peer, inputs, MASK if name == MASKED else None)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_configs_are_read_back_unchanged(name):
  size, peer = CONFIGS[name][0], peer_of(name)
  network = unet2d_condition.from_config(peer.config)
  again = unet2d_condition.to_config(network, unet2d_condition.template(network, peer.config.in_channels), size)
  assert unet2d_condition.from_config(again) == network
  shapes = {key: value.shape for key, value in UNet2DConditionModel(**again).state_dict().items()}
  assert shapes == {key: value.shape for key, value in peer.state_dict().items()}


XL = {
  "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
  "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
  "block_out_channels": (320, 640, 1280),
  "attention_head_dim": (5, 10, 20),
  "transformer_layers_per_block": (1, 2, 10),
  "cross_attention_dim": 2048,
  "use_linear_projection": True,
  "addition_embed_type": "text_time",
  "addition_time_embed_dim": 256,
  "projection_class_embeddings_input_dim": 2816,
}
PUBLISHED = {
  "Stable Diffusion 1.5": ({"cross_attention_dim": 768}, 859_520_964),
  "Stable Diffusion 1.5, inpainting": ({"cross_attention_dim": 768, "in_channels": 9}, 859_535_364),
  "Stable Diffusion 2.1": (
    {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    865_910_724,
  ),
  "Stable Diffusion XL": (XL, 2_567_463_684),
  "Stable Diffusion XL, refiner": (
    XL
    | {
      "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
      "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
      "block_out_channels": (384, 768, 1536, 1536),
      "attention_head_dim": (6, 12, 24, 24),
      "transformer_layers_per_block": 4,
      "cross_attention_dim": 1280,
      "projection_class_embeddings_input_dim": 2560,
    },
    2_259_526_660,
  ),
}


@functools.cache
def published(name):
  """Return the network of a published model, the shapes of its parameters, and the shapes of diffusers' tensors."""
  changes, _ = PUBLISHED[name]
  with torch.device("meta"):
    peer = UNet2DConditionModel(**changes)
  network = unet2d_condition.from_config(peer.config)
  shapes = {key: tuple(value.shape) for key, value in peer.state_dict().items()}
  return network, unet2d_condition.template(network, peer.config.in_channels), shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_the_names_and_shapes_of_the_peer(name):
  network, template, expected = published(name)
  layout = unet2d_condition.layout(network)
  shapes = {
    layout.name_of(path): layout.shape_of(path, tuple(leaf.shape))
    for path, leaf in interop.tensors.flatten(template).items()
  }
  assert shapes == expected
  assert sum(leaf.size for leaf in jax.tree.leaves(template)) == PUBLISHED[name][1]


def test_defaults_are_those_of_the_class():
  with torch.device("meta"):
    config = UNet2DConditionModel().config
  defaults = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items() if key[0] != "_"}
  assert defaults == unet2d_condition.DEFAULTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Write a model that all tests share and must not change."""
  folder = tmp_path_factory.mktemp("unet") / "model"
  _, changes = CONFIGS["Stable Diffusion 2"]
  random_peer(changes | {"sample_size": 8}).save_pretrained(folder)
  return folder


@pytest.fixture
def copy(folder, tmp_path):
  return shutil.copytree(folder, tmp_path / "copy")


def rewrite(folder, change, name=WEIGHTS):
  """Replace the weights of a folder by `change(weights)`, and save them in the file `name`."""
  state = safetensors.torch.load_file(folder / WEIGHTS)
  (folder / WEIGHTS).unlink()
  safetensors.torch.save_file(change(state), folder / name, {"format": "pt"})


def halve(state):
  return {name: value.half() for name, value in state.items()}


def to_shards(folder):
  UNet2DConditionModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="200KB")
  (folder / WEIGHTS).unlink(missing_ok=True)
  assert len(list(folder.glob("*-of-*"))) > 2


def to_pipeline(folder):
  (folder / "unet").mkdir()
  for file in (WEIGHTS, "config.json"):
    (folder / file).rename(folder / "unet" / file)


def remove_defaults(folder):
  config = json.loads((folder / "config.json").read_text())
  kept = {key: value for key, value in config.items() if value != unet2d_condition.DEFAULTS.get(key, ())}
  assert "norm_eps" not in kept
  (folder / "config.json").write_text(json.dumps(kept))


FORMS = {
  "variant": lambda folder: rewrite(folder, halve, "diffusion_pytorch_model.fp16.safetensors"),
  "shards": to_shards,
  "part of a pipeline": to_pipeline,
  "missing keys": remove_defaults,
}


def assert_same(tree, other):
  jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), tree, other)


def test_settings_of_an_average_of_parameters_are_ignored(copy):
  """diffusers' EMAModel writes its settings to the config of the network."""
  config = json.loads((copy / "config.json").read_text())
  average = {"decay": 0.9999, "min_decay": 0.0, "optimization_step": 500, "update_after_step": 0, "power": 0.75}
  (copy / "config.json").write_text(json.dumps(config | average | {"use_ema_warmup": True, "inv_gamma": 1.0}))
  interop.network_folders.read_network(copy)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_folder_gives_the_same_network(form, folder, copy):
  FORMS[form](copy)
  (network, params), (other, same) = interop.diffusers.load_network(folder), interop.diffusers.load_network(copy)
  assert network == other
  compare = functools.partial(np.testing.assert_allclose, atol=1e-3 if form == "variant" else 0, rtol=0)
  jax.tree.map(compare, same, params)


def test_a_variant_is_chosen_by_its_name(folder, copy):
  safetensors.torch.save_file(
    halve(safetensors.torch.load_file(copy / WEIGHTS)), copy / "diffusion_pytorch_model.fp16.safetensors"
  )
  _, params = interop.diffusers.load_network(copy)
  assert_same(params, interop.diffusers.load_network(folder)[1])
  _, half = interop.diffusers.load_network(copy, variant="fp16")
  assert_same(half, jax.tree.map(lambda leaf: leaf.astype(jnp.float16).astype(jnp.float32), params))
  with pytest.raises(ValueError, match="no weights of the variant 'fp8'"):
    interop.diffusers.load_network(copy, variant="fp8")
  with pytest.raises(ValueError, match=r"variant='\.\./x'; expected a word"):
    interop.diffusers.load_network(copy, variant="../x")


@pytest.mark.parametrize(
  "name", ["Stable Diffusion 1", "Stable Diffusion XL", "editing, classes and guidance embedded"]
)
def test_round_trips_are_exact(name, tmp_path):
  size, changes = CONFIGS[name]
  peer = random_peer(changes | {"sample_size": 32})
  peer.save_pretrained(tmp_path / "a")
  network, params = interop.diffusers.load_network(tmp_path / "a")
  interop.diffusers.save_network(tmp_path / "b", network, params, (32, 32))
  first, second = (json.loads((tmp_path / part / "config.json").read_text()) for part in "ab")
  assert second == {key: first[key] for key in second}
  again = UNet2DConditionModel.from_pretrained(tmp_path / "b").eval()
  for key, value in peer.state_dict().items():
    assert torch.equal(value, again.state_dict()[key])
  inputs = inputs_of(peer.config, size)
  np.testing.assert_array_equal(run_peer(peer, inputs)["output"], run_peer(again, inputs)["output"])
  other, same = interop.diffusers.load_network(tmp_path / "b")
  assert other == network
  assert_same(same, params)


def test_bfloat16_halves_the_parameters_and_is_close(folder):
  (network, params), (half, less) = (
    interop.diffusers.load_network(folder, dtype=name) for name in ("float32", "bfloat16")
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(less)} == {np.dtype(jnp.bfloat16)}
  rng = np.random.default_rng(0)
  x, tokens = rng.standard_normal((1, 8, 8, 4)), rng.standard_normal((1, 3, 24))
  first, second = (
    jax.jit(lambda p, n=n: n.apply({"params": p}, x.astype(np.float32), jnp.ones(1), tokens.astype(np.float32)))(p)
    for n, p in ((network, params), (half, less))
  )
  assert first.dtype == second.dtype == jnp.float32
  np.testing.assert_allclose(second, first, atol=0.1 * np.std(first))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"_class_name": "UNet2DModel"}, "class UNet2DModel; expected UNet2DConditionModel"),
    ({"num_attention_heads": 8}, "num_attention_heads=8, which is not supported; expected None"),
    ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type='UNetMidBlock2DSimpleCrossAttn'"),
    ({"mid_block_type": None}, "mid_block_type=None"),
    ({"only_cross_attention": [True, False]}, r"only_cross_attention=\[True, False\]"),
    ({"dual_cross_attention": True}, "dual_cross_attention=True"),
    ({"act_fn": "gelu"}, "act_fn='gelu'"),
    ({"norm_num_groups": None}, "norm_num_groups=None; expected an integer"),
    ({"encoder_hid_dim": 512}, "encoder_hid_dim=512"),
    ({"addition_embed_type": "image"}, "addition_embed_type='image'"),
    ({"addition_embed_type": "text_time"}, "without projection_class_embeddings_input_dim"),
    (SIZES | {"projection_class_embeddings_input_dim": 8}, "expected the first to be larger"),
    (
      SIZES | {"projection_class_embeddings_input_dim": 80, "class_embed_type": "projection"},
      "class_embed_type='projection', which is not supported; expected null beside",
    ),
    ({"class_embed_type": "simple_projection"}, "class_embed_type='simple_projection'"),
    ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift='scale_shift'"),
    ({"downsample_padding": 0}, "downsample_padding=0"),
    ({"conv_in_kernel": 1}, "conv_in_kernel=1"),
    ({"attention_type": "gated"}, "attention_type='gated'"),
    ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
    ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "down_block_types='AttnDownBlock2D'"),
    ({"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, "attention at the same levels as down_block_types"),
    ({"up_block_types": ["UpBlock2D"]}, "1 values of up_block_types and 2 block_out_channels"),
    ({"attention_head_dim": [4]}, "1 values of attention_head_dim and 2 block_out_channels"),
    ({"attention_head_dim": 5}, "heads=5"),
    ({"layers_per_block": [1, 2]}, r"layers_per_block=\[1, 2\], which is not supported; expected the same number"),
    ({"cross_attention_dim": [24, 32]}, r"cross_attention_dim=\[24, 32\]"),
    (
      {"transformer_layers_per_block": [[1], [2]]},
      r"transformer_layers_per_block=\[\[1\], \[2\]\]; expected an integer",
    ),
    (
      {"transformer_layers_per_block": [1, 2], "reverse_transformer_layers_per_block": [1, 2]},
      r"reverse_transformer_layers_per_block=\[1, 2\], which is not supported; expected null or \[2, 1\]",
    ),
    ({"use_magic": 3}, "use_magic=3"),
    ({"in_channels": 0}, "in_channels=0; expected at least 1"),
    ({"sample_size": [8]}, r"sample_size=\[8\]; expected one number"),
    ({"dropout": "0"}, "dropout='0'; expected a finite number"),
  ],
)
def test_unsupported_options_are_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=message):
    unet2d_condition.from_config(blocks(True, False) | changes)


def test_values_of_wrong_types_are_errors_that_name_the_file(copy):
  accepted = {}
  for key, value, message in try_wrong_values(copy, "config.json", lambda: interop.network_folders.read_network(copy)):
    if message is None:
      accepted.setdefault(key, []).append(value)
    else:
      assert f"{copy / 'config.json'}" in message, (key, value, message)
  nullable = {key for key, value in unet2d_condition.DEFAULTS.items() if value is None} | {"upcast_attention"}
  allowed = {key: [None] for key in nullable} | {"freq_shift": [-1, -0.5]}
  for key in ("flip_sin_to_cos", "center_input_sample", "use_linear_projection", "upcast_attention"):
    allowed[key] = [*allowed.get(key, []), True]
  # Keys that have no effect on this model.
  idle = ("addition_embed_type_num_heads", "_name_or_path")
  extra = {key: [v for v in values if v not in allowed.get(key, [])] for key, values in accepted.items()}
  assert {key: values for key, values in extra.items() if values and key not in idle} == {}


def test_weights_that_do_not_match_are_described(copy):
  rewrite(copy, lambda state: {name: value for name, value in state.items() if name != "conv_out.bias"})
  with pytest.raises(ValueError, match=r"1 missing: conv_out\.bias"):
    interop.diffusers.load_network(copy)


@pytest.mark.parametrize(
  ("options", "size", "message"),
  [
    ({"groups": 0, "channels": 32}, (8, 8), "groups=0"),
    ({"positions": True}, (8, 8), "positions=True; expected positions=False"),
    ({}, None, "an empty folder|not an empty folder"),
  ],
)
def test_networks_that_cannot_be_saved_are_errors(options, size, message, tmp_path):
  network = ConditionalUNet(context_features=8, multipliers=(1,), blocks=1, attention_levels=(), **options)
  params = random_like(unet2d_condition.template(network.clone(groups=32), 4))
  if size is None:
    (tmp_path / "file").write_text("mine")
  with pytest.raises(ValueError, match=message):
    interop.diffusers.save_network(tmp_path, network, params, size)


def test_another_network_needs_a_size(tmp_path):
  random_unet({}).save_pretrained(tmp_path / "a")
  network, params = interop.diffusers.load_network(tmp_path / "a")
  with pytest.raises(ValueError, match=r"no size for a networks\.UNet"):
    interop.diffusers.save_network(tmp_path / "b", network, params)
  interop.diffusers.save_network(tmp_path / "b", network, params, (16, 16))
  other, same = interop.diffusers.load_network(tmp_path / "b")
  assert other == network
  assert_same(same, params)
