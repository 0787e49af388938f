"""Test conditions, codecs and the functions of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import data, guidance, models, predictions, processes, sampling, schedules
from ddpm_jax.models import Codec, Condition, Model, Network, SamplingDefaults, codecs, conditions

PROCESS = processes.discrete(schedules.linear(20))
CLASSES = conditions.classes("classes", 3, dropout=0.25)
VECTOR = conditions.vector("vector", 2, dropout=0.5)
SHAPE = (4, 4, 1)


def keys(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


def table_network(out_channels=1):
  """Return a network that sums its inputs, each multiplied by separate parameters."""

  def init(key, x, time, given):
    del key, x, time
    return {
      "x": jnp.float32(0.5),
      "time": jnp.float32(0.01),
      "classes": jnp.arange(4.0),
      "vector": jnp.array([1.0, -2.0]),
    }

  def apply(params, x, time, given, *, train=False, keys=None):
    shift = params["time"] * time
    if "classes" in given:
      shift += params["classes"][given["classes"]]
    if "vector" in given:
      shift += given["vector"] @ params["vector"]
    output = params["x"] * x + shift[:, None, None, None]
    return jnp.concatenate([output] * out_channels, axis=-1)

  return Network(init, apply)


def make_model(**changes):
  parts = {
    "network": table_network(),
    "process": PROCESS,
    "prediction": predictions.EPS,
    "conditions": {"classes": CLASSES, "vector": VECTOR},
    "codec": codecs.pixels(),
    "data_shape": SHAPE,
    "shape": SHAPE,
  }
  return Model(**(parts | changes))


def batch_of(count, seed=1):
  rng = np.random.default_rng(seed)
  return {
    "classes": rng.integers(0, 3, count).astype(np.uint8),
    "vector": rng.standard_normal((count, 2)).astype(np.float32),
    "image": rng.standard_normal((count, *SHAPE)).astype(np.float32),
  }


def test_training_drops_a_share_of_the_conditions_and_sampling_drops_none():
  model, count = make_model(), 20_000
  batch = batch_of(count)
  given = jax.jit(lambda keys, batch: model.encode_conditions(keys, batch, train=True))(keys(count), batch)
  is_dropped = {"classes": np.asarray(given["classes"] == 3), "vector": np.asarray(jnp.all(given["vector"] == 0, -1))}
  for name, condition in model.conditions.items():
    share = condition.dropout
    assert abs(is_dropped[name].mean() - share) < 4 * (share * (1 - share) / count) ** 0.5
    np.testing.assert_array_equal(given[name][~is_dropped[name]], batch[name][~is_dropped[name]])
  # The two conditions are dropped independently of each other and of the class.
  both = is_dropped["classes"] & is_dropped["vector"]
  assert abs(both.mean() - 0.125) < 4 * (0.125 * 0.875 / count) ** 0.5
  for value in range(3):
    rows = batch["classes"] == value
    assert abs(is_dropped["classes"][rows].mean() - 0.25) < 4 * (0.25 * 0.75 / rows.sum()) ** 0.5
  shown = model.encode_conditions(keys(count), batch)
  jax.tree.map(np.testing.assert_array_equal, shown, {name: batch[name] for name in ("classes", "vector")})


def test_adding_a_condition_does_not_change_the_others():
  batch = batch_of(200)
  alone = conditions.encode({"classes": CLASSES}, {}, keys(200), batch, train=True)
  both = conditions.encode({"vector": VECTOR, "classes": CLASSES}, {}, keys(200), batch, train=True)
  np.testing.assert_array_equal(alone["classes"], both["classes"])
  assert np.any(np.asarray(alone["classes"]) == 3)
  # Sample i depends only on key i.
  few = {name: value[50:60] for name, value in batch.items()}
  part = conditions.encode({"classes": CLASSES}, {}, keys(200)[50:60], few, train=True)
  np.testing.assert_array_equal(part["classes"], both["classes"][50:60])


def test_the_null_class_does_not_overflow_8_bit_classes():
  many = conditions.classes("classes", 256, dropout=0.9)
  batch = {"classes": np.arange(100, dtype=np.uint8)}
  given = conditions.encode({"classes": many}, {}, keys(100), batch, train=True)
  assert set(np.asarray(given["classes"])) - set(range(100)) == {256}


def test_classes_without_dropout_have_no_null_class():
  plain = conditions.classes("classes", 3)
  assert (plain.num_values, CLASSES.num_values) == (3, 4)
  assert plain.null is None
  np.testing.assert_array_equal(plain.default(7), [0, 1, 2, 0, 1, 2, 0])
  assert plain.parse(" 2 ") == 2
  source = data.ArraySource(np.zeros((2, 1, 1, 1), np.uint8), np.array([0, 2]))
  plain.check(source, np.array([0, 2]))
  for text in ("3", "-1", "1.5", "a", "²", "9" * 5000, ""):
    with pytest.raises(ValueError, match="expected integers from 0 to 2"):
      plain.parse(text)
  with pytest.raises(ValueError, match="from 0 to 2"):
    plain.check(source, np.array([3]))


def test_a_dropped_image_is_zeros():
  sketch = conditions.image("sketch", (2, 2, 1), dropout=0.5)
  batch = {"sketch": np.random.default_rng(0).standard_normal((100, 2, 2, 1)).astype(np.float32)}
  given = np.asarray(conditions.encode({"sketch": sketch}, {}, keys(100), batch, train=True)["sketch"])
  is_dropped = np.all(given == 0, (1, 2, 3))
  assert 25 < is_dropped.sum() < 75
  np.testing.assert_array_equal(given[~is_dropped], batch["sketch"][~is_dropped])


def test_vectors_and_levels_are_parsed_from_text():
  np.testing.assert_array_equal(VECTOR.parse("1,-2.5"), np.float32([1, -2.5]))
  assert conditions.level("level").parse("0.25") == 0.25
  for condition, text in ((VECTOR, "1"), (VECTOR, "1,x"), (VECTOR, "1,inf"), (conditions.level("level"), "1,2")):
    with pytest.raises(ValueError, match="expected (2 finite numbers|one finite number)"):
      condition.parse(text)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: conditions.classes("classes", 0), "number=0"),
    (lambda: conditions.classes("classes", 3, 1.0), "dropout=1.0 of classes"),
    (lambda: conditions.vector("vector", 0), "size=0"),
    (lambda: conditions.vector("vector", 2, -0.1), "dropout=-0.1 of vector"),
    (lambda: conditions.image("image", (8,)), r"shape=\(8,\)"),
    (lambda: conditions.low_resolution("low", (8, 8, 1), 3), "factor=3 of low for data of 8x8"),
    (lambda: conditions.low_resolution("low", (8, 8, 1), 1), "factor=1"),
    (lambda: conditions.low_resolution("low", (8, 8, 1), 2, 0.1, 0.2), "sample_noise=0.2"),
    (lambda: conditions.low_resolution("low", (8, 8, 1), 2, method="nearest"), "expected 'bicubic' or 'bilinear'"),
  ],
)
def test_conditions_out_of_range_are_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def interpolation_matrix(size, factor, method):
  """Return the interpolation matrix [size * factor, size] along one axis, from the definition of the kernels."""
  matrix = np.zeros((size * factor, size))
  for i in range(size * factor):
    place = (i + 0.5) / factor - 0.5
    for j in range(size):
      distance = abs(place - j)
      if method == "bilinear":
        value = max(0, 1 - distance)
      elif distance <= 1:  # the cubic kernel of R. Keys (1981) with a = -0.5
        value = 1.5 * distance**3 - 2.5 * distance**2 + 1
      elif distance < 2:
        value = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
      else:
        value = 0
      matrix[i, j] = value
  return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
def test_the_low_resolution_image_is_computed_from_the_data_and_enlarged(method):
  """The condition equals box averages of the image, enlarged by a separable kernel."""
  image = np.random.default_rng(0).standard_normal((3, 8, 12, 2)).astype(np.float32)
  low = conditions.low_resolution("low", (8, 12, 2), 2, method=method)
  small = image.reshape(3, 4, 2, 6, 2, 2).mean((2, 4))
  expected = np.einsum(
    "ih,jw,bhwc->bijc", interpolation_matrix(4, 2, method), interpolation_matrix(6, 2, method), small
  )
  for batch in ({"image": image}, {"low": small}):
    given = conditions.encode({"low": low}, {}, keys(3), batch, train=True)
    assert given["low"].keys() == {"image"}
    np.testing.assert_allclose(given["low"]["image"], expected, atol=1e-5)
  with pytest.raises(ValueError, match=r"Got low of shape \(3, 8, 12, 2\)"):
    conditions.encode({"low": low}, {}, keys(3), {"low": image}, train=False)


def test_the_noise_of_a_low_resolution_image_has_the_level_that_the_network_receives():
  count, data = 4000, (4, 4, 1)
  low = conditions.low_resolution("low", data, 2, noise=0.6, sample_noise=0.25)
  plain = conditions.low_resolution("low", data, 2)
  batch = {"low": np.random.default_rng(0).standard_normal((count, 2, 2, 1)).astype(np.float32)}
  clean = conditions.encode({"low": plain}, {}, keys(count), batch, train=False)["low"]["image"]
  for train in (True, False):
    given = conditions.encode({"low": low}, {}, keys(count), batch, train=train)["low"]
    std = np.asarray(given["level"]) / 1000
    noise = np.asarray(given["image"] - clean) / std[:, None, None, None]
    assert abs(noise.mean()) < 4 / noise.size**0.5
    assert abs(noise.var() - 1) < 4 * (2 / noise.size) ** 0.5
    # The standard deviation is uniform in training and fixed in sampling.
    mean, variance = (0.3, 0.6**2 / 12) if train else (0.25, 0)
    assert abs(std.mean() - mean) < 4 * (variance / count) ** 0.5 + 1e-6
    assert abs(std.var() - variance) < 0.002
    # The standard deviation and the noise are independent.
    assert abs(np.corrcoef(std, noise[:, 0, 0, 0])[0, 1] if train else 0) < 4 / count**0.5


def test_batches_of_wrong_names_or_shapes_are_errors():
  model, batch = make_model(), batch_of(5)
  with pytest.raises(ValueError, match="a batch with classes, image for a model with the condition 'vector'"):
    model.encode_conditions(keys(5), {name: batch[name] for name in ("classes", "image")})
  with pytest.raises(ValueError, match=r"vector of shape \(5, 1\); expected \[B, 2\]"):
    model.encode_conditions(keys(5), batch | {"vector": batch["vector"][:, :1]})
  with pytest.raises(ValueError, match="expected the same number"):
    model.encode_conditions(keys(5), batch | {"vector": batch["vector"][:4]})


def test_conditions_of_wrong_names_or_shapes_are_errors():
  model = make_model()
  params, x = model.init(jax.random.key(0)), jnp.ones((2, *SHAPE))
  given = model.encode_conditions(keys(2), batch_of(2))
  for wrong, message in (
    ({"klasses": given["classes"], "vector": given["vector"]}, "'klasses'; expected .*Did you mean 'classes'"),
    ({"classes": given["classes"]}, "Got no vector"),
    (given | {"classes": jnp.int32(1)}, r"classes of shape \(\)"),
    (given | {"vector": {"image": given["vector"]}}, "vector of the structure"),
  ):
    with pytest.raises(ValueError, match=message):
      model.denoise(params, wrong)
    with pytest.raises(ValueError, match=message):
      model.conditional(params)(x, 0.5, wrong)
  with pytest.raises(ValueError, match="a model without conditions"):
    make_model(conditions={}).denoise(params, given)


@pytest.mark.parametrize("prediction", ["EPS", "V", "edm", "learned"])
def test_denoise_converts_the_output_by_the_prediction(prediction):
  """The estimate follows from the network's output for the scaled input and the model's time input."""
  meaning = {
    "EPS": predictions.EPS,
    "V": predictions.V,
    "edm": predictions.edm(0.5),
    "learned": predictions.learned_range(predictions.EPS),
  }[prediction]
  learned = prediction == "learned"
  model = make_model(network=table_network(1 + learned), prediction=meaning, time_input=lambda t: 7 * t)
  params, given = model.init(jax.random.key(0)), model.encode_conditions(keys(3), batch_of(3))
  x, t = jnp.asarray(batch_of(3)["image"]), jnp.array([0.1, 0.5, 0.9])
  estimate = model.denoise(params, given)(x, t)
  alpha, sigma = (value(t)[:, None, None, None] for value in (PROCESS.alpha, PROCESS.sigma))
  scale = 1 / jnp.sqrt(0.25 * alpha**2 + sigma**2) if prediction == "edm" else 1.0
  output = model.network.apply(params, scale * x, 7 * t, given)[..., :1]
  expected = {
    "EPS": (x - sigma * output) / alpha,
    "V": alpha * x - sigma * output,
    "edm": 0.25 * alpha * scale**2 * x + sigma * 0.5 * scale * output,
    "learned": (x - sigma * output) / alpha,
  }[prediction]
  np.testing.assert_allclose(predictions.x_0_of(estimate), expected, rtol=1e-4, atol=1e-5)
  direct = predictions.denoiser(
    lambda x, time: model.network.apply(params, x, time, given), PROCESS, meaning, time_input=lambda t: 7 * t
  )
  jax.tree.map(np.testing.assert_array_equal, estimate, direct(x, t))
  jax.tree.map(np.testing.assert_array_equal, estimate, model.conditional(params)(x, t, given))


def test_a_prediction_without_an_x_0_estimate_is_refused_before_any_call():
  model = make_model(process=processes.discrete(schedules.zero_terminal_snr(schedules.linear(20))))
  with pytest.raises(ValueError, match="does not determine x_0"):
    model.denoise({}, {})


def test_guidance_combines_two_conditions():
  """Guidance computes `u + scale (c - u)`, for both conditions together and for one of them."""
  model = make_model(prediction=predictions.X0)
  params, given = model.init(jax.random.key(0)), model.encode_conditions(keys(3), batch_of(3))
  unconditional = model.drop_conditions(given)
  np.testing.assert_array_equal(unconditional["classes"], [3, 3, 3])
  np.testing.assert_array_equal(unconditional["vector"], np.zeros((3, 2)))
  x, t = jnp.asarray(batch_of(3)["image"]), 0.5
  conditional = model.conditional(params)
  estimate = guidance.classifier_free(conditional, given, unconditional, 3.0)(x, t)
  c, u = (
    model.network.apply(params, x, jnp.full(3, PROCESS.time_input(t)), values) for values in (given, unconditional)
  )
  np.testing.assert_allclose(estimate, u + 3 * (c - u), rtol=1e-4, atol=1e-4)
  without_vector = model.drop_conditions(given, names=["vector"])
  np.testing.assert_array_equal(without_vector["classes"], given["classes"])
  np.testing.assert_array_equal(without_vector["vector"], unconditional["vector"])
  half = conditional(x, t, without_vector)
  both = half + 2 * (guidance.classifier_free(conditional, given, without_vector, 1.0)(x, t) - half)
  np.testing.assert_allclose(both, half + 2 * (c - half), rtol=1e-4, atol=1e-4)


def test_conditions_without_a_null_value_are_not_dropped():
  fixed = conditions.vector("vector", 2)
  model = make_model(conditions={"classes": CLASSES, "vector": fixed})
  given = model.encode_conditions(keys(3), batch_of(3), train=True)
  unconditional = model.drop_conditions(given)
  np.testing.assert_array_equal(unconditional["vector"], batch_of(3)["vector"])
  np.testing.assert_array_equal(unconditional["classes"], [3, 3, 3])
  with pytest.raises(ValueError, match="without dropout of a condition"):
    model.drop_conditions(given, names=["vector"])
  with pytest.raises(ValueError, match="Did you mean 'vector'"):
    model.drop_conditions(given, names=["vektor"])
  with pytest.raises(ValueError, match="without dropout of a condition"):
    make_model(conditions={"vector": fixed}).drop_conditions({"vector": given["vector"]})


def test_conditions_receive_their_own_frozen_parameters():
  """A frozen table encodes each text both as tokens and as a vector, as in SDXL."""

  def encode(frozen, keys, batch, train):
    return {"tokens": frozen["table"][batch["text"]], "pooled": frozen["table"][batch["text"]].mean(1)}

  def null(frozen):
    return {"tokens": jnp.tile(frozen["table"][0], (3, 1)), "pooled": frozen["table"][0]}

  text = Condition(
    kind={"tokens": "tokens", "pooled": "vector"},
    shape={"tokens": jax.ShapeDtypeStruct((3, 4), jnp.float32), "pooled": jax.ShapeDtypeStruct((4,), jnp.float32)},
    encode=encode,
    null=null,
    dropout=0.5,
    load=lambda: {"table": jnp.arange(20.0).reshape(5, 4)},
  )
  model = make_model(conditions={"text": text, "classes": CLASSES})
  frozen = model.load_frozen()
  assert frozen.keys() == {"conditions"}
  batch = batch_of(50) | {"text": np.random.default_rng(0).integers(1, 5, (50, 3))}
  given = model.encode_conditions(keys(50), batch, frozen, train=True)
  table = frozen["conditions"]["text"]["table"]
  is_dropped = np.all(
    np.asarray(given["text"]["tokens"]) == np.asarray(null(frozen["conditions"]["text"])["tokens"]), (1, 2)
  )
  assert 10 < is_dropped.sum() < 40
  np.testing.assert_array_equal(given["text"]["tokens"][~is_dropped], table[batch["text"]][~is_dropped])
  # Both parts of a sample are dropped, or neither part.
  np.testing.assert_array_equal(given["text"]["pooled"][is_dropped], np.tile(table[0], (is_dropped.sum(), 1)))
  np.testing.assert_allclose(given["text"]["pooled"][~is_dropped], table[batch["text"]].mean(1)[~is_dropped], rtol=1e-6)
  np.testing.assert_array_equal(model.drop_conditions(given, frozen)["text"]["pooled"], np.tile(table[0], (50, 1)))


def pair_codec():
  """Return a codec that moves pairs of rows into channels and multiplies by a frozen scale."""

  def encode(frozen, keys, data):
    noise = jax.vmap(jax.random.normal)(keys)
    x = data.reshape(data.shape[0], data.shape[1] // 2, data.shape[2], -1) * frozen["scale"]
    return x + 0 * noise[:, None, None, None]

  def decode(frozen, x):
    return (x / frozen["scale"]).reshape(x.shape[0], 2 * x.shape[1], x.shape[2], -1)

  return Codec(encode, decode, load=lambda: {"scale": jnp.float32(3)})


def test_a_codec_converts_data_to_x_and_back():
  codec = pair_codec()
  shape = codec.shape((4, 6, 1))
  assert shape == (2, 6, 2)
  assert codec.shape((4, 6, 1), {"scale": jax.ShapeDtypeStruct((), jnp.float32)}) == shape
  assert codecs.pixels().shape(SHAPE) == SHAPE
  model = make_model(codec=codec, data_shape=(4, 6, 1), shape=shape, conditions={})
  frozen = model.load_frozen()
  assert frozen == {"codec": {"scale": 3}}
  data = np.random.default_rng(0).uniform(-1, 1, (3, 4, 6, 1)).astype(np.float32)
  x = model.encode(keys(3), data, frozen)
  np.testing.assert_allclose(x, 3 * data.reshape(3, 2, 6, 2), rtol=1e-6)
  np.testing.assert_allclose(model.decode(x, frozen), data, rtol=1e-6)
  assert model.decode(x, frozen).shape == (3, 4, 6, 1)
  # Export recognizes pixel models by this equality.
  assert codecs.pixels() == codecs.pixels() != codec
  assert make_model(conditions={}).load_frozen() == {}


def test_a_model_has_default_times_and_clipping():
  clip = lambda denoise: guidance.clip(denoise, -0.5, 0.5)  # noqa: E731
  times = lambda steps: sampling.grids.trailing(PROCESS, steps)  # noqa: E731
  defaults = SamplingDefaults("ddim", sampling.ddim(PROCESS), times, 5, clip)
  model = make_model(conditions={}, defaults=defaults)
  params = model.init(jax.random.key(0))
  np.testing.assert_array_equal(model.times(4), sampling.grids.trailing(PROCESS, 4))
  x = jnp.asarray(batch_of(3)["image"])
  plain, clipped = model.denoise(params, clip=False)(x, 0.5), model.denoise(params)(x, 0.5)
  np.testing.assert_array_equal(clipped, jnp.clip(plain, -0.5, 0.5))
  assert jnp.any(clipped != plain)
  samples = sampling.sample(jax.random.key(0), defaults.sampler, model.denoise(params), x, model.times(defaults.steps))
  assert jnp.all(jnp.abs(samples) <= 0.5)
  with pytest.raises(ValueError, match="a model without defaults"):
    make_model().times(4)


def test_a_classifier_is_a_model():
  """The model counts the classes without running the network, and scales the input by the prediction's factor."""

  def init(key, x, time, given):
    return {"kernel": jax.random.normal(key, (x[0].size, 5))}

  def apply(params, x, time, given, *, train=False, keys=None):
    return x.reshape(x.shape[0], -1) @ params["kernel"] + time[:, None]

  model = make_model(network=Network(init, apply), conditions={}, prediction=predictions.edm(0.5))
  assert model.output_channels() == 5
  params, x, t = model.init(jax.random.key(0)), jnp.asarray(batch_of(3)["image"]), 0.5
  scale = predictions.edm(0.5).input_scale(PROCESS.alpha(t), PROCESS.sigma(t))
  logits = (scale * x).reshape(3, -1) @ params["kernel"] + PROCESS.time_input(jnp.float32(t))
  np.testing.assert_allclose(model.classify(params)(x, t), jax.nn.log_softmax(logits), rtol=1e-4, atol=1e-4)
  assert make_model().output_channels() == 1


def test_the_package_exports_its_types():
  assert {models.Model, models.Condition, models.Codec, models.Network} == {Model, Condition, Codec, Network}
