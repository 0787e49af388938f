"""Load data: random-access sources of images, and the pipeline that turns a source into batches."""

from ddpm_jax.data import prompts, tokenizers
from ddpm_jax.data.broken import BrokenImage, SkipBroken, cache_in_memory
from ddpm_jax.data.buckets import Buckets, check_buckets
from ddpm_jax.data.choices import Place, Splits, arrays, digit_pairs, digits, fit_settings, folder, mnist, packed, tfds
from ddpm_jax.data.classes import class_counts, complete_classes, proportional_classes
from ddpm_jax.data.fitting import RESIZES, Fit, check_image_size, fit
from ddpm_jax.data.folders import FolderSource
from ddpm_jax.data.hosts import Host, run_hosts
from ddpm_jax.data.inputs import Inputs, read_inputs, read_mask
from ddpm_jax.data.loading import Check, check_split_classes, classes_below, load, split
from ddpm_jax.data.metadata import Fields
from ddpm_jax.data.packing import INDEX, PackedSource, pack, pack_items
from ddpm_jax.data.pairs import read_digit_pairs
from ddpm_jax.data.pipeline import Batches, WorkerDied, batches, finish_batch
from ddpm_jax.data.preparing import prepare
from ddpm_jax.data.readers import read_arrays, read_digits, read_mnist
from ddpm_jax.data.sources import (
  A_TENTH,
  FRAMING,
  LATENT,
  NO_CLASS,
  ArraySource,
  Batch,
  Source,
  group_members,
  hold_out,
  image_chunks,
  is_text,
  known_texts,
  read,
  read_images,
  read_texts,
)
from ddpm_jax.data.tfds_records import TfdsSource, prepare_tfds
from ddpm_jax.data.tokens import Tokenizer, Tokens

__all__ = [
  "A_TENTH",
  "FRAMING",
  "INDEX",
  "LATENT",
  "NO_CLASS",
  "RESIZES",
  "ArraySource",
  "Batch",
  "Batches",
  "BrokenImage",
  "Buckets",
  "Check",
  "Fields",
  "Fit",
  "FolderSource",
  "Host",
  "Inputs",
  "PackedSource",
  "Place",
  "SkipBroken",
  "Source",
  "Splits",
  "TfdsSource",
  "Tokenizer",
  "Tokens",
  "WorkerDied",
  "arrays",
  "batches",
  "cache_in_memory",
  "check_buckets",
  "check_image_size",
  "check_split_classes",
  "class_counts",
  "classes_below",
  "complete_classes",
  "digit_pairs",
  "digits",
  "finish_batch",
  "fit",
  "fit_settings",
  "folder",
  "group_members",
  "hold_out",
  "image_chunks",
  "is_text",
  "known_texts",
  "load",
  "mnist",
  "pack",
  "pack_items",
  "packed",
  "prepare",
  "prepare_tfds",
  "prompts",
  "proportional_classes",
  "read",
  "read_arrays",
  "read_digit_pairs",
  "read_digits",
  "read_images",
  "read_inputs",
  "read_mask",
  "read_mnist",
  "read_texts",
  "run_hosts",
  "split",
  "tfds",
  "tokenizers",
]
