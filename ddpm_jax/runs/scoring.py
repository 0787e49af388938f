"""Scores of a model that denoises: its samples drawn, compared with real images and reported. An interrupted evaluation goes on."""

import functools
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import ddpm_jax
from ddpm_jax import metrics
from ddpm_jax import report as page
from ddpm_jax.config import Experiment
from ddpm_jax.devices import parallel
from ddpm_jax.devices.progress import print_line
from ddpm_jax.metrics import evaluate
from ddpm_jax.models.guided import Parameters
from ddpm_jax.models.inputs import default_inputs
from ddpm_jax.runs import generation, likelihoods, programs, reporting, spaces
from ddpm_jax.runs.generation import Inputs
from ddpm_jax.runs.model import Weights
from ddpm_jax.runs.reading import Run
from ddpm_jax.storage import images, scores

# Samples whose features are taken at a time.
_PART = 512


class SampleSet(NamedTuple):
  """Samples of a variant, uint8 [N, H, W, C], and network evaluations of each at most."""

  experiment: Experiment
  samples: np.ndarray
  nfe: int

  @property
  def sampler(self) -> dict[str, Any]:
    """The name and the arguments of the sampler."""
    node = self.experiment.tree.values["sampler"] or {}
    arguments = {name: value for name, value in node.items() if name != "component"}
    return {"sampler": self.experiment.sampler_name, "arguments": arguments}


class Scorer:
  """Scores the weights of a run's model. Making one checks that everything can be done.

  Args:
    run: whose model it is.

  Raises:
    ValueError: if the features, the reference or the scores that the experiment asks for cannot be had.
  """

  def __init__(self, run: Run):
    experiment, c, sources = run.experiment, run.experiment.evaluation, (run.source, run.held_out)
    self._run, self._count = run, c.num_samples
    likelihoods.check(experiment, run.held_out)
    self._space = spaces.build_space(experiment, *sources, run.folder / "classifier.safetensors")
    self._reference = spaces.build_reference(experiment, self._space, *sources)
    if self._reference is not None:
      self._settings = spaces.build_settings(experiment, self._space, self._reference, self._count)
    if c.every:
      self.check_scores()
      assert self._reference is not None
      self._quick_count = c.interim_samples or self._count
      self._quick_settings = spaces.build_settings(experiment, self._space, self._reference, self._quick_count)
      self._quick = programs.generate(experiment, run.mesh)

  def check_scores(self) -> None:
    """Raise a ValueError if there is nothing to score against."""
    if self._reference is None:
      raise ValueError(
        "Got no held-out images to score against; set --config.data.source.eval_split or --config.data.hold_out, or score against the training"
        " images: --config.evaluation.reference=train."
      )

  def check_best_metric(self, metric: str) -> None:
    """Raise a ValueError if training does not compute this metric."""
    # The classifier's scores have the names of those of pixels.
    space = self._space.feature_space if self._space.name == "inception" else metrics.pixel_space()
    known = [f"eval/{name}" for name in evaluate.logged_names(self._quick_settings, evaluate.score_names(space))]
    if metric not in known:
      raise ValueError(f"Got config.training.best_metric={metric!r}; expected one of {', '.join(known)}.")

  @functools.cached_property
  def _real(self) -> evaluate.Summary:
    """The summary of the reference."""
    reference = self._reference
    assert reference is not None
    if reference.statistics is not None:
      return evaluate.statistics_summary(reference.statistics)
    assert reference.images is not None
    count = len(reference.images)
    print_line(f"{self._space.name} features of {count:,} reference images ...")
    return self._space.summary(reference.images, np.arange(count), self._settings)

  def _compared(self, summary: evaluate.Summary, settings: evaluate.Settings) -> evaluate.Scores:
    """Return the scores of images against the reference."""
    return evaluate.score(summary, self._real, settings, evaluate.score_names(self._space.feature_space))

  def _scores(self, samples: np.ndarray, settings: evaluate.Settings) -> evaluate.Scores:
    """Return the scores of samples uint8 [N, H, W, C]."""
    parts = (samples[first : first + _PART] for first in range(0, len(samples), _PART))
    return self._compared(evaluate.summarize(self._space.extract, parts, len(samples), settings), settings)

  def training_scores(self, parameters: Parameters) -> evaluate.Scores:
    """Return scores of a few samples while training goes on, by name with `eval/` before it; in every process."""
    count, experiment = self._quick_count, self._run.experiment
    samples, _ = generation.generate_samples(
      experiment, self._quick, parameters, experiment.seed, count, self._inputs(count)
    )
    return {f"eval/{name}": value for name, value in self._scores(samples, self._quick_settings).items()}

  def _inputs(self, count: int) -> Inputs:
    experiment, source, held_out = self._run.experiment, self._run.source, self._run.held_out
    # As common as in the data, with whose images the samples are compared.
    counts = generation.class_counts(experiment, source)
    return default_inputs(experiment.model.conditions, count, source if held_out is None else held_out, counts)

  def score(self, weights: Weights, seed: int, variants: Sequence[Experiment] = ()) -> None:
    """Write samples of some weights into samples/, and their scores into eval.json and report.html; the last variant is the headline."""
    start, run = time.perf_counter(), self._run
    variants = list(variants) or [run.experiment]
    parameters = parallel.gather(run.mesh, weights.parameters)
    # Of the frozen ones too: samples follow from them as well.
    sha256 = metrics.digest(*map(np.asarray, jax.tree.leaves(jax.device_get(parameters))))
    weights = weights._replace(parameters=parameters, sha256=sha256)
    inputs = self._inputs(self._count)
    named = zip(variants, _names(variants, seed), strict=True)
    drawn = [self._draw(variant, weights, seed, name, inputs) for variant, name in named]
    likelihood = likelihoods.evaluate(run, weights, seed)
    way = None
    if run.experiment.evaluation.report:
      asked = self._inputs(reporting.SHOWN)
      way = reporting.denoising(run.experiment, run.mesh, weights.parameters, asked, seed)
    # None but in the first process.
    found = [one for one in drawn if one is not None]
    if not found:
      return
    samples, classes = found[-1].samples, inputs.get("classes")
    picture = run.folder / "samples" / "final.png"
    images.save_samples(picture, samples, classes)
    print_line(f"picture      {picture}")
    report = self._report(found, classes is not None, likelihood, weights)
    report |= {"step": weights.step, "weights": weights.name, "seed": seed}
    report = scores.write(run.folder, report, time.perf_counter() - start)
    self._say(report, likelihood)
    if way is not None:
      nearest = reporting.neighbors(self._space.extract, samples, run.source, run.held_out)
      terms = likelihood.get("bound", {}).get("terms")
      shown = reporting.content(run, report, samples, classes, way, terms, nearest)
      path = run.folder / "report.html"
      page.write(path, shown)
      print_line(f"report       {path}")

  def _draw(self, variant: Experiment, weights: Weights, seed: int, name: str, inputs: Inputs) -> SampleSet | None:
    """Draw samples of a variant into samples/, or read those that are there."""
    run, count, mesh = self._run, self._count, self._run.mesh
    # The same on each device however many there are, so that the samples are the same numbers.
    size = min(run.experiment.evaluation.batch_size, count) * mesh.size
    experiment = variant.replace(sampling__batch_size=size)
    generate = programs.generate(experiment, mesh)

    def parts(done: int, notes: dict[str, int]) -> Iterator[tuple[np.ndarray, dict[str, int]]]:
      nfe, rest = notes.get("nfe", 0), f", {count - done:,} of them left" if done else ""
      print_line(f"sampling {count:,} images from the {weights.name} weights with {experiment.sampler_name}{rest} ...")
      for x, calls in generation.run_in_batches(
        experiment, generate, weights.parameters, seed, count, inputs, start=done
      ):
        generation.check_finite(experiment, x)
        nfe = max(nfe, int(calls.max()))
        yield images.to_uint8(x), {"nfe": nfe}
      print_line(f"{nfe:,} network evaluations each")

    path = run.folder / "samples" / name
    like = (count, *experiment.model.data_shape), np.uint8
    identity = _identity(experiment, weights.sha256, seed, count, inputs)
    rows = generation.cached_rows(run.folder, path, identity, "samples", like, parts)
    if rows is None:
      return None
    samples = rows.finish(**generation.saved_inputs(inputs))
    print_line(f"samples      {path}.npz")
    return SampleSet(experiment, samples, rows.notes["nfe"])

  def _report(
    self, drawn: list[SampleSet], has_classes: bool, likelihood: dict[str, Any], weights: Weights
  ) -> dict[str, Any]:
    """Return all that eval.json says of samples."""
    experiment, last, reference = self._run.experiment, drawn[-1], self._reference
    c, values = experiment.evaluation, last.experiment.tree.values
    report: dict[str, Any] = {
      "num_samples": self._count,
      "sampling": {**last.sampler, **values["sampling"], "batch_size": c.batch_size, "nfe": last.nfe},
      "guidance": values["guidance"],
      "classes": "as common as in the data" if has_classes else None,
      "data": describe_data(experiment),
      "dtype": dtype_of(experiment),
      "weights_sha256": weights.sha256,
    }
    if likelihood:
      report["likelihood"] = {
        kind: {key: value for key, value in found.items() if key != "terms"} for kind, found in likelihood.items()
      }
    if reference is None:
      return report
    curve = [
      one.sampler
      | {"num_steps": one.experiment.sampling.num_steps, "nfe": one.nfe}
      | {"scores": self._scores(one.samples, self._settings)}
      for one in drawn
    ]
    floor, number, why = self._floor(reference)
    kernel_size = None
    if self._real.pairwise_features is not None:
      kernel_size = c.kernel_size or evaluate.kernel_size(
        len(self._real.pairwise_features), min(self._count, c.pairwise_samples)
      )
    report |= {
      "scores": {"generated": curve[-1]["scores"], "floor": floor},
      "floor_num": number,
      "features": self._space.name,
      "feature_space": self._space.feature_space.provenance,
      "reference": _describe(reference, experiment),
      "reference_num": self._real.count,
      "neighbor": c.k,
      "settings": self._settings._asdict() | {"kernel_size": kernel_size},
    }
    if why:
      report["no_floor"] = why
    if len(drawn) > 1:
      report["curve"] = curve
    return report

  def _floor(self, reference: spaces.Reference) -> tuple[evaluate.Scores | None, int, str]:
    """Return the scores of real images other than the reference's, their number, and why there are no scores if so."""
    if reference.floor is None:
      return None, 0, "there are no real images but the reference's"
    chosen = np.random.default_rng(0).permutation(len(reference.floor))[: self._count]
    try:
      summary = self._space.summary(reference.floor, chosen, self._settings)
      return self._compared(summary, self._settings), len(chosen), ""
    except ValueError as error:  # too few for the rank, or for neighbors
      return None, len(chosen), str(error)

  def _say(self, report: dict[str, Any], likelihood: dict[str, Any]) -> None:
    """Print the scores as tables."""
    if self._reference is None:
      print_line("no scores: the config holds no images back (config.data.source.eval_split or config.data.hold_out)")
    else:
      curve = report.get("curve", [])
      table = {title: row["scores"] for title, row in zip(_titles(curve), curve, strict=True)}
      table = table or {"generated": report["scores"]["generated"]}
      print_line(f"\n{self._space.name} features, {self._count:,} samples against {report['reference']}")
      print_line(evaluate.format_table(table | {"real images (floor)": report["scores"]["floor"]}))
      if "frechet" not in self._settings.scores and not self._run.experiment.evaluation.scores:
        print_line(
          f"no Frechet distance: {self._space.dimensions:,} dimensions want more samples and reference images than that"
          " (config.evaluation.num_samples, allow_singular), or other features"
        )
    print_line(likelihoods.table(likelihood) + f"\nscores       {scores.path_of(self._run.folder)}")


def dtype_of(experiment: Experiment) -> str:
  """Return the type in which the network computes, as far as it says."""
  return np.dtype(getattr(experiment.model.network.module, "dtype", None) or np.float32).name


def describe_data(experiment: Experiment) -> dict[str, Any]:
  """Return which images an experiment names."""
  values = experiment.tree.values["data"]
  return {key: values[key] for key in ("source", "hold_out", "image_size", "crop", "resize")}


def _describe(reference: spaces.Reference, experiment: Experiment) -> str:
  if reference.statistics is not None:
    return f"statistics of {reference.statistics.features.count or 'an unknown number of'} images in {reference.name}"
  kind = "training" if reference.name == "train" else "held-out"
  low = generation.low_res_name(experiment)
  small = "; the samples are those held-out images made small and enlarged" if low is not None else ""
  return f"{len(reference.images or ()):,} {kind} images{small}"


def _names(variants: Sequence[Experiment], seed: int) -> list[str]:
  """Return a file name for each variant's samples. The last one is the run's own; equal names are numbered."""
  names: list[str] = []
  for variant in variants[:-1]:
    name = f"eval_{variant.sampler_name}_{variant.sampling.num_steps}_seed{seed}"
    again = sum(one.partition("__")[0] == name for one in names)
    names.append(f"{name}__{again + 1}" if again else name)
  return [*names, "final"]


def _titles(curve: Sequence[dict[str, Any]]) -> list[str]:
  """Return the names of a table's rows, with the sampler's arguments where two would be equal."""
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
  return json.loads(json.dumps(identity | {"config": experiment.tree.with_roles("model", "sampling")}))
