"""Test parsing, finding and building the components of a config."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import config as configs
from ddpm_jax import processes, sampling, schedules
from ddpm_jax.commands import config_flags
from ddpm_jax.config import components, flags, spec
from tests.commands import RECIPE
from tests.parameters import write_run
from tests.recipes import tiny_config, tree_of

TREE = configs.expand({})


def with_keys(keys, tree=TREE):
  """Return a config tree after flags have set its keys to new values."""
  return flags.apply(tree, keys)


@pytest.mark.parametrize(
  ("text", "node"),
  [
    ("heun", {"component": "heun"}),
    (" sampling.heun ", {"component": "sampling.heun"}),
    ("heun()", {"component": "heun"}),
    ("heun(s_churn=40, s_max=inf)", {"component": "heun", "s_churn": 40, "s_max": math.inf}),
    (
      "f(a=-1.5, b='x y', c=(1, 2), d=[], e=None, f=True, g=false, h=-inf)",
      {"component": "f", "a": -1.5, "b": "x y", "c": (1, 2), "d": (), "e": None, "f": True, "g": False, "h": -math.inf},
    ),
    (
      "discrete(betas=cosine(num_steps=10))",
      {"component": "discrete", "betas": {"component": "cosine", "num_steps": 10}},
    ),
    ("discrete(betas=schedules.cosine)", {"component": "discrete", "betas": "schedules.cosine"}),
    ("discrete(betas=(0.1, inf))", {"component": "discrete", "betas": (0.1, math.inf)}),
    ("a/my_file.py:f(x=1)", {"component": "a/my_file.py:f", "x": 1}),
    ("f(x='my_file.py:g(y=1)')", {"component": "f", "x": "my_file.py:g(y=1)"}),
    ("f(\n  x=1,\n)", {"component": "f", "x": 1}),
  ],
)
def test_texts_of_components_are_parsed(text, node):
  assert components.parse(text, "key") == node


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "expected a name and its arguments"),
    ("(x=1)", "expected a name and its arguments"),
    ("heun(", "expected a name and its arguments"),
    ("heun(s_churn=40", "expected a name and its arguments"),
    ("heun(40)", r"which cannot be parsed \(every argument needs a name\)"),
    ("heun(*a)", "every argument needs a name"),
    ("heun(**a)", "every argument needs a name"),
    ("f(x=g(1))", "every argument needs a name"),
    ("heun()(s_churn=1)", "more text follows the closing parenthesis"),
    ("heun(x=1) + (2)", "more text follows the closing parenthesis"),
    ("heun(s_churn=1, s_churn=2)", "s_churn occurs twice"),
    ("heun(component='ddim')", "component is not an argument"),
    ("heun(s_churn=1 2)", "cannot be parsed"),
    ("heun(s_churn=)", "cannot be parsed"),
    ("heun(s_churn=1 + x)", r"1 \+ x is neither a value nor a component"),
    ("heun(s_churn=[x for x in y])", "is neither a value nor a component"),
    ("f(x=" + "(" * 300 + ")" * 300 + ")", "cannot be parsed"),
    ("f(x=\0)", "cannot be parsed"),
  ],
)
def test_texts_that_cannot_be_parsed_give_one_message(text, message):
  with pytest.raises(ValueError, match=f"Got key=.*{message}.*such as heun"):
    components.parse(text, "key")


# Keys, names of components that do not fit, and error messages.
UNKNOWN = [
  (
    "sampler",
    "hein",
    r"config.sampler='hein'; expected a sampler, one of ancestral, .*my_file.py:my_function. Did you mean 'heun'",
  ),
  ("sampler", "sampling.hein", "Did you mean 'heun'"),
  ("sampler", "samplin.heun", "expected a sampler, one of ancestral, .*Did you mean 'heun'"),
  ("sampler", "vp", "config.sampler='vp'; expected a sampler, one of"),
  (
    "sampler",
    "processes.vp",
    "config.sampler='processes.vp', the function vp that makes a Process; expected a sampler, one of ancestral",
  ),
  ("sampler", "sampling.sample", "'sampling.sample', the function sample; expected a sampler"),
  ("sampler", "sampling.grids", "'sampling.grids', a value of type module; expected a sampler"),
  ("sampler", "sampling.Sampler", "'sampling.Sampler', the class Sampler; expected a sampler"),
  ("sampler", "main.main", "expected a sampler, one of"),
  ("sampler", "_step", "expected a sampler, one of"),
  (
    "model.process",
    "sampling.heun",
    "the function heun that makes a Sampler; expected a process, one of cosine, discrete",
  ),
  ("model.process", "predictions.EPS", "a value of type Prediction; expected a process"),
  ("model.process.betas", "processes.cosine", "the function cosine that makes a Process; expected a schedule"),
  ("model.prediction", "predictions.denoiser", "the function denoiser; expected a prediction"),
  ("model.network", "networks.trainable_mask", "the function trainable_mask; expected a network"),
  ("model.codec", "conditions.classes", "makes a Condition; expected a codec"),
  ("model.conditions.classes", "codecs.pixels", "makes a Codec; expected a condition"),
  ("objective", "losses.min_snr", "the function min_snr; expected an objective"),
  ("objective", "losses.denoising_loss", "the function denoising_loss; expected an objective"),
  ("objective.weighting", "losses.mean_bits", "the function mean_bits; expected a weighting"),
  ("objective.weighting", "losses.uniform", "the function uniform; expected a weighting"),
  ("objective.times", "losses.min_snr", "the function min_snr; expected a distribution of times"),
  ("objective.times", "losses.importance_times", "the function importance_times; expected a distribution of times"),
  ("sampling.grid", "grids.default_t_min", "the function default_t_min; expected a grid of times"),
  ("sampling.clip", "guidance.classifier_free", "the function classifier_free; expected a rule that clips estimates"),
  ("guidance", "guidance.clip", "the function clip; expected a rule of guidance"),
  ("guidance", "guidance.interval", "the function interval; expected a rule of guidance"),
  ("guidance.scale", "guidance.clip", "the function clip; expected a function of time"),
  ("editing.method", "editing.invert", "the function invert; expected a method of editing"),
  ("editing.operator", "editing.repaint", "makes a Sampler; expected an operator"),
  ("data.source", "data.fit_settings", "the function fit_settings; expected a source of data"),
  ("task", "tasks.Classify", "the class Classify; expected a task, one of autoencode, classify, denoise"),
]


@pytest.mark.parametrize(("key", "name", "message"), UNKNOWN)
def test_components_that_do_not_fit_a_slot_are_refused(key, name, message):
  for value in (name, {"component": name}):
    with pytest.raises(ValueError, match=message):
      configs.replace(TREE, key, value)


@pytest.mark.parametrize(
  ("keys", "message"),
  [
    (
      {"sampler": "heun(churn=3)"},
      "'sampler.churn' as a config key of sampling.heun; expected one of .*'sampler.s_churn'",
    ),
    ({"sampler": "heun(s_churn=forty)"}, "Got config.sampler.s_churn='forty'; expected a finite number"),
    ({"sampler": "heun(s_churn=None)"}, "Got config.sampler.s_churn=None; expected a finite number"),
    ({"sampler": "heun(s_churn=nan)"}, "Got config.sampler.s_churn=nan; expected a finite number"),
    ({"sampler": "heun(s_churn=True)"}, "Got config.sampler.s_churn=True; expected a finite number"),
    ({"sampler": "heun(s_churn=(1, 2))"}, r"Got config.sampler.s_churn=\(1, 2\); expected a finite number"),
    ({"sampler": "heun(s_churn=ddim())"}, "Got config.sampler.s_churn=.*; expected a finite number"),
    ({"sampler": "heun(process=vp())", "sampler.process.beta_max": "x"}, "--config.sampler.process.beta_max=x"),
    ({"sampler": "heun(s_churn=-1)"}, "In config.sampler=sampling.heun: .*churn"),
    ({"sampler": "deis(order=9)"}, "In config.sampler=sampling.deis: .*order"),
    ({"sampler": "ancestral(variance='huge')"}, "In config.sampler=sampling.ancestral: .*huge"),
    (
      {"sampler": "dpmpp_2m(order=2)"},
      "'sampler.order' as a config key of sampling.dpmpp_2m; expected no keys, because it has no arguments",
    ),
    (
      {"sampler": "with_langevin"},
      "config.sampler=sampling.with_langevin without its required argument sampler. Set --config.sampler.sampler=<value>",
    ),
    ({"sampler": "with_langevin(sampler=heun(s_churn=-1))"}, "In config.sampler.sampler=sampling.heun: .*churn"),
    ({"sampler": "with_langevin(sampler=vp())"}, "config.sampler.sampler='vp'; expected a sampler"),
    ({"model.process": "discrete"}, "without its required argument betas. Set --config.model.process.betas=<value>"),
    (
      {"model.process": "discrete(betas=3)"},
      "config.model.process.betas=3; expected a schedule, such as .*, or a list of",
    ),
    ({"model.process": "discrete(betas=())"}, "In config.model.process=processes.discrete"),
    ({"model.process": "discrete(betas=(0.1, 2))"}, "In config.model.process=processes.discrete"),
    ({"model.process": "discrete(betas=(0.1, x))"}, r"config.model.process.betas=\(0\.1, 'x'\); expected a schedule"),
    ({"model.process": "discrete(betas=cosine(num_steps=0))"}, "In config.model.process.betas=schedules.cosine"),
    (
      {"model.process": "discrete(betas=cosine(num_steps=1.5))"},
      "Got config.model.process.betas.num_steps=1.5; expected an integer",
    ),
    ({"model.process": "None"}, "Got config.model.process=None; expected a process"),
    # This component is correct, so its config builds without an error.
    ({"model.prediction": "V()"}, ""),
    ({"model.prediction": "V(x=1)"}, "'model.prediction.x' as a config key of predictions.V; expected no keys"),
    (
      {"model.prediction": "learned_range(prediction=vp)"},
      "config.model.prediction.prediction='vp'; expected a prediction",
    ),
    ({"objective.weighting": "simple(x=1)"}, "'objective.weighting.x' as a config key of losses.simple"),
    ({"objective.weighting": "min_snr(gamma=-1)"}, "In config.objective.weighting=losses.min_snr: .*gamma"),
    ({"objective.times": "log_normal(std=0)"}, "In config.objective.times=losses.log_normal: .*std"),
    ({"sampling.grid": "karras(rho=0)"}, "In config.sampling.grid=grids.karras: .*rho"),
    ({"sampling.grid": "karras(num_steps=3)"}, "'sampling.grid.num_steps' as a config key of grids.karras"),
    ({"sampling.clip": "clip(low=2)"}, "In config.sampling.clip=guidance.clip: .*low < high"),
    (
      {"guidance.scale": "interval(scale=3, low=5, high=1)"},
      "In config.guidance.scale=guidance.interval: .*low < high",
    ),
    ({"guidance.scale": "interval"}, "config.guidance.scale=guidance.interval without its required argument scale"),
    ({"guidance.scale": "strong"}, "config.guidance.scale='strong'; expected a function of time, one of interval"),
    ({"guidance": "None"}, "Got config.guidance=None; expected a rule of guidance"),
    ({"model.conditions": "classes(number=10)"}, "config.model.conditions=.*; expected components by name, such as"),
    ({"model.conditions.classes": "classes"}, "conditions.classes without its required argument number"),
    (
      {"model.conditions.classes": "classes(number=0)"},
      "In config.model.conditions.classes=conditions.classes: .*number=0",
    ),
    ({"model.conditions.a-b": "level"}, "'a-b' as a name in config.model.conditions"),
    ({"model.network": "UNet(channels=wide)"}, "Got config.model.network.channels='wide'; expected an integer"),
    ({"model.network": "UNet(groups=7)"}, "In config.model.network=networks.UNet: .*groups"),
    ({"data.source": "folder"}, "config.data.source=data.folder without its required argument path"),
    ({"task": "paint"}, "config.task='paint'; expected a task, one of autoencode, classify, denoise"),
    ({"editing.operator": "blur"}, "config.editing.operator=editing.blur without its required argument std"),
    ({"editing.operator": "blur(std=-1)"}, "In config.editing.operator=editing.blur: .*std"),
  ],
)
def test_wrong_arguments_give_one_message(keys, message):
  if not message:
    configs.build(with_keys(keys))
    return
  with pytest.raises(ValueError, match=message):
    configs.build(with_keys(keys))


def test_components_may_be_arguments_of_components():
  sampler = with_keys({"sampler": "with_langevin(sampler=heun(s_churn=40), snr=0.2)"}).at("sampler")
  assert sampler["component"] == "sampling.with_langevin"
  assert (sampler["snr"], sampler["num_steps"]) == (0.2, 1)
  assert sampler["sampler"]["component"] == "sampling.heun"
  assert sampler["sampler"]["s_churn"] == 40.0
  made = configs.build(
    with_keys(
      {
        "model.process": "discrete(betas=zero_terminal_snr(betas=cosine(num_steps=10)))",
        "model.prediction": "V",
        "sampling.num_steps": "5",
      }
    )
  ).model
  betas = schedules.zero_terminal_snr(schedules.cosine(10))
  times = np.arange(1, 11) / 10
  np.testing.assert_array_equal(made.process.alpha(times), processes.discrete(betas).alpha(times))
  weighting = configs.build(with_keys({"objective.weighting": "on_x0(weighting=min_snr(gamma=3))"})).tree.at(
    "objective.weighting"
  )
  assert weighting == {"component": "losses.on_x0", "weighting": {"component": "losses.min_snr", "gamma": 3.0}}


def test_the_grids_of_stable_diffusion_are_reachable_from_the_command_line():
  keys = {"model.process": "discrete(betas=scaled_linear(), interpolation=linear)", "sampling.num_steps": "50"}
  made = configs.build(with_keys(keys | {"sampler": "plms", "sampling.grid": "leading(offset=1, end_step=1)"}))
  np.testing.assert_allclose(made.times[[0, 1, -2, -1]] * 1000, [982, 962, 2, 1])
  assert sampling.nfe(made.sampler, made.model.process, made.times) == 51
  made = configs.build(with_keys(keys | {"sampler": "heun(scaled=true)", "sampling.grid": "linspace(rounded=false)"}))
  np.testing.assert_allclose(made.times[:-1] * 1000, np.linspace(1000, 1, 50))


def test_numbers_and_tables_may_replace_components():
  keys = {
    "model.process.betas": "(0.1, 0.2)",
    "guidance.scale": "3",
    "objective.times": "None",
    "sampler": "ddim",
    "sampling.num_steps": "2",
  }
  tree = with_keys(keys)
  assert tree.at("model.process.betas") == (0.1, 0.2)
  made = configs.build(tree)
  assert made.model.process.num_steps == 2
  assert made.guidance.keywords["scale"] == 3.0
  # Components may replace the numbers again.
  tree = with_keys(
    {"model.process.betas": "cosine(num_steps=5)", "guidance.scale": "interval(scale=3)", "objective.times": "uniform"},
    tree,
  )
  made = configs.build(tree)
  assert made.model.process.num_steps == 5
  assert float(made.guidance.keywords["scale"](jnp.float32(0.5))) == 3.0


def test_none_removes_optional_components():
  made = configs.build(with_keys({"sampling.clip": "None", "sampling.grid": "None", "editing.method": "None"}))
  assert (made.sampling.clip, made.sampling.grid, made.editing.method) == (None, None, None)
  with pytest.raises(ValueError, match="config.sampler=None for a model without a default sampler"):
    configs.build(with_keys({"sampler": "None"}))


def test_flags_set_components_before_their_arguments():
  keys = {
    "sampler.sampler.s_churn": "40",
    "sampler.sampler": "heun(s_churn=3, s_noise=2)",
    "sampler": "with_langevin(sampler=ddim)",
  }
  for order in (list(keys), list(reversed(keys))):
    sampler = with_keys({key: keys[key] for key in order}).at("sampler")
    assert sampler["component"] == "sampling.with_langevin"
    assert (sampler["sampler"]["s_churn"], sampler["sampler"]["s_noise"]) == (40.0, 2.0)


def test_a_condition_is_added_and_removed_by_a_flag():
  assert with_keys({"model.conditions.classes": "None"}).at("model.conditions") == {}
  keys = {"model.conditions.classes.dropout": "0.1", "model.conditions.classes": "classes(number=10)"}
  tree = with_keys(keys | {"model.conditions.size": "vector(size=2)"})
  classes = tree.at("model.conditions.classes")
  assert classes == {"component": "conditions.classes", "number": 10, "dropout": 0.1}
  made = configs.build(tree).model.conditions
  assert set(made) == {"classes", "size"}
  assert (made["classes"].num_values, made["size"].shape.shape) == (11, (2,))
  assert set(with_keys({"model.conditions.size": "None"}, tree).at("model.conditions")) == {"classes"}
  assert tree.role("model.conditions.classes.number") == "model"


def test_conditions_are_sorted(tmp_path):
  """Networks concatenate conditions of one kind in order, so a saved config must keep the order."""
  config = configs.default_config()
  config.model.conditions = {"z": spec("conditions.vector", size=2), "b": spec("conditions.vector", size=3)}
  tree = configs.replace(tree_of(config), "model.conditions.a", "vector(size=4)")
  configs.write(tmp_path, tree)
  for one in (tree, configs.read_run(tmp_path)):
    assert list(one.values["model"]["conditions"]) == ["a", "b", "z"]


def test_flags_are_parsed_with_and_without_equals_signs(tmp_path):
  folder = tmp_path / "run"
  config = tiny_config()
  write_run(config, folder)
  arguments = [
    "--mode=plan",
    RECIPE,
    "--config.sampler",
    "heun(s_churn=40)",
    "--config.sampler.s_noise=1.5",
    "--config.data.hold_out",
    "-1",
  ]
  arguments += [
    "--config.data.flip",
    "--noconfig.evaluation.allow_singular",
    "--config.model.network.multipliers",
    "1,2",
    "-config.seed=3",
  ]
  parts = config_flags.split(arguments)
  assert parts.remaining == ["--mode=plan"]
  tree = configs.read(parts.recipe, parts.keys)
  assert (tree.at("sampler.s_churn"), tree.at("sampler.s_noise"), tree.at("data.hold_out")) == (40.0, 1.5, -1)
  assert (tree.at("data.flip"), tree.at("evaluation.allow_singular"), tree.at("seed")) == (True, False, 3)
  assert tree.at("model.network.multipliers") == (1.0, 2.0)
  # Flags also apply to the config of a run.
  assert configs.read(None, {"sampler": "euler"}, folder).at("sampler.component") == "sampling.euler"
  assert configs.read(None, {"seed": "3"}, tmp_path, default={}).at("seed") == 3
  with pytest.raises(ValueError, match="Got no --config, and .* holds no run"):
    configs.read(None, {}, tmp_path)
  with pytest.raises(ValueError, match="--config without a value"):
    config_flags.split(["--config"])
