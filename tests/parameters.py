"""Provide random parameters, folders of runs with random parameters, and a network that compiles fast."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import config as configs
from ddpm_jax import data, interop, networks, training
from ddpm_jax.devices import parallel
from ddpm_jax.models import Network
from ddpm_jax.models.network_arguments import keywords
from ddpm_jax.runs import model, reading
from ddpm_jax.training import ema
from tests.recipes import experiment_of, tree_of


def random_params(config, seed=0, scale=0.2):
  """Return random values for every parameter of a config's model, so that the output depends on every input.

  The function compiles nothing.
  """
  return random_like(jax.eval_shape(experiment_of(config).model.init, jax.random.key(0)), seed, scale)


def random_like(shapes, seed=0, scale=0.2):
  """Return random float32 arrays with the shapes of a pytree."""
  generator = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: generator.normal(0, scale, leaf.shape).astype(np.float32), shapes)


@contextlib.contextmanager
def one_device():
  """Let runs use only one of the eight simulated devices, so that their programs compile fast."""
  make = parallel.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(parallel, "make_mesh", lambda data=0, fsdp=1, devices=None: make(data, fsdp, jax.devices()[:1]))
    yield


def write_run(config, folder, seed=0, scale=0.2, averages_seed=None):
  """Write a folder like the folder of a finished run, with random parameters.

  By default, the EMA equals the parameters. With `averages_seed`, the EMA has other random values.
  """
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  experiment = experiment_of(config)
  _, template = model.make_state(experiment, mesh)
  params = random_like(template.params, seed, scale)
  average = params if averages_seed is None else random_like(template.params, averages_seed, scale)
  other_state, averages = ema.split(template.opt_state)
  other_state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), other_state)
  state = template._replace(
    step=np.asarray(config.training.steps, np.int32),
    params=params,
    opt_state=ema.join(other_state, tuple(average for _ in averages)),
    key=jax.random.key(config.seed),
  )
  source, _ = reading.read_data(experiment)
  batches = data.batches(source, config.training.batch_size, seed=config.seed, flip=False, put=lambda batch: batch)
  checkpoints = model.open_checkpoints(experiment, folder)
  items = jax.device_put(training.state_to_items(state), mesh.devices.flat[0])
  checkpoints.save(config.training.steps, items, batches.state | {"batch": config.training.steps}, {"loss": 1.0})
  checkpoints.close()
  batches.close()
  configs.write(folder, tree_of(config))


def dense_network(out_channels: int, num_classes: int, conditions, **_) -> Network:
  """Return a dense network that replaces the U-Net in tests, because it compiles fast.

  The network uses all conditions that the U-Net accepts.
  """

  def init(key, x, time, given):
    arguments = keywords(conditions, given, None)
    height, width, channels = x.shape[1:]
    image = arguments.get("image")
    size = height * width * (channels + (0 if image is None else image.shape[-1]))
    shapes = {"mix": (size, height * width * out_channels), "time": (2, size)}
    shapes |= {"classes": (num_classes, size)} if num_classes else {}
    vector = arguments.get("vector")
    shapes |= {} if vector is None or vector.ndim == 1 else {"vector": (vector.shape[1], size)}
    return {name: jax.random.normal(key, shape) / shape[0] ** 0.5 for name, shape in shapes.items()}

  def apply(params, x, time, given, *, train=False, keys=None):
    arguments = keywords(conditions, given, None)
    image, vector = arguments.get("image"), arguments.get("vector")
    joined = x if image is None else jnp.concatenate([x, image], -1)
    has_level = vector is not None and vector.ndim == 1
    angles = jnp.outer(time + vector if has_level else time, jnp.array([0.01, 0.1]))
    hidden = joined.reshape(len(x), -1) + jnp.sin(angles) @ params["time"]
    hidden += vector @ params["vector"] if "vector" in params else 0
    hidden += params["classes"][arguments["classes"]] if "classes" in arguments else 0
    return (jnp.tanh(hidden) @ params["mix"]).reshape(*x.shape[:-1], out_channels)

  return Network(init, apply)


def use_dense(patch):
  """Replace the U-Net of every config by `dense_network`."""
  # Import these modules first: they need the real U-Net.
  assert interop.diffusers
  assert interop.guided_diffusion
  patch.setattr(networks, "UNet", dense_network)
