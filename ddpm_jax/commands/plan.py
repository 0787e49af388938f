"""Estimate the memory and time that training or sampling needs on given devices.

The command compiles the train step, or the sampling of a batch, and prints the FLOPs, memory,
communication and minimum time of the compiled program. The devices do not have to be present. The
command reads no data and no weights, and does not change run folders.
"""

from pathlib import Path

from ddpm_jax.commands import flags, jax_setup
from ddpm_jax.commands.parser import Flag, Group, count, text

EXAMPLES = (
  "--mode=plan --config=cifar10_vp --topology=v5e:4x4",
  "--mode=plan --config=digits_vp --devices=8 --fsdp=8",
  "--mode=plan --task=sample --pretrained=google/ddpm-cifar10-32 --num_samples=64 --topology=v5e:2x4",
)
_TASKS = ("train", "sample")
# The flags of sampling that are not short forms of config keys.
_SAMPLING = (
  *(
    "pretrained",
    "size",
    "dtype",
    "variant",
    "revision",
    "token",
    "num_samples",
    "classes",
    "given",
    "prompt",
    "prompts",
    "negative_classes",
    "negative",
  ),
  *("negative_prompt", "prompt_weights", "guidance_scale", "classifier", "weak"),
)


FLAGS = (
  flags.MODEL,
  Group(
    "plan",
    (
      Flag("task", text, "What to plan: train or sample (default: train, or sample with --pretrained)."),
      Flag("num_samples", count, "The number of samples (default: one batch of config.sampling.batch_size)."),
    ),
  ),
  Group(
    "devices",
    (
      Flag("topology", text, "The TPU slice to plan for, such as v5e:4x4.", metavar="SLICE"),
      Flag(
        "devices",
        count,
        "The number of devices of this machine to plan for; without GPUs or TPUs, the CPU simulates them.",
      ),
      Flag(
        "fsdp",
        count,
        "The number of devices that share one copy of the parameters (default: config.parallel.fsdp to train, 1 to sample).",
      ),
    ),
  ),
  flags.SAMPLER,
  flags.STEERING,
)


def run(args: flags.Args) -> None:
  """Print the plan."""
  from ddpm_jax import config, interop, runs
  from ddpm_jax.names import choose

  task = args.task or ("sample" if args.pretrained else "train")
  choose(task, _TASKS, "--task")
  devices = {"topology_name": args.topology, "num_devices": args.devices}
  if task == "train":
    unused = [name for name in _SAMPLING if getattr(args, name) not in (None, [])]
    if unused:
      raise ValueError(f"Got --{unused[0]} with --task=train; expected it with --task=sample only. Leave it out.")
    tree = flags.read_config(args, flags.config_keys(args))
    jax_setup.cache_compilations()
    runs.run_plan(tree, **devices, folder=args.workdir)
    return
  keys, steering = flags.sampling_keys(args), flags.steering(args)
  path, choices = flags.pretrained_choices(args)
  interop.hub.use_token(args.token)
  if args.pretrained is None:
    model = runs.sampling_plan.ModelChoice(flags.read_config(args, keys), folder=args.workdir)
  else:
    folder = args.workdir or Path.cwd()
    tree = config.read(args.config, keys, folder, default={})
    model = runs.sampling_plan.ModelChoice(tree, path, args.config is not None, keys, choices)
  jax_setup.cache_compilations()
  runs.run_sampling_plan(model, num_samples=args.num_samples, steering=steering, scale=args.guidance_scale, **devices)
