"""Read the captions of images, and hold many captions in little memory."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from ddpm_jax.data.broken import BrokenCaption
from ddpm_jax.storage import jsonfiles

# The value of `data.fields.text` that selects the text file beside each image, which has the name of the image and this
# suffix.
SUFFIX = ".txt"
# The size in bytes of the largest caption. A larger text file is probably no caption.
_MAX_BYTES = 2**16
_EXPECTED = "expected one caption for each image, as text"


class Captions:
  """Store captions as UTF-8 bytes, and return each caption as text.

  A million captions of 60 characters take 68 MB. Python strings would take 117 MB, and worker processes would start
  more slowly.

  Args:
    texts: the captions.

  Raises:
    ValueError: if a caption cannot be encoded as UTF-8, or is longer than 64 KiB.
  """

  def __init__(self, texts: Iterable[str]):
    content, ends = bytearray(), []
    for text in texts:
      content += _encode(text)
      ends.append(len(content))
    self._content, self._ends = bytes(content), np.array(ends, np.int64)

  def __len__(self) -> int:
    return len(self._ends)

  def __getitem__(self, index: int) -> str:
    start = int(self._ends[index - 1]) if index else 0
    return self._content[start : int(self._ends[index])].decode()

  @property
  def empty(self) -> np.ndarray:
    """Return whether each caption is empty, bool [N]."""
    return np.diff(self._ends, prepend=0) == 0


def from_values(values: Sequence[Any], field: str, where: str) -> Captions:
  """Return the captions in the values of a field of metadata.jsonl.

  Args:
    values: the value of each image: a text, or None for no caption. None becomes the empty caption.
    field: the name of the field, for error messages.
    where: the file of the values, for error messages.

  Raises:
    ValueError: if a value is neither text nor None, cannot be encoded as UTF-8, or is longer than 64 KiB; or if no
      image has a caption.
  """
  wrong = set(map(type, values)) - {str, type(None)}
  if wrong:
    value = next(value for value in values if type(value) in wrong)
    advice = "Write one caption instead of a list, or choose" if isinstance(value, list) else "Choose"
    raise ValueError(
      f"Got the field {field!r} with the value {jsonfiles.shorten(value)} in {where}; {_EXPECTED} or null. {advice} another field"
      " with --config.data.fields.text."
    )
  try:
    captions = Captions(value or "" for value in values)
  except ValueError as error:
    raise ValueError(f"{where}, field {field!r}: {error}") from error
  if captions.empty.all():
    raise ValueError(
      f"Got the field {field!r} without a caption for any image in {where}; {_EXPECTED}. Choose another field with"
      " --config.data.fields.text."
    )
  return captions


def find_files(root: bytes, folders: Mapping[bytes, bytes]) -> tuple[np.ndarray, int]:
  """Find the text files that have the name of an image, such as 0.txt beside 0.png.

  Args:
    root: the folder of all images.
    folders: the names of the image files in each folder. The keys are the paths of the folders relative to `root`. Each
      value is the names joined into one bytes object, with a zero byte after each name.

  Returns:
    An array, bool [N], which is true for each image with a text file beside it, and the number of these text files.

  Raises:
    ValueError: if a folder cannot be listed, or no image has a text file.
  """
  found, count = list[bool](), 0
  for folder, names in folders.items():
    path = os.path.join(root, folder)
    try:
      with os.scandir(path) as entries:
        stems = {
          entry.name[: -len(SUFFIX)] for entry in entries if entry.name.endswith(SUFFIX.encode()) and entry.is_file()
        }
    except OSError as error:
      raise ValueError(
        f"Cannot list the folder {os.fsdecode(path)} ({error.strerror}); expected a readable folder. Make it readable."
      ) from error
    image_stems = [os.path.splitext(name)[0] for name in names.split(b"\0")[:-1]]
    found += [stem in stems for stem in image_stems]
    count += len(stems.intersection(image_stems))
  if not count:
    raise ValueError(
      f"Got config.data.fields.text={SUFFIX!r} for the folder {os.fsdecode(root)!r}, which contains no text file with the name of an"
      f" image; expected a file such as 0{SUFFIX} beside 0.png. Add the files, or set --config.data.fields.text to a field of"
      " metadata.jsonl."
    )
  return np.array(found, bool), count


def read_beside(image: str) -> str:
  """Read the caption in the text file beside an image, without spaces and line breaks at both ends.

  Raises:
    BrokenCaption: if the file cannot be read, is not UTF-8, or is larger than 64 KiB.
  """
  path = f"{os.path.splitext(image)[0]}{SUFFIX}"
  try:
    with open(path, "rb") as file:
      content = file.read(_MAX_BYTES + 1)
  except OSError as error:
    raise BrokenCaption(path, error.strerror or type(error).__name__) from error
  content = content.removeprefix(b"\xef\xbb\xbf")
  if len(content) > _MAX_BYTES:
    raise BrokenCaption(path, f"it has more than {_MAX_BYTES:,} bytes, so it is probably no caption")
  try:
    return content.decode().strip()
  except UnicodeDecodeError as error:
    raise BrokenCaption(path, f"it is not UTF-8 ({error})") from error


def decode(value: Any, where: str) -> str:
  """Return the text of a caption that is a string or UTF-8 bytes.

  Raises:
    ValueError: if the value is neither a string nor bytes, is not UTF-8, or is longer than 64 KiB. The message
      starts with `where`.
  """
  if not isinstance(value, str | bytes):
    raise ValueError(f"{where}: Got a caption of type {type(value).__name__}; {_EXPECTED}. Choose other data.")
  try:
    content = value if isinstance(value, bytes) else _encode(value)
    _check_size(content)
    return str(content.decode())
  except UnicodeDecodeError as error:
    raise ValueError(f"{where}: Got a caption that is not UTF-8 ({error}). Save it as UTF-8.") from error
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error


def report_missing(missing: np.ndarray, where: str, example: str) -> None:
  """Print the number of images without a caption, if there are any.

  Args:
    missing: whether each image has no caption, bool [N].
    where: the file or folder of the captions.
    example: the name of an image without a caption.
  """
  if count := int(np.sum(missing)):
    tqdm.write(
      f"{count:,} of {len(missing):,} image(s) have no caption in {where}, such as {example}; they get the empty caption"
    )


def _encode(text: str) -> bytes:
  try:
    content = text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
      f"Got the caption {text[:80]!r}, which cannot be written as UTF-8 ({error.reason}); expected text. Correct it."
    ) from error
  _check_size(content)
  return content


def _check_size(content: bytes) -> None:
  if len(content) > _MAX_BYTES:
    start = content[:40].decode(errors="replace")
    raise ValueError(
      f"Got a caption of more than {_MAX_BYTES:,} bytes, which starts with {start!r}; expected a shorter text. Shorten it."
    )
