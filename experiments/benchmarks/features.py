"""Features per second of the FID Inception network, ours against torch-fidelity's in PyTorch, resizing included.

pip install '.[peers]' && pip install --no-deps torch-fidelity==0.4.0
python experiments/benchmarks/features.py [--batch=16] [--size=32] [--rounds=5] [--json=<file>]

Both have the same random weights, read from one file, and their features are compared first. The two are run in turn, so that a change of the
machine's pace meets both, and the median of the ratios of neighbors is printed, our rate over theirs: above 1 ours is faster. Absolute
times mean nothing. float32 on any device.
"""

import functools
import importlib
import sys
import tempfile
import types

import jax
import numpy as np
import timing
import torch

from ddpm_jax import interop, metrics
from ddpm_jax.devices import parallel
from ddpm_jax.networks.inception import Inception

PARTS = ("", ".transforms", ".transforms.functional", ".datasets", ".models", ".io", ".ops")


class StandIn(types.ModuleType):
  """torchvision, which has no CPU build, as far as torch-fidelity imports it."""

  __path__ = []

  def __getattr__(self, name):
    if name.startswith("__"):
      raise AttributeError(name)
    return sys.modules.get(f"{self.__name__}.{name}", object)


def random_peer(path):
  """torch-fidelity's network with random weights, which are written into the file."""
  try:
    importlib.import_module("torchvision")
  except Exception:
    sys.modules.update({f"torchvision{part}": StandIn(f"torchvision{part}") for part in PARTS})
  module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
  network_type = module.FeatureExtractorInceptionV3
  module.load_state_dict_from_url = lambda *_, **__: {}
  torch.manual_seed(0)
  own, network_type.load_state_dict = network_type.load_state_dict, lambda self, state: None
  network = network_type("inception-v3-compat", ["2048"])
  network_type.load_state_dict = own
  for layer in network.modules():
    if isinstance(layer, torch.nn.BatchNorm2d):
      layer.running_mean.normal_(0, 0.2)
      layer.running_var.uniform_(0.5, 2)
    if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
      torch.nn.init.kaiming_normal_(layer.weight)
  torch.save(network.state_dict(), path)
  return network


def main():
  parser = timing.parser(__doc__, rounds=5)
  parser.add_argument("--batch", type=timing.count, default=16, help="images")
  parser.add_argument("--size", type=timing.count, default=32, help="of the images, before they are resized")
  args = parser.parse_args()

  with tempfile.TemporaryDirectory() as folder:
    network = random_peer(f"{folder}/random.pth")
    params = jax.device_put(interop.inception.load(f"{folder}/random.pth", sha256_prefix="").params)
  device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
  network.to(device)
  images = np.random.default_rng(0).integers(0, 256, (args.batch, args.size, args.size, 3), dtype=np.uint8)
  given = torch.tensor(images.transpose(0, 3, 1, 2)).to(device)

  @functools.partial(jax.jit, compiler_options=parallel.compiler_options())
  def apply(params, x):
    scaled = (metrics.resize_tf1(x.astype("float32")) - 128) / 128
    return Inception(taps=("2048",)).apply({"params": params}, scaled)["2048"]

  def ours():
    return jax.block_until_ready(apply(params, images))

  @torch.no_grad()
  def theirs():
    return network(given)[0].cpu()

  found, wanted = np.asarray(ours()), theirs().numpy()
  error = np.max(np.abs(found - wanted)) / wanted.std()
  print(f"features differ by {error:.1e} of their deviation at most", flush=True)
  if error > 1e-3:
    raise SystemExit("the two networks are not the same")
  times = timing.in_turn({"ours": ours, "torch-fidelity": theirs}, args.rounds)
  # Of rates, not of times.
  rates = timing.ratio(times, "torch-fidelity", "ours")
  here = timing.machine(PyTorch=torch.__version__)
  columns, cells = ["", "ours over torch-fidelity's, eager"], [["features per second", timing.with_quartiles(rates)]]
  timing.report(f"batch {args.batch} of {args.size}x{args.size}", columns, cells, here)
  timing.write(args.json, {"machine": here, "ratio": rates, "batch": args.batch, "size": args.size})


if __name__ == "__main__":
  main()
