"""Compare models of DiTPipeline folders with diffusers' pipeline, live, from the same noise."""

import inspect
import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
from diffusers.pipelines.dit import pipeline_dit

from ddpm_jax import interop, predictions, sampling
from ddpm_jax.interop.card import model_card
from ddpm_jax.models import networks
from ddpm_jax.models.guided import Parameters
from ddpm_jax.networks import DiT
from tests.commands import assert_refused, call
from tests.test_interop_dit import SMALL, random_peer
from tests.test_interop_pipelines import assert_one_gray_level
from tests.test_interop_stable_diffusion import sample_ours
from tests.text_pipelines import SIZE, as_torch, autoencoder, noise

# The pipeline's null class is 1000. The names of the first class are two.
NETWORK = SMALL | {"num_embeds_ada_norm": 1000, "sample_size": SIZE}
LABELS = {"0": "tench, Tinca tinca", "7": "cock"}
CLASSES = np.array([7, 999], np.int32)


def make(**options):
  """Return a DiTPipeline with random parameters."""
  scheduler = diffusers.DDIMScheduler(clip_sample=False)
  parts = {"transformer": random_peer(NETWORK | options), "vae": autoencoder(), "scheduler": scheduler}
  pipeline = diffusers.DiTPipeline(**parts)
  pipeline.set_progress_bar_config(disable=True)
  return pipeline


def edit(file, **changes):
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """Return a pipeline whose network also learns the variance, its folder, our model and all parameters."""
  pipeline, folder = make(out_channels=8), tmp_path_factory.mktemp("dit") / "pipeline"
  pipeline.save_pretrained(folder)
  edit(folder / "model_index.json", id2label=LABELS)
  model, params = interop.diffusers.load(folder)
  return pipeline, folder, model, Parameters(params, model.load_frozen())


def peer_images(pipeline, scale, steps=4):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline_dit, "randn_tensor", lambda *args, **options: as_torch(noise()))
    options = {"guidance_scale": scale, "num_inference_steps": steps, "output_type": "np"}
    return np.round(pipeline(class_labels=CLASSES.tolist(), **options).images * 255).astype(np.uint8)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_samples_match_the_pipeline(scale, written):
  ours = sample_ours(written, "own", scale, classes=CLASSES)
  assert_one_gray_level(ours, peer_images(written[0], scale))


def test_a_fixed_variance_matches_the_pipeline(tmp_path):
  pipeline = make(out_channels=4)
  pipeline.save_pretrained(tmp_path)
  model, params = interop.diffusers.load(tmp_path)
  assert not model.prediction.learned_variance
  one = pipeline, tmp_path, model, Parameters(params, model.load_frozen())
  assert_one_gray_level(sample_ours(one, "own", 4.0, classes=CLASSES), peer_images(pipeline, 4.0))


def test_the_model_and_its_defaults_are_those_of_the_pipeline(written):
  pipeline, _, model, parameters = written
  options = {key: one.default for key, one in inspect.signature(pipeline.__call__).parameters.items()}
  defaults = model.defaults
  assert (defaults.name, defaults.guidance_scale, defaults.steps, defaults.clip) == (
    "ddim",
    options["guidance_scale"],
    options["num_inference_steps"],
    None,
  )
  classes = model.conditions["classes"]
  assert (classes.num_choices, int(classes.null(None))) == (1000, 1000)
  # The original samples by all steps of DDPM with the learned variance, which DiTPipeline drops.
  assert model.prediction == predictions.learned_range(predictions.EPS)
  rule, x = sampling.ancestral(model.process, variance="learned"), noise()
  given = model.encode_conditions(jax.random.split(jax.random.key(0), 2), {"classes": CLASSES})
  denoise = model.denoise(parameters.params, given)
  step = jax.jit(lambda x: sampling.sample(jax.random.key(0), rule, denoise, x, model.times(2)))
  assert np.isfinite(step(x)).all()


def test_a_saved_model_is_opened_by_the_peer(written, tmp_path):
  pipeline, _, model, parameters = written
  target = tmp_path / "saved"
  interop.diffusers.save(target, model, parameters.params, clip=None, frozen=parameters.frozen)
  again = diffusers.DiTPipeline.from_pretrained(target)
  again.set_progress_bar_config(disable=True)
  assert again.labels == {"tench": 0, "Tinca tinca": 0, "cock": 7}
  assert type(again.scheduler) is diffusers.DDIMScheduler
  assert_one_gray_level(peer_images(again, 4.0), peer_images(pipeline, 4.0))
  other, params = interop.diffusers.load(target)
  assert other.network.module == model.network.module
  jax.tree.map(np.testing.assert_array_equal, params, parameters.params)
  assert "DiTPipeline" in (target / "README.md").read_text()


def test_a_copy_keeps_the_names_of_classes(written, tmp_path):
  _, folder, model, _ = written
  interop.diffusers.copy_config(folder, tmp_path / "copy")
  assert not list((tmp_path / "copy" / "transformer").glob("*.safetensors"))
  again = interop.diffusers.read(tmp_path / "copy")
  assert (again.network.module, again.origin) == (model.network.module, model.origin)
  assert again.origin.labels == LABELS


def test_folders_of_the_old_class_are_read(written, tmp_path):
  _, folder, model, _ = written
  copy = shutil.copytree(folder, tmp_path / "copy")
  edit(copy / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
  edit(copy / "transformer" / "config.json", _class_name="Transformer2DModel")
  assert interop.diffusers.read(copy).network.module == model.network.module
  edit(copy / "transformer" / "config.json", norm_type="layer_norm")
  with pytest.raises(ValueError, match="Transformer2DModel with norm_type='layer_norm', which is not supported"):
    interop.diffusers.read(copy)


@pytest.mark.parametrize(
  ("file", "changes", "message"),
  [
    ("transformer/config.json", {"out_channels": 6}, "expected out_channels of at most in_channels"),
    ("transformer/config.json", {"in_channels": 3, "out_channels": 6}, "3 channels and an autoencoder with latent_ch"),
    ("transformer/config.json", {"_class_name": "PixArtTransformer2DModel"}, "PixArtTransformer2DModel"),
    ("transformer/config.json", {"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel, which is not supp"),
    ("transformer/config.json", {"sample_size": 9}, "patches of side 2"),
    ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "which is not supported; expected one"),
    ("model_index.json", {"unet": ["diffusers", "UNet2DModel"]}, "with the parts scheduler, transformer, unet, vae"),
    ("model_index.json", {"id2label": ["a"]}, "expected the name of a library"),
    ("model_index.json", {"id2label": {"0": 1}}, "id2label={'0': 1}; expected an object with the name of each class"),
  ],
)
def test_folders_whose_parts_do_not_fit_are_errors(file, changes, message, written, tmp_path):
  copy = shutil.copytree(written[1], tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
  edit(copy / file, **changes)
  with pytest.raises(ValueError, match=message):
    interop.diffusers.read(copy)


def test_models_that_the_pipeline_cannot_represent_are_not_saved(written, tmp_path):
  model, params = written[2], written[3].params
  with pytest.raises(ValueError, match="DiT with the conditions none; expected only classes"):
    interop.diffusers.save(tmp_path / "a", model._replace(conditions={}), params, clip=None)
  pixels = interop.diffusers.read(written[1])._replace(codec=model.codec._replace(module=None), data_shape=model.shape)
  with pytest.raises(ValueError, match="codec that diffusers does not support|DiTPipeline needs an autoencoder"):
    interop.diffusers.save(tmp_path / "a", pixels, params, clip=None)


def test_the_command_line_samples_classes(written, tmp_path):
  arguments = [f"--workdir={tmp_path}", f"--pretrained={written[1]}", "--num_steps=2"]
  code, output = call("--mode=sample", *arguments, "--classes=7,999", "--num_samples=2")
  assert code == 0, output
  (path,) = (tmp_path / "samples").glob("*.npz")
  assert np.load(path)["samples"].shape[0] == 2
  assert_refused(*call("--mode=sample", *arguments, "--classes=1000"), "integers from 0 to 999")


def test_a_network_that_diffusers_cannot_represent_is_refused_before_anything_is_read(written):
  model = written[2]
  interop.diffusers.check_exportable(model)
  network = model.network.module.clone(frequency_shift=0.0)
  other = model._replace(network=networks.from_linen(network, model.conditions))
  with pytest.raises(ValueError, match=r"frequency_shift=0\.0.*--config\.model\.network\.frequency_shift=1\.0"):
    interop.diffusers.check_exportable(other)


def test_other_sizes_than_that_of_the_config_are_refused(written):
  interop.diffusers.read(written[1], shape=written[2].data_shape)
  with pytest.raises(ValueError, match="the sample_size of its config"):
    interop.diffusers.read(written[1], shape=(2 * SIZE * 8, 2 * SIZE * 8, 3))


def test_without_dropout_the_last_class_still_means_no_class(written):
  model = interop.diffusers.read(written[1], class_dropout=0.0)
  classes = model.conditions["classes"]
  assert (classes.num_choices, int(classes.null(None)), classes.dropout) == (1000, 1000, 0.0)


def test_a_model_with_a_flow_matching_scheduler_is_refused_before_it_is_saved(written, tmp_path):
  copy = shutil.copytree(written[1], tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
  file = copy / "scheduler" / "scheduler_config.json"
  file.write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
  with pytest.raises(ValueError, match="prediction that diffusers' discrete schedulers do not support"):
    interop.diffusers.check_exportable(interop.diffusers.read(copy))


def test_the_index_tells_which_of_two_networks_is_a_part(written, tmp_path):
  copy = shutil.copytree(written[1], tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
  (copy / "unet").mkdir()
  assert interop.diffusers.read(copy).network.module == written[2].network.module


@pytest.mark.parametrize(("number", "labels"), [(1, "[0]"), (2, "[0, 1]")])
def test_the_example_of_a_card_has_classes_of_the_model(number, labels):
  network = DiT(out_channels=4, num_classes=number + 1)
  options = {"prediction_type": "epsilon", "num_train_timesteps": 1000, "variance_type": "fixed_small"}
  assert f"class_labels={labels}, guidance_scale=1" in model_card(network, {}, (64, 64, 3), options, None, None)
