"""Configs of models that come from elsewhere, and runs that go elsewhere: between `interop`, which knows no config, and `runs`."""

import json
from pathlib import Path
from typing import Any, cast

from ml_collections import ConfigDict

from ddpm_jax import build, interop, schema, workdir
from ddpm_jax.interop.diffusers import Pretrained
from ddpm_jax.networks import UNet

PyTree = Any

# What a pretrained model leaves to the config: how it is trained and computed, not what it computes.
_FREE = ("dropout", "dtype", "remat", "attention")
_MODEL = ("network", "process", "prediction", "learned_variance")


def load(path: str | Path) -> Pretrained:
  """The model of a diffusers folder or a name on the hub (see `interop.diffusers.load`)."""
  return interop.diffusers.load(path)


def adopt(config: ConfigDict, model: Pretrained) -> ConfigDict:
  """The config with the network, the process and the prediction of a pretrained model.

  Raises:
    ValueError: if the command line has no way to say what the model is.
  """
  network, schedule = model.network, model.schedule
  if network.vector_embedding:
    raise ValueError(
      "Got a model with class_embed_type='timestep' or 'identity', which the command line cannot condition; use"
      " interop.diffusers.load from Python."
    )
  if schedule.clip not in (None, 1.0):
    raise ValueError(
      f"Got a model with clip_sample_range={schedule.clip}; the command line clips to [-1, 1] or not at all. Use"
      " interop.diffusers.load from Python."
    )
  if model.shape is None:
    raise ValueError(
      "Got a model of images of unknown size; the command line wants a known one. Set sample_size in its config.json, or use"
      " interop.diffusers.load from Python."
    )
  if model.params["conv_in"]["kernel"].shape[-2] != model.shape[2]:
    raise ValueError(
      f"Got a model of {model.shape[2]} channels with in_channels={model.params['conv_in']['kernel'].shape[-2]}, conditioned on an"
      " image, which the command line cannot give it; use interop.diffusers.load from Python."
    )
  config = ConfigDict(config.to_dict())
  height, width, config.data.channels = model.shape
  with config.data.ignore_type():
    config.data.image_size = height if height == width else (height, width)
  config.network.update(_network_keys(network, model.shape[0]) | {name: config.network[name] for name in _FREE})
  if config.loss.label_dropout and network.num_classes:
    config.network.num_classes -= 1  # the last stands for none
  n = len(schedule.betas)
  if schedule.schedule in ("linear", "scaled_linear"):
    config.process.update({"beta_min": schedule.ends[0] * n, "beta_max": schedule.ends[1] * n})
  config.process.update(
    {
      "name": "discrete",
      "schedule": schedule.schedule,
      "num_steps": n,
      "betas": tuple(schedule.betas.tolist()) if schedule.schedule == "table" else (),
      "zero_terminal_snr": schedule.zero_terminal_snr and schedule.schedule != "table",
    }
  )
  config.prediction, config.learned_variance = schedule.prediction, schedule.variance == "learned"
  config.sampling.clip = schedule.clip is not None
  return config


def _network_keys(network: Any, size: int) -> dict[str, Any]:
  """The keys of config.network that say what a U-Net computes."""
  # vector_embedding and dimensions have no key: the command line has images, without vectors.
  fields = set(network.__dataclass_fields__) - {"parent", "name", "out_channels", "vector_embedding", "dimensions"}
  keys = {name: getattr(network, name) for name in fields - {"attention_levels", *_FREE}}
  for way in ("downsample", "upsample"):
    keys[way] = keys[way] if isinstance(keys[way], str) else ",".join(keys[way])
  return keys | {"attention_resolutions": tuple(size // 2**level for level in network.attention_levels)}


def adopt_sampling(config: ConfigDict, model: Pretrained, sampler: str | None) -> ConfigDict:
  """The config with what a pretrained model's scheduler stands for: sampler, grid, steps; only steps if `sampler` is another."""
  schedule, config = model.schedule, ConfigDict(config.to_dict())
  own = sampler in (None, schedule.sampler)
  config.sampling.sampler = sampler or schedule.sampler
  config.sampling.variance = schedule.variance
  config.sampling.grid = schedule.spacing if own else ""
  if own and schedule.order is not None:
    config.sampling.order = schedule.order
  steps = len(schedule.betas)
  config.sampling.num_steps = steps if config.sampling.sampler == "ancestral" else min(50, steps)
  return config


def adopt_run(config: ConfigDict, folder: Path) -> ConfigDict:
  """The config with what the run in a folder took from the model that it started from, if the config starts from it too."""
  old = schema.saved_config(folder) if config.get("init_from") else None
  if old is None or old.init_from != config.init_from:
    return config
  config = ConfigDict(config.to_dict())
  for name in _MODEL:
    if isinstance(config[name], ConfigDict):
      config[name].update({key: value for key, value in old[name].items() if name != "network" or key not in _FREE})
    else:
      config[name] = old[name]
  config.sampling.clip = old.sampling.clip
  return config


def changes(before: ConfigDict, after: ConfigDict) -> list[str]:
  """The keys whose values differ, for people to read."""
  old, new = (workdir.flatten(json.loads(json.dumps(config.to_dict()))) for config in (before, after))
  return [f"{key}: {str(new[key])[:60]} instead of {str(old[key])[:60]}" for key in sorted(old) if old[key] != new[key]]


def check_data(config: ConfigDict, model: Pretrained) -> None:
  """Raises a ValueError unless the config's images have the shape that the model takes."""
  if build.image_shape(config) != model.shape:
    raise ValueError(
      f"Got config.init_from={config.init_from!r}, a model of images of {model.shape}, and data of {build.image_shape(config)}; wanted"
      " one shape. Set --config.data.image_size and --config.data.channels."
    )


check_output = interop.diffusers.check_output


def check_exportable(config: ConfigDict) -> None:
  """Raises a ValueError unless a run of the config makes images from noise, as all pipelines of diffusers that are written do."""
  build.check_denoises(config)
  if config.superres.factor:
    raise ValueError(
      f"Got a model that enlarges images (config.superres.factor={config.superres.factor}), for which there is no pipeline to export to;"
      " wanted one that needs no image. Use it by --upsampler=<run folder>."
    )


def export(
  config: ConfigDict, output: Path, params: PyTree, *, step: int, weights: str, evaluated: dict[str, Any] | None
) -> None:
  """Write a run's model as a folder that diffusers opens, with its config and its scores (`evaluated`, eval.json) on the model card.

  Raises:
    ValueError: if diffusers cannot express the model, or the folder is not empty.
  """
  check_exportable(config)
  scores = None
  if evaluated and "scores" in evaluated:
    scores = {
      key: evaluated[key] for key in ("scores", "features", "num_samples", "reference", "step", "weights", "sampling")
    }
  interop.diffusers.save(
    output,
    cast(UNet, build.build_network(config)),
    params,
    build.build_process(config),
    build.build_prediction(config),
    shape=build.image_shape(config),
    clip=1.0 if config.sampling.clip else None,
    variance=config.sampling.variance,
    config={"step": step, "weights": weights} | config.to_dict(),
    scores=scores,
  )


def of_run(config: ConfigDict, folder: Path, *, resuming: bool) -> tuple[ConfigDict, Pretrained | None]:
  """The config of a run that starts from `config.init_from`, and the model it starts from unless it goes on.

  Raises:
    ValueError: if the model cannot be read, takes other images, or is to start a classifier.
  """
  if not config.init_from:
    return config, None
  if build.classifies(config):
    raise ValueError(
      f"Got config.init_from={config.init_from!r} with config.task='classify'; wanted no model to start from: diffusers' pipelines hold"
      " no classifier."
    )
  if config.superres.factor:
    raise ValueError(
      f"Got config.init_from={config.init_from!r} with superres.factor={config.superres.factor}; wanted no model to start from: diffusers'"
      " pixel pipelines take no image to enlarge."
    )
  saved = schema.saved_config(folder) if resuming else None
  if saved is not None and saved.init_from == config.init_from:
    return adopt_run(config, folder), None
  model = load(config.init_from)
  if model.shape is None:  # the folder does not say: the data do
    model = model._replace(shape=build.image_shape(config))
  check_data(config, model)
  classes, dropout = config.network.num_classes, config.loss.label_dropout
  if classes and classes + (dropout > 0) != model.network.num_classes:
    raise ValueError(
      f"Got config.network.num_classes={classes} and loss.label_dropout={dropout} with config.init_from={config.init_from!r}, a model of"
      f" {model.network.num_classes} classes; wanted the same number, with label dropout one less (the last stands for none)."
    )
  return adopt(config, model), model
