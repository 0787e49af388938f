"""Checkpoints: all that orbax is used for. Each leaf has a digest, so that a damaged file is noticed and never used."""

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
# Raised when a checkpoint changes in a way that older code cannot read.
FORMAT_VERSION = 2
_SHOWN = 10


def check_folder(folder: str | Path) -> Path:
  """Return an absolute path of a folder that orbax reads as the system does.

  Raises:
    ValueError: if checkpoints there could be written but not read again: orbax takes wildcards for patterns and some names
      for those of buckets, its storage a backslash for a slash.
  """
  path = Path(folder).absolute()
  # Orbax's storage shortens a/../b to b although a may be a link.
  path = path.resolve() if ".." in path.parts else path
  text = str(path)
  wrong = sorted({character for character in text if character in "*?[\\" or "\ud800" <= character <= "\udfff"})
  if wrong:
    shown = " ".join(character.encode(errors="backslashreplace").decode() for character in wrong)
    raise ValueError(
      f"Got {text!r} as a folder of checkpoints, whose path has {shown}; expected a path of valid UTF-8 without"
      r" * ? [ \. Rename the folder, or use another --workdir."
    )
  # Orbax reads gs:/ as gs://, and /gs/x, /s3/x, /az/x and /hf/x as gs://x, s3://x, az://x and hf://x.
  if "gs:/" in text or "://" in os.fspath(epath.Path(text)):
    raise ValueError(
      f"Got {text!r} as a folder of checkpoints, which orbax takes for a bucket; expected a path that does not begin with"
      " /gs, /s3, /az or /hf, and has no folder that ends in gs:. Use another --workdir, or a link of another name."
    )
  return path


class Restored(NamedTuple):
  """What a checkpoint gave.

  Attributes:
    step: its step.
    items: the trees that were asked for, by name.
    data: the position in the data.
    damaged: newer checkpoints that could not be used, each with its path and why.
  """

  step: int
  items: dict[str, PyTree]
  data: dict[str, Any]
  damaged: list[str]


class Checkpoints:
  """The checkpoints of one run in a folder, saved in the background.

  Args:
    folder: where they lie; made at the first save.
    keep: how many of the newest to keep.
    keep_every: those of every so many steps are kept for good; 0 for none.
    keep_best: how many of the best to keep, by `metric`.
    metric: a name in the metrics given to `save`. A checkpoint without it is none of the best.
    higher_is_better: whether the highest is the best, and not the lowest.
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
      policies.append(_Chosen(self._best_steps))
    options = ocp.CheckpointManagerOptions(
      preservation_policy=preservation_policy.AnyPreservationPolicy(policies), create=True
    )
    self._manager = ocp.CheckpointManager(self.folder, options=options)
    self._scores: dict[int, float] = {}

  @staticmethod
  def steps(folder: str | Path) -> list[int]:
    """The steps of the finished checkpoints in a folder, rising; touches nothing."""
    return sorted(ocp.utils.checkpoint_steps(folder)) if Path(folder).is_dir() else []

  def save(
    self, step: int, items: Mapping[str, PyTree], data: dict[str, Any], metrics: Mapping[str, float] | None = None
  ) -> None:
    """Saves named trees and the data position (JSON) of a step; returns as soon as the trees may be donated again.

    Raises:
      OSError: if this save or the one before cannot be written, as on a full disk. Earlier checkpoints stand.
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
      raise self._unwritten(RuntimeError(f"it takes {size:,} bytes, and {free:,} are free"))
    try:
      saved = self._manager.save(step, args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(_sealed(content))))
    except Exception as error:
      raise self._unwritten(error) from error
    if not saved:
      raise self._unwritten(RuntimeError(f"there is a later one, of step {self._manager.latest_step()}"))

  def _check_saved(self) -> None:
    """Raises what happened to a save in the background."""
    try:
      self._manager.check_for_errors()
    except Exception as error:
      raise self._unwritten(error) from error

  def _unwritten(self, error: Exception) -> OSError:
    steps = self.steps(self.folder)
    stands = f" What was saved there up to step {steps[-1]:,} stands." if steps else ""
    problem = "the disk is full" if "No space left" in str(error) else _first_line(error)
    return OSError(
      f"Cannot write step {self._saving:,} into {self.folder}: {problem}. Make room, or make the folder writable; then run"
      f" the same command again.{stands}"
    )

  def restore(self, templates: Mapping[str, PyTree], step: int | None = None) -> Restored:
    """The named trees of the newest checkpoint whose every leaf is what was saved, and its data position.

    Args:
      templates: what to read, by name, as shapes, types and shardings; what is not named is not read.
      step: the step to restore, and no other; the newest by default.

    Raises:
      DamagedCheckpointError: if there is none but damaged ones.
      ValueError: if there is no checkpoint, it was written by a newer version, or it holds other shapes.
    """
    steps = self.steps(self.folder)
    if step is not None and step not in steps:
      raise ValueError(f"Got step {step} of {self.folder}; expected one of {', '.join(map(str, steps)) or 'none'}.")
    damaged = []
    with _collecting():
      for candidate in steps[::-1] if step is None else [step]:
        path = self.folder / str(candidate)
        try:
          content = self._content(candidate)
          _check_same_shapes(path, content, templates)
          items = self._read(candidate, content, templates)
        except _UnusableError as error:
          damaged.append(f"{path}: {error}")
          continue
        return Restored(candidate, items, content["data"], damaged)
    if damaged:
      raise DamagedCheckpointError(
        "Got no checkpoint that can be used; each is damaged:\n  "
        + "\n  ".join(damaged)
        + "\nRestore one from a copy, or start a new run in another --workdir."
      )
    raise ValueError(
      f"Got {self.folder}, which holds no checkpoint; expected one that training wrote. Train first: --mode=train."
    )

  def best_step(self) -> int | None:
    """The step of the best metric among those that lie here, or None if none has it."""
    best = self._best_steps(self.steps(self.folder), 1)
    return best[0] if best else None

  def _score(self, metrics: Mapping[str, float]) -> float:
    return self._sign * metrics[self._metric] if self._metric in metrics else math.inf

  def _best_steps(self, steps: Sequence[int], count: int | None = None) -> list[int]:
    for step in steps:
      if step not in self._scores:
        # From our own descriptions: a damaged file of orbax's metrics would keep its manager from starting.
        try:
          self._scores[step] = self._score(self._content(step)["metrics"])
        except (_UnusableError, ValueError):
          self._scores[step] = math.inf
    known = [step for step in steps if self._scores[step] < math.inf]
    return sorted(known, key=lambda step: (self._scores[step], -step))[: self._keep_best if count is None else count]

  def _content(self, step: int) -> dict[str, Any]:
    with _reading("its description cannot be read"):
      meta = ocp.JsonCheckpointHandler().restore(
        epath.Path(self.folder / str(step) / "meta"), args=ocp.args.JsonRestore()
      )
      if meta["sha256"] != sealed.digest_json(meta["content"]):
        raise _UnusableError("its description is not what was saved")
      version = int(meta["content"]["format_version"])
    if version != FORMAT_VERSION:
      raise ValueError(
        f"Got a checkpoint of format {version} in {self.folder / str(step)}; this version of ddpm_jax reads format {FORMAT_VERSION}. Upgrade"
        " ddpm_jax."
      )
    return meta["content"]

  def _read(self, step: int, content: dict[str, Any], templates: Mapping[str, PyTree]) -> dict[str, PyTree]:
    items = {}
    with _reading("it cannot be read"):
      for name, tree in templates.items():
        # Not by the manager, whose barrier would leave the other processes waiting where one cannot read its part.
        folder = epath.Path(self.folder / str(step) / name)
        items[name] = ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(tree))
    for name, tree in items.items():
      wanted, found = content["leaves"][name], _describe(tree)
      # Of a random key whose description is lost, the bits alone come back.
      changed = [leaf for leaf in wanted if wanted[leaf] != found[leaf]]
      if changed:
        raise _UnusableError(
          f"{len(changed)} of {len(wanted)} leaves are not what was saved, {name}{changed[0]} among them"
        )
    return items

  def discard(self, after: int, target: Path | None = None) -> list[Path]:
    """Clears the way after a step that is gone on from: gives the paths of what was passed over.

    Half-written checkpoints hold nothing of use and are deleted; finished ones are moved into `target`, or deleted without one.
    """
    passed_over: list[Path] = []
    if not self.folder.is_dir():
      return passed_over
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
      passed_over.append(path)
    return passed_over

  def reload(self) -> None:
    """Looks at the folder anew, after `discard`, in every process."""
    self._manager.reload()

  def wait(self) -> None:
    """Waits for saves under way.

    Raises:
      OSError: if one could not be written.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._unwritten(error) from error
    self._check_saved()

  def close(self) -> None:
    """Waits for saves under way, and is of no more use.

    Raises:
      OSError: if one could not be written.
    """
    try:
      self.wait()
    finally:
      self._manager.close()


class _Chosen:
  """An orbax policy that preserves the steps that a function chooses."""

  def __init__(self, choose: Callable[[Sequence[int]], Sequence[int]]):
    self._choose = choose

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    chosen = self._choose([checkpoint.step for checkpoint in checkpoints])
    return [checkpoint.step in chosen for checkpoint in checkpoints]


class DamagedCheckpointError(ValueError):
  """All that might have been restored is damaged."""


class _UnusableError(Exception):
  """A checkpoint that is not what was saved."""


@contextlib.contextmanager
def _collecting() -> Iterator[None]:
  """Collects the readers that orbax leaves waiting when one of them fails: each would print pages about itself, at any later time."""
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
def _reading(what: str) -> Iterator[None]:
  """Turns what goes wrong with a file into a `_UnusableError`, in all processes if in one: they must go on together.

  What says nothing of the file, such as too little memory, stays as it is.
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
    problem, failure = f"{what} ({_first_line(error)})", error
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    well = bool(np.all(multihost_utils.process_allgather(np.array(not problem))))
    problem = problem or ("" if well else f"{what} (by another process)")
  if problem:
    raise _UnusableError(problem) from failure


def _sealed(content: dict[str, Any]) -> dict[str, Any]:
  """Return a description with the digest of itself."""
  return {"content": json.loads(json.dumps(content)), "sha256": sealed.digest_json(content)}


def _describe(tree: PyTree) -> dict[str, dict[str, Any]]:
  """Shape, type and digest of each leaf, by its path."""
  paths, leaves = (
    zip(*jax.tree_util.tree_flatten_with_path(tree)[0], strict=True) if jax.tree.leaves(tree) else ((), ())
  )
  sums = digests.compute(leaves)
  return {
    jax.tree_util.keystr(path): {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "digest": digest}
    for path, leaf, digest in zip(paths, leaves, sums, strict=True)
  }


def _check_same_shapes(path: Path, content: dict[str, Any], templates: Mapping[str, PyTree]) -> None:
  """Raises a ValueError that lists names and shapes unless the templates are what was saved."""
  lines = []
  for name, tree in templates.items():
    if name not in content["leaves"]:
      raise ValueError(f"Got {path}, which holds {', '.join(content['leaves'])} and no {name!r}.")
    saved = {leaf: f"{of['dtype']}{of['shape']}" for leaf, of in content["leaves"][name].items()}
    wanted = {
      jax.tree_util.keystr(leaf): f"{of.dtype}{list(of.shape)}"
      for leaf, of in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    for leaf in sorted({*saved, *wanted}):
      if saved.get(leaf) != wanted.get(leaf):
        lines.append(
          f"{name}{leaf}: {saved.get(leaf, 'absent')} in the checkpoint, {wanted.get(leaf, 'absent')} expected"
        )
  if lines:
    more = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    raise ValueError(
      f"Got {path}, the checkpoint of another architecture or optimizer:\n  "
      + "\n  ".join(lines[:_SHOWN])
      + more
      + "\nUse the config that it was trained with, or another --workdir."
    )


def _first_line(error: BaseException) -> str:
  while error.__cause__ is not None:  # orbax says what it did, its cause what happened
    error = error.__cause__
  return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
