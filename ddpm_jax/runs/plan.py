"""Plan the memory and the cost of training on devices that need not be present."""

from typing import Any

import jax

from ddpm_jax import config, training
from ddpm_jax.config import Experiment, Tree
from ddpm_jax.devices import parallel, plan, startup, topology
from ddpm_jax.devices.progress import heartbeat, print_line
from ddpm_jax.runs import frozen, model, scoring, stepping


def run_plan(tree: Tree, *, topology_name: str | None, num_devices: int | None) -> plan.Plan:
  """Compile the train step for a TPU slice or for devices of this machine, and print the step's memory and time.

  Args:
    tree: the config to train. Neither its data nor a run's folder is opened.
    topology_name: a TPU slice, such as "v5e:4x4"; None for this machine.
    num_devices: the number of GPUs or TPUs of this machine, or of devices that its CPU simulates; None for all devices.

  Raises:
    ValueError: if the slice does not exist, or if the config cannot be trained on it.
  """
  devices = choose_devices(topology_name, num_devices)
  # Building components starts JAX, so choose the devices first.
  experiment = config.build(with_plain_kernels(tree, devices))
  mesh, shapes, batch, frozen_shapes = _layout(experiment, devices)
  step = parallel.jit_step(stepping.step(experiment, mesh), mesh, shapes, frozen_shapes)
  size = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
  print_line(f"{size:,} parameters on {len(devices)} x {devices[0].device_kind}; compiling the train step ...")
  with heartbeat("compiling the train step"):
    traced = step.trace(shapes, batch, *(() if frozen_shapes is None else (frozen_shapes,)))
    compiled = plan.compile_step(traced, devices)
  result = plan.make_plan(
    traced,
    compiled,
    params=shapes.params,
    state=(shapes, frozen_shapes),
    batch_size=experiment.training.batch_size,
    devices=devices,
    dtype=scoring.dtype_of(experiment),
  )
  print_line(f"\n{plan.table(result)}")
  return result


def choose_devices(topology_name: str | None, num_devices: int | None) -> list[Any]:
  """Return the devices of a TPU slice or of this machine, see `run_plan`."""
  if topology_name and num_devices:
    raise ValueError(f"Got --topology={topology_name} with --devices={num_devices}; expected only one of them.")
  if topology_name:
    return topology.topology_devices(topology_name)
  if num_devices:
    return topology.simulate_devices(num_devices)
  startup.start_devices()
  return jax.devices()


def with_plain_kernels(tree: Tree, devices: list[Any]) -> Tree:
  """Return the config with plain kernels if the devices are CPUs, which simulate another platform.

  Kernels tuned for a CPU would distort the memory estimate.
  """
  if devices[0].platform == "cpu" and "model.network.kernels" in tree.parameters:
    return config.replace(tree, "model.network.kernels", "plain")
  return tree


def _layout(experiment: Experiment, devices: list[Any]) -> tuple[jax.sharding.Mesh, training.TrainState, Any, Any]:
  """Return the mesh, and the shapes and shardings of a state, a batch and the frozen parameters."""
  mesh = stepping.training_mesh(experiment, devices)
  frozen_shapes = frozen.shapes(experiment, mesh)
  _, shapes = model.make_state(experiment, mesh, frozen_shapes)
  return mesh, shapes, stepping.batch_shapes(experiment, experiment.training.batch_size), frozen_shapes
