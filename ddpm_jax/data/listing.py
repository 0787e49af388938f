"""List the image files in a folder, and cache the list.

A folder may contain millions of images. The cached list of a folder is reused until the folder changes.
"""

import contextlib
import hashlib
import os
import stat
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ddpm_jax.data import decoding
from ddpm_jax.storage import files, sealed
from ddpm_jax.storage.places import cache_folder

_VERSION = 2
# If a folder changed less than this time before it was listed, a later change may get the same time stamp, because the
# clock of a file system has coarse ticks.
_TICK_NS = 2 * 10**9
# A stamp that matches no folder, so that the folder is listed again.
_STALE = b""
# Files and folders that operating systems add: macOS archives, thumbnails, recycled and recovered files.
_SYSTEM = {
  b"__MACOSX",
  b"@eaDir",
  b"$RECYCLE.BIN",
  b"#recycle",
  b"System Volume Information",
  b"lost+found",
  b"Thumbs.db",
  b"desktop.ini",
}
_DOT = ord(".")
_HIDDEN = b"hidden or system"
_NONE_USED: Mapping[str, int] = {}


class Folder(NamedTuple):
  """List the contents of one folder.

  Attributes:
    stamp: device, inode, modification time and status change time of the folder. Changing or replacing the folder
      changes the stamp.
    names: file names of the images, each followed by a zero byte.
    folders: names of the sub-folders.
    skipped: for each kind of skipped files, the number and the kind, such as b"12 .txt", followed by a zero byte.
  """

  stamp: bytes
  names: bytes
  folders: tuple[bytes, ...]
  skipped: bytes


def walk(root: bytes, *, cached: bool = True) -> dict[bytes, Folder]:
  """Return a dict from relative path to `Folder`, for `root` and all folders under it, sorted by path.

  Symbolic links to folders are followed, and each folder is listed once. Hidden folders and folders of the
  operating system are skipped. Unchanged folders come from the cache if `cached` is set.

  Raises:
    ValueError: if a folder cannot be listed, or if the target of a link does not exist and may have been a folder.
  """
  cache = _cache_file(root) if cached else None
  cached_folders = _load(cache) if cache else {}
  extensions = frozenset(spelling for extension in _extensions() for spelling in (extension, extension.upper()))
  folders, seen = dict[bytes, Folder](), set()
  # Visit links last, so that an image counts for the folder that contains it rather than for a link to that folder.
  pending, links = list[bytes](), deque([b""])
  with tqdm(desc="listing images", unit=" folders", delay=2) as bar:
    while pending or links:
      is_link = not pending
      name = links.popleft() if is_link else pending.pop()
      path = os.path.join(root, name) if name else root
      try:
        # Read the status first, so that a change during the listing is detected next time.
        status = os.stat(path) if is_link else os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
          links.append(name)
          continue
        if (status.st_dev, status.st_ino) in seen:
          continue
        seen.add((status.st_dev, status.st_ino))
        folder = cached_folders.get(name)
        if folder is None or folder.stamp != _stamp(status):
          folder = _list(path, status, extensions)
      except OSError as error:
        raise ValueError(
          f"Cannot list the folder {os.fsdecode(path)} ({error.strerror}); expected all folders in {os.fsdecode(root)}"
          " to be readable. Make this folder readable, or move it elsewhere."
        ) from error
      folders[name] = folder
      pending.extend(os.path.join(name, inner) for inner in reversed(folder.folders))
      bar.update()
  folders = dict(sorted(folders.items(), key=lambda item: item[0].split(b"/")))
  if cache and folders != cached_folders:
    _save(cache, folders)
  return folders


def count_skipped(folders: Iterable[Folder], used: Mapping[str, int] = _NONE_USED) -> str:
  """Return a text with the number of skipped files of each kind, such as "12 .txt, 1 without extension".

  The text is empty if no files were skipped.

  Args:
    folders: the folders.
    used: a dict from suffix, such as ".jsonl", to the number of files that are used although they are not images.
      These files do not count as skipped.
  """
  counts = Counter({suffix: -count for suffix, count in used.items()})
  for folder in folders:
    for part in folder.skipped.split(b"\0")[:-1]:
      count, kind = part.decode(errors="replace").split(" ", 1)
      counts[kind] += int(count)
  by_count = sorted((+counts).items(), key=lambda item: (-item[1], item[0]))
  texts = [f"{count:,} {kind}" for kind, count in by_count[:5]]
  remaining = sum(count for _, count in by_count[5:])
  return ", ".join([*texts, f"{remaining:,} others"] if remaining else texts)


def _stamp(status: os.stat_result) -> bytes:
  # Programs cannot set the status change time. It reveals a folder with replaced files and a restored modification
  # time.
  return b"%d:%d:%d:%d" % (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


def _list(path: bytes, status: os.stat_result, extensions: Set[bytes]) -> Folder:
  names, folders, other_entries, skipped = list[bytes](), list[bytes](), list[os.DirEntry[bytes]](), Counter[bytes]()
  with os.scandir(path) as entries:
    for entry in entries:
      name = entry.name
      try:
        # This test accepts most entries, and there may be millions. Splitting the names would double the time.
        is_image = (name[-4:] in extensions or name[-5:] in extensions) and name[0] != _DOT and entry.is_file()
      except OSError:
        is_image = False  # For example, the entry is a link to itself.
      if is_image:
        names.append(name)
      else:
        other_entries.append(entry)
  for entry in other_entries:
    extension = os.path.splitext(entry.name)[1].lower()
    if entry.name[0] == _DOT or entry.name in _SYSTEM:
      skipped[_HIDDEN] += 1
    elif (kind := _kind(entry)) == "folder":
      folders.append(entry.name)
    elif extension in extensions and kind in ("file", "dangling link"):
      # List a dangling link as an image. Reading it raises a BrokenImage with its name.
      names.append(entry.name)
    elif kind == "dangling link":
      raise ValueError(
        f"Got the link {os.fsdecode(entry.path)}, but its target does not exist; expected an existing file or folder,"
        " because the link may stand for the folder of a class. Mount or restore the target, or remove the link."
      )
    else:
      skipped[(extension or b"without extension") if kind == "file" else b"not regular files"] += 1
  settled = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _TICK_NS
  joined_names = b"\0".join([*sorted(names), b""])
  joined_counts = b"".join(b"%d %s\0" % (count, kind) for kind, count in sorted(skipped.items()))
  return Folder(_stamp(status) if settled else _STALE, joined_names, tuple(sorted(folders)), joined_counts)


def _kind(entry: os.DirEntry[bytes]) -> str:
  """Return the kind of an entry: "folder", "file", "dangling link" or "other".

  The kind of a link is the kind of its target. Pipes have the kind "other", because reading a pipe could block forever.
  """
  try:
    if entry.is_dir():
      return "folder"
    if entry.is_file():
      return "file"
  except OSError:
    return "dangling link"
  return "dangling link" if entry.is_symlink() and not os.path.exists(entry.path) else "other"


def _extensions() -> tuple[bytes, ...]:
  return tuple(os.fsencode(extension) for extension in decoding.extensions())


def _cache_file(root: bytes) -> Path | None:
  home = cache_folder("folders")
  return home / f"{hashlib.sha256(root).hexdigest()[:32]}.npz" if home else None


def _load(cache: Path) -> dict[bytes, Folder]:
  """Load the folders from the cache file.

  Return an empty dict if the file is missing or damaged, or if its version or its file name extensions are not the
  current ones.
  """
  try:
    sealed.check_archive(cache)
    with np.load(cache) as file:
      if file["version"] != _VERSION or file["endings"].tobytes() != b"\0".join(_extensions()):
        return {}
      texts = {key: file[key].tobytes() for key in ("paths", "stamps", "inner", "names", "others")}
      counts = {key: file[key].tolist() for key in ("num_inner", "names_size", "others_size")}
    inner, names, skipped = iter(texts["inner"].split(b"\0")), texts["names"], texts["others"]
    cached_folders, start, skipped_start = {}, 0, 0
    for path, stamp, count, size, skipped_size in zip(
      texts["paths"].split(b"\0"), texts["stamps"].split(b"\0"), *counts.values(), strict=True
    ):
      folders = tuple(next(inner) for _ in range(count))
      cached_folders[path] = Folder(
        stamp, names[start : start + size], folders, skipped[skipped_start : skipped_start + skipped_size]
      )
      start, skipped_start = start + size, skipped_start + skipped_size
    return cached_folders
  except Exception:
    return {}


def _save(cache: Path, folders_by_path: dict[bytes, Folder]) -> None:
  """Write the cache file atomically, and ignore failures.

  Without the file, the next start takes a few seconds longer.
  """
  folders = folders_by_path.values()
  texts = {
    "endings": b"\0".join(_extensions()),
    "paths": b"\0".join(folders_by_path),
    "stamps": b"\0".join(folder.stamp for folder in folders),
    "inner": b"\0".join(inner for folder in folders for inner in folder.folders),
    "names": b"".join(folder.names for folder in folders),
    "others": b"".join(folder.skipped for folder in folders),
  }
  numbers = {
    "version": _VERSION,
    "num_inner": [len(folder.folders) for folder in folders],
    "names_size": [len(folder.names) for folder in folders],
    "others_size": [len(folder.skipped) for folder in folders],
  }
  with contextlib.suppress(files.WriteError), files.atomic_file(cache) as temporary:
    np.savez(temporary, **{key: np.frombuffer(text, np.uint8) for key, text in texts.items()}, **numbers)  # type: ignore[arg-type]
