"""Test reading and writing folders in diffusers' format, and the errors for broken folders."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from ddpm_jax import guidance, interop, models, predictions, processes, sampling, schedules
from ddpm_jax.models import codecs
from ddpm_jax.networks import UNet
from tests.conftest import ROOT
from tests.test_interop_unet import random_unet

SHAPE = (5, 8, 8, 3)


def write_pipeline(folder, scheduler=None, **changes):
  """Write a small pipeline with random parameters and changed options, and return its folder."""
  scheduler = scheduler or diffusers.DDPMScheduler()
  diffusers.DDPMPipeline(random_unet({"sample_size": 8} | changes), scheduler).save_pretrained(folder)
  return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Return the folder of a pipeline that all tests share and must not change."""
  return write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def copy(folder, tmp_path):
  return shutil.copytree(folder, tmp_path / "copy")


def initial_noise():
  return np.asarray(jax.random.normal(jax.random.key(1), SHAPE))


def assert_same_tensors(first, second):
  first, second = (safetensors.numpy.load_file(path) for path in (first, second))
  assert list(first) == list(second)
  for a, b in zip(first.values(), second.values(), strict=True):
    np.testing.assert_array_equal(a, b, strict=True)


def model_with(network, process, prediction, shape):
  """Return a pixel model without conditions."""
  return models.Model(
    network=models.networks.from_linen(network, {}),
    process=process,
    prediction=prediction,
    conditions={},
    codec=codecs.pixels(),
    data_shape=shape,
    shape=shape,
  )


def test_extra_input_channels_become_an_image_condition(tmp_path):
  """No pixel pipeline of diffusers takes an image condition, so the model cannot be saved."""
  model, params = interop.diffusers.load(write_pipeline(tmp_path / "a", in_channels=5))
  assert model.shape == model.data_shape == (8, 8, 3)
  assert {name: condition.shape.shape for name, condition in model.conditions.items()} == {"hint": (8, 8, 2)}
  x, image = initial_noise(), np.ones((5, 8, 8, 2), np.float32)
  denoise = jax.jit(lambda image: model.denoise(params, {"hint": image})(x, 0.5))
  without, with_image = denoise(0 * image), denoise(image)
  assert without.shape == x.shape
  assert np.any(without != with_image)
  with pytest.raises(ValueError, match="the image condition 'hint', which no pixel pipeline of diffusers supports"):
    resave(model, params, tmp_path / "again")
  assert not (tmp_path / "again").exists()


def test_the_image_condition_is_centered_with_the_input(tmp_path):
  model, params = interop.diffusers.load(write_pipeline(tmp_path, in_channels=5, center_input_sample=True))
  x, image, time = initial_noise(), np.ones((5, 8, 8, 2), np.float32), np.ones(5, np.float32)
  joined = model.network.module.apply({"params": params}, np.concatenate([x, image], -1), time)
  np.testing.assert_allclose(model.network.apply(params, x, time, {"hint": image}), joined, atol=1e-5)


CONDITIONED = {
  "classes": ({"num_class_embeds": 4}, {"classes": np.array([0, 3, 1, 2, 0])}),
  "level": ({"class_embed_type": "timestep"}, {"level": np.array([0.0, 10, 500, 998.5, 3], np.float32)}),
  "vector": (
    {"class_embed_type": "identity"},
    {"vector": np.random.default_rng(0).standard_normal((5, 32), np.float32)},
  ),
}


@pytest.mark.parametrize("name", CONDITIONED)
def test_conditions_match_the_class_labels_of_the_peer(name, tmp_path):
  changes, batch = CONDITIONED[name]
  # Normalization groups need several channels, because a group of one channel removes an added constant.
  peer = random_unet({"sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 2} | changes)
  diffusers.DDPMPipeline(peer, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
  model, params = interop.diffusers.load(tmp_path)
  assert list(model.conditions) == [name]
  encoded = model.encode_conditions(jax.random.split(jax.random.key(0), 5), batch)
  x, time = initial_noise(), np.linspace(3, 977, 5).astype(np.float32)
  actual = jax.jit(model.network.apply)(params, x, time, encoded)
  with torch.no_grad():
    labels = torch.tensor(batch[name])
    expected = peer(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(time), class_labels=labels).sample.numpy()
  expected = expected.transpose(0, 2, 3, 1)
  np.testing.assert_allclose(actual, expected, atol=1e-4 * np.std(expected))
  reversed_output = jax.jit(model.network.apply)(params, x, time, jax.tree.map(lambda leaf: leaf[::-1], encoded))
  assert np.max(np.abs(reversed_output - actual)[[0, 1]]) > 0.01 * np.std(expected), "the condition has no effect"
  # The conditions survive saving and loading.
  resave(model, params, tmp_path / "again")
  reloaded, same = interop.diffusers.load(tmp_path / "again")
  assert reloaded.network.module == model.network.module
  jax.tree.map(np.testing.assert_array_equal, same, params)
  with pytest.raises(ValueError, match=f"Got no {name}"):
    model.denoise(params)


def test_with_class_dropout_the_last_class_means_no_class(tmp_path):
  write_pipeline(tmp_path, num_class_embeds=4)
  model, _ = interop.diffusers.load(tmp_path, class_dropout=0.1)
  plain = interop.diffusers.read(tmp_path)
  assert model.network.module == plain.network.module
  assert [m.conditions["classes"].num_values for m in (model, plain)] == [4, 4]
  np.testing.assert_array_equal(model.drop_conditions({"classes": jnp.zeros(2, jnp.int32)})["classes"], [3, 3])
  assert model.conditions["classes"].dropout == 0.1
  assert plain.conditions["classes"].parse("3") == 3
  with pytest.raises(ValueError, match="from 0 to 2"):
    model.conditions["classes"].parse("3")
  with pytest.raises(ValueError, match="class_dropout=0.1 for a model with num_class_embeds=None"):
    interop.diffusers.read(write_pipeline(tmp_path / "plain"), class_dropout=0.1)


def test_a_config_without_an_image_size_needs_a_shape(tmp_path):
  folder = write_pipeline(tmp_path, sample_size=None)
  with pytest.raises(ValueError, match=r"config.json: Got sample_size=null, .*pass shape=\(height, width, 3\)"):
    interop.diffusers.load(folder)
  model, params = interop.diffusers.load(folder, shape=(16, 8, 3))
  assert model.shape == (16, 8, 3)
  x = jnp.zeros((1, 16, 8, 3))
  assert model.denoise(params)(x, 0.5).shape == x.shape
  for shape, message in (
    ((8, 8, 1), r"expected \(height, width, 3\)"),
    ((8, 8), r"Got images of shape \(8, 8\)"),
    ((9, 8, 3), "divisible by"),
  ):
    with pytest.raises(ValueError, match=message):
      interop.diffusers.read(folder, shape=shape)


def test_images_need_not_be_square(tmp_path):
  model, params = interop.diffusers.load(write_pipeline(tmp_path / "a", sample_size=(16, 8)))
  assert model.shape == (16, 8, 3)
  resave(model, params, tmp_path / "b")
  assert interop.diffusers.read(tmp_path / "b").shape == (16, 8, 3)


def test_models_are_read_from_a_copy_of_their_configs(folder, tmp_path):
  """A run that started from a pipeline rebuilds its model from a copy of the pipeline's configs, without weights."""
  interop.diffusers.copy_config(folder, tmp_path / "copy")
  copied = sorted(str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*") if path.is_file())
  assert copied == ["scheduler/scheduler_config.json", "unet/config.json"]
  assert all((tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes() for name in copied)
  options = {"dropout": 0.1, "dtype": "bfloat16", "remat": "blocks"}
  from_copy = interop.diffusers.read(tmp_path / "copy", **options)
  model, params = interop.diffusers.load(folder, **options)
  assert from_copy.network.module == model.network.module
  assert (from_copy.network.module.dropout, from_copy.network.module.dtype) == (0.1, jnp.bfloat16)
  assert jax.tree.map(jnp.shape, jax.eval_shape(from_copy.init, jax.random.key(0))) == jax.tree.map(jnp.shape, params)
  with pytest.raises(ValueError, match="not an empty folder"):
    interop.diffusers.copy_config(tmp_path / "copy", tmp_path / "copy" / ".." / "copy")
  for wrong, message in (
    ({"dtype": "int8"}, "dtype='int8'; expected 'float32' or 'bfloat16'"),
    ({"remat": "some"}, "remat='some'"),
    ({"attention": "cudnn"}, "attention='cudnn'"),
    ({"dropout": 1.0}, "dropout=1.0"),
  ):
    with pytest.raises(ValueError, match=message):
      interop.diffusers.read(tmp_path / "copy", **wrong)
  with pytest.raises(ValueError, match="contains no weights"):
    interop.diffusers.load(tmp_path / "copy")


DEFAULTS = {
  "ddpm": (diffusers.DDPMScheduler(50, clip_sample_range=0.7, variance_type="fixed_large"), "ancestral", 50),
  "ddim": (diffusers.DDIMScheduler(clip_sample=False), "ddim", 50),
  "unipc": (diffusers.UniPCMultistepScheduler(20, solver_order=3), "unipc", 20),
  "deis": (diffusers.DEISMultistepScheduler(solver_order=1), "deis", 50),
  "solver": (diffusers.DPMSolverMultistepScheduler(), "dpmpp_2m", 50),
  "heun": (diffusers.HeunDiscreteScheduler(), "heun", 50),
}
RULES = {
  "ddpm": lambda process: sampling.ancestral(process, "large"),
  "ddim": sampling.ddim,
  "unipc": lambda process: sampling.unipc(process, 3),
  "deis": lambda process: sampling.deis(process, 1),
  "solver": sampling.dpmpp_2m,
  "heun": lambda process: sampling.heun(process, scaled=True),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_match_the_scheduler(name, tmp_path):
  """The sampler, the number of steps, the grid and the clipping range come from the scheduler."""
  scheduler, sampler, steps = DEFAULTS[name]
  model = interop.diffusers.read(write_pipeline(tmp_path, scheduler))
  defaults = model.defaults
  assert (defaults.name, defaults.steps) == (sampler, steps)
  times = model.times(5)
  np.testing.assert_array_equal(times, schedule_of(tmp_path).grid.times(model.process, 5))
  denoise = lambda x_t, t: jnp.tanh(x_t) * 1.5  # noqa: E731
  x = initial_noise()
  expected, actual = (
    jax.jit(lambda x, rule=rule: sampling.sample(jax.random.key(0), rule, denoise, x, times))(x)
    for rule in (RULES[name](model.process), defaults.sampler)
  )
  np.testing.assert_array_equal(actual, expected)
  if name == "ddpm":
    np.testing.assert_array_equal(defaults.clip(denoise)(x, 0.5), guidance.clip(denoise, -0.7, 0.7)(x, 0.5))
  else:
    assert defaults.clip is None


def test_inconsistent_channels_and_embeddings_are_errors(tmp_path):
  for index, (changes, message) in enumerate(
    [
      ({"out_channels": 6}, "in_channels=3, out_channels=6 and a fixed variance"),
      ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
    ]
  ):
    with pytest.raises(ValueError, match=message):
      interop.diffusers.load(write_pipeline(tmp_path / str(index), **changes))


def contents(file):
  with safetensors.safe_open(file, "numpy") as opened:
    return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def weights_path(folder):
  return folder / "unet" / "diffusion_pytorch_model.safetensors"


def schedule_of(folder):
  """Return the parsed scheduler config of a folder."""
  return interop.schedulers.from_config(json.loads((folder / "scheduler" / "scheduler_config.json").read_text()))


def resave(model, params, path, schedule=None, **options):
  """Save a model.

  If `schedule` is not None, save the model with the clipping, the variance and the spacing of `schedule`.
  """
  if schedule is not None:
    options |= {"clip": schedule.clip, "variance": schedule.variance, "spacing": schedule.grid.spacing}
  elif model.prediction.learned_variance:
    options |= {"variance": "learned"}
  interop.diffusers.save(path, model, params, **options)


def test_round_trips_are_bit_exact(folder, tmp_path):
  model, params = interop.diffusers.load(folder)
  schedule = schedule_of(folder)
  resave(model, params, tmp_path / "again", schedule, scores={"frechet_distance": 1.25}, config={"seed": 3})
  assert_same_tensors(weights_path(folder), weights_path(tmp_path / "again"))
  for part in ("unet/config.json", "scheduler/scheduler_config.json"):
    original, saved = (json.loads((path / part).read_text()) for path in (folder, tmp_path / "again"))
    assert {key: value for key, value in original.items() if saved.get(key, value) != value and key[0] != "_"} == {}
    assert original.keys() - saved.keys() <= {"dynamic_thresholding_ratio", "sample_max_value"}
  reloaded, same = interop.diffusers.load(tmp_path / "again")
  assert reloaded.network.module == model.network.module
  jax.tree.map(np.testing.assert_array_equal, same, params)
  assert_same_schedule(folder, tmp_path / "again")
  for pipeline in (diffusers.DDPMPipeline, diffusers.DDIMPipeline):
    opened = pipeline.from_pretrained(tmp_path / "again").unet.state_dict()
    for name, tensor in contents(weights_path(folder)).items():
      np.testing.assert_array_equal(opened[name].numpy(), tensor)
  card = (tmp_path / "again" / "README.md").read_text()
  assert "1.25" in card
  assert '"seed": 3' in card
  assert card.startswith("---\nlibrary_name: diffusers")


def assert_same_schedule(first, second):
  first, second = schedule_of(first), schedule_of(second)
  np.testing.assert_array_equal(first.betas, second.betas)
  assert first._replace(betas=None, config=None) == second._replace(betas=None, config=None)


@pytest.mark.parametrize("clip", [None, 0.25, 3.0])
def test_any_clipping_range_is_saved_and_loaded(clip, folder, tmp_path):
  model, params = interop.diffusers.load(folder)
  interop.diffusers.save(tmp_path / "a", model, params, clip=clip)
  loaded = interop.diffusers.read(tmp_path / "a").defaults.clip
  if clip is None:
    assert loaded is None
  else:
    values = jnp.linspace(-5, 5, 11)[:, None]
    np.testing.assert_array_equal(loaded(lambda x_t, t: x_t)(values, 0.5), jnp.clip(values, -clip, clip))


def flatten(copy):
  """Move all files of a pipeline to one folder."""
  for path in [*copy.glob("unet/*"), *copy.glob("scheduler/*")]:
    path.rename(copy / path.name)
  (copy / "unet").rmdir()
  (copy / "scheduler").rmdir()
  return copy


def legacy(copy):
  """Convert a pipeline to the files that diffusers wrote in 2022.

  All files are in one folder, the tensors are in a pickle, and tensors, blocks and keys have their old names.
  """
  folder = flatten(copy)
  old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
  state = safetensors.torch.load_file(folder / "diffusion_pytorch_model.safetensors")

  def rename(name):
    for new, old in old_names.items():
      name = name.replace(f".{new}.", f".{old}.")
    return name

  torch.save({rename(name): value for name, value in state.items()}, folder / "diffusion_pytorch_model.bin")
  (folder / "diffusion_pytorch_model.safetensors").unlink()
  config = json.loads((folder / "config.json").read_text())
  for key in ("down_block_types", "up_block_types"):
    config[key] = [f"UNetRes{kind}" for kind in config[key]]
  (folder / "config.json").write_text(json.dumps(config | {"_class_name": "UNetUnconditionalModel"}))
  (folder / "scheduler_config.json").write_text(
    json.dumps({"_class_name": "DDPMScheduler", "timesteps": 1000, "predict_epsilon": True, "tensor_format": "pt"})
  )
  return folder


def to_bfloat16(copy):
  """Convert the weights of a pipeline to bfloat16."""
  state = safetensors.torch.load_file(weights_path(copy))
  safetensors.torch.save_file({name: value.bfloat16() for name, value in state.items()}, weights_path(copy))
  return copy


@pytest.mark.parametrize("change", [flatten, legacy])
def test_other_layouts_contain_the_same_model(change, folder, copy):
  (model, params), (other, same) = interop.diffusers.load(folder), interop.diffusers.load(change(copy))
  assert other.network.module == model.network.module
  jax.tree.map(np.testing.assert_array_equal, same, params)
  times = np.linspace(0, 1, 1001)
  for value in ("alpha", "sigma"):
    np.testing.assert_array_equal(getattr(other.process, value)(times), getattr(model.process, value)(times))
  assert (other.defaults.name, other.defaults.steps) == (model.defaults.name, model.defaults.steps)
  np.testing.assert_array_equal(other.times(7), model.times(7))
  assert other.prediction == model.prediction
  values = jnp.linspace(-2, 2, 9)[:, None]
  clipped = [each.defaults.clip(lambda x_t, t: x_t)(values, 0.5) for each in (model, other)]
  np.testing.assert_array_equal(*clipped)


def test_half_precision_becomes_float32(folder, copy):
  (_, params), (_, other) = interop.diffusers.load(folder), interop.diffusers.load(to_bfloat16(copy))
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
    assert b.dtype == jnp.float32
    np.testing.assert_array_equal(b, np.asarray(a).astype(jnp.bfloat16).astype(np.float32))


def edit(file, change):
  """Apply `change` to the tensors of a file, and save the file."""
  state = safetensors.torch.load_file(file)
  change(state)
  safetensors.torch.save_file(state, file)


BROKEN = {
  "missing": (lambda f: edit(weights_path(f), lambda s: s.pop("conv_in.bias")), r"1 missing: conv_in\.bias"),
  "extra": (lambda f: edit(weights_path(f), lambda s: s.update(more=torch.zeros(2))), "1 extra: more"),
  "shape": (
    lambda f: edit(weights_path(f), lambda s: s.update({"conv_out.bias": torch.zeros(4)})),
    r"1 of another shape: conv_out\.bias \(4,\) instead of \(3,\)",
  ),
  "truncated": (lambda f: os.truncate(weights_path(f), weights_path(f).stat().st_size - 100), "truncated or damaged"),
  "empty": (lambda f: os.truncate(weights_path(f), 0), "truncated or damaged"),
  "no safetensors": (lambda f: weights_path(f).write_bytes(b"<html>not found</html>" * 20), "have another format"),
  "a pickle": (lambda f: weights_path(f).write_bytes(pickle.dumps({"a": 1})), "have another format"),
  "no weights": (lambda f: weights_path(f).unlink(), "contains no weights"),
  "no config": (
    lambda f: (f / "unet" / "config.json").unlink(),
    r"which lacks unet/config\.json, the config of the network",
  ),
  "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "which lacks .*, the config of the scheduler"),
  "broken config": (lambda f: (f / "unet" / "config.json").write_text("{"), r"Cannot read .*config\.json as JSON"),
  "another pipeline": (
    lambda f: (f / "model_index.json").write_text(
      '{"_class_name": "StableDiffusionControlNetPipeline", "controlnet": ["diffusers", "ControlNetModel"]}'
    ),
    "a StableDiffusionControlNetPipeline with the parts controlnet",
  ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_gives_one_clear_error(name, copy):
  damage, message = BROKEN[name]
  damage(copy)
  with pytest.raises(ValueError, match=message):
    interop.diffusers.load(copy)


class Bomb:
  def __reduce__(self):
    return (os.system, ("touch pwned",))


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("code", r"contains posix\.system, which needs code to load, and code in a file never runs here"),
    ("noise", r"damaged or has another format \(Unsupported operand 103\)\. Download it again"),
    ("list", "expected a state dict"),
  ],
)
def test_pickles_with_more_than_tensors_are_refused(content, message, copy, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  weights_path(copy).unlink()
  file = copy / "unet" / "diffusion_pytorch_model.bin"
  if content == "noise":
    file.write_bytes(b"garbage" * 100)
  else:
    torch.save([1] if content == "list" else {"a": Bomb()}, file)
  with pytest.raises(ValueError, match=rf"diffusion_pytorch_model\.bin.*{message}"):
    interop.diffusers.load(copy)
  assert not (tmp_path / "pwned").exists()


def test_paths_that_are_not_folders_are_errors(tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  with pytest.raises(ValueError, match="not a folder"):
    interop.diffusers.load(tmp_path / "none")
  import huggingface_hub

  def unreachable(*args, **kwargs):
    raise OSError("no network")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
  with pytest.raises(ValueError, match=r"owner/name, which is not a folder .*hub: no network"):
    interop.diffusers.load("owner/name")


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"spacing": "linspace_open"}, "spacing='linspace_open'"),
    ({"variance": "big"}, "variance='big'; expected 'small' or 'large'"),
    ({"variance": "learned"}, "variance='learned'"),
    ({"clip": -1.0}, "clip=-1"),
    ({"prediction": predictions.SCORE}, "expected EPS, X0 or V"),
    ({"prediction": predictions.learned_range(predictions.EPS)}, "expected 6, twice the channels"),
    ({"data_shape": (8, 8, 1), "shape": (8, 8, 1)}, "out_channels=3 for x of shape"),
    ({"data_shape": (16, 16, 3)}, "with a codec .* expected a model of image pixels"),
    ({"codec": codecs.Codec(lambda frozen, keys, data: data, lambda frozen, x: x)}, "with a codec"),
    ({"data_shape": (16, 3), "shape": (16, 3)}, r"data of shape \(16, 3\); expected images"),
    ({"time_input": lambda t: 1000 * t}, "a custom time_input"),
    ({"process": processes.ve()}, "diffusers' DDPM pipeline cannot sample"),
    (
      {"network": models.Network(lambda *_: {}, lambda *_: 0)},
      "a network made of plain functions; expected a networks.UNet",
    ),
  ],
)
def test_models_that_diffusers_cannot_represent_are_not_saved(options, message, tmp_path):
  network = UNet(channels=8, multipliers=(1,), attention_levels=(), groups=4)
  params = {"conv_in": {"kernel": np.zeros((3, 3, 3, 8))}}
  changes = {name: value for name, value in options.items() if name in models.Model._fields}
  model = model_with(network, processes.discrete(schedules.linear(1000)), predictions.EPS, (8, 8, 3))._replace(
    **changes
  )
  options = {name: value for name, value in options.items() if name not in changes}
  with pytest.raises(ValueError, match=message):
    interop.diffusers.save(tmp_path / "a", model, params, **options)
  assert not (tmp_path / "a").exists()


def test_cards_show_only_pipelines_that_can_sample(folder, tmp_path):
  for name, changes, pipelines in (
    ("plain", {}, {"DDPMPipeline", "DDIMPipeline"}),
    ("learned", {"out_channels": 6}, {"DDPMPipeline"}),
    ("classes", {"num_class_embeds": 3}, set()),
    ("level", {"class_embed_type": "timestep"}, set()),
  ):
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range") if name == "learned" else None
    resave(*interop.diffusers.load(write_pipeline(tmp_path / name, scheduler, **changes)), tmp_path / f"{name}2")
    card = (tmp_path / f"{name}2" / "README.md").read_text()
    assert {kind for kind in ("DDPMPipeline", "DDIMPipeline") if f"{kind}.from_pretrained" in card} == pipelines


def test_outputs_are_not_overwritten(folder, tmp_path):
  model, params = interop.diffusers.load(folder)
  (tmp_path / "file").write_text("mine")
  with pytest.raises(ValueError, match="not an empty folder"):
    resave(model, params, tmp_path)
  assert (tmp_path / "file").read_text() == "mine"


MEMORY = """
import os, sys
import jax, jax.numpy as jnp
import torch
from ddpm_jax import interop

def status(key):
  return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def measure(small, large):
  # Load a small network first, so that the memory of JAX and other libraries does not count.
  network, params = interop.diffusers.load_network(small)
  jax.block_until_ready(params)
  del params
  before = status("VmRSS")
  open("/proc/self/clear_refs", "w").write("5")
  network, params = interop.diffusers.load_network(large)
  jax.block_until_ready(params)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  print((status("VmHWM") - before) / size, size, flush=True)

small, *folders = sys.argv[1:]
for folder in folders:
  # Fork before JAX starts, so that one measurement does not affect the next.
  if not (child := os.fork()):
    measure(small, folder)
    os._exit(0)
  assert os.waitpid(child, 0)[1] == 0
"""


def test_loading_needs_less_than_twice_the_memory_of_the_parameters(folder, tmp_path):
  network = UNet()
  template = interop.tensors.abstract_params(network, (32, 32, 3))
  params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), template)
  process = processes.discrete(schedules.linear(1000))
  interop.diffusers.save(tmp_path / "safe", model_with(network, process, predictions.EPS, (32, 32, 3)), params)
  shutil.copytree(tmp_path / "safe", tmp_path / "pickled")
  state = safetensors.torch.load_file(weights_path(tmp_path / "safe"))
  torch.save(state, tmp_path / "pickled/unet/diffusion_pytorch_model.bin")
  weights_path(tmp_path / "pickled").unlink()
  command = [sys.executable, "-c", MEMORY, folder, tmp_path / "safe", tmp_path / "pickled"]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  assert len(lines) == 2
  for ratio, size in (map(float, line.split()) for line in lines):
    assert size > 1.4e8
    assert 0.9 < ratio < 2, lines
