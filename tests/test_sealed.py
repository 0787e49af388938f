"""Files that are checked when they are read back: no flipped bit and no cut goes unnoticed."""

import json

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


def flips(path, most=400):
  """Yield once for each of some bits of a file, flipped."""
  content, rng = path.read_bytes(), np.random.default_rng(0)
  for place in rng.permutation(len(content))[:most]:
    changed = bytearray(content)
    changed[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(changed)
    yield
  path.write_bytes(content)


def test_json_comes_back_or_is_noticed(tmp_path):
  path = tmp_path / "a.json"
  sealed.write_json(path, CONTENT)
  assert str(sealed.read_json(path)) == str(CONTENT)
  assert list(json.loads(path.read_text())) == [*CONTENT, "sha256"]
  noticed = 0
  for _ in flips(path):
    try:
      # NaN is not itself.
      assert str(sealed.read_json(path)) == str(CONTENT)
    except sealed.DamagedFileError:
      noticed += 1
  # A change of white space is none.
  assert noticed > 200


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"null", b"\xff", b"\0" * 99, b"{}", b"[" * 10**5])
def test_what_is_no_sealed_json_is_damaged(tmp_path, content):
  path = tmp_path / "a.json"
  path.write_bytes(content)
  with pytest.raises(sealed.DamagedFileError, match=r"it is not (JSON|an object with the digest)"):
    sealed.read_json(path)


def test_a_key_apart_may_differ_and_a_digest_may_be_missing_where_a_person_writes(tmp_path):
  paths = [tmp_path / f"{number}.json" for number in range(2)]
  for number, path in enumerate(paths):
    sealed.write_json(path, {"a": 1, "times": number}, exclude="times")
    assert sealed.read_json(path, exclude="times") == {"a": 1, "times": number}
  first, second = (json.loads(path.read_text())["sha256"] for path in paths)
  assert first == second
  paths[0].write_text('{"a": 1}')
  assert sealed.read_json(paths[0], required=False) == {"a": 1}
  paths[0].write_text(json.dumps({"a": 2, "sha256": first}))
  with pytest.raises(sealed.DamagedFileError, match="not what was written"):
    sealed.read_json(paths[0], required=False)


def test_tensors_come_back_or_are_noticed(tmp_path):
  path, about = tmp_path / "a.safetensors", {"steps": "3"}
  sealed.save_tensors(path, TENSORS, about)
  tensors, found = sealed.load_tensors(path)
  assert found == about
  for name, array in TENSORS.items():
    np.testing.assert_array_equal(tensors[name], array, strict=True)
  for _ in flips(path):
    with pytest.raises(sealed.DamagedFileError):
      sealed.load_tensors(path)
  path.write_bytes(path.read_bytes()[:-4])
  with pytest.raises(sealed.DamagedFileError, match="it is not safetensors"):
    sealed.load_tensors(path)
  safetensors.numpy.save_file(TENSORS, path, about)
  with pytest.raises(sealed.DamagedFileError, match="no digest"):
    sealed.load_tensors(path)
  with pytest.raises(FileNotFoundError):
    sealed.load_tensors(tmp_path / "missing")
