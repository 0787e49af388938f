"""Compare the speed of our Inception network for FID with the speed of torch-fidelity's network in PyTorch.

pip install '.[peers]' && pip install --no-deps torch-fidelity==0.4.0
python experiments/benchmarks/features.py [--batch=16] [--size=32] [--rounds=5] [--json=<file>]

Both networks load the same random weights from one file, and the script first checks that their features agree. The
times include the resizing of images. All computations use float32, on a GPU too. The two networks run alternately, so a
drift of the machine's speed affects both. The script prints the median over rounds of the ratio of our images per
second to theirs. Above 1, ours is faster. Absolute times are not comparable between machines.
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


class FakeTorchvision(types.ModuleType):
  """Replace torchvision in the imports of torch-fidelity if torchvision cannot be imported."""

  __path__ = []

  def __getattr__(self, name):
    if name.startswith("__"):
      raise AttributeError(name)
    return sys.modules.get(f"{self.__name__}.{name}", object)


def random_peer(path):
  """Return torch-fidelity's network with random weights, and save the weights to a file."""
  try:
    importlib.import_module("torchvision")
  except Exception:
    sys.modules.update({f"torchvision{part}": FakeTorchvision(f"torchvision{part}") for part in PARTS})
  module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
  network_type = module.FeatureExtractorInceptionV3
  module.load_state_dict_from_url = lambda *_, **__: {}
  torch.manual_seed(0)
  original, network_type.load_state_dict = network_type.load_state_dict, lambda self, state: None
  network = network_type("inception-v3-compat", ["2048"])
  network_type.load_state_dict = original
  for layer in network.modules():
    if isinstance(layer, torch.nn.BatchNorm2d):
      layer.running_mean.normal_(0, 0.2)
      layer.running_var.uniform_(0.5, 2)
    if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
      torch.nn.init.kaiming_normal_(layer.weight)
  torch.save(network.state_dict(), path)
  return network


def main():
  parser = timing.make_parser(__doc__, rounds=5)
  parser.add_argument("--batch", type=timing.positive_int, default=16, help="images per batch")
  parser.add_argument("--size", type=timing.positive_int, default=32, help="image size before resizing")
  args = parser.parse_args()

  with tempfile.TemporaryDirectory() as folder:
    network = random_peer(f"{folder}/random.pth")
    params = jax.device_put(interop.inception.load(f"{folder}/random.pth", sha256_prefix="").params)
  device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
  network.to(device)
  images = np.random.default_rng(0).integers(0, 256, (args.batch, args.size, args.size, 3), dtype=np.uint8)
  torch_images = torch.tensor(images.transpose(0, 3, 1, 2)).to(device)

  @functools.partial(jax.jit, compiler_options=parallel.compiler_options())
  def apply(params, x):
    scaled = (metrics.resize_tf1(x.astype("float32")) - 128) / 128
    return Inception(taps=("2048",)).apply({"params": params}, scaled)["2048"]

  def ours():
    return jax.block_until_ready(apply(params, images))

  @torch.no_grad()
  def theirs():
    return network(torch_images)[0].cpu()

  our_features, their_features = np.asarray(ours()), theirs().numpy()
  error = np.max(np.abs(our_features - their_features)) / their_features.std()
  print(f"largest difference of features: {error:.1e} standard deviations", flush=True)
  if error > 1e-3:
    raise SystemExit(f"Got features that differ by {error:.1e} standard deviations; expected at most 1e-3.")
  times = timing.time_alternately({"ours": ours, "torch-fidelity": theirs}, args.rounds)
  # The ratio of rates is the inverse ratio of times.
  rates = timing.ratio(times, "torch-fidelity", "ours")
  info = timing.machine_info(PyTorch=torch.__version__)
  columns, cells = ["", "ours over torch-fidelity, eager"], [["features per second", timing.format_quartiles(rates)]]
  timing.report(f"batch {args.batch} of {args.size}x{args.size}", columns, cells, info)
  timing.write(args.json, {"machine": info, "ratio": rates, "batch": args.batch, "size": args.size})


if __name__ == "__main__":
  main()
