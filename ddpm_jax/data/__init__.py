"""Data: random-access sources, and the pipeline that turns one into batches."""

from ddpm_jax.data.choices import Place, Splits, arrays, digits, folder, mnist, packed, settings_of, tfds
from ddpm_jax.data.fitting import RESIZES, Fit, check_space, fit
from ddpm_jax.data.folders import FolderSource
from ddpm_jax.data.inputs import Inputs, read_inputs, read_mask
from ddpm_jax.data.loading import Check, check_classes_of, classes_below, load
from ddpm_jax.data.packing import PackedSource, pack
from ddpm_jax.data.pipeline import Batches, WorkerDied, batches
from ddpm_jax.data.preparing import prepare
from ddpm_jax.data.readers import read_arrays, read_digits, read_mnist
from ddpm_jax.data.sources import (
  A_TENTH,
  NO_CLASS,
  ArraySource,
  BrokenImage,
  SkipBroken,
  Source,
  class_counts,
  hold_out,
  images_in_parts,
  in_memory,
  in_proportion,
  known_classes,
  read,
  read_images,
)
from ddpm_jax.data.tfds_records import TfdsSource, prepare_tfds

__all__ = [
  "A_TENTH",
  "NO_CLASS",
  "RESIZES",
  "ArraySource",
  "Batches",
  "BrokenImage",
  "Check",
  "Fit",
  "FolderSource",
  "Inputs",
  "PackedSource",
  "Place",
  "SkipBroken",
  "Source",
  "Splits",
  "TfdsSource",
  "WorkerDied",
  "arrays",
  "batches",
  "check_classes_of",
  "check_space",
  "class_counts",
  "classes_below",
  "digits",
  "fit",
  "folder",
  "hold_out",
  "images_in_parts",
  "in_memory",
  "in_proportion",
  "known_classes",
  "load",
  "mnist",
  "pack",
  "packed",
  "prepare",
  "prepare_tfds",
  "read",
  "read_arrays",
  "read_digits",
  "read_images",
  "read_inputs",
  "read_mask",
  "read_mnist",
  "settings_of",
  "tfds",
]
