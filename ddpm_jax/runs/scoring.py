"""Generate samples of a diffusion model, compare them with real images, and report the scores.

If an evaluation is interrupted, the next evaluation continues it.
"""

import functools
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import ddpm_jax
from ddpm_jax import data, metrics
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
from ddpm_jax.storage import frozen_file, images, scores, sealed

# The number of samples in one call of the feature extractor.
_CHUNK = 512


class SampleSet(NamedTuple):
  """Hold the samples of one variant of an experiment.

  Variants differ in the sampler or in the number of steps.

  Attributes:
    experiment: the variant's experiment.
    samples: the samples, uint8 [N, H, W, C].
    nfe: the maximum number of network evaluations for one sample.
  """

  experiment: Experiment
  samples: np.ndarray
  nfe: int

  @property
  def sampler(self) -> dict[str, Any]:
    """Return the name and the arguments of the sampler."""
    node = self.experiment.tree.values["sampler"] or {}
    arguments = {name: value for name, value in node.items() if name != "component"}
    return {"sampler": self.experiment.sampler_name, "arguments": arguments}


class Scorer:
  """Score the weights of a run's model.

  The constructor checks everything that the scores need.

  Args:
    run: the run.

  Raises:
    ValueError: if the experiment's features, reference or scores are not available.
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
      self._interim_count = c.interim_samples or self._count
      self._interim_settings = spaces.build_settings(experiment, self._space, self._reference, self._interim_count)
      self._interim_generate = programs.generate(experiment, run.mesh)

  def check_scores(self) -> None:
    """Raise a ValueError if there is no reference to compare samples with."""
    if self._reference is None:
      raise ValueError(
        "Got no held-out images; expected some to score against. Set --config.data.source.eval_split or --config.data.hold_out, or score"
        " against the training images with --config.evaluation.reference=train."
      )

  def check_best_metric(self, metric: str) -> None:
    """Raise a ValueError if `metric` is not the name of a score that training computes."""
    # The classifier need not be trained here, because its scores have the same names as the scores of pixels.
    space = self._space.feature_space if self._space.name == "inception" else metrics.pixel_space()
    logged = [f"eval/{name}" for name in evaluate.logged_names(self._interim_settings, evaluate.score_names(space))]
    if metric not in logged:
      raise ValueError(f"Got config.training.best_metric={metric!r}; expected one of {', '.join(logged)}.")

  @functools.cached_property
  def _reference_summary(self) -> evaluate.Summary:
    """Return a summary of the features of the reference."""
    reference = self._reference
    assert reference is not None
    if reference.statistics is not None:
      return evaluate.statistics_summary(reference.statistics)
    assert reference.images is not None
    count = len(reference.images)
    print_line(f"extracting {self._space.name} features of {count:,} reference images ...")
    return self._space.summary(reference.images, np.arange(count), self._settings)

  def _score_summary(self, summary: evaluate.Summary, settings: evaluate.Settings) -> evaluate.Scores:
    """Compute scores from a summary of the samples' features and the summary of the reference."""
    return evaluate.score(summary, self._reference_summary, settings, evaluate.score_names(self._space.feature_space))

  def _score_samples(self, samples: np.ndarray, settings: evaluate.Settings) -> evaluate.Scores:
    """Score samples, uint8 [N, H, W, C]."""
    chunks = (samples[first : first + _CHUNK] for first in range(0, len(samples), _CHUNK))
    return self._score_summary(evaluate.summarize(self._space.extract, chunks, len(samples), settings), settings)

  def training_scores(self, parameters: Parameters) -> evaluate.Scores:
    """Score a few samples during training, and return the scores under names that start with "eval/".

    All processes must call this method, and all get the scores.
    """
    count, experiment = self._interim_count, self._run.experiment
    samples, _ = generation.generate_samples(
      experiment, self._interim_generate, parameters, experiment.seed, count, self._inputs(count)
    )
    return {f"eval/{name}": value for name, value in self._score_samples(samples, self._interim_settings).items()}

  def _inputs(self, count: int) -> Inputs:
    """Return the conditions of `count` samples."""
    experiment, source, held_out = self._run.experiment, self._run.source, self._run.held_out
    # Samples are compared with the data, so classes must be as frequent as in the data.
    counts = generation.class_counts(experiment, source)
    return default_inputs(experiment.model.conditions, count, source if held_out is None else held_out, counts)

  def score(self, weights: Weights, seed: int, variants: Sequence[Experiment] = ()) -> None:
    """Generate and score samples, and write the scores to eval.json.

    The samples are saved in samples/. eval.json also has the likelihoods, if the config requests them. With
    `evaluation.report`, report.html shows the samples and the scores.

    Args:
      weights: the weights to sample from.
      seed: the seed of the samples.
      variants: copies of the experiment with other samplers or numbers of steps. Each copy is scored, and the scores of
        the last copy are the main scores. By default, the only variant is the run's experiment.
    """
    start, run = time.perf_counter(), self._run
    variants = list(variants) or [run.experiment]
    weights = weights._replace(sha256=digest(weights.parameters))
    inputs = self._inputs(self._count)
    names = zip(variants, _names(variants, seed), strict=True)
    generated = [self._generate(variant, weights, seed, name, inputs) for variant, name in names]
    likelihood = likelihoods.evaluate(run, weights, seed)
    frames = None
    if run.experiment.evaluation.report:
      shown_inputs = self._inputs(reporting.SHOWN)
      frames = reporting.denoising(run.experiment, run.mesh, weights.parameters, shown_inputs, seed)
    # Only the main process has samples.
    sample_sets = [sample_set for sample_set in generated if sample_set is not None]
    if not sample_sets:
      return
    samples, classes = sample_sets[-1].samples, inputs.get("classes")
    picture = run.folder / "samples" / "final.png"
    images.save_samples(picture, samples, classes)
    print_line(f"picture      {picture}")
    report = self._report(sample_sets, inputs, likelihood, weights)
    report |= self.judge(samples, inputs)
    report |= {"step": weights.step, "weights": weights.name, "seed": seed}
    report = scores.write(run.folder, report, time.perf_counter() - start)
    self._print(report, likelihood)
    if frames is not None:
      nearest = reporting.neighbors(self._space.extract, samples, run.source, run.held_out)
      terms = likelihood.get("bound", {}).get("terms")
      content = reporting.content(run, report, samples, classes, frames, terms, nearest)
      path = run.folder / "report.html"
      page.write(path, content)
      print_line(f"report       {path}")

  def _generate(self, variant: Experiment, weights: Weights, seed: int, name: str, inputs: Inputs) -> SampleSet | None:
    """Load the saved samples of a variant from samples/, then generate and save the missing samples.

    Only the main process gets the samples. Other processes get None.
    """
    run, count, mesh = self._run, self._count, self._run.mesh
    # Use the same batch size per device for any number of devices, so that samples are equal bit for bit.
    size = min(run.experiment.evaluation.batch_size, count) * mesh.size
    experiment = variant.replace(sampling__batch_size=size)
    generate = programs.generate(experiment, mesh)

    def compute(done: int, notes: dict[str, int]) -> Iterator[tuple[np.ndarray, dict[str, int]]]:
      max_nfe, remaining = notes.get("nfe", 0), f" ({count - done:,} remaining)" if done else ""
      print_line(
        f"sampling {count:,} images{remaining} from the {weights.name} weights with {experiment.sampler_name} ..."
      )
      for x, nfe in generation.run_in_batches(
        experiment, generate, weights.parameters, seed, count, inputs, start=done
      ):
        generation.check_finite(experiment, x)
        max_nfe = max(max_nfe, int(nfe.max()))
        yield images.to_uint8(x), {"nfe": max_nfe}
      print_line(f"{max_nfe:,} network evaluations each")

    path = run.folder / "samples" / name
    shape_dtype = (count, *experiment.model.data_shape), np.uint8
    identity = _identity(experiment, weights.sha256, seed, count, inputs)
    rows = generation.cached_rows(run.folder, path, identity, "samples", shape_dtype, compute)
    if rows is None:
      return None
    samples = rows.finish(**generation.saved_inputs(inputs))
    print_line(f"samples      {path}.npz")
    return SampleSet(experiment, samples, rows.notes["nfe"])

  def _report(
    self, sample_sets: list[SampleSet], inputs: Inputs, likelihood: dict[str, Any], weights: Weights
  ) -> dict[str, Any]:
    """Return the part of eval.json about the samples and their scores."""
    experiment, last, reference = self._run.experiment, sample_sets[-1], self._reference
    c, values = experiment.evaluation, last.experiment.tree.values
    report: dict[str, Any] = {
      "num_samples": self._count,
      "sampling": {**last.sampler, **values["sampling"], "batch_size": c.batch_size, "nfe": last.nfe},
      "guidance": values["guidance"],
      "classes": "as common as in the data" if "classes" in inputs else None,
      "data": describe_data(experiment),
      "dtype": dtype_of(experiment),
      "weights_sha256": weights.sha256,
    }
    if texts := self._describe_texts(inputs):
      report["texts"] = texts
    if likelihood:
      report["likelihood"] = {
        kind: {key: value for key, value in summary.items() if key != "terms"} for kind, summary in likelihood.items()
      }
    if reference is None:
      return report
    curve = [
      sample_set.sampler
      | {"num_steps": sample_set.experiment.sampling.num_steps, "nfe": sample_set.nfe}
      | {"scores": self._score_samples(sample_set.samples, self._settings)}
      for sample_set in sample_sets
    ]
    summary, settings = self._reference_summary, self._settings
    floor, num_floor, problem = score_floor(self._space, reference, summary, settings, self._count)
    kernel_size, reference_features = None, self._reference_summary.pairwise_features
    if reference_features is not None:
      kernel_size = c.kernel_size or evaluate.kernel_size(len(reference_features), min(self._count, c.pairwise_samples))
    report |= {
      "scores": {"generated": curve[-1]["scores"], "floor": floor},
      "floor_num": num_floor,
      "features": self._space.name,
      "feature_space": self._space.feature_space.provenance,
      "reference": _describe(reference, experiment),
      "reference_num": self._reference_summary.count,
      "neighbor": c.k,
      "settings": self._settings._asdict() | {"kernel_size": kernel_size},
    }
    if problem:
      report["no_floor"] = problem
    if len(sample_sets) > 1:
      report["curve"] = curve
    return report

  def judge(self, samples: np.ndarray, inputs: Inputs) -> dict[str, Any]:
    """Return additional scores of samples, uint8 [N, H, W, C], as JSON values.

    A task with additional scores overrides this method. `inputs` are the conditions of the samples.
    """
    return {}

  def _describe_texts(self, inputs: Inputs) -> dict[str, str]:
    """Return a description of the texts that samples were generated from, for each text condition by name."""
    split, count = ("training" if self._run.held_out is None else "held-out"), self._count
    return {
      name: f"captions of {count:,} {split} images chosen at random, {len(np.unique(texts)):,} of them different"
      for name, texts in inputs.items()
      if data.is_text(np.asarray(texts))
    }

  def _print(self, report: dict[str, Any], likelihood: dict[str, Any]) -> None:
    """Print the scores as tables."""
    for name, description in report.get("texts", {}).items():
      print_line(f"{name:<13}{description}")
    if self._reference is None:
      print_line("no scores: there are no held-out images (see config.data.source.eval_split and config.data.hold_out)")
    else:
      curve = report.get("curve", [])
      table = {title: row["scores"] for title, row in zip(_titles(curve), curve, strict=True)}
      table = table or {"generated": report["scores"]["generated"]}
      print_line(f"\n{self._space.name} features, {self._count:,} samples against {report['reference']}")
      print_line(evaluate.format_table(table | {"real images (floor)": report["scores"]["floor"]}))
      if "frechet" not in self._settings.scores and not self._run.experiment.evaluation.scores:
        print_line(
          f"no Frechet distance: it needs more samples and more reference images than the {self._space.dimensions:,} dimensions of the features"
          " (see config.evaluation.num_samples and allow_singular), or other features"
        )
    print_line(likelihoods.table(likelihood) + f"\nscores       {scores.path_of(self._run.folder)}")


def score_floor(
  space: spaces.Space,
  reference: spaces.Reference,
  summary: evaluate.Summary,
  settings: evaluate.Settings,
  count: int,
) -> tuple[evaluate.Scores | None, int, str]:
  """Score real images that are not in the reference.

  Their scores are the floor that the scores of samples are compared with.

  Args:
    space: the feature space.
    reference: the reference.
    summary: the feature summary of the reference.
    settings: the settings of the scores.
    count: the maximum number of images to score.

  Returns:
    The scores, the number of images, and an empty string. If the scores cannot be computed, they are None, and the
    string is the reason.
  """
  if reference.floor is None:
    return None, 0, "there are no real images outside the reference"
  chosen = np.random.default_rng(0).permutation(len(reference.floor))[:count]
  try:
    floor = space.summary(reference.floor, chosen, settings)
    return evaluate.score(floor, summary, settings, evaluate.score_names(space.feature_space)), len(chosen), ""
  except ValueError as error:  # too few images for the covariance's rank or for neighbors
    return None, len(chosen), str(error)


def digest(parameters: Parameters) -> str:
  """Return the SHA-256 of all loaded parameters.

  The digest does not depend on the number of devices. It covers the frozen parameters too, because samples depend on
  them. All processes must call this function, because each process may have only a part of the parameters.
  """
  leaves = [*jax.tree.leaves(parameters.params), *frozen_file.loaded_leaves(parameters.frozen)]
  return sealed.digest_all(map(parallel.to_host, [*leaves, *frozen_file.loaded_leaves(parameters.guides)]))


def dtype_of(experiment: Experiment) -> str:
  """Return the dtype that the network computes in: its attribute `dtype`, by default float32."""
  return np.dtype(getattr(experiment.model.network.module, "dtype", None) or np.float32).name


def describe_data(experiment: Experiment) -> dict[str, Any]:
  """Return the part of the config that determines the images, as values by key."""
  values = experiment.tree.values["data"]
  return {key: values[key] for key in ("source", "hold_out", "image_size", "crop", "resize")}


def describe_reference(reference: spaces.Reference) -> str:
  """Describe the reference of scores in words."""
  if reference.statistics is not None:
    return f"statistics of {reference.statistics.features.count or 'an unknown number of'} images in {reference.name}"
  return f"{len(reference.images or ()):,} {'training' if reference.name == 'train' else 'held-out'} images"


def _describe(reference: spaces.Reference, experiment: Experiment) -> str:
  is_superres = reference.statistics is None and generation.low_res_name(experiment) is not None
  note = "; the samples are held-out images, downsampled and enlarged again" if is_superres else ""
  return f"{describe_reference(reference)}{note}"


def _names(variants: Sequence[Experiment], seed: int) -> list[str]:
  """Return a file name for the samples of each variant: "final" for the last one, and unique names for the others."""
  names: list[str] = []
  for variant in variants[:-1]:
    name = f"eval_{variant.sampler_name}_{variant.sampling.num_steps}_seed{seed}"
    num_equal = sum(earlier.partition("__")[0] == name for earlier in names)
    names.append(f"{name}__{num_equal + 1}" if num_equal else name)
  return [*names, "final"]


def _titles(curve: Sequence[dict[str, Any]]) -> list[str]:
  """Return the titles of a table's rows, with the samplers' arguments if the short titles are not unique."""
  titles = [f"{row['sampler']}, NFE {row['nfe']}" for row in curve]
  if len(set(titles)) == len(titles):
    return titles
  return [
    f"{row['sampler']}({', '.join(f'{name}={value}' for name, value in row['arguments'].items())}), NFE {row['nfe']}"
    for row in curve
  ]


def _identity(experiment: Experiment, sha256: str, seed: int, count: int, inputs: Inputs) -> dict[str, Any]:
  """Return everything that determines the samples, as JSON values."""
  digests = {name: metrics.digest(value) for name, value in inputs.items()}
  identity = {"weights": sha256, "seed": seed, "count": count, "inputs": digests, "version": ddpm_jax.__version__}
  return json.loads(json.dumps(identity | {"config": experiment.tree.with_roles("model", "sampling")}))
