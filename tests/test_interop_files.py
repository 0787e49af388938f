"""Test how the weights and JSON files of other libraries are read, including damaged files."""

import fnmatch
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.torch
import torch

from ddpm_jax import interop
from ddpm_jax.interop import folders, hub
from tests.test_interop_diffusers import weights_path, write_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Write a pipeline that all tests share and must not change."""
  return write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def copy(folder, tmp_path):
  return shutil.copytree(folder, tmp_path / "copy")


def write_weights(name, state, folder):
  """Write tensors to a file in the folder of the network."""
  file = folder / "unet" / name
  if file.suffix == ".safetensors":
    safetensors.torch.save_file(state, file)
  else:
    torch.save(state, file)


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
  state = safetensors.torch.load_file(weights_path(copy))
  weights_path(copy).unlink()
  write_weights("diffusion_pytorch_model.bin", WRAPPED[name](state), copy)
  jax.tree.map(np.testing.assert_array_equal, interop.diffusers.load(copy)[1], interop.diffusers.load(folder)[1])


UNCLEAR = {
  "two networks": (lambda s: {"ema": s, "model": dict(s)}, "2 networks, under ema, model; expected one"),
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


def assert_refused(folder, make, message):
  """Assert that reading a folder with the weights `make(weights)` is an error that names the file."""
  state = safetensors.torch.load_file(weights_path(folder))
  weights_path(folder).unlink()
  write_weights("diffusion_pytorch_model.bin", make(state), folder)
  with pytest.raises(ValueError, match=rf"diffusion_pytorch_model\.bin.*{message}"):
    interop.diffusers.load(folder)


@pytest.mark.parametrize("name", UNCLEAR)
def test_a_checkpoint_without_exactly_one_network_is_described(name, copy):
  assert_refused(copy, *UNCLEAR[name])


def add_itself(state):
  state["again"] = {"and again": state}
  return state


def change_first(change):
  return lambda state: state | {"conv_in.weight": change(state["conv_in.weight"])}


UNUSABLE = {
  "itself alone": (lambda s: add_itself({}), r"contains again \(dict\); expected a state dict"),
  "an object": (
    lambda s: {"state_dict": s, "args": pathlib.PurePosixPath("flags")},
    r"contains pathlib\S*\.PurePosixPath, which needs code to load, and code in a file never runs here.*save model\.state_dict",
  ),
  "integers": (
    change_first(lambda t: t.to(torch.int8)),
    r"conv_in\.weight of type torch\.int8; expected a dense float16",
  ),
  "8 bits": (change_first(lambda t: t.to(torch.float8_e4m3fn)), r"conv_in\.weight of type torch\.float8"),
  "complex": (change_first(lambda t: t.to(torch.complex64)), r"conv_in\.weight of type torch\.complex64"),
  "sparse": (change_first(lambda t: t.to_sparse()), r"conv_in\.weight of type torch\.sparse_coo"),
  "no values": (change_first(lambda t: t.to("meta")), r"conv_in\.weight of type torch\.strided on meta"),
  "not a number": (
    change_first(lambda t: t * float("nan")),
    r"not finite in float32: conv_in\.weight\. Training diverged",
  ),
  "infinite in float32": (change_first(lambda t: t.double() + 1e300), r"not finite in float32: conv_in\.weight"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_tensors_that_cannot_be_parameters_are_refused_by_name(name, copy):
  assert_refused(copy, *UNUSABLE[name])


def test_safetensors_of_8_bits_are_refused_by_name(copy):
  state = change_first(lambda t: t.to(torch.float8_e4m3fn))(safetensors.torch.load_file(weights_path(copy)))
  write_weights("diffusion_pytorch_model.safetensors", state, copy)
  with pytest.raises(ValueError, match=r"\.safetensors with conv_in\.weight of type F8_E4M3; expected a dense float16"):
    interop.diffusers.load(copy)


@pytest.mark.parametrize("name", ["holds itself", "twice the same"])
def test_entries_that_refer_to_each_other_are_read_once(name, folder, copy):
  state = safetensors.torch.load_file(weights_path(copy))
  weights_path(copy).unlink()
  write_weights(
    "diffusion_pytorch_model.bin", add_itself(state) if name == "holds itself" else {"a": state, "b": state}, copy
  )
  jax.tree.map(np.testing.assert_array_equal, interop.diffusers.load(copy)[1], interop.diffusers.load(folder)[1])


@pytest.mark.parametrize("form", ["one file", "variant", "shards", "pickled variant"])
def test_a_name_on_the_hub_is_read_from_its_cache(form, copy, tmp_path, monkeypatch):
  """The test uses the package huggingface_hub offline, with a cache in the format of the hub."""
  import huggingface_hub

  if form != "one file":
    rewrite_weights(copy, FORMS[form])

  repository = tmp_path / "hub" / "models--owner--name"
  (repository / "refs").mkdir(parents=True)
  (repository / "refs" / "main").write_text("a" * 40)
  shutil.copytree(copy, repository / "snapshots" / ("a" * 40))
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  (model, params), (other, same) = (interop.diffusers.load(name) for name in ("owner/name", copy))
  assert model.network.module == other.network.module
  jax.tree.map(np.testing.assert_array_equal, params, same)


FORMS = {
  "variant": ["diffusion_pytorch_model.fp16.safetensors"],
  "pickled variant": ["diffusion_pytorch_model.fp16.bin"],
  "shards": [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)],
  "pickled shards": [f"diffusion_pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)],
  "shards of a variant": [f"diffusion_pytorch_model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)],
}


def rewrite_weights(folder, files, prefix=""):
  """Move the weights of a folder into `files`, and return the path of the index, or None for a single file."""
  state = {prefix + name: value for name, value in safetensors.torch.load_file(weights_path(folder)).items()}
  weights_path(folder).unlink()
  file_names = {name: files[i % len(files)] for i, name in enumerate(sorted(state))}
  for file in files:
    write_weights(file, {name: state[name].clone() for name in state if file_names[name] == file}, folder)
  if len(files) > 1:
    variant = ".fp16" if ".fp16" in files[0] else ""
    index = folder / "unet" / f"diffusion_pytorch_model.{files[0].rpartition('.')[2]}.index{variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": file_names}))
    return index
  return None


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_variants_and_shards_contain_the_same_parameters(name, prefix, folder, copy):
  rewrite_weights(copy, FORMS[name], prefix)
  jax.tree.map(np.testing.assert_array_equal, interop.diffusers.load(copy)[1], interop.diffusers.load(folder)[1])


def change_index(change):
  def damage(folder):
    index = rewrite_weights(folder, FORMS["shards"])
    content = json.loads(index.read_text())
    change(content, index)
    index.write_text(json.dumps(content))

  return damage


BROKEN_SHARDS = {
  "no index": (
    lambda f: rewrite_weights(f, FORMS["shards"]).unlink(),
    r"The folder contains .*00002-of-00002\.safetensors; save the model",
  ),
  "no shard": (
    change_index(lambda c, index: (index.parent / FORMS["shards"][1]).unlink()),
    r"lists diffusion_pytorch_model-00002-of-00002\.safetensors; expected all files of the index beside it",
  ),
  "another shard": (
    change_index(lambda c, index: c["weight_map"].update({"conv_in.bias": FORMS["shards"][1]})),
    r"does not match .*index\.json: missing tensors: none; extra tensors: conv_in\.bias",
  ),
  "another folder": (
    change_index(lambda c, index: c["weight_map"].update({"conv_in.bias": "../scheduler/x.safetensors"})),
    r"index\.json with weight_map=",
  ),
  "a name too long": (
    change_index(lambda c, index: c["weight_map"].update({"conv_in.bias": "x" * 300 + ".safetensors"})),
    r"x\.safetensors; expected all files of the index beside it",
  ),
  "no map": (change_index(lambda c, index: c.pop("weight_map")), r"index\.json with weight_map=None"),
  "a list": (change_index(lambda c, index: c.update(weight_map=[1])), r"index\.json with weight_map=\[1\]"),
  "numbers": (change_index(lambda c, index: c.update(weight_map={"conv_in.bias": 3})), r"index\.json with weight_map="),
  "two variants": (
    lambda f: (
      [write_weights(f"diffusion_pytorch_model.{name}.bin", {}, f) for name in ("fp16", "non_ema")]
      and weights_path(f).unlink()
    ),
    "expected one of them",
  ),
}


@pytest.mark.parametrize("name", BROKEN_SHARDS)
def test_broken_shards_give_one_clear_error(name, copy):
  damage, message = BROKEN_SHARDS[name]
  damage(copy)
  with pytest.raises(ValueError, match=message):
    interop.diffusers.load(copy)
  if "weight_map" in message:
    # Copies of a folder read the same index.
    with pytest.raises(ValueError, match=message):
      folders.weight_files(copy / "unet")


def test_weights_of_another_part_do_not_end_a_download(tmp_path, monkeypatch):
  """Downloads of all parts share a folder. Here, this folder also contains the weights of the autoencoder."""
  published = ("unet/diffusion_pytorch_model-00001-of-00001.safetensors", "vae/diffusion_pytorch_model.safetensors")

  def download(name, patterns, revision):
    for file in published:
      if file.startswith("vae/") or any(fnmatch.fnmatch(file, pattern) for pattern in patterns):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    return tmp_path

  monkeypatch.setattr(hub, "download", download)
  folders.find_folder("owner/name", parts=("unet",))
  assert all((tmp_path / file).exists() for file in published)


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
def test_files_without_a_json_object_are_refused_by_name(part, name, copy):
  file = copy / part
  if CONTENTS[name] is None:
    file.unlink()
    file.mkdir()
  else:
    file.write_bytes(CONTENTS[name])
  # A folder with the name of a file counts as a missing file, and model_index.json may be missing.
  if name == "a folder" and part == "model_index.json":
    interop.diffusers.load(copy)
    return
  with pytest.raises(ValueError, match=file.name.replace(".", r"\.")):
    interop.diffusers.load(copy)


# Values of each type, and numbers out of range. The test lists the values that each key accepts.
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
# Keys that have no effect on the model.
_IDLE = ("_diffusers_version", "dynamic_thresholding_ratio", "sample_max_value")


def try_wrong_values(copy, part, read):
  """Set each key of a file to each wrong value, and yield the key, the value and the error message of `read`.

  The message is None if `read` accepts the value.
  """
  file = copy / part
  original = json.loads(file.read_text())
  for key in original:
    for value in WRONG_VALUES if key not in _IDLE else []:
      file.write_text(json.dumps(original | {key: value}))
      try:
        read()
        yield key, value, None
      except ValueError as error:
        yield key, value, str(error)


@pytest.mark.parametrize("part", PARTS)
def test_values_of_wrong_types_are_errors_that_name_the_file(part, copy, monkeypatch):
  # This test is about configs, so it does not load parameters.
  monkeypatch.setattr(interop.diffusers, "load_params", lambda *_, **__: {})
  accepted = {}
  for key, value, message in try_wrong_values(copy, part, lambda: interop.diffusers.load(copy)):
    if message is None:
      accepted.setdefault(key, []).append(value)
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
  extra = {key: [v for v in values if v not in allowed.get(key, [])] for key, values in accepted.items()}
  assert {key: values for key, values in extra.items() if values} == {}
