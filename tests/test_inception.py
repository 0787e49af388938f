"""Test the FID Inception network, its resizing and its weights against torch-fidelity and clean-fid."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from ddpm_jax import metrics
from ddpm_jax.interop import inception
from ddpm_jax.metrics import evaluate
from ddpm_jax.networks.inception import TAPS, Inception
from tests import fidelity

SHAPES = {"small": (2, 32, 32, 3), "wide": (2, 20, 47, 3), "large": (1, 310, 333, 3)}


def images_of(shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def as_torch(images):
  return torch.tensor(images.transpose(0, 3, 1, 2))


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
  """Return torch-fidelity's network and the file of its random weights."""
  path = tmp_path_factory.mktemp("weights") / "random.pth"
  return fidelity.random_inception(path), path


@pytest.fixture(scope="module")
def weights(peer):
  return inception.load(peer[1], sha256_prefix="")


def test_all_taps_match_torch_fidelity(peer, weights):
  network, _ = peer
  inner = {}
  handle = network.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, result: inner.update(branch=result))
  images = images_of(SHAPES["small"])
  with torch.no_grad():
    expected = dict(zip(network.features_list, map(np.asarray, network(as_torch(images))), strict=True))
  handle.remove()
  # guided-diffusion's evaluator uses the first 7 channels of 'mixed_6/conv:0', the output of the ReLU, with channels
  # last.
  expected["spatial"] = inner["branch"][:, :7].permute(0, 2, 3, 1).reshape(len(images), -1).numpy()
  assert set(expected) == set(TAPS)

  def apply(params, x):
    return Inception(taps=TAPS).apply({"params": params}, (metrics.resize_tf1(x) - 128) / 128)

  result = jax.jit(apply)(weights.params, images.astype(np.float32))
  for tap in TAPS:
    assert result[tap].shape == expected[tap].shape
    assert np.max(np.abs(result[tap] - expected[tap])) < 1e-4 * expected[tap].std(), tap


def test_a_feature_space_accepts_gray_and_color_images(peer, weights):
  """A gray image has the same features as the color image with three equal channels."""
  space = metrics.inception_space(weights.params, sha256=weights.sha256, published=weights.is_published)
  extract = metrics.extractor(space, 1, jax.devices()[:1])
  gray = images_of((1, 32, 32, 1))
  taps = extract(gray)
  assert {name: tap.shape for name, tap in taps.items()} == {
    "features": (1, 2048),
    "log_probs": (1, 1008),
    "spatial": (1, 2023),
  }
  with torch.no_grad():
    result = dict(zip(peer[0].features_list, peer[0](as_torch(np.repeat(gray, 3, -1))), strict=True))
  expected = torch.log_softmax(result["logits_unbiased"], 1).numpy()
  assert np.max(np.abs(taps["log_probs"] - expected)) < 1e-4 * expected.std()
  assert np.max(np.abs(taps["features"] - result["2048"].numpy())) < 1e-4 * result["2048"].numpy().std()
  assert evaluate.score_names(space)["frechet"] == "frechet_distance", "random weights do not compute an FID"
  published = metrics.inception_space(weights.params, resize="clean", published=True)
  assert evaluate.score_names(published)["frechet"] == "clean_fid"
  assert evaluate.score_names(published._replace(provenance={"published": True, "resize": "tf1"}))["frechet"] == "fid"


def test_only_requested_taps_are_computed():
  x = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)

  def size(taps):
    params = jax.eval_shape(Inception(taps=taps).init, jax.random.key(0), x)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))

  sizes = [size((tap,)) for tap in ("64", "192", "768", "2048", "logits")]
  assert sizes == sorted(sizes)
  assert sizes[0] < 1e-2 * sizes[-1]
  assert size(("spatial",)) == size(("768",))
  for taps in (("1024",), ()):
    with pytest.raises(ValueError, match="expected some of 64, 192"):
      size(taps)


@pytest.mark.parametrize("name", SHAPES)
def test_resizing_matches_the_peers(name):
  images = images_of(SHAPES[name])
  resize = fidelity.import_module(
    "torch_fidelity.interpolate_compat_tensorflow"
  ).interpolate_bilinear_2d_like_tensorflow1x
  expected = resize(as_torch(images).float(), (299, 299), align_corners=False).numpy().transpose(0, 2, 3, 1)
  np.testing.assert_allclose(metrics.resize_tf1(images.astype(np.float32)), expected, atol=1e-4)
  clean = fidelity.import_module("cleanfid.resize").build_resizer("clean")
  np.testing.assert_allclose(metrics.resize_clean(images), np.stack([clean(image) for image in images]), atol=1e-3)


def test_images_of_other_channels_or_types_are_refused(weights):
  space = metrics.inception_space(weights.params)
  with pytest.raises(ValueError, match="2 channels"):
    space.prepare(images_of((1, 8, 8, 2)))
  with pytest.raises(ValueError, match="expected uint8"):
    space.prepare(np.zeros((1, 8, 8, 3), np.float32))
  with pytest.raises(ValueError, match="resize='bilinear'"):
    metrics.inception_space(weights.params, resize="bilinear")


def test_converted_weights_are_equal_and_keep_their_hash(peer, weights, tmp_path):
  _, path = peer
  output = tmp_path / "new" / "inception.safetensors"
  inception.convert(path, output, sha256_prefix="")
  converted = inception.load(output, sha256_prefix="")
  assert converted.sha256 == weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
  assert not converted.is_published
  assert [file.name for file in output.parent.iterdir()] == [output.name]
  for a, b in zip(jax.tree.leaves(converted.params), jax.tree.leaves(weights.params), strict=True):
    np.testing.assert_array_equal(a, b)
  with pytest.raises(ValueError, match="which exists"):
    inception.convert(path, output, sha256_prefix="")
  with pytest.raises(ValueError, match="ends in .safetensors"):
    inception.convert(path, tmp_path / "inception.npz", sha256_prefix="")
  with pytest.raises(
    ValueError, match=f"{weights.sha256}; expected the published weights with a SHA-256 that begins with 6726825d"
  ):
    inception.load(output)
  damaged = bytearray(output.read_bytes())
  damaged[-40] ^= 1
  output.write_bytes(damaged)
  with pytest.raises(
    ValueError, match=r"inception\.safetensors, which is damaged: its tensors were changed after they were written"
  ):
    inception.load(output, sha256_prefix="")
  output.write_bytes(bytes(damaged[:1000]))
  with pytest.raises(ValueError, match="truncated"):
    inception.load(output, sha256_prefix="")


def test_paths_may_start_with_a_tilde_and_a_failed_write_leaves_no_file(peer, tmp_path, monkeypatch):
  _, path = peer
  monkeypatch.setenv("HOME", str(path.parent))
  # A shell does not expand the tilde in --output=~/... .
  inception.convert(f"~/{path.name}", "~/new/inception.safetensors", sha256_prefix="")
  assert (path.parent / "new" / "inception.safetensors").is_file()

  def fill_up(arrays, name, metadata):
    name.write_bytes(b"half")
    raise OSError("No space left on device")

  monkeypatch.setattr(safetensors.numpy, "save_file", fill_up)
  with pytest.raises(OSError, match="No space"):
    inception.convert(path, tmp_path / "other.safetensors", sha256_prefix="")
  assert not list(tmp_path.iterdir())


def test_weights_with_a_name_prefix_load(peer, weights, tmp_path):
  state = torch.load(peer[1], weights_only=True)
  torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}, tmp_path / "a.pth")
  result = inception.load(tmp_path / "a.pth", sha256_prefix="")
  jax.tree.map(np.testing.assert_array_equal, result.params, weights.params)


def test_other_files_are_refused_with_their_hash(peer, tmp_path):
  _, path = peer
  for expected in ("", tmp_path / "none.pth"):
    with pytest.raises(
      ValueError, match=r"expected the published file: pt_inception-2015-12-05-6726825d.pth.*--inception_weights"
    ):
      inception.load(expected)
  with pytest.raises(ValueError, match=hashlib.sha256(path.read_bytes()).hexdigest()):
    inception.load(path)
  page = tmp_path / "page.pth"
  page.write_text("<html>Not found</html>")
  with pytest.raises(ValueError, match=r"22 bytes.*with a SHA-256 that begins with 6726825d"):
    inception.load(page)
  with pytest.raises(ValueError, match="Cannot read"):
    inception.load(page, sha256_prefix="")
  state = torch.load(path, weights_only=True)
  del state["Mixed_6c.branch7x7_2.bn.running_var"]
  torch.save(state, tmp_path / "less.pth")
  with pytest.raises(ValueError, match="1 missing: Mixed_6c.branch7x7_2.bn.running_var"):
    inception.load(tmp_path / "less.pth", sha256_prefix="")
