"""Test super-resolution in one process: its condition, its runs and cascades."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import losses, runs
from ddpm_jax.config import spec
from ddpm_jax.runs import generation, stepping
from tests.parameters import one_device, random_params, use_dense, write_run
from tests.recipes import experiment_of, set_keys, tiny_config, tree_of

pytestmark = pytest.mark.usefixtures("on_one_device")


def low(factor=2, noise=0.5, sample_noise=0.1):
  return spec("conditions.low_resolution", factor=factor, noise=noise, sample_noise=sample_noise)


def config_of(low=low(), **keys):  # noqa: B008, a constant
  """Return a config that enlarges 8x8 to 16x16, with changed keys such as `training__steps=3`."""
  config = tiny_config()
  config.data.source = spec("data.arrays", path="nowhere.npz")
  config.data.update({"image_size": 16, "hold_out": 5})
  config.model.conditions = {"low": low}
  # A high learning rate, so that two steps of training change the samples.
  config.optimizer.update({"learning_rate": 3e-2, "warmup_steps": 0})
  config.training.update({"steps": 2, "checkpoint_every": 2, "sample_every": 2, "log_every": 1, "batch_size": 4})
  config.evaluation.update({"num_samples": 3, "k": 2})
  config.sampling.update({"num_steps": 2, "preview_steps": 2, "batch_size": 4})
  return set_keys(config, **keys)


def large_of(folder, **keys):
  return config_of(data__source=spec("data.arrays", path=str(folder / "data.npz")), **keys)


def base_of():
  return config_of(None, data__source=spec("data.digits"), data__image_size=8)


def run_of(config, folder):
  """Return the experiment of a finished run."""
  return runs.load_experiment(tree_of(config), folder)


@pytest.fixture(scope="module", params=["dense", pytest.param("unet", marks=pytest.mark.slow)])
def kind(request):
  return request.param


@pytest.fixture
def network(kind, monkeypatch):
  """Use the network of the fixture `trained`."""
  if kind == "dense":
    use_dense(monkeypatch)


@pytest.fixture(scope="module")
def trained(kind, tmp_path_factory):
  """Make an untrained 8x8 base run and a run of two steps that enlarges to 16x16."""
  folder = tmp_path_factory.mktemp("superres")
  images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 1), np.uint8)
  np.savez(folder / "data.npz", images=images)
  with one_device(), pytest.MonkeyPatch.context() as patch:
    if kind == "dense":
      use_dense(patch)
    write_run(base_of(), folder / "base")
    runs.run_train(tree_of(large_of(folder)), folder / "large")
  return folder


def arrays_of(folder):
  (path,) = folder.glob("*.npz")
  with np.load(path) as file:
    return {name: file[name] for name in file.files}


def arrays_of_and_clear(folder):
  """Return a dict of the arrays that `run_sample` saved, and delete all files of `run_sample`."""
  (path,) = folder.glob("ddim*.npz")
  with np.load(path) as file:
    arrays = {name: file[name] for name in file.files}
  for written in folder.glob("ddim*"):
    written.unlink()
  return arrays


def test_in_training_the_condition_is_box_averaged_enlarged_and_noised():
  keys, image = jax.random.split(jax.random.key(0), 200), jax.random.normal(jax.random.key(1), (200, 16, 16, 1))
  small = np.zeros((200, 8, 8, 1), np.float32)
  for row in range(8):
    for column in range(8):
      small[:, row, column] = np.mean(image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2], (1, 2))
  smooth = jax.image.resize(small, (200, 16, 16, 1), "bicubic")

  def given(config, rows=np.s_[:]):
    return experiment_of(config).model.encode_conditions(keys[rows], {"image": image[rows]}, train=True)["low"]

  clean = given(config_of(low(noise=0.0, sample_noise=0.0)))
  np.testing.assert_allclose(clean["image"], smooth, atol=1e-5)
  assert set(clean) == {"image"}
  noised = given(config_of())
  level = np.asarray(noised["level"])
  # The standard deviation of the noise is uniform in [0, 0.5]. The level is 1,000 times as large.
  assert np.all((level >= 0) & (level <= 500))
  assert abs(np.mean(level) - 250) < 4 * 500 / (12 * 200) ** 0.5
  noise = np.asarray(noised["image"] - smooth)
  np.testing.assert_allclose(np.std(noise, (1, 2, 3)), level / 1000, rtol=0.2, atol=1e-5)
  np.testing.assert_allclose(np.mean((noise / (level[:, None, None, None] / 1000)) ** 2), 1, atol=0.03)
  # The noise of a sample does not depend on the batch.
  part = given(config_of(), np.s_[50:60])
  np.testing.assert_allclose(part["image"], noised["image"][50:60], atol=1e-6)
  np.testing.assert_array_equal(part["level"], level[50:60])


def test_the_condition_has_the_shape_of_non_square_images():
  experiment = experiment_of(config_of(low(noise=0.0, sample_noise=0.0), data__image_size=(4, 8)))
  keys, image = jax.random.split(jax.random.key(0), 3), jax.random.normal(jax.random.key(1), (3, 4, 8, 1))
  image_condition = experiment.model.encode_conditions(keys, {"image": image}, train=True)["low"]["image"]
  small = np.asarray(image).reshape(3, 2, 2, 4, 2, 1).mean((2, 4))
  np.testing.assert_allclose(image_condition, jax.image.resize(small, (3, 4, 8, 1), "bicubic"), atol=1e-5)
  assert generation.low_res_shape(experiment, "low") == (2, 4, 1)
  with pytest.raises(ValueError, match="factor=8 of low for data of 4x8; expected a divisor of both sides"):
    experiment_of(config_of(low(factor=8), data__image_size=(4, 8)))


def test_the_condition_enters_the_network_and_the_loss():
  config = config_of()
  config.model.conditions.classes = spec("conditions.classes", number=3, dropout=0.1)
  params, experiment = random_params(config), experiment_of(config)
  assert params["conv_in"]["kernel"].shape[-2] == 2, "the network gets x and the low-resolution image"
  x = jax.random.normal(jax.random.key(1), (2, 16, 16, 1))

  def given(classes=(0, 1), image=0.5 * x[::-1], level=(10.0, 200.0)):
    return {"classes": jnp.array(classes), "low": {"image": image, "level": jnp.array(level)}}

  def outputs(params):
    conditional = experiment.model.conditional(params)
    others = (given(classes=(1, 2)), given(image=x), given(level=(310.0, 500.0)))
    return [conditional(x, jnp.full(2, 0.5), value) for value in (given(), *others)]

  first, *changed = jax.jit(outputs)(params)
  for other in changed:
    assert np.all(np.max(np.abs(other - first), (1, 2, 3)) > 1e-3 * np.std(first))
  batch, keys = {"image": x, "classes": jnp.array([0, 1])}, jax.random.split(jax.random.key(2), 2)

  def loss(params):
    context = losses.Context(jnp.zeros((), jnp.int32), (), None, ())
    batch_of_x = stepping.encode(experiment.model, None, keys, batch)
    return experiment.objective.loss({"model": params, "extra": ()}, context, keys, batch_of_x)

  (value, _), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  assert np.isfinite(value)
  assert np.all(np.any(slopes["conv_in"]["kernel"] != 0, (0, 1, 3)))
  assert np.any(slopes["vector_1"]["kernel"] != 0)


@pytest.mark.parametrize(
  ("condition", "message"),
  [
    (low(factor=1), "factor=1 of low for data of 16x16"),
    (low(factor=3), "factor=3 of low for data of 16x16; expected a divisor of both sides, 2 or more"),
    (low(factor=-2), "factor=-2"),
    (low(factor=0), "factor=0 of low"),
    (low(noise=0.05), "noise=0.05 and sample_noise=0.1 of low; expected 0 <= sample_noise <= noise <= 1"),
    (low(noise=1.5), "noise=1.5"),
    (low(sample_noise=-0.1), "sample_noise=-0.1"),
    (low(noise=float("nan")), "conditions.low.noise=nan; expected a finite number"),
  ],
)
def test_wrong_settings_are_errors_when_the_config_is_built(condition, message):
  with pytest.raises(ValueError, match=message):
    experiment_of(config_of(condition))


def test_a_classifier_takes_no_low_resolution_condition(tmp_path):
  config = large_of(tmp_path, task="classify", objective="classification")
  np.savez(tmp_path / "data.npz", images=np.zeros((20, 16, 16, 1), np.uint8), classes=np.arange(20) % 10)
  with pytest.raises(ValueError, match="task='classify' with the conditions low; expected no conditions"):
    runs.run_train(tree_of(config), tmp_path / "none")
  assert not (tmp_path / "none").exists()


def test_a_cascade_enlarges_and_saves_the_base_samples(trained, tmp_path, network):
  base = run_of(base_of(), trained / "base")
  runs.run_sample(base, trained / "base", num_samples=5, seed=3, choice=runs.WeightsChoice())
  alone = arrays_of_and_clear(trained / "base" / "samples")
  upsamplers = [trained / "large"]
  options = {"seed": 3, "choice": runs.WeightsChoice(), "upsamplers": upsamplers}
  runs.run_sample(base, trained / "base", num_samples=5, **options)
  cascaded = arrays_of_and_clear(trained / "base" / "samples")
  assert cascaded["samples"].shape == (5, 16, 16, 1)
  np.testing.assert_array_equal(cascaded["stage_0"], alone["samples"])
  assert set(cascaded) == {"samples", "stage_0"}
  # An edit with the same small images gives the same result.
  large = run_of(large_of(trained), trained / "large")

  def enlarge(images, name):
    np.savez(tmp_path / name, images=images)
    edit = runs.Edit("superres", tmp_path / name)
    runs.run_edit(large, trained / "large", edit, seed=3, choice=runs.WeightsChoice())
    arrays = arrays_of(trained / "large" / "edits")
    shutil.rmtree(trained / "large" / "edits")
    return arrays

  edited = enlarge(cascaded["stage_0"], "low.npz")
  np.testing.assert_array_equal(edited["input"], cascaded["stage_0"])
  assert np.max(np.abs(edited["output"][:, 0].astype(int) - cascaded["samples"])) <= 1
  reordered = enlarge(cascaded["stage_0"][::-1], "reordered.npz")
  assert np.max(np.abs(reordered["output"][:, 0].astype(int) - cascaded["samples"])) > 10, (
    "another order gives other samples"
  )


def test_wrong_cascades_and_exports_are_refused_before_sampling(trained, tmp_path, network, capsys):
  base, large = trained / "base", trained / "large"
  base_experiment, large_experiment, choice = (
    run_of(base_of(), base),
    run_of(large_of(trained), large),
    runs.WeightsChoice(),
  )
  for upsamplers, message in (
    (
      [large, large],
      "--upsampler=.*large, which enlarges images of 8x8x1, for images of 16x16x1; expected the same shape",
    ),
    ([base], "--upsampler=.*base, a model that takes no image to enlarge; expected a super-resolution model"),
    ([tmp_path / "none"], "--upsampler=.*none, which holds no checkpoint"),
  ):
    with pytest.raises(ValueError, match=message):
      runs.run_sample(base_experiment, base, num_samples=2, seed=0, choice=choice, upsamplers=upsamplers)
  with pytest.raises(ValueError, match="large, the run of a super-resolution model; expected .* --upsampler="):
    runs.run_sample(large_experiment, large, num_samples=2, seed=0, choice=choice)
  with pytest.raises(ValueError, match=r"the image condition 'low', which no pixel pipeline"):
    runs.run_export(large_experiment, large, tmp_path / "out", choice)
  edit = runs.Edit("img2img", trained / "data.npz")
  with pytest.raises(ValueError, match="--task=img2img for a super-resolution model; expected --task=superres"):
    runs.run_edit(large_experiment, large, edit, seed=0, choice=choice)
  assert not (tmp_path / "out").exists()
  assert not list((base / "samples").glob("ddim*"))
  output = capsys.readouterr().out
  assert "checkpoint of step" not in output
  assert "sampling" not in output
