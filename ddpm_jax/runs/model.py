"""A run's model: its state, new or from a checkpoint, and what else the modes share."""

import contextlib
import functools
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from tqdm import tqdm

import ddpm_jax
from ddpm_jax import config, training
from ddpm_jax.config import Experiment
from ddpm_jax.devices import parallel
from ddpm_jax.metrics import evaluate
from ddpm_jax.runs import frozen as frozen_module
from ddpm_jax.runs import starts, stepping
from ddpm_jax.storage import checkpoint, sealed, workdir
from ddpm_jax.training import ema

PyTree = Any
# Seconds between two signs of life.
_NEWS = 20.0
# Of scores, what differs from run to run.
_APART = "times"


class Choice(NamedTuple):
  """Which of a run's weights to take.

  Attributes:
    averaged: the EMA (True), or the raw parameters.
    length: the relative width of an EMA to be put together from stored snapshots; None for the one that was kept.
    step: the step of the checkpoint, a number or "best"; empty for the newest.
  """

  averaged: bool = True
  length: float | None = None
  step: str = ""

  def __str__(self) -> str:
    if self.length is not None:
      return f"EMA of relative width {self.length:g}"
    return "EMA" if self.averaged else "raw"


class Weights(NamedTuple):
  """Parameters of a run's model.

  Attributes:
    params: what it learned.
    step: of their checkpoint.
    name: which they are, for people to read.
    frozen: its frozen parameters (`Model.load_frozen`).
  """

  params: PyTree
  step: int
  name: str
  frozen: Mapping[str, PyTree] = {}


def say(text: str) -> None:
  """Print a line above the progress bar, if there is one; the first of several processes speaks for all."""
  if parallel.is_main():
    tqdm.write(text)


def warn(text: str) -> None:
  """Print a warning, where errors are looked for."""
  if parallel.is_main():
    tqdm.write(f"warning: {text}", file=sys.stderr)


@contextlib.contextmanager
def patience(what: str) -> Iterator[None]:
  """Say now and then that what is done here lives, such as a compilation, which shows no progress by itself."""
  done, start = threading.Event(), time.perf_counter()

  def speak() -> None:
    while not done.wait(_NEWS):
      say(f"{what}: {time.perf_counter() - start:,.0f} s so far; a large network takes minutes ...")

  threading.Thread(target=speak, daemon=True).start()
  try:
    yield
  finally:
    done.set()


def compile_aloud(what: str, lower: Callable[[], Any]) -> Any:
  """Compile what `lower` gives, and say before, meanwhile and after how long both take."""
  say(f"compiling {what} (of a large network this takes minutes, once: later runs read it from the cache) ...")
  start = time.perf_counter()
  with patience(f"compiling {what}"):
    compiled = lower().compile()
  say(f"compiled {what} in {time.perf_counter() - start:.1f} s")
  return compiled


def make_state(
  experiment: Experiment, mesh: jax.sharding.Mesh, frozen: PyTree = None, params: PyTree = None
) -> tuple[Callable[[], training.TrainState], training.TrainState]:
  """Return a function that makes the first state, and the state's shapes and layout.

  Args:
    experiment: what is trained.
    mesh: the devices.
    frozen: all frozen parameters, or their shapes; None for none.
    params: of the model to start with; None for new ones.
  """
  init, optimizer = experiment.model.init, stepping.optimizer(experiment)

  def start(params, frozen):
    make = init if params is None else lambda key: params
    return training.init_state(jax.random.key(experiment.seed), make, optimizer, experiment.objective, frozen)

  shapes = jax.eval_shape(start, params, frozen)
  shardings = parallel.state_shardings(mesh, shapes)
  compiled = jax.jit(start, out_shardings=shardings, compiler_options=parallel.compiler_options(mesh, once=True))
  return functools.partial(compiled, params, frozen), parallel.abstract(shapes, shardings)


def items_of(state: training.TrainState) -> dict[str, PyTree]:
  """Return a state as a checkpoint keeps it: what only training needs is apart, so that sampling does not read it."""
  rest, averages = ema.split(state.opt_state)
  return {
    "params": state.params,
    "ema": averages,
    "training": {
      "step": state.step,
      "extra": state.extra,
      "memory": state.memory,
      "opt_state": rest,
      "key": state.key,
    },
  }


def state_of(items: dict[str, PyTree]) -> training.TrainState:
  """Return the state that `items_of` took apart."""
  rest = dict(items["training"])
  opt_state = ema.join(rest.pop("opt_state"), items["ema"])
  return training.TrainState(params=items["params"], opt_state=opt_state, **rest)


def open_checkpoints(experiment: Experiment, folder: Path) -> checkpoint.Checkpoints:
  """Open the run's checkpoints, kept as the config says."""
  c = experiment.training
  return checkpoint.Checkpoints(
    workdir.checkpoint_folder(folder),
    keep=c.keep_checkpoints,
    keep_every=c.keep_every,
    keep_best=c.keep_best,
    metric=c.best_metric,
    highest=evaluate.higher_is_better(c.best_metric.partition("_by_log_snr")[0]),
  )


def open_snapshots(folder: Path) -> checkpoint.Checkpoints:
  """Open the run's stored averages, all of them kept."""
  return checkpoint.Checkpoints(workdir.snapshot_folder(folder), keep=2**31)


def load_weights(
  experiment: Experiment, folder: Path, mesh: jax.sharding.Mesh, choice: Choice, *, quiet: bool = False
) -> Weights:
  """Read the chosen parameters of a run and its frozen ones, whole on every device.

  Raises:
    ValueError: if there are none such, the choice contradicts itself, or the frozen ones are not those that the run was trained with.
  """
  frozen = frozen_module.of_model(experiment, folder, mesh)
  # Of all that training carries on with these alone: what the objective had need not be there.
  shapes = jax.eval_shape(experiment.model.init, jax.random.key(0))
  _, averages = ema.split(jax.eval_shape(stepping.averages(experiment).init, shapes))
  items = parallel.abstract({"params": shapes, "ema": averages}, parallel.replicated(mesh))
  if choice.length is not None:
    if not choice.averaged:
      raise ValueError(f"Got --ema=false with --ema_length={choice.length}; wanted one of them.")
    return _reconstructed(experiment, folder, items["ema"], choice, choice.length)._replace(frozen=frozen)
  name = "ema" if choice.averaged else "params"
  checkpoints = open_checkpoints(experiment, folder)
  try:
    restored = checkpoints.restore({name: items[name]}, _step(checkpoints, choice.step))
  finally:
    checkpoints.close()
  for problem in restored.damaged:
    warn(f"a damaged checkpoint was passed over: {problem}")
  if not quiet:
    say(f"checkpoint of step {restored.step:,} from {checkpoints.folder}")
  params = restored.items[name]
  return Weights(params[0] if choice.averaged else params, restored.step, str(choice), frozen)


def _step(checkpoints: checkpoint.Checkpoints, wanted: str) -> int | None:
  if not wanted:
    return None
  if wanted == "best":
    best = checkpoints.best_step()
    if best is None:
      raise ValueError("Got --step=best for checkpoints without metrics; wanted a number, or leave it out.")
    return best
  if not wanted.isdigit():
    raise ValueError(f"Got --step={wanted}; wanted the step of a checkpoint, or best.")
  return int(wanted)


def _reconstructed(experiment: Experiment, folder: Path, template: PyTree, choice: Choice, length: float) -> Weights:
  """Return an average of any length, as a weighted sum of stored snapshots (Karras et al. 2024, section 3.2)."""
  stds = tuple(experiment.ema.stds)
  if experiment.ema.kind != "power" or not checkpoint.Checkpoints.steps(workdir.snapshot_folder(folder)):
    raise ValueError(
      f"Got --ema_length={length} for a run without stored averages; wanted one trained with --config.ema.kind=power and"
      " --config.ema.snapshot_every above 0."
    )
  snapshots = open_snapshots(folder)
  try:
    steps = checkpoint.Checkpoints.steps(snapshots.folder)
    if choice.step and not choice.step.isdigit():
      raise ValueError(f"Got --step={choice.step} with --ema_length; wanted a number, or leave it out.")
    steps = [step for step in steps if not choice.step or step <= int(choice.step)]
    if not steps:
      raise ValueError(f"Got --step={choice.step} with --ema_length; wanted a step that comes after a snapshot.")
    sound, counts = _sound(snapshots, steps, template)
    weights = ema.reconstruction_weights(
      [count for count in counts for _ in stds], list(stds) * len(sound), counts[-1], length
    ).reshape(len(sound), len(stds))
    total = None
    for step, row in zip(sound, weights, strict=True):
      averages = snapshots.restore({"ema": template}, step).items["ema"]
      part = _weighted(averages, jnp.asarray(row, jnp.float32))
      total = part if total is None else jax.tree.map(jnp.add, total, part)
  finally:
    snapshots.close()
  say(
    f"an average of relative width {length:g} at step {sound[-1]:,} from {len(sound)} snapshots in {snapshots.folder}"
  )
  return Weights(total, sound[-1], str(choice))


def _sound(snapshots: checkpoint.Checkpoints, steps: list[int], template: PyTree) -> tuple[list[int], list[int]]:
  """Return the snapshots that can be used, and how many steps each averages; skipped steps do not count."""
  sound, counts = [], []
  for step in steps:
    try:
      counts.append(snapshots.restore({"ema": template}, step).data["steps"])
      sound.append(step)
    except checkpoint.DamagedError as error:
      warn(f"a damaged snapshot was passed over, so the average is less exact: {error}")
  if not sound:
    raise ValueError(
      f"Got no snapshot in {snapshots.folder} that can be used; wanted one. Take a stored average instead."
    )
  return sound, counts


@jax.jit
def _weighted(averages: tuple[PyTree, ...], weights: jax.Array) -> PyTree:
  return jax.tree.map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *averages)


def scores_path(folder: Path) -> Path:
  """Return the file in which a run keeps its scores."""
  return folder / "eval.json"


def read_scores(folder: Path) -> dict[str, Any] | None:
  """Return what `write_scores` wrote, or None if there is no such file; a damaged one is set aside, with a warning."""
  path = scores_path(folder)
  try:
    return sealed.read_json(path, apart=_APART)
  except FileNotFoundError:
    return None
  except sealed.DamagedError as error:
    if parallel.is_main():
      sealed.set_aside(path, workdir.damaged_folder(folder), error, "Evaluate again to make it anew: --mode=eval.")
    return None


def write_scores(folder: Path, report: dict[str, Any], weights: Weights, seed: int, seconds: float) -> dict[str, Any]:
  """Write scores and how they came about into eval.json, whole or not at all; only its `times` differ from run to run.

  Returns:
    All that was written.
  """
  report = report | {
    "step": weights.step,
    "weights": weights.name,
    "seed": seed,
    "backend": jax.default_backend(),
    "device": jax.devices()[0].device_kind,
    "versions": {"python": platform.python_version(), "ddpm_jax": ddpm_jax.__version__}
    | {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy", "scipy", "scikit-learn")},
    "commit": _commit(),
    "times": {"date": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": round(seconds, 1)},
  }
  sealed.write_json(scores_path(folder), report, apart=_APART)
  return report


def _commit() -> str | None:
  """Return the commit of the code, with a plus if files were changed since; None if it is installed without its history."""
  place = Path(ddpm_jax.__file__).parent

  def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(place), *words], capture_output=True, text=True, check=True).stdout.strip()

  try:
    if not (place.parent / ".git").exists():
      return None
    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
  except (OSError, subprocess.CalledProcessError):
    return None


def trained(tree: config.Tree, folder: Path) -> Experiment:
  """Return what a config stands for, of the finished or unfinished run in a folder.

  Raises:
    ValueError: if there is no run, or it is another's.
  """
  if not workdir.checkpoint_steps(folder):
    raise ValueError(
      f"Got --workdir={folder}, which holds no checkpoint; expected the folder of a run. Train first: --mode=train."
    )
  tree = starts.same_start(tree, folder)
  config.check_same_run(folder, tree)
  return config.build(tree)
