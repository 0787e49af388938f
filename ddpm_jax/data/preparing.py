"""Download, convert and pack a data set once before training."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ddpm_jax.data.choices import Splits, arrays, digit_pairs, digits, fit_settings, mnist, packed, tfds
from ddpm_jax.data.fitting import Fit
from ddpm_jax.data.loading import Check, check_split_classes
from ddpm_jax.data.metadata import Fields
from ddpm_jax.data.packing import pack
from ddpm_jax.data.tfds_records import prepare_tfds
from ddpm_jax.storage import files
from ddpm_jax.storage.places import user_path

# Packing would not make these any faster to read.
_NO_PREPARATION = (digits, digit_pairs, mnist, arrays, packed)
_NO_FIELDS = Fields()


def prepare(
  source: Callable[..., Splits],
  keys: Mapping[str, Any],
  fit: Fit,
  output: Path | None,
  *,
  fields: Fields = _NO_FIELDS,
  broken: str = "stop",
  check: Check | None = None,
) -> None:
  """Download, convert or pack a data set once before training.

  A TFDS data set is downloaded and converted. With `output`, the resized images of the data set are packed.

  Args:
    source: the function of the data set: `data.tfds`, `data.folder` or a user's function.
    keys: the arguments of `source` other than `fit` and `fields`, such as {"path": "photos"}.
    fit: how to crop and resize the images.
    output: a new folder for the packed images. None packs nothing, and is allowed only for TFDS.
    fields: the fields that hold the class and the caption of each image. A source that has no argument of type `Fields`
      does not get them.
    broken: how to treat images that cannot be decoded: "stop" to raise an error, or "skip" to omit them.
    check: a check of the classes, such as `data.classes_below(10)`; None for no check.

  Raises:
    ValueError: if the data set needs no preparation or cannot be prepared, `output` is None for a data set other
      than TFDS, or `output` is a folder that is not empty.
  """
  signature = inspect.signature(source)
  is_fit, is_fields = (Fit, "Fit", "data.Fit"), (Fields, "Fields", "data.Fields")
  supplied: dict[str, Any] = {name: fields for name, one in signature.parameters.items() if one.annotation in is_fields}
  supplied |= {name: fit for name, one in signature.parameters.items() if name == "fit" or one.annotation in is_fit}
  try:
    call = signature.bind(**supplied, **keys)
  except TypeError as error:
    raise ValueError(
      f"Got {dict(keys)} as the arguments of data.source={source.__name__}: {error}. Set --config.data.source.<key>."
    ) from error
  call.apply_defaults()
  arguments = call.arguments
  if source is tfds:
    tqdm.write(f"preparing the TFDS data set {arguments['name']} ...")
    path = arguments["path"] and str(user_path(arguments["path"], "config.data.source.path="))
    folder, counts, was_prepared = prepare_tfds(arguments["name"], path, arguments["module"])
    records = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    tqdm.write(f"{'prepared already' if was_prepared else 'prepared'}     {folder}\nrecords      {records}")
    if output is None:
      return
  elif source in _NO_PREPARATION:
    raise ValueError(
      f"Got --mode=prepare with data.source={source.__name__}, which needs no preparation; expected tfds, folder or"
      " your own data set. Start training without this step."
    )
  elif output is None:
    raise ValueError("Got no --output; expected a new folder for the packed images, such as --output=/data/packed.")
  with files.atomic_folder(output) as temporary:
    train, held_out = splits = source(*call.args, **call.kwargs)
    check_split_classes(splits, check)
    # Each split gets a folder, as in a folder of image files.
    names = [str(arguments.get("train_split", "train")), str(arguments.get("eval_split", "test"))]
    splits_by_name = {"": train} if held_out is None else dict(zip(names, (train, held_out), strict=True))
    for name, images in splits_by_name.items():
      count, omitted = pack(images, temporary / name, fit_settings(fit, fields), broken)
      size = "x".join(map(str, fit.shape))
      tqdm.write(f"{name or 'images'}: {count:,} of {size} packed, {len(omitted):,} omitted as broken")
  tqdm.write(f"packed       {output}\nto use them  --config.data.source=packed --config.data.source.path={output}")
