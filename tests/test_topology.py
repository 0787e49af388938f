"""Test descriptions of TPU slices, and simulated devices."""

import importlib.util
import os
import subprocess
import sys

import jax
import pytest

from ddpm_jax.devices import topology
from tests.conftest import ROOT


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("4x4", "expected <generation>:<shape>, such as v5e:4x4.*v6e: v6e:1x1"),
    ("v5e", "expected <generation>:<shape>"),
    ("v5e-16", "expected <generation>:<shape>"),
    ("h100:2x4", "unknown generation 'h100'.*v5p: v5p:2x2x1"),
    ("v5e:4", "expected 2 axes.*v5e:4x4"),
    ("v5p:4x4", "expected 3 axes.*v5p:2x2x1"),
    ("v5e:0x2", "at least 1 chip"),
    ("v5e:1000x1000", "at most 9,216 chips"),
  ],
)
def test_the_error_for_a_wrong_topology_names_valid_ones(name, message):
  with pytest.raises(ValueError, match=f"--topology={name}.*{message}"):
    topology.topology_devices(name)


def test_without_libtpu_the_error_names_the_extra(monkeypatch):
  monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"v5e:4x4, but libtpu is not installed.*pip install 'ddpm_jax\[plan\]'"):
    topology.topology_devices("v5e:4x4")


@pytest.mark.parametrize(
  ("error", "message"),
  [
    ('ABORTED: Internal error when accessing libtpu multi-process lockfile. Run "..."', "another process uses libtpu"),
    (
      'INVALID_ARGUMENT: Topology layout "v5e:3x3" is not divisible by the given',
      "does not consist of machines.*v5e:4x4",
    ),
    ("INVALID_ARGUMENT: Invalid TPU external name: TPU v5e", "libtpu does not support the generation.*upgrade"),
    ("INTERNAL: something else", r"libtpu rejects it \(INTERNAL: something else\)"),
  ],
)
def test_errors_of_libtpu_are_explained(monkeypatch, error, message):
  def fail(**_):
    raise jax.errors.JaxRuntimeError(error)

  monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
  monkeypatch.setattr(topology.topologies, "get_topology_desc", fail)
  for variable in topology._ENVIRONMENT:
    monkeypatch.setenv(variable, "1")
  with pytest.raises(ValueError, match=f"--topology=v5e:3x3.*{message}"):
    topology.topology_devices("v5e:3x3")


def test_existing_devices_are_used():
  assert topology.simulate_devices(8) == jax.devices()[:8]
  assert topology.simulate_devices(2) == jax.devices()[:2]


def test_simulating_devices_too_late_or_out_of_range_is_an_error():
  assert len(jax.devices()) == 8
  with pytest.raises(ValueError, match="Got 99 devices to simulate, but JAX was already started with 8 device"):
    topology.simulate_devices(99)
  with pytest.raises(ValueError, match="--devices=1000000000; expected 1 to 65,536"):
    topology.simulate_devices(10**9)
  with pytest.raises(ValueError, match="--devices=0"):
    topology.simulate_devices(0)


def run(code):
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  return subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
  ).stdout


def test_a_cpu_is_simulated_as_several_devices():
  assert run("from ddpm_jax.devices import topology; print(len(topology.simulate_devices(5)))") == "5\n"


@pytest.mark.parametrize(
  ("name", "kind", "count"),
  [
    ("v2:2x2", "TPU v2 core", 8),
    ("v3:2x2", "TPU v3 core", 8),
    ("v4:2x2x1", "TPU v4", 4),
    ("v5e:1x1", "TPU v5e", 1),
    ("v5e:2x4", "TPU v5e", 8),
    ("v5p:2x2x2", "TPU v5p", 8),
    ("V6e:2x2", "TPU v6e", 4),
    ("tpu7x:2x2x1", "TPU7x core", 8),
  ],
)
def test_slices_of_every_generation_have_the_right_chips(name, kind, count):
  code = f"""
from ddpm_jax.devices import hardware, topology
devices = topology.topology_devices({name!r})
print(len(devices), hardware.chip_of(devices[0].device_kind).name)"""
  assert run(code) == f"{count} {kind}\n"


def test_a_slice_that_does_not_consist_of_machines_is_refused():
  with pytest.raises(ValueError, match=r"--topology=v5e:3x3, which does not consist of machines"):
    topology.topology_devices("v5e:3x3")
