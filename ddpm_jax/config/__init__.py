"""Configs: trees of components and sections, and the values they stand for.

A recipe starts from `default_config()` and names components by `spec`; `build` turns a whole tree into an `Experiment`.
"""

from ddpm_jax.config.components import spec
from ddpm_jax.config.experiment import Experiment, build, make
from ddpm_jax.config.files import check_same_run, of_config, of_run, read, saved, write
from ddpm_jax.config.tree import Tree, changed, default_config, expand

__all__ = [
  "Experiment",
  "Tree",
  "build",
  "changed",
  "check_same_run",
  "default_config",
  "expand",
  "make",
  "of_config",
  "of_run",
  "read",
  "saved",
  "spec",
  "write",
]
