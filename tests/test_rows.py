"""Rows on disk: gone on with where they stood, and never taken for what they are not."""

import numpy as np
import pytest

from ddpm_jax.storage.files import WriteError
from ddpm_jax.storage.rows import ResumableArray

WHOLE = np.arange(10 * 6, dtype=np.uint8).reshape(10, 2, 3)


def open_rows(path, identity=1, shape=WHOLE.shape, dtype=np.uint8):
  return ResumableArray(path / "rows", {"of": identity}, "images", shape, dtype, damaged=path / "damaged")


def finished(path):
  rows = open_rows(path)
  rows.write(WHOLE, {"most": 5})
  rows.finish(classes=np.arange(10))
  return path / "rows.npz"


def test_an_interrupted_array_is_gone_on_with(tmp_path):
  rows = open_rows(tmp_path)
  assert rows.done == 0
  rows.write(WHOLE[:4], {"most": 3})
  again = open_rows(tmp_path)
  assert (again.done, again.notes) == (4, {"most": 3})
  again.write(WHOLE[4:8], {"most": 5})
  # More than there is room for, as the last batch is.
  again = open_rows(tmp_path)
  again.write(np.concatenate([WHOLE[8:], WHOLE]), {"most": 5})
  np.testing.assert_array_equal(again.finish(classes=np.arange(10)), WHOLE)
  assert [path.name for path in tmp_path.iterdir()] == ["rows.npz"]
  with np.load(tmp_path / "rows.npz") as file:
    np.testing.assert_array_equal(file["images"], WHOLE)
    np.testing.assert_array_equal(file["classes"], np.arange(10))
  whole = open_rows(tmp_path)
  assert (whole.done, whole.notes) == (10, {"most": 5})
  np.testing.assert_array_equal(whole.finish(), WHOLE)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
def test_rows_of_any_type_come_back(tmp_path, dtype):
  rows = open_rows(tmp_path, dtype=dtype)
  rows.write(WHOLE.astype(dtype), {})
  rows.finish()
  np.testing.assert_array_equal(open_rows(tmp_path, dtype=dtype).finish(), WHOLE.astype(dtype), strict=True)


@pytest.mark.parametrize("other", [{"identity": 2}, {"shape": (9, 2, 3)}, {"dtype": np.float32}])
def test_others_begin_anew(tmp_path, other):
  open_rows(tmp_path).write(WHOLE[:4], {})
  assert open_rows(tmp_path, **other).done == 0
  assert open_rows(tmp_path).done == 0


def test_what_was_whole_of_another_is_replaced(tmp_path, capsys):
  finished(tmp_path)
  other = open_rows(tmp_path, identity=2)
  assert other.done == 0
  other.write(WHOLE[::-1], {})
  np.testing.assert_array_equal(other.finish(), WHOLE[::-1])
  assert not (tmp_path / "damaged").exists()
  assert capsys.readouterr().err == ""


def flip(path, place):
  """Flip one bit of a file: at a place, or in the middle of what is found there."""
  content = bytearray(path.read_bytes())
  place = content.index(place) + len(place) // 2 if isinstance(place, bytes) else place
  content[place] ^= 4
  path.write_bytes(content)


def cut(path, size):
  path.write_bytes(path.read_bytes()[:size])


# Of the four rows that are done; the others are not there yet.
PARTIAL = {
  "a bit of a row": lambda path: flip(path / "rows.partial.npy", WHOLE[2:4].tobytes()),
  "a bit of the array's header": lambda path: flip(path / "rows.partial.npy", b"'shape': (10,"),
  "an array cut in what is done": lambda path: cut(path / "rows.partial.npy", -50),
  "an array cut in what is not": lambda path: cut(path / "rows.partial.npy", -3),
  "an empty array": lambda path: cut(path / "rows.partial.npy", 0),
  "a bit of the number of rows": lambda path: flip(path / "rows.partial.json", b'"done": 4'),
  "a bit of the notes": lambda path: flip(path / "rows.partial.json", b'"most": 3'),
  "a bit of the identity": lambda path: flip(path / "rows.partial.json", b"of"),
  "a bit of the digest": lambda path: flip(path / "rows.partial.json", -5),
  "notes cut": lambda path: cut(path / "rows.partial.json", -9),
  "notes that are no text": lambda path: (path / "rows.partial.json").write_bytes(b"\xff\0" * 9),
  "notes that are no object": lambda path: (path / "rows.partial.json").write_text("[4]"),
  "no array": lambda path: (path / "rows.partial.npy").unlink(),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_a_part_that_is_damaged_is_set_aside_and_made_again(tmp_path, capsys, name):
  open_rows(tmp_path).write(WHOLE[:4], {"most": 3})
  PARTIAL[name](tmp_path)
  before = {path.name: path.read_bytes() for path in tmp_path.glob("rows*")}
  rows = open_rows(tmp_path)
  assert (rows.done, rows.notes) == (0, {})
  assert {path.name: path.read_bytes() for path in (tmp_path / "damaged").iterdir()} == before
  error = capsys.readouterr().err
  for file in before:
    assert f"warning: {tmp_path / file} is damaged: " in error
  rows.write(WHOLE, {})
  np.testing.assert_array_equal(rows.finish(), WHOLE)


ARCHIVE = {
  "a bit of a row": lambda path: flip(path, WHOLE.tobytes()),
  "a bit of the classes": lambda path: flip(path, np.arange(10)[3:7].tobytes()),
  "a bit of the identity": lambda path: flip(path, '{"of": 1}'.encode("utf-32-le")),
  "a bit of the array's header": lambda path: flip(path, b"'shape': (10,"),
  "a bit of a member's name": lambda path: flip(path, b"images.npy"),
  "cut": lambda path: cut(path, -100),
  "cut to its beginning": lambda path: cut(path, 30),
  "empty": lambda path: cut(path, 0),
  "another kind": lambda path: path.write_text("<html>"),
  "another archive": lambda path: np.savez(path, x=np.arange(3)),
}


def test_no_bit_of_an_archive_changes_what_is_read(tmp_path):
  """Of dates and the like nothing depends; all else is noticed."""
  path = finished(tmp_path)
  content = path.read_bytes()
  rng, seen = np.random.default_rng(0), 0
  for place in rng.permutation(len(content))[:300]:
    path.write_bytes(content)
    with path.open("r+b") as file:
      file.seek(place)
      file.write(bytes([content[place] ^ 1 << int(rng.integers(8))]))
    rows = open_rows(tmp_path)
    seen += rows.done == 0
    if rows.done:
      assert rows.notes == {"most": 5}
      np.testing.assert_array_equal(rows.finish(), WHOLE, strict=True)
  assert seen > 200


@pytest.mark.parametrize("name", ARCHIVE)
def test_an_archive_that_is_damaged_is_set_aside_and_made_again(tmp_path, capsys, name):
  path = finished(tmp_path)
  ARCHIVE[name](path)
  before = path.read_bytes()
  rows = open_rows(tmp_path)
  assert rows.done == 0
  assert (tmp_path / "damaged" / "rows.npz").read_bytes() == before
  assert f"warning: {path} is damaged: " in capsys.readouterr().err
  rows.write(WHOLE, {})
  np.testing.assert_array_equal(rows.finish(), WHOLE)


def test_what_was_set_aside_before_stays(tmp_path):
  for number in range(3):
    cut(finished(tmp_path), 50 + number)
    open_rows(tmp_path)
  sizes = {path.name: path.stat().st_size for path in (tmp_path / "damaged").iterdir()}
  assert sizes == {"rows.npz": 50, "rows_2.npz": 51, "rows_3.npz": 52}


def test_a_full_disk_leaves_what_is_done(tmp_path, monkeypatch):
  rows = open_rows(tmp_path)
  rows.write(WHOLE, {})

  def fail(*_, **__):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np, "savez", fail)
  with pytest.raises(WriteError, match=r"Cannot write .*rows\.npz: No space left on device.*Make room"):
    rows.finish()
  monkeypatch.undo()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.partial.json", "rows.partial.npy"]
  np.testing.assert_array_equal(open_rows(tmp_path).finish(), WHOLE)


def test_no_room_for_the_whole_array_is_said_at_once(tmp_path, monkeypatch):
  def fail(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("os.posix_fallocate", fail)
  with pytest.raises(WriteError, match=r"Cannot write .*rows\.partial\.npy: No space left"):
    open_rows(tmp_path)
  assert list(tmp_path.iterdir()) == []
