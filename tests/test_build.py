import itertools
import json
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ddpm_jax import build, ema, parallel, randomness, schema
from tests.conftest import ROOT
from tests.parameters import random_params
from tests.recipes import LEVELS, tiny_config


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("process.name", "discret", "Did you mean 'discrete'"),
    ("process.schedule", "cosin", "Did you mean 'cosine'"),
    ("process.beta_max", 2000.0, "inside \\(0, 1\\)"),
    ("prediction", "epsilon", "config.prediction"),
    ("loss.weighting", "simpel", "Did you mean 'simple'"),
    ("loss.times", "log_norm", "Did you mean 'log_normal'"),
    ("process.zero_terminal_snr", True, "zero terminal SNR"),
    ("process.name", "rectified_flow", "wanted V, X0, VELOCITY or edm"),
    ("sampling.variance", "learned", "without config.learned_variance"),
    ("sampling.corrector_steps", -1, "num_steps=-1"),
    ("network.dtype", "float16", "Did you mean 'bfloat16'"),
    ("network.multipliers", (1, 1, 1, 1, 2), "divisible by 16"),
    ("sampling.sampler", "ddmi", "Did you mean 'ddim'"),
    ("sampling.grid", "trail", "Did you mean 'trailing'"),
    ("sampling.num_steps", 2000, "num_steps=2000"),
    ("data.source", "digit", "Did you mean 'digits'"),
    ("process.betas", (0.1, 0.2), "none with another"),
    ("process.schedule", "table", "0 betas and num_steps=1000"),
    ("data.channels", 3, "shape \\(8, 8, 1\\)"),
    ("data.image_size", 16, "attention_resolutions=\\(4,\\) for images of 16"),
    ("data.hold_out", 5000, "hold_out=5000"),
    ("ema.decay", 1.5, "decay of 1.5"),
    ("ema.kind", "powers", "'powers' as config.ema.kind.*Did you mean 'power'"),
    ("ema.snapshot_every", -1, "snapshot_every=-1"),
    ("ema.snapshot_every", 10, "snapshot_every=10 with kind='fixed'"),
    ("optimizer.name", "adamm", "'adamm' as config.optimizer.name.*Did you mean 'adam'"),
    ("optimizer.name", "lbfgs", "alone"),
    ("optimizer.arguments", "b2", "wanted names"),
    ("optimizer.arguments", "b3=0.9", "'b3' as an argument of adam"),
    ("optimizer.schedule", "cosin", "'cosin' as config.optimizer.schedule.*Did you mean 'cosine'"),
    ("optimizer.clip_norm", -1.0, "clip_norm=-1"),
    ("optimizer.decay_steps", -1, "decay_steps=-1"),
    ("network.heads", 0, "heads=0"),
    ("network.groups", -1, "groups=-1"),
    ("network.groups", 16, "groups=16"),
    ("network.dropout", 1.5, "dropout=1.5"),
  ],
)
def test_wrong_values_are_errors_when_built(key, value, message):
  config = tiny_config()
  config.process.schedule, config.prediction = "linear", "eps"
  config.network.update(LEVELS)
  section, _, name = key.rpartition(".")
  (config[section] if section else config)[name] = value
  with pytest.raises(ValueError, match=message):
    build_all(config)


def build_all(config):
  build.build_optimizer(config)
  build.build_loss(config)
  build.build_generate(config, parallel.make_mesh(devices=jax.devices()[:1]))
  build.build_data(config)


def test_the_tiny_config_is_sound():
  schema.check_config(tiny_config())
  build_all(tiny_config())


def test_the_schedule_ends_with_the_training():
  config = tiny_config()
  config.optimizer.update({"schedule": "cosine", "warmup_steps": 5, "final_factor": 0.1})
  rate, peak = build.build_schedule(config), config.optimizer.learning_rate
  np.testing.assert_allclose([rate(4), rate(12), rate(20)], [peak, peak / 10, peak / 10], rtol=1e-5)
  config.optimizer.decay_steps = 20
  np.testing.assert_allclose(build.build_schedule(config)(20), peak / 10, rtol=1e-5)
  config.optimizer.update({"schedule": "inverse_sqrt", "decay_steps": 0})
  np.testing.assert_allclose(build.build_schedule(config)(19), peak / 2, rtol=1e-5)


@pytest.mark.parametrize(
  "settings",
  [
    {"optimizer.name": "adamw", "optimizer.arguments": "b2=0.95, weight_decay=0.01", "optimizer.clip_norm": 0.0},
    {"optimizer.name": "sm3", "optimizer.warmup_steps": 0},
    {"ema.kind": "half_life"},
    {"ema.kind": "half_life", "ema.ramp_up": 0.0},
    {"ema.kind": "power", "ema.stds": (0.05, 0.1, 0.2), "ema.snapshot_every": 10},
  ],
)
def test_every_kind_of_optimizer_and_average_from_a_config(settings):
  config = tiny_config()
  config.update_from_flattened_dict(settings)
  # As a run reads it back.
  config = ConfigDict(json.loads(json.dumps(config.to_dict())))
  schema.check_config(config)
  optimizer, params = build.build_optimizer(config), {"w": jnp.ones(3)}
  state = optimizer.init(params)
  updates, state = optimizer.update({"w": jnp.array([1.0, 0.0, -1.0])}, state, params)
  assert updates["w"][0] < 0
  assert len(ema.split(state)[1]) == (3 if config.ema.kind == "power" else 1)


def test_an_optimizers_arguments_are_finite():
  config = tiny_config()
  config.optimizer.update({"name": "adamw", "arguments": "weight_decay=1e999"})
  with pytest.raises(ValueError, match="weight_decay=inf"):
    build.build_optimizer(config)


# Every sampler, on one process after another, with what is usually predicted there.
USUAL = {
  "discrete": "v",
  "vp": "eps",
  "sub_vp": "score",
  "ve": "score",
  "edm": "edm",
  "rectified_flow": "velocity",
  "cosine": "v",
}
PAIRS = [*zip(build.SAMPLERS, itertools.cycle(USUAL), strict=False), ("ode", "discrete"), ("ancestral", "zero_snr")]


# One step rule, and the solver that chooses its own steps, are compiled for two batch sizes; the others for one.
IN_TWO_SIZES = ("ddim", "ode")


@pytest.mark.parametrize(("sampler", "process"), PAIRS)
def test_every_sampler_runs_from_a_config_whatever_the_batch(sampler, process, dense):
  """Draw the same samples from the same keys at other places of another batch."""
  config = tiny_config()
  if process == "zero_snr":
    config.process.zero_terminal_snr, config.prediction = True, "v"
  else:
    config.process.name, config.prediction = process, USUAL[process]
  config.sampling.update({"sampler": sampler, "num_steps": 5, "batch_size": 8, "tolerance": 1e-3})
  config.network.num_classes = 3
  params, mesh = random_params(config), parallel.make_mesh(devices=jax.devices()[:1])
  generate = build.build_generate(config, mesh)
  classes = np.arange(16) % 3
  whole, nfe = generate(params, 1, 0, {"classes": classes[:8]}, {})
  size = 4 if sampler in IN_TWO_SIZES else 8
  if size != 8:
    config.sampling.batch_size = size
    generate = build.build_generate(config, mesh)
  part, _ = generate(params, 1, 4, {"classes": classes[4 : 4 + size]}, {})
  assert whole.shape == (8, 8, 8, 1)
  assert jnp.all(jnp.isfinite(whole))
  assert np.max(np.abs(whole[4:] - whole[:4])) > 0.01
  difference = np.abs(whole[4:] - part[:4])
  # Batches of other sizes round differently, and where that turns the choice of a step, the flow is as exact as was asked for.
  assert np.mean(difference) < 1e-3 if sampler == "ode" else np.max(difference) < 1e-4
  calls = {"heun": 9, "dpmpp_2s": 9, "dpmpp_sde": 9, "dpm_solver": 13 if process != "rectified_flow" else 11}
  assert np.all(nfe == calls.get(sampler, 5)) or sampler == "ode"


def test_samples_are_the_same_to_the_last_bit_on_any_number_of_devices():
  config = runpy.run_path(str(ROOT / "configs" / "digits_vp.py"))["get_config"]()
  config.sampling.num_steps = 4
  params, each = random_params(config), 4

  def samples(mesh):
    config.sampling.batch_size = each * mesh.size
    laid_out = jax.device_put(params, parallel.state_shardings(mesh, params))
    return np.asarray(build.build_generate(config, mesh)(laid_out, 0, 0, {}, {})[0][:each])

  one = samples(parallel.make_mesh(devices=jax.devices()[:1]))
  for fsdp in (1, 4):
    np.testing.assert_array_equal(samples(parallel.make_mesh(fsdp=fsdp)), one)


TIMES = ("uniform", "low_discrepancy", "log_normal", "logit_normal")


@pytest.mark.parametrize(("weighting", "times"), zip(build.WEIGHTINGS, itertools.cycle(TIMES), strict=False))
def test_every_weighting_and_distribution_of_times_trains_from_a_config(weighting, times, dense):
  config = tiny_config()
  config.process.name = "cosine"
  config.loss.update({"weighting": weighting, "times": times})
  params = random_params(config)
  loss, _ = jax.jit(build.build_loss(config))(
    params, jax.random.split(jax.random.key(1), 4), {"image": jnp.ones((4, 8, 8, 1))}
  )
  assert jnp.isfinite(loss)
  assert loss > 0


def test_a_learned_variance_from_a_config():
  """The network has twice the channels, and the hybrid loss trains them."""
  config = tiny_config()
  config.learned_variance = True
  params = random_params(config)
  keys, batch = jax.random.split(jax.random.key(1), 4), {"image": jnp.ones((4, 8, 8, 1))}
  (_, details), slopes = jax.jit(jax.value_and_grad(build.build_loss(config), has_aux=True))(params, keys, batch)
  assert jnp.all(details["vlb_bits"] > 0)
  assert slopes["conv_out"]["kernel"].shape[-1] == 2
  assert jnp.all(jnp.any(slopes["conv_out"]["kernel"] != 0, (0, 1, 2)))
  config.process.name = "vp"
  with pytest.raises(ValueError, match="wanted a discrete process"):
    build.build_loss(config)


def test_the_ancestral_sampler_uses_a_learned_variance(dense):
  config = tiny_config()
  config.learned_variance = True
  config.sampling.update({"sampler": "ancestral", "variance": "learned", "num_steps": 4, "corrector_steps": 1})
  params = random_params(config)
  config.sampling.batch_size = 4
  images, nfe = build.build_generate(config, parallel.make_mesh(devices=jax.devices()[:1]))(params, 0, 0, {}, {})
  assert images.shape == (4, 8, 8, 1)
  assert np.all(nfe == 8)


def test_labels():
  config = tiny_config()
  assert build.build_labels(config, None, 4) is None
  with pytest.raises(ValueError, match="without classes"):
    build.build_labels(config, [1], 4)
  config.network.num_classes = 3
  np.testing.assert_array_equal(build.build_labels(config, None, 4), [0, 1, 2, 0])
  np.testing.assert_array_equal(build.build_labels(config, [2, 1], 5), [2, 1, 2, 1, 2])
  for wrong in ([3], [-1], []):
    with pytest.raises(ValueError, match="labels from 0 to 2"):
      build.build_labels(config, wrong, 4)


def test_labels_in_the_data_s_proportions():
  """By largest remainder, and of any part of them each class has nearly its share."""
  config = tiny_config()
  config.network.num_classes = 4
  counts = np.array([700, 200, 0, 97])
  labels = build.build_labels(config, None, 100, counts=counts)
  np.testing.assert_array_equal(np.bincount(labels, minlength=4), [70, 20, 0, 10])
  for first in range(0, 100, 10):
    part = np.bincount(labels[first : first + 10], minlength=4)
    assert np.all(np.abs(part - [7, 2, 0, 1]) <= 1)
  for count in (1, 2, 7, 33):
    part = build.build_labels(config, None, count, counts=counts)
    assert part.shape == (count,)
    assert part.dtype == np.int32
    assert np.all(np.abs(np.bincount(part, minlength=4) - count * counts / 997) < 1)
  np.testing.assert_array_equal(build.build_labels(config, None, 6, counts=np.full(4, 5)), [0, 1, 2, 3, 0, 1])
  np.testing.assert_array_equal(build.build_labels(config, None, 8, counts=np.full(4, 5)), [0, 1, 2, 3, 0, 1, 2, 3])
  np.testing.assert_array_equal(build.build_labels(config, [3], 2, counts=counts), [3, 3])


def classifier_config():
  config = tiny_config()
  config.task, config.network.num_classes = "classify", 10
  return config


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("task", "clasify", "'clasify' as config.task.*Did you mean 'classify'"),
    ("network.num_classes", 1, "num_classes=1; wanted 2 or more classes"),
    ("loss.label_dropout", 0.1, "label_dropout=0.1 and learned_variance=False; wanted 0 and False"),
    ("learned_variance", True, "learned_variance=True; wanted 0 and False"),
    ("network.heads", 3, "heads=3"),
  ],
)
def test_wrong_values_of_a_classifier_are_errors_when_built(key, value, message):
  config = classifier_config()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=message):
    build.build_loss(config)


def test_a_classifier_draws_nothing_and_a_denoiser_classifies_nothing():
  config, mesh = classifier_config(), parallel.make_mesh(devices=jax.devices()[:1])
  for call in (lambda: build.build_generate(config, mesh), lambda: build.build_denoise(config, {}, None, {})):
    with pytest.raises(ValueError, match="holds a classifier, which draws nothing; wanted a run that denoises"):
      call()
  with pytest.raises(ValueError, match="tells no classes apart; wanted a run with task='classify'"):
    build.build_classifier(tiny_config(), {})


@pytest.mark.parametrize("prediction", ["v", "edm"])
def test_a_classifier_from_a_config(prediction):
  """The loss that trains it, and the log-probabilities of what was trained, under the same scaling of the input."""
  config = classifier_config()
  config.process.name, config.prediction = "vp", prediction
  params = random_params(config)
  x_0, t = jax.random.normal(jax.random.key(1), (4, 8, 8, 1)), jnp.array([0.1, 0.2, 0.5, 0.9])
  keys, batch = jax.random.split(jax.random.key(2), 4), {"image": x_0, "label": jnp.arange(4)}
  batch["times"] = (t, jnp.ones(4))

  def both(params):
    eps = randomness.normal(randomness.fold_in(keys, 1), x_0.shape)
    x_t = build.build_process(config).perturb(x_0, t, eps)
    return build.build_loss(config)(params, keys, batch), build.build_classifier(config, params)(x_t, t)

  (loss, details), log_probs = jax.jit(both)(params)
  np.testing.assert_allclose(details["loss"], -log_probs[jnp.arange(4), jnp.arange(4)], rtol=1e-4)
  np.testing.assert_allclose(loss, jnp.mean(details["loss"]), rtol=1e-6)
  assert build.flops_per_image(config) > 0


def test_data_with_more_classes_than_the_network_is_an_error():
  config = tiny_config()
  config.network.num_classes = 9
  with pytest.raises(ValueError, match="labels 0 to 9 for network.num_classes=9"):
    build.build_data(config)


def test_folders_with_splits(tmp_path):
  from PIL import Image

  for split, count in (("train", 3), ("test", 2)):
    (tmp_path / split / "a").mkdir(parents=True)
    for index in range(count):
      Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / split / "a" / f"{index}.png")
  config = tiny_config()
  config.data.update({"source": "folder", "path": str(tmp_path), "eval_split": "test", "hold_out": 0})
  train, held_out = build.build_data(config)
  assert (len(train), len(held_out)) == (3, 2)
  config.data.update({"eval_split": "", "hold_out": 2})
  train, held_out = build.build_data(config)
  assert (len(train), len(held_out)) == (1, 2), "held out of the training split, not of everything"
  config.data.update({"path": str(tmp_path / "train"), "eval_split": "test", "hold_out": 0})
  assert build.build_data(config)[1] is None, "classes alone"
  config.data.update({"path": str(tmp_path), "eval_split": "tset"})
  with pytest.raises(ValueError, match=r"wanted .*tset too, or neither"):
    build.build_data(config)
  config.data.path = ""
  with pytest.raises(ValueError, match="data.source.path"):
    build.build_data(config)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_broken_file_in_either_split_is_named(tmp_path, split):
  from PIL import Image

  for name in ("train", "test"):
    (tmp_path / name).mkdir()
    for index in range(4):
      Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name / f"{index}.png")
  (tmp_path / split / "2.png").write_bytes(b"broken")
  config = tiny_config()
  config.data.update({"source": "folder", "path": str(tmp_path), "eval_split": "test"})
  with pytest.raises(ValueError, match=rf"{split}.2\.png"):
    build.build_data(config)
