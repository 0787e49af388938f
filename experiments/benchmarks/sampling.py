"""Compare the time of our samplers with diffusers' pipelines in PyTorch, and with bare network calls.

pip install '.[peers]'
python experiments/benchmarks/sampling.py [--model=ddpm] [--batches=1,16] [--rounds=1] [--compile] [--json=<file>]
python experiments/benchmarks/sampling.py --batches=1,16,256 --rounds=5      # on a GPU

The samplers are DDIM with 50 steps and DPM-Solver++(2M) with 20 steps. Each starts with noise, and ends with images in
host memory. All networks have the same weights. Our code and theirs run alternately. The table lists the median ratio
of our time to theirs (below 1, ours is faster), and images per second. It also lists the ratio of our time to the time
of the sampler's jitted network calls alone.

On a CPU everything runs in float32. PyTorch runs in eager mode and, with --compile, also compiled. On a GPU everything
runs in bfloat16. PyTorch uses channels-last memory, and runs both in eager mode and compiled. `sampling_overhead.py`
measures the overhead of every sampler.
"""

import os

# Set this before JAX starts, to leave GPU memory for PyTorch.
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


def make_ours(networks, dtype, rule, steps, batch):
  """Return a function that samples to host memory, and a function that makes only the sampler's network calls."""
  process, options = processes.discrete(schedules.linear()), parallel.compiler_options()
  network, shape = networks.network.clone(dtype=dtype), (batch, *networks.shape)
  sampler, times = rule(process), sampling.grids.trailing(process, steps)

  def apply(params, x, time):
    return network.apply({"params": params}, x, time)

  def generate(params, key):
    denoise = guidance.clip(predictions.denoiser(lambda x, time: apply(params, x, time), process, predictions.EPS))
    x = process.prior(key, shape)
    return sampling.sample(key, sampler, denoise, x, times)

  jitted_generate = jax.jit(generate, compiler_options=options)
  jitted_apply = jax.jit(apply, compiler_options=options)
  x, time = jnp.asarray(pair.batch_of(batch, networks.shape)["x"]), jnp.full((batch,), 500.0)

  def bare():
    for _ in range(sampling.nfe(sampler, process, times)):
      y = jitted_apply(networks.params, x, time)
    jax.block_until_ready(y)

  return lambda: np.asarray(jitted_generate(networks.params, jax.random.key(0))), bare


def make_theirs(model, scheduler, pipeline, steps, batch, gpu):
  options = {"algorithm_type": "dpmsolver++"} if scheduler is diffusers.DPMSolverMultistepScheduler else {}
  pipe = pipeline(unet=model, scheduler=scheduler(beta_schedule="linear", timestep_spacing="trailing", **options))
  pipe.set_progress_bar_config(disable=True)

  def run():
    with torch.no_grad(), torch.autocast("cuda" if gpu else "cpu", torch.bfloat16, enabled=gpu):
      return pipe(batch_size=batch, num_inference_steps=steps, output_type="np").images

  return run


def main():
  parser = timing.make_parser(__doc__, rounds=1)
  parser.add_argument("--model", choices=pair.MODELS, default="ddpm", help="the network")
  parser.add_argument("--batches", type=timing.positive_ints, default="1,16", help="batch sizes, separated by commas")
  parser.add_argument("--compile", action="store_true", help="on a CPU, also time compiled PyTorch")
  args = parser.parse_args()
  # Same allocator settings as on the command line. On a CPU they also affect PyTorch.
  heap.keep_freed_memory()
  gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()

  networks = pair.make(args.model)
  model = networks.model.to("cuda") if gpu else networks.model
  if gpu:
    model = model.to(memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = True
  models = {"eager": model}
  if gpu or args.compile:
    models["compiled"] = torch.compile(model)
  info = timing.machine_info(PyTorch=torch.__version__, diffusers=diffusers.__version__)
  rows = []
  for batch in args.batches:
    for name, (steps, rule, scheduler, pipeline) in TASKS.items():
      print(f"batch {batch}, {name} ...", flush=True)
      ours, bare = make_ours(networks, jnp.bfloat16 if gpu else jnp.float32, rule, steps, batch)
      runs = {"ours": ours, "bare": bare}
      runs |= {kind: make_theirs(one, scheduler, pipeline, steps, batch, gpu) for kind, one in models.items()}
      times = timing.time_alternately(runs, args.rounds, warm_up=gpu)
      rows.append(
        {
          "task": name,
          "batch": batch,
          "images_per_second": {kind: batch / float(np.median(values)) for kind, values in times.items()},
          "ratio": {kind: timing.ratio(times, "ours", kind) for kind in models},
          "overhead": timing.ratio(times, "ours", "bare"),
        }
      )
      timing.write(args.json, {"machine": info, "model": args.model, "rows": rows})
  cells = [
    [
      row["task"],
      row["batch"],
      f"PyTorch, {kind}",
      timing.format_quartiles(row["ratio"][kind]),
      *(f"{row['images_per_second'][name]:.3g}" for name in ("ours", kind)),
      timing.format_quartiles(row["overhead"], 3),
    ]
    for row in rows
    for kind in models
  ]
  columns = ["sampler", "batch", "against", "our time over theirs", "ours, images/s", "theirs", "over network calls"]
  timing.report(f"{args.model}, {'bfloat16' if gpu else 'float32'}", columns, cells, info)


if __name__ == "__main__":
  main()
