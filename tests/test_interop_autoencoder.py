"""Compare our autoencoder with diffusers' `AutoencoderKL` on random weights, and test reading and writing folders.

The folders have the format of diffusers.
"""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch

import ddpm_jax
from ddpm_jax import interop, sampling
from ddpm_jax.interop import autoencoder_kl
from ddpm_jax.networks import Autoencoder
from ddpm_jax.storage import images
from tests.conftest import ROOT
from tests.parameters import random_like
from tests.test_interop_unet import DOWN, levels, random_unet

WEIGHTS = "diffusion_pytorch_model.safetensors"


def options(*widths, **changes):
  """Return the options of a small AutoencoderKL whose levels have `widths` features."""
  return {
    "block_out_channels": widths,
    "down_block_types": ("DownEncoderBlock2D",) * len(widths),
    "up_block_types": ("UpDecoderBlock2D",) * len(widths),
    "norm_num_groups": 4,
  } | changes


# The shape of the data [B, H, W], and the options.
CONFIGS = {
  "defaults of the class": ((2, 6, 6), {}),
  "stable diffusion": ((1, 16, 16), options(8, 16, 16, layers_per_block=2, norm_num_groups=8)),
  "16 channels without convolutions": (
    (2, 8, 8),
    options(8, 16, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
  ),
  "odd sizes": ((1, 40, 56), options(8, 16, 16, latent_channels=8)),
  "an odd number of halves": ((1, 10, 6), options(8, 8)),
  "no attention": ((2, 8, 8), options(8, 16, mid_block_add_attention=False, act_fn="swish")),
  "one convolution": ((1, 8, 8), options(8, 12, use_post_quant_conv=False, latent_channels=32)),
  "the other convolution": ((1, 8, 8), options(12, 8, use_quant_conv=False, latent_channels=1)),
  "gray": ((1, 8, 8), options(8, 16, in_channels=1, out_channels=1)),
}


def random_peer(changes, seed=0):
  """Return an AutoencoderKL with random parameters, including random parameters of its normalization layers."""
  torch.manual_seed(seed)
  peer = diffusers.AutoencoderKL(**changes)
  with torch.no_grad():
    for name, parameter in peer.named_parameters():
      if "norm" in name:
        parameter.copy_(torch.randn(parameter.shape) * 0.3 + (1 if name.endswith("weight") else 0))
  return peer.eval()


def write(folder, changes=None, seed=0):
  """Write an AutoencoderKL with random parameters, and return it with its folder."""
  peer = random_peer(options(8, 16) if changes is None else changes, seed)
  peer.save_pretrained(folder)
  return peer, folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Return the folder of an autoencoder that all tests share and must not change."""
  return write(tmp_path_factory.mktemp("vae") / "model")[1]


@pytest.fixture
def copy(folder, tmp_path):
  return shutil.copytree(folder, tmp_path / "copy")


def as_torch(x):
  return torch.tensor(np.moveaxis(np.asarray(x), -1, 1))


def as_numpy(x):
  return np.moveaxis(x.detach().numpy(), 1, -1)


def assert_close(ours, theirs, tolerance=1e-5):
  """Assert that arrays differ by at most `tolerance` times the largest absolute value of the second array."""
  theirs = np.asarray(theirs)
  assert ours.shape == theirs.shape
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@functools.cache
def ours_of(network):
  """Return a compiled function of (params, x, z) that returns (gradients, (encoder output, decoder output)).

  A scalar depends on both outputs, and `gradients` has its gradients with respect to params, x and z.
  """

  def scalar(params, x, z):
    moments = network.apply({"params": params}, x, method="encode")
    data = network.apply({"params": params}, z, method="decode")
    return jnp.mean(jnp.sin(3 * moments)) + jnp.mean(jnp.sin(3 * data)), (moments, data)

  return jax.jit(jax.grad(scalar, (0, 1, 2), has_aux=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_match_diffusers(name, tmp_path):
  shape, changes = CONFIGS[name]
  peer, _ = write(tmp_path, changes)
  codec, frozen = interop.diffusers.load_codec(tmp_path)
  network, params = codec.module, frozen["autoencoder"]
  generator = np.random.default_rng(0)
  x = generator.uniform(-1, 1, (*shape, network.out_channels)).astype(np.float32)
  sides = [side // network.downsampling for side in shape[1:]]
  z = generator.normal(size=(shape[0], *sides, network.latent_channels)).astype(np.float32)
  (params_gradient, *gradients), (moments, data) = ours_of(network)(params, x, z)

  their_x, their_z = (as_torch(value).requires_grad_() for value in (x, z))
  their_moments = peer.encode(their_x).latent_dist.parameters
  their_data = peer.decode(their_z).sample
  (torch.sin(3 * their_moments).mean() + torch.sin(3 * their_data).mean()).backward()
  assert_close(moments, as_numpy(their_moments))
  assert_close(data, as_numpy(their_data))
  for ours, theirs in zip(gradients, (their_x, their_z), strict=True):
    assert_close(ours, as_numpy(theirs.grad), 1e-4)
  layout = autoencoder_kl.layout(len(network.multipliers))
  flat, theirs = interop.tensors.flatten(params_gradient), dict(peer.named_parameters())
  assert len(flat) == len(theirs)
  largest = max(float(value.grad.abs().max()) for value in theirs.values())
  for path, gradient in flat.items():
    expected = theirs[layout.name_of(path)].grad.numpy()
    np.testing.assert_allclose(
      interop.tensors.to_torch(path, np.asarray(gradient)), expected, rtol=0, atol=1e-4 * largest
    )


@pytest.mark.parametrize(("channels", "convolutions", "count"), [(4, True, 83_653_863), (16, False, 83_819_683)])
def test_published_networks_have_their_number_of_parameters(channels, convolutions, count):
  config = options(128, 256, 512, 512, layers_per_block=2, norm_num_groups=32, latent_channels=channels)
  config |= {"use_quant_conv": convolutions, "use_post_quant_conv": convolutions}
  network = autoencoder_kl.from_config(config)
  expected = {"latent_channels": channels, "quant_conv": convolutions, "post_quant_conv": convolutions}
  assert network == Autoencoder(**expected)
  shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_the_codec_scales_latents_like_diffusers(tmp_path):
  peer, _ = write(tmp_path, options(8, 16, scaling_factor=1.5305, shift_factor=0.0609))
  x = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
  codec, frozen = interop.diffusers.load_codec(tmp_path, posterior="mode")
  assert codec.shape((8, 8, 3)) == (4, 4, 4)
  latents = as_numpy((peer.encode(as_torch(x)).latent_dist.mode() - 0.0609) * 1.5305)
  encoded = codec.encode(frozen, jax.random.key(0), x)
  assert_close(encoded, latents)
  assert_close(codec.decode(frozen, encoded), as_numpy(peer.decode(as_torch(latents) / 1.5305 + 0.0609).sample))
  # The noise of a sample has the posterior's standard deviation.
  codec, _ = interop.diffusers.load_codec(tmp_path)
  keys = jax.random.split(jax.random.key(0), 2)
  sample, same = codec.encode(frozen, keys, x), codec.encode(frozen, keys[1:], x[1:])
  assert_close(same[0], sample[1])
  noise = (np.asarray(sample) - latents) / 1.5305 / as_numpy(peer.encode(as_torch(x)).latent_dist.std)
  assert 0.5 < noise.std() < 1.5


def test_a_mean_and_a_standard_deviation_per_channel_are_read_and_written(tmp_path):
  mean, std = [0.1, -0.2, 0.3, 0.4], [1.5, 0.7, 2.0, 3.3]
  peer, _ = write(tmp_path / "a", options(8, 16, scaling_factor=0.5, latents_mean=mean, latents_std=std))
  codec, frozen = interop.diffusers.load_codec(tmp_path / "a")
  np.testing.assert_allclose(frozen["scale"], 0.5 / np.array(std), rtol=1e-6)
  np.testing.assert_allclose(frozen["shift"], mean, rtol=1e-6)
  resave(codec, frozen, tmp_path / "b")
  assert_same(interop.diffusers.load_codec(tmp_path / "b")[1], frozen)
  config = diffusers.AutoencoderKL.from_pretrained(tmp_path / "b").config
  np.testing.assert_allclose(np.array(config.latents_std) / config.scaling_factor, np.array(std) / 0.5, rtol=1e-6)


def resave(codec, frozen, path, **changes):
  params, scale, shift = (frozen[name] for name in ("autoencoder", "scale", "shift"))
  interop.diffusers.save_codec(path, codec.module, params, **{"scale": scale, "shift": shift} | changes)


def assert_same(tree, other):
  jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), tree, other)


@pytest.mark.parametrize("name", ["stable diffusion", "16 channels without convolutions", "no attention"])
def test_round_trips_are_exact(name, tmp_path):
  shape, changes = CONFIGS[name]
  peer, _ = write(tmp_path / "a", changes | {"sample_size": 64, "scaling_factor": 0.3611, "shift_factor": 0.1159})
  codec, frozen = interop.diffusers.load_codec(tmp_path / "a")
  resave(codec, frozen, tmp_path / "b", size=(64, 64))
  first, second = (json.loads((tmp_path / part / "config.json").read_text()) for part in "ab")
  assert {**second, "act_fn": first["act_fn"]} == {key: first[key] for key in second}
  again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "b")
  for key, value in peer.state_dict().items():
    assert torch.equal(value, again.state_dict()[key])
  x = torch.randn(shape[0], 3, *shape[1:], generator=torch.Generator().manual_seed(0))
  assert torch.equal(peer.encode(x).latent_dist.mode(), again.encode(x).latent_dist.mode())
  other, same = interop.diffusers.load_codec(tmp_path / "b")
  assert other.module == codec.module
  assert_same(same, frozen)


def rewrite(folder, change):
  """Replace the weights of a folder by `change(weights)`."""
  state = safetensors.torch.load_file(folder / WEIGHTS)
  safetensors.torch.save_file(change(state), folder / WEIGHTS, {"format": "pt"})


def to_legacy(state):
  names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

  def old(name):
    for new, legacy in names.items():
      name = name.replace(f".{new}.", f".{legacy}.")
    return name

  return {old(name): value for name, value in state.items()}


def to_variant(copy):
  rewrite(copy, lambda state: {name: value.half() for name, value in state.items()})
  (copy / WEIGHTS).rename(copy / "diffusion_pytorch_model.fp16.safetensors")


def to_shards(copy):
  diffusers.AutoencoderKL.from_pretrained(copy).save_pretrained(copy, max_shard_size="20KB")
  (copy / WEIGHTS).unlink(missing_ok=True)
  assert len(list(copy.glob("*-of-*"))) > 2


def to_pickle(copy):
  torch.save(safetensors.torch.load_file(copy / WEIGHTS), copy / "diffusion_pytorch_model.bin")
  (copy / WEIGHTS).unlink()


def to_pipeline_part(copy, name="vae"):
  part = copy / name
  part.mkdir()
  for file in (WEIGHTS, "config.json"):
    (copy / file).rename(part / file)


def remove_default_keys(copy):
  config = json.loads((copy / "config.json").read_text())
  kept = {key: value for key, value in config.items() if value != autoencoder_kl.DEFAULTS.get(key, ())}
  assert "scaling_factor" not in kept
  (copy / "config.json").write_text(json.dumps(kept))


FORMS = {
  "legacy names": lambda copy: rewrite(copy, to_legacy),
  "variant": to_variant,
  "shards": to_shards,
  "pickled tensors": to_pickle,
  "part of a pipeline": to_pipeline_part,
  "missing keys": remove_default_keys,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_folder_gives_the_same_codec(form, folder, copy):
  FORMS[form](copy)
  (codec, frozen), (other, same) = interop.diffusers.load_codec(folder), interop.diffusers.load_codec(copy)
  assert codec.module == other.module
  compare = functools.partial(np.testing.assert_allclose, atol=1e-3 if form == "variant" else 0, rtol=0)
  jax.tree.map(compare, same, frozen)


def test_shapes_are_known_without_reading_the_weights(copy):
  (copy / WEIGHTS).unlink()
  codec = interop.diffusers.read_codec(copy, dtype="bfloat16")
  assert codec.shape((16, 8, 3)) == (8, 4, 4)
  shapes = codec.load.shapes()
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes["autoencoder"])} == {np.dtype(jnp.bfloat16)}
  with pytest.raises(ValueError, match="contains no weights"):
    codec.load()


def test_bfloat16_halves_the_parameters_and_is_close(folder):
  x = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
  (codec, frozen), (half, less) = (
    interop.diffusers.load_codec(folder, posterior="mode", dtype=dtype) for dtype in ("float32", "bfloat16")
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(less["autoencoder"])} == {np.dtype(jnp.bfloat16)}
  jax.tree.map(lambda leaf, shape: (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype), less, half.load.shapes())
  expected = codec.encode(frozen, jax.random.key(0), x)
  assert_close(half.encode(less, jax.random.key(0), x), expected, 0.05)


def set_config(**changes):
  def change(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))

  return change


def pickle_code(copy):
  (copy / WEIGHTS).unlink()
  torch.save({"state_dict": subprocess.run}, copy / "diffusion_pytorch_model.bin")


BROKEN = {
  "a missing tensor": (
    lambda copy: rewrite(copy, lambda s: {name: value for name, value in s.items() if name != "quant_conv.bias"}),
    "1 missing: quant_conv.bias",
  ),
  "an extra tensor": (
    lambda copy: rewrite(copy, lambda s: s | {"decoder.conv_out.extra": torch.ones(1)}),
    "1 extra: decoder.conv_out.extra",
  ),
  "a tensor that is not finite": (
    lambda copy: rewrite(copy, lambda s: s | {"quant_conv.bias": s["quant_conv.bias"] * float("nan")}),
    "not finite in float32: quant_conv.bias",
  ),
  "code": (pickle_code, "which needs code to load, and code in a file never runs here"),
  "the tiny autoencoder": (
    set_config(_class_name="AutoencoderTiny"),
    "Got an autoencoder of class AutoencoderTiny; expected AutoencoderKL",
  ),
  "a vector-quantized one": (set_config(_class_name="VQModel"), "Got an autoencoder of class VQModel"),
  "other blocks": (
    set_config(down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
    "down_block_types='AttnDownEncoderBlock2D', which is not supported; expected DownEncoderBlock2D",
  ),
  "too few blocks": (set_config(up_block_types=["UpDecoderBlock2D"]), "1 up_block_types and 2 block_out_channels"),
  "another activation": (set_config(act_fn="relu"), "act_fn='relu', which is not supported; expected silu or swish"),
  "other input channels": (set_config(in_channels=4), "in_channels=4, which is not supported; expected 3"),
  "an unknown option": (set_config(use_magic=True), "use_magic=True, which is not supported"),
  "no channels": (set_config(latent_channels=0), "latent_channels=0; expected at least 1"),
  "groups that do not divide": (
    set_config(norm_num_groups=3),
    "with groups=3; expected an integer divisible by groups",
  ),
  "no scale": (set_config(scaling_factor=0), "scaling_factor=0 and latents_std=None; expected a factor other than 0"),
  "a scale that is no number": (set_config(scaling_factor="1"), "scaling_factor='1'; expected a finite number"),
  "too few means": (set_config(latents_mean=[0.0]), "with 1 latents_mean; expected 4"),
  "two shifts": (
    set_config(latents_mean=[0.0] * 4, shift_factor=1.0),
    "shift_factor and latents_mean; expected at most",
  ),
  "no config": (lambda copy: (copy / "config.json").unlink(), "has no config.json of an autoencoder"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_clear_error(name, copy):
  change, message = BROKEN[name]
  change(copy)
  with pytest.raises(ValueError, match=message):
    interop.diffusers.load_codec(copy)


def test_wrong_arguments_are_errors(folder, tmp_path):
  codec, frozen = interop.diffusers.load_codec(folder)
  with pytest.raises(ValueError, match="Got dtype='float16'; expected 'float32' or 'bfloat16'"):
    interop.diffusers.read_codec(folder, dtype="float16")
  with pytest.raises(ValueError, match="Got data of 9x8 for a network with 2 levels"):
    interop.diffusers.read_codec(folder, data_shape=(9, 8, 3))
  with pytest.raises(ValueError, match="posterior"):
    interop.diffusers.read_codec(folder, posterior="median")
  with pytest.raises(
    ValueError, match="Got data of 9x8 for a network with 2 levels; expected every side divisible by 2"
  ):
    codec.encode(frozen, jax.random.key(0), jnp.zeros((1, 9, 8, 3)))
  with pytest.raises(ValueError, match="out_channels=3; expected 3 channels"):
    codec.encode(frozen, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
  for scale in (0.0, [1.0, 2.0], float("nan")):
    with pytest.raises(ValueError, match="Got scale=.*expected one finite number, or 4"):
      resave(codec, frozen, tmp_path / "b", scale=scale)
  for changes in ({"dimensions": 1}, {"bottleneck": "vq", "num_codes": 4}, {"epsilon": 1e-5}, {"groups": 0}):
    with pytest.raises(ValueError, match=f"Got an autoencoder with {next(iter(changes))}="):
      resave(codec._replace(module=codec.module.clone(**changes)), frozen, tmp_path / "b")
  assert not (tmp_path / "b").exists()
  with pytest.raises(ValueError, match="which is not an empty folder"):
    resave(codec, frozen, folder)


MEASURE = """
import sys
import jax
from ddpm_jax import interop

def status(key):
  return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

small, large, dtype = sys.argv[1:]
# Load a small network first, so that the memory of JAX and other libraries does not count.
jax.block_until_ready(interop.diffusers.load_codec(small, dtype=dtype)[1])
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
_, frozen = interop.diffusers.load_codec(large, dtype=dtype)
jax.block_until_ready(frozen)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_needs_little_more_memory_than_the_parameters(dtype, folder, tmp_path):
  network = Autoencoder(channels=96)
  shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
  interop.diffusers.save_codec(tmp_path, network, jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes))
  command = [sys.executable, "-c", MEASURE, folder, tmp_path, dtype]
  output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
  sizes = [leaf.size * (2 if dtype == "bfloat16" else 4) for leaf in jax.tree.leaves(shapes)]
  allowed = 1.3 * sum(sizes) + 4 * max(leaf.size for leaf in jax.tree.leaves(shapes))
  assert int(output.splitlines()[-1]) < allowed


def write_pipeline(folder, part="vqvae", **changes):
  """Write an LDMPipeline with random parameters, and return it."""
  unet = random_unet(
    {"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16,), **levels(DOWN)}
  )
  scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
  peer = random_peer(options(8, 16, **{"scaling_factor": 1.7} | changes))
  pipeline = diffusers.LDMPipeline(vqvae=peer, unet=unet, scheduler=scheduler)
  pipeline.save_pretrained(folder)
  if part != "vqvae":
    (folder / "vqvae").rename(folder / part)
    index = json.loads((folder / "model_index.json").read_text())
    index[part] = index.pop("vqvae")
    (folder / "model_index.json").write_text(json.dumps(index))
  return pipeline


def test_an_ldm_pipeline_is_sampled_and_decoded_like_diffusers(tmp_path, monkeypatch):
  from diffusers.pipelines.deprecated.latent_diffusion_uncond import pipeline_latent_diffusion_uncond as module

  pipeline = write_pipeline(tmp_path / "a", shift_factor=0.5)
  model, params = interop.diffusers.load(tmp_path / "a")
  assert (model.shape, model.data_shape) == ((8, 8, 4), (16, 16, 3))
  frozen = model.load_frozen()
  assert jax.tree.map(jnp.shape, frozen) == jax.tree.map(lambda leaf: leaf.shape, model.frozen_shapes())
  noise = np.random.default_rng(0).normal(size=(3, 8, 8, 4)).astype(np.float32)
  denoise, times = model.denoise(params), model.times(10)
  sampler = sampling.ddim(model.process)

  @jax.jit
  def ours(x, frozen):
    return model.decode(sampling.sample(jax.random.key(0), sampler, denoise, x, times), frozen)

  monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: as_torch(noise))
  pipeline.set_progress_bar_config(disable=True)
  pictures = pipeline(batch_size=3, num_inference_steps=10, output_type="np").images
  result, expected = images.to_uint8(ours(noise, frozen)), np.round(pictures * 255).astype(np.uint8)
  assert np.ptp(expected) > 100, "the pictures are almost uniform"
  assert np.max(np.abs(result.astype(int) - expected.astype(int))) <= 1

  # Save the model, and read it with both libraries.
  interop.diffusers.save(tmp_path / "b", model, params, clip=None)
  again = diffusers.LDMPipeline.from_pretrained(tmp_path / "b")
  assert isinstance(again.vqvae, diffusers.AutoencoderKL)
  for part in ("vqvae", "unet"):
    for name, value in getattr(pipeline, part).state_dict().items():
      assert torch.equal(value, getattr(again, part).state_dict()[name])
  other, same = interop.diffusers.load(tmp_path / "b")
  assert_same((same, other.load_frozen()), (params, frozen))
  assert "LDMPipeline" in (tmp_path / "b" / "README.md").read_text()


def test_a_pipeline_with_a_vae_uses_all_numbers_of_its_config(tmp_path):
  write_pipeline(tmp_path, "vae", shift_factor=0.5)
  model, _ = interop.diffusers.load(tmp_path)
  frozen = model.load_frozen()["codec"]
  assert (float(frozen["scale"]), float(frozen["shift"])) == (np.float32(1.7), 0.5)
  # LDMPipeline has no shift, so saving moves the shift into the weights.
  interop.diffusers.save(tmp_path / "b", *interop.diffusers.load(tmp_path), clip=None)
  peer = diffusers.LDMPipeline.from_pretrained(tmp_path / "b").vqvae
  x = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
  with torch.no_grad():
    expected = peer.decode(as_torch(x) / peer.config.scaling_factor).sample
  expected = np.moveaxis(expected.numpy(), 1, -1)
  np.testing.assert_allclose(model.codec.decode(frozen, x), expected, atol=1e-4 * np.abs(expected).max())


def test_a_latent_pipeline_is_copied_with_its_autoencoder(tmp_path):
  write_pipeline(tmp_path / "a")
  interop.diffusers.copy_config(tmp_path / "a", tmp_path / "b")
  copied, model = (interop.diffusers.read(tmp_path / part) for part in "ba")
  assert copied.shape == model.shape
  assert_same(copied.load_frozen(), model.load_frozen())


def test_wrong_latent_pipelines_are_errors(tmp_path):
  write_pipeline(tmp_path / "a")
  model, params = interop.diffusers.load(tmp_path / "a")
  with pytest.raises(ValueError, match=r"Got clip=1.0 for a latent model; expected None"):
    interop.diffusers.save(tmp_path / "b", model, params)
  for shape in ((16, 16, 4), (15, 16, 3)):
    with pytest.raises(ValueError, match=r"expected \(height, width, 3\) with sides divisible by 2"):
      interop.diffusers.read(tmp_path / "a", shape=shape)
  set_config(latent_channels=3)(tmp_path / "a" / "vqvae")
  with pytest.raises(ValueError, match="Got a network of 4 channels and an autoencoder with latent_channels=3"):
    interop.diffusers.load(tmp_path / "a")
  set_config(_class_name="VQModel")(tmp_path / "a" / "vqvae")
  with pytest.raises(ValueError, match=r"vqvae/config\.json: Got an autoencoder of class VQModel"):
    interop.diffusers.load(tmp_path / "a")
  (tmp_path / "a" / "vqvae" / "config.json").unlink()
  with pytest.raises(ValueError, match=r"lacks vqvae/config\.json, the config of the autoencoder"):
    interop.diffusers.load(tmp_path / "a")


def test_one_line_loads_a_latent_pipeline_with_its_frozen_parameters(tmp_path):
  write_pipeline(tmp_path)
  model, params, frozen = ddpm_jax.load(tmp_path)
  assert_same((params, frozen), (interop.diffusers.load(tmp_path)[1], model.load_frozen()))


def test_a_name_on_the_hub_is_read_from_its_cache(folder, tmp_path, monkeypatch):
  """The test uses the package huggingface_hub offline, with a cache in the format of the hub."""
  import huggingface_hub

  repository = tmp_path / "models--owner--name"
  (repository / "refs").mkdir(parents=True)
  (repository / "refs" / "main").write_text("a" * 40)
  shutil.copytree(folder, repository / "snapshots" / ("a" * 40) / "vae")
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  assert_same(interop.diffusers.load_codec("owner/name")[1], interop.diffusers.load_codec(folder)[1])


@pytest.mark.parametrize("convolutions", [True, False])
def test_a_scale_is_folded_into_the_convolutions_between_the_halves(convolutions):
  options = {"channels": 8, "multipliers": (1, 1), "blocks": 1, "groups": 4, "middle_attention": False}
  network = Autoencoder(**options, quant_conv=convolutions, post_quant_conv=convolutions)
  x = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
  params = random_like(network.init(jax.random.key(0), x)["params"], 0, 0.3)
  scale = autoencoder_kl.Scale(np.float32([0.5, 2, 1, 3]), np.float32([1, -2, 0, 0.3]))
  folded, new = autoencoder_kl.fold_scale(network, params, scale)
  moments, scaled = (one.apply({"params": p}, x, method="encode") for one, p in ((network, params), (folded, new)))
  mean, log_variance = np.split(np.asarray(moments), 2, -1)
  expected = np.concatenate([(mean - scale.shift) * scale.scale, log_variance + 2 * np.log(scale.scale)], -1)
  np.testing.assert_allclose(scaled, expected, atol=2e-5 * np.abs(expected).max())
  decoded = network.apply({"params": params}, mean, method="decode")
  again = folded.apply({"params": new}, expected[..., :4], method="decode")
  np.testing.assert_allclose(again, decoded, atol=2e-5 * np.abs(decoded).max())
