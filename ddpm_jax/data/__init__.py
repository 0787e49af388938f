"""Data: random-access sources, and the pipeline that turns one into batches."""

from ddpm_jax.data.pipeline import Batches, batches
from ddpm_jax.data.sources import (
  ArraySource,
  FolderSource,
  Source,
  TfdsSource,
  arrays,
  digits,
  hold_out,
  in_memory,
  mnist,
  read,
)

__all__ = [
  "ArraySource",
  "Batches",
  "FolderSource",
  "Source",
  "TfdsSource",
  "arrays",
  "batches",
  "digits",
  "hold_out",
  "in_memory",
  "mnist",
  "read",
]
