"""Test that all files and folders are written atomically, even on a full disk."""

import ast
import contextlib
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import data, interop, metrics, report
from ddpm_jax.storage import files, images, records, sealed
from ddpm_jax.storage.rows import ResumableArray
from tests import reports
from tests.parameters import random_params
from tests.recipes import experiment_of, tiny_config

RANDOM = np.random.default_rng(0)
NOISE = RANDOM.integers(0, 256, (16, 16, 16, 3), np.uint8)


@contextlib.contextmanager
def small_files(size):
  """Limit the size of each file that this process writes, so that writing fails as on a full disk."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_statistics(path):
  metrics.save_statistics(path / "x.npz", metrics.Statistics(metrics.gaussian(RANDOM.normal(size=(99, 40))), None, {}))


def export(path):
  config = tiny_config()
  interop.diffusers.save(path / "model", experiment_of(config).model, random_params(config))


def pack(path):
  settings = {"crop": 0}
  with files.atomic_folder(path / "packed") as folder:
    data.pack(data.ArraySource(NOISE, np.zeros(len(NOISE), np.int32)), folder, settings)


def write_rows(path):
  ResumableArray(path / "rows", {}, "rows", (99, 99), np.float64, damaged=path)


WRITERS = {
  "text": lambda path: files.write_text(path / "x.txt", "x" * 9999),
  "JSON": lambda path: sealed.write_json(path / "x.json", {"x": list(range(2000))}),
  "tensors": lambda path: sealed.save_tensors(path / "x.safetensors", {"x": RANDOM.normal(size=2000)}, {}),
  "classifier": lambda path: metrics.save_classifier(path / "c", {"a": {"b": RANDOM.normal(size=2000)}}, {}),
  "statistics": save_statistics,
  "picture": lambda path: images.save_grid(path / "x.png", NOISE),
  "report": lambda path: report.write(path / "x.html", reports.bare()),
  "rows": write_rows,
  "export": export,
  "packed images": pack,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_an_error_and_leaves_no_file(tmp_path, name):
  with (
    small_files(4000),
    pytest.raises(files.WriteError, match=r"Cannot write /.*File too large \(.* free there") as error,
  ):
    WRITERS[name](tmp_path)
  assert str(error.value).endswith("Make room, then run the same command again.")
  assert "unfinished" not in str(error.value)
  assert list(tmp_path.rglob("*")) == []
  # With enough room the files are written, with the default mode.
  WRITERS[name](tmp_path)
  (tmp_path / "plain").write_text("")
  mode = (tmp_path / "plain").stat().st_mode
  written = [path for path in tmp_path.rglob("*") if path.is_file()]
  assert len(written) > 1
  assert {path.stat().st_mode for path in written} == {mode}


@pytest.mark.parametrize("name", ["text", "JSON", "tensors", "picture", "report"])
def test_a_failed_write_keeps_the_existing_file(tmp_path, name):
  WRITERS[name](tmp_path)
  (path,) = tmp_path.iterdir()
  path.write_bytes(b"before")
  with small_files(4000), pytest.raises(files.WriteError):
    WRITERS[name](tmp_path)
  assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {path.name: b"before"}


def test_other_errors_are_raised_unchanged(tmp_path):
  with pytest.raises(ZeroDivisionError), files.atomic_file(tmp_path / "a") as path:
    path.write_text(f"{1 / 0}")
  with pytest.raises(FileNotFoundError), files.atomic_folder(tmp_path / "a"):
    (tmp_path / "missing").read_text()
  assert list(tmp_path.iterdir()) == []


def test_the_error_names_the_path_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(files.WriteError, match=r"Cannot write .*file/a: .* Make it writable, or choose another path"):
    files.write_text(tmp_path / "file" / "a", "x")
  (tmp_path / "folder").mkdir()
  with pytest.raises(files.WriteError, match=r"Cannot write .*folder: Is a directory"):
    files.write_text(tmp_path / "folder", "x")
  with pytest.raises(files.WriteError, match=r"Cannot write .*file/a"), files.atomic_folder(tmp_path / "file" / "a"):
    pass
  assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_text_is_written_as_utf_8_with_lone_surrogates_escaped(tmp_path):
  files.write_text(tmp_path / "a", "± \udcff")
  assert (tmp_path / "a").read_bytes() == "± \\udcff".encode()
  files.append_line(tmp_path / "a", "é")
  assert (tmp_path / "a").read_bytes() == "± \\udcffé\n".encode()


def test_file_names_may_be_as_long_as_the_system_allows(tmp_path):
  path = tmp_path / ("n" * 251 + ".txt")
  files.write_text(path, "x")
  assert path.read_text() == "x"


def test_lines_are_appended_atomically(tmp_path):
  path = tmp_path / "lines"
  with small_files(100):
    files.append_line(path, "a" * 60)
    with pytest.raises(files.WriteError, match=r"Cannot write .*lines: File too large"):
      files.append_line(path, "b" * 60)
    assert path.read_text() == "a" * 60 + "\n"
    files.append_line(path, "c" * 30)
  assert path.read_text() == "a" * 60 + "\n" + "c" * 30 + "\n"


def test_a_folder_appears_at_the_end_of_the_block(tmp_path):
  with files.atomic_folder(tmp_path / "new" / "folder") as folder:
    (folder / "part").mkdir()
    (folder / "part" / "a").write_text("a")
    assert not (tmp_path / "new" / "folder").exists()
  assert (tmp_path / "new" / "folder" / "part" / "a").read_text() == "a"
  assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder"]


def test_an_existing_empty_folder_is_not_replaced(tmp_path):
  """A rename cannot replace a mount point or a link, so new files move into the existing folder."""
  (tmp_path / "real").mkdir()
  (tmp_path / "link").symlink_to("real")
  inode = (tmp_path / "real").stat().st_ino
  with pytest.raises(ZeroDivisionError), files.atomic_folder(tmp_path / "link") as folder:
    (folder / "a").write_text(f"{1 / 0}")
  assert list((tmp_path / "real").iterdir()) == []
  with files.atomic_folder(tmp_path / "link") as folder:
    (folder / "a").write_text("a")
  assert (tmp_path / "link").is_symlink()
  assert (tmp_path / "real").stat().st_ino == inode
  assert {path.name: path.read_text() for path in (tmp_path / "real").iterdir()} == {"a": "a"}


def test_leftovers_of_a_killed_process_are_deleted(tmp_path):
  (tmp_path / ".unfinished-1-0").mkdir()
  (tmp_path / ".unfinished-1-0" / "half").write_text("")
  with files.atomic_folder(tmp_path) as folder:
    (folder / "a").write_text("a")
  assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("kind", ["file", "full", "dangling"])
def test_an_existing_output_is_refused(tmp_path, kind):
  path = tmp_path / "place"
  if kind == "file":
    path.write_text("precious")
  elif kind == "full":
    path.mkdir()
    (path / "precious").write_text("")
  else:
    path.symlink_to("nowhere")
  before = sorted(tmp_path.rglob("*"))
  with (
    pytest.raises(ValueError, match=r"Got the output .*place, .*expected a new or an empty folder"),
    files.atomic_folder(path),
  ):
    pass
  assert sorted(tmp_path.rglob("*")) == before


def test_pictures_are_png_files(tmp_path):
  images.save_grid(tmp_path / "a.png", NOISE)
  assert Image.open(tmp_path / "a.png").format == "PNG"


def test_a_log_on_a_full_disk_has_complete_lines_only(tmp_path):
  log = records.MetricLog(tmp_path, 0)
  log.scalars(1, {"loss": 0.5})
  with small_files(os.path.getsize(tmp_path / "metrics.jsonl") + 10):
    with pytest.raises(files.WriteError, match=r"Cannot write .*metrics\.jsonl: File too large"):
      log.scalars(2, {"loss": 0.25})
    # The file of TensorBoard already exceeds the limit.
    with pytest.raises(files.WriteError, match=r"Cannot write .*tensorboard: File too large"):
      log.image(3, "noise", NOISE[0])
    with pytest.raises(files.WriteError, match=r"Cannot write .*tensorboard: File too large"):
      log.close()
  assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'


# Methods that write a file or a folder. They may only be called inside `with files.atomic_file(...)`, or on one of
# `_SAFE_OWNERS`.
_WRITES = {
  "write_text",
  "write_bytes",
  "save",
  "savez",
  "savez_compressed",
  "save_file",
  "dump",
  "rename",
  "renames",
}
_SAFE_OWNERS = {"files", "sealed", "tensors", "interop", "diffusers", "checkpoints", "snapshots", "_manager"}


def _name(node):
  """Return the last name of an expression, such as "b" for `a.b` and "a" for `a`."""
  return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def writes(tree):
  """Yield the calls in a module that write files outside blocks of `with files.atomic_file(...)`."""
  guarded = set()
  for block in ast.walk(tree):
    if isinstance(block, ast.With) and any("files.atomic_file(" in ast.unparse(item) for item in block.items):
      guarded |= set(ast.walk(block))
  for call in ast.walk(tree):
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call not in guarded:
      owner, method = _name(call.func.value), call.func.attr
      mode = [word.value for word in call.args if isinstance(word, ast.Constant)]
      opens = method == "open" and any(word in ("w", "wb", "a", "ab", "x", "xb") for word in mode)
      if opens or (method == "replace" and owner == "os") or (method in _WRITES and owner not in _SAFE_OWNERS):
        yield ast.unparse(call)


def test_the_package_writes_files_atomically_only():
  unsafe = {}
  for path in sorted(Path(files.__file__).parents[1].rglob("*.py")):
    if calls := list(writes(ast.parse(path.read_text("utf-8")))):
      unsafe[path.name] = calls
  del unsafe["files.py"]
  assert unsafe == {
    # The first writes a picture to memory. The second moves a damaged file.
    "pictures.py": ["Image.fromarray(np.ascontiguousarray(image)).save(file, 'png', optimize=image.size < 100000.0)"],
    "sealed.py": ["os.rename(path, target)"],
  }


def test_unsafe_writes_are_detected():
  """`writes` finds each kind of unsafe write in an example."""
  text = "np.savez(a)\nPath(a).write_text(b)\nos.replace(a, b)\nopen_.open('wb')\nwith files.atomic_file(a) as t:\n  np.save(t, b)\n"
  assert len(list(writes(ast.parse(text)))) == 4
