"""Folders of images: what is kept of their listing, and what is seen of their changes."""

import numpy as np
import pytest

from ddpm_jax import data
from ddpm_jax.data import folders
from tests.pictures import age, write_folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  home = tmp_path_factory.mktemp("cache")
  monkeypatch.setenv("XDG_CACHE_HOME", str(home))
  return home


@pytest.fixture
def listed(monkeypatch):
  """Names of the folders that were listed, as they are."""
  seen = []

  def spy(path, modified):
    seen.append(path.decode().rsplit("/", 1)[1])
    return original(path, modified)

  original = folders._list
  monkeypatch.setattr(folders, "_list", spy)
  return seen


def names(root):
  source = data.FolderSource(root, 8)
  return [source.file(index).removeprefix(f"{root}/") for index in range(len(source))]


def test_an_unchanged_folder_is_not_listed_again(tmp_path, listed):
  write_folder(tmp_path / "images")
  age(tmp_path)
  first = data.FolderSource(tmp_path / "images", 8)
  assert listed == ["images", "cat", "dog"]
  second = data.FolderSource(tmp_path / "images", 8)
  assert listed == ["images", "cat", "dog"]
  assert [first.file(i) for i in range(6)] == [second.file(i) for i in range(6)]
  np.testing.assert_array_equal(first.labels, second.labels)
  assert first.classes == second.classes == ["cat", "dog"]
  np.testing.assert_array_equal(first[4]["image"], second[4]["image"])


def test_changes_are_seen_and_only_changed_folders_listed(tmp_path, listed):
  root = tmp_path / "images"
  write_folder(root)
  age(root)
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
  assert data.FolderSource(root, 8).classes == ["ant", "cat", "dog"]
  for path in (root / "ant").iterdir():
    path.unlink()
  (root / "ant").rmdir()
  assert len(names(root)) == 5


def test_what_changed_just_now_is_listed_again(tmp_path, listed):
  """Within a tick of the file system's clock a file more need not change the time of its folder."""
  write_folder(tmp_path / "images")
  for _ in range(2):
    data.FolderSource(tmp_path / "images", 8)
  assert listed == ["images", "cat", "dog"] * 2


def test_links_are_followed_once(tmp_path):
  root = tmp_path / "images"
  write_folder(root)
  write_folder(tmp_path / "elsewhere", classes=("emu",), count=2)
  (root / "emu").symlink_to(tmp_path / "elsewhere" / "emu")
  (root / "dog" / "loop").symlink_to(root)
  (root / "twice").symlink_to(root / "cat")
  for _ in range(2):
    assert [name.split("/")[0] for name in names(root)] == ["cat"] * 3 + ["dog"] * 3 + ["emu"] * 2
    age(root)


def test_odd_names_survive_the_cache(tmp_path):
  root = tmp_path / "images"
  write_folder(root, classes=("a b", "ü\nx"), count=1)
  (root / "a b" / "0.png").rename(root / "a b" / "ö 'n\n.PNG")
  (root / "a b" / "notes.txt").write_text("no image")
  (root / "empty").mkdir()
  age(root)
  assert names(root) == names(root) == ["a b/ö 'n\n.PNG", "ü\nx/0.png"]
  assert data.FolderSource(root, 8)[0]["image"].shape == (8, 8, 3)


def test_images_beside_folders_are_a_class_of_their_own(tmp_path):
  write_folder(tmp_path, count=1)
  (tmp_path / "cat" / "0.png").rename(tmp_path / "0.png")
  source = data.FolderSource(tmp_path, 8)
  assert source.classes == ["", "dog"]
  assert list(source.labels) == [0, 1]


@pytest.mark.parametrize("damage", ["broken", "unwritable"])
def test_a_cache_that_fails_costs_time_only(tmp_path, cache, damage):
  root = tmp_path / "images"
  write_folder(root)
  age(root)
  if damage == "broken":
    names(root)
    (file,) = (cache / "ddpm_jax" / "folders").iterdir()
    file.write_bytes(b"no archive")
  else:
    (cache / "ddpm_jax").write_text("a file where a folder should be")
  assert len(names(root)) == 6
