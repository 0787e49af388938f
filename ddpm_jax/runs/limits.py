"""Refuse experiments that need more memory or disk than is available, before anything is compiled or written.

The estimates are lower bounds: the bytes of the data and of the network's first features. An experiment cannot run if
its estimate does not fit. If the estimate fits, the experiment may still need too much memory. `--mode=plan` compiles
the train step and prints the memory that the step needs.
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
# Bytes of a thread's stack, and of a Python process that has imported NumPy.
_THREAD, _PROCESS = 2**23, 2**26


def check_training(experiment: Experiment, devices: Sequence[Any]) -> None:
  """Raise a ValueError if a training batch, or the workers that read it, do not fit into the available memory."""
  c, shape = experiment.training, experiment.data.train_shape
  advice = "Lower the batch size, the image size or the network's channels, or use more devices."
  needed = c.batch_size * math.prod(shape) * _FLOAT + c.batch_size / c.accumulate * _features(experiment, shape)
  what = f"config.training.batch_size={c.batch_size} {_for_images(shape)}"
  memory.check(f"{what}{_channels(experiment)}", needed, memory.device_bytes(devices), advice)
  images = c.batch_size / jax.process_count() * math.prod(shape)
  memory.check(what, images, memory.host_bytes(), advice)
  d = experiment.data
  workers = d.num_threads * _THREAD + d.num_workers * _PROCESS
  what = f"config.data.num_threads={d.num_threads} and num_workers={d.num_workers}"
  memory.check(what, workers, memory.host_bytes(), "Use one thread or worker for each CPU core.")


def check_batch(experiment: Experiment, size: int, devices: Sequence[Any], name: str) -> None:
  """Raise a ValueError if a batch of samples does not fit into the memory of the devices.

  Args:
    experiment: the experiment with the model.
    size: the size of the batch over all devices.
    devices: the devices.
    name: the config key of the batch size, such as "sampling.batch_size".
  """
  shape = experiment.model.data_shape
  needed = size * (math.prod(shape) * _FLOAT + _features(experiment))
  section, key = name.split(".")
  what = f"config.{name}={getattr(getattr(experiment, section), key)} {_for_images(shape)}{_channels(experiment)}"
  memory.check(what, needed, memory.device_bytes(devices), f"Lower --config.{name} or the image size.")


def check_evaluation(experiment: Experiment, devices: Sequence[Any], folder: Path) -> None:
  """Raise a ValueError if an evaluation's samples do not fit on the disk, or its batches do not fit into memory."""
  c, shape = experiment.evaluation, experiment.model.data_shape
  check_batch(experiment, min(c.batch_size, c.num_samples) * len(devices), devices, "evaluation.batch_size")
  # Features are extracted in batches of this size, even if there are fewer images.
  check_images(shape, c.batch_size, f"config.evaluation.batch_size={c.batch_size}")
  if c.likelihood:
    probes = min(c.batch_size, c.likelihood_images or c.batch_size) * c.probes
    check_images(shape, probes * _FLOAT, f"config.evaluation.probes={c.probes}")
  what, advice = (
    f"config.evaluation.num_samples={c.num_samples} {_for_images(shape)}",
    "Lower it, or use a --workdir on a larger disk.",
  )
  memory.check(what, c.num_samples * math.prod(shape), memory.disk_bytes(folder), advice, where="disk")


def check_images(shape: Sequence[int], count: float, what: str) -> None:
  """Raise a ValueError if `count` images of one byte per value do not fit into the memory of this machine."""
  advice = "Lower it or the image size."
  memory.check(f"{what} {_for_images(shape)}", count * math.prod(shape), memory.host_bytes(), advice)


def _for_images(shape: Sequence[int]) -> str:
  return f"for images of {'x'.join(map(str, shape))}"


def _channels(experiment: Experiment) -> str:
  channels = getattr(experiment.model.network.module, "channels", None)
  return f" and network.channels={channels}" if channels else ""


def _features(experiment: Experiment, shape: tuple[int, ...] | None = None) -> int:
  """Return the bytes of the first layer's output for a sample, or 0 if the network has no attribute `channels`.

  Args:
    experiment: the experiment with the model.
    shape: the shape of a sample of the data; None for the shape that the model generates.
  """
  model = experiment.model
  module, space = model.network.module, (model.shape if shape is None else model.codec.shape(shape))[:-1]
  size = jnp.dtype(getattr(module, "dtype", None) or jnp.float32).itemsize
  # A transformer has one row of features for each patch. A user's network may have another attribute of this name.
  patch = getattr(module, "patch", 1)
  positions = math.prod(space) // (patch if isinstance(patch, int) and patch > 0 else 1) ** len(space)
  return positions * int(getattr(module, "channels", 0) or 0) * size
