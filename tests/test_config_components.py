"""Components of a config: read, found, made, and of a user's own files; each argument of each is a key that a flag reaches."""

import functools
import inspect
import json
import math
import shutil
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import config as configs
from ddpm_jax import data, models, predictions, processes, schedules, words
from ddpm_jax.config import components, experiment, flags, foreign, slots, spec, values
from tests.commands import RECIPE, assert_refused, call
from tests.parameters import write_run
from tests.recipes import experiment_of, tiny_config, tree_of

TREE = configs.expand({})


def with_keys(keys, tree=TREE):
  """The tree after flags."""
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
def test_texts_are_components(text, node):
  assert components.parse(text, "key") == node


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "expected a name and its arguments"),
    ("(x=1)", "expected a name and its arguments"),
    ("heun(", "expected a name and its arguments"),
    ("heun(s_churn=40", "expected a name and its arguments"),
    ("heun(40)", r"which cannot be read \(arguments are given by name\)"),
    ("heun(*a)", "arguments are given by name"),
    ("heun(**a)", "arguments are given by name"),
    ("f(x=g(1))", "arguments are given by name"),
    ("heun()(s_churn=1)", "more than one pair of brackets"),
    ("heun(x=1) + (2)", "more than one pair of brackets"),
    ("heun(s_churn=1, s_churn=2)", "s_churn is given twice"),
    ("heun(component='ddim')", "component is no argument"),
    ("heun(s_churn=1 2)", "cannot be read"),
    ("heun(s_churn=)", "cannot be read"),
    ("heun(s_churn=1 + x)", r"1 \+ x is neither a value nor a component"),
    ("heun(s_churn=[x for x in y])", "is neither a value nor a component"),
    ("f(x=" + "(" * 300 + ")" * 300 + ")", "cannot be read"),
    ("f(x=\0)", "cannot be read"),
  ],
)
def test_what_cannot_be_read_is_one_message(text, message):
  with pytest.raises(ValueError, match=f"Got key=.*{message}.*such as heun"):
    components.parse(text, "key")


# Where each is looked for, what is written, and what the message says.
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
  ("model.network", "networks.trainable", "the function trainable; expected a network"),
  ("model.codec", "conditions.classes", "makes a Condition; expected a codec"),
  ("model.conditions.classes", "codecs.pixels", "makes a Codec; expected a condition"),
  ("objective", "losses.min_snr", "the function min_snr; expected an objective"),
  ("objective", "losses.denoising_loss", "the function denoising_loss; expected an objective"),
  ("objective.weighting", "losses.mean_bits", "the function mean_bits; expected a weighting"),
  ("objective.weighting", "losses.uniform", "the function uniform; expected a weighting"),
  ("objective.times", "losses.min_snr", "the function min_snr; expected a distribution of times"),
  ("objective.times", "losses.importance_times", "the function importance_times; expected a distribution of times"),
  ("sampling.grid", "grids.last_time", "the function last_time; expected a grid of times"),
  ("sampling.clip", "guidance.classifier_free", "the function classifier_free; expected a rule that clips estimates"),
  ("guidance", "guidance.clip", "the function clip; expected a rule of guidance"),
  ("guidance", "guidance.interval", "the function interval; expected a rule of guidance"),
  ("guidance.scale", "guidance.clip", "the function clip; expected a function of time"),
  ("editing.method", "editing.invert", "the function invert; expected a method of editing"),
  ("editing.operator", "editing.repaint", "makes a Sampler; expected an operator"),
  ("data.source", "data.settings_of", "the function settings_of; expected a source of data"),
  ("task", "tasks.Classify", "the class Classify; expected a task, one of classify, denoise"),
]


@pytest.mark.parametrize(("key", "name", "message"), UNKNOWN)
def test_what_does_not_fit_a_place_is_refused(key, name, message):
  for value in (name, {"component": name}):
    with pytest.raises(ValueError, match=message):
      configs.changed(TREE, key, value)


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
      "'sampler.order' as a config key of sampling.dpmpp_2m; expected none: it has no arguments",
    ),
    (
      {"sampler": "with_langevin"},
      "config.sampler=sampling.with_langevin without sampler; expected it. Set --config.sampler.sampler=<value>",
    ),
    ({"sampler": "with_langevin(sampler=heun(s_churn=-1))"}, "In config.sampler.sampler=sampling.heun: .*churn"),
    ({"sampler": "with_langevin(sampler=vp())"}, "config.sampler.sampler='vp'; expected a sampler"),
    ({"model.process": "discrete"}, "without betas; expected it. Set --config.model.process.betas=<value>"),
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
    ({"model.prediction": "V()"}, ""),
    ({"model.prediction": "V(x=1)"}, "'model.prediction.x' as a config key of predictions.V; expected none"),
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
    ({"guidance.scale": "interval"}, "config.guidance.scale=guidance.interval without scale; expected it"),
    ({"guidance.scale": "strong"}, "config.guidance.scale='strong'; expected a function of time, one of interval"),
    ({"guidance": "None"}, "Got config.guidance=None; expected a rule of guidance"),
    ({"model.conditions": "classes(number=10)"}, "config.model.conditions=.*; expected components by name, such as"),
    ({"model.conditions.classes": "classes"}, "conditions.classes without number"),
    (
      {"model.conditions.classes": "classes(number=0)"},
      "In config.model.conditions.classes=conditions.classes: .*number=0",
    ),
    ({"model.conditions.a-b": "level"}, "'a-b' as a name in config.model.conditions"),
    ({"model.network": "UNet(channels=wide)"}, "Got config.model.network.channels='wide'; expected an integer"),
    ({"model.network": "UNet(groups=7)"}, "In config.model.network=networks.UNet: .*groups"),
    ({"data.source": "folder"}, "config.data.source=data.folder without path; expected it"),
    ({"task": "paint"}, "config.task='paint'; expected a task, one of classify, denoise"),
    ({"editing.operator": "blur"}, "config.editing.operator=editing.blur without std"),
    ({"editing.operator": "blur(std=-1)"}, "In config.editing.operator=editing.blur: .*std"),
  ],
)
def test_wrong_arguments_are_one_message(keys, message):
  if not message:
    configs.build(with_keys(keys))
    return
  with pytest.raises(ValueError, match=message):
    configs.build(with_keys(keys))


def test_components_nest():
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
  wanted = schedules.zero_terminal_snr(schedules.cosine(10))
  times = np.arange(1, 11) / 10
  np.testing.assert_array_equal(made.process.alpha(times), processes.discrete(wanted).alpha(times))
  weighting = configs.build(with_keys({"objective.weighting": "on_x0(weighting=min_snr(gamma=3))"})).tree.at(
    "objective.weighting"
  )
  assert weighting == {"component": "losses.on_x0", "weighting": {"component": "losses.min_snr", "gamma": 3.0}}


def test_numbers_and_tables_stand_in_place_of_components():
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
  # And components in their place again.
  again = with_keys(
    {"model.process.betas": "cosine(num_steps=5)", "guidance.scale": "interval(scale=3)", "objective.times": "uniform"},
    tree,
  )
  made = configs.build(again)
  assert made.model.process.num_steps == 5
  assert float(made.guidance.keywords["scale"](jnp.float32(0.5))) == 3.0


def test_none_leaves_out_what_may_be_left_out():
  made = configs.build(with_keys({"sampling.clip": "None", "sampling.grid": "None", "editing.method": "None"}))
  assert (made.sampling.clip, made.sampling.grid, made.editing.method) == (None, None, None)
  with pytest.raises(ValueError, match="config.sampler=None for a model that has no sampler of its own"):
    configs.build(with_keys({"sampler": "None"}))


def test_flags_replace_from_the_outside_in():
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
  assert (made["classes"].number, made["size"].shape.shape) == (11, (2,))
  assert set(with_keys({"model.conditions.size": "None"}, tree).at("model.conditions")) == {"classes"}
  assert tree.roles["model.conditions.classes.number"] == "model"


def test_the_order_of_conditions_does_not_depend_on_who_wrote_them(tmp_path):
  """Networks join those of one kind in their order, which a run's file would change."""
  config = configs.default_config()
  config.model.conditions = {"z": spec("conditions.vector", size=2), "b": spec("conditions.vector", size=3)}
  tree = configs.changed(tree_of(config), "model.conditions.a", "vector(size=4)")
  configs.write(tmp_path, tree)
  for one in (tree, configs.of_run(tmp_path)):
    assert list(one.values["model"]["conditions"]) == ["a", "b", "z"]


def test_flags_with_and_without_equals_signs(tmp_path):
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
  found = words.split(arguments)
  assert found.rest == ["--mode=plan"]
  tree = configs.read(found.recipe, found.keys)
  assert (tree.at("sampler.s_churn"), tree.at("sampler.s_noise"), tree.at("data.hold_out")) == (40.0, 1.5, -1)
  assert (tree.at("data.flip"), tree.at("evaluation.allow_singular"), tree.at("seed")) == (True, False, 3)
  assert tree.at("model.network.multipliers") == (1.0, 2.0)
  # The same of a run, without a recipe.
  assert configs.read(None, {"sampler": "euler"}, folder).at("sampler.component") == "sampling.euler"
  assert configs.read(None, {}, tmp_path) is None
  with pytest.raises(ValueError, match="--config without a value"):
    words.split(["--config"])


def of_type(annotation, number):
  """Return a value of a type, another one for each number: what is only looked at needs no sound ones."""
  kinds = values.members(annotation)
  if str in kinds:
    return f"word{number}"
  if int in kinds or kinds[0] in (components.MISSING, typing.Any):
    return 7 + number
  if float in kinds:
    return 0.25 + number
  several = next(kind for kind in kinds if typing.get_origin(kind) in (tuple, Sequence))
  inner = [kind for kind in typing.get_args(several) if kind is not Ellipsis]
  return tuple(of_type(kind, number + place) for place, kind in enumerate(inner))


def flag_of(parameter, number):
  """Return the text of a flag for an argument, and the value that it stands for; None for a component."""
  if parameter.slot is not None:
    simple = [name for name in slots.names(parameter.slot) if needs_nothing(name, parameter.slot)]
    if simple:
      return simple[0], None
  if bool in values.members(parameter.annotation):
    return str(not parameter.default), not parameter.default
  # In place of some components numbers may stand.
  value = of_type(parameter.annotation, number)
  return (value if isinstance(value, str) else repr(value)), value


def needs_nothing(name, slot):
  declared = components.parameters(components.find(name, slot, "")[1], slot)
  return all(parameter.default is not components.MISSING for parameter in declared or ())


def everything():
  """Each component of the package in each place that it may have: none is listed here."""
  for path, place in TREE.places.items():
    key = f"{path}.some" if place.many else path
    for name in slots.names(place.slot) if place.slot else ():
      yield pytest.param(key, place.slot, name, id=f"{key}-{name}")


class Reached(BaseException):
  """Raised by a component that is looked at, with the arguments that it gets."""


def arguments_of(whole, component, tree, key, monkeypatch):
  """Return the arguments that a component gets when its config is built."""

  @functools.wraps(component)
  def raises(**arguments):
    raise Reached(arguments)

  home, _, name = whole.rpartition(".")
  if inspect.isclass(component):
    monkeypatch.setattr(models.networks, "of", lambda component, arguments, conditions: raises(**arguments))
  else:
    monkeypatch.setattr(slots.module(home), name, raises)
  try:
    made = configs.build(tree)
    # What is made for each batch has its arguments from then on.
    if key in ("guidance", "editing.method"):
      return (made.guidance if key == "guidance" else made.editing.method).keywords
    configs.source_of(made)(data.Fit((8, 8), 1))
  except Reached as reached:
    return reached.args[0]
  raise AssertionError(f"{whole} was not made")


@pytest.mark.parametrize(("key", "slot", "name"), everything())
def test_every_argument_is_a_key_whose_value_reaches_its_component(key, slot, name, monkeypatch):
  whole, component, _ = components.find(name, slot, key)
  declared = components.parameters(component, slot)
  if declared is None:
    # A value, or a function that is used as it is.
    assert not callable(component) or slots.is_itself(component, slot)
    assert with_keys({key: name}).at(key) == {"component": whole}
    return
  signature = slots.parameters_of(component)
  offered = {name for name, parameter in signature.items() if slots.is_offered(parameter, slot.offers)}
  assert offered | {parameter.name for parameter in declared} == set(signature)
  texts = {parameter.name: flag_of(parameter, number) for number, parameter in enumerate(declared)}
  tree = with_keys({key: name} | {f"{key}.{argument}": text for argument, (text, _) in texts.items()})
  node = tree.at(key)
  assert set(node) == {"component", *texts}
  together = f"{name}({', '.join(f'{argument}={text}' for argument, (text, _) in texts.items())})"
  assert with_keys({key: together}).at(key) == node
  found = arguments_of(whole, component, tree, key, monkeypatch)
  for parameter in declared:
    text, value = texts[parameter.name]
    if value is None:
      assert node[parameter.name]["component"].endswith(f".{text}")
      assert slots.is_of(found[parameter.name], parameter.slot)
    else:
      assert node[parameter.name] == found[parameter.name] == value != parameter.default
      assert type(found[parameter.name]) is type(value)
  if key not in ("guidance", "editing.method"):
    required = {name for name, parameter in signature.items() if parameter.default is components.MISSING}
    assert required <= set(found)


def test_every_public_noun_has_a_place():
  """Functions of the package that make a process, a sampler and so on, and values that are one, can be named in a config."""
  nouns = [kind for place in TREE.places.values() if place.slot for kind in place.slot.kinds if inspect.isclass(kind)]
  placed = {id(components.find(one.values[2], one.values[1], "")[1]) for one in everything()}
  missing = []
  for home in slots.MODULES:
    for name, component in slots.exports(home).items():
      result = inspect.signature(component).return_annotation if inspect.isroutine(component) else type(component)
      if result in nouns and result is not np.ndarray and id(component) not in placed:
        missing.append(f"{home}.{name}")
  assert not missing


# Components of a user's own.

OWN = """
import dataclasses
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ddpm_jax import data, guidance, losses, models, predictions, processes, sampling
from ddpm_jax.models import conditions


def weighting(log_snr):
  return jnp.exp(-log_snr)


def typed_weighting(log_snr: "jax.Array") -> "jax.Array":
  return jnp.exp(-log_snr)


def made_weighting(power: float = 2.0):
  return lambda log_snr: log_snr**power


def process(beta: float = 7.0) -> processes.Process:
  return processes.vp(0.1, beta)


BETAS = (0.25, 0.5)


def betas(num_steps=3):
  return np.full(num_steps, 0.1)


EPS = predictions.EPS


def sampler(process, eta=0.5):
  return sampling.ddim(process, eta)


def grid(process, num_steps, power=2.0):
  return np.linspace(1, 0, num_steps + 1) ** power


def clip(denoise, bound=0.5):
  return guidance.clip(denoise, -bound, bound)


def guide(denoise, strength=3.0):
  return lambda x_t, t: strength * denoise(x_t, t)


def condition(name, size=3):
  return conditions.vector(name, size)


class Network(nn.Module):
  out_channels: int
  features: int = 4

  @nn.compact
  def __call__(self, x, time):
    return nn.Dense(self.out_channels)(nn.Dense(self.features)(x))


def objective(apply, process, prediction, time_input, gain=2.0):
  return losses.denoising(apply, process, prediction, time_input=time_input)


def source(fit, path="here", **others):
  return data.Splits((fit, path, others))


class Task:
  def check(self, experiment, mesh): ...
  def classes(self, experiment): ...
  def preview(self, experiment, mesh, source): ...
  def judge(self, experiment, folder, mesh, source, held_out): ...
  def check_draws(self, what): ...
  def check_classifies(self, what): ...


def fails(x=0):
  return 1 / x


def wrong():
  return 3


def other_kind():
  return sampling.ddim(processes.vp())


NUMBER = 3
"""
OWN_LINE = next(number for number, line in enumerate(OWN.splitlines(), 1) if "1 / x" in line)


@pytest.fixture
def own(tmp_path):
  path = tmp_path / "mine" / "own.py"
  path.parent.mkdir()
  path.write_text(OWN)
  return path


def test_every_place_takes_a_user_s_own(own):
  keys = {
    "model.process": f"{own}:process(beta=9)",
    "model.prediction": f"{own}:EPS",
    "model.network": f"{own}:Network(features=2)",
    "model.conditions.size": f"{own}:condition(size=2)",
    "objective": f"{own}:objective(gain=3)",
    "sampler": f"{own}:sampler(eta=0.1)",
    "sampling.grid": f"{own}:grid(power=3)",
    "sampling.clip": f"{own}:clip",
    "sampling.num_steps": "4",
    "guidance": f"{own}:guide(strength=2)",
    "data.source": f"{own}:source(path=there, other=3)",
    "task": f"{own}:Task",
  }
  tree = with_keys(keys | {"model.conditions.size": "None"})
  made = configs.build(tree)
  assert tree.at("model.process.beta") == 9.0
  assert float(made.model.process.log_snr(1.0)) == float(processes.vp(0.1, 9.0).log_snr(1.0))
  assert made.model.prediction is predictions.EPS
  np.testing.assert_allclose(made.times, np.linspace(1, 0, 5) ** 3)
  assert configs.short_name(tree, "sampler") == "sampler"
  assert configs.is_own(tree, "sampler")
  assert not configs.is_own(TREE, "sampler")
  assert made.guidance(denoise=lambda x_t, t: x_t)(2, 0) == 4
  fit = data.Fit((8, 8), 1)
  assert configs.source_of(made)(fit).train == (fit, "there", {"other": 3})
  # An argument by a name that a component does not declare is a key too, of any type.
  assert with_keys({"data.source.other": "(4, x)"}, tree).at("data.source.other") == "(4, x)"
  assert with_keys({"data.source.more": "(4, 5)"}, tree).at("data.source.more") == (4, 5)
  shapes = jax.tree.map(jnp.shape, made.model.init(jax.random.key(0)))
  assert {layer["kernel"] for layer in shapes.values()} == {(3, 2), (2, 3)}
  assert configs.build(with_keys(keys)).model.conditions["size"].shape.shape == (2,)


def test_a_function_is_taken_as_it_is_or_called_by_what_it_needs(own, tmp_path):
  def weighting_of(text):
    slot = TREE.places["objective.weighting"].slot
    tree = with_keys({"objective.weighting": text})
    return experiment._Maker(None).component(tree.at("objective.weighting"), "objective.weighting", {}, slot)

  assert weighting_of(f"{own}:weighting")(0.0) == 1
  assert weighting_of(f"{own}:typed_weighting")(0.0) == 1
  assert weighting_of(f"{own}:made_weighting")(3.0) == 9
  assert weighting_of(f"{own}:made_weighting(power=3)")(3.0) == 27
  for text, wanted in (
    (f"{own}:BETAS", (0.25, 0.5)),
    (f"{own}:betas", (0.1,) * 3),
    (f"{own}:betas(num_steps=2)", (0.1,) * 2),
  ):
    made = configs.build(with_keys({"model.process.betas": text, "sampling.num_steps": "2"})).model.process
    times = np.arange(1, len(wanted) + 1) / len(wanted)
    np.testing.assert_array_equal(made.alpha(times), processes.discrete(np.array(wanted)).alpha(times))


def test_a_user_s_own_module(own, monkeypatch):
  monkeypatch.syspath_prepend(str(own.parent))
  tree = with_keys({"sampler": "own:sampler(eta=0.25)"})
  assert tree.at("sampler") == {"component": "own:sampler", "sha256": foreign._digest(OWN.encode()), "eta": 0.25}
  configs.build(tree)
  package = own.parent / "my_package"
  package.mkdir()
  (package / "__init__.py").write_text("")
  (package / "helper.py").write_text("from ddpm_jax import sampling\n")
  (package / "rules.py").write_text(
    "from .helper import sampling\ndef sampler(process):\n  return sampling.euler(process)\n"
  )
  configs.build(with_keys({"sampler": "my_package.rules:sampler"}))


def test_a_user_s_own_file_imports_what_lies_beside_it(own):
  (own.parent / "component_helper.py").write_text("BETA = 3.0\n")
  path = own.parent / "beside.py"
  path.write_text(
    "import component_helper\nfrom ddpm_jax import processes\ndef make():\n  return processes.vp(0.1, component_helper.BETA)\n"
  )
  assert configs.build(with_keys({"model.process": f"{path}:make"})).model.process.num_steps is None


BROKEN = {
  "is not there": (None, "process", "a file that does not exist; expected my_file.py:my_function"),
  "lacks the name": (OWN, "proces", "own.py has no 'proces'; expected a name that it defines.*Did you mean 'process'"),
  "lacks any name": (OWN, "", "own.py has no ''; expected a name"),
  "is of another kind": (OWN, "other_kind", "makes a Sampler; expected it to make a process"),
  "says another kind": (
    OWN + "def other() -> predictions.Prediction: ...\n",
    "other",
    "the function other that makes a Prediction; expected a process",
  ),
  "says another kind in text": (
    f"from __future__ import annotations\n{OWN}def other() -> predictions.Prediction: ...\n",
    "other",
    "the function other that makes a Prediction; expected a process",
  ),
  "is a value": (OWN, "NUMBER", "a value of type int; expected a process"),
  "makes something else": (OWN, "wrong", "which makes a int; expected it to make a process"),
  "fails": (OWN, "fails", f"own.py:fails: ZeroDivisionError in line {OWN_LINE}: division by zero"),
  "has other arguments": (
    OWN,
    "process(gamma=3)",
    "'model.process.gamma' as a config key of .*own.py:process; expected one of model.process.beta",
  ),
  "has arguments of another type": (
    OWN,
    "process(beta=x)",
    "Got config.model.process.beta='x'; expected a finite number",
  ),
  "is no Python": ("def process(:\n", "process", "which fails in line 1: SyntaxError"),
  "is not text": ("\udcff\udcfe", "process", "which fails.*: (SyntaxError|UnicodeDecodeError)"),
  "holds zeros": ("\0\0", "process", "which fails.*: (SyntaxError|ValueError)"),
  "raises": ("x = 1\nraise KeyError('no')\n", "process", "which fails in line 2: KeyError: 'no'"),
  "ends the program": ("import sys\nsys.exit(3)\n", "process", "which fails in line 2: SystemExit: 3"),
  "imports what is not there": ("import no_such_module\n", "process", "which fails in line 1: ModuleNotFoundError"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_component_file_is_one_message(name, own):
  content, rest, message = BROKEN[name]
  own.unlink()
  if content is not None:
    own.write_bytes(content.encode(errors="surrogateescape"))
  with pytest.raises(ValueError, match=message):
    configs.build(with_keys({"model.process": f"{own}:{rest}"}))


@pytest.mark.parametrize(
  "name",
  ["is not there", "lacks the name", "is of another kind", "fails", "is no Python", "raises", "ends the program"],
)
def test_the_command_line_shows_one_message_of_a_component_file(name, own, tmp_path):
  content, rest, message = BROKEN[name]
  own.unlink()
  if content is not None:
    own.write_text(content)
  code, output = call(RECIPE, f"--config.model.process={own}:{rest}", f"--workdir={tmp_path / 'work'}")
  assert_refused(code, output, message)
  assert (code, len(output.splitlines())) == (2, 2)  # the first says what is run
  assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--config.sampler=hein", "Got config.sampler='hein'; expected a sampler.*Did you mean 'heun'"),
    ("--config.sampler=vp", "Got config.sampler='vp'; expected a sampler"),
    ("--config.sampler=processes.vp", "the function vp that makes a Process; expected a sampler"),
    (
      "--config.sampler=heun(s_chrn=3)",
      "'sampler.s_chrn' as a config key of sampling.heun.*Did you mean 'sampler.s_churn'",
    ),
    ("--config.sampler=heun(s_churn=x)", "Got config.sampler.s_churn='x'; expected a finite number"),
    ("--config.sampler=heun(3)", "arguments are given by name"),
    ("--config.data.source=folder(path=/x)", "cannot be read .*put quotes around words with signs, such as paths"),
    ("--config.sampler=heun(", "expected a name and its arguments"),
    ("--config.sampler=heun(s_churn=-3)", "In config.sampler=sampling.heun"),
    ("--config.sampler.eta=x", "Got --config.sampler.eta=x; expected a number"),
    ("--config.sampler.churn=3", "'sampler.churn' as a config key of sampling.ddim; expected one of sampler.eta"),
    ("--config.model.process.betas=(0.1, 2)", "In config.model.process=processes.discrete"),
    (
      "--config.model.conditions.classes=classes",
      "without number; expected it. Set --config.model.conditions.classes.number",
    ),
    ("--config.objective.weighting=heun", "Got config.objective.weighting='heun'; expected a weighting"),
    (
      "--config.data.source=floder(path='/x')",
      "Got config.data.source='floder'; expected a source of data.*Did you mean 'folder'",
    ),
    ("--config.task=paint", "Got config.task='paint'; expected a task"),
    ("--config.model=read", "without path; expected it. Set --config.model.path"),
  ],
)
def test_wrong_components_on_the_command_line_are_one_message(flag, message, tmp_path):
  code, output = call(RECIPE, flag, f"--workdir={tmp_path / 'work'}")
  assert_refused(code, output, message)
  assert (code, len(output.splitlines())) == (2, 2)  # the first says what is run
  assert not (tmp_path / "work").exists()


@pytest.fixture
def run_of_own(own, tmp_path):
  """The folder of a run with a component of the user's own."""
  config = tiny_config()
  config.objective.weighting = spec(f"{own}:made_weighting", power=3.0)
  write_run(config, tmp_path / "run")
  return tmp_path / "run"


def forget():
  """Forget what was read, as a new process does."""
  foreign._LOADED.clear()


def test_a_run_keeps_a_copy_of_a_component_file(own, run_of_own):
  (copy,) = (run_of_own / "components").rglob("*.py")
  assert (copy.name, copy.read_text()) == ("own.py", OWN)
  shutil.rmtree(own.parent)
  forget()
  tree = configs.of_run(run_of_own)
  assert tree.at("objective.weighting.power") == 3.0
  configs.build(tree)
  # Another run that goes on from this one's config keeps it too.
  configs.write(run_of_own.parent / "other", tree)
  assert len(list((run_of_own.parent / "other" / "components").rglob("own.py"))) == 1


def test_a_run_goes_on_with_what_a_component_file_held(own, run_of_own):
  before = configs.of_run(run_of_own)
  own.write_text(OWN.replace("log_snr**power", "power + 0 * log_snr"))
  forget()
  tree = configs.of_run(run_of_own)
  assert tree.at("objective.weighting") == before.at("objective.weighting")
  slot = tree.places["objective.weighting"].slot
  assert (
    components.find(
      tree.at("objective.weighting.component"), slot, "", tree.at("objective.weighting.sha256"), run_of_own
    )[1](3.0)(3.0)
    == 27
  )
  # A recipe names what the file holds now, which is another run.
  config = tiny_config()
  config.objective.weighting = spec(f"{own}:made_weighting", power=3.0)
  with pytest.raises(
    ValueError, match="another config:\n  objective.weighting.sha256: [0-9a-f]{64} in the folder, [0-9a-f]{64} now\nUse"
  ):
    configs.check_same_run(run_of_own, configs.of_config(config, run_of_own))


def test_a_component_file_that_moved_is_the_same(own, run_of_own, tmp_path):
  moved = tmp_path / "elsewhere" / "own.py"
  moved.parent.mkdir()
  shutil.move(own, moved)
  config = tiny_config()
  config.objective.weighting = spec(f"{moved}:made_weighting", power=3.0)
  configs.check_same_run(run_of_own, configs.of_config(config, run_of_own))


def test_a_changed_file_without_a_copy_is_refused(own, run_of_own):
  shutil.rmtree(run_of_own / "components")
  own.write_text(OWN + "\n")
  forget()
  with pytest.raises(
    ValueError,
    match=r"config\.json.*own.py has changed since the run began with it; restore the file, or start a new run",
  ):
    configs.of_run(run_of_own)
  own.unlink()
  with pytest.raises(ValueError, match=r"config\.json.*a file that does not exist"):
    configs.of_run(run_of_own)


def test_a_damaged_copy_is_not_taken_for_the_file(own, run_of_own):
  (copy,) = (run_of_own / "components").rglob("*.py")
  copy.write_text(OWN.replace("log_snr**power", "0 * log_snr"))
  own.unlink()
  forget()
  with pytest.raises(ValueError, match="a file that does not exist"):
    configs.of_run(run_of_own)


def test_what_a_process_has_read_stays_while_its_file_changes(own, tmp_path):
  tree = with_keys({"model.process": f"{own}:process"})
  own.write_text("1 / 0\n")
  configs.build(tree).changed(seed=3)
  configs.write(tmp_path, tree)
  (copy,) = (tmp_path / "components").rglob("*.py")
  assert copy.read_text() == OWN


def test_a_file_that_changes_within_a_second_is_read_anew(own):
  first = with_keys({"model.process": f"{own}:process"})
  own.write_text(OWN.replace("beta: float = 7.0", "beta: float = 8.0"))
  assert with_keys({"model.process": f"{own}:process"}).at("model.process.beta") == 8.0
  assert first.at("model.process.beta") == 7.0
  assert not (own.parent / "__pycache__").exists()


def test_samples_are_drawn_after_a_component_file_is_gone(own, run_of_own):
  shutil.rmtree(own.parent)
  code, output = call("--mode=sample", f"--workdir={run_of_own}", "--num_samples=2", "--config.sampling.num_steps=1")
  assert code == 0, output


def test_a_value_that_no_file_holds_is_refused(own):
  for value in (lambda: 3, object(), {1: 2}, [object()], 1j):
    config = tiny_config()
    config.data.source = spec(f"{own}:source", other=value)
    with pytest.raises(ValueError, match=r"Got config\.data\.source\.other=.*; expected a value that a file can hold"):
      tree_of(config)


def test_sections_of_a_component_of_any_arguments_are_for_what_it_is_for(own, tmp_path):
  config = tiny_config()
  config.data.source = spec(f"{own}:source", other={"a": {"b": 1}})
  tree = tree_of(config)
  configs.write(tmp_path, tree)
  assert json.loads((tmp_path / "config.json").read_text())["data"]["source"]["other"] == {"a": {"b": 1}}
  assert experiment_of(config).values("run")["data.source.other.a.b"] == 1
