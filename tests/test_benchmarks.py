"""Test the timing code of the benchmarks, and run small versions of the benchmarks."""

import functools
import importlib
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ddpm_jax import interop, losses, metrics, randomness
from ddpm_jax.devices import hardware, heap, parallel
from ddpm_jax.losses.squared_error import sample_noisy
from ddpm_jax.networks import UNet
from ddpm_jax.runs import reading
from ddpm_jax.training import ema
from tests.conftest import CACHE, ROOT
from tests.flags import OPTIMIZED

FOLDER = ROOT / "experiments" / "benchmarks"
TINY = f"--config={FOLDER / 'tiny.py'}"


@pytest.fixture
def script(monkeypatch):
  """Return a function that imports a benchmark as a module."""
  monkeypatch.syspath_prepend(str(FOLDER))
  # The real function would change the allocator of this process for later tests.
  monkeypatch.setattr(heap, "keep_freed_memory", lambda: False)
  return importlib.import_module


@pytest.fixture
def run(script, monkeypatch, capsys):
  """Return a function that runs a benchmark in this process and returns its output."""

  def run(name, *options):
    monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
    script(name.removesuffix(".py")).main()
    return capsys.readouterr().out

  return run


def test_functions_are_timed_in_both_orders_after_untimed_calls(script):
  timing, calls = script("timing"), []
  times = timing.time_alternately({name: lambda name=name: calls.append(name) for name in "ab"}, 2, quiet=True)
  assert "".join(calls) == "ab" + 2 * "aabbbbaa"
  assert [len(values) for values in times.values()] == [2, 2]
  calls.clear()
  timing.time_alternately({name: lambda name=name: calls.append(name) for name in "ab"}, 1, warm_up=False, quiet=True)
  assert "".join(calls) == "ab" + "abba"


def test_the_ratio_compares_times_of_the_same_round(script):
  # The machine slows down by a factor of ten, but the ratio is 2 in each round.
  times = {"ours": [2.0, 20.0, 4.0], "theirs": [1.0, 10.0, 2.0]}
  assert script("timing").ratio(times, "ours", "theirs") == (2.0, 2.0, 2.0)


def test_the_roofline_gives_the_smallest_batch_that_hides_communication(script):
  scaling = script("scaling")
  work = scaling.work_of(scaling.load(ROOT / "configs" / "cifar10_vp.py"))
  alone, *rows = scaling.roofline(work, "v5e", 1024)
  assert alone["communication_seconds"] == 0
  parameters, chip = 35_746_307, hardware.chip_of("TPU v5e")
  for row in rows:
    count = row["chips"]
    sent = row["communication_seconds"] * chip.interconnect
    np.testing.assert_allclose(sent, 2 * (count - 1) / count * 4 * parameters, rtol=1e-6)
    batch = row["hiding_batch_per_chip"] * count
    enough = next(r for r in scaling.roofline(work, "v5e", batch) if r["chips"] == count)
    short = next(r for r in scaling.roofline(work, "v5e", batch - count) if r["chips"] == count)
    assert enough["computing_seconds"] >= enough["communication_seconds"]
    assert short["computing_seconds"] < short["communication_seconds"]
  # While communication is hidden, a million images cost the same as on one chip.
  costs = [row["chip_seconds_per_million"] for row in (alone, *rows)]
  assert costs == sorted(costs)
  np.testing.assert_allclose(costs[1], costs[0])


def test_devices_share_the_work(run, tmp_path):
  text = run("scaling.py", "--devices=2", TINY, "--recipes=digits_vp.py", f"--json={tmp_path / 'results.json'}")
  rows = json.loads((tmp_path / "results.json").read_text())["simulated"]
  assert [(row["devices"], row["fsdp"]) for row in rows] == [(1, 1), (2, 1), (2, 2)]
  assert "2 | 2" in text
  assert rows[2]["state_bytes"] < 0.6 * rows[0]["state_bytes"]
  assert rows[1]["collectives"]["all-reduce"]["bytes"] == pytest.approx(rows[0]["parameter_bytes"], rel=0.02)


@pytest.fixture
def quick(script, run, tmp_path, monkeypatch):
  """Return a function that runs one benchmark, with the options of `gpu.py --quick`, and returns the results."""
  monkeypatch.setattr(script("timing"), "matmul_peak", functools.partial(script("timing").matmul_peak, size=256))

  def quick(name):
    benchmark, *options = script("gpu").QUICK[name]
    run(benchmark, *options, f"--json={tmp_path / 'results.json'}")
    return json.loads((tmp_path / "results.json").read_text())

  return quick


def test_our_networks_and_networks_of_diffusers_are_compared_and_timed(quick):
  results = quick("unet_ddpm")
  assert [(row["pass"], row["batch"]) for row in results["rows"]] == [
    (name, batch) for batch in (2, 4) for name in ("forward", "train step")
  ]
  for row in results["rows"]:
    assert all(share > 0 for share in row["utilization"].values())
  assert results["machine"]["JAX"] == jax.__version__


@pytest.mark.parametrize("options", [[], pytest.param(["--scan"], marks=pytest.mark.slow)])
def test_our_transformer_and_the_transformer_of_diffusers_are_compared_and_timed(options, run, tmp_path):
  run("dit.py", "--tiny", "--batches=2", "--rounds=1", *options, f"--json={tmp_path / 'results.json'}")
  rows = json.loads((tmp_path / "results.json").read_text())["rows"]
  assert [row["pass"] for row in rows] == ["forward", "train step"]
  assert all(row["ratio"][1] > 0 and row["error"] < 1e-3 for row in rows)


def test_sampling_with_our_code_and_with_diffusers_is_timed(quick):
  rows = quick("sampling_ddpm")["rows"]
  assert [row["task"] for row in rows] == ["DDIM, 50 steps", "DPM-Solver++(2M), 20 steps"]
  assert all(row["ratio"]["eager"][1] > 0 for row in rows)


@pytest.fixture
def optimized(monkeypatch):
  """Let XLA optimize programs, for tests in which training takes longer than compilation."""
  original = parallel.compiler_options
  monkeypatch.setattr(parallel, "compiler_options", lambda *args, **kwargs: original(*args, **kwargs) | OPTIMIZED)


@pytest.fixture
def smaller(script, monkeypatch):
  """Return a function that replaces the network of a benchmark by a tiny network."""

  def smaller(name):
    tiny = {"channels": 8, "groups": 8, "multipliers": (1,), "blocks": 1, "attention_levels": ()}
    monkeypatch.setattr(script(name), "UNet", lambda **options: UNet(**options | tiny))

  return smaller


@pytest.mark.parametrize(
  ("tasks", "names"),
  [
    pytest.param("unet", ["unet"], id="unet"),
    pytest.param("decode,load", ["decode", "load float32", "load bfloat16"], id="others", marks=pytest.mark.slow),
  ],
)
def test_parts_of_stable_diffusion_are_compared_in_processes_of_their_own(tasks, names, run, tmp_path):
  options = ["--small", "--sizes=64", f"--tasks={tasks}"]
  output = run("stable_diffusion.py", *options, f"--json={tmp_path / 'results.json'}")
  rows = json.loads((tmp_path / "results.json").read_text())["rows"]
  assert [row["task"] for row in rows] == names
  assert all(row["ours seconds"] > 0 < row["ours increase"] < row["ours peak"] for row in rows)
  assert f"| {names[0]} 64 |" in output
  if "load" in tasks:
    assert rows[1]["ours bytes"] == rows[1]["diffusers bytes"] == 2 * rows[2]["ours bytes"]


def test_the_overhead_of_sampling_is_timed(quick, smaller):
  smaller("sampling_overhead")
  results = quick("overhead")
  assert results["evaluations"] == {"heun": 11}
  assert results["ratios"]["heun"][1] > 0


def test_reading_rates_and_waiting_for_input_are_measured(quick, smaller, optimized):
  smaller("input")
  results = quick("input")
  assert all(rate > 0 for rates in results["records_per_second"].values() for rate in rates.values())
  assert all(0 <= share <= 1 for share in results["wait"].values())


def test_a_compiled_step_needs_more_memory_than_its_state(quick, script, monkeypatch):
  monkeypatch.setattr(script("memory"), "POLICIES", ("none",))
  (row,) = quick("memory")["rows"]
  assert row["compiled"] > row["state"]


def test_one_command_runs_all_benchmarks_and_reports_failures(script, run, tmp_path, monkeypatch):
  gpu = script("gpu")
  assert set(gpu.QUICK) <= set(gpu.RUNS)
  (tmp_path / "good.py").write_text(
    "import sys; print('a table'); open(sys.argv[-1].partition('=')[2], 'w').write('1')"
  )
  (tmp_path / "bad.py").write_text("raise SystemExit('a fault')")
  monkeypatch.setattr(gpu, "HERE", tmp_path)
  monkeypatch.setattr(gpu, "QUICK", {"first": ("bad.py",), "second": ("good.py", "--flag=2")})
  with pytest.raises(SystemExit, match="failed: first"):
    run("gpu.py", "--quick", f"--output={tmp_path / 'out'}")
  assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {
    "first.txt": "a fault\n", "second.txt": "a table\n", "second.json": "1",
  }  # fmt: skip


def test_the_gpu_benchmark_keeps_partial_results_at_the_time_limit(script, run, tmp_path, monkeypatch):
  gpu = script("gpu")
  (tmp_path / "long.py").write_text(
    "import sys, time; open(sys.argv[-1].partition('=')[2], 'w').write('1'); print('a row', flush=True); time.sleep(3600)"
  )
  monkeypatch.setattr(gpu, "HERE", tmp_path)
  monkeypatch.setattr(gpu, "QUICK", {"first": ("long.py",), "second": ("long.py",)})
  text = run("gpu.py", "--quick", f"--output={tmp_path / 'out'}", "--minutes=0.02")
  assert "stopped at the time limit, with partial results: first, second" in text
  assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {
    "first.txt": "a row\n",
    "first.json": "1",
  }
  with pytest.raises(SystemExit, match="Got --minutes=0; expected a number above 0"):
    run("gpu.py", f"--output={tmp_path / 'out'}", "--minutes=0")


@pytest.mark.slow
def test_the_gpu_benchmark_runs_in_processes(tmp_path):
  """The quick version runs every script in a new process, as on the command line."""
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(CACHE)}
  command = [sys.executable, str(FOLDER / "gpu.py"), "--quick", f"--output={tmp_path}"]
  result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
  assert result.returncode == 0, result.stdout + result.stderr
  assert {path.stem for path in tmp_path.glob("*.json")} == {
    "unet_ddpm",
    "sampling_ddpm",
    "overhead",
    "input",
    "memory",
  }


SMALL_BATCHES = f"""
import runpy

def get_config():
  config = runpy.run_path({str(FOLDER / "tiny.py")!r})["get_config"]()
  config.training.batch_size, config.sampling.batch_size = 64, 100
  return config
"""


@pytest.mark.parametrize("seeds", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_learning_curves_start_from_the_same_weights_and_fall(seeds, script, run, optimized, tmp_path, monkeypatch):
  monkeypatch.setattr(script("learning_curve"), "LOG_EVERY", 20)
  # Use pixels as features, to avoid training a classifier.
  monkeypatch.setattr(metrics, "train_classifier", lambda *args, **kwargs: None)
  monkeypatch.setattr(metrics, "classifier_space", lambda params, classes: metrics.pixel_space())
  (tmp_path / "tiny.py").write_text(SMALL_BATCHES)
  options = [f"--config={tmp_path / 'tiny.py'}", "--steps=40", "--parts=2", "--samples=100", f"--seeds={seeds}"]
  run("learning_curve.py", *options, f"--output={tmp_path}", f"--json={tmp_path / 'results.json'}")
  runs = json.loads((tmp_path / "results.json").read_text())["runs"]
  curves = [{name: np.array(points)[:, 2] for name, points in one["losses"].items()} for one in runs]
  assert len(curves) == seeds
  # Another seed gives another run.
  assert all(not np.allclose(curves[0]["ddpm_jax"], other["ddpm_jax"], rtol=1e-3) for other in curves[1:])
  for one, by_name in zip(runs, curves, strict=True):
    # Both losses are means over 20 steps, with different noise.
    np.testing.assert_allclose(by_name["ddpm_jax"], by_name["diffusers"], rtol=0.1)
    for name, loss in by_name.items():
      assert loss[-1] < loss[0], name
      assert one["curves"][name][-1]["distance"] < one["curves"][name][0]["distance"]
  assert (tmp_path / "learning_curve.png").stat().st_size > 10_000


def test_networks_are_compared_after_equal_training_time(script, run, tmp_path, monkeypatch):
  module = script("equal_time")
  # Use pixels as features, to avoid training a classifier.
  monkeypatch.setattr(metrics, "train_classifier", lambda *args, **kwargs: None)
  monkeypatch.setattr(metrics, "classifier_space", lambda params, classes: metrics.pixel_space())
  monkeypatch.setattr(module, "SAMPLE_STEPS", 2)
  monkeypatch.setattr(module, "TIMED_STEPS", 2)
  times, options = tmp_path / "times.json", ["--tiny", "--rounds=1", "--samples=64", "--seconds=1"]
  text = run("equal_time.py", *options, "--models=DiT, velocity", f"--times={times}")
  assert list(json.loads(times.read_text())) == ["DiT, velocity"]
  assert "| DiT, velocity |" in text
  # This run reads the times instead of measuring them.
  times.write_text(json.dumps({"U-Net, eps": 0.25}))
  monkeypatch.setattr(module, "measure_steps", lambda *_: pytest.fail("the steps were timed again"))
  run("equal_time.py", *options, "--models=U-Net, eps", f"--times={times}", f"--json={tmp_path / 'results.json'}")
  (result,) = json.loads((tmp_path / "results.json").read_text())["runs"]
  assert result["U-Net, eps"]["steps"] == 4
  with pytest.raises(SystemExit):
    run("equal_time.py", "--models=DiT")


def test_both_trainers_take_the_same_steps_on_the_same_inputs(script, tmp_path):
  """With the same images, times and noise, both trainers have the same losses and final EMA up to rounding errors."""
  curve = script("learning_curve")
  experiment = curve.load(FOLDER / "tiny.py")
  source, _ = reading.read_data(experiment)
  ours, process = curve.Ours(experiment, source), experiment.model.process
  interop.diffusers.save(tmp_path, experiment.model, ours.state.params)
  theirs = curve.Theirs(experiment, source, tmp_path, "cpu", False)
  # The first step of diffusers' trainer has learning rate 0, but our first step has the first value of the warm-up. A
  # step without gradients advances the schedule of diffusers and changes no weights.
  theirs.optimizer.step()
  theirs.rate.step()
  state, key, start = ours.state, jnp.copy(ours.state.key), jax.tree.map(np.array, ours.state.params)
  sample = jax.jit(sample_noisy, static_argnums=(1, 3))
  times = losses.uniform(process)
  for step in range(20):
    batch = next(ours.batches)
    image = np.asarray(batch["image"])
    keys = randomness.sample_keys(jax.random.fold_in(key, step), jnp.arange(len(image)))
    t, _, noise, _ = sample(keys, process, image, times)
    state, step_metrics = ours.step(state, batch)
    step_index = torch.tensor(np.rint(np.asarray(t) * 1000).astype(int) - 1)
    loss = theirs.step(*(torch.tensor(np.moveaxis(np.asarray(value), -1, 1)) for value in (image, noise)), step_index)
    np.testing.assert_allclose(step_metrics["loss"], float(loss), rtol=2e-5)
  averages = theirs.params()
  jax.tree.map(
    lambda actual, expected: np.testing.assert_allclose(actual, expected, atol=1e-5),
    ema.ema_params(state.opt_state),
    averages,
  )
  # The parameters have changed by more than rounding errors.
  change = jax.tree.map(lambda end, start: np.abs(end - start).max(), averages, start)
  assert max(jax.tree.leaves(change)) > 5e-3


def test_the_traffic_of_a_convolution_and_of_a_recipe_is_counted(run, tmp_path):
  """The minimum traffic of a convolution is exact, and the traffic of a recipe excludes data in on-chip memory."""
  text = run(
    "traffic.py", "--parts=convolution", "--types=bfloat16", "--images=2", "--operations=1", f"--json={tmp_path / 'a'}"
  )
  (row,) = json.loads((tmp_path / "a").read_text())["rows"]
  data, kernel = 2 * 16 * 16 * 256 * 2, (9 * 256 + 1) * 256 * 2
  # The input, the result, the gradients of both, and the weights.
  assert row["minimum"] == 4 * data + kernel
  # The program also reads the weights twice in float32 and writes their gradients.
  assert row["minimum"] < row["memory"] < row["minimum"] + 6 * kernel
  assert row["xla"] >= row["memory"]
  assert "M cycles" in text
  run("traffic.py", "--types=float32", "--batch=8", str(FOLDER / "tiny.py"), f"--json={tmp_path / 'b'}")
  (row,) = json.loads((tmp_path / "b").read_text())["rows"]
  assert row["program"] == "tiny.py"
  # Most activations of a small network stay in on-chip memory.
  assert 0 < row["memory"] < row["xla"]
  with pytest.raises(SystemExit, match="Got --parts=nothing; expected some of normalization"):
    run("traffic.py", "--parts=nothing")
