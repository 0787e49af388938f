"""Read configs, fill in their defaults, and build the objects they describe.

A recipe starts from `default_config()` and names components with `spec`. `build` turns a config into an `Experiment`.
"""

from ddpm_jax.config.components import spec
from ddpm_jax.config.experiment import Experiment, build, make
from ddpm_jax.config.files import check_same_run, find_run, read, read_run, to_tree, write
from ddpm_jax.config.tree import Tree, default_config, expand, replace

__all__ = [
  "Experiment",
  "Tree",
  "build",
  "check_same_run",
  "default_config",
  "expand",
  "find_run",
  "make",
  "read",
  "read_run",
  "replace",
  "spec",
  "to_tree",
  "write",
]
