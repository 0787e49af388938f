"""Test the command line with small text pipelines of random parameters."""

import functools
import shutil
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from ddpm_jax import interop, randomness, runs
from ddpm_jax.storage import images
from tests import text_pipelines
from tests.test_interop_autoencoder import write_pipeline
from tests.text_pipelines import FACTOR, SIZE

pytestmark = pytest.mark.usefixtures("on_one_device")

SIDE = SIZE * FACTOR
SHORT = "a red fox in snow"


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
  """Return a function that writes a pipeline once, and returns its folder."""

  @functools.cache
  def write(name):
    root = tmp_path_factory.mktemp(name)
    text_pipelines.make(name, root).save_pretrained(root / "pipeline")
    return root / "pipeline"

  return write


def newest(folder):
  """Return the path and the arrays of the newest .npz file."""
  path = max(folder.glob("*.npz"), key=lambda path: path.stat().st_mtime_ns)
  with np.load(path) as arrays:
    return path.with_suffix(""), dict(arrays)


@pytest.fixture
def sample(folder_of, run_command, tmp_path):
  """Return a function that generates pictures from prompts, and returns the pictures."""

  def run(*words, prompts, name="sd1"):
    texts = [f"--prompt={prompt}" for prompt in prompts]
    common = ["--mode=sample", f"--workdir={tmp_path}", f"--pretrained={folder_of(name)}", "--num_steps=2"]
    run_command(*common, *texts, *words)
    return newest(tmp_path / "samples")[1]["samples"]

  return run


def test_prompt_weights_and_long_prompts_are_an_option(sample, tmp_path, capsys):
  options, weights = ("--negative_prompt=blurry", "--guidance_scale=3"), "--prompt_weights"
  # These differ after the 90th token only.
  first, second = ("a red fox " * 30 + end for end in ("at night", "in snow"))
  plain = sample(*options, prompts=[SHORT, SHORT, first])
  np.testing.assert_array_equal(sample(*options, prompts=[SHORT, SHORT, second]), plain)
  assert capsys.readouterr().err.count("has more tokens than fit") == 2
  weighted = sample(*options, weights, prompts=[SHORT, "a (red:1.5) fox in snow", SHORT])
  np.testing.assert_array_equal(weighted[0], plain[0])
  assert (weighted[1] != plain[1]).any()
  path, _ = newest(tmp_path / "samples")
  notes = Image.open(path / "00001.png").info
  assert (notes["prompt"], notes["prompt_weights"]) == ("a (red:1.5) fox in snow", "True")
  assert (notes["model"], notes["dtype"], notes["sampler"]) == ("pipeline", "float32", "plms")
  long = [sample(*options, weights, prompts=[SHORT, SHORT, text]) for text in (first, second)]
  np.testing.assert_array_equal(long[0][:2], long[1][:2])
  assert (long[0][2] != long[1][2]).any()
  assert "more tokens" not in capsys.readouterr().err


def write_pictures(folder, count=2):
  """Write smooth pictures in the size of the models, and return them."""
  folder.mkdir()
  steps = np.linspace(0, 1, SIDE)
  pictures = []
  for index in range(count):
    waves = [np.add.outer(np.sin(3 * steps + index), np.cos(2 * steps * channel)) for channel in range(3)]
    pictures.append(np.round(np.stack(waves, -1) * 50 + 127).astype(np.uint8))
    Image.fromarray(pictures[-1]).save(folder / f"{index}.png")
  return np.stack(pictures)


@pytest.fixture
def edit(folder_of, run_command, tmp_path):
  """Return a function that edits two pictures by a prompt, and returns the arrays that the command saves."""
  pictures = write_pictures(tmp_path / "pictures")

  def run(task, *words, folder=None):
    folder = folder or folder_of("sd1")
    common = ["--mode=edit", f"--workdir={tmp_path}", f"--pretrained={folder}", f"--prompt={SHORT}"]
    run_command(*common, f"--task={task}", f"--input={tmp_path / 'pictures'}", *words)
    return newest(tmp_path / "edits")[1]

  run.pictures = pictures
  return run


def reconstruction(folder, pictures):
  """Encode and decode pictures with the random keys that the command line uses."""
  model = interop.diffusers.read(folder)
  frozen = model.load_frozen()
  keys = randomness.sample_keys(jax.random.fold_in(jax.random.key(0), 2), jnp.arange(len(pictures)))
  x = model.encode(keys, images.from_uint8(pictures), frozen)
  return images.to_uint8(model.decode(x, frozen))


def smooth_copy(folder, target):
  """Copy a pipeline, and make the output of its U-Net small, so that a few steps can follow the probability flow.

  At the largest time, the estimate of the data contains the output multiplied by 15.
  """
  shutil.copytree(folder, target)
  path = target / "unet" / "diffusion_pytorch_model.safetensors"
  tensors = load_file(path)
  save_file({name: 0.01 * value if "conv_out" in name else value for name, value in tensors.items()}, path)
  return target


def test_inversion_returns_to_the_picture(edit, folder_of, tmp_path):
  folder = smooth_copy(folder_of("sd1"), tmp_path / "smooth")
  pictures = edit.pictures
  expected = reconstruction(folder, pictures).astype(float)
  edit, options = functools.partial(edit, folder=folder), ("--guidance_scale=1", "--sampler=ddim")
  errors = []
  for steps in (10, 80):
    arrays = edit("invert", f"--num_steps={steps}", *options)
    errors.append(np.abs(arrays["output"][:, 0] - expected).mean())
    assert arrays["latent"].shape == (2, SIZE, SIZE, 4)
  # DDIM is of order 1.
  assert errors[1] < 1.5
  assert errors[1] < errors[0] / 4
  # Interpolation starts and ends at the reconstructions. It encodes both pictures with the key of the first row.
  ends = np.concatenate([reconstruction(folder, picture[None]) for picture in pictures]).astype(float)
  frames = edit("interpolate", "--num_steps=80", "--config.editing.frames=3", *options)["output"][0, 0]
  assert np.abs(frames[[0, 2]] - ends).mean() < 1.5


def test_img2img_of_full_strength_is_a_sample(edit, sample):
  options = ("--num_steps=3", "--guidance_scale=3")
  weak, full = (edit("img2img", f"--strength={strength}", *options)["output"][:, 0] for strength in (0.4, 1))
  np.testing.assert_array_equal(full, sample(*options, prompts=[SHORT, SHORT]))
  assert (weak != full).any()


@pytest.fixture
def hub(folder_of, monkeypatch):
  """Replace downloads of `owner/name` by a local folder, and return the list that collects their options."""
  import huggingface_hub

  downloads = []

  def snapshot_download(name, **options):
    assert name == "owner/name"
    downloads.append(options)
    return str(folder_of("sd1"))

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  return downloads


def test_plans_count_parameters_in_their_type(folder_of, run_command, monkeypatch):
  plans, run = [], runs.run_sampling_plan
  monkeypatch.setattr(runs, "run_sampling_plan", lambda *args, **options: plans.append(run(*args, **options)))
  run_command("--mode=plan", f"--pretrained={folder_of('sd1')}", "--dtype=bfloat16", "--devices=1", "--num_samples=1")
  (plan,) = plans
  assert plan.parameter_bytes == 2 * plan.parameters
  # The states of the empty prompt and the scale of the latents are float32.
  assert 2 * plan.frozen_parameters < plan.frozen_bytes < 2.02 * plan.frozen_parameters


SECRET = "hf_Secret123"


def test_a_token_reaches_the_hub_and_nothing_else(hub, run_command, tmp_path, capsys):
  words = ["--mode=sample", "--pretrained=owner/name", "--revision=main", f"--prompt={SHORT}", "--num_steps=2"]
  run_command(*words, f"--workdir={tmp_path}", f"--token={SECRET}")
  assert {(options["token"], options["revision"]) for options in hub} == {(SECRET, "main")}
  written = [path for path in tmp_path.rglob("*") if path.is_file()]
  assert any(path.suffix == ".png" for path in written)
  assert all(SECRET.encode() not in path.read_bytes() for path in written)
  output = capsys.readouterr()
  assert SECRET not in output.out + output.err
  # Without the flag, huggingface_hub takes its own default, such as HF_TOKEN.
  hub.clear()
  with pytest.raises(ValueError, match="sides divisible"):
    run_command("--mode=plan", "--pretrained=owner/name", "--size=33x33", "--devices=1")
  assert hub
  assert all("token" not in options for options in hub)


@pytest.mark.parametrize("token", ["", f"{SECRET} ", f"{SECRET}\n", f"é{SECRET}"])
def test_malformed_tokens_are_refused_and_not_shown(token, hub, run_command, tmp_path):
  words = ["--mode=sample", "--pretrained=owner/name", f"--workdir={tmp_path}", "--prompt=a"]
  with pytest.raises(ValueError, match="Got a token for the hub that is empty or has spaces") as error:
    run_command(*words, f"--token={token}")
  assert SECRET not in str(error.value)
  assert not hub


def test_errors_of_the_hub_do_not_show_the_token(run_command, tmp_path, monkeypatch):
  import huggingface_hub

  def fail(name, **options):
    raise OSError(f"illegal header {options['token']}")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
  words = ["--mode=sample", "--pretrained=owner/name", f"--workdir={tmp_path}", "--prompt=a"]
  with pytest.raises(ValueError, match="cannot be downloaded from the hub: OSError") as error:
    run_command(*words, f"--token={SECRET}")
  assert SECRET not in "".join(traceback.format_exception(error.value))


SAMPLE, EDIT = ("--mode=sample", "--num_steps=2"), ("--mode=edit", "--task=img2img")
# The pipeline, the words of the command, and a part of the message.
REFUSED = {
  "size": ("sd1", (*SAMPLE, "--prompt=a", "--size=502x514"), "sides divisible by 4"),
  "no prompt": ("sd1", SAMPLE, "Set --prompt=<value>"),
  "more prompts than samples": (
    "sd1",
    (*SAMPLE, "--prompt=a", "--prompt=b", "--num_samples=1"),
    "Got 2 values of text",
  ),
  "negative prompt without guidance": (
    "sd1",
    (*SAMPLE, "--prompt=a", "--negative_prompt=b", "--guidance_scale=1"),
    "without classifier-free guidance",
  ),
  "text that changes": ("sd1", (*SAMPLE, "--prompt_weights", "--prompt=[cat|dog]"), "change between steps"),
  "large weight": ("sd1", (*SAMPLE, "--prompt_weights", "--prompt=(cat:1000)"), "expected -100 to 100"),
  "inpainting without an image": ("inpaint", (*SAMPLE, "--prompt=a"), "Use --mode=edit --task=inpaint"),
  "instruction without an image": ("instruct", (*SAMPLE, "--prompt=a"), "Use --mode=edit --task=instruct"),
  "edit without a prompt": ("sd1", EDIT, 'Got guidance without --prompt; .* such as --prompt="a red fox"'),
  "edit by another task": ("inpaint", (*EDIT, "--prompt=a"), "Set --task=inpaint"),
  "weights without CLIP": ("ldm", (*SAMPLE, "--prompt_weights"), "for a model without a text encoder of CLIP"),
  "prompts without CLIP": ("ldm", (*SAMPLE, "--prompt=a"), "a model that was trained without text"),
  "single file": ("sd1/unet/config.json", (*SAMPLE, "--prompt=a"), "with interop.single_file.load, and save it"),
  "flags of another plan": (
    "",
    ("--mode=plan", "--config=digits_vp", "--dtype=bfloat16"),
    "Got --dtype with --task=train",
  ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_model_cannot_do_is_refused(name, folder_of, run_command, tmp_path):
  pipeline, words, message = REFUSED[name]
  words = [*words, f"--workdir={tmp_path}"]
  if pipeline == "ldm":
    write_pipeline(tmp_path / "ldm")
    words.append(f"--pretrained={tmp_path / 'ldm'}")
  elif pipeline:
    part, _, rest = pipeline.partition("/")
    words.append(f"--pretrained={folder_of(part) / rest}")
  if "--mode=edit" in words:
    write_pictures(tmp_path / "pictures")
    words.append(f"--input={tmp_path / 'pictures'}")
  with pytest.raises(ValueError, match=message):
    run_command(*words)
