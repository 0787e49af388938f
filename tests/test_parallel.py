"""The same pure step on one device, under jit over meshes of eight, under pmap over eight, and a part at a time."""

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


def under_jit(config, batches, mesh, accumulate=1):
  step, start = compiled_step(config, mesh, accumulate)
  state, losses = start(), []
  for batch in batches:
    state, metrics = step(state, parallel.put_batch(mesh, batch, BATCH))
    losses.append(float(metrics["loss"]))
  return state, losses, step


@pytest.fixture(scope="module")
def alone(config, batches):
  return under_jit(config, batches, parallel.make_mesh(devices=jax.devices()[:1]))


def assert_same_run(got, want):
  np.testing.assert_allclose(got[1], want[1], rtol=2e-5)
  for a, b in zip(jax.tree.leaves(got[0]._replace(key=None)), jax.tree.leaves(want[0]._replace(key=None)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)


@pytest.fixture(scope="module")
def dense_alone(config, batches):
  with pytest.MonkeyPatch.context() as patch:
    use_dense(patch)
    return under_jit(config, batches, parallel.make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(params=["dense", pytest.param("unet", marks=pytest.mark.slow)])
def lone(request, monkeypatch):
  """A run on one device of the simplest network or of the U-Net, which the test has too."""
  if request.param == "unet":
    return request.getfixturevalue("alone")
  use_dense(monkeypatch)
  return request.getfixturevalue("dense_alone")


@pytest.fixture(scope="module")
def by_data(config, batches):
  return under_jit(config, batches, parallel.make_mesh())


@pytest.fixture(scope="module")
def by_fsdp(config, batches):
  return under_jit(config, batches, parallel.make_mesh(fsdp=8))


def test_eight_by_data_give_the_run_of_one(by_data, alone):
  assert len(jax.tree.leaves(by_data[0].params)[0].sharding.device_set) == 8
  assert_same_run(by_data, alone)


def test_eight_by_fsdp_give_the_run_of_one(by_fsdp, alone):
  assert_same_run(by_fsdp, alone)


def test_two_by_four_in_two_parts_give_the_run_of_one(config, batches, lone):
  assert_same_run(under_jit(config, batches, parallel.make_mesh(2, 4), accumulate=2), lone)


def test_pmap_over_eight_devices_gives_the_run_of_one(config, batches, lone):
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
  assert_same_run((parallel.unreplicate(state), losses), lone)
  with pytest.raises(ValueError, match="12 on 8"):
    mapped(
      parallel.replicate(initial(experiment)), {"image": jnp.zeros((12, 8, 8, 1)), "classes": jnp.zeros(12, jnp.int32)}
    )


def test_by_data_gradients_are_reduced_once_and_nothing_is_gathered(by_data):
  found = costs.collectives(by_data[2].as_text())
  parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(by_data[0].params))
  assert set(found) == {"all-reduce"}
  # The gradients with the loss; and the numbers of samples by noise level.
  assert found["all-reduce"].number <= 3
  # Sums of two branches have biases on both, whose gradients are the same and so reduced together.
  assert 0.98 * parameters <= found["all-reduce"].bytes <= parameters + 100


def test_by_fsdp_each_gradient_is_scattered_once(by_fsdp):
  found, state = costs.collectives(by_fsdp[2].as_text()), by_fsdp[0]
  split = [leaf.nbytes for leaf in jax.tree.leaves(state.params) if not leaf.sharding.is_fully_replicated]
  whole = [leaf.nbytes for leaf in jax.tree.leaves(state.params) if leaf.sharding.is_fully_replicated]
  assert set(found) == {"all-reduce", "all-gather", "reduce-scatter"}
  assert 0.98 * sum(split) <= found["reduce-scatter"].bytes <= sum(split)
  assert found["all-gather"].bytes <= 1.1 * sum(split)
  # Besides: what norms of gradients and updates are summed from, and the losses by noise level.
  assert found["all-reduce"].bytes <= sum(whole) + 4 * 4 * len(split) + 100


def test_fsdp_divides_the_state(by_fsdp, alone):
  def held(state):
    device = jax.devices()[0]
    shards = (shard for leaf in jax.tree.leaves(state._replace(key=None)) for shard in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == device)

  assert held(by_fsdp[0]) <= 1.1 / 8 * held(alone[0])


def test_the_state_is_donated(config, batches):
  mesh = parallel.make_mesh()
  step, start = compiled_step(config, mesh)
  state = start()
  step(state, parallel.put_batch(mesh, batches[0], BATCH))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_parts_of_a_batch_give_its_gradient_exactly(batches, x64):
  """In double precision, where order hardly matters: dropout, and times that are spread over the batch as a whole."""
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


def everything_under_jit(mesh, accumulate=1):
  """Five steps of an objective that uses everything."""
  step = objectives.train_step(distribute=parallel.shard_gradient(mesh), accumulate=accumulate, unroll=True)
  shapes, given = jax.eval_shape(objectives.init_state), objectives.frozen()
  state = jax.jit(objectives.init_state, out_shardings=parallel.state_shardings(mesh, shapes))()
  given = jax.device_put(given, parallel.state_shardings(mesh, given))
  compiled, found = parallel.jit_step(step, mesh, state, given), []
  for batch in objectives.batches(STEPS):
    state, metrics = compiled(state, parallel.put_batch(mesh, batch, objectives.BATCH), given)
    found.append(float(metrics["loss"]))
  return state, found, given


@pytest.fixture(scope="module")
def everything_alone():
  return everything_under_jit(parallel.make_mesh(devices=jax.devices()[:1]))


def assert_same_everything(got, want):
  np.testing.assert_allclose(got[1], want[1], rtol=1e-5)
  for a, b in zip(objectives.leaf_values(got[0]), objectives.leaf_values(want[0]), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_objective_with_everything_on_two_by_four_gives_the_run_of_one(accumulate, everything_alone):
  """Its memory holds the losses of the whole batch in order."""
  found = everything_under_jit(parallel.make_mesh(2, 4), accumulate)
  assert_same_everything(found, everything_alone)
  for leaf in (found[0].memory["target"]["first"], found[0].extra["critic"], found[2]["objective"]["last"]):
    assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // 4}


def test_an_objective_with_everything_in_four_parts_gives_the_run_of_one(everything_alone):
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  assert_same_everything(everything_under_jit(mesh, accumulate=4), everything_alone)


def test_an_objective_with_everything_under_pmap_gives_the_run_of_one(everything_alone):
  mapped = parallel.pmap_step(objectives.train_step(axis_name=parallel.DATA_AXIS))
  state, given = map(parallel.replicate, (jax.jit(objectives.init_state)(), objectives.frozen()))
  found = []
  for batch in objectives.batches(STEPS):
    state, metrics = mapped(state, batch, given)
    found.append(float(metrics["loss"]))
  for leaf in objectives.leaf_values(state):
    np.testing.assert_array_equal(leaf[0], leaf[-1])
  assert_same_everything((parallel.unreplicate(state), found), everything_alone)


def test_each_row_lies_where_it_should(batches):
  mesh = parallel.make_mesh(4, 2)
  np.testing.assert_array_equal(parallel.local_rows(mesh, BATCH), np.arange(BATCH))
  put = parallel.put_batch(mesh, batches[0], BATCH)
  np.testing.assert_array_equal(put["image"], batches[0]["image"])
  assert {shard.data.shape[0] for shard in put["image"].addressable_shards} == {2}


def test_wrong_sizes_are_errors():
  with pytest.raises(ValueError, match="batch size of 12 on 8 devices.*8 or 16"):
    parallel.check_batch(12, 8)
  with pytest.raises(ValueError, match="batch size of 0"):
    parallel.check_batch(0, 8)
  with pytest.raises(ValueError, match=r"data=3 by fsdp=2 on 8 device.*8 x 1, 4 x 2, 2 x 4, 1 x 8"):
    parallel.make_mesh(3, 2)
  with pytest.raises(ValueError, match="fsdp=16 on 8"):
    parallel.make_mesh(fsdp=16)
  with pytest.raises(ValueError, match="accumulate=3 with a batch of 16 on 8.*2 each"):
    training.check_accumulate(16, 8, 3)


def test_the_cluster_s_environment_says_how_many_processes():
  assert startup.environment_processes({}) == 1
  assert startup.environment_processes({"OMPI_COMM_WORLD_SIZE": "4"}) == 4
  assert startup.environment_processes({"SLURM_STEP_NUM_TASKS": "2"}) == 2
  assert startup.environment_processes({"TPU_WORKER_HOSTNAMES": "a,b,c"}) == 3
  assert startup.environment_processes({"TPU_WORKER_HOSTNAMES": "localhost"}) == 1


def test_wrong_processes_are_errors():
  with pytest.raises(ValueError, match="expected all three"):
    startup.connect("host:1", 2)
  for place in ("host", "host:0", "host:65536", "host:99999", ":1"):
    with pytest.raises(ValueError, match="expected host:port with a port from 1 to 65535"):
      startup.connect(place, 2, 0)
  with pytest.raises(ValueError, match="an id from 0 to one less"):
    startup.connect("host:1", 2, 2)


def test_a_cpu_s_convolutions_take_none_of_ynnpack_and_are_the_same_to_rounding():
  keys = jax.random.split(jax.random.key(0), 3)
  x, seen = (jax.random.normal(key, (4, 16, 16, 32)) for key in keys[:2])
  kernel = jax.random.normal(keys[2], (3, 3, 32, 32)) / 17

  def gradient(x, kernel):
    def loss(x, kernel):
      return jnp.vdot(
        jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")), seen
      )

    return jax.value_and_grad(loss, (0, 1))(x, kernel)

  options = parallel.compiler_options()
  ours, plain = jax.jit(gradient, compiler_options=options), jax.jit(gradient)
  for a, b in zip(jax.tree.leaves(ours(x, kernel)), jax.tree.leaves(plain(x, kernel)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
  programs = [function.lower(x, kernel).compile().as_text() for function in (ours, plain)]
  assert options
  assert ["__ynn_fusion" in program for program in programs] == [False, True]


def test_other_platforms_are_compiled_for_as_they_are():
  devices = np.array([types.SimpleNamespace(platform="tpu")])
  for once in (False, True):
    assert parallel.compiler_options(types.SimpleNamespace(devices=devices), once=once) == {}


def test_a_program_that_runs_once_says_the_same():
  def normal(key):
    return jax.random.normal(key, (64, 64))

  options = parallel.compiler_options(once=True)
  assert set(options) > set(parallel.compiler_options())
  np.testing.assert_array_equal(jax.jit(normal, compiler_options=options)(jax.random.key(0)), normal(jax.random.key(0)))


@pytest.mark.parametrize("has_tpu", [False, True])
def test_what_libtpu_prints_is_kept_back_where_there_is_no_tpu(has_tpu, monkeypatch, capfd):
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
