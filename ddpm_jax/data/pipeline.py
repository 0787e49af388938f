"""One grain pipeline for every source: shuffled anew each epoch, repeated, batched, flipped, scaled to [-1, 1]."""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

import grain
import numpy as np
from absl import flags

from ddpm_jax.data.sources import Batch, BrokenImage, SkipBroken, Source, read
from ddpm_jax.storage.images import as_floats

# Seconds between two looks at whether a batch that is awaited can still come.
_LOOK = 0.5


class WorkerDied(RuntimeError):
  """A process that decodes images has ended. What it held is lost, locks included, so the program should end without clean-up."""


class Batches:
  """Endless batches, the next one on its way to the device while the current one is used; resumable by `state`.

  Attributes:
    wait_seconds: seconds that `next` has taken so far, all of it together: what training has waited for its input.
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
    self._given_up = False
    self.wait_seconds = 0.0
    # Before multiprocessing ends its children in an order of its own, which can take a minute.
    atexit.register(_close, weakref.ref(self))

  def __iter__(self) -> "Batches":
    return self

  def __next__(self) -> Any:
    since = time.perf_counter()
    if self._ahead is None:
      self._ahead = self._submit()
    batch = self._await(self._ahead)
    self._ahead = self._submit()
    self._position = {**self._position, "batch": self._position["batch"] + 1}
    self.wait_seconds += time.perf_counter() - since
    return batch

  def _submit(self) -> Future:
    """Fetch the next batch in a thread of its own: neither waiting for it nor sending it delays the next step."""
    future: Future = Future()

    def run() -> None:
      try:
        future.set_result(self._fetch())
      except BaseException as error:
        future.set_exception(error)

    # Unlike an executor's, a daemon that hangs does not keep the program from ending.
    threading.Thread(target=run, name="batches", daemon=True).start()
    return future

  def _await(self, future: Future) -> Any:
    while True:
      if wait([future], _LOOK).done:
        return future.result()
      if self._given_up:
        raise StopIteration
      self._check_workers()

  def _check_workers(self) -> None:
    alive = {child.pid for child in multiprocessing.active_children()}
    if dead := self._workers - alive:
      raise self._died(f"process {min(dead)}")

  def _died(self, which: str) -> WorkerDied:
    # The others end by themselves when this process does. A dead one may hold a lock that closing would wait for.
    self._given_up = True
    return WorkerDied(
      f"A worker that decodes images ({which}) has ended; it was killed, as when memory runs out, or it crashed. Lower"
      " --config.data.num_workers, or set it to 0 to decode in threads."
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
      # Here and not where the image was read, which may be another process.
      self._source.report([BrokenImage(*error) for error in errors])
    return self._put(batch)

  @property
  def num_broken(self) -> int:
    """How many images have been found broken so far, and replaced."""
    return len(self._source.broken) if isinstance(self._source, SkipBroken) else 0

  @property
  def state(self) -> dict[str, int]:
    """How many batches were handed out, and of what, for JSON. It holds for any number of threads, workers and processes."""
    return dict(self._position)

  def restore(self, state: dict[str, int]) -> None:
    """Goes to a position that `state` gave.

    Raises:
      ValueError: if the data now has another number of images, or the batch size or the seed is another.
    """
    if state.keys() != self._position.keys():
      raise ValueError(
        f"Got a data position with {', '.join(sorted(state))}; expected {', '.join(sorted(self._position))}. It comes from another"
        " release: go on with that one, or start a new run in another --workdir."
      )
    if state["num_images"] != self._position["num_images"]:
      raise ValueError(
        f"Got data of {self._position['num_images']} images to resume a run on {state['num_images']}; expected the same data."
        " Restore it, or start a new run in another --workdir."
      )
    for key, name in (("batch_size", "batch size"), ("seed", "seed")):
      if state[key] != self._position[key]:
        raise ValueError(
          f"Got a {name} of {self._position[key]} to resume data at {state[key]}; expected the same, for the same order."
          " Set it back, or start a new run in another --workdir."
        )
    self.close()
    self._position = dict(state)

  def cancel(self) -> None:
    """Let iteration end instead of waiting for a batch any longer, as when the program is told to stop."""
    self._given_up = True

  def close(self) -> None:
    """Stop threads and worker processes; the next batch starts them again at the same position."""
    if not self._given_up:
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
) -> Batches:
  """Endless training batches of a source, the same for the same seed.

  Args:
    source: where the images come from; one with `__getitems__` is read a batch at a time.
    batch_size: images a batch, over all processes.
    seed: of order and flips.
    flip: whether each image is mirrored left to right with probability 1/2, and with it all arrays of its item that lie on its pixels: those
      whose shape begins with its height and width, such as a sketch [H, W, 1] or a mask [H, W].
    put: sends a batch to the devices, such as `lambda b: jax.device_put(b, sharding)`.
    num_threads: threads that prepare batches ahead, if there are no workers.
    num_workers: processes that prepare batches ahead instead, for images that are dear to decode; 0 for none. They import the
      program's main file anew, as Python's multiprocessing does, so a script needs `if __name__ == "__main__":`.
    rows: which rows of each batch this process reads [b], increasing; all by default. Which images and flips a row gets
      does not depend on it.

  Returns:
    Batches as `put` returns them: of the arrays of the items by name, `image` float32 [b, H, W, C] in [-1, 1], the others [b, ...] as `read`
    gives them, such as `classes` int32 [b].

  Raises:
    ValueError: if the counts or the rows are out of range.
  """
  if batch_size < 1 or num_threads < 1 or num_workers < 0:
    raise ValueError(
      f"Got batch_size={batch_size}, num_threads={num_threads}, num_workers={num_workers}; expected at least 1, 1 and 0."
    )
  taken = np.arange(batch_size) if rows is None else np.asarray(rows)
  if taken.ndim != 1 or not len(taken) or taken[0] < 0 or taken[-1] >= batch_size or np.any(np.diff(taken) < 1):
    raise ValueError(
      f"Got rows {taken} of a batch of {batch_size}; expected some of 0 to {batch_size - 1}, increasing."
    )

  def load(indices: np.ndarray, rng: np.random.Generator) -> tuple[Batch, list[tuple[str, str]], int]:
    errors: list[BrokenImage] = []
    if isinstance(source, SkipBroken):
      batch, errors = source.read(indices[taken])
    else:
      batch = read(source, indices[taken])
    if flip:
      # Drawn for the whole batch, so that a row's flip is the same whoever reads it.
      batch = _mirrored(batch, (rng.random(batch_size) < 0.5)[taken])
    return batch | {"image": as_floats(batch["image"])}, [error.args for error in errors], os.getpid()

  dataset = (
    grain.MapDataset.range(len(source))
    .seed(seed)
    .shuffle()
    .repeat()
    # Indices are batched, not images, so that a source in memory is read by one gather.
    .batch(batch_size)
    .random_map(load)
  )

  def start(batch: int) -> Iterator[Any]:
    # What a batch holds follows from its number alone, so any iterator may start at it.
    ahead = dataset.slice(slice(batch, None))
    if not num_workers:
      return iter(ahead.to_iter_dataset(grain.ReadOptions(num_threads, 2 * num_threads)))
    if not flags.FLAGS.is_parsed():
      # grain's workers read absl's flags, which a notebook or a script never parses.
      flags.FLAGS.mark_as_parsed()
    workers = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2)
    parts = ahead.to_iter_dataset(grain.ReadOptions(1, 2))
    return iter(parts.mp_prefetch(workers, worker_init_fn=_prepare_worker))

  position = {"batch": 0, "num_images": len(source), "batch_size": batch_size, "seed": seed}
  return Batches(start, source, position, put)


def _mirrored(batch: Batch, chosen: np.ndarray) -> Batch:
  """Return a batch in which the chosen images [b] are mirrored left to right, with all that lies on their pixels."""
  image_size = batch["image"].shape[1:3]

  def mirror(array: np.ndarray) -> np.ndarray:
    if array.shape[1:3] != image_size:
      return array
    return np.where(chosen.reshape(-1, *(1,) * (array.ndim - 1)), array[:, :, ::-1], array)

  return {name: mirror(array) for name, array in batch.items()}


def _prepare_worker(worker: int, count: int) -> None:
  """Keep a worker off the accelerator, which the main process holds, and end it when that is gone, killed or not."""
  del worker, count
  # Ctrl-C reaches all processes of a terminal; the main one answers for all.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  if "jax" in sys.modules:  # grain imports it; nothing here starts it
    sys.modules["jax"].config.update("jax_platforms", "cpu")
  parent = multiprocessing.parent_process()

  def follow() -> None:
    if parent is not None:
      parent.join()
      os._exit(1)

  threading.Thread(target=follow, daemon=True).start()


def _close(batches: weakref.ref[Batches]) -> None:
  found = batches()
  if found is not None:
    found.close()
