"""Test that our package and transformers read each other's folders of text encoders, with random weights."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from ddpm_jax import interop
from ddpm_jax.interop import text_configs
from ddpm_jax.networks import text
from tests.conftest import ROOT
from tests.test_text_encoders import bert, clip, random_peer, t5_encoder

load, read, save = (
  interop.transformers.load_text_encoder,
  interop.transformers.read_text_encoder,
  interop.transformers.save_text_encoder,
)
WEIGHTS = "model.safetensors"
MODELS = {
  "clip": clip(eos_token_id=2),
  "projection": clip(projection=True, hidden_act="gelu_new", projection_dim=16),
  "t5": t5_encoder(feed_forward_proj="gated-gelu"),
  "decoder": t5_encoder("T5ForConditionalGeneration", feed_forward_proj="gelu"),
  "bert": bert(type_vocab_size=3),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """Return a function that writes a model once, and returns the model and its folder.

  Tests must not change the model or the folder.
  """

  @functools.cache
  def write(name):
    peer, folder = random_peer(*MODELS[name]), tmp_path_factory.mktemp("text") / name
    peer.save_pretrained(folder)
    return peer, folder

  return write


@pytest.fixture
def copy(written, tmp_path):
  return lambda name: shutil.copytree(written(name)[1], tmp_path / "copy")


def assert_same(tree, other):
  jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), tree, other)


@pytest.mark.parametrize("name", MODELS)
def test_round_trips_are_exact(name, written, tmp_path):
  peer, folder = written(name)
  encoder, params = load(folder)
  save(tmp_path, encoder, params)
  model = transformers.T5EncoderModel if name == "decoder" else type(peer)
  again, info = model.from_pretrained(tmp_path, output_loading_info=True)
  assert not any(info.values()), info
  assert again.dtype == torch.float32
  ours, theirs = again.state_dict(), peer.state_dict()
  for key, value in ours.items():
    assert torch.equal(value, theirs[key])
  assert ours.keys() == theirs.keys() - {key for key in theirs if key.startswith(("decoder.", "lm_head."))}
  ids = torch.arange(3, 11)[None]
  with torch.no_grad():
    expected = (peer.encoder if name == "decoder" else peer)(input_ids=ids).last_hidden_state
    assert torch.equal(again(input_ids=ids).last_hidden_state, expected)
  other, same = load(tmp_path)
  assert other == encoder
  assert_same(same, params)


def test_files_have_the_names_of_every_version_of_transformers(written, tmp_path):
  """Our files have the prefix "text_model.", which older versions require and version 5 accepts."""
  for name in ("clip", "projection"):
    save(tmp_path / name, *load(written(name)[1]))
    names = set(safetensors.torch.load_file(tmp_path / name / WEIGHTS))
    assert all(name.startswith("text_model.") for name in names - {"text_projection.weight"})


def rewrite(folder, change):
  """Replace the weights of a folder by `change(weights)`."""
  state = safetensors.torch.load_file(folder / WEIGHTS)
  safetensors.torch.save_file(change(state), folder / WEIGHTS, {"format": "pt"})


def set_config(**changes):
  def change(folder):
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in (config | changes).items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))

  return change


def to_old_names(folder):
  def change(state):
    old = {f"text_model.{name}".replace("text_model.text_", "text_"): value for name, value in state.items()}
    return old | {"text_model.embeddings.position_ids": torch.arange(12)[None]}

  rewrite(folder, change)


def to_flat_names(folder):
  rewrite(folder, lambda state: {name.removeprefix("text_model."): value for name, value in state.items()})


def to_variant(folder):
  rewrite(folder, lambda state: {name: value.bfloat16() for name, value in state.items()})
  (folder / WEIGHTS).rename(folder / "model.fp16.safetensors")


def to_shards(folder):
  (name,) = json.loads((folder / "config.json").read_text())["architectures"]
  getattr(transformers, name).from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
  (folder / WEIGHTS).unlink(missing_ok=True)
  assert len(list(folder.glob("*-of-*"))) > 2


def to_pickle(folder):
  torch.save(safetensors.torch.load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
  (folder / WEIGHTS).unlink()


def to_part(folder):
  part = folder / "text_encoder_2"
  part.mkdir()
  for file in (WEIGHTS, "config.json"):
    (folder / file).rename(part / file)


def to_two_tables(folder):
  rewrite(folder, lambda state: state | {"encoder.embed_tokens.weight": state["shared.weight"].clone()})


def to_another_table(folder):
  rewrite(
    folder, lambda state: {name.replace("shared.", "encoder.embed_tokens."): value for name, value in state.items()}
  )


def to_old_norms(folder):
  def change(state):
    names = {name: name.replace("LayerNorm.weight", "LayerNorm.gamma") for name in state}
    names = {name: new.replace("LayerNorm.bias", "LayerNorm.beta") for name, new in names.items()}
    buffers = {"embeddings.position_ids": torch.arange(12)[None]}
    return {names[name]: value for name, value in state.items()} | buffers

  rewrite(folder, change)


def to_old_config(folder):
  """Write a config as transformers 4 did, with generic keys and without "architectures"."""
  set_config(
    architectures=None,
    torch_dtype="float16",
    dtype="absent",
    gradient_checkpointing=False,
    num_beams=1,
    repetition_penalty=1.0,
    id2label={"0": "LABEL_0"},
    pruned_heads={},
    _name_or_path="somewhere",
  )(folder)


def remove_default_keys(folder):
  """Remove the keys whose values are the defaults of the config's class."""
  config, model = json.loads((folder / "config.json").read_text()), transformers.AutoConfig.from_pretrained(folder)
  defaults = type(model)().to_dict()
  kept = {key: value for key, value in config.items() if key == "architectures" or value != defaults.get(key)}
  kept["model_type"] = config["model_type"]
  assert len(kept) < len(config) - 5
  (folder / "config.json").write_text(json.dumps(kept))


FORMS = {
  "names of version 4": (("clip",), to_old_names),
  "names of version 5": (("clip", "projection"), to_flat_names),
  "variant": (("clip",), to_variant),
  "shards": (("t5", "projection"), to_shards),
  "pickled tensors": (("bert", "decoder"), to_pickle),
  "part of a pipeline": (("projection",), to_part),
  "two tables of tokens": (("t5", "decoder"), to_two_tables),
  "another name of the table": (("t5",), to_another_table),
  "old names of norms": (("bert",), to_old_norms),
  "old config": (("clip", "t5", "bert"), to_old_config),
  "missing keys": (("clip", "projection", "t5", "bert"), remove_default_keys),
}


@pytest.mark.parametrize(("name", "form"), [(name, form) for form, (names, _) in FORMS.items() for name in names])
def test_every_form_of_a_folder_gives_the_same_encoder(name, form, written, copy):
  folder = copy(name)
  FORMS[form][1](folder)
  (encoder, params), (other, same) = (
    load(written(name)[1]),
    load(folder, part="text_encoder_2" * (folder / "text_encoder_2").is_dir()),
  )
  assert encoder == other
  tolerance = 1e-2 if form == "variant" else 0
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=tolerance, rtol=0), same, params)


def test_defaults_are_those_of_transformers():
  """A config that has only "architectures" and "model_type" describes transformers' default model."""
  for name in ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "BertModel"):
    config = getattr(transformers, name).config_class()
    minimal = {"architectures": [name], "model_type": config.model_type}
    assert text_configs.from_config(minimal) == text_configs.from_config(config.to_dict() | minimal)


@pytest.mark.parametrize(
  "name", ["gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_accurate", "quick_gelu", "relu", "silu"]
)
def test_activations_match_transformers(name):
  x = np.linspace(-6, 6, 101, dtype=np.float32)
  expected = transformers.activations.ACT2FN[name](torch.tensor(x)).numpy()
  function = text.blocks.ACTIVATIONS[text_configs.from_config({"model_type": "bert", "hidden_act": name}).activation]
  np.testing.assert_allclose(function(x), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_new", "silu", "gated-gelu", "gated-relu", "gated-gelu_python"])
def test_feed_forward_options_of_t5_are_read_and_written(name):
  config = transformers.T5Config(feed_forward_proj=name).to_dict() | {"architectures": ["T5EncoderModel"]}
  encoder = text_configs.from_config(config)
  assert encoder.gated == name.startswith("gated-")
  assert text_configs.to_config(encoder)["feed_forward_proj"] == name
  x = np.linspace(-6, 6, 101, dtype=np.float32)
  expected = transformers.activations.ACT2FN[config["dense_act_fn"]](torch.tensor(x)).numpy()
  np.testing.assert_allclose(text.blocks.ACTIVATIONS[encoder.activation](x), expected, atol=1e-6)


def test_shapes_are_known_without_reading_the_weights(copy):
  folder = copy("t5")
  encoder, params = load(folder, dtype="bfloat16")
  (folder / WEIGHTS).unlink()
  other, loader = read(folder, dtype="bfloat16")
  assert other == encoder
  assert encoder.dtype == jnp.bfloat16
  loaded, expected = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (params, loader.shapes()))
  assert loaded == expected
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(jnp.bfloat16)}
  with pytest.raises(ValueError, match=r"contains no weights; expected model\.safetensors, pytorch_model\.bin"):
    loader()


def pickle_code(folder):
  (folder / WEIGHTS).unlink()
  torch.save({"state_dict": subprocess.run}, folder / "pytorch_model.bin")


BROKEN = {
  "a missing tensor": (
    "clip",
    lambda folder: rewrite(folder, lambda s: {name: s[name] for name in s if name != "final_layer_norm.bias"}),
    "1 missing: text_model.final_layer_norm.bias",
  ),
  "an extra tensor": (
    "bert",
    lambda folder: rewrite(folder, lambda s: s | {"cls.bias": torch.ones(1)}),
    "1 extra: cls.bias",
  ),
  "both names of a tensor": (
    "projection",
    lambda folder: rewrite(folder, lambda s: s | {"final_layer_norm.bias": torch.ones(32)}),
    "1 extra: final_layer_norm.bias",
  ),
  "another vocabulary": ("t5", set_config(vocab_size=60), r"shared.weight \(50, 32\) instead of \(60, 32\)"),
  "more layers": ("t5", set_config(num_layers=3), r"missing: encoder\.block\.2"),
  "a tensor that is not finite": (
    "t5",
    lambda folder: rewrite(folder, lambda s: s | {"shared.weight": s["shared.weight"] * float("nan")}),
    "not finite in float32: shared.weight",
  ),
  "integers": (
    "bert",
    lambda folder: rewrite(folder, lambda s: s | {"pooler.dense.bias": torch.ones(32, dtype=torch.int8)}),
    "pooler.dense.bias of type I8; expected a dense float16",
  ),
  "code in weights": ("clip", pickle_code, "which needs code to load, and code in a file never runs here"),
  "code in a config": (
    "bert",
    set_config(auto_map={"AutoModel": "modeling.Model"}),
    "auto_map=.*modeling.Model.*, which refers to code in the folder",
  ),
  "remote code": ("bert", set_config(trust_remote_code=True), "trust_remote_code=True, which refers to code"),
  "a model for pictures and text": (
    "clip",
    set_config(architectures=["CLIPModel"]),
    r"\['CLIPModel'\].*expected one of",
  ),
  "a part of another model": ("clip", set_config(model_type="clip"), "model_type='clip'; expected 'clip_text_model'"),
  "UMT5": (
    "t5",
    set_config(architectures=["UMT5EncoderModel"], model_type="umt5"),
    r"\['UMT5EncoderModel'\].*UMT5 is not supported",
  ),
  "no class": (
    "bert",
    set_config(architectures="absent", model_type="absent"),
    "architectures=None and model_type=None",
  ),
  "two classes": ("bert", set_config(architectures=["BertModel", "BertModel"]), "architectures=.*expected one of"),
  "a class that is no name": ("bert", set_config(architectures=[1]), "architectures=.*expected a list of strings"),
  "a decoder": ("bert", set_config(is_decoder=True), "is_decoder=True, which is not supported; expected False"),
  "relative positions": (
    "bert",
    set_config(position_embedding_type="relative_key"),
    "position_embedding_type='relative_key'",
  ),
  "removed heads": ("bert", set_config(pruned_heads={"0": [1]}), "pruned_heads="),
  "an unknown option": (
    "clip",
    set_config(use_magic=0),
    "use_magic=0, which is not supported; expected a config without",
  ),
  "an unknown activation": ("clip", set_config(hidden_act="gelu_10"), "hidden_act='gelu_10', which is not supported"),
  "an unknown feed-forward": ("t5", set_config(feed_forward_proj="gated-x", dense_act_fn="x"), "feed_forward_proj='x'"),
  "contradicting options": ("t5", set_config(feed_forward_proj="relu"), "dense_act_fn='gelu_new'; expected 'relu'"),
  "a size of another type": ("bert", set_config(hidden_size="32"), "hidden_size='32'; expected an integer"),
  "several ends": ("clip", set_config(eos_token_id=[2, 3]), r"eos_token_id=\[2, 3\]; expected an integer"),
  "no projection": ("projection", set_config(projection_dim=0), "projection_dim=0; expected 1 or more"),
  "heads that do not divide": ("bert", set_config(num_attention_heads=5), "channels=32 with heads=5"),
  "a gigantic size": ("bert", set_config(hidden_size=2**40), "more than any machine has"),
  "a config that is no object": (
    "bert",
    lambda folder: (folder / "config.json").write_text("[1]"),
    "expected a JSON object",
  ),
  "no config": ("bert", lambda folder: (folder / "config.json").unlink(), "has no config.json of a text encoder"),
  "a part that is not chosen": (
    "clip",
    to_part,
    "no config.json of a text encoder; .* For this folder, set part to 'text_encoder_2'",
  ),
  "two variants": (
    "clip",
    lambda folder: (
      shutil.copy(folder / WEIGHTS, folder / "model.a.safetensors"),
      (folder / WEIGHTS).rename(folder / "model.b.safetensors"),
    ),
    r"several weights files: model\.a\.safetensors, model\.b\.safetensors",
  ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_clear_error(case, copy):
  name, change, message = BROKEN[case]
  folder = copy(name)
  change(folder)
  with pytest.raises(ValueError, match=message):
    load(folder)


def test_wrong_arguments_are_errors(written, tmp_path):
  folder = written("bert")[1]
  with pytest.raises(ValueError, match="Got dtype='float16'; expected 'float32' or 'bfloat16'"):
    read(folder, dtype="float16")
  with pytest.raises(ValueError, match="which is not a folder"):
    load(tmp_path / "nothing")
  encoder, params = load(folder)
  with pytest.raises(ValueError, match="which is not an empty folder"):
    save(folder, encoder, params)
  with pytest.raises(ValueError, match="Got a Dense as text encoder; expected one of networks.text: CLIPText"):
    save(tmp_path / "b", nn.Dense(3), params)
  assert not (tmp_path / "b").exists()


def test_a_name_on_the_hub_is_read_from_its_cache(written, tmp_path, monkeypatch):
  """The test uses the package huggingface_hub offline, with a cache in the format of the hub."""
  import huggingface_hub

  for repository, part in (("alone", ""), ("pipeline", "text_encoder")):
    cache = tmp_path / f"models--owner--{repository}"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    shutil.copytree(written("clip")[1], cache / "snapshots" / ("a" * 40) / part)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  expected = load(written("clip")[1])[1]
  assert_same(load("owner/alone")[1], expected)
  assert_same(load("owner/pipeline", part="text_encoder")[1], expected)
  assert_same(read("owner/pipeline", part="text_encoder")[1](), expected)


MEASURE = """
import sys
import jax
from ddpm_jax import interop

def status(key):
  return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

small, large, dtype = sys.argv[1:]
# Load a small network first, so that the memory of JAX and other libraries does not count.
jax.block_until_ready(interop.transformers.load_text_encoder(small, dtype=dtype)[1])
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
params = interop.transformers.load_text_encoder(large, dtype=dtype)[1]
jax.block_until_ready(params)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_loading_needs_little_more_memory_than_the_parameters(dtype, written, tmp_path):
  encoder = text.CLIPText(vocabulary=20_000, layers=6)
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
  save(tmp_path, encoder, jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes))
  command = [sys.executable, "-c", MEASURE, written("t5")[1], tmp_path, dtype]
  output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
  size = sum(leaf.size for leaf in jax.tree.leaves(shapes)) * (2 if dtype == "bfloat16" else 4)
  # The table of tokens is read in float32.
  allowed = 1.3 * size + 4 * max(leaf.size for leaf in jax.tree.leaves(shapes))
  assert int(output.splitlines()[-1]) < allowed
