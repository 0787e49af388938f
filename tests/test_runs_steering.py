"""Test the conditions of samples: default classes, a user's classes, and classes as frequent as in the data."""

import numpy as np
import pytest

from ddpm_jax import data, models
from ddpm_jax.config import spec
from ddpm_jax.models import inputs
from ddpm_jax.runs import generation
from tests.recipes import experiment_of, tiny_config


def experiment(**conditions):
  config = tiny_config()
  config.model.conditions = conditions
  return experiment_of(config)


def of_classes(number):
  return experiment(classes=spec("conditions.classes", number=number))


def test_classes_are_parsed_and_repeated():
  assert inputs.parse_inputs(experiment().model.conditions, {}, 4) == {}
  with pytest.raises(ValueError, match="trained without classes; expected a condition of the model .none."):
    inputs.parse_inputs(experiment().model.conditions, {"classes": ["1"]}, 4)
  conditions = of_classes(3).model.conditions
  np.testing.assert_array_equal(inputs.parse_inputs(conditions, {}, 4)["classes"], [0, 1, 2, 0])
  np.testing.assert_array_equal(inputs.parse_inputs(conditions, {"classes": ["2", "1"]}, 5)["classes"], [2, 1, 2, 1, 2])
  for wrong in (["3"], ["-1"], ["one"]):
    with pytest.raises(ValueError, match="expected integers from 0 to 2"):
      inputs.parse_inputs(conditions, {"classes": wrong}, 4)
  with pytest.raises(ValueError, match="no value of classes; expected one or more"):
    inputs.parse_inputs(conditions, {"classes": []}, 4)


def test_a_user_s_condition_that_cannot_parse_a_value_is_named():
  conditions = {"bright": models.conditions.vector("bright", 1)._replace(parse=np.float32)}
  np.testing.assert_array_equal(inputs.parse_inputs(conditions, {"bright": ["0.5"]}, 2)["bright"], [0.5, 0.5])
  with pytest.raises(
    ValueError, match="Got --given bright=dark, which the condition cannot parse .ValueError: .*'dark'"
  ):
    inputs.parse_inputs(conditions, {"bright": ["dark"]}, 2)


def test_advice_to_edit_images_is_for_conditions_that_are_images():
  vector = models.conditions.vector("source", 2)
  low = models.conditions.low_resolution("low", (8, 8, 1), factor=2)
  for condition, given, message in (
    (vector, {}, "Set --given source=<value>"),
    (vector._replace(parse=None), {}, "Sample in Python"),
    (
      vector._replace(parse=None),
      {"source": ["1"]},
      "without a text form; expected one that text can express. Sample in Python",
    ),
    (models.conditions.image("source", (8, 8, 1)), {}, "Use --mode=edit --task=instruct"),
  ):
    with pytest.raises(ValueError, match=message):
      inputs.parse_inputs({"source": condition}, given, 2)
  with pytest.raises(ValueError, match="Got --given low=.* Use --mode=edit --task=superres"):
    inputs.parse_inputs({"low": low}, {"low": ["1"]}, 2)


def test_classes_have_the_proportions_of_the_data():
  """Counts follow the largest-remainder method.

  In each tenth of the samples, each count deviates by at most 1 from the proportion of the class.
  """
  counts = np.array([700, 200, 0, 97])
  classes = data.proportional_classes(counts, 100)
  np.testing.assert_array_equal(np.bincount(classes, minlength=4), [70, 20, 0, 10])
  for first in range(0, 100, 10):
    part = np.bincount(classes[first : first + 10], minlength=4)
    assert np.all(np.abs(part - [7, 2, 0, 1]) <= 1)
  for count in (1, 2, 7, 33):
    part = data.proportional_classes(counts, count)
    assert part.shape == (count,)
    assert part.dtype == np.int32
    assert np.all(np.abs(np.bincount(part, minlength=4) - count * counts / 997) < 1)
  np.testing.assert_array_equal(data.proportional_classes(np.full(4, 5), 6), [0, 1, 2, 3, 0, 1])
  np.testing.assert_array_equal(data.proportional_classes(np.full(4, 5), 8), [0, 1, 2, 3, 0, 1, 2, 3])


def source(**items):
  images = np.zeros((12, 8, 8, 1), np.uint8)
  images[:] = np.arange(12)[:, None, None, None]
  return data.ArraySource(images, np.repeat([0, 2], [9, 3]), **items)


def test_evaluation_uses_the_class_frequencies_of_the_data():
  with_classes = of_classes(4)
  counts = generation.class_counts(with_classes, source())
  np.testing.assert_array_equal(counts, [9, 0, 3, 0])
  np.testing.assert_array_equal(
    np.bincount(inputs.default_inputs(with_classes.model.conditions, 8, source(), counts)["classes"]), [6, 0, 2]
  )
  np.testing.assert_array_equal(
    inputs.default_inputs(with_classes.model.conditions, 8, source())["classes"], np.arange(8) % 4
  )


def test_conditions_without_a_default_come_from_one_item_of_the_data(monkeypatch):
  monkeypatch.setattr(inputs, "_CHUNK", 7)
  numbers = np.arange(12)
  items = {"vector": numbers[:, None] + np.zeros(3), "sketch": np.zeros((12, 8, 8, 2)) + numbers[:, None, None, None]}
  with_conditions = experiment(
    classes=spec("conditions.classes", number=3),
    vector=spec("conditions.vector", size=3),
    sketch=spec("conditions.image", shape=(8, 8, 2)),
    low=spec("conditions.low_resolution", factor=2),
  )
  values = inputs.default_inputs(with_conditions.model.conditions, 30, source(**items), np.array([9, 0, 3]))
  assert set(values) == {"classes", "vector", "sketch", "low"}
  number = values["vector"][:, 0]
  assert set(number) == set(numbers)
  np.testing.assert_array_equal(values["classes"], np.where(number < 9, 0, 2))
  np.testing.assert_array_equal(values["sketch"][:, 0, 0, 0], number)
  np.testing.assert_allclose(values["low"][:, 0, 0, 0], number / 127.5 - 1, atol=1e-6)


class Captioned(data.ArraySource):
  """Provide images and captions, and count the images that are read."""

  num_read = 0

  def __getitems__(self, indices):
    self.num_read += len(indices)
    return super().__getitems__(indices)


def test_texts_and_classes_are_found_without_decoding_images():
  captions = np.array([f"picture {number}" for number in range(12)])
  images = np.zeros((12, 8, 8, 1), np.uint8)
  captioned = Captioned(images, np.arange(12) % 3, text=captions, vector=np.arange(12)[:, None] + np.zeros(3))
  conditions = experiment(
    classes=spec("conditions.classes", number=3),
    text=spec("conditions.words", vocabulary=("picture",), length=4),
  ).model.conditions
  values = inputs.default_inputs(conditions, 30, captioned)
  assert captioned.num_read == 1
  numbers = [int(text.split()[1]) for text in values["text"]]
  assert set(numbers) == set(range(12))
  np.testing.assert_array_equal(values["classes"], np.array(numbers) % 3)
  assert (values["classes"].dtype, values["text"].dtype) == (np.int32, captions.dtype)
  # Only the items show vectors. They belong to the same images as the texts.
  conditions = conditions | {"vector": models.conditions.vector("vector", 3)}
  again = inputs.default_inputs(conditions, 30, captioned)
  np.testing.assert_array_equal(again["vector"][:, 0], numbers)
  np.testing.assert_array_equal(again["text"], values["text"])
