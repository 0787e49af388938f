"""Edit images with a trained model.

The tasks are inpaint, img2img, instruct, colorize, superres, restore, interpolate and invert. Inputs and
results are written to edits/ in the run folder, as an array (.npz) and as a picture (.png).
"""

from ddpm_jax.commands import flags, jax_setup
from ddpm_jax.commands.parser import Flag, Group, count, number, path, seed, text
from ddpm_jax.storage.places import user_path

EXAMPLES = (
  "--mode=edit --task=inpaint --workdir=/tmp/digits_vp --input=/tmp/digit.png --mask=lower --num_samples=4",
  "--mode=edit --task=img2img --workdir=/tmp/digits_vp --input=/tmp/images --strength=0.5",
)


def _mask(value: str, name: str) -> str:
  """Parse the path of a mask or the name of a region."""
  return str(user_path(value, f"--{name}=")) if value else ""


FLAGS = (
  flags.MODEL,
  Group(
    "edits",
    (
      Flag("task", text, "The task: inpaint, img2img, instruct, colorize, superres, restore, interpolate or invert."),
      Flag("input", path, "The images to edit: an image file, a folder of images or an .npz file."),
      Flag(
        "mask",
        _mask,
        "The region to inpaint: lower, upper, left, right, center, or a mask image (white where to inpaint).",
      ),
      Flag(
        "method",
        text,
        "The method. inpaint: repaint, replace, posterior or dps. colorize, superres and restore: posterior or dps.",
      ),
      Flag("strength", number, "The strength of img2img, from 0 (returns the input) to 1 (a new sample)."),
      Flag("num_samples", count, "The number of results for each image (default 1).", 1),
      Flag("seed", seed, "The random seed of sampling (default 0).", 0),
    ),
  ),
  *flags.GENERATION,
)


def run(args: flags.Args) -> None:
  """Edit images."""
  from ddpm_jax import runs
  from ddpm_jax.names import choose
  from ddpm_jax.runs import edit_methods

  folder = flags.run_folder(args)
  task = choose(args.task or "", tuple(edit_methods.TASKS), "--task")
  if args.strength is not None and task != "img2img":
    raise ValueError(f"Got --strength with --task={task}; expected it with --task=img2img only. Leave it out.")
  methods = edit_methods.TASKS[task]
  # A method without arguments gets the arguments that suit the task.
  short = {} if args.method is None else {"method": methods.get(args.method, args.method)}
  keys = flags.sampling_keys(args, **short)
  edit = runs.Edit(task, args.input, args.mask or "", args.num_samples)
  steering = flags.steering(args)
  # Check all flags before devices are initialized.
  jax_setup.join_processes(args)
  jax_setup.start_devices(args)
  experiment, model = flags.load_experiment(args, keys)
  if task in ("invert", "interpolate") and not any(key.split(".")[0] == "sampler" for key in keys):
    experiment = runs.with_reversible_sampler(experiment)
  runs.run_edit(
    experiment,
    folder,
    edit,
    seed=args.seed,
    choice=flags.weights_choice(args),
    steering=steering,
    scale=args.guidance_scale,
    model=model,
  )
