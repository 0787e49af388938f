"""What a config may hold: every key, of its type, and numbers that can be computed with."""

import pytest
from ml_collections import ConfigDict

from ddpm_jax import schema, workdir
from tests.commands import DENSE, call
from tests.recipes import tiny_config


def test_keys_are_checked():
  config = tiny_config()
  config.training.step = 3
  with pytest.raises(ValueError, match=r"'training.step' as a config key.*Did you mean 'training.steps'"):
    schema.check_config(config)
  config = tiny_config()
  del config.training["steps"]
  with pytest.raises(ValueError, match=r"without training.steps"):
    schema.check_config(config)
  for key, value in {
    "training.log_every": 0,
    "evaluation.num_samples": 0,
    "sampling.batch_size": 0,
    "sampling.tolerance": 0.0,
    "seed": -1,
  }.items():
    config = tiny_config()
    section, _, name = key.rpartition(".")
    (config[section] if section else config)[name] = value
    with pytest.raises(ValueError, match=f"{key}={value}"):
      schema.check_config(config)


@pytest.mark.parametrize(
  ("flag", "expected"),
  [
    ("--config.process.num_steps=1e9", "an integer, in digits alone"),
    ("--config.seed=x", "an integer, in digits alone"),
    ("--config.optimizer.learning_rate=fast", "a number"),
    ("--num_samples=many", "an integer, in digits alone"),
  ],
)
def test_flags_that_are_no_numbers_are_refused(flag, expected, tmp_path):
  code, output = call(DENSE, flag, f"--workdir={tmp_path / 'work'}")
  assert code == 2
  assert output == f"error: Got {flag}; expected {expected}.\n"


def test_config_of_run_needs_one(tmp_path):
  with pytest.raises(ValueError, match="holds no run"):
    schema.config_of_run(None, tmp_path)
  with pytest.raises(ValueError, match="a config of type dict"):
    schema.config_of_run({}, tmp_path)
  with pytest.raises(ValueError, match="'a' as a config key"):
    schema.config_of_run(ConfigDict({"a": 1}), tmp_path)
  config = tiny_config()
  found = schema.config_of_run(config, tmp_path)
  assert found == config
  assert found is not config


def leaves():
  return schema._leaves(schema.default_config().to_dict())


def changed(key, value):
  """The tiny config with another value, of whatever type, as a file edited by hand has it."""
  tree = tiny_config().to_dict()
  section, _, name = key.rpartition(".")
  (tree[section] if section else tree)[name] = value
  return ConfigDict(tree)


NUMBERS = [key for key, value in leaves().items() if isinstance(value, int | float) and not isinstance(value, bool)]
FLOATS = [key for key in NUMBERS if isinstance(leaves()[key], float)]
TUPLES = [key for key, value in leaves().items() if isinstance(value, tuple)]


@pytest.mark.parametrize("key", NUMBERS)
def test_no_number_is_infinite_or_none_at_all(key):
  for value in (float("nan"), float("inf"), -float("inf"), 2**63, -(2**63)):
    with pytest.raises(ValueError, match=f"Got config.{key}="):
      schema.check_config(changed(key, value))


@pytest.mark.parametrize("key", FLOATS)
def test_no_number_is_rounded_to_0_or_infinity(key):
  for value in (1e-50, 1e-44, 1e39):
    with pytest.raises(ValueError, match=rf"Got config.{key}=1e[-+]?\d+; expected a finite number that float32 holds"):
      schema.check_config(changed(key, value))


@pytest.mark.parametrize("key", NUMBERS)
def test_what_counts_or_measures_is_not_negative(key):
  if key in ("loss.times_mean", "guidance.scale", "network.frequency_shift", "data.hold_out"):
    schema.check_config(changed(key, -1.0 if key in FLOATS else -1))
    return
  with pytest.raises(ValueError, match=f"Got config.{key}=-1.*; wanted"):
    schema.check_config(changed(key, -1.0 if key in FLOATS else -1))


@pytest.mark.parametrize("key", TUPLES)
def test_elements_of_tuples_are_checked_too(key):
  words = key in ("evaluation.scores", "evaluation.likelihood")
  for value in [(3,), (None,)] if words else [("3",), (float("nan"),), (1, float("inf")), ((1,),), (1e-50,), (True,)]:
    with pytest.raises(ValueError, match=f"Got config.{key}="):
      schema.check_config(changed(key, value))


@pytest.mark.parametrize("key", leaves())
def test_values_of_another_type_are_refused(key):
  wrong = {str: 3, bool: 1, int: 0.5, float: "1", tuple: 3}[type(leaves()[key])]
  for value in (wrong, None):
    with pytest.raises(ValueError, match=f"Got config.{key}="):
      schema.check_config(changed(key, value))


def test_an_unknown_key_is_shown_with_those_beside_it():
  for key, message in (
    ("network.chanels", r"expected one of network\.attention, [a-z_., ]+\. Did you mean 'network\.channels'\?$"),
    ("sed", r"expected one of data, editing, ema, [a-z_, ]+\. Did you mean 'seed'\?$"),
    ("nowhere", r"expected one of data, editing, ema, [a-z_, ]+\.$"),
  ):
    with pytest.raises(ValueError, match=f"Got '{key}' as a config key; {message}"):
      schema.check_config(changed(key, 1))


def test_a_seed_may_be_all_that_flags_take():
  schema.check_config(changed("seed", 2**32 - 1))
  with pytest.raises(
    ValueError, match=r"config.seed=4294967296; expected at most 4294967295: programs hold it in 32 bits\. Set"
  ):
    schema.check_config(changed("seed", 2**32))


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("ema.stds", (float("nan"),), "a list of finite numbers that float32 holds"),
    ("network.attention_resolutions", (0.5,), "a list of integers of at most 64 bits"),
    ("evaluation.scores", (3,), "a list of strings"),
    ("seed", 2**70, "an integer of at most 64 bits"),
  ],
)
def test_messages_say_what_is_expected(key, value, message):
  with pytest.raises(ValueError, match=rf"Got config.{key}=.*; expected {message}\. Set --config.{key}"):
    schema.check_config(changed(key, value))


def test_a_saved_config_is_checked_and_named(tmp_path):
  for change, message in (
    ({"seed": "x"}, "Got config.seed='x'; expected an integer"),
    ({"seed": {"a": 1}}, "Got a section config.seed with the key seed.a; expected one value, such as 0"),
    ({"training": {"step": 3}}, "Did you mean 'training.steps'"),
    ({"training": 3}, "Got config.training=3; expected a section with the keys accumulate, "),
    ({"training": None}, "Got config.training=None; expected a section"),
    ({"training": []}, r"Got config.training=\[\]; expected a section"),
    ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate=nan"),
    ({"network": {"multipliers": ["a"]}}, r"network.multipliers=\('a',\)|network.multipliers=\['a'\]"),
    ({"training.steps": 3}, "dots"),
  ):
    tree = tiny_config().to_dict()
    for key, value in change.items():
      tree[key] = tree[key] | value if isinstance(value, dict) and isinstance(tree[key], dict) else value
    workdir.write_config(tmp_path, tree)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}|{message}.*config.json"):
      schema.config_of_run(None, tmp_path)
