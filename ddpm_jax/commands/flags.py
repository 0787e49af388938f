"""Flags that several commands share, and what they stand for.

JAX and the rest of the package are imported in functions: help and mistakes in flags need to wait for neither.
"""

import argparse
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_jax.commands.parser import Flag, Group, components, count, counts, integer, number, path, switch, text, words
from ddpm_jax.storage.places import user_path

if TYPE_CHECKING:
  from ddpm_jax.config import Experiment, Tree
  from ddpm_jax.runs import Steering, WeightsChoice
  from ddpm_jax.runs.pretrained import Pretrained

Flags = argparse.Namespace
# Flags that are short for keys of the config.
SHORT = {
  "sampler": "sampler",
  "num_steps": "sampling.num_steps",
  "method": "editing.method",
  "strength": "editing.strength",
  "guidance_scale": "guidance.scale",
  "inception_weights": "evaluation.inception_weights",
}

CONFIG = Flag(
  "config",
  text,
  "A recipe's name (--config=list shows them) or a file of yours; where there is a run, by default its own config. Each key is a flag too, as"
  " --config.training.steps=100; so is a whole component, as --config.sampler='heun(s_churn=40)'.",
  shown="RECIPE",
)
WORKDIR = Flag("workdir", path, "The run's folder.", shown="FOLDER")
RUN = Group("config and folder", (CONFIG, WORKDIR))
PRETRAINED = Flag(
  "pretrained",
  text,
  "Take this model instead of the run's: a folder of diffusers, or a name on the Hugging Face hub.",
  shown="MODEL",
)
MODEL = Group("config, folder and model", (CONFIG, WORKDIR, PRETRAINED))
SAMPLER = Group(
  "sampler",
  (
    Flag("sampler", text, "The sampler, instead of the config's, such as heun or 'heun(s_churn=40)'."),
    Flag("num_steps", count, "Its number of steps, instead of the config's."),
  ),
)
SAMPLERS = Group(
  "samplers to compare",
  (
    Flag("sampler", components, "Samplers with commas between them, instead of the config's.", many=True),
    Flag("num_steps", counts, "Numbers of steps with commas between them, instead of the config's."),
  ),
)
INCEPTION = Flag(
  "inception_weights",
  text,
  "The file of the FID Inception network's weights, in whose features samples are scored.",
  shown="FILE",
)
WEIGHTS = Group(
  "weights",
  (
    Flag("ema", switch, "Take the averaged weights (the default), or with --ema=false the raw ones."),
    Flag("ema_length", number, "Take an average of this relative width, put together from the run's snapshots."),
    Flag("step", text, "Take the checkpoint of this step, or best, instead of the newest."),
  ),
)
GUIDANCE_SCALE = Flag(
  "guidance_scale", number, "How strongly conditions, a classifier or a weaker model guide (guidance.scale)."
)
STEERING = Group(
  "what samples show",
  (
    Flag("classes", words, "Classes, repeated as needed: short for --given classes=...", shown="CLASS,..."),
    Flag("given", text, "The value of a condition; the flag may be repeated.", shown="NAME=VALUE", many=True),
    Flag("negative_classes", words, "Classes to guide away from, instead of from none.", shown="CLASS,..."),
    Flag("negative", text, "The value of a condition to guide away from.", shown="NAME=VALUE", many=True),
    GUIDANCE_SCALE,
    Flag("classifier", path, "The folder of a classifier's run, which guides to --classes.", shown="FOLDER"),
    Flag(
      "weak",
      text,
      "The folder of a weaker model's run to guide away from; <folder>@<step> for an early checkpoint.",
      shown="FOLDER",
    ),
  ),
)
PROCESSES = Group(
  "several processes",
  (
    Flag("coordinator", text, "The address of process 0.", shown="HOST:PORT"),
    Flag("num_processes", integer, "How many processes there are."),
    Flag("process_id", integer, "Which of them this is, from 0."),
    Flag(
      "distributed",
      switch,
      "Join the processes that the cluster's environment names; by default, if there are several.",
    ),
    Flag("heartbeat_seconds", integer, "How long a process may be silent before the others end (60).", 60),
    Flag("wait_seconds", integer, "How long to wait for all processes at the start (300).", 300),
  ),
)
# What every command that draws samples takes.
DRAWING = (SAMPLER, STEERING, WEIGHTS, PROCESSES)


def output(help: str, shown: str = "FOLDER") -> Group:
  """Declare --output, the file or folder to write."""
  return Group("output", (Flag("output", path, help, shown=shown),))


def folder_of(given: Flags) -> Path:
  """Return the run's folder.

  Raises:
    ValueError: if there is none.
  """
  if given.workdir is None:
    raise ValueError("Got no --workdir; expected a folder for the run, such as --workdir=/tmp/digits.")
  return given.workdir


def output_of(given: Flags, what: str, example: str) -> Path:
  """Return the place to write to.

  Raises:
    ValueError: if there is none.
  """
  if given.output is None:
    raise ValueError(f"Got no --output; expected a place for {what}, such as --output={example}.")
  return given.output


def keys(given: Flags, **short: Any) -> dict[str, str]:
  """Return the texts of the config's keys, by their dotted names.

  They come from --config.<key> flags and from flags that are short for a key, such as --sampler.

  Args:
    given: the flags.
    **short: values of such flags, in place of those in `given`.

  Raises:
    ValueError: if a key is given twice.
  """
  found: dict[str, str] = dict(given.keys)
  for name, value in ({name: getattr(given, name, None) for name in SHORT} | short).items():
    key = SHORT.get(name, f"evaluation.{name}")
    beside = [one for one in given.keys if one == key or one.startswith(f"{key}.")]
    if value is not None and beside:
      raise ValueError(f"Got --{name} beside --config.{beside[0]}; expected one of them.")
    # The key of the scale depends on the rule of guidance, which other flags may change.
    if value is not None and name != "guidance_scale":
      found[key] = str(value)
  return found


def variants(given: Flags) -> list[dict[str, Any]]:
  """Pair each sampler with each number of steps.

  Returns:
    Changes of an experiment, one dict a pair. Without such flags there is one pair, which changes nothing.
  """
  samplers = list(itertools.chain(*(given.sampler or ())))
  choices = [
    [{name: value} for value in values] or [{}]
    for name, values in (("sampler", samplers), ("sampling__num_steps", given.num_steps or ()))
  ]
  return [sampler | steps for sampler, steps in itertools.product(*choices)]


def tree_of(given: Flags, keys: Mapping[str, str]) -> "Tree":
  """Return the recipe's config, or without a recipe the config of the run in the folder.

  Raises:
    ValueError: if there is neither, or a key or its value is wrong.
  """
  from ddpm_jax import config

  return config.read(given.config, keys, given.workdir or Path.cwd())


def recipe_of(given: Flags, keys: Mapping[str, str]) -> "Tree":
  """Return the config of a recipe.

  Raises:
    ValueError: if there is none, or a key or its value is wrong.
  """
  from ddpm_jax import config

  if given.config is None:
    raise ValueError("Got no --config to say which data to read; expected a recipe, such as --config=cifar10_vp.")
  return config.read(given.config, keys)


def experiment_of(given: Flags, keys: Mapping[str, str]) -> "tuple[Experiment, Pretrained | None]":
  """Return the experiment of the run in the folder, and the model of --pretrained, which takes the place of the run's.

  Raises:
    ValueError: if there is no such run or model, or a key or its value is wrong.
  """
  from ddpm_jax import config, runs

  folder = folder_of(given)
  if given.pretrained is None:
    return runs.load_experiment(tree_of(given, keys), folder), None
  if not given.ema is given.ema_length is given.step is None:
    raise ValueError(
      "Got --ema, --ema_length or --step with --pretrained, which has one set of weights; leave them out."
    )
  tree = config.read(given.config, keys, folder, otherwise={})
  tree, model = runs.pretrained.replace_model(given.pretrained, tree, recipe=given.config is not None, keys=keys)
  return config.build(tree, model.model), model


def choice(given: Flags) -> "WeightsChoice":
  """Return which of a run's weights to take."""
  from ddpm_jax import runs

  return runs.WeightsChoice(given.ema is not False, given.ema_length, given.step or "")


def steering(given: Flags) -> "Steering":
  """Return what samples are to show."""
  from ddpm_jax import runs

  weak, step = given.weak or "", ""
  if "@" in weak and not user_path(weak, "--weak=").is_dir():
    weak, _, step = weak.rpartition("@")
  return runs.Steering(
    _by_name("given", given.given, given.classes),
    _by_name("negative", given.negative, given.negative_classes),
    given.classifier,
    path(weak, "weak"),
    step,
  )


def _by_name(flag: str, texts: list[str] | None, classes: list[str] | None) -> dict[str, list[str]]:
  """Collect the values of a flag and of its short form by the names of conditions. Only classes are split at commas."""
  found: dict[str, list[str]] = {"classes": list(classes)} if classes else {}
  for one in texts or ():
    name, equals, value = one.partition("=")
    if not equals or not name:
      raise ValueError(f"Got --{flag} {one}; expected a condition and its value, such as --{flag} classes=3.")
    found.setdefault(name, []).extend(value.split(",") if name == "classes" else [value])
  return found
