"""Edit images by a trained model.

Tasks: inpaint, img2img, colorize, superres, restore, interpolate and invert. Inputs and results
are written into the folder's edits/, as an array (.npz) and a picture.
"""

from ddpm_jax.commands import flags, starting
from ddpm_jax.commands.parser import Flag, Group, count, number, path, seed, text
from ddpm_jax.storage.places import user_path

EXAMPLES = (
  "--mode=edit --task=inpaint --workdir=/tmp/digits_vp --input=/tmp/digit.png --mask=lower --num_samples=4",
  "--mode=edit --task=img2img --workdir=/tmp/digits_vp --input=/tmp/images --strength=0.5",
)


def _mask(value: str, name: str) -> str:
  """Read the path of a mask, or the name of a half."""
  return str(user_path(value, f"--{name}=")) if value else ""


FLAGS = (
  flags.MODEL,
  Group(
    "edits",
    (
      Flag("task", text, "What to do: inpaint, img2img, colorize, superres, restore, interpolate or invert."),
      Flag("input", path, "What to edit: an image, a folder of images or an .npz file."),
      Flag(
        "mask", _mask, "To inpaint: an image, white where it is to be painted; or lower, upper, left, right or center."
      ),
      Flag("method", text, "How: inpaint by repaint, replace, posterior or dps; other tasks by posterior or dps."),
      Flag("strength", number, "Of img2img, from 0 (the input) to 1 (a fresh sample)."),
      Flag("num_samples", count, "Results for each image (1).", 1),
      Flag("seed", seed, "The seed of sampling (0).", 0),
    ),
  ),
  *flags.DRAWING,
)


def run(given: flags.Flags) -> None:
  """Edit images."""
  from ddpm_jax import runs
  from ddpm_jax.names import choose
  from ddpm_jax.runs import edit_methods

  folder = flags.folder_of(given)
  if given.strength is not None and given.task != "img2img":
    raise ValueError(f"Got --strength for the task {given.task!r}; expected it with --task=img2img only.")
  methods = edit_methods.TASKS.get(given.task or "", {})
  # By its name alone a method has the arguments that suit the task.
  short = {} if given.method is None else {"method": methods.get(given.method, given.method)}
  keys = flags.keys(given, **short)
  task = choose(given.task or "", tuple(edit_methods.TASKS), "--task")
  edit = runs.Edit(task, given.input, given.mask or "", given.num_samples)
  steering = flags.steering(given)
  # Flags first: no device is taken for a mistake in them.
  starting.join_processes(given)
  starting.start_devices(given)
  experiment, model = flags.experiment_of(given, keys)
  if task in ("invert", "interpolate") and not any(key.split(".")[0] == "sampler" for key in keys):
    experiment = runs.with_reversible_sampler(experiment)
  runs.run_edit(
    experiment,
    folder,
    edit,
    seed=given.seed,
    choice=flags.choice(given),
    steering=steering,
    scale=given.guidance_scale,
    model=model,
  )
