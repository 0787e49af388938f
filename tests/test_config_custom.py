"""Test custom components from files and modules, and the copies of their files in run folders."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import config as configs
from ddpm_jax import data, predictions, processes
from ddpm_jax.config import components, custom, spec
from tests.commands import RECIPE, assert_refused, call
from tests.parameters import write_run
from tests.recipes import tiny_config, tree_of
from tests.test_config_components import TREE, with_keys

SOURCE = """
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
  def scorer(self, experiment, folder, mesh, source, held_out): ...
  def check_can_sample(self, what): ...
  def check_can_classify(self, what): ...


def fails(x=0):
  return 1 / x


def wrong():
  return 3


def other_kind():
  return sampling.ddim(processes.vp())


NUMBER = 3
"""
FAILING_LINE = next(number for number, line in enumerate(SOURCE.splitlines(), 1) if "1 / x" in line)


@pytest.fixture
def source_file(tmp_path):
  path = tmp_path / "mine" / "own.py"
  path.parent.mkdir()
  path.write_text(SOURCE)
  return path


def test_every_slot_takes_a_custom_component(source_file):
  keys = {
    "model.process": f"{source_file}:process(beta=9)",
    "model.prediction": f"{source_file}:EPS",
    "model.network": f"{source_file}:Network(features=2)",
    "model.conditions.size": f"{source_file}:condition(size=2)",
    "objective": f"{source_file}:objective(gain=3)",
    "sampler": f"{source_file}:sampler(eta=0.1)",
    "sampling.grid": f"{source_file}:grid(power=3)",
    "sampling.clip": f"{source_file}:clip",
    "sampling.num_steps": "4",
    "guidance": f"{source_file}:guide(strength=2)",
    "data.source": f"{source_file}:source(path=there, other=3)",
    "task": f"{source_file}:Task",
  }
  tree = with_keys(keys | {"model.conditions.size": "None"})
  made = configs.build(tree)
  assert tree.at("model.process.beta") == 9.0
  assert float(made.model.process.log_snr(1.0)) == float(processes.vp(0.1, 9.0).log_snr(1.0))
  assert made.model.prediction is predictions.EPS
  np.testing.assert_allclose(made.times, np.linspace(1, 0, 5) ** 3)
  assert tree.short_name("sampler") == "sampler"
  assert tree.is_custom("sampler")
  assert not TREE.is_custom("sampler")
  assert made.guidance(denoise=lambda x_t, t: x_t)(2, 0) == 4
  fit = data.Fit((8, 8), 1)
  assert made.data.source(fit).train == (fit, "there", {"other": 3})
  # A component with **kwargs takes keys of any name and type.
  assert with_keys({"data.source.other": "(4, x)"}, tree).at("data.source.other") == "(4, x)"
  assert with_keys({"data.source.more": "(4, 5)"}, tree).at("data.source.more") == (4, 5)
  shapes = jax.tree.map(jnp.shape, made.model.init(jax.random.key(0)))
  assert {layer["kernel"] for layer in shapes.values()} == {(3, 2), (2, 3)}
  assert configs.build(with_keys(keys)).model.conditions["size"].shape.shape == (2,)


def test_a_function_is_used_directly_or_called(source_file, tmp_path):
  def weighting_of(text):
    return configs.make(with_keys({"objective.weighting": text}), "objective.weighting")

  assert weighting_of(f"{source_file}:weighting")(0.0) == 1
  assert weighting_of(f"{source_file}:typed_weighting")(0.0) == 1
  assert weighting_of(f"{source_file}:made_weighting")(3.0) == 9
  assert weighting_of(f"{source_file}:made_weighting(power=3)")(3.0) == 27
  for text, expected in (
    (f"{source_file}:BETAS", (0.25, 0.5)),
    (f"{source_file}:betas", (0.1,) * 3),
    (f"{source_file}:betas(num_steps=2)", (0.1,) * 2),
  ):
    made = configs.build(with_keys({"model.process.betas": text, "sampling.num_steps": "2"})).model.process
    times = np.arange(1, len(expected) + 1) / len(expected)
    np.testing.assert_array_equal(made.alpha(times), processes.discrete(np.array(expected)).alpha(times))


def test_a_component_may_come_from_a_module_or_a_package(source_file, monkeypatch):
  monkeypatch.syspath_prepend(str(source_file.parent))
  tree = with_keys({"sampler": "own:sampler(eta=0.25)"})
  assert tree.at("sampler") == {"component": "own:sampler", "sha256": custom._digest(SOURCE.encode()), "eta": 0.25}
  configs.build(tree)
  package = source_file.parent / "my_package"
  package.mkdir()
  (package / "__init__.py").write_text("")
  (package / "helper.py").write_text("from ddpm_jax import sampling\n")
  (package / "rules.py").write_text(
    "from .helper import sampling\ndef sampler(process):\n  return sampling.euler(process)\n"
  )
  configs.build(with_keys({"sampler": "my_package.rules:sampler"}))


def test_a_custom_file_imports_modules_in_its_folder(source_file):
  (source_file.parent / "component_helper.py").write_text("BETA = 3.0\n")
  path = source_file.parent / "uses_helper.py"
  path.write_text(
    "import component_helper\nfrom ddpm_jax import processes\ndef make():\n  return processes.vp(0.1, component_helper.BETA)\n"
  )
  assert configs.build(with_keys({"model.process": f"{path}:make"})).model.process.num_steps is None


BROKEN = {
  "does not exist": (None, "process", "a file that does not exist; expected my_file.py:my_function"),
  "lacks the name": (
    SOURCE,
    "proces",
    "own.py has no 'proces'; expected a name that it defines.*Did you mean 'process'",
  ),
  "lacks any name": (SOURCE, "", "own.py has no ''; expected a name"),
  "is of another kind": (SOURCE, "other_kind", "returns a value of type Sampler; expected it to return a process"),
  "declares another kind": (
    SOURCE + "def other() -> predictions.Prediction: ...\n",
    "other",
    "the function other that makes a Prediction; expected a process",
  ),
  "declares another kind in a string": (
    f"from __future__ import annotations\n{SOURCE}def other() -> predictions.Prediction: ...\n",
    "other",
    "the function other that makes a Prediction; expected a process",
  ),
  "is a value": (SOURCE, "NUMBER", "a value of type int; expected a process"),
  "returns another type": (SOURCE, "wrong", "which returns a value of type int; expected it to return a process"),
  "fails": (SOURCE, "fails", f"own.py:fails: ZeroDivisionError in line {FAILING_LINE}: division by zero"),
  "has other arguments": (
    SOURCE,
    "process(gamma=3)",
    "'model.process.gamma' as a config key of .*own.py:process; expected one of model.process.beta",
  ),
  "has arguments of another type": (
    SOURCE,
    "process(beta=x)",
    "Got config.model.process.beta='x'; expected a finite number",
  ),
  "is not Python": ("def process(:\n", "process", "which fails in line 1: SyntaxError"),
  "is not text": ("\udcff\udcfe", "process", "which fails.*: (SyntaxError|UnicodeDecodeError)"),
  "holds zeros": ("\0\0", "process", "which fails.*: (SyntaxError|ValueError)"),
  "raises": ("x = 1\nraise KeyError('no')\n", "process", "which fails in line 2: KeyError: 'no'"),
  "ends the program": ("import sys\nsys.exit(3)\n", "process", "which fails in line 2: SystemExit: 3"),
  "imports a missing module": ("import no_such_module\n", "process", "which fails in line 1: ModuleNotFoundError"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_component_file_gives_one_message(name, source_file):
  content, component, message = BROKEN[name]
  source_file.unlink()
  if content is not None:
    source_file.write_bytes(content.encode(errors="surrogateescape"))
  with pytest.raises(ValueError, match=message):
    configs.build(with_keys({"model.process": f"{source_file}:{component}"}))


@pytest.mark.parametrize(
  "name",
  ["does not exist", "lacks the name", "is of another kind", "fails", "is not Python", "raises", "ends the program"],
)
def test_the_command_line_shows_one_message_for_a_broken_component_file(name, source_file, tmp_path):
  content, component, message = BROKEN[name]
  source_file.unlink()
  if content is not None:
    source_file.write_text(content)
  code, output = call(RECIPE, f"--config.model.process={source_file}:{component}", f"--workdir={tmp_path / 'work'}")
  assert_refused(code, output, message)
  assert (code, len(output.splitlines())) == (2, 2)  # the first line is the version and mode
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
    ("--config.sampler=heun(3)", "every argument needs a name"),
    (
      "--config.data.source=folder(path=/x)",
      "cannot be parsed .*put quotes around text with special characters, such as a path",
    ),
    ("--config.sampler=heun(", "expected a name and its arguments"),
    ("--config.sampler=heun(s_churn=-3)", "In config.sampler=sampling.heun"),
    ("--config.sampler.eta=x", "Got --config.sampler.eta=x; expected a number"),
    ("--config.sampler.churn=3", "'sampler.churn' as a config key of sampling.ddim; expected one of sampler.eta"),
    ("--config.model.process.betas=(0.1, 2)", "In config.model.process=processes.discrete"),
    (
      "--config.model.conditions.classes=classes",
      "without its required argument number. Set --config.model.conditions.classes.number",
    ),
    ("--config.objective.weighting=heun", "Got config.objective.weighting='heun'; expected a weighting"),
    (
      "--config.data.source=floder(path='/x')",
      "Got config.data.source='floder'; expected a source of data.*Did you mean 'folder'",
    ),
    ("--config.task=paint", "Got config.task='paint'; expected a task"),
    ("--config.model=read", "without its required argument path. Set --config.model.path"),
  ],
)
def test_wrong_components_on_the_command_line_give_one_message(flag, message, tmp_path):
  code, output = call(RECIPE, flag, f"--workdir={tmp_path / 'work'}")
  assert_refused(code, output, message)
  assert (code, len(output.splitlines())) == (2, 2)  # the first line is the version and mode
  assert not (tmp_path / "work").exists()


@pytest.fixture
def run_folder(source_file, tmp_path):
  """Write the folder of a run with a custom component."""
  config = tiny_config()
  config.objective.weighting = spec(f"{source_file}:made_weighting", power=3.0)
  write_run(config, tmp_path / "run")
  return tmp_path / "run"


def clear_cache():
  """Clear the cache of loaded files, as in a new process."""
  custom._LOADED.clear()


def test_a_run_folder_has_a_copy_of_a_component_file(source_file, run_folder):
  (copy,) = (run_folder / "components").rglob("*.py")
  assert (copy.name, copy.read_text()) == ("own.py", SOURCE)
  shutil.rmtree(source_file.parent)
  clear_cache()
  tree = configs.read_run(run_folder)
  assert tree.at("objective.weighting.power") == 3.0
  configs.build(tree)
  # Another run with this config also gets a copy.
  configs.write(run_folder.parent / "other", tree)
  assert len(list((run_folder.parent / "other" / "components").rglob("own.py"))) == 1


def test_a_run_resumes_with_its_copy_of_a_changed_file(source_file, run_folder):
  before = configs.read_run(run_folder)
  source_file.write_text(SOURCE.replace("log_snr**power", "power + 0 * log_snr"))
  clear_cache()
  tree = configs.read_run(run_folder)
  assert tree.at("objective.weighting") == before.at("objective.weighting")
  slot = tree.parameters["objective.weighting"].slot
  assert components.find(tree.at("objective.weighting"), slot, "", run_folder).value(3.0)(3.0) == 27
  # A recipe uses the changed file, so its config differs.
  config = tiny_config()
  config.objective.weighting = spec(f"{source_file}:made_weighting", power=3.0)
  with pytest.raises(
    ValueError, match="another config:\n  objective.weighting.sha256: [0-9a-f]{64} in the folder, [0-9a-f]{64} now\nUse"
  ):
    configs.check_same_run(run_folder, configs.to_tree(config, run_folder))


def test_a_component_file_may_move(source_file, run_folder, tmp_path):
  moved = tmp_path / "elsewhere" / "own.py"
  moved.parent.mkdir()
  shutil.move(source_file, moved)
  config = tiny_config()
  config.objective.weighting = spec(f"{moved}:made_weighting", power=3.0)
  configs.check_same_run(run_folder, configs.to_tree(config, run_folder))


def test_a_changed_file_without_a_copy_is_refused(source_file, run_folder):
  shutil.rmtree(run_folder / "components")
  source_file.write_text(SOURCE + "\n")
  clear_cache()
  with pytest.raises(
    ValueError,
    match=r"config\.json.*own.py has changed since the run began; expected the same content. Restore the file, or start a new run",
  ):
    configs.read_run(run_folder)
  source_file.unlink()
  with pytest.raises(ValueError, match=r"config\.json.*a file that does not exist"):
    configs.read_run(run_folder)


def test_a_damaged_copy_is_not_used(source_file, run_folder):
  (copy,) = (run_folder / "components").rglob("*.py")
  copy.write_text(SOURCE.replace("log_snr**power", "0 * log_snr"))
  source_file.unlink()
  clear_cache()
  with pytest.raises(ValueError, match="a file that does not exist"):
    configs.read_run(run_folder)


def test_a_loaded_file_may_change(source_file, tmp_path):
  tree = with_keys({"model.process": f"{source_file}:process"})
  source_file.write_text("1 / 0\n")
  configs.build(tree).replace(seed=3)
  configs.write(tmp_path, tree)
  (copy,) = (tmp_path / "components").rglob("*.py")
  assert copy.read_text() == SOURCE


def test_a_file_that_changes_within_a_second_is_read_again(source_file):
  first = with_keys({"model.process": f"{source_file}:process"})
  source_file.write_text(SOURCE.replace("beta: float = 7.0", "beta: float = 8.0"))
  assert with_keys({"model.process": f"{source_file}:process"}).at("model.process.beta") == 8.0
  assert first.at("model.process.beta") == 7.0
  assert not (source_file.parent / "__pycache__").exists()


def test_sampling_works_after_a_component_file_is_deleted(source_file, run_folder):
  shutil.rmtree(source_file.parent)
  code, output = call("--mode=sample", f"--workdir={run_folder}", "--num_samples=2", "--config.sampling.num_steps=1")
  assert code == 0, output


def test_a_value_that_json_cannot_store_is_refused(source_file):
  for value in (lambda: 3, object(), {1: 2}, [object()], 1j):
    config = tiny_config()
    config.data.source = spec(f"{source_file}:source", other=value)
    with pytest.raises(ValueError, match=r"Got config\.data\.source\.other=.*; expected a value that JSON can store"):
      tree_of(config)


def test_dict_arguments_have_the_role_of_their_component(source_file, tmp_path):
  config = tiny_config()
  config.data.source = spec(f"{source_file}:source", other={"a": {"b": 1}})
  tree = tree_of(config)
  configs.write(tmp_path, tree)
  assert json.loads((tmp_path / "config.json").read_text())["data"]["source"]["other"] == {"a": {"b": 1}}
  assert tree.with_roles("run")["data.source.other.a.b"] == 1
