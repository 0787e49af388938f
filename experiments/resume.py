"""Check that a training run that is killed many times gives the same result as an uninterrupted run.

python experiments/resume.py [--kills=20] [--seed=0] [--folder=/tmp/resume]

The script trains a small model of digits twice from the command line. The first run is not interrupted. The second run
is killed (SIGKILL) and resumed many times, alternately at a random time and while it writes a checkpoint. At the end,
the parameters, the optimizer state, the EMA, the key and the data position must agree bit for bit, and both logs must
cover the same steps. Otherwise the exit code is 1.
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
  # A compilation cache makes restarts fast.
  environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache")}
  command = [sys.executable, "-m", "ddpm_jax.main", *OPTIONS, f"--workdir={folder}"]
  log = (folder.parent / f"{folder.name}.log").open("a")
  return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def unfinished_checkpoints(folder):
  """Return a set with a pair (name, inode) for each unfinished checkpoint.

  The inode distinguishes a checkpoint in progress from an older, interrupted checkpoint of the same name.
  """
  unfinished = set()
  for path in folder.glob("checkpoints/*.orbax-checkpoint-tmp*"):
    with contextlib.suppress(FileNotFoundError):
      unfinished.add((path.name, path.stat().st_ino))
  return unfinished


def kill(folder, rng, while_saving):
  """Start the run and kill it during training.

  Returns:
    "while saving" if the kill interrupted a checkpoint, "between saves" if not, and None if the run ended before the
    kill.
  """
  old, process = unfinished_checkpoints(folder), start(folder)
  latest = max(checkpoint.Checkpoints.steps(folder / "checkpoints"), default=0)
  deadline = time.time() + 300
  # A newer checkpoint shows that training has started.
  while process.poll() is None and time.time() < deadline:
    if while_saving and unfinished_checkpoints(folder) - old:
      break
    if not while_saving and max(checkpoint.Checkpoints.steps(folder / "checkpoints"), default=0) > latest:
      time.sleep(rng.uniform(0, 1))
      break
    time.sleep(0.0005 if while_saving else 0.02)
  is_saving = unfinished_checkpoints(folder) - old
  if process.poll() is not None:
    return None
  process.send_signal(signal.SIGKILL)
  process.wait()
  return "while saving" if is_saving else "between saves"


def state(folder):
  """Return the digests of all leaves of the final checkpoint, the data position, and the logged losses."""
  path = folder / "checkpoints"
  content = json.loads((path / str(STEPS) / "meta" / "metadata").read_text())["content"]
  losses = [(line["step"], line["loss"]) for line in records.read(folder / "metrics.jsonl")]
  digests = {
    (name, leaf): entry["digest"] for name, leaves in content["leaves"].items() for leaf, entry in leaves.items()
  }
  return digests, content["data"], losses


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--kills", type=int, default=20, help="number of kills")
  parser.add_argument("--seed", type=int, default=0, help="seed of the random times")
  parser.add_argument(
    "--folder", type=Path, default=Path("/tmp/resume"), help="folder for the runs; its contents are deleted"
  )
  args = parser.parse_args()
  shutil.rmtree(args.folder, ignore_errors=True)
  args.folder.mkdir(parents=True)
  rng = random.Random(args.seed)
  reference, killed = args.folder / "reference", args.folder / "killed"
  print("training without interruption ...", flush=True)
  if start(reference).wait():
    raise SystemExit(f"Training failed. See {args.folder / 'reference.log'}.")
  moments = []
  while len(moments) < args.kills:
    moment = kill(killed, rng, while_saving=len(moments) % 2 == 1)
    if moment is None:
      raise SystemExit(f"The run ended or failed after {len(moments)} kills. See {args.folder / 'killed.log'}.")
    moments.append(moment)
    steps = checkpoint.Checkpoints.steps(killed / "checkpoints")
    print(f"kill {len(moments)} of {args.kills}, {moment}; newest checkpoint: {max(steps, default=0)}", flush=True)
  if start(killed).wait():
    raise SystemExit(f"Resuming failed. See {args.folder / 'killed.log'}.")
  (digests, data, losses), (killed_digests, killed_data, killed_losses) = state(reference), state(killed)
  different = [name for name in digests if digests[name] != killed_digests[name]]
  print(
    f"\n{len(moments)} kills, {moments.count('while saving')} of them while saving a checkpoint\n"
    f"{len(digests) - len(different)} of {len(digests)} leaves identical;"
    f" data position {'identical' if data == killed_data else 'DIFFERENT'};"
    f" {sum(a == b for a, b in zip(losses, killed_losses, strict=False))} of {len(losses)} logged losses identical;"
    f" {len(killed_losses)} lines in the log of the killed run"
  )
  if different or data != killed_data or [step for step, _ in losses] != [step for step, _ in killed_losses]:
    raise SystemExit(f"DIFFERENT: {different}")


if __name__ == "__main__":
  main()
