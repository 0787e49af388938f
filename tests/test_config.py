"""Test the types, limits and roles of config keys, and the configs in run folders."""

import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ddpm_jax import config as configs
from ddpm_jax.config import components, default_config, slots, spec, values
from ddpm_jax.config import tree as trees
from ddpm_jax.storage import workdir
from tests.commands import DENSE, RECIPE, assert_refused, call
from tests.recipes import tiny_config, tree_of

TREE = configs.expand({})
# All keys of sections. Arguments of components are excluded, because the components check them.
KEYS = {
  path: value
  for path, value in trees.leaves(TREE.values).items()
  if not any(components.is_node(TREE.at(path.rsplit(".", depth)[0])) for depth in range(1, path.count(".") + 1))
  and path.rpartition(".")[2] != components.KEY
}
KEYS |= {"sampling.grid": None, "editing.method": None, "editing.operator": None}
NUMBERS = [key for key, value in KEYS.items() if isinstance(value, int | float) and not isinstance(value, bool)]
FLOATS = [key for key in NUMBERS if isinstance(KEYS[key], float)]
TUPLES = [key for key, value in KEYS.items() if isinstance(value, tuple)]
COMPONENTS = [path for path, one in TREE.parameters.items() if one.slot is not None and not one.is_mapping]


def with_value(key, value):
  """Return the tiny config as a dict in which one key has a new value of any type."""
  tree = tiny_config().to_dict()
  node = tree
  *sections, name = key.split(".")
  for section in sections:
    node = node[section]
  node[name] = value
  return tree


def check(key, value):
  return configs.expand(with_value(key, value))


def test_unknown_keys_and_numbers_below_their_limits_are_refused():
  with pytest.raises(ValueError, match=r"'training.step' as a config key.*Did you mean 'training.steps'"):
    check("training.step", 3)
  config = tiny_config()
  del config.training["steps"]
  # A missing key has its default.
  assert tree_of(config).values["training"]["steps"] == 800_000
  for key, value in {
    "training.log_every": 0,
    "evaluation.num_samples": 0,
    "sampling.batch_size": 0,
    "evaluation.likelihood_tolerance": 0.0,
    "seed": -1,
  }.items():
    with pytest.raises(ValueError, match=f"{key}={value}"):
      check(key, value)


def test_an_empty_config_is_the_default():
  assert default_config().to_dict() == TREE.values
  assert tree_of(ConfigDict()).values == TREE.values
  assert tree_of(default_config()).values == TREE.values


@pytest.mark.parametrize(
  ("flag", "expected"),
  [
    ("--config.model.process.betas.num_steps=1e9", "an integer in decimal digits"),
    ("--config.seed=x", "an integer in decimal digits"),
    ("--config.optimizer.learning_rate=fast", "a number"),
    ("--config.data.flip=maybe", "true or false"),
    ("--profile=many", "an integer in decimal digits"),
  ],
)
def test_flags_of_the_wrong_type_are_refused(flag, expected, tmp_path):
  code, output = call(DENSE, flag, f"--workdir={tmp_path / 'work'}")
  assert code == 2
  assert output.endswith(f"error: Got {flag}; expected {expected}.\n")
  assert not (tmp_path / "work").exists()


def test_a_folder_without_a_run_is_refused(tmp_path):
  assert configs.find_run(tmp_path) is None
  with pytest.raises(ValueError, match="holds no run"):
    configs.read_run(tmp_path)


def test_only_a_config_with_known_keys_becomes_a_tree():
  with pytest.raises(ValueError, match="a config of type dict"):
    configs.to_tree({})
  with pytest.raises(ValueError, match="'a' as a config key"):
    configs.to_tree(ConfigDict({"a": 1}))


def test_changes_of_a_tree_do_not_affect_its_config():
  config = tiny_config()
  before = config.to_dict()
  configs.to_tree(config).values["seed"] = 3
  assert config.to_dict() == before


@pytest.mark.parametrize("key", NUMBERS)
def test_infinite_and_huge_numbers_are_refused(key):
  for value in (float("nan"), float("inf"), -float("inf"), 2**63, -(2**63)):
    with pytest.raises(ValueError, match=f"Got config.{key}="):
      check(key, value)


@pytest.mark.parametrize("key", FLOATS)
def test_numbers_beyond_float32_are_refused(key):
  for value in (1e-50, 1e-44, 1e39):
    with pytest.raises(
      ValueError, match=rf"Got config.{key}=1e[-+]?\d+; expected a finite number in the range of float32"
    ):
      check(key, value)


@pytest.mark.parametrize("key", NUMBERS)
def test_negative_numbers_are_refused(key):
  if key == "data.hold_out":
    check(key, -1)
    return
  with pytest.raises(ValueError, match=f"Got config.{key}=-1.*; expected .*Set --config.{key}"):
    check(key, -1.0 if key in FLOATS else -1)


@pytest.mark.parametrize("key", TUPLES)
def test_elements_of_tuples_are_checked_too(key):
  are_words = key in ("evaluation.scores", "evaluation.likelihood")
  for value in (
    [(3,), (None,)] if are_words else [("3",), (float("nan"),), (1, float("inf")), ((1,),), (1e-50,), (True,)]
  ):
    with pytest.raises(ValueError, match=f"Got config.{key}="):
      check(key, value)


@pytest.mark.parametrize("key", KEYS)
def test_values_of_another_type_are_refused(key):
  wrong = {str: 3, bool: 1, int: 0.5, float: "1", tuple: 3, type(None): 3}[type(KEYS[key])]
  for value in (wrong, {"a": 1}, *([] if KEYS[key] is None else [None])):
    with pytest.raises(ValueError, match=f"Got config.{key}[ =].*; expected "):
      check(key, value)


@pytest.mark.parametrize("key", COMPONENTS)
def test_values_that_are_not_components_are_refused(key):
  # A table of numbers may replace a schedule.
  for value in (True, object(), float("nan"), {"a": 1}, len, *([()] if key != "model.process.betas" else [])):
    with pytest.raises(ValueError, match=rf"config\.{key}[ =].*; expected|Got .*; expected"):
      configs.expand(trees._with(TREE.values, key.split("."), value))


def test_the_lists_above_contain_all_keys():
  mappings = {path for path, one in TREE.parameters.items() if one.is_mapping}
  assert mappings == {"model.conditions"}
  sections = {path for path in TREE.parameters if isinstance(TREE.at(path), Mapping)}
  assert set(KEYS) | sections | mappings == {
    path for path in TREE.parameters if path in sections or not components.is_node(TREE.at(path.rpartition(".")[0]))
  }


def test_the_error_of_an_unknown_key_lists_the_keys_of_its_section():
  for key, message in (
    (
      "model.network.chanels",
      r"of networks\.UNet; .*model\.network\.attention, [a-z_., ]+\. Did you mean 'model\.network\.channels'\?$",
    ),
    ("training.stps", r"expected one of training\.accumulate, [a-z_., ]+\. Did you mean 'training\.steps'\?$"),
    ("sed", r"expected one of data, editing, ema, [a-z_, ]+\. Did you mean 'seed'\?$"),
    ("nowhere", r"expected one of data, editing, ema, [a-z_, ]+\.$"),
  ):
    with pytest.raises(ValueError, match=f"Got '{key}' as a config key;? ?{message}"):
      check(key, 1)


def test_seeds_have_32_bits():
  check("seed", 2**32 - 1)
  with pytest.raises(
    ValueError,
    match=r"config.seed=4294967296; expected at most 4294967295, because programs store this number in 32 bits\. Set",
  ):
    check("seed", 2**32)


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("ema.stds", (float("nan"),), "a list of finite numbers in the range of float32"),
    ("model.network.attention_levels", (0.5,), "a list of integers of at most 64 bits"),
    ("evaluation.scores", (3,), "a list of strings"),
    ("seed", 2**70, "an integer of at most 64 bits"),
    ("data.image_size", "large", "an integer of at most 64 bits or a list of 2 integers of at most 64 bits"),
    ("sampling.grid", 3, r"a grid of times, such as karras\(rho=7\), or None"),
    ("sampler", 3, r"a sampler, such as heun\(s_churn=40\), or None"),
    ("model.process", 3, r"a process, such as discrete\(betas=cosine\(\)\)"),
    (
      "model.process.betas",
      3,
      r"a schedule, such as cosine\(num_steps=1000\), or a list of finite numbers in the range of float32",
    ),
    (
      "guidance.scale",
      None,
      r"a function of time, such as interval\(scale=3, low=0\.3, high=5\), or a finite number in the range of float32",
    ),
  ],
)
def test_messages_describe_the_expected_value(key, value, message):
  with pytest.raises(ValueError, match=rf"Got config.{key}=.*; expected {message},?\. Set --config.{key}\.$"):
    check(key, value)


def test_numpy_and_jax_numbers_are_accepted():
  config = tiny_config()
  config.seed = np.int64(3)
  config.optimizer.learning_rate = jnp.float32(0.5)
  config.model.network.dtype = jnp.bfloat16
  config.model.process = spec("processes.discrete", betas=np.linspace(0.25, 0.5, 2, dtype=np.float32))
  tree_values = tree_of(config).values
  assert (tree_values["seed"], tree_values["optimizer"]["learning_rate"]) == (3, 0.5)
  assert tree_values["model"]["process"]["betas"] == (0.25, 0.5)
  assert tree_values["model"]["network"]["dtype"] == "bfloat16"
  config.model.process = spec("processes.discrete", betas=jnp.array([0.25, 0.5]))
  assert tree_of(config).values == tree_values


def test_errors_in_a_saved_config_name_the_file(tmp_path):
  for change, message in (
    ({"seed": "x"}, "Got config.seed='x'; expected an integer"),
    ({"seed": {"a": 1}}, "Got config.seed={'a': 1}; expected an integer"),
    ({"training": {"step": 3}}, "Did you mean 'training.steps'"),
    ({"training": 3}, "Got config.training=3; expected a section with the keys batch_size, "),
    ({"training": None}, "Got config.training=None; expected a section"),
    ({"training": []}, r"Got config.training=\[\]; expected a section"),
    ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate=nan"),
    ({"ema": {"stds": ["a"]}}, r"ema.stds=\('a',\)"),
    ({"training.steps": 3}, "'training.steps' as a config key"),
    ({"sampler": {"component": "sampling.hein"}}, r"config\.sampler='sampling\.hein'; .*Did you mean 'heun'"),
    (
      {"sampler": {"component": "sampling.heun", "churn": 3}},
      "'sampler.churn' as a config key of sampling.heun.*'sampler.s_churn'",
    ),
    ({"sampler": {"component": 3}}, "config.sampler=3; expected the name of a component"),
    ({"sampler": {}}, "config.sampler without the key .component.; expected a sampler"),
    ({"model": 3}, "Got config.model=3; expected a section"),
    ({"model": {"conditions": 3}}, "Got config.model.conditions=3; expected components by name"),
    ({"model": {"conditions": {"a b": {}}}}, "Got 'a b' as a name in config.model.conditions"),
  ):
    tree = tiny_config().to_dict()
    for key, value in change.items():
      tree[key] = (
        tree[key] | value if isinstance(value, dict) and key in ("training", "optimizer", "ema", "model") else value
      )
    workdir.write_config(tmp_path, tree)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}|{message}.*config.json"):
      configs.read_run(tmp_path)


def test_a_config_is_restored_from_a_run_folder(tmp_path):
  config = tiny_config()
  # Include infinity, None, nested components, numbers instead of a component, and a path in the run folder.
  config.sampler = spec("with_langevin", sampler=spec("heun"), snr=0.5)
  config.model.process = spec("processes.discrete", betas=(0.25, 0.5))
  config.model.conditions.classes = spec("classes", number=10)
  config.sampling.clip = None
  config.init_from = f"{tmp_path}/start"
  tree = tree_of(config)
  assert tree.values["sampler"]["sampler"]["s_max"] == math.inf
  configs.write(tmp_path, tree)
  assert f'"init_from": "{tmp_path}' not in (tmp_path / "config.json").read_text()
  assert configs.read_run(tmp_path).values == tree.values
  for path in trees.leaves(tree.values):
    assert configs.read_run(tmp_path).role(path) == tree.role(path)
  # The folder may move.
  moved = tmp_path.parent / "moved"
  tmp_path.rename(moved)
  assert configs.read_run(moved).values["init_from"] == f"{moved}/start"


ROLES = {
  "model.network.channels": "model",
  "model.process.betas.num_steps": "model",
  "data.image_size": "model",
  "task.component": "model",
  "seed": "run",
  "objective.weighting.component": "run",
  "data.source.name": "run",
  "data.source.path": "place",
  "init_from": "place",
  "sampler.component": "sampling",
  "guidance.scale": "sampling",
  "sampling.preview_steps": "free",
  "training.steps": "free",
  "evaluation.num_samples": "free",
  "training.accumulate": "speed",
  "parallel.fsdp": "speed",
}


@pytest.mark.parametrize("key", ROLES)
def test_roles_come_from_keys_or_their_sections(key):
  assert TREE.role(key) == ROLES[key]


def test_every_value_has_a_role():
  assert {TREE.role(path) for path in trees.leaves(TREE.values)} <= set(components.ROLES)
  assert TREE.with_roles(*components.ROLES) == trees.leaves(TREE.values)


@pytest.fixture
def run_folder(tmp_path):
  """Make a run folder that has the tiny config and an empty checkpoint."""
  (workdir.checkpoint_folder(tmp_path) / "5").mkdir(parents=True)
  configs.write(tmp_path, tree_of(tiny_config()))
  return tmp_path


def test_keys_that_do_not_affect_parameters_may_change(run_folder):
  configs.check_same_run(run_folder, tree_of(tiny_config()))
  config = tiny_config()
  config.training.update({"steps": 99, "accumulate": 2, "log_every": 7})
  config.sampler = spec("sampling.heun")
  config.guidance.scale = 3.0
  config.sampling.clip = None
  config.evaluation.k = 7
  config.editing.method = spec("repaint")
  config.model.network.remat = "blocks"
  configs.check_same_run(run_folder, tree_of(config))


def test_another_config_is_refused_with_a_list_of_differences(run_folder):
  config = tiny_config()
  config.seed = 1
  config.model.network.channels = 16
  config.model.conditions.classes = spec("classes", number=10)
  config.objective.weighting = spec("min_snr", gamma=3.0)
  with pytest.raises(ValueError, match="another config") as error:
    configs.check_same_run(run_folder, tree_of(config))
  for line in (
    "seed: 0 in the folder, 1 now",
    "model.network.channels: 8 in the folder, 16 now",
    "model.conditions.classes.number: absent in the folder, 10 now",
    "objective.weighting.component: losses.snr_plus_one in the folder, losses.min_snr now",
    "objective.weighting.gamma: absent in the folder, 3.0 now",
  ):
    assert f"  {line}\n" in str(error.value)
  assert "multipliers" not in str(error.value)


def test_the_number_of_steps_is_fixed_if_the_learning_rate_depends_on_it(tmp_path):
  (workdir.checkpoint_folder(tmp_path) / "5").mkdir(parents=True)

  def config(steps, **optimizer):
    config = tiny_config()
    config.optimizer.update(optimizer)
    config.training.steps = steps
    return tree_of(config)

  for schedule in ("cosine", "linear"):
    configs.write(tmp_path, config(10, schedule=schedule))
    configs.check_same_run(tmp_path, config(10, schedule=schedule))
    with pytest.raises(ValueError, match="training.steps: 10 in the folder, 20 now"):
      configs.check_same_run(tmp_path, config(20, schedule=schedule))
  for optimizer in ({"schedule": "cosine", "decay_steps": 10}, {"schedule": "constant"}):
    configs.write(tmp_path, config(10, **optimizer))
    configs.check_same_run(tmp_path, config(20, **optimizer))


def test_checkpoints_without_a_config_are_refused(run_folder):
  (run_folder / "config.json").unlink()
  with pytest.raises(ValueError, match=r"no config\.json"):
    configs.check_same_run(run_folder, tree_of(tiny_config()))


def test_a_run_without_a_checkpoint_accepts_any_config(tmp_path):
  configs.write(tmp_path, tree_of(tiny_config()))
  config = tiny_config()
  config.seed = 1
  configs.check_same_run(tmp_path, tree_of(config))


def test_values_and_components_can_be_replaced():
  tree = tree_of(tiny_config())
  assert configs.replace(tree, "seed", 3).at("seed") == 3
  assert tree.at("seed") == 0
  other = configs.replace(tree, "sampler", "heun(s_churn=40)")
  assert other.at("sampler") == {
    "component": "sampling.heun",
    "s_churn": 40.0,
    "s_min": 0.0,
    "s_max": math.inf,
    "s_noise": 1.0,
    "scaled": False,
  }
  assert configs.replace(other, "sampler.s_churn", 3).at("sampler.s_churn") == 3.0
  with pytest.raises(ValueError, match="Got 'sampler.eta' as a config key of sampling.heun"):
    configs.replace(other, "sampler.eta", 3)
  with pytest.raises(ValueError, match="Got config.seed='x'"):
    configs.replace(tree, "seed", "x")
  experiment = configs.build(tree)
  changed = experiment.replace(sampling__num_steps=3, sampler="heun")
  assert (len(changed.times), changed.sampler_name) == (4, "heun")
  # The model is not built again, because the changes do not affect it.
  assert changed.model is experiment.model
  with pytest.raises(ValueError, match="Got config.sampling.num_steps=0"):
    experiment.replace(sampling__num_steps=0)


def test_required_arguments_may_be_set_late():
  tree = tree_of(ConfigDict({"model": {"conditions": {"classes": {"component": "classes"}}}}))
  assert tree.at("model.conditions.classes") == {"component": "conditions.classes", "dropout": 0.0}
  with pytest.raises(
    ValueError,
    match=r"config.model.conditions.classes=conditions.classes without its required argument number. Set --config.model.conditions.classes.number=<value>",
  ):
    configs.build(tree)
  assert (
    configs.build(configs.replace(tree, "model.conditions.classes.number", 3)).model.conditions["classes"].num_values
    == 3
  )


@pytest.mark.parametrize("key", [key for key in COMPONENTS if slots.names(TREE.parameters[key].slot)])
def test_the_example_of_every_slot_fits(key):
  slot = TREE.parameters[key].slot
  name = components.parse(slot.example, key)[components.KEY]
  if ":" in name:
    return
  assert name in slots.names(slot)
  tree = configs.replace(TREE, key, slot.example)
  assert tree.at(key)[components.KEY] == f"{slot.module}.{name}"


@pytest.mark.parametrize(
  ("text", "kinds", "value"),
  [
    ("3", (int,), 3),
    ("-3", (float,), -3.0),
    ("inf", (float,), math.inf),
    ("True", (bool,), True),
    ("false", (bool,), False),
    ("3", (str,), "3"),
    ("", (str,), ""),
    ("a b", (str,), "a b"),
    ("None", (type(None), float), None),
    ("32", (int, list[int]), 32),
    ("(32, 48)", (int, list[int]), (32, 48)),
    ("32,48", (int, list[int]), (32, 48)),
    ("[1, 2]", (list[float],), [1, 2]),
    ("0.5,inf", (list[float],), (0.5, math.inf)),
    ("1", (list[int],), (1,)),
    ("", (list[int],), ()),
    ("()", (list[int],), ()),
    ("fid,kid", (list[str],), ("fid", "kid")),
    ("('fid', 'kid')", (list[str],), ("fid", "kid")),
    ("conv", (str, list[str]), "conv"),
    ("('conv', 'residual')", (str, list[str]), ("conv", "residual")),
  ],
)
def test_values_of_flags_are_parsed(text, kinds, value):
  found = values.read(text, kinds, "key")
  assert found == value
  assert type(found) is type(value)


WRONG = {
  "--config.sed=1": "Got 'sed' as a config key; expected one of data, .*Did you mean 'seed'",
  "--config.training.step=3": "Got 'training.step' as a config key.*Did you mean 'training.steps'",
  "--config.seed.a=3": "Got --config.seed.a, but config.seed is one value, not a section; expected --config.seed=<value>",
  "--config.sampling.grid.rho=3": "config.sampling.grid is one value, not a section",
  "--config.model.network.chanels=3": "'model.network.chanels' as a config key of networks.UNet.*'model.network.channels'",
  "--config.model.conditions.classes.number=3": "'model.conditions.classes' as a config key|config.model.conditions.classes",
  "--config.training=3": "config.training",
  "--config.seed=-1": "Got config.seed=-1; expected 0 or more",
  "--config.training.steps=0": "Got config.training.steps=0; expected at least 1",
  "--config.optimizer.learning_rate=nan": "Got config.optimizer.learning_rate=nan; expected a finite number",
  "--config.ema.stds=a,b": r"Got config.ema.stds=\('a', 'b'\); expected a list of finite numbers",
  "--config.model.network.multipliers=wide": "Got config.model.network.multipliers=.*; expected a list of finite numbers",
  "--config.data.image_size=1,2,3": r"config.data.image_size=\(1, 2, 3\); expected an integer of .* or a list of 2 integers",
}


@pytest.mark.parametrize("flag", WRONG)
def test_wrong_keys_on_the_command_line_give_one_message(flag, tmp_path):
  # Use RECIPE, because the network of DENSE accepts any argument.
  code, output = call(RECIPE, flag, f"--workdir={tmp_path / 'work'}")
  assert_refused(code, output, WRONG[flag])
  assert code == 2
  assert len(output.splitlines()) == 2  # the first line is the version and mode
  assert not (tmp_path / "work").exists()


def test_a_key_needs_a_config(tmp_path):
  code, output = call("--config.seed=3", f"--workdir={tmp_path / 'work'}")
  assert_refused(code, output, "Got no --config, and .* holds no run; expected a recipe, such as --config=digits_vp")
  assert not (tmp_path / "work").exists()


def test_invalid_names_of_conditions_are_refused():
  for name, message in (("negative_hue", "does not start with 'negative_'"), ("2d", "expected a Python identifier")):
    with pytest.raises(ValueError, match=message):
      configs.replace(tree_of(tiny_config()), "model.conditions", {name: "classes(number=2)"})
