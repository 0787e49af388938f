"""Plan the memory and the cost of sampling on devices that need not be present."""

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import predictions, sampling
from ddpm_jax.config import Experiment, Tree
from ddpm_jax.devices import costs, parallel, plan, sampling_plan
from ddpm_jax.devices.progress import heartbeat, print_line
from ddpm_jax.models import Model
from ddpm_jax.models import guided as guided_models
from ddpm_jax.models.guided import Parameters
from ddpm_jax.models.inputs import host_items
from ddpm_jax.runs import frozen, generation, pretrained, programs, scoring
from ddpm_jax.runs.plan import build, choose_devices
from ddpm_jax.runs.steering import Guided, Steering, steer

PyTree = Any


class ModelChoice(NamedTuple):
  """Describe a model to plan for.

  Attributes:
    tree: the config.
    pretrained: a diffusers folder, or a name on the Hugging Face hub. Its model replaces the config's model. "" to keep
      the config's model.
    is_recipe: whether the user chose a config file (see `recipe` in `pretrained.replace_model`).
    keys: the config keys that the user set.
    choices: options of the pretrained model (see `pretrained.replace_model`).
    folder: the folder of the run (see `plan.run_plan`).
  """

  tree: Tree
  pretrained: str = ""
  is_recipe: bool = True
  keys: Collection[str] = ()
  choices: Mapping[str, Any] = MappingProxyType({})
  folder: Path | None = None


def run_sampling_plan(
  model: ModelChoice,
  *,
  topology_name: str | None,
  num_devices: int | None,
  num_samples: int | None = None,
  steering: Steering = Steering(),  # noqa: B008, a constant
  scale: float | None = None,
) -> sampling_plan.SamplingPlan:
  """Compile the sampler for a TPU slice or for devices of this machine, and print its memory and time for one batch.

  The program is the same as in sampling: it encodes the conditions, runs all steps, and decodes the samples. Only the
  shapes of the parameters are read.

  Args:
    model: the model.
    topology_name: see `plan.run_plan`.
    num_devices: see `plan.run_plan`.
    num_samples: the number of samples to generate. If it is below `config.sampling.batch_size`, the batch is smaller.
      None for a batch of `config.sampling.batch_size`.
    steering: the conditions, and the runs whose models guide the sampled model.
    scale: the guidance scale; None for the config's scale.

  Raises:
    ValueError: if the slice does not exist, or if the model cannot be sampled on it.
  """
  devices = choose_devices(topology_name, num_devices)
  experiment, params = _build(model, devices)
  mesh = programs.sampling_mesh(experiment, devices)
  if num_samples is not None:
    experiment = generation.limit_batch(experiment, mesh, num_samples)
  size = experiment.sampling.batch_size
  # The program is the same for all texts, so none is required.
  texts = {name: [""] for name, condition in experiment.model.conditions.items() if condition.host is not None}
  guided = steer(experiment, mesh, steering._replace(given={**texts, **steering.given}), size, scale)
  experiment = guided.experiment
  batch, parameters = _batch_shapes(guided, size), _parameter_shapes(guided, params, mesh)
  program: Any = programs.generate(experiment, mesh, guided.guides, negative=guided.is_negative)
  count = sum(leaf.size for leaf in jax.tree.leaves(parameters.params))
  print_line(f"{count:,} parameters on {len(devices)} x {devices[0].device_kind}; compiling the sampler ...")
  with heartbeat("compiling the sampler"):
    traced = program.trace(parameters, *_scalars(), batch)
    compiled = plan.compile_step(traced, devices)
  result = sampling_plan.make_plan(
    traced,
    compiled,
    _work(guided, batch, parameters),
    params=parameters.params,
    frozen=(parameters.frozen, parameters.guides),
    codec=parameters.frozen.get("codec"),
    devices=devices,
    dtype=scoring.dtype_of(experiment),
  )
  print_line(f"\n{sampling_plan.table(result)}")
  return result


def _build(model: ModelChoice, devices: list[Any]) -> tuple[Experiment, PyTree]:
  """Build the experiment, and return it with the shapes and types of the network's parameters."""
  if not model.pretrained:
    tree, start = pretrained.read_init_from(model.tree, model.folder)
    experiment = build(tree, devices, start)
    return experiment, _network_shapes(experiment.model)
  options: dict[str, Any] = {"keys": model.keys, "choices": model.choices}
  tree, read = pretrained.replace_model(model.pretrained, model.tree, recipe=model.is_recipe, weights=False, **options)
  return build(tree, devices, read.model), read.params


def _batch_shapes(guided: Guided, size: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Return the shapes of the inputs of a batch."""
  batch = host_items(guided.experiment.model.conditions, guided.inputs)
  shapes = jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype), batch)
  low_res = generation.low_res_name(guided.experiment)
  if low_res is not None:
    # Sampling takes the small image from the model before it in a cascade.
    shape = generation.low_res_shape(guided.experiment, low_res)
    shapes[low_res] = jax.ShapeDtypeStruct((size, *shape), jnp.float32)
  return shapes


def _network_shapes(model: Model) -> PyTree:
  return jax.eval_shape(model.init, jax.random.key(0))


def _parameter_shapes(guided: Guided, params: PyTree, mesh: jax.sharding.Mesh) -> Parameters:
  """Return the shapes and shardings of all parameters that sampling needs.

  `params` holds the shapes and types of the network's parameters.
  """
  model = guided.experiment.model
  guides = {name: guide for name, guide in guided.guides._asdict().items() if guide is not None}
  shapes = Parameters(
    params,
    frozen.model_shapes(model),
    {name: (_network_shapes(guide), frozen.model_shapes(guide)) for name, guide in guides.items()},
  )
  return parallel.abstract(shapes, parallel.state_shardings(mesh, shapes))


def _scalars() -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
  """Return the shapes of the seed and of the index of the first sample, as `generation.run_in_batches` passes them."""
  return jax.ShapeDtypeStruct((), jnp.uint32), jax.ShapeDtypeStruct((), jnp.int32)


def _work(guided: Guided, batch: dict[str, jax.ShapeDtypeStruct], parameters: Parameters) -> sampling_plan.Work:
  """Count the FLOPs of the parts of the program, without compiling them."""
  experiment, size = guided.experiment, guided.experiment.sampling.batch_size
  model, sampler, times = experiment.model, experiment.sampler, np.asarray(experiment.times)
  x = jax.ShapeDtypeStruct((size, *model.shape), jnp.float32)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))

  def make_denoise(parameters, keys, batch):
    return guided_models.denoise(model, experiment.guidance, keys, batch, parameters, guided.guides)

  def encode(parameters, keys, batch):
    # The conditions are encoded even if the denoiser is never called.
    make_denoise(parameters, keys, batch)
    return ()

  def call(parameters, keys, batch, x):
    return predictions.x_0_of(make_denoise(parameters, keys, batch)(x, jnp.asarray(times[0], jnp.float32)))

  calls = None if sampler.count_calls is not None else sampling.nfe(sampler, model.process, times)
  encode_flops = costs.matmul_flops(jax.make_jaxpr(encode)(parameters, keys, batch))
  return sampling_plan.Work(
    batch_size=size,
    steps=len(times) - 1,
    calls=calls,
    encode_flops=encode_flops,
    call_flops=costs.matmul_flops(jax.make_jaxpr(call)(parameters, keys, batch, x)) - encode_flops,
    decode_flops=costs.matmul_flops(jax.make_jaxpr(model.decode)(x, parameters.frozen)),
  )
