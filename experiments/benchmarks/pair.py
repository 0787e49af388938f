"""Make pairs of U-Nets with equal weights, one in our code and one in diffusers with PyTorch."""

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

# The network of Ho et al. for CIFAR-10 (35.7M parameters), the network of Dhariwal and Nichol for ImageNet 64x64 (295M,
# without classes or learned variance), and two small networks.
MODELS = {
  "ddpm": recipe.CONFIGS / "cifar10_vp.py",
  "adm64": recipe.CONFIGS / "imagenet64_adm.py",
  "digits": recipe.CONFIGS / "digits_vp.py",
  "tiny": Path(__file__).with_name("tiny.py"),
}


class Pair(NamedTuple):
  """Store our network, the network of diffusers, and the shape of their data."""

  network: UNet
  params: Any
  model: UNet2DModel
  shape: tuple[int, int, int]


def make(name: str) -> Pair:
  """Make our network and the network of diffusers with equal weights, for a name in `MODELS`."""
  recipe_model = recipe.load(MODELS[name]).model
  shape, process = recipe_model.data_shape, processes.discrete(schedules.linear())
  network = recipe_model.network.module.clone(
    out_channels=shape[-1], num_classes=0, dropout=0.0, dtype=jnp.float32, remat="none"
  )
  start = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, *shape)), jnp.zeros(1))["params"]
  # Add random numbers to weights that are initialized to 0, so that outputs are comparable.
  leaves, tree = jax.tree.flatten(start)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  start = tree.unflatten([p + 0.02 * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)])
  with tempfile.TemporaryDirectory() as folder:
    model = Model(networks.from_linen(network, {}), process, predictions.EPS, {}, codecs.pixels(), shape, shape)
    interop.diffusers.save(f"{folder}/model", model, start)
    theirs = UNet2DModel.from_pretrained(f"{folder}/model", subfolder="unet")
    network, params = interop.diffusers.load_network(Path(folder) / "model")
  return Pair(network.clone(dropout=0.0), params, theirs.eval(), shape)


def batch_of(size: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
  """Return a batch of random data, time inputs and targets."""
  rng = np.random.default_rng(0)
  batch = {key: rng.standard_normal((size, *shape), np.float32) for key in ("x", "target")}
  return batch | {"t": rng.integers(0, 1000, size)}


def channels_first(x: np.ndarray) -> torch.Tensor:
  """Convert an array [B, H, W, C] to a tensor [B, C, H, W]."""
  return torch.tensor(np.moveaxis(x, -1, 1))


def check_outputs(ours: Any, theirs: torch.Tensor, tolerance: float) -> float:
  """Return the root mean square difference of two outputs, divided by the standard deviation of `theirs`.

  Raises:
    SystemExit: if the difference exceeds the tolerance. The two networks then compute different functions, so their
      times cannot be compared.
  """
  expected = np.moveaxis(theirs.float().cpu().numpy(), 1, -1)
  error = float(np.sqrt(np.mean((np.asarray(ours, np.float32) - expected) ** 2)) / np.std(expected))
  if not error <= tolerance:
    raise SystemExit(f"Got outputs with a relative difference of {error:.1e}; expected at most {tolerance}.")
  return error
