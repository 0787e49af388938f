"""Test the frozen networks of perceptual losses against PyTorch and against the features that scores use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ddpm_jax import config as configs
from ddpm_jax import metrics
from ddpm_jax.interop import features, inception
from ddpm_jax.networks.image_classifier import ImageClassifier
from ddpm_jax.networks.inception import Inception
from ddpm_jax.networks.vgg import LEVELS, VGG16
from tests.recipes import set_keys, tiny_config, tree_of

# The index of each convolution in torchvision's VGG16.
TORCHVISION = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def images(side=32, channels=3, count=2):
  return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (count, side, side, channels)), jnp.float32)


@pytest.fixture(scope="module")
def state():
  """Return random weights of VGG16 with torchvision's names."""
  rng, tensors, inputs = np.random.default_rng(1), {}, 3
  for index, width in zip(TORCHVISION, [width for widths in LEVELS for width in widths], strict=True):
    tensors[f"features.{index}.weight"] = rng.normal(0, (2 / 9 / inputs) ** 0.5, (width, inputs, 3, 3)).astype(
      np.float32
    )
    tensors[f"features.{index}.bias"] = rng.normal(0, 0.1, width).astype(np.float32)
    inputs = width
  return tensors | {"classifier.6.weight": np.zeros((2, 2), np.float32)}


def torch_maps(state, x, levels):
  """Compute the feature maps of the first `levels` levels of VGG16 with PyTorch."""
  import torch
  from torch.nn import functional

  maps, h, index = [], torch.from_numpy(np.array(x.transpose(0, 3, 1, 2))), 0
  for level, widths in enumerate(LEVELS[:levels]):
    h = functional.max_pool2d(h, 2) if level else h
    for _ in widths:
      weight, bias = (torch.from_numpy(state[f"features.{TORCHVISION[index]}.{name}"]) for name in ("weight", "bias"))
      h, index = torch.relu(functional.conv2d(h, weight, bias, padding=1)), index + 1
    maps.append(h.numpy().transpose(0, 2, 3, 1))
  return maps


@pytest.mark.parametrize(("suffix", "levels", "scale"), [(".safetensors", 3, "torchvision"), (".pth", 2, "caffe")])
def test_vgg_agrees_with_pytorch(state, suffix, levels, scale, tmp_path):
  path = tmp_path / f"vgg{suffix}"
  if suffix == ".pth":
    import torch

    torch.save({name: torch.from_numpy(value) for name, value in state.items()}, path)
  else:
    safetensors.numpy.save_file(state, path)
  made = features.vgg(str(path), levels=levels, scale=scale)
  x = images(18)
  if scale == "torchvision":
    scaled = ((x + 1) / 2 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
  else:
    scaled = (x[..., ::-1] + 1) * 127.5 - np.array([103.939, 116.779, 123.68])
  expected = torch_maps(state, np.asarray(scaled, np.float32), levels)
  actual = made.apply(made.load(), x)
  assert [one.shape for one in actual] == [one.shape for one in expected]
  for one, two in zip(actual, expected, strict=True):
    np.testing.assert_allclose(one, two, atol=2e-5 * np.abs(two).max())


def test_the_shapes_of_vgg_need_no_file(state):
  shapes = features.vgg("", levels=2).load.shapes()
  assert shapes["conv_1_1"]["kernel"].shape == (3, 3, 128, 128)
  with pytest.raises(ValueError, match=r"Got no weights for features.vgg; expected a file"):
    features.vgg("", levels=2).load()


def test_maps_of_inception_have_the_means_of_its_features(tmp_path, monkeypatch):
  x = images(299, 1, 1)
  params = jax.jit(Inception(("768",)).init)(jax.random.key(0), jnp.zeros((1, 299, 299, 3)))["params"]
  color = jnp.repeat((x + 1) * 127.5, 3, -1)
  taps = jax.jit(lambda x: Inception(("64", "192", "768")).apply({"params": params}, (x - 128) / 128))(color)
  monkeypatch.setattr(inception, "load", lambda path, sha256_prefix: inception.InceptionWeights(params, "", False))
  (tmp_path / "weights.pth").touch()
  made = features.inception(str(tmp_path / "weights.pth"), levels=3)
  maps = jax.jit(lambda frozen: made.apply(frozen, x))(made.load())
  for name, one in zip(("64", "192", "768"), maps, strict=True):
    np.testing.assert_allclose(one.mean((1, 2)), taps[name], rtol=1e-3, atol=1e-5)
  few = features.inception(str(tmp_path / "weights.pth"), levels=1)
  assert few.load().keys() == {"Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"}


@pytest.mark.parametrize(("levels", "side"), [(1, 11), (2, 27), (3, 43), (4, 75)])
def test_inception_names_the_smallest_images(levels, side):
  def shapes(side):
    x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return jax.eval_shape(lambda x: Inception().init_with_output(jax.random.key(0), x, levels)[0], x)

  assert all(min(one.shape) >= 1 for one in shapes(side))
  with pytest.raises(ValueError, match=f"sides of at least {side}"):
    shapes(side - 1)


def test_the_classifier_of_scores_gives_maps(tmp_path):
  network, x = ImageClassifier(10), images(8, 1)
  params = network.init(jax.random.key(0), x)["params"]
  path = tmp_path / "classifier.safetensors"
  metrics.save_classifier(path, jax.device_get(params), {})
  made = features.classifier(str(path))
  maps = made.apply(made.load(), x)
  assert [one.shape for one in maps] == [(2, 8, 8, 32), (2, 4, 4, 64), (2, 2, 2, 64)]
  hidden, _ = network.apply({"params": params}, x)
  last = jnp.concatenate([maps[-1].mean((1, 2)), maps[-1].max((1, 2))], -1)
  np.testing.assert_allclose(hidden, last @ params["hidden"]["kernel"] + params["hidden"]["bias"], rtol=1e-5, atol=1e-5)
  with pytest.raises(
    ValueError, match=r"images with 3 channel\(s\) for a classifier that was trained on images with 1"
  ):
    made.apply(made.load(), images(8))
  safetensors.numpy.save_file({"a/b": np.zeros(1)}, path)
  with pytest.raises(ValueError, match="as a classifier of real images"):
    made.load()


def test_a_file_of_the_user_may_define_features(tmp_path):
  path = tmp_path / "my_file.py"
  path.write_text(
    "import jax.numpy as jnp\n"
    "from ddpm_jax import losses\n"
    "def my_features(power: int = 2) -> losses.Features:\n"
    "  return losses.Features(lambda frozen, images: [frozen * images**power], lambda: jnp.ones(()))\n"
  )
  config = set_keys(tiny_config(), model__network="Autoencoder(channels=8, groups=4, multipliers=(1, 2))")
  config = set_keys(config, task="autoencode", objective=f"autoencoding(perceptual='{path}:my_features(power=3)')")
  tree = tree_of(config)
  assert tree.at("objective.perceptual.power") == 3
  objective = configs.build(tree).objective
  assert objective.load() == 1
  with pytest.raises(ValueError, match="objective.perceptual.powr"):
    configs.replace(tree, "objective.perceptual", f"{path}:my_features(powr=3)")


def test_wrong_data_and_levels_are_refused():
  with pytest.raises(ValueError, match="expected 1 to 5"):
    features.vgg(levels=6)
  with pytest.raises(ValueError, match="expected 1 to 4"):
    features.inception(levels=0)
  with pytest.raises(ValueError, match="scale='rgb'"):
    features.vgg(scale="rgb")
  with pytest.raises(ValueError, match="for features of images; expected"):
    features.vgg().apply({}, images(8, 2))
  with pytest.raises(ValueError, match="with sides of at least 16"):
    VGG16().init(jax.random.key(0), images(8))
