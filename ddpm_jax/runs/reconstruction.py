"""Reconstruct held-out images with an autoencoder, and report scores of the images and statistics of the latents."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import data, gaussian, metrics, models
from ddpm_jax import report as page
from ddpm_jax.config import Experiment
from ddpm_jax.devices import parallel
from ddpm_jax.devices.progress import print_line
from ddpm_jax.metrics import evaluate
from ddpm_jax.models.guided import Parameters
from ddpm_jax.runs import generation, scoring, spaces
from ddpm_jax.runs.model import Weights
from ddpm_jax.runs.reading import Run
from ddpm_jax.storage import images, records, scores, sealed

Array = jax.Array

# The number of pairs in a preview, and in the report.
_PAIRS, _SHOWN = 32, 24
# The maximum number of latent channels in the report.
_SHOWN_CHANNELS = 32
# The scores of pairs of images.
_PAIR_SCORES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"psnr": metrics.psnr, "ssim": metrics.ssim}


class Batch(NamedTuple):
  """Hold reconstructed images and their latents.

  Attributes:
    images: the originals, uint8 [B, H, W, C].
    reconstructions: the reconstructions, uint8 [B, H, W, C].
    latents: the means of the posteriors, or the vectors of the nearest codes, [B, *space, D]. `space` is the shape of
      the latent positions, such as height and width.
    means: the mean of the latents over positions, for each image [B, D].
    squares: the mean of the squared latents over positions, for each image [B, D]. If the autoencoder has a posterior,
      the mean includes the posterior's variance.
    kl: the KL divergence of each posterior from a standard normal distribution in nats [B]; None if the autoencoder has
      a codebook.
    codes: the codes [B, *space]; None if the autoencoder has no codebook.
  """

  images: np.ndarray
  reconstructions: np.ndarray
  latents: np.ndarray
  means: np.ndarray
  squares: np.ndarray
  kl: np.ndarray | None = None
  codes: np.ndarray | None = None


def program(experiment: Experiment, mesh: jax.sharding.Mesh) -> Callable[[Parameters, Any, Any, Any], dict[str, Array]]:
  """Compile a function that reconstructs a batch from the mean of the posterior or from the nearest codes.

  The function takes the arguments that `generation.run_in_batches` passes. The batch contains the images as `image`,
  and is sharded over the mesh. The result is a dict with the fields of `Batch`, except `images`.
  """
  parts = models.networks.autoencoder(experiment.model.network, experiment.model.shape)

  def reconstruct_shard(params, x):
    latents = parts.encode(params, x)
    axes = tuple(range(1, latents.ndim - 1))
    if parts.quantize is None:
      posterior = gaussian.from_moments(latents)
      z, spread = posterior.mode(), jnp.exp(posterior.log_variance)
      extra = {"kl": posterior.kl()}
    else:
      codes, z = parts.quantize(params, latents)
      spread, extra = jnp.zeros_like(z), {"codes": codes}
    y = parts.decode_output(params, parts.decode_features(params, z))
    moments = {"means": jnp.mean(z, axes), "squares": jnp.mean(jnp.square(z) + spread, axes)}
    return {"reconstructions": y, "latents": z} | moments | extra

  def function(parameters, seed, first, batch):
    del seed, first
    return parallel.map_shards(mesh, reconstruct_shard)(parameters.params, batch["image"])

  return jax.jit(function, out_shardings=parallel.replicated(mesh), compiler_options=parallel.compiler_options(mesh))


def preview(experiment: Experiment, mesh: jax.sharding.Mesh, source: data.Source) -> Callable[[Parameters], np.ndarray]:
  """Return a function from parameters to a few originals, each followed by its reconstruction, uint8 [2 N, H, W, C]."""
  # A picture of 64, 16 or 4 images has an even number of columns, so that pairs stand side by side.
  count = next((size for size in (_PAIRS, 8, 2) if size <= len(source)), 1)
  experiment = _with_batch(experiment, mesh, count)
  function = program(experiment, mesh)

  def run(parameters: Parameters) -> np.ndarray:
    batches = reconstruct(experiment, function, parameters, source, np.arange(count))
    return np.concatenate([_pairs(batch) for batch in batches])

  return run


def _with_batch(experiment: Experiment, mesh: jax.sharding.Mesh, count: int) -> Experiment:
  """Return the experiment with a sampling batch size for `count` images.

  The batch size per device is the same for any number of devices, so results do not depend on this number.
  """
  return experiment.replace(sampling__batch_size=min(experiment.evaluation.batch_size, count) * mesh.size)


def _pairs(batch: Batch) -> np.ndarray:
  """Return originals, each followed by its reconstruction, uint8 [2 B, H, W, C]."""
  pairs = np.stack([batch.images, batch.reconstructions], axis=1)
  return pairs.reshape(-1, *pairs.shape[2:])


def reconstruct(
  experiment: Experiment, function: Callable, parameters: Parameters, source: data.Source, rows: np.ndarray
) -> Iterator[Batch]:
  """Reconstruct images of a source, and yield one `Batch` after another.

  Args:
    experiment: the experiment with the batch size.
    function: the result of `program`.
    parameters: the parameters.
    source: the images.
    rows: the indices of the images to reconstruct.

  Raises:
    FloatingPointError: if a reconstruction or a latent is not finite.
  """
  originals: list[np.ndarray] = []

  def read(indices: np.ndarray) -> dict[str, np.ndarray]:
    originals[:] = [data.read_images(source, rows[indices])]
    return {"image": images.from_uint8(originals[0])}

  results: Iterator[dict[str, np.ndarray]] = generation.run_in_batches(
    experiment, function, parameters, 0, len(rows), read, activity="reconstructing"
  )
  for result in results:
    _check_finite("reconstructions", result["reconstructions"])
    _check_finite("latents", result["squares"])
    result = result | {"reconstructions": images.to_uint8(result["reconstructions"])}
    yield Batch(images=originals[0][: len(result["latents"])], **result)


def _check_finite(name: str, values: np.ndarray) -> None:
  bad = int(np.count_nonzero(~np.isfinite(values).reshape(len(values), -1).all(1)))
  if bad:
    raise FloatingPointError(
      f"Got NaN or infinite values in the {name} of {bad:,} of {len(values):,} images; expected finite values. The weights of"
      " the autoencoder are broken: train with a lower learning rate, or use another checkpoint (--step)."
    )


class Totals:
  """Accumulate scores and statistics of latents over batches, and keep the first images.

  Each score compares a reconstruction with its original.

  Args:
    num_codes: the size of the codebook; 0 without a codebook.
    shown: the number of images to keep.
  """

  def __init__(self, num_codes: int = 0, shown: int = _PAIRS):
    self._shown, self._counts = shown, np.zeros(num_codes, np.int64)
    self._scores: dict[str, list[np.ndarray]] = {name: [] for name in _PAIR_SCORES}
    self._moments: dict[str, list[np.ndarray]] = {"means": [], "squares": [], "kl": []}
    self._kept: list[Batch] = []

  def add(self, batch: Batch) -> None:
    """Add a batch."""
    for name, score in _PAIR_SCORES.items():
      self._scores[name].append(score(batch.images, batch.reconstructions))
    for name, values in self._moments.items():
      if getattr(batch, name) is not None:
        values.append(getattr(batch, name).astype(np.float64))
    if batch.codes is not None:
      self._counts += np.bincount(batch.codes.ravel(), minlength=len(self._counts))
    if sum(len(kept.images) for kept in self._kept) < self._shown:
      self._kept.append(batch)

  def scores(self) -> dict[str, float]:
    """Return the mean of each score over all images, by the score's name."""
    return {name: float(np.mean(np.concatenate(values))) for name, values in self._scores.items()}

  def first_images(self, count: int) -> Batch:
    """Return the first images with their reconstructions and latents."""
    first = {name: np.concatenate([getattr(one, name) for one in self._kept])[:count] for name in Batch._fields[:5]}
    return Batch(**first)

  def latents(self) -> dict[str, Any]:
    """Return statistics of the latents as JSON values.

    Returns:
      A dict with the `shape` of an image's latents, and with the `mean` and `std` of each latent channel over images
      and positions. `mean` and `std` describe samples of the posteriors, or the vectors of the codes. The codec of a
      diffusion model subtracts `mean` from latents and divides by `std`.

      For an autoencoder without a codebook, the dict also has `kl`, the mean KL divergence in nats. For an autoencoder
      with a codebook, it also has the number of codes (`num_codes`), the share of codes that occur (`used_share`), and
      the exponential of the entropy of the codes' frequencies (`perplexity`).
    """
    means, squares = (np.concatenate(self._moments[name]).mean(0) for name in ("means", "squares"))
    statistics: dict[str, Any] = {
      "shape": list(self._kept[0].latents.shape[1:]),
      "mean": [round(float(value), 6) for value in means],
      "std": [round(float(value), 6) for value in np.sqrt(np.maximum(squares - means**2, 0))],
    }
    if self._moments["kl"]:
      return statistics | {"kl": float(np.concatenate(self._moments["kl"]).mean())}
    shares = self._counts[self._counts > 0] / self._counts.sum()
    return statistics | {
      "num_codes": len(self._counts),
      "used_share": float(np.mean(self._counts > 0)),
      "perplexity": float(np.exp(-np.sum(shares * np.log(shares)))),
    }


class Scorer:
  """Score the reconstructions of held-out images.

  The constructor checks everything that the scores need.

  Args:
    run: the autoencoder's run. At most `evaluation.num_samples` held-out images are scored.

  Raises:
    ValueError: if the experiment's features, reference or scores are not available.
  """

  def __init__(self, run: Run):
    self._run, c = run, run.experiment.evaluation
    self._count = min(c.num_samples, len(run.held_out or ()))
    if c.every:
      self.check_scores()
    if run.held_out is None:
      return  # there is nothing to score
    experiment = run.experiment
    if not c.reference:
      # Compare the reconstructions with their originals.
      experiment = experiment.replace(evaluation__reference="held_out")
    self._space = spaces.build_space(experiment, run.source, run.held_out, run.folder / "classifier.safetensors")
    reference = spaces.build_reference(experiment, self._space, run.source, run.held_out)
    assert reference is not None
    self._reference = reference
    self._settings = spaces.build_settings(experiment, self._space, reference, self._count)
    self._experiment = _with_batch(run.experiment, run.mesh, self._count)
    self._program = program(self._experiment, run.mesh)

  def check_scores(self) -> None:
    """Raise a ValueError if there are no held-out images."""
    if self._run.held_out is None:
      raise ValueError(
        "Got no held-out images; expected some to reconstruct and score. Set --config.data.source.eval_split or --config.data.hold_out."
      )

  def check_best_metric(self, metric: str) -> None:
    """Raise a ValueError if `metric` is not the name of a score that training computes."""
    names = [f"eval/{name}" for name in _PAIR_SCORES]
    if metric not in names:
      raise ValueError(f"Got config.training.best_metric={metric!r}; expected one of {', '.join(names)}.")

  def training_scores(self, parameters: Parameters) -> dict[str, float]:
    """Score reconstructions during training, and return the scores under names that start with "eval/"."""
    count = min(self._run.experiment.evaluation.interim_samples or self._count, self._count)
    totals = self._totals()
    for batch in self._reconstruct(parameters, count):
      totals.add(batch)
    return {f"eval/{name}": value for name, value in totals.scores().items()}

  def _totals(self) -> Totals:
    return Totals(getattr(self._run.experiment.model.network.module, "num_codes", 0))

  def _reconstruct(self, parameters: Parameters, count: int) -> Iterator[Batch]:
    held_out = self._run.held_out
    assert held_out is not None
    rows = np.random.default_rng(0).permutation(len(held_out))[:count]
    return reconstruct(self._experiment, self._program, parameters, held_out, rows)

  def score(self, weights: Weights, seed: int, variants: Sequence[Experiment] = ()) -> None:
    """Reconstruct held-out images, and write the scores and the statistics of the latents to eval.json.

    With `evaluation.report`, report.html shows the originals, the reconstructions and the latents.

    Args:
      weights: the weights to score.
      seed: recorded in eval.json; reconstructions are not random.
      variants: ignored, because reconstruction uses no sampler.
    """
    del variants
    start, run = time.perf_counter(), self._run
    if run.held_out is None:
      print_line("no scores: there are no held-out images (see config.data.source.eval_split and config.data.hold_out)")
      return
    print_line(f"reconstructing {self._count:,} held-out images with the {weights.name} weights ...")
    parameters = weights.parameters
    # All processes gather each parameter, because no process may hold all of them.
    sha256 = sealed.digest_all(map(parallel.to_host, jax.tree.leaves(parameters.params)))
    weights = weights._replace(sha256=sha256)
    totals = self._totals()

    def images_of_batches() -> Iterator[np.ndarray]:
      for batch in self._reconstruct(parameters, self._count):
        totals.add(batch)
        yield batch.reconstructions

    # All processes compute the same reconstructions and features.
    summary = evaluate.summarize(self._space.extract, images_of_batches(), self._count, self._settings)
    report = self._report(summary, totals, weights) | {"step": weights.step, "weights": weights.name, "seed": seed}
    if not parallel.is_main():
      return
    report = scores.write(run.folder, report, time.perf_counter() - start)
    rows = report["scores"]
    print_line(f"\n{self._space.name} features, {self._count:,} reconstructions against {report['reference']}")
    print_line(
      evaluate.format_table({"reconstructed": rows["reconstructed"], "real images (floor)": rows["floor"]})
      + f"\n{_describe_latents(report['latents'])}\nscores       {scores.path_of(run.folder)}"
    )
    picture = run.folder / "samples" / "final.png"
    images.save_grid(picture, _pairs(totals.first_images(_PAIRS)), columns=8)
    print_line(f"picture      {picture}")
    if run.experiment.evaluation.report:
      path = run.folder / "report.html"
      page.write(path, content(run, report, totals.first_images(_SHOWN)))
      print_line(f"report       {path}")

  def _report(self, reconstructed: evaluate.Summary, totals: Totals, weights: Weights) -> dict[str, Any]:
    """Return the part of eval.json about the reconstructions and the latents."""
    experiment, reference, space = self._run.experiment, self._reference, self._space
    names = evaluate.score_names(space.feature_space)
    originals = None
    if reference.statistics is not None:
      originals = evaluate.statistics_summary(reference.statistics)
    elif reference.images is not None:
      originals = space.summary(reference.images, np.arange(len(reference.images)), self._settings)
    assert originals is not None
    floor, floor_num, problem = scoring.score_floor(space, reference, originals, self._settings, self._count)
    report: dict[str, Any] = {
      "scores": {
        "reconstructed": totals.scores() | evaluate.score(reconstructed, originals, self._settings, names),
        "floor": floor,
      },
      "latents": totals.latents(),
      "num_samples": self._count,
      "floor_num": floor_num,
      "features": space.name,
      "feature_space": space.feature_space.provenance,
      "reference": scoring.describe_reference(reference),
      "neighbor": experiment.evaluation.k,
      "settings": self._settings._asdict(),
      "data": scoring.describe_data(experiment),
      "dtype": scoring.dtype_of(experiment),
      "weights_sha256": weights.sha256,
    }
    return report | ({"no_floor": problem} if problem else {})


def _describe_latents(statistics: dict[str, Any]) -> str:
  shape, std = "x".join(map(str, statistics["shape"])), ", ".join(f"{value:.3g}" for value in statistics["std"])
  if "kl" in statistics:
    details = f"KL divergence {statistics['kl']:,.1f} nats"
  else:
    details = f"{statistics['used_share']:.1%} of {statistics['num_codes']:,} codes used, perplexity {statistics['perplexity']:,.1f}"
  return f"latents      {shape}, standard deviation {std} by channel, {details}"


def content(run: Run, report: dict[str, Any], shown: Batch) -> page.Content:
  """Return the content of report.html.

  Args:
    run: the run.
    report: the content of eval.json.
    shown: the images to show, with their reconstructions and latents.
  """
  tree, shape = run.experiment.tree, run.experiment.model.data_shape
  statistics, latents = report["latents"], shown.latents[..., :_SHOWN_CHANNELS]
  mean, std = (np.asarray(statistics[name])[: latents.shape[-1]] for name in ("mean", "std"))
  # Black is three standard deviations below the mean, and white is three above.
  pictures = images.to_uint8((latents - mean) / np.maximum(3 * std, 1e-6))
  facts = [
    ("run", str(run.folder)),
    ("data", f"{tree.short_name('data.source')}, {'x'.join(map(str, shape))}"),
    ("network", tree.short_name("model.network")),
    ("latents", "x".join(map(str, statistics["shape"]))),
    ("weights", f"{report['weights']}, step {report['step']:,}"),
    ("images", f"{report['num_samples']:,}"),
  ]
  return page.Content(
    title=run.folder.name,
    facts=facts,
    evaluation=report,
    config=json.loads(json.dumps(tree.values)),
    samples=np.zeros((0, *shape), np.uint8),
    reconstructions=page.Reconstructions(shown.images, shown.reconstructions, pictures),
    metrics=records.read(run.folder / "metrics.jsonl"),
  )
