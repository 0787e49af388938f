"""Test training with custom components, and test resuming and loading after the components' file is deleted."""

import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import ddpm_jax
from ddpm_jax import config as configs
from ddpm_jax import runs, sampling
from ddpm_jax.devices import parallel
from ddpm_jax.runs import frozen, stepping
from tests import user_components
from tests.conftest import ROOT
from tests.recipes import newest_state, tiny_config, tree_of

pytestmark = pytest.mark.usefixtures("dense_module", "on_one_device")

# The key and text of each component. Each argument except the size of `brightness` differs from its default.
COMPONENTS = {
  "linen": ("model.network", "Linen(width=8)"),
  "nnx": ("model.network", "Nnx(width=8)"),
  "equinox": ("model.network", "Equinox(width=8)"),
  "sampler": ("sampler", "sampler(eta=0.3)"),
  "weighting": ("objective.weighting", "weighting(gamma=3)"),
  "plain weighting": ("objective.weighting", "plain_weighting"),
  "loss": ("objective", "loss(factor=0.5)"),
  "condition": ("model.conditions.bright", "brightness(size=1)"),
  "codec": ("model.codec", "patches(factor=4)"),
  "data": ("data.source", "source(count=140)"),
}


def tree_with(path, name, **training):
  config = tiny_config()
  config.training.update({"steps": 2, "checkpoint_every": 2, "sample_every": 2, "log_every": 1} | training)
  key, text = COMPONENTS[name]
  if name == "condition":
    # Test the condition with a custom network that accepts a vector.
    config.model.network = f"{path}:Linen"
  return configs.replace(tree_of(config), key, f"{path}:{text}" if "/" in str(path) else text)


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_run_resumes_and_loads_without_the_file(name, tmp_path, unscored):
  path = tmp_path / "mine.py"
  shutil.copy(user_components.__file__, path)
  runs.run_train(tree_with(path, name), tmp_path / "resumed")
  runs.run_train(tree_with(path, name, steps=4), tmp_path / "unbroken")
  path.unlink()
  # Resume with the config in the run folder.
  tree = configs.replace(configs.read_run(tmp_path / "resumed"), "training.steps", 4)
  runs.run_train(tree, tmp_path / "resumed")
  resumed, unbroken = (newest_state(tmp_path / folder) for folder in ("resumed", "unbroken"))
  for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(unbroken), strict=True):
    np.testing.assert_array_equal(a, b)
  model, params, frozen = ddpm_jax.load(tmp_path / "resumed")
  x = model.process.prior(jax.random.key(0), (2, *model.shape))
  given = {"bright": np.zeros((2, 1), np.float32)} if name == "condition" else {}
  times = model.times(3)
  samples = sampling.sample(jax.random.key(1), model.defaults.sampler, model.denoise(params, given), x, times)
  assert model.decode(samples, frozen).shape == (2, 8, 8, 1)
  assert bool(np.all(np.isfinite(samples)))


def test_each_argument_reaches_its_component(tmp_path):
  path = tmp_path / "mine.py"
  shutil.copy(user_components.__file__, path)
  built = configs.build(tree_with(path, "linen"))
  assert built.model.network.module.width == 8
  assert configs.build(tree_with(path, "codec")).model.shape == (2, 2, 16)
  sampler = configs.build(tree_with(path, "sampler")).sampler
  x, key = np.ones((1, 8, 8, 1), np.float32), jax.random.key(0)

  def step(rule):
    return rule.step(key, lambda x_t, t: 0.5 * x_t, x, rule.init(x), np.float32(0.5), np.float32(0.25))[0]

  np.testing.assert_array_equal(step(sampler), step(sampling.ddim(built.model.process, 0.3)))


def test_a_changed_file_is_refused_and_the_copy_is_used(tmp_path, unscored):
  path = tmp_path / "mine.py"
  shutil.copy(user_components.__file__, path)
  runs.run_train(tree_with(path, "weighting"), tmp_path / "run")
  path.write_text(path.read_text().replace("gamma * jnp.exp", "2 * gamma * jnp.exp"))
  with pytest.raises(ValueError, match=r"holds a run of another config:\n +objective.weighting.sha256"):
    runs.run_train(tree_with(path, "weighting", steps=4), tmp_path / "run")
  tree = configs.read_run(tmp_path / "run")
  experiment = configs.build(tree)
  assert experiment.tree.values["objective"]["weighting"]["sha256"] == tree.values["objective"]["weighting"]["sha256"]
  (copy,) = (tmp_path / "run" / "components").rglob("*.py")
  assert copy.read_text() == (ROOT / "tests" / "user_components.py").read_text()


def test_changed_frozen_parameters_are_refused(tmp_path, unscored, monkeypatch):
  path = tmp_path / "mine.py"
  shutil.copy(user_components.__file__, path)
  runs.run_train(tree_with(path, "codec"), tmp_path / "run")
  for step in (tmp_path / "run" / "checkpoints").iterdir():
    assert not list(step.rglob("*gain*"))
  tree = configs.replace(configs.read_run(tmp_path / "run"), "training.steps", 4)
  experiment = configs.build(tree)
  other = experiment.model._replace(codec=experiment.model.codec._replace(load=lambda: {"gain": np.float32(0.8)}))
  monkeypatch.setattr(configs, "build", lambda *_: experiment._replace(model=other))
  raises_changed = pytest.raises(ValueError, match=r"frozen parameters \(codec\) that differ from those")
  with raises_changed:
    runs.run_train(tree, tmp_path / "run")
  with raises_changed:
    runs.run_eval(configs.build(tree), tmp_path / "run", seed=0, choice=runs.WeightsChoice())
  with raises_changed:
    ddpm_jax.load(tmp_path / "run")


@pytest.mark.parametrize("size", [(), (2,)], ids=["another shape", "the same shape"])
def test_a_codec_allows_inversion_but_neither_inpainting_nor_likelihoods(size, tmp_path, unscored):
  path = tmp_path / "mine.py"
  shutil.copy(user_components.__file__, path)
  tree = (
    tree_with(path, "codec")
    if not size
    else configs.replace(tree_with(path, "sampler"), "model.codec", f"{path}:patches(factor=1)")
  )
  tree = configs.replace(tree, "sampler", "ddim")
  runs.run_train(tree, tmp_path / "run")
  np.savez(tmp_path / "images.npz", images=np.zeros((2, 8, 8, 1), np.uint8))
  Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "mask.png")
  experiment = configs.build(tree)

  def edit(task, **options):
    runs.run_edit(
      experiment,
      tmp_path / "run",
      runs.Edit(task, tmp_path / "images.npz", **options),
      seed=0,
      choice=runs.WeightsChoice(),
    )

  edit("invert")
  with np.load(tmp_path / "run" / "edits" / "invert_seed0.npz") as found:
    assert found["output"].shape == (2, 1, 8, 8, 1)
    assert found["latent"].shape == (2, *experiment.model.shape)
  with pytest.raises(ValueError, match="--task=inpaint for a model with a codec, .*; expected a model of pixels"):
    edit("inpaint", mask=str(tmp_path / "mask.png"))
  with pytest.raises(
    ValueError, match=r"evaluation.likelihood for a model with a codec, .*; expected a model of pixels"
  ):
    runs.run_eval(
      experiment.replace(evaluation__likelihood=("ode",)), tmp_path / "run", seed=0, choice=runs.WeightsChoice()
    )


def test_a_condition_from_data_can_be_set_by_a_flag(tmp_path, unscored):
  path = tmp_path / "mine.py"
  shutil.copy(user_components.__file__, path)
  tree = tree_with(path, "condition")
  runs.run_train(tree, tmp_path / "run")
  experiment, choice = configs.build(tree), runs.WeightsChoice()

  def sample(**given):
    steering = runs.Steering(given=given)
    runs.run_sample(experiment, tmp_path / "run", num_samples=2, seed=0, choice=choice, steering=steering)

  sample(bright=["0.3"])
  with np.load(tmp_path / "run" / "samples" / "ddim_nfe4_seed0.npz") as found:
    np.testing.assert_allclose(found["bright"], [[0.3], [0.3]], rtol=1e-6)
  with pytest.raises(
    ValueError, match="Got no bright for a model with the condition bright; expected a value. Set --given bright"
  ):
    sample()
  np.savez(tmp_path / "images.npz", images=np.zeros((2, 8, 8, 1), np.uint8))
  # Without a value, an edited image gets the null value of the condition.
  runs.run_edit(experiment, tmp_path / "run", runs.Edit("img2img", tmp_path / "images.npz"), seed=0, choice=choice)


def test_frozen_parameters_of_another_run_are_read_once_for_their_shapes(tmp_path, unscored):
  path, teacher = tmp_path / "mine.py", tmp_path / "teacher"
  shutil.copy(user_components.__file__, path)
  runs.run_train(tree_with(path, "weighting"), teacher)
  tree = configs.replace(tree_with(path, "condition"), "objective", f"{path}:loss")
  experiment, reads = configs.build(tree), []

  def load():
    reads.append(1)
    return {"scale": np.float32(2), "teacher": ddpm_jax.load(teacher).params}

  def null(frozen):
    return frozen["none"]

  bright = user_components.brightness("bright")._replace(null=null, load=lambda: {"none": np.zeros(1, np.float32)})
  model = experiment.model._replace(conditions={"bright": bright})
  experiment = experiment._replace(model=model, objective=experiment.objective._replace(load=load))
  batch = stepping.batch_shapes(experiment, 1)
  assert stepping.flops_per_image(experiment, batch) > 0
  stepping.optimizer(experiment)
  found = frozen.shapes(experiment, parallel.make_mesh())
  assert len(reads) == 1
  loaded = frozen.load(experiment, parallel.make_mesh())
  assert set(found) == {"conditions", "objective"}
  assert jax.tree.map(jax.numpy.shape, loaded) == jax.tree.map(jax.numpy.shape, found)


def test_frozen_parameters_may_be_numbers_keys_or_none(tmp_path):
  path = tmp_path / "mine.py"
  shutil.copy(user_components.__file__, path)
  experiment, mesh = configs.build(tree_with(path, "loss")), parallel.make_mesh()
  for given in ({"a": 3, "b": np.arange(4), "key": jax.random.key(0)}, {}):
    one = experiment._replace(objective=experiment.objective._replace(load=lambda given=given: given))
    found, shapes = frozen.load(one, mesh), frozen.shapes(one, mesh)
    assert jax.tree.structure(found) == jax.tree.structure({"objective": given}) == jax.tree.structure(shapes)
    assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [leaf.dtype for leaf in jax.tree.leaves(shapes)]


def test_an_image_condition_must_have_the_size_of_x(tmp_path):
  path = tmp_path / "mine.py"
  shutil.copy(user_components.__file__, path)
  tree = configs.replace(tree_with(path, "codec"), "model.conditions.sketch", "image(shape=(8, 8, 1))")
  with pytest.raises(
    ValueError, match=r"condition 'sketch', an image of shape \(8, 8, 1\), for x of shape \(2, 2, 16\)"
  ):
    configs.build(tree)
  # The small image of a super-resolution model is resized to x.
  tree = configs.replace(tree_with(path, "codec"), "model.conditions.low", "low_resolution(factor=2)")
  assert configs.build(tree).model.conditions["low"].shape["image"].shape == (2, 2, 1)


def test_errors_while_loading_frozen_parameters_give_one_message(tmp_path, unscored):
  path = tmp_path / "mine.py"
  text = (ROOT / "tests" / "user_components.py").read_text()
  path.write_text(text.replace('{"gain": np.float32(0.9)}', "{}[0]").replace('{"scale": np.float32(2)}', "{}[1]"))
  for name, message in (
    ("codec", "config.model.codec=.*KeyError.*: 0"),
    ("loss", "frozen parameters of .*KeyError: 1"),
  ):
    with pytest.raises(ValueError, match=message):
      runs.run_train(tree_with(path, name), tmp_path / "run")
  assert not (tmp_path / "run").exists()
  configs.write(tmp_path, tree_of(tiny_config()))
  with pytest.raises(ValueError, match="a run without a checkpoint; expected a trained run"):
    ddpm_jax.load(tmp_path)
