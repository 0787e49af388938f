"""Compare models of text pipelines with diffusers' pipelines, live, from the same noise."""

import functools
import json
import re
import shutil

import diffusers
import jax
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from diffusers.loaders import single_file_utils
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img, pipeline_stable_diffusion_inpaint
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_inpaint
from PIL import Image

from ddpm_jax import editing, guidance, interop, predictions, randomness, sampling
from ddpm_jax.interop import ldm, schedulers
from ddpm_jax.models import guided, inputs
from ddpm_jax.models.guided import Parameters
from ddpm_jax.storage import images
from tests import text_pipelines
from tests.commands import assert_refused, call
from tests.test_interop_ldm import stored
from tests.test_interop_pipelines import assert_one_gray_level
from tests.text_pipelines import SD, as_torch, noise

PROMPTS = ["a red fox in snow!", "An oil painting of 7 ships"]
SAMPLERS = {
  "own": None,
  "ddim": diffusers.DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
  "euler": text_pipelines.EULER,
  "dpmpp_2m": diffusers.DPMSolverMultistepScheduler(**SD, timestep_spacing="leading", steps_offset=1),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """Return a function that writes a pipeline once, and returns the pipeline, its folder, our model and parameters."""

  @functools.cache
  def write(name):
    root = tmp_path_factory.mktemp(name)
    pipeline = text_pipelines.make(name, root)
    pipeline.save_pretrained(root / "pipeline")
    # Encode images by the mean of the posterior, which draws no random numbers.
    model, params = interop.stable_diffusion.load(root / "pipeline", posterior="mode")
    return pipeline, root / "pipeline", model, Parameters(params, model.load_frozen())

  return write


def defaults_of(model, scheduler):
  """Return the sampler and grid of a scheduler in `SAMPLERS`."""
  if SAMPLERS[scheduler] is None:
    return model.defaults
  config = dict(SAMPLERS[scheduler].config) | {"_class_name": type(SAMPLERS[scheduler]).__name__}
  return schedulers.from_config(config).defaults(model.process)


@functools.cache
def sampling_program(model_id, scheduler, steps, skipped):
  """Return a compiled function that turns noise into images with the sampler of a scheduler in `SAMPLERS`."""
  model = MODELS[model_id]
  defaults = defaults_of(model, scheduler)
  times = defaults.times(steps)[skipped:]

  @functools.partial(jax.jit, static_argnames="rule")
  def run(parameters, batch, x, rule):
    keys = jax.random.split(jax.random.key(0), len(x))
    denoise = guided.denoise(model, rule, keys, batch, parameters)
    return sampling.sample(keys, defaults.sampler, denoise, x, times)

  # The autoencoders of all pipelines are equal, so the compilation cache has this program after the first test.
  decode = jax.jit(model.decode)
  return lambda parameters, *inputs: decode(run(parameters, *inputs), parameters.frozen)


MODELS = {}


@functools.cache
def rule_of(scale):
  if isinstance(scale, tuple):
    return functools.partial(guidance.two_conditions, scale=scale[0], partial_scale=scale[1])
  return functools.partial(guidance.classifier_free, scale=scale)


def sample_ours(one, scheduler, scale, x=None, steps=4, skipped=0, **items):
  _, folder, model, parameters = one
  MODELS[folder] = model
  batch = inputs.host_items(model.conditions, items)
  run = sampling_program(folder, scheduler, steps, skipped)
  return images.to_uint8(run(parameters, batch, noise() if x is None else x, rule_of(scale)))


def sample_peer(pipeline, scheduler, scale, steps=4, latents=None, **options):
  own = pipeline.scheduler
  try:
    pipeline.scheduler = SAMPLERS[scheduler] or own
    call = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "np", **options}
    pictures = pipeline(latents=as_torch(noise() if latents is None else latents), **call).images
  finally:
    pipeline.scheduler = own
  return np.round(pictures * 255).astype(np.uint8)


@pytest.mark.parametrize(
  ("scheduler", "scale"),
  [("own", 1.0), *(pytest.param(name, 1.0, marks=pytest.mark.slow) for name in SAMPLERS if name != "own")]
  + [(name, 7.5) for name in SAMPLERS],
)
def test_samples_match_the_pipeline(scheduler, scale, written):
  one = written("sd1")
  ours = sample_ours(one, scheduler, scale, text=PROMPTS)
  assert_one_gray_level(ours, sample_peer(one[0], scheduler, scale, prompt=PROMPTS))


@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_negative_prompts_match_the_pipeline(name, written):
  one, negative = written(name), ["blurry", ""]
  ours = sample_ours(one, "own", 7.5, text=PROMPTS, negative_text=negative)
  assert_one_gray_level(ours, sample_peer(one[0], "own", 7.5, prompt=PROMPTS, negative_prompt=negative))


@pytest.mark.parametrize("name", ["sd2", "xl"])
def test_other_versions_match_the_pipeline(name, written):
  """Stable Diffusion 2 predicts v. Stable Diffusion XL has two text encoders, and encodes the empty prompt as zeros."""
  one = written(name)
  ours = sample_ours(one, "own", 7.5, text=PROMPTS)
  assert_one_gray_level(ours, sample_peer(one[0], "own", 7.5, prompt=PROMPTS))


def test_weighted_prompts_are_encoded_chunk_by_chunk_and_by_each_encoder(written):
  pipeline, _, model, _ = written("xl")
  texts = ["a (red:1.5) fox " * 30, "snow"]
  condition = model.conditions["text"].weighted(texts)
  batch, frozen = inputs.host_items({"text": condition}, {"text": texts}), condition.load()
  found = jax.jit(lambda frozen, batch: condition.encode(frozen, None, batch, False))(frozen, batch)
  expected = []
  for part, peer in (("text_encoder", pipeline.text_encoder), ("text_encoder_2", pipeline.text_encoder_2)):
    ids, weights = (np.asarray(batch["text"][part][name]) for name in ("ids", "weights"))
    assert ids.shape == (2, 2, 77)  # 90 tokens take two chunks
    with torch.no_grad():
      output = peer(torch.tensor(ids.reshape(4, 77), dtype=torch.long), output_hidden_states=True)
    states = output.hidden_states[-2].double().numpy()
    weighted = states * weights.reshape(4, 77, 1)
    weighted *= states.mean((1, 2), keepdims=True) / weighted.mean((1, 2), keepdims=True)
    expected.append(weighted.reshape(2, 154, -1))
  expected = np.concatenate(expected, -1)
  np.testing.assert_allclose(found["tokens"], expected, atol=1e-5 * np.abs(expected).max())
  np.testing.assert_allclose(found["vector"], output.text_embeds.numpy().reshape(2, 2, -1)[:, 0], atol=1e-5)
  assert jax.tree.map(np.shape, condition.null(frozen)) == {"tokens": (154, 24 + 32), "vector": (20,)}


@pytest.mark.parametrize("negative", [None, ["blurry", ""]])
def test_the_refiner_matches_the_pipeline(negative, written):
  """The state of diffusers' Euler is x / alpha. In guidance, the unconditional call has a lower aesthetic score."""
  one = written("refiner")
  model, x = one[2], noise()
  items = {"text": PROMPTS, "sizes": model.conditions["sizes"].default(2)}
  ours = sample_ours(one, "own", 5.0, x, skipped=2, **items, **({"negative_text": negative} if negative else {}))
  options = {"image": torch.zeros(2, 3, *model.data_shape[:2]), "strength": 0.5, "negative_prompt": negative}
  latents = x / float(model.process.alpha(model.times(4)[2]))
  assert_one_gray_level(ours, sample_peer(one[0], "own", 5.0, latents=latents, prompt=PROMPTS, **options))


def pictures_and_mask():
  rng = np.random.default_rng(5)
  size = text_pipelines.SIZE * text_pipelines.FACTOR
  mask = np.zeros((2, size, size, 1), np.float32)
  mask[0, 5:20, 3:30], mask[1, :, 15:] = 1, 1
  return rng.uniform(-1, 1, (2, size, size, 3)).astype(np.float32), mask


def use_mode(monkeypatch, module):
  monkeypatch.setattr(module, "retrieve_latents", lambda output, *args, **options: output.latent_dist.mode())


@pytest.mark.parametrize(
  ("name", "module", "scheduler", "scale"),
  [
    ("inpaint", pipeline_stable_diffusion_inpaint, "own", 7.5),
    ("xl_inpaint", pipeline_stable_diffusion_xl_inpaint, "own", 7.5),
  ]
  + [
    pytest.param("inpaint", pipeline_stable_diffusion_inpaint, name, scale, marks=pytest.mark.slow)
    for name, scale in (("own", 1.0), ("ddim", 7.5), ("euler", 1.0), ("dpmpp_2m", 7.5))
  ],
)
def test_inpainting_matches_the_pipeline(name, module, scheduler, scale, written, monkeypatch):
  one, (pictures, mask) = written(name), pictures_and_mask()
  use_mode(monkeypatch, module)
  masked, negative = np.concatenate([pictures, mask], -1), ["blurry", ""]
  ours = sample_ours(one, scheduler, scale, text=PROMPTS, negative_text=negative, masked=masked)
  options = {"image": as_torch(pictures / 2 + 0.5), "mask_image": as_torch(mask), "strength": 1.0}
  side, options["negative_prompt"] = pictures.shape[1], negative
  theirs = sample_peer(one[0], scheduler, scale, prompt=PROMPTS, height=side, width=side, **options)
  assert_one_gray_level(ours, theirs)


@pytest.mark.parametrize(
  ("scheduler", "strength", "scale"),
  [("own", 1.0, 7.5), ("ddim", 0.75, 7.5), ("euler", 0.75, 1.0), ("dpmpp_2m", 0.75, 7.5)],
)
def test_img2img_matches_the_pipeline(scheduler, strength, scale, written, monkeypatch):
  """Our program and the pipeline start from the same noise, and encode the image by the mean of the posterior.

  A strength of 0.75 takes 3 of 5 steps. The cases of this strength use schedulers other than PNDM, because diffusers'
  PNDM would call the network at times that do not match the noise level of x.
  """
  (pipeline, _, model, parameters), (pictures, _) = written("sd1"), pictures_and_mask()
  keys = jax.random.split(jax.random.key(0), 2)
  eps = randomness.normal(randomness.fold_in(keys, 0), (2, *model.shape), np.float32)
  peer = diffusers.StableDiffusionImg2ImgPipeline(
    **pipeline.components | {"scheduler": SAMPLERS[scheduler] or pipeline.scheduler}, requires_safety_checker=False
  )
  peer.set_progress_bar_config(disable=True)
  use_mode(monkeypatch, pipeline_stable_diffusion_img2img)
  monkeypatch.setattr(pipeline_stable_diffusion_img2img, "randn_tensor", lambda *args, **options: as_torch(eps))
  options = {"strength": strength, "num_inference_steps": 5, "guidance_scale": scale, "output_type": "np"}
  negative = ["blurry", ""]
  theirs = peer(prompt=PROMPTS, negative_prompt=negative, image=as_torch(pictures / 2 + 0.5), **options).images
  defaults = defaults_of(model, scheduler)
  times = defaults.times(5)

  @jax.jit
  def run(parameters, batch, pictures):
    denoise = guided.denoise(model, rule_of(scale), keys, batch, parameters)
    x = model.encode(keys, pictures, parameters.frozen)
    if strength == 1:
      # Our img2img would return a new sample. The pipeline starts from the noisy image.
      noisy = model.process.sample_marginal(randomness.fold_in(keys, 0), x, times[0])
      return sampling.sample(randomness.fold_in(keys, 1), defaults.sampler, denoise, noisy, times)
    return editing.img2img(keys, defaults.sampler, denoise, model.process, x, times, strength)

  x = run(parameters, inputs.host_items(model.conditions, {"text": PROMPTS, "negative_text": negative}), pictures)
  ours = jax.jit(model.decode)(x, parameters.frozen)
  assert_one_gray_level(images.to_uint8(ours), np.round(theirs * 255).astype(np.uint8))


def test_editing_by_instructions_matches_the_pipeline(written):
  one, (pictures, _) = written("instruct"), pictures_and_mask()
  image = as_torch(pictures / 2 + 0.5)
  ours = sample_ours(one, "own", 1.0, text=PROMPTS, source=pictures)
  assert_one_gray_level(ours, sample_peer(one[0], "own", 1.0, prompt=PROMPTS, image=image))
  ours = sample_ours(one, "own", (7.5, 1.5), text=PROMPTS, source=pictures, negative_text=["blurry", "red"])
  options = {"prompt": PROMPTS, "negative_prompt": ["blurry", "red"], "image": image, "image_guidance_scale": 1.5}
  assert_one_gray_level(ours, sample_peer(one[0], "own", 7.5, **options))


def public(config):
  return {key: value for key, value in config.items() if not key.startswith("_")}


def assert_same(tree, other):
  jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), tree, other)


@pytest.mark.parametrize("name", ["sd1", "xl", "refiner", "inpaint", "xl_inpaint"])
def test_round_trips_are_exact(name, written, tmp_path):
  peer, _, model, parameters = written(name)
  interop.diffusers.save(tmp_path / "saved", model, parameters.params, frozen=parameters.frozen)
  again, params = interop.diffusers.load(tmp_path / "saved")
  assert_same(params, parameters.params)
  assert_same(again.load_frozen(), parameters.frozen)
  assert (again.origin.contents, again.shape) == (model.origin.contents, model.shape)
  opened = type(peer).from_pretrained(tmp_path / "saved")
  assert {key: value for key, value in opened.config.items() if key in model.origin.contents.options} == (
    model.origin.contents.options
  )
  assert opened.unet.config.upcast_attention == peer.unet.config.upcast_attention
  assert type(opened.scheduler) is type(peer.scheduler)
  assert public(opened.scheduler.config) == public(peer.scheduler.config)
  for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
    theirs, ours = getattr(peer, part, None), getattr(opened, part, None)
    assert (theirs is None) == (ours is None)
    if theirs is not None:
      assert all(torch.equal(value, ours.state_dict()[key]) for key, value in theirs.state_dict().items())


def set_index(**changes):
  def change(folder):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

  return change


def set_config(part, **changes):
  def change(folder):
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

  return change


def set_scheduler(**changes):
  def change(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

  return change


def write_index(text):
  return lambda folder: (folder / "model_index.json").write_text(text)


# Changes of a folder, and a part of the error message.
BROKEN = {
  "missing part": (lambda folder: shutil.rmtree(folder / "text_encoder"), "lacks the folder text_encoder/"),
  "absent part": (set_index(tokenizer=[None, None]), "without tokenizer; expected the parts"),
  "missing config": (lambda folder: (folder / "vae" / "config.json").unlink(), "no config.json of an autoencoder"),
  "file of code": (set_index(unet=["my_unet", "UNet2DConditionModel"]), "refers to code"),
  "class of code": (set_index(_class_name=["pipeline", "MyPipeline"]), "refers to code"),
  "pipeline of code": (set_index(custom_pipeline="lpw"), "refers to code"),
  "other pipeline": (set_index(_class_name="FluxPipeline"), "which is not supported"),
  "other part": (set_index(controlnet=["diffusers", "ControlNetModel"]), "with the part controlnet"),
  "other class": (set_index(vae=["diffusers", "VQModel"]), "whose vae is a 'VQModel'; expected AutoencoderKL"),
  "malformed part": (set_index(vae=["diffusers"]), "expected the name of a library and the name of a class"),
  "type of a part": (set_index(scheduler=7), "scheduler=7; expected a list of strings"),
  "type of an option": (set_index(force_zeros_for_empty_prompt="yes"), "expected true or false"),
  "nested JSON": (write_index("[" * 100_000), "Cannot read"),
  "no object": (write_index("[1]"), "expected a JSON object"),
  "vocabulary": (set_config("text_encoder", vocab_size=1000), "tokens for a text encoder of 1,000 embeddings"),
  "features": (set_config("unet", cross_attention_dim=40), "with 24 features and a U-Net with cross_attention_dim=40"),
  "variance": (set_scheduler(variance_type="learned_range"), "whose scheduler has a learned variance"),
  "channels": (set_config("unet", in_channels=6), "in_channels=6; expected 4, or 9 for inpainting"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_refused(name, written, tmp_path):
  change, message = BROKEN[name]
  ignore = shutil.ignore_patterns("*.safetensors")
  folder = shutil.copytree(written("sd1")[1], tmp_path / "copy", ignore=ignore)
  change(folder)
  with pytest.raises(ValueError, match=re.escape(message)):
    interop.diffusers.read(folder)


def test_a_safety_checker_and_a_feature_extractor_are_not_loaded(written, tmp_path):
  folder = shutil.copytree(
    written("sd1")[1], tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True
  )
  parts = {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
  }
  set_index(**parts, requires_safety_checker=True)(folder)
  assert interop.diffusers.read(folder).shape == written("sd1")[2].shape


def test_sizes_that_the_model_cannot_take_are_refused(written):
  folder = written("sd1")[1]
  with pytest.raises(ValueError, match="sides divisible by 4, the factor of the autoencoder. Use 32x40, for example"):
    interop.diffusers.read(folder, shape=(31, 40, 3))
  model = interop.diffusers.read(folder, shape=(24, 40, 3))
  assert (model.shape, model.data_shape) == ((6, 10, 4), (24, 40, 3))


def test_variants_and_types_of_parameters(written, tmp_path):
  pipeline, folder, model, _ = written("sd1")
  pipeline.save_pretrained(tmp_path / "half", variant="fp16")
  copy = shutil.copytree(folder, tmp_path / "both")
  shutil.copytree(tmp_path / "half", copy, dirs_exist_ok=True)
  with pytest.raises(ValueError, match="no weights of the variant 'fp32'"):
    interop.diffusers.load(copy, variant="fp32")
  model, params = interop.diffusers.load(copy, variant="fp16", dtype="bfloat16", params_dtype="bfloat16")
  leaves = jax.tree.leaves((params, model.load_frozen()["conditions"]["text"]["encoders"]))
  assert {str(leaf.dtype) for leaf in leaves} == {"bfloat16"}
  # Published folders often have a variant of the network alone.
  (weights,) = (copy / "unet").glob("*.fp16.safetensors")
  weights.rename(copy / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
  model, _ = interop.diffusers.load(copy, variant="non_ema")
  assert_same(model.load_frozen(), written("sd1")[3].frozen)
  interop.diffusers.copy_config(copy, tmp_path / "frozen", variant="non_ema")
  assert_same(interop.diffusers.read(tmp_path / "frozen").load_frozen(), model.load_frozen())


def test_the_command_line_samples_from_prompts(written, tmp_path):
  folder = written("sd1")[1]
  arguments = [f"--workdir={tmp_path}", f"--pretrained={folder}", "--prompt=a red fox", "--num_steps=2"]
  options = ["--size=24x40", "--dtype=bfloat16", "--negative_prompt=blurry", "--guidance_scale=3"]
  code, output = call("--mode=sample", *arguments, *options)
  assert code == 0, output
  (path,) = (tmp_path / "samples").glob("*.npz")
  assert np.load(path)["samples"].shape == (1, 24, 40, 3)
  for flag, message in (("--size=24", "such as --size=512x768"), ("--size=23x40", "divisible by 4")):
    assert_refused(*call("--mode=sample", *arguments, flag), message)
  assert_refused(*call("--mode=sample", f"--workdir={tmp_path}", "--variant=fp16"), "without --pretrained")


def open_clip_names(state):
  """Convert the tensors of a text encoder from the format of transformers to the format of OpenCLIP."""
  names = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.final_layer_norm": "ln_final",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
  }
  result = {}
  for name, value in state.items():
    for old, new in names.items():
      name = name.replace(old, new)
    if name == "text_projection.weight":
      result["text_projection"] = value.T.contiguous()
    elif ".q_proj." in name:
      prefix, kind = name.split(".q_proj.")
      layer = prefix.split(".")[2]
      parts = [state[f"text_model.encoder.layers.{layer}.self_attn.{one}_proj.{kind}"] for one in "qkv"]
      result[f"{prefix}.in_proj_{kind}"] = torch.cat(parts)
    elif not re.search(r"\.[kv]_proj\.", name):
      result[name] = value
  return result


def single_file(folder, model, params, path, prefixes):
  """Write the parameters of a pipeline's folder to a single-file checkpoint.

  `prefixes` maps the subfolder of each text encoder to the prefix of its tensor names in the checkpoint.
  """
  state = stored(params, ldm.unet_layout(model.network.module), "model.diffusion_model.")
  autoencoder = model.load_frozen()["codec"]["autoencoder"]
  state |= stored(autoencoder, ldm.autoencoder_layout({}), "first_stage_model.")
  for part, prefix in prefixes.items():
    tensors = safetensors.torch.load_file(folder / part / "model.safetensors")
    # transformers 5.6 and newer leave the prefix out. Single files have it.
    tensors = {re.sub(r"^(?!text_)", "text_model.", name): value for name, value in tensors.items()}
    if prefix.endswith(".model."):
      tensors = open_clip_names(tensors) | {"logit_scale": torch.ones(())}
    if prefix.startswith("cond_stage_model.model"):
      # Stable Diffusion 2 ignores the last layer and the projection, and its folders leave them out.
      last = "transformer.resblocks.1."
      skipped = {name: value.clone() for name, value in tensors.items() if last in name}
      tensors |= {name.replace(last, "transformer.resblocks.2."): value for name, value in skipped.items()}
      tensors["text_projection"] = torch.ones(24, 20)
    state |= {prefix + name: value for name, value in tensors.items()}
  safetensors.torch.save_file(state, path)


def test_names_of_open_clip_match_the_converter(written):
  pipeline, folder, _, _ = written("xl")
  state = safetensors.torch.load_file(folder / "text_encoder_2" / "model.safetensors")
  checkpoint = {f"x.{name}": value for name, value in open_clip_names(state).items()}
  converted = single_file_utils.convert_open_clip_checkpoint(pipeline.text_encoder_2, checkpoint, "x.")
  assert {name: tuple(value.shape) for name, value in converted.items()} == {
    name: tuple(value.shape) for name, value in state.items()
  }
  assert all(torch.equal(value, state[name]) for name, value in converted.items())


FILES = {
  "sd1": ({"text_encoder": "cond_stage_model.transformer."}, {}),
  "xl": (
    {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."},
    {"size_features": 8},
  ),
  "sd2": ({"text_encoder": "cond_stage_model.model."}, {"prediction": "v"}),
  "refiner": ({"text_encoder_2": "conditioner.embedders.0.model."}, {"size_features": 8}),
}


@pytest.mark.parametrize("name", FILES)
def test_single_files_hold_the_same_model(name, written, tmp_path):
  _, folder, model, parameters = written(name)
  prefixes, options = FILES[name]
  path = tmp_path / "model.safetensors"
  single_file(folder, model, parameters.params, path, prefixes)
  with pytest.raises(ValueError, match="expected 'epsilon' or 'v_prediction'"):
    interop.single_file.read(path, folder, heads=4, text_heads=4, **options | {"prediction": "flow"})
  if name == "sd1":
    marks = {"v_pred": np.zeros(1, np.float32), "ztsnr": np.zeros(1, np.float32)}
    content = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(content | marks, tmp_path / "zero.safetensors")
    zero_snr = interop.single_file.read(tmp_path / "zero.safetensors", folder, heads=4, text_heads=4)
    assert float(zero_snr.process.alpha(1.0)) < 1e-3
    assert zero_snr.prediction is predictions.V
    safetensors.numpy.save_file(content | {"edm_mean": marks["ztsnr"]}, tmp_path / "edm.safetensors")
    with pytest.raises(ValueError, match="edm_mean, a model that predicts as in EDM"):
      interop.single_file.read(tmp_path / "edm.safetensors", folder, heads=4, text_heads=4)
  loaded, params = interop.single_file.load(path, folder, heads=4, text_heads=4, **options)
  assert_same(params, parameters.params)
  frozen = loaded.load_frozen()
  assert_same(frozen["conditions"]["text"]["encoders"], parameters.frozen["conditions"]["text"]["encoders"])
  assert_same(frozen["codec"]["autoencoder"], parameters.frozen["codec"]["autoencoder"])
  assert loaded.defaults.scheduler["_class_name"] == model.defaults.scheduler["_class_name"]
  assert (loaded.origin.contents, list(loaded.conditions)) == (model.origin.contents, list(model.conditions))
  for part, one in loaded.origin.encoders.items():
    theirs = model.origin.encoders[part].module
    assert one.module.clone(end=theirs.end) == theirs
  # As a folder, the model can be used by the command line.
  interop.diffusers.save(tmp_path / "folder", loaded, params)
  again, params = interop.diffusers.load(tmp_path / "folder")
  assert_same(params, parameters.params)
  assert (again.network.module, again.origin.contents) == (loaded.network.module, loaded.origin.contents)


def test_the_command_line_edits_with_prompts(written, tmp_path):
  side = text_pipelines.SIZE * text_pipelines.FACTOR
  picture = np.random.default_rng(6).integers(0, 256, (side, side, 3), np.uint8)
  Image.fromarray(picture).save(tmp_path / "picture.png")
  common = ["--mode=edit", f"--workdir={tmp_path}", f"--input={tmp_path / 'picture.png'}", "--num_steps=2"]
  for name, task in (("inpaint", ["--task=inpaint", "--mask=left"]), ("instruct", ["--task=instruct"])):
    code, output = call(*common, f"--pretrained={written(name)[1]}", *task, "--prompt=a red fox")
    assert code == 0, output
    (path,) = (tmp_path / "edits").glob(f"{name}*.npz")
    edited = np.load(path)["output"][0, 0]
    kept = np.all(edited == picture, axis=(0, 2))
    assert kept[side // 2 :].all() == (name == "inpaint")
    assert not kept[: side // 2].any()
  assert_refused(
    *call(*common, f"--pretrained={written('sd1')[1]}", "--task=instruct", "--prompt=a"), "InstructPix2Pix"
  )
