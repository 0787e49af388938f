"""Scores of a model that denoises: its samples drawn, compared with real images and reported. An interrupted evaluation goes on."""

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import ddpm_jax
from ddpm_jax import data, metrics
from ddpm_jax.config import Experiment
from ddpm_jax.devices import parallel
from ddpm_jax.metrics import evaluate
from ddpm_jax.models.guided import Parameters
from ddpm_jax.runs import bits, drawing, model, programs, reading, reporting, spaces
from ddpm_jax.runs.drawing import Inputs
from ddpm_jax.runs.model import Weights, say
from ddpm_jax.storage import images, rows, workdir

PyTree = Any
_READ = 512


class Drawn(NamedTuple):
  """Samples of a variant: uint8 [N, H, W, C] (None but in the first process), their labels, and network evaluations of each at most."""

  experiment: Experiment
  samples: np.ndarray | None
  labels: np.ndarray | None
  nfe: int


class Judge:
  """Scores weights of an experiment's model; whatever cannot be done is refused when it is made.

  Args:
    experiment: the run's.
    folder: its folder.
    mesh: of all devices.
    source: the training images.
    held_out: other images; None if there are none.

  Raises:
    ValueError: if the features, the reference or the scores that the experiment asks for cannot be had.
  """

  def __init__(
    self,
    experiment: Experiment,
    folder: Path,
    mesh: jax.sharding.Mesh,
    source: data.Source,
    held_out: data.Source | None,
  ):
    c = experiment.evaluation
    self.experiment, self.folder, self.mesh, self.source, self.held_out = experiment, folder, mesh, source, held_out
    bits.check(experiment, held_out)
    self._space = spaces.build_space(experiment, source, held_out, folder / "classifier.safetensors")
    self._reference = spaces.build_reference(experiment, self._space, source, held_out)
    self._quick: Callable | None = None
    if self._reference is not None:
      self._settings = spaces.build_settings(experiment, self._space, self._reference, c.num_samples)
    if c.every:
      self.check_scores()
      assert self._reference is not None
      self._quick_settings = spaces.build_settings(experiment, self._space, self._reference, self._quick_count)
      self._quick = programs.generate(experiment, mesh)

  def check_scores(self) -> None:
    """Raise a ValueError if there is nothing to score against."""
    if self._reference is None:
      raise ValueError(
        "Got no held-out images to score against; set --config.data.source.eval_split or --config.data.hold_out, or score against the training"
        " images: --config.evaluation.reference=train."
      )

  def check_best(self, metric: str) -> None:
    """Raise a ValueError unless the metric is one of those that are taken while training goes on."""
    space = (
      self.space if self._space.name == "inception" else metrics.pixel_space()
    )  # whose names the classifier's scores have
    known = [f"eval/{name}" for name in evaluate.logged_names(self._quick_settings, evaluate.names_of(space))]
    if metric not in known:
      raise ValueError(f"Got config.training.best_metric={metric!r}; wanted one of {', '.join(known)}.")

  @property
  def _quick_count(self) -> int:
    return self.experiment.evaluation.every_samples or self.experiment.evaluation.num_samples

  @functools.cached_property
  def space(self) -> metrics.FeatureSpace:
    """Return the feature space, and train its classifier if it has one."""
    return self._space.make()

  @functools.cached_property
  def extract(self) -> evaluate.Extract:
    """Return the function from images to features, over this process's devices."""
    return metrics.extractor(self.space, self.experiment.evaluation.batch_size)

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
    """Return the scores of samples uint8 [N, H, W, C] against the reference."""
    parts = (samples[first : first + _READ] for first in range(0, len(samples), _READ))
    summary = evaluate.summarize(self.extract, parts, len(samples), settings)
    return evaluate.score(summary, self._real, settings, evaluate.names_of(self.space))

  def on_the_way(self, parameters: Parameters) -> evaluate.Scores:
    """Return scores of a few samples while training goes on, by name with `eval/` before it; in every process."""
    assert self._quick is not None
    count, experiment = self._quick_count, self.experiment
    samples, _ = drawing.draw(experiment, self._quick, parameters, experiment.seed, count, self._inputs(count))
    return {f"eval/{name}": value for name, value in self.scores(samples, self._quick_settings).items()}

  def _inputs(self, count: int) -> Inputs:
    # As common as in the data, with whose images the samples are compared.
    counts = drawing.class_counts(self.experiment, self.source)
    source = self.source if self.held_out is None else self.held_out
    return drawing.inputs_of(self.experiment, count, source, counts)

  def run(self, weights: Weights, seed: int, variants: Sequence[Experiment] = ()) -> None:
    """Write samples of some weights into samples/, and their scores into eval.json and report.html; the last variant is the headline."""
    start = time.perf_counter()
    variants = list(variants) or [self.experiment]
    parameters = Parameters(*parallel.whole(self.mesh, (weights.params, dict(weights.frozen))))
    # Of the frozen ones too: samples follow from them as well.
    sha256 = metrics.digest(*map(np.asarray, jax.tree.leaves(jax.device_get((parameters.params, parameters.frozen)))))
    names = _names(variants, seed)
    drawn = [
      self._draw(variant, parameters, weights, sha256, seed, name)
      for variant, name in zip(variants, names, strict=True)
    ]
    likelihood = bits.evaluate(
      self.experiment, self.folder, self.mesh, parameters, weights, sha256, self.held_out, seed
    )
    denoising = self._denoising(parameters, seed) if self.experiment.evaluation.report else None
    if not parallel.is_main():
      return
    last = drawn[-1]
    assert last.samples is not None
    drawing.save_picture(drawing.samples_folder(self.folder) / "final", last.samples, last.labels)
    report = self._report(drawn, likelihood, weights, sha256, seed)
    if self._reference is None:
      say("no scores: the config holds no images back (config.data.source.eval_split or config.data.hold_out)")
    report = model.write_scores(self.folder, report, weights, seed, time.perf_counter() - start)
    if self._reference is not None:
      rows_of = {"generated": report["scores"]["generated"], "real images (floor)": report["scores"]["floor"]}
      if len(drawn) > 1:
        curve = zip(_titles(report["curve"]), report["curve"], strict=True)
        rows_of = {**{title: row["scores"] for title, row in curve}, "real images (floor)": report["scores"]["floor"]}
      say(f"\n{self.space.name} features, {report['num_samples']:,} samples against {report['reference']}")
      say(evaluate.table(rows_of))
      if "frechet" not in self._settings.scores and not self.experiment.evaluation.scores:
        say(
          f"no Frechet distance: {self._space.dimensions:,} dimensions want more samples and reference images than that"
          " (config.evaluation.num_samples, allow_singular), or other features"
        )
    say(bits.table(likelihood) + f"\nscores       {model.scores_path(self.folder)}")
    if denoising is not None:
      nearest = reporting.neighbours(self.extract, last.samples, self.source, self.held_out)
      shown = reporting.content(
        self.experiment, self.folder, report, last.samples, last.labels, denoising, bits.terms(likelihood), nearest
      )
      say(f"report       {reporting.write(self.folder, shown)}")

  def _denoising(self, parameters: Parameters, seed: int) -> reporting.Denoising:
    return reporting.denoising(self.experiment, self.mesh, parameters, self._inputs(reporting.SHOWN), seed)

  def _draw(
    self, variant: Experiment, parameters: Parameters, weights: Weights, sha256: str, seed: int, name: str
  ) -> Drawn:
    count, batch = self.experiment.evaluation.num_samples, self.experiment.evaluation.batch_size
    # The same on each device however many there are, so that the samples are the same numbers.
    experiment = drawing.batches_of(variant, min(batch, count) * self.mesh.size)
    generate, inputs = programs.generate(experiment, self.mesh), self._inputs(count)
    path = drawing.samples_folder(self.folder) / name
    identity = _identity(experiment, sha256, seed, count, inputs)
    array = None
    if parallel.is_main():
      shape = (count, *experiment.model.data_shape)
      array = rows.Rows(path, identity, "samples", shape, np.uint8, damaged=workdir.damaged_folder(self.folder))
    done = parallel.of_main(array.done if array else 0)
    nfe = parallel.of_main(int(array.notes.get("nfe", 0)) if array else 0)
    if done < count:
      rest = f", {count - done:,} of them left" if done else ""
      say(f"sampling {count:,} images from the {weights.name} weights with {experiment.sampler_name}{rest} ...")
      for x, calls in drawing.in_batches(experiment, generate, parameters, seed, count, inputs, start=done):
        drawing.check_finite(experiment, x)
        nfe = max(nfe, int(calls.max()))
        if array is not None:
          array.write(images.to_uint8(x), {"nfe": nfe})
      say(f"{nfe:,} network evaluations each")
    labels = inputs.get("classes")
    if array is None:
      return Drawn(experiment, None, labels, nfe)
    samples = array.finish(**drawing.named(inputs))
    say(f"samples      {path}.npz")
    return Drawn(experiment, samples, labels, nfe)

  def _report(
    self, drawn: list[Drawn], likelihood: dict[str, Any], weights: Weights, sha256: str, seed: int
  ) -> dict[str, Any]:
    experiment, last = self.experiment, drawn[-1]
    c = experiment.evaluation
    report: dict[str, Any] = {
      "num_samples": c.num_samples,
      "sampling": {
        "sampler": last.experiment.sampler_name,
        "arguments": _arguments(last.experiment.tree.values["sampler"]),
        **last.experiment.tree.values["sampling"],
        "batch_size": c.batch_size,
        "nfe": last.nfe,
      },
      "guidance": last.experiment.tree.values["guidance"],
      "classes": "as common as in the data" if last.labels is not None else None,
      "data": describe_data(experiment),
      "dtype": dtype_of(experiment),
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
          "sampler": one.experiment.sampler_name,
          "arguments": _arguments(one.experiment.tree.values["sampler"]),
          "num_steps": one.experiment.sampling.num_steps,
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
      "reference": _describe(self._reference, experiment),
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
    """Return the scores of real images other than the reference's, their number, and why there are no scores if so."""
    assert self._reference is not None
    floor = self._reference.floor
    if floor is None:
      return None, 0, "there are no real images but the reference's"
    chosen = np.random.default_rng(0).permutation(len(floor))[: self.experiment.evaluation.num_samples]
    try:
      summary = self._summary(floor, chosen, self._settings)
      return evaluate.score(summary, self._real, self._settings, evaluate.names_of(self.space)), len(chosen), ""
    except ValueError as error:  # too few for the rank, or for neighbours
      return None, len(chosen), str(error)


def _arguments(node: dict[str, Any] | None) -> dict[str, Any]:
  return {name: value for name, value in (node or {}).items() if name != "component"}


def dtype_of(experiment: Experiment) -> str:
  """Return the type in which the network computes, as far as it says."""
  return np.dtype(getattr(experiment.model.network.module, "dtype", None) or np.float32).name


def describe_data(experiment: Experiment) -> dict[str, Any]:
  """Return which images an experiment names."""
  values = experiment.tree.values["data"]
  return {key: values[key] for key in ("source", "hold_out", "image_size", "crop", "resize")}


def in_parts(source: data.Source, chosen: np.ndarray) -> Iterator[np.ndarray]:
  """Yield the images of a source at some places, a part at a time."""
  for first in range(0, len(chosen), _READ):
    yield reading.read_images(source, chosen[first : first + _READ])


def _describe(reference: spaces.Reference, experiment: Experiment) -> str:
  if reference.statistics is not None:
    return f"statistics of {reference.statistics.features.count or 'an unknown number of'} images in {reference.name}"
  kind = "training" if reference.name == "train" else "held-out"
  low = drawing.enlarged(experiment)
  small = "; the samples are those held-out images made small and enlarged" if low is not None else ""
  return f"{len(reference.images or ()):,} {kind} images{small}"


def _names(variants: Sequence[Experiment], seed: int) -> list[str]:
  """Return the name of each variant's samples: the last one's are the run's own, those alike but for arguments are numbered."""
  names: list[str] = []
  for variant in variants[:-1]:
    name = f"eval_{variant.sampler_name}_{variant.sampling.num_steps}_seed{seed}"
    again = sum(one.partition("__")[0] == name for one in names)
    names.append(f"{name}__{again + 1}" if again else name)
  return [*names, "final"]


def _titles(curve: Sequence[dict[str, Any]]) -> list[str]:
  """Return what rows of a table are called: by the sampler's arguments too, where two have nothing else to tell them apart."""
  titles = [f"{row['sampler']}, NFE {row['nfe']}" for row in curve]
  if len(set(titles)) == len(titles):
    return titles
  return [
    f"{row['sampler']}({', '.join(f'{name}={value}' for name, value in row['arguments'].items())}), NFE {row['nfe']}"
    for row in curve
  ]


def _identity(experiment: Experiment, sha256: str, seed: int, count: int, inputs: Inputs) -> dict[str, Any]:
  """Return all that samples follow from, as JSON."""
  given = {name: metrics.digest(value) for name, value in inputs.items()}
  identity = {"weights": sha256, "seed": seed, "count": count, "inputs": given, "version": ddpm_jax.__version__}
  return json.loads(json.dumps(identity | {"config": experiment.tree.of_roles("model", "sampling")}))
