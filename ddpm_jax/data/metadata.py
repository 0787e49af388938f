"""Read fields of images, such as their classes and captions, from metadata.jsonl.

The layout is the same as in Hugging Face's ImageFolder: metadata.jsonl is in the folder of the images, and each of its
lines is a JSON object. The key `file_name` of the object holds the path of an image in the folder. The other
keys are the fields of this image, and may have any names.
"""

import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ddpm_jax.data import captions
from ddpm_jax.data.sources import NO_CLASS
from ddpm_jax.names import hint
from ddpm_jax.storage import jsonfiles

FILE = "metadata.jsonl"
_FILE_NAME = "file_name"
# Files that Hugging Face's ImageFolder accepts in place of metadata.jsonl, each with the pandas function that reads it.
_OTHER_FILES = {"metadata.csv": "read_csv", "metadata.parquet": "read_parquet"}
_MAX_NAMES = 5

# The values [N] of the field of each item.
Values = dict[str, list[Any]]


class Fields(NamedTuple):
  """Name the fields of a data set that hold the class and the caption of an image.

  The fields of a folder of images are the keys in metadata.jsonl. The fields of an .npz file are the arrays in the
  file. The fields of a TFDS data set are its features.

  Attributes:
    classes: the field that holds the class of an image, as text or an integer; "" to use no field.
    text: the field that holds the caption of an image; ".txt" to read the captions of a folder from the text files
      beside the images; "" for no captions.
  """

  classes: str = ""
  text: str = ""

  @property
  def chosen(self) -> dict[str, str]:
    """Return a dict from "classes" and "text" to their fields, without empty fields."""
    return {item: field for item, field in self._asdict().items() if field}

  @property
  def in_metadata(self) -> dict[str, str]:
    """Return the entries of `chosen` that a folder reads from metadata.jsonl."""
    return {item: field for item, field in self.chosen.items() if (item, field) != ("text", captions.SUFFIX)}


def read_fields(root: bytes, numbers: Mapping[bytes, int], fields: Mapping[str, str]) -> Values:
  """Read fields of all images from the file metadata.jsonl in a folder.

  The file is read line by line. Empty lines are skipped. A path in `file_name` is relative to the folder, and
  separates sub-folders by "/".

  Args:
    root: the folder.
    numbers: the number of each image, from 0, by its path relative to `root`.
    fields: the fields to read, such as {"classes": "animal", "text": "caption"} (see `Fields.in_metadata`).

  Returns:
    A dict from each key of `fields` to the values [N] of its field for all images. A value is None if the
    file has no line for the image, or if the line has no caption.

  Raises:
    ValueError: if the file is missing or unreadable; if a line is not a JSON object, or lacks `file_name` or the class;
      if no line has a caption; if an image has two lines; or if a `file_name` is not in `numbers`.
  """
  path = os.fsdecode(os.path.join(root, os.fsencode(FILE)))
  _check_file(os.fsdecode(root), fields)
  values: Values = {item: [None] * len(numbers) for item in fields}
  lines = np.zeros(len(numbers), np.int64)
  missing: list[str] = []
  entry, found = dict[str, Any](), set[str]()
  for line, entry in _objects(path):
    where = f"line {line:,} of {path}"
    name = entry.get(_FILE_NAME)
    if not isinstance(name, str):
      shown = f"{_FILE_NAME}={jsonfiles.shorten(name)}" if _FILE_NAME in entry else f"without {_FILE_NAME!r}"
      raise ValueError(
        f"Got {where} {shown}; expected the path of an image as text under the key {_FILE_NAME!r}, relative to the"
        " folder. Correct the line."
      )
    number = _find(name, numbers, where)
    if number is None:
      missing.append(f"{name!r} (line {line:,})")
      continue
    if lines[number]:
      raise ValueError(
        f"Got {where} with file_name={name!r}, which is also in line {lines[number]:,}; expected one line for each"
        " image. Remove one of the two lines."
      )
    lines[number] = line
    for item, field in fields.items():
      if field in entry:
        values[item][number] = entry[field]
        found.add(item)
      elif item == "classes":
        raise _unknown_field(item, field, entry, where)
  if missing:
    more = f" and {len(missing) - _MAX_NAMES:,} more" if len(missing) > _MAX_NAMES else ""
    raise ValueError(
      f"Got {len(missing):,} image(s) in {path} that are not among the images of the folder:"
      f" {', '.join(missing[:_MAX_NAMES])}{more}; expected the paths of existing image files, relative to the folder"
      " and not hidden. Restore the images, or remove their lines."
    )
  if "text" in fields and "text" not in found:
    raise _unknown_field("text", fields["text"], entry, path)
  if unlisted := int(np.sum(lines == 0)):
    example = next(name for name, number in numbers.items() if not lines[number])
    tqdm.write(f"{unlisted:,} image(s) have no line in {path}, such as {os.fsdecode(example)}")
  return values


def number_classes(
  values: Sequence[Any], field: str, where: str, names: Sequence[str] | None = None
) -> tuple[list[str], np.ndarray]:
  """Return the names of the classes in the order of their numbers, and the class number of every value, int32 [N].

  Args:
    values: text, integers, or None for an image without a class.
    field: the name of the field, for error messages.
    where: the file of the values, for error messages.
    names: the names of the classes. A value that is not among the names gets `NO_CLASS`. By default, the names are
      the sorted values: integers by size, text by the codes of its characters.

  Raises:
    ValueError: if a value is neither text nor an integer nor None; if some values are text and others are integers; or
      if all values are None and there are no `names`.
  """
  kinds = set(map(type, values)) - {type(None)}
  if wrong := kinds - {str, int}:
    value = next(value for value in values if type(value) in wrong)
    raise ValueError(
      f"Got the field {field!r} with the value {jsonfiles.shorten(value)} in {where}; expected a class: text, an"
      " integer or null. Choose another field with --config.data.fields.classes."
    )
  if len(kinds) > 1:
    examples = " and ".join(repr(next(value for value in values if type(value) is kind)) for kind in (str, int))
    raise ValueError(
      f"Got the field {field!r} with both text and integers in {where}, such as {examples}; expected one type. Write"
      " all classes as text."
    )
  distinct = set(values) - {None}
  if names is None:
    if not distinct:
      raise ValueError(
        f"Got the field {field!r} with null for all images in {where}; expected a class for each image. Choose another"
        " field with --config.data.fields.classes."
      )
    names = [str(value) for value in sorted(distinct)]
  number_by_name = {name: number for number, name in enumerate(names)}
  number_by_value = {value: number_by_name.get(str(value), NO_CLASS) for value in distinct}
  return list(names), np.array([number_by_value.get(value, NO_CLASS) for value in values], np.int32)


def _check_file(root: str, fields: Mapping[str, str]) -> None:
  """Raise a ValueError if a folder has no metadata.jsonl.

  The message explains what to do, for example if the folder has a metadata.csv instead.
  """
  path = os.path.join(root, FILE)
  if os.path.isfile(path):
    return
  problem = f"Got config.data.fields for the folder {root!r}, which contains no {FILE}"
  for name, function in _OTHER_FILES.items():
    if os.path.isfile(os.path.join(root, name)):
      raise ValueError(
        f"{problem} but {name}, which is not supported; expected {path}. Convert it with pandas:"
        f" pandas.{function}({name!r}).to_json({FILE!r}, orient='records', lines=True)"
      )
  holders = glob.glob(f"*/{FILE}", root_dir=root) or glob.glob(f"*/*/{FILE}", root_dir=root)
  if holders:
    raise ValueError(
      f"{problem}, but {', '.join(sorted(holders)[:_MAX_NAMES])}; expected {path}, or one in each split. Set"
      " --config.data.source.path to the folder with the splits. Set --config.data.source.train_split and"
      " --config.data.source.eval_split to the names of the splits, or to '' if there is no such split."
    )
  above = os.path.join(os.path.dirname(root), FILE)
  if os.path.isfile(above):
    raise ValueError(
      f"{problem}, but the folder above does; expected {path}. Write a {FILE} for each split, with each file_name"
      " relative to the folder of the split."
    )
  example = json.dumps({_FILE_NAME: "0.png"} | {field: f"<{item}>" for item, field in fields.items()})
  remedies = {
    "classes": "--config.data.fields.classes='' to take the classes from the sub-folders",
    "text": f"--config.data.fields.text={captions.SUFFIX} for captions in text files beside the images",
  }
  raise ValueError(
    f"{problem}; expected {path}, with a line such as {example} for each image. Add the file, or set"
    f" {', and '.join(remedies[item] for item in fields)}."
  )


def _objects(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yield the number (from 1) and the JSON object of each nonempty line in a file."""
  line = 0
  try:
    with open(path, encoding="utf-8-sig") as file, tqdm(desc=f"reading {FILE}", unit=" lines", delay=2) as bar:
      for line, text in enumerate(file, 1):
        if text.isspace():
          continue
        try:
          item = json.loads(text)
        except (ValueError, RecursionError) as error:
          raise _not_an_object(path, line, text.strip(), f"cannot be parsed ({error})") from error
        if not isinstance(item, dict):
          raise _not_an_object(path, line, text.strip(), "is no JSON object")
        yield line, item
        bar.update()
  except UnicodeDecodeError as error:
    raise ValueError(
      f"Cannot read {path} after line {line:,}: {error}; expected UTF-8. Save the file as UTF-8."
    ) from error
  except OSError as error:
    raise ValueError(f"Cannot read {path}: {error.strerror}. Make the file readable, or restore it.") from error


def _not_an_object(path: str, line: int, text: str, problem: str) -> ValueError:
  return ValueError(
    f"Got line {line:,} of {path}, which {problem}: {jsonfiles.shorten(text)}; expected one JSON object in each line,"
    ' such as {"file_name": "0.png", "group": "cat"}. Correct the line.'
  )


def _find(name: str, numbers: Mapping[bytes, int], where: str) -> int | None:
  """Return the number of the image whose path is `name`, or None if the folder has no such image."""
  try:
    path = os.fsencode(name)
  except UnicodeEncodeError:
    return None
  if (number := numbers.get(path)) is not None:
    return number
  # Few paths reach this line, and most of them are wrong.
  if os.path.isabs(path) or b".." in path.split(b"/"):
    raise ValueError(
      f"Got {where} with file_name={name!r}; expected a path relative to the folder of {FILE}, without '..'. Correct"
      " the line, or move the image into the folder."
    )
  return numbers.get(os.path.normpath(path))


def _unknown_field(item: str, field: str, entry: Mapping[str, Any], where: str) -> ValueError:
  others = [name for name in entry if name != _FILE_NAME]
  # Only a class must be in every line.
  null = " In the line of an image without a class, write null as the value of the field." if item == "classes" else ""
  return ValueError(
    f"Got {where} without the field {field!r}; expected --config.data.fields.{item} to name a field of the file, such"
    f" as {', '.join(others) or '(none)'}.{hint(field, others)}{null}"
  )
