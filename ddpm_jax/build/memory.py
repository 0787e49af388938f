"""Refuse configs that need more memory than there is, before anything is read, compiled or written.

Each bound is a lower one, from arithmetic alone: the bytes of the images and of the network's first features. A config above it cannot run.
A config below it may still not fit; `--mode=plan` tells.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ddpm_jax import memory
from ddpm_jax.build.model import image_shape

_FLOAT = 4
# The stack of a thread, and a Python process with NumPy.
_THREAD, _PROCESS = 2**23, 2**26


def check_training(config: ConfigDict, devices: Sequence[Any]) -> None:
  """Raise a ValueError if a batch, or what prepares it, does not fit into the memory of the devices or of this machine."""
  c, advice = config.training, "Lower the batch size, the image size or network.channels, or take more devices."
  needed = c.batch_size * _image(config) * _FLOAT + c.batch_size / c.accumulate * _features(config)
  what = f"config.training.batch_size={c.batch_size} {_of(config)}"
  memory.check(f"{what} and network.channels={config.network.channels}", needed, memory.of_devices(devices), advice)
  images = c.batch_size / jax.process_count() * _image(config)
  memory.check(what, images, memory.of_host(), advice)
  d = config.data
  workers = d.num_threads * _THREAD + d.num_workers * _PROCESS
  memory.check(
    f"config.data.num_threads={d.num_threads} and num_workers={d.num_workers}",
    workers,
    memory.of_host(),
    "Take as many as there are cores.",
  )


def check_batch(config: ConfigDict, size: int, devices: Sequence[Any], name: str) -> None:
  """Raise a ValueError if a batch of samples over all devices does not fit into their memory; `name` is its key."""
  needed = size * (_image(config) * _FLOAT + _features(config))
  section, key = name.split(".")
  what = f"config.{name}={config[section][key]} {_of(config)} and network.channels={config.network.channels}"
  memory.check(what, needed, memory.of_devices(devices), f"Lower --config.{name}, or the size of the images.")


def check_evaluation(config: ConfigDict, devices: Sequence[Any], folder: Path) -> None:
  """Raise a ValueError if an evaluation needs more disk for its samples, or more memory for a batch, than there is."""
  c = config.evaluation
  check_batch(config, min(c.batch_size, c.num_samples) * len(devices), devices, "evaluation.batch_size")
  # Features are extracted in batches of this size, however few images there are.
  check_images(config, c.batch_size, f"config.evaluation.batch_size={c.batch_size}")
  if c.likelihood:
    probes = min(c.batch_size, c.likelihood_images or c.batch_size) * c.probes
    check_images(config, probes * _FLOAT, f"config.evaluation.probes={c.probes}")
  memory.check(
    f"config.evaluation.num_samples={c.num_samples} {_of(config)}",
    c.num_samples * _image(config),
    memory.of_disk(folder),
    "Lower it, or use a --workdir on a larger disk.",
    where="disk",
  )


def check_images(config: ConfigDict, count: float, what: str) -> None:
  """Raise a ValueError if so many images, a byte a value, do not fit into the memory of this machine."""
  memory.check(
    f"{what} {_of(config)}",
    count * _image(config),
    memory.of_host(),
    "Lower it, or the size of the images.",
  )


def check_features(dimensions: int, kept: int, covariance: bool) -> None:
  """Raise a ValueError if features and their covariance do not fit into the memory of this machine."""
  needed = 8 * (dimensions**2 if covariance else 0) + _FLOAT * dimensions * kept
  memory.check(
    f"features of {dimensions:,} dimensions, {kept:,} of them kept{' and their covariance' if covariance else ''}",
    needed,
    memory.of_host(),
    "Set --config.evaluation.features=inception, lower --config.evaluation.most_kept, or name other --config.evaluation.scores.",
  )


def _of(config: ConfigDict) -> str:
  return f"for images of {'x'.join(map(str, image_shape(config)))}"


def _image(config: ConfigDict) -> int:
  return math.prod(image_shape(config))


def _features(config: ConfigDict) -> int:
  """Bytes of what the first layer of a network gives for an image."""
  height, width, _ = image_shape(config)
  return height * width * config.network.channels * (_FLOAT if config.network.dtype == "float32" else 2)
