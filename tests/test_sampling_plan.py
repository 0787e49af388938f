"""Test plans of sampling: small programs with known costs, and one real compilation for TPUs."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import spec
from ddpm_jax.devices import costs, hardware, plan, sampling_plan
from ddpm_jax.models.guided import Parameters
from ddpm_jax.runs import programs
from ddpm_jax.runs.sampling_plan import ModelChoice, run_sampling_plan
from tests.commands import RECIPE, assert_refused, call
from tests.conftest import ROOT
from tests.recipes import experiment_of, tiny_config, tree_of
from tests.test_interop_autoencoder import write_pipeline

STEPS, SIZE = 4, 16
CHIP = hardware.Chip("Abacus", {"float32": 1e9, "bfloat16": 2e9}, memory=1e6, bandwidth=1e8, interconnect=1e7)


def config_of(fsdp=1, scale=1.0, sampler="ddim"):
  config = tiny_config()
  config.model.codec = spec(f"{ROOT / 'tests' / 'user_components.py'}:tiny_autoencoder")
  config.model.conditions.classes = spec("conditions.classes", number=3, dropout=0.1)
  config.sampling.update({"num_steps": STEPS, "batch_size": SIZE})
  config.sampling.clip = None
  config.sampler, config.parallel.fsdp = spec(f"sampling.{sampler}"), fsdp
  if scale != 1:
    config.guidance = spec("guidance.classifier_free", scale=scale)
  return config


def planned(num_samples=None, **options):
  """Plan sampling on the eight simulated devices."""
  model = ModelChoice(tree_of(config_of(**options)))
  return run_sampling_plan(model, topology_name=None, num_devices=None, num_samples=num_samples)


@pytest.fixture(scope="module")
def dense_plan(dense_module):
  return planned()


def sizes():
  """Return the numbers of parameters of the network and of the codec."""
  model = experiment_of(config_of()).model
  params = jax.eval_shape(model.init, jax.random.key(0))
  return [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, model.load_frozen())]


def test_a_plan_counts_parameters_and_flops(dense_plan):
  p, (parameters, frozen) = dense_plan, sizes()
  assert (p.num_devices, p.batch_size, p.steps, p.calls) == (8, SIZE, STEPS, STEPS)
  assert (p.parameters, p.frozen_parameters) == (parameters, frozen)
  assert (p.parameter_bytes, p.frozen_bytes) == (4 * parameters, 4 * frozen)
  assert p.argument_bytes >= p.parameter_bytes + p.frozen_bytes
  assert p.total_bytes == p.argument_bytes + p.output_bytes + p.temporary_bytes + p.code_bytes
  # The dense network has a matrix of 32 by 32 for 32 values of x, and one of 2 by 32 for the time.
  assert p.step_flops == 2 * 32 * 32 + 2 * 2 * 32
  assert p.encode_flops == 0
  model = experiment_of(config_of()).model
  decode = jax.make_jaxpr(model.decode)(jnp.zeros((1, *model.shape)), model.load_frozen())
  assert p.decode_flops == costs.matmul_flops(decode) > 0
  # The chip is a CPU, which has no known peaks.
  assert (p.fits, p.step_seconds, p.image_seconds) == (None, None, None)
  assert "no known peaks" in sampling_plan.table(p)


def test_guidance_doubles_the_flops_of_a_step(dense_plan):
  guided = planned(scale=3.0)
  assert guided.step_flops == 2 * dense_plan.step_flops
  assert (guided.decode_flops, guided.calls) == (dense_plan.decode_flops, STEPS)


def test_samplers_differ_in_network_calls(dense_plan):
  heun = planned(num_samples=3, sampler="heun")
  # The batch is a multiple of the eight devices.
  assert (heun.batch_size, heun.calls) == (8, 2 * STEPS - 1)
  assert heun.step_flops >= (2 - 1 / STEPS) * dense_plan.step_flops
  adaptive = planned(sampler="ode")
  assert (adaptive.calls, adaptive.image_seconds) == (None, None)
  assert "as many network calls as the data need" in sampling_plan.table(adaptive)


def test_fsdp_divides_the_parameters(dense_plan):
  p = planned(fsdp=4)
  full = dense_plan
  # All axes of the dense network are divisible by 4.
  assert p.parameter_bytes == full.parameter_bytes / 4
  assert full.frozen_bytes / 4 <= p.frozen_bytes < full.frozen_bytes
  assert p.argument_bytes < full.argument_bytes
  assert p.step_flops == full.step_flops
  # Each step gathers the parameters.
  none = costs.Collective(0, 0.0, 0.0)
  gathered, samples = (one.collectives.get("all-gather", none).bytes for one in (p, full))
  assert gathered - samples >= STEPS * full.parameter_bytes


def matrices(size=64, steps=4, batch=32):
  """Return a traced program of one matrix product for each step, and the shape of the matrix."""

  def program(weights, x):
    return jax.lax.scan(lambda x, _: (x @ weights, None), x, length=steps)[0]

  weights = jax.ShapeDtypeStruct((size, size), jnp.float32)
  return jax.jit(program).trace(weights, jax.ShapeDtypeStruct((batch, size), jnp.float32)), weights


def test_times_follow_the_chip_s_roofline():
  (traced, weights), frozen = matrices(), {"codec": jax.ShapeDtypeStruct((100, 10), jnp.float32)}
  devices, work = (
    jax.devices()[:1],
    sampling_plan.Work(32, 4, 4, encode_flops=0, call_flops=2 * 32 * 64 * 64, decode_flops=0),
  )
  options = {"params": weights, "frozen": frozen, "codec": frozen["codec"], "devices": devices, "dtype": "float32"}
  compiled = plan.compile_step(traced, devices)
  p = sampling_plan.make_plan(traced, compiled, work, chip=CHIP, **options)
  flops = 2 * 64 * 64
  assert p.step_flops == flops
  assert p.compute_seconds == pytest.approx(4 * 32 * flops / 1e9)
  assert p.memory_seconds == pytest.approx((4 * 64 * 64 + 1000) * 4 / 1e8)
  assert p.communication_seconds == 0
  assert p.step_seconds == pytest.approx(max(32 * flops / 1e9, 64 * 64 * 4 / 1e8))
  assert p.decode_seconds == pytest.approx(1000 * 4 / 1e8)
  assert p.batch_seconds == max(p.compute_seconds, p.memory_seconds)
  assert p.image_seconds == p.batch_seconds / 32
  assert p.fits is True
  text = sampling_plan.table(p)
  for part in ("Abacus", "4 network calls", "8.19 kFLOP", "16.4 kB", "an image at least"):
    assert part in text, text
  assert max(map(len, text.splitlines())) <= 160
  small = sampling_plan.make_plan(traced, compiled, work, chip=CHIP._replace(memory=30e3), **options)
  assert small.fits is False
  assert "Does not fit: split the parameters over more devices (--fsdp)" in sampling_plan.table(small)
  rejected = sampling_plan.make_plan(traced, plan.OutOfMemory(2e6, 1e6, "E1000"), work, chip=CHIP, **options)
  assert (rejected.fits, rejected.total_bytes, rejected.collectives) == (False, 2e6, None)
  assert "Compiler: E1000" in sampling_plan.table(rejected)


def test_the_planned_program_is_the_one_that_samples(dense_plan):
  """Sampling with real parameters makes as many network calls as a plan that knows only their shapes."""
  experiment = experiment_of(config_of())
  generate = programs.generate(experiment, programs.sampling_mesh(experiment))
  params = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(experiment.model.init, jax.random.key(0))
  )
  batch = {"classes": np.zeros(SIZE, np.int32)}
  data, nfe = generate(Parameters(params, experiment.model.load_frozen()), 0, 0, batch)
  assert data.shape == (SIZE, *experiment.model.data_shape)
  assert set(np.asarray(nfe)) == {dense_plan.calls}


def test_the_command_plans_a_recipe_for_a_tpu_without_a_tpu():
  arguments = ["--mode=plan", "--task=sample", "--num_samples=8", "--topology=v5e:2x2", "--fsdp=4"]
  code, output = call(RECIPE, *arguments, "--config.model.network.channels=32")
  assert code == 0, output
  for text in ("4 x TPU v5e", "all-gather", "network calls", "fits", "an image at least"):
    assert text in output
  assert "yes" in output


def test_the_command_plans_a_folder_without_weights(tmp_path):
  write_pipeline(tmp_path / "model")
  for file in (tmp_path / "model").rglob("*.safetensors"):
    file.unlink()
  code, output = call("--mode=plan", f"--pretrained={tmp_path / 'model'}", "--devices=2", "--num_samples=4")
  assert code == 0, output
  config = json.loads((tmp_path / "model" / "vqvae" / "config.json").read_text())
  assert config["latent_channels"] == 4
  for text in ("2 x cpu", "batches of 4", "FLOPs to decode"):
    assert text in output
  shutil.rmtree(tmp_path / "model" / "vqvae")
  assert_refused(*call("--mode=plan", f"--pretrained={tmp_path / 'model'}", "--devices=2"), "which lacks vqvae")
