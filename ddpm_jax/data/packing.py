"""Images packed into ArrayRecord files, each a record of raw pixels, and of what else belongs to it: no decoding when they are read."""

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from ddpm_jax.data.sources import (
  NO_CLASS,
  Batch,
  BrokenImage,
  Source,
  broken_error,
  check_alike,
  report_broken,
  to_array,
)
from ddpm_jax.storage import files, sealed

_INDEX, _CLASSES, _VERSION = "index.json", "classes.npy", 1
_SHARD_BYTES = 2**29
_AT_A_TIME = 512


class PackedSource:
  """A folder that `pack` wrote.

  Args:
    path: the folder.
    classes: names of the classes in the order of their numbers; by default those of the pack.

  Attributes:
    classes: [N] int32; `NO_CLASS` for an image without a class, or whose class is not among `classes`.
    classes: names of the classes, or None.
    settings: what the images were fitted by.
    shape: [H, W, C] of an image.

  Raises:
    ValueError: if the folder holds no pack, an unfinished one or that of another version.
  """

  def __init__(self, path: str | Path, classes: Sequence[str] | None = None):
    self._path = Path(path)
    try:
      index = sealed.read_json(self._path / _INDEX)
    except (OSError, sealed.DamagedFileError) as error:
      raise ValueError(
        f"Got the folder {str(path)!r}, which holds no packed images ({error}); expected one that was written by"
        " --mode=prepare --config=<file> --output=<folder>. Set --config.data.source.path."
      ) from error
    if index.get("version") != _VERSION:
      raise ValueError(
        f"Got packed images of version {index.get('version')} in {str(path)!r}; this release reads version {_VERSION}."
        " Pack them again by --mode=prepare."
      )
    try:
      self.classes = np.load(self._path / _CLASSES)
      if sealed.digest(self.classes) != index["classes_sha256"]:
        raise sealed.DamagedFileError("they are not what was written")
    except Exception as error:
      raise ValueError(
        f"Cannot read the classes {self._path / _CLASSES}: {error}. Copy the file again, or pack again by --mode=prepare."
      ) from error
    self.shape, self.class_names, self.settings = tuple(index["shape"]), index["class_names"], index["settings"]
    self._record = np.dtype([(name, kind, tuple(shape)) for name, kind, shape in index["arrays"]])
    if classes is not None and self.class_names is not None:
      numbers = {name: number for number, name in enumerate(classes)}
      # NO_CLASS as an index takes the last.
      self.classes = np.array([*(numbers.get(name, NO_CLASS) for name in self.class_names), NO_CLASS], np.int32)[
        self.classes
      ]
      self.class_names = list(classes)
    self._last = np.cumsum(index["shards"])
    missing = [str(self._shard(number)) for number in range(len(self._last)) if not self._shard(number).is_file()]
    if missing or len(self.classes) != index["count"] or self._last[-1] != index["count"]:
      raise ValueError(
        f"Got packed images in {str(path)!r} that are not whole (missing: {', '.join(missing[:3]) or 'classes'}). Copy"
        " them again, or pack them again by --mode=prepare."
      )
    self._readers: dict[int, Any] = {}

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_readers": {}}

  def _shard(self, number: int) -> Path:
    return self._path / _shard_name(number)

  def __len__(self) -> int:
    return len(self.classes)

  def __getitem__(self, index: int) -> dict[str, Any]:
    item = {name: array[0] for name, array in self.__getitems__(np.array([index])).items()}
    return item | {"classes": int(item["classes"])}

  def __getitems__(self, indices: np.ndarray) -> Batch:
    indices = np.asarray(indices)
    shards = np.searchsorted(self._last, indices, "right")
    found = np.empty(len(indices), self._record)
    for number in np.unique(shards):
      of_shard = np.flatnonzero(shards == number)
      first = self._last[number - 1] if number else 0
      try:
        records = self._reader(int(number)).read((indices[of_shard] - first).tolist())
      except Exception as error:
        raise ValueError(f"Cannot read {self._shard(number)}: {error}. Copy it again, or pack again.") from error
      for row, record in zip(of_shard, records, strict=True):
        found[row] = np.frombuffer(record, self._record)[0]
    return {name: found[name] for name in self._record.names or ()} | {"classes": self.classes[indices]}

  def _reader(self, number: int) -> Any:
    if number not in self._readers:
      from array_record.python.array_record_module import ArrayRecordReader

      # Records are read in random order: nothing is to be read ahead.
      self._readers[number] = ArrayRecordReader(
        str(self._shard(number)), options="readahead_buffer_size:0", file_reader_buffer_size=2**15
      )
    return self._readers[number]


def pack(source: Source, path: Path, settings: dict[str, Any], broken: str = "stop") -> tuple[int, list[str]]:
  """Write the images of a source into a new folder, in order.

  Args:
    source: where they come from, all of one shape. An image that has no class is packed as one of `NO_CLASS`.
    path: the folder; it must not exist, or be empty.
    settings: what the images were fitted by, kept beside them.
    broken: what to do about images that cannot be decoded: "stop", or "skip" to leave them out.

  Returns:
    How many images were written, and the names of those that were left out.

  Raises:
    ValueError: if some cannot be decoded and `broken` is "stop"; it names the first ten, after all have been tried.
  """
  path.mkdir(parents=True, exist_ok=True)
  classes: list[int] = []
  errors: list[BrokenImage] = []

  def load(index: int) -> dict[str, Any] | BrokenImage:
    try:
      return source[index]
    except BrokenImage as error:
      return error

  with (
    _Shards(path) as shards,
    ThreadPoolExecutor() as pool,
    tqdm(total=len(source), desc="packing", unit=" images") as bar,
  ):
    for first in range(0, len(source), _AT_A_TIME):
      indices = range(first, min(first + _AT_A_TIME, len(source)))
      for item in pool.map(load, indices):
        if isinstance(item, BrokenImage):
          errors.append(item)
        # After a broken one nothing will be kept; the rest is read to name all that is broken.
        elif not errors or broken != "stop":
          shards.write({name: to_array(name, value) for name, value in item.items() if name != "classes"})
          classes.append(int(item.get("classes", NO_CLASS)))
      bar.update(len(indices))
  if errors and (broken == "stop" or not classes):
    raise broken_error(errors, len(source))
  names = [error.name for error in errors]
  if names:
    report_broken(errors, len(source), "left out")
  kept = np.array(classes, np.int32)
  with files.atomic_file(path / _CLASSES) as temporary:
    np.save(temporary, kept)
  index = {
    "version": _VERSION,
    "count": len(classes),
    "shape": shards.record["image"].shape,
    "arrays": [[name, shards.record[name].base.str, shards.record[name].shape] for name in shards.record.names or ()],
    "shards": shards.counts,
    "classes_sha256": sealed.digest(kept),
    "class_names": getattr(source, "class_names", None),
    "settings": settings,
    "left_out": names,
  }
  sealed.write_json(path / _INDEX, index)
  return len(classes), names


class _Shards(contextlib.AbstractContextManager):
  """Writes records into files of a size that is good to copy.

  Attributes:
    record: the arrays of a record.
    counts: how many records each file has.
  """

  def __init__(self, path: Path):
    self._path, self._first, self._writer = path, dict[str, np.ndarray](), cast(Any, None)
    self.record, self.counts = np.dtype([]), list[int]()

  def write(self, arrays: dict[str, np.ndarray]) -> None:
    """Write a record of arrays, which must be like those of the first one."""
    self._first = self._first or arrays
    check_alike(arrays, self._first)
    self.record = np.dtype([(name, array.dtype.str, array.shape) for name, array in sorted(arrays.items())])
    if self._writer is None or self.counts[-1] * self.record.itemsize >= _SHARD_BYTES:
      self._open()
    row = np.empty((), self.record)
    for name, array in arrays.items():
      row[name] = array
    self._writer.write(row.tobytes())
    self.counts[-1] += 1

  def _open(self) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    self.__exit__()
    # Records of their own, so that one is read alone; compressed: a quarter to a third less on disk, a quarter slower.
    self._writer = ArrayRecordWriter(str(self._path / _shard_name(len(self.counts))), "group_size:1")
    self.counts.append(0)

  def __exit__(self, *_: Any) -> None:
    if self._writer is not None:
      self._writer.close()


def _shard_name(number: int) -> str:
  return f"images-{number:05d}.array_record"
