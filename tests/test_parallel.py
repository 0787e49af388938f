"""Test that a step gives equal results on one device, with jit and pmap on eight devices, and with accumulation."""

import functools
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import losses, predictions, processes, training
from ddpm_jax.devices import costs, parallel, startup
from ddpm_jax.networks.layers import drop
from ddpm_jax.runs import stepping
from ddpm_jax.training import optim
from tests import objectives
from tests.parameters import use_dense
from tests.recipes import experiment_of, tiny_config

STEPS, BATCH = 5, 16


@pytest.fixture(scope="module")
def config():
  config = tiny_config()
  config.model.network.dropout = 0.1
  return config


@pytest.fixture(scope="module")
def batches():
  rng = np.random.default_rng(0)
  return [
    {"image": rng.uniform(-1, 1, (BATCH, 8, 8, 1)).astype(np.float32), "classes": np.zeros(BATCH, np.int32)}
    for _ in range(STEPS)
  ]


def initial(experiment):
  optimizer = stepping.optimizer(experiment)
  return training.init_state(jax.random.key(0), experiment.model.init, optimizer, experiment.objective)


def compiled_step(config, mesh, accumulate=1):
  experiment = experiment_of(config).replace(training__accumulate=accumulate)
  shapes = jax.eval_shape(lambda: initial(experiment))
  template = parallel.abstract(shapes, parallel.state_shardings(mesh, shapes))
  batch = stepping.batch_shapes(experiment, BATCH)
  step = parallel.jit_step(stepping.step(experiment, mesh), mesh, shapes).lower(template, batch).compile()
  start = jax.jit(lambda: initial(experiment), out_shardings=jax.tree.map(lambda leaf: leaf.sharding, template))
  return step, start


def train_with_jit(config, batches, mesh, accumulate=1):
  step, start = compiled_step(config, mesh, accumulate)
  state, losses = start(), []
  for batch in batches:
    state, metrics = step(state, parallel.put_batch(mesh, batch, BATCH))
    losses.append(float(metrics["loss"]))
  return state, losses, step


@pytest.fixture(scope="module")
def unet_on_one_device(config, batches):
  return train_with_jit(config, batches, parallel.make_mesh(devices=jax.devices()[:1]))


def assert_same_run(actual, expected):
  np.testing.assert_allclose(actual[1], expected[1], rtol=2e-5)
  leaves = (jax.tree.leaves(run[0]._replace(key=None)) for run in (actual, expected))
  for a, b in zip(*leaves, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)


@pytest.fixture(scope="module")
def dense_on_one_device(config, batches):
  with pytest.MonkeyPatch.context() as patch:
    use_dense(patch)
    return train_with_jit(config, batches, parallel.make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(params=["dense", pytest.param("unet", marks=pytest.mark.slow)])
def on_one_device(request, monkeypatch):
  """Return a one-device run of the dense network or of the U-Net.

  With "dense", this fixture also makes the test use the dense network.
  """
  if request.param == "unet":
    return request.getfixturevalue("unet_on_one_device")
  use_dense(monkeypatch)
  return request.getfixturevalue("dense_on_one_device")


@pytest.fixture(scope="module")
def by_data(config, batches):
  return train_with_jit(config, batches, parallel.make_mesh())


@pytest.fixture(scope="module")
def by_fsdp(config, batches):
  return train_with_jit(config, batches, parallel.make_mesh(fsdp=8))


def test_data_parallel_run_matches_one_device(by_data, unet_on_one_device):
  assert len(jax.tree.leaves(by_data[0].params)[0].sharding.device_set) == 8
  assert_same_run(by_data, unet_on_one_device)


def test_fsdp_run_matches_one_device(by_fsdp, unet_on_one_device):
  assert_same_run(by_fsdp, unet_on_one_device)


def test_two_by_four_with_accumulation_matches_one_device(config, batches, on_one_device):
  assert_same_run(train_with_jit(config, batches, parallel.make_mesh(2, 4), accumulate=2), on_one_device)


def test_pmap_run_matches_one_device(config, batches, on_one_device):
  experiment = experiment_of(config)
  step = functools.partial(
    training.train_step,
    objective=experiment.objective,
    encode=functools.partial(stepping.encode, experiment.model),
    optimizer=stepping.optimizer(experiment),
    axis_name=parallel.DATA_AXIS,
  )
  mapped = parallel.pmap_step(step)
  state, losses = parallel.replicate(initial(experiment)), []
  for batch in batches:
    state, metrics = mapped(state, batch)
    losses.append(float(metrics["loss"]))
  for leaf in jax.tree.leaves(state.params):
    np.testing.assert_array_equal(leaf[0], leaf[-1])
  assert_same_run((parallel.unreplicate(state), losses), on_one_device)
  with pytest.raises(ValueError, match="12 on 8"):
    mapped(
      parallel.replicate(initial(experiment)), {"image": jnp.zeros((12, 8, 8, 1)), "classes": jnp.zeros(12, jnp.int32)}
    )


def test_data_parallel_step_reduces_gradients_once(by_data):
  collectives = costs.collectives(by_data[2].as_text())
  parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(by_data[0].params))
  assert set(collectives) == {"all-reduce"}
  # The reductions are for the gradients and the loss, and for the numbers of samples of each noise level.
  assert collectives["all-reduce"].number <= 3
  # Where two branches with biases are added, the biases have equal gradients, and XLA reduces them only once.
  assert 0.98 * parameters <= collectives["all-reduce"].bytes <= parameters + 100


def test_fsdp_step_scatters_each_gradient_once(by_fsdp):
  collectives, state = costs.collectives(by_fsdp[2].as_text()), by_fsdp[0]
  sharded = [leaf.nbytes for leaf in jax.tree.leaves(state.params) if not leaf.sharding.is_fully_replicated]
  replicated = [leaf.nbytes for leaf in jax.tree.leaves(state.params) if leaf.sharding.is_fully_replicated]
  assert set(collectives) == {"all-reduce", "all-gather", "reduce-scatter"}
  assert 0.98 * sum(sharded) <= collectives["reduce-scatter"].bytes <= sum(sharded)
  assert collectives["all-gather"].bytes <= 1.1 * sum(sharded)
  # The step also reduces partial norms of gradients and updates, and the losses for each noise level.
  assert collectives["all-reduce"].bytes <= sum(replicated) + 4 * 4 * len(sharded) + 100


def test_fsdp_divides_the_state(by_fsdp, unet_on_one_device):
  def state_bytes(state):
    device = jax.devices()[0]
    shards = (shard for leaf in jax.tree.leaves(state._replace(key=None)) for shard in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == device)

  assert state_bytes(by_fsdp[0]) <= 1.1 / 8 * state_bytes(unet_on_one_device[0])


def test_the_state_is_donated(config, batches):
  mesh = parallel.make_mesh()
  step, start = compiled_step(config, mesh)
  state = start()
  step(state, parallel.put_batch(mesh, batches[0], BATCH))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_accumulated_gradients_are_exact(batches, x64):
  """The loss has dropout, and times that depend on the full batch. Float64 makes the order of summation irrelevant."""
  process, optimizer = processes.vp(), optim.adam(1e-2)
  generator = np.random.default_rng(0)
  params = {"first": generator.normal(0, 0.2, (64, 8)), "last": generator.normal(0, 0.2, (8, 64))}

  def apply(params, x, time, given, *, train, keys):
    hidden = jnp.tanh(x.reshape(len(x), -1) @ params["first"] + time[:, None])
    return (drop(hidden, 0.5, keys, "hidden") @ params["last"]).reshape(x.shape)

  objective = losses.denoising(apply, process, predictions.EPS, times=losses.low_discrepancy(process))
  state, after = training.init_state(jax.random.key(0), lambda key: params, optimizer, objective), {}
  batch = {"x": batches[0]["image"].astype(np.float64)}
  for accumulate, unroll in ((1, False), (2, True), (8, False)):
    options = {"objective": objective, "optimizer": optimizer, "accumulate": accumulate, "unroll": unroll}
    after[accumulate] = jax.jit(functools.partial(training.train_step, **options))(state, batch)[0].params
  for accumulate in (2, 8):
    for a, b in zip(jax.tree.leaves(after[accumulate]), jax.tree.leaves(after[1]), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)


def full_objective_with_jit(mesh, accumulate=1):
  """Run five steps of `objectives.full_objective` with jit on a mesh."""
  step = objectives.train_step(distribute=parallel.shard_gradient(mesh), accumulate=accumulate, unroll=True)
  shapes, given = jax.eval_shape(objectives.init_state), objectives.frozen()
  state = jax.jit(objectives.init_state, out_shardings=parallel.state_shardings(mesh, shapes))()
  given = jax.device_put(given, parallel.state_shardings(mesh, given))
  compiled, losses = parallel.jit_step(step, mesh, state, given), []
  for batch in objectives.batches(STEPS):
    state, metrics = compiled(state, parallel.put_batch(mesh, batch, objectives.BATCH), given)
    losses.append(float(metrics["loss"]))
  return state, losses, given


@pytest.fixture(scope="module")
def full_objective_on_one_device():
  return full_objective_with_jit(parallel.make_mesh(devices=jax.devices()[:1]))


def assert_same_full_run(actual, expected):
  np.testing.assert_allclose(actual[1], expected[1], rtol=1e-5)
  for a, b in zip(objectives.leaf_values(actual[0]), objectives.leaf_values(expected[0]), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_full_objective_on_two_by_four_matches_one_device(accumulate, full_objective_on_one_device):
  """The objective's memory contains the losses of the full batch, in the order of the samples."""
  run = full_objective_with_jit(parallel.make_mesh(2, 4), accumulate)
  assert_same_full_run(run, full_objective_on_one_device)
  for leaf in (run[0].memory["target"]["first"], run[0].extra["critic"], run[2]["objective"]["last"]):
    assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // 4}


def test_full_objective_with_accumulation_matches_one_step(full_objective_on_one_device):
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  assert_same_full_run(full_objective_with_jit(mesh, accumulate=4), full_objective_on_one_device)


def test_full_objective_with_pmap_matches_one_device(full_objective_on_one_device):
  mapped = parallel.pmap_step(objectives.train_step(axis_name=parallel.DATA_AXIS))
  state, given = map(parallel.replicate, (jax.jit(objectives.init_state)(), objectives.frozen()))
  losses = []
  for batch in objectives.batches(STEPS):
    state, metrics = mapped(state, batch, given)
    losses.append(float(metrics["loss"]))
  for leaf in objectives.leaf_values(state):
    np.testing.assert_array_equal(leaf[0], leaf[-1])
  assert_same_full_run((parallel.unreplicate(state), losses), full_objective_on_one_device)


def test_batch_rows_are_sharded_over_all_devices(batches):
  mesh = parallel.make_mesh(4, 2)
  np.testing.assert_array_equal(parallel.local_rows(mesh, BATCH), np.arange(BATCH))
  put = parallel.put_batch(mesh, batches[0], BATCH)
  np.testing.assert_array_equal(put["image"], batches[0]["image"])
  assert {shard.data.shape[0] for shard in put["image"].addressable_shards} == {2}


def test_invalid_sizes_are_errors():
  with pytest.raises(ValueError, match="batch size of 12 on 8 devices.*8 or 16"):
    parallel.check_batch(12, 8)
  with pytest.raises(ValueError, match="batch size of 0"):
    parallel.check_batch(0, 8)
  with pytest.raises(ValueError, match=r"data=3 by fsdp=2 on 8 device.*8 x 1, 4 x 2, 2 x 4, 1 x 8"):
    parallel.make_mesh(3, 2)
  with pytest.raises(ValueError, match="fsdp=16 on 8"):
    parallel.make_mesh(fsdp=16)
  with pytest.raises(ValueError, match="accumulate=3 with a batch of 16 on 8.*2 samples each"):
    training.check_accumulate(16, 8, 3)


def test_the_number_of_processes_is_read_from_the_cluster_environment():
  assert startup.environment_processes({}) == 1
  assert startup.environment_processes({"OMPI_COMM_WORLD_SIZE": "4"}) == 4
  assert startup.environment_processes({"SLURM_STEP_NUM_TASKS": "2"}) == 2
  assert startup.environment_processes({"TPU_WORKER_HOSTNAMES": "a,b,c"}) == 3
  assert startup.environment_processes({"TPU_WORKER_HOSTNAMES": "localhost"}) == 1


def test_invalid_process_flags_are_errors():
  with pytest.raises(ValueError, match="expected all three"):
    startup.connect("host:1", 2)
  for address in ("host", "host:0", "host:65536", "host:99999", ":1"):
    with pytest.raises(ValueError, match="expected host:port with a port from 1 to 65535"):
      startup.connect(address, 2, 0)
  with pytest.raises(ValueError, match="an id from 0 to the number of processes minus 1"):
    startup.connect("host:1", 2, 2)


def test_cpu_convolutions_do_not_use_ynnpack_and_differ_by_rounding_only():
  keys = jax.random.split(jax.random.key(0), 3)
  x, cotangent = (jax.random.normal(key, (4, 16, 16, 32)) for key in keys[:2])
  kernel = jax.random.normal(keys[2], (3, 3, 32, 32)) / 17

  def gradient(x, kernel):
    def loss(x, kernel):
      return jnp.vdot(
        jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")), cotangent
      )

    return jax.value_and_grad(loss, (0, 1))(x, kernel)

  options = parallel.compiler_options()
  ours, plain = jax.jit(gradient, compiler_options=options), jax.jit(gradient)
  for a, b in zip(jax.tree.leaves(ours(x, kernel)), jax.tree.leaves(plain(x, kernel)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
  programs = [function.lower(x, kernel).compile().as_text() for function in (ours, plain)]
  assert options
  assert ["__ynn_fusion" in program for program in programs] == [False, True]


def test_other_platforms_have_no_compiler_options():
  devices = np.array([types.SimpleNamespace(platform="tpu")])
  for once in (False, True):
    assert parallel.compiler_options(types.SimpleNamespace(devices=devices), once=once) == {}


def test_options_for_a_single_run_do_not_change_results():
  def normal(key):
    return jax.random.normal(key, (64, 64))

  options = parallel.compiler_options(once=True)
  assert set(options) > set(parallel.compiler_options())
  np.testing.assert_array_equal(jax.jit(normal, compiler_options=options)(jax.random.key(0)), normal(jax.random.key(0)))


@pytest.mark.parametrize("has_tpu", [False, True])
def test_output_of_libtpu_is_suppressed_without_a_tpu(has_tpu, monkeypatch, capfd):
  def devices():
    for stream in (1, 2):
      os.write(stream, b"E0000 no TPU\n")

  monkeypatch.setattr(jax, "devices", devices)
  monkeypatch.setattr(startup, "_has_tpu", lambda: has_tpu)
  startup.start_devices()
  os.write(2, b"after\n")
  out, err = capfd.readouterr()
  assert (out + err).count("no TPU") == (2 if has_tpu else 0)
  assert err.endswith("after\n")
