"""Declare the sections of a config: the type, default, limits and role of each key.

Each key has a role:

- "model": the key defines the model. It cannot change once the run folder holds a checkpoint.
- "run": the key affects the trained parameters. It cannot change once the run folder holds a checkpoint.
- "sampling": the key affects samples. It may change.
- "free": the key may change at any time. One exception: `training.steps` cannot change if the learning rate decays
  until the last step.
- "speed": the key affects speed or memory, and changes results only by rounding errors. It may change.
- "place": the key is the path of a file or folder. It may change if the files are the same.

Roles decide which keys may change when a run is resumed, and which results an interrupted evaluation can reuse.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any

import numpy as np

from ddpm_jax import data, editing, losses, models, predictions, processes, sampling
from ddpm_jax.config import slots
from ddpm_jax.config.components import ROLES, Parameter
from ddpm_jax.config.slots import Slot
from ddpm_jax.config.values import Limits

MODEL, RUN, SAMPLING, FREE, SPEED, PLACE = ROLES

# The slots of keys that take a component.
_SOURCE = Slot(
  "a source of data (data.Splits)",
  (data.Splits,),
  "data",
  "folder(path='/images')",
  supplied=(data.Fit, "fit", data.Fields),
)
_PROCESS = slots.slot_of(processes.Process)
_PREDICTION = slots.slot_of(predictions.Prediction, supplied=(processes.Process,))
_CODEC = Slot("a codec", (models.Codec,), "codecs", "pixels", supplied=("data_shape",))
_CONDITIONS = Slot(
  "a condition",
  (models.Condition,),
  "conditions",
  "classes(number=10, dropout=0.1)",
  supplied=("name", "data_shape", "x_shape"),
)
_NETWORK = Slot(
  "a network",
  (models.Network,),
  "networks",
  "UNet(channels=64)",
  supplied=(
    "out_channels",
    "dimensions",
    "num_classes",
    "vector_embedding",
    "context_features",
    "vocabulary",
    "shape",
    "conditions",
  ),
)
_MODEL = Slot("a model", (models.Model,), "diffusers", "my_file.py:my_model")
_OBJECTIVE = Slot(
  "an objective",
  (losses.Objective,),
  "losses",
  "denoising(weighting=min_snr(gamma=5))",
  supplied=(
    losses.Apply,
    losses.Autoencoder,
    processes.Process,
    predictions.Prediction,
    models.Model,
    "time_input",
  ),
)
_SAMPLER = slots.slot_of(sampling.Sampler, supplied=(processes.Process,))
_GRID = Slot(
  "a grid of times",
  (np.ndarray,),
  "grids",
  "karras(rho=7)",
  supplied=(processes.Process, "num_steps"),
  is_deferred=True,
)
_CLIP = Slot(
  "a rule that clips estimates",
  (predictions.Denoise,),
  "guidance",
  "dynamic_threshold(percentile=0.995)",
  supplied=("denoise",),
  must_take=("denoise",),
  is_deferred=True,
)
_GUIDANCE = Slot(
  "a rule of guidance",
  (predictions.Denoise,),
  "guidance",
  "classifier_free(scale=3)",
  supplied=(
    "conditional",
    "condition",
    "partial",
    "negative",
    "denoise",
    "weak",
    "log_prob",
    "outside",
    processes.Process,
  ),
  must_take=("condition", "weak", "log_prob"),
  is_deferred=True,
)
_METHOD = Slot(
  "a method of editing",
  (sampling.Sampler, predictions.Denoise),
  "editing",
  "repaint(resamples=10)",
  supplied=("sampler", "denoise", "image", "keep", "operator", "measurement", "encode", "decode", processes.Process),
  must_take=("image", "measurement"),
  is_deferred=True,
)
_OPERATOR = slots.slot_of(editing.Operator)
_TASK = Slot("a task", ("Task",), "tasks", "denoise")

_NOT_NEGATIVE, _POSITIVE = Limits(), Limits(above=0)


def key(default: Any, role: str = "", limits: Limits = _NOT_NEGATIVE, **metadata: Any) -> Any:
  """Return the dataclass field of a key.

  Args:
    default: the default value.
    role: the role; if empty, the role of the section applies.
    limits: the allowed range of numbers.
    **metadata: further attributes of the key's `Parameter`.
  """
  return field(default=default, metadata={"role": role, "limits": limits, **metadata})


def section(kind: type, role: str = RUN, slot: Slot | None = None) -> Any:
  """Return the dataclass field of a section.

  Args:
    kind: the dataclass of the section.
    role: the default role of the section's keys.
    slot: the slot, if a component can replace the section.
  """
  return field(default_factory=kind, metadata={"role": role, "section": kind, "slot": slot})


def count(default: int, role: str = "") -> Any:
  """Return the dataclass field of a key that is a size or count, an integer of 1 or more."""
  return key(default, role, Limits(minimum=1, is_size=True))


@dataclasses.dataclass(frozen=True)
class Fields:
  """Select the fields of the data that are read as classes and captions (see `data.Fields`)."""

  classes: str = key("")  # the field with the class of an image; empty: the source decides
  # The field that holds the caption of an image; ".txt": the text file beside each image; empty: no captions.
  text: str = key("")


@dataclasses.dataclass(frozen=True)
class Data:
  """Select the data and configure the input pipeline."""

  source: Any = key("data.tfds(name='cifar10')", slot=_SOURCE)
  fields: data.Fields = section(Fields)
  image_size: int | tuple[int, int] = count(32, MODEL)  # the side of a square, or (height, width)
  channels: int = count(3, MODEL)
  # (height, width) of several sizes to train at: each image has the one closest to its aspect ratio, and each batch has
  # one size. Samples and held-out images have image_size. (): train at image_size.
  buckets: Sequence[tuple[int, int]] = key(())
  crop: int = key(0)  # the shorter side of the box to which images are cropped before resizing; 0: no crop
  # A folder that --mode=prepare has encoded with the model's codec. Training reads it instead of images.
  latents: str = key("", PLACE)
  resize: str = key("bicubic")  # bicubic, box (as in down-sampled ImageNet) or adm
  flip: bool = key(True)
  # Training images to hold out for evaluation if the source has no evaluation split; -1: a tenth, at most 500.
  hold_out: int = key(0, limits=Limits(minimum=-1))
  broken: str = key("stop", FREE)  # if an image cannot be decoded: stop, or skip (use the next image)
  num_threads: int = count(4, SPEED)
  num_workers: int = key(0, SPEED)  # processes that prepare batches; 0: threads prepare them

  @property
  def space(self) -> tuple[int, int]:
    """Return the height and width of images."""
    size = self.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return height, width

  @property
  def shape(self) -> tuple[int, int, int]:
    """Return the shape of an image, [H, W, C]."""
    return (*self.space, self.channels)

  @property
  def train_shape(self) -> tuple[int, int, int]:
    """Return the shape [H, W, C] of the training images with the most pixels."""
    return (*max(self.buckets, key=math.prod, default=self.space), self.channels)


@dataclasses.dataclass(frozen=True)
class Parts:
  """Configure the parts of a model."""

  process: Any = key("processes.discrete(betas=schedules.linear())", slot=_PROCESS)
  prediction: Any = key("predictions.EPS", slot=_PREDICTION)
  codec: Any = key("codecs.pixels", slot=_CODEC)
  conditions: Mapping[str, Any] = key((), slot=_CONDITIONS, is_mapping=True)
  network: Any = key("networks.UNet", slot=_NETWORK)


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Configure the optimizer."""

  name: str = key("adam")  # adam, adamw, lion, sgd or another optax optimizer that takes a learning rate
  arguments: str = key("")  # further arguments of the optimizer, such as "b2=0.95, weight_decay=0.01"
  learning_rate: float = key(2e-4, limits=_POSITIVE)
  schedule: str = key("constant")  # constant, cosine, linear or inverse_sqrt, after a linear warm-up
  warmup_steps: int = key(5000)
  # cosine, linear: the step at which decay ends; 0: training.steps.
  # inverse_sqrt: the step at which decay starts; 0: after the warm-up.
  decay_steps: int = key(0)
  final_factor: float = key(0.0)  # cosine, linear: the final learning rate as a fraction of learning_rate
  clip_norm: float = key(1.0)  # the maximum global norm of gradients; 0: no clipping


@dataclasses.dataclass(frozen=True)
class Ema:
  """Configure the exponential moving average of parameters."""

  kind: str = key("fixed")  # fixed, half_life (EDM) or power (EDM2)
  decay: float = key(0.9999)  # fixed: the decay rate, after a warm-up
  half_life: int = key(500_000)  # half_life: the half-life in images
  ramp_up: float = key(0.05)  # half_life: the half-life is at most this fraction of the images seen; 0: no limit
  stds: Sequence[float] = key((0.05, 0.1))  # power: relative widths; previews, samples and scores use the first
  snapshot_every: int = key(0, FREE)  # power: steps between snapshots, to reconstruct other widths; 0: none


@dataclasses.dataclass(frozen=True)
class Training:
  """Configure the training loop, checkpoints and logs."""

  batch_size: int = count(128)  # over all devices
  steps: int = count(800_000, FREE)
  accumulate: int = count(1, SPEED)  # microbatches per step and device; more of them save memory
  max_skipped: int = count(10, FREE)  # stop after this number of consecutive steps with non-finite gradients
  log_every: int = count(100, FREE)
  checkpoint_every: int = count(5000, FREE)
  sample_every: int = count(5000, FREE)
  keep_checkpoints: int = count(2, FREE)  # number of newest checkpoints to keep
  keep_every: int = key(0, FREE)  # also keep every checkpoint at a multiple of this step; 0: none
  keep_best: int = key(0, FREE)  # also keep this number of best checkpoints, by best_metric
  best_metric: str = key("loss", FREE)  # a metric in metrics.jsonl
  wandb: str = key("", FREE)  # a project of Weights & Biases to log metrics and pictures to; empty: none


@dataclasses.dataclass(frozen=True)
class Parallel:
  """Configure how devices split the batch and the parameters."""

  data: int = key(0)  # number of replicas of the state; 0: the number of devices divided by fsdp
  fsdp: int = key(1)  # number of devices that shard one replica


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Configure sampling."""

  num_steps: int = count(1000)
  grid: Callable | None = key(None, slot=_GRID)  # None: the default grid of the sampler and the process
  clip: Callable | None = key("guidance.clip", slot=_CLIP)  # rule that clips estimates of x_0; None: no clipping
  batch_size: int = count(128, SPEED)
  preview_steps: int = count(50, FREE)  # DDIM steps of the previews during training


@dataclasses.dataclass(frozen=True)
class Editing:
  """Configure the editing of images."""

  # inpaint: repaint, replace, posterior or dps. colorize, superres, restore: posterior or dps.
  # None: the first method of the task.
  method: Callable | None = key(None, slot=_METHOD)
  operator: editing.Operator | None = key(None, slot=_OPERATOR)  # restore: the operator that degraded the images
  strength: float = key(0.6)  # img2img: from 0 (returns the input) to 1 (a new sample)
  frames: int = key(8)  # interpolate: number of frames from one image to the next, including both


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Configure scores and likelihoods."""

  num_samples: int = count(50_000)
  batch_size: int = count(128)  # images per batch and device, for samples, features and likelihoods
  # inception, classifier or pixels. Empty: inception if inception_weights is set, otherwise classifier for small gray
  # images with classes, and pixels for all other images.
  features: str = key("")
  inception_weights: str = key("")  # the weights file of the FID Inception network
  # The first digits of the SHA-256 of inception_weights; empty: accept any file, but do not call its scores FID.
  inception_sha256: str = key("6726825d")
  resize: str = key("tf1")  # how to resize to 299x299: tf1 (as in the reference code) or clean (as in clean-fid)
  classifier_steps: int = count(600)  # training steps of the classifier that gives features of small gray images
  # train, held_out or an .npz file. Empty: train if the features are Inception's or if there are fewer held-out images
  # than samples; otherwise held_out.
  reference: str = key("")
  scores: Sequence[str] = key(())  # names of evaluate.SCORES; empty: all that features, reference and samples allow
  allow_singular: bool = key(False)  # compute a Frechet distance even if its covariances cannot have full rank
  k: int = count(5)  # precision, recall, density and coverage use the k-th nearest neighbor
  pairwise_samples: int = count(10_000)  # maximum number of features for scores that compare pairs
  kernel_subsets: int = count(100)  # number of subsets of the kernel distance
  kernel_size: int = key(0)  # features in a subset; 0: 1,000, or half of the smaller set if that is less
  splits: int = count(10)  # splits of the Inception Score
  likelihood: Sequence[str] = key(())  # any of bound, ode and continuous: bits per dimension of held-out images
  likelihood_images: int = key(0)  # number of held-out images for likelihoods; 0: all
  bound_steps: int = key(0)  # bound: number of random steps for each image; 0: all steps
  bound_variance: str = key("large")  # bound: small, large or learned
  probes: int = key(1)  # ode: probes of the trace estimate; 0: the exact trace, for small images
  probe_noise: str = key("rademacher")  # ode: rademacher or gaussian
  likelihood_tolerance: float = key(1e-5, limits=_POSITIVE)  # ode: tolerance of the solver
  report: bool = key(True)  # write report.html
  every: int = key(0)  # training steps between interim scores; 0: none
  interim_samples: int = key(0)  # samples of each interim score; 0: num_samples


@dataclasses.dataclass(frozen=True)
class Root:
  """Define the keys of a config and their defaults.

  The defaults are DDPM on CIFAR-10 (Ho et al. 2020).
  """

  task: Any = key("tasks.denoise", MODEL, slot=_TASK)
  seed: int = key(0, RUN, Limits(maximum=2**32 - 1))
  # pretrained model to start training from: a diffusers folder or a name on the Hugging Face hub
  init_from: str = key("", PLACE)
  data: Data = section(Data)
  model: Parts = section(Parts, MODEL, _MODEL)
  objective: Any = key("losses.denoising", RUN, slot=_OBJECTIVE)
  optimizer: Optimizer = section(Optimizer)
  ema: Ema = section(Ema)
  training: Training = section(Training)
  parallel: Parallel = section(Parallel, SPEED)
  # None: the default sampler of the model.
  sampler: Callable | None = key("sampling.ancestral(variance='large')", SAMPLING, slot=_SAMPLER)
  sampling: Sampling = section(Sampling, SAMPLING)
  guidance: Any = key("guidance.classifier_free", SAMPLING, slot=_GUIDANCE)
  editing: Editing = section(Editing, FREE)
  evaluation: Evaluation = section(Evaluation, FREE)


def keys_of(kind: type) -> list[Parameter]:
  """Return the keys of a section."""
  return [Parameter(one.name, one.type, one.default, **one.metadata) for one in dataclasses.fields(kind)]
