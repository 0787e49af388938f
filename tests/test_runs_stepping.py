"""Test the optimizers, averages, schedules, losses and batches of a config."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ddpm_jax import data, losses
from ddpm_jax.config import slots, spec
from ddpm_jax.losses import Context
from ddpm_jax.runs import stepping
from ddpm_jax.training import ema
from tests.parameters import random_params
from tests.recipes import experiment_of, set_keys, tiny_config


def loss_of(config):
  """Return a function `loss(params, keys, batch)` that calls the objective's loss as a train step does."""
  experiment = experiment_of(config)
  objective, model = experiment.objective, experiment.model

  def loss(params, keys, batch):
    extra, memory = objective.init(keys[0], params, ())
    encoded = stepping.encode(model, {}, keys, batch) | objective.prepare(keys, memory)
    context = Context(jnp.zeros((), jnp.int32), (), params, memory)
    return objective.loss({"model": params, "extra": extra}, context, keys, encoded)

  return loss


def test_the_schedule_ends_with_the_training():
  config = tiny_config()
  config.optimizer.update({"schedule": "cosine", "warmup_steps": 5, "final_factor": 0.1})
  rate, peak = stepping.schedule(experiment_of(config)), config.optimizer.learning_rate
  np.testing.assert_allclose([rate(4), rate(12), rate(20)], [peak, peak / 10, peak / 10], rtol=1e-5)
  config.optimizer.decay_steps = 20
  np.testing.assert_allclose(stepping.schedule(experiment_of(config))(20), peak / 10, rtol=1e-5)
  config.optimizer.update({"schedule": "inverse_sqrt", "decay_steps": 0})
  np.testing.assert_allclose(stepping.schedule(experiment_of(config))(19), peak / 2, rtol=1e-5)


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
def test_a_config_makes_every_kind_of_optimizer_and_average(settings):
  config = tiny_config()
  config.update_from_flattened_dict(settings)
  # Read the config as a run does, from JSON.
  experiment = experiment_of(ConfigDict(json.loads(json.dumps(config.to_dict()))))
  optimizer, params = stepping.optimizer(experiment), {"w": jnp.ones(3)}
  state = optimizer.init(params)
  updates, state = optimizer.update({"w": jnp.array([1.0, 0.0, -1.0])}, state, params)
  assert updates["w"][0] < 0
  assert len(ema.split(state)[1]) == (3 if config.ema.kind == "power" else 1)


def test_an_infinite_optimizer_argument_is_an_error():
  config = tiny_config()
  config.optimizer.update({"name": "adamw", "arguments": "weight_decay=1e999"})
  with pytest.raises(ValueError, match="weight_decay=inf"):
    stepping.optimizer(experiment_of(config))


def names_of(noun):
  """Return the names of all components that a config accepts for a type."""
  slot = slots.slot_of(noun)
  return slots.names(slot)


TIMES = names_of(losses.TimeDistribution | losses.AdaptiveTimes)


@pytest.mark.parametrize(("weighting", "times"), zip(names_of(losses.Weighting), itertools.cycle(TIMES), strict=False))
def test_every_weighting_and_distribution_of_times_trains_from_a_config(weighting, times, dense):
  config = tiny_config()
  # Importance sampling stores a loss for each step of a discrete process.
  discrete = spec("processes.discrete", betas=spec("schedules.cosine"))
  config.model.process = discrete if times == "importance" else spec("processes.cosine")
  config.objective.weighting = spec(weighting, **({"weighting": "simple"} if weighting == "on_x0" else {}))
  config.objective.times = spec(times, **({"times": "uniform"} if times == "shifted" else {}))
  params = random_params(config)
  loss, _ = jax.jit(loss_of(config))(params, jax.random.split(jax.random.key(1), 4), {"image": jnp.ones((4, 8, 8, 1))})
  assert jnp.isfinite(loss)
  assert loss > 0


def test_all_weightings_and_distributions_of_times_are_tested():
  assert {"simple", "min_snr", "p2", "likelihood"} <= set(names_of(losses.Weighting))
  assert {"uniform", "low_discrepancy", "log_normal", "logit_normal", "mode", "cosmap", "shifted"} < set(TIMES)
  assert len(names_of(losses.Weighting)) >= len(TIMES), "every distribution of times is tested"


def learned_range():
  return spec("predictions.learned_range", prediction=spec("predictions.V"))


def test_a_config_trains_a_learned_variance():
  """The network has two output channels for each channel of the data, and the hybrid loss trains both."""
  config = set_keys(tiny_config(), model__prediction=learned_range())
  params = random_params(config)
  keys, batch = jax.random.split(jax.random.key(1), 4), {"image": jnp.ones((4, 8, 8, 1))}
  (_, details), slopes = jax.jit(jax.value_and_grad(loss_of(config), has_aux=True))(params, keys, batch)
  assert jnp.all(details["vlb_bits"] > 0)
  assert slopes["conv_out"]["kernel"].shape[-1] == 2
  assert jnp.all(jnp.any(slopes["conv_out"]["kernel"] != 0, (0, 1, 2)))
  config.model.process = spec("processes.vp")
  with pytest.raises(ValueError, match="expected a discrete process"):
    experiment_of(config)


def test_batch_shapes_have_the_items_of_the_conditions():
  config = tiny_config()
  config.model.conditions = {
    "classes": spec("conditions.classes", number=10),
    "vector": spec("conditions.vector", size=3),
    "sketch": spec("conditions.image", shape=(8, 8, 2)),
  }
  experiment = experiment_of(config)
  shapes = stepping.batch_shapes(experiment, 4)
  digits = data.read_digits()
  source = data.ArraySource(
    digits.images[:20], digits.classes[:20], vector=np.zeros((20, 3)), sketch=np.zeros((20, 8, 8, 2), np.float16)
  )
  assert stepping.batch_shapes(experiment, 4, source) == shapes
  assert {name: leaf.shape for name, leaf in shapes.items()} == {
    "image": (4, 8, 8, 1),
    "classes": (4,),
    "vector": (4, 3),
    "sketch": (4, 8, 8, 2),
  }
  one = {name: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype) for name, leaf in shapes.items()}
  assert stepping.flops_per_image(experiment, one) > 0
  encoded = jax.eval_shape(
    lambda keys, batch: stepping.encode(experiment.model, {}, keys, batch),
    jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4)),
    shapes | {"more": jax.ShapeDtypeStruct((4, 5), jnp.float32)},
  )
  assert set(encoded) == {"x", "given", "classes", "vector", "sketch", "more"}, "objectives may read all items"
  assert set(encoded["given"]) == {"classes", "vector", "sketch"}
