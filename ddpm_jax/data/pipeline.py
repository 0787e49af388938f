"""One grain pipeline for every source: shuffled anew each epoch, repeated, batched, flipped, scaled to [-1, 1]."""

from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from ddpm_jax.data.sources import Batch, Source, read
from ddpm_jax.images import from_uint8


class Batches:
  """Endless batches, the next one on its way to the device while the current one is used; resumable by `state`."""

  def __init__(self, iterator: grain.DatasetIterator, num_images: int, put: Callable[[Batch], Any]):
    self._iterator, self._num_images, self._put = iterator, num_images, put
    self._position = iterator.get_state()
    self._ahead: tuple[Any, Any] | None = None

  def __iter__(self) -> "Batches":
    return self

  def __next__(self) -> Any:
    batch, self._position = self._fetch() if self._ahead is None else self._ahead
    self._ahead = self._fetch()
    return batch

  def _fetch(self) -> tuple[Any, Any]:
    batch = self._put(next(self._iterator))
    return batch, self._iterator.get_state()

  @property
  def state(self) -> dict[str, Any]:
    """The position after the last batch that was handed out, for JSON."""
    return {"iterator": self._position, "num_images": self._num_images}

  def restore(self, state: dict[str, Any]) -> None:
    """Goes to a position that `state` gave.

    Raises:
      ValueError: if the data now has another number of images.
    """
    if state["num_images"] != self._num_images:
      raise ValueError(
        f"Got data of {self._num_images} images to resume a run on {state['num_images']}; wanted the same data."
        " Restore it, or start a new run in another --workdir."
      )
    self._iterator.set_state(state["iterator"])
    self._position, self._ahead = state["iterator"], None


def batches(
  source: Source,
  batch_size: int,
  *,
  seed: int,
  flip: bool = False,
  put: Callable[[Batch], Any] = lambda batch: batch,
  num_threads: int = 4,
) -> Batches:
  """Endless training batches of a source, the same for the same seed.

  Args:
    source: where the images come from; one with `__getitems__` is read a batch at a time.
    batch_size: images a batch.
    seed: of order and flips.
    flip: whether each image is mirrored left to right with probability 1/2.
    put: sends a batch to the devices, such as `lambda b: jax.device_put(b, sharding)`.
    num_threads: threads that prepare batches ahead.

  Returns:
    Batches `{"image": float32 [B, H, W, C] in [-1, 1], "label": int32 [B]}` as `put` returns them.
  """

  def augment(batch: Batch, rng: np.random.Generator) -> Batch:
    images = from_uint8(batch["image"])
    if flip:
      mirrored = rng.random(len(images)) < 0.5
      images[mirrored] = images[mirrored, :, ::-1]
    return {"image": images, "label": batch["label"]}

  dataset = (
    grain.MapDataset.range(len(source))
    .seed(seed)
    .shuffle()
    .repeat()
    # Indices are batched, not images, so that a source in memory is read by one gather.
    .batch(batch_size)
    .map(lambda indices: read(source, indices))
    .random_map(augment)
  )
  options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
  return Batches(iter(dataset.to_iter_dataset(options)), len(source), put)
