"""Prepare a data set before training: download, convert and pack it, once."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ddpm_jax.data.choices import Splits, arrays, digits, fit_settings, mnist, packed, tfds
from ddpm_jax.data.fitting import Fit
from ddpm_jax.data.loading import Check, check_split_classes
from ddpm_jax.data.packing import pack
from ddpm_jax.data.tfds_records import prepare_tfds
from ddpm_jax.storage import files
from ddpm_jax.storage.places import user_path

# Reading these is as quick as reading what would be packed of them.
_READY = (digits, mnist, arrays, packed)


def prepare(
  source: Callable[..., Splits],
  keys: Mapping[str, Any],
  fit: Fit,
  output: Path | None,
  *,
  broken: str = "stop",
  check: Check | None = None,
) -> None:
  """Download and convert a TFDS data set, and pack the images of any data set that is decoded as it is read.

  Args:
    source: the data set: `data.tfds`, `data.folder`, or one of a user's own.
    keys: its arguments but the first, such as {"path": "photos"}.
    fit: how its images are made to fit.
    output: a new folder for the packed images; None for none.
    broken: what to do about images that cannot be decoded: "stop", or "skip" to leave them out.
    check: of the classes of what is packed, such as `data.classes_below(10)`; None for no check.

  Raises:
    ValueError: if the data need no preparation or cannot be prepared, or the output folder is taken.
  """
  try:
    bound = inspect.signature(source).bind(fit, **keys)
  except TypeError as error:
    raise ValueError(
      f"Got {dict(keys)} as the arguments of data.source={source.__name__}: {error}. Set --config.data.source.<key>."
    ) from error
  bound.apply_defaults()
  known = bound.arguments
  if source is tfds:
    tqdm.write(f"preparing the TFDS data set {known['name']} ...")
    path = known["path"] and str(user_path(known["path"], "config.data.source.path="))
    where, counts, there = prepare_tfds(known["name"], path, known["module"])
    records = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    tqdm.write(f"{'prepared already' if there else 'prepared'}     {where}\nrecords      {records}")
    if output is None:
      return
  elif source in _READY:
    raise ValueError(
      f"Got --mode=prepare with data.source={source.__name__}, which needs no preparation; expected tfds or folder."
    )
  elif output is None:
    raise ValueError("Got no --output; expected a new folder for the packed images, such as --output=/data/packed.")
  with files.atomic_folder(output) as temporary:
    train, held_out = splits = source(*bound.args, **bound.kwargs)
    check_split_classes(splits, check)
    # A split has a folder of its own, as in a folder of images.
    names = [str(known.get("train_split", "train")), str(known.get("eval_split", "test"))]
    splits_by_name = {"": train} if held_out is None else dict(zip(names, (train, held_out), strict=True))
    for name, images in splits_by_name.items():
      count, left_out = pack(images, temporary / name, fit_settings(fit), broken)
      size = "x".join(map(str, fit.shape))
      tqdm.write(f"{name or 'images'}: {count:,} of {size} packed, {len(left_out):,} left out as broken")
  tqdm.write(f"packed       {output}\nto use them  --config.data.source=packed --config.data.source.path={output}")
