"""Test codecs, encoding and decoding in tiles, data sets of latents, and editing with models of latents."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddpm_jax import config as configs
from ddpm_jax import data, editing, gaussian, randomness, runs
from ddpm_jax.models import tiles
from ddpm_jax.runs import latents, scoring, stepping
from tests import user_components
from tests.recipes import newest_state, tiny_config, tree_of

pytestmark = pytest.mark.usefixtures("dense_module", "on_one_device")

SHAPE = (8, 8, 1)


def keys(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


def images(count, shape=SHAPE):
  return np.random.default_rng(0).uniform(-1, 1, (count, *shape)).astype(np.float32)


# Codecs and posteriors


def test_the_kl_divergence_equals_its_integral():
  mean, log_variance = np.float64(0.7), np.float64(-1.3)
  z = np.linspace(-12, 12, 200_001)
  log_q = -0.5 * ((z - mean) ** 2 * np.exp(-log_variance) + log_variance + np.log(2 * np.pi))
  log_p = -0.5 * (z**2 + np.log(2 * np.pi))
  expected = np.trapezoid(np.exp(log_q) * (log_q - log_p), z)
  moments = jnp.asarray([[[mean, mean, log_variance, log_variance]]] * 3, jnp.float32)
  np.testing.assert_allclose(gaussian.from_moments(moments).kl(), [2 * expected] * 3, rtol=1e-5)


def test_log_variances_are_clipped_and_samples_have_the_moments():
  distribution = gaussian.from_moments(jnp.asarray([[1.0, -50.0], [-1.0, 50.0]]))
  np.testing.assert_array_equal(distribution.log_variance, [[-30], [20]])
  many = gaussian.from_moments(jnp.broadcast_to(jnp.asarray([2.0, np.log(9.0)]), (40_000, 2)))
  drawn = np.asarray(many.sample(keys(40_000)))
  assert abs(drawn.mean() - 2) < 4 * 3 / 200
  assert abs(drawn.std() - 3) < 0.05
  np.testing.assert_array_equal(many.mode(), many.mean)


@pytest.mark.parametrize("bottleneck", ["kl", "vq"])
def test_a_codec_scales_latents_and_decodes_what_the_autoencoder_decodes(bottleneck):
  codec = user_components.tiny_autoencoder(SHAPE, posterior="mode", bottleneck=bottleneck)
  frozen, x = codec.load(), images(3)
  module = user_components.Autoencoder(1, 2, 4, (1, 1), 1, False, bottleneck, 8 if bottleneck == "vq" else 0, groups=2)

  def call(method, *arguments):
    return module.apply({"params": frozen["autoencoder"]}, *arguments, method=method)

  encoded = call("encode", x)
  z = call("quantize", encoded)[1] if bottleneck == "vq" else encoded[..., :2]
  np.testing.assert_allclose(codec.encode(frozen, keys(3), x), (z - frozen["shift"]) * frozen["scale"], atol=1e-6)
  reconstruction = codec.decode(frozen, codec.encode(frozen, keys(3), x))
  np.testing.assert_allclose(reconstruction, call("decode", z), atol=1e-5)
  assert codec.is_latent
  assert codec.shape(SHAPE) == (4, 4, 2)
  compact = codec.compress(frozen, x)
  assert (compact.dtype, compact.shape) == (
    (jnp.int32, (3, 4, 4)) if bottleneck == "vq" else (jnp.float32, (3, 4, 4, 4))
  )


def test_latents_of_another_autoencoder_are_refused():
  codec = user_components.tiny_autoencoder(SHAPE)
  frozen = codec.load()
  with pytest.raises(
    ValueError, match=r"Got x of shape \(1, 4, 4, 5\) .* 2 latent channels; expected a last axis of 2"
  ):
    codec.decode(frozen, jnp.zeros((1, 4, 4, 5)))
  with pytest.raises(ValueError, match=r"Got moments of shape \(1, 4, 4, 6\) .* expected a last axis of 4"):
    codec.expand(frozen, keys(1), jnp.zeros((1, 4, 4, 6)))


def test_the_posterior_and_the_noise_of_training_are_independent():
  codec = user_components.tiny_autoencoder(SHAPE)
  frozen, count = codec.load(), 4000
  moments = jnp.zeros((count, 1, 1, 4))
  drawn = (np.asarray(codec.expand(frozen, keys(count), moments)) / frozen["scale"] + frozen["shift"]).reshape(count, 2)
  for number in range(3):
    noise = np.asarray(randomness.normal(randomness.fold_in(keys(count), number), (count, 1, 1, 2))).reshape(count, 2)
    assert np.abs(np.corrcoef(drawn.T, noise.T)[:2, 2:]).max() < 4 / count**0.5
  # One key for the batch also works, and a sample depends on its own key alone.
  assert codec.expand(frozen, jax.random.key(0), moments).shape == moments[..., :2].shape
  np.testing.assert_array_equal(
    codec.expand(frozen, keys(count)[:3], moments[:3]), codec.expand(frozen, keys(count), moments)[:3]
  )


def test_shapes_are_known_without_reading_the_weights():
  from ddpm_jax.models.codecs import Loader, frozen_shapes

  def load():
    raise AssertionError("The weights were read.")

  assert frozen_shapes(Loader(load, lambda: "shapes")) == "shapes"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [({"posterior": "mean"}, "posterior"), ({"tile": 7}, "Got tile=7"), ({"tile": -8}, "Got tile=-8")],
)
def test_wrong_arguments_of_a_codec_are_errors(arguments, message):
  with pytest.raises(ValueError, match=message):
    user_components.tiny_autoencoder(SHAPE, **arguments)


# Tiles


@pytest.mark.parametrize(
  ("shape", "tile"), [((20, 20), 8), ((9, 31), 8), ((8, 40), 16), ((33, 10), 9), ((7, 11, 13), 8)]
)
def test_tiles_of_a_local_function_give_its_result(shape, tile):
  x = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype(np.float32)

  def enlarge(x):
    for axis in range(1, x.ndim - 1):
      x = jnp.repeat(x, 2, axis)
    return 3 * x[..., :2] + 1

  np.testing.assert_allclose(tiles.apply(enlarge, x, tile), enlarge(x), atol=1e-5)


def test_tiles_of_a_function_that_shrinks_start_at_whole_results():
  x = np.random.default_rng(0).normal(size=(2, 36, 52, 1)).astype(np.float32)

  def shrink(x):
    return x.reshape(x.shape[0], x.shape[1] // 4, 4, x.shape[2] // 4, 4, -1).mean((2, 4))

  np.testing.assert_allclose(tiles.apply(shrink, x, 16, 4), shrink(x), atol=1e-6)


def test_tiles_bound_the_memory_and_show_no_seam():
  def wide(x):
    return jnp.tanh(jnp.repeat(x, 256, -1) * jnp.arange(256)).sum(-1, keepdims=True)

  x = np.random.default_rng(0).normal(size=(1, 256, 256, 1)).astype(np.float32)

  def temporary_bytes(function):
    return jax.jit(function).lower(x).compile().memory_analysis().temp_size_in_bytes

  assert temporary_bytes(lambda x: tiles.apply(wide, x, 32)) < 2**22 < x.size * 256

  def blur(x):
    windows = [jnp.roll(jnp.pad(x, ((0, 0), (2, 2), (0, 0), (0, 0)), "edge"), shift, 1) for shift in range(-2, 3)]
    return sum(windows)[:, 2:-2] / 5

  smooth = np.cumsum(x, 1)
  # Near its edges, a tile lacks pixels that the blur reads, but there its weight is small.
  difference = np.abs(blur(smooth) - tiles.apply(blur, smooth, 64))[:, 4:-4]
  steps = np.abs(np.diff(smooth, axis=1))
  assert difference.max() < 0.1 * steps.max()


# Latent data sets


@pytest.fixture
def unscored(monkeypatch):
  """Skip scores at the end of runs."""
  monkeypatch.setattr(scoring.Scorer, "score", lambda *_: None)


@pytest.fixture
def mine(tmp_path):
  """Return the path of a file with custom components."""
  shutil.copy(user_components.__file__, tmp_path / "mine.py")
  return tmp_path / "mine.py"


def latent_tree(mine, arguments="seed=0", **keys):
  config = tiny_config()
  config.training.update({"steps": 2, "checkpoint_every": 2, "sample_every": 2, "log_every": 1})
  config.sampling.clip = None
  config.model.codec = f"{mine}:tiny_autoencoder"
  tree = configs.replace(tree_of(config), "model.codec", f"{mine}:tiny_autoencoder({arguments})")
  for name, value in keys.items():
    tree = configs.replace(tree, name.replace("__", "."), value)
  return tree


@pytest.mark.parametrize("bottleneck", ["kl", "vq"])
def test_latents_and_the_encoder_give_the_same_losses(bottleneck, mine, tmp_path, unscored):
  codec = f"seed=0, bottleneck={bottleneck}"
  runs.run_prepare(configs.build(latent_tree(mine, codec, data__flip=True)), tmp_path / "latents")
  folders = {"": tmp_path / "encoder", str(tmp_path / "latents"): tmp_path / "run"}
  for path, folder in folders.items():
    runs.run_train(latent_tree(mine, codec, data__flip=True, data__latents=path), folder)
  found = [
    [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    for folder in folders.values()
  ]
  assert len(found[0]) == 2
  np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_training_on_latents_resumes_bit_exactly_and_saves_no_codec(mine, tmp_path, unscored, encoded):
  for folder, lengths in (("resumed", (2, 4)), ("unbroken", (4,))):
    for steps in lengths:
      runs.run_train(latent_tree(mine, data__latents=str(encoded), training__steps=steps), tmp_path / folder)
  states = [newest_state(tmp_path / folder) for folder in ("resumed", "unbroken")]
  jax.tree.map(np.testing.assert_array_equal, *states)
  shapes = {leaf.shape for leaf in jax.tree.leaves(states[0])}
  codec = configs.build(latent_tree(mine)).model.load_frozen()["codec"]["autoencoder"]
  assert not shapes & {leaf.shape for leaf in jax.tree.leaves(codec) if leaf.ndim > 1}


def test_a_batch_of_latents_has_the_encoding_of_the_flipped_image(mine, tmp_path):
  experiment = configs.build(
    latent_tree(mine, "posterior=mode", data__flip=True, data__latents=str(tmp_path / "latents"))
  )
  runs.run_prepare(experiment, tmp_path / "latents")
  source = data.load(experiment.data.source(data.Fit((8, 8), 1)), hold_out=100).train
  stored, frozen = latents.open_latents(experiment, source), experiment.model.load_frozen()
  pairs = [next(data.batches(one, 16, seed=3, flip=True)) for one in (source, stored)]
  x = [stepping.encode(experiment.model, frozen, keys(16), batch)["x"] for batch in pairs]
  np.testing.assert_allclose(*x, atol=1e-5)
  np.testing.assert_array_equal(*[batch["classes"] for batch in pairs])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"arguments": "seed=1"}, "encoded by another autoencoder"),
    ({"data__flip": True}, "encoded without mirror images"),
    ({"data__hold_out": 101}, "encoded from 1,697 images, for 1,696 training images"),
    ({"data__crop": 4}, "encoded with crop=0; expected crop=4"),
    ({"model__codec": "pixels"}, "for a model without an autoencoder"),
    ({"model__conditions__low": "low_resolution(factor=2)"}, "computed from images"),
  ],
)
def test_latents_that_do_not_fit_are_refused(change, message, mine, tmp_path, unscored, encoded):
  arguments = change.pop("arguments", "seed=0")
  tree = latent_tree(mine, arguments, data__latents=str(encoded), **change)
  with pytest.raises(ValueError, match=message):
    runs.run_train(tree, tmp_path / "run")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
  """Return a folder of encoded digits."""
  folder = tmp_path_factory.mktemp("latents")
  shutil.copy(user_components.__file__, folder / "mine.py")
  runs.run_prepare(configs.build(latent_tree(folder / "mine.py")), folder / "encoded")
  return folder / "encoded"


def test_broken_or_missing_latents_are_errors(mine, tmp_path, encoded, monkeypatch):
  with pytest.raises(ValueError, match="--output"):
    runs.run_prepare(configs.build(latent_tree(mine)), None)
  with pytest.raises(ValueError, match="not an empty folder"):
    runs.run_prepare(configs.build(latent_tree(mine)), encoded)
  experiment = configs.build(latent_tree(mine, data__latents=str(tmp_path)))
  with pytest.raises(ValueError, match="holds no encoded data"):
    latents.open_latents(experiment, range(3))
  batch = data.read(data.PackedSource(encoded), [0, 1])
  batch[data.LATENT][1, 0, 0] = np.nan
  with pytest.raises(ValueError, match=r"latents with NaN or infinite values from config.data.latents"):
    data.finish_batch(batch)
  broken = configs.build(latent_tree(mine))
  codec = broken.model.codec._replace(compress=lambda frozen, x: jnp.full((len(x), 4, 4, 4), jnp.nan))
  broken = broken._replace(model=broken.model._replace(codec=codec))
  with pytest.raises(ValueError, match="moments with NaN or infinite values for images 0 to"):
    runs.run_prepare(broken, tmp_path / "new")
  assert not (tmp_path / "new").exists()


def test_latents_are_not_clipped_to_the_range_of_pixels(mine):
  with pytest.raises(ValueError, match=r"Set --config.sampling.clip=None"):
    configs.build(configs.replace(latent_tree(mine), "sampling.clip", "clip"))
  configs.build(configs.replace(latent_tree(mine), "sampling.clip", "clip(low=-4, high=4)"))


# Edits


def test_a_mask_at_the_resolution_of_x_keeps_positions_whose_pixels_are_all_known():
  keep = np.ones((2, 4, 6, 1), bool)
  keep[0, 1, 2], keep[1, 3, 5] = False, False
  found = editing.shrink_mask(jnp.asarray(keep), (2, 3, 7))
  expected = np.ones((2, 2, 3, 1), bool)
  expected[0, 0, 1], expected[1, 1, 2] = False, False
  np.testing.assert_array_equal(found, expected)


def test_decoded_estimates_keep_known_pixels():
  image, keep = jnp.full((1, 4, 4, 1), jnp.nan).at[:, :2].set(0.5), jnp.zeros((1, 4, 4, 1), bool).at[:, :2].set(True)
  denoise = editing.replace_decoded(lambda x_t, t: 0.1 * x_t, image, keep, lambda data: 2 * data, lambda x: x / 2)
  found = denoise(jnp.ones((1, 4, 4, 1)), jnp.ones(1))
  np.testing.assert_allclose(found[:, :2], 1.0)
  np.testing.assert_allclose(found[:, 2:], 0.1, rtol=1e-6)
  with pytest.raises(ValueError, match="image"):
    editing.replace_decoded(denoise, image.astype(int), keep, lambda data: data, lambda x: x)


def test_models_of_latents_edit_images_and_refuse_measurements(mine, tmp_path, unscored):
  tree = latent_tree(mine)
  runs.run_train(tree, tmp_path / "run")
  np.savez(tmp_path / "images.npz", images=np.full((2, 8, 8, 1), 200, np.uint8))
  mask = np.zeros((8, 8), np.uint8)
  mask[:5] = 255
  Image.fromarray(mask).save(tmp_path / "mask.png")

  def edit(task, method=None, operator=None, **options):
    changed = tree if method is None else configs.replace(tree, "editing.method", method)
    changed = changed if operator is None else configs.replace(changed, "editing.operator", operator)
    edit = runs.Edit(task, tmp_path / "images.npz", **options)
    runs.run_edit(configs.build(changed), tmp_path / "run", edit, seed=0, choice=runs.WeightsChoice())

  for task in ("img2img", "invert", "interpolate"):
    edit(task)
  painted = {"mask": str(tmp_path / "mask.png")}
  for method in ("repaint(resamples=2)", "replace", "replace_decoded"):
    edit("inpaint", method, **painted)
    with np.load(tmp_path / "run" / "edits" / f"inpaint_{method.partition('(')[0]}_seed0.npz") as found:
      np.testing.assert_array_equal(found["output"][:, :, 5:], 200)
      assert (found["output"][:, :, :5] != 200).any()
  with pytest.raises(ValueError, match=r"Got --task=inpaint without --method .* --method=replace_decoded"):
    edit("inpaint", **painted)
  with pytest.raises(ValueError, match=r"because pixels are measured.* To inpaint, use --method=replace"):
    edit("inpaint", "dps", **painted)
  with pytest.raises(ValueError, match="because pixels are measured"):
    edit("restore", "dps", operator="blur(std=1)")


def test_models_of_latents_form_a_cascade(mine, tmp_path, unscored):
  large = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 1), np.uint8)
  np.savez(tmp_path / "data.npz", images=large)
  data_keys = {
    "data__source": f"arrays(path='{tmp_path / 'data.npz'}')",
    "data__image_size": 16,
    "data__hold_out": 5,
    "evaluation__num_samples": 4,
    "evaluation__k": 2,
  }
  runs.run_train(latent_tree(mine), tmp_path / "base")
  upsampler = latent_tree(mine, model__conditions__low="low_resolution(factor=2)", **data_keys)
  runs.run_train(upsampler, tmp_path / "large")
  experiment = runs.load_experiment(None, tmp_path / "base")
  sample = functools.partial(runs.run_sample, num_samples=3, seed=0, choice=runs.WeightsChoice())
  sample(experiment, tmp_path / "base", upsamplers=[tmp_path / "large"])
  (path,) = (tmp_path / "base" / "samples").glob("*.npz")
  with np.load(path) as found:
    assert found["stage_0"].shape == (3, 8, 8, 1)
    assert found["samples"].shape == (3, 16, 16, 1)
