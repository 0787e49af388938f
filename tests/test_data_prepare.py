"""Test --mode=prepare with folders and with custom TFDS builders, and test reading the prepared data."""

import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import data
from ddpm_jax.config import spec
from ddpm_jax.runs import preparing, reading
from ddpm_jax.storage import sealed
from tests.conftest import ROOT
from tests.pictures import random_pixels, truncate, write_builder, write_folder
from tests.recipes import experiment_of, tiny_config


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def experiment(source, *, classes=0, data=None, **arguments):
  """Return an experiment that reads a data source.

  `arguments` are the arguments of the source. `data` has values for other keys of the section `data`.
  """
  config = tiny_config()
  config.data.source = spec(f"data.{source}", **arguments)
  config.data.update({"image_size": 6, "channels": 3, "hold_out": 0} | (data or {}))
  if classes:
    config.model.conditions.classes = spec("conditions.classes", number=classes)
  return experiment_of(config)


# TFDS.


def test_a_custom_builder_is_prepared_read_and_packed(tmp_path, capsys):
  write_builder(tmp_path / "own_squares.py", "OwnSquares")
  keys = {"name": "own_squares", "path": str(tmp_path / "tfds")}
  with pytest.raises(ValueError, match=r"'own_squares', which TFDS does not know.*data\.source\.module"):
    preparing.run_prepare(experiment("tfds", **keys), None)
  own = experiment("tfds", **keys, module=str(tmp_path / "own_squares.py"))
  preparing.run_prepare(own, None)
  printed = capsys.readouterr().out
  assert "train 7, test 2" in printed
  assert str(tmp_path / "tfds" / "own_squares") in printed
  train, held_out = reading.read_data(own)
  assert (len(train), len(held_out)) == (7, 2)
  for index in range(7):
    np.testing.assert_array_equal(train[index]["image"], random_pixels(train[index]["classes"]))
  assert data.TfdsSource("own_squares", "train", (3, 3), 1, keys["path"])[0]["image"].shape == (3, 3, 1)
  preparing.run_prepare(own, None)
  assert "prepared already" in capsys.readouterr().out
  preparing.run_prepare(own, tmp_path / "packed")
  packed, _ = reading.read_sources(experiment("packed", path=str(tmp_path / "packed")))
  for index in range(7):
    np.testing.assert_array_equal(packed[index]["image"], random_pixels(packed[index]["classes"]))
  assert "tensorflow" not in sys.modules


class Records(list):
  """Simulate the result of `tensorflow_datasets.data_source`, as a list of records."""

  dataset_info = types.SimpleNamespace(features={"image": None})


@pytest.mark.parametrize(
  ("record", "level", "expected_class"),
  [
    ({"image": np.full((6, 6, 1), 200 * 257, np.uint16), "label": 3}, 200, 3),
    ({"image": np.full((6, 6, 1), 200, np.uint8)}, 200, data.NO_CLASS),
    ({"image": np.full((6, 6, 3), 200, np.uint8), "label": np.float32(0.5)}, 200, data.NO_CLASS),
    ({"image": np.full((6, 6, 3), 200, np.uint8), "label": np.array([1, 0])}, 200, data.NO_CLASS),
  ],
)
def test_records_may_lack_a_class_and_may_have_16_bits(monkeypatch, record, level, expected_class):
  monkeypatch.setattr("tensorflow_datasets.data_source", lambda **where: Records([record]))
  item = data.TfdsSource("squares", "train", (6, 6), 1)[0]
  assert np.all(item["image"] == level)
  assert item["classes"] == expected_class
  if expected_class == data.NO_CLASS:
    gray = {"channels": 1}
    assert len(reading.read_data(experiment("tfds", data=gray, eval_split=""))[0]) == 1
    with pytest.raises(ValueError, match=r"1 image\(s\) without a class for .*a class for each"):
      reading.read_data(experiment("tfds", classes=4, data=gray, eval_split=""))


@pytest.mark.parametrize(
  ("record", "message"),
  [
    ({"image": np.zeros((6, 6, 1), np.float32)}, "record 0 of squares, train: its pixels are floats"),
    ({"image": np.zeros((6, 6, 1), np.uint8), "label": 2**40}, "classes from 1099511627776"),
  ],
)
def test_records_with_floats_or_huge_labels_are_errors(monkeypatch, record, message):
  monkeypatch.setattr("tensorflow_datasets.data_source", lambda **where: Records([record]))
  with pytest.raises(ValueError, match=message):
    data.TfdsSource("squares", "train", (6, 6), 1)[0]


def test_reading_needs_neither_the_builder_nor_tensorflow(tmp_path):
  write_builder(tmp_path / "far_squares.py", "FarSquares")
  data.prepare_tfds("far_squares", str(tmp_path / "tfds"), str(tmp_path / "far_squares.py"))
  # Open the source in this process, which has the builder, and read it as a worker does: in a process without the
  # builder.
  source = data.TfdsSource("far_squares", "train", (6, 6), 3, str(tmp_path / "tfds"))
  (tmp_path / "source").write_bytes(pickle.dumps(source))
  code = (
    f"import pickle, sys; source = pickle.load(open({str(tmp_path / 'source')!r}, 'rb')); "
    "print(len(source), source[0]['image'].sum() > 0, 'tensorflow' in sys.modules, 'far_squares' in sys.modules)"
  )
  result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
  assert result.stdout.split() == ["7", "True", "False", "False"]


def test_wrong_modules_are_errors(tmp_path):
  with pytest.raises(ValueError, match="no_such_module"):
    data.prepare_tfds("squares", str(tmp_path), "no_such_module")
  with pytest.raises(ValueError, match="does not exist"):
    data.prepare_tfds("squares", str(tmp_path), str(tmp_path / "none.py"))
  (tmp_path / "json.py").write_text("")
  with pytest.raises(ValueError, match="another module is called 'json'"):
    data.prepare_tfds("squares", str(tmp_path), str(tmp_path / "json.py"))


def test_an_unknown_name_gets_a_suggestion(tmp_path):
  with pytest.raises(ValueError, match=r"'cifar_10'.*Did you mean 'cifar10'"):
    data.prepare_tfds("cifar_10", str(tmp_path))


def test_the_error_for_unprepared_data_explains_how_to_prepare_it(tmp_path):
  with pytest.raises(ValueError, match=r"'cifar10'.*ddpm_jax\[prepare\].*--mode=prepare.*source=folder"):
    data.TfdsSource("cifar10", "train", (32, 32), 3, str(tmp_path))


def test_missing_tensorflow_is_an_error_before_the_download(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  def never(*arguments, **kwargs):
    raise AssertionError("a download")

  monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", never)
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"'cifar10' needs tensorflow.*ddpm_jax\[prepare\]"):
    data.prepare_tfds("cifar10", str(tmp_path))


class Lmdb:
  """Simulate the package lmdb with a folder that has a file per record."""

  def __init__(self, path):
    self.path = Path(path)

  def begin(self):
    return self

  def __enter__(self):
    return self

  def __exit__(self, *error):
    return None

  def cursor(self):
    return ((path.name.encode(), path.read_bytes()) for path in sorted(self.path.iterdir()))


def test_lsun_is_read_without_tensorflow_io(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  for split, count in (("train", 3), ("val", 1)):
    (tmp_path / split / f"bedroom_{split}_lmdb").mkdir(parents=True)
    for index in range(count):
      Image.fromarray(random_pixels(index, 8)).save(
        tmp_path / split / f"bedroom_{split}_lmdb" / str(index), "webp", lossless=True
      )
  fake = types.SimpleNamespace(open=lambda path, readonly, lock: Lmdb(path))
  monkeypatch.setitem(sys.modules, "lmdb", fake)
  monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
  monkeypatch.setattr(
    tfds.download.DownloadManager,
    "download_and_extract",
    lambda self, urls: {name: str(tmp_path / name) for name in urls},
  )
  _, counts, _ = data.prepare_tfds("lsun/bedroom", str(tmp_path / "tfds"))
  assert counts == {"train": 3, "validation": 1}
  source = data.TfdsSource("lsun/bedroom", "train", (8, 8), 3, str(tmp_path / "tfds"))
  expected = {random_pixels(index, 8).tobytes() for index in range(3)}
  assert {source[index]["image"].tobytes() for index in range(3)} == expected


# Packing.


def test_a_pack_has_the_images_of_its_folder(tmp_path, capsys):
  write_folder(tmp_path / "images" / "train", count=5)
  write_folder(tmp_path / "images" / "test", count=2)
  folder = experiment("folder", path=str(tmp_path / "images"))
  preparing.run_prepare(folder, tmp_path / "packed")
  assert "10 of 6x6x3 packed, 0 omitted" in capsys.readouterr().out
  assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "packed"]
  for expected, got in zip(
    reading.read_sources(folder),
    reading.read_sources(experiment("packed", path=str(tmp_path / "packed"))),
    strict=True,
  ):
    assert len(expected) == len(got)
    assert expected.class_names == got.class_names
    np.testing.assert_array_equal(expected.classes, got.classes)
    order = np.random.default_rng(0).permutation(len(expected))
    np.testing.assert_array_equal(data.read(got, order)["image"], data.read(expected, order)["image"])
    np.testing.assert_array_equal(data.read(got, order)["classes"], data.read(expected, order)["classes"])
    assert got[1]["classes"] == expected[1]["classes"]


def test_several_shards_form_one_source(tmp_path, monkeypatch):
  from ddpm_jax.data import packing

  monkeypatch.setattr(packing, "_SHARD_BYTES", 3 * 6 * 6 * 3)
  write_folder(tmp_path / "images", count=5)
  source = data.FolderSource(tmp_path / "images", (6, 6))
  data.pack(source, tmp_path / "packed", {})
  assert len(list((tmp_path / "packed").glob("*.array_record"))) == 4
  read = data.PackedSource(tmp_path / "packed")
  order = np.random.default_rng(0).permutation(10)
  np.testing.assert_array_equal(data.read(read, order)["image"], data.read(source, order)["image"])
  (tmp_path / "packed" / "images-00002.array_record").unlink()
  with pytest.raises(ValueError, match=r"incomplete packed images.*images-00002"):
    data.PackedSource(tmp_path / "packed")


def test_broken_files_stop_packing_or_are_omitted(tmp_path, capsys):
  write_folder(tmp_path / "images")
  for name in ("cat/1.jpg", "dog/0.png"):
    truncate(tmp_path / "images" / name)
  folder = experiment("folder", path=str(tmp_path / "images"))
  with pytest.raises(ValueError, match=r"(?s)2 of 6 images.*cat/1\.jpg.*dog/0\.png"):
    preparing.run_prepare(folder, tmp_path / "packed")
  assert [path.name for path in tmp_path.iterdir()] == ["images"]
  capsys.readouterr()
  preparing.run_prepare(folder.replace(data__broken="skip"), tmp_path / "packed")
  printed = capsys.readouterr().out
  assert printed.count("cat/1.jpg") == printed.count("dog/0.png") == 1
  assert list(data.PackedSource(tmp_path / "packed").classes) == [0, 0, 1, 1]


def test_a_pack_of_another_shape_setting_or_version_is_an_error(tmp_path):
  write_folder(tmp_path / "images")
  preparing.run_prepare(experiment("folder", path=str(tmp_path / "images")), tmp_path / "packed")
  keys = {"source": "packed", "path": str(tmp_path / "packed"), "eval_split": ""}
  assert len(reading.read_data(experiment(**keys))[0]) == 6
  with pytest.raises(ValueError, match=r"\(6, 6, 3\).*expected \(8, 8, 3\)"):
    reading.read_data(experiment(**keys, data={"image_size": 8}))
  with pytest.raises(ValueError, match=r"bicubic.*expected.*'adm'"):
    reading.read_data(experiment(**keys, data={"resize": "adm"}))
  index = tmp_path / "packed" / "index.json"
  sealed.write_json(index, {**sealed.read_json(index), "version": 2})
  with pytest.raises(ValueError, match="version 2"):
    data.PackedSource(tmp_path / "packed")
  with pytest.raises(ValueError, match="contains no packed images"):
    data.PackedSource(tmp_path / "images")


@pytest.mark.parametrize(
  ("file", "offset", "message"),
  [
    ("classes.npy", -3, r"Cannot read the classes .*classes\.npy: the checksum does not match"),
    ("classes.npy", 60, r"Cannot read the classes .*classes\.npy"),
    ("index.json", 20, r"contains no packed images \(it"),
    ("images-00000.array_record", 300, r"Cannot read .*images-00000\.array_record"),
  ],
)
def test_a_flipped_bit_in_a_pack_is_an_error(tmp_path, file, offset, message):
  write_folder(tmp_path / "images", count=5)
  data.pack(data.FolderSource(tmp_path / "images", (6, 6)), tmp_path / "packed", {})
  content = bytearray((tmp_path / "packed" / file).read_bytes())
  content[offset] ^= 1
  (tmp_path / "packed" / file).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    data.read(data.PackedSource(tmp_path / "packed"), np.arange(10))


def test_a_custom_data_set_is_packed(tmp_path, capsys):
  images = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 5), np.uint8)

  def mine(fit, first, train_split="learn", eval_split="judge"):
    return data.Splits(*(data.ArraySource(part, np.arange(len(part))) for part in (images[:first], images[first:])))

  fit = data.Fit((6, 4), 5)
  data.prepare(mine, {"first": 3}, fit, tmp_path / "packed", check=data.classes_below(3))
  assert "learn: 3 of 6x4x5 packed, 0 omitted" in capsys.readouterr().out
  train, held_out = data.packed(fit, str(tmp_path / "packed"), "learn", "judge")
  np.testing.assert_array_equal(data.read(train, [0, 1, 2])["image"], images[:3])
  np.testing.assert_array_equal(data.read(held_out, [0, 1])["image"], images[3:])
  with pytest.raises(ValueError, match=r"data.source=mine: missing a required argument: 'first'"):
    data.prepare(mine, {}, fit, tmp_path / "other")
  with pytest.raises(ValueError, match="classes 0 to 2 for config.model.conditions.classes.number=2"):
    data.prepare(mine, {"first": 3}, fit, tmp_path / "other", check=data.classes_below(2))
  assert not (tmp_path / "other").exists()


def test_wrong_requests_to_prepare_are_errors(tmp_path):
  with pytest.raises(ValueError, match="needs no preparation"):
    preparing.run_prepare(experiment("digits"), None)
  folder = experiment("folder", path=str(tmp_path / "images"))
  with pytest.raises(ValueError, match="no --output"):
    preparing.run_prepare(folder, None)
  write_folder(tmp_path / "images")
  with pytest.raises(ValueError, match="nothing is overwritten"):
    preparing.run_prepare(folder, tmp_path / "images")


def test_preparing_data_needs_no_workdir(tmp_path):
  write_folder(tmp_path / "images")
  command = [sys.executable, "-m", "ddpm_jax.main", "--mode=prepare"]
  recipe = [
    "--config=tests/recipes.py",
    "--config.data.source=folder",
    f"--config.data.source.path={tmp_path / 'images'}",
  ]
  result = subprocess.run([*command, *recipe, f"--output={tmp_path / 'new'}"], cwd=ROOT, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  assert "6 of 8x8x1 packed" in result.stdout
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert result.returncode == 2
  assert "Got no --config" in result.stderr


def test_a_custom_data_set_may_omit_the_fit_or_rename_it(tmp_path):
  images = np.stack([random_pixels(seed) for seed in range(4)])

  def without_fit(path: str) -> data.Splits:
    del path
    return data.Splits(data.ArraySource(images))

  def renamed(size: data.Fit, path: str) -> data.Splits:
    assert size.channels == 3
    return without_fit(path)

  fit = data.Fit(images.shape[1:3], 3)
  for source in (without_fit, renamed):
    data.prepare(source, {"path": "photos"}, fit, tmp_path / source.__name__)
    train, _ = data.packed(fit, str(tmp_path / source.__name__))
    np.testing.assert_array_equal(train[3]["image"], images[3])
