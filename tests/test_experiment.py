"""Test that building an experiment rejects wrong config values, and that its parts follow the config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import processes, randomness, sampling
from ddpm_jax.config import spec
from ddpm_jax.devices import parallel
from ddpm_jax.losses import Context
from ddpm_jax.runs import programs, reading, stepping
from tests.parameters import random_params
from tests.recipes import LEVELS, experiment_of, set_keys, tiny_config


def build_all(config):
  experiment = experiment_of(config)
  stepping.optimizer(experiment)
  programs.generate(experiment, parallel.make_mesh(devices=jax.devices()[:1]))
  reading.read_data(experiment)


def discrete(schedule, /, **arguments):
  named = spec(f"schedules.{schedule}", **arguments) if isinstance(schedule, str) else schedule
  return spec("processes.discrete", betas=named)


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("model.process", "discret", "Did you mean 'discrete'"),
    ("model.process", discrete("cosin"), "Did you mean 'cosine'"),
    ("model.process", discrete("linear", beta_end=1.5), "inside \\(0, 1\\)"),
    ("model.prediction", "epsilon", "config.model.prediction"),
    ("objective.weighting", "simpel", "Did you mean 'simple'"),
    ("objective.times", "log_norm", "Did you mean 'log_normal'"),
    ("model.process", discrete("zero_terminal_snr", betas=spec("schedules.linear")), "zero terminal SNR"),
    ("model.process", "rectified_flow", "expected V, X0, VELOCITY or edm"),
    ("sampler", spec("sampling.ancestral", variance="learned"), "expected the denoiser of a predictions.learned_range"),
    ("sampler", spec("sampling.with_langevin", sampler="ddim", num_steps=-1), "num_steps=-1"),
    ("model.network.dtype", "float16", "Did you mean 'bfloat16'"),
    ("model.network.multipliers", (1, 1, 1, 1, 2), "divisible by 16"),
    ("sampler", "ddmi", "Did you mean 'ddim'"),
    ("sampling.grid", "trail", "Did you mean 'trailing'"),
    ("sampling.num_steps", 2000, "num_steps=2000"),
    ("data.source", "digit", "Did you mean 'digits'"),
    ("model.process", discrete((0.1, 1.2)), "beta 1.2 at step 2 of 2"),
    ("model.process", discrete(()), "betas of shape \\(0,\\)"),
    ("data.channels", 3, "shape \\(8, 8, 1\\)"),
    ("model.network.attention_levels", (5,), "attention_levels=\\(5,\\) for 2 levels"),
    ("data.hold_out", 5000, "hold_out=5000"),
    ("ema.decay", 1.5, "decay of 1.5"),
    ("ema.kind", "powers", "'powers' as config.ema.kind.*Did you mean 'power'"),
    ("ema.snapshot_every", -1, "snapshot_every=-1"),
    ("ema.snapshot_every", 10, "snapshot_every=10 with config.ema.kind='fixed'"),
    ("optimizer.name", "adamm", "'adamm' as config.optimizer.name.*Did you mean 'adam'"),
    ("optimizer.name", "lbfgs", "alone"),
    ("optimizer.arguments", "b2", "expected names"),
    ("optimizer.arguments", "b3=0.9", "'b3' as an argument of adam"),
    ("optimizer.schedule", "cosin", "'cosin' as config.optimizer.schedule.*Did you mean 'cosine'"),
    ("optimizer.clip_norm", -1.0, "clip_norm=-1"),
    ("optimizer.decay_steps", -1, "decay_steps=-1"),
    ("model.network.heads", 0, "heads=0"),
    ("model.network.groups", -1, "groups=-1"),
    ("model.network.groups", 16, "groups=16"),
    ("model.network.dropout", 1.5, "dropout=1.5"),
  ],
)
def test_wrong_values_are_errors_when_the_config_is_built(key, value, message):
  config = tiny_config()
  config.model.process, config.model.prediction = discrete("linear"), spec("predictions.EPS")
  config.model.network.update(LEVELS)
  set_keys(config, **{key.replace(".", "__"): value})
  with pytest.raises(ValueError, match=message):
    build_all(config)


def test_the_tiny_config_is_valid():
  build_all(tiny_config())


def test_only_changes_of_the_model_rebuild_the_model():
  experiment = experiment_of(tiny_config())
  assert experiment.replace(sampling__num_steps=3).model is experiment.model
  assert experiment.replace(data__image_size=(8, 16)).model.shape == (8, 16, 1)
  assert experiment.replace(model__process="vp").model.process.num_steps is None


def test_flow_matching_is_set_by_components():
  """Values are written as on the command line. A component in another one gets the model's process too."""
  config = tiny_config()
  config.model.prediction = spec("predictions.VELOCITY")
  experiment = experiment_of(config).replace(
    model__process="gvp",
    objective__times="shifted(times=mode(scale=1.0), shift=2.0)",
    sampler="sde(diffusion='linear', scale=0.5)",
    sampling__grid="flow_match(shift=3.0, t_min=0.04)",
    sampling__num_steps=5,
    guidance="classifier_free(scale=2.0, channels=1)",
  )
  gvp = processes.gvp()
  np.testing.assert_allclose(experiment.model.process.alpha(0.3), gvp.alpha(0.3))
  np.testing.assert_array_equal(experiment.times, sampling.grids.flow_match(gvp, 5, shift=3.0, t_min=0.04))
  assert experiment.sampler_name == "sde"
  shifted = experiment.replace(
    model__process="shifted(process=rectified_flow, shift=3.0)", sampling__grid="flow_match_diffusers(shift=3.0)"
  )
  expected = processes.shifted(processes.rectified_flow(), 3.0)
  np.testing.assert_allclose(shifted.model.process.alpha(0.3), expected.alpha(0.3))
  assert shifted.times.shape == (6,)
  for key, value, message in (
    ("sampler", "sde(diffusion='sigmas')", "diffusion='sigmas'"),
    ("objective__times", "mode(scale=3.0)", "scale=3.0; expected a number from -1 to 1.7519"),
    ("model__process", "shifted(shift=0.0)", "config.model.process"),
    ("sampling__grid", "flow_match(shift=0.0)", "shift=0.0"),
  ):
    with pytest.raises(ValueError, match=message):
      experiment.replace(**{key: value})


def test_data_with_more_classes_than_the_network_is_an_error():
  config = tiny_config()
  config.model.conditions.classes = spec("conditions.classes", number=9)
  with pytest.raises(ValueError, match="classes 0 to 9 for config.model.conditions.classes.number=9"):
    reading.read_data(experiment_of(config))


def classifier_config(prediction="V", **process):
  config = tiny_config()
  config.task = spec("tasks.classify")
  network = {"channels": 8, "multipliers": (1,), "blocks": 1, "groups": 4, "attention_levels": (), "dropout": 0.0}
  config.model.network = spec("networks.Classifier", out_channels=10, **network)
  config.objective = spec("losses.classification")
  config.model.prediction = spec(f"predictions.{prediction}")
  return config


def check_classifier(config):
  experiment = experiment_of(config)
  experiment.task.check(experiment, parallel.make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("task", "clasify", "config.task='clasify'.*Did you mean 'classify'"),
    ("model.network.out_channels", 1, "out_channels=1; expected 2 or more classes"),
    (
      "model.conditions",
      {"classes": spec("conditions.classes", number=10, dropout=0.1)},
      "the conditions classes; expected no conditions",
    ),
    ("model.network.heads", 3, "heads=3"),
    ("objective", "denoising", "config.objective=denoising with config.task='classify'; expected classification"),
  ],
)
def test_wrong_values_of_a_classifier_are_errors_when_the_config_is_built(key, value, message):
  config = set_keys(classifier_config(), **{key.replace(".", "__"): value})
  with pytest.raises(ValueError, match=message):
    check_classifier(config)


def test_the_denoise_task_refuses_the_classification_objective():
  with pytest.raises(
    ValueError, match="config.objective=classification with config.task='denoise'; expected denoising"
  ):
    check_classifier(set_keys(tiny_config(), objective="classification"))


def test_the_classifier_config_is_valid():
  check_classifier(classifier_config())


def test_a_classifier_cannot_sample_and_a_diffusion_model_cannot_classify():
  with pytest.raises(
    ValueError, match="task='classify', which generates no samples; expected a run with config.task='denoise'"
  ):
    experiment_of(classifier_config()).task.check_can_sample("a run")
  with pytest.raises(
    ValueError, match="task='denoise'; expected a classifier, that is, a run with config.task='classify'"
  ):
    experiment_of(tiny_config()).task.check_can_classify("a run in --classifier")


@pytest.mark.parametrize("prediction", ["V", "edm"])
def test_the_loss_of_a_classifier_matches_its_log_probabilities(prediction):
  """Training and classifying scale the input in the same way."""
  config = classifier_config(prediction)
  config.model.process = spec("processes.vp")
  params, experiment = random_params(config), experiment_of(config)
  model, objective = experiment.model, experiment.objective
  x_0, t = jax.random.normal(jax.random.key(1), (4, 8, 8, 1)), jnp.array([0.1, 0.2, 0.5, 0.9])
  keys, batch = jax.random.split(jax.random.key(2), 4), {"image": x_0, "classes": jnp.arange(4)}

  def both(params):
    eps = randomness.normal(randomness.fold_in(keys, 1), x_0.shape)
    x_t = model.process.perturb(x_0, t, eps)
    encoded = stepping.encode(model, {}, keys, batch) | {"times": (t, jnp.ones(4))}
    context = Context(jnp.zeros((), jnp.int32), (), params, ())
    return objective.loss({"model": params, "extra": ()}, context, keys, encoded), model.classify(params)(x_t, t)

  (loss, details), log_probs = jax.jit(both)(params)
  np.testing.assert_allclose(details["loss"], -log_probs[jnp.arange(4), jnp.arange(4)], rtol=1e-4)
  np.testing.assert_allclose(loss, jnp.mean(details["loss"]), rtol=1e-6)
  assert stepping.flops_per_image(experiment, stepping.batch_shapes(experiment, 1)) > 0


def test_outside_the_interval_a_rule_does_not_guide(tmp_path):
  """The scale that turns guidance off is 0 for a rule that uses a classifier, and 1 for all other rules."""
  (tmp_path / "mine.py").write_text(
    "from ddpm_jax import guidance\n\ndef rule(denoise, log_prob, scale: guidance.Scale = 1.0):\n  return denoise\n"
  )
  config = tiny_config()
  for name, outside in (("guidance.classifier_free", 1), ("guidance.classifier", 0), (f"{tmp_path}/mine.py:rule", 0)):
    config.guidance = spec(name, scale=spec("guidance.interval", scale=3.0, high=1.0))
    scale = experiment_of(config).guidance.keywords["scale"]
    np.testing.assert_array_equal([scale(0.01), scale(1.0)], [3, outside])
