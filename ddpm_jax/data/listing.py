"""Which images lie in a folder, of which there may be millions: a listing is kept in a file and checked against changes."""

import contextlib
import hashlib
import os
import stat
import time
from collections import Counter, deque
from collections.abc import Iterable, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ddpm_jax.data.decoding import extensions
from ddpm_jax.storage import files, sealed
from ddpm_jax.storage.places import cache_folder

_VERSION = 2
# A folder that changed this shortly before it was listed may change again within one tick of the file system's clock.
_TICK_NS = 2 * 10**9
_ALWAYS_AGAIN = b""
# What systems put beside images: archives of macOS, thumbnails, recycled and recovered files.
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
_HIDDEN = b"hidden or of the system"


class Folder(NamedTuple):
  """What one folder holds.

  Attributes:
    stamp: device, inode, and times of modification and of status change. Another folder put in its place has another one.
    names: file names of the images, each ended by a zero byte.
    folders: names of the folders in it.
    others: how many files of each other kind there are, such as b"12 .txt", each ended by a zero byte.
  """

  stamp: bytes
  names: bytes
  folders: tuple[bytes, ...]
  others: bytes


def walk(root: bytes, *, cached: bool = True) -> dict[bytes, Folder]:
  """Return the folders in `root` by their relative paths, in order.

  Links to folders are followed, each folder once. What is hidden is passed over. Unchanged folders come from the cache.

  Raises:
    ValueError: if a folder cannot be listed, or a link that may be a folder's leads nowhere.
  """
  cache = _cache_file(root) if cached else None
  known = _load(cache) if cache else {}
  images = frozenset(written for ending in _endings() for written in (ending, ending.upper()))
  found, seen = dict[bytes, Folder](), set()
  # Links come last: an image belongs to the folder it lies in, whatever else leads there.
  waiting, links = list[bytes](), deque([b""])
  with tqdm(desc="listing images", unit=" folders", delay=2) as bar:
    while waiting or links:
      linked = not waiting
      name = links.popleft() if linked else waiting.pop()
      path = os.path.join(root, name) if name else root
      try:
        # Before it is listed: a change in between shows next time.
        status = os.stat(path) if linked else os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
          links.append(name)
          continue
        if (status.st_dev, status.st_ino) in seen:
          continue
        seen.add((status.st_dev, status.st_ino))
        folder = known.get(name)
        if folder is None or folder.stamp != _stamp(status):
          folder = _list(path, status, images)
      except OSError as error:
        raise ValueError(
          f"Cannot list the folder {os.fsdecode(path)} ({error.strerror}); expected to read all folders in {os.fsdecode(root)}. Make it"
          " readable, or move it out."
        ) from error
      found[name] = folder
      waiting.extend(os.path.join(name, inner) for inner in reversed(folder.folders))
      bar.update()
  found = dict(sorted(found.items(), key=lambda item: item[0].split(b"/")))
  if cache and found != known:
    _save(cache, found)
  return found


def passed_over(folders: Iterable[Folder]) -> str:
  """Return how many files of which kinds are no images, such as "12 .txt, 1 without an ending"; empty if all are."""
  counts: Counter[str] = Counter()
  for folder in folders:
    for part in folder.others.split(b"\0")[:-1]:
      count, kind = part.decode(errors="replace").split(" ", 1)
      counts[kind] += int(count)
  most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
  kinds = [f"{count:,} {kind}" for kind, count in most_first[:5]]
  rest = sum(count for _, count in most_first[5:])
  return ", ".join([*kinds, f"{rest:,} others"] if rest else kinds)


def _stamp(status: os.stat_result) -> bytes:
  # The time of status change cannot be set: it tells a folder whose files were replaced and whose modification time was restored.
  return b"%d:%d:%d:%d" % (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


def _list(path: bytes, status: os.stat_result, images: Set[bytes]) -> Folder:
  names, folders, rest, others = list[bytes](), list[bytes](), list[os.DirEntry[bytes]](), Counter[bytes]()
  with os.scandir(path) as entries:
    for entry in entries:
      name = entry.name
      try:
        # Most entries, of which there may be millions, end here: taking a name apart would double the time.
        plain = (name[-4:] in images or name[-5:] in images) and name[0] != _DOT and entry.is_file()
      except OSError:
        plain = False  # A link that leads to itself.
      if plain:
        names.append(name)
      else:
        rest.append(entry)
  for entry in rest:
    ending = os.path.splitext(entry.name)[1].lower()
    if entry.name[0] == _DOT or entry.name in _SYSTEM:
      others[_HIDDEN] += 1
    elif (kind := _kind(entry)) == "folder":
      folders.append(entry.name)
    elif ending in images and kind in ("file", "nowhere"):
      # A link to nothing is a broken image, which is named when it is read.
      names.append(entry.name)
    elif kind == "nowhere":
      raise ValueError(
        f"Got the link {os.fsdecode(entry.path)}, which leads nowhere; expected a file or a folder, which may be a class. Mount or restore"
        " what it leads to, or remove the link."
      )
    else:
      others[(ending or b"without an ending") if kind == "file" else b"no regular file"] += 1
  settled = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _TICK_NS
  listed = b"\0".join([*sorted(names), b""])
  counted = b"".join(b"%d %s\0" % (count, kind) for kind, count in sorted(others.items()))
  return Folder(_stamp(status) if settled else _ALWAYS_AGAIN, listed, tuple(sorted(folders)), counted)


def _kind(entry: os.DirEntry[bytes]) -> str:
  """Return what an entry is or leads to: "folder", "file", "nowhere" or "other", such as a pipe, whose reader would wait forever."""
  try:
    if entry.is_dir():
      return "folder"
    if entry.is_file():
      return "file"
  except OSError:
    return "nowhere"
  return "nowhere" if entry.is_symlink() and not os.path.exists(entry.path) else "other"


def _endings() -> tuple[bytes, ...]:
  return tuple(os.fsencode(extension) for extension in extensions())


def _cache_file(root: bytes) -> Path | None:
  home = cache_folder("folders")
  return home / f"{hashlib.sha256(root).hexdigest()[:32]}.npz" if home else None


def _load(cache: Path) -> dict[bytes, Folder]:
  """Return what was saved; nothing if that is missing, broken, of another version, or of other endings."""
  try:
    sealed.check_archive(cache)
    with np.load(cache) as file:
      if file["version"] != _VERSION or file["endings"].tobytes() != b"\0".join(_endings()):
        return {}
      texts = {key: file[key].tobytes() for key in ("paths", "stamps", "inner", "names", "others")}
      counts = {key: file[key].tolist() for key in ("num_inner", "names_size", "others_size")}
    inner, names, others = iter(texts["inner"].split(b"\0")), texts["names"], texts["others"]
    known, start, start_others = {}, 0, 0
    for path, stamp, count, size, size_others in zip(
      texts["paths"].split(b"\0"), texts["stamps"].split(b"\0"), *counts.values(), strict=True
    ):
      folders = tuple(next(inner) for _ in range(count))
      known[path] = Folder(
        stamp, names[start : start + size], folders, others[start_others : start_others + size_others]
      )
      start, start_others = start + size, start_others + size_others
    return known
  except Exception:
    return {}


def _save(cache: Path, found: dict[bytes, Folder]) -> None:
  """Save what was found, whole or not at all: where it cannot be written, the next start takes some seconds longer."""
  folders = found.values()
  texts = {
    "endings": b"\0".join(_endings()),
    "paths": b"\0".join(found),
    "stamps": b"\0".join(folder.stamp for folder in folders),
    "inner": b"\0".join(inner for folder in folders for inner in folder.folders),
    "names": b"".join(folder.names for folder in folders),
    "others": b"".join(folder.others for folder in folders),
  }
  numbers = {
    "version": _VERSION,
    "num_inner": [len(folder.folders) for folder in folders],
    "names_size": [len(folder.names) for folder in folders],
    "others_size": [len(folder.others) for folder in folders],
  }
  with contextlib.suppress(files.WriteError), files.atomic_file(cache) as temporary:
    np.savez(temporary, **{key: np.frombuffer(text, np.uint8) for key, text in texts.items()}, **numbers)  # type: ignore[arg-type]
