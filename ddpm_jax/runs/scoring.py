"""Scores of a model that denoises: its samples drawn, compared with real images and reported. An interrupted evaluation goes on."""

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

import ddpm_jax
from ddpm_jax import build, data, evaluate, images, metrics, parallel, rows, workdir
from ddpm_jax.runs import bits, drawing, model, reporting
from ddpm_jax.runs.drawing import Inputs, check, preview
from ddpm_jax.runs.model import Weights, say

__all__ = ["Judge", "check", "preview"]

PyTree = Any
_READ = 512
# What images follow from, and what they do not, of a config.
_MODEL = ("process", "prediction", "learned_variance", "sigma_data", "superres", "sampling", "guidance", "network")
_FREE = ("batch_size", "preview_steps", "dropout", "remat")


class Variant(NamedTuple):
  """A sampler, and its steps."""

  sampler: str
  num_steps: int

  def of(self, config: ConfigDict) -> ConfigDict:
    """The config with these."""
    config = ConfigDict(config.to_dict())
    config.sampling.update(self._asdict())
    return config


class Drawn(NamedTuple):
  """Samples of a variant: uint8 [N, H, W, C] (None but in the first process), their labels, and network evaluations of each at most."""

  config: ConfigDict
  samples: np.ndarray | None
  labels: np.ndarray | None
  nfe: int


class Judge:
  """Scores weights of a config's model; whatever cannot be done is refused when it is made.

  Args:
    config: the run's.
    folder: its folder.
    mesh: of all devices.
    source: the training images.
    held_out: other images; None if there are none.

  Raises:
    ValueError: if the features, the reference or the scores that the config asks for cannot be had.
  """

  def __init__(
    self,
    config: ConfigDict,
    folder: Path,
    mesh: jax.sharding.Mesh,
    source: data.Source,
    held_out: data.Source | None,
  ):
    c = config.evaluation
    self.config, self.folder, self.mesh, self.source, self.held_out = config, folder, mesh, source, held_out
    bits.check(config, held_out)
    self._space = build.build_space(config, source, held_out, folder / "classifier.safetensors")
    self._reference = build.build_reference(config, self._space, source, held_out)
    self._quick: Callable | None = None
    if self._reference is not None:
      self._settings = build.build_settings(config, self._space, self._reference, c.num_samples)
    if c.every:
      self.check_scores()
      assert self._reference is not None
      self._quick_settings = build.build_settings(config, self._space, self._reference, self._quick_count)
      self._quick = build.build_generate(config, mesh)

  def check_scores(self) -> None:
    """Raises a ValueError if there is nothing to score against."""
    if self._reference is None:
      raise ValueError(
        "Got no held-out images to score against; set --config.data.eval_split or --config.data.hold_out, or score against the training"
        " images: --config.evaluation.reference=train."
      )

  def check_best(self, metric: str) -> None:
    """Raises a ValueError unless the metric is one of those that are taken while training goes on."""
    space = (
      self.space if self._space.name == "inception" else metrics.pixel_space()
    )  # whose names the classifier's scores have
    known = [f"eval/{name}" for name in evaluate.logged_names(self._quick_settings, evaluate.names_of(space))]
    if metric not in known:
      raise ValueError(f"Got config.training.best_metric={metric!r}; wanted one of {', '.join(known)}.")

  @property
  def _quick_count(self) -> int:
    return self.config.evaluation.every_samples or self.config.evaluation.num_samples

  @functools.cached_property
  def space(self) -> metrics.FeatureSpace:
    """The feature space, its classifier trained."""
    return self._space.make()

  @functools.cached_property
  def extract(self) -> evaluate.Extract:
    """Images to features, over this process's devices."""
    return metrics.extractor(self.space, self.config.evaluation.batch_size)

  @functools.cached_property
  def _real(self) -> evaluate.Summary:
    assert self._reference is not None
    if self._reference.statistics is not None:
      return evaluate.of_statistics(self._reference.statistics)
    say(f"{self.space.name} features of {len(self._reference.images or ()):,} reference images ...")
    return self._summary(self._reference.images, np.arange(len(self._reference.images or ())), self._settings)

  def _summary(self, source: Any, chosen: np.ndarray, settings: evaluate.Settings) -> evaluate.Summary:
    return evaluate.summarize(self.extract, in_parts(source, chosen), len(chosen), settings)

  def scores(self, samples: np.ndarray, settings: evaluate.Settings) -> evaluate.Scores:
    """Scores of samples uint8 [N, H, W, C] against the reference."""
    parts = (samples[first : first + _READ] for first in range(0, len(samples), _READ))
    summary = evaluate.summarize(self.extract, parts, len(samples), settings)
    return evaluate.score(summary, self._real, settings, evaluate.names_of(self.space))

  def on_the_way(self, params: PyTree) -> evaluate.Scores:
    """Scores of a few samples while training goes on, by name with `eval/` before it; in every process."""
    assert self._quick is not None
    count, config = self._quick_count, self.config
    samples, _ = drawing.draw(config, self._quick, params, config.seed, count, self._inputs(count))
    return {f"eval/{name}": value for name, value in self.scores(samples, self._quick_settings).items()}

  def _inputs(self, count: int) -> Inputs:
    # As common as in the data, with whose images the samples are compared.
    counts = data.label_counts(self.source, self.config.network.num_classes)
    return drawing.inputs_of(self.config, count, self.source if self.held_out is None else self.held_out, counts)

  def run(self, weights: Weights, seed: int, variants: Sequence[Variant] = ()) -> None:
    """Samples of some weights into samples/, their scores into eval.json and report.html; the last variant is the headline."""
    start = time.perf_counter()
    own = Variant(self.config.sampling.sampler, self.config.sampling.num_steps)
    variants = list(variants) or [own]
    whole = parallel.whole(self.mesh, weights.params)
    weights = weights._replace(params=whole)
    sha256 = metrics.digest(*map(np.asarray, jax.tree.leaves(jax.device_get(whole))))
    drawn = [
      self._draw(variant, weights, sha256, seed, "final" if variant == variants[-1] else _name(variant, seed))
      for variant in variants
    ]
    likelihood = bits.evaluate(self.config, self.folder, self.mesh, weights, sha256, self.held_out, seed)
    denoising = self._denoising(weights, seed) if self.config.evaluation.report else None
    if not parallel.is_main():
      return
    last = drawn[-1]
    assert last.samples is not None
    drawing.save_picture(drawing.samples_folder(self.folder) / "final", last.samples, last.labels)
    report = self._report(drawn, likelihood, weights, sha256, seed)
    if self._reference is None:
      say("no scores: the config holds no images back (config.data.eval_split or config.data.hold_out)")
    report = model.write_scores(self.folder, report, weights, seed, time.perf_counter() - start)
    if self._reference is not None:
      rows_of = {"generated": report["scores"]["generated"], "real images (floor)": report["scores"]["floor"]}
      if len(drawn) > 1:
        curve = {f"{row['sampler']}, NFE {row['nfe']}": row["scores"] for row in report["curve"]}
        rows_of = {**curve, "real images (floor)": report["scores"]["floor"]}
      say(f"\n{self.space.name} features, {report['num_samples']:,} samples against {report['reference']}")
      say(evaluate.table(rows_of))
      if "frechet" not in self._settings.scores and not self.config.evaluation.scores:
        say(
          f"no Frechet distance: {self._space.dimensions:,} dimensions want more samples and reference images than that"
          " (config.evaluation.num_samples, allow_singular), or other features"
        )
    say(bits.table(likelihood) + f"\nscores       {model.scores_path(self.folder)}")
    if denoising is not None:
      nearest = reporting.neighbours(self.extract, last.samples, self.source, self.held_out)
      shown = reporting.content(
        self.config, self.folder, report, last.samples, last.labels, denoising, bits.terms(likelihood), nearest
      )
      say(f"report       {reporting.write(self.folder, shown)}")

  def _denoising(self, weights: Weights, seed: int) -> reporting.Denoising:
    return reporting.denoising(self.config, self.mesh, weights, self._inputs(reporting.SHOWN), seed)

  def _draw(self, variant: Variant, weights: Weights, sha256: str, seed: int, name: str) -> Drawn:
    count, batch = self.config.evaluation.num_samples, self.config.evaluation.batch_size
    config = variant.of(self.config)
    # The same on each device however many there are, so that the samples are the same numbers.
    config.sampling.batch_size = min(batch, count) * self.mesh.size
    generate, inputs = build.build_generate(config, self.mesh), self._inputs(count)
    path = drawing.samples_folder(self.folder) / name
    identity = _identity(config, sha256, seed, count, inputs)
    array = None
    if parallel.is_main():
      shape = (count, *build.image_shape(config))
      array = rows.Rows(path, identity, "samples", shape, np.uint8, damaged=workdir.damaged_folder(self.folder))
    done = parallel.of_main(array.done if array else 0)
    nfe = parallel.of_main(int(array.notes.get("nfe", 0)) if array else 0)
    if done < count:
      rest = f", {count - done:,} of them left" if done else ""
      say(f"sampling {count:,} images from the {weights.name} weights with {config.sampling.sampler}{rest} ...")
      for x, calls in drawing.in_batches(config, generate, weights.params, seed, count, inputs, {}, start=done):
        drawing.check_finite(config, x)
        nfe = max(nfe, int(calls.max()))
        if array is not None:
          array.write(images.to_uint8(x), {"nfe": nfe})
      say(f"{nfe:,} network evaluations each")
    labels = inputs.get("classes")
    if array is None:
      return Drawn(config, None, labels, nfe)
    samples = array.finish(**({} if labels is None else {"labels": labels}))
    say(f"samples      {path}.npz")
    return Drawn(config, samples, labels, nfe)

  def _report(
    self, drawn: list[Drawn], likelihood: dict[str, Any], weights: Weights, sha256: str, seed: int
  ) -> dict[str, Any]:
    config, last = self.config, drawn[-1]
    c = config.evaluation
    report: dict[str, Any] = {
      "num_samples": c.num_samples,
      "sampling": {**last.config.sampling.to_dict(), "batch_size": c.batch_size, "nfe": last.nfe},
      "guidance": config.guidance.to_dict(),
      "labels": "as common as in the data" if last.labels is not None else None,
      "data": describe_data(config),
      "dtype": config.network.dtype,
      "weights_sha256": sha256,
    }
    if likelihood:
      report["likelihood"] = bits.without_terms(likelihood)
    if self._reference is None:
      return report
    curve = []
    for one in drawn:
      assert one.samples is not None
      found = self.scores(one.samples, self._settings)
      curve.append(
        {
          "sampler": one.config.sampling.sampler,
          "num_steps": one.config.sampling.num_steps,
          "nfe": one.nfe,
          "scores": found,
        }
      )
    floor, number, why = self._floor()
    report |= {
      "scores": {"generated": curve[-1]["scores"], "floor": floor},
      "floor_num": number,
      "features": self.space.name,
      "feature_space": self.space.provenance,
      "reference": _describe(self._reference, config),
      "reference_num": self._real.count,
      "neighbour": c.k,
      "settings": self._settings._asdict()
      | {
        "kernel_size": c.kernel_size or evaluate.kernel_size(len(self._real.kept), min(c.num_samples, c.most_kept))
        if self._real.kept is not None
        else None
      },
    }
    if why:
      report["no_floor"] = why
    if len(drawn) > 1:
      report["curve"] = curve
    return report

  def _floor(self) -> tuple[evaluate.Scores | None, int, str]:
    """Scores of real images that are not the reference's, how many they are, and why there are none."""
    assert self._reference is not None
    floor = self._reference.floor
    if floor is None:
      return None, 0, "there are no real images but the reference's"
    chosen = np.random.default_rng(0).permutation(len(floor))[: self.config.evaluation.num_samples]
    try:
      summary = self._summary(floor, chosen, self._settings)
      return evaluate.score(summary, self._real, self._settings, evaluate.names_of(self.space)), len(chosen), ""
    except ValueError as error:  # too few for the rank, or for neighbours
      return None, len(chosen), str(error)


def describe_data(config: ConfigDict) -> dict[str, Any]:
  """Which images a config names."""
  c = config.data
  keys = ["source", *(["name"] if c.source == "tfds" else []), *(["path"] if c.path else [])]
  keys += ["train_split", "eval_split", "hold_out", "image_size", "crop", "resize"]
  return {key: c[key] for key in keys}


def in_parts(source: data.Source, chosen: np.ndarray) -> Iterator[np.ndarray]:
  """The images of a source at some places, a part at a time."""
  for first in range(0, len(chosen), _READ):
    yield data.read(source, chosen[first : first + _READ])["image"]


def _describe(reference: build.Reference, config: ConfigDict) -> str:
  if reference.statistics is not None:
    return f"statistics of {reference.statistics.features.count or 'an unknown number of'} images in {reference.name}"
  kind = "training" if reference.name == "train" else "held-out"
  small = "; the samples are those held-out images made small and enlarged" if config.superres.factor else ""
  return f"{len(reference.images or ()):,} {kind} images{small}"


def _name(variant: Variant, seed: int) -> str:
  return f"eval_{variant.sampler}_{variant.num_steps}_seed{seed}"


def _identity(config: ConfigDict, sha256: str, seed: int, count: int, inputs: Inputs) -> dict[str, Any]:
  """All that samples follow from, as JSON."""
  tree = config.to_dict()
  settings = {
    name: {key: value for key, value in tree[name].items() if key not in _FREE}
    if isinstance(tree[name], dict)
    else tree[name]
    for name in _MODEL
  }
  given = {name: metrics.digest(value) for name, value in inputs.items()}
  identity = {"weights": sha256, "seed": seed, "count": count, "inputs": given, "version": ddpm_jax.__version__}
  return json.loads(json.dumps(identity | settings))
