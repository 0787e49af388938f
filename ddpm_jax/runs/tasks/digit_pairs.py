"""Define the task of models that generate images of two digits from captions."""

from typing import Any

import numpy as np

from ddpm_jax import data, metrics
from ddpm_jax.data import pairs
from ddpm_jax.devices import parallel
from ddpm_jax.devices.progress import print_line
from ddpm_jax.runs import scoring
from ddpm_jax.runs.generation import Inputs
from ddpm_jax.runs.reading import Run
from ddpm_jax.runs.tasks.denoise import Denoise

# The images of the classifier are the left and the right half of a sample.
_SIDE = 28


class Scorer(scoring.Scorer):
  """Score samples, and compare the digits that a classifier sees in them with the digits in their captions."""

  def judge(self, samples: np.ndarray, inputs: Inputs) -> dict[str, Any]:
    """Return the share of images that show the digits of their captions in the right order.

    A share of real images is below 1 only if the classifier makes errors.

    Returns:
      A dict with the key "agreement". Its value is a dict with the keys "samples" and "real images" (the held-out
      images, if there are any). Each value in this dict is a result of `_agreement`.
    """
    classifier, held_out = self._classifier(), self._run.held_out
    report = {"samples": _agreement(classifier, samples, inputs["text"])}
    if held_out is not None:
      real = data.read(held_out, np.arange(len(held_out)))
      report["real images"] = _agreement(classifier, real["image"], real["text"])
    for name, shares in report.items():
      text = ", ".join(f"{group} {one['share']:.3f} of {one['num']:,}" for group, one in shares.items())
      print_line(f"agreement with the captions, {name}: {text}")
    return {"agreement": report}

  def _classifier(self) -> Any:
    """Return a trained classifier of digits, as a function from images to a dict with `log_probs`.

    The training images are the MNIST digits that the training pairs consist of.
    """
    digits, c = data.read_mnist(), self._run.experiment.evaluation
    images, classes = digits.images[: -pairs.NUM_HELD_OUT], np.asarray(digits.classes)[: -pairs.NUM_HELD_OUT]
    path = self._run.folder / "digits.safetensors"
    params = metrics.cached_classifier(path, images, classes, 10, steps=c.classifier_steps, is_main=parallel.is_main())
    return metrics.extractor(metrics.classifier_space(params, 10), c.batch_size)


def _agreement(classifier: Any, images: np.ndarray, texts: np.ndarray) -> dict[str, dict[str, Any]]:
  """Return the shares of images that show the digits of their texts.

  Returns:
    A dict with the keys "training pairs" and "held-out pairs". Each value is a dict with the `share` and the number of
    images (`num`). A group without images has no key.
  """
  asked = np.array([pairs.digits_of(str(text)) for text in texts])
  halves = (images[:, :, :_SIDE], images[:, :, _SIDE:])
  seen = np.stack([np.argmax(classifier(np.ascontiguousarray(half))["log_probs"], axis=1) for half in halves], axis=1)
  is_right = (seen == asked).all(1)
  is_new = np.array([pairs.is_held_out(*pair) for pair in asked.tolist()])
  groups = {"training pairs": ~is_new, "held-out pairs": is_new}
  return {
    name: {"share": float(np.mean(is_right[rows])), "num": int(rows.sum())}
    for name, rows in groups.items()
    if rows.any()
  }


class DigitPairs(Denoise):
  """Preview, score and report the samples of a model trained on `data.digit_pairs`."""

  def scorer(self, run: Run) -> Scorer:
    """Return the scorer of the run's samples.

    Raises:
      ValueError: if the data are not pairs of digits with captions like the captions of `data.digit_pairs`.
    """
    shape = run.experiment.data.shape
    if shape != (_SIDE, 2 * _SIDE, 1) or "text" not in run.experiment.model.conditions:
      raise ValueError(
        f"Got config.task=digit_pairs with data of shape {shape}; expected 28x56 gray images and a model with the"
        " condition text, as in configs/digits_text.py. Set --config.task=denoise."
      )
    for source in filter(None, (run.source, run.held_out)):
      (text,) = data.read_texts(source, "text", 1, most_slow=1)
      try:
        pairs.digits_of(text)
      except ValueError as error:
        raise ValueError(
          f"{error} The task digit_pairs scores only such captions: set --config.task=denoise."
        ) from error
    return Scorer(run)


def digit_pairs() -> DigitPairs:
  """Return the task of models that generate images of two digits from captions.

  Its additional score is the share of images that agree with their captions.
  """
  return DigitPairs()
