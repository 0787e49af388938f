"""The same network twice, from one folder: our U-Net and diffusers' UNet2DModel in PyTorch, with the same weights."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import UNet2DModel

from ddpm_jax import interop, predictions, processes, schedules
from ddpm_jax.networks import UNet

MODELS = {
  # Ho et al. 2020, on CIFAR-10: 35.7M parameters.
  "ddpm": ((32, 32, 3), {}),
  # Dhariwal and Nichol 2021, table 11, on ImageNet 64x64, of one class: 295M parameters.
  "adm64": (
    (64, 64, 3),
    {
      "channels": 192,
      "multipliers": (1, 2, 3, 4),
      "blocks": 3,
      "attention_levels": (1, 2, 3),
      "head_channels": 64,
      "epsilon": 1e-5,
      "time_embedding": "cos_sin",
      "frequency_shift": 0.0,
      "scale_shift": True,
      "downsample": "residual",
      "upsample": "residual",
    },
  ),
  # To try the benchmarks.
  "tiny": ((16, 16, 3), {"channels": 32, "multipliers": (1, 2), "blocks": 1, "attention_levels": (1,)}),
}


class Pair(NamedTuple):
  """Both networks, and the shape of their data."""

  network: UNet
  params: Any
  model: UNet2DModel
  shape: tuple[int, int, int]


def make(name: str) -> Pair:
  """A pair of `MODELS`."""
  shape, options = MODELS[name]
  network, process = UNet(**options, dropout=0.0), processes.discrete(schedules.linear())
  start = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, *shape)), jnp.zeros(1))["params"]
  # Small random numbers in the place of zeros, so that a comparison of outputs means something.
  leaves, tree = jax.tree.flatten(start)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  start = tree.unflatten([p + 0.02 * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)])
  with tempfile.TemporaryDirectory() as folder:
    interop.diffusers.save(f"{folder}/model", network, start, process, predictions.EPS, shape=shape)
    model = UNet2DModel.from_pretrained(f"{folder}/model", subfolder="unet")
    network, params = interop.diffusers.load_unet(Path(folder) / "model")
  return Pair(network.clone(dropout=0.0), params, model.eval(), shape)


def batch_of(size: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
  """Random data, time inputs and targets."""
  rng = np.random.default_rng(0)
  batch = {key: rng.standard_normal((size, *shape), np.float32) for key in ("x", "target")}
  return batch | {"t": rng.integers(0, 1000, size)}


def channels_first(x: np.ndarray) -> torch.Tensor:
  """[B, H, W, C] as PyTorch has it."""
  return torch.tensor(np.moveaxis(x, -1, 1))


def same(ours: Any, theirs: torch.Tensor, tolerance: float) -> float:
  """The difference of two outputs, as a share of their size (RMS).

  Raises:
    SystemExit: if it is above the tolerance: then the two are not the same network, and no comparison means anything.
  """
  wanted = np.moveaxis(theirs.float().cpu().numpy(), 1, -1)
  error = float(np.sqrt(np.mean((np.asarray(ours, np.float32) - wanted) ** 2)) / np.std(wanted))
  if not error <= tolerance:
    raise SystemExit(f"the outputs differ by {error:.1e} of their size, more than {tolerance}")
  return error
