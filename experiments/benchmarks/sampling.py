"""Sampling, ours against diffusers' pipelines in PyTorch, and what `sample` adds to bare calls of the network.

pip install '.[peers]'
python experiments/benchmarks/sampling.py [--model=ddpm] [--batches=1,16] [--rounds=1] [--compile] [--json=<file>]
python experiments/benchmarks/sampling.py --batches=1,16,256 --rounds=5      # on a GPU

50 steps of DDIM and 20 of DPM-Solver++(2M), from noise to images in host memory, by networks with the same weights. The two are run in turn, there
and back; the table gives the median of our time over theirs (below 1 ours is faster), images a second, and our time over that of as many bare,
jitted calls of the network on the same batch. On a CPU all compute in float32, PyTorch eagerly and, with --compile, compiled too. On a GPU all
compute in bfloat16, PyTorch with channels last, eagerly and compiled. `sampling_overhead.py` measures the overhead alone, of every sampler.
"""

import os

# Before JAX starts: what PyTorch needs must be left.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pair
import timing
import torch

from ddpm_jax import guidance, predictions, processes, sampling, schedules
from ddpm_jax.devices import heap, parallel

TASKS = {
  "DDIM, 50 steps": (50, sampling.ddim, diffusers.DDIMScheduler, diffusers.DDIMPipeline),
  "DPM-Solver++(2M), 20 steps": (20, sampling.dpmpp_2m, diffusers.DPMSolverMultistepScheduler, diffusers.DDPMPipeline),
}


def make_ours(made, dtype, rule, steps, batch):
  """Sampling from noise to an array in host memory, and as many bare calls of the network."""
  process, options = processes.discrete(schedules.linear()), parallel.compiler_options()
  network, shape = made.network.clone(dtype=dtype), (batch, *made.shape)
  sampler, times = rule(process), sampling.grids.trailing(process, steps)

  def apply(params, x, time):
    return network.apply({"params": params}, x, time)

  def draw(params, key):
    denoise = guidance.clip(predictions.denoiser(lambda x, time: apply(params, x, time), process, predictions.EPS))
    x = process.prior(key, shape)
    return sampling.sample(key, sampler, denoise, x, times)

  drawn = jax.jit(draw, compiler_options=options)
  called = jax.jit(apply, compiler_options=options)
  x, time = jnp.asarray(pair.batch_of(batch, made.shape)["x"]), jnp.full((batch,), 500.0)

  def bare():
    for _ in range(sampling.nfe(sampler, process, times)):
      y = called(made.params, x, time)
    jax.block_until_ready(y)

  return lambda: np.asarray(drawn(made.params, jax.random.key(0))), bare


def make_theirs(model, scheduler, pipeline, steps, batch, gpu):
  # Its progress bar would be most of its output here.
  options = {"algorithm_type": "dpmsolver++"} if scheduler is diffusers.DPMSolverMultistepScheduler else {}
  pipe = pipeline(unet=model, scheduler=scheduler(beta_schedule="linear", timestep_spacing="trailing", **options))
  pipe.set_progress_bar_config(disable=True)

  def run():
    with torch.no_grad(), torch.autocast("cuda" if gpu else "cpu", torch.bfloat16, enabled=gpu):
      return pipe(batch_size=batch, num_inference_steps=steps, output_type="np").images

  return run


def main():
  parser = timing.parser(__doc__, rounds=1)
  parser.add_argument("--model", choices=pair.MODELS, default="ddpm", help="the network")
  parser.add_argument("--batches", type=timing.counts, default="1,16", help="images a batch, several by commas")
  parser.add_argument("--compile", action="store_true", help="PyTorch compiled too, on a CPU")
  args = parser.parse_args()
  # As the command line does; on a CPU it is PyTorch's too.
  heap.keep_freed_memory()
  gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()

  made = pair.make(args.model)
  model = made.model.to("cuda") if gpu else made.model
  if gpu:
    model = model.to(memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = True
  models = {"eager": model}
  if gpu or args.compile:
    models["compiled"] = torch.compile(model)
  here = timing.machine(PyTorch=torch.__version__, diffusers=diffusers.__version__)
  rows = []
  for batch in args.batches:
    for name, (steps, rule, scheduler, pipeline) in TASKS.items():
      print(f"batch {batch}, {name} ...", flush=True)
      ours, bare = make_ours(made, jnp.bfloat16 if gpu else jnp.float32, rule, steps, batch)
      runs = {"ours": ours, "bare": bare}
      runs |= {kind: make_theirs(one, scheduler, pipeline, steps, batch, gpu) for kind, one in models.items()}
      times = timing.in_turn(runs, args.rounds, settle=gpu)
      rows.append(
        {
          "task": name,
          "batch": batch,
          "images_per_second": {kind: batch / float(np.median(values)) for kind, values in times.items()},
          "ratio": {kind: timing.ratio(times, "ours", kind) for kind in models},
          "overhead": timing.ratio(times, "ours", "bare"),
        }
      )
      timing.write(args.json, {"machine": here, "model": args.model, "rows": rows})
  cells = [
    [
      row["task"],
      row["batch"],
      f"PyTorch, {kind}",
      timing.with_quartiles(row["ratio"][kind]),
      *(f"{row['images_per_second'][which]:.3g}" for which in ("ours", kind)),
      timing.with_quartiles(row["overhead"], 3),
    ]
    for row in rows
    for kind in models
  ]
  columns = ["sampler", "batch", "against", "our time over theirs", "ours, images/s", "theirs", "over bare calls"]
  timing.report(f"{args.model}, {'bfloat16' if gpu else 'float32'}", columns, cells, here)


if __name__ == "__main__":
  main()
