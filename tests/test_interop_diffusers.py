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
  assert weights(tmp_path / "a").read_bytes() == weights(tmp_path / "again").read_bytes()
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
  assert weights(folder).read_bytes() == weights(tmp_path / "again").read_bytes()
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


WRAPPED = {
  "prefix": lambda s: {f"module.{name}": value for name, value in s.items()},
  "prefixes": lambda s: {f"module._orig_mod.network.{name}": value for name, value in s.items()},
  "ema": lambda s: {"ema": s},
  "trainer": lambda s: {
    "model": s,
    "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{}]},
    "step": 3,
  },
  "lightning": lambda s: {
    "state_dict": {f"model.{name}": value for name, value in s.items()} | {"loss.logvar": torch.ones(2)},
    "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
    "pytorch-lightning_version": "2.0",
    "epoch": 3,
  },
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_network_is_found_in_a_checkpoint(name, folder, copy):
  state = safetensors.torch.load_file(weights(copy))
  weights(copy).unlink()
  put("diffusion_pytorch_model.bin", WRAPPED[name](state), copy)
  jax.tree.map(
    np.testing.assert_array_equal, interop.diffusers.load(copy).params, interop.diffusers.load(folder).params
  )


UNCLEAR = {
  "two networks": (lambda s: {"ema": s, "model": s}, "2 networks, under ema, model; expected one"),
  "two networks in one": (
    lambda s: {"state_dict": {f"{part}.{name}": value for name, value in s.items() for part in ("a", "b")}},
    "2 networks, under state_dict.a, state_dict.b",
  ),
  "no network": (
    lambda s: {"optimizer": {"state": {0: torch.ones(2)}}, "epoch": 3},
    r"no conv_in.weight, .* entries optimizer \(dict\), epoch \(int\)",
  ),
  "no tensors": (lambda s: {"epoch": 3}, r"epoch \(int\)"),
  "nothing": (lambda s: {}, "no entry"),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_a_checkpoint_without_exactly_one_network_is_described(name, copy):
  state = safetensors.torch.load_file(weights(copy))
  weights(copy).unlink()
  wrap, message = UNCLEAR[name]
  put("diffusion_pytorch_model.bin", wrap(state), copy)
  with pytest.raises(ValueError, match=rf"diffusion_pytorch_model\.bin.*{message}"):
    interop.diffusers.load(copy)


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


@pytest.mark.parametrize("content", ["code", "noise", "list"])
def test_pickles_that_hold_more_than_tensors_are_refused(content, copy, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  weights(copy).unlink()
  file = copy / "unet" / "diffusion_pytorch_model.bin"
  if content == "noise":
    file.write_bytes(b"garbage" * 100)
  else:
    torch.save([1] if content == "list" else {"a": Bomb()}, file)
  with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin.*(run code|wanted a state dict)"):
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


@pytest.mark.parametrize("form", ["whole", "variant", "shards", "pickled variant"])
def test_a_name_on_the_hub_is_read_from_its_cache(form, copy, tmp_path, monkeypatch):
  """The hub's own package, offline, on a cache as it leaves one."""
  import huggingface_hub

  if form != "whole":
    reform(copy, FORMS[form])

  repository = tmp_path / "hub" / "models--owner--name"
  (repository / "refs").mkdir(parents=True)
  (repository / "refs" / "main").write_text("a" * 40)
  shutil.copytree(copy, repository / "snapshots" / ("a" * 40))
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  assert interop.diffusers.load("owner/name").network == interop.diffusers.load(copy).network


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


def put(name, state, folder):
  """Write tensors to a file of a network's folder."""
  file = folder / "unet" / name
  if file.suffix == ".safetensors":
    safetensors.torch.save_file(state, file)
  else:
    torch.save(state, file)


FORMS = {
  "variant": ["diffusion_pytorch_model.fp16.safetensors"],
  "pickled variant": ["diffusion_pytorch_model.fp16.bin"],
  "shards": [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)],
  "pickled shards": [f"diffusion_pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)],
  "shards of a variant": [f"diffusion_pytorch_model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)],
}


def reform(folder, files, prefix=""):
  """Write the weights of a folder as other files, with an index if there are several."""
  state = {prefix + name: value for name, value in safetensors.torch.load_file(weights(folder)).items()}
  weights(folder).unlink()
  where = {name: files[i % len(files)] for i, name in enumerate(sorted(state))}
  for file in files:
    put(file, {name: state[name].clone() for name in state if where[name] == file}, folder)
  if len(files) > 1:
    variant = ".fp16" if ".fp16" in files[0] else ""
    index = folder / "unet" / f"diffusion_pytorch_model.{files[0].rpartition('.')[2]}.index{variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index
  return None


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_variants_and_shards_hold_the_same_parameters(name, prefix, folder, copy):
  reform(copy, FORMS[name], prefix)
  jax.tree.map(
    np.testing.assert_array_equal, interop.diffusers.load(copy).params, interop.diffusers.load(folder).params
  )


def change_index(change):
  def damage(folder):
    index = reform(folder, FORMS["shards"])
    content = json.loads(index.read_text())
    change(content, index)
    index.write_text(json.dumps(content))

  return damage


BROKEN_SHARDS = {
  "no index": (
    lambda f: reform(f, FORMS["shards"]).unlink(),
    r"There are .*00002-of-00002\.safetensors: save the model",
  ),
  "no shard": (
    change_index(lambda c, index: (index.parent / FORMS["shards"][1]).unlink()),
    r"00002-of-00002\.safetensors, a file that does not exist",
  ),
  "another shard": (
    change_index(lambda c, index: c["weight_map"].update({"conv_in.bias": FORMS["shards"][1]})),
    r"of what .*index\.json says and holds conv_in\.bias beside it",
  ),
  "another folder": (
    change_index(lambda c, index: c["weight_map"].update({"conv_in.bias": "../scheduler/x.safetensors"})),
    r"index\.json with weight_map=",
  ),
  "no map": (change_index(lambda c, index: c.pop("weight_map")), r"index\.json with weight_map=None"),
  "a list": (change_index(lambda c, index: c.update(weight_map=[1])), r"index\.json with weight_map=\[1\]"),
  "numbers": (change_index(lambda c, index: c.update(weight_map={"conv_in.bias": 3})), r"index\.json with weight_map="),
  "two variants": (
    lambda f: (
      [put(f"diffusion_pytorch_model.{name}.bin", {}, f) for name in ("fp16", "non_ema")] and weights(f).unlink()
    ),
    "expected one of them",
  ),
}


@pytest.mark.parametrize("name", BROKEN_SHARDS)
def test_broken_shards_are_one_clear_error(name, copy):
  damage, message = BROKEN_SHARDS[name]
  damage(copy)
  with pytest.raises(ValueError, match=message):
    interop.diffusers.load(copy)


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


PARTS = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
CONTENTS = {
  "empty": b"",
  "truncated": b'{"a": ',
  "not UTF-8": b'{"a": "\xff"}',
  "nested": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
  "a list": b"[1, 2]",
  "a number": b"3",
  "null": b"null",
  "a huge number": b'{"a": ' + b"9" * 5000 + b"}",
  "a folder": None,
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", CONTENTS)
def test_files_that_hold_no_json_object_are_named(part, name, copy):
  file = copy / part
  if CONTENTS[name] is None:
    file.unlink()
    file.mkdir()
  else:
    file.write_bytes(CONTENTS[name])
  # What is a folder of this name is none of the model's files; the index may be missing.
  if name == "a folder" and part == "model_index.json":
    interop.diffusers.load(copy)
    return
  with pytest.raises(ValueError, match=file.name.replace(".", r"\.")):
    interop.diffusers.load(copy)


# Values of each type, and numbers out of any range; what a key takes of them is left out.
WRONG_VALUES = [
  "4",
  "",
  -1,
  -0.5,
  2**70,
  10**400,
  float("nan"),
  float("inf"),
  True,
  None,
  [],
  ["x"],
  [None],
  [[]],
  {},
  {"a": 1},
]
# What these keys say is not looked at, or is none of the model's.
_IDLE = ("_diffusers_version", "dynamic_thresholding_ratio", "sample_max_value")


def changed(copy, part, reads):
  """Yield each key of a file with each wrong value and what reading the folder then does: None, or its error."""
  file = copy / part
  original = json.loads(file.read_text())
  for key in original:
    for value in WRONG_VALUES if key not in _IDLE else []:
      file.write_text(json.dumps(original | {key: value}))
      try:
        reads()
        yield key, value, None
      except ValueError as error:
        yield key, value, str(error)


@pytest.mark.parametrize("part", PARTS)
def test_values_of_wrong_types_are_errors_that_name_the_file(part, copy, monkeypatch):
  # Parameters are not what this is about.
  monkeypatch.setattr(interop.diffusers, "_load_params", lambda *_: {})
  taken = {}
  for key, value, message in changed(copy, part, lambda: interop.diffusers.load(copy)):
    if message is None:
      taken.setdefault(key, []).append(value)
    else:
      assert copy.name in message, (key, value, message)
      assert (copy / part).name in message, (key, value, message)
  optional = [
    "time_embedding_dim",
    "attention_head_dim",
    "attn_norm_num_groups",
    "class_embed_type",
    "num_class_embeds",
  ]
  optional += ["sample_size", "trained_betas", "variance_type"] + (["num_train_timesteps"] if "unet" in part else [])
  allowed = {key: [None] for key in optional} | {"freq_shift": [-1, -0.5], "_class_name": ["4", ""]}
  flags = ("add_attention", "flip_sin_to_cos", "center_input_sample", "clip_sample")
  allowed |= {key: [True] for key in flags}
  extra = {key: [v for v in values if v not in allowed.get(key, [])] for key, values in taken.items()}
  assert {key: values for key, values in extra.items() if values} == {}
