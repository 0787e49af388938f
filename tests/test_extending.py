"""Run every file, example and command of docs/extending.md, and test the behavior of each component."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddpm_jax
from ddpm_jax import commands, config, data, losses, predictions, processes, sampling
from ddpm_jax.commands import command_line, jax_setup
from ddpm_jax.config import custom, slots
from ddpm_jax.runs import scoring
from tests.conftest import ROOT
from tests.oracles import gaussian, gaussian_flow
from tests.pages import commands_in, saved_files
from tests.parameters import one_device, random_like
from tests.recipes import tiny_config, tree_of

pytestmark = pytest.mark.usefixtures("dense_module")

TEXT = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))
# Config values that make the page's commands fast.
TRAINING = {"training.steps": 2, "training.batch_size": 4, "training.checkpoint_every": 2, "training.sample_every": 2}
TRAINING |= {"training.log_every": 1, "data.hold_out": 20, "sampling.preview_steps": 2, "sampling.num_steps": 4}
SCORES = {"evaluation.num_samples": 8, "sampling.batch_size": 8, "evaluation.features": "pixels"}
SCORES |= {"evaluation.reference": "held_out", "evaluation.allow_singular": "true", "evaluation.k": 2}
SCORES |= {"evaluation.kernel_subsets": 2, "evaluation.report": "false"}
# Only these runs are scored when they end: the run of built-in components and the run with a component of every kind.
SCORED = ("digits", "mine")
CHEAP = {"train": TRAINING | SCORES, "eval": SCORES, "sample": {}}


class Page:
  """Run docs/extending.md in a temporary folder that replaces /tmp.

  The folder has the files that the page saves. Each section runs only once.
  """

  def __init__(self, folder):
    self.folder, self._names = folder, {}
    for name, text in saved_files(TEXT).items():
      (folder / name).write_text(text)
    (folder / "configs").symlink_to(ROOT / "configs")

  def run(self, words):
    """Run a command in this process, with settings that make it fast."""
    flags = command_line.parse([word.replace("=/tmp/", f"={self.folder}/") for word in words])
    cheap = {key: str(value) for key, value in CHEAP[flags.mode].items()}
    flags.keys = flags.keys | cheap
    if flags.mode == "sample":
      flags.num_samples = 2
    with pytest.MonkeyPatch.context() as patch:
      if flags.mode == "train" and flags.workdir.name not in SCORED:
        patch.setattr(scoring.Scorer, "score", lambda *_: None)
      commands.command(flags.mode).run(flags)

  def play(self, section):
    """Run a section's examples and commands, and return the names that its examples define."""
    if section not in self._names:
      names = self._names[section] = {}
      text = TEXT.partition("\n## ")[0] if section == "" else SECTIONS[section]
      for saved, language, block in re.findall(
        r"(as\s+`\w+\.py`:\n\n)?^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE
      ):
        if language == "sh":
          for words in commands_in(block):
            self.run(words)
        elif not saved:
          exec(compile(block.replace('"/tmp/', f'"{self.folder}/'), section, "exec"), names)
          if "batches" in names:
            names["batches"].close()
    return self._names[section]

  def load(self, run):
    """Load the model, the parameters and the frozen parameters of a run."""
    return ddpm_jax.load(self.folder / run)

  def module_of(self, file):
    """Return the names that a file of the page defines."""
    return vars(custom.load_module(self.folder / file, f"page_{file[:-3]}", (self.folder / file).read_bytes()))


def package_files():
  """Return a dict that maps the path of each Python file of the package to its content."""
  return {path: path.read_bytes() for path in (ROOT / "ddpm_jax").rglob("*.py")}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  before = package_files()
  with pytest.MonkeyPatch.context() as patch, one_device():
    patch.setattr(jax_setup, "join_processes", lambda given: None)
    patch.setattr(jax_setup, "start_devices", lambda given: None)
    test_page = Page(tmp_path_factory.mktemp("page"))
    patch.chdir(test_page.folder)
    patch.syspath_prepend(str(test_page.folder))
    yield test_page
  # A user's component changes no file of the package.
  assert package_files() == before


@pytest.fixture
def sampler_order():
  """Return a function that measures the order of a sampler on Gaussian data.

  The function compares the sampler's errors with 40 and with 80 steps.
  """

  def measure(sampler):
    process, x = sampler.process, jnp.linspace(-2, 2, 20)[:, None]
    denoise, errors = gaussian().denoise(process), []
    for steps in (40, 80):
      times = np.linspace(process.t_max, 0.1 * process.t_max, steps + 1)
      samples = sampling.sample(jax.random.key(0), sampler, denoise, x, times)
      errors.append(float(jnp.max(jnp.abs(samples - gaussian_flow(process, 0.3, 0.4, x, times[0], times[-1])))))
    return math.log2(errors[0] / errors[1])

  return measure


def test_every_kind_is_in_the_table_and_has_a_section():
  linked = re.findall(r"^\| \[[\w ]+\]\(#([\w-]+)\) \|", TEXT, re.MULTILINE)
  assert linked == [name.lower().replace(" ", "-") for name in SECTIONS if re.match("An? ", name)]
  for file, text in saved_files(TEXT).items():
    assert len(text.splitlines()) < 40, file


def test_the_sampler_has_its_documented_order(page, x64, sampler_order):
  adams = page.module_of("my_sampler.py")["adams"]
  for process in (processes.vp(), processes.rectified_flow()):
    assert sampler_order(adams(process)) == pytest.approx(2, abs=0.15)
  assert sampler_order(adams(process, 0.0)) == pytest.approx(1, abs=0.1)


def test_the_sampler_of_weight_0_is_ddim_and_samples_a_run(page):
  page.play("")
  names = page.play("A sampler")
  # The standard deviation of 1000 samples.
  assert jnp.std(names["samples"]) == pytest.approx(0.5, abs=0.05)
  adams, process = page.module_of("my_sampler.py")["adams"], names["process"]
  x, times = names["x"][:8], names["times"]
  result, expected = (
    sampling.sample(jax.random.key(0), rule, names["denoise"], x, times)
    for rule in (adams(process, 0.0), sampling.ddim(process))
  )
  np.testing.assert_allclose(result, expected, atol=1e-5)
  file_names = {path.name for path in (page.folder / "digits" / "samples").glob("*.npz")}
  assert file_names >= {"adams_nfe20_seed0.npz", "eval_ddim_20_seed0.npz", "eval_adams_10_seed0.npz"}


def test_the_process_matches_its_formula(page):
  names = page.play("A process")
  for shift in (0.25, 1.0):
    process = page.module_of("my_process.py")["shifted_cosine"](shift)
    t = jnp.linspace(0.01, 1, 100)
    np.testing.assert_allclose(process.alpha(t) ** 2 + process.sigma(t) ** 2, 1, atol=1e-5)
    # The shift changes the log-SNR equally at all times. With a shift of 1, the log-SNR at t = 1 is -15.
    angle = jnp.arctan(jnp.exp(7.5)) * t
    np.testing.assert_allclose(process.log_snr(t), 2 * jnp.log(shift / jnp.tan(angle)), atol=1e-2)
    assert process.log_snr(1.0) == pytest.approx(-15 + 2 * math.log(shift), abs=1e-2)
    assert (float(process.alpha(0.0)), float(process.sigma(0.0))) == (1, 0)
  assert names["mean"].shape == (4, 8, 8, 1)
  trained = page.load("shifted").model.process
  assert trained.log_snr(0.5) == pytest.approx(float(names["process"].log_snr(0.5)))


def test_the_weighting_is_a_soft_minimum(page):
  names = page.play("A weighting")
  soft, log_snr = page.module_of("my_weighting.py")["soft_min_snr"](4.0), jnp.linspace(-10, 10, 50)
  hard = losses.min_snr(4.0)
  assert jnp.all((soft(log_snr) <= hard(log_snr)) & (soft(log_snr) >= 0.5 * hard(log_snr) - 1e-7))
  # The weight of the error in x_0 is half the harmonic mean of the SNR and gamma.
  np.testing.assert_allclose(1 / (jnp.exp(log_snr) * soft(log_snr)), 1 / jnp.exp(log_snr) + 1 / 4.0, rtol=1e-5)
  assert names["loss"] > 0
  assert page.load("weighted").params


def test_the_networks_of_three_libraries_train(page):
  names = page.play("A network")
  assert [output.shape for output in names["outputs"]] == [(2, 8, 8, 1)] * 3
  for run, width, text in (("linen", 32, "my_linen"), ("nnx", 32, "my_nnx"), ("equinox", 128, "my_equinox")):
    model, params, _ = page.load(run)
    assert any(width in leaf.shape for leaf in jax.tree.leaves(params))
    random = random_like(params)
    given = {"classes": jnp.arange(4)} if run == "linen" else {}
    x = jnp.ones((4, 8, 8, 1))
    outputs = [model.network.apply(random, x, jnp.full((4,), time), given) for time in (10.0, 90.0)]
    assert outputs[0].shape == x.shape, text
    assert not np.allclose(*outputs)
    # All rows have the same x and time, so the rows of the output differ only if the network receives the classes.
    assert np.allclose(outputs[0], outputs[0][:1], atol=1e-5) == (run != "linen")
  embedded = page.load("linen").params["Embed_0"]["embedding"]
  assert embedded.shape == (11, 32)


@pytest.mark.parametrize("file", ["my_linen.py", "my_nnx.py", "my_equinox.py"])
def test_the_networks_have_channels_for_a_learned_variance(page, file):
  tree = config.replace(tree_of(tiny_config()), "model.prediction", "learned_range(prediction=V)")
  (name,) = re.findall(r"class (\w+)", (page.folder / file).read_text())
  model = config.build(config.replace(tree, "model.network", f"{file}:{name}(width=16, depth=1)")).model
  assert model.output_channels() == 2


def test_the_condition_reaches_the_network_and_can_be_dropped(page):
  names = page.play("A condition")
  model = names["model"]
  condition = model.conditions["brightness"]
  images = jax.random.uniform(jax.random.key(0), (6, 8, 8, 1), minval=-1, maxval=1)
  keys = jax.random.split(jax.random.key(1), 6)
  # Training computes the condition from the data. Sampling uses the user's value.
  means = jnp.mean(images, (1, 2, 3))
  for batch in ({"image": images}, {"brightness": means}):
    value = model.encode_conditions(keys, batch)["brightness"]
    np.testing.assert_allclose(value, jnp.stack([means, jnp.ones(6)], -1), atol=1e-6)
  np.testing.assert_array_equal(model.drop_conditions({"brightness": value})["brightness"], jnp.zeros((6, 2)))
  assert condition.parse("-0.2") == np.float32(-0.2)
  params = random_like(names["params"])
  one, other = (
    model.denoise(params, model.encode_conditions(keys, {"brightness": jnp.full(6, value)}))(images, 0.5)
    for value in (-0.5, 0.5)
  )
  assert not np.allclose(one, other)
  (samples,) = (page.folder / "bright" / "samples").glob("*_nfe*.npz")
  with np.load(samples) as arrays:
    np.testing.assert_allclose(arrays["brightness"], -0.2)
  assert names["samples"].shape == (16, 8, 8, 1)
  np.testing.assert_array_equal(jnp.sum(names["counts"], 1), [3, 4])


def test_the_data_have_their_stated_direction(page):
  names = page.play("A data source")
  assert names["batch"]["image"].shape == (32, 16, 16, 1)
  assert (len(names["train"]), len(names["held_out"])) == (450, 50)
  items = data.read(page.module_of("my_data.py")["gratings"](data.Fit((32, 32), 1), count=20).train, range(20))
  # The doubled angle of the image gradient, because the sign of the gradient does not matter.
  rows, columns = np.gradient(items["image"][..., 0], axis=(1, 2))
  direction = np.stack([columns**2 - rows**2, 2 * rows * columns], -1).sum((1, 2))
  direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
  assert np.all(np.sum(direction * items["direction"], -1) > 0.9)
  assert np.abs(items["image"]).max() <= 1
  with np.load(next((page.folder / "gratings" / "samples").glob("*_nfe*.npz"))) as samples:
    np.testing.assert_array_equal(samples["direction"], [[1, 0]] * 2)


def test_the_codec_is_lossless(page):
  names = page.play("A codec")
  np.testing.assert_array_equal(names["again"], names["images"])
  # The first position of x contains the first square.
  np.testing.assert_array_equal(np.sort(names["x"][0, 0, 0]), np.sort(np.asarray(names["images"][0, :2, :2]).ravel()))
  model, _, frozen = page.load("squares")
  assert (model.shape, model.data_shape) == ((4, 4, 4), (8, 8, 1))
  assert model.decode(jnp.ones((2, 4, 4, 4)), frozen).shape == (2, 8, 8, 1)


def test_the_objective_approaches_squared_and_absolute_error(page):
  names = page.play("An objective")
  apply, huber = names["network"].apply, page.module_of("my_objective.py")["huber"]
  process, keys = processes.vp(), jax.random.split(jax.random.key(0), 32)
  items = data.read(page.module_of("my_data.py")["gratings"](data.Fit((8, 8), 1)).train, range(32))
  batch = {"x": jnp.asarray(items["image"]), "given": {}}

  def value(objective, params):
    return float(objective.loss({"model": params}, None, keys, batch | objective.prepare(keys, ()))[0])

  params, zeros = names["state"].params, jax.tree.map(jnp.zeros_like, names["state"].params)
  plain = losses.denoising(apply, process, predictions.V, weighting=losses.snr_plus_one)
  squared, smooth = value(plain, params), value(huber(apply, process, predictions.V), params)
  assert value(huber(apply, process, predictions.V, math.inf), params) == pytest.approx(squared, rel=1e-4)
  assert smooth < squared
  # If c is far below every error, the loss is 2 c times the absolute error.
  ends = [value(huber(apply, process, predictions.V, c), params) / (2 * c) for c in (1e-4, 1e-5)]
  assert ends[0] == pytest.approx(ends[1], rel=1e-2)
  # The page's training loop improved the network: the loss is below the loss of zero parameters.
  assert smooth < 0.9 * value(names["objective"], zeros)
  assert page.load("huber").params


def test_the_recipe_with_all_kinds_loads_without_the_files(page, tmp_path, monkeypatch):
  page.play("All in one recipe")
  files = {*saved_files(TEXT)} - {"my_nnx.py", "my_equinox.py", "my_objective.py", "my_text.py", "my_experiment.py"}
  copies = {path.name: path.read_text() for path in (page.folder / "mine" / "components").rglob("*.py")}
  assert copies == {name: saved_files(TEXT)[name] for name in files}
  assert "my_objective.py" in {path.name for path in (page.folder / "mine_2" / "components").rglob("*.py")}
  # Simulate a new process in another folder, where the recipe's relative paths name no files.
  monkeypatch.setattr(custom, "_LOADED", {})
  monkeypatch.chdir(tmp_path)
  model, params, frozen = page.load("mine")
  x = model.process.prior(jax.random.key(0), (2, *model.shape))
  given = model.encode_conditions(jax.random.split(jax.random.key(1), 2), {"brightness": jnp.zeros(2)}, frozen)
  samples = sampling.sample(jax.random.key(2), model.defaults.sampler, model.denoise(params, given), x, model.times(3))
  assert model.decode(samples, frozen).shape == (2, 16, 16, 1)


# For each component of the page: the module that would contain it in the package, and its config key.
PLACES = {
  "my_sampler.py:adams": ("sampling", "sampler"),
  "my_process.py:shifted_cosine": ("processes", "model.process"),
  "my_weighting.py:soft_min_snr": ("losses", "objective.weighting"),
  "my_linen.py:Residual": ("networks", "model.network"),
  "my_nnx.py:Mixer": ("networks", "model.network"),
  "my_equinox.py:Perceptron": ("networks", "model.network"),
  "my_condition.py:brightness": ("conditions", "model.conditions.bright"),
  "my_text.py:words": ("conditions", "model.conditions.text"),
  "my_data.py:gratings": ("data", "data.source"),
  "my_codec.py:space_to_depth": ("codecs", "model.codec"),
  "my_objective.py:huber": ("losses", "objective"),
}


@pytest.mark.parametrize("component", PLACES)
def test_a_file_and_an_export_add_a_component_to_the_package(page, component, monkeypatch):
  file, _, name = component.partition(":")
  module_name, config_key = PLACES[component]
  module, tree = slots.import_module(module_name), tree_of(tiny_config())
  added = custom.load_module(page.folder / file, "page_added", (page.folder / file).read_bytes())
  component_function = getattr(added, name)
  component_function.__module__ = module.__name__
  monkeypatch.setattr(module, name, component_function, raising=False)
  if hasattr(module, "__all__"):
    monkeypatch.setattr(module, "__all__", [*module.__all__, name])
  changed = config.replace(tree, config_key, name)
  assert changed.at(config_key)["component"] == f"{module_name}.{name}"
  config.build(changed)
  slot = changed.parameters[config_key].slot
  assert name in slots.names(slot)
