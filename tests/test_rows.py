"""Rows on disk: gone on with where they stood, and never taken for what they are not."""

import json

import numpy as np
import pytest

from ddpm_jax.rows import Rows

WHOLE = np.arange(10 * 6, dtype=np.uint8).reshape(10, 2, 3)


def open_rows(path, identity=1, shape=WHOLE.shape, dtype=np.uint8):
  return Rows(path / "rows", {"of": identity}, shape, dtype)


def test_an_interrupted_array_is_gone_on_with(tmp_path):
  rows = open_rows(tmp_path)
  assert rows.done == 0
  rows.write(WHOLE[:4], {"most": 3})
  again = open_rows(tmp_path)
  assert (again.done, again.notes) == (4, {"most": 3})
  again.write(WHOLE[4:8], {"most": 5})
  # More than there is room for, as the last batch is.
  again.write(np.concatenate([WHOLE[8:], WHOLE]), {"most": 5})
  np.testing.assert_array_equal(again.finish("images", labels=np.arange(10)), WHOLE)
  assert [path.name for path in tmp_path.iterdir()] == ["rows.npz"]
  with np.load(tmp_path / "rows.npz") as file:
    np.testing.assert_array_equal(file["images"], WHOLE)
    np.testing.assert_array_equal(file["labels"], np.arange(10))
  whole = open_rows(tmp_path)
  assert (whole.done, whole.notes) == (10, {"most": 5})
  np.testing.assert_array_equal(whole.finish("images"), WHOLE)


@pytest.mark.parametrize("other", [{"identity": 2}, {"shape": (9, 2, 3)}, {"dtype": np.float32}])
def test_others_begin_anew(tmp_path, other):
  open_rows(tmp_path).write(WHOLE[:4], {})
  assert open_rows(tmp_path, **other).done == 0
  assert open_rows(tmp_path).done == 0


def test_what_was_whole_of_another_is_replaced(tmp_path):
  rows = open_rows(tmp_path)
  rows.write(WHOLE, {})
  rows.finish("images")
  other = open_rows(tmp_path, identity=2)
  assert other.done == 0
  other.write(WHOLE[::-1], {})
  np.testing.assert_array_equal(other.finish("images"), WHOLE[::-1])


@pytest.mark.parametrize("change", [{"done": 11}, {"done": -1}, {"done": "4"}, {"notes": None}, {"done": None}])
def test_notes_that_make_no_sense_are_not_used(change, tmp_path):
  open_rows(tmp_path).write(WHOLE[:4], {})
  path = tmp_path / "rows.partial.json"
  notes = json.loads(path.read_text()) | change
  path.write_text(json.dumps({key: value for key, value in notes.items() if key != "digest" and value is not None}))
  assert open_rows(tmp_path).done == 0


def test_rows_that_are_not_done_are_not_believed_to_be(tmp_path):
  """One digit of the file has changed."""
  open_rows(tmp_path).write(WHOLE[:4], {})
  notes = tmp_path / "rows.partial.json"
  text = notes.read_text()
  assert '"done": 4' in text
  notes.write_text(text.replace('"done": 4', '"done": 6'))
  assert open_rows(tmp_path).done == 0


@pytest.mark.parametrize("name", ["rows.partial.npy", "rows.partial.json", "rows.npz"])
def test_a_broken_file_is_no_file(tmp_path, name):
  open_rows(tmp_path).write(WHOLE[:4], {})
  (tmp_path / name).write_bytes(b"PK\x03\x04 cut off")
  rows = open_rows(tmp_path)
  assert rows.done == (4 if name == "rows.npz" else 0)
  rows.write(WHOLE[rows.done :], {})
  np.testing.assert_array_equal(rows.finish("images"), WHOLE)
