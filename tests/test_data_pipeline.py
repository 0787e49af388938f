"""Test the order of batches, exact resuming, and reading with several threads or processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ddpm_jax import data
from tests import forked
from tests.conftest import ROOT
from tests.pictures import truncate, write_folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def numbered(count=30):
  """Return a source whose image i has the two pixels [i, 0], so that a flip is visible."""
  images = np.zeros((count, 1, 2, 1), np.uint8)
  images[:, 0, 0, 0] = np.arange(count)
  return data.ArraySource(images, np.arange(count))


def test_each_epoch_has_a_new_order():
  batches = data.batches(numbered(), 10, seed=0)
  epochs = [np.concatenate([next(batches)["classes"] for _ in range(3)]) for _ in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(30))
  assert list(epochs[0]) != list(epochs[1]) != list(epochs[2])


def test_batches_are_scaled_and_match_their_classes():
  batch = next(data.batches(numbered(), 10, seed=0))
  assert batch["image"].dtype == np.float32
  np.testing.assert_allclose(batch["image"][:, 0, 0, 0], batch["classes"] / 127.5 - 1, atol=1e-6)


def test_half_of_the_images_are_flipped():
  batches = data.batches(numbered(200), 100, seed=0, flip=True)
  images = np.concatenate([next(batches)["image"] for _ in range(10)])
  flipped = images[:, 0, 0, 0] < images[:, 0, 1, 0]
  assert 0.4 < flipped.mean() < 0.6


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_sets_the_order(seed):
  first, second = (next(data.batches(numbered(), 10, seed=s)) for s in (0, seed))
  assert np.array_equal(first["classes"], second["classes"]) == (seed == 0)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_batches_resume_exactly_from_a_state_in_json(steps):
  batches = data.batches(numbered(), 7, seed=3, flip=True)
  for _ in range(steps):
    next(batches)
  state = json.loads(json.dumps(batches.state))
  expected = [next(batches) for _ in range(12)]
  resumed = data.batches(numbered(), 7, seed=3, flip=True)
  next(resumed)
  resumed.restore(state)
  for batch in expected:
    got = next(resumed)
    np.testing.assert_array_equal(got["image"], batch["image"])
    np.testing.assert_array_equal(got["classes"], batch["classes"])


def test_resuming_with_other_data_is_an_error():
  state = data.batches(numbered(30), 7, seed=3).state
  with pytest.raises(ValueError, match="29 images to resume a run on 30"):
    data.batches(numbered(29), 7, seed=3).restore(state)


def test_resuming_with_another_batch_size_or_seed_is_an_error():
  state = data.batches(numbered(), 7, seed=3).state
  assert state == {"batch": 0, "num_images": 30, "batch_size": 7, "seed": 3}
  with pytest.raises(ValueError, match="batch size of 8 to resume a run with 7"):
    data.batches(numbered(), 8, seed=3).restore(state)
  with pytest.raises(ValueError, match="seed of 4 to resume a run with 3"):
    data.batches(numbered(), 7, seed=4).restore(state)
  with pytest.raises(ValueError, match="another release"):
    data.batches(numbered(), 7, seed=3).restore({"iterator": {}, "num_images": 30})


@pytest.mark.parametrize("parts", [[[0, 1, 2], [3, 4, 5, 6]], [[0, 2, 4, 6], [1, 3], [5]]])
def test_the_rows_of_all_processes_form_the_batch(parts):
  reference = data.batches(numbered(), 7, seed=3, flip=True)
  readers = [data.batches(numbered(), 7, seed=3, flip=True, rows=np.array(rows)) for rows in parts]
  for _ in range(9):
    expected = next(reference)
    for rows, reader in zip(parts, readers, strict=True):
      got = next(reader)
      np.testing.assert_array_equal(got["image"], expected["image"][rows])
      np.testing.assert_array_equal(got["classes"], expected["classes"][rows])
  assert reference.state == readers[0].state == {"batch": 9, "num_images": 30, "batch_size": 7, "seed": 3}


@pytest.mark.parametrize("rows", [[], [2, 1], [0, 7], [-1, 0], [1, 1]])
def test_wrong_rows_are_errors(rows):
  with pytest.raises(ValueError, match="rows .* of a batch of 7"):
    data.batches(numbered(), 7, seed=0, rows=np.array(rows, int))


@pytest.mark.parametrize("counts", [{"num_threads": 0}, {"num_workers": -1}])
def test_wrong_numbers_of_threads_and_workers_are_errors(counts):
  with pytest.raises(ValueError, match="at least 1, 1 and 0"):
    data.batches(numbered(), 7, seed=0, **counts)


def test_waiting_is_measured():
  batches = data.batches(numbered(), 5, seed=0, put=lambda batch: jax.block_until_ready(jax.device_put(batch)))
  assert batches.wait_seconds == 0
  next(batches)
  first = batches.wait_seconds
  assert first > 0
  next(batches)
  assert batches.wait_seconds > first


def devices_of_this_process():
  from jax._src import xla_bridge

  return list(xla_bridge._backends)


class Spy(data.ArraySource):
  """Provide images whose class is the number of JAX backends in the process that reads the images."""

  def __getitems__(self, indices):
    batch = super().__getitems__(indices)
    return {**batch, "classes": np.full(len(indices), len(devices_of_this_process()), np.int32)}


def test_workers_return_the_same_batches_and_start_no_device(tmp_path, capfd):
  write_folder(tmp_path, count=6)
  truncate(tmp_path / "dog" / "3.png")
  kwargs = {"seed": 3, "flip": True}
  source = data.SkipBroken(data.FolderSource(tmp_path, (8, 8)))
  threads = data.batches(source, 5, num_threads=3, **kwargs)
  for _ in range(4):
    next(threads)
  state = json.loads(json.dumps(threads.state))
  expected = [next(threads) for _ in range(6)]
  assert threads.num_broken == 1
  capfd.readouterr()
  again = data.SkipBroken(data.FolderSource(tmp_path, (8, 8)))
  workers = data.batches(again, 5, num_workers=2, **kwargs)
  workers.restore(state)
  for batch in expected:
    got = next(workers)
    np.testing.assert_array_equal(got["image"], batch["image"])
    np.testing.assert_array_equal(got["classes"], batch["classes"])
  assert workers.num_broken == 1
  assert capfd.readouterr().out.count("dog/3.png") == 1, "reported once, by the main process"
  assert workers.state["batch"] == 10
  workers.close()
  jax.devices()
  assert devices_of_this_process()
  spied = data.batches(Spy(numbered().images), 5, seed=0, num_workers=1)
  np.testing.assert_array_equal(next(spied)["classes"], 0)
  spied.close()


def test_a_broken_file_is_an_error_with_its_name(tmp_path):
  write_folder(tmp_path)
  truncate(tmp_path / "dog" / "0.png")
  batches = data.batches(data.FolderSource(tmp_path, (8, 8)), 6, seed=0)
  with pytest.raises(ValueError, match=r"dog.0\.png.*broken=skip"):
    next(batches)


def test_the_next_batch_is_transferred_ahead():
  sent, second = [], threading.Event()

  def put(batch):
    sent.append(batch)
    if len(sent) == 2:
      second.set()
    return batch

  batches = data.batches(numbered(), 5, seed=0, put=put)
  next(batches)
  assert second.wait(forked.PATIENCE)
  batches.close()
  assert len(sent) == 2


@pytest.mark.parametrize("ending", ["", "raise ValueError", "os.kill(os.getpid(), 9)"])
def test_workers_exit_when_the_program_exits(tmp_path, ending):
  (tmp_path / "script.py").write_text(f"""
import os
import numpy as np

if __name__ == "__main__":
  import multiprocessing
  from ddpm_jax import data

  batches = data.batches(data.ArraySource(np.zeros((9, 2, 2, 1), np.uint8)), 3, seed=0, num_workers=1)
  next(batches)
  print(multiprocessing.active_children()[0].pid, flush=True)
  {ending}
""")
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  result = subprocess.run(
    [sys.executable, tmp_path / "script.py"],
    env=os.environ | {"PYTHONPATH": path},
    capture_output=True,
    text=True,
    timeout=forked.PATIENCE,
  )
  assert (result.returncode == 0) == (not ending), result.stderr
  worker, deadline = Path("/proc") / result.stdout.strip(), time.monotonic() + forked.PATIENCE
  while worker.exists():
    assert time.monotonic() < deadline, "the worker did not exit"
    time.sleep(0.1)


def test_canceling_ends_the_iteration():
  blocked = threading.Event()
  batches = data.batches(numbered(), 5, seed=0, put=lambda batch: blocked.wait(forked.PATIENCE))
  threading.Timer(0.1, batches.cancel).start()
  assert list(batches) == []
  batches.close()
  blocked.set()


@pytest.mark.parametrize("stuck", [False, True])
def test_a_dead_worker_is_an_error(stuck, monkeypatch):
  """The error is raised even if the main process is stuck at a lock or at an incomplete message."""
  batches = data.batches(numbered(), 5, seed=0, num_workers=1)
  next(batches)
  (worker,) = batches._workers
  if stuck:
    batches._ahead.result()
    monkeypatch.setattr(batches, "_fetch", threading.Event().wait)
  os.kill(worker, signal.SIGKILL)
  with pytest.raises(data.WorkerDied, match=r"has died.*num_workers"):
    list(batches)
  batches.close()
