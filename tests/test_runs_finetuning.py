"""Train a small text pipeline on captioned images, from its folder to a folder that diffusers opens."""

import gc
import json
import weakref

import diffusers
import jax
import numpy as np
import pytest
import torch
from PIL import Image

import ddpm_jax
from ddpm_jax import config as configs
from ddpm_jax import data, interop, models, runs
from ddpm_jax.config import recipes
from ddpm_jax.devices import plan
from ddpm_jax.models import inputs
from ddpm_jax.runs import plan as run_plans
from ddpm_jax.runs import pretrained, reading, stepping, training
from ddpm_jax.runs import sampling_plan as run_sampling_plan
from tests import text_pipelines
from tests.text_pipelines import FACTOR, SIZE, as_torch, noise

pytestmark = pytest.mark.usefixtures("on_one_device", "unscored")

CAPTIONS = ("a red fox", "a bear in snow", "")
RATE, STEPS = 1e-3, 2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """Return a folder with a pipeline and captioned images."""
  root = tmp_path_factory.mktemp("finetune")
  (root / "tokenizers").mkdir()
  text_pipelines.make("sd1", root / "tokenizers").save_pretrained(root / "pipeline")
  write_images(root / "images")
  return root


def write_images(folder):
  """Write 12 images with captions."""
  folder.mkdir()
  rng = np.random.default_rng(0)
  lines = [{"file_name": f"{index:02}.png", "text": CAPTIONS[index % 3]} for index in range(12)]
  for line in lines:
    Image.fromarray(rng.integers(0, 256, (40, 36, 3), np.uint8)).save(folder / line["file_name"])
  (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def keys_for(root):
  return {
    "init_from": str(root / "pipeline"),
    "data.source.path": str(root / "images"),
    "data.image_size": SIZE * FACTOR,
    "data.hold_out": 4,
    "model.conditions.text.dropout": 0.3,
    "model.network.remat": "none",
    "training.batch_size": 4,
    "training.steps": STEPS,
    "training.log_every": 1,
    "training.checkpoint_every": STEPS,
    "sampling.num_steps": 2,
    "optimizer.learning_rate": RATE,
    "optimizer.warmup_steps": 0,
    "evaluation.num_samples": 4,
    "evaluation.k": 2,
  }


def flags_for(root):
  return ["--config=configs/sd15_finetune.py", *(f"--config.{name}={value}" for name, value in keys_for(root).items())]


def tree_for(root, **changes):
  keys = keys_for(root) | {name.replace("__", "."): value for name, value in changes.items()}
  return configs.read("configs/sd15_finetune.py", {name: str(value) for name, value in keys.items()})


def losses_of(folder):
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return [line["loss"] for line in lines if "loss" in line]


def largest_change(tree, other):
  return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), tree, other)))


def state_of(module):
  return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


@pytest.fixture
def checks_memory(monkeypatch):
  """Check that the pretrained parameters are freed before training starts."""
  load, train, started = pretrained.load_init_from, training._Trainer.train, []

  def record(tree, **options):
    tree, start = load(tree, **options)
    started.extend(weakref.ref(leaf) for leaf in jax.tree.leaves(start.params))
    return tree, start

  def check(trainer, *arguments):
    gc.collect()
    assert started
    assert not any(leaf() is not None for leaf in started)
    return train(trainer, *arguments)

  monkeypatch.setattr(pretrained, "load_init_from", record)
  monkeypatch.setattr(training._Trainer, "train", check)


@pytest.mark.usefixtures("checks_memory")
def test_a_pipeline_is_fine_tuned_sampled_and_exported(root, tmp_path, run_command):
  flags, run, exported = flags_for(root), tmp_path / "run", tmp_path / "exported"
  run_command(*flags, f"--workdir={run}")
  model, params, _ = ddpm_jax.load(run)
  assert model.conditions["text"].dropout == 0.3
  _, start = interop.diffusers.load(root / "pipeline")
  # Each step of Adam changes a parameter by at most about the learning rate.
  assert 0 < largest_change(params, start) < 1.1 * STEPS * RATE
  run_command("--mode=sample", f"--workdir={run}", "--prompt=a red fox", "--num_samples=2")
  pictures = [Image.open(path) for path in sorted(run.glob("samples/*/*.png"))]
  assert [picture.info["prompt"] for picture in pictures] == ["a red fox"] * 2
  run_command("--mode=export", f"--workdir={run}", f"--output={exported}")
  peer, before = (diffusers.StableDiffusionPipeline.from_pretrained(path) for path in (exported, root / "pipeline"))
  # Training in bfloat16 does not round the frozen parts of the export.
  for part in ("vae", "text_encoder"):
    jax.tree.map(np.testing.assert_array_equal, state_of(getattr(peer, part)), state_of(getattr(before, part)))
  x, states = noise(), np.random.default_rng(1).standard_normal((2, 77, 24)).astype(np.float32)
  with torch.no_grad():
    theirs = peer.unet(as_torch(x), 500, torch.tensor(states)).sample.numpy()
  apply = jax.jit(interop.diffusers.read(exported).network.apply)
  ours = apply(params, x, np.full(2, 500.0), {"text": states})
  np.testing.assert_allclose(np.moveaxis(theirs, 1, -1), ours, atol=1e-4 * np.abs(theirs).max())


def test_a_plan_of_a_fine_tuning_is_that_of_the_pipeline(root, monkeypatch, tmp_path):
  refusal = plan.OutOfMemory(1e6, None, "not compiled")
  monkeypatch.setattr(plan, "compile_step", lambda *_: refusal)
  devices = {"topology_name": None, "num_devices": 1}
  planned, model = runs.run_plan(tree_for(root), **devices), interop.diffusers.read(root / "pipeline")
  expected = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))
  assert planned.parameters == sum(leaf.size for leaf in expected)
  choice = run_sampling_plan.ModelChoice(tree_for(root))
  assert runs.run_sampling_plan(choice, **devices, num_samples=1).parameters == planned.parameters
  wrong = tree_for(root, data__image_size=2 * SIZE * FACTOR)
  with pytest.raises(ValueError, match=r"with data of \(64, 64, 3\); expected the same shape"):
    runs.run_plan(wrong, **devices)
  wrong, _ = pretrained.load_init_from(wrong, weights=False)
  with pytest.raises(ValueError, match=r"with data of \(64, 64, 3\); expected the same shape"):
    runs.run_prepare(configs.build(wrong), tmp_path / "latents")
  # A run plans its copy of the pipeline's config.
  (tmp_path / "run").mkdir()
  tree, _ = pretrained.load_init_from(tree_for(root), weights=False)
  configs.write(tmp_path / "run", pretrained.copy_config(tree, tmp_path / "run"))
  assert pretrained.has_started(tree, tmp_path / "run")
  assert not pretrained.has_started(tree, tmp_path)
  monkeypatch.setattr(pretrained, "load_init_from", None)
  assert runs.run_plan(configs.read_run(tmp_path / "run"), **devices, folder=tmp_path / "run") == planned


def test_plans_of_cpus_use_plain_kernels(root):
  tree, read = pretrained.replace_model(str(root / "pipeline"), configs.expand({}), recipe=False, weights=False)
  assert read.model.network.module.kernels == "tuned"
  for model in (read.model, None):
    assert run_plans.build(tree, jax.devices(), model).model.network.module.kernels == "plain"


@pytest.fixture(scope="module")
def xl(root):
  """Return the folder of a pipeline with two text encoders, a pooled vector and sizes."""
  text_pipelines.make("xl", root / "tokenizers").save_pretrained(root / "xl")
  return root / "xl"


@pytest.mark.slow
def test_prepared_data_give_the_losses_of_the_images(root, xl, tmp_path, run_command):
  flags = [*flags_for(root), f"--config.init_from={xl}", "--config.model.network.dtype=float32"]
  run_command("--mode=prepare", *flags, f"--output={tmp_path / 'latents'}")
  run_command(*flags, f"--workdir={tmp_path / 'images'}")
  run_command(*flags, f"--workdir={tmp_path / 'run'}", f"--config.data.latents={tmp_path / 'latents'}")
  np.testing.assert_allclose(losses_of(tmp_path / "run"), losses_of(tmp_path / "images"), rtol=1e-4)


def test_sizes_of_xl_are_those_of_each_image_in_training_and_the_default_in_previews(root, xl):
  config = recipes.read("configs/sd15_finetune.py")
  config.init_from = str(xl)
  config.data.source.path = str(root / "images")
  config.data.image_size = SIZE * FACTOR
  tree, _ = pretrained.load_init_from(configs.to_tree(config), weights=False)
  experiment = configs.build(tree)
  train, _ = reading.read_data(experiment)
  batch = next(data.batches(train, 4, seed=0))
  # Images of 40x36 are scaled to 35.6x32, and cropped.
  expected = np.tile([40, 36, (40 - 36) / 2 * 32 / 36, 0, 32, 32], (4, 1)).astype(np.float32)
  known = {"sizes": experiment.model.conditions["sizes"]}
  given = models.conditions.encode(known, {}, jax.random.key(0), batch, train=True)
  np.testing.assert_allclose(given["sizes"], expected, rtol=1e-6)
  assert stepping.batch_shapes(experiment, 4, train)[data.FRAMING].shape == (4, 6)
  shown = inputs.default_inputs(experiment.model.conditions, 2, train)
  np.testing.assert_array_equal(shown["sizes"], [[32, 32, 0, 0, 32, 32]] * 2)
