"""Save and restore checkpoints with orbax.

Each saved array has a digest, so a damaged checkpoint is detected and never used. No other module imports orbax.
"""

import contextlib
import gc
import json
import logging
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from ddpm_jax.storage import digests, sealed

PyTree = Any
# Increase the version when older code can no longer read new checkpoints.
FORMAT_VERSION = 2
_MAX_SHOWN = 10


def check_folder(folder: str | Path) -> Path:
  """Return the absolute path of a checkpoint folder, or refuse a path that orbax misreads.

  Orbax expands wildcards and reads some names as bucket URIs. Its storage layer reads a backslash as a slash.
  If orbax misreads the path of a folder, it can write checkpoints there but not read them again.

  Raises:
    ValueError: if orbax would misread the path.
  """
  path = Path(folder).absolute()
  # Orbax shortens a/../b to b. This is wrong if a is a symbolic link, so resolve the path here.
  path = path.resolve() if ".." in path.parts else path
  text = str(path)
  forbidden = sorted({character for character in text if character in "*?[\\" or "\ud800" <= character <= "\udfff"})
  if forbidden:
    shown = " ".join(character.encode(errors="backslashreplace").decode() for character in forbidden)
    raise ValueError(
      f"Got {text!r} as the checkpoint folder, with {shown} in its path; expected valid UTF-8 without"
      r" * ? [ \. Rename the folder, or set another --workdir."
    )
  # Orbax reads gs:/ as gs://. It also reads /gs/x, /s3/x, /az/x and /hf/x as gs://x, s3://x, az://x and hf://x.
  if "gs:/" in text or "://" in os.fspath(epath.Path(text)):
    raise ValueError(
      f"Got {text!r} as the checkpoint folder, but orbax reads this path as a bucket; expected a path that does not"
      " start with"
      " /gs/, /s3/, /az/ or /hf/, and has no folder that ends in gs:. Set another --workdir, or use a symbolic link."
    )
  return path


class Restored(NamedTuple):
  """Hold the content of a restored checkpoint.

  Attributes:
    step: the step of the checkpoint.
    items: the restored trees, as a dict from name to tree.
    data: the position in the training data at which training continues.
    damaged: one message, with the path and the problem, for each damaged checkpoint newer than the restored one.
  """

  step: int
  items: dict[str, PyTree]
  data: dict[str, Any]
  damaged: list[str]


class Checkpoints:
  """Save the checkpoints of one run in the background, and restore them.

  Args:
    folder: the folder of all checkpoints; it is created if missing.
    keep: how many of the newest checkpoints to keep.
    keep_every: also keep each checkpoint whose step is a multiple of this number; 0 for no such checkpoints.
    keep_best: how many of the best checkpoints to also keep, ranked by `metric`.
    metric: the name of a metric passed to `save`. A checkpoint without this metric is never one of the best.
    higher_is_better: whether the highest value of the metric is the best; otherwise the lowest is.
  """

  def __init__(
    self,
    folder: str | Path,
    *,
    keep: int = 2,
    keep_every: int = 0,
    keep_best: int = 0,
    metric: str = "loss",
    higher_is_better: bool = False,
  ):
    self.folder, self._sign = check_folder(folder), -1 if higher_is_better else 1
    self._metric, self._keep_best, self._saving = metric, keep_best, 0
    policies: list[Any] = [preservation_policy.LatestN(keep)]
    if keep_every:
      policies.append(preservation_policy.EveryNSteps(keep_every))
    if keep_best:
      policies.append(_PreserveChosen(self._best_steps))
    options = ocp.CheckpointManagerOptions(
      preservation_policy=preservation_policy.AnyPreservationPolicy(policies), create=True
    )
    self._manager = ocp.CheckpointManager(self.folder, options=options)
    self._scores: dict[int, float] = {}

  @staticmethod
  def steps(folder: str | Path) -> list[int]:
    """Return the steps of the finished checkpoints in a folder, in rising order, without changing any file."""
    return sorted(ocp.utils.checkpoint_steps(folder)) if Path(folder).is_dir() else []

  def save(
    self, step: int, items: Mapping[str, PyTree], data: dict[str, Any], metrics: Mapping[str, float] | None = None
  ) -> None:
    """Start to save a checkpoint, and return as soon as the trees may be donated again.

    A step that is already saved is not saved again.

    Args:
      step: the step of the checkpoint.
      items: the trees to save, as a dict from name to tree.
      data: the position in the training data at which a resumed run continues, as a dict for JSON.
      metrics: metrics of this step, to find the best checkpoints.

    Raises:
      OSError: if this checkpoint or the previous one cannot be written, for example because the disk is full or the
        folder has a checkpoint of a later step. Earlier checkpoints remain.
    """
    if step in self._manager.all_steps():
      return
    content = {
      "format_version": FORMAT_VERSION,
      "step": step,
      "data": data,
      "metrics": dict(metrics or {}),
      "leaves": {name: _describe(tree) for name, tree in items.items()},
    }
    args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    self._check_saved()
    self._saving, self._scores[step] = step, self._score(metrics or {})
    size = sum(leaf.nbytes for tree in items.values() for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes"))
    if jax.process_index() == 0 and (free := shutil.disk_usage(self.folder).free) < size:
      raise self._write_error(RuntimeError(f"it takes {size:,} bytes, but only {free:,} are free"))
    try:
      saved = self._manager.save(step, args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(_sealed(content))))
    except Exception as error:
      raise self._write_error(error) from error
    if not saved:
      problem = RuntimeError(f"the folder has a later checkpoint, of step {self._manager.latest_step()}")
      raise self._write_error(problem, "Choose another folder.")

  def _check_saved(self) -> None:
    """Raise an OSError if a save in the background has failed."""
    try:
      self._manager.check_for_errors()
    except Exception as error:
      raise self._write_error(error) from error

  def _write_error(
    self,
    error: Exception,
    advice: str = "Make room, or make the folder writable; then run the same command again.",
  ) -> OSError:
    steps = self.steps(self.folder)
    remaining = f" The checkpoints up to step {steps[-1]:,} remain." if steps else ""
    problem = "the disk is full" if "No space left" in str(error) else _first_line(error)
    return OSError(
      f"Cannot write the checkpoint of step {self._saving:,} to {self.folder}: {problem}. {advice}{remaining}"
    )

  def restore(self, templates: Mapping[str, PyTree], step: int | None = None) -> Restored:
    """Restore trees and the position in the training data from a checkpoint.

    Args:
      templates: the trees to read, as a dict from name to a tree of shapes, types and shardings. Other trees are not
        read.
      step: the step to restore; None for the newest undamaged checkpoint.

    Raises:
      DamagedCheckpointError: if all checkpoints are damaged, or the checkpoint of `step` is damaged.
      ValueError: if the checkpoint does not exist or has another format version, or if its trees differ from the
        templates in names, shapes or types.
    """
    steps = self.steps(self.folder)
    if step is not None and step not in steps:
      allowed = f"one of {', '.join(map(str, steps))}" if steps else "a folder with checkpoints"
      raise ValueError(f"Got step {step} of {self.folder}; expected {allowed}.")
    damaged = []
    with _collect_readers():
      for candidate in steps[::-1] if step is None else [step]:
        path = self.folder / str(candidate)
        try:
          content = self._read_description(candidate)
          _check_same_shapes(path, content, templates)
          items = self._read_items(candidate, content, templates)
        except _UnusableError as error:
          damaged.append(f"{path}: {error}")
          continue
        return Restored(candidate, items, content["data"], damaged)
    if damaged and step is not None:
      raise DamagedCheckpointError(
        f"Got a damaged checkpoint of step {step}; expected an intact checkpoint. The damage:\n"
        f"  {damaged[0]}\nRestore it from a copy, or choose another step."
      )
    if damaged:
      raise DamagedCheckpointError(
        "Got damaged checkpoints only; expected at least one intact checkpoint. The damaged checkpoints:\n  "
        + "\n  ".join(damaged)
        + "\nRestore a checkpoint from a copy, or start a new run in another --workdir."
      )
    raise ValueError(
      f"Got {self.folder}, which holds no checkpoint; expected a checkpoint from training. Train first: --mode=train."
    )

  def best_step(self) -> int | None:
    """Return the step of the checkpoint with the best metric, or None if no checkpoint has the metric."""
    best = self._best_steps(self.steps(self.folder), 1)
    return best[0] if best else None

  def _score(self, metrics: Mapping[str, float]) -> float:
    return self._sign * metrics[self._metric] if self._metric in metrics else math.inf

  def _best_steps(self, steps: Sequence[int], count: int | None = None) -> list[int]:
    for step in steps:
      if step not in self._scores:
        # Read the metrics from our own description. If orbax stored them, one damaged file would break its manager.
        try:
          self._scores[step] = self._score(self._read_description(step)["metrics"])
        except (_UnusableError, ValueError):
          self._scores[step] = math.inf
    scored = [step for step in steps if self._scores[step] < math.inf]
    return sorted(scored, key=lambda step: (self._scores[step], -step))[: self._keep_best if count is None else count]

  def _read_description(self, step: int) -> dict[str, Any]:
    """Return the description of a checkpoint: its leaves with digests, its data position and its metrics."""
    with _report_damage("its description cannot be read"):
      meta = ocp.JsonCheckpointHandler().restore(
        epath.Path(self.folder / str(step) / "meta"), args=ocp.args.JsonRestore()
      )
      if meta["sha256"] != sealed.digest_json(meta["content"]):
        raise _UnusableError("its description was changed after it was saved")
      version = int(meta["content"]["format_version"])
    if version != FORMAT_VERSION:
      raise ValueError(
        f"Got a checkpoint of format {version} in {self.folder / str(step)}; expected format {FORMAT_VERSION}, the"
        " only one that this version of ddpm_jax reads. Use the version of ddpm_jax that saved the checkpoint."
      )
    return meta["content"]

  def _read_items(self, step: int, content: dict[str, Any], templates: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Read trees, and compare their digests with the description."""
    items = {}
    with _report_damage("it cannot be read"):
      for name, tree in templates.items():
        # Orbax's manager would wait at a barrier forever if one process cannot read its part, so use the handler.
        folder = epath.Path(self.folder / str(step) / name)
        items[name] = ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(tree))
    for name, tree in items.items():
      saved, restored = content["leaves"][name], _describe(tree)
      # This also detects a random key that orbax restored as plain bits because orbax's metadata was lost.
      changed = [leaf for leaf in saved if saved[leaf] != restored[leaf]]
      if changed:
        raise _UnusableError(
          f"{len(changed)} of {len(saved)} leaves were changed after they were saved, such as {name}{changed[0]}"
        )
    return items

  def discard(self, after: int, target: Path | None = None) -> list[Path]:
    """Remove the checkpoints of all steps later than `after`, and return the paths of the removed checkpoints.

    Unfinished checkpoints of any step are deleted.

    Args:
      after: the step that training resumes from.
      target: the folder that finished checkpoints are moved to; None to delete them.
    """
    removed: list[Path] = []
    if not self.folder.is_dir():
      return removed
    for path in sorted(self.folder.iterdir()):
      step = re.match(r"(\d+)(\.orbax-checkpoint-tmp.*)?$", path.name)
      if step and step[2]:
        shutil.rmtree(path)
      elif step and int(step[1]) > after:
        if target is None:
          shutil.rmtree(path)
        else:
          shutil.move(path, sealed.unused_path(path, target))
      else:
        continue
      removed.append(path)
    return removed

  def reload(self) -> None:
    """Update orbax's list of the checkpoints in the folder.

    Every process must call this method after `discard`.
    """
    self._manager.reload()

  def wait(self) -> None:
    """Wait until all started saves are finished.

    Raises:
      OSError: if a checkpoint could not be written.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._write_error(error) from error
    self._check_saved()

  def close(self) -> None:
    """Wait until all started saves are finished, and release orbax's resources.

    Raises:
      OSError: if a checkpoint could not be written.
    """
    try:
      self.wait()
    finally:
      self._manager.close()


class _PreserveChosen:
  """Tell orbax to preserve the checkpoints of the steps that a function chooses."""

  def __init__(self, choose: Callable[[Sequence[int]], Sequence[int]]):
    self._choose = choose

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    chosen = self._choose([checkpoint.step for checkpoint in checkpoints])
    return [checkpoint.step in chosen for checkpoint in checkpoints]


class DamagedCheckpointError(ValueError):
  """Report that the requested checkpoint is damaged, or that all checkpoints are damaged."""


class _UnusableError(Exception):
  """Report that one checkpoint is damaged."""


@contextlib.contextmanager
def _collect_readers() -> Iterator[None]:
  """Delete orbax's unused readers after a failed read, and suppress their warnings.

  Each of these readers prints a long warning when Python deletes it.
  """
  hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
  log = logging.getLogger("asyncio")
  disabled, log.disabled = log.disabled, True
  try:
    with warnings.catch_warnings():
      warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
      try:
        yield
      finally:
        gc.collect()
  finally:
    sys.unraisablehook, log.disabled = hook, disabled


@contextlib.contextmanager
def _report_damage(message: str) -> Iterator[None]:
  """Raise an `_UnusableError` on every process if the block fails on any process.

  If one process cannot read the checkpoint, all processes must skip this checkpoint. Errors that are no sign of damage,
  such as a lack of memory or permission, are raised unchanged.
  """
  problem, failure = "", cast(Exception | None, None)
  try:
    yield
  except _UnusableError as error:
    problem, failure = str(error), error
  except (MemoryError, PermissionError):
    raise
  except Exception as error:
    if "RESOURCE_EXHAUSTED" in str(error) or "Too many open files" in str(error):
      raise
    problem, failure = f"{message} ({_first_line(error)})", error
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    is_intact = bool(np.all(multihost_utils.process_allgather(np.array(not problem))))
    problem = problem or ("" if is_intact else f"{message} (by another process)")
  if problem:
    raise _UnusableError(problem) from failure


def _sealed(content: dict[str, Any]) -> dict[str, Any]:
  """Return a dict of a description ("content") and its digest ("sha256")."""
  return {"content": json.loads(json.dumps(content)), "sha256": sealed.digest_json(content)}


def _describe(tree: PyTree) -> dict[str, dict[str, Any]]:
  """Return a dict from the path of each leaf to its shape, type and digest."""
  paths, leaves = (
    zip(*jax.tree_util.tree_flatten_with_path(tree)[0], strict=True) if jax.tree.leaves(tree) else ((), ())
  )
  leaf_digests = digests.compute(leaves)
  return {
    jax.tree_util.keystr(path): {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "digest": digest}
    for path, leaf, digest in zip(paths, leaves, leaf_digests, strict=True)
  }


def _check_same_shapes(path: Path, content: dict[str, Any], templates: Mapping[str, PyTree]) -> None:
  """Check that the templates and the saved trees have the same names, shapes and types.

  Raises:
    ValueError: if they differ. The message lists the differences.
  """
  differences = []
  for name, tree in templates.items():
    if name not in content["leaves"]:
      raise ValueError(
        f"Got {path}, which holds {', '.join(content['leaves'])}; expected a checkpoint with {name!r}."
        " Use the config that it was trained with, or set another --workdir."
      )
    saved = {leaf: f"{entry['dtype']}{entry['shape']}" for leaf, entry in content["leaves"][name].items()}
    expected = {
      jax.tree_util.keystr(leaf): f"{entry.dtype}{list(entry.shape)}"
      for leaf, entry in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    for leaf in sorted({*saved, *expected}):
      if saved.get(leaf) != expected.get(leaf):
        differences.append(
          f"{name}{leaf}: {saved.get(leaf, 'absent')} in the checkpoint, {expected.get(leaf, 'absent')} expected"
        )
  if differences:
    more = f"\n  and {len(differences) - _MAX_SHOWN} more" if len(differences) > _MAX_SHOWN else ""
    raise ValueError(
      f"Got {path}, the checkpoint of another architecture or optimizer:\n  "
      + "\n  ".join(differences[:_MAX_SHOWN])
      + more
      + "\nUse the config that it was trained with, or set another --workdir."
    )


def _first_line(error: BaseException) -> str:
  # The message of orbax names its own operation. The cause names the actual problem.
  while error.__cause__ is not None:
    error = error.__cause__
  return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
