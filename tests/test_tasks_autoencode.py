"""Test runs of autoencoders: training, resuming, scores, reports, exports, and wrong configs."""

import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import interop, metrics, runs
from ddpm_jax.config import spec
from ddpm_jax.devices import parallel, plan
from ddpm_jax.networks.image_classifier import ImageClassifier
from ddpm_jax.runs import model, reading, reconstruction
from ddpm_jax.storage import checkpoint
from tests.commands import RECIPE, assert_refused, call, start
from tests.parameters import one_device
from tests.recipes import kill_environment, newest_state, set_keys, tiny_config, tree_of

CODES = 8
NETWORK = {"channels": 4, "multipliers": (1, 2), "blocks": 1, "groups": 4, "middle_attention": False}
CRITIC = spec("networks.PatchDiscriminator", channels=4, levels=1)


def config_of(kind="kl", *, features="", critic=True, **training):
  config = tiny_config()
  config.task = "autoencode"
  bottleneck = {"bottleneck": "vq", "num_codes": CODES} if kind == "vq" else {}
  config.model.network = spec("networks.Autoencoder", latent_channels=3, **NETWORK, **bottleneck)
  config.objective = spec("losses.autoencoding", adversarial_start=5)
  config.objective.discriminator = CRITIC if critic else None
  config.objective.perceptual = spec("features.classifier", weights=str(features)) if features else None
  config.optimizer.learning_rate = 5e-3
  config.training.update({"steps": 10, "checkpoint_every": 6, "log_every": 2, "sample_every": 5} | training)
  return config


def save_classifier(path, seed=0):
  params = ImageClassifier(10).init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)))["params"]
  metrics.save_classifier(path, jax.device_get(params), {"kind": "classifier of real images"})
  return path


@pytest.fixture(scope="module")
def features(tmp_path_factory):
  """Return the file of a classifier with random weights."""
  return save_classifier(tmp_path_factory.mktemp("features") / "classifier.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, features):
  """Train a run with a codebook, a discriminator and a perceptual loss, without interruption."""
  folder = tmp_path_factory.mktemp("finished")
  with one_device():
    runs.run_train(tree_of(config_of("vq", features=features)), folder)
  return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  """Train a run with a posterior, and write its report."""
  folder = tmp_path_factory.mktemp("plain")
  config = set_keys(config_of(critic=False), evaluation__report=True, evaluation__every=5, training__keep_best=1)
  with one_device():
    runs.run_train(tree_of(set_keys(config, training__best_metric="eval/psnr", training__checkpoint_every=5)), folder)
  return folder


def scores_of(folder):
  return json.loads((folder / "eval.json").read_text())


@pytest.mark.usefixtures("on_one_device")
def test_a_run_logs_all_terms_and_scores_reconstructions(finished):
  lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == list(range(2, 11, 2))
  terms = {"reconstruction", "perceptual", "commitment", "generator", "discriminator", "adaptive_weight"}
  assert terms | {"perplexity", "used_codes"} <= lines[-1].keys()
  assert lines[0]["discriminator"] == lines[0]["adaptive_weight"] == 0
  assert lines[-1]["discriminator"] > 0
  assert lines[-1]["adaptive_weight"] > 0
  report = scores_of(finished)
  assert {"psnr", "ssim", "frechet_distance", "precision"} <= report["scores"]["reconstructed"].keys()
  assert report["num_samples"] == 40
  assert report["reference"] == "100 held-out images"
  latents = report["latents"]
  assert latents["shape"] == [4, 4, 3]
  assert latents["num_codes"] == CODES
  assert 1 <= latents["perplexity"] <= CODES
  assert 0 < latents["used_share"] <= 1
  assert (finished / "samples" / "final.png").exists()
  assert (finished / "samples" / "step_0000005.png").exists()


@pytest.mark.usefixtures("on_one_device")
def test_a_resumed_run_ends_like_an_uninterrupted_one(finished, features, tmp_path):
  copy = shutil.copytree(finished, tmp_path / "copy")
  shutil.rmtree(copy / "checkpoints" / "10")
  (copy / "eval.json").unlink()
  runs.run_train(tree_of(config_of("vq", features=features)), copy, resume="must")
  assert checkpoint.Checkpoints.steps(copy / "checkpoints") == [6, 10]
  one, two = newest_state(finished), newest_state(copy)
  assert {"codebook", "adaptive_weight"} == one.memory.keys()
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    np.testing.assert_array_equal(a, b)
  assert scores_of(copy)["scores"] == scores_of(finished)["scores"]
  assert scores_of(copy)["latents"] == scores_of(finished)["latents"]


@pytest.mark.usefixtures("on_one_device")
def test_other_perceptual_weights_are_refused_and_the_same_in_another_place_are_not(finished, features, tmp_path):
  copy = shutil.copytree(finished, tmp_path / "copy")
  other = save_classifier(tmp_path / "other.safetensors", seed=1)
  with pytest.raises(ValueError, match=r"frozen parameters \(objective\) that differ"):
    runs.run_train(tree_of(config_of("vq", features=other, steps=11)), copy)
  moved = shutil.copy(features, tmp_path / "moved.safetensors")
  runs.run_train(tree_of(config_of("vq", features=moved)), copy)
  # Scores need no features of the objective.
  experiment = runs.load_experiment(tree_of(config_of("vq", features=tmp_path / "none")), copy)
  runs.run_eval(experiment, copy, seed=0, choice=runs.WeightsChoice())


@pytest.mark.usefixtures("on_one_device")
def test_scores_match_a_direct_computation(plain):
  experiment = runs.load_experiment(None, plain)
  params = model.load_weights(experiment, plain, parallel.make_mesh(), runs.WeightsChoice()).parameters.params
  module, report = experiment.model.network.module, scores_of(plain)
  _, held_out = reading.read_data(experiment)
  chosen = np.random.default_rng(0).permutation(100)[:40]
  images = np.stack([held_out[int(index)]["image"] for index in chosen])
  x = images / np.float32(127.5) - 1
  moments = np.asarray(module.apply({"params": params}, x, method="encode"), np.float64)
  mean, variance = moments[..., :3], np.exp(moments[..., 3:])
  np.testing.assert_allclose(report["latents"]["mean"], mean.mean((0, 1, 2)), atol=1e-4)
  total = (mean**2 + variance).mean((0, 1, 2)) - mean.mean((0, 1, 2)) ** 2
  np.testing.assert_allclose(report["latents"]["std"], np.sqrt(total), rtol=1e-3)
  kl = 0.5 * (mean**2 + variance - 1 - moments[..., 3:]).sum((1, 2, 3)).mean()
  np.testing.assert_allclose(report["latents"]["kl"], kl, rtol=1e-3)
  y = module.apply({"params": params}, mean.astype(np.float32), method="decode")
  pixels = np.clip(np.rint((np.asarray(y) + 1) * 127.5), 0, 255)
  psnr = np.mean(10 * np.log10(255**2 / np.mean((pixels - images) ** 2, (1, 2, 3))))
  np.testing.assert_allclose(report["scores"]["reconstructed"]["psnr"], psnr, rtol=1e-4)
  # The scores during training are for the same images, so the last score is the same.
  lines = [json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines()]
  interim = {line["step"]: line["eval/psnr"] for line in lines if "eval/psnr" in line}
  assert interim.keys() == {5, 10}
  np.testing.assert_allclose(interim[10], psnr, rtol=1e-4)


def test_the_report_shows_reconstructions_and_latents(plain):
  page = (plain / "report.html").read_text()
  assert '<section id="reconstructions">' in page
  assert page.count('alt="reconstruction"') == page.count('alt="original"') == 24
  assert page.count('alt="channel 2"') == 24
  assert '<section id="samples">' not in page
  assert "PSNR" in page
  assert "samples (there are none)" not in page


def test_a_preview_shows_pairs(plain):
  from PIL import Image

  # 32 pairs in 8 columns of 8-pixel images, each enlarged by 6.
  assert Image.open(plain / "samples" / "step_0000005.png").size == (8 * 50 + 2, 8 * 50 + 2)


@pytest.mark.usefixtures("on_one_device")
def test_an_export_loads_as_a_codec_with_the_scale_of_the_latents(plain, tmp_path):
  experiment = runs.load_experiment(None, plain)
  runs.run_export(experiment, plain, tmp_path / "out", runs.WeightsChoice())
  codec, frozen = interop.diffusers.load_codec(tmp_path / "out", posterior="mode")
  report = scores_of(plain)["latents"]
  params = model.load_weights(experiment, plain, parallel.make_mesh(), runs.WeightsChoice()).parameters.params
  x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1)), jnp.float32)
  mean = experiment.model.network.module.apply({"params": params}, x, method="encode")[..., :3]
  expected = (mean - np.asarray(report["mean"])) / np.asarray(report["std"])
  np.testing.assert_allclose(codec.encode(frozen, jax.random.key(0), x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("on_one_device")
def test_sampling_and_exporting_a_codebook_are_refused(finished, plain, tmp_path):
  choice = runs.WeightsChoice()
  with pytest.raises(ValueError, match="bottleneck='vq'"):
    runs.run_export(runs.load_experiment(None, finished), finished, tmp_path / "out", choice)
  refusal = "config.task='autoencode', which generates no samples; expected a run with config.task='denoise'"
  experiment = runs.load_experiment(None, plain)
  with pytest.raises(ValueError, match=refusal):
    runs.run_sample(experiment, plain, num_samples=4, seed=0, choice=choice)
  with pytest.raises(ValueError, match="expected a classifier"):
    experiment.task.check_can_classify("a run")
  assert not (tmp_path / "out").exists()


def test_an_autoencoder_can_be_planned(capsys):
  result = runs.run_plan(tree_of(config_of("vq")), topology_name=None, num_devices=1)
  assert isinstance(result, plan.Plan)
  assert "FLOPs an image" in capsys.readouterr().out


WRONG = [
  ({"objective__discriminator": spec("networks.PatchDiscriminator", levels=5)}, "with levels=5; expected 2 spatial"),
  ({"objective__kl_weight": -1.0}, "Got kl_weight=-1.0; expected a finite number of 0 or more"),
  ({"objective__perceptual": spec("features.vgg")}, "Got no weights for features.vgg; expected a file"),
  ({"objective__perceptual": spec("features.vgg", weights="/none.pth")}, "'?/none.pth'? for features.vgg, a file that"),
  ({"objective__perceptual": spec("features.vgg", levels=6)}, "Got levels=6; expected 1 to 5"),
  ({"objective": "denoising"}, "objective=denoising with config.task='autoencode'; expected autoencoding"),
  ({"model__network": spec("networks.UNet")}, "Got UNet without encode, decode_features, decode_output"),
  (
    {"model__conditions": {"classes": spec("conditions.classes", number=10)}},
    "with the conditions classes; expected no conditions",
  ),
  ({"data__hold_out": 0, "evaluation__every": 5}, "Got no held-out images; expected some to reconstruct"),
  (
    {"training__best_metric": "eval/fid", "evaluation__every": 6, "training__keep_best": 1},
    "one of eval/psnr, eval/ssim",
  ),
  ({"init_from": "somewhere"}, "init_from='somewhere' with config.task='autoencode'; expected no init_from"),
]


@pytest.mark.usefixtures("on_one_device")
@pytest.mark.parametrize(("keys", "message"), WRONG)
def test_wrong_configs_are_refused_before_anything_is_written(keys, message, tmp_path, capsys):
  with pytest.raises(ValueError, match=message):
    runs.run_train(tree_of(set_keys(config_of(critic=False), **keys)), tmp_path / "none")
  assert not (tmp_path / "none").exists()
  assert "compiling" not in capsys.readouterr().out


def test_a_reconstruction_that_is_not_finite_is_an_error():
  with pytest.raises(FloatingPointError, match="in the latents of 1 of 2 images"):
    reconstruction._check_finite("latents", np.array([[0.0], [np.nan]]))


FLAGS = [
  RECIPE,
  "--config.task=autoencode",
  "--config.objective=autoencoding(adversarial_start=4, discriminator=PatchDiscriminator(channels=4, levels=1))",
  "--config.model.network=Autoencoder(channels=4, multipliers=(1, 2), blocks=1, groups=4, middle_attention=False)",
  "--config.training.steps=12",
]


def test_a_killed_command_resumes_to_the_same_state(tmp_path):
  killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
  process = start(*FLAGS, f"--workdir={killed}", **kill_environment(killed / "checkpoints" / "8", step=10))
  code, output = process.finish()
  assert code == -signal.SIGKILL, output
  for folder in (killed, unbroken):
    code, output = call(*FLAGS, f"--workdir={folder}")
    assert code == 0, output
    assert ("resuming from the checkpoint of step 8" in output) == (folder == killed)
    assert "reconstructed" in output
    assert "standard deviation" in output
  for a, b in zip(*(jax.tree.leaves(newest_state(folder)) for folder in (unbroken, killed)), strict=True):
    np.testing.assert_array_equal(a, b)
  assert scores_of(killed)["scores"] == scores_of(unbroken)["scores"]
  code, output = call("--mode=eval", f"--workdir={killed}", "--ema=false")
  assert code == 0, output
  assert scores_of(killed)["weights"] == "raw"


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--config.objective.discriminator.width=3", "'objective.discriminator.width' as a config key of networks.Patch"),
    ("--config.objective.discriminator=vp", "config.objective.discriminator='vp'; expected a network, one of"),
    ("--config.objective.perceptual=vgg(levels=0)", "Got levels=0; expected 1 to 5"),
    ("--config.objective.perceptual=UNet", "config.objective.perceptual='UNet'; expected a network of features"),
    ("--config.objective.error=l3", "config.objective.error='l3'; expected 'l1' or 'l2'"),
  ],
)
def test_wrong_flags_give_one_message(flag, message, tmp_path):
  code, output = call(*FLAGS, flag, f"--workdir={tmp_path / 'none'}")
  assert_refused(code, output, message)
