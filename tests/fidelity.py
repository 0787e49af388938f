"""torch-fidelity and clean-fid, whose packages import torchvision, which has no CPU build, for what is not used here."""

import contextlib
import importlib
import sys
import types

import torch

_PARTS = ("", ".transforms", ".transforms.functional", ".datasets", ".models", ".io", ".ops")


class _StandIn(types.ModuleType):
  __path__: list[str] = []

  def __getattr__(self, name):
    if name.startswith("__"):
      raise AttributeError(name)
    return sys.modules.get(f"{self.__name__}.{name}", object)


@contextlib.contextmanager
def _torchvision():
  names = [f"torchvision{part}" for part in _PARTS]
  before = {name: sys.modules.get(name) for name in names}
  sys.modules.update({name: _StandIn(name) for name in names})
  try:
    yield
  finally:
    for name, module in before.items():
      if module is None:
        del sys.modules[name]
      else:
        sys.modules[name] = module


def import_module(name):
  """A module of theirs."""
  with _torchvision():
    return importlib.import_module(name)


def random_inception(path):
  """Their Inception network with random weights, which also lie in the file."""
  module = import_module("torch_fidelity.feature_extractor_inceptionv3")
  network_type = module.FeatureExtractorInceptionV3
  torch.manual_seed(0)
  taps = network_type.get_provided_features_list()
  own, network_type.load_state_dict = network_type.load_state_dict, lambda self, state: None
  fetch, module.load_state_dict_from_url = module.load_state_dict_from_url, lambda *_, **__: {}
  try:
    network = network_type("inception-v3-compat", list(taps))
  finally:
    network_type.load_state_dict, module.load_state_dict_from_url = own, fetch
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
