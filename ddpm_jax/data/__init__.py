"""Data: random-access sources, and the pipeline that turns one into batches."""

from ddpm_jax.data.fitting import RESIZES, fit
from ddpm_jax.data.folders import FolderSource
from ddpm_jax.data.inputs import Inputs, read_inputs, read_mask
from ddpm_jax.data.packed import PackedSource, pack
from ddpm_jax.data.pipeline import Batches, WorkerDied, batches
from ddpm_jax.data.sources import (
  A_TENTH,
  NO_CLASS,
  ArraySource,
  BrokenImage,
  SkipBroken,
  Source,
  arrays,
  digits,
  hold_out,
  in_memory,
  known_labels,
  label_counts,
  mnist,
  read,
)
from ddpm_jax.data.tfds import TfdsSource, prepare_tfds

__all__ = [
  "A_TENTH",
  "NO_CLASS",
  "RESIZES",
  "ArraySource",
  "Batches",
  "BrokenImage",
  "FolderSource",
  "Inputs",
  "PackedSource",
  "SkipBroken",
  "Source",
  "TfdsSource",
  "WorkerDied",
  "arrays",
  "batches",
  "digits",
  "fit",
  "hold_out",
  "in_memory",
  "known_labels",
  "label_counts",
  "mnist",
  "pack",
  "prepare_tfds",
  "read",
  "read_inputs",
  "read_mask",
]
