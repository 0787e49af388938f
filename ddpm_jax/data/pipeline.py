"""Turn any source into training batches with grain.

The pipeline shuffles the images again in each epoch, repeats, batches and flips them, and scales them to [-1, 1].
"""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from typing import Any

import grain
import numpy as np
from absl import flags

from ddpm_jax.data.broken import BrokenImage, SkipBroken
from ddpm_jax.data.hosts import Host, run_hosts
from ddpm_jax.data.sources import LATENT, Batch, Source, group_members, read
from ddpm_jax.storage.images import as_floats

# While the main process waits for a batch, it checks at this interval in seconds whether the workers are alive.
_CHECK_SECONDS = 0.5


class WorkerDied(RuntimeError):
  """Report that a worker process has died.

  The worker may have died while it owned locks, so the main program should exit without cleaning up.
  """


class Batches:
  """Iterate over batches without end, and transfer the next batch to the device ahead of time.

  `state` returns the position of the iteration, and `restore` continues from it.

  Attributes:
    wait_seconds: total seconds spent in `next`. This is the time that training has waited for input.
  """

  def __init__(
    self,
    start: Callable[[int], Iterator[Any]],
    source: Source,
    position: dict[str, int],
    put: Callable[[Batch], Any],
  ):
    self._start, self._source, self._position, self._put = start, source, position, put
    self._iterator: Any = None
    self._ahead: Future | None = None
    self._workers: set[int] = set()
    self._is_canceled = False
    self.wait_seconds = 0.0
    # At exit, stop the workers before multiprocessing does, because multiprocessing can take a minute for this.
    atexit.register(_close, weakref.ref(self))

  def __iter__(self) -> "Batches":
    return self

  def __next__(self) -> Any:
    start = time.perf_counter()
    if self._ahead is None:
      self._ahead = self._submit()
    batch = self._await(self._ahead)
    self._ahead = self._submit()
    self._position = {**self._position, "batch": self._position["batch"] + 1}
    self.wait_seconds += time.perf_counter() - start
    return batch

  def _submit(self) -> Future:
    """Start fetching the next batch in a separate thread.

    Neither reading nor transferring the batch then delays the next training step.
    """
    future: Future = Future()

    def run() -> None:
      try:
        future.set_result(self._fetch())
      except BaseException as error:
        future.set_exception(error)

    # A daemon thread that hangs cannot keep the program from exiting, unlike the thread of an executor.
    threading.Thread(target=run, name="batches", daemon=True).start()
    return future

  def _await(self, future: Future) -> Any:
    while True:
      if wait([future], _CHECK_SECONDS).done:
        return future.result()
      if self._is_canceled:
        raise StopIteration
      self._check_workers()

  def _check_workers(self) -> None:
    alive = {child.pid for child in multiprocessing.active_children()}
    if dead := self._workers - alive:
      raise self._died(f"process {min(dead)}")

  def _died(self, worker: str) -> WorkerDied:
    # The dead process may own a lock that `close` would wait for. The other workers exit when this process exits.
    self._is_canceled = True
    return WorkerDied(
      f"A worker process that decodes images ({worker}) has died. It crashed or was killed, for example because memory"
      " ran out. Lower --config.data.num_workers, or set it to 0 to decode in threads."
    )

  def _fetch(self) -> Any:
    if self._iterator is None:
      self._iterator = self._start(self._position["batch"])
    try:
      batch = next(self._iterator)
    except RuntimeError as error:
      if "Worker process was terminated" in str(error):
        raise self._died(str(error).partition(". ")[0]) from error
      raise
    batch, errors, process = batch
    if process != os.getpid():
      self._workers.add(process)
    if errors and isinstance(self._source, SkipBroken):
      # Report in the main process, because a worker process may have read the image.
      self._source.report([BrokenImage(*error) for error in errors])
    return self._put(batch)

  @property
  def num_broken(self) -> int:
    """Return the number of broken images that were replaced so far.

    Images that `cache_in_memory` replaced do not count.
    """
    return len(self._source.broken) if isinstance(self._source, SkipBroken) else 0

  @property
  def state(self) -> dict[str, int]:
    """Return the position in the data as a dict that can be stored as JSON.

    The position does not depend on the number of threads, workers or processes.
    """
    return dict(self._position)

  def restore(self, state: dict[str, int]) -> None:
    """Continue from a position that `state` returned.

    Raises:
      ValueError: if the number of images, their groups, the batch size or the seed has changed, or if the keys of
        `state` differ from the keys of the current position.
    """
    if state.keys() != self._position.keys():
      raise ValueError(
        f"Got a data position with the keys {', '.join(sorted(state))}; expected"
        f" {', '.join(sorted(self._position))}. The position comes from another release. Resume with that release, or"
        " start a new run in another --workdir."
      )
    if state["num_images"] != self._position["num_images"]:
      raise ValueError(
        f"Got data of {self._position['num_images']} images to resume a run on {state['num_images']} images; expected"
        " the same data. Restore the data, or start a new run in another --workdir."
      )
    if state.get("groups") != self._position.get("groups"):
      raise ValueError(
        "Got images whose sizes are not the same as at the start of the run, so some images are in other buckets;"
        " expected the same data. Restore the data, or start a new run in another --workdir."
      )
    for key, name in (("batch_size", "batch size"), ("seed", "seed")):
      if state[key] != self._position[key]:
        raise ValueError(
          f"Got a {name} of {self._position[key]} to resume a run with {state[key]}; expected the same {name}, to keep"
          " the order of images. Set it back, or start a new run in another --workdir."
        )
    self.close()
    self._position = dict(state)

  def cancel(self) -> None:
    """Stop waiting for a batch and end the iteration, for example when the program receives a signal."""
    self._is_canceled = True

  def close(self) -> None:
    """Stop the threads and worker processes.

    Requesting another batch starts them again at the same position.
    """
    if not self._is_canceled:
      if self._ahead is not None:
        wait([self._ahead])
      if self._iterator is not None:
        self._iterator.close()
    self._iterator = self._ahead = None
    self._workers.clear()


def batches(
  source: Source,
  batch_size: int,
  *,
  seed: int,
  flip: bool = False,
  put: Callable[[Batch], Any] = lambda batch: batch,
  num_threads: int = 4,
  num_workers: int = 0,
  rows: np.ndarray | None = None,
  hosts: Mapping[str, Host] | None = None,
) -> Batches:
  """Return endless training batches from a source.

  The same source, batch size, seed and `flip` give the same batches.

  If the source has `groups`, all samples of a batch are of one group. The groups take turns in proportion to their
  sizes, so that all samples are read equally often.

  Args:
    source: the images. If the source has the method `__getitems__`, one call of this method reads a batch.
    batch_size: images per batch, summed over all processes.
    seed: seed of the order and the flips.
    flip: whether to mirror each image left to right with probability 1/2. If the shape of another array of the item
      starts with the height and width of the image, that array is mirrored with the image. Examples are a sketch
      [H, W, 1] and a mask [H, W].
    put: transfers a batch to the devices, such as `lambda b: jax.device_put(b, sharding)`.
    num_threads: threads that prepare batches ahead if there are no workers.
    num_workers: processes that prepare batches ahead instead of threads, for images that are slow to decode; 0 for
      none. Python's "spawn" method starts the processes. Each process imports the main file of the program again, so a
      script needs `if __name__ == "__main__":`.
    rows: the rows of each batch that this process reads, as increasing indices [b]; all rows by default. This choice
      does not affect the image and the flip of a row.
    hosts: functions by the names of arrays in the batch, such as {"text": tokenize}. The threads or workers replace
      these arrays by the arrays that the functions return, and leave other texts out (see `hosts.run_hosts`). With
      None, batches keep their texts, although devices cannot hold texts.

  Returns:
    `Batches` that yields what `put` returns. The argument of `put` is a dict from name to array: `image` is float32
    [b, H, W, C] in [-1, 1]. The other arrays [b, ...] have the types that `read` returns: `classes`, for example, is
    int32 [b]. A latent data set has `latent` [b, ...] in place of `image`.

  Raises:
    ValueError: if `batch_size`, `num_threads`, `num_workers` or `rows` is out of range. When a batch is read: if an
      item or a host function is wrong.
  """
  if batch_size < 1 or num_threads < 1 or num_workers < 0:
    raise ValueError(
      f"Got batch_size={batch_size}, num_threads={num_threads}, num_workers={num_workers}; expected at least 1, 1 and"
      " 0."
    )
  own_rows = np.arange(batch_size) if rows is None else np.asarray(rows)
  is_increasing = own_rows.ndim == 1 and len(own_rows) > 0 and not np.any(np.diff(own_rows) < 1)
  if not is_increasing or own_rows[0] < 0 or own_rows[-1] >= batch_size:
    raise ValueError(
      f"Got rows {own_rows} of a batch of {batch_size}; expected increasing indices from 0 to {batch_size - 1}."
    )

  def load(indices: np.ndarray, rng: np.random.Generator) -> tuple[Batch, list[tuple[str, str]], int]:
    errors: list[BrokenImage] = []
    if isinstance(source, SkipBroken):
      batch, errors = source.read(indices[own_rows])
    else:
      batch = read(source, indices[own_rows])
    # Sample flips for the entire batch, so that the flip of a row does not depend on the process that reads it.
    flips = (rng.random(batch_size) < 0.5)[own_rows] if flip else None
    batch = finish_batch(batch, flips)
    return batch if hosts is None else run_hosts(hosts, batch), [error.args for error in errors], os.getpid()

  # Batch indices rather than images, so that a source in memory is read with one gather.
  dataset = _index_batches(source, batch_size, seed).random_map(load)

  def start(batch: int) -> Iterator[Any]:
    # The content of a batch depends only on its index, so iteration may start at any batch.
    remaining = dataset.slice(slice(batch, None))
    if not num_workers:
      return iter(remaining.to_iter_dataset(grain.ReadOptions(num_threads, 2 * num_threads)))
    if not flags.FLAGS.is_parsed():
      # grain's workers read absl flags, but a notebook or script never parses them.
      flags.FLAGS.mark_as_parsed()
    workers = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2)
    single = remaining.to_iter_dataset(grain.ReadOptions(1, 2))
    return iter(single.mp_prefetch(workers, worker_init_fn=_prepare_worker))

  position = {"batch": 0, "num_images": len(source), "batch_size": batch_size, "seed": seed}
  groups = getattr(source, "groups", None)
  if groups is not None:
    # The order of batches depends on the group of each image.
    position["groups"] = zlib.crc32(np.asarray(groups, np.int64).tobytes())
  return Batches(start, source, position, put)


def _index_batches(source: Source, batch_size: int, seed: int) -> grain.MapDataset:
  """Return endless batches of the shuffled indices of a source, each batch from one group."""

  def shuffled(count: int) -> grain.MapDataset:
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat().batch(batch_size)

  members = group_members(source)
  if len(members) == 1:
    return shuffled(len(source))
  parts = [shuffled(len(indices)).map(indices.__getitem__) for indices in members]
  return grain.MapDataset.mix(parts, [float(len(indices)) for indices in members]).seed(seed)


def finish_batch(batch: Batch, flips: np.ndarray | None = None) -> Batch:
  """Turn items of a source into a training batch.

  Images become floats in [-1, 1], and are mirrored where `flips` is true. In a latent data set, the encoding of the
  mirrored image is used where `flips` is true, and the encoding of the original image elsewhere.

  Args:
    batch: arrays [b, ...] that `read` returned.
    flips: booleans [b]; None for no flips.

  Raises:
    ValueError: if an encoded image is not finite.
  """
  if LATENT not in batch:
    batch = batch if flips is None else _mirror(batch, flips)
    return batch | {"image": as_floats(batch["image"])}
  encoded = batch[LATENT]
  chosen = encoded[np.arange(len(encoded)), 0 if flips is None else flips.astype(int)]
  if not np.isfinite(chosen).all():
    raise ValueError(
      "Got latents with NaN or infinite values from config.data.latents; expected finite values. The folder is damaged:"
      " copy it again, or encode the data again with --mode=prepare."
    )
  return batch | {LATENT: chosen}


def _mirror(batch: Batch, flips: np.ndarray) -> Batch:
  """Mirror images left to right where `flips` [b] is true.

  Other arrays are mirrored too if their shape starts with the height and width of the image.
  """
  image_size = batch["image"].shape[1:3]

  def mirror(array: np.ndarray) -> np.ndarray:
    if array.shape[1:3] != image_size:
      return array
    return np.where(flips.reshape(-1, *(1,) * (array.ndim - 1)), array[:, :, ::-1], array)

  return {name: mirror(array) for name, array in batch.items()}


def _prepare_worker(worker: int, count: int) -> None:
  """Set up a worker process: keep it off the accelerator, and make it exit when the main process exits or is killed."""
  del worker, count
  # Ctrl-C signals all processes of a terminal. Only the main process handles it.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  if "jax" in sys.modules:  # grain imports JAX, but must not start a device.
    sys.modules["jax"].config.update("jax_platforms", "cpu")
  parent = multiprocessing.parent_process()

  def exit_with_parent() -> None:
    if parent is not None:
      parent.join()
      os._exit(1)

  threading.Thread(target=exit_with_parent, daemon=True).start()


def _close(reference: weakref.ref[Batches]) -> None:
  batches = reference()
  if batches is not None:
    batches.close()
