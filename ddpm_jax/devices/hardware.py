"""Look up the peak performance of chips by JAX's device names, for rooflines and utilization.

All figures are peaks published by the makers.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

_GiB = 2**30
_CORES = {"TPU v2": 2, "TPU v3": 2, "TPU7x": 2}


class Chip(NamedTuple):
  """Hold the peak performance of one JAX device.

  A device is a chip, or one of the two cores of a TPU v2, v3 or TPU7x.

  Attributes:
    name: the common name.
    flops: dense FLOP/s, without sparsity, by the dtype of a program's arrays. For `float32` this is the rate at XLA's
      default precision: one pass in bfloat16 on TPUs, and TF32 on NVIDIA GPUs that support it.
    memory: bytes of HBM or graphics memory.
    bandwidth: bytes a second between the memory and the chip.
    interconnect: the maximum number of bytes a second that a chip sends to others in one direction, over all its links.
      If a device is one of two cores, this is still the rate of the entire chip. The two cores share the links, and
      data that both cores have is sent only once.
  """

  name: str
  flops: Mapping[str, float]
  memory: float
  bandwidth: float
  interconnect: float


def _tpu(name: str, tflops: float, memory_gib: float, bandwidth_gb: float, interconnect_gb: float) -> Chip:
  cores = _CORES.get(name, 1)
  peak = tflops * 1e12 / cores
  return Chip(
    name if cores == 1 else f"{name} core",
    {"bfloat16": peak, "float32": peak},
    memory_gib * _GiB / cores,
    bandwidth_gb * 1e9 / cores,
    interconnect_gb * 1e9,
  )


def _gpu(name: str, half: float, single: float, memory_gb: float, bandwidth_gb: float, interconnect_gb: float) -> Chip:
  # GPUs before Ampere have no bfloat16 units, so XLA computes bfloat16 in float32.
  bfloat16 = single if name.startswith(("V100", "T4")) else half
  flops = {"float16": half * 1e12, "bfloat16": bfloat16 * 1e12, "float32": single * 1e12}
  return Chip(name, flops, memory_gb * 1e9, bandwidth_gb * 1e9, interconnect_gb * 1e9)


# The keys are JAX's `device_kind`. Source: the pages "System architecture" of Cloud TPU
# (docs.cloud.google.com/tpu/docs/v5e and so on). The links of v2 and v3 are from Jouppi et al., "A domain-specific
# supercomputer for training deep neural networks" (2020). The columns are TFLOP/s of bfloat16, memory in GiB, bandwidth
# in GB/s, and links in one direction in GB/s, all for one chip. The pages state links either in Gbit/s in one direction
# or in GB/s in both directions.
_TPUS = {
  "TPU v2": _tpu("TPU v2", 46, 16, 700, 248),
  "TPU v3": _tpu("TPU v3", 123, 32, 900, 328),
  "TPU v4": _tpu("TPU v4", 275, 32, 1228, 300),
  "TPU v5 lite": _tpu("TPU v5e", 197, 16, 819, 200),
  "TPU v5": _tpu("TPU v5p", 459, 95, 2765, 600),
  "TPU v6 lite": _tpu("TPU v6e", 918, 32, 1640, 400),
  "TPU7x": _tpu("TPU7x", 2307, 192, 7380, 600),
}
_TPUS |= {"TPU v5e": _TPUS["TPU v5 lite"], "TPU v5p": _TPUS["TPU v5"], "TPU v6e": _TPUS["TPU v6 lite"]}

# The keys are CUDA's names without "NVIDIA", "Tesla" and "GeForce". A MIG slice of a GPU has another name and is not
# listed. Source: NVIDIA's data sheets and architecture white papers. The columns are TFLOP/s of float16 with float32
# accumulation, TFLOP/s of float32 (TF32 since Ampere), memory in GB, bandwidth in GB/s, and links in one direction in
# GB/s (NVLink if the GPU has it, otherwise PCIe). Figures that a sheet states with sparsity are halved.
_GPUS = {
  "V100-SXM2-16GB": _gpu("V100 SXM2 16 GB", 125, 15.7, 16, 900, 150),
  "V100-SXM2-32GB": _gpu("V100 SXM2 32 GB", 125, 15.7, 32, 900, 150),
  "V100-PCIE-16GB": _gpu("V100 PCIe 16 GB", 112, 14, 16, 900, 16),
  "V100-PCIE-32GB": _gpu("V100 PCIe 32 GB", 112, 14, 32, 900, 16),
  "T4": _gpu("T4", 65, 8.1, 16, 320, 16),
  "A100-SXM4-40GB": _gpu("A100 SXM 40 GB", 312, 156, 40, 1555, 300),
  "A100-SXM4-80GB": _gpu("A100 SXM 80 GB", 312, 156, 80, 2039, 300),
  "A100-PCIE-40GB": _gpu("A100 PCIe 40 GB", 312, 156, 40, 1555, 300),
  "A100 80GB PCIe": _gpu("A100 PCIe 80 GB", 312, 156, 80, 1935, 300),
  "A10": _gpu("A10", 125, 62.5, 24, 600, 32),
  "RTX A6000": _gpu("RTX A6000", 154.8, 77.4, 48, 768, 56),
  "RTX 3090": _gpu("RTX 3090", 71, 35.6, 24, 936, 56),
  "L4": _gpu("L4", 121, 60, 24, 300, 32),
  "L40S": _gpu("L40S", 362, 183, 48, 864, 32),
  "RTX 6000 Ada Generation": _gpu("RTX 6000 Ada", 364, 182, 48, 960, 32),
  "RTX 4090": _gpu("RTX 4090", 165.2, 82.6, 24, 1008, 32),
  "RTX 5090": _gpu("RTX 5090", 209.5, 104.8, 32, 1792, 64),
  "H100 80GB HBM3": _gpu("H100 SXM", 989.4, 494.7, 80, 3350, 450),
  "H100 PCIe": _gpu("H100 PCIe", 756, 378, 80, 2000, 300),
  "H100 NVL": _gpu("H100 NVL", 835, 417, 94, 3900, 300),
  "H200": _gpu("H200", 989.4, 494.7, 141, 4800, 450),
  "H200 NVL": _gpu("H200 NVL", 835, 417, 141, 4800, 450),
  "B200": _gpu("B200", 2250, 1125, 180, 8000, 900),
}


def chip_of(device_kind: str) -> Chip | None:
  """Return the chip of a JAX device by its `device_kind`, or None for a CPU or an unlisted device.

  A TPU v4 has two cores, but counts as one device, because JAX shows it as one device on real machines.
  """
  name = device_kind.strip()
  for maker in ("NVIDIA ", "Tesla ", "GeForce "):
    name = name.removeprefix(maker)
  return _TPUS.get(name) or _GPUS.get(name)


def peak(chip: Chip | None, dtype: object) -> float | None:
  """Return the peak dense FLOP/s of a device for a dtype, or None if the peak is unknown.

  `dtype` is a dtype or its name.
  """
  name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
  return None if chip is None else chip.flops.get(name)


def utilization(flops_per_second: float, chip: Chip, num_devices: int, dtype: object) -> float:
  """Return the FLOP/s of a program as a fraction of the peak FLOP/s of its devices.

  If `flops_per_second` does not include recomputation, the result is the model FLOP utilization (MFU).

  Args:
    flops_per_second: the FLOP/s of all devices together, such as `plan.flops_per_image` times images a second.
    chip: the kind of chip, the same for all devices.
    num_devices: the number of devices.
    dtype: the dtype that the network computes in.

  Raises:
    ValueError: if the peak for the dtype is unknown, or a number is out of range.
  """
  peak_flops = peak(chip, dtype)
  if peak_flops is None:
    raise ValueError(f"Got dtype {dtype}; expected a dtype with a known peak for {chip.name}: {', '.join(chip.flops)}.")
  if num_devices < 1 or not 0 <= flops_per_second < math.inf:
    raise ValueError(
      f"Got {flops_per_second} FLOP/s on {num_devices} devices; expected at least 0 FLOP/s on at least 1 device."
    )
  return flops_per_second / (num_devices * peak_flops)
