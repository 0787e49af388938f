"""Random parameters, runs that hold them without any training, and a network of one product: what compiles little."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import config as configs
from ddpm_jax import data, interop, networks, training
from ddpm_jax.devices import parallel
from ddpm_jax.models import Network
from ddpm_jax.models.networks import keywords
from ddpm_jax.runs import model, reading
from ddpm_jax.training import ema
from tests.recipes import experiment_of, tree_of


def random_params(config, seed=0, scale=0.2):
  """Return random values of every parameter, so that the output depends on every input. Nothing compiles."""
  return random_like(jax.eval_shape(experiment_of(config).model.init, jax.random.key(0)), seed, scale)


def random_like(shapes, seed=0, scale=0.2):
  """Return random float32 arrays of these shapes."""
  generator = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: generator.normal(0, scale, leaf.shape).astype(np.float32), shapes)


@contextlib.contextmanager
def one_device():
  """Let runs take one of the eight devices, so that their programs compile quickly."""
  make = parallel.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(parallel, "make_mesh", lambda data=0, fsdp=1, devices=None: make(data, fsdp, jax.devices()[:1]))
    yield


def write_run(config, folder, seed=0, scale=0.2, averages_seed=None):
  """Write a run as its training would leave it, with random parameters that are also their own averages, unless these have a seed."""
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  experiment = experiment_of(config)
  _, template = model.make_state(experiment, mesh)
  params = random_like(template.params, seed, scale)
  average = params if averages_seed is None else random_like(template.params, averages_seed, scale)
  rest, averages = ema.split(template.opt_state)
  rest = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), rest)
  state = template._replace(
    step=np.asarray(config.training.steps, np.int32),
    params=params,
    opt_state=ema.join(rest, tuple(average for _ in averages)),
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
  """Return a network that compiles at once, to stand in for the U-Net: dense over all pixels, of everything that the U-Net is given."""

  def init(key, x, time, given):
    taken = keywords(conditions, given, None)
    height, width, channels = x.shape[1:]
    image = taken.get("image")
    size = height * width * (channels + (0 if image is None else image.shape[-1]))
    shapes = {"mix": (size, height * width * out_channels), "time": (2, size)}
    shapes |= {"classes": (num_classes, size)} if num_classes else {}
    vector = taken.get("vector")
    shapes |= {} if vector is None or vector.ndim == 1 else {"vector": (vector.shape[1], size)}
    return {name: jax.random.normal(key, shape) / shape[0] ** 0.5 for name, shape in shapes.items()}

  def apply(params, x, time, given, *, train=False, keys=None):
    taken = keywords(conditions, given, None)
    image, vector = taken.get("image"), taken.get("vector")
    joined = x if image is None else jnp.concatenate([x, image], -1)
    level = vector is not None and vector.ndim == 1
    angles = jnp.outer(time + vector if level else time, jnp.array([0.01, 0.1]))
    hidden = joined.reshape(len(x), -1) + jnp.sin(angles) @ params["time"]
    hidden += vector @ params["vector"] if "vector" in params else 0
    hidden += params["classes"][taken["classes"]] if "classes" in taken else 0
    return (jnp.tanh(hidden) @ params["mix"]).reshape(*x.shape[:-1], out_channels)

  return Network(init, apply)


def use_dense(patch):
  """Let every U-Net of a config be `dense_network`."""
  # These are about U-Nets, and must know the real one.
  assert interop.diffusers
  assert interop.guided_diffusion
  patch.setattr(networks, "UNet", dense_network)
