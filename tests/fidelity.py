"""Import torch-fidelity and clean-fid without torchvision.

Both packages import torchvision, but the functions that the tests use do not need it. So torchvision is not installed
for tests.
"""

import contextlib
import importlib
import sys
import types

import torch

_PARTS = ("", ".transforms", ".transforms.functional", ".datasets", ".models", ".io", ".ops")


class _FakeModule(types.ModuleType):
  __path__: list[str] = []

  def __getattr__(self, name):
    if name.startswith("__"):
      raise AttributeError(name)
    return sys.modules.get(f"{self.__name__}.{name}", object)


@contextlib.contextmanager
def _torchvision():
  names = [f"torchvision{part}" for part in _PARTS]
  original_modules = {name: sys.modules.get(name) for name in names}
  sys.modules.update({name: _FakeModule(name) for name in names})
  try:
    yield
  finally:
    for name, module in original_modules.items():
      if module is None:
        del sys.modules[name]
      else:
        sys.modules[name] = module


def import_module(name):
  """Import a module of torch-fidelity or clean-fid."""
  with _torchvision():
    return importlib.import_module(name)


def random_inception(path):
  """Return the Inception network of torch-fidelity with random weights, and save the weights to a file."""
  module = import_module("torch_fidelity.feature_extractor_inceptionv3")
  network_type = module.FeatureExtractorInceptionV3
  torch.manual_seed(0)
  taps = network_type.get_provided_features_list()
  load_state_dict, network_type.load_state_dict = network_type.load_state_dict, lambda self, state: None
  fetch, module.load_state_dict_from_url = module.load_state_dict_from_url, lambda *_, **__: {}
  try:
    network = network_type("inception-v3-compat", list(taps))
  finally:
    network_type.load_state_dict, module.load_state_dict_from_url = load_state_dict, fetch
  for layer in network.modules():
    if isinstance(layer, torch.nn.BatchNorm2d):
      layer.weight.uniform_(0.5, 1.5)
      layer.bias.normal_(0, 0.2)
      layer.running_mean.normal_(0, 0.2)
      layer.running_var.uniform_(0.5, 2)
    if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
      torch.nn.init.kaiming_normal_(layer.weight)
  torch.save(network.state_dict(), path)
  return network
