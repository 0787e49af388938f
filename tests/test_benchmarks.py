"""The benchmarks: how they time and reckon, and all that compares with a peer from start to end, in small."""

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
  """A benchmark as a module, beside those that it imports."""
  monkeypatch.syspath_prepend(str(FOLDER))
  # It would change how this process allocates and runs what comes after.
  monkeypatch.setattr(heap, "keep_freed_memory", lambda: False)
  return importlib.import_module


@pytest.fixture
def run(script, monkeypatch, capsys):
  """What a benchmark prints that is called with these options, in this process."""

  def run(name, *options):
    monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
    script(name.removesuffix(".py")).main()
    return capsys.readouterr().out

  return run


def test_contenders_run_there_and_back_each_after_a_call_that_is_not_timed(script):
  timing, calls = script("timing"), []
  times = timing.in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, 2, quiet=True)
  assert "".join(calls) == "ab" + 2 * "aabbbbaa"
  assert [len(values) for values in times.values()] == [2, 2]
  calls.clear()
  timing.in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, 1, settle=False, quiet=True)
  assert "".join(calls) == "ab" + "abba"


def test_the_ratio_is_that_of_neighbors(script):
  # A machine that slows down to a tenth: each round still says 2.
  times = {"ours": [2.0, 20.0, 4.0], "theirs": [1.0, 10.0, 2.0]}
  assert script("timing").ratio(times, "ours", "theirs") == (2.0, 2.0, 2.0)


def test_communication_hides_from_the_batch_that_the_roofline_says(script):
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
  # While communication hides, a million images cost what they cost on one chip.
  costs = [row["chip_seconds_per_million"] for row in (alone, *rows)]
  assert costs == sorted(costs)
  np.testing.assert_allclose(costs[1], costs[0])


def test_devices_share_the_work(run, tmp_path):
  text = run("scaling.py", "--devices=2", TINY, "--recipes=digits_vp.py", f"--json={tmp_path / 'figures.json'}")
  rows = json.loads((tmp_path / "figures.json").read_text())["simulated"]
  assert [(row["devices"], row["fsdp"]) for row in rows] == [(1, 1), (2, 1), (2, 2)]
  assert "2 | 2" in text
  assert rows[2]["state_bytes"] < 0.6 * rows[0]["state_bytes"]
  assert rows[1]["collectives"]["all-reduce"]["bytes"] == pytest.approx(rows[0]["parameter_bytes"], rel=0.02)


@pytest.fixture
def quick(script, run, tmp_path, monkeypatch):
  """The figures of a benchmark as `gpu.py --quick` runs it."""
  monkeypatch.setattr(script("timing"), "matmul_peak", functools.partial(script("timing").matmul_peak, size=256))

  def quick(name):
    benchmark, *options = script("gpu").QUICK[name]
    run(benchmark, *options, f"--json={tmp_path / 'figures.json'}")
    return json.loads((tmp_path / "figures.json").read_text())

  return quick


def test_networks_are_timed_beside_the_peer_s_after_their_outputs_are_compared(quick):
  figures = quick("unet_ddpm")
  assert [(row["pass"], row["batch"]) for row in figures["rows"]] == [
    (name, batch) for batch in (2, 4) for name in ("forward", "train step")
  ]
  for row in figures["rows"]:
    assert all(share > 0 for share in row["utilization"].values())
  assert figures["machine"]["JAX"] == jax.__version__


def test_sampling_is_timed_beside_the_peer_s(quick):
  rows = quick("sampling_ddpm")["rows"]
  assert [row["task"] for row in rows] == ["DDIM, 50 steps", "DPM-Solver++(2M), 20 steps"]
  assert all(row["ratio"]["eager"][1] > 0 for row in rows)


@pytest.fixture
def optimized(monkeypatch):
  """Programs that XLA optimizes, for what trains longer than it compiles."""
  own = parallel.compiler_options
  monkeypatch.setattr(parallel, "compiler_options", lambda *args, **kwargs: own(*args, **kwargs) | OPTIMIZED)


@pytest.fixture
def smaller(script, monkeypatch):
  """Has a benchmark of no particular network take the smallest."""

  def smaller(name):
    least = {"channels": 8, "groups": 8, "multipliers": (1,), "blocks": 1, "attention_levels": ()}
    monkeypatch.setattr(script(name), "UNet", lambda **options: UNet(**options | least))

  return smaller


def test_the_overhead_of_sampling_is_timed(quick, smaller):
  smaller("sampling_overhead")
  figures = quick("overhead")
  assert figures["evaluations"] == {"heun": 11}
  assert figures["ratios"]["heun"][1] > 0


def test_the_rates_and_the_wait_for_input_are_timed(quick, smaller, optimized):
  smaller("input")
  figures = quick("input")
  assert all(rate > 0 for of_source in figures["records_per_second"].values() for rate in of_source.values())
  assert all(0 <= share <= 1 for share in figures["wait"].values())


def test_memory_is_compiled(quick, script, monkeypatch):
  monkeypatch.setattr(script("memory"), "POLICIES", ("none",))
  (row,) = quick("memory")["rows"]
  assert row["compiled"] > row["state"]


def test_one_command_runs_every_benchmark_and_says_which_failed(script, run, tmp_path, monkeypatch):
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


def test_the_gpu_benchmark_ends_in_time_with_what_it_has(script, run, tmp_path, monkeypatch):
  gpu = script("gpu")
  (tmp_path / "long.py").write_text(
    "import sys, time; open(sys.argv[-1].partition('=')[2], 'w').write('1'); print('a row', flush=True); time.sleep(3600)"
  )
  monkeypatch.setattr(gpu, "HERE", tmp_path)
  monkeypatch.setattr(gpu, "QUICK", {"first": ("long.py",), "second": ("long.py",)})
  text = run("gpu.py", "--quick", f"--output={tmp_path / 'out'}", "--minutes=0.02")
  assert "out of time, with the figures measured by then: first, second" in text
  assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {
    "first.txt": "a row\n",
    "first.json": "1",
  }
  with pytest.raises(SystemExit, match="Got --minutes=0; expected more than 0"):
    run("gpu.py", f"--output={tmp_path / 'out'}", "--minutes=0")


@pytest.mark.slow
def test_what_the_gpu_benchmark_runs_runs_in_small(tmp_path):
  """The same scripts, each in a process of its own, as a reader starts them."""
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
  # Pixels in the place of the features of a classifier, which would have to be trained.
  monkeypatch.setattr(metrics, "train_classifier", lambda *args, **kwargs: None)
  monkeypatch.setattr(metrics, "classifier_space", lambda params, classes: metrics.pixel_space())
  (tmp_path / "tiny.py").write_text(SMALL_BATCHES)
  options = [f"--config={tmp_path / 'tiny.py'}", "--steps=40", "--parts=2", "--samples=100", f"--seeds={seeds}"]
  run("learning_curve.py", *options, f"--output={tmp_path}", f"--json={tmp_path / 'figures.json'}")
  runs = json.loads((tmp_path / "figures.json").read_text())["runs"]
  curves = [{name: np.array(points)[:, 2] for name, points in one["losses"].items()} for one in runs]
  assert len(curves) == seeds
  # Another seed is another run.
  assert all(not np.allclose(curves[0]["ddpm_jax"], other["ddpm_jax"], rtol=1e-3) for other in curves[1:])
  for one, by_name in zip(runs, curves, strict=True):
    # Means of 20 steps of the same loss, of other noise.
    np.testing.assert_allclose(by_name["ddpm_jax"], by_name["diffusers"], rtol=0.1)
    for name, loss in by_name.items():
      assert loss[-1] < loss[0], name
      assert one["curves"][name][-1]["distance"] < one["curves"][name][0]["distance"]
  assert (tmp_path / "learning_curve.png").stat().st_size > 10_000


def test_fed_the_same_both_trainers_take_the_same_steps(script, tmp_path):
  """The same images, times and noise: the same losses, and in the end the same averages, to rounding."""
  curve = script("learning_curve")
  experiment = curve.load(FOLDER / "tiny.py")
  source, _ = reading.read_data(experiment)
  ours, process = curve.Ours(experiment, source), experiment.model.process
  interop.diffusers.save(tmp_path, experiment.model, ours.state.params)
  theirs = curve.Theirs(experiment, source, tmp_path, "cpu", False)
  # Its first step has a rate of 0, ours the first share of the warm-up. Without gradients nothing is changed.
  theirs.optimizer.step()
  theirs.rate.step()
  state, key, start = ours.state, jnp.copy(ours.state.key), jax.tree.map(np.array, ours.state.params)
  draw = jax.jit(sample_noisy, static_argnums=(1, 3))
  times = losses.uniform(process)
  for step in range(20):
    batch = next(ours.batches)
    image = np.asarray(batch["image"])
    keys = randomness.sample_keys(jax.random.fold_in(key, step), jnp.arange(len(image)))
    t, _, noise, _ = draw(keys, process, image, times)
    state, found = ours.step(state, batch)
    label = torch.tensor(np.rint(np.asarray(t) * 1000).astype(int) - 1)
    loss = theirs.step(*(torch.tensor(np.moveaxis(np.asarray(value), -1, 1)) for value in (image, noise)), label)
    np.testing.assert_allclose(found["loss"], float(loss), rtol=2e-5)
  averages = theirs.params()
  jax.tree.map(
    lambda found, wanted: np.testing.assert_allclose(found, wanted, atol=1e-5),
    ema.ema_params(state.opt_state),
    averages,
  )
  # More than rounding of where they began.
  moved = jax.tree.map(lambda found, wanted: np.abs(found - wanted).max(), averages, start)
  assert max(jax.tree.leaves(moved)) > 5e-3


def test_traffic_of_a_part_and_of_a_recipe(run, tmp_path):
  """On one chip of a TPU that is not there: the least bytes of a convolution, and no operation that is in no list."""
  text = run(
    "traffic.py", "--parts=convolution", "--types=bfloat16", "--images=2", "--operations=1", f"--json={tmp_path / 'a'}"
  )
  (row,) = json.loads((tmp_path / "a").read_text())["rows"]
  data, kernel = 2 * 16 * 16 * 256 * 2, (9 * 256 + 1) * 256 * 2
  # The data, the result and both their gradients; the weights.
  assert row["least"] == 4 * data + kernel
  # The weights, read twice, and their gradients lie in memory in float32.
  assert row["least"] < row["memory"] < row["least"] + 6 * kernel
  assert row["xla"] >= row["memory"]
  assert "M cycles" in text
  run("traffic.py", "--types=float32", "--batch=8", str(FOLDER / "tiny.py"), f"--json={tmp_path / 'b'}")
  (row,) = json.loads((tmp_path / "b").read_text())["rows"]
  assert row["what"] == "tiny.py"
  # Of what a small network keeps, most stays on the chip.
  assert 0 < row["memory"] < row["xla"]
  with pytest.raises(SystemExit, match="Got --parts=nothing; expected some of normalization"):
    run("traffic.py", "--parts=nothing")
