"""Test folders of images, and the cache of their lists of files."""

import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import data
from ddpm_jax.data import listing
from tests.pictures import backdate, write_folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  home = tmp_path_factory.mktemp("cache")
  monkeypatch.setenv("XDG_CACHE_HOME", str(home))
  return home


@pytest.fixture
def listed(monkeypatch):
  """Return a list to which each listing of a folder appends the folder's name."""
  folders = []

  def spy(path, *arguments):
    folders.append(path.decode().rsplit("/", 1)[1])
    return original(path, *arguments)

  original = listing._list
  monkeypatch.setattr(listing, "_list", spy)
  return folders


@pytest.fixture
def settled(monkeypatch):
  """Let the cache accept folders that changed just now.

  The cache also reads the time of the last status change, and `backdate` cannot set that time.
  """
  monkeypatch.setattr(listing, "_TICK_NS", -(10**18))


def names(root):
  source = data.FolderSource(root, (8, 8))
  return [source.file(index).removeprefix(f"{root}/") for index in range(len(source))]


def test_an_unchanged_folder_is_not_listed_again(tmp_path, listed, settled):
  write_folder(tmp_path / "images")
  backdate(tmp_path)
  first = data.FolderSource(tmp_path / "images", (8, 8))
  assert listed == ["images", "cat", "dog"]
  second = data.FolderSource(tmp_path / "images", (8, 8))
  assert listed == ["images", "cat", "dog"]
  assert [first.file(i) for i in range(6)] == [second.file(i) for i in range(6)]
  np.testing.assert_array_equal(first.classes, second.classes)
  assert first.class_names == second.class_names == ["cat", "dog"]
  np.testing.assert_array_equal(first[4]["image"], second[4]["image"])


def test_only_changed_folders_are_listed_again(tmp_path, listed, settled):
  root = tmp_path / "images"
  write_folder(root)
  backdate(root)
  before = names(root)
  assert before == sorted(before)
  listed.clear()
  (root / "dog" / "0.png").rename(root / "dog" / "9.png")
  assert names(root) == ["cat/0.png", "cat/1.jpg", "cat/2.bmp", "dog/1.jpg", "dog/2.bmp", "dog/9.png"]
  assert listed == ["dog"]
  (root / "cat" / "1.jpg").unlink()
  assert len(names(root)) == 5
  write_folder(root, classes=("ant",), count=1)
  assert names(root)[0] == "ant/0.png"
  assert data.FolderSource(root, (8, 8)).class_names == ["ant", "cat", "dog"]
  for path in (root / "ant").iterdir():
    path.unlink()
  (root / "ant").rmdir()
  assert len(names(root)) == 5


def test_a_folder_that_changed_just_now_is_listed_again(tmp_path, listed):
  """A change within one tick of the file system's clock may leave the modification time of the folder unchanged."""
  write_folder(tmp_path / "images")
  for _ in range(2):
    data.FolderSource(tmp_path / "images", (8, 8))
  assert listed == ["images", "cat", "dog"] * 2


def test_links_are_followed_once(tmp_path, settled):
  root = tmp_path / "images"
  write_folder(root)
  write_folder(tmp_path / "elsewhere", classes=("emu",), count=2)
  (root / "emu").symlink_to(tmp_path / "elsewhere" / "emu")
  (root / "dog" / "loop").symlink_to(root)
  (root / "twice").symlink_to(root / "cat")
  for _ in range(2):
    assert [name.split("/")[0] for name in names(root)] == ["cat"] * 3 + ["dog"] * 3 + ["emu"] * 2
    backdate(root)


@pytest.mark.parametrize("link", ["cat/more", "ant", "cat.png"])
def test_images_belong_to_their_folder_rather_than_to_a_link(tmp_path, link, settled):
  write_folder(tmp_path, count=1)
  (tmp_path / link).symlink_to(tmp_path / "dog")
  for _ in range(2):  # The second time reads the cache.
    source = data.FolderSource(tmp_path, (8, 8))
    assert source.class_names == ["cat", "dog"]
    assert [source.file(index) for index in range(2)] == [f"{tmp_path}/cat/0.png", f"{tmp_path}/dog/0.png"]
    assert list(source.classes) == [0, 1]


def test_the_data_folder_and_all_classes_may_be_links(tmp_path, settled):
  write_folder(tmp_path / "store", classes=("x", "y"), count=1)
  (tmp_path / "images").mkdir()
  for name, place in (("b", "x"), ("a", "y")):
    (tmp_path / "images" / name).symlink_to(tmp_path / "store" / place)
  (tmp_path / "link").symlink_to("images")
  assert names(tmp_path / "link") == ["a/0.png", "b/0.png"]


@pytest.mark.parametrize("target", ["/nowhere/cat", "dog/../../cat", "cat"])
def test_a_dangling_link_that_may_be_a_class_is_an_error(tmp_path, target):
  write_folder(tmp_path, count=1, classes=("dog",))
  (tmp_path / "cat").symlink_to(target)
  for read in (lambda: data.FolderSource(tmp_path, (8, 8)), lambda: data.read_inputs(tmp_path, (8, 8), 3)):
    with pytest.raises(
      ValueError, match=rf"Got the link {tmp_path}/cat, but its target does not exist; .*Mount or restore"
    ):
      read()


@pytest.mark.parametrize("target", ["nowhere.png", "1.png"])
def test_a_dangling_link_to_an_image_is_a_broken_file(tmp_path, target):
  write_folder(tmp_path, count=1, classes=("dog",))
  (tmp_path / "dog" / "1.png").symlink_to(target)
  with pytest.raises(data.BrokenImage, match=r"1\.png: \[Errno \d+\]"):
    data.FolderSource(tmp_path, (8, 8))[1]


def test_unusual_names_can_be_cached(tmp_path, settled):
  root = tmp_path / "images"
  write_folder(root, classes=("a b", "ü\nx"), count=1)
  (root / "a b" / "0.png").rename(root / "a b" / "ö 'n\n.PNG")
  (root / "a b" / "notes.txt").write_text("no image")
  (root / "empty").mkdir()
  backdate(root)
  assert names(root) == names(root) == ["a b/ö 'n\n.PNG", "ü\nx/0.png"]
  assert data.FolderSource(root, (8, 8))[0]["image"].shape == (8, 8, 3)


def write(path, value=0, size=(4, 4)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def test_an_image_outside_the_class_folders_has_no_class(tmp_path):
  write_folder(tmp_path, count=1)
  write(tmp_path / "stray.png")
  source = data.FolderSource(tmp_path, (8, 8))
  assert source.class_names == ["cat", "dog"]
  assert {Path(source.file(i)).name: source.classes[i] for i in range(1)} == {"stray.png": data.NO_CLASS}
  assert list(source.classes) == [data.NO_CLASS, 0, 1]
  assert source[0]["classes"] == data.NO_CLASS


HIDDEN = [".ipynb_checkpoints", ".thumbnails", "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN"]


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_folders_are_not_classes(tmp_path, name, capsys):
  write_folder(tmp_path / "images", count=1)
  write(tmp_path / "images" / name / "a.png")
  write(tmp_path / "images" / "cat" / name / "b.png")
  source = data.FolderSource(tmp_path / "images", (8, 8))
  assert source.class_names == ["cat", "dog"]
  assert list(source.classes) == [0, 1]
  assert "2 hidden or system" in capsys.readouterr().out


def test_skipped_files_are_counted(tmp_path, capsys, settled):
  root = tmp_path / "images"
  write_folder(root, count=1)
  for name in ("cat/._0.png", ".DS_Store", "cat/Thumbs.db", "cat/0.txt", "dog/0.TXT", "dog/a.heic", "dog/LICENSE"):
    (root / name).write_bytes(b"no image")
  os.mkfifo(root / "dog" / "pipe.png")
  (root / "dog" / "link.png").symlink_to("pipe.png")
  for _ in range(2):  # The second time reads the cache.
    assert len(data.cache_in_memory(data.FolderSource(root, (8, 8)))) == 2
    counts = "3 hidden or system, 2 .txt, 2 not regular files, 1 .heic, 1 without extension"
    assert f"skipped files in {root} that are not images: {counts}\n" in capsys.readouterr().out
  for name in ("cat/0.png", "dog/0.png"):
    (root / name).unlink()
  with pytest.raises(ValueError, match=r"contains no images \(3 hidden.*1 \.heic.*expected image files"):
    data.FolderSource(root, (8, 8))


def test_a_folder_with_only_images_prints_nothing(tmp_path, capsys):
  write_folder(tmp_path)
  data.FolderSource(tmp_path, (8, 8))
  assert "skipped" not in capsys.readouterr().out


@pytest.mark.parametrize(
  ("ending", "kind"),
  [
    ("jfif", "JPEG"),
    ("JPE", "JPEG"),
    ("jp2", "JPEG2000"),
    ("tga", "TGA"),
    ("pnm", "PPM"),
    ("avif", "AVIF"),
    ("ico", "ICO"),
  ],
)
def test_all_formats_of_pillow_are_images(tmp_path, ending, kind):
  Image.init()
  if kind not in Image.SAVE:
    pytest.skip(f"Pillow was built without {kind}")
  write(tmp_path / "images" / "a.png")
  Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(tmp_path / "images" / f"b.{ending}", kind)
  source = data.FolderSource(tmp_path / "images", (32, 32))
  assert [Path(source.file(index)).name for index in range(2)] == ["a.png", f"b.{ending}"]
  assert np.max(np.abs(source[1]["image"].astype(int) - 200)) <= 2
  assert data.read_inputs(tmp_path / "images", (32, 32), 3).names == ["a.png", f"b.{ending}"]


@pytest.mark.parametrize("name", ["scene.pcd", "page.eps", "film.mpg", "features.h5", "flat.pdf"])
def test_formats_that_pillow_cannot_decode_are_skipped(tmp_path, name):
  write(tmp_path / "images" / "a.png")
  (tmp_path / "images" / name).write_bytes(b"no image")
  assert len(data.FolderSource(tmp_path / "images", (8, 8))) == 1


def test_an_archive_is_an_error(tmp_path):
  with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
    file.writestr("a.png", b"")
  with pytest.raises(
    ValueError,
    match=r"images\.zip', which is a file; expected a folder of images\..*If it is an archive, unpack it first",
  ):
    data.FolderSource(tmp_path / "images.zip", (8, 8))
  with pytest.raises(ValueError, match=r"Cannot decode the image .*images\.zip.*unpack it first"):
    data.read_inputs(tmp_path / "images.zip", (8, 8), 3)


@pytest.mark.parametrize("change", ["moved", "emptied"])
@pytest.mark.parametrize("name", ["", "dog"])
def test_a_replaced_folder_with_the_same_modification_time_is_listed_again(tmp_path, change, name, settled):
  root = tmp_path / "images"
  write_folder(root)
  backdate(tmp_path)
  assert len(names(root)) == 6
  time.sleep(0.02)  # a tick of the file system's clock
  folder = root / name
  before = folder.stat()
  if change == "moved":
    folder.rename(tmp_path / "old")
  else:
    for path in [*folder.glob("*/*"), *folder.iterdir()]:
      path.rmdir() if path.is_dir() else path.unlink()
  write(folder / "new.png")
  os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
  assert folder.stat().st_mtime_ns == before.st_mtime_ns
  assert names(root) == (["cat/0.png", "cat/1.jpg", "cat/2.bmp", "dog/new.png"] if name else ["new.png"])


def test_a_change_of_supported_formats_invalidates_the_cache(tmp_path, settled, monkeypatch):
  write(tmp_path / "images" / "a.png")
  write(tmp_path / "images" / "b.tga")
  monkeypatch.setattr(listing.decoding, "extensions", lambda: (".png",))
  assert names(tmp_path / "images") == ["a.png"]
  monkeypatch.undo()
  assert names(tmp_path / "images") == ["a.png", "b.tga"]


@pytest.mark.parametrize("damage", ["broken", "cut", "inconsistent", "unwritable", "homeless"])
def test_a_broken_cache_only_costs_time(tmp_path, cache, damage, settled, monkeypatch):
  root = tmp_path / "images"
  write_folder(root)
  names(root)
  (file,) = (cache / "ddpm_jax" / "folders").iterdir()
  if damage == "broken":
    file.write_bytes(b"no archive")
  elif damage == "cut":
    file.write_bytes(file.read_bytes()[:-40])
  elif damage == "inconsistent":
    with np.load(file) as content:
      np.savez(file, **dict(content) | {"num_inner": np.array([7, 7, 7])})
  elif damage == "unwritable":
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
  else:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_user)
    monkeypatch.chdir(tmp_path)
  assert len(names(root)) == 6
  assert sorted(path.name for path in tmp_path.iterdir()) == ["images"], "no folder called ~"


def no_user(uid):
  raise KeyError(uid)
