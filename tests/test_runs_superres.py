"""Super-resolution: its condition, its runs, and cascades of them, in one process."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import build, runs
from ddpm_jax.build import condition
from tests.parameters import one_device, random_params, use_dense, write_run
from tests.recipes import tiny_config

pytestmark = pytest.mark.usefixtures("on_one_device")


def config_of(**keys):
  """A model that enlarges 8x8 to 16x16; `superres__noise=0.0` stands for superres.noise."""
  config = tiny_config()
  config.data.update({"image_size": 16, "source": "arrays", "hold_out": 5})
  config.superres.update({"factor": 2, "noise": 0.5, "sample_noise": 0.1})
  # Quick enough that two steps tell images apart.
  config.optimizer.update({"learning_rate": 3e-2, "warmup_steps": 0})
  config.training.update({"steps": 2, "checkpoint_every": 2, "sample_every": 2, "log_every": 1, "batch_size": 4})
  config.evaluation.update({"num_samples": 3, "k": 2})
  config.sampling.update({"num_steps": 2, "preview_steps": 2, "batch_size": 4})
  config.update_from_flattened_dict({name.replace("__", "."): value for name, value in keys.items()})
  return config


def base_of():
  config = config_of(superres__factor=0, superres__noise=0.0, superres__sample_noise=0.0)
  config.data.update({"source": "digits", "image_size": 8})
  return config


@pytest.fixture(scope="module", params=["dense", pytest.param("unet", marks=pytest.mark.slow)])
def kind(request):
  return request.param


@pytest.fixture
def network(kind, monkeypatch):
  """Let the network be that of the runs `trained`."""
  if kind == "dense":
    use_dense(monkeypatch)


@pytest.fixture(scope="module")
def trained(kind, tmp_path_factory):
  """The folders of a base of 8x8, which nothing trained, and of a run of two steps that enlarges to 16x16."""
  folder = tmp_path_factory.mktemp("superres")
  images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 1), np.uint8)
  np.savez(folder / "data.npz", images=images)
  with one_device(), pytest.MonkeyPatch.context() as patch:
    if kind == "dense":
      use_dense(patch)
    write_run(base_of(), folder / "base")
    runs.run_train(config_of(data__path=str(folder / "data.npz")), folder / "large")
  return folder


def arrays_of(folder):
  (path,) = folder.glob("*.npz")
  with np.load(path) as file:
    return {name: file[name] for name in file.files}


def arrays_of_and_clear(folder):
  """Of the samples that were drawn last; training leaves its own."""
  (path,) = folder.glob("ddim*.npz")
  with np.load(path) as file:
    found = {name: file[name] for name in file.files}
  for written in folder.glob("ddim*"):
    written.unlink()
  return found


def test_the_condition_of_training_is_the_mean_of_boxes_enlarged_and_noised():
  keys, image = jax.random.split(jax.random.key(0), 200), jax.random.normal(jax.random.key(1), (200, 16, 16, 1))
  low = np.zeros((200, 8, 8, 1), np.float32)
  for row in range(8):
    for column in range(8):
      low[:, row, column] = np.mean(image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2], (1, 2))
  smooth = jax.image.resize(low, (200, 16, 16, 1), "bicubic")
  clean = condition.training_image(config_of(superres__noise=0.0, superres__sample_noise=0.0), keys, image)
  np.testing.assert_allclose(clean.image, smooth, atol=1e-5)
  assert clean.level is None
  noised = condition.training_image(config_of(), keys, image)
  level = np.asarray(noised.level)
  # Uniform in [0, 0.5], told to the network a thousandfold.
  assert np.all((level >= 0) & (level <= 500))
  assert abs(np.mean(level) - 250) < 4 * 500 / (12 * 200) ** 0.5
  noise = np.asarray(noised.image - smooth)
  np.testing.assert_allclose(np.std(noise, (1, 2, 3)), level / 1000, rtol=0.2, atol=1e-5)
  np.testing.assert_allclose(np.mean((noise / (level[:, None, None, None] / 1000)) ** 2), 1, atol=0.03)
  # Sample by sample, whatever the batch.
  part = condition.training_image(config_of(), keys[50:60], image[50:60])
  np.testing.assert_allclose(part.image, noised.image[50:60], atol=1e-6)
  np.testing.assert_array_equal(part.level, level[50:60])


def test_the_condition_of_images_that_are_no_squares():
  config = config_of(superres__noise=0.0, superres__sample_noise=0.0)
  with config.data.ignore_type():
    config.data.image_size = (4, 8)
  keys, image = jax.random.split(jax.random.key(0), 3), jax.random.normal(jax.random.key(1), (3, 4, 8, 1))
  found = condition.training_image(config, keys, image).image
  low = np.asarray(image).reshape(3, 2, 2, 4, 2, 1).mean((2, 4))
  np.testing.assert_allclose(found, jax.image.resize(low, (3, 4, 8, 1), "bicubic"), atol=1e-5)
  assert build.low_space(config) == (2, 4)
  config.superres.factor = 8
  with pytest.raises(ValueError, match="superres.factor=8 for images of 4x8; wanted a divisor of height and width"):
    condition.check_superres(config)


def test_the_condition_enters_the_network_and_the_loss():
  config = config_of(network__num_classes=3, loss__label_dropout=0.1)
  params = random_params(config)
  assert params["conv_in"]["kernel"].shape[-2] == 2, "the data and the image"
  x = jax.random.normal(jax.random.key(1), (2, 16, 16, 1))
  given = condition.Condition(jnp.array([0, 1]), 0.5 * x[::-1], jnp.array([10.0, 200.0]))
  others = (given._replace(classes=given.classes + 1), given._replace(image=x), given._replace(level=given.level + 300))

  def outputs(params):
    conditional = build.build_conditional(config, params)
    return [conditional(x, 0.5, value) for value in (given, *others)]

  first, *changed = jax.jit(outputs)(params)
  for other in changed:
    assert np.all(np.max(np.abs(other - first), (1, 2, 3)) > 1e-3 * np.std(first))
  batch = {"image": x, "label": jnp.array([0, 1])}
  keys = jax.random.split(jax.random.key(2), 2)
  (loss, _), slopes = jax.jit(jax.value_and_grad(build.build_loss(config), has_aux=True))(params, keys, batch)
  assert np.isfinite(loss)
  assert np.all(np.any(slopes["conv_in"]["kernel"] != 0, (0, 1, 3)))
  assert np.any(slopes["vector_1"]["kernel"] != 0)


@pytest.mark.parametrize(
  ("keys", "message"),
  [
    ({"superres__factor": 1}, "superres.factor=1 for images of 16"),
    ({"superres__factor": 3}, "factor=3 for images of 16x16; wanted a divisor of height and width above 1"),
    ({"superres__factor": -2}, "factor=-2"),
    ({"superres__factor": 0}, "factor=0, noise=0.5"),
    ({"superres__noise": 0.05}, "noise=0.05 and sample_noise=0.1; wanted 0 <= sample_noise <= noise <= 1"),
    ({"superres__noise": 1.5}, "noise=1.5"),
    ({"superres__sample_noise": -0.1}, "sample_noise=-0.1"),
    ({"superres__noise": float("nan")}, "noise=nan"),
    ({"task": "classify", "network__num_classes": 10}, "task='classify' with superres.factor=2"),
  ],
)
def test_wrong_settings_are_errors_when_built(keys, message):
  with pytest.raises(ValueError, match=message):
    build.build_loss(config_of(**keys))


def test_a_cascade(trained, tmp_path, network):
  """What the base drew is enlarged, and recorded as it was."""
  runs.run_sample(base_of(), trained / "base", num_samples=5, seed=3, choice=runs.Choice())
  alone = arrays_of_and_clear(trained / "base" / "samples")
  upsamplers = [trained / "large"]
  options = {"seed": 3, "choice": runs.Choice(), "upsamplers": upsamplers}
  runs.run_sample(base_of(), trained / "base", num_samples=5, **options)
  found = arrays_of_and_clear(trained / "base" / "samples")
  assert found["samples"].shape == (5, 16, 16, 1)
  np.testing.assert_array_equal(found["stage_0"], alone["samples"])
  assert "labels" not in found
  # The same images enlarged by hand are the same.
  config = config_of(data__path=str(trained / "data.npz"))

  def enlarge(images, name):
    np.savez(tmp_path / name, images=images)
    edit = runs.Edit("superres", tmp_path / name)
    runs.run_edit(config, trained / "large", edit, seed=3, choice=runs.Choice())
    arrays = arrays_of(trained / "large" / "edits")
    shutil.rmtree(trained / "large" / "edits")
    return arrays

  by_hand = enlarge(found["stage_0"], "low.npz")
  np.testing.assert_array_equal(by_hand["input"], found["stage_0"])
  assert np.max(np.abs(by_hand["output"][:, 0].astype(int) - found["samples"])) <= 1
  others = enlarge(found["stage_0"][::-1], "others.npz")
  assert np.max(np.abs(others["output"][:, 0].astype(int) - found["samples"])) > 10, "others would not be the same"


def test_wrong_cascades_and_exports_are_refused_before_anything_is_drawn(trained, tmp_path, network, capsys):
  base, large = trained / "base", trained / "large"
  config, choice = config_of(data__path=str(trained / "data.npz")), runs.Choice()
  for upsamplers, message in (
    ([large, large], "--upsampler=.*large, which enlarges images of 8x8x1, for images of 16x16x1; wanted them alike"),
    ([base], "Got a model that enlarges nothing"),
    ([tmp_path / "none"], "--upsampler=.*none, which holds no checkpoint"),
  ):
    with pytest.raises(ValueError, match=message):
      runs.run_sample(base_of(), base, num_samples=2, seed=0, choice=choice, upsamplers=upsamplers)
  with pytest.raises(ValueError, match="large, a model that enlarges images, to sample from; wanted .* --upsampler="):
    runs.run_sample(config, large, num_samples=2, seed=0, choice=choice)
  with pytest.raises(ValueError, match=r"a model that enlarges images \(config.superres.factor=2\).*no pipeline"):
    runs.run_export(config, large, tmp_path / "out", choice)
  edit = runs.Edit("img2img", trained / "data.npz")
  with pytest.raises(ValueError, match="'img2img' for a model that enlarges images; wanted --task=superres"):
    runs.run_edit(config, large, edit, seed=0, choice=choice)
  assert not (tmp_path / "out").exists()
  assert not list((base / "samples").glob("ddim*"))
  output = capsys.readouterr().out
  assert "checkpoint of step" not in output
  assert "sampling" not in output
