"""Compare models of PixArt's pipelines with diffusers' pipelines, live, from the same noise."""

import functools
import inspect
import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from ddpm_jax import interop
from ddpm_jax.data import FRAMING
from ddpm_jax.interop import transformer_conditions
from ddpm_jax.models.guided import Parameters
from tests.test_interop_pipelines import assert_one_gray_level
from tests.test_interop_pixart import random_peer
from tests.test_interop_stable_diffusion import sample_ours, sample_peer
from tests.text_pipelines import FACTOR, autoencoder
from tests.tokenizer_folders import train_sentencepiece

WIDTH = 20
NETWORK = {
  "num_layers": 2,
  "num_attention_heads": 2,
  "attention_head_dim": 12,
  "cross_attention_dim": 24,
  "caption_channels": WIDTH,
}
# The class, the height and width of the latents, and the options of the transformer. At a sample_size of 128,
# PixArtAlphaPipeline passes sizes to the network.
PIPELINES = {
  "alpha": ("PixArtAlphaPipeline", (8, 8), NETWORK | {"sample_size": 8}),
  "alpha, 1024": ("PixArtAlphaPipeline", (8, 12), NETWORK | {"sample_size": 128}),
  "sigma": ("PixArtSigmaPipeline", (8, 6), NETWORK | {"sample_size": 128, "use_additional_conditions": False}),
}
# Prompts with upper case and white space at the ends, which the pipelines remove.
PROMPTS = ["  A Red FOX in snow!\n", "An oil painting of 7 ships"]


@functools.cache
def t5():
  torch.manual_seed(0)
  config = transformers.T5Config(
    vocab_size=640,
    d_model=WIDTH,
    d_kv=8,
    d_ff=32,
    num_layers=2,
    num_heads=2,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
  )
  peer = transformers.T5EncoderModel(config).eval()
  with torch.no_grad():
    for parameter in peer.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  return peer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return transformers.T5Tokenizer.from_pretrained(train_sentencepiece(tmp_path_factory.mktemp("t5")))


@pytest.fixture(scope="module")
def written(tmp_path_factory, tokenizer):
  """Return a function that writes a pipeline once, and returns the pipeline, its folder, our model and parameters."""

  @functools.cache
  def write(name):
    kind, size, options = PIPELINES[name]
    pipeline = getattr(diffusers, kind)(
      tokenizer=tokenizer,
      text_encoder=t5(),
      vae=autoencoder(),
      transformer=random_peer(options),
      scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("pixart") / "pipeline"
    pipeline.save_pretrained(folder)
    height, width = (FACTOR * side for side in size)
    model, params = interop.diffusers.load(folder, shape=(height, width, 3))
    return pipeline, folder, model, Parameters(params, model.load_frozen())

  return write


def noise_of(name):
  return np.random.default_rng(5).standard_normal((2, *PIPELINES[name][1], 4)).astype(np.float32)


def peer_images(pipeline, name, scale=4.5, **options):
  height, width = (FACTOR * side for side in PIPELINES[name][1])
  # This test has its own sizes, and the packages that clean captions may be installed.
  options |= {"height": height, "width": width, "use_resolution_binning": False, "clean_caption": False}
  return sample_peer(pipeline, "own", scale, latents=noise_of(name), **options)


@pytest.mark.parametrize("name", PIPELINES)
def test_samples_match_the_pipeline(name, written):
  one = written(name)
  ours = sample_ours(one, "own", 4.5, noise_of(name), text=PROMPTS)
  assert_one_gray_level(ours, peer_images(one[0], name, prompt=PROMPTS))


def test_negative_prompts_match_the_pipeline(written):
  one, negative = written("alpha"), ["Blurry ", ""]
  ours = sample_ours(one, "own", 4.5, noise_of("alpha"), text=PROMPTS, negative_text=negative)
  assert_one_gray_level(ours, peer_images(one[0], "alpha", prompt=PROMPTS, negative_prompt=negative))


def test_samples_without_guidance_match_the_pipeline(written):
  one = written("alpha")
  ours = sample_ours(one, "own", 1.0, noise_of("alpha"), text=PROMPTS)
  assert_one_gray_level(ours, peer_images(one[0], "alpha", 1.0, prompt=PROMPTS))


@pytest.mark.parametrize("name", PIPELINES)
def test_defaults_are_those_of_the_pipeline(name, written):
  pipeline, _, model, _ = written(name)
  defaults = {key: one.default for key, one in inspect.signature(pipeline.__call__).parameters.items()}
  assert model.defaults.guidance_scale == defaults["guidance_scale"]
  assert model.defaults.steps == defaults["num_inference_steps"]
  assert model.defaults.name == "dpmpp_2m"
  tokens = model.conditions["text"].shape
  assert tokens["states"].shape == (defaults["max_sequence_length"], WIDTH)
  assert tokens["mask"].shape == (defaults["max_sequence_length"],)
  assert set(model.conditions) == ({"text", "sizes"} if name == "alpha, 1024" else {"text"})


@pytest.mark.parametrize("name", ["alpha, 1024", "sigma"])
def test_saved_pipelines_are_opened_by_the_peer(name, written, tmp_path):
  one, parameters = written(name), written(name)[3]
  interop.diffusers.save(tmp_path / "saved", one[2], parameters.params, frozen=parameters.frozen)
  again = getattr(diffusers, PIPELINES[name][0]).from_pretrained(tmp_path / "saved")
  again.set_progress_bar_config(disable=True)
  np.testing.assert_array_equal(*(peer_images(pipeline, name, prompt=PROMPTS) for pipeline in (one[0], again)))
  model, params = interop.diffusers.load(tmp_path / "saved", shape=one[2].data_shape)
  assert model.network.module == one[2].network.module
  jax.tree.map(np.testing.assert_array_equal, params, parameters.params)
  first, second = (
    json.loads((folder / "transformer" / "config.json").read_text()) for folder in (one[1], tmp_path / "saved")
  )
  explicit = {"use_additional_conditions": name == "alpha, 1024", "interpolation_scale": 2}
  assert second == {key: first[key] for key in second} | explicit


def test_a_copy_without_the_weights_of_the_network_is_read(written, tmp_path):
  _, folder, model, _ = written("alpha")
  interop.diffusers.copy_config(folder, tmp_path / "copy")
  again = interop.diffusers.read(tmp_path / "copy")
  assert again.network.module == model.network.module
  assert not list((tmp_path / "copy" / "transformer").glob("*.safetensors"))


def test_folders_of_the_old_class_are_read(written, tmp_path):
  """The first published folders have a Transformer2DModel."""
  _, folder, model, _ = written("alpha")
  copy = shutil.copytree(folder, tmp_path / "copy")
  edit(copy / "model_index.json", {"transformer": ["diffusers", "Transformer2DModel"]})
  edit(copy / "transformer" / "config.json", {"_class_name": "Transformer2DModel", "num_vector_embeds": None})
  assert interop.diffusers.read(copy).network.module == model.network.module


def edit(file, changes):
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def remove(folder):
  shutil.rmtree(folder / "text_encoder")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (remove, "lacks the folder text_encoder/"),
    (
      lambda folder: edit(folder / "model_index.json", {"text_encoder": [None, None], "tokenizer": [None, None]}),
      "a PixArtAlphaPipeline without text_encoder; expected the parts",
    ),
    (
      lambda folder: edit(folder / "model_index.json", {"tokenizer": ["transformers", "CLIPTokenizer"]}),
      "tokenizer is a 'CLIPTokenizer'; expected T5Tokenizer",
    ),
    (
      lambda folder: edit(folder / "model_index.json", {"transformer": ["diffusers", "UNet2DConditionModel"]}),
      "transformer is a 'UNet2DConditionModel'; expected PixArtTransformer2DModel",
    ),
    (
      lambda folder: edit(folder / "transformer" / "config.json", {"caption_channels": 12}),
      f"Got a T5 encoder with {WIDTH} features and a transformer with 12 features of text",
    ),
    (
      lambda folder: edit(folder / "transformer" / "config.json", {"out_channels": 6}),
      "network has 6 output channels for latents of 4",
    ),
    (
      lambda folder: edit(folder / "transformer" / "config.json", {"in_channels": 3, "out_channels": 6}),
      "3 channels and an autoencoder with latent_channels=4",
    ),
    (
      lambda folder: edit(folder / "text_encoder" / "config.json", {"vocab_size": 300}),
      "for a text encoder of 300 embeddings",
    ),
  ],
)
def test_folders_whose_parts_do_not_fit_are_errors(change, message, written, tmp_path):
  copy = shutil.copytree(written("alpha")[1], tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
  change(copy)
  with pytest.raises(ValueError, match=message):
    interop.diffusers.read(copy)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"shape": (32, 36, 3)}, "Got data of sides 8 x 9 for patches of side 2"),
    ({"shape": (32, 30, 3)}, "sides divisible by 4"),
    ({"dropout": 0.1}, "Got dropout=0.1 for a networks.PixArt, which has no dropout"),
    ({"class_dropout": 0.1}, "Got class_dropout=0.1 for a text pipeline"),
  ],
)
def test_bad_options_are_errors(options, message, written):
  with pytest.raises(ValueError, match=message):
    interop.diffusers.read(written("alpha")[1], **options)


def test_sizes_come_from_the_framing_of_the_data():
  condition = transformer_conditions.sizes_and_ratio((64, 32, 3))
  framing = np.array([[500, 400, 3, 0, 64, 32], [200, 100, 0, 7, 48, 40]], np.float32)
  np.testing.assert_allclose(condition.from_data({FRAMING: framing}), [[500, 400, 2], [200, 100, 1.2]])
  for rows in (condition.from_data({"image": np.zeros((2, 64, 32, 3))}), condition.default(2)):
    np.testing.assert_allclose(rows, [[64, 32, 2]] * 2)


def test_text_that_does_not_fit_is_named_as_it_was_written(written):
  """Characters such as a capital I with a dot become two characters in lower case."""
  model = written("alpha")[2]
  for words in ("Fox ", "İstanbul "):
    text = "\t" + words * 200 + "\n"
    (dropped,) = model.conditions["text"].unread([text])
    assert dropped
    assert text.rstrip().endswith(dropped.rstrip())
    kept = text[: text.rindex(dropped)]
    assert model.conditions["text"].unread([kept]) == [""]
    assert model.conditions["text"].unread([kept + dropped[:10]]) != [""]


def test_prompts_and_sizes_change_the_samples(written):
  one, x = written("alpha, 1024"), noise_of("alpha, 1024")
  first, second, third = (
    sample_ours(one, "own", 4.5, x, text=text, **items)
    for text, items in ((PROMPTS, {}), (PROMPTS[::-1], {}), (PROMPTS, {"sizes": np.float32([[32, 32, 1]] * 2)}))
  )
  assert np.max(np.abs(first.astype(int) - second)) > 10
  assert np.max(np.abs(first.astype(int) - third)) > 10


@pytest.mark.usefixtures("on_one_device")
def test_the_command_line_samples_and_edits_with_a_folder(written, run_command, tmp_path):
  folder = written("alpha")[1]
  Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "picture.png")
  common = (f"--workdir={tmp_path}", f"--pretrained={folder}", "--num_steps=2", "--prompt=A red Fox")
  run_command("--mode=sample", *common, "--prompt=two ships", "--guidance_scale=3")
  with np.load(next((tmp_path / "samples").glob("*.npz"))) as arrays:
    samples = arrays["samples"]
  assert samples.shape == (2, 32, 32, 3)
  run_command("--mode=edit", *common, "--task=img2img", f"--input={tmp_path / 'picture.png'}", "--strength=1")
  with np.load(next((tmp_path / "edits").glob("*.npz"))) as arrays:
    assert arrays["output"].shape[-3:] == (32, 32, 3)
  run_command("--mode=plan", f"--pretrained={folder}", "--devices=1", "--num_samples=1")


@pytest.mark.usefixtures("on_one_device", "unscored")
def test_a_folder_is_fine_tuned_and_exported(written, run_command, tmp_path):
  _, folder, _, parameters = written("alpha")
  (tmp_path / "images").mkdir()
  rng = np.random.default_rng(0)
  lines = [{"file_name": f"{index}.png", "text": PROMPTS[index % 2]} for index in range(8)]
  for line in lines:
    Image.fromarray(rng.integers(0, 256, (40, 36, 3), np.uint8)).save(tmp_path / "images" / line["file_name"])
  (tmp_path / "images" / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  keys = {
    "init_from": folder,
    "data.source.path": tmp_path / "images",
    "data.image_size": 32,
    "data.hold_out": 2,
    "model.network.remat": "none",
    "training.batch_size": 2,
    "training.steps": 2,
    "training.checkpoint_every": 2,
    "sampling.num_steps": 2,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 0,
    "evaluation.num_samples": 2,
    "evaluation.k": 1,
  }
  flags = ["--config=configs/sd15_finetune.py", *(f"--config.{name}={value}" for name, value in keys.items())]
  run_command(*flags, f"--workdir={tmp_path / 'run'}")
  run_command("--mode=export", f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'exported'}")
  _, params = interop.diffusers.load(tmp_path / "exported")
  changes = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), params, parameters.params)
  assert 0 < max(jax.tree.leaves(changes)) < 3e-3
  again = diffusers.PixArtAlphaPipeline.from_pretrained(tmp_path / "exported")
  again.set_progress_bar_config(disable=True)
  assert peer_images(again, "alpha", prompt=PROMPTS).shape == (2, 32, 32, 3)
