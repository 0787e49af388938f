"""Classes hidden in training, and guidance from a config: what is refused, and that the rest is what the formulas say."""

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
  """Of a model of three classes; `rule` is config.guidance, `sampling__num_steps=3` stands for sampling.num_steps."""
  config = tiny_config()
  if classes:
    config.model.conditions = {"classes": spec("conditions.classes", number=classes, dropout=dropout)}
  config.sampling.update({"num_steps": 3, "batch_size": 4})
  if rule is not None:
    config.guidance = rule
  return set_keys(config, **keys)


def plain(rule=None, **keys):
  """Of a model without classes."""
  return config_of(rule, classes=0, **keys)


def classifier_of(classes=3, **keys):
  config = plain(task=spec("tasks.classify"), **keys)
  config.model.network = spec(
    "networks.Classifier", out_channels=classes, channels=8, multipliers=(1,), blocks=1, groups=4
  )
  config.model.network.update({"attention_levels": (), "dropout": 0.0})
  config.objective = spec("losses.classification")
  return config


def free(scale=1.0, **options):
  return spec("guidance.classifier_free", scale=scale, **options)


def cfg_plus_plus(scale=0.6, **options):
  return spec("guidance.cfg_plus_plus", scale=scale, **options)


def away(scale=2.0):
  return spec("guidance.autoguidance", scale=scale)


def by_class(scale=1.0):
  return spec("guidance.classifier", scale=scale)


def interval(scale, low=0.0, high=float("inf")):
  return spec("guidance.interval", scale=scale, low=low, high=high)


def discrete(schedule):
  return spec("processes.discrete", betas=spec(f"schedules.{schedule}"))


def guides(**configs):
  return Guides(**{name: experiment_of(config).model for name, config in configs.items()})


def mesh():
  return parallel.make_mesh(devices=jax.devices()[:1])


def test_hidden_classes_are_a_share_whatever_the_batch():
  """The embedding of the last class, which stands for none, is made not a number: whose class is hidden has no loss."""
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

  def hidden(rows, shift):
    batch = {"image": x_0[rows], "classes": (jnp.arange(count) + shift)[rows] % 3}
    return np.isnan(losses(params, keys[rows], batch))

  whole = hidden(np.s_[:], 0)
  assert abs(np.mean(whole) - 0.3) < 4 * (0.3 * 0.7 / count) ** 0.5
  np.testing.assert_array_equal(hidden(np.s_[100:130], 1), whole[100:130])


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
    config_of(by_class(3.0)),
    {"classifier": classifier_of(), "weak": config_of()},
    "--classifier and --weak; expected one",
  ),
  "no classes": (plain(free(3.0)), {}, r"classifier_free \(scale=3.*a model that was trained without conditions"),
  "no classes, cfg_plus_plus": (plain(cfg_plus_plus()), {}, "trained without conditions"),
  "no dropout": (config_of(free(3.0), dropout=0.0), {}, "trained without dropout of a condition"),
  "no dropout, cfg_plus_plus": (config_of(cfg_plus_plus(), dropout=0.0), {}, "trained without dropout of a condition"),
  "a classifier for nothing": (
    config_of(free(rescale=0.5)),
    {"classifier": classifier_of()},
    "--classifier with config.guidance=classifier_free, which does not take log_prob",
  ),
  "a weak model for nothing": (
    config_of(cfg_plus_plus(0.5)),
    {"weak": config_of()},
    "--weak with config.guidance=cfg_plus_plus, which does not take weak",
  ),
  "no classifier": (config_of(by_class(3.0)), {}, "guidance=classifier without --classifier; expected --classifier="),
  "no weak model": (config_of(away()), {}, "guidance=autoguidance without --weak; expected --weak="),
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
  "a negative scale": (config_of(free(-1.0)), {}, "guidance scale of -1"),
  "a scale of nan": (config_of(free(float("nan"))), {}, "config.guidance.scale=nan; expected .*a finite number"),
  "a scale of inf": (plain(by_class(float("inf"))), {"classifier": classifier_of()}, "guidance scale of inf"),
  "rescale": (config_of(free(2.0, rescale=1.5)), {}, "rescale=1.5"),
  "percentile": (
    config_of(sampling__clip=spec("guidance.dynamic_threshold", percentile=1.5)),
    {},
    "config.sampling.clip=guidance.dynamic_threshold: Got percentile=1.5",
  ),
  "an interval from below 0": (config_of(free(interval(2.0, low=-1.0))), {}, "expected 0 <= low < high"),
  "an empty interval": (config_of(free(interval(2.0, 3.0, 2.0))), {}, "sigma/alpha=3.0 and 2.0"),
  "a weak model at 1": (
    config_of(away(1.0)),
    {"weak": config_of()},
    "--weak with a guidance scale of 1, which does not",
  ),
  "another size": (
    config_of(by_class()),
    {"classifier": classifier_of(data__image_size=16)},
    r"--classifier, a model of data of shape \(16, 16, 1\), for one of \(8, 8, 1\)",
  ),
  "other classes": (
    config_of(by_class()),
    {"classifier": classifier_of(10)},
    "a classifier of 10 classes for a model of 3",
  ),
  "another schedule": (
    plain(by_class()),
    {"classifier": classifier_of(model__process=discrete("cosine"))},
    r"--classifier, a model trained on another process \(.*1000 steps\), for one trained on .*1000 steps; .*model\.process",
  ),
  "another process": (
    config_of(by_class(), model__process=spec("processes.vp")),
    {"classifier": classifier_of(model__process=spec("processes.rectified_flow"))},
    r"another process \(log-SNR 0 halfway and -inf at the end\), for one trained on log-SNR -",
  ),
  "another process of the weak model": (
    config_of(away()),
    {"weak": config_of(model__process=spec("processes.edm"))},
    "--weak, a model trained on another process",
  ),
  "other classes of the weak model": (
    config_of(away()),
    {"weak": config_of(classes=4)},
    r"--weak, a model of the conditions classes \(4\), for one of classes \(3\); expected one that takes the same",
  ),
  "another condition of the weak model": (
    config_of(away()),
    {
      "weak": config_of(
        model__conditions={
          "classes": spec("conditions.classes", number=3, dropout=0.1),
          "low": spec("conditions.low_resolution", factor=2),
        }
      )
    },
    r"conditions classes \(3\), low, for one of classes \(3\); expected one that takes the same",
  ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_guidance_is_an_error(name):
  config, others, message = WRONG[name]
  with pytest.raises(ValueError, match=message):
    checked(config, guides(**others))
  with pytest.raises(ValueError, match=message):
    programs.generate(experiment_of(config), mesh(), guides(**others))


def test_a_rule_of_ones_own_is_known_by_what_it_takes_and_gives():
  """It sees the conditions of a model before there are samples, and two estimates go to samplers that take two alone."""
  experiment = experiment_of(config_of())
  shapes = []

  def own(conditional, condition, negative):
    shapes.append((condition["classes"].shape, negative["classes"].shape))
    return guidance.cfg_plus_plus(conditional, condition, negative, 0.5)

  assert guided.has_two_estimates(experiment.model, own)
  assert shapes == [((1,), (1,))]
  assert not guided.has_two_estimates(experiment.model, experiment.guidance)
  guided.check(experiment.model, own, two_estimates=True)
  with pytest.raises(ValueError, match="Got guidance by own, which takes data and noise from two estimates"):
    guided.check(experiment.model, own, two_estimates=False)


def checked(config, others, *, negative=False):
  experiment = experiment_of(config)
  guided.check(experiment.model, experiment.guidance, experiment.sampler.two_estimates, others, negative=negative)


@pytest.mark.parametrize(
  ("config", "others"),
  [
    (config_of(), {}),
    (config_of(away()), {"weak": config_of()}),
    (config_of(by_class()), {"classifier": classifier_of()}),
    (plain(free(3.0)), {}),
  ],
)
def test_what_to_guide_away_from_belongs_to_classifier_free_guidance(config, others):
  with pytest.raises(
    ValueError, match=r"\(--negative_classes\) without classifier-free guidance|without conditions to"
  ):
    checked(config, guides(**others), negative=True)


@pytest.mark.parametrize(
  ("config", "others", "negative"),
  [
    (plain(), {}, False),
    (config_of(dropout=0.0), {}, False),
    (config_of(free(0.0)), {}, False),
    (
      config_of(
        free(interval(3.0, 0.3, 5.0), rescale=0.7),
        sampling__clip=spec("guidance.dynamic_threshold", percentile=0.99),
      ),
      {},
      False,
    ),
    (config_of(free(3.0)), {}, True),
    (config_of(free(3.0), dropout=0.0), {}, True),
    (config_of(cfg_plus_plus()), {}, True),
    (config_of(cfg_plus_plus(1.0), sampler=spec("sampling.euler")), {}, False),
    (plain(by_class()), {"classifier": classifier_of()}, False),
    (config_of(by_class(0.0), dropout=0.0), {"classifier": classifier_of()}, False),
    (plain(away()), {"weak": plain(model__network__channels=4)}, False),
    (config_of(away(interval(2.0, high=5.0))), {"weak": config_of(model__network__channels=4)}, False),
  ],
)
def test_what_fits_passes(config, others, negative):
  others = guides(**others)
  checked(config, others, negative=negative)
  programs.generate(experiment_of(config), mesh(), others, negative=negative)


def test_denoisers_are_guided_as_the_formulas_say(dense):
  """All of them in one program: the estimate of x_0 by `guided.denoise`, and by what the model alone and its guides give."""
  config, keys = config_of(), jax.random.split(jax.random.key(0), 4)
  params, weak_params, probs_params = (random_params(c, i) for i, c in enumerate((config, config, classifier_of())))
  model, judge = experiment_of(config).model, experiment_of(classifier_of()).model
  process, t = model.process, jnp.array([0.2, 0.5, 0.7, 0.9])
  classes, negative, none = jnp.array([0, 1, 2, 0]), jnp.array([1, 2, 0, 2]), jnp.full(4, 3)
  inputs = {"classes": classes}

  def run(x_t, params, weak_params, probs_params):
    def of(classes, params=params):
      return model.conditional(params)(x_t, t, {"classes": classes})

    def log_prob(x):
      return jnp.sum(judge.classify(probs_params)(x, t)[jnp.arange(4), classes])

    def found(rule, inputs=inputs, **others):
      parameters = Parameters(params, guides={"classifier": (probs_params, {}), "weak": (weak_params, {})})
      experiment = experiment_of(config_of(rule))
      return guided.denoise(model, experiment.guidance, keys, inputs, parameters, Guides(**others))(x_t, t)

    c, u, n, weak = of(classes), of(none), of(negative), of(classes, weak_params)
    noise = (process.sigma(t) / process.alpha(t))[:, None, None, None]
    inside = (noise >= 0.5) & (noise <= 5)
    both = u + 3 * (c - u)
    own, wanted = (jnp.std(x, (1, 2, 3), keepdims=True) for x in (both, c))
    slope = (process.sigma(t) ** 2 / process.alpha(t))[:, None, None, None] * jax.grad(log_prob)(x_t)
    unwanted = {"classes": classes, "negative_classes": negative}
    strong, against = found(cfg_plus_plus()), found(cfg_plus_plus(), unwanted)
    return {
      "none": (found(free()), c),
      "unconditional": (found(free(0.0)), u),
      "classifier-free": (found(free(3.0)), both),
      "negative": (found(free(3.0), unwanted), n + 3 * (c - n)),
      "rescaled": (found(free(3.0, rescale=0.5)), both * (0.5 + 0.5 * wanted / own)),
      "interval": (found(free(interval(3.0, 0.5, 5.0))), jnp.where(inside, both, c)),
      "cfg_plus_plus": (strong.x_0, u + 0.6 * (c - u)),
      "noise of cfg_plus_plus": (strong.unguided, u),
      "negative of cfg_plus_plus": (against.unguided, n),
      "weak": (found(away(2.0), weak=model), weak + 2 * (c - weak)),
      "classifier": (found(by_class(4.0), classifier=judge), c + 4 * slope),
      # Elsewhere it does not guide, which of a classifier is a scale of 0.
      "classifier at times": (
        found(by_class(interval(4.0, 0.5, 5.0)), classifier=judge),
        jnp.where(inside, c + 4 * slope, c),
      ),
    }, {"u": u, "n": n, "weak": weak, "slope": c + slope, "inside": jnp.where(inside, both, c), "guided": both}

  x_t = jax.random.normal(jax.random.key(3), (4, 8, 8, 1))
  pairs, others = jax.jit(run)(x_t, params, weak_params, probs_params)
  for name, (found, expected) in pairs.items():
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.std(expected), err_msg=name)
  c = pairs["none"][1]
  for name, other in others.items():
    assert np.max(np.abs(other - c)) > 0.01 * np.std(c), f"{name} makes a difference that can be seen"
  assert np.max(np.abs(others["inside"] - others["guided"])) > 0.01 * np.std(c)


def test_samples_are_those_of_the_guided_model_and_a_scale_of_one_changes_nothing(dense):
  config = config_of(free(3.0))
  params, classes, experiment = random_params(config), jnp.array([0, 1, 2, 0]), experiment_of(config)
  found, nfe = programs.generate(experiment, mesh())(Parameters(params), 5, 4, {"classes": classes})
  model, process = experiment.model, experiment.model.process

  def direct(params):
    keys = randomness.sample_keys(jax.random.fold_in(jax.random.key(5), 2), 4 + jnp.arange(4))
    given, none = {"classes": classes}, {"classes": jnp.full(4, 3)}
    denoise = guidance.classifier_free(model.conditional(params), given, none, 3.0)
    start, times = (
      process.prior(randomness.fold_in(keys, 0), (4, 8, 8, 1)),
      sampling.grids.for_sampler(sampling.ddim(process), process, 3),
    )
    return sampling.sample(randomness.fold_in(keys, 1), sampling.ddim(process), guidance.clip(denoise), start, times)

  np.testing.assert_allclose(found, jax.jit(direct)(params), atol=1e-4)
  assert np.all(nfe == 3)
  one, ones, unguided = (
    programs.generate(experiment_of(config_of(rule)), mesh())
    for rule in (free(1.0, rescale=0.7), free(interval(1.0, low=0.5)), None)
  )
  for given in ({"classes": classes}, {"classes": jnp.array([2, 2, 3, 3])}):
    expected = unguided(Parameters(params), 5, 4, given)[0]
    np.testing.assert_array_equal(one(Parameters(params), 5, 4, given)[0], expected)
    np.testing.assert_allclose(ones(Parameters(params), 5, 4, given)[0], expected, atol=1e-5)
  assert np.max(np.abs(found - unguided(Parameters(params), 5, 4, {"classes": classes})[0])) > 0.01


def test_estimates_are_clipped_or_thresholded_last():
  x = 3 * jax.random.normal(jax.random.key(0), (4, 8, 8, 1))

  def bounded(**keys):
    return programs.clip_estimates(experiment_of(config_of(**keys)), lambda x, t: x)(x, 0.5)

  np.testing.assert_array_equal(bounded(), jnp.clip(x, -1, 1))
  np.testing.assert_array_equal(bounded(sampling__clip=None), x)
  found = bounded(sampling__clip=spec("guidance.dynamic_threshold", percentile=0.5))
  median = np.median(np.abs(x), (1, 2, 3), keepdims=True)
  np.testing.assert_allclose(found, np.clip(x / median, -1, 1), rtol=1e-5)


def test_a_condition_that_nobody_asks_for_stands_for_none():
  """What stands for none is a value as the network takes it, not an item that `encode` is still to read."""
  own = experiment_of(config_of())
  shape = jax.ShapeDtypeStruct((), jnp.int32)
  kept = conditions.Condition(
    "classes", shape, lambda *args: args[2]["classes"] + 1, lambda frozen: frozen["null"], 0.5, 4
  )
  seen = []

  def apply(params, x, time, given, **options):
    seen.append(np.asarray(given["classes"]))
    return x

  model = own.model._replace(
    conditions={"classes": kept}, network=own.model.network._replace(apply=apply), prediction=predictions.X0
  )
  keys = randomness.sample_keys(jax.random.key(0), np.arange(2))
  parameters = Parameters({}, {"conditions": {"classes": {"null": jnp.int32(3)}}})
  for batch, values in (({}, [3, 3]), ({"classes": np.int32([0, 1])}, [1, 2])):
    guided.denoise(model, own.guidance, keys, batch, parameters)(jnp.zeros((2, 8, 8, 1)), 0.5)
    np.testing.assert_array_equal(seen.pop(), values)
