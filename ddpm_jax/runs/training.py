"""Training from the command line: a run that goes on where it stopped, whatever stopped it."""

import contextlib
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddpm_jax import config, data, training
from ddpm_jax.config import Experiment, Tree
from ddpm_jax.devices import hardware, memory, parallel, plan, startup
from ddpm_jax.models.guided import Parameters
from ddpm_jax.names import choose
from ddpm_jax.runs import drawing, frozen, limits, model, reading, scoring, starts, stepping, watching
from ddpm_jax.runs.model import say
from ddpm_jax.storage import checkpoint, images, records, workdir
from ddpm_jax.training import ema, optim

PyTree = Any
# Steps that pass before a trace begins, so that it shows the pace that is kept up.
_BEFORE_TRACE = 10


class Stopped(SystemExit):
  """A run was told to stop, and has saved all it had: ends the program as if the signal had, which schedulers know how to read."""

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
    raise ValueError(f"Got --profile={profile}; wanted the number of steps to trace, or 0 for none.")
  checkpoint.check_folder(workdir.checkpoint_folder(folder))
  resuming = _resuming(folder, resume)
  if resuming:
    tree, start_from = starts.same_start(tree, folder), None
  else:
    tree, start_from = starts.starting_from(tree)
  config.check_same_run(folder, tree)
  experiment = config.build(tree, None if start_from is None else start_from.model)
  starts.check_start(experiment)
  c, mesh = experiment.training, parallel.make_mesh(experiment.parallel.data, experiment.parallel.fsdp)
  parallel.check_batch(c.batch_size, mesh.size)
  training.check_accumulate(c.batch_size, mesh.size, c.accumulate)
  devices = list(mesh.devices.flat)
  limits.check_training(experiment, devices)
  limits.check_evaluation(experiment, devices, folder)
  step, task = stepping.step(experiment, mesh), experiment.task
  task.check(experiment, mesh)
  source, held_out = reading.read_data(experiment)
  preview = task.preview(experiment, mesh, held_out or source)
  judge = task.judge(experiment, folder, mesh, source, held_out)
  fixed = frozen.put(experiment, mesh)
  if resuming:
    frozen.check_same(folder, fixed)
  init, template = model.make_state(experiment, mesh, fixed, None if start_from is None else start_from.params)
  _check_memory(template, fixed, devices)
  batch = stepping.batch_shapes(experiment, c.batch_size, source)
  _check_best(experiment, judge, step, template, batch, fixed)
  records.check_wandb(c.wandb)
  workdir.check_writable(folder)
  with contextlib.ExitStack() as stack:
    if parallel.is_main():
      stack.enter_context(workdir.locked(folder))
    parallel.wait_for_all("locked")
    # What another process did until it let go of the folder, and what another host sees of it, may differ.
    if parallel.of_main(bool(workdir.checkpoint_steps(folder))) != resuming:
      raise ValueError(
        f"Got --workdir={folder}, in which another process wrote a checkpoint since this one began; wanted it at rest. The same"
        " command goes on from there."
      )
    num_params = sum(leaf.size for leaf in jax.tree.leaves(template.params))
    shape = "x".join(map(str, experiment.data.shape))
    say(f"{len(source):,} training images of {shape}, {len(held_out or ()):,} held out")
    _describe_labels(folder, drawing.class_counts(experiment, source))
    say(f"{num_params:,} parameters on {_describe(mesh)}")
    if experiment.init_from:
      say(f"network, process and prediction from {experiment.init_from}")
    run = _Run(experiment, folder, mesh, template, judge, fixed, stack)
    state = run.begin(init, source, resuming)
    if int(state.step) < c.steps:
      state = run.train(state, step, preview, profile, batch)
    else:
      say(f"training is complete at step {int(state.step):,}")
    run.checkpoints.close()
    # What follows can be done again: nothing is left to save.
    startup.end_on_sigterm()
    params, own = run.parameters(state)[:2]
    weights = model.Weights(params, int(state.step), str(model.Choice()), own)
    judge.run(weights, experiment.seed)
    say(
      f"\nconfig       {workdir.config_path(folder)}\ncheckpoints  {workdir.checkpoint_folder(folder)}\n"
      f"metrics      {folder / 'metrics.jsonl'}\nTensorBoard  {folder / 'tensorboard'}"
    )
    for problem in run.damaged:
      model.warn(problem)
    parallel.wait_for_all("done")


def _check_memory(template: training.TrainState, fixed: Any, devices: list[Any]) -> None:
  """Raise a ValueError if the devices cannot hold the state and, beside it, the gradients and the frozen parameters."""
  needed = len(devices) * sum(map(plan.state_bytes, (template, template.params, template.extra, fixed)))
  advice = "Make the network smaller, or split the state over more devices (--config.parallel.fsdp)."
  memory.check("the state of this network and its optimizer", needed, memory.of_devices(devices), advice)


def _check_best(
  experiment: Experiment, judge: Any, step: Any, template: training.TrainState, batch: Any, fixed: Any
) -> None:
  """Raise a ValueError if no checkpoint will have the metric by which the best are kept."""
  c, every = experiment.training, experiment.evaluation.every
  if not c.best_metric.startswith("eval/"):
    if c.best_metric != "loss":  # which every step has
      _, metrics = jax.eval_shape(step, template, batch, fixed)
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
    judge.check_best(c.best_metric)


def _resuming(folder: Path, resume: str) -> bool:
  steps = workdir.checkpoint_steps(folder)
  if resume == "must" and not steps:
    raise ValueError(
      f"Got --resume=must with --workdir={folder}, which holds no checkpoint to go on from; wanted the folder of a run, or"
      " --resume=auto to start one."
    )
  if resume == "never" and steps:
    raise ValueError(
      f"Got --resume=never with --workdir={folder}, which holds a run; wanted one without checkpoints. Use another"
      " --workdir."
    )
  return bool(steps)


def _describe(mesh: jax.sharding.Mesh) -> str:
  processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
  axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
  return f"{mesh.size} {mesh.devices.flat[0].platform} device(s){processes}{f' ({axes})' if mesh.size > 1 else ''}"


def _describe_labels(folder: Path, counts: np.ndarray | None) -> None:
  """Say how many images each class has, and write it down, if it is known."""
  if counts is None or not parallel.is_main():
    return
  say(f"{len(counts):,} classes, {np.min(counts):,} to {np.max(counts):,} images each")
  absent = np.flatnonzero(counts == 0)
  if len(absent):
    names = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
    model.warn(f"{len(absent):,} of {len(counts):,} classes have no image to learn from: {names}")
  workdir.write_labels(folder, counts.tolist())


class _Run:
  """A run in its folder, from where it begins to the last step."""

  def __init__(
    self,
    experiment: Experiment,
    folder: Path,
    mesh: jax.sharding.Mesh,
    template: training.TrainState,
    judge: Any,
    fixed: Any,
    stack: contextlib.ExitStack,
  ):
    self.experiment, self.folder, self.mesh, self.template, self._stack = experiment, folder, mesh, template, stack
    self._judge, self._frozen = judge, fixed
    self.checkpoints = model.open_checkpoints(experiment, folder)
    self.damaged: list[str] = []

  def begin(self, init: Any, source: data.Source, resuming: bool) -> training.TrainState:
    """Return the state to start from, and set `self.batches` to its place in the data."""
    c, own = self.experiment.training, self.experiment.data
    self.batches = data.batches(
      source,
      c.batch_size,
      seed=self.experiment.seed,
      flip=own.flip,
      put=lambda batch: parallel.put_batch(self.mesh, batch, c.batch_size),
      num_threads=own.num_threads,
      num_workers=own.num_workers,
      rows=parallel.local_rows(self.mesh, c.batch_size),
    )
    self._stack.callback(self.batches.close)
    if resuming:
      restored = self.checkpoints.restore(model.items_of(self.template))
      self.damaged = self._set_aside(restored)
      self.batches.restore(restored.data)
      state = model.state_of(restored.items)
      say(f"resuming from the checkpoint of step {restored.step:,}")
    else:
      self._set_aside(None)
      with model.patience("making the first parameters"):
        state = jax.block_until_ready(init())
      say("starting a new run")
    # Only now: what may have changed in the config holds from here on.
    if parallel.is_main():
      config.write(self.folder, starts.keep(self.experiment.tree, self.folder))
    if not resuming:
      frozen.write(self.folder, self._frozen)
    return state

  def _set_aside(self, restored: checkpoint.Restored | None) -> list[str]:
    """Move away what was saved after the step that training resumes from, and return what to tell the user."""
    parallel.wait_for_all("restored")
    step = 0 if restored is None else restored.step
    snapshots = model.open_snapshots(self.folder) if workdir.snapshot_folder(self.folder).exists() else None
    passed_over = []
    if parallel.is_main():
      passed_over = self.checkpoints.discard(step, workdir.damaged_folder(self.folder))
      if snapshots is not None:
        # They will be taken again.
        snapshots.discard(step)
    parallel.wait_for_all("set aside")
    self.checkpoints.reload()
    if snapshots is not None:
      snapshots.close()
    problems = [f"a damaged checkpoint was passed over: {text}" for text in (restored.damaged if restored else [])]
    problems += [f"a half-written checkpoint was deleted: {path}" for path in passed_over if "tmp" in path.name]
    if problems:
      place = "the start" if restored is None else f"step {step:,}"
      where = (
        f"; what was damaged lies in {workdir.damaged_folder(self.folder)}" if restored and restored.damaged else ""
      )
      problems.append(f"this run went on from {place}{where}")
    for problem in problems:
      model.warn(problem)
    return problems

  def _records(self, first: int) -> records.Records:
    return records.Records(self.folder, first, wandb=self.experiment.training.wandb, config=self.experiment.tree.values)

  def parameters(self, state: training.TrainState) -> Parameters:
    """Return what samples follow from: without what the objective alone reads, such as a teacher."""
    own = {name: part for name, part in (self._frozen or {}).items() if name != "objective"}
    return Parameters(ema.ema_params(state.opt_state), own)

  def train(self, state: training.TrainState, step: Any, preview: Any, profile: int, batch: Any) -> training.TrainState:
    """Take all steps that are left."""
    c, first = self.experiment.training, int(state.step)
    jitted = parallel.jit_step(step, self.mesh, state, self._frozen)
    rest = () if self._frozen is None else (self._frozen,)
    program = model.compile_aloud("the train step", lambda: jitted.lower(self.template, batch, *rest))

    def compiled(state, batch):
      return program(state, batch, *rest)

    writer = self._records(first) if parallel.is_main() else None
    snapshots = model.open_snapshots(self.folder) if self.experiment.ema.snapshot_every else None
    trace = watching.Trace(self.folder / "profile", first + _BEFORE_TRACE, profile)

    scores: dict[int, dict[str, float]] = {}

    def save(number: int, state: training.TrainState, metrics: dict[str, float]) -> None:
      # A run that is told to stop has none at this step.
      found = scores.get(number, {})
      best = self.experiment.training.best_metric
      metrics = {} if best.startswith("eval/") and not found else metrics | found
      self.checkpoints.save(number, model.items_of(state), self.batches.state, metrics)

    def score(number: int, state: training.TrainState, metrics: dict[str, float]) -> None:
      scores.clear()
      scores[number] = self._judge.on_the_way(self.parameters(state))
      say(f"step {number:,}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores[number].items()))
      if writer is not None:
        writer.scalars(number, scores[number])

    def snapshot(number: int, state: training.TrainState, metrics: dict[str, float]) -> None:
      assert snapshots is not None
      # One after the other: orbax's barriers between processes do not tell two folders apart.
      self.checkpoints.wait()
      # A step that was skipped is no step of the average.
      snapshots.save(number, {"ema": model.items_of(state)["ema"]}, {"steps": number - _skipped(state)})
      snapshots.wait()

    def draw(number: int, state: training.TrainState, metrics: dict[str, float]) -> None:
      picture = preview(self.parameters(state))
      if writer is not None:
        images.save_grid(drawing.samples_folder(self.folder) / f"step_{number:07d}.png", picture)
        writer.image(number, "samples", images.grid(picture))

    # The checkpoint last: a run that is killed in between does the others again.
    callbacks = [training.Callback(c.checkpoint_every, save)]
    if preview is not None:
      callbacks.insert(0, training.Callback(c.sample_every, draw))
    if self.experiment.evaluation.every:
      callbacks.insert(0, training.Callback(self.experiment.evaluation.every, score))
    if snapshots is not None:
      callbacks.insert(0, training.Callback(self.experiment.ema.snapshot_every, snapshot))

    def rescue(number: int, state: training.TrainState) -> None:
      # Several processes can save together only, and the others wait for this one's part of the next step.
      if jax.process_count() == 1:
        save(number, state, {})
        self.checkpoints.wait()
        say(f"no further batch; saved at step {number:,}, from which the same command goes on")

    try:
      with watching.Signals(self.batches.give_up) as signals:
        state = training.fit(
          state,
          compiled,
          self.batches,
          num_steps=c.steps,
          log=_Log(self.experiment, self.mesh, self.batches, writer, _skipped(state), batch),
          log_every=c.log_every,
          callbacks=callbacks,
          max_skipped=c.max_skipped,
          watch=training.Watch(lambda: self.batches.wait, signals.asked, trace.before_step),
          rescue=rescue,
          quiet=not parallel.is_main(),
        )
        if signals.asked_after(c.steps):
          stopped = int(state.step)
          save(stopped, state, {})
          self.checkpoints.wait()
          name = signal.Signals(signals.number).name
          say(f"told to stop ({name}); saved at step {stopped:,}, from which the same command goes on")
          raise Stopped(signals.number)
    finally:
      with contextlib.ExitStack() as last:
        if writer is not None:
          last.callback(writer.close)
        last.callback(self.checkpoints.wait)
        last.callback(trace.close)
    return state


def _skipped(state: training.TrainState) -> int:
  return int((optim.skipped(state.opt_state) or (0,))[0])


class _Log:
  """Adds to the loop's metrics what it cannot know, and writes them down."""

  def __init__(
    self,
    experiment: Experiment,
    mesh: jax.sharding.Mesh,
    batches: data.Batches,
    writer: records.Records | None,
    skipped: int,
    batch: Any,
  ):
    self._rate, self._batches, self._writer, self._skipped = stepping.schedule(experiment), batches, writer, skipped
    device = mesh.devices.flat[0]
    self._chip, self._devices = hardware.chip_of(device.device_kind), mesh.size
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), batch)
    self._flops = stepping.flops_per_image(experiment, one) if self._chip else 0.0
    self._dtype = scoring.dtype_of(experiment)

  def __call__(self, number: int, metrics: dict[str, float]) -> None:
    skipped = int(metrics.get("skipped", 0))
    if skipped > self._skipped:
      model.warn(
        f"{skipped - self._skipped} steps before {number:,} skipped for gradients that are not finite, {skipped:,} in all"
      )
    self._skipped = skipped
    # They do not count for the schedule.
    metrics["learning_rate"] = float(self._rate(number - 1 - skipped))
    metrics["memory_gb"] = parallel.memory_in_use() / 1e9
    if self._batches.broken:
      metrics["broken_files"] = self._batches.broken
    if self._chip is not None:
      speed = metrics["images_per_second"] * self._flops
      metrics["flop_utilization"] = hardware.utilization(speed, self._chip, self._devices, self._dtype)
    if self._writer is not None:
      self._writer.scalars(number, metrics)
