from typing import Any, NamedTuple


class Neighbours(NamedTuple):
  samples: Any
  nearest: Any
  distances: Any
  typical: float


class Content(NamedTuple):
  title: Any
  facts: Any
  evaluation: Any
  config: Any
  samples: Any
  labels: Any
  denoising: Any
  denoising_times: Any
  metrics: Any
  schedule: Any
  neighbours: Any
  bound_terms: Any


def write(path, content):
  open(path, "w").write("x")
