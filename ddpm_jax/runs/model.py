"""Make the initial state of a run, and load weights from checkpoints or from snapshots of averaged parameters."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ddpm_jax import config, training
from ddpm_jax.config import Experiment
from ddpm_jax.devices import parallel
from ddpm_jax.devices.progress import print_line, warn
from ddpm_jax.metrics import evaluate
from ddpm_jax.models.guided import Parameters
from ddpm_jax.runs import frozen as frozen_module
from ddpm_jax.runs import pretrained, stepping
from ddpm_jax.storage import checkpoint, workdir
from ddpm_jax.training import ema

PyTree = Any


class WeightsChoice(NamedTuple):
  """Describe which of a run's weights to load.

  Attributes:
    ema: True for the EMA, False for the raw parameters.
    ema_length: the relative width of an EMA to reconstruct from snapshots; None for the EMA in the checkpoint.
    step: the checkpoint's step in digits, "best", or "" for the newest. If an EMA is reconstructed, snapshots of later
      steps are not used.
  """

  ema: bool = True
  ema_length: float | None = None
  step: str = ""

  def __str__(self) -> str:
    if self.ema_length is not None:
      return f"EMA of relative width {self.ema_length:g}"
    return "EMA" if self.ema else "raw"


class Weights(NamedTuple):
  """Hold the parameters of a run's model.

  Attributes:
    parameters: the trained and the frozen parameters.
    step: the step of the checkpoint, or of the last snapshot in a reconstruction.
    name: a readable description, such as "EMA".
    sha256: the digest of the parameters, or "" if it is not computed.
  """

  parameters: Parameters
  step: int
  name: str
  sha256: str = ""


def make_state(
  experiment: Experiment, mesh: jax.sharding.Mesh, frozen: PyTree = None, params: PyTree = None
) -> tuple[Callable[[], training.TrainState], training.TrainState]:
  """Return two values: a function that makes the initial train state, and the shapes and shardings of this state.

  Args:
    experiment: the experiment to train.
    mesh: the devices.
    frozen: all frozen parameters, or their shapes; None if the experiment has no frozen parameters.
    params: parameters to start from; None to initialize new ones.
  """
  init, optimizer = experiment.model.init, stepping.optimizer(experiment)

  def start(params, frozen):
    make = init if params is None else lambda key: params
    return training.init_state(jax.random.key(experiment.seed), make, optimizer, experiment.objective, frozen)

  shapes = jax.eval_shape(start, params, frozen)
  shardings = parallel.state_shardings(mesh, shapes)
  compiled = jax.jit(start, out_shardings=shardings, compiler_options=parallel.compiler_options(mesh, once=True))
  return functools.partial(compiled, params, frozen), parallel.abstract(shapes, shardings)


def open_checkpoints(experiment: Experiment, folder: Path) -> checkpoint.Checkpoints:
  """Open the run's checkpoints, with the retention settings of the config."""
  c = experiment.training
  return checkpoint.Checkpoints(
    workdir.checkpoint_folder(folder),
    keep=c.keep_checkpoints,
    keep_every=c.keep_every,
    keep_best=c.keep_best,
    metric=c.best_metric,
    higher_is_better=evaluate.higher_is_better(c.best_metric.partition("_by_log_snr")[0]),
  )


def open_snapshots(folder: Path) -> checkpoint.Checkpoints:
  """Open the run's snapshots of the averaged parameters (EMA).

  Old snapshots are never deleted.
  """
  return checkpoint.Checkpoints(workdir.snapshot_folder(folder), keep=2**31)


def load_weights(
  experiment: Experiment, folder: Path, mesh: jax.sharding.Mesh, choice: WeightsChoice, *, quiet: bool = False
) -> Weights:
  """Load the chosen parameters and the frozen parameters of a run directly into their shards.

  Args:
    experiment: the run's experiment.
    folder: the run's folder.
    mesh: the devices. Parameters are sharded as in `parallel.state_shardings`.
    choice: which of the run's weights to use.
    quiet: whether to omit the message about the loaded checkpoint.

  Raises:
    ValueError: if the chosen weights do not exist, if the choice contradicts itself, or if the frozen parameters differ
      from the frozen parameters that the run was trained with.
  """
  frozen = frozen_module.load_for_model(experiment, folder, mesh)
  # Restore the model's parameters only. The objective's state may be missing.
  shapes = jax.eval_shape(experiment.model.init, jax.random.key(0))
  _, averages = ema.split(jax.eval_shape(stepping.params_ema(experiment).init, shapes))
  items: dict[str, PyTree] = {"params": shapes, "ema": averages}
  items = parallel.abstract(items, parallel.state_shardings(mesh, items))
  if choice.ema_length is not None:
    params, step = _reconstructed(experiment, folder, {"ema": items["ema"]}, choice)
    return Weights(Parameters(params, frozen), step, str(choice))
  name = "ema" if choice.ema else "params"
  with contextlib.closing(open_checkpoints(experiment, folder)) as checkpoints:
    restored = checkpoints.restore({name: items[name]}, _step(checkpoints, choice.step))
  for problem in restored.damaged:
    warn(f"skipped a damaged checkpoint: {problem}")
  if not quiet:
    print_line(f"loaded the checkpoint of step {restored.step:,} from {checkpoints.folder}")
  params = restored.items[name]
  return Weights(Parameters(params[0] if choice.ema else params, frozen), restored.step, str(choice))


def _step(checkpoints: checkpoint.Checkpoints, text: str) -> int | None:
  """Convert the text of --step to the step of a checkpoint, or to None for the newest checkpoint."""
  if text == "best":
    best = checkpoints.best_step()
    if best is None:
      raise ValueError(
        "Got --step=best for checkpoints without metrics; expected the step of a checkpoint. Leave --step out for the newest."
      )
    return best
  if text and not text.isdigit():
    raise ValueError(f"Got --step={text}; expected the step of a checkpoint, or 'best'.")
  return int(text) if text else None


def _reconstructed(experiment: Experiment, folder: Path, items: PyTree, choice: WeightsChoice) -> tuple[PyTree, int]:
  """Reconstruct an EMA of any width as a weighted sum of snapshots (Karras et al. 2024, section 3.2).

  Returns:
    The EMA, and the step of the last snapshot.
  """
  length = choice.ema_length
  assert length is not None
  if not choice.ema:
    raise ValueError(f"Got --ema=false with --ema_length={length}; expected only one of them.")
  steps = checkpoint.Checkpoints.steps(workdir.snapshot_folder(folder))
  if experiment.ema.kind != "power" or not steps:
    raise ValueError(
      f"Got --ema_length={length} for a run without EMA snapshots; expected a run trained with --config.ema.kind=power and"
      " --config.ema.snapshot_every above 0."
    )
  if choice.step and not choice.step.isdigit():
    raise ValueError(
      f"Got --step={choice.step} with --ema_length={length}; expected a number. Leave --step out for the newest."
    )
  steps = [step for step in steps if not choice.step or step <= int(choice.step)]
  if not steps:
    raise ValueError(
      f"Got --step={choice.step} with --ema_length={length}; expected the step of the first snapshot or a later step."
    )
  with contextlib.closing(open_snapshots(folder)) as snapshots:
    params, last, count = training.reconstruct(snapshots, items, steps, tuple(experiment.ema.stds), length)
  print_line(
    f"reconstructed an EMA of relative width {length:g} at step {last:,} from {count} snapshots in {snapshots.folder}"
  )
  return params, last


def load_experiment(tree: config.Tree | None, folder: Path, flag: str = "workdir") -> Experiment:
  """Build the experiment of the run in a folder.

  The run need not have finished.

  Args:
    tree: a config for the run; None for the config in the run's folder.
    folder: the run's folder.
    flag: the name of the flag that gave the folder, for the error message.

  Raises:
    ValueError: if the folder holds no checkpoint, or if the config describes another run.
  """
  if not workdir.checkpoint_steps(folder):
    raise ValueError(
      f"Got --{flag}={folder}, which holds no checkpoint; expected the folder of a trained run. Train it with --mode=train."
    )
  tree = pretrained.restore_init_from(config.read_run(folder) if tree is None else tree, folder)
  config.check_same_run(folder, tree)
  return config.build(tree)
