import json
import os
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import training
from ddpm_jax.devices import parallel
from ddpm_jax.storage import checkpoint
from tests import objectives

FIXTURE = Path(__file__).parent / "fixtures" / "checkpoint_format_2"


def make_items(seed=0):
  key = jax.random.key(seed)
  return {
    "params": {"w": jax.random.normal(key, (8, 3)), "b": jnp.arange(3.0, dtype=jnp.bfloat16)},
    "training": {"key": key, "step": jnp.asarray(5 + seed, jnp.int32), "flag": jnp.array([True, False])},
  }


def template(items, devices=1):
  mesh = parallel.make_mesh(fsdp=devices, devices=jax.devices()[:devices])
  return parallel.abstract(items, parallel.state_shardings(mesh, items))


def values(tree):
  for leaf in jax.tree.leaves(tree):
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    yield np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def assert_equal(a, b):
  assert [leaf.dtype for leaf in jax.tree.leaves(a)] == [leaf.dtype for leaf in jax.tree.leaves(b)]
  for x, y in zip(values(a), values(b), strict=True):
    np.testing.assert_array_equal(x, y)


def save(folder, *steps, **options):
  checkpoints = checkpoint.Checkpoints(folder, **options)
  for step in steps:
    checkpoints.save(step, make_items(step), {"batch": step}, {"loss": abs(step - 2.4)})
  checkpoints.close()


def restore(folder, *, step=None, devices=1, names=("params", "training")):
  checkpoints = checkpoint.Checkpoints(folder)
  templates = template(make_items(), devices)
  try:
    return checkpoints.restore({name: templates[name] for name in names}, step)
  finally:
    checkpoints.close()


@pytest.mark.parametrize("devices", [1, 4])
def test_saved_trees_are_restored_exactly(tmp_path, devices):
  save(tmp_path / "c", 5)
  restored = restore(tmp_path / "c", devices=devices)
  assert (restored.step, restored.data, restored.damaged) == (5, {"batch": 5}, [])
  assert_equal(restored.items, make_items(5))
  assert len(restored.items["params"]["w"].sharding.device_set) == devices


@pytest.mark.parametrize("devices", [1, 4])
def test_resumed_training_is_bit_identical(tmp_path, devices):
  """The objective here has a memory and trains extra parameters. Frozen parameters are not saved."""
  mesh = parallel.make_mesh(fsdp=devices, devices=jax.devices()[:devices])
  shapes, given = jax.eval_shape(objectives.init_state), objectives.frozen()
  shardings = parallel.state_shardings(mesh, shapes)
  state = jax.jit(objectives.init_state, out_shardings=shardings)()
  given = jax.device_put(given, parallel.state_shardings(mesh, given))
  step = parallel.jit_step(objectives.train_step(distribute=parallel.shard_gradient(mesh)), mesh, state, given)
  checkpoints = checkpoint.Checkpoints(tmp_path)
  for number, batch in enumerate(objectives.batches(4), 1):
    state, _ = step(state, parallel.put_batch(mesh, batch, objectives.BATCH), given)
    if number == 2:
      checkpoints.save(2, training.state_to_items(state), {})
      checkpoints.wait()
  restored = checkpoints.restore(training.state_to_items(parallel.abstract(shapes, shardings)))
  checkpoints.close()
  again = training.items_to_state(restored.items)
  assert int(again.step) == 2
  for batch in objectives.batches(4)[2:]:
    again, _ = step(again, parallel.put_batch(mesh, batch, objectives.BATCH), given)
  assert_equal(again, state)


def test_only_the_requested_trees_are_read(tmp_path):
  save(tmp_path, 5)
  shutil.rmtree(tmp_path / "5" / "training")
  restored = restore(tmp_path, names=("params",))
  assert_equal(restored.items, {"params": make_items(5)["params"]})


def test_newest_periodic_and_best_checkpoints_are_kept(tmp_path):
  save(tmp_path, *range(1, 10), keep=2, keep_every=4, keep_best=2)
  assert checkpoint.Checkpoints.steps(tmp_path) == [2, 3, 4, 8, 9]
  reopened = checkpoint.Checkpoints(tmp_path, keep=1, keep_best=1)
  assert reopened.best_step() == 2
  reopened.save(10, make_items(), {}, {"loss": 9.0})
  reopened.close()
  assert checkpoint.Checkpoints.steps(tmp_path) == [2, 10], "scores are read from the saved checkpoints"


def test_a_chosen_step_is_restored(tmp_path):
  save(tmp_path, 1, 2, 3, keep=3)
  assert_equal(restore(tmp_path, step=2).items, make_items(2))
  with pytest.raises(ValueError, match="Got step 7 .*expected one of 1, 2, 3"):
    restore(tmp_path, step=7)


def test_listing_steps_changes_no_file(tmp_path):
  assert checkpoint.Checkpoints.steps(tmp_path / "none") == []
  assert not (tmp_path / "none").exists()
  (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
  assert checkpoint.Checkpoints.steps(tmp_path) == [], "an interrupted save is not a checkpoint"


def test_no_checkpoint_or_a_newer_format_is_an_error(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="holds no checkpoint"):
    restore(tmp_path)
  monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 3)
  save(tmp_path, 5)
  monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
  with pytest.raises(ValueError, match="format 3.*expected format 2.*Use the version"):
    restore(tmp_path)


def test_another_architecture_is_refused_with_names_and_shapes(tmp_path):
  save(tmp_path, 5)
  other = make_items()
  other["params"]["w"] = jnp.zeros((8, 4))
  other["params"]["c"] = other["params"].pop("b")
  checkpoints = checkpoint.Checkpoints(tmp_path)
  with pytest.raises(ValueError, match="another architecture") as error:
    checkpoints.restore(template(other))
  checkpoints.close()
  for line in (
    "params['w']: float32[8, 3] in the checkpoint, float32[8, 4] expected",
    "params['b']: bfloat16[3] in the checkpoint, absent expected",
    "params['c']: absent in the checkpoint, bfloat16[3] expected",
  ):
    assert line in str(error.value)
  other["params"] = make_items()["params"] | {"b": jnp.zeros(3)}
  checkpoints = checkpoint.Checkpoints(tmp_path)
  with pytest.raises(ValueError, match=r"bfloat16\[3\] in the checkpoint, float32\[3\] expected"):
    checkpoints.restore(template(other))
  checkpoints.close()


# Damaged checkpoints.


def files_of(folder):
  return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", ["flipped bit", "no file"])
def test_damaged_checkpoints_are_never_used(damage, tmp_path):
  """One file of checkpoint 2 is damaged at a time. Checkpoint 2 or 1 is restored, and its trees are always correct."""
  save(tmp_path, 1, 2)
  rng = random.Random(0)
  num_skipped = 0
  for path in files_of(tmp_path / "2"):
    content = path.read_bytes()
    broken = bytearray(content)
    broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
    if damage == "no file":
      path.unlink()
    else:
      path.write_bytes(broken)
    restored = restore(tmp_path)
    assert_equal(restored.items, make_items(restored.step))
    assert len(restored.damaged) == 2 - restored.step
    assert all(str(tmp_path / "2") in text for text in restored.damaged)
    num_skipped += restored.step == 1
    path.write_bytes(content)
  assert num_skipped > 5


@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed"])
def test_truncated_and_missing_files_are_detected(tmp_path, damage):
  save(tmp_path, 1, 2)
  for path in files_of(tmp_path / "2" / "params"):
    if damage == "removed":
      path.unlink()
    else:
      path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2] if damage == "truncated" else b"")
  restored = restore(tmp_path)
  assert restored.step == 1
  assert "cannot be read" in restored.damaged[0]
  assert "bound method" not in restored.damaged[0]


def test_digests_detect_a_change_that_orbax_accepts(tmp_path):
  """Orbax itself writes the changed value, so Orbax's own checks pass."""
  save(tmp_path, 1, 2)
  save(tmp_path / "other", 2)
  changed = make_items(2)
  changed["params"]["w"] = changed["params"]["w"].at[3, 1].add(1e-6)
  other = checkpoint.Checkpoints(tmp_path / "changed")
  other.save(2, changed, {}, {})
  other.close()
  shutil.rmtree(tmp_path / "2" / "params")
  shutil.copytree(tmp_path / "changed" / "2" / "params", tmp_path / "2" / "params")
  restored = restore(tmp_path)
  assert restored.step == 1
  assert "1 of 2 leaves were changed after they were saved, such as params['w']" in restored.damaged[0]


def test_the_error_names_all_damaged_checkpoints(tmp_path):
  save(tmp_path, 1, 2)
  for step in (1, 2):
    (tmp_path / str(step) / "meta" / "metadata").write_text("{}")
  with pytest.raises(ValueError, match="Got damaged checkpoints only") as error:
    restore(tmp_path)
  assert str(tmp_path / "1") in str(error.value)
  assert str(tmp_path / "2") in str(error.value)
  with pytest.raises(ValueError, match=r"Got a damaged checkpoint of step 1;.*\n.*description") as error:
    restore(tmp_path, step=1)
  assert str(tmp_path / "2") not in str(error.value)


def test_discard_moves_damaged_and_deletes_unfinished_checkpoints(tmp_path):
  folder = tmp_path / "checkpoints"
  save(folder, 1, 2, 3, keep=3)
  (folder / "4.orbax-checkpoint-tmp-7").mkdir()
  checkpoints = checkpoint.Checkpoints(folder)
  removed = checkpoints.discard(2, tmp_path / "damaged")
  checkpoints.reload()
  assert [path.name for path in removed] == ["3", "4.orbax-checkpoint-tmp-7"]
  assert os.listdir(tmp_path / "damaged") == ["3"]
  checkpoints.save(3, make_items(3), {}, {})
  checkpoints.close()
  assert checkpoint.Checkpoints.steps(folder) == [2, 3]
  assert checkpoints.discard(2, tmp_path / "damaged")
  assert sorted(os.listdir(tmp_path / "damaged")) == ["3", "3_2"], "moved checkpoints do not overwrite each other"


def test_a_full_disk_is_an_error_and_earlier_checkpoints_remain(tmp_path, monkeypatch):
  save(tmp_path, 1)
  checkpoints = checkpoint.Checkpoints(tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(OSError, match=r"step 2 to .*10 are free.*Make room.*up to step 1 remain"):
      checkpoints.save(2, make_items(2), {}, {})
  checkpoints.save(2, make_items(2), {"batch": 2}, {})
  checkpoints.close()
  assert restore(tmp_path).step == 2


def test_checkpoints_of_the_first_release_are_read():
  """The fixture was written once, with the values of `make_items(5)`, and is never regenerated."""
  content = json.loads((FIXTURE / "5" / "meta" / "metadata").read_text())["content"]
  assert content["format_version"] == 2
  restored = restore(FIXTURE)
  assert (restored.step, restored.data, restored.damaged) == (5, {"batch": 5}, [])
  np.testing.assert_array_equal(restored.items["params"]["b"], np.arange(3.0))
  assert int(restored.items["training"]["step"]) == 10


def test_a_step_before_the_newest_checkpoint_is_not_saved(tmp_path):
  save(tmp_path, 5)
  with pytest.raises(OSError, match=r"step 3 .*later checkpoint, of step 5\. Choose another folder\."):
    save(tmp_path, 3)
  assert checkpoint.Checkpoints.steps(tmp_path) == [5]
