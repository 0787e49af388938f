"""Test edits with tiny models in one process: all tasks and methods, and errors before any work starts."""

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import config as configs
from ddpm_jax import editing, runs
from ddpm_jax.config import spec
from ddpm_jax.storage import files
from tests.parameters import use_dense, write_run
from tests.recipes import tiny_config

pytestmark = pytest.mark.usefixtures("on_one_device")


SMALL = {
  "channels": 8,
  "multipliers": (1,),
  "blocks": 1,
  "groups": 4,
  "attention_levels": (),
  "middle_attention": False,
}
# Arguments that make methods quick in tests: few repetitions.
METHODS = {
  "repaint": spec("editing.repaint", resamples=2),
  "posterior": spec("editing.posterior", noise_std=0.02, iterations=2),
}


def config_of(classes, dropout=0.0):
  config = tiny_config()
  config.model.conditions = {"classes": spec("conditions.classes", number=classes, dropout=dropout)}
  return config


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """Make untrained runs, images and a mask.

  The runs: `gray`, a dense network for digits with class dropout; `unet`, a U-Net with the data and classes of `gray`;
  `judge`, a classifier of digits; `color`, a model that always takes a class.
  """
  root, generator = tmp_path_factory.mktemp("editing"), np.random.default_rng(0)
  images, classes = generator.integers(0, 256, (40, 8, 8, 3), np.uint8), np.arange(40) % 2
  np.savez(root / "data.npz", images=images, classes=classes)
  gray, color = config_of(10, dropout=0.1), config_of(2)
  color.data.source = spec("data.arrays", path=str(root / "data.npz"))
  color.data.update({"channels": 3, "hold_out": 10})
  judge = tiny_config()
  judge.task, judge.objective = "classify", "classification"
  judge.model.network = spec("networks.Classifier", out_channels=10, **SMALL)
  for number, (name, config) in enumerate({"unet": gray, "judge": judge, "color": color}.items()):
    write_run(config, root / name, number)
  with pytest.MonkeyPatch.context() as patch:
    use_dense(patch)
    write_run(gray, root / "gray")
  for name, shape in (("two", (2, 8, 8, 1)), ("three", (3, 8, 8, 1)), ("small", (2, 4, 4, 1)), ("odd", (2, 3, 3, 1))):
    np.savez(root / f"{name}.npz", images=generator.integers(0, 256, shape, np.uint8))
  np.savez(root / "colors.npz", images=np.stack([np.full((8, 8, 3), value, np.uint8) for value in (40, 210)]))
  (root / "files").mkdir()
  for name in ("b", "a"):
    Image.fromarray(generator.integers(0, 256, (8, 8), np.uint8)).save(root / "files" / f"{name}.png")
  Image.fromarray(np.where(generator.random((8, 8)) < 0.4, 255, 0).astype(np.uint8)).save(root / "mask.png")
  return root


def experiment_of(root, run, keys):
  """Return a run's experiment with changed keys, such as `editing__strength=1.0` for editing.strength."""
  experiment = runs.load_experiment(configs.read_run(root / run), root / run)
  return experiment.replace(**keys)


def edit(root, task, source="two.npz", *, run="gray", mask="", results=1, seed=0, steering=None, scale=None, **keys):
  """Run an edit with changed keys, and return the arrays that it saves."""
  method = keys.pop("editing__method", "repaint" if task == "inpaint" else None)
  keys = {"editing__frames": 3, "editing__method": METHODS.get(method, method)} | keys
  experiment, folder = experiment_of(root, run, keys), root / run / "edits"
  before = set(folder.glob("*"))
  request = runs.Edit(task, None if source is None else root / source, mask, results)
  options = {
    "seed": seed,
    "choice": runs.WeightsChoice(),
    "steering": runs.Steering(**(steering or {})),
    "scale": scale,
  }
  runs.run_edit(experiment, root / run, request, **options)
  arrays, picture = sorted(set(folder.glob("*")) - before, key=lambda path: path.suffix)
  assert (arrays.suffix, picture.suffix) == (".npz", ".png")
  assert arrays.name.startswith(task)
  with Image.open(picture) as file:
    assert min(file.size) > 90, "the picture has two or more rows and columns"
  with np.load(arrays) as file:
    edited = {name: file[name] for name in file.files}
  assert edited["output"].dtype == np.uint8
  return edited


def images_of(root, name):
  with np.load(root / name) as file:
    return file["images"]


def sampled(root, classes, seed, sampler=None, scale=None, **steering):
  """Return the samples that `run_sample` saves."""
  experiment, folder = experiment_of(root, "gray", sampler or {}), root / "gray" / "samples"
  guidance = runs.Steering(classes_of(classes), **steering)
  before = set(folder.glob("*.npz"))
  options = {"seed": seed, "choice": runs.WeightsChoice(), "steering": guidance, "scale": scale}
  runs.run_sample(experiment, root / "gray", num_samples=len(classes), **options)
  (path,) = set(folder.glob("*.npz")) - before
  assert ("_scale3" in path.name) == (scale == 3)
  with np.load(path) as file:
    np.testing.assert_array_equal(file["classes"], classes)
    return file["samples"]


def classes_of(numbers):
  """Return classes in the form of `Steering.given`."""
  return {"classes": [str(number) for number in numbers]}


@pytest.mark.parametrize(
  ("method", "source", "mask"),
  [
    (None, "files", "mask.png"),
    ("replace", "two.npz", "lower"),
    ("posterior", "two.npz", "left"),
    ("dps", "two.npz", "upper"),
  ],
)
def test_inpainting_does_not_change_known_pixels(root, method, source, mask, dense):
  path = str(root / mask) if mask.endswith("png") else mask
  edited = edit(root, "inpaint", source, mask=path, results=2, editing__method=method)
  assert (root / "gray" / "edits" / f"inpaint_{method or 'repaint'}_seed0.npz").exists()
  if mask.endswith("png"):
    mask_array = np.asarray(Image.open(path))[..., None] > 0
    originals = np.stack([np.asarray(Image.open(root / "files" / f"{name}.png"))[..., None] for name in "ab"])
    assert list(edited["names"]) == ["a.png", "b.png"]
  else:
    half = np.arange(8) >= 4 if mask == "lower" else np.arange(8) < 4
    mask_array = np.broadcast_to((half if mask == "left" else half[:, None])[..., None], (8, 8, 1))
    originals = images_of(root, source)
    assert list(edited["names"]) == ["two.npz[0]", "two.npz[1]"]
  np.testing.assert_array_equal(edited["mask"], mask_array)
  np.testing.assert_array_equal(edited["input"], originals)
  assert edited["output"].shape == (2, 2, 8, 8, 1)
  known = np.broadcast_to(~mask_array, originals.shape)
  for index in range(2):
    output = edited["output"][:, index]
    np.testing.assert_array_equal(output[known], originals[known])
    assert np.mean(output[~known] != originals[~known]) > 0.5
  assert np.mean(edited["output"][:, 0] != edited["output"][:, 1]) > 0.1, "each result has its own noise"


def test_strength_0_returns_the_input_and_strength_1_a_new_sample(root, dense):
  """With strength 1, the two results for each of the two images equal four samples of `run_sample`."""
  steering = {"given": classes_of([3, 5])}
  edited = edit(root, "img2img", results=2, editing__strength=0.0, steering=steering)
  assert "mask" not in edited
  for index in range(2):
    np.testing.assert_array_equal(edited["output"][:, index], images_of(root, "two.npz"))
  fresh = edit(root, "img2img", results=2, editing__strength=1.0, steering=steering, seed=7)["output"]
  assert fresh.shape == (2, 2, 8, 8, 1)
  np.testing.assert_array_equal(fresh.reshape(4, 8, 8, 1), sampled(root, [3, 3, 5, 5], 7))
  batched = edit(root, "img2img", results=2, editing__strength=1.0, steering=steering, seed=7, sampling__batch_size=3)
  assert np.max(np.abs(batched["output"].astype(int) - fresh)) <= 1, "two batches give the same results as one"


def test_classes_and_guidance_act_in_edits_as_in_sampling(root, dense):
  negative = classes_of([1, 8])
  steering = {"given": classes_of([3]), "negative": negative}
  edited = edit(root, "img2img", editing__strength=1.0, guidance__scale=3.0, steering=steering)["output"][:, 0]
  np.testing.assert_array_equal(edited, sampled(root, [3, 3], 0, negative=negative, scale=3.0))
  none = edit(root, "img2img", editing__strength=0.75)["output"]
  # With a scale of 0 the class has no effect.
  four = {"given": classes_of([4])}
  zero = edit(root, "img2img", editing__strength=0.75, scale=0.0, steering=four)["output"]
  assert np.max(np.abs(none.astype(int) - zero)) <= 1
  other = edit(root, "img2img", editing__strength=0.75, scale=3.0, steering=four)["output"]
  assert np.any(none != other)


def test_guidance_scale_keeps_the_interval_of_the_config(root, dense):
  """`--guidance_scale` sets the scale inside the interval. The interval may contain none of the grid's noise levels."""

  def of(low, high):
    interval = spec("guidance.interval", scale=1.0, low=low, high=high)
    return sampled(root, [3, 5], 1, {"guidance": spec("guidance.classifier_free", scale=interval)}, scale=3.0)

  plain, always = sampled(root, [3, 5], 1), sampled(root, [3, 5], 1, scale=3.0)
  assert np.max(np.abs(of(1e6, 1e7).astype(int) - plain)) <= 1
  assert np.max(np.abs(of(0.0, float("inf")).astype(int) - always)) <= 1
  assert np.any(plain != always)


def test_other_runs_can_guide_samples_and_edits(root, dense):
  plain = sampled(root, [3, 5], 1)
  classifier_guided = sampled(root, [3, 5], 1, scale=3.0, classifier=root / "judge")
  assert np.any(classifier_guided != plain)
  steering = {"given": classes_of([3, 5]), "classifier": root / "judge"}
  edited = edit(root, "img2img", steering=steering, editing__strength=1.0, scale=3.0, seed=1)["output"]
  np.testing.assert_array_equal(edited[:, 0], classifier_guided)
  # The config may already contain the rule of classifier guidance.
  own = sampled(root, [3, 5], 1, {"guidance": "classifier(scale=3)"}, classifier=root / "judge", scale=3.0)
  np.testing.assert_array_equal(own, classifier_guided)
  # Guidance away from the model itself has no effect.
  assert np.max(np.abs(sampled(root, [3, 5], 1, scale=3.0, weak=root / "gray").astype(int) - plain)) <= 1


@pytest.mark.parametrize("method", ["posterior", "dps"])
@pytest.mark.parametrize("task", ["superres", "colorize"])
def test_results_agree_with_their_measurement(root, task, method):
  """On average, the measurement of a result is closer to the input of the result than to the other input."""
  if task == "superres":
    edited = edit(root, task, "small.npz", run="unet", editing__method=method)
    assert edited["output"].shape == (2, 1, 8, 8, 1)
    known, measured = edited["input"], np.asarray(editing.downsample(2)(edited["output"][:, 0].astype(np.float32)))
  else:
    # A model that always takes a class, guided away from another class.
    steering = {"given": classes_of([0]), "negative": classes_of([1])}
    strong = "dps(scale=3.0)" if method == "dps" else method
    options = {"run": "color", "editing__method": strong, "guidance__scale": 2.0}
    edited = edit(root, task, "colors.npz", steering=steering, **options)
    assert edited["output"].shape == (2, 1, 8, 8, 3)
    weights = np.array([0.299, 0.587, 0.114])
    known, measured = edited["input"] @ weights, edited["output"][:, 0] @ weights
  own, other = (np.mean(np.abs(a.astype(float) - measured)) for a in (known, known[::-1]))
  assert own < other


def test_images_are_inverted_and_interpolated(root, dense):
  steering = {"given": classes_of([2])}
  edited = edit(root, "invert", "three.npz", steering=steering)
  assert edited["latent"].shape == (3, 8, 8, 1)
  assert edited["latent"].dtype == np.float32
  assert edited["output"].shape == (3, 1, 8, 8, 1)
  assert np.any(edited["latent"][0] != edited["latent"][1])
  between = edit(root, "interpolate", "three.npz", steering=steering)["output"]
  assert between.shape == (2, 1, 3, 8, 8, 1)
  # The first and the last frame are the reconstructions of the two images.
  ends = edited["output"][:, 0].astype(int)
  assert np.max(np.abs(between[:, 0, 0] - ends[:2])) <= 1
  assert np.max(np.abs(between[:, 0, 2] - ends[1:])) <= 1


BY_ODE = {"sampler": "ode(rtol=1e-2, atol=1e-2)", "sampling__num_steps": 3}


@pytest.mark.parametrize("method", ["repaint", "replace", "posterior", "dps"])
def test_inpainting_with_the_adaptive_solver(root, method, dense):
  edited = edit(root, "inpaint", mask="lower", editing__method=method, **BY_ODE)
  np.testing.assert_array_equal(edited["output"][:, 0, :4], edited["input"][:, :4])
  assert np.mean(edited["output"][:, 0, 4:] != edited["input"][:, 4:]) > 0.5


def test_img2img_invert_and_interpolate_with_the_adaptive_solver(root, dense):
  """Strength 1 gives the results of sampling, and an encoded image does not depend on the batch."""
  fresh = edit(root, "img2img", editing__strength=1.0, steering={"given": classes_of([3, 5])}, seed=7, **BY_ODE)[
    "output"
  ]
  assert np.max(np.abs(fresh[:, 0].astype(int) - sampled(root, [3, 5], 7, sampler=BY_ODE))) <= 1
  part = edit(root, "img2img", editing__strength=0.5, **BY_ODE)
  assert np.any(part["output"][:, 0] != part["input"])
  ends = edit(root, "invert", "three.npz", **BY_ODE)["output"][:, 0].astype(int)
  between = edit(root, "interpolate", "three.npz", **BY_ODE)["output"]
  assert np.max(np.abs(between[:, 0, 0] - ends[:2])) <= 1
  assert np.max(np.abs(between[:, 0, 2] - ends[1:])) <= 1


def with_classes(classes, negative=None):
  """Return the options that guide an edit toward `classes`, and away from the classes `negative`."""
  values = {"given": classes, "negative": negative}
  return {"steering": {name: classes_of(numbers) for name, numbers in values.items() if numbers is not None}}


def by(method):
  return {"editing__method": method}


INPAINT, BLUR = {"mask": "lower"}, {"editing__operator": "blur(std=1.0)"}
WRONG = [
  ("img2img", {"results": 0}, "--num_samples=0; expected at least 1"),
  ("img2img", {"source": None}, "Got no --input"),
  ("img2img", {"source": "gone.png"}, r"--input=.*gone\.png, which does not exist"),
  ("img2img", {"source": "small.npz"}, r"shape \(2, 4, 4, 1\); expected uint8 \[N, 8, 8, 1\]"),
  ("img2img", {"mask": "lower"}, "Got --mask with --task=img2img"),
  ("inpaint", {}, "Got no --mask with --task=inpaint; expected a mask"),
  ("inpaint", {"mask": "bottom"}, "--mask=bottom, which does not exist; expected .* one of lower"),
  ("interpolat", {}, "'interpolat' as --task.*Did you mean 'interpolate'"),
  ("img2img", {"editing__method": "dps"}, "--method=dps with --task=img2img; expected no --method"),
  (
    "superres",
    {"editing__method": "repaint"},
    "--method=repaint with --task=superres; expected one of posterior, dps",
  ),
  ("inpaint", INPAINT | by("repant"), "config.editing.method='repant'; expected .*one of .*Did you mean 'repaint'"),
  ("img2img", {"editing__strength": -0.1}, "config.editing.strength=-0.1; expected 0 or more"),
  ("img2img", {"editing__strength": 1.5}, "--strength=1.5"),
  ("img2img", {"editing__strength": float("nan")}, "config.editing.strength=nan; expected a finite number"),
  ("img2img", {"sampler": "dddim"}, "Did you mean 'ddim'"),
  ("interpolate", {"editing__frames": 1}, "frames=1; expected 2 or more"),
  ("interpolate", {"source": "files/a.png"}, "Got one image with --task=interpolate; expected two or more"),
  ("colorize", {}, r"--task=colorize for a model of images with 1 channel\(s\)"),
  (
    "superres",
    {},
    "images of 8x8 for --task=superres with a model of 8x8; expected images smaller .* by an integer factor \\(for a factor of 2, 4",
  ),
  ("superres", {"source": "odd.npz"}, "images of 3x3 for --task=superres with a model of 8x8"),
  ("superres", {"source": "small.npz"} | by("posterior(noise_std=0.0)"), "noise_std=0.0"),
  (
    "superres",
    {"source": "small.npz"} | by("posterior()"),
    "posterior without its required argument noise_std. Set --config",
  ),
  ("superres", {"source": "small.npz"} | by("posterior(noise_std=0.1, covariance='tweed')"), "covariance='tweed'"),
  ("superres", {"source": "small.npz"} | by("dps(scale=-1.0)"), "scale=-1.0"),
  ("inpaint", INPAINT | by("posterior(noise_std=0.1, iterations=0)"), "iterations=0"),
  ("inpaint", INPAINT | by("repaint(resamples=0)"), "resamples=0"),
  ("inpaint", INPAINT | by("repaint(jump=0)"), "jump=0"),
  ("inpaint", INPAINT | {"sampler": "dpmpp_2m"}, "a rule that remembers previous steps"),
  (
    "restore",
    {},
    "--task=restore without config.editing.operator; expected an operator .*--config.editing.operator='blur",
  ),
  ("img2img", BLUR, "--task=img2img with config.editing.operator; expected an operator with --task=restore"),
  ("restore", {"editing__operator": "blur(std=-1.0)"}, "config.editing.operator=editing.blur: Got std=-1.0"),
  ("restore", {"editing__operator": "blurr"}, "editing.operator='blurr'; .*Did you mean 'blur'"),
  ("restore", BLUR | by("repaint"), "--method=repaint with --task=restore; expected one of posterior, dps"),
  ("invert", {"sampler": "ancestral"}, "--sampler=ancestral, which adds noise"),
  ("invert", {"sampler": "ddim(eta=1.0)"}, "--sampler=ddim, which adds noise.*without eta"),
  ("invert", {"sampler": "heun(s_churn=1.0)"}, "--sampler=heun, which adds noise"),
  ("invert", {"sampler": "with_langevin(sampler=ddim())"}, "adds noise .*without churn, both without corrector steps"),
  ("invert", {"sampler": "with_langevin(sampler=ode())"}, "--sampler=with_langevin, which adds noise"),
  ("interpolate", {"sampler": "ancestral"}, "which adds noise"),
  (
    "img2img",
    with_classes([1, 2, 3]),
    r"Got 3 values of classes for 2 image\(s\) or pair\(s\); expected one value, or one for each",
  ),
  ("img2img", with_classes([]), "Got 0 values of classes"),
  ("img2img", with_classes([10]), "classes '10'; expected integers from 0 to 9"),
  ("img2img", with_classes([1], [2] * 3) | {"guidance__scale": 2.0}, "Got 3 values of negative classes"),
  ("img2img", with_classes([1], [-1]) | {"guidance__scale": 2.0}, "classes '-1'; expected integers from 0 to 9"),
  ("img2img", with_classes([1], [2]), "--negative_classes.* without classifier-free guidance"),
  (
    "img2img",
    with_classes(None, [2]),
    "Got guidance without --classes; expected one value, or one for each image, such as --classes=3",
  ),
  ("img2img", {"guidance__scale": 3.0}, "Got guidance without --classes"),
  ("img2img", {"scale": 3.0}, "Got guidance without --classes"),
  ("img2img", {"guidance__scale": -1.0} | with_classes([1]), "guidance scale of -1"),
  ("img2img", {"steering": {"given": {"clases": ["1"]}}}, "Got clases 1,1 for a model .*Did you mean 'classes'"),
  (
    "img2img",
    {"run": "color", "source": "colors.npz"},
    "Got no --classes for a model that always takes classes",
  ),
  (
    "img2img",
    {"run": "color", "source": "colors.npz", "guidance__scale": 2.0} | with_classes([1]),
    "trained without dropout of a condition",
  ),
]


def state_of(root):
  return sorted(path for run in ("gray", "color") for path in (root / run).rglob("*"))


@pytest.mark.parametrize(("task", "options", "message"), WRONG)
def test_wrong_input_is_refused_before_any_work_starts(root, task, options, message, capsys):
  before = state_of(root)
  with pytest.raises(ValueError, match=message):
    edit(root, task, **options)
  assert state_of(root) == before
  assert "checkpoint of step" not in capsys.readouterr().out


def test_wrong_guides_are_refused(root, tmp_path):
  before, given = state_of(root), {"given": classes_of([1])}
  rescaled = {"guidance": "classifier_free(scale=2, rescale=0.5)"}
  judge, weak = {"classifier": root / "judge"} | given, {"weak": root / "gray"} | given
  for steering, keys, message in (
    (
      {"classifier": root / "judge"},
      {},
      "Got --classifier without --classes; expected one class, or one for each image",
    ),
    (judge | weak, {}, "Got --classifier and --weak; expected one guide"),
    (
      {"classifier": root / "gray"} | given,
      {},
      "--classifier with config.task='denoise'; expected a classifier",
    ),
    ({"classifier": tmp_path} | given, {}, f"--classifier={tmp_path}, which holds no checkpoint"),
    ({"weak": tmp_path} | given, {}, f"--weak={tmp_path}, which holds no checkpoint"),
    (weak, {}, "--weak with a guidance scale of 1"),
    (
      {"weak": root / "judge"} | given,
      {},
      "--weak with config.task='classify', which generates no samples; expected a run .*task='denoise'",
    ),
    (judge, rescaled, "--classifier with config.guidance=classifier_free .with rescale., a rule .*guidance=classifier"),
    (weak, rescaled, "--weak with config.guidance=classifier_free .with rescale., a rule .*guidance=autoguidance"),
    (
      judge,
      {"guidance": "cfg_plus_plus(scale=0.5)"},
      "--classifier with config.guidance=cfg_plus_plus, a rule .*config.guidance=",
    ),
    (
      weak,
      {"guidance": "cfg_plus_plus(scale=0.5)"},
      "--weak with config.guidance=cfg_plus_plus, a rule .*config.guidance=",
    ),
    (judge | {"negative": classes_of([2])}, {"guidance__scale": 2.0}, "negative_classes.* without classifier-free"),
  ):
    with pytest.raises(ValueError, match=message):
      edit(root, "img2img", steering=steering, **keys)
  with pytest.raises(ValueError, match="which holds no checkpoint; expected the folder of a trained run"):
    runs.load_experiment(configs.read_run(root / "gray"), tmp_path)
  assert state_of(root) == before
  assert not list(tmp_path.iterdir())


def test_a_full_disk_during_an_edit_is_an_error_that_names_the_file(dense, root, monkeypatch):
  def fill_up(path, **arrays):
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device")

  before = sorted((root / "gray").rglob("*.npz"))
  monkeypatch.setattr(np, "savez_compressed", fill_up)
  with pytest.raises(files.WriteError, match=r"Cannot write .*edits/img2img.*\.npz: No space left .* Make room"):
    edit(root, "img2img", seed=77)
  assert sorted((root / "gray").rglob("*.npz")) == before
