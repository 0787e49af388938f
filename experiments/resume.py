"""Kills a training run again and again, at random moments and while it saves, and checks that nothing is lost.

python experiments/resume.py [--kills=20] [--seed=0] [--folder=/tmp/resume]

A small model of digits is trained twice from the command line: once from start to end, and once killed (SIGKILL) after a
random time, or as soon as a checkpoint is being written, and started again, until it has ended. Then every leaf of
parameters, optimizer, EMA and key, and the position in the data, must be the same bit for bit, and the two logs must hold the same
losses. Exits with 1 if they do not.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from ddpm_jax.storage import checkpoint, records

ROOT = Path(__file__).parent.parent
STEPS = 6000
OPTIONS = [
  "--config=configs/digits_vp.py",
  "--config.model.network.channels=8",
  "--config.model.network.groups=4",
  f"--config.training.steps={STEPS}",
  "--config.training.checkpoint_every=100",
  "--config.training.sample_every=1000",
  "--config.training.log_every=100",
  "--config.sampling.num_steps=4",
]


def start(folder):
  # A cache of its own keeps starts short.
  environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache")}
  command = [sys.executable, "-m", "ddpm_jax.main", *OPTIONS, f"--workdir={folder}"]
  log = (folder.parent / f"{folder.name}.log").open("a")
  return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def half_written(folder):
  """The checkpoints being written, or left so by an earlier kill, told apart by when they were begun."""
  found = set()
  for path in folder.glob("checkpoints/*.orbax-checkpoint-tmp*"):
    with contextlib.suppress(FileNotFoundError):
      found.add((path.name, path.stat().st_ino))
  return found


def kill(folder, rng, while_saving):
  """Starts the run and kills it at some moment after it began to train: says when, or None if it ended before."""
  left, process = half_written(folder), start(folder)
  latest = max(checkpoint.Checkpoints.steps(folder / "checkpoints"), default=0)
  deadline = time.time() + 300
  # It trains once there is a newer checkpoint, or one is being written.
  while process.poll() is None and time.time() < deadline:
    if while_saving and half_written(folder) - left:
      break
    if not while_saving and max(checkpoint.Checkpoints.steps(folder / "checkpoints"), default=0) > latest:
      time.sleep(rng.uniform(0, 1))
      break
    time.sleep(0.0005 if while_saving else 0.02)
  caught = half_written(folder) - left
  if process.poll() is not None:
    return None
  process.send_signal(signal.SIGKILL)
  process.wait()
  return "while saving" if caught else "between saves"


def state(folder):
  """Every leaf of the last checkpoint, the position in the data, and the losses that were logged."""
  path = folder / "checkpoints"
  content = json.loads((path / str(STEPS) / "meta" / "metadata").read_text())["content"]
  losses = [(line["step"], line["loss"]) for line in records.read(folder / "metrics.jsonl")]
  digests = {(name, leaf): of["digest"] for name, leaves in content["leaves"].items() for leaf, of in leaves.items()}
  return digests, content["data"], losses


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--kills", type=int, default=20, help="how often to kill it")
  parser.add_argument("--seed", type=int, default=0, help="of the moments")
  parser.add_argument("--folder", type=Path, default=Path("/tmp/resume"), help="emptied first")
  args = parser.parse_args()
  shutil.rmtree(args.folder, ignore_errors=True)
  args.folder.mkdir(parents=True)
  rng = random.Random(args.seed)
  whole, broken = args.folder / "whole", args.folder / "broken"
  print("training from start to end ...", flush=True)
  if start(whole).wait():
    raise SystemExit(f"training failed; see {args.folder / 'whole.log'}")
  moments = []
  while len(moments) < args.kills:
    moment = kill(broken, rng, while_saving=len(moments) % 2 == 1)
    if moment is None:
      raise SystemExit(f"the run ended, or failed, after {len(moments)} kills; see {args.folder / 'broken.log'}")
    moments.append(moment)
    steps = checkpoint.Checkpoints.steps(broken / "checkpoints")
    print(f"kill {len(moments)} of {args.kills}, {moment}; newest checkpoint: {max(steps, default=0)}", flush=True)
  if start(broken).wait():
    raise SystemExit(f"resuming failed; see {args.folder / 'broken.log'}")
  (digests, data, losses), (digests_b, data_b, losses_b) = state(whole), state(broken)
  different = [name for name in digests if digests[name] != digests_b[name]]
  print(
    f"\n{len(moments)} kills, {moments.count('while saving')} of them while a checkpoint was being written\n"
    f"{len(digests) - len(different)} of {len(digests)} leaves bit-identical; data position {'the same' if data == data_b else 'DIFFERENT'};"
    f" {sum(a == b for a, b in zip(losses, losses_b, strict=False))} of {len(losses)} logged losses the same, {len(losses_b)} lines in"
    " the killed run's log"
  )
  if different or data != data_b or [step for step, _ in losses] != [step for step, _ in losses_b]:
    raise SystemExit(f"DIFFERENT: {different}")


if __name__ == "__main__":
  main()
