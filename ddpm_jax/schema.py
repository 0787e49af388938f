"""What a config holds: every key with its default, and the checks that need no other part of the package."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ddpm_jax import jsonfiles, memory, workdir

# What the elements of a tuple are.
_ELEMENTS = {
  "process.betas": float,
  "network.multipliers": float,
  "network.attention_resolutions": int,
  "network.filter": float,
  "ema.stds": float,
  "evaluation.scores": str,
  "evaluation.likelihood": str,
}
# Numbers that may be below 0; all others are a size, a share or a number of something.
_SIGNED = ("data.hold_out", "loss.times_mean", "guidance.scale", "network.frequency_shift", "network.filter")
_POSITIVE = ("sampling.tolerance", "evaluation.likelihood_tolerance", "optimizer.learning_rate", "network.multipliers")
# Seeds are unsigned; all other integers are sizes or numbers of something, which programs count in int32.
_LARGEST = {"seed": 2**32 - 1}
_COUNTS = (
  "data.image_size",
  "data.channels",
  "data.num_threads",
  "process.num_steps",
  "network.channels",
  "network.blocks",
  "network.heads",
  "network.attention_resolutions",
  "training.batch_size",
  "training.steps",
  "training.accumulate",
  "training.max_skipped",
  "training.log_every",
  "training.checkpoint_every",
  "training.sample_every",
  "training.keep_checkpoints",
  "sampling.num_steps",
  "sampling.preview_steps",
  "sampling.batch_size",
  "evaluation.num_samples",
  "evaluation.batch_size",
  "evaluation.k",
  "evaluation.most_kept",
  "evaluation.kernel_subsets",
  "evaluation.splits",
  "evaluation.classifier_steps",
)


def default_config() -> ConfigDict:
  """Every key that a config has, with the settings of DDPM on CIFAR-10 (Ho et al. 2020). Recipes change some."""
  config = ConfigDict()
  config.task = "denoise"  # denoise, or classify: learn the class of noisy images, for classifier guidance
  config.seed = 0
  config.init_from = (
    ""  # a folder of diffusers or a name on the hub, to start from: its network, process and prediction
  )
  config.data = ConfigDict(
    {
      "source": "tfds",  # digits, mnist, arrays, folder, packed or tfds
      "name": "cifar10",  # of a TFDS data set
      "module": "",  # a module, or a .py file, that defines a TFDS builder of your own; --mode=prepare imports it
      "path": "",  # of an .npz file, a folder of images or of packed ones, or the TFDS folder
      "crop": 0,  # above 0: the shorter side of a centered box that is cut out before resizing
      "resize": "bicubic",  # bicubic, box (down-sampled ImageNet) or adm
      "image_size": 32,  # of squares; or (height, width), set within `config.data.ignore_type()`
      "channels": 3,
      "flip": True,
      "train_split": "train",
      "eval_split": "test",  # of TFDS, or a sub-folder of an image folder that also has one named as train_split
      "hold_out": 0,  # images kept from training for evaluation, where there is no eval_split; -1: a tenth, at most 500
      "broken": "stop",  # at images that cannot be decoded; or skip: the next that can stands in
      "num_threads": 4,
      "num_workers": 0,  # processes that decode ahead, instead of threads
    }
  )
  config.process = ConfigDict(
    {
      "name": "discrete",  # discrete, vp, sub_vp, ve, edm, rectified_flow or cosine
      "schedule": "linear",  # of a discrete process: linear, scaled_linear, cosine, sigmoid or table
      "betas": (),  # of the schedule table
      "num_steps": 1000,  # of a discrete process
      "zero_terminal_snr": False,  # of a discrete process: its betas rescaled to leave no data at the last step
      "beta_min": 0.1,  # of vp and sub_vp; a linear schedule has betas from beta_min/N to beta_max/N
      "beta_max": 20.0,
      "sigma_min": 0.0,  # of ve and edm; 0: the paper's
      "sigma_max": 0.0,
    }
  )
  config.prediction = "eps"  # eps, x0, v, score, velocity or edm
  config.learned_variance = False  # of a discrete process: the network also gives the variance of the reverse step
  config.sigma_data = 0.5  # the data's standard deviation, for the prediction and the weighting of EDM
  config.loss = ConfigDict(
    {
      "weighting": "simple",  # one of build.WEIGHTINGS
      "times": "uniform",  # uniform, low_discrepancy, log_normal or logit_normal
      "t_min": 1e-5,  # the smallest time of a continuous process, of uniform and low_discrepancy
      "times_mean": -1.2,  # of log_normal and logit_normal
      "times_std": 1.2,
      "vlb_weight": 0.001,  # of the variational bound, if the variance is learned
      "label_dropout": 0.0,  # the share of labels hidden from a conditional network, which classifier-free guidance needs
    }
  )
  config.network = ConfigDict(
    {
      "channels": 128,
      "multipliers": (1, 2, 2, 2),
      "blocks": 2,
      "attention_resolutions": (16,),  # heights of the levels that have self-attention
      "middle_attention": True,
      "middle_attention_norm": True,
      "heads": 1,
      "head_channels": 0,  # above 0: of each head, instead of their number
      "groups": 32,  # of normalizations; 0: a quarter of the features, at most 32 (EDM)
      "epsilon": 1e-6,  # of normalizations
      "dropout": 0.1,
      "time_embedding": "sin_cos",  # sin_cos (DDPM), cos_sin (ADM) or fourier (NCSN++)
      "time_features": 0,  # 0: as many as channels
      "embedding_features": 0,  # 0: four times channels
      "frequency_shift": 1.0,
      "scale_shift": False,
      "downsample": "conv",  # conv, residual, or several with commas between them, one a level
      "upsample": "conv",
      "symmetric_padding": False,
      "filter": (1, 1),  # of residual resampling, or (1, 3, 3, 1)
      "song": False,  # the details of DDPM++ and NCSN++
      "progressive_input": False,
      "num_classes": 0,  # above 0: conditional on the data's labels
      "augmentation_features": 0,
      "center_input": False,
      "divide_by_sigma": False,
      "dtype": "float32",  # of the computation: float32 or bfloat16
      "remat": "none",  # none, blocks, everything, or one of jax.checkpoint_policies: computed again in the backward pass
      "attention": "",  # xla or cudnn: the implementation of attention; empty: the one for the platform
    }
  )
  config.superres = ConfigDict(
    {
      "factor": 0,  # above 1: the model enlarges images so many times (SR3)
      "noise": 0.0,  # the largest standard deviation of the noise that the enlarged small image gets in training
      "sample_noise": 0.0,  # and that which it gets in sampling
    }
  )
  config.optimizer = ConfigDict(
    {
      "name": "adam",  # adam, adamw, lion, sgd or another of optax's functions that take a learning rate
      "arguments": "",  # of that function, such as "b2=0.95, weight_decay=0.01"
      "learning_rate": 2e-4,
      "schedule": "constant",  # constant, cosine, linear or inverse_sqrt, after a linear warm-up
      "warmup_steps": 5000,
      "decay_steps": 0,  # where cosine and linear end, 0: at training.steps; where inverse_sqrt starts, 0: after the warm-up
      "final_factor": 0.0,  # of cosine and linear: the share of the rate that is left at the end
      "clip_norm": 1.0,  # the largest global norm of a gradient; 0: any
    }
  )
  config.ema = ConfigDict(
    {
      "kind": "fixed",  # fixed, half_life (EDM) or power (EDM2)
      "decay": 0.9999,  # of fixed, which has a warm-up
      "half_life": 500_000,  # of half_life, in images
      "ramp_up": 0.05,  # of half_life: no longer than this share of the images seen; 0: no such limit
      "stds": (0.05, 0.1),  # of power: the relative width of each average, the first for previews, samples and scores
      "snapshot_every": 0,  # of power: steps between the averages stored for other widths; 0: none are
    }
  )
  config.training = ConfigDict(
    {
      "batch_size": 128,  # over all devices
      "steps": 800_000,
      "accumulate": 1,  # parts of each device's share of the batch, one after the other, to save memory
      "max_skipped": 10,  # steps in a row whose gradients may be not finite
      "log_every": 100,
      "checkpoint_every": 5000,
      "sample_every": 5000,
      "keep_checkpoints": 2,  # the newest
      "keep_every": 0,  # checkpoints of every so many steps are kept too; 0: none
      "keep_best": 0,  # and so many of the best, by the lowest
      "best_metric": "loss",  # of those in metrics.jsonl
      "wandb": "",  # a project, to send metrics and pictures there too
    }
  )
  config.parallel = ConfigDict(
    {
      "data": 0,  # devices that each have a copy of the state; 0: as many as there are, divided by fsdp
      "fsdp": 1,  # devices that share one copy
    }
  )
  config.sampling = ConfigDict(
    {
      "sampler": "ancestral",  # one of build.SAMPLERS
      "num_steps": 1000,
      "grid": "",  # empty: what suits the sampler and the process
      "variance": "large",  # of ancestral: small, large or learned
      "eta": 0.0,  # of ddim
      "order": 3,  # of dpm_solver, deis and unipc
      "s_churn": 0.0,  # of euler and heun: EDM's churn
      "s_min": 0.0,
      "s_max": 1e6,
      "s_noise": 1.0,
      "corrector_steps": 0,  # Langevin steps before each step of any sampler but ode
      "corrector_snr": 0.16,
      "clip": True,  # the estimates of x_0 to [-1, 1]
      "tolerance": 1e-5,  # of ode
      "batch_size": 128,
      "preview_steps": 50,  # of DDIM, for the grids written during training
    }
  )
  config.guidance = ConfigDict(
    {
      "scale": 1.0,  # of classifier-free guidance, 1 for none; or of a classifier, 0 for none; or of autoguidance
      "sigma_low": 0.0,  # the smallest sigma/alpha at which it guides
      "sigma_high": 0.0,  # and the largest; 0: any
      "rescale": 0.0,  # the share of the conditional estimate's contrast that is given back
      "plus_plus": False,  # CFG++, with a scale of 0 to 1 and the samplers ddim and euler
      "threshold": 0.0,  # above 0: dynamic thresholding at this percentile, such as 0.995, in place of clipping
    }
  )
  config.editing = ConfigDict(
    {
      "method": "",  # of inpaint: repaint, replace, posterior or dps; of colorize and superres: posterior or dps; empty: the first
      "strength": 0.6,  # of img2img: 0 gives back the input, 1 a fresh sample
      "resamples": 10,  # of repaint: how often each step is made
      "jump": 1,  # of repaint: parts of each step, over which it jumps back
      "noise": 0.02,  # of posterior: the standard deviation of what is measured
      "covariance": "tweedie",  # of posterior, or isotropic (PiGDM), which is cheaper
      "iterations": 3,  # of posterior: conjugate gradients a step
      "scale": 1.0,  # of dps
      "frames": 8,  # of interpolate
    }
  )
  config.evaluation = ConfigDict(
    {
      "num_samples": 50_000,
      "batch_size": 128,  # images on each device at a time
      "features": "",  # inception, classifier or pixels; empty: inception if its weights are given, else what suits the images
      "inception_weights": "",  # the file of the FID Inception network
      "inception_sha256": "6726825d",  # how the hash of that file begins; empty: any file, whose scores are then not called FID
      "resize": "tf1",  # to Inception's 299x299: tf1, as the reference, or clean, as clean-fid
      "classifier_steps": 600,  # of training the classifier whose features suit small grey images
      "reference": "",  # train, held_out or an .npz file of statistics; empty: train for inception or many samples, else held_out
      "scores": (),  # some of evaluate.SCORES; empty: all that the features, the reference and the number of samples allow
      "allow_singular": False,  # a Frechet distance of no more samples than the features have dimensions
      "k": 5,  # nearest neighbour of precision, recall, density and coverage
      "most_kept": 10_000,  # features for the scores that compare pairs
      "kernel_subsets": 100,
      "kernel_size": 0,  # of a subset; 0: 1,000, or half of what is kept
      "splits": 10,  # of the Inception Score
      "likelihood": (),  # some of bound, ode and continuous: bits per dimension of held-out images
      "likelihood_images": 0,  # of how many; 0: all
      "bound_draws": 0,  # steps of the bound for each image; 0: all
      "probes": 1,  # of the ODE's trace; 0: exactly, for small images
      "probe_noise": "rademacher",  # or gaussian
      "likelihood_tolerance": 1e-5,  # of the ODE
      "report": True,  # write report.html
      "every": 0,  # training steps between scores on the way; 0: none
      "every_samples": 0,  # samples for each; 0: num_samples
    }
  )
  return config


def config_of_run(given: ConfigDict | None, folder: Path) -> ConfigDict:
  """Return the config given on the command line, or else that of the run in the folder, checked.

  Raises:
    ValueError: if there is neither, or it is no sound config.
  """
  if isinstance(given, ConfigDict):
    check_config(given)
    return ConfigDict(given.to_dict())
  if given is not None:
    raise ValueError(
      f"Got a config of type {type(given).__name__}; expected a ConfigDict. Start from schema.default_config()."
    )
  saved = saved_config(folder)
  if saved is None:
    raise ValueError(
      f"Got no --config, and {folder} holds no run; wanted a recipe, such as --config=configs/digits_vp.py."
    )
  return saved


def saved_config(folder: Path) -> ConfigDict | None:
  """Return the config of the run in a folder, checked, or None if it holds none.

  Raises:
    ValueError: if the file is no sound config; the message names it.
  """
  saved = workdir.read_config(folder)
  if saved is None:
    return None
  config = default_config()
  with jsonfiles.naming(workdir.config_path(folder)):
    _check_leaves(_leaves(saved), _leaves(config.to_dict()))
    # A run of an older version lacks keys that came later.
    with config.data.ignore_type():
      config.update(ConfigDict(saved))
  return config


def check_same_run(folder: Path, config: ConfigDict) -> None:
  """Raises a ValueError that lists the differences, unless the folder is free or holds a run of this config."""
  workdir.check_same_run(folder, config.to_dict(), default_config().to_dict())


def config_of_data(given: ConfigDict | None) -> ConfigDict:
  """The config whose data are to be prepared, checked.

  Raises:
    ValueError: if there is none, or it is no sound config.
  """
  if given is None:
    raise ValueError(
      "Got no --config to say which data to prepare; wanted a recipe, such as --config=configs/cifar10_vp.py."
    )
  return config_of_run(given, Path())


def check_config(config: ConfigDict) -> None:
  """Raise a ValueError if keys are missing or unknown, or a value cannot be right whatever the others are. The parts check theirs."""
  try:
    known, given = (_leaves(c.to_dict()) for c in (default_config(), config))
  except RecursionError as error:
    raise ValueError(
      "Got a config with a section that holds itself; expected sections of values. Start from schema.default_config()."
    ) from error
  _check_leaves(given, known)
  if known.keys() - given.keys():
    raise ValueError(
      f"Got a config without {', '.join(sorted(known.keys() - given.keys()))}; wanted every key. Start from schema.default_config() and"
      " change what differs."
    )


def _check_leaves(given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
  for name in sorted(given.keys() - known.keys()):
    raise _unknown(name, given[name], known)
  for name, value in given.items():
    _check_value(name, value, known[name])


def _unknown(name: str, value: Any, known: Mapping[str, Any]) -> ValueError:
  """Return the error for a key that no config has, or that should be a section, or that should not."""
  section = name.rpartition(".")[0]
  if any(key.startswith(f"{name}.") for key in known):
    keys = [key.removeprefix(f"{name}.") for key in known if key.startswith(f"{name}.")]
    return ValueError(f"Got config.{name}={jsonfiles.show(value)}; expected a section with the keys {', '.join(keys)}.")
  if section in known:
    return ValueError(
      f"Got a section config.{section} with the key {name}; expected one value, such as {known[section]!r}."
    )
  keys = [key for key in known if section and key.rpartition(".")[0] == section] or [
    key.partition(".")[0] for key in known
  ]
  near = difflib.get_close_matches(name, known, 1)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  return ValueError(f"Got {name!r} as a config key; expected one of {', '.join(sorted(set(keys)))}.{hint}")


def _check_value(name: str, value: Any, default: Any) -> None:
  """Check the type of a value, which is its default's, and its sign; a tuple has these for each element."""
  kind: Any = [_ELEMENTS[name]] if isinstance(default, tuple) else type(default)
  if name == "data.image_size" and isinstance(value, list | tuple):
    kind = [int]
  if not jsonfiles.matches(value, kind):
    raise ValueError(
      f"Got config.{name}={jsonfiles.show(value)}; expected {jsonfiles.kind_name(kind)}. Set --config.{name}."
    )
  for number in value if isinstance(value, list | tuple) else [value]:
    if isinstance(number, str | bool) or name in _SIGNED:
      continue
    largest = _LARGEST.get(name, 2**31 - 1)
    if isinstance(number, int) and number > largest:
      size = f" An array of so many floats takes {memory.show(4 * number)}." if name in _COUNTS else ""
      raise ValueError(
        f"Got config.{name}={value}; expected at most {largest}: programs hold it in 32 bits.{size} Set --config.{name}."
      )
    if number < 1 and name in _COUNTS:
      raise ValueError(f"Got config.{name}={value}; wanted at least 1.")
    if number <= 0 and name in _POSITIVE:
      raise ValueError(f"Got config.{name}={value}; wanted above 0, such as {default}.")
    if number < 0:
      raise ValueError(f"Got config.{name}={value}; wanted 0 or more.")


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """The values of nested keys by their dotted names; unlike `workdir.flatten` it keeps an empty section."""
  leaves: dict[str, Any] = {}
  for name, value in tree.items():
    leaves |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
  return leaves


def choose(name: str, options, what: str) -> Any:
  """The option of that name; a ValueError that names the nearest one if there is none."""
  if name in options:
    return options[name] if isinstance(options, Mapping) else name
  near = difflib.get_close_matches(str(name), list(options), 1)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  raise ValueError(f"Got {name!r} as {what}; wanted one of {', '.join(sorted(options))}.{hint}")
