"""The benchmarks: how they time and reckon, and all that compares with a peer from start to end, in small."""

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

from ddpm_jax import build, ema, hardware, interop, losses, randomness
from ddpm_jax.losses.denoising import perturbed
from tests.conftest import CACHE, ROOT
from tests.flags import COMPILE_SOON

FOLDER = ROOT / "experiments" / "benchmarks"
TINY = f"--config={FOLDER / 'tiny.py'}"


@pytest.fixture
def script(monkeypatch):
  """A benchmark as a module, beside those that it imports."""
  monkeypatch.syspath_prepend(str(FOLDER))
  return importlib.import_module


def run(name, *options, flags=COMPILE_SOON):
  environment = os.environ | {"XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": str(CACHE), "PYTHONPATH": str(ROOT)}
  command = [sys.executable, str(FOLDER / name), *map(str, options)]
  result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
  assert result.returncode == 0, result.stdout + result.stderr
  return result.stdout


def test_contenders_run_there_and_back_each_after_a_call_that_is_not_timed(script):
  timing, calls = script("timing"), []
  times = timing.in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, 2, quiet=True)
  assert "".join(calls) == "ab" + 2 * "aabbbbaa"
  assert [len(values) for values in times.values()] == [2, 2]
  calls.clear()
  timing.in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, 1, settle=False, quiet=True)
  assert "".join(calls) == "ab" + "abba"


def test_the_ratio_is_that_of_neighbours(script):
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


def test_devices_share_the_work(tmp_path):
  text = run("scaling.py", "--devices=2", TINY, "--recipes=digits_vp.py", f"--json={tmp_path / 'figures.json'}")
  rows = json.loads((tmp_path / "figures.json").read_text())["simulated"]
  assert [(row["devices"], row["fsdp"]) for row in rows] == [(1, 1), (2, 1), (2, 2)]
  assert "2 | 2" in text
  assert rows[2]["state_bytes"] < 0.6 * rows[0]["state_bytes"]
  assert rows[1]["collectives"]["all-reduce"]["bytes"] == pytest.approx(rows[0]["parameter_bytes"], rel=0.02)


def test_what_the_gpu_benchmark_runs_runs_in_small(tmp_path):
  """The peers too: their outputs are compared with ours before anything is timed."""
  run("gpu.py", "--quick", f"--output={tmp_path}")
  figures = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
  assert set(figures) == {"unet_ddpm", "sampling_ddpm", "overhead", "input", "memory"}
  assert [(row["pass"], row["batch"]) for row in figures["unet_ddpm"]["rows"]] == [
    (name, batch) for batch in (2, 4) for name in ("forward", "train step")
  ]
  for row in figures["unet_ddpm"]["rows"]:
    assert all(0 < share < 2 for share in row["utilization"].values())
  assert len(figures["sampling_ddpm"]["rows"]) == 2
  assert figures["memory"]["rows"][0]["compiled"] > figures["memory"]["rows"][0]["state"]
  assert figures["unet_ddpm"]["machine"]["JAX"] == jax.__version__


def test_the_learning_curves_start_from_the_same_weights_and_fall(tmp_path):
  options = [TINY, "--steps=100", "--parts=2", "--samples=100", "--seeds=2"]
  options += [f"--output={tmp_path}", f"--json={tmp_path / 'figures.json'}"]
  # It trains longer than it compiles.
  run("learning_curve.py", *options, flags="")
  runs = json.loads((tmp_path / "figures.json").read_text())["runs"]
  curves = [{name: np.array(points)[:, 2] for name, points in one["losses"].items()} for one in runs]
  # Another seed is another run.
  assert len(curves) == 2
  assert not np.allclose(curves[0]["ddpm_jax"], curves[1]["ddpm_jax"], rtol=1e-3)
  for one, by_name in zip(runs, curves, strict=True):
    # Means of 50 steps of the same loss, of other noise.
    np.testing.assert_allclose(by_name["ddpm_jax"], by_name["diffusers"], rtol=0.1)
    for name, loss in by_name.items():
      assert loss[-1] < loss[0], name
      assert one["curves"][name][-1]["distance"] < one["curves"][name][0]["distance"]
  assert (tmp_path / "learning_curve.png").stat().st_size > 10_000


def test_fed_the_same_both_trainers_take_the_same_steps(script, tmp_path):
  """The same images, times and noise: the same losses, and in the end the same averages, to rounding."""
  curve = script("learning_curve")
  config = curve.load(FOLDER / "tiny.py")
  source, _ = build.build_data(config)
  ours, process = curve.Ours(config, source), build.build_process(config)
  network, prediction = build.build_network(config), build.build_prediction(config)
  interop.diffusers.save(tmp_path, network, ours.state.params, process, prediction, shape=build.image_shape(config))
  theirs = curve.Theirs(config, source, tmp_path, "cpu", False)
  # Its first step has a rate of 0, ours the first share of the warm-up. Without gradients nothing is changed.
  theirs.optimizer.step()
  theirs.rate.step()
  state, key, start = ours.state, jnp.copy(ours.state.key), jax.tree.map(np.array, ours.state.params)
  draw = jax.jit(perturbed, static_argnums=(1, 3))
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
