import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import checkpoint, optim, parallel, train


def make_state(seed=0):
  optimizer = optim.adam(0.1)
  init = lambda key: {"w": jax.random.normal(key, (8, 3)), "b": jnp.arange(3.0)}  # noqa: E731
  state = train.init_state(jax.random.key(seed), init, optimizer)
  return state._replace(step=jnp.asarray(5 + seed, jnp.int32))


def template(state, devices=1):
  return checkpoint.abstract(state, parallel.replicated(parallel.data_mesh(jax.devices()[:devices])))


def assert_equal(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("devices", [1, 8])
def test_everything_comes_back(tmp_path, devices):
  state, position = make_state(), {"iterator": {"next_index": 7}, "num_images": 3}
  checkpoints = checkpoint.Checkpoints(tmp_path / "c")
  checkpoints.save(5, state, position)
  checkpoints.close()
  again = checkpoint.Checkpoints(tmp_path / "c")
  restored, data = again.restore(template(state, devices))
  again.close()
  assert data == position
  assert_equal(restored, state)
  assert len(restored.params["w"].sharding.device_set) == devices


def test_the_newest_are_kept(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
  for seed in range(4):
    checkpoints.save(seed, make_state(seed), {})
  checkpoints.close()
  assert sorted(folder.name for folder in tmp_path.iterdir() if folder.is_dir()) == ["2", "3"]
  again = checkpoint.Checkpoints(tmp_path)
  assert int(again.restore(template(make_state()))[0].step) == 8
  again.close()


def test_exist_touches_nothing(tmp_path):
  assert not checkpoint.Checkpoints.exist(tmp_path / "none")
  assert not (tmp_path / "none").exists()
  (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
  assert not checkpoint.Checkpoints.exist(tmp_path), "a save that was killed is no checkpoint"
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save(3, make_state(), {})
  checkpoints.close()
  assert checkpoint.Checkpoints.exist(tmp_path)


def test_what_cannot_be_restored_is_an_error(tmp_path, monkeypatch):
  state = make_state()
  checkpoints = checkpoint.Checkpoints(tmp_path)
  with pytest.raises(ValueError, match="holds no checkpoint"):
    checkpoints.restore(template(state))
  monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
  checkpoints.save(5, state, {})
  checkpoints.close()
  monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 1)
  again = checkpoint.Checkpoints(tmp_path)
  with pytest.raises(ValueError, match="format 2.*Upgrade"):
    again.restore(template(state))
  again.close()


def test_a_truncated_checkpoint_is_an_error_that_names_it(tmp_path):
  state = make_state()
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save(5, state, {})
  checkpoints.close()
  for file in (tmp_path / "5" / "state").rglob("*"):
    if file.is_file() and file.stat().st_size > 100:
      file.write_bytes(file.read_bytes()[:50])
  again = checkpoint.Checkpoints(tmp_path)
  with pytest.raises(ValueError, match="Cannot re.*5.*Delete that folder"):
    again.restore(template(state))
  again.close()
