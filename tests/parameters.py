"""Random parameters, runs that hold them without any training, and programs that tests share: what compiles little."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import build, data, ema, metrics, parallel, workdir
from ddpm_jax.runs import bits, model

_make_mesh = parallel.make_mesh
_programs = {}


def random_params(config, seed=0, scale=0.2):
  """Return random values of every parameter, so that the output depends on every input. Nothing compiles."""
  return random_like(jax.eval_shape(build.build_params_init(config), jax.random.key(0)), seed, scale)


def random_like(shapes, seed=0, scale=0.2):
  """Return random float32 arrays of these shapes."""
  generator = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: generator.normal(0, scale, leaf.shape).astype(np.float32), shapes)


def one_device_mesh(data=0, fsdp=1, devices=None):
  """Stand in for `parallel.make_mesh` with one of the eight devices, so that programs compile quickly."""
  return _make_mesh(data, fsdp, jax.devices()[:1])


def write_run(config, folder, seed=0, scale=0.2, averages_seed=None):
  """Write a run as its training would leave it, with random parameters that are also their own averages, unless these have a seed."""
  mesh = one_device_mesh()
  _, template = _shared_state(config, None, mesh)
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
  source, _ = build.build_data(config)
  batches = data.batches(source, config.training.batch_size, seed=config.seed, flip=False, put=lambda batch: batch)
  checkpoints = model.open_checkpoints(config, folder)
  items = jax.device_put(model.items_of(state), mesh.devices.flat[0])
  checkpoints.save(config.training.steps, items, batches.state | {"batch": config.training.steps}, {"loss": 1.0})
  checkpoints.close()
  batches.close()
  workdir.write_config(folder, config.to_dict())


class Dense:
  """A network that compiles at once, to stand in for the U-Net: dense over all pixels, of everything that the U-Net is given."""

  def __init__(self, *, out_channels, num_classes, **_):
    self.out_channels, self.num_classes = out_channels, num_classes

  def check_input(self, shape):
    pass

  def init(self, key, x, label, *, image=None, **_):
    height, width, channels = x.shape[1:]
    size = height * width * (channels + (0 if image is None else image.shape[-1]))
    shapes = {"mix": (size, height * width * self.out_channels), "time": (2, size)}
    shapes |= {"classes": (self.num_classes, size)} if self.num_classes else {}
    return {"params": {name: jax.random.normal(key, shape) / shape[0] ** 0.5 for name, shape in shapes.items()}}

  def apply(self, variables, x, label, *, classes=None, image=None, vector=None, **_):
    params, given = variables["params"], x if image is None else jnp.concatenate([x, image], -1)
    angles = jnp.outer(label if vector is None else label + vector, jnp.array([0.01, 0.1]))
    hidden = given.reshape(len(x), -1) + jnp.sin(angles) @ params["time"]
    hidden += 0 if classes is None else params["classes"][classes]
    return (jnp.tanh(hidden) @ params["mix"]).reshape(*x.shape[:-1], self.out_channels)


def use_dense(patch):
  """Let every model that denoises be a `Dense` network."""
  patch.setattr(build.model, "UNet", Dense)


@contextlib.contextmanager
def quick_runs():
  """Let runs take one device, and let runs of equal configs share their compiled programs."""
  with pytest.MonkeyPatch.context() as patch:
    _share_programs(patch)
    yield


def _share_programs(patch):
  patch.setattr(parallel, "make_mesh", one_device_mesh)
  for module, name in (
    (build, "build_generate"),
    (build, "build_edit"),
    (build, "build_denoising"),
    (bits, "_function"),
  ):
    patch.setattr(module, name, _shared(getattr(module, name)))
  patch.setattr(build, "build_step", _shared(build.build_step, key=_step_key))
  patch.setattr(metrics, "extractor", _shared_extractor)
  patch.setattr(model, "make_state", _shared_state)
  patch.setattr(parallel, "jit_step", _shared_step)


_jit_step, _make_state, _extractor = parallel.jit_step, model.make_state, metrics.extractor


def _shared_extractor(space, batch_size, devices=None):
  own = space.provenance.get("sha256", space.name)
  identity = ("extractor", own, batch_size, parallel.make_mesh(devices=devices))
  return _remember(identity, lambda: _extractor(space, batch_size, devices))


class _Step:
  """A jitted train step that is traced, lowered and compiled once."""

  def __init__(self, jitted):
    self._jitted, self._lowered, self._compiled = jitted, None, None

  def lower(self, *arguments):
    self._lowered = self._lowered or self._jitted.lower(*arguments)
    return self

  def trace(self, *arguments):
    return self._jitted.trace(*arguments)

  def compile(self):
    self._compiled = self._compiled or self._lowered.compile()
    return self._compiled


def _shared_step(step, mesh, state):
  return _remember(("step", step, mesh), lambda: _Step(_jit_step(step, mesh, state)))


def _shared_state(config, optimizer, mesh, params=None):
  optimizer = build.build_optimizer(config) if optimizer is None else optimizer
  if params is not None:
    return _make_state(config, optimizer, mesh, params)
  return _remember(("state", _step_key(config), mesh), lambda: _make_state(config, optimizer, mesh))


def _shared(function, key=None):
  """Return the function with a memory of what it gave for equal configs and equal other arguments."""

  def call(config, *arguments, **options):
    own = (key or _json)(config)
    identity = (function, own, *map(_identify, arguments), *sorted(options.items()))
    return _remember(identity, lambda: function(config, *arguments, **options))

  return call


def _remember(identity, make):
  identity = (build.model.UNet, *identity)
  if identity not in _programs:
    _programs[identity] = make()
  return _programs[identity]


def _identify(argument):
  return tuple(value and _json(value) for value in argument) if isinstance(argument, build.Guides) else argument


def _json(config):
  return json.dumps(config.to_dict(), sort_keys=True)


def _step_key(config):
  """Return what the train step follows from, and a little more."""
  tree = config.to_dict()
  training = tree["training"]
  kept = {name: training[name] for name in ("batch_size", "accumulate")}
  if config.optimizer.schedule != "constant":
    kept["steps"] = training["steps"]
  ema_settings = {name: value for name, value in tree["ema"].items() if name != "snapshot_every"}
  left = {name: tree[name] for name in tree if name not in ("evaluation", "sampling", "guidance", "editing")}
  return json.dumps(left | {"training": kept, "ema": ema_settings}, sort_keys=True)
