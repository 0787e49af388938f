"""Editing with the runs of tiny models, in one process: every task and method, and what is refused before anything begins."""

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
# What each method is told in tests, where it is told anything: few repetitions.
METHODS = {
  "repaint": spec("editing.repaint", resamples=2),
  "posterior": spec("editing.posterior", noise_std=0.02, iterations=2),
}


def config_of(classes, dropout=0.0):
  config = tiny_config()
  config.model.conditions = {"classes": spec("conditions.classes", number=classes, dropout=dropout)}
  return config


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """Make runs that nothing trained, images and a mask.

  The runs: `gray`, of digits with hidden classes, whose network is dense; `unet`, the same of the U-Net; `judge`, a classifier of them;
  `color`, with a class for every image.
  """
  place, generator = tmp_path_factory.mktemp("editing"), np.random.default_rng(0)
  images, labels = generator.integers(0, 256, (40, 8, 8, 3), np.uint8), np.arange(40) % 2
  np.savez(place / "data.npz", images=images, classes=labels)
  gray, color = config_of(10, dropout=0.1), config_of(2)
  color.data.source = spec("data.arrays", path=str(place / "data.npz"))
  color.data.update({"channels": 3, "hold_out": 10})
  judge = tiny_config()
  judge.task, judge.objective = "classify", "classification"
  judge.model.network = spec("networks.Classifier", out_channels=10, **SMALL)
  for number, (name, config) in enumerate({"unet": gray, "judge": judge, "color": color}.items()):
    write_run(config, place / name, number)
  with pytest.MonkeyPatch.context() as patch:
    use_dense(patch)
    write_run(gray, place / "gray")
  for name, shape in (("two", (2, 8, 8, 1)), ("three", (3, 8, 8, 1)), ("small", (2, 4, 4, 1)), ("odd", (2, 3, 3, 1))):
    np.savez(place / f"{name}.npz", images=generator.integers(0, 256, shape, np.uint8))
  np.savez(place / "colors.npz", images=np.stack([np.full((8, 8, 3), value, np.uint8) for value in (40, 210)]))
  (place / "files").mkdir()
  for name in ("b", "a"):
    Image.fromarray(generator.integers(0, 256, (8, 8), np.uint8)).save(place / "files" / f"{name}.png")
  Image.fromarray(np.where(generator.random((8, 8)) < 0.4, 255, 0).astype(np.uint8)).save(place / "mask.png")
  return place


def experiment_of(place, run, keys):
  """Return what a run's config stands for with other values, where `editing__strength=1.0` stands for editing.strength."""
  experiment = runs.load_experiment(configs.read_run(place / run), place / run)
  return experiment.replace(**keys)


def edit(place, task, source="two.npz", *, run="gray", mask="", results=1, seed=0, steering=None, scale=None, **keys):
  """The arrays that an edit writes; `editing__strength=1.0` stands for editing.strength."""
  method = keys.pop("editing__method", "repaint" if task == "inpaint" else None)
  keys = {"editing__frames": 3, "editing__method": METHODS.get(method, method)} | keys
  experiment, folder = experiment_of(place, run, keys), place / run / "edits"
  before = set(folder.glob("*"))
  wanted = runs.Edit(task, None if source is None else place / source, mask, results)
  options = {
    "seed": seed,
    "choice": runs.WeightsChoice(),
    "steering": runs.Steering(**(steering or {})),
    "scale": scale,
  }
  runs.run_edit(experiment, place / run, wanted, **options)
  arrays, picture = sorted(set(folder.glob("*")) - before, key=lambda path: path.suffix)
  assert (arrays.suffix, picture.suffix) == (".npz", ".png")
  assert arrays.name.startswith(task)
  with Image.open(picture) as file:
    assert min(file.size) > 90, "two rows of tiles, or two columns"
  with np.load(arrays) as file:
    found = {name: file[name] for name in file.files}
  assert found["output"].dtype == np.uint8
  return found


def images_of(place, name):
  with np.load(place / name) as file:
    return file["images"]


def drawn(place, classes, seed, sampler=None, scale=None, **steering):
  """What `--mode=sample` draws."""
  experiment, folder = experiment_of(place, "gray", sampler or {}), place / "gray" / "samples"
  wanted = runs.Steering(classes_of(classes), **steering)
  before = set(folder.glob("*.npz"))
  options = {"seed": seed, "choice": runs.WeightsChoice(), "steering": wanted, "scale": scale}
  runs.run_sample(experiment, place / "gray", num_samples=len(classes), **options)
  (path,) = set(folder.glob("*.npz")) - before
  assert ("_scale3" in path.name) == (scale == 3)
  with np.load(path) as file:
    np.testing.assert_array_equal(file["classes"], classes)
    return file["samples"]


def classes_of(numbers):
  """Return classes as somebody asks for them."""
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
def test_inpainting_leaves_what_is_known_as_it_is(place, method, source, mask, dense):
  path = str(place / mask) if mask.endswith("png") else mask
  found = edit(place, "inpaint", source, mask=path, results=2, editing__method=method)
  assert (place / "gray" / "edits" / f"inpaint_{method or 'repaint'}_seed0.npz").exists()
  if mask.endswith("png"):
    painted = np.asarray(Image.open(path))[..., None] > 0
    originals = np.stack([np.asarray(Image.open(place / "files" / f"{name}.png"))[..., None] for name in "ab"])
    assert list(found["names"]) == ["a.png", "b.png"]
  else:
    half = np.arange(8) >= 4 if mask == "lower" else np.arange(8) < 4
    painted = np.broadcast_to((half if mask == "left" else half[:, None])[..., None], (8, 8, 1))
    originals = images_of(place, source)
    assert list(found["names"]) == ["two.npz[0]", "two.npz[1]"]
  np.testing.assert_array_equal(found["mask"], painted)
  np.testing.assert_array_equal(found["input"], originals)
  assert found["output"].shape == (2, 2, 8, 8, 1)
  known = np.broadcast_to(~painted, originals.shape)
  for index in range(2):
    result = found["output"][:, index]
    np.testing.assert_array_equal(result[known], originals[known])
    assert np.mean(result[~known] != originals[~known]) > 0.5
  assert np.mean(found["output"][:, 0] != found["output"][:, 1]) > 0.1, "each result has its own noise"


def test_strength_from_the_input_to_a_fresh_sample(place, dense):
  """Several results of each image are numbered row by row."""
  steering = {"given": classes_of([3, 5])}
  found = edit(place, "img2img", results=2, editing__strength=0.0, steering=steering)
  assert "mask" not in found
  for index in range(2):
    np.testing.assert_array_equal(found["output"][:, index], images_of(place, "two.npz"))
  fresh = edit(place, "img2img", results=2, editing__strength=1.0, steering=steering, seed=7)["output"]
  assert fresh.shape == (2, 2, 8, 8, 1)
  np.testing.assert_array_equal(fresh.reshape(4, 8, 8, 1), drawn(place, [3, 3, 5, 5], 7))
  batched = edit(place, "img2img", results=2, editing__strength=1.0, steering=steering, seed=7, sampling__batch_size=3)
  assert np.max(np.abs(batched["output"].astype(int) - fresh)) <= 1, "in two batches"


def test_classes_and_guidance_do_in_edits_what_they_do_in_sampling(place, dense):
  negative = classes_of([1, 8])
  steering = {"given": classes_of([3]), "negative": negative}
  found = edit(place, "img2img", editing__strength=1.0, guidance__scale=3.0, steering=steering)["output"][:, 0]
  np.testing.assert_array_equal(found, drawn(place, [3, 3], 0, negative=negative, scale=3.0))
  none = edit(place, "img2img", editing__strength=0.75)["output"]
  # A scale of 0 is the unconditional model, whatever the class.
  four = {"given": classes_of([4])}
  zero = edit(place, "img2img", editing__strength=0.75, scale=0.0, steering=four)["output"]
  assert np.max(np.abs(none.astype(int) - zero)) <= 1
  other = edit(place, "img2img", editing__strength=0.75, scale=3.0, steering=four)["output"]
  assert np.any(none != other)


def test_a_scale_that_holds_at_times_keeps_its_times(place, dense):
  """`--guidance_scale` is the scale inside of an interval, and the interval may hold never."""

  def of(low, high):
    interval = spec("guidance.interval", scale=1.0, low=low, high=high)
    return drawn(place, [3, 5], 1, {"guidance": spec("guidance.classifier_free", scale=interval)}, scale=3.0)

  plain, always = drawn(place, [3, 5], 1), drawn(place, [3, 5], 1, scale=3.0)
  assert np.max(np.abs(of(1e6, 1e7).astype(int) - plain)) <= 1
  assert np.max(np.abs(of(0.0, float("inf")).astype(int) - always)) <= 1
  assert np.any(plain != always)


def test_other_runs_guide_samples_and_edits(place, dense):
  plain = drawn(place, [3, 5], 1)
  judged = drawn(place, [3, 5], 1, scale=3.0, classifier=place / "judge")
  assert np.any(judged != plain)
  steering = {"given": classes_of([3, 5]), "classifier": place / "judge"}
  found = edit(place, "img2img", steering=steering, editing__strength=1.0, scale=3.0, seed=1)["output"]
  np.testing.assert_array_equal(found[:, 0], judged)
  # The rule of the config may be the guide's own.
  own = drawn(place, [3, 5], 1, {"guidance": "classifier(scale=3)"}, classifier=place / "judge", scale=3.0)
  np.testing.assert_array_equal(own, judged)
  # A model as weak as the model itself leads nowhere.
  assert np.max(np.abs(drawn(place, [3, 5], 1, scale=3.0, weak=place / "gray").astype(int) - plain)) <= 1


@pytest.mark.parametrize("method", ["posterior", "dps"])
@pytest.mark.parametrize("task", ["superres", "colorize"])
def test_restoring_what_was_measured(place, task, method):
  """What is measured of each result is nearer to its own input than to the other's."""
  if task == "superres":
    found = edit(place, task, "small.npz", run="unet", editing__method=method)
    assert found["output"].shape == (2, 1, 8, 8, 1)
    known, measured = found["input"], np.asarray(editing.downsample(2)(found["output"][:, 0].astype(np.float32)))
  else:
    # Of a run with a class for every image, away from another class.
    steering = {"given": classes_of([0]), "negative": classes_of([1])}
    strong = "dps(scale=3.0)" if method == "dps" else method
    options = {"run": "color", "editing__method": strong, "guidance__scale": 2.0}
    found = edit(place, task, "colors.npz", steering=steering, **options)
    assert found["output"].shape == (2, 1, 8, 8, 3)
    weights = np.array([0.299, 0.587, 0.114])
    known, measured = found["input"] @ weights, found["output"][:, 0] @ weights
  own, other = (np.mean(np.abs(a.astype(float) - measured)) for a in (known, known[::-1]))
  assert own < other


def test_images_encoded_and_between_images(place, dense):
  steering = {"given": classes_of([2])}
  found = edit(place, "invert", "three.npz", steering=steering)
  assert found["latent"].shape == (3, 8, 8, 1)
  assert found["latent"].dtype == np.float32
  assert found["output"].shape == (3, 1, 8, 8, 1)
  assert np.any(found["latent"][0] != found["latent"][1])
  between = edit(place, "interpolate", "three.npz", steering=steering)["output"]
  assert between.shape == (2, 1, 3, 8, 8, 1)
  # The ends are what the encoded images are decoded to.
  ends = found["output"][:, 0].astype(int)
  assert np.max(np.abs(between[:, 0, 0] - ends[:2])) <= 1
  assert np.max(np.abs(between[:, 0, 2] - ends[1:])) <= 1


BY_ODE = {"sampler": "ode(rtol=1e-2, atol=1e-2)", "sampling__num_steps": 3}


@pytest.mark.parametrize("method", ["repaint", "replace", "posterior", "dps"])
def test_inpainting_by_the_adaptive_flow(place, method, dense):
  found = edit(place, "inpaint", mask="lower", editing__method=method, **BY_ODE)
  np.testing.assert_array_equal(found["output"][:, 0, :4], found["input"][:, :4])
  assert np.mean(found["output"][:, 0, 4:] != found["input"][:, 4:]) > 0.5


def test_images_noised_and_encoded_by_the_adaptive_flow(place, dense):
  """A strength of 1 draws what is sampled; an encoded image follows from it alone, whatever the batch."""
  fresh = edit(place, "img2img", editing__strength=1.0, steering={"given": classes_of([3, 5])}, seed=7, **BY_ODE)[
    "output"
  ]
  assert np.max(np.abs(fresh[:, 0].astype(int) - drawn(place, [3, 5], 7, sampler=BY_ODE))) <= 1
  part = edit(place, "img2img", editing__strength=0.5, **BY_ODE)
  assert np.any(part["output"][:, 0] != part["input"])
  ends = edit(place, "invert", "three.npz", **BY_ODE)["output"][:, 0].astype(int)
  between = edit(place, "interpolate", "three.npz", **BY_ODE)["output"]
  assert np.max(np.abs(between[:, 0, 0] - ends[:2])) <= 1
  assert np.max(np.abs(between[:, 0, 2] - ends[1:])) <= 1


def asking(classes, negative=None):
  """Return the option of an edit for classes, and for classes to guide away from."""
  wishes = {"given": classes, "negative": negative}
  return {"steering": {name: classes_of(numbers) for name, numbers in wishes.items() if numbers is not None}}


def by(method):
  return {"editing__method": method}


INPAINT, BLUR = {"mask": "lower"}, {"editing__operator": "blur(std=1.0)"}
WRONG = [
  ("img2img", {"results": 0}, "--num_samples=0; expected at least 1"),
  ("img2img", {"source": None}, "Got no --input"),
  ("img2img", {"source": "gone.png"}, r"--input=.*gone\.png, which does not exist"),
  ("img2img", {"source": "small.npz"}, r"shape \(2, 4, 4, 1\); expected \[N, 8, 8, 1\]"),
  ("img2img", {"mask": "lower"}, "Got --mask for the task 'img2img'"),
  ("inpaint", {}, "Got no --mask for the task 'inpaint'; expected one"),
  ("inpaint", {"mask": "bottom"}, "--mask=bottom, which does not exist; expected .* one of lower"),
  ("interpolat", {}, "'interpolat' as --task.*Did you mean 'interpolate'"),
  ("img2img", {"editing__method": "dps"}, "--method=dps for the task 'img2img'; expected none: there is one way"),
  (
    "superres",
    {"editing__method": "repaint"},
    "--method=repaint for the task 'superres'; expected one of posterior, dps",
  ),
  ("inpaint", INPAINT | by("repant"), "config.editing.method='repant'; expected .*one of .*Did you mean 'repaint'"),
  ("img2img", {"editing__strength": -0.1}, "config.editing.strength=-0.1; expected 0 or more"),
  ("img2img", {"editing__strength": 1.5}, "--strength=1.5"),
  ("img2img", {"editing__strength": float("nan")}, "config.editing.strength=nan; expected a finite number"),
  ("img2img", {"sampler": "dddim"}, "Did you mean 'ddim'"),
  ("interpolate", {"editing__frames": 1}, "frames=1; expected 2 or more"),
  ("interpolate", {"source": "files/a.png"}, "Got one image to interpolate; expected two or more"),
  ("colorize", {}, r"'colorize' for a model of images with 1 channel\(s\)"),
  (
    "superres",
    {},
    "images of 8x8 to enlarge with a model of 8x8; expected a size of which that is a multiple, such as 4",
  ),
  ("superres", {"source": "odd.npz"}, "images of 3x3 to enlarge with a model of 8x8"),
  ("superres", {"source": "small.npz"} | by("posterior(noise_std=0.0)"), "noise_std=0.0"),
  ("superres", {"source": "small.npz"} | by("posterior()"), "posterior without its required argument noise_std. Set --config"),
  ("superres", {"source": "small.npz"} | by("posterior(noise_std=0.1, covariance='tweed')"), "covariance='tweed'"),
  ("superres", {"source": "small.npz"} | by("dps(scale=-1.0)"), "scale=-1.0"),
  ("inpaint", INPAINT | by("posterior(noise_std=0.1, iterations=0)"), "iterations=0"),
  ("inpaint", INPAINT | by("repaint(resamples=0)"), "resamples=0"),
  ("inpaint", INPAINT | by("repaint(jump=0)"), "jump=0"),
  ("inpaint", INPAINT | {"sampler": "dpmpp_2m"}, "a rule that remembers its last steps"),
  ("restore", {}, "'restore' without config.editing.operator; expected it .*--config.editing.operator='blur"),
  ("img2img", BLUR, "'img2img' with config.editing.operator; expected it with the task 'restore'"),
  ("restore", {"editing__operator": "blur(std=-1.0)"}, "config.editing.operator=editing.blur: Got std=-1.0"),
  ("restore", {"editing__operator": "blurr"}, "editing.operator='blurr'; .*Did you mean 'blur'"),
  ("restore", BLUR | by("repaint"), "--method=repaint for the task 'restore'; expected one of posterior, dps"),
  ("invert", {"sampler": "ancestral"}, "'ancestral', which adds noise as it is set"),
  ("invert", {"sampler": "ddim(eta=1.0)"}, "'ddim', which adds noise as it is set.*without eta"),
  ("invert", {"sampler": "heun(s_churn=1.0)"}, "'heun', which adds noise as it is set"),
  ("invert", {"sampler": "with_langevin(sampler=ddim())"}, "adds noise .*without eta, churn or corrector steps"),
  ("invert", {"sampler": "with_langevin(sampler=ode())"}, "'with_langevin', which adds noise as it is set"),
  ("interpolate", {"sampler": "ancestral"}, "which adds noise"),
  ("img2img", asking([1, 2, 3]), r"Got 3 classes for 2 image\(s\) or pair\(s\); expected one, or one for each"),
  ("img2img", asking([]), "Got 0 classes"),
  ("img2img", asking([10]), "classes '10'; expected integers from 0 to 9"),
  ("img2img", asking([1], [2] * 3) | {"guidance__scale": 2.0}, "Got 3 negative classes"),
  ("img2img", asking([1], [-1]) | {"guidance__scale": 2.0}, "classes '-1'; expected integers from 0 to 9"),
  ("img2img", asking([1], [2]), "--negative_classes.* without classifier-free guidance"),
  ("img2img", asking(None, [2]), "Got guidance without --classes; expected that of each image, such as --classes=3"),
  ("img2img", {"guidance__scale": 3.0}, "Got guidance without --classes"),
  ("img2img", {"scale": 3.0}, "Got guidance without --classes"),
  ("img2img", {"guidance__scale": -1.0} | asking([1]), "guidance scale of -1"),
  ("img2img", {"steering": {"given": {"clases": ["1"]}}}, "Got clases 1,1 for a model .*Did you mean 'classes'"),
  (
    "img2img",
    {"run": "color", "source": "colors.npz"},
    "Got no --classes for a model that was trained with classes for every image",
  ),
  (
    "img2img",
    {"run": "color", "source": "colors.npz", "guidance__scale": 2.0} | asking([1]),
    "trained without dropout of a condition",
  ),
]


def state_of(place):
  return sorted(path for run in ("gray", "color") for path in (place / run).rglob("*"))


@pytest.mark.parametrize(("task", "options", "message"), WRONG)
def test_what_is_wrong_is_said_before_anything_begins(place, task, options, message, capsys):
  before = state_of(place)
  with pytest.raises(ValueError, match=message):
    edit(place, task, **options)
  assert state_of(place) == before
  assert "checkpoint of step" not in capsys.readouterr().out


def test_wrong_folders_of_other_models(place, tmp_path):
  before, asked = state_of(place), {"given": classes_of([1])}
  rescaled = {"guidance": "classifier_free(scale=2, rescale=0.5)"}
  judge, weak = {"classifier": place / "judge"} | asked, {"weak": place / "gray"} | asked
  for steering, keys, message in (
    ({"classifier": place / "judge"}, {}, "Got --classifier without --classes; expected the class of each image"),
    (judge | weak, {}, "Got --classifier and --weak; expected one guide"),
    (
      {"classifier": place / "gray"} | asked,
      {},
      "--classifier of config.task='denoise'; expected a model that tells classes apart",
    ),
    ({"classifier": tmp_path} | asked, {}, f"--classifier={tmp_path}, which holds no checkpoint"),
    ({"weak": tmp_path} | asked, {}, f"--weak={tmp_path}, which holds no checkpoint"),
    (weak, {}, "--weak with a guidance scale of 1"),
    (
      {"weak": place / "judge"} | asked,
      {},
      "--weak of config.task='classify'; expected a run that denoises.*draws nothing",
    ),
    (judge, rescaled, "guidance=classifier_free with rescale and another guide"),
    (weak, rescaled, "guidance=classifier_free with rescale and another guide"),
    (judge, {"guidance": "cfg_plus_plus(scale=0.5)"}, "guidance=cfg_plus_plus and another guide.*config.guidance="),
    (weak, {"guidance": "cfg_plus_plus(scale=0.5)"}, "guidance=cfg_plus_plus and another guide.*config.guidance="),
    (judge | {"negative": classes_of([2])}, {"guidance__scale": 2.0}, "negative_classes.* without classifier-free"),
  ):
    with pytest.raises(ValueError, match=message):
      edit(place, "img2img", steering=steering, **keys)
  with pytest.raises(ValueError, match="which holds no checkpoint; expected the folder of a run"):
    runs.load_experiment(configs.read_run(place / "gray"), tmp_path)
  assert state_of(place) == before
  assert not list(tmp_path.iterdir())


def test_an_edit_on_a_full_disk_is_an_error_that_names_its_file(dense, place, monkeypatch):
  def fill_up(path, **arrays):
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device")

  before = sorted((place / "gray").rglob("*.npz"))
  monkeypatch.setattr(np, "savez_compressed", fill_up)
  with pytest.raises(files.WriteError, match=r"Cannot write .*edits/img2img.*\.npz: No space left .* Make room"):
    edit(place, "img2img", seed=77)
  assert sorted((place / "gray").rglob("*.npz")) == before
