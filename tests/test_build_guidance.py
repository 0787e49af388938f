"""Labels hidden in training, and guidance from a config: what is refused, and that the rest is what the formulas say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import build, guidance, parallel, randomness, sampling
from ddpm_jax.build.condition import Condition
from ddpm_jax.build.guidance import bound
from tests.parameters import random_params
from tests.recipes import tiny_config


def config_of(**keys):
  """Of a model of three classes; `scale=3.0` stands for guidance.scale, `network__num_classes` for network.num_classes."""
  config = tiny_config()
  config.network.num_classes = 3
  config.loss.label_dropout = 0.1
  config.sampling.update({"num_steps": 3, "batch_size": 4})
  keys = {name.replace("__", ".") if "__" in name else f"guidance.{name}": value for name, value in keys.items()}
  config.update_from_flattened_dict(keys)
  return config


def plain(**keys):
  """Of a model without classes."""
  return config_of(network__num_classes=0, loss__label_dropout=0.0, **keys)


def classifier_of(**keys):
  config = config_of(loss__label_dropout=0.0, **keys)
  config.task = "classify"
  return config


def test_hidden_labels_are_a_share_whatever_the_batch():
  """The embedding of the last class, which stands for none, is made not a number: whose label is hidden has no loss."""
  config, count = config_of(loss__label_dropout=0.3), 600
  params = random_params(config)
  assert params["classes"]["embedding"].shape[0] == 4
  assert random_params(config_of(loss__label_dropout=0.0))["classes"]["embedding"].shape[0] == 3
  params["classes"]["embedding"][3] = np.nan
  loss_fn = jax.jit(build.build_loss(config))
  keys = jax.random.split(jax.random.key(1), count)
  x_0 = jax.random.normal(jax.random.key(2), (count, 8, 8, 1))

  def hidden(rows, shift):
    batch = {"image": x_0[rows], "label": (jnp.arange(count) + shift)[rows] % 3}
    return np.isnan(loss_fn(params, keys[rows], batch)[1]["loss"])

  whole = hidden(np.s_[:], 0)
  assert abs(np.mean(whole) - 0.3) < 4 * (0.3 * 0.7 / count) ** 0.5
  np.testing.assert_array_equal(hidden(np.s_[100:130], 1), whole[100:130])


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (config_of(loss__label_dropout=1.0), "label_dropout=1.0 with network.num_classes=3; wanted 0 to below 1"),
    (config_of(loss__label_dropout=-0.1), "label_dropout=-0.1"),
    (config_of(loss__label_dropout=float("nan")), "label_dropout=nan"),
    (config_of(network__num_classes=0), "num_classes=0; wanted 0 to below 1, and above 0 only with classes"),
  ],
)
def test_wrong_label_dropout_is_an_error(config, message):
  with pytest.raises(ValueError, match=message):
    build.build_network(config)


def guides(**configs):
  return build.Guides(**configs)


WRONG = [
  (config_of(scale=3.0), guides(classifier=classifier_of(), weak=config_of()), "--classifier and --weak; wanted one"),
  (plain(scale=3.0), guides(), "--guidance_scale=3 for a model that was trained without classes"),
  (plain(plus_plus=True), guides(), "trained without classes"),
  (config_of(scale=3.0, loss__label_dropout=0.0), guides(), "trained without label dropout"),
  (config_of(plus_plus=True, loss__label_dropout=0.0), guides(), "trained without label dropout"),
  (config_of(rescale=0.5), guides(classifier=classifier_of()), "rescale=0.5, plus_plus=False with another guide"),
  (config_of(plus_plus=True, scale=0.5), guides(weak=config_of()), "plus_plus=True with another guide"),
  (config_of(plus_plus=True, scale=0.6, rescale=0.5), guides(), r"which CFG\+\+ does not have; wanted it alone"),
  (config_of(plus_plus=True, scale=0.6, sigma_low=0.5), guides(), "does not have"),
  (config_of(plus_plus=True, scale=0.6, sigma_high=5.0), guides(), "does not have"),
  (config_of(plus_plus=True, scale=0.6, sampling__sampler="heun"), guides(), "'heun' and corrector_steps=0.*only ddim"),
  (config_of(plus_plus=True, scale=0.6, sampling__sampler="ode"), guides(), "'ode'.*only ddim"),
  (config_of(plus_plus=True, scale=0.6, sampling__corrector_steps=1), guides(), "corrector_steps=1"),
  (config_of(plus_plus=True, scale=1.5), guides(), r"scale=1.5 for CFG\+\+; wanted it in \[0, 1\]"),
  (config_of(scale=-1.0), guides(), "guidance scale of -1"),
  (config_of(scale=float("nan")), guides(), "guidance scale of nan"),
  (plain(scale=float("inf")), guides(classifier=classifier_of()), "guidance scale of inf"),
  (config_of(scale=2.0, rescale=1.5), guides(), "rescale=1.5"),
  (config_of(threshold=1.5), guides(), "percentile=1.5"),
  (config_of(scale=2.0, sigma_low=-1.0), guides(), "wanted 0 <= low < high"),
  (config_of(scale=2.0, sigma_low=3.0, sigma_high=2.0), guides(), "sigma/alpha=3.0 and 2.0"),
  (config_of(), guides(classifier=config_of()), "tells no classes apart; wanted a run with task='classify'"),
  (config_of(scale=2.0), guides(weak=classifier_of()), "holds a classifier"),
  (config_of(), guides(weak=config_of()), "--weak with a guidance scale of 1, which does not guide"),
  (
    config_of(),
    guides(classifier=classifier_of(data__image_size=16)),
    r"--classifier, a model of images of \(16, 16, 1\), for one of \(8, 8, 1\)",
  ),
  (
    config_of(),
    guides(classifier=classifier_of(network__num_classes=10)),
    "a classifier of 10 classes for a model of 3",
  ),
  (
    plain(),
    guides(classifier=classifier_of(process__schedule="cosine")),
    r"--classifier, a model trained on another process: discrete \(cosine, 1000 steps\), for one trained on discrete \(lin",
  ),
  (
    config_of(process__name="vp"),
    guides(classifier=classifier_of(process__name="rectified_flow")),
    "another process: rectified_flow, for one trained on vp",
  ),
  (
    config_of(scale=2.0),
    guides(weak=config_of(process__name="edm")),
    "--weak, a model trained on another process: edm",
  ),
  (config_of(scale=2.0), guides(weak=config_of(network__num_classes=4)), "takes the same condition"),
  (config_of(scale=2.0), guides(weak=config_of(superres__factor=2)), "takes the same condition"),
]


@pytest.mark.parametrize(("config", "others", "message"), WRONG)
def test_wrong_guidance_is_an_error(config, others, message):
  with pytest.raises(ValueError, match=message):
    build.check_guidance(config, others)
  with pytest.raises(ValueError, match=message):
    build.build_generate(config, parallel.make_mesh(devices=jax.devices()[:1]), others)


@pytest.mark.parametrize(
  ("config", "others"),
  [
    (config_of(), guides()),
    (config_of(scale=2.0), guides(weak=config_of())),
    (config_of(), guides(classifier=classifier_of())),
    (plain(scale=3.0), guides()),
  ],
)
def test_negative_labels_belong_to_classifier_free_guidance(config, others):
  with pytest.raises(ValueError, match="--negative_labels without classifier-free guidance"):
    build.check_guidance(config, others, negative=True)


@pytest.mark.parametrize(
  ("config", "others", "negative"),
  [
    (plain(), guides(), False),
    (config_of(loss__label_dropout=0.0), guides(), False),
    (config_of(scale=0.0), guides(), False),
    (config_of(scale=3.0, rescale=0.7, sigma_low=0.3, sigma_high=5.0, threshold=0.99), guides(), False),
    (config_of(scale=3.0), guides(), True),
    (config_of(scale=3.0, loss__label_dropout=0.0), guides(), True),
    (config_of(scale=0.6, plus_plus=True), guides(), True),
    (config_of(scale=1.0, plus_plus=True, sampling__sampler="euler"), guides(), False),
    (plain(), guides(classifier=classifier_of()), False),
    (config_of(scale=0.0, loss__label_dropout=0.0), guides(classifier=classifier_of()), False),
    (plain(scale=2.0), guides(weak=plain(network__channels=4)), False),
    (config_of(scale=2.0, sigma_high=5.0), guides(weak=config_of(network__channels=4)), False),
  ],
)
def test_what_fits_passes(config, others, negative):
  build.check_guidance(config, others, negative=negative)
  build.build_generate(config, parallel.make_mesh(devices=jax.devices()[:1]), others, negative=negative)


def test_denoisers_are_guided_as_the_formulas_say(dense):
  """All of them in one program: the estimate of x_0 by `build_denoise`, and by what the model alone and its guides give."""
  config, keys = config_of(), jax.random.split(jax.random.key(0), 4)
  params, weak_params, probs_params = (random_params(c, i) for i, c in enumerate((config, config, classifier_of())))
  process, t = build.build_process(config), jnp.array([0.2, 0.5, 0.7, 0.9])
  classes, negative, none = jnp.array([0, 1, 2, 0]), jnp.array([1, 2, 0, 2]), jnp.full(4, 3)
  inputs = {"classes": classes}

  def run(x_t, params, weak_params, probs_params):
    def of(labels, params=params):
      return build.build_conditional(config, params)(x_t, t, Condition(classes=labels))

    def log_prob(x):
      return jnp.sum(build.build_classifier(classifier_of(), probs_params)(x, t)[jnp.arange(4), classes])

    def found(changes, inputs=inputs, others=guides(), guiding=None):  # noqa: B008
      return build.build_denoise(config_of(**changes), params, keys, inputs, others, guiding)(x_t, t)

    c, u, n, weak = of(classes), of(none), of(negative), of(classes, weak_params)
    noise = (process.sigma(t) / process.alpha(t))[:, None, None, None]
    inside = (noise >= 0.5) & (noise <= 5)
    guided = u + 3 * (c - u)
    own, wanted = (jnp.std(x, (1, 2, 3), keepdims=True) for x in (guided, c))
    slope = (process.sigma(t) ** 2 / process.alpha(t))[:, None, None, None] * jax.grad(log_prob)(x_t)
    both = {"classes": classes, "negative": negative}
    plus_plus = found({"plus_plus": True, "scale": 0.6})
    against = found({"plus_plus": True, "scale": 0.6}, both)
    return {
      "none": (found({}), c),
      "unconditional": (found({"scale": 0.0}), u),
      "classifier-free": (found({"scale": 3.0}), guided),
      "negative": (found({"scale": 3.0}, both), n + 3 * (c - n)),
      "rescaled": (found({"scale": 3.0, "rescale": 0.5}), guided * (0.5 + 0.5 * wanted / own)),
      "interval": (found({"scale": 3.0, "sigma_low": 0.5, "sigma_high": 5.0}), jnp.where(inside, guided, c)),
      "plus_plus": (plus_plus.x_0, u + 0.6 * (c - u)),
      "noise of plus_plus": (plus_plus.unguided, u),
      "negative of plus_plus": (against.unguided, n),
      "weak": (found({"scale": 2.0}, inputs, guides(weak=config), {"weak": weak_params}), weak + 2 * (c - weak)),
      "classifier": (
        found({"scale": 4.0}, inputs, guides(classifier=classifier_of()), {"classifier": probs_params}),
        c + 4 * slope,
      ),
    }, {"u": u, "n": n, "weak": weak, "slope": c + slope, "inside": jnp.where(inside, guided, c), "guided": guided}

  x_t = jax.random.normal(jax.random.key(3), (4, 8, 8, 1))
  pairs, others = jax.jit(run)(x_t, params, weak_params, probs_params)
  for name, (found, expected) in pairs.items():
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.std(expected), err_msg=name)
  c = pairs["none"][1]
  for name, other in others.items():
    assert np.max(np.abs(other - c)) > 0.01 * np.std(c), f"{name} makes a difference that can be seen"
  assert np.max(np.abs(others["inside"] - others["guided"])) > 0.01 * np.std(c)


def test_samples_are_those_of_the_guided_model_and_a_scale_of_one_changes_nothing(dense):
  mesh, config = parallel.make_mesh(devices=jax.devices()[:1]), config_of(scale=3.0)
  params, classes = random_params(config), jnp.array([0, 1, 2, 0])
  found, nfe = build.build_generate(config, mesh)(params, 5, 4, {"classes": classes}, {})
  process = build.build_process(config)
  rule, times = build.build_rule(config)

  def direct(params):
    keys = randomness.sample_keys(jax.random.fold_in(jax.random.key(5), 2), 4 + jnp.arange(4))
    given, none = Condition(classes=classes), Condition(classes=jnp.full(4, 3))
    denoise = guidance.classifier_free(build.build_conditional(config, params), given, none, 3.0)
    start = process.prior(randomness.fold_in(keys, 0), (4, 8, 8, 1))
    return sampling.sample(randomness.fold_in(keys, 1), rule, guidance.clip(denoise), start, times)

  np.testing.assert_allclose(found, jax.jit(direct)(params), atol=1e-4)
  assert np.all(nfe == 3)
  one = build.build_generate(config_of(scale=1.0, rescale=0.7, sigma_low=0.5), mesh)
  unguided = build.build_generate(config_of(), mesh)
  for given in ({"classes": classes}, {"classes": jnp.array([2, 2, 3, 3])}):
    np.testing.assert_array_equal(one(params, 5, 4, given, {})[0], unguided(params, 5, 4, given, {})[0])
  assert np.max(np.abs(found - unguided(params, 5, 4, {"classes": classes}, {})[0])) > 0.01


def test_estimates_are_clipped_or_thresholded_last():
  x = 3 * jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
  np.testing.assert_array_equal(bound(config_of(), lambda x, t: x)(x, 0.5), jnp.clip(x, -1, 1))
  np.testing.assert_array_equal(bound(config_of(sampling__clip=False), lambda x, t: x)(x, 0.5), x)
  found = bound(config_of(threshold=0.5), lambda x, t: x)(x, 0.5)
  median = np.median(np.abs(x), (1, 2, 3), keepdims=True)
  np.testing.assert_allclose(found, np.clip(x / median, -1, 1), rtol=1e-5)
