"""Test sampling, exporting and fine-tuning diffusers models from the command line."""

import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.pipelines.ddim import pipeline_ddim
from PIL import Image

from ddpm_jax import config as configs
from ddpm_jax import interop, processes, randomness
from ddpm_jax.config import spec
from ddpm_jax.runs import pretrained
from tests.commands import RECIPE, assert_refused, call
from tests.parameters import write_run
from tests.recipes import LEVELS, tiny_config, tree_of
from tests.test_interop_diffusers import write_pipeline
from tests.test_interop_pipelines import assert_one_gray_level

DDIM = ("--mode=sample", "--sampler=ddim", "--num_steps=10", "--num_samples=16", "--seed=3")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Make an untrained run with scores.

  The EMA of the run differs from the raw weights.
  """
  folder, config = tmp_path_factory.mktemp("run"), tiny_config()
  config.model.network.update(LEVELS)
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


def test_diffusers_generates_the_same_images_from_an_exported_run(run, exported, monkeypatch):
  mine = samples(run, *call(*DDIM, f"--workdir={run}"))
  keys = randomness.sample_keys(jax.random.fold_in(jax.random.key(3), 2), np.arange(16))
  start = processes.vp().prior(randomness.fold_in(keys, 0), (16, 8, 8, 1))
  start = torch.tensor(np.asarray(start).transpose(0, 3, 1, 2))
  monkeypatch.setattr(pipeline_ddim, "randn_tensor", lambda *args, **kwargs: start)
  pipeline = diffusers.DDIMPipeline.from_pretrained(exported)
  options = {"batch_size": 16, "num_inference_steps": 10, "use_clipped_model_output": True, "output_type": "np"}
  assert_one_gray_level(mine, np.round(pipeline(**options).images * 255).astype(np.uint8))


def test_an_exported_run_gives_the_same_images_with_pretrained(run, exported, tmp_path):
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


@pytest.mark.parametrize("clip", ["dynamic_threshold", "clip(low=-2)"])
def test_clipping_that_diffusers_cannot_express_is_not_exported(clip, run, tmp_path):
  output = tmp_path / "model"
  code, text = call("--mode=export", f"--workdir={run}", f"--output={output}", f"--config.sampling.clip={clip}")
  assert_refused(
    code, text, "config.sampling.clip=.*for an export; expected None or.*diffusers cannot clip in any other way"
  )
  assert not output.exists()


def test_raw_weights_differ_from_the_ema(run, exported, tmp_path):
  code, output = call("--mode=export", f"--workdir={run}", f"--output={tmp_path / 'raw'}", "--ema=false")
  assert code == 0, output
  assert "raw weights" in output
  (_, ema), (_, raw) = interop.diffusers.load_network(exported), interop.diffusers.load_network(tmp_path / "raw")
  assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(ema), jax.tree.leaves(raw), strict=True))


def test_sampling_uses_the_folder_s_scheduler_or_the_flags(tmp_path):
  scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1)  # as in Stable Diffusion 1
  write_pipeline(tmp_path / "model", scheduler)
  common = ("--mode=sample", f"--pretrained={tmp_path / 'model'}", f"--workdir={tmp_path}", "--num_samples=3")
  code, output = call(*common)
  assert code == 0, output
  assert (tmp_path / "samples" / "plms_nfe51_seed0.png").exists()
  code, output = call(*common, "--sampler=dpmpp_2m", "--num_steps=5")
  assert code == 0, output
  with np.load(tmp_path / "samples" / "dpmpp_2m_nfe5_seed0.npz") as file:
    assert file["samples"].shape == (3, 8, 8, 3)


def test_samples_that_are_not_finite_are_an_error(tmp_path):
  write_pipeline(tmp_path / "model", diffusers.DDIMScheduler(clip_sample=False))
  model, params = interop.diffusers.load(tmp_path / "model")
  params["conv_out"]["bias"] = np.full(3, 3e38, np.float32)  # finite, but infinite after division by a small alpha
  interop.diffusers.save(tmp_path / "nan", model, params, clip=None)
  code, output = call(
    "--mode=sample",
    f"--pretrained={tmp_path / 'nan'}",
    f"--workdir={tmp_path}",
    "--num_steps=2",
    "--num_samples=2",
    "--sampler=ddim",
  )
  assert code == 2, output
  assert "NaN or infinite values in 2 of 2 samples" in output
  assert "Traceback" not in output
  assert not (tmp_path / "samples").exists()


def test_training_starts_from_a_folder_and_resumes_without_it(tmp_path):
  source, run = tmp_path / "source", tmp_path / "run"
  # A network with one level. Other tests compile its train step too.
  write_run(tiny_config(), tmp_path / "before")
  code, output = call("--mode=export", f"--workdir={tmp_path / 'before'}", f"--output={source}")
  assert code == 0, output
  # The recipe itself has another network, process and prediction.
  flags = [RECIPE, f"--workdir={run}", f"--config.init_from={source}", "--config.model.network.channels=16"]
  flags += ["--config.model.prediction=EPS", "--config.optimizer.learning_rate=1e-12"]
  code, output = call(*flags, "--config.training.steps=3")
  assert code == 0, output
  assert f"the model (network, process, prediction, conditions, codec) is that of {source}" in output
  # The run has a copy of the folder's config files, and the run's config names this copy.
  saved = json.loads((run / "config.json").read_text())
  assert (saved["model"]["component"], saved["model"]["path"]) == ("diffusers.read", "<workdir>/start")
  built, (model, before) = configs.build(configs.read_run(run)).model, interop.diffusers.load(source)
  assert built.network.module == model.network.module
  assert built.network.module.channels == 8
  assert built.prediction == model.prediction
  code, output = call("--mode=export", f"--workdir={run}", f"--output={tmp_path / 'tuned'}")
  assert code == 0, output
  tuned, after = interop.diffusers.load(tmp_path / "tuned")
  assert tuned.network.module == model.network.module
  # The learning rate is so small that the parameters do not change.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), before, after)
  shutil.rmtree(source)
  # Sample with the run's own config, and with the flags that started the run.
  code, output = call("--mode=sample", "--num_samples=2", f"--workdir={run}")
  assert code == 0, output
  code, output = call(*flags, "--mode=sample", "--num_samples=2", "--config.sampler.eta=0.5")
  assert code == 0, output
  code, output = call(*flags, "--config.training.steps=5")
  assert code == 0, output
  assert "resuming from the checkpoint of step 3" in output
  # The run still works after its folder is moved.
  run.rename(tmp_path / "moved")
  code, output = call("--mode=eval", "--seed=1", f"--workdir={tmp_path / 'moved'}")
  assert code == 0, output


def test_an_exported_model_with_a_flipped_bit_is_refused_by_name(exported, tmp_path):
  shutil.copytree(exported, tmp_path / "model")
  path = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
  content = bytearray(path.read_bytes())
  content[-100] ^= 1
  path.write_bytes(content)
  code, output = call("--mode=sample", f"--pretrained={tmp_path / 'model'}", f"--workdir={tmp_path / 'work'}")
  assert_refused(
    code,
    output,
    r"Got the weights file .*safetensors, which is damaged: its tensors were changed after they were written",
  )
  assert path.read_bytes() == content


WRONG = {
  "no folder": (["--mode=sample", "--pretrained=/none"], "/none, which is not a folder"),
  "mode": ([RECIPE, "--pretrained=/none"], "--pretrained in mode train; expected it in mode plan, sample or edit"),
  "output": (
    [RECIPE, "--output=/none"],
    "--output in mode train; expected it in mode prepare, stats, export or convert",
  ),
  "no output": (["--mode=export", RECIPE], "Got no --output"),
  "no checkpoint": (["--mode=export", RECIPE, "--output=/tmp/x"], "holds no checkpoint"),
  "no pretrained": ([RECIPE, "--config.init_from=/none"], "/none, which is not a folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_gives_one_message_at_once(name, tmp_path):
  arguments, message = WRONG[name]
  code, output = call(*arguments, f"--workdir={tmp_path / 'work'}")
  assert_refused(code, output, message)
  assert not (tmp_path / "work").exists()


def test_wrong_folders_are_refused_at_once(run, exported, tmp_path):
  code, output = call("--mode=export", f"--workdir={run}", f"--output={exported}")
  assert_refused(code, output, "is not an empty folder")
  write_pipeline(tmp_path / "color")
  code, output = call(RECIPE, f"--config.init_from={tmp_path / 'color'}", f"--workdir={tmp_path / 'work'}")
  assert_refused(code, output, r"a model of images of \(8, 8, 3\), with data of \(8, 8, 1\)")
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
def test_the_config_describes_the_whole_folder(name, tmp_path):
  """The config alone builds the folder's network, process, grid and clipping."""
  write_pipeline(tmp_path, SCHEDULERS[name], **ADOPTED[name])
  model, _ = interop.diffusers.load(tmp_path)
  tree, loaded = pretrained.replace_model(str(tmp_path), configs.expand({}), recipe=False)
  experiment = configs.build(tree)
  assert experiment.model.network.module == model.network.module.clone(dropout=0.1)
  assert loaded.model.network.module == experiment.model.network.module
  assert experiment.model.prediction == model.prediction
  assert experiment.model.conditions.keys() == model.conditions.keys()
  assert (experiment.sampling.clip is None) == (model.defaults.clip is None)
  times = np.linspace(0, 1, 37)
  np.testing.assert_array_equal(experiment.model.process.alpha(times), model.process.alpha(times))
  np.testing.assert_array_equal(experiment.times, model.times(experiment.sampling.num_steps))
  assert experiment.sampling.num_steps == model.defaults.steps
  assert experiment.sampler_name == model.defaults.name


def test_another_sampler_uses_its_own_defaults(tmp_path):
  write_pipeline(tmp_path, diffusers.UniPCMultistepScheduler())

  def experiment(sampler):
    keys = {} if sampler is None else {"sampler": sampler}
    tree = configs.read(None, keys, tmp_path, default={})
    tree, loaded = pretrained.replace_model(str(tmp_path), tree, recipe=False, keys=keys)
    return configs.build(tree, loaded.model)

  default, other = experiment(None), experiment("deis")
  assert (default.sampler_name, default.tree.values["sampler"], default.sampling.num_steps) == ("unipc", None, 50)
  assert other.tree.values["sampler"] == {"component": "sampling.deis", "order": 3}
  assert (other.sampler_name, other.sampling.num_steps, other.sampling.grid) == ("deis", 50, None)
  assert len(default.times) == len(other.times) == 51
  assert np.any(default.times != other.times), "the scheduler has another grid than the default of the sampler"


def classes(**arguments):
  return (
    f"--config.model.conditions.classes=classes({', '.join(f'{name}={value}' for name, value in arguments.items())})"
  )


def test_classes_that_do_not_match_the_model_are_an_error(exported, tmp_path):
  code, output = call(RECIPE, f"--config.init_from={exported}", classes(number=10), f"--workdir={tmp_path / 'a'}")
  assert_refused(
    code,
    output,
    "conditions.classes, but the model of config.init_from=.*expected no conditions.*conditions.classes=None",
  )
  code, output = call(
    RECIPE, f"--config.init_from={exported}", classes(number=10, dropout=0.1), f"--workdir={tmp_path / 'a'}"
  )
  assert_refused(code, output, "class_dropout=0.1 for a model with num_class_embeds=None")
  write_pipeline(tmp_path / "four", num_class_embeds=4)
  start = f"--pretrained={tmp_path / 'four'}"
  code, output = call("--mode=sample", RECIPE, start, classes(number=5), f"--workdir={tmp_path / 'a'}")
  assert_refused(code, output, "classes.number=5 with --pretrained, a model of 4 classes; expected 4")


def test_with_dropout_the_last_class_of_a_folder_means_no_class(tmp_path):
  write_pipeline(tmp_path, num_class_embeds=11, in_channels=1, out_channels=1)
  config = tiny_config()
  config.init_from = str(tmp_path)
  config.model.conditions.classes = spec("conditions.classes", number=10, dropout=0.2)
  tree, loaded = pretrained.load_init_from(tree_of(config))
  experiment = configs.build(tree)
  for condition in (experiment.model.conditions["classes"], loaded.model.conditions["classes"]):
    assert (condition.num_values, condition.dropout) == (11, 0.2)
    assert condition.null(None) == 10


def test_a_folder_without_a_size_uses_the_size_of_the_data(tmp_path):
  write_pipeline(tmp_path, in_channels=1, out_channels=1)
  file = tmp_path / "unet" / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": None}))
  config = tiny_config()
  config.init_from = str(tmp_path)
  tree, loaded = pretrained.load_init_from(tree_of(config))
  experiment = configs.build(tree)
  pretrained.check_shape(experiment)
  assert experiment.model.data_shape == loaded.model.data_shape == (8, 8, 1)
  assert experiment.model.network.module.channels == loaded.model.network.module.channels == 16
  config.data.image_size = (16, 8)
  tree, loaded = pretrained.load_init_from(tree_of(config))
  assert loaded.model.data_shape == (16, 8, 1)
  tree, loaded = pretrained.replace_model(str(tmp_path), tree_of(config), recipe=False)
  assert loaded.model.data_shape == configs.build(tree).model.data_shape == (16, 8, 1)


def test_changed_options_are_kept_when_a_run_resumes(exported, tmp_path):
  config = tiny_config()
  config.init_from = str(exported)
  config.model.network.dropout = 0.1
  tree, _ = pretrained.load_init_from(tree_of(config))
  tmp_path.joinpath("run").mkdir()
  configs.write(tmp_path / "run", pretrained.copy_config(tree, tmp_path / "run"))
  config.model.network.update({"dropout": 0.3, "remat": "blocks"})
  pretrained.check_start(tree, tmp_path / "run")
  config.init_from = str(tmp_path)
  with pytest.raises(ValueError, match="start/ is the copy of a model that another run started from"):
    pretrained.check_start(tree_of(config), tmp_path / "run")
  config.init_from = str(exported)
  restored = pretrained.restore_init_from(tree_of(config), tmp_path / "run").values["model"]
  saved = configs.read_run(tmp_path / "run")
  assert restored == saved.values["model"] | {"dropout": 0.3, "remat": "blocks"}
  changed = configs.replace(saved, "model.remat", "blocks")
  assert pretrained.restore_init_from(changed, tmp_path / "run").values == changed.values


def test_keys_set_with_a_pretrained_model_are_kept(exported):
  tree = configs.replace(configs.expand({}), "sampling.num_steps", 5)
  tree = configs.replace(tree, "sampler", "heun(s_churn=4)")
  tree, _ = pretrained.replace_model(str(exported), tree, recipe=False, keys=("sampling.num_steps", "sampler.s_churn"))
  assert (tree.values["sampling"]["num_steps"], tree.values["sampler"]["s_churn"]) == (5, 4.0)


def samples_of(folder, output, code, name="ddim_nfe2_seed0"):
  assert code == 0, output
  with np.load(folder / "samples" / f"{name}.npz") as file:
    return dict(file)


def sample(folder, *flags):
  options = ("--mode=sample", "--sampler=ddim", "--num_steps=2", "--num_samples=2")
  code, output = call(*options, f"--pretrained={folder}", f"--workdir={folder}", *flags)
  arrays = samples_of(folder, output, code)
  shutil.rmtree(folder / "samples")
  return arrays


# Use groups of several channels. Normalizing a single channel removes any embedding that is added to it.
SMALL = {"block_out_channels": (8, 8), "norm_num_groups": 2}


def test_a_model_of_non_square_images_is_sampled(tmp_path):
  write_pipeline(tmp_path, None, sample_size=(8, 16), **SMALL)
  assert sample(tmp_path)["samples"].shape == (2, 8, 16, 3)


def test_the_clipping_range_comes_from_the_folder(tmp_path):
  """Estimates of x_0 are clipped to the scheduler's range, and samples (pixels) to [-1, 1]."""
  write_pipeline(tmp_path, diffusers.DDIMScheduler(clip_sample_range=2.0), **SMALL)
  tree, loaded = pretrained.replace_model(str(tmp_path), configs.expand({}), recipe=False)
  assert tree.values["sampling"]["clip"] == {"component": "guidance.clip", "low": -2.0, "high": 2.0}
  clipped = configs.build(tree, loaded.model).sampling.clip(denoise=lambda x_t, t: x_t)
  np.testing.assert_array_equal(clipped(np.float32([-9, -1.5, 1.5, 9]), 0.5), [-2, -1.5, 1.5, 2])
  assert sample(tmp_path)["samples"].dtype == np.uint8


CONDITIONED = {
  "level": ({"class_embed_type": "timestep"}, "5", "900"),
  "vector": ({"class_embed_type": "identity"}, ",".join(["1"] * 32), ",".join(["-2"] * 32)),
  "classes": ({"num_class_embeds": 4}, "0", "3"),
}


@pytest.mark.parametrize("name", CONDITIONED)
def test_conditions_of_a_folder_are_set_by_the_command_line(name, tmp_path):
  changes, first, second = CONDITIONED[name]
  # The network predicts x_0. With other predictions and so few steps, samples are only black and white.
  write_pipeline(tmp_path, diffusers.DDIMScheduler(prediction_type="sample"), **SMALL | changes)
  one, other = (sample(tmp_path, f"--given={name}={value}") for value in (first, second))
  assert np.any(one["samples"] != other["samples"])
  both = sample(tmp_path, f"--given={name}={first}", f"--given={name}={second}")
  np.testing.assert_array_equal(both["samples"], [one["samples"][0], other["samples"][1]])
  expected = np.array([[float(word) for word in value.split(",")] for value in (first, second)])
  np.testing.assert_array_equal(both[name], expected if name == "vector" else expected[:, 0])
  if name != "classes":
    code, output = call("--mode=sample", f"--pretrained={tmp_path}", f"--workdir={tmp_path}")
    assert_refused(code, output, f"Got no {name} .*Set --given {name}=<value>")


def test_an_image_condition_of_a_folder_is_read_from_a_file(tmp_path):
  write_pipeline(tmp_path / "model", in_channels=4, **SMALL)
  levels = (0, 255)
  for level in levels:
    Image.fromarray(np.full((8, 8), level, np.uint8)).save(tmp_path / f"{level}.png")
  hints = [f"--given=hint={tmp_path / f'{level}.png'}" for level in levels]
  one, other = (sample(tmp_path / "model", hint) for hint in hints)
  assert np.any(one["samples"] != other["samples"])
  both = sample(tmp_path / "model", *hints)
  np.testing.assert_array_equal(both["samples"], [one["samples"][0], other["samples"][1]])
  shutil.copytree(tmp_path / "model", tmp_path / "again")
  where = ("--mode=sample", f"--pretrained={tmp_path / 'again'}", f"--workdir={tmp_path / 'work'}")
  code, output = call(*where, f"--given=hint={tmp_path / 'none.png'}")
  assert_refused(code, output, "Got --given hint=.*none.png, which does not exist")
  shutil.rmtree(tmp_path / "model")
  code, output = call(*where, f"--given=hint={tmp_path}")
  assert_refused(code, output, "Got --given hint=.* with 2 images; expected one. Repeat the flag")


def test_fine_tuning_keeps_the_conditions_of_a_folder(tmp_path):
  """The data have an image and a vector under the names of the conditions."""
  changes = {"in_channels": 3, "out_channels": 1, "class_embed_type": "identity"}
  write_pipeline(tmp_path / "model", **SMALL | changes)
  rng = np.random.default_rng(0)
  items = {"images": rng.integers(0, 256, (20, 8, 8, 1), np.uint8), "hint": rng.normal(size=(20, 8, 8, 2))}
  np.savez(tmp_path / "data.npz", **items, vector=rng.normal(size=(20, 32)))
  flags = [RECIPE, f"--config.init_from={tmp_path / 'model'}", f"--workdir={tmp_path / 'run'}"]
  source = f"--config.data.source=arrays(path='{tmp_path}/data.npz', items=['hint', 'vector'])"
  small = ["--config.data.hold_out=8", "--config.evaluation.num_samples=6", "--config.evaluation.k=2"]
  code, output = call(*flags, source, *small, "--config.training.steps=2")
  assert code == 0, output
  assert json.loads((tmp_path / "run" / "eval.json").read_text())["num_samples"] == 6
  code, output = call(*flags, source.replace("'hint', ", ""), *small, f"--workdir={tmp_path / 'other'}")
  assert_refused(
    code, output, "the items classes, image, vector for a model with the condition hint; expected an item 'hint'"
  )
