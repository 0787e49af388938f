"""Test class dropout in training, and guidance from a config against its formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import guidance, predictions, randomness, sampling
from ddpm_jax.config import spec
from ddpm_jax.devices import parallel
from ddpm_jax.losses import Context
from ddpm_jax.models import conditions, guided
from ddpm_jax.models.guided import Guides, Parameters
from ddpm_jax.runs import programs, stepping
from tests.parameters import random_params
from tests.recipes import experiment_of, set_keys, tiny_config


def config_of(rule=None, *, classes=3, dropout=0.1, **keys):
  """Return the config of a model with classes, by default three.

  If `rule` is not None, it becomes config.guidance. A keyword such as `sampling__num_steps=3` sets
  config.sampling.num_steps.
  """
  config = tiny_config()
  if classes:
    config.model.conditions = {"classes": spec("conditions.classes", number=classes, dropout=dropout)}
  config.sampling.update({"num_steps": 3, "batch_size": 4})
  if rule is not None:
    config.guidance = rule
  return set_keys(config, **keys)


def plain(rule=None, **keys):
  """Return the config of a model without classes."""
  return config_of(rule, classes=0, **keys)


def classifier_of(classes=3, **keys):
  config = plain(task=spec("tasks.classify"), **keys)
  config.model.network = spec(
    "networks.Classifier", out_channels=classes, channels=8, multipliers=(1,), blocks=1, groups=4
  )
  config.model.network.update({"attention_levels": (), "dropout": 0.0})
  config.objective = spec("losses.classification")
  return config


def classifier_free(scale=1.0, **options):
  return spec("guidance.classifier_free", scale=scale, **options)


def cfg_plus_plus(scale=0.6, **options):
  return spec("guidance.cfg_plus_plus", scale=scale, **options)


def autoguidance(scale=2.0):
  return spec("guidance.autoguidance", scale=scale)


def classifier(scale=1.0):
  return spec("guidance.classifier", scale=scale)


def interval(scale, low=0.0, high=float("inf")):
  return spec("guidance.interval", scale=scale, low=low, high=high)


def discrete(schedule):
  return spec("processes.discrete", betas=spec(f"schedules.{schedule}"))


def guides_of(**configs):
  return Guides(**{name: experiment_of(config).model for name, config in configs.items()})


def mesh():
  return parallel.make_mesh(devices=jax.devices()[:1])


def test_the_share_of_dropped_classes_does_not_depend_on_the_batch():
  """The embedding of the null class is set to NaN, so the loss of a sample is NaN if its class is dropped."""
  config, count = config_of(dropout=0.3), 600
  params, experiment = random_params(config), experiment_of(config)
  assert params["classes"]["embedding"].shape[0] == 4
  assert random_params(config_of(dropout=0.0))["classes"]["embedding"].shape[0] == 3
  params["classes"]["embedding"][3] = np.nan
  keys = jax.random.split(jax.random.key(1), count)
  x_0 = jax.random.normal(jax.random.key(2), (count, 8, 8, 1))

  @jax.jit
  def losses(params, keys, batch):
    context = Context(jnp.zeros((), jnp.int32), (), None, ())
    batch = stepping.encode(experiment.model, None, keys, batch)
    return experiment.objective.loss({"model": params, "extra": ()}, context, keys, batch)[1]["loss"]

  def is_dropped(rows, shift):
    batch = {"image": x_0[rows], "classes": (jnp.arange(count) + shift)[rows] % 3}
    return np.isnan(losses(params, keys[rows], batch))

  all_rows = is_dropped(np.s_[:], 0)
  assert abs(np.mean(all_rows) - 0.3) < 4 * (0.3 * 0.7 / count) ** 0.5
  np.testing.assert_array_equal(is_dropped(np.s_[100:130], 1), all_rows[100:130])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"dropout": 1.0}, r"dropout=1.0 of classes; expected a share in \[0, 1\)"),
    ({"dropout": -0.1}, "dropout=-0.1"),
    ({"dropout": float("nan")}, "config.model.conditions.classes.dropout=nan; expected a finite number"),
    ({"model__conditions": {"classes": spec("conditions.classes", number=0, dropout=0.1)}}, "number=0 of classes"),
    (
      {"model__conditions": {"classes": spec("conditions.classes", dropout=0.1)}},
      "classes without its required argument number",
    ),
  ],
)
def test_wrong_dropout_of_classes_is_an_error(options, message):
  with pytest.raises(ValueError, match=message):
    experiment_of(config_of(**options))


WRONG = {
  "two guides": (
    config_of(classifier(3.0)),
    {"classifier": classifier_of(), "weak": config_of()},
    "--classifier and --weak; expected one",
  ),
  "no classes": (
    plain(classifier_free(3.0)),
    {},
    r"classifier_free \(scale=3.*a model without classes or another condition",
  ),
  "no classes, cfg_plus_plus": (plain(cfg_plus_plus()), {}, "a model without classes or another condition"),
  "no dropout": (config_of(classifier_free(3.0), dropout=0.0), {}, "trained without dropout of a condition"),
  "no dropout, cfg_plus_plus": (config_of(cfg_plus_plus(), dropout=0.0), {}, "trained without dropout of a condition"),
  "a classifier for nothing": (
    config_of(classifier_free(rescale=0.5)),
    {"classifier": classifier_of()},
    "--classifier with config.guidance=classifier_free, a rule without the argument 'log_prob'",
  ),
  "a weak model for nothing": (
    config_of(cfg_plus_plus(0.5)),
    {"weak": config_of()},
    "--weak with config.guidance=cfg_plus_plus, a rule without the argument 'weak'",
  ),
  "no classifier": (config_of(classifier(3.0)), {}, "guidance=classifier without --classifier; expected --classifier="),
  "no weak model": (config_of(autoguidance()), {}, "guidance=autoguidance without --weak; expected --weak="),
  "cfg_plus_plus rescaled": (
    config_of(cfg_plus_plus(rescale=0.5)),
    {},
    "'guidance.rescale' as a config key of guidance.cfg_plus_plus; expected one of guidance.scale",
  ),
  "cfg_plus_plus at times": (
    config_of(cfg_plus_plus(interval(0.6, low=0.5))),
    {},
    "config.guidance.scale=.*interval.*expected a finite number",
  ),
  "cfg_plus_plus, heun": (
    config_of(cfg_plus_plus(), sampler=spec("sampling.heun")),
    {},
    "two estimates, .*--sampler=ddim",
  ),
  "cfg_plus_plus, ode": (
    config_of(cfg_plus_plus(), sampler=spec("sampling.ode")),
    {},
    "two estimates, .*--sampler=ddim",
  ),
  "cfg_plus_plus, corrected": (
    config_of(cfg_plus_plus(), sampler=spec("sampling.with_langevin", sampler=spec("sampling.ddim"))),
    {},
    "two estimates, .*without corrector steps",
  ),
  "cfg_plus_plus too strong": (config_of(cfg_plus_plus(1.5)), {}, r"scale=1.5 for CFG\+\+; expected it in \[0, 1\]"),
  "a negative scale": (config_of(classifier_free(-1.0)), {}, "guidance scale of -1"),
  "a scale of nan": (
    config_of(classifier_free(float("nan"))),
    {},
    "config.guidance.scale=nan; expected .*a finite number",
  ),
  "a scale of inf": (plain(classifier(float("inf"))), {"classifier": classifier_of()}, "guidance scale of inf"),
  "rescale": (config_of(classifier_free(2.0, rescale=1.5)), {}, "rescale=1.5"),
  "percentile": (
    config_of(sampling__clip=spec("guidance.dynamic_threshold", percentile=1.5)),
    {},
    "config.sampling.clip=guidance.dynamic_threshold: Got percentile=1.5",
  ),
  "an interval from below 0": (config_of(classifier_free(interval(2.0, low=-1.0))), {}, "expected 0 <= low < high"),
  "an empty interval": (config_of(classifier_free(interval(2.0, 3.0, 2.0))), {}, "sigma/alpha=3.0 and 2.0"),
  "a weak model at 1": (
    config_of(autoguidance(1.0)),
    {"weak": config_of()},
    "--weak with a guidance scale of 1, which has no effect",
  ),
  "another size": (
    config_of(classifier()),
    {"classifier": classifier_of(data__image_size=16)},
    r"--classifier, a model whose x has shape \(16, 16, 1\), for a model whose x has shape \(8, 8, 1\)",
  ),
  "other classes": (
    config_of(classifier()),
    {"classifier": classifier_of(10)},
    "a classifier of 10 classes for a model of 3",
  ),
  "another schedule": (
    plain(classifier()),
    {"classifier": classifier_of(model__process=discrete("cosine"))},
    r"--classifier, a guide trained on another process \(.*1000 steps\), for a model trained on .*1000 steps; .*model\.process",
  ),
  "another process": (
    config_of(classifier(), model__process=spec("processes.vp")),
    {"classifier": classifier_of(model__process=spec("processes.rectified_flow"))},
    r"another process \(log-SNR 0 halfway and -inf at the end\), for a model trained on log-SNR -",
  ),
  "another process of the weak model": (
    config_of(autoguidance()),
    {"weak": config_of(model__process=spec("processes.edm"))},
    "--weak, a guide trained on another process",
  ),
  "other classes of the weak model": (
    config_of(autoguidance()),
    {"weak": config_of(classes=4)},
    r"--weak, a model with the conditions classes \(4\), for a model with classes \(3\); expected a weak model with the same",
  ),
  "another condition of the weak model": (
    config_of(autoguidance()),
    {
      "weak": config_of(
        model__conditions={
          "classes": spec("conditions.classes", number=3, dropout=0.1),
          "low": spec("conditions.low_resolution", factor=2),
        }
      )
    },
    r"conditions classes \(3\), low, for a model with classes \(3\); expected a weak model with the same",
  ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_guidance_is_an_error(name):
  config, others, message = WRONG[name]
  with pytest.raises(ValueError, match=message):
    check_guidance(config, guides_of(**others))
  with pytest.raises(ValueError, match=message):
    programs.generate(experiment_of(config), mesh(), guides_of(**others))


def test_a_custom_rule_is_recognized_by_its_arguments_and_estimates():
  """The check calls the rule with example conditions. A rule with two estimates needs a sampler that supports them."""
  experiment = experiment_of(config_of())
  shapes = []

  def custom(conditional, condition, negative):
    shapes.append((condition["classes"].shape, negative["classes"].shape))
    return guidance.cfg_plus_plus(conditional, condition, negative, 0.5)

  assert guided.has_two_estimates(experiment.model, custom)
  assert shapes == [((1,), (1,))]
  assert not guided.has_two_estimates(experiment.model, experiment.guidance)
  guided.check(experiment.model, custom, two_estimates=True)
  with pytest.raises(
    ValueError, match="Got guidance by custom with a sampler that takes data and noise from the same estimate"
  ):
    guided.check(experiment.model, custom, two_estimates=False)


def check_guidance(config, others, *, negative=False):
  experiment = experiment_of(config)
  guided.check(experiment.model, experiment.guidance, experiment.sampler.two_estimates, others, negative=negative)


@pytest.mark.parametrize(
  ("config", "others"),
  [
    (config_of(), {}),
    (config_of(autoguidance()), {"weak": config_of()}),
    (config_of(classifier()), {"classifier": classifier_of()}),
    (plain(classifier_free(3.0)), {}),
  ],
)
def test_negative_conditions_need_classifier_free_guidance(config, others):
  with pytest.raises(
    ValueError, match=r"--negative_prompt\) without classifier-free guidance|without classes or another condition"
  ):
    check_guidance(config, guides_of(**others), negative=True)


@pytest.mark.parametrize(
  ("config", "others", "negative"),
  [
    (plain(), {}, False),
    (config_of(dropout=0.0), {}, False),
    (config_of(classifier_free(0.0)), {}, False),
    (
      config_of(
        classifier_free(interval(3.0, 0.3, 5.0), rescale=0.7),
        sampling__clip=spec("guidance.dynamic_threshold", percentile=0.99),
      ),
      {},
      False,
    ),
    (config_of(classifier_free(3.0)), {}, True),
    (config_of(classifier_free(3.0), dropout=0.0), {}, True),
    (config_of(cfg_plus_plus()), {}, True),
    (config_of(cfg_plus_plus(1.0), sampler=spec("sampling.euler")), {}, False),
    (plain(classifier()), {"classifier": classifier_of()}, False),
    (config_of(classifier(0.0), dropout=0.0), {"classifier": classifier_of()}, False),
    (plain(autoguidance()), {"weak": plain(model__network__channels=4)}, False),
    (config_of(autoguidance(interval(2.0, high=5.0))), {"weak": config_of(model__network__channels=4)}, False),
  ],
)
def test_valid_guidance_passes(config, others, negative):
  others = guides_of(**others)
  check_guidance(config, others, negative=negative)
  programs.generate(experiment_of(config), mesh(), others, negative=negative)


def test_guided_denoisers_match_their_formulas(dense):
  """The formulas combine estimates without guidance. One program computes the formulas and `guided.denoise`."""
  config, keys = config_of(), jax.random.split(jax.random.key(0), 4)
  params, weak_params, probs_params = (random_params(c, i) for i, c in enumerate((config, config, classifier_of())))
  model, judge = experiment_of(config).model, experiment_of(classifier_of()).model
  process, t = model.process, jnp.array([0.2, 0.5, 0.7, 0.9])
  classes, negative, null_classes = jnp.array([0, 1, 2, 0]), jnp.array([1, 2, 0, 2]), jnp.full(4, 3)
  inputs = {"classes": classes}

  def run(x_t, params, weak_params, probs_params):
    def of(classes, params=params):
      return model.conditional(params)(x_t, t, {"classes": classes})

    def log_prob(x):
      return jnp.sum(judge.classify(probs_params)(x, t)[jnp.arange(4), classes])

    def result(rule, inputs=inputs, **others):
      parameters = Parameters(params, guides={"classifier": (probs_params, {}), "weak": (weak_params, {})})
      experiment = experiment_of(config_of(rule))
      return guided.denoise(model, experiment.guidance, keys, inputs, parameters, Guides(**others))(x_t, t)

    c, u, n, weak = of(classes), of(null_classes), of(negative), of(classes, weak_params)
    noise = (process.sigma(t) / process.alpha(t))[:, None, None, None]
    inside = (noise >= 0.5) & (noise <= 5)
    both = u + 3 * (c - u)
    guided_std, conditional_std = (jnp.std(x, (1, 2, 3), keepdims=True) for x in (both, c))
    slope = (process.sigma(t) ** 2 / process.alpha(t))[:, None, None, None] * jax.grad(log_prob)(x_t)
    negative_inputs = {"classes": classes, "negative_classes": negative}
    estimates, negative_estimates = result(cfg_plus_plus()), result(cfg_plus_plus(), negative_inputs)
    return {
      "none": (result(classifier_free()), c),
      "unconditional": (result(classifier_free(0.0)), u),
      "classifier-free": (result(classifier_free(3.0)), both),
      "negative": (result(classifier_free(3.0), negative_inputs), n + 3 * (c - n)),
      "rescaled": (result(classifier_free(3.0, rescale=0.5)), both * (0.5 + 0.5 * conditional_std / guided_std)),
      "interval": (result(classifier_free(interval(3.0, 0.5, 5.0))), jnp.where(inside, both, c)),
      "cfg_plus_plus": (estimates.x_0, u + 0.6 * (c - u)),
      "noise of cfg_plus_plus": (estimates.unguided, u),
      "negative of cfg_plus_plus": (negative_estimates.unguided, n),
      "weak": (result(autoguidance(2.0), weak=model), weak + 2 * (c - weak)),
      "classifier": (result(classifier(4.0), classifier=judge), c + 4 * slope),
      # Outside the interval the classifier does not guide, so its scale is 0.
      "classifier at times": (
        result(classifier(interval(4.0, 0.5, 5.0)), classifier=judge),
        jnp.where(inside, c + 4 * slope, c),
      ),
    }, {"u": u, "n": n, "weak": weak, "slope": c + slope, "inside": jnp.where(inside, both, c), "guided": both}

  x_t = jax.random.normal(jax.random.key(3), (4, 8, 8, 1))
  pairs, others = jax.jit(run)(x_t, params, weak_params, probs_params)
  for name, (result, expected) in pairs.items():
    np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-3 * np.std(expected), err_msg=name)
  c = pairs["none"][1]
  for name, other in others.items():
    assert np.max(np.abs(other - c)) > 0.01 * np.std(c), f"{name} changes the estimate"
  assert np.max(np.abs(others["inside"] - others["guided"])) > 0.01 * np.std(c)


def test_samples_follow_the_guided_model_and_a_scale_of_one_changes_nothing(dense):
  config = config_of(classifier_free(3.0))
  params, classes, experiment = random_params(config), jnp.array([0, 1, 2, 0]), experiment_of(config)
  result, nfe = programs.generate(experiment, mesh())(Parameters(params), 5, 4, {"classes": classes})
  model, process = experiment.model, experiment.model.process

  def direct(params):
    keys = randomness.sample_keys(jax.random.fold_in(jax.random.key(5), 2), 4 + jnp.arange(4))
    given, null_classes = {"classes": classes}, {"classes": jnp.full(4, 3)}
    denoise = guidance.classifier_free(model.conditional(params), given, null_classes, 3.0)
    start, times = (
      process.prior(randomness.fold_in(keys, 0), (4, 8, 8, 1)),
      sampling.grids.for_sampler(sampling.ddim(process), process, 3),
    )
    return sampling.sample(randomness.fold_in(keys, 1), sampling.ddim(process), guidance.clip(denoise), start, times)

  np.testing.assert_allclose(result, jax.jit(direct)(params), atol=1e-4)
  assert np.all(nfe == 3)
  one, ones, unguided = (
    programs.generate(experiment_of(config_of(rule)), mesh())
    for rule in (classifier_free(1.0, rescale=0.7), classifier_free(interval(1.0, low=0.5)), None)
  )
  for given in ({"classes": classes}, {"classes": jnp.array([2, 2, 3, 3])}):
    expected = unguided(Parameters(params), 5, 4, given)[0]
    np.testing.assert_array_equal(one(Parameters(params), 5, 4, given)[0], expected)
    np.testing.assert_allclose(ones(Parameters(params), 5, 4, given)[0], expected, atol=1e-5)
  assert np.max(np.abs(result - unguided(Parameters(params), 5, 4, {"classes": classes})[0])) > 0.01


def test_estimates_are_clipped_or_thresholded_last():
  x = 3 * jax.random.normal(jax.random.key(0), (4, 8, 8, 1))

  def clipped(**keys):
    return programs.clip_estimates(experiment_of(config_of(**keys)), lambda x, t: x)(x, 0.5)

  np.testing.assert_array_equal(clipped(), jnp.clip(x, -1, 1))
  np.testing.assert_array_equal(clipped(sampling__clip=None), x)
  result = clipped(sampling__clip=spec("guidance.dynamic_threshold", percentile=0.5))
  median = np.median(np.abs(x), (1, 2, 3), keepdims=True)
  np.testing.assert_allclose(result, np.clip(x / median, -1, 1), rtol=1e-5)


def test_a_missing_condition_gets_its_null_value():
  """The network gets the null value directly, because `encode` expects a value from the data."""
  experiment = experiment_of(config_of())
  shape = jax.ShapeDtypeStruct((), jnp.int32)
  condition = conditions.Condition(
    "classes", shape, lambda *args: args[2]["classes"] + 1, lambda frozen: frozen["null"], 0.5, 4
  )
  received = []

  def apply(params, x, time, given, **options):
    received.append(np.asarray(given["classes"]))
    return x

  model = experiment.model._replace(
    conditions={"classes": condition}, network=experiment.model.network._replace(apply=apply), prediction=predictions.X0
  )
  keys = randomness.sample_keys(jax.random.key(0), np.arange(2))
  parameters = Parameters({}, {"conditions": {"classes": {"null": jnp.int32(3)}}})
  for batch, values in (({}, [3, 3]), ({"classes": np.int32([0, 1])}, [1, 2])):
    guided.denoise(model, experiment.guidance, keys, batch, parameters)(jnp.zeros((2, 8, 8, 1)), 0.5)
    np.testing.assert_array_equal(received.pop(), values)
