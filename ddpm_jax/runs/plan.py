"""What a config needs on devices that need not be there."""

from typing import Any

import jax

from ddpm_jax import config, training
from ddpm_jax.config import Experiment, Tree
from ddpm_jax.devices import parallel, plan, startup, topology
from ddpm_jax.devices.progress import heartbeat, print_line
from ddpm_jax.runs import frozen, model, scoring, stepping


def run_plan(tree: Tree, *, topology_name: str | None, num_devices: int | None) -> plan.Plan:
  """Compile the train step for a TPU slice, or for devices of this machine, and print what it needs.

  Args:
    tree: the config of what is trained; neither its data nor a run are touched.
    topology_name: a TPU slice, such as "v5e:4x4"; None for this machine.
    num_devices: how many of this machine's devices, or of its CPU taken for as many; None for all there are.

  Raises:
    ValueError: if there is no such slice, or the config cannot be trained on it.
  """
  if topology_name and num_devices:
    raise ValueError(f"Got --topology={topology_name} with --devices={num_devices}; expected one of them.")
  if topology_name:
    devices = topology.topology_devices(topology_name)
  elif num_devices:
    devices = topology.simulate_devices(num_devices)
  else:
    startup.start_devices()
    devices = jax.devices()
  if devices[0].platform == "cpu" and "model.network.kernels" in tree.parameters:
    # A CPU stands for other platforms, to whose memory its own programs say nothing.
    tree = config.replace(tree, "model.network.kernels", "plain")
  # Only now: what is built of a config starts JAX.
  experiment = config.build(tree)
  mesh, shapes, batch, fixed = _layout(experiment, devices)
  step = parallel.jit_step(stepping.step(experiment, mesh), mesh, shapes, fixed)
  size = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
  print_line(f"{size:,} parameters on {len(devices)} x {devices[0].device_kind}; compiling the train step ...")
  with heartbeat("compiling the train step"):
    traced = step.trace(shapes, batch, *(() if fixed is None else (fixed,)))
    compiled = plan.compile_step(traced, devices)
  found = plan.make_plan(
    traced,
    compiled,
    params=shapes.params,
    state=(shapes, fixed),
    batch_size=experiment.training.batch_size,
    devices=devices,
    dtype=scoring.dtype_of(experiment),
  )
  print_line(f"\n{plan.table(found)}")
  return found


def _layout(experiment: Experiment, devices: list[Any]) -> tuple[jax.sharding.Mesh, training.TrainState, Any, Any]:
  """Return the mesh, and the shapes of a state, a batch and the frozen parameters laid out on it."""
  mesh = stepping.mesh_of(experiment, devices)
  fixed = frozen.shapes(experiment, mesh)
  _, shapes = model.make_state(experiment, mesh, fixed)
  return mesh, shapes, stepping.batch_shapes(experiment, experiment.training.batch_size), fixed
