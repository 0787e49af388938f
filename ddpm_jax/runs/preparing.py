"""Prepare data before training: download, convert, pack or encode them."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import data
from ddpm_jax.config import Experiment
from ddpm_jax.devices import parallel
from ddpm_jax.devices.progress import print_line
from ddpm_jax.models import conditions
from ddpm_jax.models.inputs import host_items
from ddpm_jax.models.texts import stored_items
from ddpm_jax.runs import frozen as frozen_module
from ddpm_jax.runs import latents, limits, pretrained, reading
from ddpm_jax.storage import files
from ddpm_jax.storage.images import as_floats

PyTree = Any

# Images per device in a batch of the encoder.
_BATCH = 16


def run_prepare(experiment: Experiment, output: Path | None) -> None:
  """Prepare the data of an experiment (see `data.prepare`).

  If the model has an autoencoder as its codec, the training images and their texts are encoded. For other models, the
  images are packed with their texts.

  Args:
    experiment: the experiment with the data.
    output: a new folder for the packed or encoded data. None is allowed only for a TFDS data set that is not encoded:
      it is then downloaded and converted, but not packed.

  Raises:
    ValueError: if the data need no preparation or cannot be prepared, or if the output folder exists already.
  """
  pretrained.check_shape(experiment)
  limits.check_images(experiment.data.shape, 1, "config.data.image_size and channels")
  if experiment.data.buckets:
    raise ValueError(
      f"Got config.data.buckets={experiment.data.buckets} with --mode=prepare, which stores images of one size; expected no buckets. Train"
      " on the folder of images without preparing it, or set --config.data.buckets=()."
    )
  tree = experiment.tree
  source, keys = tree.components["data.source"].value, tree.arguments("data.source")
  fit, check = reading.fit_of(experiment), reading.check_of(experiment)
  if not experiment.model.codec.is_latent:
    data.prepare(source, keys, fit, output, fields=experiment.data.fields, broken=experiment.data.broken, check=check)
    return
  if output is None:
    raise ValueError("Got no --output; expected a new folder for the encoded images, such as --output=/data/latents.")
  files.check_new_folder(output)
  if source is data.tfds:
    data.prepare(source, keys, fit, None)
  _encode(experiment, output)


def _encode(experiment: Experiment, output: Path) -> None:
  """Encode the training images of an experiment into a new folder, for `config.data.latents`.

  The folder contains the encoding of each image: the moments of a posterior, or codes. If training flips images, the
  folder also contains the encoding of each mirror image. For texts, it contains the states that the frozen encoders
  return. All other items of the data, such as classes, are copied.

  Args:
    experiment: the experiment with the data and the codec.
    output: the new folder.

  Raises:
    ValueError: if the data or the codec cannot be read, if an encoded image is not finite, if the output folder exists,
      or if there are several processes.
  """
  files.check_new_folder(output)
  source = reading.read_data(experiment).train
  latents.check_conditions(experiment)
  if jax.process_count() > 1:
    raise ValueError(
      "Got several processes with --mode=prepare; expected one. Run it on one host with all its devices."
    )
  mesh = parallel.make_mesh()
  frozen = frozen_module.load_for_model(experiment, None, mesh)
  settings = latents.settings_of(experiment, frozen)
  print_line(f"encoding {len(source):,} images of {'x'.join(map(str, experiment.data.shape))} ...")
  statistics = _Statistics()
  with files.atomic_folder(output) as temporary:
    items = _encoded(experiment, mesh, source, frozen, statistics)
    names = getattr(source, "class_names", None)
    count, _ = data.pack_items(items, len(source), temporary, settings, class_names=names)
  print_line(f"encoded      {output} ({count:,} images{', each with its mirror image' if settings['flip'] else ''})")
  print_line(statistics.describe())
  print_line(f"to use them  --config.data.latents={output}")


def _encoded(
  experiment: Experiment, mesh: jax.sharding.Mesh, source: data.Source, frozen: PyTree, statistics: "_Statistics"
) -> Iterator[dict[str, np.ndarray]]:
  """Yield the items of each image of a source, with `latent` in place of `image`.

  The items also contain the states that frozen text encoders return.
  """
  codec, flip, size = experiment.model.codec, experiment.data.flip, _BATCH * mesh.size
  assert codec.compress is not None
  assert codec.expand is not None
  compress, expand = codec.compress, codec.expand
  sharded, replicated = parallel.batch_sharding(mesh), parallel.replicated(mesh)

  def encode(frozen: PyTree, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    images = jax.lax.with_sharding_constraint(images, sharded)
    views = [images, images[:, :, ::-1]] if flip else [images]
    compact = [compress(frozen.get("codec"), view) for view in views]
    return jnp.stack(compact, 1), expand(frozen.get("codec"), jax.random.key(0), compact[0])

  texts = latents.storable_texts(experiment)

  def encode_texts(frozen: PyTree, items: dict[str, jax.Array]) -> dict[str, PyTree]:
    return conditions.encode(texts, frozen.get("conditions", {}), jax.random.key(0), items, train=False)

  options: dict[str, Any] = {"out_shardings": replicated, "compiler_options": parallel.compiler_options(mesh)}
  compiled_texts = jax.jit(encode_texts, **options)
  compiled = jax.jit(encode, **options)
  for first, batch in _read_ahead(source, size, experiment.data.num_threads):
    compact, x = jax.device_get(compiled(frozen, as_floats(batch.pop("image"))))
    count = min(size, len(source) - first)
    if not np.isfinite(compact[:count]).all():
      raise ValueError(
        f"Got moments with NaN or infinite values for images {first:,} to {first + count - 1:,}; expected finite moments."
        " The autoencoder's weights are broken, or its dtype is too narrow: use dtype=float32."
      )
    statistics.add(x[:count])
    states: dict[str, np.ndarray] = {}
    if texts:
      items = host_items(texts, {name: batch[name] for name in texts})
      for name, values in jax.device_get(compiled_texts(frozen, items)).items():
        states |= stored_items(name, values)
    for row in range(count):
      yield {name: value[row] for name, value in (batch | states).items()} | {data.LATENT: compact[row]}


def _read_ahead(source: data.Source, size: int, num_threads: int) -> Iterator[tuple[int, data.Batch]]:
  """Yield the index of a batch's first item together with the batch, while threads read the next batches."""

  def read(first: int) -> tuple[int, data.Batch]:
    # Repeat the last image to fill the last batch, so that a single program is compiled.
    return first, data.read(source, np.minimum(np.arange(first, first + size), len(source) - 1))

  with ThreadPoolExecutor(num_threads) as pool:
    pending: deque[Future] = deque()
    for first in range(0, len(source), size):
      pending.append(pool.submit(read, first))
      if len(pending) > num_threads:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()


class _Statistics:
  """Compute the mean and the standard deviation of each channel of the encoded images x over many batches."""

  def __init__(self) -> None:
    self._count, self._sums = 0, np.zeros((2, 1))

  def add(self, x: np.ndarray) -> None:
    """Add a batch of encoded images x [B, ..., C]."""
    rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
    self._count += len(rows)
    self._sums = self._sums + np.stack([rows.sum(0), (rows**2).sum(0)])

  def describe(self) -> str:
    """Return the mean and the standard deviation of each channel in words."""
    mean, square = self._sums / max(self._count, 1)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    texts = [", ".join(f"{value:.4g}" for value in values) for values in (mean, std)]
    return f"x            mean {texts[0]}; standard deviation {texts[1]} (by channel)"
