"""Training from the command line: a run that goes on where it stopped, whatever stopped it."""

import contextlib
import dataclasses
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddpm_jax import config, data, training
from ddpm_jax.config import Tree
from ddpm_jax.devices import hardware, memory, parallel, plan, progress, startup, watching
from ddpm_jax.devices.progress import print_line, warn
from ddpm_jax.models.guided import Parameters
from ddpm_jax.names import choose
from ddpm_jax.runs import frozen, generation, limits, model, pretrained, reading, scoring, stepping
from ddpm_jax.runs.reading import Run
from ddpm_jax.storage import checkpoint, frozen_file, images, records, workdir
from ddpm_jax.training import ema, optim

PyTree = Any
Metrics = dict[str, float]
# Steps that pass before a trace begins, so that it shows the pace that is kept up.
_BEFORE_TRACE = 10


class Stopped(SystemExit):
  """Ends the program with the code of the signal that stopped a run, once its state is saved."""

  def __init__(self, number: int):
    super().__init__(128 + number)


def run_train(tree: Tree, folder: Path, *, resume: str = "auto", profile: int = 0) -> None:
  """Train, or go on where the folder's run stopped; then score, and say where everything lies.

  Args:
    tree: the run's config.
    folder: the run's folder.
    resume: "auto" goes on if there is something to go on with, "must" demands it, "never" forbids it.
    profile: steps to trace, soon after the start; 0 for none.

  Raises:
    ValueError: if the config or the folder does not allow it.
    Stopped: once all is saved, if SIGTERM or SIGINT came.
  """
  if profile < 0:
    raise ValueError(f"Got --profile={profile}; expected the number of steps to trace, or 0 for none.")
  checkpoint.check_folder(workdir.checkpoint_folder(folder))
  resuming = _resuming(folder, resume)
  trainer = _checked(tree, folder, resuming)
  with contextlib.ExitStack() as stack:
    if parallel.is_main():
      stack.enter_context(workdir.locked(folder))
    parallel.wait_for_all("locked")
    # What another process did until it let go of the folder, and what another host sees of it, may differ.
    if parallel.broadcast(bool(workdir.checkpoint_steps(folder))) != resuming:
      raise ValueError(
        f"Got --workdir={folder}, in which another process wrote a checkpoint since this one began; expected it at rest. The same"
        " command goes on from there."
      )
    trainer.describe()
    state = trainer.begin(stack, resuming)
    if int(state.step) < trainer.run.experiment.training.steps:
      state = trainer.train(state, profile)
    else:
      print_line(f"training is complete at step {int(state.step):,}")
    trainer.checkpoints.close()
    # What follows can be done again: nothing is left to save.
    startup.exit_on_sigterm()
    weights = model.Weights(trainer.parameters(state), int(state.step), str(model.WeightsChoice()))
    trainer.scorer.score(weights, trainer.run.experiment.seed)
    print_line(
      f"\nconfig       {workdir.config_path(folder)}\ncheckpoints  {workdir.checkpoint_folder(folder)}\n"
      f"metrics      {folder / 'metrics.jsonl'}\nTensorBoard  {folder / 'tensorboard'}"
    )
    for problem in trainer.damaged:
      warn(problem)
    parallel.wait_for_all("done")


def _resuming(folder: Path, resume: str) -> bool:
  steps = workdir.checkpoint_steps(folder)
  if resume == "must" and not steps:
    raise ValueError(
      f"Got --resume=must with --workdir={folder}, which holds no checkpoint to go on from; expected the folder of a run, or"
      " --resume=auto to start one."
    )
  if resume == "never" and steps:
    raise ValueError(
      f"Got --resume=never with --workdir={folder}, which holds a run; expected one without checkpoints. Use another"
      " --workdir."
    )
  return bool(steps)


def _checked(tree: Tree, folder: Path, resuming: bool) -> "_Trainer":
  """Check all that a run needs, and return its trainer. Write nothing but an empty folder."""
  tree, start = (pretrained.restore_init_from(tree, folder), None) if resuming else pretrained.load_init_from(tree)
  config.check_same_run(folder, tree)
  experiment = config.build(tree, None if start is None else start.model)
  pretrained.check_shape(experiment)
  c, mesh = experiment.training, stepping.mesh_of(experiment)
  devices = list(mesh.devices.flat)
  limits.check_training(experiment, devices)
  limits.check_evaluation(experiment, devices, folder)
  step, task = stepping.step(experiment, mesh), experiment.task
  task.check(experiment, mesh)
  run = Run(experiment, folder, mesh, *reading.read_data(experiment))
  preview = task.preview(experiment, mesh, run.held_out or run.source)
  scorer = task.scorer(run)
  fixed = frozen.load_sharded(experiment, mesh)
  if resuming:
    frozen_file.check(folder, fixed)
  init, template = model.make_state(experiment, mesh, fixed, None if start is None else start.params)
  # The devices must hold the state and, beside it, the gradients and the frozen parameters.
  needed = len(devices) * sum(map(plan.state_bytes, (template, template.params, template.extra, fixed)))
  advice = "Make the network smaller, or split the state over more devices (--config.parallel.fsdp)."
  memory.check("the state of this network and its optimizer", needed, memory.device_bytes(devices), advice)
  batch = stepping.batch_shapes(experiment, c.batch_size, run.source)
  trainer = _Trainer(run, scorer, preview, step, init, template, batch, fixed)
  trainer.check_best_metric()
  records.check_wandb(c.wandb)
  workdir.check_writable(folder)
  return trainer


@dataclasses.dataclass
class _Trainer:
  """A run in its folder, from where it begins to the last step.

  Attributes:
    run: the run.
    scorer: scores it.
    preview: what is shown on the way, if anything is (`Task.preview`).
    step: the train step.
    init: makes the first state.
    template: the shapes and the layout of a state.
    batch: the shapes of a batch.
    frozen: the frozen parameters, or None.
    damaged: what the user must know of damaged files.
  """

  run: Run
  scorer: Any
  preview: Callable[[Parameters], np.ndarray] | None
  step: Callable
  init: Callable[[], training.TrainState]
  template: training.TrainState
  batch: PyTree
  frozen: PyTree | None
  damaged: list[str] = dataclasses.field(default_factory=list)

  def check_best_metric(self) -> None:
    """Raise a ValueError if no checkpoint will have the metric by which the best are kept."""
    c, every = self.run.experiment.training, self.run.experiment.evaluation.every
    if not c.best_metric.startswith("eval/"):
      if c.best_metric != "loss":  # which every step has
        _, metrics = jax.eval_shape(self.step, self.template, self.batch, self.frozen)
        known = [name for name in metrics if not name.startswith("skipped")]
        choose(c.best_metric, known, "config.training.best_metric")
      return
    if c.keep_best and (not every or c.checkpoint_every % every):
      raise ValueError(
        f"Got config.training.best_metric={c.best_metric!r} with evaluation.every={every} and"
        f" training.checkpoint_every={c.checkpoint_every}; expected scores at every checkpoint. Set"
        " --config.evaluation.every to checkpoint_every, or to a divisor of it."
      )
    if every:
      self.scorer.check_best_metric(c.best_metric)

  def describe(self) -> None:
    """Say what is trained on which data and devices, and write down how many images each class has, if it is known."""
    experiment, source = self.run.experiment, self.run.source
    shape = "x".join(map(str, experiment.data.shape))
    print_line(f"{len(source):,} training images of {shape}, {len(self.run.held_out or ()):,} held out")
    counts = generation.class_counts(experiment, source)
    if counts is not None and parallel.is_main():
      print_line(f"{len(counts):,} classes, {np.min(counts):,} to {np.max(counts):,} images each")
      absent = np.flatnonzero(counts == 0)
      if len(absent):
        names = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
        warn(f"{len(absent):,} of {len(counts):,} classes have no image to learn from: {names}")
      workdir.write_classes(self.run.folder, counts.tolist())
    num_params = sum(leaf.size for leaf in jax.tree.leaves(self.template.params))
    print_line(f"{num_params:,} parameters on {parallel.describe(self.run.mesh)}")
    if experiment.init_from:
      print_line(f"network, process and prediction from {experiment.init_from}")

  def begin(self, stack: contextlib.ExitStack, resuming: bool) -> training.TrainState:
    """Return the state to start from, with the checkpoints open and the batches at its step."""
    experiment, folder, mesh = self.run.experiment, self.run.folder, self.run.mesh
    size, own = experiment.training.batch_size, experiment.data
    self.checkpoints = model.open_checkpoints(experiment, folder)
    self.batches = data.batches(
      self.run.source,
      size,
      seed=experiment.seed,
      flip=own.flip,
      put=lambda batch: parallel.put_batch(mesh, batch, size),
      num_threads=own.num_threads,
      num_workers=own.num_workers,
      rows=parallel.local_rows(mesh, size),
    )
    stack.callback(self.batches.close)
    if resuming:
      restored = self.checkpoints.restore(training.state_to_items(self.template))
      self._set_aside(restored)
      self.batches.restore(restored.data)
      state = training.items_to_state(restored.items)
      print_line(f"resuming from the checkpoint of step {restored.step:,}")
    else:
      self._set_aside(None)
      with progress.heartbeat("making the first parameters"):
        state = jax.block_until_ready(self.init())
      print_line("starting a new run")
    # Only now: what may have changed in the config holds from here on.
    if parallel.is_main():
      config.write(folder, pretrained.copy_config(experiment.tree, folder))
    if not resuming:
      frozen_file.write(folder, self.frozen)
    return state

  def _set_aside(self, restored: checkpoint.Restored | None) -> None:
    """Move away what was saved after the step that training resumes from, and set `self.damaged` to what the user must know."""
    parallel.wait_for_all("restored")
    folder, step, damaged = self.run.folder, *((0, []) if restored is None else (restored.step, restored.damaged))
    place = workdir.damaged_folder(folder)
    snapshots = model.open_snapshots(folder) if workdir.snapshot_folder(folder).exists() else None
    passed_over = []
    if parallel.is_main():
      passed_over = self.checkpoints.discard(step, place)
      if snapshots is not None:
        # They will be taken again.
        snapshots.discard(step)
    parallel.wait_for_all("set aside")
    self.checkpoints.reload()
    if snapshots is not None:
      snapshots.close()
    problems = [f"a damaged checkpoint was passed over: {text}" for text in damaged]
    problems += [f"a half-written checkpoint was deleted: {path}" for path in passed_over if "tmp" in path.name]
    if problems:
      where = f"; what was damaged lies in {place}" if damaged else ""
      problems.append(f"this run went on from {'the start' if restored is None else f'step {step:,}'}{where}")
    for problem in problems:
      warn(problem)
    self.damaged = problems

  def parameters(self, state: training.TrainState) -> Parameters:
    """Return the parameters that sampling needs. Those of the objective, such as a teacher's, are not among them."""
    own = {name: part for name, part in (self.frozen or {}).items() if name != "objective"}
    return Parameters(ema.ema_params(state.opt_state), own)

  def train(self, state: training.TrainState, profile: int) -> training.TrainState:
    """Take all steps that are left."""
    experiment, folder, mesh = self.run.experiment, self.run.folder, self.run.mesh
    c, first = experiment.training, int(state.step)
    jitted = parallel.jit_step(self.step, mesh, state, self.frozen)
    given = (self.batch,) if self.frozen is None else (self.batch, self.frozen)
    program = progress.compile_with_progress("the train step", lambda: jitted.lower(self.template, *given))
    writer = None
    if parallel.is_main():
      writer = records.MetricLog(folder, first, wandb=c.wandb, config=experiment.tree.values)
    trace = watching.Trace(folder / "profile", first + _BEFORE_TRACE, profile)
    with contextlib.ExitStack() as last:
      if writer is not None:
        last.callback(writer.close)
      last.callback(self.checkpoints.wait)
      last.callback(trace.close)
      work = _Work(self, writer, _skipped(state))
      signals = last.enter_context(watching.Signals(self.batches.cancel))
      state = training.fit(
        state,
        program,
        self.batches,
        self.frozen,
        num_steps=c.steps,
        log=work.log,
        log_every=c.log_every,
        callbacks=work.callbacks(),
        max_skipped=c.max_skipped,
        hooks=training.Hooks(lambda: self.batches.wait_seconds, signals.should_stop, trace.before_step),
        rescue=work.rescue,
        quiet=not parallel.is_main(),
      )
      if signals.stopped_late(c.steps):
        stopped = int(state.step)
        work.keep(stopped, state, {})
        self.checkpoints.wait()
        name = signal.Signals(signals.number).name
        print_line(f"told to stop ({name}); saved at step {stopped:,}, from which the same command goes on")
        raise Stopped(signals.number)
    return state


class _Work:
  """What is done between steps: logs, pictures, scores, snapshots and checkpoints."""

  def __init__(self, trainer: _Trainer, writer: records.MetricLog | None, skipped: int):
    self._trainer, self._run, self.checkpoints = trainer, trainer.run, trainer.checkpoints
    self._writer, self._skipped = writer, skipped
    self._scores: tuple[int, Metrics] = (-1, {})
    experiment = self._run.experiment
    self._rate, self._chip = stepping.schedule(experiment), hardware.chip_of(self._run.mesh.devices.flat[0].device_kind)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), trainer.batch)
    self._flops = stepping.flops_per_image(experiment, one) if self._chip else 0.0

  def callbacks(self) -> list[training.Callback]:
    """Return the callbacks. The checkpoint is last, so that a run killed in between repeats the others."""
    experiment, folder = self._run.experiment, self._run.folder
    found = []
    if experiment.ema.snapshot_every:
      self.snapshots = model.open_snapshots(folder)
      found.append(training.Callback(experiment.ema.snapshot_every, self._snapshot))
    if experiment.evaluation.every:
      found.append(training.Callback(experiment.evaluation.every, self._score))
    if self._trainer.preview is not None:
      found.append(training.Callback(experiment.training.sample_every, self._draw))
    return [*found, training.Callback(experiment.training.checkpoint_every, self.keep)]

  def log(self, number: int, metrics: Metrics) -> None:
    """Add learning rate, memory and speed to the loop's metrics, and write them to the logs."""
    skipped = int(metrics.get("skipped", 0))
    if skipped > self._skipped:
      warn(
        f"{skipped - self._skipped} steps before {number:,} skipped for gradients that are not finite, {skipped:,} in all"
      )
    self._skipped = skipped
    # They do not count for the schedule.
    metrics["learning_rate"] = float(self._rate(number - 1 - skipped))
    metrics["memory_gb"] = parallel.peak_memory() / 1e9
    if self._trainer.batches.num_broken:
      metrics["broken_files"] = self._trainer.batches.num_broken
    if self._chip is not None:
      speed, dtype = metrics["images_per_second"] * self._flops, scoring.dtype_of(self._run.experiment)
      metrics["flop_utilization"] = hardware.utilization(speed, self._chip, self._run.mesh.size, dtype)
    if self._writer is not None:
      self._writer.scalars(number, metrics)

  def keep(self, number: int, state: training.TrainState, metrics: Metrics) -> None:
    """Save a checkpoint with the scores of its step, if there are any."""
    found = self._scores[1] if self._scores[0] == number else {}
    lacks_best = self._run.experiment.training.best_metric.startswith("eval/") and not found
    self.checkpoints.save(
      number, training.state_to_items(state), self._trainer.batches.state, {} if lacks_best else metrics | found
    )

  def rescue(self, number: int, state: training.TrainState) -> None:
    """Save the state when the next batch cannot be read."""
    # Several processes can save together only, and the others wait for this one's part of the next step.
    if jax.process_count() == 1:
      self.keep(number, state, {})
      self.checkpoints.wait()
      print_line(f"no further batch; saved at step {number:,}, from which the same command goes on")

  def _score(self, number: int, state: training.TrainState, metrics: Metrics) -> None:
    found = self._trainer.scorer.training_scores(self._trainer.parameters(state))
    self._scores = (number, found)
    print_line(f"step {number:,}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    if self._writer is not None:
      self._writer.scalars(number, found)

  def _snapshot(self, number: int, state: training.TrainState, metrics: Metrics) -> None:
    # One after the other: orbax's barriers between processes do not tell two folders apart.
    self.checkpoints.wait()
    # A step that was skipped is no step of the average.
    self.snapshots.save(number, {"ema": training.state_to_items(state)["ema"]}, {"steps": number - _skipped(state)})
    self.snapshots.wait()

  def _draw(self, number: int, state: training.TrainState, metrics: Metrics) -> None:
    assert self._trainer.preview is not None
    picture = self._trainer.preview(self._trainer.parameters(state))
    if self._writer is not None:
      images.save_grid(self._run.folder / "samples" / f"step_{number:07d}.png", picture)
      self._writer.image(number, "samples", images.grid(picture))


def _skipped(state: training.TrainState) -> int:
  return int((optim.skip_counts(state.opt_state) or (0,))[0])
