"""Test plans of small steps with known costs on a fictitious chip, and one real compilation for TPUs."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddpm_jax.devices import costs, hardware, parallel, plan
from ddpm_jax.runs import model, stepping
from tests.conftest import ROOT
from tests.recipes import experiment_of, tiny_config

P = PartitionSpec
CHIP = hardware.Chip("Abacus", {"float32": 1e9, "bfloat16": 2e9}, memory=1e6, bandwidth=1e8, interconnect=1e7)
REPLICATED = P()
DEVICE = jax.devices()[:1]
ROWS, COLUMNS, BATCH = 128, 64, 32


def planned(devices, chip=CHIP, spec=REPLICATED, dtype="float32", batch=BATCH):
  """Plan one step of gradient descent on a matrix."""
  mesh = Mesh(np.array(devices), ("d",))

  def step(w, x):
    return w - jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w)

  state_sharding, batch_sharding = NamedSharding(mesh, spec), NamedSharding(mesh, P("d"))
  jitted = jax.jit(step, in_shardings=(state_sharding, batch_sharding), out_shardings=state_sharding, donate_argnums=0)
  state = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32, sharding=state_sharding)
  traced = jitted.trace(state, jax.ShapeDtypeStruct((batch, ROWS), jnp.float32))
  return plan.make_plan(
    traced,
    plan.compile_step(traced, devices),
    params=state,
    state={"params": state},
    batch_size=batch,
    devices=devices,
    dtype=dtype,
    chip=chip,
  )


WEIGHTS = ROWS * COLUMNS * 4


def test_state_bytes_count_one_shard():
  devices = jax.devices()[:8]
  assert planned(devices).state_bytes == WEIGHTS
  assert planned(devices, spec=P("d")).state_bytes == WEIGHTS / 8
  keyed = {"key": jax.eval_shape(lambda: jax.random.key(0)), "step": jax.ShapeDtypeStruct((), jnp.int32)}
  assert plan.state_bytes(keyed) == 8 + 4


def test_flops_and_bytes_of_a_step_on_eight_devices_are_exact():
  p = planned(jax.devices()[:8])
  assert p.parameters == ROWS * COLUMNS
  # One product is forward, and one is backward with respect to the weights.
  assert p.flops_per_image == 2 * 2 * ROWS * COLUMNS
  assert p.flops_per_device == p.flops_per_image * BATCH / 8
  assert p.argument_bytes == WEIGHTS + BATCH / 8 * ROWS * 4
  assert p.total_bytes == p.argument_bytes + p.output_bytes + p.temporary_bytes + p.code_bytes
  assert p.collectives == {"all-reduce": (1, WEIGHTS, 2 * 7 / 8 * WEIGHTS)}


def test_time_bounds_follow_the_chip_s_roofline():
  p = planned(jax.devices()[:8])
  assert p.compute_seconds == pytest.approx(p.flops_per_device / 1e9)
  assert p.communication_seconds == pytest.approx(2 * 7 / 8 * WEIGHTS / 1e7)
  # The donated weights are read and written.
  assert p.memory_seconds == pytest.approx((p.argument_bytes + WEIGHTS + p.output_bytes) / 1e8)
  # The traffic of the compiled program also includes intermediate arrays.
  assert p.traffic_bytes / 1e8 == pytest.approx(p.traffic_seconds)
  assert p.traffic_seconds >= p.memory_seconds
  assert p.step_seconds == max(p.compute_seconds, p.memory_seconds, p.communication_seconds)
  assert p.images_per_second == pytest.approx(BATCH / p.step_seconds)
  assert planned(jax.devices()[:8], dtype=jnp.bfloat16).compute_seconds == pytest.approx(p.compute_seconds / 2)


def test_one_device_has_no_communication():
  p = planned(jax.devices()[:1])
  assert p.collectives == {}
  assert p.communication_seconds == 0
  assert p.flops_per_device == BATCH * p.flops_per_image


def test_an_unknown_chip_has_no_bounds():
  p = planned(jax.devices()[:2], chip=None)
  assert (p.chip, p.fits, p.step_seconds, p.images_per_second) == ("cpu", None, None, None)
  assert p.total_bytes > 0
  assert "no known peaks of 'cpu'" in plan.table(p)
  assert planned(jax.devices()[:1], dtype="float64").compute_seconds is None


def test_plan_reports_whether_a_step_fits():
  p = planned(jax.devices()[:1])
  assert p.fits is True
  assert "fits" in plan.table(p)
  assert "Does not fit" not in plan.table(p)
  small = planned(jax.devices()[:1], chip=CHIP._replace(memory=50e3))
  assert small.fits is False
  assert "Does not fit: split the state over more devices (fsdp)" in plan.table(small)
  # Here activations take most of the memory.
  wide = planned(jax.devices()[:1], chip=CHIP._replace(memory=100e3), batch=512)
  assert wide.fits is False
  assert "Does not fit: compute in bfloat16; recompute" in plan.table(wide)
  # This needs more than JAX's default fraction of a GPU's memory.
  tight = planned(jax.devices()[:1], chip=CHIP._replace(memory=p.total_bytes / 0.8))
  assert tight.fits
  assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in plan.table(tight)


def test_out_of_memory_errors_of_the_compiler_are_parsed():
  class Traced:
    def __init__(self, error):
      self.error = error

    def lower(self):
      raise jax.errors.JaxRuntimeError(self.error)

  refusal = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries"
    " (66.05G) exceeds available HBM (15.75G). HLO module: jit_step.\nSee https://openxla.org"
  )
  answer = plan.compile_step(Traced(refusal), DEVICE)
  assert answer.needed == 66.05 * 2**30
  assert answer.available == 15.75 * 2**30
  assert answer.message.startswith("E1000")
  assert answer.message.endswith("jit_step.")
  other = plan.compile_step(Traced("RESOURCE_EXHAUSTED: Used 31.5G of 800.0M hbm."), DEVICE)
  assert other[:2] == (31.5 * 2**30, 800 * 2**20)
  assert plan.compile_step(Traced("RESOURCE_EXHAUSTED: no."), DEVICE)[:2] == (None, None)
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    plan.compile_step(Traced("INTERNAL: broken"), DEVICE)

  traced = jax.jit(lambda w, x: x @ w).trace(jnp.zeros((8, 4)), jnp.zeros((2, 8)))
  p = plan.make_plan(
    traced, answer, params=(), state=(), batch_size=2, devices=jax.devices()[:1], dtype="float32", chip=CHIP
  )
  assert p.fits is False
  assert p.total_bytes == answer.needed
  assert p.flops_per_image == 2 * 8 * 4
  assert p.step_seconds == p.compute_seconds
  assert p.collectives is None
  assert "66.05G" in plan.table(p)
  assert json.loads(json.dumps(plan.to_json(p)))["fits"] is False


def test_collectives_of_an_unreadable_program_are_unknown():
  class Compiled:
    def __init__(self, compiled):
      self.memory_analysis, self.cost_analysis = compiled.memory_analysis, compiled.cost_analysis

    def as_text(self):
      raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

  traced = jax.jit(lambda w, x: x @ w).trace(jnp.zeros((8, 4)), jnp.zeros((2, 8)))
  compiled = Compiled(plan.compile_step(traced, DEVICE))
  p = plan.make_plan(traced, compiled, params=(), state=(), batch_size=2, devices=DEVICE, dtype="float32", chip=CHIP)
  assert (p.collectives, p.communication_seconds, p.loops) == (None, None, None)
  assert p.step_seconds == p.memory_seconds
  assert "this jaxlib cannot read programs of this libtpu" in plan.table(p)
  assert plan.to_json(p)["collectives"] is None


def test_the_table_has_all_figures():
  text = plan.table(planned(jax.devices()[:8]))
  for part in ("8 x Abacus", "8.19 k", "32.8 kFLOP", "32.8 kB", "all-reduce", "5.73 ms", "images a second"):
    assert part in text, text
  assert max(map(len, text.splitlines())) <= 160


@pytest.mark.parametrize(
  ("amount", "unit", "text"),
  [
    (35.7e6, "", "35.7 M"),
    (999.6e6, "B", "1.00 GB"),
    (123.4e9, "B", "123 GB"),
    (12, "B", "12 B"),
    (0, "B", "0 B"),
    (0.0123, "s", "12.3 ms"),
    (3e-6, "s", "3.00 µs"),
    (0.0, "s", "0.00 µs"),
    (75.0, "s", "75.0 s"),
    (None, "s", "unknown"),
  ],
)
def test_numbers_have_three_digits_and_a_unit(amount, unit, text):
  assert plan.format_number(amount, unit) == text


def test_an_empty_batch_or_no_devices_is_an_error():
  traced = jax.jit(lambda x: x).trace(jnp.zeros(2))
  compiled = plan.compile_step(traced, DEVICE)
  for batch, devices in ((0, jax.devices()), (8, [])):
    with pytest.raises(ValueError, match="at least one image and one device"):
      plan.make_plan(traced, compiled, params=(), state=(), batch_size=batch, devices=devices, dtype="float32")


def test_the_plan_of_a_unet_step_counts_flops_state_and_communication():
  config, size = tiny_config(), 8
  config.model.network.update({"channels": 16, "middle_attention": True})
  experiment, mesh = experiment_of(config), parallel.make_mesh(devices=jax.devices()[:2])
  _, state = model.make_state(experiment, mesh)
  step = parallel.jit_step(stepping.step(experiment, mesh), mesh, state)
  traced = step.trace(state, stepping.batch_shapes(experiment, size))
  flops = costs.matmul_flops(traced.jaxpr)
  # XLA counts the work of one of the two devices, including element-wise operations.
  assert flops / 2 < traced.lower().cost_analysis()["flops"] < 1.2 * flops / 2
  p = plan.make_plan(
    traced,
    plan.compile_step(traced, jax.devices()[:2]),
    params=state.params,
    state=state,
    batch_size=size,
    devices=jax.devices()[:2],
    dtype="float32",
  )
  # The state has parameters, two moments and one average.
  assert 4 * 4 * p.parameters <= p.state_bytes < 4 * 4 * p.parameters + 100
  assert 0.9 * 4 * p.parameters < p.collectives["all-reduce"].bytes <= 4 * p.parameters + 100


def test_a_machine_without_tpus_can_plan_for_tpus(tmp_path):
  code = """
import json
import jax, jax.numpy as jnp
from ddpm_jax.devices import parallel, plan, topology
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
devices = topology.topology_devices("v5e:2x2")
mesh = parallel.make_mesh(devices=devices)
def step(w, x):
  return w - jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w), jnp.sum(x)
for rows in (1024, 1024, 2**20):
  state = jax.ShapeDtypeStruct((rows, 2048), jnp.float32, sharding=parallel.replicated(mesh))
  traced = parallel.jit_step(step, mesh, state).trace(state, jax.ShapeDtypeStruct((8192, rows), jnp.float32))
  jax.clear_caches()
  p = plan.make_plan(
    traced, plan.compile_step(traced, devices), params=state, state=state, batch_size=8192, devices=devices, dtype="float32"
  )
  print(json.dumps(plan.to_json(p)))
"""
  code = code.replace("CACHE", repr(str(tmp_path)))
  run = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True
  )
  small, repeated, large = map(json.loads, run.stdout.splitlines())
  # The repeated plan does not read the program from the compilation cache.
  assert repeated == small
  assert "cache" not in run.stderr
  weights = 1024 * 2048 * 4
  assert (small["chip"], small["num_devices"], small["fits"]) == ("TPU v5e", 4, True)
  assert small["flops_per_image"] == 4 * 1024 * 2048
  assert small["state_bytes"] == weights
  assert small["argument_bytes"] >= weights + 8192 / 4 * 1024 * 4
  assert small["collectives"]["all-reduce"]["bytes"] in (weights, weights + 4)
  assert small["compute_seconds"] == pytest.approx(8192 / 4 * 4 * 1024 * 2048 / 197e12)
  # The weights, the gradients, and each chip's shard of the batch take 8.6 GB each.
  assert large["fits"] is False, large
  assert large["total_bytes"] > 15.75 * 2**30
