"""Pack images into ArrayRecord files, and read them without decoding.

A record holds the raw pixels of an image and the other arrays of its item. These arrays have the same shapes in all
records. If the items have texts, a JSON list of the texts follows the arrays in each record.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from ddpm_jax.data.broken import BrokenImage, broken_error, report_broken
from ddpm_jax.data.sources import LATENT, NO_CLASS, Batch, Source, check_alike, check_single_texts, is_text, to_array
from ddpm_jax.storage import files, sealed

INDEX, _CLASSES, _VERSION = "index.json", "classes.npy", 1
_SHARD_BYTES = 2**29
_CHUNK = 512


class PackedSource:
  """Read a folder of packed images.

  `pack` writes the folder.

  Args:
    path: the folder.
    classes: names of the classes in the order of their numbers; by default the names in the pack.

  Attributes:
    classes: [N] int32; `NO_CLASS` for an image without a class, or with a class that is not in the argument `classes`.
    class_names: names of the classes by number; None if the pack has no names.
    settings: how the images were cropped and resized.
    shape: shape [H, W, C] of an image.

  Raises:
    ValueError: if the folder is no pack, or the pack is incomplete or damaged, or another version of `pack` wrote it.
  """

  def __init__(self, path: str | Path, classes: Sequence[str] | None = None):
    self._path = Path(path)
    try:
      index = sealed.read_json(self._path / INDEX)
    except (OSError, sealed.DamagedFileError) as error:
      raise ValueError(
        f"Got the folder {str(path)!r}, which contains no packed images ({error}); expected a folder written by"
        " --mode=prepare --config=<file> --output=<folder>. Set --config.data.source.path."
      ) from error
    if index.get("version") != _VERSION:
      raise ValueError(
        f"Got packed images of version {index.get('version')} in {str(path)!r}; expected version {_VERSION}."
        " Pack them again with --mode=prepare."
      )
    try:
      self.classes = np.load(self._path / _CLASSES)
      if sealed.digest(self.classes) != index["classes_sha256"]:
        raise sealed.DamagedFileError("the checksum does not match")
    except Exception as error:
      raise ValueError(
        f"Cannot read the classes {self._path / _CLASSES}: {error}. Copy the file again, or pack again with"
        " --mode=prepare."
      ) from error
    self.shape, self.class_names, self.settings = tuple(index["shape"]), index["class_names"], index["settings"]
    self._record = np.dtype([(name, kind, tuple(shape)) for name, kind, shape in index["arrays"]])
    self._texts: list[str] = index.get("texts", [])
    if classes is not None and self.class_names is not None:
      numbers = {name: number for number, name in enumerate(classes)}
      # NO_CLASS is -1, so it indexes the last entry.
      self.classes = np.array([*(numbers.get(name, NO_CLASS) for name in self.class_names), NO_CLASS], np.int32)[
        self.classes
      ]
      self.class_names = list(classes)
    self._last = np.cumsum(index["shards"])
    missing = [str(self._shard(number)) for number in range(len(self._last)) if not self._shard(number).is_file()]
    if missing or len(self.classes) != index["count"] or self._last[-1] != index["count"]:
      raise ValueError(
        f"Got incomplete packed images in {str(path)!r} (missing: {', '.join(missing[:3]) or 'classes'}); expected all"
        " files. Copy them again, or pack them again with --mode=prepare."
      )
    self._readers: dict[int, Any] = {}

  @property
  def names(self) -> tuple[str, ...]:
    """Return the names of the arrays of an item, without its class and its texts."""
    return self._record.names or ()

  @property
  def is_encoded(self) -> bool:
    """Return whether the folder holds encoded images instead of pixels.

    `config.data.latents` needs encoded images.
    """
    return LATENT in self.names

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
    rows, texts = np.empty(len(indices), self._record), np.empty((len(indices), len(self._texts)), object)
    for number in np.unique(shards):
      positions = np.flatnonzero(shards == number)
      first = self._last[number - 1] if number else 0
      try:
        records = self._reader(int(number)).read((indices[positions] - first).tolist())
      except Exception as error:
        raise ValueError(f"Cannot read {self._shard(number)}: {error}. Copy it again, or pack again.") from error
      for position, record in zip(positions, records, strict=True):
        rows[position] = np.frombuffer(record, self._record, count=1)[0]
        if self._texts:
          texts[position] = json.loads(record[self._record.itemsize :])
    batch = {name: rows[name] for name in self.names} | {"classes": self.classes[indices]}
    return batch | {name: texts[:, column].astype(str) for column, name in enumerate(self._texts)}

  def _reader(self, number: int) -> Any:
    if number not in self._readers:
      from array_record.python.array_record_module import ArrayRecordReader

      # Disable read-ahead, because records are read in random order.
      self._readers[number] = ArrayRecordReader(
        str(self._shard(number)), options="readahead_buffer_size:0", file_reader_buffer_size=2**15
      )
    return self._readers[number]


def pack(source: Source, path: Path, settings: dict[str, Any], broken: str = "stop") -> tuple[int, list[str]]:
  """Write the images of a source into a new folder, in order.

  Args:
    source: the images, all of one shape. An image without a class gets `NO_CLASS`.
    path: the folder. It must be empty or not exist.
    settings: how the images were cropped and resized, to store with the images.
    broken: how to treat images that cannot be decoded: "stop" to raise an error, or "skip" to omit them.

  Returns:
    The number of images written, and the names of the omitted images.

  Raises:
    ValueError: if the items differ in names, types or shapes; if images cannot be decoded and `broken` is "stop"; or if
      no image can be decoded. An error about broken images is raised after all images are read, and names up to ten
      broken images.
  """

  def load(index: int) -> dict[str, Any] | BrokenImage:
    try:
      return source[index]
    except BrokenImage as error:
      return error

  def items() -> Iterator[dict[str, Any] | BrokenImage]:
    with ThreadPoolExecutor() as pool:
      for first in range(0, len(source), _CHUNK):
        yield from pool.map(load, range(first, min(first + _CHUNK, len(source))))

  return pack_items(items(), len(source), path, settings, broken, getattr(source, "class_names", None))


def pack_items(
  items: Iterable[dict[str, Any] | BrokenImage],
  total: int,
  path: Path,
  settings: dict[str, Any],
  broken: str = "stop",
  class_names: Sequence[str] | None = None,
) -> tuple[int, list[str]]:
  """Write items into a new folder, in order.

  Args:
    items: the items, with an error in place of each item that cannot be decoded.
    total: the number of items.
    path: see `pack`.
    settings: values to store with the items.
    broken: see `pack`.
    class_names: names of the classes by number; None for no names.

  Returns:
    See `pack`.

  Raises:
    ValueError: see `pack`.
  """
  path.mkdir(parents=True, exist_ok=True)
  classes: list[int] = []
  errors: list[BrokenImage] = []
  with _Shards(path) as shards:
    for item in tqdm(items, total=total, desc="packing", unit=" images"):
      if isinstance(item, BrokenImage):
        errors.append(item)
      # After a broken image, continue reading only to find all broken images.
      elif not errors or broken != "stop":
        shards.write({name: to_array(name, value) for name, value in item.items() if name != "classes"})
        classes.append(int(item.get("classes", NO_CLASS)))
  if errors and (broken == "stop" or not classes):
    raise broken_error(errors, total)
  names = [error.name for error in errors]
  if names:
    report_broken(errors, total, "omitted")
  packed_classes = np.array(classes, np.int32)
  with files.atomic_file(path / _CLASSES) as temporary:
    np.save(temporary, packed_classes)
  record = shards.record
  index = {
    "version": _VERSION,
    "count": len(classes),
    "shape": record["image" if "image" in (record.names or ()) else LATENT].shape,
    "arrays": [[name, record[name].base.str, record[name].shape] for name in record.names or ()],
    "texts": shards.texts,
    "shards": shards.counts,
    "classes_sha256": sealed.digest(packed_classes),
    "class_names": class_names,
    "settings": settings,
    "left_out": names,
  }
  sealed.write_json(path / INDEX, index)
  return len(classes), names


class _Shards(contextlib.AbstractContextManager):
  """Write records into several files of moderate size, because such files are easy to copy.

  Attributes:
    record: the structured type of the arrays in a record.
    texts: names of the texts in a record.
    counts: number of records in each file.
  """

  def __init__(self, path: Path):
    self._path, self._first, self._writer = path, dict[str, np.ndarray](), cast(Any, None)
    self.record, self.texts, self.counts = np.dtype([]), list[str](), list[int]()

  def write(self, arrays: dict[str, np.ndarray]) -> None:
    """Write one record, which must have the same names, types and shapes as the first record."""
    self._first = self._first or arrays
    check_alike(arrays, self._first)
    check_single_texts(arrays)
    self.texts = sorted(name for name, array in arrays.items() if is_text(array))
    texts = [arrays[name].item() for name in self.texts]
    arrays = {name: array for name, array in sorted(arrays.items()) if name not in self.texts}
    self.record = np.dtype([(name, array.dtype.str, array.shape) for name, array in arrays.items()])
    if self._writer is None or self.counts[-1] * self.record.itemsize >= _SHARD_BYTES:
      self._open()
    row = np.empty((), self.record)
    for name, array in arrays.items():
      row[name] = array
    self._writer.write(row.tobytes() + (json.dumps(texts).encode() if texts else b""))
    self.counts[-1] += 1

  def _open(self) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    self.__exit__()
    # Put one record in each group, so that a read decodes only that record. Compression saves a quarter to a third of
    # the disk space, and makes reading a quarter slower.
    self._writer = ArrayRecordWriter(str(self._path / _shard_name(len(self.counts))), "group_size:1")
    self.counts.append(0)

  def __exit__(self, *_: Any) -> None:
    if self._writer is not None:
      self._writer.close()


def _shard_name(number: int) -> str:
  return f"images-{number:05d}.array_record"
