"""Models that come and go by the command line: sampled from a folder of diffusers, exported to one, and trained on from one."""

import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.pipelines.ddim import pipeline_ddim

from ddpm_jax import build, interop, pretrained, processes, randomness, schema
from tests.commands import RECIPE, assert_refused, call
from tests.parameters import write_run
from tests.recipes import LEVELS, tiny_config
from tests.test_interop_diffusers import write
from tests.test_interop_pipelines import assert_one_grey_level

DDIM = ("--mode=sample", "--sampler=ddim", "--num_steps=10", "--num_samples=16", "--seed=3")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run with scores that nothing trained, whose averages are not its raw weights."""
  folder, config = tmp_path_factory.mktemp("run"), tiny_config()
  config.network.update(LEVELS)
  config.evaluation.update({"num_samples": 6, "k": 2})
  write_run(config, folder, averages_seed=1)
  code, output = call("--mode=eval", f"--workdir={folder}")
  assert code == 0, output
  return folder


@pytest.fixture(scope="module")
def exported(run):
  code, output = call("--mode=export", f"--workdir={run}", f"--output={run / 'model'}")
  assert code == 0, output
  assert "EMA weights" in output
  return run / "model"


def samples(folder, code, output):
  assert code == 0, output
  with np.load(next((folder / "samples").glob("ddim_nfe10_seed3.npz"))) as file:
    return file["samples"]


def test_an_exported_run_gives_the_same_images_in_diffusers(run, exported, monkeypatch):
  mine = samples(run, *call(*DDIM, f"--workdir={run}"))
  keys = randomness.sample_keys(jax.random.fold_in(jax.random.key(3), 2), np.arange(16))
  start = processes.vp().prior(randomness.fold_in(keys, 0), (16, 8, 8, 1))
  start = torch.tensor(np.asarray(start).transpose(0, 3, 1, 2))
  monkeypatch.setattr(pipeline_ddim, "randn_tensor", lambda *args, **kwargs: start)
  pipeline = diffusers.DDIMPipeline.from_pretrained(exported)
  options = {"batch_size": 16, "num_inference_steps": 10, "use_clipped_model_output": True, "output_type": "np"}
  assert_one_grey_level(mine, np.round(pipeline(**options).images * 255).astype(np.uint8))


def test_an_exported_run_gives_the_same_images_when_it_is_read_again(run, exported, tmp_path):
  shutil.copytree(run / "samples", tmp_path / "before")
  mine = samples(run, *call(*DDIM, f"--workdir={run}"))
  again = samples(tmp_path, *call(*DDIM, f"--pretrained={exported}", f"--workdir={tmp_path}"))
  np.testing.assert_array_equal(mine, again)


def test_the_model_card_has_the_config_and_the_scores(run, exported):
  card = (exported / "README.md").read_text()
  report = json.loads((run / "eval.json").read_text())
  assert f'"frechet_distance": {report["scores"]["generated"]["frechet_distance"]}' in card
  assert '"decay": 0.9' in card
  assert "DDIMPipeline.from_pretrained" in card


def test_raw_weights_are_others(run, exported, tmp_path):
  code, output = call("--mode=export", f"--workdir={run}", f"--output={tmp_path / 'raw'}", "--ema=false")
  assert code == 0, output
  assert "raw weights" in output
  (_, ema), (_, raw) = interop.diffusers.load_unet(exported), interop.diffusers.load_unet(tmp_path / "raw")
  assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(ema), jax.tree.leaves(raw), strict=True))


def test_a_folder_is_sampled_as_its_scheduler_says_or_as_flags_say(tmp_path):
  write(tmp_path / "model", diffusers.DDIMScheduler(timestep_spacing="leading"))
  common = ("--mode=sample", f"--pretrained={tmp_path / 'model'}", f"--workdir={tmp_path}", "--num_samples=3")
  code, output = call(*common)
  assert code == 0, output
  assert (tmp_path / "samples" / "ddim_nfe50_seed0.png").exists()
  code, output = call(*common, "--sampler=dpmpp_2m", "--num_steps=5")
  assert code == 0, output
  with np.load(tmp_path / "samples" / "dpmpp_2m_nfe5_seed0.npz") as file:
    assert file["samples"].shape == (3, 8, 8, 3)


def test_samples_that_are_not_finite_are_an_error(tmp_path):
  write(tmp_path / "model", diffusers.DDIMScheduler(clip_sample=False))
  network, params = interop.diffusers.load_unet(tmp_path / "model")
  params["conv_out"]["bias"] = np.full(3, 3e38, np.float32)  # finite; what is divided by a small alpha is not
  model = interop.diffusers.load(tmp_path / "model")
  interop.diffusers.save(tmp_path / "nan", network, params, model.process, model.prediction, shape=(8, 8, 3), clip=None)
  code, output = call(
    "--mode=sample",
    f"--pretrained={tmp_path / 'nan'}",
    f"--workdir={tmp_path}",
    "--num_steps=2",
    "--num_samples=2",
    "--sampler=ddim",
  )
  assert code == 2, output
  assert "samples are not finite" in output
  assert "Traceback" not in output
  assert not (tmp_path / "samples").exists()


def test_training_starts_from_a_folder_and_goes_on_without_it(tmp_path):
  source = tmp_path / "source"
  # One level, whose train step other tests compile too.
  write_run(tiny_config(), tmp_path / "before")
  code, output = call("--mode=export", f"--workdir={tmp_path / 'before'}", f"--output={source}")
  assert code == 0, output
  # The recipe's own network, process and prediction would be others.
  flags = [RECIPE, f"--workdir={tmp_path / 'run'}", f"--config.init_from={source}", "--config.network.channels=16"]
  flags += ["--config.prediction=eps", "--config.optimizer.learning_rate=1e-12"]
  code, output = call(*flags, "--config.training.steps=3")
  assert code == 0, output
  assert f"network, process and prediction from {source}:" in output
  assert "network.channels: 8 instead of 16" in output
  assert "prediction: v instead of eps" in output
  saved = json.loads((tmp_path / "run" / "config.json").read_text())
  assert (saved["network"]["channels"], saved["prediction"]) == (8, "v")
  code, output = call("--mode=export", f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'tuned'}")
  assert code == 0, output
  (network, before), (same, after) = (interop.diffusers.load_unet(path) for path in (source, tmp_path / "tuned"))
  assert network == same
  # So small a learning rate leaves the parameters where they began.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), before, after)
  shutil.rmtree(source)
  # The recipe's own keys stand back for the run's in every mode.
  code, output = call(*flags, "--mode=sample", "--num_samples=2", "--config.sampling.eta=0.5")
  assert code == 0, output
  code, output = call(*flags, "--config.training.steps=5")
  assert code == 0, output
  assert "resuming from the checkpoint of step 3" in output


def test_an_exported_model_with_a_flipped_bit_is_refused_by_name(exported, tmp_path):
  shutil.copytree(exported, tmp_path / "model")
  path = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
  content = bytearray(path.read_bytes())
  content[-100] ^= 1
  path.write_bytes(content)
  code, output = call("--mode=sample", f"--pretrained={tmp_path / 'model'}", f"--workdir={tmp_path / 'work'}")
  assert_refused(
    code, output, r"Got the weights .*safetensors, which are damaged: its tensors are not what was written"
  )
  assert path.read_bytes() == content


WRONG = {
  "no folder": (["--mode=sample", "--pretrained=/none"], "/none, which is no folder"),
  "mode": ([RECIPE, "--pretrained=/none"], "--pretrained in mode train; it serves sample"),
  "output": ([RECIPE, "--output=/none"], "--output in mode train; it serves export"),
  "no output": (["--mode=export", RECIPE], "Got no --output"),
  "no checkpoint": (["--mode=export", RECIPE, "--output=/tmp/x"], "holds no checkpoint"),
  "no pretrained": ([RECIPE, "--config.init_from=/none"], "/none, which is no folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_ends_at_once_in_one_message(name, tmp_path):
  arguments, message = WRONG[name]
  code, output = call(*arguments, f"--workdir={tmp_path / 'work'}")
  assert_refused(code, output, message)
  assert not (tmp_path / "work").exists()


def test_bad_folders_end_at_once(run, exported, tmp_path):
  code, output = call("--mode=export", f"--workdir={run}", f"--output={exported}")
  assert_refused(code, output, "exists and is not empty")
  write(tmp_path / "color")
  code, output = call(RECIPE, f"--config.init_from={tmp_path / 'color'}", f"--workdir={tmp_path / 'work'}")
  assert_refused(code, output, r"a model of images of \(8, 8, 3\), and data of \(8, 8, 1\)")
  assert not (tmp_path / "work").exists()


ADOPTED = {
  "ddpm": {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "attention_head_dim": None},
  "adm": {"resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet", "upsample_type": "resnet"},
  "mixed": {
    "block_out_channels": (16, 24, 40),
    "down_block_types": ("DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D", "UpBlock2D"),
  },
  "classes": {"num_class_embeds": 4, "center_input_sample": True, "time_embedding_dim": 40},
}
SCHEDULERS = {
  "ddpm": diffusers.DDPMScheduler(clip_sample=False),
  "adm": diffusers.DDPMScheduler(beta_schedule="sigmoid"),
  "mixed": diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
  "classes": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=200),
}


@pytest.mark.parametrize("name", ADOPTED)
def test_a_config_says_all_that_a_folder_says(name, tmp_path):
  """From the config alone the same network and the same process are built."""
  from ddpm_jax import build

  model = interop.diffusers.load(write(tmp_path, SCHEDULERS[name], **ADOPTED[name]))
  config = pretrained.adopt_sampling(pretrained.adopt(schema.default_config(), model), model, None)
  schema.check_config(config)
  assert build.build_network(config) == model.network.clone(dropout=0.1)
  assert build.build_prediction(config) == model.prediction
  assert config.sampling.clip == (model.clip is not None)
  times = np.linspace(0, 1, 37)
  process = build.build_process(config)
  np.testing.assert_allclose(process.alpha(times), model.process.alpha(times), rtol=1e-6)
  np.testing.assert_array_equal(build.build_grid(config, process), model.times(config.sampling.num_steps))


def test_another_sampler_has_its_own_defaults(tmp_path):
  model = interop.diffusers.load(write(tmp_path, diffusers.UniPCMultistepScheduler()))
  own = pretrained.adopt_sampling(schema.default_config(), model, "unipc").sampling
  assert (own.order, own.grid, own.num_steps) == (2, "linspace_open", 50)
  other = pretrained.adopt_sampling(schema.default_config(), model, "deis").sampling
  assert (other.order, other.grid, other.num_steps) == (3, "", 50)


def test_classes_that_the_model_lacks_are_an_error(exported, tmp_path):
  code, output = call(
    RECIPE, f"--config.init_from={exported}", "--config.network.num_classes=10", f"--workdir={tmp_path / 'a'}"
  )
  assert_refused(code, output, "num_classes=10 .*a model of 0 classes")


def test_a_folder_without_a_size_takes_the_data_s(tmp_path):
  write(tmp_path, in_channels=1, out_channels=1)
  file = tmp_path / "unet" / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": None}))
  config = tiny_config()
  config.init_from = str(tmp_path)
  adopted, model = pretrained.of_run(config, tmp_path / "none", resuming=False)
  assert adopted.data.image_size == 8
  assert model.network.channels == adopted.network.channels == 16


def test_a_model_of_images_that_are_no_squares_is_adopted(tmp_path):
  model = interop.diffusers.load(write(tmp_path / "a", None, sample_size=(8, 16)))
  adopted = pretrained.adopt(tiny_config(), model)
  assert build.image_shape(adopted) == model.shape == (8, 16, 3)
  build.build_network(adopted)


def test_models_beyond_the_command_line_are_errors(tmp_path):
  config = tiny_config()
  for name, scheduler, changes, message in (
    ("a", diffusers.DDPMScheduler(clip_sample_range=2.0), {}, "clip_sample_range=2"),
    ("b", None, {"class_embed_type": "timestep"}, "class_embed_type"),
    ("d", None, {"in_channels": 5}, "in_channels=5, conditioned on an image"),
  ):
    model = interop.diffusers.load(write(tmp_path / name, scheduler, **changes))
    with pytest.raises(ValueError, match=message):
      pretrained.adopt(config, model)
