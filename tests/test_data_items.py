"""Test items with arrays of any name in all sources, float images, and data sets without classes."""

import numpy as np
import pytest

from ddpm_jax import data

SHAPE = (4, 6, 1)


class Poses:
  """Provide gradient images and other arrays, with values that depend on the index.

  Reading an index in `broken` raises `BrokenImage`.
  """

  def __init__(self, count=12, broken=(), floats=False):
    self._count, self._broken, self._floats = count, broken, floats

  def __len__(self):
    return self._count

  def __getitem__(self, index):
    if index in self._broken:
      raise data.BrokenImage(f"image {index}", "it is broken")
    ramp = np.arange(SHAPE[1])[:, None] + np.zeros(SHAPE)
    return {
      "image": index / 20 + ramp / 20 - 0.5 if self._floats else (index + 10 * ramp).astype(np.uint8),
      "pose": np.full(3, index, np.float64),
      "scribble": index + ramp[..., 0],
      "seen": index % 2 == 0,
      "count": np.int64(index),
      "small": np.full((2, 3, 1), index, np.uint8),
      "text": f"größe 🦊 {index**3}"[: 5 * index],
    }


TYPES = {
  "image": np.uint8,
  "pose": np.float32,
  "scribble": np.float32,
  "seen": np.bool_,
  "count": np.int32,
  "small": np.uint8,
  "text": np.str_,
}


def assert_items(batch, indices, stand_ins=None):
  """Assert that a batch of `Poses` with uint8 images contains the items at these indices.

  `stand_ins` maps the index of each broken item to the index of the item that replaces it.
  """
  assert {name: array.dtype.type for name, array in batch.items() if name != "classes"} == TYPES
  for row, index in enumerate(indices):
    item = Poses()[index if stand_ins is None else stand_ins.get(index, index)]
    for name, value in item.items():
      np.testing.assert_array_equal(batch[name][row], value)


def test_items_keep_their_names_and_shapes():
  batch = data.read(Poses(), [3, 0, 11])
  assert "classes" not in batch
  assert_items(batch, [3, 0, 11])


@pytest.mark.parametrize("broken", ["stop", "skip"])
def test_items_are_the_same_in_memory(broken):
  memory = data.cache_in_memory(Poses(), broken)
  assert not isinstance(memory, Poses)
  assert memory[5].keys() == Poses()[5].keys(), "no class is added"
  assert memory.classes is None
  assert_items(data.read(memory, np.arange(12)), range(12))


def test_the_next_complete_item_replaces_a_broken_item():
  stand_ins = {2: 4, 3: 4, 11: 0}
  for source in (data.SkipBroken(Poses(broken=stand_ins)), data.cache_in_memory(Poses(broken=stand_ins), "skip")):
    assert_items(data.read(source, np.arange(12)), range(12), stand_ins)


def test_held_out_images_keep_their_items():
  for part in data.hold_out(Poses(), 5):
    batch = data.read(part, np.arange(len(part)))
    assert_items(batch, batch["count"])


def test_a_pack_keeps_all_items(tmp_path):
  for floats in (False, True):
    source = Poses(floats=floats)
    data.pack(source, tmp_path / str(floats), {})
    read = data.PackedSource(tmp_path / str(floats))
    assert read.shape == SHAPE
    assert list(read.classes) == [data.NO_CLASS] * 12
    order = np.random.default_rng(0).permutation(12)
    for name, array in data.read(source, order).items():
      got = data.read(read, order)[name]
      assert got.dtype == array.dtype
      np.testing.assert_array_equal(got, array)
      np.testing.assert_array_equal(read[3][name], data.read(source, [3])[name][0])


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_batches_have_all_items_and_flips_mirror_arrays_aligned_with_pixels(workers):
  batches = data.batches(data.SkipBroken(Poses()), 12, seed=0, flip=True, num_workers=workers)
  mirrored = 0
  for _ in range(3):
    batch = next(batches)
    assert batch["image"].dtype == np.float32
    assert sorted(batch["count"]) == list(range(12))
    for row, index in enumerate(batch["count"]):
      item = Poses()[index]
      flip = batch["image"][row, 0, 0, 0] > batch["image"][row, 0, -1, 0]
      step = -1 if flip else 1
      np.testing.assert_allclose(batch["image"][row], item["image"][:, ::step] / 127.5 - 1, atol=1e-6)
      np.testing.assert_array_equal(batch["scribble"][row], item["scribble"][:, ::step])
      for name in ("pose", "seen", "small", "text"):
        np.testing.assert_array_equal(batch[name][row], item[name])
      mirrored += flip
  batches.close()
  assert 0 < mirrored < 36


def test_float_images_do_not_change():
  for source in (Poses(floats=True), data.cache_in_memory(Poses(floats=True))):
    batch = next(data.batches(source, 4, seed=0))
    expected = [Poses(floats=True)[index]["image"].astype(np.float32) for index in batch["count"]]
    np.testing.assert_array_equal(batch["image"], expected)


@pytest.mark.parametrize("item", [{"process": 1.0}, {"broken": 1.0}, {"classes": 1}])
def test_items_may_have_any_name(item):
  source = data.ArraySource(np.zeros((4, *SHAPE), np.uint8), np.arange(4), process=np.arange(4.0), broken=np.ones(4))
  batch = next(data.batches(source, 4, seed=0))
  for name in item:
    assert batch[name].shape == (4,)
  np.testing.assert_array_equal(batch["process"], batch["classes"])


def test_selected_arrays_of_a_file_become_items(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (5, *SHAPE), np.uint8)
  np.savez(tmp_path / "a.npz", images=images, classes=np.arange(5), pose=np.arange(10.0).reshape(5, 2), other=[1])
  fit = data.Fit(SHAPE[:2], 1)
  source = data.arrays(fit, str(tmp_path / "a.npz"), ["pose"]).train
  batch = data.read(source, [4, 1])
  assert batch.keys() == {"image", "classes", "pose"}
  np.testing.assert_array_equal(batch["pose"], [[8, 9], [2, 3]])
  for items, message in (
    (["poise"], "which contains classes, images, other, pose; expected poise too"),
    (["other"], "a.npz: Got other of shape"),
  ):
    with pytest.raises(ValueError, match=message):
      data.arrays(fit, str(tmp_path / "a.npz"), items)


def test_float_images_of_a_file_are_in_minus_1_to_1(tmp_path):
  images = np.linspace(-1, 1, 2 * 24).reshape(2, *SHAPE)
  np.savez(tmp_path / "a.npz", images=images)
  fit = data.Fit(SHAPE[:2], 1)
  np.testing.assert_array_equal(data.arrays(fit, str(tmp_path / "a.npz")).train.images, images.astype(np.float32))
  got = data.read_inputs(tmp_path / "a.npz", SHAPE[:2], 1).images
  np.testing.assert_array_equal(got, np.rint((images.astype(np.float32) + 1) * 127.5).astype(np.uint8))
  np.savez(tmp_path / "b.npz", images=(images + 1) / 2)
  with pytest.raises(
    ValueError, match=r"b.npz: Got float images from 0 to 1; expected -1 .black. to 1 .*2 \* images - 1"
  ):
    data.arrays(fit, str(tmp_path / "b.npz"))


class Wrong(Poses):
  """Provide `Poses` with changes in one item."""

  def __init__(self, index, **changes):
    super().__init__()
    self._index, self._changes = index, changes

  def __getitem__(self, index):
    item = super().__getitem__(index)
    return item | self._changes if index == self._index else item


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"pose": np.zeros(4)},
      r"pose float32 \(4,\).*after an item of .*pose float32 \(3,\).*expected the same names, types and shapes",
    ),
    ({"more": 1.0}, r"more float32 \(\).*after an item of"),
    ({"image": np.zeros(SHAPE)}, r"image float32 .*after an item of .*image uint8"),
    ({"pose": "left"}, r"pose text \(\).*after an item of .*pose float32 \(3,\)"),
    ({"text": 1.0}, r"text float32 \(\).*after an item of .*text text \(\)"),
    ({"text": None}, "the item 'text' of type object; expected numbers or text.*remove it"),
    ({"text": b"left"}, r"the item 'text' of type \|S4; expected numbers or text"),
    ({"text": ["a", "b"]}, r"text text \(2,\).*after an item of .*text text \(\)"),
    ({"count": 2**40}, "'count' of integers from 1099511627776 to 1099511627776; expected values that fit int32"),
  ],
)
def test_an_item_that_differs_from_the_first_is_an_error(changes, message, tmp_path):
  for use in (
    lambda source: data.read(source, [1, 3]),
    data.cache_in_memory,
    lambda source: next(data.batches(source, 12, seed=0)),
    lambda source: data.pack(source, tmp_path / "pack", {}),
  ):
    with pytest.raises(ValueError, match=message):
      use(Wrong(3, **changes))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"image": np.full(SHAPE, 255.0)}, r"type float32 from 255 to 255; expected floats in \[-1, 1\], or uint8"),
    ({"image": np.full(SHAPE, np.nan)}, "from nan to nan"),
    ({"image": np.zeros(SHAPE, np.int64)}, "images of type int32 from the data; expected uint8"),
  ],
)
def test_images_of_wrong_range_or_type_are_errors_when_data_is_loaded(monkeypatch, changes, message):
  monkeypatch.setattr(data.loading, "cache_in_memory", lambda source, broken: source)
  with pytest.raises(ValueError, match=message):
    data.load(data.Splits(Wrong(0, **changes)))


def test_missing_images_or_required_classes_are_errors():
  class NoImages(Poses):
    def __getitem__(self, index):
      return {"pose": np.zeros(3)}

  with pytest.raises(ValueError, match="the items pose; expected 'image' among them"):
    data.load(data.Splits(NoImages()))
  train, _ = data.load(data.Splits(Poses()), hold_out=2)
  assert data.class_counts(train, 3) is None
  with pytest.raises(
    ValueError,
    match="the items count, image, .* for a class-conditional model; expected an integer 'classes' among them",
  ):
    data.load(data.Splits(Poses()), check=data.classes_below(3))


def test_arrays_that_do_not_match_the_images_are_errors():
  images = np.zeros((3, *SHAPE), np.uint8)
  for use, message in (
    (
      lambda: data.ArraySource(images, pose=np.zeros((2, 3))),
      r"pose of shape \(2, 3\) for 3 images; expected one entry per image",
    ),
    (lambda: data.ArraySource(images, image=images), "an item named 'image'"),
    (lambda: data.ArraySource(images.astype(float) + 2), r"from 2 to 2; expected floats in \[-1, 1\]"),
    (lambda: data.ArraySource(images.astype(int)), "type int64; expected .*uint8 .*or floats"),
  ):
    with pytest.raises(ValueError, match=message):
      use()
