"""Test captions of images: in metadata.jsonl, in text files, in .npz files and in TFDS data sets."""

import json
import os
import pickle
import re

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import data
from ddpm_jax.config import spec
from ddpm_jax.data import captions
from ddpm_jax.runs import preparing, reading
from tests.pictures import random_pixels, truncate, write_builder
from tests.recipes import experiment_of, tiny_config

FIT = data.Fit((6, 6))
TEXT, FILES = data.Fields(text="text"), data.Fields(text=".txt")
# Captions by image: accents, an emoji, several lines, and no caption.
CAPTIONS = {"b/0.png": "a red fox, in snow", "a/1.png": "größe 🦊\nsecond line", "a/2.png": "", "3.png": "\u00a0x\0y"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write_images(root, names):
  for index, name in enumerate(names):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random_pixels(index)).save(root / name)


def write(root, lines, names=CAPTIONS):
  """Write images and the lines of metadata.jsonl."""
  write_images(root, names)
  (root / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


def write_files(root, captions_by_name):
  """Write images, each with its caption in a text file next to it."""
  write_images(root, captions_by_name)
  for name, text in captions_by_name.items():
    (root / name).with_suffix(".txt").write_text(text, encoding="utf-8")


def lines_of(captions_by_name):
  return [{"file_name": name, "text": text} for name, text in captions_by_name.items()]


def texts_of(source):
  """Return a dict that maps the path of each image to its caption."""
  items = [source[index] for index in range(len(source))]
  assert all(type(item["text"]) is str for item in items)
  return {source.file(index): item["text"] for index, item in enumerate(items)}


def folder(root, fields=TEXT, **arguments):
  return data.folder(FIT, str(root), fields=fields, **arguments)


# metadata.jsonl


def test_a_field_gives_each_image_its_caption_and_the_sub_folders_stay_classes(tmp_path, capsys):
  write(tmp_path, lines_of(CAPTIONS))
  source = folder(tmp_path).train
  assert texts_of(source) == {str(tmp_path / name): text for name, text in CAPTIONS.items()}
  assert source.class_names == ["a", "b"]
  printed = capsys.readouterr().out
  assert f"1 of 4 image(s) have no caption in {tmp_path}/metadata.jsonl, such as {tmp_path}/a/2.png" in printed
  assert "they get the empty caption" in printed
  assert "skipped" not in printed


def test_null_no_field_and_no_line_are_the_empty_caption(tmp_path, capsys):
  lines = [{"file_name": "b/0.png", "text": "fox"}, {"file_name": "a/1.png", "text": None}, {"file_name": "a/2.png"}]
  write(tmp_path, lines)
  texts = texts_of(folder(tmp_path).train)
  assert [texts[str(tmp_path / name)] for name in CAPTIONS] == ["fox", "", "", ""]
  printed = capsys.readouterr().out
  assert "3 of 4 image(s) have no caption" in printed
  assert "1 image(s) have no line" in printed


def test_one_field_may_be_the_class_and_the_caption(tmp_path):
  write(tmp_path, [{"file_name": name, "text": text} for name, text in zip(CAPTIONS, "xyxy", strict=True)])
  source = folder(tmp_path, data.Fields("text", "text")).train
  assert source.class_names == ["x", "y"]
  assert texts_of(source) == {source.file(i): "xy"[source[i]["classes"]] for i in range(4)}


LINES = lines_of(CAPTIONS)
BROKEN = {
  "a list": (
    [*LINES[:-1], LINES[3] | {"text": ["a", "b"]}],
    r"'text' with the value \['a', 'b'\] in .*; expected one caption for each image, as text or null\. Write one caption",
  ),
  "a number": (
    [*LINES[:-1], LINES[3] | {"text": 3}],
    r"'text' with the value 3 in .*or null\. Choose another field with --config\.data\.fields\.text",
  ),
  "a lone surrogate": (
    [LINES[0] | {"text": "\ud800"}],
    r"metadata\.jsonl, field 'text': Got the caption '\\ud800', which cannot be written as UTF-8",
  ),
  "too long": (
    [LINES[0] | {"text": "é" * 32_769}],
    r"field 'text': Got a caption of more than 65,536 bytes, which starts with 'é",
  ),
  "all null": (
    [line | {"text": None} for line in LINES],
    r"'text' without a caption for any image in .*Choose another field",
  ),
  "no field": (
    [{"file_name": "b/0.png", "txet": "fox"}],
    r"Got .*metadata\.jsonl without the field 'text'; expected --config\.data\.fields\.text to name a field of the file, such as txet\. Did you mean 'txet'\?",
  ),
  "no lines": ([], r"metadata\.jsonl without the field 'text'; .*such as \(none\)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_metadata_is_one_clear_error(tmp_path, case):
  lines, message = BROKEN[case]
  write(tmp_path, lines)
  with pytest.raises(ValueError, match=message):
    folder(tmp_path)


def test_a_missing_file_names_both_layouts(tmp_path):
  write_images(tmp_path, CAPTIONS)
  with pytest.raises(
    ValueError, match=r'with a line such as \{"file_name": "0\.png", "text": "<text>"\}.*text=\.txt for captions'
  ):
    folder(tmp_path)


def test_each_split_has_its_own_captions(tmp_path):
  for split in ("train", "test"):
    write(tmp_path / split, lines_of({"0.png": split}), ["0.png"])
  assert [source[0]["text"] for source in folder(tmp_path)] == ["train", "test"]


# Text files


def test_text_files_beside_images_are_captions(tmp_path, capsys):
  texts = {"b/0.png": "\ufeff a red fox\r\n", "a/1.JPG": "größe 🦊\n\nsecond line\n", "a/2.png": "\n", "3.webp": "x"}
  write_files(tmp_path, texts)
  write_images(tmp_path, ["a/none.png"])
  (tmp_path / "a" / "notes.txt").write_text("no image has this name")
  source = folder(tmp_path, FILES).train
  expected = {name: text.strip("\ufeff \r\n") for name, text in texts.items()} | {"a/none.png": ""}
  assert texts_of(source) == {str(tmp_path / name): text for name, text in expected.items()}
  assert source.class_names == ["a", "b"]
  printed = capsys.readouterr().out
  assert f"1 of 5 image(s) have no caption in text files beside the images, such as {tmp_path}/a/none.png" in printed
  assert "not images: 1 .txt\n" in printed


def test_text_files_may_go_with_classes_in_metadata(tmp_path):
  write(tmp_path, [{"file_name": name, "group": "g"} for name in CAPTIONS])
  write_files(tmp_path, {name: name for name in CAPTIONS})
  source = folder(tmp_path, data.Fields("group", ".txt")).train
  assert source.class_names == ["g"]
  assert texts_of(source) == {str(tmp_path / name): name for name in CAPTIONS}


def test_a_folder_without_text_files_is_an_error(tmp_path):
  write_images(tmp_path, ["a.png"])
  (tmp_path / "b.txt").write_text("b")
  (tmp_path / "a.txt").mkdir()
  with pytest.raises(ValueError, match=r"fields\.text='\.txt' for .*contains no text file with the name of an image"):
    folder(tmp_path, FILES)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda path: path.write_bytes("ä".encode("latin-1")),
      r"a/0\.txt: it is not UTF-8 ",
    ),
    (lambda path: path.write_text("x" * 65_537), r"a/0\.txt: it has more than 65,536 bytes"),
    (lambda path: path.unlink(), r"a/0\.txt: No such file"),
  ],
)
def test_an_image_whose_text_file_cannot_be_read_is_a_broken_image(tmp_path, change, message, capsys):
  write_files(tmp_path, {"a/0.png": "x", "a/1.png": "y"})
  splits = folder(tmp_path, FILES)
  change(tmp_path / "a" / "0.txt")
  with pytest.raises(ValueError, match=f"Cannot read the caption .*{message}.*broken=skip"):
    data.load(splits, broken="stop")
  train = data.load(splits, broken="skip").train
  assert re.search(message, capsys.readouterr().out)
  assert [train[index]["text"] for index in range(2)] == ["y", "y"]
  np.testing.assert_array_equal(train[0]["image"], random_pixels(1))


def test_a_replaced_image_has_the_caption_of_its_replacement(tmp_path):
  names = [f"{index}.png" for index in range(5)]
  write_files(tmp_path, {name: name for name in names})
  truncate(tmp_path / "2.png")
  train, held_out = data.load(folder(tmp_path, FILES), broken="skip", hold_out=2)
  for source in (train, held_out):
    for item in (source[index] for index in range(len(source))):
      assert item["text"] != "2.png"
      np.testing.assert_array_equal(item["image"], random_pixels(names.index(item["text"])))


# Arrays and TFDS


def save(path, **arrays):
  np.savez(path, images=np.zeros((3, 6, 6, 3), np.uint8), **arrays)
  return str(path)


@pytest.mark.parametrize("kind", ["U", "S"])
def test_an_array_of_a_file_gives_captions_and_another_gives_classes(tmp_path, kind):
  texts = ["fox", "größe 🦊", ""]
  array = np.array([text.encode() for text in texts] if kind == "S" else texts)
  path = save(tmp_path / "a.npz", caption=array, labels=[9, 9, 9], kind=[2, 0, 1])
  batch = data.read(data.arrays(FIT, path, (), data.Fields("kind", "caption")).train, [2, 0, 1])
  assert list(batch["text"]) == ["", "fox", "größe 🦊"]
  assert list(batch["classes"]) == [1, 2, 0]
  if kind == "U":
    assert list(data.read(data.arrays(FIT, path, ["caption"]).train, [1])["caption"]) == ["größe 🦊"]


@pytest.mark.parametrize(
  ("array", "field", "message"),
  [
    ([1, 2, 3], "text", r"a\.npz: text\[0\]: Got a caption of type int; expected one caption for each image"),
    (["a", "b"], "text", r"a\.npz: Got text of shape \(2,\) for 3 images"),
    ([["a"]] * 3, "text", r"text\[0\]: Got a caption of type list"),
    ([b"\xff"] * 3, "text", r"text\[0\]: Got a caption that is not UTF-8"),
    (
      np.array(["a", None, "b"], object),
      "text",
      r"Object arrays cannot be loaded .*Save texts with np\.array\(texts, dtype=str\)",
    ),
    (["a"] * 3, "txet", r"fields\.text='txet' for .*contains images, text; expected .*Did you mean 'text'\?"),
  ],
)
def test_a_wrong_array_of_captions_is_an_error(tmp_path, array, field, message):
  path = save(tmp_path / "a.npz", text=array)
  with pytest.raises(ValueError, match=message):
    data.arrays(FIT, path, fields=data.Fields(text=field))


def test_a_feature_of_a_tfds_data_set_gives_captions(tmp_path):
  write_builder(tmp_path / "text_squares.py", "TextSquares")
  data.prepare_tfds("text_squares", str(tmp_path / "tfds"), str(tmp_path / "text_squares.py"))

  def read(**fields):
    return data.tfds(FIT, "text_squares", str(tmp_path / "tfds"), fields=data.Fields(**fields)).train

  source = pickle.loads(pickle.dumps(read(text="caption", classes="label")))
  batch = data.read(source, [3, 0])
  assert list(batch["text"]) == [f"größe {index}" for index in batch["classes"]]
  with pytest.raises(ValueError, match=r"fields\.text='captoin'.*image, label.*Did you mean 'caption'\?"):
    read(text="captoin")
  with pytest.raises(ValueError, match=r"record 0 of text_squares, train, feature 'tags': Got a caption of type "):
    read(text="tags")[0]


# Packs, and memory


def experiment(source, fields, **arguments):
  config = tiny_config()
  config.data.source = spec(f"data.{source}", **arguments)
  config.data.update({"image_size": 6, "channels": 3, "hold_out": 0, "fields": fields})
  return experiment_of(config)


def test_a_pack_keeps_captions(tmp_path):
  for split in ("train", "test"):
    write_files(tmp_path / "images" / split, CAPTIONS)
  own = experiment("folder", {"text": ".txt"}, path=str(tmp_path / "images"))
  preparing.run_prepare(own, tmp_path / "pack")
  read, _ = reading.read_data(own)
  expected = data.read(read, np.arange(4))
  for fields in ({"text": ".txt"}, {}):
    for packed in reading.read_sources(experiment("packed", fields, path=str(tmp_path / "pack"))):
      packed = pickle.loads(pickle.dumps(packed))
      batch = data.read(packed, np.arange(4))
      assert batch.keys() == expected.keys() == {"image", "classes", "text"}
      for name, array in expected.items():
        np.testing.assert_array_equal(batch[name], array)
      assert packed[1]["text"] == expected["text"][1]
  with pytest.raises(ValueError, match=r"--config\.data\.fields\.text=\.txt"):
    reading.read_sources(experiment("packed", {"text": "caption"}, path=str(tmp_path / "pack")))


def test_captions_take_the_bytes_of_their_texts_and_one_integer_each():
  texts = [f"{'größe 🦊 ' * (index % 7)}{index}" for index in range(10_000)]
  packed = captions.Captions(texts)
  assert [packed[index] for index in range(len(packed))] == texts
  assert not packed.empty.any()
  assert len(pickle.dumps(packed)) < sum(len(text.encode()) for text in texts) + 8 * len(texts) + 1000


# The pipeline


def lengths(texts):
  return {"length": [len(text) for text in texts], "first": np.array([text[:1] == "a" for text in texts])}


def captioned(count=30):
  texts = np.array(["a" * (index % 5) + str(index) for index in range(count)])
  images = np.zeros((count, 2, 2, 1), np.uint8)
  return data.ArraySource(images, np.arange(count), text=texts, other=texts), texts


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_host_functions_turn_texts_into_arrays_and_other_texts_are_left_out(workers):
  source, texts = captioned()
  batches = data.batches(source, 12, seed=0, flip=True, num_workers=workers, hosts={"text": lengths, "more": lengths})
  batch = next(batches)
  batches.close()
  assert batch.keys() == {"image", "classes", "text"}
  assert batch["text"]["length"].dtype == np.int32
  np.testing.assert_array_equal(batch["text"]["length"], [len(texts[index]) for index in batch["classes"]])
  np.testing.assert_array_equal(batch["text"]["first"], [texts[index][0] == "a" for index in batch["classes"]])
  raw = next(data.batches(source, 12, seed=0))
  assert list(raw["text"]) == list(raw["other"]) == list(texts[raw["classes"]])


def test_the_rows_of_all_processes_form_the_batch():
  source, _ = captioned()
  expected = next(data.batches(source, 7, seed=3, hosts={"text": lengths}))
  for rows in ([0, 2, 4, 6], [1, 3, 5]):
    batch = next(data.batches(source, 7, seed=3, hosts={"text": lengths}, rows=np.array(rows)))
    for name, array in expected["text"].items():
      np.testing.assert_array_equal(batch["text"][name], array[rows])


@pytest.mark.parametrize(
  ("host", "message"),
  [
    (
      lambda texts: [1.0],
      r"Got float32 of shape \(1,\) from the host function of 'text' for 4 items; expected numbers \[4, \.\.\.\]",
    ),
    (lambda texts: {"ids": 3}, r"Got int32 of shape \(\) from the host function of 'text\.ids'"),
    (lambda texts: texts, "Got text of shape"),
    (lambda texts: [2**40] * len(texts), "integers from 1099511627776"),
  ],
)
def test_a_wrong_host_function_is_an_error(host, message):
  with pytest.raises(ValueError, match=message):
    next(data.batches(captioned()[0], 4, seed=0, hosts={"text": host}))


def test_an_unreadable_folder_is_an_error(tmp_path):
  write_files(tmp_path, {"a/0.png": "x"})
  os.rename(tmp_path / "a", tmp_path / "b")
  with pytest.raises(ValueError, match="Cannot list the folder .*/a "):
    captions.find_files(os.fsencode(tmp_path), {b"a": b"0.png\0"})
