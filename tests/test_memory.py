"""Test that requests for more memory than the machine has are refused before any allocation."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddpm_jax import interop, metrics, processes, runs, sampling, schedules
from ddpm_jax.devices import hardware, memory, topology
from ddpm_jax.networks import UNet
from ddpm_jax.runs import limits
from tests.commands import DENSE, RECIPE, assert_refused, call
from tests.parameters import write_run
from tests.recipes import experiment_of, tiny_config, tree_of
from tests.test_interop_diffusers import write_pipeline

BYTES = r"at least [\d.e+]+ [GTPEZY]B"


@pytest.mark.parametrize(
  ("count", "text"),
  [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2**40, "1.1 TB"), (4e18, "4 EB"), (4e30, "4e+06 YB")],
)
def test_bytes_are_formatted_with_a_unit(count, text):
  assert memory.format_bytes(count) == text


def test_only_oversized_requests_are_refused():
  memory.check("x", 100, 100, "")
  with pytest.raises(
    ValueError, match=r"Got x, which needs at least 101 B of memory, more than the available 100 B\. Do this\."
  ):
    memory.check("x", 101, 100, "Do this.")
  memory.check("x", memory.MAX_BYTES, None, "")
  with pytest.raises(ValueError, match="more than any machine has"):
    memory.check("x", memory.MAX_BYTES + 1, None, "")


def device(platform, kind="", **stats):
  return types.SimpleNamespace(platform=platform, device_kind=kind, process_index=0, memory_stats=lambda: stats or None)


def test_memory_of_devices_is_reported_or_from_the_table():
  assert memory.device_bytes(jax.devices()) == memory.host_bytes()
  assert memory.device_bytes([device("gpu", "NVIDIA H100 80GB HBM3")] * 4) == 4 * 80e9
  assert memory.device_bytes([device("gpu", "a new one", bytes_limit=5e9)] * 2) == 1e10
  # The limit that the device reports takes precedence over the table.
  assert memory.device_bytes([device("gpu", "NVIDIA H100 80GB HBM3", bytes_limit=85e9)] * 2) == 170e9
  assert memory.device_bytes([device("gpu", "a new one")]) is None


def test_the_largest_tpu_slice_is_within_the_limit():
  chips = topology._MAX_CHIPS * hardware.chip_of("TPU7x").memory * 2  # two devices per chip
  memory.check("x", chips, chips, "")


def test_the_limit_of_a_container_is_respected(tmp_path, monkeypatch):
  total = memory.host_bytes()
  for content, limit in (("1000000\n", 1_000_000), ("max\n", total), ("", total)):
    (tmp_path / "max").write_text(content)
    monkeypatch.setattr(memory, "_LIMIT", tmp_path / "max")
    assert memory.host_bytes() == (limit if content[0:1] == "1" else max(total, memory.host_bytes()))


def test_more_steps_than_float32_can_distinguish_are_refused():
  max_steps = schedules.MAX_STEPS
  assert np.float32(max_steps) - np.float32(max_steps - 1) == 1
  assert np.float32(max_steps + 1) == np.float32(max_steps)
  for make in (schedules.linear, schedules.scaled_linear, schedules.cosine, schedules.sigmoid):
    with pytest.raises(ValueError, match="num_steps=1000000000; expected at most .* tables take at least 48 GB"):
      make(10**9)
  with pytest.raises(ValueError, match="tables take at least"):
    processes.discrete(np.broadcast_to(np.float64(1e-9), (max_steps + 1,)))
  for grid in (sampling.grids.uniform, sampling.grids.quadratic, sampling.grids.log_snr, sampling.grids.karras):
    with pytest.raises(ValueError, match="tables take at least"):
      grid(processes.vp(), 10**9)


NETWORKS = {
  "blocks": ({"blocks": 100_000}, "blocks=100000 at each of 4 levels, .* at least [0-9.]+ GB"),
  "some blocks": ({"blocks": 251}, "at most 1,000 blocks"),
  "channels": ({"channels": 2**30}, f"channels=1073741824 .*{BYTES}"),
  "embedding": ({"embedding_features": 2**30}, BYTES),
  "time": ({"time_features": 2**42}, BYTES),
  "classes": ({"num_classes": 2**50}, BYTES),
  "augmentation": ({"augmentation_features": 2**50}, BYTES),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_oversized_networks_are_refused(name):
  options, message = NETWORKS[name]
  with pytest.raises(ValueError, match=message):
    UNet(**options).check_input((32, 32, 3))


@pytest.mark.parametrize(
  "options",
  [
    {name: -4}
    for name in (
      "channels",
      "blocks",
      "heads",
      "head_channels",
      "groups",
      "time_features",
      "embedding_features",
      "num_classes",
      "augmentation_features",
      "out_channels",
    )
  ]
  + [{name: float("nan")} for name in ("epsilon", "dropout", "frequency_shift")]
  + [{"multipliers": (1, float("nan"))}, {"multipliers": (1, float("inf"))}, {"multipliers": (-1,)}],
  ids=str,
)
def test_negative_or_nan_network_options_are_refused(options):
  (name,) = options
  with pytest.raises(ValueError, match=f"{name}=|{-4:g} features|-512 features"):
    UNet(**options).check_input((32, 32, 3))


def test_the_estimated_network_size_is_a_lower_bound(monkeypatch):
  estimates = []
  monkeypatch.setattr(memory, "check", lambda name, needed, *_: estimates.append(needed))
  for options in ({}, {"num_classes": 5000, "score_sde": True}, {"num_classes": 5000}, {"embedding_features": 4096}):
    network = UNet(channels=32, multipliers=(1, 2), attention_levels=(), blocks=1, **options)
    estimates.clear()
    network.check_input((8, 8, 3))
    given = {"classes": jax.ShapeDtypeStruct((1,), jnp.int32)} if network.num_classes else {}
    params = interop.tensors.abstract_params(network, (8, 8, 3), **given)
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    assert size / 10 < estimates[0] <= size


@pytest.mark.parametrize(("space", "channels"), [((2**40, 2**40), 3), ((2**16, 2**16), 3), ((50_000, 50_000), 1)])
def test_images_with_too_many_pixels_are_refused(space, channels):
  with pytest.raises(ValueError, match=r"takes [\d.e+]+ [GEY]B; expected fewer than 2,147,483,648 positions"):
    UNet(multipliers=(1,), attention_levels=()).check_input((*space, channels))


TRAINING = {
  "training.batch_size": 10**9,
  "data.image_size": 2**15,
  "data.channels": 10**9,
  "data.num_workers": 10**6,
  "data.num_threads": 10**6,
  "sampling.batch_size": 10**9,
  "evaluation.batch_size": 2 * 10**9,
  "evaluation.num_samples": 2 * 10**9,
}


@pytest.mark.parametrize("key", TRAINING)
def test_oversized_training_is_refused(key, tmp_path, monkeypatch):
  # Make the test independent of the machine.
  monkeypatch.setattr(memory, "host_bytes", lambda: 10**9)
  monkeypatch.setattr(memory, "disk_bytes", lambda folder: 10**9)
  config = tiny_config()
  section, name = key.split(".")
  config[section][name] = TRAINING[key]
  with pytest.raises(
    ValueError, match=rf"Got config\..*, which needs {BYTES} of (memory|disk), more than the available 1 GB"
  ):
    runs.run_train(tree_of(config), tmp_path / "work")
  assert not (tmp_path / "work").exists()


def test_the_error_names_the_config_key_of_an_image_with_too_many_pixels(tmp_path):
  config = tiny_config()
  config.data.image_size = 2**20
  with pytest.raises(
    ValueError, match=r"config\.data\.image_size=1048576: Got data of 1048576x1048576 .* takes 4\.4 TB"
  ):
    runs.run_train(tree_of(config), tmp_path / "work")
  assert not (tmp_path / "work").exists()


@pytest.mark.usefixtures("on_one_device")
def test_an_oversized_state_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(memory, "host_bytes", lambda: 10**9)
  config = tiny_config()
  config.model.network.update({"channels": 4096, "groups": 32})
  with pytest.raises(ValueError, match=f"the state of this network and its optimizer, which needs {BYTES}"):
    runs.run_train(tree_of(config), tmp_path / "work")
  assert not (tmp_path / "work").exists()


def test_features_with_an_oversized_covariance_are_refused(monkeypatch):
  monkeypatch.setattr(memory, "host_bytes", lambda: 10**9)
  metrics.check_memory(3 * 64**2, 0, False)
  with pytest.raises(
    ValueError, match=rf"features of 196,608 dimensions .*covariance\), which needs {BYTES}.*features=inception"
  ):
    metrics.check_memory(3 * 256**2, 0, True)
  with pytest.raises(ValueError, match=rf"\(10,000 stored\), which needs {BYTES}"):
    metrics.check_memory(3 * 256**2, 10_000, False)


MESSAGES = {
  "model.process.betas.num_steps": BYTES,
  "training.batch_size": BYTES,
  "data.image_size": "config.data.image_size=2000000000: Got data of 2000000000x2000000000 .* takes 16 EB",
  "model.network.blocks": BYTES,
}


@pytest.mark.parametrize("key", MESSAGES)
def test_the_command_line_prints_one_message(key, tmp_path):
  code, output = call(RECIPE, f"--config.{key}=2000000000", f"--workdir={tmp_path / 'work'}")
  assert_refused(code, output, MESSAGES[key])
  assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("value", [2**31, 2**40])
def test_an_image_size_beyond_int32_is_refused(value, tmp_path):
  code, output = call(DENSE, f"--config.data.image_size={value}", f"--workdir={tmp_path / 'work'}")
  assert_refused(code, output, rf"config.data.image_size={value}; expected at most 2147483647, .* takes [\d.]+ [GT]B")


def test_plans_for_other_machines_are_not_refused(monkeypatch):
  """A plan may have a batch and a state that are too large for this machine."""
  config = tiny_config()
  config.training.batch_size = 2**24
  config.model.network.channels = 1024
  monkeypatch.setattr(memory, "host_bytes", lambda: 1)
  mesh, _, batch, _ = runs.plan._layout(experiment_of(config), jax.devices())
  assert batch["image"].shape[0] == 2**24
  assert mesh.size == 8


@pytest.mark.usefixtures("dense", "on_one_device")
def test_oversized_sampling_and_editing_are_refused(tmp_path, monkeypatch):
  folder, config = tmp_path / "run", tiny_config()
  folder.mkdir()
  write_run(config, folder)
  monkeypatch.setattr(memory, "host_bytes", lambda: 10**9)
  before = sorted(folder.rglob("*"))
  Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
  (tmp_path / "two").mkdir()
  for name in "ab":
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "two" / f"{name}.png")
  with pytest.raises(ValueError, match=f"--num_samples=1000000000000 for images of 8x8x1, which needs {BYTES}"):
    runs.run_sample(experiment_of(config), folder, num_samples=10**12, seed=0, choice=runs.WeightsChoice())
  edit = runs.Edit("img2img", tmp_path / "a.png", num_results=10**12)
  with pytest.raises(ValueError, match=f"--num_samples=1000000000000 for each of 1 inputs .*{BYTES}"):
    runs.run_edit(experiment_of(config), folder, edit, seed=0, choice=runs.WeightsChoice())
  many = tiny_config()
  many.editing.frames = 2**31 - 1
  with pytest.raises(ValueError, match=f"frames=2147483647 .*{BYTES}"):
    runs.run_edit(
      experiment_of(many), folder, runs.Edit("interpolate", tmp_path / "two"), seed=0, choice=runs.WeightsChoice()
    )
  many.evaluation.num_samples = 2**31 - 1
  many.evaluation.batch_size = 2**31 - 1
  with pytest.raises(ValueError, match=f"config.evaluation.batch_size=2147483647 .*{BYTES}"):
    runs.run_eval(experiment_of(many), folder, seed=0, choice=runs.WeightsChoice())
  assert sorted(folder.rglob("*")) == before


FOREIGN = {
  "layers": ("unet/config.json", "layers_per_block", 100_000, "blocks=100000 .*at least"),
  "size": ("unet/config.json", "sample_size", 2**40, "positions"),
  "width and height": ("unet/config.json", "sample_size", [2**20, 2**20], "positions"),
  "channels": ("unet/config.json", "block_out_channels", [2**30, 2**30], BYTES),
  "classes": ("unet/config.json", "num_class_embeds", 2**60, BYTES),
  "embedding": ("unet/config.json", "time_embedding_dim", 2**40, BYTES),
  "steps": ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9, "tables take at least 48 GB"),
}


def change(folder, part, **values):
  file = write_pipeline(folder) / part
  file.write_text(json.dumps(json.loads(file.read_text()) | values))
  return file


@pytest.mark.parametrize("name", FOREIGN)
def test_oversized_foreign_configs_are_refused(name, tmp_path):
  part, key, value, message = FOREIGN[name]
  file = change(tmp_path, part, **{key: value})
  with pytest.raises(ValueError, match=rf"In .*{file.name}: .*{message}"):
    interop.diffusers.load(tmp_path)


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "sigmoid", "scaled_linear"])
def test_too_many_steps_of_a_foreign_schedule_are_refused(schedule, tmp_path):
  change(tmp_path, "scheduler/scheduler_config.json", beta_schedule=schedule, num_train_timesteps=10**9)
  with pytest.raises(ValueError, match="tables take at least 48 GB"):
    interop.diffusers.load(tmp_path)


@pytest.mark.parametrize(("size", "samples"), [(2**15, 10**4), (2**14, 10**6)])
def test_oversized_foreign_images_are_refused(size, samples, tmp_path):
  change(tmp_path / "model", "unet/config.json", sample_size=size)
  code, output = call(
    "--mode=sample", f"--pretrained={tmp_path / 'model'}", f"--workdir={tmp_path / 'work'}", f"--num_samples={samples}"
  )
  assert_refused(code, output, rf"for images of {size}x{size}x3.*, which needs {BYTES}")
  assert not (tmp_path / "work").exists()


def test_the_estimated_memory_of_a_batch_is_a_lower_bound():
  """The estimate is the size of the first layer's output, which is only one of the arrays in the program."""
  config, size = tiny_config(), 6
  experiment = experiment_of(config)
  model, channels = experiment.model, config.model.network.channels
  params = jax.eval_shape(model.init, jax.random.key(0))
  x, time = jax.ShapeDtypeStruct((size, 8, 8, 1), jnp.float32), jax.ShapeDtypeStruct((size,), jnp.float32)
  jaxpr = jax.make_jaxpr(lambda params, x, time: model.network.apply(params, x, time, {}))(params, x, time)
  shapes = {variable.aval.shape for equation in jaxpr.eqns for variable in equation.outvars}
  assert (size, 8, 8, channels) in shapes
  assert limits._features(experiment) == 8 * 8 * channels * 4
