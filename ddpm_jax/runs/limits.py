"""Refuse experiments that need more memory than there is, before anything is read, compiled or written.

Each bound is a lower one, from arithmetic alone: the bytes of the data and of the network's first features. What is above it cannot run.
What is below it may still not fit; `--mode=plan` tells.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.config import Experiment
from ddpm_jax.devices import memory

_FLOAT = 4
# The stack of a thread, and a Python process with NumPy.
_THREAD, _PROCESS = 2**23, 2**26


def check_training(experiment: Experiment, devices: Sequence[Any]) -> None:
  """Raise a ValueError if a batch, or what prepares it, does not fit into the memory of the devices or of this machine."""
  c, shape = experiment.training, experiment.data.shape
  advice = "Lower the batch size, the image size or the network's channels, or take more devices."
  needed = c.batch_size * math.prod(shape) * _FLOAT + c.batch_size / c.accumulate * _features(experiment)
  what = f"config.training.batch_size={c.batch_size} {_of(shape)}"
  memory.check(f"{what}{_channels(experiment)}", needed, memory.device_bytes(devices), advice)
  images = c.batch_size / jax.process_count() * math.prod(shape)
  memory.check(what, images, memory.host_bytes(), advice)
  d = experiment.data
  workers = d.num_threads * _THREAD + d.num_workers * _PROCESS
  what = f"config.data.num_threads={d.num_threads} and num_workers={d.num_workers}"
  memory.check(what, workers, memory.host_bytes(), "Take as many as there are cores.")


def check_batch(experiment: Experiment, size: int, devices: Sequence[Any], name: str) -> None:
  """Raise a ValueError if a batch of samples over all devices does not fit into their memory; `name` is its key."""
  shape = experiment.model.data_shape
  needed = size * (math.prod(shape) * _FLOAT + _features(experiment))
  section, key = name.split(".")
  what = f"config.{name}={getattr(getattr(experiment, section), key)} {_of(shape)}{_channels(experiment)}"
  memory.check(what, needed, memory.device_bytes(devices), f"Lower --config.{name}, or the size of the images.")


def check_evaluation(experiment: Experiment, devices: Sequence[Any], folder: Path) -> None:
  """Raise a ValueError if an evaluation needs more disk for its samples, or more memory for a batch, than there is."""
  c, shape = experiment.evaluation, experiment.model.data_shape
  check_batch(experiment, min(c.batch_size, c.num_samples) * len(devices), devices, "evaluation.batch_size")
  # Features are extracted in batches of this size, however few images there are.
  check_images(shape, c.batch_size, f"config.evaluation.batch_size={c.batch_size}")
  if c.likelihood:
    probes = min(c.batch_size, c.likelihood_images or c.batch_size) * c.probes
    check_images(shape, probes * _FLOAT, f"config.evaluation.probes={c.probes}")
  what, advice = (
    f"config.evaluation.num_samples={c.num_samples} {_of(shape)}",
    "Lower it, or use a --workdir on a larger disk.",
  )
  memory.check(what, c.num_samples * math.prod(shape), memory.disk_bytes(folder), advice, where="disk")


def check_images(shape: Sequence[int], count: float, what: str) -> None:
  """Raise a ValueError if so many images, a byte a value, do not fit into the memory of this machine."""
  advice = "Lower it, or the size of the images."
  memory.check(f"{what} {_of(shape)}", count * math.prod(shape), memory.host_bytes(), advice)


def _of(shape: Sequence[int]) -> str:
  return f"for images of {'x'.join(map(str, shape))}"


def _channels(experiment: Experiment) -> str:
  channels = getattr(experiment.model.network.module, "channels", None)
  return f" and network.channels={channels}" if channels else ""


def _features(experiment: Experiment) -> int:
  """Return the bytes of the first layer's features for a sample, or 0 if the network does not say how many channels it has."""
  module, space = experiment.model.network.module, experiment.model.shape[:-1]
  size = jnp.dtype(getattr(module, "dtype", None) or jnp.float32).itemsize
  return math.prod(space) * int(getattr(module, "channels", 0) or 0) * size
