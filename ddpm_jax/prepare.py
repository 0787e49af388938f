"""What the command line does before training: data are downloaded, converted and packed, once."""

from pathlib import Path

from ml_collections import ConfigDict
from tqdm import tqdm

from ddpm_jax import build, data, files
from ddpm_jax.places import user_path


def run_prepare(config: ConfigDict, output: Path | None) -> None:
  """Prepares the config's data: a TFDS data set is downloaded and converted; with an output folder, images are packed into it.

  Args:
    config: the recipe, of whose data section this is about.
    output: a new folder for packed images, fitted as the config says; None for none.

  Raises:
    ValueError: if the config's data need no preparation or cannot be prepared, or the output folder is taken.
  """
  c = config.data
  if c.source == "tfds":
    tqdm.write(f"preparing the TFDS data set {c.name} ...")
    where, counts, there = data.prepare_tfds(c.name, c.path and str(user_path(c.path, "config.data.path=")), c.module)
    splits = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    tqdm.write(f"{'prepared already' if there else 'prepared'}     {where}\nrecords      {splits}")
    if output is None:
      return
  elif c.source != "folder":
    raise ValueError(
      f"Got --mode=prepare with data.source={c.source!r}, which needs no preparation; wanted tfds or folder."
    )
  elif output is None:
    raise ValueError("Got no --output; wanted a new folder for the packed images, such as --output=/data/packed.")
  with files.new_folder(output) as temporary:
    train, evaluation = build.build_sources(config)
    # A split has a folder of its own, as in a folder of images.
    names = {"": train} if evaluation is None else {c.train_split: train, c.eval_split: evaluation}
    for name, source in names.items():
      settings = {"crop": c.crop, "resize": c.resize}
      count, left_out = data.pack(source, temporary / name, settings, c.broken)
      size = f"{c.image_size}x{c.image_size}x{c.channels}"
      tqdm.write(f"{name or 'images'}: {count:,} of {size} packed, {len(left_out):,} left out as broken")
  tqdm.write(f"packed       {output}\nto use them  --config.data.source=packed --config.data.path={output}")
