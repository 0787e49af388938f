"""Test that the table of chips recognizes the device names of JAX and CUDA."""

import jax
import jax.numpy as jnp
import pytest

from ddpm_jax.devices import hardware


@pytest.mark.parametrize(
  ("kind", "name", "tflops"),
  [
    ("TPU v2", "TPU v2 core", 23),
    ("TPU v4", "TPU v4", 275),
    ("TPU v5 lite", "TPU v5e", 197),
    ("TPU v5e", "TPU v5e", 197),
    ("TPU v5", "TPU v5p", 459),
    ("TPU v6 lite", "TPU v6e", 918),
    ("TPU7x", "TPU7x core", 1153.5),
    ("Tesla V100-SXM2-16GB", "V100 SXM2 16 GB", 15.7),
    ("NVIDIA A100-SXM4-80GB", "A100 SXM 80 GB", 312),
    ("A100-SXM4-40GB", "A100 SXM 40 GB", 312),
    ("NVIDIA H100 80GB HBM3", "H100 SXM", 989.4),
    ("NVIDIA H200", "H200", 989.4),
    ("NVIDIA GeForce RTX 4090", "RTX 4090", 165.2),
  ],
)
def test_chips_are_found_by_device_kind(kind, name, tflops):
  chip = hardware.chip_of(kind)
  assert chip.name == name
  assert hardware.peak(chip, jnp.bfloat16) == pytest.approx(tflops * 1e12)


def test_unlisted_devices_have_no_chip():
  # A slice of a GPU has only a fraction of the GPU's peak performance.
  for kind in ("cpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "TPU v9", jax.devices()[0].device_kind):
    assert hardware.chip_of(kind) is None
  assert hardware.peak(None, "float32") is None


def test_a_core_has_half_the_memory_and_bandwidth_of_its_chip():
  core = hardware.chip_of("TPU v3")
  assert core.memory == 16 * 2**30
  assert core.bandwidth == 450e9


def test_all_figures_are_plausible():
  for chip in [*hardware._TPUS.values(), *hardware._GPUS.values()]:
    assert 1e12 < chip.flops["float32"] <= chip.flops.get("float16", chip.flops["bfloat16"]) < 1e16
    assert 4e9 < chip.memory < 1e12
    assert 1e11 < chip.bandwidth < 1e13
    assert 1e10 < chip.interconnect < chip.bandwidth


def test_utilization_is_the_fraction_of_the_peak():
  chip = hardware.chip_of("TPU v5 lite")
  assert hardware.utilization(4 * 98.5e12, chip, 4, "bfloat16") == pytest.approx(0.5)
  assert hardware.utilization(0, chip, 1, jnp.dtype("float32")) == 0
  with pytest.raises(ValueError, match=r"float64.*TPU v5e: bfloat16, float32"):
    hardware.utilization(1e12, chip, 1, "float64")
  with pytest.raises(ValueError, match="0 devices"):
    hardware.utilization(1e12, chip, 0, "bfloat16")
  with pytest.raises(ValueError, match="nan"):
    hardware.utilization(float("nan"), chip, 1, "bfloat16")
