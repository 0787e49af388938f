"""Run all benchmarks on a GPU, and save their results.

pip install '.[cuda,peers]'
python experiments/benchmarks/gpu.py --output=<folder>

PyTorch must be a build for CUDA, but on some systems the extra `peers` installs a build for CPUs. The script needs no
internet access. Each benchmark runs in a separate process. If one fails, the others still run, and the script reports
the failure at the end. With --minutes=8, the script stops after eight minutes and keeps the results of the benchmarks
so far. The most important benchmarks run first. --quick runs a small version of the benchmarks on any machine.
"""

import argparse
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
RUNS = {
  "unet_ddpm": ("unet.py", "--model=ddpm", "--batches=16,64,128,256,512,1024,2048"),
  "unet_adm64": ("unet.py", "--model=adm64", "--batches=8,16,32,64,128,256"),
  "sampling_ddpm": ("sampling.py", "--model=ddpm", "--batches=1,16,256", "--rounds=5"),
  "overhead": ("sampling_overhead.py", "--batch=256", "--channels=128", "--size=32"),
  "startup": ("startup.py", "--rounds=3"),
  "input": ("input.py",),
  "memory": ("memory.py", "--devices=1", "--batches=128,512", "--compile", str(CONFIGS / "cifar10_vp.py")),
}
QUICK = {
  "unet_ddpm": ("unet.py", "--model=tiny", "--batches=2,4", "--rounds=1"),
  "sampling_ddpm": ("sampling.py", "--model=tiny", "--batches=2"),
  "overhead": (
    "sampling_overhead.py",
    "--samplers",
    "heun",
    "--channels=32",
    "--batch=2",
    "--size=8",
    "--rounds=1",
    "--limit=1000",
  ),
  "input": (
    "input.py",
    "--batch=8",
    "--small=400",
    "--large=16",
    "--workers=0",
    "--seconds=0.05",
    "--steps=2",
    "--limit=1",
  ),
  "memory": ("memory.py", "--devices=1", "--batches=8", "--types=float32", "--compile", str(HERE / "tiny.py")),
}


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--output", type=Path, required=True, help="folder for the results and tables")
  parser.add_argument("--quick", action="store_true", help="run a small version of the benchmarks")
  parser.add_argument("--minutes", type=float, default=None, help="time limit for all benchmarks; default: none")
  args = parser.parse_args()
  if args.minutes is not None and not args.minutes > 0:
    raise SystemExit(f"Got --minutes={args.minutes:g}; expected a number above 0.")
  args.output.mkdir(parents=True, exist_ok=True)
  end = None if args.minutes is None else time.monotonic() + 60 * args.minutes
  failed, unfinished = [], []
  for name, (script, *options) in (QUICK if args.quick else RUNS).items():
    if end is not None and time.monotonic() >= end:
      unfinished.append(name)
      continue
    print(f"\n# {name}: {script} {' '.join(options)}", flush=True)
    command = [sys.executable, str(HERE / script), *options, f"--json={args.output / name}.json"]
    with (args.output / f"{name}.txt").open("w") as table:
      process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
      timer = threading.Timer(max(end - time.monotonic(), 0), process.kill) if end is not None else None
      if timer:
        timer.start()
      for line in process.stdout:
        print(line, end="", flush=True)
        table.write(line)
    code = process.wait()
    if timer:
      timer.cancel()
    if code and end is not None and time.monotonic() >= end:
      unfinished.append(name)
    elif code:
      failed.append(name)
  print(f"\nresults and tables: {args.output}")
  if unfinished:
    print(f"stopped at the time limit, with partial results: {', '.join(unfinished)}")
  if failed:
    raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
  main()
