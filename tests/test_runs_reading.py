"""Test which images a config reads, how their classes are numbered, and which data are refused."""

import os

import numpy as np
import pytest
from PIL import Image

from configs import folder
from ddpm_jax import data, interop, metrics
from ddpm_jax.config import spec
from ddpm_jax.runs import preparing, reading, spaces
from ddpm_jax.storage.places import user_path
from tests.commands import DENSE, assert_refused, call
from tests.pictures import truncate
from tests.recipes import experiment_of, tiny_config


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write(root, **counts):
  """Write folders of gray images.

  Each folder has its own gray level, so an image identifies its folder.
  """
  for number, (name, count) in enumerate(counts.items()):
    folder = root / name.replace("__", "/")
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
      Image.fromarray(np.full((8, 8), 40 * number, np.uint8)).save(folder / f"{index}.png")


def experiment(path, classes=0, source="folder", *, data=None, **arguments):
  """Return an experiment with a data source, its arguments and other keys of the section `data`."""
  config = tiny_config()
  given = {"path": str(path)} | ({"eval_split": "test"} if source != "arrays" else {}) | arguments
  config.data.source = spec(f"data.{source}", **given)
  config.data.update({"hold_out": 0} | (data or {}))
  if classes:
    config.model.conditions.classes = spec("conditions.classes", number=classes)
  return experiment_of(config)


def classes_of(source):
  return [int(source[index]["classes"]) for index in range(len(source))]


@pytest.mark.parametrize("packed", [False, True])
def test_held_out_images_have_the_class_numbers_of_the_training_split(tmp_path, packed):
  write(tmp_path / "a", train__cat=1, train__dog=2, train__emu=1, test__dog=1, test__emu=2)
  loaded = experiment(tmp_path / "a", 3)
  if packed:
    # Pack each split alone, so that each pack has its own class numbers.
    for split in ("train", "test"):
      alone = experiment(tmp_path / "a" / split, eval_split="", train_split="")
      preparing.run_prepare(alone, tmp_path / "b" / split)
    loaded = experiment(tmp_path / "b", 3, "packed")
  train, held_out = reading.read_data(loaded)
  assert classes_of(train) == [0, 1, 1, 2]
  assert classes_of(held_out) == [1, 2, 2]
  _, on_disk = reading.read_sources(loaded)
  assert on_disk.class_names == ["cat", "dog", "emu"]
  assert list(on_disk.classes) == [1, 2, 2]
  np.testing.assert_array_equal(data.read(on_disk, [2, 0])["classes"], [2, 1])


@pytest.mark.parametrize(
  ("folders", "message"),
  [
    (
      {"train__cat": 1, "train__dog": 1, "test__fox": 1, "test__dog": 1},
      r"1 image\(s\).*test/fox/0\.png.*: cat, dog\. Move",
    ),
    ({"train__cat": 1, "train__dog": 1, "test__.": 1}, r"1 image\(s\) without a class, such as .*test/0\.png"),
    ({"cat": 1, "dog": 1, ".": 2}, r"2 image\(s\) without a class, such as .*/0\.png.*: cat, dog\. Move or remove"),
    ({".": 2}, r"2 image\(s\) without a class, such as .*; expected each image in the folder of its class\. Move"),
    ({"train__.": 2, "test__cat": 1}, r"2 image\(s\) without a class, such as .*train/0\.png"),
  ],
)
def test_images_without_a_class_are_refused_by_a_model_with_classes(tmp_path, folders, message):
  write(tmp_path, **folders)
  for make in (reading.read_sources, reading.read_data):
    with pytest.raises(ValueError, match=message):
      make(experiment(tmp_path, 2))
  sources = reading.read_data(experiment(tmp_path))
  assert data.NO_CLASS in [number for source in sources if source is not None for number in classes_of(source)]
  assert spaces.choose_features(experiment(tmp_path), sources[0]) == "pixels"


def test_a_pack_stores_images_without_a_class(tmp_path):
  write(tmp_path / "a", **{"cat": 1, ".": 1})
  preparing.run_prepare(experiment(tmp_path / "a"), tmp_path / "b")
  assert classes_of(reading.read_data(experiment(tmp_path / "b", 0, "packed", eval_split=""))[0]) == [data.NO_CLASS, 0]
  with pytest.raises(
    ValueError, match=r"Got 1 image\(s\) without a class for .*Prepare the data again.*conditions.classes=None"
  ):
    reading.read_data(experiment(tmp_path / "b", 1, "packed", eval_split=""))


def test_arrays_without_classes_are_refused_by_a_model_with_classes(tmp_path):
  np.savez(tmp_path / "a.npz", images=np.zeros((3, 8, 8, 1), np.uint8))
  assert len(reading.read_data(experiment(tmp_path / "a.npz", source="arrays"))[0]) == 3
  with pytest.raises(ValueError, match=r"3 image\(s\) without a class .*an array 'labels' in the file\. Add it"):
    reading.read_data(experiment(tmp_path / "a.npz", 2, source="arrays"))


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_class_may_have_the_name_of_a_split(tmp_path, name, capsys):
  write(tmp_path, **{"bus": 1, "car": 1, name: 2})
  train, held_out = reading.read_data(experiment(tmp_path, 3))
  assert held_out is None
  assert classes_of(train) == [0, 1, 2, 2]
  printed = capsys.readouterr().out
  assert f"treating {name} as a class, because {tmp_path} also contains bus, car. If {name} is a split" in printed
  assert f"--config.data.source.path={tmp_path / name}" in printed


def test_classes_with_the_names_of_both_splits_need_empty_split_keys(tmp_path, capsys):
  write(tmp_path, bus=1, test=1, train=1)
  train, held_out = reading.read_data(experiment(tmp_path))
  assert (len(train), len(held_out)) == (1, 1)
  assert f"using only train and test of {tmp_path}; skipping bus\n" in capsys.readouterr().out
  train, held_out = reading.read_data(experiment(tmp_path, 3, train_split="", eval_split=""))
  assert held_out is None
  assert classes_of(train) == [0, 1, 2]


@pytest.mark.parametrize(
  ("folders", "keys", "message"),
  [
    ({"train": 1}, {}, r"contains only 'train'; expected .*/test too, or neither"),
    ({"train": 1, "val": 1}, {}, r"contains only 'train'; expected .*/test too"),
    ({"test": 1, "validation": 1}, {}, r"contains only 'test'; expected .*/train too"),
    ({"test": 1}, {"train_split": ""}, r"contains only 'test'; expected .*/train too"),
    ({"Train": 1, "Test": 1}, {}, "sub-folders Test, Train, which look like splits.*train_split and .*eval_split"),
    ({"training": 1, "validation": 1}, {}, "sub-folders training, validation, which look like splits"),
    (
      {"ds__train__cat": 1, "ds__test__cat": 1},
      {},
      "only sub-folder ds contains the splits .*data.source.path=.*/ds, or set",
    ),
    ({"ds__train__cat": 1, "ds__val__cat": 1}, {}, "only sub-folder ds contains the splits"),
    ({"train": 1, "annotations": 0}, {}, "contains only 'train'"),
  ],
)
def test_splits_with_unexpected_names_are_not_read_as_classes(tmp_path, folders, keys, message):
  write(tmp_path, **folders)
  with pytest.raises(ValueError, match=message):
    reading.read_data(experiment(tmp_path, **keys))


@pytest.mark.parametrize("other_folders", [{}, {"test": 1}, {"annotations": 0}])
def test_only_the_training_split_is_read(tmp_path, other_folders):
  write(tmp_path, train=2, **other_folders)
  train, held_out = reading.read_data(experiment(tmp_path, eval_split=""))
  assert (len(train), held_out) == (2, None)


def test_the_whole_folder_may_be_the_split(tmp_path):
  write(tmp_path, a=2)
  assert len(reading.read_data(experiment(tmp_path, train_split=".", eval_split=""))[0]) == 2


def test_splits_may_be_nested_folders(tmp_path):
  write(tmp_path, images__train=2, images__val=1, masks__train=2)
  train, held_out = reading.read_data(experiment(tmp_path, train_split="images/train", eval_split="images/val"))
  assert (len(train), len(held_out)) == (2, 1)


@pytest.mark.parametrize(
  ("train", "evaluation", "message"),
  [
    ("/elsewhere/train", "test", "Got the split '/elsewhere/train' .*the name of a folder in data.source.path"),
    ("train", "../test", r"Got the split '\.\./test'"),
    ("~/train", "", "Got the split '~/train'"),
    ("train", "train", "which share images"),
    (".", "test", "train_split='.' and data.source.eval_split='test', which share images"),
    ("train", "train/val", "which share images"),
  ],
)
@pytest.mark.parametrize("source", ["folder", "packed"])
def test_splits_must_be_separate_folders_inside_the_data_folder(tmp_path, source, train, evaluation, message):
  write(tmp_path, train__val=1, test=1)
  with pytest.raises(ValueError, match=message):
    reading.read_sources(experiment(tmp_path, source=source, train_split=train, eval_split=evaluation))


class Streamed:
  """Provide items with images and classes, like a TFDS source."""

  def __init__(self, classes):
    self._classes = classes

  def __len__(self):
    return len(self._classes)

  def __getitem__(self, index):
    return {"image": np.zeros((8, 8, 1), np.uint8), "classes": self._classes[index]}


@pytest.mark.parametrize("broken", ["stop", "skip"])
@pytest.mark.parametrize(
  ("wrong_class", "message"),
  [(data.NO_CLASS, "without a class for .*classes.number=3"), (3, "classes 3 to 3 for .*classes.number=3")],
)
def test_classes_stored_with_images_are_checked_when_they_are_read(monkeypatch, wrong_class, message, broken):
  classes = {"train": [0, 1, 2, wrong_class, 0, 1, 2, 0], "test": [0, wrong_class]}
  monkeypatch.setattr(data.choices, "TfdsSource", lambda name, split, *fit, **others: Streamed(classes[split]))
  # Do not cache the data in memory, as for data sets of more than a gigabyte.
  monkeypatch.setattr(data.loading, "cache_in_memory", lambda source, broken: source)
  train, held_out = reading.read_data(experiment("", 3, source="tfds", data={"broken": broken}))
  with pytest.raises(ValueError, match=f"image 1: .*{message}"):
    data.read(held_out, [1])
  with pytest.raises(ValueError, match=message):
    next(data.batches(train, 8, seed=0))
  train, _ = reading.read_data(experiment("", source="tfds", data={"broken": broken}))
  assert sorted(next(data.batches(train, 8, seed=0))["classes"]) == sorted(classes["train"])


class Trained(Exception):
  pass


def test_the_feature_classifier_accepts_large_class_numbers(tmp_path, monkeypatch):
  numbers = np.array([5, 2_000_000_000, 5, 7], np.int32)

  def train(images, numbers, num_classes, **options):
    raise Trained(numbers.tolist(), num_classes)

  monkeypatch.setattr(metrics.classifier, "train_classifier", train)
  config = tiny_config()
  config.evaluation.features = "classifier"
  source = data.ArraySource(np.zeros((4, 8, 8, 1), np.uint8), numbers)
  with pytest.raises(Trained) as error:
    _ = spaces.build_space(experiment_of(config), source, None, tmp_path / "classifier").feature_space
  assert error.value.args == ([0, 2, 0, 1], 3)


def test_inception_refuses_images_with_5_channels_before_reading_weights(tmp_path):
  config = tiny_config()
  config.data.channels = 5
  config.evaluation.update({"features": "inception", "inception_weights": str(tmp_path / "none")})
  source = data.ArraySource(np.zeros((4, 8, 8, 5), np.uint8))
  with pytest.raises(ValueError, match="5 channels for the Inception network.*expected 1 or 3.*features=pixels"):
    spaces.build_space(experiment_of(config), source, None, tmp_path / "classifier")


@pytest.mark.parametrize("spoiled", range(1, 6))
def test_a_broken_image_is_not_replaced_by_another_split_s_image(tmp_path, spoiled):
  write(tmp_path, a=1, b=1, c=1, d=1, e=1, f=1)
  truncate(tmp_path / "abcdef"[spoiled] / "0.png")
  sources = reading.read_data(experiment(tmp_path, data={"hold_out": 3, "broken": "skip"}))
  train, held_out = ({int(source[index]["image"][0, 0, 0]) for index in range(3)} for source in sources)
  assert not train & held_out
  assert train | held_out == {40 * number for number in range(6) if number != spoiled}


# Paths in the user's home folder.


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  return tmp_path


@pytest.mark.parametrize("source", ["folder", "packed", "arrays"])
def test_a_tilde_in_the_data_path_is_the_home(home, source):
  write(home / "a", cat=3)
  if source == "packed":
    preparing.run_prepare(experiment("~/a"), home / "packed" / "a")
    (home / "a").rename(home / "images")
    (home / "packed" / "a").rename(home / "a")
  if source == "arrays":
    np.savez(home / "a.npz", images=np.zeros((3, 8, 8, 1), np.uint8))
  path = "~/a.npz" if source == "arrays" else "~/a"
  assert len(reading.read_data(experiment(path, source=source))[0]) == 3
  assert not os.path.exists("~")


def test_a_tilde_in_other_paths_of_a_config_is_the_home(home, monkeypatch):
  statistics = metrics.Statistics(metrics.Gaussian(np.zeros(64), np.eye(64), 9), None, {})
  metrics.save_statistics(home / "reference.npz", statistics)
  config = tiny_config()
  config.evaluation.reference = "~/reference.npz"
  loaded = experiment_of(config)
  train, held_out = reading.read_data(loaded)
  space = spaces.build_space(loaded, train, held_out, home / "classifier")
  assert spaces.build_reference(loaded, space, train, held_out).statistics.features.count == 9
  (home / "weights.safetensors").write_bytes(b"damaged")
  with pytest.raises(ValueError, match=f"{home}/weights"):
    interop.inception.load("~/weights.safetensors")
  (home / "model").mkdir()
  assert interop.diffusers.find_folder("~/model") == home / "model"


@pytest.mark.parametrize(
  "use",
  [
    lambda path: reading.read_data(experiment(path)),
    lambda path: reading.read_data(experiment(path, source="packed")),
    lambda path: reading.read_data(experiment(path, source="arrays")),
    lambda path: interop.diffusers.find_folder(path),
    lambda path: interop.inception.load(path),
    lambda path: data.read_inputs(user_path(path), (8, 8), 1),
    lambda path: data.prepare_tfds("squares", "", f"{path}.py"),
  ],
)
def test_a_missing_home_folder_is_refused(use):
  with pytest.raises(ValueError, match=r"~nobody_here/a.*no home folder ~nobody_here.*Write the full path"):
    use("~nobody_here/a")


# From the command line.


@pytest.mark.parametrize(
  "flag", ["--input", "--mask", "--config.data.source.path", "--pretrained", "--workdir", "--output"]
)
def test_a_missing_home_folder_gives_one_message(tmp_path, flag):
  mode = {
    "--input": "edit",
    "--mask": "edit",
    "--config.data.source.path": "train",
    "--workdir": "train",
    "--output": "prepare",
  }
  given = [f"--mode={mode.get(flag, 'sample')}", f"{flag}=~nobody_here/a"]
  if "edit" in given[0]:
    given += ["--task=inpaint", f"--input={tmp_path}"][: 1 if flag == "--input" else 2]
  where = [] if flag == "--workdir" else [f"--workdir={tmp_path / 'run'}"]
  given += [] if "data" in flag else [f"--config.data.source.path={tmp_path}"]
  code, output = call(DENSE, "--config.data.source=folder", *where, *given)
  assert_refused(code, output, "error: .*no home folder ~nobody_here")


def test_wrong_data_give_one_message(tmp_path):
  write(tmp_path / "a", **{"cat": 1, "dog": 1, ".": 1})
  (tmp_path / "a.zip").write_bytes(b"PK")
  flags = [DENSE, "--config.data.source=folder", "--config.data.hold_out=0", f"--workdir={tmp_path / 'run'}"]
  for path, message in (
    ("a", "1 image.s. without a class, such as .*a/0.png"),
    ("a.zip", "a file; expected a folder.*unpack it first"),
  ):
    code, output = call(
      *flags, f"--config.data.source.path={tmp_path / path}", "--config.model.conditions.classes=classes(number=2)"
    )
    assert_refused(code, output, message)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("photos", "num_held_out"), [(450, 45), (12, 1)])
def test_the_folder_recipe_works_for_small_folders(tmp_path, photos, num_held_out):
  write(tmp_path, photos=photos)
  config = folder.get_config()
  config.data.image_size, config.data.source.path = 8, str(tmp_path)
  train, held_out = reading.read_data(experiment_of(config))
  assert (len(train), len(held_out)) == (photos - num_held_out, num_held_out)


def test_a_small_folder_trains_and_is_scored(tmp_path):
  write(tmp_path / "photos", a=7, b=6)
  flags = [
    "--config.data.source=folder",
    f"--config.data.source.path={tmp_path / 'photos'}",
    "--config.data.hold_out=-1",
  ]
  flags += ["--config.training.steps=2", "--config.evaluation.reference=", "--config.evaluation.num_samples=16"]
  code, output = call(DENSE, f"--workdir={tmp_path / 'run'}", *flags)
  assert code == 0, output
  assert "12 training images" in output, output


def write_splits(root):
  for split, count in (("train", 3), ("test", 2)):
    (root / split / "a").mkdir(parents=True)
    for index in range(count):
      Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / split / "a" / f"{index}.png")


def test_folders_with_splits_are_read(tmp_path):
  write_splits(tmp_path)
  train, held_out = reading.read_data(experiment(tmp_path))
  assert (len(train), len(held_out)) == (3, 2)
  train, held_out = reading.read_data(experiment(tmp_path, eval_split="", data={"hold_out": 2}))
  assert (len(train), len(held_out)) == (1, 2), "held-out images come from the training split only"
  assert reading.read_data(experiment(tmp_path / "train"))[1] is None, "folders of classes are no splits"
  with pytest.raises(ValueError, match=r"expected .*tset too, or neither"):
    reading.read_data(experiment(tmp_path, eval_split="tset"))
  with pytest.raises(ValueError, match="data.source.path"):
    reading.read_data(experiment("", eval_split="tset"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_broken_file_in_either_split_is_named(tmp_path, split):
  for name in ("train", "test"):
    (tmp_path / name).mkdir()
    for index in range(4):
      Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name / f"{index}.png")
  (tmp_path / split / "2.png").write_bytes(b"broken")
  with pytest.raises(ValueError, match=rf"{split}.2\.png"):
    reading.read_data(experiment(tmp_path))
