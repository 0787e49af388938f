"""The process, the prediction and the network of a config."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import networks, predictions, processes, schedules
from ddpm_jax.build import condition
from ddpm_jax.networks import Classifier, UNet
from ddpm_jax.predictions import Prediction
from ddpm_jax.processes import Process
from ddpm_jax.schema import choose

Array = jax.Array
PyTree = Any

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def build_process(config: ConfigDict) -> Process:
  """The forward process."""
  c = config.process
  n = c.num_steps
  schedule = {
    "linear": lambda: schedules.linear(n, c.beta_min / n, c.beta_max / n),
    "scaled_linear": lambda: schedules.scaled_linear(n, c.beta_min / n, c.beta_max / n),
    "cosine": lambda: schedules.cosine(n),
    "sigmoid": lambda: schedules.sigmoid(n),
    "table": lambda: np.asarray(c.betas, np.float64),
  }
  if (c.schedule == "table" and len(c.betas) != n) or (c.betas and c.schedule != "table"):
    raise ValueError(
      f"Got config.process.schedule={c.schedule!r} with {len(c.betas)} betas and num_steps={n}; wanted as many betas as steps"
      " with the schedule 'table', and none with another."
    )
  sigmas = {name: c[name] for name in ("sigma_min", "sigma_max") if c[name]}

  def discrete():
    betas = choose(c.schedule, schedule, "config.process.schedule")()
    return processes.discrete(schedules.zero_terminal_snr(betas) if c.zero_terminal_snr else betas)

  makers = {
    "vp": lambda: processes.vp(c.beta_min, c.beta_max),
    "sub_vp": lambda: processes.sub_vp(c.beta_min, c.beta_max),
    "ve": lambda: processes.ve(**sigmas),
    "edm": lambda: processes.edm(**sigmas),
    "rectified_flow": processes.rectified_flow,
    "cosine": processes.cosine,
    "discrete": discrete,
  }
  return choose(c.name, makers, "config.process.name")()


def build_prediction(config: ConfigDict) -> Prediction:
  """The meaning of the network's output."""
  known = {
    "eps": predictions.EPS,
    "x0": predictions.X0,
    "v": predictions.V,
    "score": predictions.SCORE,
    "velocity": predictions.VELOCITY,
    "edm": predictions.edm(config.sigma_data),
  }
  prediction = choose(config.prediction, known, "config.prediction")
  return predictions.learned_range(prediction) if config.learned_variance else prediction


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
  """Return [H, W, C] of the images.

  Raises:
    ValueError: if `data.image_size` is neither a number nor two.
  """
  return (*condition.space_of(config), config.data.channels)


def null_class(config: ConfigDict) -> int:
  """The label that stands for none, one above the classes; a ValueError unless the model was trained with label dropout."""
  if not config.loss.label_dropout:
    raise ValueError(
      "Got a model that was trained without label dropout, so it has no unconditional half to guide away from; wanted one"
      " trained with --config.loss.label_dropout=0.1 or so, as configs/digits_cond.py is (of a model from a folder of diffusers, say so by"
      " --config with this key). Or leave the guidance scale at 1."
    )
  return config.network.num_classes


def classifies(config: ConfigDict) -> bool:
  """Whether the model tells classes apart, or denoises."""
  return choose(config.task, ("denoise", "classify"), "config.task") == "classify"


def check_denoises(config: ConfigDict) -> None:
  """Raises a ValueError if the config is a classifier's."""
  if classifies(config):
    raise ValueError(
      "Got config.task='classify': this holds a classifier, which draws nothing; wanted a run that denoises, as that of"
      " configs/digits_vp.py."
    )


def build_network(config: ConfigDict) -> UNet | Classifier:
  """The network, checked against the images it is to take."""
  if classifies(config):
    _check_classifier(config)
  c = dict(config.network)
  if not 0 <= config.loss.label_dropout < 1 or (config.loss.label_dropout and not c["num_classes"]):
    raise ValueError(
      f"Got config.loss.label_dropout={config.loss.label_dropout} with network.num_classes={c['num_classes']}; wanted 0 to below 1,"
      " and above 0 only with classes."
    )
  # One more, for no class.
  c["num_classes"] += config.loss.label_dropout > 0
  dtype = choose(c.pop("dtype"), _DTYPES, "config.network.dtype")
  kind: type[UNet] | type[Classifier] = UNet
  out_channels = config.data.channels * (2 if config.learned_variance else 1)
  if classifies(config):
    # The classes are what it gives, not what it is given.
    kind, out_channels = Classifier, c.pop("num_classes")
  height, width, _ = image_shape(config)
  heights = [height / 2**level for level in range(len(c["multipliers"]))]
  resolutions = c.pop("attention_resolutions")
  for wanted in resolutions:
    if wanted not in heights:
      raise ValueError(
        f"Got config.network.attention_resolutions={tuple(resolutions)} for images of {f'{height}x{width}' if height != width else height}, whose levels"
        f" have heights of {', '.join(f'{height:g}' for height in heights)}; wanted some of these, or none: ()."
      )
  for way in ("downsample", "upsample"):
    c[way] = tuple(c[way].split(",")) if "," in c[way] else c[way]
  levels = tuple(heights.index(wanted) for wanted in resolutions)
  condition.check_superres(config)
  if config.superres.noise:
    c["vector_embedding"] = "time"
  network = kind(out_channels=out_channels, attention_levels=levels, dtype=dtype, **c)
  network.check_input(image_shape(config))
  return network


def _check_classifier(config: ConfigDict) -> None:
  if config.network.num_classes < 2:
    raise ValueError(
      f"Got config.task='classify' with network.num_classes={config.network.num_classes}; wanted 2 or more classes to tell apart."
      " Set --config.network.num_classes to the data's."
    )
  if config.loss.label_dropout or config.learned_variance:
    raise ValueError(
      f"Got config.task='classify' with loss.label_dropout={config.loss.label_dropout} and learned_variance={config.learned_variance};"
      " wanted 0 and False: they are of models that denoise."
    )
  if config.superres.factor:
    raise ValueError(
      f"Got config.task='classify' with superres.factor={config.superres.factor}; wanted 0: a classifier enlarges nothing."
    )


def build_params_init(config: ConfigDict) -> Callable[[Array], PyTree]:
  """`init(key) -> params`."""
  network = build_network(config)
  # A classifier takes no condition.
  given: dict[str, Any] = {} if classifies(config) else condition.example(config).arguments
  return lambda key: network.init(key, jnp.zeros((1, *image_shape(config))), jnp.zeros((1,)), **given)["params"]


def build_classifier(config: ConfigDict, params: PyTree) -> Callable[[Array, Array], Array]:
  """`log_probs(x_t, t) -> log p(class | x_t)` [B, K] of a trained classifier.

  Raises:
    ValueError: if the config is of a model that denoises.
  """
  check_classifies(config)
  apply = build_apply(config, params)
  return predictions.classifier(apply, build_process(config), input_scale=build_prediction(config).input_scale)


def check_classifies(config: ConfigDict) -> None:
  """Raises a ValueError if the config is of a model that denoises."""
  if not classifies(config):
    raise ValueError(
      "Got config.task='denoise', a model that tells no classes apart; wanted a run with task='classify', as that of"
      " configs/digits_classifier.py."
    )


def build_apply(config: ConfigDict, params: PyTree) -> Callable[..., Array]:
  """`apply(x, label, **condition)` of trained parameters, whose gradients in x are quick inside a sampler's loop on a CPU too."""
  network, on_cpu = build_network(config), jax.default_backend() == "cpu"

  def apply(x, label, **given):
    with networks.gradients_in_loops() if on_cpu else contextlib.nullcontext():
      return network.apply({"params": params}, x, label, **given)

  return apply
