"""The sections of a config: each key with its type, its default, its bounds and what it is for.

A key is part of the model ("model"); fixed for a run ("run"); free, but what samples follow from ("sampling"); free; a matter of speed; or the
place of a file, which may move ("place"). Resuming, using half-finished evaluations again and exporting derive from that.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any

import numpy as np

from ddpm_jax import data, editing, losses, models, predictions, processes, sampling
from ddpm_jax.config import slots
from ddpm_jax.config.components import ROLES, Parameter
from ddpm_jax.config.slots import Slot
from ddpm_jax.config.values import Bounds

MODEL, RUN, SAMPLING, FREE, SPEED, PLACE = ROLES

# The places that keys are: what the program gives to components there.
_SOURCE = Slot(
  "a source of data (data.Splits)", (data.Splits,), "data", "folder(path='/images')", offers=(data.Fit, "fit")
)
_PROCESS = slots.slot_of(processes.Process)
_PREDICTION = slots.slot_of(predictions.Prediction, offers=(processes.Process,))
_CODEC = Slot("a codec", (models.Codec,), "codecs", "pixels", offers=("data_shape",))
_CONDITIONS = Slot(
  "a condition", (models.Condition,), "conditions", "classes(number=10, dropout=0.1)", offers=("name", "data_shape")
)
_NETWORK = Slot(
  "a network",
  (models.Network,),
  "networks",
  "UNet(channels=64)",
  offers=("out_channels", "dimensions", "num_classes", "vector_embedding", "shape", "conditions"),
)
_MODEL = Slot("a model", (models.Model,), "diffusers", "my_file.py:my_model")
_OBJECTIVE = Slot(
  "an objective",
  (losses.Objective,),
  "losses",
  "denoising(weighting=min_snr(gamma=5))",
  offers=(losses.Apply, processes.Process, predictions.Prediction, models.Model, "time_input"),
)
_SAMPLER = slots.slot_of(sampling.Sampler, offers=(processes.Process,))
_GRID = Slot(
  "a grid of times", (np.ndarray,), "grids", "karras(rho=7)", offers=(processes.Process, "num_steps"), later=True
)
_CLIP = Slot(
  "a rule that clips estimates",
  (predictions.Denoise,),
  "guidance",
  "dynamic_threshold(percentile=0.995)",
  offers=("denoise",),
  needs=("denoise",),
  later=True,
)
_GUIDANCE = Slot(
  "a rule of guidance",
  (predictions.Denoise,),
  "guidance",
  "classifier_free(scale=3)",
  offers=("conditional", "condition", "negative", "denoise", "weak", "log_prob", "outside", processes.Process),
  needs=("condition", "weak", "log_prob"),
  later=True,
)
_METHOD = Slot(
  "a method of editing",
  (sampling.Sampler, predictions.Denoise),
  "editing",
  "repaint(resamples=10)",
  offers=("sampler", "denoise", "known", "keep", "operator", "measurement", processes.Process),
  needs=("known", "measurement"),
  later=True,
)
_OPERATOR = slots.slot_of(editing.Operator)
_TASK = Slot("a task", ("Task",), "tasks", "denoise")

_NOT_NEGATIVE, _POSITIVE = Bounds(), Bounds(above=0)


def key(default: Any, role: str = "", bounds: Bounds = _NOT_NEGATIVE, **about: Any) -> Any:
  """Return the field of a key, with what else is known `about` it; without a role, it has that of its section."""
  return field(default=default, metadata={"role": role, "bounds": bounds, **about})


def section(kind: type, role: str = RUN, slot: Slot | None = None) -> Any:
  """Return the field of a section, whose keys are for `role` unless they say otherwise."""
  return field(default_factory=kind, metadata={"role": role, "section": kind, "slot": slot})


def count(default: int, role: str = "") -> Any:
  """Return the field of a number of something, 1 or more."""
  return key(default, role, Bounds(least=1, counts=True))


@dataclasses.dataclass(frozen=True)
class Data:
  """Which data there are, and how they are read."""

  source: Any = key("data.tfds(name='cifar10')", slot=_SOURCE)
  image_size: int | tuple[int, int] = count(32, MODEL)  # the side of a square, or (height, width)
  channels: int = count(3, MODEL)
  crop: int = key(0)  # above 0: the side of a centered square that is cut out before resizing
  resize: str = key("bicubic")  # bicubic, box (down-sampled ImageNet) or adm
  flip: bool = key(True)
  hold_out: int = key(
    0, bounds=Bounds(least=-1)
  )  # images kept from training for evaluation, without an eval_split; -1: a tenth, at most 500
  broken: str = key("stop", FREE)  # at images that cannot be decoded; or skip: the next that can stands in
  num_threads: int = count(4, SPEED)
  num_workers: int = key(0, SPEED)  # processes that decode ahead, instead of threads

  @property
  def space(self) -> tuple[int, int]:
    """Height and width."""
    size = self.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return height, width

  @property
  def shape(self) -> tuple[int, int, int]:
    """[H, W, C]."""
    return (*self.space, self.channels)


@dataclasses.dataclass(frozen=True)
class Parts:
  """What a model is made of."""

  process: Any = key("processes.discrete(betas=schedules.linear())", slot=_PROCESS)
  prediction: Any = key("predictions.EPS", slot=_PREDICTION)
  codec: Any = key("codecs.pixels", slot=_CODEC)
  conditions: Mapping[str, Any] = key((), slot=_CONDITIONS, many=True)
  network: Any = key("networks.UNet", slot=_NETWORK)


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """How parameters follow from gradients."""

  name: str = key("adam")  # adam, adamw, lion, sgd or another of optax's functions that take a learning rate
  arguments: str = key("")  # of that function, such as "b2=0.95, weight_decay=0.01"
  learning_rate: float = key(2e-4, bounds=_POSITIVE)
  schedule: str = key("constant")  # constant, cosine, linear or inverse_sqrt, after a linear warm-up
  warmup_steps: int = key(5000)
  decay_steps: int = key(0)  # the end of cosine and linear, 0: training.steps; the start of inverse_sqrt, 0: warm-up
  final_factor: float = key(0.0)  # of cosine and linear: the share of the rate that is left at the end
  clip_norm: float = key(1.0)  # the largest global norm of a gradient; 0: any


@dataclasses.dataclass(frozen=True)
class Ema:
  """How parameters are averaged."""

  kind: str = key("fixed")  # fixed, half_life (EDM) or power (EDM2)
  decay: float = key(0.9999)  # of fixed, which has a warm-up
  half_life: int = key(500_000)  # of half_life, in images
  ramp_up: float = key(0.05)  # of half_life: no longer than this share of the images seen; 0: no such limit
  stds: Sequence[float] = key(
    (0.05, 0.1)
  )  # of power: relative widths; the first average is previewed, sampled and scored
  snapshot_every: int = key(0, FREE)  # of power: steps between the averages stored for other widths; 0: none are


@dataclasses.dataclass(frozen=True)
class Training:
  """How long and in what parts a run goes on."""

  batch_size: int = count(128)  # over all devices
  steps: int = count(800_000, FREE)
  accumulate: int = count(1, SPEED)  # parts of each device's share of the batch, one after the other, to save memory
  max_skipped: int = count(10, FREE)  # steps in a row whose gradients may be not finite
  log_every: int = count(100, FREE)
  checkpoint_every: int = count(5000, FREE)
  sample_every: int = count(5000, FREE)
  keep_checkpoints: int = count(2, FREE)  # the newest
  keep_every: int = key(0, FREE)  # checkpoints of every so many steps are kept too; 0: none
  keep_best: int = key(0, FREE)  # and so many of the best, by the lowest
  best_metric: str = key("loss", FREE)  # of those in metrics.jsonl
  wandb: str = key("", FREE)  # a project, to send metrics and pictures there too


@dataclasses.dataclass(frozen=True)
class Parallel:
  """How devices share the work."""

  data: int = key(0)  # devices that each have a copy of the state; 0: as many as there are, divided by fsdp
  fsdp: int = key(1)  # devices that share one copy


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How samples are drawn by the sampler."""

  num_steps: int = count(1000)
  grid: Callable | None = key(None, slot=_GRID)  # None: what suits the sampler and the process
  clip: Callable | None = key("guidance.clip", slot=_CLIP)  # of estimates of x_0; None for nothing
  batch_size: int = count(128, SPEED)
  preview_steps: int = count(50, FREE)  # of DDIM, for the grids written during training


@dataclasses.dataclass(frozen=True)
class Editing:
  """How images are edited."""

  # Of inpaint: repaint, replace, posterior or dps; of measurements: posterior or dps; None: the first.
  method: Callable | None = key(None, slot=_METHOD)
  operator: editing.Operator | None = key(None, slot=_OPERATOR)  # of restore: what was done to the images
  strength: float = key(0.6)  # of img2img: 0 gives back the input, 1 a fresh sample
  frames: int = key(8)  # of interpolate


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """How samples are scored."""

  num_samples: int = count(50_000)
  batch_size: int = count(128)  # images on each device at a time
  features: str = key("")  # inception, classifier or pixels; empty: inception given its weights, else what suits images
  inception_weights: str = key("")  # the file of the FID Inception network
  inception_sha256: str = key("6726825d")  # the start of its hash; empty: any file, whose scores are not called FID
  resize: str = key("tf1")  # to Inception's 299x299: tf1, as the reference, or clean, as clean-fid
  classifier_steps: int = count(600)  # of training the classifier whose features suit small gray images
  reference: str = key("")  # train, held_out or an .npz file; empty: train for inception or many samples, else held_out
  scores: Sequence[str] = key(())  # some of evaluate.SCORES; empty: all that features, reference and samples allow
  allow_singular: bool = key(False)  # a Frechet distance of no more samples than the features have dimensions
  k: int = count(5)  # nearest neighbor of precision, recall, density and coverage
  pairwise_samples: int = count(10_000)  # features for the scores that compare pairs
  kernel_subsets: int = count(100)
  kernel_size: int = key(0)  # of a subset; 0: 1,000, or half of what is kept
  splits: int = count(10)  # of the Inception Score
  likelihood: Sequence[str] = key(())  # some of bound, ode and continuous: bits per dimension of held-out images
  likelihood_images: int = key(0)  # of how many; 0: all
  bound_steps: int = key(0)  # steps of the bound for each image; 0: all
  bound_variance: str = key("large")  # of the bound: small, large or learned
  probes: int = key(1)  # of the ODE's trace; 0: exactly, for small images
  probe_noise: str = key("rademacher")  # or gaussian
  likelihood_tolerance: float = key(1e-5, bounds=_POSITIVE)  # of the ODE
  report: bool = key(True)  # write report.html
  every: int = key(0)  # training steps between scores on the way; 0: none
  interim_samples: int = key(0)  # samples for each; 0: num_samples


@dataclasses.dataclass(frozen=True)
class Root:
  """All that a config holds. The defaults are DDPM on CIFAR-10 (Ho et al. 2020); recipes change some."""

  task: Any = key("tasks.denoise", MODEL, slot=_TASK)
  seed: int = key(0, RUN, Bounds(most=2**32 - 1))
  init_from: str = key("", PLACE)  # a folder of diffusers or a name on the hub that training starts from
  data: Data = section(Data)
  model: Parts = section(Parts, MODEL, _MODEL)
  objective: Any = key("losses.denoising", RUN, slot=_OBJECTIVE)
  optimizer: Optimizer = section(Optimizer)
  ema: Ema = section(Ema)
  training: Training = section(Training)
  parallel: Parallel = section(Parallel, SPEED)
  # None: what suits the model.
  sampler: Callable | None = key("sampling.ancestral(variance='large')", SAMPLING, slot=_SAMPLER)
  sampling: Sampling = section(Sampling, SAMPLING)
  guidance: Any = key("guidance.classifier_free", SAMPLING, slot=_GUIDANCE)
  editing: Editing = section(Editing, FREE)
  evaluation: Evaluation = section(Evaluation, FREE)


def keys_of(kind: type) -> list[Parameter]:
  """Return the keys of a section."""
  return [Parameter(one.name, one.type, one.default, **one.metadata) for one in dataclasses.fields(kind)]
