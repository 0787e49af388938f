"""Test image folders in the layout of Hugging Face's ImageFolder, where metadata.jsonl gives the classes."""

import json
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from ddpm_jax import data
from ddpm_jax.config import spec
from ddpm_jax.data import metadata
from ddpm_jax.runs import preparing, reading
from tests.conftest import ROOT
from tests.pictures import random_pixels, truncate
from tests.recipes import experiment_of, tiny_config

FIT = data.Fit((6, 6))
GROUP = data.Fields(classes="group")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write(root, groups, lines=None):
  """Write an image for each path in `groups`, and a metadata.jsonl with a line for each image.

  `groups` maps the path of each image to its group, and each line has the path and the group. If `lines` is not None,
  metadata.jsonl has these lines instead. Each item of `lines` is an object or the text of a line.
  """
  for index, name in enumerate(groups):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random_pixels(index)).save(root / name)
  lines = (
    [{"file_name": name, "text": name, "group": group} for name, group in groups.items()] if lines is None else lines
  )
  texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
  (root / "metadata.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")


def read(root, fields=GROUP, **arguments):
  return data.folder(FIT, str(root), fields=fields, **arguments)


def classes_of(source):
  """Return a dict that maps the path of each image to the name of its class."""
  names = [*source.class_names, None]
  return {source.file(index): names[source[index]["classes"]] for index in range(len(source))}


GROUPS = {"c.png": "pear", "a.png": "fig", "sub/a.png": "pear", "sub/deep/b.png": "apple"}


def test_a_field_gives_each_image_its_class(tmp_path, capsys):
  write(tmp_path, GROUPS)
  source = read(tmp_path).train
  assert classes_of(source) == {str(tmp_path / name): group for name, group in GROUPS.items()}
  assert source.class_names == ["apple", "fig", "pear"]
  np.testing.assert_array_equal([source[index]["classes"] for index in range(4)], source.classes)
  for index in range(4):
    number = [str(tmp_path / name) for name in GROUPS].index(source.file(index))
    np.testing.assert_array_equal(source[index]["image"], random_pixels(number))
  printed = capsys.readouterr().out
  assert "classes from the field 'group': 0 apple, 1 fig, 2 pear" in printed
  assert "skipped" not in printed


def test_without_fields_the_sub_folders_are_classes(tmp_path, capsys):
  write(tmp_path, GROUPS)
  source = data.folder(FIT, str(tmp_path)).train
  assert source.class_names == ["sub"]
  assert list(source.classes) == [data.NO_CLASS, data.NO_CLASS, 0, 0]
  assert "that are not images: 1 .jsonl" in capsys.readouterr().out


def test_the_training_split_numbers_the_classes_of_both(tmp_path):
  write(tmp_path / "train", {"0.png": "b", "1.png": "c", "2.png": "a"})
  write(tmp_path / "test", {"0.png": "c", "1.png": "d", "2.png": "a"})
  train, held_out = read(tmp_path)
  assert train.class_names == held_out.class_names == ["a", "b", "c"]
  assert list(train.classes) == [1, 2, 0]
  assert list(held_out.classes) == [2, data.NO_CLASS, 0]
  with pytest.raises(
    ValueError,
    match=r"Got 1 image\(s\) without a class, such as .*/test/1\.png, .*a line in metadata\.jsonl.*'group'.*: a, b, c",
  ):
    data.load(data.Splits(train, held_out), check=data.classes_below(3))
  # One split as a whole data set.
  alone, none = read(tmp_path / "test")
  assert alone.class_names == ["a", "c", "d"]
  assert none is None


@pytest.mark.parametrize("names", [("only", ""), ("", "")])
def test_splits_with_other_names_or_none(tmp_path, names):
  write(tmp_path / names[0], GROUPS)
  splits = read(tmp_path, train_split=names[0], eval_split=names[1])
  assert len(splits.train) == 4


def test_integers_are_sorted_by_size_and_null_is_no_class(tmp_path):
  write(tmp_path, {"0.png": 10, "1.png": 9, "2.png": -1, "3.png": None, "4.png": 9})
  source = read(tmp_path).train
  assert source.class_names == ["-1", "9", "10"]
  assert list(source.classes) == [2, 1, 0, data.NO_CLASS, 1]


def test_an_image_without_a_line_has_no_class(tmp_path, capsys):
  write(tmp_path, GROUPS, [{"file_name": "c.png", "group": "pear"}, {"file_name": "a.png", "group": "fig"}])
  source = read(tmp_path).train
  assert list(source.classes) == [0, 1, data.NO_CLASS, data.NO_CLASS]
  assert f"2 image(s) have no line in {tmp_path}/metadata.jsonl, such as sub/a.png" in capsys.readouterr().out


def test_unusual_names_and_lines(tmp_path):
  groups = {"ü 'n\u2028 .png": "größe", "b\\c.png": "größe", "語/d.png": "\u00a0"}
  lines = [{"file_name": name, "group": group} for name, group in groups.items()]
  texts = [
    "\ufeff" + json.dumps(lines[0], ensure_ascii=False),
    "",
    "  " + json.dumps(lines[1]) + "\r",
    json.dumps(lines[2] | {"file_name": "./語//d.png"}),
  ]
  write(tmp_path, groups, texts)
  source = read(tmp_path).train
  assert classes_of(source) == {str(tmp_path / name): group for name, group in groups.items()}


LINE = {"file_name": "a.png", "group": "fig"}
BROKEN = {
  "no object": (
    [LINE, "[1, 2]"],
    r"line 2 of .*metadata\.jsonl, which is no JSON object: '\[1, 2\]'; expected one JSON object in each line",
  ),
  "no JSON": (
    [LINE, "a.png,fig"],
    r"line 2 of .*metadata\.jsonl, which cannot be parsed \(.*'a\.png,fig'; expected one",
  ),
  "an array": (["[", json.dumps(LINE), "]"], r"line 1 of .* cannot be parsed"),
  "too deep": (["[" * 100_000], r"line 1 of .* cannot be parsed \(maximum recursion|line 1 of .* cannot be parsed"),
  "no name": ([LINE, {"group": "fig"}], r"line 2 of .*jsonl without 'file_name'; expected the path"),
  "a number as name": ([{"file_name": 3, "group": "fig"}], r"line 1 of .*jsonl file_name=3; expected the path"),
  "twice": ([LINE, {}, LINE], "line 2"),
  "no field": (
    [LINE, {"file_name": "c.png", "grup": 1, "text": ""}],
    r"line 2 of .* without the field 'group'; expected --config\.data\.fields\.classes to name a field of the file, such as grup, text\. Did you mean 'grup'\?",
  ),
  "no fields": ([{"file_name": "c.png"}], r"without the field 'group'; .*such as \(none\)"),
  "no file": (
    [LINE, {"file_name": "z.png", "group": ""}, {"file_name": "sub", "group": ""}],
    r"Got 2 image\(s\) in .*: 'z\.png' \(line 2\), 'sub' \(line 3\); expected the paths of existing",
  ),
  "a lone surrogate": ([{"file_name": "\ud800.png", "group": ""}], r"Got 1 image\(s\) in .*'\\ud800\.png'"),
  "above": (
    [{"file_name": "../a.png", "group": ""}],
    r"line 1 of .* file_name='\.\./a\.png'; expected a path relative to the folder of metadata\.jsonl, without '\.\.'",
  ),
  "absolute": ([{"file_name": "/a.png", "group": ""}], r"file_name='/a\.png'; expected a path relative"),
  "a list": (
    [LINE | {"group": ["fig"]}],
    r"field 'group' with the value \['fig'\] in .*; expected a class: text, an integer or null",
  ),
  "a fraction": ([LINE | {"group": 0.5}], r"value 0\.5 in"),
  "a truth value": ([LINE | {"group": True}, LINE | {"group": 1, "file_name": "c.png"}], r"value True in"),
  "two types": ([LINE, {"file_name": "c.png", "group": 7}], r"both text and integers in .*, such as 'fig' and 7"),
  "all null": ([LINE | {"group": None}], r"'group' with null for all images"),
  "empty": ([], r"'group' with null for all images"),
}
BROKEN["twice"] = (
  [LINE, "", LINE],
  r"line 3 of .* with file_name='a\.png', which is also in line 1; expected one line for each",
)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_clear_error(tmp_path, case):
  lines, message = BROKEN[case]
  write(tmp_path, GROUPS, lines)
  with pytest.raises(ValueError, match=message):
    read(tmp_path)


def test_a_file_in_another_encoding_is_an_error(tmp_path):
  write(tmp_path, {"a.png": "x"})
  (tmp_path / "metadata.jsonl").write_bytes(json.dumps(LINE | {"group": "ä"}, ensure_ascii=False).encode("latin-1"))
  with pytest.raises(ValueError, match=r"Cannot read .*metadata\.jsonl after line 0.*expected UTF-8"):
    read(tmp_path)


@pytest.mark.parametrize(
  ("place", "message"),
  [
    (None, r"contains no metadata\.jsonl; expected .*metadata\.jsonl, with a line such as \{\"file_name\""),
    (
      "metadata.csv",
      r"but metadata\.csv, which is not supported; .*pandas\.read_csv\('metadata\.csv'\)\.to_json\('metadata\.jsonl'",
    ),
    ("metadata.parquet", r"metadata\.parquet, which is not supported; .*pandas\.read_parquet"),
    (
      "sub/metadata.jsonl",
      r"but sub/metadata\.jsonl; expected .*Set --config\.data\.source\.path to the folder with the splits",
    ),
    ("sub/deep/metadata.jsonl", r"but sub/deep/metadata\.jsonl; expected"),
  ],
)
def test_a_missing_file_is_an_error_that_names_other_files(tmp_path, place, message):
  write(tmp_path, GROUPS)
  (tmp_path / "metadata.jsonl").unlink()
  if place:
    (tmp_path / place).write_text("")
  with pytest.raises(ValueError, match=message):
    read(tmp_path)


def test_a_file_above_the_splits_is_an_error(tmp_path):
  write(tmp_path, {"train/a.png": "x", "test/a.png": "x"})
  with pytest.raises(
    ValueError,
    match=r"but the folder above does; expected .*/train/metadata\.jsonl\. Write a metadata\.jsonl for each split",
  ):
    read(tmp_path)


def test_a_folder_with_a_file_names_the_key_when_classes_are_missing(tmp_path):
  write(tmp_path, GROUPS)
  with pytest.raises(
    ValueError, match=r"the folder of its class: sub\. .*metadata\.jsonl, set --config\.data\.fields\.classes"
  ):
    data.load(data.folder(FIT, str(tmp_path)), check=data.classes_below(3))


def test_a_held_out_part_and_broken_images(tmp_path):
  write(tmp_path, {f"{index}.png": f"g{index % 3}" for index in range(9)})
  truncate(tmp_path / "4.png")
  source = read(tmp_path).train
  splits = data.load(data.Splits(source), broken="skip", hold_out=3, check=data.classes_below(3))
  assert (len(splits.train), len(splits.held_out)) == (6, 3)
  with pytest.raises(data.BrokenImage, match=r"4\.png"):
    source[4]


# In a config.


def experiment(source, fields=None, **arguments):
  config = tiny_config()
  config.data.source = spec(source, **arguments)
  config.data.update({"image_size": 6, "channels": 3, "hold_out": 0, "fields": fields or {}})
  config.model.conditions.classes = spec("conditions.classes", number=2)
  return experiment_of(config)


def test_a_config_selects_fields_and_a_pack_keeps_them(tmp_path):
  write(tmp_path / "images" / "train", {"0.png": "b", "1.png": "a", "2.png": "b"})
  write(tmp_path / "images" / "test", {"0.png": "b"})
  root, pack = str(tmp_path / "images"), str(tmp_path / "pack")
  own = experiment("data.folder", {"classes": "group"}, path=root)
  train, held_out = reading.read_data(own)
  assert (
    [item["classes"] for item in train] == [1, 0, 1] if hasattr(train, "__iter__") else list(train.classes) == [1, 0, 1]
  )
  preparing.run_prepare(own, tmp_path / "pack")
  for fields in ({"classes": "group"}, {}):
    packed, packed_out = reading.read_sources(experiment("data.packed", fields, path=pack))
    assert packed.class_names == packed_out.class_names == ["a", "b"]
    assert (list(packed.classes), list(packed_out.classes)) == ([1, 0, 1], [1])
  with pytest.raises(
    ValueError, match=r"images packed with .*'fields\.classes': 'group'.*Set .*--config\.data\.fields\.classes=group"
  ):
    reading.read_sources(experiment("data.packed", {"classes": "text"}, path=pack))


def test_flags_select_fields_and_prepare_packs_them(tmp_path):
  write(tmp_path / "images", GROUPS)
  command = [sys.executable, "-m", "ddpm_jax.main", "--mode=prepare", "--config=tests/recipes.py"]
  command += ["--config.data.source=folder", f"--config.data.source.path={tmp_path / 'images'}"]
  command += ["--config.data.fields.classes=group", f"--output={tmp_path / 'pack'}"]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stderr
  assert "classes from the field 'group': 0 apple, 1 fig, 2 pear" in result.stdout
  packed = data.PackedSource(tmp_path / "pack")
  assert packed.class_names == ["apple", "fig", "pear"]
  assert sorted(packed.classes) == [0, 1, 2, 2]


def test_a_source_without_fields_refuses_them():
  with pytest.raises(
    ValueError,
    match=r"Got config\.data\.fields=\{'classes': 'group'\} with config\.data\.source=data\.digits, which reads no",
  ):
    experiment("data.digits", {"classes": "group"})
  with pytest.raises(ValueError, match=r"'data\.fields\.class' as a config key.*Did you mean 'data\.fields\.classes'"):
    experiment("data.digits", ConfigDict({"class": "group"}))


def test_a_custom_source_may_take_fields(tmp_path):
  write(tmp_path / "images", GROUPS)
  (tmp_path / "own.py").write_text(
    "from ddpm_jax import data\n\n"
    "def mine(fit: data.Fit, chosen: data.Fields) -> data.Splits:\n"
    f"  return data.folder(fit, {str(tmp_path / 'images')!r}, fields=chosen)\n"
  )
  own = experiment(f"{tmp_path / 'own.py'}:mine", {"classes": "group"})
  assert own.data.source(FIT).train.class_names == ["apple", "fig", "pear"]


def test_a_mapping_as_fields_is_an_error(tmp_path):
  with pytest.raises(
    ValueError, match=r"Got a dict as fields of data\.folder; expected a Fields, such as data\.Fields\(classes="
  ):
    data.folder(FIT, str(tmp_path), fields={"classes": "group"})


def test_numbers_of_classes_are_exact():
  names, numbers = metadata.number_classes(["b", None, "a", "b"], "group", "here")
  assert names == ["a", "b"]
  assert list(numbers) == [1, data.NO_CLASS, 0, 1]
  assert list(metadata.number_classes([1, 3], "group", "here", ["3"])[1]) == [data.NO_CLASS, 0]
