"""Folders of diffusers: read, written, and refused when they are broken."""

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

from ddpm_jax import interop, predictions, processes, schedules
from ddpm_jax.networks import UNet
from tests.conftest import ROOT
from tests.test_interop_unet import model_of

SHAPE = (5, 8, 8, 3)


def write(folder, scheduler=None, **changes):
  scheduler = scheduler or diffusers.DDPMScheduler()
  diffusers.DDPMPipeline(model_of({"sample_size": 8} | changes), scheduler).save_pretrained(folder)
  return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A pipeline as save_pretrained writes it; never to be changed."""
  return write(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def copy(folder, tmp_path):
  return shutil.copytree(folder, tmp_path / "copy")


def start():
  return np.asarray(jax.random.normal(jax.random.key(1), SHAPE))


def assert_same_tensors(first, second):
  first, second = (safetensors.numpy.load_file(path) for path in (first, second))
  assert list(first) == list(second)
  for a, b in zip(first.values(), second.values(), strict=True):
    np.testing.assert_array_equal(a, b, strict=True)


def test_a_model_conditioned_on_an_image(tmp_path):
  """More channels in than out, as for super-resolution: the image is given to the denoiser."""
  model = interop.diffusers.load(write(tmp_path / "a", in_channels=5))
  assert model.shape == (8, 8, 3)
  x, image = start(), np.ones((5, 8, 8, 2), np.float32)
  denoise = jax.jit(lambda image: model.denoise(image=image)(x, 0.5))
  a, b = denoise(0 * image), denoise(image)
  assert a.shape == x.shape
  assert np.any(a != b)
  resave(model, tmp_path / "again")
  assert_same_tensors(weights(tmp_path / "a"), weights(tmp_path / "again"))
  assert json.loads((tmp_path / "again" / "unet" / "config.json").read_text())["in_channels"] == 5


def test_the_image_is_centered_with_the_input(tmp_path):
  model = interop.diffusers.load(write(tmp_path, in_channels=5, center_input_sample=True))
  x, image, label = start(), np.ones((5, 8, 8, 2), np.float32), np.ones(5, np.float32)
  joined = model.network.apply({"params": model.params}, np.concatenate([x, image], -1), label)
  np.testing.assert_allclose(model.network.apply({"params": model.params}, x, label, image=image), joined, atol=1e-5)


def test_channels_that_do_not_go_together_are_errors(tmp_path):
  for index, (changes, message) in enumerate(
    [
      ({"out_channels": 6}, "in_channels=3, out_channels=6 and a variance that is fixed"),
      ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
    ]
  ):
    with pytest.raises(ValueError, match=message):
      interop.diffusers.load(write(tmp_path / str(index), **changes))


def contents(file):
  with safetensors.safe_open(file, "numpy") as opened:
    return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def weights(folder):
  return folder / "unet" / "diffusion_pytorch_model.safetensors"


def resave(model, path, **options):
  clip = None if model.clip is None else model.clip[1]
  interop.diffusers.save(
    path,
    model.network,
    model.params,
    model.process,
    model.prediction,
    shape=model.shape,
    clip=clip,
    variance=model.schedule.variance,
    spacing=model.schedule.spacing,
    **options,
  )


def test_round_trips_are_bit_exact(folder, tmp_path):
  model = interop.diffusers.load(folder)
  resave(model, tmp_path / "again", scores={"frechet_distance": 1.25}, config={"seed": 3})
  assert_same_tensors(weights(folder), weights(tmp_path / "again"))
  for part in ("unet/config.json", "scheduler/scheduler_config.json"):
    before, after = (json.loads((path / part).read_text()) for path in (folder, tmp_path / "again"))
    assert {key: value for key, value in before.items() if after.get(key, value) != value and key[0] != "_"} == {}
    assert before.keys() - after.keys() <= {"dynamic_thresholding_ratio", "sample_max_value"}
  reloaded = interop.diffusers.load(tmp_path / "again")
  assert reloaded.network == model.network
  jax.tree.map(np.testing.assert_array_equal, reloaded.params, model.params)
  np.testing.assert_array_equal(reloaded.schedule.betas, model.schedule.betas)
  for pipeline in (diffusers.DDPMPipeline, diffusers.DDIMPipeline):
    opened = pipeline.from_pretrained(tmp_path / "again").unet.state_dict()
    for name, tensor in contents(weights(folder)).items():
      np.testing.assert_array_equal(opened[name].numpy(), tensor)
  card = (tmp_path / "again" / "README.md").read_text()
  assert "1.25" in card
  assert '"seed": 3' in card
  assert card.startswith("---\nlibrary_name: diffusers")


def flat(copy):
  for path in [*copy.glob("unet/*"), *copy.glob("scheduler/*")]:
    path.rename(copy / path.name)
  (copy / "unet").rmdir()
  (copy / "scheduler").rmdir()
  return copy


def legacy(copy):
  """As files of 2022: flat, a pickle of tensors, attention's old names, old block types and keys."""
  folder = flat(copy)
  old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
  state = safetensors.torch.load_file(folder / "diffusion_pytorch_model.safetensors")

  def renamed(name):
    for new, before in old.items():
      name = name.replace(f".{new}.", f".{before}.")
    return name

  torch.save({renamed(name): value for name, value in state.items()}, folder / "diffusion_pytorch_model.bin")
  (folder / "diffusion_pytorch_model.safetensors").unlink()
  config = json.loads((folder / "config.json").read_text())
  for key in ("down_block_types", "up_block_types"):
    config[key] = [f"UNetRes{kind}" for kind in config[key]]
  (folder / "config.json").write_text(json.dumps(config | {"_class_name": "UNetUnconditionalModel"}))
  (folder / "scheduler_config.json").write_text(
    json.dumps({"_class_name": "DDPMScheduler", "timesteps": 1000, "predict_epsilon": True, "tensor_format": "pt"})
  )
  return folder


def half(copy):
  state = safetensors.torch.load_file(weights(copy))
  safetensors.torch.save_file({name: value.bfloat16() for name, value in state.items()}, weights(copy))
  return copy


@pytest.mark.parametrize("change", [flat, legacy])
def test_other_layouts_hold_the_same_model(change, folder, copy):
  model, other = interop.diffusers.load(folder), interop.diffusers.load(change(copy))
  assert other.network == model.network
  jax.tree.map(np.testing.assert_array_equal, other.params, model.params)
  np.testing.assert_array_equal(other.schedule.betas, model.schedule.betas)
  assert other.schedule._replace(betas=None) == model.schedule._replace(betas=None)


def test_half_precision_becomes_float32(folder, copy):
  model, other = interop.diffusers.load(folder), interop.diffusers.load(half(copy))
  for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(other.params), strict=True):
    assert b.dtype == jnp.float32
    np.testing.assert_array_equal(b, np.asarray(a).astype(jnp.bfloat16).astype(np.float32))


def edit(file, change):
  """The tensors of a file, changed in place."""
  state = safetensors.torch.load_file(file)
  change(state)
  safetensors.torch.save_file(state, file)


BROKEN = {
  "missing": (lambda f: edit(weights(f), lambda s: s.pop("conv_in.bias")), r"1 missing: conv_in\.bias"),
  "extra": (lambda f: edit(weights(f), lambda s: s.update(more=torch.zeros(2))), "1 extra: more"),
  "shape": (
    lambda f: edit(weights(f), lambda s: s.update({"conv_out.bias": torch.zeros(4)})),
    r"1 of another shape: conv_out\.bias \(4,\) instead of \(3,\)",
  ),
  "truncated": (lambda f: os.truncate(weights(f), weights(f).stat().st_size - 100), "cut short, damaged"),
  "empty": (lambda f: os.truncate(weights(f), 0), "cut short, damaged"),
  "no safetensors": (lambda f: weights(f).write_bytes(b"<html>not found</html>" * 20), "another kind of file"),
  "a pickle": (lambda f: weights(f).write_bytes(pickle.dumps({"a": 1})), "another kind of file"),
  "no weights": (lambda f: weights(f).unlink(), "holds no weights"),
  "no config": (
    lambda f: (f / "unet" / "config.json").unlink(),
    r"unet/config\.json, the config of the network, is missing",
  ),
  "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "config of the scheduler, is missing"),
  "broken config": (lambda f: (f / "unet" / "config.json").write_text("{"), r"Cannot read .*config\.json as JSON"),
  "another pipeline": (
    lambda f: (f / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "vae": ["a", "b"]}'),
    "a StableDiffusionPipeline of vae",
  ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_one_clear_error(name, copy):
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
    ("code", r"holds posix\.system, which only code can make, and code in a file is never run"),
    ("noise", r"damaged, or another kind of file \(Unsupported operand 103\)\. Fetch it again"),
    ("list", "wanted a state dict"),
  ],
)
def test_pickles_that_hold_more_than_tensors_are_refused(content, message, copy, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  weights(copy).unlink()
  file = copy / "unet" / "diffusion_pytorch_model.bin"
  if content == "noise":
    file.write_bytes(b"garbage" * 100)
  else:
    torch.save([1] if content == "list" else {"a": Bomb()}, file)
  with pytest.raises(ValueError, match=rf"diffusion_pytorch_model\.bin.*{message}"):
    interop.diffusers.load(copy)
  assert not (tmp_path / "pwned").exists()


def test_what_is_no_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  with pytest.raises(ValueError, match="no folder"):
    interop.diffusers.load(tmp_path / "none")
  import huggingface_hub

  def unreachable(*args, **kwargs):
    raise OSError("no network")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
  with pytest.raises(ValueError, match=r"owner/name, which is no folder, .*hub: no network"):
    interop.diffusers.load("owner/name")


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"spacing": "linspace_open"}, "spacing='linspace_open'"),
    ({"variance": "big"}, "variance='big'; wanted 'small' or 'large'"),
    ({"variance": "learned"}, "variance='learned'"),
    ({"clip": -1.0}, "clip=-1"),
    ({"prediction": predictions.SCORE}, "wanted EPS, X0 or V"),
    ({"prediction": predictions.learned_range(predictions.EPS)}, "wanted 6, twice the channels"),
    ({"shape": (8, 8, 1)}, "out_channels=3 for images of"),
  ],
)
def test_what_diffusers_could_not_open_is_not_written(options, message, tmp_path):
  network = UNet(channels=8, multipliers=(1,), attention_levels=(), groups=4)
  params = {"conv_in": {"kernel": np.zeros((3, 3, 3, 8))}}
  arguments = {
    "process": processes.discrete(schedules.linear(1000)),
    "prediction": predictions.EPS,
    "shape": (8, 8, 3),
  } | options
  with pytest.raises(ValueError, match=message):
    interop.diffusers.save(tmp_path / "a", network, params, **arguments)
  assert not (tmp_path / "a").exists()


def test_cards_show_what_works(folder, tmp_path):
  """Only what a pipeline of diffusers can sample is shown sampled by it."""
  for name, changes, shown in (
    ("plain", {}, {"DDPMPipeline", "DDIMPipeline"}),
    ("learned", {"out_channels": 6}, {"DDPMPipeline"}),
    ("classes", {"num_class_embeds": 3}, set()),
    ("image", {"in_channels": 5}, set()),
  ):
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range") if name == "learned" else None
    resave(interop.diffusers.load(write(tmp_path / name, scheduler, **changes)), tmp_path / f"{name}2")
    card = (tmp_path / f"{name}2" / "README.md").read_text()
    assert {kind for kind in ("DDPMPipeline", "DDIMPipeline") if f"{kind}.from_pretrained" in card} == shown


def test_outputs_are_not_overwritten(folder, tmp_path):
  model = interop.diffusers.load(folder)
  (tmp_path / "file").write_text("mine")
  with pytest.raises(ValueError, match="not empty"):
    resave(model, tmp_path)
  assert (tmp_path / "file").read_text() == "mine"


MEMORY = """
import os, sys
import jax, jax.numpy as jnp
import torch
from ddpm_jax import interop

def status(key):
  return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def measure(small, large):
  # What is not the parameters: libraries, and JAX's start.
  network, params = interop.diffusers.load_unet(small)
  jax.block_until_ready(params)
  del params
  before = status("VmRSS")
  open("/proc/self/clear_refs", "w").write("5")
  network, params = interop.diffusers.load_unet(large)
  jax.block_until_ready(params)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  print((status("VmHWM") - before) / size, size, flush=True)

small, *folders = sys.argv[1:]
for folder in folders:
  # In a process of its own, before JAX starts: what was measured first leaves nothing behind.
  if not (child := os.fork()):
    measure(small, folder)
    os._exit(0)
  assert os.waitpid(child, 0)[1] == 0
"""


def test_memory_while_loading_stays_below_twice_the_parameters(folder, tmp_path):
  network = UNet()
  template = interop.tensors.abstract_params(network, (32, 32, 3))
  params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), template)
  process = processes.discrete(schedules.linear(1000))
  interop.diffusers.save(tmp_path / "safe", network, params, process, predictions.EPS, shape=(32, 32, 3))
  shutil.copytree(tmp_path / "safe", tmp_path / "pickled")
  state = safetensors.torch.load_file(weights(tmp_path / "safe"))
  torch.save(state, tmp_path / "pickled/unet/diffusion_pytorch_model.bin")
  weights(tmp_path / "pickled").unlink()
  command = [sys.executable, "-c", MEMORY, folder, tmp_path / "safe", tmp_path / "pickled"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert len(lines) == 2
  for ratio, size in (map(float, line.split()) for line in lines):
    assert size > 1.4e8
    assert 0.9 < ratio < 2, lines
