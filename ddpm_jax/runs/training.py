"""Train a run from the command line, and resume it after any interruption."""

import contextlib
import dataclasses
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddpm_jax import config, data, training
from ddpm_jax.config import Experiment, Tree
from ddpm_jax.devices import hardware, memory, parallel, plan, progress, startup, watching
from ddpm_jax.devices.progress import print_line, warn
from ddpm_jax.models.guided import Parameters
from ddpm_jax.models.inputs import hosts_of
from ddpm_jax.names import choose
from ddpm_jax.runs import codecs, frozen, generation, latents, limits, model, pretrained, reading, scoring, stepping
from ddpm_jax.runs.reading import Run
from ddpm_jax.storage import checkpoint, frozen_file, images, records, workdir
from ddpm_jax.training import ema, optim

PyTree = Any
Metrics = dict[str, float]
# The number of steps before a trace begins. The first steps are slower than the others.
_STEPS_BEFORE_TRACE = 10


class Stopped(SystemExit):
  """Exit the program after a signal stopped the run.

  The exit code is 128 plus the number of the signal. The state is already saved.
  """

  def __init__(self, signal_number: int):
    super().__init__(128 + signal_number)


def run_train(tree: Tree, folder: Path, *, resume: str = "auto", profile: int = 0) -> None:
  """Train or resume the run in a folder, score it, and print the paths of its results.

  Args:
    tree: the run's config.
    folder: the run's folder.
    resume: "auto" resumes if the folder has a checkpoint, and starts a new run otherwise. "must" requires a checkpoint.
      "never" requires a folder without checkpoints.
    profile: the number of steps to trace with JAX's profiler, from shortly after the start; 0 for none.

  Raises:
    ValueError: if the config or the folder is invalid.
    FloatingPointError: if a sample is not finite, or if the gradients of too many consecutive steps are not finite.
    Stopped: on SIGTERM or SIGINT, after the state is saved.
  """
  if profile < 0:
    raise ValueError(f"Got --profile={profile}; expected the number of steps to trace, or 0 for none.")
  checkpoint.check_folder(workdir.checkpoint_folder(folder))
  resuming = _is_resuming(folder, resume)
  trainer = _make_trainer(tree, folder, resuming)
  with contextlib.ExitStack() as stack:
    if parallel.is_main():
      stack.enter_context(workdir.locked(folder))
    parallel.wait_for_all("locked")
    # Before this process had the lock, another command may have used the folder. Hosts may also see different files.
    if parallel.broadcast(bool(workdir.checkpoint_steps(folder))) != resuming:
      raise ValueError(
        f"Got --workdir={folder}, where another process changed the checkpoints after this command started; expected"
        " no other process to use it. Run the same command again to resume."
      )
    trainer.describe()
    state = trainer.begin(stack, resuming)
    if int(state.step) < trainer.run.experiment.training.steps:
      state = trainer.train(state, profile)
    else:
      print_line(f"training is complete at step {int(state.step):,}")
    trainer.checkpoints.close()
    # All training is saved. Scoring can be repeated, so exit at once on SIGTERM.
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


def _is_resuming(folder: Path, resume: str) -> bool:
  """Return whether the folder holds a checkpoint to resume from, and check that --resume allows it."""
  steps = workdir.checkpoint_steps(folder)
  if resume == "must" and not steps:
    raise ValueError(
      f"Got --resume=must with --workdir={folder}, which holds no checkpoint; expected a folder with a checkpoint."
      " Set --resume=auto to start a new run."
    )
  if resume == "never" and steps:
    raise ValueError(
      f"Got --resume=never with --workdir={folder}, which holds a checkpoint; expected a folder without checkpoints."
      " Use another --workdir."
    )
  return bool(steps)


def _make_trainer(tree: Tree, folder: Path, resuming: bool) -> "_Trainer":
  """Check everything that a run needs, and return its trainer.

  Nothing is written, except that the folder is created.
  """
  if not resuming:
    pretrained.check_start(tree, folder)
  tree, start = (pretrained.restore_init_from(tree, folder), None) if resuming else pretrained.load_init_from(tree)
  tree = codecs.pin(tree, folder)
  config.check_same_run(folder, tree)
  experiment = config.build(tree, None if start is None else start.model)
  pretrained.check_shape(experiment)
  c, mesh = experiment.training, stepping.training_mesh(experiment)
  devices = list(mesh.devices.flat)
  limits.check_training(experiment, devices)
  limits.check_evaluation(experiment, devices, folder)
  task = experiment.task
  task.check(experiment, mesh)
  splits = reading.read_sources(experiment)
  buckets = reading.read_buckets(experiment, splits)
  run = Run(experiment, folder, mesh, *reading.read_data(experiment, splits), buckets)
  run = run._replace(latents=latents.open_latents(experiment, run.source))
  trained = latents.with_stored_texts(experiment, run.latents)
  step = stepping.step(trained, mesh)
  preview = task.preview(experiment, mesh, run.held_out or run.source)
  scorer = task.scorer(run)
  frozen_params = frozen.load(experiment, mesh)
  latents.check_codec(experiment, run.latents, frozen_params)
  digests = frozen.digests_of(experiment, frozen_params)
  if resuming:
    frozen_file.check(folder, digests)
  # Previews and scores load the text encoders again.
  frozen_params = latents.without_encoders(experiment, run.latents, frozen_params)
  init, template = model.make_state(experiment, mesh, frozen_params, None if start is None else start.params)
  # The devices must hold the state, the gradients (as large as the parameters) and the frozen parameters.
  needed = len(devices) * sum(map(plan.state_bytes, (template, template.params, template.extra, frozen_params)))
  advice = "Make the network smaller, or shard the state over more devices (--config.parallel.fsdp)."
  memory.check("the state of this network and its optimizer", needed, memory.device_bytes(devices), advice)
  source = run.training_source
  groups = data.group_members(source)
  batches = [stepping.batch_shapes(trained, c.batch_size, source, int(members[0])) for members in groups]
  trainer = _Trainer(run, trained, scorer, preview, step, init, template, batches, frozen_params, digests)
  trainer.check_best_metric()
  records.check_wandb(c.wandb)
  workdir.check_writable(folder)
  return trainer


@dataclasses.dataclass
class _Trainer:
  """Train a run to its last step, or resume it from its saved state.

  Attributes:
    run: the run.
    trained: the experiment of the train step. It differs from the run's experiment if the encoded data contain the
      outputs of text encoders, because the train step then reads these outputs and runs no text encoder.
    scorer: the scorer of the run's task.
    preview: the function that makes preview pictures (`Task.preview`), or None.
    step: the train step.
    init: the function that makes the first state; None once a state exists.
    template: the shapes and shardings of the state.
    batch_shapes: a list with the shapes of one batch for each group of the data (see `data.sources`).
    frozen: the frozen parameters of the train step, or None.
    digests: the digests of all frozen parameters and tokenizers of the run.
    damaged: messages to the user about damaged files.
  """

  run: Run
  trained: Experiment
  scorer: Any
  preview: Callable[[Parameters], np.ndarray] | None
  step: Callable
  init: Callable[[], training.TrainState] | None
  template: training.TrainState
  batch_shapes: list[PyTree]
  frozen: PyTree | None
  digests: dict[str, list[str]]
  damaged: list[str] = dataclasses.field(default_factory=list)

  def check_best_metric(self) -> None:
    """Raise a ValueError if checkpoints will lack the metric that selects the best checkpoints."""
    c, every = self.run.experiment.training, self.run.experiment.evaluation.every
    if not c.best_metric.startswith("eval/"):
      if c.best_metric != "loss":  # every step has a loss
        _, metrics = jax.eval_shape(self.step, self.template, self.batch_shapes[0], self.frozen)
        names = [name for name in metrics if not name.startswith("skipped")]
        choose(c.best_metric, names, "config.training.best_metric")
      return
    if c.keep_best and (not every or c.checkpoint_every % every):
      raise ValueError(
        f"Got config.training.best_metric={c.best_metric!r} with config.evaluation.every={every} and"
        f" config.training.checkpoint_every={c.checkpoint_every}; expected scores at every checkpoint. Set"
        " --config.evaluation.every to a divisor of checkpoint_every."
      )
    if every:
      self.scorer.check_best_metric(c.best_metric)

  def describe(self) -> None:
    """Print a summary of the data, the model and the devices, and save the class counts.

    A class count is the number of training images of a class. Nothing is saved if the class counts are unknown.
    """
    experiment, source = self.run.experiment, self.run.source
    shape = "x".join(map(str, experiment.data.shape))
    print_line(f"{len(source):,} training images of {shape}, {len(self.run.held_out or ()):,} held out")
    if self.run.buckets is not None:
      groups = zip(data.group_members(self.run.buckets), self.batch_shapes, strict=True)
      sizes = [f"{len(members):,} of {_size(batch)}" for members, batch in groups]
      print_line(f"training reads images of {len(sizes)} sizes: {', '.join(sizes)}")
    if self.run.latents is not None:
      print_line(f"training reads encoded images from {experiment.data.latents}")
    counts = generation.class_counts(experiment, source)
    if counts is not None and parallel.is_main():
      print_line(f"{len(counts):,} classes, {np.min(counts):,} to {np.max(counts):,} images each")
      absent = np.flatnonzero(counts == 0)
      if len(absent):
        names = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
        warn(f"{len(absent):,} of {len(counts):,} classes have no training image: {names}")
      workdir.write_classes(self.run.folder, counts.tolist())
    num_params = sum(leaf.size for leaf in jax.tree.leaves(self.template.params))
    print_line(f"{num_params:,} parameters on {parallel.describe(self.run.mesh)}")
    if experiment.init_from:
      print_line(f"the model (network, process, prediction, conditions, codec) is that of {experiment.init_from}")

  def begin(self, stack: contextlib.ExitStack, resuming: bool) -> training.TrainState:
    """Open the checkpoints and the batches, and return the state that training starts from.

    A resumed run starts from its newest undamaged checkpoint, and a new run from a newly initialized state.
    """
    experiment, folder, mesh = self.run.experiment, self.run.folder, self.run.mesh
    size, options = experiment.training.batch_size, experiment.data
    self.checkpoints = model.open_checkpoints(experiment, folder)
    self.batches = data.batches(
      self.run.training_source,
      size,
      seed=experiment.seed,
      flip=options.flip,
      put=lambda batch: parallel.put_batch(mesh, batch, size),
      num_threads=options.num_threads,
      num_workers=options.num_workers,
      rows=parallel.local_rows(mesh, size),
      hosts=hosts_of(self.trained.model.conditions),
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
      assert self.init is not None
      with progress.heartbeat("initializing the parameters"):
        state = jax.block_until_ready(self.init())
      print_line("starting a new run")
    # The function holds the parameters of `init_from`, which would stay on the devices beside the state.
    self.init = None
    # Write the config only after the state is loaded: a failed start must not change the saved config.
    if parallel.is_main():
      config.write(folder, pretrained.copy_config(experiment.tree, folder))
    if not resuming:
      frozen_file.write(folder, self.digests)
    return state

  def _set_aside(self, restored: checkpoint.Restored | None) -> None:
    """Move checkpoints that are later than `restored` to the damaged folder.

    Incomplete checkpoints of any step are deleted. Snapshots of the averaged weights are also deleted if they are later
    than `restored`. Messages about damaged and incomplete checkpoints are stored in `self.damaged`.

    Args:
      restored: the checkpoint that training resumes from; None to start at step 0.
    """
    parallel.wait_for_all("restored")
    folder, step, damaged = self.run.folder, *((0, []) if restored is None else (restored.step, restored.damaged))
    damaged_folder = workdir.damaged_folder(folder)
    snapshots = model.open_snapshots(folder) if workdir.snapshot_folder(folder).exists() else None
    discarded = []
    if parallel.is_main():
      discarded = self.checkpoints.discard(step, damaged_folder)
      if snapshots is not None:
        # Training takes these snapshots again.
        snapshots.discard(step)
    parallel.wait_for_all("set aside")
    self.checkpoints.reload()
    if snapshots is not None:
      snapshots.close()
    problems = [f"skipped a damaged checkpoint: {text}" for text in damaged]
    problems += [f"deleted an incomplete checkpoint: {path}" for path in discarded if "tmp" in path.name]
    if problems:
      where = f"; moved the damaged files to {damaged_folder}" if damaged else ""
      problems.append(f"{'started again' if restored is None else f'resumed from step {step:,}'}{where}")
    for problem in problems:
      warn(problem)
    self.damaged = problems

  def parameters(self, state: training.TrainState) -> Parameters:
    """Return the parameters for sampling.

    The frozen parameters of the training objective, such as the parameters of a teacher, are left out.
    """
    model_frozen = {name: part for name, part in (self.frozen or {}).items() if name != "objective"}
    if self.trained is not self.run.experiment:
      experiment, folder, mesh = self.run.experiment, self.run.folder, self.run.mesh
      model_frozen = latents.with_encoders(experiment, self.run.latents, model_frozen, mesh)
      frozen_file.check(folder, frozen.digests_of(experiment, model_frozen))
    return Parameters(ema.ema_params(state.opt_state), model_frozen)

  def train(self, state: training.TrainState, profile: int) -> training.TrainState:
    """Train to the last step, and return the state."""
    experiment, folder, mesh = self.run.experiment, self.run.folder, self.run.mesh
    c, first = experiment.training, int(state.step)
    jitted = parallel.jit_step(self.step, mesh, state, self.frozen)
    arguments = () if self.frozen is None else (self.frozen,)
    programs = {}
    for batch in self.batch_shapes:
      name = "the train step" + (f" for images of {_size(batch)}" if self.run.buckets is not None else "")
      lower = partial(jitted.lower, self.template, batch, *arguments)
      programs[_shapes(batch)] = progress.compile_with_progress(name, lower)

    def step(state, batch, *arguments):
      return programs[_shapes(batch)](state, batch, *arguments)

    writer = None
    if parallel.is_main():
      writer = records.MetricLog(folder, first, wandb=c.wandb, config=experiment.tree.values)
    trace = watching.Trace(folder / "profile", first + _STEPS_BEFORE_TRACE, profile)
    with contextlib.ExitStack() as stack:
      if writer is not None:
        stack.callback(writer.close)
      stack.callback(self.checkpoints.wait)
      stack.callback(trace.close)
      work = _Work(self, writer, _num_skipped(state))
      signals = stack.enter_context(watching.Signals(self.batches.cancel))
      state = training.fit(
        state,
        step,
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
        work.save_checkpoint(stopped, state, {})
        self.checkpoints.wait()
        name = signal.Signals(signals.number).name
        print_line(f"stopped by {name}; saved at step {stopped:,}; run the same command again to resume")
        raise Stopped(signals.number)
    return state


class _Work:
  """Log metrics, and save previews, scores, snapshots and checkpoints between training steps."""

  def __init__(self, trainer: _Trainer, writer: records.MetricLog | None, skipped: int):
    self._trainer, self._run, self.checkpoints = trainer, trainer.run, trainer.checkpoints
    self._writer, self._skipped = writer, skipped
    # The step and the values of the newest scores.
    self._scores: tuple[int, Metrics] = (-1, {})
    # The parameters of the scores, until the preview of the same step is made.
    self._kept: Parameters | None = None
    experiment = self._run.experiment
    self._rate, self._chip = stepping.schedule(experiment), hardware.chip_of(self._run.mesh.devices.flat[0].device_kind)
    self._flops = _mean_flops(trainer) if self._chip else 0.0

  def callbacks(self) -> list[training.Callback]:
    """Return the callbacks of the training loop.

    In each step, the callback that saves the checkpoint is the last one. If the run is killed before the checkpoint is
    saved, the resumed run trains this step again and repeats its other callbacks.
    """
    experiment, folder = self._run.experiment, self._run.folder
    callbacks = []
    if experiment.ema.snapshot_every:
      self.snapshots = model.open_snapshots(folder)
      callbacks.append(training.Callback(experiment.ema.snapshot_every, self._snapshot))
    if experiment.evaluation.every:
      callbacks.append(training.Callback(experiment.evaluation.every, self._score))
    if self._trainer.preview is not None:
      callbacks.append(training.Callback(experiment.training.sample_every, self._save_preview))
    return [*callbacks, training.Callback(experiment.training.checkpoint_every, self.save_checkpoint)]

  def log(self, step: int, metrics: Metrics) -> None:
    """Add the learning rate, the peak memory and, if known, the FLOP utilization to the metrics, and log them."""
    skipped = int(metrics.get("skipped", 0))
    if skipped > self._skipped:
      warn(
        f"skipped {skipped - self._skipped} steps before step {step:,} because of gradients that are not finite"
        f" ({skipped:,} in total)"
      )
    self._skipped = skipped
    # Skipped steps do not advance the schedule.
    metrics["learning_rate"] = float(self._rate(step - 1 - skipped))
    metrics["memory_gb"] = parallel.peak_memory() / 1e9
    if self._trainer.batches.num_broken:
      metrics["broken_files"] = self._trainer.batches.num_broken
    if self._chip is not None:
      speed, dtype = metrics["images_per_second"] * self._flops, scoring.dtype_of(self._run.experiment)
      metrics["flop_utilization"] = hardware.utilization(speed, self._chip, self._run.mesh.size, dtype)
    if self._writer is not None:
      self._writer.scalars(step, metrics)

  def save_checkpoint(self, step: int, state: training.TrainState, metrics: Metrics) -> None:
    """Save a checkpoint, with the scores of its step if there are any."""
    scores = self._scores[1] if self._scores[0] == step else {}
    # If the metric that ranks checkpoints is missing, save no metrics, because this checkpoint cannot be ranked.
    lacks_best = self._run.experiment.training.best_metric.startswith("eval/") and not scores
    self.checkpoints.save(
      step, training.state_to_items(state), self._trainer.batches.state, {} if lacks_best else metrics | scores
    )

  def rescue(self, step: int, state: training.TrainState) -> None:
    """Save the state when the next batch cannot be read.

    A run with several processes does not save the state.
    """
    # With several processes, a save needs all of them, but the other processes already wait inside the next step.
    if jax.process_count() == 1:
      self.save_checkpoint(step, state, {})
      self.checkpoints.wait()
      print_line(f"the next batch cannot be read; saved at step {step:,}; run the same command again to resume")

  def _score(self, step: int, state: training.TrainState, metrics: Metrics) -> None:
    parameters = self._trainer.parameters(state)
    scores = self._trainer.scorer.training_scores(parameters)
    self._scores = (step, scores)
    c = self._run.experiment.training
    if self._trainer.preview is not None and (step % c.sample_every == 0 or step == c.steps):
      # Reading the text encoders may take minutes.
      self._kept = parameters
    print_line(f"step {step:,}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    if self._writer is not None:
      self._writer.scalars(step, scores)

  def _snapshot(self, step: int, state: training.TrainState, metrics: Metrics) -> None:
    # Save one folder at a time: orbax's barriers between processes do not distinguish two folders.
    self.checkpoints.wait()
    # The average is not updated in skipped steps, so they do not count.
    self.snapshots.save(step, {"ema": training.state_to_items(state)["ema"]}, {"steps": step - _num_skipped(state)})
    self.snapshots.wait()

  def _save_preview(self, step: int, state: training.TrainState, metrics: Metrics) -> None:
    assert self._trainer.preview is not None
    parameters, self._kept = self._kept or self._trainer.parameters(state), None
    picture = self._trainer.preview(parameters)
    if self._writer is not None:
      images.save_grid(self._run.folder / "samples" / f"step_{step:07d}.png", picture)
      self._writer.image(step, "samples", images.grid(picture))


def _mean_flops(trainer: _Trainer) -> float:
  """Return the FLOPs of the train step per sample, averaged over the training data."""
  counts = [len(members) for members in data.group_members(trainer.run.training_source)]
  singles = [
    jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), batch)
    for batch in trainer.batch_shapes
  ]
  flops = [stepping.flops_per_image(trainer.trained, single) for single in singles]
  return float(np.average(flops, weights=counts))


def _shapes(batch: PyTree) -> tuple[tuple[int, ...], ...]:
  return tuple(leaf.shape for leaf in jax.tree.leaves(batch))


def _size(batch: PyTree) -> str:
  return "x".join(map(str, batch["image"].shape[1:]))


def _num_skipped(state: training.TrainState) -> int:
  return int((optim.skip_counts(state.opt_state) or (0,))[0])
