"""Test that an array on disk resumes after an interruption, and that damaged files are never used."""

import numpy as np
import pytest

from ddpm_jax.storage.files import WriteError
from ddpm_jax.storage.rows import ResumableArray

ARRAY = np.arange(10 * 6, dtype=np.uint8).reshape(10, 2, 3)


def open_rows(path, identity=1, shape=ARRAY.shape, dtype=np.uint8):
  return ResumableArray(path / "rows", {"of": identity}, "images", shape, dtype, damaged=path / "damaged")


def finished(path):
  rows = open_rows(path)
  rows.write(ARRAY, {"max_nfe": 5})
  rows.finish(classes=np.arange(10))
  return path / "rows.npz"


def test_an_interrupted_array_is_resumed(tmp_path):
  rows = open_rows(tmp_path)
  assert rows.done == 0
  rows.write(ARRAY[:4], {"max_nfe": 3})
  resumed = open_rows(tmp_path)
  assert (resumed.done, resumed.notes) == (4, {"max_nfe": 3})
  resumed.write(ARRAY[4:8], {"max_nfe": 5})
  # The last batch has more rows than the array has room for.
  resumed = open_rows(tmp_path)
  resumed.write(np.concatenate([ARRAY[8:], ARRAY]), {"max_nfe": 5})
  np.testing.assert_array_equal(resumed.finish(classes=np.arange(10)), ARRAY)
  assert [path.name for path in tmp_path.iterdir()] == ["rows.npz"]
  with np.load(tmp_path / "rows.npz") as file:
    np.testing.assert_array_equal(file["images"], ARRAY)
    np.testing.assert_array_equal(file["classes"], np.arange(10))
  reopened = open_rows(tmp_path)
  assert (reopened.done, reopened.notes) == (10, {"max_nfe": 5})
  np.testing.assert_array_equal(reopened.finish(), ARRAY)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
def test_arrays_of_any_type_are_restored_unchanged(tmp_path, dtype):
  rows = open_rows(tmp_path, dtype=dtype)
  rows.write(ARRAY.astype(dtype), {})
  rows.finish()
  np.testing.assert_array_equal(open_rows(tmp_path, dtype=dtype).finish(), ARRAY.astype(dtype), strict=True)


@pytest.mark.parametrize("changed", [{"identity": 2}, {"shape": (9, 2, 3)}, {"dtype": np.float32}])
def test_another_identity_shape_or_type_starts_from_zero(tmp_path, changed):
  open_rows(tmp_path).write(ARRAY[:4], {})
  assert open_rows(tmp_path, **changed).done == 0
  assert open_rows(tmp_path).done == 0


def test_a_finished_array_of_another_identity_is_replaced(tmp_path, capsys):
  finished(tmp_path)
  other = open_rows(tmp_path, identity=2)
  assert other.done == 0
  other.write(ARRAY[::-1], {})
  np.testing.assert_array_equal(other.finish(), ARRAY[::-1])
  assert not (tmp_path / "damaged").exists()
  assert capsys.readouterr().err == ""


def flip(path, position):
  """Flip one bit of a file.

  `position` is the index of a byte. If `position` is a bytes object, the bit is in the middle of these bytes.
  """
  content = bytearray(path.read_bytes())
  position = content.index(position) + len(position) // 2 if isinstance(position, bytes) else position
  content[position] ^= 4
  path.write_bytes(content)


def cut(path, size):
  path.write_bytes(path.read_bytes()[:size])


# Ways to damage an array with four of ten rows done.
PARTIAL = {
  "a bit of a row": lambda path: flip(path / "rows.partial.npy", ARRAY[2:4].tobytes()),
  "a bit of the array's header": lambda path: flip(path / "rows.partial.npy", b"'shape': (10,"),
  "an array truncated in finished rows": lambda path: cut(path / "rows.partial.npy", -50),
  "an array truncated in missing rows": lambda path: cut(path / "rows.partial.npy", -3),
  "an empty array": lambda path: cut(path / "rows.partial.npy", 0),
  "a bit of the number of rows": lambda path: flip(path / "rows.partial.json", b'"done": 4'),
  "a bit of the notes": lambda path: flip(path / "rows.partial.json", b'"max_nfe": 3'),
  "a bit of the identity": lambda path: flip(path / "rows.partial.json", b"of"),
  "a bit of the digest": lambda path: flip(path / "rows.partial.json", -5),
  "truncated notes": lambda path: cut(path / "rows.partial.json", -9),
  "notes that are not text": lambda path: (path / "rows.partial.json").write_bytes(b"\xff\0" * 9),
  "notes that are not an object": lambda path: (path / "rows.partial.json").write_text("[4]"),
  "no array": lambda path: (path / "rows.partial.npy").unlink(),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_damaged_partial_files_are_set_aside_and_computed_again(tmp_path, capsys, name):
  open_rows(tmp_path).write(ARRAY[:4], {"max_nfe": 3})
  PARTIAL[name](tmp_path)
  before = {path.name: path.read_bytes() for path in tmp_path.glob("rows*")}
  rows = open_rows(tmp_path)
  assert (rows.done, rows.notes) == (0, {})
  assert {path.name: path.read_bytes() for path in (tmp_path / "damaged").iterdir()} == before
  error = capsys.readouterr().err
  for file in before:
    assert f"warning: {tmp_path / file} is damaged: " in error
  rows.write(ARRAY, {})
  np.testing.assert_array_equal(rows.finish(), ARRAY)


ARCHIVE = {
  "a bit of a row": lambda path: flip(path, ARRAY.tobytes()),
  "a bit of the classes": lambda path: flip(path, np.arange(10)[3:7].tobytes()),
  "a bit of the identity": lambda path: flip(path, '{"of": 1}'.encode("utf-32-le")),
  "a bit of the array's header": lambda path: flip(path, b"'shape': (10,"),
  "a bit of a member's name": lambda path: flip(path, b"images.npy"),
  "truncated": lambda path: cut(path, -100),
  "truncated near its start": lambda path: cut(path, 30),
  "empty": lambda path: cut(path, 0),
  "not an archive": lambda path: path.write_text("<html>"),
  "another archive": lambda path: np.savez(path, x=np.arange(3)),
}


def test_no_flipped_bit_of_an_archive_changes_the_array(tmp_path):
  """A flipped bit is detected or has no effect. For example, a bit of a date has no effect."""
  path = finished(tmp_path)
  content = path.read_bytes()
  rng, num_detected = np.random.default_rng(0), 0
  for position in rng.permutation(len(content))[:300]:
    path.write_bytes(content)
    with path.open("r+b") as file:
      file.seek(position)
      file.write(bytes([content[position] ^ 1 << int(rng.integers(8))]))
    rows = open_rows(tmp_path)
    num_detected += rows.done == 0
    if rows.done:
      assert rows.notes == {"max_nfe": 5}
      np.testing.assert_array_equal(rows.finish(), ARRAY, strict=True)
  assert num_detected > 200


@pytest.mark.parametrize("name", ARCHIVE)
def test_a_damaged_archive_is_set_aside_and_computed_again(tmp_path, capsys, name):
  path = finished(tmp_path)
  ARCHIVE[name](path)
  before = path.read_bytes()
  rows = open_rows(tmp_path)
  assert rows.done == 0
  assert (tmp_path / "damaged" / "rows.npz").read_bytes() == before
  assert f"warning: {path} is damaged: " in capsys.readouterr().err
  rows.write(ARRAY, {})
  np.testing.assert_array_equal(rows.finish(), ARRAY)


def test_files_set_aside_are_not_overwritten(tmp_path):
  for number in range(3):
    cut(finished(tmp_path), 50 + number)
    open_rows(tmp_path)
  sizes = {path.name: path.stat().st_size for path in (tmp_path / "damaged").iterdir()}
  assert sizes == {"rows.npz": 50, "rows_2.npz": 51, "rows_3.npz": 52}


def test_a_full_disk_keeps_finished_rows(tmp_path, monkeypatch):
  rows = open_rows(tmp_path)
  rows.write(ARRAY, {})

  def fail(*_, **__):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np, "savez", fail)
  with pytest.raises(WriteError, match=r"Cannot write .*rows\.npz: No space left on device.*Make room"):
    rows.finish()
  monkeypatch.undo()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.partial.json", "rows.partial.npy"]
  np.testing.assert_array_equal(open_rows(tmp_path).finish(), ARRAY)


def test_no_room_for_the_full_array_is_an_error_at_the_start(tmp_path, monkeypatch):
  def fail(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("os.posix_fallocate", fail)
  with pytest.raises(WriteError, match=r"Cannot write .*rows\.partial\.npy: No space left"):
    open_rows(tmp_path)
  assert list(tmp_path.iterdir()) == []
