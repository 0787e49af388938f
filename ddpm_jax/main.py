"""The command line: `python -m ddpm_jax.main --config=configs/digits_vp.py --workdir=<folder>`."""

import contextlib
import errno
import itertools
import logging as standard_logging
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging

import ddpm_jax
from ddpm_jax import console, files, heap, interrupts, words, workdir
from ddpm_jax.places import cache_folder, user_path

# Read apart from all other flags, with the keys (--config.<key>=<value>); here for --help.
_CONFIG = flags.DEFINE_string(
  "config",
  None,
  "A file in configs/; sampling and evaluation default to the run's own. Each key is a flag: --config.training.steps=100; a whole component too:"
  ' --config.objective.weighting="min_snr(gamma=5)".',
)
_MODE = flags.DEFINE_string(
  "mode", "train", "What to do: train, sample, edit, eval, stats, export, convert, prepare or plan."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", None, "Samples to draw (sample: 64; eval: the config's).")
_SAMPLER = flags.DEFINE_multi_string(
  "sampler",
  None,
  "The sampler, instead of the config's, such as heun or 'heun(s_churn=40)'; in eval several are compared, with commas between them or each with"
  " its own flag.",
)
_NUM_STEPS = flags.DEFINE_list(
  "num_steps", None, "Its steps, instead of the config's; in eval several numbers of them."
)
_SEED = flags.DEFINE_integer("seed", None, "The seed of sampling (sample: 0; eval: the config's).")
_PRETRAINED = flags.DEFINE_string(
  "pretrained",
  None,
  "Sample from this folder of diffusers, or name on the Hugging Face hub, instead of the run's checkpoint.",
)
_OUTPUT = flags.DEFINE_string("output", None, "The folder that export or prepare writes, the file of stats or convert.")
_INCEPTION_WEIGHTS = flags.DEFINE_string(
  "inception_weights", None, "The file of the FID Inception network's weights, in whose features samples are scored."
)
_EMA = flags.DEFINE_bool("ema", None, "Take the averaged weights (the default), or with --ema=false the raw ones.")
_EMA_LENGTH = flags.DEFINE_float(
  "ema_length", None, "Take an average of this relative width, put together from the run's snapshots."
)
_STEP = flags.DEFINE_string("step", None, "Take the checkpoint of this step, or best, instead of the newest.")
_RESUME = flags.DEFINE_string(
  "resume", "auto", "In training: go on if there is a run (auto), demand it (must), or forbid it (never)."
)
_PROFILE = flags.DEFINE_integer("profile", 0, "In training: trace so many steps, into the run's folder.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "Of a run of several processes: host:port of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  None,
  "Whether to join the processes that the cluster's environment names (by default, if it names several).",
)
_HEARTBEAT = flags.DEFINE_integer("heartbeat_seconds", 60, "How long a process may be silent before the others end.")
_WAIT = flags.DEFINE_integer("wait_seconds", 300, "How long to wait for all processes at the start.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Plan for this TPU slice, such as v5e:4x4, which need not be there.")
_DEVICES = flags.DEFINE_integer(
  "devices", None, "Plan for so many devices of this machine; a CPU is taken for as many."
)
_GIVEN = flags.DEFINE_multi_string(
  "given",
  None,
  "What samples are to show, by the names of the model's conditions: --given name=value, as often as there are values.",
)
_NEGATIVE = flags.DEFINE_multi_string("negative", None, "The same, to guide away from: --negative name=value.")
_CLASSES = flags.DEFINE_list("classes", None, "Classes to sample, repeated as needed: short for --given classes=...")
_NEGATIVE_CLASSES = flags.DEFINE_list(
  "negative_classes", None, "Classes to guide away from, instead of from none: short for --negative classes=..."
)
_GUIDANCE_SCALE = flags.DEFINE_float(
  "guidance_scale", None, "How strongly conditions, a classifier or a weaker model guide (config.guidance.scale)."
)
_CLASSIFIER = flags.DEFINE_string("classifier", None, "The folder of a classifier's run, which guides to --classes.")
_WEAK = flags.DEFINE_string(
  "weak",
  None,
  "The folder of a weaker model's run to guide away from (autoguidance); <folder>@<step> for an early checkpoint.",
)
_UPSAMPLER = flags.DEFINE_list(
  "upsampler", None, "Folders of super-resolution runs that enlarge the samples, one after the other."
)
_TASK = flags.DEFINE_string(
  "task", None, "In editing: inpaint, img2img, colorize, superres, restore, interpolate or invert."
)
_INPUT = flags.DEFINE_string("input", None, "What to edit: an image, a folder of images or an .npz file.")
_MASK = flags.DEFINE_string(
  "mask", None, "To inpaint: an image, white where it is to be painted; or lower, upper, left, right or centre."
)
_METHOD = flags.DEFINE_string(
  "method",
  None,
  "How: inpaint by repaint, replace, posterior or dps; colorize, superres and restore by posterior or dps.",
)
_STRENGTH = flags.DEFINE_float("strength", None, "Of img2img, from 0 (the input) to 1 (a fresh sample).")
_ENDING = threading.Lock()
_TRACEBACK = flags.DEFINE_bool("traceback", False, "On an error, show where in the code it arose.")


def main(argv: list[str]) -> None:
  """Run the mode that the flags name.

  Raises:
    ValueError: if a flag, the config or the folder does not allow it; the program shows it as one message.
  """
  if len(argv) > 1:
    raise ValueError(f"Got the words {argv[1:]} on the command line; wanted flags only, such as --workdir=<folder>.")
  # Libraries narrate their inner workings, and log in full what then ends in one message of ours.
  logging.set_verbosity(logging.WARNING if _TRACEBACK.value else logging.FATAL)
  if not _TRACEBACK.value:
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
    # Python's own tracker of shared memory, a process, cleans up after one that was killed.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    # `_main` shows what Python raises. Only native code gets here, such as writes to a full disk after the first that failed.
    sys.excepthook = lambda *_: None
  # The first line comes before JAX and the rest are imported.
  print(f"ddpm_jax {ddpm_jax.__version__}, mode {_MODE.value}, workdir {_WORKDIR.value}", flush=True)
  from ddpm_jax import config, prepare, runs, startup
  from ddpm_jax.names import choose

  modes = ("train", "sample", "edit", "eval", "stats", "export", "convert", "prepare", "plan")
  mode = choose(_MODE.value, modes, "--mode")
  if not _WORKDIR.value and mode not in ("stats", "convert", "prepare", "plan"):
    raise ValueError("Got no --workdir; wanted a folder for the run, such as --workdir=/tmp/digits.")
  folder = _path(_WORKDIR) or Path.cwd()
  for flag, served in (
    (_GIVEN, ("sample", "edit")),
    (_NEGATIVE, ("sample", "edit")),
    (_CLASSES, ("sample", "edit")),
    (_NEGATIVE_CLASSES, ("sample", "edit")),
    (_GUIDANCE_SCALE, ("sample", "edit", "eval")),
    (_CLASSIFIER, ("sample", "edit")),
    (_WEAK, ("sample", "edit")),
    (_UPSAMPLER, ("sample",)),
    (_TASK, ("edit",)),
    (_INPUT, ("edit",)),
    (_MASK, ("edit",)),
    (_METHOD, ("edit",)),
    (_STRENGTH, ("edit",)),
    (_PRETRAINED, ("sample", "edit")),
    (_NUM_SAMPLES, ("sample", "edit", "eval")),
    (_SEED, ("sample", "edit", "eval")),
    (_OUTPUT, ("export", "prepare", "stats", "convert")),
    (_INCEPTION_WEIGHTS, ("train", "eval", "stats", "convert")),
    (_EMA, ("sample", "edit", "eval", "export")),
    (_EMA_LENGTH, ("sample", "edit", "eval", "export")),
    (_STEP, ("sample", "edit", "eval", "export")),
    (_SAMPLER, ("train", "sample", "edit", "eval", "export")),
    (_NUM_STEPS, ("train", "sample", "edit", "eval")),
    (_RESUME, ("train",)),
    (_PROFILE, ("train",)),
    (_COORDINATOR, ("train", "sample", "edit", "eval", "export")),
    (_NUM_PROCESSES, ("train", "sample", "edit", "eval", "export")),
    (_PROCESS_ID, ("train", "sample", "edit", "eval", "export")),
    (_TOPOLOGY, ("plan",)),
    (_DEVICES, ("plan",)),
  ):
    if flag.value != flag.default and mode not in served:
      raise ValueError(
        f"Got --{flag.name} in mode {mode}; it serves {' and '.join(served)} only. In training, set keys of the config."
      )
  if _SEED.value is not None and not 0 <= _SEED.value < 2**32:
    raise ValueError(f"Got --seed={_SEED.value}; wanted 0 to {2**32 - 1}.")
  if mode == "convert":
    runs.run_convert(_INCEPTION_WEIGHTS.value or "", _output("the weights", "/tmp/inception.safetensors"))
    return
  if mode == "stats":
    _start_devices()
    experiment = config.build(_data_config())
    if _INCEPTION_WEIGHTS.value:
      experiment = experiment.changed(evaluation__inception_weights=_INCEPTION_WEIGHTS.value)
    runs.run_statistics(experiment, _output("the statistics", "/tmp/statistics.npz"))
    return
  if mode == "prepare":
    import jax

    # Building a config computes a little, for which no accelerator should be taken from others.
    jax.config.update("jax_platforms", "cpu")
    prepare.run_prepare(config.build(_data_config()), _path(_OUTPUT))
    return
  if mode == "plan":
    tree = _config(folder)
    _cache_compilations()
    runs.run_plan(tree, topology_name=_TOPOLOGY.value, num_devices=_DEVICES.value)
    return
  choose(_RESUME.value, ("auto", "must", "never"), "--resume")
  _connect()
  _start_devices()
  if mode != "train":
    startup.end_on_sigterm()
  variants = _variants(mode)
  if _PRETRAINED.value is not None and not (_EMA.value is _EMA_LENGTH.value is _STEP.value is None):
    raise ValueError(
      "Got --ema, --ema_length or --step with --pretrained, which has one set of weights; leave them out."
    )
  tree, model = _config(folder), None
  if _PRETRAINED.value is not None:
    tree, model = runs.starts.pretrained(
      _PRETRAINED.value, tree, recipe=_CONFIG.value is not None, sampler=variants[-1][0], keys=_KEYS
    )
  tree = _with_flags(tree, mode, variants[-1], folder)
  choice = runs.Choice(_EMA.value is not False, _EMA_LENGTH.value, _STEP.value or "")
  if mode == "train":
    runs.run_train(tree, folder, resume=_RESUME.value, profile=_PROFILE.value)
    return
  # Flags before what they are used on.
  output = _output("the folder to export to", "/tmp/model") if mode == "export" else Path()
  edit = _edit() if mode == "edit" else None
  steering = _steering() if mode in ("sample", "edit") else runs.Steering()
  upsamplers = [user_path(path, "--upsampler=").absolute() for path in _UPSAMPLER.value or ()]
  experiment = runs.trained(tree, folder) if model is None else config.build(tree, model.model)
  if mode == "eval":
    runs.run_eval(
      experiment,
      folder,
      seed=experiment.seed if _SEED.value is None else _SEED.value,
      choice=choice,
      variants=[experiment.changed(**_variant(variant)) for variant in variants],
    )
  elif mode == "export":
    runs.run_export(experiment, folder, output, choice)
  elif edit is not None:
    if _TASK.value in ("invert", "interpolate") and _SAMPLER.value is None:
      experiment = runs.reversible(experiment)
    runs.run_edit(
      experiment,
      folder,
      edit,
      seed=_SEED.value or 0,
      choice=choice,
      steering=steering,
      scale=_GUIDANCE_SCALE.value,
      model=model,
    )
  else:
    runs.run_sample(
      experiment,
      folder,
      num_samples=64 if _NUM_SAMPLES.value is None else _NUM_SAMPLES.value,
      seed=_SEED.value or 0,
      choice=choice,
      steering=steering,
      scale=_GUIDANCE_SCALE.value,
      upsamplers=upsamplers,
      model=model,
    )


# What the command line says of the config, apart from all other flags.
_KEYS: dict[str, str] = {}


def _config(folder: Path) -> Any:
  """Return the config of the recipe or the run, with the keys of the command line."""
  from ddpm_jax import config

  found = config.read(_CONFIG.value, _KEYS, folder)
  if found is None and _PRETRAINED.value is not None:
    found = config.expand({})
  return config.of_run(folder) if found is None else found


def _data_config() -> Any:
  """Return the config that names the data to prepare."""
  from ddpm_jax import config

  if _CONFIG.value is None:
    raise ValueError(
      "Got no --config to say which data to prepare; wanted a recipe, such as --config=configs/cifar10_vp.py."
    )
  return config.read(_CONFIG.value, _KEYS)


def _variant(variant: tuple[str | None, int | None]) -> dict[str, Any]:
  sampler, steps = variant
  return ({} if sampler is None else {"sampler": sampler}) | ({} if steps is None else {"sampling__num_steps": steps})


def _with_flags(tree: Any, mode: str, variant: tuple[str | None, int | None], folder: Path) -> Any:
  """Return a config with the values of flags that stand for keys."""
  from ddpm_jax import config, runs

  changes = _variant(variant)
  if _INCEPTION_WEIGHTS.value is not None:
    changes["evaluation__inception_weights"] = _INCEPTION_WEIGHTS.value
  if mode == "eval":
    if _GUIDANCE_SCALE.value is not None:
      changes[runs.steering.scale_key(tree)] = _GUIDANCE_SCALE.value
    if _NUM_SAMPLES.value is not None:
      changes["evaluation__num_samples"] = _NUM_SAMPLES.value
  if mode == "edit":
    if _METHOD.value is not None:
      changes["editing__method"] = runs.edits.method(_TASK.value or "", _METHOD.value)
    if _STRENGTH.value is not None:
      if _TASK.value != "img2img":
        raise ValueError(f"Got --strength for the task {_TASK.value!r}; wanted it with --task=img2img only.")
      changes["editing__strength"] = _STRENGTH.value
  for flag, key in (
    (_SAMPLER, "sampler"),
    (_NUM_STEPS, "sampling.num_steps"),
    (_METHOD, "editing.method"),
    (_GUIDANCE_SCALE, "guidance.scale"),
    (_STRENGTH, "editing.strength"),
    (_INCEPTION_WEIGHTS, "evaluation.inception_weights"),
    *([(_NUM_SAMPLES, "evaluation.num_samples")] if mode == "eval" else []),
  ):
    beside = [name for name in _KEYS if name == key or name.startswith(f"{key}.")]
    if flag.value is not None and beside:
      raise ValueError(f"Got --{flag.name} beside --config.{beside[0]}; expected one of them.")
  for key, value in changes.items():
    tree = config.changed(tree, key.replace("__", "."), value)
  return tree


def _connect() -> None:
  """Join the other processes of the run, if there are any, before JAX is first used."""
  from ddpm_jax import startup

  given = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  named = any(value is not None for value in given)
  if named or (startup.environment_processes() > 1 if _DISTRIBUTED.value is None else _DISTRIBUTED.value):
    if named and _DISTRIBUTED.value is False:
      raise ValueError(
        "Got --distributed=false with --coordinator, --num_processes or --process_id; wanted one of them."
      )
    startup.connect(*given, heartbeat_seconds=_HEARTBEAT.value, wait_seconds=_WAIT.value)


def _output(what: str, example: str) -> Path:
  path = _path(_OUTPUT)
  if path is None:
    raise ValueError(f"Got no --output; wanted a place for {what}, such as --output={example}.")
  return path


def _variants(mode: str) -> list[tuple[str | None, int | None]]:
  """Return each sampler with each number of steps that the flags name; None stands for the config's."""
  samplers: list[Any] = [sampler for text in _SAMPLER.value or () for sampler in _at_commas(text)]
  steps: list[Any] = _integers(_NUM_STEPS) or []
  for flag, values in ((_SAMPLER, samplers), (_NUM_STEPS, steps)):
    if mode != "eval" and len(values) > 1:
      raise ValueError(
        f"Got --{flag.name}={','.join(map(str, values))} in mode {mode}; wanted one: eval alone compares several."
      )
  if any(number < 1 for number in steps):
    raise ValueError(f"Got --num_steps={','.join(map(str, steps))}; wanted 1 or more.")
  return list(itertools.product(samplers or [None], steps or [None]))


def _at_commas(text: str) -> list[str]:
  """Split a text at the commas outside of brackets."""
  parts, depth = [""], 0
  for letter in text:
    depth += {"(": 1, ")": -1}.get(letter, 0)
    if letter == "," and depth == 0:
      parts.append("")
    else:
      parts[-1] += letter
  return parts


def _steering() -> Any:
  from ddpm_jax import runs

  weak, step = _WEAK.value or "", ""
  if "@" in weak and not user_path(weak, "--weak=").is_dir():
    weak, _, step = weak.rpartition("@")
  return runs.Steering(
    _by_name(_GIVEN, _CLASSES),
    _by_name(_NEGATIVE, _NEGATIVE_CLASSES),
    _path(_CLASSIFIER),
    user_path(weak, "--weak=").absolute() if weak else None,
    step,
  )


def _by_name(flag: flags.FlagHolder, classes: flags.FlagHolder) -> dict[str, list[str]]:
  """Return the values of --given and its short form by the names of conditions; only those of classes are split at commas."""
  found: dict[str, list[str]] = {"classes": list(classes.value)} if classes.value else {}
  for text in flag.value or ():
    name, equals, value = text.partition("=")
    if not equals or not name:
      raise ValueError(
        f"Got --{flag.name} {text}; expected a condition and its value, such as --{flag.name} classes=3."
      )
    found.setdefault(name, []).extend(value.split(",") if name == "classes" else [value])
  return found


def _edit() -> Any:
  from ddpm_jax import runs
  from ddpm_jax.names import choose
  from ddpm_jax.runs import edits

  return runs.Edit(
    choose(_TASK.value or "", tuple(edits.TASKS), "--task"),
    _path(_INPUT),
    # Not absolute: it may be the name of a half.
    str(user_path(_MASK.value, "--mask=")) if _MASK.value else "",
    1 if _NUM_SAMPLES.value is None else _NUM_SAMPLES.value,
  )


def _path(flag: flags.FlagHolder) -> Path | None:
  return user_path(flag.value, f"--{flag.name}=").absolute() if flag.value else None


def _integers(flag: flags.FlagHolder) -> list[int] | None:
  try:
    return None if flag.value is None else [int(label) for label in flag.value]
  except ValueError as error:
    raise ValueError(
      f"Got --{flag.name}={','.join(flag.value)}; wanted integers, such as --{flag.name}=3,7."
    ) from error


def _start_devices() -> None:
  from ddpm_jax import startup

  startup.start_devices(quiet=not _TRACEBACK.value)
  _cache_compilations()


def _cache_compilations() -> None:
  """Keep compiled programs between runs, unless the user has said where (JAX_COMPILATION_CACHE_DIR) or which."""
  import jax

  if not jax.config.values["jax_compilation_cache_dir"] and (cache := cache_folder("xla")):
    jax.config.update("jax_compilation_cache_dir", str(cache))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    # The small ones too: before the first step there are dozens of them, 20 ms each.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _parse(argv: list[str]) -> list[str]:
  """Read flags from the command line; a mistake in them ends the program with one message, as all bad input does."""
  if not any(word.lstrip("-").startswith("traceback") for word in argv):
    # XLA reads this when it is loaded, as by a config. It takes a compilation of some minutes for a bug to report.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  try:
    found = words.split(argv[1:])
    _KEYS.clear()
    _KEYS.update(found.keys)
    recipe = [] if found.recipe is None else [f"--config={found.recipe}"]
    return flags.FLAGS([argv[0], *recipe, *found.rest])
  except flags.Error as error:
    _stop(_mistake(error))
  except ValueError as error:
    _stop(str(error))


def _mistake(error: flags.Error) -> str:
  """Return what is wrong with a flag, in other words than Python's."""
  text = str(error)
  for said, meant in (
    ("invalid literal for int()", "an integer, in digits alone"),
    ("could not convert string", "a number"),
  ):
    given, found, _ = text.partition(f": {said}")
    if found:
      return f"Got {given.removeprefix('flag ')}; expected {meant}."
  return text


def _stop(message: str, code: int = 2) -> NoReturn:
  print(f"error: {message}", file=sys.stderr)
  _leave(code)
  sys.exit(code)


def _leave(code: int) -> None:
  """End one of several processes at once; the others may be waiting for it."""
  sys.stdout.flush()
  sys.stderr.flush()
  # It joined the others by that module, whose import an interrupt may have ended halfway.
  leave = getattr(sys.modules.get("ddpm_jax.parallel"), "leave", None)
  if leave is not None:
    leave(code)


def _interrupted() -> NoReturn:
  """End at once on Ctrl-C: what would run at a normal end may wait for a compiler that cannot be stopped, or fail in it."""
  if not _ENDING.acquire(blocking=False):
    # Another thread is at it.
    time.sleep(60)
  consequence = ""
  with contextlib.suppress(OSError):
    if flags.FLAGS.is_parsed() and _MODE.value == "train" and _WORKDIR.value:
      steps = workdir.checkpoint_steps(Path(os.path.expanduser(_WORKDIR.value)))
      consequence = (
        f"; the same command goes on from the checkpoint of step {steps[-1]:,}"
        if steps
        else " before the first checkpoint; the same command starts anew"
      )
  try:
    files.abandon()
    print(f"\nerror: interrupted{consequence}", file=sys.stderr, flush=True)
    _leave(128 + signal.SIGINT)
  except RuntimeError:
    # The signal found the stream in the middle of a write.
    os.write(2, f"\nerror: interrupted{consequence}\n".encode())
  finally:
    os._exit(128 + signal.SIGINT)


def _describe(error: Exception) -> str:
  """Return an error's message; one of the system's own gets the name of its file and what to do."""
  if not isinstance(error, OSError) or error.errno is None:
    return str(error)
  said = f"Cannot use {error.filename}: {error.strerror}." if error.filename else f"{error}."
  if error.errno in (errno.ENOSPC, errno.EDQUOT):
    return f"{said} Make room, then run the same command again."
  return f"{said} Check what lies there and who may use it." if error.filename else said


def _main(argv: list[str]) -> None:
  heap.keep()
  heap.collect_rarely()
  try:
    main(argv)
  except (ValueError, FloatingPointError, OSError) as error:
    if isinstance(error, BrokenPipeError) and console.silence_unread():
      _leave(console.UNREAD)
      sys.exit(console.UNREAD)
    if _TRACEBACK.value:
      traceback.print_exc()
    _stop(_describe(error))
  except Exception as error:
    from ddpm_jax import data

    if isinstance(error, data.WorkerDied):
      print(f"error: {error}", file=sys.stderr, flush=True)
      _leave(2)
      sys.stdout.flush()
      # What runs at a normal end might wait for a lock that the dead process held.
      os._exit(2)
    traceback.print_exc()
    _leave(1)
    sys.exit(1)


if __name__ == "__main__":
  with console.printing(), interrupts.ended_at_once(_interrupted):
    app.run(_main, flags_parser=_parse)
