"""Test that every flipped bit and every truncation of a file is detected when it is read."""

import hashlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ddpm_jax.storage import sealed

CONTENT = {
  "scores": {"generated": {"kernel_distance": 0.63, "none": float("nan")}},
  "step": 3,
  "names": ["a", "ü", "\udcff"],
}
TENSORS = {"a/b": np.arange(12, dtype=np.float32).reshape(3, 4), "c": np.arange(3, dtype=np.int64)}


def flips(path, max_count=400):
  """Flip one random bit of a file before each iteration, and restore the file at the end."""
  content, rng = path.read_bytes(), np.random.default_rng(0)
  for position in rng.permutation(len(content))[:max_count]:
    changed = bytearray(content)
    changed[position] ^= 1 << int(rng.integers(8))
    path.write_bytes(changed)
    yield
  path.write_bytes(content)


def test_json_round_trip_detects_flipped_bits(tmp_path):
  path = tmp_path / "a.json"
  sealed.write_json(path, CONTENT)
  assert str(sealed.read_json(path)) == str(CONTENT)
  assert list(json.loads(path.read_text())) == [*CONTENT, "sha256"]
  num_detected = 0
  for _ in flips(path):
    try:
      # Compare as text, because NaN does not equal itself.
      assert str(sealed.read_json(path)) == str(CONTENT)
    except sealed.DamagedFileError:
      num_detected += 1
  # A changed white space does not change the content.
  assert num_detected > 200


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"null", b"\xff", b"\0" * 99, b"{}", b"[" * 10**5])
def test_a_file_without_a_digest_is_damaged(tmp_path, content):
  path = tmp_path / "a.json"
  path.write_bytes(content)
  with pytest.raises(sealed.DamagedFileError, match=r"it is not (JSON|a JSON object with a digest)"):
    sealed.read_json(path)


def test_an_excluded_key_may_differ_and_the_digest_may_be_optional(tmp_path):
  paths = [tmp_path / f"{number}.json" for number in range(2)]
  for number, path in enumerate(paths):
    sealed.write_json(path, {"a": 1, "times": number}, exclude="times")
    assert sealed.read_json(path, exclude="times") == {"a": 1, "times": number}
  first, second = (json.loads(path.read_text())["sha256"] for path in paths)
  assert first == second
  paths[0].write_text('{"a": 1}')
  assert sealed.read_json(paths[0], required=False) == {"a": 1}
  paths[0].write_text(json.dumps({"a": 2, "sha256": first}))
  with pytest.raises(sealed.DamagedFileError, match="changed after it was written"):
    sealed.read_json(paths[0], required=False)


def test_tensors_round_trip_detects_flipped_bits(tmp_path):
  path, about = tmp_path / "a.safetensors", {"steps": "3"}
  sealed.save_tensors(path, TENSORS, about)
  tensors, metadata = sealed.load_tensors(path)
  assert metadata == about
  for name, array in TENSORS.items():
    np.testing.assert_array_equal(tensors[name], array, strict=True)
  for _ in flips(path):
    with pytest.raises(sealed.DamagedFileError):
      sealed.load_tensors(path)
  path.write_bytes(path.read_bytes()[:-4])
  with pytest.raises(sealed.DamagedFileError, match="it is not a safetensors file"):
    sealed.load_tensors(path)
  safetensors.numpy.save_file(TENSORS, path, about)
  with pytest.raises(sealed.DamagedFileError, match="no digest"):
    sealed.load_tensors(path)
  with pytest.raises(FileNotFoundError):
    sealed.load_tensors(tmp_path / "missing")


def test_digests_cover_types_without_a_buffer():
  # Other libraries' types, such as bfloat16, are not exported as buffers.
  arrays = [np.arange(6, dtype=dtype).reshape(2, 3) for dtype in (jnp.bfloat16, np.float16, np.float32, np.uint8)]
  for array in (*arrays, np.array(["a", "größe"]), np.zeros((0, 3)), np.float64(2.5), np.array([True])):
    content = f"{array.dtype}{array.shape}".encode() + array.tobytes()
    assert sealed.digest(array) == hashlib.sha256(content).hexdigest()
    assert (
      sealed.digest(array.T) == hashlib.sha256(f"{array.dtype}{array.T.shape}".encode() + array.T.tobytes()).hexdigest()
    )
  other = arrays[0].copy()
  other[1, 2] = 7
  assert sealed.digest(other) != sealed.digest(arrays[0])
