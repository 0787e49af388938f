"""Declare the flags that several commands share, and turn them into configs and options of runs.

The functions import JAX when they are called; importing this module does not. So help and errors in flags appear at
once.
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

Args = argparse.Namespace
# Flags that are short forms of config keys.
SHORT_FORMS = {
  "sampler": "sampler",
  "num_steps": "sampling.num_steps",
  "method": "editing.method",
  "strength": "editing.strength",
  "guidance_scale": "guidance.scale",
  "inception_weights": "evaluation.inception_weights",
  "fsdp": "parallel.fsdp",
}
# The largest size of a file of prompts, in bytes.
_MAX_PROMPT_BYTES = 2**24
# The mesh of a run's config suits the devices that trained it. Sampling uses this one unless flags set another.
_SAMPLING_MESH = {"parallel.data": "0", "parallel.fsdp": "1"}

CONFIG = Flag(
  "config",
  text,
  "The name of a recipe (see --config=list) or a Python file. In modes with --workdir, the default is the config of the run"
  " in that folder. Each config key is a flag too: --config.training.steps=100. A flag can also replace a component:"
  " --config.sampler='heun(s_churn=40)'.",
  metavar="RECIPE",
)
WORKDIR = Flag("workdir", path, "The run folder.", metavar="FOLDER")
RUN = Group("config and folder", (CONFIG, WORKDIR))
PRETRAINED = Flag(
  "pretrained",
  text,
  "Use a pretrained model instead of the run's: a diffusers folder, or a name on the Hugging Face hub.",
  metavar="MODEL",
)
MODEL = Group(
  "config, folder and model",
  (
    CONFIG,
    WORKDIR,
    PRETRAINED,
    Flag("size", text, "The size of the images of --pretrained (default: that of its config).", metavar="HEIGHTxWIDTH"),
    Flag("dtype", text, "The type in which --pretrained computes: float32 (the default) or bfloat16."),
    Flag("variant", text, "The variant of the weights of a text pipeline in --pretrained, such as fp16."),
    Flag("revision", text, "The branch, tag or commit of --pretrained on the Hugging Face hub."),
    Flag(
      "token",
      text,
      "A token for the Hugging Face hub (default: the environment variable HF_TOKEN, which other users cannot see).",
    ),
  ),
)
# The flags that need --pretrained.
_OF_PRETRAINED = ("size", "dtype", "variant", "revision")
SAMPLER = Group(
  "sampler",
  (
    Flag("sampler", text, "The sampler, such as heun or 'heun(s_churn=40)' (default: config.sampler)."),
    Flag("num_steps", count, "The number of sampling steps (default: config.sampling.num_steps)."),
  ),
)
SAMPLERS = Group(
  "samplers to compare",
  (
    Flag("sampler", components, "Comma-separated samplers (default: config.sampler).", is_repeatable=True),
    Flag("num_steps", counts, "Comma-separated numbers of steps (default: config.sampling.num_steps)."),
  ),
)
INCEPTION = Flag(
  "inception_weights",
  text,
  "The weights file of the FID Inception network. FID scores need it.",
  metavar="FILE",
)
WEIGHTS = Group(
  "weights",
  (
    Flag("ema", switch, "Use the EMA weights (the default); --ema=false uses the raw weights."),
    Flag("ema_length", number, "Use an EMA of this relative width, reconstructed from the snapshots of the run."),
    Flag("step", text, "The checkpoint to use: its step, or 'best' (default: the newest checkpoint)."),
  ),
)
GUIDANCE_SCALE = Flag("guidance_scale", number, "The scale of guidance (default: config.guidance.scale).")
STEERING = Group(
  "conditions and guidance",
  (
    Flag(
      "classes",
      words,
      "Comma-separated classes, repeated to fill all samples; short for --given classes=...",
      metavar="CLASS,...",
    ),
    Flag(
      "given",
      text,
      "The value of a condition. Repeat the flag for several values or conditions.",
      metavar="NAME=VALUE",
      is_repeatable=True,
    ),
    Flag(
      "prompt",
      text,
      "A text; short for --given text=... Repeat the flag for several texts.",
      metavar="TEXT",
      is_repeatable=True,
    ),
    Flag("prompts", path, "A file with one text in each line, in place of --prompt.", metavar="FILE"),
    Flag(
      "negative_classes", words, "Classes to guide away from (default: guide away from no class).", metavar="CLASS,..."
    ),
    Flag(
      "negative",
      text,
      "A value to guide away from, with its condition. Repeat the flag for several values or conditions.",
      metavar="NAME=VALUE",
      is_repeatable=True,
    ),
    Flag(
      "negative_prompt",
      text,
      "A text to guide away from; short for --negative text=... Repeat the flag for several texts.",
      metavar="TEXT",
      is_repeatable=True,
    ),
    Flag(
      "prompt_weights",
      switch,
      "Read weights in texts, such as (word:1.3), and texts of any length (models with text encoders of CLIP).",
    ),
    GUIDANCE_SCALE,
    Flag("classifier", path, "The run folder of a classifier that guides samples toward --classes.", metavar="FOLDER"),
    Flag(
      "weak",
      text,
      "The run folder of a weaker model to guide away from; <folder>@<step> selects a checkpoint.",
      metavar="FOLDER",
    ),
  ),
)
FSDP = Flag(
  "fsdp", count, "The number of devices that share one copy of the parameters (default: config.parallel.fsdp)."
)
DEVICES = Group(
  "devices", (Flag("fsdp", count, "The number of devices that share one copy of the parameters (default 1)."),)
)
PROCESSES = Group(
  "multiple processes",
  (
    Flag("coordinator", text, "The address of process 0.", metavar="HOST:PORT"),
    Flag("num_processes", integer, "The number of processes."),
    Flag("process_id", integer, "The index of this process, from 0."),
    Flag(
      "distributed",
      switch,
      "Connect to the other processes of the cluster job (default: true if the job has several).",
    ),
    Flag(
      "heartbeat_seconds",
      integer,
      "If a process sends no heartbeat for this number of seconds, the other processes exit (default 60).",
      60,
    ),
    Flag("wait_seconds", integer, "Seconds to wait for all processes to start (default 300).", 300),
  ),
)
# The flags of all commands that generate samples.
GENERATION = (SAMPLER, STEERING, WEIGHTS, DEVICES, PROCESSES)


def output(help: str, metavar: str = "FOLDER") -> Group:
  """Declare the flag --output, a file or folder to write."""
  return Group("output", (Flag("output", path, help, metavar=metavar),))


def run_folder(args: Args) -> Path:
  """Return the run folder.

  Raises:
    ValueError: if --workdir is missing.
  """
  if args.workdir is None:
    raise ValueError("Got no --workdir; expected a folder for the run, such as --workdir=/tmp/digits.")
  return args.workdir


def output_path(args: Args, content: str, example: str) -> Path:
  """Return the path to write to.

  Args:
    args: the parsed flags.
    content: what is written, such as "the model", for the error message.
    example: a path, for the error message.

  Raises:
    ValueError: if --output is missing.
  """
  if args.output is None:
    raise ValueError(f"Got no --output; expected a path for {content}, such as --output={example}.")
  return args.output


def config_keys(args: Args, **short: Any) -> dict[str, str]:
  """Return the config keys that flags set, as a dict from the dotted name of a key to its value as text.

  Keys are set by --config.<key> flags and by short forms of such flags, for example --sampler. The key that
  --guidance_scale sets is left out.

  Args:
    args: the parsed flags.
    **short: values to set in addition to `args`. The name of each is a short form, such as `sampler`, or a key of
      `config.evaluation`. The value of a short form replaces the value in `args`.

  Raises:
    ValueError: if a short form and a --config.<key> flag set the same key.
  """
  texts: dict[str, str] = dict(args.keys)
  for name, value in ({name: getattr(args, name, None) for name in SHORT_FORMS} | short).items():
    key = SHORT_FORMS.get(name, f"evaluation.{name}")
    conflicts = [one for one in args.keys if one == key or one.startswith(f"{key}.")]
    if value is not None and conflicts:
      raise ValueError(f"Got --{name} and --config.{conflicts[0]}; expected only one of them.")
    # The key of the guidance scale depends on the rule of guidance, which other flags may change.
    if value is not None and name != "guidance_scale":
      texts[key] = str(value)
  return texts


def sampling_keys(args: Args, **short: Any) -> dict[str, str]:
  """Return the config keys that flags set in a mode that generates samples (see `config_keys`).

  If no flag sets the mesh of the devices, the result contains the keys of the default mesh. The mesh in the config is
  for the devices that trained the model.
  """
  return _SAMPLING_MESH | config_keys(args, **short)


def variants(args: Args) -> list[dict[str, Any]]:
  """Pair each sampler with each number of steps.

  Returns:
    A list with a dict for each pair: the arguments of `Experiment.replace`. Without --sampler and --num_steps, the list
    is [{}].
  """
  samplers = list(itertools.chain(*(args.sampler or ())))
  choices = [
    [{name: value} for value in values] or [{}]
    for name, values in (("sampler", samplers), ("sampling__num_steps", args.num_steps or ()))
  ]
  return [sampler | steps for sampler, steps in itertools.product(*choices)]


def read_config(args: Args, keys: Mapping[str, str]) -> "Tree":
  """Read the config of the recipe or, without a recipe, of the run in --workdir.

  Raises:
    ValueError: if there is neither a recipe nor a run, or a key or value is invalid.
  """
  from ddpm_jax import config

  return config.read(args.config, keys, args.workdir or Path.cwd())


def read_recipe(args: Args, keys: Mapping[str, str]) -> "Tree":
  """Read the config of the recipe.

  Raises:
    ValueError: if there is no recipe, or a key or value is invalid.
  """
  from ddpm_jax import config

  if args.config is None:
    raise ValueError("Got no --config; expected a recipe that names the data, such as --config=cifar10_vp.")
  return config.read(args.config, keys)


def load_experiment(args: Args, keys: Mapping[str, str]) -> "tuple[Experiment, Pretrained | None]":
  """Load the experiment of the run in --workdir, or an experiment with the --pretrained model.

  Returns:
    A tuple of the experiment and the pretrained model. Without --pretrained, the model is None.

  Raises:
    ValueError: if there is neither a run nor a pretrained model, a key or value is invalid, or --pretrained is combined
      with a flag that chooses weights.
  """
  from ddpm_jax import config, interop, runs

  folder, (path, choices) = run_folder(args), pretrained_choices(args)
  interop.hub.use_token(args.token)
  if args.pretrained is None:
    return runs.load_experiment(read_config(args, keys), folder), None
  if not args.ema is args.ema_length is args.step is None:
    raise ValueError(
      "Got --ema, --ema_length or --step with --pretrained, which has only one set of weights; leave them out."
    )
  tree = config.read(args.config, keys, folder, default={})
  tree, model = runs.pretrained.replace_model(path, tree, recipe=args.config is not None, keys=keys, choices=choices)
  return config.build(tree, model.model), model


def pretrained_choices(args: Args) -> tuple[str, dict[str, Any]]:
  """Return the path of the pretrained model and a dict of its options.

  With --revision, the path is "name@revision". The options are "dtype", "variant" and "shape", each only if a flag sets
  it. Without --pretrained, the path and the dict are empty.

  Raises:
    ValueError: if a flag for a pretrained model is set without --pretrained, or the size is invalid.
  """
  given = [name for name in _OF_PRETRAINED if getattr(args, name)]
  if args.pretrained is None:
    if given:
      raise ValueError(
        f"Got --{given[0]} without --pretrained; expected both or neither. Add --pretrained, or leave --{given[0]} out."
      )
    return "", {}
  choices: dict[str, Any] = {name: getattr(args, name) for name in ("dtype", "variant") if getattr(args, name)}
  if args.size:
    sides = args.size.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and len(side) < 9 and int(side) > 0 for side in sides):
      raise ValueError(f"Got --size={args.size}; expected the height and the width in pixels, such as --size=512x768.")
    choices["shape"] = (int(sides[0]), int(sides[1]), 3)
  if args.revision and user_path(args.pretrained, "--pretrained=").is_dir():
    raise ValueError(f"Got --revision for the folder {args.pretrained}; expected a name on the hub. Leave it out.")
  return (f"{args.pretrained}@{args.revision}" if args.revision else args.pretrained), choices


def weights_choice(args: Args) -> "WeightsChoice":
  """Return the weights and the checkpoint that flags choose."""
  from ddpm_jax import runs

  return runs.WeightsChoice(args.ema is not False, args.ema_length, args.step or "")


def steering(args: Args) -> "Steering":
  """Return the conditions and the guiding models that flags set."""
  from ddpm_jax import runs

  weak, step = args.weak or "", ""
  if "@" in weak and not user_path(weak, "--weak=").is_dir():
    weak, _, step = weak.rpartition("@")
  return runs.Steering(
    _by_condition("given", args.given, args.classes, _prompts_of(args)),
    _by_condition("negative", args.negative, args.negative_classes, args.negative_prompt),
    args.classifier,
    path(weak, "weak"),
    step,
    bool(args.prompt_weights),
  )


def _prompts_of(args: Args) -> list[str]:
  """Return the texts of --prompt, or the lines of the file --prompts.

  Empty lines of the file are skipped.

  Raises:
    ValueError: if both flags are set, or the file cannot be read, is too large or has no text.
  """
  if args.prompts is None:
    return list(args.prompt or ())
  if args.prompt:
    raise ValueError("Got --prompt and --prompts; expected only one of them. Add the text to the file.")
  try:
    with args.prompts.open("rb") as file:
      # A file that is too large may not fit into memory.
      content = file.read(_MAX_PROMPT_BYTES + 1)
    is_too_large = len(content) > _MAX_PROMPT_BYTES
    lines = [] if is_too_large else content.decode("utf-8-sig").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f"Cannot read --prompts={args.prompts}: {error}. Pass a text file in UTF-8.") from error
  texts = [line.strip() for line in lines if line.strip()]
  if not texts:
    problem = f"more than {_MAX_PROMPT_BYTES:,} bytes" if is_too_large else "no text"
    raise ValueError(f"Got --prompts={args.prompts} with {problem}; expected a file with one text in each line.")
  return texts


def _by_condition(
  flag: str, texts: list[str] | None, classes: list[str] | None, prompts: list[str] | None
) -> dict[str, list[str]]:
  """Return the values that a flag and its short forms set, as a dict from each condition to a list.

  The short forms set the conditions `classes` and `text`. Only values of `classes` are split at commas.
  """
  values: dict[str, list[str]] = {"classes": list(classes)} if classes else {}
  values |= {"text": list(prompts)} if prompts else {}
  for one in texts or ():
    name, equals, value = one.partition("=")
    if not equals or not name:
      raise ValueError(f"Got --{flag} {one}; expected a condition and its value, such as --{flag} classes=3.")
    values.setdefault(name, []).extend(value.split(",") if name == "classes" else [value])
  return values
