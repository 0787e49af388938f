"""Compare models of StableDiffusion3Pipeline folders with diffusers' pipeline, live, from the same noise."""

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

from ddpm_jax import interop
from ddpm_jax.models.guided import Parameters
from tests.commands import call
from tests.test_interop_pipelines import assert_one_gray_level
from tests.test_interop_stable_diffusion import PROMPTS, sample_ours, sample_peer
from tests.text_pipelines import SIZE, autoencoder
from tests.tokenizer_folders import sd1_settings, sdxl_settings, train_sentencepiece, write_clip, write_settings

# The features of the tokens, of both CLIP encoders and of the pooled vectors of each.
WIDTH, CLIP, POOLED = 64, {"text_encoder": 24, "text_encoder_2": 32}, 20
NETWORK = {
  "sample_size": SIZE,
  "in_channels": 4,
  "out_channels": 4,
  "num_layers": 2,
  "attention_head_dim": 8,
  "num_attention_heads": 2,
  "caption_projection_dim": 16,
  "joint_attention_dim": WIDTH,
  "pooled_projection_dim": 2 * POOLED,
  "pos_embed_max_size": 6,
}
# The options of the transformer and of the scheduler, and whether the folder has T5.
PIPELINES = {
  "medium": ({}, {"shift": 3.0}, True),
  "3.5": ({"qk_norm": "rms_norm", "dual_attention_layers": (0,)}, {"shift": 3.0}, True),
  "without T5": ({}, {"shift": 3.0}, False),
  "dynamic shift": ({}, {"use_dynamic_shifting": True}, False),
}
NEGATIVE = ["blurry", ""]


def randomize(peer, seed=0):
  torch.manual_seed(seed)
  with torch.no_grad():
    for parameter in peer.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  return peer.eval()


@functools.cache
def clip(part):
  config = transformers.CLIPTextConfig(
    hidden_size=CLIP[part],
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    projection_dim=POOLED,
    hidden_act="quick_gelu" if part == "text_encoder" else "gelu",
    bos_token_id=49406,
    eos_token_id=49407,
    pad_token_id=1,
  )
  return randomize(transformers.CLIPTextModelWithProjection(config))


@functools.cache
def t5():
  options = {"d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
  config = transformers.T5Config(vocab_size=640, d_model=WIDTH, tie_word_embeddings=False, **options)
  return randomize(transformers.T5EncoderModel(config))


@functools.cache
def vae():
  """Return an autoencoder with a shift of the latents and without two convolutions, as in Stable Diffusion 3."""
  torch.manual_seed(0)
  options = {"shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False}
  return diffusers.AutoencoderKL(**{**autoencoder().config, **options}).eval()


def make_tokenizers(root):
  """Return the three tokenizers. Their files are written to subfolders of `root`."""
  first, second = (
    transformers.CLIPTokenizer.from_pretrained(write_settings(write_clip(root / write.__name__), write()))
    for write in (sd1_settings, sdxl_settings)
  )
  return first, second, transformers.T5Tokenizer.from_pretrained(train_sentencepiece(root / "t5"))


def make(name, tokenizers):
  """Return a small pipeline of diffusers with random parameters."""
  network, scheduler, has_t5 = PIPELINES[name]
  pipeline = diffusers.StableDiffusion3Pipeline(
    transformer=randomize(diffusers.SD3Transformer2DModel(**NETWORK | network)),
    vae=vae(),
    scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
    text_encoder=clip("text_encoder"),
    text_encoder_2=clip("text_encoder_2"),
    text_encoder_3=t5() if has_t5 else None,
    tokenizer=tokenizers[0],
    tokenizer_2=tokenizers[1],
    tokenizer_3=tokenizers[2] if has_t5 else None,
  )
  pipeline.set_progress_bar_config(disable=True)
  return pipeline


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """Return a function that writes a pipeline once, and returns the pipeline, its folder, our model and parameters."""
  tokenizers = make_tokenizers(tmp_path_factory.mktemp("tokenizers"))

  @functools.cache
  def write(name):
    pipeline = make(name, tokenizers)
    folder = tmp_path_factory.mktemp("sd3") / "pipeline"
    pipeline.save_pretrained(folder)
    model, params = interop.diffusers.load(folder)
    return pipeline, folder, model, Parameters(params, model.load_frozen())

  return write


def edit(file, **changes):
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("name", PIPELINES)
def test_samples_match_the_pipeline(name, written):
  one = written(name)
  ours = sample_ours(one, "own", 7.0, text=PROMPTS)
  assert_one_gray_level(ours, sample_peer(one[0], "own", 7.0, prompt=PROMPTS))


def test_negative_prompts_match_the_pipeline(written):
  one = written("medium")
  ours = sample_ours(one, "own", 7.0, text=PROMPTS, negative_text=NEGATIVE)
  assert_one_gray_level(ours, sample_peer(one[0], "own", 7.0, prompt=PROMPTS, negative_prompt=NEGATIVE))


def test_samples_without_guidance_match_the_pipeline(written):
  one = written("medium")
  assert_one_gray_level(sample_ours(one, "own", 1.0, text=PROMPTS), sample_peer(one[0], "own", 1.0, prompt=PROMPTS))


@pytest.mark.parametrize("name", ["medium", "without T5"])
def test_the_text_is_encoded_as_by_the_pipeline(name, written):
  """The states of 77 tokens of CLIP come first, then 256 states of T5, or zeros."""
  pipeline, _, model, parameters = written(name)
  condition = model.conditions["text"]
  batch = {"text": condition.host(np.array(PROMPTS))}
  found = jax.jit(lambda frozen: condition.encode(frozen, None, batch, False))(parameters.frozen["conditions"]["text"])
  with torch.no_grad():
    states, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None)
  assert found["tokens"].shape == (2, 77 + 256, WIDTH)
  np.testing.assert_allclose(found["tokens"], states, atol=1e-4)
  np.testing.assert_allclose(found["vector"], pooled, atol=1e-4)


def test_defaults_are_those_of_the_pipeline(written):
  pipeline, _, model, _ = written("medium")
  defaults = {key: one.default for key, one in inspect.signature(pipeline.__call__).parameters.items()}
  assert model.defaults.guidance_scale == defaults["guidance_scale"]
  assert model.defaults.steps == defaults["num_inference_steps"]
  assert (model.defaults.name, set(model.conditions)) == ("euler", {"text"})


@pytest.mark.parametrize("name", ["3.5", "without T5"])
def test_saved_pipelines_are_opened_by_the_peer(name, written, tmp_path):
  pipeline, _, model, parameters = written(name)
  interop.diffusers.save(tmp_path / "saved", model, parameters.params, frozen=parameters.frozen)
  # diffusers reads a folder without T5 only with these arguments.
  absent = {} if PIPELINES[name][2] else {"text_encoder_3": None, "tokenizer_3": None}
  again = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "saved", **absent)
  again.set_progress_bar_config(disable=True)
  assert (again.text_encoder_3 is None) == (pipeline.text_encoder_3 is None)
  for part in ("scheduler", "transformer"):
    configs = [{k: v for k, v in getattr(one, part).config.items() if k[0] != "_"} for one in (again, pipeline)]
    assert json.loads(json.dumps(configs[0])) == json.loads(json.dumps(configs[1]))
  pictures = [sample_peer(one, "own", 7.0, prompt=PROMPTS) for one in (again, pipeline)]
  np.testing.assert_array_equal(*pictures)
  other, params = interop.diffusers.load(tmp_path / "saved")
  assert other.network.module == model.network.module
  jax.tree.map(np.testing.assert_array_equal, params, parameters.params)
  jax.tree.map(np.testing.assert_array_equal, other.load_frozen(), parameters.frozen)


def test_a_copy_without_the_weights_of_the_network_is_read(written, tmp_path):
  _, folder, model, parameters = written("without T5")
  interop.diffusers.copy_config(folder, tmp_path / "copy")
  again = interop.diffusers.read(tmp_path / "copy")
  assert again.network.module == model.network.module
  jax.tree.map(np.testing.assert_array_equal, again.load_frozen(), parameters.frozen)
  assert not list((tmp_path / "copy" / "transformer").glob("*.safetensors"))


@pytest.mark.parametrize(
  ("file", "changes", "message"),
  [
    (
      "model_index.json",
      {"text_encoder_2": [None, None], "tokenizer_2": [None, None]},
      "without text_encoder_2; expected the parts transformer, vae, scheduler, text_encoder, text_encoder_2, tokenizer",
    ),
    ("model_index.json", {"tokenizer_3": [None, None]}, "without tokenizer_3"),
    ("model_index.json", {"text_encoder": ["transformers", "CLIPTextModel"]}, "expected CLIPTextModelWithProjection"),
    ("model_index.json", {"transformer": ["diffusers", "PixArtTransformer2DModel"]}, "expected SD3Transformer2DModel"),
    ("model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]}, "with the part unet; expected only transf"),
    (
      "transformer/config.json",
      {"joint_attention_dim": 72},
      "Got a T5 encoder with 64 features and a transformer with",
    ),
    (
      "transformer/config.json",
      {"joint_attention_dim": 40},
      "with 56 features and a transformer with 40 .* at most 40",
    ),
    (
      "transformer/config.json",
      {"pooled_projection_dim": 48},
      "pooled vectors of 40 features .*pooled_projection_dim=48",
    ),
    ("transformer/config.json", {"in_channels": 6, "out_channels": 6}, "6 channels and an autoencoder with latent_ch"),
    (
      "transformer/config.json",
      {"pos_embed_max_size": 3},
      "sides of at most 6, because the table has no more positions",
    ),
    ("transformer/config.json", {"_class_name": "UNet2DModel"}, "UNet2DModel"),
    ("scheduler/scheduler_config.json", {"stochastic_sampling": True}, "stochastic_sampling=True"),
  ],
)
def test_folders_whose_parts_do_not_fit_are_errors(file, changes, message, written, tmp_path):
  copy = shutil.copytree(written("medium")[1], tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
  edit(copy / file, **changes)
  with pytest.raises(ValueError, match=message):
    interop.diffusers.read(copy)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"shape": (32, 36, 3)}, "Got data of sides 8 x 9 for patches of side 2"),
    ({"shape": (64, 32, 3)}, "sides of at most 12"),
    ({"dropout": 0.1}, "Got dropout=0.1 for a networks.MMDiT, which has no dropout"),
  ],
)
def test_bad_options_are_errors(options, message, written):
  with pytest.raises(ValueError, match=message):
    interop.diffusers.read(written("medium")[1], **options)


def test_the_command_line_samples_from_prompts(written, tmp_path):
  arguments = [f"--workdir={tmp_path}", f"--pretrained={written('medium')[1]}", "--prompt=a red fox", "--num_steps=2"]
  code, output = call("--mode=sample", *arguments, "--size=24x40", "--dtype=bfloat16", "--negative_prompt=blurry")
  assert code == 0, output
  (path,) = (tmp_path / "samples").glob("*.npz")
  assert np.load(path)["samples"].shape == (1, 24, 40, 3)
