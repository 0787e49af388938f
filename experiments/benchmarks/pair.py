"""The same network twice, from one folder: our U-Net and diffusers' UNet2DModel in PyTorch, with the same weights."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import recipe
import torch
from diffusers import UNet2DModel

from ddpm_jax import interop, predictions, processes, schedules
from ddpm_jax.models import Model, codecs, networks
from ddpm_jax.networks import UNet

# Ho et al.'s on CIFAR-10 (35.7M parameters); Dhariwal and Nichol's on ImageNet 64x64 (295M; here of one class, without a learned variance); two
# small ones.
MODELS = {
  "ddpm": recipe.CONFIGS / "cifar10_vp.py",
  "adm64": recipe.CONFIGS / "imagenet64_adm.py",
  "digits": recipe.CONFIGS / "digits_vp.py",
  "tiny": Path(__file__).with_name("tiny.py"),
}


class Pair(NamedTuple):
  """Both networks, and the shape of their data."""

  network: UNet
  params: Any
  model: UNet2DModel
  shape: tuple[int, int, int]


def make(name: str) -> Pair:
  """A pair of `MODELS`."""
  made = recipe.load(MODELS[name]).model
  shape, process = made.data_shape, processes.discrete(schedules.linear())
  network = made.network.module.clone(
    out_channels=shape[-1], num_classes=0, dropout=0.0, dtype=jnp.float32, remat="none"
  )
  start = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, *shape)), jnp.zeros(1))["params"]
  # Small random numbers in the place of zeros, so that a comparison of outputs means something.
  leaves, tree = jax.tree.flatten(start)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  start = tree.unflatten([p + 0.02 * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)])
  with tempfile.TemporaryDirectory() as folder:
    model = Model(networks.from_linen(network, {}), process, predictions.EPS, {}, codecs.pixels(), shape, shape)
    interop.diffusers.save(f"{folder}/model", model, start)
    theirs = UNet2DModel.from_pretrained(f"{folder}/model", subfolder="unet")
    network, params = interop.diffusers.load_unet(Path(folder) / "model")
  return Pair(network.clone(dropout=0.0), params, theirs.eval(), shape)


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
