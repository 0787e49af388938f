"""Test sampling with parameters that are sharded over eight simulated devices."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import interop
from ddpm_jax.config import spec
from ddpm_jax.devices import costs, parallel, plan
from ddpm_jax.models import codecs
from ddpm_jax.models.guided import Guides, Parameters
from ddpm_jax.runs import edit_methods, model, programs
from ddpm_jax.runs.steering import Guided
from tests import test_interop_sd3_pipelines as sd3
from tests import text_pipelines
from tests.commands import DENSE, call
from tests.conftest import ROOT
from tests.parameters import random_params, write_run
from tests.recipes import experiment_of, tiny_config
from tests.test_interop_autoencoder import write_pipeline

pytestmark = pytest.mark.usefixtures("dense_module")
STEPS, SIZE = 3, 8
CLASSES = np.arange(SIZE, dtype=np.int32) % 3


def config_of(**parts):
  """Return the config of a latent model with classes, whose codec has frozen parameters."""
  config = tiny_config()
  config.model.conditions.classes = spec("conditions.classes", number=3, dropout=0.1)
  config.model.codec = spec(f"{ROOT / 'tests' / 'user_components.py'}:tiny_autoencoder")
  config.sampling.update({"num_steps": STEPS, "batch_size": SIZE})
  config.sampling.clip = None
  config.guidance = parts.get("guidance", spec("guidance.classifier_free", scale=2.0))
  config.sampler = parts.get("sampler", spec("sampling.ddim"))
  return config


def one_copy_each():
  return parallel.make_mesh()


def sharded():
  """Return a mesh that splits each of two copies of the parameters over four devices."""
  return parallel.make_mesh(2, 4)


def put(mesh, tree):
  return jax.device_put(tree, parallel.state_shardings(mesh, tree))


def bytes_of(tree):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def split_bytes(tree):
  """Return the number of bytes in sharded leaves."""
  axes = parallel.split_axes(sharded(), tree)
  leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(axes), strict=True)
  return sum(leaf.size * leaf.dtype.itemsize for leaf, axis in leaves if axis >= 0)


@pytest.fixture(scope="module")
def parameters():
  """Return random parameters of the model, and of a weaker model that guides it."""
  config = config_of()
  rng = np.random.default_rng(2)
  # The last layer of the autoencoder starts at zero.
  frozen = jax.tree.map(
    lambda leaf: leaf + np.float32(0.2) * rng.standard_normal(leaf.shape, np.float32),
    jax.device_get(experiment_of(config).model.load_frozen()),
  )
  return Parameters(random_params(config), frozen, {"weak": (random_params(config, seed=1), frozen)})


@pytest.mark.parametrize("parts", ["classifier_free", "weak", "ode"])
def test_sharded_parameters_give_the_same_samples(parts, parameters):
  guides = Guides()
  if parts == "weak":
    config, guides = (
      config_of(guidance=spec("guidance.autoguidance", scale=2.0)),
      Guides(weak=experiment_of(config_of()).model),
    )
  else:
    parameters = parameters._replace(guides={})
    config = config_of(**({"sampler": spec("sampling.ode", rtol=1e-3, atol=1e-3)} if parts == "ode" else {}))
  experiment, results = experiment_of(config), []
  for mesh in (one_copy_each(), sharded()):
    placed = put(mesh, parameters)
    generate = programs.generate(experiment, mesh, guides)
    samples, _ = generate(placed, 1, 0, {"classes": CLASSES})
    results.append(np.asarray(samples))
  assert np.std(results[0]) > 0.01
  np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-5)


def test_each_network_call_gathers_its_own_parameters(parameters):
  experiment, parameters = experiment_of(config_of()), parameters._replace(guides={})
  gathered = []
  for mesh in (one_copy_each(), sharded()):
    shapes = parallel.abstract(parameters, parallel.state_shardings(mesh, parameters))
    program = programs.generate(experiment, mesh).trace(shapes, np.uint32(0), np.int32(0), {"classes": CLASSES})
    found = costs.collectives(program.lower().compile().as_text())
    gathered.append(found["all-gather"].bytes)
  # On both meshes, the samples are gathered too. The compiler leaves out parameters of the encoder.
  each_step, samples = STEPS * split_bytes(parameters.params), SIZE * 8 * 8 * 4
  assert each_step < gathered[1] - gathered[0] <= each_step + split_bytes(parameters.frozen) + 2 * samples


def test_edits_work_with_sharded_parameters(parameters):
  """One edit differentiates the denoiser of a pixel model, and the other edit encodes images with a latent model."""
  image = np.random.default_rng(0).uniform(-1, 1, (SIZE, 8, 8, 1)).astype(np.float32)
  pixels = config_of()
  pixels.model.codec, pixels.editing.method = spec("codecs.pixels"), spec("editing.dps")
  batches = {"inpaint": {"keep": np.ones((SIZE, 8, 8, 1), bool) & (np.arange(8) < 4)[:, None, None]}, "img2img": {}}
  for task, batch in batches.items():
    config = pixels if task == "inpaint" else config_of()
    experiment, results = experiment_of(config), []
    values = parameters._replace(guides={}) if task == "img2img" else Parameters(random_params(pixels))
    for mesh in (one_copy_each(), sharded()):
      guided = Guided(experiment, Guides(), dict, {})
      edit = edit_methods.compile_edit(guided, mesh, task, 1)
      output = edit(put(mesh, values), 1, 0, {"image": image, "classes": CLASSES, **batch})["output"]
      results.append(np.asarray(output))
    np.testing.assert_allclose(*results, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Write an untrained run of the config that the recipe `DENSE` returns."""
  folder, config = tmp_path_factory.mktemp("run"), tiny_config()
  write_run(config, folder, averages_seed=1)
  return folder


def test_a_checkpoint_is_restored_into_shards(run):
  config = tiny_config()
  experiment = experiment_of(config)
  full, parts = (
    model.load_weights(experiment, run, parallel.make_mesh(fsdp=fsdp), model.WeightsChoice(), quiet=True).parameters
    for fsdp in (1, 8)
  )
  for leaf, expected in zip(jax.tree.leaves(parts.params), jax.tree.leaves(full.params), strict=True):
    assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // 8}
    np.testing.assert_array_equal(leaf, expected)
  assert plan.state_bytes(parts) == plan.state_bytes(full) / 8


def sample_with(folder, name, *arguments):
  """Run a command, and return the array that it saves in the subfolder `name`."""
  code, output = call(*arguments, f"--workdir={folder}", devices=8)
  assert code == 0, output
  path = max((folder / name).glob("*.npz"), key=lambda one: one.stat().st_mtime_ns)
  with np.load(path) as file:
    return file["samples" if name == "samples" else "output"]


def test_commands_give_the_same_images_with_fsdp(run, tmp_path):
  image = tmp_path / "input.npz"
  np.savez(image, images=np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), dtype=np.uint8))
  commands = {
    "samples": [DENSE, "--mode=sample", "--num_samples=8"],
    "edits": [DENSE, "--mode=edit", "--task=img2img", f"--input={image}"],
  }
  for name, arguments in commands.items():
    full, parts = (sample_with(run, name, *arguments, *fsdp) for fsdp in ((), ("--fsdp=8",)))
    assert np.ptp(full) > 20
    assert np.max(np.abs(full.astype(int) - parts.astype(int))) <= 1
  reports = []
  for arguments in ((), ("--fsdp=4",)):
    code, output = call(DENSE, "--mode=eval", f"--workdir={run}", *arguments, devices=8)
    assert code == 0, output
    reports.append(json.loads((run / "eval.json").read_text()))
    # Otherwise the second command would find the samples of the first one.
    shutil.rmtree(run / "samples")
  full, parts = reports
  assert full["weights_sha256"] == parts["weights_sha256"]
  distances = [report["scores"]["generated"]["frechet_distance"] for report in reports]
  assert distances[1] == pytest.approx(distances[0], rel=1e-3)


def assert_sharded(parts, full):
  """Assert that `parts` and `full` are equal, and that each device stores about an eighth of `parts`."""
  for leaf, expected in zip(jax.tree.leaves(parts), jax.tree.leaves(full), strict=True):
    np.testing.assert_array_equal(np.asarray(leaf), expected)
  stored = {}
  for leaf in jax.tree.leaves(parts):
    for shard in leaf.addressable_shards:
      stored[shard.device] = stored.get(shard.device, 0) + shard.data.nbytes
  assert len(stored) == 8
  # Small arrays whose axes are not divisible by 8 are replicated.
  assert max(stored.values()) < 1.1 / 8 * bytes_of(full)


def test_a_diffusers_folder_is_read_into_shards(tmp_path, monkeypatch):
  write_pipeline(tmp_path)
  loaded, full = interop.diffusers.load(tmp_path)
  frozen = loaded.load_frozen()
  mesh = parallel.make_mesh(fsdp=8)
  put_whole = []
  monkeypatch.setattr(jax, "device_put", lambda *arguments: put_whole.append(arguments))
  _, parts = interop.diffusers.load(tmp_path, mesh=mesh)
  assert not put_whole, "a tensor was put on a device as a whole"
  monkeypatch.undo()
  assert_sharded(parts, full)
  frozen_parts = loaded.load_frozen(mesh)
  assert_sharded(frozen_parts["codec"], frozen["codec"])


def test_a_text_pipeline_is_read_into_shards(tmp_path):
  text_pipelines.make("xl", tmp_path).save_pretrained(tmp_path / "xl")
  loaded, full = interop.diffusers.load(tmp_path / "xl")
  frozen, mesh = loaded.load_frozen(), parallel.make_mesh(fsdp=8)
  assert_sharded(interop.diffusers.load(tmp_path / "xl", mesh=mesh)[1], full)
  frozen_parts = loaded.load_frozen(mesh)
  encoders = [values["conditions"]["text"]["encoders"] for values in (frozen_parts, frozen)]
  assert_sharded(*encoders)
  assert_sharded(frozen_parts["codec"], frozen["codec"])


def test_parameters_of_any_loader_are_sharded():
  mesh = parallel.make_mesh(fsdp=8)
  full = {"kernel": np.arange(64.0, dtype=np.float32).reshape(8, 8), "scale": np.float32(2)}
  for load in (lambda: full, lambda: jax.tree.map(jnp.asarray, full)):
    parts = codecs.load_frozen(load, mesh)
    assert parts["kernel"].addressable_shards[3].data.shape == (8, 1)
    assert parts["scale"].sharding.is_fully_replicated
    np.testing.assert_array_equal(parts["kernel"], full["kernel"])
  loader = codecs.Loader(lambda: 1 / 0, lambda: None, functools.partial(put, tree=full))
  np.testing.assert_array_equal(codecs.load_frozen(loader, mesh)["kernel"], full["kernel"])


def test_a_pretrained_model_samples_the_same_with_fsdp(tmp_path):
  """This command uses the real U-Net, because `DENSE` is not among its arguments."""
  write_pipeline(tmp_path / "model")
  arguments = ["--mode=sample", f"--pretrained={tmp_path / 'model'}", "--num_samples=8", "--num_steps=2"]
  full, parts = (sample_with(tmp_path, "samples", *arguments, *fsdp) for fsdp in ((), ("--fsdp=8",)))
  assert np.ptp(full) > 20
  assert np.max(np.abs(full.astype(int) - parts.astype(int))) <= 1


def test_stable_diffusion_3_5_samples_the_same_with_fsdp(tmp_path):
  sd3.make("3.5", sd3.make_tokenizers(tmp_path)).save_pretrained(tmp_path / "model")
  _, full = interop.diffusers.load(tmp_path / "model")
  assert_sharded(interop.diffusers.load(tmp_path / "model", mesh=parallel.make_mesh(fsdp=8))[1], full)
  arguments = ["--mode=sample", f"--pretrained={tmp_path / 'model'}", "--prompt=a red fox", "--num_samples=8"]
  arguments += ["--num_steps=2", "--guidance_scale=3"]
  full, parts = (sample_with(tmp_path, "samples", *arguments, *fsdp) for fsdp in ((), ("--fsdp=8",)))
  assert np.ptp(full) > 20
  assert np.max(np.abs(full.astype(int) - parts.astype(int))) <= 1
